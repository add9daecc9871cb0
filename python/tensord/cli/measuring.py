"""Measures this machine for ``tensord doctor`` by the product itself: by what daemons report of loads of a
sample, and the client of copies.

::

    round    fresh memory of small pages | a daemon for each of WAYS
    daemon   load: fresh memory of huge pages | copies | load: page cache | load: disk
                                                each load recycles the memory of the one before

Rounds are made until there are enough or the time is up, and the median counts: a burst of somebody else's
work meets one run of each measurement then, and not all of one.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..client import Model
from ..client import open as open_model
from ..copies import Region
from ..errors import DeniedError, UnavailableError
from ..loading import Order, load
from ..tensors import U8
from . import daemon
from .output import os_error
from .sample import MIB, PAGE_BYTES, Sample, sample_of
from .scratch import removed_at_end, scratch_daemon

PRIVATE = "tensord-doctor-"  # folders of scratch daemons
ROUNDS_SECONDS = 14.0

# The sample in the page cache and in a daemon, the target of copies, fresh memory: at most half of
# host_memory.
MEMORY_SHARE = 8

TOUCH_BYTES = 4 * MIB

# How a daemon notes what it cannot have (serve.cc, fresh_pages.cc), and the one way of reading what is cached
# that it notes at all (file_source.cc).
BY_THREADS = "; O_DIRECT reads are done by threads"
HUGE_PAGES = "huge pages: "
MAPPED = "cached bytes come from a mapping of the file"


class Effort(NamedTuple):
    size_bytes: int = 256 * MIB  # of the sample; less where memory is short
    round_count: int = 5


ENOUGH = Effort()


class Way(NamedTuple):
    """How a daemon reads, and what is measured of it."""

    cached: str  # the rate of what is cached, and the fastest way by the machine.json of that daemon
    disk_reads: str  # its setting
    disk: str = ""  # the rate of what is not cached, if it is measured here
    disk_bytes: str = ""  # the bytes of a report that came so


# What was read through the page cache stays there for the ways behind, and for the next round.
WAYS = (
    Way("cache_mapped", "best", "disk_direct", "direct_bytes"),
    Way("cache_stream", "buffered", "disk_buffered", "buffered_bytes"),
    Way("cache_pread", "buffered"),
)

# Copies: threads (0: all), bytes of a row, and from row to row.
COPIES = {
    "memcpy_1": (1, MIB, MIB),
    "memcpy_all": (0, MIB, MIB),
    "gather_all": (0, 4 << 10, 8 << 10),
}


def measured(path: str, effort: Effort = ENOUGH) -> dict[str, Any]:
    """Takes 5 to 20 s.

    Parameters
    ----------
    path : str
        As of `sample_of`; empty: the state folder.

    Returns
    -------
    dict
        ``machine``, ``bytes_per_s`` (0: it cannot be had), ``problems`` (empty: none), ``memory_limit_bytes``
        (None: no limit), and ``machine_file``: where the first two are to be kept.

    Raises
    ------
    Error
        As `sample_of` and `scratch_daemon`; a load failed; or a folder cannot be made.
    """
    state_folder = Path(daemon.state_folder())
    try:
        state_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = tempfile.mkdtemp(prefix=PRIVATE, dir=_short_folder())
    except OSError as error:
        raise os_error(f"make folder {error.filename}", error) from None
    with removed_at_end(private) as folder, scratch_daemon(Path(folder) / "first") as status:
        share_bytes = status["limits"]["host_memory"] // MEMORY_SHARE
        with sample_of(path or str(state_folder), effort.size_bytes, share_bytes) as sample:
            bench = Bench(Path(folder), status["machine"], sample)
            bench.run(effort.round_count)
    return {
        "machine": status["machine"],
        "bytes_per_s": bench.rates(),
        "problems": bench.problems(),
        "memory_limit_bytes": status["memory_limit"],
        "machine_file": str(state_folder / "machine.json"),
    }


def _short_folder() -> str:
    """For a folder with daemons in it, whose sockets have names of 107 bytes at most."""
    folder = tempfile.gettempdir()
    longest = f"{folder}/{PRIVATE}XXXXXXXX/{max((way.cached for way in WAYS), key=len)}/run/socket"
    return folder if len(os.fsencode(longest)) <= daemon.SOCKET_PATH_MAX else "/tmp"


class Bench:
    """Runs of all measurements: bytes a second, 0 where it cannot be had."""

    def __init__(self, folder: Path, machine: str, sample: Sample) -> None:
        self._folder = folder
        self._machine = machine
        self._sample = sample
        self._target = np.ones(sample.size_bytes, np.uint8)
        self._runs: dict[str, list[float]] = defaultdict(list)
        self._notes: set[str] = set()

    def rates(self) -> dict[str, float]:
        """The medians."""
        rates = {name: sorted(runs)[len(runs) // 2] for name, runs in self._runs.items()}
        if MAPPED not in self._notes:  # the CPU has no streaming stores, which both ways are made of
            rates["cache_mapped"] = rates["cache_stream"] = 0.0
        return rates

    def problems(self) -> dict[str, str]:
        """Why something that daemons make use of cannot be had. Without memfds no load would have ended."""
        without_ring = (note.partition(BY_THREADS) for note in self._notes)
        return {
            "io_uring": next((problem for problem, found, _ in without_ring if found), ""),
            "memfd": "",
            "huge_pages": next(filter(_tells_of_huge_pages, self._notes), ""),
        }

    def run(self, round_count: int) -> None:
        begin = time.monotonic()
        for _ in range(round_count):
            round_begin = time.monotonic()
            self._runs["fresh_4k"].append(_touch_rate(self._sample.size_bytes))
            for way in WAYS:
                self._read_and_copy(way)
            end = time.monotonic()
            if end - begin + (end - round_begin) > ROUNDS_SECONDS:
                return

    def _read_and_copy(self, way: Way) -> None:
        folder = self._folder / way.cached
        state = folder / "state"
        state.mkdir(parents=True, exist_ok=True)
        (state / "machine.json").write_text(
            json.dumps({"machine": self._machine, "fastest_cached": way.cached})
        )
        with scratch_daemon(folder, "--disk-reads", way.disk_reads):
            with self._loaded() as (model, report):
                self._runs["fresh_huge"].append(_huge_page_rate(report))
                self._copy(model)
            with self._loaded() as (_, report):
                self._runs[way.cached].append(_read_rate(report, "cached_bytes"))
            if not way.disk:
                return
            self._sample.drop()
            with self._loaded() as (_, report):
                self._runs[way.disk].append(_read_rate(report, way.disk_bytes))

    @contextmanager
    def _loaded(self) -> Iterator[tuple[Model, Mapping[str, Any]]]:
        """The sample in memory, and the daemon's report of it; behind the block its memory is free again."""
        with open_model(self._sample.path, "np", only=self._sample.names, autostart=False) as model:
            model.wait()
            replica = str(model.info()["replica"])
            report = json.loads(daemon.ask("explain", replica))
            self._notes.update(report["notes"])
            yield model, report
        _evict(replica)

    def _copy(self, model: Model) -> None:
        self._copy_rate(model, 0, MIB, MIB)  # maps the pages
        for name, (thread_count, row_bytes, pitch_bytes) in COPIES.items():
            self._runs[name].append(self._copy_rate(model, thread_count, row_bytes, pitch_bytes))

    def _copy_rate(self, model: Model, thread_count: int, row_bytes: int, pitch_bytes: int) -> float:
        orders: list[Order] = []
        at = 0
        for name in self._sample.names:
            entry = model.entry(name)
            size_bytes = entry.size_bytes // pitch_bytes * row_bytes
            rows = self._target[at : at + size_bytes].reshape(-1, row_bytes)
            orders.append((entry, Region(U8, 0, (pitch_bytes, 1)), rows))
            at += size_bytes
        return load(model, orders, cast=False, threads=thread_count).bytes_per_second


