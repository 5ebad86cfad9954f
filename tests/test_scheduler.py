"""The scheduler by itself; its laws under random work are in test_fuzz."""
import inspect
import random
import sys
from collections import OrderedDict
from dataclasses import FrozenInstanceError

import pytest

from nano_vllm import scheduler as module
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler, check_fits, num_missing, waits_for_token

PACKAGE = {"nano_vllm.scheduler", "nano_vllm.prefix_cache", "nano_vllm.kv_blocks"}


def new(name, prompt_len, max_tokens=50, salt=0, **params):
    "A sequence that shares no block with any of another salt."
    return Sequence(str(name), list(range(prompt_len)), SamplingParams(**params), cache_salt=salt, max_len=prompt_len + max_tokens)


def make(num_blocks=1000, block_size=4, max_num_seqs=8, budget=16, threshold=0):
    return Scheduler(KVCacheManager(num_blocks, block_size), max_num_seqs, budget, threshold)


def receive(scheduler, output):
    "Book a step whose new tokens are all 7, and end those that are as long as they may be."
    scheduler.update(output, [7] * len(output.sampled))
    for s in output.sampled:
        if s.seq.finish_reason is None and s.seq.num_tokens == s.seq.max_len: scheduler.finish(s.seq, "length")


def step(scheduler):
    output = scheduler.schedule()
    receive(scheduler, output)
    return output


def granted(output): return {s.seq.request_id: s.num_tokens for s in output.scheduled}


# ---- decoding goes on

def test_long_prompts_go_in_pieces_and_nobody_stalls():
    "With a threshold several prompts are under way at once; each running sequence gets a token in every step."
    scheduler = make(block_size=16, budget=24, threshold=10)
    lengths = [100, 3, 200, 90, 5, 70]
    seqs = [new(i, n, salt=i) for i, n in enumerate(lengths)]
    for seq in seqs: scheduler.add(seq)
    for _ in range(50):
        running = list(scheduler.running)
        tokens = granted(step(scheduler))
        assert all(1 <= tokens[s.request_id] <= 10 for s in running) and sum(tokens.values()) <= 24
    assert all(s.num_computed_tokens >= n for s, n in zip(seqs, lengths) if s in scheduler.running)


@pytest.mark.parametrize("budget", [40, 128, 512])
def test_decoding_goes_on_while_a_long_prompt_is_computed(budget):
    "Thirty readers get a token in every step between the arrival of 4,000 tokens and their end."
    scheduler = make(10_000, 16, 64, budget)
    readers = [new(i, 5, max_tokens=5000, salt=i) for i in range(30)]
    for seq in readers: scheduler.add(seq)
    while any(num_missing(seq) != 1 for seq in readers): step(scheduler)
    long = new("long", 4000, salt=99)
    scheduler.add(long)
    num_steps = 0
    while not long.output_token_ids:
        tokens, num_steps = granted(step(scheduler)), num_steps + 1
        assert all(tokens[seq.request_id] == 1 for seq in readers) and sum(tokens.values()) <= budget
    assert num_steps == -(-4000 // (budget - 30))       # and the prompt takes all that the readers leave


def stalls_in_flight(kind, num_runs=400):
    "Two steps in flight, thresholds, penalties: how often a running sequence that could go on got nothing."
    stalls = 0
    for seed in range(num_runs):
        rng = random.Random(seed)
        scheduler = kind(KVCacheManager(1000, 4), rng.randint(2, 8), rng.choice([4, 8, 12]), rng.choice([0, 2, 3, 5]))
        in_flight, to_come = [], 12
        while to_come or scheduler.waiting or scheduler.running:
            if to_come and rng.random() < 0.5:
                to_come -= 1
                scheduler.add(new(to_come, rng.randint(1, 30), rng.randint(1, 15), to_come, repetition_penalty=rng.choice([1, 1.1])))
            ready = [seq for seq in scheduler.running if not waits_for_token(seq) and num_missing(seq)]
            output = scheduler.schedule()
            assert sum(granted(output).values()) <= scheduler.budget
            stalls += len(set(ready) - {s.seq for s in output.scheduled})
            if output: in_flight.append(output)
            if in_flight and (not output or len(in_flight) == 2): receive(scheduler, in_flight.pop(0))
    return stalls


def test_nobody_stalls_with_two_steps_in_flight():
    assert stalls_in_flight(Scheduler) == 0


def test_without_the_reserve_somebody_would():
    "A sequence that sat out a step comes back and takes the token of a younger one: this is what the reserve is for."
    source = inspect.getsource(module)
    assert source.count("reserved = len(self.running) - 1 - i") == 1
    changed = {"__package__": module.__package__}
    exec(source.replace("reserved = len(self.running) - 1 - i", "reserved = 0"), changed)
    assert stalls_in_flight(changed["Scheduler"]) > 0


# ---- two steps in flight

def test_a_sequence_with_penalties_sits_out_a_step_and_nobody_else_does():
    scheduler = make()
    a, b = new("A", 4, salt=1, presence_penalty=0.5), new("B", 4, salt=2)
    for seq in (a, b): scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert granted(first) == {"A": 4, "B": 4} and granted(second) == {"B": 1}
    assert (a.num_output_placeholders, b.num_output_placeholders) == (1, 2)
    receive(scheduler, first)
    third = scheduler.schedule()
    assert granted(third) == {"A": 1, "B": 1}
    for output in (second, third): receive(scheduler, output)
    assert (len(a.output_token_ids), len(b.output_token_ids)) == (2, 3)
    assert a.num_output_placeholders == b.num_output_placeholders == 0


@pytest.mark.parametrize("num_in_flight", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 8])
def test_nothing_is_computed_beyond_max_len(num_in_flight, max_tokens):
    "The last token a sequence may have gets no KV, whether it is known yet or under way; its blocks suffice to the end."
    prompt_len = 8
    num_blocks = blocks_needed(prompt_len + max_tokens - 1, 4)
    check_fits(prompt_len, max_tokens, 100, num_blocks, 4)
    scheduler, seq = make(num_blocks), new("A", prompt_len, max_tokens)
    scheduler.add(seq)
    in_flight, computed = [], 0
    while seq.finish_reason is None:
        output = scheduler.schedule()
        computed += sum(granted(output).values())
        assert all(s.end <= seq.max_len - 1 for s in output.scheduled)
        if output: in_flight.append(output)
        if not output or len(in_flight) == num_in_flight: receive(scheduler, in_flight.pop(0))
    assert not in_flight and len(seq.output_token_ids) == max_tokens
    assert computed == seq.max_len - 1 and scheduler.num_preemptions == 0


