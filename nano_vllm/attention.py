"""One function over any mixture of prompts, chunks and single tokens, with keys and values scattered over blocks."""

# %%
import functools
import logging
from dataclasses import dataclass, replace
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from nano_vllm.kv_blocks import ScheduledSequence
from nano_vllm.sampler import to_device

# %%
@dataclass
class Batch:
    "One step's work: `N` query tokens of `S` sequences, flat, in order."
    token_ids: Tensor         # (N,) int64
    positions: Tensor         # (N,) int64: index of each token in its text
    slot_mapping: Tensor      # (N,) int64: where its key and value go in the cache
    block_tables: Tensor      # (S, width) int64; past a text's blocks: any valid number
    query_lens: np.ndarray    # (S,) int64, on the host: numbers that sum to N
    context_lens: np.ndarray  # (S,) int64, on the host: query tokens included
    logits_indices: Tensor    # (R,) int64: the tokens whose logits are sampled from
    prompt_indices: Tensor    # (P,) int64: the tokens whose logits rate the prompt

    def to(self, device) -> "Batch":
        "The same batch with its tensors on `device`."
        tensors = {name: to_device(value, device) for name, value in vars(self).items()
                   if isinstance(value, Tensor)}
        return replace(self, **tensors)

# %%
def prompt_positions(scheduled: ScheduledSequence) -> range:
    "The positions in `scheduled` whose logits rate the prompt token that follows."
    seq = scheduled.seq
    if seq.params.prompt_logprobs is None: return range(0)
    last = len(seq.prompt_token_ids) - 1   # what follows it is an output token
    return range(scheduled.start, min(scheduled.end, last))

