"""The CPU's own ways: packed matrices give the plain ones' numbers, and attention in place agrees with the slow oracle."""
import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels
from nano_vllm.attention import ChunkPlan, DecodeGroup, ReferenceAttention, TorchAttention, attention_backend, make_batch
from nano_vllm.cpu_kernels import (CAN_BUILD, InPlaceAttention, InPlaceQueries, PackedProduct, PlainProduct, build, can_build, fused_norm,
                                   fused_swiglu, is_whole, kernels, load_library, packed_linear, predefined_macros, toolchain)
from nano_vllm.kv_blocks import ScheduledSequence
from nano_vllm.layers import OPS, Ops, Target, choose_ops, rms_norm, silu_and_mul
from nano_vllm.model import ModelConfig
from nano_vllm.weights import load_model
from test_attention import attend, cases, check_against_the_reference, check_nothing_before_the_window_is_read, new, slow
from test_model import make, our_logits

compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
CASES = cases(dims=(16, 64), groups=(1, 3, 7))   # each triple of numbers is compiled once
ROUNDING = 2**-24   # a float32 is off by at most this part of its size


def target(config=None, dtype=torch.float32, device="cpu", **changes):
    "What ops are chosen for."
    return Target(config, torch.device(device), dtype, changes.pop("kv_cache_dtype", dtype), **changes)


def close(ours, expected, config, tokens, unit=ROUNDING):
    """Are these what a model of `config` gives for texts of `tokens`, but for rounding? A sum of n numbers is off by n roundings of its
    terms at most, and a decoder is a chain of sums: in each layer over the hidden size (two norms, two products), over heads and tokens
    (scores, averages, o) and over the MLP, at the end over the hidden size. If the cache rounds more coarsely, a number between two that
    it can hold may go either way, in each layer: then all may be off by such a unit for each."""
    c = config
    layer = 4*c.hidden_size + c.head_dim + tokens + c.num_heads*c.head_dim + c.intermediate_size
    roundings = c.num_layers*layer + 2*c.hidden_size
    bound = max(2 * roundings * ROUNDING, c.num_layers * unit)
    torch.testing.assert_close(ours, expected, atol=float(bound * expected.nan_to_num().abs().max()), rtol=0, equal_nan=True)


# ---- packed matrices

@pytest.mark.parametrize("family, changes", [
    ("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)),
    ("Qwen2", {}), ("Qwen3", {})])
def test_a_packed_model_gives_the_plain_models_logits(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, packed = (load_model(tmp_path, config, torch.float32, "cpu", ops=ops) for ops in (Ops(), Ops(linear=packed_linear)))
    for n in (1, 2, 40): close(our_logits(packed, ids[:n]), our_logits(plain, ids[:n]), config, n)
    left = {n for n, p in packed.named_parameters() if p.dim() == 2}
    assert left == {"model.embed_tokens.weight"}   # no matrix is held twice, but for the embedding
    assert all(type(m.product) is PackedProduct for m in packed.modules() if getattr(m, "product", None))


def test_other_number_types_stay_as_they_are(tmp_path):
    make("Llama", tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    plain, chosen = (load_model(tmp_path, config, torch.bfloat16, "cpu", ops=ops)
                     for ops in (Ops(), OPS["cpu_kernels"](target(config, torch.bfloat16)) or Ops()))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in chosen.named_parameters()]
    logits = our_logits(chosen, [1, 2, 3])
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, our_logits(plain, [1, 2, 3]))
    weight, x = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(2, 6, dtype=torch.bfloat16)
    assert type(packed_linear(weight)) is PlainProduct   # whoever packs one all the same gets the plain product
    assert torch.equal(packed_linear(weight)(x, x[0, :4]), torch.nn.functional.linear(x, weight, x[0, :4]))


# ---- attention in place

def decode(seq): return ScheduledSequence(seq, seq.num_computed_tokens, 1, True)


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
    both, _ = attend(InPlaceAttention, make_batch([decode(s) for s in seqs], 10), cache, q, k, v, 0)
    alone, _ = attend(InPlaceAttention, make_batch([decode(seqs[0])], 10), cache, q[:1], k[:1], v[:1], 0)
    assert torch.equal(both[:1], alone)


@compiled
def test_large_scores_do_not_overflow():
    batch = make_batch([decode(new(50, 49, range(5)))], 10)
    cache, q = torch.randn(1, 2, 5, 10, 1, 16) * 100, torch.randn(1, 1, 16) * 100
    k, v = torch.randn(2, 1, 1, 16)
    expected, out = (attend(b, batch, cache, q, k, v, 0)[0] for b in (ReferenceAttention, InPlaceAttention))
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)


