"""One copy for many processes: what is read, what it costs, who holds it, what each may change."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
import tensord
from conftest import Daemon, counted, is_sanitized
from processes import (
    Worker,
    bytes_read_by,
    descriptor_count,
    fault_count,
    has_ended,
    sparse_file,
    status_kib,
    stopped,
    until,
)

make_worker = processes.make_worker

MIB = 1 << 20
CORRUPT = 4
CYCLE_COUNT = 100


@pytest.fixture
def plain(binary: Path) -> None:
    if is_sanitized(binary):
        pytest.skip("the memory of a sanitized daemon is not its own alone")


def opened_by(worker: Worker, path: Path) -> None:
    worker.ask(f"m = tensord.open({str(path)!r}, 'np'); m.wait()")


def lease_pids(daemon: Daemon, path: Path) -> set[int]:
    replicas = daemon.ask("ls")["replicas"]
    return {one["pid"] for replica in replicas if replica["path"] == str(path) for one in replica["leases"]}


def evict(daemon: Daemon, path: Path) -> None:
    until(lambda: daemon.run("evict", str(path)).returncode == 0, f"{path} is evicted")


# ---- read once -------------------------------------------------------------------------------------------


def test_four_processes_that_open_at_once_share_one_read(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    path = make_file({"w": counted((16 << 20,), "uint8")})
    workers = [make_worker(daemon) for _ in range(4)]
    for worker in workers:
        worker.ask("")  # has imported everything
    before = bytes_read_by(daemon.pid)
    with stopped(daemon):
        for worker in workers:
            worker.tell(f"m = tensord.open({str(path)!r}, 'np'); m.wait(); result = m.info()")
    infos = []
    for worker in workers:
        worked, info = worker.hear()
        assert worked, info
        infos.append(info)
    assert len({info["replica"] for info in infos}) == 1
    assert len({info["artifact"] for info in infos}) == 1
    report = daemon.ask("explain", str(path))
    assert report["load"] == 1
    assert 16 << 20 <= report["bytes"] <= path.stat().st_size
    read = bytes_read_by(daemon.pid) - before
    assert 16 << 20 <= read < 17 << 20
    assert lease_pids(daemon, path) == {worker.pid for worker in workers}


def test_a_folder_a_file_and_a_list_of_one_checkpoint_are_one_replica(
    daemon: Daemon, make_shards: Callable[..., Path]
) -> None:
    folder = make_shards([{"a": counted((5,))}, {"b": counted((6,))}])
    files = sorted(folder.glob("*.safetensors"))
    with tensord.open(folder, "np") as one, tensord.open(files, "np") as other:
        assert one.info()["replica"] == other.info()["replica"]


# ---- one copy --------------------------------------------------------------------------------------------


def segment_figures(pid: int) -> dict[str, int]:
    """KiB of Pss and Anonymous of the mappings of segments, in smaps."""
    figures = {"Pss": 0, "Anonymous": 0}
    in_segment = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if ("-" in name and " " in name) or "memfd:" in line:
            in_segment = "memfd:tensord-segment" in line
        elif in_segment and name in figures:
            figures[name] += int(rest.split()[0])
    return figures


def test_many_processes_cost_one_copy(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    payload = 64 * MIB
    path = make_file({"w": counted((payload,), "uint8")})
    workers = [make_worker(daemon) for _ in range(4)]
    sum_code = "result = int(m['w'].view(np.uint64).max())"
    for worker in workers:
        opened_by(worker, path)
    assert len({worker.ask(sum_code) for worker in workers}) == 1
    figures = [segment_figures(pid) for pid in [daemon.pid, *(worker.pid for worker in workers)]]
    assert sum(figure["Anonymous"] for figure in figures) == 0
    total = 1024 * sum(figure["Pss"] for figure in figures)
    assert 0.99 * payload <= total <= 1.02 * payload  # the kernel rounds each mapping's share down


def test_the_daemon_needs_the_payload_and_little_more(
    make_daemon: Callable[..., Daemon], tmp_path: Path, plain: None
) -> None:
    daemon = make_daemon()
    payload = 512 * MIB
    path = sparse_file(tmp_path / "large.safetensors", payload)
    daemon.ask("load", str(path), "--wait")
    assert payload / 1024 <= status_kib(daemon.pid, "VmHWM") <= (1.02 * payload + 64 * MIB) / 1024


def test_a_client_that_touches_nothing_costs_nothing(
    daemon: Daemon, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    path = sparse_file(tmp_path / "large.safetensors", 500_000_000)
    worker = make_worker(daemon)
    worker.ask("")
    before = status_kib(worker.pid, "VmRSS")
    opened_by(worker, path)
    worker.ask("w = m['w']")
    assert status_kib(worker.pid, "VmSize") > 500_000_000 / 1024
    assert status_kib(worker.pid, "VmRSS") - before < 20 << 10
    worker.ask("del w; m.close(); del m")
    evict(daemon, path)


def test_a_hundred_cycles_leave_nothing_behind(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path], binary: Path
) -> None:
    daemon = make_daemon("--read-threads", "2")
    paths = [make_file({"w": counted((3 << 18,))}, name=f"{at}.safetensors") for at in range(2)]

    def cycle() -> None:
        for path in paths:
            with tensord.open(path, "np") as model:
                model.wait()
                target = np.empty(3 << 18, np.float32)
                model.load_into({"w": target})
                assert target[-1] == (3 << 18) - 1
            evict_quickly(path)

    for _ in range(CYCLE_COUNT // 5):
        cycle()
    until(lambda: daemon.ask("status")["connections"] == 1, "only the asking client is connected")
    descriptors, memory = descriptor_count(daemon.pid), status_kib(daemon.pid, "VmRSS")
    for _ in range(CYCLE_COUNT):
        cycle()
    until(lambda: daemon.ask("status")["connections"] == 1, "only the asking client is connected")
    status = daemon.ask("status")
    assert status["memory"]["in_use"] == 0 and status["replicas"] == 0
    until(lambda: descriptor_count(daemon.pid) <= descriptors, "no descriptor is left behind")
    if not is_sanitized(binary):
        assert status_kib(daemon.pid, "VmRSS") <= memory + 4 * 1024


def evict_quickly(path: Path) -> None:
    """Without a process of its own for each."""
    listed = json.loads(tensord._library.call("list"))["replicas"]
    (number,) = (str(replica["replica"]) for replica in listed if replica["path"] == str(path))

    def evicted() -> bool:
        try:
            tensord._library.call("evict", number)
        except tensord.UnavailableError:
            return False  # its lease is about to end
        return True

    until(evicted, f"{path} is evicted")


def test_the_limit_holds_whatever_is_opened_and_closed(
    make_daemon: Callable[..., Daemon], tmp_path: Path, seed: int
) -> None:
    limit = 32 * MIB
    make_daemon("--host-memory", "32MiB")
    dice = random.Random(seed)
    sizes = [1, 1 * MIB, 3 * MIB, 7 * MIB, 12 * MIB, 20 * MIB, 31 * MIB]
    paths = [sparse_file(tmp_path / f"{at}.safetensors", size) for at, size in enumerate(sizes)]
    held: list[tensord.Model] = []
    refused = 0
    for _ in range(200):
        act = dice.random()
        if act < 0.6:
            try:
                held.append(tensord.open(dice.choice(paths), "np"))
            except tensord.ExhaustedError as problem:
                assert "cannot be evicted" in str(problem)
                refused += 1
        elif held:
            held.pop(dice.randrange(len(held))).close()
        memory = json.loads(tensord._library.call("status"))["memory"]
        assert memory["in_use"] + memory["kept"] <= limit
    for model in held:
        model.wait()
        model.close()
    assert refused > 0


def test_a_warm_load_into_costs_the_daemon_no_page_faults(
    make_daemon: Callable[..., Daemon], tmp_path: Path, plain: None
) -> None:
    daemon = make_daemon()
    counts = []
    for size in (1 * MIB, 256 * MIB):
        with tensord.open(sparse_file(tmp_path / f"{size}.safetensors", size), "np") as model:
            model.wait()
            target = np.zeros(size, np.uint8)
            model.load_into({"w": target})
            before = fault_count(daemon.pid)
            for _ in range(4):
                model.load_into({"w": target})
            daemon_answers(daemon)
            counts.append(fault_count(daemon.pid) - before)
    assert max(counts) <= 32, counts  # 256 MiB are 65,536 pages


def daemon_answers(daemon: Daemon) -> None:
    """What was told to it before has been read."""
    assert json.loads(tensord._library.call("status"))["pid"] == daemon.pid


# ---- fork ------------------------------------------------------------------------------------------------


def test_a_lease_passes_to_children_and_their_children(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((4, 5))})
    worker = make_worker(daemon)
    opened_by(worker, path)
    worker.ask("w = m['w']")
    pids = [worker.pid]
    for _ in range(2):
        # The parent ends; the child goes on reading what this worker is told.
        pids.append(worker.ask("os.fork() and os._exit(0); result = os.getpid()"))
        until(lambda: has_ended(pids[-2]), "the parent has ended")
        assert worker.ask("result = w.tolist()") == counted((4, 5)).tolist()
        assert lease_pids(daemon, path) == {worker.pid}
        assert "leased" in daemon.run("evict", str(path)).stderr
    assert len(set(pids)) == 3
    # The grandchild is a client like any other, over a connection of its own.
    code = "t = np.empty((5, 4), np.float32); m.load_into({'w': t.T}); result = t.T.tolist()"
    assert worker.ask(code) == counted((4, 5)).tolist()
    assert worker.ask("result = m.verify()['faults']") == []
    worker.ask("m.close(); del m")
    assert lease_pids(daemon, path) == {worker.pid}  # `w` is alive
    worker.tell("os._exit(0)")
    until(lambda: has_ended(pids[-1]), "the grandchild has ended")
    until(lambda: lease_pids(daemon, path) == set(), "the lease has ended")
    evict(daemon, path)


def test_a_child_that_closes_takes_nothing_from_its_parent(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((4, 5))})
    worker = make_worker(daemon)
    opened_by(worker, path)
    fork = """
