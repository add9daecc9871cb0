"""Whole tensors of a model into GPU memory, ahead of being asked for.

    asked for, one by one      a  b  c │ d  e  f │ g
    requests to the daemon     [ group ][ group ]          the next begins when the first of a group is taken

Libraries ask for one tensor after another, in the order of the names. A request to the daemon for each would
leave its copy engines idle in between, so a request is for a group. Who asks in another order gets the same
tensors, more slowly.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..client import Model
from ..errors import Error, UnsupportedDtypeError
from ..tensors import Entry, torch_dtype

# Of one request: takes far longer than what a request costs beside its copies (about 1 ms), and is little
# beside a GPU's memory.
GROUP_BYTES = 512 << 20
# Of the first one: each may hold twice as much as the one before. Where the next tensors turn out to be
# wanted on another device, what was read in vain is little beside what was not.
FIRST_GROUP_BYTES = 16 << 20

# What is smaller goes through the CPU.
GROUPED_BYTES_MIN = 4096

Copy = Callable[[Model, Sequence[Entry], Sequence[Any]], None]


def in_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as libraries go through them: numbers by their value."""
    parts = re.findall(r"\d+|[^\d.]+", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


class _Group:
    """Tensors of one request. Constant but for what `run` makes of it."""

    def __init__(self, entries: list[Entry], device: torch.device) -> None:
        self.entries = entries
        self.device = device
        self.is_followed = False
        self.tensors: dict[str, torch.Tensor] = {}
        self.error: BaseException | None = None
        self.over = threading.Event()

    def run(self, model: Model, copy: Copy) -> None:
        try:
            entries, tensors = self._allocate()
            copy(model, entries, tensors)
            self.tensors = {entry.name: tensor for entry, tensor in zip(entries, tensors)}
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    def _allocate(self) -> tuple[list[Entry], list[torch.Tensor]]:
        """As many as there is memory for, at least the first."""
        tensors: list[torch.Tensor] = []
        for entry in self.entries:
            dtype = torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
            try:
                tensors.append(torch.empty(entry.memory_shape, dtype=dtype, device=self.device))
            except torch.cuda.OutOfMemoryError:
                if not tensors:
                    raise
                break
        return self.entries[: len(tensors)], tensors


class ReadAhead:
    """Thread safe. `close` ends its thread.

    Parameters
    ----------
    model : Model
    copy : callable
        Fills tensors with whole tensors of the model, in one request.
    """

    def __init__(self, model: Model, copy: Copy) -> None:
        self._model = model
        self._copy = copy
        self._lock = threading.Lock()
        self._names = sorted(model, key=in_order)
        self._positions = {name: at for at, name in enumerate(self._names)}
        self._groups: dict[str, _Group] = {}  # of what is loaded or being loaded, and was not taken
        self._taken: set[str] = set()
        self._group_bytes = FIRST_GROUP_BYTES  # of the next one
        self._thread = ThreadPoolExecutor(1, "tensord read ahead")

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._groups.clear()

    def take(self, entry: Entry, device: torch.device) -> torch.Tensor | None:
        """A whole tensor on a GPU. None: it was read ahead in vain, or taken before.

        Raises
        ------
        Error
            As `Model.load_into`.
        """
        with self._lock:
            group = self._groups.get(entry.name)
            if group is not None and group.device != device:
                self._forget(group)
                self._group_bytes = FIRST_GROUP_BYTES
                group = None
            is_mine = group is None
            if group is None:
                if entry.name in self._taken:
                    return None
                group = self._begin(self._positions[entry.name], device)
            self._taken.add(entry.name)
            del self._groups[entry.name]
            if not is_mine:
                self._follow(group)
        if is_mine:
            group.run(self._model, self._copy)
            with self._lock:
                self._follow(group)
        group.over.wait()
        if isinstance(group.error, Error):
            raise group.error
        return group.tensors.pop(entry.name, None)

    def _begin(self, position: int, device: torch.device) -> _Group:
        """A group of names that follow each other; the first is in it whatever it is."""
        entries = [self._model.entry(self._names[position])]
        size_bytes = entries[0].size_bytes
        for name in self._names[position + 1 :]:
            entry = self._model.entry(name)
            if name in self._groups or size_bytes + entry.size_bytes > self._group_bytes:
                break
            if name not in self._taken and is_grouped(entry):
                entries.append(entry)
                size_bytes += entry.size_bytes
        self._group_bytes = min(2 * self._group_bytes, GROUP_BYTES)
        group = _Group(entries, device)
        self._groups.update((entry.name, group) for entry in entries)
        return group

    def _follow(self, group: _Group) -> None:
        """Has the next group loaded meanwhile."""
        if group.is_followed:
            return
        group.is_followed = True
        for position in range(self._positions[group.entries[-1].name] + 1, len(self._names)):
            name = self._names[position]
            if name in self._groups:
                return
            if name not in self._taken and is_grouped(self._model.entry(name)):
                self._run_aside(self._begin(position, group.device))
                return

    def _run_aside(self, group: _Group) -> None:
        try:
            begun = self._thread.submit(group.run, self._model, self._copy)
            begun.add_done_callback(lambda _: group.over.set())  # also when it was cancelled
        except RuntimeError:  # this is closed
            group.over.set()

    def _forget(self, group: _Group) -> None:
        """It was read ahead for another device than it is wanted on."""
        for entry in group.entries:
            if self._groups.get(entry.name) is group:
                del self._groups[entry.name]
        if group.over.is_set():
            group.tensors.clear()


def is_grouped(entry: Entry) -> bool:
    """Whether a tensor is one for requests to the daemon."""
    if entry.is_bytes or entry.size_bytes < GROUPED_BYTES_MIN:
        return False
    try:
        torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
    except UnsupportedDtypeError:
        return False
    return True
