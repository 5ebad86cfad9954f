"""FP8: rounding against a list of all numbers, products against float64 and the library's own, which layers have it and where, and a
KV cache in one byte a number that all attention backends read alike."""
import bisect
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from gpu_checks import attend, mixed
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels, engine_args, fusions
from nano_vllm.attention import ReferenceAttention, TorchAttention, as_cached, slots_of, store_kv
from nano_vllm.engine_args import EngineArgs, choose_kv_dtype, has_fp8
from nano_vllm.fp8 import (
    E4M3, EmulatedFp8Product, Fp8Product, fits_fp8, fp8_ops, from_e4m3, quantize_fp8, quantize_weight, to_e4m3)
from nano_vllm.fusions import FusedFp8Product, compiled_norm, fused_or_compiled_rope_and_cache, fused_rope_and_cache
from nano_vllm.layers import OPS, Ops, choose_ops
from nano_vllm.model import ModelConfig
from nano_vllm.cpu_kernels import PlainProduct
from nano_vllm.triton_attention import TritonAttention
from nano_vllm.weights import load_model
from test_cpu_kernels import target
from test_model import make, our_logits

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
BYTES = torch.arange(256, dtype=torch.uint8)
GRID = [(1 + m/8) * 2.0**(e - 7) if e else m/8 * 2.0**-6 for e in range(16) for m in range(8)][:127]      # the last one would be 480
FITTING = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
CUDA = torch.device("cuda")
DENSE = SimpleNamespace(mlp=None, decoder=None, kv_layout=None)
WORST = 8 * 0.037     # two layers have eight products in a row, each of which is off by 3.7%; should all errors point the same way


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(x):
    "The number of GRID nearest to `x`, by its definition."
    size = abs(x)
    at = bisect.bisect_left(GRID, size)
    if at == len(GRID): return math.copysign(448, x)
    if at and size - GRID[at - 1] < GRID[at] - size or at and size - GRID[at - 1] == GRID[at] - size and at % 2: at -= 1
    return math.copysign(GRID[at], x)


# ---- numbers

def test_all_bytes():
    numbers = from_e4m3(BYTES.view(E4M3))
    for byte, x in enumerate(numbers.tolist()):
        if byte & 127 == 127: assert math.isnan(x)
        else: assert x == math.copysign(GRID[byte & 127], -1 if byte > 127 else 1) and math.copysign(1, x) == (-1 if byte > 127 else 1)
    assert from_e4m3(BYTES.view(E4M3).view(2, 8, 16)).shape == (2, 8, 16)
    finite = numbers[numbers.isfinite()]
    assert torch.equal(to_e4m3(finite).view(torch.uint8), BYTES[numbers.isfinite()])


@quick
@given(st.floats(width=32, allow_nan=False) | st.floats(-500, 500, width=32) | st.floats(-2**-5, 2**-5, width=32)
       | st.sampled_from([(a + b) / 2 for a, b in zip(GRID, GRID[1:])]))
