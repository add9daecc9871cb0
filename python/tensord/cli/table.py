"""Text for people: aligned tables, bars, and numbers with their units. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

# What moves a terminal's cursor or means more to it than a character: C0, DEL, C1.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_LINE_FEED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

QUOTED_MAX = 200


class Table:
    """Two blanks between columns, none behind the last word of a line.

    Parameters
    ----------
    titles : str
        Of the columns; one that begins with ``>`` is aligned to the right.
    """

    def __init__(self, *titles: str) -> None:
        self._to_right = [title.startswith(">") for title in titles]
        self._rows: list[Sequence[str]] = [[title.lstrip(">") for title in titles]]

    def add(self, *row: str) -> None:
        """As many cells as columns."""
        assert len(row) == len(self._to_right)
        self._rows.append(row)

    def text(self) -> str:
        widths = [max(len(cell) for cell in column) for column in zip(*self._rows)]
        return "".join(self._line(row, widths) + "\n" for row in self._rows)

    def _line(self, row: Sequence[str], widths: list[int]) -> str:
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, self._to_right)
        )
        return "  ".join(cells).rstrip(" ")


def bar(share: float, width: int) -> str:
    """``######....`` of `width` characters; a share beyond 0 to 1 is clipped."""
    clipped = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    full = int(clipped * width + 0.5)
    return "#" * full + "." * (width - full)


def size_text(count: int) -> str:
    """``2.00 GiB``, ``512 B``: powers of 1024."""
    if count < 1024:
        return f"{count} B"
    power = min(count.bit_length() // 10, len(_UNITS))
    if count < 1024**power:
        power -= 1
    return f"{count / 1024**power:.2f} {_UNITS[power - 1]}"


def duration_text(ns: int) -> str:
    """``1.50 ms``, ``1 min 2 s``: nanoseconds in the unit that fits."""
    if ns < 1_000:
        return f"{ns} ns"
    for unit, size, digits in (("us", 1_000, 1), ("ms", 1_000_000, 2), ("s", 1_000_000_000, 2)):
        if ns < size * (60 if unit == "s" else 1000):
            return f"{ns / size:.{digits}f} {unit}"
    seconds = ns // 1_000_000_000
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds // 60 % 60} min"


def seconds_text(seconds: float) -> str:
    return duration_text(int(seconds * 1e9))


def rate_text(gb_per_s: float) -> str:
    """``5.42``: GB/s without its unit."""
    return f"{gb_per_s:.2f}"


def counted(count: int, noun: str) -> str:
    """``1 load``, ``2 loads``"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def quoted(name: str) -> str:
    """``'name'`` with control characters and quotes escaped, cut to 200 characters: for names from
    outside."""
    shown = re.sub(r"[\\']", r"\\\g<0>", name[:QUOTED_MAX])
    shown = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", shown)
    return f"'{shown}{'...' if len(name) > QUOTED_MAX else ''}'"


def shown_name(name: str) -> str:
    """A tensor's name as it is, unless it would disturb the terminal."""
    return quoted(name) if _CONTROL.search(name) else name


def without_controls(text: str) -> str:
    """The text as it may go to a terminal: what would move its cursor, but for line feeds, is ``?``."""
    return _CONTROL_BUT_LINE_FEED.sub("?", text)
