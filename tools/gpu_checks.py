"""Part `tests` of the GPU suite: is what the GPU computes right? Each check returns what it covered, or raises."""
import itertools
import json
import os
import random
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import Batch, ReferenceAttention, TorchAttention, make_batch, slots_of
from nano_vllm.cuda_graphs import GpuRecorder
from nano_vllm.engine_args import has_fp8
from nano_vllm.fp8 import EmulatedFp8Product, Fp8Product, quantize_fp8, to_e4m3
from nano_vllm.fusions import (
    FusedFp8Product, fused_norm, fused_rope_and_cache, fused_silu_and_mul, norm_rotate_store, quantize_rows, split_norm_rotate)
from nano_vllm.kv_blocks import ScheduledSequence, Sequence, blocks_needed
from nano_vllm.layers import OPS, Ops, Rotary, Target, last_that_suits, rms_norm, silu_and_mul
from nano_vllm.sampler import FILTERS, SAMPLING_STAGES, SamplingMetadata, gumbel, make_keys, row_keys, run_stages, sample
from nano_vllm.sampling_kernels import find_thresholds, fused_gumbel_sample, fused_sample
from nano_vllm.triton_attention import AttentionMetadata, Tiles, TritonAttention
from nano_vllm.triton_kernels import store_kv
from nano_vllm.workbench import MODEL_NAME, cache_dir

UNIT = {torch.float32: 2**-18, torch.float16: 2**-11, torch.bfloat16: 2**-8}   # what a rounding may change, and a little more
SHAPES = [(8, 2, 128), (3, 3, 64), (1, 1, 32), (2, 4, 256), (1, 7, 96), (2, 1, 80), (1, 17, 64)]   # KV heads, group, head_dim
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513, 1025]


def device(toy: bool) -> str: return "cpu" if toy else "cuda"


# ---- kernels

