"""A real language model, SmolLM2-135M-Instruct: the same answer in every engine and by every loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MODELS, Engines

PROMPTS = ["The capital of France is"]
HOW = {"dtype": "bfloat16", "prompts": PROMPTS}


@pytest.fixture
def smollm2(engines: Engines) -> Path:
    folder = MODELS / "smollm2"
    engines.run("sglang", "smollm2.py", str(folder))
    return folder


def test_smollm2_answers_the_same_everywhere(smollm2: Path, engines: Engines) -> None:
    task = json.dumps({"model": str(smollm2), **HOW})
    reference = engines.run("sglang", "transformers_steps.py", task)
    assert "Paris" in reference.values("text")[0][0]
    expected = reference.values("generate")
    for engine in ("vllm", "sglang"):
        for load_format in ("auto", "tensord"):
            run = engines.steps(engine, smollm2, load_format=load_format, **HOW)
            assert run.values("generate") == expected, (engine, load_format)
