"Checks of the exercises of the chapter on eight bits."
from pathlib import Path

import torch

from nano_vllm.layers import Ops
from nano_vllm.model import ModelConfig, PlainAttention
from nano_vllm.tokenizer import Tokenizer
from nano_vllm.weights import load_model
from nano_vllm.workbench import fetch

from . import WrongAnswer, attempt, call, exercise, require, show


@exercise
def check_round_by_adding(round_by_adding):
    cases = {"whole numbers": [0., 1., 5., 127.], "numbers between": [3.4, 2.6, 0.2, 99.51], "negative numbers": [-2.6, -127., -0.2, -3.4],
             "numbers half way, which go to the even one": [0.5, 1.5, 2.5, -0.5, -1.5], "a matrix": [[1.2, -3.7], [126.7, -0.1]]}
    for name, numbers in cases.items():
        x = torch.tensor(numbers)
        case = f"{name}: round_by_adding({show(x)})"
        got = attempt(case, round_by_adding, x.clone())
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.dtype == torch.int8, f"{case} gives {got.dtype}, expected torch.int8")
        require(got.shape == x.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(x.shape)}")
        require(torch.equal(got, x.round().char()), f"{case} gives {show(got)}, expected {show(x.round().char())}")


def row_like(top, n, seed, scale):
    "A row whose numbers in steps of `scale` are far from the middle between two, the largest being `top`."
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(1 - top, top, (n,), generator=g) + 0.8 * torch.rand(n, generator=g) - 0.4
    steps[seed % n] = top if seed % 2 else -top
    return steps * scale


def rounded(x, top):
    scale = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
    return (x.double() / scale).round(), scale


@exercise
def check_round_rows(round_rows):
    for bits in (8, 4, 2):
        top = 2**(bits - 1) - 1
        for name, x in {"three rows": torch.stack([row_like(top, 40, seed, 0.01) for seed in range(3)]),
                        "rows of very different size": torch.stack([row_like(top, 40, 1, 0.01), row_like(top, 40, 2, 100.)]),
                        "a row of zeros below another": torch.stack([row_like(top, 40, 3, 0.5), torch.zeros(40)])}.items():
            case = f"{name}, {bits} bits: round_rows"
            got = attempt(case, round_rows, x.clone(), bits)
            require(isinstance(got, (tuple, list)) and len(got) == 2 and all(map(torch.is_tensor, got)), f"{case} gives {show(got)}, not (numbers, scales)",
                    "Is a `return` missing?" if got is None else "")
            q, scale = got
            require(q.shape == x.shape and scale.shape == (len(x), 1),
                    f"{case} gives shapes {tuple(q.shape)} and {tuple(scale.shape)}, expected {tuple(x.shape)} and {(len(x), 1)}")
            wanted, right = rounded(x, top)
            q, scale = q.double(), scale.double()
            require(not (q.isnan().any() or scale.isnan().any()), f"{case} gives numbers that are none", "what is 0 / 0?")
            require(bool((q == q.round()).all()), f"{case} gives {show(q[0, :5])} ..., which are not whole")
            require(bool((q.abs() <= top).all()), f"{case} gives numbers up to {q.abs().max():.0f}, expected at most {top}",
                    f"{bits} bits have {2*top + 1} steps around zero")
            used = x.abs().amax(1) > 0
            if not torch.allclose(scale[used], right[used], rtol=1e-4):
                row = int(((scale - right).abs() > 1e-4 * right).flatten().nonzero()[0])
                raise WrongAnswer(f"{case}: the scale of row {row} is {scale[row, 0]:.4g}, expected {right[row, 0]:.4g}: "
                                  f"the largest number of each row becomes {top}")
            if not torch.equal(q, wanted):
                row, i = (q != wanted).nonzero()[0].tolist()
                raise WrongAnswer(f"{case}: {x[row, i]:.4g} in steps of {scale[row, 0]:.4g} becomes {q[row, i]:.0f}, expected {wanted[row, i]:.0f}")


