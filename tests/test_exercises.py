"""The exercises: each check accepts the solution and other right answers, and says of wrong ones in which case they are wrong.

Most of this file are answers, as readers might give them: right ones that are written otherwise than the solution, and the
mistakes that one makes. Those marked `wrong` say what the check's message has to name."""
import ast
import contextlib
import importlib
import io
import json
import re
from collections import OrderedDict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import quarto_filter
from book import Chapter, chapters
from nano_vllm.kv_blocks import BlockPool, SchedulerOutput, blocks_needed
from nano_vllm.prefix_cache import KVCacheManager, hash_block
from nano_vllm.sampler import LOGIT_STAGES, SAMPLING_STAGES, run_stages
from nano_vllm.scheduler import Scheduler
from nano_vllm.tokenizer import StopFilter
from solutions.checks import (
    WrongAnswer, attention, call, engine, exercise, kv_blocks, prefix_cache, sampler, scheduler, show, tiny, tokenizer)

EXERCISED = [c for c in chapters() if c.solutions.exists()]
CHECKS = {name: check for module in (tiny, tokenizer, sampler, kv_blocks, prefix_cache, attention, scheduler, engine)
          for name, check in vars(module).items() if name.startswith("check_")}
ANSWERS = []     # (check, answer, what the message names, or None for a right answer)


def right(check):
    def note(answer): ANSWERS.append((check, answer, None)); return answer
    return note


def wrong(check, says):
    def note(answer): ANSWERS.append((check, answer, says)); return answer
    return note


# ---- 01, a whole engine

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


# ---- 02, the tokenizer

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


# ---- 03, sampling

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
wrong(sampler.check_sampling_probabilities, "for temperature=2 and logits")(lambda *a: probabilities(*a, stages=SAMPLING_STAGES[1:]))
wrong(sampler.check_sampling_probabilities, "for top_k=3 and logits")(lambda *a: probabilities(*a, stages=SAMPLING_STAGES[:1]))
wrong(sampler.check_sampling_probabilities, "for temperature=0 and logits")(
    lambda x, m: run_stages(LOGIT_STAGES, x, m).softmax(-1))


# ---- 04, KV blocks

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


@right(kv_blocks.check_make_writable)
def _(pool, table):
    *others, last = table
    if pool.ref_counts[last] < 2: return
    table[:] = others + [pool.allocate()]
    pool.free(last, keep=True)
    return (last, table[-1])


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


# ---- 05, the prefix cache

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


# ---- 06, paged attention

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


def read_first(attend):
    "As `attend`, without the extra read for the block's size that `online` does."
    def wrapped(q, read, table, context):
        kept = {}
        return attend(q, lambda block: kept[block] if block in kept else kept.setdefault(block, read(block)), table, context)
    return wrapped


right(attention.check_attend_blocks)(read_first(with_fault()))
wrong(attention.check_attend_blocks, "needs to be read once")(with_fault())
wrong(attention.check_attend_blocks, "a text of 9 tokens")(
    read_first(with_fault(stop=lambda table, context, size: max(1, context // size))))
wrong(attention.check_attend_blocks, "zero times NaN is NaN")(read_first(with_fault(cut=False)))
wrong(attention.check_attend_blocks, "scores in the hundreds")(read_first(with_fault(stable=False)))
wrong(attention.check_attend_blocks, "but its table is")(read_first(with_fault(start=lambda i, table: i)))


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


# ---- 13, the scheduler

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


@wrong(scheduler.check_shortest_first, "the first to come is the first to go")
class LastOfEqual(Scheduler):
    def add(self, seq): self.waiting = OrderedDict.fromkeys(sorted([seq, *self.waiting], key=lambda s: s.num_tokens))


@wrong(scheduler.check_shortest_first, "raises TypeError")
class AList(Scheduler):
    def add(self, seq): self.waiting = sorted([*self.waiting, seq], key=lambda s: s.num_tokens)


# ---- 14, the engine

@right(engine.check_time_per_token)
def _(metrics):
    tokens = metrics.num_generated_tokens - 1
    if tokens > 0 and metrics.finished_time: return (metrics.finished_time - metrics.first_token_time) / tokens


wrong(engine.check_time_per_token, "7 tokens came in the 3.5 s")(
    lambda m: (m.finished_time - m.first_token_time) / m.num_generated_tokens)
wrong(engine.check_time_per_token, "raises ZeroDivisionError")(
    lambda m: (m.finished_time - m.first_token_time) / (m.num_generated_tokens - 1))
wrong(engine.check_time_per_token, "gives 0.64")(
    lambda m: (m.finished_time - m.arrival_time) / (m.num_generated_tokens - 1))


@right(engine.check_why_ended)
def _(output, prompt_len, max_len, stops, eos):
    if output[-1] in eos: return ("stop", None)
    if output[-1] in stops: return ["stop", output[-1]]
    return ("length", None) if prompt_len + len(output) >= max_len else None


def ended(output, prompt_len, max_len, stops, eos, reason=lambda last, eos: None if last in eos else last, found=lambda output, stops: output[-1] in stops):
    if found(output, stops): return "stop", reason(output[-1], eos)
    return ("length", None) if prompt_len + len(output) == max_len else None


@wrong(engine.check_why_ended, "has ended by itself")
def _(output, prompt_len, max_len, stops, eos):      # length first
    if prompt_len + len(output) == max_len: return "length", None
    return ended(output, prompt_len, max_len, stops, eos)


wrong(engine.check_why_ended, "the model ended it itself")(lambda *a: ended(*a, reason=lambda last, eos: last))
wrong(engine.check_why_ended, "only the last token is new")(lambda *a: ended(*a, found=lambda output, stops: bool(stops & set(output))))
wrong(engine.check_why_ended, "4 + 2 tokens are all")(lambda output, prompt_len, max_len, stops, eos:
                                                     ended(output, 0, max_len, stops, eos))


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
wrong(engine.check_with_deadline, "Is a `return` missing?")(lambda *a: by_deadline(*a) and None)


# ---- what holds for all

def name_of(case):
    check, answer, says = case
    return f"{check.__name__}-{'right' if says is None else says[:30]}"


@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    check, answer, says = case
    if says is None:
        check(answer)
        assert capsys.readouterr().out.startswith(f"{check.__name__}: right")
        return
    with pytest.raises(WrongAnswer) as told: check(answer)
    assert says in str(told.value)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    for name, check in CHECKS.items():
        says = [says for tried, _, says in ANSWERS if tried is check]
        assert None in says and len(set(says) - {None}) >= 2, f"{name}: {len(says)} answers"


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
    assert not any(c.get("execution_count") or c["metadata"] for c in raw), "not cleaned: run nbdev_clean"
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
        assert cell["source"].startswith('::: {.callout-tip collapse="true" title="Solution"}\n')
        assert cell["source"].count(":::") == 2 and cell["source"].endswith("\n:::")
        assert cell["source"].count("````") % 2 == 0 and "````python" in cell["source"]
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
