"Checks of the exercises of the chapter on four bits."
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import WrongAnswer, attempt, exercise, expect, require, show

GROUP = 32


@exercise
def check_megabytes(megabytes):
    for in_layers, in_head, group, scale_bits in ((106_168_320, 28_311_552, 32, 16), (106_168_320, 28_311_552, 32, 32), (64_000_000, 0, 64, 32), (0, 8_000_000, 32, 16)):
        wanted = (in_layers * (4 + scale_bits/group) + 8*in_head) / 8e6
        expect(megabytes, (in_layers, in_head, group, scale_bits), wanted, f"{group} weights share the {scale_bits} bits of a scale; a byte has eight bits", 1e-3)


def packed(q):
    "Eight numbers from -8 to 7 in each word, number by number."
    words = torch.zeros(q.shape[0], q.shape[1] // 8, dtype=torch.int64)
    for i in range(8): words |= (q[:, i::8].long() + 8) << (8*(i % 4) + 4*(i // 4))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@exercise
def check_unpack_nibbles(unpack_nibbles):
    g = torch.Generator().manual_seed(0)
    for name, q in {"zeros": torch.zeros(1, 8), "-8 and 7": torch.tensor([[-8., 7] * 4]), "one to seven": torch.arange(8.)[None],
                    "the last number is large": torch.tensor([[0., 0, 0, 0, 0, 0, 0, 7]]), "three outputs": torch.randint(-8, 8, (3, 40), generator=g)}.items():
        q = q.to(torch.int8)
        case, words = f"{name}: unpack_nibbles", packed(q)
        got = attempt(case, unpack_nibbles, words.clone())
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.dtype == torch.int8, f"{case} gives {got.dtype}, expected torch.int8")
        require(got.shape == q.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(q.shape)}")
        if torch.equal(got, q): continue
        why = ""
        if torch.equal(got, q + 8): why = "8 was added before they were packed"
        elif bool((got < -8).any() or (got > 7).any()): why = "four bits hold -8 to 7; what else came along in the shift?"
        elif torch.equal(got.sort(1).values, q.sort(1).values): why = "the numbers are right, their order is not: byte i holds numbers i and 4 + i"
        row = int((got != q).any(1).int().argmax())
        require(False, f"{case} gives {show(got[row, :8])} ..., expected {show(q[row, :8])} ...", why)


class NoFloatWeights(TorchDispatchMode):
    "Refuses weights in floats: whole groups of floats that are too small to be rows of x. (The sizes below make no other tensor a multiple of 32.)"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        got = function(*args, **(kwargs or {}))
        if torch.is_tensor(got) and got.is_floating_point() and got.numel() and got.numel() % GROUP == 0 and got.abs().max() < 16:
            raise WrongAnswer(f"`{function.__name__.partition('.')[0]}` makes {got.numel()} floats of weights: multiply whole numbers by whole numbers, "
                              "and the sums of groups by `scale`")
        return got


@exercise
def check_product_with_minimum(product_with_minimum):
    g = torch.Generator().manual_seed(1)
    for name, rows, outputs, groups in (("one row, one group", 1, 3, 1), ("five rows, three groups", 5, 7, 3), ("a long row", 2, 5, 47)):
        n = groups * GROUP
        q = torch.randint(0, 16, (outputs, n), generator=g, dtype=torch.int8)
        x = torch.randint(-127, 128, (rows, n), generator=g, dtype=torch.int8)
        x[0] = 127                                       # sums that 8 bits cannot hold, nor 16
        scale, minimum = torch.rand(outputs, groups, generator=g) / 9 + .01, -torch.rand(outputs, groups, generator=g)
        case = f"{name}: product_with_minimum"
        args = q.clone(), scale.clone(), minimum.clone(), x.clone()
        with NoFloatWeights(): got = attempt(case, product_with_minimum, *args)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, outputs), f"{case} has shape {tuple(got.shape)}, expected {(rows, outputs)}")
        require(got.dtype == torch.float32, f"{case} gives {got.dtype}, expected torch.float32")
        per_group = torch.einsum("rgi,ogi->rog", x.double().unflatten(1, (-1, GROUP)), q.double().unflatten(1, (-1, GROUP)))
        sums = x.double().unflatten(1, (-1, GROUP)).sum(-1)[:, None]
        first, second = per_group * scale.double(), sums * minimum.double()
        wanted, size = (first + second).sum(-1), (first.abs() + second.abs()).sum(-1)
        bad = (got.double() - wanted).abs() > (groups + 4) * 2**-23 * size
        if not bool(bad.any()): continue
        row, out = bad.nonzero()[0].tolist()
        why = ""
        for reason, other in {"the minimum is missing": first.sum(-1), "the minimum is added once for each group; it belongs to each of the 32 numbers": first.sum(-1) + minimum.double().sum(-1),
                              "the minimum has been scaled, too": ((per_group + sums * minimum.double()) * scale.double()).sum(-1)}.items():
            if torch.allclose(got.double(), other, rtol=1e-4): why = reason
        require(False, f"{case} gives {got[row, out]:.6g} for output {out} of row {row}, expected {wanted[row, out]:.6g}: the largest sum of a group is "
                       f"{per_group.abs().max():,.0f}", why)
