"""One decoder for four families: what sets them apart fits into a few switches."""

# %%
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
import torch
from torch import Tensor, nn
from nano_vllm.attention import visible
from nano_vllm.layers import (ColumnParallelLinear, Linear, Ops, RMSNorm, Rotary,
                     RowParallelLinear, ShardRange, TensorParallelGroup,
                     VocabParallelEmbedding, WeightShard, rope_frequencies, shard,
                     whole_shards)

# %%
def read_json(file: Path) -> dict:
    "The JSON object in `file`, or ValueError with its name."
    try: data = json.loads(file.read_text())
    except (OSError, ValueError) as e: raise ValueError(f"{file}: {e}") from e
    if isinstance(data, dict): return data
    raise ValueError(f"{file}: expected an object, found a {type(data).__name__}")

# %%
def llama(hf) -> dict:
    return dict(qkv_bias=hf.attention_bias, o_bias=hf.attention_bias,
                mlp_bias=hf.mlp_bias)


def mistral(hf) -> dict: return dict(sliding_window=hf.sliding_window)


def qwen2(hf) -> dict: return dict(qkv_bias=True)


def qwen3(hf) -> dict:
    return dict(qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, qk_norm=True)


# Architecture -> what it sets of a ModelConfig, by transformers' config.
ARCHITECTURES = dict(LlamaForCausalLM=llama, MistralForCausalLM=mistral,
                     Qwen2ForCausalLM=qwen2, Qwen3ForCausalLM=qwen3)

# %%
def read_hf_config(path: Path):
    "(architecture, transformers' config) of a model folder."
    names = read_json(path/"config.json").get("architectures")
    known = ARCHITECTURES if isinstance(names, list) else ()
    name = next((n for n in known if n in names), None)
    if name is None:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"architectures is {names}, supported: {supported}")
    from transformers import AutoConfig
    try: return name, AutoConfig.from_pretrained(path)
    except Exception as e: raise ValueError(f"{path/'config.json'}: {e}") from e

# %%
def read_eos_ids(path: Path) -> set[int]:
    "Every token id that a model folder's configs name as an end of the text."
    files = [path/"config.json", path/"generation_config.json"]
    found = [read_json(f).get("eos_token_id") for f in files if f.exists()]
    lists = [ids if isinstance(ids, list) else [ids] for ids in found]
    return set(sum(lists, [])) - {None}

# %%
def rope_settings(hf, head_dim: int) -> tuple[dict, int]:
    "(rotary settings, longest sequence), as transformers 4 or 5 spells them."
    given = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None)
    given = given or {}
    rope = dict(rope_theta=getattr(hf, "rope_theta", 10000.0),
                rope_type=given.get("type", "default"),
                original_max_position_embeddings=hf.max_position_embeddings) | given
    rope_frequencies(head_dim, rope)  # refuses what it cannot compute
    trained = rope["original_max_position_embeddings"]
    scaled = trained * rope["factor"] if rope["rope_type"] in ("linear", "yarn") else 0
    return rope, max(hf.max_position_embeddings, int(scaled))

# %%
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


def refuse_unsupported(hf):
    "ValueError for a setting that this decoder would silently get wrong."
    for name in SIZES:
        if not isinstance(size := getattr(hf, name), int) or size < 1:
            raise ValueError(f"{name} is {size!r}, supported: whole numbers from 1")
    only = dict(hidden_act="silu", use_sliding_window=False, quantization_config=None)
    for name, supported in only.items():
        value = getattr(hf, name, supported)
        if value != supported:
            raise ValueError(f"{name} is {value!r}, supported: {supported!r}")
    window = getattr(hf, "sliding_window", None)
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"sliding_window is {window!r}, supported: None or from 1")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise ValueError(f"num_attention_heads is {hf.num_attention_heads}, supported: "
                         f"multiples of num_key_value_heads, {hf.num_key_value_heads}")

