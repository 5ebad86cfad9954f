"Checks of the exercises of the chapter on products of our own."
import ctypes
import numbers
import re

import torch
import torch.nn.functional as F

from nano_vllm.cpu_kernels import CAN_BUILD, LANES, VECTOR_TYPES, address, call
from nano_vllm.cpu_products import ADD_FLOATS, FLOAT_PRODUCT, MULTIPLY, PRODUCT, TILE, WRITE, Matrix, TiledProduct, load_product
from nano_vllm.workbench import timed

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_uses_of_a_load(uses_of_a_load):
    for rows, vectors in ((8, 3), (1, 3), (6, 2), (1, 1), (5, 5)):
        expect(uses_of_a_load, (rows, vectors), rows * vectors / (rows + vectors),
               f"for each input {vectors} vectors of weights and {rows} numbers of x are loaded, and each of {rows} x {vectors} sums "
               "gets a multiplication", 1e-9)


def uses(rows, vectors): return rows * vectors / (rows + vectors)


@exercise
def check_best_tile(best_tile):
    for registers in (32, 16, 8, 64, 3):
        fits = [(r, v) for r in range(1, registers) for v in range(1, registers) if r * v + v + 1 <= registers]
        best = max(uses(*shape) for shape in fits)
        got = attempt(f"best_tile({registers})", best_tile, registers)
        whole = isinstance(got, (tuple, list)) and len(got) == 2 and all(isinstance(n, numbers.Real) for n in got)
        require(whole, f"best_tile({registers}) gives {show(got)}, not (rows, vectors)",
                "Is a `return` missing?" if got is None else "")
        rows, vectors = got
        needed = rows * vectors + vectors + 1
        require(tuple(got) in fits, f"best_tile({registers}) gives {got}, which needs {rows} x {vectors} registers for sums, {vectors} for weights "
                                    f"and one for x, {needed} in all")
        require(uses(rows, vectors) > best - 1e-9, f"best_tile({registers}) gives {got}, with {uses(rows, vectors):.2f} multiplications for each load",
                f"there is one with {best:.2f}")


def num_candidates(x, u):
    noisy = x - (-(-u).log1p()).log()
    best = torch.cat([torch.tensor([-torch.inf], dtype=x.dtype), noisy.view(-1, 16).amax(1).cummax(0).values[:-1]])
    return int((u < (x - best.repeat_interleave(16)).exp()).sum())


