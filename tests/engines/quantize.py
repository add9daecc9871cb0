"""Quantised forms of a tiny checkpoint: fp8 in blocks of 128 x 128, compressed-tensors int8 and int4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

KINDS = ("fp8", "int8", "int4")
BLOCK = 128
GROUP = 32
LINEAR = ("proj.weight", "kv_a_proj_with_mqa.weight")


def fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight and a scale for each block of it; what sticks out of the last blocks counts as zero."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return {name: values.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scales}


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A scale for each row."""
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return {
        name: (weight.float() / scales).round().to(torch.int8),
        f"{name}_scale": scales.to(torch.bfloat16),
    }


def int4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eight values in an int32, a scale for each 32 values of a row."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    scales = groups.abs().amax(2, keepdim=True) / 7
    values = ((groups / scales).round().clamp(-8, 7) + 8).to(torch.int32).view(rows, columns // 8, 8)
    packed = sum(values[:, :, at] << (4 * at) for at in range(8))
    stem = name.removesuffix("weight")
    return {
        f"{stem}weight_packed": packed.to(torch.int32),
        f"{stem}weight_scale": scales.squeeze(2).to(torch.bfloat16),
        f"{stem}weight_shape": torch.tensor([rows, columns]),
    }


def config(kind: str) -> dict[str, Any]:
    """What goes into config.json as quantization_config."""
    if kind == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    weights: dict[str, Any] = {"type": "int", "symmetric": True, "dynamic": False}
    if kind == "int4":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    else:
        weights |= {"num_bits": 8, "strategy": "channel"}
    activations = {**weights, "strategy": "token", "dynamic": True} if kind == "int8" else None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if kind == "int4" else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
    }


def quantize(source: Path, target: Path, kind: str) -> None:
    """Writes the checkpoint in `source` to `target` with its linear layers as `kind`."""
    target.mkdir(parents=True, exist_ok=True)
    how = {"fp8": fp8, "int8": int8, "int4": int4}[kind]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            is_linear = name.endswith(LINEAR) and weight.ndim == 2
            tensors |= how(name, weight) if is_linear else {name: weight}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"] = config(kind)
    (target / "config.json").write_text(json.dumps(settings, indent=1))
    for file in source.glob("*token*"):
        shutil.copy(file, target)
