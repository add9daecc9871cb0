"""What a user can set for a load: the keys of ``--model-loader-extra-config``, in either engine. Pure."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InvalidArgumentError, InvalidTypeError

# An engine's update call passes no extra config; a JSON object in this variable stands for what it lacks.
VARIABLE = "TENSORD_ENGINE_OPTIONS"


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_flag_or_none(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_cache(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and bool(value))


def _is_seconds(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (is_number and not math.isnan(value) and value >= 0)


def _is_patterns(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, str) and one for one in value)
    return value is None or (isinstance(value, str) and bool(value))


def _is_renames(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(one, str) and isinstance(other, str) for one, other in value.items()
    )


# Key: what its value must be, in words and as a test.
_KEYS = {
    "strict": ("true or false", _is_flag),
    "fallback": ("true or false", _is_flag),
    "only": ("a pattern of tensor names, or a list of them", _is_patterns),
    "rename": ('an object {"regular expression": "replacement"}', _is_renames),
    "cache": ("true, false, or a folder", _is_cache),
    "autostart": ("true, false or null", _is_flag_or_none),
    "memory_wait": ("seconds or null", _is_seconds),
}


@dataclass(frozen=True)
class Options:
    """How a model is loaded through tensord."""

    strict: bool = True  # a parameter that nothing wrote fails the load, else it is a warning
    fallback: bool = False  # where tensord cannot load, the engine's own loader does, and a warning says so
    only: str | list[str] | None = None  # the tensors to load, see `tensord.open`
    rename: Mapping[str, str] = field(default_factory=dict)  # regular expressions to replacements, in turn
    cache: bool | str = False  # whether finished plans are kept and replayed, or the folder for them
    autostart: bool | None = None
    memory_wait: float | None = None  # seconds

    @classmethod
    def read(cls, given: Any, engine_keys: Collection[str] = ()) -> tuple[Options, dict[str, Any]]:
        """The options in an engine's extra config.

        Parameters
        ----------
        given : mapping, str or None
            Of a string, the JSON in it. What $TENSORD_ENGINE_OPTIONS has stands for keys that are not in it.
        engine_keys : collection of str
            Keys that the engine's own loader takes.

        Returns
        -------
        Options, dict
            Ours, and what the engine's own loader gets.

        Raises
        ------
        InvalidArgumentError
            A key is neither ours nor the engine's, or its value makes no sense.
        """
        values = {**_mapping(os.environ.get(VARIABLE), f"${VARIABLE}"), **_mapping(given, WHERE)}
        rest = {key: values.pop(key) for key in engine_keys if key in values}
        for key, value in values.items():
            if key not in _KEYS:
                raise InvalidArgumentError(_unknown(key, engine_keys))
            words, fits = _KEYS[key]
            if not fits(value):
                raise InvalidArgumentError(f"{WHERE}: {key} is {words}, not {value!r}")
        return cls(**values), rest

    def said(self) -> dict[str, Any]:
        """What differs from the defaults, for messages and to hand on to another process."""
        plain = Options()
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(plain, name)}


WHERE = "model_loader_extra_config"


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(f"{where} is no JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise InvalidTypeError(f"{where} is a JSON object, not {given!r}")
    return dict(given)


def _unknown(key: str, engine_keys: Collection[str]) -> str:
    close = difflib.get_close_matches(str(key), _KEYS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    known = ", ".join(sorted(_KEYS))
    engines = f"; of the engine's own: {', '.join(sorted(engine_keys))}" if engine_keys else ""
    return f"{WHERE}: unknown key {key!r}{hint}; there are: {known}{engines}"
