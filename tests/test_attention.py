"""Paged attention: the batch as data, and `TorchAttention` held against the slow oracle over random mixed batches."""
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from nano_vllm.attention import (BACKENDS, ReferenceAttention, TorchAttention, attention_backend, length_groups,
                                 logits_positions, make_batch, reach, slot_table, slots_of)
from nano_vllm.kv_blocks import Chunk, Sequence, blocks_needed
from nano_vllm.sampling import SamplingParams


def new(length, computed=0, table=(), prompt=None, **params):
    prompt = length if prompt is None else prompt
    seq = Sequence("test", list(range(100, 100 + prompt)), SamplingParams(**params))
    seq.output_token_ids = list(range(100 + prompt, 100 + length))
    seq.num_computed_tokens, seq.block_table = computed, list(table)
    return seq


# ---- a step as plain data

def test_make_batch_on_literal_data():
    work = [Chunk(new(3, table=[2]), 3), Chunk(new(6, 5, table=[0, 3], prompt=4), 1), Chunk(new(9, 1, table=[1, 5, 4]), 4)]
    b = make_batch(work, block_size=4)
    assert b.token_ids.tolist() == [100, 101, 102, 105, 101, 102, 103, 104]
    assert b.positions.tolist() == [0, 1, 2, 5, 1, 2, 3, 4]
    assert b.slot_mapping.tolist() == [8, 9, 10, 13, 5, 6, 7, 20]
    assert b.block_tables.tolist() == [[2, 0, 0], [0, 3, 0], [1, 5, 4]]
    assert (b.query_lens, b.context_lens) == ([3, 1, 4], [3, 6, 5])
    assert b.logits_rows.tolist() == [2, 3]                  # the last chunk stops short of its text's end
    assert {t.dtype for t in vars(b).values() if torch.is_tensor(t)} == {torch.int64}


def test_a_batch_may_want_no_logits():
    rows = make_batch([Chunk(new(9, table=[0, 1, 2]), 4)], 4).logits_rows
    assert rows.tolist() == [] and rows.dtype == torch.int64


def test_batch_moves_its_tensors_and_keeps_its_lists():
    b = make_batch([Chunk(new(3, table=[2]), 3)], 4)
    moved = b.to("meta")
    assert all(t.device.type == "meta" for t in vars(moved).values() if torch.is_tensor(t))
    assert (moved.query_lens, b.token_ids.device.type) == (b.query_lens, "cpu")


@pytest.mark.parametrize("seq, n, wanted", [
    (new(6), 6, [5]), (new(6), 5, []), (new(6, 5, prompt=3), 1, [5]),
    (new(6, prompt_logprobs=0), 4, [0, 1, 2, 3]), (new(6, 4, prompt_logprobs=1), 2, [4, 5]),
    (new(6, 5, prompt=5, prompt_logprobs=1), 1, [5]), (new(9, 5, prompt=5, prompt_logprobs=1), 2, [])])
def test_logits_positions(seq, n, wanted): assert list(logits_positions(Chunk(seq, n))) == wanted


def test_slot_table_repeats_the_last_written_slot():
    got = slot_table(torch.tensor([[2, 0], [3, 0]]), torch.tensor([6, 2]), 4, 6)
    assert got.tolist() == [[8, 9, 10, 11, 0, 1], [12, 13, 13, 13, 13, 13]]
    got = slot_table(torch.tensor([[2, 0], [3, 0]]), torch.tensor([6, 2]), 4, 3, start=torch.tensor([[3], [0]]))
    assert got.tolist() == [[11, 0, 1], [12, 13, 13]]


@given(st.integers(1, 50), st.none() | st.integers(1, 60))
def test_reach_counts_the_keys_of_the_last_token(length, window):
    p = length - 1
    assert reach(length, window) == sum(window is None or p - window < j <= p for j in range(length))


