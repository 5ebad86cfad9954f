"""Two steps in flight give what one gives: under fuzz with a fake model, whose answers are known beforehand, and with a real one.
After every step the pool's books are right, every key that is read belongs to its text, and every batch is the oracle's."""
import os
import random
from collections import Counter

import pytest
import torch
from fake_engine import Asker, assert_all_free, check_books, check_cache, fake_engine, some_params
from fuzz import plant
from helpers import assert_idle, logits_tolerance, tiny_folder
from nano_vllm import LLM, SamplingParams, model_runner, prefix_cache, scheduler
from nano_vllm.engine import Engine
from nano_vllm.model_runner import InputBatch, StepHandle, fetch_later
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.scheduler import Scheduler

NUM_WORKLOADS = int(os.environ.get("NANO_VLLM_FUZZ", 200))


# ---- with a fake model

class Watch:
    "Asserts the laws at every step of an engine; `seen` counts what it has met."

    def __init__(self, engine):
        self.engine, self.seen = engine, Counter()
        self.step, self.schedule = engine.step, engine.scheduler.schedule
        engine.step, engine.scheduler.schedule = self.checked_step, self.checked_schedule

    def checked_step(self):
        self.step()
        self.seen["steps"] += 1
        assert self.seen["steps"] < 5000, "law 4: no end in sight"
        assert len(self.engine.in_flight) < self.engine.num_in_flight
        check_books(self.engine)
        can_hash = self.engine.input_processor.enable_prefix_caching and self.seen["steps"] % 4 == 0    # it takes its time
        check_cache(self.engine, prefix_cache.hash_block if can_hash else None)
        for request in self.engine.requests.values():
            for c in request.completions: assert c.num_read == len(c.seq.output_token_ids), "a token was not handed on"

    def checked_schedule(self):
        s = self.engine.scheduler
        residents, before, was_waiting = list(s.running), s.num_preemptions, list(s.waiting)
        output = self.schedule()
        scheduled, working = output.scheduled, {x.seq for x in output.scheduled}
        assert all(x.num_tokens >= 1 for x in scheduled) and len(working) == len(scheduled)
        assert sum(x.num_tokens for x in scheduled) <= s.budget and len(s.running) <= s.max_running
        assert all(x.num_tokens <= s.max_tokens_per_sequence for x in scheduled)
        for x in scheduled: self.check_writes(x)
        for seq in set(s.running) - working:
            assert self.waits(seq) or seq.num_computed_tokens == seq.max_len - 1, "law 5: a resident sequence stalls"
        preempted = s.num_preemptions - before
        assert working <= set(s.running) and (preempted or set(residents) <= set(s.running))
        admitted = {x.seq for x in output.admitted}
        assert admitted == set(s.running) - set(residents) and admitted <= set(was_waiting)
        assert scheduled or self.engine.in_flight or not self.engine.requests, "law 4: nobody moves"
        return output

    def waits(self, seq):
        "Must it sit out a step?"
        return (seq.params.depends_on_output or seq.speculates) and seq.num_output_placeholders or seq.num_output_placeholders > 1

    def check_writes(self, x):
        "What a step may write: slots of its own, of blocks that nobody can find; not its last token's."
        manager, size = self.engine.scheduler.manager, self.engine.scheduler.manager.block_size
        assert x.end <= x.seq.num_computed_tokens and x.end < x.seq.max_len, "a text's last token is computed"
        for place in range(x.start // size, (x.end - 1) // size + 1):
            block = x.seq.block_table[place]
            assert place >= x.seq.num_released_blocks, "a block that was given back is written"
            assert manager.pool.ref_counts[block] == 1, "a shared block is written"
            assert manager.cache.entries[block] is None, "a findable block is written"


class Workload:
    "One random engine and those who ask it, watched."

    watch, scheduler = Watch, Scheduler
    most_guesses = 2, 6

    def __init__(self, seed, num_in_flight):
        rng = self.rng = random.Random(seed)
        self.max_model_len, self.penalties = rng.randint(4, 60), rng.choice([0, 0.3, 0.8])
        self.engine = fake_engine(
            rng.randint(2, rng.choice([12, 30])), rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 6), rng.choice([1, 2, 5, 16, 64]),
            self.max_model_len, rng.choice([None, None, rng.randint(1, 20)]), num_in_flight, rng.choice([0, 0, 0, 1, 3, 10]),
            rng.random() < 0.5, rng.choice([0, 0, *self.most_guesses]), self.scheduler,
            enable_prefix_caching=rng.random() < 0.8, random=rng)
        self.prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 40))] for _ in range(3)]
        self.to_come, self.askers, self.seen = rng.randint(1, 8), [], self.watch(self.engine).seen

    def some_prompt(self):
        base = self.rng.choice(self.prompts)
        return base[:self.rng.randint(1, len(base))] + [self.rng.randint(1, 3) for _ in range(self.rng.randint(0, 3))]

    def arrive(self):
        "Somebody asks for up to three answers, to prompts that often begin as others did."
        self.to_come -= 1
        prompts = [self.some_prompt() for _ in range(self.rng.randint(1, 3))]
        params = [some_params(self.rng, self.penalties) for _ in prompts]
        try: requests = self.engine.input_processor.make_requests(prompts, params)
        except ValueError: self.seen["refused"] += 1
        else: self.askers.append(Asker(self.engine, requests, self.rng.random() < 0.6))

    def run(self):
        rng, gone = self.rng, []
        while self.to_come or not all(a.ended for a in self.askers):
            if self.to_come and rng.random() < 0.5: self.arrive()
            if not (open_ones := [a for a in self.askers if not a.ended]): continue
            asker, chance = rng.choice(open_ones), rng.random()
            if chance < 0.04: asker.abort_one(rng)
            elif chance < 0.06:                          # leaves, perhaps before the first piece
                asker.stream.close()
                self.askers.remove(asker)
                gone.append(asker)
            else: asker.read()
        for asker in self.askers: asker.check()
        self.seen["finished"] = sum(len(a.requests) for a in self.askers)
        assert not self.engine.requests
        while self.engine.in_flight: self.engine.step()
        assert_all_free(self.engine)
        self.seen["preempted"], self.seen["gone"] = self.engine.scheduler.num_preemptions, len(gone)
        self.seen["aborted"] = sum(len(a.aborted) for a in self.askers)
        self.seen["unknown"] = self.engine.runner.num_unknown
        if self.engine.speculator:
            stats = self.engine.speculator.stats
            self.seen["right"], self.seen["guesses"] = stats.num_accepted_tokens, stats.num_draft_tokens
        return self.seen


