"""safetensors' reading interface over tensord: code written for ``safetensors.safe_open`` runs unchanged.

What differs: tensors lie in the daemon's memory (mapped privately) rather than in a mapping of the file;
numpy arrays are zero-copy and share their memory within one open file, where safetensors hands out a copy
each time.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, Union

import numpy as np

from .client import Model
from .client import open as open_model
from .errors import (
    InvalidIndexError,
    InvalidOptionError,
    MissingFileError,
    UnknownTensorError,
)
from .indexing import Item, parse
from .loading import load
from .tensors import AnyTensor, Entry, framework_of, torch_dtype, torch_module

Device = Union[str, int, None]

_BACKENDS = ("mmap", "pread")
_INDEXED_DEVICES = ("cuda", "musa", "mps", "npu", "xpu", "xla", "mlu", "hpu")


def _device_of(device: Device, framework: str) -> str | int:
    """Checks a device as safetensors does; "cpu" for None."""
    if device is None or device == "cpu":
        return "cpu"
    if isinstance(device, bool) or not isinstance(device, (str, int)) or device == -1:
        raise InvalidOptionError(f"device {device!r} is invalid")
    if isinstance(device, str):
        kind, colon, number = device.partition(":")
        if kind not in _INDEXED_DEVICES or (colon and not number.isdigit()):
            raise InvalidOptionError(f"device {device} is invalid")
        if kind == "mps" and number not in ("", "0"):
            raise InvalidOptionError(f"device {device} is invalid: only mps or mps:0 is supported")
        if kind in ("cuda", "musa", "npu", "xpu", "xla", "mlu", "hpu") and not colon:
            device = f"{kind}:0"
    if framework != "pt":
        raise InvalidOptionError(f"Device {device} is not supported for framework numpy")
    return device


def shape_of(model: Model, entry: Entry, items: tuple[Item, ...]) -> tuple[int, ...]:
    """The shape of a part of a tensor; no items: of the whole. Needs no memory of it.

    Raises
    ------
    InvalidIndexError
    """
    if not items:
        return entry.memory_shape
    region = model._resolve(entry, items)
    return tuple(region.shape[: region.rank])


def _holds(names: list[str], name: str) -> bool:
    """Whether a sorted list has it."""
    at = bisect_left(names, name)
    return at < len(names) and names[at] == name


class safe_open:
    """Opens a safetensors file, or a folder of them, and hands out tensors as asked.

    Parameters
    ----------
    filename : str or os.PathLike
    framework : {"pt", "torch", "pytorch", "np", "numpy"}
    device : str or int
        Where torch tensors end up. Devices other than "cpu" get a copy, made by torch.
    backend : {"mmap", "pread"}
        Accepted and without effect: the daemon has its own ways to read.

    Raises
    ------
    MissingFileError
        Also a FileNotFoundError.
    CorruptError, InvalidOptionError
        Also a SafetensorError.
    UnsupportedError
        The framework is one of safetensors' others.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: Device = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        self._model: Model | None = None
        self._names: list[str] | None = None
        if backend not in _BACKENDS:
            raise InvalidOptionError(f'backend "{backend}" is invalid (expected one of: "mmap", "pread")')
        if not isinstance(framework, str):
            raise TypeError(f"framework: expected str, not {type(framework).__name__}")
        path = Path(filename)
        chosen = framework_of(framework)
        self._device = _device_of(device, chosen)
        self._framework = chosen
        try:
            self._model = open_model(path, chosen)
        except MissingFileError as error:
            if path.exists():
                raise
            raise MissingFileError(f"No such file or directory: {path}", filename=error.filename) from error

    def _adopt(self, model: Model, names: Sequence[str], device: Device) -> None:
        """In place of `__init__`: these tensors of an open model, which stays open when this closes."""
        self._device = _device_of(device, "pt")
        self._framework = "pt"
        self._names = sorted(names)
        self._model = model

    def _opened(self) -> Model:
        if self._model is None:
            raise InvalidOptionError("File is closed")
        return self._model

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        model = self._opened()
        return model.keys() if self._names is None else list(self._names)

    def offset_keys(self) -> list[str]:
        """The names of the tensors, in the order in which they lie in the file."""
        model = self._opened()

        def position(name: str) -> tuple[int, int, int]:
            entry = model.entry(name)
            return entry.file, entry.file_offset, entry.size_bytes

        return sorted(self.keys(), key=position)

    def metadata(self) -> dict[str, str] | None:
        """The free-form metadata; None when the file has none."""
        return self._opened().metadata or None

    def _entry(self, name: str) -> tuple[Model, Entry]:
        model = self._opened()
        if not isinstance(name, str):
            raise TypeError(f"name: expected str, not {type(name).__name__}")
        problem: UnknownTensorError | None = None
        try:
            if self._names is None or _holds(self._names, name):
                return model, model.entry(name)
        except UnknownTensorError as error:
            problem = error
        raise UnknownTensorError(f"File does not contain tensor {name}") from problem

    def get_tensor(self, name: str) -> AnyTensor:
        """A whole tensor; waits until its bytes are there.

        A numpy array may be written to: like a torch tensor's, the writes stay in this process.

        Raises
        ------
        UnknownTensorError
            Also a SafetensorError.
        """
        model, entry = self._entry(name)
        if self._device == "cpu":
            return model.tensor(entry, writable=True)
        return self._on_device(model, [entry])[0]

    def get_tensors(self) -> dict[str, AnyTensor]:
        """All tensors, in the order of `offset_keys`."""
        names = self.offset_keys()
        if self._device == "cpu":
            return {name: self.get_tensor(name) for name in names}
        model = self._opened()
        return dict(zip(names, self._on_device(model, [model.entry(name) for name in names])))

    def get_slice(self, name: str) -> SafeSlice:
        """A tensor to take slices of. It stays valid when the file is closed."""
        model, entry = self._entry(name)
        return SafeSlice(self, model, entry)

    def _on_device(self, model: Model, entries: Sequence[Entry], items: tuple[Item, ...] = ()) -> list[Any]:
        """Fresh tensors on the device, filled in one batch with (a part of) those of the file."""
        torch = torch_module()
        tensors = []
        for entry in entries:
            dtype = torch_dtype(entry.number, name=entry.name, dtype_text=entry.dtype_text)
            tensors.append(torch.empty(shape_of(model, entry, items), dtype=dtype, device=self._device))
        orders = [(entry, items, tensor) for entry, tensor in zip(entries, tensors)]
        load(model, orders, cast=False, threads=0)
        return tensors


