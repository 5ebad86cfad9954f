"""Prefix cache and KV cache manager: literal cases, and laws 1 and 2 over random lives of sequences in a small pool."""
from collections import Counter

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nano_vllm import prefix_cache
from nano_vllm.kv_blocks import BlockPool, Sequence, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams

SIZE, NUM_BLOCKS = 3, 9
strong_hash = prefix_cache.hash_block
HASHES = {"xxhash": strong_hash, "three values": lambda parent, tokens: (parent + sum(tokens)) % 3,
          "one value": lambda parent, tokens: 5, "only the block": lambda parent, tokens: strong_hash(0, tokens)}


def new(tokens, salt=0): return Sequence("test", list(tokens), SamplingParams(), cache_salt=salt)


def begin(manager, seq): return manager.allocate_slots(seq, seq.num_tokens, manager.get_computed_blocks(seq))


def compute_all(manager, seq):
    seq.num_computed_tokens = seq.num_tokens
    manager.cache_blocks(seq, seq.num_tokens)


def computed(manager, seq):
    "`seq`, after the manager gave it blocks of its own and all its tokens were computed."
    assert manager.allocate_slots(seq, seq.num_tokens)
    compute_all(manager, seq)
    return seq


def num_found(manager, *args, **kwargs): return len(manager.get_computed_blocks(new(*args, **kwargs)))


def findable(manager): return [manager.cache.entries[b] is not None for b in manager.pool.free_blocks]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("extra, cached", [(-1, -1), (0, -1), (1, 0)])
def test_a_full_hit_leaves_a_token_to_compute(k, extra, cached):
    manager, n = KVCacheManager(20, SIZE), k*SIZE + extra
    first = computed(manager, new(range(50)))
    seq = new(range(n))
    assert begin(manager, seq)
    assert seq.num_computed_tokens == (k + cached)*SIZE < n
    assert seq.block_table[:k + cached] == first.block_table[:k + cached]


def test_equal_salts_share_and_others_do_not():
    manager = KVCacheManager(20, SIZE)
    computed(manager, new(range(7), salt=1))
    assert [num_found(manager, range(7), salt) for salt in (0, 1, 2)] == [0, 2, 0]


def test_the_same_tokens_after_another_text_are_not_found(monkeypatch):
    monkeypatch.setattr(prefix_cache, "hash_block", HASHES["only the block"])
    manager = KVCacheManager(20, SIZE)
    computed(manager, new([1, 1, 1, 2, 2, 2, 3]))
    assert num_found(manager, [1, 1, 1, 2, 2, 2, 3]) == 2
    assert num_found(manager, [9, 9, 9, 2, 2, 2, 3]) == 0 == num_found(manager, [2, 2, 2, 3])


def test_blocks_to_be_revived_are_not_promised_twice():
    manager = KVCacheManager(3, SIZE)
    manager.free(computed(manager, new(range(7))))
    seq = new(range(10))                             # four blocks: two are cached, but the pool has only three
    assert not begin(manager, seq) and seq.block_table == [] and len(manager.pool.free_blocks) == 3


def test_a_watermark_of_blocks_stays_free():
    manager = KVCacheManager(6, SIZE)
    manager.free(computed(manager, new(range(7))))
    for watermark, fits in (4, False), (3, True):    # two cached blocks and one new one: three are left
        seq = new(range(7))
        assert manager.allocate_slots(seq, 7, manager.get_computed_blocks(seq), watermark) == fits
        assert len(seq.block_table) == 3*fits and len(manager.pool.free_blocks) == 6 - 3*fits


def test_a_twin_waits_until_its_block_is_computed_or_its_owner_gone():
    manager, a, twin, other = KVCacheManager(20, SIZE), new(range(7)), new(range(7)), new(range(9, 16))
    manager.allocate_slots(a, 7)
    assert manager.has_pending_prefix(twin, 0) and not manager.has_pending_prefix(other, 0)
    compute_all(manager, a)
    assert not manager.has_pending_prefix(twin, len(manager.get_computed_blocks(twin))) and not manager.pending
    manager.allocate_slots(other, 7)
    manager.free(other)
    assert not manager.pending


def ask(manager, prompts):
    "Compute each prompt and let it end; how many blocks were found."
    found = 0
    for prompt in prompts:
        seq = new(prompt)
        assert begin(manager, seq)
        found += seq.num_computed_tokens // manager.block_size
        compute_all(manager, seq)
        manager.free(seq)
    return found


class KeepsAll(BlockPool):
    def free(self, block, keep=False): super().free(block, keep=True)


