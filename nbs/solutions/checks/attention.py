"Checks of the exercises of the chapter on paged attention."
import numpy as np
import torch

from . import WrongAnswer, attempt, exercise, expect, require, same, show


@exercise
def check_intensity(intensity):
    for n, heads, kv_heads, itemsize in ((1, 9, 3, 4), (1, 9, 3, 2), (67, 9, 3, 4), (1, 32, 8, 2), (8, 16, 16, 2)):
        wanted = 2 * n * heads / (kv_heads * itemsize)
        expect(intensity, (n, heads, kv_heads, itemsize), wanted,
               f"for each number of a head and each token of the context, {n} x {heads} query heads do 4 operations, and "
               f"{kv_heads} KV heads have a key and a value of {itemsize} bytes", tolerance=1e-9)


@exercise
def check_chunk_mask(chunk_mask):
    for new, context in ((3, 7), (4, 4), (1, 5), (1, 1), (2, 3)):
        queries, keys = torch.arange(context - new, context), torch.arange(context)
        wanted = keys <= queries[:, None]
        got = attempt(f"chunk_mask({new}, {context})", chunk_mask, new, context)
        require(torch.is_tensor(got), f"chunk_mask({new}, {context}) gives {show(got)}, not a tensor")
        require(got.shape == wanted.shape and got.dtype == torch.bool,
                f"chunk_mask({new}, {context}) has shape {tuple(got.shape)} and dtype {got.dtype}, "
                f"expected {tuple(wanted.shape)} and torch.bool")
        if same(got, wanted): continue
        row, key = (got != wanted).nonzero()[0].tolist()
        verb = "sees" if got[row, key] else "does not see"
        raise WrongAnswer(f"in chunk_mask({new}, {context}) query {row} {verb} key {key}: it stands at position "
                          f"{context - new + row} of the text and sees the keys up to its own")


