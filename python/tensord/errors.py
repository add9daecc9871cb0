"""The errors of tensord: one base, one class per code, and the built-in class that callers already catch."""

from __future__ import annotations

import errno
import os
from typing import Any

try:
    from safetensors import SafetensorError
except ImportError:

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """Stands in for ``safetensors.SafetensorError`` where that package is not installed."""


class Error(Exception):
    """The base of every error tensord raises.

    Parameters
    ----------
    message : str
        What was tried, on what, why it failed and what to do. ``str(error)`` is the message.
    target_dirty : bool
        True when the caller's memory may have been written to before the failure.
    filename : str, optional
        The file at fault, kept by the classes that are OSErrors too.

    Attributes
    ----------
    code : str
        ``"not_found"``, ``"invalid_argument"``, ``"exhausted"``, ``"unavailable"``, ``"cancelled"``,
        ``"corrupt"``, ``"changed"``, ``"denied"``, ``"unsupported"``, ``"incomplete"`` or ``"internal"``.
    target_dirty : bool
    """

    code: str = "internal"
    target_dirty: bool = False
    _errno: int | None = None  # of the classes that are OSErrors too

    def __init__(self, message: str, *, target_dirty: bool = False, filename: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.target_dirty = target_dirty
        itself: BaseException = self
        if isinstance(itself, OSError):
            itself.errno = self._errno
            itself.strerror = os.strerror(self._errno) if self._errno else message
            itself.filename = filename

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> Any:
        return _restore, (
            type(self),
            self.message,
            self.target_dirty,
            getattr(self, "filename", None),
        )


class TensordWarning(UserWarning):
    """Something works, but not as it was asked for; the message says why and what to do."""


def _restore(kind: type[Error], message: str, dirty: bool, filename: str | None) -> Error:
    return kind(message, target_dirty=dirty, filename=filename)


class NotFoundError(Error):
    """No such file, tensor or artifact."""

    code = "not_found"


class MissingFileError(NotFoundError, FileNotFoundError):
    """A file or folder of the checkpoint is not there. ``filename`` names it."""

    _errno = errno.ENOENT


class UnknownTensorError(NotFoundError, KeyError, SafetensorError):
    """The checkpoint has no tensor of that name."""


class InvalidArgumentError(Error, ValueError):
    """The caller asked for something that makes no sense."""

    code = "invalid_argument"


class InvalidTypeError(InvalidArgumentError, TypeError):
    """An argument of another type than the call takes."""


class InvalidIndexError(InvalidArgumentError, IndexError):
    """An index that numpy's basic indexing would refuse, or one out of range."""


class InvalidOptionError(InvalidArgumentError, SafetensorError):
    """`safe_open` was given a framework, device, backend or index that safetensors would refuse."""


class ExhaustedError(Error, MemoryError):
    """A limit is reached; the message names what holds the resource."""

    code = "exhausted"


class UnavailableError(Error, ConnectionError):
    """The daemon does not answer; trying again may help."""

    code = "unavailable"


class WaitTimeoutError(UnavailableError, TimeoutError):
    """The time given to `Model.wait` passed."""

    _errno = errno.ETIMEDOUT


class CancelledError(Error):
    """The caller, or the operator, gave up."""

    code = "cancelled"


class CorruptError(Error, SafetensorError):
    """Bytes are not what their format or their digest says."""

    code = "corrupt"


class ChangedError(Error):
    """A file is not what it was when it was opened."""

    code = "changed"


class DeniedError(Error, PermissionError):
    """Permissions forbid it."""

    code = "denied"
    _errno = errno.EACCES


class UnsupportedError(Error, NotImplementedError):
    """Understood, but not done here."""

    code = "unsupported"


class UnsupportedDtypeError(UnsupportedError, TypeError):
    """The framework has no type for the tensor's elements."""


class IncompleteError(Error):
    """A load left out parameters of a module; the message names them."""

    code = "incomplete"


class InternalError(Error, RuntimeError):
    """A bug of tensord that was caught in time."""


# The numbers are those of tensord_code in tensord.h.
_CLASSES: dict[int, type[Error]] = {
    1: NotFoundError,
    2: InvalidArgumentError,
    3: ExhaustedError,
    4: UnavailableError,
    5: CancelledError,
    6: CorruptError,
    7: ChangedError,
    8: DeniedError,
    9: UnsupportedError,
    10: InternalError,
}


def error_of(code: int, message: str, *, target_dirty: bool = False) -> Error:
    """The error for a code of the C library."""
    return _CLASSES.get(code, InternalError)(message, target_dirty=target_dirty)


def error_named(code: str, message: str) -> Error:
    """The error for a code by its name, as documents of the daemon's program have it."""
    kinds = {kind.code: kind for kind in _CLASSES.values()}
    return kinds.get(code, InternalError)(message)
