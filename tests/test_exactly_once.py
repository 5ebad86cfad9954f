"""Law 11: each token reaches its request exactly once, in order, whatever is interrupted.

Exceptions come at the n-th line of whatever the engine does, for many n, at each call and return of one small scenario, and by
real signals at random moments: in a step, in an abort, between two streams, in both loops. The reader who is interrupted is gone;
every other one gets the very tokens, texts and log-probabilities that it would have got alone, and nothing is left behind."""
import gc
import os
import random
import signal
import sys
import time

import pytest
from fake_engine import Asker, assert_all_free, check_books, expected_prompt_logprobs, fake_engine, some_params
from fuzz import plant
from nano_vllm import SamplingParams, llm
from nano_vllm.engine import Engine
from nano_vllm.request import Completion, OutputProcessor
from nano_vllm.kv_blocks import Sequence
from nano_vllm.llm import new_outputs, progress
from nano_vllm.model_runner import InputBatch
from nano_vllm.sampling_params import RequestOutputKind
from nano_vllm.scheduler import Scheduler

MODULES = {"nano_vllm.request", "nano_vllm.engine", "nano_vllm.scheduler", "nano_vllm.prefix_cache", "nano_vllm.kv_blocks",
           "nano_vllm.model_runner", "nano_vllm.llm", "nano_vllm.tokenizer", "nano_vllm.speculative"}
FUZZ = int(os.environ.get("NANO_VLLM_FUZZ", 0))     # for longer: so many runs instead of what a few seconds allow
both_loops = pytest.mark.parametrize("num_in_flight", [1, 2])
# an exception that is thrown while Python closes a generator can reach nobody: Python reports it and goes on
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Injected(BaseException): "What is thrown; no code catches it by name."


class Interrupt:
    "Throws at the `after`-th line that the engine's modules run within the block, once."

    def __init__(self, after): self.after, self.count, self.thrown = after, 0, False

    def watches(self, frame): return frame.f_globals.get("__name__") in MODULES

    def trace(self, frame, event, arg):
        if not self.watches(frame): return None
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
                               threshold=rng.choice([0, 0, 5]), guesses=rng.choice([0, 0, 3]), window=rng.choice([None, None, 7]), own_tables=rng.random() < 0.5,
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


@pytest.mark.ci
@swallowed
@both_loops
def test_fuzz_an_exception_at_any_line_loses_repeats_or_moves_no_token_of_others(num_in_flight):
    assert many(interrupted_run, range(FUZZ or 300), num_in_flight) > (FUZZ or 300) / 2


# ---- at calls and returns

EDGES = "return", "c_call", "c_return"
ALL_EVENTS = "call", *EDGES
# where tokens are turned into text and handed on, which leaves a request between two states
DELICATE = {"receive", "receive_logprobs", "keep_logprobs", "update", "process", "read_token", "add", "finish"}


class AtCall:
    """Throws at the `at`-th event of the engine's modules, once: calls and returns, of Python or C; `functions`: of these alone.

    `left`: how many are still to come."""

    def __init__(self, at, events=ALL_EVENTS, functions=None): self.left, self.events, self.functions = at, events, functions

    def profile(self, frame, event, arg):
        if event not in self.events or frame.f_globals.get("__name__") not in MODULES | {"contextlib"}: return
        if self.functions and frame.f_code.co_name not in self.functions: return
        self.left -= 1
        if self.left == 0: raise Injected(f"{event} at line {frame.f_lineno} of {frame.f_code.co_qualname}")

    def __enter__(self):
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_): sys.setprofile(None)


