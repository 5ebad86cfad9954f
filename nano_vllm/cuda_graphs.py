"A step is a thousand small launches; what asking for them costs, and what must stay in place if they are to be repeated unasked."

# %%
from functools import partial
import numpy as np
import torch
from fastcore.basics import patch
from torch import Tensor
from tqdm import tqdm
from nano_vllm.kv_blocks import SchedulerOutput, Sequence
from nano_vllm.model_runner import ModelRunner
from nano_vllm.sampler import SamplingMetadata, gumbel_sample, make_keys, to_device
try:
    from nano_vllm.triton_attention import (AttentionMetadata, Tiles, TritonAttention,
                                            count_items)
except ModuleNotFoundError as e:
    if e.name != "triton": raise
    AttentionMetadata = Tiles = TritonAttention = None   # so there are no graphs either

# %%
def bucket_sizes(largest: int) -> list[int]:
    "1, 2, 4, then multiples of 8, and always `largest` itself."
    return [n for n in (1, 2, 4, *range(8, largest, 8)) if n < largest] + [largest]

# %%
class GpuRecorder:
    "Records what a function launches on a GPU, into graphs that share their memory."
    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def record(self, step):
        "A function that repeats what `step()` launches, on the same addresses."
        step()   # kernels are compiled and loaded now, and not in the recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream): step()
        return graph.replay

# %%
SHARING = 8   # there is room for splits as if a cached token served so many sequences


def max_items(tiles: Tiles, max_len: int, window: int | None = None) -> int:
    "The most work items of a single token, in a text of up to `max_len`."
    lengths = torch.arange(1, max_len + 1)
    return int(count_items(torch.ones_like(lengths), lengths, tiles, window).max())


def prepare_for_capture(sizes: list[int], block_tables: Tensor, tiles: Tiles,
                        max_len: int, num_slots: int, window: int | None = None):
    """{n: AttentionMetadata of n rows of one token} for the `sizes`, in one memory.

    block_tables (S, W), and slots and context lengths made here, are used by all, the
    first rows of them by the smaller ones; so no two steps may be under way at a time.
    Each has room for `capacity` items, by texts of `max_len` and a cache's slots."""
    device, num_rows = block_tables.device, len(block_tables)
    start = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    context_lens = torch.zeros_like(start[1:])
    slot_mapping = torch.full_like(start[1:], -1, dtype=torch.int64)
    most = max_items(tiles, max_len, window)
    limit = SHARING * num_slots // tiles.split
    found, splits = {}, None
    for n in sorted(sizes, reverse=True):
        found[n] = AttentionMetadata(
            start[:n+1], context_lens[:n], block_tables[:n], slot_mapping[:n], tiles,
            min(n * most, n + limit), window, splits=splits)
        splits = found[n].splits     # the largest one's, for all
    return found

# %%
def prepare_for_replay(metadata: AttentionMetadata, seq_lens: Tensor,
                       block_size: int) -> Tensor:
    """Set such metadata to the last token of each text; gives the positions (S,).

    seq_lens (S,) int64, with that token; 0: padding. On the device, asking nothing."""
    positions = (seq_lens - 1).clamp(min=0)
    index = positions[:, None] // block_size
    block = metadata.block_tables.gather(1, index).squeeze(1)
    slots = block * block_size + positions % block_size
    metadata.slot_mapping.copy_(slots.masked_fill(seq_lens == 0, -1))
    metadata.context_lens.copy_(seq_lens)
    metadata.list_work()
    return positions

# %%
# what a row holds besides its blocks, int64: a token, the length of its text with it, a
# seed, the number of tokens sampled before, and the bits of a float32 temperature
TOKEN, SEQ_LEN, SEED, NUM_OUTPUT, TEMPERATURE = range(5)
UNKNOWN = np.iinfo(np.int64).min    # in a mirror: equal to nothing that is wanted


