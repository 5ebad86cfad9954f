"Attention that reads the blocks where they lie: one launch for any mixture of prompts, chunks and decodes, on a GPU or in an interpreter."

# %%
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
import triton
import triton.language as tl
from nano_vllm.attention import BACKENDS, AttentionBackend, Batch
from nano_vllm.sampler import to_device

# %%
@triton.jit
def store_kv_kernel(k, v, keys, values, slot_mapping, num_slots,
                    k_token, k_head, k_dim, v_token, v_head, v_dim,
                    cache_block, cache_slot, cache_head, cache_dim,
                    SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                    WIDTH: tl.constexpr):
    "One program for each token: its keys and values of all heads go into its slot."
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if (slot >= 0) & (slot < num_slots):
        i = tl.arange(0, WIDTH)
        head = i // DIM
        dim = i % DIM
        there = i < HEADS * DIM
        key = tl.load(k + token*k_token + head*k_head + dim*k_dim, mask=there)
        value = tl.load(v + token*v_token + head*v_head + dim*v_dim, mask=there)
        place = slot // SIZE * cache_block + slot % SIZE * cache_slot
        place += head*cache_head + dim*cache_dim
        tl.store(keys + place, key, mask=there)
        tl.store(values + place, value, mask=there)

# %%
def store_kv(kv_cache: Tensor, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor):
    """Write `k`, `v` (N, kv_heads, head_dim) into the slots (N,) of a layer's cache.

    A slot outside the cache, such as -1, marks a padded row: nothing is written."""
    keys, values = kv_cache[layer]
    num_blocks, size, heads, dim = keys.shape
    store_kv_kernel[(len(slot_mapping),)](
        k, v, keys, values, slot_mapping, num_blocks*size, *k.stride(), *v.stride(),
        *keys.stride(), size, heads, dim, triton.next_power_of_2(heads*dim))

# %%
MIN_DOT = 16      # the least size that tl.dot takes in every version of Triton


