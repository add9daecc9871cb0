"""The tables of docs/ENGINES.md, out of what test_families.py left in build/engines: python table.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENVIRONMENTS = Path(__file__).resolve().parents[2] / "build" / "engines"
COLUMNS = "| model | class | tensors | copies | the plain way | tp=1 | tp=2 |"


def outcome(ranks: list[Any]) -> str:
    """Of one model and tp."""
    if not ranks:
        return "–"
    if any(one["error"] for one in ranks):
        return "refused by the engine"
    differing = sum(len(one["differences"]) for one in ranks)
    return f"{differing} differ" if differing else "equal"


def plain(one: Any) -> str:
    """How many tensors, and which operations made them so."""
    named = sorted({why.partition(".")[0].strip("_") for why in one["plain"].values()})
    return f"{len(one['plain'])} ({', '.join(named)})" if named else "0"


def lines(engine: str) -> list[str]:
    known: dict[int, list[Any]] = {}
    for tp in (1, 2):
        path = ENVIRONMENTS / f"parity-{engine}-{tp}.json"
        known[tp] = json.loads(path.read_text()) if path.exists() else []
    rows = [COLUMNS, "|---|---|---|---|---|---|---|"]
    for model in sorted({one["model"] for ranks in known.values() for one in ranks}):
        of = {tp: [one for one in known[tp] if one["model"] == model] for tp in known}
        one = (of[1] or of[2])[0]
        numbers = f"{one['tensors']} | {one['records']} | {plain(one)}"
        rows.append(f"| {model} | {one['architecture']} | {numbers} | {outcome(of[1])} | {outcome(of[2])} |")
    return rows


if __name__ == "__main__":
    for engine, title in (("vllm", "vLLM 0.32.0"), ("sglang", "SGLang 0.5.23")):
        print(f"### {title}\n" + "\n".join(lines(engine)) + "\n")
