"""tensord: the shared tensor layer of a machine.

A daemon reads model weights once and hands them to any number of processes as zero-copy tensors::

    import tensord

    model = tensord.open("/models/Qwen3-14B")     # starts a daemon if none runs; returns at once
    weight = model["lm_head.weight"]              # zero-copy torch (or numpy) tensor; waits for its bytes
    model.load_into([("lm_head.weight", np.s_[0:75968], parameter)])

Importing it imports numpy but not torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .client import Model, View, open
from .copies import LoadReport
from .errors import (
    CancelledError,
    ChangedError,
    CorruptError,
    DeniedError,
    Error,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    InvalidIndexError,
    InvalidOptionError,
    InvalidTypeError,
    MissingFileError,
    NotFoundError,
    TensordWarning,
    UnavailableError,
    UnknownTensorError,
    UnsupportedDtypeError,
    UnsupportedError,
    WaitTimeoutError,
)
from .progress import Progress
from .safe_open import SafeSlice, _safe_open_handle, load_file, safe_open

if TYPE_CHECKING:
    from . import numpy, torch

__version__ = "0.1.0"

__all__ = [
    "CancelledError",
    "ChangedError",
    "CorruptError",
    "DeniedError",
    "Error",
    "ExhaustedError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidIndexError",
    "InvalidOptionError",
    "InvalidTypeError",
    "LoadReport",
    "MissingFileError",
    "Model",
    "NotFoundError",
    "Progress",
    "SafeSlice",
    "TensordWarning",
    "UnavailableError",
    "UnknownTensorError",
    "UnsupportedDtypeError",
    "UnsupportedError",
    "View",
    "WaitTimeoutError",
    "_safe_open_handle",
    "load_file",
    "numpy",
    "open",
    "safe_open",
    "torch",
]


def __getattr__(name: str) -> Any:
    """`tensord.torch` and `tensord.numpy` are imported when first used."""
    if name in ("numpy", "torch"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