class Blocks:
    "Keys and values in blocks of a pool, with NaN where nothing was written; counts what is read."

    def __init__(self, length, block_size, dim=8, scale=1., seed=0):
        g = torch.Generator().manual_seed(seed)
        self.length, self.block_size = length, block_size
        self.q = torch.randn(dim, generator=g) * scale
        self.keys, self.values = torch.randn(2, length, dim, generator=g)
        num_blocks = -(-length // block_size)
        self.table = (torch.randperm(num_blocks + 3, generator=g)[:num_blocks]).tolist()
        pool = torch.full((2, num_blocks + 3, block_size, dim), torch.nan)
        for p in range(length):
            pool[:, self.table[p // block_size], p % block_size] = torch.stack([self.keys[p], self.values[p]])
        self.pool, self.reads = pool, []

    def read(self, block):
        self.reads.append(block)
        if not 0 <= block < self.pool.shape[1]: raise WrongAnswer(f"there is no block {block}")
        keys, values = self.pool[:, block].clone()
        return keys, values

    @property
    def wanted(self):
        return (self.keys @ self.q).softmax(0) @ self.values

    def ask(self, attend):
        return attend(self.q.clone(), self.read, list(self.table), self.length)


CASES = {"a text of 8 tokens in 2 blocks of 4": (8, 4, 1.), "a text of 3 tokens in a block of 4": (3, 4, 1.),
         "a text of 9 tokens in 3 blocks of 4, the last with 1 token": (9, 4, 1.), "a text of 1 token": (1, 4, 1.),
         "a text of 50 tokens in blocks of 16": (50, 16, 1.),
         "a text of 40 tokens with scores in the hundreds": (40, 8, 50.)}


@exercise
def check_attend_blocks(attend_blocks):
    for name, (length, size, scale) in CASES.items():
        for seed in range(3):
            blocks = Blocks(length, size, scale=scale, seed=seed)
            got = attempt(f"{name}: attend_blocks", blocks.ask, attend_blocks)
            require(torch.is_tensor(got), f"{name}: gives {show(got)}, not a tensor")
            require(got.shape == blocks.q.shape, f"{name}: the shape is {tuple(got.shape)}, expected {tuple(blocks.q.shape)}")
            require(set(blocks.reads) <= set(blocks.table),
                    f"{name}: reads the blocks {blocks.reads}, but its table is {blocks.table}")
            why = "only the sums of all blocks together give the weights, and each is relative to the largest score so far"
            if got.isnan().any():
                why = ("a slot that holds no token was read, or e to the power of a large score is infinite" if scale > 1
                       else "slots past the text's end hold NaN, and zero times NaN is NaN")
            require(torch.allclose(got.float(), blocks.wanted, atol=1e-3 if scale > 1 else 1e-4),
                    f"{name}, table {blocks.table}: gives {show(got[:3])} ..., expected {show(blocks.wanted[:3])} ...", why)
            require(sorted(blocks.reads) == sorted(blocks.table),
                    f"{name}: reads the blocks {blocks.reads}, though each of {blocks.table} needs to be read once")
    return "and each block was read once"


def slots_of_groups(lens, groups):
    return sum(len(group) * max(lens[i] for i in group) for group in groups if len(group))


def best_slots(lens):
    ordered = sorted(lens)
    return min(k * ordered[max(k - 1, 0)] + (len(lens) - k) * ordered[-1] for k in range(len(lens)))


@exercise
def check_two_groups(two_groups):
    rng = np.random.default_rng(0)
    cases = [[100, 8000, 90, 150, 5000], [16, 16, 16, 512], [1, 2, 3, 4, 5, 100], [7, 7], [5], [10, 1, 10, 1, 10, 30]]
    cases += [rng.integers(1, 600, size=n).tolist() for n in (8, 9, 20, 33)]
    for lens in cases:
        case = f"two_groups({show(lens)})"
        got = attempt(case, two_groups, list(lens))
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        groups = attempt(f"{case} gives {show(got)}; reading it as lists of indices",
                         lambda: [[int(i) for i in group] for group in got])
        require(len(groups) == 2, f"{case} gives {len(groups)} groups, expected two (one of them may be empty)")
        require(sorted(groups[0] + groups[1]) == list(range(len(lens))),
                f"{case} gives {groups}; together they must have each index from 0 to {len(lens) - 1} once")
        slots, best = slots_of_groups(lens, groups), best_slots(lens)
        require(slots == best, f"{case} gives {groups}, which gathers {slots:,} slots; {best:,} are enough",
                "each text of a group is padded to the longest in it")


def online(q, read, table, context, stop=lambda table, context, size: len(table), cut=True, stable=True,
           start=lambda i, table: table[i], masked=False):
    "Attention block by block; the arguments after `context` break it."
    first = read(start(0, table))                # each block is read once, for the size as well
    size = first[0].shape[0]
    best, total, sums = torch.tensor(-torch.inf), torch.tensor(0.), torch.zeros_like(q)
    for i in range(stop(table, context, size)):
        keys, values = read(start(i, table)) if i else first
        left = min(size, context - i * size)
        if cut: keys, values = keys[:left], values[:left]
        scores = keys @ q
        if masked: scores = scores.masked_fill(torch.arange(size) >= left, -torch.inf)
        new = torch.maximum(best, scores.max()) if stable else torch.tensor(0.)
        weights, shrink = (scores - new).exp(), (best - new).exp() if stable else torch.tensor(1.)
        total, sums, best = total * shrink + weights.sum(), sums * shrink + weights @ values, new
    return sums / total


FAULTS = {
    "forgets the last block, where it is not full": dict(stop=lambda table, context, size: max(1, context // size)),
    "reads the last block to its end, whatever lies there": dict(cut=False),
    "gives slots past the end the weight zero, but multiplies what lies there": dict(cut=False, masked=True),
    "takes the exponential of large scores as they are": dict(stable=False),
    "reads blocks 0, 1, 2, ... instead of those in the table": dict(start=lambda i, table: i)}


@exercise
def check_is_right(is_right):
    def right(q, read, table, context): return online(q, read, table, context)
    got = attempt("is_right of a right function", is_right, right)
    require(got is not None, "is_right gives None. Is a `return` missing?")
    require(attempt(f"is_right gives {show(got)}; asking whether that is true", bool, got), "your test calls a right function wrong. Is its tolerance too small, or do its own keys hold NaN "
                 "where there is a token?")
    for fault, changes in FAULTS.items():
        def wrong(q, read, table, context): return online(q, read, table, context, **changes)
        try: passed = bool(is_right(wrong))
        except Exception: passed = False             # a test that crashes has noticed, too
        require(not passed, f"your test passes a function that {fault}")
    return f"it notices all {len(FAULTS)} faults"
