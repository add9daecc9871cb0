"""vLLM: ``--load-format tensord``.

The entry point, of the group ``vllm.general_plugins``, is called in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import UnsupportedError
from .engine_parity import of_one_model, on_ranks
from .versions import Tested

NAME = "tensord"
TESTED = Tested("vLLM", "vllm", ("0.32",))


def register() -> None:
    """Adds the load format; may be called again. Other load formats work whatever happens here."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

    if NAME not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(NAME)(_loader())


def _loader() -> Any:
    try:
        from .vllm_loader import TensordLoader
    except Exception as error:
        return _refusing(error)
    return TensordLoader


def _refusing(error: Exception) -> Any:
    """A loader that says, when it is asked for, why there is none."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    text = f"--load-format {NAME}: vLLM {TESTED.version()}: {type(error).__name__}: {error}"

    class Refusing(BaseModelLoader):  # type: ignore[misc]
        def __init__(self, load_config: Any) -> None:
            raise UnsupportedError(f"{text}; --load-format auto is vLLM's own") from error

        def download_model(self, model_config: Any) -> None: ...

        def load_weights(self, model: Any, model_config: Any) -> None: ...

    return Refusing


def parity_modules(path: str, *, tp: int = 1) -> Iterator[tuple[str, Any, Any]]:
    """For ``tensord parity``: of each rank its label, what vLLM's own loader made, and what ours did."""
    yield from of_one_model(on_ranks("tensord.engines.vllm_parity:rank_pairs", tp, [path], {}, {}))
