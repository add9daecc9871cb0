"""diffusers over tensord: pipelines and models read through the daemon, the text encoders of pipelines too.

with tensord.diffusers.patch():
    pipeline = DiffusionPipeline.from_pretrained("/models/FLUX.1-schnell", torch_dtype=torch.bfloat16)
"""

from __future__ import annotations

import importlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .engines.huggingface import LoadedModel, Patch, load

__all__ = ["LoadedModel", "from_pretrained", "patch"]


class patch(Patch):
    __doc__ = Patch.__doc__
    library = "diffusers"


def from_pretrained(
    model: Any, *arguments: Any, strict: bool = False, fallback: bool = False, **options: Any
) -> Any:
    """A pipeline or model of diffusers, read through tensord.

    Parameters
    ----------
    model : class, str or os.PathLike
        A class with ``from_pretrained`` (the path or name follows it), or a path or name: a folder of one
        model gives that model, everything else a pipeline.
    strict, fallback : bool
        As `patch`'s.
    *arguments, **options
        Go to ``from_pretrained``.

    Raises
    ------
    Error
        See `tensord.open`; and UnsupportedError where ``strict`` refuses.
    """
    return load(patch(strict=strict, fallback=fallback), _class_of, model, arguments, options)


def _class_of(path: str | os.PathLike[str], options: dict[str, Any]) -> Any:
    diffusers = importlib.import_module("diffusers")
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((Path(path) / (options.get("subfolder") or "") / "config.json").read_bytes())
        found = getattr(diffusers, str(config.get("_class_name")), None)
        if found is not None:
            return found
    return diffusers.DiffusionPipeline
