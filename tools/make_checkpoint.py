#!/usr/bin/env python3
"""Writes a checkpoint with the names, shapes and files of a Qwen3 model and random weights; needs numpy only.

    tools/make_checkpoint.py FOLDER --bytes 2GiB --shards 2 --seed 1

The folder gets model-0000I-of-0000N.safetensors, model.safetensors.index.json and config.json. Equal
arguments give equal bytes. A run that was stopped goes on with the shards that are missing; a complete one is
left alone. Weights are finite BF16 numbers below 2, so that they can be compared as numbers too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

BF16_BYTES = 2
CHUNK_BYTES = 16 << 20
# Clears the highest exponent bit of four BF16 numbers: what is left is finite and below 2.
FINITE_MASK = np.uint64(0xBFFF_BFFF_BFFF_BFFF)


@dataclass(frozen=True)
class Shape:
    """The numbers of a config.json that decide the shapes of the tensors."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    layers: int
    vocabulary: int


# Hidden, intermediate, heads, key-value heads, head dim, layers, vocabulary: those of Qwen3 from 0.6B to 32B,
# all with an lm_head of their own, and before them smaller ones for tests.
FAMILIES = (
    Shape(32, 96, 2, 1, 16, 2, 64),
    Shape(128, 384, 4, 2, 32, 4, 1024),
    Shape(512, 1536, 8, 4, 64, 12, 16_384),
    Shape(1024, 3072, 16, 8, 128, 28, 151_936),
    Shape(2048, 6144, 16, 8, 128, 28, 151_936),
    Shape(2560, 9728, 32, 8, 128, 36, 151_936),
    Shape(4096, 12_288, 32, 8, 128, 36, 151_936),
    Shape(5120, 17_408, 40, 8, 128, 40, 151_936),
    Shape(5120, 25_600, 64, 8, 128, 64, 151_936),
)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The tensors in the order of the model, the order in which they are dealt to shards."""
    queries, key_values = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        parts = {
            "input_layernorm": (shape.hidden,),
            "self_attn.q_proj": (queries, shape.hidden),
            "self_attn.k_proj": (key_values, shape.hidden),
            "self_attn.v_proj": (key_values, shape.hidden),
            "self_attn.o_proj": (shape.hidden, queries),
            "self_attn.q_norm": (shape.head_dim,),
            "self_attn.k_norm": (shape.head_dim,),
            "post_attention_layernorm": (shape.hidden,),
            "mlp.gate_proj": (shape.intermediate, shape.hidden),
            "mlp.up_proj": (shape.intermediate, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.intermediate),
        }
        tensors.update({f"model.layers.{layer}.{part}.weight": dims for part, dims in parts.items()})
    tensors["model.norm.weight"] = (shape.hidden,)
    tensors["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return tensors


def payload_bytes(shape: Shape) -> int:
    return sum(math.prod(dims) * BF16_BYTES for dims in tensor_shapes(shape).values())


def choose_shape(size_bytes: int) -> Shape:
    """The family nearest in size, with the layers, and then the rows of vocabulary, that come closest."""
    chosen = min(FAMILIES, key=lambda family: abs(math.log(payload_bytes(family) / size_bytes)))
    one = payload_bytes(resized(chosen, 1, chosen.vocabulary))
    layer = payload_bytes(resized(chosen, 2, chosen.vocabulary)) - one
    layers = max(1, 1 + round((size_bytes - one) / layer))
    rest = size_bytes - payload_bytes(resized(chosen, layers, 0))
    return resized(chosen, layers, max(8, round(rest / (2 * chosen.hidden * BF16_BYTES))))


def resized(shape: Shape, layers: int, vocabulary: int) -> Shape:
    return Shape(**{**vars(shape), "layers": layers, "vocabulary": vocabulary})


def deal(tensors: dict[str, tuple[int, ...]], shard_count: int) -> list[dict[str, tuple[int, ...]]]:
    """Cuts the tensors, in their order, into shards of about equal bytes; inside a shard they lie by name."""
    total = sum(math.prod(dims) for dims in tensors.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shard_count)]
    before = 0
    for name, dims in tensors.items():
        count = math.prod(dims)
        shards[min(shard_count - 1, (2 * before + count) * shard_count // (2 * total))][name] = dims
        before += count
    return [dict(sorted(shard.items())) for shard in shards]


def header_of(shard: dict[str, tuple[int, ...]], seed: int) -> bytes:
    """The length and the JSON that a safetensors file begins with, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "seed": str(seed)}}
    offset = 0
    for name, dims in shard.items():
        end = offset + math.prod(dims) * BF16_BYTES
        entries[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_complete(path: Path, header: bytes, size_bytes: int) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + size_bytes:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write_shard(
    path: Path, shard: dict[str, tuple[int, ...]], seed: tuple[int, int], progress: Callable[[int], None]
) -> None:
    """Writes one file under another name and renames it, so that a file of that name is a whole one."""
    header = header_of(shard, seed[0])
    rest = sum(math.prod(dims) * BF16_BYTES for dims in shard.values())
    if is_complete(path, header, rest):
        progress(rest)
        return
    random = np.random.Generator(np.random.SFC64(seed))
    part = path.with_name(path.name + ".part")
    with part.open("wb", buffering=0) as file:
        file.write(header)
        while rest:
            words = random.integers(0, 1 << 64, CHUNK_BYTES // 8, dtype=np.uint64)
            words &= FINITE_MASK
            count = file.write(words.data.cast("B")[:rest])
            rest -= count
            progress(count)
    part.rename(path)


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 40_960,
        "model_type": "qwen3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.key_value_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }


def make_checkpoint(
    folder: Path, size_bytes: int, shard_count: int, seed: int, progress: Callable[[int, int], None]
) -> int:
    """Writes the checkpoint, or what is missing of it; progress(done, all) is told bytes, on several threads.

    Returns
    -------
    int
        Bytes of all tensors: `size_bytes` to the nearest row of the vocabulary.

    """
    shape = choose_shape(size_bytes)
    total = payload_bytes(shape)
    shards = deal(tensor_shapes(shape), shard_count)
    names = [f"model-{index + 1:05}-of-{shard_count:05}.safetensors" for index in range(shard_count)]
    folder.mkdir(parents=True, exist_ok=True)

    lock = Lock()
    done = 0

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(write_shard, folder / name, shard, (seed, index), count)
            for index, (name, shard) in enumerate(zip(names, shards))
        ]
        for job in jobs:
            job.result()

    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, shard in zip(names, shards) for tensor in shard},
    }
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def parse_bytes(text: str) -> int:
    """`2GiB`, `500MB`, `4096`: units of 1000 or, with an i, of 1024."""
    match = re.fullmatch(r"([0-9.]+)\s*(?:([kMGT])(i?)B?|B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it as 2GiB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kMGT".index(unit or " ")))


def draw_bar(done: int, total: int) -> None:
    width = 40
    filled = width * done // total
    end = "\n" if done == total else ""
    print(
        f"\r[{'#' * filled}{'.' * (width - filled)}] {done / 1e9:.2f} of {total / 1e9:.2f} GB",
        end=end,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="write a Qwen3-shaped checkpoint with random weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=parse_bytes, default="2GiB", help="of all tensors together (2GiB)")
    parser.add_argument("--shards", type=int, default=2, help="files (2)")
    parser.add_argument("--seed", type=int, default=1, help="equal seeds give equal bytes (1)")
    options = parser.parse_args()
    if options.shards < 1 or options.seed < 0 or options.bytes < 1:
        parser.error("--shards and --bytes begin at 1, --seed at 0")

    start = time.monotonic()
    bar = draw_bar if sys.stdout.isatty() else lambda done, total: None
    total = make_checkpoint(options.folder, options.bytes, options.shards, options.seed, bar)
    seconds = time.monotonic() - start
    print(f"{options.folder}: {total:,} bytes in {options.shards} shards, {seconds:.1f} s")


if __name__ == "__main__":
    main()
