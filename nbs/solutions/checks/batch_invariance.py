"Checks of the exercises of the chapter on batch invariance."
import itertools

import torch

from . import WrongAnswer, attempt, exercise, expect, require, show


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


def parts_of(ranks, rows, hidden=5):
    g = torch.Generator().manual_seed(ranks)
    return [(torch.randn(40, hidden, generator=g) * 10.**i)[:rows] for i in range(ranks)]


@exercise
def check_ordered_sum(ordered_sum):
    for ranks in (2, 3, 5):
        whole = None
        for rows in (40, 1, 2, 7, 39):
            case = f"{ranks} ranks, {rows} rows: ordered_sum"
            parts = parts_of(ranks, rows)
            got = attempt(case, ordered_sum, [part.clone() for part in parts])
            require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
            require(got.shape == parts[0].shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(parts[0].shape)}")
            exact = sum(part.double() for part in parts)
            largest = sum(part.abs().double() for part in parts)
            bad = ((got.double() - exact).abs() > ranks * 2**-23 * largest).any(1)
            require(not bad.any(), f"{case}: row {int(bad.int().argmax())} is not the sum of all ranks")
            whole = got if whole is None else whole
            other = (got != whole[:rows]).any(1)
            require(not other.any(), f"{case}: row {int(other.int().argmax())} has other bits than in a tensor of 40 rows",
                    "its order of adding depends on the number of rows")


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

        got = attempt(case, constant_tiles, product, x.clone(), tile)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, 6), f"{case} has shape {tuple(got.shape)}, expected {(rows, 6)}", "rows that were filled up are nobody's")
        bad = ((got - x @ weight.T).abs() > 1e-5).any(1)
        require(not bad.any(), f"{case}: row {int(bad.int().argmax())} is not the product's")
        require(len(sizes) == -(-rows // tile), f"{case} calls product {len(sizes)} times, expected {-(-rows // tile)}")
