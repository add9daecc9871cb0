"""Which tensors a loader is given, and under which names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Union

from ..errors import InvalidArgumentError, InvalidTypeError, UnknownTensorError

Only = Union[str, Sequence[str], Callable[[str], bool], None]
Rename = Union[Callable[[str], Union[str, None]], Sequence[tuple[str, str]], None]


def select(names: Sequence[str], only: Only) -> list[str]:
    """The names that are wanted, in the order given.

    Parameters
    ----------
    only : str, list of str, or callable
        As in `tensord.open`: names and patterns; or what says of a name whether it is wanted.

    Raises
    ------
    UnknownTensorError
        A name or pattern matches nothing.
    """
    if only is None:
        return list(names)
    if callable(only):
        return [name for name in names if only(name)]
    if not isinstance(only, Iterable):
        raise InvalidTypeError(f"only: names and patterns, or a callable, not {only!r}")
    known = set(names)
    chosen: set[str] = set()
    for one in [only] if isinstance(only, str) else only:
        if not isinstance(one, str):
            raise InvalidTypeError(f"only: a name, a pattern, or a callable, not {one!r}")
        found = {one} if one in known else set(filter(pattern(one).fullmatch, names))
        if not found:
            raise UnknownTensorError(f"only: {one!r} is and matches no tensor")
        chosen |= found
    return [name for name in names if name in chosen]


def pattern(text: str) -> re.Pattern[str]:
    """A shell-style pattern as `tensord.open` reads it: ``*``, ``?``, ``[a-z0]``, ``[!a-z]``."""
    return re.compile(fnmatch.translate(text))


def matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name is, or matches, one of these."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    names, compiled = set(given), [pattern(one) for one in given]
    return lambda name: name in names or any(one.fullmatch(name) for one in compiled)


def renamer(rename: Rename) -> Callable[[str], str | None]:
    """What gives a tensor's name as the loader shall know it; None: it is not given the tensor.

    Parameters
    ----------
    rename : callable, or list of (pattern, replacement)
        Regular expressions as `re.sub` takes them, one after another.

    Raises
    ------
    InvalidTypeError, InvalidArgumentError
    """
    if rename is None:
        return str
    if callable(rename):
        return rename
    try:
        pairs = [(re.compile(expression), replacement) for expression, replacement in rename]
    except re.error as error:
        raise InvalidArgumentError(f"rename: {error.pattern!r} is no regular expression: {error}") from None
    except (TypeError, ValueError):
        raise InvalidTypeError(
            f"rename: a callable, or a list of (regular expression, replacement), not {rename!r}"
        ) from None

    def renamed(name: str) -> str:
        for expression, replacement in pairs:
            try:
                name = expression.sub(replacement, name)
            except (re.error, IndexError) as error:
                raise InvalidArgumentError(f"rename: {replacement!r} is no replacement: {error}") from None
        return name

    return renamed
