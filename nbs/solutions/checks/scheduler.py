"Checks of the exercises of the chapter on the scheduler."
import random

from nano_vllm.drawing import gantt_text
from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler

from . import WrongAnswer, attempt, exercise, expect, require


def new(name, prompt_len, max_tokens=3, first=0):
    prompt = list(range(first, first + prompt_len))
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens), max_len=prompt_len + max_tokens)


def play(scheduler, seqs, case):
    "The steps of `scheduler` for `seqs`, which all arrive at once: [(name, number of tokens), ...] each."
    for seq in seqs: attempt(f"{case}: add", scheduler.add, seq)
    steps = []
    while scheduler.waiting or scheduler.running:
        output = attempt(f"{case}, step {len(steps)}: schedule", scheduler.schedule)
        steps.append([(s.seq.request_id, s.num_tokens) for s in output.scheduled])
        require(len(steps) < 1000, f"{case}: after 1,000 steps not everybody has ended")
        scheduler.update(output, [7] * len(output.sampled))
        for s in output.sampled:
            if s.seq.num_tokens == s.seq.max_len: scheduler.finish(s.seq, "length")
    return steps


@exercise
def check_steps_of_prompt(steps_of_prompt):
    for prompt, budget, readers in ((4000, 512, 30), (12, 6, 2), (8, 6, 2), (9, 6, 2), (1, 31, 30), (100, 100, 0), (101, 100, 0)):
        wanted = -(-prompt // (budget - readers))
        expect(steps_of_prompt, (prompt, budget, readers), wanted,
               f"{readers} readers take {readers} of the {budget} tokens, which leaves {budget - readers} in each step for the "
               f"{prompt} tokens of the prompt")


@exercise
def check_prediction(predicted):
    real = play(Scheduler(KVCacheManager(20, 4), 8, 64), [new(name, 8, 2) for name in "ABC"], "the scheduler")
    require(isinstance(predicted, (list, tuple)) and all(isinstance(step, dict) for step in predicted),
            "the prediction is to be a list with a dictionary for each step, such as {'A': 8}")
    chart = gantt_text([{name: n for name, n in step.items() if n} for step in predicted])
    for i, step in enumerate(real):
        require(i < len(predicted), f"there is a step {i}, which your prediction has not")
        wanted = dict(step)
        for name in "ABC":
            mine, right = predicted[i].get(name, 0), wanted.get(name, 0)
            require(mine == right, f"in step {i} you give {name} {mine} tokens; the scheduler does not",
                    "who has the same beginning as a text that is being computed waits, and then finds its full blocks, "
                    "but a token must be left to compute; and a sequence whose last token is known has ended. "
                    f"Your schedule, a column for each step:\n{chart}")
    require(len(predicted) == len(real), f"you predict {len(predicted)} steps, but there are fewer")


def granted(missing, waiting, budget, max_running):
    running, admitted = [], []
    for i, n in enumerate(missing):
        running.append(min(n, budget - (len(missing) - 1 - i)))
        budget -= running[-1]
    for n in waiting:
        if not budget or len(running) + len(admitted) == max_running: break
        admitted.append(min(n, budget))
        budget -= admitted[-1]
    return running, admitted


@exercise
def check_hand_out(hand_out):
    rng = random.Random(0)
    cases = [([1, 1], [12], 6, 8, "the newcomer takes what the readers leave"),
             ([1, 1, 8], [5], 6, 8, "nothing is left for the one that waits"),
             ([1, 1], [2, 2, 9], 6, 8, "the third finds nothing left"),
             ([1, 1], [2, 2], 64, 3, "there is room for three, of whom two run already"),
             ([1, 1], [2], 64, 2, "there is no room for another"),
             ([20, 1, 1], [], 7, 8, "the oldest leaves a token for each younger one"),
             ([3], [3, 1], 4, 8, "the first of those who wait gets one token, the second nothing"),
             ([], [4, 4], 8, 8, "both fit exactly"), ([], [5, 1], 5, 8, "the budget is used up by the first"),
             ([], [], 8, 8, "nobody is there")]
    for _ in range(100):
        missing, size = [rng.choice([1, 1, 1, 9]) for _ in range(rng.randint(0, 4))], rng.randint(4, 12)
        cases.append((missing, [rng.randint(1, 8) for _ in range(rng.randint(0, 4))], size, rng.randint(4, 6), ""))
    for missing, waiting, budget, room, why in cases:
        expect(hand_out, (missing, waiting, budget, room), granted(missing, waiting, budget, room), why)


@exercise
def check_make_room(make_room):
    pool = [("A", 3), ("B", 2), ("C", 4)]
    for held, free, name, needed, wanted, why in (
            (pool, 5, "A", 2, ([], True), "there are enough free blocks"),
            (pool, 2, "A", 2, ([], True), "there are just enough free blocks"),
            (pool, 0, "A", 1, (["C"], True), "the newest gives way, and its blocks are enough"),
            (pool, 1, "A", 5, (["C"], True), "with those of C there are just enough"),
            (pool, 1, "A", 6, (["C", "B"], True), "those of C are not enough, so B gives way, too"),
            (pool, 0, "C", 1, (["C"], False), "C is the newest itself, and waits"),
            (pool, 1, "B", 6, (["C", "B"], False), "without C there are still too few, and then B is the newest"),
            (pool[:1], 0, "A", 1, (["A"], False), "there is nobody else")):
        expect(make_room, (held, free, name, needed), wanted, why)


def mean_wait(scheduler_class):
    "Tokens computed by all before a request has its first token, on average over a queue of mixed prompts."
    rng = random.Random(1)
    seqs = [new(str(i), rng.choice([5, 10, 400]), 4, first=1000*i) for i in range(24)]
    left, clock, waits = {seq.request_id: seq.num_tokens for seq in seqs}, 0, []
    for step in play(scheduler_class(KVCacheManager(200, 16), 4, 64), seqs, "24 requests"):
        clock += sum(n for _, n in step)
        waits += [clock for name, n in step if 0 < left[name] <= n]
        for name, n in step: left[name] -= n
    return sum(waits) / len(waits)


@exercise
def check_shortest_first(ShortestFirst):
    def started(lengths, case, **limits):
        seqs = [new(name, n, first=100*i) for i, (name, n) in enumerate(lengths)]
        steps = play(ShortestFirst(KVCacheManager(40, 4), **limits), seqs, case)
        return list(dict.fromkeys(name for step in steps for name, _ in step))

    for lengths, wanted, why in ((dict(A=9, B=2, C=5), "BCA", "prompts of 9, 2 and 5 tokens"),
                                 (dict(A=4, B=4, C=4), "ABC", "of equal prompts, the first to come is the first to go"),
                                 (dict(A=6, B=3, C=6, D=3), "BDAC", "of equal prompts, the first to come is the first to go"),
                                 (dict(A=1, B=2, C=3), "ABC", "they came in this order already")):
        case = f"requests with prompts {lengths}, one at a time"
        got = started(lengths.items(), case, max_num_seqs=1, max_num_batched_tokens=16)
        require(got == list(wanted), f"{case} start in the order {got}, expected {list(wanted)}", why)
    seqs = [new("A", 6, 8), new("B", 6, 8, first=50), new("C", 3, 8, first=90)]
    play(ShortestFirst(KVCacheManager(5, 4), 8, 16), seqs, "three requests in a pool of five blocks")
    require(all(seq.num_tokens == seq.max_len for seq in seqs), "in a pool of five blocks not everybody got all tokens")
    before, after = mean_wait(Scheduler), mean_wait(ShortestFirst)
    require(after < before, f"the mean wait for a first token is {after:.0f} tokens, with `Scheduler` {before:.0f}")
    return f"the mean wait falls from {before:,.0f} to {after:,.0f} tokens"