def hadamard_matrix(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n: h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


@exercise
def check_hadamard(hadamard):
    for rows, n in ((1, 2), (1, 4), (3, 8), (5, 64), (1, 1), (2, 1024)):
        x = torch.zeros(rows, n)
        for name in "a single large number", "random numbers":
            if name == "a single large number": x[0, n // 2] = 8
            else: x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
            case = f"{name}, {rows} rows of {n}: hadamard" + (f"({show(x)})" if n < 5 else "")
            given = x.clone()
            got = attempt(case, hadamard, given)
            require(torch.equal(given, x), f"{case} changes what it is given")
            require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
            require(got.shape == x.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(x.shape)}")
            wanted = x.double() @ hadamard_matrix(n)
            if torch.allclose(got.double(), wanted, atol=n * 2**-22): continue
            why = "sums and differences of numbers 1, 2, 4, ... apart"
            before, after = x.double().square().sum().item(), got.double().square().sum().item()
            if abs(before - after) > 1e-3 * before: why = f"the sum of squares was {before:.4g} and is {after:.4g}: a rotation keeps it"
            raise WrongAnswer(f"{case} gives {show(got[0, :4])}, expected {show(wanted[0, :4])}: {why}")


@exercise
def check_int8_product(int8_product):
    for name, rows, outputs, inputs in (("1 row", [0.01], 3, 32), ("5 rows", [0.01] * 5, 40, 576), ("a row that is 10,000 times as large as the other", [0.01, 100.], 8, 64),
                                        ("a row of zeros beside another", [0.02, 0.], 8, 64)):
        x = torch.stack([row_like(127, inputs, 1 + i, scale) for i, scale in enumerate(rows)])
        weight = torch.stack([row_like(127, inputs, 50 + i, 0.001 * (1 + i)) for i in range(outputs)])
        (qx, sx), (qw, sw) = rounded(x, 127), rounded(weight, 127)
        wanted, case = qx @ qw.T * sx * sw.T, f"{name}, {outputs} outputs of {inputs} inputs: int8_product"
        got = attempt(case, int8_product, x.clone(), weight.clone())
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == wanted.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
        require(not got.isnan().any(), f"{case} gives numbers that are none", "what is 0 / 0?")
        size = qx.abs() @ qw.abs().T * sx * sw.T
        if bool(((got.double() - wanted).abs() <= 1e-6 * size).all()): continue
        row, out = ((got.double() - wanted).abs() > 1e-6 * size).nonzero()[0].tolist()
        whole, why = int((qx[row] * qw[out]).sum()), ""
        for reason, other in (("nothing has been rounded", x.double() @ weight.double().T),
                              ("the sum of whole numbers has not been scaled by both scales", qx @ qw.T),
                              ("only the scale of the row is in it", qx @ qw.T * sx), ("only the scale of the weight is in it", qx @ qw.T * sw.T)):
            if torch.allclose(got.double(), other, rtol=1e-5, atol=1e-5 * size.max().item()): why = f"; {reason}"
        if len(rows) > 1 and not why: why = "; each row has a scale of its own"
        raise WrongAnswer(f"{case} gives {got[row, out]:.6g} for output {out} of row {row}, expected {wanted[row, out]:.6g}: the sum of whole numbers is "
                          f"{whole:,}, which does not fit into 8 bits{why}")


@exercise
def check_smooth(smooth):
    for name, inputs, outputs, outlier in (("channels that are 20 times as large as others", 576, 96, 20), ("a channel that is 60 times as large as others", 64, 32, 60),
                                           ("a channel and a column of zeros beside large ones", 128, 32, 40)):
        g = torch.Generator().manual_seed(inputs)
        norm, weight = 0.5 + torch.rand(inputs, generator=g), 0.05 * torch.randn(outputs, inputs, generator=g)
        norm[::80] *= -outlier
        if "zeros" in name: norm[5], weight[:, 7] = 0, 0
        texts, x = torch.randn(2, 200, inputs, generator=g)                # behind the norm's division, before its weight
        case = f"{name}, {outputs} outputs of {inputs} inputs: smooth"
        got = call(smooth, norm.clone(), weight.clone(), (texts * norm).abs().amax(0), case=case)
        require(isinstance(got, (tuple, list)) and len(got) == 2 and all(map(torch.is_tensor, got)), f"{case} gives {show(got)}, not (norm, weight)",
                "Is a `return` missing?" if got is None else "")
        require(got[0].shape == norm.shape and got[1].shape == weight.shape,
                f"{case} gives shapes {tuple(got[0].shape)} and {tuple(got[1].shape)}, expected {tuple(norm.shape)} and {tuple(weight.shape)}")
        require(all(bool(part.isfinite().all()) for part in got), f"{case} gives numbers that are none, or infinite", "a factor of 0, or one that was divided by 0")
        old, new = ((x.double() * n.double(), w.double()) for n, w in ((norm, weight), got))
        exact = old[0] @ old[1].T
        gap = float((new[0] @ new[1].T - exact).abs().max() / exact.abs().max())
        require(gap < 1e-4, f"{case} changes the product in floats, by {gap:.1e} of its largest number",
                "what a channel is divided by, the column that it meets is multiplied by")
        def error(activations, matrix, both=(True, True)):
            kept = [q * s if yes else part for part, yes in ((activations, both[0]), (matrix, both[1])) for q, s in [rounded(part, 127)]]
            return float((kept[0] @ kept[1].T - exact).square().mean().sqrt())
        before, after = error(*old), error(*new)
        side = "the matrix" if error(*new, (False, True)) > error(*new, (True, False)) else "the activations"
        require(after < 0.5 * before, f"{case}: with both sides rounded, the error is {after / before:.0%} of what it was, expected less than half", f"most of it comes from {side}")
    return "the product is the same, and its error less than half"


def perplexity_with(linear=None, num_tokens=256) -> float:
    "The demo model's perplexity on a text; `linear(weight)` gives what multiplies with a weight."
    folder = fetch()
    config, text = ModelConfig.from_folder(folder), Path(__file__).parents[2]/"data/english.txt"
    ids = torch.tensor(Tokenizer(folder).encode(text.read_text())[:num_tokens])
    with torch.inference_mode():
        model = load_model(folder, config, torch.float32, "cpu", ops=Ops(linear=linear) if linear else Ops())
        hidden = model(ids, torch.arange(len(ids)), PlainAttention(config.head_dim ** -0.5))
        logprobs = model.compute_logits(hidden).log_softmax(-1)
    return (-logprobs[:-1].gather(1, ids[1:, None])).mean().exp().item()