def test_a_token_of_a_sequence_that_ended_meanwhile_is_dropped():
    scheduler = make()
    seq = new("A", 4)
    scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first, [7])
    scheduler.finish(seq, "stop", stop_reason=7)
    scheduler.update(second, [8])
    assert seq.output_token_ids == [7] and (seq.finish_reason, seq.stop_reason) == ("stop", 7)
    assert not scheduler.running and len(scheduler.manager.pool.free_blocks) == 1000


def test_a_token_of_a_sequence_that_was_preempted_meanwhile_is_kept():
    "The step of B is in flight when A, the older one, takes the last block that B needs."
    scheduler = make(num_blocks=4)
    a, b = new("A", 7, salt=1), new("B", 3, salt=2)
    for seq in (a, b): scheduler.add(seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert granted(first) == {"A": 7, "B": 3} and granted(second) == {"A": 1, "B": 1}
    receive(scheduler, first)
    third = scheduler.schedule()
    assert granted(third) == {"A": 1} and third.removed == (b,) and scheduler.num_preemptions == 1
    assert b.num_output_placeholders == 1
    receive(scheduler, second)
    assert b.output_token_ids == [7, 7] and b.num_output_placeholders == 0
    assert b.num_computed_tokens == 0 and b.block_table == []
    parents = {entry.parent for entry in scheduler.manager.cache.entries if entry}
    assert ~a.cache_salt in parents and ~b.cache_salt not in parents    # the block that B filled is not B's any more


# ---- what a step says

def test_a_step_is_a_snapshot():
    "What was scheduled stays, whatever becomes of the sequences."
    scheduler = make(budget=6)
    a, b = new("A", 4, salt=1), new("B", 8, salt=2)
    for seq in (a, b): scheduler.add(seq)
    output = scheduler.schedule()
    before = [(s.seq, s.start, s.num_tokens, s.end, s.samples) for s in output.scheduled]
    assert before == [(a, 0, 4, 4, True), (b, 0, 2, 2, False)]
    receive(scheduler, output)
    step(scheduler)
    scheduler.finish(a, "abort")
    scheduler.reset([b])
    assert [(s.seq, s.start, s.num_tokens, s.end, s.samples) for s in output.scheduled] == before
    assert [s.seq for s in output.sampled] == [a] and len(output.admitted) == 2 and output.removed == ()
    with pytest.raises(FrozenInstanceError): output.scheduled = ()
    with pytest.raises(AttributeError): output.scheduled[0].start = 3


def test_who_lost_blocks_is_told_once_and_with_the_next_step_that_computes():
    scheduler = make()
    a, b = new("A", 4, salt=1), new("B", 4, salt=2)
    scheduler.add(a)
    step(scheduler)
    scheduler.finish(a, "stop")
    empty = scheduler.schedule()
    assert not empty                                                 # nobody is told of it
    scheduler.add(b)
    assert scheduler.schedule().removed == (a,)
    assert scheduler.schedule().removed == ()


def test_a_preempted_sequence_is_told_removed_in_the_step_that_took_its_blocks():
    scheduler = make(num_blocks=5)
    a, b = new("A", 6, max_tokens=6, salt=1), new("B", 6, max_tokens=6, salt=2)
    for seq in (a, b): scheduler.add(seq)
    while not scheduler.num_preemptions: output = step(scheduler)
    assert output.removed == (b,) and granted(output) == {"A": 1} and not output.admitted
    assert next(iter(scheduler.waiting)) is b
    while b in scheduler.waiting: output = step(scheduler)
    assert [(s.seq, s.start, s.num_tokens) for s in output.admitted] == [(b, 8, 1)]   # it found two of its blocks


def test_reset_begins_anew_with_the_tokens_that_are_known():
    scheduler = make()
    a, b = new("A", 6, salt=1), new("B", 6, salt=2)
    for seq in (a, b): scheduler.add(seq)
    receive(scheduler, scheduler.schedule())
    scheduler.schedule()                                             # and its tokens are lost
    scheduler.reset([a, b])
    assert list(scheduler.waiting) == [a, b] and not scheduler.running
    assert len(scheduler.manager.pool.free_blocks) == 1000
    for seq in (a, b): assert (seq.num_tokens, seq.num_computed_tokens, seq.num_output_placeholders) == (7, 0, 0)
    assert granted(scheduler.schedule()) == {"A": 7, "B": 7}


# ---- what a step costs

class Watched(OrderedDict):
    "Counts the entries that are looked at one after the other."
    looked_at = 0

    def __iter__(self):
        for seq in super().__iter__():
            self.looked_at += 1
            yield seq


def lines_of_a_step(scheduler):
    "How many lines the scheduler and its parts run for one step: a count that no clock disturbs."
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_globals.get("__name__") not in PACKAGE: return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try: step(scheduler)
    finally: sys.settrace(before)
    return count


def decoding(num_running, num_waiting, context=20, room=0, num_spare_blocks=10**5):
    "All running ones decode, and none fills a block in the next step; those that wait have no room, or no memory."
    scheduler = make(num_running * blocks_needed(context + 50, 16) + num_spare_blocks, 16, num_running + room, num_running * context)
    for i in range(num_running): scheduler.add(new(i, context, salt=i))
    step(scheduler)
    assert len(scheduler.running) == num_running
    for i in range(num_waiting): scheduler.add(new(f"waits {i}", context, salt=10**6 + i))
    scheduler.waiting = Watched(scheduler.waiting)
    return scheduler


def test_a_step_does_not_look_at_those_who_find_no_room():
    few, many = decoding(5, 10), decoding(5, 10_000)
    assert lines_of_a_step(few) == lines_of_a_step(many)
    assert few.waiting.looked_at == many.waiting.looked_at == 0


def test_a_step_looks_at_no_more_waiting_ones_than_there_is_room_for():
    "Memory is full: the first is asked and refused; three could come, so three at most are looked at."
    few, many = (decoding(5, n, room=3, num_spare_blocks=0) for n in (10, 10_000))
    for scheduler in (few, many):                                    # take what is free
        while len(scheduler.manager.pool.free_blocks) > 1: scheduler.manager.pool.allocate()
    assert lines_of_a_step(few) == lines_of_a_step(many)
    assert few.waiting.looked_at == many.waiting.looked_at <= 3 and len(many.running) == 5


def test_the_first_in_line_who_finds_no_memory_is_not_passed():
    scheduler = decoding(2, 0, room=3, num_spare_blocks=0)
    large, small = new("large", 2000, salt=7), new("small", 1, salt=8)
    for seq in (large, small): scheduler.add(seq)
    assert large not in step(scheduler).admitted and list(scheduler.waiting) == [large, small]


def test_finishing_one_who_waits_looks_at_nobody_else():
    scheduler = decoding(1, 10_000)
    seq = new("late", 20)
    scheduler.add(seq)
    scheduler.finish(seq, "abort")
    assert scheduler.waiting.looked_at == 0 and seq not in scheduler.waiting


def test_a_step_costs_as_much_for_each_however_many_run():
    "The number of lines is a straight line in the number of running sequences."
    one, hundred, thousand = (lines_of_a_step(decoding(n, 0)) for n in (1, 100, 1000))
    assert thousand - hundred == (hundred - one) / 99 * 900


def test_a_step_costs_the_same_whatever_the_context():
    short, long = (lines_of_a_step(decoding(5, 0, context=n)) for n in (20, 20_004))
    assert short == long


# ---- the door

@pytest.mark.parametrize("prompt_len, max_tokens, problem", [(12, 6, "num_kv_blocks is 4"), (100, 1, "max_model_len is 100"), (12, None, "25 KV blocks")])
def test_a_request_that_can_never_fit_is_refused_by_name(prompt_len, max_tokens, problem):
    check_fits(12, 5, 100, num_blocks=4, block_size=4)
    with pytest.raises(ValueError, match=problem): check_fits(prompt_len, max_tokens, 100, num_blocks=4, block_size=4)