def advance(fields):
    "Bring rows (5, S), in place, to their next token; padding, of length 0, stays."
    goes_on = fields[SEQ_LEN] > 0
    fields[SEQ_LEN] += goes_on
    fields[NUM_OUTPUT] += goes_on

# %%
class DecodeGraphs:
    """Decode steps of the input batch's rows 0, 1, ..., recorded for some sizes.

    After a step, `fields` (5, rows) on the device stand at the next one by themselves;
    `mirror` is what the host knows of them, so that it sends only what is to differ."""
    def __init__(self, runner: ModelRunner, max_model_len: int, recorder):
        # not the runner itself: it holds these graphs, and nothing should hold itself
        self.model, self.ops, self.scale = runner.model, runner.ops, runner.scale
        self.kv_cache, c = runner.kv_cache, runner.model.config
        num_blocks, self.block_size = runner.kv_cache.shape[2:4]
        self.input_batch, rows = runner.input_batch, runner.input_batch.device
        num_rows, device = len(rows.last_token), runner.device
        self.fields = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        rows.last_token = self.fields[TOKEN]     # eager steps put theirs here, too
        self.mirror = np.full((5, num_rows), UNKNOWN)
        self.logits = torch.zeros(num_rows, c.vocab_size, device=device)
        self.tiles = Tiles(c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim,
                           itemsize=self.kv_cache.element_size())
        self.sizes = bucket_sizes(num_rows)
        self.metadata = prepare_for_capture(
            self.sizes, rows.block_tables, self.tiles, max_model_len,
            num_blocks * self.block_size, c.sliding_window)
        self.replay = {n: recorder.record(partial(self.step, n))
                       for n in tqdm(self.metadata, desc="recording graphs")}

# %%
@patch
def step(self: DecodeGraphs, n: int):
    "What is recorded: `n` rows, from static tensors to static tensors."
    metadata, logits, fields = self.metadata[n], self.logits[:n], self.fields[:, :n]
    tokens, seq_lens, seeds, num_output_tokens, bits = fields
    positions = prepare_for_replay(metadata, seq_lens, self.block_size)
    attention = self.ops.attention(None, self.kv_cache, self.scale, metadata.window,
                                   metadata)
    hidden = self.model(tokens, positions, attention)
    logits.copy_(self.model.compute_logits(hidden))
    temperature = bits.int().view(torch.float32)
    keys = make_keys(seeds, num_output_tokens)
    sampled = gumbel_sample(logits, temperature, keys)
    tokens.copy_(sampled.where(seq_lens > 0, tokens))   # padding may be someone's row
    advance(fields)

# %%
@patch
def fits(self: DecodeGraphs, output: SchedulerOutput) -> bool:
    "Is it one token for each of rows 0, 1, ..., each to be followed by another?"
    n, row_of = len(output.scheduled), self.input_batch.row_of
    return (all(s.num_tokens == 1 and s.samples and row_of[s.seq] < n
                for s in output.scheduled)
            and self.has_room([s.end for s in output.scheduled]))

# %%
@patch
def has_room(self: DecodeGraphs, seq_lens: list[int]) -> bool:
    "Is there memory for the splits of these contexts?"
    lens = torch.tensor(seq_lens)
    metadata = self.metadata[self.size_for(len(lens))]
    items = count_items(torch.ones_like(lens), lens, self.tiles, metadata.window)
    return int(items.sum()) <= metadata.capacity

# %%
@patch
def size_for(self: DecodeGraphs, n: int) -> int:
    "The least recorded size for `n` rows."
    return next(size for size in self.sizes if size >= n)

# %%
@patch
def read_output(self: DecodeGraphs, output: SchedulerOutput):
    "(tokens, lengths with them) by row, int64; -1: a token that only the device knows."
    tokens, seq_lens = np.empty((2, len(output.scheduled)), np.int64)
    for seq, start, num_tokens, _ in output.scheduled:
        row, known = self.input_batch.row_of[seq], seq.tokens(start, start + num_tokens)
        tokens[row] = known[0] if known else -1
        seq_lens[row] = start + num_tokens
    return tokens, seq_lens

