"Checks of the exercises of the chapter on FP8."
import math

import torch

from . import attempt, exercise, require, show

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@exercise
def check_decode_e5m2(decode_e5m2):
    numbers = torch.arange(256, dtype=torch.uint8).view(E5M2).double().tolist()
    kinds = {"exponent 0": range(4), "whole powers of two": range(4, 124, 4), "all other positive numbers": range(124), "infinity": [124, 252],
             "NaN": [125, 126, 127, 253, 255], "negative numbers": range(128, 252)}
    for kind, some in kinds.items():
        for byte in some:
            case, wanted = f"{kind}: decode_e5m2({byte})", numbers[byte]
            got = attempt(case, decode_e5m2, byte)
            require(isinstance(got, (int, float)), f"{case} gives {got!r}, not a float", "Is a `return` missing?" if got is None else "")
            if got == wanted or math.isnan(got) and math.isnan(wanted): continue
            why = ""
            if kind == "exponent 0": why = "these are subnormal: no leading 1, and the smallest exponent, -14"
            elif kind == "NaN": why = "exponent 31 with a mantissa that is not 0 is no number"
            elif kind == "infinity": why = "exponent 31 with mantissa 0; there is such a thing in e5m2"
            elif got and abs(math.log2(abs(wanted / got))) in (1., 8.): why = "the bias of the exponent is 15"
            require(False, f"{case} gives {got}, expected {wanted}", why)


@exercise
def check_round_e4m3(round_e4m3):
    g = torch.Generator().manual_seed(0)
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (grid[1:] + grid[:-1]) / 2
    cases = {"numbers of e4m3": (grid, "they are to stay as they are"), "numbers between": (torch.rand(400, generator=g) * 20 + 0.02, ""),
             "zero, in company": (torch.tensor([0., 3.3]), "0 has no exponent"),
             "negative numbers": (-torch.rand(50, generator=g) * 400 - 0.02, "the sign is no part of the rounding"),
             "beyond 448": (torch.tensor([449., 463., 464., 470., 1e30, -5000.]), "what is too large becomes 448"),
             "below 2^-6": (torch.rand(100, generator=g) * 2**-6, "down there all neighbours are 2^-9 apart"),
             "half way between two": (middles, "of two neighbours equally near, the one with the even mantissa counts"),
             "a matrix": (torch.randn(5, 7, generator=g), "")}
    for name, (x, why) in cases.items():
        case, wanted = f"{name}: round_e4m3", x.clamp(-448, 448).to(E4M3).float()
        given = x.clone()
        got = attempt(case, round_e4m3, given)
        require(torch.equal(given, x), f"{case} changes what it is given")
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.dtype == torch.float32, f"{case} gives {got.dtype}, expected torch.float32")
        require(got.shape == x.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(x.shape)}")
        bad = got != wanted
        if not bool(bad.any()): continue
        a, b, c = (t.flatten()[int(bad.flatten().int().argmax())].item() for t in (x, got, wanted))
        require(False, f"{case} makes {a:.8g} into {b:.8g}, expected {c:.8g}", why)


def rounded(x, size):
    "(e4m3 numbers (rows, groups, size), scales (rows, groups)), float64, of rows in groups."
    groups = x.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (groups / scale).clamp(-448, 448).to(E4M3).double(), scale.squeeze(-1).double()


def cancelling(g, size=64):
    "x (8, size) and weight (8, size) whose e4m3 products have exact sums, much smaller than the products."
    def whole(): return 256 + 32 * torch.randint(7, (8, size // 2), generator=g).float()
    a, b, order = whole(), whole(), torch.randperm(size // 2, generator=g)
    a[:, 0], b[:, 0] = 448, 448
    x, weight = torch.cat([a, a[:, order]], 1), torch.cat([b, -b[:, order]], 1)
    weight[:, 5] += torch.where(weight[:, 5] < 400, 32, -32)
    return x * 0.0123, weight * 0.0456


@exercise
def check_block_product(block_product):
    g = torch.Generator().manual_seed(1)
    for name, rows, outputs, groups, size in (("one row, one block", 1, 3, 1, 16), ("three rows, four blocks of 32", 3, 5, 4, 32), ("blocks of 128", 2, 6, 3, 128)):
        x, weight = (torch.randn(n, groups*size, generator=g) * torch.logspace(0, 2, groups).repeat_interleave(size) for n in (rows, outputs))
        case = f"{name}: block_product"
        got = attempt(case, block_product, x.clone(), weight.clone(), size)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, outputs), f"{case} has shape {tuple(got.shape)}, expected {(rows, outputs)}")
        require(got.dtype == torch.float32, f"{case} gives {got.dtype}, expected torch.float32")
        (xq, x_scale), (wq, w_scale) = rounded(x, size), rounded(weight, size)
        sums = torch.einsum("rgi,ogi->rog", xq, wq)
        scales = x_scale[:, None] * w_scale
        wanted, magnitude = (sums * scales).sum(-1), torch.einsum("rgi,ogi,rog->ro", xq.abs(), wq.abs(), scales)
        allowed = groups * size * 2**-23 * magnitude
        bad = (got.double() - wanted).abs() > allowed
        if not bool(bad.any()): continue
        (xr, xs), (wr, ws) = rounded(x, groups*size), rounded(weight, groups*size)
        why = ""
        for reason, other in {"nothing was rounded": (x @ weight.T).double(), "a scale belongs to each block, not to the whole row": torch.einsum("rgi,ogi->ro", xr, wr) * xs * ws.T,
                              "the weights' scales are missing": (sums * x_scale[:, None]).sum(-1), "the rows' scales are missing": (sums * w_scale).sum(-1),
                              "each block has its own scale: first scale, then add up": sums.sum(-1) * scales.mean(-1)}.items():
            if bool(((got.double() - other).abs() <= 1e-5 * other.abs() + allowed).all()): why = why or reason
        row, out = bad.nonzero()[0].tolist()
        require(False, f"{case} gives {got[row, out]:.7g} for output {out} of row {row}, expected {wanted[row, out]:.7g}", why)
    x, weight = cancelling(g)
    (xq, x_scale), (wq, w_scale) = rounded(x, 64), rounded(weight, 64)
    wanted = torch.einsum("rgi,ogi->ro", xq, wq) * x_scale * w_scale.T
    got = block_product(x.clone(), weight.clone(), 64)
    require(bool(((got - wanted).abs() <= 8 * 2**-24 * wanted.abs()).all()), "block_product where products nearly cancel is inexact",
            "sums of e4m3 numbers are exact here, and only then come the scales")
