"""Why a load took as long as it did: its phases over one time axis, what limited it, what was possible. Pure.

::

    daemon     index  ##
               read     ==================
    python3 7  copy       ------------------##

Text, page, JSON and trace of ``tensord explain`` all show this one list of phases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Times are integers of nanoseconds, on the daemon's monotonic clock or on the axis of the explanation.
Facts = Mapping[str, Any]


class Phase(NamedTuple):
    """Begin and end are on the axis; what threads did in turn with other things is spread over all of it."""

    lane: str  # "daemon", or the client: "python3 7"
    name: str
    begin_ns: int
    end_ns: int
    thread_ns: int  # summed over the threads
    thread_count: int = 1
    bytes: int = 0

    @property
    def ns(self) -> int:
        """Of the wall clock."""
        return self.thread_ns // max(self.thread_count, 1)


class Limit(NamedTuple):
    """What may have held a load up."""

    name: str
    ns: int  # of the path
    advice: str


WORTH_NAMING_NS = 1_000_000

# What only the explanation is made of: it tells it better.
_RAW = frozenset(
    (
        "begin_ns",
        "fill_ns",
        "reopened_ns",
        "index_ns",
        "memory_ns",
        "touch_ns",
        "read_ns",
        "check_ns",
        "rates",
        "trace",
    )
)
_RAW_OF_USE = frozenset(("begin_ns", "map_begin_ns"))


def explain(facts: Facts) -> dict[str, Any]:
    """The document of ``tensord explain --json``, of the daemon's answer to `explain` (PROTOCOL.md has both)
    with ``rates`` added: what ``tensord doctor`` measured of this machine, or None.

    Raises
    ------
    LookupError, TypeError, ValueError
        It is no such answer.
    """
    uses = facts["uses"]
    uses_since = [use for use in uses if 0 < facts["reopened_ns"] <= use["map_begin_ns"]]
    is_resident = bool(uses_since)  # when it was opened last: only what clients did since then
    if is_resident:
        origin_ns, ready_ns = facts["reopened_ns"], 0
        phases = _client_phases(uses_since, origin_ns, ready_ns)
        moved_bytes = sum(phase.bytes for phase in phases if phase.name == "copy")
    else:
        origin_ns, ready_ns = facts["begin_ns"], facts["wall_ns"]
        phases = [*_load_phases(facts), *_client_phases(uses, origin_ns, ready_ns)]
        moved_bytes = facts["bytes"]
    span_ns = max([ready_ns, *(phase.end_ns for phase in phases)])
    moved_ns = span_ns if is_resident else ready_ns
    possible, possible_by = _possible(facts, is_resident, moved_bytes)
    limit = _limit(facts, is_resident, phases)
    trace = _named_spans(facts.get("trace", []), uses)
    return {
        **{name: value for name, value in facts.items() if name not in _RAW},
        "gb_per_s": _gb_per_s(facts["bytes"], facts["wall_ns"]),
        "served": "resident" if is_resident else "load",
        "origin_ns": origin_ns,
        "span_ns": span_ns,
        "phases": [_shown(phase) for phase in phases],
        "moved_bytes": moved_bytes,
        "moved_ns": moved_ns,
        "achieved_gb_per_s": _gb_per_s(moved_bytes, moved_ns),
        "possible_gb_per_s": possible / 1e9 if possible > 0 else None,
        "possible_by": possible_by,
        "rates_known": facts["rates"] is not None,
        "limited_by": limit.name,
        "advice": "The error says what to do." if facts["error"] is not None else limit.advice,
        "uses": [{name: value for name, value in use.items() if name not in _RAW_OF_USE} for use in uses],
        **({"trace": trace} if trace else {}),
    }


def _named_spans(rows: Iterable[Sequence[int]], uses: Sequence[Facts]) -> list[dict[str, Any]]:
    """Reads, checks and copies, one by one, of the daemon's rows (PROTOCOL.md)."""
    lanes = ["daemon read", "daemon read", *(f"{use['name']} {use['pid']} copy" for use in uses)]
    return [
        {
            "name": ("read", "check", "copy")[min(kind, 2)],
            "thread": f"{lanes[kind]} {thread}",
            "begin_ns": begin_ns,
            "end_ns": end_ns,
            "bytes": size_bytes,
            "block" if kind < 2 else "record": number,
        }
        for kind, thread, begin_ns, end_ns, size_bytes, number in rows
    ]


