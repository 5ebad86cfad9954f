"""The exercises of the parts "Faster" and "Many devices": each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import math
import pickle
from collections import Counter, deque
from fractions import Fraction

import numpy as np
import pytest
import torch

from nano_vllm.cpu_kernels import CAN_BUILD, address
from nano_vllm.layers import rms_norm, rotate, silu_and_mul
from solutions.checks import WrongAnswer, bfloat16, cpu_attention, cpu_kernels, cpu_products, cpu_steps, fusions, moe, overlapped_loop, parallel, quantization, sampling_kernels
from exercise_answers import Answers, assert_all_tried, checks_of, kernel_of, name_of, try_answer

MODULES = [cpu_kernels, cpu_products, bfloat16, quantization, cpu_attention, cpu_steps, overlapped_loop, fusions, sampling_kernels, parallel, moe]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- kernels for CPUs

right(cpu_kernels.check_packed_copy)(lambda vocab, hidden, others, size: [size * hidden * vocab, 1 / (1 + others / (vocab * hidden))])
wrong(cpu_kernels.check_packed_copy, "has 28,311,552 of 134,515,008 weights")(
    lambda vocab, hidden, others, size: (vocab * hidden * size, vocab * hidden / others))
wrong(cpu_kernels.check_packed_copy, "gives (28311552,")(
    lambda vocab, hidden, others, size: (vocab * hidden, vocab * hidden / (vocab * hidden + others)))

right(cpu_kernels.check_packed_copy)(lambda vocab, hidden, others, size: (np.int64(vocab * hidden * size), np.float64(vocab * hidden) / (vocab * hidden + others)))

right(cpu_kernels.check_fewest_sequences)(lambda cores, pieces: math.ceil(cores / pieces))
wrong(cpu_kernels.check_fewest_sequences, "(8, 3) gives 2, expected 3")(lambda cores, pieces: cores // pieces)
wrong(cpu_kernels.check_fewest_sequences, "(9, 3) gives 4, expected 3")(lambda cores, pieces: cores // pieces + (pieces > 1))
wrong(cpu_kernels.check_fewest_sequences, "2 sequences are 6 pieces of work for 8 cores")(lambda cores, pieces: cores)


@right(cpu_kernels.check_pack)
def _(weight, width): return torch.stack([rows.T.contiguous() for rows in weight.split(width)])


wrong(cpu_kernels.check_pack, "it is a view of the weight")(lambda weight, width: weight.unflatten(0, (-1, width)).transpose(1, 2))
wrong(cpu_kernels.check_pack, "is that of output 0 and input 1, expected output 1 and input 0")(
    lambda weight, width: weight.reshape(-1, weight.shape[1], width))
wrong(cpu_kernels.check_pack, "has shape (2, 2, 3), expected (2, 3, 2)")(lambda weight, width: weight.unflatten(0, (-1, width)).contiguous())


@right(cpu_kernels.check_split_exponent)
def _(x):                        # with another first part, which has few bits, too
    n = (x / math.log(2)).round()
    first = 355 / 512
    return n.int(), x - n * first - n * (math.log(2) - first)


wrong(cpu_kernels.check_split_exponent, "gives float64")(lambda x: ((x / math.log(2)).round(), (x.double() - (x / math.log(2)).round() * math.log(2)).float()))
wrong(cpu_kernels.check_split_exponent, "has been rounded before it was subtracted")(
    lambda x: ((x / math.log(2)).round(), x - (x / math.log(2)).round() * math.log(2)))
wrong(cpu_kernels.check_split_exponent, "|f| is at most 0.3466")(
    lambda x: ((x / math.log(2)).trunc(), x - (x / math.log(2)).trunc() * math.log(2)))
wrong(cpu_kernels.check_split_exponent, "not whole")(lambda x: (x / math.log(2), 0 * x))
wrong(cpu_kernels.check_split_exponent, "not (n, f)")(lambda x: x)

SCORES = """extern "C" void scores(const float* q, const float* keys, const int64_t* table, int64_t size, int64_t length, float* out) {
  for (int64_t p = 0; p < END; p++) {
    out[p] = 0;
    for (int d = 0; d < HEAD_DIM; d++) out[p] += q[d] * keys[(SLOT) * HEAD_DIM + d];
  } }"""


def scoring(slot, end="length"): return SCORES.replace("SLOT", slot).replace("END", end)


right(cpu_kernels.check_page_scores)("""
extern "C" void scores(const float* q, const float* keys, const int64_t* table, int64_t size, int64_t length, float* out) {
  for (int64_t first = 0; first < length; first += size, table++)
    for (int64_t j = 0; j < size && first + j < length; j++) {
      const floats* k = (const floats*)(keys + (*table * size + j) * HEAD_DIM);
      floats sum = {};
      for (int i = 0; i < HEAD_DIM / LANES; i++) sum += ((const floats*)q)[i] * k[i];
      float dot = 0;
      for (int i = 0; i < LANES; i++) dot += sum[i];
      out[first + j] = dot;
    } }""")
if CAN_BUILD:
    wrong(cpu_kernels.check_page_scores, "its key is in slot 0 of block")(scoring("p"))
    wrong(cpu_kernels.check_page_scores, "of 5 tokens in blocks of 4")(scoring("table[p / size] * size + p"))
    wrong(cpu_kernels.check_page_scores, "behind the last score")(scoring("table[p / size] * size + p % size", "(length + 15) / 16 * 16").replace(
        "table[p / size]", "(p < length ? table[p / size] : 0)"))
    wrong(cpu_kernels.check_page_scores, "of 1 tokens in blocks of 4, table [1]: something is written behind")(
        scoring("table[p / size] * size + p % size", "(length + size - 1) / size * size"))     # NaN, from slots without a token
    wrong(cpu_kernels.check_page_scores, "is `extern \"C\"` missing?")(scoring("p").replace('extern "C" ', ""))
wrong(cpu_kernels.check_page_scores, "PAGE_SCORES is None")(None)
wrong(cpu_kernels.check_page_scores, "not a string of C++")(7)


# ---- products of our own

right(cpu_products.check_uses_of_a_load)(lambda rows, vectors: 1 / (1/rows + 1/vectors))
wrong(cpu_products.check_uses_of_a_load, "8 numbers of x are loaded")(lambda rows, vectors: rows)
wrong(cpu_products.check_uses_of_a_load, "gives 0.4583")(lambda rows, vectors: (rows + vectors) / (rows * vectors))


@right(cpu_products.check_best_tile)
def _(registers):                # for each number of vectors, as many rows as fit
    shapes = [((registers - 1 - v) // v, v) for v in range(1, registers // 2 + 1)]
    return list(max((s for s in shapes if s[0]), key=lambda s: s[0] * s[1] / sum(s)))


wrong(cpu_products.check_best_tile, "33 in all")(lambda registers: (7, 4))
wrong(cpu_products.check_best_tile, "there is one with 2.50")(lambda registers: (8, 3))
wrong(cpu_products.check_best_tile, "(5, 5), which needs 5 x 5 registers")(lambda registers: (5, 5))
wrong(cpu_products.check_best_tile, "not (rows, vectors)")(lambda registers: 25)
wrong(cpu_products.check_best_tile, "gives (None, None), not")(lambda registers: (None, None))


@right(cpu_products.check_candidates)
def _(x, u):                     # as the kernel goes
    best, n = -math.inf, 0
    for first in range(0, len(x), 16):
        sums = []
        for logit, chance in zip(x[first:first + 16].tolist(), u[first:first + 16].tolist()):
            if chance >= math.exp(min(0, logit - best)): continue
            n += 1
            sums.append(logit - math.log(-math.log1p(-chance)))
        best = max([best, *sums])
    return n


def passing(x, u, noise=lambda u: -(-(-u).log1p()).log(), group=16, moved=True):
    best = (x + noise(u)).view(-1, group).amax(1).cummax(0).values
    if moved: best = torch.cat([torch.tensor([-torch.inf], dtype=x.dtype), best[:-1]])
    return int((u < (x - best.repeat_interleave(group)).exp()).sum())


right(cpu_products.check_candidates)(passing)
wrong(cpu_products.check_candidates, "sixteen tokens, and nothing before them")(lambda x, u: passing(x, u, moved=False))
wrong(cpu_products.check_candidates, "two groups")(lambda x, u: passing(x, u, noise=lambda u: 0))
wrong(cpu_products.check_candidates, "changes after each sixteen tokens")(lambda x, u: passing(x, u, group=1))


@right(cpu_products.check_tiled_product)
def _(x, packed, outputs):       # the weight put back into rows
    weight = packed.transpose(1, 2).flatten(0, 1)[:outputs]
    return x @ weight.T


wrong(cpu_products.check_tiled_product, "has shape (3, 12), expected (3, 10)")(lambda x, packed, outputs: torch.cat([x @ tile for tile in packed], 1))
wrong(cpu_products.check_tiled_product, "output 1 is number 1 of tile 0")(
    lambda x, packed, outputs: x @ packed.permute(2, 0, 1).flatten(0, 1)[:outputs].T)
wrong(cpu_products.check_tiled_product, "raises RuntimeError")(lambda x, packed, outputs: x @ packed.flatten(0, 1)[:outputs].T)

WRITER = """
static inline auto writer(const Matrix* m, const float* bias, float* y) {
  return [=](int64_t row, int64_t out, floats sum) { BODY };
}
"""


def writing(body): return WRITER.replace("BODY", body)


right(cpu_products.check_relu_writer)(writing("""
    for (int i = 0; i < LANES; i++) y[row * m->outputs + out + i] = std::max(0.f, sum[i] + bias[out + i]);"""))
if CAN_BUILD:
    place, biased = "*(floats*)(y + row * m->outputs + out) = ", "(sum + *(const floats*)(bias + out))"
    wrong(cpu_products.check_relu_writer, "this is the sum and the bias without the maximum")(writing(place + biased + ";"))
    wrong(cpu_products.check_relu_writer, "this is max(sum, 0) without the bias")(writing(place + "sum > 0.f ? sum : floats{};"))
    wrong(cpu_products.check_relu_writer, "this is max(sum, 0), and then the bias")(
        writing("sum = sum > 0.f ? sum : floats{};" + place + biased + ";"))
    wrong(cpu_products.check_relu_writer, "have not been written")(writing(f"floats s = {biased}; if (s[0] > 0) {place} s > 0.f ? s : floats{{}};"))
    wrong(cpu_products.check_relu_writer, "could not compile")(writing("not C++"))
wrong(cpu_products.check_relu_writer, "not a string of C++")(None)
wrong(cpu_products.check_relu_writer, "RELU_WRITE is 7")(7)


# ---- bfloat16 weights

right(bfloat16.check_tokens_per_second)(lambda weights, size, bandwidth, texts: texts / (weights * size / bandwidth))
wrong(bfloat16.check_tokens_per_second, "a step reads 4.96e+09 bytes")(lambda weights, size, bandwidth, texts: texts * bandwidth / weights)
wrong(bfloat16.check_tokens_per_second, "gives each of 8 texts a token")(lambda weights, size, bandwidth, texts: bandwidth / (weights * size))


@right(bfloat16.check_round_to_bfloat16)
def _(x):                        # the neighbours below and above, by their distance
    bits = x.view(torch.int32)
    below = bits & -65536
    rest = bits - below
    up = (rest > 0x8000) | (rest == 0x8000) & (below >> 16 & 1 == 1)
    return torch.where(up, below + 0x10000, below).view(torch.float32)


def rounded(x, add): return ((x.view(torch.int32) + add(x)) & -65536).view(torch.float32)


right(bfloat16.check_round_to_bfloat16)(lambda x: x.bfloat16().float())
wrong(bfloat16.check_round_to_bfloat16, "nearer to the one above: 0.100000001 becomes 0.0996")(lambda x: rounded(x, lambda x: 0))
wrong(bfloat16.check_round_to_bfloat16, "halfway, and the one below is even")(lambda x: rounded(x, lambda x: 0x8000))
wrong(bfloat16.check_round_to_bfloat16, "halfway, and the one above is even")(lambda x: rounded(x, lambda x: 0x7fff))
wrong(bfloat16.check_round_to_bfloat16, "gives torch.bfloat16")(lambda x: x.bfloat16())


@wrong(bfloat16.check_round_to_bfloat16, "changes what it is given")
def _(x):
    bits = x.view(torch.int32)
    bits += 0x7fff + (bits >> 16 & 1)
    bits &= -65536
    return x


@right(bfloat16.check_pair_product)
def _(x, pairs):                 # the halves put back into one weight
    low, high = (half.view(torch.float32) for half in (pairs << 16, pairs >> 16 << 16))
    return x @ torch.stack([low, high], -1).flatten(1).T


right(bfloat16.check_pair_product)(lambda x, pairs: x @ pairs.view(torch.bfloat16).float().T)
wrong(bfloat16.check_pair_product, "still has the lower one behind it")(
    lambda x, pairs: x[:, 0::2] @ (pairs << 16).view(torch.float32).T + x[:, 1::2] @ pairs.view(torch.float32).T)
wrong(bfloat16.check_pair_product, "the first input of a pair is its lower half")(
    lambda x, pairs: x[:, 1::2] @ (pairs << 16).view(torch.float32).T + x[:, 0::2] @ (pairs & -65536).view(torch.float32).T)
wrong(bfloat16.check_pair_product, "raises RuntimeError")(lambda x, pairs: x @ (pairs << 16).view(torch.float32).T)
wrong(bfloat16.check_pair_product, "`x` is rounded; it is to stay float32")(
    lambda x, pairs: x.bfloat16().float() @ pairs.view(torch.bfloat16).float().T)
wrong(bfloat16.check_pair_product, "is off by")(         # in bfloat16 throughout
    lambda x, pairs: x.bfloat16() @ pairs.view(torch.bfloat16).T)


@right(bfloat16.check_swallowed)
def _(total):                    # half a step, or the number just below it
    number = torch.tensor(total).bfloat16()
    half = (torch.nextafter(number, torch.tensor(torch.inf).bfloat16()) - number) / 2
    odd = number.view(torch.int16) & 1
    return (half.view(torch.int16) - odd).view(torch.bfloat16).item()


wrong(bfloat16.check_swallowed, "goes to the number whose last bit is 0")(lambda total: 2.**(math.floor(math.log2(total)) - 8))
wrong(bfloat16.check_swallowed, "(256.0) gives 2.0, expected 1.0")(lambda total: 2.**(math.floor(math.log2(total)) - 7))
wrong(bfloat16.check_swallowed, "(256.0) gives 0.99609375")(
    lambda total: (1 - 2**-8) * 2.**(math.floor(math.log2(total)) - 8))


# ---- eight bits

def by_adding(x, number): return (x + number).view(torch.int32).view(torch.uint8).unflatten(-1, (-1, 4))[..., 0].view(torch.int8)


right(quantization.check_round_by_adding)(lambda x: by_adding(x, 1.5 * 2**23))
right(quantization.check_round_by_adding)(lambda x: (x + 1.5 * 2**23 - 1.5 * 2**23).char())
wrong(quantization.check_round_by_adding, "negative numbers")(lambda x: by_adding(x, 2**23))
wrong(quantization.check_round_by_adding, "numbers between")(lambda x: x.char())
wrong(quantization.check_round_by_adding, "half way, which go to the even one")(lambda x: (x + 0.5).floor().char())
wrong(quantization.check_round_by_adding, "gives torch.int32, expected torch.int8")(lambda x: (x + 1.5 * 2**23).view(torch.int32))


@right(quantization.check_round_rows)
def _(x, bits):                  # row by row
    top, rows, scales = 2**(bits - 1) - 1, [], []
    for row in x:
        largest = row.abs().max().item() or 1.
        rows.append((row * (top / largest)).round().to(torch.int8))
        scales.append([largest / top])
    return torch.stack(rows), torch.tensor(scales)


def by_rows(x, bits, top=lambda bits: 2**(bits - 1) - 1, largest=lambda x: x.abs().amax(-1, keepdim=True), least=1e-30, whole=torch.round):
    scale = largest(x).clamp(min=least).expand(len(x), 1) / top(bits)
    return whole(x / scale), scale


right(quantization.check_round_rows)(by_rows)
wrong(quantization.check_round_rows, "what is 0 / 0?")(lambda *a: by_rows(*a, least=0))
wrong(quantization.check_round_rows, "gives numbers up to 128, expected at most 127")(lambda *a: by_rows(*a, top=lambda bits: 2**(bits - 1)))
wrong(quantization.check_round_rows, "the largest number of each row becomes 127")(lambda *a: by_rows(*a, largest=lambda x: x.abs().amax()))
wrong(quantization.check_round_rows, "4 bits: round_rows gives numbers up to 127")(lambda *a: by_rows(*a, top=lambda bits: 127))
wrong(quantization.check_round_rows, "becomes")(lambda *a: by_rows(*a, whole=torch.trunc))
wrong(quantization.check_round_rows, "which are not whole")(lambda *a: by_rows(*a, whole=lambda x: x))
wrong(quantization.check_round_rows, "not (numbers, scales)")(lambda x, bits: x)


@right(quantization.check_hadamard)
def _(x):                        # by halves, each rotated by itself
    n = x.shape[1]
    if n == 1: return x
    a, b = x[:, :n // 2], x[:, n // 2:]
    return torch.cat([_hadamard(a + b), _hadamard(a - b)], 1) / 2**0.5


def _hadamard(x): return (x.double() @ quantization.hadamard_matrix(x.shape[1])).float()


def in_rounds(x, factor=lambda n: n**-0.5, sign=1):
    n, half = x.shape[1], 1
    while half < n:
        a, b = x.unflatten(1, (-1, 2, half)).unbind(2)
        x, half = torch.stack([a + b, sign * (a - b)], 2).flatten(1), 2 * half
    return x * factor(n)


right(quantization.check_hadamard)(in_rounds)
wrong(quantization.check_hadamard, "a rotation keeps it")(lambda x: in_rounds(x, factor=lambda n: 1))
wrong(quantization.check_hadamard, "sums and differences of numbers 1, 2, 4, ... apart")(lambda x: in_rounds(x, sign=-1))


@wrong(quantization.check_hadamard, "changes what it is given")
def _(x):
    half = 1
    while half < x.shape[1]:
        pairs = x.view(len(x), -1, 2, half)
        a, b = pairs.unbind(2)
        pairs.copy_(torch.stack([a + b, a - b], 2))
        half *= 2
    return x * x.shape[1]**-0.5


@right(quantization.check_int8_product)
def _(x, weight):                # sums in float64
    (qx, sx), (qw, sw) = by_rows(x, 8), by_rows(weight, 8)
    return (qx.double() @ qw.double().T * sx * sw[:, 0]).float()


def multiplied(x, weight, kind=torch.int32, rows=by_rows, scales=lambda sx, sw: sx * sw.T):
    (qx, sx), (qw, sw) = rows(x, 8), by_rows(weight, 8)
    return (qx.to(kind) @ qw.to(kind).T) * scales(sx, sw)


right(quantization.check_int8_product)(multiplied)
wrong(quantization.check_int8_product, "which does not fit into 8 bits")(lambda *a: multiplied(*a, kind=torch.int8))
wrong(quantization.check_int8_product, "nothing has been rounded")(lambda x, weight: x @ weight.T)
wrong(quantization.check_int8_product, "only the scale of the row is in it")(lambda *a: multiplied(*a, scales=lambda sx, sw: sx))
wrong(quantization.check_int8_product, "has not been scaled by both scales")(lambda *a: multiplied(*a, scales=lambda sx, sw: 1))
wrong(quantization.check_int8_product, "each row has a scale of its own")(
    lambda *a: multiplied(*a, rows=lambda x, bits: by_rows(x, bits, largest=lambda x: x.abs().amax())))
wrong(quantization.check_int8_product, "what is 0 / 0?")(
    lambda *a: multiplied(*a, kind=torch.float64, rows=lambda x, bits: by_rows(x, bits, least=0)))


def smoothed(norm, weight, largest, factor=lambda largest, columns: (largest / columns).sqrt(), least=1e-5, apply=lambda n, w, f: (n / f, w * f)):
    return apply(norm, weight, factor(largest.clamp(min=least), weight.abs().amax(0).clamp(min=least)))


right(quantization.check_smooth)(smoothed)
right(quantization.check_smooth)(lambda *a: smoothed(*a, factor=lambda largest, columns: largest**.6 / columns**.4))
right(quantization.check_smooth)(lambda *a: smoothed(*a, factor=lambda largest, columns: 2 ** largest.log2().mul(.5).round()))    # powers of two, of the activations alone


@right(quantization.check_smooth)
def _(norm, weight, largest):    # only where there is an outlier
    factor = torch.where(largest > 4 * largest.median(), 5., 1.)
    return [norm / factor, weight * factor]


wrong(quantization.check_smooth, "most of it comes from the matrix")(lambda *a: smoothed(*a, factor=lambda largest, columns: largest))
wrong(quantization.check_smooth, "most of it comes from the activations")(lambda *a: smoothed(*a, factor=lambda largest, columns: torch.ones_like(largest)))
wrong(quantization.check_smooth, "the column that it meets is multiplied by")(lambda *a: smoothed(*a, apply=lambda n, w, f: (n / f, w / f)))
wrong(quantization.check_smooth, "the column that it meets is multiplied by")(lambda *a: smoothed(*a, apply=lambda n, w, f: (n / f, w)))
wrong(quantization.check_smooth, "a factor of 0, or one that was divided by 0")(lambda *a: smoothed(*a, least=0))
wrong(quantization.check_smooth, "most of it comes from the activations")(lambda *a: smoothed(*a, apply=lambda n, w, f: (n * f, w / f)))
wrong(quantization.check_smooth, "raises RuntimeError")(lambda *a: smoothed(*a, apply=lambda n, w, f: (n / f, w * f[:, None])))
wrong(quantization.check_smooth, "changes what it is given")(lambda *a: smoothed(*a, apply=lambda n, w, f: (n.div_(f), w.mul_(f))))


# ---- attention in tiles

@right(cpu_attention.check_diagonal_share)
def _(n, rows, keys):            # with a matrix of tiles
    row, first = torch.arange(0, n, rows)[:, None], torch.arange(0, n, keys)
    computed = first < row + rows
    return ((first + keys - 1 > row) & computed).sum().item() / computed.sum().item()


wrong(cpu_attention.check_diagonal_share, "those in the future are not computed")(
    lambda n, rows, keys: cpu_attention.kinds(n, rows, keys)[0] / (-(-n // rows) * -(-n // keys)))
wrong(cpu_attention.check_diagonal_share, "tiles are on the diagonal and")(
    lambda n, rows, keys: cpu_attention.kinds(n, rows, keys)[0] / cpu_attention.kinds(n, rows, keys)[1])
wrong(cpu_attention.check_diagonal_share, "(24, 4, 6) gives 1")(lambda n, rows, keys: 1)


@right(cpu_attention.check_bytes_read)
def _(n, tile, dim, size):       # full tiles by their sum, and the rest
    full = n // tile
    return 2 * dim * size * (tile * full * (full + 1) // 2 + (n if n % tile else 0))


wrong(cpu_attention.check_bytes_read, "(7, 3, 64, 4)")(lambda n, tile, dim, size: 2 * dim * size * sum(range(tile, n + 1, tile)))
wrong(cpu_attention.check_bytes_read, "a key and a value")(lambda n, tile, dim, size: dim * size * sum(min(i + tile, n) for i in range(0, n, tile)))
wrong(cpu_attention.check_bytes_read, "end before the positions [3, 6]")(
    lambda n, tile, dim, size: 2 * dim * size * (n if tile > 1 else n * (n + 1) // 2))


@right(cpu_attention.check_find_pieces)
def _(rows, most):               # text by text
    begins, start = [], 0
    for row in dict.fromkeys(rows):
        n = rows.count(row)
        begins += range(start, start + n, most)
        start += n
    return (*begins, start)


wrong(cpu_attention.check_find_pieces, "it is a Tensor, not a list")(lambda rows, most: torch.tensor([0, 2, 3, 6]))
wrong(cpu_attention.check_find_pieces, "the last number is where the last piece ends")(
    lambda rows, most: [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]])
wrong(cpu_attention.check_find_pieces, "counted from its own beginning")(
    lambda rows, most: [i for i in range(len(rows)) if i % most == 0 or rows[i] != rows[i - 1]] + [len(rows)])
wrong(cpu_attention.check_find_pieces, "at most 3 tokens")(
    lambda rows, most: [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]] + [len(rows)])


@wrong(cpu_attention.check_attend_tile, "each `take` overwrites what the one before gave")
def _(q, take, end, width, window):          # everything taken, then all at once
    at = torch.arange(end - len(q), end)[:, None]
    start = 0 if window is None else max(0, end - len(q) - window + 1)
    keys, values = (torch.cat(x) for x in zip(*(take(i, min(end, i + width)) for i in range(start, end, width))))
    p = torch.arange(start, end)
    hidden = (p > at) | (p <= at - (window or end))
    return (q @ keys.T).masked_fill(hidden, -torch.inf).softmax(-1) @ values


def in_tiles(q, take, end, width, window, first_row=lambda end, rows: end - rows, low=-1e30, shrink=True, start=True, cut=True):
    "A tile of queries; the arguments after `window` break it."
    at = torch.arange(first_row(end, len(q)), first_row(end, len(q)) + len(q))[:, None]
    starts = (at - window + 1).clamp(min=0) if window else at * 0
    best, mass, total = torch.full(at.shape, low), torch.zeros(at.shape), torch.zeros_like(q)
    for first in range(int(starts[0]) if start else 0, end, width):
        keys, values = take(first, min(first + width, end))
        p = torch.arange(first, first + len(keys))
        scores = q @ keys.T
        if cut: scores = scores.masked_fill((p < starts) | (p > at), -torch.inf)
        new = torch.maximum(best, scores.amax(1, keepdim=True))
        weights, keep = (scores - new).exp(), (best - new).exp() if shrink else 1
        mass, total, best = mass * keep + weights.sum(1, keepdim=True), total * keep + weights @ values, new
    return total / mass


right(cpu_attention.check_attend_tile)(in_tiles)
wrong(cpu_attention.check_attend_tile, "minus infinity less minus infinity")(lambda *a: in_tiles(*a, low=-torch.inf))
wrong(cpu_attention.check_attend_tile, "old sums shrink")(lambda *a: in_tiles(*a, shrink=False))
wrong(cpu_attention.check_attend_tile, "3 new tokens after 20 others")(lambda *a: in_tiles(*a, first_row=lambda end, rows: 0))
wrong(cpu_attention.check_attend_tile, "no row sees anything before 26")(lambda *a: in_tiles(*a, start=False))
wrong(cpu_attention.check_attend_tile, "row 0 gives")(lambda *a: in_tiles(*a, cut=False))


@wrong(cpu_attention.check_attend_tile, "some positions are taken twice")
def _(q, take, end, width, window):          # rows outside, keys inside
    return torch.cat([in_tiles(q[i:i + 1], take, end - len(q) + 1 + i, width, window) for i in range(len(q))])


def done_at(work, cores):
    free = [0] * cores
    for time in work: free[free.index(min(free))] += time
    return max(free)


right(cpu_attention.check_finished)(done_at)
wrong(cpu_attention.check_finished, "the first core is free at 1")(lambda work, cores: max(sum(work) / cores, max(work, default=0)))
wrong(cpu_attention.check_finished, "the second core takes the last piece as well")(      # in turns
    lambda work, cores: max(sum(work[i::cores]) for i in range(cores)))
wrong(cpu_attention.check_finished, "there is no work")(lambda work, cores: done_at(work, cores) if work else None)


# ---- a step in one call

right(cpu_steps.check_share_of_asking)(lambda calls, layers, us, ms: calls * us * 1e-6 * layers / (ms * 1e-3))
wrong(cpu_steps.check_share_of_asking, "9 x 30 calls of 5.0 microseconds")(lambda calls, layers, us, ms: calls * us / 1000 / ms)
wrong(cpu_steps.check_share_of_asking, "gives 67.5, expected 0.0675")(lambda calls, layers, us, ms: calls * layers * us / ms)

right(cpu_steps.check_wide_numbers)(lambda n, q, kv, inner, most: sorted([q + kv + kv, 2 * inner])[1] * (n if n < most else most))
wrong(cpu_steps.check_wide_numbers, "no piece has more than 256 tokens")(lambda n, q, kv, inner, most: n * max(q + 2*kv, 2 * inner))
wrong(cpu_steps.check_wide_numbers, "(1, 576, 192, 1536, 256) gives 4032, expected 3072")(
    lambda n, q, kv, inner, most: min(n, most) * (q + 2*kv + 2 * inner))
wrong(cpu_steps.check_wide_numbers, "gate and up are wider")(lambda n, q, kv, inner, most: min(n, most) * max(q + 2*kv, inner))
wrong(cpu_steps.check_wide_numbers, "the QKV product is the wider one")(lambda n, q, kv, inner, most: min(n, most) * 2 * inner)


@right(cpu_steps.check_mlp_in_pieces)
def _(x, mlp, most):             # equally long pieces, written into place
    out, parts = torch.empty_like(x), -(-len(x) // most)
    for rows, place in zip(x.tensor_split(parts), out.tensor_split(parts)): place.copy_(mlp(rows))
    return out


wrong(cpu_steps.check_mlp_in_pieces, "the MLP is given 5 rows at once")(lambda x, mlp, most: mlp(x))
wrong(cpu_steps.check_mlp_in_pieces, "1 calls are enough")(lambda x, mlp, most: torch.cat([mlp(row[None]) for row in x]))
wrong(cpu_steps.check_mlp_in_pieces, "is given 0 rows at once")(
    lambda x, mlp, most: torch.cat([mlp(x[i * most:(i + 1) * most]) for i in range(len(x) // most + 1)]))


@wrong(cpu_steps.check_mlp_in_pieces, "changes what it is given")
def _(x, mlp, most):
    for rows in x.split(most): rows.copy_(mlp(rows))
    return x


@right(cpu_steps.check_stale)
def _(records, layers):          # name by name
    found = set()
    for i, (record, layer) in enumerate(zip(records, layers)):
        for name, tensor in layer.items():
            if record[name] != (None if tensor is None else tensor.data_ptr()): found.add(i)
    return sorted(found)


wrong(cpu_steps.check_stale, "there is a bias now")(lambda records, layers: [
    i for i, (record, layer) in enumerate(zip(records, layers)) if any(record[name] not in (None, address(x)) for name, x in layer.items())])
wrong(cpu_steps.check_stale, "the norm's weight has been replaced by a copy")(lambda records, layers: [
    i for i, (record, layer) in enumerate(zip(records, layers)) if any((record[name] is None) != (x is None) for name, x in layer.items())])
wrong(cpu_steps.check_stale, "gives 0, not the numbers of layers")(lambda records, layers: 0)
wrong(cpu_steps.check_stale, "nothing has changed")(lambda records, layers: list(range(len(layers))))


RUN = """
extern "C" float run(const Op* ops, int64_t n, float x) { float y = x; for (int64_t i = 0; i < END; i++) y = CALL; return y; }
"""


def running(call, end="n"): return RUN.replace("CALL", call).replace("END", end)


right(cpu_steps.check_interpreter)("""
extern "C" float run(const Op* ops, int64_t n, float x) { return n ? run(ops + 1, n - 1, ops->function(x, ops->number)) : x; }""")
if CAN_BUILD:
    wrong(cpu_steps.check_interpreter, "each function gets what the one before gave")(running("ops[i].function(x, ops[i].number)"))
    wrong(cpu_steps.check_interpreter, "makes 9 of 4, expected 13")(running("ops[n - 1 - i].function(y, ops[n - 1 - i].number)"))
    wrong(cpu_steps.check_interpreter, "no part of the program")(running("ops[i].function(y, ops[i].number)", "n + 1"))
    wrong(cpu_steps.check_interpreter, "could not compile")(running("ops[i](y)"))
wrong(cpu_steps.check_interpreter, "RUN is 7")(7)
wrong(cpu_steps.check_interpreter, "not a string of C++")(None)


# ---- the overlapped loop

@right(overlapped_loop.check_to_schedule)
def _(known, expected, computed, max_len):
    left = known + expected - computed
    return left - 1 if known + expected == max_len else left


wrong(overlapped_loop.check_to_schedule, "can be scheduled")(lambda known, expected, computed, max_len: known - computed)
wrong(overlapped_loop.check_to_schedule, "the last permitted one")(lambda known, expected, computed, max_len: known + expected - computed)
wrong(overlapped_loop.check_to_schedule, "(6, 1, 6, 20) gives -1")(lambda known, expected, computed, max_len: known - expected - computed)


@right(overlapped_loop.check_wasted_rows)
def _(answers, depth):           # row by row
    rows = 0
    for tokens, stopped, most in answers:
        for ahead in range(1, depth): rows += stopped and tokens + ahead <= most
    return rows


wrong(overlapped_loop.check_wasted_rows, "the host can count")(lambda answers, depth: (depth - 1) * len(answers))
wrong(overlapped_loop.check_wasted_rows, "only one more token was permitted")(lambda answers, depth: (depth - 1) * sum(stopped for _, stopped, _ in answers))
wrong(overlapped_loop.check_wasted_rows, "nothing is launched on trust")(lambda answers, depth: sum(stopped for _, stopped, _ in answers))


@right(overlapped_loop.check_end_of_run)
def _(hosts, devices, depth):    # each step's end from the two before it that matter
    def host_end(i): return 0 if i < 0 else max(host_end(i - 1), device_end(i - depth)) + hosts[i]
    def device_end(i): return 0 if i < 0 else max(host_end(i), device_end(i - 1)) + devices[i]
    return device_end(len(hosts) - 1)


wrong(overlapped_loop.check_end_of_run, "in turn; the host begins")(lambda hosts, devices, depth: hosts[0] + sum(map(max, hosts[1:] + [0], devices)))
wrong(overlapped_loop.check_end_of_run, "the host's work is hidden but for the first")(lambda hosts, devices, depth: sum(hosts) + sum(devices))
wrong(overlapped_loop.check_end_of_run, "a single step has nothing")(lambda hosts, devices, depth: sum(map(max, hosts, devices)))


@wrong(overlapped_loop.check_end_of_run, "the host is slow once")
def _(hosts, devices, depth):    # the host never waits
    host_free = end = 0
    if depth == 1: return sum(hosts) + sum(devices)
    for i, (host, device) in enumerate(zip(hosts, devices)):
        host_free += host
        end = max(end, host_free) + device
    return end


def receive(scheduler, output, handle, drop=True, length_first=False):
    "The end of a step: its tokens, and who has ended with them."
    scheduler.update(output, handle.result().token_ids)
    for seq in [s.seq for s in output.sampled]:
        if drop and seq.finish_reason: continue
        if length_first and seq.num_tokens == seq.max_len: scheduler.finish(seq, "length")
        elif seq.output_token_ids[-1] in seq.stop_token_ids: scheduler.finish(seq, "stop")
        elif seq.num_tokens == seq.max_len: scheduler.finish(seq, "length")


def ahead(scheduler, runner, seqs, depth, drain=True, drop=True, oldest=True, full=lambda n, depth: n >= depth, length_first=False):
    for seq in seqs: scheduler.add(seq)
    in_flight = deque()
    while scheduler.waiting or scheduler.running or drain and in_flight:
        output = scheduler.schedule()
        if output: in_flight.append((output, runner.execute(output)))
        if output and not full(len(in_flight), depth): continue
        receive(scheduler, *(in_flight.popleft() if oldest else in_flight.pop()), drop, length_first)


@right(overlapped_loop.check_run_ahead)
def _(scheduler, runner, seqs, depth):       # launches as long as there is room, then receives
    for seq in seqs: scheduler.add(seq)
    in_flight = []
    while not all(seq.finish_reason for seq in seqs) or in_flight:
        while len(in_flight) < depth and (output := scheduler.schedule()): in_flight.append((output, runner.execute(output)))
        output, handle = in_flight.pop(0)
        tokens = handle.result().token_ids
        scheduler.update(output, tokens)
        for s, token in zip(output.sampled, tokens):
            if s.seq.finish_reason: continue
            if token in s.seq.stop_token_ids: scheduler.finish(s.seq, "stop")
            elif s.seq.num_tokens == s.seq.max_len: scheduler.finish(s.seq, "length")


right(overlapped_loop.check_run_ahead)(ahead)
wrong(overlapped_loop.check_run_ahead, "were never received")(lambda *a: ahead(*a, drain=False))
wrong(overlapped_loop.check_run_ahead, "`finish` is called for sequence 0, which has ended")(lambda *a: ahead(*a, drop=False))
wrong(overlapped_loop.check_run_ahead, "which was launched before it")(lambda *a: ahead(*a, oldest=False))
wrong(overlapped_loop.check_run_ahead, "never more than 1 steps were in flight")(lambda *a: ahead(*a, full=lambda n, depth: True))
wrong(overlapped_loop.check_run_ahead, "2 steps were in flight at a time")(lambda *a: ahead(*a, full=lambda n, depth: n > depth))


wrong(overlapped_loop.check_run_ahead, "has finish_reason 'length', expected 'stop'")(lambda *a: ahead(*a, length_first=True))


@wrong(overlapped_loop.check_run_ahead, "after 2,000 calls of `schedule`")
def _(scheduler, runner, seqs, depth):       # waits for a second step that never comes
    for seq in seqs: scheduler.add(seq)
    in_flight = deque()
    while scheduler.waiting or scheduler.running or in_flight:
        if output := scheduler.schedule(): in_flight.append((output, runner.execute(output)))
        if len(in_flight) < depth: continue
        receive(scheduler, *in_flight.popleft())


@wrong(overlapped_loop.check_run_ahead, "the runner was given an empty step")
def _(scheduler, runner, seqs, depth):
    for seq in seqs: scheduler.add(seq)
    in_flight = deque()
    while scheduler.waiting or scheduler.running:
        output = scheduler.schedule()
        in_flight.append((output, runner.execute(output)))
        if len(in_flight) < depth: continue
        receive(scheduler, *in_flight.popleft())


# ---- fusions

right(fusions.check_fused_bytes)(lambda rows, hidden, size, residual: size * (2 * rows * hidden * (1 + residual) + hidden))
wrong(fusions.check_fused_bytes, "the weight is read once")(lambda rows, hidden, size, residual: (4 if residual else 2) * rows * hidden * size)
wrong(fusions.check_fused_bytes, "x and the residual are read")(lambda rows, hidden, size, residual: (2 * rows + 1) * hidden * size)

right(fusions.check_graphs_for)(lambda lengths: (1 in lengths) + any(n > 1 for n in lengths))
wrong(fusions.check_graphs_for, "a length is a variable")(lambda lengths: len(set(lengths)))
wrong(fusions.check_graphs_for, "a length of 1 has its own graph")(lambda lengths: 1 if lengths else 0)
wrong(fusions.check_graphs_for, "([1]) gives 2, expected 1")(lambda lengths: 1 + (1 in lengths))

@right(fusions.check_norm_halves)
def _(left, right, w_left, w_right, eps):    # joined again
    return tuple(rms_norm(torch.cat([left, right], -1), torch.cat([w_left, w_right]), eps).chunk(2, -1))


def halves(left, right, w_left, w_right, eps, rounds=True, mean=lambda a, b: torch.cat([a, b], -1).square().mean(-1, keepdim=True), out=lambda x, dtype: x.to(dtype)):
    scale = torch.rsqrt(mean(left.float(), right.float()) + eps)
    parts = [x.float() * scale for x in (left, right)]
    if rounds: parts = [x.to(left.dtype) for x in parts]
    return [out(x * w.to(x.dtype), left.dtype) for x, w in zip(parts, (w_left, w_right))]


right(fusions.check_norm_halves)(halves)
wrong(fusions.check_norm_halves, "it rounds after the scaling, and again after the weight")(lambda *a: halves(*a, rounds=False))
wrong(fusions.check_norm_halves, "the mean square is that of both halves together")(
    lambda *a: halves(*a, mean=lambda a, b: a.square().mean(-1, keepdim=True)))
wrong(fusions.check_norm_halves, "gives nan for a head of zeros")(lambda *a: halves(*a[:4], 0.))
wrong(fusions.check_norm_halves, "in a head of small ones")(lambda *a: halves(*a[:4], 1e-12))
wrong(fusions.check_norm_halves, "gives torch.float32, expected torch.bfloat16")(lambda *a: halves(*a, rounds=False, out=lambda x, dtype: x))


@right(fusions.check_place_rows)
def _(qkv, cos, sin, slots, keys, values):   # row by row
    kv_heads, dim = keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.zeros(len(qkv), heads, dim)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0: continue
        parts = qkv[row].view(1, -1, dim)
        turned = rotate(parts, cos[row:row + 1], sin[row:row + 1])[0]
        q[row], keys[slot], values[slot] = turned[:heads], turned[heads:heads + kv_heads], parts[0, heads + kv_heads:]
    return q


def placing(qkv, cos, sin, slots, keys, values, pick=lambda slots: slots >= 0, turn=rotate, turn_values=False):
    kv_heads, dim = keys.shape[1:]
    x, used = qkv.view(len(qkv), -1, dim), pick(slots)
    turned = turn(x, cos, sin)
    keys[slots[used]] = turned[used, -2*kv_heads:-kv_heads]
    values[slots[used]] = (turned if turn_values else x)[used, -kv_heads:]
    return turned[:, :-2*kv_heads]


right(fusions.check_place_rows)(placing)
wrong(fusions.check_place_rows, "a slot of -1 is none, and not the last one")(lambda *a: placing(*a, pick=lambda slots: slots < 99))
wrong(fusions.check_place_rows, "keys are turned, values are not")(lambda *a: placing(*a, turn_values=True))
wrong(fusions.check_place_rows, "each pair of numbers, half a head apart")(
    lambda *a: placing(*a, turn=lambda x, cos, sin: x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sin))
wrong(fusions.check_place_rows, "has been written to slot 0, which belongs to none of the slots")(
    lambda qkv, cos, sin, slots, keys, values: placing(qkv, cos, sin, slots.clamp(min=0), keys, values))


GELU = """
@triton.jit
def gelu_kernel(x, y, x_row, x_dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), FIRST + tl.arange(0, BLOCK)
    gate = tl.load(x + row*x_row + i*STEP, mask=i < DIM, other=0.).to(tl.float32)
    up = tl.load(x + row*x_row + UP*STEP, mask=i < DIM, other=0.).to(tl.float32)
    z = 0.7978845608 * (gate + 0.044715 * gate*gate*gate)
    gelu = (0.5 * gate * (1 + TANH))ROUNDED
    tl.store(y + row*DIM + i, gelu * up, mask=STORED)
