"""Guessing ahead changes how soon a token comes, and never which: with a model, in both loops, in small pools; and the draws are the target's.

(With random workloads and a fake model: test_fuzz, test_overlap and test_exactly_once, whose engines guess, too.)"""
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import plant
from helpers import assert_idle, logits_tolerance, tiny_folder
from nano_vllm import LLM, SamplingParams, speculative
from nano_vllm.engine_args import EngineArgs, make_engine
from nano_vllm.kv_blocks import Sequence
from nano_vllm.model_runner import InputBatch, StepHandle
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.scheduler import Scheduler
from nano_vllm.speculative import (FREE_ROWS, PRIOR, DraftModel, NgramGuesser, NgramIndex, SpecDecodingStats, Speculator, StepPrices,
                                   learn, measure_prices, plan_guesses, twin)

REFERENCE = json.loads((Path(__file__).parent/"data/greedy_reference.json").read_text())
METHODS = {"ngram": dict(method="ngram", prompt_lookup_max=4, prompt_lookup_min=1), "self": dict(method="self"),
           "draft_model": dict(method="draft_model", model="smollm2-135m")}


def eager_to_guess(llm):
    "The LLM, which believes that guesses and rows cost nothing: it guesses whatever it gains."
    speculator = llm.engine.speculator
    speculator.prices = FREE_ROWS
    speculator.guesser.seconds = lambda num_seqs: (0., 0.)
    return llm


# ---- greedy, with the demo model

def check_greedy(method, num_prompts, num_tokens, async_scheduling=False):
    "Answers to the shortest so many of the 32 prompts are the reference's, in a pool that is too small for them."
    chosen = sorted(REFERENCE, key=lambda r: len(r["prompt_token_ids"]))[:num_prompts]
    longest = len(chosen[-1]["prompt_token_ids"]) + num_tokens
    llm = eager_to_guess(LLM("smollm2-135m", dtype="float32", device="cpu", max_model_len=2048, block_size=4,
                             num_kv_blocks=longest // 4 + 20, max_num_seqs=12, max_num_batched_tokens=512,
                             async_scheduling=async_scheduling, speculative_config=METHODS[method] | dict(num_speculative_tokens=5)))
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outs = llm.generate([r["prompt_token_ids"] for r in chosen], params, use_tqdm=False)
    assert [o["token_ids"] for o in outs] == [r["token_ids"][:num_tokens] for r in chosen]
    stats = llm.engine.speculator.stats
    print(stats, llm.engine.scheduler.num_preemptions)
    assert llm.engine.scheduler.num_preemptions > 0 and stats.num_accepted_tokens > num_tokens
    while llm.engine.in_flight: llm.engine.step()
    assert_idle(llm)


def test_greedy_answers_are_the_same():
    check_greedy("ngram", 20, 32)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_greedy_answers_are_the_same_by_all_methods(method, async_scheduling):
    check_greedy(method, 32, 64, async_scheduling)


# ---- all parameters, with a small model

class Hints:
    "Guesses what somebody else has said, now and then with another token."

    def __init__(self, answers, seed=0): self.answers, self.rng = answers, random.Random(seed)

    def guess(self, seqs, lengths):
        found = []
        for seq, n in zip(seqs, lengths):
            ids = self.answers[tuple(seq.prompt_token_ids), seq.params.seed, seq.index]
            known = len(seq.output_token_ids)
            found.append([t if self.rng.random() < 0.8 else 7 for t in ids[known:known + self.rng.randint(0, n)]])
        return found

    def seconds(self, num_seqs): return 0., 0.


def wishes(rng):
    p = dict(temperature=rng.choice([0, .7, 1, 1.3]), seed=rng.randrange(10**6), max_tokens=rng.randint(1, 25))
    p |= rng.choice([{}, {}, {}, dict(top_k=5), dict(top_p=.8), dict(min_p=.1), dict(min_tokens=1), dict(stop=["a", "he"]),
                     dict(stop_token_ids=list(range(0, 40_000, 3))), dict(n=2, temperature=1), dict(ignore_eos=True)])
    p |= rng.choice([{}, {}, dict(repetition_penalty=1.3), dict(presence_penalty=1.5, frequency_penalty=.5), dict(speculative=False)])
    return SamplingParams(**p | rng.choice([{}] * 4 + [dict(logprobs=1), dict(prompt_logprobs=1)]))


