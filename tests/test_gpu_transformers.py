"""Models of transformers and diffusers into GPU memory through tensord. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensord

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

import huggingface_models as hf  # noqa: E402
import safetensors  # noqa: E402
import transformers  # noqa: E402

pytestmark = pytest.mark.usefixtures("daemon")

SAFE_OPEN = safetensors.safe_open

# As Qwen3 is built, with matrices that the copy engines take: 2-16 MiB in BF16, norms that they do not.
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 8192,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module", params=["1GB", "40MB"], ids=["one file", "sharded"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    model = hf.randomize(transformers.Qwen3ForCausalLM(hf.config_of("qwen3", **WIDE)))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=request.param)
    return folder


def load_both(folder: Path, kind: Any = None, **options: Any) -> tuple[Any, Any]:
    """Ours and what is known of the load; compared with transformers' own."""
    kind = kind or transformers.AutoModelForCausalLM
    plain = kind.from_pretrained(folder, **options)
    with tensord.transformers.patch(strict=True) as loads:
        ours = kind.from_pretrained(folder, **options)
    hf.assert_same(ours, plain)
    assert [one.device for one in ours.parameters()] == [one.device for one in plain.parameters()]
    assert {type(one.data) for one in ours.parameters()} == {torch.Tensor}
    assert vars(transformers.modeling_utils)["safe_open"] is SAFE_OPEN
    (load,) = loads
    return ours, load


@pytest.mark.parametrize("device_map", ["cuda:0", "cuda", "auto", 0], ids=str)
def test_qwen3_is_written_by_the_copy_engines(wide: Path, device_map: Any) -> None:
    ours, load = load_both(wide, dtype="auto", device_map=device_map)
    parameters = list(ours.parameters())
    large_bytes = sum(one.nbytes for one in parameters if one.nbytes >= 4096)
    assert load.staged_bytes == 0 and load.slower_why == ""
    if len({one.device for one in parameters}) == 1:
        assert load.device_bytes == large_bytes
    else:  # some was read ahead for the wrong one
        assert large_bytes <= load.device_bytes < 2 * large_bytes
    assert load.bytes == sum(one.nbytes for one in parameters)
    assert sum(load.copied.values()) == load.tensor_count == len(parameters)


def test_a_dtype_is_converted_on_the_device(wide: Path) -> None:
    ours, load = load_both(wide, dtype=torch.float32, device_map="cuda:0")
    assert ours.dtype is torch.float32
    assert load.device_bytes > 0.9 * load.bytes


def test_a_model_that_lies_on_both_sides(wide: Path) -> None:
    pytest.importorskip("accelerate")
    device_map: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    device_map |= {f"model.layers.{layer}": 0 if layer < 2 else "cpu" for layer in range(4)}
    device_map |= {"model.norm": 0, "lm_head": 0}
    options = {"dtype": "auto", "device_map": device_map}
    tokens = torch.tensor([[5, 6, 7]], device="cuda:0")
    with torch.no_grad(), tensord.transformers.patch(strict=True):
        ours = transformers.AutoModelForCausalLM.from_pretrained(wide, **options)(tokens).logits
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(wide, **options)(tokens).logits
    assert torch.equal(ours, plain)


def test_without_a_device_map_the_cpu_has_it_without_a_copy(wide: Path) -> None:
    ours, load = load_both(wide, dtype="auto")
    assert load.zero_copy_count == load.tensor_count
    moved = ours.to("cuda:0")
    hf.assert_same(moved, transformers.AutoModelForCausalLM.from_pretrained(wide, dtype="auto"))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gpt2", "bert"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    load_both(hf.write_model(name, tmp_path), hf.class_of(name), device_map="cuda:0")


def test_a_model_larger_than_the_daemon_s_memory(wide: Path, make_daemon: Any) -> None:
    make_daemon("--host-memory", "96MiB")
    with pytest.warns(tensord.TensordWarning, match="is larger than the daemon's host_memory"):
        _, load = load_both(wide, dtype="auto", device_map="cuda:0")
    assert load.staged_bytes > 0.9 * load.bytes and load.slower_why == "the model is read in batches"


def test_generation_is_that_of_the_plain_model(wide: Path) -> None:
    tokens = torch.tensor([[5, 6, 7]], device="cuda:0")
    options = {"dtype": "auto", "device_map": "cuda:0"}
    answers = []
    for load in (transformers.AutoModelForCausalLM.from_pretrained, tensord.transformers.from_pretrained):
        model = load(wide, **options)
        answers.append(model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist())
    assert answers[0] == answers[1]


def test_load_file_into_a_gpu_is_one_batch(wide: Path) -> None:
    import safetensors.torch

    path = sorted(wide.glob("*.safetensors"))[0]
    plain = safetensors.torch.load_file(path)
    with tensord.transformers.patch(strict=True):
        ours = safetensors.torch.load_file(path, device="cuda:0")
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        assert tensor.device == torch.device("cuda:0")
        assert torch.equal(hf.as_bytes(tensor), hf.as_bytes(plain[name]))
