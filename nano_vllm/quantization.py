"Weights and activations as whole numbers from -127 to 127: a quarter of the bytes, faster products, and an error that one can bound, measure, and spread."

# %%
import ctypes, functools
from dataclasses import replace
import torch
from torch import Tensor
from nano_vllm.cpu_kernels import (REDUCE, VECTOR_TYPES, call, fits_kernels,
                                   load_library, takes_float32)
from nano_vllm.cpu_products import (MULTIPLY, PRODUCT, TILE, TiledProduct,
                                    cpu_products_ops, load_product, tiled)
from nano_vllm.layers import OPS, Ops, Target, torch_ops

# %%
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    "(int8 numbers, scales (..., 1)) of float32 rows `x`, whose largest becomes 127."
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().to(torch.int8), scale

# %%
def group_size(n: int) -> int:
    "How many of `n` numbers are rotated together: a power of two that divides `n`."
    return min(64, n & -n)   # n & -n: its lowest set bit


def hadamard(x: Tensor) -> Tensor:
    "Rows of `x` rotated in groups of 64 numbers; of fewer if 64 does not divide."
    size, half = group_size(x.shape[-1]), 1
    while half < size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x, half = torch.stack([a + b, a - b], -2).flatten(-3), 2*half
    return x * size**-0.5

# %%
HADAMARD = r"""
constexpr int VECTORS = SIZE > 16 ? SIZE / 16 : 1;   // of a group of SIZE numbers
// sums and differences of the lanes that are `half` apart
template <int half> static inline v16 pair(v16 y) {
  i16 partner;
  v16 sign;
  for (int i = 0; i < 16; i++) { partner[i] = i ^ half; sign[i] = i & half ? -1 : 1; }
  return __builtin_shuffle(y, partner) + sign * y;
}
// y: the vectors of a group; all pairs, half after half
static inline void hadamard(v16* y) {
  for (int i = 0; i < VECTORS; i++) {
    if (SIZE > 1) y[i] = pair<1>(y[i]);
    if (SIZE > 2) y[i] = pair<2>(y[i]);
    if (SIZE > 4) y[i] = pair<4>(y[i]);
    if (SIZE > 8) y[i] = pair<8>(y[i]);
  }
  for (int half = 1; half < VECTORS; half *= 2)
    for (int i = 0; i < VECTORS; i++)
      if (!(i & half)) {
        v16 a = y[i], b = y[i + half];
        y[i] = a + b; y[i + half] = a - b;
      }
}
"""

# %%
QUANTIZE = r"""
typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));
// q and scale: the rows of x (rows, N), rotated in groups of SIZE, rounded to int8
extern "C" void quantize(const float* x, int8_t* q, float* scale, int64_t rows) {
  #pragma omp parallel for if (rows > 3)
  for (int64_t row = 0; row < rows; row++) {
    v16 y[N / 16], most = {};
    std::copy(x + row * N, x + row * N + N, (float*)y);
    for (int i = 0; i < N / 16; i += VECTORS) hadamard(y + i);
    for (v16 t : y) {
      v16 size = t < 0.f ? -t : t;
      most = size > most ? size : most;
    }
    float largest = std::max(127e-30f, max16(most)), factor = 127 / largest;
    for (int i = 0; i < N / 16; i++) {
      i16 bits = (i16)(y[i] * factor + 0x1.8p23f);
      ((b16*)(q + row * N))[i] = __builtin_convertvector(bits, b16);
    }
    scale[row] = largest / 127 / std::sqrt((float)SIZE);
  }
}
"""

# %%
@functools.cache
def quantize_kernel(n: int):
    "The compiled `quantize` for rows of `n` inputs."
    library = load_library(VECTOR_TYPES + REDUCE + HADAMARD + QUANTIZE, N=n,
                           SIZE=group_size(n))
    library.quantize.argtypes = [ctypes.c_void_p]*3 + [ctypes.c_int64]
    return library.quantize


def fits_int8_kernels(x: Tensor) -> bool:
    "Can the kernels take the rows of `x`?"
    return fits_kernels(x) and x.shape[-1] % 16 == 0


def hadamard_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    "`quantize(hadamard(x))` of rows `x` (N, inputs)."
    if not fits_int8_kernels(x): return quantize(hadamard(x.float()))
    q, scale = torch.empty(x.shape, dtype=torch.int8), x.new_empty(len(x), 1)
    call(quantize_kernel(x.shape[1]), x.contiguous(), q, scale, len(x))
    return q, scale

