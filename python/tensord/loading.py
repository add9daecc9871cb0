"""Copies out of a Model into the caller's memory: what a call of load_into comes down to.

{name: target}     --orders_of-->  Order (entry, part, target)  --Batch-->  tensord_copy rows  --run_rows-->
traced regions     -------------------------- batch.py of engines/ -------^
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as AbstractMapping
from typing import TYPE_CHECKING, Any, NoReturn, Union

import numpy as np

from . import _library
from ._library import last_error, library
from .bulk import whole_tensor_rows
from .copies import Batch, LoadReport, Part, Region, bytes_target, interruptible
from .devices import copy_left_out, wait_for_streams
from .errors import Error, InvalidArgumentError, InvalidTypeError
from .indexing import parse
from .tensors import AnyTensor, Entry, Place, target_of

if TYPE_CHECKING:
    from .client import Model

LoadTargets = Union[AbstractMapping[str, AnyTensor], Iterable[tuple[str, Any, AnyTensor]]]

Order = tuple[Entry, Part, Any]  # what, which part of it, and where it goes
Run = Callable[..., tuple[_library.CopyReport, bytes]]  # `run` of one model
OnDevice = Callable[[Entry, Part, Any], Any]  # `_on_device` of one model


def orders_of(model: Model, targets: LoadTargets) -> list[Order]:
    """What `Model.load_into` was given, with the entries of the index."""
    if isinstance(targets, AbstractMapping):
        return [(model.entry(name), (), target) for name, target in targets.items()]
    return [(model.entry(name), parse(index), target) for name, index, target in _triples(targets)]


def _triples(targets: Iterable[Any]) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(targets, Iterable):
        raise InvalidTypeError(
            f"load_into takes {{name: tensor}} or [(name, index, tensor), ...], not {targets!r}"
        )
    for order in targets:
        if not isinstance(order, (tuple, list)) or len(order) != 3:
            raise InvalidTypeError(
                "load_into takes {name: tensor} or [(name, index, tensor), ...]; "
                f"an element of the list is {type(order).__name__}"
            )
        yield order[0], order[1], order[2]


def load(
    model: Model, orders: Sequence[Order], *, cast: bool, threads: int, stream: Any = None
) -> LoadReport:
    """`Model.load_into` of orders."""
    wait_for_streams((target for _, _, target in orders), stream)
    report, reasons = run(model, orders, cast=cast, threads=threads)
    return load_report(model, orders, report, reasons, cast=cast, threads=threads, stream=stream)


def load_report(
    model: Model,
    orders: Sequence[Order],
    report: _library.CopyReport,
    reasons: bytes,
    *,
    cast: bool,
    threads: int,
    stream: Any = None,
) -> LoadReport:
    """Copies in another way what the library left out (see `run`), and says what became of all."""
    begin = time.monotonic()
    staged_bytes, slower_why = 0, ""
    if any(reasons):
        staged_bytes, slower_why = copy_left_out(
            functools.partial(run, model),
            None if model._device is None else functools.partial(_on_device, model),
            orders,
            reasons,
            report,
            stream,
            cast=cast,
            threads=threads,
        )
    return LoadReport(
        report.bytes + staged_bytes,
        report.record_count,
        report.thread_count,
        report.device_bytes,
        staged_bytes,
        slower_why,
        report.plan_ns / 1e9,
        report.wait_ns / 1e9,
        report.copy_ns / 1e9 + time.monotonic() - begin,
    )


def _on_device(model: Model, entry: Entry, part: Part, target: Any) -> Any:
    """What a target is to become equal to, in the GPU memory where it lies."""
    if isinstance(part, Region):
        place = Place(model._keeper(entry), entry.address + part.offset, tuple(target.shape), part.strides)
        return model._at(entry._replace(number=part.number), place, "pt", False)
    return model._at(entry, model.place_of(entry, part)._replace(shape=tuple(target.shape)), "pt", False)


def run(
    model: Model, orders: Sequence[Order], *, cast: bool, threads: int
) -> tuple[_library.CopyReport, bytes]:
    """One call of the library. Of each order: 0, or why it was left out (a `_library.LEFT_OUT_*`)."""
    if not any(part for _, part, _ in orders):
        described = whole_tensor_rows([entry for entry, _, _ in orders], [target for _, _, target in orders])
        if described is not None:
            return run_rows(model, described[0], cast=cast, threads=threads)
    try:
        batch = _batch_of(model, orders)
        return run_rows(model, batch.rows(), cast=cast, threads=threads)
    except InvalidArgumentError as error:
        _blame_an_index(model, error, orders)


def _batch_of(model: Model, orders: Sequence[Order]) -> Batch:
    batch = Batch()
    for entry, part, target in orders:
        described = target_of(entry.name, target)
        if entry.is_bytes and not isinstance(part, Region):
            region = model._resolve(entry, part)
            shape = tuple(region.shape[: region.rank])
            described = bytes_target(entry, shape, described, is_whole=not part)
        batch.add(entry, part, described)
    return batch


def run_rows(
    model: Model, rows: np.ndarray, *, cast: bool, threads: int
) -> tuple[_library.CopyReport, bytes]:
    """`run` of tensord_copy rows; what they point to must stay where it is."""
    handle = model._open_handle()
    if not isinstance(threads, int):
        raise InvalidTypeError(f"load_into: threads is a number, not {threads!r}")
    cancel = ctypes.c_int32(0)
    left_out = ctypes.create_string_buffer(max(len(rows), 1))
    options = _library.CopyOptions(
        ctypes.sizeof(_library.CopyOptions),
        int(cast),
        threads,
        0,
        ctypes.pointer(cancel),
        ctypes.addressof(left_out),
    )
    report = _library.CopyReport()

    def copy() -> Error | None:
        code = library().tensord_load_into(
            handle.pointer, rows.ctypes.data, len(rows), ctypes.byref(options), ctypes.byref(report)
        )
        return None if code == _library.OK else last_error(code)

    error = copy() if model._has_all_bytes() else interruptible(copy, cancel)
    if error is not None:
        try:
            raise error
        finally:
            del error  # else it and this frame hold each other, and with them the targets
    return report, left_out.raw[: len(rows)]


def _blame_an_index(model: Model, error: Error, orders: Sequence[Order]) -> NoReturn:
    """Raises `error`, as an InvalidIndexError where an index is to blame."""
    if type(error) is InvalidArgumentError:
        for entry, part, _ in orders:
            if part and not isinstance(part, Region):
                model._resolve(entry, part)
    try:
        raise error
    finally:
        del error
