"""Copies into GPU memory by the daemon's copy engines, against torch's own. Skipped without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from safetensors.torch import save_file  # noqa: E402

pytestmark = pytest.mark.usefixtures("daemon")

SHAPES = {
    "embedding": (4096, 1024),
    "column": (3000, 2048),
    "norm": (1024,),
    "experts": (16, 96, 256),
    "odd": (37, 53),
    "scalar": (),
    "empty": (0, 8),
}


def random_tensor(shape: tuple[int, ...], dtype: Any = None) -> Any:
    return torch.randn(shape).to(dtype or torch.bfloat16)


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    torch.manual_seed(7)
    made = {name: random_tensor(shape) for name, shape in SHAPES.items()}
    made["wide"] = random_tensor((512, 512), torch.float32)
    return made


@pytest.fixture(scope="module")
def path(weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def model(path: Path, daemon: Any) -> Iterator[tensord.Model]:
    with tensord.open(path) as opened:
        opened.wait()
        yield opened


def poisoned(shape: Any, dtype: Any, device: str = "cuda:0") -> Any:
    """Memory in which every byte that stays unwritten shows."""
    return torch.full((*shape,), 113, dtype=dtype, device=device)


def check_equal(got: Any, wanted: Any) -> None:
    assert torch.equal(got.cpu().view(torch.uint8), wanted.contiguous().view(torch.uint8))


def test_whole_tensors(model: tensord.Model, weights: dict[str, Any]) -> None:
    targets = {name: poisoned(tensor.shape, tensor.dtype) for name, tensor in weights.items()}
    report = model.load_into(targets)
    for name, tensor in weights.items():
        check_equal(targets[name].reshape(-1), tensor.reshape(-1))
    # A scalar of 2 bytes is too short for a copy engine.
    assert report.device_bytes == report.bytes - 2 and report.staged_bytes == 2


SLICES = [
    ("embedding", np.s_[1000:3000]),
    ("embedding", np.s_[:, 128:640]),
    ("column", np.s_[7:2999, 1024:]),
    ("experts", np.s_[3:9]),
    ("experts", np.s_[:, 8:90, 64:128]),
    ("experts", np.s_[5]),
    ("embedding", np.s_[::3]),
    ("odd", np.s_[3:30, 5:50]),
    ("norm", np.s_[17:900]),
]


@pytest.mark.parametrize(("name", "index"), SLICES, ids=str)
def test_slices(model: tensord.Model, weights: dict[str, Any], name: str, index: Any) -> None:
    wanted = weights[name][index]
    target = poisoned(wanted.shape, wanted.dtype)
    report = model.load_into([(name, index, target)])
    check_equal(target, wanted)
    assert report.device_bytes == report.bytes == wanted.numel() * 2


def test_strided_targets_keep_their_gaps(model: tensord.Model, weights: dict[str, Any]) -> None:
    wanted = weights["embedding"][:, :512]
    whole = poisoned((4096, 1536), torch.bfloat16)
    report = model.load_into([("embedding", np.s_[:, :512], whole[:, 512:1024])])
    check_equal(whole[:, 512:1024].contiguous(), wanted)
    assert (whole[:, :512] == 113).all() and (whole[:, 1024:] == 113).all()
    assert report.device_bytes == report.bytes


def test_fused_parts_of_one_target_in_one_batch(model: tensord.Model, weights: dict[str, Any]) -> None:
    fused = poisoned((3000 + 4096, 512), torch.bfloat16)
    model.load_into(
        [("column", np.s_[:, 512:1024], fused[:3000]), ("embedding", np.s_[:, 256:768], fused[3000:])]
    )
    check_equal(fused, torch.cat([weights["column"][:, 512:1024], weights["embedding"][:, 256:768]]))


@pytest.mark.parametrize(
    ("name", "index", "make"),
    [
        ("wide", ..., lambda: poisoned((512, 512), torch.bfloat16)),
        ("embedding", ..., lambda: poisoned((1024, 4096), torch.bfloat16).t()),
        ("embedding", np.s_[:, ::2], lambda: poisoned((4096, 512), torch.bfloat16)),
    ],
    ids=["cast", "transposed", "every other element"],
)
def test_what_a_copy_engine_cannot_do_is_done_in_another_way(
    model: tensord.Model, weights: dict[str, Any], name: str, index: Any, make: Callable[[], Any]
) -> None:
    target = make()
    report = model.load_into([(name, index, target)], cast=True)
    check_equal(target.contiguous(), weights[name][index].to(target.dtype).contiguous())
    assert report.staged_bytes == report.bytes and "side by side" in report.slower_why


def test_while_the_replica_fills(tmp_path: Path) -> None:
    tensors = {f"layer.{at}": random_tensor((2048, 2048)) for at in range(40)}
    save_file(tensors, tmp_path / "big.safetensors")
    targets = {name: poisoned(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with tensord.open(tmp_path / "big.safetensors") as opened:
        report = opened.load_into(targets)
    for name, tensor in tensors.items():
        check_equal(targets[name], tensor)
    assert report.device_bytes == report.bytes


def test_many_small_tensors(tmp_path: Path) -> None:
    tensors = {f"t{at}": random_tensor((64 + at % 64,)) for at in range(20_000)}
    save_file(tensors, tmp_path / "small.safetensors")
    targets = {name: poisoned(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with tensord.open(tmp_path / "small.safetensors") as opened:
        report = opened.load_into(targets)
    for name, tensor in tensors.items():
        check_equal(targets[name], tensor)
    assert report.device_bytes == report.bytes


def test_what_was_begun_on_the_stream_is_over_before(model: tensord.Model, weights: dict[str, Any]) -> None:
    target = poisoned((4096, 1024), torch.bfloat16)
    torch.cuda._sleep(200_000_000)  # 0.1 s
    target.fill_(5)
    model.load_into({"embedding": target})
    check_equal(target, weights["embedding"])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        target.fill_(5)
    model.load_into({"embedding": target}, stream=stream)
    check_equal(target, weights["embedding"])


def test_tensors_that_want_gradients(model: tensord.Model, weights: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(poisoned((4096, 1024), torch.float32))
    model.load_into({"embedding": parameter}, cast=True)
    check_equal(parameter.detach(), weights["embedding"].float())


def test_safe_open_on_a_device(path: Path, weights: dict[str, Any]) -> None:
    with tensord.safe_open(path, framework="pt", device="cuda:0") as opened:
        for name, tensor in weights.items():
            got = opened.get_tensor(name)
            assert got.device == torch.device("cuda:0") and got.dtype == tensor.dtype
            check_equal(got.reshape(-1), tensor.reshape(-1))
        part = opened.get_slice("embedding")[:, 128:640]
        assert part.is_contiguous()
        check_equal(part, weights["embedding"][:, 128:640].contiguous())
        with pytest.raises(Exception, match="step must be greater than zero"):
            opened.get_slice("embedding")[::-1]
    loaded = tensord.torch.load_file(path, device="cuda:0")
    assert set(loaded) == set(weights)
    for name, tensor in weights.items():
        check_equal(loaded[name].reshape(-1), tensor.reshape(-1))


def test_arrays_of_other_libraries(model: tensord.Model, weights: dict[str, Any]) -> None:
    cupy = pytest.importorskip("cupy")
    target = cupy.full((512, 512), 113, dtype=cupy.float32)
    cupy.cuda.get_current_stream().synchronize()
    report = model.load_into({"wide": target})
    assert np.array_equal(cupy.asnumpy(target), weights["wide"].numpy())
    assert report.device_bytes == report.bytes == 512 * 512 * 4


CLIENT = """
    import sys, time, torch, tensord
    path, out = sys.argv[1:3]
    with tensord.open(path) as model:
        names = [name for name in model if model.entry(name).size_bytes > 16]
        for turn in range(int(sys.argv[3])):
            targets = {}
            for name in names:
                entry = model.entry(name)
                dtype = torch.float32 if entry.dtype_text == "F32" else torch.bfloat16
                targets[name] = torch.full(entry.shape, 113, dtype=dtype, device="cuda:0")
            report = model.load_into(targets)
            assert report.device_bytes == report.bytes, report
            print("turn", turn, flush=True)
    torch.save({name: tensor.cpu() for name, tensor in targets.items()}, out)