def test_rounding_takes_the_nearest(x):
    for number in (x, -x):
        got = from_e4m3(to_e4m3(torch.tensor([number]))).item()
        assert got == nearest(number) and math.copysign(1, got) == math.copysign(1, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_too_large_becomes_448(dtype):
    x = torch.tensor([448., 464, 480, 6e4, math.inf, -math.inf, -449, math.nan], dtype=dtype)
    assert from_e4m3(to_e4m3(x))[:-1].tolist() == [448., 448, 448, 448, 448, -448, -448] and to_e4m3(x).float()[-1].isnan()


@quick
@given(seeds, st.integers(1, 70), st.floats(1e-20, 1e20))
def test_rows_stay_within_half_a_step(seed, n, size):
    x = random(seed, 5, n) * size
    x[2] = 0
    before = x.clone()
    q, scale = quantize_fp8(x)
    assert torch.equal(x, before) and q.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (5, 1)
    found, exact = q.double() * scale.double(), x.double()
    # half a step: 2^-4 of the power of two, or 2^-10 where all steps are alike; the scale and the division round by 2^-24 each
    allowed = torch.maximum(exact.abs() * 2**-4, scale.double() * 2**-10) * (1 + 2**-18)
    assert ((found - exact).abs() <= allowed).all() and not q[2].float().any()
    assert torch.allclose(scale * 448, x.abs().amax(-1, keepdim=True).clamp(min=1e-30), rtol=2**-22, atol=0)
    largest = q.float().abs().amax(-1)
    assert all(largest[i] == 448 for i in range(5) if i != 2)
    for i in range(5): assert torch.equal(quantize_fp8(x[i:i + 1])[0].view(torch.uint8), q[i:i + 1].view(torch.uint8))


def test_a_row_with_nan_spoils_itself_alone():
    x, product = random(0, 4, 32), EmulatedFp8Product(random(1, 16, 32))
    clean = product(x)
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = x.clone()
        spoiled[1, 7] = bad
        y = product(spoiled)
        assert y[1].isnan().all() and torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    for bad in (math.nan, math.inf):
        weight = random(0, 16, 32)
        weight[5, 31] = bad
        with pytest.raises(ValueError, match=r"quantization is 'fp8', and row 5 of a weight of shape \(16, 32\) has a number that is not finite"):
            quantize_weight(weight)


# ---- products

@quick
@given(seeds, st.sampled_from([16, 64, 576]), st.integers(0, 20), st.sampled_from([16, 48]), st.booleans())
def test_the_product_is_that_of_rounded_numbers(seed, n, rows, outputs, has_bias):
    """Products of e4m3 numbers are exact in float32; `n` of them are added, then two scales and a bias."""
    x, weight = random(seed, rows, n), random(seed + 1, outputs, n) / 30
    bias = random(seed + 2, outputs) if has_bias else None
    y = EmulatedFp8Product(weight)(x, bias)
    (xq, xs), (wq, ws) = ((q.double(), s.double()) for q, s in (quantize_fp8(x), quantize_fp8(weight)))
    expected, size = (xq @ wq.T) * xs * ws.T, (xq.abs() @ wq.abs().T) * xs * ws.T
    if has_bias: expected, size = expected + bias, size + bias.abs()
    assert y.shape == (rows, outputs) and y.dtype == torch.float32
    assert ((y - expected).abs() <= (n + 3) * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_and_types_of_results(dtype):
    x, weight, bias = random(0, 2, 3, 32).to(dtype), random(1, 16, 32).to(dtype), random(2, 16).to(dtype)
    product = EmulatedFp8Product(weight)
    y = product(x, bias)
    assert y.dtype == dtype and y.shape == (2, 3, 16)
    assert torch.equal(y[1], product(x[1], bias)) and product.weight.nbytes == weight.nbytes // 2


def library_product(weight):
    "The product by `torch._scaled_mm` on this machine, or skip."
    product = Fp8Product(weight)
    try: product(random(0, 2, weight.shape[1]))
    except (RuntimeError, NotImplementedError) as e: pytest.skip(f"no torch._scaled_mm here: {str(e)[:80]}")
    return product


@pytest.mark.parametrize("rows, n, outputs", [(1, 16, 16), (7, 576, 96), (40, 1536, 48)])
def test_the_librarys_product_is_the_emulated_one(rows, n, outputs):
    "Up to the order of sums, and a rounding to bfloat16."
    weight, x, bias = random(1, outputs, n), random(2, rows, n), random(3, outputs)
    weight[3], x[0] = 0, x[0] * 1e6
    y, expected = library_product(weight)(x, bias), EmulatedFp8Product(weight)(x, bias)
    (xq, xs), (wq, ws) = quantize_fp8(x), quantize_fp8(weight)
    size = (xq.float().abs() @ wq.float().abs().T) * xs * ws.T
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= 2**-8 * (expected - bias).abs() + (n + 3) * 2**-23 * (size + bias.abs())).all()


# ---- which layers, and where

def by_hand(weight):
    "The product as an `ops.linear`, without the class."
    scale = weight.float().abs().amax(1) / 448
    rounded = (weight.float() / scale[:, None]).to(E4M3).float()
    def product(x, bias=None):
        row = x.abs().amax(-1, keepdim=True) / 448
        y = ((x / row).to(E4M3).float() @ rounded.T) * row * scale
        return y if bias is None else y + bias
    return product


@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Qwen2", {}), ("Qwen3", {})])
def test_a_model_in_fp8(family, changes, tmp_path):
    "It has the logits of a model whose layers were rounded by hand, to the bit, and stays near the floats."
    make(family, tmp_path, **changes, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    small = load_model(tmp_path, config, torch.float32, "cpu", ops=choose_ops(target(config, quantization="fp8"), "fp8"))
    rounded = Ops(linear=by_hand, head_linear=PlainProduct)
    plain, hand = (load_model(tmp_path, config, torch.float32, "cpu", ops=ops) for ops in (Ops(), rounded))
    expected, logits, by_hand_logits = (our_logits(m, ids) for m in (plain, small, hand))
    assert 0.005 < (logits - expected).norm() / expected.norm() < WORST
    # the CPU's kernels add in another order: a number may fall on the other side of a middle, which a few per cent of the rounding is
    assert (logits - by_hand_logits).norm() < 0.5 * (logits - expected).norm()
    layer = small.model.layers[0]
    assert {type(m.product) for m in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)} == {EmulatedFp8Product}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_other_number_types_and_no_compiler(dtype, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", kernels and cpu_kernels.CAN_BUILD)
    make("Llama", tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)
    config, ids = ModelConfig.from_folder(tmp_path), list(range(20))
    expected = our_logits(load_model(tmp_path, config, torch.float32, "cpu"), ids)
    logits = our_logits(load_model(tmp_path, config, dtype, "cpu", ops=choose_ops(target(config, dtype, quantization="fp8"))), ids)
    assert (logits.float() - expected).norm() / expected.norm() < WORST


def test_sizes_that_do_not_fit_stay_floats(tmp_path):
    assert fits_fp8(torch.empty(32, 48)) and not fits_fp8(torch.empty(32, 40)) and not fits_fp8(torch.empty(40, 32))
    folder = tiny_folder(tmp_path, **FITTING | dict(intermediate_size=72))
    llm = LLM(folder, quantization="fp8", num_kv_blocks=20, ops="fp8")
    layer = llm.engine.runner.model.model.layers[0]
    assert isinstance(layer.self_attn.qkv_proj.product, EmulatedFp8Product) and not isinstance(layer.mlp.down_proj.product, EmulatedFp8Product)
    llm.generate("Hello", SamplingParams(max_tokens=3), use_tqdm=False)


def test_what_is_chosen_without_the_hardware():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        asked = target(DENSE, dtype, quantization="fp8")
        plain = next(filter(None, (OPS[name](replace(asked, quantization=None)) for name in ("bfloat16", "cpu_products", "torch"))))
        ops = choose_ops(asked)
        assert ops.linear.keywords["product"] is EmulatedFp8Product
        assert ops.head_linear is ops.linear.keywords["plain"] is (plain.linear or PlainProduct)
        assert replace(ops, linear=None, head_linear=None) == replace(plain, linear=None, head_linear=None)
        assert choose_ops(replace(asked, quantization="fp8_per_channel")).linear.keywords == ops.linear.keywords
    assert fp8_ops(target()) is None and fp8_ops(target(quantization="int8")) is None
    compiled = choose_ops(target(DENSE, quantization="fp8", compile=True))
    assert compiled.linear.keywords["product"] is EmulatedFp8Product and compiled.norm is compiled_norm


@pytest.mark.parametrize("capability, product", [((8, 0), EmulatedFp8Product), ((8, 6), EmulatedFp8Product), ((8, 9), FusedFp8Product),
                                                 ((9, 0), FusedFp8Product), ((12, 0), FusedFp8Product)], ids=str)
def test_what_is_chosen_on_a_gpu(capability, product, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked = target(DENSE, torch.bfloat16, "cuda", quantization="fp8")
    for compile in (False, True):
        ops = choose_ops(replace(asked, compile=compile))
        assert ops.linear.keywords["product"] is product and ops.attention is TritonAttention and ops.head_linear is PlainProduct
        assert ops.rope_and_cache is (fused_or_compiled_rope_and_cache if compile else fused_rope_and_cache)
    args = EngineArgs("x", kv_cache_dtype="fp8")
    if capability >= (8, 9): assert choose_kv_dtype(args, torch.bfloat16, CUDA) == E4M3
    else:
        with pytest.raises(ValueError, match="kv_cache_dtype must be 'auto' or .*'fp8' on a GPU of compute capability 8.9 or more, got torch.float8_e4m3fn"):
            choose_kv_dtype(args, torch.bfloat16, CUDA)


def test_a_cpu_has_no_fp8(): assert not has_fp8(torch.device("cpu"))


# ---- engines

PROMPTS = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 10]


@pytest.mark.parametrize("options", [dict(quantization="fp8"), dict(kv_cache_dtype="fp8"), dict(quantization="fp8", kv_cache_dtype="fp8_e4m3"),
                                     dict(quantization="fp8_per_channel", load_format="dummy"), dict(quantization="fp8", kv_cache_dtype="fp8", dtype="bfloat16")], ids=str)
def test_engines_finish_and_forget(options, tmp_path):
    "With chunks, preemption and shared beginnings, and the same answers when asked again."
    folder = tiny_folder(tmp_path, **FITTING)
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    llm = LLM(folder, num_kv_blocks=8, max_num_batched_tokens=16, max_model_len=112, **options)
    first = [llm.generate(PROMPTS, params, use_tqdm=False) for _ in range(2)]
    for outs in first: assert [len(o["token_ids"]) for o in outs] == [20, 20, 20]
    assert llm.engine.scheduler.num_preemptions > 0
    assert_idle(llm)
    wide = LLM(folder, num_kv_blocks=40, max_model_len=112, **options)
    outs = [wide.generate(PROMPTS[2], params[0], use_tqdm=False)[0] for _ in range(2)]
    assert outs[1].num_cached_tokens > 0
    assert wide.engine.runner.kv_cache.dtype == (E4M3 if "kv_cache_dtype" in options else wide.engine.runner.kv_cache.dtype)


def first_logprobs(folder, **options):
    "The log-probability of the favourite first token after each of three prompts."
    llm = LLM(folder, max_model_len=400, **dict(num_kv_blocks=60) | options)
    outs = llm.generate([dict(prompt_token_ids=[(7*i*i + n) % 900 + 50 for i in range(n)]) for n in (3, 40, 300)],
                        SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True), use_tqdm=False)
    return torch.tensor([max(p.logprob for p in o.outputs[0].logprobs[0].values()) for o in outs])


def test_chunks_and_backends_read_the_same_cache(tmp_path):
    folder = tiny_folder(tmp_path, **FITTING)
    expected = first_logprobs(folder, kv_cache_dtype="fp8", attention_backend="reference")
    for options in (dict(), dict(attention_backend="torch"), dict(max_num_batched_tokens=32), dict(block_size=5, num_kv_blocks=200)):
        found = first_logprobs(folder, kv_cache_dtype="fp8", **options)
        assert torch.allclose(found, expected, atol=0.02), options     # a number near a middle may be rounded the other way
    assert not torch.allclose(first_logprobs(folder), expected, atol=1e-4), "nothing was rounded"


def test_fp8_over_two_ranks(tmp_path):
    folder = tiny_folder(tmp_path, **FITTING | dict(intermediate_size=96))
    llm = LLM(folder, quantization="fp8", kv_cache_dtype="fp8", tensor_parallel_size=2, device="cpu", num_kv_blocks=40)
    out = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)[0]
    assert len(out["token_ids"]) == 5


