"""Copies into GPU memory without a GPU: the driver of fake_cuda.cc in the daemon and in its clients."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import DEADLINE_SECONDS, REPOSITORY, Daemon
from processes import is_sanitized, until
from test_socket import Impostor, connected, failure, frame, receive, reply_kind

MIB = 1 << 20
POISON = 0x5A


def real_driver_is_there() -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


pytestmark = pytest.mark.skipif(real_driver_is_there(), reason="there is a real driver")

# ---- the driver ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
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


# ---- what is copied --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["malloc", "vmm"])
def test_whole_tensors(start: Callable[..., Daemon], gpu: Gpu, path: Path, kind: str) -> None:
    start()
    targets = {name: gpu.like(tensor, kind=kind) for name, tensor in WEIGHTS.items()}
    with tensord.open(path, "np") as model:
        report = model.load_into(targets)
    for name, tensor in WEIGHTS.items():
        assert np.array_equal(targets[name].numpy(), tensor), name
    assert report.device_bytes == report.bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert report.staged_bytes == 0 and report.slower_why == ""


SLICES = [
    ("matrix", np.s_[100:300]),
    ("matrix", np.s_[:, 128:640]),
    ("matrix", np.s_[::3]),
    ("stack", np.s_[3:6]),
    ("stack", np.s_[:, 8:90, 64:128]),
    ("stack", np.s_[5]),
    ("odd", np.s_[3:30, 5:50]),
    ("norm", np.s_[17:900]),
]


def test_slices(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    with tensord.open(path, "np") as model:
        for name, index in SLICES:
            target = gpu.like(WEIGHTS[name][index])
            report = model.load_into([(name, index, target)])
            assert np.array_equal(target.numpy(), WEIGHTS[name][index]), (name, index)
            assert report.device_bytes == report.bytes
        targets = [(name, index, gpu.like(WEIGHTS[name][index], kind="vmm")) for name, index in SLICES]
        model.load_into(targets)
    for name, index, target in targets:
        assert np.array_equal(target.numpy(), WEIGHTS[name][index]), (name, index)


def test_strided_targets_keep_their_gaps(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    whole = gpu.array((1000, 1536), np.float32)
    address = whole.__cuda_array_interface__["data"][0]
    part = Array(address + 512 * 4, (1000, 512), np.dtype(np.float32), (1536 * 4, 4))
    with tensord.open(path, "np") as model:
        report = model.load_into([("matrix", np.s_[:, :512], part)])
    assert report.device_bytes == report.bytes
    wanted = np.full((1000, 1536), POISON, np.uint8).repeat(4, axis=1).view(np.float32)
    wanted[:, 512:1024] = WEIGHTS["matrix"][:, :512]
    assert whole.numpy().tobytes() == wanted.tobytes()


def test_host_and_device_targets_in_one_call(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    on_host, on_device = np.zeros_like(WEIGHTS["matrix"]), gpu.like(WEIGHTS["stack"])
    with tensord.open(path, "np") as model:
        report = model.load_into({"matrix": on_host, "stack": on_device})
    assert np.array_equal(on_host, WEIGHTS["matrix"])
    assert np.array_equal(on_device.numpy(), WEIGHTS["stack"])
    assert report.device_bytes == WEIGHTS["stack"].nbytes < report.bytes


def test_two_devices_in_one_call(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    daemon = start()
    with tensord.open(path, "np") as model:
        for _ in range(10):
            low = gpu.array((500, 768), np.float32, device=0)
            high = gpu.array((500, 768), np.float32, device=1)
            report = model.load_into([("matrix", np.s_[:500], low), ("matrix", np.s_[500:], high)])
            assert np.array_equal(low.numpy(), WEIGHTS["matrix"][:500])
            assert np.array_equal(high.numpy(), WEIGHTS["matrix"][500:])
            assert report.device_bytes == report.bytes
    assert counts(daemon)["primaries"] == 2


def test_many_small_tensors(start: Callable[..., Daemon], gpu: Gpu, make_file: Callable[..., Path]) -> None:
    start()
    tensors = {f"t{at}": np.full(64 + at % 64, at, np.int16) for at in range(10_000)}
    path = make_file(tensors)
    memory = gpu.memory(256 * len(tensors))
    targets = {
        name: Array(memory + at * 256, tensor.shape, tensor.dtype)
        for at, (name, tensor) in enumerate(tensors.items())
    }
    with tensord.open(path, "np") as model:
        report = model.load_into(targets)
    for name, tensor in tensors.items():
        assert np.array_equal(targets[name].numpy(), tensor), name
    assert report.device_bytes == report.bytes


def test_neighbours_in_file_and_memory_of_separate_allocations(
    start: Callable[..., Daemon], gpu: Gpu, make_file: Callable[..., Path]
) -> None:
    start()
    tensors = {name: np.full(1 << 20, at, np.uint8) for at, name in enumerate("abc")}
    targets = {name: gpu.like(tensor) for name, tensor in tensors.items()}
    addresses = [target.__cuda_array_interface__["data"][0] for target in targets.values()]
    assert addresses[1] - addresses[0] == addresses[2] - addresses[1] == 1 << 20
    with tensord.open(make_file(tensors), "np") as model:
        assert model.load_into(targets).device_bytes == 3 << 20
    for name, tensor in tensors.items():
        assert np.array_equal(targets[name].numpy(), tensor), name


def test_memory_that_was_freed_and_made_again(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    daemon = start()
    with tensord.open(path, "np") as model:
        for _ in range(3):
            target = gpu.like(WEIGHTS["matrix"])
            model.load_into({"matrix": target})
            assert np.array_equal(target.numpy(), WEIGHTS["matrix"])
            assert counts(daemon)["opened"] == 0  # else it would stay taken
            gpu.free()


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
    binary: Path,
    tmp_path: Path,
    make_file: Callable[..., Path],
) -> tuple[SlowDisk, Daemon, Path, np.ndarray]:
    if is_sanitized(binary):
        pytest.skip("a sanitizer wants to be the first library of its process")
    shim = tmp_path / "faulty_disk.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", shim, Path(__file__).with_name("faulty_disk.c")], check=True
    )
    disk = SlowDisk(tmp_path / "control")
    daemon = start("--disk-reads", "pread", LD_PRELOAD=shim, FAULTY_DISK=tmp_path / "control")
    content = np.random.default_rng(9).integers(0, 255, SLOW_BYTES, np.uint8)
    path = make_file({"w": content}).rename(tmp_path / "model.faulty.safetensors")
    return disk, daemon, path, content


def test_while_the_replica_fills(slow: tuple[SlowDisk, Daemon, Path, np.ndarray], gpu: Gpu) -> None:
    disk, _, path, content = slow
    target = gpu.like(content)
    with tensord.open(path, "np") as model:
        reports: list[tensord.LoadReport] = []
        loading = threading.Thread(target=lambda: reports.append(model.load_into({"w": target})))
        loading.start()
        until(lambda: not (target.numpy()[: 4 * MIB : 4096] == POISON).all(), "the first bytes are copied")
        assert (target.numpy()[STALL_AT + MIB :] == POISON).all() and not reports
        disk.say("none")
        loading.join(DEADLINE_SECONDS)
    assert reports and reports[0].device_bytes == SLOW_BYTES
    assert np.array_equal(target.numpy(), content)


def test_an_interrupt_ends_a_copy_that_waits(
    slow: tuple[SlowDisk, Daemon, Path, np.ndarray], gpu: Gpu
) -> None:
    disk, daemon, path, content = slow
    target = gpu.like(content)
    with tensord.open(path, "np") as model:
        interrupted: list[float] = []

        def interrupt() -> None:
            until(lambda: target.numpy()[0] != POISON, "the first bytes are copied")
            interrupted.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            model.load_into({"w": target})
        assert time.monotonic() - interrupted[0] < 1
        left = target.numpy().copy()
        disk.say("none")
        model.wait()
        other = gpu.like(content)
        model.load_into({"w": other})
        assert np.array_equal(other.numpy(), content)
    assert np.array_equal(target.numpy(), left) and (left[STALL_AT + MIB :] == POISON).all()
    assert counts(daemon)["stray"] == 0


def test_a_client_that_waits_and_is_killed(
    slow: tuple[SlowDisk, Daemon, Path, np.ndarray], library: Path, gpu: Gpu
) -> None:
    disk, daemon, path, content = slow
    client = start_client(library, path, 1)
    until(lambda: counts(daemon)["opened"] == 1, "the client's memory is open")
    client.kill()
    client.wait()
    until(lambda: counts(daemon)["opened"] == 0, "its memory is closed")
    disk.say("none")
    target = gpu.like(content)
    with tensord.open(path, "np") as model:
        model.load_into({"w": target})
    assert np.array_equal(target.numpy(), content)


def test_a_daemon_that_stops_while_copies_wait(
    slow: tuple[SlowDisk, Daemon, Path, np.ndarray], gpu: Gpu
) -> None:
    disk, daemon, path, content = slow
    target = gpu.like(content)
    errors: list[BaseException] = []
    with tensord.open(path, "np") as model:

        def load() -> None:
            try:
                model.load_into({"w": target})
            except tensord.Error as error:
                errors.append(error)

        loading = threading.Thread(target=load)
        loading.start()
        until(lambda: target.numpy()[0] != POISON, "the first bytes are copied")
        os.kill(daemon.pid, signal.SIGTERM)
        disk.say("none")
        loading.join(DEADLINE_SECONDS)
        assert not loading.is_alive()
    # Whether the load was over before is a matter of chance.
    if errors:
        assert isinstance(errors[0], (tensord.UnavailableError, tensord.CancelledError))
    else:
        assert np.array_equal(target.numpy(), content)


# ---- what cannot be done by the daemon -------------------------------------------------------------------


def refusal(path: Path, targets: dict[str, Array]) -> tensord.Error:
    """CUDA arrays of other libraries have no slower way: their error says why."""
    with tensord.open(path, "np") as model:
        with pytest.raises(tensord.UnsupportedError, match="the slower way takes torch tensors") as caught:
            model.load_into(targets)
        assert np.array_equal(model["norm"], WEIGHTS["norm"])
    for target in targets.values():
        assert is_poisoned(target)
    assert not caught.value.target_dirty
    return caught.value


def test_memory_of_a_pool(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    assert "of a pool" in str(refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"], kind="pool")}))


def test_what_was_copied_to_other_targets_makes_a_refusal_dirty(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start()
    good, pool = gpu.like(WEIGHTS["stack"]), gpu.like(WEIGHTS["matrix"], kind="pool")
    with (
        tensord.open(path, "np") as model,
        pytest.raises(tensord.UnsupportedError, match=r"'matrix'.*of a pool") as caught,
    ):
        model.load_into({"stack": good, "matrix": pool})
    assert caught.value.target_dirty or is_poisoned(good)


def test_shapes_that_no_copy_engine_can_do(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    transposed = Array(gpu.memory(1000 * 768 * 4), (1000, 768), np.dtype(np.float32), (4, 4000))
    with (
        tensord.open(path, "np") as model,
        pytest.raises(tensord.UnsupportedError, match="not side by side") as caught,
    ):
        model.load_into({"matrix": transposed})
    assert not caught.value.target_dirty


def test_a_device_that_the_daemon_does_not_see(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start(FAKE_CUDA_DEVICES=1)
    error = refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"], device=1)})
    assert "the daemon does not see GPU-66616b65-31" in str(error) and "CUDA_VISIBLE_DEVICES" in str(error)


def test_one_device_of_two_that_the_daemon_does_not_see(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start(FAKE_CUDA_DEVICES=1)
    low, high = gpu.like(WEIGHTS["matrix"]), gpu.like(WEIGHTS["stack"], device=1)
    with (
        tensord.open(path, "np") as model,
        pytest.raises(tensord.Error, match="the daemon does not see") as caught,
    ):
        model.load_into({"matrix": low, "stack": high})
    assert caught.value.target_dirty == (not is_poisoned(low)) and is_poisoned(high)


def test_a_daemon_that_uses_no_gpu(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start("--gpu", "off")
    assert "gpu is off" in str(refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"])}))


def test_a_daemon_without_a_driver(make_daemon: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    make_daemon()
    assert "no GPU driver: libcuda.so.1" in str(refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"])}))


def test_a_daemon_with_a_driver_that_is_too_old(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start(FAKE_CUDA_VERSION=11080)
    assert "too old" in str(refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"])}))


def test_an_idle_device_is_given_back(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    daemon = start("--gpu-idle-seconds", "1")
    with tensord.open(path, "np") as model:
        for _ in range(2):
            target = gpu.like(WEIGHTS["matrix"])
            model.load_into({"matrix": target})
            assert np.array_equal(target.numpy(), WEIGHTS["matrix"])
            assert counts(daemon)["primaries"] == 1
            until(lambda: holds_nothing(daemon), "the GPU is given back")
            gpu.free()


# ---- several clients -------------------------------------------------------------------------------------

CLIENT = """
    import ctypes, sys
    import numpy as np
    library, tests, path, turns = sys.argv[1:]
    sys.path[:0] = [tests]
    from test_gpu_fake import Gpu
    import tensord
    from pathlib import Path
    gpu = Gpu(Path(library))
    with tensord.open(path, "np") as model:
        for turn in range(int(turns)):
            kind = ["malloc", "vmm"][turn % 2] if len(model) > 1 else "malloc"
            targets = {name: gpu.array(tuple(model.entry(name).shape), model[name].dtype
                                       if len(model) > 1 else np.uint8, kind=kind) for name in model}
            report = model.load_into(targets)
            assert report.device_bytes == report.bytes, report
            for name in model:
                assert np.array_equal(targets[name].numpy(), model[name]), name
            gpu.free()
            print("turn", turn, flush=True)
