"Checks of the exercises of the chapter on speculative decoding."
import random
from itertools import product

from . import WrongAnswer, attempt, call, exercise, expect, require


@exercise
def check_expected_tokens(expected_tokens):
    for chance, num_guesses, wanted, why in (
            (.5, 0, 1, "a step without guesses gives a token"), (1., 4, 5, "all guesses are right, and a token follows"), (0., 4, 1, "the first guess is wrong"),
            (.5, 1, 1.5, "one guess is right in every second step"), (.5, 2, 1.75, "the second counts only if the first is right"),
            (.8, 3, 1 + .8 + .64 + .512, "the third counts only if both before it are right")):
        expect(expected_tokens, (chance, num_guesses), wanted, why, 1e-9)


@exercise
def check_kept(kept):
    for guesses, chosen, wanted, why in (
            ([16, 17, 18], [16, 17, 30, 40], [16, 17, 30], "what follows a wrong guess is worthless"),
            ([16, 17], [16, 17, 18], [16, 17, 18], "all are right, and a token follows"), ([9], [8, 7], [8], "the token that was chosen takes the wrong guess's place"),
            ([], [5], [5], "there were no guesses"), ([1, 2, 3], [1, 9, 3, 4], [1, 9], "a guess after a wrong one is not right, even if it looks so")):
        expect(kept, (guesses, chosen), wanted, why)


def draws_of(sample, p, q, num=6000):
    "Frequencies of what `sample` gives for drafts drawn from `q`, and how many of these it accepts."
    rng, counts, accepted = random.Random(1), [0] * len(p), 0
    for _ in range(num):
        draft = rng.choices(range(len(p)), q)[0]
        found = attempt(f"sample({p}, {q}, {draft}, rng)", sample, list(p), list(q), draft, rng)
        require(isinstance(found, (tuple, list)) and len(found) == 2, f"sample must give (token, accepted), got {found!r}")
        token, right = found
        require(token in range(len(p)), f"{token!r} is no token")
        require(not right or token == draft, "a draft is accepted, and another token given")
        counts[token] += 1
        accepted += bool(right)
    return [n / num for n in counts], accepted / num


@exercise
def check_sample(sample):
    for p, q in (([.5, .3, .2], [.2, .2, .6]), ([.1, .9], [.9, .1]), ([.6, .4, 0.], [.6, .4, 0.]), ([0., .5, .5], [.5, .5, 0.])):
        found, accepted = draws_of(sample, p, q)
        if max(abs(a - b) for a, b in zip(found, p)) > .035:
            raise WrongAnswer(f"with p = {p} and drafts from q = {q} the tokens have the frequencies {[round(f, 2) for f in found]}, not those of p")
        overlap = sum(map(min, p, q))
        if abs(accepted - overlap) > .035:
            raise WrongAnswer(f"with p = {p} and drafts from q = {q} a share of {accepted:.2f} is accepted, {overlap:.2f} could be: the sum of the smaller of each pair")


def best(chance, seconds, limit):
    rates = [sum(chance**i for i in range(k + 1)) / seconds[k] for k in range(limit + 1)]
    return rates.index(max(rates))


@exercise
def check_best_length(best_length):
    cases = [(chance, [1 + slope * k for k in range(9)], f"{slope} more seconds for each guess")
             for chance, slope in product((.1, .4, .7, .95), (0.003, .05, .3, 1.5))]
    cases.append((.5, [1, 1.6, 1.6, 1.6], "a first guess that is dear and others that are free"))
    cases.append((.5, [1, 1.5, 1.75], "several numbers that bring the same, of which the least is asked for"))
    for chance, seconds, what in cases:
        wanted = best(chance, seconds, len(seconds) - 1)
        got = call(best_length, chance, seconds)
        if got == wanted: continue
        def rate(k): return sum(chance**i for i in range(k + 1)) / seconds[k]
        require(isinstance(got, int) and 0 <= got < len(seconds), f"best_length must give a number from 0 to {len(seconds) - 1}, got {got!r}")
        raise WrongAnswer(f"chance {chance} and {what}: {got} guesses bring {rate(got):.2f} tokens a second, {wanted} bring {rate(wanted):.2f}")