def parts(dtype, dim):
    batch = make_batch([decode(new(50, 49, range(5))), ScheduledSequence(new(9, 0, [5]), 0, 9, True)], 10)
    return InPlaceAttention(batch, torch.zeros(1, 2, 6, 10, 1, dim, dtype=dtype), 1.0).parts


@compiled
def test_what_the_kernel_cannot_do_is_pytorchs(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16): assert [type(p) for p in parts(dtype, 32)] == [InPlaceQueries]
    for dtype, dim in ((torch.float16, 32), (torch.float32, 20)): assert type(parts(dtype, dim)[0]) is DecodeGroup
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    assert type(parts(torch.float32, 32)[0]) is DecodeGroup


@compiled
@pytest.mark.parametrize("query_len, context, window, in_place", [
    (1, 10**6, None, True), (32, 10**5, None, True), (200, 7000, None, False), (64, 1024, None, True), (65, 1024, None, False),
    (256, 256, None, True), (257, 257, None, False), (200, 7000, 300, True)])
def test_long_chunks_over_long_texts_are_gathered(query_len, context, window, in_place):
    "What reading in place costs grows with both lengths; a window shortens the text."
    seq = new(context, context - query_len, range(context // 16 + 1))
    batch = make_batch([decode(new(9, 8, [0])), ScheduledSequence(seq, context - query_len, query_len, True)], 16)
    parts = InPlaceAttention(batch, torch.zeros(1, 2, 1, 16, 1, 16), 1.0, window).parts
    assert [type(part) for part in parts] == ([InPlaceQueries] if in_place else [InPlaceQueries, ChunkPlan])
    assert len(parts[0].tokens) == (1 + query_len if in_place else 1)


@compiled
@slow
@given(CASES, st.integers(0, 9), st.integers(0, 9))
def test_tables_are_read_where_they_lie(case, more_rows, more_columns):
    "The block table is a view of a wider one, whose other numbers lead nowhere; none of it is copied."
    batch, *rest = case
    num_rows, width = batch.block_tables.shape
    wide = torch.full((num_rows + more_rows, width + more_columns), 2**40)
    view = wide[:num_rows, :width]
    view.copy_(batch.block_tables)
    expected, _ = attend(InPlaceAttention, batch, *rest)
    out, _ = attend(InPlaceAttention, replace(batch, block_tables=view), *rest)
    assert torch.equal(out, expected)
    part = InPlaceQueries(replace(batch, block_tables=view), np.arange(num_rows), rest[0].shape[3])
    assert part.queries.block_tables == wide.data_ptr() and part.queries.stride == wide.shape[1]


@compiled
def test_preparing_many_sequences_takes_no_more_calls_than_preparing_few():
    "What the host does for a step of decodes is a few operations on whole columns."
    def count(num_seqs):
        batch, calls = make_batch([decode(new(50, 49, range(5))) for _ in range(num_seqs)], 10), []
        cache = torch.zeros(1, 2, 6, 10, 1, 16)
        sys.setprofile(lambda frame, event, argument: calls.append(event))
        try: attention = InPlaceAttention(batch, cache, 1.0)
        finally: sys.setprofile(None)
        assert attention.parts[0].queries.num_tokens == num_seqs
        return len(calls)
    assert count(256) == count(2)


def test_the_choice_of_a_backend():
    assert attention_backend("torch") is TorchAttention
    if CAN_BUILD: assert attention_backend("in_place") is InPlaceAttention
    else:
        with pytest.raises(ValueError, match="attention_backend is 'in_place', which needs"): attention_backend("in_place")
    with pytest.raises(ValueError, match="attention_backend is 'in_place', which needs"): attention_backend("in_place", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_chosen(dtype):
    "Attention in place for every number type, the rest for float32; without the compiler what oneDNN has."
    ops = OPS["cpu_kernels"](target(dtype=dtype))
    backend = InPlaceAttention if CAN_BUILD else TorchAttention
    if dtype == torch.float32:
        small = dict(norm=fused_norm, activation=fused_swiglu) if CAN_BUILD else {}
        assert ops == Ops(attention=backend, linear=packed_linear, **small)
    else: assert ops == (Ops(attention=backend) if CAN_BUILD else None)
    for other in (dict(device="cuda"), dict(quantization="int8"), dict(compile=True)): assert OPS["cpu_kernels"](target(dtype=dtype, **other)) is None


# ---- compiling

@compiled
def test_a_library_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    load = kernels.__wrapped__
    threads = [threading.Thread(target=load, args=(32, 2, 2, 32)) for _ in range(3)]   # at once, as ranks do
    for t in threads: t.start()
    for t in threads: t.join()
    file, = (tmp_path/"kernels").glob("*.so")
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(cpu_kernels, "build", None)   # to be called no more
    assert load(32, 2, 2, 32).decode and file.stat().st_mtime_ns == written
    monkeypatch.setattr(cpu_kernels, "SOURCE", cpu_kernels.SOURCE + "\n")
    with pytest.raises(TypeError): load(32, 2, 2, 32)      # another source is another library


@compiled
def test_a_library_stays_with_its_processor_and_compiler(tmp_path, monkeypatch):
    "A home may be shared by machines: what another one compiled may hold instructions that this one lacks."
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    source = 'extern "C" int one() { return 1; }'
    load_library(source)
    macros, words = predefined_macros(toolchain().compile), toolchain().compile
    assert {16: "__AVX512F__", 8: "__AVX2__", 4: "__ARM_NEON"}[cpu_kernels.LANES] in macros and "__VERSION__" in macros
    assert ("__AVX512F__" in macros) == (cpu_kernels.LANES == 16)      # no more than PyTorch makes use of
    monkeypatch.setattr(cpu_kernels, "predefined_macros", {words: macros + " and more"}.get)
    assert load_library(source).one() == 1 and len(list((tmp_path/"kernels").glob("*.so"))) == 2
    monkeypatch.setattr(cpu_kernels, "toolchain", lambda: toolchain()._replace(link=(*toolchain().link, "-s")))
    assert load_library(source).one() == 1 and len(list((tmp_path/"kernels").glob("*.so"))) == 3


@pytest.mark.ci
@compiled
@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.write_bytes(b""),
                                  lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), lambda path: path.with_suffix(".sha256").unlink(),
                                  lambda path: path.with_suffix(".sha256").write_bytes(b"\xff\xfe"), lambda path: path.unlink()],
                         ids=["cut", "empty", "changed", "no digest", "a digest that is no text", "gone"])
