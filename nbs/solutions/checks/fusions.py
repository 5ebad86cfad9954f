"Checks of the exercises of the chapter on fusions."
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
def check_numbers_a_thread(numbers_a_thread):
    for heads, dim in ((16, 128), (64, 128), (9, 64), (5, 80), (1, 256), (32, 128)):
        rows, width = 1 << (heads - 1).bit_length(), 1 << (dim // 2 - 1).bit_length()
        warps = 4 if rows * width <= 2048 else 8
        expect(numbers_a_thread, (heads, dim), 2 * rows * width / (32 * warps),
               f"two tiles of {rows} x {width} numbers, for {warps} warps of 32 threads", 1e-9)


@exercise
def check_norm_halves(norm_halves):
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 128), (torch.float16, 32)):
        g = torch.Generator().manual_seed(dim)
        x, weight = 3 * torch.randn(400, dim, generator=g), torch.randn(dim, generator=g)
        x, weight = x.to(dtype), weight.to(dtype)
        case = f"400 heads of {dim} numbers in {dtype}: norm_halves"
        got = attempt(case, norm_halves, *(part.clone() for part in x.chunk(2, -1)), *weight.chunk(2), 1e-6)
        require(isinstance(got, (tuple, list)) and len(got) == 2, f"{case} gives {show(got)}, not (left, right)", "Is a `return` missing?" if got is None else "")
        require(all(torch.is_tensor(part) and part.shape == (400, dim // 2) for part in got), f"{case} gives tensors of another shape than (400, {dim // 2})")
        require(all(part.dtype == dtype for part in got), f"{case} gives {got[0].dtype}, expected {dtype}")
        wanted, whole = rms_norm(x, weight, 1e-6), torch.cat(list(got), -1)
        step = torch.finfo(dtype).eps
        gap, size = (whole.double() - wanted.double()).abs(), wanted.double().abs() + 1e-3
        share = (gap > (4 * step if dtype == torch.float32 else 0) * size).float().mean().item()
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
    for a, b in zip(got, wanted):
        if a.dtype != b.dtype or not torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2**-6):
            raise WrongAnswer("the norm, or the sum, is not that of rms_norm")
    if not torch.equal(weight, kept): raise WrongAnswer("the weight has been written over, and the next row of tokens needs it")
    copies = 2 * (x.nbytes + residual.nbytes)                  # `clone`, above
    return f"{heard.operations - 2} operations, {(heard.bytes - copies) / x.numel():.1f} bytes a number"
