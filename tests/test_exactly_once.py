"""Law 11: each token reaches its request exactly once, in order, whatever is interrupted.

Exceptions come at the n-th line of whatever the engine does, for many n, at each call and return of one small scenario, and by real
signals at random moments: in a step, in an abort, between two streams, in both loops. The reader who is interrupted is gone; every
other one gets the very tokens, texts and log-probabilities that it would have got alone, and nothing is left behind."""
import gc
import os
import random
import signal
import sys
import time

import pytest
from fake_engine import Asker, assert_all_free, check_books, expected, fake_engine, some_params
from fuzz import plant
from nano_vllm import SamplingParams, llm
from nano_vllm.engine import Completion, Engine, OutputProcessor
from nano_vllm.kv_blocks import Sequence
from nano_vllm.llm import new_outputs, progress
from nano_vllm.model_runner import InputBatch
from nano_vllm.scheduler import Scheduler

MODULES = {"nano_vllm.engine", "nano_vllm.scheduler", "nano_vllm.prefix_cache", "nano_vllm.kv_blocks",
           "nano_vllm.model_runner", "nano_vllm.llm", "nano_vllm.tokenizer"}
FUZZ = int(os.environ.get("NANO_VLLM_FUZZ", 0))     # for longer: so many runs instead of what a few seconds allow
both_loops = pytest.mark.parametrize("num_in_flight", [1, 2])
# an exception that is thrown while Python closes a generator can reach nobody: Python reports it and goes on
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Injected(BaseException): "What is thrown; no code catches it by name."


class Interrupt:
    "Throws at the `after`-th line that the engine's modules run within the block, once."

    def __init__(self, after): self.after, self.count, self.thrown = after, 0, False

    def trace(self, frame, event, arg):
        if frame.f_globals.get("__name__") not in MODULES: return None
        if event == "line" and not self.thrown:
            self.count += 1
            if self.count >= self.after:
                self.thrown = True
                raise Injected(f"line {frame.f_lineno} of {frame.f_code.co_qualname}")
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_): sys.settrace(self.before)


# ---- who reads

def prompts_of(rng):
    "Prompts that often begin alike."
    base = [rng.randint(1, 3) for _ in range(20)]
    return [base[:rng.randint(1, 20)] + [rng.randint(1, 3) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 3))]


def asker(engine, rng, prompts=None, params=None, streams=None):
    "Somebody who reads a stream, or waits for whole answers."
    prompts = prompts_of(rng) if prompts is None else prompts
    params = [some_params(rng, 0.2) for _ in prompts] if params is None else params
    requests = engine.input_processor.make_requests(prompts, params)
    return Asker(engine, requests, rng.random() < 0.8 if streams is None else streams)


def counted(engine, most=3000):
    "The engine, which refuses to step for ever."
    step, left = engine.step, [most]
    def step_once():
        left[0] -= 1
        assert left[0] > 0, "no end in sight"
        return step()
    engine.step = step_once
    return engine


def random_engine(rng, num_in_flight):
    return counted(fake_engine(num_blocks=rng.choice([22, 30, 60]), block_size=rng.choice([2, 4]), num_in_flight=num_in_flight,
                               max_num_batched_tokens=rng.choice([6, 16, 64]), max_model_len=44 if rng.random() < 0.5 else 36,
                               threshold=rng.choice([0, 0, 5]), window=rng.choice([None, None, 7]), own_tables=rng.random() < 0.5,
                               random=rng))


def finish(engine, askers):
    "All askers to their ends, in turns; they miss nothing."
    for turn in range(20_000):
        open_ones = [a for a in askers if not a.ended]
        if not open_ones: break
        open_ones[turn % len(open_ones)].read()
    else: pytest.fail("no end in sight")
    for a in askers: a.check(interrupted=True)


def assert_nothing_is_left(engine):
    "After what an interrupted abort has left has come to its own end."
    while engine.requests or engine.in_flight or not engine.is_consistent: engine.step()
    check_books(engine)
    assert_all_free(engine)
    assert len(engine.runner.input_batch.seqs) == len(engine.scheduler.removed), "a row without a sequence"


def check_prefix(victim):
    "What the victim had got until it was interrupted is true, too."
    for r, answers in victim.expected.items():
        for e, ids in zip(answers, victim.ids[r]): assert ids == e.token_ids[:len(ids)]


# ---- at lines

