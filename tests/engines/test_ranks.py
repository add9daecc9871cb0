"""Ranks: all of them load, or all of them fail. Two processes over gloo, no engine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tensord.engines.engine_parity import free_port  # noqa: E402
from tensord.engines.ranks import OtherRankError, Ranks  # noqa: E402


def member(rank: int, address: str, results: Any, act: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    ranks = Ranks(torch.distributed.group.WORLD)
    try:
        act(rank, ranks)
        results.put((rank, ""))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def outcomes(act: Any, count: int = 2) -> dict[int, str]:
    spawning = multiprocessing.get_context("spawn")
    results = spawning.Queue()
    address = f"tcp://127.0.0.1:{free_port()}"
    processes = [spawning.Process(target=member, args=(rank, address, results, act)) for rank in range(2)]
    for process in processes:
        process.start()
    said = dict(results.get(timeout=120) for _ in range(count))
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    return said


def all_well(rank: int, ranks: Ranks) -> None:
    ranks.agree("open")
    ranks.agree("load")


def second_fails_early(rank: int, ranks: Ranks) -> None:
    if rank == 1:
        ranks.agree("load", ValueError("no such tensor"))  # while the other one is still opening
    ranks.agree("open")
    ranks.agree("load")


def second_fails_then_both_try_again(rank: int, ranks: Ranks) -> None:
    try:
        second_fails_early(rank, ranks)
    except (ValueError, OtherRankError):
        assert ranks.is_over
        ranks.begin()
        ranks.agree("load")


def second_dies(rank: int, ranks: Ranks) -> None:
    ranks.agree("open")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.agree("load")


def test_both_go_on_when_both_are_well() -> None:
    assert outcomes(all_well) == {0: "", 1: ""}


def test_the_other_one_learns_of_an_error_wherever_it_waits() -> None:
    said = outcomes(second_fails_early)
    assert said[1] == "ValueError: no such tensor"
    assert said[0].startswith(
        "OtherRankError: open: rank 0 of 2 stops because others failed: rank 1: ValueError"
    )


def test_a_second_attempt_is_one_of_both() -> None:
    assert outcomes(second_fails_then_both_try_again) == {0: "", 1: ""}


def test_a_rank_that_died_is_noticed_at_once() -> None:
    begin = time.monotonic()
    said = outcomes(second_dies, count=1)
    assert said[0].startswith("OtherRankError: load: rank 0 of 2 lost the others")
    assert time.monotonic() - begin < 60


def test_one_process_alone_needs_no_group() -> None:
    ranks = Ranks()
    ranks.agree("open")
    with pytest.raises(ValueError, match="broken"):
        ranks.agree("load", ValueError("broken"))
