"The same numbers from the same processor, sooner: matrices in the order they are read, and attention that reads its pages where they lie."

# %%
import ctypes, functools, hashlib, os, shutil, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from nano_vllm.attention import BACKENDS, Batch, TorchAttention, window_len
from nano_vllm.layers import OPS, Ops, Target
from nano_vllm.workbench import cache_dir

# %%
class PackedProduct:
    "`x @ weight.T + bias` by a copy of `weight` in the order oneDNN reads it."
    def __init__(self, weight: Tensor):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

# %%
class PlainProduct:
    "`x @ weight.T + bias` by `weight` (outputs, inputs) as it is."
    def __init__(self, weight: Tensor): self.weight = weight

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

# %%
def are_float32(*tensors: Tensor | None) -> bool:
    "Are these tensors, as far as they are there, float32 on a CPU?"
    return all(t.is_cpu and t.dtype == torch.float32 for t in tensors if t is not None)


def packed_linear(weight: Tensor):
    "The product with `weight` (outputs, inputs), packed if oneDNN can hold it."
    fits = are_float32(weight) and torch.backends.mkldnn.is_available()
    return PackedProduct(weight) if fits else PlainProduct(weight)

# %%
FLAGS = ("-O3 -march=native -mprefer-vector-width=512 -ffast-math "
         "-fno-finite-math-only -fopenmp -fPIC").split()
CAN_BUILD = (sys.platform == "linux" and shutil.which("g++") is not None
             and torch.backends.cpu.get_cpu_capability() == "AVX512")

# %%
def run_compiler(*arguments, source=None):
    "Run g++; RuntimeError with what it says if it fails."
    done = subprocess.run(["g++", *arguments], input=source, text=True,
                          stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"g++ could not compile the kernel:\n{done.stderr}")


def build(source: str, defines: list[str], path: Path):
    "Compile C++ `source` into the shared library `path`, which is whole or not there."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        out, library = f"{work}/out.o", f"{work}/out.so"
        run_compiler(*FLAGS, *defines, "-xc++", "-c", "-", "-o", out, source=source)
        run_compiler("-shared", out, "-o", library)
        os.replace(library, path)

# %%
def cpu_flags() -> str:
    "The instructions that this processor knows, in Linux's words."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags"))
    return " ".join(sorted(flags.partition(":")[2].split()))


@functools.cache
def build_environment() -> tuple[str, str, str]:
    "What a library depends on besides its source: processor, compiler, PyTorch's pick."
    version = subprocess.run(["g++", "--version"], stdout=subprocess.PIPE, text=True)
    return cpu_flags(), version.stdout, torch.backends.cpu.get_cpu_capability()

# %%
def load_library(source: str, **numbers: int) -> ctypes.CDLL:
    "The library of C++ `source`, where `numbers` are constants; compiled once."
    defines = [f"-D{name}={n}" for name, n in numbers.items()]
    recipe = repr((source, FLAGS, defines, build_environment()))
    name = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    path = cache_dir()/"kernels"/f"{name}.so"
    if not path.exists(): build(source, defines, path)
    return ctypes.CDLL(str(path))

# %%
def address(x: Tensor | None) -> int | None:
    "Where the first number of `x` stands in memory; None for None."
    return None if x is None else x.data_ptr()


def call(function, *arguments):
    "Call a C function, with the address of its first number for each tensor."
    function(*(ctypes.c_void_p(address(x)) if isinstance(x, Tensor) else x
               for x in arguments))

