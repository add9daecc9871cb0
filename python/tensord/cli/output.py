"""What a verb has to say, and how it reaches standard output and standard error."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from typing import Any, NamedTuple

from .._library import UNAVAILABLE
from ..errors import Error, error_of
from .table import without_controls

# Exit statuses: it is done; it failed (the error is on standard error); the command line makes no sense; no
# daemon runs, or it does not answer; the bytes are corrupt or changed; it was interrupted while it waited.
DONE, FAILED, USAGE, NO_DAEMON, CORRUPT, INTERRUPTED = 0, 1, 2, 3, 4, 130

STDOUT, STDERR = 1, 2


class Output(NamedTuple):
    """`json` is one document; `text` is for people and ends with a line feed."""

    json: str
    text: str
    status: int = DONE


class UsageError(Exception):
    """The command line makes no sense; the message says why."""


def document(value: Any) -> str:
    """One JSON document in one line, its names sorted."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def error_document(code: str, message: str) -> str:
    return document({"error": {"code": code, "message": message}})


def os_error(what: str, error: OSError) -> Error:
    """``what: No such file or directory``, as the error class that the library would give."""
    number = error.errno or 0
    return error_of(_CODES.get(number, UNAVAILABLE), f"{what}: {os.strerror(number) if number else error}")


# The numbers of tensord_code by errno, as base/result.cc has them; all others are unavailable.
_CODES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), 1),  # not_found
    **dict.fromkeys((errno.EACCES, errno.EROFS, errno.EPERM), 8),  # denied
    **dict.fromkeys((errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE), 3),  # exhausted
    **dict.fromkeys((errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO), 2),
}


def write(stream: int, text: str) -> None:
    """All of it, at once; raises OSError. To a terminal only what does not move its cursor.

    Not through sys.stdout: that would keep what could not be written, fail again at exit, and know encodings.
    """
    if os.isatty(stream):
        text = without_controls(text)
    write_raw(stream, text)


def write_raw(stream: int, text: str) -> None:
    """As `write`, but a terminal obeys what is in it."""
    rest = memoryview(text.encode("utf-8", "surrogateescape"))
    while rest:
        rest = rest[os.write(stream, rest) :]


def complain(text: str) -> None:
    """To standard error, if anybody reads it."""
    with suppress(OSError):
        write(STDERR, text)


def write_error_raw(text: str) -> None:
    """As `complain`, but a terminal obeys what is in it."""
    with suppress(OSError):
        write_raw(STDERR, text)
