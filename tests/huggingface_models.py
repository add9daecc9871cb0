"""Tiny models of transformers and diffusers with random weights, and how loads of them are compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
DECODER = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
ENCODER = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}

# By a name: class, class of its configuration, and what is said in it.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "qwen3_tied": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **EXPERTS}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**DECODER, "num_local_experts": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**DECODER, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, "intermediate_size": 96}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", ENCODER),
    "roberta": ("RobertaModel", "RobertaConfig", ENCODER),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "vocab_size": 128},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "vocab_size": 128,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "vocab_size": 128,
            "num_mel_bins": 16,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "pad_token_id": 0,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}


def config_of(name: str, **more: Any) -> Any:
    import transformers

    _, config_class, options = ARCHITECTURES[name]
    return getattr(transformers, config_class)(**{**options, **more})


def class_of(name: str) -> Any:
    import transformers

    return getattr(transformers, ARCHITECTURES[name][0])


def randomize(model: Any) -> Any:
    """Every parameter: one that was left as it was made would hide a missing copy."""
    import torch

    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def write_model(name: str, folder: Path, shard_size: str = "1GB", **more: Any) -> Path:
    model = randomize(class_of(name)(config_of(name, **more)))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def all_tensors(model: Any) -> dict[str, Any]:
    """Parameters and buffers, also those that are not saved; and those with a second name."""
    return {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}


def assert_same(ours: Any, plain: Any) -> None:
    """Bit by bit: parameters and buffers, their types and shapes."""
    import torch

    mine, others = all_tensors(ours), all_tensors(plain)
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        other = others[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(as_bytes(tensor), as_bytes(other)), name


def shared_ranges() -> list[tuple[int, int]]:
    """This process's mappings of memory that the daemon handed out, as the kernel tells."""
    with Path("/proc/self/maps").open() as lines:
        fields = [line.split() for line in lines if "/memfd:tensord-segment" in line]
    return [(int(begin, 16), int(end, 16)) for begin, _, end in (one[0].partition("-") for one in fields)]


def parameters_in_shared_memory(model: Any) -> Iterator[str]:
    ranges = shared_ranges()
    for name, parameter in model.named_parameters():
        address = getattr(parameter, "_local_tensor", parameter).data_ptr()
        if any(begin <= address < end for begin, end in ranges):
            yield name
