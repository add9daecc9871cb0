"""Memory that is true: what is counted are pages, as the kernel counts them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensord
from conftest import Daemon, counted, is_sanitized
from processes import (
    Worker,
    descriptor_count,
    make_worker,
    sparse_file,
    status_kib,
    stopped,
    until,
)

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
def sampled(daemon: Daemon, measure: Callable[[], int]) -> Iterator[list[int]]:
    """The list fills with what is measured, the daemon stopped, for as long as the block runs."""
    samples: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.is_set():
            with stopped(daemon):
                samples.append(measure())
            time.sleep(0.005)

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


def load(path: Path) -> str:
    """The number of the replica."""
    with tensord.open(path, "np") as model:
        model.wait()
        return str(model.info()["replica"])


def replicas(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.ask("ls")["replicas"])


def waiting(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.ask("status")["waiting"])


# ---- the limit -------------------------------------------------------------------------------------------

CHURN_LIMIT = 48 * MIB
CHURN_FLAGS = ("--host-memory", "48MiB", "--prefault", "32MiB", "--memory-wait-seconds", "200")


def churn(
    daemon: Daemon, make_worker: Callable[..., Worker], folder: Path, measure: Callable[[], int]
) -> list[int]:
    """What is measured while three processes load, and wait for each other, and one of them streams."""
    sizes = [1, 3, 7, 12, 20, 31]
    paths = [str(sparse_file(folder / f"{at}.safetensors", size * MIB)) for at, size in enumerate(sizes)]
    large = str(sparse_file(folder / "large.safetensors", 20 * MIB))
    workers = [make_worker(daemon) for _ in range(3)]
    with sampled(daemon, measure) as samples:
        for at, worker in enumerate(workers):
            worker.tell(
                f"for turn in range(24):\n"
                f"    with tensord.open({paths}[({at} + turn * 5) % {len(paths)}], 'np') as model:\n"
                f"        model.wait()\n"
                f"    if {at} == 0 and turn % 4 == 0:\n"
                f"        with tensord.open({large!r}, 'np', resident='view') as model:\n"
                f"            model.load_into([('w', np.s_[:], np.empty(20 << 20, np.uint8))])\n"
            )
        answers = [worker.hear() for worker in workers]
    assert answers == [(True, None)] * 3, answers
    assert len(samples) > 10
    assert waiting(daemon) == []
    return samples


def test_pages_never_exceed_the_limit(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon(*CHURN_FLAGS)
    samples = churn(daemon, make_worker, tmp_path, lambda: segment_bytes(daemon.pid))
    assert 0.8 * CHURN_LIMIT < max(samples) <= CHURN_LIMIT
    # Of what it maps nothing else is large: weights are all that grows.
    assert status_kib(daemon.pid, "RssShmem") * 1024 <= CHURN_LIMIT + MIB


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own, of version 2 where there is one, else of version 1.

    Asked for before daemons, it goes after them.
    """
    roots = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
    for root in roots:
        controllers = root / "cgroup.subtree_control"
        if controllers.exists() and "memory" not in controllers.read_text().split():
            continue
        try:
            group = Path(tempfile.mkdtemp(prefix="tensord-test-", dir=root))
        except OSError:
            continue
        if (group / "memory.stat").exists():
            break
        group.rmdir()
    else:
        pytest.skip(f"no cgroup that counts memory can be made below {' or '.join(map(str, roots))}")
    yield group

    def removed() -> bool:
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    until(removed, f"{group} is empty and can go")


