"Checks of the exercises of the chapter on batch invariance."
import itertools

import torch

from . import WrongAnswer, attempt, call, exercise, expect, require, show


def float32_sum(values):
    total = torch.tensor(0.)
    for v in values: total = total + v
    return float(total)


@exercise
def check_num_sums(num_sums):
    five = torch.randn(5, generator=torch.Generator().manual_seed(0)).tolist()
    for values, why in (([1., 2.], "a + b is b + a, to the bit"), ([1e8, -1e8, 1.], "the 1 is lost beside 1e8, or comes last and is not"),
                        ([1., 1., 1., 1.], "whole numbers so small are exact"), ([1e8, 3., 3., -1e8], "beside 1e8, steps are 8 wide"), (five, "")):
        wanted = len({float32_sum(order) for order in itertools.permutations(values)})
        why = why or "Are they added in float32? Python's own numbers have 53 bits"
        expect(num_sums, (values,), wanted, why)


def sum_of(parts):
    total = parts[0]
    for part in parts[1:]: total = total + part
    return total


class Rank:
    "One rank of a group, whose others answer as they should."
    def __init__(self, rank, held, case):
        self.rank, self.held, self.case = rank, held, case       # held: the pieces of each rank
        self.sums = [sum_of(parts) for parts in zip(*held)]
        self.calls = []

    def count(self, name):
        require(name not in self.calls, f"{self.case} calls {name} twice", "one exchange of each kind is enough")
        self.calls.append(name)

    def swap(self, pieces):
        self.count("swap")
        mine = self.held[self.rank]
        alike = len(pieces) == len(mine) and all(torch.is_tensor(a) and torch.equal(a, b) for a, b in zip(pieces, mine))
        require(alike, f"{self.case} swaps something else than its pieces")
        return [parts[self.rank].clone() for parts in self.held]

    def share(self, x):
        self.count("share")
        require(torch.is_tensor(x) and x.shape == self.sums[0].shape, f"{self.case} shares {show(x)}", "one piece is enough: the others have the others")
        return [(x if i == self.rank else total).clone() for i, total in enumerate(self.sums)]


@exercise
def check_sum_in_pieces(sum_in_pieces):
    for size in (2, 3, 5):
        g = torch.Generator().manual_seed(size)
        held = [[torch.randn(6, generator=g) * 10.**i for _ in range(size)] for i in range(size)]
        for rank in range(size):
            case = f"rank {rank} of {size}: sum_in_pieces"
            here = Rank(rank, held, case)
            got = attempt(case, sum_in_pieces, [piece.clone() for piece in held[rank]], here.swap, here.share)
            require(got is not None, f"{case} gives None", "Is a `return` missing?")
            require(isinstance(got, (list, tuple)) and len(got) == size and all(torch.is_tensor(x) and x.shape == (6,) for x in got),
                    f"{case} gives {show(got)}, not {size} pieces")
            for i, (x, total) in enumerate(zip(got, here.sums)):
                require(torch.allclose(x, total, rtol=1e-4), f"{case}: piece {i} is not the sum of all ranks")
                require(torch.equal(x, total), f"{case}: piece {i} has other bits than rank 0's plus rank 1's, and so on", "its order of adding is another")


@exercise
def check_constant_tiles(constant_tiles):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for rows, tile in ((1, 4), (4, 4), (5, 4), (11, 3), (2, 8)):
        case, sizes = f"{rows} rows, tiles of {tile}: constant_tiles", []
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))

        def product(part):
            sizes.append(len(part))
            if len(part) != tile: raise WrongAnswer(f"{case} calls product with {len(part)} rows")
            return part @ weight.T

        got = call(constant_tiles, product, x, tile, case=case)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, 6), f"{case} has shape {tuple(got.shape)}, expected {(rows, 6)}", "rows that were filled up are nobody's")
        bad = ((got - x @ weight.T).abs() > 1e-5).any(1)
        require(not bad.any(), f"{case}: row {int(bad.int().argmax())} is not the product's")
        require(len(sizes) == -(-rows // tile), f"{case} calls product {len(sizes)} times, expected {-(-rows // tile)}")
