"""What goes wrong between a client and the daemon it starts, and calls of the C ABI that make no sense."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensord
from conftest import Daemon, counted
from tensord._library import library

INVALID_ARGUMENT = 2


@pytest.fixture
def alone(tmp_path: Path, binary: Path) -> dict[str, str]:
    """An environment whose clients start a daemon of their own."""
    return {
        **os.environ,
        "TENSORD_RUNTIME_DIR": str(tmp_path / "run"),
        "TENSORD_STATE_DIR": str(tmp_path / "state"),
        "TENSORD_BINARY": str(binary),
        "TENSORD_AUTOSTART": "1",
    }


def test_a_started_daemon_keeps_none_of_its_client_s_descriptors(
    alone: dict[str, str], binary: Path, tmp_path: Path, make_file: Callable[..., Path]
) -> None:
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = make_file({"w": counted((5,))})
    subprocess.run([binary, "load", path, "--wait"], env=alone, check=True, pass_fds=[lock.fileno()])
    lock.close()
    try:
        with (tmp_path / "lock").open("w") as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        subprocess.run([binary, "stop"], env=alone, check=True)


def test_settings_that_make_no_sense_are_told_at_once_to_the_client_that_starts_a_daemon(
    alone: dict[str, str], binary: Path, make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    done = subprocess.run(
        [binary, "load", path], env={**alone, "TENSORD_HOST_MEMORY": "foo"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "did not start" in done.stderr and "$TENSORD_HOST_MEMORY: size 'foo'" in done.stderr


def test_a_copy_starts_no_daemon_when_its_own_is_gone(
    alone: dict[str, str], binary: Path, make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    script = f"""
import subprocess, numpy as np, tensord
model = tensord.open({str(path)!r}, framework="np")
model.wait()
subprocess.run([{str(binary)!r}, "stop"], check=True)
for _ in range(3):
    target = np.zeros_like(model["w"])
    model.load_into({{"w": target}})
    assert (target == model["w"]).all()
"""
    environment = {**alone, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    status = subprocess.run([binary, "status"], env={**alone, "TENSORD_AUTOSTART": "0"}, capture_output=True)
    assert status.returncode == 3


def test_an_index_that_names_a_missing_tensor_is_told_also_when_the_files_are_resident(
    daemon: Daemon, make_shards: Callable[..., Path]
) -> None:
    folder = make_shards([{"a": counted((5,))}, {"b": counted((5,))}])
    index = folder / "model.safetensors.index.json"
    tensord.open(folder).wait()
    index.write_text(index.read_text().replace('"b"', '"c"'))
    with pytest.raises(tensord.CorruptError, match="puts tensor 'c' in") as caught:
        tensord.open(folder)
    assert str(folder) in str(caught.value)


def test_null_pointers_are_refused_by_name(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    raw = library()
    out = ctypes.c_void_p()

    def refused(code: int) -> str:
        assert code == INVALID_ARGUMENT
        return raw.tensord_error_message().decode()

    path = (ctypes.c_char_p * 1)(os.fsencode(make_file({"w": np.zeros(3)})))
    nothing = (ctypes.c_char_p * 1)(None)
    assert refused(raw.tensord_open(None, 1, None, ctypes.byref(out))) == "paths is NULL"
    assert refused(raw.tensord_open(nothing, 1, None, ctypes.byref(out))) == "a path is NULL"
    assert refused(raw.tensord_open(path, 1, None, None)) == "model is NULL"
    assert refused(raw.tensord_wait(None, None, 0)) == "model is NULL"
    assert refused(raw.tensord_load_into(None, None, 0, None, None)) == "model is NULL"
    assert refused(raw.tensord_call(None, None, 0, None)) == "verb is NULL"