def test_the_cgroup_is_charged_no_more_than_the_limit(
    cgroup: Path, make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon(*CHURN_FLAGS, "--cache", "drop")
    daemon.stop()  # what it touches is charged to the group it was in
    with (daemon.log_path).open("ab") as log:
        daemon.process = subprocess.Popen(
            [
                "sh",
                "-c",
                f'echo $$ > {cgroup}/cgroup.procs; exec "$@"',
                "sh",
                daemon.binary,
                "serve",
                *CHURN_FLAGS,
            ],
            env={**os.environ, **daemon.environment},
            stderr=log,
        )
    until(daemon.listens, "it listens")

    def shared_memory() -> int:
        words = (cgroup / "memory.stat").read_text().split()
        return int(words[words.index("shmem") + 1])

    samples = churn(daemon, make_worker, tmp_path, shared_memory)
    # Fill maps and indexes are shared memory too. The kernel counts in batches of 64 pages a core.
    slack = MIB + (os.cpu_count() or 1) * 64 * mmap.PAGESIZE
    assert 0.8 * CHURN_LIMIT < max(samples) <= CHURN_LIMIT + slack


def test_many_small_artifacts_waste_little_and_evict_each_other(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB")
    for size in (10_000_000, 1_000_000, 100_000):
        load(sparse_file(tmp_path / f"of-{size}.safetensors", size))
        assert replicas(daemon)[-1]["memory_bytes"] <= 1.05 * size
    paths = adapters(tmp_path, 200, 1_000_000)
    most = 0
    for path in paths:
        load(path)
        most = max(most, segment_bytes(daemon.pid))
    assert most <= 32 * MIB
    status = daemon.ask("status")
    assert status["replicas"] >= 0.95 * 32 * MIB / 1_000_000
    assert status["memory"]["in_use"] <= 1.05 * status["replicas"] * 1_000_000


def test_descriptors_are_room_too(make_daemon: Callable[..., Daemon], tmp_path: Path, binary: Path) -> None:
    few = tmp_path / "few"
    few.write_text(f'#!/bin/sh\nulimit -n 256\nexec {shlex.quote(str(binary))} "$@"\n')
    few.chmod(0o700)
    daemon = make_daemon("--host-memory", "1GiB", binary=few)
    daemon.binary = binary
    for path in adapters(tmp_path, 120, 10_000):
        load(path)
    assert 20 < daemon.ask("status")["replicas"] < 64
    assert descriptor_count(daemon.pid) < 200
    assert "Too many" not in daemon.log()


def test_a_hundred_cycles_end_where_they_began(
    make_daemon: Callable[..., Daemon], tmp_path: Path, binary: Path
) -> None:
    daemon = make_daemon("--read-threads", "2", "--host-memory", "64MiB")
    paths = [sparse_file(tmp_path / f"{at}.safetensors", size * MIB) for at, size in enumerate((3, 21))]

    def cycle() -> None:
        for path in paths:
            replica = load(path)

            def evicted(number: str = replica) -> bool:
                with contextlib.suppress(tensord.UnavailableError, tensord.DeniedError):
                    tensord._library.call("evict", number)
                    return True
                return False

            until(evicted, f"{path} is evicted")

    def figures() -> dict[str, int]:
        until(lambda: daemon.ask("status")["connections"] == 1, "only the asking client is connected")
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
        if name in ("rss", "mappings") and is_sanitized(binary):
            continue
        # The descriptor of a connection that is closing and a mapping of the heap are no growth.
        slack = {"descriptors": 2, "mappings": 3}.get(name, 0)
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
    one = until(lambda: waiting(daemon), "the second one waits")[0]
    assert one["pid"] == asker.pid and one["path"] == str(second)
    assert str(first) in one["waits_for"] and f"pid {holder.pid}" in one["waits_for"]
    assert f"pid {asker.pid}" in daemon.run("status").stdout
    assert replicas(daemon)[-1]["state"] == "waiting" and "waiting" in daemon.run("ls").stdout
    assert daemon.ask("explain", str(second))["state"] == "waiting"
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
    with pytest.raises(tensord.ExhaustedError, match=rf"20\.50 MiB.*pid {holder.pid}.*waited 1\d{{3}} ms"):
        tensord.open(second)
    with pytest.raises(tensord.ExhaustedError, match=r"waited \d{1,3} ms"):
        tensord.open(second, memory_wait=0)
    assert waiting(daemon) == []


def test_ctrl_c_ends_a_wait(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB", "--memory-wait-seconds", "200")
    first, second = adapters(tmp_path, 2, 20 * MIB)
    holder, asker = make_worker(daemon), make_worker(daemon)
    holder.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    asker.tell(f"m = tensord.open({str(second)!r}, 'np')")
    until(lambda: waiting(daemon), "the second one waits")
    asker.process.send_signal(signal.SIGINT)
    assert asker.hear() == (False, "KeyboardInterrupt: ")
    until(lambda: waiting(daemon) == [], "it has left the line")
    holder.ask("m.close(); del m")
    asker.ask(f"m = tensord.open({str(second)!r}, 'np'); m.wait()")


def test_a_client_that_dies_while_it_waits_leaves_the_line(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "32MiB", "--memory-wait-seconds", "200")
    first = sparse_file(tmp_path / "first.safetensors", 20 * MIB)
    second = sparse_file(tmp_path / "second.safetensors", 28 * MIB)
    third = sparse_file(tmp_path / "third.safetensors", 8 * MIB)
    holder, asker, behind = make_worker(daemon), Worker(daemon.environment), make_worker(daemon)
    holder.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    asker.tell(f"m = tensord.open({str(second)!r}, 'np')")
    until(lambda: waiting(daemon), "the second one waits")
    behind.tell(f"m = tensord.open({str(third)!r}, 'np'); m.wait()")
    until(lambda: len(waiting(daemon)) == 2, "the third, for which there is no room beside the second, does")
    asker.kill()
    asker.leave()
    assert behind.hear() == (True, None)
    assert waiting(daemon) == []
    assert [one["path"] for one in replicas(daemon)] == [str(first), str(third)]


# ---- faults ----------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_had_fails_one_open_and_no_later_one(
    make_daemon: Callable[..., Daemon], tmp_path: Path, make_file: Callable[..., Path], binary: Path
) -> None:
    if is_sanitized(binary):
        pytest.skip("a sanitizer needs all addresses")
    daemon = make_daemon("--host-memory", "4GiB")
    small = make_file({"w": counted((1000,))})
    large = sparse_file(tmp_path / "large.safetensors", 256 * MIB)
    with tensord.open(small, "np") as model:
        model.wait()
        limit = status_kib(daemon.pid, "VmSize") * 1024 + 64 * MIB
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        descriptors = descriptor_count(daemon.pid)
        for _ in range(3):
            with pytest.raises(tensord.ExhaustedError, match=r"memory|addresses"):
                tensord.open(large)
        assert (model["w"] == counted((1000,))).all()
        until(lambda: descriptor_count(daemon.pid) <= descriptors + 1, "nothing leaks")
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        load(large)


# ---- page cache and containers ---------------------------------------------------------------------------


def cached_pages(path: Path) -> int:
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
        file.truncate(1024 * MIB)
    with other.open("rb") as file:
        while file.read(16 * MIB):
            pass
    before = cached_pages(other)
    if before < 1024 * MIB // mmap.PAGESIZE:
        pytest.skip("this file system keeps no page cache of such a file")
    load(sparse_file(tmp_path / "large.safetensors", 256 * MIB))
    assert daemon.ask("status")["replicas"] == 1
    assert cached_pages(other) >= 0.99 * before


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
        inside = (
            f'mount --bind {shlex.quote(str(tree))} /sys/fs/cgroup && exec {shlex.quote(str(binary))} "$@"'
        )
        script = tmp_path / "contained"
        script.write_text(f'#!/bin/sh\nexec unshare -m sh -c {shlex.quote(inside)} sh "$@"\n')
        script.chmod(0o700)
        daemon = make_daemon(*flags, binary=script)
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
        assert [one["path"] for one in replicas(daemon)] == [str(held)]
        until(lambda: segment_bytes(daemon.pid) <= 21 * MIB, "what was evicted has left memory")
        assert daemon.log().count("host_memory is now") == 1
        assert "stay until they are let go" in daemon.log()
    until(lambda: daemon.ask("status")["replicas"] == 0, "it goes with its lease")
    until(lambda: segment_bytes(daemon.pid) <= 16 * MIB, "its memory is given back")


def test_more_than_the_container_has_is_clamped(make_contained: Callable[..., tuple[Daemon, Path]]) -> None:
    daemon, _ = make_contained(1024 * MIB, "--host-memory", "2GiB")
    assert host_memory(daemon) == 960 * MIB
    assert "host_memory is now 960.00 MiB, it was 2.00 GiB" in daemon.log()
