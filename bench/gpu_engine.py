"""An engine's load into GPUs: Qwen3-14B's parameters as SGLang and vLLM have them (fused qkv and gate_up, cut
for the ranks of tensor parallelism), filled by loaders that work as theirs, one process a GPU.

    python bench/gpu_engine.py --json engine.json

From a barrier of the ranks until the last parameter of the last rank is filled, coverage gate included, the
model resident on the node; beside it the same loaders over safetensors' mapped files. Every parameter is
compared byte by byte.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensord
import torch

from gpu import (
    GB,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUES,
    SHARDS,
    VOCABULARY,
    compare,
    daemon,
    qwen_shapes,
    say,
    slice_of,
    write_checkpoint,
    write_results,
)

# Part of a fused parameter: its name, the parameter's, and where its rows begin and end, before they are cut.
FUSED = {
    "q_proj": ("qkv_proj", 0, HIDDEN),
    "k_proj": ("qkv_proj", HIDDEN, HIDDEN + KEY_VALUES),
    "v_proj": ("qkv_proj", HIDDEN + KEY_VALUES, HIDDEN + 2 * KEY_VALUES),
    "gate_proj": ("gate_up_proj", 0, INTERMEDIATE),
    "up_proj": ("gate_up_proj", INTERMEDIATE, 2 * INTERMEDIATE),
}


class Rank(torch.nn.Module):
    """One rank's parameters, by their names in the checkpoint or of what they are fused to."""

    def __init__(self, layers: int, rank: int, world: int, device: str) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.filled = dict(self._parameters_of(layers, device))
        for name, parameter in self.filled.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def _parameters_of(self, layers: int, device: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
        shapes = {
            "model.embed_tokens.weight": (VOCABULARY // self.world, HIDDEN),
            "lm_head.weight": (VOCABULARY // self.world, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
        for layer in range(layers):
            name = f"model.layers.{layer}."
            shapes[name + "input_layernorm.weight"] = (HIDDEN,)
            shapes[name + "post_attention_layernorm.weight"] = (HIDDEN,)
            shapes[name + "self_attn.q_norm.weight"] = (128,)
            shapes[name + "self_attn.k_norm.weight"] = (128,)
            shapes[name + "self_attn.qkv_proj.weight"] = ((HIDDEN + 2 * KEY_VALUES) // self.world, HIDDEN)
            shapes[name + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN // self.world)
            shapes[name + "mlp.gate_up_proj.weight"] = (2 * INTERMEDIATE // self.world, HIDDEN)
            shapes[name + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE // self.world)
        for name, shape in shapes.items():
            yield (
                name,
                torch.nn.Parameter(
                    torch.empty(shape, dtype=torch.bfloat16, device=device), requires_grad=False
                ),
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, loaded in weights:
            target = self.target_of(name)
            index = slice_of(name, self.rank, self.world, tuple(loaded.shape))
            if index is ...:
                target.copy_(loaded)
                continue
            dim = len(index) - 1 if isinstance(index, tuple) else 0
            part = index[dim] if isinstance(index, tuple) else index
            target.copy_(loaded.narrow(dim, part.start, part.stop - part.start))

    def target_of(self, name: str) -> torch.Tensor:
        kind = name.split(".")[-2]
        if kind not in FUSED:
            return self.filled[name].data
        fused, begin, end = FUSED[kind]
        parameter = self.filled[name.replace(kind, fused)].data
        return parameter.narrow(0, begin // self.world, (end - begin) // self.world)

    def poison(self) -> None:
        for parameter in self.filled.values():
            parameter.data.fill_(113)
        torch.cuda.synchronize(next(iter(self.filled.values())).device)


def _mapped(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _run(rank: int, world: int, options: argparse.Namespace, gate: Any, results: Any) -> None:
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    shapes = qwen_shapes(options.layers)
    module = Rank(options.layers, rank, world, device)

    def ours(model: tensord.Model) -> str:
        with tensord.record(model, module) as weights:
            module.load_weights(weights)
        return weights.report.one_line()

    def plain(_: tensord.Model) -> str:
        module.load_weights(_mapped(options.checkpoint))
        torch.cuda.synchronize(device)
        return ""

    with tensord.open(options.checkpoint) as model:
        model.wait()
        for name, load, rounds in (("tensord", ours, options.rounds), ("safetensors, mapped", plain, 2)):
            for at in range(rounds + 1):  # the first one registers memory, and is not counted
                module.poison()
                gate.wait()
                begin = time.perf_counter()
                line = load(model)
                results.put((name, at, begin, time.perf_counter()))
                if rank == 0 and at == rounds and line:
                    print(line)
                gate.wait()
            compare(
                [
                    (one, slice_of(one, rank, world, shape), module.target_of(one))
                    for one, shape in shapes.items()
                ],
                model,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "tensord-bench-gpu"))
    parser.add_argument("--layers", type=int, default=40, help="of Qwen3-14B's shapes (40: 29.5 GB)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.checkpoint = options.folder / "qwen"
    if not (options.checkpoint / "model.safetensors.index.json").exists():
        write_checkpoint(options.checkpoint, qwen_shapes(options.layers), SHARDS)
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(options.ranks), spawn.Queue()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with daemon("--host-memory", "70GiB"):
        with tensord.open(options.checkpoint) as model:
            model.wait()
        ranks = [
            spawn.Process(target=_run, args=(rank, options.ranks, options, gate, results))
            for rank in range(options.ranks)
        ]
        for rank in ranks:
            rank.start()
        for _ in range(options.ranks * (options.rounds + 1 + 3)):
            name, at, begin, end = results.get(timeout=300)
            found.setdefault((name, at), []).append((begin, end))
        for rank in ranks:
            rank.join()
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed:
            raise SystemExit(f"ranks ended with {failed}")
    payload = sum(2 * math.prod(shape) for shape in qwen_shapes(options.layers).values())
    cases = []
    for name in ("tensord", "safetensors, mapped"):
        times = [
            max(end for _, end in spans) - min(begin for begin, _ in spans)
            for (one, at), spans in found.items()
            if one == name and at > 0
        ]
        seconds = statistics.median(times)
        cases.append(
            say(
                {
                    "case": "engine",
                    "loader": name,
                    "ranks": options.ranks,
                    "seconds": seconds,
                    "gb_per_s": payload / GB / seconds,
                    "spread": (max(times) - min(times)) / seconds,
                }
            )
        )
    write_results(options.json, cases)


if __name__ == "__main__":
    main()
