"""One engine in a process of its own: reads a line of JSON for each run, writes a line of JSON with the result.

    python tools/peer_worker.py nano_vllm|vllm|nanovllm|llama_cpp MODEL [OPTION=VALUE ...]

It imports nothing but the engine it measures, so it runs in a peer's environment as well."""
import functools
import json
import logging
import os
import random
import sys
import time
from types import SimpleNamespace


class LlamaCpp:
    """llama.cpp, asked as the others are: `generate` decodes all prompts side by side, as its server would with so many slots.

    It calls the C interface, which costs less than a server in between, and takes the likeliest token, which costs less than to draw one."""
    max_batch = 2048    # tokens in a call: llama.cpp's default

    def __init__(self, file: str):
        import llama_cpp
        import numpy
        self.lib, self.numpy = llama_cpp, numpy
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)   # it says much
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self.model: raise ValueError(f"llama.cpp cannot load {file}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.max_batch, 0, 1)
        self.contexts, self.cached = {}, []

    def context(self, num_seqs: int, longest: int):
        "A context with room for `num_seqs` sequences of `longest` tokens, made the first time."
        if (num_seqs, longest) not in self.contexts:
            params = self.lib.llama_context_default_params()
            params.n_seq_max, params.n_ctx, params.n_batch = num_seqs, num_seqs * longest, self.max_batch
            params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
            self.contexts[num_seqs, longest] = self.lib.llama_init_from_model(self.model, params)
        return self.contexts[num_seqs, longest]

    def decode(self, context, rows: list) -> list:
        "Compute (token, position, sequence, whether it samples) for all `rows`; the next tokens of those that sample."
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, seq, samples) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i] = token, position, seq, samples
            batch.n_seq_id[i] = 1
        if self.lib.llama_decode(context, batch): raise RuntimeError("llama_decode failed")
        num_samples = sum(row[3] for row in rows)
        if not num_samples: return []
        logits = self.lib.llama_get_logits(context)
        return self.numpy.ctypeslib.as_array(logits, (num_samples, self.vocab_size)).argmax(-1).tolist()

    def generate(self, prompts: list, params: list, use_tqdm: bool = False) -> list:
        "One prompt that begins as the one before it finds what that one left in the cache."
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        context = self.context(len(prompts), 8192 if len(prompts) == 1 else 512)
        memory, first = self.lib.llama_get_memory(context), 0
        if len(prompts) == 1 and self.cached and prompts[0][:len(self.cached)] == self.cached: first = len(self.cached)
        self.lib.llama_memory_seq_rm(memory, -1, first, -1)
        rows = [(token, i, seq, i == len(prompt) - 1) for seq, prompt in enumerate(prompts) for i, token in enumerate(prompt) if i >= first]
        answers = [[] for _ in prompts]
        while rows:
            now, rows = rows[:self.max_batch], rows[self.max_batch:]
            sampling = [seq for _, _, seq, samples in now if samples]
            for seq, token in zip(sampling, self.decode(context, now)): answers[seq].append(token)
            if rows: continue   # the prompts first
            rows = [(ids[-1], len(prompts[seq]) + len(ids) - 1, seq, True) for seq, ids in enumerate(answers) if len(ids) < params[seq].max_tokens]
        self.cached = prompts[0] if len(prompts) == 1 and params[0].max_tokens == 1 else []
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in answers]


class WithLists:
    "nano-vllm (nanovllm), which takes prompts as lists of ids, asked as the others are."
    def __init__(self, llm): self.llm = llm
    def generate(self, prompts, params, use_tqdm): return self.llm.generate([p["prompt_token_ids"] for p in prompts], params, use_tqdm=use_tqdm)


def start(engine: str, folder: str, **options):
    "(the engine, its SamplingParams); without a tokenizer, where the weights are random."
    if engine == "llama_cpp": return LlamaCpp(folder, **options), SimpleNamespace
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
