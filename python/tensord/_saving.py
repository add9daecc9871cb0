"""What safetensors does itself: tensord reads, it does not write files."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import UnsupportedError


def borrowed(framework: str, name: str, names: tuple[str, ...]) -> Any:
    """A function of ``safetensors.<framework>``, for a module's ``__getattr__``."""
    if name not in names:
        raise AttributeError(f"module 'tensord.{framework}' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"safetensors.{framework}")
    except ImportError as error:
        raise UnsupportedError(
            f"tensord.{framework}.{name} is safetensors' own, and that package cannot be imported "
            f"({error}); install safetensors"
        ) from error
    return getattr(module, name)
