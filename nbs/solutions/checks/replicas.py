"Checks of the exercises of the chapter on replicas."
import random

from . import attempt, exercise, expect, require, show


class LostReplica(Exception):
    "A replica is dead."


@exercise
def check_computed_again(computed_again):
    for prompt, delivered, known, size in ((100, 50, 0, 16), (100, 50, 96, 16), (100, 0, 96, 16), (96, 0, 96, 16), (96, 1, 96, 16), (33, 7, 32, 16), (16, 0, 16, 4)):
        total = prompt + delivered
        wanted = total - min(known, (total - 1) // size * size)
        expect(computed_again, (prompt, delivered, known, size), wanted,
               f"the text has {total} tokens, of which at most {(total - 1) // size} full blocks can be shared, so that one token is left")


@exercise
def check_join_reports(join_reports):
    good = [([], []), ([(0, [1, 2]), (2, [3])], [1, 2, 3]), ([(0, [1, 2]), (0, [1, 2])], [1, 2]), ([(0, [1, 2]), (1, [2, 3])], [1, 2, 3]),
            ([(0, [1]), (1, [2]), (0, [1])], [1, 2]), ([(0, [5, 5, 5]), (2, [5, 5])], [5, 5, 5, 5]), ([(0, [1, 2, 3]), (1, [2])], [1, 2, 3]),
            ([(0, [])], []), ([(0, [1, 2]), (2, [])], [1, 2])]
    for reports, wanted in good: expect(join_reports, (reports,), wanted, "what is known already is dropped, what is new is appended")
    for reports, what in (([(1, [2])], "a gap before its first token"), ([(0, [1]), (3, [4])], "a gap"), ([(0, [1]), (2, [3]), (1, [2])], "a gap when the second comes"),
                          ([(0, [1, 2]), (1, [9])], "a token that contradicts"),
                          ([(0, [1, 2]), (0, [1, 3, 4])], "a token that contradicts")):
        try: got = join_reports([(start, list(tokens)) for start, tokens in reports])
        except ValueError: continue
        except Exception as error: require(False, f"join_reports({show(reports)}) raises {type(error).__name__}, expected ValueError", f"there is {what}")
        require(False, f"join_reports({show(reports)}) gives {show(got)}, expected ValueError", f"there is {what}")


def token(key, position): return (hash((key, position)) % 1000) + 1


class MortalReplica:
    "Answers by key and position, as a seed does; dies in its `lives`-th step, if that is not None."
    def __init__(self, lives): self.lives, self.held, self.num_steps = lives, {}, 0

    def step(self, added):
        self.num_steps += 1
        if self.num_steps > 500: raise RuntimeError("500 steps, and no end; is there a sequence that no replica has?")
        if self.lives is not None and self.num_steps >= self.lives: raise LostReplica("it is dead")
        for key, tokens, wanted in added: self.held[key] = [len(tokens), wanted]
        said = {}
        for key, place in self.held.items():
            if place[0] >= place[1]: continue
            said[key] = token(key, place[0])
            place[0] += 1
        return said


@exercise
def check_answer_all(answer_all):
    rng = random.Random(0)
    cases = [([None], {"a": 3}), ([None, None], {"a": 3, "b": 5, "c": 1}), ([2, None], {"a": 3, "b": 5}), ([None, 1], {"a": 3, "b": 5}), ([3, 5, None], {"a": 9, "b": 9, "c": 9})]
    for _ in range(40):
        lives = [rng.choice([None, *range(1, 8)]) for _ in range(rng.randint(1, 4))]
        cases.append((lives, {f"r{i}": rng.randint(1, 9) for i in range(rng.randint(1, 6))}))
    for lives, prompts in cases:
        if None not in lives: lives = [*lives, None]
        case = f"answer_all, with replicas that die in step {lives} (None: never) and {prompts}"
        got = attempt(case, answer_all, [MortalReplica(n) for n in lives], dict(prompts))
        require(isinstance(got, dict) and got.keys() == prompts.keys(), f"{case} gives {show(got)}", "there is to be a list of tokens for each key")
        for key, n in prompts.items():
            wanted = [token(key, i) for i in range(n)]
            lost = "a token is there twice" if len(got[key]) > n else "tokens are missing" if len(got[key]) < n else "a token is at a wrong place"
            require(list(got[key]) == wanted, f"{case}: the answer to {key} is {show(got[key])}, expected {show(wanted)}",
                    f"{lost}; a sequence goes to another replica with the tokens that were returned, and with no others")
    try: answer_all([MortalReplica(2), MortalReplica(1)], {"a": 9})
    except LostReplica: return
    except Exception as error: require(False, f"when all are dead, answer_all raises {type(error).__name__}, expected LostReplica")
    require(False, "when all are dead, answer_all returns, expected LostReplica")