def scenario(at, num_in_flight, *where):
    """Streams of three samples, of two requests and of one, which is aborted by a fourth reader, who is interrupted and leaves.

    One more waits for a whole answer. Were there `at` events, so that there was an interrupt?"""
    engine = counted(fake_engine(num_blocks=24, block_size=2, max_num_seqs=9, max_num_batched_tokens=10,
                                 num_in_flight=num_in_flight))
    rng = random.Random(1)
    three = asker(engine, rng, [[1, 2, 3]], SamplingParams(n=3, seed=1, max_tokens=4, logprobs=0), True)
    two = asker(engine, rng, [[1, 2, 3, 1], [2]], SamplingParams(seed=5, max_tokens=4, stop=["DB"]), True)
    aborted = asker(engine, rng, [[3]], SamplingParams(seed=2, max_tokens=9, ignore_eos=True), True)
    victim = asker(engine, rng, [[1, 2, 3], [2, 2]], SamplingParams(seed=7, max_tokens=3, ignore_eos=True), True)
    whole, news = asker(engine, rng, [[2, 1]], SamplingParams(seed=4, max_tokens=3, logprobs=1), False), {}
    for request in whole.requests: request.news = news
    for reader in (three, two, aborted): reader.read()
    for request in whole.requests: engine.add(request)
    try:
        with AtCall(at, *where) as place:
            victim.read()
            aborted.abort_one(rng)
            for _ in range(2): engine.step()       # by somebody who has no stream
            while not victim.ended: victim.read()
    except Injected: pass
    aborted.aborted.update(aborted.requests)
    if at % 2: victim.stream.close()               # at once, or when the others are done
    check_prefix(victim)
    finish(engine, [three, two, aborted, asker(engine, rng, [[1, 2, 3, 1]], SamplingParams(seed=3, max_tokens=3))])
    while any(r.request_id in engine.requests for r in whole.requests): engine.step()
    victim.stream.close()
    assert news.keys() == set(whole.requests), "nobody hears of an end"
    for request in news: whole.take(request, request.output())
    whole.check()
    assert_nothing_is_left(engine)
    return place.left <= 0


def every(num_in_flight, stride, *where, first=1):
    "The scenario, interrupted at every `stride`-th event from the `first` on, to its end. How many there are."
    for at in range(first, 10**6, stride):
        try: thrown = scenario(at, num_in_flight, *where)
        except BaseException as e: raise AssertionError(f"event {at}: {e!r}") from e
        if not thrown: return at


@swallowed
@both_loops
def test_an_exception_at_calls_of_a_scenario(num_in_flight):
    "At each of them in `make fuzz`, here at two of three: one in one loop, one in the other."
    assert every(num_in_flight, 1 if FUZZ else 3, ["call"], first=1 if FUZZ else num_in_flight) > 400


@pytest.mark.ci
@swallowed
@both_loops
def test_fuzz_an_exception_at_calls_and_returns_of_a_scenario(num_in_flight):
    "All of them take their time: each of them in `make fuzz`, here every 17th."
    assert every(num_in_flight, 1 if FUZZ else 17) > 2000


@pytest.mark.ci
@swallowed
@both_loops
def test_an_exception_where_tokens_become_text(num_in_flight):
    assert every(num_in_flight, 1, EDGES, DELICATE) > 300


# ---- by signals

class Alarms:
    "Within the block, SIGALRM raises KeyboardInterrupt, once for each time it is asked for."

    def __enter__(self):
        self.is_armed, self.raised = False, 0
        self.before = signal.signal(signal.SIGALRM, self.handle)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    def handle(self, number, frame):
        if not self.is_armed: return       # too late: who was to be interrupted is done
        self.is_armed = False
        self.raised += 1
        raise KeyboardInterrupt

    def interrupt(self, seconds, function):
        "Call `function`, and interrupt it after so many seconds. Was it?"
        before = self.raised
        try:
            try:
                self.is_armed = True
                signal.setitimer(signal.ITIMER_REAL, seconds)
                function()
            finally: self.is_armed = False
        except KeyboardInterrupt: pass     # also one that came just before the last line
        return self.raised > before


def read_to_the_end(reader):
    "Read a stream, and leave it."
    while not reader.ended: reader.read()
    reader.stream.close()


def short_params(rng):
    return SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=rng.randint(1, 8), seed=rng.getrandbits(30),
                          repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.1]), logprobs=rng.choice([None, None, None, 0]))


