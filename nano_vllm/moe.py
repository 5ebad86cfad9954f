"""A hundred small networks where there was one, and each token goes through eight of them."""

# %%
from functools import partial
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from nano_vllm.layers import Linear, Ops, TensorParallelGroup, WeightShard, empty, shard
from nano_vllm.model import ARCHITECTURES, ModelConfig, qwen3

# %%
def route(scores: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    "(experts, their weights), both (N, top_k), from a router's scores (N, experts)."
    weights, experts = scores.softmax(-1, dtype=torch.float32).topk(top_k)
    if normalise: weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights.to(scores.dtype)

# %%
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row of `x` (M, in) times the matrix of its group in `weight` (G, out, in).

    Rows are sorted by group; those of group `g` end before `ends[g]` (G,) int32."""
    if x.is_cuda and x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0:
        return F.grouped_mm(x, weight.mT, offs=ends)
    groups = x.tensor_split(ends[:-1].tolist())
    used = ((rows, w) for rows, w in zip(groups, weight) if len(rows))
    return torch.cat([F.linear(rows, w) for rows, w in used])

# %%
class Experts(nn.Module):
    "MLPs, stacked; of each, this rank's part of the intermediate rows."
    def __init__(self, hidden: int, intermediate: int, num_experts: int,
                 group: TensorParallelGroup, ops: Ops = Ops()):
        super().__init__()
        self.rows, self.ops = shard(intermediate, group), ops
        self.gate_up_proj = empty(num_experts, 2*self.rows.length, hidden)
        self.down_proj = empty(num_experts, hidden, self.rows.length)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        "For tokens x (N, hidden), the weighted sum of their experts' outputs."
        expert, order = experts.flatten().sort(stable=True)
        numbers = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        rows = x[order // experts.shape[1]]
        rows = self.ops.activation(grouped_linear(rows, self.gate_up_proj, ends))
        rows = grouped_linear(rows, self.down_proj, ends)
        chosen = torch.empty_like(rows).index_copy_(0, order, rows)
        return (weights[:, None] @ chosen.view(*experts.shape, -1)).squeeze(1)

    def weight_shards(self, name: str) -> dict[str, WeightShard]:
        "Those of each expert `e`: `name.e.gate_proj.weight`, `up_proj`, `down_proj`."
        shards, hidden, total = {}, self.down_proj.shape[1], self.rows.total
        rows, columns = (self.rows.slice,), (slice(None), self.rows.slice)
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj)):
            gate, up = gate_up.chunk(2)
            for part, view in (("gate_proj", gate), ("up_proj", up)):
                shards[f"{name}.{e}.{part}.weight"] = WeightShard(
                    view, (total, hidden), rows)
            shards[f"{name}.{e}.down_proj.weight"] = WeightShard(
                down, (hidden, total), columns)
        return shards

# %%
class MoE(nn.Module):
    "A router and its experts; (N, hidden) to (N, hidden), like the dense MLP."
    def __init__(self, c: ModelConfig, group: TensorParallelGroup, ops: Ops = Ops(), *,
                 num_experts: int, top_k: int, intermediate_size: int, normalise: bool):
        super().__init__()
        self.gate = Linear(c.hidden_size, num_experts, ops=ops)
        self.experts = Experts(c.hidden_size, intermediate_size, num_experts, group,
                               ops)
        self.group, self.top_k, self.normalise = group, top_k, normalise

    def forward(self, x):
        experts, weights = route(self.gate(x), self.top_k, self.normalise)
        return self.group.all_reduce(self.experts(x, experts, weights))

# %%
def qwen3_moe(hf) -> dict:
    "Qwen3, with a mixture of experts in every layer; ValueError for other layouts."
    for name, supported in dict(decoder_sparse_step=1, mlp_only_layers=[]).items():
        if (value := getattr(hf, name)) != supported:
            raise ValueError(f"{name} is {value!r}, supported: {supported!r}")
    num_experts, top_k = hf.num_experts, hf.num_experts_per_tok
    if (width := hf.moe_intermediate_size) < 1:
        raise ValueError(f"moe_intermediate_size is {width}, supported: from 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"num_experts_per_tok is {top_k}, supported: 1 to "
                         f"num_experts, {num_experts}")
    mlp = partial(MoE, num_experts=num_experts, top_k=top_k, intermediate_size=width,
                  normalise=hf.norm_topk_prob)
    return qwen3(hf) | dict(mlp=mlp)


ARCHITECTURES["Qwen3MoeForCausalLM"] = qwen3_moe
