"Laws 1, 2, 4 and 5 over random workloads (`make fuzz` runs many more)."
import os
from collections import Counter

import pytest
from fuzz import run_workload
from nano_vllm import prefix_cache
from nano_vllm.kv_blocks import BlockPool
from nano_vllm.prefix_cache import PrefixCachingPool
from nano_vllm.scheduler import Scheduler

NUM_WORKLOADS = int(os.environ.get("NANO_VLLM_FUZZ", 1500))


def test_random_workloads():
    total = Counter()
    for seed in range(NUM_WORKLOADS): total.update(run_workload(seed))
    print(dict(total))
    assert total["finished"] > NUM_WORKLOADS and total["preempted"] > NUM_WORKLOADS / 10
    assert total["refused"] > NUM_WORKLOADS / 50  # the hard cases did occur


def caught(seeds=60):
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        for seed in range(seeds): run_workload(seed)


# The fuzz bites: each of these plants one bug and expects it to be found.

def test_catches_a_leak(monkeypatch):
    def free(self, seq):
        for block in seq.block_table[1:]: self.release(block)
        seq.block_table.clear()
        seq.num_computed_tokens = 0
    monkeypatch.setattr(BlockPool, "free", free)
    caught()


def test_catches_trusting_the_hash(monkeypatch):
    monkeypatch.setattr(PrefixCachingPool, "find", lambda self, hash, parent, tokens: self.cached.get(hash))
    caught()


def test_catches_ignoring_the_parent(monkeypatch):
    def find(self, hash, parent, tokens):
        block = self.cached.get(hash)
        return block if block is not None and self.entries[block].tokens == tokens else None
    monkeypatch.setattr(PrefixCachingPool, "find", find)
    caught(300)


def test_catches_early_registration(monkeypatch):
    start = PrefixCachingPool.start
    def eager(self, seq, matched, spare=0):
        ok = start(self, seq, matched, spare)
        if ok:
            computed, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_tokens
            self.register(seq)
            seq.num_computed_tokens = computed
        return ok
    monkeypatch.setattr(PrefixCachingPool, "start", eager)
    caught()


def test_catches_a_stalled_decode(monkeypatch):
    continue_running = Scheduler.continue_running
    def forget_the_youngest(self):
        work = continue_running(self)
        return work[:-1] or work
    monkeypatch.setattr(Scheduler, "continue_running", forget_the_youngest)
    caught()


def test_catches_forgotten_eviction(monkeypatch):
    monkeypatch.setattr(PrefixCachingPool, "allocate", BlockPool.allocate)
    caught()
