"Checks of the exercises of the chapter on the tiny engine."
import random
from types import SimpleNamespace

import torch

from nano_vllm.tiny import KVCache

from . import attempt, exercise, expect, require, same


@exercise
def check_tokens_that_fit(tokens_that_fit):
    for memory, layers, heads, dim, itemsize in ((40e9, 32, 8, 128, 2), (40e9, 30, 3, 64, 4), (1e6, 30, 3, 64, 4), (2**30, 32, 32, 128, 2)):
        per_token = 2 * layers * heads * dim * itemsize
        expect(tokens_that_fit, (memory, layers, heads, dim, itemsize), int(memory // per_token),
               f"each token has a key and a value of {dim} numbers for {heads} KV heads in {layers} layers, together "
               f"{per_token:,} bytes; a part of a token does not count")


@exercise
def check_padding_share(padding_share):
    rng = random.Random(0)
    cases = [([37, 38, 36, 35, 38, 41, 38, 65], 4), ([1, 9], 2), ([9, 1, 9, 1], 2), ([5, 5, 5], 2), ([2, 4, 6], 2), ([7], 4)]
    cases += [([rng.randint(1, 60) for _ in range(n)], 4) for n in (5, 8, 11)]
    for lengths, size in cases:
        ordered = sorted(lengths)
        parts = [ordered[i:i + size] for i in range(0, len(ordered), size)]
        wanted = 1 - sum(lengths) / sum(len(part) * max(part) for part in parts)
        expect(padding_share, (lengths, size), wanted,
               f"the batches are {parts}, and each computes its number of rows times its longest", tolerance=1e-9)


@exercise
def check_last_of_each(last_of_each):
    for lengths, width in (([5, 3], 5), ([1, 4, 2], 4), ([3, 3], 3), ([2], 6), ([1, 1], 1)):
        hidden = torch.arange(len(lengths) * width * 2.).view(len(lengths), width, 2)
        wanted = torch.stack([hidden[row, n - 1] for row, n in enumerate(lengths)])
        got = attempt(f"last_of_each for lengths {lengths}", last_of_each, hidden, torch.tensor(lengths))
        require(torch.is_tensor(got) and got.shape == wanted.shape,
                f"for hidden of shape {tuple(hidden.shape)} and lengths {lengths} the result has shape "
                f"{tuple(getattr(got, 'shape', ()))}, expected {tuple(wanted.shape)}")
        for row, n in enumerate(lengths):
            require(same(got[row], wanted[row]),
                    f"for lengths {lengths} and rows {width} wide, row {row} gives {got[row].tolist()}, expected "
                    f"{wanted[row].tolist()}", f"its last token stands in column {n - 1}")


@exercise
def check_growing_cache(GrowingCache):
    config, torch_rng = SimpleNamespace(layers=3, kv_heads=2, head_dim=4), torch.Generator().manual_seed(0)
    for batch, steps in ((1, [3, 1, 1]), (2, [5, 1, 1, 1]), (1, [2, 3, 4]), (2, [1])):
        mine, theirs = attempt("GrowingCache()", GrowingCache), KVCache(config, batch, sum(steps))
        before = []
        for step, columns in enumerate(steps):
            for layer in range(config.layers):
                k, v = torch.randn(2, batch, 2, columns, 4, generator=torch_rng)
                case = f"steps of {steps[:step + 1]} tokens, layer {layer}"
                got = attempt(case, mine, k.clone(), v.clone(), layer)
                require(isinstance(got, (tuple, list, torch.Tensor)) and len(got) == 2,
                        f"{case}: gives {type(got).__name__}, expected keys and values. Is a `return` missing?")
                for name, ours, wanted in zip(("keys", "values"), got, theirs(k, v, layer)):
                    require(torch.is_tensor(ours), f"{case}: the {name} are a {type(ours).__name__}, not a tensor")
                    require(ours.shape == wanted.shape,
                            f"{case}: the {name} have shape {tuple(ours.shape)}, expected {tuple(wanted.shape)}",
                            f"(batch, KV heads, tokens, head_dim), with {sum(steps[:step + 1])} tokens of this layer so far")
                    require(same(ours, wanted), f"{case}: the {name} are not those that were stored, in their order")
                    before.append((case, name, ours, wanted.clone()))
        for case, name, ours, wanted in before:
            require(same(ours, wanted), f"{case}: the {name} that it gave have changed later on")


@exercise
def check_accepted(accepted):
    for guess, best, why in (([5, 6, 7, 8], [5, 6, 7, 8, 9], "all four are right, and the model's own next token comes with them"),
                             ([5, 6, 7, 8], [5, 6, 1, 8, 9], "7 is wrong; what the model says there is 1, and what comes later was "
                                                             "computed after a wrong token"),
                             ([5, 6, 7, 8], [1, 6, 7, 8, 9], "the first guess is wrong, so only the model's own token is left"),
                             ([5], [5, 2], "one guess, and it is right"), ([], [4], "no guess: an ordinary step"),
                             ([3, 3], [3, 4, 3], "the second 3 is wrong")):
        right = next((i for i, token in enumerate(guess) if token != best[i]), len(guess))
        expect(accepted, (guess, best), best[:right + 1], why)
