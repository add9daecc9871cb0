"""``tensord top``: the daemon, look by look."""

from __future__ import annotations

import json
import os
import time
from typing import NamedTuple

from ..progress import Progress
from . import daemon
from .output import STDOUT, Output, document, os_error, write, write_raw
from .reports import Report, entries, fraction, list_of, number, read_report, size, status_of, text
from .table import counted, rate_text, without_controls
from .watch import CLEAR_TO_END, progress_line

LINE_WIDTH = 90  # of a load's progress
LINE_COUNT = 23  # where the screen's height is not known

_CLEAR = "\x1b[2J"
_HOME_WITHOUT_WRAP = "\x1b[?7l\x1b[H"
_CLEAR_REST_WITH_WRAP = "\x1b[K\x1b[J\x1b[?7h"


class LookText(NamedTuple):
    line: str  # the totals
    screen: str  # and all loads and replicas


def take_look(status: str, listed: str, before: str, now_s: float) -> str:
    """The answer to `status` with its replicas as `list` has them, and with rates since `before`: the look
    before this one, empty where there is none."""
    return read_report(status, lambda look: _look(look, listed, before, now_s))


def _look(look: Report, listed: str, before: str, now_s: float) -> str:
    last: Report = json.loads(before) if before else {**look, "at_s": now_s, "replicas": []}
    passed_s = now_s - fraction(last, "at_s")

    def per_second(now: int, then: int) -> float:
        return (now - then) / passed_s if passed_s > 0 and now > then else 0.0

    rates = {
        f"{name}_per_s": per_second(number(look, name), number(last, name))
        for name in ("loaded_bytes", "disk_bytes")
    }
    before_of = {replica["replica"]: replica for replica in entries(last, "replicas")}
    every: Report = json.loads(listed)
    replicas = entries(every, "replicas")
    for replica in replicas:
        then = before_of.get(replica["replica"], {})
        if replica["state"] == "filling" and "ready_bytes" in then:
            replica["bytes_per_s"] = per_second(number(replica, "ready_bytes"), then["ready_bytes"])
    return document({**status_of(look, every), **rates, "at_s": now_s, "replicas": replicas})


def look_text(look: str) -> LookText:
    return read_report(look, _look_text)


def _look_text(look: Report) -> LookText:
    memory, replicas = look["memory"], entries(look, "replicas")
    line = (
        f"{counted(len(replicas), 'replica')}, {counted(number(look, 'loads_running'), 'load')}, "
        f"{counted(number(look, 'connections'), 'client')}, memory {size(memory, 'in_use')} in use + "
        f"{size(memory, 'kept')} kept of {size(look['limits'], 'host_memory')}, "
        f"loading {rate_text(fraction(look, 'loaded_bytes_per_s') / 1e9)} GB/s, "
        f"disk {rate_text(fraction(look, 'disk_bytes_per_s') / 1e9)} GB/s\n"
    )
    loads = [
        f"{progress_line(_progress_of(replica), LINE_WIDTH)}  {text(replica, 'path')}\n"
        for replica in replicas
        if replica["state"] == "filling"
    ]
    return LookText(line, f"{line}\n{''.join(loads)}\n{list_of(look)}")


def _progress_of(replica: Report) -> Progress:
    ready = number(replica, "ready_bytes")
    rate = min(float(replica.get("bytes_per_s", 0.0)), float(ready))
    return Progress(ready, number(replica, "total_bytes"), 1.0, rate)


# ---- in front of someone -----------------------------------------------------------------------------------


def watch(interval_s: float, count: int | None, is_json: bool) -> Output:
    """Prints all but the last look by itself; ends when the daemon has ended, or after `count` looks."""
    on_screen = not is_json and os.isatty(STDOUT)
    look, number_of_looks = "", 0
    if on_screen:
        _print_raw(_CLEAR)
    while True:
        look = take_look(daemon.ask("status"), daemon.ask("list"), look, time.monotonic())
        shown = look_text(look)
        if on_screen:
            _print_raw(screen_text(shown.screen, _line_count()))
        number_of_looks += 1
        if number_of_looks == count:
            return Output(look, "\n" if on_screen else shown.line)
        if not on_screen:
            _print(look + "\n" if is_json else shown.line)
        time.sleep(interval_s)


def screen_text(screen: str, line_count: int) -> str:
    """Draws over what is there, so that nothing flickers. Lines end at the screen's edge."""
    lines = without_controls(screen).split("\n")[: line_count + 1]
    return _HOME_WITHOUT_WRAP + f"{CLEAR_TO_END}\n".join(lines) + _CLEAR_REST_WITH_WRAP


def _line_count() -> int:
    try:
        lines = os.get_terminal_size(STDOUT).lines
    except OSError:
        return LINE_COUNT
    return lines - 1 if lines > 1 else LINE_COUNT


def _print(look: str) -> None:
    try:
        write(STDOUT, look)
    except OSError as error:
        raise os_error("write the look", error) from None


def _print_raw(screen: str) -> None:
    try:
        write_raw(STDOUT, screen)
    except OSError as error:
        raise os_error("write the look", error) from None
