"""Waiting for a load in front of someone."""

from __future__ import annotations

import os
import signal
from typing import Any

from ..errors import CancelledError
from ..progress import IDLE_SECONDS, Meter, Progress
from .checkpoint import Checkpoint
from .output import STDERR, complain, write_error_raw
from .table import bar, duration_text, rate_text, size_text

BAR_WIDTH_MAX = 40
BAR_WIDTH_MIN = 8
CLEAR_TO_END = "\x1b[K"


def progress_line(progress: Progress, width: int) -> str:
    """One line of at most `width` characters; the bar takes what the numbers leave:

    ``[##########..........]  50 %  1.00 GiB of 2.00 GiB  3.41 GB/s  0.3 s left``
    """
    ready, total = progress.ready_bytes, progress.total_bytes
    share = ready / total if total else 1.0
    numbers = f"  {int(share * 100)} %  {size_text(ready)} of {size_text(total)}"
    left = max(total - ready, 0)
    if progress.idle_seconds >= IDLE_SECONDS and left:
        numbers += f"  nothing for {int(progress.idle_seconds)} s"
    elif progress.bytes_per_second > 0:
        numbers += f"  {rate_text(progress.bytes_per_second / 1e9)} GB/s"
        if left:
            numbers += f"  {_time_left(left / progress.bytes_per_second)} left"
        else:
            numbers += f"  in {duration_text(round(progress.seconds * 1e9))}"
    room = width - len(numbers) - 2
    if room < BAR_WIDTH_MIN:
        return numbers[2 : 2 + width]
    return f"[{bar(share, min(room, BAR_WIDTH_MAX))}]{numbers}"


def _time_left(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration_text(int(seconds * 1e9))


def watch_fill(checkpoint: Checkpoint, mode: str | None) -> None:
    """Waits until all of the checkpoint is there.

    Parameters
    ----------
    mode : str
        ``always`` shows a line on standard error that is written over and ends with a line feed, ``never``
        shows nothing, ``auto`` (also None) shows it where standard error is a terminal.

    Raises
    ------
    CancelledError
        SIGINT; the daemon goes on filling.
    Error
        The load failed, or the daemon went away.
    """
    is_terminal = os.isatty(STDERR)
    is_shown = mode == "always" or (mode != "never" and is_terminal)
    interrupts: list[Any] = []
    handler_before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(None))
    meter = Meter()
    try:
        meter.read(*checkpoint.progress())
        is_there = False
        while not is_there and not interrupts:
            is_there = checkpoint.wait_piece()
            if is_shown:
                _draw(meter.read(*checkpoint.progress()), is_terminal)
    finally:
        signal.signal(signal.SIGINT, handler_before)
        if is_shown:
            complain("\n")
    if not is_there:
        raise CancelledError(f"interrupted while {checkpoint.path} fills; the daemon goes on filling it")


def _draw(progress: Progress, is_terminal: bool) -> None:
    line = progress_line(progress, _terminal_width())
    write_error_raw(f"\r{line}{CLEAR_TO_END if is_terminal else ''}")


def _terminal_width() -> int:
    try:
        columns = os.get_terminal_size(STDERR).columns
    except OSError:
        return 80
    return columns - 1 if columns >= 20 else 80  # a full last column would wrap
