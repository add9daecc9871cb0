"""An opened checkpoint as the command line needs it: what is in it, and how far it is. Needs no numpy."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from .. import _library
from .._library import check, last_error, library
from ..errors import ExhaustedError, UnavailableError
from . import daemon
from .output import os_error
from .packing import Slice, Tensor, packed_plan
from .reports import read_report
from .table import size_text

# The library looks after its daemon every 0.1 s: an error well before the end of a piece is no timeout.
PIECE_SECONDS = 0.25


class Checkpoint:
    """Held until it is closed, or the process ends.

    Parameters
    ----------
    path : str
        Absolute.
    only : sequence of str
        Names and patterns of the tensors that are wanted; empty: all.
    is_index_only : bool
        Read the headers alone.
    device : str
        In whose memory it is wanted; empty: the host's. Nothing of a GPU is used by this process.

    Raises
    ------
    Error
        As tensord_open.
    """

    def __init__(
        self, path: str, only: Sequence[str] = (), is_index_only: bool = False, device: str = ""
    ) -> None:
        paths = (ctypes.c_char_p * 1)(os.fsencode(path))
        names = (ctypes.c_char_p * len(only))(*map(os.fsencode, only))
        options = _library.OpenOptions(
            struct_bytes=ctypes.sizeof(_library.OpenOptions),
            autostart=-1,
            index_only=int(is_index_only),
            only=names,
            only_count=len(only),
            device=os.fsencode(device) or None,
            hold_only=1,
        )
        self._pointer = ctypes.c_void_p()
        check(library().tensord_open(paths, 1, ctypes.byref(options), ctypes.byref(self._pointer)))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        library().tensord_close(self._pointer)

    def info_json(self) -> str:
        """The JSON of tensord_info."""
        text = ctypes.c_void_p()
        check(library().tensord_info(self._pointer, ctypes.byref(text)))
        return _library.take_text(text)

    def info(self) -> dict[str, Any]:
        return dict(json.loads(self.info_json()))

    @property
    def path(self) -> str:
        return str(self.info()["path"])

    @property
    def is_resident(self) -> bool:
        """False where it is larger than the daemon's host_memory."""
        return bool(library().tensord_resident(self._pointer) == _library.RESIDENT_ARTIFACT)

    def progress(self) -> tuple[int, int]:
        """Bytes that are ready, and of all."""
        progress = _library.Progress()
        check(library().tensord_get_progress(self._pointer, ctypes.byref(progress)))
        return progress.ready_bytes, progress.total_bytes

    def wait_piece(self) -> bool:
        """Waits a moment; True when all bytes are there. Raises if the load failed or the daemon ended."""
        begin = time.monotonic()
        code = library().tensord_wait(self._pointer, None, round(PIECE_SECONDS * 1000))
        if code == _library.OK:
            return True
        error = last_error(code)
        if not isinstance(error, UnavailableError) or time.monotonic() - begin < PIECE_SECONDS * 0.9:
            raise error
        return False

    def tensors(self) -> list[Tensor]:
        """In the order of their names."""
        tensor = _library.Tensor()
        tensors = []
        for position in range(library().tensord_tensor_count(self._pointer)):
            check(library().tensord_tensor_at(self._pointer, position, ctypes.byref(tensor)))
            tensors.append(_tensor_of(tensor))
        return tensors

    def metadata(self) -> dict[str, str]:
        key, value = ctypes.c_char_p(), ctypes.c_char_p()
        metadata = {}
        for position in range(library().tensord_metadata_count(self._pointer)):
            check(
                library().tensord_metadata_at(self._pointer, position, ctypes.byref(key), ctypes.byref(value))
            )
            name = (key.value or b"").decode("utf-8", "replace")
            metadata[name] = (value.value or b"").decode("utf-8", "replace")
        return metadata

    def plan(self, views: Sequence[str]) -> dict[str, Any]:
        """What packing views of it would copy, and the files out of which."""
        return {"files": self._files(), **packed_plan([self._slice(view) for view in views])}

    def _files(self) -> list[dict[str, Any]]:
        files = []
        for position in range(library().tensord_file_count(self._pointer)):
            path: bytes = library().tensord_file_path(self._pointer, position)
            shown = path.decode("utf-8", "replace")
            try:
                files.append({"path": shown, "size_bytes": os.stat(path).st_size})  # noqa: PTH116
            except OSError as error:
                raise os_error(f"look at {shown}", error) from None
        return files

    def _slice(self, view: str) -> Slice:
        name, items = _read_view(view)
        tensor, region = _library.Tensor(), _library.Region()
        check(library().tensord_find_tensor(self._pointer, name, ctypes.byref(tensor)))
        check(library().tensord_resolve(self._pointer, name, items, len(items), ctypes.byref(region)))
        return Slice(
            view,
            _tensor_of(tensor),
            region.offset,
            region.element_bytes,
            tuple(region.shape[: region.rank]),
            tuple(region.strides[: region.rank]),
        )


def check_view(view: str) -> str:
    """The view itself. Raises ValueError where it cannot be read."""
    _read_view(view)
    return view


def _read_view(view: str) -> tuple[bytes, ctypes.Array[_library.IndexItem]]:
    """The name in a view, and the items of its index."""
    text, items = os.fsencode(view), (_library.IndexItem * _library.INDEX_ITEMS_MAX)()
    name_bytes, count = ctypes.c_size_t(), ctypes.c_size_t()
    check(library().tensord_parse_view(text, ctypes.byref(name_bytes), items, ctypes.byref(count)))
    return text[: name_bytes.value], (_library.IndexItem * count.value)(*items[: count.value])


def _tensor_of(tensor: _library.Tensor) -> Tensor:
    return Tensor(
        tensor.name.decode("utf-8", "replace"),
        tensor.dtype_text.decode("utf-8", "replace"),
        tuple(tensor.shape[: tensor.rank]),
        tensor.size_bytes,
        tensor.file,
        tensor.file_offset,
    )


def open_resident(path: str, only: Sequence[str] = (), device: str = "") -> Checkpoint:
    """All that is wanted, in memory or on its way there. Raises ExhaustedError where it does not fit."""
    checkpoint = Checkpoint(path, only, device=device)
    if checkpoint.is_resident:
        return checkpoint
    info = checkpoint.info()
    limit = read_report(daemon.ask("status"), lambda status: size_text(status["limits"]["host_memory"]))
    raise ExhaustedError(
        f"open {info['path']}: {size_text(info['image_bytes'])} cannot be kept in host_memory, which is "
        f"{limit}; raise host_memory, or take some tensors with --only. Programs can copy out of it all the "
        'same: it is then read in batches (resident="view")'
    )
