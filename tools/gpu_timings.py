"""Parts `kernels`, `throughput`, `ablations` and `peers` of the GPU suite: how fast is it, and against what bound?"""
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gpu_checks import attend, captured, device, fp8_product, lacks_fp8, rows_case, with_weights
from nano_vllm import LLM
from nano_vllm.attention import Batch
from nano_vllm.benchmark import random_workload, throughput as measured_throughput
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.fp8 import quantize_fp8
from nano_vllm.fusions import CountingRecorder, compiled as compiled_function, launches as count_launches, norm_rotate_store, split_norm_rotate
from nano_vllm.kv_blocks import Sequence
from nano_vllm.model import ModelConfig
from nano_vllm.sampler import SamplingMetadata, sample
from nano_vllm.sampling_kernels import fused_sample
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.triton_attention import AttentionMetadata, Tiles, TritonAttention
from nano_vllm.triton_kernels import store_kv
from nano_vllm.workbench import timed

CONFIGS = Path(__file__).resolve().parent.parent/"nbs/data/configs"
TOY_CONFIG = ('{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,'
              '"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,'
              '"tie_word_embeddings": true, "dtype": "float32"}')


def model_folder(toy: bool) -> Path:
    "The folder of the model that is measured: a config.json, and no weights."
    if not toy: return CONFIGS/"qwen3-0.6b"
    folder = Path(tempfile.mkdtemp(prefix="gpu-suite-config-"))
    (folder/"config.json").write_text(TOY_CONFIG)
    return folder


# ---- single kernels

def seconds(run, toy: bool, repeat: int = 20) -> float:
    "Median time of `run`, after warming up: by events on a GPU, by the clock otherwise."
    if toy: return timed(run, 2)
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(toy: bool) -> float:
    "Bytes a second, read and written, of a copy far larger than any cache; of random numbers."
    x = torch.rand(2**16 if toy else min(2**29, torch.cuda.mem_get_info()[0] // 16), device=device(toy))
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x), toy)


def matrix_rate(toy: bool) -> float:
    "Floating-point operations a second of a large bfloat16 matrix product of random numbers."
    n = 64 if toy else 8192
    a, b = (torch.randn(n, n, device=device(toy)).bfloat16() for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, toy)


