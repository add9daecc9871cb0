"""`from_pretrained` of diffusers through tensord, against diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensord
from conftest import Daemon

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import huggingface_models as hf
import safetensors
import safetensors.torch
import torch

pytestmark = pytest.mark.usefixtures("daemon")

UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 16,
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
VAE = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
MODELS = {
    "unet": ("UNet2DConditionModel", UNET),
    "flux": ("FluxTransformer2DModel", FLUX),
    "vae": ("AutoencoderKL", VAE),
}


def make(name: str) -> Any:
    class_name, options = MODELS[name]
    return hf.randomize(getattr(diffusers, class_name)(**options))


@pytest.fixture(scope="module", params=["one file", "sharded"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    size = "200KB" if request.param == "sharded" else "1GB"
    made = {}
    for name in MODELS:
        made[name] = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(made[name], max_shard_size=size)
        assert (len(list(made[name].glob("*.safetensors"))) > 1) == (request.param == "sharded")
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.bfloat16}, {"device_map": "cpu"}],
    ids=lambda options: "".join(options) or "no options",
)
def test_models(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    kind, folder = getattr(diffusers, MODELS[name][0]), folders[name]
    plain = kind.from_pretrained(folder, **options)
    with tensord.diffusers.patch(strict=True) as loads:
        ours = kind.from_pretrained(folder, **options)
    hf.assert_same(ours, plain)
    count = sum(1 for _ in ours.parameters())
    assert loads[0].tensor_count == count
    if "low_cpu_mem_usage" not in options:  # with it diffusers copies some of them
        assert loads[0].zero_copy_count == (0 if "torch_dtype" in options else count)
    assert len(list(hf.parameters_in_shared_memory(ours))) == loads[0].zero_copy_count
    assert loads[0].model == MODELS[name][0]


def test_everything_is_restored(folders: dict[str, Path]) -> None:
    before = vars(diffusers.ModelMixin)["from_pretrained"]
    plain, load_file = safetensors.torch.safe_open, safetensors.torch.load_file
    with pytest.raises(ZeroDivisionError), tensord.diffusers.patch():
        assert safetensors.torch.safe_open is not plain
        _ = 1 / 0
    assert vars(diffusers.ModelMixin)["from_pretrained"] is before
    assert safetensors.safe_open is safetensors.torch.safe_open is plain
    assert safetensors.torch.load_file is load_file


def test_writes_stay_with_the_model_that_was_written_to(folders: dict[str, Path]) -> None:
    with tensord.diffusers.patch():
        first, second = (diffusers.AutoencoderKL.from_pretrained(folders["vae"]) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(7)
    hf.assert_same(second, diffusers.AutoencoderKL.from_pretrained(folders["vae"]))


def test_from_pretrained_takes_a_folder_or_a_class(folders: dict[str, Path]) -> None:
    plain = make("unet")
    for words in ((folders["unet"],), (diffusers.UNet2DConditionModel, str(folders["unet"]))):
        ours = tensord.diffusers.from_pretrained(*words, strict=True)
        assert type(ours) is diffusers.UNet2DConditionModel
        hf.assert_same(ours, plain)


def test_what_goes_the_plain_way_is_told(folders: dict[str, Path]) -> None:
    with pytest.warns(tensord.TensordWarning, match="with disable_mmap diffusers reads it the plain way"):
        tensord.diffusers.from_pretrained(folders["vae"], disable_mmap=True)
    with pytest.raises(tensord.UnsupportedError, match="disable_mmap"):
        tensord.diffusers.from_pretrained(folders["vae"], disable_mmap=True, strict=True)


def test_pipeline_with_its_text_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=128, **sizes))
    parts = {"vae": make("vae"), "unet": make("unet"), "text_encoder": hf.randomize(encoder)}
    nothing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, **nothing, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **nothing)
    with tensord.diffusers.patch(strict=True) as loads:
        ours = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **nothing)
    assert {load.model for load in loads} == {"AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel"}
    for name in parts:
        hf.assert_same(getattr(ours, name), getattr(plain, name))
        shared = list(hf.parameters_in_shared_memory(getattr(ours, name)))
        assert len(shared) == sum(1 for _ in getattr(ours, name).parameters())


def test_no_daemon(
    folders: dict[str, Path], short_folder: Path, monkeypatch: pytest.MonkeyPatch, daemon: Daemon
) -> None:
    monkeypatch.setenv("TENSORD_RUNTIME_DIR", str(short_folder / "nobody"))
    with pytest.raises(tensord.UnavailableError):
        tensord.diffusers.from_pretrained(folders["vae"])
    with pytest.warns(tensord.TensordWarning, match="is read the plain way"):
        ours = tensord.diffusers.from_pretrained(folders["vae"], fallback=True)
    hf.assert_same(ours, make("vae"))
