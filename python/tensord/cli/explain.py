"""Where the time of a load went: as text, as a page, and as a trace. Pure."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import NotFoundError
from .output import document
from .reports import Report, entries, fraction, number, read_report, size, tensors_of, text
from .table import Table, duration_text, rate_text

AXIS_WIDTH = 40
LANE_COUNT_MAX = 8
LANE_WIDTH = 40

_PAGE = Path(__file__).with_name("explain.html")


# ---- text --------------------------------------------------------------------------------------------------


def explain_text(report: str) -> str:
    """The phases of a load over one time axis, what limited it, and advice."""
    return read_report(report, _explained)


def _explained(report: Report) -> str:
    is_resident = report["served"] == "resident"
    state, load = text(report, "state"), number(report, "load")
    what = "resident; what clients copied since it was opened last" if is_resident else state
    out = f"{f'load {load}' if load else 'the load'} of {text(report, 'path')}: {what}\n"
    if number(report, "moved_bytes"):
        out += _rates(report)
    if state == "ready" and not is_resident:
        if report["checked_against"] == "recorded":
            out += "every byte is what it was at the first load\n"
        else:
            out += "the first load of these files: their digests were recorded\n"
    if report.get("only") is not None:
        out += f"only {tensors_of(report)} tensors: {', '.join(report['only'])}\n"
    out += "".join(f"{note}\n" for note in report["notes"])
    error = report["error"]
    if error is not None:
        out += f"error: {text(error, 'code')}: {text(error, 'message')}\n"
    return (
        f"{out}\n{_waterfall(report)}\nlimited by: {text(report, 'limited_by')}\n{text(report, 'advice')}\n"
    )


def _rates(report: Report) -> str:
    out = (
        f"{size(report, 'moved_bytes')} in {duration_text(number(report, 'moved_ns'))}, "
        f"{rate_text(fraction(report, 'achieved_gb_per_s'))} GB/s"
    )
    if report["possible_gb_per_s"] is not None:
        possible = rate_text(fraction(report, "possible_gb_per_s"))
        out += f", of {possible} GB/s that are possible here ({text(report, 'possible_by')})"
    out += "\n"
    if not report["rates_known"]:
        out += "what is possible here is not known: run `tensord doctor` once\n"
    if report["served"] == "resident":
        return out
    ways = (
        ("cached_bytes", "from the page cache"),
        ("direct_bytes", f"by {text(report, 'read_path')}"),
        ("buffered_bytes", "through the page cache"),
    )
    origins = [f"{size(report, name)} {how}" for name, how in ways if number(report, name) > 0]
    return f"{out}threads: {number(report, 'read_threads')}; {', '.join(origins)}\n"


def _waterfall(report: Report) -> str:
    span_ns = number(report, "span_ns")
    table = Table("phase", "0" + duration_text(span_ns).rjust(AXIS_WIDTH - 1), ">time", ">GB/s")
    lane, lane_count = "daemon", 0
    for phase in entries(report, "phases"):
        if number(phase, "thread_ns") <= 0:
            continue
        if phase["lane"] != lane:
            lane = text(phase, "lane")
            lane_count += 1
            if lane_count <= LANE_COUNT_MAX:
                table.add(lane[:LANE_WIDTH], "", "", "")
        if lane_count > LANE_COUNT_MAX:
            continue
        name = text(phase, "name").replace("_", " ")
        table.add(
            ("  " if lane_count else "") + name,
            _axis_bar(phase, span_ns),
            duration_text(number(phase, "ns")),
            rate_text(fraction(phase, "gb_per_s")) if number(phase, "bytes") else "",
        )
    if lane_count > LANE_COUNT_MAX:
        table.add(f"and {lane_count - LANE_COUNT_MAX} more clients", "", "", "")
    return table.text()


def _axis_bar(phase: Report, span_ns: int) -> str:
    """``   ======   ``: where on the axis, and by its character how busy the phase kept its threads there."""
    begin_ns, end_ns = number(phase, "begin_ns"), number(phase, "end_ns")

    def column(ns: int) -> int:
        return int(min(max(ns / max(span_ns, 1), 0.0), 1.0) * AXIS_WIDTH)

    busy = number(phase, "ns") / max(end_ns - begin_ns, 1)
    character = "#" if busy > 0.66 else "=" if busy > 0.33 else "-" if busy > 0.05 else "."
    begin = min(column(begin_ns), AXIS_WIDTH - 1)
    return " " * begin + character * (max(column(end_ns), begin + 1) - begin)


# ---- page --------------------------------------------------------------------------------------------------


def explain_page(report: str) -> str:
    """One HTML page that draws the report and needs nothing else."""
    return read_report(report, _page)


def _page(report: Report) -> str:
    shown = document({name: value for name, value in report.items() if name != "trace"})
    # Within <script> nothing in it ends the element or begins a comment.
    return _PAGE.read_text(encoding="utf-8").replace("@report@", shown.replace("<", "\\u003c"), 1)


# ---- trace -------------------------------------------------------------------------------------------------


def chrome_trace(report: str) -> str:
    """Phases and spans in the Trace Event Format that Chrome's tracing page and Perfetto read; one track each
    phase and thread.

    Raises
    ------
    NotFoundError
        The daemon kept no spans.
    """
    return read_report(report, _traced)


def _traced(report: Report) -> str:
    if not report.get("trace"):
        raise NotFoundError(
            "the daemon kept no trace of this load: it does so at log level debug; stop it, start it with "
            "`tensord serve --log-level debug`, and load again"
        )
    events: list[Report] = []
    tracks: dict[str, int] = {}
    for phase in entries(report, "phases"):
        if number(phase, "thread_ns") > 0:
            track = f"{text(phase, 'lane')}: {text(phase, 'name')}"
            _add_event(events, tracks, track, phase, number(report, "origin_ns"))
    for span in entries(report, "trace"):
        _add_event(events, tracks, text(span, "thread"), span, 0)
    return document({"displayTimeUnit": "ms", "traceEvents": events})


_TOLD = frozenset(("name", "thread", "begin_ns", "end_ns"))


def _add_event(
    events: list[Report], tracks: dict[str, int], track: str, span: Report, origin_ns: int
) -> None:
    if track not in tracks:
        tracks[track] = len(tracks) + 1
        events.append(
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": tracks[track], "args": {"name": track}}
        )
    begin_ns, end_ns = number(span, "begin_ns"), number(span, "end_ns")
    events.append(
        {
            "name": text(span, "name"),
            "ph": "X",  # a complete event; its times are microseconds
            "pid": 1,
            "tid": tracks[track],
            "ts": (origin_ns + begin_ns) / 1e3,
            "dur": (end_ns - begin_ns) / 1e3,
            "args": {name: value for name, value in span.items() if name not in _TOLD},
        }
    )


def without_trace(report: str, trace_path: str) -> str:
    """The report without its spans, and with where they were written."""
    shown = json.loads(report)
    shown.pop("trace", None)
    return document({**shown, "trace_file": trace_path})