def signalled_run(alarms, seed, num_in_flight, longest):
    "Two readers, and ten victims one after the other, each interrupted within `longest` seconds. How many were."
    rng, thrown = random.Random(seed), 0
    engine = random_engine(rng, num_in_flight)
    others = [asker(engine, rng, [[1, 2, 3], [1, 2]], SamplingParams(n=n, max_tokens=20, seed=seed, logprobs=logprobs))
              for n, logprobs in ((1, 0), (2, None))]
    for other in others: other.read()
    for _ in range(10):
        prompt = [rng.randint(1, 3) for _ in range(rng.randint(1, 9))]
        victim = asker(engine, rng, [prompt], short_params(rng))
        thrown += alarms.interrupt(max(1e-6, rng.random() * longest), lambda: read_to_the_end(victim))
        check_prefix(victim)
        for other in others:
            if rng.random() < 0.3 and not other.ended: other.read()
        del victim                         # and with it a stream that may not have been closed
    finish(engine, [*others, asker(engine, rng, [[1, 2, 3, 3]], short_params(rng))])
    assert_nothing_is_left(engine)
    return thrown


def signals(num_in_flight, seconds, runs=10**6):
    "So many runs, or as many as there is time for. (How many signals were sent, how many interrupted something)."
    with Alarms() as alarms:
        start = time.perf_counter()
        for seed in range(5): signalled_run(alarms, seed, num_in_flight, 100)    # none comes so late
        longest, thrown = (time.perf_counter() - start) / 5 / 12, 0
        end = time.perf_counter() + seconds
        for seed in range(runs):
            try: thrown += signalled_run(alarms, seed, num_in_flight, longest)
            except BaseException as e: raise AssertionError(f"run {seed}: {e!r}") from e
            if time.perf_counter() > end and not FUZZ: break
    return 10 * (seed + 1), thrown


@pytest.mark.ci
@swallowed
@pytest.mark.timeout(0 if FUZZ else 900, method="thread")     # not by the signal that this test sends
@both_loops
def test_fuzz_signals_at_random_moments(num_in_flight):
    sent, thrown = signals(num_in_flight, 4, FUZZ or 10**6)
    print(f"{sent} signals, {thrown} interrupts")
    assert thrown > sent / 4


# ---- in the reader's own code

def three_readers(engine):
    "Streams that are under way: of two requests, one of them with three answers; of one; of one."
    rng = random.Random(0)
    params = [SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True, logprobs=1), SamplingParams(seed=2, max_tokens=12)]
    readers = [asker(engine, rng, [[1, 2], [1, 2, 3]], params, True), *(
        asker(engine, rng, [[i, 2]], SamplingParams(seed=i, max_tokens=12, ignore_eos=True, logprobs=2), True) for i in (2, 3))]
    for reader in readers: reader.read()
    return readers


def left_alone(engine, readers):
    "The readers get all that is theirs, so does a later one, and then nothing is left."
    finish(engine, [*readers, asker(engine, random.Random(1), [[1, 2, 3]], SamplingParams(seed=9, max_tokens=5))])
    assert_nothing_is_left(engine)


@both_loops
def test_an_exception_in_the_body_of_the_readers_loop(num_in_flight):
    engine = counted(fake_engine(num_in_flight=num_in_flight))
    first, second, third = three_readers(engine)
    requests = engine.input_processor.make_requests([[1, 2, 2]], SamplingParams(seed=4, max_tokens=9))
    with pytest.raises(ZeroDivisionError):
        for i, piece in enumerate(new_outputs(engine, requests)):
            if i == 2: 1 / 0
    assert requests[0].completions[0].seq.finish_reason == "abort" and requests[0].request_id not in engine.requests
    with pytest.raises(ZeroDivisionError):
        for _ in progress(engine, engine.input_processor.make_requests([[3], [2]], SamplingParams(seed=4, max_tokens=9))): 1 / 0
    left_alone(engine, [first, second, third])


