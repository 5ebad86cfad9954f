"When every part is fast, what is left is the asking: all layers of a step behind one call, made of the pieces that are there."

# %%
import ctypes, functools
from collections.abc import Callable
from dataclasses import replace
from weakref import WeakKeyDictionary
import torch
from torch import Tensor
from nano_vllm.cpu_kernels import (NORM, PLAIN, SOURCE, SWIGLU, InPlaceAttention,
                                   InPlaceDecodes, address, fits_kernels, load_library,
                                   takes_float32)
from nano_vllm.cpu_products import (MAX_MLP_TOKENS, PRODUCT, ROPE_AND_CACHE,
                                    TiledProduct, cpu_products_ops)
from nano_vllm.layers import OPS, Linear, Ops, Target
from nano_vllm.model import MLP, DecoderLayer
from nano_vllm.quantization import int8_ops

# %%
LAYER = r"""
struct Layer {
  const Matrix *qkv, *o, *gate_up, *down;
  const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias, *norm, *mlp_norm;
};
static inline void apply(const Matrix* m, const float* bias, const float* x, float* y,
                         int64_t rows) {
  m->product(m, x, bias, y, rows);
}
"""


class Layer(ctypes.Structure):
    "The record of the same name in C."
    _fields_ = [(name, ctypes.c_void_p) for name in
                ("qkv", "o", "gate_up", "down", "qkv_bias", "o_bias", "gate_up_bias",
                 "down_bias", "norm", "mlp_norm")]

# %%
STEP = r"""
struct Step {
  const Layer* layers;
  int64_t num_layers, num_tokens, hidden_size, intermediate_size;
  float eps, scale;                  // of the norms; of the scores
  float *hidden_states, *residual;   // (num_tokens, hidden_size): read and written
  float *normed, *wide, *gated;      // room for activations
  float *q, *attended;               // (num_tokens, heads * head_dim)
  const float *cos, *sin;            // (num_tokens, head_dim)
  const int64_t* slot_mapping;       // (num_tokens,): where keys and values go
  T* kv_cache;                       // keys, then values, of one layer after the other
  int64_t cache_size;                // numbers of a layer's keys, or of its values
  const Queries* queries;
};
static void add_norm(const Step* s, const float* weight) {
  norm(s->hidden_states, s->residual, weight, s->normed, s->residual, s->num_tokens,
       s->hidden_size, s->eps);
}
"""


class Step(ctypes.Structure):
    "The record of the same name in C."
    TENSORS = ("hidden_states", "residual", "normed", "wide", "gated", "q", "attended",
               "cos", "sin", "slot_mapping", "kv_cache")
    _fields_ = [("layers", ctypes.c_void_p), ("num_layers", ctypes.c_int64),
                ("num_tokens", ctypes.c_int64), ("hidden_size", ctypes.c_int64),
                ("intermediate_size", ctypes.c_int64), ("eps", ctypes.c_float),
                ("scale", ctypes.c_float),
                *((name, ctypes.c_void_p) for name in TENSORS),
                ("cache_size", ctypes.c_int64), ("queries", ctypes.c_void_p)]

# %%
MLP_IN_PIECES = r"""
// hidden_states = the MLP of what is normed, a piece of the tokens at a time
static void mlp(const Step* s, const Layer* w) {
  for (int64_t at = 0; at < s->num_tokens; at += MAX_MLP_TOKENS) {
    int64_t n = std::min<int64_t>(MAX_MLP_TOKENS, s->num_tokens - at);
    int64_t first = at * s->hidden_size;
    apply(w->gate_up, w->gate_up_bias, s->normed + first, s->wide, n);
    swiglu(s->wide, s->gated, n, s->intermediate_size);
    apply(w->down, w->down_bias, s->gated, s->hidden_states + first, n);
  }
}
"""

# %%
RUN_LAYERS = r"""
extern "C" void run_layers(const Step* s) {
  T* keys = s->kv_cache;
  for (const Layer* w = s->layers; w < s->layers + s->num_layers; w++) {
    T* values = keys + s->cache_size;
    add_norm(s, w->norm);
    apply(w->qkv, w->qkv_bias, s->normed, s->wide, s->num_tokens);
    rope_and_cache(s->wide, s->cos, s->sin, s->slot_mapping, s->q, keys, values,
                   s->num_tokens);
    decode(s->queries, s->q, keys, values, s->attended, s->scale);
    apply(w->o, w->o_bias, s->attended, s->hidden_states, s->num_tokens);
    add_norm(s, w->mlp_norm);
    mlp(s, w);
    keys = values + s->cache_size;
  }
}
"""


@functools.cache
def run_layers_kernel(head_dim: int, kv_heads: int, group: int, cache_bits: int):
    "The compiled `run_layers` for a model's heads and the width of its cache."
    source = (SOURCE + NORM + SWIGLU + ROPE_AND_CACHE + PRODUCT + LAYER + STEP
              + MLP_IN_PIECES + RUN_LAYERS)
    library = load_library(source, HEAD_DIM=head_dim, KV_HEADS=kv_heads, GROUP=group,
                           CACHE_BITS=cache_bits, MAX_MLP_TOKENS=MAX_MLP_TOKENS)
    library.run_layers.argtypes = [ctypes.c_void_p]
    return library.run_layers

# %%
def linears(layer: DecoderLayer) -> list[Linear]:
    "The linear layers of a layer, in the order of the record in C."
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


