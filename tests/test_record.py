"""Loaders with lazy tensors against the same loaders with plain ones: every bit, on poisoned memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensord
from processes import status_kib

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tensord import engines  # noqa: E402
from tensord.engines.parity import compare, poison  # noqa: E402

pytestmark = pytest.mark.usefixtures("daemon")

Weights = Iterable[tuple[str, Any]]
Load = Callable[[Any, Weights], Any]

HEADS, KEY_VALUE_HEADS, HEAD, HIDDEN, VOCABULARY, EXPERTS = 4, 2, 8, 32, 50, 6


def some(*shape: int, dtype: Any = torch.bfloat16, seed: int = 0) -> Any:
    """Any values, NaN and infinities among those of floating point."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    made = torch.randn(shape, generator=generator, dtype=torch.float32)
    if dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool):
        return (made * 50).to(torch.int64).to(dtype)
    flat = made.view(-1)
    flat[:: max(made.numel() // 3, 7)] = float("inf")
    return made.to(dtype)


TENSORS = {
    "embed.weight": some(VOCABULARY, HIDDEN),
    "q.weight": some(HEADS * HEAD, HIDDEN, seed=1),
    "k.weight": some(KEY_VALUE_HEADS * HEAD, HIDDEN, seed=2),
    "v.weight": some(KEY_VALUE_HEADS * HEAD, HIDDEN, seed=3),
    "gate.weight": some(64, HIDDEN, seed=4),
    "up.weight": some(64, HIDDEN, seed=5),
    "down.weight": some(HIDDEN, 64, seed=6),
    "norm.weight": some(HIDDEN, seed=7),
    "experts": some(EXPERTS, HIDDEN, 16, seed=8),
    "half": some(6, 10, dtype=torch.float16, seed=9),
    "single": some(6, 10, dtype=torch.float32, seed=10),
    "double": some(6, 10, dtype=torch.float64, seed=11),
    "bytes": some(8, 16, dtype=torch.uint8, seed=12),
    "numbers": some(6, 10, dtype=torch.int32, seed=13),
    "fp8": some(6, 10, dtype=torch.float32, seed=14).to(torch.float8_e4m3fn),
    "scale": torch.tensor(0.5),
    "one": torch.tensor([3.0]),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors_torch.save_file(TENSORS, file)
    return file


@pytest.fixture
def model(path: Path) -> Iterator[tensord.Model]:
    with tensord.open(path, "pt") as opened:
        yield opened


def plain(path: Path) -> Iterator[tuple[str, Any]]:
    """In the order of the file, as safetensors' own reader gives them; writes hurt nobody."""
    with safetensors_torch.safe_open(path, "pt") as opened:
        for name in opened.offset_keys():
            yield name, opened.get_tensor(name).clone()


class Module(torch.nn.Module):
    """Parameters of the shapes given, requiring gradients or not."""

    def __init__(self, **shapes: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            dtype = torch.bfloat16
            if isinstance(shape[-1], torch.dtype):
                *shape, dtype = shape
            made = torch.zeros(tuple(shape), dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(made, requires_grad=False))


def same(path: Path, make: Callable[[], Any], load: Load, **options: Any) -> engines.Recording:
    """Loads both ways; returns what followed the traced one."""
    expected, found = make(), make()
    poison(expected)
    poison(found)
    with torch.no_grad():
        load(expected, plain(path))
        with tensord.record(path, found, strict=False, **options) as weights:
            load(found, weights)
    differences = compare(expected, found).differences
    assert not differences
    return weights


# ---- what engines' loaders do ------------------------------------------------------------------------------

LOADERS: dict[str, tuple[dict[str, Any], Callable[[Any, str, Any], None], bool]] = {}


def loader(*, is_lazy: bool, **shapes: Any) -> Callable[[Any], Any]:
    """A loader ``(module, name, weight)``. ``is_lazy``: no tensor is needed as such."""

    def add(function: Any) -> Any:
        LOADERS[function.__name__] = (shapes, function, is_lazy)
        return function

    return add


@loader(is_lazy=True, w=(HIDDEN, 64))
def whole(module: Any, name: str, weight: Any) -> None:
    if name == "down.weight":
        assert weight.shape == module.w.shape and weight.dtype == module.w.dtype
        assert weight.dim() == weight.ndim == 2 and weight.size(1) == 64 and weight.numel() == 2048
        assert weight.device == module.w.device and weight.is_contiguous()
        module.w.copy_(weight)


@loader(is_lazy=True, qkv=(5 * HEAD, HIDDEN))
def fused_qkv_of_rank_1_with_replicated_heads(module: Any, name: str, weight: Any) -> None:
    """Key and value heads are fewer than ranks: one goes to several ranks, and here twice to one."""
    places = {"q": (0, 2 * HEAD, HEAD), "k": (2 * HEAD, HEAD, 0), "v": (3 * HEAD, HEAD, 0)}
    if name[0] in places and name[1] == ".":
        at, rows, start = places[name[0]]
        module.qkv.data.narrow(0, at, rows).copy_(weight.narrow(0, start, rows))
        if name == "v.weight":
            module.qkv.data[4 * HEAD :].copy_(weight[:HEAD])


@loader(is_lazy=True, gate_up=(64, HIDDEN))
def gate_up(module: Any, name: str, weight: Any) -> None:
    if name in ("gate.weight", "up.weight"):
        at = 32 * (name == "up.weight")
        module.gate_up[at : at + 32] = weight[32:]


@loader(is_lazy=True, w=(HIDDEN, 32))
def columns(module: Any, name: str, weight: Any) -> None:
    if name == "down.weight":
        module.w.data.copy_(weight.narrow(1, 32, 32))


@loader(is_lazy=True, w=(64, HIDDEN))
def padded_vocabulary(module: Any, name: str, weight: Any) -> None:
    if name == "embed.weight":
        module.w[: weight.shape[0]].data.copy_(weight)
        module.w[weight.shape[0] :].data.fill_(0)


@loader(is_lazy=True, w13=(EXPERTS, 16, HIDDEN))
def fused_experts(module: Any, name: str, weight: Any) -> None:
    if name == "experts":
        module.w13.copy_(weight.permute(0, 2, 1).contiguous())


@loader(is_lazy=True, w13=(EXPERTS, 8, HIDDEN))
def fused_experts_then_cut(module: Any, name: str, weight: Any) -> None:
    if name == "experts":
        packed = weight.transpose(1, 2).contiguous()
        assert packed.is_contiguous() and packed.stride() == (16 * HIDDEN, HIDDEN, 1)
        module.w13.copy_(packed[:, 8:, :])


@loader(is_lazy=True, w13=(EXPERTS, 32, HIDDEN))
def experts_one_by_one(module: Any, name: str, weight: Any) -> None:
    if name in ("gate.weight", "up.weight"):
        for expert in range(EXPERTS):
            at = 16 * (name == "up.weight")
            (one,) = weight.unsqueeze(0).unbind()
            module.w13.data[expert].narrow(0, at, 16).copy_(one.narrow(0, expert * 8, 16))


@loader(is_lazy=True, a=(10, 6, torch.float16), b=(10, 6, torch.float16))
def transposed(module: Any, name: str, weight: Any) -> None:
    if name == "half":
        module.a.copy_(weight.t())
        module.b.copy_(weight.T[:, :])


@loader(is_lazy=True, a=(4, 6, 10, torch.float32), b=(6, 10, torch.float32), c=(7, torch.float32))
def repeated(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(weight)
        module.b.copy_(weight[2:3].expand(6, 10))
    if name == "scale":
        module.c.copy_(weight)
        module.c[3] = weight


@loader(is_lazy=True, a=(3, 10, torch.float32), b=(6, 2, 5, torch.float32), c=(6, 5, torch.float32))
def chunks_and_views(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(weight.chunk(2, dim=0)[1])
        module.b.copy_(weight.view(6, 2, 5))
        first, second = weight.reshape(6, 2, 5).split(1, dim=1)
        module.c.copy_(second.squeeze(1))
        assert first.shape == (6, 1, 5)


@loader(is_lazy=True, a=(8, 8, torch.int16), b=(3, 4, torch.float32))
def other_elements(module: Any, name: str, weight: Any) -> None:
    if name == "bytes":
        module.a.copy_(weight.view(torch.int16))
        module.b.copy_(weight[1:7:2].view(torch.float32))


@loader(is_lazy=True, a=(5, torch.float32))
def steps_and_numbers(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(weight[-1, ::2])


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@loader(is_lazy=True, **{f"f{at}": (6, 10, dtype) for at, dtype in enumerate(FLOATS * 5)})
def casts(module: Any, name: str, weight: Any) -> None:
    sources = ("half", "single", "double", "fp8")
    if name in sources:
        for at in range(4):
            getattr(module, f"f{4 * sources.index(name) + at}").copy_(weight)
    if name == "embed.weight":
        for at in range(4):
            getattr(module, f"f{16 + at}").copy_(weight[:6, :10])


@loader(is_lazy=False, a=(6, 10, torch.float32), b=(6, 10, torch.int64))
def casts_of_integers(module: Any, name: str, weight: Any) -> None:
    if name == "numbers":
        module.a.copy_(weight)
        module.b.copy_(weight)


@loader(is_lazy=False, qk=(48, HIDDEN), v=(2, 16, HIDDEN))
def cat_and_stack(module: Any, name: str, weight: Any) -> None:
    module.kept = {**getattr(module, "kept", {}), name: weight}
    if name == "v.weight":
        module.v.copy_(torch.stack([module.kept.get("k.weight", weight), weight]))
    if {"q.weight", "k.weight"} <= set(module.kept) and name in ("q.weight", "k.weight"):
        module.qk.copy_(torch.cat([module.kept["q.weight"], module.kept["k.weight"]], dim=0))


@loader(is_lazy=False, a=(6, 10, torch.float32), b=(6, 10, torch.float32), c=(6, 10, torch.float32))
def arithmetic(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(weight * 2 + 1)
        module.b.copy_(weight.to(torch.bfloat16).float())
        module.c.copy_(weight)
        module.c.add_(weight)


@loader(is_lazy=False, a=(1, torch.float32), b=(3, torch.float32))
def scales(module: Any, name: str, weight: Any) -> None:
    if name == "scale":
        module.a.fill_(weight.item() * 3)
    if name == "one":
        module.b.copy_(torch.tensor(weight.tolist() * 3))


@loader(is_lazy=False, a=(HIDDEN,), b=(HIDDEN,), c=(HIDDEN,))
def written_to(module: Any, name: str, weight: Any) -> None:
    if name == "norm.weight":
        module.a.copy_(weight)
        part = weight[:16]
        assert part.zero_() is part
        module.b.copy_(weight)
        weight.mul_(2).add_(1)
        module.c.copy_(weight.view(HIDDEN))


@loader(
    is_lazy=False,
    a=(6, 10, torch.float32),
    b=(6, 10, torch.float32),
    c=(10, 6, torch.float32),
    d=(60, torch.float32),
)
def clones_have_a_life_of_their_own(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        clone, turned = weight.clone(), weight.t().contiguous()
        clone.zero_()
        turned[0].fill_(7)
        module.a.copy_(weight)
        module.b.copy_(clone)
        module.c.copy_(turned)
        other = weight.t().contiguous()
        flat = other.view(-1)
        flat[3:9] = 5
        module.d.copy_(other.reshape(60))


@loader(is_lazy=True, a=(10, 6, torch.float32), b=(1, 6, 10, torch.float32))
def shapes_changed_in_place(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        view = weight.view(6, 10)
        view.t_()
        assert view.shape == (10, 6)
        module.a.copy_(view)
        module.b.copy_(weight.unsqueeze_(0))


@loader(is_lazy=False, a=(6, 10, torch.float32), b=(6, 10, torch.float32), c=(6, 10, torch.float32))
def out_of_sight(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(torch.from_numpy(weight.numpy().copy()))
        module.b.copy_(copy.deepcopy(weight))
        module.c.copy_(pickle.loads(pickle.dumps(weight)))


@loader(is_lazy=False, a=(6, 10, torch.float32), b=(6, 10, torch.float16))
def many_at_once(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        torch._foreach_copy_([module.a, module.b], [weight, weight])


@loader(is_lazy=True, a=(6, 10, torch.float32), b=(6, 10, torch.float32))
def twice_the_same_place(module: Any, name: str, weight: Any) -> None:
    if name == "single":
        module.a.copy_(weight)
        module.b.copy_(weight)
        module.b[2:4, ::2].copy_(weight[:2, :5])
        module.a.copy_(weight[0:1])
        module.b[0] = weight[5]


@loader(is_lazy=True, a=(0, 4, torch.float32), b=(6, 10, torch.float32))
def nothing_at_all(module: Any, name: str, weight: Any) -> None:
    if name == "empty":
        module.a.copy_(weight)
        module.a.copy_(weight[:, :])
    if name == "single":
        module.b.copy_(weight)
        module.b[3:3].copy_(weight[2:2])


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_fills_its_module_with_the_same_bits(path: Path, name: str) -> None:
    shapes, function, is_lazy = LOADERS[name]

    def load(module: Any, weights: Weights) -> None:
        for weight_name, weight in weights:
            function(module, weight_name, weight)
        if hasattr(module, "kept"):
            del module.kept

    followed = same(path, lambda: Module(**shapes), load)
    assert bool(followed.report.plain) != is_lazy, followed.report.plain


def test_maths_after_the_loop_sees_what_was_loaded(path: Path) -> None:
    def load(module: Any, weights: Weights) -> None:
        last = None
        for name, weight in weights:
            if name == "single":
                module.a.copy_(weight)
                last = weight
        module.derived = module.a.data.double().sum(0)
        module.b.copy_(last)  # kept until now
        module.derived_too = module.b.data * 2

    same(path, lambda: Module(a=(6, 10, torch.float32), b=(6, 10, torch.float32)), load)


def test_a_guard_runs_records_before_something_looks_at_them(path: Path) -> None:
    def load(module: Any, weights: Weights) -> None:
        for name, weight in weights:
            if name == "single":
                module.a.copy_(weight)
                module.a.mul_(2)
                module.b.copy_(module.a.t())

    def make() -> Any:
        return Module(a=(6, 10, torch.float32), b=(10, 6, torch.float32))

    expected, found, mapped, recorded, unguarded = make(), make(), make(), make(), make()
    load(expected, plain(path))
    with tensord.record(path, recorded) as weights:
        load(recorded, weights)
    assert compare(expected, recorded).is_equal
    with tensord.record(path, unguarded, guard=False, strict=False) as weights:
        load(unguarded, weights)
    assert not compare(expected, unguarded).is_equal
    stream = engines.stream(path, guard=True)
    load(found, stream)
    assert compare(expected, found).is_equal
    assert stream.report.record_count == 1 and not stream.report.plain
    load(mapped, engines.stream(path, plain=True))
    assert compare(expected, mapped).is_equal
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_plain_tensors_of_a_stream_may_be_written_to(path: Path, model: tensord.Model) -> None:
    stream = engines.stream(model, plain=True, only="norm.weight")
    for _, weight in stream:
        weight.zero_()
    assert stream.report.paths["plain"] == 64
    with tensord.open(path, "pt") as other:
        assert torch.equal(other["norm.weight"], TENSORS["norm.weight"])


def test_a_parameter_made_of_a_lazy_tensor_becomes_a_real_one(path: Path, model: tensord.Model) -> None:
    module = Module(a=(6, 10, torch.float32))
    with tensord.record(model, module) as weights:
        for name, weight in weights:
            if name == "single":
                module.a = torch.nn.Parameter(weight, requires_grad=False)
            if name == "half":
                module.register_buffer("h", weight)
            if name == "one":
                module.attribute = weight
    assert type(module.a) is torch.nn.Parameter and type(module.h) is type(module.attribute) is torch.Tensor
    assert torch.equal(module.a, TENSORS["single"]) and torch.equal(module.h, TENSORS["half"])
    assert torch.equal(module.attribute, TENSORS["one"])
    module.a.zero_()
    assert torch.equal(model["single"], TENSORS["single"])


def test_a_lazy_tensor_as_the_data_of_a_parameter_is_refused(model: tensord.Model) -> None:
    module = Module(a=(6, 10, torch.float32))
    with (
        pytest.raises(tensord.UnsupportedError, match=r"lazy tensor the .data of a, .* plain=True"),
        tensord.record(model, module) as weights,
    ):
        for name, weight in weights:
            if name == "single":
                module.a.data = weight


# ---- chains of operations ----------------------------------------------------------------------------------


def a_view(chosen: random.Random, tensor: Any) -> Any:
    """Some view or copy of a tensor; the same one for the same state of `chosen`."""
    rank = tensor.dim()
    dim = chosen.randrange(rank) if rank else 0
    extent = tensor.shape[dim] if rank else 1
    start = chosen.randint(0, extent)
    length = chosen.randint(0, extent - start)
    kinds: list[Callable[[], Any]] = [
        lambda: tensor.unsqueeze(chosen.randint(0, rank)),
        lambda: tensor.clone(),
        lambda: tensor.contiguous(),
        lambda: tensor.detach(),
        lambda: tensor.data,
        lambda: tensor[None],
        lambda: tensor[...],
        lambda: tensor.reshape(-1),
        lambda: tensor.flatten(),
        lambda: tensor.squeeze(),
        lambda: tensor.expand(2, *tensor.shape),
    ]
    if rank:
        other = chosen.randrange(rank)
        kinds += [
            lambda: tensor.narrow(dim, start, length),
            lambda: torch.narrow(tensor, dim, start, length),
            lambda: tensor.transpose(dim, other),
            lambda: tensor.permute(*chosen.sample(range(rank), rank)),
            lambda: tensor[start : start + length],
            lambda: tensor[-length:],
            lambda: tensor[..., :: chosen.randint(1, 3)],
            lambda: tensor.swapaxes(dim, other).contiguous(),
            lambda: tensor.split(max(extent // 2, 1), dim)[0],
            lambda: tensor.index_select(dim, torch.arange(extent).flip(0)),
            lambda: tensor.flip(dim),
            lambda: tensor.unfold(dim, min(2, extent), 1),
        ]
    if rank and extent:
        at = chosen.randrange(-extent, extent)
        kinds += [
            lambda: tensor.select(dim, at),
            lambda: tensor.unbind(dim)[at],
            lambda: tensor.chunk(2, dim)[0],
        ]
        if dim == 0:
            kinds += [lambda: tensor[at], lambda: tensor[at, None]]
    if rank == 2:
        kinds += [lambda: tensor.t(), lambda: tensor.T]
    if rank and tensor.element_size() == 4 and tensor.is_contiguous():
        kinds += [lambda: tensor.view(torch.int16), lambda: tensor.view(torch.uint8)]
    return chosen.choice(kinds)()


def a_target(chosen: random.Random, like: Any) -> Any:
    """Memory of a tensor's shape, in some layout, with 9s around."""
    shape = list(like.shape)
    room = torch.full([2 * extent + 1 for extent in shape], 9, dtype=like.dtype)
    kind = chosen.randrange(3)
    if kind == 0:
        return torch.full(shape, 9, dtype=like.dtype)
    if kind == 1:
        return room[tuple(slice(1, extent + 1) for extent in shape)]
    return room[tuple(slice(0, 2 * extent, 2) for extent in shape)]


def base_of(tensor: Any) -> Any:
    return tensor if tensor._base is None else tensor._base


def test_random_chains_of_operations_copy_what_torch_copies(
    path: Path, model: tensord.Model, seed: int
) -> None:
    names = ["single", "experts", "half", "bytes", "one", "scale", "embed.weight", "fp8"]
    chosen = random.Random(seed)
    for _ in range(300):
        state, name = chosen.getrandbits(64), chosen.choice(names)
        outcomes = []
        for weights in ([(name, TENSORS[name].clone())], engines.stream(model, only=name)):
            steps = random.Random(state)
            targets = []
            try:
                for _, weight in weights:
                    for _ in range(steps.randint(1, 6)):
                        weight = a_view(steps, weight)
                        if steps.random() < 0.06 and weight.numel() and 0 not in weight.stride():
                            weight.view(weight.shape).fill_(1)
                        if steps.random() < 0.3 or not targets:
                            target = a_target(steps, weight)
                            target.copy_(weight)
                            targets.append(target)
            except (RuntimeError, IndexError) as error:
                outcomes.append(type(error))
                continue
            outcomes.append([base_of(target) for target in targets])
        expected, found = outcomes
        if isinstance(expected, type):
            assert found is expected, (name, state)
            continue
        assert len(expected) == len(found)
        for a, b in zip(expected, found):
            same_bits = torch.equal(
                a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
            )
            assert a.shape == b.shape and same_bits, (name, state)


# ---- threads -----------------------------------------------------------------------------------------------


def test_copies_of_many_threads_are_all_there(path: Path, model: tensord.Model) -> None:
    rounds, threads = 40, 8
    tensor = TENSORS["experts"]
    for _ in range(rounds):
        targets = [torch.zeros_like(tensor) for _ in range(threads)]
        started = threading.Barrier(threads + 1)
        running = []
        with tensord.record(model, only="experts") as weights:
            for _, weight in weights:

                def copy_all(target: Any, weight: Any = weight, started: Any = started) -> None:
                    started.wait()
                    for expert in range(EXPERTS):
                        target[expert].copy_(weight[expert])

                running = [threading.Thread(target=copy_all, args=(one,)) for one in targets]
                for thread in running:
                    thread.start()
                started.wait()  # and on to the end, in the middle of their copies
            for thread in running:
                thread.join()
        for target in targets:
            assert torch.equal(target.view(torch.int16), tensor.view(torch.int16))
        assert weights.report.record_count == threads * EXPERTS


def test_no_thread_sees_a_copy_that_is_half_done(model: tensord.Model, monkeypatch: Any) -> None:
    """A thread that copies while another one runs the records finds them done when its copy returns."""
    from tensord.engines import recorder as recorders

    inside, go_on = threading.Event(), threading.Event()
    execute = recorders.execute

    def slowly(*arguments: Any) -> Any:
        if not inside.is_set():  # the first one; what a thread runs beside it is quick
            inside.set()
            go_on.wait(5)
        return execute(*arguments)

    monkeypatch.setattr(recorders, "execute", slowly)
    first, second = torch.zeros(6, 10), torch.zeros(6, 10)
    seen = []
    with tensord.record(model, only="single") as weights:
        ((_, weight),) = [next(weights)]
        first.copy_(weight)

        def late() -> None:
            inside.wait()
            second.copy_(weight)
            seen.append((first.clone(), second.clone()))

        thread = threading.Thread(target=late)
        thread.start()
        threading.Timer(0.05, go_on.set).start()
        assert next(weights, None) is None
        thread.join()
    for one in seen[0]:
        assert torch.equal(one, TENSORS["single"])


# ---- what may go wrong -------------------------------------------------------------------------------------


def test_an_exception_in_the_block_drops_what_has_not_run(model: tensord.Model, caplog: Any) -> None:
    target = torch.full((6, 10), 9.0)
    with (
        pytest.raises(ZeroDivisionError) as caught,
        tensord.record(model) as weights,
    ):
        for name, weight in weights:
            if name == "single":
                target.copy_(weight)
                raise ZeroDivisionError
    assert (target == 9).all()
    assert "1 copies did not run" in caplog.text
    assert getattr(caught.value, "__notes__", ["1 recorded copies did not run"])[0].endswith("did not run")


def test_a_loader_that_stops_early_has_its_copies(model: tensord.Model) -> None:
    target, other = torch.zeros(6, 10), torch.zeros(6, 10)
    with tensord.record(model) as weights:
        for name, weight in weights:
            if name == "single":
                target.copy_(weight)
                break
    assert torch.equal(target, TENSORS["single"])
    other.copy_(weight)
    assert torch.equal(other, TENSORS["single"])

    def only_some() -> None:
        for name, weight in engines.stream(model):
            if name == "single":
                target.zero_().copy_(weight)
                return

    only_some()
    assert torch.equal(target, TENSORS["single"])


def test_shapes_that_differ_are_named(model: tensord.Model) -> None:
    with (
        pytest.raises(RuntimeError, match=r"'single': the target has shape \[3\], what is copied \[6, 10\]"),
        tensord.record(model, only="single") as weights,
    ):
        for _, weight in weights:
            torch.zeros(3).copy_(weight)


def test_what_nothing_wrote_is_an_error(model: tensord.Model) -> None:
    module = Module(a=(6, 10, torch.float32), left=(3,), b=(2,))
    with (
        pytest.raises(tensord.IncompleteError, match=r"nothing wrote 2 of .*: left, b;"),
        tensord.record(model, module) as weights,
    ):
        for name, weight in weights:
            if name == "single":
                module.a.copy_(weight)
    with tensord.record(model, module, leaves=["le*", "b"]) as weights:
        for name, weight in weights:
            if name == "single":
                module.a.copy_(weight)
    assert weights.written() == {"a"}
    assert "half" in weights.unused and "single" not in weights.unused
    assert weights.coverage is not None and weights.coverage.unwritten == ["left", "b"]


def test_a_closed_model_says_so(model: tensord.Model) -> None:
    weights = engines.stream(model)
    model.close()
    with pytest.raises(tensord.InvalidArgumentError, match="is closed"):
        list(engines.stream(model))
    target = torch.zeros(HIDDEN)
    with pytest.raises(tensord.InvalidArgumentError, match="is closed"):
        for name, weight in weights:
            if name == "norm.weight":
                target.copy_(weight)


def test_names_are_chosen_and_changed(model: tensord.Model) -> None:
    chosen = engines.stream(model, only=["*.weight", "scale"]).names
    assert sorted(chosen) == [name for name in model if name.endswith(".weight") or name == "scale"]
    assert engines.stream(model, only=lambda name: "k" in name).names == ["k.weight"]
    pairs = [(r"^(\w)\.", r"attention.\1_proj."), ("_proj", "")]
    assert engines.stream(model, only="q.weight", rename=pairs).names == ["attention.q.weight"]
    no_up = engines.stream(model, only="[gu]*", rename=lambda name: None if name[0] == "u" else name.upper())
    assert no_up.names == ["GATE.WEIGHT"]
    with pytest.raises(tensord.UnknownTensorError, match="'nothing' is and matches no tensor"):
        engines.stream(model, only=["scale", "nothing"])
    for wrong, kind, said in (
        ({"only": 3}, tensord.InvalidTypeError, "only: names and patterns, or a callable, not 3"),
        ({"rename": 3}, tensord.InvalidTypeError, "rename: a callable, or a list of"),
        ({"rename": ["one"]}, tensord.InvalidTypeError, "rename: a callable, or a list of"),
        ({"rename": [("(", "")]}, tensord.InvalidArgumentError, r"rename: '\(' is no regular expression"),
        ({"rename": [("q", r"\1")]}, tensord.InvalidArgumentError, "is no replacement: invalid group"),
    ):
        with pytest.raises(kind, match=said):
            engines.stream(model, **wrong)


def test_the_order_is_that_of_the_files(path: Path, model: tensord.Model) -> None:
    assert engines.stream(model).names == [name for name, _ in plain(path)]


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_record_keeps_its_target_and_lets_it_go(model: tensord.Model) -> None:
    stream = engines.stream(model)
    name, weight = next(stream)
    while name != "single":
        name, weight = next(stream)
    target = torch.zeros(6, 10)
    target.copy_(weight)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is not None
    for _ in stream:
        pass
    gc.collect()
    assert gone() is None
    assert stream.report.record_count == 1


def test_no_temporary_of_the_size_of_the_weights(tmp_path: Path) -> None:
    size = 64 << 20
    file = tmp_path / "big.safetensors"
    safetensors_torch.save_file({f"w{at}": torch.ones(size // 4 // 4096, 4096) for at in range(4)}, file)
    with tensord.open(file, "pt") as model:
        model.wait()
        targets = [torch.zeros(size // 4 // 4096 // 2, 4096) for _ in range(4)]
        stream = engines.stream(model)
        before = status_kib(os.getpid(), "RssAnon")
        for (_, weight), target in zip(stream, targets):
            target.copy_(weight[: target.shape[0]])
        list(stream)
        assert status_kib(os.getpid(), "RssAnon") - before < 16 << 10
        assert all((target == 1).all() for target in targets)


def test_models_larger_than_the_daemon_s_memory_are_loaded_too(
    make_daemon: Callable[..., Any], tmp_path: Path
) -> None:
    make_daemon("--host-memory", "24MiB")
    file = tmp_path / "large.safetensors"
    tensors = {f"w{at}": some(512, 1024, dtype=torch.float32, seed=at) for at in range(20)}
    safetensors_torch.save_file(tensors, file)
    module = Module(**{f"w{at}": (256, 1024, torch.float32) for at in range(20)})
    with pytest.warns(tensord.TensordWarning, match="larger than"), tensord.record(file, module) as weights:
        for name, weight in weights:
            part = weight[256:] * 1 if name == "w7" else weight[256:]
            getattr(module, name).copy_(part)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(module, name), tensor[256:])
    assert list(weights.report.plain) == ["w7"]
