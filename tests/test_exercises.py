"""The exercises: each check accepts the solution and other right answers, and says of wrong ones in which case they are wrong.

Most of this file are answers, as readers might give them: right ones that are written otherwise than the solution, and the
mistakes that one makes. Those marked `wrong` say what the check's message has to name."""
import ast
import contextlib
import importlib
import io
import json
import math
import re
from collections import OrderedDict
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import quarto_filter
from book import Chapter, chapters
from exercise_answers import Answers, assert_all_tried, checks_of, kernel_of, name_of, try_answer
from nano_vllm.attention import BACKENDS
from nano_vllm.kv_blocks import BlockPool, SchedulerOutput, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager, hash_block
from nano_vllm.sampler import LOGIT_STAGES, SAMPLING_STAGES, run_stages
from nano_vllm.scheduler import Scheduler
from nano_vllm.tokenizer import StopFilter
from solutions.checks import (
    WrongAnswer, attention, call, engine, engine_args, exercise, kv_blocks, prefix_cache, request, sampler, scheduler, show, tiny, tokenizer)
from solutions.checks.engine import computed

EXERCISED = [c for c in chapters() if c.solutions.exists()]
CHECKS = checks_of((tiny, tokenizer, sampler, kv_blocks, prefix_cache, attention, scheduler, request, engine, engine_args))
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- a whole engine

@right(tiny.check_tokens_that_fit)
def _(memory, layers, kv_heads, head_dim, itemsize):
    keys = layers * kv_heads * head_dim * itemsize
    return int(memory / (keys + keys))


wrong(tiny.check_tokens_that_fit, "a key and a value")(lambda memory, *shape: int(memory // np.prod(shape)))
wrong(tiny.check_tokens_that_fit, "a part of a token does not count")(lambda memory, *shape: memory / (2 * np.prod(shape)))
wrong(tiny.check_tokens_that_fit, "expected 305175")(lambda memory, *shape: round(memory / (2 * np.prod(shape))))

right(tiny.check_last_of_each)(lambda hidden, lengths: torch.stack([row[n - 1] for row, n in zip(hidden, lengths)]))
wrong(tiny.check_last_of_each, "row 1 gives")(lambda hidden, lengths: hidden[:, -1])
wrong(tiny.check_last_of_each, "raises IndexError")(lambda hidden, lengths: hidden[torch.arange(len(lengths)), lengths])
wrong(tiny.check_last_of_each, "has shape")(lambda hidden, lengths: hidden[:, lengths - 1])


@right(tiny.check_padding_share)
def _(lengths, batch_size):
    left, computed = sorted(lengths), 0
    while left:
        part, left = left[:batch_size], left[batch_size:]
        computed += len(part) * part[-1]
    return (computed - sum(lengths)) / computed


@wrong(tiny.check_padding_share, "the batches are [[1, 1], [9, 9]]")
def _(lengths, batch_size):      # not sorted
    parts = [lengths[i:i + batch_size] for i in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(part) * max(part) for part in parts)


@wrong(tiny.check_padding_share, "gives")
def _(lengths, batch_size):      # the last batch is taken to be full
    ordered = sorted(lengths)
    return 1 - sum(lengths) / sum(batch_size * max(ordered[i:i + batch_size]) for i in range(0, len(ordered), batch_size))


@wrong(tiny.check_padding_share, "changes what it is given")
def _(lengths, batch_size):
    lengths.sort()
    return 1 - sum(lengths) / sum(len(p) * max(p) for p in (lengths[i:i + batch_size] for i in range(0, len(lengths), batch_size)))


@right(tiny.check_growing_cache)
class Pieces:
    def __init__(self): self.pieces = [([], []) for _ in range(3)]

    def __call__(self, k, v, layer):
        for kept, new in zip(self.pieces[layer], (k, v)): kept.append(new)
        return tuple(torch.cat(kept, 2) for kept in self.pieces[layer])


class CacheWith:
    "A cache that is wrong in what `join` does."
    def __init__(self): self.stored = {}

    def __call__(self, k, v, layer):
        if layer in self.stored: k, v = self.join(*self.stored[layer], k, v)
        self.stored[layer] = k, v
        return k, v


@wrong(tiny.check_growing_cache, "raises RuntimeError")
class AlongHeads(CacheWith):
    def join(self, old_k, old_v, k, v): return torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)


@wrong(tiny.check_growing_cache, "not those that were stored")
class NewestFirst(CacheWith):
    def join(self, old_k, old_v, k, v): return torch.cat([k, old_k], 2), torch.cat([v, old_v], 2)


@wrong(tiny.check_growing_cache, "of this layer so far")
class OneForAllLayers(CacheWith):
    def __call__(self, k, v, layer): return super().__call__(k, v, 0)
    def join(self, old_k, old_v, k, v): return torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)


@wrong(tiny.check_growing_cache, "the keys are a list, not a tensor")
class OfLists:
    def __call__(self, k, v, layer): return k.tolist(), v.tolist()


@wrong(tiny.check_growing_cache, "Is a `return` missing?")
class Silent(CacheWith):
    def __call__(self, k, v, layer): self.stored[layer] = k, v


@right(tiny.check_accepted)
def _(guess, best):
    tokens = []
    for i, token in enumerate(best):
        tokens.append(token)
        if i == len(guess) or guess[i] != token: break
    return tokens


wrong(tiny.check_accepted, "expected [5, 6, 7, 8, 9]")(lambda guess, best: guess if guess == best[:-1] else best[:1])
wrong(tiny.check_accepted, "computed after a wrong token")(
    lambda guess, best: [b for g, b in zip(guess, best) if g == b] + best[-1:])


@wrong(tiny.check_accepted, "gives [5, 6, 7, 8], expected")
def _(guess, best):              # forgets the token that comes for nothing
    n = 0
    while n < len(guess) and guess[n] == best[n]: n += 1
    return guess[:n]


# ---- the tokenizer

@right(tokenizer.check_unfinished)
def _(data):
    for n in range(min(4, len(data)) + 1):
        try: data[:len(data) - n].decode()
        except UnicodeDecodeError: continue
        return n


wrong(tokenizer.check_unfinished, "all of its characters are whole")(lambda data: sum(byte >= 0x80 for byte in data[-3:]))
wrong(tokenizer.check_unfinished, "the first 1 of the 2 bytes of 'é'")(lambda data: sum(0x80 <= byte < 0xc0 for byte in data[-3:]))


@right(tokenizer.check_held_back)
def _(text, stops):
    for n in range(len(text), 0, -1):
        if any(len(stop) > n and stop.startswith(text[-n:]) for stop in stops): return n
    return 0


wrong(tokenizer.check_held_back, "'<' may become '</b>'")(lambda text, stops: max(map(len, stops), default=1) - 1)
wrong(tokenizer.check_held_back, "'aa' may become 'aab'")(                  # from the first place where one begins
    lambda text, stops: next((len(text) - i for i, char in enumerate(text) if any(stop[0] == char for stop in stops)), 0))
wrong(tokenizer.check_held_back, "raises ValueError")(
    lambda text, stops: max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])))

right(tokenizer.check_overlooked)(["\n\nQ", "A\n\n\nQ"])
wrong(tokenizer.check_overlooked, "finds '</b>'")(("</b>", "bold </b>"))
wrong(tokenizer.check_overlooked, "there is nothing to overlook")(("aab", "aaac"))
wrong(tokenizer.check_overlooked, "a pair of strings")("aaab")


@right(tokenizer.check_inclusive)
class FromTheText(StopFilter):
    def __init__(self, stops): super().__init__(stops); self.all = self.shown = ""

    def add(self, text):
        self.all += super().add(text)
        whole = self.all + (self.found or self.held)
        new, self.shown = whole[len(self.shown):], whole
        return new


@wrong(tokenizer.check_inclusive, "nothing needs to be held back")
class HoldsBack(StopFilter):
    def add(self, text): return super().add(text)


@wrong(tokenizer.check_inclusive, "['bold <', '</b'] has been shown")
class ShowsTwice(StopFilter):
    def add(self, text): return super().add(text) + (self.found or self.held)


@wrong(tokenizer.check_inclusive, "'</b>' ends it")
class ShowsAll(StopFilter):
    def add(self, text):
        super().add(text)
        return text


@wrong(tokenizer.check_inclusive, "`found` is None, expected '</b>'")
class OfItsOwn:
    def __init__(self, stops): self.stops, self.text = stops, ""

    def add(self, text):
        before, self.text = len(self.text), self.text + text
        ends = [self.text.find(s) + len(s) for s in self.stops if s in self.text]
        return self.text[before:min(ends, default=None)]


@wrong(tokenizer.check_inclusive, "has no attribute 'add'")
class Misnamed:
    def __init__(self, stops): pass

    def push(self, text): return text


# ---- sampling

right(sampler.check_rank)(lambda logits, token: sorted(logits, reverse=True).index(logits[token]) + 1)
wrong(sampler.check_rank, "no token is better")(lambda logits, token: sum(x > logits[token] for x in logits))
wrong(sampler.check_rank, "as good, not better")(lambda logits, token: sum(x >= logits[token] for x in logits))
wrong(sampler.check_rank, "([2.0, 1.0, 0.5], 0) gives 3, expected 1")(lambda logits, token: sorted(logits).index(logits[token]) + 1)


@right(sampler.check_nucleus)
def _(probs, top_p):
    kept, order = set(), sorted(range(len(probs)), key=probs.__getitem__)
    while sum(probs[t] for t in kept) < top_p and order: kept.add(order.pop())
    return kept


def kept_by(probs, top_p, crossing=True, enough=lambda mass, top_p: mass >= top_p, ordered=True):
    kept, mass = [], 0.
    for token in sorted(range(len(probs)), key=lambda t: -probs[t] if ordered else t):
        if enough(mass, top_p) or not crossing and mass + probs[token] > top_p: break
        kept.append(token)
        mass += probs[token]
    return kept


wrong(sampler.check_nucleus, "so the token that crosses the border stays")(lambda *a: kept_by(*a, crossing=False))
wrong(sampler.check_nucleus, "0.5 + 0.3 is just enough")(lambda *a: kept_by(*a, enough=lambda mass, top_p: mass > top_p))
wrong(sampler.check_nucleus, "the best are the last here")(lambda *a: kept_by(*a, ordered=False))
wrong(sampler.check_nucleus, "gives 2, which is no list of ids")(lambda *a: len(kept_by(*a)))
wrong(sampler.check_nucleus, "gives [[0], [1]], expected [0, 1]")(lambda *a: [[token] for token in kept_by(*a)])
wrong(sampler.check_nucleus, "gives [True, True, False, False]")(lambda probs, top_p: [token in kept_by(probs, top_p) for token in range(len(probs))])
right(sampler.check_nucleus)(lambda *a: torch.tensor(kept_by(*a)))


@right(sampler.check_two_tokens)
def _(logits, noise):
    race = logits + noise
    first = race.argmax(-1, keepdim=True)
    return torch.cat([first, race.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)], 1)


wrong(sampler.check_two_tokens, "you draw")(lambda logits, noise: torch.stack([(logits + noise).argmax(-1), logits.argmax(-1)], 1))
wrong(sampler.check_two_tokens, "expected")(lambda logits, noise: (logits + noise).topk(2, largest=False).indices)
wrong(sampler.check_two_tokens, "the result has shape (4000,)")(lambda logits, noise: (logits + noise).argmax(-1))
wrong(sampler.check_two_tokens, "who")(lambda logits, noise: (logits + noise).topk(2).indices.sort().values)


@right(sampler.check_sampling_probabilities)
def _(x, m):                     # row by row
    rows = []
    for i in range(len(m)):
        one = m.select(slice(i, i + 1))
        row = run_stages(LOGIT_STAGES, x[i:i + 1], one)
        if m.temperature[i] == 0: rows.append((torch.arange(x.shape[1]) == row.argmax()).float()[None])
        else: rows.append(run_stages(SAMPLING_STAGES, row, one).softmax(-1))
    return torch.cat(rows)


def probabilities(x, m, logit_stages=LOGIT_STAGES, stages=SAMPLING_STAGES, greedy=True):
    x, temperature = run_stages(logit_stages, x, m), m.temperature
    random = temperature > 0
    if not greedy: m = replace(m, temperature=temperature.clamp(min=1e-3)); random[:] = True
    out = torch.zeros_like(x).scatter_(1, x.argmax(-1, keepdim=True), 1)
    return out if not random.any() else out.index_copy(0, random.nonzero()[:, 0], run_stages(
        stages, x[random], m.select(random.nonzero()[:, 0])).softmax(-1))


right(sampler.check_sampling_probabilities)(probabilities)
wrong(sampler.check_sampling_probabilities, "for penalties and logits")(lambda *a: probabilities(*a, logit_stages=[]))
wrong(sampler.check_sampling_probabilities, "for logit_bias={4: 6} and logits")(lambda *a: probabilities(*a, logit_stages=LOGIT_STAGES[1:]))
wrong(sampler.check_sampling_probabilities, "for temperature=2 and logits")(lambda *a: probabilities(*a, stages=SAMPLING_STAGES[1:]))
wrong(sampler.check_sampling_probabilities, "for top_k=3 and logits")(lambda *a: probabilities(*a, stages=SAMPLING_STAGES[:1]))
wrong(sampler.check_sampling_probabilities, "for temperature=0 and logits")(
    lambda x, m: run_stages(LOGIT_STAGES, x, m).softmax(-1))


# ---- KV blocks

right(kv_blocks.check_opens_block)(lambda n, size: (n - 1) % size == 0)
wrong(kv_blocks.check_opens_block, "(1, 1) gives False")(lambda n, size: n % size == 1)
wrong(kv_blocks.check_opens_block, "(1, 4) gives False, expected True: 0 tokens need 0 blocks of 4, 1 need 1")(lambda n, size: n % size == 0)