def results(outs): return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for o in outs for c in o.outputs]


def rated(outs):
    found = [e for o in outs for c in o.outputs for e in c.logprobs or []] + [e for o in outs for e in (o.prompt_logprobs or [])[1:]]
    return [list(e) for e in found], torch.tensor([p.logprob for e in found for p in e.values()])


def small_options(**options):
    return dict(num_kv_blocks=40, block_size=4, max_model_len=70, max_num_batched_tokens=40, max_num_seqs=7) | options


def with_hints(folder, plain, prompts, params, **options):
    "An LLM that guesses what the LLM `plain` says, and what that says."
    outs = plain.generate(prompts, params, use_tqdm=False)
    llm = LLM(folder, speculative_config=dict(method="ngram", num_speculative_tokens=4), **small_options(**options))
    answers = {(tuple(o.prompt_token_ids), p.seed, c.index): c.token_ids for o, p in zip(outs, params) for c in o.outputs}
    llm.engine.speculator.guesser, llm.engine.speculator.prices = Hints(answers), FREE_ROWS
    return llm, outs


@pytest.fixture(scope="module")
def plain(tiny): return LLM(tiny, **small_options())


@pytest.mark.parametrize("num_in_flight", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_are_those_without_guesses(tiny, plain, seed, num_in_flight):
    rng = random.Random(seed)
    prompts = [[rng.randrange(5) + 100 for _ in range(rng.randint(1, 30))] for _ in range(24)]
    params = [wishes(rng) for _ in prompts]
    llm, expected = with_hints(tiny, plain, prompts, params, async_scheduling=num_in_flight == 2)
    outs = llm.generate(prompts, params, use_tqdm=False)
    assert results(outs) == results(expected)
    (tokens, values), (tokens2, values2) = rated(outs), rated(expected)
    assert tokens == tokens2
    if len(values):
        tolerance = 2 * logits_tolerance(llm.engine.runner.model.config, 70, values)
        torch.testing.assert_close(values, values2, atol=tolerance, rtol=0)
    print(llm.engine.scheduler.num_preemptions, llm.engine.speculator.stats)
    stats = llm.engine.speculator.stats
    assert 5 < stats.num_accepted_tokens < stats.num_draft_tokens
    while llm.engine.in_flight: llm.engine.step()
    assert_idle(llm)


def test_streams_join_and_other_requests_do_not_guess(tiny, plain):
    params = [SamplingParams(temperature=1, seed=3, max_tokens=20, ignore_eos=True, speculative=speculative) for speculative in (True, False)]
    for p in params:
        llm, expected = with_hints(tiny, plain, [[100, 101]], [p])
        pieces = [o["token_ids"] for o in llm.stream([[100, 101]], p)]
        assert sum(pieces, []) == expected[0]["token_ids"]
        assert (max(map(len, pieces)) > 1) == p.speculative == (llm.engine.speculator.stats.num_drafts > 0)


def test_on_two_ranks(tiny, plain):
    params = [SamplingParams(temperature=.8, seed=i, max_tokens=12, ignore_eos=True) for i in range(3)]
    prompts = [[100 + i, 5] for i in range(3)]
    llm, expected = with_hints(tiny, plain, prompts, params, tensor_parallel_size=2, device="cpu")
    assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
    assert llm.engine.speculator.prices is FREE_ROWS and llm.engine.speculator.stats.num_accepted_tokens > 5


def test_steps_without_guesses_are_recorded_ones(tiny, plain, monkeypatch):
    "Steps with guesses are eager, the others replayed, and each begins where the last one ended, of either kind."
    pytest.importorskip("triton")
    from test_graphs import StandIn, own_tables
    from nano_vllm.cuda_graphs import make_graphs
    params = [SamplingParams(temperature=.9, seed=i, max_tokens=10, ignore_eos=True) for i in range(2)]
    prompts = [[100 + i, 5, 6] for i in range(2)]
    llm, expected = with_hints(tiny, plain, prompts, params, ops="torch", attention_backend="triton", max_num_seqs=2)
    runner, recorder = own_tables(llm.engine.runner), StandIn()
    runner.graphs = make_graphs(runner, 70, recorder)
    hints = llm.engine.speculator.guesser.guess
    turns = iter([0, 1] * 100)
    llm.engine.speculator.guesser.guess = lambda seqs, lengths: hints(seqs, lengths) if next(turns) else [[] for _ in seqs]
    assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
    assert recorder.replayed and llm.engine.speculator.stats.num_accepted_tokens > 3


# ---- the draws are the target's

V = 8
FILTERS = {"temperature": dict(temperature=.7), "top_k": dict(top_k=3, temperature=2), "top_p": dict(top_p=.8, temperature=2), "min_p": dict(min_p=.3, temperature=2),
           "penalties": dict(repetition_penalty=1.5, presence_penalty=.5, frequency_penalty=.3), "plain": {},
           "all": dict(temperature=1.3, top_k=6, top_p=.9, min_p=.05, presence_penalty=-.5)}


def distribution(logits, p, prompt, output):
    "What a token is drawn from, float64 (V,), by the definitions of its parameters and nothing of the engine's."
    x = np.array(logits, np.float64)
    for t in range(V):
        if t in prompt + output: x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * output.count(t) + p.presence_penalty * (t in output)
    x = np.exp((x - x.max()) / p.temperature)
    x /= x.sum()
    x[x < p.min_p * x.max()] = 0
    if p.top_k: x[x < np.sort(x)[-p.top_k]] = 0
    x /= x.sum()
    order = np.argsort(-x)
    x[order[1:][np.cumsum(x[order])[:-1] >= p.top_p]] = 0
    return x / x.sum()


def run_engine(runner, scheduler, speculator, seqs):
    "All of `seqs` to their ends, without the text."
    for seq in seqs: scheduler.add(seq)
    while scheduler.waiting or scheduler.running:
        speculator.propose(scheduler.running)
        output = scheduler.schedule()
        result = runner.execute(output).result()
        scheduler.update(output, result.token_ids, result.accepted)
        speculator.observe(output, result.accepted)
        for s in output.sampled:
            if s.seq.num_tokens == s.seq.max_len: scheduler.finish(s.seq, "length")


class Fixed:
    "Guesses the same token for everyone."
    def __init__(self, token=3): self.token = token
    def guess(self, seqs, lengths): return [[self.token] * min(n, 1) for n in lengths]
    def seconds(self, num_seqs): return 0., 0.


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    "The parts of an engine around a model of eight tokens, and its logits after the prompt and each pair of tokens."
    folder = tiny_folder(tmp_path_factory.mktemp("letters"), tokenizer=False, vocab_size=V)
    args = EngineArgs(folder, device="cpu", num_kv_blocks=9000, block_size=4, max_num_seqs=2048, max_model_len=32)
    from nano_vllm.engine_args import make_runner, make_scheduler, resolve_args
    from nano_vllm.layers import TensorParallelGroup
    config = resolve_args(args)
    runner, scheduler = make_runner(config, TensorParallelGroup()), make_scheduler(config, 9000)
    logits = {}
    import transformers
    hf = transformers.LlamaForCausalLM.from_pretrained(folder).double().eval()
    texts = [[1, 2, 6, a, b] for a in range(V) for b in range(V)]
    with torch.inference_mode(): found = hf(torch.tensor(texts)).logits.numpy()
    for text, x in zip(texts, found):
        for n in (3, 4, 5): logits[tuple(text[3:n])] = x[n - 1]
    return runner, scheduler, logits


def chi_square_p(observed, expected):
    "How likely counts at least so far from `expected` are by chance; cells that expect fewer than 5 are joined."
    small = expected < 5
    o, e = np.append(observed[~small], observed[small].sum()), np.append(expected[~small], expected[small].sum())
    o, e = o[e > 0], e[e > 0]
    half = torch.tensor([(len(e) - 1) / 2, ((o - e)**2 / e).sum() / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


def draws(letters, params, num, guesser=Fixed()):
    "Counts (V, V, V) of the first three tokens of `num` sequences, and what became of the guesses."
    runner, scheduler, _ = letters
    scheduler.reset([])
    runner.clear()
    speculator = Speculator(guesser, 2, 10**6, StepPrices([2, 4], [1, 1], 1))
    counts = np.zeros((V, V, V))
    for first in range(0, num, 2048):
        seqs = [Sequence(str(i), [1, 2, 6], params, seed=i, max_len=6) for i in range(first, min(first + 2048, num))]
        run_engine(runner, scheduler, speculator, seqs)
        for seq in seqs: counts[tuple(seq.output_token_ids)] += 1
    return counts, speculator.stats


@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_targets_distribution(letters, name, num=20_480):
    params = SamplingParams(max_tokens=3, **FILTERS[name])
    exact = np.zeros((V, V, V))
    def then(*output): return distribution(letters[2][output], params, [1, 2, 6], list(output))
    for a in range(V):
        for b in range(V): exact[a, b] = then()[a] * then(a)[b] * then(a, b)
    likely = int(exact.sum((0, 2)).argmax())
    counts, stats = draws(letters, params, num, Fixed(likely))
    assert counts[exact == 0].sum() == 0 and stats.num_drafts == num
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, "no guess was right, or none wrong"
    # a guess is right as often as the target says it (which is what rejection sampling accepts)
    rate = exact.sum((0, 2))[likely]
    assert abs(stats.acceptance_rates[0] - rate) < 5 * math.sqrt(rate * (1 - rate) / num) + 1e-12
    assert chi_square_p(counts, num * exact) > 1e-3


def test_the_test_of_draws_bites(letters, monkeypatch):
    "A verifier that favours guesses is found out by the same draws; so is one that gives all rows the same noise."
    params = SamplingParams(max_tokens=3)
    exact = np.zeros((V, V, V))
    def then(*output): return distribution(letters[2][output], params, [1, 2, 6], list(output))
    for a in range(V):
        for b in range(V): exact[a, b] = then()[a] * then(a)[b] * then(a, b)
    for owner, name, old, new in ((StepHandle, "check_guesses", "if guess != tokens[s.seq]: break", "if guess != tokens[s.seq] and tokens[s.seq] > 1: break"),
                                  (InputBatch, "sampling_inputs", "torch.from_numpy(counts)", "torch.from_numpy(counts * 0)")):
        with monkeypatch.context() as m:
            plant(m, owner, name, old, new)
            counts, _ = draws(letters, params, 20_480)
        assert chi_square_p(counts, 20_480 * exact) < 1e-3, name


# ---- who guesses, and how much

def test_rows_are_free_until_the_corner():
    prices = StepPrices([2, 32, 64], [1, 1, 2], plain=1)
    def plan(num, chance, most=5): return plan_guesses([chance] * num, [most] * num, prices, 1000)
    assert plan(1, .9) == plan(1, .1) == [5] and plan(1, 0.) == [0]
    assert plan(4, .6) == [5] * 4
    assert sum(plan(8, .6)) == 32 - 8 and plan(8, .6)[-1] < 5       # to the corner, and no further
    assert plan(32, .9) == [0] * 32 and plan(100, .99) == [0] * 100
    assert plan_guesses([.9, .9], [0, 3], prices, 1000) == [0, 3]
    assert sum(plan_guesses([.9, .9], [5, 5], prices, 6)) == 4      # no more rows than there is room for


def test_a_guess_must_be_worth_its_price():
    "Against all plans there are, for one sequence: none brings more tokens a second."
    for slope in (.01, .05, .1, .3, .6, 1.1):
        for chance in (.05, .3, .6, .9, .99):
            for extra, cost in ((0, (0, 0)), (.2, (0, 0)), (0, (.3, .2)), (.05, (.1, .02))):
                prices = StepPrices([2, 32], [1 + extra, 1 + extra + 30 * slope], plain=1)
                def rate(k):
                    return sum(chance**i for i in range(k + 1)) / (prices.with_guesses(1 + k) + cost[0] + k * cost[1]) if k else 1 / prices.without(1)
                found, = plan_guesses([chance], [12], prices, 1000, cost)
                assert rate(found) >= max(map(rate, range(13))) - 1e-9, (slope, chance, extra, cost, found)


def test_prices_lie_on_lines_and_never_fall():
    prices = StepPrices([2, 8, 32], [2, 1.5, 4], plain=1.5)
    assert prices.without(1) == 1.5 and [prices.with_guesses(n) for n in (1, 2, 5, 8, 20, 32, 56)] == [2, 2, 2, 2, 3, 4, 6]
    assert StepPrices([2, 8], [1, 1], plain=3).extra == 0


def test_what_is_measured(tiny):
    llm = LLM(tiny, num_kv_blocks=8, block_size=4, max_model_len=24, max_num_seqs=5)
    for most in (1, 2, 6, 1000):
        prices = measure_prices(llm.engine.runner, most)
        assert prices.without(1) > 0 and prices.with_guesses(6) >= prices.with_guesses(2) >= prices.without(1)
    assert not llm.engine.runner.input_batch.seqs


def test_chances():
    assert learn(.5, 3, 3) > learn(.5, 1, 1) > .5 > learn(.5, 1, 0) and learn(.5, 5, 0) == learn(.5, 1, 0)
    speculator = Speculator(NgramGuesser(2, 1), 4, 100, StepPrices([2, 4], [10, 20], 1))    # guesses never pay
    seq = Sequence("a", [1, 2, 1], SamplingParams(max_tokens=9), max_len=12, num_computed_tokens=2)
    speculator.chances[seq] = .1
    for _ in range(300): speculator.propose({seq: None})
    assert seq.spec_token_ids == [] and not seq.speculates and abs(speculator.chances[seq] - PRIOR) < .01
    speculator.prices = FREE_ROWS
    speculator.propose({seq: None})
    assert seq.spec_token_ids == [2, 1, 2, 1]
    seq.output_token_ids = [5] * 6                      # three more may come; the last of them needs no guess
    seq.num_computed_tokens = 8
    speculator.propose({seq: None})
    assert len(seq.spec_token_ids) == 2
    seq.num_output_placeholders = 1                     # the newest is not known yet: it waits for it
    speculator.propose({seq: None})
    assert seq.spec_token_ids == [] and seq.speculates


def test_guesses_leave_a_block_to_each():
    "They take no block that another needs for its next token, and none that they do not use."
    manager = KVCacheManager(6, 2)
    scheduler = Scheduler(manager, 4, 64)
    seqs = [Sequence(name, [1 + i, 2, 3], SamplingParams(), max_len=20) for i, name in enumerate("ab")]
    for seq in seqs: scheduler.add(seq)
    scheduler.update(scheduler.schedule(), [4, 4])                       # four tokens each, in two blocks
    for seq in seqs: seq.speculates, seq.spec_token_ids = True, [5, 6]
    output = scheduler.schedule()
    assert [s.spec_token_ids for s in output.scheduled] == [(), ()] and len(manager.pool.free_blocks) == 2
    scheduler.update(output, [5, 5])
    manager.pool.free_blocks[99] = None                                  # as if there were one more
    for seq in seqs: seq.spec_token_ids = [6]
    assert [s.num_tokens for s in scheduler.schedule().scheduled] == [2, 2]


def test_no_sequence_is_preempted_for_guesses():
    def preemptions(guesses):
        from fake_engine import fake_engine
        engine = fake_engine(num_blocks=14, block_size=2, max_num_seqs=4, guesses=guesses)
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1)
        for request in engine.input_processor.make_requests([[1, 2], [2, 3], [3, 1], [1, 1]], params): engine.add(request)
        while engine.requests: engine.step()
        return engine.scheduler.num_preemptions
    assert preemptions(3) == preemptions(0) == 0


# ---- how they are made

def test_ngrams():
    def text(ids): return Sequence("a", ids, SamplingParams())
    def guess(ids, n, sizes=range(3, 0, -1)):
        index = NgramIndex(sizes)
        index.read(text(ids))
        return index.guess(text(ids), n)
    assert guess([1, 2, 3, 9, 1, 2], 3) == [3, 9, 1]
    assert guess([1, 2, 3, 4, 1, 2, 5, 1, 2], 1) == [5]              # the last place
    assert guess([7, 1, 2, 3, 4, 8, 2, 5, 7, 1, 2], 1) == [3]        # the longest run
    assert guess([1, 2, 3], 2) == [] and guess([4], 2) == []
    assert guess([4, 4], 3) == [4, 4, 4] and guess([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert guess([1, 2, 3, 1], 2, range(3, 1, -1)) == []


def test_ngrams_are_those_of_a_slow_search():
    def slow(ids, n, longest, shortest):
        for size in range(longest, shortest - 1, -1):
            for start in range(len(ids) - 1, size - 1, -1):
                if size < len(ids) and ids[start - size:start] == ids[-size:]:
                    return [ids[start + i % (len(ids) - start)] for i in range(n)]
        return []
    rng = random.Random(0)
    for _ in range(60):
        longest, shortest = sorted((rng.randint(1, 5), rng.randint(1, 5)), reverse=True)
        guesser = NgramGuesser(longest, shortest)
        seq = Sequence("a", [rng.randrange(3) for _ in range(rng.randint(1, 12))], SamplingParams())
        for _ in range(25):
            assert guesser.guess([seq], [4]) == [slow(seq.tokens(0, seq.num_tokens), 4, longest, shortest)]
            seq.output_token_ids += [rng.randrange(3) for _ in range(rng.randint(1, 3))]


def test_a_draft_model_says_what_the_model_says(tiny, plain):
    "The same weights and the same noise: every guess is right, at any temperature, with penalties, after an interrupt."
    rng = random.Random(5)
    prompts = [[rng.randrange(5) + 100 for _ in range(rng.randint(1, 20))] for _ in range(10)]
    params = [wishes(rng) for _ in prompts]
    expected = plain.generate(prompts, params, use_tqdm=False)
    llm = eager_to_guess(LLM(tiny, speculative_config=dict(method="draft_model", model=str(tiny), num_speculative_tokens=3), **small_options()))
    assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
    stats, draft = llm.engine.speculator.stats, llm.engine.speculator.guesser
    assert stats.num_draft_tokens > 20 and stats.num_accepted_tokens > .97 * stats.num_draft_tokens
    pool = draft.scheduler.manager.pool
    assert len(pool.free_blocks) == pool.num_blocks and not draft.scheduler.running
    execute, calls = draft.runner.execute, []
    def fail(output):
        calls.append(output)
        if len(calls) == 7: raise ZeroDivisionError
        return execute(output)
    draft.runner.execute = fail
    with pytest.raises(ZeroDivisionError): llm.generate(prompts, params, use_tqdm=False)
    assert results(llm.generate(prompts, params, use_tqdm=False)) == results(expected)
    assert len(pool.num_blocks * [0]) == len(draft.scheduler.manager.pool.free_blocks)
    assert_idle(llm)


def test_a_text_too_long_for_the_draft_model_gets_no_guess(tiny, tmp_path):
    short = tiny_folder(tmp_path, max_position_embeddings=16)
    llm = eager_to_guess(LLM(tiny, speculative_config=dict(method="draft_model", model=str(short), num_speculative_tokens=3), **small_options()))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    out, = llm.generate([[100] * 10], params, use_tqdm=False)
    drafts = llm.engine.speculator.stats.num_drafts
    assert len(out["token_ids"]) == 40 and 0 < drafts <= 5


def test_a_text_for_which_the_draft_model_lacks_blocks_gets_no_guess(tiny, tmp_path):
    "A draft with windows holds several blocks for each part of a text: 20 tokens fit into 40 blocks here, and 60 do not."
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(vocab_size=49152, hidden_size=32, intermediate_size=48, head_dim=16, num_hidden_layers=6, num_attention_heads=2,
                                           num_key_value_heads=1, sliding_window=64, max_position_embeddings=512)
    transformers.Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    llm = eager_to_guess(LLM(tiny, speculative_config=dict(method="draft_model", model=str(tmp_path), num_speculative_tokens=3), **small_options()))
    params, stats = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), llm.engine.speculator.stats
    for length, guesses in ((60, False), (10, True)):
        out, = llm.generate([[100] * length], params, use_tqdm=False)
        assert len(out["token_ids"]) == 4 and (stats.num_drafts > 0) == guesses
    assert_idle(llm)


def test_a_draft_model_has_no_room_for_adapters(tiny):
    llm = LLM(tiny, enable_lora=True, speculative_config=dict(method="self", num_speculative_tokens=2), **small_options())
    assert llm.engine.runner.adapters and llm.engine.speculator.guesser.runner.adapters is None


def test_a_twin_has_the_noise_of_its_sequence():
    seq = Sequence("a", [1, 2], SamplingParams(logprobs=2, temperature=.5), seed=7, output_token_ids=[3], stop_token_ids=frozenset([4]))
    other = twin(seq, 3)
    assert (other.seed, other.max_len, other.params.logprobs, other.params.temperature) == (7, 6, None, .5)
    other.output_token_ids.append(9)
    assert seq.output_token_ids == [3] and other.stop_token_ids == {4}


# ---- what is told, and what is refused

def test_statistics():
    stats = SpecDecodingStats(3)
    assert stats.mean_acceptance_length == 1 and stats.acceptance_rates == [0, 0, 0]
    for guesses, right in ((3, 3), (3, 1), (2, 0), (1, 1)): stats.observe(guesses, right)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 9, 5)
    assert stats.num_accepted_tokens_per_pos == [3, 1, 1] and stats.acceptance_rates == [.75, .25, .25]
    assert stats.mean_acceptance_length == 2.25


@pytest.mark.parametrize("config, says", [
    ("ngram", "speculative_config"), ({}, "speculative_config"), (dict(method="tea"), "tea"), (dict(method=["ngram"]), "speculative_config"),
    (dict(method="ngram"), "num_speculative_tokens"), (dict(method="ngram", num_speculative_tokens=0), "from 1 to 64, got 0"),
    (dict(method="ngram", num_speculative_tokens=2.5), "num_speculative_tokens"),
    (dict(method="ngram", num_speculative_tokens=2, model="x"), "'model'"),
    (dict(method="ngram", num_speculative_tokens=2, prompt_lookup_min=3, prompt_lookup_max=2), "prompt_lookup_min must be at most"),
    (dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=0), "prompt_lookup_max must be an integer from 1 to 64, got 0"),
    (dict(method="ngram", num_speculative_tokens=2, prompt_lookup_min=65), "prompt_lookup_min must be an integer from 1 to 64, got 65"),
    (dict(method="draft_model", num_speculative_tokens=2), "model must be given"),
    (dict(method="draft_model", num_speculative_tokens=2, model="no/such"), "speculative_config"),
    (dict(method="self", num_speculative_tokens=2, prompt_lookup_max=2), "prompt_lookup_max"),
])
def test_bad_configs_are_refused(tiny, config, says):
    with pytest.raises(ValueError, match="speculative_config") as e: LLM(tiny, speculative_config=config, num_kv_blocks=10)
    assert says in str(e.value)


def test_what_cannot_be_a_draft_model(tiny, tmp_path):
    other = tiny_folder(tmp_path, tokenizer=False, vocab_size=100)
    with pytest.raises(ValueError, match="vocabulary of 100"):
        LLM(tiny, num_kv_blocks=10, speculative_config=dict(method="draft_model", model=str(other), num_speculative_tokens=2))
    with pytest.raises(ValueError, match="'self' needs quantization=None"):
        LLM(tiny, num_kv_blocks=10, quantization="int8", speculative_config=dict(method="self", num_speculative_tokens=2))


def test_a_request_that_does_not_say(): assert SamplingParams().speculative is True
