"""Measure this engine on this machine: `make bench`. About five minutes on two idle cores; writes results/<machine>.json.

Every run has fresh random prompts, so no prefix cache helps where it should not. Chapters 19_benchmark and 20_latency explain
what is measured, and measure it on the engine as of these chapters; this is the finished one."""
import os
import statistics
import time
from multiprocessing import get_context

from nano_vllm import LLM
from nano_vllm.benchmark import Workload, random_workload, throughput
from nano_vllm.latency import latency, serve, serve_like, stall, summarize, with_prefix
from nano_vllm.workbench import record

MODEL = "smollm2-135m"
ROUNDS = 3
RATES = [1, 2, 4, 6, 8, 12, float("inf")]     # requests a second, to beyond the capacity
THRESHOLDS = 0, 256, 64, 16   # most tokens of one prompt in a step; 0: all that the budget allows


def requests(number: int, prompt: tuple, output: tuple, llm: LLM, seed: int) -> Workload:
    return random_workload(number, prompt, output, llm.vocab_size, seed)


def show(name: str, **figures):
    print(f"{name:24s}" + "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()), flush=True)


def throughputs(name: str, options: dict) -> dict:
    "The median of some runs of 32 requests with prompts and outputs of 16 to 256 tokens."
    llm = LLM(MODEL, **options)
    throughput(llm, requests(2, (8, 8), (4, 4), llm, seed=100))    # the first run warms up
    runs = [throughput(llm, requests(32, (16, 256), (16, 256), llm, seed)) for seed in range(ROUNDS)]
    run = sorted(runs, key=lambda r: r["output_tokens_per_second"])[ROUNDS // 2]
    show(f"throughput {name}", **{k: run[k] for k in ("output_tokens_per_second", "peak_memory")})
    return run


def latencies(llm: LLM, batch_size: int) -> dict:
    result = latency(llm, batch_size, input_len=32, output_len=64, num_iters=ROUNDS)
    show(f"latency, batch {batch_size}", seconds=result["avg_latency"])
    return result


def under_load(llm: LLM, rate: float) -> dict:
    "Forty requests with prompts of 16 to 128 and outputs of 16 to 64 tokens, the same at every rate."
    work = requests(40, (16, 128), (16, 64), llm, seed=200)
    result = serve_like(llm, work, rate)
    show(f"{rate:g} requests/s", **{k: result[k] for k in ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")})
    return result


def first_tokens(engines: dict, prefix_len: int) -> dict:
    "Mean time to the first token of 32 requests with a common prefix, there at the start, in ms: {engine: median}."
    runs = {name: [] for name in engines}
    for seed in range(300, 300 + ROUNDS if prefix_len == 0 else 301):
        for name, llm in engines.items():
            work = requests(32, (16, 32) if prefix_len else (16, 128), (8, 8), llm, seed)
            prefix = requests(1, (512, 512), (1, 1), llm, seed + 1).prompts[0][:prefix_len]
            runs[name].append(summarize(serve(llm, with_prefix(work, prefix), [0] * 32))["mean_ttft_ms"])
    result = {name: statistics.median(r) for name, r in runs.items()}
    show(f"mean TTFT, {prefix_len} shared", **result)
    return result


def stalls(threshold: int) -> dict:
    result = stall(LLM(MODEL, long_prefill_token_threshold=threshold))
    show(f"stall, threshold {threshold}", usual=result["usual"], longest=max(result["gaps"]))
    return result


def main():
    start, data = time.perf_counter(), {"throughput": {}}
    for name, options in dict(float32={}, int8=dict(quantization="int8", kv_cache_dtype="bfloat16")).items():
        with get_context("spawn").Pool(1) as alone:    # a process of its own, for its peak of memory
            data["throughput"][name] = alone.apply(throughputs, (name, options))
    llm, uncached = LLM(MODEL), LLM(MODEL, enable_prefix_caching=False)
    data["latency"] = {str(batch): latencies(llm, batch) for batch in (1, 8)}
    data["serve_like"] = [under_load(uncached, rate) for rate in RATES]
    engines = {"cache off": uncached, "cache on": llm}
    data["prefix"] = {f"{n} shared": first_tokens(engines, n) for n in (512, 0)}
    del llm, uncached, engines
    data["stall"] = {str(n): stalls(n) for n in THRESHOLDS}
    os.environ["NANO_VLLM_RECORD"] = "1"
    record("bench", data)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__": main()
