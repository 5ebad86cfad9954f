"""The prefix cache: literal cases, and laws 1 and 2 over random lives of sequences in a small pool."""
from collections import Counter

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nano_vllm import prefix_cache
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.prefix_cache import PrefixCachingPool
from nano_vllm.sampling import SamplingParams

SIZE, NUM_BLOCKS = 3, 9
strong_hash = prefix_cache.hash_block
HASHES = {"xxhash": strong_hash, "three values": lambda parent, tokens: (parent + sum(tokens)) % 3,
          "one value": lambda parent, tokens: 5, "only the block": lambda parent, tokens: strong_hash(0, tokens)}


def new(tokens, salt=0): return Sequence("test", list(tokens), SamplingParams(), cache_salt=salt)


def compute_all(pool, seq):
    seq.num_computed_tokens = seq.num_tokens
    pool.register(seq)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("extra, cached", [(-1, -1), (0, -1), (1, 0)])
def test_a_full_hit_leaves_a_token_to_compute(k, extra, cached):
    pool, n = PrefixCachingPool(20, SIZE), k*SIZE + extra
    first = new(range(50))
    pool.start(first, [])
    compute_all(pool, first)
    seq = new(range(n))
    assert pool.start(seq, pool.match(seq))
    assert seq.num_computed_tokens == (k + cached)*SIZE < n
    assert seq.block_table[:k + cached] == first.block_table[:k + cached]


def test_equal_salts_share_and_others_do_not():
    pool = PrefixCachingPool(20, SIZE)
    first = new(range(7), salt=1)
    pool.start(first, [])
    compute_all(pool, first)
    assert [len(pool.match(new(range(7), salt))) for salt in (0, 1, 2)] == [0, 2, 0]


def test_the_same_tokens_after_another_text_do_not_match(monkeypatch):
    monkeypatch.setattr(prefix_cache, "hash_block", HASHES["only the block"])
    pool, first = PrefixCachingPool(20, SIZE), new([1, 1, 1, 2, 2, 2, 3])
    pool.start(first, [])
    compute_all(pool, first)
    assert pool.match(new([9, 9, 9, 2, 2, 2, 3])) == [] == pool.match(new([2, 2, 2, 3]))


def test_blocks_to_be_revived_are_not_promised_twice():
    pool, first = PrefixCachingPool(3, SIZE), new(range(7))
    pool.start(first, [])
    compute_all(pool, first)
    pool.free(first)
    seq = new(range(10))                             # four blocks: two are cached, but the pool has only three
    assert not pool.start(seq, pool.match(seq)) and seq.block_table == [] and len(pool.free_blocks) == 3


def test_a_twin_waits_until_its_block_is_computed_or_its_owner_gone():
    pool, a, twin, other = PrefixCachingPool(20, SIZE), new(range(7)), new(range(7)), new(range(9, 16))
    pool.start(a, [])
    assert pool.being_computed(twin, 0) and not pool.being_computed(other, 0)
    compute_all(pool, a)
    assert not pool.being_computed(twin, len(pool.match(twin))) and not pool.pending
    pool.start(other, [])
    pool.free(other)
    assert not pool.pending


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow, step back and leave; `kv` remembers the text that each slot was written for.

    Texts are runs of two token ids, so prefixes repeat often, and the pool is small, so that contents are evicted.
    """

    @initialize(name=st.sampled_from(sorted(HASHES)))
    def begin(self, name):
        prefix_cache.hash_block = HASHES[name]
        self.pool, self.running, self.gone = PrefixCachingPool(NUM_BLOCKS, SIZE), [], []
        self.kv = [None] * (NUM_BLOCKS * SIZE)

    def pick(self, i): return self.running[i % len(self.running)]

    def admit(self, seq):
        matched, free = self.pool.match(seq), len(self.pool.free_blocks)
        assert len(matched)*SIZE < seq.num_tokens, "nothing would be left to compute"
        for i, block in enumerate(matched):
            assert self.kv[block*SIZE + SIZE - 1] == tuple(seq.tokens(0, (i + 1)*SIZE)), "law 2: matched another text"
        needed = blocks_needed(seq.num_tokens, SIZE) - sum(self.pool.ref_counts[b] > 0 for b in matched)
        assert self.pool.start(seq, matched) == (needed <= free)
        if needed <= free: self.running.append(seq)
        else: assert (seq.block_table, seq.num_computed_tokens) == ([], 0)

    @rule(start=st.lists(st.integers(0, 1), min_size=1, max_size=3), k=st.integers(0, 3), edge=st.sampled_from([-1, 0, 1]),
          salt=st.sampled_from([0, 0, 0, 7]))
    def add(self, start, k, edge, salt):
        self.admit(new((start * 4*SIZE)[:max(k*SIZE + edge, 1)], salt))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99), share=st.sampled_from([0.3, 1, 1]))
    def compute_and_register(self, i, share):
        seq = self.pick(i)
        text = tuple(seq.tokens(0, seq.num_tokens))
        end = seq.num_computed_tokens + int(share * (seq.num_tokens - seq.num_computed_tokens))
        slots = [b*SIZE + j for b in seq.block_table for j in range(SIZE)]
        for p in range(seq.num_computed_tokens, end):
            block = slots[p] // SIZE
            assert self.pool.ref_counts[block] == 1, "law 2: a shared block is written"
            assert self.pool.entries[block] is None, "law 2: a findable block is written"
            self.kv[slots[p]] = text[:p + 1]
        assert [self.kv[s] for s in slots[:end]] == [text[:p + 1] for p in range(end)], "wrong KV is read"
        seq.num_computed_tokens = end
        self.pool.register(seq)

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99), token=st.integers(0, 1))
    def extend(self, i, token):
        seq = self.pick(i)
        if seq.num_computed_tokens < seq.num_tokens: return
        seq.output_token_ids.append(token)
        if not self.pool.grow(seq, seq.num_tokens): self.preempt(i)

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99))
    def preempt(self, i):
        seq = self.running.pop(i % len(self.running))
        self.pool.free(seq)
        assert (seq.block_table, seq.cache_entries, seq.num_computed_tokens) == ([], [], 0)
        self.gone.append(seq)

    @precondition(lambda self: self.gone)
    @rule(i=st.integers(0, 99))
    def readmit(self, i): self.admit(self.gone.pop(i % len(self.gone)))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99))
    def finish(self, i): self.pool.free(self.running.pop(i % len(self.running)))

    @invariant()
    def laws(self):
        pool, held = self.pool, Counter(block for seq in self.running for block in seq.block_table)
        assert pool.ref_counts == [held[b] for b in range(NUM_BLOCKS)], "law 1: references"
        assert set(pool.free_blocks) == set(range(NUM_BLOCKS)) - set(held), "law 1: partition"
        assert {b: e.hash for b, e in enumerate(pool.entries) if e} == {b: h for h, b in pool.cached.items()}
        for b, entry in enumerate(pool.entries):
            if entry: assert [t and t[-1] for t in self.kv[b*SIZE:(b + 1)*SIZE]] == entry.tokens, "law 2: not computed"
        assert all(any(seq is s for s in self.running) for seq in pool.pending.values())

    def teardown(self):
        prefix_cache.hash_block = strong_hash
        for seq in self.running: self.pool.free(seq)
        if hasattr(self, "pool"): assert len(self.pool.free_blocks) == NUM_BLOCKS and not self.pool.pending


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
