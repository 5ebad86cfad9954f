"Laws 1, 2, 4 and 5 over random workloads (`make fuzz` runs many more)."
import os
from collections import Counter

import pytest
from fuzz import HybridWorkload, plant, run_workload
from nano_vllm.kv_blocks import BlockPool
from nano_vllm.prefix_cache import KVCacheManager, PrefixCache
from nano_vllm.scheduler import Scheduler
from nano_vllm.sliding_windows import HybridKVCacheManager, HybridPrefixCache

NUM_WORKLOADS = int(os.environ.get("NANO_VLLM_FUZZ", 1500))


def test_random_workloads():
    total = Counter()
    for seed in range(NUM_WORKLOADS): total.update(run_workload(seed))
    print(dict(total))
    assert total["finished"] > NUM_WORKLOADS and total["preempted"] > NUM_WORKLOADS / 10
    assert total["refused"] > NUM_WORKLOADS / 50  # the hard cases did occur


def test_random_workloads_with_layers_in_groups():
    total = Counter()
    for seed in range(NUM_WORKLOADS // 3): total.update(run_workload(seed, HybridWorkload))
    print(dict(total))
    assert total["finished"] > NUM_WORKLOADS / 3 and total["preempted"] > NUM_WORKLOADS / 30
    assert total["right"] > NUM_WORKLOADS / 30 and total["wrong"] > NUM_WORKLOADS / 30


def caught(seeds=60, *kind):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError, TypeError)):
        for seed in range(seeds): run_workload(seed, *kind)


# The fuzz bites: each of these plants one bug and expects it to be found.

def test_catches_a_leak(monkeypatch):
    def free(self, seq):
        for block in seq.block_table[1:]: self.release(block)
        seq.reset()
    monkeypatch.setattr(KVCacheManager, "free", free)
    caught()


def test_catches_trusting_the_hash(monkeypatch):
    monkeypatch.setattr(PrefixCache, "find", lambda self, hash, parent, tokens: self.block_of.get(hash))
    caught()


def test_catches_ignoring_the_parent(monkeypatch):
    def find(self, hash, parent, tokens):
        block = self.block_of.get(hash)
        return block if block is not None and self.entries[block].tokens == tokens else None
    monkeypatch.setattr(PrefixCache, "find", find)
    caught(300)


def test_catches_early_registration(monkeypatch):
    allocate_slots = KVCacheManager.allocate_slots
    def eager(self, seq, num_tokens, computed_blocks=(), watermark=0):
        begins = not seq.block_table
        ok = allocate_slots(self, seq, num_tokens, computed_blocks, watermark)
        if ok and begins: self.cache_blocks(seq, seq.num_tokens)
        return ok
    monkeypatch.setattr(KVCacheManager, "allocate_slots", eager)
    caught()


def test_catches_a_stalled_decode(monkeypatch):
    schedule_running = Scheduler.schedule_running
    def forget_the_youngest(self):
        scheduled = schedule_running(self)
        return scheduled[:-1] or scheduled
    monkeypatch.setattr(Scheduler, "schedule_running", forget_the_youngest)
    caught()


def test_catches_forgotten_eviction(monkeypatch):
    monkeypatch.setattr(KVCacheManager, "new_block", lambda self: self.pool.allocate())
    caught()


