"""At every line of a request's life something fails, once: the first line, the second, and so on to the last.

SQLite is tested like this: its n-th malloc fails, for n = 1, 2, ... until nothing fails any more. Here it is the n-th line of the
engine's host side, and what comes is a MemoryError (code that catches Exception meets it) or a KeyboardInterrupt (such code does not).
Whoever is there when it comes is the victim. All others have open streams, or wait, and must get what is theirs: each token once, in
order. And nothing is left: no block, no row, no lock. A short choice of the lines runs always, all of them in the slow tests."""
import gc
import linecache
import random
from collections import Counter

import pytest
from fake_engine import Asker, check_books, fake_engine, logits_after
from helpers import Tracing
from test_exactly_once import assert_nothing_is_left, asker, check_prefix, counted, finish
from nano_vllm import LLM, SamplingParams
from nano_vllm.engine_args import EngineArgs
from nano_vllm.scheduler import PriorityScheduler, Scheduler

# the host side: whatever a request goes through, but for the products of a model
MODULES = {f"nano_vllm.{name}" for name in ("sampling_params", "tokenizer", "kv_blocks", "prefix_cache", "model_runner", "scheduler", "request", "engine",
                                            "llm", "speculative")} | {"contextlib"}
ERRORS = MemoryError, KeyboardInterrupt
# an exception that is thrown while Python closes a generator can reach nobody: Python reports it and goes on
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class AtLine(Tracing):
    """Within the block, raises `error` before the `at`-th line of the engine's modules, once.

    `count`: how many lines there were; `first`: for each place in the source, when it was met first."""

    def __init__(self, at, error):
        self.at, self.error, self.count, self.first = at, error, 0, {}
        self.before_it = {}      # frame -> the line that it ran last

    def __exit__(self, *error):
        super().__exit__(*error)
        self.before_it.clear()   # or the tracer would keep the frames, and with them requests that were thrown away

    def gives_back_lock(self, frame):
        """Is this the end of a `with exclusive(engine)` block? Python names the line of the `with` again, before it calls the lock's `__exit__`.

        What comes between the two is one jump: it takes no memory, and Python looks for signals only after the call. So nothing can
        fail there but a tracer; and then no `with` in any program would give its lock back (Python's issue 74174)."""
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        return self.before_it.get(frame, 0) > frame.f_lineno and line.lstrip().startswith("with exclusive(")

    def trace(self, frame, event, arg):
        if frame.f_globals.get("__name__") not in MODULES: return None
        if event == "return": self.before_it.pop(frame, None)
        if event == "line":
            is_end = self.gives_back_lock(frame)
            self.before_it[frame] = frame.f_lineno
            if is_end: return self.trace
            self.count += 1
            self.first.setdefault((frame.f_code, frame.f_lineno), self.count)
            if self.count == self.at: raise self.error(f"line {frame.f_lineno} of {frame.f_code.co_name}")
        return self.trace

    @property
    def was_raised(self): return self.count >= self.at


# ---- a request's life

WORLDS = {
    "one step at a time": dict(),
    "two steps in flight": dict(num_in_flight=2),
    "a window": dict(num_in_flight=2, window=5),
    "guesses": dict(guesses=3),
    "little memory": dict(num_in_flight=2, num_blocks=13, block_size=2, max_model_len=24),
    "priorities": dict(num_blocks=13, block_size=2, max_model_len=24, policy=PriorityScheduler),
}


def make_llm(num_blocks=24, block_size=2, policy=Scheduler, **options):
    "An LLM whose engine is the fake one."
    llm = LLM.__new__(LLM)
    engine = llm.engine = counted(fake_engine(num_blocks, block_size, max_num_seqs=9, max_num_batched_tokens=10, **options))
    if policy is not Scheduler: engine.scheduler = policy(engine.scheduler.manager, 9, 10)
    llm.args, llm.queued, llm.tokenizer = EngineArgs("", scheduling_policy="priority"), [], engine.input_processor.tokenizer
    return llm


