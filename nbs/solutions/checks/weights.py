"Checks of the exercises of the chapter on weights."
import copy

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nano_vllm.layers import ShardRange, WeightShard

from . import WrongAnswer, attempt, exercise, expect, require, show


def entry(begin, end): return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@exercise
def check_share_as_is(share_as_is):
    layer = "model.layers.0."
    small = {"model.norm.weight": entry(0, 8), layer + "self_attn.q_proj.weight": entry(8, 40)}
    whole = {"model.embed_tokens.weight": entry(0, 400), **{f"{layer}self_attn.{x}_proj.weight": entry(a, b)
             for x, a, b in (("q", 400, 464), ("k", 464, 480), ("v", 480, 496), ("o", 496, 560))},
             **{f"{layer}mlp.{x}_proj.weight": entry(a, b) for x, a, b in (("gate", 560, 660), ("up", 660, 760), ("down", 760, 860))}}
    biased = {layer + "self_attn.v_proj.bias": entry(0, 12), layer + "self_attn.q_norm.weight": entry(12, 16)}
    noted = {"__metadata__": {"format": "pt"}, **small}
    mixed = {"model.norm.weight": entry(0, 8), layer + "self_attn.q_proj.weight": {"dtype": "BF16", "shape": [16], "data_offsets": [8, 40]}}
    for header, wanted, why in ((small, 8/40, "8 bytes of 40 are not q_proj's"), (whole, 564/860, "q, k and v are merged, and gate and up"),
                                (biased, 4/16, "v_proj's bias is merged, q_norm is not a projection"),
                                (noted, 8/40, "__metadata__ is no tensor"), (mixed, 8/40, "q_proj's 16 numbers in bfloat16 are 32 bytes"),
                                (dict(reversed(whole.items())), 564/860, "order does not matter")):
        expect(share_as_is, (header,), wanted, why, tolerance=1e-9)


class Rows:
    "A tensor of a file as `get_slice` gives it, which counts the numbers that are read."
    def __init__(self, values): self.values, self.read = values, 0
    def get_shape(self): return list(self.values.shape)

    def __getitem__(self, index):
        part = self.values[index]
        self.read += part.numel()
        return part.clone()


@exercise
def check_read_rows(read_rows):
    for shape, size in (((6, 4), 1), ((6, 4), 2), ((7, 4), 2), ((8, 2), 3), ((6,), 3)):
        values, parts = torch.arange(float(torch.tensor(shape).prod())).view(shape), []
        for rank in range(size):
            tensor, case = Rows(values), f"read_rows(tensor, {rank}, {size}) of a tensor of shape {list(shape)}"
            part = attempt(case, read_rows, tensor, rank, size)
            require(torch.is_tensor(part), f"{case} gives {show(part)}, not a tensor")
            require(tensor.read <= part.numel(), f"{case} reads {tensor.read} numbers for the {part.numel()} that it gives",
                    "index the slice with the rows that are wanted, and nothing else of the file is touched")
            fair = -(-shape[0] // size)
            require(len(part) <= fair, f"{case} gives {len(part)} rows", f"no part is larger than {fair} rows")
            parts.append(part)
        require(torch.equal(torch.cat(parts), values), f"the parts of {size} ranks are {show([p.tolist() for p in parts])}",
                f"one after the other they should be the tensor, {show(values)}")


@exercise
def check_to_safetensors(to_safetensors):
    for tensors in ({"x": torch.tensor([[1., 2.], [3., 4.]])}, {"b": torch.arange(3.), "a": torch.tensor([[-1.5]])},
                    {f"layer.{i}.ä": torch.full((i + 1, 2), float(i)) for i in range(12)}):
        case = f"to_safetensors of {', '.join(f'{n} {list(t.shape)}' for n, t in tensors.items())}"
        data = attempt(case, to_safetensors, copy.deepcopy(tensors))
        require(data is not None, f"{case} gives None. Is a `return` missing?")
        require(isinstance(data, (bytes, bytearray)), f"{case} gives a {type(data).__name__}, not bytes")
        try: back = load(bytes(data))
        except (SafetensorError, ValueError, KeyError) as error:
            right = save({"x": torch.zeros(1)})
            raise WrongAnswer(f"the library cannot read {case}: {error}. Your file begins with {bytes(data[:24])}; "
                              f"one that it wrote itself, with {right[:24]}") from error
        require(set(back) == set(tensors), f"{case} holds {sorted(back)}")
        for name, wanted in tensors.items():
            got = back[name]
            require(got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted),
                    f"in {case}, {name} is read as {show(got)}, expected {show(wanted)}")


def places(**extra):
    "Places for a norm, and for two matrices in one parameter; a rank's part of the second."
    merged, norm = torch.full((5, 2), torch.nan), torch.full((3,), torch.nan)
    second = ShardRange(2, 2, 4)
    return {"norm.weight": WeightShard(norm, (3,), (slice(None),)), "q.weight": WeightShard(merged[:3], (3, 2), (slice(None),)),
            "k.weight": WeightShard(merged[3:], (4, 2), (second.slice,)), **extra}, merged, norm


VALUES = {"norm.weight": torch.tensor([7., 8., 9.]), "q.weight": torch.arange(6.).view(3, 2), "k.weight": torch.arange(8.).view(4, 2) + 10}


@exercise
def check_fill(fill):
    for order in (["norm.weight", "q.weight", "k.weight"], ["k.weight", "q.weight", "norm.weight"]):
        case = f"fill(places, tensors) with the tensors {', '.join(order)}"
        here, merged, norm = places()
        attempt(case, fill, here, iter([(name, VALUES[name]) for name in order]))
        wanted = torch.cat([VALUES["q.weight"], VALUES["k.weight"][2:]])
        require(torch.equal(merged, wanted), f"after {case} the merged parameter is {show(merged)}, expected {show(wanted)}",
                "copy the part `index` of a tensor into its parameter")
        require(torch.equal(norm, VALUES["norm.weight"]), f"after {case} the norm is {show(norm)}")
    every = list(VALUES.items())
    for says, tensors, named in (
            ("k.weight is missing", every[:2], "k.weight"), ("nothing is there", [], ""), ("there is a surplus bias", [*every, ("bias", torch.ones(3))], "bias"),
            ("q.weight comes twice", [*every, every[1]], "q.weight"), ("q.weight comes twice and k.weight never", [*every[:2], every[1]], "weight"),
            ("norm.weight is a single number, which copy_ would spread", [("norm.weight", torch.ones(1)), *every[1:]], "norm.weight"),
            ("q.weight has the right size and is turned", [every[0], ("q.weight", torch.ones(2, 3)), every[2]], "q.weight"),
            ("k.weight is only the rank's part of it", [*every[:2], ("k.weight", torch.ones(2, 2))], "k.weight")):
        case = f"fill(places, tensors), though {says},"
        try: fill(places()[0], iter(tensors))
        except ValueError as error:
            require(named in str(error), f"{case} raises ValueError: {error}", f"the message has to name {named}")
            continue
        except Exception as error:
            raise WrongAnswer(f"{case} raises {type(error).__name__}: {error}, not a ValueError") from error
        raise WrongAnswer(f"{case} raises nothing: a model that is loaded in part runs, and is wrong")
    return "what does not fit is refused with its name"
