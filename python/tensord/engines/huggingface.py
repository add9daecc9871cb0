"""What `tensord.transformers` and `tensord.diffusers` share: a patch that is active for a while.

While one is active, every module that holds safetensors' `safe_open` holds `open_file` of this module
instead, and the `from_pretrained` of both libraries is one that looks at what came out and logs it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..errors import (
    Error,
    ExhaustedError,
    InvalidTypeError,
    TensordWarning,
    UnavailableError,
    UnsupportedError,
)
from ..tensors import Entry, torch_type
from .model_files import Load

# Whose `from_pretrained` is looked at: (library, module, class).
MODEL_CLASSES = (
    ("transformers", "transformers.modeling_utils", "PreTrainedModel"),
    ("diffusers", "diffusers.models.modeling_utils", "ModelMixin"),
)

# Modules without which a library's loads go past us.
NEEDED = {"transformers": "transformers.modeling_utils", "diffusers": "safetensors.torch"}

# Options of `from_pretrained` with which a library reads files in a way of its own.
PLAIN_OPTIONS = ("disable_mmap", "gguf_file")


@dataclass(frozen=True)
class LoadedModel:
    """What a `from_pretrained` did, for programs."""

    model: str  # its class
    path: str
    bytes: int  # handed to the library
    seconds: float  # from asking for the first tensor to having the last
    total_seconds: float  # of from_pretrained as a whole
    tensor_count: int  # parameters, and buffers that are in the files
    zero_copy_count: int  # of them: lie in the daemon's memory
    copied: dict[str, int]  # the others, by why
    device_bytes: int  # of `bytes`: written to GPU memory by the daemon's copy engines
    staged_bytes: int  # of `bytes`: that came to GPU memory in a slower way; `slower_why` says why
    slower_why: str
    notes: tuple[str, ...]  # what did not go as it should

    def __str__(self) -> str:
        rate = self.bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0
        text = (
            f"{self.model} from {self.path}: {self.bytes / 1e9:.3f} GB in {self.seconds:.3f} s "
            f"({rate:.1f} GB/s; from_pretrained took {self.total_seconds:.3f} s), "
            f"{self.zero_copy_count} of {self.tensor_count} tensors zero-copy"
        )
        if self.copied:
            text += "; " + ", ".join(f"{count} {why}" for why, count in self.copied.items())
        if self.device_bytes or self.staged_bytes:
            text += f"; {self.device_bytes / 1e9:.3f} GB by copy engines"
        if self.slower_why:
            text += f", {self.staged_bytes / 1e9:.3f} GB slower: {self.slower_why}"
        return text + "".join(f"; {note}" for note in self.notes)


@dataclass(eq=False)
class _Active:
    """One entered patch."""

    owner: Patch
    loads: list[LoadedModel] = field(default_factory=list)

    def announce(self, text: str, cause: Error | None = None) -> None:
        """Says that something goes the plain way; with ``strict`` it does not.

        Raises
        ------
        UnsupportedError, or `cause`
        """
        if self.owner.strict:
            raise UnsupportedError(f"{text} (strict)") if cause is None else cause
        warnings.warn(text, TensordWarning, stacklevel=2)


class _Threads(threading.local):
    """Of this thread: the patches it entered, and the load it is in."""

    def __init__(self) -> None:
        self.entered: list[_Active] = []
        self.load: _Running | None = None


@dataclass(eq=False)
class _Running:
    """A `from_pretrained` under way."""

    active: _Active
    load: Load
    is_plain: bool = False  # the daemon failed: everything goes the plain way


_here = _Threads()
_lock = threading.RLock()
_active: list[_Active] = []  # in the order of entering
_running: list[_Running] = []
_installed: _Installation | None = None


def _active_here() -> _Active | None:
    """The patch whose options count: this thread's innermost, else the latest of any thread."""
    if _here.entered:
        return _here.entered[-1]
    with _lock:
        return _active[-1] if _active else None


def _running_here() -> _Running | None:
    """The load that a file belongs to; libraries open files in threads of their own, too."""
    if _here.load is not None:
        return _here.load
    with _lock:
        return _running[-1] if _running else None


# ---- files -----------------------------------------------------------------------------------------------


