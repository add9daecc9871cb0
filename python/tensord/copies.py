"""A batch of copies as the library takes it: tensord_copy rows with all they point to."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

import numpy as np

from .errors import Error, InvalidArgumentError
from .indexing import INDEX_ITEM, Item
from .tensors import (
    BF16,
    DTYPES,
    F8_E4M3,
    F8_E5M2,
    F16,
    F32,
    F64,
    OPAQUE,
    U8,
    Entry,
    Target,
    row_major_strides,
)

# tensord_copy
COPY = np.dtype(
    [
        ("name", "u8"),
        ("items", "u8"),
        ("item_count", "u8"),
        ("target", "u8"),
        ("target_dtype", "u4"),
        ("target_rank", "u4"),
        ("target_shape", "u8"),
        ("target_strides", "u8"),
        ("on_device", "u4"),
        ("source_dtype", "u4"),
        ("source_offset", "u8"),
        ("source_strides", "u8"),
    ]
)

# Between which types the library converts, by number of tensord_dtype.
_FLOATS = (F16, BF16, F32, F64)
CASTS = frozenset((a, b) for a in (*_FLOATS, F8_E4M3, F8_E5M2) for b in _FLOATS if a != b)


class Region(NamedTuple):
    """Bytes of a tensor as elements, in the shape of their target: a source that no index describes."""

    number: int  # tensord_dtype of the elements
    offset: int  # bytes from the tensor's first one
    strides: tuple[int, ...]  # bytes; 0 repeats


Part = Union[tuple[Item, ...], Region]


@dataclass(frozen=True)
class LoadReport:
    """What a `load_into` did."""

    bytes: int  # written
    records: int  # strided copies the plan came down to
    threads: int
    device_bytes: int  # of `bytes`: written to GPU memory by the daemon's copy engines
    staged_bytes: int  # of `bytes`: that came to GPU memory in a slower way; `slower_why` says why
    slower_why: str
    plan_seconds: float
    wait_seconds: float  # for bytes that were not there yet
    copy_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.copy_seconds if self.copy_seconds > 0 else 0.0


class Batch:
    """tensord_copy rows with all they point to, in few arrays rather than in thousands of objects."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._items: list[Item] = []
        self._item_counts: list[int] = []
        self._targets: list[tuple[int, int, int, bool]] = []
        self._extents: list[int] = []
        self._strides: list[int] = []
        self._regions: list[tuple[int, int, int, int]] = []
        self._region_strides: list[int] = []
        self._kept: tuple[Any, ...] = ()

    def add(self, entry: Entry, part: Part, target: Target) -> None:
        address, number, shape, strides, on_device = target
        if isinstance(part, Region):
            at = len(self._region_strides)
            self._regions.append((len(self._names), part.number, part.offset, at))
            self._region_strides += part.strides
            self._item_counts.append(0)
        else:
            self._item_counts.append(len(part))
            self._items += part
        self._names.append(entry.encoded)
        self._targets.append((address, number, len(shape), on_device))
        self._extents += shape
        self._strides += strides

    def rows(self) -> np.ndarray:
        """Valid as long as this batch."""
        names, name_addresses = packed_names(self._names)
        items = np.array(self._items, dtype=INDEX_ITEM)
        counts = np.array(self._item_counts, dtype=np.int64)
        extents = np.array(self._extents, dtype=np.uint64)
        strides = np.array(self._strides, dtype=np.int64)
        targets = np.array(self._targets, dtype=np.uint64).reshape(-1, 4)
        rows = np.zeros(len(self._names), dtype=COPY)
        rows["name"] = name_addresses
        rows["items"] = items.ctypes.data + starts_of(counts) * INDEX_ITEM.itemsize
        rows["item_count"] = counts
        rows["target"], rows["target_dtype"], rows["target_rank"], rows["on_device"] = targets.T
        at = starts_of(targets[:, 2].astype(np.int64)) * WORD_BYTES
        rows["target_shape"] = extents.ctypes.data + at
        rows["target_strides"] = strides.ctypes.data + at
        # One more, so that a region without dimensions has an address too.
        region_strides = np.array([*self._region_strides, 0], dtype=np.int64)
        if self._regions:
            regions = np.array(self._regions, dtype=np.uint64)
            chosen = regions[:, 0]
            rows["source_dtype"][chosen], rows["source_offset"][chosen] = regions[:, 1], regions[:, 2]
            rows["source_strides"][chosen] = region_strides.ctypes.data + regions[:, 3] * np.uint64(
                WORD_BYTES
            )
        self._kept = (names, items, extents, strides, region_strides)
        return rows


WORD_BYTES = 8

# Of one element, by number of tensord_dtype; packed and unknown ones count as bytes.
ITEM_BYTES = np.array([max(dtype.bits // 8, 1) for dtype in DTYPES], dtype=np.int64)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where each of several runs begins that lie one after another."""
    starts = np.zeros(len(counts), dtype=np.int64)
    np.cumsum(counts[:-1], out=starts[1:])
    return starts


def packed_names(names: list[bytes]) -> tuple[Any, np.ndarray]:
    """One buffer with all names, each with its NUL, and their addresses in it."""
    buffer = ctypes.create_string_buffer(b"\0".join(names))
    counts = np.fromiter(map(len, names), dtype=np.int64, count=len(names)) + 1
    return buffer, ctypes.addressof(buffer) + starts_of(counts)


def bytes_target(entry: Entry, shape: tuple[int, ...], target: Target, *, is_whole: bool) -> Target:
    """The target of types that are copied as bytes: packed ones, and unknown ones into uint8.

    Parameters
    ----------
    shape : tuple of int
        Of the region to copy, in bytes as the library counts them.
    is_whole : bool
        Whether the region is the whole tensor.

    Raises
    ------
    InvalidArgumentError
        Another type, another number of bytes, or gaps between them.
    """
    wanted = entry.memory_shape if is_whole else shape
    fits = target.shape == wanted if is_whole else math.prod(target.shape) == math.prod(shape)
    is_dense = target.strides == row_major_strides(target.shape, 1)
    number = U8 if entry.number == OPAQUE else entry.number
    if not fits or not is_dense or target.number != number:
        raise InvalidArgumentError(
            f"copy tensor {entry.name!r}: its {entry.dtype_text} elements need a dense target of "
            f"{list(wanted)} bytes as {DTYPES[number].name}, "
            f"not {list(target.shape)} as {DTYPES[target.number].name}"
        )
    return Target(target.address, entry.number, shape, row_major_strides(shape, 1), target.on_device)


def interruptible(call: Callable[[], Error | None], cancel: ctypes.c_int32) -> Error | None:
    """Runs `call` so that Ctrl-C is answered: `cancel` is set, and the call has ended when that is raised."""
    if threading.current_thread() is not threading.main_thread():  # signals are for that one
        return call()
    outcome: list[Error | None] = []
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.append(call())
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="tensord call")
    try:
        try:
            thread.start()
        except RuntimeError:  # there can be no more threads
            ended.set()
            raise
        ended.wait()  # not join(): interrupted, it takes a thread that runs for one that has ended (3.11)
    except BaseException:
        cancel.value = 1
        while not ended.is_set():
            with suppress(KeyboardInterrupt):
                time.sleep(0.002)
        raise
    return outcome.pop()
