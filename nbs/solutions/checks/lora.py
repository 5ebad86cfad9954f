"Checks of the exercises of the chapter on LoRA."
import torch

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_adapter_numbers(adapter_numbers):
    demo = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    for shapes, layers, rank in (([(576, 576), (192, 576)], 30, 8), ([(5, 3)], 1, 2), (demo, 30, 8), (demo, 30, 16)):
        expect(adapter_numbers, (shapes, layers, rank), layers * rank * sum(o + i for o, i in shapes),
               "A of a matrix with o outputs and i inputs holds rank x i numbers, and B o x rank")


def case(slots, num_slots, rank=3, inputs=5, outputs=4, seed=0):
    "x, a and b for rows with these slots; and what a loop over the rows adds, in float64."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), inputs, generator=g)
    a, b = torch.randn(num_slots, rank, inputs, generator=g), torch.randn(num_slots, rank, outputs, generator=g)
    wanted = torch.zeros(len(slots), outputs, dtype=torch.float64)
    for i, slot in enumerate(slots):
        if slot >= 0: wanted[i] = b[slot].double().T @ (a[slot].double() @ x[i].double())
    return x, torch.tensor(slots), a, b, wanted


CASES = {"2 rows, one adapter each": ([0, 1], 2), "1 row without an adapter": ([-1], 2), "6 rows, 3 slots": ([2, -1, 0, 2, 2, 0], 3),
         "the last slot of 4": ([3, 3, -1], 4)}


def compare(name, got, wanted, slots):
    require(torch.is_tensor(got), f"{name} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
    require(got.shape == wanted.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    bad = (~((got.double() - wanted).abs() <= 1e-4)).any(1)
    if not bad.any(): return
    i = int(bad.nonzero()[0])
    why = "it wants no adapter" if slots[i] < 0 else f"it wants the adapter in slot {slots[i]}"
    raise WrongAnswer(f"{name} gives {show(got[i, :3])} ... for row {i}, expected {show(wanted[i, :3].float())} ...: {why}")


@exercise
def check_by_mask(by_mask):
    for name, (slots, num_slots) in CASES.items():
        x, wants, a, b, wanted = case(slots, num_slots)
        got = attempt(f"{name}: by_mask", by_mask, x.clone(), wants.clone(), a.clone(), b.clone())
        compare(f"{name}: by_mask", got, wanted, slots)


@exercise
def check_grouped(grouped):
    for name, (slots, num_slots) in CASES.items():
        x, wants, a, b, wanted = case(slots, num_slots, seed=1)
        asked = []

        def run(slot, rows):
            slot = int(slot)
            if not 0 <= slot < num_slots: raise WrongAnswer(f"{name}: there is no slot {slot}")
            if rows.ndim != 2 or rows.shape[1] != x.shape[1]:
                raise WrongAnswer(f"{name}: slot {slot} gets rows of shape {tuple(rows.shape)}, expected (n, {x.shape[1]})")
            if not len(rows): raise WrongAnswer(f"{name}: slot {slot} is run without rows; its numbers would be read for nothing")
            if len(rows) > slots.count(slot): raise WrongAnswer(f"{name}: slot {slot} gets {len(rows)} rows, and only {slots.count(slot)} want it")
            if slot in asked: raise WrongAnswer(f"{name}: slot {slot} is run a second time, and its numbers would be read again")
            asked.append(slot)
            return rows @ a[slot].T @ b[slot]

        got = attempt(f"{name}: grouped", grouped, x.clone(), wants.clone(), b.shape[2], run)
        compare(f"{name}: grouped", got, wanted, slots)
    return "and each adapter that is wanted was run once"