"""


def start_client(library: Path, path: Path, turns: int) -> subprocess.Popen[str]:
    python_path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(CLIENT),
            library,
            str(Path(__file__).parent),
            path,
            str(turns),
        ],
        env={**os.environ, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_client_leaves_nothing_and_others_go_on(
    start: Callable[..., Daemon], library: Path, path: Path
) -> None:
    daemon = start()
    victim = start_client(library, path, 1_000_000)
    other = start_client(library, path, 60)
    assert victim.stdout is not None and other.stdout is not None
    for _ in range(5):
        assert victim.stdout.readline().startswith("turn")
    victim.kill()
    victim.wait()
    other.stdout.read()
    assert other.wait(DEADLINE_SECONDS) == 0
    for name in ("opened", "allocations", "mappings", "reservations"):
        until(lambda: counts(daemon)[name] == 0, f"{name}: none")  # noqa: B023
    assert counts(daemon)["stray"] == counts(daemon)["lost"] == 0


def test_eight_clients_at_once(start: Callable[..., Daemon], library: Path, path: Path) -> None:
    daemon = start()
    clients = [start_client(library, path, 6) for _ in range(8)]
    for client in clients:
        assert client.stdout is not None
        client.stdout.read()
        assert client.wait(DEADLINE_SECONDS) == 0
    until(lambda: counts(daemon)["opened"] == 0, "all memory is closed")


def test_threads_of_one_process(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    targets = [[gpu.like(WEIGHTS["matrix"], device=device) for device in (0, 1)] for _ in range(4)]
    wrong: list[object] = []
    with tensord.open(path, "np") as model:

        def load(pair: list[Array]) -> None:
            try:
                for turn in range(10):
                    target = pair[turn % 2]
                    ctypes.memset(
                        target.__cuda_array_interface__["data"][0], POISON, WEIGHTS["matrix"].nbytes
                    )
                    model.load_into({"matrix": target})
                    if not np.array_equal(target.numpy(), WEIGHTS["matrix"]):
                        wrong.append(turn)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=load, args=(pair,)) for pair in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- a driver that fails ---------------------------------------------------------------------------------

FAULTS = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuCtxGetCurrent",
    "cuStreamCreate",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuPointerGetAttributes",
    "cuMemHostRegister_v2",
    "cuIpcOpenMemHandle_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemcpyBatchAsync_v2",
]


@pytest.mark.parametrize("from_call", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_driver_that_fails_in_the_daemon(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, name: str, from_call: int
) -> None:
    daemon = start("--gpu-idle-seconds", "0", FAKE_CUDA_FAIL=f"{name}=999@{from_call}")
    failed_count = 0
    with tensord.open(path, "np") as model:
        for _ in range(2):
            # The column slice alone takes rows, the large one a call of its own.
            wanted = {
                "matrix": WEIGHTS["matrix"][:, :100],
                "large": WEIGHTS["large"],
                "norm": WEIGHTS["norm"],
                "odd": WEIGHTS["odd"],
            }
            targets = {name: gpu.like(tensor) for name, tensor in wanted.items()}
            indices = {"matrix": np.s_[:, :100]}
            try:
                model.load_into([(key, indices.get(key, ...), target) for key, target in targets.items()])
                assert all(np.array_equal(targets[key].numpy(), wanted[key]) for key in wanted)
            except tensord.Error as error:
                failed_count += 1
                unseen = name == "cuDeviceGetUuid_v2" and "does not see" in str(error)
                assert "CUDA_ERROR_UNKNOWN" in str(error) or unseen, error
                assert error.target_dirty or all(is_poisoned(target) for target in targets.values())
                before = [target.numpy().tobytes() for target in targets.values()]
                host = {key: np.zeros_like(tensor) for key, tensor in WEIGHTS.items()}
                model.load_into(host)
                assert all(np.array_equal(host[key], WEIGHTS[key]) for key in WEIGHTS)
                assert before == [target.numpy().tobytes() for target in targets.values()]
        assert failed_count > 0 or from_call > 1
        until(lambda: holds_nothing(daemon), "the GPU is given back")


@pytest.mark.parametrize(
    "fault", ["cuIpcGetMemHandle", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuPointerGetAttributes"]
)
def test_a_driver_that_fails_in_the_client(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, fault: str
) -> None:
    start()
    gpu.driver.fake_cuda_fail(f"{fault}=999".encode())
    try:
        error = refusal(path, {"matrix": gpu.like(WEIGHTS["matrix"])})
        known = "does not know its target" if fault == "cuPointerGetAttributes" else "CUDA_ERROR_UNKNOWN"
        assert known in str(error)
    finally:
        gpu.driver.fake_cuda_fail(b"")


# ---- requests that no client of ours would make ----------------------------------------------------------

INVALID_ARGUMENT, NOT_FOUND, UNAVAILABLE, UNSUPPORTED = 2, 1, 4, 9
COPY_TO_DEVICE, COPIED = 5, 4


class Message:
    """A FlatBuffers message, written from its root on; every field has 8 bytes."""

    def __init__(self) -> None:
        self.content = bytearray(4)

    def _align(self, remainder: int) -> int:
        """So that the next byte's place, modulo 8, is that."""
        self.content += bytes((remainder - len(self.content)) % 8)
        return len(self.content)

    def table(self, offset_at: int, values: list[int]) -> list[int]:
        """A table that the offset at a place leads to. Returns where its fields are, for offsets."""
        vtable = self._align(0)
        offsets = [4 + 8 * at for at in range(len(values))]
        self.content += struct.pack(f"<HH{len(values)}H", 4 + 2 * len(values), 4 + 8 * len(values), *offsets)
        place = self._align(4)
        struct.pack_into("<I", self.content, offset_at, place - offset_at)
        self.content += struct.pack(f"<i{len(values)}Q", place - vtable, *values)
        return [place + offset for offset in offsets]

    def vector(self, offset_at: int, count: int, content: bytes) -> None:
        struct.pack_into("<I", self.content, offset_at, self._align(4) - offset_at)
        self.content += struct.pack("<I", count) + content


