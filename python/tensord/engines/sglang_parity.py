"""Parity of SGLang's model classes: built in processes of their own, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.layers.dp_attention import init_dp_gathered_buffer, initialize_dp_attention
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import get_device

from .engine_parity import Pair, of_models, pair_of
from .sglang_loader import TensordLoader


class ParityLoader(TensordLoader):
    """Loads twice, and keeps what came of it in `pair`."""

    pair: Pair | None = None

    def load_weights_and_postprocess(self, model: Any, weights: Any, target_device: Any) -> None:
        def own() -> None:
            loader = DefaultModelLoader(self.load_config)
            given = loader._get_all_weights(self._asked, model)
            loader.load_weights_only(model, given, target_device)

        def ours() -> None:
            self.load_weights(model, weights, target_device)

        self.pair = pair_of(self._asked.model_path, model, own, ours, lambda: self.reports)
        self.postprocess_weights(model, target_device)


def rank_pairs(
    rank: int, tp: int, address: str, paths: Sequence[str], options: dict[str, Any], engine: dict[str, Any]
) -> Iterator[Pair]:
    """One rank's pairs; `options` are ours, `engine` further arguments of SGLang's."""
    load_plugins()
    yield from of_models(rank, paths, lambda path: _pair(rank, tp, address, path, options, engine))


def _pair(
    rank: int, tp: int, address: str, path: str, options: dict[str, Any], engine: dict[str, Any]
) -> Pair:
    chosen = {"device": get_device(), **engine}  # SGLang itself resolves it later
    settings = ServerArgs(
        model_path=path, tp_size=tp, load_format="tensord", disable_cuda_graph=True, **chosen
    )
    publish(settings, role="weight_cache_daemon", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    model_config = ModelConfig(model_path=path, dtype=settings.dtype)
    initialize_moe_config()
    backend = "gloo" if settings.device == "cpu" else "nccl"
    init_distributed_environment(tp, rank, distributed_init_method=address, local_rank=rank, backend=backend)
    initialize_model_parallel()
    try:
        initialize_dp_attention(settings)
        init_dp_gathered_buffer(model_config)
        loader = ParityLoader(
            LoadConfig(load_format="tensord", model_loader_extra_config=dict(options), tp_rank=rank)
        )
        loader.load_model(model_config=model_config, device_config=DeviceConfig(settings.device, rank))
    finally:
        destroy_model_parallel()
    assert loader.pair is not None
    return loader.pair
