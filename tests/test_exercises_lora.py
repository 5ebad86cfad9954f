"""The exercises of the part "Serving, next": each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import pytest
import torch

from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer
from solutions.checks import lora

MODULES = [lora]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- 32, LoRA

right(lora.check_adapter_numbers)(lambda shapes, layers, rank: sum(sum(shape) for shape in shapes) * rank * layers)
wrong(lora.check_adapter_numbers, "gives 13271040, expected 460800")(lambda shapes, layers, rank: layers * sum(o * i for o, i in shapes))
wrong(lora.check_adapter_numbers, "gives 15360, expected 460800")(lambda shapes, layers, rank: rank * sum(o + i for o, i in shapes))
wrong(lora.check_adapter_numbers, "gives 276480, expected 460800")(lambda shapes, layers, rank: layers * rank * sum(i for _, i in shapes))


@right(lora.check_by_mask)
def _(x, slots, a, b):
    mine = torch.nn.functional.one_hot(slots + 1, len(a) + 1)[:, 1:].to(x.dtype)
    return torch.einsum("ni,sri,ns,sro->no", x, a, mine, b)


def masked(x, slots, a, b, mask):
    answers = (x @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])
    return (answers * mask(slots, len(a))[:, :, None]).flatten(1) @ b.flatten(0, 1)


wrong(lora.check_by_mask, "for row 0, expected")(lambda *args: masked(*args, lambda slots, n: torch.ones(len(slots), n)))
wrong(lora.check_by_mask, "1 row without an adapter: by_mask")(     # -1 is taken for the last slot
    lambda *args: masked(*args, lambda slots, n: slots[:, None] % n == torch.arange(n)))
wrong(lora.check_by_mask, "has shape (2, 2, 4), expected (2, 4)")(lambda x, slots, a, b: (a @ x.T).mT @ b)
wrong(lora.check_by_mask, "Is a `return` missing?")(lambda x, slots, a, b: None)


@right(lora.check_grouped)
def _(x, slots, width, run):
    order = slots.argsort(stable=True)
    added = torch.zeros(len(x), width)
    for rows in order.split(slots[order].unique_consecutive(return_counts=True)[1].tolist()):
        if slots[rows[0]] >= 0: added[rows] = run(slots[rows[0]], x[rows])
    return added


@wrong(lora.check_grouped, "slot 2 is run a second time")
def _(x, slots, width, run):
    return torch.stack([run(s, row[None])[0] if s >= 0 else torch.zeros(width) for s, row in zip(slots, x)])


@wrong(lora.check_grouped, "there is no slot -1")
def _(x, slots, width, run):
    added = torch.zeros(len(x), width)
    for s in slots.unique(): added[slots == s] = run(s, x[slots == s])
    return added


@wrong(lora.check_grouped, "is run without rows")
def _(x, slots, width, run):
    added = torch.zeros(len(x), width)
    for s in range(int(slots.max()) + 1): added[slots == s] = run(s, x[slots == s])
    return added


@wrong(lora.check_grouped, "6 rows, 3 slots: grouped gives")
def _(x, slots, width, run):            # sorted, and not put back
    wanted = [s for s in slots.unique().tolist() if s >= 0]
    parts = [x.new_zeros(int((slots < 0).sum()), width)] + [run(s, x[slots == s]) for s in wanted]
    return torch.cat(parts)


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)
