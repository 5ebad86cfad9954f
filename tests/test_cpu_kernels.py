"""The CPU's own ways: packed matrices give the plain ones' numbers, and attention in place agrees with the slow oracle."""
import ctypes
import threading

import pytest
import torch
from hypothesis import given, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels
from nano_vllm.attention import FASTEST, DecodeGroup, ReferenceAttention, TorchAttention, attention_backend, make_batch
from nano_vllm.cpu_kernels import InPlaceAttention, InPlaceDecodes, build, fused_norm, fused_swiglu, kernels, pack, prepare
from nano_vllm.kv_blocks import Chunk
from nano_vllm.layers import RMSNorm, SwiGLU
from nano_vllm.model import ModelConfig
from nano_vllm.weights import load_model
from test_attention import attend, cases, check_against_the_reference, check_nothing_before_the_window_is_read, new, slow
from test_model import make, our_logits

compiled = pytest.mark.skipif(FASTEST["cpu"] != "in_place", reason="no AVX-512 or no g++ here")
CASES = cases(dims=(16, 64), groups=(1, 3, 7))   # each triple of numbers is compiled once


# ---- packed matrices

@pytest.mark.parametrize("family, changes", [
    ("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    ("Qwen2", {}), ("Qwen3", {})])
def test_a_packed_model_gives_the_plain_models_logits(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, packed = (load_model(tmp_path, config, torch.float32, "cpu") for _ in range(2))
    pack(packed)
    for n in (1, 2, 40): torch.testing.assert_close(our_logits(packed, ids[:n]), our_logits(plain, ids[:n]), atol=1e-5, rtol=0)
    left = {n for n, p in packed.named_parameters() if p.dim() == 2}
    assert left == {"model.embed_tokens.weight"}   # no matrix is held twice, but for the embedding


def test_other_number_types_stay_as_they_are(tmp_path):
    make("Llama", tmp_path)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.bfloat16, "cpu")
    names = [n for n, _ in model.named_parameters()]
    pack(model)
    assert [n for n, _ in model.named_parameters()] == names and our_logits(model, [1, 2, 3]).dtype == torch.bfloat16


# ---- attention in place

@compiled
@slow
@given(CASES)
def test_agrees_with_the_reference(case): check_against_the_reference(InPlaceAttention, case)


@compiled
@slow
@given(CASES)
def test_nothing_before_the_window_is_read(case): check_nothing_before_the_window_is_read(InPlaceAttention, case)


@compiled
@given(st.integers(0, 2**31), st.integers(1, 70))
@slow
def test_a_decode_is_the_same_to_the_bit_whoever_shares_its_batch(seed, length):
    g = torch.Generator().manual_seed(seed)
    seqs = [new(n, n - 1, range(10*i, 10*i + 10)) for i, n in enumerate((length, 33, 90))]
    cache = torch.randn(1, 2, 30, 10, 3, 64, generator=g)
    q, k, v = (torch.randn(3, h, 64, generator=g) for h in (9, 3, 3))
    both, _ = attend(InPlaceAttention, make_batch([Chunk(s, 1) for s in seqs], 10), cache, q, k, v, 0)
    alone, _ = attend(InPlaceAttention, make_batch([Chunk(seqs[0], 1)], 10), cache, q[:1], k[:1], v[:1], 0)
    assert torch.equal(both[:1], alone)


@compiled
def test_large_scores_do_not_overflow():
    batch = make_batch([Chunk(new(50, 49, range(5)), 1)], 10)
    cache, q = torch.randn(1, 2, 5, 10, 1, 16) * 100, torch.randn(1, 1, 16) * 100
    k, v = torch.randn(2, 1, 1, 16)
    expected, out = (attend(b, batch, cache, q, k, v, 0)[0] for b in (ReferenceAttention, InPlaceAttention))
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)


def parts(dtype, dim):
    batch = make_batch([Chunk(new(50, 49, range(5)), 1), Chunk(new(9, 0, [5]), 9)], 10)
    return InPlaceAttention(batch, torch.zeros(1, 2, 6, 10, 1, dim, dtype=dtype), 1.0).parts


def test_what_the_kernel_cannot_do_is_pytorchs():
    for dtype in (torch.float32, torch.bfloat16): assert [type(p) for p in parts(dtype, 32)][0] is InPlaceDecodes
    for dtype, dim in ((torch.float16, 32), (torch.float32, 20)): assert type(parts(dtype, dim)[0]) is DecodeGroup


def test_the_choice_of_a_backend(monkeypatch):
    assert attention_backend("in_place") is InPlaceAttention and attention_backend("torch") is TorchAttention
    assert attention_backend("auto", "cpu") is (InPlaceAttention if cpu_kernels.CAN_BUILD else TorchAttention)
    assert attention_backend("auto", "cuda") is not InPlaceAttention


# ---- compiling

@compiled
def test_a_library_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    load = kernels.__wrapped__
    threads = [threading.Thread(target=load, args=(32, 2, 2, 32)) for _ in range(3)]   # at once, as ranks do
    for t in threads: t.start()
    for t in threads: t.join()
    file, = (tmp_path/"kernels").iterdir()
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(cpu_kernels, "build", None)   # to be called no more
    assert load(32, 2, 2, 32).decode and file.stat().st_mtime_ns == written
    monkeypatch.setattr(cpu_kernels, "SOURCE", cpu_kernels.SOURCE + "\n")
    with pytest.raises(TypeError): load(32, 2, 2, 32)      # another source is another library


@compiled
def test_a_compiler_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="(?s)g.. could not compile.*nonsense"): build("nonsense;", [], tmp_path/"a.so")
    assert list(tmp_path.iterdir()) == []
    build('extern "C" float tiny() { volatile float x = 1e-38f; return x / 64; }', [], tmp_path/"b.so")
    library = ctypes.CDLL(str(tmp_path/"b.so"))
    library.tiny.restype = ctypes.c_float
    assert library.tiny() > 0 and torch.tensor(1e-38) / 64 > 0   # loading it leaves denormal numbers alone


# ---- in the engine

def test_the_engine_answers_as_with_the_plain_path(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=30, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    answers = []
    for backend in ("torch", "auto"):
        llm = LLM(folder, attention_backend=backend, num_kv_blocks=40, max_num_batched_tokens=32)
        answers.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
        assert_idle(llm)
    assert answers[0] == answers[1]


def test_a_quantization_that_nobody_knows():
    with pytest.raises(ValueError, match="quantization must be one of .None.*, got 'int3'"): LLM("smollm2-135m", quantization="int3")
    with pytest.raises(ValueError, match="quantization"): LLM("smollm2-135m", quantization=["int8"])


# ---- the small kernels

@compiled
@slow
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([1, 7, 64, 576, 100]), st.floats(1e-3, 1e4), st.booleans())
def test_the_fused_norm_is_the_norm(seed, rows, dim, size, has_residual):
    g = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, rows, dim, generator=g) * size
    layer = RMSNorm(dim)
    layer.weight.copy_(torch.randn(dim, generator=g))
    before, arguments = (x.clone(), residual.clone()), (x, residual) if has_residual else (x,)
    ours, expected = fused_norm(layer, *arguments), layer(*arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * size if has_residual else 1e-5)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])   # law 7
    if rows > 1: assert torch.equal(fused_norm(layer, x[:1]), fused_norm(layer, x)[:1])


