"""The exercises of the part "Serving, next": each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import pytest

from solutions.checks import speculative
from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer

MODULES = [speculative]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- 31, speculative decoding

@right(speculative.check_expected_tokens)
def _(chance, num_guesses): return num_guesses + 1 if chance == 1 else (1 - chance**(num_guesses + 1)) / (1 - chance)


wrong(speculative.check_expected_tokens, "a step without guesses gives a token")(lambda chance, num_guesses: sum(chance**i for i in range(1, num_guesses + 1)))
wrong(speculative.check_expected_tokens, "the second counts only if the first is right")(lambda chance, num_guesses: 1 + chance * num_guesses)


@right(speculative.check_kept)
def _(guesses, chosen):
    for i, guess in enumerate(guesses):
        if guess != chosen[i]: return chosen[:i + 1]
    return chosen[:]


wrong(speculative.check_kept, "what follows a wrong guess is worthless")(lambda guesses, chosen: chosen)
wrong(speculative.check_kept, "even if it looks so")(lambda guesses, chosen: chosen[:1 + sum(g == c for g, c in zip(guesses, chosen))])


@right(speculative.check_sample)
def _(p, q, draft, rng):
    if p[draft] >= q[draft] or rng.random() < p[draft] / q[draft]: return [draft, True]
    excess = [max(0, a - b) for a, b in zip(p, q)]
    at = rng.random() * sum(excess)
    for token, e in enumerate(excess):
        at -= e
        if at < 0 and e: return [token, False]


@wrong(speculative.check_sample, "not those of p")
def _(p, q, draft, rng):                   # draws from p where it should draw from the excess
    return (draft, True) if rng.random() * q[draft] < p[draft] else (rng.choices(range(len(p)), p)[0], False)


@wrong(speculative.check_sample, "could be: the sum of the smaller")
def _(p, q, draft, rng):                   # draws without the draft
    token = rng.choices(range(len(p)), p)[0]
    return token, token == draft


@right(speculative.check_best_length)
def _(chance, seconds):
    best, tokens = (0, 1 / seconds[0]), 1
    for k in range(1, len(seconds)):
        tokens += chance**k
        if tokens / seconds[k] > best[1]: best = k, tokens / seconds[k]
    return best[0]


wrong(speculative.check_best_length, "more seconds for each guess")(lambda chance, seconds: len(seconds) - 1)
wrong(speculative.check_best_length, "tokens a second")(lambda chance, seconds: sum(chance**k > seconds[k] - seconds[k-1] for k in range(1, len(seconds))))


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)
