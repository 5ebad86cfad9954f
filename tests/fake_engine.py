"""An engine with everything in it but a model: each slot of its cache holds the text that it was written for.

So reading a slot tells whether the engine would have read the right KV, and a token is a function of text and seed: what a
request is to answer is known beforehand, whoever shares its steps and whatever interrupts them.
"""
import random
from collections import Counter

import numpy as np
import torch

from nano_vllm.attention import make_batch
from nano_vllm.engine import Engine, InputProcessor, OutputProcessor
from nano_vllm.layers import TensorParallelGroup
from nano_vllm.model_runner import InputBatch, StepHandle
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampler import SamplingMetadata
from nano_vllm.scheduler import Scheduler

EOS, VOCAB = 0, 100


class LetterTokenizer:
    "Token 1 is the letter B, and so on: enough for the detokenizer."
    eos_token_id = EOS

    def token_bytes(self, token_id, skip_special_tokens=True, first=False):
        return b"" if token_id == EOS else bytes([65 + token_id % 50])

    def decode(self, ids, skip_special_tokens=True): return "".join(chr(65 + i % 50) for i in ids)


def answer(text, seed):
    "The token after `text`."
    rng = random.Random(hash((tuple(text), seed)))
    return EOS if rng.random() < 0.04 else rng.randint(1, 3)


class FakeRunner:
    "Computes steps over real rows and batches, and checks all that it reads."
    graphs = None

    def __init__(self, num_blocks, block_size, max_num_seqs, max_model_len, window=None):
        self.kv, self.block_size, self.window = [None] * (num_blocks * block_size), block_size, window
        self.group = TensorParallelGroup()
        self.input_batch = InputBatch(max_num_seqs, max_model_len, block_size, torch.device("cpu"))

    def clear(self): self.input_batch.clear()

    def execute(self, output):
        self.input_batch.update(output)
        batch, inputs = self.input_batch.prepare(output)
        self.check(batch, inputs)
        at, ids = 0, []
        for s, table, new, context in zip(inputs.scheduled, batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
            text = self.compute(s, table, batch.token_ids[at:at + new].tolist(), batch.slot_mapping[at:at + new].tolist(), int(context))
            if s.samples: ids.append(answer(text, s.seq.seed))
            at += new
        ids = torch.tensor(ids, dtype=torch.int64)
        self.input_batch.device.last_token[inputs.sampled_rows] = ids
        return StepHandle(output, inputs.sampled, ids, {}, [])

    def compute(self, s, table, token_ids, slots, context):
        "Write a sequence's new slots, read those it sees; its text."
        size, text = self.block_size, s.seq.tokens(0, s.start)
        if len(text) < s.start: text = list(self.kv[table[(s.start - 1) // size] * size + (s.start - 1) % size])
        for token, slot in zip(token_ids, slots):
            text = [*text, token]
            self.kv[slot] = tuple(text)
        assert len(text) == context
        first = 0 if self.window is None else max(0, s.start + 1 - self.window)
        for p in range(first, context):
            assert self.kv[table[p // size] * size + p % size] == tuple(text[:p + 1]), "wrong KV is read"
        return text

    def check(self, batch, inputs):
        "The batch is the oracle's, made from lists; so is what the sampler reads."
        scheduled = inputs.scheduled
        rows = [self.input_batch.row_of[s.seq] for s in scheduled]
        assert rows == sorted(rows) and len(self.input_batch.seqs) == len(self.input_batch.row_of)
        known = [s for s in scheduled if s.end <= s.seq.num_tokens]
        if len(known) < len(scheduled) or any(s.seq.num_released_blocks for s in scheduled): return
        oracle = make_batch(scheduled, self.block_size)
        for name, value in vars(oracle).items():
            if name == "block_tables": continue
            assert np.array_equal(np.asarray(value), np.asarray(getattr(batch, name))), name
        for s, table in zip(scheduled, batch.block_tables.tolist()):
            assert table[:len(s.seq.block_table)] == s.seq.block_table
        metadata = SamplingMetadata.of([s.seq for s in scheduled if s.samples])
        for name, value in vars(metadata).items():
            if isinstance(value, torch.Tensor): assert torch.equal(value, getattr(inputs.metadata, name)), name


def fake_engine(num_blocks=30, block_size=4, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=60, window=None,
                num_in_flight=1, threshold=0, **inputs):
    "The engine; `inputs` go to its InputProcessor."
    tokenizer = LetterTokenizer()
    manager = KVCacheManager(num_blocks, block_size, window)
    return Engine(InputProcessor(tokenizer, VOCAB, max_model_len, num_blocks, block_size, {EOS}, **inputs),
                  Scheduler(manager, max_num_seqs, max_num_batched_tokens, threshold),
                  FakeRunner(num_blocks, block_size, max_num_seqs, max_model_len, window),
                  OutputProcessor(tokenizer, {EOS}), num_in_flight)


def expected(request):
    "The token ids of each of a request's answers, if it were alone in the world."
    return [expected_ids(c.seq) for c in request.completions]


def expected_ids(seq):
    ids, stop = [], set(seq.stop_token_ids)
    while True:
        ids.append(answer(seq.prompt_token_ids + ids, seq.seed))
        if ids[-1] in stop or len(seq.prompt_token_ids) + len(ids) == seq.max_len: return ids


def check_books(engine):
    "Law 1: blocks are free or held, and reference counts are those of the tables."
    manager, scheduler = engine.scheduler.manager, engine.scheduler
    live = [*scheduler.running, *scheduler.waiting]
    held = Counter(b for seq in live for b in seq.block_table[seq.num_released_blocks:])
    assert manager.pool.ref_counts == [held[b] for b in range(manager.pool.num_blocks)], "references"
    assert set(manager.pool.free_blocks) == set(range(manager.pool.num_blocks)) - set(held), "partition"
    assert all(seq in scheduler.running for seq in manager.pending.values()), "a pending owner is gone"


def assert_all_free(engine):
    "Nothing is under way and nothing was left behind."
    pool = engine.scheduler.manager.pool
    assert sorted(pool.free_blocks) == list(range(pool.num_blocks)) and not any(pool.ref_counts)
    assert not engine.scheduler.manager.pending and not engine.requests
    assert not engine.scheduler.waiting and not engine.scheduler.running