# %%
@functools.cache
def int_mm_is_exact() -> bool:
    """Are PyTorch's products of int8 numbers exact on this machine?

    Without instructions for it, oneDNN adds in 16 bits, which saturate."""
    numbers = torch.arange(-127, 128).repeat(3)[:24 * 31].view(24, 31)
    x, weight = numbers.to(torch.int8), numbers.flip(0, 1).to(torch.int8)
    return torch.equal(torch._int_mm(x, weight.T).long(), x.long() @ weight.long().T)


def check_int_mm():
    "ValueError if PyTorch's products of int8 numbers are not exact."
    if int_mm_is_exact(): return
    raise ValueError("quantization must be None here, got 'int8': PyTorch's sums of "
                     "8-bit products saturate on this CPU. Exact ones need AVX512-VNNI "
                     "or AMX, or AVX-512, g++ and a float32 model in sizes of 16 n")

# %%
ADD = r"""
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif
// in each lane, sum + the four numbers of x, plus 128 each, times the four of w
static inline i16 add(i16 sum, int32_t x, i16 w) {
  x ^= 0x80808080;
#ifdef __AVX512VNNI__
  return (i16)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#else
  for (int at = 0; at < 32; at += 8) sum += (x >> at & 255) * (w << (24 - at) >> 24);
  return sum;
#endif
}
"""

# %%
INT8_PRODUCT = r"""
#include <memory>
extern "C" void product(const Matrix* m, const float* x, const float* bias, float* y,
                        int64_t rows) {
  std::unique_ptr<int8_t[]> q(new int8_t[rows * N]);
  std::unique_ptr<float[]> scales(new float[rows]);
  quantize(x, q.get(), scales.get(), rows);
  auto write = [=, scale = scales.get()](int64_t row, int64_t out, i16 sum) {
    sum -= *(const i16*)(m->excess + out);
    v16 s = scale[row] * *(const v16*)(m->scale + out);
    s *= __builtin_convertvector(sum, v16);
    *(v16*)(y + row * m->outputs + out) = bias ? s + *(const v16*)(bias + out) : s;
  };
  const i16* packed = (const i16*)m->packed;
  multiply((const int32_t*)q.get(), packed, rows, N / 4, m->outputs, write);
}
"""

# %%
INT8_SOURCE = (VECTOR_TYPES + REDUCE + HADAMARD + QUANTIZE + ADD + TILE + MULTIPLY
               + PRODUCT + INT8_PRODUCT)


@functools.cache
def int8_product(n: int):
    "The compiled product of rows of `n` inputs."
    return load_product(INT8_SOURCE, N=n, SIZE=group_size(n))

# %%
class Int8Product:
    "`x @ weight.T + bias` with int8 numbers: a scale for each output and each row."
    def __init__(self, weight: Tensor):
        check_int_mm()
        self.weight, scale = hadamard_int8(weight)
        self.scale, self.dtype = scale[:, 0].contiguous(), weight.dtype

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, scale = hadamard_int8(x.flatten(0, -2))
        y = torch._int_mm(q, self.weight.T) * scale * self.scale
        y = (y if bias is None else y + bias).to(self.dtype)
        return y.view(*x.shape[:-1], len(self.scale))

# %%
class TiledInt8Product(TiledProduct):
    "The same by the kernel; for 16 n inputs and 16 n outputs."
    def __init__(self, weight: Tensor):
        q, scale = hadamard_int8(weight)
        excess = 128 * q.sum(1, dtype=torch.int32)   # what `add` counts too much
        self.hold(int8_product(weight.shape[1]), weight.shape,
                  tiled(q.view(torch.int32)), scale[:, 0].contiguous(), excess)


def int8_linear(weight: Tensor):
    "The fastest product with int8 numbers on this CPU; ValueError if none is exact."
    fits = fits_int8_kernels(weight) and len(weight) % 16 == 0
    return TiledInt8Product(weight) if fits else Int8Product(weight)

# %%
def int8_ops(target: Target) -> Ops | None:
    """quantization='int8' on a CPU, without compile.

    ValueError if sums of 8-bit products would not be exact."""
    if target.quantization != "int8" or target.device.type != "cpu" or target.compile:
        return None
    if not (fits_kernels() and takes_float32(target)): check_int_mm()
    plain = replace(target, quantization=None)
    ops = cpu_products_ops(plain) or torch_ops(plain)
    return replace(ops, linear=int8_linear)


OPS["int8"] = int8_ops
