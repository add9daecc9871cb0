"""A whole vLLM engine on the CPU that does what it is told.

python vllm_steps.py '{"model": ..., "steps": [...]}'    or a list of such tasks, for one engine after another

Prints a line RESULT with JSON for every step; the tests compare them. Keys, and what they are when left out:

    model             folder
    load_format       "auto"
    options           {}         model_loader_extra_config
    tp, ep, dtype     1, false, "float32"
    engine            {}         further arguments of LLM
    steps             ["generate"]; further: ["reload"], ["reload", FOLDER], ["sleep", LEVEL], ["wake"],
                      ["fail?", STEP]
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes a large share of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several ranks on one NUMA node
}
PROMPTS = ("the quick brown fox", "hello world")


def result(step: Any, value: Any, begin: float) -> None:
    print(
        "RESULT", json.dumps({"step": step, "value": value, "seconds": time.monotonic() - begin}), flush=True
    )


def tokens(engine: Any, prompts: Any) -> list[list[int]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    return [list(one.outputs[0].token_ids) for one in engine.generate(list(prompts), wanted, use_tqdm=False)]


def do(engine: Any, step: Any, prompts: Any) -> Any:
    verb, *words = [step] if isinstance(step, str) else step
    if verb == "generate":
        return tokens(engine, prompts)
    if verb == "reload":
        return engine.collective_rpc("reload_weights", kwargs={"weights_path": words[0]} if words else {})
    if verb == "sleep":
        return engine.sleep(level=words[0])
    if verb == "wake":
        return engine.wake_up()
    if verb == "fail?":
        try:
            do(engine, words[0], prompts)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
    raise ValueError(f"no step {verb!r}")


def run(task: dict[str, Any]) -> None:
    """One engine, from its start to its end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    begin = time.monotonic()
    engine = LLM(
        task["model"],
        load_format=task.get("load_format", "auto"),
        model_loader_extra_config=task.get("options", {}),
        tensor_parallel_size=task.get("tp", 1),
        enable_expert_parallel=task.get("ep", False),
        dtype=task.get("dtype", "float32"),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        **task.get("engine", {}),
    )
    result("start", None, begin)
    for step in task.get("steps", ["generate"]):
        begin = time.monotonic()
        result(step, do(engine, step, task.get("prompts", PROMPTS)), begin)
    del engine
    cleanup_dist_env_and_memory()


def main() -> None:
    begin = time.monotonic()
    import vllm  # noqa: F401

    result("import", None, begin)
    if len(TASKS) == 1:
        run(TASKS[0])
        return
    for number, task in enumerate(TASKS):
        try:
            run(task)
        except Exception as error:  # the tasks after it shall be done
            traceback.print_exc()
            result("error", f"{type(error).__name__}: {error}", begin)
        print("RESULT", json.dumps({"step": "task", "value": number}), flush=True)


GIVEN = json.loads(sys.argv[1]) if len(sys.argv) > 1 else []
TASKS = GIVEN if isinstance(GIVEN, list) else [GIVEN]

if __name__ == "__main__":  # the engine spawns its workers from this file
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if all(task.get("tp", 1) == 1 for task in TASKS):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # 30 s less to start
    main()
