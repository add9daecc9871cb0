"""How files are read: past the page cache or through it, with what the system allows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import Daemon, counted
from processes import on_disk_alone

SIZE_BYTES = 24 << 20

# Runs the daemon under a filter that refuses io_uring_setup, as containers do.
WITHOUT_IO_URING = """\
#!{python}
import ctypes, os, struct, sys
IO_URING_SETUP, EPERM = 425, 1
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
code = b"".join(struct.pack("HBBI", *line) for line in (
    (0x20, 0, 0, 0), (0x15, 0, 1, IO_URING_SETUP), (0x06, 0, 0, ERRNO | EPERM), (0x06, 0, 0, ALLOW)))
buffer = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
"""


@pytest.fixture
def weights(make_file: Callable[..., Path]) -> Iterator[tuple[Path, Any]]:
    array = counted((SIZE_BYTES,), "uint8")
    yield make_file({"w": array}), array


def load_report(daemon: Daemon, path: Path, array: Any) -> dict[str, Any]:
    with tensord.open(path, "np") as model:
        model.wait()
        assert np.array_equal(model["w"], array)
    report: dict[str, Any] = daemon.ask("explain", str(path))
    assert report["cached_bytes"] + report["direct_bytes"] + report["buffered_bytes"] == report["bytes"]
    return report


@pytest.mark.parametrize(
    ("way", "shown"), [("io_uring", "io_uring, O_DIRECT"), ("pread", "pread threads, O_DIRECT")]
)
def test_what_is_not_cached_is_read_past_the_page_cache(
    make_daemon: Callable[..., Daemon], weights: tuple[Path, Any], way: str, shown: str
) -> None:
    path, array = weights
    daemon = make_daemon("--disk-reads", way)
    report = load_report(daemon, on_disk_alone(path), array)
    assert report["read_path"] == shown
    assert report["direct_bytes"] >= 0.99 * SIZE_BYTES
    assert report["disk_bytes"] <= 1.02 * SIZE_BYTES


def test_what_is_cached_comes_from_the_page_cache(
    make_daemon: Callable[..., Daemon], weights: tuple[Path, Any]
) -> None:
    path, array = weights
    report = load_report(make_daemon(), path, array)
    assert report["cached_bytes"] == report["bytes"]
    assert report["disk_bytes"] == 0


def test_buffered_reads_go_through_the_page_cache_and_drop_leaves_nothing_there(
    make_daemon: Callable[..., Daemon], weights: tuple[Path, Any]
) -> None:
    path, array = weights
    daemon = make_daemon("--disk-reads", "buffered", "--cache", "drop")
    report = load_report(daemon, on_disk_alone(path), array)
    assert report["buffered_bytes"] > 0 and report["direct_bytes"] == 0
    assert any("buffered" in note for note in report["notes"])
    daemon.ask("evict", str(path))
    again = load_report(daemon, path, array)
    assert again["disk_bytes"] >= 0.9 * SIZE_BYTES, "nothing was left in the page cache"


def test_where_io_uring_is_refused_threads_read_and_explain_says_why(
    binary: Path, tmp_path: Path, make_daemon: Callable[..., Daemon], weights: tuple[Path, Any]
) -> None:
    path, array = weights
    filtered = tmp_path / "tensord"
    filtered.write_text(WITHOUT_IO_URING.format(python=sys.executable, binary=str(binary)))
    filtered.chmod(0o755)
    daemon = make_daemon(binary=filtered)
    report = load_report(daemon, on_disk_alone(path), array)
    assert report["read_path"] == "pread threads, O_DIRECT"
    assert report["direct_bytes"] >= 0.99 * SIZE_BYTES
    assert any("io_uring_setup: Operation not permitted" in note for note in report["notes"])


def test_pages_are_small_when_huge_ones_are_not_wanted(
    make_daemon: Callable[..., Daemon], weights: tuple[Path, Any]
) -> None:
    path, array = weights
    daemon = make_daemon("--huge-pages", "never")
    load_report(daemon, path, array)
    rollup = Path(f"/proc/{daemon.pid}/smaps_rollup").read_text()
    assert "ShmemPmdMapped:        0 kB" in rollup


def test_a_way_that_is_none_is_refused(binary: Path) -> None:
    said = subprocess.run([binary, "serve", "--disk-reads", "fast"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "'fast' is none of best, io_uring, pread, buffered" in said.stderr