@compiled
def test_the_fused_norm_takes_views_and_heads():
    layer, x = RMSNorm(16), torch.randn(5, 3, 40)[..., 3:19]   # as q_norm sees queries within q, k and v
    layer.weight.fill_(2.0)
    torch.testing.assert_close(fused_norm(layer, x), layer(x), rtol=1e-5, atol=1e-5)


@compiled
@slow
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([3, 16, 48, 43, 1536]), st.floats(1e-3, 200))
def test_the_fused_activation_is_the_activation(seed, rows, dim, size):
    x = torch.randn(rows, 2*dim, generator=torch.Generator().manual_seed(seed)) * size
    before = x.clone()
    torch.testing.assert_close(fused_swiglu(x), SwiGLU()(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_prepared_model_gives_the_plain_models_logits(family, tmp_path):
    make(family, tmp_path)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, ours = (load_model(tmp_path, config, torch.float32, "cpu") for _ in range(2))
    prepare(ours)
    torch.testing.assert_close(our_logits(ours, ids), our_logits(plain, ids), atol=1e-5, rtol=0)


# A cache in 16 bits

def test_a_cache_in_bfloat16_has_twice_the_blocks(tmp_path, monkeypatch):
    from nano_vllm import engine
    monkeypatch.setattr(engine, "kv_memory", lambda device, utilization: 2**20)
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    blocks = {}
    for kind in ("auto", "bfloat16"):
        runner = LLM(folder, kv_cache_dtype=kind, max_num_seqs=64).runner
        blocks[runner.kv_cache.dtype] = runner.kv_cache.shape[2]
    assert blocks[torch.bfloat16] == 2 * blocks[torch.float32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "float16"])
def test_every_cache_under_every_model(dtype, kv_cache_dtype, tmp_path):
    "Both backends read the same rounded numbers: the same first tokens, for decodes, chunks and prompts."
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = [dict(prompt_token_ids=[(7*i*i + n) % 900 + 50 for i in range(n)]) for n in (3, 40, 300)]
    answers = []
    for backend in ("torch", "auto"):
        llm = LLM(folder, dtype=dtype, kv_cache_dtype=kv_cache_dtype, attention_backend=backend, num_kv_blocks=60, max_model_len=400)
        outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True), use_tqdm=False)
        answers.append([max(p.logprob for p in o.outputs[0].logprobs[0].values()) for o in outs])
        assert llm.runner.kv_cache.dtype == getattr(torch, kv_cache_dtype)
    assert torch.allclose(*map(torch.tensor, answers), atol=1e-3 if dtype == "float32" else 0.1)


def test_a_cache_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, float32, bfloat16, float16, got 'fp8'"):
        LLM(tiny_folder(tmp_path), kv_cache_dtype="fp8")
