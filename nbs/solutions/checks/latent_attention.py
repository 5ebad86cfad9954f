"Checks of the exercises of the chapter on latent attention."
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import call, exercise, expect, require, same


@exercise
def check_share(share):
    for heads, nope, rope, value, rank in ((16, 128, 64, 128, 512), (128, 128, 64, 128, 512), (2, 8, 6, 9, 10), (1, 4, 2, 4, 3)):
        expect(share, (heads, nope, rope, value, rank), (rank + rope) / (heads * (nope + rope + value)),
               "kept are the latent and one rotated key, whatever the number of heads", tolerance=1e-9)


class Sizes(TorchDispatchMode):
    "Notes how many numbers each new tensor has."
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        self.seen |= {x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@exercise
def check_absorbed_scores(absorbed_scores):
    rng = torch.Generator().manual_seed(0)
    for queries, heads, nope, rope, rank, tokens in ((3, 2, 5, 4, 7, 11), (1, 3, 8, 2, 4, 13), (2, 1, 3, 2, 5, 17)):
        shapes = (queries, heads, nope), (queries, heads, rope), (heads, nope, rank), (tokens, rank), (tokens, rope)
        # whole numbers: the order of adding makes no difference
        given = [torch.randint(-3, 4, shape, generator=rng).float() for shape in shapes]
        q_nope, q_rope, w_uk, latents, rope_keys = given
        keys = torch.einsum("hdr,kr->khd", w_uk, latents)
        nope_scores = torch.einsum("qhd,khd->hqk", q_nope, keys)
        wanted = nope_scores + torch.einsum("qhr,kr->hqk", q_rope, rope_keys)
        case = f"for {queries} queries, {heads} heads and {tokens} tokens your answer"
        with Sizes() as sizes: got = call(absorbed_scores, *given, case=case)
        require(got is not None, f"{case} gives None", "Is a `return` missing?")
        require(isinstance(got, torch.Tensor), f"{case} is a {type(got).__name__}, expected a tensor")
        shape = tuple(got.shape)
        require(shape == tuple(wanted.shape), f"{case} has the shape {shape}, expected {tuple(wanted.shape)}", "heads, queries, tokens")
        require(not same(got, nope_scores), f"{case} lacks the rotated part of the scores")
        require(same(got, wanted), f"{case} differs from the scores of keys that are made first by up to {float((got - wanted).abs().max()):.0f}")
        require(tokens * heads * nope not in sizes.seen, f"{case} makes a tensor of {tokens * heads * nope} numbers",
                "as many as all keys have; multiply the queries by w_uk instead")


def turning(length, rank, nope, rope, value):
    "By trying all numbers of queries."
    for n in range(1, length + 1):
        absorbed = n * rank * (nope + value) + n * length * (2*rank + rope)
        if absorbed > length * rank * (nope + value) + n * length * (nope + rope + value): return n


@exercise
def check_break_even(break_even):
    for args in ((2048, 512, 128, 64, 128), (8192, 512, 128, 64, 128), (200, 512, 128, 64, 128), (64, 16, 8, 4, 8), (100, 4, 8, 4, 8), (1, 512, 128, 64, 128), (12, 10, 4, 2, 4),
                 (7, 4, 8, 4, 8), (3, 2, 2, 2, 1)):     # first beyond the text, and equal work just before
        length, wanted = args[0], turning(*args)
        why = ("up to so many queries absorbing is never more work" if wanted is None else
               f"with {wanted} queries it is more work for the first time; the expanded form makes keys and values of {length} tokens, the absorbed "
               "one multiplies each query and each output")
        got = call(break_even, *args)
        expect(lambda *_: got, args, wanted, why, case=f"break_even{args}")
