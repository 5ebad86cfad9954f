"One budget of tokens for each step, handed out oldest first. Everything else follows."

# %%
from collections import OrderedDict
from itertools import islice
from nano_vllm.kv_blocks import (ScheduledSequence, SchedulerOutput, Sequence,
                                 blocks_needed)
from nano_vllm.prefix_cache import KVCacheManager

# %%
def check_fits(prompt_len: int, max_tokens: int | None, max_model_len: int,
               num_blocks: int, block_size: int):
    "Raise ValueError unless a request can finish, alone in the pool if need be."
    if prompt_len >= max_model_len:
        raise ValueError(f"the prompt has {prompt_len} tokens, but max_model_len is "
                         f"{max_model_len} and at least one token must be generated")
    longest = min(prompt_len + (max_tokens or max_model_len), max_model_len)
    needed = blocks_needed(longest - 1, block_size)
    if needed > num_blocks:
        raise ValueError(f"{prompt_len} prompt tokens and max_tokens={max_tokens} need "
                         f"{needed} KV blocks, but num_kv_blocks is {num_blocks}")

# %%
def num_missing(seq: Sequence) -> int:
    "How many tokens of `seq` have no KV yet; the last it may have needs none."
    known = seq.num_tokens + seq.num_output_placeholders
    return min(known, seq.max_len - 1) - seq.num_computed_tokens


def waits_for_token(seq: Sequence) -> bool:
    "Must a token that is being sampled be known before the next one can be chosen?"
    return seq.num_output_placeholders > 0 and seq.params.has_penalty

def next_tokens(seq: Sequence, num_tokens: int, missing: int) -> ScheduledSequence:
    "The next `num_tokens` of the `missing` tokens of `seq`; after the last it samples."
    return ScheduledSequence(seq, seq.num_computed_tokens, num_tokens,
                             num_tokens == missing)

# %%
class Scheduler:
    "Decides who computes how many tokens in each step: one budget, oldest first."
    def __init__(self, manager: KVCacheManager, max_num_seqs: int,
                 max_num_batched_tokens: int, long_prefill_token_threshold: int = 0):
        self.manager, self.budget = manager, max_num_batched_tokens
        self.max_tokens_per_sequence = (long_prefill_token_threshold
                                        or max_num_batched_tokens)
        self.max_running = min(max_num_seqs, max_num_batched_tokens)
        self.num_preemptions = 0
        self.reset([])

    def reset(self, sequences: list[Sequence]):
        "Begin anew: all blocks are free, and the `sequences` wait with their tokens."
        self.manager.reset()
        for seq in sequences: seq.reset()
        self.waiting = OrderedDict.fromkeys(sequences)
        self.running: dict[Sequence, None] = {}   # in order of admission
        self.removed: list[Sequence] = []         # since the last step

    def add(self, seq: Sequence):
        "Queue a sequence, which `check_fits` must have passed."
        self.waiting[seq] = None

    def schedule(self) -> SchedulerOutput:
        "The next step; its tokens never exceed the budget."
        before, admitted = self.num_preemptions, []
        scheduled = self.schedule_running()
        if self.num_preemptions == before:
            left = self.budget - sum(s.num_tokens for s in scheduled)
            admitted = self.schedule_waiting(left)
        output = SchedulerOutput((*scheduled, *admitted), len(admitted),
                                 tuple(self.removed))
        if output: self.removed.clear()     # an empty step is told to nobody
        for s in output.scheduled:
            s.seq.num_computed_tokens += s.num_tokens
            s.seq.num_output_placeholders += s.samples
        return output

    def schedule_running(self) -> list[ScheduledSequence]:
        "Oldest first, as many missing tokens as the budget allows."
        scheduled, budget = [], self.budget
        for i, seq in enumerate(list(self.running)):
            if seq not in self.running: break           # preempted, as all after it
            if waits_for_token(seq): continue
            missing = num_missing(seq)
            if not self.preempt_until_fits(seq, seq.num_computed_tokens + missing):
                break
            reserved = len(self.running) - 1 - i        # one token for each younger
            num_tokens = min(missing, self.max_tokens_per_sequence, budget - reserved)
            if num_tokens: scheduled.append(next_tokens(seq, num_tokens, missing))
            budget -= num_tokens
        return scheduled

    def preempt_until_fits(self, seq: Sequence, num_tokens: int) -> bool:
        "Blocks for `seq`, if need be from the newest; False if that is `seq` itself."
        if self.manager.sliding_window: self.manager.free_behind_window(seq)
        while not self.manager.allocate_slots(seq, num_tokens):
            newest, _ = self.running.popitem()
            self.remove(newest)
            self.waiting[newest] = None
            self.waiting.move_to_end(newest, last=False)
            self.num_preemptions += 1
            if newest is seq: return False
        return True

    def schedule_waiting(self, budget: int) -> list[ScheduledSequence]:
        "Let waiting sequences in, in order, while budget, room and memory last."
        scheduled, room = [], self.max_running - len(self.running)
        for seq in list(islice(self.waiting, room)):
            if budget == 0: break
            computed = []
            if seq.params.prompt_logprobs is None:
                computed = self.manager.get_computed_blocks(seq)
            if self.manager.has_pending_prefix(seq, len(computed)): continue
            if not self.manager.allocate_slots(seq, seq.num_tokens, computed,
                                               watermark=len(self.running)): break
            del self.waiting[seq]
            self.running[seq] = None
            missing = num_missing(seq)
            num_tokens = min(missing, self.max_tokens_per_sequence, budget)
            scheduled.append(next_tokens(seq, num_tokens, missing))
            budget -= num_tokens
        return scheduled

    def update(self, output: SchedulerOutput, token_ids: list[int]):
        "Book a computed step: `token_ids` are one for each of `output.sampled`."
        for s, token in zip(output.sampled, token_ids, strict=True):
            s.seq.num_output_placeholders -= 1
            if s.seq.finish_reason is None: s.seq.output_token_ids.append(token)
        size = self.manager.block_size
        for s in output.scheduled:
            fills_a_block = s.end // size > s.start // size
            if fills_a_block and s.seq in self.running:
                self.manager.cache_blocks(s.seq, s.end)

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None):
        "Take `seq` out, running or waiting, and give its blocks back."
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        if seq in self.waiting:
            del self.waiting[seq]
        else:
            del self.running[seq]
            self.remove(seq)

    def remove(self, seq: Sequence):
        "Give back the blocks of a sequence that is not running any more."
        self.manager.free(seq)
        self.removed.append(seq)