def mixed(lengths, new_tokens, size, kv_heads, group, dim, seed=0, dtype=torch.float32, layers=2):
    "(batch, its cache with NaN in every slot that no text has written, q, k, v); texts stored in the last layer."
    g = torch.Generator().manual_seed(seed)
    num_blocks = sum(blocks_needed(n, size) for n in lengths) + 2
    free = torch.randperm(num_blocks, generator=g).tolist()
    cache = torch.full((layers, 2, num_blocks, size, kv_heads, dim), torch.nan)
    work = []
    for n, m in zip(lengths, new_tokens):
        seq = Sequence("test", list(range(n)), SamplingParams())
        seq.block_table = [free.pop() for _ in range(blocks_needed(n, size))]
        past = torch.tensor([seq.block_table[p // size]*size + p % size for p in range(n - m)], dtype=torch.int64)
        for x in slots_of(cache, layers - 1): x[past] = torch.randn(n - m, kv_heads, dim, generator=g)
        work.append(ScheduledSequence(seq, n - m, m, samples=True))
    q, k, v = (torch.randn(sum(new_tokens), h, dim, generator=g) for h in (kv_heads*group, kv_heads, kv_heads))
    return make_batch(work, size), *(x.to(dtype) for x in (cache, q, k, v))


def attend(backend, q, k, v, layer: int):
    "Store keys and values, then attend, as a layer of a model does."
    backend.store(k, v, layer)
    return backend(q, layer)


def poison():
    "From here on torch.empty gives NaN: whatever a kernel should have written and did not is seen."
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    torch.use_deterministic_algorithms(True, warn_only=True)


def compare(toy, batch: Batch, cache, q, k, v, window, oracle) -> float:
    """The largest error of the kernels on this batch, in roundings of the largest value; AssertionError above 2.5.

    The oracle computes in float32 on the same rounded inputs; what the kernels store must be the same bits."""
    on = [x.to(device(toy)) for x in (cache, q, k, v)]
    out = attend(TritonAttention(batch.to(device(toy)), on[0], 0.3, window), *on[1:], 1)
    wide = [x.float().to(device(toy) if oracle is TorchAttention else "cpu") for x in (cache, q, k, v)]
    expected = attend(oracle(batch.to(wide[0].device), wide[0], 0.3, window), *wide[1:], 1).cpu()
    out, stored = out.cpu().float(), on[0].cpu()
    assert not out.isnan().any(), "NaN in the output: something unwritten was read, or not written"
    assert torch.equal(stored.float().nan_to_num(1e9), wide[0].cpu().nan_to_num(1e9)), "stored keys and values differ"
    for new, old in zip(on[1:], (q, k, v)): assert torch.equal(new.cpu(), old), "an input was written to"
    error = float((out - expected).abs().max() / wide[0][1, 1].cpu().nan_to_num().abs().max()) / UNIT[q.dtype]
    assert error <= 2.5, f"error of {error} roundings"
    return error


def kernels_agree(toy: bool, dtype: torch.dtype) -> dict:
    "Random mixed batches of all shapes, again and again until the time is up; then one as large as in use."
    poison()
    assert torch.empty(3, device=device(toy)).isnan().all()
    seed, start, worst, count = int.from_bytes(os.urandom(4), "little"), time.monotonic(), 0., 0
    shapes, lengths = (SHAPES[2:3], LENGTHS[:7]) if toy else (SHAPES, LENGTHS)
    sizes = [16, 32, 64, 128, 256]
    if dtype is torch.float32: shapes, sizes = shapes[:3], [16, 256]    # products of float32 take the compiler half a minute
    for rng in map(random.Random, itertools.count(seed)):
        shape, size = shapes[count % len(shapes)], rng.choice(sizes)
        total = [rng.choice(lengths) for _ in range(rng.randint(1, 4))]
        new = [rng.choice([1, rng.randint(1, min(n, 70))]) for n in total]
        window = rng.choice([None, None, 64, 200])     # each one is compiled anew
        case = dict(seed=seed + count, shape=shape, size=size, lengths=total, new_tokens=new, window=window)
        try: worst = max(worst, compare(toy, *mixed(total, new, size, *shape, seed + count, dtype), window, ReferenceAttention))
        except AssertionError as e: raise AssertionError(f"{e}: {case}") from e
        count += 1
        if count >= (2 if toy else len(shapes)) and (toy or time.monotonic() - start > 60): break
    rng, (many, longest) = random.Random(seed), (3, 70) if toy else (48, 4096)
    total = [rng.randint(1, longest) for _ in range(many)]
    new = [1 if i else min(total[0], 600) for i in range(many)]
    large = compare(toy, *mixed(total, new, 16, *shapes[0], seed, dtype), None, TorchAttention)
    return dict(first_seed=seed, batches=count + 1, worst_error_in_roundings=max(worst, large), allowed=2.5)


def kernels_bfloat16(toy): return kernels_agree(toy, torch.bfloat16)
def kernels_float16(toy): return kernels_agree(toy, torch.float16)
def kernels_float32(toy): return kernels_agree(toy, torch.float32)


# ---- FP8

def lacks_fp8(toy: bool) -> str | None:
    "What is said in place of a result where the hardware has no FP8; a toy computes as if it had."
    if toy or has_fp8(torch.device("cuda")): return None
    return "not run: this GPU has no FP8, which begins with compute capability 8.9"


def fp8_product(toy: bool):
    "The class of product that is tried: the hardware's; for a toy the emulation, where PyTorch has none for processors."
    try: Fp8Product(torch.ones(16, 16, device=device(toy)))(torch.ones(1, 16, device=device(toy)))
    except (RuntimeError, NotImplementedError):
        if not toy: raise
        return EmulatedFp8Product
    return FusedFp8Product


def fp8_products(toy: bool) -> dict | str:
    """`torch._scaled_mm` against the emulation on the same device, on random sizes; zeros, outliers, NaN in a row of its own; and the kernel that rounds rows against the function.

    Products are exact, their sums are rounded in units that keep some 14 bits, and results are rounded to bfloat16."""
    if said := lacks_fp8(toy): return said
    kind, rng, worst = fp8_product(toy), random.Random(0), 0.
    sizes, rows = ([16, 48], [1, 3]) if toy else ([16, 64, 576, 1024, 4096, 12288], [1, 2, 15, 16, 17, 64, 250, 1024, 4097])
    cases = [(rng.choice(rows), rng.choice(sizes), rng.choice(sizes)) for _ in range(4 if toy else 60)]
    for seed, (n, inputs, outputs) in enumerate(cases):
        g = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(k, inputs, generator=g).to(device(toy)).bfloat16() for k in (n, outputs))
        x[:, 0], weight[1], x[n // 2, 1] = 60 * x[:, 0], 0, torch.nan if n > 1 else 1
        got, expected = kind(weight)(x).float(), EmulatedFp8Product(weight)(x.float())
        (xq, xs), (wq, ws) = quantize_fp8(x), quantize_fp8(weight)
        rounded, finite = quantize_rows(x), ~x.isnan().any(-1)
        for ours, theirs in zip(rounded, (xq, xs)): assert torch.equal(ours.float()[finite], theirs.float()[finite]), (n, inputs)
        size = (xq.float().abs() @ wq.float().abs().T) * xs * ws.T
        bad = expected.isnan()
        assert torch.equal(got.isnan(), bad) and bad.any() == (n > 1), (n, inputs, outputs)
        error = float(((got - expected).abs() / (2**-8 * expected.abs() + 2**-11 * size + 1e-30))[~bad].max())
        assert error <= 1, f"error of {error} of what is allowed: {n} rows, {inputs} inputs, {outputs} outputs"
        worst = max(worst, error)
    return dict(cases=len(cases), product=kind.__name__, worst_error_of_what_is_allowed=worst)


def fp8_cache(toy: bool) -> dict | str:
    "The kernels over a cache in e4m3: what they store is what PyTorch rounds, and they attend as the oracle does to the same bytes."
    if said := lacks_fp8(toy): return said
    poison()
    worst, dtype, shapes = 0., torch.bfloat16, SHAPES[2:3] if toy else SHAPES
    for seed, shape in enumerate(shapes):
        new = [5, 7, 1, 1] if toy else [70, 130, 1, 1]
        batch, cache, q, k, v = mixed([5, 20, 33, 40] if toy else [70, 300, 65, 1025], new, 16, *shape, seed, dtype)
        cache, k[0] = to_e4m3(cache.nan_to_num(0)), 1000 * k[0]
        on = [x.to(device(toy)) for x in (cache, q, k, v)]
        out = attend(TritonAttention(batch.to(device(toy)), on[0], 0.1), *on[1:], 1).float().cpu()
        expected = attend(ReferenceAttention(batch, cache, 0.1), q.float(), k, v, 1)
        assert torch.equal(on[0].cpu().view(torch.uint8), cache.view(torch.uint8)), f"stored keys and values differ: {shape}"
        error = float((out - expected).abs().max() / cache[1, 1].float().abs().max()) / UNIT[dtype]
        assert error <= 2.5, f"error of {error} roundings: {shape}"
        worst = max(worst, error)
    return dict(shapes=len(shapes), worst_error_in_roundings=worst, allowed=2.5)


def fp8_engine(toy: bool) -> dict | str:
    "A whole engine with both, eager and with graphs: the same favourites after each prompt, up to numbers that are rounded the other way."
    if said := lacks_fp8(toy): return said
    folder, params = small_model(toy), SamplingParams(temperature=0, max_tokens=3 if toy else 40, logprobs=1, ignore_eos=True)
    prompts, found = [[5, 6, 7], [250], list(range(20, 31 if toy else 290))], []
    for eager in (True, False):
        llm = LLM(folder, dtype="bfloat16", device=device(toy), attention_backend="triton", num_kv_blocks=60, enforce_eager=eager,
                  quantization="fp8", kv_cache_dtype="fp8")
        outs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(o["token_ids"]) == params.max_tokens for o in outs)
        found.append([max(p.logprob for p in o["logprobs"][0].values()) for o in outs])
    error = max(abs(a - b) for a, b in zip(*found))
    assert error < 0.2, f"log-probabilities of the favourites differ by {error}: {found}"
    return dict(prompts=len(prompts), largest_difference=error, allowed=0.2)


def captured(run, toy: bool):
    "What repeats `run`: a CUDA graph's replay, after one call that compiles; for a toy, `run` itself."
    if not toy: return GpuRecorder().record(run)
    run()
    return run


def static_metadata(toy: bool) -> dict:
    "Decode kernels captured once serve step after step: padded rows do no harm, the bits are those of metadata made anew."
    poison()
    rows, tiles, dev, rng = (4, Tiles(1, 1, 32), "cpu", random.Random(0)) if toy else (32, Tiles(8, 2, 128), "cuda", random.Random(0))
    longest, steps = (300, 2) if toy else (3000, 12)
    heads, width = tiles.kv_heads * tiles.group, blocks_needed(longest, 16)
    metadata = AttentionMetadata(torch.arange(rows + 1, dtype=torch.int32, device=dev), torch.zeros(rows, dtype=torch.int32, device=dev),
                                 torch.zeros(rows, width, dtype=torch.int64, device=dev), torch.full((rows,), -1, device=dev), tiles,
                                 capacity=rows * (longest // tiles.split + 1))
    cache = torch.full((1, 2, rows*width + 2, 16, tiles.kv_heads, tiles.dim), torch.nan, dtype=torch.bfloat16, device=dev)
    q, k, v = (torch.zeros(rows, h, tiles.dim, dtype=torch.bfloat16, device=dev) for h in (heads, tiles.kv_heads, tiles.kv_heads))
    out = torch.empty_like(q)
    def step():
        metadata.list_work()
        out.copy_(attend(TritonAttention(None, cache, 0.3, metadata=metadata), q, k, v, 0))
    replay = captured(step, toy)
    for turn in range(steps):
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, rows))]
        batch, full, *new = mixed(lengths, [1]*len(lengths), 16, tiles.kv_heads, tiles.group, tiles.dim, turn, torch.bfloat16, layers=1)
        n, w = batch.block_tables.shape
        cache.fill_(torch.nan)[:, :, :full.shape[2]] = full.to(dev)
        for wide, x in zip((q, k, v), new): wide.fill_(torch.nan)[:n] = x.to(dev)
        metadata.context_lens.zero_()[:n] = torch.tensor(lengths, device=dev)
        metadata.block_tables[:n, :w] = batch.block_tables.to(dev)
        metadata.slot_mapping.fill_(-1)[:n] = batch.slot_mapping.to(dev)
        replay()
        fresh = attend(TritonAttention(batch.to(dev), full.to(dev), 0.3), *(x.to(dev) for x in new), 0)
        assert torch.equal(out[:n], fresh), f"turn {turn}: replay and fresh metadata differ"
        assert not out[n:].any(), f"turn {turn}: padded rows are not 0"
    return dict(steps=steps, rows=rows)


def rows_case(heads, kv_heads, dim, tokens, dtype, on, layers=1, with_norms=True, seed=0):
    "(qkv of each layer, (cos, sin), norms, slots of which some are padding if there are several, a cache full of NaN)."
    g = torch.Generator().manual_seed(seed)
    size, blocks = 16, tokens // 16 + 2
    qkv = torch.randn(layers, tokens, (heads + 2*kv_heads)*dim, generator=g).to(on, dtype)
    turned = Rotary(dim, dict(rope_theta=1e6), 4096)(torch.randint(0, 4096, (tokens,), generator=g))
    norms = [(1 + 0.3*torch.randn(dim, generator=g).to(on, dtype), 1e-6) for _ in range(2 * with_norms)]
    slots = torch.randperm(blocks*size, generator=g)[:tokens]
    slots[1::7] = -1
    cache = torch.full((layers, 2, blocks, size, kv_heads, dim), torch.nan, dtype=dtype, device=on)
    return qkv, [x.to(on) for x in turned], norms, slots.to(on), cache


def rows_agree(toy, heads, kv_heads, dim, tokens, dtype, with_norms, seed) -> float:
    """The largest error of `norm_rotate_store`, in roundings of the largest number. Only copied numbers, and those that nobody should
    have written, must be the same bits; the others are rounded up to three times, and cut off instead in the interpreter."""
    (qkv,), turned, norms, slots, cache = rows_case(heads, kv_heads, dim, tokens, dtype, device(toy), 1, with_norms, seed)
    expected = cache.clone()
    q, k, v = split_norm_rotate(qkv, [heads*dim, kv_heads*dim, kv_heads*dim], dim, *turned, norms)
    store_kv(expected, 0, k, v, slots)
    ours = norm_rotate_store(qkv, *turned, [w for w, _ in norms] or [None, None], 1e-6, slots, cache, 0)
    assert torch.equal(cache[:, 1].nan_to_num(1e4), expected[:, 1].nan_to_num(1e4)), "stored values differ"
    assert not ours[slots >= 0].isnan().any() and torch.equal(cache.isnan(), expected.isnan()), "something is not written, or too much"
    gaps = [(a.float() - b.float()).nan_to_num().abs().max() / b.float().nan_to_num().abs().max()
            for a, b in ((ours[slots >= 0], q[slots >= 0]), (cache[:, 0], expected[:, 0]))]
    error = float(max(gaps)) / UNIT[dtype]
    assert error <= 8, f"error of {error} roundings"
    return error


def row_kernels_agree(toy, dtype, width: int, rows: int, seed: int) -> float:
    "The largest error of the kernels for add and norm and for SwiGLU, in roundings of the largest number; rows lie apart."
    g = torch.Generator().manual_seed(seed)
    x, residual, weight = (torch.randn(*shape, generator=g).to(device(toy), dtype) for shape in ((rows, 2*width + 8), (rows, width), (width,)))
    pairs = [(fused_silu_and_mul(x[:, :2*width]), silu_and_mul(x[:, :2*width])), (fused_norm(x[:, :width], weight, 1e-6), rms_norm(x[:, :width], weight, 1e-6)),
             *zip(fused_norm(x[:, :width], weight, 1e-6, residual), rms_norm(x[:, :width], weight, 1e-6, residual))]
    error = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs) / UNIT[dtype]
    assert error <= 8, f"error of {error} roundings: {dict(dtype=dtype, width=width, rows=rows, seed=seed)}"
    return error


