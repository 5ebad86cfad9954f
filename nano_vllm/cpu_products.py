"Forty lines of C++ against a library of thirty years: when the sizes are known, the obvious loop, kept in registers, is enough."

# %%
import ctypes, functools
from dataclasses import replace
import torch
import torch.nn.functional as F
from torch import Tensor
from nano_vllm.attention import slots_of
from nano_vllm.cpu_kernels import (CACHE, EXP, PLAIN, REDUCE, SIZES, VECTOR_TYPES,
                                   InPlaceAttention, address, call, cpu_kernels_ops,
                                   fits_kernels, load_library, packed_linear,
                                   takes_float32)
from nano_vllm.layers import OPS, Ops, Target
from nano_vllm.sampler import (SAMPLING_STAGES, SamplingMetadata, make_keys,
                               random_sample, run_stages, sample)

# %%
TILE = r"""
constexpr int ROWS = 8, WIDE = 3;   // sums in 24 of the 32 registers of AVX-512
static inline v16 add(v16 sum, float x, v16 w) { return sum + x * w; }
// sum (R, 48): R rows of x times 48 outputs, for x (R, inputs) and w (inputs, 48);
// meanwhile, what lies `ahead` is fetched into the second cache, a line for each input
template <int R, class X, class V>
static void tile(const X* x, const V* w, const V* ahead, int64_t inputs,
                 V sum[ROWS][WIDE]) {
  V s[R][WIDE] = {};
  for (int64_t i = 0; i < inputs; i++) {
    __builtin_prefetch(ahead + i, 0, 2);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < WIDE; j++)
        s[r][j] = add(s[r][j], x[r * inputs + i], w[WIDE * i + j]);
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < WIDE; j++) sum[r][j] = s[r][j];
}
"""

# %%
MULTIPLY = r"""
// the tile of as many rows as there are
template <int R, class X, class V>
static void tiles(int64_t rows, const X* x, const V* w, const V* ahead,
                  int64_t inputs, V sum[ROWS][WIDE]) {
  if constexpr (R > 1)
    if (rows < R) return tiles<R - 1>(rows, x, w, ahead, inputs, sum);
  tile<R>(x, w, ahead, inputs, sum);
}
// write(row, output, 16 sums) for all of x (rows, inputs) times packed weights
template <class X, class V, class Write>
static void multiply(const X* x, const V* packed, int64_t rows, int64_t inputs,
                     int64_t outputs, Write write) {
  int64_t parts = std::max<int64_t>(1, (rows + ROWS - 1) / ROWS);
  int64_t most = (rows + parts - 1) / parts;
  #pragma omp parallel for schedule(static)
  for (int64_t out = 0; out < outputs; out += 16 * WIDE)
    for (int64_t row = 0; row < rows; row += most) {
      V sum[ROWS][WIDE];
      int64_t n = std::min(most, rows - row), part = row / most;
      const V *w = packed + out * inputs / 16, *ahead = w;
      if (parts > 1 && part < WIDE) ahead += (WIDE + part) * inputs;
      tiles<ROWS>(n, x + row * inputs, w, ahead, inputs, sum);
      for (int r = 0; r < n; r++)
        for (int j = 0; j < WIDE && out + 16 * j < outputs; j++)
          write(row + r, out + 16 * j, sum[r][j]);
    }
}
"""

# %%
PRODUCT = r"""
struct Matrix {
  void (*product)(const Matrix*, const float* x, const float* bias, float* y,
                  int64_t rows);
  const void* packed;
  int64_t inputs, outputs;
  const float* scale;      // both for whole numbers only
  const int32_t* excess;
};
"""
FLOAT_PRODUCT = r"""
extern "C" void product(const Matrix* m, const float* x, const float* bias, float* y,
                        int64_t rows) {
  auto write = [=](int64_t row, int64_t out, v16 sum) {
    v16* place = (v16*)(y + row * m->outputs + out);
    *place = bias ? sum + *(const v16*)(bias + out) : sum;
  };
  multiply(x, (const v16*)m->packed, rows, m->inputs, m->outputs, write);
}
"""

# %%
TILE_OUTPUTS = 48   # 16 * WIDE


def tiled(weight: Tensor) -> Tensor:
    "(outputs, inputs) in tiles of 48 outputs, filled up: (tiles, inputs, 48)."
    full = F.pad(weight, (0, 0, 0, -len(weight) % TILE_OUTPUTS))
    return full.unflatten(0, (-1, TILE_OUTPUTS)).transpose(1, 2).contiguous()

