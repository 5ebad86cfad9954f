"""Paged attention: the batch as data, and `TorchAttention` held against the slow oracle over random mixed batches."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

from nano_vllm.attention import (BACKENDS, MAX_GATHERED, QUERY_PIECE, ReferenceAttention, TorchAttention, attention_backend, length_groups,
                                 make_batch, prompt_positions, slot_table, slots_of, visible, window_len)
from nano_vllm.kv_blocks import ScheduledSequence, Sequence, blocks_needed
from nano_vllm.sampling_params import SamplingParams


def new(length, computed=0, table=(), prompt=None, **params):
    prompt = length if prompt is None else prompt
    seq = Sequence("test", list(range(100, 100 + prompt)), SamplingParams(**params))
    seq.output_token_ids = list(range(100 + prompt, 100 + length))
    seq.num_computed_tokens, seq.block_table = computed, list(table)
    return seq


def chunk(seq, num_tokens):
    "The next `num_tokens` tokens of `seq`, as the scheduler hands them out."
    start = seq.num_computed_tokens
    return ScheduledSequence(seq, start, num_tokens, samples=start + num_tokens == seq.num_tokens)


# ---- a step as plain data

def test_make_batch_on_literal_data():
    work = [chunk(new(3, table=[2]), 3), chunk(new(6, 5, table=[0, 3], prompt=4), 1), chunk(new(9, 1, table=[1, 5, 4]), 4)]
    b = make_batch(work, block_size=4)
    assert b.token_ids.tolist() == [100, 101, 102, 105, 101, 102, 103, 104]
    assert b.positions.tolist() == [0, 1, 2, 5, 1, 2, 3, 4]
    assert b.slot_mapping.tolist() == [8, 9, 10, 13, 5, 6, 7, 20]
    assert b.block_tables.tolist() == [[2, 0, 0], [0, 3, 0], [1, 5, 4]]
    assert (b.query_lens.tolist(), b.context_lens.tolist()) == ([3, 1, 4], [3, 6, 5])
    assert b.logits_indices.tolist() == [2, 3]               # the last chunk stops short of its text's end
    assert b.prompt_indices.tolist() == []
    assert {x.dtype for x in vars(b).values() if torch.is_tensor(x)} == {torch.int64}
    assert {x.dtype for x in vars(b).values() if isinstance(x, np.ndarray)} == {np.dtype(np.int64)}


def test_make_batch_marks_the_tokens_that_rate_a_prompt():
    rated = dict(table=[0, 1, 2], prompt_logprobs=0)
    work = [chunk(new(3, **rated), 3), chunk(new(5, table=[3, 4]), 5), chunk(new(9, 2, **rated), 3), chunk(new(6, 3, prompt=5, **rated), 3)]
    b = make_batch(work, block_size=4)
    assert b.prompt_indices.tolist() == [0, 1, 8, 9, 10, 11]
    assert b.positions[b.prompt_indices].tolist() == [0, 1, 2, 3, 4, 3]
    assert b.logits_indices.tolist() == [2, 7, 13] and b.prompt_indices.dtype == torch.int64


def test_a_batch_may_want_no_logits():
    indices = make_batch([chunk(new(9, table=[0, 1, 2]), 4)], 4).logits_indices
    assert indices.tolist() == [] and indices.dtype == torch.int64


def test_a_batch_samples_where_the_schedule_says_so():
    "A text whose next token is still being sampled looks complete, and one that samples need not end here."
    seq = new(6, table=[0, 1])
    batch = make_batch([ScheduledSequence(seq, 0, 6, samples=False), ScheduledSequence(seq, 0, 4, samples=True)], 4)
    assert batch.logits_indices.tolist() == [9]


def test_batch_moves_its_tensors_and_keeps_its_arrays():
    b = make_batch([chunk(new(3, table=[2]), 3)], 4)
    moved = b.to("meta")
    tensors = [x for x in vars(moved).values() if torch.is_tensor(x)]
    assert len(tensors) == 6 and all(x.device.type == "meta" for x in tensors)
    assert moved.query_lens is b.query_lens and moved.context_lens is b.context_lens and b.token_ids.device.type == "cpu"


@pytest.mark.parametrize("seq, n, rated, sampled", [
    (new(6), 6, [], [5]), (new(6), 5, [], []), (new(6, 5, prompt=3), 1, [], [5]),
    (new(6, prompt_logprobs=0), 4, [0, 1, 2, 3], []), (new(6, 4, prompt_logprobs=1), 2, [4], [5]),
    (new(6, prompt_logprobs=0), 5, [0, 1, 2, 3, 4], []), (new(6, 5, prompt_logprobs=0), 1, [], [5]),
    (new(6, 5, prompt=5, prompt_logprobs=1), 1, [], [5]), (new(9, 5, prompt=5, prompt_logprobs=1), 2, [], []),
    (new(9, 2, prompt=5, prompt_logprobs=1), 7, [2, 3], [8])])
def test_positions_whose_logits_are_wanted(seq, n, rated, sampled):
    seq.block_table = [0, 1, 2]
    work = chunk(seq, n)
    batch = make_batch([work], 4)
    assert list(prompt_positions(work)) == batch.positions[batch.prompt_indices].tolist() == rated
    assert batch.positions[batch.logits_indices].tolist() == sampled


def test_slot_table_repeats_the_last_written_slot():
    got = slot_table(torch.tensor([[2, 0], [3, 0]]), torch.tensor([6, 2]), 4, 6)
    assert got.tolist() == [[8, 9, 10, 11, 0, 1], [12, 13, 13, 13, 13, 13]]
    got = slot_table(torch.tensor([[2, 0], [3, 0]]), torch.tensor([6, 2]), 4, 3, start=torch.tensor([[3], [0]]))
    assert got.tolist() == [[11, 0, 1], [12, 13, 13]]


@given(st.integers(1, 50), st.none() | st.integers(1, 60))
def test_window_len_counts_the_keys_of_the_last_token(length, window):
    p = length - 1
    assert window_len(length, window) == sum(window is None or p - window < j <= p for j in range(length))
    lengths = np.arange(1, length + 1)
    assert window_len(lengths, window).tolist() == [window_len(n, window) for n in range(1, length + 1)]


@given(st.integers(0, 20), st.integers(1, 20), st.none() | st.integers(1, 30))
def test_visible_is_the_windowed_triangle(start, num_queries, window):
    keys = torch.arange(start + num_queries)
    mask = visible(keys[start:], keys, window)
    assert mask.shape == (num_queries, start + num_queries) and mask.dtype == torch.bool
    for i, row in enumerate(mask.tolist()):
        assert row == [j <= start + i and (window is None or start + i - window < j) for j in range(start + num_queries)]


@given(st.lists(st.integers(1, 9000), max_size=40))
@example([8000]*20 + [2**17])   # more than one group may gather, and a text that alone does
def test_length_groups_are_a_partition_and_at_most_half_padding(lens):
    groups = [group.tolist() for group in length_groups(np.array(lens, dtype=np.int64))]
    assert sorted(sum(groups, [])) == list(range(len(lens)))
    for rows in groups: assert 2 * min(lens[r] for r in rows) >= max(lens[r] for r in rows)
    for rows in groups: assert 2 * sum(lens[r] for r in rows) >= len(rows) * max(lens[r] for r in rows)
    for rows in groups: assert len(rows) == 1 or len(rows) * max(lens[r] for r in rows) <= MAX_GATHERED


def test_backends_by_name():
    assert (attention_backend("torch"), attention_backend("reference")) == (TorchAttention, ReferenceAttention)
    for name in ("flsh", "auto", None, [], {}):   # "auto" is for whoever chooses the Ops
        with pytest.raises(ValueError, match="attention_backend is .*must be one of .'auto', .*'torch'"): attention_backend(name)
    assert BACKENDS["torch"] is TorchAttention


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
        work.append(chunk(seq, m))
    total = sum(new_tokens)
    q, k, v = (torch.randn(total, h, dim, generator=g) for h in (kv_heads*group, kv_heads, kv_heads))
    window = draw(st.none() | st.sampled_from([1, 2, size, size + 1]) | st.integers(1, 80))
    return make_batch(work, size), cache, q, k, v, layer, window


def attend(backend, batch, cache, q, k, v, layer, window=None):
    "(output, the cache afterwards); the arguments are checked to be as they were."
    cache, before = cache.clone(), [x.clone() for x in (q, k, v)]
    attention = backend(batch, cache, 0.3, window)
    attention.store(k, v, layer)
    out = attention(q, layer)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before)), "law 7: an input was written to"
    assert out.shape == q.shape and out.dtype == q.dtype
    return out, cache


slow = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def largest_score_and_value(case, cache):
    "Bounds of the scores' sizes and of the values' in a layer of `cache`, all of whose numbers have been written."
    q, layer = case[2], case[5]
    keys, values = (x.nan_to_num() for x in slots_of(cache, layer))
    return float(0.3 * q.norm(dim=-1).max() * keys.norm(dim=-1).max()), float(values.abs().max())


def float32_tolerance(case, cache):
    """How far two right float32 computations may lie apart, u = 2**-24 being the most that one rounding moves a number of size 1.

    A score is a sum of head_dim products, so it is off by at most head_dim*u*s, where s bounds its size; that scales its weight by as
    much. The weights are divided by a sum of as many numbers as there are keys, and an output is again such a sum, whose size that of the
    largest value bounds. Both sides round."""
    score, value = largest_score_and_value(case, cache)
    head_dim, num_keys = case[2].shape[2], int(case[0].context_lens.max())
    return 2 * 2**-24 * (2*num_keys + 2 + head_dim * score) * value


def check_against_the_reference(backend, case):
    (slow_out, slow_cache), (out, cache) = (attend(b, *case) for b in (ReferenceAttention, backend))
    torch.testing.assert_close(out, slow_out, atol=float32_tolerance(case, slow_cache), rtol=0)   # NaN differs from any number
    torch.testing.assert_close(cache, slow_cache, atol=0, rtol=0, equal_nan=True)


@slow
@given(cases())
def test_agrees_with_the_reference(case): check_against_the_reference(TorchAttention, case)


@pytest.mark.parametrize("window", [None, 1, 300])
@pytest.mark.parametrize("past", [0, 50])
def test_a_chunk_of_several_pieces_agrees_with_the_reference(past, window):
    "Two full pieces of queries and one more query; a whole prompt is cut only if it has a window."
    length, g = past + 2*QUERY_PIECE + 1, torch.Generator().manual_seed(0)
    num_blocks = blocks_needed(length, 16)
    batch = make_batch([chunk(new(length, past, torch.randperm(num_blocks, generator=g).tolist()), length - past)], 16)
    q, k, v = (torch.randn(length - past, heads, 4, generator=g) for heads in (2, 1, 1))
    cache = torch.randn(1, 2, num_blocks, 16, 1, 4, generator=g)
    part, = TorchAttention(batch, cache, 0.3, window).parts
    whole = past == 0 and window is None
    assert [len(range(*queries.indices(length))) for queries, _, _ in part.pieces()] == ([length] if whole else [QUERY_PIECE, QUERY_PIECE, 1])
    check_against_the_reference(TorchAttention, (batch, cache, q, k, v, 0, window))


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
    score, value = largest_score_and_value(case, whole)
    bound = (2 + 2*score) * 2**-8 * value
    assert not out.isnan().any()
    assert float((out.float() - exact).abs().max()) <= bound


@slow
@given(cases(), st.randoms())
def test_a_text_gets_the_same_whoever_shares_its_batch(case, rng):
    batch, cache, q, k, v, layer, window = case
    both, whole = attend(TorchAttention, *case)
    row = rng.randrange(len(batch.query_lens))
    start = int(batch.query_lens[:row].sum())
    span = slice(start, start + int(batch.query_lens[row]))
    alone = type(batch)(batch.token_ids[span], batch.positions[span], batch.slot_mapping[span], batch.block_tables[row:row+1],
                        batch.query_lens[row:row+1], batch.context_lens[row:row+1], batch.logits_indices[:0], batch.prompt_indices[:0])
    out, _ = attend(TorchAttention, alone, cache, q[span], k[span], v[span], layer, window)
    torch.testing.assert_close(out, both[span], atol=float32_tolerance(case, whole), rtol=0)


@pytest.mark.parametrize("backend", [ReferenceAttention, TorchAttention])
def test_what_lies_past_a_texts_blocks_in_its_table_does_not_matter(backend):
    "A row of a table may be longer than its text needs, and hold any valid numbers there."
    g = torch.Generator().manual_seed(0)
    work = [chunk(new(6, 5, [2, 0]), 1), chunk(new(3, 2, [1]), 1), chunk(new(7, 3, [3, 4]), 4)]
    tight, cache = make_batch(work, 4), torch.randn(1, 2, 5, 4, 2, 8, generator=g)
    q, k, v = (torch.randn(6, heads, 8, generator=g) for heads in (4, 2, 2))
    wide = make_batch(work, 4)
    wide.block_tables = torch.cat((tight.block_tables, torch.full((3, 4), 4)), 1)
    wide.block_tables[1, 1] = 3
    expected, _ = attend(backend, tight, cache, q, k, v, 0)
    out, _ = attend(backend, wide, cache, q, k, v, 0)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [ReferenceAttention, TorchAttention])
def test_a_call_reads_the_cache_and_writes_nothing(backend):
    "Keys and values come by `store` alone, so that a fused kernel may put them there instead."
    g = torch.Generator().manual_seed(0)
    batch, cache = make_batch([chunk(new(6, table=[2, 0]), 6)], 4), torch.randn(2, 2, 3, 4, 1, 8, generator=g)
    attention, before = backend(batch, cache, 0.3), cache.clone()
    q, k, v = (torch.randn(6, heads, 8, generator=g) for heads in (2, 1, 1))
    first = attention(q, 1)
    assert torch.equal(cache, before)
    attention.store(k, v, 1)
    assert torch.equal(cache[0], before[0]) and not torch.equal(cache[1], before[1])
    assert not torch.equal(attention(q, 1), first)
    keys, values = slots_of(cache, 1)
    assert torch.equal(keys[batch.slot_mapping], k) and torch.equal(values[batch.slot_mapping], v)


def test_a_step_of_many_sequences_is_planned_without_a_loop_over_them(monkeypatch):
    "256 sequences of about the same length are one part, made by a fixed number of operations."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.number += 1
            return op(*args, **kwargs or {})

    counts = {}
    for size in (2, 256):
        work = [chunk(new(40 + i % 20, 39 + i % 20, range(5)), 1) for i in range(size)]
        batch, cache = make_batch(work, 16), torch.zeros(1, 2, 5, 16, 1, 4)
        with Count() as counter: part, = TorchAttention(batch, cache, 1.).parts
        counts[size] = counter.number
        assert len(part.slots) == size
    assert counts[2] == counts[256]


# ---- sliding windows

@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 13, 40, None])
@pytest.mark.parametrize("size", [12, 5, 1])
def test_the_reference_sees_what_transformers_mask_shows(window, size):
    "A text of 12 in chunks, against dense attention under the mask of transformers' sliding window."
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
    p = torch.arange(12)
    shown = (causal_mask_function if window is None else sliding_window_causal_mask_function(window))(0, 0, p[:, None], p)
    q, k, v = torch.randn(3, 12, 2, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.einsum("qhd,khd->hqk", q, k)*0.3
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~shown, float("-inf")).softmax(-1), v)
    for backend in (ReferenceAttention, TorchAttention):
        cache = torch.full((1, 2, 4, 5, 2, 4), torch.nan)
        for start in range(0, 12, size):
            span = slice(start, start + size)
            batch = make_batch([chunk(new(12, start, [3, 0, 2]), len(p[span]))], 5)
            out, cache = attend(backend, batch, cache, q[span], k[span], v[span], 0, window)
            tolerance = float32_tolerance((batch, cache, q[span], k[span], v[span], 0), cache)
            torch.testing.assert_close(out, expected[span], atol=tolerance, rtol=0)


def check_nothing_before_the_window_is_read(backend, case):
    "Every slot that no query of its text may see is poisoned: what comes out is a number all the same."
    batch, cache, q, k, v, layer, window = case
    cache, size = cache.clone(), cache.shape[3]
    for table, n, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
        first = context - n + 1
        for p in range(first - window_len(first, window)): cache[layer, :, table[p // size], p % size] = torch.nan
    out, _ = attend(backend, batch, cache, q, k, v, layer, window)
    assert not out.isnan().any()


@slow
@given(cases())
def test_nothing_before_the_window_is_read(case): check_nothing_before_the_window_is_read(TorchAttention, case)


def test_a_decode_gathers_its_window_only():
    seq = new(1000, 999, list(range(63)))
    cache = torch.zeros(1, 2, 63, 16, 1, 4)
    part, = TorchAttention(make_batch([chunk(seq, 1)], 16), cache, 1., window=24).parts
    assert part.slots.tolist() == [list(range(976, 1000))]
    work = [chunk(seq, 1), chunk(new(30, 29, [61, 62]), 1)]  # far apart in length, alike in reach: one group
    part, = TorchAttention(make_batch(work, 16), cache, 1., window=24).parts
    assert part.slots.shape == (2, 24)
    seq.num_computed_tokens = 990
    part, = TorchAttention(make_batch([chunk(seq, 10)], 16), cache, 1., window=24).parts
    assert part.slots.tolist() == list(range(967, 1000))
