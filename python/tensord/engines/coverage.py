"""Coverage: whether a load has written each parameter and persistent buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import IncompleteError
from .names import matcher
from .recorder import Recorder, interval_of, is_memory

NAMED_MAX = 20  # in an error

_SAMPLE_COUNT = 64  # elements of a tensor that are looked at


@dataclass(frozen=True)
class CoverageReport:
    """``unwritten``: names that nothing wrote. ``partial``: names to the share that was written; the rest is
    what the engine fills itself (padding of a vocabulary), or was missed."""

    unwritten: list[str] = field(default_factory=list)
    partial: dict[str, float] = field(default_factory=dict)


def persistent_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, those that are tied under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    state: dict[str, torch.Tensor] = {name: one for name, one in parameters if is_memory(type(one))}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part._buffers.items():
            is_kept = buffer is not None and name not in part._non_persistent_buffers_set
            if is_kept and is_memory(type(buffer)):
                state[f"{prefix}.{name}" if prefix else name] = buffer
    return state


class Coverage:
    """Made before a load; afterwards `check` names what the load has left out.

    Parameters
    ----------
    module : torch.nn.Module

    Notes
    -----
    Written is what records or plain copies of the load wrote, what is another tensor than before, and what
    has other values than before. Tied weights are written when one of them is.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._before = {name: _mark(tensor) for name, tensor in persistent_state(module).items()}

    def report(self, recorder: Recorder | None = None) -> CoverageReport:
        """What was written and what was not; of a load that `recorder` followed."""
        intervals = Intervals(recorder.written() if recorder is not None else np.zeros((0, 3), np.int64))
        unwritten, partial = [], {}
        for name, tensor in persistent_state(self._module).items():
            if tensor.is_meta:
                unwritten.append(name)
                continue
            begin, end, size_bytes = interval_of(tensor)
            written = intervals.bytes_within(begin, end)
            if size_bytes == 0 or written >= size_bytes:
                continue
            if written > 0:
                partial[name] = written / size_bytes
            elif _is_same(self._before.get(name), tensor):
                unwritten.append(name)
        return CoverageReport(unwritten, partial)

    def check(
        self, recorder: Recorder | object | None = None, *, leaves: Iterable[str] = (), whole: bool = False
    ) -> CoverageReport:
        """Raises where something was not written.

        Parameters
        ----------
        recorder : Recorder or Recording, optional
            Of the load: what `tensord.record` gave.
        leaves : iterable of str
            Names, and shell-style patterns of names, that the engine itself leaves as they are.
        whole : bool
            Whether what is written in part counts as missing too.

        Raises
        ------
        IncompleteError
            Names parameters and buffers.
        """
        followed = getattr(recorder, "recorder", recorder)
        report = self.report(followed if isinstance(followed, Recorder) else None)
        is_left = matcher(leaves)
        missing = [name for name in report.unwritten if not is_left(name)]
        if whole:
            missing += [name for name in report.partial if not is_left(name)]
        if missing:
            raise IncompleteError(missing_text(missing))
        return report


def missing_text(names: list[str]) -> str:
    named = ", ".join(names[:NAMED_MAX])
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return (
        f"load of a module: nothing wrote {len(names)} of its parameters and persistent buffers: "
        f"{named}{more}; "
        "the checkpoint lacks them, or the loader skips them (leaves= names what may stay as it is)"
    )


class Intervals:
    """How many bytes were written between two addresses."""

    def __init__(self, rows: np.ndarray) -> None:
        rows = np.unique(rows, axis=0)  # what is written twice counts once
        self._begins = rows[:, 0]
        self._ends = np.sort(rows[:, 1])
        self._bytes_to = np.concatenate((np.zeros(1, np.int64), np.cumsum(rows[:, 2])))

    def bytes_within(self, begin: int, end: int) -> int:
        """Of intervals that begin there."""
        first, last = np.searchsorted(self._begins, (begin, end))
        return int(self._bytes_to[last] - self._bytes_to[first])


Mark = tuple[int, "torch.Size", int, "torch.Tensor | None"]


def _mark(tensor: torch.Tensor) -> Mark:
    """What tells whether a tensor has changed, without a copy of it."""
    if tensor.is_meta:
        return id(tensor), tensor.shape, 0, None
    return id(tensor), tensor.shape, tensor.data_ptr(), _sample(tensor)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach()
    for _ in range(flat.ndim - 1):
        flat = flat[-1] if flat.shape[0] else flat.reshape(-1)
        if flat.ndim <= 1:
            break
    return flat[:_SAMPLE_COUNT].clone() if flat.ndim else flat.clone()


def _is_same(mark: Mark | None, tensor: torch.Tensor) -> bool:
    if mark is None:
        return False
    _, shape, address, sample = mark
    if shape != tensor.shape or sample is None or address != tensor.data_ptr():
        return False
    return torch.equal(_bits(sample), _bits(_sample(tensor)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