@dataclass(frozen=True)
class Tiles:
    "The sizes that a kernel is compiled with: by model, the same for every batch."
    kv_heads: int
    group: int          # query heads that share a KV head
    dim: int            # head_dim
    split: int = 256    # keys that one program reads for a decode: a multiple of `keys`
    chunk: int = 64     # rows of a tile of several tokens, where a group needs no more
    itemsize: int = 2   # bytes of a number in the cache

    @property
    def width(self) -> int:
        "head_dim, rounded up to what the kernels compute with."
        return max(MIN_DOT, triton.next_power_of_2(self.dim))

    @property
    def keys(self) -> int:
        "Keys in a tile: as many as fit into 16 KiB, but at most 64."
        return max(MIN_DOT, min(64, 2**14 // (self.width * self.itemsize)))

    @property
    def decode_rows(self) -> int:
        "Rows of a tile of one token: a row for each query head of a group."
        return max(MIN_DOT, triton.next_power_of_2(self.group))

    @property
    def chunk_rows(self) -> int:
        "Rows of a tile of several tokens."
        return max(self.chunk, self.decode_rows)

    @property
    def chunk_tokens(self) -> int:
        "Tokens whose groups fit into a tile of several tokens."
        return self.chunk_rows // self.group

# %%
@triton.jit
def load(pointers, mask, MASKED: tl.constexpr):
    "Numbers, zero where `mask` is false; without MASKED it is not even looked at."
    if MASKED: x = tl.load(pointers, mask=mask, other=0.)
    else: x = tl.load(pointers)
    return x


@triton.jit
def dot(a, b, WIDEN: tl.constexpr):
    "fp32 `a @ b`. WIDEN: make the factors fp32 first, for the interpreter's sake."
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")

# %%
@triton.jit
def see_tile(q, best, mass, acc, first, low, high, positions, table, keys, values,
             cache_block, cache_slot, cache_dim, scale,
             WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
             D: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
             MASKED: tl.constexpr):
    """One step of online softmax, over the keys at positions first to first + TILE - 1.

    So far, for each row: `best` score, `mass` of all weights, `acc`, weighted sum."""
    at = first + tl.arange(0, TILE)
    dims = tl.arange(0, D)
    there = (at >= low) & (at < high)
    block = load(table + at // SIZE, there, MASKED).to(tl.int64)
    place = (block*cache_block + at % SIZE * cache_slot)[:, None] + dims * cache_dim
    mask = there[:, None] & (dims < DIM) if MASKED else (dims < DIM)[None, :]
    PARTIAL: tl.constexpr = MASKED or D != DIM
    k = load(keys + place, mask, PARTIAL)
    s = dot(q, tl.trans(k), WIDEN) * scale
    if MASKED:
        seen = there & (at <= positions[:, None])
        if WINDOW: seen = seen & (at > positions[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
    new_best = tl.maximum(best, tl.max(s, 1))
    p = tl.exp2(s - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    v = load(values + place, mask, PARTIAL)
    acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, WIDEN)
    return new_best, mass * shrink + tl.sum(p, 1), acc

# %%
@triton.jit
def see_tiles(q, best, mass, acc, begin, end, low, high, positions, table, keys, values,
              cache_block, cache_slot, cache_dim, scale,
              WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
              D: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
              MASKED: tl.constexpr):
    "The tiles from position `begin` up to `end`, one after the other."
    for first in tl.range(begin, end, TILE):
        best, mass, acc = see_tile(
            q, best, mass, acc, first, low, high, positions, table, keys, values,
            cache_block, cache_slot, cache_dim, scale,
            WINDOW, SIZE, DIM, D, TILE, WIDEN, MASKED)
    return best, mass, acc

# %%
@triton.jit
def attend(q, positions, position, num_tokens, low, high, table, keys, values,
           cache_block, cache_slot, cache_dim, scale, ROWS: tl.constexpr,
           WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
           D: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr):
    """(best, mass, acc) of queries `q` (ROWS, D) over the keys at low to high - 1.

    Their `positions` (ROWS,) begin with `position`; there are `num_tokens` different
    ones. Only tiles that somebody sees in part are masked: at both ends."""
    best = tl.full([ROWS], -3e38, tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    begin = low // TILE * TILE
    full_end = tl.maximum(tl.minimum(high, position + 1) // TILE * TILE, begin)
    full_begin = begin
    if WINDOW:
        edge = tl.maximum(position + num_tokens - WINDOW, low)
        full_begin = (edge + TILE - 1) // TILE * TILE
        full_end = tl.maximum(full_end, full_begin)
        best, mass, acc = see_tiles(
            q, best, mass, acc, begin, tl.minimum(full_begin, high), low, high,
            positions, table, keys, values, cache_block, cache_slot, cache_dim, scale,
            WINDOW, SIZE, DIM, D, TILE, WIDEN, MASKED=True)
    best, mass, acc = see_tiles(
        q, best, mass, acc, full_begin, full_end, low, high,
        positions, table, keys, values, cache_block, cache_slot, cache_dim, scale,
        WINDOW, SIZE, DIM, D, TILE, WIDEN, MASKED=False)
    return see_tiles(
        q, best, mass, acc, full_end, high, low, high,
        positions, table, keys, values, cache_block, cache_slot, cache_dim, scale,
        WINDOW, SIZE, DIM, D, TILE, WIDEN, MASKED=True)

# %%
@triton.jit
def attend_item(q, out, split_out, split_best, split_mass, head, item, row, num_tokens,
                position, low, high, num_splits, table, keys, values,
                q_token, q_head, q_dim, cache_block, cache_slot, cache_dim, scale,
                KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                WINDOW: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
                D: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr):
    """`num_tokens` queries of one sequence, the first at `position` and in row `row`
    of `q`, against the keys at positions low to high - 1 of one KV head."""
    r = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    token = row.to(tl.int64) + r // GROUP
    q_heads = head * GROUP + r % GROUP
    mine = (r // GROUP < num_tokens)[:, None] & (dims < DIM)
    x = token * q_token + q_heads * q_head
    query = tl.load(q + x[:, None] + dims * q_dim, mask=mine, other=0.)
    positions = position + tl.minimum(r // GROUP, num_tokens - 1)
    best, mass, acc = attend(
        query, positions, position, num_tokens, low, high, table, keys, values,
        cache_block, cache_slot, cache_dim, scale,
        ROWS, WINDOW, SIZE, DIM, D, TILE, WIDEN)
    if num_splits == 1:
        to = token * (KV_HEADS*GROUP) + q_heads
        tl.store(out + to[:, None] * DIM + dims, acc / mass[:, None], mask=mine)
    else:
        to = item.to(tl.int64) * (KV_HEADS*GROUP) + q_heads
        tl.store(split_out + to[:, None] * DIM + dims, acc, mask=mine)
        tl.store(split_best + to, best, mask=r < GROUP)
        tl.store(split_mass + to, mass, mask=r < GROUP)

# %%
def count_items(query_lens: Tensor, context_lens: Tensor, tiles: Tiles,
                window=None) -> Tensor:
    """Work items (S,) of each sequence, from its tokens in this step and in all.

    Several tokens are cut into tiles, the context of a single one into splits."""
    chunks = (query_lens + tiles.chunk_tokens - 1) // tiles.chunk_tokens
    splits = (context_lens + tiles.split - 1) // tiles.split
    if window is not None:
        splits = splits - (context_lens - window).clamp(min=0) // tiles.split
    return torch.where(query_lens == 1, splits, chunks)

# %%
@triton.jit
def reduce_kernel(out, split_out, split_best, split_mass, query_start, first_item,
                  HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
                  SPLITS: tl.constexpr):
    "One program for each sequence and query head: its splits' partial results, joined."
    seq = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(query_start + seq).to(tl.int64)
    first = tl.load(first_item + seq).to(tl.int64)
    num_splits = tl.load(first_item + seq + 1) - first
    if (tl.load(query_start + seq + 1) == row + 1) & (num_splits != 1):
        dims = tl.arange(0, D)
        best = tl.full([], -3e38, tl.float32)
        mass = tl.full([], 0., tl.float32)
        acc = tl.zeros([D], tl.float32)
        for begin in tl.range(0, num_splits, SPLITS):
            i = begin + tl.arange(0, SPLITS)
            there = i < num_splits
            at = (first + i) * HEADS + head
            bests = tl.load(split_best + at, mask=there, other=float("-inf"))
            new_best = tl.maximum(best, tl.max(bests, 0))
            weight = tl.exp2(bests - new_best)
            shrink = tl.exp2(best - new_best)
            masses = tl.load(split_mass + at, mask=there, other=0.)
            mass = mass * shrink + tl.sum(weight * masses, 0)
            x = tl.load(split_out + at[:, None] * DIM + dims,
                        mask=there[:, None] & (dims < DIM), other=0.)
            acc = acc * shrink + tl.sum(weight[:, None] * x, 0)
            best = new_best
        acc = acc / tl.where(mass > 0, mass, 1.)          # no split at all: 0
        tl.store(out + (row * HEADS + head) * DIM + dims, acc, mask=dims < DIM)

# %%
class SplitResults(NamedTuple):
    "What each split leaves for `reduce_kernel`, float32: its part of online softmax."
    out: Tensor    # (items, heads, head_dim): the weighted sum of its values
    best: Tensor   # (items, heads): its best score
    mass: Tensor   # (items, heads): the sum of its weights

    @classmethod
    def empty(cls, num_items: int, tiles: Tiles, device) -> "SplitResults":
        "Room for the results of `num_items` splits."
        heads = tiles.kv_heads * tiles.group
        return cls(torch.empty(num_items, heads, tiles.dim, device=device),
                   torch.empty(num_items, heads, device=device),
                   torch.empty(num_items, heads, device=device))

# %%
def num_programs(device: torch.device) -> int:
    "How many programs share a work list: eight for each multiprocessor of a GPU."
    if device.type != "cuda": return 3    # interpreted: enough to see them share
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count

# %%
class AttentionMetadata:
    """The work list of a step, in device tensors whose shapes stay.

    `query_start` (S+1,) int32: each sequence's first row, then the end; `context_lens`
    (S,) int32; block_tables (S, W); slot_mapping (N,). A CUDA graph keeps its metadata:
    it writes into these four, in place, and calls `list_work`. A row whose context is 0
    and whose slot is -1 is padding: nothing is stored, and its output is 0."""
    def __init__(self, query_start: Tensor, context_lens: Tensor, block_tables: Tensor,
                 slot_mapping: Tensor, tiles: Tiles, capacity: int, window=None,
                 has_chunks: bool = False, has_splits: bool = True,
                 splits: SplitResults | None = None):
        device = query_start.device
        self.query_start, self.context_lens = query_start, context_lens
        self.block_tables, self.slot_mapping = block_tables, slot_mapping
        self.tiles, self.window, self.capacity = tiles, window, capacity
        self.has_chunks, self.has_splits = has_chunks, has_splits
        self.num_programs = min(capacity * tiles.kv_heads, num_programs(device))
        self.items = torch.arange(capacity, dtype=torch.int32, device=device)
        self.item_seq = torch.empty_like(self.items)      # the sequence of each item
        self.first_item = torch.zeros_like(query_start)   # of each sequence, then all
        self.splits = splits or SplitResults.empty(capacity * has_splits, tiles, device)
        self.list_work()

    @classmethod
    def of(cls, batch: Batch, tiles: Tiles, window=None) -> "AttentionMetadata":
        "The metadata of one step, as large as that step."
        query_lens = torch.from_numpy(batch.query_lens).int()
        context_lens = torch.from_numpy(batch.context_lens).int()
        items = count_items(query_lens, context_lens, tiles, window)
        start = pad(query_lens.cumsum(0, dtype=torch.int32), (1, 0))
        is_split = (query_lens == 1) & (items > 1)
        device = batch.block_tables.device
        return cls(to_device(start, device), to_device(context_lens, device),
                   batch.block_tables, batch.slot_mapping, tiles, int(items.sum()),
                   window, has_chunks=bool((query_lens > 1).any()),
                   has_splits=bool(is_split.any()))

    def list_work(self):
        "Compute the work list from the lengths, on the device and asking it nothing."
        num_items = count_items(self.query_start.diff(), self.context_lens, self.tiles,
                                self.window)
        ends = self.first_item[1:]
        torch.cumsum(num_items, 0, dtype=torch.int32, out=ends)
        torch.searchsorted(ends, self.items, right=True, out_int32=True,
                           out=self.item_seq)

# %%
@triton.jit(do_not_specialize=["num_seqs", "table_row"])
def attention_kernel(q, keys, values, out, split_out, split_best, split_mass,
                     query_start, context_lens, tables, first_item, item_seq,
                     num_seqs, table_row, q_token, q_head, q_dim,
                     cache_block, cache_slot, cache_head, cache_dim, scale,
                     KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                     DECODE_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr,
                     SPLIT: tl.constexpr, WINDOW: tl.constexpr, SIZE: tl.constexpr,
                     DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
                     WIDEN: tl.constexpr):
    "Every program walks the work list: item by item, KV head by KV head."
    num_work = tl.load(first_item + num_seqs) * KV_HEADS
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0)):
        item = work // KV_HEADS
        head = work % KV_HEADS
        seq = tl.load(item_seq + item)
        first = tl.load(first_item + seq)
        row = tl.load(query_start + seq)
        num_tokens = tl.load(query_start + seq + 1) - row
        context = tl.load(context_lens + seq)
        table = tables + seq.to(tl.int64) * table_row
        head_keys = keys + head.to(tl.int64) * cache_head
        head_values = values + head.to(tl.int64) * cache_head
        if num_tokens == 1:
            unseen = tl.maximum(context - WINDOW, 0) if WINDOW else 0
            split = unseen // SPLIT + item - first
            attend_item(
                q, out, split_out, split_best, split_mass, head, item, row, 1,
                context - 1, tl.maximum(split * SPLIT, unseen),
                tl.minimum(split * SPLIT + SPLIT, context),
                tl.load(first_item + seq + 1) - first, table, head_keys, head_values,
                q_token, q_head, q_dim, cache_block, cache_slot, cache_dim, scale,
                KV_HEADS, GROUP, DECODE_ROWS, WINDOW, SIZE, DIM, D, TILE, WIDEN)
        elif CHUNK_ROWS:
            done = (item - first) * (CHUNK_ROWS // GROUP)
            n = tl.minimum(num_tokens - done, CHUNK_ROWS // GROUP)
            position = context - num_tokens + done
            unseen = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
            attend_item(
                q, out, split_out, split_best, split_mass, head, item, row + done, n,
                position, unseen, position + n, 1, table, head_keys, head_values,
                q_token, q_head, q_dim, cache_block, cache_slot, cache_dim, scale,
                KV_HEADS, GROUP, CHUNK_ROWS, WINDOW, SIZE, DIM, D, TILE, WIDEN)

# %%
LOG2_E = math.log2(math.e)   # the kernels' softmax is in powers of 2


class TritonAttention(AttentionBackend):
    """Paged attention by Triton kernels: the blocks are read in place.

    With `metadata` that outlives the step, as a CUDA graph's does, `batch` is not
    looked at. ValueError on a CPU, unless TRITON_INTERPRET was 1 at the import."""
    @classmethod
    def check(cls, device_type: str, block_size: int):
        "ValueError unless the kernels run on this device; any block size will do."
        compiled = isinstance(attention_kernel, triton.JITFunction)
        if device_type == "cpu" and compiled:
            raise ValueError("attention_backend is 'triton': it needs a GPU, or "
                             "TRITON_INTERPRET=1 in the environment from the start")

    def __init__(self, batch: Batch | None, kv_cache: Tensor, scale: float,
                 window: int | None = None, metadata: AttentionMetadata | None = None):
        self.check(kv_cache.device.type, kv_cache.shape[3])
        super().__init__(batch, kv_cache, scale, window)
        self.metadata = metadata

    @property
    def slot_mapping(self) -> Tensor: return (self.metadata or self.batch).slot_mapping

    def store(self, k: Tensor, v: Tensor, layer: int):
        "Write `k`, `v` (N, kv_heads, head_dim) into the slots; none for a padded row."
        store_kv(self.kv_cache, layer, k, v, self.slot_mapping)

    def __call__(self, q: Tensor, layer: int) -> Tensor:
        "Attend from `q` (N, heads, head_dim) to the cache of `layer`; q's shape."
        if self.metadata is None: self.metadata = self.make_metadata(q.shape[1])
        out = q.new_empty(q.shape)
        self.launch(q, *self.kv_cache[layer], out)
        return out

    def make_metadata(self, num_heads: int) -> AttentionMetadata:
        "The metadata of the step's batch; made once, by its first layer."
        kv_heads, dim = self.kv_cache.shape[-2:]
        tiles = Tiles(kv_heads, num_heads // kv_heads, dim,
                      itemsize=self.kv_cache.element_size())
        return AttentionMetadata.of(self.batch, tiles, self.window)

    def launch(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor):
        "One launch for all items, and one that joins splits where there may be some."
        m, t = self.metadata, self.metadata.tiles
        attention_kernel[(m.num_programs,)](
            q, keys, values, out, *m.splits, m.query_start, m.context_lens,
            m.block_tables, m.first_item, m.item_seq, len(m.context_lens),
            m.block_tables.stride(0), *q.stride(), *keys.stride(), self.scale * LOG2_E,
            t.kv_heads, t.group, t.decode_rows, t.chunk_rows if m.has_chunks else 0,
            t.split, m.window or 0, keys.shape[1], t.dim, t.width, t.keys,
            not q.is_cuda, num_warps=4 if t.width <= 128 else 8,
            num_stages=3 if m.has_chunks else 5)
        if not m.has_splits: return
        reduce_kernel[(len(m.context_lens), q.shape[1])](
            out, *m.splits, m.query_start, m.first_item, q.shape[1], t.dim, t.width,
            SPLITS=16)


BACKENDS["triton"] = TritonAttention

# %%
class FlashAttention(AttentionBackend):
    """Paged attention by the package flash-attn, from version 2.5 on, for GPUs.

    Raises ValueError for block sizes, number types and head sizes it cannot take."""
    @classmethod
    def check(cls, device_type: str, block_size: int):
        "ValueError unless the package is here and takes this device and block size."
        try: import flash_attn  # noqa: F401
        except ImportError as e:
            raise ValueError("attention_backend is 'flash': it needs the package "
                             f"flash-attn ({e}), 'triton' and 'torch' do not") from e
        if device_type != "cuda":
            raise ValueError("attention_backend is 'flash': it needs a GPU, the device "
                             f"is {device_type!r}")
        if block_size % 256:
            raise ValueError(f"block_size is {block_size}: with attention_backend "
                             "'flash' it must be a multiple of 256")

    @staticmethod
    def check_cache(kv_cache: Tensor):
        "ValueError unless the package takes the number type and the head size."
        if kv_cache.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {kv_cache.dtype}: with attention_backend "
                             "'flash' it must be float16 or bfloat16")
        dim = kv_cache.shape[-1]
        if dim % 8 or dim > 256:
            raise ValueError(f"head_dim is {dim}: with attention_backend 'flash' it "
                             "must be a multiple of 8, and at most 256")

    def __init__(self, batch: Batch, kv_cache: Tensor, scale: float,
                 window: int | None = None):
        from flash_attn import flash_attn_varlen_func
        self.check_cache(kv_cache)
        super().__init__(batch, kv_cache, scale, window)
        lens = np.stack([batch.query_lens, batch.context_lens])
        ends = pad(torch.from_numpy(lens).cumsum(1), (1, 0)).int()
        starts_q, starts_k = to_device(ends, kv_cache.device)
        longest_q, longest_k = lens.max(1).tolist()
        behind = -1 if window is None else window - 1    # -1: all
        self.attend = partial(
            flash_attn_varlen_func, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k,
            max_seqlen_q=longest_q, max_seqlen_k=longest_k, softmax_scale=scale,
            causal=True, window_size=(behind, 0), block_table=batch.block_tables.int())

    def store(self, k: Tensor, v: Tensor, layer: int):
        "Write `k`, `v` (N, kv_heads, head_dim) into the slots of the batch."
        store_kv(self.kv_cache, layer, k, v, self.slot_mapping)

    def __call__(self, q: Tensor, layer: int) -> Tensor:
        "Attend from `q` (N, heads, head_dim) to the cache of `layer`; q's shape."
        keys, values = self.kv_cache[layer]
        return self.attend(q, keys, values)


BACKENDS["flash"] = FlashAttention
