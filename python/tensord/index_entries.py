"""What the library's index says of tensors, as Entry tuples: of one, or of all of a checkpoint at once."""

from __future__ import annotations

import ctypes
import hashlib
import struct
from typing import Any

import numpy as np

from . import _library
from ._library import check, library
from .tensors import DTYPES, OPAQUE, Entry

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


class Index:
    """All tensors of a tensord_model, in the order of names, before anything is made of them.

    May outlive the tensord_model."""

    def __init__(self, model: Any) -> None:
        count = library().tensord_tensor_count(model)
        tensors = (_library.Tensor * max(count, 1))()
        ask, first, size = library().tensord_tensor_at, tensors[0], _TENSOR.itemsize
        for position in range(count):
            code = ask(model, position, ctypes.byref(first, position * size))
            if code:
                check(code)
        rows = np.frombuffer(tensors, dtype=_TENSOR, count=count)
        self.rows = rows
        self.names: list[bytes] = list(map(_string_at, rows["name"].tolist()))
        self.shapes: list[bytes] = list(map(_string_at, rows["shape"].tolist(), (rows["rank"] * 8).tolist()))
        unknown = rows["dtype_text"][rows["dtype"] == OPAQUE].tolist()
        self._texts = {at: _string_at(at).decode("utf-8", "replace") for at in unknown}

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self) -> list[Entry]:
        made = []
        for encoded, shape, (_, text, _, rank, dtype, file, _, offset, size, data) in zip(
            self.names, self.shapes, self.rows.tolist()
        ):
            extents = _SHAPES[rank].unpack(shape)
            said = DTYPES[dtype].name if dtype else self._texts[text]
            made.append(Entry(encoded.decode(), encoded, dtype, said, extents, file, offset, size, data))
        return made

    def file_order(self) -> np.ndarray:
        """Positions of tensors as they lie in the files, one file after another."""
        return np.lexsort((self.rows["file_offset"], self.rows["file"]))

    def digest(self, positions: np.ndarray) -> bytes:
        """Of names, types and shapes of these tensors, in this order."""
        chosen = positions.tolist()
        digest = hashlib.sha256(b"\0".join([self.names[at] for at in chosen]))
        digest.update(self.rows["dtype"][positions].tobytes())
        digest.update(self.rows["rank"][positions].tobytes())
        digest.update(b"".join([self.shapes[at] for at in chosen]))
        return digest.digest()
