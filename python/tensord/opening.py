"""What a caller says to open a checkpoint, as the library takes it."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union

from . import _library
from ._library import last_error, library
from .copies import interruptible
from .errors import (
    DeniedError,
    Error,
    InvalidArgumentError,
    InvalidTypeError,
    MissingFileError,
    UnknownTensorError,
)

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
Resident = Literal["artifact", "view"]

MEMORY_WAIT_SECONDS_MAX = 300.0  # the daemon's own limit


def opened(paths: list[bytes], options: _library.OpenOptions) -> tuple[list[str], ctypes.c_void_p]:
    """The names of the files, and the library's handle. Ctrl-C ends waiting for it."""
    names, given = [os.fsdecode(one) for one in paths], (ctypes.c_char_p * len(paths))(*paths)
    pointer, cancel = ctypes.c_void_p(), ctypes.c_int32(0)
    options.cancel = ctypes.pointer(cancel)

    def ask() -> Error | None:
        code = library().tensord_open(given, len(paths), ctypes.byref(options), ctypes.byref(pointer))
        return None if code == _library.OK else _open_error(code, last_error(code), names)

    try:
        error = interruptible(ask, cancel)
    except BaseException:
        library().tensord_close(pointer)  # it may have come to that
        raise
    if error is None:
        return names, pointer
    try:
        raise error
    finally:
        del error


def device_name(device: Any) -> str | None:
    """``"cuda:1"`` of a torch.device, a number or a text; a GPU's UUID stays; None: host memory."""
    if device is None or str(device) == "cpu":
        return None
    if isinstance(device, int) and not isinstance(device, bool):
        return f"cuda:{device}"
    name = str(device)
    return "cuda:0" if name == "cuda" else name


def open_options(
    only: str | Sequence[str] | None,
    resident: Resident,
    autostart: bool | None,
    memory_wait: float | None,
    device: str | None = None,
) -> _library.OpenOptions:
    if device is not None and resident == "view":
        raise InvalidArgumentError('open: what is kept in GPU memory is kept whole, not as a "view"')
    if resident not in ("artifact", "view"):
        raise InvalidArgumentError(f'open: resident is "artifact" or "view", not {resident!r}')
    check_seconds("open: memory_wait", memory_wait)
    wanted = _encoded_names([only] if isinstance(only, str) else only)
    return _library.OpenOptions(
        struct_bytes=ctypes.sizeof(_library.OpenOptions),
        autostart=-1 if autostart is None else int(autostart),
        resident=_library.RESIDENT_VIEW if resident == "view" else _library.RESIDENT_ARTIFACT,
        only=(ctypes.c_char_p * len(wanted))(*wanted),
        only_count=len(wanted),
        device=None if device is None else os.fsencode(device),
        memory_wait_ms=0
        if memory_wait is None
        else int(min(max(memory_wait, 0), MEMORY_WAIT_SECONDS_MAX) * 1000) or -1,
    )


def check_seconds(what: str, seconds: float | None) -> None:
    if seconds is not None and not isinstance(seconds, (int, float)):
        raise InvalidTypeError(f"{what} is seconds or None, not {seconds!r}")
    if seconds is not None and math.isnan(seconds):
        raise InvalidArgumentError(f"{what}: {seconds!r} is no time")


def encoded_paths(path: PathLike | Sequence[PathLike]) -> list[bytes]:
    given = [path] if isinstance(path, (str, bytes, os.PathLike)) else path
    try:
        paths = [os.fsencode(one) for one in given]
    except TypeError:
        raise InvalidTypeError(f"open takes a path or a list of paths, not {path!r}") from None
    for one in paths:
        if b"\0" in one:
            raise InvalidArgumentError(f"open {one!r}: a path holds no NUL")
    return paths


def _encoded_names(only: Sequence[str] | None) -> list[bytes]:
    if only is None:
        return []
    if not isinstance(only, Iterable):
        raise InvalidTypeError(f"open: only is a name or a list of names, not {only!r}")
    for one in only:
        if not isinstance(one, str):
            raise InvalidArgumentError(f"open: only: {one!r} is no name")
    names = [name.encode() for name in only]
    if not names:
        raise InvalidArgumentError("open: only is empty; None means all tensors")
    for name in names:
        if b"\0" in name:
            raise InvalidArgumentError(f"open: only: {name!r}: names hold no NUL")
    return names


def _open_error(code: int, error: Error, names: list[str]) -> Error:
    """The built-in OSErrors tell which file it was."""
    # Path.exists() raises for names that are too long.
    missing = next((name for name in names if not os.path.exists(name)), names[0] if names else "")  # noqa: PTH110
    if code == _library.NOT_FOUND and ": only: " in error.message:
        return UnknownTensorError(error.message)
    if code == _library.NOT_FOUND:
        return MissingFileError(error.message, filename=missing)
    if code == _library.DENIED:
        return DeniedError(error.message, filename=missing)
    return error
