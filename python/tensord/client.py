"""Model: a checkpoint held by the daemon, as this process sees it. View: chosen slices of it."""

from __future__ import annotations

import ctypes
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as AbstractMapping
from contextlib import ExitStack
from typing import Any

from . import _library
from ._library import check, last_error, library
from .copies import LoadReport
from .errors import (
    CorruptError,
    InvalidArgumentError,
    InvalidIndexError,
    InvalidTypeError,
    TensordWarning,
    UnavailableError,
    UnknownTensorError,
    WaitTimeoutError,
)
from .index_entries import Index, entry_of
from .indexing import Item, item_rows, parse
from .loading import LoadTargets, load, orders_of
from .opening import PathLike, Resident, check_seconds, device_name, encoded_paths, open_options, opened
from .progress import Meter, ProgressOption, stderr_bar
from .tensors import (
    AnyTensor,
    Entry,
    Mapping,
    Place,
    device_tensor,
    framework_of,
    numpy_array,
    torch_tensor,
)

# A wait inside the library cannot be interrupted, so it is cut into pieces: Ctrl-C is answered within one.
# The library looks after its daemon every 0.1 s: an error well before the end of a piece is no timeout.
WAIT_PIECE_SECONDS = 0.25

TOO_LARGE = (
    "is larger than the daemon's host_memory: it is not kept, load_into has it read in batches "
    '(resident="view"); raise host_memory, or open fewer tensors with only='
)


class _Handle:
    """A tensord_model, closed when the last call that uses it is over and its Model is closed."""

    __slots__ = ("_close", "pointer")

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        self.pointer = pointer
        self._close = library().tensord_close

    def __del__(self) -> None:
        self._close(self.pointer)


