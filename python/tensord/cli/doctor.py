"""``tensord doctor``: what the figures of measuring.py are worth, and what the system allows."""

from __future__ import annotations

import json
import mmap
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import gpus
from .output import STDERR, Output, complain, document, os_error
from .table import Table, rate_text, size_text

GOOD, COULD_BE_BETTER, MISSING = "good", "could be better", "missing"

HUGE_PAGE_BYTES = 2 << 20
RATE_MAX = 1e14  # 100 TB/s: no memory is that fast


class Check(NamedTuple):
    """One line of what the doctor found."""

    name: str
    value: str
    verdict: str = GOOD
    advice: str = ""  # what to do; empty where it is good


class Measurement(NamedTuple):
    """What a rate means."""

    name: str
    meaning: str
    if_missing: str  # what to do where it cannot be had
    least: float = 0.0  # below it, it could be better: bytes a second, or times the rate `least_of`
    least_of: str = ""
    if_less: str = ""


_NO_DISK = "name a folder or a file on a disk: `tensord doctor /models`"
_NO_STORES = "this CPU has no AVX2; plain pread is used"

MEASUREMENTS = (
    Measurement("memcpy_1", "memory copy, 1 thread", ""),
    Measurement(
        *("memcpy_all", "memory copy, all cores", "", 1.3, "memcpy_1"),
        "the cores share one memory channel, or others use them",
    ),
    Measurement("gather_all", "gather, rows of 4 KiB", ""),
    Measurement(
        *("fresh_4k", "fresh memory, 4 KiB pages", "", 0.5, "memcpy_all"),
        "`prefault` touches memory before loads need it",
    ),
    Measurement("fresh_huge", "fresh memory, huge pages", "needs Linux 6.1; small ones are used"),
    Measurement("cache_pread", "page cache, pread and hash", _NO_DISK),
    Measurement("cache_stream", "page cache, streamed and hash", _NO_STORES),
    Measurement("cache_mapped", "page cache, mapped and hash", _NO_STORES),
    Measurement(
        *("disk_direct", "disk, O_DIRECT", "needs a disk with ext4 or xfs", 1e9, ""),
        "an NVMe disk reads 3 GB/s and more",
    ),
    Measurement("disk_buffered", "disk, through the page cache", _NO_DISK),
)


def judge(rates: Mapping[str, float]) -> list[Check]:
    """A line for each rate, bytes a second. Pure."""
    return [_verdict(one, rates) for one in MEASUREMENTS]


def _verdict(one: Measurement, rates: Mapping[str, float]) -> Check:
    rate = rates.get(one.name, 0.0)
    if rate == 0:
        return Check(one.meaning, "-", MISSING, one.if_missing)
    value = f"{rate_text(rate / 1e9)} GB/s"
    least = one.least * (rates.get(one.least_of, 0.0) if one.least_of else 1.0)
    if rate < least:
        return Check(one.meaning, value, COULD_BE_BETTER, one.if_less)
    return Check(one.meaning, value)


# ---- the system --------------------------------------------------------------------------------------------


def look_around(problems: Mapping[str, str], memory_limit_bytes: int | None) -> list[Check]:
    """What the system allows: huge pages, io_uring, limits. `problems` and the limit are measuring.py's."""
    return list(_facts(problems, memory_limit_bytes))


def _facts(problems: Mapping[str, str], memory_limit_bytes: int | None) -> Iterator[Check]:
    yield _tried(
        "io_uring",
        problems["io_uring"],
        "threads read; allow it in kernel.io_uring_disabled and seccomp (io_uring_setup, _enter, _register)",
    )
    yield _tried("memfd and its seals", problems["memfd"], "nothing can be shared: allow memfd_create")
    yield _tried("huge pages, MADV_COLLAPSE", problems["huge_pages"], "needs Linux 6.1 with huge pages")
    is_reserved = _has_reserved_pages()
    yield _check(
        "huge pages, MFD_HUGETLB",
        "works" if is_reserved else "none reserved",
        is_reserved or not problems["huge_pages"],
        "vm.nr_hugepages reserves some",
    )
    locked, files = _limit(resource.RLIMIT_MEMLOCK), _limit(resource.RLIMIT_NOFILE)
    yield _check(
        "RLIMIT_MEMLOCK",
        _limit_text(locked),
        locked is None or locked >= 64 << 20,
        "LimitMEMLOCK=infinity, for memory that GPUs copy from",
    )
    yield _check(
        "RLIMIT_NOFILE",
        "no limit" if files is None else str(files),
        files is None or files >= 16384,
        "LimitNOFILE=65536: a large model takes 1400",
    )
    yield Check("cgroup memory.max", _limit_text(memory_limit_bytes))
    yield Check("seccomp", "a filter" if _is_filtered() else "none")
    yield Check("/dev/shm", size_text(_file_system_bytes("/dev/shm")))


