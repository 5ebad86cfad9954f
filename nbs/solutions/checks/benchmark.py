"Checks of the exercises of the chapter on the benchmark."
import random

from nano_vllm.benchmark import Workload
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams

from . import WrongAnswer, attempt, exercise, expect, require
from .prefix_cache import serve


@exercise
def check_even_context(even_context):
    for batch, weights, token in ((32, 538_060_032, 46_080), (1, 16e9, 131_072), (256, 16e9, 131_072)):
        wanted = weights / (batch * token)
        expect(even_context, (batch, weights, token), wanted, f"{batch} texts of that length have {token} bytes for each token", tolerance=1e-9 * wanted)


@exercise
def check_bound(bound):
    machine, model = (30e9, 250e9), (134_515_008, 4, 46_080)
    for batch, context in ((1, 0), (32, 0), (10, 100), (32, 4000), (256, 80)):
        reading = (model[0] * model[1] + batch * context * model[2]) / machine[0]
        computing = 2 * batch * model[0] / machine[1]
        wanted = batch / max(reading, computing)
        expect(bound, (batch, context, *model, *machine), wanted,
               f"a step reads for {1e3*reading:.1f} ms and computes for {1e3*computing:.1f} ms, and gives {batch} tokens", tolerance=1e-9 * wanted)


@exercise
def check_padding_ratio(padding_ratio):
    for prompts, outputs in (([10, 10], [5, 5]), ([10, 2], [5, 5]), ([1, 1, 1], [1, 2, 9]), ([100, 16, 50, 7], [3, 90, 20, 20]), ([7], [3])):
        slots = len(prompts) * (max(prompts) + max(outputs))
        wanted = slots / (sum(prompts) + sum(outputs))
        expect(padding_ratio, (prompts, outputs), wanted,
               f"each of {len(prompts)} rows is as wide as the longest prompt and as long as the longest output, {slots} slots", tolerance=1e-9)


class Clock:
    "A clock that somebody else sets."
    def __init__(self): self.time = 100.
    def __call__(self): return self.time


@exercise
def check_output_rate(output_rate):
    work = Workload([[1] * 30, [2] * 5], [SamplingParams(max_tokens=4), SamplingParams(max_tokens=6)])

    def run(*outputs, seconds=2.):
        "What is measured of a generator that gives `outputs` after some seconds."
        clock = Clock()
        def generate(given):
            require(given is work, "`generate` was called with something else than the work")
            clock.time += seconds
            return [list(output) for output in outputs]
        return output_rate(generate, work, clock)

    case = "of 4 and 6 tokens, generated in 2 s after prompts of 30 and 5,"
    got = attempt(f"output_rate {case}", run, [7] * 4, [7] * 6)
    require(got is not None, "output_rate gives None. Is a `return` missing?")
    require(isinstance(got, (int, float)) and abs(got - 5) < 1e-9, f"output_rate {case} is {got}, expected 5.0", "10 tokens of output in 2 s")
    for says, outputs in (("the second output is too short", ([7] * 4, [7] * 5)), ("the first is too long", ([7] * 5, [7] * 6)),
                          ("an output is missing", ([7] * 4,)), ("there is an output too many", ([7] * 4, [7] * 6, [7]))):
        try: rate = run(*outputs)
        except ValueError: continue
        except Exception as error: raise WrongAnswer(f"output_rate raises {type(error).__name__}: {error}, though {says}; a ValueError should say so") from error
        raise WrongAnswer(f"output_rate gives {rate}, though {says}: an engine that does less work is not faster")
    return "and it notices whose work was not done"


@exercise
def check_found_again(found_again):
    rng = random.Random(0)
    cases = [("two equal prompts", [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 2), ("a prompt that fills its blocks, twice", [[1, 2, 3, 4], [1, 2, 3, 4]], 2),
             ("a common system prompt", [[9, 9, 9, 9, 1, 2], [9, 9, 9, 9, 5], [9, 9, 9, 9, 1, 2, 3]], 4),
             ("the same tokens at another place", [[1, 2, 3, 4, 5], [3, 4, 1, 2, 5]], 2), ("prompts that differ at once", [[1, 2, 3], [2, 2, 3], [3, 2, 3]], 1),
             ("a prompt that goes on where another ended", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]], 2),
             ("random prompts of two tokens", [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(40)], 3)]
    for says, prompts, size in cases:
        manager = KVCacheManager(4096, size)
        wanted = sum(serve(manager, prompt) for prompt in prompts)
        expect(found_again, (prompts, size), wanted, "full blocks are found after the same beginning, and a token of each prompt is left to compute",
               case=f"found_again({prompts if len(prompts) < 9 else '...'}, {size}), {says},")