UUID = b"fake0".ljust(16, b"\0")


class Copies:
    """A CopyToDevice, right in all its parts unless they are changed."""

    def __init__(self, replica: int, size_bytes: int, handle: bytes) -> None:
        self.replica = replica
        self.uuid = UUID
        self.targets = [(size_bytes, 0, handle)]  # and the number of allocations
        self.allocation_bytes: list[int] = []
        # source and target offset, row bytes and count, pitches, target
        self.rows = [(0, 0, 100, 1, 0, 0, 0)]

    def frame(self, fd_count: int = 0) -> bytes:
        message = Message()
        _, _, request = message.table(0, [77, COPY_TO_DEVICE, 0])
        _, uuid, targets, sizes, rows = message.table(request, [self.replica, 0, 0, 0, 0])
        message.vector(uuid, len(self.uuid), self.uuid)
        message.vector(
            targets, len(self.targets), b"".join(struct.pack("<QI64s4x", *one) for one in self.targets)
        )
        count = len(self.allocation_bytes)
        message.vector(sizes, count, struct.pack(f"<{count}Q", *self.allocation_bytes))
        message.vector(rows, len(self.rows), b"".join(struct.pack("<6QI4x", *one) for one in self.rows))
        return frame(bytes(message.content), fd_count)


class Hostile:
    """A daemon with one replica, memory of ours, and a connection that says anything."""

    def __init__(self, daemon: Daemon, replica: int, gpu: Gpu, hello: bytes) -> None:
        self.daemon = daemon
        self.memory = gpu.memory(4096)
        handle = ctypes.create_string_buffer(64)
        primary = ctypes.c_void_p()
        assert gpu.driver.cuDevicePrimaryCtxRetain(ctypes.byref(primary), 0) == 0
        assert gpu.driver.cuCtxSetCurrent(primary) == 0
        assert gpu.driver.cuIpcGetMemHandle(handle, ctypes.c_uint64(self.memory)) == 0
        assert gpu.driver.cuCtxSetCurrent(None) == 0
        gpu.driver.cuDevicePrimaryCtxRelease_v2(0)
        self._replica, self._handle, self._hello = replica, handle.raw, hello

    def copies(self) -> Copies:
        return Copies(self._replica, 4096, self._handle)

    def ask(self, copies: Copies, fds: list[int] | None = None) -> bytes:
        with connected(self.daemon) as peer:
            peer.sendall(frame(self._hello))
            assert receive(peer) is not None
            socket.send_fds(peer, [copies.frame(len(fds or []))], fds or [])
            answer = receive(peer)
        assert answer is not None
        return answer.payload

    def refusal(self, copies: Copies, fds: list[int] | None = None) -> tuple[int, str]:
        """And after it the daemon copies as ever."""
        refused = failure(self.ask(copies, fds))
        assert reply_kind(self.ask(self.copies())) == COPIED
        return refused


