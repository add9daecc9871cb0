"""Whole engines: greedy tokens in float32 are those of the engines' own loaders, and the same in both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Engines, Run

Daemon = Any  # of ../conftest.py

BOTH = ("qwen3", "qwen3_tied", "qwen3_moe", "llama", "gemma3", "mixtral", "gpt2", "deepseek_v3")
VLLM = (*BOTH, "gpt_oss", "qwen3-int8", "qwen3-int4")
SGLANG = (*BOTH, "qwen3-fp8", "qwen3_moe-fp8")

LOADED = re.compile(r"tensord: [0-9.e+]+ [kMG]?B in ")

# What an engine generated for a model by its own loader, so that it is asked once.
_own: dict[tuple[str, str, int], Any] = {}

Make = Callable[..., list[Path]]


def told(run: Run) -> list[str]:
    """The lines that say what tensord loaded: one a load and rank."""
    return [line for line in run.lines("tensord: ") if LOADED.search(line)]


def vllm_run(engines: Engines, model: Path, second: Path, tp: int, **rest: Any) -> list[Any]:
    """Tokens of the first, of the second after a reload, of the first after another one."""
    steps = ["generate", ["reload", str(second)], "generate", ["reload", str(model)], "generate"]
    run = engines.steps("vllm", model, steps, load_format="tensord", tp=tp, **rest)
    assert len(told(run)) == 3 * tp
    return run.values("generate")


def own_tokens(engines: Engines, engine: str, model: Path, tp: int = 1, **rest: Any) -> Any:
    key = (engine, model.name, tp)
    if key not in _own:
        (_own[key],) = engines.steps(engine, model, tp=tp, **rest).values("generate")
    return _own[key]


@pytest.mark.parametrize("name", VLLM)
def test_vllm_generates_what_it_does_by_its_own_loader(
    name: str, engines: Engines, make_models: Make
) -> None:
    plain, _, kind = name.partition("-")
    form = f"-{kind}" if kind else ""
    model, second = make_models(name, f"{plain}_second{form}")
    # Quantised layers compute in 16 bits. After a reload of int8 vLLM generates nothing but zeros, by its own
    # loader too.
    rest = {"dtype": "bfloat16"} if kind else {}
    if kind == "int8":
        run = engines.steps("vllm", model, load_format="tensord", **rest)
        assert run.values("generate") == [own_tokens(engines, "vllm", model, **rest)]
        return
    before, after, again = vllm_run(engines, model, second, 1, **rest)
    assert before == own_tokens(engines, "vllm", model, **rest)
    assert after == own_tokens(engines, "vllm", second, **rest)
    assert again == before
    assert after != before


@pytest.mark.parametrize("name", SGLANG)
def test_sglang_generates_what_it_does_by_its_own_loader(
    name: str, engines: Engines, make_models: Make
) -> None:
    plain, _, kind = name.partition("-")
    form = f"-{kind}" if kind else ""
    model, second = make_models(name, f"{plain}_second{form}")
    rest = {"dtype": "bfloat16"} if kind else {}
    steps: list[Any] = ["generate"]
    for path, load_format in ((second, "tensord"), (model, "tensord"), (second, "auto"), (model, "auto")):
        steps += [["update", str(path), load_format], "generate"]
    run = engines.steps("sglang", model, steps, load_format="tensord", **rest)
    for step in steps[1::2]:
        assert run.values(step)[0][0], f"{step}: {run.values(step)}"
    start, second_ours, back_ours, second_own, back_own = run.values("generate")
    assert start == back_ours == back_own
    assert second_ours == second_own != start
    assert len(told(run)) == 3
    _own["sglang ours", name, 1] = start


@pytest.mark.parametrize("name", BOTH)
def test_both_engines_generate_the_same(name: str, engines: Engines, make_models: Make) -> None:
    (model,) = make_models(name)
    ours = _own.get(("sglang ours", name, 1))
    if ours is None:
        (ours,) = engines.steps("sglang", model, load_format="tensord").values("generate")
    assert ours == own_tokens(engines, "vllm", model)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_two_ranks_generate_the_same_and_read_once(
    engine: str, name: str, engines: Engines, make_models: Make, make_daemon: Callable[..., Daemon]
) -> None:
    (model,) = make_models(name)
    expected = own_tokens(engines, "vllm", model)
    fresh = make_daemon()
    variables = {**fresh.environment}
    run = engines.steps(engine, model, load_format="tensord", tp=2, variables=variables)
    assert run.values("generate") == [expected]
    assert len(told(run)) == 2
    (replica,) = fresh.ask("list")["replicas"]
    assert fresh.ask("status")["loaded_bytes"] == replica["total_bytes"]


def test_experts_over_two_ranks_generate_the_same(engines: Engines, make_models: Make) -> None:
    (model,) = make_models("qwen3_moe")
    expected = own_tokens(engines, "vllm", model)
    assert engines.steps("vllm", model, load_format="tensord", tp=2, ep=True).values("generate") == [expected]
    assert engines.steps("sglang", model, load_format="tensord", tp=2, ep=2).values("generate") == [expected]
