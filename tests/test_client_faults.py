"""What goes wrong between a client and the daemon it starts, and calls of the C ABI that make no sense."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import tensord
from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted
from processes import Worker, stopped, until
from tensord import _library, copies
from tensord._library import library
from tensord.indexing import INDEX_ITEM

make_worker = processes.make_worker

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
    alone: dict[str, str], tmp_path: Path, make_file: Callable[..., Path]
) -> None:
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = make_file({"w": counted((5,))})
    subprocess.run([*COMMAND, "load", path, "--wait"], env=alone, check=True, pass_fds=[lock.fileno()])
    lock.close()
    try:
        with (tmp_path / "lock").open("w") as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        subprocess.run([*COMMAND, "stop"], env=alone, check=True)


def test_settings_that_make_no_sense_are_told_at_once_to_the_client_that_starts_a_daemon(
    alone: dict[str, str], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    done = subprocess.run(
        [*COMMAND, "load", path], env={**alone, "TENSORD_HOST_MEMORY": "foo"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "did not start: tensord: serve: $TENSORD_HOST_MEMORY: size 'foo'" in done.stderr
    assert f"its log is {alone['TENSORD_STATE_DIR']}/daemon.log" in done.stderr


@pytest.fixture
def stop_after(alone: dict[str, str]) -> Iterator[None]:
    yield
    subprocess.run([*COMMAND, "stop"], env=alone, check=True, timeout=DEADLINE_SECONDS)


def test_a_started_daemon_rotates_its_own_log(
    alone: dict[str, str], tmp_path: Path, make_file: Callable[..., Path], stop_after: None
) -> None:
    subprocess.run([*COMMAND, "load", make_file({"w": counted((5,))})], env=alone, check=True)
    status = subprocess.run([*COMMAND, "status", "--json"], env=alone, capture_output=True, check=True)
    pid = json.loads(status.stdout)["pid"]
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert words[words.index(b"--log-file") + 1] == os.fsencode(tmp_path / "state" / "daemon.log")


@pytest.mark.parametrize("places", [["state"], ["state", "run"]])
def test_a_log_that_cannot_be_made_is_no_reason_not_to_serve(
    alone: dict[str, str],
    tmp_path: Path,
    make_file: Callable[..., Path],
    stop_after: None,
    places: list[str],
) -> None:
    for place in places:
        (tmp_path / place).mkdir(mode=0o700)
        (tmp_path / place / "daemon.log").mkdir()
    subprocess.run([*COMMAND, "load", make_file({"w": counted((5,))})], env=alone, check=True)
    if "run" not in places:
        log = tmp_path / "run" / "daemon.log"
        until(lambda: "listens at" in log.read_text(), "it is in the log of the runtime folder")


def test_the_daemon_of_a_folder_that_another_one_is_leaving_is_waited_for(
    alone: dict[str, str], tmp_path: Path, make_file: Callable[..., Path], stop_after: None
) -> None:
    path = make_file({"w": counted((5,))})
    log = tmp_path / "state" / "daemon.log"
    (tmp_path / "run").mkdir(mode=0o700)
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = subprocess.Popen([*COMMAND, "load", path], env=alone)
        until(lambda: log.exists() and "already serves" in log.read_text(), "the lock is in the way")
    assert client.wait(DEADLINE_SECONDS) == 0


def test_a_name_too_long_for_any_file_is_an_error_of_its_own(daemon: Daemon) -> None:
    with pytest.raises(tensord.InvalidArgumentError, match="File name too long"):
        tensord.open("/" + "x" * 300)


LOAD = "target = np.zeros_like(m['w']); m.load_into({'w': target}); result = target.sum().item()"


def test_a_copy_is_not_told_to_a_daemon_that_came_later(
    make_daemon: Callable[..., Daemon],
    make_worker: Callable[..., Worker],
    make_file: Callable[..., Path],
) -> None:
    daemon = make_daemon()
    path = make_file({"w": counted((5,))})
    early, late = make_worker(daemon), make_worker(daemon)
    early.ask(f"m = tensord.open({str(path)!r}, 'np'); m.wait()")
    daemon.stop()
    daemon.start()
    late.ask(f"m = tensord.open({str(path)!r}, 'np'); m.wait()")
    for client in (early, early, late):
        assert client.ask(LOAD) == 10
    until(lambda: daemon.ask("explain", "last")["uses"], "a copy was told")
    assert [use["pid"] for use in daemon.ask("explain", "last")["uses"]] == [late.pid]


def test_a_copy_in_a_child_does_not_need_the_daemon(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    client = make_worker(daemon)
    client.ask(f"m = tensord.open({str(make_file({'w': counted((5,))}))!r}, 'np'); m.wait()")
    with stopped(daemon):
        client.ask(f"""
