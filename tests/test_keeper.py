"""The keeper: what is ready outlives its daemon, however that ends."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import tensord
from conftest import COMMAND, DEADLINE_SECONDS, Daemon
from fake_gpu import MIB, WEIGHTS, Gpu, needs_no_driver
from processes import Worker, until
from tensord import keeper as keeping
from tensord.keeper import Connection, Item, Store

library, gpu, start = fake_gpu.library, fake_gpu.gpu, fake_gpu.start

ROWS = np.arange(6 * MIB, dtype=np.uint8).reshape(6, MIB)
TENSORS = {"rows": ROWS, "norm": np.arange(999, dtype=np.float32), "none": np.zeros((0, 4), np.float32)}


class Keeper:
    """`tensord keep` beside a daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = daemon.runtime_folder / "keeper"
        self.process = subprocess.Popen(
            [*COMMAND, "keep"],
            env={**os.environ, **daemon.environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert "listens at" in self.process.stderr.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(DEADLINE_SECONDS)


@pytest.fixture
def keep() -> Iterator[Callable[[Daemon], Keeper]]:
    made: list[Keeper] = []

    def begin(daemon: Daemon) -> Keeper:
        known = stored_count(daemon)
        made.append(Keeper(daemon))
        until(lambda: stored_count(daemon) > known, "the daemon has told the keeper all")
        return made[-1]

    yield begin
    for one in made:
        one.stop()


def stored_count(daemon: Daemon) -> int:
    return daemon.log().count("keeper: it stores what is ready")


@pytest.fixture
def path(make_file: Callable[..., Path]) -> Path:
    return make_file(TENSORS)


def kill(daemon: Daemon) -> None:
    daemon.stop(signal.SIGKILL)


def restart(daemon: Daemon) -> None:
    """An answer of the daemon comes after what it told the keeper of before."""
    listed(daemon)
    kill(daemon)
    daemon.start()


def is_right(model: tensord.Model, tensors: dict[str, np.ndarray] = TENSORS) -> bool:
    return all(np.array_equal(model[name], tensor) for name, tensor in tensors.items())


def listed(daemon: Daemon) -> list[dict[str, Any]]:
    return list(daemon.ask("ls")["replicas"])


def holders(daemon: Daemon) -> list[int]:
    return [lease["pid"] for replica in listed(daemon) for lease in replica["leases"]]


# ---- daemons that end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_ready_outlives_its_daemon(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path, how: signal.Signals
) -> None:
    daemon = make_daemon()
    keep(daemon)
    model = tensord.open(path, "np")
    assert is_right(model)
    model.wait()
    daemon.ask("pin", str(path))
    old = model["rows"]
    before = listed(daemon)
    daemon.stop(how)
    assert np.array_equal(old, ROWS) and is_right(model)  # nobody serves, and mappings stay
    daemon.start()
    after = listed(daemon)
    for name in (
        "replica",
        "path",
        "artifact",
        "pinned",
        "memory_bytes",
        "payload_bytes",
        "ready_bytes",
        "state",
    ):
        assert after[0][name] == before[0][name], name
    assert after[0]["pinned"] and holders(daemon) == [os.getpid()]
    assert daemon.ask("explain", str(path))["checked_against"] == "recorded"
    worker = Worker(daemon.environment)  # a process that has never seen the first daemon
    worker.tell(f"model = tensord.open({str(path)!r}, 'np')")
    assert worker.hear()[0]
    worker.tell("result = int(model['rows'].sum()), model.info()['replica']")
    assert worker.hear() == (True, [int(ROWS.sum()), before[0]["replica"]])
    assert daemon.ask("status")["loaded_bytes"] == 0
    target = np.zeros_like(ROWS)
    model.load_into({"rows": target})
    assert np.array_equal(target, ROWS)
    assert sorted(holders(daemon)) == sorted([os.getpid(), worker.pid])
    assert daemon.run("evict", str(path)).returncode != 0
    told = daemon.run("explain", str(path))
    assert told.returncode == 0 and "taken over from a keeper" in told.stdout, told.stdout + told.stderr
    assert daemon.ask("verify", str(path))["faults"] == []
    del old, target
    model.close()
    until(lambda: holders(daemon) == [worker.pid], "the old lease ends")
    worker.process.kill()
    worker.process.wait()
    until(lambda: holders(daemon) == [], "so does that of a process that dies")


def test_a_client_that_dies_while_no_daemon_runs(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keep(daemon)
    worker = Worker(daemon.environment)
    worker.tell(f"model = tensord.open({str(path)!r}, 'np'); model.wait()")
    assert worker.hear()[0]
    kill(daemon)
    worker.process.kill()
    worker.process.wait()
    daemon.start()
    until(lambda: listed(daemon) and not holders(daemon), "it is there, and nobody holds it")
    daemon.ask("evict", str(path))
    assert listed(daemon) == [] and daemon.ask("status")["memory"]["in_use"] == 0
    until(lambda: daemon.ask("status")["memory"]["kept"] == 0, "what cannot be written to is given back")
    restart(daemon)
    assert listed(daemon) == []


def test_three_daemons_and_a_selection(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keep(daemon)
    with tensord.open(path, "np", only="norm") as part:
        part.wait()
    for _ in range(2):
        restart(daemon)
        with tensord.open(path, "np", only="norm") as part:
            assert list(part) == ["norm"] and is_right(part, {"norm": TENSORS["norm"]})
        assert daemon.ask("status")["loaded_bytes"] == 0
    with tensord.open(path, "np") as model:
        assert is_right(model)
    assert {one["tensor_count"] for one in listed(daemon)} == {1, 3}
    path.write_bytes(path.read_bytes() + b"")  # the same bytes, another mtime: another file
    restart(daemon)
    with tensord.open(path, "np") as model:
        assert is_right(model)
        assert daemon.ask("status")["loaded_bytes"] > 0


def test_what_fills_is_not_kept(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    keep(daemon)
    path = make_file({"w": np.random.default_rng(1).integers(0, 255, 96 * MIB, np.uint8)})
    for _ in range(5):
        model = tensord.open(path, "np")
        kill(daemon)
        daemon.start()
        with tensord.open(path, "np") as again:
            assert np.array_equal(again["w"][-5:], np.fromfile(path, np.uint8)[-5:])
        model.close()


# ---- keepers that end ------------------------------------------------------------------------------------


def test_a_keeper_that_comes_again_is_told_all(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    model = tensord.open(path, "np")
    model.wait()
    keep(daemon).kill()
    keep(daemon)
    restart(daemon)
    assert holders(daemon) == [os.getpid()] and is_right(model)
    assert daemon.ask("status")["loaded_bytes"] == 0
    model.close()


def test_without_a_keeper_or_when_it_ends_all_is_as_ever(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keeper = keep(daemon)
    with tensord.open(path, "np") as model:
        model.wait()
    assert keeper.stop() == 0 and not keeper.socket.exists()
    restart(daemon)
    assert listed(daemon) == []


def test_only_one_keeper(make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper]) -> None:
    daemon = make_daemon()
    keep(daemon)
    refused = daemon.run("keep")
    assert refused.returncode != 0 and "a keeper already runs" in refused.stderr
    assert "tensord keep &" in daemon.run("keep", "--help").stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_keeper_ends_when_it_is_told(make_daemon: Callable[..., Daemon], how: signal.Signals) -> None:
    keeper = Keeper(make_daemon())
    assert keeper.socket.exists()
    keeper.process.send_signal(how)
    assert keeper.process.wait(DEADLINE_SECONDS) == 0
    assert not keeper.socket.exists()


def test_a_runtime_folder_that_is_too_long_for_a_keeper(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    done = subprocess.run(
        [*COMMAND, "keep"],
        env={**os.environ, "TENSORD_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 1
    assert "too long" in done.stderr


def test_strangers_at_the_keeper(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keeper = keep(daemon)
    with tensord.open(path, "np") as model:
        model.wait()
    frame = struct.pack("<IIII", keeping.MAGIC, 16, 0, 0)
    words = [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        frame,
        frame + struct.pack("<QQ", 0, 99),
        struct.pack("<IIII", keeping.MAGIC, 20, 0, 0) + struct.pack("<QQI", 0, 0, 5),
        struct.pack("<IIII", keeping.MAGIC, 20, 5, 0) + struct.pack("<QQI", 9, 0, 5),
        struct.pack("<IIII", keeping.MAGIC, 1 << 31, 0, 0),
    ]
    words += [
        struct.pack("<IIII", keeping.MAGIC, 16, 0, 0) + bytes(16)
    ] * 5  # one that asks for all, and is gone
    for one in words:
        known = stored_count(daemon)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(str(keeper.socket))
            peer.sendall(one)
            if one != words[-1]:
                until(lambda known=known: stored_count(daemon) > known, "the daemon is back")  # type: ignore[misc]
    until(lambda: stored_count(daemon) > known, "the daemon is back")
    assert keeper.process.poll() is None
    restart(daemon)
    with tensord.open(path, "np") as model:
        assert is_right(model) and daemon.ask("status")["loaded_bytes"] == 0


# ---- keepers that cannot be trusted ----------------------------------------------------------------------


class Impostor:
    """A keeper made of the real one's parts. What it `gives` goes to the next daemon that asks."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(10_000)
        self.gives: list[Item] | bytes | None = None  # None: what it has
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(folder / "keeper"))
        self.listener.listen(4)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            connection = Connection(peer, self.store)
            if self.gives is not None:
                given = self.gives
                self.store = connection._store = Store(10_000)
                if isinstance(given, bytes):
                    peer.setblocking(True)
                    peer.sendall(given)
                    peer.close()
                    continue
                connection._store.items = lambda given=given: given  # type: ignore[method-assign]
            try:
                while True:
                    peer.settimeout(DEADLINE_SECONDS)
                    connection.receive()
            except (EOFError, OSError, keeping.Refused):
                connection.close()

    def items(self) -> list[Item]:
        """Copies of what it has."""
        return [Item(one.content, tuple(map(os.dup, one.fds))) for one in self.store.items()]

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def impostor(make_daemon: Callable[..., Daemon]) -> Iterator[tuple[Daemon, Impostor]]:
    daemon = make_daemon()
    made = Impostor(daemon.runtime_folder)
    until(lambda: stored_count(daemon) > 0, "it is told all")
    yield daemon, made
    daemon.stop(signal.SIGKILL)
    made.close()


def test_memory_that_was_given_up_is_not_taken_over(
    impostor: tuple[Daemon, Impostor], make_file: Callable[..., Path]
) -> None:
    """A daemon that died before it could say so: its segments hold something else."""
    daemon, keeper = impostor
    contents = [np.random.default_rng(seed).integers(0, 255, 3 * MIB, np.uint8) for seed in range(2)]
    first, second = (make_file({"w": one}, name=f"{at}.safetensors") for at, one in enumerate(contents))
    with tensord.open(first, "np") as model:
        model.wait()
    until(lambda: len(keeper.items()) >= 1, "it is kept")
    stale = keeper.items()
    daemon.ask("evict", str(first))
    with tensord.open(second, "np") as model:
        model.wait()
    kill(daemon)
    keeper.gives = stale
    daemon.start()
    assert listed(daemon) == [] and "its memory has been given up since" in daemon.log()
    with tensord.open(first, "np") as model:
        assert np.array_equal(model["w"], contents[0])


def test_what_a_hostile_keeper_gives(impostor: tuple[Daemon, Impostor], path: Path, seed: int) -> None:
    """Any byte and any descriptor may be another one; the daemon serves what is right, or nothing of it."""
    daemon, keeper = impostor
    model = tensord.open(path, "np")
    model.wait()
    until(lambda: len(keeper.items()) >= 2, "replica and lease are kept")
    good = keeper.items()
    dice = random.Random(seed)
    for _ in range(25):
        kill(daemon)
        items = []
        for item in good:
            content, fds = bytearray(item.content), list(item.fds)
            for _ in range(dice.choice([0, 1, 1, 3])):
                content[dice.randrange(len(content))] = dice.choice([0, 1, 255, dice.randrange(256)])
            kind = dice.randrange(6)
            if kind == 0:
                dice.shuffle(fds)
            elif kind == 1:
                fds.pop()
            elif kind == 2:
                fds[dice.randrange(len(fds))] = os.open("/dev/null", os.O_RDONLY)
            items.append(Item(bytes(content), tuple(fds)))
        keeper.gives = items
        daemon.start()
        assert isinstance(daemon.ask("ls")["replicas"], list), daemon.log()
        keeper.gives = None
    kill(daemon)
    keeper.gives = good
    daemon.start()
    assert holders(daemon) == [os.getpid()]
    with tensord.open(path, "np") as again:
        assert is_right(again) and is_right(model)
        assert daemon.ask("status")["loaded_bytes"] == 0
    model.close()


@pytest.mark.parametrize("words", [b"", b"nonsense" * 99, struct.pack("<IIII", keeping.MAGIC, 16, 0, 0)])
def test_garbage_in_place_of_a_keeper(impostor: tuple[Daemon, Impostor], path: Path, words: bytes) -> None:
    daemon, keeper = impostor
    kill(daemon)
    keeper.gives = words
    daemon.start()
    with tensord.open(path, "np") as model:
        assert is_right(model)
        # Numbers that clients of a daemon before this one may have are not given again.
        assert model.info()["replica"] > 1000 and "is not taken over" in daemon.log()


def test_a_keeper_that_sleeps(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keeper = keep(daemon)
    keeper.process.send_signal(signal.SIGSTOP)
    with tensord.open(path, "np") as model:
        assert is_right(model)
    restart(daemon)
    with tensord.open(path, "np") as model:
        assert is_right(model)
    assert "keeper: the other side does not answer" in daemon.log()


def test_a_keeper_that_sleeps_with_a_full_queue(
    make_daemon: Callable[..., Daemon], keep: Callable[[Daemon], Keeper], path: Path
) -> None:
    daemon = make_daemon()
    keeper = keep(daemon)
    keeper.process.send_signal(signal.SIGSTOP)
    peers = []
    with pytest.raises(BlockingIOError):
        while True:
            peers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            peers[-1].connect(str(keeper.socket))
    kill(daemon)
    daemon.start()
    with tensord.open(path, "np") as model:
        assert is_right(model)
    for peer in peers:
        peer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_keeper_of_another_uid(make_daemon: Callable[..., Daemon], path: Path) -> None:
    daemon = make_daemon()
    kill(daemon)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(daemon.runtime_folder / "keeper"))
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        listener.listen(4)
        signal.pause()
    try:
        daemon.start()
        until(lambda: re.search(r"keeper: .*65534", daemon.log()), "it says why")
        with tensord.open(path, "np") as model:
            assert is_right(model)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        listener.close()


# ---- GPU memory ------------------------------------------------------------------------------------------


@needs_no_driver
def test_gpu_memory_outlives_its_daemon(
    start: Callable[..., Daemon],
    gpu: Gpu,
    library: Path,
    keep: Callable[[Daemon], Keeper],
    make_file: Callable[..., Path],
) -> None:
    from test_gpu_replicas_fake import DEVICES, Client, check_all

    path = make_file(WEIGHTS)
    daemon = start()
    keep(daemon)
    model = tensord.open(path, "np", device="cuda:0")
    model.wait()
    daemon.ask("pin", str(model.info()["replica"]))
    daemon.ask("evict", str(path))
    kill(daemon)
    check_all(model)
    daemon.start()
    there = {one["device"]: one for one in listed(daemon)}
    assert there.keys() == {DEVICES[0]} and there[DEVICES[0]]["pinned"]
    assert holders(daemon) == [os.getpid()]
    third = Client(library, path)
    assert third.info["replica"] == model.info()["replica"]
    assert daemon.ask("status")["loaded_bytes"] == 0
    target = gpu.like(WEIGHTS["matrix"])
    model.load_into({"matrix": target})
    assert np.array_equal(target.numpy(), WEIGHTS["matrix"])
    with tensord.open(path, "np", device="cuda:1") as other:  # by peer copy out of what was taken over
        check_all(other)
    assert daemon.ask("status")["loaded_bytes"] == 0
    model.close()
    third.process.kill()
    third.process.wait()
    until(lambda: holders(daemon) == [], "all leases end")


@needs_no_driver
def test_a_selection_on_a_gpu_that_came_out_of_more_outlives_its_daemon(
    start: Callable[..., Daemon], gpu: Gpu, keep: Callable[[Daemon], Keeper], make_file: Callable[..., Path]
) -> None:
    from test_gpu_replicas_fake import check_all

    path = make_file(WEIGHTS)
    daemon = start()
    keep(daemon)
    last = max(WEIGHTS)  # in the order of names, and so far from the first byte
    chosen = {last: WEIGHTS[last]}
    with tensord.open(path, "np") as whole:
        whole.wait()
        model = tensord.open(path, "np", only=[last], device="cuda:0")
        model.wait()
        check_all(model, chosen)
    kill(daemon)
    check_all(model, chosen)
    daemon.start()
    with tensord.open(path, "np", only=[last], device="cuda:0") as again:
        check_all(again, chosen)
        target = gpu.like(WEIGHTS[last])
        again.load_into({last: target})
        assert np.array_equal(target.numpy(), WEIGHTS[last])
    with tensord.open(path, "np", device="cuda:0") as whole:
        check_all(whole)
    assert daemon.ask("status")["loaded_bytes"] == 0
    model.close()
