"""Daemons and files of this process's own, which are gone when it ends, however it ends."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UnavailableError
from . import daemon
from .output import os_error

LISTEN_SECONDS = 10
END_SECONDS = 5

# Looked up here: what runs between fork and exec is to take no lock.
_prctl = ctypes.CDLL(None).prctl
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


@contextmanager
def scratch_daemon(folder: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """A daemon that has all its folders and its log in `folder`, and no settings but `flags`. Inside of the
    block this process's clients talk to it and to no other.

    Returns
    -------
    dict
        Its `status`.

    Raises
    ------
    UnavailableError
        It does not start; the message says why.
    """
    program = daemon.program()
    try:
        folder.mkdir(exist_ok=True)
        settings, log = folder / "tensord.toml", folder / "log"
        settings.touch()  # the user's own do not count
        words = ["serve", "--config", str(settings), "--state-dir", str(folder / "state")]
        words += ["--runtime-dir", str(folder / "run"), "--gpu", "off", "--drain-seconds", "0"]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [program, *words, *flags],
                env={name: value for name, value in os.environ.items() if not name.startswith("TENSORD_")},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C is for this process, which then ends it
                preexec_fn=_end_with_parent,
            )
    except OSError as error:
        raise os_error(f"run {program} in {folder}", error) from None
    try:
        with _environment(TENSORD_RUNTIME_DIR=str(folder / "run"), TENSORD_AUTOSTART="0"):
            yield _first_status(process, program, log)
    finally:
        _end(process)


def _end_with_parent() -> None:
    """Also where that is killed."""
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_status(process: subprocess.Popen[bytes], program: str, log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        has_ended = process.poll() is not None
        try:
            return dict(json.loads(daemon.ask("status")))
        except UnavailableError as error:
            if has_ended or time.monotonic() > deadline:
                said = log.read_text(errors="replace").splitlines()
                reason = said[-1] if said else str(error)
                raise UnavailableError(f"`{program} serve` did not start: {reason}") from None
        time.sleep(0.002)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---- files -------------------------------------------------------------------------------------------------

# A process of its own: it ends when the pipe to it is closed, which the end of this process does in any case.
_REMOVE = """\
import os, shutil, sys
sys.stdin.read()
path = sys.argv[1]
if os.path.isdir(path):
    shutil.rmtree(path, ignore_errors=True)
elif os.path.exists(path):
    os.unlink(path)
"""


@contextmanager
def removed_at_end(path: str) -> Iterator[str]:
    """A file or a folder: it is gone behind the block, and also where this process is killed in it.

    Raises
    ------
    UnavailableError
        There can be no process that removes it.
    """
    try:
        remover = subprocess.Popen(
            [sys.executable, "-ISc", _REMOVE, path], stdin=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise os_error(f"see to it that {path} is removed", error) from None
    with remover:  # closes the pipe, and waits
        yield path