"""


def start_client(path: Path, out: Path, turns: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLIENT), path, out, str(turns)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("allocator", ["", "expandable_segments:True"])
def test_every_allocator_of_torch(
    path: Path, weights: dict[str, Any], tmp_path: Path, allocator: str
) -> None:
    client = start_client(path, tmp_path / "out", 2, PYTORCH_CUDA_ALLOC_CONF=allocator)
    assert client.wait(120) == 0
    for name, tensor in torch.load(tmp_path / "out").items():
        check_equal(tensor, weights[name])


def test_memory_of_a_pool_takes_the_slower_way(path: Path, weights: dict[str, Any]) -> None:
    program = """
        import sys, torch, tensord
        with tensord.open(sys.argv[1]) as model:
            target = torch.full((4096, 1024), 113, dtype=torch.bfloat16, device="cuda:0")
            report = model.load_into({"embedding": target})
            assert report.staged_bytes == report.bytes and "pool" in report.slower_why, report
            assert torch.equal(target.cpu(), model["embedding"])
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), path],
        env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        check=True,
        timeout=120,
    )


def test_clients_at_once_and_one_that_is_killed(path: Path, weights: dict[str, Any], tmp_path: Path) -> None:
    victim = start_client(path, tmp_path / "never", 1_000_000)
    others = [start_client(path, tmp_path / f"out{at}", 200) for at in range(3)]
    assert victim.stdout is not None
    for _ in range(20):
        victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for at, other in enumerate(others):
        assert other.wait(120) == 0
        for name, tensor in torch.load(tmp_path / f"out{at}").items():
            check_equal(tensor, weights[name])


