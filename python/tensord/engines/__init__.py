"""Loading modules of torch's: through their own loaders (`record`, `stream`), or by name (`load_model`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coverage import Coverage, CoverageReport
    from .lazy import LazyTensor
    from .module_loading import load_model
    from .recording import Recording, Stream, record, stream
    from .summary import LoadSummary

__all__ = [
    "Coverage",
    "CoverageReport",
    "LazyTensor",
    "LoadSummary",
    "Recording",
    "Stream",
    "load_model",
    "record",
    "stream",
]

_MODULES = {
    "Coverage": "coverage",
    "CoverageReport": "coverage",
    "LazyTensor": "lazy",
    "LoadSummary": "summary",
    "Recording": "recording",
    "Stream": "recording",
    "load_model": "module_loading",
    "record": "recording",
    "stream": "recording",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used; all of them need torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
