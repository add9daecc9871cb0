"""Index expressions become the library's items; what numpy's basic indexing refuses is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensord import InvalidIndexError
from tensord.indexing import parse

LOW, HIGH = -(2**63), 2**63 - 1


def as_text(index: Any) -> str:
    """One word an item: ``3``, ``1:2:-1``, ``...``, ``None``."""

    def word(item: tuple[int, int, int, int, int]) -> str:
        kind, given, start, stop, step = item
        if kind == 1:
            return str(start)
        if kind:
            return "..." if kind == 2 else "None"
        ends = [str(end) if given & bit else "" for bit, end in ((1, start), (2, stop), (4, step))]
        return ":".join(ends if given & 4 else ends[:2])

    return " ".join(word(item) for item in parse(index))


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (np.s_[...], ""),
        (np.s_[()], ""),
        (np.s_[3], "3"),
        (np.s_[-1], "-1"),
        (np.s_[:], ":"),
        (np.s_[0:0], "0:0"),
        (np.s_[1:], "1:"),
        (np.s_[:-2], ":-2"),
        (np.s_[::-1], "::-1"),
        (np.s_[5:1:-2], "5:1:-2"),
        (np.s_[::0], "::0"),
        (np.s_[None], "None"),
        (np.s_[..., 0], "... 0"),
        (np.s_[1, ..., None, ::2], "1 ... None ::2"),
        (np.s_[np.int64(4), np.uint8(2) : np.int32(7)], "4 2:7"),
        (np.s_[: 2**70 : -(2**70)], f":{HIGH}:{LOW}"),
    ],
)
def test_items_of_a_basic_index(index: Any, text: str) -> None:
    assert as_text(index) == text


@pytest.mark.parametrize(
    "index",
    [
        True,
        np.True_,
        [0, 1],
        np.array([0, 1]),
        np.array(1),
        np.array([True, False]),
        1.5,
        "w",
        np.s_[0, [1]],
        np.s_[1.5:],
        np.s_[:"a"],
        np.s_[:, True],
        2**64,
        (0, (1,)),
    ],
    ids=repr,
)
def test_what_is_no_basic_index_is_an_index_error(index: Any) -> None:
    with pytest.raises(InvalidIndexError) as caught:
        parse(index)
    assert isinstance(caught.value, IndexError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.code == "invalid_argument"
