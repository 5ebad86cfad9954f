"A text grows one token at a time, so its memory should too: a page table for keys and values."

# %%
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple
from nano_vllm.sampling_params import SamplingParams

# %%
def blocks_needed(num_tokens: int, block_size: int) -> int:
    "How many blocks hold `num_tokens` tokens: the quotient, rounded up."
    return -(-num_tokens // block_size)

# %%
@dataclass(eq=False)
class Sequence:
    "One text in the making: the tokens we know, and how many have KV in the cache."
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    index: int = 0                    # which of its request's `n` samples this is
    seed: int = 0                     # sampling noise depends on seed and position
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end it, EOS included
    cache_salt: int = 0               # only sequences of equal salt share cached blocks
    max_len: int = 2**62              # its number of tokens when it must end
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "abort" once it has ended
    stop_reason: int | str | None = None  # the stop token or string that ended it
    # what follows can be made anew from the tokens at any time, see `reset`
    num_computed_tokens: int = 0      # tokens whose KV is in the cache or being written
    num_output_placeholders: int = 0  # tokens being sampled, which nobody knows yet
    block_table: list[int] = field(default_factory=list)
    num_released_blocks: int = 0      # of the table, from its start: behind a window
    block_hashes: list[int] = field(default_factory=list)   # of its full blocks, and
    cache_entries: list[int] = field(default_factory=list)  # the prefix cache's names

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        "The known tokens at positions `start` up to, not including, `end`."
        prompt, n = self.prompt_token_ids, len(self.prompt_token_ids)
        if start >= n: return self.output_token_ids[start-n:max(end-n, 0)]
        return prompt[start:end] + self.output_token_ids[:max(end-n, 0)]

    def reset(self):
        "Back to the tokens alone: nothing is computed, no block is held."
        self.num_computed_tokens = self.num_output_placeholders = 0
        self.num_released_blocks = 0
        for kept in (self.block_table, self.block_hashes, self.cache_entries):
            kept.clear()

# %%
class ScheduledSequence(NamedTuple):
    "What one step does for a sequence: compute `num_tokens` tokens from `start` on."
    seq: Sequence
    start: int
    num_tokens: int
    samples: bool          # whether a new token follows the last of these

    @property
    def end(self) -> int: return self.start + self.num_tokens

# %%
@dataclass(frozen=True)
class SchedulerOutput:
    "One step as it was scheduled: a snapshot, whatever becomes of the sequences."
    scheduled: tuple[ScheduledSequence, ...]
    num_admitted: int = 0                 # of these, the last so many begin to compute
    removed: tuple[Sequence, ...] = ()    # those that gave their blocks back before

    def __bool__(self): return len(self.scheduled) > 0

    @property
    def admitted(self) -> tuple[ScheduledSequence, ...]:
        "Those that begin, or begin again after a preemption."
        return self.scheduled[len(self.scheduled) - self.num_admitted:]

    @property
    def sampled(self) -> list[ScheduledSequence]:
        "Those that get a new token."
        return [s for s in self.scheduled if s.samples]

# %%
class BlockPool:
    "Blocks 0 to `num_blocks`-1 of `block_size` slots: who uses them, which are free."
    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_counts = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # next one first

    def allocate(self) -> int:
        "Take the first free block; the caller has the only reference."
        block, _ = self.free_blocks.popitem(last=False)
        self.ref_counts[block] = 1
        return block

    def touch(self, block: int):
        "Add a reference to `block`, which may be free: then it is free no more."
        if self.ref_counts[block] == 0: del self.free_blocks[block]
        self.ref_counts[block] += 1

    def free(self, block: int, keep: bool = False):
        """Give back one reference; the last one makes the block free.

        It is handed out next or, if what it holds is worth keeping, as the last."""
        self.ref_counts[block] -= 1
        if self.ref_counts[block]: return
        self.free_blocks[block] = None
        if not keep: self.put_first(block)

    def put_first(self, block: int):
        "If `block` is free, let it be the next to be handed out."
        if block in self.free_blocks: self.free_blocks.move_to_end(block, last=False)
