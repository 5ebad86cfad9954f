"Checks of the exercises of the chapter on bfloat16 weights."
import functools
from pathlib import Path

import torch

from nano_vllm.layers import Ops
from nano_vllm.model import ModelConfig, PlainAttention
from nano_vllm.tokenizer import Tokenizer
from nano_vllm.weights import load_model
from nano_vllm.workbench import fetch

from . import attempt, exercise, expect, require, show


@exercise
def check_tokens_per_second(tokens_per_second):
    for weights, itemsize, bandwidth, texts in ((1.24e9, 4, 33e9, 1), (1.24e9, 2, 33e9, 1), (1.24e9, 2, 33e9, 8), (8e9, 2, 3.35e12, 1)):
        expect(tokens_per_second, (weights, itemsize, bandwidth, texts), bandwidth / (weights * itemsize) * texts,
               f"a step reads {weights * itemsize:.3g} bytes once, and gives each of {texts} texts a token", 1e-6)


NUMBERS = {"numbers that are bfloat16 already": [0., 1., -2., 0.5, 256., -3.140625],
           "numbers nearer to the one below": [1.001, 3.001, 100.1], "numbers nearer to the one above": [0.1, 1.007, 100.4],
           "negative numbers": [-0.1, -1.007, -1.001], "very small and very large ones": [1e-30, -2e30, 1e-40],
           "halfway, and the one below is even": [1 + 2**-8, -(1 + 2**-8), 256 + 1.],
           "halfway, and the one above is even": [1 + 3 * 2**-8, -(1 + 3 * 2**-8), 258 + 1.],
           "numbers that round up to the next power of two": [1.999, 0.9999, -511.5]}


@exercise
def check_round_to_bfloat16(round_to_bfloat16):
    cases = {name: torch.tensor(numbers) for name, numbers in NUMBERS.items()}
    cases["a matrix of random numbers"] = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for name, x in cases.items():
        given, wanted = x.clone(), x.bfloat16().float()
        got = attempt(f"{name}: round_to_bfloat16({show(x)})", round_to_bfloat16, given)
        require(torch.equal(given, x), f"{name}: round_to_bfloat16 changes what it is given")
        require(torch.is_tensor(got), f"{name}: gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.dtype == torch.float32 and got.shape == x.shape,
                f"{name}: gives {got.dtype} of shape {tuple(got.shape)}, expected torch.float32 of shape {tuple(x.shape)}")
        if torch.equal(got, wanted): continue
        i = (got != wanted).flatten().nonzero()[0].item()
        number, given, right = x.flatten()[i].item(), got.flatten()[i].item(), wanted.flatten()[i].item()
        require(False, f"{name}: {number:.9g} becomes {given:.9g}, expected {right:.9g}",
                "the nearest number with 8 bits of precision, and of two the one whose last bit is 0")


@exercise
def check_pair_product(pair_product):
    for rows, outputs, inputs in ((1, 3, 2), (2, 5, 64), (7, 16, 256)):
        g = torch.Generator().manual_seed(inputs)
        x, weight = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g).bfloat16()
        case = f"pair_product for {rows} rows, {outputs} outputs and {inputs} inputs"
        got = attempt(case, pair_product, x.clone(), weight.view(torch.int32).clone())
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, outputs), f"{case} has shape {tuple(got.shape)}, expected {(rows, outputs)}")
        wide = weight.double()
        error, sizes = (got.double() - x.double() @ wide.T).abs(), x.double().abs() @ wide.abs().T
        worst = (error / sizes).max().item()
        why = "the first input of a pair is its lower half, the second its upper half"
        if (got.double() - x.bfloat16().double() @ wide.T).abs().max() < 1e-5 * sizes.max(): why = "`x` is rounded; it is to stay float32"
        elif worst < 2**-6: why = "the upper half still has the lower one behind it, where a float32 number has its last 16 bits"
        require(bool((error <= 2 * (inputs + 1) * 2**-24 * sizes).all()),
                f"{case} is off by {worst:.1e} of the sum of all sizes; roundings of float32 sums are below {2 * (inputs + 1) * 2**-24:.1e}", why)


def largest_swallowed(total: float) -> float:
    "By trying all positive numbers."
    numbers = torch.arange(0x7f80, dtype=torch.int16).view(torch.bfloat16)
    return numbers[numbers + torch.tensor(total).bfloat16() == total].max().item()


@exercise
def check_swallowed(swallowed):
    for total in (256., 258., 1., 0.5, 1.0078125, 1000., 384., 382., 1e-3 * 1.0, 255.):
        total = torch.tensor(total).bfloat16().item()
        wanted, above = largest_swallowed(total), None
        above = torch.nextafter(torch.tensor(total).bfloat16(), torch.tensor(torch.inf).bfloat16()).item()
        expect(swallowed, (total,), wanted,
               f"the next number above {total:.9g} is {above:.9g}; what is less than half way there is lost, and what is just half way goes to "
               "the number whose last bit is 0", wanted * 1e-9)


@functools.cache
def text_and_config():
    folder, text = fetch(), Path(__file__).parents[2]/"data/english.txt"
    return torch.tensor(Tokenizer(folder).encode(text.read_text())[:256]), ModelConfig.from_folder(folder)


def favourites(ops, round_weights):
    "The token that the demo model prefers after each of a text, computed in float32."
    ids, config = text_and_config()
    model = load_model(fetch(), config, torch.float32, "cpu", ops=ops)
    with torch.inference_mode():
        if round_weights:
            for parameter in model.parameters(): parameter.copy_(parameter.bfloat16())
        hidden = model(ids, torch.arange(len(ids)), PlainAttention(config.head_dim ** -0.5))
        return model.compute_logits(hidden).argmax(-1)


@functools.cache
def float32_favourites(): return favourites(Ops(), round_weights=False)


def same_favourites(run_layers) -> float:
    """In which share of 256 places a model with bfloat16 weights prefers the same token as the demo model in float32.

    All is computed in float32, so that it runs anywhere; `run_layers` takes the place of the function of this name in `Ops`."""
    best = favourites(Ops(run_layers=run_layers), round_weights=True)
    return (best == float32_favourites()).float().mean().item()
