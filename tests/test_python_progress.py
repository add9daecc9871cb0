"""The progress of a load, and the bar that shows it."""

from __future__ import annotations

import io

import pytest
from tensord.progress import Bar, Meter, Progress, bar_wanted, bytes_text, line


def test_rate_and_remaining_time_count_from_the_first_reading() -> None:
    now = 100.0
    meter = Meter(lambda: now)
    assert meter.read(1000, 5000) == Progress(1000, 5000, 0.0, 0.0)
    assert meter.read(1000, 5000).eta_seconds is None
    now = 102.0
    progress = meter.read(3000, 5000)
    assert progress.bytes_per_second == 1000
    assert progress.eta_seconds == 2
    assert meter.read(5000, 5000).eta_seconds == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (2e9, "2 GB"), (3.5e15, "3.5e+03 TB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_line_shows_share_bytes_rate_and_time_left() -> None:
    assert line(Progress(500_000_000, 2_000_000_000, 1.0, 5e8)) == (
        "[######..................]  25%  500 MB of 2 GB  0.50 GB/s  3 s left"
    )
    assert line(Progress(0, 0, 0.5, 0.0)) == "[########################] 100%  0 B of 0 B  0.00 GB/s  0.5 s"


def test_line_says_when_nothing_comes() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    assert "nothing" not in line(meter.read(0, 4000))
    now = 6.0
    assert line(meter.read(0, 4000)).endswith("0 B of 4 kB  nothing for 6 s")
    now = 7.0
    assert "nothing" not in line(meter.read(2000, 4000))
    now = 70.0
    assert line(meter.read(2000, 4000)).endswith("nothing for 63 s")
    assert "nothing" not in line(meter.read(4000, 4000))


def test_bar_redraws_one_line_and_leaves_the_last() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    bar(Progress(0, 10, 0.0, 0.0))
    bar(Progress(10, 10, 1.0, 10.0))
    bar.close()
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().endswith("1.0 s\n")


def test_bar_is_for_terminals_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORD_PROGRESS", raising=False)
    assert not bar_wanted(io.StringIO())
    monkeypatch.setenv("TENSORD_PROGRESS", "1")
    assert bar_wanted(io.StringIO())