child = os.fork()
if child == 0:
    m.close()
    os._exit(0)
result = os.waitpid(child, 0)[1]
"""
    assert worker.ask(fork) == 0
    assert lease_pids(daemon, path) == {worker.pid}
    assert worker.ask("result = m['w'].tolist()") == counted((4, 5)).tolist()


def test_a_child_waits_for_bytes_its_parent_asked_for(
    daemon: Daemon, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    path = sparse_file(tmp_path / "large.safetensors", 64 * MIB)
    worker = make_worker(daemon)
    with stopped(daemon):
        worker.tell(f"m = tensord.open({str(path)!r}, 'np'); os.fork() and os._exit(0); m.wait(); result = 1")
    assert worker.hear() == (True, 1)


# ---- copy on write ---------------------------------------------------------------------------------------


def test_what_one_process_writes_no_other_sees(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    pytest.importorskip("torch")
    path = make_file({"w": counted((300, 1000))})
    writer, reader = make_worker(daemon), make_worker(daemon)
    for worker in (writer, reader):
        worker.ask("import torch; torch.set_num_threads(1)")  # OpenMP's threads do not survive a fork
        worker.ask(f"m = tensord.open({str(path)!r}, 'pt'); w = m['w']; result = float(w[0, 0])")
    writer.ask("w.fill_(-1)")
    fork = "child = os.fork()\nif child == 0: w.fill_(-2); os._exit(0)\nresult = os.waitpid(child, 0)[1]"
    assert writer.ask(fork) == 0
    assert writer.ask("result = [float(w.min()), float(w.max())]") == [-1, -1]
    expected = [0, float(counted((300, 1000)).max())]
    assert reader.ask("result = [float(w.min()), float(w.max())]") == expected
    assert daemon.ask("verify", str(path))["faults"] == []
    with tensord.open(path, "np") as model:
        np.testing.assert_array_equal(model["w"], counted((300, 1000)))


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_no_descriptor_a_client_gets_can_change_the_bytes(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path], framework: str
) -> None:
    if framework == "pt":
        pytest.importorskip("torch")
    path = make_file({"w": counted((300, 1000))})
    worker = make_worker(daemon)
    # The memory files of a client are its mappings: opened anew, they still cannot be written to or resized.
    code = f"""
