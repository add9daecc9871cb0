"""Element types, and numpy and torch tensors over memory that somebody else owns.

    tensor or array --base--> _Memory --> Mapping --> tensord_mapping --> the replica's pages

The chain is what keeps the pages mapped: they go when the last tensor over them goes, in every process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._library import library
from .errors import (
    InvalidArgumentError,
    InvalidOptionError,
    UnsupportedDtypeError,
    UnsupportedError,
)

# A torch.Tensor or a numpy.ndarray, as the model was opened: callers know which, type checkers cannot.
AnyTensor = Any

OPAQUE = 0
U8 = 5
F8_E5M2 = 7
F8_E4M3 = 8
F16 = 14
BF16 = 15
F32 = 18
F64 = 20


class Dtype(NamedTuple):
    """One element type. ``numpy_name`` and ``torch_name`` are None where that framework has no such type."""

    number: int  # tensord_dtype
    name: str  # as safetensors writes it
    bits: int
    numpy_name: str | None  # a name of ml_dtypes' where numpy itself has none
    torch_name: str | None

    @property
    def is_packed(self) -> bool:
        """Whether several elements share a byte."""
        return 0 < self.bits < 8


DTYPES = (
    Dtype(0, "?", 0, None, None),
    Dtype(1, "BOOL", 8, "bool", "bool"),
    Dtype(2, "F4", 4, None, "float4_e2m1fn_x2"),
    Dtype(3, "F6_E2M3", 6, None, None),
    Dtype(4, "F6_E3M2", 6, None, None),
    Dtype(5, "U8", 8, "uint8", "uint8"),
    Dtype(6, "I8", 8, "int8", "int8"),
    Dtype(7, "F8_E5M2", 8, "float8_e5m2", "float8_e5m2"),
    Dtype(8, "F8_E4M3", 8, "float8_e4m3fn", "float8_e4m3fn"),
    Dtype(9, "F8_E8M0", 8, "float8_e8m0fnu", "float8_e8m0fnu"),
    Dtype(10, "F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float8_e4m3fnuz"),
    Dtype(11, "F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float8_e5m2fnuz"),
    Dtype(12, "I16", 16, "int16", "int16"),
    Dtype(13, "U16", 16, "uint16", "uint16"),
    Dtype(14, "F16", 16, "float16", "float16"),
    Dtype(15, "BF16", 16, "bfloat16", "bfloat16"),
    Dtype(16, "I32", 32, "int32", "int32"),
    Dtype(17, "U32", 32, "uint32", "uint32"),
    Dtype(18, "F32", 32, "float32", "float32"),
    Dtype(19, "C64", 64, "complex64", "complex64"),
    Dtype(20, "F64", 64, "float64", "float64"),
    Dtype(21, "I64", 64, "int64", "int64"),
    Dtype(22, "U64", 64, "uint64", "uint64"),
)

# By bytes of an element: the integer that carries it where numpy or torch.from_numpy lack the type.
_CARRIERS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}


class Mapping:
    """One reference to a model's pages, given back with the object (after fork, by each process)."""

    __slots__ = ("_pointer", "_release")

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer
        self._release = library().tensord_release_mapping

    def __del__(self) -> None:
        self._release(self._pointer)


class _Memory:
    """What numpy reads to build an array over foreign memory, and keeps as the array's base."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


class Entry(NamedTuple):
    """What the index says of one tensor."""

    name: str
    encoded: bytes  # name, for the library
    number: int  # tensord_dtype
    dtype_text: str
    shape: tuple[int, ...]  # elements, as the file says
    file: int
    file_offset: int
    size_bytes: int
    address: int

    @property
    def is_bytes(self) -> bool:
        """Whether the library sees bytes rather than elements: packed and unknown types."""
        return self.number == OPAQUE or DTYPES[self.number].is_packed

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """`shape` as frameworks count: packed types in bytes along the last dimension, unknown ones flat.

        Raises
        ------
        UnsupportedDtypeError
            The rows of a packed type end within a byte.
        """
        if self.number == OPAQUE:
            return (self.size_bytes,)
        dtype = DTYPES[self.number]
        if not dtype.is_packed:
            return self.shape
        if not self.shape or self.shape[-1] * dtype.bits % 8:
            raise UnsupportedDtypeError(
                f"tensor {self.name!r}: rows of {self.dtype_text} and shape {list(self.shape)} "
                "do not end on whole bytes"
            )
        return (*self.shape[:-1], self.shape[-1] * dtype.bits // 8)


class Place(NamedTuple):
    """Where a (slice of a) tensor lies in memory."""

    owner: object  # keeps the memory
    address: int  # of element (0, 0, ..)
    shape: tuple[int, ...]  # elements; of packed types, bytes in the last dimension
    strides: tuple[int, ...] | None  # bytes; None: row-major

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    @property
    def runs_backward(self) -> bool:
        return self.strides is not None and min(self.strides, default=0) < 0


def _array(place: Place, typestr: str, *, writable: bool) -> np.ndarray:
    if place.is_empty:
        empty = np.empty(place.shape, typestr)
        empty.flags.writeable = writable
        return empty
    interface = {
        "version": 3,
        "typestr": typestr,
        "shape": place.shape,
        "strides": place.strides,
        "data": (place.address, not writable),
    }
    return np.asarray(_Memory(interface, place.owner))


# ---- numpy ---------------------------------------------------------------------------------------


@functools.cache
def _numpy_type(number: int) -> np.dtype | None:
    """numpy's type, from ml_dtypes where that package is installed; None where there is none."""
    name = DTYPES[number].numpy_name
    if name is None:
        return None
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        found: np.dtype = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        return found
    except (ImportError, AttributeError):
        return None


