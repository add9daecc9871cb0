"""How far a load is, and a bar that shows it on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import Callable, NamedTuple, TextIO, Union

BAR_COLUMNS = 24
IDLE_SECONDS = 5.0  # without a byte for so long, that is what a bar says


class Progress(NamedTuple):
    """A moment of a load."""

    ready_bytes: int
    total_bytes: int
    seconds: float  # since waiting began
    bytes_per_second: float  # since waiting began
    idle_seconds: float = 0.0  # since the last byte came

    @property
    def eta_seconds(self) -> float | None:
        """None while nothing has moved yet."""
        if self.ready_bytes >= self.total_bytes:
            return 0.0
        if self.bytes_per_second <= 0:
            return None
        return (self.total_bytes - self.ready_bytes) / self.bytes_per_second


ProgressOption = Union[bool, Callable[[Progress], object]]


class Meter:
    """Turns byte counts into Progress."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._begin_bytes: int | None = None
        self._last_bytes = 0
        self._last_change = self._begin

    def read(self, ready_bytes: int, total_bytes: int) -> Progress:
        if self._begin_bytes is None:
            self._begin_bytes = ready_bytes
        now = self._clock()
        if ready_bytes != self._last_bytes:
            self._last_bytes, self._last_change = ready_bytes, now
        seconds = now - self._begin
        rate = (ready_bytes - self._begin_bytes) / seconds if seconds > 0 else 0.0
        return Progress(ready_bytes, total_bytes, seconds, rate, now - self._last_change)


def bytes_text(count: float) -> str:
    """``1.23 GB``: three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def line(progress: Progress) -> str:
    """One line for people, without an end."""
    total = progress.total_bytes
    share = progress.ready_bytes / total if total else 1.0
    bar = ("#" * int(share * BAR_COLUMNS)).ljust(BAR_COLUMNS, ".")
    head = f"[{bar}] {share:4.0%}  {bytes_text(progress.ready_bytes)} of {bytes_text(total)}"
    eta = progress.eta_seconds
    if eta != 0.0 and progress.idle_seconds >= IDLE_SECONDS:
        return f"{head}  nothing for {progress.idle_seconds:.0f} s"
    rest = "" if eta is None else f"  {eta:.0f} s left" if eta else f"  {progress.seconds:.1f} s"
    return f"{head}  {progress.bytes_per_second / 1e9:.2f} GB/s{rest}"


class Bar:
    """Redraws one line; the last one stays."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._columns = 0

    def __call__(self, progress: Progress) -> None:
        text = line(progress)
        self._stream.write("\r" + text.ljust(self._columns))
        self._stream.flush()
        self._columns = len(text)

    def close(self) -> None:
        if self._columns:
            self._stream.write("\n")
            self._stream.flush()


def bar_wanted(stream: TextIO) -> bool:
    """On a terminal, or where $TENSORD_PROGRESS is 1; nowhere where it is 0."""
    forced = os.environ.get("TENSORD_PROGRESS")
    return forced == "1" or (forced != "0" and stream.isatty())


def stderr_bar() -> Bar | None:
    return Bar(sys.stderr) if bar_wanted(sys.stderr) else None
