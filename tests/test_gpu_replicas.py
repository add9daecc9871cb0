"""Replicas in GPU memory on a real GPU, through torch. Skipped without one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon
from processes import until

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from safetensors.torch import save_file  # noqa: E402
from test_keeper import Keeper, stored_count  # noqa: E402

MIB = 1 << 20
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    torch.manual_seed(11)
    shapes = {
        "matrix": ((4096, 1024), torch.bfloat16),
        "stack": ((16, 96, 256), torch.float16),
        "wide": ((512, 512), torch.float32),
        "odd": ((37, 53), torch.bfloat16),
        "scalar": ((), torch.float32),
        "empty": ((0, 8), torch.bfloat16),
        "small": ((16, 32), torch.float8_e4m3fn),
    }
    made = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    made["whole"] = torch.arange(1000)
    made["flags"] = torch.rand(77) < 0.5
    return made


@pytest.fixture(scope="module")
def path(weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(weights, path)
    return path


def big_file(path: Path, seed: int, mib: int = 256) -> Path:
    """A checkpoint of so many MiB in tensors of 32."""
    torch.manual_seed(seed)
    tensors = {
        f"t{at}": torch.randint(-(2**15), 2**15, (16 * MIB,), dtype=torch.int16) for at in range(mib // 32)
    }
    save_file(tensors, path)
    return path


def check_all(model: tensord.Model, weights: dict[str, Any], device: str = "cuda:0") -> None:
    for name, tensor in weights.items():
        got = model[name]
        assert got.device == torch.device(device) and got.dtype == tensor.dtype and got.shape == tensor.shape
        assert got.data_ptr() % 256 == 0
        wanted = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(got.reshape(-1).view(torch.uint8).cpu(), wanted), name


def on_gpus(daemon: Daemon) -> list[dict[str, Any]]:
    return [replica for replica in daemon.ask("ls")["replicas"] if replica["device"]]


CHECK = """
    import sys, time, torch, tensord
    torch.zeros(1, device="cuda:0")
    begin = time.perf_counter()
    model = tensord.open(sys.argv[1], device="cuda:0")
    first = model[model.keys()[0]]
    print("attached in", time.perf_counter() - begin, flush=True)
    host = tensord.open(sys.argv[1])
    for name in model:
        got, wanted = model[name], host[name]
        assert got.device.type == "cuda" and got.dtype == wanted.dtype
        got, wanted = (tensor.reshape(-1).view(torch.uint8) for tensor in (got, wanted))
        assert torch.equal(got.cpu(), wanted), name
    print("checked", flush=True)
