"""Ranks and engines that load one checkpoint: one read of the disk, whoever comes when and whoever leaves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import tensord
from conftest import Daemon, counted
from processes import Worker, bytes_read_by, halfway, on_disk_alone, sparse_file

make_worker = processes.make_worker

ROWS, COLUMNS, LAYER_COUNT, RANK_COUNT = 512, 4096, 12, 8
PAYLOAD_BYTES = ROWS * COLUMNS * LAYER_COUNT * 2

# A tensor-parallel rank: its columns of each matrix into memory of its own, and their sums.
RANK = """
share = {columns} // {ranks}
mine = slice({rank} * share, ({rank} + 1) * share)
targets = {{name: np.zeros(({rows}, share), np.uint16) for name in m.keys()}}
m.view({{name: np.s_[:, mine] for name in targets}}).load_into(targets)
result = {{name: int(target.sum(dtype=np.uint64)) for name, target in targets.items()}}
"""


def layer(number: int) -> np.ndarray:
    return (counted((ROWS, COLUMNS), "uint16").astype(np.uint32) * (number + 1) % 65521).astype(np.uint16)


@pytest.fixture
def folder(make_shards: Callable[..., Path]) -> Path:
    """Two shards, on the disk alone."""
    half = LAYER_COUNT // 2
    shards = [{f"layer.{at}": layer(at) for at in part} for part in (range(half), range(half, LAYER_COUNT))]
    folder = make_shards(shards)
    for path in folder.glob("*.safetensors"):
        on_disk_alone(path)
    return folder


def expected_sums(rank: int) -> dict[str, int]:
    share = COLUMNS // RANK_COUNT
    mine = slice(rank * share, (rank + 1) * share)
    return {f"layer.{at}": int(layer(at)[:, mine].sum(dtype=np.uint64)) for at in range(LAYER_COUNT)}


def open_as(worker: Worker, path: object) -> None:
    worker.ask(f"m = tensord.open({path!r}, 'np')")


def load_as(worker: Worker, rank: int) -> None:
    worker.tell(RANK.format(rank=rank, ranks=RANK_COUNT, rows=ROWS, columns=COLUMNS))


def test_ranks_of_two_engines_that_come_at_any_time_cost_one_read(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], folder: Path
) -> None:
    daemon = make_daemon()
    names = [str(folder), [str(path) for path in sorted(folder.glob("*.safetensors"))]]
    ranks = [make_worker(daemon) for _ in range(RANK_COUNT)]
    before = {name: bytes_read_by(daemon.pid, name) for name in ("rchar", "read_bytes")}
    for rank, worker in enumerate(ranks):
        open_as(worker, names[rank % 2])
        if rank % 3 != 2:  # some copy while others come, some later
            load_as(worker, rank)
    for rank, worker in enumerate(ranks):
        if rank % 3 == 2:
            load_as(worker, rank)
        assert worker.hear() == (True, expected_sums(rank))
    for name, count in before.items():
        read = bytes_read_by(daemon.pid, name) - count
        assert read <= 1.02 * PAYLOAD_BYTES, name
    report = daemon.ask("explain", str(folder))
    assert report["load"] == 1
    assert PAYLOAD_BYTES <= report["bytes"] <= 1.02 * PAYLOAD_BYTES
    assert report["disk_bytes"] <= 1.02 * PAYLOAD_BYTES


def test_ranks_that_die_or_leave_stop_nobody_else(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon()
    path = sparse_file(tmp_path / "large.safetensors")
    workers = [make_worker(daemon) for _ in range(3)]
    with halfway(daemon, path, *workers) as model:
        workers[0].tell("m.load_into({'w': np.zeros(m.entry('w').shape, np.uint8)})")
        workers[1].ask("m.close()")
        workers[2].tell("m.wait(); result = m.info()['ready_bytes']")
        workers[0].kill()
        total_bytes = model.info()["total_bytes"]
    assert workers[2].hear() == (True, total_bytes)
    model.wait()
    assert not model["w"].any()
    model.close()


def test_sixteen_threads_copy_a_thousand_random_ranges_each_while_the_load_runs(
    make_daemon: Callable[..., Daemon], folder: Path
) -> None:
    make_daemon()
    layers = [layer(at) for at in range(LAYER_COUNT)]
    faults: list[str] = []

    def work(model: tensord.Model, seed: int) -> None:
        choose = random.Random(seed)
        target = np.zeros((64, 64), np.uint16)
        for _ in range(1000):
            at = choose.randrange(LAYER_COUNT)
            rows = slice(begin := choose.randrange(ROWS), min(begin + choose.randrange(1, 65), ROWS))
            columns = slice(begin := choose.randrange(COLUMNS), min(begin + choose.randrange(1, 65), COLUMNS))
            expected = layers[at][rows, columns]
            part = target[: expected.shape[0], : expected.shape[1]]
            model.load_into([(f"layer.{at}", (rows, columns), part)])
            if not np.array_equal(part, expected):
                faults.append(f"layer.{at}[{rows}, {columns}]")

    with tensord.open(folder, "np") as model:
        threads = [threading.Thread(target=work, args=(model, seed)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
