"""tensord: the shared tensor layer of a machine.

A daemon reads model weights once and hands them to any number of processes as zero-copy tensors::

    import tensord

    model = tensord.open("/models/Qwen3-14B")     # starts a daemon if none runs; returns at once
    weight = model["lm_head.weight"]              # zero-copy torch (or numpy) tensor; waits for its bytes
    model.load_into([("lm_head.weight", np.s_[0:75968], parameter)])

Importing it imports nothing else: the first use of a name imports what it needs, and torch only where a
tensor of torch's is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import diffusers, engines, numpy, torch, transformers
    from ._safe_open import SafeSlice, _safe_open_handle, load_file, safe_open
    from .client import Model, View, open
    from .copies import LoadReport
    from .engines.module_loading import load_model
    from .engines.recording import record
    from .errors import (
        CancelledError,
        ChangedError,
        CorruptError,
        DeniedError,
        Error,
        ExhaustedError,
        IncompleteError,
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

__version__ = "0.1.0"

__all__ = [
    "CancelledError",
    "ChangedError",
    "CorruptError",
    "DeniedError",
    "Error",
    "ExhaustedError",
    "IncompleteError",
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
    "diffusers",
    "engines",
    "load_file",
    "load_model",
    "numpy",
    "open",
    "record",
    "safe_open",
    "torch",
    "transformers",
]


# Where the names are that are no errors.
_MODULES = {
    "LoadReport": "copies",
    "Model": "client",
    "Progress": "progress",
    "SafeSlice": "_safe_open",
    "View": "client",
    "_safe_open_handle": "_safe_open",
    "load_file": "_safe_open",
    "load_model": "engines.module_loading",
    "open": "client",
    "record": "engines.recording",
    "safe_open": "_safe_open",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("diffusers", "engines", "numpy", "torch", "transformers"):
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
