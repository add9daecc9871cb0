"""What comes from outside and is bad: files, files that change, clients that die, bytes on the socket."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon, counted, safetensors_bytes
from processes import Worker, halfway, sparse_file, until

make_worker = processes.make_worker

NOBODY = 65534
MUTATION_COUNT = 300


@pytest.fixture(autouse=True)
def it_lives_on(daemon: Daemon, tmp_path: Path) -> Iterator[None]:
    """Whatever a test does to it, the same daemon serves afterwards, and nothing holds its memory."""
    yield
    assert daemon.ask("status")["pid"] == daemon.pid, daemon.log()
    path = tmp_path / "sound.safetensors"
    path.write_bytes(safetensors_bytes({"w": counted((2, 3))}))
    with tensord.open(path, "np") as model:
        assert model["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    del model
    gc.collect()  # errors keep the frames they were raised in, and those the models
    until(lambda: evict_all(daemon), "nobody holds a replica")
    assert daemon.ask("status")["memory"]["in_use"] == 0


def evict_all(daemon: Daemon) -> bool:
    """Whether nothing is resident any more."""
    replicas = daemon.ask("ls")["replicas"]
    for replica in replicas:
        daemon.run("evict", str(replica["replica"]))
    return not replicas


# ---- headers ---------------------------------------------------------------------------------------------


def with_header(header: str | bytes, data_bytes: int = 0) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), name: str = "bad", **more: object
) -> str:
    fields = {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}
    return f"{json.dumps(name)}: {json.dumps({key: value for key, value in fields.items() if value != ''})}"


def one(*args: object, **fields: object) -> bytes:
    """A file of one tensor, `bad`, over 8 bytes."""
    return with_header("{" + entry(*args, **fields) + "}", 8)  # type: ignore[arg-type]


GOOD = entry(name="good")

HOSTILE_FILES = {
    "empty": (b"", "too few"),
    "shorter than a length": (b"\x02\0\0\0\0\0\0", "too few"),
    "header length 0": (bytes(16), "header length is 0"),
    "header longer than the file": (struct.pack("<Q", 3) + b"{}", "ends past the file's 10 bytes"),
    "header length of all ones": (b"\xff" * 8 + b"{}", "header length 18446744073709551615 is over"),
    "header length over the limit": (
        struct.pack("<Q", 100_000_001) + b"{}",
        "header length 100000001 is over",
    ),
    "header of NULs": (with_header(bytes(64)), "does not begin with '{'"),
    "header is an array": (with_header("[1, 2]"), "does not begin with '{'"),
    "header is text": (with_header('"w"'), "does not begin with '{'"),
    "header is blanks": (with_header(" " * 16), "does not begin with '{'"),
    "header is cut": (with_header("{" + GOOD[:-9], 8), "header"),
    "header has no end": (with_header("{" + GOOD, 8), "header"),
    "header goes on behind its end": (with_header("{" + GOOD + "} x", 8), "header"),
    "no UTF-8": (with_header(b'{"\xff\xfe": 1}'), "header"),
    "overlong UTF-8": (with_header(b'{"\xc0\xaf": 1}'), "header"),
    "half a surrogate pair": (with_header('{"\\ud800": 1}'), "header"),
    "a raw newline in a name": (with_header('{"a\nb": 1}'), "header"),
    "100,000 arrays in each other": (with_header("{" + '"bad":' + "[" * 100_000), "bad|deep|header"),
    "100,000 objects in each other": (with_header('{"bad":' * 100_000), "bad|deep|header"),
    "a comment": (with_header("{/* */}"), "header"),
    "a trailing comma": (with_header("{" + GOOD + ",}", 8), "header"),
    "NaN": (with_header('{"bad": NaN}'), "header"),
    "tensor is a number": (with_header('{"bad": 1}'), "bad.*not an object"),
    "tensor is null": (with_header('{"bad": null}'), "bad.*not an object"),
    "tensor twice": (with_header("{" + entry() + "," + entry() + "}", 8), "bad.*is there twice"),
    "field twice": (
        with_header('{"bad": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
        "bad.*duplicate field .dtype",
    ),
    "field nobody knows": (one(strange=1), "bad.*unknown field .strange"),
    "no dtype": (one(dtype=""), "bad.*dtype is missing"),
    "no shape": (one(shape=""), "bad.*shape is missing"),
    "no data_offsets": (one(offsets=""), "bad.*data_offsets is missing"),
    "dtype is a number": (one(dtype=32), "bad.*dtype is .*, not a string"),
    "shape is a number": (one(shape=2), "bad.*shape is .*, not an array"),
    "shape is an object": (one(shape={"0": 2}), "bad"),
    "shape is negative": (one(shape=[-2]), "bad.*shape holds .*, not a natural number"),
    "shape is a fraction": (one(shape=[2.5]), "bad.*shape holds .*, not a natural number"),
    "shape is text": (one(shape=["2"]), "bad.*shape holds .*, not a natural number"),
    "shape holds an array": (one(shape=[[2]]), "bad"),
    "shape is over 64 bits": (one(shape=[1 << 64]), "bad|header"),
    "product of shape overflows": (one(shape=[1 << 32, 1 << 32, 2]), "bad.*does not fit 64 bits"),
    "product is 0 but overflows before": (one(shape=[1 << 40, 1 << 40, 0]), "bad"),
    "size in bits overflows": (one(shape=[1 << 60]), "bad.*does not fit 64 bits"),
    "too many dimensions": (one(shape=[1] * 65), "bad.*over 64 dimensions"),
    "one offset": (one(offsets=[0]), "bad.*data_offsets has 1 of 2 numbers"),
    "three offsets": (one(offsets=[0, 8, 8]), "bad.*more than 2 numbers"),
    "offsets end before they begin": (one(offsets=[8, 0]), r"bad.*\[8, 0\] end before they begin"),
    "offsets past the file": (one(shape=[4], offsets=[0, 16]), r"bad.*\[0, 16\] end past the file's 8 bytes"),
    "offsets of 2^64": (one(offsets=[0, (1 << 64) - 1]), "bad.*end past the file's 8 bytes"),
    "shape takes more than the range": (one(shape=[3]), "bad.*take 12 bytes, its data_offsets span 8"),
    "shape takes less than the range": (one(shape=[1]), "bad.*take 4 bytes, its data_offsets span 8"),
    "half a byte": (one("F4", [15], [0, 8]), "bad.*not a whole number of bytes"),
    "overlap": (
        with_header("{" + GOOD + "," + entry("U8", [5], [3, 8]) + "}", 8),
        "good.*bad.*overlap|bad.*good.*overlap",
    ),
    "two of one range": (with_header("{" + GOOD + "," + entry() + "}", 8), "overlap"),
    "hole at the beginning": (with_header("{" + entry(offsets=[4, 12]) + "}", 12), "4 bytes at .*bad"),
    "hole in the middle": (
        with_header("{" + GOOD + "," + entry(offsets=[9, 17]) + "}", 17),
        "1 bytes at .*bad",
    ),
    "bytes left over": (with_header("{" + GOOD + "}", 9), "1 bytes are left over"),
    "bytes and no tensor": (with_header("{}", 1), "1 bytes are left over"),
    "metadata is text": (with_header('{"__metadata__": "x"}'), "__metadata__"),
    "metadata holds a number": (with_header('{"__metadata__": {"key": 1}}'), "__metadata__.*key"),
    "metadata twice": (with_header('{"__metadata__": {}, "__metadata__": {}}'), "duplicate __metadata__"),
    "metadata key twice": (with_header('{"__metadata__": {"k": "1", "k": "2"}}'), "duplicate metadata key"),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE_FILES[kind]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(tensord.CorruptError) as caught:
        tensord.open(path)
    assert str(path) in str(caught.value)
    assert re.search(message, str(caught.value)), caught.value
    assert len(str(caught.value)) < 2000


def test_a_header_over_100_mb_is_refused_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 200_000_000)
    with pytest.raises(tensord.CorruptError, match="header length 100000001 is over"):
        tensord.open(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": counted((3, 5)), "b": counted((7,), "int8")}, {"k": "v"})
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(tensord.CorruptError, match=re.escape(str(path))):
            tensord.open(path)


def test_mutated_headers_are_refused_or_make_sense(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    whole = safetensors_bytes({"a": counted((3, 5)), "b": counted((7,), "int8")}, {"k": "v"})
    header_bytes = 8 + struct.unpack_from("<Q", whole)[0]
    path = tmp_path / "mutated.safetensors"
    for _ in range(MUTATION_COUNT):
        mutated = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            mutated[dice.randrange(header_bytes)] = dice.choice(b'{}[]",:0129\\ \xff\0\x01')
        path.write_bytes(mutated)
        try:
            model = tensord.open(path, "np")
        except tensord.CorruptError as problem:
            assert str(path) in str(problem)
        else:
            assert sum(model.entry(name).size_bytes for name in model) == len(whole) - header_bytes
            model.close()


# ---- sharded checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def shards(make_shards: Callable[..., Path]) -> Path:
    return make_shards([{"a": counted((2,))}, {"b": counted((3,))}])


def rewrite_index(folder: Path, content: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", "", "\0", "a/.."],
)
def test_an_index_may_not_name_files_outside_its_folder(shards: Path, name: str) -> None:
    shutil.copy(shards / SECOND, shards.parent / "outside.safetensors")
    index = rewrite_index(shards, {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": name}})
    with pytest.raises(tensord.CorruptError) as caught:
        tensord.open(shards)
    assert str(index) in str(caught.value) and '"b"' in str(caught.value).replace("'", '"')


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": {}}}', '{"weight_map": {"a": "x", "a": "x"}}',
     '{"weight_map": {}, "weight_map": {}}',
     '{"weight_map":' + "[" * 100_000, "\ufeff{}", '{"weight_map": {"a": "x"}} x'],
    ids=lambda content: content[:36],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(shards: Path, content: str) -> None:
    index = rewrite_index(shards, content)
    with pytest.raises(tensord.CorruptError, match=re.escape(str(index))):
        tensord.open(shards)


def test_an_index_that_the_files_contradict_is_refused(shards: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    rewrite_index(shards, {"weight_map": {"a": first, "b": SECOND, "c": SECOND}})
    with pytest.raises(tensord.CorruptError, match=f"(?s)c.*{SECOND}"):
        tensord.open(shards)
    rewrite_index(shards, {"weight_map": {"a": SECOND, "b": first}})
    with pytest.raises(tensord.CorruptError, match="model-0000"):
        tensord.open(shards)


def test_a_missing_shard_is_named_with_its_index(shards: Path) -> None:
    (shards / SECOND).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        tensord.open(shards)
    assert isinstance(caught.value, tensord.NotFoundError)
    assert str(shards / SECOND) in str(caught.value)
    assert "model.safetensors.index.json" in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"a": counted((2,)), "c": counted((2,))}, {"a": counted((3,))}])
    with pytest.raises(tensord.CorruptError, match=r"(?s)a.*model-0000"):
        tensord.open(folder)


# ---- what is no regular file -----------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


ODD_FILES = {
    "a FIFO": make_fifo,
    "a directory": make_folder,
    "a device": make_device_link,
    "a socket|No such device": make_socket,
}


@pytest.mark.parametrize("kind", ODD_FILES)
@pytest.mark.parametrize("place", ["file", "shard", "index"])
def test_what_is_no_regular_file_is_refused_and_nobody_waits(shards: Path, kind: str, place: str) -> None:
    opened = shards / "single.safetensors" if place == "file" else shards
    odd = {"file": opened, "shard": shards / SECOND, "index": shards / "model.safetensors.index.json"}[place]
    odd.unlink(missing_ok=True)
    ODD_FILES[kind](odd)
    with pytest.raises(tensord.Error) as caught:
        tensord.open(opened)
    assert str(odd) in str(caught.value)
    if (kind, place) == ("a directory", "file"):
        assert isinstance(caught.value, tensord.NotFoundError)  # a folder is looked into
    else:
        assert isinstance(caught.value, (tensord.InvalidArgumentError, tensord.UnavailableError))
        assert re.search(kind, str(caught.value))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem"])
def test_devices_are_refused(device: str) -> None:
    with pytest.raises((tensord.InvalidArgumentError, tensord.CorruptError), match=device):
        tensord.open(device)


def test_a_file_that_may_not_be_read_is_denied(
    daemon: Daemon, make_file: Callable[..., Path], tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = make_file({"w": counted((3,))})
    path.chmod(0)
    with pytest.raises(tensord.DeniedError, match=re.escape(str(path))):
        tensord.open(path)


# ---- files that change under a load ----------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def make_longer(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(safetensors_bytes({"w": np.full(5, 7, np.uint8)}))
    other.rename(path)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_short, "changed while it was read"),
        (empty, "became 0"),
        (make_longer, "changed while it was read"),
        (rewrite, "was written to"),
        (replace, "deleted or replaced"),
        (delete, "deleted or replaced"),
    ],
)
def test_a_file_that_changes_during_a_load_fails_it(
    daemon: Daemon,
    make_worker: Callable[..., Worker],
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    path = sparse_file(tmp_path / "long.safetensors")
    other = make_worker(daemon)
    with halfway(daemon, path, other) as model:
        change(path)
    with pytest.raises(tensord.ChangedError, match=message) as caught:
        model.wait()
    assert str(path) in str(caught.value)
    with pytest.raises(tensord.ChangedError, match=message):
        model["w"]
    with pytest.raises(tensord.ChangedError, match=message):
        model.load_into({"w": np.empty(model.entry("w").shape, np.uint8)})
    # Another process is told so too, and nobody dies of SIGBUS: what can be read of the memory is there.
    other.tell("m['w']")
    worked, error = other.hear()
    assert not worked and error.startswith("ChangedError") and message in error
    other.ask("m.close(); del m")
    model.close()
    del model
    if path.exists():
        assert_opens_as_it_is_now(path)


def test_a_copy_never_mixes_what_a_file_was_with_what_it_became(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path]
) -> None:
    shape = (128 << 20,)
    for _ in range(3):
        make_daemon()  # fresh: its memory takes time to be touched, so that the writing falls into the load
        path = make_file({"w": np.full(shape, 1, np.uint8)})
        target = np.zeros(shape, np.uint8)
        with tensord.open(path, "np") as model:
            with path.open("r+b") as file:
                file.seek(-shape[0] // 2, os.SEEK_END)
                file.write(b"\2" * (shape[0] // 2))
            try:
                model.load_into({"w": target})
            except tensord.ChangedError:
                continue
            assert (target == 1).all()


def assert_opens_as_it_is_now(path: Path) -> None:
    """A load that failed is no hindrance: the file is read anew."""
    try:
        with tensord.open(path, "np") as model:
            model.wait()
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                assert model["w"][-1:].tobytes() == file.read()
    except tensord.CorruptError as problem:
        assert str(path) in str(problem)


def test_a_file_replaced_during_a_load_opens_as_what_it_is(daemon: Daemon, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "long.safetensors")
    with halfway(daemon, path) as before:
        replace(path)
    with tensord.open(path, "np") as after:
        assert after["w"].tolist() == [7] * 5
        assert after.info()["replica"] != before.info()["replica"]
    with pytest.raises(tensord.ChangedError):
        before.wait()
    before.close()


def test_a_resident_model_outlives_its_file(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((300, 1000))})
    reader = make_worker(daemon)
    reader.ask(f"m = tensord.open({str(path)!r}, 'np'); m.wait()")
    with tensord.open(path, "np") as model:
        model.wait()
        os.truncate(path, 0)
        path.unlink()
        np.testing.assert_array_equal(model["w"], counted((300, 1000)))
    assert reader.ask("result = float(m['w'].sum())") == counted((300, 1000)).sum()
    reader.ask("m.close(); del m")


# ---- memory ----------------------------------------------------------------------------------------------


def test_a_refusal_names_what_holds_the_memory(
    make_daemon: Callable[..., Daemon], make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    daemon = make_daemon("--host-memory", "64MiB", "--memory-wait-seconds", "0")
    first = sparse_file(tmp_path / "first.safetensors", 20 << 20)
    second = sparse_file(tmp_path / "second.safetensors", 20 << 20)
    third = sparse_file(tmp_path / "third.safetensors", 40 << 20)
    other = make_worker(daemon)
    other.ask(f"m = tensord.open({str(first)!r}, 'np'); m.wait()")
    daemon.ask("load", str(second), "--wait", "--pin")
    with pytest.raises(tensord.ExhaustedError) as caught:
        tensord.open(third)
    said = str(caught.value)
    assert isinstance(caught.value, MemoryError)
    assert str(third) in said and str(first) in said and str(second) in said
    assert f"pid {other.pid}" in said and "pinned" in said and "64.00 MiB" in said
    assert [replica["path"] for replica in daemon.ask("ls")["replicas"]] == [str(first), str(second)]

    # It was refused before anything was evicted or read; with room it goes.
    other.ask("m.close(); del m")
    daemon.ask("unpin", str(second))
    until(lambda: not leases(daemon, first), "the lease ends")
    with tensord.open(third, "np") as model:
        model.wait()
    status = daemon.ask("status")
    assert status["memory"]["in_use"] + status["memory"]["kept"] <= 64 << 20


def test_what_never_fits_is_told_the_limit(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--host-memory", "64MiB")
    path = sparse_file(tmp_path / "huge.safetensors", 1 << 40)
    with pytest.warns(tensord.TensordWarning, match="larger than the daemon's host_memory"):
        model = tensord.open(path, "np")
    with pytest.raises(tensord.ExhaustedError, match=r"1\.00 TiB.*64\.00 MiB.*raise host_memory") as caught:
        model["w"]
    assert str(path) in str(caught.value)
    target = np.full(10, 7, np.uint8)
    with pytest.raises(tensord.ExhaustedError, match=r"1\.00 TiB.*64\.00 MiB.*raise host_memory"):
        model.load_into([("w", np.s_[:10], target)])
    assert (target == 7).all()
    assert daemon.ask("status")["memory"] == {"in_use": 0, "kept": 0}


def leases(daemon: Daemon, path: Path) -> list[int]:
    replicas = daemon.ask("ls")["replicas"]
    return [
        lease["pid"] for replica in replicas if replica["path"] == str(path) for lease in replica["leases"]
    ]


# ---- clients that die ------------------------------------------------------------------------------------


def test_a_killed_client_holds_nothing(
    daemon: Daemon, make_worker: Callable[..., Worker], make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((300, 1000))})
    before = daemon.ask("status")["memory"]["in_use"]
    client = make_worker(daemon)
    client.ask(f"m = tensord.open({str(path)!r}, 'np'); m.wait()")
    assert leases(daemon, path) == [client.pid]
    assert f"pid {client.pid}" in daemon.run("evict", str(path)).stderr
    client.kill()
    until(lambda: leases(daemon, path) == [], "its lease ends")
    daemon.ask("evict", str(path))
    assert daemon.ask("status")["memory"]["in_use"] == before


def test_a_client_killed_while_its_load_runs_holds_nothing(
    daemon: Daemon, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    path = sparse_file(tmp_path / "long.safetensors")
    before = daemon.ask("status")["memory"]["in_use"]
    client = make_worker(daemon)
    with halfway(daemon, path, client) as model:
        client.tell("m.wait()")
        client.kill()
        model.close()
        del model
    until(lambda: leases(daemon, path) == [], "the leases end")
    daemon.ask("evict", str(path))  # cancels the load where it still runs
    until(lambda: daemon.ask("status")["memory"]["in_use"] == before, "its memory is free")


def test_a_client_killed_while_it_copies_holds_nothing(
    daemon: Daemon, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    path = sparse_file(tmp_path / "long.safetensors")
    client = make_worker(daemon)
    with halfway(daemon, path, client) as model:
        client.tell("m.load_into({'w': np.empty(m.entry('w').shape, np.uint8)})")
        model.close()
        del model
    client.kill()
    until(lambda: leases(daemon, path) == [], "the leases end")


def test_a_killed_daemon_is_noticed_and_its_tensors_stay(
    make_daemon: Callable[..., Daemon], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = make_daemon("--read-threads", "1")
    ready = tensord.open(make_file({"w": counted((300, 1000))}), "np")
    array = ready["w"]
    path = sparse_file(tmp_path / "long.safetensors")
    said: list[BaseException] = []

    def wait(model: tensord.Model) -> None:
        try:
            model.wait()
        except tensord.Error as problem:
            said.append(problem)

    with halfway(daemon, path) as model:
        waiting = threading.Thread(target=wait, args=(model,))
        waiting.start()
        os.kill(daemon.pid, signal.SIGKILL)
        waiting.join(DEADLINE_SECONDS)
        assert not waiting.is_alive()
        assert isinstance(said[0], tensord.UnavailableError), said
        assert "daemon went away" in str(said[0])
        with pytest.raises(tensord.UnavailableError):
            model["w"]
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    daemon.start()
    np.testing.assert_array_equal(array, counted((300, 1000)))
    target = np.empty((300, 1000), np.float32)
    ready.load_into({"w": target})
    np.testing.assert_array_equal(target, counted((300, 1000)))
    with tensord.open(path, "np") as again:
        assert again.info()["state"] in ("filling", "ready")
