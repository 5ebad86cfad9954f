"Checks of the exercises of the chapter on steps in one call."
import ctypes

import torch

from nano_vllm.cpu_kernels import CAN_BUILD, VECTOR_TYPES, address, call, load_library
from nano_vllm.workbench import timed

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_share_of_asking(share_of_asking):
    for calls, layers, microseconds, milliseconds in ((9, 30, 5., 20.), (9, 30, 2., 5.4), (1, 1, 5., 20.), (12, 80, 10., 100.)):
        expect(share_of_asking, (calls, layers, microseconds, milliseconds), calls * layers * microseconds / 1000 / milliseconds,
               f"{calls} x {layers} calls of {microseconds} microseconds in {milliseconds} milliseconds", 1e-9)


@exercise
def check_wide_numbers(wide_numbers):
    for tokens, q, kv, inner, most, why in (
            (1, 576, 192, 1536, 256, "gate and up are wider than the QKV product"), (8, 576, 192, 1536, 256, "gate and up are wider than the QKV product"),
            (4000, 576, 192, 1536, 256, "no piece has more than 256 tokens"),
            (100, 2048, 512, 1000, 256, "the QKV product is the wider one"), (1000, 2048, 512, 1000, 256, "the QKV product is the wider one")):
        expect(wide_numbers, (tokens, q, kv, inner, most), min(tokens, most) * max(q + 2 * kv, 2 * inner), why)


@exercise
def check_mlp_in_pieces(mlp_in_pieces):
    for tokens, most in ((1, 4), (4, 4), (5, 4), (12, 4), (10, 3), (7, 100)):
        g, sizes = torch.Generator().manual_seed(tokens), []
        x, weight = torch.randn(tokens, 6, generator=g), torch.randn(6, 6, generator=g)

        def mlp(rows):
            sizes.append(len(rows))
            if not 0 < len(rows) <= most: raise WrongAnswer(f"{tokens} tokens, at most {most}: the MLP is given {len(rows)} rows at once")
            return torch.tanh(rows @ weight)

        case = f"mlp_in_pieces for {tokens} tokens, at most {most} at once,"
        given = x.clone()
        got = attempt(case, mlp_in_pieces, given, mlp, most)
        require(torch.equal(given, x), f"{case} changes what it is given", "the residual may need it")
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == x.shape, f"{case} has shape {tuple(got.shape)}, expected {tuple(x.shape)}")
        require(torch.allclose(got, torch.tanh(x @ weight), atol=1e-5), f"{case} gives other numbers than the MLP of all tokens at once")
        require(len(sizes) == -(-tokens // most), f"{case} calls the MLP {len(sizes)} times, with {sizes} rows; {-(-tokens // most)} calls are enough",
                "each reads all weights")


@exercise
def check_stale(stale):
    def new_layers():
        return [dict(qkv=torch.ones(4), norm=torch.ones(2), bias=None) for _ in range(3)]

    def copy(layer): layer["norm"] = layer["norm"].clone()
    def in_place(layer): layer["norm"].mul_(2)
    def add_bias(layer): layer["bias"] = torch.zeros(4)
    def drop(layer): layer["qkv"] = None
    for changes, wanted, why in (
            ({}, [], "nothing has changed"), ({1: copy}, [1], "the norm's weight has been replaced by a copy, which has the same numbers elsewhere"),
            ({0: in_place}, [], "numbers that change in place stay where they are"), ({2: add_bias}, [2], "there is a bias now"),
            ({0: drop, 2: copy}, [0, 2], "a matrix is gone, and a norm has been replaced")):
        layers = new_layers()
        old = [dict(layer) for layer in layers]          # keeps the old tensors alive, so that addresses differ
        records = [{name: address(tensor) for name, tensor in layer.items()} for layer in layers]
        for i, change in changes.items(): change(layers[i])
        got = attempt(f"stale, where {why},", stale, records, layers)
        require(hasattr(got, "__iter__"), f"stale, where {why}, gives {show(got)}, not the numbers of layers", "Is a `return` missing?" if got is None else "")
        require(list(got) == wanted, f"stale, where {why}, gives {show(got)}, expected {wanted}")
        del old


OP = """
struct Op { float (*function)(float, float); float number; };
"""
FUNCTIONS = """
extern "C" {
float add(float x, float number) { return x + number; }
float times(float x, float number) { return x * number; }
float less(float x, float number) { return x - number; }
float most(float x, float number) { return x > number ? x : number; }
}
"""


class Op(ctypes.Structure):
    "The record of the same name in C."
    _fields_ = [("function", ctypes.c_void_p), ("number", ctypes.c_float)]


@exercise
def check_interpreter(source):
    require(isinstance(source, str), f"RUN is {show(source)}, not a string of C++")
    if not CAN_BUILD: return "as far as one can see without a compiler"
    library = attempt("RUN, compiled behind VECTOR_TYPES and Op,", lambda: load_library(VECTOR_TYPES + OP + FUNCTIONS + source))
    require(hasattr(library, "run"), 'there is no function `run` in it; is `extern "C"` missing?')
    library.run.argtypes, library.run.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float], ctypes.c_float
    python = dict(add=lambda x, n: x + n, times=lambda x, n: x * n, less=lambda x, n: x - n, most=max)
    for program, x in (([("add", 3), ("times", 2), ("less", 1)], 4.), ([("times", 2), ("add", 3)], 4.), ([("less", 1)], 4.), ([], 4.),
                       ([("less", 9), ("most", 0), ("add", 1)] * 10, 4.)):
        ops = (Op * (len(program) + 1))(*(Op(ctypes.cast(getattr(library, name), ctypes.c_void_p), number) for name, number in program),
                                        Op(ctypes.cast(library.add, ctypes.c_void_p), 1000.))
        wanted = x
        for name, number in program: wanted = python[name](wanted, number)
        got = library.run(ctypes.addressof(ops), len(program), x)
        require(abs(got - wanted) < 1e-3, f"the program {show(program)} makes {got:g} of {x:g}, expected {wanted:g}",
                "what lies behind the last record is no part of the program" if got - wanted == 1000 else "each function gets what the one before gave")


LOOPS = """extern "C" void loops(int* x) {
  for (int i = 0; i < 20; i++) {
    #pragma omp parallel for
    for (int j = 0; j < 2; j++) ((volatile int*)x)[j] = i;
    PAUSE
  } }"""
PAUSE = "for (volatile int k = 0; k < TURNS; k++);"


def microseconds_of_loop(pause: int = 0) -> float:
    "Microseconds that a parallel loop costs with nothing to do; before each, one core turns `pause` times alone. 0 without a compiler."
    if not CAN_BUILD: return 0.0
    def measure(pragma):
        source = LOOPS.replace("PAUSE", PAUSE if pause else "").replace("#pragma omp parallel for", pragma)
        loops, x = load_library(source, TURNS=pause).loops, torch.zeros(2, dtype=torch.int32)
        return min(timed(lambda: call(loops, x), 3) for _ in range(5)) * 1e6 / 20
    return measure("#pragma omp parallel for") - measure("")
