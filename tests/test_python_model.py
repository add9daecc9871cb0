"""A checkpoint opened from Python: names, tensors, life times, errors. Real daemon, real files."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import NUMPY_NAMES, REPOSITORY, Daemon, Raw, counted, safetensors_bytes

pytestmark = pytest.mark.usefixtures("daemon")


@pytest.fixture
def path(make_file: Callable[..., Path]) -> Path:
    tensors = {"a": counted((4, 6)), "b.weight": counted((5,), "int64"), "scalar": np.float32(7).reshape(())}
    return make_file(tensors, {"format": "pt", "who": "é"})


@pytest.fixture
def model(path: Path) -> Iterator[tensord.Model]:
    with tensord.open(path, "np") as opened:
        yield opened


def mapped_segments() -> int:
    """Mappings of the daemon's segments in this process."""
    return sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_names_metadata_and_files(model: tensord.Model, path: Path) -> None:
    assert model.keys() == ["a", "b.weight", "scalar"]
    assert list(model) == model.keys()
    assert len(model) == 3
    assert "a" in model
    assert "A" not in model
    assert 3 not in model
    assert "a\0" not in model
    assert "\ud800" not in model
    assert model.metadata == {"format": "pt", "who": "é"}
    assert model.files == [str(path)]
    assert str(path) in repr(model)


def test_keys_is_the_caller_s_own_list(model: tensord.Model) -> None:
    model.keys().clear()
    assert len(model.keys()) == 3


def test_arrays_are_zero_copy_and_read_only(model: tensord.Model) -> None:
    first, second = model["a"], model["a"]
    np.testing.assert_array_equal(first, counted((4, 6)))
    assert np.shares_memory(first, second)
    assert model["scalar"].shape == ()
    assert model["scalar"] == 7
    assert first.dtype == np.float32
    with pytest.raises(ValueError, match="WRITEABLE"):
        first.flags.writeable = True
    assert [(name, array.ndim) for name, array in model.items()] == [("a", 2), ("b.weight", 1), ("scalar", 0)]


def test_every_type_of_safetensors(make_file: Callable[..., Path]) -> None:
    names = ["F4", "F6_E2M3", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "BF16"]
    known = {name: counted((2, 4), numpy) for name, numpy in NUMPY_NAMES.items()}
    bits = {"F4": 4, "F6_E2M3": 6, "BF16": 16}
    odd = {name: Raw(name, (2, 4), bytes(range(bits.get(name, 8)))) for name in names}
    unknown = {"unknown": Raw("Q5_1", (3, 3), b"seven b")}
    path = make_file({**known, **odd, **unknown, "empty": np.zeros((0, 3), np.float16)})
    with tensord.open(path, "np") as model:
        for name, expected in known.items():
            np.testing.assert_array_equal(model[name], expected, strict=True)
        assert model["unknown"].tobytes() == b"seven b"
        assert model["empty"].shape == (0, 3)
        with pytest.raises(tensord.UnsupportedDtypeError, match="F4"):
            model["F4"]


def test_every_type_in_torch(make_file: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    from tensord.tensors import DTYPES

    tensors = {}
    for dtype in DTYPES[1:]:
        tensors[dtype.name] = Raw(dtype.name, (2, 8), bytes(range(2 * dtype.bits)))
    path = make_file({**tensors, "unknown": Raw("Q5_1", (3, 3), b"seven b")})
    with tensord.open(path, "pt") as model:
        for dtype in DTYPES[1:]:
            if dtype.torch_name is None:
                with pytest.raises(tensord.UnsupportedDtypeError, match=dtype.name):
                    model[dtype.name]
                continue
            tensor = model[dtype.name]
            assert tensor.dtype is getattr(torch, dtype.torch_name)
            assert tuple(tensor.shape) == ((2, 4) if dtype.name == "F4" else (2, 8))
            assert bytes(tensor.view(torch.uint8).flatten().tolist()) == tensors[dtype.name].data
        with pytest.raises(tensord.UnsupportedDtypeError, match="Q5_1"):
            model["unknown"]


def test_torch_tensor_may_be_written_to_and_nobody_else_sees_it(path: Path) -> None:
    torch = pytest.importorskip("torch")
    with tensord.open(path) as mine, tensord.open(path) as other:
        tensor = mine["a"]
        assert isinstance(tensor, torch.Tensor)
        tensor.fill_(-1)
        assert mine["a"].sum() == -24
        assert torch.equal(other["a"], torch.arange(24.0).reshape(4, 6))
    with tensord.open(path) as again:
        assert torch.equal(again["a"], torch.arange(24.0).reshape(4, 6))


def test_tensors_outlive_model_and_release_the_memory(path: Path) -> None:
    gc.collect()  # what earlier tests left in cycles does not count
    before = mapped_segments()
    model = tensord.open(path, "np")
    array = model["a"]
    part = array[1, ::2]
    model.close()
    model.close()
    del model, array
    gc.collect()
    assert mapped_segments() > before
    assert part.tolist() == [6, 8, 10]
    del part
    gc.collect()
    assert mapped_segments() == before


def test_a_lease_lasts_as_long_as_a_tensor(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"only": counted((3, 5))}, name="lease.safetensors")
    model = tensord.open(path, "np")
    array = model["only"]
    model.close()
    assert "leased" in daemon.run("evict", str(path)).stderr
    assert array[2, 4] == 14
    del array, model
    gc.collect()
    daemon.ask("evict", str(path))


