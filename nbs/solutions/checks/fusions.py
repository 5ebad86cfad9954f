"Checks of the exercises of the chapter on fusions."
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano_vllm.layers import Rotary, rms_norm, rotate

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_fused_bytes(fused_bytes):
    for rows, hidden, itemsize, residual in ((256, 1024, 2, False), (256, 1024, 2, True), (1, 576, 4, True), (8, 64, 4, False)):
        passes = 4 if residual else 2
        expect(fused_bytes, (rows, hidden, itemsize, residual), (passes * rows + 1) * hidden * itemsize,
               f"{'x and the residual are read, the norm and the sum' if residual else 'x is read, the norm'} written, {rows} rows each, "
               "and the weight is read once")


@exercise
def check_graphs_for(graphs_for):
    for lengths, wanted, why in (([5, 6, 7], 1, "a length is a variable"), ([5, 6, 1, 1, 7], 2, "a length of 1 has its own graph"), ([1], 1, "only one length"),
                                 ([1, 64], 2, "a length of 1 has its own graph"), ([9], 1, "only one length"), ([], 0, "nothing is called")):
        expect(graphs_for, (lengths,), wanted, why)


@exercise
def check_norm_halves(norm_halves):
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 32)):
        g = torch.Generator().manual_seed(dim)
        x, weight = 3 * torch.randn(400, dim, generator=g), torch.randn(dim, generator=g)
        x[0], x[1] = 0, x[1] / 1000                       # only `eps` keeps the first from being divided by zero, and it counts in the second
        x, weight = x.to(dtype), weight.to(dtype)
        case = f"400 heads of {dim} numbers in {dtype}: norm_halves"
        got = attempt(case, norm_halves, *(part.clone() for part in x.chunk(2, -1)), *weight.chunk(2), 1e-6)
        require(isinstance(got, (tuple, list)) and len(got) == 2, f"{case} gives {show(got)}, not (left, right)", "Is a `return` missing?" if got is None else "")
        require(all(torch.is_tensor(part) and part.shape == (400, dim // 2) for part in got), f"{case} gives tensors of another shape than (400, {dim // 2})")
        require(all(part.dtype == dtype for part in got), f"{case} gives {got[0].dtype}, expected {dtype}")
        wanted, whole = rms_norm(x, weight, 1e-6), torch.cat(list(got), -1)
        require(not whole.isnan().any(), f"{case} gives nan for a head of zeros", "`eps` belongs to the mean, below the root")
        step = torch.finfo(dtype).eps
        gap, size = (whole.double() - wanted.double()).abs(), wanted.double().abs() + 1e-3
        share = (gap > (4 * step if dtype == torch.float32 else 0) * size).float().mean().item()
        if (gap > 4 * step * size)[1].any() and not (gap > 4 * step * size)[2:].any():
            raise WrongAnswer(f"{case} is off by {(gap / size)[1].max():.1e} of a number in a head of small ones: `eps` belongs to the mean, below the root")
        if (gap > 4 * step * size).any():
            raise WrongAnswer(f"{case} is off by {(gap / size).max():.1e} of a number: the mean square is that of both halves together, "
                              "and each half has its own part of the weight")
        require(share <= 0.01, f"{case} differs from RMSNorm in {share:.0%} of the numbers, in the last bit",
                "it rounds after the scaling, and again after the weight")
    return "bit for bit, but for the order of a sum"


@exercise
def check_place_rows(place_rows):
    for name, heads, kv_heads, dim, slots in (("2 rows", 2, 1, 4, [3, 0]), ("5 rows, 9 heads over 3", 9, 3, 16, [7, 2, 9, 0, 5]),
                                              ("4 rows, of which two are padding", 4, 2, 8, [6, -1, 1, -1]), ("a row of padding", 2, 1, 4, [-1])):
        n, g = len(slots), torch.Generator().manual_seed(dim)
        qkv = torch.randn(n, (heads + 2 * kv_heads) * dim, generator=g)
        cos, sin = Rotary(dim, dict(rope_theta=1e4), 100)(torch.randint(1, 100, (n,), generator=g))
        parts = qkv.view(n, -1, dim).split([heads, kv_heads, kv_heads], 1)
        q, k, v = rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]
        keys, values = torch.full((2, 12, kv_heads, dim), torch.nan)
        given, case = qkv.clone(), f"{name}: place_rows"
        got = attempt(case, place_rows, given, cos.clone(), sin.clone(), torch.tensor(slots), keys, values)
        require(torch.equal(given, qkv), f"{case} changes the product that it is given")
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == q.shape, f"{case} gives queries of shape {tuple(got.shape)}, expected {tuple(q.shape)}")
        used = {slot: row for row, slot in enumerate(slots) if slot >= 0}
        for row in used.values():
            require(torch.allclose(got[row], q[row], atol=1e-5), f"{case}: the queries of row {row} are {show(got[row, 0, :4])} ..., expected "
                    f"{show(q[row, 0, :4])} ...", "each pair of numbers, half a head apart, is turned")
        for what, cache, new in (("key", keys, k), ("value", values, v)):
            for slot in range(12):
                if slot in used:
                    row = used[slot]
                    require(torch.allclose(cache[slot], new[row], atol=1e-5), f"{case}: the {what} in slot {slot} is {show(cache[slot, 0, :4])} ..., "
                            f"expected {show(new[row, 0, :4])} ...", "keys are turned, values are not")
                else:
                    require(bool(cache[slot].isnan().all()), f"{case}: a {what} has been written to slot {slot}, which belongs to none of the slots {slots}",
                            "a slot of -1 is none, and not the last one")


@exercise
def check_gelu_kernel(gelu_kernel):
    from .triton_kernels import launch
    g = torch.Generator().manual_seed(3)
    for name, dtype, rows, dim, block, scale in (("3 rows", torch.float32, 3, 8, 8, 1), ("rows that take two programs", torch.float32, 2, 21, 16, 1),
                                                 ("numbers up to some thousands", torch.float32, 2, 16, 16, 1000), ("every second number of a wider matrix", torch.float32, 3, 16, 8, 1),
                                                 ("float16", torch.float16, 40, 64, 64, 1)):
        wide = (scale * torch.randn(rows, 4*dim, generator=g)).to(dtype)
        x = wide[:, ::2] if "wider" in name else wide[:, :2*dim].contiguous()
        y, gate, up = torch.full((rows*dim + block,), torch.nan, dtype=dtype), *x.float().chunk(2, -1)
        case = f"{name}, (N, 2*DIM) = {(rows, 2*dim)}, BLOCK = {block}: gelu_kernel"
        with np.errstate(over="ignore", invalid="ignore"):        # e to the power of a large number is infinite
            launch(case, gelu_kernel, (rows, -(-dim // block)), x, y, *x.stride(), dim, block)
        require(bool(y[rows*dim:].isnan().all()), f"{case} writes behind the last row", "mask what lies beyond DIM")
        got, gelu = y[:rows*dim].view(rows, dim), gate.double() * torch.sigmoid(1.5957691 * (gate.double() + 0.044715 * gate.double()**3))
        require(not got.isnan().any(), f"{case} gives nan, or nothing", "e**z may be infinite, and infinity divided by infinity is no number" if scale > 1 else
                "each program writes BLOCK numbers of its row, which begins at row*DIM of y")
        wanted = gelu.to(dtype).double() * up.double()
        bad = (got.double() - wanted).abs() > 4 * torch.finfo(dtype).eps * wanted.abs() + 1e-5 * scale
        if bad.any():
            row, i = bad.nonzero()[0].tolist()
            raise WrongAnswer(f"{case} gives {got[row, i]:.5g} for gate {gate[row, i]:.5g} and up {up[row, i]:.5g}, expected {wanted[row, i]:.5g}")
        share = (got != wanted.to(dtype)).float().mean().item()
        require(share < .02 or dtype != torch.float16, f"{case} differs in {share:.0%} of the numbers, in the last bit", "GELU is rounded to the type of `x` before `up` multiplies it")
    return "one launch"


class Counting(TorchDispatchMode):
    "Bytes that operations read and write; views move nothing."

    def __init__(self):
        super().__init__()
        self.bytes, self.operations = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        ins, outs = ([x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in (args, out))
        shared = {x.untyped_storage().data_ptr() for x in outs} <= {x.untyped_storage().data_ptr() for x in ins}
        empty = "empty" in op.__name__                          # memory that nobody has written
        if empty or shared and not op._schema.is_mutable: return out
        self.operations, self.bytes = self.operations + 1, self.bytes + sum(x.nbytes for x in ins + outs)
        return out


def score(add_norm) -> str:
    "Operations, and bytes for each number of `x`, of an add_norm(x, residual, weight, eps) for 256 rows in bfloat16."
    g = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, generator=g).bfloat16() for shape in ((256, 1024), (256, 1024), (1024,)))
    wanted, kept = rms_norm(x, weight, 1e-6, residual), weight.clone()
    with torch.inference_mode(), Counting() as heard: got = add_norm(x.clone(), residual.clone(), weight, 1e-6)
    if not (isinstance(got, (tuple, list)) and len(got) == 2 and all(map(torch.is_tensor, got))): raise WrongAnswer(f"your answer gives {show(got)}, not (norm, sum)")
    for a, b in zip(got, wanted):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2**-6):
            raise WrongAnswer("the norm, or the sum, is not that of rms_norm")
    if not torch.equal(weight, kept): raise WrongAnswer("the weight has been written over, and the next row of tokens needs it")
    copies = 2 * (x.nbytes + residual.nbytes)                  # `clone`, above
    return f"{heard.operations - 2} operations, {(heard.bytes - copies) / x.numel():.1f} bytes a number"
