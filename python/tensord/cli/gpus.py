"""What `tensord doctor` says of GPUs: asked of the driver (libcuda) and of sysfs, without the daemon."""

from __future__ import annotations

import ctypes
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIBRARY = "libcuda.so.1"
FIRST_PID_NAMESPACE = Path("pid:[4026531836]")  # PROC_PID_INIT_INO: the machine's own
PIECE_BYTES = 16 << 20
PIECE_COUNT = 64  # 1 GiB: 20 ms at the speed of PCIe 5
STREAM_COUNT = 2

# CUdevice_attribute, cuda.h
_PCI_BUS, _PCI_DEVICE, _PCI_DOMAIN = 33, 34, 50
_HAS_VMM, _HAS_DESCRIPTORS, _READS_READ_ONLY = 102, 103, 113

_ALL_VISIBLE = "in containers: --gpus all, and no CUDA_VISIBLE_DEVICES for the daemon"
_NO_VMM = (
    "needs a newer driver, outside of WSL: nothing stays in GPU memory, and expandable segments are left out"
)


class Finding(NamedTuple):
    """One line. `advice` is empty where it is good."""

    name: str
    value: str
    advice: str = ""


class _Driver:
    """Functions of the driver by name; each answer but 0 is a RuntimeError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def call(self, name: str, *arguments: object) -> None:
        answer = getattr(self._library, name)(*arguments)
        if answer != 0:
            raise RuntimeError(f"{name} answers {answer}")

    def number(self, name: str, *arguments: object) -> int:
        """What a function writes to its first argument."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def has(self, attribute: int, device: int) -> bool:
        return self.number("cuDeviceGetAttribute", attribute, device) != 0


def findings() -> list[Finding]:
    """One line where no driver is, or it does not work."""
    try:
        driver = _Driver(ctypes.CDLL(LIBRARY))
    except OSError:
        return [Finding("GPUs", f"no driver ({LIBRARY})")]
    try:
        driver.call("cuInit", 0)
        count = driver.number("cuDeviceGetCount")
        version = driver.number("cuDriverGetVersion")
    except (RuntimeError, AttributeError) as error:
        return [Finding("GPUs", str(error), f"the driver sees no GPU; {_ALL_VISIBLE}")]
    found = [Finding("GPUs", f"{count}, CUDA {version // 1000}.{version % 1000 // 10}")]
    for device in range(count):
        try:
            found += _of_device(driver, device, count)
        except (RuntimeError, AttributeError) as error:
            found.append(Finding(f"GPU {device}", str(error), "nvidia-smi may say more"))
    found.append(_pid_namespace())
    return found


def _of_device(driver: _Driver, device: int, count: int) -> Iterator[Finding]:
    name = ctypes.create_string_buffer(96)
    driver.call("cuDeviceGetName", name, len(name), device)
    raw = (ctypes.c_ubyte * 16)()
    driver.call("cuDeviceGetUuid_v2", ctypes.byref(raw), device)
    label = f"GPU {device}"
    yield Finding(label, f"{name.value.decode(errors='replace')}, GPU-{uuid.UUID(bytes=bytes(raw))}")
    domain, bus, slot = (
        driver.number("cuDeviceGetAttribute", one, device) for one in (_PCI_DOMAIN, _PCI_BUS, _PCI_DEVICE)
    )
    yield _link(label, Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0"))
    has_vmm = driver.has(_HAS_VMM, device) and driver.has(_HAS_DESCRIPTORS, device)
    yield Finding(
        f"{label}, memory by descriptor", "works" if has_vmm else "missing", "" if has_vmm else _NO_VMM
    )
    reads = driver.has(_READS_READ_ONLY, device)
    yield Finding(
        f"{label}, read-only host memory",
        "works" if reads else "missing",
        "" if reads else "what a keeper handed on is copied to it without registration: slower",
    )
    peers = [
        str(other)
        for other in range(count)
        if other != device and driver.number("cuDeviceCanAccessPeer", device, other)
    ]
    if count > 1:
        yield Finding(
            f"{label}, reaches GPUs",
            ", ".join(peers) or "none",
            "" if peers else "copies between GPUs go over host memory",
        )
    yield Finding(f"{label}, host to device", f"{_rate(driver, device) / 1e9:.1f} GB/s, pinned")


def _link(label: str, folder: Path) -> Finding:
    def read(name: str) -> str:
        try:
            return (folder / name).read_text().strip()
        except OSError:
            return "?"

    speed, width = read("current_link_speed").replace(" PCIe", ""), read("current_link_width")
    most_speed, most_width = read("max_link_speed").replace(" PCIe", ""), read("max_link_width")
    node = read("numa_node")
    value = f"{speed} x{width} of {most_speed} x{most_width}, NUMA node {node}"
    # An idle link may run at a lower speed; its width does not change.
    is_narrow = width != most_width and width.isdigit()
    return Finding(
        f"{label}, PCIe", value, "fewer lanes than the card has: another slot" if is_narrow else ""
    )


def _pid_namespace() -> Finding:
    """CUDA IPC works between processes that see each other."""
    try:
        is_first = Path("/proc/self/ns/pid").readlink() == FIRST_PID_NAMESPACE
    except OSError:
        is_first = True
    if is_first:
        return Finding("GPU memory of clients", "one PID namespace")
    return Finding(
        "GPU memory of clients",
        "in a container",
        "daemon and clients need one PID namespace (--pid=container:...), or torch expandable_segments:True",
    )


def _rate(driver: _Driver, device: int) -> float:
    """Bytes a second out of pinned memory, copied as the daemon does. All that it takes is given back."""
    primary, host = ctypes.c_void_p(), ctypes.c_void_p()
    target = ctypes.c_uint64()
    streams = [ctypes.c_void_p() for _ in range(STREAM_COUNT)]
    size = PIECE_BYTES * STREAM_COUNT
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), device)
    try:
        driver.call("cuCtxSetCurrent", primary)
        driver.call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(size), 0)
        driver.call("cuMemAlloc_v2", ctypes.byref(target), ctypes.c_size_t(size))
        for stream in streams:
            driver.call("cuStreamCreate", ctypes.byref(stream), 1)
        begin = 0.0
        for piece in range(-STREAM_COUNT, PIECE_COUNT):  # the first ones are not counted
            if piece == 0:
                driver.call("cuCtxSynchronize")
                begin = time.perf_counter()
            at = piece % STREAM_COUNT
            offset = PIECE_BYTES * at
            where, source = (
                ctypes.c_uint64(target.value + offset),
                ctypes.c_void_p((host.value or 0) + offset),
            )
            driver.call("cuMemcpyHtoDAsync_v2", where, source, ctypes.c_size_t(PIECE_BYTES), streams[at])
        driver.call("cuCtxSynchronize")
        return PIECE_BYTES * PIECE_COUNT / (time.perf_counter() - begin)
    finally:
        for stream in filter(None, streams):
            driver.call("cuStreamDestroy_v2", stream)
        if target.value:
            driver.call("cuMemFree_v2", target)
        if host.value:
            driver.call("cuMemFreeHost", host)
        driver.call("cuDevicePrimaryCtxRelease_v2", device)
