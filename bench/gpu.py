#!/usr/bin/env python3
"""Loads into GPU memory, measured on a machine with GPUs: product, ceiling and peers in one run.

    gpu.py [--folder FOLDER] [--layers 40] [--rounds 9] [--json FILE] [CASE...]

Needs torch with CUDA, $TENSORD_BINARY, and the package. It starts a daemon of its own. Times are absolute,
medians of rounds; "floor" is the payload at the rate of plain copies from registered memory, measured in the
same run. Every byte is compared once per case.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensord
import torch

GB = 1e9
HIDDEN, INTERMEDIATE, KEY_VALUES, VOCABULARY = 5120, 17408, 1024, 151936  # Qwen3-14B
SHARDS = 8


# ---- checkpoints -----------------------------------------------------------------------------------------


def qwen_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (HIDDEN,)
        shapes[name + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[name + "mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[name + "mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[name + "post_attention_layernorm.weight"] = (HIDDEN,)
        shapes[name + "self_attn.k_norm.weight"] = (128,)
        shapes[name + "self_attn.k_proj.weight"] = (KEY_VALUES, HIDDEN)
        shapes[name + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[name + "self_attn.q_norm.weight"] = (128,)
        shapes[name + "self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[name + "self_attn.v_proj.weight"] = (KEY_VALUES, HIDDEN)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def write_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], shards: int) -> list[Path]:
    """Random BF16 weights, hot in the page cache as they were just written."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > total / shards and len(groups) < shards:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += 2 * int(np.prod(shape))
    paths, weight_map = [], {}
    for at, names in enumerate(groups):
        path = folder / f"model-{at + 1:05}-of-{len(groups):05}.safetensors"
        header, offset = {}, 0
        for name in names:
            size = 2 * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": "BF16",
                "shape": list(shapes[name]),
                "data_offsets": [offset, offset + size],
            }
            weight_map[name] = path.name
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                count = int(np.prod(shapes[name]))
                file.write(
                    torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16, device="cuda").cpu().numpy()
                )
        paths.append(path)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def slice_of(name: str, rank: int, world: int, shape: tuple[int, ...]) -> Any:
    """The tensor-parallel slice of a rank, as engines cut Qwen3."""
    if world == 1 or len(shape) == 1:
        return ...
    by_columns = "down_proj" in name or "o_proj" in name
    width = shape[1 if by_columns else 0] // world
    part = slice(rank * width, (rank + 1) * width)
    return np.s_[:, part] if by_columns else np.s_[part]


def make_targets(
    shapes: dict[str, tuple[int, ...]], rank: int, world: int, device: str
) -> list[tuple[str, Any, Any]]:
    orders = []
    for name, shape in shapes.items():
        index = slice_of(name, rank, world, shape)
        sliced = np.broadcast_to(np.int8(0), shape)[index].shape
        orders.append((name, index, torch.full(sliced, 113, dtype=torch.bfloat16, device=device)))
    torch.cuda.synchronize(device)
    return orders


def compare(orders: list[tuple[str, Any, Any]], model: tensord.Model) -> None:
    for name, index, target in orders:
        if not torch.equal(target.view(torch.int16), model[name][index].to(target.device).view(torch.int16)):
            raise SystemExit(f"{name}{index}: wrong bytes")


# ---- daemon ----------------------------------------------------------------------------------------------