"""
def gelu(FIRST="tl.program_id(1)*BLOCK", STEP="x_dim", UP="(DIM + i)", TANH="(2 / (1 + tl.exp(-2*z)) - 1)", ROUNDED=".to(x.dtype.element_ty).to(tl.float32)", STORED="i < DIM"):  # noqa: E302
    return kernel_of(GELU, "gelu_kernel", FIRST=FIRST, STEP=STEP, UP=UP, TANH=TANH, ROUNDED=ROUNDED, STORED=STORED)


right(fusions.check_gelu_kernel)(gelu())
wrong(fusions.check_gelu_kernel, "infinity divided by infinity is no number")(gelu(TANH="((tl.exp(2*z) - 1) / (tl.exp(2*z) + 1))"))
wrong(fusions.check_gelu_kernel, "rounded to the type of `x` before `up`")(gelu(ROUNDED=""))
wrong(fusions.check_gelu_kernel, "mask what lies beyond DIM")(gelu(STORED="i >= 0"))
wrong(fusions.check_gelu_kernel, "every second number of a wider matrix")(gelu(STEP="1"))
wrong(fusions.check_gelu_kernel, "rows that take two programs")(gelu(FIRST="0"))
wrong(fusions.check_gelu_kernel, "3 rows, (N, 2*DIM) = (3, 16), BLOCK = 8: gelu_kernel gives")(gelu(UP="i"))
wrong(fusions.check_gelu_kernel, "is @triton.jit missing?")(lambda x, y, x_row, x_dim, DIM, BLOCK: x)


def test_the_score_of_a_norm_counts_bytes_and_refuses_wrong_ones():
    assert fusions.score(lambda *args: rms_norm(*args[:1], *args[2:], args[1])) == "9 operations, 42.0 bytes a number"
    with pytest.raises(WrongAnswer, match="is not that of rms_norm"): fusions.score(lambda x, residual, weight, eps: (x, residual))
    with pytest.raises(WrongAnswer, match=r"gives None, not \(norm, sum\)"): fusions.score(lambda x, residual, weight, eps: None)


# ---- sampling kernels

def readings(temperature, top_k, top_p, min_p, greedy=True, of_p=4):
    if greedy and temperature < 1e-5: return 1
    if top_k > 0: return 3
    return of_p if top_p < 1 else 2 if min_p > 0 else 1


def batch_reader(total): return lambda batch, vocab, itemsize: total(batch) * vocab * itemsize


right(sampling_kernels.check_bytes_read)(batch_reader(lambda batch: sum(readings(*r) for r in batch)))
wrong(sampling_kernels.check_bytes_read, "a greedy row has no use for filters")(batch_reader(lambda batch: sum(readings(*r, greedy=False) for r in batch)))
wrong(sampling_kernels.check_bytes_read, "top-p has to weigh the row")(batch_reader(lambda batch: sum(readings(*r, of_p=3) for r in batch)))
wrong(sampling_kernels.check_bytes_read, "no row pays for another one")(batch_reader(lambda batch: len(batch) * max([readings(*r) for r in batch], default=0)))


@right(sampling_kernels.check_order_16)
def _(x):                        # by cases, in 64 bits
    bits = x.view(torch.int16).long()
    return torch.where(bits >= 0, bits, -32768 - bits)


def order_16(x): return (x + 0.).view(torch.int16) ^ ((x + 0.).view(torch.int16) >> 15 & 0x7fff)


right(sampling_kernels.check_order_16)(order_16)
wrong(sampling_kernels.check_order_16, "-2.0 < -1.0, but")(lambda x: x.view(torch.int16))
wrong(sampling_kernels.check_order_16, "equal numbers get equal integers")(lambda x: x.view(torch.int16) ^ (x.view(torch.int16) >> 15 & 0x7fff))
wrong(sampling_kernels.check_order_16, "which 16 bits do not hold")(lambda x: x.float().view(torch.int32))


@right(sampling_kernels.check_kth_largest)
def _(x, k):                     # count for each number how many are larger, and how many reach it
    larger, reach = ((x > y).sum() for y in x), ((x >= y).sum() for y in x)
    return next(float(y) for y, a, b in zip(x, larger, reach) if a < k <= b)


def by_halves(x, k, steps=60):
    low, high = float(x[x > -math.inf].min()), float(x.max())
    for _ in range(steps):
        middle = (low + high) / 2
        if int((x >= middle).sum()) >= k: low = middle
        else: high = middle
    return low


wrong(sampling_kernels.check_kth_largest, "which sorts")(lambda x, k: float(x.topk(k).values[-1]))
wrong(sampling_kernels.check_kth_largest, "which sorts")(lambda x, k: sorted(x.tolist())[-k])
wrong(sampling_kernels.check_kth_largest, "which sorts")(lambda x, k: float(x[sorted(range(len(x)), key=lambda i: x[i])[-k]]))
wrong(sampling_kernels.check_kth_largest, "numbers reach yours")(by_halves)
wrong(sampling_kernels.check_kth_largest, "not a number")(lambda x, k: [float(x.max())])


@wrong(sampling_kernels.check_kth_largest, "8 numbers, k = 4: kth_largest gives")
def _(x, k):                     # ties count once
    for _ in range(k - 1): x = x[x < x.max()] if x.min() < x.max() else x
    return float(x.max())


@right(sampling_kernels.check_nucleus)
def _(probs, p):                 # of each token: the mass of those better than it
    return torch.stack([probs[probs > value].sum() for value in probs]) < p


wrong(sampling_kernels.check_nucleus, "which sorts")(lambda probs, p: probs >= probs.sort(descending=True).values[0])
wrong(sampling_kernels.check_nucleus, "the token that reaches p stays")(lambda probs, p: torch.stack([probs[probs >= value].sum() for value in probs]) <= p)
wrong(sampling_kernels.check_nucleus, "not a boolean for each token")(lambda probs, p: (probs > 1 - p).nonzero())


# ---- ranks

right(parallel.check_ring_sends)(lambda n, p: [(p - 1) / p * n * 2, 2 * n * (p - 1)])
right(parallel.check_ring_sends)(lambda n, p: (Fraction(2 * n * (p - 1), p), np.float32(2 * n * (p - 1))))
wrong(parallel.check_ring_sends, "twice 1 steps")(lambda n, p: (n * (p - 1) / p, n * (p - 1)))
wrong(parallel.check_ring_sends, "gives (2400, 4800)")(lambda n, p: (2 * n * (p - 1), 2 * n * (p - 1) * p))    # all pieces to the next
wrong(parallel.check_ring_sends, "gives 1200.0, expected")(lambda n, p: 2 * n * (p - 1) / p)

right(parallel.check_break_even)(lambda bandwidth, latency, ranks: 2 * latency * bandwidth * ranks / (ranks - 1))
wrong(parallel.check_break_even, "two exchanges of a layer")(lambda bandwidth, latency, ranks: latency * bandwidth * ranks / (ranks - 1))
wrong(parallel.check_break_even, "(3000000000000.0, 1e-05, 2) gives 60000000.0")(lambda bandwidth, latency, ranks: 2 * latency * bandwidth)


@right(parallel.check_channel)
class WithPrefix:
    "The length as text, ten digits."
    def __init__(self, write, read): self.write, self.read = write, read

    def send(self, message):
        data = pickle.dumps(message)
        self.write(f"{len(data):010}".encode() + data)

    def receive(self): return pickle.loads(self.read(int(self.read(10))))


class ChannelWith:
    def __init__(self, write, read): self.write, self.read = write, read

    def send(self, message):
        data = pickle.dumps(message)
        self.write(self.head(data) + data)


@wrong(parallel.check_channel, "the receiver would wait for ever")
class FixedBuffer(ChannelWith):
    def head(self, data): return b""
    def receive(self): return pickle.loads(self.read(1024))


@wrong(parallel.check_channel, "send of 100,000 numbers raises OverflowError")
class ShortLength(ChannelWith):
    def head(self, data): return len(data).to_bytes(2, "little")
    def receive(self): return pickle.loads(self.read(int.from_bytes(self.read(2), "little")))


@wrong(parallel.check_channel, "are left, and belong to nobody")
class Padded(ChannelWith):
    def head(self, data): return len(data).to_bytes(8, "little")

    def send(self, message):
        super().send(message)
        self.write(bytes(-len(pickle.dumps(message)) % 64))

    def receive(self): return pickle.loads(self.read(int.from_bytes(self.read(8), "little")))


@wrong(parallel.check_channel, "only bytes can be written")
class AsText(ChannelWith):
    def send(self, message): self.write(repr(message))
    def receive(self): return None


@right(parallel.check_to_blame)
def _(codes, noted):             # the least of (kind, rank)
    kinds = [((0 if code < 0 else 2), rank) for rank, code in codes.items() if code is not None]
    if noted is not None: kinds.append((1, noted))
    return min(kinds)[1] if kinds else None


def blamed(codes, noted, order="killed noted ended"):
    ranks = dict(killed=[r for r, c in codes.items() if c is not None and c < 0], noted=[noted] if noted else [],
                 ended=[r for r, c in codes.items() if c is not None])
    return next((ranks[kind][0] for kind in order.split() if ranks[kind]), None)


right(parallel.check_to_blame)(blamed)
wrong(parallel.check_to_blame, "the note of rank 1 tells of the consequence")(lambda *a: blamed(*a, order="noted killed ended"))
wrong(parallel.check_to_blame, "since its connection broke")(lambda *a: blamed(*a, order="ended noted"))
wrong(parallel.check_to_blame, "was the first to leave a note")(lambda *a: blamed(*a, order="killed ended noted"))
wrong(parallel.check_to_blame, "without an error is missing, too")(
    lambda codes, noted: blamed({rank: code or None for rank, code in codes.items()}, noted))


@right(parallel.check_all_reduce)
def _(rank, size, pieces, send, receive):    # what travels is kept apart from what is held
    moving = pieces[rank]
    for step in range(1, size):
        send(moving)
        moving = receive() + pieces[(rank - step) % size]
    done = {(rank + 1) % size: moving}
    for step in range(size - 1):
        send(done[(rank + 1 - step) % size])
        done[(rank - step) % size] = receive()
    return tuple(done[i] for i in range(size))


def ring(rank, size, pieces, send, receive, rounds=2, add=True, first=0):
    for step in range(size - 1):
        send(pieces[(rank - step - first) % size])
        pieces[(rank - 1 - step) % size] += receive()
    for step in range(size - 1):
        if rounds == 1: break
        send(pieces[(rank + 1 - step) % size])
        new = receive()
        pieces[(rank - step) % size] = new + (pieces[(rank - step) % size] if not add else 0)
    return pieces


right(parallel.check_all_reduce)(ring)
wrong(parallel.check_all_reduce, "rank 0 gets [1, 222, ")(lambda *a: ring(*a, rounds=1))
wrong(parallel.check_all_reduce, "expected [111, 222, 333]")(lambda *a: ring(*a, add=False))
wrong(parallel.check_all_reduce, "rank 0 gets")(lambda *a: ring(*a, first=1))
wrong(parallel.check_all_reduce, "rank 0 gets 666, expected [111, 222, 333]")(lambda *a: sum(ring(*a)))


@wrong(parallel.check_all_reduce, "a rank sends 6 numbers, and 4 are enough")
def _(rank, size, pieces, send, receive):    # all pieces go all the way round
    total, moving = list(pieces), list(pieces)
    for _ in range(size - 1):
        for number in moving: send(number)
        moving = [receive() for _ in moving]
        total = [a + b for a, b in zip(total, moving)]
    return total


@wrong(parallel.check_all_reduce, "a message is one number")
def _(rank, size, pieces, send, receive):
    send(pieces)
    return receive()


@wrong(parallel.check_all_reduce, "waits for a message that nobody sends")
def _(rank, size, pieces, send, receive):    # everybody waits before he gives
    for step in range(size - 1):
        pieces[(rank - 1 - step) % size] += receive()
        send(pieces[(rank - step) % size])
    return pieces


# ---- mixtures of experts

right(moe.check_tokens_for_share)(lambda share, experts, chosen: math.ceil(math.log(1 - share, 1 - chosen / experts)))
wrong(moe.check_tokens_for_share, "8 tokens use 90.0% of the experts and 9 use")(
    lambda share, experts, chosen: round(math.log(1 - share) / math.log(1 - chosen / experts)))
wrong(moe.check_tokens_for_share, "(0.75, 2, 1) gives 3, expected 2: 1 tokens use 50.0%")(    # more than the share, not at least
    lambda share, experts, chosen: math.floor(math.log(1 - share) / math.log(1 - chosen / experts)) + 1)
wrong(moe.check_tokens_for_share, "(0.9, 8, 2) gives 4, expected 9")(lambda share, experts, chosen: math.ceil(share * experts / chosen))

right(moe.check_ridge)(lambda experts, chosen, peak, bandwidth, size: (experts / chosen) * (peak / bandwidth) * size / 2)
wrong(moe.check_ridge, "a token needs 1 x 2 w operations")(lambda experts, chosen, peak, bandwidth, size: experts * size * peak / bandwidth / chosen)
wrong(moe.check_ridge, "64 x 4 w bytes are read")(lambda experts, chosen, peak, bandwidth, size: size * peak / bandwidth / 2)


@right(moe.check_all_experts)
def _(x, gate_up, down, experts, weights):   # by a product with the one-hot choices
    rows = torch.einsum("eni,ehi->enh", silu_and_mul(torch.einsum("nh,eih->eni", x, gate_up)), down)
    chosen = torch.nn.functional.one_hot(experts, len(down)).float()
    return torch.einsum("nke,nk,enh->nh", chosen, weights, rows)


def everywhere(x, gate_up, down, experts, weights, value=lambda w: w):
    rows = silu_and_mul(x @ gate_up.mT) @ down.mT
    table = x.new_zeros(len(x), len(down)).scatter(1, experts, value(weights))
    return (table.T[..., None] * rows).sum(0)


right(moe.check_all_experts)(everywhere)


@wrong(moe.check_all_experts, "a loop over tokens or experts is not needed")
def _(x, gate_up, down, experts, weights):
    return sum((weights * (experts == e)).sum(1, keepdim=True) * (silu_and_mul(x @ a.T) @ b.T) for e, (a, b) in enumerate(zip(gate_up, down)))


wrong(moe.check_all_experts, "it has chosen the experts")(lambda *a: everywhere(*a, value=torch.ones_like))
wrong(moe.check_all_experts, "has shape (3, 1, 6), expected (1, 6)")(lambda x, gate_up, down, *_: silu_and_mul(x @ gate_up.mT) @ down.mT)
wrong(moe.check_all_experts, "gives")(lambda x, gate_up, down, experts, weights: (silu_and_mul(x @ gate_up.mT) @ down.mT).mean(0))


@right(moe.check_mixture)
def _(x, experts, weights, run_expert):      # sorted, as in the chapter
    expert, order = experts.flatten().sort(stable=True)
    out = torch.zeros_like(x)
    for e in expert.unique():
        choices = order[expert == e]
        rows = run_expert(e, x[choices // experts.shape[1]])
        out.index_add_(0, choices // experts.shape[1], rows * weights.flatten()[choices, None])
    return out


def grouped(x, experts, weights, run_expert, used=lambda experts: experts.unique().tolist(), add=True, first=False):
    out = torch.zeros_like(x)
    for e in used(experts):
        tokens, choices = (experts == e).nonzero(as_tuple=True)
        rows = run_expert(e, x[tokens]) * weights[tokens, 0 if first else choices, None]
        out[tokens] = out[tokens] + rows if add else rows
    return out


right(moe.check_mixture)(grouped)
wrong(moe.check_mixture, "without rows")(lambda *a: grouped(*a, used=lambda experts: range(experts.max() + 1)))
wrong(moe.check_mixture, "by its own weights")(lambda *a: grouped(*a, add=False))
wrong(moe.check_mixture, "1 token, 2 of 3 experts: mixture gives")(lambda *a: grouped(*a, first=True))


@wrong(moe.check_mixture, "an expert is run on its own tokens alone")
def _(x, experts, weights, run_expert):      # each of them on all tokens
    return sum((weights * (experts == e)).sum(1, keepdim=True) * run_expert(e, x) for e in experts.unique().tolist())


@wrong(moe.check_mixture, "is run a second time")
def _(x, experts, weights, run_expert):      # token by token
    return torch.stack([sum(w * run_expert(e, x[t:t + 1])[0] for e, w in zip(experts[t].tolist(), weights[t])) for t in range(len(x))])


def sends(choices, num_experts, rank_of=lambda e, size: e // size, kinds=set):
    size = num_experts // len(choices)
    table = [Counter(r for experts in tokens for r in kinds(rank_of(e, size) for e in experts)) for tokens in choices]
    return [[row[j] for j in range(len(choices))] for row in table]


right(moe.check_tokens_to_send)(sends)
wrong(moe.check_tokens_to_send, "a token goes to a rank once")(lambda *a: sends(*a, kinds=list))
wrong(moe.check_tokens_to_send, "each rank has 2 experts")(lambda choices, n: sends(choices, n, rank_of=lambda e, size: e % len(choices)))
wrong(moe.check_tokens_to_send, "a rank without tokens")(lambda *a: [list(row) for row in zip(*sends(*a))])


def test_where_experts_live_is_told_by_a_rank_that_there_is():
    load = moe.uneven_load()
    assert moe.busiest(load, [e % 4 for e in range(64)]) == moe.busiest(load, torch.arange(64) % 4)
    for rank_of in ([e // 8 for e in range(64)], [-1] * 64, [e / 16 for e in range(64)]):
        with pytest.raises(WrongAnswer, match="expert .* is placed on rank .*, there are 0 to 3"): moe.busiest(load, rank_of)


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


@pytest.mark.parametrize("module, name", [(cpu_kernels, "page_scores"), (cpu_products, "relu_writer"), (cpu_steps, "interpreter")])
def test_a_check_that_needs_a_compiler_says_so_where_there_is_none(module, name, monkeypatch, capsys):
    monkeypatch.setattr(module, "CAN_BUILD", False)
    getattr(module, f"check_{name}")("not tried")
    assert capsys.readouterr().out == f"check_{name}: right, as far as one can see without a compiler\n"
    with pytest.raises(WrongAnswer, match="not a string of C"): getattr(module, f"check_{name}")(7)


def test_measures_for_open_problems_run_and_give_nothing_without_a_compiler(monkeypatch):
    measures = (cpu_attention, "step_with_few", (4, 2, 20)), (cpu_kernels, "microseconds_of_decode", ()), (cpu_products, "seconds_of_tile", (4, 2, 3, 32, 48)), (
        cpu_steps, "microseconds_of_loop", ())
    for module, name, args in measures:
        if CAN_BUILD and module is not cpu_steps: assert getattr(module, name)(*args) > 0
        monkeypatch.setattr(module, "CAN_BUILD", False)
        assert getattr(module, name)(*args) == 0


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)