STRONG_HASH = prefix_cache.hash_block


def run_workload(seed, num_in_flight):
    "Every third one under a hash of only seven values. What it exercised."
    if seed % 3 == 0: prefix_cache.hash_block = lambda parent, tokens: (parent * 31 + sum(tokens)) % 7
    try: return Workload(seed, num_in_flight).run()
    except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
    finally: prefix_cache.hash_block = STRONG_HASH


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_fuzz_of_random_workloads(num_in_flight):
    total = Counter()
    for seed in range(NUM_WORKLOADS): total.update(run_workload(seed, num_in_flight))
    print(dict(total))
    assert total["finished"] > NUM_WORKLOADS * 2 and total["preempted"] > NUM_WORKLOADS / 10
    assert total["refused"] > NUM_WORKLOADS / 50
    assert total["aborted"] > NUM_WORKLOADS / 10 and total["gone"] > NUM_WORKLOADS / 10
    assert 0.3 < total["right"] / total["guesses"] < 0.9 and total["guesses"] > NUM_WORKLOADS
    assert (total["unknown"] > total["steps"] / 5) if num_in_flight == 2 else total["unknown"] == 0


def caught(seeds=150):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        for seed in range(seeds): run_workload(seed, 2)


# The fuzz bites.

def test_catches_a_block_hashed_without_its_last_token(monkeypatch):
    "As if a token that is not known yet could be hashed."
    def careless(seq, block_size):
        hashes = seq.block_hashes
        for i in range(len(hashes), (seq.num_tokens + seq.num_output_placeholders) // block_size):
            tokens = seq.tokens(i*block_size, (i+1)*block_size)
            hashes.append(prefix_cache.hash_block(hashes[-1] if hashes else seq.cache_salt, tokens))
        return hashes
    monkeypatch.setattr(prefix_cache, "hash_blocks", careless)
    caught()


PLANTED = {
    "beyond the end": (scheduler, "num_missing", "min(known, seq.max_len - 1)", "known"),
    "a token for one that has ended": (Scheduler, "update", "if s.seq.finish_reason is None: ", ""),
    "a placeholder that stays": (Scheduler, "update", "num_output_placeholders -= s.samples", "num_output_placeholders -= 0"),
    "no placeholder": (Scheduler, "schedule", "s.seq.num_output_placeholders += s.samples", "pass"),
    "a wasted token is handed out": (Engine, "receive", "if s.seq.finish_reason: continue", "pass"),
    "a step is forgotten": (Engine, "receive", "popleft()", "popleft(); self.in_flight.clear()"),
    "steps are received in the wrong order": (Engine, "receive", "popleft()", "pop()"),
    "a penalty does not wait": (scheduler, "waits_for_token", "seq.params.depends_on_output or ", ""),
    "a placeholder is lost with the blocks": (KVCacheManager, "free", "seq.num_output_placeholders = placeholders", "pass"),
    "blocks of a step in flight are found": (KVCacheManager, "free_behind_window", ", len(seq.cache_entries))", ", 2**62)"),
    "a removed one keeps its row": (InputBatch, "update", "self.remove(seq)", "pass"),
    "nobody is told who is removed": (Scheduler, "schedule", "if output: self.removed.clear()", "self.removed.clear()"),
    "a moved row has the old token": (InputBatch, "remove", "self.device.last_token[row] = self.device.last_token[last]", "pass"),
    "a moved row has the old blocks": (InputBatch, "remove", "self.move_blocks(row, last, num_blocks)",
                                       "self.num_blocks[row] = num_blocks"),
    "a moved row has the old parameters": (InputBatch, "remove", "column[row] = column[last]", "pass"),
    "every token is row 0's": (InputBatch, "token_ids", "self.device.last_token[rows]", "self.device.last_token[rows * 0]"),
    "tokens in the order of rows": (StepHandle, "result", "[tokens[seq] for seq in seqs]", "list(tokens.values())"),
    "new blocks are not sent": (InputBatch, "add_blocks", "self.new_cells += ", "_ = "),
    "moved blocks are not sent": (InputBatch, "move_blocks", "self.new_cells += ", "_ = "),
    "log-probabilities of a wasted token": (Engine, "receive_logprobs", "or s.seq.finish_reason", ""),
}


@pytest.mark.parametrize("owner, name, old, new", PLANTED.values(), ids=PLANTED)
def test_catches(monkeypatch, owner, name, old, new):
    plant(monkeypatch, owner, name, old, new)
    caught()


def crowd():
    "Two that wait for their tokens in every second step, and two long prompts that take the room: a budget of 5 for all."
    engine = fake_engine(60, 4, 6, 5, 60, num_in_flight=2, threshold=3)
    Watch(engine)
    waiting = SamplingParams(max_tokens=30, ignore_eos=True, repetition_penalty=1.1)
    reading = SamplingParams(max_tokens=3, ignore_eos=True)
    for prompts, params in (([[1], [2]], waiting), ([[1] * 20, [2] * 20], reading)):
        for request in engine.input_processor.make_requests(prompts, params): engine.add(request)
        engine.step()
    while engine.requests: engine.step()


def test_each_younger_one_has_a_token_reserved(monkeypatch):
    crowd()
    plant(monkeypatch, Scheduler, "schedule_running", "budget - reserved)", "budget)")
    with pytest.raises(AssertionError, match="law 5"): crowd()


def test_catches_nothing_where_nothing_is_planted(monkeypatch):
    for owner, name in {bug[:2] for bug in PLANTED.values()}: plant(monkeypatch, owner, name, f"def {name}", f"def {name}")
    for seed in range(60): run_workload(seed, 2)


# ---- with a model

@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"))


def engines(folder, **options):
    in_turn, ahead = (LLM(folder, async_scheduling=chosen, **options) for chosen in (False, True))
    assert (in_turn.engine.num_in_flight, ahead.engine.num_in_flight) == (1, 2)
    return in_turn, ahead


def results(outs):
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for o in outs for c in o.outputs]


