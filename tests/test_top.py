"""Watching the daemon, as its users meet it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import COMMAND, DEADLINE_SECONDS, Daemon, counted


def test_top_prints_as_often_as_asked(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"w": counted((8, 6))})
    daemon.ask("load", str(path), "--wait")
    done = daemon.run("top", "--count", "2", "--interval", "0.01")
    assert done.returncode == 0
    assert [line.split(", ")[0] for line in done.stdout.splitlines()] == ["1 replica"] * 2
    done = daemon.run("top", "--count", "3", "--interval", "0.01", "--json")
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(looks) == 3
    assert [replica["path"] for replica in looks[0]["replicas"]] == [str(path)]
    assert looks[0]["at_s"] < looks[1]["at_s"] and looks[2]["loaded_bytes_per_s"] == 0
    assert looks[2]["loaded_bytes"] == daemon.ask("status")["loaded_bytes"] > 0
    for words in (("--interval", "0"), ("--count", "0"), ("--count", "many")):
        assert daemon.run("top", *words).returncode == 2


def test_top_ends_with_3_when_the_daemon_ends(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    words = [*COMMAND, "top", "--interval", "0.01"]
    environment = {**os.environ, **daemon.environment}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout is not None
        top.stdout.readline()
        daemon.stop()
        _, errors = top.communicate(timeout=DEADLINE_SECONDS)
    assert top.returncode == 3
    assert b"no daemon" in errors


def test_top_draws_over_its_last_look_on_a_terminal(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"w": counted((8, 6))}, name="bell\x07.safetensors")
    daemon.ask("load", str(path), "--wait")
    ours, theirs = pty.openpty()
    words = [*COMMAND, "top", "--interval", "0.05"]
    environment = {**os.environ, **daemon.environment}
    with (
        subprocess.Popen(words, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as top,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(top.kill)  # else a failure would wait for it
        shown = b""
        while shown.count(b"\x1b[?7h") < 2:
            shown += os.read(ours, 1 << 16)
        top.send_signal(signal.SIGTERM)
        assert top.wait(DEADLINE_SECONDS) == -signal.SIGTERM
    assert b"held by" in shown and b"bell?.safetensors" in shown and b"\x07" not in shown
    assert shown.count(b"\x1b[?7l") - shown.count(b"\x1b[?7h") in (0, 1)
    os.close(ours)
    os.close(theirs)