# %%
VECTOR_TYPES = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
"""

# %%
SUMS = r"""
// a and b, each folded in half within blocks of `size` lanes, side by side
template <int size> static inline v16 fold(v16 a, v16 b) {
  i16 low;
  for (int i = 0; i < 16; i++) low[i] = i % size < size / 2 ? i : i - size / 2 + 16;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + size / 2);
}
// lane i of the result: the sum of the lanes of x[i]
static inline v16 sums(v16* x) {
  for (int i = 0; i < 8; i++) x[i] = fold<16>(x[i], x[i + 8]);
  for (int i = 0; i < 4; i++) x[i] = fold<8>(x[i], x[i + 4]);
  for (int i = 0; i < 2; i++) x[i] = fold<4>(x[i], x[i + 2]);
  return fold<2>(x[0], x[1]);
}
"""

# %%
EXP = r"""
// e^x for x <= 0; ln 2 in two parts, the first with few bits, so that n * ln 2 is exact
static inline v16 exp16(v16 x) {
  x = x > -87.f ? x : v16{} - 87.f;
  i16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, i16);
  v16 m = __builtin_convertvector(n, v16);
  v16 f = x - m * 0.693359375f - m * -2.12194440e-4f;
  v16 p = 1.f / 120 + f * (1.f / 720);
  p = 1 + f * (1 + f * (1.f / 2 + f * (1.f / 6 + f * (1.f / 24 + f * p))));
  return (v16)((i16)p + (n << 23));
}
"""

# %%
REDUCE = r"""
static inline float max16(v16 x) {
  float m = x[0];
  for (int i = 1; i < 16; i++) m = std::max(m, x[i]);
  return m;
}
static inline float sum16(v16 x) {
  float s = 0;
  for (int i = 0; i < 16; i++) s += x[i];
  return s;
}
"""

# %%
CACHE = r"""
#if CACHE_BITS == 16
typedef uint16_t T;
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));
static inline v16 load(const T* p) {
  return (v16)(__builtin_convertvector(*(const halves*)p, i16) << 16);
}
static inline T narrow(float x) {
  union { float x; uint32_t bits; } u = {x};
  return (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
}
#else
typedef float T;
static inline v16 load(const T* p) { return *(const v16*)p; }
static inline T narrow(float x) { return x; }
#endif
"""

# %%
SIZES = r"""
constexpr int VECTORS = HEAD_DIM / 16;       // of a head
constexpr int ROW = KV_HEADS * HEAD_DIM;     // numbers of a token in the cache
"""
FIND = r"""
// where the rows of the n tokens from `first` on begin
static inline void find(const int64_t* table, int64_t size, int64_t first, int n,
                        int64_t* at) {
  for (int j = 0; j < n; j++) {
    int64_t p = first + j;
    at[j] = (table[p / size] * size + p % size) * ROW;
  }
}
// ask memory for a head's row, to have it in the second cache soon
static inline void fetch(const T* row) {
  for (size_t i = 0; i < HEAD_DIM * sizeof(T); i += 64)
    __builtin_prefetch((const char*)row + i, 0, 2);
}
"""

# %%
SCORES = r"""
// for each query head of the group, the scores of n tokens
static inline void score(const v16 Q[GROUP][VECTORS], const T* keys, const int64_t* at,
                         const int64_t* ahead, int n, v16* scores) {
  v16 dots[GROUP][16], k[VECTORS];
  for (int j = 0; j < n; j++) {
    fetch(keys + ahead[j]);
    for (int i = 0; i < VECTORS; i++) k[i] = load(keys + at[j] + 16 * i);
    for (int g = 0; g < GROUP; g++) {
      v16 dot = {};
      for (int i = 0; i < VECTORS; i++) dot += Q[g][i] * k[i];
      dots[g][j] = dot;
    }
  }
  for (int g = 0; g < GROUP; g++) {
    scores[g] = sums(dots[g]);
    for (int j = n; j < 16; j++) scores[g][j] = -INFINITY;
  }
}
"""

# %%
RESCALE = r"""
// scores become weights; what was summed up so far is scaled to the new best score
static inline void rescale(v16& weights, float& best, float& mass, v16* sum) {
  float old = best;
  best = std::max(old, max16(weights));
  float keep = expf(old - best);
  weights = exp16(weights - best);
  mass = mass * keep + sum16(weights);
  for (int i = 0; i < VECTORS; i++) sum[i] *= keep;
}
"""

# %%
ATTEND = r"""
// one token's group of query heads, over the tokens from `start` to before `end`
static void attend(const float* q, const T* keys, const T* values,
                   const int64_t* table, int64_t size, int64_t start, int64_t end,
                   float scale, float* out) {
  v16 Q[GROUP][VECTORS], sum[GROUP][VECTORS] = {}, weights[GROUP], v[VECTORS];
  float best[GROUP], mass[GROUP] = {};
  std::fill(best, best + GROUP, -INFINITY);
  for (int g = 0; g < GROUP; g++)
    for (int i = 0; i < VECTORS; i++)
      Q[g][i] = scale * ((const v16*)q)[g * VECTORS + i];
  for (int64_t first = start, at[16] = {}, ahead[16]; first < end; first += 16) {
    int n = std::min<int64_t>(16, end - first);
    find(table, size, first, n, at);
    std::copy(at, at + 16, ahead);
    find(table, size, first + 16, std::min<int64_t>(16, end - first - 16), ahead);
    score(Q, keys, at, ahead, n, weights);
    for (int g = 0; g < GROUP; g++) rescale(weights[g], best[g], mass[g], sum[g]);
    for (int j = 0; j < n; j++) {
      fetch(values + ahead[j]);
      for (int i = 0; i < VECTORS; i++) v[i] = load(values + at[j] + 16 * i);
      for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < VECTORS; i++) sum[g][i] += weights[g][j] * v[i];
    }
  }
  for (int g = 0; g < GROUP; g++)
    for (int i = 0; i < VECTORS; i++)
      ((v16*)out)[g * VECTORS + i] = sum[g][i] / mass[g];
}
"""

# %%
QUERIES = r"""
// the query tokens that attend, and for each of them what it sees
struct Queries {
  const int64_t* block_tables;   // of the sequences, `stride` numbers apart
  const int64_t* table_rows;     // each token's row of the block tables
  const int64_t* tokens;         // its place among the step's tokens
  const int64_t *starts, *ends;  // it sees the positions from start to before end
  int64_t num_tokens, stride, block_size;
};
"""

# %%
DECODE = r"""
extern "C" void decode(const Queries* queries, const float* q, const T* keys,
                       const T* values, float* out, float scale) {
  #pragma omp parallel for schedule(dynamic)
  for (int64_t work = 0; work < queries->num_tokens * KV_HEADS; work++) {
    int64_t i = work / KV_HEADS, head = work % KV_HEADS * HEAD_DIM;
    int64_t query = (queries->tokens[i] * ROW + head) * GROUP;
    const int64_t row = queries->table_rows[i];
    attend(q + query, keys + head, values + head,
           queries->block_tables + row * queries->stride, queries->block_size,
           queries->starts[i], queries->ends[i], scale, out + query);
  }
}
"""

# %%
SOURCE = (VECTOR_TYPES + SIZES + SUMS + EXP + REDUCE + CACHE + FIND + SCORES + RESCALE
          + ATTEND + QUERIES + DECODE)


@functools.cache
def kernels(head_dim: int, kv_heads: int, group: int, cache_bits: int) -> ctypes.CDLL:
    """The kernels, compiled for a model's heads: `group` query heads to a KV head,
    and a cache of numbers with 32 or 16 bits."""
    library = load_library(SOURCE, HEAD_DIM=head_dim, KV_HEADS=kv_heads, GROUP=group,
                           CACHE_BITS=cache_bits)
    library.decode.argtypes = [ctypes.c_void_p]*5 + [ctypes.c_float]
    return library

# %%
class Queries(ctypes.Structure):
    "The record of the same name in C."
    _fields_ = [("block_tables", ctypes.c_void_p), ("table_rows", ctypes.c_void_p),
                ("tokens", ctypes.c_void_p), ("starts", ctypes.c_void_p),
                ("ends", ctypes.c_void_p), ("num_tokens", ctypes.c_int64),
                ("stride", ctypes.c_int64), ("block_size", ctypes.c_int64)]

# %%
class InPlaceDecodes:
    "All query tokens of the sequences `rows`, each of which reads the pages in place."
    def __init__(self, batch: Batch, rows: np.ndarray, block_size: int,
                 window: int | None = None):
        chosen = np.zeros(len(batch.query_lens), dtype=bool)
        chosen[rows] = True
        row_of_token = np.repeat(np.arange(len(chosen)), batch.query_lens)
        tokens = np.flatnonzero(chosen[row_of_token])
        ends = batch.positions.numpy()[tokens] + 1   # a token sees itself, too
        starts = ends - window_len(ends, window)
        self.tokens = torch.from_numpy(tokens)
        # the record in C holds addresses only: what they lead to is kept alive here
        self.tensors = [batch.block_tables, self.tokens]
        self.tensors += map(torch.from_numpy, (row_of_token[tokens], starts, ends))
        tables, tokens, table_rows, starts, ends = map(address, self.tensors)
        self.queries = Queries(tables, table_rows, tokens, starts, ends,
                               len(self.tokens), batch.block_tables.stride(0),
                               block_size)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float,
               out: Tensor):
        "Write the outputs of these tokens to their rows of `out`."
        kv_heads, head_dim = keys.shape[1:]
        decode = kernels(head_dim, kv_heads, q.shape[1] // kv_heads,
                         8 * keys.itemsize).decode
        y = out if out.dtype == torch.float32 else torch.empty(out.shape)
        call(decode, ctypes.byref(self.queries), q.float().contiguous(), keys, values,
             y, scale)
        if y is not out: out[self.tokens] = y[self.tokens].to(out.dtype)

# %%
def max_in_place_query_len(length: int | np.ndarray) -> int | np.ndarray:
    """How many query tokens, over keys of `length`, gain by reading pages in place.

    Many products are faster in PyTorch's kernel, once the gather is paid for."""
    return np.clip(2**16 // length, 32, 256)

# %%
class InPlaceAttention(TorchAttention):
    "PyTorch's path, but decodes read their pages in place: on a CPU, not in float16."
    @classmethod
    def check(cls, device_type: str, block_size: int):
        "ValueError where the kernels cannot be compiled or do not run."
        if device_type == "cpu" and CAN_BUILD: return
        raise ValueError("attention_backend is 'in_place', which needs g++ and device "
                         f"'cpu' with AVX-512; the device is {device_type!r}")

    @property
    def paged(self) -> bool:
        "Is the cache one whose pages the kernels can read?"
        cache = self.kv_cache
        return (CAN_BUILD and cache.is_cpu and cache.is_contiguous()
                and cache.shape[-1] % 16 == 0
                and cache.dtype in (torch.float32, torch.bfloat16))

    @property
    def max_decode_query_len(self) -> int | np.ndarray:
        "How many query tokens of each sequence (S,) are handled as decodes."
        if not self.paged: return 1
        seen = window_len(self.batch.context_lens, self.window)
        return max_in_place_query_len(seen)

    def decode_parts(self, rows: np.ndarray) -> list:
        "What attends for the sequences `rows`, all at once."
        if not self.paged: return super().decode_parts(rows)
        if not len(rows): return []
        return [InPlaceDecodes(self.batch, rows, self.block_size, self.window)]

# %%
BACKENDS["in_place"] = InPlaceAttention

# %%
NORM = r"""
// sum = x (+ residual), out = its rows at mean square 1, times weight
extern "C" void norm(const float* x, const float* residual, const float* weight,
                     float* out, float* sum, int64_t rows, int64_t dim, float eps) {
  #pragma omp parallel for if (rows > 3)
  for (int64_t row = 0; row < rows; row++) {
    float square = 0, *s = sum + row * dim;
    for (int64_t i = 0; i < dim; i++) {
      s[i] = x[row * dim + i] + (residual ? residual[row * dim + i] : 0);
      square += s[i] * s[i];
    }
    float scale = 1 / std::sqrt(square / dim + eps);
    for (int64_t i = 0; i < dim; i++) out[row * dim + i] = s[i] * scale * weight[i];
  }
}
"""

# %%
SWIGLU = r"""
// out (rows, dim) = silu(gate) * up, for x (rows, 2 * dim)
extern "C" void swiglu(const float* x, float* out, int64_t rows, int64_t dim) {
  #pragma omp parallel for if (rows > 3)
  for (int64_t row = 0; row < rows; row++) {
    const v16 *gate = (const v16*)(x + row * 2 * dim), *up = gate + dim / 16;
    for (int64_t i = 0; i < dim / 16; i++) {
      v16 g = gate[i], e = exp16(g > 0.f ? -g : g);
      ((v16*)(out + row * dim))[i] = g * (g > 0.f ? v16{} + 1.f : e) / (1 + e) * up[i];
    }
  }
}
"""

# %%
@functools.cache
def small_kernels() -> ctypes.CDLL:
    "The compiled `norm` and `swiglu`."
    library = load_library(VECTOR_TYPES + EXP + NORM + SWIGLU)
    library.norm.argtypes = [ctypes.c_void_p]*5 + [ctypes.c_int64]*2 + [ctypes.c_float]
    library.swiglu.argtypes = [ctypes.c_void_p]*2 + [ctypes.c_int64]*2
    return library

# %%
PLAIN = Ops()   # what computes wherever a kernel meets what it is not made for


def fits_kernels(*tensors: Tensor | None) -> bool:
    "Can the kernels be compiled here, and take these tensors?"
    return CAN_BUILD and are_float32(*tensors)

# %%
def fused_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    "What `rms_norm` gives, x and residual (..., dim); float32 by one kernel."
    if not fits_kernels(x, weight, residual):
        return PLAIN.norm(x, weight, eps, residual)
    x, dim = x.contiguous(), x.shape[-1]
    out = total = torch.empty_like(x)
    other = None
    if residual is not None: other, total = residual.contiguous(), torch.empty_like(x)
    call(small_kernels().norm, x, other, weight, out, total, x.numel() // dim, dim, eps)
    return out if residual is None else (out, total)


def fused_swiglu(x: Tensor) -> Tensor:
    "What `silu_and_mul` gives, x (..., 2*d); float32 in whole vectors by one kernel."
    if x.shape[-1] % 32 or not fits_kernels(x): return PLAIN.activation(x)
    x, dim = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], dim)
    call(small_kernels().swiglu, x, out, out.numel() // dim, dim)
    return out

# %%
def takes_float32(target: Target) -> bool:
    "Does a model compute in float32 on a CPU?"
    return target.device.type == "cpu" and target.dtype == torch.float32


def cpu_kernels_ops(target: Target) -> Ops | None:
    "A CPU with AVX-512 and g++, or any for float32; neither quantization nor compile."
    if target.quantization is not None or target.compile: return None
    if target.device.type != "cpu" or not (CAN_BUILD or takes_float32(target)):
        return None
    ops = Ops(attention=InPlaceAttention) if CAN_BUILD else Ops()
    if not takes_float32(target): return ops
    ops = replace(ops, linear=packed_linear)
    return replace(ops, norm=fused_norm, activation=fused_swiglu) if CAN_BUILD else ops


OPS["cpu_kernels"] = cpu_kernels_ops