class Life:
    "Streams of three samples, of two requests, and of one that the victim aborts; somebody who waits; and the victim."

    def __init__(self, world):
        self.llm, rng = make_llm(**WORLDS[world]), random.Random(1)
        self.engine, self.victim = self.llm.engine, None
        three = asker(self.engine, rng, [[1, 2, 3]], SamplingParams(n=3, seed=1, max_tokens=4, logprobs=0), True)
        two = asker(self.engine, rng, [[1, 2, 3, 1], [2]], SamplingParams(seed=5, max_tokens=4, stop=["DB"]), True)
        self.aborted = asker(self.engine, rng, [[3]], SamplingParams(seed=2, max_tokens=9, ignore_eos=True, presence_penalty=.5), True)
        self.waits = asker(self.engine, rng, [[2, 1]], SamplingParams(seed=4, max_tokens=3, logprobs=1), False)
        self.readers = [three, two, self.aborted]
        for reader in self.readers: reader.read()
        self.news = {}
        for request in self.waits.requests:
            request.news = self.news
            self.engine.add(request)

    def ask(self):
        "The victim comes: its prompts are checked, and its requests made and queued."
        params = SamplingParams(seed=7, max_tokens=3, ignore_eos=True, prompt_logprobs=1)
        requests = self.llm.make_requests([[1, 2, 3], {"prompt_token_ids": [2, 2]}], params, priority=[0, -1])
        self.victim = Asker(self.engine, requests, True)

    def live(self):
        "What is interrupted: asking, reading, an abort of another's request, steps for others, whole answers, and leaving."
        self.ask()
        self.victim.read()
        self.aborted.abort_one(random.Random(1))
        for _ in range(2): self.engine.step()       # by somebody who has no stream
        self.llm.enqueue([[3, 3]], SamplingParams(seed=3, max_tokens=2, n=2))
        self.llm.wait_for_completion(use_tqdm=False)
        self.victim.read()
        self.victim.stream.close()

    def check(self):
        "All others get what is theirs, so does one who comes later; and then nothing is left."
        self.aborted.aborted.update(self.aborted.requests)
        if self.victim:
            check_prefix(self.victim)
            self.victim.stream.close()
        later = asker(self.engine, random.Random(2), [[1, 2, 3, 1]], SamplingParams(seed=3, max_tokens=3))
        finish(self.engine, [*self.readers, later])
        while any(r.request_id in self.engine.requests for r in self.waits.requests): self.engine.step()
        assert self.news.keys() == set(self.waits.requests), "nobody hears of an end"
        for request in self.news: self.waits.take(request, request.output())
        self.waits.check()
        assert_nothing_is_left(self.engine)
        assert not self.engine.lock._is_owned(), "a lock that nobody gives back"


def interrupted(world, at, error=None):
    "A life until its `at`-th line, and the others' to their ends; the AtLine."
    life, place = Life(world), AtLine(at, error)
    try:
        try:
            with place: life.live()
        except ERRORS: pass
        life.check()
    except BaseException as e: raise AssertionError(f"{world}, {error.__name__} at line {at}: {e!r}") from e
    return place


def undisturbed(world):
    place = interrupted(world, 10**9)
    assert not place.was_raised
    return place


def test_an_error_at_each_line_of_the_source():
    "Where a life meets it first, in some world; with both errors in turn."
    met, num = set(), Counter()
    for world in WORLDS:
        first = undisturbed(world).first
        for place in first.keys() - met:
            met.add(place)
            num[world] += 1
            assert interrupted(world, first[place], ERRORS[sum(num.values()) % 2]).was_raised
    print(dict(num), "places")
    assert sum(num.values()) > 500


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("world", WORLDS)
def test_an_error_at_every_line_of_a_life(world, error):
    for at in range(1, 10**6):
        if not interrupted(world, at, error).was_raised: break
    print(world, at - 1, "lines")
    assert at > 3000


# ---- while the engine begins anew, and again and again