def test_closed_model_says_so(path: Path) -> None:
    model = tensord.open(path, "np")
    view = model.view({"a": ...})
    model.close()
    for use in (
        lambda: model["a"],
        lambda: model.keys(),
        lambda: model.metadata,
        lambda: model.info(),
        lambda: model.wait(),
        lambda: model.load_into({}),
        lambda: view["a"],
        lambda: model.view({"a": 0}),
    ):
        with pytest.raises(tensord.InvalidArgumentError, match="closed"):
            use()
    assert "closed" in repr(model)


def test_unknown_tensor_is_a_key_error_with_a_hint(model: tensord.Model) -> None:
    for name in ("b.weigth", "", "a\0", "\ud800", 3):
        with pytest.raises(KeyError) as caught:
            model[name]  # type: ignore[index]
        assert isinstance(caught.value, tensord.NotFoundError)
        assert caught.value.code == "not_found"
    with pytest.raises(KeyError, match=r"b\.weight"):
        model["b.weigth"]


def test_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        tensord.open(missing)
    assert isinstance(caught.value, tensord.NotFoundError)
    assert (caught.value.errno, caught.value.filename) == (2, str(missing))
    assert str(missing) in str(caught.value)


def test_missing_shard_is_named(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"a": counted((2,))}, {"b": counted((2,))}])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        tensord.open(folder)


def test_bad_file_is_a_corrupt_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\xff" * 100)
    with pytest.raises(tensord.CorruptError, match=r"bad\.safetensors") as caught:
        tensord.open(bad)
    assert caught.value.code == "corrupt"


def test_arguments_that_make_no_sense(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for bad in ("", [], "a\0b", tmp_path / "empty", "/dev/null"):
        with pytest.raises((tensord.InvalidArgumentError, tensord.NotFoundError)):
            tensord.open(bad)
    with pytest.raises(ValueError, match="framework"):
        tensord.open(path, "fortran")
    with pytest.raises(NotImplementedError, match="jax"):
        tensord.open(path, "jax")


def test_folder_and_list_of_files(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"b": counted((3,)), "a": counted((2, 2))}, {"c": counted((4,), "uint8")}])
    files = sorted(folder.glob("*.safetensors"))
    for given in (folder, str(folder), files, [os.fsencode(file) for file in files], tuple(map(str, files))):
        with tensord.open(given, "np") as model:
            assert model.keys() == ["a", "b", "c"]
            assert model["c"].tolist() == [0, 1, 2, 3]
            assert len(model.files) == 2


def test_relative_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with tensord.open(path.name, "np") as model:
        assert model["b.weight"].tolist() == [0, 1, 2, 3, 4]


def test_wait_and_info(model: tensord.Model, path: Path) -> None:
    seen: list[tensord.Progress] = []
    model.wait(progress=seen.append)
    assert seen[-1].ready_bytes == seen[-1].total_bytes > 0
    model.wait(progress=True, timeout=60)
    info = model.info()
    assert info["state"] == "ready"
    assert info["path"] == str(path)
    assert info["tensor_count"] == 3
    assert info["payload_bytes"] == 4 * 24 + 8 * 5 + 4
    assert info["ready_bytes"] == info["total_bytes"]
    assert info["artifact"]


