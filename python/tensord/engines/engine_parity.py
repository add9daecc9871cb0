"""Parity of an engine: one module filled by the engine's own loader and then, poisoned, through tensord.

Ranks are processes of their own, as the engine would start them, but there is no engine: models alone.
"""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from ..errors import UnavailableError, UnsupportedError
from .parity import Snapshot, changed, poison, snapshot
from .summary import LoadSummary

RANK_SECONDS = 900.0  # only a hang reaches it
END_SECONDS = 10.0


class Pair(NamedTuple):
    """What two loads of one model made on one rank. ``error`` is not empty where there is none."""

    rank: int
    model: str
    architecture: str
    reference: Snapshot
    loaded: Snapshot
    tensor_count: int = 0
    record_count: int = 0
    plain: dict[str, str] = {}  # noqa: RUF012  never written to
    cache: str = ""  # what became of the cached plan
    error: str = ""


Reports = Callable[[], Sequence[LoadSummary]]


def twice(module: Any, own: Callable[[], Any], ours: Callable[[], Any]) -> tuple[Snapshot, Snapshot]:
    """What the engine's own loading made of a module, and what ours did over poisoned memory."""
    before = snapshot(module)
    own()
    reference = snapshot(module)
    poison(module, changed(before, reference))
    ours()
    return reference, snapshot(module)


# ---- ranks -------------------------------------------------------------------------------------------------

Work = Callable[..., Iterator[Pair]]


def on_ranks(work: str, tp: int, *arguments: Any) -> Iterator[Pair]:
    """Runs ``module:function`` as (rank, tp, address, *arguments) in a process for each rank, and gives what
    they yield.

    Raises
    ------
    UnavailableError
        A rank ended before it was done.
    """
    spawning = multiprocessing.get_context("spawn")
    address = f"tcp://127.0.0.1:{free_port()}"
    receivers: dict[Connection, int] = {}
    processes = []
    try:
        for rank in range(tp):
            receiver, sender = spawning.Pipe(duplex=False)
            process = spawning.Process(
                target=_rank_main, args=(sender, work, rank, tp, address, arguments), daemon=True
            )
            process.start()
            sender.close()
            receivers[receiver] = rank
            processes.append(process)
        yield from _received(receivers)
    finally:
        for process in processes:
            process.join(END_SECONDS)
            process.kill()


def _received(receivers: dict[Connection, int]) -> Iterator[Pair]:
    deadline = time.monotonic() + RANK_SECONDS
    while receivers:
        ready = wait(list(receivers), max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise UnavailableError(
                f"ranks {sorted(receivers.values())} are not done after {RANK_SECONDS:.0f} s"
            )
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                sent = receiver.recv()
            except EOFError:
                raise UnavailableError(f"rank {receivers[receiver]} died; its last words are above") from None
            if sent is None:
                del receivers[receiver]
            else:
                yield sent


def _rank_main(
    sender: Connection, work: str, rank: int, tp: int, address: str, arguments: Sequence[Any]
) -> None:
    module, _, name = work.partition(":")
    with closing(sender):
        for pair in getattr(importlib.import_module(module), name)(rank, tp, address, *arguments):
            sender.send(pair)
        sender.send(None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair_of(
    path: str, module: Any, own: Callable[[], Any], ours: Callable[[], Any], reports: Reports
) -> Pair:
    """Loads `module` twice. ``reports`` gives what the second load said of itself; the rank is set later."""
    reference, loaded = twice(module, own, ours)
    said = reports()[0]
    counts = (said.tensor_count, said.record_count, said.plain, said.cache)
    return Pair(0, path, type(module).__name__, reference, loaded, *counts)


def of_models(rank: int, paths: Sequence[str], pair: Callable[[str], Pair]) -> Iterator[Pair]:
    """One rank's pairs; where a model has none, why."""
    for path in paths:
        try:
            yield pair(path)._replace(rank=rank)
        except Exception as error:
            traceback.print_exception(error)
            yield Pair(rank, path, "", {}, {}, error=f"{type(error).__name__}: {error}")


def of_one_model(pairs: Iterator[Pair]) -> Iterator[tuple[str, Snapshot, Snapshot]]:
    """As ``tensord parity`` wants them.

    Raises
    ------
    UnsupportedError
        The engine cannot load the model so.
    """
    for pair in pairs:
        if pair.error:
            raise UnsupportedError(f"parity of {pair.model} on rank {pair.rank}: {pair.error}")
        yield f"rank {pair.rank}", pair.reference, pair.loaded
