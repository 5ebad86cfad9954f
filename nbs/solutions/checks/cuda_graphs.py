"Checks of the exercises of the chapter on CUDA graphs. They record on tapes, so none of them needs a GPU."
from itertools import combinations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import attempt, call, exercise, expect, require, show
from .layers import near


class Tape(TorchDispatchMode):
    "Notes the operators that are called; `replay` calls them again, with results where the first ones are."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append((op, args, kwargs or {}, out := op(*args, **kwargs or {})))
        return out

    def replay(self):
        for op, args, kwargs, out in self.calls:
            again = op(*args, **kwargs)
            if op._schema.is_mutable: continue
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                # a vector times a matrix gives a row, which is squeezed in place after it was noted
                if torch.is_tensor(old): old.copy_(new.view_as(old))


@exercise
def check_bytes_to_send(bytes_to_send):
    for changed, fields in ((1, 5), (2, 5), (3, 5), (5, 5), (0, 5), (7, 20), (8, 20)):
        expect(bytes_to_send, (changed, fields), min(24*changed, 8*(fields + 1)),
               f"{changed} changes of three numbers, or the row's number and {fields} fields, eight bytes each")


@exercise
def check_through_graph(through_graph):
    static_in, static_out, story = torch.zeros(4, 2), torch.zeros(4, 2), []

    def replay():
        story.append(static_in.clone())
        static_out.copy_(2*static_in + 1)

    inputs = [torch.tensor([[1., 2.], [3., 4.], [5., 6.]]), torch.tensor([[7., 8.]]), torch.full((4, 2), 9.), torch.tensor([[1., 1.], [2., 2.]])]
    before, case = [x.clone() for x in inputs], "through_graph(replay, static_in, static_out, inputs)"
    got = attempt(case, through_graph, replay, static_in, static_out, inputs)
    require(got is not None, f"{case} gives None. Is a `return` missing?")
    require(all(map(torch.equal, before, inputs)), f"{case} changes the inputs")
    require(len(story) == len(inputs), f"{case} replays {len(story)} times for {len(inputs)} inputs")
    for i, (x, seen) in enumerate(zip(inputs, story)):
        require(torch.equal(seen[:len(x)], x), f"at replay {i} static_in begins with {show(seen[:len(x)])}, expected {show(x)}",
                "the graph knows memory, not names: copy into it")
        require(not seen[len(x):].any(), f"at replay {i}, of {len(x)} rows, static_in ends with {show(seen[len(x):])}",
                "the rows of the padding must be 0, or they write what the last step's rows wrote")
    require(isinstance(got, (list, tuple)), f"{case} gives {show(got)}, not a list of outputs")
    require(len(got) == len(inputs), f"{case} gives {len(got)} outputs for {len(inputs)} inputs")
    for i, (x, y) in enumerate(zip(inputs, got)):
        near(f"output {i}", y, 2*x + 1, 0, "each replay writes to the same memory: copy what is to stay")


@exercise
def check_record(record):
    x, total, ran = torch.tensor([1., 2., 3.]), torch.zeros(()), []
    result = {}

    def step():
        ran.append(1)
        y = 2*x + 1                       # a result of its own
        total.add_(y.view(3, 1).T.sum())  # views, and a change in place
        result["y"], result["largest"] = y, y.max(0).values

    again = attempt("record(step)", record, step)
    require(callable(again), f"record(step) gives {show(again)}, not a function")
    times, places = len(ran), {name: t.data_ptr() for name, t in result.items()}
    require(times, "record(step) does not call step")
    for number, values in enumerate(([10., 20., 30.], [-1., 0., 5.], [7., 7., 7.])):
        x.copy_(torch.tensor(values))
        before, wanted = total.item(), 2*x + 1
        case = f"with {values} in x, replay {number}"
        attempt(case, again)
        require(len(ran) == times, f"{case} calls step again", "only the operators that it called are to be repeated")
        near(f"{case} leaves y, which", result["y"], wanted, 0, "each result belongs where the first one is")
        near(f"{case} leaves the maximum, which", result["largest"], wanted.max(), 0)
        require(total.item() - before == wanted.sum().item(),
                f"{case} adds {total.item() - before} to total, expected {wanted.sum().item()}", "what works in place does so once")
    require(places == {name: t.data_ptr() for name, t in result.items()}, "the results have moved to other memory")


def padding(counts, buckets):
    "Rows that are computed for nothing."
    return sum(times * (min(b for b in buckets if b >= n) - n) for n, times in counts.items())


@exercise
def check_best_buckets(best_buckets):
    for counts, k in (({1: 5, 2: 1, 3: 1, 8: 9}, 1), ({1: 5, 2: 1, 3: 1, 8: 9}, 2), ({1: 5, 2: 1, 3: 1, 8: 9}, 4), ({5: 3}, 1),
                      ({1: 1, 7: 100, 8: 1}, 2), ({1: 100, 2: 50, 3: 20, 5: 90, 8: 10, 13: 60, 16: 5, 30: 1, 32: 2}, 3),
                      ({n: 33 - n for n in range(1, 11)}, 4), ({n: n for n in range(1, 11)}, 3)):
        got, case = call(best_buckets, dict(counts), k), f"best_buckets({counts}, {k})"
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        got, largest = attempt(f"{case} gives {show(got)}; reading it as numbers", lambda: [int(b) for b in got]), max(counts)
        require(len(got) <= k, f"{case} gives {len(got)} buckets, {got}")
        require(bool(got) and max(got) >= largest, f"{case} gives {got}", f"there is no room for a batch of {largest}")
        least, best = min((padding(counts, [*some, largest]), [*some, largest]) for some in combinations(sorted(counts)[:-1], min(k, len(counts)) - 1))
        require(padding(counts, got) == least, f"{case} gives {got}, which pads {padding(counts, got)} rows",
                f"{least} are enough, for example with {best}")


@exercise
def check_attend(attend):
    g = torch.Generator().manual_seed(0)
    q, (keys, values) = torch.randn(4, generator=g), torch.randn(2, 8, 4, generator=g)
    keys[6:], values[6:] = 50., 1000.         # left there by another text
    length = torch.tensor(3)
    with Tape() as tape: out = attempt("attend(q, keys, values, length) with length 3", attend, q, keys, values, length)

    def compare(n, case, why):
        near(case, out, (keys[:n] @ q).softmax(0) @ values[:n], 1e-4 * values[:n].abs().max(), why)

    compare(3, "attend(q, keys, values, length) with length 3", "only the first `length` keys are the text's")
    for n in (5, 6, 1):
        length.fill_(n)
        tape.replay()
        compare(n, f"recorded with length 3 and replayed with length {n}, attend", "a length that has become a Python number or a shape is frozen")