# %%
def make_batch(scheduled: list[ScheduledSequence], block_size: int) -> Batch:
    "Lay the tokens of one step out flat; each sequence has blocks for all of them."
    token_ids, positions, slots, logits, prompt = [], [], [], [], []
    for s in scheduled:
        first, table = len(token_ids), s.seq.block_table
        token_ids += s.seq.tokens(s.start, s.end)
        positions += range(s.start, s.end)
        slots += [table[p // block_size] * block_size + p % block_size
                  for p in range(s.start, s.end)]
        if s.samples: logits.append(len(token_ids) - 1)
        prompt += [first + p - s.start for p in prompt_positions(s)]
    width = max(len(s.seq.block_table) for s in scheduled)
    tables = [s.seq.block_table + [0] * (width - len(s.seq.block_table))
              for s in scheduled]
    lens = [(s.num_tokens, s.end) for s in scheduled]
    query_lens, context_lens = np.array(lens, dtype=np.int64).T
    tensors = [torch.tensor(numbers, dtype=torch.int64)
               for numbers in (token_ids, positions, slots, tables, logits, prompt)]
    return Batch(*tensors[:4], query_lens, context_lens, *tensors[4:])

# %%
def slots_of(kv_cache: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    "Views of one layer's keys and values: (num_blocks*block_size, kv_heads, head_dim)."
    keys, values = kv_cache[layer].flatten(1, 2)
    return keys, values


def store_kv(kv_cache: Tensor, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor):
    "Write keys and values `k`, `v` (N, kv_heads, head_dim) of a step into their slots."
    for cache, x in zip(slots_of(kv_cache, layer), (k, v)):
        cache.index_copy_(0, slot_mapping, x.to(cache.dtype))

# %%
def window_len(length, window: int | None):
    """How many keys the last of `length` tokens sees, itself included.

    `length`: a number or a NumPy array of them; `window`: None sees all."""
    return length if window is None else np.minimum(length, window)

# %%
class AttentionBackend:
    """What attends for one step: made for its batch, then asked layer by layer.

    kv_cache (layers, 2, num_blocks, block_size, kv_heads, head_dim); a query token sees
    the last `window` tokens of its text up to itself (None: all)."""
    def __init__(self, batch: Batch, kv_cache: Tensor, scale: float,
                 window: int | None = None):
        self.batch, self.kv_cache = batch, kv_cache
        self.scale, self.window = scale, window

    @classmethod
    def check(cls, device_type: str, block_size: int):
        "ValueError if this backend cannot run so; unless overridden, it always can."

    @property
    def slot_mapping(self) -> Tensor: return self.batch.slot_mapping

    def store(self, k: Tensor, v: Tensor, layer: int):
        "Write `k`, `v` (N, kv_heads, head_dim) into the slots of the batch."
        store_kv(self.kv_cache, layer, k, v, self.slot_mapping)

    def __call__(self, q: Tensor, layer: int) -> Tensor:
        "Attend from `q` (N, heads, head_dim) to the cache of `layer`; q's shape."
        raise NotImplementedError

# %%
class ReferenceAttention(AttentionBackend):
    "Attention token by token and head by head, as the formula says: the oracle."
    def __call__(self, q: Tensor, layer: int) -> Tensor:
        "Attend from `q` (N, heads, head_dim) to the cache of `layer`; q's shape."
        keys, values = slots_of(self.kv_cache, layer)
        queries_per_kv = q.shape[1] // keys.shape[1]
        out = torch.empty_like(q)
        for token, past in enumerate(self.visible_slots()):
            for head in range(q.shape[1]):
                kv_head = head // queries_per_kv
                k = keys[past, kv_head].to(q.dtype)
                v = values[past, kv_head].to(q.dtype)
                scores = k @ q[token, head] * self.scale
                out[token, head] = scores.softmax(0) @ v
        return out

    def visible_slots(self):
        "For each query token, in order, the slots of the tokens that it sees."
        b, size = self.batch, self.kv_cache.shape[3]
        for table, new, context in zip(b.block_tables, b.query_lens, b.context_lens):
            slots = [int(table[p // size]) * size + p % size for p in range(context)]
            for length in range(context - new + 1, context + 1):
                yield slots[length - window_len(length, self.window):length]

# %%
def slot_table(tables: Tensor, lens: Tensor, block_size: int, length: int,
               start: Tensor | int = 0) -> Tensor:
    "Slots (S, length) of positions from `start` on; past a text's end, its last slot."
    within = torch.arange(block_size, device=tables.device)
    slots = (tables[:, :, None] * block_size + within).flatten(1)   # of all positions
    positions = torch.arange(length, device=tables.device) + start
    return slots.gather(1, positions.minimum(lens[:, None] - 1))

# %%
def length_groups(lens: np.ndarray) -> list[np.ndarray]:
    "Indices of `lens` (S,) in groups in which no length is more than twice another."
    order = np.argsort(lens, kind="stable")
    ascending, groups, start = lens[order], [], 0
    while start < len(order):
        end = np.searchsorted(ascending, 2 * ascending[start], side="right")
        groups.append(order[start:end])
        start = end
    return groups

# %%
class DecodeGroup:
    "Sequences with one query token each: a padded gather, then packed attention."
    def __init__(self, batch: Batch, rows: np.ndarray, tokens: np.ndarray,
                 block_size: int, window: int | None = None):
        context_lens = batch.context_lens[rows]
        seen = window_len(context_lens, window)
        numbers = torch.from_numpy(np.stack([rows, tokens, context_lens, seen]))
        device, longest = batch.block_tables.device, int(seen.max())
        rows, self.tokens, lens, seen = to_device(numbers, device)
        start = (lens - seen)[:, None]
        self.slots = slot_table(batch.block_tables[rows], lens, block_size, longest,
                                start)
        mask = torch.arange(longest, device=device) < seen[:, None]
        self.mask = mask[:, None, None]   # the same for all heads and the one query

    def gather(self, cache: Tensor) -> Tensor:
        "(slots, kv_heads, head_dim) to (sequences, kv_heads, length, head_dim)."
        x = cache.index_select(0, self.slots.flatten())
        return x.view(*self.slots.shape, *cache.shape[1:]).transpose(1, 2)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float,
               out: Tensor):
        "Write the outputs of these sequences' tokens to their rows of `out`."
        num_seqs, head_dim = len(self.tokens), q.shape[2]
        packed = q[self.tokens].view(num_seqs, keys.shape[1], -1, head_dim)
        k, v = self.gather(keys).to(q.dtype), self.gather(values).to(q.dtype)
        o = sdpa(packed, k, v, self.mask, scale=scale)
        out[self.tokens] = o.reshape(num_seqs, -1, head_dim)

# %%
def visible(query_positions: Tensor, key_positions: Tensor,
            window: int | None) -> Tensor:
    "Which keys a query sees, (queries, keys) bool: none after it, and its window's."
    query, key = query_positions[:, None], key_positions[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)

# %%
class ChunkPlan:
    "One sequence with several query tokens: a gather, then causal attention."
    def __init__(self, batch: Batch, row: int, first_token: int, block_size: int,
                 window: int | None = None):
        num_new, context = int(batch.query_lens[row]), int(batch.context_lens[row])
        start = context - num_new                       # position of its first query
        first_key = int(start + 1 - window_len(start + 1, window))
        positions = torch.arange(first_key, context, device=batch.block_tables.device)
        blocks = batch.block_tables[row][positions // block_size]
        self.tokens = slice(first_token, first_token + num_new)
        self.slots = blocks * block_size + positions % block_size
        # the plain triangle needs no mask, and has a faster kernel
        self.is_causal = start == 0 and (window is None or context <= window)
        self.mask = None if self.is_causal else visible(positions[-num_new:],
                                                        positions, window)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scale: float,
               out: Tensor):
        "Write the outputs of this sequence's tokens to their rows of `out`."
        k, v = keys.index_select(0, self.slots), values.index_select(0, self.slots)
        qkv = (x.transpose(0, 1)[None].to(q.dtype) for x in (q[self.tokens], k, v))
        o = sdpa(*qkv, self.mask, is_causal=self.is_causal, scale=scale,
                 enable_gqa=True)
        out[self.tokens] = o[0].transpose(0, 1)

# %%
class TorchAttention(AttentionBackend):
    "Paged attention in plain PyTorch, for any device: gather, then fused attention."
    max_decode_query_len = 1   # sequences with more query tokens are chunks

    def __init__(self, batch: Batch, kv_cache: Tensor, scale: float,
                 window: int | None = None):
        super().__init__(batch, kv_cache, scale, window)
        self.block_size = kv_cache.shape[3]
        # (S,): the index of each sequence's first query token
        self.query_starts = np.cumsum(batch.query_lens) - batch.query_lens
        is_decode = batch.query_lens <= self.max_decode_query_len
        self.parts = self.decode_parts(np.flatnonzero(is_decode))
        self.parts += [self.chunk_part(int(row)) for row in np.flatnonzero(~is_decode)]

    def decode_parts(self, rows: np.ndarray) -> list:
        "What attends for the sequences `rows`: decodes, grouped by what they see."
        seen = window_len(self.batch.context_lens[rows], self.window)
        groups = [rows[indices] for indices in length_groups(seen)]
        return [DecodeGroup(self.batch, group, self.query_starts[group],
                            self.block_size, self.window) for group in groups]

    def chunk_part(self, row: int) -> ChunkPlan:
        "What attends for the sequence `row`, a chunk."
        return ChunkPlan(self.batch, row, int(self.query_starts[row]), self.block_size,
                         self.window)

    def __call__(self, q: Tensor, layer: int) -> Tensor:
        "Attend from `q` (N, heads, head_dim) to the cache of `layer`; q's shape."
        keys, values = slots_of(self.kv_cache, layer)
        out = torch.empty_like(q)
        for part in self.parts: part.attend(q, keys, values, self.scale, out)
        return out

# %%
# Names that a user may ask for; later chapters add theirs.
BACKENDS: dict[str, type] = {"reference": ReferenceAttention, "torch": TorchAttention}

# %%
@functools.cache
def log_once(message: str):
    "Log `message`, the first time in this process."
    logging.getLogger("nano_vllm").info(message)

# %%
def attention_backend(name: str, device_type: str = "cpu",
                      block_size: int = 16) -> type:
    "The backend called `name`; ValueError if there is none, or it cannot run so."
    if name not in list(BACKENDS):   # a list: `name` may be anything, even a dict
        raise ValueError(f"attention_backend is {name!r}, must be one of "
                         f"{['auto', *BACKENDS]}")
    backend = BACKENDS[name]
    backend.check(device_type, block_size)
    return backend
