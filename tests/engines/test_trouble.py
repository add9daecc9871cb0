"""What engines say and do when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Engines

Make = Callable[..., list[Path]]
BOTH = pytest.mark.parametrize("engine", ["vllm", "sglang"])

# Where no daemon is.
NOWHERE = {"TENSORD_RUNTIME_DIR": "/nonexistent/tensord"}


@BOTH
def test_an_unknown_key_is_refused_with_the_known_ones(
    engine: str, engines: Engines, make_models: Make
) -> None:
    (model,) = make_models("qwen3")
    run = engines.steps(engine, model, load_format="tensord", options={"fall_back": True}, fails=True)
    assert run.status != 0
    assert run.lines("unknown key 'fall_back' (did you mean 'fallback'?); there are: autostart, cache")


@BOTH
def test_without_a_daemon_the_engine_ends_with_a_typed_error(
    engine: str, engines: Engines, make_models: Make
) -> None:
    (model,) = make_models("qwen3")
    run = engines.steps(engine, model, load_format="tensord", fails=True, variables=NOWHERE)
    assert run.status != 0
    assert not run.values("generate")
    assert run.lines("UnavailableError")


@BOTH
def test_with_fallback_the_engines_own_loader_takes_over_and_says_so(
    engine: str, engines: Engines, make_models: Make
) -> None:
    (model,) = make_models("qwen3")
    run = engines.steps(engine, model, load_format="tensord", options={"fallback": True}, variables=NOWHERE)
    assert run.lines("tensord: loading failed, so the engine's own loader takes over: UnavailableError")
    (expected,) = engines.steps(engine, model).values("generate")
    assert run.values("generate") == [expected]


@BOTH
def test_a_release_that_was_not_tested_loads_and_is_named(
    engine: str, engines: Engines, make_models: Make
) -> None:
    (model,) = make_models("qwen3")
    variables = {"TENSORD_TEST_OTHER_VERSION": "1"}
    run = engines.steps(engine, model, load_format="tensord", variables=variables)
    assert len(run.lines("is not among the tested releases")) == 1
    (expected,) = engines.steps(engine, model).values("generate")
    assert run.values("generate") == [expected]


@BOTH
def test_a_checkpoint_that_lacks_a_tensor_is_refused(
    engine: str, engines: Engines, make_models: Make, tmp_path: Path
) -> None:
    (model,) = make_models("qwen3")
    lacking = tmp_path / "lacking"
    shutil.copytree(model, lacking)
    index = lacking / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    gone = listed["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    (lacking / gone).unlink()
    listed["weight_map"] = {name: file for name, file in listed["weight_map"].items() if file != gone}
    index.write_text(json.dumps(listed))
    run = engines.steps(engine, lacking, load_format="tensord", fails=True)
    assert run.status != 0
    assert run.lines("model.layers.1.mlp.down_proj.weight")


def test_a_failed_reload_leaves_vllm_as_it_was(engines: Engines, make_models: Make) -> None:
    (model,) = make_models("qwen3")
    steps = ["generate", ["fail?", ["reload", "/nonexistent/model"]], "generate"]
    run = engines.steps("vllm", model, steps, load_format="tensord")
    before, after = run.values("generate")
    assert before == after
    assert run.values(steps[1])[0]


def test_a_failed_update_leaves_sglang_as_it_was(engines: Engines, make_models: Make, tmp_path: Path) -> None:
    (model,) = make_models("qwen3")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model-00003-of-00012.safetensors").write_bytes(b"no tensors")
    steps: list[Any] = ["generate", ["update", str(broken)], "generate"]
    run = engines.steps("sglang", model, steps, load_format="tensord", tp=2)
    before, after = run.values("generate")
    assert before == after
    succeeded, message = run.values(steps[1])[0][:2]
    assert not succeeded
    assert "model-00003-of-00012.safetensors" in message


@BOTH
@pytest.mark.parametrize("fault", ["FAIL", "KILL"])
def test_a_rank_that_fails_takes_the_other_with_it(
    engine: str, fault: str, engines: Engines, make_models: Make
) -> None:
    (model,) = make_models("qwen3")
    begin = time.monotonic()
    variables = {f"TENSORD_TEST_{fault}_RANK": "1"}
    run = engines.steps(engine, model, load_format="tensord", tp=2, fails=True, variables=variables)
    assert run.status != 0
    assert not run.values("generate")
    assert time.monotonic() - begin < 300  # not the ten minutes that a rank waits for one that hangs
    if fault == "FAIL":
        assert run.lines("this rank was told to fail")
        assert run.lines("OtherRankError")


@BOTH
@pytest.mark.parametrize("fallback", [False, True])
def test_a_daemon_that_is_killed_during_the_load(
    engine: str,
    fallback: bool,
    engines: Engines,
    make_models: Make,
    make_daemon: Callable[..., Any],
    faulty_binary: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    (model,) = make_models("qwen3")
    slow = Path(shutil.copytree(model, tmp_path / "qwen3.faulty.safetensors"))
    for shard in slow.glob("*.safetensors"):  # on the disk alone: what is cached is not read from there
        with shard.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (tmp_path / "control").write_text(
        f"stall {(slow / 'model-00003-of-00012.safetensors').stat().st_size - 1}"
    )
    daemon = make_daemon("--disk-reads", "pread", binary=faulty_binary(tmp_path / "control"))

    def kill_in_the_midst() -> None:
        while not any(replica["leases"] for replica in daemon.ask("ls")["replicas"]):
            time.sleep(0.05)
        daemon.stop(signal.SIGKILL)

    killer = threading.Thread(target=kill_in_the_midst)
    killer.start()
    options = {"fallback": fallback, "autostart": False}
    begin = time.monotonic()
    run = engines.steps(
        engine,
        slow,
        load_format="tensord",
        options=options,
        fails=not fallback,
        variables=daemon.environment,
    )
    killer.join()
    assert time.monotonic() - begin < 300
    if not fallback:
        assert run.status != 0
        assert not run.values("generate")
        assert run.lines("UnavailableError")
        return
    assert run.lines("tensord: loading failed, so the engine's own loader takes over: UnavailableError")
    (expected,) = engines.steps(engine, model).values("generate")
    assert run.values("generate") == [expected]
