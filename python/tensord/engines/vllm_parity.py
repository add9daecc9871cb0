"""Parity of vLLM's model classes: built in processes of their own, without an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from .engine_parity import Pair, of_models, pair_of
from .vllm_loader import TensordLoader


class ParityLoader(TensordLoader):
    """Loads twice, and keeps what came of it in `pair`."""

    pair: Pair | None = None

    def load_weights(self, model: Any, model_config: Any) -> None:
        def own() -> None:
            DefaultModelLoader(self.load_config).load_weights(model, model_config)

        def ours() -> None:
            super(ParityLoader, self).load_weights(model, model_config)

        self.pair = pair_of(model_config.model, model, own, ours, lambda: self.reports)


def rank_pairs(
    rank: int, tp: int, address: str, paths: Sequence[str], options: dict[str, Any], engine: dict[str, Any]
) -> Iterator[Pair]:
    """One rank's pairs; `options` are ours, `engine` further arguments of vLLM's."""
    load_general_plugins()
    current_platform.import_kernels()
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    yield from of_models(rank, paths, lambda path: _pair(rank, tp, address, path, options, engine))


def _pair(
    rank: int, tp: int, address: str, path: str, options: dict[str, Any], engine: dict[str, Any]
) -> Pair:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_DIST_IDENT", address.rpartition(":")[2])  # names memory that ranks share
    settings = EngineArgs(
        model=path,
        tensor_parallel_size=tp,
        load_format="tensord",
        model_loader_extra_config=options,
        enforce_eager=True,
        max_model_len=128,
        **engine,
    ).create_engine_config()
    settings.parallel_config.rank = rank
    with set_current_vllm_config(settings):
        init_distributed_environment(
            tp, rank, address, rank, backend="gloo" if current_platform.is_cpu() else "nccl"
        )
        initialize_model_parallel(tp)
        try:
            loader = ParityLoader(settings.load_config)
            loader.load_model(vllm_config=settings, model_config=settings.model_config)
        finally:
            destroy_model_parallel()
    assert loader.pair is not None
    return loader.pair
