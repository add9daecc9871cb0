"""What packing slices of a checkpoint into one buffer, row-major one behind the other, would copy. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

PACKED_ALIGNMENT = 8  # slices lie at multiples of it; what is free behind them is filled with zeros


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: int
    offset: int  # of the first byte in its file


class Slice(NamedTuple):
    """A strided region of a tensor."""

    view: str  # as the user wrote it
    tensor: Tensor
    offset: int  # of element (0, 0, ..), from the tensor's first byte
    element_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes


def packed_plan(slices: Sequence[Slice]) -> dict[str, Any]:
    """Where slices lie in one buffer, and what fills it: strided copies out of files, then zeros."""
    items, copies, fills = [], [], []
    target_bytes = 0
    for one in slices:
        size_bytes = math.prod(one.shape) * one.element_bytes
        items.append(
            {
                "view": one.view,
                "tensor": one.tensor.name,
                "dtype": one.tensor.dtype,
                "shape": one.shape,
                "target_offset": target_bytes,
                "size_bytes": size_bytes,
            }
        )
        if size_bytes > 0:
            copies.append(_copy_of(one, target_bytes))
        end = target_bytes + size_bytes
        target_bytes = -(-end // PACKED_ALIGNMENT) * PACKED_ALIGNMENT
        if end < target_bytes:
            fills.append(_record("fill", 0, 0, end, target_bytes - end, []))
    copies.sort(key=lambda record: (record["source"], record["source_offset"], record["target_offset"]))
    return {"items": items, "target_bytes": target_bytes, "records": copies + fills}


def _copy_of(one: Slice, target_offset: int) -> dict[str, Any]:
    """One record, as the library compiles it: the longest row that is contiguous on both sides, in as few
    loops as there can be."""
    row_bytes = target_pitch = one.element_bytes
    loops: list[dict[str, int]] = []  # the innermost first
    for count, source_pitch in zip(reversed(one.shape), reversed(one.strides)):
        if count > 1 and not loops and source_pitch == row_bytes:
            row_bytes *= count
        elif count > 1 and loops and source_pitch == loops[-1]["source_pitch"] * loops[-1]["count"]:
            loops[-1]["count"] *= count
        elif count > 1:
            loops.append({"count": count, "source_pitch": source_pitch, "target_pitch": target_pitch})
        target_pitch *= count
    source_offset = one.tensor.offset + one.offset
    return _record("copy", one.tensor.file, source_offset, target_offset, row_bytes, loops)


def _record(
    kind: str,
    source: int,
    source_offset: int,
    target_offset: int,
    row_bytes: int,
    loops: Sequence[dict[str, int]],
) -> dict[str, Any]:
    rows = loops[0] if loops else {"count": 1, "source_pitch": 0, "target_pitch": 0}
    return {
        "kind": kind,
        "source": source,
        "source_offset": source_offset,
        "source_pitch": rows["source_pitch"],
        "target_offset": target_offset,
        "target_pitch": rows["target_pitch"],
        "row_bytes": row_bytes,
        "row_count": rows["count"],
        "outer": loops[1:],
    }