def fused_by_hand(target: Target) -> Ops | None:
    "For compile: the kernels alone, as a GPU has them by default, without the minutes of a compiler."
    if not target.compile: return None
    plain = last_that_suits(replace(target, compile=False))[1]
    return replace(plain, norm=fused_norm, activation=fused_silu_and_mul, rope_and_cache=fused_rope_and_cache)


def fusions(toy: bool) -> dict:
    "The kernels between the products: against the unfused functions on random shapes, then in the engine, eager and with graphs."
    poison()
    seed, worst = int.from_bytes(os.urandom(4), "little"), 0.
    shapes = [(16, 8, 128), (9, 3, 64), (5, 1, 80), (64, 8, 128), (3, 3, 256), (7, 1, 96)][:2 if toy else 6]
    cases = list(itertools.product(shapes, UNIT, (False, True)))
    for i, (shape, dtype, with_norms) in enumerate(cases):
        tokens = random.Random(seed + i).randint(2, 9 if toy else 700)
        try: worst = max(worst, rows_agree(toy, *shape, tokens, dtype, with_norms, seed + i))
        except AssertionError as e: raise AssertionError(f"{e}: {dict(shape=shape, dtype=dtype, norms=with_norms, tokens=tokens, seed=seed + i)}") from e
    widths = list(itertools.product((100, 1024, 5000) if toy else (1, 100, 1024, 3072, 8192, 20000), UNIT))
    rows = max(row_kernels_agree(toy, dtype, width, 3 if toy else 300, seed + i) for i, (width, dtype) in enumerate(widths))
    torch.use_deterministic_algorithms(False)
    OPS["fused_by_hand"] = fused_by_hand     # in this process alone: the last name that suits is taken
    alone = dict(enforce_eager=True, async_scheduling=False)
    return dict(first_seed=seed, cases=len(cases) + len(widths), worst_error_in_roundings=max(worst, rows), allowed=8) | same_answers(
        toy, alone | dict(ops="torch" if toy else "triton"), alone | dict(compile=True), dict(enforce_eager=False, async_scheduling=False, compile=True))