def interrupted_run(seed, num_in_flight):
    "Two or three readers, one of whom is interrupted at a random line; the others must not notice. Was there an interrupt?"
    rng = random.Random(seed)
    engine = random_engine(rng, num_in_flight)
    readers = [asker(engine, rng) for _ in range(rng.randint(2, 3))]
    for _ in range(rng.randint(0, 12)): rng.choice(readers).read()
    victim = rng.choice([r for r in readers if not r.ended] or readers)
    others = [r for r in readers if r is not victim]
    interrupt = Interrupt(rng.randint(1, rng.choice([30, 300, 1500])))
    try:
        with interrupt:
            while not interrupt.thrown and not victim.ended:
                chance = rng.random()
                if chance < 0.03: break
                if chance < 0.06: rng.choice(others).abort_one(rng)
                victim.read()
            victim.stream.close()      # a reader who leaves: its requests are aborted, which may be interrupted, too
    except Injected: pass
    victim.stream.close()
    check_prefix(victim)
    finish(engine, [*others, asker(engine, rng)])
    assert_nothing_is_left(engine)
    return interrupt.thrown


def many(run, seeds, num_in_flight):
    "How many of the runs were interrupted; what fails names its seed."
    thrown = 0
    for seed in seeds:
        try: thrown += run(seed, num_in_flight)
        except BaseException as e: raise AssertionError(f"run {seed}: {e!r}") from e
    return thrown


@swallowed
@both_loops
def test_fuzz_an_exception_at_any_line_loses_repeats_or_moves_no_token_of_others(num_in_flight):
    assert many(interrupted_run, range(FUZZ or 400), num_in_flight) > (FUZZ or 400) / 2


# ---- at calls and returns

class AtCall:
    "Throws at the `at`-th call or return of the engine's modules, of Python or of C, once. `left`: those still to come."

    def __init__(self, at, events=("call", "return", "c_call", "c_return")): self.left, self.events = at, events

    def profile(self, frame, event, arg):
        if event not in self.events or frame.f_globals.get("__name__") not in MODULES | {"contextlib"}: return
        self.left -= 1
        if self.left == 0: raise Injected(f"{event} at line {frame.f_lineno} of {frame.f_code.co_qualname}")

    def __enter__(self):
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_): sys.setprofile(None)


def scenario(at, num_in_flight, events):
    """Streams of three samples and of one, one of them aborted by a third reader, who is interrupted at its `at`-th call and leaves.

    Whether there were so many."""
    engine = counted(fake_engine(num_blocks=16, block_size=2, max_num_seqs=4, max_num_batched_tokens=8, num_in_flight=num_in_flight))
    rng = random.Random(1)
    three = asker(engine, rng, [[1, 2, 3]], SamplingParams(n=3, seed=1, max_tokens=4, logprobs=0), True)
    one = asker(engine, rng, [[1, 2, 3, 1], [2]], SamplingParams(seed=5, max_tokens=4, stop=["DB"]), True)
    aborted = asker(engine, rng, [[3]], SamplingParams(seed=2, max_tokens=9, ignore_eos=True), True)
    victim = asker(engine, rng, [[1, 2, 3], [2, 2]], SamplingParams(seed=7, max_tokens=2, ignore_eos=True), True)
    for reader in (three, one, aborted): reader.read()
    try:
        with AtCall(at, events) as place:
            victim.read()
            aborted.abort_one(rng)
            while not victim.ended: victim.read()
    except Injected: pass
    aborted.aborted.update(aborted.requests)
    victim.stream.close()
    check_prefix(victim)
    finish(engine, [three, one, aborted, asker(engine, rng, [[1, 2, 3, 1]], SamplingParams(seed=3, max_tokens=2))])
    assert_nothing_is_left(engine)
    return place.left <= 0


def every(num_in_flight, events, stride=1, first=1):
    "The scenario, interrupted at every `stride`-th event, to its end. How many there are."
    for at in range(first, 10**6, stride):
        try: thrown = scenario(at, num_in_flight, events)
        except BaseException as e: raise AssertionError(f"event {at}: {e!r}") from e
        if not thrown: return at


@swallowed
@both_loops
def test_an_exception_at_each_call_of_a_scenario(num_in_flight):
    assert every(num_in_flight, ["call"]) > 500


@swallowed
@both_loops
def test_an_exception_at_calls_and_returns_of_a_scenario(num_in_flight):
    "All of them take their time: each in `make fuzz`, here every 17th."
    assert every(num_in_flight, ["call", "return", "c_call", "c_return"], 1 if FUZZ else 17) > 2000
