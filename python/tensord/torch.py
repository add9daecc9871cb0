"""safetensors.torch over tensord: loading reads through the daemon, saving is safetensors' own."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch

from ._safe_open import safe_open
from ._saving import borrowed

_BORROWED = ("save", "save_file", "save_model", "load")

__all__ = ["load_file", "load_model", *_BORROWED]


def load_file(
    filename: str | os.PathLike[str],
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
) -> dict[str, torch.Tensor]:
    """All tensors of a file (or folder).

    Parameters
    ----------
    filename : str or os.PathLike
    device : str or int
        "cpu": zero-copy tensors; writes to them stay in this process. Else: copies on that device.
    backend : {"mmap", "pread"}
        Accepted and without effect.

    Returns
    -------
    dict
        Name to tensor.

    Raises
    ------
    MissingFileError, CorruptError, UnsupportedDtypeError
        See `tensord.open` and `tensord.safe_open`.
    """
    with safe_open(filename, framework="pt", device=device, backend=backend) as opened:
        return opened.get_tensors()


def load_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: str | int = "cpu",
    *,
    backend: str = "mmap",
) -> tuple[set[str], list[str]]:
    """Loads a file (or folder) into a module whose tensors may share memory.

    Of tensors that share memory a file holds one; the others count as loaded with it.

    Parameters
    ----------
    model : torch.nn.Module
    filename : str or os.PathLike
    strict : bool
        Whether missing or unexpected names are an error.
    device, backend
        As `load_file`'s.

    Returns
    -------
    missing : set of str
        Names of the module that the file does not give.
    unexpected : list of str
        Names of the file that the module has no use for.

    Raises
    ------
    RuntimeError
        ``strict`` and there are such names, or shapes differ (as ``torch.nn.Module.load_state_dict``).
    """
    loaded = load_file(filename, device, backend=backend)
    shared = _repeated_names(model.state_dict(), loaded)
    missing_keys, unexpected_keys = model.load_state_dict(loaded, strict=False)
    missing = set(missing_keys) - shared
    unexpected = [*unexpected_keys, *sorted(shared - set(missing_keys))]
    if strict and (missing or unexpected):
        lines = [f"Error(s) in loading state_dict for {type(model).__name__}:"]
        if missing:
            lines.append(f"Missing key(s) in state_dict: {_quoted(missing)}")
        if unexpected:
            lines.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}")
        raise RuntimeError("\n    ".join(lines))
    return missing, unexpected


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))


def _repeated_names(state: dict[str, torch.Tensor], in_file: Collection[str]) -> set[str]:
    """The names that share memory with another one, which stands for them.

    Of each group of overlapping tensors one that covers the whole storage stands for all: the first by
    name, those in the file before others.
    """
    storages: dict[tuple[Any, int, int], list[str]] = {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes():
            key = (tensor.device, storage.data_ptr(), storage.nbytes())
            storages.setdefault(key, []).append(name)
    repeated: set[str] = set()
    for names in storages.values():
        for group in _overlapping(names, state):
            whole = [name for name in group if _covers_storage(state[name])]
            if not whole:
                raise RuntimeError(
                    f"load model: tensors {sorted(group)} share memory and none covers all of it"
                )
            kept = min(whole, key=lambda name: (name not in in_file, name))
            repeated.update(group - {kept})
    return repeated


def _overlapping(names: list[str], state: dict[str, torch.Tensor]) -> list[set[str]]:
    """Groups of two and more names whose byte ranges meet."""
    ranges = sorted((*_byte_range(state[name]), name) for name in names)
    groups: list[set[str]] = []
    reached = -1
    for begin, end, name in ranges:
        if begin >= reached:
            groups.append(set())
        groups[-1].add(name)
        reached = max(reached, end)
    return [group for group in groups if len(group) > 1]


def _byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def _covers_storage(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return (
        tensor.data_ptr() == storage.data_ptr() and tensor.numel() * tensor.element_size() == storage.nbytes()
    )


def __getattr__(name: str) -> Any:
    return borrowed("torch", name, _BORROWED)
