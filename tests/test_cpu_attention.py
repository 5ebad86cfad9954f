"""Attention in tiles: what attention token by token gives, for any batch, and nothing is read that must not be."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels
from nano_vllm.attention import BACKENDS, ReferenceAttention, TorchAttention, attention_backend, make_batch
from nano_vllm.cpu_attention import TiledAttention, TiledQueries, in_registers
from nano_vllm.cpu_kernels import CAN_BUILD, InPlaceAttention, predefined_macros, toolchain
from nano_vllm.kv_blocks import ScheduledSequence
from nano_vllm.layers import OPS, choose_ops
from test_attention import new
from test_cpu_kernels import CASES, ROUNDING, attend, check_against_the_reference, check_nothing_before_the_window_is_read, compiled, slow, target
from test_cpu_steps import FITTING
from test_model_runner import make_config


@compiled
@slow
@given(CASES)
def test_agrees_with_the_reference(case): check_against_the_reference(TiledAttention, case)


@compiled
@slow
@given(CASES)
def test_nothing_before_the_window_is_read(case): check_nothing_before_the_window_is_read(TiledAttention, case)


def has_pairs() -> bool:
    "Does this processor multiply pairs of bfloat16 numbers?"
    return "__AVX512BF16__" in predefined_macros(toolchain().compile)


def in_tiles(new_tokens, group, rows) -> list[bool]:
    "Of each token: is its piece of a text a tile (of `rows` rows), or so short that its tokens go one by one?"
    most = -(-rows // group)
    return [min(most, m - i // most * most) >= 4 for m in new_tokens for i in range(m)]


def long_batch(rng, lens, new_tokens, size):
    "Texts that compute their last tokens, in blocks anywhere; and the slots of all of their tokens."
    width = max(lens) // size + 1
    blocks = rng.permutation(width * len(lens)).tolist()
    seqs = [new(n, n - m, blocks[i*width:(i + 1)*width]) for i, (n, m) in enumerate(zip(lens, new_tokens))]
    batch = make_batch([ScheduledSequence(s, s.num_computed_tokens, m, True) for s, m in zip(seqs, new_tokens)], size)
    return batch, [s.block_table[p // size] * size + p % size for s in seqs for p in range(s.num_tokens)], width * len(lens)


@compiled
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1, 16), (3, 1, 64), (9, 3, 64), (8, 4, 128), (16, 1, 32), (5, 5, 48)]), st.sampled_from([1, 7, 16]),
       st.sampled_from([None, 1, 3, 50, 200]), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_long_pieces_in_a_poisoned_cache(seed, sizes, size, window, dtype, data):
    """Several tiles of queries and of keys, by PyTorch and by us. An average of n values is off by n roundings of their size, a score by as
    many roundings of its own as a head has numbers, and a weight by that part of itself. In pairs, queries are rounded as PyTorch gets
    them here, and weights by up to 2**-9 of themselves."""
    (heads, kv_heads, dim), rng = sizes, np.random.default_rng(seed)
    lens = data.draw(st.lists(st.integers(1, 700), min_size=1, max_size=3))
    new_tokens = [data.draw(st.integers(1, n)) for n in lens]
    batch, used, blocks = long_batch(rng, lens, new_tokens, size)
    cache = torch.full((1, 2, blocks, size, kv_heads, dim), torch.nan)
    cache.flatten(2, 3)[0, :, used] = torch.from_numpy(rng.standard_normal((2, len(used), kv_heads, dim), dtype=np.float32))
    cache, q = cache.to(dtype), torch.from_numpy(rng.standard_normal((sum(new_tokens), heads, dim), dtype=np.float32))
    q, scale, pairs = q * dim**-0.5, 0.5, dtype == torch.bfloat16 and has_pairs()
    rows = 1024 if in_registers(dim, 8 * dtype.itemsize) else 256
    rounded = torch.tensor(in_tiles(new_tokens, heads // kv_heads, rows))[:, None, None] & pairs
    expected = TorchAttention(batch, cache, scale, window)(torch.where(rounded, q.bfloat16().float(), q), 0)
    out = TiledAttention(batch, cache, scale, window)(q, 0)
    largest = float(cache.nan_to_num().abs().max())
    torch.testing.assert_close(out, expected, rtol=0, atol=(4 * (max(lens) + 4*dim) * ROUNDING + 2**-9 * pairs) * largest)


@compiled
def test_a_text_is_the_same_to_the_bit_whoever_shares_its_batch_and_however_it_is_cut():
    "Without a window steps along the keys begin at 0 for everybody; pieces of fewer than four tokens go another way."
    rng, g = np.random.default_rng(1), torch.Generator().manual_seed(1)
    lens = 500, 60, 300
    batch, _, blocks = long_batch(rng, lens, lens, 16)
    cache, q = torch.randn(1, 2, blocks, 16, 3, 64, generator=g), torch.randn(sum(lens), 9, 64, generator=g)
    together, tables = TiledAttention(batch, cache, 0.125)(q, 0), batch.block_tables
    for cut in (500, 100, 4):
        seq = new(500, 0, tables[0].tolist())
        for start in range(0, 500, cut):
            piece = make_batch([ScheduledSequence(seq, start, min(cut, 500 - start), False)], 16)
            out = TiledAttention(piece, cache, 0.125)(q[start:start + cut], 0)
            assert torch.equal(out, together[start:start + cut])


@compiled
def test_scores_of_any_size():
    "Large ones do not overflow, and a row whose scores are all the same takes the mean."
    batch, _, blocks = long_batch(np.random.default_rng(2), [200], [200], 16)
    cache, q = torch.randn(1, 2, blocks, 16, 1, 16) * 100, torch.randn(200, 1, 16) * 100
    expected, out = (kind(batch, cache, 1.0)(q, 0) for kind in (ReferenceAttention, TiledAttention))
    assert out.isfinite().all()
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)
    mean = TiledAttention(batch, cache, 1.0)(torch.zeros_like(q), 0)
    torch.testing.assert_close(mean, ReferenceAttention(batch, cache, 1.0)(torch.zeros_like(q), 0), atol=1e-3, rtol=1e-4)


@compiled
@pytest.mark.parametrize("climb", [-1, 0.01, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_that_is_set_once_or_at_every_step(climb, dtype):
    "Scores that fall, or climb by little or much from key to key: what a row has so far is scaled, or its limit is still high enough."
    batch, used, blocks = long_batch(np.random.default_rng(3), [250], [250], 16)
    cache, q = torch.randn(1, 2, blocks, 16, 1, 32), torch.zeros(250, 1, 32)
    cache.flatten(2, 3)[0, 0, used, 0, 0] = climb * torch.arange(250.)
    q[:, :, 0] = 1
    cache = cache.to(dtype)
    expected, out = (kind(batch, cache, 1.0)(q, 0) for kind in (ReferenceAttention, TiledAttention))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-6)


def test_what_is_chosen(monkeypatch):
    "The best products that a model can have, with this attention; another backend, if one is asked for."
    config = make_config()
    assert BACKENDS["tiled"] is TiledAttention
    for name, dtype, quantization in (("cpu_products", torch.float32, None), ("bfloat16", torch.bfloat16, None), ("int8", torch.bfloat16, "int8"),
                                      ("cpu_products", torch.float16, None)):
        if not CAN_BUILD: continue
        asked = target(config, dtype, quantization=quantization)
        assert OPS["tiled_attention"](asked) == replace(OPS[name](asked), attention=TiledAttention) == choose_ops(asked)
    if CAN_BUILD: assert choose_ops(target(config), "auto", "in_place").attention is InPlaceAttention
    assert OPS["tiled_attention"](target(config, device="cuda")) is OPS["tiled_attention"](target(config, compile=True)) is None
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    assert OPS["tiled_attention"](target(config)) is None
    with pytest.raises(ValueError, match="attention_backend is 'tiled', which needs g"): attention_backend("tiled")


@compiled
def test_what_the_kernel_cannot_do_is_pytorchs(monkeypatch):
    batch, _, blocks = long_batch(np.random.default_rng(3), [40, 9], [40, 1], 16)
    def parts(dtype, dim): return [type(p) for p in TiledAttention(batch, torch.zeros(1, 2, blocks, 16, 1, dim, dtype=dtype), 1.0).parts]
    assert parts(torch.float32, 32) == parts(torch.bfloat16, 32) == [TiledQueries]
    for dtype, dim in ((torch.float16, 32), (torch.float32, 20)): assert TiledQueries not in parts(dtype, dim)
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    assert TiledQueries not in parts(torch.float32, 32)


@compiled
@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16"), dict(quantization="int8"), dict(ops="tiled_attention")],
                         ids=lambda o: next(iter(o), "default"))
def test_the_engine(options, tmp_path):
    "Long prompts, whole and in pieces of all sizes, with companions and alone: the same greedy answers."
    folder = tiny_folder(tmp_path, **FITTING)
    prompts = [[(i*j) % 900 + 100 for j in range(1, n)] for i, n in ((3, 300), (5, 20), (7, 3), (9, 120))]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = LLM(folder, num_kv_blocks=60, max_model_len=400, **options)
    assert llm.engine.runner.ops.attention is TiledAttention
    together = [o["token_ids"] for o in llm.generate([dict(prompt_token_ids=p) for p in prompts], greedy, use_tqdm=False)]
    assert_idle(llm)
    for budget in (7, 64):
        small = LLM(folder, num_kv_blocks=60, max_model_len=400, max_num_batched_tokens=budget, enable_prefix_caching=False, **options)
        assert [small.generate(dict(prompt_token_ids=p), greedy, use_tqdm=False)[0]["token_ids"] for p in prompts] == together