def logprobs(outs):
    "How likely the answers and the prompts are, flat, and the tokens that were rated."
    rated = [e for o in outs for c in o.outputs for e in c.logprobs or []]
    rated += [e for o in outs for e in (o.prompt_logprobs or [])[1:]]
    return [list(e) for e in rated], torch.tensor([p.logprob for e in rated for p in e.values()])


def wishes(rng):
    "Parameters of all kinds; most of them can be overlapped."
    p = dict(temperature=rng.choice([0, .7, 1, 1.3]), seed=rng.randrange(99), max_tokens=rng.randint(1, 25))
    p |= rng.choice([{}, {}, {}, dict(top_k=5), dict(top_p=.8), dict(min_p=.1), dict(min_tokens=1), dict(stop=["a", "he"]),
                     dict(stop_token_ids=list(range(0, 40_000, 3))), dict(n=2, temperature=1), dict(ignore_eos=True)])
    return SamplingParams(**p | rng.choice([{}] * 7 + [dict(repetition_penalty=1.3), dict(logprobs=1), dict(prompt_logprobs=1)]))


@pytest.mark.parametrize("seed", range(4))
def test_both_loops_give_the_same(folder, seed):
    rng = random.Random(seed)
    in_turn, ahead = engines(folder, num_kv_blocks=40, block_size=4, max_model_len=70, max_num_batched_tokens=40, max_num_seqs=7)
    for _ in range(3):
        prompts = [[rng.randrange(5) + 100 for _ in range(rng.randint(1, 30))] for _ in range(12)]
        params = [wishes(rng) for _ in prompts]
        one, two = (engine.generate(prompts, params, use_tqdm=False) for engine in (in_turn, ahead))
        assert results(one) == results(two)
        (tokens, values), (tokens2, values2) = logprobs(one), logprobs(two)
        assert tokens == tokens2
        # the steps have other companions, so roundings differ: once in the logit, once in the norm
        tolerance = 2 * logits_tolerance(ahead.engine.runner.model.config, 70, values) if len(values) else 0
        torch.testing.assert_close(values, values2, atol=tolerance, rtol=0)
        assert_idle(in_turn)
        while ahead.engine.in_flight: ahead.engine.step()                # a step of texts that have ended
        assert_idle(ahead)


