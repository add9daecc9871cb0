"""Saying why: explain, doctor and top, as their users meet them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, counted


@pytest.fixture
def model(make_file: Callable[..., Path]) -> Path:
    return make_file({"w": counted((8, 6)), "b": counted((5,), "int16")})


def lanes(report: Any) -> set[str]:
    return {bar["lane"] for bar in report["waterfall"]["bars"]}


def test_a_resident_replica_explains_only_its_clients(daemon: Daemon, model: Path) -> None:
    daemon.ask("load", str(model), "--wait")
    report = daemon.ask("explain", str(model))
    assert report["waterfall"]["served"] == "load" and lanes(report) == {"daemon"}
    with tensord.open(model, "np") as opened:
        opened.load_into({"w": np.empty((8, 6), np.float32)})
        report = daemon.ask("explain", str(model))
    assert report["waterfall"]["served"] == "resident"
    assert report["waterfall"]["bytes"] == 8 * 6 * 4
    assert "daemon" not in lanes(report)
    assert "resident since load" in daemon.run("explain", str(model)).stdout


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


def test_the_page_holds_the_report_whatever_files_are_called(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = make_daemon("--log-level", "debug")
    path = make_file({"w": counted((8, 6))}, name="a<!--<script>\u2028/script><b>.safetensors")
    daemon.ask("load", str(path), "--wait")
    page = tmp_path / "load.html"
    daemon.ask("explain", "last", "--html", str(page))
    text = page.read_text()
    (found,) = re.findall(r'<script id="report" type="application/json">(.*?)</script>', text, re.DOTALL)
    report = json.loads(found)
    assert report["path"] == str(path)
    assert "<" not in found
    assert "trace" not in report and report["timeline"]
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)


def test_doctor_measures_and_leaves_nothing_in_the_folder(no_network_daemon: Daemon, tmp_path: Path) -> None:
    report = no_network_daemon.ask("doctor", "--quick", "--folder", str(tmp_path))
    assert report["rates"]["memcpy_1"] > 0 and report["rates"]["hash_1"] > 0
    assert {line["verdict"] for line in report["checks"]} <= {"good", "could be better", "missing"}
    assert report["saved"] is None and list(tmp_path.iterdir()) == []
    assert no_network_daemon.run("doctor", "--folder").returncode == 2
    assert no_network_daemon.run("doctor", "--folder", str(tmp_path / "none")).returncode == 1


@pytest.fixture
def no_network_daemon(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Daemon:
    """Folders of a daemon that does not run."""
    return Daemon(binary, tmp_path_factory.mktemp("nobody"))


def test_top_prints_as_often_as_asked(daemon: Daemon, model: Path) -> None:
    daemon.ask("load", str(model), "--wait")
    done = daemon.run("top", "--count", "2", "--interval", "0.01")
    assert done.returncode == 0 and done.stdout.count("\n") == 2
    done = daemon.run("top", "--count", "3", "--interval", "0.01", "--json")
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == 3
    assert any(replica["path"] == str(model) for replica in samples[0]["replicas"])
    assert daemon.run("top", "--interval", "0").returncode == 2


def test_top_ends_with_3_when_the_daemon_ends(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    words = [daemon.binary, "top", "--interval", "0.01"]
    environment = {**os.environ, **daemon.environment}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout is not None
        top.stdout.readline()
        daemon.stop()
        _, errors = top.communicate(timeout=DEADLINE_SECONDS)
    assert top.returncode == 3
    assert b"has ended" in errors


@pytest.mark.parametrize("how", ["q", "interrupt"])
def test_top_gives_the_terminal_back(daemon: Daemon, how: str) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    words = [daemon.binary, "top", "--interval", "0.05"]
    environment = {**os.environ, **daemon.environment}
    with subprocess.Popen(words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as top:
        shown = b""
        while b"memory" not in shown:
            shown += os.read(ours, 1 << 16)
        if how == "q":
            os.write(ours, b"q")
        else:
            top.send_signal(signal.SIGINT)
        while not shown.endswith(b"\x1b[?1049l"):
            shown += os.read(ours, 1 << 16)
        assert top.wait(DEADLINE_SECONDS) == 0
    assert b"\x1b[?1049h" in shown
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