"""


def start_client(path: Path, more: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHECK) + textwrap.dedent(more), path],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hear(client: subprocess.Popen[str], wanted: str) -> str:
    assert client.stdout is not None and client.stderr is not None
    for line in client.stdout:
        if line.startswith(wanted):
            return line
    pytest.fail(f"no {wanted!r} (status {client.wait()}):\n{client.stderr.read()}")


# ---- opening ---------------------------------------------------------------------------------------------


def test_tensors_lie_in_gpu_memory_and_can_be_computed_with(
    make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any]
) -> None:
    daemon = make_daemon()
    before = torch.cuda.memory_allocated(0)
    with tensord.open(path, device="cuda:0") as model:
        check_all(model, weights)
        matrix = model["matrix"]
        assert torch.cuda.memory_allocated(0) - before < MIB  # no copy
        x = torch.randn(8, 1024, device="cuda:0", dtype=torch.bfloat16)
        assert torch.equal(x @ matrix.t(), x @ weights["matrix"].cuda().t())
        part = model.view({"stack": slice(3, 9, 2)})["stack"]
        assert torch.equal(part.cpu(), weights["stack"][3:9:2])
    torch.cuda.synchronize()
    assert torch.equal(matrix.cpu(), weights["matrix"])  # longer than the model
    (replica,) = on_gpus(daemon)
    assert replica["leases"][0]["pid"] == os.getpid()
    with tensord.open(path, device=replica["device"]) as named:
        assert named.info()["replica"] == replica["replica"]
        check_all(named, weights)


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_other_processes_read_the_same_memory(
    make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any], allocator: str
) -> None:
    daemon = make_daemon()
    with tensord.open(path, device="cuda:0") as model:
        model.wait()
        client = start_client(path, PYTORCH_CUDA_ALLOC_CONF=allocator)
        hear(client, "checked")
        assert client.wait(DEADLINE_SECONDS) == 0
        check_all(model, weights)
    assert len(on_gpus(daemon)) == 1


def test_writes_are_refused(make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any]) -> None:
    make_daemon()
    with tensord.open(path, device="cuda:0") as model:
        model.wait()
        more = """
            try:
                model["matrix"].fill_(1)
                torch.cuda.synchronize()
                print("written")
            except RuntimeError as error:
                print("refused:", str(error).splitlines()[0], flush=True)
            import os
            os._exit(0)
        """
        client = start_client(path, more)
        hear(client, "refused")
        client.wait(DEADLINE_SECONDS)
        check_all(model, weights)


def test_tensors_come_while_the_rest_is_read(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    make_daemon()
    path = big_file(tmp_path / "big.safetensors", 1, 1024)
    with tensord.open(path, device="cuda:0") as model, tensord.open(path) as host:
        for name in host:
            assert torch.equal(model[name].cpu(), host[name])


def test_a_killed_client_lets_go(make_daemon: Callable[..., Daemon], path: Path) -> None:
    daemon = make_daemon()
    client = start_client(path, "time.sleep(1000)")
    hear(client, "checked")
    (replica,) = on_gpus(daemon)
    assert daemon.run("evict", str(replica["replica"])).returncode != 0
    client.send_signal(signal.SIGKILL)
    client.wait()
    until(lambda: daemon.run("evict", str(replica["replica"])).returncode == 0, "it is evicted")


def test_memory_outlives_the_hold_on_the_device_and_the_daemon(
    make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any]
) -> None:
    daemon = make_daemon("--gpu-idle-seconds", "1")
    with tensord.open(path, device="cuda:0") as model:
        model.wait()
        until(lambda: "is given back" in daemon.log(), "the GPU is given back")
        check_all(model, weights)
        client = start_client(path)
        hear(client, "checked")
        client.wait(DEADLINE_SECONDS)
        daemon.stop(signal.SIGKILL)
        check_all(model, weights)


def test_evicted_memory_is_free(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon()
    path = big_file(tmp_path / "big.safetensors", 2, 1024)
    with tensord.open(path, device="cuda:0") as model:
        model.wait()
        number = str(model.info()["replica"])
        torch.cuda.synchronize()
        during = torch.cuda.mem_get_info(0)[0]
    until(lambda: daemon.run("evict", number).returncode == 0, "it is evicted")
    until(lambda: torch.cuda.mem_get_info(0)[0] >= during + 1000 * MIB, "its memory is free")


# ---- copies ----------------------------------------------------------------------------------------------


def test_copies_out_of_gpu_memory(
    make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any]
) -> None:
    make_daemon()
    with tensord.open(path, device="cuda:0") as model:
        for at in range(min(torch.cuda.device_count(), 2)):
            target = torch.zeros((4096, 512), dtype=torch.bfloat16, device=f"cuda:{at}")
            report = model.load_into([("matrix", (slice(None), slice(256, 768)), target)])
            assert torch.equal(target.cpu(), weights["matrix"][:, 256:768])
            assert report.device_bytes + report.staged_bytes == target.numel() * 2
        on_cpu = torch.zeros_like(weights["matrix"])
        report = model.load_into({"matrix": on_cpu})
        assert torch.equal(on_cpu, weights["matrix"]) and report.staged_bytes == on_cpu.numel() * 2
        cast = torch.zeros((4096, 1024), dtype=torch.float32, device="cuda:0")
        model.load_into({"matrix": cast}, cast=True)
        assert torch.equal(cast.cpu(), weights["matrix"].float())


@two_gpus
def test_one_gpu_is_filled_from_another(
    make_daemon: Callable[..., Daemon], path: Path, weights: dict[str, Any]
) -> None:
    daemon = make_daemon()
    with tensord.open(path, device="cuda:0") as low:
        low.wait()
        loaded_bytes = daemon.ask("status")["loaded_bytes"]
        until(lambda: daemon.run("evict", str(path)).returncode == 0, "the host's is evicted")
        with tensord.open(path, device="cuda:1") as high:
            check_all(high, weights, "cuda:1")
            high.wait()
            told = daemon.ask("explain", str(high.info()["replica"]))
    if torch.cuda.can_device_access_peer(1, 0):
        assert told["read_path"].endswith(", by peer copy")
        assert daemon.ask("status")["loaded_bytes"] == loaded_bytes


# ---- room ------------------------------------------------------------------------------------------------


def test_a_limit(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--gpu-memory", "600MiB")
    paths = [big_file(tmp_path / f"{at}.safetensors", at) for at in range(3)]
    with tensord.open(paths[0], device="cuda:0") as first:
        first.wait()
        with tensord.open(paths[1], device="cuda:0") as second:
            second.wait()
            with pytest.raises(tensord.ExhaustedError, match=rf"leased by .* pid {os.getpid()}"):
                tensord.open(paths[2], device="cuda:0")
        del second
        with tensord.open(paths[2], device="cuda:0") as third:
            third.wait()
        assert {replica["path"] for replica in on_gpus(daemon)} == {str(paths[0]), str(paths[2])}


@pytest.fixture
def hog() -> Iterator[list[Any]]:
    held: list[Any] = []
    yield held
    held.clear()
    torch.cuda.empty_cache()


def test_a_device_that_is_full(make_daemon: Callable[..., Daemon], tmp_path: Path, hog: list[Any]) -> None:
    daemon = make_daemon("--gpu-idle-seconds", "600")
    small, idle, large = (
        big_file(tmp_path / f"{at}.safetensors", at, mib) for at, mib in enumerate((64, 512, 1024))
    )
    with tensord.open(small, device="cuda:0") as model:
        model.wait()
        tensord.open(idle, device="cuda:0").wait()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(0)[0]
        hog.append(torch.empty(free - 768 * MIB, dtype=torch.uint8, device="cuda:0"))
        with tensord.open(large, device="cuda:0") as last:  # in place of what nobody holds
            last.wait()
            assert {replica["path"] for replica in on_gpus(daemon)} == {str(small), str(large)}
            with pytest.raises(tensord.ExhaustedError, match="the device has no room left"):
                tensord.open(idle, device="cuda:0")
        begin = time.monotonic()
        hog.clear()
        torch.cuda.empty_cache()
        tensord.open(idle, device="cuda:0").wait()
        assert time.monotonic() - begin < DEADLINE_SECONDS


# ---- the keeper ------------------------------------------------------------------------------------------

SUMS = """
    import sys, time, torch, tensord
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model = tensord.open(sys.argv[1], device="cuda:0")
    model[next(iter(model))][0].item()
    print("attached in", time.perf_counter() - begin, flush=True)
    print("sums", [int(model[name].long().sum()) for name in model], flush=True)
