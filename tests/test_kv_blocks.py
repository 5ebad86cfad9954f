"""Sequences and the block pool: literal cases, and law 1 over random lives of sequences."""
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nano_vllm.kv_blocks import BlockPool, Chunk, Sequence, blocks_needed
from nano_vllm.sampling import SamplingParams


def new(length): return Sequence("test", list(range(length)), SamplingParams())


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_blocks_needed_is_the_smallest_that_holds(n, size):
    blocks = blocks_needed(n, size)
    assert blocks * size >= n > (blocks - 1) * size or n == blocks == 0


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 18), st.integers(0, 18))
def test_tokens_reads_prompt_and_output_as_one_text(prompt, output, start, end):
    seq = new(prompt)
    seq.output_token_ids = list(range(prompt, prompt + output))
    assert seq.num_tokens == prompt + output
    assert seq.tokens(start, end) == list(range(prompt + output))[start:end]


def test_a_chunk_samples_where_it_reaches_the_last_known_token():
    seq = new(5)
    seq.output_token_ids, seq.num_computed_tokens = [9], 2
    assert [Chunk(seq, n).samples for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert (Chunk(seq, 3).start, Chunk(seq, 3).end) == (2, 5)


def test_sequences_are_told_apart_by_identity(): assert new(3) != new(3) and len({new(3), new(3)}) == 2


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_grow_at_the_edges_of_a_block(size):
    pool = BlockPool(3, size)
    for n, blocks in (2*size - 1, 2 - (size == 1)), (2*size, 2), (2*size + 1, 3):
        seq = new(n)
        assert pool.grow(seq, n) and len(seq.block_table) == blocks and len(pool.free_blocks) == 3 - blocks
        assert pool.grow(seq, 1) and len(seq.block_table) == blocks          # less than it has: nothing happens
        assert not pool.grow(seq, 3*size + 1) and len(seq.block_table) == blocks
        pool.free(seq)


def test_blocks_are_reused_in_the_order_they_became_free():
    pool, a, b = BlockPool(4, 2), new(4), new(4)
    assert pool.grow(a, 4) and pool.grow(b, 4)
    pool.free(b)
    pool.free(a)
    assert [pool.allocate() for _ in range(4)] == [3, 2, 1, 0]  # b's last block first, a's first block last


def test_a_free_block_that_is_shared_is_free_no_more():
    pool = BlockPool(2, 4)
    pool.share(0)
    assert list(pool.free_blocks) == [1] and pool.ref_counts == [1, 0]
    pool.share(0)
    pool.release(0)
    assert 0 not in pool.free_blocks
    pool.release(0)
    assert list(pool.free_blocks) == [1, 0]


class PoolMachine(RuleBasedStateMachine):
    "Sequences come, grow, fork (sharing all full blocks) and leave; law 1 must hold after every step."

    def __init__(self):
        super().__init__()
        self.pool, self.seqs = BlockPool(8, 3), []

    def pick(self, i): return self.seqs[i % len(self.seqs)]

    @rule(n=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 30]))
    def add(self, n):
        seq, free = new(n), len(self.pool.free_blocks)
        fits = self.pool.grow(seq, n)
        assert fits == (blocks_needed(n, 3) <= free) and len(seq.block_table) == (blocks_needed(n, 3) if fits else 0)
        if fits: self.seqs.append(seq)

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def extend(self, i):
        seq = self.pick(i)
        before, free = list(seq.block_table), len(self.pool.free_blocks)
        seq.output_token_ids.append(7)
        fits = self.pool.grow(seq, seq.num_tokens)
        assert fits == (blocks_needed(seq.num_tokens, 3) - len(before) <= free)
        assert seq.block_table[:len(before)] == before and (fits or len(seq.block_table) == len(before))
        if not fits: seq.output_token_ids.pop()

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def fork(self, i):
        parent, child = self.pick(i), new(self.pick(i).num_tokens)
        for block in parent.block_table[:parent.num_tokens // 3]:
            self.pool.share(block)
            child.block_table.append(block)
        if self.pool.grow(child, child.num_tokens): self.seqs.append(child)
        else: self.pool.free(child)

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def free(self, i):
        seq = self.seqs.pop(i % len(self.seqs))
        self.pool.free(seq)
        assert (seq.block_table, seq.num_computed_tokens) == ([], 0)

    @invariant()
    def law_1(self):
        held = Counter(block for seq in self.seqs for block in seq.block_table)
        assert self.pool.ref_counts == [held[b] for b in range(8)]
        assert set(self.pool.free_blocks) == set(range(8)) - set(held)

    def teardown(self):
        for seq in self.seqs: self.pool.free(seq)
        assert len(self.pool.free_blocks) == 8 and not any(self.pool.ref_counts)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
