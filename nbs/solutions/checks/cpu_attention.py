"Checks of the exercises of the chapter on attention in tiles."
import torch

from nano_vllm.attention import make_batch
from nano_vllm.cpu_attention import ALL_SOURCE, TiledAttention, attention_kernel
from nano_vllm.cpu_kernels import CAN_BUILD, load_library
from nano_vllm.kv_blocks import ScheduledSequence, Sequence
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.workbench import timed

from . import WrongAnswer, attempt, exercise, expect, require, show


def kinds(n, rows, keys):
    "(tiles on the diagonal, tiles in the past) of a prompt of n tokens."
    tiles = [(row, first) for row in range(0, n, rows) for first in range(0, n, keys) if first < row + rows]
    diagonal = sum(first + keys - 1 > row for row, first in tiles)
    return diagonal, len(tiles) - diagonal


@exercise
def check_diagonal_share(diagonal_share):
    for n, rows, keys in ((24, 4, 6), (8, 8, 8), (24, 8, 8), (24, 4, 12), (1500, 8, 48), (1500, 6, 16), (40, 8, 3)):
        diagonal, past = kinds(n, rows, keys)
        expect(diagonal_share, (n, rows, keys), diagonal / (diagonal + past),
               f"{diagonal} tiles are on the diagonal and {past} in the past; those in the future are not computed", 1e-9)


@exercise
def check_bytes_read(bytes_read):
    for n, tile, dim, size in ((1, 1, 64, 4), (3, 1, 64, 4), (6, 3, 64, 4), (7, 3, 64, 4), (7, 3, 128, 2), (4000, 86, 64, 4), (50, 86, 64, 2)):
        ends = [min(end, n) for end in range(tile, n + tile, tile)]
        expect(bytes_read, (n, tile, dim, size), sum(ends) * 2 * dim * size,
               f"the tiles end before the positions {show(ends)} and each reads a key and a value of {dim} numbers for "
               "every position before its end")


@exercise
def check_find_pieces(find_pieces):
    for rows, most, why in (
            ([0, 0, 1, 2, 2, 2], 8, "a piece begins where the text changes"), ([0] * 7, 3, "a piece has at most 3 tokens"),
            ([0] * 6, 3, "two pieces are full"), ([5], 3, "a single token"),
            ([0] * 4 + [1] * 4, 3, "the pieces of the second text are counted from its own beginning"),
            ([2, 2, 0, 0, 1], 1, "a token a piece"), ([0] * 100 + [1] * 3, 86, "as in the chapter")):
        wanted = []
        for i, row in enumerate(rows):
            if i == 0 or row != rows[i - 1] or i - wanted[-1] == most: wanted.append(i)
        expect(find_pieces, (rows, most), wanted + [len(rows)], why + ", and the last number is where the last piece ends")


class Text:
    "Keys and values of one text, which it gives piece by piece, always in the same place, and counts."

    def __init__(self, end, new, width, window, scale, seed=0, anew=False):
        g = torch.Generator().manual_seed(seed)
        self.end, self.new, self.width, self.window = end, new, width, window
        self.q = torch.randn(new, 8, generator=g) * scale
        self.keys, self.values = torch.randn(2, end, 8, generator=g)
        self.taken, self.place, self.anew = [], torch.empty(2, width, 8), anew

    def take(self, first, last):
        if not 0 <= first < last <= self.end: raise WrongAnswer(f"take({first}, {last}), but positions go from 0 to before {self.end}")
        if last - first > self.width: raise WrongAnswer(f"take({first}, {last}) is more than {self.width} positions")
        self.taken += range(first, last)
        place = torch.empty_like(self.place) if self.anew else self.place.fill_(torch.nan)
        place[0, :last - first], place[1, :last - first] = self.keys[first:last], self.values[first:last]
        return tuple(place[:, :last - first])

    @property
    def wanted(self):
        at, p = torch.arange(self.end - self.new, self.end)[:, None], torch.arange(self.end)
        seen = p <= at
        if self.window: seen &= p > at - self.window
        return (self.q @ self.keys.T).masked_fill(~seen, -torch.inf).softmax(-1) @ self.values


