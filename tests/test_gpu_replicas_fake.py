"""Replicas in GPU memory without a GPU: the driver of fake_cuda.cc in the daemon and in its clients."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, safetensors_bytes
from fake_gpu import MIB, WEIGHTS, Gpu, counts, needs_no_driver
from processes import until

pytestmark = needs_no_driver
library, gpu, start, path = fake_gpu.library, fake_gpu.gpu, fake_gpu.start, fake_gpu.path
slow = fake_gpu.slow

DEVICES = ["GPU-66616b65-3000-0000-0000-000000000000", "GPU-66616b65-3100-0000-0000-000000000000"]


def content(tensor: Any) -> np.ndarray:
    """What the GPU memory of a tensor holds."""
    told = tensor.__cuda_array_interface__
    dtype = np.dtype(told["typestr"])
    extents = zip(told["shape"], told["strides"] or ())
    size = int(np.prod(told["shape"])) * dtype.itemsize
    if told["strides"]:
        size = dtype.itemsize + sum((extent - 1) * stride for extent, stride in extents)
    memory = (ctypes.c_char * max(size, 1)).from_address(told["data"][0])
    return np.ndarray(told["shape"], dtype, memory, 0, told["strides"]).copy()


def check_all(model: tensord.Model, weights: dict[str, np.ndarray] = WEIGHTS) -> None:
    for name, tensor in weights.items():
        got = model[name]
        assert got.__cuda_array_interface__["data"][0] % 256 == 0
        assert np.array_equal(content(got), tensor), name


def replicas(daemon: Daemon) -> dict[str | None, dict[str, Any]]:
    """By device; None is the host."""
    return {replica["device"]: replica for replica in daemon.ask("ls")["replicas"]}


# ---- opening ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:0", 1, DEVICES[1], "cuda"])
def test_tensors_lie_in_gpu_memory(start: Callable[..., Daemon], gpu: Gpu, path: Path, device: Any) -> None:
    daemon = start()
    with tensord.open(path, "np", device=device) as model:
        check_all(model)
        model.wait()
        assert model.info()["on_device"] and model.info()["artifact"]
        there = DEVICES[1] if device in (1, DEVICES[1]) else DEVICES[0]
        model.wait()
        listed = replicas(daemon)
        assert listed.keys() == {None, there}
        assert listed[there]["artifact"] == listed[None]["artifact"] == model.info()["artifact"]
        assert listed[there]["leases"][0]["pid"] == os.getpid() and listed[None]["leases"] == []
        assert listed[there]["memory_bytes"] % (2 * MIB) == 0
        assert daemon.ask("status")["gpus"] == {there: listed[there]["memory_bytes"]}


CLIENT = """
    import json, sys
    library, tests, path, device = sys.argv[1:]
    sys.path[:0] = [tests]
    from fake_gpu import Gpu
    from pathlib import Path
    gpu = Gpu(Path(library))
    import tensord
    from test_gpu_replicas_fake import check_all
    model = tensord.open(path, "np", device=device)
    check_all(model)
    print(json.dumps(model.info()), flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


class Client:
    """Another process that has a model open on a device, and found its bytes right."""

    def __init__(self, library: Path, path: Path, device: str = "cuda:0") -> None:
        words = [library, str(Path(__file__).parent), path, device]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLIENT), *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.wait()
        self.info: dict[str, Any] = json.loads(line)

    def run(self, code: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def leave(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")


@pytest.mark.usefixtures("two_devices")
def test_a_second_process_reads_the_same_memory(
    start: Callable[..., Daemon], library: Path, path: Path
) -> None:
    daemon = start()
    first = Client(library, path)
    daemon.ask("evict", str(path))  # what is on the GPU needs nothing of the host
    loaded_bytes = daemon.ask("status")["loaded_bytes"]
    second = Client(library, path)
    assert first.info["replica"] == second.info["replica"]
    assert daemon.ask("status")["loaded_bytes"] == loaded_bytes
    listed = replicas(daemon)
    assert listed.keys() == {DEVICES[0]}
    pids = {lease["pid"] for lease in listed[DEVICES[0]]["leases"]}
    assert pids == {first.process.pid, second.process.pid}
    assert first.leave() == second.leave() == 0


@pytest.mark.usefixtures("two_devices")
def test_writes_are_refused(start: Callable[..., Daemon], library: Path, path: Path) -> None:
    start()
    victim, other = Client(library, path), Client(library, path)
    assert victim.process.stdin is not None
    address = 'model["matrix"].__cuda_array_interface__["data"][0]'
    victim.process.stdin.write(f"import ctypes; ctypes.memset({address}, 0, 1)\n")
    victim.process.stdin.flush()
    assert victim.process.wait(DEADLINE_SECONDS) == -signal.SIGSEGV
    other.run("check_all(model)")
    assert other.leave() == 0


@pytest.mark.usefixtures("two_devices")
def test_a_killed_client_lets_go(start: Callable[..., Daemon], library: Path, path: Path) -> None:
    daemon = start()
    client = Client(library, path)
    refused = daemon.run("evict", str(client.info["replica"]))
    assert refused.returncode != 0 and f"pid {client.process.pid}" in refused.stderr
    client.process.kill()
    client.process.wait()
    until(lambda: daemon.run("evict", str(client.info["replica"])).returncode == 0, "it is evicted")
    assert DEVICES[0] not in replicas(daemon)


def test_what_is_on_the_gpu_stays_when_the_gpu_is_given_back(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    daemon = start("--gpu-idle-seconds", "0")
    for _ in range(2):
        with tensord.open(path, "np", device="cuda:0") as model:
            check_all(model)
            model.wait()
        until(lambda: fake_gpu.holds_nothing(daemon), "the GPU is given back")
    assert len(replicas(daemon)) == 2


def test_a_selection_and_one_that_holds_more(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    daemon = start()
    with tensord.open(path, "np", only=["norm", "odd"], device="cuda:0") as part:
        check_all(part, {name: WEIGHTS[name] for name in ("norm", "odd")})
        assert part.keys() == ["norm", "odd"]
    with tensord.open(path, "np", device="cuda:0") as whole:
        check_all(whole)
        with tensord.open(path, "np", only="st*", device="cuda:0") as part:
            check_all(part, {"stack": WEIGHTS["stack"]})
            assert part.info()["replica"] == whole.info()["replica"]
    on_gpu = [replica for replica in daemon.ask("ls")["replicas"] if replica["device"]]
    assert [replica["only"] for replica in on_gpu] == [["norm", "odd"], None]


def test_views_are_strided(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    with tensord.open(path, "np", device="cuda:0") as model:
        view = model.view({"matrix": np.s_[10:20, 5:600:3], "stack": np.s_[3, :, 1]})
        assert np.array_equal(content(view["matrix"]), WEIGHTS["matrix"][10:20, 5:600:3])
        assert np.array_equal(content(view["stack"]), WEIGHTS["stack"][3, :, 1])


def test_a_checkpoint_without_bytes(
    start: Callable[..., Daemon], gpu: Gpu, make_file: Callable[..., Path]
) -> None:
    start()
    with tensord.open(make_file({"none": np.zeros((0, 8), np.float32)}), "np", device="cuda:0") as model:
        model.wait()
        assert model["none"].__cuda_array_interface__["shape"] == (0, 8)


def test_shards_and_odd_sizes(
    start: Callable[..., Daemon], gpu: Gpu, make_shards: Callable[..., Path]
) -> None:
    start()
    rng = np.random.default_rng(3)
    shards = [
        {f"s{shard}.t{at}": rng.integers(0, 255, 1 + at * 97, np.uint8) for at in range(40)}
        for shard in range(3)
    ]
    with tensord.open(make_shards(shards), "np", device="cuda:1") as model:
        for shard in shards:
            check_all(model, shard)


def test_a_forked_child_leaves_the_parents_memory_alone(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start()
    with tensord.open(path, "np", device="cuda:0") as model:
        model.wait()
        pid = os.fork()
        if pid == 0:
            del model
            gc.collect()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        check_all(model)


# ---- filling ---------------------------------------------------------------------------------------------


def test_tensors_come_while_the_rest_is_read(
    slow: tuple[fake_gpu.SlowDisk, Daemon, Path, np.ndarray], gpu: Gpu
) -> None:
    disk, daemon, path, whole = slow
    first, rest = np.split(whole, [4 * MIB])
    path.write_bytes(safetensors_bytes({"a": first, "b": rest}))
    with tensord.open(path, "np", device="cuda:0") as model:
        assert np.array_equal(content(model["a"]), first)
        with pytest.raises(tensord.WaitTimeoutError):
            model.wait(timeout=0.05)
        assert replicas(daemon)[DEVICES[0]]["state"] == "filling"
        assert 4 * MIB <= model.info()["ready_bytes"] < model.info()["total_bytes"]
        refused = daemon.run("evict", str(model.info()["replica"]))
        assert refused.returncode != 0
        disk.say("none")
        assert np.array_equal(content(model["b"]), rest)
        model.wait()
        assert model.info()["ready_bytes"] == model.info()["total_bytes"]


def test_a_file_that_changes_while_it_is_read(
    slow: tuple[fake_gpu.SlowDisk, Daemon, Path, np.ndarray], gpu: Gpu
) -> None:
    disk, daemon, path, whole = slow
    with tensord.open(path, "np", device="cuda:0") as model:
        until(lambda: model.info()["ready_bytes"] > 0, "the first bytes are there")
        os.truncate(path, path.stat().st_size - 1)
        disk.say("none")
        with pytest.raises(tensord.ChangedError):
            model.wait()
    path.write_bytes(safetensors_bytes({"w": whole}))
    with tensord.open(path, "np", device="cuda:0") as model:
        check_all(model, {"w": whole})
    until(lambda: len(replicas(daemon)) == 2, "what failed is forgotten")


def test_many_openers_at_once_share_one_copy(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    daemon = start()
    models = [tensord.open(path, "np", device=f"cuda:{at % 2}") for at in range(10)]
    for model in models:
        check_all(model)
        model.close()
    assert len(daemon.ask("ls")["replicas"]) == 3


# ---- from GPU to GPU -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [True, False])
def test_one_gpu_is_filled_from_another(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, monkeypatch: pytest.MonkeyPatch, reach: bool
) -> None:
    monkeypatch.setenv("FAKE_CUDA_PEERS", str(int(reach)))
    daemon = start(FAKE_CUDA_PEERS=int(reach))
    with tensord.open(path, "np", device="cuda:0") as low:
        low.wait()
        daemon.ask("evict", str(path))
        loaded_bytes = daemon.ask("status")["loaded_bytes"]
        with tensord.open(path, "np", device="cuda:1") as high:
            check_all(high)
            high.wait()
            told = daemon.ask("explain", str(high.info()["replica"]))
            again = daemon.ask("status")["loaded_bytes"] - loaded_bytes
            assert high.info()["artifact"] == low.info()["artifact"]
        if reach:
            assert told["read_path"] == f"{DEVICES[0]}, by peer copy" and again == 0
        else:
            assert told["read_path"] == "host memory, by copy engines" and again > 0
        assert told["state"] == "ready" and told["bytes"] == sum(one.nbytes for one in WEIGHTS.values())
        check_all(low)


def test_copies_out_of_gpu_memory(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    with tensord.open(path, "np", device="cuda:0") as model:
        for device in (0, 1):
            targets = [
                ("matrix", np.s_[:, 100:500], gpu.array((1000, 400), np.float32, device)),
                ("stack", ..., gpu.like(WEIGHTS["stack"], device=device, kind="vmm")),
                ("norm", np.s_[1:], gpu.array((1023,), np.float32, device)),
            ]
            report = model.load_into(targets)
            assert report.device_bytes == report.bytes
            for name, index, target in targets:
                assert np.array_equal(target.numpy(), WEIGHTS[name][index]), name


def test_copies_that_gpu_memory_cannot_take(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_PEERS", "0")
    start(FAKE_CUDA_PEERS=0)
    with tensord.open(path, "np", device="cuda:0") as model:
        with pytest.raises(tensord.UnsupportedError, match="lies in GPU memory, its target does not"):
            model.load_into({"norm": np.zeros_like(WEIGHTS["norm"])})
        far = gpu.like(WEIGHTS["norm"], device=1)
        with pytest.raises(tensord.UnsupportedError, match="cannot read the memory of"):
            model.load_into({"norm": far})
        assert fake_gpu.is_poisoned(far)
        with pytest.raises(tensord.Error, match="the model itself"):
            model.load_into({"norm": model["norm"]})


# ---- room ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(make_file: Callable[..., Path]) -> list[Path]:
    """Four checkpoints that take 4 MiB of a GPU each."""
    made = [np.random.default_rng(seed).integers(0, 255, 3 * MIB, np.uint8) for seed in range(4)]
    return [make_file({"w": one}, name=f"{at}.safetensors") for at, one in enumerate(made)]


def loaded(path: Path, device: str = "cuda:0") -> tensord.Model:
    model = tensord.open(path, "np", device=device)
    model.wait()
    return model


LIMITS: list[tuple[tuple[str, ...], dict[str, object], str]] = [
    (("--gpu-memory", "8MiB"), {}, "gpu_memory is 8.00 MiB and 8.00 MiB are in use"),
    ((), {"FAKE_CUDA_MEMORY_MIB": 8}, "the device has no room left"),
]


@pytest.mark.parametrize(("flags", "environment", "words"), LIMITS, ids=["limit", "device"])
def test_what_nobody_holds_goes_and_a_refusal_names_the_holders(
    start: Callable[..., Daemon],
    gpu: Gpu,
    files: list[Path],
    flags: tuple[str, ...],
    environment: dict[str, object],
    words: str,
) -> None:
    daemon = start(*flags, **environment)
    first = loaded(files[0])
    loaded(files[1]).close()
    third = loaded(files[2])  # in place of the second
    on_gpu = {one["path"]: one["replica"] for one in daemon.ask("ls")["replicas"] if one["device"]}
    assert on_gpu.keys() == {str(files[0]), str(files[2])}
    with pytest.raises(tensord.ExhaustedError) as caught:
        loaded(files[3])
    said = str(caught.value)
    assert f"open {files[3]} on {DEVICES[0]}: it needs 4.00 MiB" in said and words in said
    for at in (0, 2):
        assert f"replica {on_gpu[str(files[at])]} {files[at]} (4.00 MiB, leased by" in said
    assert f"pid {os.getpid()}" in said
    other = loaded(files[3], "cuda:1")  # each device has its own
    daemon.ask("pin", str(on_gpu[str(files[2])]))
    third.close()
    with pytest.raises(tensord.ExhaustedError, match="pinned"):
        loaded(files[3])
    first.close()
    fourth = loaded(files[3])
    assert np.array_equal(content(fourth["w"]), content(other["w"]))
    fourth.close()
    other.close()


def test_what_is_larger_than_host_memory_is_refused(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start("--host-memory", "4MiB")
    with pytest.raises(tensord.ExhaustedError, match="copied to a GPU from host memory"):
        tensord.open(path, "np", device="cuda:0")
    with tensord.open(path, "np", only="norm", device="cuda:0") as model:
        check_all(model, {"norm": WEIGHTS["norm"]})


# ---- what cannot be done ---------------------------------------------------------------------------------


def test_devices_that_do_not_exist(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start(FAKE_CUDA_DEVICES=1)
    for device in ("cuda:7", "gpu", "cuda:x"):
        with pytest.raises(tensord.InvalidArgumentError, match="is no GPU of this process; it has 2"):
            tensord.open(path, "np", device=device)
    for device in ("cuda:1", "GPU-00000000-0000-0000-0000-000000000000"):
        with pytest.raises(tensord.UnavailableError, match="the daemon does not see GPU-"):
            tensord.open(path, "np", device=device)
    with pytest.raises(tensord.InvalidArgumentError, match="kept whole"):
        tensord.open(path, "np", device="cuda:0", resident="view")


def test_a_daemon_that_uses_no_gpu(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start("--gpu", "off")
    with pytest.raises(tensord.UnavailableError, match="gpu is off"):
        tensord.open(path, "np", device="cuda:0")


def test_it_is_not_verified_there(start: Callable[..., Daemon], gpu: Gpu, path: Path) -> None:
    start()
    with (
        tensord.open(path, "np", device="cuda:0") as model,
        pytest.raises(tensord.UnsupportedError, match="what it was copied from was checked"),
    ):
        model.verify()


FAULTS = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuMemHostRegister_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyBatchAsync_v2",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuDeviceCanAccessPeer",
]


@pytest.mark.parametrize("from_call", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_driver_that_fails_in_the_daemon(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, name: str, from_call: int
) -> None:
    daemon = start("--gpu-idle-seconds", "0", FAKE_CUDA_FAIL=f"{name}=999@{from_call}")
    failed_count = 0
    for device in ("cuda:0", "cuda:1"):
        try:
            with tensord.open(path, "np", device=device) as model:
                model.wait()
                check_all(model)
                daemon.ask("evict", str(path))
        except tensord.Error as error:
            failed_count += 1
            unseen = name == "cuDeviceGetUuid_v2" and "does not see" in str(error)
            unread = name == "cuDeviceCanAccessPeer" and "cannot read the memory of" in str(error)
            assert "CUDA_ERROR_UNKNOWN" in str(error) or unseen or unread, error
        with tensord.open(path, "np") as model:
            assert all(np.array_equal(model[key], WEIGHTS[key]) for key in WEIGHTS)
    assert failed_count > 0 or from_call > 1 or name == "cuDeviceCanAccessPeer"
    until(lambda: fake_gpu.holds_nothing(daemon), "the GPU is given back")


@pytest.mark.parametrize(
    "fault",
    [
        *(
            "cuDeviceGetCount",
            "cuDeviceGetUuid_v2",
            "cuDevicePrimaryCtxRetain",
            "cuCtxGetCurrent",
            "cuCtxSetCurrent",
        ),
        *("cuMemAddressReserve", "cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"),
    ],
)
def test_a_driver_that_fails_in_the_client(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, fault: str
) -> None:
    daemon = start()
    gpu.driver.fake_cuda_fail(f"{fault}=999".encode())
    try:
        with pytest.raises(tensord.UnavailableError, match="CUDA_ERROR_UNKNOWN"):
            tensord.open(path, "np", device="cuda:0")
    finally:
        gpu.driver.fake_cuda_fail(b"")
    until(lambda: not any(one["leases"] for one in daemon.ask("ls")["replicas"]), "the lease has ended")
    with tensord.open(path, "np", device="cuda:0") as model:
        check_all(model)


# ---- the command line ------------------------------------------------------------------------------------


def test_the_command_line(start: Callable[..., Daemon], gpu: Gpu, path: Path, library: Path) -> None:
    daemon = start()
    done = daemon.run("load", str(path), "--device", DEVICES[0], "--wait", "--pin")
    assert done.returncode == 0 and DEVICES[0] in daemon.run("ls").stdout, done.stderr
    listed = replicas(daemon)[DEVICES[0]]
    assert listed["pinned"] and listed["state"] == "ready" and listed["leases"] == []
    assert f"{DEVICES[0]}: 10.00 MiB" in daemon.run("status").stdout
    told = daemon.run("explain", str(listed["replica"]))
    assert told.returncode == 0 and "host memory, by copy engines" in told.stdout, told.stdout + told.stderr
    with tensord.open(path, "np", device="cuda:0") as model:
        check_all(model)
    begin = time.monotonic()
    assert daemon.run("load", str(path), "--device", "cuda:9").returncode != 0
    assert time.monotonic() - begin < DEADLINE_SECONDS
    assert counts(daemon)["primaries"] <= 1