@exercise
def check_candidates(candidates):
    flat = torch.zeros(48, dtype=torch.float64)
    u = torch.full((48,), 0.5, dtype=torch.float64)
    u[16:21] = torch.tensor([0.1, 0.99, 0.6, 0.7, 0.95])
    u[32:] = 0.9
    noise = torch.rand(3, 4800, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = torch.linspace(-8, 8, 4800, dtype=torch.float64)
    cases = [("sixteen tokens, and nothing before them", flat[:16], torch.linspace(0.1, 0.99, 16, dtype=torch.float64)), ("two groups: the first has a noise of 0.37 everywhere", flat[:32], u[:32]),
             ("three groups, the second with a noise of 4.6 at best", flat, u),
             ("logits that fall", spread.flip(0), noise[0]), ("logits that rise", spread, noise[1]), ("logits that are all the same", 0 * spread, noise[2])]
    for name, x, u in cases:
        expect(candidates, (x, u), num_candidates(x, u), "the best so far is a sum of logit and noise, and changes after each sixteen tokens",
               case=f"{name}: candidates")


@exercise
def check_tiled_product(tiled_product):
    for rows, inputs, outputs, width in ((1, 3, 4, 4), (2, 5, 8, 4), (3, 5, 10, 4), (19, 20, 112, 48), (2, 7, 5, 48)):
        g = torch.Generator().manual_seed(rows)
        x, weight = torch.randn(rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
        filled = F.pad(weight, (0, 0, 0, -outputs % width), value=torch.nan)
        packed = filled.unflatten(0, (-1, width)).transpose(1, 2).contiguous()
        case = f"{rows} rows, {inputs} inputs, {outputs} outputs in {len(packed)} tiles of {width}: tiled_product"
        got = attempt(case, tiled_product, x.clone(), packed.clone(), outputs)
        require(torch.is_tensor(got), f"{case} gives {show(got)}, not a tensor", "Is a `return` missing?" if got is None else "")
        require(got.shape == (rows, outputs), f"{case} has shape {tuple(got.shape)}, expected {(rows, outputs)}",
                "what the last tile is filled up with belongs to nobody")
        wanted, sizes = x @ weight.T, x.abs() @ weight.abs().T
        if bool(((got - wanted).abs() <= 2 * inputs * 2**-23 * sizes).all()): continue
        row, out = ((got - wanted).abs() <= 2 * inputs * 2**-23 * sizes).logical_not().nonzero()[0].tolist()
        raise WrongAnswer(f"{case} gives {got[row, out]:.3f} for output {out} of row {row}, expected {wanted[row, out]:.3f}: output {out} is number "
                          f"{out % width} of tile {out // width}")


@exercise
def check_relu_writer(source):
    require(isinstance(source, str), f"RELU_WRITE is {show(source)}, not a string of C++")
    if not CAN_BUILD: return "as far as one can see without a compiler"
    product = attempt("RELU_WRITE, compiled in place of WRITE,", load_product,
                      VECTOR_TYPES + ADD_FLOATS + TILE + MULTIPLY + PRODUCT + source + FLOAT_PRODUCT)
    for rows, inputs, outputs in ((1, 16, 16), (3, 24, 112), (20, 40, 96)):
        g = torch.Generator().manual_seed(rows)
        x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
        tiled = TiledProduct(weight)
        tiled.matrix.product = ctypes.cast(product, ctypes.c_void_p)
        y = torch.full((rows, outputs), torch.nan)
        call(product, ctypes.byref(tiled.matrix), x, 5 * bias, y, rows)
        sums, case = x @ weight.T, f"{rows} rows, {inputs} inputs, {outputs} outputs"
        wanted = F.relu(sums + 5 * bias)
        if torch.allclose(y, wanted, atol=1e-4): continue
        why = "max(sum + bias, 0) is wanted"
        for name, other in (("the sum and the bias without the maximum", sums + 5 * bias), ("max(sum, 0) without the bias", F.relu(sums)),
                            ("max(sum, 0), and then the bias", F.relu(sums) + 5 * bias)):
            if torch.allclose(y, other, atol=1e-4): why = f"this is {name}"
        if y.isnan().any(): why = f"{int(y.isnan().sum())} of {y.numel()} numbers have not been written"
        row, out = ((y - wanted).abs() <= 1e-4).logical_not().nonzero()[0].tolist()
        raise WrongAnswer(f"{case}: output {out} of row {row} is {y[row, out]:.3f}, expected {wanted[row, out]:.3f}: {why}")


def seconds_of_tile(rows, wide, num_rows, inputs=576, outputs=3072):
    "Seconds of a product with `num_rows` rows by tiles of `rows` rows and `wide` vectors; 0 without a compiler."
    if not CAN_BUILD: return 0.0
    tile = re.sub(r"constexpr int ROWS = \d+, WIDE = [^;]+;", f"constexpr int ROWS = {rows}, WIDE = {wide};", TILE)
    product = load_product(VECTOR_TYPES + ADD_FLOATS + tile + MULTIPLY + PRODUCT + WRITE + FLOAT_PRODUCT)
    g, width = torch.Generator().manual_seed(0), LANES * wide
    x, weight = torch.randn(num_rows, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
    packed = F.pad(weight, (0, 0, 0, -outputs % width)).unflatten(0, (-1, width)).transpose(1, 2).contiguous()
    matrix = Matrix(ctypes.cast(product, ctypes.c_void_p), address(packed), inputs, outputs, None, None)
    y = torch.zeros(num_rows, outputs)
    def run(): call(product, ctypes.byref(matrix), x, None, y, num_rows)
    run()
    assert torch.allclose(y, x @ weight.T, atol=1e-2)
    return min(timed(run, 20) for _ in range(3))