# %%
@patch
def wanted_fields(self: DecodeGraphs, tokens: np.ndarray, seq_lens: np.ndarray,
                  size: int) -> np.ndarray:
    "What the first `size` rows are to hold now: those of the step, then padding."
    rows, n = self.input_batch, len(tokens)
    wanted = self.mirror[:, :size].copy()
    wanted[TOKEN, :n] = np.where(tokens < 0, wanted[TOKEN, :n], tokens)
    wanted[SEQ_LEN] = 0
    wanted[SEQ_LEN, :n] = seq_lens
    wanted[SEED, :n] = rows.seeds[:n]
    wanted[NUM_OUTPUT, :n] = seq_lens - rows.prompt_lens[:n]
    wanted[TEMPERATURE, :n] = rows.params["temperature"][:n].view(np.int32)
    return wanted

# %%
@patch
def find_changes(self: DecodeGraphs, wanted: np.ndarray) -> np.ndarray:
    "Fields, rows and values (3, M) in which `wanted` differs from the device."
    field, row = np.nonzero(wanted != self.mirror[:, :wanted.shape[1]])
    return np.stack([field, row, wanted[field, row]])

# %%
@patch
def send(self: DecodeGraphs, changes: np.ndarray):
    "Write changes (3, M) into the device's fields, in one go."
    if changes.size == 0: return
    field, row, value = to_device(torch.from_numpy(changes), self.fields.device)
    self.fields[field, row] = value

# %%
@patch
def sampling_metadata(self: DecodeGraphs, seq_lens: np.ndarray) -> SamplingMetadata:
    "What the sampler reads, of rows 0, 1, ..., whose texts are so long."
    rows, n = self.input_batch, len(seq_lens)
    columns = {name: torch.from_numpy(column[:n])
               for name, column in rows.params.items()}
    num_output_tokens = seq_lens - rows.prompt_lens[:n]
    return SamplingMetadata(
        **columns, seeds=torch.from_numpy(rows.seeds[:n]),
        num_output_tokens=torch.from_numpy(num_output_tokens), sequences=rows.seqs[:n])

# %%
@patch
def run(self: DecodeGraphs,
        output: SchedulerOutput) -> tuple[list[Sequence], Tensor, Tensor]:
    """The sequences by row, their logits (S, vocab_size), float32, and next ids (S,).

    Both tensors are overwritten by the next step; what is to be kept must be copied."""
    tokens, seq_lens = self.read_output(output)
    n, size = len(tokens), self.size_for(len(tokens))
    wanted = self.wanted_fields(tokens, seq_lens, size)
    changes = self.find_changes(wanted)
    self.mirror[:, :size] = UNKNOWN      # if anything interrupts what follows
    self.send(changes)
    self.replay[size]()
    advance(wanted)
    wanted[TOKEN] = UNKNOWN
    self.mirror[:, :size] = wanted
    logits, ids = self.logits[:n], self.fields[TOKEN, :n]
    sampling = self.sampling_metadata(seq_lens)
    if not sampling.is_plain:     # they ask for more than is recorded
        ids.copy_(self.ops.sample(logits, sampling))
    return sampling.sequences, logits, ids

# %%
@patch
def forget(self: DecodeGraphs):
    "Believe nothing of what the device holds: the next step sends everything."
    self.mirror.fill(UNKNOWN)

# %%
def make_graphs(runner: ModelRunner, max_model_len: int,
                recorder=None) -> DecodeGraphs | None:
    """Recorded decode steps; None if device, attention or model do not allow them.

    `recorder` stands in for a GPU's, on any device."""
    if TritonAttention is None or runner.model.config.mlp is not None: return None
    if runner.group.size > 1: return None
    if not issubclass(runner.ops.attention, TritonAttention): return None
    if recorder is None and runner.device.type != "cuda": return None
    with torch.inference_mode(), torch.cuda.device_of(runner.kv_cache):
        return DecodeGraphs(runner, max_model_len, recorder or GpuRecorder())