# ---- sampling

KINDS = [dict(temperature=0), dict(), dict(temperature=.6), dict(temperature=1.7), dict(top_k=1), dict(top_k=50), dict(top_p=.9), dict(top_p=1e-9), dict(min_p=.1),
         dict(top_k=200, top_p=.95, temperature=.7), dict(top_k=5000), dict(top_p=.999, min_p=.001), dict(presence_penalty=.5, top_k=20)]


def sampling_rows(n: int, rng) -> SamplingMetadata:
    "Rows of every kind, in random order, each with a seed and a text of its own."
    seqs = [Sequence(str(i), [rng.randrange(9) for _ in range(4)], SamplingParams(**rng.choice(KINDS)), rng.randrange(2**40)) for i in range(n)]
    for seq in seqs: seq.output_token_ids = [rng.randrange(9) for _ in range(rng.randrange(5))]
    return SamplingMetadata.of(seqs)


def is_near_tie(x, m, tokens) -> bool:
    "For a row x (1, V) on the processor: are two tokens' scores, or a token's place and p, as close as roundings of float32?"
    scores = (run_stages(SAMPLING_STAGES[:1], x, m) + gumbel(row_keys(m, "cpu"), x.shape[1]))[0, tokens]
    left = run_stages([stage for stage in SAMPLING_STAGES if stage is not FILTERS[-1]], x, m)[0].double()
    better = [float(left.softmax(-1)[left > left[t]].sum()) for t in tokens]
    return float((scores[0] - scores[1]).abs()) < 1e-5 * (1 + float(scores.abs().max())) or min(abs(b - float(m.top_p[0])) for b in better) < 1e-5