def test_a_daemon_that_uses_no_gpu(path: Path, weights: dict[str, Any], make_daemon: Any) -> None:
    make_daemon("--gpu", "off")
    with tensord.open(path) as model:
        targets = {name: poisoned(tensor.shape, tensor.dtype) for name, tensor in weights.items()}
        report = model.load_into(targets)
    for name, tensor in weights.items():
        check_equal(targets[name].reshape(-1), tensor.reshape(-1))
    assert report.staged_bytes == report.bytes and "gpu is off" in report.slower_why


def test_a_gpu_is_given_back_when_it_is_idle(path: Path, make_daemon: Any) -> None:
    daemon = make_daemon("--gpu-idle-seconds", "1")
    target = poisoned((4096, 1024), torch.bfloat16)
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info(0)
    with tensord.open(path) as model:
        model.load_into({"embedding": target})
        free_during, _ = torch.cuda.mem_get_info(0)
        assert free_before - free_during < 700 << 20  # a bare hold on the device, and 64 MiB
        deadline = time.monotonic() + 30
        while torch.cuda.mem_get_info(0)[0] < free_before - (16 << 20):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "is given back" in daemon.log()
        target.fill_(5)
        model.load_into({"embedding": target})
        check_equal(target, model["embedding"])


def test_threads_of_one_process(path: Path) -> None:
    results: list[BaseException | None] = []
    with tensord.open(path) as model:
        wanted = model["embedding"]

        def load() -> None:
            try:
                for _ in range(20):
                    target = poisoned((4096, 1024), torch.bfloat16)
                    model.load_into({"embedding": target})
                    check_equal(target, wanted)
                results.append(None)
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [None] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_call(model: tensord.Model, weights: dict[str, Any]) -> None:
    low = poisoned((2048, 1024), torch.bfloat16, "cuda:0")
    high = poisoned((2048, 1024), torch.bfloat16, "cuda:1")
    report = model.load_into([("embedding", np.s_[:2048], low), ("embedding", np.s_[2048:], high)])
    check_equal(torch.cat([low.cpu(), high.cpu()]), weights["embedding"])
    assert report.device_bytes == report.bytes