def interrupted_twice(world, at, again):
    "A second error comes while the engine begins anew after the first: at the `again`-th line of the next step; the AtLine of it."
    life, place = Life(world), AtLine(again, MemoryError)
    try:
        try:
            with AtLine(at, KeyboardInterrupt): life.live()
        except ERRORS: pass
        try:
            with place: life.engine.step()
        except ERRORS: pass
        life.check()
    except BaseException as e: raise AssertionError(f"{world}, lines {at} and then {again}: {e!r}") from e
    return place


def try_second_errors(world, number, most):
    "`number` first errors, evenly spread; after each of them at most `most` second ones. How many there were."
    lines, tried = undisturbed(world).count, 0
    for at in range(lines // 2 // number, lines, lines // number):
        second = interrupted_twice(world, at, 10**9).count
        for again in range(1, second + 1, max(1, second // most)):
            tried += interrupted_twice(world, at, again).was_raised
    return tried


@pytest.mark.ci
@pytest.mark.parametrize("world", ["two steps in flight", "guesses"])
def test_an_error_while_the_engine_begins_anew(world): assert try_second_errors(world, 4, 20) > 60


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_an_error_at_every_line_while_the_engine_begins_anew(world): assert try_second_errors(world, 10, 10**6) > 3000


class Soak:
    "One engine, three readers at all times, and a victim after the other, each interrupted by Ctrl-C at a random line."

    def __init__(self, seed, world):
        self.rng, self.llm = random.Random(seed), make_llm(**WORLDS[world])
        self.engine = self.llm.engine
        del self.engine.step         # it may step as often as it likes
        self.readers, self.num_raised, self.num_answers = [], 0, 0

    def replace_readers(self):
        "Who has got all is checked, and another comes."
        for reader in self.readers:
            if reader.ended: reader.check(interrupted=True)
        still = [r for r in self.readers if not r.ended]
        self.num_answers += len(self.readers) - len(still)
        self.readers = still + [asker(self.engine, self.rng, [[1, 2, self.rng.randint(1, 3)]], self.params()) for _ in range(3 - len(still))]

    def params(self): return SamplingParams(max_tokens=self.rng.randint(1, 8), seed=self.rng.getrandbits(30),
                                            repetition_penalty=self.rng.choice([1, 1, 1.1]), logprobs=self.rng.choice([None, None, None, 0]))

    def live(self):
        requests = self.llm.make_requests([[1, 2, self.rng.randint(1, 3)]], self.params())
        self.victim = Asker(self.engine, requests, True)
        while not self.victim.ended: self.victim.read()

    def turn(self):
        self.replace_readers()
        self.victim, place = None, AtLine(self.rng.randint(1, self.rng.choice([100, 500, 2000])), KeyboardInterrupt)
        try:
            with place: self.live()
        except KeyboardInterrupt: pass
        self.num_raised += place.was_raised
        if self.victim:
            check_prefix(self.victim)
            self.victim.stream.close()
        reader = self.rng.choice(self.readers)
        if not reader.ended: reader.read()

    def run(self, interruptions):
        "So many interruptions; the answers that others got meanwhile."
        while self.num_raised < interruptions:
            try: self.turn()
            except BaseException as e: raise AssertionError(f"after {self.num_raised} interruptions: {e!r}") from e
            if self.num_raised % 100 == 0 and self.engine.is_consistent: check_books(self.engine)
            assert len(self.engine.requests) < 10, "requests that nobody waits for pile up"
        finish(self.engine, self.readers)
        assert_nothing_is_left(self.engine)
        return self.num_answers


@pytest.mark.parametrize("world", ["two steps in flight", "little memory"])
def test_two_hundred_interruptions_of_one_engine(world): assert Soak(0, world).run(200) > 20


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_thousand_interruptions_of_one_engine():
    "Nothing piles up, either: not a thousand Python objects more after the second half than after the first."
    soak = Soak(1, "two steps in flight")
    soak.run(50_000)
    logits_after.cache_clear()      # the fake model's own memory
    gc.collect()
    before = len(gc.get_objects())
    answers = soak.run(100_000)
    logits_after.cache_clear()
    gc.collect()
    print(soak.num_raised, "interruptions,", answers, "answers")
    assert len(gc.get_objects()) < before + 1000 and answers > 10_000
