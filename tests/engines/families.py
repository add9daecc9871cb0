"""Parity of many models in one process a rank: python families.py ENGINE TP SETTINGS FOLDER...

SETTINGS is JSON: {"options": ours, "engine": the engine's arguments}. Prints a line RESULT for each model and
rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
ENGINE = {
    "vllm": {},
    "sglang": {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "log_level": "error",
    },
}


def main(words: list[str]) -> None:
    from tensord.engines.engine_parity import on_ranks
    from tensord.engines.parity import compare

    engine, tp, settings, *folders = words
    given = json.loads(settings)
    arguments = {**ENGINE[engine], **given.get("engine", {})}
    work = f"tensord.engines.{engine}_parity:rank_pairs"
    for pair in on_ranks(work, int(tp), folders, given.get("options", {}), arguments):
        rows = compare(pair.reference, pair.loaded)
        said = {
            "model": Path(pair.model).name,
            "rank": pair.rank,
            "architecture": pair.architecture,
            "tensors": pair.tensor_count,
            "records": pair.record_count,
            "plain": pair.plain,
            "cache": pair.cache,
            "compared": len(rows.rows),
            "differences": [f"{row.name}: {row.problem}" for row in rows.differences],
            "error": pair.error,
        }
        print("RESULT", json.dumps(said), flush=True)


if __name__ == "__main__":  # ranks are spawned from this file
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    main(sys.argv[1:])
