"The small operations between the matrices, joined: by a compiler, and by hand around the cache, one kernel where there were ten."

# %%
import functools
from dataclasses import replace
from types import SimpleNamespace
import torch
from torch import Tensor
from nano_vllm.layers import (OPS, Ops, Target, last_that_suits, rms_norm, rotate,
                              silu_and_mul)
try:
    import triton
    import triton.language as tl
    from nano_vllm.triton_attention import TritonAttention
except ModuleNotFoundError as e:
    if e.name != "triton": raise
    # where Triton is not to be had, its kernels are plain functions that nobody calls
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    TritonAttention = ()   # the class of nothing

# %%
@functools.cache
def compiled(function):
    "`function`, compiled for any number of rows when it is called for the first time."
    return torch.compile(function, dynamic=True)

# %%
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    "`rms_norm` without a residual."
    return rms_norm(x, weight, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float):
    "`rms_norm` with a residual."
    return rms_norm(x, weight, eps, residual)

# %%
def compiled_norm(x: Tensor, weight: Tensor, eps: float,
                  residual: Tensor | None = None):
    "What `rms_norm(x, weight, eps, residual)` gives."
    if residual is None: return compiled(norm)(x, weight, eps)
    return compiled(add_norm)(x, residual, weight, eps)


def compiled_activation(x: Tensor) -> Tensor:
    "What `silu_and_mul(x)` gives."
    return compiled(silu_and_mul)(x)

