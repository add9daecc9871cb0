"""Copies into GPU memory that the daemon cannot do: through a tensor on the device, or on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ._library import LEFT_OUT_BY_SHAPE, CopyReport
from .copies import Part, Region
from .errors import Error, UnsupportedError
from .tensors import DTYPES, OPAQUE, Entry, torch_module, torch_type

if TYPE_CHECKING:
    from .loading import Order, Run

# Of device memory that is taken for a while: enough for the bus, small beside any model.
_TEMPORARY_BYTES_MAX = 256 << 20

_said: set[str] = set()


def wait_for_streams(targets: Iterable[Any], stream: Any) -> None:
    """Waits until what was begun with the targets on their devices' current streams (or `stream`) is over.

    The daemon writes to their memory at once, and knows nothing of streams.
    """
    devices = {target.device for target in targets if getattr(target, "is_cuda", False)}
    for device in devices:
        (stream or torch_module().cuda.current_stream(device)).synchronize()


def _say_once(why: str) -> None:
    """Logs why copies take a slower way, each reason once in this process."""
    if why not in _said:
        _said.add(why)
        logging.getLogger("tensord").warning("load_into GPU memory takes a slower way: %s", why)


def copy_left_out(
    run: Run,
    orders: Sequence[Order],
    reasons: Sequence[int],
    report: CopyReport,
    stream: Any,
    *,
    cast: bool,
    threads: int,
) -> tuple[int, str]:
    """Copies what `loading.run` left out.

    Parameters
    ----------
    run : callable
        `loading.run` of the model.
    reasons : sequence of int
        For each order: LEFT_OUT_BY_SHAPE, LEFT_OUT_BY_MEMORY, or 0 for what is copied.
    report : CopyReport
        Of what is copied.

    Returns
    -------
    int
        How many bytes were written to the targets.
    str
        Why they were left out.
    """
    left_out = [(order, why) for order, why in zip(orders, reasons) if why]
    slower_why = report.left_out.decode("utf-8", "replace")
    for (entry, _, target), _ in left_out:
        if not hasattr(target, "copy_"):
            raise UnsupportedError(
                f"load_into {entry.name!r}: {slower_why}; the slower way takes torch tensors alone",
                target_dirty=report.bytes > 0,
            )
    _say_once(slower_why)
    try:
        staged_bytes = _copy_slower(
            run, [order for order, _ in left_out], [why for _, why in left_out], stream, cast, threads
        )
    except Error as error:
        error.target_dirty = True  # maybe by an earlier one
        raise
    return staged_bytes, slower_why


def _copy_slower(
    run: Run, orders: Sequence[Order], reasons: Sequence[int], stream: Any, cast: bool, threads: int
) -> int:
    torch = torch_module()
    by_cpu = [order for order, why in zip(orders, reasons) if why != LEFT_OUT_BY_SHAPE]
    by_shape = [order for order, why in zip(orders, reasons) if why == LEFT_OUT_BY_SHAPE]
    with torch.no_grad(), torch.cuda.stream(stream):
        for group in _groups(by_shape):
            by_cpu += _through_device(run, group, threads)
        for entry, items, target in by_cpu:
            staged = torch.empty(target.shape, dtype=target.dtype)
            run([(entry, items, staged)], cast=cast, threads=threads)
            target.copy_(staged)
        wait_for_streams([target for _, _, target in orders], None)
    return sum(target.numel() * target.element_size() for _, _, target in orders)


def _through_device(run: Run, orders: Sequence[Order], threads: int) -> list[Order]:
    """Copies as they lie in the file; the device converts and scatters. Returns what that cannot do."""
    rest: list[Order] = []
    kept: list[Order] = []
    copies: list[Order] = []
    for order in orders:
        entry, items, target = order
        number = items.number if isinstance(items, Region) else entry.number
        is_bytes = number == OPAQUE or DTYPES[number].is_packed
        dtype = None if is_bytes else torch_type(number)
        if dtype is None:
            rest.append(order)
        else:
            temporary = torch_module().empty(target.shape, dtype=dtype, device=target.device)
            kept.append(order)
            copies.append((entry, items, temporary))
    wait_for_streams((temporary for _, _, temporary in copies), None)
    _, reasons = run(copies, cast=False, threads=threads)
    for order, (_, _, temporary), why in zip(kept, copies, reasons):
        if why:
            rest.append(order)
        else:
            order[2].copy_(temporary)
    return rest


def _groups(orders: Sequence[Order]) -> Iterator[list[Order]]:
    """Orders whose tensors fit in what may be taken of a device, at least one at a time."""
    group: list[Order] = []
    size_bytes = 0
    for order in orders:
        one = source_bytes(*order)
        if group and size_bytes + one > _TEMPORARY_BYTES_MAX:
            yield group
            group, size_bytes = [], 0
        group.append(order)
        size_bytes += one
    if group:
        yield group


def source_bytes(entry: Entry, part: Part, target: Any) -> int:
    """What a target's elements take in the file."""
    count: int = target.numel()
    number = part.number if isinstance(part, Region) else entry.number
    return count * DTYPES[number].bits // 8
