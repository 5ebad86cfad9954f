"Checks of the exercises of the appendix on drawing."
import random

from . import call, exercise, expect, require


@exercise
def check_owner_of_slot(owner_of_slot):
    tables = {"A": ([2, 0, 5], 9), "B": ([3], 4), "C": ([], 0)}
    real = {}
    for name, (table, num_tokens) in tables.items():
        for position in range(num_tokens): real[table[position // 4]*4 + position % 4] = (name, position)
    for slot in (8, 0, 20, 21, 12, 15, 4, 23):
        why = f"block {slot // 4} is in a table, but the text ends before this slot" if slot in (21, 23) else ""
        expect(owner_of_slot, (tables, slot, 4), real.get(slot), why)
    expect(owner_of_slot, ({"A": ([1], 2)}, 2, 2), ("A", 0), "the blocks have two slots here")


@exercise
def check_busy(busy):
    for spans, start, end, wanted, why in (
            ([(0, 10), (30, 40)], 0, 40, .5, ""), ([], 0, 5, 0.0, "nobody worked"),
            ([(0, 10), (30, 40)], 5, 35, 1/3, "only what lies between start and end counts"),
            ([(0, 100)], 20, 30, 1.0, "the span covers all of it"), ([(0, 10)], 20, 30, 0.0, "the span is over before")):
        expect(busy, (spans, start, end), wanted, why, tolerance=1e-9)


def visible(num_queries, num_keys, window):
    return sum(1 for q in range(num_keys - num_queries, num_keys) for k in range(num_keys)
               if k <= q and (window is None or k > q - window))


@exercise
def check_visible_pairs(visible_pairs):
    rng = random.Random(0)
    cases = [(1, 1, None), (4, 4, None), (3, 7, None), (3, 7, 3), (7, 7, 3), (5, 5, 100)]
    for _ in range(50):
        num_keys = rng.randint(1, 12)
        cases.append((rng.randint(1, num_keys), num_keys, rng.choice([None, 1, 2, 5])))
    for case in cases: expect(visible_pairs, case, visible(*case), "the diagonal counts, too")
    got = call(visible_pairs, 1, 1_000_000, None)
    require(got == 1_000_000, f"one query after a million tokens sees a million keys, not {got}")