@pytest.fixture
def hostile(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, binary: Path, short_folder: Path
) -> Iterator[Hostile]:
    daemon = start()
    impostor = Impostor(Path(tempfile.mkdtemp(dir=short_folder)) / "run")
    with impostor.client(binary, "ls") as (_, peer):
        hello = receive(peer)
    impostor.listener.close()
    assert hello is not None
    with tensord.open(path, "np") as model:
        model.wait()
        yield Hostile(daemon, daemon.ask("ls")["replicas"][0]["replica"], gpu, hello.payload)


HUGE = (1 << 64) - 1
ROWS_OUT_OF_BOUNDS = {
    "a source behind the image": (1 << 40, 0, 100, 1, 0, 0, 0),
    "a source that wraps": (HUGE - 50, 0, 100, 1, 0, 0, 0),
    "a target behind its memory": (0, 4000, 100, 1, 0, 0, 0),
    "a target that wraps": (0, HUGE - 50, 100, 1, 0, 0, 0),
    "a row of nothing": (0, 0, 0, 1, 0, 0, 0),
    "a row without end": (0, 0, HUGE, 1, 0, 0, 0),
    "no rows": (0, 0, 100, 0, 100, 100, 0),
    "rows without end": (0, 0, 100, HUGE, 100, 100, 0),
    "rows that leave the target": (0, 0, 100, 42, 100, 100, 0),
    "rows upon each other": (0, 0, 100, 2, 100, 50, 0),
    "a pitch that wraps": (0, 0, 100, 2, HUGE, 100, 0),
    "another target": (0, 0, 100, 1, 0, 0, 1),
}


