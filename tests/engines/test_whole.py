"""Whole engines: greedy tokens in float32 are those of the engines' own loaders, and the same in both.

None of them generates with experts over two ranks on a CPU, by its own loader either: vLLM's kernel ends by
SIGSEGV, SGLang's has no index for experts elsewhere. What they load then is compared in test_families.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENTS, Engines, Run

Daemon = Any  # of ../conftest.py

BOTH = ("qwen3", "qwen3_tied", "qwen3_moe", "llama", "gemma3", "mixtral", "gpt2")
# SGLang's attention for CPUs knows neither latent attention nor GPT-OSS's, and its FP8 needs a GPU.
VLLM = (*BOTH, "deepseek_v3", "gpt_oss", "qwen3-int8", "qwen3-int4")

# After a reload vLLM on a CPU goes on with what it made of the old weights, by its own loader as well.
RELOAD_IS_PARTIAL = {
    "qwen3_tied": "the output layer is not tied again",
    "gemma3": "the output layer is not tied again",
    "gpt2": "the output layer is not tied again",
    "qwen3_moe": "packed experts are not packed again",
    "mixtral": "packed experts are not packed again",
    "deepseek_v3": "packed experts are not packed again",
    "gpt_oss": "packed experts are not packed again",
    "qwen3-int4": "packed weights are not packed again",
}

# What vLLM generates on a CPU after this reload comes of whatever lies in memory, by its own loader as well:
# mostly token 0, in one start of eight something else.
RELOAD_IS_RANDOM = frozenset(("qwen3-int8",))

LOADED = re.compile(r"tensord: [0-9.e+]+ [kMG]?B in ")

Make = Callable[..., list[Path]]


def told(run: Run) -> list[str]:
    """The lines that say what tensord loaded: one a load and rank."""
    return [line for line in run.lines("tensord: ") if LOADED.search(line)]


def second_of(name: str) -> str:
    """Another model of the same shapes."""
    plain, dash, kind = name.partition("-")
    return f"{plain}_second{dash}{kind}"


def dtype_of(name: str) -> str:
    """Quantised layers compute in 16 bits."""
    return "bfloat16" if "-" in name else "float32"


# ---- vLLM: three engines for each model, one after the other in one process ---------------------------

_vllm: dict[str, list[Any]] = {}


def vllm_tokens(engines: Engines, make_models: Make, wanted: Sequence[str]) -> dict[str, list[Any]]:
    """By model: tokens by vLLM's own loader with reloads to the second model and back, of the second one from
    a start, and as the first through tensord."""
    missing = [name for name in wanted if name not in _vllm]
    tasks: list[Any] = []
    for name in missing:
        model, second = map(str, make_models(name, second_of(name)))
        steps = ["generate", ["reload", second], "generate", ["reload", model], "generate"]
        own = {"model": model, "dtype": dtype_of(name), "steps": steps}
        tasks += [own, {**own, "model": second, "steps": ["generate"]}, {**own, "load_format": "tensord"}]
    if tasks:
        run = engines.run("vllm", "vllm_steps.py", json.dumps(tasks))
        parts: list[list[Any]] = [[]]
        for one in run.results:
            if one["step"] == "task":
                parts.append([])
            elif one["step"] in ("generate", "error"):
                parts[-1].append(one["value"])
        for number, name in enumerate(missing):
            _vllm[name] = parts[3 * number : 3 * number + 3]
        assert len(told(run)) == 3 * len(missing)
    return _vllm


def asked_for(request: pytest.FixtureRequest, test: str) -> list[str]:
    """The models that `test` is going to run with."""
    items = [item for item in request.node.listchain()[0].items if item.originalname == test]
    return [item.callspec.params["name"] for item in items]


@pytest.mark.parametrize("name", VLLM)
def test_vllm_generates_what_it_does_by_its_own_loader(
    name: str, engines: Engines, make_models: Make, request: pytest.FixtureRequest
) -> None:
    wanted = asked_for(request, "test_vllm_generates_what_it_does_by_its_own_loader")
    own, second, ours = vllm_tokens(engines, make_models, wanted)[name]
    assert len(ours) == len(own) == 3
    before, after, again = ours
    assert before == own[0]
    assert after != before
    if name in RELOAD_IS_RANDOM:
        return
    assert ours == own
    if name not in RELOAD_IS_PARTIAL:
        assert [after] == second
        assert again == before


# ---- SGLang --------------------------------------------------------------------------------------------

_sglang: dict[str, Any] = {}


@pytest.mark.parametrize("name", BOTH)
def test_sglang_generates_what_it_does_by_its_own_loader(
    name: str, engines: Engines, make_models: Make
) -> None:
    model, second = make_models(name, second_of(name))
    steps: list[Any] = ["generate"]
    for path, load_format in ((second, "tensord"), (model, "tensord"), (second, "auto"), (model, "auto")):
        steps += [["update", str(path), load_format], "generate"]
    run = engines.steps("sglang", model, steps, load_format="tensord")
    for step in steps[1::2]:
        assert run.values(step)[0][0], f"{step}: {run.values(step)}"
    start, second_ours, back_ours, second_own, back_own = _sglang[name] = run.values("generate")
    assert start == back_ours == back_own
    assert second_ours == second_own != start
    # An update is told to the engine again while requests of before still run there.
    updates = run.lines("Start update_weights. Load format=tensord")
    assert len(told(run)) == 1 + len(updates) >= 3


@pytest.mark.parametrize("name", BOTH)
def test_both_engines_generate_the_same(
    name: str, engines: Engines, make_models: Make, request: pytest.FixtureRequest
) -> None:
    model, second = make_models(name, second_of(name))
    wanted = asked_for(request, "test_both_engines_generate_the_same")
    _, of_second, (start, *_) = vllm_tokens(engines, make_models, wanted)[name]
    if name not in _sglang:
        steps = ["generate", ["update", str(second)], "generate"]
        _sglang[name] = engines.steps("sglang", model, steps, load_format="tensord").values("generate")
    assert _sglang[name][:2] == [start, *of_second]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_two_ranks_generate_the_same_and_read_once(
    engine: str, name: str, engines: Engines, make_models: Make, make_daemon: Callable[..., Daemon]
) -> None:
    (model,) = make_models(name)
    (expected, *_), _, _ = vllm_tokens(engines, make_models, [name])[name]
    fresh = make_daemon()
    run = engines.steps(engine, model, load_format="tensord", tp=2, variables=fresh.environment)
    assert run.values("generate") == [expected]
    assert len(told(run)) == 2
    (replica,) = fresh.ask("ls")["replicas"]
    assert fresh.ask("status")["loaded_bytes"] == replica["total_bytes"]


def test_vllm_loads_a_draft_model_too(engines: Engines, make_models: Make) -> None:
    model, draft = make_models("qwen3", "qwen3_tied")
    config = {"model": str(draft), "num_speculative_tokens": 2, "method": "draft_model"}
    task = {"model": str(model), "engine": {"speculative_config": config}}
    run = engines.run("vllm", "vllm_steps.py", json.dumps([task, {**task, "load_format": "tensord"}]))
    own, ours = run.values("generate")
    assert own == ours
    assert len(told(run)) == 2


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parity_is_a_command(engine: str, ranks: int, engines: Engines, make_models: Make) -> None:
    (model,) = make_models("qwen3")
    python = ENVIRONMENTS / engine / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "tensord", "parity", engine, model, "--tp", str(ranks), "--json"],
        env={**os.environ, **engines.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    report = json.loads(done.stdout[done.stdout.index('{"engine"') :])
    assert report["is_equal"]
    assert [rank["differences"] for rank in report["ranks"]] == [[]] * ranks
