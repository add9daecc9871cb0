"""safetensors.numpy over tensord: `load_file` reads through the daemon, the rest is safetensors' own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ._safe_open import safe_open
from ._saving import borrowed

if TYPE_CHECKING:
    import numpy as np

_BORROWED = ("save", "save_file", "load")

__all__ = ["load_file", *_BORROWED]


def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, np.ndarray]:
    """All tensors of a file (or folder) as zero-copy arrays.

    Parameters
    ----------
    filename : str or os.PathLike
    backend : {"mmap", "pread"}
        Accepted and without effect.

    Returns
    -------
    dict
        Name to array. Arrays may be written to; the writes stay in this process.

    Raises
    ------
    MissingFileError, CorruptError, UnsupportedDtypeError
        See `tensord.open` and `tensord.safe_open`.
    """
    with safe_open(filename, framework="np", backend=backend) as opened:
        return opened.get_tensors()


def __getattr__(name: str) -> Any:
    return borrowed("numpy", name, _BORROWED)
