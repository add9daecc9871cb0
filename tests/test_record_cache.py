"""Cached plans: a second start replays what the first one traced, or traces anew."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensord

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("daemon")

TENSORS = {
    "q": torch.arange(48.0).reshape(8, 6),
    "k": torch.arange(24.0).reshape(4, 6) + 100,
    "half": torch.arange(12.0).reshape(3, 4).to(torch.float16),
    "scale": torch.tensor(2.0),
}

Weights = Iterable[tuple[str, Any]]


class Module(torch.nn.Module):
    """Fused, cut, cast, transposed, and one buffer."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(rows, 6), requires_grad=False)
        self.turned = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.register_buffer("scale", torch.zeros(2))
        self.tied = self.turned
        self.seen: list[str] = []

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            self.seen.append(name)
            if name == "q":
                self.qk.data[:4].copy_(weight[4:])
            elif name == "k":
                self.qk.data[4:6].copy_(weight.narrow(0, 2, 2))
            elif name == "half":
                self.turned.copy_(weight.t())
            else:
                self.scale.copy_(weight)

    def is_right(self, tensors: dict[str, Any] = TENSORS) -> bool:
        return (
            torch.equal(self.qk, torch.cat([tensors["q"][4:], tensors["k"][2:]]))
            and torch.equal(self.turned, tensors["half"].t().float())
            and torch.equal(self.scale, tensors["scale"].expand(2))
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    safetensors_torch.save_file(TENSORS, file)
    return file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """Where plans are."""
    monkeypatch.setenv("TENSORD_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "plans"


def load(path: Path, module: Any = None, key: Any = "key", **options: Any) -> tuple[Any, Any]:
    module = Module() if module is None else module
    with torch.no_grad(), tensord.record(path, module, cache=key, **options) as weights:
        module.load_weights(weights)
    return module, weights


def test_a_second_start_replays_without_a_tensor_handed_out(path: Path, folder: Path) -> None:
    first, traced = load(path)
    assert not traced.replayed and first.is_right() and len(first.seen) == 4
    assert traced.report.cache == "traced: there is no plan yet; it is kept for the next start"
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    second, replayed = load(path)
    assert replayed.replayed and second.is_right() and second.seen == []
    assert replayed.report.replayed and replayed.report.record_count == traced.report.record_count == 4
    assert replayed.report.bytes == traced.report.bytes
    assert replayed.report.tensor_count == 0 and "replayed" in replayed.report.one_line()
    assert replayed.written() == traced.written() == {"qk", "turned", "tied", "scale"}


def test_a_plan_runs_where_nobody_asks_for_tensors(path: Path) -> None:
    load(path)
    module = Module()
    with tensord.record(path, module, cache="key") as weights:
        assert weights.replayed
    assert module.is_right()


def test_checkpoints_of_equal_shapes_share_a_plan(path: Path, tmp_path: Path) -> None:
    load(path)
    other = {name: tensor + 1 for name, tensor in TENSORS.items()}
    safetensors_torch.save_file(other, tmp_path / "other.safetensors")
    module, weights = load(tmp_path / "other.safetensors")
    assert weights.replayed and module.is_right(other)


@pytest.mark.parametrize("what", ["key", "module", "checkpoint", "names"])
def test_what_is_not_the_same_is_traced(path: Path, tmp_path: Path, what: str) -> None:
    load(path)
    options: dict[str, Any] = {}
    if what == "key":
        options["key"] = {"tp": 2, "rank": 1}
    elif what == "module":
        options["module"] = type("Other", (Module,), {})()
    elif what == "names":
        options["only"] = lambda name: name != "none"
        _, weights = load(path, **options)
        assert weights.replayed  # the same tensors under the same names
        options = {"rename": lambda name: name, "key": "other"}
    else:
        path = tmp_path / "other.safetensors"
        safetensors_torch.save_file({**TENSORS, "more": torch.zeros(1)}, path)
    module, weights = load(path, **options)
    assert not weights.replayed and module.qk.abs().sum() > 0


def test_a_module_of_other_shapes_drops_the_plan(path: Path, caplog: Any) -> None:
    load(path)
    module, weights = load(path, Module(rows=7), strict=False)
    assert not weights.replayed and torch.equal(
        module.qk[:6], torch.cat([TENSORS["q"][4:], TENSORS["k"][2:]])
    )
    assert "the cached plan was dropped: the module has other parameters" in weights.report.cache
    assert "none is kept: copies wrote 144 of the 168 bytes of qk" in weights.report.cache
    assert "the cached plan is dropped" in caplog.text


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Every way in which a file may be wrong; its own digest is right again in some."""

    def sealed(body: bytes) -> bytes:
        return body + hashlib.sha256(body).digest()

    yield "empty", b""
    yield "short", content[:20]
    yield "cut", content[: len(content) // 2]
    yield "longer", content + b"\0"
    yield "one bit", content[:200] + bytes([content[200] ^ 1]) + content[201:]
    yield "no plan", sealed(b"something else, and long enough for a header")
    body = content[:-32]
    yield "another version", sealed(body.replace(b"plan 1\n", b"plan 9\n", 1))
    yield "header too long", sealed(body[:15] + (1 << 60).to_bytes(8, "little") + body[23:])
    yield "no header", sealed(body.replace(b'{"digest"', b'["digest"', 1))
    yield "of another load", sealed(body.replace(b'"digest": "', b'"digest": "0', 1))
    yield "arrays cut", sealed(body[:-8])
    for at in range(8, 8 * 40, 8):
        for value in (1 << 40, -1, (1 << 62) - 1):
            yield (
                f"number {at} {value}",
                sealed(
                    body[:-at]
                    + value.to_bytes(8, "little", signed=True)
                    + (body[-at + 8 :] if at > 8 else b"")
                ),
            )


def test_a_damaged_file_is_dropped_and_never_believed(path: Path, folder: Path) -> None:
    load(path)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    dropped = 0
    for what, changed in damaged(content):
        file.write_bytes(changed)
        around = torch.full((64,), 9.0)
        module = Module()
        _, weights = load(path, module)
        if not weights.replayed:
            assert module.is_right(), what
            assert file.read_bytes() == content, what
            dropped += 1
        assert (around == 9).all(), what
        file.write_bytes(content)
    assert dropped > 90


def test_a_file_that_others_may_write_is_not_read(path: Path, folder: Path, tmp_path: Path) -> None:
    load(path)
    (file,) = folder.iterdir()
    file.chmod(0o666)
    _, weights = load(path)
    assert not weights.replayed and "no file that its owner alone may write" in weights.report.cache
    content = file.read_bytes()
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    file.symlink_to(tmp_path / "elsewhere")
    module, weights = load(path)
    assert not weights.replayed and module.is_right()
    file.unlink()
    os.mkfifo(file)
    _, weights = load(path)
    assert not weights.replayed


def test_a_folder_that_cannot_be_written_is_said_and_harmless(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module, weights = load(path, cache_folder=tmp_path / "file" / "plans")
    assert module.is_right() and "none is kept: write" in weights.report.cache


def test_a_folder_of_the_caller_s_own(path: Path, tmp_path: Path) -> None:
    load(path, cache_folder=tmp_path / "own")
    assert load(path, cache_folder=tmp_path / "own")[1].replayed
    assert not load(path)[1].replayed


# ---- what no plan knows ------------------------------------------------------------------------------------


class Plain(Module):
    """A scale that is needed as such."""

    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            if name == "scale":
                self.scale.fill_(weight.item())
            else:
                super().load_weights([(name, weight)])


class Afterwards(Module):
    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.turned.data.mul_(2)


class Derived(Module):
    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.transposed = torch.ones(3)


class Replaced(Module):
    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.turned = torch.nn.Parameter(self.turned.data.clone(), requires_grad=False)


class Elsewhere(Module):
    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            self.beside = getattr(self, "beside", torch.zeros(8, 6))
            if name == "q":
                self.beside.copy_(weight)
            super().load_weights([(name, weight)])


class Threads(Module):
    def load_weights(self, weights: Weights) -> None:
        for pair in weights:
            thread = threading.Thread(target=super().load_weights, args=([pair],))
            thread.start()
            thread.join()


class Written(Module):
    def load_weights(self, weights: Weights) -> None:
        for name, weight in weights:
            if name == "half":
                weight.zero_()
            super().load_weights([(name, weight)])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Plain, "'scale' was needed as such: _local_scalar_dense"),
        (Afterwards, "mul_.Tensor touched"),
        (Derived, "plain attributes"),
        (Replaced, "touched turned|changed the module's parameters"),
        (Elsewhere, "elsewhere|plain attributes"),
        (Threads, "several threads"),
        (Written, "'half' was needed as such: zero_"),
    ],
)
def test_a_load_that_is_more_than_its_copies_is_never_kept(
    path: Path, folder: Path, kind: Callable[[], Any], why: str
) -> None:
    import re

    for _ in range(2):
        module, weights = load(path, kind())
        assert not weights.replayed and len(module.seen) >= 3
        assert re.search(why, weights.report.cache), weights.report.cache
    assert not list(folder.glob("*"))


def test_a_load_that_fails_keeps_nothing(path: Path, folder: Path) -> None:
    module = Module()
    with pytest.raises(ZeroDivisionError), tensord.record(path, module, cache="key") as weights:
        module.load_weights(weights)
        raise ZeroDivisionError
    assert not folder.exists()


def test_a_cache_needs_a_module_and_a_key_that_can_be_said(path: Path) -> None:
    with pytest.raises(tensord.InvalidArgumentError, match="needs module="):
        tensord.record(path, cache="key")
    with pytest.raises(tensord.InvalidTypeError, match="what JSON can say"):
        tensord.record(path, Module(), cache=object())
