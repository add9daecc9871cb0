"""numpy arrays and torch tensors over memory that somebody else owns. No daemon is needed."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensord import InvalidArgumentError, UnsupportedDtypeError
from tensord.tensors import (
    DTYPES,
    Entry,
    Place,
    framework_of,
    numpy_array,
    row_major_strides,
    target_of,
    torch_tensor,
)

HEADER = Path(__file__).resolve().parents[1] / "include" / "tensord" / "tensord.h"
NUMBER = {dtype.name: dtype.number for dtype in DTYPES}


class Owner:
    """Bytes 0, 1, 2, ... in memory of their own."""

    def __init__(self, size: int = 256) -> None:
        self.memory = ctypes.create_string_buffer(bytes(range(size)), size)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.memory)


def array_of(place: Place, dtype: str = "F32", **options: Any) -> np.ndarray:
    return numpy_array(place, NUMBER[dtype], name="w", dtype_text=dtype, **options)


def tensor_of(place: Place, dtype: str = "F32") -> Any:
    return torch_tensor(place, NUMBER[dtype], name="w", dtype_text=dtype)


def test_types_are_those_of_the_header() -> None:
    text = HEADER.read_text().split("typedef enum tensord_dtype")[1].split("}")[0]
    in_header = {name: int(number) for name, number in re.findall(r"TENSORD_(\w+) = (\d+)", text)}
    assert [dtype.number for dtype in DTYPES] == list(range(len(in_header)))
    assert {dtype.name for dtype in DTYPES[1:]} == set(in_header) - {"OPAQUE"}
    assert all(in_header[dtype.name] == dtype.number for dtype in DTYPES[1:])


def test_array_is_read_only_for_good_and_keeps_its_owner() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    array = array_of(Place(owner, owner.address, (2, 3), None), "U8")
    del owner
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 9
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    with pytest.raises(ValueError, match="WRITEABLE"):
        array[1:].flags.writeable = True
    part = array[1, 1:].view()
    del array
    gc.collect()
    assert gone() is not None
    assert part.tolist() == [4, 5]
    del part
    gc.collect()
    assert gone() is None


def test_writable_array_writes_to_the_memory() -> None:
    owner = Owner()
    array = array_of(Place(owner, owner.address, (4,), None), "U8", writable=True)
    array[0] = 77
    assert owner.memory.raw[0] == 77


def test_strides_may_be_negative_in_numpy() -> None:
    owner = Owner()
    place = Place(owner, owner.address + 8, (2, 2), (-4, -2))
    expected = np.frombuffer(owner.memory, "<u2", 5)[[[4, 3], [2, 1]]]
    np.testing.assert_array_equal(array_of(place, "U16"), expected)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype.numpy_name], ids=lambda dtype: dtype.name
)
def test_every_type_numpy_has_is_read_as_itself(dtype: Any) -> None:
    owner = Owner()
    place = Place(owner, owner.address, (3,), None)
    extension = importlib.util.find_spec("ml_dtypes") and importlib.import_module("ml_dtypes")
    expected = getattr(extension, dtype.numpy_name, None) or getattr(np, dtype.numpy_name, None)
    if expected is None:
        with pytest.raises(UnsupportedDtypeError, match="install ml_dtypes"):
            array_of(place, dtype.name)
        return
    array = array_of(place, dtype.name)
    assert array.dtype == expected
    assert array.tobytes() == owner.memory.raw[: 3 * dtype.bits // 8]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_types_are_no_numpy_types(dtype: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match=dtype) as caught:
        array_of(Place(None, 0, (0,), None), dtype)
    assert isinstance(caught.value, TypeError)


def test_unknown_types_are_bytes_in_numpy() -> None:
    owner = Owner()
    array = numpy_array(Place(owner, owner.address, (3,), None), 0, name="w", dtype_text="Q5")
    assert array.dtype == np.uint8
    assert array.tolist() == [0, 1, 2]


def test_empty_and_scalar_tensors() -> None:
    owner = Owner()
    for make in (array_of, tensor_of) if framework_of(None) == "pt" else (array_of,):
        assert tuple(make(Place(None, 0, (2, 0, 3), None)).shape) == (2, 0, 3)
        assert tuple(make(Place(owner, owner.address, (), None)).shape) == ()


def test_shape_of_packed_and_unknown_types_counts_bytes() -> None:
    def entry(number: int, shape: tuple[int, ...], size_bytes: int) -> Entry:
        return Entry("w", b"w", number, "T", shape, 0, 0, size_bytes, 0)

    assert entry(NUMBER["F4"], (2, 6), 6).memory_shape == (2, 3)
    assert entry(NUMBER["F6_E2M3"], (2, 4), 6).memory_shape == (2, 3)
    assert entry(0, (2, 6), 7).memory_shape == (7,)
    assert entry(NUMBER["F32"], (), 4).memory_shape == ()
    with pytest.raises(UnsupportedDtypeError, match="whole bytes"):
        _ = entry(NUMBER["F4"], (2, 3), 3).memory_shape


def test_row_major_strides() -> None:
    assert row_major_strides((2, 3, 4), 2) == (24, 8, 2)
    assert row_major_strides((), 4) == ()
    assert row_major_strides((0, 3), 4) == (12, 4)


@pytest.mark.parametrize(
    ("name", "framework"), [("pt", "pt"), ("torch", "pt"), ("pytorch", "pt"), ("np", "np"), ("numpy", "np")]
)
def test_frameworks_have_safetensors_names(name: str, framework: str) -> None:
    assert framework_of(name) == framework


# ---- torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype.torch_name], ids=lambda dtype: dtype.name
)
def test_every_type_torch_has_is_read_as_itself(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    owner = Owner()
    tensor = tensor_of(Place(owner, owner.address, (3,), None), dtype.name)
    assert tensor.dtype is getattr(torch, dtype.torch_name)
    assert tensor.data_ptr() == owner.address
    size = 3 * tensor.element_size()
    assert bytes(tensor.view(torch.uint8).tolist()) == owner.memory.raw[:size]


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_types_torch_has_not_are_named(dtype: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UnsupportedDtypeError, match=dtype):
        tensor_of(Place(None, 0, (0,), None), dtype)
    with pytest.raises(UnsupportedDtypeError, match="Q5"):
        torch_tensor(Place(None, 0, (0,), None), 0, name="w", dtype_text="Q5")


def test_tensor_is_writable_and_keeps_its_owner() -> None:
    pytest.importorskip("torch")
    owner = Owner()
    gone = weakref.ref(owner)
    tensor = tensor_of(Place(owner, owner.address, (2, 2), None), "BF16")
    tensor[0, 0] = 1.0
    assert owner.memory.raw[:2] == b"\x80\x3f"
    part = tensor[1:]
    del owner, tensor
    gc.collect()
    assert gone() is not None
    del part
    gc.collect()
    assert gone() is None


def test_tensor_that_runs_backward_is_a_copy() -> None:
    pytest.importorskip("torch")
    owner = Owner()
    tensor = tensor_of(Place(owner, owner.address + 3, (4,), (-1,)), "U8")
    assert tensor.tolist() == [3, 2, 1, 0]
    tensor[0] = 9
    assert owner.memory.raw[3] == 3


def test_tensor_at_an_odd_address() -> None:
    torch = pytest.importorskip("torch")
    owner = Owner()
    tensor = tensor_of(Place(owner, owner.address + 1, (4,), None), "F32")
    expected = torch.frombuffer(bytearray(owner.memory.raw[1:17]), dtype=torch.float32)
    assert torch.equal(tensor, expected)


# ---- targets ---------------------------------------------------------------------------------------------


def test_target_of_an_array() -> None:
    array = np.zeros((4, 6), np.float32)[::-1, ::2]
    target = target_of("w", array)
    assert target == (array.ctypes.data, NUMBER["F32"], (4, 3), (-24, 8), False)


def test_target_of_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((4, 6), dtype=torch.bfloat16).t()[1:]
    target = target_of("w", tensor)
    assert target == (tensor.data_ptr(), NUMBER["BF16"], (5, 4), (2, 12), False)


def test_targets_that_are_none() -> None:
    read_only = np.zeros(3, np.float32)
    read_only.flags.writeable = False
    for target, why in [
        (read_only, "read-only"),
        (np.zeros(3, ">f4"), "no type"),
        (np.zeros(3, object), "no type"),
        ([1.0], "list"),
        (3.0, "float"),
    ]:
        with pytest.raises(InvalidArgumentError, match=why):
            target_of("w", target)


def test_tensors_that_are_no_targets() -> None:
    torch = pytest.importorskip("torch")
    from tensord import UnsupportedError

    with pytest.raises(UnsupportedError, match="meta"):
        target_of("w", torch.zeros(3, device="meta"))
    with pytest.raises(InvalidArgumentError, match="layout"):
        target_of("w", torch.zeros((2, 2)).to_sparse())
    with pytest.raises(InvalidArgumentError, match="conjugate"):
        target_of("w", torch.zeros(3, dtype=torch.complex64).conj())
    with pytest.raises(InvalidArgumentError, match="no type"):
        target_of("w", torch.zeros(3, dtype=torch.complex128))