@pytest.mark.parametrize("kind", ROWS_OUT_OF_BOUNDS)
def test_copies_out_of_bounds_are_refused(hostile: Hostile, kind: str) -> None:
    copies = hostile.copies()
    copies.rows = [(0, 0, 16, 1, 0, 0, 0), ROWS_OUT_OF_BOUNDS[kind]]
    code, message = hostile.refusal(copies)
    assert code == INVALID_ARGUMENT and "copy 1 of 2 to a GPU" in message
    assert ctypes.string_at(hostile.memory + 100, 3996) == bytes([POISON]) * 3996


def test_devices_and_replicas_that_do_not_exist_are_refused(hostile: Hostile) -> None:
    for uuid, wanted in ((b"abc", INVALID_ARGUMENT), (b"", INVALID_ARGUMENT), (b"x" * 16, UNAVAILABLE)):
        copies = hostile.copies()
        copies.uuid = uuid
        assert hostile.refusal(copies)[0] == wanted
    copies = hostile.copies()
    copies.replica = 4711
    assert hostile.refusal(copies) == (NOT_FOUND, "there is no replica 4711; open the model again")


def test_handles_of_no_memory_are_refused(hostile: Hostile) -> None:
    handle = hostile.copies().targets[0][2]
    for wrong in (bytes(64), b"noise" * 12 + bytes(4), handle[:8] + struct.pack("<i", 1 << 22) + handle[12:]):
        copies = hostile.copies()
        copies.targets = [(4096, 0, wrong)]
        code, message = hostile.refusal(copies)
        assert code == UNSUPPORTED and "open a client's GPU memory" in message
    copies = hostile.copies()
    copies.targets = [(8192, 0, handle)]
    copies.rows = [(0, 8000, 100, 1, 0, 0, 0)]
    code, message = hostile.refusal(copies)
    assert code == INVALID_ARGUMENT and "its memory only" in message