CASES = {"a prompt of 8 tokens, 4 keys at a time": (8, 8, 4, None, 1.), "a single token": (1, 1, 4, None, 1.),
         "a prompt of 11 tokens, 4 keys at a time": (11, 11, 4, None, 1.),
         "3 new tokens after 20 others, 8 keys at a time": (23, 3, 8, None, 1.),
         "10 tokens with scores in the hundreds": (10, 10, 4, None, 60.),
         "20 new tokens after 30 others, a window of 5, 4 keys at a time": (50, 20, 4, 5, 1.),
         "a prompt of 12 tokens, a window of 1, 4 keys at a time": (12, 12, 4, 1, 1.),
         "2 new tokens after 60 others, a window of 10, 4 keys at a time": (62, 2, 4, 10, 1.)}


@exercise
def check_attend_tile(attend_tile):
    for name, (end, new, width, window, scale) in CASES.items():
        text = Text(end, new, width, window, scale)
        got = attempt(f"{name}: attend_tile", attend_tile, text.q.clone(), text.take, end, width, window)
        require(torch.is_tensor(got), f"{name}: gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == text.q.shape, f"{name}: the shape is {tuple(got.shape)}, expected {tuple(text.q.shape)}")
        require(len(set(text.taken)) == len(text.taken), f"{name}: some positions are taken twice", "all rows share a key that has been taken")
        why = "a row sees the positions up to its own, in a window only the last ones, and old sums shrink when a better score comes"
        if got.isnan().any():
            why = "minus infinity less minus infinity is no number: some row has seen nothing yet" if window else "e to the power of a large score is infinite"
        patient = Text(end, new, width, window, scale, anew=True)
        if torch.allclose(attend_tile(patient.q.clone(), patient.take, end, width, window), text.wanted, atol=1e-3 if scale > 1 else 1e-5):
            why = "each `take` overwrites what the one before gave: use keys and values before you take more"
        if not torch.allclose(got, text.wanted, atol=1e-3 if scale > 1 else 1e-5):
            row = int(((got - text.wanted).abs().amax(1) > 1e-5).nonzero()[0]) if not got.isnan().any() else int(got.isnan().any(1).nonzero()[0])
            raise WrongAnswer(f"{name}: row {row} gives {show(got[row, :3])} ..., expected {show(text.wanted[row, :3])} ...: {why}")
        start = max(0, end - new - window + 1) if window else 0
        require(not window or min(text.taken) > start - width,
                f"{name}: takes position {min(text.taken)}, but no row sees anything before {start}")
    return "and every key was taken once for all rows"


@exercise
def check_finished(finished):
    for work, cores, wanted, why in (
            ([3, 2, 1], 1, 6, "one core does everything"), ([3, 2, 1], 2, 3, "the second core takes the last piece as well"),
            ([1, 2, 3], 2, 4, "the first core is free at 1 and takes the piece of 3"), ([5], 4, 5, "three cores have nothing to do"),
            ([2, 2, 2], 2, 4, "the third piece waits for a core"), ([1, 1, 1, 1, 4], 2, 6, "the long piece begins at 2"),
            ([4, 1, 1, 1, 1], 2, 4, "one core has the long piece, the other all short ones"),
            ([], 3, 0, "there is no work")):
        expect(finished, (work, cores), wanted, why)


def step_with_few(few, new, context):
    "Seconds of attention of one layer for the last `new` tokens of a text, if fewer than `few` tokens go one by one."
    if not CAN_BUILD: return 0.0
    seq = Sequence("", list(range(context)), SamplingParams())
    seq.block_table = list(range(context // 16 + 1))
    batch = make_batch([ScheduledSequence(seq, context - new, new, samples=True)], 16)
    g = torch.Generator().manual_seed(0)
    cache, q = torch.randn(1, 2, context // 16 + 1, 16, 3, 64, generator=g), torch.randn(new, 9, 64, generator=g)
    library = load_library(ALL_SOURCE, HEAD_DIM=64, KV_HEADS=3, GROUP=3, CACHE_BITS=32, FEW=few)
    library.attend_all.argtypes = attention_kernel(64, 3, 3, 32).argtypes
    attention = TiledAttention(batch, cache, 0.125)
    attention.parts[0].kernel = lambda *sizes: library.attend_all
    return min(timed(lambda: attention(q, 0), 5) for _ in range(3))
