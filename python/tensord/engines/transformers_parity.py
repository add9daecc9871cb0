"""Parity of transformers: a model as from_pretrained makes it, and as it does through tensord."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from ..errors import UnsupportedError


def parity_modules(path: str, *, tp: int = 1) -> Iterator[tuple[str, Any, Any]]:
    """One pair of modules; ranks of transformers are started by torchrun, not here."""
    if tp != 1:
        raise UnsupportedError("parity transformers: --tp is for engines that start their ranks themselves")
    ours = importlib.import_module("tensord.transformers")
    kind = ours.class_of(path, {})
    reference = kind.from_pretrained(path)
    with ours.patch():
        loaded = kind.from_pretrained(path)
    yield kind.__name__, reference, loaded