def open_file(filename: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> Any:
    """Stands in for `safetensors.safe_open`: the same arguments, the same methods."""
    active, running = _active_here(), _running_here()
    original = _original_safe_open()
    if active is None or (running is not None and running.is_plain):
        return original(filename, framework, device, **options)
    if framework not in ("pt", "torch", "pytorch"):
        active.announce(f"{filename}: opened for {framework}: it is read the plain way")
        return original(filename, framework, device, **options)
    load = Load() if running is None else running.load
    try:
        return load.open(filename, device)
    except UnavailableError as error:
        if not active.owner.fallback:
            load.error = load.error or error
            raise
        reason: Error = error
    except (ExhaustedError, UnsupportedError) as error:
        reason = error
    text = f"{filename} is read the plain way: {reason}"
    load.note(text)
    if not isinstance(reason, UnavailableError):
        active.announce(text, reason)
    else:
        warnings.warn(text, TensordWarning, stacklevel=2)
        if running is not None:
            running.is_plain = True  # the next file need not try
    return original(filename, framework, device, **options)


def _original_safe_open() -> Any:
    installed = _installed
    return importlib.import_module("safetensors").safe_open if installed is None else installed.original


@dataclass
class _Installation:
    """What was replaced, and what was there before."""

    original: Any
    methods: list[tuple[Any, Any, Any]] = field(default_factory=list)  # class, before, ours

    def extend(self) -> None:
        """Replaces what is not replaced yet; may be called again."""
        for names, name in _holders_of(self.original, open_file):
            names[name] = open_file
        for library, module, class_name in MODEL_CLASSES:
            holder = getattr(sys.modules.get(module), class_name, None)
            if holder is not None and all(known is not holder for known, _, _ in self.methods):
                self._wrap(library, holder)

    def _wrap(self, library: str, holder: Any) -> None:
        before = vars(holder).get("from_pretrained")
        if isinstance(before, classmethod):
            ours = classmethod(_watched(library, before.__func__))
            self.methods.append((holder, before, ours))
            holder.from_pretrained = ours

    def remove(self) -> None:
        """Restores everything, also in modules that were imported since."""
        for holder, before, ours in self.methods:
            if vars(holder).get("from_pretrained") is ours:
                holder.from_pretrained = before
        for names, name in _holders_of(open_file, self.original):
            names[name] = self.original

    def missing(self, library: str) -> str | None:
        """Why loads of a library go past us, where they do."""
        module = sys.modules.get(NEEDED[library])
        if module is not None and open_file in vars(module).values():
            return None
        version = getattr(sys.modules.get(library), "__version__", "of this version")
        return (
            f"{library} {version} does not read files with safetensors' safe_open in {NEEDED[library]}: "
            "tensord cannot serve its loads, they go the plain way"
        )


# Modules that held neither `safe_open`, with the size they had then: looking through all names of thousands
# of modules takes longer than loading a model without a copy.
_clean: dict[str, tuple[int, int]] = {}


def _holders_of(wanted: Any, other: Any) -> list[tuple[dict[str, Any], str]]:
    """The names of each module that holds an object, and the one by which it does. Ours do not count."""
    found = []
    for module_name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] == "tensord":
            continue
        names = module.__dict__
        mark = (id(names), len(names))
        if _clean.get(module_name) == mark and names.get("safe_open") is not wanted:
            continue
        held = [(name, value) for name, value in list(names.items()) if value is wanted or value is other]
        found += [(names, name) for name, value in held if value is wanted]
        if not held:
            _clean[module_name] = mark
    return found


# ---- from_pretrained -------------------------------------------------------------------------------------


def load(
    patch: Patch, class_of: Callable[[Any, dict[str, Any]], Any], model: Any, arguments: Any, options: Any
) -> Any:
    """``model.from_pretrained(...)`` while `patch` is active; of a path, that of the class it names."""
    with patch:
        if hasattr(model, "from_pretrained"):
            return model.from_pretrained(*arguments, **options)
        return class_of(model, options).from_pretrained(model, *arguments, **options)


