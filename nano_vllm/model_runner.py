"From a schedule to tokens: rows that stay, a batch made of them, and one call that computes it."

# %%
import mmap, os, re
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from weakref import finalize
import numpy as np
import torch
from fastcore.basics import patch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from nano_vllm.attention import Batch, prompt_positions
from nano_vllm.kv_blocks import (ScheduledSequence, SchedulerOutput, Sequence,
                                 blocks_needed)
from nano_vllm.layers import TensorParallelGroup
from nano_vllm.model import Decoder, ModelConfig
from nano_vllm.sampler import (NUMBERS, SamplingMetadata, compute_logprobs,
                               gather_logprobs, to_device, to_entries)
from nano_vllm.sampling_params import Logprob
from nano_vllm.weights import empty_model

# %%
def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    "Bytes of one KV block: keys and values of `block_size` tokens in all layers."
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return token * block_size * dtype.itemsize

# %%
def read_meminfo(name: str) -> int | None:
    "Bytes that /proc/meminfo gives for `name`; None where there is no such file."
    if not (info := Path("/proc/meminfo")).exists(): return None
    return 1024 * int(re.search(rf"{name}: *(\d+)", info.read_text())[1])


def device_memory(device: torch.device) -> tuple[int, int]:
    "(free, total) bytes of a device; where nobody knows, half of it counts as free."
    if device.type == "cuda": return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return read_meminfo("MemAvailable") or total // 2, total

# %%
class PeakMemory(TorchDispatchMode):
    "Counts the bytes of the tensors that are alive, and the most there were."
    def __init__(self):
        super().__init__()
        self.seen, self.alive, self.peak = set(), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor): self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        "Count a storage until it is freed."
        key = storage._cdata
        if key in self.seen: return
        size = storage.nbytes()
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int):
        self.seen.discard(key)
        self.alive -= size