class Daemon:
    def __init__(self, *flags: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="tensord-gpu-")
        os.environ.update(
            TENSORD_RUNTIME_DIR=self.folder, TENSORD_STATE_DIR=self.folder, TENSORD_AUTOSTART="0"
        )
        self.log = Path(self.folder, "log")
        binary = os.environ["TENSORD_BINARY"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([binary, "serve", *flags], stdout=log, stderr=log)
        while not Path(self.folder, "socket").exists():
            time.sleep(0.01)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def daemon(*flags: str) -> Iterator[Daemon]:
    running = Daemon(*flags)
    try:
        yield running
    finally:
        running.stop()


# ---- measuring -------------------------------------------------------------------------------------------


def median_of(rounds: int, act: Callable[[], float]) -> tuple[float, float]:
    """Median and the interquartile range over it."""
    times = sorted(act() for _ in range(rounds))
    low, middle, high = statistics.quantiles(times, n=4) if rounds > 2 else (times[0],) * 3
    return statistics.median(times), (high - low) / middle


def ceiling(device: str = "cuda:0", size_bytes: int = 2 << 30) -> float:
    """Bytes a second of plain copies of 16 MiB from registered memory, two streams."""
    source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    source.random_()
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def once() -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for at in range(0, size_bytes, 16 << 20):
            with torch.cuda.stream(streams[at >> 24 & 1]):
                target[at : at + (16 << 20)].copy_(source[at : at + (16 << 20)], non_blocking=True)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    return size_bytes / median_of(9, once)[0]


class Rows(ctypes.Structure):
    """CUDA_MEMCPY2D: host rows to device rows."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("source_x", "source_y")),
        ("source_type", ctypes.c_int),
        *((name, ctypes.c_size_t) for name in ("source", "source_device", "source_array", "source_pitch")),
        *((name, ctypes.c_size_t) for name in ("target_x", "target_y")),
        ("target_type", ctypes.c_int),
        *((name, ctypes.c_size_t) for name in ("target_host", "target", "target_array", "target_pitch")),
        *((name, ctypes.c_size_t) for name in ("width", "height")),
    )


def rows_ceiling(row_bytes: int, count: int) -> float:
    """Bytes a second of plain 2-D copies of 16 MiB, two streams; the rows are two of them apart."""
    driver = ctypes.CDLL("libcuda.so.1")
    source = torch.empty(count * 2 * row_bytes, dtype=torch.uint8, pin_memory=True)
    source.random_()
    target = torch.empty(count * row_bytes, dtype=torch.uint8, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    step = max((16 << 20) // row_bytes, 1)

    def once() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for number, row in enumerate(range(0, count, step)):
            piece = Rows(
                source_type=1,
                source=source.data_ptr() + row * 2 * row_bytes,
                source_pitch=2 * row_bytes,
                target_type=2,
                target=target.data_ptr() + row * row_bytes,
                target_pitch=row_bytes,
                width=row_bytes,
                height=min(step, count - row),
            )
            stream = ctypes.c_void_p(streams[number % 2].cuda_stream)
            if driver.cuMemcpy2DAsync_v2(ctypes.byref(piece), stream) != 0:
                raise SystemExit("cuMemcpy2DAsync fails")
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    once()
    return count * row_bytes / median_of(9, once)[0]


Result = dict[str, Any]


def say(result: Result) -> Result:
    print(json.dumps(result), flush=True)
    return result


def bytes_of(orders: list[tuple[str, Any, Any]]) -> int:
    return sum(target.numel() * 2 for _, _, target in orders)


# ---- cases -----------------------------------------------------------------------------------------------


def resident(options: argparse.Namespace) -> list[Result]:
    """The model is on the node: all of it into one GPU."""
    shapes = qwen_shapes(options.layers)
    results = []
    with daemon("--host-memory", "70GiB") as running, tensord.open(options.checkpoint) as model:
        model.wait()
        orders = make_targets(shapes, 0, 1, "cuda:0")
        payload = bytes_of(orders)
        torch.cuda.synchronize()
        free_before = torch.cuda.mem_get_info(0)[0]
        begin = time.perf_counter()
        report = model.load_into(orders)
        first = time.perf_counter() - begin
        held = free_before - torch.cuda.mem_get_info(0)[0]
        assert report.device_bytes == payload, report
        compare(orders, model)
        cpu = running.cpu_seconds()
        spent = 0.0

        def once() -> float:
            nonlocal spent, report
            begin = time.perf_counter()
            report = model.load_into(orders)
            elapsed = time.perf_counter() - begin
            spent += elapsed
            return elapsed

        seconds, spread = median_of(options.rounds, once)
        rate = ceiling()
        results.append(
            say(
                {
                    "case": "resident",
                    "payload_gb": payload / GB,
                    "seconds": seconds,
                    "spread": spread,
                    "gb_per_s": payload / GB / seconds,
                    "floor_s": payload / rate,
                    "ratio": payload / rate / seconds,
                    "first_time_s": first,
                    "device_mib_of_daemon": held >> 20,
                    "daemon_cores": (running.cpu_seconds() - cpu) / spent,
                    "plan_ms": report.plan_seconds * 1e3,
                }
            )
        )
    return results


def first_load(options: argparse.Namespace) -> list[Result]:
    """Nothing is on the node, the page cache is hot: open to the last byte in GPU memory."""
    shapes = qwen_shapes(options.layers)
    orders = make_targets(shapes, 0, 1, "cuda:0")
    payload = bytes_of(orders)
    results = []
    with daemon("--host-memory", "70GiB"):

        def once() -> float:
            begin = time.perf_counter()
            with tensord.open(options.checkpoint) as model:
                model.load_into(orders)
                elapsed = time.perf_counter() - begin
                model.wait()
                replica = str(model.info()["replica"])
            gc.collect()
            deadline = time.monotonic() + 10
            while True:
                try:
                    tensord._library.call("evict", replica)
                    return elapsed
                except tensord.Error:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

        cold_pool = once()
        seconds, spread = median_of(options.rounds, once)
        with tensord.open(options.checkpoint) as model:
            model.load_into(orders)
            compare(orders, model)
        results.append(
            say(
                {
                    "case": "first_load",
                    "payload_gb": payload / GB,
                    "seconds": seconds,
                    "spread": spread,
                    "gb_per_s": payload / GB / seconds,
                    "cold_pool_s": cold_pool,
                }
            )
        )
    return results


def rows(options: argparse.Namespace) -> list[Result]:
    """Column slices, rows of 64 B to 1 MiB, pitch twice the row."""
    results = []
    for row_bytes in (16, 32, 64, 128, 256, 512, 1024, 4096, 65536, 1 << 20):
        count = min((1 << 30) // row_bytes, 1 << 22)
        folder = options.folder / f"rows-{row_bytes}"
        write_checkpoint(folder, {"w": (count, row_bytes)}, 1)  # elements of 2 bytes: the pitch is two rows
        with daemon("--host-memory", "20GiB"), tensord.open(folder) as model:
            target = torch.full((count, row_bytes // 2), 113, dtype=torch.bfloat16, device="cuda")
            orders = [("w", np.s_[:, row_bytes // 4 : row_bytes // 4 + row_bytes // 2], target)]
            model.wait()
            report = model.load_into(orders)
            assert report.device_bytes == report.bytes, report
            compare(orders, model)

            def once(model: tensord.Model = model, orders: Any = orders) -> float:
                begin = time.perf_counter()
                model.load_into(orders)
                return time.perf_counter() - begin

            seconds, spread = median_of(options.rounds, once)
            payload = bytes_of(orders)
            rate = rows_ceiling(row_bytes, count)
            results.append(
                say(
                    {
                        "case": "rows",
                        "row_bytes": row_bytes,
                        "gb_per_s": payload / GB / seconds,
                        "ceiling_gb_per_s": rate / GB,
                        "spread": spread,
                        "ratio": payload / rate / seconds,
                    }
                )
            )
    return results


def small(options: argparse.Namespace) -> list[Result]:
    """100,000 tensors of 8 KiB."""
    shapes = {f"t{at}": (4096,) for at in range(100_000)}
    folder = options.folder / "small"
    write_checkpoint(folder, shapes, 1)
    whole = torch.full((100_000, 4096), 113, dtype=torch.bfloat16, device="cuda")
    orders = [(name, ..., whole[at]) for at, name in enumerate(shapes)]
    with daemon("--host-memory", "20GiB"), tensord.open(folder) as model:
        model.wait()
        report = model.load_into(orders)
        assert report.device_bytes == report.bytes, report
        compare(orders[::997], model)
        reports = []

        def once() -> float:
            begin = time.perf_counter()
            reports.append(model.load_into(orders))
            return time.perf_counter() - begin

        seconds, spread = median_of(options.rounds, once)
        payload = bytes_of(orders)
        last = reports[-1]
        return [
            say(
                {
                    "case": "small",
                    "tensors": len(orders),
                    "seconds": seconds,
                    "spread": spread,
                    "gb_per_s": payload / GB / seconds,
                    "plan_s": last.plan_seconds,
                    "copy_s": last.copy_seconds,
                    "copy_gb_per_s": payload / GB / last.copy_seconds,
                }
            )
        ]


def _rank(rank: int, world: int, options: argparse.Namespace, gate: Any, results: Any) -> None:
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    orders = make_targets(qwen_shapes(options.layers), rank, world, device)
    with tensord.open(options.checkpoint) as model:
        model.wait()
        model.load_into(orders)
        compare(orders, model)
        for _ in range(options.rounds):
            gate.wait()
            begin = time.perf_counter()
            model.load_into(orders)
            results.put((begin, time.perf_counter()))
            gate.wait()


def tp2(options: argparse.Namespace) -> list[Result]:
    """Resident, two ranks on two GPUs (on one, where there is but one)."""
    spawn = multiprocessing.get_context("spawn")
    with daemon("--host-memory", "70GiB"):
        with tensord.open(options.checkpoint) as model:
            model.wait()
        gate, results = spawn.Barrier(2), spawn.Queue()
        ranks = [spawn.Process(target=_rank, args=(rank, 2, options, gate, results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        spans = [results.get(timeout=300) for _ in range(2 * options.rounds)]
        for rank in ranks:
            rank.join()
    spans.sort()
    times = [
        max(spans[at][1], spans[at + 1][1]) - min(spans[at][0], spans[at + 1][0])
        for at in range(0, len(spans), 2)
    ]
    payload = sum(2 * int(np.prod(shape)) for shape in qwen_shapes(options.layers).values())
    return [
        say(
            {
                "case": "tp2",
                "devices": torch.cuda.device_count(),
                "seconds": statistics.median(times),
                "gb_per_s": payload / GB / statistics.median(times),
            }
        )
    ]


def _attach(options: argparse.Namespace, results: Any) -> None:
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize()
    name = "lm_head.weight"
    times = []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        model = tensord.open(options.checkpoint, device="cuda:0")
        opened = time.perf_counter()
        model[name][0].sum().item()  # a kernel has read it
        used = time.perf_counter()
        tensors = [model[one] for one in model]
        times.append((opened - begin, used - begin, time.perf_counter() - begin))
        del tensors
        model.close()
        gc.collect()
    with tensord.open(options.checkpoint, device="cuda:0") as model, tensord.open(options.checkpoint) as host:
        compare([(one, ..., model[one]) for one in model], host)
    results.put(times)


def attach(options: argparse.Namespace) -> list[Result]:
    """The model is in GPU memory: a second process, whose torch is awake, opens it; first time apart."""
    spawn = multiprocessing.get_context("spawn")
    with daemon("--host-memory", "70GiB"), tensord.open(options.checkpoint) as host:
        host.wait()
        begin = time.perf_counter()
        model = tensord.open(options.checkpoint, device="cuda:0")
        model.wait()
        fill = time.perf_counter() - begin
        payload = model.info()["payload_bytes"]
        results = spawn.Queue()
        client = spawn.Process(target=_attach, args=(options, results))
        client.start()
        times = results.get(timeout=600)
        client.join()
        del model
    opened, used, all_tensors = (statistics.median(column) for column in zip(*times))
    return [
        say(
            {
                "case": "attach",
                "payload_gb": payload / GB,
                "fill_s": fill,
                "first_time_ms": times[0][1] * 1e3,
                "opened_ms": opened * 1e3,
                "first_tensor_ms": used * 1e3,
                "all_tensors_ms": all_tensors * 1e3,
            }
        )
    ]


def peer_ceiling(size_bytes: int = 2 << 30) -> float:
    """Bytes a second of a plain copy from GPU 0 to GPU 1."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda:0").random_()
    target = torch.empty(size_bytes, dtype=torch.uint8, device="cuda:1")

    def once() -> float:
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        return time.perf_counter() - begin

    once()
    return size_bytes / median_of(9, once)[0]