@given(st.lists(st.integers(1, 9000), max_size=40))
def test_length_groups_are_a_partition_and_at_most_half_padding(lens):
    groups = length_groups(list(range(len(lens))), lens)
    assert sorted(sum(groups, [])) == list(range(len(lens)))
    for rows in groups: assert 2 * sum(lens[r] for r in rows) >= len(rows) * max(lens[r] for r in rows)


def test_backends_by_name():
    assert (attention_backend("torch"), attention_backend("reference")) == (TorchAttention, ReferenceAttention)
    assert attention_backend() in BACKENDS.values()
    with pytest.raises(ValueError, match="attention_backend.*'flsh'.*torch"): attention_backend("flsh")


# ---- against the oracle

@st.composite
def cases(draw, dims=(1, 4, 12, 20), groups=(1, 2, 3, 5, 7)):
    "(batch, its cache with NaN in every slot that no text has written, q, k, v, layer, window), float32."
    size = draw(st.sampled_from([1, 2, 3, 5, 16, 64]) | st.integers(1, 64))
    edges = st.sampled_from([1, max(size - 1, 1), size, size + 1, 2*size, 2*size + 1]) | st.integers(1, 70)
    lengths = draw(st.lists(edges, min_size=1, max_size=5))
    new_tokens = [draw(st.sampled_from([1, n]) | st.integers(1, n)) for n in lengths]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from(groups))
    dim, layer = draw(st.sampled_from(dims)), draw(st.integers(0, 1))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_blocks = sum(blocks_needed(n, size) for n in lengths) + 2
    free = torch.randperm(num_blocks, generator=g).tolist()
    cache = torch.full((2, 2, num_blocks, size, kv_heads, dim), torch.nan)
    work = []
    for n, m in zip(lengths, new_tokens):
        seq = new(n, n - m, [free.pop() for _ in range(blocks_needed(n, size))])
        past = torch.tensor([seq.block_table[p // size]*size + p % size for p in range(n - m)], dtype=torch.int64)
        for x in slots_of(cache, layer): x[past] = torch.randn(n - m, kv_heads, dim, generator=g)
        work.append(Chunk(seq, m))
    total = sum(new_tokens)
    q, k, v = (torch.randn(total, h, dim, generator=g) for h in (kv_heads*group, kv_heads, kv_heads))
    window = draw(st.none() | st.sampled_from([1, 2, size, size + 1]) | st.integers(1, 80))
    return make_batch(work, size), cache, q, k, v, layer, window


def attend(backend, batch, cache, q, k, v, layer, window=None):
    "(output, the cache afterwards); the arguments are checked to be as they were."
    cache, before = cache.clone(), [x.clone() for x in (q, k, v)]
    out = backend(batch, cache, 0.3, window)(q, k, v, layer)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before)), "law 7: an input was written to"
    assert out.shape == q.shape and out.dtype == q.dtype
    return out, cache


slow = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check_against_the_reference(backend, case):
    (slow_out, slow_cache), (out, cache) = (attend(b, *case) for b in (ReferenceAttention, backend))
    torch.testing.assert_close(out, slow_out, atol=1e-5, rtol=1e-5)   # NaN differs from any number
    torch.testing.assert_close(cache, slow_cache, atol=0, rtol=0, equal_nan=True)


@slow
@given(cases())
def test_agrees_with_the_reference(case): check_against_the_reference(TorchAttention, case)


@slow
@given(cases())
def test_agrees_in_bfloat16(case):
    """The oracle runs in float32 on the same rounded inputs, so only the operator's own rounding is measured.

    bfloat16 keeps 8 bits: one rounding moves a number by at most u = 2**-8 of its size. An output is an average of values,
    whose sizes bound it; weights and output are rounded once each, and a weight by its score, too, if the scores are rounded:
    a score of size s is off by u*s, which scales the weight by as much. So the error is below (2 + 2*s) * u * max|v|.
    """
    batch, cache, q, k, v, layer, window = case
    low = [x.bfloat16() for x in (cache, q, k, v)]
    exact, whole = attend(ReferenceAttention, batch, *(x.float() for x in low), layer, window)
    out, _ = attend(TorchAttention, batch, *low, layer, window)
    keys, values = slots_of(whole, layer)
    score = 0.3 * q.norm(dim=-1).max() * keys.nan_to_num().norm(dim=-1).max()
    bound = float((2 + 2*score) * 2**-8 * values.nan_to_num().abs().max())
    assert not out.isnan().any()
    assert float((out.float() - exact).abs().max()) <= bound


@slow
@given(cases(), st.randoms())
def test_a_text_gets_the_same_whoever_shares_its_batch(case, rng):
    batch, cache, q, k, v, layer, window = case
    both, _ = attend(TorchAttention, *case)
    row = rng.randrange(len(batch.query_lens))
    start = sum(batch.query_lens[:row])
    span = slice(start, start + batch.query_lens[row])
    alone = type(batch)(batch.token_ids[span], batch.positions[span], batch.slot_mapping[span], batch.block_tables[row:row+1],
                        [batch.query_lens[row]], [batch.context_lens[row]], batch.logits_rows[:0])
    out, _ = attend(TorchAttention, alone, cache, q[span], k[span], v[span], layer, window)
    torch.testing.assert_close(out, both[span], atol=1e-5, rtol=1e-5)


# ---- sliding windows

@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 13, 40, None])
@pytest.mark.parametrize("chunk", [12, 5, 1])
def test_the_reference_sees_what_transformers_mask_shows(window, chunk):
    "A text of 12 in chunks, against dense attention under the mask of transformers' sliding window."
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    p = torch.arange(12)
    shown = (causal_mask_function if window is None else sliding_window_causal_mask_function(window))(0, 0, p[:, None], p)
    q, k, v = torch.randn(3, 12, 2, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.einsum("qhd,khd->hqk", q, k)*0.3
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~shown, float("-inf")).softmax(-1), v)
    for backend in (ReferenceAttention, TorchAttention):
        cache = torch.full((1, 2, 4, 5, 2, 4), torch.nan)
        for start in range(0, 12, chunk):
            span = slice(start, start + chunk)
            batch = make_batch([Chunk(new(12, start, [3, 0, 2]), len(p[span]))], 5)
            out = backend(batch, cache, 0.3, window)(q[span], k[span], v[span], 0)
            torch.testing.assert_close(out, expected[span], atol=1e-5, rtol=1e-5)


