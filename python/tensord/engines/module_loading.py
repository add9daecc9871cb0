"""load_model: a plain torch module by the names of its parameters, whole or one rank's cuts of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Union

import torch

from ..client import Model
from ..client import open as open_model
from ..errors import IncompleteError, InvalidArgumentError, UnsupportedError
from ..indexing import Item, parse
from ..loading import Order, load
from ..tensors import Entry
from .coverage import NAMED_MAX, persistent_state
from .names import Only, Rename, pattern, renamer, select
from .recorder import interval_of
from .recording import ModelOrPath
from .summary import LoadSummary, summary_of

# Which dimension is cut, or what tells the index out of (name, shape in the checkpoint, rank, world).
Cut = Union[int, Callable[[str, tuple[int, ...], int, int], Any]]

# Each memory of a module once, with all names it has.
Places = list[tuple[list[str], torch.Tensor]]


def load_model(
    module: torch.nn.Module,
    path_or_model: ModelOrPath,
    *,
    rank: int = 0,
    world: int = 1,
    plan: Mapping[str, Cut] | None = None,
    only: Only = None,
    rename: Rename = None,
    strict: bool = True,
    cast: bool = True,
) -> LoadSummary:
    """Fills the parameters and persistent buffers of a module from the tensors of the same names::

        tensord.load_model(module, "/models/Qwen3-14B", rank=rank, world=2,
                           plan={"*.q_proj.weight": 0, "*.o_proj.weight": 1})

    Parameters
    ----------
    module : torch.nn.Module
        Its tensors are written where they are, on the CPU or on a GPU.
    path_or_model : path, list of paths, or Model
        Of a path, only the tensors are read that the module has a place for.
    rank, world : int
        Which of how many equal cuts this process holds.
    plan : mapping, optional
        Name or shell-style pattern of names, to the dimension that is cut; or to a callable that is given
        ``(name, shape, rank, world)`` and returns an index as numpy's basic indexing knows it. The first
        pattern that matches counts; what none matches is taken whole.
    only, rename
        As `tensord.record`: names of the checkpoint, and what they are in the module.
    strict : bool
        Whether it is an error that the checkpoint lacks a tensor of the module, or has one more.
    cast : bool
        Whether F16, BF16, F32 and F64 (and F8 of the checkpoint) are converted where types differ.

    Returns
    -------
    LoadSummary

    Raises
    ------
    IncompleteError
        Parameters that the checkpoint has no tensor for; nothing was written.
    InvalidArgumentError
        Tensors that the module has no place for, shapes that differ; nothing was written.
    UnsupportedError
        The module is on device meta.
    """
    begin = time.monotonic()
    places = _places(module)
    if isinstance(path_or_model, Model):
        model = path_or_model
        if strict:
            _check_names(places, set(_sources(model, only, rename)))
    else:
        model = _opened(path_or_model, only, rename, places, strict=strict)
        only = None  # it has no others
    sources = _sources(model, only, rename, places)
    orders = _orders(model, places, sources, plan or {}, rank, world)
    report = load(model, orders, cast=cast, threads=0)
    return summary_of(
        [report],
        seconds=time.monotonic() - begin,
        record_count=len(orders),
        tensor_count=len(orders),
        plain={},
        plain_bytes=0,
    )


def _orders(
    model: Model,
    places: Places,
    sources: dict[str, Entry],
    plan: Mapping[str, Cut],
    rank: int,
    world: int,
) -> list[Order]:
    """What goes where. Raises InvalidArgumentError for shapes that differ."""
    if not 0 <= rank < world:
        raise InvalidArgumentError(f"load_model: there is no rank {rank} of {world}")
    cuts = [(pattern(text), cut) for text, cut in plan.items()]
    orders: list[Order] = []
    wrong: list[str] = []
    for names, tensor in places:
        name = next((name for name in names if name in sources), None)
        if name is None:
            continue
        entry = sources[name]
        items = _items(name, entry, cuts, rank, world)
        shape = _shape(model, entry, items)
        if shape != tuple(tensor.shape):
            wrong.append(
                f"{name} has shape {list(tensor.shape)}, {entry.name!r} of the checkpoint "
                f"{list(entry.shape)}" + (f", of which this rank's part is {list(shape)}" if items else "")
            )
        orders.append((entry, items, tensor.detach()))
    if wrong:
        raise InvalidArgumentError(f"load_model: {'; '.join(wrong[:NAMED_MAX])}")
    return orders


def _places(module: torch.nn.Module) -> Places:
    """Each memory of the module once, with all names it has."""
    places: dict[Any, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in persistent_state(module).items():
        if tensor.is_meta:
            raise UnsupportedError(
                f"load_model: {name} is on device meta, which has no memory; call module.to_empty(device=...)"
            )
        place = (interval_of(tensor), tensor.stride()) if tensor.numel() else name
        places.setdefault(place, ([], tensor))[0].append(name)
    return list(places.values())


def _opened(path: Any, only: Only, rename: Rename, places: Places, *, strict: bool) -> Model:
    """A model of those tensors that have a place."""
    with open_model(path, "pt", resident="view") as listed:
        if strict:
            _check_names(places, set(_sources(listed, only, rename)))
        wanted = [entry.name for entry in _sources(listed, only, rename, places).values()]
        total = len(listed)
    return open_model(path, "pt", only=None if len(wanted) in (0, total) else wanted)


def _sources(model: Model, only: Only, rename: Rename, places: Places | None = None) -> dict[str, Entry]:
    """The checkpoint's tensors by the names that the module shall know them by; of `places` only those."""
    known = None if places is None else {name for names, _ in places for name in names}
    wanted = None if only is None else set(select(model.keys(), only))
    renamed = renamer(rename)
    sources = {}
    for entry in model.entries():
        if wanted is None or entry.name in wanted:
            name = renamed(entry.name)
            if name is not None and (known is None or name in known):
                sources[name] = entry
    return sources


def _check_names(places: Places, sources: set[str]) -> None:
    missing = [names[0] for names, _ in places if sources.isdisjoint(names)]
    surplus = sorted(sources - {name for names, _ in places for name in names})
    texts = [
        f"{text}: {', '.join(names[:NAMED_MAX])}" + (", ..." if len(names) > NAMED_MAX else "")
        for text, names in (
            ("the checkpoint lacks", missing),
            ("the module has no place for", surplus),
        )
        if names
    ]
    if texts:
        kind = IncompleteError if missing else InvalidArgumentError
        raise kind(f"load_model: {'; '.join(texts)} (strict=False takes what there is)")


def _items(name: str, entry: Entry, cuts: Any, rank: int, world: int) -> tuple[Item, ...]:
    cut = next((cut for match, cut in cuts if match.fullmatch(name)), None)
    if cut is None:
        return ()
    if callable(cut):
        return parse(cut(name, entry.shape, rank, world))
    if not isinstance(cut, int) or not -len(entry.shape) <= cut < len(entry.shape):
        raise InvalidArgumentError(f"load_model: {name} has no dimension {cut!r} to cut")
    dimension = cut % len(entry.shape)
    extent = entry.shape[dimension]
    if extent % world:
        raise InvalidArgumentError(
            f"load_model: {extent}, dimension {dimension} of {name}, has no {world} equal cuts"
        )
    part = extent // world
    return parse((*[slice(None)] * dimension, slice(rank * part, (rank + 1) * part)))


def _shape(model: Model, entry: Entry, items: tuple[Item, ...]) -> tuple[int, ...]:
    if not items:
        return entry.memory_shape
    region = model._resolve(entry, items)
    return tuple(region.shape[: region.rank])
