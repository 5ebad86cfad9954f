"Checks of the exercises of the chapter on layers."
import math

import torch
import torch.nn.functional as F

from nano_vllm.layers import Rotary, TensorParallelGroup, rotate

from . import attempt, exercise, expect, require, show


def near(case, got, wanted, tolerance, why=""):
    "`got` must be a tensor like `wanted`, each number within `tolerance`: a number, or one for each."
    require(got is not None, f"{case} gives None. Is a `return` missing?")
    require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor")
    require(got.shape == wanted.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(wanted.shape)}", why)
    far = ~((got.float() - wanted.float()).abs() <= tolerance)          # also where it is not a number
    if far.any():
        place = far.nonzero()[0].tolist()
        require(False, f"{case} has {show(got[tuple(place)])} at {place}, expected {show(wanted[tuple(place)])}", why)


@exercise
def check_break_even(break_even):
    for bandwidth, peak, itemsize in ((400e9, 20e12, 2), (400e9, 20e12, 4), (30e9, 250e9, 4), (3.35e12, 989e12, 2)):
        wanted = peak * itemsize / (2 * bandwidth)
        expect(break_even, (bandwidth, peak, itemsize), wanted,
               f"a weight is {itemsize} bytes to read, and a multiplication and an addition for each token",
               tolerance=1e-9 * wanted)


@exercise
def check_norm(norm):
    g = torch.Generator().manual_seed(0)
    for dtype, size, shape in ((torch.float32, 1e-3, (4, 8)), (torch.float32, 1, (4, 8)), (torch.bfloat16, 1, (2, 3, 64)),
                               (torch.float16, 300, (4, 64))):
        x, residual = (size * torch.randn(2, *shape, generator=g)).to(dtype)
        weight, eps = (1 + torch.rand(shape[-1], generator=g)).to(dtype), 1e-5
        for given in (None, residual):
            case = f"norm(x, weight, {eps}{'' if given is None else ', residual'}) for numbers of size {size} in {dtype}"
            before = [t.clone() for t in (x, weight, residual)]
            got = attempt(case, norm, x, weight, eps, given)
            for name, old, new in zip(("x", "weight", "residual"), before, (x, weight, residual)):
                require(torch.equal(old, new), f"{case} changes {name}", "an operator never writes to its inputs")
            total = x if given is None else x + given
            exact = total.double()
            exact = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
            if given is not None:
                require(isinstance(got, (tuple, list)) and len(got) == 2,
                        f"{case} gives {type(got).__name__}, expected two tensors", "the norm, and the sum it is of")
                got, stream = got
                near(f"the second result of {case}", stream, total, torch.finfo(dtype).eps * total.float().abs(),
                     "it is x + residual, before the norm")
            require(getattr(got, "dtype", dtype) == dtype, f"{case} has dtype {got.dtype if torch.is_tensor(got) else got}, expected that of x")
            # a few roundings to dtype, and float32 inside
            near(case, got, exact, 4 * torch.finfo(dtype).eps * exact.float().abs() + 1e-6,
                 {300: "the square of 300 does not fit into float16: float32 inside",
                  1e-3: "eps is more than the mean square of such numbers"}.get(size, ""))


ROPES = [dict(rope_type="default", rope_theta=10000.), dict(rope_type="linear", rope_theta=10000., factor=4.),
         dict(rope_type="yarn", rope_theta=10000., factor=4., original_max_position_embeddings=64)]


@exercise
def check_move_keys(move_keys):
    g = torch.Generator().manual_seed(0)
    for rope in ROPES:
        rotary, x = Rotary(32, rope, 128), torch.randn(5, 2, 32, generator=g)
        for old, new in (([3, 4, 5, 6, 7], [3, 4, 5, 6, 7]), ([0, 1, 2, 3, 4], [90, 91, 92, 93, 94]),
                         ([90, 91, 92, 93, 94], [0, 1, 2, 3, 4]), ([7, 9, 60, 1, 2], [8, 3, 2, 1, 99])):
            old_at, new_at = torch.tensor(old), torch.tensor(new)
            keys, wanted = rotate(x, *rotary(old_at)), rotate(x, *rotary(new_at))
            case = f"move_keys(keys, rotary, {old}, {new}) with rope type {rope['rope_type']}"
            before = keys.clone()
            got = attempt(case, move_keys, keys, rotary, old_at, new_at)
            require(torch.equal(before, keys), f"{case} changes the keys that it is given")
            near(case, got, wanted, 16 * 128 * torch.finfo(torch.float32).eps * x.abs().max(),   # angles go up to 128
                 "the keys as they would be had they been computed there; yarn's factor is in them once"
                 if rope["rope_type"] == "yarn" else "the keys as they would be had they been computed there")


@exercise
def check_mlp_of_rank(mlp_of_rank):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=g)
    for inner, size in ((6, 1), (6, 2), (6, 3), (7, 2), (7, 3)):
        gate_up, down = torch.randn(2*inner, 4, generator=g), torch.randn(4, inner, generator=g)
        gate, up = (x @ gate_up.T).chunk(2, -1)
        wanted, total = (F.silu(gate) * up) @ down.T, torch.zeros(3, 4)
        for rank in range(size):
            case = f"mlp_of_rank(x, gate_up, down, group) with {inner} inner numbers on rank {rank} of {size}"
            part = attempt(case, mlp_of_rank, x, gate_up, down, TensorParallelGroup(rank, size))
            near(case, part, wanted, math.inf)
            require(bool(part.any()), f"{case} gives zeros", "each rank is to have a part of the work")
            total += part
        size_of_sums = (x.abs() @ gate_up.abs().T).square().amax() * down.abs().sum(1).max()
        near(f"the sum over {size} ranks, with {inner} inner numbers,", total, wanted,
             8 * inner * torch.finfo(torch.float32).eps * size_of_sums,
             "a rank needs the gates and the ups of the same inner numbers, and the columns of down that belong to them")