def sampler(toy: bool) -> dict:
    """Kernels that choose tokens: those of the processor, row by row, up to near ties; greedy rows without exception. Then in a CUDA graph, replayed with
    other logits, temperatures and keys."""
    seed, differ, total = int.from_bytes(os.urandom(4), "little"), 0, 0
    for i, (vocab, dtype) in enumerate(itertools.product((2100,) if toy else (1000, 49152, 151936), (torch.float32, torch.bfloat16))):
        rng, n = random.Random(seed + i), 5 if toy else 200
        m = sampling_rows(n, rng)
        x = (torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed + i)) * rng.choice([1, 3, 8])).to(dtype)
        ours, theirs = fused_sample(x.to(device(toy)), m).cpu(), sample(x, m)
        for row in (ours != theirs).nonzero().flatten().tolist():
            one, case = m.select(slice(row, row + 1)), dict(seed=seed + i, row=row, vocab=vocab, dtype=str(dtype), params=str(m.sequences[row].params))
            assert one.temperature[0] > 0 and is_near_tie(x[row:row+1].float(), one, [int(ours[row]), int(theirs[row])]), f"{int(ours[row])} for {int(theirs[row])}: {case}"
        differ, total = differ + int((ours != theirs).sum()), total + n
    assert differ <= total // 100 + 1, f"{differ} of {total} tokens differ: too many for near ties"
    return dict(first_seed=seed, tokens=total, near_ties=differ, replays=sampler_in_a_graph(toy))