def peer_copy(options: argparse.Namespace) -> list[Result]:
    """From the model in memory of GPU 0 into memory of GPU 1, and to a replica there."""
    if torch.cuda.device_count() < 2:
        return [say({"case": "peer_copy", "cannot": "needs two GPUs"})]
    shapes = qwen_shapes(options.layers)
    with daemon("--host-memory", "70GiB"), tensord.open(options.checkpoint, device="cuda:0") as model:
        model.wait()
        orders = make_targets(shapes, 0, 1, "cuda:1")
        payload = bytes_of(orders)
        report = model.load_into(orders)
        assert report.device_bytes == payload, report
        compare(orders, model)

        def once() -> float:
            begin = time.perf_counter()
            model.load_into(orders)
            return time.perf_counter() - begin

        seconds, spread = median_of(options.rounds, once)
        orders.clear()
        torch.cuda.empty_cache()
        begin = time.perf_counter()
        with tensord.open(options.checkpoint, device="cuda:1") as other:
            other.wait()
            fill = time.perf_counter() - begin
            path = json.loads(tensord._library.call("explain", str(other.info()["replica"])))["read_path"]
    rate = peer_ceiling()
    return [
        say(
            {
                "case": "peer_copy",
                "payload_gb": payload / GB,
                "seconds": seconds,
                "spread": spread,
                "gb_per_s": payload / GB / seconds,
                "ceiling_gb_per_s": rate / GB,
                "ratio": payload / rate / seconds,
                "replica_fill_s": fill,
                "replica_path": path,
            }
        )
    ]