def numpy_array(
    place: Place, number: int, *, name: str, dtype_text: str, writable: bool = False
) -> np.ndarray:
    """A zero-copy array.

    Parameters
    ----------
    place : Place
    number : int
        tensord_dtype. A type safetensors does not know (0) gives the tensor's bytes, as uint8 of shape
        [size_bytes].
    name, dtype_text : str
        Of the tensor, for messages.
    writable : bool
        False: the array is read-only for good. True: writes change this process's copy.

    Raises
    ------
    UnsupportedDtypeError
        numpy has no such type: F4, F6, and without the package ml_dtypes also BF16 and F8.
    """
    if number == OPAQUE:
        return _array(place, "|u1", writable=writable)
    dtype = _numpy_type(number)
    if dtype is None:
        more = "" if DTYPES[number].numpy_name is None else "install ml_dtypes, or "
        raise UnsupportedDtypeError(
            f"tensor {name!r}: numpy has no type for {dtype_text}; {more}use framework='pt'"
        )
    if dtype.isbuiltin != 1:  # ml_dtypes
        return _array(place, _CARRIERS[dtype.itemsize], writable=writable).view(dtype)
    return _array(place, dtype.str, writable=writable)


# ---- torch ---------------------------------------------------------------------------------------


@functools.cache
def torch_module() -> Any:
    """The package torch, imported at the first need.

    Raises
    ------
    UnsupportedError
        It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UnsupportedError(
            f"torch tensors were asked for, but torch cannot be imported ({error}); "
            "install it, or use framework='np'"
        ) from error


@functools.cache
def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


@functools.cache
def torch_type(number: int) -> Any:
    name = DTYPES[number].torch_name
    return None if name is None else getattr(torch_module(), name, None)


def torch_dtype(number: int, *, name: str, dtype_text: str) -> Any:
    """torch's type of a tensor's elements.

    Raises
    ------
    UnsupportedDtypeError
        torch (this version of it) has no such type: F6, types safetensors does not know, F4 before 2.8.
    """
    dtype = None if number == OPAQUE else torch_type(number)
    if dtype is None:
        raise UnsupportedDtypeError(
            f"tensor {name!r}: torch {torch_module().__version__} has no type for {dtype_text}"
        )
    return dtype


def torch_tensor(place: Place, number: int, *, name: str, dtype_text: str) -> AnyTensor:
    """A CPU tensor, zero-copy and writable: writes change this process's copy only.

    torch has no negative strides: a place that runs backward is copied. Errors as `torch_dtype`.
    """
    torch = torch_module()
    dtype = torch_dtype(number, name=name, dtype_text=dtype_text)
    carrier = _CARRIERS[max(DTYPES[number].bits // 8, 1)]
    array = _array(place, carrier, writable=True)
    if place.runs_backward:
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype is dtype else tensor.view(dtype)


# ---- GPU memory ------------------------------------------------------------------------------------


class DeviceArray:
    """A tensor in GPU memory, for whatever takes the CUDA Array Interface: CuPy, Numba, JAX, torch.as_tensor.

    It is not marked as read-only, which torch does not take, but writes are refused by the hardware.
    """

    __slots__ = ("__cuda_array_interface__", "_owner")

    def __init__(self, place: Place, typestr: str) -> None:
        self._owner = place.owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": typestr,
            "shape": place.shape,
            "strides": place.strides,
            "data": (0 if place.is_empty else place.address, False),
        }


def device_tensor(
    place: Place, number: int, device: str, framework: str, *, name: str, dtype_text: str
) -> AnyTensor:
    """Zero-copy, of torch; or a `DeviceArray`, whose elements are integers where numpy has no such type.

    Raises
    ------
    UnsupportedError
        A place that runs backward: torch has no negative strides.
    UnsupportedDtypeError
        As `torch_dtype`.
    """
    carrier = _CARRIERS[max(DTYPES[number].bits // 8, 1)]
    if framework == "np":
        known = _numpy_type(number)
        return DeviceArray(place, known.str if known is not None and known.isbuiltin == 1 else carrier)
    torch = torch_module()
    dtype = torch_dtype(number, name=name, dtype_text=dtype_text)
    if place.is_empty:
        return torch.empty(place.shape, dtype=dtype, device=device if device.startswith("cuda") else "cuda")
    if place.runs_backward:
        raise UnsupportedError(
            f"tensor {name!r}: torch has no negative strides, and GPU memory is not copied"
        )
    torch.cuda.init()
    tensor = torch.as_tensor(DeviceArray(place, carrier))
    return tensor if tensor.dtype is dtype else tensor.view(dtype)


# ---- targets -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """The caller's memory: a tensor or array that may be written to."""

    address: int
    number: int  # tensord_dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    on_device: bool = False  # in the memory of a GPU or the like


