"""GPU memory without a GPU: the driver of fake_cuda.cc in this process, and daemons that have it."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Daemon

MIB = 1 << 20
POISON = 0x5A


def real_driver_is_there() -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


needs_no_driver = pytest.mark.skipif(real_driver_is_there(), reason="there is a real driver")

# ---- the driver ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.getbasetemp() / "libcuda.so.1"
    if built.exists():
        return built  # of another module: a process has one driver
    command = [
        "c++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-O1",
        f"-I{REPOSITORY}/src",
        f"-I{REPOSITORY}/include",
    ]
    source = Path(__file__).with_name("fake_cuda.cc")
    subprocess.run([*command, f"-Wl,-soname,{built.name}", "-o", built, source], check=True)
    return built


class Array:
    """A CUDA array over fake device memory."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
            "strides": strides,
            "version": 3,
        }

    def numpy(self) -> np.ndarray:
        """The same memory. Only where no copy is under way."""
        told = self.__cuda_array_interface__
        dtype = np.dtype(told["typestr"])
        extents = zip(told["shape"], told["strides"] or (0,) * len(told["shape"]))
        size = (
            dtype.itemsize + sum((extent - 1) * stride for extent, stride in extents)
            if told["strides"]
            else dtype.itemsize * int(np.prod(told["shape"]))
        )
        memory = (ctypes.c_char * max(size, 1)).from_address(told["data"][0])
        return np.ndarray(told["shape"], dtype, memory, 0, told["strides"])


class Gpu:
    """Device memory of this process."""

    def __init__(self, library: Path) -> None:
        self.driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("malloc", "pool", "vmm"):
            allocate = getattr(self.driver, f"fake_cuda_{name}")
            allocate.restype = ctypes.c_uint64
            allocate.argtypes = (ctypes.c_int, *[ctypes.c_uint64] * (2 if name == "vmm" else 1))
        self.driver.fake_cuda_free.argtypes = (ctypes.c_uint64,)
        self.driver.fake_cuda_count.restype = ctypes.c_long
        self._taken: list[int] = []

    def memory(
        self, size_bytes: int, device: int = 0, kind: str = "malloc", chunk_bytes: int = 2 * MIB
    ) -> int:
        more = (chunk_bytes,) if kind == "vmm" else ()
        address: int = getattr(self.driver, f"fake_cuda_{kind}")(device, max(size_bytes, 1), *more)
        ctypes.memset(address, POISON, size_bytes)
        self._taken.append(address)
        return address

    def array(self, shape: tuple[int, ...], dtype: Any, device: int = 0, kind: str = "malloc") -> Array:
        kept = np.dtype(dtype)
        return Array(self.memory(int(np.prod(shape)) * kept.itemsize, device, kind), shape, kept)

    def like(self, wanted: np.ndarray, **where: Any) -> Array:
        return self.array(wanted.shape, wanted.dtype, **where)

    def count(self, name: str) -> int:
        return int(self.driver.fake_cuda_count(name.encode()))

    def free(self) -> None:
        for address in self._taken:
            self.driver.fake_cuda_free(address)
        self._taken.clear()


@pytest.fixture
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Two devices; in the end this process holds nothing."""
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    made = Gpu(library)
    yield made
    made.free()
    held = {name: made.count(name) for name in ("primaries", "allocations", "mappings", "stray", "lost")}
    assert not any(held.values()), held


def is_poisoned(array: Array) -> bool:
    return bool((array.numpy().view(np.uint8) == POISON).all())


# ---- daemons with that driver ----------------------------------------------------------------------------


def wrapped(binary: Path, library: Path, folder: Path, **environment: object) -> Path:
    """A program that is `binary` with the driver; what it holds is in the file `counts` beside it."""
    folder.mkdir(exist_ok=True)
    settings = {
        "LD_LIBRARY_PATH": library.parent,
        "FAKE_CUDA_COUNTS": folder / "counts",
        "FAKE_CUDA_DEVICES": 2,
    }
    words = " ".join(f"{name}={value}" for name, value in {**settings, **environment}.items())
    program = folder / "tensord"
    program.write_text(f'#!/bin/sh\n{words} exec {binary} "$@"\n')
    program.chmod(0o755)
    return program


def counts(daemon: Daemon) -> Counter[str]:
    """What the daemon holds of the driver's."""
    path = daemon.binary.with_name("counts")
    lines = path.read_text().splitlines() if path.exists() else []  # it has used none yet
    return Counter({name: int(count) for name, count in (line.split() for line in lines)})


def holds_nothing(daemon: Daemon) -> bool:
    return not any(counts(daemon).values())


@pytest.fixture
def start(
    make_daemon: Callable[..., Daemon], binary: Path, library: Path, tmp_path: Path
) -> Iterator[Callable[..., Daemon]]:
    """``start("--gpu-idle-seconds", "1", FAKE_CUDA_FAIL="cuInit=100")``. In the end they hold nothing."""
    started: list[Daemon] = []

    def start_one(*arguments: str, **environment: object) -> Daemon:
        program = wrapped(binary, library, tmp_path / f"daemon{len(started)}", **environment)
        started.append(make_daemon(*arguments, binary=program))
        return started[-1]

    yield start_one
    for daemon in started:
        assert daemon.stop() == 0, daemon.log()
        assert holds_nothing(daemon), counts(daemon)


# ---- bytes that are not there yet ------------------------------------------------------------------------

# Copies are handed over in pieces of 16 MiB: two are there.
SLOW_BYTES = 48 * MIB
STALL_AT = 33 * MIB


class SlowDisk:
    """A daemon whose reads of one file stall at one place."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self.say(f"stall {STALL_AT}")

    def say(self, text: str) -> None:
        after = self._control.with_suffix(".new")
        after.write_text(text + "\n")
        after.rename(self._control)


@pytest.fixture
def slow(
    start: Callable[..., Daemon],
    faulty_disk: Path,
    tmp_path: Path,
    make_file: Callable[..., Path],
) -> tuple[SlowDisk, Daemon, Path, np.ndarray]:
    disk = SlowDisk(tmp_path / "control")
    daemon = start("--disk-reads", "pread", LD_PRELOAD=faulty_disk, FAULTY_DISK=tmp_path / "control")
    content = np.random.default_rng(9).integers(0, 255, SLOW_BYTES, np.uint8)
    path = make_file({"w": content}).rename(tmp_path / "model.faulty.safetensors")
    return disk, daemon, path, content


# ---- checkpoints -----------------------------------------------------------------------------------------

WEIGHTS = {
    "matrix": np.random.default_rng(1).standard_normal((1000, 768), np.float32),
    "stack": np.random.default_rng(2).integers(0, 255, (8, 96, 256), np.uint8),
    "large": np.random.default_rng(3).integers(0, 1 << 30, 5 << 18, np.int32),
    "norm": np.random.default_rng(4).standard_normal(1024, np.float32),
    "odd": np.random.default_rng(5).integers(0, 255, (37, 53), np.uint8),
}


@pytest.fixture
def path(make_file: Callable[..., Path]) -> Path:
    return make_file(WEIGHTS)
