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
from conftest import DEADLINE_SECONDS, Daemon
from fake_gpu import MIB, WEIGHTS, Gpu, counts, needs_no_driver
from processes import until

pytestmark = needs_no_driver
library, gpu, start, path = fake_gpu.library, fake_gpu.gpu, fake_gpu.start, fake_gpu.path

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
def test_tensors_lie_in_gpu_memory(
    start: Callable[..., Daemon], gpu: Gpu, path: Path, device: Any
) -> None:
    daemon = start()
    with tensord.open(path, "np", device=device) as model:
        check_all(model)
        assert model.info()["on_device"] and model.info()["artifact"]
        there = DEVICES[1] if device in (1, DEVICES[1]) else DEVICES[0]
        model.wait()
        listed = replicas(daemon)
        assert listed.keys() == {None, there}
        assert listed[there]["artifact"] == listed[None]["artifact"] == model.info()["artifact"]
        assert listed[there]["leases"][0]["pid"] == os.getpid() and listed[None]["leases"] == []
        assert listed[there]["memory_bytes"] % (2 * MIB) == 0
        assert daemon.ask("status")["gpus"] == {there: listed[there]["memory_bytes"]}