m = tensord.open({str(path)!r}, {framework!r}); m.wait(); w = m['w']
import mmap
result = []
for name in sorted(os.listdir('/proc/self/map_files')):
    link = '/proc/self/map_files/' + name
    if 'memfd:tensord' not in os.readlink(link):
        continue
    fd = os.open(link, os.O_RDWR)
    for attempt in (
        lambda: os.pwrite(fd, b'x', 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 1 << 40),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        try:
            attempt()
            result.append(os.readlink(link))
        except PermissionError:
            result.append(None)
"""
    try:
        outcome = worker.ask(code)
    except AssertionError as problem:
        if "map_files" in str(problem) or "PermissionError" in str(problem):
            pytest.skip(f"mappings cannot be opened here: {problem}")
        raise
    assert len(outcome) >= 8 and set(outcome) == {None}


# ---- digests ---------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Changes a byte as a failing disk would: size and mtime stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_bytes_that_differ_from_the_first_load_are_refused(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    path = make_file({"first": counted((300, 1000)), "second": counted((400, 1000))})
    assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
    assert daemon.ask("explain", str(path))["checked_against"] == "first_load"
    evict(daemon, path)
    place = path.stat().st_size - 5
    flip(path, place)
    for _ in range(2):
        with tensord.open(path, "np") as model:
            with pytest.raises(tensord.CorruptError) as caught:
                model.wait()
            assert str(path) in str(caught.value) and "second" in str(caught.value)
            with pytest.raises(tensord.CorruptError):
                model["second"]
        del model, caught
        done = daemon.run("verify", str(path))
        assert done.returncode == CORRUPT
        assert str(path) in done.stderr and "second" in done.stderr
        # What was learned outlives the daemon.
        assert daemon.stop() == 0
        daemon.start()
    flip(path, place)
    assert daemon.ask("load", str(path), "--wait")["state"] == "ready"
    assert daemon.ask("explain", str(path))["checked_against"] == "recorded"


def test_a_file_that_was_meant_to_change_is_another_artifact(
    daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    before = daemon.ask("load", str(path), "--wait")
    flip(path, path.stat().st_size - 1)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    after = daemon.ask("load", str(path), "--wait")
    assert after["artifact"] != before["artifact"] and after["replica"] != before["replica"]
    assert daemon.ask("explain", str(path))["checked_against"] == "first_load"


def change_in_memory(daemon: Daemon, wanted: bytes) -> None:
    """Flips a bit of the first place in the daemon's segments that holds `wanted`."""
    with Path(f"/proc/{daemon.pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines():
            if "memfd:tensord-segment" not in line:
                continue
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            memory.seek(begin)
            at = memory.read(end - begin).find(wanted)
            if at >= 0:
                memory.seek(begin + at)
                memory.write(bytes([wanted[0] ^ 1]))
                return
    raise LookupError("no segment holds these bytes")


def test_verify_finds_what_changed_in_memory(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    daemon = make_daemon()
    mark = bytes(random.Random(1).randbytes(64))
    data = np.zeros(3 * MIB, np.uint8)
    data[2 * MIB + 100 : 2 * MIB + 164] = np.frombuffer(mark, np.uint8)
    path = make_file({"first": counted((5,)), "second": data})
    with tensord.open(path, "np") as model:
        model.wait()
        assert model.verify()["faults"] == []
        assert daemon.run("verify", str(path)).returncode == 0
        try:
            change_in_memory(daemon, mark)
        except PermissionError as problem:
            pytest.skip(f"the memory of another process cannot be written to: {problem}")
        with pytest.raises(tensord.CorruptError, match="second") as caught:
            model.verify()
        assert str(path) in str(caught.value)
        done = daemon.run("verify", str(path))
        assert done.returncode == CORRUPT
        said = done.stdout + done.stderr
        assert str(path) in said and "second" in said
        (fault,) = json.loads(daemon.run("verify", str(path), "--json").stdout)["faults"]
        assert (fault["tensor"], fault["leaf"], fault["file"]) == ("second", 2, str(path))
