"""Random workloads for scheduler, pool and prefix cache, against a fake KV cache.

Each slot of the fake cache remembers the text (all tokens up to and including its own) that it
was written for. So reading a slot tells whether the engine would have read the right KV.
"""
import random
from collections import Counter

from nano_vllm import prefix_cache
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.prefix_cache import PrefixCachingPool
from nano_vllm.sampling import SamplingParams
from nano_vllm.scheduler import Scheduler, check_fits

EOS = 0


def next_token(seq):
    "What the fake model answers: a function of the text and the seed, and of nothing else."
    rng = random.Random(hash((tuple(seq.tokens(0, seq.num_tokens)), seq.seed)))
    return EOS if rng.random() < 0.05 else rng.randint(1, 3)


def expected_output(seq, max_model_len):
    "The answer of `seq` if it were alone in the world."
    alone = Sequence("alone", seq.prompt_token_ids, seq.params, seed=seq.seed)
    while True:
        alone.output_token_ids.append(next_token(alone))
        if is_complete(alone, max_model_len): return alone.output_token_ids


def is_complete(seq, max_model_len):
    return (seq.output_token_ids[-1] == EOS or len(seq.output_token_ids) == seq.params.max_tokens
            or seq.num_tokens == max_model_len)


class Workload:
    "One random engine, its requests, and the laws that are asserted after every step."

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        size = rng.choice([1, 2, 3, 4, 8])
        self.max_model_len = rng.randint(4, 60)
        self.pool = PrefixCachingPool(rng.randint(2, 30), size)
        self.scheduler = Scheduler(self.pool, rng.randint(1, 6), rng.choice([1, 2, 5, 16, 64]))
        self.kv = [None] * (self.pool.num_blocks * size)
        self.sharing = rng.random() < 0.8
        self.prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 40))] for _ in range(3)]
        self.to_come = rng.randint(1, 8)
        self.live, self.done, self.num_steps = [], [], 0
        self.refused = 0

    def arrive(self):
        "A request with a prompt that often begins as another did, and now and then several samples."
        rng, self.to_come = self.rng, self.to_come - 1
        base = rng.choice(self.prompts)
        prompt = base[:rng.randint(1, len(base))] + [rng.randint(1, 3) for _ in range(rng.randint(0, 3))]
        params = SamplingParams(n=rng.choice([1, 1, 1, 3]), max_tokens=rng.randint(1, 20),
                                prompt_logprobs=rng.choice([None, None, None, 0]))
        try: check_fits(len(prompt), params.max_tokens, self.max_model_len, self.pool)
        except ValueError:
            self.refused += 1
            longest = min(len(prompt) + params.max_tokens, self.max_model_len)
            too_long = len(prompt) >= self.max_model_len
            assert too_long or blocks_needed(longest - 1, self.pool.block_size) > self.pool.num_blocks
            return
        salt = 0 if self.sharing else self.to_come + 1
        for i in range(params.n):
            seq = Sequence(str(self.to_come), prompt, params, i, rng.getrandbits(30), cache_salt=salt)
            self.live.append(seq)
            self.scheduler.add(seq)

    def abort_one(self):
        seq = self.live.pop(self.rng.randrange(len(self.live)))
        self.scheduler.finish(seq, "abort")

    def step(self):
        s, rng = self.scheduler, self.rng
        residents, before = list(s.running), s.num_preemptions
        missing = [seq.num_tokens - seq.num_computed_tokens for seq in residents]
        assert all(n == 1 for n in missing[:-1]), "law 5: a prompt stands before a decode"
        work = s.schedule()
        self.check_schedule(work, residents, preempted=s.num_preemptions > before)
        for chunk in work: self.compute(chunk)
        tokens = [next_token(c.seq) for c in work if c.samples]
        for seq in s.update(work, tokens):
            if is_complete(seq, self.max_model_len):
                s.finish(seq, "stop")
                self.live.remove(seq)
                self.done.append(seq)
        self.check_pool()
        if self.live and rng.random() < 0.02: self.abort_one()
        self.num_steps += 1

    def compute(self, chunk):
        "Write the chunk's KV and read all of its past (laws 2 and, through reading, 3)."
        seq, size, pool = chunk.seq, self.pool.block_size, self.pool
        text = tuple(seq.tokens(0, chunk.end))
        slots = [seq.block_table[p // size] * size + p % size for p in range(chunk.end)]
        for p in range(chunk.start, chunk.end):
            block = slots[p] // size
            assert pool.ref_counts[block] == 1, "a shared block is written"
            assert pool.entries[block] is None, "a findable block is written"
            self.kv[slots[p]] = text[:p + 1]
        for p, slot in enumerate(slots): assert self.kv[slot] == text[:p + 1], "wrong KV is read"

    def check_schedule(self, work, residents, preempted):
        s = self.scheduler
        assert all(c.num_new_tokens >= 1 for c in work), "a chunk computes nothing"
        assert sum(c.num_new_tokens for c in work) <= s.budget, "law 4: over budget"
        assert len(s.running) <= s.max_running, "law 4: too many residents"
        assert all(c.end <= c.seq.num_tokens <= self.max_model_len for c in work)
        working = {c.seq for c in work}
        assert len(working) == len(work), "a sequence is scheduled twice"
        assert working == set(s.running), "law 5: a resident sequence stalls"
        assert preempted or set(residents) <= working, "law 5: a sequence lost its place"
        assert not (self.live and not work), "law 4: nobody moves"

    def check_pool(self):
        pool = self.pool
        held = Counter(b for seq in self.live for b in seq.block_table)
        assert pool.ref_counts == [held[b] for b in range(pool.num_blocks)], "law 1: references"
        assert set(pool.free_blocks) == set(range(pool.num_blocks)) - set(held), "law 1: partition"
        assert all(pool.entries[b].hash == h for h, b in pool.cached.items()), "cache out of step"
        assert sum(e is not None for e in pool.entries) == len(pool.cached)
        assert all(seq in self.scheduler.running for seq in pool.pending.values()), "pending owner is gone"
        size = pool.block_size
        for block, entry in enumerate(pool.entries):  # findable means computed (law 2)
            if entry: assert [text and text[-1] for text in self.kv[block * size:(block + 1) * size]] == entry.tokens

    def run(self):
        while self.to_come or self.live:
            while self.to_come and self.rng.random() < 0.4: self.arrive()
            self.step()
            assert self.num_steps < 5000, "law 4: no end in sight"
        self.drain()
        assert len(self.pool.free_blocks) == self.pool.num_blocks, "law 1: leaked"
        assert not self.pool.pending and not self.scheduler.waiting and not self.scheduler.running
        for seq in self.done: assert seq.output_token_ids == self.expected(seq), "not what it says alone"

    def drain(self): "What is left to do when every sequence has ended: here nothing."
    def expected(self, seq): return expected_output(seq, self.max_model_len)


def run_workload(seed, kind=Workload):
    "Run workload `seed` of a kind; every third one under a hash of only seven values. Returns what it exercised."
    strong = prefix_cache.hash_block
    if seed % 3 == 0: prefix_cache.hash_block = lambda parent, tokens: (parent * 31 + sum(tokens)) % 7
    try:
        w = kind(seed)
        w.run()
    except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
    finally: prefix_cache.hash_block = strong
    return dict(steps=w.num_steps, finished=len(w.done), preempted=w.scheduler.num_preemptions,
                refused=w.refused)