def peers(options: argparse.Namespace) -> list[Result]:
    """Other loaders, hot page cache, whole tensors into one GPU."""
    results = []
    paths = sorted(options.checkpoint.glob("*.safetensors"))
    payload = sum(path.stat().st_size for path in paths)

    def with_safetensors() -> Any:
        from safetensors.torch import load_file

        return [load_file(path, device="cuda:0") for path in paths]

    def with_instanttensor(backend: str | None = None) -> Any:
        import instanttensor

        policy = instanttensor.BackendPolicy[backend] if backend else None
        names = [str(path) for path in paths]
        with instanttensor.safe_open(names, framework="pt", device=0, backend=policy) as opened:
            return [tensor for _, tensor in opened.tensors()]

    def with_fastsafetensors() -> Any:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0")
        loader.add_filenames({0: [str(path) for path in paths]})
        buffer = loader.copy_files_to_device()
        kept = [buffer.get_tensor(name) for name in qwen_shapes(options.layers)]
        return kept, buffer, loader

    for name, load, rounds in (
        ("safetensors", with_safetensors, 3),
        ("instanttensor, buffered", lambda: with_instanttensor("BUFFERED"), 3),
        ("instanttensor", with_instanttensor, 1),
        ("fastsafetensors", with_fastsafetensors, 1),
    ):
        try:

            def once(load: Callable[[], Any] = load) -> float:
                torch.cuda.synchronize()
                begin = time.perf_counter()
                kept = load()
                torch.cuda.synchronize()
                elapsed = time.perf_counter() - begin
                del kept
                gc.collect()
                torch.cuda.empty_cache()
                return elapsed

            if rounds > 1:
                once()
            times = [once() for _ in range(rounds)]
            results.append(
                say({"case": "peer", "peer": name, "seconds": statistics.median(times), "gb": payload / GB})
            )
        except Exception as error:
            say({"case": "peer", "peer": name, "cannot": repr(error)[:300]})
    return results


