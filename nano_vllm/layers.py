"""Norm, rotation, activation, and matrices that several devices share: the parts every decoder is made of."""

# %%
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from nano_vllm.attention import TorchAttention, attention_backend, log_once
from nano_vllm.sampler import sample

# %%
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None):
    """Rows scaled to mean square 1, times `weight` (dim,) (Zhang and Sennrich 2019).

    Of `x` (..., dim), or with a residual `(norm of x + residual, x + residual)`.
    Float32 inside, dtype of `x` outside; writes to no input."""
    if residual is not None: x = x + residual
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = weight * y.to(x.dtype)
    return y if residual is None else (y, x)

# %%
def silu_and_mul(x: Tensor) -> Tensor:
    "`silu(gate) * up` of `x` (..., 2*d), gate and up side by side (Shazeer 2020)."
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up

# %%
def default_rope(freq, rope):
    "The frequencies as they are."
    return freq, 1.0


def linear_rope(freq, rope):
    "All of them lower by the same factor."
    return freq / rope["factor"], 1.0


def llama3_rope(freq, rope):
    "Blend by how many turns a pair completes within the original length (Llama 3.1)."
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * freq / (2*math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep*freq + (1 - keep)*freq/rope["factor"], 1.0

# %%
def yarn_attention_factor(rope: dict) -> float:
    "What yarn multiplies cos and sin by."
    if rope.get("attention_factor") is not None: return rope["attention_factor"]
    def mscale(m): return 0.1*m*math.log(max(rope["factor"], 1)) + 1
    m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return mscale(m) / mscale(m_all) if m and m_all else mscale(1)


def yarn_rope(freq, rope):
    "Blend linearly between two pairs (Peng et al. 2023)."
    half, base = len(freq), math.log(rope["rope_theta"])
    radians = rope["original_max_position_embeddings"] / (2*math.pi)
    low, high = (half * math.log(radians/turns) / base
                 for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1))
    if rope.get("truncate", True): low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2*half - 1)
    if low == high: high += 0.001
    divide = ((torch.arange(half, device=freq.device) - low) / (high - low)).clamp(0, 1)
    return (1 - divide)*freq + divide*freq/rope["factor"], yarn_attention_factor(rope)

# %%
ROPE_TYPES = dict(default=default_rope, linear=linear_rope, llama3=llama3_rope,
                  yarn=yarn_rope)


def rope_frequencies(head_dim: int, rope: dict) -> tuple[Tensor, float]:
    "(radians a token of each of the head_dim/2 pairs, factor on cos and sin), float32."
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}, supported: {', '.join(ROPE_TYPES)}")
    if head_dim % 2: raise ValueError(f"head_dim is {head_dim}, supported: even ones")
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor is {part}, supported: 1.0")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    try: return ROPE_TYPES[kind](1.0 / rope["rope_theta"]**pairs, rope)
    except KeyError as e: raise ValueError(f"rope_type {kind!r} needs field {e}") from e

# %%
class Rotary(nn.Module):
    "Tables of cos and sin, float32 (max_position, head_dim/2) (Su et al. 2021)."
    def __init__(self, head_dim: int, rope: dict, max_position: int):
        super().__init__()
        freq, factor = rope_frequencies(head_dim, rope)
        positions = torch.arange(max_position, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, freq)
        self.register_buffer("cos", angles.cos() * factor, persistent=False)
        self.register_buffer("sin", angles.sin() * factor, persistent=False)

    def forward(self, positions):
        "For positions (N,): (cos, cos) and (-sin, sin), both (N, 1, head_dim)."
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