def test_the_loop_is_chosen_by_the_device(folder):
    llm = LLM(folder, num_kv_blocks=40)
    assert llm.engine.num_in_flight == (2 if llm.engine.runner.device.type == "cuda" else 1)


def test_steps_do_overlap_unless_a_request_needs_its_tokens(folder):
    _, ahead = engines(folder, num_kv_blocks=40)
    def in_flight(**params):
        engine = ahead.engine
        request, = engine.input_processor.make_requests("A cat", SamplingParams(max_tokens=6, ignore_eos=True, **params))
        engine.add(request)
        engine.step()
        seen = [len(engine.in_flight)]
        while engine.requests:
            engine.step()
            seen.append(len(engine.in_flight))
        return seen
    assert in_flight() == in_flight(logprobs=0) == in_flight(top_p=.5, stop="zzz") == [1] * 6 + [0]
    assert in_flight(presence_penalty=1) == in_flight(repetition_penalty=2) == [1, 0] * 6


def test_streams_and_aborts(folder):
    in_turn, ahead = engines(folder, num_kv_blocks=100)
    params = SamplingParams(temperature=.9, seed=1, max_tokens=30, ignore_eos=True)
    whole = [in_turn.generate(p, params, use_tqdm=False)[0]["token_ids"] for p in ("A cat", "A dog")]
    cat, dog = ahead.stream("A cat", params), ahead.stream("A dog", params)
    kept, lost = [next(cat)], [next(dog) for _ in range(4)]
    ahead.engine.abort(lost[0].request_id)
    lost += dog
    kept += cat
    got = [[t for piece in pieces for t in piece["token_ids"]] for pieces in (kept, lost)]
    assert got[0] == whole[0] and lost[-1]["finish_reason"] == "abort"
    assert 4 <= len(got[1]) < 30 and got[1] == whole[1][:len(got[1])]
    assert_idle(ahead)
    early = ahead.stream("A cow", params)
    next(early)
    early.close()
    while ahead.engine.in_flight: ahead.engine.step()
    assert_idle(ahead)