# %%
@dataclass
class ModelConfig:
    "What the engine needs to know about a model besides its weights."
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict            # rope_type, rope_theta and what the type needs
    max_position: int     # the longest sequence the model is made for
    tied: bool = False    # the embedding is the output layer, too
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mlp: Callable | None = None         # makes a layer's MLP, if not the class `MLP`
    sliding_window: int | None = None   # how many tokens one sees, itself included
    dtype: torch.dtype = torch.float32  # of the weights in the checkpoint
    eos_token_ids: set = field(default_factory=set)  # each of them ends an answer

    @classmethod
    def from_folder(cls, path) -> "ModelConfig":
        "From `config.json` and `generation_config.json`; ValueError if not supported."
        name, hf = read_hf_config(Path(path))
        refuse_unsupported(hf)
        heads = hf.num_attention_heads
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
        rope, longest = rope_settings(hf, head_dim)
        return cls(hf.vocab_size, hf.hidden_size, hf.intermediate_size,
                   hf.num_hidden_layers, heads, hf.num_key_value_heads, head_dim,
                   hf.rms_norm_eps, rope, longest, hf.tie_word_embeddings,
                   dtype=hf.dtype or torch.float32,
                   eos_token_ids=read_eos_ids(Path(path)), **ARCHITECTURES[name](hf))

# %%
def shard_heads(c: ModelConfig,
                group: TensorParallelGroup) -> tuple[ShardRange, ShardRange]:
    "This rank's query heads and KV heads; ValueError if they cannot be shared so."
    heads, kv, queries_per_kv = c.num_heads, c.num_kv_heads, c.num_heads//c.num_kv_heads
    if group.size <= kv:
        kv_heads = shard(kv, group)
        return kv_heads.times(queries_per_kv), kv_heads
    copies = group.size // kv   # ranks that hold the same KV head
    if group.size % kv or copies > queries_per_kv:
        raise ValueError(f"tensor_parallel_size is {group.size}, supported for {heads} "
                         f"heads with {kv} KV heads: up to {kv}, and multiples of {kv} "
                         f"up to {heads}")
    kv_head, copy = group.rank // copies, group.rank % copies
    part = shard(queries_per_kv, TensorParallelGroup(copy, copies))
    first = kv_head * queries_per_kv + part.start
    return ShardRange(first, part.length, heads), ShardRange(kv_head, 1, kv)

# %%
class Attention(nn.Module):
    "Projections and rotation around attention; `c.qk_norm` adds norms on q and k."
    def __init__(self, c: ModelConfig, group: TensorParallelGroup, layer: int,
                 ops: Ops = Ops()):
        super().__init__()
        q_heads, kv_heads = shard_heads(c, group)
        q, kv = q_heads.times(c.head_dim), kv_heads.times(c.head_dim)
        parts = dict(q_proj=q, k_proj=kv, v_proj=kv)
        self.qkv_proj = ColumnParallelLinear(c.hidden_size, parts, c.qkv_bias, ops)
        self.o_proj = RowParallelLinear(q, c.hidden_size, group, c.o_bias, ops)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, ops) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, ops) if c.qk_norm else None
        self.head_dim, self.layer, self.ops = c.head_dim, layer, ops

    def split_heads(self, qkv: Tensor) -> list[Tensor]:
        "`qkv` (N, all heads * head_dim) as q, k and v (N, heads, head_dim)."
        return [part.unflatten(-1, (-1, self.head_dim))
                for part in self.qkv_proj.split(qkv)]

    def forward(self, x, cos, sin, attention):
        q = self.ops.rope_and_cache(self, self.qkv_proj(x), cos, sin, attention)
        return self.o_proj(attention(q, self.layer).flatten(1))

# %%
class MLP(nn.Module):
    "(N, hidden) to gate and up, their activation, and back to (N, hidden)."
    def __init__(self, c: ModelConfig, group: TensorParallelGroup, ops: Ops = Ops()):
        super().__init__()
        part = shard(c.intermediate_size, group)
        parts = dict(gate_proj=part, up_proj=part)
        self.gate_up_proj = ColumnParallelLinear(c.hidden_size, parts, c.mlp_bias, ops)
        self.down_proj = RowParallelLinear(part, c.hidden_size, group, c.mlp_bias, ops)
        self.ops = ops

    def forward(self, x):
        limit = self.ops.max_mlp_tokens
        if limit is None or len(x) <= limit: return self.compute(x)
        return torch.cat([self.compute(piece) for piece in x.split(limit)])

    def compute(self, x):
        "What `forward` gives, all tokens at once."
        return self.down_proj(self.ops.activation(self.gate_up_proj(x)))