pid = os.fork()
if pid == 0:
    {LOAD}
    os._exit(0 if result == 10 else 1)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert result == 0
""")


def test_a_copy_starts_no_daemon_when_its_own_is_gone(
    alone: dict[str, str], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    script = f"""
import subprocess, numpy as np, tensord
model = tensord.open({str(path)!r}, framework="np")
model.wait()
subprocess.run([*{COMMAND}, "stop"], check=True)
for _ in range(3):
    target = np.zeros_like(model["w"])
    model.load_into({{"w": target}})
    assert (target == model["w"]).all()
"""
    environment = {**alone, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    status = subprocess.run(
        [*COMMAND, "status"], env={**alone, "TENSORD_AUTOSTART": "0"}, capture_output=True
    )
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
    handle = ctypes.c_void_p()
    assert raw.tensord_open(path, 1, None, ctypes.byref(handle)) == 0
    try:
        assert refused(raw.tensord_info(handle, None)) == "json is NULL"
        assert refused(raw.tensord_find_tensor(handle, None, None)) == "name is NULL"
        assert refused(raw.tensord_find_tensor(handle, b"w", None)) == "tensor is NULL"
        region = _library.Region()
        assert refused(raw.tensord_resolve(handle, b"w", None, 1, ctypes.byref(region))) == "items is NULL"
        assert refused(raw.tensord_load_into(handle, None, 1, None, None)) == "copies is NULL"
        name = ctypes.create_string_buffer(b"w")
        copy = np.zeros(1, copies.COPY)
        copy["name"], copy["target_rank"] = ctypes.addressof(name), 1
        address = copy.ctypes.data_as(ctypes.c_void_p)
        assert refused(raw.tensord_load_into(handle, address, 1, None, None)) == "w: target_shape is NULL"
    finally:
        raw.tensord_close(handle)
    assert raw.tensord_retain_mapping(None) is None
    assert raw.tensord_tensor_count(None) == raw.tensord_file_count(None) == 0


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[:, -3:, ::2]", [(0, 0, 0, 0, 0), (0, 1, -3, 0, 0), (0, 4, 0, 0, 2)]),
        ("[7, ..., None]", [(1, 0, 7, 0, 0), (2, 0, 0, 0, 0), (3, 0, 0, 0, 0)]),
        ("[]", []),
        ("w[0]", [(1, 0, 0, 0, 0)]),
        ("w", []),
        ("[0", []),
        ("[0][1]", [(1, 0, 1, 0, 0)]),
        ("[0, x]", "view '[0, x]': expected a number, a slice, '...' or 'None' at character 5"),
    ],
)
def test_the_text_of_an_index_is_read_as_python_writes_it(
    text: str, items: list[tuple[int, ...]] | str
) -> None:
    read = np.zeros(128, INDEX_ITEM)
    count, name_bytes = ctypes.c_size_t(), ctypes.c_size_t(7)
    address = ctypes.c_void_p(read.ctypes.data)
    code = library().tensord_parse_view(text.encode(), ctypes.byref(name_bytes), address, ctypes.byref(count))
    name = {"w[0]": "w", "w": "w", "[0": "[0", "[0][1]": "[0]"}.get(text, "")
    if isinstance(items, str):
        assert (code, library().tensord_error_message().decode()) == (INVALID_ARGUMENT, items)
    else:
        assert (code, read[: count.value].tolist()) == (0, items)
    assert name_bytes.value == len(name)


def test_options_of_newer_and_older_headers_are_taken_and_smaller_ones_refused(
    daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    path = (ctypes.c_char_p * 1)(os.fsencode(make_file({"w": np.zeros(3)})))
    full = ctypes.sizeof(_library.OpenOptions)
    first = 12  # of the first header
    for size, wanted in ((full + 4, 0), (full, 0), (first, 0), (first - 4, INVALID_ARGUMENT)):
        handle = ctypes.c_void_p()
        options = _library.OpenOptions(size, 0, 1)
        code = library().tensord_open(path, 1, ctypes.byref(options), ctypes.byref(handle))
        assert code == wanted
        assert library().tensord_retain_mapping(handle) is None  # index_only
        library().tensord_close(handle)


def test_info_tells_whether_memory_is_copy_on_write(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    assert tensord.open(make_file({"w": counted((5,))}), "np").info()["copy_on_write"] is True


def test_a_silent_daemon_is_named(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"w": counted((5,))})
    tensord.open(path).wait()
    with stopped(daemon), pytest.raises(tensord.UnavailableError) as silent:
        tensord.open(path)
    where = f"(daemon {daemon.pid} at {daemon.environment['TENSORD_RUNTIME_DIR']}"
    assert where in str(silent.value)
    assert f"`kill {daemon.pid}`" in str(silent.value)
