"""The life of the daemon: how it starts, what it refuses, how it is configured, how it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, counted
from processes import LONG_BYTES, Worker, halfway, has_ended, sparse_file, until

make_worker = processes.make_worker

FAILED, BAD_WORDS = 1, 2
CLIENT_COUNT = 8
REFUSAL_SECONDS = 30  # only a daemon that should have refused to run reaches it
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def folder(short_folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=short_folder))


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No setting comes from whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("TENSORD_") and name not in ("TENSORD_BINARY", "TENSORD_LIBRARY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))


class Lonely(Daemon):
    """A daemon that somebody else starts, if anybody does."""

    def pid_file(self) -> int:
        return int(self.ask("status")["pid"])


@pytest.fixture
def autostarted(binary: Path, folder: Path, clean: None) -> Iterator[Lonely]:
    daemon = Lonely(binary, folder)
    daemon.environment.update(TENSORD_AUTOSTART="1", TENSORD_BINARY=str(binary))
    daemon.log_path = daemon.state_folder / "daemon.log"
    yield daemon
    if daemon.listens():
        pid = daemon.pid_file()
        stopped = daemon.run("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert has_ended(pid)


def serve(binary: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`tensord serve` that is expected to end by itself."""
    return subprocess.run(
        [binary, "serve", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=REFUSAL_SECONDS,
    )


def places(folder: Path) -> dict[str, str]:
    return {"TENSORD_RUNTIME_DIR": str(folder / "run"), "TENSORD_STATE_DIR": str(folder / "state")}


# ---- starting --------------------------------------------------------------------------------------------


def test_opening_starts_a_daemon_that_outlives_its_client(
    autostarted: Lonely, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((3, 5))})
    client = make_worker(autostarted)
    code = f"m = tensord.open({str(path)!r}, 'np'); m.wait(); result = m['w'].sum().item()"
    assert client.ask(code) == counted((3, 5)).sum()
    client.kill()
    status = autostarted.ask("status")
    assert status["replicas"] == 1
    assert os.getsid(status["pid"]) != os.getsid(0)
    assert Path(f"/proc/{status['pid']}/cwd").readlink() == Path("/")
    until(lambda: "listens at" in autostarted.log(), "it is in the log of the state folder")
    assert stat.S_IMODE(autostarted.runtime_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((autostarted.runtime_folder / "socket").stat().st_mode) == 0o600


def test_a_relative_runtime_folder_is_the_client_s(
    autostarted: Lonely, make_worker: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = autostarted.runtime_folder.parent
    autostarted.runtime_folder = parent / f"relative-{parent.name}"
    autostarted.environment["TENSORD_RUNTIME_DIR"] = autostarted.runtime_folder.name
    monkeypatch.chdir(parent)
    client = make_worker(autostarted)
    client.ask("from tensord import _library; _library.call('status', autostart=True)")
    assert autostarted.listens()


def test_clients_that_start_at_once_share_one_daemon(
    autostarted: Lonely, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((7,))})
    clients = [make_worker(autostarted) for _ in range(CLIENT_COUNT)]
    for client in clients:
        client.ask("from tensord import _library")
    for client in clients:
        client.tell(f"m = tensord.open({str(path)!r}, 'np'); m.wait(); result = _library.call('status')")
    answers = [client.hear() for client in clients]
    assert [worked for worked, _ in answers] == [True] * CLIENT_COUNT, answers
    assert {json.loads(status)["pid"] for _, status in answers} == {autostarted.pid_file()}
    assert autostarted.log().count("listens at") == 1
    (replica,) = autostarted.ask("ls")["replicas"]
    assert {lease["pid"] for lease in replica["leases"]} == {client.pid for client in clients}


def test_autostart_0_forbids_it(
    autostarted: Lonely, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((7,))})
    autostarted.environment["TENSORD_AUTOSTART"] = "0"
    client = make_worker(autostarted)
    client.tell(f"tensord.open({str(path)!r}, 'np')")
    worked, error = client.hear()
    assert not worked
    assert error.startswith("UnavailableError: ")
    assert "tensord serve" in error and str(autostarted.runtime_folder) in error
    assert not autostarted.runtime_folder.exists()


