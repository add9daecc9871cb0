"""The verb `parity`: a model loaded twice, and every tensor compared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import Error, UnsupportedError
from .output import DONE, FAILED, Output, document
from .table import Table

ENGINES = ("torch", "transformers", "vllm", "sglang")

NAMED_MAX = 20  # tensors that differ, in the text

# Where engines' pairs of modules come from.
_MODULES = {
    "torch": "tensord.engines.torch_parity",
    "transformers": "tensord.engines.transformers_parity",
    "vllm": "tensord.engines.vllm",
    "sglang": "tensord.engines.sglang",
}


def examine(engine: str, path: str, tp: int) -> Output:
    """Compares what two loads of a model made.

    The engine's module has ``parity_modules(path, tp)``: for each rank its label, the module (or the snapshot
    of it, see `tensord.engines.parity`) that the engine's own loader made, and the one made through tensord.
    """
    ranks = [_rank(label, reference, loaded) for label, reference, loaded in _pairs(engine, path, tp)]
    is_equal = bool(ranks) and all(not rank["differences"] for rank in ranks)
    report = {"engine": engine, "model": path, "tp": tp, "is_equal": is_equal, "ranks": ranks}
    return Output(document(report), parity_text(report), DONE if is_equal else FAILED)


def _pairs(engine: str, path: str, tp: int) -> Iterator[tuple[str, Any, Any]]:
    if importlib.util.find_spec(engine) is None:
        raise UnsupportedError(
            f"parity {engine}: {engine} is not installed in {sys.prefix}; "
            "install tensord beside it, and call that one's command"
        )
    try:
        found = importlib.import_module(_MODULES[engine]).parity_modules
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"parity {engine}: it cannot be had here ({error}); install it beside tensord"
        ) from error
    try:
        yield from found(path, tp=tp)
    except Error:
        raise
    except Exception as error:
        raise UnsupportedError(f"parity {engine} {path}: {type(error).__name__}: {error}") from error


def _rank(label: str, reference: Any, loaded: Any) -> dict[str, Any]:
    compare = importlib.import_module("tensord.engines.parity").compare
    report = compare(reference, loaded)
    differences = [{"name": row.name, "problem": row.problem} for row in report.differences]
    return {"label": label, "tensor_count": len(report.rows), "differences": differences}


def parity_text(report: dict[str, Any]) -> str:
    """For people: a line for each rank, then what differs."""
    table = Table("rank", ">tensors", ">equal", ">different")
    lines = []
    for rank in report["ranks"]:
        count, differences = rank["tensor_count"], rank["differences"]
        table.add(rank["label"], str(count), str(count - len(differences)), str(len(differences)))
        lines += [f"{rank['label']}: {one['name']}: {one['problem']}" for one in differences]
    if len(lines) > NAMED_MAX:
        lines[NAMED_MAX:] = [f"and {len(lines) - NAMED_MAX} more; --json has all"]
    verdict = "every bit is the same" if report["is_equal"] else "they are NOT the same"
    title = f"{report['model']}, {report['engine']}, tp {report['tp']}: {verdict}"
    return "\n".join((title, table.text().rstrip("\n"), *lines)) + "\n"
