"Checks of the exercises of the chapter on Triton attention. They are about what kernels compute, and need neither Triton nor a GPU."
import torch

from . import attempt, call, exercise, expect, require, show
from .cuda_graphs import Tape
from .layers import near
from .triton_kernels import state_of


@exercise
def check_side_traffic(side_traffic):
    for split, group, dim, itemsize in ((256, 2, 128, 2), (64, 2, 128, 2), (4096, 2, 128, 2), (256, 3, 64, 4), (256, 1, 128, 2)):
        side, read = 2 * 4 * group * (dim + 2), split * 2 * dim * itemsize
        expect(side_traffic, (split, group, dim, itemsize), side / read,
               f"{group} x ({dim} + 2) numbers of four bytes are written and read again, {side} bytes, and {split} keys and values are {read}", tolerance=1e-12)


@exercise
def check_decode(decode):
    g = torch.Generator().manual_seed(0)
    for context, split in ((10, 4), (8, 4), (3, 4), (1, 4), (33, 8)):
        q, (keys, values), reads = torch.randn(5, generator=g), torch.randn(2, context, 5, generator=g), []

        def read(begin, end):
            require(0 <= begin < end <= context, f"`read({begin}, {end})` was called for a context of {context}")
            reads.append((begin, end))
            return keys[begin:end].clone(), values[begin:end].clone()

        case = f"decode(q, read, {context}, {split})"
        out = attempt(case, decode, q, read, context, split)
        near(case, out, (keys @ q).softmax(0) @ values, 1e-4 * values.abs().max(), "shrink each part's mass and acc to the best score of all")
        wanted = [(i, min(i + split, context)) for i in range(0, context, split)]
        require(sorted(reads) == wanted, f"{case} reads {reads}, expected {wanted}",
                "each key once, in splits that begin at multiples of their length, so that nobody's bits depend on who else is there")


@exercise
def check_list_work(list_work):
    for num_items, capacity in (([1, 1, 1], 3), ([4, 1, 2], 7), ([4, 1, 2], 10), ([1, 0, 3, 0], 6), ([5], 5), ([0, 0, 2], 4)):
        first = [sum(num_items[:i]) for i in range(len(num_items) + 1)]
        seqs = [i for i, n in enumerate(num_items) for _ in range(n)]
        seqs += [len(num_items)] * (capacity - len(seqs))
        case = f"list_work({num_items}, {capacity})"
        got = attempt(case, list_work, torch.tensor(num_items), capacity)
        require(isinstance(got, (tuple, list)) and len(got) == 2, f"{case} gives {show(got)}, not first_item and item_seq")
        for name, value, wanted in zip(("first_item", "item_seq"), got, (first, seqs)):
            require(torch.is_tensor(value), f"{case} gives {name} as {show(value)}, not a tensor")
            require(value.tolist() == wanted, f"{case} gives {name} {show(value)}, expected {wanted}",
                    "sequences without items have no place in item_seq, and behind the last item stands the number of sequences")
    numbers = torch.tensor([4, 1, 2])
    with Tape() as tape: got = attempt("list_work under a recording", list_work, numbers, 8)
    numbers.copy_(torch.tensor([1, 0, 3]))
    case = "list_work, recorded with [4, 1, 2] and repeated with [1, 0, 3],"
    attempt(f"{case} asks for other shapes, or for numbers on the host: it", tape.replay)
    found = [x.tolist() for x in got]
    require(found == [[0, 1, 1, 4], [0, 2, 2, 2, 3, 3, 3, 3]], f"{case} gives {found}",
            "something was read on the host, and is frozen in the recording")


@exercise
def check_unnoticed(scores):
    try: x = torch.as_tensor(scores, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError): x = torch.zeros(0, 0)
    require(x.dim() == 1 and len(x) > 4, f"you give {show(scores)}", "it is to be a list of more than four numbers, or there is one split only")
    require(bool((x != x[0]).any()), "all of your scores are equal", "then everything is simple; take different ones")
    values = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    states = [state_of(x[i:i+4], values[i:i+4, None]) for i in range(0, len(x), 4)]
    careless = sum(acc.item() for *_, acc in states) / sum(mass for _, mass, _ in states)
    wanted = (x.softmax(0) @ values).item()
    require(abs(careless - wanted) < 1e-4, f"the careless sum gives {careless:.3f} and the right one {wanted:.3f}",
            f"the best scores of the splits are {[best for best, *_ in states]}")
