"""Memory that is true: what is counted are pages, as the kernel counts them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensord
from conftest import Daemon, counted
from processes import Worker, descriptor_count, is_sanitized, make_worker, sparse_file, status_kib, until

__all__ = ["make_worker"]

MIB = 1 << 20


def segment_bytes(pid: int) -> int:
    """Bytes of pages in the memfds that process `pid` holds, each counted once."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path).startswith("/memfd:tensord-segment"):  # noqa: PTH115
                status = os.stat(entry.path)  # noqa: PTH116
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


@contextlib.contextmanager
def sampled(pid: int) -> Iterator[list[int]]:
    """The list fills with `segment_bytes` for as long as the block runs."""
    samples: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.is_set():
            samples.append(segment_bytes(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def adapters(folder: Path, count: int, size_bytes: int) -> list[Path]:
    """Small checkpoints of zeros; their pages are touched all the same when they are read."""
    return [sparse_file(folder / f"{at}.safetensors", size_bytes) for at in range(count)]


def waiting_replica(daemon: Daemon) -> dict[str, object] | None:
    return next((one for one in daemon.ask("ls")["replicas"] if one["state"] == "waiting"), None)


# ---- the limit -------------------------------------------------------------------------------------------


def test_pages_never_exceed_the_limit(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--host-memory", "48MiB")
    sizes = [1, 3, 7, 12, 20, 31]
    paths = [sparse_file(tmp_path / f"{at}.safetensors", size * MIB) for at, size in enumerate(sizes)]
    problems: list[Exception] = []

    def client(first: int) -> None:
        try:
            for turn in range(12):
                with tensord.open(paths[(first + turn * 5) % len(paths)], "np") as model:
                    model.wait()
        except Exception as problem:
            problems.append(problem)

    with sampled(daemon.pid) as samples:
        threads = [threading.Thread(target=client, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(isinstance(problem, tensord.ExhaustedError) for problem in problems), problems
    assert len(samples) > 10
    assert 16 * MIB < max(samples) <= 48 * MIB


def test_many_small_artifacts_waste_little_and_evict_each_other(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB")
    paths = adapters(tmp_path, 300, 1_000_000)
    with sampled(daemon.pid) as samples:
        for path in paths:
            with tensord.open(path, "np") as model:
                model.wait()
    assert max(samples) <= 32 * MIB
    status = daemon.ask("status")
    assert status["replicas"] >= 0.95 * 32 * MIB / 1_000_000 - 1
    assert status["memory"]["in_use"] <= 1.05 * status["replicas"] * 1_000_000


def test_descriptors_are_room_too(make_daemon: Callable[..., Daemon], tmp_path: Path, binary: Path) -> None:
    few = tmp_path / "few"
    few.write_text(f'#!/bin/sh\nulimit -n 256\nexec {shlex.quote(str(binary))} "$@"\n')
    few.chmod(0o700)
    daemon = make_daemon("--host-memory", "1GiB")
    daemon.stop()
    daemon.binary = few
    daemon.start()
    for path in adapters(tmp_path, 150, 100_000):
        with tensord.open(path, "np") as model:
            model.wait()
    assert 20 < daemon.ask("status")["replicas"] < 64
    assert descriptor_count(daemon.pid) < 200
    assert "Too many" not in daemon.log()


def test_a_hundred_cycles_end_where_they_began(
    make_daemon: Callable[..., Daemon], tmp_path: Path, binary: Path
) -> None:
    daemon = make_daemon("--read-threads", "2", "--host-memory", "64MiB")
    paths = [sparse_file(tmp_path / f"{at}.safetensors", size * MIB) for at, size in enumerate((5, 21))]

    def cycle() -> None:
        for path in paths:
            with tensord.open(path, "np") as model:
                model.wait()

            def evicted(name: str = str(path)) -> bool:
                try:
                    tensord._library.call("evict", name)
                except tensord.UnavailableError:
                    return False
                except tensord.DeniedError:
                    return False
                return True

            until(evicted, f"{path} is evicted")

    def figures() -> dict[str, int]:
        until(lambda: daemon.ask("status")["connections"] == 1, "only the asking client is connected")
        until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) == descriptor_count(daemon.pid), "calm")  # noqa: PTH208
        return {
            "rss": status_kib(daemon.pid, "VmRSS"),
            "threads": status_kib(daemon.pid, "Threads"),
            "segments": segment_bytes(daemon.pid),
            "descriptors": descriptor_count(daemon.pid),
            "mappings": len(Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()),
        }

    for _ in range(20):
        cycle()
    before = figures()
    for _ in range(100):
        cycle()
    after = figures()
    for name in before:
        if name == "rss" and is_sanitized(binary):
            continue
        # A heap page or two, and the descriptor of a connection that is closing, are no growth.
        slack = {"rss": 1024, "descriptors": 2, "mappings": 3}.get(name, 0)
        assert abs(after[name] - before[name]) <= max(before[name] // 100, slack), (name, before, after)


# ---- waiting ---------------------------------------------------------------------------------------------


def test_an_open_waits_for_what_others_hold(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB", "--memory-wait-seconds", "200")
    first, second = adapters(tmp_path, 2, 20 * MIB)
    holder, asker = make_worker(daemon), make_worker(daemon)
    holder.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    asker.tell(f"m = tensord.open({str(second)!r}, 'np'); m.wait()")
    waiting = until(lambda: waiting_replica(daemon), "the second one waits")
    assert str(first) in str(waiting["waits_for"]) and f"pid {holder.pid}" in str(waiting["waits_for"])
    assert daemon.ask("status")["loads_waiting"] == 1
    assert "waits for" in daemon.run("ls").stdout and "1 waiting" in daemon.run("status").stdout
    holder.ask("m.close(); del m")
    assert asker.hear() == (True, None)
    phases = {phase["name"]: phase["ns"] for phase in daemon.ask("explain", str(second))["phases"]}
    assert phases["wait_for_memory"] > phases["index"]


def test_after_its_time_a_wait_is_refused(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB", "--memory-wait-seconds", "1")
    first, second = adapters(tmp_path, 2, 20 * MIB)
    holder = make_worker(daemon)
    holder.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    with pytest.raises(tensord.ExhaustedError, match=rf"pid {holder.pid}.*waited 1\.\d+ s"):
        tensord.open(second)
    assert daemon.ask("status")["loads_waiting"] == 0


def test_a_client_that_dies_while_it_waits_leaves_the_line(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB", "--memory-wait-seconds", "200")
    first, second = adapters(tmp_path, 2, 20 * MIB)
    small = sparse_file(tmp_path / "small.safetensors", MIB)
    holder, asker = make_worker(daemon), Worker(daemon.environment)
    holder.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    asker.tell(f"m = tensord.open({str(second)!r}, 'np')")
    until(lambda: waiting_replica(daemon), "the second one waits")
    asker.kill()
    with tensord.open(small, "np") as model:  # it stood behind the dead one
        model.wait()
    assert daemon.ask("status")["loads_waiting"] == 0
    assert [one["path"] for one in daemon.ask("ls")["replicas"]] == [str(first), str(small)]


# ---- faults ----------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_had_fails_one_open_and_no_later_one(
    make_daemon: Callable[..., Daemon], tmp_path: Path, make_file: Callable[..., Path], binary: Path
) -> None:
    if is_sanitized(binary):
        pytest.skip("a sanitizer needs all addresses")
    daemon = make_daemon("--host-memory", "4GiB")
    small = make_file({"w": counted((1000,))})
    large = sparse_file(tmp_path / "large.safetensors", 1 << 30)
    with tensord.open(small, "np") as model:
        model.wait()
        limit = status_kib(daemon.pid, "VmSize") * 1024 + 256 * MIB
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        descriptors = descriptor_count(daemon.pid)
        for _ in range(3):
            with pytest.raises(tensord.ExhaustedError, match="large"):
                tensord.open(large)
        assert (model["w"] == counted((1000,))).all()
        until(lambda: descriptor_count(daemon.pid) <= descriptors + 1, "nothing leaks")
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with tensord.open(large, "np") as again:
            again.wait()


# ---- page cache and containers ---------------------------------------------------------------------------


def resident_pages(path: Path) -> int:
    """Pages of a file that lie in the page cache, as mincore tells."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        view = (ctypes.c_char * size).from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages) == 0
        del view
        return sum(page & 1 for page in pages)


def test_the_page_cache_of_others_stays(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--host-memory", "512MiB")
    other = tmp_path / "other"
    with other.open("wb") as file:
        file.truncate(256 * MIB)
    other.read_bytes()
    before = resident_pages(other)
    if before < 256 * MIB // mmap.PAGESIZE:
        pytest.skip("this file system keeps no page cache of such a file")
    daemon.ask("load", str(sparse_file(tmp_path / "large.safetensors", 256 * MIB)), "--wait")
    assert resident_pages(other) >= 0.99 * before


@pytest.fixture
def make_contained(
    make_daemon: Callable[..., Daemon], binary: Path, tmp_path: Path
) -> Callable[..., tuple[Daemon, Path]]:
    """A daemon that sees a cgroup tree of the test's: ``daemon, memory_max = make(limit, "--flag", ...)``."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mounts of one's own here")

    def make(limit_bytes: int, *flags: str) -> tuple[Daemon, Path]:
        tree = tmp_path / "cgroup"
        tree.mkdir()
        memory_max = tree / "memory.max"
        memory_max.write_text(f"{limit_bytes}\n")
        inside = f"mount --bind {shlex.quote(str(tree))} /sys/fs/cgroup && exec {shlex.quote(str(binary))}"
        script = tmp_path / "contained"
        script.write_text(f'#!/bin/sh\nexec unshare -m sh -c {shlex.quote(inside + ' "$@"')} sh "$@"\n')
        script.chmod(0o700)
        daemon = make_daemon(*flags)
        daemon.stop()
        daemon.binary = script
        daemon.start()
        daemon.binary = binary
        return daemon, memory_max

    return make


def host_memory(daemon: Daemon) -> int:
    return int(daemon.ask("status")["limits"]["host_memory"])


def test_the_limit_of_a_container_is_followed(
    make_contained: Callable[..., tuple[Daemon, Path]], tmp_path: Path
) -> None:
    daemon, memory_max = make_contained(128 * MIB)
    assert host_memory(daemon) == 64 * MIB
    held, idle = adapters(tmp_path, 2, 20 * MIB)
    with tensord.open(held, "np") as model:
        model.wait()
        daemon.ask("load", str(idle), "--wait")
        memory_max.write_text(f"{32 * MIB}\n")
        until(lambda: host_memory(daemon) == 16 * MIB, "the lower limit is seen")
        assert [one["path"] for one in daemon.ask("ls")["replicas"]] == [str(held)]
        until(lambda: segment_bytes(daemon.pid) <= 21 * MIB, "what was evicted has left memory")
        assert daemon.log().count("host_memory is now") == 1
        assert "stay until they are let go" in daemon.log()
    until(lambda: daemon.ask("status")["replicas"] == 0, "it goes with its lease")
    until(lambda: segment_bytes(daemon.pid) <= 16 * MIB, "its memory is given back")


def test_more_than_the_container_has_is_clamped(make_contained: Callable[..., tuple[Daemon, Path]]) -> None:
    daemon, _ = make_contained(1024 * MIB, "--host-memory", "2GiB")
    assert host_memory(daemon) == 960 * MIB
    assert "host_memory 2.00 GiB" in daemon.log() and "1.00 GiB" in daemon.log()
