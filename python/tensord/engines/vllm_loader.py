"""vLLM's own loader of safetensors, with the tensors from tensord."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from ..errors import UnsupportedError
from .engine_load import EngineLoad, Weights
from .options import Options
from .ranks import Ranks
from .summary import LoadSummary
from .vllm import TESTED

# vLLM has handlers for what is below "vllm" alone: a logger of our own would be mute in its workers.
log = init_logger("vllm.tensord")

# Buffers that vLLM makes itself, and parameters that come from a configuration.
LEAVES = ("*._[kvq]_scale", "*._prob_scale", "*.input_scale_ub")

ENGINE_KEYS = ("enable_weights_track", "enable_multithread_load", "num_threads")


def ranks() -> Ranks:
    return Ranks(get_tp_group().cpu_group if model_parallel_is_initialized() else None)


def leaves(model: Any) -> list[str]:
    """What a checkpoint may lack: besides LEAVES, scales of a quantised cache, which have defaults."""
    found = [
        f"{name}.*"
        for name, part in model.named_modules()
        if isinstance(getattr(part, "quant_method", None), BaseKVCacheMethod)
    ]
    return [*LEAVES, *found]


def plan_key(model_config: Any) -> Any:
    """What decides, with checkpoint and module, which copies vLLM's loaders make. None: it may change."""
    parallel = get_current_vllm_config().parallel_config
    if parallel.enable_eplb:
        return None
    layout = (
        "pipeline_parallel_size",
        "data_parallel_size",
        "data_parallel_rank",
        "rank",
        "enable_expert_parallel",
    )
    return {
        "engine": f"vLLM {TESTED.version()}",
        "config": model_config.hf_config.to_json_string(),
        "type": f"{model_config.dtype} {model_config.quantization}",
        "ranks": str(ranks()),
        "layout": [str(getattr(parallel, name, None)) for name in (*layout, "expert_placement_strategy")],
    }


class TensordLoader(DefaultModelLoader):  # type: ignore[misc]
    """``load_format="tensord"``.

    Which files, which tensors of them, how they are cut and what happens afterwards stays vLLM's; where their
    bytes come from does not.
    """

    def __init__(self, load_config: Any) -> None:
        self.options, rest = Options.read(load_config.model_loader_extra_config, ENGINE_KEYS)
        own = copy.copy(load_config)
        own.load_format, own.model_loader_extra_config = "auto", rest
        super().__init__(own)
        self.reports: list[LoadSummary] = []  # of the last load
        self._load: EngineLoad | None = None
        TESTED.say(log)

    def _new_load(self, module: Any, **how: Any) -> EngineLoad:
        return EngineLoad(self.options, ranks(), log, module, **how)

    def load_weights(self, model: Any, model_config: Any) -> None:
        # Meta: it is quantised while it is loaded.
        is_deferred = any(parameter.is_meta for parameter in model.parameters())
        self._load = self._new_load(
            model,
            leaves=leaves(model),
            plain=is_deferred or not TESTED.is_tested(),
            cache=plan_key(model_config) if self.options.cache else None,
        )
        try:
            self._load.run(lambda: super(TensordLoader, self).load_weights(model, model_config))
            self.reports = self._load.reports
        finally:
            self._load = None

    def track_weights_loading(self, model: Any, loaded_weights: Any, *rest: Any, **named: Any) -> None:
        if self._load is not None and self._load.replayed and loaded_weights is not None:
            loaded_weights = loaded_weights | self._load.written()
        super().track_weights_loading(model, loaded_weights, *rest, **named)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Any]]:
        """All tensors of a model; outside of `load_weights` for a reload, when all their bytes are there."""
        if self._load is not None:
            return super().get_all_weights(model_config, model)  # type: ignore[no-any-return]
        primary = self.Source(
            model_config.model,
            model_config.revision,
            fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
            allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
        )
        sources = [primary, *getattr(model, "secondary_weights", ())]
        return chain.from_iterable([self._get_weights_iterator(source) for source in sources])

    def _get_weights_iterator(self, source: Any) -> Weights:
        load = self._load
        if load is not None and load.is_fallen_back:
            return super()._get_weights_iterator(source)  # type: ignore[no-any-return]
        files = self._files(source)
        give = load.weights if load is not None else self._new_load(None).update

        def keep(name: str) -> bool:
            return not should_skip_weight(name, self.local_expert_ids)

        return give(files, source.prefix, keep)

    def _files(self, source: Any) -> list[str]:
        _, files, is_safetensors, *_ = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        if not is_safetensors:
            raise UnsupportedError(
                f"load {source.model_or_path}: it has no .safetensors files but {', '.join(files[:3])}; "
                "tensord reads safetensors alone, --load-format auto loads the others"
            )
        return sorted(files)
