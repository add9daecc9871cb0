"""Regions of bytes as sources: into CPU memory, and into GPU memory by the driver of fake_cuda.cc."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
import tensord
from conftest import Daemon
from fake_gpu import WEIGHTS, Gpu, is_poisoned, needs_no_driver
from tensord.copies import Region
from tensord.loading import load
from tensord.tensors import BF16, F32, U8

pytestmark = needs_no_driver

library, gpu, start, path = fake_gpu.library, fake_gpu.gpu, fake_gpu.start, fake_gpu.path

ROW = WEIGHTS["matrix"].strides[0]


def test_regions_go_to_gpu_memory_by_its_copy_engines(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start()
    matrix = WEIGHTS["matrix"]
    part, raw = gpu.array((300, 512), np.float32), gpu.array((2, 2048), np.uint8, device=1)
    on_host = np.zeros((512, 300), np.float32)
    with tensord.open(path, "np") as model:
        entry = model.entry("matrix")
        report = load(
            model,
            [
                (entry, Region(F32, 100 * ROW + 512, (ROW, 4)), part),
                (entry, Region(U8, 8192, (ROW, 1)), raw),
                (entry, Region(F32, 100 * ROW + 512, (4, ROW)), on_host),
            ],
            cast=False,
            threads=0,
        )
    assert np.array_equal(part.numpy(), matrix[100:400, 128:640])
    assert np.array_equal(on_host, matrix[100:400, 128:640].T)
    flat = matrix.view(np.uint8).reshape(-1)
    assert np.array_equal(raw.numpy(), np.stack([flat[8192:10240], flat[8192 + ROW : 10240 + ROW]]))
    assert report.device_bytes == 300 * 512 * 4 + 4096 and report.staged_bytes == 0


def test_a_region_that_leaves_its_tensor_writes_nothing(
    start: Callable[..., Daemon], gpu: Gpu, path: Path
) -> None:
    start()
    size = WEIGHTS["matrix"].nbytes
    on_device, on_host = gpu.array((4, 64), np.float32), np.full((4, 64), 9, np.float32)
    refused = [
        Region(F32, size - 3 * ROW - 252, (ROW, 4)),
        Region(F32, 0, (-ROW, 4)),
        Region(F32, 2**64 - 8, (ROW, 4)),
        Region(F32, 0, (2**62, 4)),
        Region(F32, 0, (2**62, -(2**62))),
    ]
    with tensord.open(path, "np") as model:
        entry = model.entry("matrix")
        for region in refused:
            for target in (on_device, on_host):
                good = np.zeros(1, np.uint8)
                with pytest.raises(tensord.InvalidArgumentError, match="leaves the tensor") as error:
                    orders = [(entry, Region(U8, 0, (1,)), good), (entry, region, target)]
                    load(model, orders, cast=False, threads=0)
                assert not error.value.target_dirty
        with pytest.raises(tensord.InvalidArgumentError, match="ask for a cast"):
            load(model, [(entry, Region(BF16, 0, (ROW, 2)), on_host)], cast=False, threads=0)
        with pytest.raises(tensord.InvalidArgumentError, match="region"):
            load(model, [(entry, Region(99, 0, (ROW, 2)), on_host)], cast=False, threads=0)
        with pytest.raises(tensord.UnsupportedError, match="no such cast"):
            load(model, [(entry, Region(2, 0, (ROW, 2)), on_host)], cast=True, threads=0)
        with pytest.raises(tensord.UnsupportedError, match="the slower way takes torch tensors alone"):
            load(model, [(entry, Region(F32, 0, (0, 0)), on_device)], cast=False, threads=0)
    assert is_poisoned(on_device) and (on_host == 9).all()


def test_regions_repeat_and_run_backward(start: Callable[..., Daemon], path: Path) -> None:
    start()
    matrix = WEIGHTS["matrix"]
    repeated, backward = np.zeros((5, 512), np.float32), np.zeros((4, 512), np.float32)
    halves, empty = np.zeros((2, 3), np.float32), np.zeros((0, 7), np.float32)
    with tensord.open(path, "np") as model:
        entry = model.entry("matrix")
        orders = [
            (entry, Region(F32, ROW, (0, 4)), repeated),
            (entry, Region(F32, 3 * ROW, (-ROW, 4)), backward),
            (entry, Region(BF16, 2, (ROW, 4)), halves),  # the upper halves of floats, cast back
            (entry, Region(F32, 1 << 60, (1, 1)), empty),
        ]
        load(model, orders, cast=True, threads=0)
    assert np.array_equal(repeated, np.broadcast_to(matrix[1, :512], (5, 512)))
    assert np.array_equal(backward, matrix[3::-1, :512])
    kept = (matrix[:2, :3].view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert np.array_equal(halves, kept)


def test_a_scalar_has_a_region_too(start: Callable[..., Daemon], path: Path) -> None:
    start()
    target = np.zeros((), np.float32)
    with tensord.open(path, "np") as model:
        load(model, [(model.entry("matrix"), Region(F32, ROW + 8, ()), target)], cast=False, threads=0)
    assert target == WEIGHTS["matrix"][1, 2]
