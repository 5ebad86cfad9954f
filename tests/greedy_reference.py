"Writes data/greedy_reference.json: what transformers' `generate` says to each of prompts.json, alone, in fp32: 64 greedy tokens."
import json
from functools import cache
from pathlib import Path

import torch
import transformers
from nano_vllm.workbench import fetch

DATA, NUM_TOKENS = Path(__file__).parent/"data", 64


@cache
def load_hf():
    "transformers' own demo model, and its tokenizer."
    model = transformers.AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(fetch())


@torch.inference_mode()
def hf_greedy(model, ids, num_tokens=NUM_TOKENS, eos=None):
    "What generate adds to the token ids `ids`; it goes on after an end of text unless that is given as `eos`."
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False,
                         eos_token_id=eos, pad_token_id=0)
    return out[0, len(ids):].tolist()


if __name__ == "__main__":
    model, tokenizer = load_hf()
    entries = []
    for prompt in json.loads((DATA/"prompts.json").read_text()):
        ids = tokenizer.encode(prompt)
        entries.append(dict(prompt_token_ids=ids, token_ids=hf_greedy(model, ids)))
        print(len(entries), len(ids), flush=True)
    (DATA/"greedy_reference.json").write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