def check_nothing_before_the_window_is_read(backend, case):
    "Every slot that no query of its text may see is poisoned: what comes out is a number all the same."
    batch, cache, q, k, v, layer, window = case
    cache, size = cache.clone(), cache.shape[3]
    for table, n, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
        first = context - n + 1
        for p in range(first - reach(first, window)): cache[layer, :, table[p // size], p % size] = torch.nan
    out, _ = attend(backend, batch, cache, q, k, v, layer, window)
    assert not out.isnan().any()


@slow
@given(cases())
def test_nothing_before_the_window_is_read(case): check_nothing_before_the_window_is_read(TorchAttention, case)


def test_a_decode_gathers_its_window_only():
    seq = new(1000, 999, list(range(63)))
    cache = torch.zeros(1, 2, 63, 16, 1, 4)
    part, = TorchAttention(make_batch([Chunk(seq, 1)], 16), cache, 1., window=24).parts
    assert part.slots.tolist() == [list(range(976, 1000))]
    work = [Chunk(seq, 1), Chunk(new(30, 29, [61, 62]), 1)]  # far apart in length, alike in reach: one group
    part, = TorchAttention(make_batch(work, 16), cache, 1., window=24).parts
    assert part.slots.shape == (2, 24)
    seq.num_computed_tokens = 990
    part, = TorchAttention(make_batch([Chunk(seq, 10)], 16), cache, 1., window=24).parts
    assert part.slots.tolist() == list(range(967, 1000))