@right(kv_blocks.check_chunk_slots)
def _(table, start, end, size):
    every = [block * size + offset for block in table for offset in range(size)]
    return tuple(every[start:end])


wrong(kv_blocks.check_chunk_slots, "position 8 is in block table[8 // 4] = 7")(lambda table, start, end, size: list(range(start, end)))
wrong(kv_blocks.check_chunk_slots, "gives [8, 9, 10, 11, 0, 1, 2, 3, 28, 29]")(
    lambda table, start, end, size: [table[p // size] * size + p % size for p in range(start, end + 1)])
wrong(kv_blocks.check_chunk_slots, "([3, 7], 20, 21, 16) gives [20], expected [116]")(
    lambda table, start, end, size: [table[p // size] * size + p % size for p in range(end)] if start == 0 else list(range(start, end)))


@wrong(kv_blocks.check_chunk_slots, "gives [8, 9, 10, 11, 12, ")
def _(table, start, end, size):  # as if the blocks were neighbours
    first = table[start // size] * size + start % size
    return list(range(first, first + end - start))


@right(kv_blocks.check_answers_that_fit)
def _(num_blocks, size, prompt, answer):
    num_blocks, n = num_blocks - prompt // size, 0
    while num_blocks >= blocks_needed(prompt % size + answer, size):
        num_blocks, n = num_blocks - blocks_needed(prompt % size + answer, size), n + 1
    return n


wrong(kv_blocks.check_answers_that_fit, "6 full blocks of the prompt are shared")(
    lambda blocks, size, prompt, answer: blocks // blocks_needed(prompt + answer, size))
wrong(kv_blocks.check_answers_that_fit, "(1000, 16, 100, 100)")(        # shares the block that is filled in part
    lambda blocks, size, prompt, answer: max(0, blocks - blocks_needed(prompt, size)) // max(1, blocks_needed(answer, size)))
wrong(kv_blocks.check_answers_that_fit, "(10, 4, 7, 2)")(               # lets each answer begin in a block of its own
    lambda blocks, size, prompt, answer: max(0, blocks - prompt // size) // blocks_needed(answer, size))
wrong(kv_blocks.check_answers_that_fit, "each answer needs 2 of its own")(   # no room for the last token
    lambda blocks, size, prompt, answer: max(0, blocks - prompt // size) // (blocks_needed(prompt + answer - 1, size) - prompt // size))
wrong(kv_blocks.check_answers_that_fit, "(1, 4, 8, 1)")(                # less than no answer
    lambda blocks, size, prompt, answer: (blocks - prompt // size) // (blocks_needed(prompt + answer, size) - prompt // size))
wrong(kv_blocks.check_answers_that_fit, "raises ZeroDivisionError")(    # forgets the last, partly filled block
    lambda blocks, size, prompt, answer: (blocks - prompt // size) // (answer // size))


@right(kv_blocks.check_strict_pool)
class ByQueue(BlockPool):
    def free(self, block, keep=False):
        if block in self.free_blocks: raise ValueError(f"free twice: {block}")
        BlockPool.free(self, block, keep)


@wrong(kv_blocks.check_strict_pool, "refuse before anything is changed")
class AfterIt(BlockPool):
    def free(self, block, keep=False):
        super().free(block, keep)
        if self.ref_counts[block] < 0: raise ValueError(f"block {block} is free")


@wrong(kv_blocks.check_strict_pool, "what is worth keeping goes to the end")
class ForgetsKeep(BlockPool):
    def free(self, block, keep=False):
        if not self.ref_counts[block]: raise ValueError(f"block {block} is free")
        super().free(block)


@wrong(kv_blocks.check_strict_pool, "AssertionError, not a ValueError")
class Asserts(BlockPool):
    def free(self, block, keep=False):
        assert self.ref_counts[block] > 0
        super().free(block, keep)


@wrong(kv_blocks.check_strict_pool, "StrictPool(4, 2) raises TypeError")
class NoPool:
    def free(self, block, keep=False): raise ValueError(f"block {block} is free")


@right(kv_blocks.check_make_writable)
def _(pool, table):
    *others, last = table
    if pool.ref_counts[last] < 2: return
    table[:] = others + [pool.allocate()]
    pool.free(last, keep=True)
    return (last, table[-1])


@right(kv_blocks.check_make_writable)
def _(pool, table):              # a list is a pair, too
    old = table[-1]
    if pool.ref_counts[old] > 1:
        table[-1] = pool.allocate()
        pool.free(old)
        return [old, table[-1]]


@wrong(kv_blocks.check_make_writable, "two others still have block 1")
def _(pool, table):              # thinks of one other text only
    old = table[-1]
    if pool.ref_counts[old] != 2: return None
    table[-1] = pool.allocate()
    pool.free(old)
    return old, table[-1]


@wrong(kv_blocks.check_make_writable, "a block is free when nobody holds it, and only then")
def _(pool, table):              # takes a block and leaves it in the queue
    old, new = table[-1], next(iter(pool.free_blocks))
    if pool.ref_counts[old] == 1: return None
    table[-1] = new
    pool.ref_counts[new] = 1
    pool.free(old)
    return old, new


@wrong(kv_blocks.check_make_writable, "block 1 has 2 references, and 1 tables name it")
def _(pool, table):              # keeps its reference to the old block
    old = table[-1]
    if pool.ref_counts[old] == 1: return None
    table[-1] = pool.allocate()
    return old, table[-1]


@wrong(kv_blocks.check_make_writable, "that nobody shares")
def _(pool, table):              # copies whether shared or not
    old, table[-1] = table[-1], pool.allocate()
    pool.free(old)
    return old, table[-1]


@wrong(kv_blocks.check_make_writable, "only the last block is going to be written")
def _(pool, table):              # copies all shared blocks
    pairs = None
    for i, old in enumerate(table):
        if pool.ref_counts[old] == 1: continue
        table[i] = pool.allocate()
        pool.free(old)
        pairs = old, table[i]
    return pairs


# ---- the prefix cache

right(prefix_cache.check_most_cached)(lambda n, size: (blocks_needed(n, size) - 1) * size)
wrong(prefix_cache.check_most_cached, "(16, 16) gives 16, expected 0")(lambda n, size: n // size * size)
wrong(prefix_cache.check_most_cached, "only full blocks are found")(lambda n, size: n - 1)


@right(prefix_cache.check_find_prefix)
def _(tokens, size, block_of):
    found, parent, start = [], 0, 0
    while start + size < len(tokens):
        parent, start = hash_block(parent, tokens[start:start + size]), start + size
        block = block_of.get(parent)
        if block is None: return found
        found.append(block)
    return found


def prefix_of(tokens, size, block_of, leave=1, stop=True, chained=True):
    blocks, parent = [], 0
    for i in range((len(tokens) - leave) // size):
        hash = hash_block(parent, tokens[i*size:(i+1)*size])
        if chained: parent = hash
        if hash in block_of: blocks.append(block_of[hash])
        elif stop: break
    return blocks


@wrong(prefix_cache.check_find_prefix, "0 is the number of a block")
def _(tokens, size, block_of):
    found, parent = [], 0
    for start in range(0, len(tokens) - size, size):
        parent = hash_block(parent, tokens[start:start + size])
        if not block_of.get(parent): break
        found.append(block_of[parent])
    return found


wrong(prefix_cache.check_find_prefix, "a token must be left to compute")(lambda *args: prefix_of(*args, leave=0))
wrong(prefix_cache.check_find_prefix, "its second block is missing")(lambda *args: prefix_of(*args, stop=False))
wrong(prefix_cache.check_find_prefix, "expected [10, 11, 12, 13]")(lambda *args: prefix_of(*args, chained=False))


@right(prefix_cache.check_still_found)
def _(table, order, k):
    left, n = set(order[k:]), 0
    while n < len(table) and table[n] in left: n += 1
    return n


wrong(prefix_cache.check_still_found, "nobody finds a text without its beginning")(lambda table, order, k: len(table) - k)
wrong(prefix_cache.check_still_found, "([4, 7, 2, 9], [4, 7, 2, 9], 1)")(lambda table, order, k: len(set(table) - set(order[:k])))
wrong(prefix_cache.check_still_found, "changes what it is given")(
    lambda table, order, k: [order.pop(0) for _ in range(k)] and len(table) - k or len(table) - k)


@right(prefix_cache.check_steal)
def _(found, size, vocab):       # a block at a time as well, from the end of a recursion
    def rest(text):
        for guess in product(range(vocab), repeat=size):
            if found(text + list(guess) + [1]) == len(text) + size: return rest(text + list(guess))
        return text
    return rest([])


@wrong(prefix_cache.check_steal, "a block is found only if a token comes after it")
def _(found, size, vocab):
    text = []
    while block := next((g for g in product(range(vocab), repeat=size) if found([*text, *g]) > len(text)), None): text += block
    return text


@wrong(prefix_cache.check_steal, "go block by block")
def _(found, size, vocab):       # all tokens at once
    for length in (6, 5, 4, 3):
        for guess in product(range(vocab), repeat=length):
            if found([*guess, 0]) >= length // size * size: return list(guess)[:length // size * size]
    return []


@wrong(prefix_cache.check_steal, "with a salt of its own you claim")
def _(found, size, vocab):       # takes the last guess if none was right
    text = []
    for _ in range(8):
        for guess in product(range(vocab), repeat=size):
            n = found([*text, *guess, 0])
            if n > len(text): break
        if n <= len(text): return text or [0] * size
        text += guess
    return text


@wrong(prefix_cache.check_steal, "of which nothing can be found: go block by block")
def _(found, size, vocab):       # does not stop before it has the first block
    text = []
    while True:
        right = (g for g in product(range(vocab), repeat=size) if found([*text, *g, 0]) > len(text))
        if block := next(right, None): text += block
        elif text: return text


wrong(prefix_cache.check_steal, "reading it as a list raises TypeError")(lambda found, size, vocab: 0)


@right(prefix_cache.check_tree_cache)
class WholeTexts:
    def __init__(self, block_size): self.size, self.blocks = block_size, {}

    def beginnings(self, tokens): return [tuple(tokens[:n]) for n in range(self.size, len(tokens) + 1, self.size)]

    def insert(self, tokens, blocks):
        for text, block in zip(self.beginnings(tokens), blocks): self.blocks.setdefault(text, block)

    def find(self, tokens): return [self.blocks[t] for t in self.beginnings(tokens) if t in self.blocks]


class Tree:
    size_of_key, keeps, partial = None, True, False

    def __init__(self, block_size): self.size, self.root = block_size, {}

    def keys(self, tokens):
        ends = range(0, len(tokens), self.size) if self.partial else range(0, len(tokens) - self.size + 1, self.size)
        return [tuple(tokens[i:i + self.size]) for i in ends]

    def insert(self, tokens, blocks):
        node = self.root
        for key, block in zip(self.keys(tokens), blocks):
            if key not in node or not self.keeps: node[key] = (block, {})
            node = node[key][1]

    def find(self, tokens):
        node, found = self.root, []
        for key in self.keys(tokens):
            if key not in node: break
            block, node = node[key]
            found.append(block)
        return found


right(prefix_cache.check_tree_cache)(Tree)


@right(prefix_cache.check_tree_cache)
class OneMore(Tree):             # relies on what the text says of `blocks`
    def insert(self, tokens, blocks):
        if len(blocks) > len(tokens) // self.size + 1: raise ValueError("too many blocks")
        super().insert(tokens, blocks)


@wrong(prefix_cache.check_tree_cache, "raises IndexError")
class NeedsOne(Tree):            # fails for a text that fills no block
    def insert(self, tokens, blocks):
        self.keys(tokens)[0]
        super().insert(tokens, blocks)


@wrong(prefix_cache.check_tree_cache, "reading it as a list raises TypeError")
class Counts(Tree):
    def find(self, tokens): return len(super().find(tokens))


wrong(prefix_cache.check_tree_cache, "must not take the first one's place")(type("Replaces", (Tree,), dict(keeps=False)))


@wrong(prefix_cache.check_tree_cache, "3, 4 is cached after 1, 2")
class ByBlockAlone(WholeTexts):
    def beginnings(self, tokens): return [tuple(tokens[i:i + self.size]) for i in range(0, len(tokens) - 1, self.size)]


@wrong(prefix_cache.check_tree_cache, "find([1, 2, 3, 4, 5, 6])")
class HoldsPartial(Tree):
    def insert(self, tokens, blocks):
        node = self.root
        for i, block in enumerate(blocks): _, node = node.setdefault(tuple(tokens[i*2:i*2 + 2]), (block, {}))

    def find(self, tokens):
        node, found = self.root, []
        for i in range(0, len(tokens), 2):
            key = next((k for k in node if k == tuple(tokens[i:i + len(k)])), None)
            if key is None: break
            block, node = node[key]
            found.append(block)
        return found


# ---- paged attention

right(attention.check_intensity)(lambda n, heads, kv_heads, itemsize: heads / kv_heads * n / (itemsize / 2))
wrong(attention.check_intensity, "gives 3.0, expected 1.5")(lambda n, heads, kv_heads, itemsize: 4 * n * heads / (kv_heads * itemsize))
wrong(attention.check_intensity, "9 query heads do 4 operations, and 3 KV heads")(lambda n, heads, kv_heads, itemsize: 2 * n / itemsize)

right(attention.check_chunk_mask)(lambda new, context: torch.arange(context) <= torch.arange(context - new, context)[:, None])


@right(attention.check_chunk_mask)
def _(new, context):
    mask = torch.zeros(new, context, dtype=torch.bool)
    for row in range(new): mask[row, :context - new + row + 1] = True
    return mask


wrong(attention.check_chunk_mask, "query 0 does not see key 1")(lambda new, context: torch.ones(new, context).tril().bool())
wrong(attention.check_chunk_mask, "query 0 does not see key 4: it stands at position 4")(
    lambda new, context: torch.ones(new, context).tril(context - new - 1).bool())
wrong(attention.check_chunk_mask, "query 0 sees key 5")(lambda new, context: torch.ones(new, context).tril(context - new + 1).bool())
wrong(attention.check_chunk_mask, "dtype torch.float32")(lambda new, context: torch.ones(new, context).tril(context - new))


@right(attention.check_two_groups)
def _(lens):
    "Tries each length as the longest of the lower group."
    def cost(top):
        low = [n for n in lens if n <= top]
        return len(low) * max(low) + (len(lens) - len(low)) * max(lens)
    top = min(lens, key=cost)
    return [i for i, n in enumerate(lens) if n <= top], [i for i, n in enumerate(lens) if n > top]


def halves(lens):
    order = sorted(range(len(lens)), key=lens.__getitem__)
    return order[:len(order) // 2], order[len(order) // 2:]


wrong(attention.check_two_groups, "gathers")(halves)
wrong(attention.check_two_groups, "each index from 0 to 4 once")(lambda lens: (sorted(lens)[:2], sorted(lens)[2:]))
wrong(attention.check_two_groups, "padded to the longest in it")(lambda lens: (list(range(len(lens))), []))
wrong(attention.check_two_groups, "Is a `return` missing?")(lambda lens: lens.sort())
wrong(attention.check_two_groups, "reading it as lists of indices raises TypeError")(lambda lens: list(range(len(lens))))


@right(attention.check_attend_blocks)
def _(q, read, table, context):  # from the last block to the first, with logarithms of the sums
    outs, logs = [], []
    for i, block in reversed(list(enumerate(table))):
        keys, values = read(block)
        n = min(len(keys), context - i * len(keys))
        scores = keys[:n] @ q
        logs.append(scores.logsumexp(0))
        outs.append(scores.softmax(0) @ values[:n])
    return torch.stack(logs).softmax(0) @ torch.stack(outs)


def with_fault(**changes):
    def attend(q, read, table, context): return attention.online(q, lambda b: read(b), table, context, **changes)
    return attend


@right(attention.check_attend_blocks)
def _(q, read, table, context):  # all at once: not a block at a time, but right, and each is read once
    keys, values = (torch.cat(parts)[:context] for parts in zip(*map(read, table)))
    return (keys @ q).softmax(0) @ values


right(attention.check_attend_blocks)(with_fault())
right(attention.check_attend_blocks)(lambda *args: with_fault()(*args).double())
wrong(attention.check_attend_blocks, "needs to be read once")(
    lambda q, read, table, context: (read(table[0]), with_fault()(q, read, table, context))[1])
wrong(attention.check_attend_blocks, "a text of 9 tokens")(
    with_fault(stop=lambda table, context, size: max(1, context // size)))
wrong(attention.check_attend_blocks, "zero times NaN is NaN")(with_fault(cut=False))
wrong(attention.check_attend_blocks, "scores in the hundreds")(with_fault(stable=False))
wrong(attention.check_attend_blocks, "but its table is")(with_fault(start=lambda i, table: i))


@wrong(attention.check_attend_blocks, "together give the weights")
def _(q, read, table, context):  # the average of the blocks' own outputs
    outs = []
    for i, block in enumerate(table):
        keys, values = (x[:context - i * len(x)] for x in read(block))
        outs.append((keys @ q).softmax(0) @ values)
    return torch.stack(outs).mean(0)


def paged(context, size, scale, poison=True, table=None):
    "A right answer's case: (q, read, table, context) and what attention gives."
    g = torch.Generator().manual_seed(context)
    table = table or [3, 7, 1, 5, 2, 6][:-(-context // size)]
    pool = torch.full((2, 9, size, 8), torch.nan if poison else 0.)
    q, (keys, values) = scale * torch.randn(8, generator=g), torch.randn(2, context, 8, generator=g)
    for p in range(context): pool[:, table[p // size], p % size] = torch.stack([keys[p], values[p]])
    return (q, lambda b: (pool[0, b], pool[1, b]), table, context), (keys @ q).softmax(0) @ values


def comparing_with(*cases, **options):
    def is_right(attend):
        return all(torch.allclose(attend(*args), wanted, atol=1e-2) for args, wanted in (paged(*case, **options) for case in cases))
    return is_right


right(attention.check_is_right)(comparing_with((5, 2, 1), (6, 2, 1), (9, 4, 40)))
wrong(attention.check_is_right, "forgets the last block")(comparing_with((4, 2, 1), (8, 4, 40)))
wrong(attention.check_is_right, "exponential of large scores")(comparing_with((5, 2, 1), (9, 4, 1)))
wrong(attention.check_is_right, "multiplies what lies there")(comparing_with((5, 2, 1), (9, 4, 40), poison=False))
wrong(attention.check_is_right, "instead of those in the table")(comparing_with((5, 2, 1), (9, 4, 40), table=[0, 1, 2]))
wrong(attention.check_is_right, "calls a right function wrong")(lambda attend: False)
wrong(attention.check_is_right, "asking whether that is true raises RuntimeError")(
    lambda attend: paged(5, 2, 1)[1] == attend(*paged(5, 2, 1)[0]))


@right(attention.check_is_right)
def _(attend):                   # looks at what is read, too
    for case in (5, 2, 1), (6, 2, 1), (9, 4, 40):
        (q, read, table, context), wanted = paged(*case)
        reads = []
        got = attend(q, lambda b: (reads.append(b), read(b))[1], table, context)
        if reads != table or not torch.allclose(got, wanted, atol=1e-2): return False
    return True


# ---- the scheduler

@right(scheduler.check_steps_of_prompt)
def _(prompt, budget, readers):
    steps = 0
    while prompt > 0: prompt, steps = prompt - (budget - readers), steps + 1
    return steps


wrong(scheduler.check_steps_of_prompt, "which leaves 482 in each step")(lambda prompt, budget, readers: -(-prompt // budget))
wrong(scheduler.check_steps_of_prompt, "(4000, 512, 30) gives 8, expected 9")(lambda prompt, budget, readers: prompt // (budget - readers))
wrong(scheduler.check_steps_of_prompt, "(12, 6, 2) gives 4, expected 3")(lambda prompt, budget, readers: prompt // (budget - readers) + 1)

right(scheduler.check_prediction)([dict(A=8, B=0, C=0), dict(C=4, B=4, A=1), dict(B=1, C=1)])
wrong(scheduler.check_prediction, "in step 0 you give B 8 tokens")([dict(A=8, B=8, C=8), dict(A=1, B=1, C=1)])
wrong(scheduler.check_prediction, "in step 1 you give B 1 tokens")([dict(A=8), dict(A=1, B=1, C=1)])
wrong(scheduler.check_prediction, "in step 2 you give A 1 tokens")([dict(A=8), dict(A=1, B=4, C=4), dict(A=1, B=1, C=1)])
wrong(scheduler.check_prediction, "there is a step 2")([dict(A=8), dict(A=1, B=4, C=4)])
wrong(scheduler.check_prediction, "a dictionary for each step")("A 8")


@right(scheduler.check_hand_out)
def _(missing, waiting, budget, room):
    running = []
    for i, n in enumerate(missing): running += [min(n, budget - sum(running) - len(missing[i + 1:]))]
    left, admitted = budget - sum(running), []
    for n in waiting:
        n = min(n, left)
        if n and len(missing) + len(admitted) < room:
            admitted.append(n)
            left -= n
    return [running, admitted]


def handing_out(missing, waiting, budget, room, reserve=1, any_left=True, counts_running=True):
    running, admitted = [], []
    for i, n in enumerate(missing):
        running.append(min(n, budget - reserve * (len(missing) - 1 - i)))
        budget -= running[-1]
    for n in waiting:
        if any_left and not budget or len(admitted) + counts_running * len(running) == room: break
        admitted.append(min(n, budget))
        budget -= admitted[-1]
    return running, admitted


wrong(scheduler.check_hand_out, "the oldest leaves a token for each younger one")(lambda *a: handing_out(*a, reserve=0))
wrong(scheduler.check_hand_out, "nothing is left for the one that waits")(lambda *a: handing_out(*a, any_left=False))
wrong(scheduler.check_hand_out, "there is room for three")(lambda *a: handing_out(*a, counts_running=False))


@wrong(scheduler.check_hand_out, "the newcomer takes what the readers leave")
def _(missing, waiting, budget, room):   # only whole prompts
    running, admitted = handing_out(missing, [], budget, room)
    left = budget - sum(running)
    for n in waiting:
        if n <= left: admitted.append(n); left -= n
    return running, admitted


@right(scheduler.check_make_room)
def _(held, free, name, needed):
    gone, names = [], [n for n, _ in held]
    while free < needed and name not in gone:
        gone.append(names.pop())
        free += dict(held)[gone[-1]]
    return gone, name not in gone


def making_room(held, free, name, needed, newest_first=True, enough=lambda free, needed: free >= needed, spares_itself=False):
    gone = []
    for other, blocks in list(reversed(held)) if newest_first else held:
        if enough(free, needed) or spares_itself and other == name: break
        gone.append(other)
        free += blocks
        if other == name: return gone, False
    return gone, free >= needed


wrong(scheduler.check_make_room, "the newest gives way")(lambda *a: making_room(*a, newest_first=False))
wrong(scheduler.check_make_room, "there are just enough free blocks")(lambda *a: making_room(*a, enough=lambda f, n: f > n))
wrong(scheduler.check_make_room, "C is the newest itself")(lambda *a: making_room(*a, spares_itself=True))


@wrong(scheduler.check_make_room, "changes what it is given")
def _(held, free, name, needed):
    gone = []
    while free < needed:
        other, blocks = held.pop()
        gone.append(other)
        free += blocks
        if other == name: return gone, False
    return gone, True


@right(scheduler.check_shortest_first)
class WhenScheduling(Scheduler):
    def schedule_waiting(self, budget):
        self.waiting = OrderedDict(sorted(self.waiting.items(), key=lambda item: len(item[0].prompt_token_ids)))
        return super().schedule_waiting(budget)


@right(scheduler.check_shortest_first)
class Inserting(Scheduler):
    def add(self, seq):
        later = [other for other in self.waiting if other.num_tokens > seq.num_tokens]
        self.waiting[seq] = None
        for other in later: self.waiting.move_to_end(other)


@wrong(scheduler.check_shortest_first, "start in the order ['A', 'C', 'B']")
class LongestFirst(Scheduler):
    def add(self, seq): self.waiting = OrderedDict.fromkeys(sorted([*self.waiting, seq], key=lambda s: -s.num_tokens))


@wrong(scheduler.check_shortest_first, "add raises AttributeError")
class AppendsToAList(Scheduler):
    def add(self, seq): self.waiting.append(seq)


@wrong(scheduler.check_shortest_first, "the first to come is the first to go")
class LastOfEqual(Scheduler):
    def add(self, seq): self.waiting = OrderedDict.fromkeys(sorted([seq, *self.waiting], key=lambda s: s.num_tokens))


@wrong(scheduler.check_shortest_first, "raises TypeError")
class AList(Scheduler):
    def add(self, seq): self.waiting = sorted([*self.waiting, seq], key=lambda s: s.num_tokens)


# ---- requests and answers

@right(request.check_time_per_token)
def _(metrics):
    tokens = metrics.num_generated_tokens - 1
    if tokens > 0 and metrics.finished_time: return (metrics.finished_time - metrics.first_token_time) / tokens


wrong(request.check_time_per_token, "7 tokens came in the 3.5 s")(
    lambda m: (m.finished_time - m.first_token_time) / m.num_generated_tokens)
wrong(request.check_time_per_token, "raises ZeroDivisionError")(
    lambda m: (m.finished_time - m.first_token_time) / (m.num_generated_tokens - 1))
wrong(request.check_time_per_token, "gives 0.64")(
    lambda m: (m.finished_time - m.arrival_time) / (m.num_generated_tokens - 1))


@right(request.check_why_ended)
def _(output, prompt_len, max_len, stops, eos):
    if output[-1] in eos: return ("stop", None)
    if output[-1] in stops: return ["stop", output[-1]]
    return ("length", None) if prompt_len + len(output) >= max_len else None


def ended(output, prompt_len, max_len, stops, eos, reason=lambda last, eos: None if last in eos else last, found=lambda output, stops: output[-1] in stops):
    if found(output, stops): return "stop", reason(output[-1], eos)
    return ("length", None) if prompt_len + len(output) == max_len else None


@wrong(request.check_why_ended, "has ended by itself")
def _(output, prompt_len, max_len, stops, eos):      # length first
    if prompt_len + len(output) == max_len: return "length", None
    return ended(output, prompt_len, max_len, stops, eos)


wrong(request.check_why_ended, "the model ended it itself")(lambda *a: ended(*a, reason=lambda last, eos: last))
wrong(request.check_why_ended, "only the last token is new")(lambda *a: ended(*a, found=lambda output, stops: bool(stops & set(output))))
wrong(request.check_why_ended, "4 + 2 tokens are all")(lambda output, prompt_len, max_len, stops, eos:
                                                     ended(output, 0, max_len, stops, eos))


def raising_list(prompts, check):
    "Joins exceptions, which are no strings."
    results, refused = [], []
    for prompt in prompts:
        try: results.append(check(prompt))
        except ValueError as e: refused.append(e)
    if refused: raise ValueError("; ".join(refused))
    return results


@right(request.check_check_all)
def _(prompts, check):
    results, errors = [], {}
    for i, prompt in enumerate(prompts):
        try: results.append(check(prompt))
        except ValueError as e: errors[f"prompts[{i}]"] = e
    if errors: raise ValueError("\n".join(f"{name}: {e}" for name, e in errors.items()))
    return results


def checking_all(prompts, check, caught=ValueError, name=lambda i: i, each=True):
    results, errors = [], []
    for i, prompt in enumerate(prompts):
        try: results.append(check(prompt))
        except caught as e:
            errors.append(f"prompts[{name(i)}]: {e}")
            if not each: break
    if errors: raise ValueError("; ".join(errors))
    return results


wrong(request.check_check_all, "also after one has been refused")(lambda *a: checking_all(*a, each=False))
wrong(request.check_check_all, "raises TypeError")(lambda *a: raising_list(*a))
wrong(request.check_check_all, "is nobody's bad input")(lambda *a: checking_all(*a, caught=Exception))
wrong(request.check_check_all, "it does not say 'prompts[1]: empty'")(lambda *a: checking_all(*a, name=lambda i: i + 1))
wrong(request.check_check_all, "so it must raise a ValueError")(
    lambda prompts, check: [check(p) for p in prompts if p and len(p) < 10])


# ---- the engine

def looping(scheduler, runner, seqs, given=lambda output: output.sampled, ends=True, stop=True, length=lambda seq: seq.num_tokens == seq.max_len):
    for seq in seqs: scheduler.add(seq)
    while scheduler.waiting or scheduler.running:
        output = scheduler.schedule()
        tokens = runner.execute(output).result().token_ids
        scheduler.update(output, tokens)
        for s in given(output):
            if stop and s.seq.output_token_ids and s.seq.output_token_ids[-1] in s.seq.stop_token_ids: scheduler.finish(s.seq, "stop")
            elif length(s.seq) and ends: scheduler.finish(s.seq, "length")


@right(engine.check_run)
def _(scheduler, runner, seqs):      # looks at everybody after each step
    for seq in seqs: scheduler.add(seq)
    while not all(seq.finish_reason for seq in seqs):
        output = scheduler.schedule()
        scheduler.update(output, runner.execute(output).result().token_ids)
        for seq in seqs:
            if seq.finish_reason or not seq.output_token_ids: continue
            if seq.output_token_ids[-1] in seq.stop_token_ids: scheduler.finish(seq, "stop")
            elif seq.num_tokens == seq.max_len: scheduler.finish(seq, "length")


wrong(engine.check_run, "the prompt [5, 3, 8] gets")(lambda *a: looping(*a, stop=False))
wrong(engine.check_run, "gets [")(lambda *a: looping(*a, length=lambda seq: seq.num_tokens == seq.max_len - 1))
wrong(engine.check_run, "Has a sequence that is as long as it may get not been finished?")(lambda *a: looping(*a, ends=False))


@wrong(engine.check_run, "changed size during iteration, at the line `for seq in scheduler.running:`")
def _(scheduler, runner, seqs):
    for seq in seqs: scheduler.add(seq)
    while scheduler.waiting or scheduler.running:
        output = scheduler.schedule()
        scheduler.update(output, runner.execute(output).result().token_ids)
        for seq in scheduler.running:
            if seq.output_token_ids and seq.output_token_ids[-1] in seq.stop_token_ids: scheduler.finish(seq, "stop")
            elif seq.num_tokens == seq.max_len: scheduler.finish(seq, "length")


@wrong(engine.check_run, "sequences still run and 0 wait")
def _(scheduler, runner, seqs):      # says so to the sequence, but not to the scheduler
    for seq in seqs: scheduler.add(seq)
    while not all(seq.finish_reason for seq in seqs):
        output = scheduler.schedule()
        going_on = SchedulerOutput(tuple(s for s in output.scheduled if not s.seq.finish_reason))
        scheduler.update(going_on, runner.execute(going_on).result().token_ids)
        for s in going_on.sampled:
            if s.seq.output_token_ids[-1] in s.seq.stop_token_ids: s.seq.finish_reason = "stop"
            elif s.seq.num_tokens == s.seq.max_len: s.seq.finish_reason = "length"


@right(engine.check_with_deadline)
def _(engine, requests, num_steps):
    for request in requests: engine.add(request)
    while num_steps and not all(r.finished for r in requests):
        engine.step()
        num_steps -= 1
    for request in requests:
        if not request.finished: engine.abort(request.request_id)
    return tuple(request.output() for request in requests)


def by_deadline(engine, requests, num_steps, late=0, whom=None, abort=True):
    for request in requests: engine.add(request)
    for _ in range(num_steps + late):
        if all(request.finished for request in requests): break
        engine.step()
    for name in whom(engine) if whom else [request.request_id for request in requests]:
        if abort: engine.abort(name)
    return [request.output() for request in requests]


wrong(engine.check_with_deadline, "2 steps were taken")(lambda *a: by_deadline(*a, late=1))
wrong(engine.check_with_deadline, "expected 'abort'")(lambda *a: by_deadline(*a, abort=False))
wrong(engine.check_with_deadline, "a fifth request, which was in the engine before, has been aborted")(
    lambda *a: by_deadline(*a, whom=lambda engine: list(engine.requests)))
wrong(engine.check_with_deadline, "a list of `request.output()` is asked for")(lambda *a: [o.outputs[0] for o in by_deadline(*a)])
wrong(engine.check_with_deadline, "Is a `return` missing?")(lambda *a: by_deadline(*a) and None)

@contextlib.contextmanager
def noting(runner, note):
    runner.execute, before = lambda output: note(output) or before(output), runner.execute
    try: yield
    finally: runner.execute = before


@right(engine.check_timeline)
def _(engine, requests):      # counts by what each sequence has computed before and after
    steps = []
    def note(output):
        steps.append({})
        for s in output.scheduled: steps[-1][s.seq.request_id] = steps[-1].get(s.seq.request_id, 0) + s.end - s.start
    with noting(engine.runner, note):
        for request in requests: engine.add(request)
        while not all(request.finished for request in requests): engine.step()
    return tuple(steps)


def noted(engine, requests, count=computed, careful=True, last=True):
    steps, execute = [], engine.runner.execute
    engine.runner.execute = lambda output: steps.append(count(output)) or execute(output)
    try:
        for request in requests: engine.add(request)
        while not all(request.finished for request in requests): engine.step()
    except BaseException:
        if careful: del engine.runner.execute
        raise
    if last: del engine.runner.execute
    return steps


wrong(engine.check_timeline, "in any case")(lambda *a: noted(*a, careful=False))
wrong(engine.check_timeline, "is not what it was before")(lambda *a: noted(*a, last=False))
wrong(engine.check_timeline, "with a prompt that takes several steps gives")(
    lambda *a: noted(*a, count=lambda output: {s.seq.request_id: 1 for s in output.sampled}
                     if len(output.sampled) < len(output.scheduled) else computed(output)))
wrong(engine.check_timeline, "one request of three answers gives")(
    lambda *a: noted(*a, count=lambda output: {s.seq.request_id: s.num_tokens for s in output.scheduled}))
wrong(engine.check_timeline, "a list with a dict for each step")(lambda *a: [sum(step.values()) for step in noted(*a)])
wrong(engine.check_timeline, "is a `return` missing?")(lambda *a: noted(*a) and None)


# ---- building an engine

@right(engine_args.check_blocks_in)
def _(num_bytes, token_bytes, block_size, max_model_len, max_num_seqs):
    block = token_bytes * block_size
    if num_bytes < block: raise ValueError(f"{num_bytes} bytes are too few for a block of {block}")
    return min(num_bytes // block, math.ceil(max_model_len / block_size) * max_num_seqs)


wrong(engine_args.check_blocks_in, "filled in part")(
    lambda n, t, b, longest, seqs: blocks_by_hand(n, t, b, longest // b * seqs))
wrong(engine_args.check_blocks_in, "two texts of 100 tokens")(lambda n, t, b, longest, seqs: blocks_by_hand(n, t, b, 10**9))
wrong(engine_args.check_blocks_in, "it must raise a ValueError")(
    lambda n, t, b, longest, seqs: max(0, min(n // (t * b), -(-longest // b) * seqs)))


def blocks_by_hand(num_bytes, token_bytes, block_size, most):
    if num_bytes < token_bytes * block_size: raise ValueError(f"no room for {token_bytes * block_size} bytes")
    return min(num_bytes // (token_bytes * block_size), most)


@right(engine_args.check_read_names)
def _(options, known, other_names):
    given = {}
    for name in options: given.setdefault(other_names.get(name, name), []).append(name)
    for field, names in given.items():
        if field not in known: raise ValueError(f"unknown: {names}")
        if len(names) > 1: raise ValueError(f"{' and '.join(names)} are one field")
    return {field: options[names[0]] for field, names in given.items()}


def reading_names(options, known, other_names, twice=lambda a, b: True, unknown=True):
    read, origin = {}, {}
    for name, value in options.items():
        field = other_names.get(name, name)
        if field not in known and unknown: raise ValueError(f"{name} is unknown")
        if field in read and twice(read[field], value): raise ValueError(f"{name} and {origin[field]} are the same")
        read[field], origin[field] = value, name
    return read


wrong(engine_args.check_read_names, "it must raise a ValueError")(lambda *a: reading_names(*a, twice=lambda a, b: False))
wrong(engine_args.check_read_names, "it must raise a ValueError")(lambda *a: reading_names(*a, twice=lambda a, b: a != b))
wrong(engine_args.check_read_names, "'sead': 3")(lambda *a: reading_names(*a, unknown=False))


@wrong(engine_args.check_read_names, "make a dict of your own")
def _(options, known, other_names):
    for name in [n for n in options if n in other_names]: options[other_names[name]] = options.pop(name)
    return options


@right(engine_args.check_end_tokens)
def _(in_config, in_generation_config, of_tokenizer):
    found = []
    for ids in (in_config, in_generation_config, of_tokenizer): found += ids if isinstance(ids, list) else [ids]
    return {i for i in found if i is not None}


def ending_of(*sources, keep=lambda i: i is not None):
    return {i for ids in sources for i in (ids if isinstance(ids, list) else [ids]) if keep(i)}


wrong(engine_args.check_end_tokens, "0 is a token")(lambda *a: ending_of(*a, keep=bool))
wrong(engine_args.check_end_tokens, "two places agree")(lambda *a: ending_of(*a, keep=lambda i: True))
wrong(engine_args.check_end_tokens, "all three have a say")(lambda config, generation, tokenizer: ending_of(generation or config, tokenizer))


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)


@pytest.fixture
def own_backends():
    "A solution may add a backend of its own to the table; it goes with the solution."
    before = dict(BACKENDS)
    yield
    for name in BACKENDS.keys() - before.keys(): del BACKENDS[name]


@pytest.mark.ci
@pytest.mark.usefixtures("own_backends")
@pytest.mark.parametrize("chapter", EXERCISED, ids=lambda c: c.name)
def test_solutions_run_and_print_what_is_stored(chapter, monkeypatch):
    monkeypatch.chdir(chapter.solutions.parent)
    monkeypatch.syspath_prepend(str(chapter.solutions.parent))
    names, stored = {"__name__": "__main__"}, []
    for cell in Chapter(chapter.solutions).code:
        with contextlib.redirect_stdout(io.StringIO()) as printed: exec(compile(cell.source, chapter.name, "exec"), names)
        text = "".join("".join(output.get("text", "")) for output in cell.outputs)
        stored.append(text)
        timed = "decode(engine, n)" in cell.source or "microseconds(" in cell.source or "differs from machine to machine" in cell.source
        if not timed and "without a compiler" not in printed.getvalue(): assert printed.getvalue() == text
    said = "".join(stored)
    used = {name for name in re.findall(r"\bcheck_\w+", "".join(c.source for c in Chapter(chapter.solutions).code))}
    assert used and all(f"{name}: right" in said for name in used)
    assert "not done yet" not in said


@pytest.mark.parametrize("chapter", EXERCISED, ids=lambda c: c.name)
def test_a_chapter_shows_stubs_and_the_other_notebook_all_solutions(chapter):
    solved = [re.match(r"## (.+)", c.source) for c in Chapter(chapter.solutions).markdown]
    assert [match[1] for match in solved if match] == chapter.exercises
    text = "\n".join(c.source for c in chapter.markdown)
    assert f"The solutions are in [a notebook of their own](solutions/{chapter.path.name})." in text
    opened = next(i for i, c in enumerate(chapter.cells) if c.source.startswith("## Exercises"))
    stubs = [c for c in chapter.cells[opened:] if re.search(r"^check_\w+\(\w+\)$", c.source, re.M)]
    assert len(stubs) >= 3
    for cell in stubs:
        check = re.search(r"^(check_\w+)\((\w+)\)$", cell.source, re.M)
        assert "".join("".join(o["text"]) for o in cell.outputs) == f"{check[1]}: not done yet\n"
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.FunctionDef): assert ast.unparse(node.body[-1]) == "..." and len(node.body) == 2


@pytest.mark.parametrize("chapter", EXERCISED, ids=lambda c: c.name)
def test_solutions_are_short_and_clean(chapter):
    raw = json.loads(chapter.solutions.read_text(encoding="utf-8"))["cells"]
    assert not any(c.get("execution_count") or set(c["metadata"]) - {"ran"} for c in raw), "not cleaned: run nbdev_clean"
    for cell in Chapter(chapter.solutions).cells:
        assert not cell.directives and not cell.images           # the site's box shows text and code only
        assert all(o["output_type"] == "stream" and o["name"] == "stdout" for o in cell.outputs)
        if cell.kind == "code": assert max(map(len, cell.source.splitlines())) <= 88


@pytest.mark.parametrize("chapter", EXERCISED, ids=lambda c: c.name)
def test_the_site_has_each_solution_in_a_closed_box_below_its_exercise(chapter):
    nb = json.loads(chapter.path.read_text(encoding="utf-8"))
    page = quarto_filter.with_solutions(nb)["cells"]
    boxes = [c for c in page if c["id"].startswith("solution-")]
    assert len(boxes) == len(chapter.exercises) and len(page) == len(nb["cells"]) + len(boxes)
    for number, cell in enumerate(boxes, 1):
        assert cell["source"].startswith('<details class="answer">\n\n<summary>Solution</summary>\n')
        assert cell["source"].count("details") == 2 and cell["source"].endswith("\n</details>")
        is_open = "open problem" in chapter.exercises[number - 1]    # what one would build may be told in words
        assert cell["source"].count("````") % 2 == 0 and ("````python" in cell["source"] or is_open)
        above = [c for c in page[:page.index(cell)] if c["cell_type"] == "markdown" and not c["id"].startswith("solution-")]
        assert "".join(above[-1]["source"]).startswith(f"**{number}. ")
    assert "(solutions/" not in json.dumps(page)                 # there is no such page on the site
    everything = "\n".join(cell["source"] for cell in boxes)
    for cell in Chapter(chapter.solutions).code[1:]: assert cell.source.strip() in everything


def test_a_chapter_without_solutions_passes_through_the_filter():
    nb = {"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["## Exercises\n", "\n", "1. Think."]}]}
    assert quarto_filter.with_solutions(nb) is nb


def test_a_check_says_not_done_yet_of_a_stub_and_nothing_else(capsys):
    @exercise
    def check_it(answer): raise WrongAnswer("wrong")

    def function(x):
        "What it is to do."
        ...

    class Half:
        def done(self): return 1
        def not_done(self, x):
            "Still to be written."
            ...
    for answer in (function, Half, ...): check_it(answer)
    assert capsys.readouterr().out == "check_it: not done yet\n" * 3
    for answer in (lambda x: x, dict, 7):
        with pytest.raises(WrongAnswer): check_it(answer)


def test_a_wrong_answer_is_shown_without_a_traceback():
    assert WrongAnswer("f(1) gives 2")._render_traceback_() == ["Not yet: f(1) gives 2"]


def test_a_crash_is_told_with_its_case_and_line():
    def crashes(table): return table[5]
    with pytest.raises(WrongAnswer, match=r"crashes\(\[1\]\) raises IndexError.*`def crashes\(table\): return table\[5\]`"):
        call(crashes, [1])
    assert show([0] * 1000).endswith(" ...")


def test_checks_are_found_from_both_folders():
    "A chapter imports them from nbs/, a notebook of solutions from nbs/solutions."
    for chapter in EXERCISED:
        first = next(c.source for c in chapter.code if "from solutions.checks." in c.source)
        assert first.replace("solutions.checks", "checks") in Chapter(chapter.solutions).code[0].source
        module = importlib.import_module(re.search(r"from (\S+) import", first)[1])
        for name in re.findall(r"check_\w+", first): assert name in vars(module)


# ---- answers to the exercises of further chapters; they join the lists above before pytest reads these

import argparse
import struct
import sys
from itertools import combinations

import safetensors.torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from nano_vllm.layers import rms_norm, rotate, shard
from nano_vllm.llm import progress
from solutions.checks import benchmark, cli, cuda_graphs, latency, layers, llm, model, model_runner, triton_attention, triton_kernels, weights

FURTHER = benchmark, cli, cuda_graphs, latency, layers, llm, model, model_runner, triton_attention, triton_kernels, weights
CHECKS |= checks_of(FURTHER)


# ---- layers

right(layers.check_break_even)(lambda bandwidth, peak, itemsize: itemsize / bandwidth / (2 / peak))
wrong(layers.check_break_even, "gives 100.0, expected 50.0")(lambda bandwidth, peak, itemsize: peak * itemsize / bandwidth)
wrong(layers.check_break_even, "a weight is 2 bytes to read")(lambda bandwidth, peak, itemsize: peak / bandwidth / 2)

right(layers.check_norm)(rms_norm)


@right(layers.check_norm)
def _(x, weight, eps, residual=None):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, eps)
    return y if residual is None else [y, total]


def norming(x, weight, eps, residual=None, wide=torch.Tensor.float, scale=lambda y, eps: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)):
    total = x if residual is None else x + residual
    y = scale(wide(total), eps).to(x.dtype) * weight
    return y if residual is None else (y, total)


wrong(layers.check_norm, "float32 inside")(lambda *a: norming(*a, wide=lambda x: x))
wrong(layers.check_norm, "expected")(lambda *a: norming(*a, scale=lambda y, eps: y / y.norm(dim=-1, keepdim=True)))
wrong(layers.check_norm, "eps is more than the mean square")(lambda *a: norming(*a, scale=lambda y, eps: y / y.square().mean(-1, keepdim=True).sqrt()))
wrong(layers.check_norm, "expected that of x")(lambda x, weight, *a: norming(x.float(), weight.float(), *a))
wrong(layers.check_norm, "expected two tensors")(lambda x, weight, eps, residual=None: norming(x if residual is None else x + residual, weight, eps))


@wrong(layers.check_norm, "changes x")
def _(x, weight, eps, residual=None):
    if residual is not None: x += residual
    y = norming(x, weight, eps)
    return y if residual is None else (y, x)


@wrong(layers.check_norm, "the second result of norm")
def _(x, weight, eps, residual=None):    # what was added, not the sum
    y = norming(x, weight, eps, residual)
    return y if residual is None else (y[0], residual)


@right(layers.check_move_keys)
def _(keys, rotary, old, new):           # as numbers in the plane, by the difference of the angles
    def turns(positions): return torch.complex(rotary.cos[positions], rotary.sin[positions])[:, None]
    plane = torch.complex(*keys.chunk(2, -1)) / turns(old) * turns(new)
    return torch.cat([plane.real, plane.imag], -1)


wrong(layers.check_move_keys, "yarn's factor is in them once")(
    lambda keys, rotary, old, new: rotate(rotate(keys, rotary(old)[0], -rotary(old)[1]), *rotary(new)))
wrong(layers.check_move_keys, "as they would be had they been computed there")(
    lambda keys, rotary, old, new: rotate(keys, *rotary(new - old)))       # there are no rows before the first
wrong(layers.check_move_keys, "with rope type default has")(lambda keys, rotary, old, new: rotate(keys, *rotary(new)))


@right(layers.check_mlp_of_rank)
def _(x, gate_up, down, group):          # every so manieth number
    inner = down.shape[1]
    mine = torch.arange(group.rank, inner, group.size)
    return (F.silu(x @ gate_up[mine].T) * (x @ gate_up[inner + mine].T)) @ down[:, mine].T


def cut_mlp(x, gate_up, down, gates, ups, columns):
    return (F.silu(x @ gate_up[gates].T) * (x @ gate_up[ups].T)) @ down[:, columns].T


@wrong(layers.check_mlp_of_rank, "the columns of down that belong to them")
def _(x, gate_up, down, group):          # as if it were one matrix
    mine = gate_up[shard(len(gate_up), group).slice]
    return (F.silu(x @ mine[:len(mine)//2].T) * (x @ mine[len(mine)//2:].T)) @ down[:, shard(down.shape[1], group).slice].T


@wrong(layers.check_mlp_of_rank, "the sum over 2 ranks, with 7 inner numbers")
def _(x, gate_up, down, group):          # the numbers that are left over are nobody's
    n = down.shape[1] // group.size
    mine = slice(group.rank * n, (group.rank + 1) * n)
    return cut_mlp(x, *(gate_up, down), *(slice(k + mine.start, k + mine.stop) for k in (0, down.shape[1])), mine)


wrong(layers.check_mlp_of_rank, "the sum over 2 ranks, with 6 inner numbers")(
    lambda x, gate_up, down, group: cut_mlp(x, gate_up, down, *(slice(k, k + down.shape[1]) for k in (0, down.shape[1])), slice(None)))
wrong(layers.check_mlp_of_rank, "each rank is to have a part")(
    lambda x, gate_up, down, group: cut_mlp(x, gate_up, down, *(slice(k, k + down.shape[1]) for k in (0, down.shape[1])), slice(None)) * (group.rank == 0))


# ---- the model

wrong(model.check_output_share, "and 1 of them through the output layer")(lambda inner, head, tokens, rows: head / (inner + head))
wrong(model.check_output_share, "gives")(lambda inner, head, tokens, rows: head * rows / (inner * tokens))
right(model.check_output_share)(lambda inner, head, tokens, rows: 1 - inner * tokens / (inner * tokens + head * rows))


def counted(c, norms=True, tied=True, biases=True):
    q, kv, inner, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size, c.hidden_size
    layer = hidden * (2*q + 2*kv + 3*inner)
    if norms: layer += 2 * hidden + 2 * c.head_dim * c.qk_norm
    if biases: layer += (q + 2*kv) * c.qkv_bias + hidden * c.o_bias + (2*inner + hidden) * c.mlp_bias
    return c.num_layers * layer + hidden * norms + c.vocab_size * hidden * (1 if c.tied and tied else 2)


right(model.check_count_parameters)(counted)
wrong(model.check_count_parameters, "for the plain toy gives")(lambda c: counted(c, norms=False))
wrong(model.check_count_parameters, "for the toy with a tied embedding")(lambda c: counted(c, tied=False))
wrong(model.check_count_parameters, "for the toy with biases")(lambda c: counted(c, biases=False))


def found_switches(names, layers=lambda names: len({n.split(".")[2] for n in names if ".layers." in n}), **others):
    text = " ".join(names)
    found = {switch: word in text for switch, word in dict(qkv_bias="q_proj.bias", o_bias="o_proj.bias", mlp_bias="mlp.up_proj.bias",
                                                           qk_norm="q_norm").items()}
    return dict(found, num_layers=layers(names), tied="lm_head" not in text, **others)


right(model.check_switches)(found_switches)
wrong(model.check_switches, "says num_layers=10, expected 12")(
    lambda names: found_switches(names, lambda names: int(max(n.split(".")[2] for n in names if ".layers." in n)) + 1))
wrong(model.check_switches, "says num_layers=1, expected 2")(
    lambda names: found_switches(names, lambda names: max(int(n.split(".")[2]) for n in names if ".layers." in n)))
wrong(model.check_switches, "has the keys")(lambda names: found_switches(names, sliding_window=None))
wrong(model.check_switches, "has the keys ['1', 'tied']")(lambda names: {1: 2, "tied": True})
wrong(model.check_switches, "says num_layers=[2, 2], expected 2")(lambda names: found_switches(names) | dict(num_layers=torch.tensor([2, 2])))
wrong(model.check_switches, "says tied=False")(lambda names: found_switches(names) | dict(tied=False))


@right(model.check_hidden_states)
def _(parts, rotary, token_ids, positions, attention):       # the pair, added up each time
    x = parts.embed_tokens(token_ids)
    for layer in parts.layers: x = sum(layer(x, torch.zeros_like(x), *rotary(positions), attention))
    return parts.norm(x)


def streamed(parts, rotary, token_ids, positions, attention, last=True, stream=True, at=None):
    x, rows = parts.embed_tokens(token_ids), rotary(positions if at is None else at)
    for layer in parts.layers:
        y = layer.input_layernorm(x)
        x = (x if stream else y) + layer.self_attn(y, *rows, attention)
        y = layer.post_attention_layernorm(x)
        x = (x if stream else y) + layer.mlp(y)
    return parts.norm(x) if last else x


wrong(model.check_hidden_states, "the last norm comes at the end")(lambda *a: streamed(*a, last=False))
wrong(model.check_hidden_states, "adds to the stream")(lambda *a: streamed(*a, stream=False))
wrong(model.check_hidden_states, "for the toy has")(lambda *a: streamed(*a, at=torch.zeros_like(a[3])))


@right(model.check_fold)
def _(model, m):                         # k instead of q; the whole scale of the output at the norm
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for p in attention.qkv_proj.parameters():
            attention.qkv_proj.split(p, 0)[1].mul_(m.attention_multiplier * attention.head_dim**.5)
        for part in attention.o_proj, mlp.down_proj:
            part.weight *= m.residual_multiplier
            if part.bias is not None: part.bias *= m.residual_multiplier
    model.model.embed_tokens.weight *= m.embedding_multiplier
    model.model.norm.weight /= m.logits_scaling * (m.embedding_multiplier if model.lm_head is None else 1)


def folded(model, m, scale=lambda c: c.head_dim**.5, tied=True, biases=True, both=False, norm=True):
    for layer in model.model.layers:
        qkv, ends = layer.self_attn.qkv_proj, (layer.self_attn.o_proj, layer.mlp.down_proj)
        for p in qkv.parameters():
            for part in qkv.split(p, 0)[:1 + both]: part.mul_(m.attention_multiplier * scale(model.config))
        for p in [p for end in ends for p in end.parameters()]:
            if biases or p.dim() == 2: p.mul_(m.residual_multiplier)
    model.model.embed_tokens.weight.mul_(m.embedding_multiplier)
    if norm: model.model.norm.weight.div_(m.logits_scaling)
    else: model.head.weight.div_(m.logits_scaling)
    if tied and model.config.tied: model.model.norm.weight.div_(m.embedding_multiplier)


wrong(model.check_fold, "is untied, with embedding_multiplier=12.0")(lambda *a: folded(*a, scale=lambda c: 1))
wrong(model.check_fold, "the decoder after fold")(lambda model, m: setattr(model.model.norm, "weight", None))
wrong(model.check_fold, "is untied, with attention_multiplier=0.3")(lambda *a: folded(*a, both=True))
wrong(model.check_fold, "is tied, with embedding_multiplier=12.0")(lambda *a: folded(*a, tied=False))
wrong(model.check_fold, "is tied, with logits_scaling=8.0")(lambda *a: folded(*a, norm=False))
wrong(model.check_fold, "is untied, with biases, with residual_multiplier=0.22")(lambda *a: folded(*a, biases=False))


# ---- the weights

def bytes_as_is(header, merged=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), size=lambda begin, end: end - begin):
    sizes = {name: size(*t["data_offsets"]) for name, t in header.items() if name != "__metadata__"}
    return sum(n for name, n in sizes.items() if not any(f".{part}." in name for part in merged)) / sum(sizes.values())


right(weights.check_share_as_is)(bytes_as_is)
wrong(weights.check_share_as_is, "q, k and v are merged, and gate and up")(lambda header: bytes_as_is(header, ("q_proj", "k_proj", "v_proj")))
wrong(weights.check_share_as_is, "numbers in bfloat16")(lambda header: bytes_as_is(
    {name: t if name == "__metadata__" else t | dict(data_offsets=[0, 4 * math.prod(t["shape"])]) for name, t in header.items()}))
wrong(weights.check_share_as_is, "8 bytes of 40")(lambda header: bytes_as_is(header, size=lambda begin, end: 1))
wrong(weights.check_share_as_is, "raises KeyError: 'data_offsets'")(
    lambda header: sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if not re.search("[qkv]_proj|gate|up", n))
    / sum(t["data_offsets"][1] - t["data_offsets"][0] for t in header.values()))


@right(weights.check_read_rows)
def _(tensor, rank, size):               # the first parts have one more
    n, more = divmod(tensor.get_shape()[0], size)
    start = rank * n + min(rank, more)
    return tensor[start:start + n + (rank < more)]


wrong(weights.check_read_rows, "and nothing else of the file is touched")(lambda tensor, rank, size: tensor[:].chunk(size)[rank])
wrong(weights.check_read_rows, "one after the other they should be the tensor")(
    lambda tensor, rank, size: tensor[rank * (tensor.get_shape()[0] // size):(rank + 1) * (tensor.get_shape()[0] // size)])
wrong(weights.check_read_rows, "no part is larger than")(lambda tensor, rank, size: tensor[slice(None) if rank == 0 else slice(0)])


def by_hand(tensors, length="<Q", begin=0, count=lambda text: len(text.encode()), data=lambda t: t.numpy().tobytes()):
    parts = [data(t) for t in tensors.values()]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    text = json.dumps({name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [begin + end - len(part), begin + end]}
                       for (name, t), part, end in zip(tensors.items(), parts, ends)}, ensure_ascii=False)
    return struct.pack(length, count(text)) + text.encode() + b"".join(parts)


right(weights.check_to_safetensors)(by_hand)
right(weights.check_to_safetensors)(safetensors.torch.save)
wrong(weights.check_to_safetensors, "one that it wrote itself")(lambda tensors: by_hand(tensors, length=">Q"))
wrong(weights.check_to_safetensors, "the library cannot read")(lambda tensors: by_hand(tensors, begin=8))
wrong(weights.check_to_safetensors, "the library cannot read")(lambda tensors: by_hand(tensors, count=len))
wrong(weights.check_to_safetensors, "x is read as")(lambda tensors: by_hand(tensors, data=lambda t: t.T.contiguous().numpy().tobytes()))


@right(weights.check_fill)
def _(places, tensors):                  # looks at all of them first
    given = list(tensors)
    for name in places:
        if [n for n, _ in given].count(name) != 1: raise ValueError(f"{name} is there {[n for n, _ in given].count(name)} times")
    for name, tensor in given:
        if name not in places or places[name].shape != tuple(tensor.shape): raise ValueError(f"{name} does not fit")
    for name, tensor in given: places[name].parameter[:] = tensor[places[name].index]


def filling(places, tensors, once=True, shapes=True, all_of_them=True, index=True, surplus=True):
    missing = dict(places)
    for name, tensor in tensors:
        if name not in (missing if once else places):
            if surplus: raise ValueError(f"surplus: {name}")
            continue
        parameter, shape, part = places[name]
        missing.pop(name, None)
        if shapes and list(tensor.shape) != list(shape): raise ValueError(f"{name}: shape")
        parameter.copy_(tensor[part] if index else tensor[:len(parameter)])
    if missing and all_of_them: raise ValueError(f"missing: {list(missing)}")


wrong(weights.check_fill, "though q.weight comes twice, raises nothing")(lambda *a: filling(*a, once=False))
wrong(weights.check_fill, "though k.weight is missing, raises nothing")(lambda *a: filling(*a, all_of_them=False))
wrong(weights.check_fill, "though there is a surplus bias, raises nothing")(lambda *a: filling(*a, surplus=False))
wrong(weights.check_fill, "which copy_ would spread")(lambda *a: filling(*a, shapes=False))
wrong(weights.check_fill, "copy the part `index`")(lambda *a: filling(*a, index=False))


@wrong(weights.check_fill, "raises KeyError: 'bias', not a ValueError")
def _(places, tensors):
    given = list(tensors)
    for name, tensor in given: places[name].parameter.copy_(tensor[places[name].index])
    if len(given) < len(places): raise ValueError([name for name in places if name not in dict(given)])


# ---- the model runner

right(model_runner.check_bytes_sent)(lambda n, context, size: [n * 24, n * (24 + 8 * ((context - 1) // size + 1))])
wrong(model_runner.check_bytes_sent, "and in the second case 256 tables of 257 blocks")(
    lambda n, context, size: (24 * n, 24 * n + 8 * n * max(1, context // size)))
wrong(model_runner.check_bytes_sent, "expected (1536, 132608)")(lambda n, context, size: (24 * n, 8 * n * -(-context // size)))


@right(model_runner.check_flat)
def _(tables, rows, starts, lens, size):
    pairs = [(row, p) for row, start, n in zip(rows, starts, lens) for p in range(start, start + n)]
    return [p for _, p in pairs], torch.tensor([tables[row, p // size] * size + p % size for row, p in pairs])


def flattened(tables, rows, starts, lens, size, shift=True, by_row=True):
    positions = np.arange(lens.sum()) + np.repeat(starts - shift * (np.cumsum(lens) - lens), lens)
    which = np.repeat(rows if by_row else np.arange(len(rows)), lens)
    return positions, tables[which, positions // size % tables.shape[1]] * size + positions % size


wrong(model_runner.check_flat, "gives the positions")(lambda *a: flattened(*a, shift=False))
wrong(model_runner.check_flat, "gives the slots")(lambda *a: flattened(*a, by_row=False))
wrong(model_runner.check_flat, "gives the slots")(lambda *a: (flattened(*a)[0],) * 2)
wrong(model_runner.check_flat, "not positions and slots")(lambda *a: flattened(*a)[1])


@right(model_runner.check_rows)
class ByDictionary:
    def __init__(self, table): self.table, self.rows, self.len = table, {}, [0] * len(table)
    def row_of(self, name): return self.rows[name]

    def add(self, name):
        self.rows[name] = len(self.rows)
        self.len[self.rows[name]] = 0

    def update(self, name, blocks):
        row = self.rows[name]
        for i in range(self.len[row], len(blocks)): self.table[row][i] = blocks[i]
        self.len[row] = len(blocks)

    def remove(self, name):
        row, last = self.rows.pop(name), len(self.rows)
        for other, at in self.rows.items():
            if at != last: continue
            self.table[row, :self.len[last]] = self.table[last, :self.len[last]]
            self.rows[other], self.len[row] = row, self.len[last]


@wrong(model_runner.check_rows, "without a gap")
class WithGaps(ByDictionary):
    def remove(self, name): del self.rows[name]


@wrong(model_runner.check_rows, "row_of('B') raises KeyError")
class KnowsOne(ByDictionary):
    def add(self, name): self.rows = {name: len(self.rows)} if name != "B" else self.rows


@wrong(model_runner.check_rows, "the rows are {'A': 0, 'B': None}; sorting them raises TypeError")
class FindsOne(ByDictionary):
    def row_of(self, name): return self.rows[name] if name == "A" else None


@wrong(model_runner.check_rows, "1 are enough")
class WritesAll(ByDictionary):
    def update(self, name, blocks): self.table[self.rows[name], :len(blocks)] = blocks


@wrong(model_runner.check_rows, "the row of C begins with")
class ForgetsTheBlocks(ByDictionary):
    def remove(self, name):
        row, last = self.rows.pop(name), len(self.rows)
        for other, at in self.rows.items():
            if at == last: self.rows[other], self.len[row] = row, self.len[last]


@wrong(model_runner.check_rows, "where remove('A') has written")
class LikeAList(ByDictionary):
    def remove(self, name):
        row = self.rows.pop(name)
        self.table[row:-1] = self.table[row + 1:].copy()
        self.len[row:-1] = self.len[row + 1:]
        self.rows = {other: at - (at > row) for other, at in self.rows.items()}


@wrong(model_runner.check_rows, "the row of")
class ForgetsTheLength(ByDictionary):
    def remove(self, name):
        lens = list(self.len)
        super().remove(name)
        self.len = lens


# ---- CUDA graphs

right(cuda_graphs.check_bytes_to_send)(lambda changed, fields: 24 * changed if 3 * changed < fields + 1 else 8 + 8 * fields)
wrong(cuda_graphs.check_bytes_to_send, "the row's number and 5 fields")(lambda changed, fields: min(24 * changed, 8 * fields))
wrong(cuda_graphs.check_bytes_to_send, "gives 72, expected 48")(lambda changed, fields: 24 * changed)


@right(cuda_graphs.check_through_graph)
def _(replay, static_in, static_out, inputs):
    def one(x):
        static_in.copy_(F.pad(x, (0, 0, 0, len(static_in) - len(x))))
        replay()
        return torch.cat([static_out[:len(x)]])
    return tuple(map(one, inputs))


def through(replay, static_in, static_out, inputs, pad=True, keep=torch.clone, cut=True):
    outputs = []
    for x in inputs:
        if pad: static_in.zero_()
        static_in[:len(x)] = x
        replay()
        outputs.append(keep(static_out[:len(x)] if cut else static_out))
    return outputs


wrong(cuda_graphs.check_through_graph, "copy what is to stay")(lambda *a: through(*a, keep=lambda y: y))
wrong(cuda_graphs.check_through_graph, "the rows of the padding must be 0")(lambda *a: through(*a, pad=False))
wrong(cuda_graphs.check_through_graph, "has shape (4, 2), expected (3, 2)")(lambda *a: through(*a, cut=False))
wrong(cuda_graphs.check_through_graph, "gives 4, not a list of outputs")(lambda *a: len(through(*a)))


@wrong(cuda_graphs.check_through_graph, "the graph knows memory, not names")
def _(replay, static_in, static_out, inputs):
    outputs = []
    for static_in in inputs:
        replay()
        outputs.append(static_out[:len(static_in)].clone())
    return outputs


@right(cuda_graphs.check_best_buckets)
def _(counts, k):                        # by trying
    some = [(*rest, max(counts)) for n in range(k) for rest in combinations(sorted(counts), n)]
    return min(some, key=lambda buckets: sum(times * (min(b for b in buckets if b >= n) - n) for n, times in counts.items()))


wrong(cuda_graphs.check_best_buckets, "there is no room for a batch of 8")(lambda counts, k: sorted(counts, key=lambda n: -counts[n])[1:k+1])
wrong(cuda_graphs.check_best_buckets, "are enough, for example with")(lambda counts, k: [*sorted(counts)[:k-1], max(counts)])
wrong(cuda_graphs.check_best_buckets, "are enough, for example with")(               # the largest and the most frequent
    lambda counts, k: [max(counts), *sorted(set(counts) - {max(counts)}, key=lambda n: -counts[n])[:k-1]])
wrong(cuda_graphs.check_best_buckets, "gives 4 buckets")(lambda counts, k: sorted(counts))
wrong(cuda_graphs.check_best_buckets, "gives 8; reading it as numbers raises TypeError")(lambda counts, k: max(counts))


class Recording(cuda_graphs.Tape):
    def __init__(self, step):
        super().__init__()
        with self: step()

    def __call__(self):
        for op, args, kwargs, out in self.calls:
            new = op(*args, **kwargs)
            for old, one in zip(tree_leaves(out), tree_leaves(new)):
                if old.data_ptr() != one.data_ptr(): old.copy_(one)


@right(cuda_graphs.check_record)
def _(step):
    step()                               # as a GPU's recorder does, first as usual
    return Recording(step)


wrong(cuda_graphs.check_record, "calls step again")(lambda step: step() or step)
wrong(cuda_graphs.check_record, "gives None, not a function")(lambda step: step())
wrong(cuda_graphs.check_record, "does not call step")(lambda step: lambda: None)


@wrong(cuda_graphs.check_record, "each result belongs where the first one is")
def _(step):                             # repeats the operators, and lets their results go
    with cuda_graphs.Tape() as tape: step()
    return lambda: [op(*args, **kwargs) for op, args, kwargs, _ in tape.calls] and None


@wrong(cuda_graphs.check_record, "what works in place does so once")
def _(step):
    with cuda_graphs.Tape() as tape: step()

    def replay():
        for op, args, kwargs, out in tape.calls:
            for _ in range(1 + op._schema.is_mutable): new = op(*args, **kwargs)
            for old, one in zip(tree_leaves(out), tree_leaves(new)): old.copy_(one)
    return replay


@right(cuda_graphs.check_attend)
def _(q, keys, values, length):          # weights of 0 by hand
    scores = keys @ q
    seen = (torch.arange(len(keys)) < length).to(scores.dtype)
    weights = (scores - torch.where(seen > 0, scores, -1e9).max()).clamp(max=0).exp() * seen
    return (weights[:, None] * values).sum(0) / weights.sum()


wrong(cuda_graphs.check_attend, "recorded with length 3 and replayed with length 5")(
    lambda q, keys, values, length: (keys[:length] @ q).softmax(0) @ values[:length])
wrong(cuda_graphs.check_attend, "only the first `length` keys are the text's")(lambda q, keys, values, length: (keys @ q).softmax(0) @ values)
wrong(cuda_graphs.check_attend, "only the first `length` keys are the text's")(
    lambda q, keys, values, length: (keys @ q * (torch.arange(len(keys)) < length)).softmax(0) @ values)
wrong(cuda_graphs.check_attend, "is frozen")(
    lambda q, keys, values, length: (keys @ q).masked_fill(torch.arange(len(keys)) >= int(length), -torch.inf).softmax(0) @ values)


# ---- LLM

@right(llm.check_perplexity)
def _(entries, tokens):
    likely = [entry[token].logprob for entry, token in zip(entries[1:], tokens[1:])]
    return float(np.exp(-np.mean(likely)))


def perplexity_by(entries, tokens, of=lambda entry, token: entry[token].logprob, count=lambda n: n):
    return np.exp(-sum(of(e, t) for e, t in zip(entries[1:], tokens[1:])) / count(len(tokens) - 1)).item()


wrong(llm.check_perplexity, "of tokens of probability 1/2 and 1/8")(lambda *a: perplexity_by(*a, count=lambda n: n + 1))
wrong(llm.check_perplexity, "of tokens of probability 1/2 and 1/8")(lambda *a: perplexity_by(*a, count=lambda n: 1))
wrong(llm.check_perplexity, "whose entry also has the best one")(lambda *a: perplexity_by(*a, of=lambda e, t: next(iter(e.values())).logprob))
wrong(llm.check_perplexity, "raises TypeError")(lambda entries, tokens: np.exp(-np.mean([e[t].logprob for e, t in zip(entries, tokens)])))


@right(llm.check_whole_words)
def _(pieces):                           # one word at a time
    word = ""
    for char in (char for piece in pieces for char in piece):
        word += char
        if char == " ":
            yield word
            word = ""
    yield word


wrong(llm.check_whole_words, "was given on")(lambda pieces: pieces)
wrong(llm.check_whole_words, "and not later")(lambda pieces: re.findall(r"\S* ?", "".join(pieces)))


@wrong(llm.check_whole_words, "at the end, all of the text")
def _(pieces):
    waiting = ""
    for piece in pieces:
        *words, waiting = (waiting + piece).split(" ")
        for word in words: yield word + " "


@wrong(llm.check_whole_words, "was given on")
def _(pieces):                           # without the spaces
    waiting = ""
    for piece in pieces:
        *words, waiting = (waiting + piece).split(" ")
        yield from words
    yield waiting


wrong(llm.check_whole_words, "Is a `yield` missing?")(lambda pieces: None)


@right(llm.check_by_streaming)
def _(llm, prompts, params):             # one after the other
    return ["".join(piece["text"] for piece in llm.stream(prompt, params)) for prompt in prompts]


def streamed_texts(llm, prompts, params, key=lambda piece: piece.request_id, order=sorted):
    texts = {}
    for piece in llm.stream(prompts, params): texts[key(piece)] = texts.get(key(piece), "") + piece["text"]
    return [texts[name] for name in order(texts)]


wrong(llm.check_by_streaming, "after '9' comes '10'")(streamed_texts)
wrong(llm.check_by_streaming, "equal prompts are requests of their own")(
    lambda llm, prompts, params: streamed_texts(llm, prompts, params, lambda piece: piece.prompt, lambda texts: prompts))
wrong(llm.check_by_streaming, "use nothing but `stream`")(lambda llm, prompts, params: [out["text"] for out in llm.generate(prompts, params)])


@wrong(llm.check_by_streaming, "gives")
def _(llm, prompts, params):             # the last piece only
    last = {piece.request_id: piece["text"] for piece in llm.stream(prompts, params)}
    return [last[name] for name in sorted(last, key=int)]


@right(llm.check_ended)
def _(engine, requests):
    return progress(engine, requests)


def each_ended(engine, requests, given=lambda waiting: [r for r in waiting if r.finished], whom=None, always=True):
    waiting = list(requests)
    for request in requests: engine.add(request)
    try:
        while waiting:
            if not any(r.finished for r in waiting): engine.step()
            for request in given(waiting):
                waiting.remove(request)
                yield request
        whole = True
    except GeneratorExit:
        whole = always
        raise
    finally:
        for name in [r.request_id for r in requests] if whom is None else whom(engine):
            if always or whole: engine.abort(name)


right(llm.check_ended)(each_ended)
wrong(llm.check_ended, "abort only your own")(lambda *a: each_ended(*a, whom=lambda engine: list(engine.requests)))
wrong(llm.check_ended, "was closed, the engine still has the requests")(lambda *a: each_ended(*a, whom=lambda engine: []))
wrong(llm.check_ended, "is given before it has ended")(lambda *a: each_ended(*a, given=lambda waiting: waiting[:1]))
wrong(llm.check_ended, "with `yield`")(lambda engine, requests: requests)


@wrong(llm.check_ended, "give each when it ends")
def _(engine, requests):
    yield from sorted(each_ended(engine, requests), key=lambda r: r.request_id)


@wrong(llm.check_ended, "left by an exception, the engine still has the requests")
def _(engine, requests):                 # thinks of closing only
    waiting = list(requests)
    for request in requests: engine.add(request)
    try:
        while waiting:
            while not any(r.finished for r in waiting): engine.step()
            done = next(r for r in waiting if r.finished)
            waiting.remove(done)
            yield done
    except GeneratorExit:
        for request in requests: engine.abort(request.request_id)


@wrong(llm.check_ended, "a request may end in a step that another reader has asked for")
def _(engine, requests):                 # looks only at what has ended in its own step
    try:
        for request in requests: engine.add(request)
        while not all(r.finished for r in requests):
            before = [r.finished for r in requests]
            engine.step()
            for ended, request in zip(before, requests):
                if request.finished and not ended: yield request
    finally:
        for request in requests: engine.abort(request.request_id)


# ---- the benchmark

right(benchmark.check_even_context)(lambda batch, weights, token: weights / token / batch)
wrong(benchmark.check_even_context, "32 texts of that length")(lambda batch, weights, token: weights / token)
wrong(benchmark.check_even_context, "gives 364, expected 364.")(lambda batch, weights, token: weights // (batch * token) // 1)


def roof(batch, context, weights, itemsize, token, bandwidth, peak, join=max, kv=True, tokens=True):
    read = (weights * itemsize + batch * context * token * kv) / bandwidth
    return (batch if tokens else 1) / join(read, 2 * batch * weights / peak)


right(benchmark.check_bound)(lambda *a: min(roof(*a, join=lambda read, computed: read), roof(*a, join=lambda read, computed: computed)))
wrong(benchmark.check_bound, "computes for")(lambda *a: roof(*a, join=lambda read, computed: read + computed))
wrong(benchmark.check_bound, "computes for")(lambda *a: roof(*a, join=min))
wrong(benchmark.check_bound, "(10, 100, 134515008")(lambda *a: roof(*a, kv=False))
wrong(benchmark.check_bound, "and gives 32 tokens")(lambda *a: roof(*a, tokens=False))

right(benchmark.check_padding_ratio)(
    lambda prompts, outputs: len(prompts) * max(prompts) / sum(prompts + outputs) + len(prompts) * max(outputs) / sum(prompts + outputs))
wrong(benchmark.check_padding_ratio, "as wide as the longest prompt and as long as the longest output")(
    lambda prompts, outputs: len(prompts) * max(p + o for p, o in zip(prompts, outputs)) / sum(prompts + outputs))
wrong(benchmark.check_padding_ratio, "expected")(lambda prompts, outputs: sum(prompts + outputs) / len(prompts) / (max(prompts) + max(outputs)))


@right(benchmark.check_output_rate)
def _(generate, work, clock):
    times = [clock()]
    outputs = generate(work)
    times.append(clock())
    for ids, params in zip(outputs, work.params, strict=True):
        if len(ids) != params.max_tokens: raise ValueError("not all of the work")
    return work.num_output_tokens / (times[1] - times[0])


def rate_of(generate, work, clock, tokens=lambda work: work.num_output_tokens, strict=True, compare=lambda n, wanted: n == wanted):
    start = clock()
    outputs = generate(work)
    for ids, params in zip(outputs, work.params, strict=strict):
        if not compare(len(ids), params.max_tokens): raise ValueError
    return tokens(work) / (clock() - start)


wrong(benchmark.check_output_rate, "is 22.5, expected 5.0")(
    lambda *a: rate_of(*a, tokens=lambda work: work.num_prompt_tokens + work.num_output_tokens))
wrong(benchmark.check_output_rate, "though an output is missing")(lambda *a: rate_of(*a, strict=False))
wrong(benchmark.check_output_rate, "though the first is too long")(lambda *a: rate_of(*a, compare=lambda n, wanted: n >= wanted))
wrong(benchmark.check_output_rate, "though the second output is too short")(lambda *a: rate_of(*a, compare=lambda n, wanted: True))


@right(benchmark.check_found_again)
def _(prompts, size):                    # by comparing with all that came before
    found = 0
    for i, prompt in enumerate(prompts):
        common = [next((n for n, (a, b) in enumerate(zip(p, prompt)) if a != b), min(len(p), len(prompt))) for p in prompts[:i]]
        blocks = [min(n, len(prompt) - 1) // size for n in common]
        found += size * max(blocks, default=0)
    return found


def found_by(prompts, size, key=lambda prompt, i, size: tuple(prompt[:(i + 1) * size]), leave=1):
    cached, found = set(), 0
    for prompt in prompts:
        for i in range((len(prompt) - leave) // size):
            if key(prompt, i, size) not in cached: break
            found += size
        cached.update(key(prompt, i, size) for i in range(len(prompt) // size))
    return found


wrong(benchmark.check_found_again, "the same tokens at another place")(
    lambda *a: found_by(*a, key=lambda prompt, i, size: tuple(prompt[i * size:(i + 1) * size])))
wrong(benchmark.check_found_again, "a prompt that fills its blocks, twice")(lambda *a: found_by(*a, leave=0))
wrong(benchmark.check_found_again, "a common system prompt")(
    lambda prompts, size: sum((len(p) - 1) // size * size for i, p in enumerate(prompts) if p in prompts[:i]))


# ---- under load

right(latency.check_longest_gap)(lambda n, tpot: sum([tpot] * (n - 1)))
wrong(latency.check_longest_gap, "64 tokens have 63 gaps")(lambda n, tpot: n * tpot)
wrong(latency.check_longest_gap, "all but one may be 0")(lambda n, tpot: tpot)


@right(latency.check_what_a_reader_sees)
def _(arrival, tokens):
    gaps = [b - a for a, b in zip(tokens, tokens[1:])]
    return [tokens[0] - arrival, sum(gaps) / len(gaps) if gaps else None, max(gaps, default=None)]


def seen_by_reader(arrival, tokens, first=lambda arrival, tokens: tokens[0] - arrival, divide=lambda n: n - 1):
    if len(tokens) == 1: return first(arrival, tokens), None, None
    return first(arrival, tokens), (tokens[-1] - tokens[0]) / divide(len(tokens)), max(np.diff(tokens))


wrong(latency.check_what_a_reader_sees, "gives a time per output token of 1.5")(lambda *a: seen_by_reader(*a, divide=lambda n: n))
wrong(latency.check_what_a_reader_sees, "gives a time to the first token of 12.0")(lambda *a: seen_by_reader(*a, first=lambda arrival, tokens: tokens[0]))
wrong(latency.check_what_a_reader_sees, "raises ValueError")(
    lambda arrival, tokens: (tokens[0] - arrival, np.diff(tokens).sum() / max(len(tokens) - 1, 1), max(np.diff(tokens))))


@right(latency.check_waits)
def _(arrivals, seconds):                # Lindley's recursion
    found = [0.]
    for i in range(1, len(arrivals)): found.append(max(0, found[-1] + seconds[i - 1] - (arrivals[i] - arrivals[i - 1])))
    return np.array(found)


wrong(latency.check_waits, "and all before it are done")(lambda arrivals, seconds: [sum(seconds[:i]) for i in range(len(seconds))])
wrong(latency.check_waits, "in waits([1.0, 1.0, 1.0], [2.0, 3.0, 4.0]), all at once, request 2")(   # sees only the one before
    lambda arrivals, seconds: [max(0., (arrivals[i - 1] + seconds[i - 1] if i else 0.) - at) for i, at in enumerate(arrivals)])
wrong(latency.check_waits, "request 0 waits 1.000 s, expected 0.000")(
    lambda arrivals, seconds: [max(sum(seconds[:i + 1]) - at, 0.) for i, at in enumerate(arrivals)])


def serving(engine, requests, arrivals, clock, sleep, early=False, after=True, naps=lambda wait: wait, busy=lambda engine: engine.requests, until_all=True):
    coming, lines = list(zip(arrivals, requests)), [[] for _ in requests]
    while coming or (engine.requests and until_all):
        while coming and (early or coming[0][0] <= clock()): engine.add(coming.pop(0)[1])
        before = clock()
        if busy(engine): engine.step()
        else: sleep(naps(coming[0][0] - clock()))
        for request, line in zip(requests, lines):
            line.extend([clock() if after else before] * (request.num_generated_tokens - len(line)))
    return lines


right(latency.check_serve)(serving)
right(latency.check_serve)(lambda *a: serving(*a, naps=lambda wait: min(wait, .05)))      # looks in now and then
wrong(latency.check_serve, "it arrives only at")(lambda *a: serving(*a, early=True))
wrong(latency.check_serve, "read the clock after the step")(lambda *a: serving(*a, after=False))
wrong(latency.check_serve, "there is nothing to compute")(lambda *a: serving(*a, busy=lambda engine: True))
wrong(latency.check_serve, "has all of its tokens")(lambda *a: serving(*a, until_all=False))


@wrong(latency.check_serve, "it has arrived by then")
def _(engine, requests, arrivals, clock, sleep):         # the next one only when the engine is idle
    lines = []
    for request, at in zip(requests, arrivals):
        if at > clock(): sleep(at - clock())
        engine.add(request)
        lines.append([])
        while engine.requests:
            engine.step()
            lines[-1].append(clock())
    return lines


# ---- the command line

@right(cli.check_add_stop)
def _(parser):
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--stop", action="extend", nargs=1, type=str)


wrong(cli.check_add_stop, "is parsed to {'stop': 'b'}")(lambda parser: parser.add_argument("--stop", default=argparse.SUPPRESS))
wrong(cli.check_add_stop, "leaves no trace")(lambda parser: parser.add_argument("--stop", action="append"))
wrong(cli.check_add_stop, "expected {'stop': ['a', 'b']}")(lambda parser: parser.add_argument("--stop", nargs="+", default=argparse.SUPPRESS))


@right(cli.check_number_of)
def _(text):
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    if match is None: raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()]


wrong(cli.check_number_of, "number_of('8K') raises ValueError")(lambda text: int(text.replace("k", "")) * 1024**("k" in text))
wrong(cli.check_number_of, "'8kk' is taken for")(
    lambda text: int(text.lower().rstrip("km")) * dict(k=2**10, m=2**20).get(text[-1:].lower(), 1))
wrong(cli.check_number_of, "number_of('100') gives 100.0")(float)
wrong(cli.check_number_of, "'1.5k' is taken for 1536")(
    lambda text: int(float(text[:-1]) * 2**(10 if text[-1].lower() == "k" else 20)) if text[-1:].lower() in ("k", "m") else int(text))
wrong(cli.check_number_of, "bad text has to raise a ValueError")(
    lambda text: int(text[:-1]) * {"k": 2**10, "m": 2**20}[text[-1].lower()] if not text[-1].isdigit() else int(text))


@right(cli.check_add_table)
def _(parser, table):                    # two switches by hand
    for name, (kind, text) in table.items():
        option, others = name.replace("_", "-"), dict(default=argparse.SUPPRESS, dest=name)
        if kind is not bool:
            parser.add_argument(f"--{option}", type=kind, help=text, **others)
            continue
        parser.add_argument(f"--{option}", action="store_true", help=text, **others)
        parser.add_argument(f"--no-{option}", action="store_false", **others)


def adding(parser, table, dashes=True, suppress=True, switch=True, kinds=True, helps=True):
    for name, (kind, text) in table.items():
        form = dict(action=argparse.BooleanOptionalAction) if kind is bool and switch else dict(type=kind if kinds else str)
        parser.add_argument("--" + (name.replace("_", "-") if dashes else name), default=argparse.SUPPRESS if suppress else None,
                            help=text if helps else None, **form)


wrong(cli.check_add_table, "leaves no trace")(lambda *a: adding(*a, suppress=False))
wrong(cli.check_add_table, "['--max-tokens', '5'] is refused")(lambda *a: adding(*a, dashes=False))
wrong(cli.check_add_table, "['--async-scheduling'] is refused")(lambda *a: adding(*a, switch=False))
wrong(cli.check_add_table, "expected {'max_tokens': 5}")(lambda *a: adding(*a, kinds=False))
wrong(cli.check_add_table, "--help does not say")(lambda *a: adding(*a, helps=False))


@right(cli.check_exit_code)
def _(command):
    code, said = 0, ""
    try: command()
    except KeyboardInterrupt: code = 130
    except ValueError as error: code, said = 2, str(error)
    except RuntimeError as error: code, said = 2, str(error)
    if said: print(f"nano-vllm: {said}", file=sys.stderr)
    return code


def ending(command, kinds=(ValueError, RuntimeError), file=None, interrupted=130, fine=0):
    try: command()
    except kinds as error:
        print(f"error: {error}", file=file or sys.stderr)
        return 2
    except KeyboardInterrupt: return interrupted
    return fine


wrong(cli.check_exit_code, "hide no bugs")(lambda command: ending(command, kinds=Exception))
wrong(cli.check_exit_code, "raises RuntimeError('no g++')")(lambda command: ending(command, kinds=ValueError))
wrong(cli.check_exit_code, "messages go to standard error")(lambda command: ending(command, file=sys.stdout))
wrong(cli.check_exit_code, "gives None, expected 0")(lambda command: ending(command, fine=None))
wrong(cli.check_exit_code, "gives 2, expected 130")(lambda command: ending(command, interrupted=2))


# ---- Triton kernels

right(triton_kernels.check_address)(lambda position, table, size, head, heads, dim: (
    table[position // size] * size * heads * dim + position % size * heads * dim + head * dim))
wrong(triton_kernels.check_address, "in slot 5 of block 9")(lambda position, table, size, head, heads, dim: (position * heads + head) * dim)
wrong(triton_kernels.check_address, "each slot holds 3 heads of 64")(lambda position, table, size, head, heads, dim: (
    (table[position // size] * heads + head) * size + position % size) * dim)

wrong(triton_kernels.check_address, "gives [28672, 28673], expected 28672")(lambda position, *a: torch.tensor([28672, 28673]))


@right(triton_kernels.check_join)
def _(states):                           # one after the other
    best, mass, acc = states[0]
    for other, more, part in states[1:]:
        top = max(best, other)
        a, b = (np.exp(x - top) if x > -np.inf else 0. for x in (best, other))
        best, mass, acc = top, a * mass + b * more, a * acc + b * part
    return best, mass, acc


def joined(states, shrink=lambda x, best: np.exp(x - best), top=max, keep_mass=False):
    best = top(x for x, *_ in states)
    factors = [shrink(x, best) for x, *_ in states]
    return best, sum(m * (1 if keep_mass else f) for f, (_, m, _) in zip(factors, states)), sum(f * acc for f, (*_, acc) in zip(factors, states))


wrong(triton_kernels.check_join, "relative to its own best score")(lambda states: joined(states, keep_mass=True))
wrong(triton_kernels.check_join, "gives None for mass, not a number")(lambda states: (joined(states)[0], None, joined(states)[2]))
wrong(triton_kernels.check_join, "for mass, not a number")(lambda states: (joined(states)[0], joined(states)[2], joined(states)[2]))
wrong(triton_kernels.check_join, "has the best score")(lambda states: joined(states, top=lambda bests: list(bests)[0]))


@wrong(triton_kernels.check_join, "join of large scores has nan")
def _(states):                           # relative to no score at all
    best = max(b for b, *_ in states)
    mass, acc = (sum(math.exp(state[0]) * state[i] for state in states) for i in (1, 2))
    return best, mass / math.exp(best), acc / math.exp(best)


KERNELS = """
@triton.jit
def row_softmax(x, out, n, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    row = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=OTHER)
    p = tl.exp(row - LARGEST)
    tl.store(out + tl.program_id(0) * n + i, p / tl.sum(p, 0), mask=STORED)

@triton.jit
def window_head(q, keys, values, out, tables, lens, table_row, scale, window, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                SIZE: tl.constexpr, DIM: tl.constexpr):
    seq, head, dims = tl.program_id(0), tl.program_id(1), tl.arange(0, DIM)
    query = tl.load(q + (seq * KV_HEADS*GROUP + head) * DIM + dims)
    length = tl.load(lens + seq)
    low = tl.maximum(length - WINDOW, 0)
    mass, acc = 0., tl.zeros([DIM], tl.float32)
    for position in tl.range(BEGIN, length, 1):                # key by key; the scores are small enough for no shrinking
        slot = tl.load(tables + seq * table_row + position // SIZE) * SIZE + position % SIZE
        place = (slot * KV_HEADS + head // GROUP) * DIM + dims
        weight = tl.where(position >= low, tl.exp2(tl.sum(tl.load(keys + place) * query, 0) * scale), 0.)
        mass += weight
        acc += weight * tl.load(values + place)
    tl.store(out + (seq * KV_HEADS*GROUP + head) * DIM + dims, acc / mass)
"""


def kernel(name, OTHER="float('-inf')", LARGEST="tl.max(row, 0)", STORED="i < n", WINDOW="window", BEGIN="low"):
    "The kernel `name` of KERNELS, with faults put in."
    return kernel_of(KERNELS, name, OTHER=OTHER, LARGEST=LARGEST, STORED=STORED, WINDOW=WINDOW, BEGIN=BEGIN)


right(triton_kernels.check_row_softmax)(kernel("row_softmax"))
wrong(triton_kernels.check_row_softmax, "are no numbers of the row")(kernel("row_softmax", OTHER="0."))
wrong(triton_kernels.check_row_softmax, "subtract the largest number first")(kernel("row_softmax", LARGEST="0."))
wrong(triton_kernels.check_row_softmax, "writes behind the last row")(kernel("row_softmax", STORED="i >= 0"))
wrong(triton_kernels.check_row_softmax, "is @triton.jit missing?")(lambda x, out, n, WIDTH: x.softmax(1))

right(triton_kernels.check_window_head)(kernel("window_head"))
wrong(triton_kernels.check_window_head, "it sees its last 5 keys")(kernel("window_head", WINDOW="length"))
wrong(triton_kernels.check_window_head, "it sees its last 5 keys")(kernel("window_head", WINDOW="(window + 1)"))
wrong(triton_kernels.check_window_head, "mask the keys before the window")(kernel("window_head", BEGIN="low // SIZE * SIZE"))
wrong(triton_kernels.check_window_head, "mask the keys before the window")(kernel("window_head", BEGIN="0"))


# ---- Triton attention

right(triton_attention.check_side_traffic)(lambda split, group, dim, itemsize: 4 * group * (1 + 2 / dim) / (split * itemsize))
wrong(triton_attention.check_side_traffic, "are written and read again")(lambda split, group, dim, itemsize: 4 * group * (dim + 2) / (2 * split * dim * itemsize))
wrong(triton_attention.check_side_traffic, "256 keys and values")(lambda split, group, dim, itemsize: 8 * group * (dim + 2) / (split * dim * itemsize))

right(triton_attention.check_unnoticed)((7., 0., 1., 2., 7., 7., -3., 0., 7.))
wrong(triton_attention.check_unnoticed, "there is one split only")([1, 2, 3, 4])
wrong(triton_attention.check_unnoticed, "it is to be a list of more than four numbers")([10**400] * 8)
wrong(triton_attention.check_unnoticed, "all of your scores are equal")([2.] * 8)
wrong(triton_attention.check_unnoticed, "the best scores of the splits are [5.0, 4.0]")([1, 5, 2, 3, 4, 0, 0, 1])


@right(triton_attention.check_decode)
def _(q, read, context, split):          # online, from the last split to the first
    best, mass, acc = torch.tensor(-3e38), 0., 0.
    for begin in reversed(range(0, context, split)):
        keys, values = read(begin, min(begin + split, context))
        scores = keys @ q
        top = torch.maximum(best, scores.max())
        p, shrink = (scores - top).exp(), (best - top).exp()
        best, mass, acc = top, mass * shrink + p.sum(), acc * shrink + p @ values
    return acc / mass


def in_splits(q, read, context, split, shrink=True, whole=False, end=lambda n, context: min(n, context)):
    parts = [read(begin, end(begin + split, context)) for begin in range(0, context, context if whole else split)]
    logs = torch.stack([(keys @ q).logsumexp(0) for keys, _ in parts])
    outs = torch.stack([(keys @ q).softmax(0) @ values for keys, values in parts])
    return logs.softmax(0) @ outs if shrink else outs.mean(0)


right(triton_attention.check_decode)(in_splits)
wrong(triton_attention.check_decode, "shrink each part's mass and acc")(lambda *a: in_splits(*a, shrink=False))
wrong(triton_attention.check_decode, "for a context of 10")(lambda *a: in_splits(*a, end=lambda n, context: n))
wrong(triton_attention.check_decode, "in splits that begin at multiples of their length")(
    lambda q, read, context, split: in_splits(q, read, context, -(-context // 2)))


@right(triton_attention.check_list_work)
def _(num_items, capacity):
    ends = torch.cumsum(num_items, 0)
    return F.pad(ends, (1, 0)), (torch.arange(capacity)[:, None] >= ends).sum(1)


wrong(triton_attention.check_list_work, "gives item_seq")(
    lambda n, capacity: (F.pad(n.cumsum(0), (1, 0)), torch.searchsorted(n.cumsum(0), torch.arange(capacity))))
wrong(triton_attention.check_list_work, "gives first_item")(
    lambda n, capacity: (n.cumsum(0), torch.searchsorted(n.cumsum(0), torch.arange(capacity), right=True)))
wrong(triton_attention.check_list_work, "recorded with [4, 1, 2] and repeated with [1, 0, 3]")(
    lambda n, capacity: (F.pad(n.cumsum(0), (1, 0)), torch.tensor(
        [i for i, k in enumerate(n.tolist()) for _ in range(k)] + [len(n)] * (capacity - int(n.sum())))))
wrong(triton_attention.check_list_work, "asks for other shapes, or for numbers on the host")(
    lambda n, capacity: (F.pad(n.cumsum(0), (1, 0)), F.pad(torch.arange(len(n)).repeat_interleave(n), (0, capacity - int(n.sum())), value=len(n))))
