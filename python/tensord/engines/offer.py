"""Offer: which tensors a loader is given, in which order, and under which names."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from ..client import Model
from ..tensors import Entry
from .names import Only, Rename, renamer, select


class Offer:
    """Tensors of a model in the order of its files, as the engines' own loaders go through them."""

    def __init__(self, model: Model, only: Only = None, rename: Rename = None) -> None:
        self._model = model
        self._index = index = model._whole_index()
        self.positions: np.ndarray = index.file_order()
        self._names: list[str] | None = None  # None: as in the checkpoint
        if only is not None or rename is not None:
            self._choose(only, rename)

    def _choose(self, only: Only, rename: Rename) -> None:
        known = self._model._all_names()
        wanted = None if only is None else set(select(known, only))
        renamed = renamer(rename)
        positions, names = [], []
        for at in self.positions.tolist():
            name = renamed(known[at]) if wanted is None or known[at] in wanted else None
            if name is not None:
                positions.append(at)
                names.append(name)
        self.positions, self._names = np.array(positions, dtype=np.int64), names

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def names(self) -> list[str]:
        """As a loader knows them."""
        if self._names is None:
            known = self._model._all_names()
            return [known[at] for at in self.positions.tolist()]
        return list(self._names)

    @cached_property
    def entries(self) -> list[tuple[str, Entry]]:
        """Name and tensor, as they are handed out."""
        all_entries = self._model.entries()
        return list(zip(self.names, [all_entries[at] for at in self.positions.tolist()]))

    def encoded(self) -> list[bytes]:
        """The checkpoint's own names."""
        names = self._index.names
        return [names[at] for at in self.positions.tolist()]

    def digest(self) -> bytes:
        """Of names, types, shapes and order: all that a loader sees of tensors without their values."""
        renamed_as = "" if self._names is None else "\0".join(self._names)
        digest = hashlib.sha256(self._index.digest(self.positions))
        if renamed_as and self._names != [name.decode() for name in self.encoded()]:
            digest.update(renamed_as.encode("utf-8", "surrogatepass"))
        return digest.digest()