# %%
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim/2) of `x` (N, heads, head_dim); float32 inside.

    cos and sin (N, 1, head_dim) as `Rotary` gives them."""
    left, right = x.chunk(2, dim=-1)
    swapped = torch.cat((right, left), dim=-1)
    return (x*cos + swapped*sin).to(x.dtype)

# %%
def qk_norm_rope(attention_layer, qkv: Tensor, cos: Tensor, sin: Tensor):
    """q, k and v (N, heads, head_dim) of an attention layer's `qkv` (N, outputs).

    q and k are rotated, and before that normed, if the layer has norms for them."""
    q, k, v = attention_layer.split_heads(qkv)
    if attention_layer.q_norm is not None:
        q, k = attention_layer.q_norm(q), attention_layer.k_norm(k)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rope_and_cache(attention_layer, qkv: Tensor, cos: Tensor, sin: Tensor,
                   attention) -> Tensor:
    "q (N, heads, head_dim) of `qkv`, ready to attend; k and v are in the cache then."
    q, k, v = qk_norm_rope(attention_layer, qkv, cos, sin)
    attention.store(k, v, attention_layer.layer)
    return q

# %%
def run_layers(layers, hidden_states: Tensor, residual: Tensor, cos: Tensor,
               sin: Tensor, attention) -> tuple[Tensor, Tensor]:
    "What `layers` make of hidden_states and residual, both (N, hidden), one by one."
    for layer in layers:
        hidden_states, residual = layer(hidden_states, residual, cos, sin, attention)
    return hidden_states, residual

# %%
@dataclass(frozen=True)
class Ops:
    """How a model computes: chosen once, and handed to its modules when they are built.

    linear(weight (out, in)) -> product, with product(x (..., in), bias) -> (..., out);
        None: F.linear with the weight as it is.
    norm(x, weight, eps, residual=None): what `rms_norm` gives.
    activation(x (..., 2*d)) -> (..., d): what `silu_and_mul` gives.
    rope_and_cache(attention_layer, qkv, cos, sin, attention) -> q: as `rope_and_cache`.
    run_layers(layers, hidden_states, residual, cos, sin, attention): as `run_layers`;
        it may write to hidden_states and residual.
    attention: the class of the attention backend. A user may ask for another one, so
        rope_and_cache and run_layers must do with any.
    sample(logits (R, V), metadata) -> ids (R,): what `sampler.sample` gives.
    max_mlp_tokens: an MLP takes more tokens than that in pieces; None: never."""
    linear: Callable | None = None
    norm: Callable = rms_norm
    activation: Callable = silu_and_mul
    rope_and_cache: Callable = rope_and_cache
    run_layers: Callable = run_layers
    attention: type = TorchAttention
    sample: Callable = sample
    max_mlp_tokens: int | None = None

# %%
def empty(*shape) -> nn.Parameter:
    "A parameter of `shape` without values yet: the loader fills it."
    return nn.Parameter(torch.empty(*shape), requires_grad=False)

# %%
class RMSNorm(nn.Module):
    "`ops.norm` with a `weight` (dim,): of `x`, or of `x` and a residual."
    def __init__(self, dim: int, eps: float = 1e-6, ops: Ops = Ops()):
        super().__init__()
        self.weight, self.eps, self.ops = empty(dim), eps, ops

    def forward(self, x, residual=None):
        return self.ops.norm(x, self.weight, self.eps, residual)

# %%
class Linear(nn.Module):
    "`y = x @ weight.T + bias`: (..., in_features) to (..., out_features)."
    def __init__(self, in_features: int, out_features: int, bias: bool = False,
                 ops: Ops = Ops()):
        super().__init__()
        self.weight, self.ops = empty(out_features, in_features), ops
        self.bias = empty(out_features) if bias else None
        self.product = None   # what multiplies instead of `weight`, once packed

    def multiply(self, x, bias=None):
        "`x` times the weight, plus `bias`."
        if self.product is None: return F.linear(x, self.weight, bias)
        return self.product(x, bias)

    def forward(self, x): return self.multiply(x, self.bias)

    def pack(self):
        "Hand the loaded weight to `ops.linear`, if there is one; it is gone then."
        if self.ops.linear is None: return
        self.product, self.weight = self.ops.linear(self.weight), None

# %%
class TensorParallelGroup:
    "The group of processes that compute one model; this one is `rank` of `size`."
    shares_script = False   # whether the others run the user's script as well

    def __init__(self, rank: int = 0, size: int = 1): self.rank, self.size = rank, size

    def all_reduce(self, x):
        "The sum of the ranks' `x`, on all of them; `x` is used up."
        return x

    def gather(self, x):
        "On rank 0 the ranks' `x` side by side along the last dimension."
        return x

    def minimum(self, n: int) -> int:
        "The least `n` of all ranks."
        return n

    def broadcast(self, message):
        "From rank 0, any object to all others, which `receive` it."

    def receive(self) -> Any:
        "What rank 0 broadcasts, on another rank."
        raise NotImplementedError("a group of one has no rank that receives")

    def collective_guard(self):
        "A context in which all ranks take part."
        return nullcontext()

# %%
# "processes": a function that makes a group of several ranks; a later chapter adds it
LAUNCHERS: dict[str, Callable] = {}

# %%
class ShardRange(NamedTuple):
    "Of `total` items, the `length` from `start` on."
    start: int
    length: int
    total: int

    @property
    def slice(self) -> slice:
        "The range as an index."
        return slice(self.start, self.start + self.length)

    def times(self, n: int) -> "ShardRange":
        "The same range where each item stands for `n`."
        return ShardRange(self.start * n, self.length * n, self.total * n)

# %%
def shard(total: int, group: TensorParallelGroup) -> ShardRange:
    "This rank's part of `total` items; the parts differ by one at most."
    start = total * group.rank // group.size
    end = total * (group.rank + 1) // group.size
    return ShardRange(start, end - start, total)

# %%
class WeightShard(NamedTuple):
    "Part `index` of a checkpoint's tensor of shape `shape`, which goes to `parameter`."
    parameter: Tensor   # the parameter, or a view of a part of it
    shape: tuple[int, ...]
    index: tuple[slice, ...]

# %%
def whole_shards(module: nn.Module, name: str) -> dict[str, WeightShard]:
    "The shards of a module, called `name`, whose own parameters are not cut."
    return {f"{name}.{kind}": WeightShard(p, tuple(p.shape), (slice(None),) * p.dim())
            for kind, p in module.named_parameters(recurse=False)}

# %%
class ColumnParallelLinear(Linear):
    "Linear layers with a common input as one; of each, the outputs in `parts`."
    def __init__(self, in_features: int, parts: dict[str, ShardRange],
                 bias: bool = False, ops: Ops = Ops()):
        lengths = [part.length for part in parts.values()]
        super().__init__(in_features, sum(lengths), bias, ops)
        self.parts, self.lengths = parts, lengths

    def split(self, x, dim: int = -1):
        "The part of each: of outputs (..., outputs), or, with dim=0, of a parameter."
        return x.split(self.lengths, dim)

    def weight_shards(self, name: str) -> dict[str, WeightShard]:
        "If this layer is `a.b.merged`, its parts are `a.b.part.weight` (and `.bias`)."
        parent, shards = name.rpartition(".")[0], {}
        for kind, p in self.named_parameters():
            for (part, rows), view in zip(self.parts.items(), self.split(p, dim=0)):
                shape = rows.total, *p.shape[1:]
                shards[f"{parent}.{part}.{kind}"] = WeightShard(view, shape,
                                                                (rows.slice,))
        return shards

# %%
class RowParallelLinear(Linear):
    "A linear layer cut by inputs: each rank sees its `columns`, all get the sum."
    def __init__(self, columns: ShardRange, out_features: int,
                 group: TensorParallelGroup, bias: bool = False, ops: Ops = Ops()):
        super().__init__(columns.length, out_features, bias, ops)
        self.columns, self.group = columns, group

    def forward(self, x):
        if self.group.size == 1: return super().forward(x)
        y = self.group.all_reduce(self.multiply(x))
        return y if self.bias is None else y + self.bias

    def weight_shards(self, name: str) -> dict[str, WeightShard]:
        "The weight's columns of this rank, and the whole bias."
        shape = self.weight.shape[0], self.columns.total
        weight = WeightShard(self.weight, shape, (slice(None), self.columns.slice))
        return whole_shards(self, name) | {f"{name}.weight": weight}

# %%
class VocabParallelEmbedding(nn.Module):
    "Rows of `weight` (num_embeddings, dim) for token ids; logits by the same rows."
    def __init__(self, num_embeddings: int, dim: int, group: TensorParallelGroup,
                 ops: Ops = Ops()):
        super().__init__()
        num_rows = -(-num_embeddings // group.size)   # on each rank; the last are void
        start = min(num_rows * group.rank, num_embeddings)
        length = min(num_rows, num_embeddings - start)
        self.rows = ShardRange(start, length, num_embeddings)
        self.weight, self.group, self.ops = empty(num_rows, dim), group, ops
        self.product = None   # what `logits` multiplies by instead of `weight`

    def forward(self, token_ids):
        "Embeddings (..., dim) of `token_ids` (...), complete on all ranks."
        if self.group.size == 1: return F.embedding(token_ids, self.weight)
        local = token_ids - self.rows.start
        mine = (local >= 0) & (local < self.rows.length)
        x = F.embedding(local.where(mine, 0), self.weight)
        return self.group.all_reduce(x.where(mine[..., None], 0))

    def logits(self, hidden):
        "Logits (R, num_embeddings) of `hidden` (R, dim), complete on rank 0 only."
        if self.product is None: local = F.linear(hidden, self.weight)
        else: local = self.product(hidden, None)
        return self.group.gather(local)[..., :self.rows.total]

    def pack(self, keep_weight: bool):
        """Hand the loaded weight to `ops.linear`, if there is one, for the logits.

        `keep_weight`: whether it is still needed, for embeddings."""
        if self.ops.linear is None: return
        self.product = self.ops.linear(self.weight)
        if not keep_weight: self.weight = None

    def weight_shards(self, name: str) -> dict[str, WeightShard]:
        "The rows of this rank; void ones are never read."
        view, dim = self.weight[:self.rows.length], self.weight.shape[1]
        shape = self.rows.total, dim
        return {f"{name}.weight": WeightShard(view, shape, (self.rows.slice,))}

# %%
@dataclass(frozen=True)
class Target:
    "What a model is to run on, and how: by this, Ops are chosen."
    config: Any   # the ModelConfig
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    quantization: str | None = None
    compile: bool = False
    tensor_parallel_size: int = 1
    block_size: int = 16

    def __str__(self) -> str:
        return (f"device {self.device.type!r}, {self.dtype}, quantization "
                f"{self.quantization!r}, compile {self.compile}, tensor_parallel_size "
                f"{self.tensor_parallel_size}")

# %%
def torch_ops(target: Target) -> Ops | None:
    "Plain PyTorch: any device, neither quantization nor compile."
    if target.quantization is not None or target.compile: return None
    return Ops()

# %%
# Name -> a function that makes the Ops for a target, or gives None if they do not suit
# it; its docstring begins with what they suit. A later chapter adds a name, and no
# entry ever changes. Of those that suit, the last is taken.
OPS: dict[str, Callable[[Target], Ops | None]] = {"torch": torch_ops}

# %%
try: from nano_vllm.triton_attention import TritonAttention
except ModuleNotFoundError as e:
    if e.name != "triton": raise
    TritonAttention = None   # where Triton is not to be had, attention is PyTorch's


def triton_ops(target: Target) -> Ops | None:
    "Triton's attention: device 'cuda', neither quantization nor compile."
    ops = torch_ops(target)
    if ops is None or target.device.type != "cuda": return None
    return replace(ops, attention=TritonAttention)


if TritonAttention is not None: OPS["triton"] = triton_ops

# %%
QUANTIZATIONS = (None, "int8")


def last_that_suits(target: Target) -> tuple[str, Ops]:
    "(name, Ops) of the table's last entry that suits; ValueError if there is none."
    for name, build in reversed(OPS.items()):
        ops = build(target)
        if ops is not None: return name, ops
    if target.quantization is None:
        raise ValueError(f"compile is {target.compile}, which no ops suit on {target}")
    raise ValueError(f"quantization is {target.quantization!r}, supported on device "
                     f"'cpu'; no ops suit {target}")

# %%
def named_ops(name: str, target: Target) -> Ops:
    "The Ops called `name`; ValueError if there are none, or they do not suit."
    if name not in list(OPS):   # a list: `name` may be anything, even a dict
        raise ValueError(f"ops is {name!r}, must be one of {['auto', *OPS]}")
    ops = OPS[name](target)
    if ops is not None: return ops
    raise ValueError(f"ops is {name!r}, which does not suit {target}; it is: "
                     f"{what_it_suits(name)}")


def what_it_suits(name: str) -> str:
    "The first paragraph of the docstring of an entry, as one line."
    paragraph = (OPS[name].__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split())

# %%
def with_attention(ops: Ops, name: str, target: Target) -> Ops:
    "`ops` with the attention backend called `name` ('auto': as they are), checked."
    device_type, block_size = target.device.type, target.block_size
    if name != "auto":
        return replace(ops, attention=attention_backend(name, device_type, block_size))
    ops.attention.check(device_type, block_size)
    return ops

# %%
def choose_ops(target: Target, name: str = "auto",
               attention_backend: str = "auto") -> Ops:
    """The Ops called `name` ('auto': the last in the table that suit `target`).

    A named attention backend takes the place of theirs. ValueError names the setting
    that is unknown or does not suit."""
    if target.quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {list(QUANTIZATIONS)}, "
                         f"got {target.quantization!r}")
    if name == "auto": chosen, ops = last_that_suits(target)
    else: chosen, ops = name, named_ops(name, target)
    ops = with_attention(ops, attention_backend, target)
    reason = "the last that suit" if name == "auto" else "as asked for on"
    log_once(f"ops: {chosen} with {ops.attention.__name__}, {reason} {target}")
    return ops
