#!/usr/bin/env python3
"""What recording a load costs: microseconds a tensor for the loaders of vLLM and SGLang.

    tracing.py [--tensors 50000] [--rounds 5] [--json FILE] [CASE...]

Needs torch, $TENSORD_BINARY, and the package. It starts a daemon of its own. The loaders are the sequences of
operations that those of the engines run on a weight; tensors are small, so that bytes cost nothing. Beside
each, the same loader with plain tensors. Medians of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensord
import torch
from tensord import engines
from tensord.engines.recording import _lazy_tensors

EXPERTS, INTERMEDIATE, HIDDEN = 128, 16, 16  # of a layer of experts; elements are few, tensors many
QWEN_HIDDEN, QWEN_INTERMEDIATE, QWEN_KEY_VALUES, QWEN_VOCABULARY, QWEN_LAYERS = 5120, 17408, 1024, 151936, 40
RANKS = 2

Weights = Iterable[tuple[str, torch.Tensor]]
Result = dict[str, Any]


# ---- checkpoints: headers are real, bytes are a hole in the file ---------------------------------------


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def expert_shapes(count: int) -> dict[str, tuple[int, ...]]:
    """Whole layers: at least `count` tensors."""
    layers = (count + 2 * EXPERTS - 1) // (2 * EXPERTS)
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{half}_proj.weight": (INTERMEDIATE, HIDDEN)
        for layer in range(layers)
        for expert in range(EXPERTS)
        for half in ("gate", "up")
    }


def qwen_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (QWEN_VOCABULARY, QWEN_HIDDEN)}
    for layer in range(QWEN_LAYERS):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (QWEN_HIDDEN,)
        shapes[name + "mlp.down_proj.weight"] = (QWEN_HIDDEN, QWEN_INTERMEDIATE)
        shapes[name + "mlp.gate_proj.weight"] = (QWEN_INTERMEDIATE, QWEN_HIDDEN)
        shapes[name + "mlp.up_proj.weight"] = (QWEN_INTERMEDIATE, QWEN_HIDDEN)
        shapes[name + "post_attention_layernorm.weight"] = (QWEN_HIDDEN,)
        shapes[name + "self_attn.k_norm.weight"] = (128,)
        shapes[name + "self_attn.k_proj.weight"] = (QWEN_KEY_VALUES, QWEN_HIDDEN)
        shapes[name + "self_attn.o_proj.weight"] = (QWEN_HIDDEN, QWEN_HIDDEN)
        shapes[name + "self_attn.q_norm.weight"] = (128,)
        shapes[name + "self_attn.q_proj.weight"] = (QWEN_HIDDEN, QWEN_HIDDEN)
        shapes[name + "self_attn.v_proj.weight"] = (QWEN_KEY_VALUES, QWEN_HIDDEN)
    shapes["model.norm.weight"] = (QWEN_HIDDEN,)
    shapes["lm_head.weight"] = (QWEN_VOCABULARY, QWEN_HIDDEN)
    return shapes


# ---- loaders -------------------------------------------------------------------------------------------


def empty(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=torch.bfloat16), requires_grad=False)


class Experts(torch.nn.Module):
    """Layers of fused experts, one parameter each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        layers = count // (2 * EXPERTS)
        self.w13 = torch.nn.ParameterList(empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN) for _ in range(layers))

    def place(self, at: int) -> torch.Tensor:
        half = at % 2 * INTERMEDIATE
        expert: torch.Tensor = self.w13[at // 2 // EXPERTS].data[at // 2 % EXPERTS]
        return expert.narrow(0, half, INTERMEDIATE)

    def load_as_vllm(self, weights: Weights) -> None:
        for at, (_, weight) in enumerate(weights):
            (one,) = weight.unsqueeze(0).unbind()
            for _ in range(5):
                one.shape, one.ndim  # noqa: B018
            self.place(at).copy_(one.narrow(0, 0, INTERMEDIATE))

    def load_as_sglang(self, weights: Weights) -> None:
        for at, (_, weight) in enumerate(weights):
            weight.shape, weight.dim()
            self.place(at).copy_(weight.narrow(0, 0, INTERMEDIATE))


class Qwen(torch.nn.Module):
    """Parameters of one rank as the engines have them: fused, and cut for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        heads = QWEN_HIDDEN + 2 * QWEN_KEY_VALUES
        self.made = torch.nn.ParameterDict()
        for layer in range(QWEN_LAYERS):
            for name, shape in {
                "qkv_proj": (heads // RANKS, QWEN_HIDDEN),
                "o_proj": (QWEN_HIDDEN, QWEN_HIDDEN // RANKS),
                "gate_up_proj": (2 * QWEN_INTERMEDIATE // RANKS, QWEN_HIDDEN),
                "down_proj": (QWEN_HIDDEN, QWEN_INTERMEDIATE // RANKS),
                "input_layernorm": (QWEN_HIDDEN,),
                "post_attention_layernorm": (QWEN_HIDDEN,),
                "q_norm": (128,),
                "k_norm": (128,),
            }.items():
                self.made[f"{layer}/{name}"] = empty(*shape)
        self.made["embed_tokens"] = empty(QWEN_VOCABULARY // RANKS, QWEN_HIDDEN)
        self.made["lm_head"] = empty(QWEN_VOCABULARY // RANKS, QWEN_HIDDEN)
        self.made["norm"] = empty(QWEN_HIDDEN)

    def load(self, weights: Weights) -> None:
        q, k, i = QWEN_HIDDEN // RANKS, QWEN_KEY_VALUES // RANKS, QWEN_INTERMEDIATE // RANKS
        fused = {
            "q_proj": ("qkv_proj", 0, q),
            "k_proj": ("qkv_proj", q, k),
            "v_proj": ("qkv_proj", q + k, k),
            "gate_proj": ("gate_up_proj", 0, i),
            "up_proj": ("gate_up_proj", i, i),
        }
        for name, weight in weights:
            words = name.split(".")
            last, layer = words[-2], f"{words[2]}/" if words[1] == "layers" else ""
            into, begin, rows = fused.get(last, (last, 0, 0))
            target = self.made[layer + into].data
            if rows:
                target, weight = target.narrow(0, begin, rows), weight.narrow(0, rows, rows)
            elif last in ("o_proj", "down_proj"):
                weight = weight.narrow(1, target.shape[1], target.shape[1])
            elif last in ("embed_tokens", "lm_head"):
                weight = weight.narrow(0, target.shape[0], target.shape[0])
            assert target.shape == weight.shape
            target.copy_(weight)


# ---- measuring -----------------------------------------------------------------------------------------


def seconds(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def traced(model: tensord.Model, load: Callable[[Weights], None], runs: bool) -> tuple[float, float]:
    """Seconds until the loader has seen all tensors, and of the copies, where they are to run."""
    stream = engines.stream(model)
    last = 0.0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        yield from _lazy_tensors(stream.recorder, stream.offer)
        last = time.perf_counter()

    begin = time.perf_counter()
    load(weights())
    if runs:
        stream.recorder.finish()
    else:
        stream.recorder.drop()
    return last - begin, time.perf_counter() - last


def race(
    name: str, model: tensord.Model, load: Callable[[Weights], None], stock: Weights | None, options: Any
) -> Result:
    rounds = [traced(model, load, runs=stock is not None) for _ in range(options.rounds)]
    result = {
        "case": name,
        "tensors": len(model),
        "trace_us": statistics.median(one for one, _ in rounds) / len(model) * 1e6,
    }
    if stock is not None:
        result["run_us"] = statistics.median(one for _, one in rounds) / len(model) * 1e6
        plain = [seconds(lambda: load(stock)) for _ in range(options.rounds)]
        result["stock_us"] = statistics.median(plain) / len(model) * 1e6
    return result


def experts(options: argparse.Namespace, folder: Path) -> list[Result]:
    path = folder / "experts.safetensors"
    write_checkpoint(path, expert_shapes(options.tensors))
    results = []
    with tensord.open(path, "pt") as model:
        model.wait()
        module = Experts(len(model))
        listing = seconds(model.entries)
        stock = list(model.items())
        results.append(race("vllm_experts", model, module.load_as_vllm, stock, options))
        results.append(race("sglang_experts", model, module.load_as_sglang, stock, options))
        results[0]["listing_us"] = listing / len(model) * 1e6
        del stock
    results.append(replay(options, path, module))
    return results


def replay(options: argparse.Namespace, path: Path, module: Experts) -> Result:
    """Milliseconds of a whole second start that finds its plan."""
    shares = []
    for at in range(options.rounds + 1):
        with tensord.open(path, "pt") as model:
            begin = time.perf_counter()
            with tensord.record(model, module, cache="bench", strict=False) as weights:
                ready = time.perf_counter()
                module.load_as_sglang(weights)
                copied = time.perf_counter()
            assert weights.replayed == (at > 0), weights.report
            shares.append((ready - begin, copied - ready, time.perf_counter() - copied))
    first, later = shares[0], shares[1:]
    return {
        "case": "replay",
        "tensors": options.tensors,
        "first_ms": sum(first) * 1e3,
        "plan_ms": statistics.median(one for one, _, _ in later) * 1e3,
        "copy_ms": statistics.median(one for _, one, _ in later) * 1e3,
        "check_ms": statistics.median(one for _, _, one in later) * 1e3,
    }


def qwen(options: argparse.Namespace, folder: Path) -> list[Result]:
    path = folder / "qwen.safetensors"
    write_checkpoint(path, qwen_shapes())
    with tensord.open(path, "pt", resident="view") as model:
        result = race("qwen3_14b", model, Qwen().load, None, options)
    result["trace_ms"] = result["trace_us"] * result["tensors"] / 1e3
    return [result]


def small(options: argparse.Namespace, folder: Path) -> list[Result]:
    """load_into of as many whole tensors."""
    path = folder / "small.safetensors"
    write_checkpoint(path, expert_shapes(options.tensors))
    with tensord.open(path, "pt") as model:
        model.wait()
        targets = {name: torch.empty((INTERMEDIATE, HIDDEN), dtype=torch.bfloat16) for name in model}
        model.load_into(targets)
        taken = statistics.median(seconds(lambda: model.load_into(targets)) for _ in range(options.rounds))
        report = model.load_into(targets)
    inside = report.plan_seconds + report.copy_seconds
    count = len(targets)
    return [
        {
            "case": "small",
            "tensors": count,
            "load_into_us": taken / count * 1e6,
            "describe_us": (taken - inside) / count * 1e6,
        }
    ]


CASES = {"experts": experts, "qwen": qwen, "small": small}


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[None]:
    os.environ.update(
        TENSORD_RUNTIME_DIR=str(folder / "run"),
        TENSORD_STATE_DIR=str(folder / "state"),
        TENSORD_AUTOSTART="0",
    )
    binary = os.environ.get("TENSORD_BINARY", "build/release/tensord")
    process = subprocess.Popen([binary, "serve"], stderr=subprocess.DEVNULL)
    try:
        while not (folder / "run" / "socket").exists():
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--tensors", type=int, default=50_000)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--json", type=Path)
    words.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    options = words.parse_args()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="tensord-") as name, daemon(Path(name)), torch.no_grad():
        for case in options.cases or CASES:
            results += CASES[case](options, Path(name))
            for result in results[-3:]:
                if not result.pop("printed", False):
                    print(
                        "  ".join(
                            f"{k} {v:.1f}" if isinstance(v, float) else f"{v}" for k, v in result.items()
                        )
                    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