@pytest.mark.parametrize("kind, left, again", [(BlockPool, 60, 60), (KeepsAll, 40, 0)])
def test_blocks_that_nobody_can_find_are_handed_out_first(kind, left, again):
    manager, prompts = KVCacheManager(80, 4), [[i, 0, 0, 0, 1, 1] for i in range(60)]
    manager.pool = kind(80, 4)                       # 60 prompts of one and a half blocks
    assert ask(manager, prompts) == 0
    assert sum(findable(manager)) == left
    assert ask(manager, prompts) == again
    if kind is BlockPool: assert findable(manager) == [False] * 20 + [True] * 60


def test_a_free_block_whose_entry_gives_way_is_handed_out_next(monkeypatch):
    monkeypatch.setattr(prefix_cache, "hash_block", HASHES["one value"])
    manager = KVCacheManager(4, SIZE)
    first = computed(manager, new([1, 1, 1]))
    table = list(first.block_table)
    manager.free(first)
    assert list(manager.pool.free_blocks)[-1:] == table and num_found(manager, [1, 1, 1, 0]) == 1
    second = computed(manager, new([2, 2, 2]))       # collides
    assert list(manager.pool.free_blocks)[:1] == table and num_found(manager, [1, 1, 1, 0]) == 0
    assert num_found(manager, [2, 2, 2, 0]) == 1
    manager.free(second)
    assert findable(manager) == [False, False, False, True]


def first_seen(position, window):
    "The first position that the token at `position` looks at."
    return 0 if window is None else max(0, position + 1 - window)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 5, 6, 7])
