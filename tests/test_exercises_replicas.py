"""The exercises of the part "Serving, next": each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import pytest

from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer
from solutions.checks import replicas, routing

MODULES = [routing, replicas]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- 33, routing

right(routing.check_expected_hit_rate)(lambda texts, replicas, room, spread: min(texts, room * (replicas if spread else 1)) / texts)
wrong(routing.check_expected_hit_rate, "(8, 4, 3, True) gives 0.375, expected 1")(lambda texts, replicas, room, spread: min(1, room / texts))
wrong(routing.check_expected_hit_rate, "(8, 4, 3, True) gives 1.5, expected 1")(lambda texts, replicas, room, spread: room / (texts / replicas if spread else texts))


def sums(router, hashes, per_request, size, count):
    return {n: load * per_request + (len(hashes) - count(hashes, router.known[n])) * size for n, load in router.load.items()}


def leading(hashes, known): return next((i for i, h in enumerate(hashes) if h not in known), len(hashes))


@right(routing.check_weighted_rule)
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    return next(name for name in router.load if work[name] == min(work.values()))


@wrong(routing.check_weighted_rule, "of equal sums the first in `router.load` is wanted")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    return min(sorted(router.load), key=work.get)


@wrong(routing.check_weighted_rule, "up to the end that the replica has not")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, lambda hashes, known: 0)
    return min(router.load, key=work.get)


@wrong(routing.check_weighted_rule, "the rule changes the router")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    name = min(router.load, key=work.get)
    router.load[name] += 1
    return name


def first_tokens(requests, step, token, late=False, everyone=True):
    "Another way: who runs is looked up in each step."
    first, ends, begun, now = [None] * len(requests), [None] * len(requests), [0] * len(requests), 0
    while None in ends:
        there = [i for i, (at, *_) in enumerate(requests) if (at < now or at == now and not late or now == 0 and at == 0) and ends[i] is None]
        if not there:
            now = min(at for i, (at, *_) in enumerate(requests) if ends[i] is None) + (1e-12 if late else 0)
            continue
        now += step + token * sum(1 if begun[i] else requests[i][1] if everyone else 0 for i in there)
        for i in there:
            begun[i] += 1
            if begun[i] == 1: first[i] = now
            if begun[i] == requests[i][2]: ends[i] = now
    return first


right(routing.check_simulate_one)(first_tokens)
wrong(routing.check_simulate_one, "([(0, 10, 1)], 5, 1) gives [5], expected [15]")(lambda *args: first_tokens(*args, everyone=False))
wrong(routing.check_simulate_one, "expected [18]")(lambda requests, step, token: [step + token * n for _, n, _ in requests])


# ---- 34, replicas

@right(replicas.check_computed_again)
def _(prompt, delivered, known, block_size):
    while known >= prompt + delivered: known -= block_size
    return prompt + delivered - known


wrong(replicas.check_computed_again, "(96, 0, 96, 16) gives 0, expected 16")(lambda prompt, delivered, known, block_size: prompt + delivered - known)
wrong(replicas.check_computed_again, "(100, 50, 0, 16) gives 100, expected 150")(
    lambda prompt, delivered, known, block_size: prompt - min(known, (prompt - 1) // block_size * block_size))


@right(replicas.check_join_reports)
def _(reports):
    known = {}
    for start, tokens in reports:
        if start > len(known): raise ValueError("gap")
        for i, token in enumerate(tokens, start):
            if known.setdefault(i, token) != token: raise ValueError("another token")
    return [known[i] for i in range(len(known))]


wrong(replicas.check_join_reports, "gives [1, 2, 1, 2], expected [1, 2]")(lambda reports: [t for _, tokens in reports for t in tokens])


@wrong(replicas.check_join_reports, "expected ValueError: there is a gap")
def _(reports):
    answer = []
    for start, tokens in reports: answer += tokens[len(answer) - start if len(answer) > start else 0:]
    return answer


@wrong(replicas.check_join_reports, "there is a token that contradicts")
def _(reports):
    answer = []
    for start, tokens in reports:
        if start > len(answer): raise ValueError("gap")
        answer += tokens[len(answer) - start:]
    return answer


def fleet(lives, prompts, keep=True, delivered=True):
    "One sequence after the other, each with whoever is alive."
    answers = {}
    for key, n in prompts.items():
        answers[key], alive = [], lives
        for replica in list(alive):
            try:
                said = replica.step([[key, list(answers[key]) if delivered else [], n]])
                while len(answers[key]) < n:
                    answers[key].append(said[key])
                    if len(answers[key]) < n: said = replica.step([])
                break
            except replicas.LostReplica: lives = [r for r in lives if r is not replica]
        if not lives: raise replicas.LostReplica("all are dead")
    return answers


right(replicas.check_answer_all)(fleet)
wrong(replicas.check_answer_all, "a token is at a wrong place")(lambda lives, prompts: fleet(lives, prompts, delivered=False))


@wrong(replicas.check_answer_all, "raises KeyError")
def _(lives, prompts):
    "Forgets whom it has just told of something."
    answers = {key: [] for key in prompts}
    told = [[key, [], n] for key, n in prompts.items()]
    for replica in lives:
        try:
            while any(len(answers[k]) < n for k, n in prompts.items()):
                said, told = replica.step(told), []
                for key in prompts: answers[key] += [said[key]] if len(answers[key]) < prompts[key] else []
            return answers
        except replicas.LostReplica: continue
    return answers


@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_answer(case, capsys): try_answer(case, capsys)


def test_each_check_is_tried(): assert_all_tried(CHECKS, ANSWERS)
