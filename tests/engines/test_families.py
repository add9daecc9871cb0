"""Model classes of both engines: bit for bit the same through tensord as by their own loaders.

Tensors are compared over poisoned memory. `table.py` prints what came of it for docs/ENGINES.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENTS, Engines
from tiny import MODELS

# What an engine cannot build from a small configuration on a CPU, and what it says.
CANNOT = {
    "vllm": {},
    "sglang": {
        "bloom": "has no such class",
        "exaone4": "its class wants a sliding window in another form",
        "falcon": "has no such class",
        "falcon_h1": "its Mamba layers need a GPU",
        "glm": "its class for other models' code cannot cut the output layer",
        "jamba": "has no such class",
        "mamba": "has no such class",
        "mamba2": "has no such class",
        "phimoe": "its class for other models' code has no bias at the output layer",
        "qwen3_next": "its Mamba layers need a GPU",
    },
}

# Further arguments: it refuses the attention that works on a CPU. It loads, and could not generate.
SETTINGS = {("sglang", "gpt_oss"): {"engine": {"attention_backend": "triton"}}}

# With two ranks.
CANNOT_SPLIT: dict[str, dict[str, str]] = {
    "vllm": {},
    "sglang": {
        "nemotron": "its class for other models' code does not split it",
        "qwen3-fp8": "half of 128 rows is no whole block",
        "qwen3_moe-fp8": "half of 128 rows is no whole block",
    },
}

QUANTIZED = {"vllm": ("qwen3-int8", "qwen3-int4"), "sglang": ("qwen3-fp8", "qwen3_moe-fp8")}

CHUNK = 15  # models in a process

Make = Callable[..., list[Path]]
Outcomes = dict[tuple[str, int], Any]
_outcomes: dict[tuple[str, int], Outcomes] = {}


def names(engine: str, tp: int) -> list[str]:
    left = {**CANNOT[engine], **(CANNOT_SPLIT[engine] if tp > 1 else {})}
    return [name for name in (*MODELS, *QUANTIZED[engine]) if name not in left]


CASES = [(engine, tp, name) for engine in ("vllm", "sglang") for tp in (1, 2) for name in names(engine, tp)]


def run(engines: Engines, engine: str, tp: int, folders: list[Path], settings: Any) -> Outcomes:
    words = [engine, str(tp), json.dumps(settings), *map(str, folders)]
    results = engines.run(engine, "families.py", *words).results
    return {(one["model"], one["rank"]): one for one in results}


def outcomes(engines: Engines, make_models: Make, engine: str, tp: int, wanted: list[str]) -> Outcomes:
    """Of all models that are asked for, in a few processes; once."""
    known = _outcomes.setdefault((engine, tp), {})
    missing = [name for name in wanted if (name, 0) not in known]
    plain = [name for name in missing if (engine, name) not in SETTINGS]
    for begin in range(0, len(plain), CHUNK):
        folders = make_models(*plain[begin : begin + CHUNK])
        known.update(run(engines, engine, tp, folders, {}))
    for name in missing:
        if name not in plain:
            known.update(run(engines, engine, tp, make_models(name), SETTINGS[engine, name]))
    (ENVIRONMENTS / f"parity-{engine}-{tp}.json").write_text(json.dumps(list(known.values()), indent=1))
    return known


@pytest.mark.parametrize(("engine", "tp", "name"), CASES, ids=[f"{e}-tp{tp}-{n}" for e, tp, n in CASES])
def test_families_are_the_same_bit_for_bit(
    engine: str, tp: int, name: str, engines: Engines, make_models: Make, request: pytest.FixtureRequest
) -> None:
    wanted = [
        item.callspec.params["name"]
        for item in request.node.listchain()[0].items  # all that is going to run
        if getattr(item, "callspec", None)
        and item.callspec.params.get("engine") == engine
        and item.callspec.params.get("tp") == tp
    ]
    known = outcomes(engines, make_models, engine, tp, wanted)
    for rank in range(tp):
        one = known[name, rank]
        assert one["error"] == ""
        assert one["differences"] == []
        assert one["tensors"] > 0
        assert one["compared"] > 0


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_families_replay_a_cached_plan_to_the_same_bits(
    engine: str, engines: Engines, make_models: Make
) -> None:
    folders = make_models("qwen3_moe", "qwen3", "llama", "gemma3")
    settings = {"options": {"cache": True}}
    run(engines, engine, 1, folders, settings)
    for one in run(engines, engine, 1, folders, settings).values():
        assert one["error"] == ""
        assert one["differences"] == []
        assert (one["cache"], one["tensors"]) == ("replayed", 0)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_experts_over_two_ranks_are_the_same_bit_for_bit(
    engine: str, engines: Engines, make_models: Make
) -> None:
    folders = make_models("qwen3_moe", "mixtral", "deepseek_v3")
    arguments = {"enable_expert_parallel": True} if engine == "vllm" else {"ep_size": 2}
    done = run(engines, engine, 2, folders, {"engine": arguments})
    assert len(done) == 2 * len(folders)
    for one in done.values():
        assert one["error"] == ""
        assert one["differences"] == []
