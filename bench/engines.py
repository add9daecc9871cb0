"""vLLM's and SGLang's own safetensors loaders against tensord: hot, from first byte to last parameter.

    build/engines/vllm/bin/python bench/engines.py vllm [--tp 2] [--gib 1.5] [--rounds 7] [--folder DIR]

Each rank builds the engine's own model class once and fills it by either loader in turn, so that
what else the machine does hits both. A round begins at a barrier and ends when the slowest rank has all
parameters; the engine's loader runs as the release has it by default. Tensors are compared
afterwards. The first round, in which the daemon and the page cache read the files, is not counted. "plain" is
the least there is to do: torch's copy_ of the same bytes out of tensors in memory, in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engines"))

LAYERS_BYTES = 2 * (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 6144 * 2048)  # one layer of the model below


def make_model(folder: Path, gib: float) -> Path:
    """A random Qwen3 of that size: hidden 2048, 16 heads of 128, 4 for keys and values, in files of 1 GB."""
    import torch
    from tiny import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = max(round(gib * 2**30 / LAYERS_BYTES), 1)
    made = folder / f"qwen3-{layers}"
    if (made / "config.json").exists():
        return made
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0, 16000)  # finite, whatever the bits
    model.save_pretrained(made, max_shard_size="1GB")
    write_tokenizer(made)
    return made


def copy_all(copies: list[tuple[Any, Any]]) -> None:
    for target, source in copies:
        target.copy_(source)


def rounds(
    rank: int, fills: dict[str, Callable[[], Any]], count: int, module: Any
) -> Iterator[dict[str, Any]]:
    """Seconds of each fill and round; after the first round all are warm."""
    import torch.distributed
    from tensord.engines.parity import compare, snapshot

    made = {}
    for number in range(count + 1):
        for name, fill in fills.items():
            torch.distributed.barrier()
            begin = time.monotonic()
            fill()
            own = time.monotonic() - begin
            torch.distributed.barrier()
            seconds = time.monotonic() - begin
            if number == 0:
                made[name] = snapshot(module)
            else:
                yield {"rank": rank, "name": name, "seconds": seconds, "own_seconds": own}
        if number == 0:
            copies = [(parameter.data, parameter.data.clone()) for parameter in module.parameters()]
            fills = {**fills, "plain": functools.partial(copy_all, copies)}
    first, *others = made.values()
    yield {"rank": rank, "is_equal": all(compare(first, other).is_equal for other in others)}


def vllm_rank(rank: int, tp: int, address: str, path: str, count: int) -> Iterator[dict[str, Any]]:
    os.environ["VLLM_DIST_IDENT"] = address.rpartition(":")[2]
    from tensord.engines.vllm_loader import TensordLoader
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.utils.torch_utils import set_default_torch_dtype

    load_general_plugins()
    current_platform.import_kernels()

    def settings(load_format: str) -> Any:
        return EngineArgs(
            model=path,
            tensor_parallel_size=tp,
            load_format=load_format,
            enforce_eager=True,
            max_model_len=128,
        ).create_engine_config()

    own, ours = settings("auto"), settings("tensord")
    own.parallel_config.rank = rank
    with set_current_vllm_config(own):
        init_distributed_environment(tp, rank, address, rank, backend="gloo")
        initialize_model_parallel(tp)
        with set_default_torch_dtype(own.model_config.dtype):
            module = initialize_model(vllm_config=own, model_config=own.model_config)
        own_loader, loader = get_model_loader(own.load_config), TensordLoader(ours.load_config)
        fills = {
            "own": lambda: own_loader.load_weights(module, own.model_config),
            "tensord": lambda: loader.load_weights(module, own.model_config),
        }
        yield from rounds(rank, fills, count, module)


def sglang_rank(rank: int, tp: int, address: str, path: str, count: int) -> Iterator[dict[str, Any]]:
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import init_dp_gathered_buffer, initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader.loader import DefaultModelLoader, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from tensord.engines.sglang_loader import TensordLoader

    load_plugins()
    settings = ServerArgs(
        model_path=path,
        tp_size=tp,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
    )
    publish(settings, role="weight_cache_daemon", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    model_config = ModelConfig(model_path=path, dtype=settings.dtype)
    initialize_moe_config()
    init_distributed_environment(tp, rank, distributed_init_method=address, local_rank=rank, backend="gloo")
    initialize_model_parallel()
    initialize_dp_attention(settings)
    init_dp_gathered_buffer(model_config)
    own, ours = LoadConfig(tp_rank=rank), LoadConfig(load_format="tensord", tp_rank=rank)
    with set_default_torch_dtype(model_config.dtype):
        module = _initialize_model(model_config, own, None)
    device = torch.device("cpu")

    def fill(loader: Any, load_weights: Callable[..., Any]) -> None:
        load_weights(module, loader._get_all_weights(model_config, module), device)

    def fill_ours() -> None:
        loader = TensordLoader(ours)
        loader._asked = model_config
        fill(loader, loader.load_weights)

    fills = {
        "own": lambda: fill(DefaultModelLoader(own), DefaultModelLoader.load_weights_only),
        "tensord": fill_ours,
    }
    yield from rounds(rank, fills, count, module)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("engine", choices=("vllm", "sglang"))
    words.add_argument("--tp", type=int, default=2)
    words.add_argument("--gib", type=float, default=1.5)
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--folder", type=Path, default=Path("build/engines/models"))
    given = words.parse_args()
    from tensord.engines.engine_parity import on_ranks

    model = make_model(given.folder, given.gib)
    said = list(on_ranks(f"engines:{given.engine}_rank", given.tp, str(model), given.rounds))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    medians = {}
    for name in ("own", "tensord", "plain"):
        seconds = [one["seconds"] for one in said if one.get("name") == name and one["rank"] == 0]
        medians[name] = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        rate = size / medians[name] / 1e9
        print(f"{given.engine} {name}: {medians[name]:.3f} s ({spread}), {rate:.2f} GB/s of the checkpoint")
    is_equal = all(one["is_equal"] for one in said if "is_equal" in one)
    result = {
        "engine": given.engine,
        "tp": given.tp,
        "bytes": size,
        "seconds": medians,
        "ratio": medians["own"] / medians["tensord"],
        "of_plain": medians["plain"] / medians["tensord"],
        "is_equal": is_equal,
    }
    print(json.dumps(result))
    sys.exit(not is_equal)


if __name__ == "__main__":  # ranks are spawned from this file, as the module `engines`
    for variable, value in {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(variable, value)
    main()
