"Checks of the exercises of the chapter on Triton kernels. Kernels run in the interpreter, so none of them needs a GPU."
import math
import numbers

import torch

from . import attempt, call, exercise, expect, require, show
from .layers import near


def state_of(scores, values):
    "(best, mass, acc) of some scores; of none, what one begins with."
    if len(scores) == 0: return -math.inf, 0., torch.zeros(values.shape[1])
    best = scores.max()
    p = (scores - best).exp()
    return best.item(), p.sum().item(), p @ values


@exercise
def check_join(join):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(9, 3, generator=g)
    for says, scores, cuts in (("two halves", torch.randn(9, generator=g), [4]), ("one part", torch.randn(9, generator=g), []),
                               ("the best score in the second part", torch.arange(9.), [3, 6]), ("large scores", 100 * torch.randn(9, generator=g), [2, 5]),
                               ("scores around -1000", torch.randn(9, generator=g) - 1000, [1, 8]), ("an empty part in front", torch.randn(9, generator=g), [0]),
                               ("an empty part at the end", torch.randn(9, generator=g), [4, 9])):
        borders = [0, *cuts, 9]
        states = [state_of(scores[a:b], values[a:b]) for a, b in zip(borders, borders[1:])]
        case = f"join of {says}"
        got = call(join, states, case=case)
        require(isinstance(got, (tuple, list)) and len(got) == 3, f"{case} gives {show(got)}, not (best, mass, acc)")
        best, mass, acc = got
        for name, value in dict(best=best, mass=mass).items():
            require(isinstance(value, numbers.Real) or getattr(value, "shape", None) == (), f"{case} gives {show(value)} for {name}, not a number")
        require(float(best) == scores.max().item(), f"{case} has the best score {float(best)}, expected {scores.max().item()}")
        wanted = (scores - scores.max()).exp()
        require(abs(float(mass) - wanted.sum().item()) < 1e-4 * 9, f"{case} has the mass {float(mass)}, expected {wanted.sum().item()}",
                "a part's mass is relative to its own best score")
        near(f"acc of {case}", acc, wanted @ values, 1e-4 * values.abs().sum())


@exercise
def check_address(address):
    for position, table, size, head, heads, dim in ((37, [4, 2, 9], 16, 1, 3, 64), (0, [5], 16, 0, 1, 64), (3, [2, 0], 2, 0, 2, 8), (4, [1, 7, 0], 2, 2, 3, 8)):
        block, slot = table[position // size], position % size
        expect(address, (position, table, size, head, heads, dim), ((block*size + slot) * heads + head) * dim,
               f"the key lies in slot {slot} of block {block}, and each slot holds {heads} heads of {dim} numbers")


def launch(case, kernel, grid, *args):
    "Run `kernel` in the interpreter; WrongAnswer with its line if it raises anything."
    require(hasattr(kernel, "fn"), f"{show(kernel)} is no kernel", "is @triton.jit missing?")
    require(type(kernel).__name__ != "JITFunction", "the kernel would be compiled for a GPU",
            "TRITON_INTERPRET has to be 1 in the environment before the kernel is defined")
    attempt(case, lambda: kernel[grid](*args))


@exercise
def check_row_softmax(row_softmax):
    g = torch.Generator().manual_seed(0)
    for rows, n, width, scale in ((3, 4, 4, 1), (2, 5, 8, 1), (1, 1, 1, 1), (4, 33, 64, 1000)):
        x, out = scale * torch.randn(rows, n, generator=g), torch.full((rows*n + width,), torch.nan)
        if n == 5: x -= 10                          # a zero from behind the end would be the largest
        case = f"row_softmax of {rows} rows of {n} numbers" + f", up to {x.abs().max():.0f}" * (scale > 1)
        launch(case, row_softmax, (rows,), x, out, n, width)
        require(bool(out[rows*n:].isnan().all()), f"{case} writes behind the last row", "the lanes from n on are to store nothing")
        require(not out[:rows*n].isnan().any(), f"{case} gives nan", "subtract the largest number first: its exponential is then 1, and no other is larger")
        near(case, out[:rows*n].view(rows, n), x.softmax(1), 1e-5, "the lanes from n on are no numbers of the row")


def paged_texts(lengths, heads, dim, size, generator):
    "(keys, values, tables, texts): a pool with NaN behind the end of each text, and each text's keys and values."
    blocks = [-(-n // size) for n in lengths]
    pool = torch.full((2, sum(blocks) + 2, size, heads, dim), torch.nan)
    free, texts = torch.randperm(sum(blocks) + 2, generator=generator).tolist(), []
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int64)
    for i, n in enumerate(lengths):
        tables[i, :blocks[i]] = torch.tensor([free.pop() for _ in range(blocks[i])])
        texts.append(torch.randn(2, n, heads, dim, generator=generator))
        for p in range(n): pool[:, tables[i, p // size], p % size] = texts[i][:, p]
    return pool, tables, texts


@exercise
def check_window_head(window_head):
    from nano_vllm.triton_kernels import LOG2_E, counting
    g, heads, group, dim, size = torch.Generator().manual_seed(0), 2, 2, 16, 4
    for lengths, window in (([9], 100), ([9, 3], 5), ([13, 8, 1], 6), ([12], 1), ([16], 4)):
        pool, tables, texts = paged_texts(lengths, heads, dim, size, g)
        q = torch.randn(len(lengths), heads * group, dim, generator=g)
        out = torch.full_like(q, torch.nan)
        case = f"window_head for texts of {lengths} tokens in blocks of {size}, with a window of {window},"
        with counting(pool) as count:
            launch(case, window_head, (len(lengths), heads * group), q, *pool, out, tables, torch.tensor(lengths, dtype=torch.int32),
                   tables.stride(0), LOG2_E / math.sqrt(dim), window, heads, group, size, dim)
        for i, text in enumerate(texts):
            k, v = (x[-window:].repeat_interleave(group, 1) for x in text)
            p = (torch.einsum("hd,nhd->hn", q[i], k) / math.sqrt(dim)).softmax(1)
            near(f"{case} text {i}", out[i], torch.einsum("hn,nhd->hd", p, v), 1e-5, f"it sees its last {min(window, lengths[i])} keys")
        least = sum(min(n, window) for n in lengths) * heads * group * dim * 2 * pool.itemsize
        require(count["bytes"] == least, f"{case} reads {count['bytes']} bytes of keys and values, expected {least}",
                "a key outside the window is not to be read: begin at the window's first block, and mask the keys before the window")
