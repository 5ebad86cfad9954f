"Checks of the exercises of the chapter on mixtures of experts."
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano_vllm.layers import silu_and_mul
from nano_vllm.moe import route

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_tokens_for_share(tokens_for_share):
    for share, experts, chosen in ((0.9, 8, 2), (0.9, 128, 8), (0.5, 128, 8), (0.99, 64, 8), (0.1, 8, 2), (0.05, 8, 2), (0.75, 2, 1)):
        wanted = math.ceil(math.log(1 - share) / math.log(1 - chosen / experts))
        used = [1 - (1 - chosen / experts)**n for n in (wanted - 1, wanted)]
        expect(tokens_for_share, (share, experts, chosen), wanted,
               f"{wanted - 1} tokens use {used[0]:.1%} of the experts and {wanted} use {used[1]:.1%}")


@exercise
def check_ridge(ridge):
    for experts, chosen, peak, bandwidth, itemsize in ((1, 1, 100e9, 20e9, 4), (64, 8, 100e9, 20e9, 4), (128, 8, 1e15, 3.35e12, 2), (8, 2, 3e11, 33e9, 1)):
        expect(ridge, (experts, chosen, peak, bandwidth, itemsize), peak * experts * itemsize / (2 * chosen * bandwidth),
               f"for w weights an expert, {experts} x {itemsize} w bytes are read, and a token needs {chosen} x 2 w operations", 1e-4)


def mixture_case(tokens, experts, chosen, seed, hidden=6, inner=4):
    "x, the experts' matrices, the choices and their weights; and what a loop over tokens gives, in float64."
    g = torch.Generator().manual_seed(seed)
    x, scores = torch.randn(tokens, hidden, generator=g), torch.randn(tokens, experts, generator=g)
    gate_up, down = torch.randn(experts, 2 * inner, hidden, generator=g), torch.randn(experts, hidden, inner, generator=g)
    picks, weights = route(scores, chosen, normalise=True)
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for e, w in zip(picks[t].tolist(), weights[t].double()):
            wanted[t] += w * (down[e].double() @ silu_and_mul(gate_up[e].double() @ x[t].double()))
    return (x, gate_up, down, picks, weights), wanted


CASES = {"1 token, 2 of 3 experts": (1, 3, 2), "5 tokens, 1 of 4 experts": (5, 4, 1), "20 tokens, 3 of 7 experts": (20, 7, 3),
         "3 tokens, 2 of 16 experts": (3, 16, 2), "4 tokens, all of 3 experts": (4, 3, 3)}


def compare(case, got, wanted, why):
    require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
    require(got.shape == wanted.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    bad = ((got.double() - wanted).abs() > 1e-4 * wanted.abs().max()).any(1)
    if not bad.any() and not got.isnan().any(): return
    t = int(bad.nonzero()[0]) if bad.any() else 0
    raise WrongAnswer(f"{case} gives {show(got[t, :3])} ... for token {t}, expected {show(wanted[t, :3].float())} ...: {why}")


class Calls(TorchDispatchMode):
    "Counts what PyTorch is asked to compute."
    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += 1
        return function(*args, **(kwargs or {}))


@exercise
def check_all_experts(all_experts):
    for name, sizes in CASES.items():
        args, wanted = mixture_case(*sizes, seed=1)
        got = attempt(f"{name}: all_experts", all_experts, *(a.clone() for a in args))
        compare(f"{name}: all_experts", got, wanted, f"it has chosen the experts {args[3][0].tolist()} with the weights {show(args[4][0])}" if sizes[0] == 1
                else "each token's outputs are added up by its own weights, and experts that it has not chosen have the weight zero")
    args, _ = mixture_case(100, 50, 2, seed=1)
    with Calls() as calls: all_experts(*args)
    require(calls.num < 150, f"100 tokens, 50 experts: all_experts asks PyTorch for {calls.num} operations", "a loop over tokens or experts is not needed")


@exercise
def check_mixture(mixture):
    for name, sizes in CASES.items():
        (x, gate_up, down, picks, weights), wanted = mixture_case(*sizes, seed=2)
        asked = {}

        def run_expert(e, rows):
            e = int(e)
            if not 0 <= e < sizes[1]: raise WrongAnswer(f"{name}: there is no expert {e}")
            if rows.ndim != 2: raise WrongAnswer(f"{name}: expert {e} gets rows of shape {tuple(rows.shape)}, expected (n, {x.shape[1]})")
            if not len(rows): raise WrongAnswer(f"{name}: expert {e} is run without rows; its weights would be read for nothing")
            if e in asked: raise WrongAnswer(f"{name}: expert {e} is run a second time, and its weights would be read again")
            asked[e] = len(rows)
            return silu_and_mul(rows @ gate_up[e].T) @ down[e].T

        got = attempt(f"{name}: mixture", mixture, x.clone(), picks.clone(), weights.clone(), run_expert)
        compare(f"{name}: mixture", got, wanted, "each token gets its own experts' outputs, by its own weights")
        unused = set(asked) - set(picks.flatten().tolist())
        require(not unused, f"{name}: the experts {sorted(unused)} are run, though nobody has chosen them")
        for e, num_rows in asked.items():
            num = int((picks == e).sum())
            require(num_rows == num, f"{name}: expert {e} gets {num_rows} rows, and {num} tokens have chosen it", "an expert is run on its own tokens alone")
    return "and each expert that is in use was run once"


@exercise
def check_tokens_to_send(tokens_to_send):
    cases = {"two ranks, four experts": ([[[0, 1], [1, 3]], [[2, 0]]], 4, [[2, 1], [1, 1]]),
             "a rank without tokens": ([[[0, 3], [2, 3], [3, 0]], []], 4, [[2, 3], [0, 0]]),
             "three ranks, one expert a token": ([[[5], [0], [2]], [[1], [1]], [[3], [4], [5], [0]]], 6, [[1, 1, 1], [2, 0, 0], [1, 1, 2]]),
             "all experts of a token on one rank": ([[[4, 5, 6, 7]], [[0, 1, 2, 3]]], 8, [[0, 1], [1, 0]]), "one rank": ([[[0, 1], [1, 0]]], 2, [[2]])}
    for name, (choices, num_experts, wanted) in cases.items():
        size = num_experts // len(choices)
        expect(tokens_to_send, (choices, num_experts), wanted, f"{name}: each rank has {size} expert{'s' * (size > 1)}, and a token goes to a rank once")


def uneven_load(experts=64, rows=2048):
    "Rows of each expert in a step, some experts being much in demand."
    g = torch.Generator().manual_seed(0)
    popularity = (0.9 * torch.randn(experts, generator=g)).exp()
    return torch.bincount(popularity.multinomial(rows, replacement=True, generator=g), minlength=experts).tolist()


def busiest(load, rank_of, ranks=4):
    "How many times the even part the busiest rank has to do, if expert `e` is on rank `rank_of[e]`."
    if len(rank_of) != len(load): raise WrongAnswer(f"{len(rank_of)} experts are placed, there are {len(load)}")
    sums, counts = [0] * ranks, [0] * ranks
    for e, (rows, rank) in enumerate(zip(load, rank_of)):
        if not (hasattr(rank, "__index__") and rank in range(ranks)): raise WrongAnswer(f"expert {e} is placed on rank {show(rank)}, there are 0 to {ranks - 1}")
        sums[rank] += rows
        counts[rank] += 1
    if len(set(counts)) > 1: raise WrongAnswer(f"the ranks have {counts} experts, and must have equally many: their memory is full")
    return max(sums) * ranks / sum(load)