# %%
def allocate_kv_cache(config: ModelConfig, num_blocks: int, block_size: int,
                      dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim).

    Raises ValueError if free memory has no room for them."""
    shape = (config.num_layers, 2, num_blocks, block_size,
             config.num_kv_heads, config.head_dim)
    block, free = kv_block_bytes(config, block_size, dtype), device_memory(device)[0]
    needed, gib = num_blocks * block, 2**30
    try:
        if needed > free: raise MemoryError
        if device.type != "cpu": return torch.zeros(shape, dtype=dtype, device=device)
        pages = mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
    except (MemoryError, OSError, torch.OutOfMemoryError):
        raise ValueError(
            f"num_kv_blocks is {num_blocks}: the KV cache needs {needed / gib:,.2f} GiB"
            f" ({block:,} bytes a block), but {device} has {free / gib:,.2f} GiB free; "
            f"ask for at most {free // block} blocks, or lower block_size") from None

# %%
@dataclass
class RowInputs:
    "What `InputBatch.prepare` gives besides the batch, in the batch's order."
    scheduled: list[ScheduledSequence]
    rows: np.ndarray             # (S,) the row of each
    sampled: list[Sequence]      # those that get a token
    sampled_rows: Tensor         # (R,) int64, on the device
    metadata: SamplingMetadata   # of these R

# %%
class InputBatch:
    """A row for each resident sequence: what steps read of it, kept from step to step.

    Rows 0 to len(seqs)-1 are taken. NumPy arrays on the host; `device` has the tensors
    that kernels read, under the same names (on a CPU they are the same memory)."""
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int,
                 device: torch.device):
        self.block_size, self.seqs, self.row_of = block_size, [], {}
        self.num_blocks: list[int] = []        # in the table of each row
        self.new_cells: list[tuple] = []       # (row, index, block) since the last step
        width = blocks_needed(max_model_len, block_size)
        self.block_tables = np.zeros((max_num_seqs, width), np.int64)
        self.prompt_lens, self.seeds = np.zeros((2, max_num_seqs), np.int64)
        self.params = {name: torch.zeros(max_num_seqs, dtype=dtype).numpy()
                       for name, dtype in NUMBERS.items()}
        whole = dict(dtype=torch.int64, device=device)
        tables = torch.from_numpy(self.block_tables)
        self.device = SimpleNamespace(
            block_tables=tables if device.type == "cpu" else tables.to(device),
            last_token=torch.zeros(max_num_seqs, **whole),
            seq_lens=torch.zeros(max_num_seqs, **whole),
            seeds=torch.zeros(max_num_seqs, **whole),
            num_output_tokens=torch.zeros(max_num_seqs, **whole),
            temperature=torch.zeros(max_num_seqs, device=device))

    @property
    def has_own_tables(self) -> bool:
        "Has the device block tables of its own, which must be sent what is new?"
        return self.device.block_tables.data_ptr() != self.block_tables.ctypes.data

    def clear(self):
        "Forget all sequences."
        self.seqs, self.row_of, self.num_blocks = [], {}, []
        self.new_cells.clear()

# %%
@patch
def add(self: InputBatch, seq: Sequence):
    "Take the next row for `seq`."
    row = self.row_of[seq] = len(self.seqs)
    self.seqs.append(seq)
    self.num_blocks.append(0)
    self.prompt_lens[row], self.seeds[row] = len(seq.prompt_token_ids), seq.seed
    for name, column in self.params.items():
        column[row] = min(getattr(seq.params, name), 2**62)

# %%
@patch
def add_blocks(self: InputBatch, row: int):
    "Write the blocks into the table that it lacks."
    first, table = self.num_blocks[row], self.seqs[row].block_table
    self.block_tables[row, first:len(table)] = table[first:]
    self.num_blocks[row] = len(table)
    if self.has_own_tables:
        self.new_cells += [(row, i, table[i]) for i in range(first, len(table))]

# %%
@patch
def remove(self: InputBatch, seq: Sequence):
    "Give up the row of `seq`; the last row moves there, so that no gap is left."
    row, last = self.row_of.pop(seq), len(self.seqs) - 1
    moved = self.seqs.pop()
    num_blocks = self.num_blocks.pop()
    if row == last: return
    self.seqs[row], self.row_of[moved], self.num_blocks[row] = moved, row, 0
    for column in (self.prompt_lens, self.seeds, *self.params.values()):
        column[row] = column[last]
    self.device.last_token[row] = self.device.last_token[last]
    self.move_blocks(row, last, num_blocks)

# %%
@patch
def move_blocks(self: InputBatch, row: int, last: int, num_blocks: int):
    "Let `row` have the first `num_blocks` blocks of the table of row `last`."
    blocks = self.block_tables[last, :num_blocks]
    self.block_tables[row, :num_blocks] = blocks
    self.num_blocks[row] = num_blocks
    if self.has_own_tables:
        self.new_cells += [(row, i, b) for i, b in enumerate(blocks.tolist())]

# %%
@patch
def send_new_cells(self: InputBatch):
    "Write what is new in the tables into the device's, in one go."
    if not self.new_cells: return
    device = self.device.block_tables.device
    # of a cell that changed twice, the last block: a GPU writes in any order
    cells = {(row, index): block for row, index, block in self.new_cells}
    changes = [(*place, block) for place, block in cells.items()]
    row, index, block = to_device(torch.tensor(changes).T, device)
    self.device.block_tables[row, index] = block
    self.new_cells.clear()

# %%
@patch
def update(self: InputBatch, output: SchedulerOutput):
    "Bring the rows to where `output` is going to start."
    for seq in output.removed: self.remove(seq)
    for s in output.admitted: self.add(s.seq)
    for s in output.scheduled:
        row = self.row_of[s.seq]
        if len(s.seq.block_table) > self.num_blocks[row]: self.add_blocks(row)
    self.send_new_cells()

# %%
@patch
def token_ids(self: InputBatch, scheduled: list[ScheduledSequence],
              row_of_token: np.ndarray) -> Tensor:
    "The ids of a step's tokens (N,); ids not known yet are on the device."
    ids = []
    for seq, start, num_tokens, _ in scheduled:
        known = seq.tokens(start, start + num_tokens)
        ids += known
        if len(known) < num_tokens: ids.append(-1)
    known = torch.tensor(ids)
    if min(ids) >= 0: return known
    device = self.device.last_token.device
    known, rows = to_device(torch.stack([known, torch.from_numpy(row_of_token)]),
                            device)
    return torch.where(known < 0, self.device.last_token[rows], known)

# %%
@patch
def tables_of(self: InputBatch, rows: np.ndarray) -> Tensor:
    "Block tables (S, W) of the rows, on the device; a view if these are 0, 1, ..."
    tables, width = self.device.block_tables, max(self.num_blocks)
    if rows[-1] == len(rows) - 1: return tables[:len(rows), :width]
    index = to_device(torch.from_numpy(rows), tables.device)
    return tables[:, :width].index_select(0, index)

# %%
@patch
def sampling_inputs(self: InputBatch, scheduled: list[ScheduledSequence],
                    rows, samples, context_lens) -> RowInputs:
    "What the sampler reads, for the rows that sample."
    chosen = rows[samples]
    index = slice(0, len(chosen)) if len(chosen) == len(self.seqs) else chosen
    columns = {name: torch.from_numpy(column[index])
               for name, column in self.params.items()}
    counts = context_lens[samples] - self.prompt_lens[index]
    sequences = [self.seqs[row] for row in chosen.tolist()]
    metadata = SamplingMetadata(
        **columns, seeds=torch.from_numpy(self.seeds[index]),
        num_output_tokens=torch.from_numpy(counts), sequences=sequences)
    at = to_device(torch.from_numpy(chosen), self.device.last_token.device)
    return RowInputs(scheduled, rows, sequences, at, metadata)

# %%
def prompt_indices(scheduled: list[ScheduledSequence], offsets) -> list[int]:
    "Where in a step's flat batch the tokens are that rate a prompt."
    return [offset - s.start + p for s, offset in zip(scheduled, offsets)
            if s.seq.params.prompt_logprobs is not None for p in prompt_positions(s)]

# %%
@patch
def prepare(self: InputBatch, output: SchedulerOutput) -> tuple[Batch, RowInputs]:
    "The batch of a step, sequences in the order of their rows."
    scheduled = sorted(output.scheduled, key=lambda s: self.row_of[s.seq])
    rows = np.array([self.row_of[s.seq] for s in scheduled])
    starts = np.array([s.start for s in scheduled])
    lens = np.array([s.num_tokens for s in scheduled])
    ends = lens.cumsum()                     # where each ends in the flat batch
    positions = np.arange(ends[-1]) + np.repeat(starts - ends + lens, lens)
    row_of_token = np.repeat(rows, lens)
    block = self.block_tables[row_of_token, positions // self.block_size]
    slots = block * self.block_size + positions % self.block_size
    samples = np.array([s.samples for s in scheduled])
    rated = prompt_indices(scheduled, ends - lens)
    batch = Batch(self.token_ids(scheduled, row_of_token),
                  torch.from_numpy(positions), torch.from_numpy(slots),
                  self.tables_of(rows), lens, starts + lens,
                  torch.from_numpy(ends[samples] - 1),
                  torch.tensor(rated, dtype=torch.int64))
    return batch, self.sampling_inputs(scheduled, rows, samples, starts + lens)

# %%
def fetch_later(x: Tensor) -> Callable[[], list]:
    "Start to copy `x` to the host; a function that waits for the copy and gives it."
    if not x.is_cuda: return x.clone().tolist
    copy = torch.empty_like(x, device="cpu", pin_memory=True)
    arrived = torch.cuda.Event()
    copy.copy_(x, non_blocking=True)
    arrived.record(torch.cuda.current_stream(x.device))

    def wait():
        arrived.synchronize()
        return copy.tolist()
    return wait

# %%
@dataclass
class StepResult:
    "What a step gives, for each of the scheduler output's `sampled`, in order."
    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]     # None: nobody asked
    # (sequence, position of the first prompt token rated, entries), if asked for
    prompt_logprobs: list[tuple[Sequence, int, list]]


class StepHandle:
    "A step that was asked for; its `result` may be waited for later."
    def __init__(self, output: SchedulerOutput, sampled: list[Sequence], ids: Tensor,
                 logprobs: dict, prompt_logprobs: list):
        self.output, self.sampled, self.fetch = output, sampled, fetch_later(ids)
        self.logprobs, self.prompt_logprobs = logprobs, prompt_logprobs

    def result(self) -> StepResult:
        "Wait for the step; its tokens in the order of `output.sampled`."
        tokens = dict(zip(self.sampled, self.fetch()))
        entries = {seq: to_entries(*x)[0] for seq, x in self.logprobs.items()}
        seqs = [s.seq for s in self.output.sampled]
        return StepResult([tokens[seq] for seq in seqs],
                          [entries.get(seq) for seq in seqs], self.prompt_logprobs)

# %%
PROMPT_PIECE = 1024   # positions whose logits are held at a time, as in vLLM


class ModelRunner:
    "Owns the model, its KV cache and the rows of its sequences; computes steps."
    graphs = None     # recorded decode steps, if there are any
    def __init__(self, model: Decoder, num_blocks: int, block_size: int,
                 max_num_seqs: int = 256, max_model_len: int | None = None,
                 kv_dtype: torch.dtype | None = None,
                 group: TensorParallelGroup = TensorParallelGroup()):
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.ops, self.group = model, model.ops, group
        self.device, self.scale = weight.device, config.head_dim ** -0.5
        self.kv_cache = allocate_kv_cache(model.kv_config, num_blocks, block_size,
                                          kv_dtype or weight.dtype, weight.device)
        # several ranks are sent each batch from the host, whole
        rows_on = self.device if group.size == 1 else torch.device("cpu")
        longest = max_model_len or config.max_position
        self.input_batch = InputBatch(max_num_seqs, longest, block_size, rows_on)

# %%
@patch
def forward(self: ModelRunner, batch: Batch) -> Tensor:
    "Hidden states (N, hidden_size) of a batch on the device."
    with torch.cuda.device_of(self.kv_cache):
        attention = self.ops.attention(batch, self.kv_cache, self.scale,
                                       self.model.config.sliding_window)
        return self.model(batch.token_ids, batch.positions, attention)

# %%
def rate_prompts(logits: Tensor, places: list[tuple[Sequence, int]]) -> list[tuple]:
    "(sequence, position, entries) for prompt tokens after `places`, by their logits."
    rated, at = [], 0
    for seq, run in groupby(places, key=lambda place: place[0]):
        positions = [p for _, p in run]
        given = [seq.prompt_token_ids[p + 1] for p in positions]
        entries = compute_logprobs(logits[at:at + len(given)], given,
                                   seq.params.prompt_logprobs)
        rated.append((seq, positions[0] + 1, entries))
        at += len(given)
    return rated

# %%
@patch
@torch.inference_mode()
def compute(self: ModelRunner, batch: Batch, places=(), rated=None) -> Tensor:
    "This rank's part of a step: store its KV, give the logits if it is rank 0."
    batch = batch.to(self.device)
    hidden = self.forward(batch)
    logits = self.model.compute_logits(hidden[batch.logits_indices]).float()
    for i, piece in enumerate(batch.prompt_indices.split(PROMPT_PIECE)):
        if len(piece) == 0: continue
        found = self.model.compute_logits(hidden[piece])
        here = places[i*PROMPT_PIECE:(i + 1)*PROMPT_PIECE]
        if self.group.rank == 0: rated += rate_prompts(found, here)
    return logits

# %%
@patch
def compute_on_all(self: ModelRunner, batch: Batch, inputs: RowInputs,
                   rated: list) -> Tensor:
    "The wanted logits (R, vocab_size), float32; ratings of prompts go to `rated`."
    places = [(s.seq, p) for s in inputs.scheduled for p in prompt_positions(s)]
    with self.group.collective_guard():
        self.group.broadcast(batch)
        return self.compute(batch, places, rated)

# %%
@patch
@torch.inference_mode()
def execute(self: ModelRunner, output: SchedulerOutput) -> StepHandle:
    "Compute a scheduled step, and choose a token for each sequence that samples."
    self.input_batch.update(output)
    prompt_logprobs = []
    if self.graphs and self.graphs.fits(output):
        sampled, logits, ids = self.graphs.run(output)
    else:
        batch, inputs = self.input_batch.prepare(output)
        logits = self.compute_on_all(batch, inputs, prompt_logprobs)
        ids, sampled = self.ops.sample(logits, inputs.metadata), inputs.sampled
        self.input_batch.device.last_token[inputs.sampled_rows] = ids
    logprobs = {
        seq: gather_logprobs(logits[i:i+1], ids[i:i+1], seq.params.logprobs)
        for i, seq in enumerate(sampled) if seq.params.logprobs is not None}
    return StepHandle(output, sampled, ids, logprobs, prompt_logprobs)

# %%
@patch
def worker_loop(self: ModelRunner):
    "On other ranks than 0: compute each batch sent; the first other message."
    while isinstance(message := self.group.receive(), Batch): self.compute(message)
    return message

# %%
@patch
def clear(self: ModelRunner):
    "Forget all sequences: none of the rows is of use any more."
    self.input_batch.clear()
    if self.graphs: self.graphs.forget()

# %%
class NoAttention:
    "Stands in for attention where only the size of things matters: q is the answer."
    def store(self, k: Tensor, v: Tensor, layer: int): "Nothing is kept."
    def __call__(self, q: Tensor, layer: int) -> Tensor: return q


def profile_memory(config: ModelConfig, dtype: torch.dtype, num_tokens: int,
                   num_rows: int, group: TensorParallelGroup) -> int:
    """Bytes that a step of `num_tokens` tokens and `num_rows` logits takes at its peak.

    One layer stands for all, as they take turns; on the meta device, which computes
    nothing but knows every size. Attention works in tiles and needs little besides."""
    model = empty_model(replace(config, num_layers=1), dtype, "meta", group)
    with torch.device("meta"), torch.inference_mode(), PeakMemory() as memory:
        ids = torch.zeros(num_tokens, dtype=torch.int64)
        hidden = model(ids, ids, NoAttention())
        model.compute_logits(hidden[:num_rows]).float().softmax(-1)
    return memory.peak
