"""SGLang's own loader of safetensors, with the tensors from tensord."""

from __future__ import annotations

import copy
import logging
from typing import Any

from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.distributed.parallel_state import get_tp_group, model_parallel_is_initialized
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors
from sglang.srt.runtime_context import get_server_args

from ..errors import UnsupportedError
from .engine_load import EngineLoad, Weights
from .options import Options
from .ranks import Ranks
from .sglang import LEAVES, TESTED
from .summary import LoadSummary

log = logging.getLogger("sglang.tensord")

ENGINE_KEYS = ("enable_multithread_load", "num_threads")


def ranks() -> Ranks:
    return Ranks(get_tp_group().cpu_group if model_parallel_is_initialized() else None)


def plan_key(model_config: Any, load_config: Any) -> Any:
    """What decides, with checkpoint and module, which copies SGLang's loaders make. None: it may change."""
    arguments = get_server_args()
    if model_config is None or arguments is None or getattr(arguments, "enable_eplb", False):
        return None
    layout = ("tp_size", "ep_size", "pp_size", "dp_size", "enable_dp_attention", "moe_a2a_backend")
    more = ("moe_runner_backend", "ep_num_redundant_experts", "init_expert_location", "quantization")
    return {
        "engine": f"SGLang {TESTED.version()}",
        "config": model_config.hf_config.to_json_string(),
        "type": f"{model_config.dtype} {model_config.quantization}",
        "ranks": str(ranks()),
        "draft": load_config.draft_model_idx,
        "layout": [str(getattr(arguments, name, None)) for name in (*layout, *more)],
    }


class TensordLoader(DefaultModelLoader):  # type: ignore[misc]
    """``load_format="tensord"``.

    Which files, which tensors of them, how they are cut and what happens afterwards stays SGLang's; where the
    bytes come from does not.

    SGLang makes a loader for each load. One for a start is asked for a model; one for an update, first for
    tensors, which is the time to fail, then to load them.
    """

    def __init__(self, load_config: Any) -> None:
        self.options, rest = Options.read(load_config.model_loader_extra_config, ENGINE_KEYS)
        own = copy.copy(load_config)
        own.load_format, own.model_loader_extra_config = LoadFormat.AUTO, rest
        super().__init__(own)
        self._load: EngineLoad | None = None
        self.reports: list[LoadSummary] = []  # of the last load
        # Whose weights: of a start the model's configuration, of an update the source.
        self._asked: Any = None
        TESTED.say(log)

    def _new_load(self, model_config: Any) -> EngineLoad:
        return EngineLoad(
            self.options,
            ranks(),
            log,
            leaves=LEAVES,
            cache=plan_key(model_config, self.load_config) if self.options.cache else None,
            plain=not TESTED.is_tested(),
        )

    def load_model(self, *, model_config: Any, device_config: Any) -> Any:
        self._asked = model_config
        return super().load_model(model_config=model_config, device_config=device_config)

    def load_weights_and_postprocess(self, model: Any, weights: Any, target_device: Any) -> None:
        self.load_weights(model, weights, target_device)
        self.postprocess_weights(model, target_device)

    def load_weights(self, model: Any, weights: Any, target_device: Any) -> None:
        """The part that is ours."""
        load = self._load or self._new_load(self._asked)
        load.module, self._load = model, load

        def fill() -> None:
            given = self._own_weights(model) if load.is_fallen_back else weights
            self.load_weights_only(model, given, target_device)

        try:
            load.run(fill)
            self.reports = load.reports
        finally:
            self._load = None

    def _own_weights(self, model: Any) -> Any:
        if isinstance(self._asked, self.Source):
            return super()._get_weights_iterator(self._asked)
        return self._get_all_weights(self._asked, model)

    def _get_weights_iterator(self, source: Any, **rest: Any) -> Weights:
        is_update = self._load is None
        if self._load is None:
            self._load, self._asked = self._new_load(source.model_config), source
        if self._load.is_fallen_back:
            return super()._get_weights_iterator(source, **rest)  # type: ignore[no-any-return]
        try:
            files = self._files(source, rest.get("resolved_source"))
            draft = self.load_config.draft_model_idx
            if draft is None:
                return self._load.weights(files, source.prefix, wait=is_update)
            weights = self._load.weights(files, wait=is_update)
            return self._filter_mtp_weights(weights, source.prefix, draft)  # type: ignore[no-any-return]
        except Exception:
            if is_update:
                self._load = None
            raise

    def _files(self, source: Any, resolved: Any) -> list[str]:
        if resolved is not None:
            files, is_safetensors = list(resolved.weight_files), resolved.use_safetensors
        else:
            folder, files, is_safetensors = self._prepare_weights(
                source.model_or_path,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
            if is_safetensors and source.model_config is not None:
                index = "model.safetensors.index.json"
                files = maybe_add_mtp_safetensors(files, folder, index, source.model_config.hf_config)
        if not is_safetensors:
            raise UnsupportedError(
                f"load {source.model_or_path}: it has no .safetensors files but {', '.join(files[:3])}; "
                "tensord reads safetensors alone, --load-format auto loads the others"
            )
        return sorted(files)
