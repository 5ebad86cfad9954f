"""Random workloads for scheduler, pool and prefix cache, against a fake KV cache.

Each slot of the fake cache remembers the text (all tokens up to and including its own) that it
was written for. So reading a slot tells whether the engine would have read the right KV.
"""
import inspect
import random
import sys
import textwrap
from collections import Counter

from nano_vllm import prefix_cache
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler, check_fits
from nano_vllm.sliding_windows import KVLayout

EOS = 0
STRONG_HASH = prefix_cache.hash_block


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


def guesses_for(seq, most, rng):
    "Up to `most` tokens that may follow those of `seq`: each right or, now and then, not."
    alone = Sequence("", seq.tokens(0, seq.num_tokens), seq.params, seed=seq.seed)
    for _ in range(rng.randint(0, most)):
        alone.output_token_ids.append(next_token(alone) if rng.random() < 0.8 else rng.randint(0, 3))
    return alone.output_token_ids


def verified(scheduled):
    "What the model says to a sequence: the guesses that are right, and the token after them."
    seq, said = scheduled.seq, []
    alone = Sequence("", seq.tokens(0, scheduled.end), seq.params, seed=seq.seed, output_token_ids=said)
    for guess in scheduled.spec_token_ids:
        said.append(next_token(alone))
        if said[-1] != guess: return said
    said.append(next_token(alone))
    return said


def cut_at_end(seq):
    "Forget what follows the token that ends the answer."
    if EOS in seq.output_token_ids: del seq.output_token_ids[seq.output_token_ids.index(EOS) + 1:]


