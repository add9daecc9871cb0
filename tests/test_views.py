"""Only what is asked for is read, and what does not fit the daemon's memory is streamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import tensord
from conftest import Daemon
from processes import Worker, bytes_read_by, until

make_worker = processes.make_worker

MIB = 1 << 20


def weights(count: int, size_bytes: int = 2 * MIB) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    shape = (size_bytes // 4096, 1024)
    return {f"layers.{at}.w": random.standard_normal(shape, dtype=np.float32) for at in range(count)}


def flip_byte(path: Path, offset: int) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_only_names_and_patterns_are_read(
    make_daemon: Callable[..., Daemon], make_shards: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    tensors = weights(16)
    names = list(tensors)
    folder = make_shards([{n: tensors[n] for n in names[:8]}, {n: tensors[n] for n in names[8:]}])
    tensord.open(folder, "np", resident="view").close()
    before = bytes_read_by(daemon.pid)
    with tensord.open(folder, "np", only=["layers.1[0-3].w", "layers.2.w"]) as model:
        chosen = [f"layers.{at}.w" for at in (10, 11, 12, 13, 2)]
        assert model.keys() == chosen
        for name in chosen:
            np.testing.assert_array_equal(model[name], tensors[name])
        model.wait()
        assert "layers.0.w" not in model
        assert model.info()["only"] == ["layers.1[0-3].w", "layers.2.w"]
        assert bytes_read_by(daemon.pid) - before <= 1.02 * 5 * 2 * MIB + 64 * 1024
        (replica,) = daemon.ask("ls")["replicas"]
        assert (replica["tensor_count"], replica["whole_tensor_count"]) == (5, 16)
        assert "5 of 16" in daemon.run("ls").stdout


def test_a_pattern_that_matches_nothing_is_refused(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file(weights(2))
    with pytest.raises(tensord.UnknownTensorError, match=r"did you mean 'layers\.1\.w'"):
        tensord.open(path, "np", only=["layers.0.w", "layers.1.x"])
    with pytest.raises(tensord.InvalidArgumentError):
        tensord.open(path, "np", only=[])
    with pytest.raises(tensord.InvalidArgumentError, match="only: 3 is no name"):
        tensord.open(path, "np", only=[3])
    done = daemon.run("load", str(path), "--only", "nothing*")
    assert done.returncode == 1
    assert "nothing*" in done.stderr


def test_larger_replicas_serve_smaller_openings(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    tensors = weights(4)
    path = make_file(tensors)
    with tensord.open(path, "np") as whole, tensord.open(path, "np", only="layers.2.w") as part:
        assert part.info()["replica"] == whole.info()["replica"]
        assert part.keys() == ["layers.2.w"]
        np.testing.assert_array_equal(part["layers.2.w"], tensors["layers.2.w"])
    assert daemon.run("evict", str(path)).returncode == 0
    with (
        tensord.open(path, "np", only="layers.[12].w") as some,
        tensord.open(path, "np", only="layers.2.w") as one,
        tensord.open(path, "np") as whole,
    ):
        assert one.info()["replica"] == some.info()["replica"] != whole.info()["replica"]
        np.testing.assert_array_equal(one["layers.2.w"], tensors["layers.2.w"])
        np.testing.assert_array_equal(whole["layers.3.w"], tensors["layers.3.w"])


@pytest.mark.parametrize(
    ("first", "second"), [(None, "layers.3.w"), ("layers.[23].w", None), ("layers.3.w", "layers.[34].w")]
)
def test_digests_of_parts_and_wholes_check_each_other(
    make_daemon: Callable[..., Daemon],
    make_file: Callable[..., Path],
    first: str | None,
    second: str | None,
) -> None:
    daemon = make_daemon()
    path = make_file(weights(5))
    with tensord.open(path, "np", only=first) as model:
        model.wait()
    assert daemon.run("evict", str(path)).returncode == 0
    with tensord.open(path, "np", only="layers.0.w") as model:  # does not destroy what is known
        model.wait()
    assert daemon.run("evict", str(path)).returncode == 0
    flip_byte(path, path.stat().st_size - 3 * MIB)  # in layers.3.w
    with (
        tensord.open(path, "np", only=second) as model,
        pytest.raises(tensord.CorruptError, match=r"layers\.3\.w"),
    ):
        model.wait()


def test_what_does_not_fit_is_streamed(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon("--host-memory", "16MiB")
    tensors = weights(20)
    path = make_file(tensors)
    with pytest.warns(tensord.TensordWarning, match="larger than the daemon's host_memory"):
        model = tensord.open(path, "np")
    assert model.info()["resident"] == "view"
    targets = {name: np.zeros_like(value) for name, value in tensors.items()}
    worker = make_worker(daemon)
    worker.ask(f"m = tensord.open({str(path)!r}, 'np', resident='view')")
    worker.ask("t = {n: np.zeros((512, 512), 'float64') for n in m}")
    worker.tell(
        "m.load_into([(n, np.s_[:, ::2], t[n]) for n in t], cast=True);"
        "result = [float(t[n].sum()) for n in t]"
    )
    report = model.load_into(targets)
    worked, sums = worker.hear()
    assert worked, sums
    assert report.bytes == sum(value.nbytes for value in tensors.values())
    for name, value in tensors.items():
        np.testing.assert_array_equal(targets[name], value)
    expected = [float(tensors[name][:, ::2].astype("float64").sum()) for name in sorted(tensors)]
    np.testing.assert_allclose(sums, expected)
    part = model["layers.7.w"]  # memory of its own
    np.testing.assert_array_equal(part, tensors["layers.7.w"])
    view = model.view({"layers.9.w": np.s_[3:5, ::-1]})
    np.testing.assert_array_equal(view["layers.9.w"], tensors["layers.9.w"][3:5, ::-1])
    assert daemon.ask("status")["memory"]["in_use"] <= 16 * MIB
    del part, view
    until(lambda: not daemon.ask("ls")["replicas"], "nothing stays resident")
    done = daemon.run("load", str(path))
    assert done.returncode == 1
    assert "cannot be kept" in done.stderr


def test_ranks_that_stream_at_once_share_what_they_read(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    """One read for both as long as neither falls behind by more than what host_memory keeps of it."""
    daemon = make_daemon("--host-memory", "48MiB")
    tensors = weights(60)
    path = make_file(tensors)
    payload_bytes = sum(value.nbytes for value in tensors.values())
    ranks = [make_worker(daemon) for _ in range(2)]
    for number, rank in enumerate(ranks):
        columns = f"np.s_[:, {512 * number}:{512 * (number + 1)}]"
        rank.ask(f"m = tensord.open({str(path)!r}, 'np', resident='view')")
        rank.ask("t = {n: np.zeros((512, 512), 'float32') for n in m}")
        rank.ask(f"o = [(n, {columns}, t[n]) for n in t]")
    for rank in ranks:
        rank.tell("m.load_into(o); result = [float(t[n].sum(dtype='float64')) for n in sorted(t)]")
    for number, rank in enumerate(ranks):
        worked, sums = rank.hear()
        assert worked, sums
        part = slice(512 * number, 512 * (number + 1))
        np.testing.assert_allclose(
            sums, [tensors[name][:, part].sum(dtype="float64") for name in sorted(tensors)]
        )
    loaded_bytes = daemon.ask("status")["loaded_bytes"]
    assert payload_bytes <= loaded_bytes < 1.5 * payload_bytes  # 2: each read it all


def test_all_targets_are_checked_before_the_first_batch(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    make_daemon("--host-memory", "8MiB")
    path = make_file({**weights(4), "z": np.ones((12 * MIB,), "uint8")})
    model = tensord.open(path, "np", resident="view")
    good = np.zeros((512, 1024), "float32")
    for name, target in {"layers.3.w": np.zeros((2, 2), "float32"), "z": np.zeros(12 * MIB, "uint8")}.items():
        with pytest.raises(tensord.Error) as caught:
            model.load_into({"layers.0.w": good, name: target})
        assert not caught.value.target_dirty
        assert not good.any()
    with pytest.raises(tensord.ExhaustedError):
        model["z"]


def test_a_failure_in_the_middle_says_dirty_and_a_killed_rank_lets_go(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon("--host-memory", "8MiB")
    tensors = weights(12)
    path = make_file(tensors)
    worker = make_worker(daemon)
    worker.ask(f"m = tensord.open({str(path)!r}, 'np', resident='view')")
    worker.ask("t = {n: np.zeros((512, 1024), 'float32') for n in m}")
    worker.tell("while True: m.load_into(t)")
    until(lambda: daemon.ask("ls")["replicas"], "a batch is resident")
    worker.kill()
    targets = {name: np.zeros_like(value) for name, value in tensors.items()}
    with tensord.open(path, "np", resident="view") as model:
        model.load_into(targets)
        for name, value in tensors.items():
            np.testing.assert_array_equal(targets[name], value)
        until(lambda: not daemon.ask("ls")["replicas"], "nothing stays resident")
        flip_byte(path, path.stat().st_size - 3 * MIB)
        with pytest.raises(tensord.CorruptError) as caught:
            model.load_into(targets)
        assert caught.value.target_dirty
