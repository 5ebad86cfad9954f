"""The overlapped loop gives what the loop in turn gives, on a device that answers late: under fuzz with a fake model,
and with a real one. After every step the pool's books are right and every key that is read belongs to its text."""
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from fuzz import EOS, Workload, run_workload
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, overlap, prefix_cache
from nano_vllm.attention import make_batch
from nano_vllm.kv_blocks import Sequence
from nano_vllm.overlap import OverlappedLoop, fetch_later
from nano_vllm.prefix_cache import PrefixCachingPool


# ---- a fake device, which computes nothing before it is asked for the result

class LateDevice:
    """Computes steps in the order of their launches, from copies of what it was given, as late as it can.

    Each slot of its cache holds the text that it was written for; a token is a function of text and seed."""

    def __init__(self, num_slots, block_size):
        self.kv, self.size, self.queue, self.last_ids = [()] * num_slots, block_size, [], []

    def sample(self, batch, rows):
        "What ModelRunner.sample does, put off: `fetch` computes all that was launched up to there."
        handle = SimpleNamespace(is_cuda=False, ids=None, clone=lambda: handle, tolist=lambda: self.wait(handle))
        self.queue.append((batch, [r.seed for r in rows], handle))
        return handle

    def wait(self, handle):
        while handle.ids is None: self.compute(*self.queue.pop(0))
        return handle.ids

    def compute(self, batch, seeds, handle):
        tokens = [t if t >= 0 else self.last_ids[-1 - t] for t in batch.token_ids.tolist()]
        slots, at, ends = batch.slot_mapping.tolist(), 0, {}
        for table, new, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
            place = [table[p // self.size] * self.size + p % self.size for p in range(context)]
            for p in range(context - new, context):
                assert slots[at] == place[p]
                self.kv[place[p]] = (self.kv[place[p - 1]] if p else ()) + (tokens[at],)
                ends[at], at = self.kv[place[p]], at + 1
            text = self.kv[place[-1]]
            assert len(text) == context, "a key was written for a text of another length"
            assert all(self.kv[slot] == text[:p + 1] for p, slot in enumerate(place)), "wrong KV is read"
        handle.ids = [answer(ends[row], seed) for row, seed in zip(batch.logits_rows.tolist(), seeds, strict=True)]
        self.last_ids = handle.ids


def answer(text, seed):
    rng = random.Random(hash((text, seed)))
    return EOS if rng.random() < 0.05 else rng.randint(1, 3)


class OverlappedWorkload(Workload):
    "The workloads of fuzz.py under the overlapped loop; this object is its engine, too."

    def __init__(self, seed):
        super().__init__(seed)
        self.device = self.runner = LateDevice(len(self.kv), self.pool.block_size)
        self.kv, self.loop = self.device.kv, OverlappedLoop()
        self.received = Counter()

    @property
    def requests(self):  # what the loop looks at: does any of them need its tokens at once?
        return {seq: SimpleNamespace(completions=[SimpleNamespace(seq=seq)]) for seq in self.live}

    def arrive(self):
        known = set(self.live)
        super().arrive()
        for seq in set(self.live) - known:
            seq.params.prompt_logprobs = None
            if self.rng.random() < 0.05: seq.params.logprobs = 0   # now and then one that cannot wait
            seq.max_len = min(len(seq.prompt_token_ids) + seq.params.max_tokens, self.max_model_len)

    def note_start(self, chunk): pass

    def compute_step(self):
        "The loop in turn, for those that need it."
        work = self.scheduler.schedule()
        if not work: return
        assert not any(t < 0 for c in work for t in c.seq.output_token_ids), "a placeholder is left"
        seqs = [c.seq for c in work if c.samples]
        tokens = self.runner.sample(make_batch(work, self.pool.block_size), seqs).tolist()
        self.scheduler.update(work, tokens)
        for seq, token in zip(seqs, tokens): self.receive(seq, token, None)

    def receive(self, seq, token, entry):
        assert not seq.finish_reason and token >= 0
        self.received[seq] += 1
        known = seq.prompt_token_ids + seq.output_token_ids[:self.received[seq]]
        assert known[-1] == token and sum(t < 0 for t in seq.output_token_ids) <= 1
        if token == EOS or len(known) == seq.max_len:
            self.scheduler.finish(seq, "stop")
            self.live.remove(seq)
            self.done.append(seq)

    def step(self):
        schedule = self.scheduler.schedule
        def watched():
            residents, before = list(self.scheduler.running), self.scheduler.num_preemptions
            work = schedule()
            self.check_schedule(work, residents, self.scheduler.num_preemptions > before)
            return work
        self.scheduler.schedule = watched
        self.loop(self)
        del self.scheduler.schedule
        self.check_pool()
        if self.live and self.rng.random() < 0.02: self.abort_one()
        self.num_steps += 1

    def check_schedule(self, work, residents, preempted):
        s, working = self.scheduler, {c.seq for c in work}
        assert all(c.num_new_tokens >= 1 for c in work) and len(working) == len(work)
        assert sum(c.num_new_tokens for c in work) <= s.budget and len(s.running) <= s.max_running
        assert all(c.end <= c.seq.num_tokens <= c.seq.max_len for c in work)
        assert all(c.end < c.seq.max_len for c in work), "a text's last token is computed"
        for chunk in work:
            for p in range(chunk.start, chunk.end):
                block = chunk.seq.block_table[p // self.pool.block_size]
                assert self.pool.ref_counts[block] == 1 and self.pool.entries[block] is None, "a shared or findable block is written"
        idle = set(s.running) - working   # those whose last token is on its way
        assert all(seq.num_tokens == seq.num_computed_tokens == seq.max_len - 1 for seq in idle), "a resident sequence stalls"

    def check_pool(self):
        pool = self.pool
        held = Counter(b for seq in self.live for b in seq.block_table)
        assert pool.ref_counts == [held[b] for b in range(pool.num_blocks)], "law 1: references"
        assert set(pool.free_blocks) == set(range(pool.num_blocks)) - set(held), "law 1: partition"
        assert all(seq in self.scheduler.running for seq in pool.pending.values())
        assert not any(t < 0 for e in pool.entries if e for t in e.tokens), "a block is findable by a placeholder"

    def drain(self): self.loop(self)                   # the last flight lands
    def expected(self, seq): return alone(seq)


def alone(seq):
    text = list(seq.prompt_token_ids)
    while True:
        text.append(answer(tuple(text), seq.seed))
        if text[-1] == EOS or len(text) == seq.max_len: return text[len(seq.prompt_token_ids):]


def test_random_workloads():
    total = Counter()
    for seed in range(800): total.update(run_workload(seed, OverlappedWorkload))
    print(dict(total))
    assert total["finished"] > 800 and total["preempted"] > 80


def caught(seeds=150):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        for seed in range(seeds): run_workload(seed, OverlappedWorkload)


# The fuzz bites.

def test_catches_a_block_hashed_with_a_placeholder(monkeypatch):
    def careless(seq, block_size):
        hashes = seq.block_hashes
        for i in range(len(hashes), seq.num_tokens // block_size):
            tokens = seq.tokens(i*block_size, (i+1)*block_size)
            hashes.append(prefix_cache.hash_block(hashes[-1] if hashes else seq.cache_salt, tokens))
        return hashes
    monkeypatch.setattr(prefix_cache, "hash_blocks", careless)
    caught()


def change(monkeypatch, name, old, new):
    "Plant a bug in a method of OverlappedLoop."
    import inspect
    import textwrap
    source = textwrap.dedent(inspect.getsource(getattr(OverlappedLoop, name)))
    assert source.count(old) == 1
    space = dict(vars(overlap))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(OverlappedLoop, name, space[name])


@pytest.mark.parametrize("name,old,new", [
    ("launch", "if seq.num_tokens == seq.max_len: seq.output_token_ids.pop()", "pass"),            # goes on beyond its last token
    ("launch", "[-1 - row for row in range(len(seqs))]", "[-1 for seq in seqs]"),                  # everybody gets row 0's token
    ("land", "if seq.finish_reason:", "if False:"),                                                # the wasted token is handed out
    ("land", "seq.output_token_ids[place:place + 1] = [token]", "pass"),                           # the placeholder stays
    ("__call__", "self.land(engine, flight)\n        return", "return"),                           # the flight is forgotten
], ids=["beyond the end", "row 0", "wasted token", "placeholder", "lost flight"])
def test_catches(monkeypatch, name, old, new):
    change(monkeypatch, name, old, new)
    caught()


# ---- with a model

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


class LateRunner:
    "A runner whose steps are computed in a thread of their own, in order."
    def __init__(self, runner):
        self.runner, self.thread = runner, ThreadPoolExecutor(1)
        self.execute, self.kv_cache, self.device = runner.execute, runner.kv_cache, runner.device

    def sample(self, batch, rows):
        names = "params", "seed", "stop_token_ids", "prompt_token_ids"
        rows = [SimpleNamespace(output_token_ids=list(r.output_token_ids), **{n: getattr(r, n) for n in names}) for r in rows]
        future = self.thread.submit(lambda: self.runner.sample(batch, rows).clone())
        handle = SimpleNamespace(is_cuda=False, clone=lambda: handle, tolist=lambda: future.result().tolist())
        return handle


def engines(folder, **options):
    in_turn, ahead = (LLM(folder, overlap=overlap, **options) for overlap in (False, True))
    ahead.runner = LateRunner(ahead.runner)
    return in_turn, ahead


def results(outs):
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason, c.cumulative_logprob) for o in outs for c in o.outputs]


def wishes(rng):
    "Parameters of all kinds; most of them can be overlapped."
    p = dict(temperature=rng.choice([0, .7, 1, 1.3]), seed=rng.randrange(99), max_tokens=rng.randint(1, 25))
    p |= rng.choice([{}, {}, {}, dict(top_k=5), dict(top_p=.8), dict(min_p=.1), dict(min_tokens=1), dict(stop=["a", "he"]),
                     dict(stop_token_ids=list(range(0, 40_000, 3))), dict(n=2, temperature=1), dict(ignore_eos=True)])
    return SamplingParams(**p | rng.choice([{}] * 8 + [dict(repetition_penalty=1.3), dict(logprobs=1)]))


@pytest.mark.parametrize("seed", range(4))
def test_both_loops_give_the_same(folder, seed):
    rng = random.Random(seed)
    in_turn, ahead = engines(folder, num_kv_blocks=40, block_size=4, max_model_len=70, max_num_batched_tokens=40, max_num_seqs=7)
    for _ in range(3):
        prompts = [[rng.randrange(5) + 100 for _ in range(rng.randint(1, 30))] for _ in range(12)]
        params = [wishes(rng) for _ in prompts]
        assert results(ahead.generate(prompts, params, use_tqdm=False)) == results(in_turn.generate(prompts, params, use_tqdm=False))
        assert_idle(ahead)


def test_steps_do_overlap_unless_a_request_needs_its_tokens(folder):
    _, ahead = engines(folder, num_kv_blocks=40)
    def flights(**params):
        request, = ahead.make_requests("A cat", SamplingParams(max_tokens=6, ignore_eos=True, **params))
        ahead.add(request)
        ahead.step()
        seen = [ahead.loop.flight is not None]
        while ahead.requests:
            ahead.step()
            seen.append(ahead.loop.flight is not None)
        return seen
    assert flights() == [True] * 6 + [False]
    assert flights(logprobs=0) == flights(presence_penalty=1) == [False] * 6
    assert flights(top_p=.5, stop="zzz") == [True] * 6 + [False]


def test_streams_and_aborts(folder):
    in_turn, ahead = engines(folder, num_kv_blocks=100)
    params = SamplingParams(temperature=.9, seed=1, max_tokens=30, ignore_eos=True)
    whole = [in_turn.generate(p, params, use_tqdm=False)[0]["token_ids"] for p in ("A cat", "A dog")]
    cat, dog = ahead.stream("A cat", params), ahead.stream("A dog", params)
    kept, lost = [next(cat)], [next(dog) for _ in range(4)]
    ahead.abort(lost[0].request_id)
    lost += dog
    kept += cat
    got = [[t for piece in pieces for t in piece["token_ids"]] for pieces in (kept, lost)]
    assert got[0] == whole[0] and lost[-1]["finish_reason"] == "abort"
    assert 4 <= len(got[1]) < 30 and got[1] == whole[1][:len(got[1])]
    assert_idle(ahead)
    early = ahead.stream("A cow", params)
    next(early)
    early.close()
    assert_idle(ahead)


def test_one_wasted_token_at_most_for_each_ending(folder):
    _, ahead = engines(folder, num_kv_blocks=100)
    computed, sample = [], ahead.runner.sample
    ahead.runner.sample = lambda batch, rows: computed.append(len(rows)) or sample(batch, rows)
    params = SamplingParams(temperature=1, seed=3, max_tokens=40, stop_token_ids=list(range(0, 49_000, 5)), n=8)
    out, = ahead.generate("A cat", params, use_tqdm=False)
    made, ends = sum(len(c.token_ids) for c in out.outputs), sum(c.finish_reason == "stop" for c in out.outputs)
    assert made < sum(computed) <= made + ends


def test_what_is_fetched_does_not_change():
    ids = torch.tensor([1, 2, 3])
    fetch = fetch_later(ids)
    ids.zero_()
    assert fetch() == [1, 2, 3]


def test_the_cache_finds_as_much_as_in_turn(folder):
    "Blocks completed by tokens that came late are found again."
    def cached(engine):
        p = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
        ids = list(range(10))
        first, = engine.generate([ids], p, use_tqdm=False)
        again, = engine.generate([ids + first["token_ids"]], p, use_tqdm=False)
        return again.num_cached_tokens
    in_turn, ahead = engines(folder, num_kv_blocks=60, block_size=4)
    assert cached(in_turn) == cached(ahead) == 28
