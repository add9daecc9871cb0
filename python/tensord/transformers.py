"""transformers over tensord: ``from_pretrained`` reads through the daemon.

    with tensord.transformers.patch():
        model = AutoModelForCausalLM.from_pretrained("/models/Qwen3-14B", dtype="auto")

On the CPU the parameters lie in the daemon's memory, without a copy, unless transformers converts or merges
them; writes to them stay in this process. Into GPU memory the daemon's copy engines bring them.
"""

from __future__ import annotations

import importlib
from typing import Any

from .engines.huggingface import LoadedModel, Patch, load

__all__ = ["LoadedModel", "from_pretrained", "patch"]


class patch(Patch):
    __doc__ = Patch.__doc__
    library = "transformers"


def from_pretrained(
    model: Any, *arguments: Any, strict: bool = False, fallback: bool = False, **options: Any
) -> Any:
    """A model of transformers, read through tensord.

    Parameters
    ----------
    model : class, str or os.PathLike
        A class with ``from_pretrained`` (the path or name follows it), or a path or name: then the class is
        the one its configuration names.
    strict, fallback : bool
        As `patch`'s.
    *arguments, **options
        Go to ``from_pretrained``.

    Raises
    ------
    Error
        See `tensord.open`; and UnsupportedError where ``strict`` refuses.
    """
    return load(patch(strict=strict, fallback=fallback), class_of, model, arguments, options)


def class_of(path: Any, options: dict[str, Any]) -> Any:
    """The class that a checkpoint's configuration names; `options` are those of ``from_pretrained``."""
    transformers = importlib.import_module("transformers")
    config = options.get("config")
    if config is None:
        where = ("revision", "cache_dir", "token", "local_files_only", "trust_remote_code", "subfolder")
        known = {name: options[name] for name in where if name in options}
        config = transformers.AutoConfig.from_pretrained(path, **known)
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel
