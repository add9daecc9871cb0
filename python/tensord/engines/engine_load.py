"""One load of one model by its engine's own loader, which gets its tensors from tensord. Knows no engine.

::

    engine's loader ── asks for weights ──► EngineLoad.weights ──► tensord.open ──► daemon
                    ◄── (name, lazy tensor) ──┘
                    ── copy_ into parameters ──► records, run as one plan when the iterator is exhausted
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Union

from ..client import Model
from ..client import open as open_model
from ..errors import TensordWarning
from .coverage import missing_text
from .names import Rename, matcher, renamer
from .options import Options
from .ranks import Ranks
from .recording import Recording, Stream, record
from .summary import LoadSummary

Weights = Iterator[tuple[str, Any]]
Keep = Union[Callable[[str], bool], None]


class EngineLoad:
    """Hands an engine's loader the tensors of checkpoints, and sees to it that all ranks have them or none.

    Parameters
    ----------
    options : Options
    ranks : Ranks
    log : logging.Logger
        The engine's.
    module : torch.nn.Module, optional
        What is loaded. None: whether all of it was written is not looked at.
    leaves : iterable of str
        Names and patterns of what the engine itself leaves unwritten.
    cache : object, optional
        What cached plans depend on besides checkpoint and module, see `tensord.record`.
    plain : bool
        Whether the loader gets real tensors, one by one: where it reads in its loop what it has written.
    """

    def __init__(
        self,
        options: Options,
        ranks: Ranks,
        log: Any,
        module: Any = None,
        *,
        leaves: Iterable[str] = (),
        cache: Any = None,
        plain: bool = False,
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._log = log
        self.module = module
        self._leaves = tuple(leaves)
        self._cache = cache
        self._is_plain = plain
        self._stack = ExitStack()
        self._streams: list[Stream] = []
        self.is_fallen_back = False

    # ---- what the engine's loading is put into ---------------------------------------------------

    def run(self, load: Callable[[], Any]) -> Any:
        """Runs the engine's loading; where that failed, and with ``fallback``, again with its own tensors.

        Raises
        ------
        Exception
            What went wrong on this rank, or an OtherRankError.
        """
        try:
            return self._attempt(load)
        except Exception as error:
            if not self._options.fallback:
                raise
            self._log.warning(
                "tensord: loading failed, so the engine's own loader takes over: %s: %s",
                type(error).__name__,
                error,
            )
        self.is_fallen_back = True
        self._ranks.begin()
        self._streams.clear()  # with the memory of what failed
        return self._attempt(load)

    def _attempt(self, load: Callable[[], Any]) -> Any:
        try:
            with self._stack:
                result = load()
        except Exception as error:
            if not self._ranks.is_over:
                self._ranks.agree("load weights", error)
            raise
        self._ranks.agree("load weights")
        for stream in self._streams:
            self._say(stream)
        return result

    def _say(self, stream: Stream) -> None:
        rank = f"; {self._ranks}" if self._ranks.size > 1 else ""
        self._log.info("%s%s", stream.report.one_line(), rank)
        coverage = stream.coverage if isinstance(stream, Recording) else None
        if coverage is not None and coverage.unwritten:
            left = [name for name in coverage.unwritten if not matcher(self._leaves)(name)]
            if left:
                self._log.warning("tensord: %s", missing_text(left))

    # ---- what it asks for ------------------------------------------------------------------------

    def weights(
        self, files: Sequence[str], prefix: str = "", keep: Keep = None, *, wait: bool = False
    ) -> Weights:
        """The tensors of a checkpoint for what `run` runs; opened on all ranks when this returns.

        Parameters
        ----------
        files : sequence of str
        prefix : str
            Goes before each name.
        keep : callable, optional
            Says of a name in the checkpoint whether the loader wants the tensor.
        wait : bool
            Return when all bytes are there: what cannot be read fails before the first parameter has changed.
        """
        return self._tensors(self._open(files, wait=wait), self._rename(prefix, keep))

    def _tensors(self, model: Model, rename: Rename) -> Weights:
        """Begins when the loader asks for the first tensor."""
        if self._is_plain:
            stream = Stream(model, rename=rename, plain=True)
            self._streams.append(stream)
            yield from stream
            return
        # A second checkpoint fills what the first one leaves: the first recording, left last, sees both.
        module = self.module if not self._streams else None
        recording = record(
            model,
            module,
            rename=rename,
            cache=self._cache if module is not None else None,
            cache_folder=self._options.cache if isinstance(self._options.cache, str) else None,
            strict=self._options.strict,
            leaves=self._leaves,
        )
        self._streams.append(recording)
        yield from self._stack.enter_context(recording)

    def update(self, files: Sequence[str], prefix: str = "", keep: Keep = None) -> Weights:
        """The tensors of a checkpoint, all of their bytes, for a loading that nobody tells the end of.

        The loader gets real tensors.
        """
        model = self._open(files, wait=True)
        return self._told(Stream(model, rename=self._rename(prefix, keep), plain=True))

    def _told(self, stream: Stream) -> Weights:
        yield from stream
        self._say(stream)

    def written(self) -> set[str]:
        """Names of the module's parameters and buffers that records have written so far."""
        return {
            name
            for one in self._streams
            if isinstance(one, Recording) and one.module is not None
            for name in one.written()
        }

    @property
    def reports(self) -> list[LoadSummary]:
        """Of each checkpoint what was done with it."""
        return [stream.report for stream in self._streams]

    @property
    def replayed(self) -> bool:
        """Whether a cached plan took the place of tensors, so that the loader was given none."""
        return any(isinstance(one, Recording) and one.replayed for one in self._streams)

    # ---- opening ---------------------------------------------------------------------------------

    def _open(self, files: Sequence[str], *, wait: bool) -> Model:
        try:
            model = self._opened(files)
            if wait:
                model.wait()
        except Exception as error:
            self._ranks.agree("open the checkpoint", error)
            raise
        self._ranks.agree("open the checkpoint")
        return model

    def _opened(self, files: Sequence[str]) -> Model:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TensordWarning)
            model = open_model(
                folder_of(files) or list(files),
                "pt",
                only=self._options.only,
                memory_wait=self._options.memory_wait,
                autostart=self._options.autostart,
            )
        for one in caught:
            self._log.warning("tensord: %s", one.message)
        return model

    def _rename(self, prefix: str, keep: Keep) -> Callable[[str], str | None]:
        renamed = renamer(list(self._options.rename.items()))

        def rename(name: str) -> str | None:
            if keep is not None and not keep(name):
                return None
            changed = renamed(name)
            return None if changed is None else prefix + changed

        return rename


def folder_of(files: Sequence[str]) -> str | None:
    """The folder whose checkpoint these files are: people know it by that name. None: there is none."""
    folders = {Path(file).parent for file in files}
    if len(folders) != 1:
        return None
    (folder,) = folders
    is_whole = {Path(file) for file in files} == set(folder.glob("*.safetensors"))
    has_index = (folder / "model.safetensors.index.json").exists()
    return str(folder) if is_whole and (len(files) == 1 or has_index) else None
