"""The daemon as the command line meets it: questions, its process, its program.

What few verbs need is imported where they need it: a verb is to begin at once.
"""

from __future__ import annotations

import os
import pwd
import signal
import stat
import struct
import sys
from pathlib import Path
from typing import NoReturn

from .. import _library
from ..errors import DeniedError, Error, InternalError, InvalidArgumentError, UnavailableError
from .output import os_error

# How long `stop` waits for the daemon to end: it lets running loads and answers come to an end first.
STOP_SECONDS = 30

ACCEPT_SECONDS = 10
SOCKET_PATH_MAX = 107  # bytes: sizeof sockaddr_un.sun_path, with a NUL


def ask(verb: str, selector: str = "") -> str:
    """The daemon's report, JSON. Never starts a daemon."""
    return _library.call(verb, selector)


def answers() -> bool:
    try:
        ask("status")
    except Error:
        return False
    return True


# ---- its process -------------------------------------------------------------------------------------------


def stop() -> int:
    """Ends the daemon, waits until it is gone, and returns its pid.

    By signal: also a daemon that speaks another version of the protocol, or that hangs, can be stopped.
    """
    import select

    pid = _process()
    try:
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            ended, _, _ = select.select([process], [], [], STOP_SECONDS)
        finally:
            os.close(process)
    except OSError as error:
        raise os_error(f"stop daemon {pid}", error) from None
    if not ended:
        raise InternalError(
            f"daemon {pid} was told to stop and still runs after {STOP_SECONDS} s; "
            "its log says what it waits for"
        )
    return pid


def _process() -> int:
    """The daemon's pid, as the kernel knows it: no message is exchanged."""
    path = socket_path()
    _check_folder(path)
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ACCEPT_SECONDS)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise _nobody(path) from None
        except (TimeoutError, socket.timeout):
            raise UnavailableError(f"the daemon at {path} does not accept") from None
        except OSError as error:
            raise os_error(f"connect to {path}", error) from None
        peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", peer)
    if uid not in (os.geteuid(), 0):
        raise DeniedError(
            f"the process {pid} at {path} belongs to uid {uid}, not to you (uid {os.geteuid()}) or root"
        )
    return int(pid)


def _nobody(path: str) -> Error:
    return UnavailableError(f"no daemon listens at {path}; start a daemon with `tensord serve`")


def runtime_folder() -> str:
    """As rpc/unix_socket.cc has it."""
    folder = os.environ.get("TENSORD_RUNTIME_DIR")
    home = os.environ.get("XDG_RUNTIME_DIR")
    if folder:
        return folder.rstrip("/") or "/"
    if home:
        return f"{home.rstrip('/') or '/'}/tensord"
    return f"/tmp/tensord-{os.geteuid()}"


def state_folder() -> str:
    """As base/folders.cc has it."""
    folder = os.environ.get("TENSORD_STATE_DIR")
    states = os.environ.get("XDG_STATE_HOME")
    if folder:
        return folder
    if states:
        return f"{states}/tensord"
    home = os.environ.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = "/tmp"
    return f"{home}/.local/state/tensord"


def socket_path() -> str:
    """In the runtime folder; refused where the folder's name is too long for it."""
    path = f"{runtime_folder()}/socket"
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_MAX:
        raise InvalidArgumentError(
            f"socket {path}: {size} bytes are too long for a socket's path (at most {SOCKET_PATH_MAX}); "
            "set TENSORD_RUNTIME_DIR to a shorter folder"
        )
    return path


def _check_folder(path: str) -> None:
    """Refuses a socket in a folder of somebody else's, or behind a link."""
    folder = path[: path.rindex("/")] or "/"
    try:
        status = Path(folder).lstat()
    except FileNotFoundError:
        raise _nobody(path) from None
    except OSError as error:
        raise os_error(f"look at runtime folder {folder}", error) from None
    if stat.S_ISLNK(status.st_mode):
        raise DeniedError(f"runtime folder {folder} is a symbolic link; set TENSORD_RUNTIME_DIR to a folder")
    if status.st_uid not in (os.geteuid(), 0):
        raise DeniedError(
            f"runtime folder {folder} belongs to uid {status.st_uid}, not to you (uid {os.geteuid()}); "
            "remove it or set TENSORD_RUNTIME_DIR"
        )


# ---- its program -------------------------------------------------------------------------------------------


def program() -> str:
    """The compiled program: $TENSORD_BINARY, else beside the library, else in the folder bin there.

    Raises
    ------
    UnavailableError
        There is none, or it cannot be run.
    """
    named = os.environ.get("TENSORD_BINARY")
    if named and not _is_this_command(named):
        if os.access(named, os.X_OK):
            return named
        raise UnavailableError(f"$TENSORD_BINARY names {named}, which cannot be run")
    folder = _library.library_path().resolve().parent
    for path in (folder / "tensord", folder / "bin" / "tensord"):
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise UnavailableError(f"no `tensord` program was found beside {folder}; set $TENSORD_BINARY")


def _is_this_command(path: str) -> bool:
    """A script that runs this package is no program of the daemon's: it would run itself for ever."""
    try:
        return Path(path).samefile(sys.argv[0])
    except OSError:
        return False


def become(*words: str) -> NoReturn:
    """Goes on as the compiled program: same process, same terminal."""
    path = program()
    try:
        os.execv(path, [path, *words])
    except OSError as error:
        raise os_error(f"run {path}", error) from None