def _tried(name: str, problem: str, advice: str) -> Check:
    return Check(name, problem, MISSING, advice) if problem else Check(name, "works")


def _check(name: str, value: str, is_good: bool, advice: str) -> Check:
    return Check(name, value) if is_good else Check(name, value, COULD_BE_BETTER, advice)


def _has_reserved_pages() -> bool:
    try:
        fd = os.memfd_create("tensord-doctor", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError:
        return False
    try:
        os.ftruncate(fd, HUGE_PAGE_BYTES)
        mmap.mmap(fd, HUGE_PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ).close()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _limit(which: int) -> int | None:
    most = resource.getrlimit(which)[1]
    return None if most == resource.RLIM_INFINITY else most


def _limit_text(count: int | None) -> str:
    return "no limit" if count is None else size_text(count)


def _is_filtered() -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("Seccomp:") and line.endswith("2") for line in lines)


def _file_system_bytes(path: str) -> int:
    try:
        status = os.statvfs(path)
    except OSError:
        return 0
    return status.f_blocks * status.f_frsize


# ---- both --------------------------------------------------------------------------------------------------


def examine(path: str) -> Output:
    """Needs no daemon. `path`: a folder, whose disk is measured, or a file; empty: the state folder."""
    if os.isatty(STDERR):
        complain("measuring, this takes 5 to 20 s\n")
    from . import measuring

    report = measuring.measured(path)
    report["saved"] = keep(report)
    checks = judge(report["bytes_per_s"]) + look_around(report["problems"], report["memory_limit_bytes"])
    return told(report, checks + gpu_checks())


def gpu_checks() -> list[Check]:
    return [_check(one.name, one.value, not one.advice, one.advice) for one in gpus.findings()]


CACHED = (
    "cache_pread",
    "cache_stream",
    "cache_mapped",
)  # ways to read what is cached; the first is the plainest


def keep(report: Mapping[str, Any]) -> str:
    """Replaces the machine's file at once or not at all: `kept_rates` reads the rates, daemon/machine.cc what
    is fastest."""
    path = str(report["machine_file"])
    rates = {name: float(round(rate)) for name, rate in report["bytes_per_s"].items()}
    fastest = max(CACHED, key=lambda name: rates.get(name, 0.0))
    kept = {
        "bytes_per_s": rates,
        "fastest_cached": fastest if rates.get("cache_pread", 0.0) > 0 else "",
        "machine": report["machine"],
    }
    written = json.dumps(kept, indent=2, ensure_ascii=False)
    try:
        Path(f"{path}.part").write_text(f"{written}\n", encoding="utf-8", errors="replace")
        Path(f"{path}.part").replace(path)
    except OSError as error:
        raise os_error(f"write {path}", error) from None
    return path


def kept_rates(status: Mapping[str, Any]) -> dict[str, float] | None:
    """What `keep` kept in a daemon's state folder, of this machine; None where there is no such thing."""
    try:
        kept = json.loads(Path(status["state_dir"], "machine.json").read_text(encoding="utf-8"))
        rates = {str(name): float(rate) for name, rate in kept["bytes_per_s"].items()}
        usable = kept["machine"] == status["machine"] and all(
            0 <= rate <= RATE_MAX for rate in rates.values()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return rates if usable else None


def told(report: dict[str, Any], checks: list[Check]) -> Output:
    table = Table("what", ">value", "verdict", "what to do")
    for check in checks:
        table.add(*check)
    shown = {name: report[name] for name in ("machine", "bytes_per_s", "saved")}
    text = (
        f"{report['machine']}\n\n{table.text()}\n"
        f"rates in {report['saved']}, for `tensord explain`, and for daemons that start from now on\n"
    )
    return Output(document({**shown, "checks": [check._asdict() for check in checks]}), text)
