"""record and stream: lazy tensors for a loader, and one batch of copies for what the loader did with them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Union

import torch

from ..client import Model
from ..client import open as open_model
from ..errors import InvalidArgumentError, UnsupportedError
from ..opening import PathLike
from .copy_table import CopyTable, execute
from .coverage import Coverage, CoverageReport, Intervals, persistent_state
from .lazy import LazyTensor, real
from .names import Only, Rename
from .offer import Offer
from .plan_cache import PlanCache, module_state
from .recorder import Guard, Recorder, has_memory, interval_of
from .summary import LoadSummary, summary_of

ModelOrPath = Union[Model, PathLike, Sequence[PathLike]]

_log = logging.getLogger("tensord")


def as_model(model: ModelOrPath) -> Model:
    return model if isinstance(model, Model) else open_model(model, "pt")


class Stream:
    """An iterator of (name, tensor) for a loader. Made by `stream`; it can be iterated once.

    When it is exhausted, what was recorded runs as one plan; copies that come later run at once. So it does
    where it is let go of before that.
    """

    def __init__(
        self,
        model: ModelOrPath,
        *,
        only: Only = None,
        rename: Rename = None,
        device: Any = None,
        guard: bool = False,
        plain: bool = False,
    ) -> None:
        self.model = as_model(model)
        self.recorder = Recorder(self.model, torch.device("cpu" if device is None else device))
        self.model._open_handle()  # refuses a closed one
        self.offer = Offer(self.model, only, rename)
        self._begin: float | None = None
        tensors = (_plain_tensors if plain else _lazy_tensors)(self.recorder, self.offer)
        # No reference to this: who lets go of it ends the generator, and has the copies run.
        self._iterator = _run_at_end(self.recorder, tensors, guard=guard)

    @property
    def names(self) -> list[str]:
        """The names that a loader is given, in this order."""
        return self.offer.names

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._begin is None:
            self._begin = time.monotonic()
        return next(self._iterator)

    @property
    def report(self) -> LoadSummary:
        """What was done so far; whole once the iterator is exhausted."""
        return self._summary()

    def _summary(self, *, replayed: bool = False, cache: str = "") -> LoadSummary:
        recorder = self.recorder
        with recorder.lock:
            begin = self._begin
            end = recorder.end if recorder.end is not None else begin
            return summary_of(
                recorder.reports,
                seconds=0.0 if begin is None or end is None else max(end - begin, 0.0),
                record_count=recorder.record_count,
                tensor_count=recorder.tensor_count,
                plain=recorder.plain,
                plain_bytes=recorder.plain_bytes,
                replayed=replayed,
                cache=cache,
            )


Tensors = Iterator[tuple[str, torch.Tensor]]


def _run_at_end(recorder: Recorder, tensors: Tensors, *, guard: bool) -> Tensors:
    """Runs what was recorded when the tensors are exhausted, or nobody wants more of them."""
    with ExitStack() as stack:
        if guard:
            stack.enter_context(_entered(Guard(recorder, {})))
        try:
            yield from tensors
        finally:
            if not isinstance(sys.exc_info()[1], Exception):
                recorder.finish()


def _lazy_tensors(recorder: Recorder, offer: Offer) -> Tensors:
    for name, entry in offer.entries:
        recorder.tensor_count += 1
        yield name, recorder.tensor(name, entry)


def _plain_tensors(recorder: Recorder, offer: Offer) -> Tensors:
    for name, entry in offer.entries:
        tensor = recorder.read(entry)
        recorder.tensor_count += 1
        recorder.plain_bytes += tensor.numel() * tensor.element_size()
        yield name, tensor
        recorder.end = time.monotonic()


class _entered:
    """A dispatch mode, left only where it is the innermost: a generator may end at any time."""

    def __init__(self, mode: Guard) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *details: Any) -> None:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is self._mode:
            self._mode.__exit__(*details)  # type: ignore[no-untyped-call]
        else:
            _log.warning("a guard of recorded copies stays on: another dispatch mode was entered in it")


class Recording(Stream):
    """A `Stream` with a beginning and an end. Made by `record`.

    Attributes
    ----------
    replayed : bool
        A cached plan was found, and its copies ran when the block was entered: the iterator gives nothing.
    coverage : CoverageReport or None
        Of ``module``, once the block is left.
    """

    def __init__(
        self,
        model: ModelOrPath,
        module: torch.nn.Module | None,
        only: Only,
        rename: Rename,
        cache: Any,
        strict: bool,
        device: Any,
        guard: bool,
        leaves: Iterable[str],
        cache_folder: Any,
    ) -> None:
        super().__init__(model, only=only, rename=rename, device=device)
        if cache is not None and module is None:
            raise InvalidArgumentError("record: a cached plan names parameters, so it needs module=")
        self.module = module
        self.coverage: CoverageReport | None = None
        self._strict = strict
        self._is_guarded = guard
        self._leaves = tuple(leaves)
        self._before: Coverage | None = None
        self._stack = ExitStack()
        self.replayed = False
        self._cache: PlanCache | None = None
        self._cache_state = ""
        self._iterator = _run_at_end(self.recorder, self._tensors(), guard=False)
        if cache is not None and module is not None:
            self._cache = PlanCache(self.offer, module, cache, self.recorder.device, folder=cache_folder)

    @property
    def report(self) -> LoadSummary:
        return self._summary(replayed=self.replayed, cache=self._cache_state)

    def __enter__(self) -> Recording:
        module, cache = self.module, self._cache
        if module is not None:
            self._before = Coverage(module)
        if cache is not None:
            plan = cache.find()
            self.replayed = plan is not None and self._replay(plan, cache)
            self._cache_state = "replayed" if self.replayed else cache.why
            self.recorder.keeps_tables = not self.replayed
        if not self.replayed and (cache is not None or self._is_guarded):
            watched = {} if cache is None else cache.watched()
            self._stack.enter_context(_entered(Guard(self.recorder, watched)))
        return self

    def _replay(self, plan: CopyTable, cache: PlanCache) -> bool:
        """False where the library refuses the plan: then it is dropped and the load traced."""
        recorder = self.recorder
        self._begin = time.monotonic()
        try:
            recorder.reports += execute(self.model, plan)
        except (InvalidArgumentError, UnsupportedError) as error:
            cache.drop(error.message)
            self._begin = None
            return False
        recorder.note_table(plan)
        recorder.is_finished = True
        return True

    def _tensors(self) -> Tensors:
        if not self.replayed:
            yield from _lazy_tensors(self.recorder, self.offer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        recorder = self.recorder
        if error is not None:
            dropped = recorder.drop()
            if dropped:
                _log.warning("record: %d copies did not run, as the block ended with %r", dropped, error)
                if hasattr(error, "add_note"):
                    error.add_note(f"tensord: {dropped} recorded copies did not run")
            return
        recorder.finish()
        if self.module is not None:
            self._adopt(self.module)
            self._finish(self.module)

    def _adopt(self, module: torch.nn.Module) -> None:
        """Gives the module real tensors where it kept lazy ones, as its parameters or else."""
        for part in module.modules():
            holders: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
            for holder in holders:
                for name, held in list(holder.items()):
                    if type(held) is LazyTensor:
                        owned = real(held, f"it is {name} of {type(part).__name__}", write=True)
                        is_parameter = holder is part._parameters
                        holder[name] = (
                            torch.nn.Parameter(owned, held.requires_grad) if is_parameter else owned
                        )
                        self.recorder.note_written([owned])

    def _finish(self, module: torch.nn.Module) -> None:
        assert self._before is not None
        for name, tensor in module_state(module).items():
            # `parameter.data = weight`: torch tells nobody, and using what has no memory ends the process.
            if not has_memory(tensor):
                raise UnsupportedError(
                    f"record: the loader made a lazy tensor the .data of {name}, which takes a real one; "
                    "have it copy, or give it plain tensors (tensord.engines.stream with plain=True)"
                )
        if self._strict:
            self.coverage = self._before.check(self.recorder, leaves=self._leaves)
        else:
            self.coverage = self._before.report(self.recorder)
        if self._cache is not None and not self.replayed:
            self._cache_state = self._cache.keep(self.recorder)
        self.recorder.tables.clear()

    @property
    def unused(self) -> list[str]:
        """Names of tensors that were given, and that no copy and no operation took."""
        recorder = self.recorder
        used, plain = recorder.used, recorder.plain
        given = self.offer.entries[: recorder.tensor_count]
        return [name for name, entry in given if entry.encoded not in used and name not in plain]

    def written(self) -> set[str]:
        """Names of the module's parameters and buffers that were written, in whole or in part."""
        if self.module is None:
            raise InvalidArgumentError("record: what was written has names where module= is given")
        return names_within(self.module, self.recorder)