def sampler_in_a_graph(toy: bool) -> int:
    "How many replays gave what the kernels give when they are called."
    n, vocab, on, replays = (2, 2100, "cpu", 2) if toy else (64, 151936, "cuda", 10)
    x, temperatures, filters = torch.zeros(n, vocab, device=on), torch.zeros(n, device=on), torch.tensor([[50, .9, 0.]], device=on).repeat(n, 1)
    keys, out = torch.zeros(n, 2, dtype=torch.int32, device=on), torch.zeros(2, n, dtype=torch.int64, device=on)
    def step():
        out[0].copy_(fused_gumbel_sample(x, temperatures, keys))
        out[1].copy_(fused_gumbel_sample(x, temperatures, keys, *find_thresholds(x, temperatures, filters)))
    replay = captured(step, toy)
    for turn in range(replays):
        x.normal_().mul_(4), temperatures.copy_(torch.arange(n) % 3 * .7)
        keys.copy_(make_keys(torch.arange(n), torch.full((n,), turn)))
        out.fill_(-1)
        replay()
        fresh = torch.stack([fused_gumbel_sample(x, temperatures, keys), fused_gumbel_sample(x, temperatures, keys, *find_thresholds(x, temperatures, filters))])
        assert torch.equal(out, fresh), f"turn {turn}: replay and call differ"
    return replays


# ---- the engine

def small_model(toy: bool) -> Path:
    "A folder with a random Qwen3 of a few million parameters, livelier than dummy weights, and a tokenizer of numbers."
    from transformers import Qwen3Config, Qwen3ForCausalLM
    vocab, hidden, layers, heads = (300, 64, 2, 2) if toy else (4096, 512, 4, 8)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2*hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads//2, head_dim=32 if toy else 64, max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=2))
    for name, p in model.named_parameters(): torch.nn.init.normal_(p, float("norm" in name), 0.1)
    return save(model.float(), Path(tempfile.mkdtemp(prefix="gpu-suite-model-")))


