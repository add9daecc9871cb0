"""Recorder: collects the copies that loaders make out of lazy tensors, and runs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..copies import CASTS, LoadReport
from ..tensors import DTYPES, U8, Entry, row_major_strides, torch_dtype, torch_type
from .copy_table import SHAPE, TARGET, CopyTable, Record, execute
from .lazy import COPY, VIEW, Geometry, LazyTensor, Source, kind_of, kinds, lazy_tensor, real

if TYPE_CHECKING:
    from ..client import Model

_NO_INTERVALS = np.zeros((0, 3), dtype=np.int64)


def _numbers() -> dict[torch.dtype, int]:
    """tensord_dtype of each type of torch's whose elements are whole bytes to it."""
    known = {torch_type(dtype.number): U8 if dtype.is_packed else dtype.number for dtype in DTYPES}
    known.pop(None, None)
    return known


_NUMBERS = _numbers()
_TYPES = {dtype.number: torch_type(dtype.number) for dtype in DTYPES if dtype.bits}

# By types of source and target: their numbers, or None where the library cannot convert.
_pairs: dict[tuple[torch.dtype, torch.dtype], tuple[int, int] | None] = {}

_is_memory: dict[type, bool] = {}


def _pair_of(source: torch.dtype, target: torch.dtype) -> tuple[int, int] | None:
    numbers = _NUMBERS.get(source), _NUMBERS.get(target)
    if None in numbers or (source is not target and numbers not in CASTS):
        return None
    return numbers  # type: ignore[return-value]


def is_memory(kind: type) -> bool:
    """Whether tensors of a class are memory that may be written to, not something that acts like a tensor."""
    known = _is_memory.get(kind)
    if known is None:
        known = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
        _is_memory[kind] = known
    return known


class Recorder:
    """What one load has recorded and done so far. Several threads may copy at once.

    Until `finish`, copies out of lazy tensors are put down; then they run as one plan, and from then on each
    runs at once.

    Attributes
    ----------
    lock : threading.RLock
        Guards all that follows.
    plain : dict
        Name of a tensor that was needed as such, to the reason.
    intervals : list of int64 [n, 3]
        What was written: begin and end of an address range, and how many bytes in it.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.lock = threading.RLock()
        self.records: list[Record] = []
        self.record_count = 0
        self.tensor_count = 0  # handed out
        self.used: set[bytes] = set()  # names of tensors that records copied out of
        self.keeps_tables = False
        self.tables: list[CopyTable] = []
        self.is_finished = False
        self.plain: dict[str, str] = {}
        self.plain_bytes = 0
        self.meta_count = 0
        self.foreign: str | None = None  # what else touched the memory of the module
        self.intervals: list[np.ndarray] = []
        self.reports: list[LoadReport] = []
        self.end: float | None = None  # of the last copy, on the monotonic clock
        self._storages: set[int] = set()  # of targets of records, as far as they were looked at
        self._looked_at = 0
        self._thread = threading.get_ident()

    def tensor(self, name: str, entry: Entry) -> LazyTensor:
        """A lazy tensor of a whole tensor of the checkpoint.

        Raises
        ------
        UnsupportedDtypeError
        """
        dtype = _TYPES.get(entry.number)
        if dtype is None:
            dtype = torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
        shape = entry.shape if DTYPES[entry.number].bits >= 8 else entry.memory_shape
        if len(shape) == 2:
            geometry: Geometry = (shape, (shape[1] or 1, 1), 0)
        else:
            geometry = (shape, row_major_strides(shape, 1), 0)
        return lazy_tensor(Source(self, name, entry), geometry, dtype)

    def read(self, entry: Entry) -> torch.Tensor:
        """The real tensor, zero-copy where the device is the CPU; waits for its bytes."""
        read: torch.Tensor = self.model.tensor(entry, framework="pt")
        return read if self.device.type == "cpu" else read.to(self.device)

    # ---- copies ----------------------------------------------------------------------------------

    def copy(self, target: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
        """``target.copy_(lazy)``."""
        source, geometry, dtype = lazy._state
        kind = type(target)
        types = (dtype, target.dtype)
        numbers = _pairs.get(types)
        if numbers is None:
            numbers = _pairs[types] = _pair_of(*types)
        if source.written or numbers is None or not (_is_memory.get(kind) or is_memory(kind)):
            why = "it was written to" if source.written else f"a copy into {target.dtype} {kind.__name__}"
            return self._copy_plain(target, lazy, why)
        shape, stride, offset = geometry if lazy._inner is None else lazy._inner
        if target.shape != shape:
            stride = _expanded(shape, stride, target, lazy)
            shape = tuple(target.shape)
        if target.is_meta:
            self.meta_count += 1
            return target
        if self.keeps_tables and threading.get_ident() != self._thread:
            self.foreign = "copies came from several threads"
        record = (source.entry.encoded, numbers[0], offset, shape, stride, numbers[1], target)
        with self.lock:
            self.records.append(record)
            if self.is_finished:
                self.run()
        return target

    def _copy_plain(self, target: torch.Tensor, lazy: LazyTensor, why: str) -> torch.Tensor:
        with self.lock:
            given = real(lazy, why)
            self.before_touching((target,))
            target.copy_(given)
            self.note_written((target,))
        return target

    def run(self) -> None:
        """Runs what is recorded. The lock is held: no thread sees a copy that is half done."""
        with self.lock:
            records, self.records = self.records, []
            self._storages.clear()
            self._looked_at = 0
            records = [record for record in records if 0 not in record[SHAPE]]
            if not records:
                return
            table = CopyTable.of(records)
            with torch._C._DisableTorchDispatch():
                self.reports += execute(self.model, table)
            self.note_table(table)

    def note_table(self, table: CopyTable) -> None:
        """A table that was executed."""
        if self.keeps_tables:
            self.tables.append(table)
        self.record_count += len(table)
        self.used.update(table.names)
        self.intervals.append(table.intervals())
        self.end = time.monotonic()

    def finish(self) -> None:
        """The loader has seen all tensors: runs what is recorded, and from now on each copy at once."""
        with self.lock:
            self.is_finished = True
            self.run()

    def drop(self) -> int:
        """Forgets what is recorded and has not run; says how many copies that were."""
        with self.lock:
            count = len(self.records)
            self.records = []
            self.is_finished = True
            return count

    # ---- what else happens -----------------------------------------------------------------------

    def before_touching(self, tensors: Iterable[torch.Tensor]) -> None:
        """Runs what is recorded where one of the tensors has memory that records are going to write."""
        if self.records and any(storage_of(one) in self._pending() for one in tensors):
            self.run()

    def _pending(self) -> set[int]:
        for record in self.records[self._looked_at :]:
            self._storages.add(storage_of(record[TARGET]))
        self._looked_at = len(self.records)
        return self._storages

    def note_plain(self, source: Source, lazy: LazyTensor, why: str) -> None:
        if source.name not in self.plain:
            self.plain[source.name] = why
            self.plain_bytes += lazy.numel() * lazy.element_size()

    def note_written(self, tensors: Iterable[torch.Tensor]) -> None:
        rows = [interval_of(one) for one in tensors if type(one) is not LazyTensor and not one.is_meta]
        if rows:
            self.intervals.append(np.array(rows, dtype=np.int64))
            self.end = time.monotonic()

    def written(self) -> np.ndarray:
        """All of `intervals`; int64 [n, 3]."""
        with self.lock:
            return np.concatenate([_NO_INTERVALS, *self.intervals])


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are somewhere."""
    if tensor.numel() == 0 or tensor.is_meta or not is_memory(type(tensor)):
        return True
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def interval_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Where a tensor's memory begins and ends, and how many bytes its elements have."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return begin, begin, 0
    reach = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride()))
    return begin, begin + (reach + 1) * size, tensor.numel() * size


