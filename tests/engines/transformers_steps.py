"""The tokens that transformers generates: python transformers_steps.py '{"model": ..., "prompts": [...]}'"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    task = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    dtype = getattr(torch, task.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).eval()
    tokens, texts = [], []
    for prompt in task["prompts"]:
        given = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(given, do_sample=False, max_new_tokens=16, min_new_tokens=16)[0][
            given.shape[1] :
        ]
        tokens.append(made.tolist())
        texts.append(tokenizer.decode(made))
    print("RESULT", json.dumps({"step": "generate", "value": tokens}))
    print("RESULT", json.dumps({"step": "text", "value": texts}))


if __name__ == "__main__":
    main()
