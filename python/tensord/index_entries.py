"""What the library's index says of tensors, as Entry tuples: of one, or of all of a checkpoint at once."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np

from . import _library
from ._library import check, library
from .tensors import Entry

_string_at = ctypes.string_at

# tensord_tensor
_TENSOR = np.dtype(
    [
        ("name", "u8"),
        ("dtype_text", "u8"),
        ("shape", "u8"),
        ("rank", "u4"),
        ("dtype", "u4"),
        ("file", "u4"),
        ("reserved", "u4"),
        ("file_offset", "u8"),
        ("size_bytes", "u8"),
        ("data", "u8"),
    ]
)

_SHAPES = [struct.Struct(f"={rank}Q") for rank in range(_library.RANK_MAX + 1)]


def entry_of(tensor: _library.Tensor) -> Entry:
    encoded: bytes = tensor.name
    return Entry(
        encoded.decode(),
        encoded,
        tensor.dtype,
        tensor.dtype_text.decode("utf-8", "replace"),
        tuple(tensor.shape[: tensor.rank]),
        tensor.file,
        tensor.file_offset,
        tensor.size_bytes,
        tensor.data or 0,
    )


def index_entries(model: Any) -> list[Entry]:
    """All tensors of a tensord_model, in the order of names; some microseconds each."""
    count = library().tensord_tensor_count(model)
    tensors = (_library.Tensor * max(count, 1))()
    ask, first = library().tensord_tensor_at, tensors[0]
    for position in range(count):
        check(ask(model, position, ctypes.byref(first, position * _TENSOR.itemsize)))
    rows = np.frombuffer(tensors, dtype=_TENSOR, count=count)
    texts: dict[int, str] = {}
    entries = []
    for name, text, shape, rank, dtype, file, _, offset, size, data in rows.tolist():
        encoded = _string_at(name)
        if text not in texts:
            texts[text] = _string_at(text).decode("utf-8", "replace")
        extents = _SHAPES[rank].unpack(_string_at(shape, 8 * rank)) if rank else ()
        entries.append(
            Entry(encoded.decode(), encoded, dtype, texts[text], extents, file, offset, size, data)
        )
    return entries