class Workload:
    "One random engine, its requests, and the laws that are asserted after every step."

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        size = rng.choice([1, 2, 3, 4, 8])
        self.max_model_len = rng.randint(4, 60)
        self.window = rng.choice([None, None, None, rng.randint(1, 20)])
        self.manager = KVCacheManager(rng.randint(2, 30), size, self.window)
        threshold = rng.choice([0, 0, 0, 1, 3, 10])
        self.scheduler = Scheduler(self.manager, rng.randint(1, 6), rng.choice([1, 2, 5, 16, 64]), threshold)
        self.kv = [None] * (self.pool.num_blocks * size)
        self.sharing = rng.random() < 0.8
        self.prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 40))] for _ in range(3)]
        self.to_come = rng.randint(1, 8)
        self.live, self.done, self.num_steps = [], [], 0
        self.refused = 0
        self.guesses = rng.choice([0, 0, 1, 3, 9])    # the most for a sequence in a step
        self.num_right = self.num_wrong = 0

    count = staticmethod(blocks_needed)

    @property
    def pool(self): return self.manager.pool

    def arrive(self):
        "A request with a prompt that often begins as another did, and now and then several samples."
        rng, self.to_come = self.rng, self.to_come - 1
        base = rng.choice(self.prompts)
        prompt = base[:rng.randint(1, len(base))] + [rng.randint(1, 3) for _ in range(rng.randint(0, 3))]
        params = SamplingParams(n=rng.choice([1, 1, 1, 3]), max_tokens=rng.randint(1, 20),
                                prompt_logprobs=rng.choice([None, None, None, 0]))
        sizes = self.max_model_len, self.pool.num_blocks, self.pool.block_size
        try: check_fits(len(prompt), params.max_tokens, *sizes, self.count)
        except ValueError:
            self.refused += 1
            longest = min(len(prompt) + params.max_tokens, self.max_model_len)
            too_long = len(prompt) >= self.max_model_len
            assert too_long or self.count(longest - 1, self.pool.block_size) > self.pool.num_blocks
            return
        salt = 0 if self.sharing else self.to_come + 1
        for i in range(params.n):
            seq = Sequence(str(self.to_come), prompt, params, i, rng.getrandbits(30), cache_salt=salt,
                           max_len=min(len(prompt) + params.max_tokens, self.max_model_len))
            self.live.append(seq)
            self.scheduler.add(seq)

    def abort_one(self):
        seq = self.live.pop(self.rng.randrange(len(self.live)))
        self.scheduler.finish(seq, "abort")

    def step(self):
        s, rng = self.scheduler, self.rng
        residents, before = list(s.running), s.num_preemptions
        missing = [seq.num_tokens - seq.num_computed_tokens for seq in residents]
        whole = s.max_tokens_per_sequence == s.budget
        assert not whole or all(n == 1 for n in missing[:-1]), "law 5: a prompt stands before a decode"
        if self.guesses: self.guess()
        output = s.schedule()
        self.check_schedule(output, residents, preempted=s.num_preemptions > before)
        for scheduled in output.scheduled: self.compute(scheduled)
        said = [verified(x) for x in output.sampled]
        right = {x.seq: tuple(tokens[:-1]) for x, tokens in zip(output.sampled, said) if x.spec_token_ids}
        self.num_right += sum(map(len, right.values()))
        self.num_wrong += sum(len(x.spec_token_ids) - len(right.get(x.seq, ())) for x in output.sampled)
        s.update(output, [tokens[-1] for tokens in said], right)
        for x, tokens in zip(output.sampled, said):
            assert x.seq.tokens(x.seq.num_tokens - len(tokens), x.seq.num_tokens) == tokens, "not the tokens that were right"
            assert x.seq.num_computed_tokens == x.seq.num_tokens - 1, "wrong guesses count as computed"
        for seq in [x.seq for x in output.sampled]:
            cut_at_end(seq)
            if is_complete(seq, self.max_model_len):
                s.finish(seq, "stop")
                self.live.remove(seq)
                self.done.append(seq)
        self.check_pool()
        if self.live and rng.random() < 0.02: self.abort_one()
        self.num_steps += 1

    def guess(self):
        "Guesses at random for some who run, often right: their blocks and their budget must be what others do not need."
        for seq in self.scheduler.running:
            seq.speculates = self.rng.random() < 0.8
            seq.spec_token_ids = guesses_for(seq, self.guesses, self.rng) if seq.speculates else []

    def first_seen(self, position):
        "The first position that the token at `position` looks at."
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def compute(self, scheduled):
        "Write the KV of a step and read all of the past it sees (laws 2 and, through reading, 3)."
        seq, size, pool = scheduled.seq, self.pool.block_size, self.pool
        text, first = tuple(seq.tokens(0, scheduled.end)) + scheduled.spec_token_ids, self.first_seen(scheduled.start)
        slots = {p: seq.block_table[p // size] * size + p % size for p in range(first, scheduled.end)}
        for p in range(scheduled.start, scheduled.end):
            block = slots[p] // size
            assert p // size >= seq.num_released_blocks, "a block that was given back is written"
            assert pool.ref_counts[block] == 1, "a shared block is written"
            assert self.manager.cache.entries[block] is None, "a findable block is written"
            self.kv[slots[p]] = text[:p + 1]
        assert first // size >= seq.num_released_blocks, "a block that is seen was given back"
        for p, slot in slots.items(): assert self.kv[slot] == text[:p + 1], "wrong KV is read"

    def check_schedule(self, output, residents, preempted):
        s, scheduled = self.scheduler, output.scheduled
        assert all(c.num_tokens >= 1 for c in scheduled), "a sequence computes nothing"
        assert sum(c.num_tokens for c in scheduled) <= s.budget, "law 4: over budget"
        assert all(c.num_tokens <= s.max_tokens_per_sequence for c in scheduled)
        assert len(s.running) <= s.max_running, "law 4: too many residents"
        assert all(c.end - len(c.spec_token_ids) <= c.seq.num_tokens <= self.max_model_len for c in scheduled)
        assert all(c.end < c.seq.max_len or not c.spec_token_ids for c in scheduled), "a text's last token is computed"
        assert all(c.samples == (c.end == c.seq.num_tokens) for c in scheduled if not c.spec_token_ids)
        for c in scheduled:
            guesses = len(c.spec_token_ids)
            if not guesses: continue
            assert c.samples == 1 + guesses and c.end - guesses == c.seq.num_tokens, "guesses follow what is known"
            assert list(c.spec_token_ids) == c.seq.spec_token_ids[:guesses]
            needed = blocks_needed(c.end, self.pool.block_size)
            assert len(c.seq.block_table) == needed, "guesses that are not computed hold blocks"
        working = {c.seq for c in scheduled}
        assert len(working) == len(scheduled), "a sequence is scheduled twice"
        assert working == set(s.running), "law 5: a resident sequence stalls"
        assert preempted or set(residents) <= working, "law 5: a sequence lost its place"
        assert {c.seq for c in output.admitted} == working - set(residents), "admitted are those that were not there"
        assert not (self.live and not scheduled), "law 4: nobody moves"

    def check_pool(self):
        pool, cache = self.pool, self.manager.cache
        held = Counter(b for seq in self.live for b in seq.block_table[seq.num_released_blocks:])
        assert pool.ref_counts == [held[b] for b in range(pool.num_blocks)], "law 1: references"
        assert set(pool.free_blocks) == set(range(pool.num_blocks)) - set(held), "law 1: partition"
        findable = [cache.entries[b] is not None for b in pool.free_blocks]
        assert findable == sorted(findable), "a block that can be found is handed out before one that cannot"
        assert all(cache.entries[b].hash == h for h, b in cache.block_of.items()), "cache out of step"
        assert sum(e is not None for e in cache.entries) == len(cache.block_of)
        assert all(seq in self.scheduler.running for seq in self.manager.pending.values()), "pending owner is gone"
        self.check_contents()

    def check_contents(self):
        "Findable means computed (law 2)."
        size = self.pool.block_size
        for block, entry in enumerate(self.manager.cache.entries):
            if entry: assert [text and text[-1] for text in self.kv[block * size:(block + 1) * size]] == entry.tokens

    def run(self):
        while self.to_come or self.live:
            while self.to_come and self.rng.random() < 0.4: self.arrive()
            self.step()
            assert self.num_steps < 5000, "law 4: no end in sight"
        self.drain()
        assert len(self.pool.free_blocks) == self.pool.num_blocks, "law 1: leaked"
        assert not self.manager.pending and not self.scheduler.waiting and not self.scheduler.running
        for seq in self.done: assert seq.output_token_ids == self.expected(seq), "not what it says alone"

    def drain(self): "What is left to do when every sequence has ended: here nothing."
    def expected(self, seq): return expected_output(seq, self.max_model_len)


class HybridWorkload(Workload):
    "The same with layers in groups: one looks back to the beginning, the others over a window, all with blocks of one pool."

    def __init__(self, seed):
        super().__init__(seed)
        rng, s = self.rng, self.scheduler
        self.groups, self.window = rng.randint(1, 3), rng.randint(1, 20)
        layout = KVLayout((0,), tuple(range(1, 1 + self.groups)), self.window)
        self.manager = layout.manager(rng.randint(4, 40), self.pool.block_size, s.max_tokens_per_sequence)
        self.count = layout.block_counter(s.max_tokens_per_sequence)
        threshold = 0 if s.max_tokens_per_sequence == s.budget else s.max_tokens_per_sequence
        self.scheduler = Scheduler(self.manager, s.max_running, s.budget, threshold)
        self.kv = [None] * (self.pool.num_blocks * self.pool.block_size)

    def slots(self, seq, group, positions):
        "The slots of these positions in the cache of a group, 0 being the one that looks back to the beginning."
        size = self.pool.block_size
        blocks = {p: seq.window_table[p // size][group - 1] if group else seq.block_table[p // size] for p in positions}
        return {p: block * size + p % size for p, block in blocks.items()}

    def compute(self, scheduled):
        "Write the KV of a step in all groups, and read what each of them sees."
        seq, size, cache = scheduled.seq, self.pool.block_size, self.manager.cache
        text = tuple(seq.tokens(0, scheduled.end)) + scheduled.spec_token_ids
        for group in range(1 + self.groups):
            first = self.first_seen(scheduled.start) if group else 0
            slots = self.slots(seq, group, range(first, scheduled.end))
            for p in range(scheduled.start, scheduled.end):
                block = slots[p] // size
                assert self.pool.ref_counts[block] == 1, "a shared block is written"
                assert not cache.is_findable(block), "a findable block is written"
                self.kv[slots[p]] = group, text[:p + 1]
            for p, slot in slots.items(): assert self.kv[slot] == (group, text[:p + 1]), "wrong KV is read"

    def check_pool(self):
        pool, cache = self.pool, self.manager.cache
        held = Counter(b for seq in self.live for b in seq.block_table)
        for seq in self.live:
            assert all(column is None for column in seq.window_table[:seq.num_released_blocks])
            held.update(b for column in seq.window_table[seq.num_released_blocks:] for b in column)
            steps = 2 * self.scheduler.max_tokens_per_sequence
            most = blocks_needed(self.window + steps, pool.block_size) + 1
            assert len(seq.window_table) - seq.num_released_blocks <= most, "more is kept than a window"
        assert pool.ref_counts == [held[b] for b in range(pool.num_blocks)], "law 1: references"
        assert set(pool.free_blocks) == set(range(pool.num_blocks)) - set(held), "law 1: partition"
        findable = [cache.is_findable(b) for b in pool.free_blocks]
        assert findable == sorted(findable), "a block that can be found is handed out before one that cannot"
        assert all(cache.entries[b].hash == h for h, b in cache.block_of.items()), "cache out of step"
        uids = {e.uid for e in cache.entries if e}
        assert {uid for uid, _ in cache.local_blocks} <= uids, "a block is kept that nobody can find"
        assert {b: name for b, name in enumerate(cache.names) if name} == {b: name for name, b in cache.local_blocks.items()}
        assert not any(e and name for e, name in zip(cache.entries, cache.names)), "a block of two groups"
        assert all(seq in self.scheduler.running for seq in self.manager.pending.values()), "pending owner is gone"
        self.check_contents()

    def check_contents(self):
        size, cache = self.pool.block_size, self.manager.cache
        texts = {}
        for block, entry in enumerate(cache.entries):
            held = self.kv[block * size:(block + 1) * size]
            if not entry: continue
            assert all(held) and [(group, text[-1]) for group, text in held] == [(0, t) for t in entry.tokens]
            texts[entry.uid] = [text for _, text in held]
        for (uid, group), block in cache.local_blocks.items():
            assert self.kv[block * size:(block + 1) * size] == [(group + 1, text) for text in texts[uid]], "not what its name says"


def run_workload(seed, kind=Workload):
    "Run workload `seed` of a kind; every third one under a hash of only seven values. Returns what it exercised."
    if seed % 3 == 0: prefix_cache.hash_block = lambda parent, tokens: (parent * 31 + sum(tokens)) % 7
    try:
        w = kind(seed)
        w.run()
    except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
    finally: prefix_cache.hash_block = STRONG_HASH
    return dict(steps=w.num_steps, finished=len(w.done), preempted=w.scheduler.num_preemptions,
                refused=w.refused, right=w.num_right, wrong=w.num_wrong)


def plant(monkeypatch, owner, name, old, new):
    "Plant a bug in a method of a class or a function of a module: for the text `old`, which must be there once, `new`."
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {name}"
    found = {}
    exec(source[source.index("def "):].replace(old, new), vars(sys.modules[function.__module__]), found)
    monkeypatch.setattr(owner, name, found[name])