def test_bar_is_drawn_when_forced(
    model: tensord.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.wait(progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TENSORD_PROGRESS", "1")
    model.wait(progress=True)
    assert "100%" in capsys.readouterr().err


def test_waiting_ends_with_its_time_with_a_signal_and_with_the_daemon(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """The daemon is stopped in the middle of a load, then killed."""
    path = tmp_path / "large.safetensors"
    elements = 128 << 20
    header = safetensors_bytes({"w": Raw("F32", (elements,), b"")})
    header = header.replace(b"[0, 0]", f"[0, {4 * elements}]".encode())
    text = header[8:].rstrip()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 4 * elements)
    daemon = make_daemon()
    model = tensord.open(path, "np")
    closing = tensord.open(path, "np")
    os.kill(daemon.pid, signal.SIGSTOP)
    with pytest.raises(TimeoutError) as late:
        model.wait(timeout=0.01)
    assert isinstance(late.value, tensord.UnavailableError)

    ended: list[type[BaseException]] = []

    def wait_until_closed() -> None:
        try:
            closing.wait()
        except tensord.Error as error:
            ended.append(type(error))

    waiting = threading.Thread(target=wait_until_closed)
    waiting.start()
    closing.close()
    waiting.join()
    assert ended == [tensord.InvalidArgumentError]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for use in (
            model.wait,
            lambda: model["w"],
            lambda: model.load_into({"w": np.zeros(elements, np.float32)}),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(KeyboardInterrupt):
                use()
    finally:
        signal.signal(signal.SIGALRM, before)
    daemon.stop(signal.SIGKILL)
    for use in (
        model.wait,
        lambda: model["w"],
        lambda: model.load_into({"w": np.zeros(elements, np.float32)}),
    ):
        with pytest.raises(tensord.UnavailableError) as gone:
            use()
        assert not isinstance(gone.value, TimeoutError)


def test_verify_reports_what_was_checked(model: tensord.Model) -> None:
    report = model.verify()
    assert report["faults"] == []
    assert report["bytes"] == 4 * 24 + 8 * 5 + 4


def test_many_threads_use_one_model(model: tensord.Model) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                assert model["a"][3, 5] == 23
                target = np.zeros(3, np.float32)
                model.load_into([("a", np.s_[1, ::2], target)])
                assert target.tolist() == [6, 8, 10]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_forked_child_uses_inherited_tensors_and_the_model(model: tensord.Model) -> None:
    inherited = model["a"]

    def child() -> None:
        assert inherited.sum() == 276
        assert model["b.weight"].tolist() == [0, 1, 2, 3, 4]
        target = np.zeros((4, 6), np.float32)
        model.load_into({"a": target})
        np.testing.assert_array_equal(target, inherited)
        assert model.info()["state"] == "ready"
        assert model.verify()["faults"] == []
        model.close()
        assert inherited[3, 5] == 23

    assert run_in_fork(child) == 0
    assert inherited.sum() == 276
    assert model["a"].sum() == 276


def test_lease_of_a_dead_parent_goes_on_in_its_child(daemon: Daemon, make_file: Callable[..., Path]) -> None:
    path = make_file({"only": counted((7, 5))}, name="fork.safetensors")
    program = f"""
import os, sys, tensord
array = tensord.open({str(path)!r}, "np")["only"]
read, write = os.pipe()
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
assert array[6, 4] == 34
print("valid", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) != parent.pid
        assert parent.wait() == 0
        assert "leased" in daemon.run("evict", str(path)).stderr
        parent.stdin.close()
        assert parent.stdout.readline() == "valid\n"
        assert parent.stdout.read() == ""
    daemon.ask("evict", str(path))


def run_in_fork(work: Callable[[], Any]) -> int:
    """The exit status of a forked child that does `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_import_brings_neither_torch_nor_the_library() -> None:
    program = """
import sys, tensord
assert "torch" not in sys.modules
assert tensord.__version__
from tensord import _library
assert _library.library.cache_info().currsize == 0
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
        check=True,
    )


def test_package_library_and_program_have_one_version(daemon: Daemon) -> None:
    from tensord._library import library

    project = (REPOSITORY / "CMakeLists.txt").read_text()
    assert f"project(tensord VERSION {tensord.__version__} " in project
    assert library().tensord_version().decode() == tensord.__version__
    assert tensord.__version__ in daemon.run("version").stdout


def test_no_daemon_and_no_leave_to_start_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", str(tmp_path / "none"))
    with pytest.raises(ConnectionError) as caught:
        tensord.open(path, autostart=False)
    assert isinstance(caught.value, tensord.UnavailableError)


def test_arguments_of_other_types_are_refused_as_such(model: tensord.Model) -> None:
    for use in (
        lambda: tensord.open(3),  # type: ignore[arg-type]
        lambda: tensord.open([3]),  # type: ignore[list-item]
        lambda: model.load_into(3),  # type: ignore[arg-type]
        lambda: model.load_into(["float"]),  # type: ignore[list-item]
        lambda: model.view(["float"]),  # type: ignore[arg-type]
        lambda: model.wait(timeout="a"),  # type: ignore[arg-type]
        lambda: tensord.open(model.files, memory_wait="a"),  # type: ignore[arg-type]
        lambda: tensord.open(model.files, only=3),  # type: ignore[arg-type]
        lambda: model.view({"a": ...}).load_into(3),  # type: ignore[arg-type]
        lambda: model.load_into({}, threads="a"),  # type: ignore[arg-type]
    ):
        with pytest.raises(tensord.InvalidTypeError) as refused:
            use()
        assert isinstance(refused.value, TypeError) and isinstance(refused.value, tensord.Error)
    for use in (
        lambda: model.wait(timeout=float("nan")),
        lambda: tensord.open(model.files, memory_wait=float("nan")),
    ):
        with pytest.raises(tensord.InvalidArgumentError, match="nan is no time"):
            use()
    model.wait(timeout=float("inf"))
    tensord.open(model.files, memory_wait=float("inf")).close()


def test_one_file_named_twice_is_refused(
    daemon: Daemon, make_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_file({"w": counted((5,))})
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with pytest.raises(tensord.InvalidArgumentError, match=f"open {link}: it is the same file as {path}"):
        tensord.open([path, link])


def test_a_wanted_tensor_that_is_not_there_names_the_file(
    daemon: Daemon, make_file: Callable[..., Path]
) -> None:
    path = make_file({"w": counted((5,))})
    with pytest.raises(tensord.UnknownTensorError, match=f"open {path}: only: "):
        tensord.open(path, only=["v"])