# %%
class Matrix(ctypes.Structure):
    "The record of the same name in C."
    _fields_ = [("product", ctypes.c_void_p), ("packed", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64),
                ("scale", ctypes.c_void_p), ("excess", ctypes.c_void_p)]


def load_product(source: str, **numbers: int):
    "The compiled function `product` of C++ `source`."
    product = load_library(source, **numbers).product
    product.argtypes = [ctypes.c_void_p]*4 + [ctypes.c_int64]
    return product


@functools.cache
def float_product():
    "The compiled product of float32 rows."
    return load_product(VECTOR_TYPES + TILE + MULTIPLY + PRODUCT + FLOAT_PRODUCT)

# %%
class TiledProduct:
    "`x @ weight.T + bias` by a copy of `weight` in tiles; float32, 16 n outputs."
    def __init__(self, weight: Tensor):
        self.hold(float_product(), weight.shape, tiled(weight))

    def hold(self, product, shape, packed: Tensor, scale: Tensor | None = None,
             excess: Tensor | None = None):
        "Keep the tensors of a matrix of `shape`, (outputs, inputs), and the record."
        outputs, inputs = shape
        self.product = product
        self.tensors = packed, scale, excess   # the record does not keep them alive
        function = ctypes.cast(product, ctypes.c_void_p)
        self.matrix = Matrix(function, address(packed), inputs, outputs, address(scale),
                             address(excess))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x, m = x.contiguous(), self.matrix
        y = x.new_empty(*x.shape[:-1], m.outputs)
        call(self.product, ctypes.byref(m), x, bias, y, x.numel() // m.inputs)
        return y

# %%
def best_linear(weight: Tensor):
    "The fastest product of float32 rows with `weight` (outputs, inputs) on this CPU."
    fits = fits_kernels(weight) and len(weight) % 16 == 0
    return TiledProduct(weight) if fits else packed_linear(weight)

# %%
ROPE_AND_CACHE = r"""
constexpr int HALF = HEAD_DIM / 2, Q = GROUP * ROW;   // numbers of a token's queries
static inline void rotate(const float* x, const float* cos, const float* sin,
                          float* y) {
  for (int i = 0; i < HALF; i++) {
    y[i] = x[i] * cos[i] - x[i + HALF] * sin[i];
    y[i + HALF] = x[i + HALF] * cos[i] + x[i] * sin[i];
  }
}
static inline void put(const float* x, T* y) {
  for (int i = 0; i < ROW; i++) y[i] = narrow(x[i]);
}
extern "C" void rope_and_cache(const float* qkv, const float* cos, const float* sin,
                               const int64_t* slots, float* q, T* keys, T* values,
                               int64_t rows) {
  #pragma omp parallel for if (rows > 3)
  for (int64_t row = 0; row < rows; row++) {
    const float *c = cos + row * HEAD_DIM;
    const float *s = sin + row * HEAD_DIM + HALF;   // sin: (-sin, sin)
    const float *x = qkv + row * (Q + 2 * ROW), *k = x + Q;
    float *y = q + row * Q, rotated[ROW];
    for (int i = 0; i < Q; i += HEAD_DIM) rotate(x + i, c, s, y + i);
    for (int i = 0; i < ROW; i += HEAD_DIM) rotate(k + i, c, s, rotated + i);
    put(rotated, keys + slots[row] * ROW);
    put(k + ROW, values + slots[row] * ROW);
  }
}
"""

# %%
@functools.cache
def rope_kernel(head_dim: int, kv_heads: int, group: int, cache_bits: int):
    "The compiled `rope_and_cache` for a model's heads and the width of its cache."
    library = load_library(VECTOR_TYPES + SIZES + CACHE + ROPE_AND_CACHE,
                           HEAD_DIM=head_dim, KV_HEADS=kv_heads, GROUP=group,
                           CACHE_BITS=cache_bits)
    library.rope_and_cache.argtypes = [ctypes.c_void_p]*7 + [ctypes.c_int64]
    return library.rope_and_cache

# %%
def fused_rope_and_cache(attention_layer, qkv: Tensor, cos: Tensor, sin: Tensor,
                         attention) -> Tensor:
    "What `rope_and_cache` gives: one kernel, if there are no norms and pages to read."
    paged = isinstance(attention, InPlaceAttention) and attention.paged
    is_plain = attention_layer.q_norm is None
    if not (paged and is_plain and fits_kernels(qkv, cos, sin)):
        return PLAIN.rope_and_cache(attention_layer, qkv, cos, sin, attention)
    keys, values = slots_of(attention.kv_cache, attention_layer.layer)
    kv_heads, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2*kv_heads
    q = qkv.new_empty(len(qkv), heads, head_dim)
    kernel = rope_kernel(head_dim, kv_heads, heads // kv_heads, 8 * keys.itemsize)
    call(kernel, qkv.contiguous(), cos.contiguous(), sin.contiguous(),
         attention.slot_mapping, q, keys, values, len(qkv))
    return q

# %%
MAX_MLP_TOKENS = 1024   # tokens whose activations stay in a cache

# %%
RANDOM_BITS = r"""
typedef uint32_t u16 __attribute__((vector_size(64), aligned(4)));
template <int shift> static inline i16 round(i16 x, uint32_t factor) {
  x = (i16)((u16)x * factor);
  return x ^ (x >> shift);
}
// 31 random bits for the 16 tokens from `first` on, as `hash_bits` gives them
static inline i16 random_bits(int32_t first, const int32_t* key) {
  i16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i16 x = round<11>((lane + first) ^ key[0], 0xed5ad4bb) + key[1];
  return round<14>(round<15>(x, 0xac4c1b51), 0x31848bab);
}
"""

# %%
DRAW = r"""
static inline float best_of(const float* x, int32_t n) {
  v16 most = *(const v16*)x;
  for (int32_t i = 16; i < n; i += 16) {
    v16 next = *(const v16*)(x + i);
    most = next > most ? next : most;
  }
  return max16(most);
}
// the best token of logits x, over a temperature, and their noise
static int64_t race(const float* x, const int32_t* key, int32_t vocab,
                    float temperature) {
  float best = -INFINITY, top = temperature == 1 ? 0 : best_of(x, vocab);
  int64_t token = 0;
  for (int32_t first = 0; first < vocab; first += 16) {
    v16 s = (*(const v16*)(x + first) - top) / temperature, ahead = s - best;
    v16 u = __builtin_convertvector(random_bits(first, key), v16) + 0.5f;
    u *= (float)(0x1p-31 * (1 - 0x1p-24));
    i16 may = u <= 1.001f * exp16(ahead < 0.f ? ahead : v16{});
    int32_t any = 0;
    for (int i = 0; i < 16; i++) any |= may[i];
    for (int i = 0; any && i < 16; i++) {
      float value = may[i] ? s[i] - logf(-log1pf(-u[i])) : -INFINITY;
      if (value > best) best = value, token = first + i;
    }
  }
  return token;
}
extern "C" void draw(const float* x, const int32_t* keys, const float* temperatures,
                     int64_t* tokens, int64_t rows, int64_t vocab) {
  #pragma omp parallel for
  for (int64_t row = 0; row < rows; row++)
    tokens[row] = race(x + row * vocab, keys + 2 * row, vocab, temperatures[row]);
}
"""

# %%
@functools.cache
def draw_kernel():
    "The compiled `draw`."
    library = load_library(VECTOR_TYPES + EXP + REDUCE + RANDOM_BITS + DRAW)
    library.draw.argtypes = [ctypes.c_void_p]*4 + [ctypes.c_int64]*2
    return library.draw


def race(x: Tensor, keys: Tensor, temperatures: Tensor) -> Tensor:
    "A draw for each row: x (R, V) float32, keys (R, 2), temperatures (R,) -> ids (R,)."
    token_ids = torch.empty(len(x), dtype=torch.int64)
    call(draw_kernel(), x.contiguous(), keys.contiguous(), temperatures, token_ids,
         *x.shape)
    return token_ids


def fast_draw(x: Tensor, metadata: SamplingMetadata) -> Tensor:
    "What `random_sample` gives; by the kernel for x (R, 16 n) float32 on a CPU."
    if x.shape[1] % 16 or not fits_kernels(x): return random_sample(x, metadata)
    temperatures = metadata.temperature.contiguous()
    if not metadata.is_plain:
        x, temperatures = run_stages(SAMPLING_STAGES, x, metadata), torch.ones(len(x))
    return race(x, make_keys(metadata.seeds, metadata.num_output_tokens), temperatures)


fast_sample = functools.partial(sample, draw=fast_draw)

# %%
def cpu_products_ops(target: Target) -> Ops | None:
    "A CPU with AVX-512 and g++, or any for float32; neither quantization nor compile."
    ops = cpu_kernels_ops(target)
    if ops is None: return None
    if fits_kernels(): ops = replace(ops, sample=fast_sample)
    if not takes_float32(target): return ops
    return replace(ops, linear=best_linear, rope_and_cache=fused_rope_and_cache,
                   max_mlp_tokens=MAX_MLP_TOKENS)


OPS["cpu_products"] = cpu_products_ops
