#!/usr/bin/env python3
"""Other loaders beside tensord_bench, on the same files and the same clock.

    peers.py install FOLDER   makes an environment with the peers at the versions below; prints its python
    peers.py serve PEER       one peer for tensord_bench, which starts it and keeps it alive between rounds

`serve` answers lines of JSON, one a request: {"act": "load", "path": ...} gives
{"begin_ns", "end_ns", "cpu_s"} of the monotonic clock (imports, checks and giving memory back are outside),
or {"cannot": reason}, {"error": ...}.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The peers ask for CUDA builds of torch, gigabytes: they come without what they depend on.
TORCH = ("torch==2.13.0", "numpy==2.4.6", "packaging==26.3", "humanize==4.17.0")
PEERS = ("safetensors==0.8.0", "runai-model-streamer==0.17.0", "fastsafetensors==0.5.0")

Tensors = dict[str, Any]
Slice = tuple[str, int, int, int, int]  # name, first row, rows, first column, columns; of a vector: one row


class CannotError(Exception):
    """What this peer has no way to do; its text is the reason."""


class Peer:
    """One loader. What `load` returns can be used at once, until `close` is called."""

    package = ""

    def load(self, path: str) -> Tensors:
        raise NotImplementedError

    def first(self, path: str, name: str) -> Any:
        raise CannotError("loads whole files")

    def open_slices(self, path: str, slices: list[Slice]) -> Callable[[Tensors], None]:
        """What copies all slices into the tensors it is given; the file is open already."""
        raise CannotError("has no slices")

    def close(self) -> None:
        """Gives everything back."""


def item(rank: int, piece: Slice) -> Any:
    _, row, rows, column, columns = piece
    columns_item = slice(column, column + columns)
    return (slice(row, row + rows), columns_item) if rank == 2 else (columns_item,)


class Safetensors(Peer):
    """Every tensor copied out of the mapping."""

    package = "safetensors"

    def load(self, path: str) -> Tensors:
        from safetensors.torch import load_file

        return {name: tensor.clone() for name, tensor in load_file(path).items()}

    def first(self, path: str, name: str) -> Any:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(name).clone()

    def open_slices(self, path: str, slices: list[Slice]) -> Callable[[Tensors], None]:
        from safetensors import safe_open

        file = safe_open(path, "pt").__enter__()

        def gather(targets: Tensors) -> None:
            for piece in slices:
                part = file.get_slice(piece[0])
                targets[piece[0]].copy_(part[item(len(part.get_shape()), piece)])

        return gather


class SafetensorsMapped(Safetensors):
    """The mapping itself, a byte of every page read."""

    def load(self, path: str) -> Tensors:
        import torch
        from safetensors.torch import load_file

        tensors: Tensors = load_file(path)
        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8)[::4096].sum()
        return tensors

    def open_slices(self, path: str, slices: list[Slice]) -> Callable[[Tensors], None]:
        raise CannotError("same as safetensors")


class RunAI(Peer):
    """As it comes: io_uring and O_DIRECT where it can."""

    package = "runai-model-streamer"
    strategy = ""

    def __init__(self) -> None:
        os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = "-1"
        os.environ["RUNAI_STREAMER_LOG_LEVEL"] = "ERROR"
        if self.strategy:
            os.environ["RUNAI_STREAMER_FS_STRATEGY"] = self.strategy

    def load(self, path: str) -> Tensors:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            return dict(streamer.get_tensors())


class RunAIBuffered(RunAI):
    strategy = "sync_buffered"


class FastSafetensors(Peer):
    """Without GPU: its reader threads into host memory."""

    package = "fastsafetensors"
    opened: tuple[Any, ...] = ()

    def load(self, path: str) -> Tensors:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True, set_numa=False)
        loader.add_filenames({0: [path]})
        buffers = loader.copy_files_to_device()
        self.opened = (buffers, loader)
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    def close(self) -> None:
        for one in self.opened:
            one.close()
        self.opened = ()


class Tensord(Peer):
    """The product by its Python package: for comparison where objects cost most."""

    package = "tensord"
    model: Any = None

    def load(self, path: str) -> Tensors:
        import tensord

        self.model = tensord.open(path)
        self.model.wait()
        return dict(self.model.items())

    def first(self, path: str, name: str) -> Any:
        import tensord

        self.model = tensord.open(path)
        return self.model[name].clone()

    def open_slices(self, path: str, slices: list[Slice]) -> Callable[[Tensors], None]:
        import tensord

        model = tensord.open(path)
        model.wait()
        orders = [(piece[0], item(len(model.entry(piece[0]).shape), piece)) for piece in slices]
        return lambda targets: model.load_into([(name, cut, targets[name]) for name, cut in orders])

    def close(self) -> None:
        self.model = None


PEER_OF: dict[str, type[Peer]] = {
    "tensord, Python": Tensord,
    "safetensors, copied": Safetensors,
    "safetensors, mapped": SafetensorsMapped,
    "Run:ai": RunAI,
    "Run:ai, buffered": RunAIBuffered,
    "fastsafetensors": FastSafetensors,
}


# ---- the answers -------------------------------------------------------------------------------------


@contextmanager
def clock(answer: dict[str, Any]) -> Iterator[None]:
    def cpu_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    cpu_begin, answer["begin_ns"] = cpu_s(), time.monotonic_ns()
    yield
    answer["end_ns"], answer["cpu_s"] = time.monotonic_ns(), cpu_s() - cpu_begin


def file_tensors(path: str) -> Tensors:
    """What the tensors of a file of BF16 must be, by a parser of our own."""
    import torch

    with Path(path).open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8 : 8 + length])
    every = torch.frombuffer(mapping, dtype=torch.uint8)[8 + length :]
    return {
        name: every[slice(*tensor["data_offsets"])].view(torch.bfloat16).view(tensor["shape"])
        for name, tensor in header.items()
    }


def compare(path: str, tensors: Tensors, expected: Tensors) -> None:
    import torch

    for name, tensor in expected.items():
        if not torch.equal(tensors[name].view(torch.int16), tensor.view(torch.int16)):
            raise ValueError(f"{path}: {name} differs from the file")


class Acts:
    """The requests, by name. `checked` holds what was compared byte by byte already: once is enough."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.checked: set[str] = set()
        self.held: Tensors = {}
        self.targets: Tensors = {}
        self.gather_all: Callable[[Tensors], None] = lambda _: None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        with clock(answer):
            tensors = self.peer.load(request["path"])
        if request["path"] not in self.checked:
            compare(request["path"], tensors, file_tensors(request["path"]))
            self.checked.add(request["path"])
        del tensors
        self.peer.close()
        return answer

    def first(self, request: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        with clock(answer):
            tensor = self.peer.first(request["path"], request["name"])
        del tensor
        self.peer.close()
        return answer

    def open_slices(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        slices: list[Slice] = [tuple(piece) for piece in request["slices"]]
        wanted = file_tensors(request["path"])
        wanted = {piece[0]: wanted[piece[0]][item(wanted[piece[0]].dim(), piece)] for piece in slices}
        # One block for all, as tensord_bench has it.
        block = torch.ones(sum(tensor.numel() for tensor in wanted.values()), dtype=torch.bfloat16)
        parts = block.split([tensor.numel() for tensor in wanted.values()])
        self.targets = {name: part.view(wanted[name].shape) for name, part in zip(wanted, parts)}
        self.gather_all = self.peer.open_slices(request["path"], slices)
        self.gather_all(self.targets)
        compare(request["path"], self.targets, wanted)
        return {}

    def gather(self, _: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        with clock(answer):
            self.gather_all(self.targets)
        return answer

    def hold(self, request: dict[str, Any]) -> dict[str, Any]:
        self.held = self.peer.load(request["path"])
        return {}

    def drop(self, _: dict[str, Any]) -> dict[str, Any]:
        self.held, self.targets, self.gather_all = {}, {}, lambda _: None
        self.peer.close()
        return {}


def serve(name: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints is no reply
    peer = PEER_OF[name]()
    acts = Acts(peer)
    version = ""
    if peer.package != "tensord":
        try:
            version = importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
    print(json.dumps({"package": peer.package, "version": version}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request.get("environment", {}))
        try:
            answer = getattr(acts, request["act"])(request)
        except (CannotError, ImportError) as error:
            answer = {"cannot": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        print(json.dumps(answer), file=replies, flush=True)


def install(folder: Path) -> None:
    python = folder / "bin" / "python"
    stamp = folder / "pins"
    pins = " ".join((*TORCH, *PEERS))
    if not stamp.exists() or stamp.read_text() != pins:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
        subprocess.run([*pip, *TORCH], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "--no-deps", *PEERS], check=True, stdout=sys.stderr)
        stamp.write_text(pins)
    print(python)


def main() -> int:
    words = sys.argv[1:]
    if len(words) == 2 and words[0] == "install":
        install(Path(words[1]))
    elif len(words) == 2 and words[0] == "serve" and words[1] in PEER_OF:
        serve(words[1])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