class Model:
    """An open checkpoint. Made by `tensord.open`.

    Tensors are zero-copy: they lie in memory that the daemon filled once and that this process maps
    privately. They stay valid as long as they are referenced: after `close`, without the Model, and in
    forked children. Methods may be called from several threads at once.

    Of a model with ``resident="view"`` the daemon keeps nothing between calls: `load_into` has it read batch
    by batch, and each zero-copy tensor holds memory of its own.
    """

    def __init__(
        self, handle: _Handle, paths: Sequence[str], framework: str, device: str | None = None
    ) -> None:
        self._handle: _Handle | None = handle
        self._device = device  # in whose memory it lies; None: the host's
        self._mapping: Mapping | None = None
        self._paths = tuple(paths)
        self._framework = framework
        self._names: list[str] | None = None
        self._entries: dict[str, Entry] = {}
        self._all_entries: list[Entry] | None = None
        self._index: Index | None = None
        self._is_ready = False
        self._is_view = library().tensord_resident(handle.pointer) == _library.RESIDENT_VIEW

    # ---- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of the checkpoint. Tensors taken from it stay valid. May be called again."""
        self._handle = None
        self._mapping = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._handle is None else f"{len(self)} tensors"
        return f"<tensord.Model {', '.join(self._paths)}: {state}>"

    def _open_handle(self) -> _Handle:
        """The handle, for a local variable: while one holds it, `close` on another thread frees nothing."""
        handle = self._handle
        if handle is None:
            raise InvalidArgumentError(f"model {', '.join(self._paths)} is closed")
        return handle

    # ---- what is in it ---------------------------------------------------------------------------

    def keys(self) -> list[str]:
        """The names of all tensors, sorted. The list is the caller's own."""
        return list(self._all_names())

    def _all_names(self) -> list[str]:
        names = self._names
        if names is None:
            names = self._names = [name.decode() for name in self._whole_index().names]
        return names

    def __len__(self) -> int:
        if self._names is not None:
            return len(self._names)
        handle = self._open_handle()
        return int(library().tensord_tensor_count(handle.pointer))

    def __iter__(self) -> Iterator[str]:
        return iter(self._all_names())

    def __contains__(self, name: object) -> bool:
        try:
            self.entry(name)  # type: ignore[arg-type]
        except UnknownTensorError:
            return False
        return True

    def items(self) -> Iterator[tuple[str, AnyTensor]]:
        """Each name with its tensor, in the order of `keys`. Waits for one tensor at a time."""
        return ((name, self[name]) for name in self)

    @property
    def metadata(self) -> dict[str, str]:
        """The checkpoint's free-form ``__metadata__``."""
        handle = self._open_handle()
        key, value = ctypes.c_char_p(), ctypes.c_char_p()
        metadata = {}
        for position in range(library().tensord_metadata_count(handle.pointer)):
            check(
                library().tensord_metadata_at(
                    handle.pointer, position, ctypes.byref(key), ctypes.byref(value)
                )
            )
            metadata[(key.value or b"").decode()] = (value.value or b"").decode()
        return metadata

    @property
    def files(self) -> list[str]:
        """The paths of the files the tensors lie in."""
        handle = self._open_handle()
        count = library().tensord_file_count(handle.pointer)
        return [os.fsdecode(library().tensord_file_path(handle.pointer, at)) for at in range(count)]

    def entry(self, name: str) -> Entry:
        """What the index says of a tensor; needs no bytes of it.

        Raises
        ------
        UnknownTensorError
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._find(name)
            self._entries[name] = entry
        return entry

    def entries(self) -> list[Entry]:
        """What the index says of all tensors, in the order of `keys`."""
        entries = self._all_entries
        if entries is None:
            entries = self._all_entries = self._whole_index().entries()
            self._entries.update((entry.name, entry) for entry in entries)
        return list(entries)

    def _whole_index(self) -> Index:
        handle = self._open_handle()
        index = self._index
        if index is None:
            index = self._index = Index(handle.pointer)
        return index

    def _find(self, name: str) -> Entry:
        handle = self._open_handle()
        try:
            encoded = name.encode()
        except (AttributeError, UnicodeEncodeError):
            raise UnknownTensorError(f"find tensor {name!r}: names are text in UTF-8") from None
        if b"\0" in encoded:
            raise UnknownTensorError(f"find tensor {name!r}: names hold no NUL")
        tensor = _library.Tensor()
        code = library().tensord_find_tensor(handle.pointer, encoded, ctypes.byref(tensor))
        if code == _library.NOT_FOUND:
            raise UnknownTensorError(last_error(code).message)
        check(code)
        return entry_of(tensor)

    def info(self) -> dict[str, Any]:
        """What is known of the model: path, files, state, artifact, replica, payload_bytes, image_bytes,
        tensor_count, ready_bytes, total_bytes, resident, only. Where the daemon had a replica of more
        tensors, that one serves: replica and bytes are its own, and artifact is None."""
        handle = self._open_handle()
        text = ctypes.c_void_p()
        check(library().tensord_info(handle.pointer, ctypes.byref(text)))
        return dict(json.loads(_library.take_text(text)))

    # ---- waiting ---------------------------------------------------------------------------------

    def wait(self, progress: ProgressOption = False, timeout: float | None = None) -> None:
        """Waits until all bytes are there and checked; with ``resident="view"`` there is nothing to wait for.

        Parameters
        ----------
        progress : bool or callable
            True: a bar on standard error where that is a terminal ($TENSORD_PROGRESS=1: everywhere, 0:
            nowhere). A callable is called with a `tensord.Progress` a few times a second and once at
            the end.
        timeout : float, optional
            Seconds. None: no limit.

        Raises
        ------
        WaitTimeoutError
            The time passed.
        Error
            The load failed; the error has the code of the failure.
        """
        check_seconds("wait: timeout", timeout)
        with ExitStack() as stack:
            show = progress if callable(progress) else None
            bar = stderr_bar() if progress is True else None
            if bar is not None:
                stack.callback(bar.close)
                show = bar
            meter = Meter()
            deadline = None if timeout is None else time.monotonic() + timeout
            if show is not None:
                show(meter.read(*self._ready_and_total()))
            while not self._wait_piece(None, deadline):
                if show is not None:
                    show(meter.read(*self._ready_and_total()))
            self._is_ready = True
            if show is not None:
                show(meter.read(*self._ready_and_total()))

    def _ready_and_total(self) -> tuple[int, int]:
        progress = self._progress()
        return progress.ready_bytes, progress.total_bytes

    def _progress(self) -> _library.Progress:
        handle = self._open_handle()
        progress = _library.Progress()
        check(library().tensord_get_progress(handle.pointer, ctypes.byref(progress)))
        return progress

    def _wait_piece(self, name: bytes | None, deadline: float | None) -> bool:
        """Waits a moment; True when the bytes are there. Raises when the load failed or time is up."""
        handle = self._open_handle()
        begin = time.monotonic()
        left = WAIT_PIECE_SECONDS if deadline is None else max(deadline - begin, 0.0)
        piece = min(WAIT_PIECE_SECONDS, left)
        code = library().tensord_wait(handle.pointer, name, round(piece * 1000))
        if code == _library.OK:
            return True
        error = last_error(code)
        now = time.monotonic()
        try:
            if not isinstance(error, UnavailableError) or now - begin < piece * 0.9:
                raise error
            if self._progress().state not in (_library.FILLING, _library.READY):
                raise error
            if deadline is not None and now >= deadline:
                raise WaitTimeoutError(error.message)
        finally:
            del error  # else error and frame hold each other, and the frame the model
        return False

    def _wait_for(self, entry: Entry) -> None:
        if self._is_ready or entry.size_bytes == 0:
            return
        while not self._wait_piece(entry.encoded, None):
            pass
        if self._progress().state == _library.READY:
            self._is_ready = True

    def verify(self) -> dict[str, Any]:
        """Has the daemon hash every byte it holds again and compare with the recorded digests.

        Returns
        -------
        dict
            ``replica``, ``path``, ``artifact``, ``leaf_count``, ``bytes``, ``ns`` and empty ``faults``.

        Raises
        ------
        CorruptError
            Names the first bytes that differ: file, tensor and offset.
        InvalidArgumentError
            The model has ``resident="view"``.
        """
        if self._is_view:
            raise InvalidArgumentError(f"verify {', '.join(self._paths)}: a view keeps nothing to verify")
        self.wait()
        report: dict[str, Any] = json.loads(_library.call("verify", str(self.info()["replica"])))
        faults = report["faults"]
        if faults:
            first = faults[0]
            where = f"{first['size_bytes']} bytes at {first['offset']} of {first['file']}"
            raise CorruptError(
                f"verify {report['path']}: {len(faults)} pieces differ from their digests; the first is "
                f"in tensor {first['tensor']!r}, {where}"
            )
        return report

    # ---- tensors ---------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> AnyTensor:
        """A zero-copy tensor; blocks until its bytes are there.

        A numpy array is read-only. A torch tensor may be written to: this process's copy changes, no
        other's. Types that safetensors does not know come as uint8 [size_bytes] in numpy. F4 comes in torch
        as float4_e2m1fn_x2, two elements a byte, so that the last dimension is half of the file's.

        Raises
        ------
        UnknownTensorError
        UnsupportedDtypeError
            The framework has no such type.
        ExhaustedError
            Of a model with ``resident="view"``: there is no memory for the tensor alone.
        Error
            The load failed.
        """
        return self.tensor(self.entry(name))

    def tensor(self, entry: Entry, *, framework: str | None = None, writable: bool = False) -> AnyTensor:
        """`__getitem__` with a choice. ``writable``: so may a numpy array be, as a torch tensor always is;
        refused for a model on a GPU, whose tensors are for reading alone."""
        model, there = self._mapped(entry)
        place = Place(model._keeper(there), there.address, there.memory_shape, None)
        return model._at(there, place, framework or self._framework, writable)

    def _mapped(self, entry: Entry) -> tuple[Model, Entry]:
        """The model that maps a tensor, and the tensor there: in a view one of its own."""
        if not self._is_view or entry.size_bytes == 0:
            return self, entry
        pointer = ctypes.c_void_p()
        names = (ctypes.c_char_p * 1)(entry.encoded)
        handle = self._open_handle()
        check(library().tensord_open_part(handle.pointer, names, 1, ctypes.byref(pointer)))
        part = Model(_Handle(pointer), self._paths, self._framework)
        return part, part.entry(entry.name)

    def _at(self, entry: Entry, place: Place, framework: str, writable: bool) -> AnyTensor:
        if self._device is not None and writable:
            raise InvalidArgumentError(
                f"tensor {entry.name!r}: memory that a GPU shares is for reading alone"
            )
        self._wait_for(entry)
        if self._device is not None:
            return device_tensor(
                place, entry.number, self._device, framework, name=entry.name, dtype_text=entry.dtype_text
            )
        if framework == "np":
            return numpy_array(
                place, entry.number, name=entry.name, dtype_text=entry.dtype_text, writable=writable
            )
        return torch_tensor(place, entry.number, name=entry.name, dtype_text=entry.dtype_text)

    def _keeper(self, entry: Entry) -> Mapping | None:
        """What keeps a tensor's memory mapped; None when it has none."""
        handle = self._open_handle()
        mapping = self._mapping
        if mapping is None and entry.size_bytes > 0:
            pointer = library().tensord_retain_mapping(handle.pointer)
            if not pointer:
                raise InvalidArgumentError(f"model {', '.join(self._paths)} holds no bytes")
            mapping = Mapping(pointer)
            self._mapping = mapping
        return mapping

    # ---- slices ----------------------------------------------------------------------------------

    def view(self, wanted: AbstractMapping[str, Any]) -> View:
        """Chosen slices of chosen tensors.

        Parameters
        ----------
        wanted : mapping
            Tensor name to index: anything numpy's basic indexing takes. ``...`` is the whole tensor.

        Raises
        ------
        UnknownTensorError
        InvalidIndexError
            Also for indices out of range.
        """
        if not isinstance(wanted, AbstractMapping):
            raise InvalidTypeError(f"view takes {{name: index, ...}}, not {wanted!r}")
        return View(self, {name: parse(index) for name, index in wanted.items()})

    def place_of(self, entry: Entry, items: tuple[Item, ...]) -> Place:
        """Where a slice lies.

        Raises
        ------
        InvalidIndexError
        """
        region = self._resolve(entry, items)
        shape = tuple(region.shape[: region.rank])
        strides = tuple(region.strides[: region.rank])
        return Place(self._keeper(entry), entry.address + region.offset, shape, strides)

    def _resolve(self, entry: Entry, items: tuple[Item, ...]) -> _library.Region:
        handle = self._open_handle()
        region = _library.Region()
        rows = item_rows(items)
        code = library().tensord_resolve(
            handle.pointer,
            entry.encoded,
            rows.ctypes.data,
            len(rows),
            ctypes.byref(region),
        )
        if code == _library.INVALID_ARGUMENT:
            raise InvalidIndexError(last_error(code).message)
        check(code)
        return region

    def load_into(
        self, targets: LoadTargets, *, cast: bool = False, threads: int = 0, stream: Any = None
    ) -> LoadReport:
        """Copies tensors, or slices of them, into the caller's CPU or GPU memory as one plan.

        Parameters
        ----------
        targets : mapping or iterable
            ``{name: tensor}`` for whole tensors, or ``[(name, index, tensor), ...]``. A target is a numpy
            array or a torch tensor, of any device: strided, padded, transposed, negative strides; or a
            CUDA array of another library (``__cuda_array_interface__``). Its shape is that of the indexed
            tensor. F4 targets must be dense.
        cast : bool
            Whether F16, BF16, F32, F64 (and F8 as a source) are converted where types differ. Else types
            must match.
        threads : int
            0: one per core. They end before the call returns.
        stream : torch.cuda.Stream, optional
            Copies into GPU memory wait for it (None: for each device's current one), and end before return.

        Returns
        -------
        LoadReport

        Raises
        ------
        UnknownTensorError, InvalidIndexError, InvalidArgumentError, UnsupportedError
            Nothing was written: all targets are checked first.
        Error
            ``error.target_dirty`` tells whether targets were written to.

        Notes
        -----
        Waits for the bytes it needs. Ctrl-C ends it within a tenth of a second; targets are dirty where
        copying had begun. With ``resident="view"`` the tensors are read in batches, and the next is read
        while one is copied. All targets are checked before the first batch; a tensor larger than the
        daemon's memory is refused then.
        """
        return load(self, orders_of(self, targets), cast=cast, threads=threads, stream=stream)

    def _has_all_bytes(self) -> bool:
        if not self._is_ready and not self._is_view:
            self._is_ready = self._progress().state == _library.READY
        return self._is_ready