PLANTED = {
    "a placeholder that stays": (Scheduler, "update", "num_output_placeholders -= s.samples", "num_output_placeholders -= 0"),
    "a token too few behind a window": (KVCacheManager, "free_behind_window", "computed_tokens + 1 -", "computed_tokens + 2 -"),
    "a block too many behind a window": (KVCacheManager, "free_behind_window", "last = min(unseen // self.block_size",
                                         "last = min(unseen // self.block_size + 1"),
    "a block behind a window that is not noted": (KVCacheManager, "free_behind_window", "num_released_blocks = i + 1",
                                                  "num_released_blocks = i"),
    "blocks behind a window are given back twice": (KVCacheManager, "free", "seq.block_table[seq.num_released_blocks:]",
                                                    "seq.block_table"),
    "kept blocks first": (BlockPool, "free", "if not keep", "if keep"),
    "no block first": (BlockPool, "free", "if not keep", "if False"),
    "findable blocks are released as if they were not": (KVCacheManager, "release", "is not None", "is None"),
    "what gives way keeps its place": (KVCacheManager, "cache_blocks", "self.pool.put_first(replaced)", "pass"),
    "put_first puts last": (BlockPool, "put_first", "last=False", "last=True"),
    "a sequence that is gone is waited for": (KVCacheManager, "free", "if self.pending.get(hash) is seq: del self.pending[hash]",
                                              "pass"),
    "revived blocks count as free": (KVCacheManager, "allocate_slots", "missing + revived + watermark", "missing + watermark"),
    "a whole prompt is found": (KVCacheManager, "get_computed_blocks", "(seq.num_tokens - 1)", "(seq.num_tokens)"),
    "touched blocks stay free": (BlockPool, "touch", "del self.free_blocks[block]", "pass"),
    "over budget": (Scheduler, "schedule_running", "budget - reserved)", "missing)"),
    "wrong guesses count as computed": (Scheduler, "take_back", "s.seq.num_computed_tokens = end", "pass"),
    "wrong guesses are cached": (Scheduler, "take_back", "return min(end, s.seq.num_tokens)", "return s.end"),
    "right guesses are lost": (Scheduler, "update", "(*accepted[s.seq], token)", "(token,)"),
    "guesses keep their placeholders": (Scheduler, "update", "-= s.samples", "-= 1"),
    "guesses keep their blocks": (Scheduler, "fit_guesses", "self.manager.free_after(seq, known + guesses)", "pass"),
    "guesses beyond the end": (Scheduler, "fit_guesses", "min(room - missing, seq.max_len - 1 - known)", "room - missing"),
    "guesses over budget": (Scheduler, "fit_guesses", "min(room - missing, seq.max_len - 1 - known)", "seq.max_len - 1 - known"),
    "blocks of guesses are given back twice": (KVCacheManager, "free_after", "seq.block_table.pop()", "seq.block_table[-1]); self.release(seq.block_table.pop()"),
    "a preempted sequence is forgotten": (Scheduler, "preempt_until_fits", "self.waiting[newest] = None", "return False"),
    "a preempted sequence keeps its blocks": (Scheduler, "preempt_until_fits", "self.remove(newest)", "pass"),
    "an ended sequence keeps its blocks": (Scheduler, "finish", "self.remove(seq)", "pass"),
    "admission into a pool that is full": (Scheduler, "schedule_waiting", "watermark=len(self.running)", "watermark=-1"),
}


@pytest.mark.parametrize("owner, name, old, new", PLANTED.values(), ids=PLANTED)
def test_catches(monkeypatch, owner, name, old, new):
    plant(monkeypatch, owner, name, old, new)
    caught(400)


def test_catches_nothing_where_nothing_is_planted(monkeypatch):
    for owner, name in {bug[:2] for bug in PLANTED.values()}: plant(monkeypatch, owner, name, f"def {name}", f"def {name}")
    for seed in range(60): run_workload(seed)


HYBRID = {
    "a token too few in sight": (HybridKVCacheManager, "num_unseen", "+ 1 - self", "+ 2 - self"),
    "a block too many behind the window": (HybridKVCacheManager, "free_behind_window", "last = min(", "last = 1 + min("),
    "columns behind the window are not noted": (HybridKVCacheManager, "free_behind_window", "num_released_blocks = i + 1", "num_released_blocks = i"),
    "columns are kept when all ends": (HybridKVCacheManager, "free", "for block in column: self.release(block)", "pass"),
    "columns behind the window are kept": (HybridKVCacheManager, "free_behind_window", "self.release(block)", "pass"),
    "a hit without the window's blocks": (HybridKVCacheManager, "get_computed_blocks", "columns[i] is None]", "False]"),
    "shared columns stay free": (HybridKVCacheManager, "begin", "self.pool.touch(block)", "pass"),
    "revived columns count as free": (HybridKVCacheManager, "allocate_slots", "+ revived +", "+"),
    "columns count as one block": (HybridKVCacheManager, "allocate_slots", "columns * groups", "columns"),
    "a chunk too short": (HybridKVCacheManager, "num_missing_columns", "start + self.max_chunk", "start + self.max_chunk - 1"),
    "columns of guesses are kept": (HybridKVCacheManager, "free_after", "self.release(block)", "pass"),
    "named by the wrong block": (HybridPrefixCache, "cache_column", "(uid, group)\n", "(uid, 0)\n"),
    "findable through nothing": (HybridPrefixCache, "evict", "if local is None: continue", "continue"),
    "a name outlives its block": (HybridPrefixCache, "evict", "self.names[block] = None", "pass"),
    "what nobody finds keeps its place": (HybridPrefixCache, "evict", "self.pool.put_first(local)", "pass"),
    "named after what is gone": (HybridPrefixCache, "cache_column", "or entry.uid != uid", ""),
    "findable columns are released as if they were not": (HybridKVCacheManager, "release", "is_findable(block)", "entries[block] is not None"),
}


@pytest.mark.parametrize("owner, name, old, new", HYBRID.values(), ids=HYBRID)
def test_catches_in_groups(monkeypatch, owner, name, old, new):
    plant(monkeypatch, owner, name, old, new)
    caught(400, HybridWorkload)