def _shown(phase: Phase) -> dict[str, Any]:
    return {
        "lane": phase.lane,
        "name": phase.name,
        "begin_ns": phase.begin_ns,
        "end_ns": phase.end_ns,
        "ns": phase.ns,
        "thread_ns": phase.thread_ns,
        "bytes": phase.bytes,
        "gb_per_s": _gb_per_s(phase.bytes, phase.ns),
    }


def _gb_per_s(size_bytes: int, ns: int) -> float:
    return size_bytes / ns if ns > 0 else 0.0


# ---- phases ------------------------------------------------------------------------------------------------


def _load_phases(facts: Facts) -> list[Phase]:
    """In the order of the path."""
    wall_ns, threads, count = facts["wall_ns"], facts["read_threads"], facts["bytes"]
    index_ns, memory_ns = facts["index_ns"], facts["memory_ns"]
    # When reading began; so far it only waits where that is 0.
    fill_ns = facts["fill_ns"] - facts["begin_ns"] if facts["fill_ns"] > 0 else wall_ns
    return [
        Phase("daemon", "index", 0, index_ns, index_ns),
        Phase("daemon", "wait_for_memory", fill_ns - memory_ns, fill_ns, memory_ns),
        Phase("daemon", "touch", fill_ns, wall_ns, facts["touch_ns"], threads),
        Phase("daemon", "read", fill_ns, wall_ns, facts["read_ns"], threads, count),
        Phase("daemon", "check", fill_ns, wall_ns, facts["check_ns"], threads, count),
    ]


def _client_phases(uses: Iterable[Facts], origin_ns: int, ready_ns: int) -> list[Phase]:
    """Client by client. `ready_ns`: every byte was there, on the axis."""
    lanes: dict[str, list[Facts]] = {}
    for use in uses:
        lanes.setdefault(f"{use['name']} {use['pid']}", []).append(use)
    return [phase for lane in sorted(lanes) for phase in _phases_of(lane, lanes[lane], origin_ns, ready_ns)]


def _phases_of(lane: str, uses: list[Facts], origin_ns: int, ready_ns: int) -> list[Phase]:
    """What one process did with the replica, all its calls together."""
    first = uses[0]  # the mapping is told again with every use of it
    map_ns = first["map_begin_ns"] - origin_ns
    mapped_ns = map_ns + first["map_ns"]
    there_ns = max(ready_ns, mapped_ns)

    begin_ns = [use["begin_ns"] - origin_ns for use in uses]
    copy_begin_ns = [begin + use["plan_ns"] for begin, use in zip(begin_ns, uses)]
    end_ns = [begin + use["copy_ns"] for begin, use in zip(copy_begin_ns, uses)]
    threads = [max(use["thread_count"], 1) for use in uses]
    thread_ns = sum(max(use["copy_ns"] * count - use["wait_ns"], 0) for use, count in zip(uses, threads))
    copied = min(copy_begin_ns), max(0, *end_ns)
    called_ns = sum(max(end - max(begin, there_ns), 0) for begin, end in zip(begin_ns, end_ns))
    idle_end_ns = max(there_ns, copied[1])
    return [
        Phase(lane, "map", map_ns, mapped_ns, first["map_ns"]),
        Phase(lane, "wait_for_client", there_ns, idle_end_ns, max(idle_end_ns - there_ns - called_ns, 0)),
        Phase(lane, "plan", min(begin_ns), max(0, *copy_begin_ns), sum(use["plan_ns"] for use in uses)),
        Phase(lane, "wait", *copied, sum(use["wait_ns"] for use in uses), max(threads)),
        Phase(lane, "copy", *copied, thread_ns, max(threads), sum(use["copy_bytes"] for use in uses)),
    ]


