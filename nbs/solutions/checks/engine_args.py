"Checks of the exercises of the chapter on building an engine."
from . import attempt, exercise, expect, require


def refusal(case, function, *args):
    "The message of the ValueError that `function(*args)` raises."
    try: got = function(*args)
    except ValueError as e: return str(e)
    except Exception as e: require(False, f"{case} raises {type(e).__name__}: {e}", "a ValueError is asked for")
    require(False, f"{case} gives {got!r}", "it must raise a ValueError")


@exercise
def check_blocks_in(blocks_in):
    for args, wanted, why in (((1000, 10, 4, 100, 8), 25, "1,000 bytes hold 25 blocks of 40"),
                              ((1039, 10, 4, 100, 8), 25, "the last 39 bytes are too few for a block"),
                              ((40, 10, 4, 100, 8), 1, "exactly one block fits"),
                              ((10**6, 10, 4, 100, 2), 50, "two texts of 100 tokens fill 25 blocks each"),
                              ((10**6, 10, 16, 100, 2), 14, "a text of 100 tokens needs 7 blocks of 16, the last filled in part"),
                              ((4 * 2**30, 46_080, 16, 8192, 256), 5825, "4 GiB of blocks of 737,280 bytes")):
        expect(blocks_in, args, wanted, why)
    for args in ((39, 10, 4, 100, 8), (0, 10, 4, 100, 8), (-500, 10, 4, 100, 8)):
        case = f"blocks_in{args}"
        message = refusal(case, blocks_in, *args)
        require("40" in message, f"{case} says {message!r}", "it does not name the 40 bytes of a block")


@exercise
def check_read_names(read_names):
    known, others = {"num_kv_blocks", "max_model_len", "seed"}, {"num_gpu_blocks_override": "num_kv_blocks", "ctx": "max_model_len"}
    for options, wanted in (({}, {}), (dict(seed=3), dict(seed=3)), (dict(num_gpu_blocks_override=9, seed=None), dict(num_kv_blocks=9, seed=None)),
                            (dict(ctx=5, num_kv_blocks=0), dict(max_model_len=5, num_kv_blocks=0))):
        before = dict(options)
        got = attempt(f"read_names({before})", read_names, options, known, others)
        require(got == wanted, f"read_names({before}) gives {got!r}, expected {wanted!r}")
        require(options == before, f"read_names changes the options {before} to {options}", "make a dict of your own")
    for options, names in ((dict(sead=3), ["sead"]), (dict(num_kv_blocks=9, num_gpu_blocks_override=8), ["num_kv_blocks", "num_gpu_blocks_override"]),
                           (dict(num_gpu_blocks_override=8, num_kv_blocks=8), ["num_kv_blocks", "num_gpu_blocks_override"]),
                           (dict(ctx=None, max_model_len=None), ["ctx", "max_model_len"])):
        case = f"read_names({options})"
        message = refusal(case, read_names, dict(options), known, others)
        for name in names: require(name in message, f"{case} says {message!r}", f"it does not name {name}")


@exercise
def check_end_tokens(end_tokens):
    for args, wanted, why in (((2, None, 2), {2}, "two places agree"), ((6, [7, 8], 9), {6, 7, 8, 9}, "all three have a say"),
                              (([1, 2], 3, None), {1, 2, 3}, "the tokenizer has none"), ((None, None, None), set(), "nobody names one"),
                              ((0, None, None), {0}, "0 is a token"), ((None, None, 0), {0}, "0 is a token"), ((5, [], 6), {5, 6}, "an empty list names none")):
        expect(end_tokens, args, wanted, why)
