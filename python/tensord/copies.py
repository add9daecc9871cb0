"""A batch of copies as the library takes it: tensord_copy rows with all they point to."""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import Error, InvalidArgumentError
from .indexing import INDEX_ITEM, Item
from .tensors import DTYPES, OPAQUE, U8, Entry, Target, row_major_strides

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
        ("reserved", "u4"),
    ]
)


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
    """tensord_copy rows with all they point to, in four arrays rather than in thousands of objects."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._name_bytes = 0
        self._items: list[Item] = []
        self._extents: list[int] = []
        self._strides: list[int] = []
        self._rows: list[tuple[int, ...]] = []
        self._kept: tuple[Any, ...] = ()

    def add(self, entry: Entry, items: tuple[Item, ...], target: Target) -> None:
        address, number, shape, strides, on_device = target
        at = len(self._extents) * np.dtype(np.int64).itemsize
        items_at = len(self._items) * INDEX_ITEM.itemsize
        self._rows.append(
            (self._name_bytes, items_at, len(items), address, number, len(shape), at, at, on_device, 0)
        )
        self._names.append(entry.encoded)
        self._name_bytes += len(entry.encoded) + 1
        self._items += items
        self._extents += shape
        self._strides += strides

    def rows(self) -> np.ndarray:
        """Valid as long as this batch."""
        names = ctypes.create_string_buffer(b"\0".join(self._names))
        items = np.array(self._items, dtype=INDEX_ITEM)
        extents = np.array(self._extents, dtype=np.uint64)
        strides = np.array(self._strides, dtype=np.int64)
        self._kept = (names, items, extents, strides)
        rows = np.array(self._rows, dtype=COPY)
        rows["name"] += np.uint64(ctypes.addressof(names))
        rows["items"] += np.uint64(items.ctypes.data)
        rows["target_shape"] += np.uint64(extents.ctypes.data)
        rows["target_strides"] += np.uint64(strides.ctypes.data)
        return rows


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