def uniform_batch(batch: int, context: int, new: int, size: int, on) -> tuple[Batch, int]:
    "(`batch` texts of `context` tokens, `new` of them in this step, in shuffled blocks; how many blocks)."
    width = -(-context // size)
    tables = torch.randperm(batch * width).view(batch, width)
    positions = torch.arange(context - new, context).repeat(batch, 1)
    slots = tables.gather(1, positions // size)*size + positions % size
    flat = positions.flatten()
    lens = np.full(batch, new), np.full(batch, context)
    made = Batch(flat*0, flat, slots.flatten(), tables, *lens, logits_indices=torch.arange(batch), prompt_indices=torch.arange(0))
    return made.to(on), batch * width


def inputs(tokens: int, t: Tiles, on) -> list:
    "Random q, k, v."
    return [torch.randn(tokens, h, t.dim, device=on).bfloat16() for h in (t.kv_heads*t.group, t.kv_heads, t.kv_heads)]


def decode_point(toy, t: Tiles, batch: int, context: int, size: int, copy: float, dtype=torch.bfloat16) -> dict:
    "One row of the table: store a token's KV and attend, replayed in a graph, over as many layers as overflow the cache."
    on = device(toy)
    made, blocks = uniform_batch(batch, context, 1, size, on)
    layer_bytes = 2 * blocks * size * t.kv_heads * t.dim * t.itemsize
    layers = 1 if toy else max(1, min(28, 2**28 // layer_bytes + 1))
    cache = torch.randn(layers, 2, blocks, size, t.kv_heads, t.dim, device=on, dtype=torch.bfloat16).to(dtype)
    q, k, v = inputs(batch, t, on)
    attention = TritonAttention(made, cache, t.dim**-0.5, metadata=AttentionMetadata.of(made, t))
    def run():
        for layer in range(layers): attend(attention, q, k, v, layer)
    each = seconds(captured(run, toy), toy) / layers
    moved = 2*batch*context*t.kv_heads*t.dim*t.itemsize + 2*q.nbytes + 2*(k.nbytes + v.nbytes)
    return dict(batch=batch, context=context, block_size=size, layers=layers, microseconds=each*1e6, bytes=moved,
                bytes_per_second=moved/each, fraction_of_copy=moved/each/copy)


def decode(toy: bool) -> dict:
    "The heads of Qwen3-0.6B in bfloat16; batch and context as in the table, the largest block as well."
    t = Tiles(1, 2, 32) if toy else Tiles(8, 2, 128)
    batches, contexts = ((1, 2), (16, 40)) if toy else ((1, 8, 64, 256), (128, 512, 1024, 4096, 8192, 32768))
    copy, rows, left_out = copy_bandwidth(toy), [], []
    points = [(b, c, 16) for b in batches for c in contexts] + [(batches[-1], contexts[-1] if toy else 1024, 256)]
    for batch, context, size in points:
        needed = 4 * batch * context * t.kv_heads * t.dim
        if not toy and needed > 0.7 * torch.cuda.mem_get_info()[0]: left_out.append([batch, context, "no memory"]); continue
        rows.append(decode_point(toy, t, batch, context, size, copy))
        if not toy: torch.cuda.empty_cache()
    return dict(heads=t.kv_heads*t.group, kv_heads=t.kv_heads, head_dim=t.dim, dtype="bfloat16", copy_bytes_per_second=copy, rows=rows, left_out=left_out)


def fp8_decode(toy: bool) -> dict | str:
    "The same heads over a cache in e4m3, beside bfloat16."
    if said := lacks_fp8(toy): return said
    shape, copy, rows = (1, 2, 32) if toy else (8, 2, 128), copy_bandwidth(toy), []
    for batch, context in ((1, 16),) if toy else ((1, 8192), (8, 4096), (64, 1024), (64, 4096), (256, 1024)):
        kinds = {"bfloat16": (2, torch.bfloat16), "fp8": (1, torch.float8_e4m3fn)}
        rows.append({name: decode_point(toy, Tiles(*shape, itemsize=size), batch, context, 16, copy, dtype) for name, (size, dtype) in kinds.items()})
        if not toy: torch.cuda.empty_cache()
    return dict(copy_bytes_per_second=copy, rows=rows)


def fp8_products(toy: bool) -> dict | str:
    "The matrices of Qwen3-8B's MLP: bfloat16, `_scaled_mm` alone, and with the rounding of its rows; as many as overflow the cache."
    if said := lacks_fp8(toy): return said
    inputs, outputs = (32, 48) if toy else (4096, 12288)
    kind, on, count, rows = fp8_product(toy), device(toy), 2 if toy else 8, []
    weights = [torch.randn(outputs, inputs, device=on).bfloat16() for _ in range(count)]
    products = [kind(weight) for weight in weights]
    for n in (1, 3) if toy else (1, 8, 16, 64, 256, 1024, 4096, 8192):
        x = torch.randn(n, inputs, device=on).bfloat16()
        q, scale = quantize_fp8(x)
        forms = dict(bfloat16=lambda: [x @ weight.T for weight in weights], fp8_alone=lambda: [p.multiply(q, scale) for p in products],
                     fp8=lambda: [p(x) for p in products])
        rows.append(dict(rows=n, microseconds={name: seconds(captured(run, toy), toy) / count * 1e6 for name, run in forms.items()}))
    return dict(inputs=inputs, outputs=outputs, product=kind.__name__, rows=rows)


def prefill(toy: bool) -> dict:
    "Whole prompts: operations a second of the kernel, of PyTorch's own attention on contiguous keys, and of a matrix product."
    t, on = (Tiles(1, 2, 32), "cpu") if toy else (Tiles(8, 2, 128), "cuda")
    rows = []
    for batch, context in ((1, 20), (2, 17)) if toy else ((1, 512), (1, 2048), (1, 8192), (16, 512), (8, 1024)):
        made, blocks = uniform_batch(batch, context, context, 16, on)
        cache = torch.zeros(1, 2, blocks, 16, t.kv_heads, t.dim, device=on, dtype=torch.bfloat16)
        q, k, v = inputs(batch*context, t, on)
        attention = TritonAttention(made, cache, t.dim**-0.5, metadata=AttentionMetadata.of(made, t))
        ours = seconds(captured(lambda: attend(attention, q, k, v, 0), toy), toy)
        split = [x.view(batch, context, -1, t.dim).transpose(1, 2) for x in (q, k, v)]
        theirs = functools.partial(torch.nn.functional.scaled_dot_product_attention, *split, is_causal=True, enable_gqa=True)
        sdpa = seconds(captured(theirs, toy), toy)
        work = 4 * batch * t.kv_heads * t.group * t.dim * context * (context + 1) / 2
        rows.append(dict(batch=batch, context=context, microseconds=ours*1e6, flops_per_second=work/ours, sdpa_flops_per_second=work/sdpa))
    return dict(heads=t.kv_heads*t.group, kv_heads=t.kv_heads, head_dim=t.dim, dtype="bfloat16", matrix_flops_per_second=matrix_rate(toy), rows=rows)


def rope_and_cache_point(toy: bool, tokens: int, copy: float) -> dict:
    "From the QKV product to the cache: eager, compiled and fused, over as many layers as overflow the cache."
    shape = (2, 1, 32) if toy else (16, 8, 128)
    row = (shape[0] + 2*shape[1]) * shape[2]
    layers = 1 if toy else max(1, min(28, 2**28 // (4*tokens*row) + 1))
    qkv, turned, norms, slots, cache = rows_case(*shape, tokens, torch.bfloat16, device(toy), layers=layers)
    lengths = [n*shape[2] for n in (shape[0], shape[1], shape[1])]
    forms = dict(eager=split_norm_rotate, compiled=compiled_function(split_norm_rotate))
    if toy: del forms["compiled"]        # the compiler of C++ takes its time
    def unfused(form):
        for layer in range(layers):
            q, k, v = form(qkv[layer], lengths, shape[2], *turned, norms)
            store_kv(cache, layer, k, v, slots)
    def fused():
        for layer in range(layers): norm_rotate_store(qkv[layer], *turned, [w for w, _ in norms], norms[0][1], slots, cache, layer)
    times = {name: seconds(captured(functools.partial(unfused, form), toy), toy) / layers for name, form in forms.items()}
    times["fused"] = seconds(captured(fused, toy), toy) / layers
    moved = tokens * (2*row*2 + 4*shape[2] + 8) + 2*shape[2]*2
    return dict(tokens=tokens, layers=layers, microseconds={k: t*1e6 for k, t in times.items()}, bytes=moved,
                bytes_per_second=moved/times["fused"], fraction_of_copy=moved/times["fused"]/copy)


@torch.inference_mode()
def rope_and_cache(toy: bool) -> dict:
    "Norm, rotation and store, in the shape of Qwen3-0.6B and bfloat16."
    copy = copy_bandwidth(toy)
    return dict(copy_bytes_per_second=copy, rows=[rope_and_cache_point(toy, n, copy) for n in ((1, 5) if toy else (1, 8, 64, 256, 2048, 8192))])


@torch.inference_mode()
def sampler(toy: bool) -> dict:
    "Choosing a token for each row of Qwen3's vocabulary in float32, as the engine calls it: PyTorch's operations and the kernels."
    vocab, copy, rows = 2100 if toy else 151_936, copy_bandwidth(toy), []
    kinds = {"greedy": dict(temperature=0), "temperature": dict(temperature=.7), "top-k": dict(temperature=.7, top_k=50), "top-p": dict(temperature=.7, top_p=.9)}
    for n in (2,) if toy else (1, 8, 64, 256):
        x = torch.randn(n, vocab, device=device(toy)) * 3
        for kind, params in kinds.items():
            m = SamplingMetadata.of([Sequence(str(i), [1], SamplingParams(**params), i) for i in range(n)])
            times = {name: seconds(functools.partial(f, x, m), toy) for name, f in dict(torch=sample, kernels=fused_sample).items()}
            rows.append(dict(rows=n, kind=kind, microseconds={k: t*1e6 for k, t in times.items()}, one_reading_microseconds=x.nbytes/copy*1e6))
    return dict(vocab=vocab, dtype="float32", copy_bytes_per_second=copy, rows=rows)


# ---- the whole engine

def make_engine(toy: bool, **wanted) -> LLM:
    "An engine with random weights, warmed up."
    chosen = dict(max_model_len=100 if toy else 2048, load_format="dummy", **wanted)
    if toy: chosen |= dict(num_kv_blocks=60, device="cpu", attention_backend="triton", max_num_seqs=4)
    llm = LLM(model_folder(toy), **chosen)
    work = random_workload(2 if toy else 64, (2, 8) if toy else (100, 1024), (2, 3) if toy else (16, 32), llm.engine.input_processor.vocab_size, seed=1)
    llm.generate(work.prompts, work.params, use_tqdm=False)
    return llm


def workload(toy: bool, vocab: int):
    "256 requests, prompt and output lengths uniform in 100-1024, seed 0, temperature 0.6, ignore_eos."
    return random_workload(4, (2, 10), (2, 5), vocab) if toy else random_workload(256, (100, 1024), (100, 1024), vocab)


def bound(toy: bool, work) -> dict:
    "What memory traffic alone allows: each step reads the weights, and each request all its KV so far; all KV is written once."
    config = ModelConfig.from_folder(model_folder(toy))
    from nano_vllm.weights import empty_model
    item, kv = config.dtype.itemsize, 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.dtype.itemsize
    weights = item * sum(p.numel() for p in empty_model(config, config.dtype, "meta").parameters())
    lengths = [(len(p), s.max_tokens) for p, s in zip(work.prompts, work.params)]
    written = kv * sum(p + n for p, n in lengths)
    read = kv * sum(sum(range(p, p + n)) for p, n in lengths)
    steps = max(n for _, n in lengths)
    copy = copy_bandwidth(toy)
    total = written + read + steps*weights
    return dict(copy_bytes_per_second=copy, kv_bytes_written=written, kv_bytes_read=read, weight_bytes=weights, steps=steps,
                seconds=total/copy, output_tokens_per_second=work.num_output_tokens * copy / total)


def run(toy: bool, **wanted) -> dict:
    "The throughput of an engine with these options."
    llm = make_engine(toy, **wanted)
    work = workload(toy, llm.engine.input_processor.vocab_size)
    found = measured_throughput(llm, work)
    if not toy: found["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return found | dict(options=wanted, prompt_tokens=work.num_prompt_tokens, output_tokens=work.num_output_tokens)


def throughput(toy: bool) -> dict:
    "The benchmark with the engine's own defaults, three times, and the bound."
    llm = make_engine(toy)
    runs = []
    for seed_of_tokens in range(2 if toy else 3):   # other prompts of the same lengths: the prefix cache stays cold
        work = workload(toy, llm.engine.input_processor.vocab_size)
        prompts = [[(t + seed_of_tokens) % llm.engine.input_processor.vocab_size for t in p] for p in work.prompts]
        runs.append(measured_throughput(llm, work._replace(prompts=prompts)))
    limit = bound(toy, work)
    best = statistics.median(r["output_tokens_per_second"] for r in runs)
    return dict(model="toy" if toy else "qwen3-0.6b", runs=runs, prompt_tokens=work.num_prompt_tokens, output_tokens=work.num_output_tokens,
                output_tokens_per_second=best, bound=limit, fraction_of_bound=best / limit["output_tokens_per_second"])


def host_gap(toy: bool) -> dict:
    "How long the GPU waits between decode steps: the profiler's timeline of the second half of a run of decodes."
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    llm = make_engine(toy)
    batch, steps = (2, 6) if toy else (256, 100)
    work = random_workload(batch, (8, 8), (steps, steps), llm.engine.input_processor.vocab_size, seed=2)
    with profile(activities=[ProfilerActivity.CPU] if toy else [ProfilerActivity.CUDA]) as prof:
        llm.generate(work.prompts, work.params, use_tqdm=False)
    where = DeviceType.CPU if toy else DeviceType.CUDA
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in prof.events() if e.device_type == where)
    return timeline(spans[len(spans)//2:], ModelConfig.from_folder(llm.model_path).num_layers)


def timeline(spans: list[tuple], layers: int) -> dict:
    "Of (start, end, name) in microseconds: steps (by the attention kernels in them), idle time, and each step's largest gap."
    end, gaps = spans[0][1], []
    for a, b, _ in spans[1:]:
        if a > end: gaps.append(a - end)
        end = max(end, b)
    steps = max(1, sum("attention_kernel" in name for *_, name in spans) // layers)
    between = sorted(gaps, reverse=True)[:steps] or [0.]
    total = end - spans[0][0]
    return dict(kernels=len(spans), steps=steps, kernels_per_step=len(spans)/steps, microseconds_per_step=total/steps, idle_fraction=sum(gaps)/total,
                gap_between_steps_microseconds=statistics.median(between), largest_gap_microseconds=max(between))


def launches(toy: bool) -> dict:
    "What a decode step of the smallest batch launches, as the recorder of graphs is given it: in all, in a layer, and by name."
    wanted = dict(ops="torch") if toy else {}       # a processor's own weights are packed, and nobody can tell where they lie
    runner, counter, of_layer = make_engine(toy, enforce_eager=True, **wanted).engine.runner, CountingRecorder(), []
    layer = runner.model.model.layers[-1]
    forward = layer.forward
    def counted(*args):
        with count_launches() as names: out = forward(*args)
        of_layer.append(len(names))
        return out
    layer.forward = counted
    make_graphs(runner, 100, counter)
    names = Counter(counter.steps[-1])
    return dict(a_step=names.total(), a_layer=of_layer[-1], layers=runner.model.config.num_layers, names=dict(names.most_common()))


OFF = dict(enforce_eager=True, async_scheduling=False, compile=False)
def eager(toy): return run(toy, **OFF)
def graphs(toy): return run(toy, **OFF | dict(enforce_eager=False))
def overlapped(toy): return run(toy, **OFF | dict(async_scheduling=True))
def compiled(toy): return run(toy, **OFF | dict(compile=True))


# ---- other engines, where they are installed, at the work of `throughput`

PEER_WORK = dict(requests=256, prompt=[100, 1024], output=[100, 1024])
TOY_WORK = dict(requests=3, prompt=[2, 10], output=[2, 5])


def peer(engine: str, toy: bool) -> dict | str:
    "The throughput of an engine with its own defaults, in a process that knows no other; or why there is none."
    if find_spec(engine) is None: return f"not run: there is no package {engine}"
    folder, options = model_folder(toy), ["load_format=dummy"]
    if engine == "nanovllm": folder, options = with_weights(folder), []      # it has no dummy weights
    options += ["max_model_len=100", *["num_kv_blocks=60", "device=cpu"] * (engine == "nano_vllm")] if toy else ["max_model_len=2048"]
    config = json.loads((folder/"config.json").read_text())
    runs = [(TOY_WORK if toy else PEER_WORK) | dict(seed=seed, vocab_size=config["vocab_size"]) for seed in range(2)]
    done = subprocess.run([sys.executable, Path(__file__).with_name("peer_worker.py"), engine, folder, *options], text=True, capture_output=True,
                          input="\n".join(map(json.dumps, runs)), env=os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode and last.startswith(("ModuleNotFoundError", "ImportError")): return f"not run: {last}"
    if done.returncode: raise RuntimeError(f"{engine} ended with status {done.returncode}: {done.stderr[-2000:]}")
    start_up, *found = map(json.loads, done.stdout.splitlines())
    return start_up | dict(runs=found, output_tokens_per_second=max(r["output_tokens_per_second"] for r in found))


def peer_nano_vllm(toy): return peer("nano_vllm", toy)
def peer_nanovllm(toy): return peer("nanovllm", toy)
def peer_vllm(toy): return peer("vllm", toy)
