"""Copies into GPU memory without a GPU: the driver of fake_cuda.cc in the daemon and in its clients."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, is_sanitized
from fake_gpu import MIB, POISON, WEIGHTS, Array, Gpu, counts, holds_nothing, is_poisoned, needs_no_driver
from processes import until

pytestmark = needs_no_driver
library, gpu, start, path = fake_gpu.library, fake_gpu.gpu, fake_gpu.start, fake_gpu.path


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
    daemon = start()
    on_host, on_device = np.zeros_like(WEIGHTS["matrix"]), gpu.like(WEIGHTS["stack"])
    with tensord.open(path, "np") as model:
        report = model.load_into({"matrix": on_host, "stack": on_device})
        uses = daemon.ask("explain", str(path))["uses"]
    assert np.array_equal(on_host, WEIGHTS["matrix"])
    assert np.array_equal(on_device.numpy(), WEIGHTS["stack"])
    assert report.device_bytes == WEIGHTS["stack"].nbytes < report.bytes
    assert sum(use["copy_bytes"] for use in uses) == report.bytes
    assert sum(use["device_bytes"] for use in uses) == report.device_bytes


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
        with pytest.raises(
            tensord.UnsupportedError, match="the slower way takes torch tensors alone"
        ) as caught:
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
    from fake_gpu import Gpu
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