def is_tiled(layer: DecoderLayer) -> bool:
    "Is it a layer of the kind that the kernel computes, with all products in tiles?"
    if type(layer) is not DecoderLayer or type(layer.mlp) is not MLP: return False
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_norm is None and attention.o_proj.group.size == 1
            and mlp.gate_up_proj.lengths[0] % 16 == 0
            and all(isinstance(m.product, TiledProduct) for m in linears(layer)))


def layer_record(layer: DecoderLayer) -> Layer:
    "A layer for C: the addresses of its matrices, biases and norms."
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return Layer(*(ctypes.addressof(m.product.matrix) for m in linears(layer)),
                 *(address(m.bias) for m in linears(layer)),
                 *(address(norm.weight) for norm in norms))

# %%
class LayerTable:
    "All layers of a model for C, and the sizes that they have in common."
    def __init__(self, layers):
        self.records = (Layer * len(layers))(*map(layer_record, layers))
        attention, mlp = layers[0].self_attn, layers[0].mlp
        self.head_dim, self.eps = attention.head_dim, layers[0].input_layernorm.eps
        self.q_size, self.kv_size, _ = attention.qkv_proj.lengths
        self.intermediate_size = mlp.gate_up_proj.lengths[0]

    def room(self, residual: Tensor) -> dict[str, Tensor]:
        "Memory for the activations of tokens with a residual (N, hidden)."
        N, new = len(residual), residual.new_empty
        gated = new(min(N, MAX_MLP_TOKENS), self.intermediate_size)
        wide = new(max(N * (self.q_size + 2*self.kv_size), 2 * gated.numel()))
        return dict(normed=torch.empty_like(residual), wide=wide, gated=gated,
                    q=new(N, self.q_size), attended=new(N, self.q_size))

    def run(self, hidden_states: Tensor, residual: Tensor, cos: Tensor, sin: Tensor,
            attention: InPlaceAttention, decodes: InPlaceDecodes):
        "All layers: hidden_states and residual (N, hidden) are read and written."
        tensors = dict(hidden_states=hidden_states, residual=residual, cos=cos, sin=sin,
                       slot_mapping=attention.slot_mapping, kv_cache=attention.kv_cache)
        tensors |= self.room(residual)
        num_tokens, hidden_size = residual.shape
        keys = attention.kv_cache[0, 0]
        step = Step(layers=ctypes.addressof(self.records), num_layers=len(self.records),
                    num_tokens=num_tokens, hidden_size=hidden_size, eps=self.eps,
                    intermediate_size=self.intermediate_size, scale=attention.scale,
                    cache_size=keys.numel(), queries=ctypes.addressof(decodes.queries),
                    **{name: address(tensor) for name, tensor in tensors.items()})
        kv_heads, group = self.kv_size // self.head_dim, self.q_size // self.kv_size
        kernel = run_layers_kernel(self.head_dim, kv_heads, group, 8 * keys.itemsize)
        kernel(ctypes.byref(step))

# %%
TABLES = WeakKeyDictionary()   # layers of a model -> their table; not kept alive by it


def layer_table(layers) -> LayerTable | None:
    "The table of `layers`, made once; None if they are not what the kernel computes."
    if layers not in TABLES and all(map(is_tiled, layers)):
        TABLES[layers] = LayerTable(layers)
    return TABLES.get(layers)


def all_decodes(attention) -> InPlaceDecodes | None:
    "What attends for all tokens of a batch, if that is one kernel reading in place."
    if not (isinstance(attention, InPlaceAttention) and attention.paged): return None
    parts = attention.parts
    return parts[0] if [type(part) for part in parts] == [InPlaceDecodes] else None

# %%
def run_layers_at_once(layers, hidden_states: Tensor, residual: Tensor, cos: Tensor,
                       sin: Tensor, attention) -> tuple[Tensor, Tensor]:
    "What `run_layers` gives: one call, if the layers and the batch allow it."
    decodes, table = all_decodes(attention), layer_table(layers)
    tensors = hidden_states, residual, cos, sin
    if decodes is None or table is None or not fits_kernels(*tensors):
        return PLAIN.run_layers(layers, *tensors, attention)
    tensors = [tensor.contiguous() for tensor in tensors]
    table.run(*tensors, attention, decodes)
    return tensors[0], tensors[1]

# %%
def fits_one_call(target: Target) -> bool:
    "Is it a dense float32 model in whole vectors, on one CPU, without norms on q, k?"
    if not (fits_kernels() and takes_float32(target)): return False
    if target.tensor_parallel_size > 1: return False
    c = target.config
    sizes = c.hidden_size, c.intermediate_size, c.head_dim
    return all(n % 16 == 0 for n in sizes) and not c.qk_norm and c.mlp is None


def with_one_call(build: Callable, target: Target) -> Ops | None:
    "The Ops that `build` makes, with all layers in one call; None if it does not suit."
    if not fits_one_call(target): return None
    ops = build(target)
    return None if ops is None else replace(ops, run_layers=run_layers_at_once)

# %%
def cpu_steps_ops(target: Target) -> Ops | None:
    """Dense float32 models in sizes of 16 n, no q and k norms, on one CPU with AVX-512.

    It needs g++, and neither quantization nor compile nor tensor parallelism."""
    return with_one_call(cpu_products_ops, target)


def int8_steps_ops(target: Target) -> Ops | None:
    "quantization='int8', otherwise as cpu_steps: float32, AVX-512, sizes of 16 n."
    return with_one_call(int8_ops, target)


OPS["cpu_steps"] = cpu_steps_ops
OPS["int8_steps"] = int8_steps_ops
