"""Slices into the caller's memory, and zero-copy views of them, against numpy."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import Raw, counted
from processes import until
from tensord.copies import interruptible

pytestmark = pytest.mark.usefixtures("daemon")

WEIGHTS = {
    "w": counted((8, 6)),
    "cube": counted((4, 5, 6), "int32"),
    "vector": counted((10,), "int16"),
    "scalar": np.float32(3).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
    "doubles": counted((3, 4), "float64"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, daemon: Any) -> Iterator[tensord.Model]:
    from conftest import safetensors_bytes

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(safetensors_bytes(WEIGHTS))
    with tensord.open(path, "np") as opened:
        yield opened


INDICES = [
    ("w", np.s_[...]),
    ("w", np.s_[3:6, ::-2]),
    ("w", np.s_[-1]),
    ("w", np.s_[:, 2]),
    ("w", np.s_[::-1, ::-1]),
    ("w", np.s_[2:2]),
    ("w", np.s_[100:]),
    ("w", np.s_[-100:100:3, None, 1:]),
    ("w", np.s_[3, 4]),
    ("cube", np.s_[1:3, ..., -2:]),
    ("cube", np.s_[..., 0]),
    ("cube", np.s_[None, :, 2, None, ::5]),
    ("vector", np.s_[7:1:-3]),
    ("vector", np.s_[np.int64(3) : np.uint8(9)]),
    ("scalar", np.s_[...]),
    ("scalar", np.s_[None]),
    ("empty", np.s_[...]),
    ("empty", np.s_[:, 1:]),
]


@pytest.mark.parametrize(("name", "index"), INDICES, ids=str)
def test_view_is_what_numpy_picks(model: tensord.Model, name: str, index: Any) -> None:
    view = model.view({name: index})
    expected = WEIGHTS[name][index]
    assert view.keys() == [name]
    np.testing.assert_array_equal(view[name], expected, strict=True)
    assert not view[name].flags.writeable
    if np.size(expected):
        assert np.shares_memory(view[name], model[name])


@pytest.mark.parametrize(("name", "index"), INDICES, ids=str)
def test_load_into_fills_what_numpy_picks(model: tensord.Model, name: str, index: Any) -> None:
    expected = np.asarray(WEIGHTS[name][index])
    dense = np.full(expected.shape, 99, expected.dtype)
    padded = np.full([extent * 2 + 1 for extent in expected.shape], 99, expected.dtype)
    strided = padded[(..., *(np.s_[1::2] for _ in expected.shape))]
    backward = np.full(expected.shape, 99, expected.dtype)[(..., *(np.s_[::-1] for _ in expected.shape))]
    transposed = np.full(expected.shape[::-1], 99, expected.dtype).T
    for target in (dense, strided, backward, transposed):
        report = model.load_into([(name, index, target)])
        np.testing.assert_array_equal(target, expected, strict=True)
        assert report.bytes == expected.nbytes
    assert np.count_nonzero(padded == 99) >= padded.size - expected.size


def test_random_views_are_what_numpy_picks(model: tensord.Model, seed: int) -> None:
    random = np.random.default_rng(seed)

    def item(extent: int) -> Any:
        low, high = -extent - 2, extent + 3
        choice = random.integers(6)
        if choice == 0:
            return int(random.integers(-extent, extent))
        ends = [None if random.random() < 0.3 else int(random.integers(low, high)) for _ in range(2)]
        step = [None, 1, 2, 3, -1, -2][random.integers(6)]
        return slice(*ends, step)

    for _ in range(300):
        name = ["w", "cube", "vector"][random.integers(3)]
        weight = WEIGHTS[name]
        parts = [item(extent) for extent in weight.shape[: random.integers(weight.ndim + 1)]]
        if random.random() < 0.3:
            parts.insert(int(random.integers(len(parts) + 1)), None)
        if random.random() < 0.3:
            parts.append(...)
        index = tuple(parts)
        expected = np.asarray(weight[index])
        np.testing.assert_array_equal(model.view({name: index})[name], expected, err_msg=f"{name} {index}")
        target = np.zeros(expected.shape, expected.dtype)
        model.load_into([(name, index, target)])
        np.testing.assert_array_equal(target, expected, err_msg=f"{name} {index}")


def test_one_plan_for_many_targets(model: tensord.Model) -> None:
    fused = np.zeros((16, 6), np.float32)
    twice = np.zeros((8, 6), np.float32)
    report = model.load_into(
        [("w", np.s_[:4], fused[:4]), ("w", np.s_[4:], fused[8:12]), ("w", ..., twice)], threads=2
    )
    np.testing.assert_array_equal(fused[:4], WEIGHTS["w"][:4])
    np.testing.assert_array_equal(fused[8:12], WEIGHTS["w"][4:])
    np.testing.assert_array_equal(fused[4:8], 0)
    np.testing.assert_array_equal(twice, WEIGHTS["w"])
    assert report.bytes == 2 * WEIGHTS["w"].nbytes
    assert report.records >= 2
    assert report.copy_seconds > 0
    assert report.bytes_per_second > 0


def test_view_loads_into_targets_by_name(model: tensord.Model) -> None:
    view = model.view({"w": np.s_[:, :3], "vector": np.s_[::2]})
    targets = {"w": np.zeros((8, 3), np.float32), "vector": np.zeros(5, np.int16)}
    view.load_into(targets)
    for name, array in view.items():
        np.testing.assert_array_equal(targets[name], array)
    assert len(view) == 2
    assert "w" in view
    with pytest.raises(KeyError):
        view["cube"]
    with pytest.raises(KeyError):
        view.load_into({"cube": targets["w"]})


def test_nothing_to_do(model: tensord.Model) -> None:
    assert model.load_into({}).bytes == 0
    assert model.load_into([]).bytes == 0


def test_casts_are_asked_for(model: tensord.Model) -> None:
    half = np.zeros((8, 6), np.float16)
    with pytest.raises(tensord.InvalidArgumentError, match="cast"):
        model.load_into({"w": half})
    model.load_into({"w": half}, cast=True)
    np.testing.assert_array_equal(half, WEIGHTS["w"].astype(np.float16))
    doubles = np.zeros((3, 2), np.float32)
    model.load_into([("doubles", np.s_[:, ::2], doubles)], cast=True)
    np.testing.assert_array_equal(doubles, WEIGHTS["doubles"][:, ::2])
    with pytest.raises(tensord.Error):
        model.load_into({"cube": np.zeros((4, 5, 6), np.float32)}, cast=True)


def expect_untouched(
    model: tensord.Model,
    kind: type[Exception],
    orders: list[tuple[str, Any, Any]],
    match: str | None = None,
) -> tensord.Error:
    """The first target stays as it is, whatever is wrong with the others."""
    first = np.full((8, 6), 99, np.float32)
    with pytest.raises(kind, match=match) as caught:
        model.load_into([("w", ..., first), *orders])
    assert isinstance(caught.value, tensord.Error)
    assert not caught.value.target_dirty
    assert (first == 99).all()
    return caught.value


def test_a_bad_order_leaves_all_targets_untouched(model: tensord.Model) -> None:
    line = np.zeros(6, np.float32)
    read_only = np.zeros(6, np.float32)
    read_only.flags.writeable = False
    overlap = np.zeros(8, np.float32)
    expect_untouched(model, KeyError, [("x", ..., line)])
    expect_untouched(model, IndexError, [("w", 8, line)], "out of range")
    expect_untouched(model, IndexError, [("w", -9, line)])
    expect_untouched(model, IndexError, [("w", (0, 0, 0), line)], "too many")
    expect_untouched(model, IndexError, [("w", (..., ...), line)])
    expect_untouched(model, IndexError, [("w", [0], line)])
    expect_untouched(model, ValueError, [("w", np.s_[::0], line)], "step")
    expect_untouched(model, ValueError, [("w", ..., line)], "shape")
    expect_untouched(model, ValueError, [("w", 0, line.astype(np.int32))])
    expect_untouched(model, ValueError, [("w", 0, read_only)], "read-only")
    expect_untouched(model, ValueError, [("w", 0, [1.0])], "list")
    expect_untouched(model, ValueError, [("w", 0)], "load_into takes")  # type: ignore[list-item]
    expect_untouched(model, ValueError, [("w", 0, overlap[:6]), ("w", 1, overlap[2:])])
    broadcast = np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), (8, 6), (0, 4))
    expect_untouched(model, ValueError, [("w", ..., broadcast)])


def test_wrong_shape_is_no_index_error(model: tensord.Model) -> None:
    with pytest.raises(ValueError, match="shape") as caught:
        model.load_into([("w", 0, np.zeros(5, np.float32))])
    assert not isinstance(caught.value, IndexError)


def test_view_refuses_what_numpy_refuses(model: tensord.Model) -> None:
    for index in (8, -9, (0, 0, 0), (..., ...), np.s_[::0], [0, 1], True, "w", 1.5):
        with pytest.raises(IndexError):
            model.view({"w": index})
    with pytest.raises(KeyError):
        model.view({"x": ...})


def test_a_thousand_targets(model: tensord.Model) -> None:
    targets = [np.zeros(6, np.float32) for _ in range(1000)]
    report = model.load_into([("w", at % 8, target) for at, target in enumerate(targets)])
    assert report.bytes == 24_000
    for at, target in enumerate(targets):
        assert target[0] == at % 8 * 6


# ---- torch -----------------------------------------------------------------------------------------------


def test_torch_targets(model: tensord.Model) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(WEIGHTS["w"].copy())
    dense = torch.zeros((8, 6))
    transposed = torch.zeros((6, 8)).t()
    padded = torch.zeros((8, 10))[:, 2:8]
    parameter = torch.nn.Parameter(torch.zeros((8, 6)))
    for target in (dense, transposed, padded, parameter):
        model.load_into({"w": target})
        assert torch.equal(target.detach(), expected)
    half = torch.zeros((8, 3), dtype=torch.bfloat16)
    model.load_into([("w", np.s_[:, ::2], half)], cast=True)
    assert torch.equal(half, expected[:, ::2].to(torch.bfloat16))
    with pytest.raises(tensord.UnsupportedError, match="meta"):
        model.load_into({"w": torch.zeros((8, 6), device="meta")})


def test_torch_view(make_file: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    with tensord.open(make_file(WEIGHTS), "pt") as model:
        view = model.view({"w": np.s_[1:, ::2], "vector": np.s_[::-1], "cube": np.s_[0]})
        weight = torch.from_numpy(WEIGHTS["w"].copy())
        assert torch.equal(view["w"], weight[1:, ::2])
        assert view["w"].stride() == (6, 2)
        assert view["w"].data_ptr() == model["w"].data_ptr() + 24
        assert view["vector"].tolist() == WEIGHTS["vector"][::-1].tolist()
        assert torch.equal(view["cube"], torch.from_numpy(WEIGHTS["cube"][0].copy()))


def test_packed_and_unknown_types(make_file: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    packed = bytes(range(8 * 4))
    path = make_file({"f4": Raw("F4", (8, 8), packed), "q": Raw("Q5", (3,), b"12345")})
    with tensord.open(path, "pt") as model:
        target = torch.zeros((8, 4), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        model.load_into({"f4": target})
        assert bytes(target.view(torch.uint8).flatten().tolist()) == packed
        part = torch.zeros((8, 2), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        model.load_into([("f4", np.s_[:, 4:], part)])
        rows = np.frombuffer(packed, np.uint8).reshape(8, 4)
        assert part.view(torch.uint8).tolist() == rows[:, 2:].tolist()
        view = model.view({"f4": ...})["f4"]
        assert tuple(view.shape) == (8, 4)
        assert model.view({"f4": np.s_[:, 4:]})["f4"].view(torch.uint8).tolist() == rows[:, 2:].tolist()
        with pytest.raises(IndexError, match="bytes"):
            model.view({"f4": np.s_[:, 1:]})
        with pytest.raises(ValueError, match="dense target"):
            model.load_into({"f4": torch.zeros((8, 4), dtype=torch.uint8)})
        raw = np.zeros(5, np.uint8)
        model.load_into({"q": raw})
        assert raw.tobytes() == b"12345"
        with pytest.raises(ValueError, match="dense target"):
            model.load_into({"q": np.zeros(6, np.uint8)})
        with pytest.raises(IndexError, match="whole"):
            model.view({"q": np.s_[1:]})


def test_a_refused_copy_lets_go_of_its_targets(model: tensord.Model) -> None:
    class Kept(np.ndarray):
        """An array that weak references can follow."""

    gc.disable()
    try:
        target = np.zeros((8, 6), np.int64).view(Kept)
        gone = weakref.ref(target)
        with pytest.raises(tensord.InvalidArgumentError):
            model.load_into({"w": target})
        del target
        assert gone() is None
    finally:
        gc.enable()


def test_a_refused_copy_names_file_and_tensor(model: tensord.Model) -> None:
    with pytest.raises(tensord.InvalidArgumentError, match=r"model\.safetensors: 'w' is F32, its target F64"):
        model.load_into({"w": np.zeros((8, 6))})


def test_less_than_no_thread_is_refused(model: tensord.Model) -> None:
    target = np.full((8, 6), 7, np.float32)
    with pytest.raises(tensord.InvalidArgumentError, match="thread_count is negative"):
        model.load_into({"w": target}, threads=-1)
    assert (target == 7).all()


def test_targets_that_overlap_are_named(model: tensord.Model) -> None:
    line = np.zeros(60, np.float32)
    columns = line.reshape(6, 10)[:, :4]  # interleaved rows: their extents meet, their bytes do not
    model.load_into([("w", np.s_[:6, :4], columns), ("w", np.s_[:6, :4], line.reshape(6, 10)[:, 4:8])])
    words = np.zeros(30, np.int32)
    halves = words.view(np.int16)
    model.load_into([("cube", np.s_[0, 0], words[:6]), ("vector", np.s_[:2], halves[12:14])])
    with pytest.raises(
        tensord.InvalidArgumentError, match=r"\('cube'\) and record \d \('vector'\) both write byte 16 of"
    ):
        model.load_into([("cube", np.s_[0, 0], words[:6]), ("vector", np.s_[:4], halves[8:12])])


def test_an_interrupt_is_raised_when_the_call_has_ended() -> None:
    cancel = ctypes.c_int32(0)
    begun, ended = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        until(lambda: cancel.value, "it is cancelled")
        time.sleep(0.2)  # copies under way
        ended.set()

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(call, cancel)
    assert ended.is_set()