def load_file(
    filename: str | os.PathLike[str], framework: str | None = None, device: Device = "cpu"
) -> dict[str, AnyTensor]:
    """All tensors of a file (or folder), in the order in which they lie in it.

    Parameters
    ----------
    filename : str or os.PathLike
    framework : {"pt", "np"}, optional
        None: torch where it is installed, else numpy.
    device : str or int
        As `safe_open`'s.
    """
    with safe_open(filename, framework_of(framework), device) as opened:
        return opened.get_tensors()


class SafeSlice:
    """What `safe_open.get_slice` returns: index it to get a tensor."""

    def __init__(self, opened: safe_open, model: Model, entry: Entry) -> None:
        self._opened = opened
        self._model = model
        self._entry = entry

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor, as the file says."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The type of the elements, as the file says: ``"F32"``, ``"BF16"``, ..."""
        return self._entry.dtype_text

    def __getitem__(self, index: Any) -> AnyTensor:
        """A part of the tensor.

        torch: whatever torch's own indexing takes. numpy: integers, slices with a positive step and one
        ``...``, with safetensors' strict ends: a slice that ends outside the tensor is refused.

        Raises
        ------
        InvalidOptionError
            An index that safetensors refuses, for numpy. Also a SafetensorError.
        """
        device = self._opened._device
        if device != "cpu" and not self._entry.is_bytes:
            with suppress(InvalidIndexError):  # torch takes more, or refuses it in its own words
                items = parse(index)
                if all(step >= 0 for _, _, _, _, step in items):
                    return self._opened._on_device(self._model, [self._entry], items)[0]
        whole: Any = self._model.tensor(self._entry, writable=True)
        if self._opened._framework == "pt":
            return whole[index].to(device)
        part = whole[_strict_index(index, whole.shape)]
        # Writers take an array's bytes as they lie in memory, so a part is as dense as safetensors makes it.
        return part if part.flags.c_contiguous else part.copy()


def _strict_index(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The index for numpy, once safetensors' own checks hold. It has a ``...``: no part is a bare scalar."""
    if isinstance(index, list):
        if index:
            raise InvalidOptionError("Non empty lists are not implemented")
        index = slice(0, 0)
    parts = index if isinstance(index, tuple) else (index,)
    if sum(part is Ellipsis for part in parts) > 1:
        raise InvalidOptionError("Only one ellipsis (...) is allowed in slice index")
    named = sum(part is not Ellipsis for part in parts)
    if named > len(shape):
        _refuse(parts, shape, "more slicing indexes than dimensions in tensor")
    dimension = 0
    for part in parts:
        if part is Ellipsis:
            dimension += len(shape) - named
            continue
        _check_part(part, dimension, parts, shape)
        dimension += 1
    return parts if named < len(parts) else (*parts, ...)


def _check_part(part: Any, dimension: int, parts: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    extent = shape[dimension]
    if isinstance(part, slice):
        start, stop, step = (
            None if end is None else _integer(end, dimension) for end in (part.start, part.stop, part.step)
        )
        if step is not None and step < 1:
            raise InvalidOptionError(f"Slice step must be a positive integer, got {step}")
        begin, end = start or 0, extent if stop is None else stop
        asked = begin if begin >= extent else end - 1
        if max(begin, asked) >= extent and not (begin == 0 and end == extent):
            _refuse(parts, shape, _outside(asked, dimension, extent))
        return
    number = _integer(part, dimension)
    if number < -extent:
        raise InvalidOptionError(f"Invalid index {number} for dimension {dimension} of size {extent}")
    if number >= extent:
        _refuse(parts, shape, _outside(number, dimension, extent))


def _integer(value: Any, dimension: int) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise InvalidOptionError(
        f"Unsupported slice index at position {dimension}: expected slice, int, or ellipsis"
    )


def _outside(asked: int, dimension: int, extent: int) -> str:
    return f"index {asked} out of bounds for tensor dimension #{dimension} of size {extent}"


def _refuse(parts: tuple[Any, ...], shape: tuple[int, ...], why: str) -> NoReturn:
    text = ", ".join(_part_text(part) for part in parts)
    raise InvalidOptionError(f"Error during slicing [{text}] with shape {list(shape)}: {why}")


def _part_text(part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if not isinstance(part, slice):
        return str(part)
    ends = [part.start, part.stop] if part.step in (None, 1) else [part.start, part.stop, part.step]
    return ":".join("" if end is None else str(end) for end in ends)


class _safe_open_handle(safe_open):
    """`safe_open` for an open file object that has a name."""

    def __init__(self, f: IO[Any], framework: str, device: Device = "cpu", *, backend: str = "mmap") -> None:
        f.fileno()
        super().__init__(f.name, framework, device, backend=backend)