@functools.cache
def _numbers_of_numpy() -> dict[np.dtype, int]:
    types = ((_numpy_type(dtype.number), dtype.number) for dtype in DTYPES)
    return {known: number for known, number in types if known is not None}


@functools.cache
def numbers_of_torch() -> dict[Any, int]:
    """tensord_dtype of torch's types."""
    types = ((torch_type(dtype.number), dtype.number) for dtype in DTYPES)
    return {known: number for known, number in types if known is not None}


def target_of(name: str, tensor: Any) -> Target:
    """Describes a target of a copy.

    Raises
    ------
    InvalidArgumentError
        It is no array or tensor, is read-only, is sparse, or has elements tensord does not know.
    UnsupportedError
        It is on device meta.
    """
    if isinstance(tensor, np.ndarray):
        return _numpy_target(name, tensor)
    if hasattr(tensor, "data_ptr") and hasattr(tensor, "layout"):
        return _torch_target(name, tensor)
    if hasattr(tensor, "__cuda_array_interface__"):
        return _cuda_target(name, tensor.__cuda_array_interface__)
    raise InvalidArgumentError(
        f"target of {name!r}: a numpy array, a torch tensor or a CUDA array is needed, "
        f"not {type(tensor).__name__}"
    )


def _numpy_target(name: str, array: np.ndarray) -> Target:
    number = _numbers_of_numpy().get(array.dtype)
    if number is None:
        raise InvalidArgumentError(f"target of {name!r}: tensord has no type for numpy's {array.dtype!r}")
    if not array.flags.writeable:
        raise InvalidArgumentError(f"target of {name!r}: the array is read-only")
    return Target(array.__array_interface__["data"][0], number, array.shape, array.strides)


def _cuda_target(name: str, interface: Any) -> Target:
    """Of CuPy and others (the CUDA Array Interface)."""
    dtype = np.dtype(interface["typestr"])
    number = _numbers_of_numpy().get(dtype)
    if number is None:
        raise InvalidArgumentError(f"target of {name!r}: tensord has no type for {dtype!r}")
    address, read_only = interface["data"]
    if read_only:
        raise InvalidArgumentError(f"target of {name!r}: the array is read-only")
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or row_major_strides(shape, dtype.itemsize)
    return Target(address, number, shape, tuple(strides), on_device=True)


def _torch_target(name: str, tensor: Any) -> Target:
    torch = torch_module()
    number = numbers_of_torch().get(tensor.dtype)
    if number is None:
        raise InvalidArgumentError(f"target of {name!r}: tensord has no type for {tensor.dtype}")
    if tensor.device.type == "meta":
        raise UnsupportedError(f"target of {name!r}: it is on device meta, which has no memory")
    if tensor.layout is not torch.strided:
        raise InvalidArgumentError(
            f"target of {name!r}: its layout is {tensor.layout}; a dense one is needed"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise InvalidArgumentError(
            f"target of {name!r}: it is a lazy conjugate or negative; call resolve_conj() or resolve_neg()"
        )
    size = tensor.element_size()
    strides = tuple([stride * size for stride in tensor.stride()])
    return Target(tensor.data_ptr(), number, tuple(tensor.shape), strides, tensor.device.type != "cpu")


# ---- frameworks ----------------------------------------------------------------------------------

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}
_OTHER_FRAMEWORKS = ("tf", "tensorflow", "jax", "flax", "mlx", "paddle")


def framework_of(name: str | None) -> str:
    """``"pt"`` or ``"np"``, from any of safetensors' names; None: torch where it is installed, else numpy.

    Raises
    ------
    UnsupportedError
        One of safetensors' other frameworks, or torch where it is not installed.
    InvalidOptionError
        Any other name.
    """
    if name is None:
        return "pt" if has_torch() else "np"
    if name in _OTHER_FRAMEWORKS:
        raise UnsupportedError(f"framework {name} is not offered; use 'pt' or 'np'")
    if name not in _FRAMEWORKS:
        raise InvalidOptionError(f"framework {name} is invalid")
    return _FRAMEWORKS[name]


def row_major_strides(shape: Sequence[int], element_bytes: int) -> tuple[int, ...]:
    """Strides in bytes of a dense tensor of ``shape``."""
    strides = []
    stride = element_bytes
    for extent in reversed(shape):
        strides.append(stride)
        stride *= max(extent, 1)
    return tuple(reversed(strides))