def test_a_harmed_library_is_built_again(harm, tmp_path, monkeypatch):
    "In a process of its own: one that opened it would end."
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    source = f'extern "C" int two() {{ return 2; }} // {tmp_path.name}'
    assert load_library(source).two() == 2
    path, = (tmp_path/"kernels").glob("*.so")
    whole = path.read_bytes()
    path.unlink()                                  # what is open stays as it was
    path.write_bytes(whole)
    harm(path)
    assert not is_whole(path)
    code = f"from nano_vllm.cpu_kernels import load_library; assert load_library({source!r}).two() == 2"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
    assert is_whole(path)


def broken_compiler(tmp_path, monkeypatch):
    "Compilers that fail, first on the path."
    (tmp_path/"bin").mkdir()
    for name in ("g++", "clang++"):
        (tmp_path/"bin"/name).write_text("#!/bin/sh\necho no luck today >&2; exit 1\n")
        (tmp_path/"bin"/name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}")


def no_folder(tmp_path, monkeypatch):
    "A cache where there is a file in place of the folder."
    (tmp_path/"cache").mkdir(exist_ok=True)
    (tmp_path/"cache/kernels").write_text("not a folder")


@pytest.mark.ci
@compiled
@pytest.mark.parametrize("fails", [broken_compiler, no_folder])
@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16"), dict(attention_backend="torch")], ids=["default", "bfloat16", "torch"])
def test_without_a_compiler_that_works_the_engine_takes_pytorchs_path(fails, options, tmp_path, monkeypatch):
    "In a process of its own, since it is asked once; the log says why, once."
    folder = tiny_folder(tmp_path/"model")
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path/"cache"))
    fails(tmp_path, monkeypatch)
    code = f"""from nano_vllm import LLM, SamplingParams, cpu_kernels
llm = LLM({str(folder)!r}, num_kv_blocks=20, **{options!r})
assert not cpu_kernels.can_build() and llm.engine.runner.ops.attention.__name__ == "TorchAttention"
print(len(llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0]["token_ids"]))"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.stdout == "3\n" and done.stderr.count("no kernels for the CPU") == 1, done.stderr


@compiled
def test_a_compiler_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="(?s) could not compile.*nonsense"): build(toolchain(), "nonsense;", [], tmp_path/"a.so")
    assert list(tmp_path.iterdir()) == []
    build(toolchain(), 'extern "C" float tiny() { volatile float x = 1e-38f; return x / 64; }', [], tmp_path/"b.so")
    library = ctypes.CDLL(str(tmp_path/"b.so"))
    library.tiny.restype = ctypes.c_float
    assert library.tiny() > 0 and torch.tensor(1e-38) / 64 > 0   # loading it leaves denormal numbers alone


# ---- in the engine

def test_the_engine_answers_as_with_the_plain_path(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=30, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    answers = []
    for settings in (dict(ops="torch"), dict(ops="cpu_kernels"), dict(attention_backend="torch"), {}):
        llm = LLM(folder, **settings, num_kv_blocks=40, max_num_batched_tokens=32)
        answers.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
        assert_idle(llm)
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_a_quantization_that_nobody_knows():
    with pytest.raises(ValueError, match="quantization must be one of .None.*, got 'int3'"): LLM("smollm2-135m", quantization="int3")
    with pytest.raises(ValueError, match="quantization"): LLM("smollm2-135m", quantization=["int8"])


# ---- the small kernels

@compiled
@slow
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([1, 7, 64, 576, 100]), st.floats(1e-3, 1e4), st.booleans())
def test_the_fused_norm_is_the_norm(seed, rows, dim, size, has_residual):
    "In float64 the norm is exact; a mean of n squares is off by n roundings, its root by half of them, and a few follow."
    g = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, rows, dim, generator=g) * size
    weight, eps = torch.randn(dim, generator=g), 1e-6
    before, other = (x.clone(), residual.clone()), residual if has_residual else None
    ours = fused_norm(x, weight, eps, other)
    total = x + residual if has_residual else x
    normed = ours
    if has_residual:
        normed, ours_total = ours
        assert torch.equal(ours_total, total)
    torch.testing.assert_close(normed.double(), rms_norm(total.double(), weight.double(), eps), rtol=(dim/2 + 8) * ROUNDING, atol=0)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])   # law 7
    if rows > 1: assert torch.equal(fused_norm(x[:1], weight, eps), fused_norm(x, weight, eps)[:1])


@compiled
def test_the_fused_norm_takes_views_and_heads():
    x, weight = torch.randn(5, 3, 40)[..., 3:19], torch.full((16,), 2.0)   # as q_norm sees queries within q, k and v
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    torch.testing.assert_close(fused_norm(x, weight, 1e-6).double(), exact, rtol=16 * ROUNDING, atol=0)


@compiled
def test_the_fused_norm_reads_nothing_behind_its_arguments():
    "What does not agree in shape is the plain norm's: it broadcasts, or refuses."
    x, weight = torch.randn(3, 64), torch.randn(64)
    for shape in ((32,), (65,)):
        with pytest.raises(RuntimeError, match="must match the size"): fused_norm(x, torch.randn(shape), 1e-6)
    row = torch.randn(1, 64)
    for ours, plain in zip(fused_norm(x, weight, 1e-6, row), rms_norm(x, weight, 1e-6, row)): torch.testing.assert_close(ours, plain)
    every_other = torch.randn(128)[::2]
    torch.testing.assert_close(fused_norm(x, every_other, 1e-6), rms_norm(x, every_other, 1e-6))


@compiled
@slow
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([3, 16, 48, 43, 1536]), st.floats(1e-3, 200))
def test_the_fused_activation_is_the_activation(seed, rows, dim, size):
    "The exponential is off by its series' rest (2 roundings' worth) and 4 roundings, sum, quotient and products by 6; 16 leave room."
    x = torch.randn(rows, 2*dim, generator=torch.Generator().manual_seed(seed)) * size
    before = x.clone()
    exact = silu_and_mul(x.double())
    tiny = float(x.abs().max())**2 * 2**-125   # beyond e**-87 the kernel's exponential is no smaller
    torch.testing.assert_close(fused_swiglu(x).double(), exact, rtol=16 * ROUNDING, atol=tiny)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_types_go_the_plain_way(dtype):
    x, residual, weight = torch.randn(3, 4, 32).to(dtype)
    assert torch.equal(fused_swiglu(x), silu_and_mul(x))
    for ours, plain in zip(fused_norm(x, weight[0], 1e-6, residual), rms_norm(x, weight[0], 1e-6, residual)): assert torch.equal(ours, plain)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_prepared_model_gives_the_plain_models_logits(family, tmp_path):
    make(family, tmp_path)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, ours = (load_model(tmp_path, config, torch.float32, "cpu", ops=ops) for ops in (Ops(), OPS["cpu_kernels"](target(config))))
    close(our_logits(ours, ids), our_logits(plain, ids), config, len(ids))


# A cache in 16 bits

def test_a_cache_in_bfloat16_has_twice_the_blocks(tmp_path, monkeypatch):
    from nano_vllm import engine_args
    monkeypatch.setattr(engine_args, "kv_memory", lambda *_: 2**20)
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    blocks = {}
    for kind in ("auto", "bfloat16"):
        runner = LLM(folder, kv_cache_dtype=kind, max_num_seqs=64).engine.runner
        blocks[runner.kv_cache.dtype] = runner.kv_cache.shape[2]
    assert blocks[torch.bfloat16] == 2 * blocks[torch.float32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "float16", "fp8"])
def test_every_cache_under_every_model(dtype, kv_cache_dtype, tmp_path):
    """Both backends read the same rounded numbers: the same first tokens, for decodes, chunks and prompts. Beside a cache in bfloat16,
    queries and weights may be rounded as well."""
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = [dict(prompt_token_ids=[(7*i*i + n) % 900 + 50 for i in range(n)]) for n in (3, 40, 300)]
    answers = []
    for backend in ("torch", "auto"):
        llm = LLM(folder, dtype=dtype, kv_cache_dtype=kv_cache_dtype, attention_backend=backend, num_kv_blocks=60, max_model_len=400)
        outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True), use_tqdm=False)
        answers.append([max(p.logprob for p in o.outputs[0].logprobs[0].values()) for o in outs])
        assert llm.engine.runner.kv_cache.dtype == getattr(torch, dict(fp8="float8_e4m3fn").get(kv_cache_dtype, kv_cache_dtype))
    # a step of fp8 is wide, where a number is rounded the other way
    rounded = "bfloat16" in (dtype, kv_cache_dtype) or kv_cache_dtype == "fp8"
    assert torch.allclose(*map(torch.tensor, answers), atol=0.1 if rounded else 1e-3)


def test_a_cache_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, float32, bfloat16, float16, float, half, fp8, fp8_e4m3, got 'int8'"):
        LLM(tiny_folder(tmp_path), kv_cache_dtype="int8")
