"""Daemons of this process's own, which end with it and leave nothing behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
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


# ---- signals -----------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """A signal came that ends the process."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A signal that ends the process does so when the block has let go of what it made: of the first one an
    exception is made inside of it, those that follow are ignored until then. For the main thread."""
    came: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        came.append(number)
        raise _Ended

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in wanted if signal.getsignal(one) != signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, end)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if came:
            signal.raise_signal(came[0])