def test_a_cache_in_fp8_has_four_times_the_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_args, "kv_memory", lambda *_: 2**20)
    folder = tiny_folder(tmp_path, **FITTING)
    blocks = {kind: LLM(folder, kv_cache_dtype=kind, max_num_seqs=64).engine.runner.kv_cache.shape[2] for kind in ("auto", "bfloat16", "fp8")}
    assert blocks["fp8"] == 2 * blocks["bfloat16"] == 4 * blocks["auto"]


# ---- the cache

def test_as_cached():
    x = torch.tensor([1e6, -1e6, 1.06, math.nan])
    assert as_cached(x, E4M3).float()[:3].tolist() == [448, -448, 1] and as_cached(x, E4M3).float()[3].isnan()
    for dtype in (torch.float32, torch.bfloat16, torch.float16): assert torch.equal(as_cached(x, dtype)[:3], x.to(dtype)[:3])
    assert as_cached(x, torch.float32) is x


def test_storing_writes_bytes_where_they_belong():
    cache = to_e4m3(random(0, 2, 2, 3, 4, 2, 8))
    before, slots = cache.clone(), torch.tensor([9, 0, 4])
    k, v = random(1, 3, 2, 8) * 300, random(2, 3, 2, 8)
    store_kv(cache, 1, k, v, slots)
    assert torch.equal(cache[0].view(torch.uint8), before[0].view(torch.uint8))
    for part, x in zip(slots_of(cache, 1), (k, v)):
        assert torch.equal(part[slots].view(torch.uint8), to_e4m3(x).view(torch.uint8))
    rest = [i for i in range(12) if i not in slots]
    for part, old in zip(slots_of(cache, 1), slots_of(before, 1)): assert torch.equal(part[rest].view(torch.uint8), old[rest].view(torch.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; make gpu runs it on one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", [(1, 2, 32), (2, 3, 20)], ids=str)
def test_all_backends_read_the_same_bytes(shape, window, dtype):
    "Prompts, chunks, decodes and long decodes in splits; some keys are beyond 448."
    batch, cache, q, k, v = mixed([5, 70, 33, 300], [5, 20, 1, 1], 16, *shape, seed=1, dtype=dtype)
    cache, k = to_e4m3(cache.nan_to_num(0)), k.clone()
    k[::3] *= 1000
    if window: q = q / 30
    expected_cache = cache.clone()
    wide = ReferenceAttention(batch, expected_cache, 0.05, window)
    expected = attend(wide, q.float(), k, v, 1)
    for backend in (TorchAttention, TritonAttention):
        stored = cache.clone()
        out = attend(backend(batch, stored, 0.05, window), q, k, v, 1)
        assert torch.equal(stored.view(torch.uint8), expected_cache.view(torch.uint8))
        allowed = {torch.float32: 2**-16, torch.bfloat16: 2.5 * 2**-8}[dtype] * float(slots_of(stored, 1)[1].float().abs().max())
        assert out.dtype == dtype and (out.float() - expected).abs().max() <= allowed


@pytest.mark.parametrize("options, words", [
    (dict(kv_cache_dtype="fp8_e5m2"), "kv_cache_dtype must be one of auto, .*fp8, fp8_e4m3, got 'fp8_e5m2'"), (dict(dtype="fp8"), "dtype must be one of auto, .* got 'fp8'"),
    (dict(quantization="fp4"), r"quantization must be one of \[None, 'int8', 'int4', 'fp8', 'fp8_per_channel'\], got 'fp4'"),
    (dict(quantization="fp8", batch_invariant=True), "batch_invariant must be False here, got True|unless|without kernels"),
    (dict(kv_cache_dtype="fp8", batch_invariant=True), "batch_invariant must be False with fp8 keys and values, got True")], ids=str)
def test_what_is_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words): LLM(tiny_folder(tmp_path, **FITTING), num_kv_blocks=10, **options)


def test_fused_kernels_leave_bytes_to_the_backend(monkeypatch):
    "The kernel that norms, rotates and stores does not round to e4m3; whoever stores by `attention.store` does."
    called = []
    monkeypatch.setattr(fusions, "norm_rotate_store", lambda *args: "fused")
    layer = SimpleNamespace(q_norm=None, layer=0)
    for dtype, fused in ((E4M3, False), (torch.bfloat16, True)):
        attention = object.__new__(TritonAttention)
        attention.kv_cache, attention.metadata, attention.batch = torch.zeros(1, dtype=dtype), None, SimpleNamespace(slot_mapping=None)
        assert (fused_rope_and_cache(layer, None, None, None, attention, lambda *args: called.append(args)) == "fused") == fused
    assert len(called) == 1