@both_loops
@pytest.mark.parametrize("leave", ["close", "drop", "never begin", "collect"])
def test_a_reader_who_leaves(num_in_flight, leave):
    engine = counted(fake_engine(num_in_flight=num_in_flight))
    first, second, third = three_readers(engine)
    requests = engine.input_processor.make_requests([[1, 2, 2], [3]], SamplingParams(seed=4, max_tokens=9, n=2))
    stream = new_outputs(engine, requests)
    if leave != "never begin":
        for _ in range(3): next(stream)
        assert all(r.request_id in engine.requests for r in requests)
    if leave == "close": stream.close()
    if leave == "collect":
        cycle = [stream]
        cycle.append(cycle)
        del cycle, stream
        gc.collect()
    else: del stream
    assert not any(r.request_id in engine.requests for r in requests)
    check_books(engine)
    left_alone(engine, [first, second, third])


@both_loops
@pytest.mark.parametrize("which", ["its own", "another's", "all"])
def test_aborts_in_the_body_of_a_readers_loop(num_in_flight, which):
    engine = counted(fake_engine(num_in_flight=num_in_flight))
    readers = first, second, third = three_readers(engine)
    aborted = dict(zip(["its own", "another's", "all"], ([first], [second], readers)))[which]
    pieces = 0
    while not first.ended:
        first.read()
        pieces += 1
        if pieces != 2: continue
        for reader in aborted:
            reader.aborted.update(reader.requests)
            for request in reader.requests: engine.abort(request.request_id)
        for reader in aborted: assert not any(r.request_id in engine.requests for r in reader.requests)
        check_books(engine)
    for reader in aborted: assert all(c.seq.finish_reason == "abort" for r in reader.requests for c in r.completions)
    left_alone(engine, readers)


@both_loops
def test_an_abort_of_a_request_that_has_ended_or_never_was_does_nothing(num_in_flight):
    engine = counted(fake_engine(num_in_flight=num_in_flight))
    readers = three_readers(engine)
    over = asker(engine, random.Random(0), [[1, 2]], SamplingParams(seed=1, max_tokens=2), False)
    over.read()
    for request_id in (over.requests[0].request_id, "none", ""): engine.abort(request_id)
    assert over.requests[0].completions[0].seq.finish_reason != "abort"
    left_alone(engine, readers)


# ---- log-probabilities

@pytest.mark.ci
@swallowed
@both_loops
def test_each_token_has_its_entry_after_an_interrupt(num_in_flight):
    "Streams and whole answers, of prompts and of tokens; interrupted at every 41st call or return of one of their own steps."
    for at in range(1, 10**6, 41):
        engine = counted(fake_engine(num_in_flight=num_in_flight, max_num_batched_tokens=8))
        rng = random.Random(at)
        readers = []
        for n, streams in ((2, True), (1, False)):
            params = SamplingParams(n=n, seed=n, max_tokens=8, logprobs=2, prompt_logprobs=1)
            readers.append(asker(engine, rng, [[1, 2, 3] * 4, [2]], params, streams))
        readers[0].read()
        whole = readers[1].requests
        for request in whole: engine.add(request)               # its reader comes later
        place, left = AtCall(at), 6
        try:
            with place:
                while left:
                    left -= 1
                    engine.step()
        except Injected: assert not engine.is_consistent or place.left <= 0
        finish(engine, readers[:1])
        while any(r.request_id in engine.requests for r in whole): engine.step()
        for r in whole:
            output, = r.output().outputs
            answer, = readers[1].expected[r]
            assert (output.token_ids, output.text, output.logprobs) == (answer.token_ids, answer.text, answer.logprobs)
            assert len(output.logprobs) == len(output.token_ids) and r.prompt_logprobs == expected_prompt_logprobs(r)
        assert_nothing_is_left(engine)
        if place.left > 0: break
    assert at > 500


# ---- the tests bite

