"""Where the time of a load went, as its users meet it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, counted

LOAD_PHASES = ["index", "wait_for_memory", "touch", "read", "check"]
CLIENT_PHASES = ["map", "wait_for_client", "plan", "wait", "copy"]


@pytest.fixture
def model(make_file: Callable[..., Path]) -> Path:
    return make_file({"w": counted((8, 6)), "b": counted((5,), "int16")})


def copied_report(daemon: Daemon, selector: str) -> Any:
    """The report, once the daemon was told of a copy: clients do not wait for an answer."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (report := daemon.ask("explain", selector))["uses"]:
        assert time.monotonic() < deadline
    return report


def test_a_resident_replica_explains_only_its_clients(daemon: Daemon, model: Path) -> None:
    daemon.ask("load", str(model), "--wait")
    report = daemon.ask("explain", str(model))
    assert report["served"] == "load" and [phase["name"] for phase in report["phases"]] == LOAD_PHASES
    assert "of these files" in daemon.run("explain", str(model)).stdout
    with tensord.open(model, "np") as opened:
        opened.load_into({"w": np.empty((8, 6), np.float32)})
        report = copied_report(daemon, str(model))
    assert report["served"] == "resident" and report["moved_bytes"] == 8 * 6 * 4
    assert [phase["name"] for phase in report["phases"]] == CLIENT_PHASES
    assert {phase["lane"] for phase in report["phases"]} == {
        f"{report['uses'][0]['name']} {report['uses'][0]['pid']}"
    }
    assert all(0 <= phase["begin_ns"] <= phase["end_ns"] for phase in report["phases"])
    assert "resident; what clients copied" in daemon.run("explain", str(model)).stdout


def test_a_client_that_copies_while_it_fills_is_on_the_axis_of_the_load(daemon: Daemon, model: Path) -> None:
    with tensord.open(model, "np") as opened:
        opened.load_into({"w": np.empty((8, 6), np.float32)})
        report = copied_report(daemon, str(model))
    assert report["served"] == "load"
    assert [phase["name"] for phase in report["phases"]] == LOAD_PHASES + CLIENT_PHASES
    assert report["span_ns"] == max(phase["end_ns"] for phase in report["phases"])
    assert all(0 <= phase["begin_ns"] <= phase["end_ns"] for phase in report["phases"])
    text = daemon.run("explain", str(model)).stdout
    assert all(len(line) <= 80 for line in text.splitlines() if str(model) not in line)


def test_a_load_that_failed_can_be_explained_though_nothing_is_resident(
    daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\xff" * 9)
    assert daemon.run("load", str(path), "--wait").returncode == 4
    for selector in (str(path), "last"):
        report = daemon.ask("explain", selector)
        assert report["state"] == "failed" and report["error"]["code"] == "corrupt"
    assert "error: corrupt: " in daemon.run("explain", str(path)).stdout
    assert daemon.run("explain", str(tmp_path / "never")).returncode == 1


def test_what_is_possible_is_told_where_the_machine_was_measured(daemon: Daemon, model: Path) -> None:
    daemon.ask("load", str(model), "--wait")
    report = daemon.ask("explain", str(model))
    assert report["possible_gb_per_s"] is None and report["rates_known"] is False
    assert "run `tensord doctor` once" in daemon.run("explain", str(model)).stdout
    (daemon.state_folder / "machine.json").write_text("{}")  # damaged: as if it was not there
    assert daemon.ask("explain", str(model))["rates_known"] is False
    (daemon.state_folder / "machine.json").unlink()


class Page(HTMLParser):
    """Checks that elements end where they should, and keeps what scripts hold."""

    VOID = frozenset(("meta", "br", "link"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_holds_every_phase_whatever_files_and_tensors_are_called(
    daemon: Daemon, make_file: Callable[..., Path], tmp_path: Path
) -> None:
    hostile = "</script><b>"
    path = make_file({hostile: counted((8, 6)), "b": counted((3,))}, name="a<!--<script>\u2028.safetensors")
    with tensord.open(path, "np", only=[hostile]) as opened:
        opened.load_into({hostile: np.empty((8, 6), np.float32)})
        copied_report(daemon, "last")
    page = tmp_path / "load.html"
    assert str(page) in daemon.run("explain", "last", "--html", str(page)).stdout
    text = page.read_text()
    parsed = Page(text)
    assert "b" not in parsed.tags and parsed.tags.count("script") == 2
    report = json.loads(parsed.scripts[0])
    assert "<" not in parsed.scripts[0]
    assert report["path"] == str(path) and report["only"] == [hostile]
    assert [phase["name"] for phase in report["phases"]] == LOAD_PHASES + CLIENT_PHASES
    assert all(f"--{name}:" in text for name in LOAD_PHASES + CLIENT_PHASES)  # each has its color
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert daemon.run("explain", "last", "--html", str(tmp_path / "none" / "page")).returncode == 1
