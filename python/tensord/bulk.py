"""Many whole torch tensors of the CPU as targets, described a column at a time rather than one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from .copies import COPY, ITEM_BYTES, WORD_BYTES, packed_names, starts_of
from .tensors import DTYPES, OPAQUE, Entry, numbers_of_torch

COUNT_MIN = 8  # of fewer, each may be looked at


def whole_tensor_rows(entries: Sequence[Entry], targets: Sequence[Any]) -> tuple[np.ndarray, Any] | None:
    """tensord_copy rows, and what must live as long.

    Returns
    -------
    None
        One of the targets is something else than dense memory of the CPU with elements that both know, or of
        a type that is copied as bytes: then each has to be looked at.
    """
    torch = sys.modules.get("torch")
    if torch is None or len(targets) < COUNT_MIN:
        return None
    if not {type(target) for target in targets} <= {torch.Tensor, torch.nn.Parameter}:
        return None
    known, strided = numbers_of_torch(), torch.strided
    numbers = np.fromiter([known.get(target.dtype, OPAQUE) for target in targets], np.int64, len(targets))
    kinds = {*np.unique(numbers).tolist(), *{entry.number for entry in entries}}
    if any(kind == OPAQUE or DTYPES[kind].is_packed or DTYPES[kind].name == "C64" for kind in kinds):
        return None
    if not all(one.is_cpu and one.layout is strided and not one.is_neg() for one in targets):
        return None
    ranks = np.fromiter([target.ndim for target in targets], np.int64, len(targets))
    flat = int(ranks.sum())
    extents = np.fromiter(chain.from_iterable([target.shape for target in targets]), np.uint64, flat)
    strides = np.fromiter(chain.from_iterable([target.stride() for target in targets]), np.int64, flat)
    strides *= np.repeat(ITEM_BYTES[numbers], ranks)
    names, addresses = packed_names([entry.encoded for entry in entries])
    at = starts_of(ranks) * WORD_BYTES
    rows = np.zeros(len(targets), dtype=COPY)
    rows["name"] = addresses
    rows["target"] = np.fromiter([target.data_ptr() for target in targets], np.uint64, len(targets))
    rows["target_dtype"] = numbers
    rows["target_rank"] = ranks
    rows["target_shape"] = extents.ctypes.data + at
    rows["target_strides"] = strides.ctypes.data + at
    return rows, (names, extents, strides)