def test_one_wasted_token_at_most_for_each_ending(folder):
    _, ahead = engines(folder, num_kv_blocks=100)
    computed, execute = [], ahead.engine.runner.execute
    ahead.engine.runner.execute = lambda output: computed.append(len(output.sampled)) or execute(output)
    params = SamplingParams(temperature=1, seed=3, max_tokens=40, stop_token_ids=list(range(0, 49_000, 5)), n=8)
    out, = ahead.generate("A cat", params, use_tqdm=False)
    made, ends = sum(len(c.token_ids) for c in out.outputs), sum(c.finish_reason == "stop" for c in out.outputs)
    assert made < sum(computed) <= made + ends


def test_what_is_fetched_does_not_change():
    ids = torch.tensor([1, 2, 3])
    fetch = fetch_later(ids)
    ids.zero_()
    assert fetch() == [1, 2, 3]


def test_pinned_memory_is_made_once(monkeypatch):
    "Each copy has its own while it is under way, and the next one gets it; a larger one is made when it is needed. As on a GPU, by stand-ins."
    class Event:
        def record(self, stream): pass
        def synchronize(self): pass
    empty, made = torch.empty, []
    def pinned(n, dtype, pin_memory):
        made.append(n)
        return empty(n, dtype=dtype)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(model_runner, "BUFFERS", model_runner.PinnedBuffers())
    ids = torch.arange(6)
    for step in range(5):
        one, two = fetch_later(ids + step), fetch_later((ids - step).view(2, 3))     # two in flight
        assert (one(), two()) == ([i + step for i in range(6)], [[-step, 1 - step, 2 - step], [3 - step, 4 - step, 5 - step]])
    assert made == [1024, 1024]
    assert fetch_later(torch.arange(3000))() == list(range(3000)) and made[2:] == [3000]
    assert fetch_later(torch.ones(2))() == [1., 1.] and fetch_later(ids)() == ids.tolist()


def test_the_cache_finds_as_much_as_in_turn(folder):
    "Blocks completed by tokens that came late are found again."
    def cached(llm):
        p = SamplingParams(temperature=0, max_tokens=21, ignore_eos=True)
        ids = list(range(10))
        first, = llm.generate([ids], p, use_tqdm=False)
        again, = llm.generate([ids + first["token_ids"]], p, use_tqdm=False)
        return again.num_cached_tokens
    in_turn, ahead = engines(folder, num_kv_blocks=60, block_size=4)
    assert cached(in_turn) == cached(ahead) == 28