"""


def test_gpu_memory_outlives_its_daemon(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """The daemon is killed and started; a third process attaches, and nothing is read again."""
    free = min(torch.cuda.mem_get_info(0)[0] - 2048 * MIB, shutil.disk_usage(tmp_path).free // 2) // MIB
    mib = int(min(8192, free // 32 * 32))
    path = big_file(tmp_path / "large.safetensors", 5, mib)
    daemon = make_daemon()
    keeper = Keeper(daemon)
    try:
        until(lambda: stored_count(daemon) > 0, "the daemon has told the keeper all")
        with tensord.open(path, device="cuda:0") as model:
            model.wait()
            sums = [int(model[name].long().sum()) for name in model]
            daemon.stop(signal.SIGKILL)
            begin = time.monotonic()
            daemon.start()
            started = time.monotonic() - begin
            words = [sys.executable, "-c", textwrap.dedent(SUMS), str(path)]
            third = subprocess.run(
                words, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
            )
            assert f"sums {sums}" in third.stdout, third.stdout + third.stderr
            print(
                f"{mib} MiB; the daemon listens again after {started:.3f} s; {third.stdout.splitlines()[0]} s"
            )
            assert daemon.ask("status")["loaded_bytes"] == 0
            assert [int(model[name].long().sum()) for name in model] == sums
            target = torch.empty_like(model["t0"])
            assert model.load_into({"t0": target}).device_bytes == target.numel() * 2
            assert torch.equal(target, model["t0"])
        # Out of host memory that was handed on, too, to a GPU: registered for reading alone.
        with tensord.open(path) as host:
            report = host.load_into({"t1": target})
            assert report.device_bytes == target.numel() * 2, report.slower_why
            assert torch.equal(target.cpu(), host["t1"])
    finally:
        keeper.stop()
