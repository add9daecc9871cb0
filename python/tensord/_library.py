"""libtensord.so through ctypes: where it is, its structs and prototypes, and its codes as exceptions.

The contract of every function is in include/tensord/tensord.h; the layouts below repeat its structs field
by field, but for those that are built by the thousand (indexing.py, copies.py): no numpy is needed to ask the
daemon something.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from .errors import Error, UnavailableError, UnsupportedError, error_of

ABI_VERSION = 4
RANK_MAX = 64
INDEX_ITEMS_MAX = 128

OK = 0
NOT_FOUND = 1
INVALID_ARGUMENT = 2
UNAVAILABLE = 4
DENIED = 8

FILLING = 0
READY = 1

RESIDENT_ARTIFACT = 0
RESIDENT_VIEW = 1


class OpenOptions(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("autostart", ctypes.c_int32),
        ("index_only", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("only", ctypes.POINTER(ctypes.c_char_p)),
        ("only_count", ctypes.c_size_t),
        ("memory_wait_ms", ctypes.c_int64),
        ("cancel", ctypes.POINTER(ctypes.c_int32)),
        ("device", ctypes.c_char_p),
        ("hold_only", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype_text", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_uint64)),
        ("rank", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("file", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("file_offset", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
    )


class Progress(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("ready_bytes", ctypes.c_uint64),
        ("total_bytes", ctypes.c_uint64),
    )


class IndexItem(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("given", ctypes.c_uint32),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("step", ctypes.c_int64),
    )


class Region(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("element_bytes", ctypes.c_uint32),
        ("shape", ctypes.c_uint64 * RANK_MAX),
        ("strides", ctypes.c_int64 * RANK_MAX),
    )


class CopyOptions(ctypes.Structure):
    _fields_ = (
        ("struct_bytes", ctypes.c_uint32),
        ("cast", ctypes.c_int32),
        ("thread_count", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("cancel", ctypes.POINTER(ctypes.c_int32)),
        ("left_out", ctypes.c_void_p),
    )


class CopyReport(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("record_count", ctypes.c_uint64),
        ("thread_count", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("plan_ns", ctypes.c_int64),
        ("wait_ns", ctypes.c_int64),
        ("copy_ns", ctypes.c_int64),
        ("device_bytes", ctypes.c_uint64),
        ("device_prepare_ns", ctypes.c_int64),
        ("left_out", ctypes.c_char * 256),
    )


# tensord_left_out
LEFT_OUT_BY_SHAPE = 1
LEFT_OUT_BY_MEMORY = 2

_P = ctypes.c_void_p
_S = ctypes.c_char_p
_Z = ctypes.c_size_t
_INT = ctypes.c_int
_PROTOTYPES = {
    "tensord_abi_version": (ctypes.c_uint32, ()),
    "tensord_version": (_S, ()),
    "tensord_error_message": (_S, ()),
    "tensord_error_target_dirty": (_INT, ()),
    "tensord_free": (None, (_P,)),
    "tensord_open": (
        _INT,
        (ctypes.POINTER(_S), _Z, ctypes.POINTER(OpenOptions), ctypes.POINTER(_P)),
    ),
    "tensord_resident": (_INT, (_P,)),
    "tensord_open_part": (_INT, (_P, ctypes.POINTER(_S), _Z, ctypes.POINTER(_P))),
    "tensord_close": (None, (_P,)),
    "tensord_retain_mapping": (_P, (_P,)),
    "tensord_release_mapping": (None, (_P,)),
    "tensord_tensor_count": (_Z, (_P,)),
    "tensord_tensor_at": (_INT, (_P, _Z, ctypes.POINTER(Tensor))),
    "tensord_find_tensor": (_INT, (_P, _S, ctypes.POINTER(Tensor))),
    "tensord_file_count": (_Z, (_P,)),
    "tensord_file_path": (_S, (_P, _Z)),
    "tensord_metadata_count": (_Z, (_P,)),
    "tensord_metadata_at": (_INT, (_P, _Z, ctypes.POINTER(_S), ctypes.POINTER(_S))),
    "tensord_wait": (_INT, (_P, _S, ctypes.c_int64)),
    "tensord_get_progress": (_INT, (_P, ctypes.POINTER(Progress))),
    "tensord_info": (_INT, (_P, ctypes.POINTER(_P))),
    "tensord_parse_view": (_INT, (_S, ctypes.POINTER(_Z), _P, ctypes.POINTER(_Z))),
    "tensord_resolve": (_INT, (_P, _S, _P, _Z, ctypes.POINTER(Region))),
    "tensord_load_into": (
        _INT,
        (_P, _P, _Z, ctypes.POINTER(CopyOptions), ctypes.POINTER(CopyReport)),
    ),
    "tensord_call": (_INT, (_S, _S, _INT, ctypes.POINTER(_P))),
}


def _candidates() -> list[Path]:
    here = Path(__file__).resolve().parent
    named = os.environ.get("TENSORD_LIBRARY")
    if named:
        return [Path(named)]
    return [here / "libtensord.so", here.parents[1] / "build" / "release" / "libtensord.so"]


def library_path() -> Path:
    """The file that `library` loads: $TENSORD_LIBRARY, else the package's own, else the source tree's build.

    Raises
    ------
    UnavailableError
        There is none.
    """
    paths = _candidates()
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise UnavailableError(
            f"load libtensord.so: there is none at {' or '.join(map(str, paths))}; "
            "build it, or name it in TENSORD_LIBRARY"
        )
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises
    ------
    UnavailableError
        There is none, or it cannot be loaded.
    UnsupportedError
        It was built for another version of this package.
    """
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(loaded, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"load {path}: {error}") from error
    version = loaded.tensord_abi_version()
    if version != ABI_VERSION:
        raise UnsupportedError(
            f"load {path}: it has ABI version {version}, this package needs {ABI_VERSION}; "
            "install library and package of one release"
        )
    return loaded


def last_error(code: int) -> Error:
    """The error of the call that just failed on this thread."""
    loaded = library()
    message = (loaded.tensord_error_message() or b"").decode("utf-8", "replace")
    return error_of(code, message, target_dirty=bool(loaded.tensord_error_target_dirty()))


def check(code: int) -> None:
    """Raises the error of a call that did not return OK."""
    if code != OK:
        raise last_error(code)


def take_text(pointer: ctypes.c_void_p) -> str:
    """Copies a string the library returned through ``char**`` and gives it back."""
    try:
        return ctypes.string_at(pointer).decode("utf-8", "replace")
    finally:
        library().tensord_free(pointer)


def call(verb: str, selector: str | None = None, *, autostart: bool = False) -> str:
    """A management verb of the daemon; the reply is JSON."""
    reply = ctypes.c_void_p()
    chosen = None if selector is None else os.fsencode(selector)
    check(library().tensord_call(verb.encode(), chosen, int(autostart), ctypes.byref(reply)))
    return take_text(reply)
