"""Tiny random checkpoints of many architectures: config, shards of safetensors, tokenizer; a second each.

python tiny.py FOLDER [NAME ...]     makes FOLDER/NAME; without names all of MODELS

A name may have parts after it: qwen3_second is another model of the same shapes, qwen3-fp8 a quantised form.
Needs transformers, nothing from a network. Every parameter is random, norms and biases too: one that a loader
forgets would otherwise be 1 or 0 as it was before. A checkpoint that is there is kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

# hidden 256, 8 heads of 32, 4 of them for keys and values, so that two ranks halve everything.
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
_LATENT = {  # multi-head latent attention; vLLM's kernel for CPUs knows 512 + 64 alone
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_layer_freq": 1,
}
_YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "rope_theta": 10000.0,
}
_GPT = {
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 512,
    "n_inner": 512,
    "num_key_value_heads": ...,
}
_SLIDING = {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS_4 = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", **_LATENT}

# Name: the model_type of transformers and what differs from COMMON; `...` takes a key out.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", _SLIDING),
    "deepseek_v2": (
        "deepseek_v2",
        {"topk_method": "greedy", "scoring_func": "softmax", **_LATENT, "n_group": 1, "rope_scaling": _YARN},
    ),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK_V3, "rope_scaling": _YARN, "head_dim": 64}),
    "dots1": ("dots1", {**_DEEPSEEK_V3, "num_key_value_heads": 4, "layer_types": ["full_attention"] * 2}),
    "ernie4_5": ("ernie4_5", {"use_bias": False}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 128,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 1,
            "use_bias": False,
        },
    ),
    "exaone4": ("exaone4", _SLIDING),
    "falcon": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False, "bias": False, "head_dim": ...},
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 512,
            "mamba_n_heads": 16,
            "mamba_d_head": 32,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
    ),
    "gemma": ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("gemma2", {**_SLIDING, "query_pre_attn_scalar": 32, "hidden_act": "gelu_pytorch_tanh"}),
    # With large embeddings, which Gemma scales and ties, it would repeat what it is given.
    "gemma3": ("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 32, "initializer_range": 0.05}),
    "glm": ("glm", {"partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5}),
    "glm4_moe": ("glm4_moe", {**_DEEPSEEK_V3, "num_key_value_heads": 4, "use_qk_norm": True}),
    "gpt2": ("gpt2", _GPT),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT, "multi_query": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", {**_EXPERTS_4, **_SLIDING}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 16, "tie_word_embeddings": False}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", _EXPERTS_4),
    "granitemoeshared": ("granitemoeshared", {**_EXPERTS_4, "shared_intermediate_size": 256}),
    "hunyuan_dense": ("hunyuan_v1_dense", {"use_qk_norm": True}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "mamba": ("mamba", {"state_size": 16}),
    "mamba2": ("mamba2", {"num_heads": 16, "head_dim": 32, "n_groups": 2, "state_size": 16}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", _EXPERTS_4),
    "nemotron": ("nemotron", {"norm_eps": 1e-5}),
    "olmo": ("olmo", {"num_key_value_heads": 8}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _SLIDING),
    "olmoe": ("olmoe", {**_MOE, "num_key_value_heads": 8}),
    "opt": ("opt", {"ffn_dim": 512, "word_embed_proj_dim": 256}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 8, "intermediate_size": 1024}),
    "phi3": ("phi3", {}),
    "phimoe": ("phimoe", {**_EXPERTS_4, "lm_head_bias": True, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "qwen3_next": (
        "qwen3_next",
        {
            **_MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 128,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {}),
}

# The same shapes with other weights: what a running engine is updated to.
SECOND = "_second"

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "weights are read once and handed to many",
    "hello world this is a tiny model",
    "one two three four five six seven eight nine ten",
)


def write_tokenizer(folder: Path) -> None:
    """A word is a token; filled up so that every id of the vocabulary can be decoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(vocab_size=256, special_tokens=special))
    words.add_tokens([f"w{number}" for number in range(COMMON["vocab_size"] - words.get_vocab_size())])
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def recipe(name: str) -> dict[str, Any]:
    """All a checkpoint is made of, so that one made by another recipe is made again."""
    plain, _, kind = name.partition("-")
    model_type, differences = MODELS[plain.removesuffix(SECOND)]
    seed = int(plain.endswith(SECOND))
    values = {"model_type": model_type, "kind": kind, "seed": seed, **COMMON, **differences}
    return {key: value for key, value in values.items() if value is not ...}


def make(folder: Path, name: str) -> Path:
    """The checkpoint `name` in bfloat16, in shards of 200 kB."""
    import torch
    from quantize import quantize
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = recipe(name)
    stamp = folder / name / "recipe"
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return stamp.parent
    kind = wanted.pop("kind")
    if kind:
        quantize(make(folder, name.partition("-")[0]), stamp.parent, kind)
        stamp.write_text(digest)
        return stamp.parent
    torch.manual_seed(wanted.pop("seed"))
    config = AutoConfig.for_model(wanted.pop("model_type"), **wanted)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    model.save_pretrained(stamp.parent, max_shard_size="200KB")
    write_tokenizer(stamp.parent)
    stamp.write_text(digest)
    return stamp.parent


def main(words: list[str]) -> int:
    failed = 0
    for name in words[1:] or MODELS:
        try:
            made = make(Path(words[0]), name)
            print(name, sum(1 for _ in made.glob("*.safetensors")), "files", flush=True)
        except Exception as error:
            failed += 1
            print(name, "FAILED", type(error).__name__, str(error)[:300], flush=True)
            traceback.print_exc()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
