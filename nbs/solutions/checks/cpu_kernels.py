"Checks of the exercises of the chapter on kernels for CPUs."
import ctypes
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano_vllm.attention import make_batch
from nano_vllm.cpu_kernels import CAN_BUILD, SOURCE, VECTOR_TYPES, InPlaceAttention, call, kernels, load_library
from nano_vllm.kv_blocks import ScheduledSequence, Sequence
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.workbench import timed

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_packed_copy(packed_copy):
    for vocab, hidden, others, itemsize in ((49152, 576, 106_203_456, 4), (1000, 10, 10_000, 2), (151_936, 1024, 440_000_000, 2)):
        copy = vocab * hidden
        expect(packed_copy, (vocab, hidden, others, itemsize), [copy * itemsize, copy / (copy + others)],
               f"the embedding has {copy:,} of {copy + others:,} weights", tolerance=1e-9)


@exercise
def check_fewest_sequences(fewest_sequences):
    for cores, pieces in ((8, 1), (8, 3), (2, 3), (9, 3), (64, 8), (10, 4)):
        expect(fewest_sequences, (cores, pieces), -(-cores // pieces),
               f"{math.ceil(cores / pieces) - 1} sequences are {(math.ceil(cores / pieces) - 1) * pieces} pieces of work for {cores} cores")


@exercise
def check_pack(pack):
    for outputs, inputs, width in ((4, 3, 2), (32, 5, 16), (6, 1, 3), (16, 4, 16), (12, 7, 4)):
        weight = torch.arange(outputs)[:, None] * 100. + torch.arange(inputs)
        case = f"a weight of {outputs} outputs and {inputs} inputs: pack(weight, {width})"
        got = attempt(case, pack, weight.clone(), width)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (outputs // width, inputs, width), f"{case} has shape {tuple(got.shape)}, expected {(outputs // width, inputs, width)}")
        wanted = torch.stack([weight[first:first + width].T for first in range(0, outputs, width)])
        if not torch.equal(got, wanted):
            tile, i, j = (got != wanted).nonzero()[0].tolist()
            raise WrongAnswer(f"{case}: number {j} of input {i} in tile {tile} is that of output {got[tile, i, j] // 100:.0f} and input "
                              f"{got[tile, i, j] % 100:.0f}, expected output {tile * width + j} and input {i}")
        require(got.is_contiguous(), f"{case} has the right numbers, but memory has them in the old order", "it is a view of the weight")


class NoFloat64(TorchDispatchMode):
    "Whatever PyTorch computes meanwhile must not be float64."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        got = function(*args, **(kwargs or {}))
        if torch.is_tensor(got) and got.dtype == torch.float64:
            raise WrongAnswer(f"`{function.__name__.partition('.')[0]}` gives float64: half as many of these fit into a register; float32 will do")
        return got


@exercise
def check_split_exponent(split_exponent):
    ln2 = math.log(2)
    for name, x in {"numbers from -1 to 0": torch.linspace(-1, 0, 101), "numbers from -87 to 0": torch.linspace(-87, 0, 10_001),
                    "zero": torch.zeros(1)}.items():
        with NoFloat64(): got = attempt(f"{name}: split_exponent", split_exponent, x.clone())
        require(isinstance(got, (tuple, list)) and len(got) == 2 and all(map(torch.is_tensor, got)),
                f"{name}: split_exponent gives {show(got)}, not (n, f)", "Is a `return` missing?" if got is None else "")
        n, f = (part.double() for part in got)
        require(n.shape == f.shape == x.shape, f"{name}: the shapes are {tuple(n.shape)} and {tuple(f.shape)}, expected {tuple(x.shape)}")
        require(torch.equal(n, n.round()), f"{name}: n has numbers that are not whole, such as {show(n[n != n.round()][:1])}")
        at = int(f.abs().argmax())
        require(f.abs().max() <= ln2 / 2 * 1.001, f"{name}: for x = {x[at]:.4f} n is {n[at]:.0f} and f is {f[at]:.4f}", f"|f| is at most {ln2 / 2:.4f}")
        error = (f - (x.double() - n * ln2)).abs()
        at = int(error.argmax())
        require(error[at] <= 1e-7, f"{name}: for x = {x[at]:.4f} and n = {n[at]:.0f}, f is off by {error[at]:.1e}",
                "1e-7 is allowed; n times ln 2 has been rounded before it was subtracted")


@exercise
def check_page_scores(source):
    require(isinstance(source, str), f"PAGE_SCORES is {show(source)}, not a string of C++")
    if not CAN_BUILD: return "as far as one can see without a compiler"
    library = attempt("PAGE_SCORES, compiled behind VECTOR_TYPES,", lambda: load_library(VECTOR_TYPES + source, HEAD_DIM=32))
    require(hasattr(library, "scores"), 'there is no function `scores` in it; is `extern "C"` missing?')
    for length, size in ((1, 4), (5, 4), (16, 16), (37, 16), (64, 4), (33, 1)):
        g = torch.Generator().manual_seed(length)
        blocks = -(-length // size)
        table = torch.randperm(blocks + 5, generator=g)[:blocks]
        q, used = torch.randn(32, generator=g), torch.randn(length, 32, generator=g)
        keys = torch.full((200 * size + 1000, 32), torch.nan)          # more than any mistake reads
        at = table[torch.arange(length) // size] * size + torch.arange(length) % size
        keys[at] = used
        out = torch.full((length + 64,), torch.nan)
        out[length:] = -7.0
        call(library.scores, q, keys, table, ctypes.c_int64(size), ctypes.c_int64(length), out)
        case, wanted = f"a text of {length} tokens in blocks of {size}, table {show(table)}", used @ q
        bad = ((out[:length] - wanted).abs() <= 1e-4).logical_not()
        if bad.any():
            p = int(bad.nonzero()[0])
            raise WrongAnswer(f"{case}: the score of position {p} is {out[p]:.3f}, expected {wanted[p]:.3f}: its key is in slot {p % size} of block "
                              f"{int(table[p // size])}; slots without a token hold NaN")
        require(bool((out[length:] == -7).all()), f"{case}: something is written behind the last score")


def microseconds_of_decode(source=SOURCE, lens=(2000,) * 8):
    "Microseconds of attention of one layer for decoding texts of `lens` tokens, by kernels compiled from `source`; 0 without a compiler."
    if not CAN_BUILD: return 0.0
    g, scheduled, width = torch.Generator().manual_seed(0), [], max(lens) // 16 + 1
    blocks = torch.randperm(width * len(lens), generator=g).tolist()
    for i, n in enumerate(lens):
        seq = Sequence(str(i), list(range(n)), SamplingParams())
        seq.block_table = blocks[i * width:(i + 1) * width]
        scheduled.append(ScheduledSequence(seq, n - 1, 1, samples=True))
    cache, q = torch.randn(1, 2, width * len(lens), 16, 3, 64, generator=g), torch.randn(len(lens), 9, 64, generator=g)
    attention = InPlaceAttention(make_batch(scheduled, 16), cache, 0.125)
    decode = load_library(source, HEAD_DIM=64, KV_HEADS=3, GROUP=3, CACHE_BITS=32).decode
    decode.argtypes = kernels(64, 3, 3, 32).decode.argtypes
    part, = attention.parts
    part.kernel = lambda *sizes: decode
    return 1e6 * min(timed(lambda: attention(q, 0), 20) for _ in range(3))
