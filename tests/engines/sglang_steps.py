"""A whole SGLang engine on the CPU that does what it is told.

python sglang_steps.py '{"model": ..., "steps": [...]}'

As vllm_steps.py; steps are "generate", ["update", FOLDER], ["update", FOLDER, LOAD_FORMAT], ["fail?", STEP].
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SETTINGS = {"HF_HUB_OFFLINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
PROMPTS = ("the quick brown fox", "hello world")


def result(step: Any, value: Any, begin: float) -> None:
    print(
        "RESULT", json.dumps({"step": step, "value": value, "seconds": time.monotonic() - begin}), flush=True
    )


def tokens(engine: Any, prompts: Any) -> list[list[int]]:
    wanted = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    return [one["output_ids"] for one in engine.generate(list(prompts), wanted)]


def update(engine: Any, path: str, load_format: str) -> Any:
    """Again until the cache was flushed too, for which the scheduler must have seen the last request end."""
    deadline = time.monotonic() + 60
    while True:
        done = engine.update_weights_from_disk(path, load_format=load_format)
        if done[0] or "cache was not flushed" not in done[1] or time.monotonic() > deadline:
            return done
        time.sleep(0.2)


def do(engine: Any, step: Any, task: dict[str, Any]) -> Any:
    verb, *words = [step] if isinstance(step, str) else step
    if verb == "generate":
        return tokens(engine, task.get("prompts", PROMPTS))
    if verb == "update":
        load_format = words[1] if len(words) > 1 else task.get("load_format", "auto")
        return update(engine, words[0], load_format)
    if verb == "fail?":
        try:
            return do(engine, words[0], task)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    raise ValueError(f"no step {verb!r}")


def main() -> None:
    task = json.loads(sys.argv[1])
    begin = time.monotonic()
    import sglang

    result("import", None, begin)
    begin = time.monotonic()
    engine = sglang.Engine(
        model_path=task["model"],
        load_format=task.get("load_format", "auto"),
        model_loader_extra_config=json.dumps(task.get("options", {})),
        tp_size=task.get("tp", 1),
        ep_size=task.get("ep", 1),
        dtype=task.get("dtype", "float32"),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        max_total_tokens=2048,
        max_running_requests=4,
        skip_server_warmup=True,
        log_level="info",
        **task.get("engine", {}),
    )
    result("start", None, begin)
    for step in task.get("steps", ["generate"]):
        begin = time.monotonic()
        result(step, do(engine, step, task), begin)
    engine.shutdown()


if __name__ == "__main__":  # the engine spawns its workers from this file
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    main()
