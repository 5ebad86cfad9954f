"""The engine's own products, its way into attention, and its draw: each against the plain operators, and to the bit where it matters."""
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels
from nano_vllm.attention import ReferenceAttention, TorchAttention, make_batch
from nano_vllm.cpu_kernels import CAN_BUILD, InPlaceAttention, PackedProduct, PlainProduct, can_build
from nano_vllm.cpu_products import TiledProduct, best_linear, fast_draw, fused_rope_and_cache
from nano_vllm.kv_blocks import ScheduledSequence
from nano_vllm.layers import OPS, Ops, RMSNorm, Rotary, rope_and_cache
from nano_vllm.model import ModelConfig
from nano_vllm.sampler import SamplingMetadata, random_sample, sample
from nano_vllm.weights import load_model
from test_attention import new
from test_cpu_kernels import ROUNDING, close, target
from test_model import make, our_logits

compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_product(product, x, weight, bias=None):
    "A sum of n products and a bias, in whatever order, is off by at most n + 1 roundings of the sum of their sizes."
    y, before = product(x, bias), x.clone()
    terms = [x.double(), weight.double().T]
    exact, size = terms[0] @ terms[1], terms[0].abs() @ terms[1].abs()
    if bias is not None: exact, size = exact + bias.double(), size + bias.double().abs()
    assert y.dtype == torch.float32 and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= (weight.shape[1] + 2) * ROUNDING * size).all()
    assert torch.equal(x, before)


@compiled
@quick
@given(seeds, st.integers(0, 70), st.integers(1, 130), st.sampled_from([32, 64, 160]), st.booleans())
def test_the_product(seed, rows, inputs, outputs, has_bias):
    x, weight, bias = random(seed, rows, inputs), random(seed + 1, outputs, inputs), random(seed + 2, outputs)
    check_product(TiledProduct(weight), x, weight, bias if has_bias else None)


@compiled
@quick
@given(seeds, st.integers(2, 40), st.integers(0, 39))
def test_a_row_is_the_same_to_the_bit_in_every_batch(seed, rows, which):
    x, product = random(seed, rows, 80), TiledProduct(random(seed + 1, 64, 80))
    which %= rows
    assert torch.equal(product(x)[which], product(x[which:which+1])[0])


@compiled
def test_shapes_and_views():
    weight = random(1, 32, 20)
    check_product(TiledProduct(weight), random(2, 6, 5, 40)[..., ::2], weight)


@compiled
@pytest.mark.parametrize("x", [torch.ones(3, 19), torch.ones(3, 40), torch.ones(20, 1), torch.tensor(1.), torch.ones(3, 20).double(), torch.ones(3, 20).bfloat16()],
                         ids=lambda x: f"{x.dtype}-{tuple(x.shape)}")
def test_rows_that_do_not_fit_are_refused_and_not_read(x):
    with pytest.raises(ValueError, match="x must be float32 rows of 20 numbers on a CPU, got torch"): TiledProduct(random(1, 32, 20))(x)


def test_each_matrix_gets_the_best_product_that_fits():
    tiled = TiledProduct if CAN_BUILD else PackedProduct
    assert type(best_linear(random(1, 32, 20))) is tiled and type(best_linear(random(1, 40, 20))) is PackedProduct
    assert type(best_linear(random(1, 32, 20).bfloat16())) is PlainProduct


@compiled
def test_one_rows_infinity_stays_its_own():
    x = random(0, 20, 48)
    clean = TiledProduct(random(1, 64, 48))(x)
    x[3] = float("nan")
    spoiled = TiledProduct(random(1, 64, 48))(x)
    assert spoiled[3].isnan().all() and torch.equal(spoiled[:3], clean[:3]) and torch.equal(spoiled[4:], clean[4:])


# ---- the way into attention

