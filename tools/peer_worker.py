"""One engine in a process of its own: reads a line of JSON for each run, writes a line of JSON with the result.

    python tools/peer_worker.py nano_vllm|vllm|nanovllm MODEL_FOLDER [OPTION=VALUE ...]

It imports nothing but the engine it measures, so it runs in a peer's environment as well."""
import functools
import json
import os
import random
import sys
import time

class WithLists:
    "nano-vllm (nanovllm), which takes prompts as lists of ids, asked as the others are."
    def __init__(self, llm): self.llm = llm
    def generate(self, prompts, params, use_tqdm): return self.llm.generate([p["prompt_token_ids"] for p in prompts], params, use_tqdm=use_tqdm)


def start(engine: str, folder: str, **options):
    "(the engine, its SamplingParams); without a tokenizer, where the weights are random."
    options = dict(max_model_len=8192) | {name: int(value) if value.isdigit() else value for name, value in options.items()}
    if engine == "nanovllm":
        from nanovllm import LLM, SamplingParams
        return WithLists(LLM(folder, **options)), SamplingParams
    if engine == "vllm":
        from vllm import LLM, SamplingParams
        if options.get("load_format") == "dummy":
            options["skip_tokenizer_init"] = True
            SamplingParams = functools.partial(SamplingParams, detokenize=False)
        return LLM(folder, disable_log_stats=True, **options), SamplingParams
    from nano_vllm import LLM, SamplingParams
    return LLM(folder, **options), SamplingParams


def length(out) -> int:
    "How many tokens were generated; nano-vllm gives dicts."
    return len(out["token_ids"] if isinstance(out, dict) else out.outputs[0].token_ids)


def run(llm, params_class, requests: int, prompt: list[int], output: list[int], seed: int, after: int = 0, vocab_size: int = 49152) -> dict:
    """Generate once: fresh random prompts with lengths uniform in `prompt`, answers with lengths uniform in `output`.

    `after`: so many tokens, which were computed before, stand before each prompt."""
    rng = random.Random(seed)
    def tokens(n): return [rng.randrange(100, vocab_size) for _ in range(n)]
    def params(n): return params_class(temperature=0.6, max_tokens=n, ignore_eos=True)
    before = tokens(after)
    if before: llm.generate([{"prompt_token_ids": before}], [params(1)], use_tqdm=False)
    prompts = [before + tokens(rng.randint(*prompt)) for _ in range(requests)]
    params = [params(rng.randint(*output)) for _ in prompts]
    start = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    count = sum(map(length, outs))
    assert count == sum(p.max_tokens for p in params)
    return dict(seconds=seconds, output_tokens=count, output_tokens_per_second=count / seconds)


def main(engine, folder, *options):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # what engines and their processes print is not for the one who reads our answers
    def answer(data): print(json.dumps(data), file=answers, flush=True)
    begin = time.perf_counter()
    started = start(engine, folder, **dict(o.split("=") for o in options))
    run(*started, requests=2, prompt=[8, 8], output=[4, 4], seed=10**6, vocab_size=200)
    answer(dict(start_up=time.perf_counter() - begin))
    for line in sys.stdin: answer(run(*started, **json.loads(line)))


if __name__ == "__main__": main(*sys.argv[1:])   # vLLM's own processes import this file once more