def _parameters_equal(ours: Any, plain: Any) -> bool:
    mine, others = dict(ours.named_parameters()), dict(plain.named_parameters())
    return mine.keys() == others.keys() and all(
        torch.equal(one.view(torch.int16), others[name].view(torch.int16)) for name, one in mine.items()
    )


def transformers(options: argparse.Namespace) -> list[Result]:
    """`from_pretrained` of a Qwen3 with the checkpoint's shapes to cuda:0, transformers' own beside ours."""
    import transformers as library

    library.Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=options.layers,
        num_attention_heads=HIDDEN // 128,
        num_key_value_heads=KEY_VALUES // 128,
        head_dim=128,
        vocab_size=VOCABULARY,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(options.checkpoint)
    payload = sum(2 * int(np.prod(shape)) for shape in qwen_shapes(options.layers).values())

    def plain() -> Any:
        return library.Qwen3ForCausalLM.from_pretrained(options.checkpoint, dtype="auto", device_map="cuda:0")

    def timed(load: Callable[[], Any]) -> float:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model = load()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - begin
        del model
        return elapsed

    loads: list[Any] = []

    def ours() -> Any:
        with tensord.transformers.patch(strict=True) as seen:
            model = plain()
        loads.extend(seen)
        return model

    rounds = min(options.rounds, 5)
    with daemon("--host-memory", "70GiB"):
        first_seconds = timed(ours)  # nothing resident, memory not registered
        own, other = plain(), ours()
        if not _parameters_equal(other, own):
            raise SystemExit("transformers: parameters differ")
        del own, other
        loads.clear()
        seconds, spread = median_of(rounds, lambda: timed(ours))
        plain_seconds, plain_spread = median_of(rounds, lambda: timed(plain))
    last = loads[-1]
    return [
        say(
            {
                "case": "transformers",
                "version": library.__version__,
                "payload_gb": payload / GB,
                "seconds": seconds,
                "spread": spread,
                "weights_s": statistics.median(load.seconds for load in loads),
                "gb_per_s": payload / GB / statistics.median(load.seconds for load in loads),
                "device_gb": last.device_bytes / GB,
                "staged_gb": last.staged_bytes / GB,
                "first_time_s": first_seconds,
                "plain_s": plain_seconds,
                "plain_spread": plain_spread,
                "ratio": plain_seconds / seconds,
            }
        )
    ]


CASES = {
    "resident": resident,
    "first_load": first_load,
    "rows": rows,
    "small": small,
    "tp2": tp2,
    "attach": attach,
    "peer_copy": peer_copy,
    "peers": peers,
    "transformers": transformers,
}
NEED_CHECKPOINT = ("resident", "first_load", "tp2", "attach", "peer_copy", "peers", "transformers")


def write_results(path: Path | None, results: list[Result]) -> None:
    """What was measured, and on what; nowhere where no path was given."""
    document = {
        "machine": platform.node(),
        "gpus": [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "results": results,
    }
    if path is not None:
        path.write_text(json.dumps(document, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "tensord-bench-gpu"))
    parser.add_argument("--layers", type=int, default=40, help="of Qwen3-14B's shapes (40: 29.5 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.checkpoint = options.folder / "qwen"
    cases = options.cases or list(CASES)
    if any(case in NEED_CHECKPOINT for case in cases):
        begin = time.perf_counter()
        write_checkpoint(options.checkpoint, qwen_shapes(options.layers), SHARDS)
        torch.cuda.empty_cache()
        print(f"checkpoint written in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    results = [result for case in cases for result in CASES[case](options)]
    write_results(options.json, results)


if __name__ == "__main__":
    main()
