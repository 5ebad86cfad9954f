#!/usr/bin/env python3
"""Writes nbs/labs/logits.json: what the demo model says after a few prompts, for the sampling lab.

The likeliest tokens are listed with their logits. Of the others only a sum is kept for each temperature that the lab
offers: the logarithm of the sum of exp(logit / temperature), which is all that a softmax needs of them.
"""
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nano_vllm.workbench import fetch

TARGET = Path(__file__).parents[1]/"nbs/labs/logits.json"
LISTED = 1000
TEMPERATURES = [i/10 for i in range(1, 21)]
PROMPTS = [
    ("A story", "The old lighthouse stood at the end of the pier. Every evening the keeper climbed the stairs, lit the "
                "lamp and looked out over the water. One night, when the wind was strong, he saw a"),
    ("A fact", "The Eiffel Tower is the most famous monument of the city of"),
    ("A list", "My favourite fruits are apples, pears and")]


def entry(title, text, logits, tokenizer):
    "What the lab gets of the `logits` (V,) after `text`."
    best = logits.topk(LISTED)
    rest = logits.double().clone()
    rest[best.indices] = -torch.inf
    return dict(title=title, text=text, vocab_size=len(logits), ids=best.indices.tolist(),
                texts=[tokenizer.decode([i]) for i in best.indices.tolist()],
                logits=[round(x, 3) for x in best.values.tolist()],
                rest={str(t): round(float((rest/t).logsumexp(0)), 3) for t in TEMPERATURES})


@torch.inference_mode()
def entries():
    "One entry for each prompt."
    path = fetch()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for title, text in PROMPTS:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        yield entry(title, text, logits, tokenizer)


if __name__ == "__main__":
    lines = [json.dumps(e, ensure_ascii=False) for e in entries()]
    TARGET.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