def test_descriptors_that_are_not_as_announced_are_refused(hostile: Hostile, gpu: Gpu) -> None:
    memory = os.memfd_create("fake-cuda")
    os.truncate(memory, 4 * MIB)
    null = os.open("/dev/null", os.O_RDWR)
    half = 2 * MIB
    cases: list[tuple[list[int], int, list[int], str]] = [
        # sizes, allocations of the target, descriptors
        ([half], 1, [], "1 allocations on a GPU came with 0 descriptors"),
        ([], 1, [memory], "0 allocations on a GPU came with 1 descriptors"),
        ([half], 2, [memory], "more allocations than came with them"),
        ([half], (1 << 32) - 1, [memory], "more allocations than came with them"),
        ([half], 1, [null], "import GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([8 * MIB], 1, [memory], "map GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([5000], 1, [memory], "reserve addresses for GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([HUGE - half + 1, 2 * half], 2, [memory, memory], "map GPU memory: CUDA_ERROR_INVALID_VALUE"),
        ([100], 1, [memory], "larger than the memory that came with it"),
    ]
    for sizes, count, fds, words in cases:
        copies = hostile.copies()
        copies.targets = [(4096, count, bytes(64))]
        copies.allocation_bytes = sizes
        code, message = hostile.refusal(copies, fds)
        assert code in (INVALID_ARGUMENT, UNSUPPORTED) and words in message, (words, message)
    copies = hostile.copies()
    copies.targets = [(4 * MIB, 1, bytes(64))]
    copies.allocation_bytes = [4 * MIB]
    copies.rows = [(0, 3 * MIB, 100, 1, 0, 0, 0)]
    assert reply_kind(hostile.ask(copies, [memory])) == COPIED
    assert os.pread(memory, 100, 3 * MIB) == ctypes.string_at(hostile.memory, 100)
    os.close(memory)
    os.close(null)


def test_requests_cut_and_mutated_leave_the_daemon_alive(hostile: Hostile, seed: int) -> None:
    dice = random.Random(seed)
    right = hostile.copies().frame()
    header_bytes = 16
    for _ in range(300):
        request = bytearray(right)
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(header_bytes, len(request))
            request[place] = dice.choice([0, 1, 4, 0x7F, 0xFF, dice.randrange(256)])
        with connected(hostile.daemon) as peer:
            peer.sendall(frame(hostile._hello))
            assert receive(peer) is not None
            peer.sendall(request)
            peer.shutdown(socket.SHUT_WR)
            receive(peer)
    assert reply_kind(hostile.ask(hostile.copies())) == COPIED