def test_a_program_that_cannot_be_started_is_named(
    autostarted: Lonely, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((7,))})
    autostarted.environment["TENSORD_BINARY"] = "/nonexistent/tensord"
    client = make_worker(autostarted)
    client.tell(f"tensord.open({str(path)!r}, 'np')")
    worked, error = client.hear()
    assert not worked
    assert error.startswith("UnavailableError: ") and "/nonexistent/tensord" in error


def test_a_second_daemon_on_one_folder_says_so(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    second = serve(daemon.binary, environment=daemon.environment)
    assert second.returncode == FAILED
    assert second.stdout == ""
    assert second.stderr.startswith("tensord: serve: ")
    assert f"(pid {daemon.pid})" in second.stderr and str(daemon.runtime_folder) in second.stderr
    assert daemon.ask("status")["pid"] == daemon.pid


def test_the_socket_of_a_killed_daemon_is_replaced(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    path = make_file({"w": counted((7,))})
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    assert (daemon.runtime_folder / "socket").is_socket()
    with pytest.raises(tensord.UnavailableError, match="no daemon listens"):
        tensord.open(path)
    daemon.start()
    with tensord.open(path, "np") as model:
        assert model["w"].tolist() == list(range(7))
    assert daemon.stop() == 0
    assert not (daemon.runtime_folder / "socket").exists()


# ---- folders it does not trust ---------------------------------------------------------------------------


@needs_root
def test_a_runtime_folder_of_somebody_else_is_refused(
    binary: Path, folder: Path, clean: None, make_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, NOBODY, NOBODY)
    refused = serve(binary, environment=places(folder))
    assert refused.returncode == FAILED
    assert str(runtime) in refused.stderr and f"belongs to uid {NOBODY}" in refused.stderr
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("TENSORD_AUTOSTART", "0")
    with pytest.raises(tensord.DeniedError, match=f"belongs to uid {NOBODY}"):
        tensord.open(make_file({"w": counted((7,))}))


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_runtime_folder_that_is_a_link_is_refused(
    binary: Path,
    folder: Path,
    clean: None,
    make_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    slash: str,
) -> None:
    (folder / "target").mkdir(mode=0o700)
    (folder / "run").symlink_to(folder / "target")
    environment = {**places(folder), "TENSORD_RUNTIME_DIR": f"{folder}/run{slash}"}
    refused = serve(binary, environment=environment)
    assert refused.returncode == FAILED
    assert f"{folder}/run is a symbolic link" in refused.stderr
    assert list((folder / "target").iterdir()) == []
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", environment["TENSORD_RUNTIME_DIR"])
    monkeypatch.setenv("TENSORD_AUTOSTART", "0")
    with pytest.raises(tensord.DeniedError, match="symbolic link"):
        tensord.open(make_file({"w": counted((7,))}))


def test_a_runtime_folder_open_to_others_is_refused_and_left_as_it_is(
    binary: Path, folder: Path, clean: None
) -> None:
    daemon = Daemon(binary, folder)
    daemon.runtime_folder.mkdir()
    daemon.runtime_folder.chmod(0o755)
    done = subprocess.run(
        [binary, "serve"], env={**os.environ, **daemon.environment}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"runtime folder {daemon.runtime_folder} is open to others" in done.stderr
    assert stat.S_IMODE(daemon.runtime_folder.stat().st_mode) == 0o755


def test_a_runtime_folder_that_is_a_file_or_too_long_is_named(
    binary: Path, folder: Path, clean: None
) -> None:
    (folder / "run").touch()
    refused = serve(binary, environment=places(folder))
    assert refused.returncode == FAILED and str(folder / "run") in refused.stderr
    long = folder / ("long" * 30)
    refused = serve(binary, "--runtime-dir", str(long), environment=places(folder))
    assert refused.returncode == FAILED
    assert "too long" in refused.stderr and "TENSORD_RUNTIME_DIR" in refused.stderr


# ---- ending ----------------------------------------------------------------------------------------------


def test_sigterm_lets_a_running_load_finish(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--read-threads", "1", "--drain-seconds", "3600")
    path = sparse_file(tmp_path / "long.safetensors")
    with halfway(daemon, path) as model:
        os.kill(daemon.pid, signal.SIGTERM)
    model.wait()
    assert daemon.process is not None and daemon.process.wait(DEADLINE_SECONDS) == 0
    assert "stopping: 1 loads run" in daemon.log()
    assert "ready" in daemon.log()
    daemon.process = None

    # What it learned was kept: the next load is checked against it.
    daemon.start()
    daemon.ask("load", str(path), "--wait")
    assert daemon.ask("explain", str(path))["checked_against"] == "recorded"


@pytest.mark.parametrize("drain_seconds", ["3600", "0"])
def test_a_second_signal_or_no_patience_ends_loads_at_once(
    make_daemon: Callable[..., Daemon], tmp_path: Path, drain_seconds: str
) -> None:
    daemon = make_daemon("--read-threads", "1", "--drain-seconds", drain_seconds)
    path = sparse_file(tmp_path / "long.safetensors", 4 * LONG_BYTES)
    with halfway(daemon, path) as model:
        os.kill(daemon.pid, signal.SIGTERM)
        if drain_seconds != "0":
            os.kill(daemon.pid, signal.SIGINT)  # of one signal only one can be pending
    assert daemon.process is not None and daemon.process.wait(DEADLINE_SECONDS) == 0
    daemon.process = None
    with pytest.raises(tensord.CancelledError, match="the daemon was stopped"):
        model.wait()


def test_stop_waits_until_it_is_gone(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    assert daemon.ask("stop")["pid"] == daemon.pid
    assert daemon.process is not None and daemon.process.wait(DEADLINE_SECONDS) == 0
    assert daemon.log().rstrip().endswith("stopped")
    assert not (daemon.runtime_folder / "socket").exists()
    daemon.process = None


# ---- settings --------------------------------------------------------------------------------------------


def limits(daemon: Daemon) -> dict[str, Any]:
    return dict(daemon.ask("status")["limits"])


@pytest.fixture
def configured(binary: Path, folder: Path, clean: None) -> Iterator[Callable[..., Daemon]]:
    """A started daemon with flags, and with the environment as it is."""
    made: list[Daemon] = []

    def make(*arguments: str, environment: dict[str, str] | None = None) -> Daemon:
        daemon = Daemon(binary, Path(tempfile.mkdtemp(dir=folder)), arguments)
        daemon.environment.update(environment or {})
        made.append(daemon)
        daemon.start()
        return daemon

    yield make
    for daemon in made:
        assert daemon.stop() == 0


def test_flags_win_over_environment_over_file_over_default(
    configured: Callable[..., Daemon], folder: Path
) -> None:
    file = folder / "own.toml"
    file.write_text('host_memory = "3MiB"\nread_threads = 3\ndrain_seconds = 3\n')
    settings = {"TENSORD_HOST_MEMORY": "5MiB", "TENSORD_READ_THREADS": "5"}
    default = limits(configured())
    assert default["host_memory"] > 5 << 20
    by_file = limits(configured("--config", str(file)))
    assert (by_file["host_memory"], by_file["read_threads"]) == (3 << 20, 3)
    by_variable = limits(configured("--config", str(file), environment={"TENSORD_HOST_MEMORY": "5MiB"}))
    assert (by_variable["host_memory"], by_variable["read_threads"]) == (5 << 20, 3)
    by_flag = limits(configured("--config", str(file), "--read-threads=7", environment=settings))
    assert (by_flag["host_memory"], by_flag["read_threads"]) == (5 << 20, 7)
    twice = limits(configured("--read-threads", "2", "--read-threads", "4"))
    assert twice["read_threads"] == 4


def test_the_file_is_found_by_its_place_or_its_variable(
    configured: Callable[..., Daemon], folder: Path
) -> None:
    usual = folder / "config" / "tensord" / "tensord.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text("read_threads = 3\n")
    named = folder / "named.toml"
    named.write_text("read_threads = 4\n")
    assert limits(configured())["read_threads"] == 3
    variable = {"TENSORD_CONFIG": str(named)}
    assert limits(configured(environment=variable))["read_threads"] == 4
    (folder / "flag.toml").write_text("read_threads = 5\n")
    flag = ("--config", str(folder / "flag.toml"))
    assert limits(configured(*flag, environment=variable))["read_threads"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host-memory", "lots"), "--host-memory: size 'lots': write a number with an optional unit"),
        (("--host-memory", "-1"), "--host-memory: size '-1'"),
        (("--host-memory", "1XB"), "--host-memory: size '1XB'"),
        (("--host-memory", "99999EiB"), "--host-memory: size '99999EiB'"),
        (("--prefault", ""), "--prefault: size ''"),
        (("--read-threads", "0"), '--read-threads: "0" is no whole number from 1 to 256'),
        (("--read-threads", "257"), '--read-threads: "257" is no whole number'),
        (("--read-threads", "1.5"), '--read-threads: "1.5" is no whole number'),
        (("--read-threads=",), '--read-threads: "" is no whole number'),
        (("--drain-seconds", "-1"), '--drain-seconds: "-1" is no whole number from 0 to 3600'),
        (("--log-level", "loud"), "--log-level: 'loud' is none of trace, debug, info"),
        (("--no-such-flag", "1"), 'no flag "--no-such-flag"; see `tensord serve --help`'),
        (("word",), 'no flag "word"'),
        (("--host-memory",), "--host-memory needs a value"),
        (("--config",), "--config needs a value"),
        (("--config", "/nonexistent/a.toml"), "--config /nonexistent/a.toml: cannot be read"),
        (("--config", "/"), "/"),
    ],
)
def test_flags_that_make_no_sense_end_with_2(
    binary: Path, folder: Path, clean: None, arguments: tuple[str, ...], message: str
) -> None:
    refused = serve(binary, *arguments, environment=places(folder))
    assert refused.returncode == BAD_WORDS
    assert refused.stderr.startswith("tensord: serve: ")
    assert message.replace('"', "'") in refused.stderr.replace('"', "'")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nhost_memoy = 1\n", ":2: host_memoy: no such setting; see `tensord serve --help`"),
        ("read_threads = 0", ":1: read_threads: "),
        ("read_threads = true", ":1: read_threads: write a string or a whole number"),
        ("host_memory = 1.5", ":1: host_memory: write a string or a whole number"),
        ("[host_memory]\nsize = 1", ":1: host_memory: write a string or a whole number"),
        ("host_memory = ", ":1: "),
        ("a = 1\na = 2", ":2: "),
        ("\xff", ":1: "),
    ],
)
def test_files_that_make_no_sense_end_with_2(
    binary: Path, folder: Path, clean: None, text: str, message: str
) -> None:
    file = folder / "bad.toml"
    file.write_text(text, encoding="latin-1")
    refused = serve(binary, "--config", str(file), environment=places(folder))
    assert refused.returncode == BAD_WORDS
    assert refused.stderr.startswith(f"tensord: serve: {file}{message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TENSORD_READ_THREADS", "many", "$TENSORD_READ_THREADS: "),
        ("TENSORD_HOST_MEMORY", "many", "$TENSORD_HOST_MEMORY: "),
        ("TENSORD_LOG_LEVEL", "many", "$TENSORD_LOG_LEVEL: "),
        ("TENSORD_CONFIG", "/nonexistent/a.toml", "/nonexistent/a.toml: cannot be read"),
    ],
)
def test_variables_that_make_no_sense_end_with_2(
    binary: Path, folder: Path, clean: None, name: str, value: str, message: str
) -> None:
    refused = serve(binary, environment={**places(folder), name: value})
    assert refused.returncode == BAD_WORDS
    assert message in refused.stderr


