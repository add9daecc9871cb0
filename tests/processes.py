"""Processes for the whole-system tests: clients that do as they are told, and daemons stopped in mid-load."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon

Value = TypeVar("Value")


def until(condition: Callable[[], Value], what: str) -> Value:
    """The first value of `condition` that counts as true."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"never came true: {what}")
        time.sleep(0.002)
    return value


# ---- clients ---------------------------------------------------------------------------------------------

_LOOP = """
import json, os, sys
import numpy as np, tensord
names = {"np": np, "os": os, "tensord": tensord}
while line := sys.stdin.readline():
    names["result"] = None
    try:
        exec(json.loads(line), names)
        reply = [True, names["result"]]
    except BaseException as problem:
        reply = [False, type(problem).__name__ + ": " + str(problem)]
    print(json.dumps(reply), flush=True)
"""


class Worker:
    """A Python process that runs the code it is told and keeps its names; `result` goes back."""

    def __init__(self, environment: dict[str, str]) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LOOP],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> tuple[bool, Any]:
        """Whether it worked, and the result or the error as text."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_SECONDS)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"process {self.pid} does not answer (status {self.process.poll()})"
        worked, result = json.loads(line)
        return worked, result

    def ask(self, code: str) -> Any:
        self.tell(code)
        worked, result = self.hear()
        assert worked, result
        return result

    def leave(self) -> None:
        """Ends what reads the commands, be it a descendant of the process that was started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    """Further clients: ``make_worker(daemon)``."""
    with contextlib.ExitStack() as stack:

        def make(daemon: Daemon) -> Worker:
            worker = Worker(daemon.environment)
            stack.callback(worker.leave)
            return worker

        yield make


# ---- what the kernel tells of a process ------------------------------------------------------------------


def _number(path: str, name: str) -> int:
    """Of a file of /proc with lines ``name: number``."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def status_kib(pid: int, name: str) -> int:
    """A line of /proc/PID/status that is a number of KiB."""
    return _number(f"/proc/{pid}/status", name)


def bytes_read_by(pid: int, name: str = "rchar") -> int:
    """``rchar``: by all its reads so far; ``read_bytes``: from disks."""
    return _number(f"/proc/{pid}/io", name)


def fault_count(pid: int) -> int:
    """Page faults so far, minor and major, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]) + int(fields[9])


def descriptor_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def has_ended(pid: int) -> bool:
    """Also when nobody has asked for its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ---- loads that take their time --------------------------------------------------------------------------


def on_disk_alone(path: Path) -> Path:
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return path


LONG_BYTES = 768 << 20
HALFWAY_ATTEMPT_COUNT = 20


def sparse_file(path: Path, size_bytes: int = LONG_BYTES) -> Path:
    """A checkpoint of zeros with one tensor, `w`, that takes no room. As if written long ago."""
    header = {"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size_bytes)
    os.utime(path, (1_500_000_000, 1_500_000_000))
    return path


def _all_stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """No thread of the daemon runs inside."""
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: _all_stopped(pid), "all threads of the daemon are stopped")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def halfway(daemon: Daemon, path: Path, *workers: Worker) -> Iterator[tensord.Model]:
    """The model of a load that is not over, with the daemon stopped inside. Workers have it too, as `m`."""
    for _ in range(HALFWAY_ATTEMPT_COUNT):
        for worker in workers:
            worker.tell(f"m = tensord.open({str(path)!r}, 'np')")
        model = tensord.open(path, "np")
        for worker in workers:
            assert worker.hear() == (True, None)
        with stopped(daemon):
            info = model.info()
            if info["state"] == "filling" and info["ready_bytes"] < info["total_bytes"]:
                yield model
                return
        model.close()
        for worker in workers:
            worker.ask("m.close(); del m")
        until(lambda: daemon.run("evict", str(path)).returncode == 0, f"{path} is evicted")
    pytest.fail(f"{HALFWAY_ATTEMPT_COUNT} loads of {path} were over at once")
