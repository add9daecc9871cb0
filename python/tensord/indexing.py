"""numpy's basic indexing as tensord_index_item rows. Pure: knows no tensor; ranges are checked by the
library."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from .errors import InvalidIndexError

# tensord_index_item
INDEX_ITEM = np.dtype([("kind", "u4"), ("given", "u4"), ("start", "i8"), ("stop", "i8"), ("step", "i8")])

# (kind, given, start, stop, step), as tensord_index_item.
Item = tuple[int, int, int, int, int]

_SLICE, _INTEGER, _ELLIPSIS, _NEW_AXIS = range(4)
_HAS_START, _HAS_STOP, _HAS_STEP = 1, 2, 4

_INT64_MIN = -(2**63)
_INT64_MAX = 2**63 - 1

_WHOLE_SLICE: Item = (_SLICE, 0, 0, 0, 0)
_ELLIPSIS_ITEM: Item = (_ELLIPSIS, 0, 0, 0, 0)
_NEW_AXIS_ITEM: Item = (_NEW_AXIS, 0, 0, 0, 0)


def parse(index: Any) -> tuple[Item, ...]:
    """Converts an index expression.

    Parameters
    ----------
    index : int, slice, Ellipsis, None, or tuple of those
        What numpy's basic indexing takes; numpy's integers too. ``None`` is a new axis. ``()`` and
        ``...`` are the whole tensor.

    Returns
    -------
    tuple of Item
        Empty for the whole tensor.

    Raises
    ------
    InvalidIndexError
        Lists, arrays, booleans, floats and names: they are not basic indices.
    """
    if index is Ellipsis:
        return ()
    if type(index) is tuple:
        return tuple([_item(part) for part in index])
    return (_item(index),)


def _item(part: Any) -> Item:
    if type(part) is slice:
        return _slice(part)
    if part is Ellipsis:
        return _ELLIPSIS_ITEM
    if part is None:
        return _NEW_AXIS_ITEM
    if isinstance(part, (bool, np.bool_, np.ndarray)):
        raise _refusal(part)
    try:
        number = operator.index(part)
    except (TypeError, ValueError, RuntimeError):
        raise _refusal(part) from None
    if not _INT64_MIN <= number <= _INT64_MAX:
        raise InvalidIndexError(f"index {number} does not fit 64 bits")
    return (_INTEGER, _HAS_START, number, 0, 0)


def _slice(part: slice) -> Item:
    start, stop, step = part.start, part.stop, part.step
    if start is None and stop is None and step is None:
        return _WHOLE_SLICE
    given = 0
    if start is None:
        start = 0
    else:
        given |= _HAS_START
        start = _bound(start)
    if stop is None:
        stop = 0
    else:
        given |= _HAS_STOP
        stop = _bound(stop)
    if step is None:
        step = 0
    else:
        given |= _HAS_STEP
        step = _bound(step)
    return (_SLICE, given, start, stop, step)


def _bound(value: Any) -> int:
    """An end or a step of a slice, clipped to 64 bits as numpy does."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise _refusal(value) from None
    return max(_INT64_MIN, min(_INT64_MAX, number))


def _refusal(part: Any) -> InvalidIndexError:
    return InvalidIndexError(
        "only integers, slices (':'), '...', None and tuples of them are valid indices, "
        f"not {part!r} ({type(part).__name__})"
    )


def item_rows(items: tuple[Item, ...]) -> np.ndarray:
    """``tensord_index_item[len(items)]`` as a structured array of shape [len(items)]."""
    return np.array(list(items), dtype=INDEX_ITEM)
