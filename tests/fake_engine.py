"""An engine with everything in it but a model: each slot of its cache holds the text that it was written for.

So reading a slot tells whether the engine would have read the right KV, and a token is a function of text and seed: what a
request is to answer is known beforehand, whoever shares its steps and whatever interrupts them.
"""
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from nano_vllm.attention import make_batch, prompt_positions
from nano_vllm.engine import Engine
from nano_vllm.request import InputProcessor, OutputProcessor, with_text
from nano_vllm.layers import TensorParallelGroup
from nano_vllm.llm import new_outputs, progress
from nano_vllm.model_runner import InputBatch, StepHandle
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampler import SamplingMetadata, compute_logprobs, gather_logprobs
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler
from nano_vllm.speculative import Speculator

EOS, VOCAB = 0, 100


class LetterTokenizer:
    "Token 1 is the letter B, and so on: enough for the detokenizer."
    eos_token_id = EOS

    def token_bytes(self, token_id, skip_special_tokens=True, first=False):
        return b"" if token_id == EOS else bytes([65 + token_id % 50])

    def decode(self, ids, skip_special_tokens=True): return "".join(chr(65 + i % 50) for i in ids)
    def token_text(self, token_id, before=()): return self.decode([token_id])


def answer(text, seed):
    "The token after `text`."
    rng = random.Random(hash((tuple(text), seed)))
    return EOS if rng.random() < 0.04 else rng.randint(1, 3)


@lru_cache(10_000)
def logits_after(text):
    "Logits (1, VOCAB) after `text`, a tuple: what log-probabilities are made of. Tokens are not drawn from them."
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(hash(text) % 2**62))