# ---- what was possible -------------------------------------------------------------------------------------


def _possible(facts: Facts, is_resident: bool, moved_bytes: int) -> tuple[float, str]:
    """Bytes a second by the rates of ``tensord doctor``, and which of them bounds it; 0 where one is missing.

    Disk and page cache are read at the same time.
    """
    rates = facts["rates"]
    if rates is None:
        return 0.0, ""

    def seconds(count: int, *ways: str) -> float:
        rate = max(rates.get(way, 0.0) for way in ways)
        return 0.0 if count == 0 else count / rate if rate > 0 else float("inf")

    cache_s = seconds(facts["cached_bytes"], "cache_pread", "cache_stream", "cache_mapped")
    disk_s = seconds(facts["direct_bytes"], "disk_direct") + seconds(facts["buffered_bytes"], "disk_buffered")
    copy_s = seconds(moved_bytes, "memcpy_all")
    least_s = copy_s if is_resident else max(disk_s, cache_s)
    if not 0 < least_s < float("inf"):
        return 0.0, ""
    by = "memory copy" if is_resident else "disk" if disk_s > cache_s else "page cache"
    return moved_bytes / least_s, by


# ---- what limited it ---------------------------------------------------------------------------------------


def _limit(facts: Facts, is_resident: bool, phases: list[Phase]) -> Limit:
    limits = [] if is_resident else _load_limits(facts, {phase.name: phase.ns for phase in phases})
    limits += _client_limits(phases)
    limits.append(Limit("none", WORTH_NAMING_NS, "It was over before anything could hold it up."))
    return max(limits, key=lambda limit: limit.ns)


def _load_limits(facts: Facts, ns_of: Mapping[str, int]) -> list[Limit]:
    """What the daemon waited for."""
    is_by_disk = facts["direct_bytes"] + facts["buffered_bytes"] > facts["cached_bytes"]
    # Threads that take from the page cache run all the time, unless something keeps them from it.
    idle_ns = facts["read_ns"] + facts["check_ns"] + facts["touch_ns"] - facts["cpu_ns"]
    stood_ns = 0 if is_by_disk else max(idle_ns, 0) // max(facts["read_threads"], 1)
    reading_ns = ns_of["read"] - stood_ns
    if is_by_disk:
        advice = "Keep it resident (`tensord pin`), or see what else reads from the disk."
    else:
        advice = "Keep it resident (`tensord pin`); more read_threads may help."
    return [
        Limit("index", ns_of["index"], "The headers took longest: many or small files, or a slow disk."),
        Limit(
            "waiting for memory",
            ns_of["wait_for_memory"],
            "Raise host_memory, or let go of what `tensord ls` lists.",
        ),
        Limit("fresh memory", ns_of["touch"], "`prefault` touches memory before loads need it."),
        Limit("hashing", ns_of["check"], "More read_threads or cores would help."),
        Limit("disk" if is_by_disk else "page cache", reading_ns, advice),
        Limit("lock", stood_ns, "The read threads stood still: other loads or programs had the cores."),
    ]


def _client_limits(phases: list[Phase]) -> list[Limit]:
    """What came after every byte was there, by the client that ended last."""
    idles = [phase for phase in phases if phase.name == "wait_for_client"]
    if not idles:
        return []
    last = max(idles, key=lambda phase: phase.end_ns)
    copy_ns = last.end_ns - last.begin_ns - last.ns
    return [
        Limit("waiting for the client", last.ns, "The bytes were there before it asked for them."),
        Limit("memory copy", copy_ns, "Use the tensors where they are (zero copy), or more threads."),
    ]
