"""Law 11: each token reaches its request exactly once, in order, whatever is interrupted.

An exception is thrown at the n-th line of whatever the engine does, for many n: in a step, in an abort, between two streams, in
both loops. The reader who is interrupted is gone; every other one gets the very tokens it would have got alone."""
import random
import signal
import sys
import threading
import time

import pytest
from fake_engine import assert_all_free, check_books, expected, fake_engine
from nano_vllm import SamplingParams
from nano_vllm.llm import new_outputs, progress

MODULES = {"nano_vllm.engine", "nano_vllm.scheduler", "nano_vllm.prefix_cache", "nano_vllm.kv_blocks",
           "nano_vllm.model_runner", "nano_vllm.llm", "nano_vllm.tokenizer"}


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
                raise Injected(f"line {frame.f_lineno} of {frame.f_code.co_qualname if hasattr(frame.f_code, 'co_qualname') else frame.f_code.co_name}")
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *_): sys.settrace(self.before)


class Reader:
    "Somebody who reads a stream, piece by piece."

    def __init__(self, engine, prompts, params):
        self.requests = engine.input_processor.make_requests(prompts, params)
        self.expected = {r.request_id: expected(r) for r in self.requests}
        self.ids = {r.request_id: [[] for _ in r.completions] for r in self.requests}
        self.text = {r.request_id: ["" for _ in r.completions] for r in self.requests}
        self.stream, self.ended = new_outputs(engine, self.requests), False

    def read(self):
        piece = next(self.stream, None)
        if piece is None:
            self.ended = True
            return
        for o in piece.outputs:
            self.ids[piece.request_id][o.index] += o.token_ids
            self.text[piece.request_id][o.index] += o.text

    def check(self):
        for r in self.requests:
            assert self.ids[r.request_id] == self.expected[r.request_id], "not the tokens it would have got alone"
            assert self.text[r.request_id] == [c.detokenizer.text for c in r.completions]


def prompts_of(rng):
    "Prompts that often begin alike."
    base = [rng.randint(1, 3) for _ in range(20)]
    return [base[:rng.randint(1, 20)] + [rng.randint(1, 3) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 3))]


def some_params(rng):
    return SamplingParams(n=rng.choice([1, 1, 3]), max_tokens=rng.randint(1, 20),
                          repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.1]))


def finish(engine, readers):
    "All readers to their ends, in turns."
    for turn in range(20000):
        open_ones = [r for r in readers if not r.ended]
        if not open_ones: return
        open_ones[turn % len(open_ones)].read()
    pytest.fail("no end in sight")


def interrupted_run(seed, num_in_flight):
    "Two or three readers, one of whom is interrupted at a random line; the others must not notice. Was there an interrupt?"
    rng = random.Random(seed)
    engine = fake_engine(num_blocks=rng.choice([22, 30, 60]), block_size=rng.choice([2, 4]), num_in_flight=num_in_flight,
                         max_num_batched_tokens=rng.choice([6, 16, 64]), max_model_len=44 if rng.random() < 0.5 else 36,
                         threshold=rng.choice([0, 0, 5]))
    readers = []
    for _ in range(rng.randint(2, 3)): readers.append(Reader(engine, prompts_of(rng), some_params(rng)))
    for _ in range(rng.randint(0, 12)): rng.choice(readers).read()
    victim = rng.choice([r for r in readers if not r.ended] or readers)
    interrupt = Interrupt(rng.randint(1, rng.choice([30, 300, 1500])))
    try:
        with interrupt:
            while not interrupt.thrown and not victim.ended:
                if rng.random() < 0.03: break
                victim.read()
            victim.stream.close()      # a reader who leaves: its requests are aborted, which may be interrupted, too
    except Injected: pass
    victim.stream.close()
    others = [r for r in readers if r is not victim]
    late = Reader(engine, prompts_of(rng), some_params(rng))
    finish(engine, [*others, late])
    for r in [*others, late]: r.check()
    while engine.requests: engine.step()       # what an interrupted abort has left ends by itself
    while engine.in_flight: engine.step()
    if not engine.is_consistent: engine.step()
    check_books(engine)
    assert_all_free(engine)
    return interrupt.thrown


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_an_exception_at_any_line_loses_repeats_or_moves_no_token_of_others(num_in_flight):
    thrown = 0
    for seed in range(400):
        try: thrown += interrupted_run(seed, num_in_flight)
        except BaseException as e: raise AssertionError(f"run {seed}: {e!r}") from e
    assert thrown > 200
