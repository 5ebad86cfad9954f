"Checks of the exercises of the chapter on sampling kernels."
import builtins
import math
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import WrongAnswer, attempt, exercise, expect, require, show

PYTHONS_SORTED = sorted
SORTS = ("sort", "argsort", "topk", "kthvalue", "unique", "median", "quantile", "searchsorted")


class NoSort(TorchDispatchMode):
    "Refuses PyTorch's operations that put numbers in order."

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.split("::")[-1]
        if name.startswith(SORTS) or name.strip("_").startswith("unique"): raise WrongAnswer(f"your answer calls {name}, which sorts; compare and count instead")
        return op(*args, **kwargs or {})


def no_floats_sorted(items, **kwargs):
    "Python's `sorted`, which refuses numbers of the row."
    items, sort = list(items), kwargs.get("key")
    if any(isinstance(item, float) or torch.is_tensor(item) for item in (map(sort, items) if sort else items)):
        raise WrongAnswer("your answer calls sorted, which sorts; compare and count instead")
    return PYTHONS_SORTED(items, **kwargs)


def without_sort(case, function, *args):
    "What `function` gives, on copies of `args`, if it does without a sort."
    given = [a.clone() if torch.is_tensor(a) else a for a in args]
    with NoSort(), mock.patch.object(builtins, "sorted", no_floats_sorted): got = attempt(case, function, *given)
    for old, new in zip(args, given):
        if torch.is_tensor(old): require(torch.equal(old, new), f"{case} changes what it is given")
    require(got is not None, f"{case} gives None", "Is a `return` missing?")
    return got


@exercise
def check_bytes_read(bytes_read):
    greedy, plain, warm = (0., 0, 1., 0.), (1., 0, 1., 0.), (.7, 0, 1., 0.)
    few, nucleus, likely = (.7, 50, 1., 0.), (1., 0, .9, 0.), (1., 0, 1., .1)
    for batch, readings, why in (([greedy], 1, "a greedy row is read once"), ([plain, warm], 2, "a row without filters is read once, at any temperature"),
                                 ([few], 3, "the largest, the numbers above a bound, the race"), ([nucleus], 4, "without top-k, top-p has to weigh the row for its bound"),
                                 ([likely], 2, "min-p alone needs the largest, and no gathering"), ([(1., 9, .5, .1)], 3, "with top-k the bound comes from the lanes, and the filters share their readings"),
                                 ([(0., 50, .9, .1)], 1, "a greedy row has no use for filters"), ([greedy, warm, likely, few], 7, "no row pays for another one"), ([], 0, "no rows")):
        for vocab, itemsize in ((151936, 4), (1000, 2)): expect(bytes_read, (batch, vocab, itemsize), readings * vocab * itemsize, why)


@exercise
def check_order_16(order_16):
    g = torch.Generator().manual_seed(0)
    for name, x in (("six numbers", torch.tensor([-2., -1., 0., 1., 1.5, 2.])), ("0 and -0", torch.tensor([-1., -0., 0., 1.])),
                    ("infinities", torch.tensor([-math.inf, -3e38, 3e38, math.inf])), ("the least and zero", torch.tensor([-9.2e-41, -0., 0., 9.2e-41])),
                    ("2,000 random ones", (torch.randn(2000, generator=g) * 10).sort().values)):
        x, case = x.bfloat16(), f"{name}: order_16"
        got = attempt(case, order_16, x.clone())
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == x.shape and not got.is_floating_point(), f"{case} gives {got.dtype} of shape {tuple(got.shape)}, expected as many integers")
        require(int(got.min()) >= -2**15 and int(got.max()) < 2**15, f"{case} gives integers from {got.min()} to {got.max()}, which 16 bits do not hold")
        step, wanted = got.long().diff().sign(), x.float().diff().sign().long()
        for i in (step != wanted).nonzero().flatten().tolist()[:1]:
            relation = "=<>"[int(wanted[i])]
            raise WrongAnswer(f"{case}: {x[i].item()} {relation} {x[i+1].item()}, but their integers are {got[i].item()} and {got[i+1].item()}"
                              + (": equal numbers get equal integers" if relation == "=" else ""))


@exercise
def check_kth_largest(kth_largest):
    g = torch.Generator().manual_seed(1)
    cases = {"8 numbers": torch.tensor([4.72, 5.18, -4.01, 5.18, 9.77, -5.33, .12, 5.9]), "ties": torch.tensor([1., 2., 2., 2., 3.]), "one number": torch.tensor([-7.5]),
             "all equal": torch.full((5,), .1), "-inf among them": torch.tensor([1., -math.inf, 2., -math.inf]), "zeros": torch.tensor([-1., 0., -0., 1.]),
             "close together": 1 + torch.arange(6) * 2**-23, "of every size": torch.tensor([1e-38, 1e38, -1e38, -1e-38, 1e-3, 3e38]),
             "1,000 random ones": torch.randn(1000, generator=g)}
    for name, x in cases.items():
        for k in sorted({1, 2, 4, len(x) // 2, len(x)} & set(range(1, len(x) + 1))):
            case = f"{name}, k = {k}: kth_largest"
            got, wanted = without_sort(case, kth_largest, x, k), sorted(x.tolist(), reverse=True)[k - 1]
            require(isinstance(got, (int, float)) or torch.is_tensor(got) and got.numel() == 1, f"{case} gives {show(got)}, not a number")
            got = float(got)
            require(got == wanted, f"{case} gives {got!r}, expected {wanted!r}", f"{int((x >= got).sum())} numbers reach yours")


def kept(probs, p):
    mass, stays = 0., []
    for value in sorted(probs.tolist(), reverse=True):
        if mass < p: last = value
        mass += value
    return probs >= last


@exercise
def check_nucleus(nucleus):
    g = torch.Generator().manual_seed(2)
    eighths = torch.tensor([1, 3, 1, 2, 1.]).double() / 8
    cases = [("eighths", eighths, p) for p in (.25, .375, .5, .625, .7, .99)] + [("flat", torch.full((8,), .125).double(), p) for p in (.1, .6)]
    cases += [("eighths", eighths, 1e-9), ("one token", torch.ones(1).double(), .5), ("with zeros", torch.tensor([0, .75, 0, .25]).double(), .8)]
    cases += [("2,000 tokens", (torch.randn(2000, generator=g).double() * 3).softmax(-1), p) for p in (.3, .9, .999)]
    for name, probs, p in cases:
        case, wanted = f"{name}, p = {p}: nucleus", kept(probs, p)
        got = without_sort(case, nucleus, probs, p)
        require(torch.is_tensor(got) and got.dtype == torch.bool and got.shape == probs.shape, f"{case} gives {show(got)}, not a boolean for each token")
        if torch.equal(got, wanted): continue
        mass, most = float(probs[got].sum()), float(probs[wanted].sum())
        raise WrongAnswer(f"{case} keeps {int(got.sum())} tokens of mass {mass:.4f}, expected {int(wanted.sum())} of mass {most:.4f}: "
                          "the token that reaches p stays, and what is as likely stays with it")
