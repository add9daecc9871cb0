"""A disk that fails or stalls, and a file of 6 GiB: what clients see, and what goes on meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensord
from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted, is_sanitized
from processes import on_disk_alone, sparse_file, until

SIZE_BYTES = 48 << 20
FAULT_AT = 33 << 20


class Disk:
    """A daemon on a disk with one bad spot, and a checkpoint that lies on it."""

    def __init__(self, daemon: Daemon, control: Path, path: Path) -> None:
        self.daemon = daemon
        self.path = path
        self._control = control

    def fault(self, kind: str) -> None:
        """ "error", "stall", or "none"."""
        after = self._control.with_suffix(".new")
        after.write_text(f"{kind} {FAULT_AT}\n")
        after.rename(self._control)


@pytest.fixture(params=["buffered", "pread"])
def disk(
    request: pytest.FixtureRequest,
    faulty_binary: Callable[[Path], Path],
    tmp_path: Path,
    make_daemon: Callable[..., Daemon],
    make_file: Callable[..., Path],
) -> Disk:
    path = make_file({"w": counted((SIZE_BYTES,), "uint8")}).rename(tmp_path / "model.faulty.safetensors")
    on_disk_alone(path)
    control = tmp_path / "control"
    return Disk(
        make_daemon("--disk-reads", request.param, "--drain-seconds", "1", binary=faulty_binary(control)),
        control,
        path,
    )


def test_an_error_of_the_disk_names_the_place_and_other_loads_go_on(
    disk: Disk, make_file: Callable[..., Path]
) -> None:
    disk.fault("error")
    other = make_file({"v": counted((1 << 20,))})
    target = np.full(SIZE_BYTES, 7, np.uint8)
    with tensord.open(disk.path, "np") as model, tensord.open(other, "np") as healthy:
        with pytest.raises(tensord.UnavailableError, match=r"model\.faulty\.safetensors.*Input/output error"):
            model.load_into({"w": target})
        with pytest.raises(tensord.UnavailableError, match="Input/output error"):
            model["w"]
        assert np.array_equal(healthy["v"], counted((1 << 20,)))
    disk.fault("none")
    with tensord.open(disk.path, "np") as again:
        assert np.array_equal(again["w"], counted((SIZE_BYTES,), "uint8"))


def test_a_stalled_disk_is_told_can_be_left_and_goes_on(disk: Disk, make_file: Callable[..., Path]) -> None:
    disk.fault("stall")
    with tensord.open(disk.path, "np") as model:
        until(lambda: model.info()["ready_bytes"] > 0, "what lies before the bad spot is there")
        with pytest.raises(tensord.WaitTimeoutError, match=r"still being read \(.* of .* are there\)"):
            model.wait(timeout=0.2)
        watching = subprocess.Popen(
            [*COMMAND, "load", disk.path, "--wait", "--progress", "always"],
            env={**os.environ, **disk.daemon.environment},
            stderr=subprocess.PIPE,
        )
        assert watching.stderr is not None
        shown = bytearray()
        while b"nothing for 5 s" not in shown:
            more = os.read(watching.stderr.fileno(), 4096)
            assert more, shown
            shown += more
        watching.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert watching.wait(DEADLINE_SECONDS) == 130
        assert time.monotonic() - begin < 2
        watching.stderr.close()
        with tensord.open(make_file({"v": counted((1000,))}), "np") as healthy:
            assert np.array_equal(healthy["v"], counted((1000,)))
        disk.fault("none")
        assert np.array_equal(model["w"], counted((SIZE_BYTES,), "uint8"))


def test_a_load_from_a_stalled_disk_can_be_evicted(disk: Disk) -> None:
    disk.fault("stall")
    model = tensord.open(disk.path, "np")
    until(lambda: model.info()["ready_bytes"] > 0, "what lies before the bad spot is there")
    model.close()
    until(lambda: disk.daemon.run("evict", str(disk.path)).returncode == 0, "nobody holds it")
    disk.fault("none")
    with tensord.open(disk.path, "np") as again:
        assert np.array_equal(again["w"], counted((SIZE_BYTES,), "uint8"))


def test_a_stream_over_a_bad_spot_says_that_targets_are_dirty(
    disk: Disk,
) -> None:
    disk.fault("error")
    target = np.full(SIZE_BYTES, 7, np.uint8)
    with (
        tensord.open(disk.path, "np", resident="view") as model,
        pytest.raises(tensord.UnavailableError, match="Input/output error"),
    ):
        model.load_into({"w": target})


def test_a_daemon_ends_although_a_read_hangs(disk: Disk) -> None:
    disk.fault("stall")
    with tensord.open(disk.path, "np") as model:
        until(lambda: model.info()["ready_bytes"] > 0, "what lies before the bad spot is there")
        assert disk.daemon.stop() == 1
        assert "stopped while a read hangs" in disk.daemon.log()
        with pytest.raises(tensord.CancelledError, match="the daemon was stopped"):
            model.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system on a device of its own, and the file that is the device: where it is cut, reads fail."""
    device, folder = tmp_path / "device", tmp_path / "disk"
    folder.mkdir()
    with device.open("wb") as file:
        file.truncate(2 * SIZE_BYTES)
    made = subprocess.run(["mkfs.ext4", "-q", device], capture_output=True, text=True)
    if made.returncode == 0:
        made = subprocess.run(["mount", "-o", "loop", device, folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no disk of its own can be made: {made.stderr.strip()}")
    yield folder, device
    subprocess.run(["umount", folder], check=True)


READ_PATHS = {"io_uring": "io_uring", "pread": "pread", "buffered": "page cache"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts disks")
@pytest.mark.parametrize("reads", READ_PATHS)
def test_a_device_that_cannot_be_read_is_an_error(
    reads: str,
    small_disk: tuple[Path, Path],
    make_daemon: Callable[..., Daemon],
    make_file: Callable[..., Path],
) -> None:
    """The error of the block layer itself, by each way of reading."""
    folder, device = small_disk
    made = make_file({"w": counted((SIZE_BYTES,), "uint8")})
    path = on_disk_alone(Path(shutil.copy(made, folder / "model.safetensors")))
    os.truncate(device, FAULT_AT)
    daemon = make_daemon("--disk-reads", reads)
    with tensord.open(path, "np") as model, tensord.open(made, "np") as healthy:
        with pytest.raises(tensord.UnavailableError, match=r"model\.safetensors.*Input/output error"):
            model.wait()
        assert np.array_equal(healthy["w"], counted((SIZE_BYTES,), "uint8"))
    report = daemon.ask("explain", str(path))
    assert report["state"] == "failed"
    assert READ_PATHS[reads] in report["read_path"]


def test_six_gibibytes_of_holes_are_read_by_many_threads(
    binary: Path, make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """Offsets past 4 GiB, past the page cache where the file system allows it."""
    if is_sanitized(binary):
        pytest.skip("a sanitizer needs several times the memory")
    size_bytes = 6 << 30
    path = sparse_file(tmp_path / "holes.safetensors", size_bytes)
    marks = {0: b"begin", 5 << 30: b"beyond four gibibytes", size_bytes - 3: b"end"}
    begin_bytes = path.stat().st_size - size_bytes
    with path.open("r+b") as file:
        for offset, text in marks.items():
            file.seek(begin_bytes + offset)
            file.write(text)
    daemon = make_daemon("--host-memory", "7GiB", "--read-threads", "8")
    with tensord.open(path, "np") as model:
        weights = model["w"]
        for offset, text in marks.items():
            assert bytes(weights[offset : offset + len(text)]) == text
        for offset in range(1 << 20, size_bytes, 509 << 20):
            assert offset in marks or not weights[offset : offset + 4096].any()
        report = daemon.ask("explain", str(path))
        assert report["cached_bytes"] + report["direct_bytes"] + report["buffered_bytes"] == report["bytes"]
        assert report["direct_bytes"] > 0 or report["notes"]
