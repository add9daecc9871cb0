"""LazyTensor: a tensor without bytes that knows at any moment which part of a checkpoint's tensor it is.

    file        w  BF16 [8, 6]
    w.narrow(0, 4, 4).t()          geometry: shape (6, 4), stride (1, 6), offset 24     no byte was read
    parameter.copy_(...)           a record:  w @ 24, strides (1, 6)  ->  parameter     no byte was read
    w * 2                          the bytes of w, once they are there, and torch's own result

Views are computed on shapes alone: the usual ones right here, all others by torch on a tensor of device meta
whose storage stands for the checkpoint's tensor. There is no list of operations that work: what is neither a
view nor a copy is given the real tensor and goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..tensors import Entry
    from .recorder import Recorder

aten = torch.ops.aten
COPY = aten.copy_.default
_make = torch.Tensor._make_wrapper_subclass

# What an operation does to a lazy argument.
VIEW, CLONE, RESHAPE_IN_PLACE, WRITE, READ = range(5)

# shape, strides and offset in elements
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


class Source:
    """One tensor of the checkpoint as a loader sees it: all views of it share this.

    ``written`` is set when somebody wrote into it: from then on ``private``, a copy, is what counts, and no
    record can be made of it. A clone is a Source of its own; ``root`` is where its elements lie in the
    checkpoint, with the geometry it has itself.
    """

    private: torch.Tensor | None = None
    written = False
    root: tuple[Geometry, Geometry, torch.dtype] | None = None

    def __init__(self, recorder: Recorder, name: str, entry: Entry) -> None:
        self.recorder = recorder
        self.name = name  # as the loader knows it
        self.entry = entry

    def clone(self, inner: Geometry, geometry: Geometry, dtype: torch.dtype) -> Source:
        copy = Source(self.recorder, self.name, self.entry)
        copy.root = (inner, geometry, dtype)
        return copy

    def base(self, *, write: bool) -> torch.Tensor:
        """The real tensor that geometries count in. ``write``: a private one."""
        if self.private is None:
            base: torch.Tensor = self.recorder.read(self.entry)
            if self.root is None:
                if not write:
                    return base
                self.private = base.clone()
            else:
                inner, (shape, stride, offset), dtype = self.root
                room = torch.empty(span_of(shape, stride) + offset, dtype=dtype, device=base.device)
                room.as_strided(shape, stride, offset).copy_(part_of(base, inner, dtype))
                self.private = room
        self.written |= write
        return self.private


class LazyTensor(torch.Tensor):
    """Made by `lazy_tensor`. Behaves as a tensor of the recorder's device, without gradients."""

    _state: tuple[Source, Geometry, torch.dtype]  # what torch knows too, where Python reads it faster
    # Of what came out of clone() or contiguous(): where the same elements lie in the checkpoint's tensor.
    _inner: Geometry | None = None

    # SGLang copies in threads of its own unless a tensor says that it is read by a streamer.
    _sglang_runai_streamer_tensor = True

    # .shape, .dtype and the like stay in C++.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is COPY:
            source = args[1]
            if type(source) is LazyTensor and type(args[0]) is not LazyTensor:
                return source._source.recorder.copy(args[0], source)
        return apply(func, args, kwargs or {})

    @property
    def _source(self) -> Source:
        return self._state[0]

    @property
    def _geometry(self) -> Geometry:
        return self._state[1]

    # The views that loaders take most, without going through torch's dispatcher.

    def narrow(self, dim: Any, start: Any, length: Any) -> Any:
        source, (shape, stride, offset), dtype = self._state
        if (
            type(start) is int
            and type(length) is int
            and type(dim) is int
            and 0 <= dim < len(shape)
            and start >= 0
            and length >= 0
            and start + length <= shape[dim]
            and self._inner is None
        ):
            extents = list(shape)
            extents[dim] = length
            return lazy_tensor(source, (tuple(extents), stride, offset + start * stride[dim]), dtype)
        return super().narrow(dim, start, length)

    def unsqueeze(self, dim: int) -> Any:
        if dim == 0 and self._inner is None:
            source, (shape, stride, offset), dtype = self._state
            outer = shape[0] * stride[0] if shape else 1
            return lazy_tensor(source, ((1, *shape), (outer, *stride), offset), dtype)
        return super().unsqueeze(dim)

    def unbind(self, dim: int = 0) -> Any:
        source, (shape, stride, offset), dtype = self._state
        if dim == 0 and shape and self._inner is None:
            rest, steps, step = shape[1:], stride[1:], stride[0]
            return tuple(
                [lazy_tensor(source, (rest, steps, offset + at * step), dtype) for at in range(shape[0])]
            )
        return super().unbind(dim)

    def t(self) -> Any:
        source, (shape, stride, offset), dtype = self._state
        if len(shape) == 2 and self._inner is None:
            return lazy_tensor(source, (shape[::-1], stride[::-1], offset), dtype)
        return super().t()

    def __getitem__(self, index: Any) -> Any:
        if self._inner is None:
            source, geometry, dtype = self._state
            indexed = _indexed(geometry, index)
            if indexed is not None:
                return lazy_tensor(source, indexed, dtype)
        return super().__getitem__(index)

    # What reaches for the bytes past the dispatcher.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self._private("numpy").numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return real(self, "tolist").tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._private("__array__").numpy().__array__(*args, **kwargs)

    def data_ptr(self) -> int:
        return self._private("data_ptr").data_ptr()

    def untyped_storage(self) -> Any:
        return self._private("untyped_storage").untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._private("pickle").__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Any:
        copy = real(self, "deepcopy").clone()
        memo[id(self)] = copy
        return copy

    def _private(self, why: str) -> torch.Tensor:
        """Bytes whose further fate nobody sees."""
        return real(self, why, write=True)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<lazy {self._source.name!r} {self.dtype} {list(self._geometry[0])}>"