class FakeRunner:
    "Computes steps over real rows and batches, and checks all that it reads. `own_tables`: the device has a copy, as a GPU has."
    graphs = None

    def __init__(self, num_blocks, block_size, max_num_seqs, max_model_len, window=None, own_tables=False):
        self.kv, self.block_size, self.window = [None] * (num_blocks * block_size), block_size, window
        self.group = TensorParallelGroup()
        self.input_batch = InputBatch(max_num_seqs, max_model_len, block_size, torch.device("cpu"))
        if own_tables: self.input_batch.device.block_tables = self.input_batch.device.block_tables.clone()
        self.sampled, self.num_unknown = {}, 0     # each sequence's last token; how many of them the host did not know in time

    def clear(self):
        self.input_batch.clear()
        self.sampled.clear()

    def execute(self, output):
        for seq in output.removed: self.sampled.pop(seq, None)
        self.input_batch.update(output)
        batch, inputs = self.input_batch.prepare(output)
        self.check(batch, inputs, output)
        at, ids, logprobs, prompt_logprobs = 0, [], {}, []
        for s, table, new, context in zip(inputs.scheduled, batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
            token_ids, slots = (x[at:at + new].tolist() for x in (batch.token_ids, batch.slot_mapping))
            text = self.compute(s, table, token_ids, slots, int(context))
            for n in range(s.samples):
                before = text[:len(text) - len(s.spec_token_ids) + n]
                ids.append(answer(before, s.seq.seed))
                if s.seq.params.logprobs is not None:
                    logprobs[len(ids) - 1] = gather_logprobs(logits_after(tuple(before)), ids[-1:], s.seq.params.logprobs)
            if places := prompt_positions(s): prompt_logprobs.append((s.seq, places[0] + 1, rate_prompt(s.seq, places)))
            at += new
        self.sampled.update(zip(inputs.sampled, ids))
        ids = torch.tensor(ids, dtype=torch.int64)
        self.input_batch.device.last_token[inputs.sampled_rows] = ids
        return StepHandle(output, inputs.sampled, ids, logprobs, prompt_logprobs)

    def compute(self, s, table, token_ids, slots, context):
        "Write a sequence's new slots, read those it sees; its text."
        size, text = self.block_size, s.seq.tokens(0, s.start)
        if len(text) < s.start: text = list(self.kv[table[(s.start - 1) // size] * size + (s.start - 1) % size])
        for token, slot in zip(token_ids, slots):
            text = [*text, token]
            self.kv[slot] = tuple(text)
        assert len(text) == context, "a key was written for a text of another length"
        first = 0 if self.window is None else max(0, s.start + 1 - self.window)
        for p in range(first, context):
            assert self.kv[table[p // size] * size + p % size] == tuple(text[:p + 1]), "wrong KV is read"
        return text

    def known(self, s):
        "What is scheduled, for a sequence that has the token which the host may not know yet."
        seq = s.seq
        if s.spec_token_ids:
            assert s.end - len(s.spec_token_ids) == seq.num_tokens and s.samples == 1 + len(s.spec_token_ids), "guesses out of place"
            return s._replace(seq=replace(seq, output_token_ids=seq.output_token_ids[:]))
        if s.end <= seq.num_tokens: return s._replace(seq=replace(seq, output_token_ids=seq.output_token_ids[:]))
        assert s.end == seq.num_tokens + 1 and seq.num_output_placeholders, "two tokens are unknown"
        assert not s.samples or not seq.params.has_penalty, "the sampler would miss a token"
        self.num_unknown += 1
        return s._replace(seq=replace(seq, output_token_ids=[*seq.output_token_ids, self.sampled[seq]]))

    def check(self, batch, inputs, output):
        "The batch is the oracle's, made from lists; so is what the sampler reads."
        rows, seqs = self.input_batch.row_of, self.input_batch.seqs
        assert [rows[s] for s in seqs] == list(range(len(rows))), "rows with gaps"
        assert [rows[s.seq] for s in inputs.scheduled] == inputs.rows.tolist() == sorted(inputs.rows)
        assert sorted(map(id, inputs.scheduled)) == sorted(map(id, output.scheduled))
        scheduled = [self.known(s) for s in inputs.scheduled]
        oracle = make_batch(scheduled, self.block_size)
        for name, value in vars(oracle).items():
            if name == "block_tables": continue
            assert np.array_equal(np.asarray(value), np.asarray(getattr(batch, name))), name
            assert value.dtype == getattr(batch, name).dtype, name
        for s, table in zip(scheduled, batch.block_tables.tolist()):
            released, held = s.seq.num_released_blocks, len(s.seq.block_table)
            assert table[released:held] == s.seq.block_table[released:], "block tables"
            assert all(0 <= block < len(self.kv) // self.block_size for block in table), "no block's number"
        texts = [replace(s.seq, output_token_ids=[*s.seq.output_token_ids, *s.spec_token_ids[:n]]) for s in scheduled for n in range(s.samples)]
        metadata = SamplingMetadata.of(texts)
        for name, value in vars(metadata).items():
            if isinstance(value, torch.Tensor): assert torch.equal(value, getattr(inputs.metadata, name)), name
        assert inputs.sampled == [s.seq for s in inputs.scheduled for _ in range(s.samples)]
        for whole, seen, seq in zip(texts, inputs.metadata.sequences, inputs.sampled, strict=True):
            has_guesses = len(whole.output_token_ids) > len(seq.output_token_ids) and seq.num_output_placeholders > 1
            assert seen is seq or has_guesses and seq.params.has_penalty, "another sequence than the one that samples"
            if seq.params.has_penalty: assert seen.output_token_ids == whole.output_token_ids, "the sampler misses a token"
        assert inputs.sampled_rows.tolist() == [rows[seq] for seq in inputs.sampled]


def rate_prompt(seq, places):
    "The entries of the prompt tokens after `places`."
    prompt = seq.prompt_token_ids
    return [compute_logprobs(logits_after(tuple(prompt[:p + 1])), [prompt[p + 1]], seq.params.prompt_logprobs)[0] for p in places]


class Prophet:
    "Guesses what a sequence will say: as a rule rightly, now and then with a token that it will not say, or not at all."

    def __init__(self, most): self.most, self.rng = most, random.Random(most)

    def guess(self, seqs, lengths):
        assert all(seq.num_output_placeholders == 0 and seq.num_tokens == seq.num_computed_tokens + 1 for seq in seqs), "too early"
        return [self.guess_one(seq, self.rng.randint(0, min(n, self.most))) for seq, n in zip(seqs, lengths)]

    def guess_one(self, seq, num_tokens):
        text = seq.tokens(0, seq.num_tokens)
        for _ in range(num_tokens): text.append(answer(text, seq.seed) if self.rng.random() < 0.8 else self.rng.randint(0, 3))
        return text[seq.num_tokens:]

    def seconds(self, num_seqs): return 0, 0


def fake_engine(num_blocks=30, block_size=4, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=60, window=None,
                num_in_flight=1, threshold=0, own_tables=False, guesses=0, scheduler=Scheduler, **inputs):
    "The engine; `inputs` go to its InputProcessor. `guesses`: the most for a sequence in a step."
    tokenizer = LetterTokenizer()
    manager = KVCacheManager(num_blocks, block_size, window)
    return Engine(InputProcessor(tokenizer, VOCAB, max_model_len, num_blocks, block_size, {EOS}, **inputs),
                  scheduler(manager, max_num_seqs, max_num_batched_tokens, threshold),
                  FakeRunner(num_blocks, block_size, max_num_seqs, max_model_len, window, own_tables),
                  OutputProcessor(tokenizer, {EOS}), num_in_flight, Speculator(Prophet(guesses), guesses, 100) if guesses else None)


# ---- what it is to answer

@dataclass
class Expected:
    "An answer to its end."
    token_ids: list
    text: str
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list | None = None


def said(ids): return "".join(LetterTokenizer().token_bytes(t).decode() for t in ids)


def expected(request):
    "The token ids of each of a request's answers, if it were alone in the world."
    return [expected_answer(c.seq).token_ids for c in request.completions]


def expected_answer(seq):
    "What a sequence says if it is alone in the world; its seed, prompt and parameters decide."
    ids, p, tokenizer = [], seq.params, LetterTokenizer()
    entries = None if p.logprobs is None else []

    def ended(text, reason, stop_reason=None): return Expected(ids, text, reason, stop_reason, entries)

    while True:
        text = tuple(seq.prompt_token_ids + ids)
        ids.append(answer(text, seq.seed))
        if entries is not None: entries += with_text(compute_logprobs(logits_after(text), ids[-1:], p.logprobs), tokenizer)
        if ids[-1] in seq.stop_token_ids: return ended(said(ids[:-1]), "stop", None if ids[-1] == EOS else ids[-1])
        # a token is a letter at most, so only the end is new; a stop string may begin among the first `min_tokens`
        hits = [s for s in p.stop if said(ids).endswith(s)] if len(ids) > p.min_tokens and said(ids[-1:]) else []
        if hits: return ended(said(ids)[:-len(max(hits, key=len))], "stop", max(hits, key=len))
        if len(text) + 1 == seq.max_len: return ended(said(ids), "length")


def expected_prompt_logprobs(request):
    "The same for the prompt; None where nobody asked."
    seq = request.completions[0].seq
    if seq.params.prompt_logprobs is None: return None
    return [None, *with_text(rate_prompt(seq, range(len(seq.prompt_token_ids) - 1)), LetterTokenizer())]


# ---- who asks

def some_params(rng, penalties=0.3):
    "Wishes of all kinds; `penalties` of them need their tokens at once."
    p = dict(n=rng.choice([1, 1, 1, 3]), max_tokens=rng.randint(1, rng.choice([20, 40])))
    p |= rng.choice([{}, {}, {}, dict(stop=["BCD", "DD"]), dict(stop_token_ids=[3]), dict(ignore_eos=True),
                     dict(stop="CC", min_tokens=min(p["max_tokens"], 4)), dict(top_k=5, top_p=.9, min_p=.1)])
    if rng.random() < penalties:
        p |= rng.choice([dict(repetition_penalty=1.1), dict(presence_penalty=.5), dict(frequency_penalty=-1)])
    p |= dict(speculative=rng.random() < 0.8)
    rated = rng.choice([{}, {}, {}, {}, dict(logprobs=2), dict(prompt_logprobs=0), dict(logprobs=0, prompt_logprobs=1)])
    return SamplingParams(**p | rated)


class Asker:
    "Who asked for some answers, and reads them as they come (`streams`), or at their end."

    def __init__(self, engine, requests, streams):
        self.engine, self.requests, self.streams = engine, requests, streams
        self.expected = {r: [expected_answer(c.seq) for c in r.completions] for r in requests}
        self.ids = {r: [[] for _ in r.completions] for r in requests}
        self.text, self.logprobs = ({r: [kind() for _ in r.completions] for r in requests} for kind in (str, list))
        self.aborted, self.ended, self.outputs = set(), False, {}
        self.stream = new_outputs(engine, requests) if streams else progress(engine, requests)

    def read(self):
        piece = next(self.stream, None)
        if piece is None: self.ended = True
        elif not self.streams: self.take(piece, piece.output())
        else: self.take(next(r for r in self.requests if r.request_id == piece.request_id), piece)

    def take(self, request, piece):
        assert request not in self.outputs, "a request ends twice"
        for o in piece.outputs:
            self.ids[request][o.index] += o.token_ids
            self.text[request][o.index] += o.text
            self.logprobs[request][o.index] += o.logprobs or []
        if piece.finished: self.outputs[request] = piece
        assert piece.finished or self.streams

    def abort_one(self, rng):
        "Abort a request; it ends with what it has."
        request = rng.choice(self.requests)
        if request.request_id in self.engine.requests: self.aborted.add(request)
        self.engine.abort(request.request_id)        # no effect before it is asked for, and after its end
        assert request.finished or request not in self.aborted

    def check(self, interrupted=False):
        "All ended, with what they say alone. If something was `interrupted`, an abort may have come after the last token."
        assert self.outputs.keys() == set(self.requests), "a request did not end"
        for r, answers in self.expected.items():
            for e, o, ids, text, logprobs in zip(answers, self.outputs[r].outputs, self.ids[r], self.text[r], self.logprobs[r]):
                assert ids == e.token_ids[:len(ids)], "not what it says alone"
                assert logprobs == (e.logprobs or [])[:len(ids)], "log-probabilities"
                assert (o.cumulative_logprob is None) == (e.logprobs is None)
                if e.logprobs is not None: assert o.cumulative_logprob == sum(entry[t].logprob for t, entry in zip(ids, logprobs))
                if o.finish_reason == "abort":
                    assert r in self.aborted and text == said(ids) and (interrupted or ids != e.token_ids)
                else: assert (ids, text, o.finish_reason, o.stop_reason) == (e.token_ids, e.text, e.finish_reason, e.stop_reason)
            if r not in self.aborted: assert r.prompt_logprobs == expected_prompt_logprobs(r), "log-probabilities of the prompt"


# ---- the laws

def check_books(engine):
    "Law 1: blocks are free or held, and reference counts are those of the tables."
    manager, scheduler = engine.scheduler.manager, engine.scheduler
    live = [*scheduler.running, *scheduler.waiting]
    held = Counter(b for seq in live for b in seq.block_table[seq.num_released_blocks:])
    assert manager.pool.ref_counts == [held[b] for b in range(manager.pool.num_blocks)], "references"
    assert set(manager.pool.free_blocks) == set(range(manager.pool.num_blocks)) - set(held), "partition"
    assert all(seq in scheduler.running for seq in manager.pending.values()), "a pending owner is gone"


def check_cache(engine, hash_block=None):
    "Law 2: what can be found has been computed, and `hash_block` finds it. (For a fake engine, whose slots can be read.)"
    cache, kv, size = engine.scheduler.manager.cache, engine.runner.kv, engine.runner.block_size
    assert all(cache.entries[b].hash == h for h, b in cache.block_of.items()), "cache out of step"
    assert sum(e is not None for e in cache.entries) == len(cache.block_of)
    for block, entry in enumerate(cache.entries):
        if entry is None: continue
        texts = kv[block * size:(block + 1) * size]
        assert [text and text[-1] for text in texts] == entry.tokens, "found, not computed"
        if hash_block: assert entry.hash == chained_hash(texts[-1], size, hash_block), "nobody will find it"


def chained_hash(text, size, hash_block):
    hashed = 0
    for i in range(0, len(text), size): hashed = hash_block(hashed, list(text[i:i + size]))
    return hashed


def assert_all_free(engine):
    "Nothing is under way and nothing was left behind."
    pool = engine.scheduler.manager.pool
    assert sorted(pool.free_blocks) == list(range(pool.num_blocks)) and not any(pool.ref_counts)
    assert not engine.scheduler.manager.pending and not engine.requests
    assert not engine.scheduler.waiting and not engine.scheduler.running
