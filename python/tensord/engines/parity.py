"""Parity: whether two modules, or one module at two times, hold the same bits.

Compared are parameters, buffers, and tensors that parts of the module keep as plain attributes (in lists,
tuples and dicts too): what loaders compute from weights often lies there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

POISON = 0x5A

_ATTRIBUTE = "@"  # before the name of a plain attribute
_DEPTH_MAX = 2  # of containers in an attribute


class Mark(NamedTuple):
    """What is compared of a tensor. Can be pickled, so that ranks may send theirs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    digest: bytes


Snapshot = dict[str, Mark]


class Row(NamedTuple):
    """One tensor. ``problem`` is empty where it is the same."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    problem: str


@dataclass(frozen=True)
class ParityReport:
    rows: list[Row] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> list[Row]:
        return [row for row in self.rows if row.problem]


def all_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, and plain attributes as ``part.@name``."""
    found: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for prefix, part in module.named_modules():
        for name, held in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                path = f"{prefix}.{_ATTRIBUTE}{name}" if prefix else _ATTRIBUTE + name
                found.update(_tensors_in(path, held, _DEPTH_MAX))
    return found


def _tensors_in(path: str, held: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(held, torch.Tensor):
        yield path, held
    elif depth and isinstance(held, (list, tuple)):
        for at, one in enumerate(held):
            yield from _tensors_in(f"{path}[{at}]", one, depth - 1)
    elif depth and isinstance(held, dict):
        for key, one in held.items():
            yield from _tensors_in(f"{path}[{key!r}]", one, depth - 1)


def snapshot(module: torch.nn.Module) -> Snapshot:
    """Shape, strides, type and a digest of each tensor's elements in row-major order."""
    return {name: _mark(tensor) for name, tensor in all_tensors(module).items()}


def _mark(tensor: torch.Tensor) -> Mark:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    digest = b"" if tensor.is_meta else hashlib.blake2b(_bytes_of(tensor), digest_size=16).digest()
    return Mark(shape, stride, str(tensor.dtype), digest)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def poison(module: torch.nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Fills the memory of parameters and buffers with 0x5A, so that what a load leaves out shows.

    Parameters
    ----------
    names : iterable of str, optional
        Which ones; None: all.

    Returns
    -------
    list of str
        The names of what was filled.
    """
    tensors = all_tensors(module)
    chosen = [name for name in tensors if _ATTRIBUTE not in name] if names is None else list(names)
    with torch.no_grad():
        for name in chosen:
            held = tensors[name].detach()
            if not held.is_meta and held.numel():
                pattern = torch.full((held.element_size(),), POISON, dtype=torch.uint8, device=held.device)
                held.copy_(pattern.view(held.dtype)[0])
    return chosen


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Names of what a load wrote: to `poison` before the next one."""
    return [name for name, mark in after.items() if before.get(name) != mark and _ATTRIBUTE not in name]


def compare(reference: torch.nn.Module | Snapshot, loaded: torch.nn.Module | Snapshot) -> ParityReport:
    """Every tensor of two modules (or snapshots of them), bit by bit, strides too.

    Parameters
    ----------
    reference, loaded : torch.nn.Module or Snapshot
        As the engine's own loader made it, and as tensord did.
    """
    expected = snapshot(reference) if isinstance(reference, torch.nn.Module) else reference
    found = snapshot(loaded) if isinstance(loaded, torch.nn.Module) else loaded
    rows = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        a, b = expected.get(name), found.get(name)
        known = a or b
        assert known is not None
        rows.append(Row(name, known.shape, known.dtype.removeprefix("torch."), _problem(a, b)))
    return ParityReport(rows)


def _problem(expected: Mark | None, found: Mark | None) -> str:
    if expected is None:
        return "only tensord's module has it"
    if found is None:
        return "tensord's module lacks it"
    for what, a, b in (
        ("type", expected.dtype, found.dtype),
        ("shape", list(expected.shape), list(found.shape)),
        ("strides", list(expected.stride), list(found.stride)),
    ):
        if a != b:
            return f"{what}: {b} instead of {a}"
    return "" if expected.digest == found.digest else "other bytes"