@compiled
@quick
@given(seeds, st.sampled_from([(1, 1, 16), (3, 1, 64), (2, 2, 32), (6, 2, 16)]), st.integers(1, 9), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rotating_and_storing_in_one_kernel(seed, sizes, tokens, has_norms, dtype):
    "A rotation is two products and a sum, each of them rounded once; a norm divides by the root of a sum of `dim` squares."
    heads, kv_heads, dim = sizes
    layer = SimpleNamespace(head_dim=dim, layer=1, q_norm=None, split_heads=functools.partial(split_heads, kv_heads, dim))
    layer.k_norm = None
    if has_norms:
        layer.q_norm, layer.k_norm = RMSNorm(dim), RMSNorm(dim)
        for i, norm in enumerate((layer.q_norm, layer.k_norm)): norm.weight.copy_(random(seed + i, dim))
    qkv, cache = random(seed, tokens, (heads + 2*kv_heads) * dim), torch.zeros(2, 2, 3, 16, kv_heads, dim, dtype=dtype)
    seq = new(20 + tokens, 20, [2, 0, 1])
    batch = make_batch([ScheduledSequence(seq, 20, tokens, True)], 16)
    cos, sin = Rotary(dim, dict(rope_theta=1e4), 64)(batch.positions)
    both, before = [], qkv.clone()
    for function, backend in ((rope_and_cache, TorchAttention), (fused_rope_and_cache, InPlaceAttention), (fused_rope_and_cache, ReferenceAttention)):
        own = cache.clone()
        both.append((function(layer, qkv, cos, sin, backend(batch, own, 1.0)), own))
    (q, expected), (fused_q, fused), (other_q, other) = both
    largest = float(max(qkv.abs().max(), q.abs().max(), expected.abs().max()))
    roundings = 4 + (dim + 8 if has_norms else 0)
    torch.testing.assert_close(fused_q, q, rtol=0, atol=roundings * ROUNDING * largest)
    # a number that lies between two of bfloat16 may go either way
    unit = ROUNDING * roundings if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(fused[1].float(), expected[1].float(), rtol=0, atol=unit * largest)
    assert torch.equal(fused[1, 1], expected[1, 1])     # values are not rotated
    assert not fused[0].any() and torch.equal(fused != 0, expected != 0)
    assert torch.equal(other_q, q) and torch.equal(other, expected) and torch.equal(qkv, before)


def split_heads(kv_heads, dim, qkv):
    kv = kv_heads * dim
    return [x.unflatten(-1, (-1, dim)) for x in qkv.split([qkv.shape[1] - 2*kv, kv, kv], -1)]


# ---- the draw

def make_rows(n, seed, **params):
    return [SimpleNamespace(params=SamplingParams(**params), seed=seed + i, prompt_token_ids=[1], output_token_ids=[5] * i, stop_token_ids=set())
            for i in range(n)]


ASKED = [dict(temperature=1.0), dict(temperature=0.3), dict(temperature=2.0), dict(temperature=0.6, top_k=5), dict(top_p=0.7), dict(min_p=0.1)]


@compiled
@quick
@given(seeds, st.lists(st.sampled_from(ASKED), min_size=1, max_size=9), st.sampled_from([16, 33, 160, 4096]),
       st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.booleans())
def test_the_draw_is_the_samplers(seed, asked, vocab, spread, masked):
    rows = [row for i, params in enumerate(asked) for row in make_rows(1, seed + i, **params)]
    x = random(seed, len(rows), vocab) * spread
    if masked: x[:, torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < 0.9] = -torch.inf
    x[:, vocab // 2] = 0.1   # at least one token is left
    before = x.clone()
    metadata = SamplingMetadata.of(rows)
    assert torch.equal(fast_draw(x, metadata), random_sample(x, metadata)) and torch.equal(x, before)
    plain = [row for row in rows if row.params.temperature != 1 and not row.params.top_k]
    if plain and len(plain) < len(rows):   # nobody's token depends on who else is drawn for
        at = [i for i, row in enumerate(rows) if row in plain]
        assert torch.equal(fast_draw(x[at], SamplingMetadata.of(plain)), fast_draw(x, metadata)[at])


@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(vocab_size=96)),
                                             ("Qwen2", {}), ("Qwen3", {})])
def test_a_finished_model_gives_the_plain_models_logits(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, ours = (load_model(tmp_path, config, torch.float32, "cpu", ops=ops) for ops in (Ops(), OPS["cpu_products"](target(config))))
    close(our_logits(ours, ids), our_logits(plain, ids), config, len(ids))


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True), dict(head_dim=32)])
def test_the_engine_answers_as_without_the_kernels(changes, tmp_path):
    "Chunks, decodes and shared prefixes, with rotation and storing in one kernel and apart."
    folder = tiny_folder(tmp_path, **dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2) | changes)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20, "1 2 3 " * 20 + "4"]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=30, ignore_eos=True) for t in (0.0, 0.8, 0.0, 1.0)]
    answers = []
    for ops in ("torch", "cpu_kernels", "cpu_products"):
        llm = LLM(folder, ops=ops, num_kv_blocks=40, max_num_batched_tokens=32)
        answers.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
        assert_idle(llm)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_chosen(dtype, monkeypatch):
    "On top of cpu_kernels: the draw for every number type; products, rotation and short pieces for float32."
    def check():
        before, ops = (OPS[name](target(dtype=dtype)) for name in ("cpu_kernels", "cpu_products"))
        if before is None: assert ops is None; return
        if cpu_kernels.CAN_BUILD: assert (ops.sample.func, ops.sample.keywords) == (sample, dict(draw=fast_draw))
        else: assert ops.sample is sample
        added = dict(linear=best_linear, rope_and_cache=fused_rope_and_cache, max_mlp_tokens=1024) if dtype == torch.float32 else {}
        assert ops == replace(before, sample=ops.sample, **added)
    check()
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    check()
    assert OPS["cpu_products"](target(device="cuda")) is None