def _watched(library: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A `from_pretrained` that reports. One inside another is part of that one."""

    @functools.wraps(original)
    def from_pretrained(cls: type, *arguments: Any, **options: Any) -> Any:
        active = _active_here()
        if active is None or _here.load is not None:
            return original(cls, *arguments, **options)
        call = functools.partial(original, cls, *arguments, **options)
        path = str(arguments[0] if arguments else options.get("pretrained_model_name_or_path", ""))
        refused = [name for name in PLAIN_OPTIONS if options.get(name)]
        if refused:
            active.announce(f"{cls.__name__} from {path}: with {refused[0]} {library} reads it the plain way")
            return call()
        result, load, seconds = _attempt(call, active)
        if load.file_count == 0 and options.get("state_dict") is None and not load.notes:
            active.announce(
                f"{cls.__name__} from {path}: {library} opened no safetensors file: it was read the plain way"
            )
        summary = _summary(result, load, path, seconds)
        load.close()
        active.loads.append(summary)
        logging.getLogger("tensord").info("%s", summary)
        return result

    return from_pretrained


def _attempt(call: Callable[[], Any], active: _Active) -> tuple[Any, Load, float]:
    """Runs it; a second time, the plain way, when the daemon fails and that is allowed."""
    begin = time.perf_counter()
    running = _Running(active, Load(reads_ahead=True))
    with _under_way(running):
        try:
            result = call()
            failure = running.load.error
        except Exception as error:
            failure = running.load.error
            if not (active.owner.fallback and isinstance(failure, UnavailableError)):
                if failure is None or failure is error:
                    raise
                raise failure from error
        if failure is not None and not (active.owner.fallback and isinstance(failure, UnavailableError)):
            raise failure  # the library went on without the tensor
    if failure is not None:
        running.load.close()
        running = _Running(active, Load(), is_plain=True)
        running.load.note(f"the daemon failed ({failure}): read again, the plain way")
        warnings.warn(running.load.notes[0], TensordWarning, stacklevel=3)
        with _under_way(running):
            result = call()
    return result, running.load, time.perf_counter() - begin


@contextmanager
def _under_way(running: _Running) -> Iterator[None]:
    with _lock:
        _running.append(running)
    _here.load = running
    try:
        yield
    except BaseException:
        running.load.close()
        raise
    finally:
        _here.load = None
        with _lock:
            _running.remove(running)


def _summary(result: Any, load: Load, path: str, total_seconds: float) -> LoadedModel:
    model = result[0] if isinstance(result, tuple) else result
    zero_copy_count = tensor_count = 0
    copied: Counter[str] = Counter()
    ranges = sorted((entry.address, entry.address + entry.size_bytes) for entry in load.handed.values())
    begins = [begin for begin, _ in ranges]
    for name, tensor in _tensors_of(model):
        entry = load.handed.get(name)
        if not isinstance(tensor, _parameter_type()) and entry is None:
            continue  # a buffer that the model made
        tensor_count += 1
        address = _address_of(tensor)
        at = bisect_right(begins, address) - 1
        if address and at >= 0 and address < ranges[at][1]:
            zero_copy_count += 1
        elif tensor.device.type == "meta":
            copied["offloaded by accelerate"] += 1
        elif tensor.device.type != "cpu":
            copied[f"on {tensor.device}"] += 1
        elif entry is None:
            copied["made or merged by the library"] += 1
        elif tensor.numel():
            copied[_how_copied(entry, tensor)] += 1
    return LoadedModel(
        type(model).__name__,
        path,
        load.handed_bytes,
        max(load.end - load.begin, 0.0),
        total_seconds,
        tensor_count,
        zero_copy_count,
        dict(copied),
        load.device_bytes,
        load.staged_bytes,
        load.slower_why,
        tuple(load.notes),
    )


def _address_of(tensor: Any) -> int:
    """0 where it has none: on other devices, and of types of quantisation that hold several tensors."""
    if tensor.device.type != "cpu":
        return 0
    try:
        return int(tensor.data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


def _how_copied(entry: Entry, tensor: Any) -> str:
    if torch_type(entry.number) is tensor.dtype:
        return "copied by the library"
    return f"{entry.dtype_text} as {tensor.dtype}".replace("torch.", "")


@functools.cache
def _parameter_type() -> Any:
    return importlib.import_module("torch").nn.Parameter


def _tensors_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers, each once; of distributed ones this rank's part."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, getattr(tensor, "_local_tensor", tensor)


# ---- the patch -------------------------------------------------------------------------------------------


class Patch(ContextDecorator):
    """While it is active, `from_pretrained` of transformers and diffusers reads through tensord.

    It may be entered again, inside itself and in several threads at once, and may decorate a function.
    ``with patch() as loads`` gives a list that gets a `LoadedModel` for each model.

    Parameters
    ----------
    strict : bool
        Whether what cannot go through tensord is refused. Else it goes the library's plain way, with a
        `TensordWarning`.
    fallback : bool
        Whether models are read the plain way, with a `TensordWarning`, when no daemon can be had.
        Else that is an `UnavailableError`.
    """

    library = ""

    def __init__(self, *, strict: bool = False, fallback: bool = False) -> None:
        for name, value in (("strict", strict), ("fallback", fallback)):
            if not isinstance(value, bool):
                raise InvalidTypeError(f"patch: {name} is True or False, not {value!r}")
        self.strict = strict
        self.fallback = fallback

    def __enter__(self) -> list[LoadedModel]:
        global _installed
        _import_model_classes(self.library)
        entered = _Active(self)
        with _lock:
            if _installed is None:
                _installed = _Installation(importlib.import_module("safetensors").safe_open)
            _active.append(entered)
            _here.entered.append(entered)
            try:
                _installed.extend()
                missing = _installed.missing(self.library)
                if missing is not None:
                    entered.announce(missing)
            except BaseException:
                _leave(entered)
                raise
        return entered.loads

    def __exit__(self, *_: object) -> None:
        mine = [entered for entered in _here.entered if entered.owner is self]
        if not mine:  # entered on another thread
            with _lock:
                mine = [entered for entered in _active if entered.owner is self]
        if not mine:
            raise UnsupportedError("leave patch: it is not active")
        _leave(mine[-1])


def _import_model_classes(library: str) -> None:
    """What is wrapped must be there first. Pipelines of diffusers use models of transformers."""
    importlib.import_module(NEEDED[library])
    for name, module, _ in MODEL_CLASSES:
        if name == library:
            importlib.import_module(module)
        elif library == "diffusers":
            with suppress(ImportError):
                importlib.import_module(module)


def _leave(entered: _Active) -> None:
    global _installed
    if entered in _here.entered:
        _here.entered.remove(entered)
    with _lock:
        _active.remove(entered)
        if not _active and _installed is not None:
            _installed.remove()
            _installed = None