def test_blocks_behind_a_window_go_back_and_prefixes_are_still_right(size, window):
    large, tight = (KVCacheManager(n, size, window) for n in (100, blocks_needed(max(window, 7) + size, size) + 1))
    for manager in (large, tight):
        pool, seq = manager.pool, new(range(7))
        for n in range(7, 60):
            manager.free_behind_window(seq)
            assert manager.allocate_slots(seq, n)
            first = first_seen(seq.num_computed_tokens, window) // size          # the first block that is looked at
            assert seq.num_released_blocks == first and not any(seq.block_table[:first])
            assert len(seq.block_table) == blocks_needed(n, size)
            mine = seq.block_table[first:]
            assert len(set(mine)) == len(mine) == pool.num_blocks - len(pool.free_blocks)
            assert [pool.ref_counts[b] for b in mine] == [1] * len(mine)
            compute_all(manager, seq)
            seq.output_token_ids.append(n)
        again = new(range(60))
        blocks = manager.get_computed_blocks(again)
        for i, block in enumerate(blocks):
            assert manager.cache.entries[block].tokens == list(range(i*size, (i + 1)*size))
        assert len(blocks) == (59 // size if manager is large else 0)            # overwritten, the first ones first
        manager.free(seq)
        assert len(pool.free_blocks) == pool.num_blocks and not any(pool.ref_counts)
        assert (seq.num_released_blocks, seq.block_table, seq.num_computed_tokens) == (0, [], 0)


def test_blocks_that_a_step_under_way_is_filling_do_not_go_back():
    manager, seq = KVCacheManager(9, SIZE, 2), new(range(3*SIZE))
    assert manager.allocate_slots(seq, 3*SIZE)
    seq.num_computed_tokens = 3*SIZE                 # scheduled; the next step is planned before it is computed
    manager.free_behind_window(seq)
    assert seq.num_released_blocks == 0 and len(manager.pool.free_blocks) == 6
    manager.cache_blocks(seq, 3*SIZE)
    manager.free_behind_window(seq)
    assert seq.num_released_blocks == 2 and len(manager.pool.free_blocks) == 8
    assert num_found(manager, range(3*SIZE + 1)) == 3


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow, step back and leave; `kv` remembers the text that each slot was written for.

    Texts are runs of two token ids, so prefixes repeat often, and the pool is small, so that contents are evicted.
    """

    @initialize(name=st.sampled_from(sorted(HASHES)), window=st.sampled_from([None, None, 1, 4, 7]))
    def begin(self, name, window):
        prefix_cache.hash_block = HASHES[name]
        self.manager, self.window = KVCacheManager(NUM_BLOCKS, SIZE, window), window
        self.pool, self.cache, self.running, self.gone = self.manager.pool, self.manager.cache, [], []
        self.kv = [None] * (NUM_BLOCKS * SIZE)

    def pick(self, i): return self.running[i % len(self.running)]

    def admit(self, seq):
        found, free = self.manager.get_computed_blocks(seq), len(self.pool.free_blocks)
        assert len(found)*SIZE < seq.num_tokens, "nothing would be left to compute"
        for i, block in enumerate(found):
            assert self.kv[block*SIZE + SIZE - 1] == tuple(seq.tokens(0, (i + 1)*SIZE)), "law 2: found another text"
        needed = blocks_needed(seq.num_tokens, SIZE) - sum(self.pool.ref_counts[b] > 0 for b in found)
        assert self.manager.allocate_slots(seq, seq.num_tokens, found) == (needed <= free)
        if needed <= free: self.running.append(seq)
        else: assert (seq.block_table, seq.num_computed_tokens) == ([], 0)

    @rule(start=st.lists(st.integers(0, 1), min_size=1, max_size=3), k=st.integers(0, 3), edge=st.sampled_from([-1, 0, 1]),
          salt=st.sampled_from([0, 0, 0, 7]))
    def add(self, start, k, edge, salt):
        self.admit(new((start * 4*SIZE)[:max(k*SIZE + edge, 1)], salt))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99), share=st.sampled_from([0.3, 1, 1]))
    def compute_and_cache(self, i, share):
        seq = self.pick(i)
        text = tuple(seq.tokens(0, seq.num_tokens))
        end = seq.num_computed_tokens + int(share * (seq.num_tokens - seq.num_computed_tokens))
        slots = [b*SIZE + j for b in seq.block_table for j in range(SIZE)]
        first = first_seen(seq.num_computed_tokens, self.window)
        assert first // SIZE >= seq.num_released_blocks, "a block that is looked at was given back"
        for p in range(seq.num_computed_tokens, end):
            block = slots[p] // SIZE
            assert self.pool.ref_counts[block] == 1, "law 2: a shared block is written"
            assert self.cache.entries[block] is None, "law 2: a findable block is written"
            self.kv[slots[p]] = text[:p + 1]
        assert [self.kv[s] for s in slots[first:end]] == [text[:p + 1] for p in range(first, end)], "wrong KV is read"
        seq.num_computed_tokens = end
        self.manager.cache_blocks(seq, end)

    @precondition(lambda self: self.running and self.window)
    @rule(i=st.integers(0, 99))
    def slide(self, i):
        seq = self.pick(i)
        self.manager.free_behind_window(seq)
        full, unseen = len(seq.cache_entries), first_seen(seq.num_computed_tokens, self.window) // SIZE
        assert seq.num_released_blocks >= min(full, unseen), "what no token will look at is held"

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99), token=st.integers(0, 1))
    def extend(self, i, token):
        seq = self.pick(i)
        if seq.num_computed_tokens < seq.num_tokens: return
        seq.output_token_ids.append(token)
        if not self.manager.allocate_slots(seq, seq.num_tokens): self.preempt(i)

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99))
    def preempt(self, i):
        seq = self.running.pop(i % len(self.running))
        self.manager.free(seq)
        assert (seq.block_table, seq.cache_entries, seq.num_computed_tokens) == ([], [], 0)
        self.gone.append(seq)

    @precondition(lambda self: self.gone)
    @rule(i=st.integers(0, 99))
    def readmit(self, i): self.admit(self.gone.pop(i % len(self.gone)))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 99))
    def finish(self, i): self.manager.free(self.running.pop(i % len(self.running)))

    @invariant()
    def laws(self):
        pool, cache = self.pool, self.cache
        held = Counter(block for seq in self.running for block in seq.block_table[seq.num_released_blocks:])
        assert pool.ref_counts == [held[b] for b in range(NUM_BLOCKS)], "law 1: references"
        assert set(pool.free_blocks) == set(range(NUM_BLOCKS)) - set(held), "law 1: partition"
        assert {b: e.hash for b, e in enumerate(cache.entries) if e} == {b: h for h, b in cache.block_of.items()}
        assert findable(self.manager) == sorted(findable(self.manager)), "handed out first, though it can be found"
        for b, entry in enumerate(cache.entries):
            if entry: assert [t and t[-1] for t in self.kv[b*SIZE:(b + 1)*SIZE]] == entry.tokens, "law 2: not computed"
        assert all(any(seq is s for s in self.running) for seq in self.manager.pending.values())

    def teardown(self):
        prefix_cache.hash_block = strong_hash
        for seq in self.running: self.manager.free(seq)
        if hasattr(self, "pool"): assert len(self.pool.free_blocks) == NUM_BLOCKS and not self.manager.pending


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
