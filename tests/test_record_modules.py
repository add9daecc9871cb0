"""load_model, the coverage gate and parity, on modules of torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tensord
from conftest import Daemon
from tensord.cli import run
from tensord.cli.parity import parity_text

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tensord.engines.coverage import Coverage  # noqa: E402
from tensord.engines.parity import changed, compare, poison, snapshot  # noqa: E402

pytestmark = pytest.mark.usefixtures("daemon")

HIDDEN, INNER, VOCABULARY = 8, 12, 20


class Block(torch.nn.Module):
    def __init__(self, world: int = 1) -> None:
        super().__init__()
        self.up = torch.nn.Linear(HIDDEN, INNER // world, bias=False)
        self.down = torch.nn.Linear(INNER // world, HIDDEN)
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


class Model(torch.nn.Module):
    def __init__(self, world: int = 1, is_tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY // world, HIDDEN)
        self.blocks = torch.nn.ModuleList(Block(world) for _ in range(2))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY // world, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


CUTS = {"embed.weight": 0, "head.weight": 0, "*.up.weight": 0, "blocks.[0-9].down.weight": -1}


@pytest.fixture
def whole() -> Any:
    torch.manual_seed(7)
    model = Model()
    with torch.no_grad():
        for block in model.blocks:
            block.scale.fill_(3)
            torch.nn.init.normal_(block.norm.weight)
    return model


@pytest.fixture
def path(tmp_path: Path, whole: Any) -> Path:
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items() if name != "head.weight"}
    file = tmp_path / "model.safetensors"
    safetensors_torch.save_file(state, file)
    return file


# ---- load_model --------------------------------------------------------------------------------------------


def test_a_module_is_filled_by_names_where_it_is(path: Path, whole: Any) -> None:
    model = Model()
    poison(model)
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    report = tensord.load_model(model, path)
    assert {row.name for row in compare(whole, model).differences} == {"blocks.0.cache", "blocks.1.cache"}
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
    assert report.bytes == sum(
        tensor.nbytes for name, tensor in whole.state_dict().items() if name != "head.weight"
    )
    assert report.tensor_count == 13 and report.one_line().startswith("tensord: ")


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_holds_its_cuts(path: Path, whole: Any, world: int) -> None:
    parts = [Model(world) for _ in range(world)]
    for rank, part in enumerate(parts):
        tensord.load_model(part, path, rank=rank, world=world, plan=CUTS)
    for name, dim in (("embed.weight", 0), ("blocks.1.up.weight", 0), ("blocks.0.down.weight", 1)):
        joined = torch.cat([part.get_parameter(name) for part in parts], dim)
        assert torch.equal(joined, whole.get_parameter(name))
    assert torch.equal(parts[1].blocks[1].down.bias, whole.blocks[1].down.bias)


def test_a_callable_cuts_as_it_likes(path: Path, whole: Any) -> None:
    asked = []

    def backward(name: str, shape: tuple[int, ...], rank: int, world: int) -> Any:
        asked.append((name, shape, rank, world))
        return (slice(None, None, 1), slice(rank, None, world))

    block = torch.nn.Linear(INNER // 2, HIDDEN)
    tensord.load_model(
        block,
        path,
        rank=1,
        world=2,
        plan={"weight": backward},
        only="blocks.0.down.*",
        rename=[(r"^blocks\.0\.down\.", "")],
    )
    assert torch.equal(block.weight, whole.blocks[0].down.weight[:, 1::2])
    assert asked == [("weight", (HIDDEN, INNER), 1, 2)]


def test_types_are_converted_or_refused(path: Path, whole: Any) -> None:
    model = Model().to(torch.bfloat16)
    tensord.load_model(model, path)
    assert torch.equal(model.embed.weight, whole.embed.weight.to(torch.bfloat16))
    with pytest.raises(tensord.InvalidArgumentError, match="ask for a cast"):
        tensord.load_model(model, path, cast=False)


def test_only_what_has_a_place_is_read(path: Path, daemon: Daemon) -> None:
    part = torch.nn.Linear(HIDDEN, INNER, bias=False)
    tensord.load_model(part, path, rename=[(r"^blocks\.0\.up\.", "")], strict=False)
    held = [one for one in daemon.ask("ls")["replicas"] if one["path"] == str(path)]
    assert held and max(one["payload_bytes"] for one in held) == HIDDEN * INNER * 4


def test_what_does_not_fit_is_named_before_anything_is_written(path: Path) -> None:
    model = Model(is_tied=False)
    before = snapshot(model)
    with pytest.raises(tensord.IncompleteError, match=r"the checkpoint lacks: head\.weight \(strict=False"):
        tensord.load_model(model, path)
    smaller = torch.nn.ModuleDict({"embed": torch.nn.Embedding(VOCABULARY, HIDDEN)})
    with pytest.raises(
        tensord.InvalidArgumentError, match=r"no place for: blocks\.0\.down\.bias, .*up\.weight \(strict"
    ) as error:
        tensord.load_model(smaller, path)
    assert not isinstance(error.value, tensord.IncompleteError)
    with pytest.raises(
        tensord.InvalidArgumentError,
        match=r"embed\.weight has shape \[10, 8\], 'embed\.weight' of the checkpoint \[20, 8\]",
    ):
        tensord.load_model(Model(2), path, strict=False)
    with pytest.raises(tensord.InvalidArgumentError, match=r"of which this rank's part is \[10, 8\]"):
        tensord.load_model(Model(), path, world=2, plan=CUTS)
    with pytest.raises(
        tensord.InvalidArgumentError, match=r"20, dimension 0 of embed\.weight, has no 3 equal"
    ):
        tensord.load_model(Model(), path, world=3, plan={"embed.weight": 0})
    with pytest.raises(tensord.InvalidArgumentError, match="has no dimension 2 to cut"):
        tensord.load_model(Model(), path, plan={"embed.weight": 2})
    with pytest.raises(tensord.InvalidArgumentError, match="no rank 2 of 2"):
        tensord.load_model(Model(), path, rank=2, world=2)
    with torch.device("meta"):
        hollow = Model()
    with pytest.raises(tensord.UnsupportedError, match=r"embed\.weight is on device meta.*to_empty"):
        tensord.load_model(hollow, path)
    assert snapshot(model) == before
    tensord.load_model(model, path, strict=False)
    assert snapshot(model)["head.weight"] == before["head.weight"]


# ---- the coverage gate -------------------------------------------------------------------------------------


def test_coverage_counts_each_way_of_writing(path: Path) -> None:
    class Several(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("copied", "computed", "replaced", "assigned", "left", "halved"):
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(HIDDEN), requires_grad=False))
            self.tied = self.copied
            self.register_buffer("counts", torch.zeros(2))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)
            self.register_buffer("none", None)
            self.empty = torch.nn.Parameter(torch.zeros(0))

    module = Several()
    coverage = Coverage(module)
    with tensord.record(path, module, strict=False) as weights:
        for name, weight in weights:
            if name == "blocks.0.norm.weight":
                module.copied.copy_(weight)
                module.computed.copy_(weight + 1)
                module.replaced = torch.nn.Parameter(torch.ones(HIDDEN))
                module.assigned.data = torch.ones(HIDDEN)
                module.halved.data[:4].copy_(weight[:4])
    report = coverage.report(weights.recorder)
    assert report.unwritten == ["left", "counts"] and report.partial == {"halved": 0.5}
    assert coverage.check(weights, leaves=["le?t", "counts"]).partial == {"halved": 0.5}
    with pytest.raises(tensord.IncompleteError, match=r"nothing wrote 1 of .*: left;"):
        coverage.check(weights, leaves="counts")
    with pytest.raises(tensord.IncompleteError, match=r"nothing wrote 2 of .*: left, halved;"):
        coverage.check(weights, leaves="counts", whole=True)
    assert tensord.IncompleteError("x").code == "incomplete"


def test_coverage_of_a_module_on_meta_asks_for_real_tensors() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    coverage = Coverage(module)
    assert coverage.report().unwritten == ["weight", "bias"]
    module.to_empty(device="cpu")
    assert coverage.report().unwritten == []


# ---- parity ------------------------------------------------------------------------------------------------


def test_parity_sees_bits_strides_types_and_plain_attributes() -> None:
    def make() -> Any:
        module = torch.nn.Linear(3, 3)
        with torch.no_grad():
            module.weight.copy_(torch.arange(9.0).reshape(3, 3))
            module.bias.fill_(float("nan"))
        module.w_kc = torch.zeros(4)
        module.parts = {"a": [torch.ones(2)], "b": "text"}
        module.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
        return module

    first, second = make(), make()
    assert compare(first, second).is_equal
    names = [row.name for row in compare(first, second).rows]
    assert names == ["weight", "bias", "scale", "@w_kc", "@parts['a'][0]"]
    second.w_kc[3] = -0.0
    second.parts["a"][0] = torch.ones(2, dtype=torch.float64)
    second.weight = torch.nn.Parameter(second.weight.detach().t().contiguous().t())
    second.scale = torch.ones(3, dtype=torch.bfloat16)
    del second.bias
    second.more = torch.zeros(1)
    report = compare(first, snapshot(second))
    assert {row.name: row.problem for row in report.differences} == {
        "weight": "strides: [1, 3] instead of [3, 1]",
        "bias": "tensord's module lacks it",
        "scale": "shape: [3] instead of [2]",
        "@w_kc": "other bytes",
        "@parts['a'][0]": "type: torch.float64 instead of torch.float32",
        "@more": "only tensord's module has it",
    }


def test_poison_fills_memory_and_changed_tells_what_a_load_wrote() -> None:
    module = torch.nn.Linear(3, 3)
    module.register_buffer("count", torch.zeros((), dtype=torch.int64))
    module.register_buffer("small", torch.zeros(4).to(torch.float8_e4m3fn))
    assert poison(module) == ["weight", "bias", "count", "small"]
    for tensor in (*module.parameters(), *module.buffers()):
        assert (tensor.detach().reshape(-1).view(torch.uint8) == 0x5A).all()
    before = snapshot(module)
    module.count.fill_(3)
    assert changed(before, snapshot(module)) == ["count"]
    assert poison(module, ["count"]) == ["count"]
    assert snapshot(module) == before


def test_the_verb_compares_and_its_status_tells(
    path: Path, daemon: Daemon, capfd: Any, monkeypatch: Any
) -> None:
    report = daemon.ask("parity", "torch", str(path), "--tp", "2")
    assert report["is_equal"] and [rank["label"] for rank in report["ranks"]] == ["rank 0", "rank 1"]
    assert report["ranks"][0] == {"label": "rank 0", "tensor_count": 13, "differences": []}
    from tensord.engines import torch_parity

    monkeypatch.setattr(
        torch_parity,
        "parity_modules",
        lambda path, tp: [("rank 0", torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))],
    )
    assert run(["parity", "torch", str(path)]) == 1
    text = capfd.readouterr().out
    assert "torch, tp 1: they are NOT the same" in text and "rank 0: weight: other bytes" in text


def test_the_verb_says_what_is_missing(capfd: Any) -> None:
    assert run(["parity", "torch"]) == 2
    assert "MODEL is required" in capfd.readouterr().err
    assert run(["parity", "jax", "x"]) == 2
    assert run(["parity", "torch", "x", "y"]) == 2
    assert run(["parity", "vllm", "x"]) == 1
    assert "vllm is not installed in " in capfd.readouterr().err
    capfd.readouterr()
    assert run(["--complete", "parity", ""]) == 0
    assert capfd.readouterr().out.split() == ["torch", "transformers", "vllm", "sglang"]
    assert run(["--complete", "parity", "torch", ""]) == 0
    assert capfd.readouterr().out == "<files>\n"


def test_the_text_names_twenty_and_counts_the_rest() -> None:
    differences = [{"name": f"w{at}", "problem": "other bytes"} for at in range(25)]
    ranks = [{"label": "rank 0", "tensor_count": 30, "differences": differences}]
    text = parity_text({"engine": "vllm", "model": "/m", "tp": 1, "is_equal": False, "ranks": ranks})
    assert text.splitlines()[:3] == [
        "/m, vllm, tp 1: they are NOT the same",
        "rank    tensors  equal  different",
        "rank 0       30      5         25",
    ]
    assert text.endswith("rank 0: w19: other bytes\nand 5 more; --json has all\n")
    assert json.dumps(ranks)