def _expanded(
    shape: tuple[int, ...], stride: tuple[int, ...], target: torch.Tensor, lazy: LazyTensor
) -> tuple[int, ...]:
    """Strides that repeat a tensor so that it has the shape of its target."""
    missing = target.ndim - len(shape)
    steps = (0,) * missing + stride
    extents = (1,) * missing + shape
    if missing < 0 or any(one not in (1, wanted) for one, wanted in zip(extents, target.shape)):
        source = lazy._source
        raise RuntimeError(
            f"copy tensor {source.entry.name!r}: the target has shape {list(target.shape)}, "
            f"what is copied {list(shape)}"
        )
    return tuple(
        0 if one == 1 and wanted != 1 else step for one, wanted, step in zip(extents, target.shape, steps)
    )


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation of this thread: records run before anything else looks at what they write.

    Parameters
    ----------
    watched : dict
        Storage (see `storage_of`) to a name: what touches one of these otherwise than by a record is put down
        in ``recorder.foreign``.
    """

    def __init__(self, recorder: Recorder, watched: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kinds.get(func) == VIEW:
            return func(*args, **(kwargs or {}))
        if func is COPY and type(args[1]) is LazyTensor and type(args[0]) is not LazyTensor:
            return args[1]._source.recorder.copy(args[0], args[1])
        if kind_of(func) != VIEW:
            self._look(func, args)
            if kwargs:
                self._look(func, kwargs.values())
        return func(*args, **(kwargs or {}))

    def _look(self, func: Any, args: Iterable[Any]) -> None:
        recorder = self._recorder
        for arg in args:
            if isinstance(arg, torch.Tensor):
                if type(arg) is LazyTensor or arg.is_meta or arg.numel() == 0:
                    continue
                storage = storage_of(arg)
                if storage in self._watched and recorder.foreign is None:
                    recorder.foreign = f"{func} touched {self._watched[storage]}"
                if recorder.records and storage in recorder._pending():
                    recorder.run()
            elif isinstance(arg, (list, tuple)):
                self._look(func, arg)