# ---- the log ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "seen", "unseen"),
    [("debug", "closed the connection", None), ("info", "listens at", "closed the"), ("error", None, " ")],
)
def test_the_level_says_how_much_is_logged(
    configured: Callable[..., Daemon], level: str, seen: str | None, unseen: str | None
) -> None:
    daemon = configured("--log-level", level)
    daemon.ask("status")
    if seen is not None:
        until(lambda: seen in daemon.log(), f"{seen} in the log")
    assert unseen is None or unseen not in daemon.log()


def test_the_log_may_go_to_a_file(configured: Callable[..., Daemon], folder: Path) -> None:
    daemon = configured("--log-file", str(folder / "own.log"))
    until(lambda: "listens at" in (folder / "own.log").read_text(), "it is in the file")
    assert daemon.log() == ""


def test_a_log_file_that_cannot_be_opened_is_named(binary: Path, folder: Path, clean: None) -> None:
    refused = serve(binary, "--log-file", "/dev/null/log", environment=places(folder))
    assert refused.returncode == FAILED
    assert "/dev/null/log" in refused.stderr


# ---- the state folder ------------------------------------------------------------------------------------


def test_without_a_state_folder_it_serves_and_says_so_once(
    configured: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    daemon = configured("--state-dir", "/dev/null/state")
    for number in range(3):
        path = make_file({"w": counted((5,))}, name=f"{number}.safetensors")
        assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
        daemon.ask("evict", str(path))
    assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
    assert daemon.ask("explain", str(path))["checked_against"] == "recorded"  # in memory
    assert daemon.log().count("warning") == 1
    assert "/dev/null" in daemon.log()


class Confined(Daemon):
    """A daemon that sees a small disk of its own at its state folder."""

    DISK_BYTES = 4 << 20

    def start(self) -> None:
        self.state_folder.mkdir(exist_ok=True)
        script = self.runtime_folder.parent / "confined"
        mount = f"mount -t tmpfs -o size={self.DISK_BYTES} tmpfs {shlex.quote(str(self.state_folder))}"
        script.write_text(
            f'#!/bin/sh\n{mount} || exit 1\n{self.prepare}\nexec {shlex.quote(str(self.program))} "$@"\n'
        )
        script.chmod(0o700)
        self.binary = self.runtime_folder.parent / "unshared"
        self.binary.write_text(f'#!/bin/sh\nexec unshare -m {shlex.quote(str(script))} "$@"\n')
        self.binary.chmod(0o700)
        super().start()
        self.binary = self.program

    def __init__(self, binary: Path, folder: Path, prepare: str) -> None:
        super().__init__(binary, folder)
        self.program = binary
        self.prepare = prepare

    @property
    def disk(self) -> Path:
        return Path(f"/proc/{self.pid}/root{self.state_folder}")


@pytest.fixture
def make_confined(binary: Path, folder: Path, clean: None) -> Iterator[Callable[..., Confined]]:
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if tried.returncode != 0:
        pytest.skip(f"no disk of one's own here: {tried.stderr}")
    made: list[Confined] = []

    def make(prepare: str = ":") -> Confined:
        daemon = Confined(binary, folder, prepare)
        made.append(daemon)
        daemon.start()
        return daemon

    yield make
    for daemon in made:
        assert daemon.stop() == 0


def fill(disk: Path) -> None:
    with (disk / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_a_state_folder_that_is_full_from_the_beginning(
    make_confined: Callable[..., Confined], make_file: Callable[..., Path], folder: Path
) -> None:
    daemon = make_confined(
        f"head -c 8M /dev/zero > {shlex.quote(str(folder / 'state' / 'fill'))} 2> /dev/null"
    )
    path = make_file({"w": counted((5,))})
    for _ in range(3):
        assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
        daemon.ask("evict", str(path))
    assert daemon.log().count("warning") == 1
    assert "catalog" in daemon.log() and "free space" in daemon.log()


def test_a_state_folder_that_becomes_full(
    make_confined: Callable[..., Confined], make_file: Callable[..., Path]
) -> None:
    daemon = make_confined()
    until(lambda: "listens at" in daemon.log(), "the catalog is open")
    fill(daemon.disk)
    for number in range(5):
        path = make_file({f"tensor {at}": counted((5,)) for at in range(4000)}, name=f"{number}.safetensors")
        assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
        daemon.ask("evict", str(path))
    until(lambda: "warning" in daemon.log(), "it is said that the disk is full")
    assert daemon.log().count("warning") == 1
    assert "catalog" in daemon.log() and "free space" in daemon.log()

    # With room again, it remembers again.
    (daemon.disk / "fill").unlink()
    for _ in range(2):
        assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
        daemon.ask("evict", str(path))
    daemon.ask("load", str(path), "--wait")
    assert daemon.ask("explain", str(path))["checked_against"] == "recorded"
    assert daemon.log().count("warning") == 1