# %%
def split_norm_rotate(qkv: Tensor, lengths: list[int], head_dim: int, cos: Tensor,
                      sin: Tensor, norms: list[tuple[Tensor, float]]):
    """q, k and v (N, heads, head_dim) of `qkv` (N, sum of `lengths`); q and k rotated.

    `norms`: (weight, eps) of q's norm and of k's, or nothing."""
    parts = qkv.split(lengths, -1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    if norms:
        q_norm, k_norm = norms
        q, k = rms_norm(q, *q_norm), rms_norm(k, *k_norm)
    return rotate(q, cos, sin), rotate(k, cos, sin), v

# %%
def compiled_rope_and_cache(attention_layer, qkv: Tensor, cos: Tensor, sin: Tensor,
                            attention) -> Tensor:
    "What `rope_and_cache` gives, by one compiled kernel and the backend's store."
    layer, norms = attention_layer, []
    if layer.q_norm is not None:
        norms = [(n.weight, n.eps) for n in (layer.q_norm, layer.k_norm)]
    q, k, v = compiled(split_norm_rotate)(qkv, layer.qkv_proj.lengths, layer.head_dim,
                                          cos, sin, norms)
    attention.store(k, v, layer.layer)
    return q

# %%
@triton.jit
def half_offsets(head_stride, dim_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
                 ROWS: tl.constexpr, WIDTH: tl.constexpr):
    "(ROWS, WIDTH) offsets of the heads' left halves, and whether they are there."
    head = tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    return head*head_stride + i*dim_stride, (head < HEADS) & (i < HALF)

# %%
@triton.jit
def load_heads(x, dim_stride, HEADS: tl.constexpr, HALF: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr):
    "Left and right halves of heads that lie side by side from `x` on, as they are."
    at, there = half_offsets(2*HALF*dim_stride, dim_stride, HEADS, HALF, ROWS, WIDTH)
    left = tl.load(x + at, mask=there, other=0.)
    right = tl.load(x + at + HALF*dim_stride, mask=there, other=0.)
    return left, right


@triton.jit
def store_heads(to, left, right, head_stride, dim_stride, HEADS: tl.constexpr,
                HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    "Write both halves of the heads to where `to` points."
    at, there = half_offsets(head_stride, dim_stride, HEADS, HALF, ROWS, WIDTH)
    tl.store(to + at, left, mask=there)
    tl.store(to + at + HALF*dim_stride, right, mask=there)

# %%
@triton.jit
def rotate_heads(left, right, cos, sin):
    "Heads (ROWS, WIDTH) as halves, each pair turned; cos and sin (WIDTH,)."
    return left*cos - right*sin, right*cos + left*sin

# %%
@triton.jit
def rounded(x, pointer):
    "float32 `x`, rounded to the number type that `pointer` points to."
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def norm_heads(left, right, weight, eps, HALF: tl.constexpr, WIDTH: tl.constexpr):
    "What `rms_norm` with `weight` (2*HALF,) gives for heads as halves, float32."
    i = tl.arange(0, WIDTH)
    left_weight = tl.load(weight + i, mask=i < HALF, other=0.).to(tl.float32)
    right_weight = tl.load(weight + HALF + i, mask=i < HALF, other=0.).to(tl.float32)
    mean = tl.sum(left*left + right*right, 1) / (2*HALF)
    scale = tl.rsqrt(mean + eps)[:, None]
    left = rounded(rounded(left*scale, weight) * left_weight, weight)
    right = rounded(rounded(right*scale, weight) * right_weight, weight)
    return left, right

# %%
@triton.jit
def norm_rotate_heads(left, right, weight, eps, cos, sin, HALF: tl.constexpr,
                      WIDTH: tl.constexpr):
    "Heads as halves, normed if there is a `weight`, and rotated; float32."
    left = left.to(tl.float32)
    right = right.to(tl.float32)
    if weight is not None:
        left, right = norm_heads(left, right, weight, eps, HALF, WIDTH)
    return rotate_heads(left, right, cos, sin)

# %%
@triton.jit
def norm_rotate_store_kernel(
        qkv, cos, sin, q_weight, k_weight, eps, q, keys, values, slot_mapping,
        num_slots, qkv_token, qkv_dim, angle_token,
        cache_block, cache_slot, cache_head, cache_dim,
        SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
        HALF: tl.constexpr, ROWS: tl.constexpr, KV_ROWS: tl.constexpr,
        WIDTH: tl.constexpr):
    "One program for each token: its q to `q`, its k and v into its slot."
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        D: tl.constexpr = 2*HALF
        i = tl.arange(0, WIDTH)
        at = token*angle_token + i
        c = tl.load(cos + at, mask=i < HALF, other=0.)
        s = tl.load(sin + at + HALF, mask=i < HALF, other=0.)
        x = qkv + token*qkv_token
        q_left, q_right = load_heads(x, qkv_dim, HEADS, HALF, ROWS, WIDTH)
        x += HEADS*D*qkv_dim
        k_left, k_right = load_heads(x, qkv_dim, KV_HEADS, HALF, KV_ROWS, WIDTH)
        x += KV_HEADS*D*qkv_dim
        v_left, v_right = load_heads(x, qkv_dim, KV_HEADS, HALF, KV_ROWS, WIDTH)
        q_left, q_right = norm_rotate_heads(
            q_left, q_right, q_weight, eps, c, s, HALF, WIDTH)
        k_left, k_right = norm_rotate_heads(
            k_left, k_right, k_weight, eps, c, s, HALF, WIDTH)
        place = slot // SIZE * cache_block + slot % SIZE * cache_slot
        store_heads(q + token*HEADS*D, q_left, q_right, D, 1, HEADS, HALF, ROWS, WIDTH)
        store_heads(keys + place, k_left, k_right, cache_head, cache_dim, KV_HEADS,
                    HALF, KV_ROWS, WIDTH)
        store_heads(values + place, v_left, v_right, cache_head, cache_dim, KV_HEADS,
                    HALF, KV_ROWS, WIDTH)

# %%
def norm_rotate_store(qkv: Tensor, cos: Tensor, sin: Tensor,
                      weights: list[Tensor | None], eps: float, slot_mapping: Tensor,
                      kv_cache: Tensor, layer: int) -> Tensor:
    """q (N, heads, head_dim), normed and rotated; k and v go into their slots (N,).

    `qkv` (N, (heads + 2*kv_heads) * head_dim); cos and sin as `Rotary` gives them;
    `weights`: of q's and k's norm, or None for none. Nothing is computed or written
    for a row whose slot is outside the cache, such as -1."""
    keys, values = kv_cache[layer]
    num_blocks, size, kv_heads, dim = keys.shape
    heads = qkv.shape[1] // dim - 2*kv_heads
    rows, kv_rows, width = map(triton.next_power_of_2, (heads, kv_heads, dim // 2))
    q = qkv.new_empty(len(qkv), heads, dim)
    norm_rotate_store_kernel[(len(qkv),)](
        qkv, cos, sin, *weights, eps, q, keys, values, slot_mapping, num_blocks*size,
        *qkv.stride(), cos.stride(0), *keys.stride(), size, heads, kv_heads, dim // 2,
        rows, kv_rows, width, num_warps=4 if rows * width <= 2048 else 8,
        enable_fp_fusion=False)
    return q

# %%
def fused_rope_and_cache(attention_layer, qkv: Tensor, cos: Tensor, sin: Tensor,
                         attention) -> Tensor:
    "What `rope_and_cache` gives: one launch, where Triton's kernels run."
    layer = attention_layer
    if not isinstance(attention, TritonAttention):
        return compiled_rope_and_cache(layer, qkv, cos, sin, attention)
    weights, eps = [None, None], 0.
    if layer.q_norm is not None:
        weights, eps = [layer.q_norm.weight, layer.k_norm.weight], layer.q_norm.eps
    return norm_rotate_store(qkv, cos, sin, weights, eps, attention.slot_mapping,
                             attention.kv_cache, layer.layer)

# %%
def fusion_ops(target: Target) -> Ops | None:
    "What suits without compile, with its small operations joined: compile."
    if not target.compile: return None
    _, ops = last_that_suits(replace(target, compile=False))
    return replace(ops, norm=compiled_norm, activation=compiled_activation,
                   rope_and_cache=fused_rope_and_cache)


OPS["fusions"] = fusion_ops