def save(model, folder: Path) -> Path:
    "The folder, with a model of transformers and a tokenizer of numbers in it."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(model.config.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def with_weights(config_folder: Path) -> Path:
    "A folder with a model of this config: random weights, bfloat16 unless the config says otherwise."
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(config_folder)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
    return save(model, Path(tempfile.mkdtemp(prefix="gpu-suite-weights-")))


def requests(toy: bool, vocab: int, seed: int = 0) -> tuple[list, list]:
    "Prompts and parameters of every kind: greedy, drawn, several answers, stops, log-probabilities; ends at many lengths."
    rng, prompts, params = random.Random(seed), [], []
    longest, most = (8, 6) if toy else (300, 60)
    kinds = [dict(temperature=0), dict(temperature=0, logprobs=2), dict(temperature=0.8, seed=7), dict(temperature=1.2, top_k=20, top_p=0.9, seed=9),
             dict(temperature=0.9, n=2, seed=3), dict(temperature=0, repetition_penalty=1.3), dict(temperature=1., seed=1, stop_token_ids=list(range(0, vocab, 40)))]
    for i in range(len(kinds) if toy else 37):
        prompts.append([rng.randrange(3, vocab) for _ in range(rng.randint(1, longest))])
        params.append(SamplingParams(max_tokens=rng.randint(1, most), **kinds[i % len(kinds)]))
    return prompts, params


def answers(folder: Path, toy: bool, work, **wanted) -> list:
    "What an engine answers, in float32, with so few blocks that some requests are preempted."
    sizes = dict(num_kv_blocks=12, block_size=2, max_num_seqs=5, max_num_batched_tokens=24) if toy else \
        dict(num_kv_blocks=26, block_size=16, max_num_seqs=21, max_num_batched_tokens=256)
    llm = LLM(folder, dtype="float32", device=device(toy), attention_backend="triton", **sizes, **wanted)
    outs = llm.generate(*work, use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0, "no request was preempted: the check has become too easy"
    return [[(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in out.outputs] for out in outs]


def same_answers(toy: bool, first: dict, *others: dict) -> dict:
    "AssertionError unless an engine with the options `first` and those with each of `others` give the same answers."
    folder = small_model(toy)
    work = requests(toy, json.loads((folder/"config.json").read_text())["vocab_size"])
    expected = answers(folder, toy, work, **first)
    for other in others:
        for i, (x, y) in enumerate(zip(expected, answers(folder, toy, work, **other), strict=True)):
            assert x == y, f"request {i}: {first} gives {x}, {other} gives {y}"
    return dict(requests=len(expected), tokens=sum(len(t) for x in expected for t, *_ in x), engines=1 + len(others))


def graphs(toy: bool) -> dict:
    "Graphs against eager, both in the synchronous loop."
    return same_answers(toy, dict(enforce_eager=True, async_scheduling=False), dict(enforce_eager=False, async_scheduling=False))


def overlap(toy: bool) -> dict:
    "The overlapped against the synchronous loop, eager and with graphs."
    return same_answers(toy, dict(enforce_eager=True, async_scheduling=False), dict(enforce_eager=True, async_scheduling=True),
                        dict(enforce_eager=False, async_scheduling=True))


def demo_model(toy: bool) -> dict | str:
    "SmolLM2, greedy in bfloat16: the kernels give PyTorch's tokens, up to a first near tie. For a toy, a small model."
    folder = small_model(toy) if toy else cache_dir()/MODEL_NAME
    if not (folder/"config.json").exists(): return f"not run: there is no {folder}"
    texts = ["5 6 7", "250"] if toy else ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at"]
    params = SamplingParams(temperature=0, max_tokens=4 if toy else 64, logprobs=2, ignore_eos=True)
    found = []
    for name in ("torch", "triton"):
        llm = LLM(folder, dtype="bfloat16", device=device(toy), attention_backend=name, num_kv_blocks=60)
        found.append(llm.generate(texts, params, use_tqdm=False))
    equal, total = 0, 0
    for text, a, b in zip(texts, *found):
        same = [x == y for x, y in zip(a["token_ids"], b["token_ids"])]
        at, total = same.index(False) if False in same else len(same), total + len(same)
        equal += at
        if at == len(same): continue
        first, second = sorted((p.logprob for p in a["logprobs"][at].values()), reverse=True)[:2]
        assert first - second < 0.1, f"{text!r}: token {at} differs, and it was no near tie: {first} against {second}"
    return dict(prompts=len(texts), tokens=total, equal_before_a_near_tie=equal)