def names_within(module: torch.nn.Module, recorder: Recorder) -> set[str]:
    """Names of parameters and persistent buffers that a load has written to."""
    intervals = Intervals(recorder.written())
    found = set()
    for name, tensor in persistent_state(module).items():
        if not tensor.is_meta:
            begin, end, _ = interval_of(tensor)
            if intervals.bytes_within(begin, end):
                found.add(name)
    return found


def record(
    model: ModelOrPath,
    module: torch.nn.Module | None = None,
    *,
    only: Only = None,
    rename: Rename = None,
    cache: Any = None,
    strict: bool = True,
    device: Any = None,
    guard: bool = True,
    leaves: Iterable[str] = (),
    cache_folder: Any = None,
) -> Recording:
    """Gives a module's own loader lazy tensors, and runs the copies it makes as one batch::

        with tensord.record(model, module) as weights:
            module.load_weights(weights)
        print(weights.report.one_line())

    Parameters
    ----------
    model : Model, or path
        What `tensord.open` gave, or what it takes.
    module : torch.nn.Module, optional
        What is loaded: it is then checked that each parameter and persistent buffer was written.
    only : str, list of str, or callable, optional
        Names and shell-style patterns of the tensors that the loader is given, or what says so of a name.
    rename : callable, or list of (pattern, replacement), optional
        The names under which it is given them. A callable may return None: not at all.
    cache : optional
        What decides, beside the checkpoint's shapes, what the loader does: anything that JSON can say, such
        as ``["vllm 0.32", config, tp, pp, ep, rank]``. With the same key, a second load replays the copies of
        the first; then ``weights.replayed``, and ``weights`` gives no tensors.
    strict : bool
        Whether a parameter that was not written is an error.
    device : torch.device or str, optional
        Where the lazy tensors claim to be. None: the CPU.
    guard : bool
        Whether copies run before any other operation of this thread looks at what they are going to write:
        some loaders compute with a parameter that they have just filled. It doubles what a tensor costs, to
        about 60 us. False only for loaders that are known to do nothing of the kind: they would read memory
        that is not filled yet.
    leaves : iterable of str
        Names and patterns of parameters and buffers that the loader leaves as they are.
    cache_folder : path, optional
        Where plans are kept. None: in ``plans`` of the state folder.

    Returns
    -------
    Recording
        A context manager; as an iterator it gives (name, tensor) once.

    Raises
    ------
    IncompleteError
        At the end of the block: nothing wrote some of the module's tensors.
    Error
        From the iterator, or at the end of the block: a copy failed.

    Notes
    -----
    Copies run when the iterator is exhausted, those that come later at once. What the loader does with a
    tensor other than to view and copy it is done with the real tensor, as soon as its bytes are there. An
    exception in the block drops the copies that have not run.
    """
    return Recording(model, module, only, rename, cache, strict, device, guard, leaves, cache_folder)


def stream(
    model: ModelOrPath,
    *,
    only: Only = None,
    rename: Rename = None,
    device: Any = None,
    guard: bool = False,
    plain: bool = False,
) -> Stream:
    """`record` for callers that take an iterator and nothing else::

        stream = tensord.engines.stream(model)
        module.load_weights(stream)
        print(stream.report.one_line())

    Parameters
    ----------
    model, only, rename, device
        As `record`.
    guard : bool
        Whether records run before any other operation of this thread looks at what they are going to write:
        for loaders that compute with weights between two tensors. Costs some microseconds an operation.
    plain : bool
        Whether the tensors are real ones, over the daemon's memory: zero-copy, and a write changes the copy
        of this ``model`` alone.
    """
    return Stream(model, only=only, rename=rename, device=device, guard=guard, plain=plain)