# %%
class DecoderLayer(nn.Module):
    """Attention, then an MLP, each behind a norm.

    From (hidden_states, residual), both (N, hidden), to the next; what the layers below
    have made of the text is their sum."""
    def __init__(self, c: ModelConfig, group: TensorParallelGroup, layer: int,
                 ops: Ops = Ops()):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, ops)
        self.self_attn = Attention(c, group, layer, ops)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, ops)
        make_mlp = c.mlp or MLP
        self.mlp = make_mlp(c, group, ops)

    def forward(self, hidden_states, residual, cos, sin, attention):
        x, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(x, cos, sin, attention)
        x, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(x), residual

# %%
class Decoder(nn.Module):
    "A decoder of the Llama kind, or a rank's part of it; its parameters lack values."
    def __init__(self, config: ModelConfig,
                 group: TensorParallelGroup = TensorParallelGroup(), ops: Ops = Ops()):
        super().__init__()
        c = self.config = config
        self.ops = ops
        # what this rank's KV cache is sized by
        self.kv_config = replace(c, num_kv_heads=shard_heads(c, group)[1].length)
        vocabulary = c.vocab_size, c.hidden_size, group, ops
        layers = [DecoderLayer(c, group, i, ops) for i in range(c.num_layers)]
        self.model = nn.ModuleDict(dict(
            embed_tokens=VocabParallelEmbedding(*vocabulary),
            layers=nn.ModuleList(layers),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps, ops)))
        self.lm_head = None if c.tied else VocabParallelEmbedding(*vocabulary)
        self.rotary = Rotary(c.head_dim, c.rope, c.max_position)

    def forward(self, token_ids, positions, attention):
        """Hidden states (N, hidden) of tokens (N,) at positions (N,).

        `attention` stores each layer's keys and values, and mixes its queries with
        those that came before: `store(k, v, layer)`, then `attention(q, layer)`."""
        residual = self.model.embed_tokens(token_ids)
        hidden_states = torch.zeros_like(residual)
        cos, sin = self.rotary(positions)
        hidden_states, residual = self.ops.run_layers(
            self.model.layers, hidden_states, residual, cos, sin, attention)
        return self.model.norm(hidden_states, residual)[0]

    @property
    def head(self) -> VocabParallelEmbedding:
        "What gives the logits: a matrix of its own, or the embedding's."
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def compute_logits(self, hidden):
        "Logits (R, vocab_size) of hidden states (R, hidden), complete on rank 0."
        return self.head.logits(hidden)

    def pack(self):
        "Hand the loaded weights of all products to `ops.linear`, if there is one."
        for module in self.modules():
            if isinstance(module, Linear): module.pack()
        self.head.pack(keep_weight=self.config.tied)

# %%
class PlainAttention:
    "Causal attention over one whole text, from its first token on, without a cache."
    def __init__(self, scale: float, window: int | None = None):
        self.scale, self.window = scale, window

    def store(self, k, v, layer):
        "Keep `k` and `v` (N, kv_heads, head_dim) for the layer's call that follows."
        self.k, self.v = k, v

    def __call__(self, q, layer):
        "Attend from `q` (N, heads, head_dim), by the textbook's formula; q's shape."
        queries_per_kv = q.shape[1] // self.k.shape[1]
        k, v = (x.repeat_interleave(queries_per_kv, dim=1) for x in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        positions = torch.arange(len(q), device=q.device)
        mask = visible(positions, positions, self.window)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

# %%
def weight_shards(model: nn.Module) -> dict[str, WeightShard]:
    "Checkpoint name -> the part of a parameter of `model` that holds this tensor."
    shards = {}
    for name, module in model.named_modules():
        cut = getattr(module, "weight_shards", None)
        shards |= cut(name) if cut else whole_shards(module, name)
    return shards