PLANTED = {
    "recover does nothing": (Engine, "recover", None, None),
    "recover leaves texts as they are": (Engine, "recover", "self.output_processor.restart(request)", "pass"),
    "recover forgets the scheduler": (Engine, "recover", "self.scheduler.reset(", "list("),
    "recover forgets the runner": (Engine, "recover", "self.runner.clear()", "pass"),
    "recover receives what was in flight": (Engine, "recover", "self.in_flight.clear()", "pass"),
    "sequences keep what they have computed": (Sequence, "reset", "self.num_computed_tokens = self.num_output_placeholders = 0",
                                               "pass"),
    "sequences keep their placeholders": (Sequence, "reset", "self.num_computed_tokens = self.num_output_placeholders = 0",
                                          "self.num_computed_tokens = 0"),
    "the scheduler keeps who runs": (Scheduler, "reset", "self.running: dict[Sequence, None] = {}",
                                     "self.running = getattr(self, 'running', {})"),
    "the pool keeps its references": (Scheduler, "reset", "self.manager.reset()", "pass"),
    "rows stay": (InputBatch, "clear", "self.seqs, self.row_of, self.num_blocks = [], {}, []", "pass"),
    "a text begins anew, its end does not": (OutputProcessor, "restart",
                                             "if end and not ended: seq.finish_reason, seq.stop_reason = end", "pass"),
    "nobody hears of an end": (OutputProcessor, "restart", "if seq.finish_reason: self.finish(request, completion)", "pass"),
    "a text goes on where it was": (Completion, "restart", "self.num_read, self.num_chars = 0, 0", "pass"),
    "what is shown is shown again": (Completion, "restart", "self.num_read, self.num_chars = 0, 0",
                                     "self.num_read, self.num_chars = 0, 0; self.num_shown_tokens = 0"),
    "log-probabilities are noted twice": (OutputProcessor, "keep_logprobs", "completion.logprobs[len(ids):] =",
                                          "completion.logprobs +="),
    "tokens are read before all is consistent": (llm, "progress", "while not (news and engine.is_consistent)", "while not news"),
    "an interrupted abort is forgotten": (Engine, "abort", "with self.changing():",
                                          "self.requests.pop(request_id)\n    with self.changing():"),
}


@pytest.mark.ci
@swallowed
@pytest.mark.parametrize("owner, name, old, new", PLANTED.values(), ids=PLANTED)
def test_catches(monkeypatch, owner, name, old, new):
    if old is None: monkeypatch.setattr(Engine, "recover", lambda self: setattr(self, "is_consistent", True))
    else: plant(monkeypatch, owner, name, old, new)
    with pytest.raises(AssertionError):
        for num_in_flight in (1, 2):
            every(num_in_flight, 1, EDGES, DELICATE)
            many(interrupted_run, range(100), num_in_flight)


@swallowed
@both_loops
def test_signals_bite(monkeypatch, num_in_flight):
    "With a recovery that does nothing."
    monkeypatch.setattr(Engine, "recover", lambda self: setattr(self, "is_consistent", True))
    with pytest.raises(AssertionError): signals(num_in_flight, 30)


class AtTaking(Interrupt):
    "The same among the lines of `LLMEngine.step` and of what it calls to hand out."

    def watches(self, frame):
        code = frame.f_code      # the engine's own step has its tests above
        named = code.co_name in ("step", "take", "new_output", "output_from", "output_of") and code.co_qualname != "step"
        return named and super().watches(frame)


def told_by_steps(after):
    "({name: what LLMEngine's steps told of it}, whether a step was interrupted)."
    engine, kinds = llm.LLMEngine(fake_engine()), [RequestOutputKind.DELTA, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY]
    for i, kind in enumerate(kinds):
        engine.add_request(f"r{i}", {"prompt_token_ids": [1 + i, 2]}, SamplingParams(seed=i, max_tokens=3 + i, ignore_eos=True, output_kind=kind))
    told, interrupt = {}, AtTaking(after)
    while engine.has_unfinished_requests():
        outs = []
        try:
            with interrupt: outs = engine.step()
        except Injected: pass
        for out in outs: told.setdefault(out.request_id, []).extend(out.outputs[0].token_ids)
    return told, interrupt.thrown


def test_a_step_of_llm_engine_that_is_interrupted_while_it_hands_out_loses_and_repeats_nothing():
    wanted, _ = told_by_steps(10**9)
    assert {name: len(ids) for name, ids in wanted.items()} == dict(r0=3, r1=4, r2=5)
    for after in range(1, 400):
        told, thrown = told_by_steps(after)
        assert told == wanted, after
        if not thrown: break
    assert not thrown and after > 50
