"""safetensors' reading interface over tensord, beside safetensors' own where that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensord
from conftest import Raw, counted
from tensord.errors import SafetensorError

pytestmark = pytest.mark.usefixtures("daemon")

TENSORS = {"z": counted((4, 3)), "a": counted((5,), "int64"), "scalar": np.float64(2).reshape(())}


@pytest.fixture
def path(make_file: Callable[..., Path]) -> Path:
    return make_file(TENSORS, {"format": "np"})


@pytest.fixture
def opened(path: Path) -> Iterator[tensord.safe_open]:
    with tensord.safe_open(path, framework="np") as file:
        yield file


def test_names_and_metadata(opened: tensord.safe_open, make_file: Callable[..., Path]) -> None:
    assert opened.keys() == ["a", "scalar", "z"]
    assert opened.offset_keys() == ["z", "a", "scalar"]
    assert opened.metadata() == {"format": "np"}
    assert tensord.safe_open(make_file(TENSORS, name="bare.safetensors"), "np").metadata() is None


def test_tensors(opened: tensord.safe_open) -> None:
    assert list(opened.get_tensors()) == opened.offset_keys()
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(opened.get_tensor(name), expected, strict=True)


def test_arrays_may_be_written_to_and_no_other_file_sees_it(path: Path) -> None:
    first = tensord.numpy.load_file(path)
    first["z"][0, 0] = 99
    assert tensord.numpy.load_file(str(path), backend="pread")["z"][0, 0] == 0
    assert tensord.load_file(path, "np")["z"][0, 0] == 0


INDICES = [
    np.s_[:],
    np.s_[()],
    np.s_[...],
    np.s_[1],
    np.s_[-1],
    np.s_[1:3],
    np.s_[:, 1],
    np.s_[0, -3],
    np.s_[..., 0],
    np.s_[1:, ..., 1:2],
    np.s_[::2],
    np.s_[2:2],
    np.s_[0:4],
    [],
    # refused
    np.s_[:20],
    np.s_[:, 1:20],
    np.s_[2:, -6],
    np.s_[2:, 20],
    np.s_[4:],
    np.s_[0, 0, 0],
    np.s_[None],
    np.s_["a"],
    np.s_[1.5],
    np.s_[..., ...],
    np.s_[::0],
    np.s_[::-1],
    [0, 1],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_and_refusals_are_safetensors_own(opened: tensord.safe_open, path: Path, index: Any) -> None:
    safetensors = pytest.importorskip("safetensors")

    def outcome(file: Any) -> Any:
        try:
            return file.get_slice("z")[index]
        except SafetensorError as error:
            return str(error)

    with safetensors.safe_open(path, framework="np") as other:
        expected = outcome(other)
    actual = outcome(opened)
    if isinstance(expected, str):
        assert actual == expected
    else:
        np.testing.assert_array_equal(actual, expected, strict=True)
        assert actual.flags.c_contiguous


def test_slice_describes_its_tensor_and_outlives_the_file(path: Path) -> None:
    with tensord.safe_open(path, "numpy") as file:
        part = file.get_slice("z")
    assert part.get_shape() == [4, 3]
    assert part.get_dtype() == "F32"
    assert part[1:3].tolist() == [[3, 4, 5], [6, 7, 8]]


def test_closed_file_says_so(path: Path) -> None:
    with tensord.safe_open(path, "np") as file:
        pass
    for use in (file.keys, file.metadata, file.offset_keys, file.get_tensors, lambda: file.get_tensor("a")):
        with pytest.raises(SafetensorError, match="File is closed"):
            use()


def test_a_file_may_be_closed_without_having_been_entered_and_again(path: Path) -> None:
    file = tensord.safe_open(path, "np")
    part = file.get_slice("a")
    for _ in range(2):
        file.__exit__(None, None, None)
    with pytest.raises(SafetensorError, match="File is closed"):
        file.keys()
    assert part.get_shape() == [5] and part.get_dtype() == "I64" and part[...].tolist() == [0, 1, 2, 3, 4]


def test_unknown_tensor(opened: tensord.safe_open) -> None:
    for use in (opened.get_tensor, opened.get_slice):
        with pytest.raises(SafetensorError, match="File does not contain tensor nope") as caught:
            use("nope")
        assert isinstance(caught.value, tensord.NotFoundError)
        assert isinstance(caught.value, KeyError)
        with pytest.raises(TypeError):
            use(1)  # type: ignore[arg-type]


def test_missing_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tensord.safe_open("notafile", "np")
    assert str(caught.value) == "No such file or directory: notafile"
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\1\0\0\0\0\0\0\0[")
    with pytest.raises(SafetensorError) as corrupt:
        tensord.safe_open(bad, "np")
    assert isinstance(corrupt.value, tensord.CorruptError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"framework": "zz"}, "framework zz is invalid"),
        ({"backend": "zz"}, 'backend "zz" is invalid (expected one of: "mmap", "pread")'),
        ({"device": "tape"}, "device tape is invalid"),
        ({"device": "cuda:x"}, "device cuda:x is invalid"),
        ({"device": 1.5}, "device 1.5 is invalid"),
        ({"device": "cuda"}, "Device cuda:0 is not supported for framework numpy"),
        ({"device": "mps:1"}, "device mps:1 is invalid: only mps or mps:0 is supported"),
    ],
)
def test_options_that_safetensors_refuses(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SafetensorError) as caught:
        tensord.safe_open(path, **{"framework": "np", **options})
    assert str(caught.value) == message
    assert isinstance(caught.value, tensord.Error)


@pytest.mark.parametrize("framework", ["tf", "jax", "flax", "mlx", "paddle"])
def test_other_frameworks_are_unsupported(path: Path, framework: str) -> None:
    with pytest.raises(tensord.UnsupportedError, match=framework):
        tensord.safe_open(path, framework=framework)


def test_open_file_object(path: Path) -> None:
    with path.open("rb") as stream, tensord._safe_open_handle(stream, framework="np") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2, 3, 4]


def test_folder_of_shards(make_shards: Callable[..., Path]) -> None:
    folder = make_shards([{"b": counted((2,))}, {"a": counted((3,))}])
    with tensord.safe_open(folder, "np") as file:
        assert file.keys() == ["a", "b"]
        assert file.offset_keys() == ["b", "a"]


# ---- torch -----------------------------------------------------------------------------------------------


def test_torch_slices_are_torch_s_own(path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.from_numpy(TENSORS["z"].copy())
    with tensord.safe_open(path, framework="pt", device="cpu") as file:
        part = file.get_slice("z")
        for index in (np.s_[:], np.s_[::2], np.s_[None, 0], [0, 2], torch.tensor([True, False, True, False])):
            assert torch.equal(part[index], whole[index])
        with pytest.raises(IndexError):
            part[9]
        assert part[1:].data_ptr() == file.get_tensor("z").data_ptr() + 12


def test_torch_packed_type(make_file: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    path = make_file({"f4": Raw("F4", (4, 4), bytes(range(8)))})
    with tensord.safe_open(path, framework="pt") as file:
        assert file.get_slice("f4").get_shape() == [4, 4]
        assert file.get_tensor("f4").dtype is torch.float4_e2m1fn_x2
        assert file.get_slice("f4")[1:3].view(torch.uint8).tolist() == [[2, 3], [4, 5]]


def test_torch_device(path: Path) -> None:
    torch = pytest.importorskip("torch")
    for device in ("cpu", None):
        assert tensord.safe_open(path, "pt", device=device).get_tensor("z").device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            tensord.torch.load_file(path, device="cuda:0")


def test_saving_is_safetensors_own() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    assert tensord.numpy.save_file is safetensors.save_file
    assert tensord.numpy.save is safetensors.save
    assert tensord.numpy.load is safetensors.load
    with pytest.raises(AttributeError, match="nothing"):
        _ = tensord.numpy.nothing  # type: ignore[attr-defined]


def test_load_model_with_tied_weights(make_file: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")

    class Tied(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(3, 2)
            self.b = self.a

    weight, bias = counted((2, 3)), counted((2,))
    one = {"b.weight": weight, "b.bias": bias}
    model = Tied()
    assert tensord.torch.load_model(model, make_file(one)) == (set(), [])
    assert model.a.weight.tolist() == weight.tolist()
    both = make_file({**one, "a.weight": weight, "a.bias": bias}, name="both.safetensors")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"b.bias", "b.weight"'):
        tensord.torch.load_model(Tied(), both)
    fewer = make_file({"a.weight": weight, "c": bias}, name="fewer.safetensors")
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"a.bias".*Unexpected key.*"c"'):
        tensord.torch.load_model(Tied(), fewer)
    missing, unexpected = tensord.torch.load_model(Tied(), fewer, strict=False)
    assert (missing, unexpected) == ({"a.bias"}, ["c"])
