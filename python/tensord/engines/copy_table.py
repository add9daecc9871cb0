"""CopyTable: thousands of copies as a few numpy arrays, one row of each per copy.

    names, addresses, source_offsets, ...   [copies]
    extents, source_strides, target_strides [sum of ranks], of one copy after another

What is traced and what a cached plan remembers both become such a table; the library takes it in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..copies import COPY, ITEM_BYTES, WORD_BYTES, LoadReport, Region, packed_names, starts_of
from ..devices import wait_for_streams
from ..errors import Error, InvalidArgumentError, UnsupportedError
from ..loading import Order, load_report, run_rows

if TYPE_CHECKING:
    import torch

    from ..client import Model


# One copy that a loader asked for: name, tensord_dtype of the source, its offset, shape and stride
# in elements, tensord_dtype of the target, the target. A bare tuple: there are tens of thousands.
Record = tuple[bytes, int, int, tuple[int, ...], tuple[int, ...], int, "torch.Tensor"]
SHAPE: Final = 3  # where it is in it
TARGET: Final = 6


@dataclass(frozen=True)
class CopyTable:
    names: list[bytes]
    source_numbers: np.ndarray
    source_offsets: np.ndarray  # bytes
    target_numbers: np.ndarray
    addresses: np.ndarray
    on_device: np.ndarray
    ranks: np.ndarray
    extents: np.ndarray
    source_strides: np.ndarray  # bytes
    target_strides: np.ndarray  # bytes
    target_at: Callable[[int], Any] = field(compare=False)  # the tensor that a copy writes to

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def of(records: Sequence[Record]) -> CopyTable:
        count = len(records)
        names, source_numbers, offsets, shapes, strides, target_numbers, targets = (
            zip(*records) if records else ((),) * 7
        )
        ranks = np.fromiter(map(len, shapes), np.int64, count)
        sources = np.fromiter(source_numbers, np.int64, count)
        numbers = np.fromiter(target_numbers, np.int64, count)
        flat = int(ranks.sum())
        source_strides = np.fromiter(chain.from_iterable(strides), np.int64, flat)
        target_strides = np.fromiter(
            chain.from_iterable([target.stride() for target in targets]), np.int64, flat
        )
        return CopyTable(
            list(names),
            sources,
            np.fromiter(offsets, np.int64, count) * ITEM_BYTES[sources],
            numbers,
            np.fromiter([target.data_ptr() for target in targets], np.uint64, count),
            ~np.fromiter([target.is_cpu for target in targets], np.bool_, count),
            ranks,
            np.fromiter(chain.from_iterable(shapes), np.int64, flat),
            source_strides * np.repeat(ITEM_BYTES[sources], ranks),
            target_strides * np.repeat(ITEM_BYTES[numbers], ranks),
            targets.__getitem__,
        )

    def rows(self) -> tuple[np.ndarray, tuple[Any, ...]]:
        """tensord_copy rows, and what must live as long."""
        buffer, name_addresses = packed_names(self.names)
        # One more, so that a region without dimensions has an address too.
        extents = np.append(self.extents, 0).astype(np.uint64)
        sources = np.append(self.source_strides, 0).astype(np.int64)
        targets = np.append(self.target_strides, 0).astype(np.int64)
        at = starts_of(self.ranks) * WORD_BYTES
        rows = np.zeros(len(self), dtype=COPY)
        rows["name"] = name_addresses
        rows["target"] = self.addresses
        rows["target_dtype"] = self.target_numbers
        rows["target_rank"] = self.ranks
        rows["target_shape"] = extents.ctypes.data + at
        rows["target_strides"] = targets.ctypes.data + at
        rows["on_device"] = self.on_device
        rows["source_dtype"] = self.source_numbers
        rows["source_offset"] = self.source_offsets
        rows["source_strides"] = sources.ctypes.data + at
        return rows, (buffer, extents, sources, targets)

    def part(self, begin: int, end: int) -> CopyTable:
        starts = starts_of(np.append(self.ranks, 0))
        flat = slice(int(starts[begin]), int(starts[end]))
        some = slice(begin, end)
        return replace(
            self,
            names=self.names[some],
            source_numbers=self.source_numbers[some],
            source_offsets=self.source_offsets[some],
            target_numbers=self.target_numbers[some],
            addresses=self.addresses[some],
            on_device=self.on_device[some],
            ranks=self.ranks[some],
            extents=self.extents[flat],
            source_strides=self.source_strides[flat],
            target_strides=self.target_strides[flat],
            target_at=lambda at: self.target_at(begin + at),
        )

    def intervals(self) -> np.ndarray:
        """Of each copy: where its target begins and ends, and how many bytes it writes; int64 [copies, 3]."""
        reach = per_copy_sum((self.extents - 1) * self.target_strides, self.ranks)
        begins = self.addresses.astype(np.int64)
        item_bytes = ITEM_BYTES[self.target_numbers]
        counts = np.ones(len(self), dtype=np.int64)
        np.multiply.at(counts, np.repeat(np.arange(len(self)), self.ranks), self.extents)
        return np.stack((begins, begins + reach + item_bytes, counts * item_bytes), axis=1)

    def order(self, model: Model, at: int) -> Order:
        """One copy as `load_into` knows it."""
        start, rank = int(self.ranks[:at].sum()), int(self.ranks[at])
        strides = tuple(self.source_strides[start : start + rank].tolist())
        region = Region(int(self.source_numbers[at]), int(self.source_offsets[at]), strides)
        return model.entry(self.names[at].decode()), region, self.target_at(at)


def per_copy_sum(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The sum over the dimensions of each copy."""
    sums = np.concatenate((np.zeros(1, np.int64), np.cumsum(values)))
    starts = starts_of(ranks)
    found: np.ndarray = sums[starts + ranks] - sums[starts]
    return found


def execute(model: Model, table: CopyTable) -> list[LoadReport]:
    """Runs all copies, as one plan where no two of them write the same memory; else the later ones win.

    Raises
    ------
    Error
        As `Model.load_into`.
    """
    if not len(table):
        return []
    if table.on_device.any():
        wait_for_streams((table.target_at(int(at)) for at in np.flatnonzero(table.on_device)), None)
    return _execute(model, table)


def _execute(model: Model, table: CopyTable) -> list[LoadReport]:
    rows, _kept = table.rows()
    try:
        report, reasons = run_rows(model, rows, cast=True, threads=0)
    except (InvalidArgumentError, UnsupportedError) as error:
        if len(table) == 1 or error.target_dirty:
            raise
        refused: Error | None = error
    else:
        refused = None
    if refused is None:
        orders = _Orders(model, table) if any(reasons) else ()
        return [load_report(model, orders, report, reasons, cast=True, threads=0)]
    # One plan may write no byte twice, a loader may. What is refused for another reason is so to the end.
    del refused
    half = len(table) // 2
    return _execute(model, table.part(0, half)) + _execute(model, table.part(half, len(table)))


class _Orders(Sequence[Order]):
    """The orders of a table, made when they are asked for."""

    def __init__(self, model: Model, table: CopyTable) -> None:
        self._model = model
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, at: Any) -> Any:
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._table.order(self._model, at)