class View:
    """Chosen slices of a Model's tensors. Made by `Model.view`. Valid while the Model is open; its tensors
    longer."""

    def __init__(self, model: Model, wanted: dict[str, tuple[Item, ...]]) -> None:
        self._model = model
        self._slices = {}
        for name, items in wanted.items():
            entry = model.entry(name)
            model._resolve(entry, items)  # refuses what makes no sense
            self._slices[name] = (entry, items)

    def keys(self) -> list[str]:
        """The names, in the order they were asked for."""
        return list(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._slices

    def items(self) -> Iterator[tuple[str, AnyTensor]]:
        """Each name with its slice, in the order of `keys`."""
        return ((name, self[name]) for name in self)

    def _slice(self, name: str) -> tuple[Entry, tuple[Item, ...]]:
        try:
            return self._slices[name]
        except KeyError:
            raise UnknownTensorError(f"find tensor {name!r}: the view does not hold it") from None

    def __getitem__(self, name: str) -> AnyTensor:
        """The slice, strided and zero-copy as the tensors of `Model.__getitem__`.

        torch knows no negative strides: there, a slice with a negative step is a copy.
        """
        listed, items = self._slice(name)
        model, entry = self._model._mapped(listed)
        place = model.place_of(entry, items)
        if entry.is_bytes and place.shape == (entry.size_bytes,):
            place = place._replace(shape=entry.memory_shape, strides=None)
        return model._at(entry, place, model._framework, False)

    def load_into(
        self,
        targets: AbstractMapping[str, AnyTensor],
        *,
        cast: bool = False,
        threads: int = 0,
        stream: Any = None,
    ) -> LoadReport:
        """Copies slices into the caller's memory as one plan: `Model.load_into` with this view's indices.

        Parameters
        ----------
        targets : mapping
            ``{name: tensor}``; names are this view's, not necessarily all of them.
        """
        if not isinstance(targets, AbstractMapping):
            raise InvalidTypeError(f"load_into of a view takes {{name: target, ...}}, not {targets!r}")
        orders = [(*self._slice(name), target) for name, target in targets.items()]
        return load(self._model, orders, cast=cast, threads=threads, stream=stream)

    def __repr__(self) -> str:
        return f"<tensord.View of {len(self)} slices of {self._model!r}>"


def open(
    path: PathLike | Sequence[PathLike],
    framework: str | None = None,
    *,
    only: str | Sequence[str] | None = None,
    resident: Resident = "artifact",
    memory_wait: float | None = None,
    autostart: bool | None = None,
    device: Any = None,
) -> Model:
    """Opens a checkpoint, or some of its tensors. Returns at once while the daemon still reads it.

    Parameters
    ----------
    path : path, or list of paths
        A file, a folder with ``model.safetensors.index.json`` (or one ``.safetensors`` file), or several
        files.
    framework : {"pt", "np"}, optional
        What the tensors are. None: torch where it is installed, else numpy.
    only : str, or list of str, optional
        Names of tensors, and shell-style patterns of names (``"model.layers.1[0-9].*"``): only these tensors
        are read, and the model has no others. A text that is a name means that tensor alone. None: all.
    resident : {"artifact", "view"}, optional
        What the daemon keeps in memory. "artifact": all of it, from now on. "view": what a call is about to
        copy. What is larger than the daemon's memory opens as "view" whatever is asked for, with a
        `TensordWarning`; ``model.info()["resident"]`` tells.
    memory_wait : float, optional
        Seconds to wait for memory that others hold. None: as the daemon's ``memory_wait_seconds``.
    autostart : bool, optional
        Whether a daemon is started when none runs. None: as ``$TENSORD_AUTOSTART`` says (default yes).
    device : str, int or torch.device, optional
        ``"cuda:0"``, or a GPU's UUID: the daemon keeps the tensors in that GPU's memory, and all processes
        read them there. They cannot be written to: a kernel that tries fails, and with it the process's use
        of the GPU. torch tensors, or with ``framework="np"`` objects with ``__cuda_array_interface__``.

    Returns
    -------
    Model

    Raises
    ------
    MissingFileError
        A file is not there (also a FileNotFoundError).
    UnknownTensorError
        An element of ``only`` is and matches no tensor.
    CorruptError
        A file is no valid safetensors file (also a safetensors.SafetensorError where that package is
        installed).
    ExhaustedError
        Others hold the daemon's memory or the GPU's, and did not let go in time; the message names them.
    UnavailableError
        No daemon answers, or it does not see the GPU.
    """
    chosen, where = framework_of(framework), device_name(device)
    names, pointer = opened(encoded_paths(path), open_options(only, resident, autostart, memory_wait, where))
    model = Model(_Handle(pointer), names, chosen, where)
    if model._is_view and resident == "artifact":
        warnings.warn(f"{', '.join(names)} {TOO_LARGE}", TensordWarning, stacklevel=2)
    return model
