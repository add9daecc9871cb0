"""Daemons and checkpoints for the tests. Every daemon has folders of its own; who starts it ends it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("tensord") is None:
    sys.path.insert(0, str(REPOSITORY / "python"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(REPOSITORY / "python"), os.environ.get("PYTHONPATH")))
    )

# The command line. The daemon is the compiled program, see `binary`.
COMMAND = (sys.executable, "-m", "tensord")

# Only a hang reaches it.
DEADLINE_SECONDS = 120

# Jobs in the background of a script are started with SIGINT ignored; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="of the random tests")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, so that a failure can be had again with --seed."""
    chosen = request.config.getoption("--seed")
    chosen = random.SystemRandom().randrange(2**32) if chosen is None else chosen
    print(f"--seed {chosen}")
    return chosen


# ---- daemons ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def binary() -> Path:
    """The compiled program under test: $TENSORD_BINARY, else the release build's."""
    path = Path(os.environ.get("TENSORD_BINARY") or REPOSITORY / "build" / "release" / "tensord")
    if not path.exists():
        pytest.fail(f"{path} is not there: build it, or name another one in TENSORD_BINARY")
    return path


@pytest.fixture(scope="session")
def script(short_folder: Path) -> Path:
    """The command line as packages install it: a file `tensord` in a folder of its own."""
    path = short_folder / "bin" / "tensord"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nimport sys\nfrom tensord.cli import main\n\nsys.exit(main())\n")
    path.chmod(0o755)
    return path


class Daemon:
    """`tensord serve` with a runtime and a state folder of its own."""

    def __init__(self, binary: Path, folder: Path, arguments: tuple[str, ...] = ()) -> None:
        self.binary = binary
        self.arguments = arguments
        self.runtime_folder = folder / "run"
        self.state_folder = folder / "state"
        self.log_path = folder / "log"
        self.environment = {
            "TENSORD_RUNTIME_DIR": str(self.runtime_folder),
            "TENSORD_STATE_DIR": str(self.state_folder),
            "TENSORD_AUTOSTART": "0",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "serve", *self.arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self.listens():
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"the daemon does not listen (status {status}):\n{self.log()}")
            time.sleep(0.005)

    def listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.runtime_folder / "socket")) == 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int | None:
        """Ends it and returns its exit status; None when it was not running."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)  # it may have been stopped
        try:
            return process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the daemon did not end after {how.name}:\n{self.log()}")

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """The command line, as a client of this daemon."""
        return subprocess.run(
            [*COMMAND, *words],
            env={**os.environ, "TENSORD_BINARY": str(self.binary), **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            **options,
        )

    def ask(self, *words: str) -> Any:
        """The JSON of a verb that must work."""
        done = self.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """Sockets have names of 107 bytes at most, so this folder is near the root."""
    folder = Path(tempfile.mkdtemp(prefix="tensord-test-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def daemon(binary: Path, short_folder: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """One daemon for the tests of a module; this process's clients use it."""
    folder = short_folder / request.module.__name__
    folder.mkdir()
    running = Daemon(binary, folder)
    with _environment(running.environment):
        running.start()
        yield running
        status = running.stop()
    assert status == 0, f"the daemon ended with status {status}:\n{running.log()}"


@pytest.fixture
def make_daemon(binary: Path, short_folder: Path) -> Iterator[Callable[..., Daemon]]:
    """Further daemons, started, each with folders of its own: ``make_daemon("--host-memory", "64MiB")``."""
    made: list[Daemon] = []
    with contextlib.ExitStack() as stack:

        def make(*arguments: str, binary: Path = binary) -> Daemon:
            daemon = Daemon(binary, Path(tempfile.mkdtemp(dir=short_folder)), arguments)
            made.append(daemon)
            stack.enter_context(_environment(daemon.environment))
            daemon.start()
            return daemon

        yield make
        for daemon in made:
            daemon.stop()


def is_sanitized(binary: Path) -> bool:
    """Whether its memory is not its own alone, but also that of a sanitizer."""
    with binary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"__asan_init") >= 0 or content.find(b"__tsan_init") >= 0


@pytest.fixture
def faulty_disk(binary: Path, tmp_path: Path) -> Path:
    """What a daemon preloads so that its reads fail or hang where $FAULTY_DISK says, see faulty_disk.c."""
    if is_sanitized(binary):
        pytest.skip("a sanitizer wants to be the first library of its process")
    built = tmp_path / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, source], check=True)
    return built


@pytest.fixture
def faulty_binary(binary: Path, faulty_disk: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """A daemon's program on such a disk, whose control file it is called with."""

    def make(control: Path) -> Path:
        wrapped = tmp_path / "tensord"
        wrapped.write_text(f'#!/bin/sh\nLD_PRELOAD={faulty_disk} FAULTY_DISK={control} exec {binary} "$@"\n')
        wrapped.chmod(0o755)
        return wrapped

    return make


# ---- checkpoints -----------------------------------------------------------------------------------------

NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
SAFETENSORS_NAMES = {np.dtype(numpy): name for name, numpy in NUMPY_NAMES.items()}


class Raw:
    """A tensor of a type that numpy has not."""

    def __init__(self, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data


def safetensors_bytes(tensors: dict[str, np.ndarray | Raw], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file: an 8-byte length, a JSON header, the tensors in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    body = bytearray()
    for name, tensor in tensors.items():
        if isinstance(tensor, Raw):
            dtype, data = tensor.dtype, tensor.data
        else:
            dtype, data = SAFETENSORS_NAMES[tensor.dtype], tensor.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(body)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors to a file and returns its path: ``make_file({"w": array}, name="a.safetensors")``."""

    def make(
        tensors: dict[str, np.ndarray | Raw],
        metadata: dict[str, str] | None = None,
        name: str = "model.safetensors",
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors_bytes(tensors, metadata))
        return path

    return make


@pytest.fixture
def make_shards(make_file: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a folder of several files and their index.json, and returns the folder."""

    def make(shards: list[dict[str, np.ndarray | Raw]], folder: str = "sharded") -> Path:
        weight_map = {}
        path = Path()
        for number, tensors in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            path = make_file(tensors, name=f"{folder}/{name}")
            weight_map.update(dict.fromkeys(tensors, name))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        return path.parent

    return make


def counted(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """An array of 0, 1, 2, ..."""
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)
