"""PlanCache: what loaders did once, kept in a file, so that the next start of the same engine traces nothing.

    $TENSORD_STATE_DIR/plans/<digest of the key>.plan
    magic | header's length | header (JSON) | int64 arrays | SHA-256 of all that

A copy names its source by its place in the order in which a loader is given tensors, and its target by a
parameter and an offset in it: neither files nor addresses. The digest covers the caller's key, the module's
class, versions, and name, type and shape of every tensor of the checkpoint; of their values a traced load
knows nothing, so checkpoints of equal shapes share a plan.

A file is believed nothing: its owner, its digest, each number in it and the parameters it names are checked,
and what does not fit is traced anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from .._library import RANK_MAX
from ..errors import InvalidTypeError
from ..tensors import DTYPES
from .copy_table import CopyTable, per_copy_sum
from .offer import Offer
from .recorder import Recorder, interval_of, is_memory, storage_of

MAGIC = b"tensord plan 1\n"
FILE_BYTES_MAX = 1 << 30  # 100 bytes a copy
FILE_COUNT_MAX = 256
COPY_COUNT_MAX = 1 << 20  # as tensor::kRecordsMax

_DIGEST_BYTES = 32
_WORD = 8
_PER_COPY = (
    "sources",
    "source_numbers",
    "source_offsets",
    "parameters",
    "offsets",
    "target_numbers",
    "ranks",
)
_PER_DIMENSION = ("extents", "source_strides", "target_strides")

_log = logging.getLogger("tensord")


class _Unfit(Exception):
    """Why a plan is not used."""


def state_folder() -> Path:
    """As the daemon: $TENSORD_STATE_DIR, else $XDG_STATE_HOME/tensord, else ~/.local/state/tensord."""
    named = os.environ.get("TENSORD_STATE_DIR")
    if named:
        return Path(named)
    home = os.environ.get("XDG_STATE_HOME")
    return Path(home) / "tensord" if home else Path.home() / ".local" / "state" / "tensord"


class PlanCache:
    """The cached plan of one load, if there is one.

    Parameters
    ----------
    offer : Offer
        What a loader is given.
    key : anything that JSON can say
        What else decides what a loader does: the engine's version, the model's configuration, ranks.

    Attributes
    ----------
    why : str
        Why there is no plan.
    """

    def __init__(
        self,
        offer: Offer,
        module: torch.nn.Module,
        key: Any,
        device: torch.device,
        *,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._offer = offer
        self._module = module
        self._state = module_state(module)
        self._attributes = plain_attributes(module)
        self._digest = _digest_of(offer, module, key, device)
        plans = state_folder() / "plans" if folder is None else Path(folder)
        self.path = plans / f"{self._digest}.plan"
        self.why = ""

    def watched(self) -> dict[int, str]:
        """Storages of the module's tensors, for a Guard."""
        watched: dict[int, str] = {}
        for name, tensor in self._state.items():
            if not tensor.is_meta:
                watched.setdefault(storage_of(tensor), name)
        return watched

    def find(self) -> CopyTable | None:
        """The plan, for the memory that the module has now."""
        try:
            header, arrays = _parse(_read(self.path), self._digest)
            return self._bound(header, arrays)
        except FileNotFoundError:
            self.why = "traced: there is no plan yet"
        except OSError as error:
            self.why = f"traced: read {self.path}: {error.strerror}"
        except _Unfit as unfit:
            self.drop(str(unfit))
        return None

    def drop(self, why: str) -> None:
        """Removes the file."""
        self.why = f"traced: the cached plan was dropped: {why}"
        _log.warning("tensord: %s: the cached plan is dropped: %s", self.path, why)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("tensord: remove %s: %s", self.path, error.strerror)

    # ---- reading ---------------------------------------------------------------------------------

    def _bound(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> CopyTable:
        """The plan with addresses; refuses what the module of now has no room for."""
        if header["state"] != describe(self._state):
            raise _Unfit("the module has other parameters or buffers, or of other shapes")
        tensors = list(self._state.values())
        if any(one.is_meta for one in tensors):
            raise _Unfit("the module is on device meta")
        intervals = np.array([interval_of(one) for one in tensors], dtype=np.int64).reshape(-1, 3)
        _check_ranges(arrays, len(self._offer), len(tensors))
        item_bytes = np.array([one.element_size() for one in tensors], dtype=np.int64)
        at = arrays["parameters"]
        reach = per_copy_sum((arrays["extents"] - 1) * arrays["target_strides"], arrays["ranks"])
        room = intervals[at, 1] - intervals[at, 0] - item_bytes[at]
        if (arrays["offsets"] + reach > room).any():
            raise _Unfit("it writes beyond a parameter")
        addresses = intervals[at, 0] + arrays["offsets"]
        encoded = self._offer.encoded()

        def target_at(copy: int) -> torch.Tensor:
            tensor = tensors[int(at[copy])]
            size = tensor.element_size()
            start, rank = int(arrays["ranks"][:copy].sum()), int(arrays["ranks"][copy])
            shape = arrays["extents"][start : start + rank].tolist()
            strides = (arrays["target_strides"][start : start + rank] // size).tolist()
            offset = tensor.storage_offset() + int(arrays["offsets"][copy]) // size
            return tensor.detach().as_strided(shape, strides, offset)

        on_device = np.array([not one.is_cpu for one in tensors], dtype=np.bool_)
        return CopyTable(
            [encoded[source] for source in arrays["sources"].tolist()],
            arrays["source_numbers"],
            arrays["source_offsets"],
            arrays["target_numbers"],
            addresses.astype(np.uint64),
            on_device[at],
            arrays["ranks"],
            arrays["extents"],
            arrays["source_strides"],
            arrays["target_strides"],
            target_at,
        )

    # ---- writing ---------------------------------------------------------------------------------

    def keep(self, recorder: Recorder) -> str:
        """Writes the plan of a traced load, unless something but its copies made the module what it is.

        Returns
        -------
        str
            What became of it.
        """
        try:
            content = self._content(recorder)
            _write(self.path, content)
        except _Unfit as unfit:
            return f"{self.why}; none is kept: {unfit}"
        except OSError as error:
            _log.warning("tensord: write %s: %s", self.path, error.strerror)
            return f"{self.why}; none is kept: write {self.path}: {error.strerror}"
        return f"{self.why}; it is kept for the next start"

    def _content(self, recorder: Recorder) -> bytes:
        if recorder.plain:
            name, why = next(iter(recorder.plain.items()))
            raise _Unfit(f"tensor {name!r} was needed as such: {why}")
        if recorder.meta_count:
            raise _Unfit("loaders copied to device meta")
        if recorder.foreign is not None:
            raise _Unfit(recorder.foreign)
        if describe(self._state, places=True) != describe(module_state(self._module), places=True):
            raise _Unfit("the load changed the module's parameters or buffers")
        if self._attributes != plain_attributes(self._module):
            raise _Unfit("the load changed tensors that are plain attributes of the module")
        arrays = self._arrays(recorder.tables)
        header = json.dumps(
            {
                "digest": self._digest,
                "state": describe(self._state),
                "counts": {name: len(array) for name, array in arrays.items()},
            }
        ).encode()
        content = b"".join(
            [
                MAGIC,
                len(header).to_bytes(_WORD, "little"),
                header,
                *(arrays[name].astype("<i8").tobytes() for name in (*_PER_COPY, *_PER_DIMENSION)),
            ]
        )
        return content + hashlib.sha256(content).digest()

    def _arrays(self, tables: list[CopyTable]) -> dict[str, np.ndarray]:
        at_source: dict[bytes, int] = {}
        for position, name in enumerate(self._offer.encoded()):
            at_source.setdefault(name, position)
        names = [name for table in tables for name in table.names]
        if not names:
            raise _Unfit("nothing was copied")
        parameters, offsets = self._places(np.concatenate([table.intervals() for table in tables]))
        joined = {
            name: np.concatenate([getattr(table, name) for table in tables])
            for name in ("source_numbers", "source_offsets", "target_numbers", "ranks", *_PER_DIMENSION)
        }
        return {
            **joined,
            "sources": np.array([at_source[name] for name in names], dtype=np.int64),
            "parameters": parameters,
            "offsets": offsets,
        }

    def _places(self, written: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each copy: which tensor of the module it writes, and how far into it."""
        tensors = np.array([interval_of(one) for one in self._state.values()], dtype=np.int64).reshape(-1, 3)
        order = np.argsort(tensors[:, 0], kind="stable")
        found = np.searchsorted(tensors[order, 0], written[:, 0], side="right") - 1
        if len(order) == 0 or (found < 0).any():
            raise _Unfit("a copy went elsewhere than into the module's parameters and buffers")
        # Of tied ones the first: equal beginnings are found at their last.
        begins = tensors[order, 0]
        parameters = order[np.searchsorted(begins, begins[found], side="left")]
        if (written[:, 1] > tensors[parameters, 1]).any():
            raise _Unfit("a copy went elsewhere than into the module's parameters and buffers")
        filled = np.zeros(len(tensors), dtype=np.int64)
        np.add.at(filled, parameters, written[:, 2])
        names = list(self._state)
        for at in np.unique(parameters):
            if filled[at] != tensors[at, 2]:
                raise _Unfit(
                    f"copies wrote {filled[at]} of the {tensors[at, 2]} bytes of {names[at]}; "
                    "what the rest is, a plan does not know"
                )
        return parameters.astype(np.int64), written[:, 0] - tensors[parameters, 0]


def module_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers by name, those that are tied under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: one for name, one in chain(parameters, buffers) if is_memory(type(one))}


def plain_attributes(module: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors the parts of a module keep as plain attributes."""
    return {
        f"{prefix}.{name}": (id(held), held._version)
        for prefix, part in module.named_modules()
        for name, held in vars(part).items()
        if isinstance(held, torch.Tensor) and not held.is_inference()
    }


def describe(state: dict[str, torch.Tensor], *, places: bool = False) -> list[Any]:
    """Name, shape, strides, type and device of each tensor, and where it lies."""
    return [
        [name, list(one.shape), list(one.stride()), str(one.dtype), one.device.type]
        + ([one.data_ptr() if not one.is_meta else 0] if places else [])
        for name, one in state.items()
    ]


def _digest_of(offer: Offer, module: torch.nn.Module, key: Any, device: torch.device) -> str:
    try:
        said = json.dumps(key, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(f"record: cache: a key is what JSON can say: {error}") from None
    kind = type(module)
    digest = hashlib.sha256(offer.digest())
    for text in (__version__, torch.__version__, said, kind.__module__, kind.__qualname__, str(device)):
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()[:40]


# ---- the file ----------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        known = os.fstat(descriptor)
        if not stat.S_ISREG(known.st_mode) or known.st_uid != os.geteuid() or known.st_mode & 0o022:
            raise _Unfit("it is no file that its owner alone may write")
        if known.st_size > FILE_BYTES_MAX:
            raise _Unfit(f"it has {known.st_size} bytes")
        return file.read()


def _parse(content: bytes, digest: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    end = len(content) - _DIGEST_BYTES
    start = len(MAGIC) + _WORD
    if end < start or not content.startswith(MAGIC):
        raise _Unfit("it is no plan")
    if hashlib.sha256(memoryview(content)[:end]).digest() != content[end:]:
        raise _Unfit("its bytes are not those that were written")
    header_bytes = int.from_bytes(content[len(MAGIC) : start], "little")
    try:
        header = json.loads(content[start : start + header_bytes])
        counts = [int(header["counts"][name]) for name in (*_PER_COPY, *_PER_DIMENSION)]
        is_own = header["digest"] == digest and isinstance(header["state"], list)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Unfit("its header makes no sense") from None
    at = start + header_bytes
    if not is_own or min(counts) < 0 or at + sum(counts) * _WORD != end or counts[0] > COPY_COUNT_MAX:
        raise _Unfit("it is of another load, or of another size than it says")
    arrays = {}
    for name, count in zip((*_PER_COPY, *_PER_DIMENSION), counts):
        arrays[name] = np.frombuffer(content, "<i8", count, at).astype(np.int64)
        at += count * _WORD
    return header, arrays


def _check_ranges(arrays: dict[str, np.ndarray], source_count: int, parameter_count: int) -> None:
    """Refuses numbers that would lead anywhere; regions of sources are checked by the library."""
    count, flat = len(arrays["sources"]), len(arrays["extents"])
    limits = {
        "sources": source_count,
        "source_numbers": len(DTYPES),
        "source_offsets": 1 << 62,
        "parameters": parameter_count,
        "offsets": 1 << 60,
        "target_numbers": len(DTYPES),
        "ranks": RANK_MAX + 1,
        "extents": 1 << 48,
        "source_strides": 1 << 62,
        "target_strides": 1 << 48,
    }
    for name, limit in limits.items():
        array = arrays[name]
        if len(array) != (flat if name in _PER_DIMENSION else count):
            raise _Unfit("its arrays are of unequal length")
        if len(array) and (array.min() < 0 or array.max() >= limit):
            raise _Unfit(f"{name} are out of range")
    if int(arrays["ranks"].sum()) != flat:
        raise _Unfit("its copies have other dimensions than it says")
    if flat and arrays["extents"].min() < 1:
        raise _Unfit("extents are out of range")
    far = per_copy_sum_of_floats((arrays["extents"] - 1.0) * arrays["target_strides"], arrays["ranks"])
    if len(far) and far.max() >= 2.0**60:
        raise _Unfit("it writes beyond a parameter")


def per_copy_sum_of_floats(values: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """`per_copy_sum` that cannot overflow."""
    sums = np.zeros(len(ranks))
    np.add.at(sums, np.repeat(np.arange(len(ranks)), ranks), values)
    return sums


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".plan-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    kept = sorted(path.parent.glob("*.plan"), key=lambda one: one.stat().st_mtime)
    for old in kept[:-FILE_COUNT_MAX]:
        old.unlink(missing_ok=True)