def _evict(replica: str) -> None:
    """Once the daemon knows that it was let go."""
    deadline = time.monotonic() + 5
    while True:
        try:
            daemon.ask("evict", replica)
        except (DeniedError, UnavailableError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
        else:
            return


def _read_rate(report: Mapping[str, Any], counted: str) -> float:
    """Of reading and hashing; 0 where most bytes came in another way than `counted`."""
    count = sum(report[way] for way in ("cached_bytes", "direct_bytes", "buffered_bytes"))
    fill_ns = report["begin_ns"] + report["wall_ns"] - report["fill_ns"]
    return float(report["bytes"] * 1e9 / max(fill_ns, 1)) if 2 * report[counted] > count else 0.0


def _huge_page_rate(report: Mapping[str, Any]) -> float:
    """As if all threads had done nothing but to give fresh memory its pages."""
    if any(map(_tells_of_huge_pages, report["notes"])):
        return 0.0
    return float(report["bytes"] * report["read_threads"] * 1e9 / max(report["touch_ns"], 1))


def _tells_of_huge_pages(note: str) -> bool:
    return note.startswith(HUGE_PAGES)


def _touch_rate(size_bytes: int) -> float:
    """Of fresh shared memory that gets pages of 4 KiB, as in a daemon without huge ones."""
    try:
        fd = os.memfd_create("tensord-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
            memory = np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)
        finally:
            os.close(fd)
    except OSError as error:
        raise os_error("make fresh memory", error) from None

    def touch(at: int) -> None:
        memory[at : at + TOUCH_BYTES : PAGE_BYTES] = 1

    begin = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in threads.map(touch, range(0, size_bytes, TOUCH_BYTES)):
            pass
    return size_bytes / (time.monotonic() - begin)
