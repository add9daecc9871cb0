"""Engines in environments of their own (tools/engines.sh), run as processes whose output is compared here."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ENVIRONMENTS = REPOSITORY / "build" / "engines"
MODELS = ENVIRONMENTS / "models"

# Only a hang reaches it: an engine of two ranks takes a minute and a half.
ENGINE_SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of worth: families of models, then whole engines."""
    order = ("test_options", "test_families", "test_whole", "test_ranks", "test_real")
    names = {name: number for number, name in enumerate(order)}
    items.sort(key=lambda item: names.get(item.path.stem, len(order)))


class Run:
    """What a process printed."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text
        lines = [line[len("RESULT ") :] for line in text.splitlines() if line.startswith("RESULT ")]
        self.results: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def values(self, step: Any) -> list[Any]:
        """What the steps that are equal to `step` gave, in turn."""
        return [one["value"] for one in self.results if one.get("step") == step]

    def lines(self, text: str) -> list[str]:
        return [line for line in self.text.splitlines() if text in line]


class Engines:
    """Runs scripts of this folder in an engine's environment, as clients of one daemon."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, engine: str, script: str, *words: str, fails: bool = False, **variables: str) -> Run:
        python = ENVIRONMENTS / engine / "bin" / "python"
        if not python.exists():
            pytest.fail(f"{python} is not there: run tools/engines.sh {engine}")
        begin = time.monotonic()
        done = subprocess.run(
            [str(python), str(HERE / script), *words],
            env={**os.environ, **self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ENGINE_SECONDS,
        )
        print(f"{engine} {script} took {time.monotonic() - begin:.1f} s:\n{done.stdout}")
        if not fails:
            assert done.returncode == 0, f"{engine} {script}: status {done.returncode}"
        return Run(done.returncode, done.stdout)

    def steps(self, engine: str, model: Path, steps: Any = ("generate",), **rest: Any) -> Run:
        """A whole engine: `rest` is of the task, but for `fails` and `variables`."""
        fails, variables = rest.pop("fails", False), rest.pop("variables", {})
        task = json.dumps({"model": str(model), "steps": list(steps), **rest})
        return self.run(engine, f"{engine}_steps.py", task, fails=fails, **variables)


@pytest.fixture
def engines(daemon: Any, binary: Path) -> Engines:
    return Engines({**daemon.environment, "TENSORD_BINARY": str(binary)})


@pytest.fixture(scope="session")
def make_models() -> Callable[..., list[Path]]:
    """Folders of tiny checkpoints, made where they are missing: ``make_models("llama", "qwen3-fp8")``."""

    def make(*names: str) -> list[Path]:
        run = Engines({}).run("vllm", "tiny.py", str(MODELS), *names)
        assert "FAILED" not in run.text
        return [MODELS / name for name in names]

    return make