def lazy_tensor(source: Source, geometry: Geometry, dtype: torch.dtype) -> LazyTensor:
    made: LazyTensor = _make(
        LazyTensor,
        geometry[0],
        strides=geometry[1],
        storage_offset=geometry[2],
        dtype=dtype,
        device=source.recorder.device,
    )
    made._state = (source, geometry, dtype)
    return made


def _indexed(geometry: Geometry, index: Any) -> Geometry | None:
    """What basic indexing with whole numbers and slices picks; None for what torch shall look at."""
    if type(index) is not tuple:
        index = (index,)
    shape, stride, offset = geometry
    if len(index) > len(shape):
        return None
    extents, steps = [], []
    for at, part in enumerate(index):
        extent, step = shape[at], stride[at]
        if type(part) is slice:
            bounds = (part.start, part.stop, part.step)
            if any(bound is not None and type(bound) is not int for bound in bounds):
                return None
            if part.step is not None and part.step <= 0:
                return None
            start, stop, by = part.indices(extent)
            extents.append(max((stop - start + by - 1) // by, 0))
            steps.append(step * by)
            offset += min(start, extent) * step if extents[-1] else 0
        elif type(part) is int and -extent <= part < extent:
            offset += (part + extent if part < 0 else part) * step
        else:
            return None
    extents += shape[len(index) :]
    steps += stride[len(index) :]
    return tuple(extents), tuple(steps), offset


def span_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie from a region's first to its last, both counted; 0 for an empty one."""
    if 0 in shape:
        return 0
    return 1 + sum((extent - 1) * step for extent, step in zip(shape, stride))


def part_of(base: torch.Tensor, geometry: Geometry, dtype: torch.dtype) -> torch.Tensor:
    """The region of `base`, whose elements lie side by side, that a geometry names."""
    if base.dtype is not dtype:
        base = base.reshape(-1).view(dtype)
    shape, stride, offset = geometry
    return base.as_strided(shape, stride, base.storage_offset() + offset)


def real(lazy: LazyTensor, why: str, *, write: bool = False) -> torch.Tensor:
    """The tensor itself, as soon as its bytes are there. ``write``: a private copy, for good."""
    source = lazy._source
    recorder = source.recorder
    with recorder.lock, torch._C._DisableTorchDispatch():
        recorder.note_plain(source, lazy, why)
        return part_of(source.base(write=write), lazy._geometry, lazy.dtype)


# ---- all other operations ----------------------------------------------------------------------------------

kinds: dict[Any, int] = {}  # of the operations that were looked at


def kind_of(func: Any) -> int:
    """What an operation does, from its schema."""
    kind = kinds.get(func)
    if kind is None:
        kind = kinds[func] = _find_kind(func)
    return kind


def _find_kind(func: Any) -> int:
    if func is aten.clone.default or func is aten._to_copy.default:
        return CLONE
    if torch.Tag.inplace_view in func.tags:
        return RESHAPE_IN_PLACE
    if func is aten._unsafe_view.default:  # of a clone, in reshape()
        return VIEW
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info]
    if any(alias.is_write for alias in aliases):
        return WRITE
    return VIEW if aliases else READ


def apply(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with a lazy tensor among its arguments."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return True  # _reshape_in_place asks
    kind = kind_of(func)
    first = args[0] if args else None
    if type(first) is LazyTensor:
        if kind == VIEW and not _has_lazy(args[1:]):
            return _view(func, first, args[1:], kwargs)
        if kind == CLONE and not first._source.written and _is_plain_clone(first, kwargs):
            return _clone(func, first, kwargs)
        if kind == RESHAPE_IN_PLACE:
            return _reshape_in_place(func, first, args[1:], kwargs)
    return _read_or_write(func, args, kwargs, first)


def _has_lazy(args: tuple[Any, ...]) -> bool:
    return any(type(arg) is LazyTensor for arg in args)


def _meta(geometry: Geometry, dtype: torch.dtype) -> torch.Tensor:
    shape, stride, offset = geometry
    storage = torch.empty(offset + span_of(shape, stride), dtype=dtype, device="meta")
    return storage.as_strided(shape, stride, offset)


def _geometry_of(meta: torch.Tensor) -> Geometry:
    return tuple(meta.shape), meta.stride(), int(meta.storage_offset())


def _view(func: Any, lazy: LazyTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtype = lazy.dtype
    try:
        outer = func(_meta(lazy._geometry, dtype), *args, **kwargs)
        inner = outer if lazy._inner is None else func(_meta(lazy._inner, dtype), *args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
        # It cannot be viewed so, where it lies: torch's own word on it; of a clone, a view of a real one,
        # which shares its memory with the clone's other views.
        return func(real(lazy, _name_of(func), write=lazy._inner is not None), *args, **kwargs)
    if isinstance(outer, torch.Tensor):
        return _view_of(lazy, outer, inner)
    return type(outer)([_view_of(lazy, one, other) for one, other in zip(outer, inner)])


def _view_of(lazy: LazyTensor, outer: torch.Tensor, inner: torch.Tensor) -> LazyTensor:
    made = lazy_tensor(lazy._source, _geometry_of(outer), outer.dtype)
    if lazy._inner is not None:
        made._inner = _geometry_of(inner)
    return made


def _is_plain_clone(lazy: LazyTensor, kwargs: dict[str, Any]) -> bool:
    """Whether only the memory is another one: no cast, no other device or layout."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    return (
        dtype in (None, lazy.dtype)
        and (device is None or torch.device(device) == lazy.device)
        and kwargs.get("layout") in (None, torch.strided)
        and not kwargs.get("pin_memory")
    )


def _clone(func: Any, lazy: LazyTensor, kwargs: dict[str, Any]) -> LazyTensor:
    known = {name: value for name, value in kwargs.items() if name in ("memory_format", "dtype")}
    outer = _geometry_of(func(_meta(lazy._geometry, lazy.dtype), **known))
    inner = lazy._geometry if lazy._inner is None else lazy._inner
    made = lazy_tensor(lazy._source.clone(inner, outer, lazy.dtype), outer, lazy.dtype)
    made._inner = inner
    return made


def _reshape_in_place(func: Any, lazy: LazyTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """squeeze_(), t_() and the like: the object stays, its shape does not."""
    meta = _meta(lazy._geometry, lazy.dtype)
    func(meta, *args, **kwargs)
    inner = None
    if lazy._inner is not None:
        inner_meta = _meta(lazy._inner, lazy.dtype)
        func(inner_meta, *args, **kwargs)
        inner = _geometry_of(inner_meta)
    changed = lazy_tensor(lazy._source, _geometry_of(meta), lazy.dtype)
    torch.Tensor.data.__set__(lazy, changed)  # type: ignore[attr-defined]
    lazy._state, lazy._inner = changed._state, inner
    return lazy


def _name_of(func: Any) -> str:
    return str(func).removeprefix("aten.")


def _read_or_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: Any) -> Any:
    """Hands the real tensors over; those that are written to are private ones from now on."""
    written: list[Any] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            written += value if isinstance(value, (list, tuple)) else [value]
    why = _name_of(func)
    others: list[torch.Tensor] = []
    recorder: Recorder | None = None

    def given(value: Any) -> Any:
        nonlocal recorder
        if type(value) is LazyTensor:
            recorder = value._source.recorder
            return real(value, why, write=any(value is one for one in written))
        if isinstance(value, torch.Tensor):
            others.append(value)
        elif isinstance(value, (list, tuple)):
            return type(value)([given(one) for one in value])
        return value

    real_args = [given(arg) for arg in args]
    real_kwargs = {name: given(value) for name, value in kwargs.items()}
    if recorder is None:
        return func(*args, **kwargs)
    with recorder.lock:
        recorder.before_touching(others)
        result = func(*real_args, **real_kwargs)
        recorder.note_written([one for one in written if isinstance(one, torch.Tensor)])
    if type(first) is LazyTensor and any(first is one for one in written):
        return first
    return result
