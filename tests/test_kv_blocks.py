"""Sequences, steps and the block pool: literal cases, and law 1 over random lives of sequences."""
from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nano_vllm.kv_blocks import BlockPool, ScheduledSequence, SchedulerOutput, Sequence, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampler import AllowedTokens
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import next_tokens, num_missing


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


def test_a_step_samples_where_it_reaches_the_last_known_token():
    seq = new(5)
    seq.output_token_ids, seq.num_computed_tokens = [9], 2
    steps = {n: next_tokens(seq, n, num_missing(seq)) for n in (1, 2, 3, 4)}
    assert [steps[n].samples for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert (steps[3].start, steps[3].end) == (2, 5)


def test_reset_leaves_what_cannot_be_made_anew_and_nothing_else():
    lasting = dict(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(), index=1, seed=2, cache_salt=4, max_len=9,
                   stop_token_ids=frozenset([3]), output_token_ids=[5], finish_reason="stop", stop_reason=3,
                   priority=1, bad_words_token_ids=[[1]], token_mask=AllowedTokens([1], 9), adapter=object())
    made = dict(num_computed_tokens=2, num_output_placeholders=1, num_released_blocks=1, block_table=[0, 7], window_table=[None, [3]],
                block_hashes=[6, 7], cache_entries=[8], speculates=True, spec_token_ids=[9])
    assert lasting.keys() | made.keys() == {f.name for f in fields(Sequence)}
    seq = Sequence(**lasting, **made)
    seq.reset()
    assert vars(seq) == vars(Sequence(**lasting))


def three_scheduled():
    a, b, c = new(5), new(5), new(5)
    a.output_token_ids, a.num_computed_tokens = [9], 5
    steps = (ScheduledSequence(a, 5, 1, True), ScheduledSequence(b, 0, 3, False), ScheduledSequence(c, 0, 5, True))
    return SchedulerOutput(steps, num_admitted=2, removed=(new(1),))


def test_a_scheduler_output_names_the_admitted_and_the_sampled():
    output = three_scheduled()
    a, b, c = output.scheduled
    assert output.admitted == (b, c) and output.sampled == [a, c] and output
    assert replace(output, num_admitted=0).admitted == () and replace(output, num_admitted=3).admitted == (a, b, c)
    assert not SchedulerOutput(()) and not SchedulerOutput((), removed=output.removed)


def test_a_scheduler_output_is_frozen_and_keeps_its_meaning_when_the_sequences_move_on():
    output = three_scheduled()
    def meaning():
        return [(s.start, s.num_tokens, s.end, s.samples, s.seq.tokens(s.start, s.end)) for s in output.scheduled], \
            [id(s.seq) for s in output.admitted], [id(s.seq) for s in output.sampled], list(map(id, output.removed))
    before = meaning()
    for s in output.scheduled:
        s.seq.num_computed_tokens, s.seq.num_output_placeholders = s.end, int(s.samples)
        s.seq.output_token_ids.append(7)
        assert meaning() == before
        s.seq.reset()
        assert meaning() == before
    for name in ("scheduled", "num_admitted", "removed"):
        with pytest.raises(FrozenInstanceError): setattr(output, name, ())
    with pytest.raises(AttributeError): output.scheduled[0].start = 0
    assert type(output.scheduled) is type(output.removed) is type(output.admitted) is tuple


def test_sequences_are_told_apart_by_identity(): assert new(3) != new(3) and len({new(3), new(3)}) == 2


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_slots_are_allocated_at_the_edges_of_a_block(size):
    manager = KVCacheManager(3, size)
    for n, blocks in (2*size - 1, 2 - (size == 1)), (2*size, 2), (2*size + 1, 3):
        seq = new(n)
        assert manager.allocate_slots(seq, n) and len(seq.block_table) == blocks
        assert len(manager.pool.free_blocks) == 3 - blocks
        assert manager.allocate_slots(seq, 1) and len(seq.block_table) == blocks     # less than it has: nothing happens
        assert not manager.allocate_slots(seq, 3*size + 1) and len(seq.block_table) == blocks
        manager.free(seq)


def free_all(pool, *tables, keep):
    for table in tables:
        for block in reversed(table): pool.free(block, keep)


def test_blocks_are_reused_in_the_order_they_became_free():
    pool = BlockPool(4, 2)
    a, b = [pool.allocate(), pool.allocate()], [pool.allocate(), pool.allocate()]
    free_all(pool, b, a, keep=True)
    assert [pool.allocate() for _ in range(4)] == [3, 2, 1, 0]  # b's last block first, a's first block last


def test_blocks_not_worth_keeping_are_reused_first():
    pool = BlockPool(6, 2)
    a, b = [pool.allocate(), pool.allocate()], [pool.allocate(), pool.allocate()]
    free_all(pool, a, keep=True)
    free_all(pool, b, keep=False)
    assert list(pool.free_blocks) == [2, 3, 4, 5, 1, 0]         # b's, those never used, then a's
    pool.put_first(1)
    assert list(pool.free_blocks) == [1, 2, 3, 4, 5, 0]
    assert pool.allocate() == 1
    pool.put_first(1)                                           # not free: nothing happens
    assert list(pool.free_blocks) == [2, 3, 4, 5, 0] and pool.ref_counts == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("keep, order", [(True, [1, 0]), (False, [0, 1])])
def test_a_free_block_that_is_touched_is_free_no_more(keep, order):
    pool = BlockPool(2, 4)
    pool.touch(0)
    assert list(pool.free_blocks) == [1] and pool.ref_counts == [1, 0]
    pool.touch(0)
    pool.free(0, keep)
    assert 0 not in pool.free_blocks
    pool.free(0, keep)
    assert list(pool.free_blocks) == order


class PoolMachine(RuleBasedStateMachine):
    "Sequences come, grow, fork (sharing all full blocks) and leave; law 1 must hold after every step."

    def __init__(self):
        super().__init__()
        self.manager, self.seqs = KVCacheManager(8, 3), []
        self.pool = self.manager.pool

    def pick(self, i): return self.seqs[i % len(self.seqs)]

    @rule(n=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 30]))
    def add(self, n):
        seq, free = new(n), len(self.pool.free_blocks)
        fits = self.manager.allocate_slots(seq, n)
        assert fits == (blocks_needed(n, 3) <= free) and len(seq.block_table) == (blocks_needed(n, 3) if fits else 0)
        if fits: self.seqs.append(seq)

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def extend(self, i):
        seq = self.pick(i)
        before, free = list(seq.block_table), len(self.pool.free_blocks)
        seq.output_token_ids.append(7)
        fits = self.manager.allocate_slots(seq, seq.num_tokens)
        assert fits == (blocks_needed(seq.num_tokens, 3) - len(before) <= free)
        assert seq.block_table[:len(before)] == before and (fits or len(seq.block_table) == len(before))
        if not fits: seq.output_token_ids.pop()

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def fork(self, i):
        parent, child = self.pick(i), new(self.pick(i).num_tokens)
        for block in parent.block_table[:parent.num_tokens // 3]:
            self.pool.touch(block)
            child.block_table.append(block)
        if self.manager.allocate_slots(child, child.num_tokens): self.seqs.append(child)
        else: self.manager.free(child)

    @precondition(lambda self: self.seqs)
    @rule(i=st.integers(0, 99))
    def free(self, i):
        seq = self.seqs.pop(i % len(self.seqs))
        self.manager.free(seq)
        assert (seq.block_table, seq.num_computed_tokens) == ([], 0)

    @invariant()
    def law_1(self):
        held = Counter(block for seq in self.seqs for block in seq.block_table)
        assert self.pool.ref_counts == [held[b] for b in range(8)]
        assert set(self.pool.free_blocks) == set(range(8)) - set(held)

    def teardown(self):
        for seq in self.seqs: self.manager.free(seq)
        assert len(self.pool.free_blocks) == 8 and not any(self.pool.ref_counts)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
