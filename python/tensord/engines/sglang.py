"""SGLang: ``--load-format tensord``.

The entry point, of the group ``sglang.srt.plugins``, is called in every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

from ..errors import UnsupportedError
from .engine_parity import of_one_model, on_ranks
from .versions import Tested

NAME = "tensord"
TESTED = Tested("SGLang", "sglang", ("0.5.23",))

# What no checkpoint has: SGLang makes it itself, and keeps it where its values stay what they were.
LEAVES = ("*.act_fn.beta", "*.act_fn.eps", "*.normalizer")


def accept(original: Callable[[Any], Any], config: Any) -> Any:
    """Around LoadConfig's check of ``load_format``, a closed enumeration: our name becomes our class.

    SGLang's choice of a loader calls a class that stands there.
    """
    if config.load_format != NAME:
        return original(config)
    try:
        from .sglang_loader import TensordLoader
    except ImportError as error:
        raise UnsupportedError(
            f"--load-format {NAME}: SGLang {TESTED.version()}: {error}; --load-format auto is SGLang's own"
        ) from error
    config.load_format = TensordLoader
    return None


def register() -> None:
    """Adds the load format. SGLang logs what this raises and goes on without it: the name is then refused."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if NAME not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([NAME])
    HookRegistry.register(
        "sglang.srt.configs.load_config.LoadConfig._verify_load_format", accept, HookType.AROUND
    )


def parity_modules(path: str, *, tp: int = 1) -> Iterator[tuple[str, Any, Any]]:
    """For ``tensord parity``: of each rank its label, what SGLang's own loader made, and what ours did."""
    yield from of_one_model(on_ranks("tensord.engines.sglang_parity:rank_pairs", tp, [path], {}, {}))
