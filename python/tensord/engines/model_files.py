"""The files of one model as transformers and diffusers open them, read through tensord.

    from_pretrained ──opens──► File ──get_slice──► Slice ──[...]──► a zero-copy tensor, or an OnDemand one
                                 └───────── Model of the whole checkpoint, one for all its files

Libraries open a checkpoint file by file. All files that one index.json names are opened as one Model: they
share the replica that `tensord load FOLDER`, other engines and other ranks have.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .._safe_open import Device, SafeSlice, safe_open, shape_of
from ..client import Model
from ..client import open as open_model
from ..errors import Error, ExhaustedError, InvalidIndexError, UnavailableError, UnsupportedDtypeError
from ..indexing import Item, parse
from ..loading import Order, load
from ..tensors import AnyTensor, Entry, torch_dtype
from .read_ahead import ReadAhead, is_grouped

# What is smaller goes to a GPU through the CPU: a request to the daemon takes longer than such a copy.
ENGINE_BYTES_MIN = 1 << 20

INDEX_BYTES_MAX = 256 << 20


@dataclass
class Load:
    """What tensord did for one model. Several threads may use it at once."""

    models: dict[str, Model] = field(default_factory=dict)  # by the path they were opened with
    handed: dict[str, Entry] = field(default_factory=dict)  # tensors handed out whole or in part, by name
    handed_bytes: int = 0
    device_bytes: int = 0  # of them: by the daemon's copy engines
    staged_bytes: int = 0  # of them: into GPU memory in a slower way
    slower_why: str = ""
    notes: list[str] = field(default_factory=list)  # what did not go as it should, for people
    file_count: int = 0
    error: Error | None = None  # the first failure, in case the library swallows it
    begin: float = 0.0  # when the first tensor was asked for
    end: float = 0.0  # when the last one was handed out
    reads_ahead: bool = False  # only where `close` is sure to be called
    has_gpu: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._indices: dict[Path, dict[str, str]] = {}  # by folder: the index.json of each file
        self._ahead: dict[int, ReadAhead] = {}  # by a model's id
        self._names: dict[int, list[list[str]]] = {}  # by a model's id: names of its tensors, file by file

    # ---- opening -----------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str], device: Device) -> File:
        """One file of a checkpoint. Errors as `tensord.open`."""
        with self._lock:
            file = File(self, *self._whole_of(Path(os.path.abspath(os.fspath(path)))), device)  # noqa: PTH100
            self.file_count += 1
            return file

    def close(self) -> None:
        """Lets go of the checkpoint; tensors taken from it stay valid."""
        for ahead in self._ahead.values():
            ahead.close()
        self._ahead.clear()
        self.models.clear()
        self._names.clear()

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _whole_of(self, path: Path) -> tuple[Model, list[str]]:
        """The model that holds a file, and the names of that file's tensors."""
        index = self._index_of(path)
        if index is not None:
            try:
                model = self._model(index)
                return model, self._names_of(model)[model.files.index(str(path))]
            except UnavailableError:
                raise
            except (Error, ValueError):
                pass  # the index.json is not what these files are: each stands for itself
        model = self._model(str(path))
        return model, model.keys()

    def _model(self, path: str) -> Model:
        model = self.models.get(path)
        if model is None:
            try:
                model = open_model(path, "pt")
            except ExhaustedError as error:
                model = open_model(path, "pt", resident="view")
                self.note(f"read in batches and copied, for want of the daemon's memory ({error})")
            if model._is_view:
                self.note("read in batches and copied: larger than the daemon's host_memory")
            self.models[path] = model
        return model

    def _names_of(self, model: Model) -> list[list[str]]:
        """The names of a model's tensors, file by file."""
        names = self._names.get(id(model))
        if names is None:
            names = [[] for _ in model.files]
            for name in model:
                names[model.entry(name).file].append(name)
            self._names[id(model)] = names
        return names

    def _index_of(self, path: Path) -> str | None:
        """The index.json that names a file, if there is one."""
        folder = path.parent
        if folder not in self._indices:
            self._indices[folder] = _indices_in(folder)
        return self._indices[folder].get(path.name)

    # ---- tensors -----------------------------------------------------------------------------------

    def on_cpu(self, model: Model, entry: Entry) -> AnyTensor:
        """A whole tensor: zero-copy, where the daemon keeps it."""
        if model._is_view:
            return self.copied(model, entry, (), torch.device("cpu"))
        with self.asked():
            return model.tensor(entry)

    def copied(self, model: Model, entry: Entry, items: tuple[Item, ...], device: torch.device) -> Any:
        """A part of a tensor in memory of its own."""
        dtype = torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
        target = torch.empty(shape_of(model, entry, items), dtype=dtype, device=device)
        self._fill(model, [(entry, items, target)])
        return target

    def moved(self, model: Model, entry: Entry, items: tuple[Item, ...], device: torch.device) -> Any:
        """As `copied`, to a GPU; what is asked for next is read ahead."""
        tensor = None
        if self.reads_ahead and not items and is_grouped(entry):
            with self._lock:
                ahead = self._ahead.get(id(model))
                if ahead is None:
                    ahead = self._ahead[id(model)] = ReadAhead(model, self._fill_whole)
            tensor = ahead.take(entry, device)
        return self.copied(model, entry, items, device) if tensor is None else tensor

    def _fill_whole(self, model: Model, entries: Sequence[Entry], targets: Sequence[Any]) -> None:
        self._fill(model, [(entry, (), target) for entry, target in zip(entries, targets)])

    def _fill(self, model: Model, orders: list[Order]) -> None:
        with self.asked():
            report = load(model, orders, cast=False, threads=0)
        with self._lock:
            self.device_bytes += report.device_bytes
            self.staged_bytes += report.staged_bytes
            self.slower_why = self.slower_why or report.slower_why

    def hand_out(self, entry: Entry, tensor: Any) -> Any:
        """Counts a tensor that the library gets."""
        with self._lock:
            self.handed[entry.name] = entry
            self.handed_bytes += tensor.numel() * tensor.element_size()
            self.end = time.perf_counter()
        return tensor

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around what gets a tensor: notes when it began, and how it failed."""
        self.begin = self.begin or time.perf_counter()
        try:
            yield
        except Error as error:
            if self.error is None:
                self.error = error
            raise


def _indices_in(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            if index.stat().st_size <= INDEX_BYTES_MAX:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                found.update(dict.fromkeys(names, str(index)))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue  # the library has its own words for it
    return found


class File(safe_open):
    """What a library gets in place of a `safetensors.safe_open`."""

    def __init__(self, load: Load, model: Model, names: Sequence[str], device: Device) -> None:
        self._load = load
        self._adopt(model, names, device)

    def get_tensor(self, name: str) -> AnyTensor:
        model, entry = self._entry(name)
        if self._device == "cpu":
            return self._load.hand_out(entry, self._load.on_cpu(model, entry))
        return self._on_device(model, [entry])[0]

    def get_slice(self, name: str) -> Slice:
        model, entry = self._entry(name)
        return Slice(self, model, entry)

    def _on_device(self, model: Model, entries: Sequence[Entry], items: tuple[Item, ...] = ()) -> list[Any]:
        with self._load.asked():
            tensors = super()._on_device(model, entries, items)
        for entry, tensor in zip(entries, tensors):
            self._load.hand_out(entry, tensor)
        return tensors


class Slice(SafeSlice):
    """Part of a `File`."""

    _opened: File

    def __getitem__(self, index: Any) -> AnyTensor:
        if self._opened._device != "cpu":
            return super().__getitem__(index)
        load, entry = self._opened._load, self._entry
        if load.has_gpu and not entry.is_bytes:
            with suppress(InvalidIndexError, UnsupportedDtypeError):  # torch says it in its own words
                items = parse(index)
                if all(step >= 0 for _, _, _, _, step in items):
                    return OnDemand(load, self._model, entry, index, items)
        return load.hand_out(entry, load.on_cpu(self._model, entry)[index])


class OnDemand(torch.Tensor):
    """A tensor of a file that is read when it is known where it shall be: into a GPU no detour is needed.

    Its `to` returns a plain tensor, and so does whatever else is done with it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, load: Load, model: Model, entry: Entry, index: Any, items: tuple[Item, ...]) -> OnDemand:
        shape = shape_of(model, entry, items)
        dtype = torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
        made: OnDemand = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        return made

    def __init__(self, load: Load, model: Model, entry: Entry, index: Any, items: tuple[Item, ...]) -> None:
        self._load, self._model, self._entry, self._index, self._items = load, model, entry, index, items
        self._plain: torch.Tensor | None = None

    def plain(self) -> torch.Tensor:
        """The tensor on the CPU."""
        if self._plain is None:
            whole = self._load.on_cpu(self._model, self._entry)
            self._plain = self._load.hand_out(self._entry, whole[self._index])
        return self._plain

    def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
        device: Any
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
        if device is None or device.type != "cuda" or self._is_small() or self._plain is not None:
            return self.plain().to(*arguments, **options)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        moved: torch.Tensor = self._load.moved(self._model, self._entry, self._items, device)
        self._load.hand_out(self._entry, moved)
        return moved if dtype is None else moved.to(dtype)

    def _is_small(self) -> bool:
        if self._model._is_view:
            return False
        if self._load.reads_ahead and not self._items:
            return not is_grouped(self._entry)
        return self.numel() * self.element_size() < ENGINE_BYTES_MIN

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        real_args, real_kwargs = tree_map_only(OnDemand, OnDemand.plain, (args, kwargs or {}))
        return func(*real_args, **real_kwargs)
