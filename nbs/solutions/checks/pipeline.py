"Checks of the exercises of the chapter on pipeline parallelism."
from itertools import combinations
from numbers import Integral

from . import attempt, exercise, expect, require, show


@exercise
def check_pipeline_time(pipeline_time):
    for num_steps, num_stages, seconds in ((8, 4, 1), (1, 4, 2), (8, 1, 0.5), (100, 3, 0.01)):
        total = (num_steps + num_stages - 1) * seconds
        idle = (num_stages - 1) / (num_steps + num_stages - 1)
        expect(pipeline_time, (num_steps, num_stages, seconds), [total, idle],
               f"the first step needs {num_stages * seconds:g} s, and after it one step leaves the last stage every {seconds:g} s; a stage works "
               f"{num_steps * seconds:g} of {total:g} s", tolerance=1e-9)


@exercise
def check_crowd(crowd):
    for memory, weights, kv, machines in ((80, 16, 1, 4), (80, 60, 2, 2), (24, 30, 1, 2), (10, 9.5, 1, 4), (80, 16.2, 1, 4), (80, 16, 3, 1)):
        replicas = machines * max(0, int((memory - weights) // kv))
        pipeline = max(0, int((machines * memory - weights) // kv))
        expect(crowd, (memory, weights, kv, machines), [replicas, pipeline],
               f"each of {machines} replicas has all {weights} of weights beside its caches, and a cache is not divided among replicas; "
               f"a pipeline has them once in {machines * memory}")


CASES = {
    "nobody has been there": ([("a", 0, False), ("b", 0, False), ("c", 0, False)], 2, ["a", "b"]),
    "one waits for its token": ([("a", 5, True), ("b", 4, False), ("c", 3, False)], 3, ["c"]),
    "an old one reads a long prompt and could always go": ([("a", 9, False), ("b", 8, True), ("c", 7, False), ("d", 6, False)], 2, ["d", "c"]),
    "two of four wait": ([("a", 5, True), ("b", 4, True), ("c", 2, False), ("d", 3, False)], 2, ["c", "d"]),
    "all wait": ([("a", 1, True), ("b", 2, True)], 2, []),
    "of those who rested equally long the oldest": ([("a", 3, False), ("b", 2, False), ("c", 2, False), ("d", 2, False)], 2, ["b", "c"]),
    "five share three stages": ([(name, 0, False) for name in "abcde"], 3, ["a", "b"]),
    "fewer sequences than stages": ([("a", 1, False), ("b", 0, False)], 4, ["b"]),
}


@exercise
def check_next_turn(next_turn):
    for why, (sequences, num_stages, wanted) in CASES.items():
        case = f"next_turn({show(sequences)}, {num_stages})"
        got = attempt(case, next_turn, list(sequences), num_stages)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(isinstance(got, (list, tuple, set)), f"{case} gives {show(got)}, expected a list of names, {show(wanted)}")
        require(len(got) == len(wanted) and all(name in got for name in wanted), f"{case} gives {show(got)}, expected {show(wanted)}",
                f"{why}; a share is 1/{num_stages} of all sequences, those that wait included, rounded up")


def heaviest(weights, lengths):
    "The weight of the heaviest stage."
    ends = [sum(lengths[:i + 1]) for i in range(len(lengths))]
    return max(sum(weights[end - n:end]) for end, n in zip(ends, lengths))


@exercise
def check_best_split(best_split):
    for weights, num_stages in (([1, 1, 1, 1], 2), ([1, 1, 1, 9], 2), ([5, 1, 1, 1, 1, 1], 3), ([2, 3, 4, 5, 6, 7], 3), ([9, 1, 1], 3),
                                ([1] * 11 + [8], 4), ([4, 4, 1, 1, 1, 9], 3), ([7], 1)):
        cuts = (tuple(b - a for a, b in zip((0, *c), (*c, len(weights)))) for c in combinations(range(1, len(weights)), num_stages - 1))
        best = min(cuts, key=lambda lengths: heaviest(weights, lengths))
        case = f"best_split({show(weights)}, {num_stages})"
        got = attempt(case, best_split, list(weights), num_stages)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        numbers = hasattr(got, "__len__") and all(isinstance(n, Integral) for n in got)
        require(numbers, f"{case} gives {show(got)}, expected a list of {num_stages} whole numbers")
        require(len(got) == num_stages and sum(got) == len(weights) and min(got) >= 1, f"{case} gives {show(list(got))}",
                f"that is no cut of {len(weights)} layers into {num_stages} stages of at least one")
        require(heaviest(weights, got) == heaviest(weights, best), f"{case} gives {show(list(got))}, whose heaviest stage weighs "
                f"{heaviest(weights, got)}", f"with {show(list(best))} it is {heaviest(weights, best)}")
    return "and no stage could be lighter"
