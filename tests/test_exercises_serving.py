"""The exercises of the later chapters: each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import asyncio
import hmac
import itertools
import json
import math
import os
import queue
import re
import threading
from concurrent.futures import Future
from functools import reduce

import numpy as np
import pytest
import torch

from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer
from solutions.checks import (
    async_llm, batch_invariance, fp8, int4, kv_transfer, latent_attention, lora, openai_api, pipeline, pooling, replicas, routing, server, sliding_windows,
    speculative, structured_output)

MODULES = [
    async_llm, server, structured_output, speculative, lora, sliding_windows, routing, replicas, pipeline, kv_transfer, batch_invariance, int4, fp8,
    latent_attention,
    openai_api,
    pooling]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- an asynchronous engine

right(async_llm.check_share_lost)(lambda step, cores, n, chunk: 1 - step / (step + n * chunk / cores))
wrong(async_llm.check_share_lost, "of 41.6 ms in all")(lambda step, cores, n, chunk: n * chunk / cores / step)
wrong(async_llm.check_share_lost, "the step becomes 1.6 ms longer")(lambda step, cores, n, chunk: n * chunk / (step + n * chunk))


def evenly(num_tokens, interval): return [interval] * (num_tokens // interval) + [num_tokens % interval] * (num_tokens % interval > 0)


@right(async_llm.check_pieces_sent)
def _(num_tokens, interval):
    sent, waiting = [], 0
    for token in range(1, num_tokens + 1):
        waiting += 1
        if not sent or waiting == interval or token == num_tokens:
            sent.append(waiting)
            waiting = 0
    return tuple(sent)


wrong(async_llm.check_pieces_sent, "the first token is to be sent at once")(evenly)
wrong(async_llm.check_pieces_sent, "no token may be lost")(lambda num_tokens, interval: [1] + [interval] * ((num_tokens - 1) // interval))
wrong(async_llm.check_pieces_sent, "expected [1, 4, 4, 1]")(lambda num_tokens, interval: [1] * num_tokens)
wrong(async_llm.check_pieces_sent, "gives 4, expected the list")(lambda num_tokens, interval: 1 + math.ceil((num_tokens - 1) / interval))
wrong(async_llm.check_pieces_sent, "expected whole numbers")(lambda num_tokens, interval: ["1"] * num_tokens)


@right(async_llm.check_stepper)
class WithList:
    def __init__(self, step):
        self.step, self.calls, self.lock, self.ended = step, [], threading.Lock(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def ask(self, function):
        future = Future()
        with self.lock: self.calls.append((future, function))
        return future

    def take(self):
        with self.lock: calls, self.calls = self.calls, []
        return calls

    def call(self, future, function):
        try: future.set_result(function())
        except Exception as error: future.set_exception(error)

    def run(self):
        while not self.ended:
            self.step()
            for call in self.take(): self.call(*call)
        for call in self.take(): self.call(*call)

    def close(self):
        self.ended = True
        self.thread.join()


@wrong(async_llm.check_stepper, "in the asker's thread")
class CallsAtOnce(WithList):
    def ask(self, function):
        future = Future()
        self.call(future, function)
        return future


@wrong(async_llm.check_stepper, "after 5 seconds a function asked after one that raised has no result")
class DiesOfAQuestion(WithList):
    def call(self, future, function):
        try: future.set_result(function())
        except Exception as error:
            future.set_exception(error)
            self.ended = True


@wrong(async_llm.check_stepper, "the thread is still alive")
class NeverEnds(WithList):
    def close(self):
        while self.calls: pass
        self.take = lambda: []
        threading.Timer(1, setattr, (self, "ended", True)).start()      # long after it was looked at
        threading.Event().wait(.05)


@wrong(async_llm.check_stepper, "the thread waits for an ask")
class StepsOnlyWhenAsked(WithList):
    def __init__(self, step):
        self.waiting = queue.SimpleQueue()
        super().__init__(step)

    def ask(self, function):
        future = Future()
        self.waiting.put((future, function))
        return future

    def run(self):
        while (call := self.waiting.get()) is not None:
            self.call(*call)
            self.step()

    def close(self):
        self.waiting.put(None)
        self.thread.join()


class WithQueue:
    def __init__(self): self.queue = asyncio.Queue()
    def put(self, text): self.queue.put_nowait(text)
    def close(self): self.queue.put_nowait(None)
    def rest(self): return []

    async def take(self):
        found = [await self.queue.get(), *self.rest()]
        return "".join(found) if None not in found else None


@right(async_llm.check_box)
class WithFuture:
    def __init__(self): self.text, self.open, self.waiter = "", True, None

    def wake(self):
        if self.waiter and not self.waiter.done(): self.waiter.set_result(None)

    def put(self, text):
        self.text += text
        self.wake()

    def close(self):
        self.open = False
        self.wake()

    async def take(self):
        if self.open and not self.text:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        text, self.text = self.text, ""
        return text or None


wrong(async_llm.check_box, "take gives 'One,', expected 'One, two'")(WithQueue)


@wrong(async_llm.check_box, "two takes give (None, None)")
class ForgetsTheEnd(WithFuture):
    async def take(self):
        text = await super().take()
        return text if self.open else None


@wrong(async_llm.check_box, "it has to wait")
class NeverWaits(WithFuture):
    async def take(self):
        text, self.text = self.text, ""
        return text


@wrong(async_llm.check_box, "what has been read is not given again")
class Repeats(WithFuture):
    async def take(self):
        if not hasattr(self, "all"): self.all = ""
        new = await super().take()
        self.all += new or ""
        return self.all if new else None


@wrong(async_llm.check_box, "though there is something to give")
class SleepsOn(WithFuture):
    def wake(self): pass


@wrong(async_llm.check_box, "the box holds 100 texts")
class KeepsThemAll(WithFuture):
    def __init__(self):
        super().__init__()
        self.texts = []

    def put(self, text):
        self.texts.append(text)
        self.wake()

    async def take(self):
        if not self.texts: await super().take()
        texts, self.texts = self.texts, []
        return "".join(texts) or None


# ---- a server

@right(server.check_field_of)
def _(message, names):
    words = "".join(c if c.isalnum() or c == "_" else " " for c in message).split()
    found = [w for w in words if w in names]
    return found[0] if found else None


wrong(server.check_field_of, "a part of a word is no word")(lambda message, names: min((n for n in names if n in message), key=lambda n: (message.find(n), -len(n)), default=None))
wrong(server.check_field_of, "a bracket ends a word")(lambda message, names: next((w for w in message.replace(",", "").split() if w in names), None))
wrong(server.check_field_of, "gives 'no', expected None")(lambda message, names: (re.findall(r"\w+", message) or [None])[0])


@right(server.check_parse_events)
def _(pieces):                   # with a buffer that is searched
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while (end := rest.find(b"\n")) >= 0:
            line, rest = bytes(rest[:end]).rstrip(b"\r"), rest[end + 1:]
            if line == b"data: [DONE]": return
            if line.startswith(b"data: "): yield json.loads(line[6:])


def lines_of(pieces, decode=lambda piece: piece.decode(), end="data: [DONE]"):
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decode(piece)).split("\n")
        for line in lines:
            if line.strip() == end: return
            if line.startswith("data: {"): yield json.loads(line[6:])


wrong(server.check_parse_events, "a byte at a time, raises UnicodeDecodeError")(lines_of)
wrong(server.check_parse_events, "a byte at a time, parse_events yields")(lambda pieces: lines_of(pieces, lambda piece: piece.decode(errors="replace")))
wrong(server.check_parse_events, "goes on behind [DONE]")(
    lambda pieces: (json.loads(line[6:]) for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: {")))
wrong(server.check_parse_events, "waits for more before it yields")(
    lambda pieces: iter([json.loads(t) for t in re.findall(r"^data: ({.*})\r?$", b"".join(pieces).decode().split("\ndata: [DONE]")[0], re.M)]))


def places(never=400, takes=False, least=0):
    class Places:
        def __init__(self, limit): self.limit, self.free = limit, limit

        def enter(self, num):
            status = never if num > self.limit else 429 if self.free - num < least else 200
            if status == 200 or takes: self.free -= num
            return status

        def leave(self, num): self.free += num
    return Places


right(server.check_places)(places())
wrong(server.check_places, "5 never fit into 4 places")(places(never=429))
wrong(server.check_places, "who was refused has taken no place")(places(takes=True))
wrong(server.check_places, "and one is free")(places(least=1))
@wrong(server.check_places, "one would fit later")
class FullIsForever(places()):         # says "never" when it should say "not now"
    def enter(self, num): return super().enter(num) if self.free else 400


# ---- the whole API

@right(openai_api.check_percentile)
def _(limits, counts, p):
    if not counts[-1]: return None
    at = 0
    while counts[at] < p * counts[-1]: at += 1
    return limits[at]


wrong(openai_api.check_percentile, "9 of 10 values are less than 95%")(       # adds up what is a sum already
    lambda limits, counts, p: next((l for i, l in enumerate(limits) if sum(counts[:i + 1]) >= p * counts[-1] > 0), limits[0] if counts[-1] else None))
wrong(openai_api.check_percentile, "that is half of them")(
    lambda limits, counts, p: next((l for l, c in zip(limits, counts) if c > p * counts[-1]), None))
wrong(openai_api.check_percentile, "there are no values")(lambda limits, counts, p: next(l for l, c in zip(limits, counts) if c >= p * counts[-1]))


@right(openai_api.check_same_key)
def _(given, key):
    letters = [given[i] for i in range(len(given))]
    return hmac.compare_digest("".join(letters), "".join(key[i] for i in range(len(key))))


wrong(openai_api.check_same_key, "the time tells where the first difference is")(
    lambda given, key: len(given) == len(key) and all(given[i] == key[i] for i in range(len(key))))
@wrong(openai_api.check_same_key, "counting the key's")
def _(given, key):                     # looks at all that was given, but at the key only while they agree
    equal = len(given) == len(key)
    for i, letter in enumerate(given): equal = equal and letter == key[i]
    return equal


wrong(openai_api.check_same_key, "same_key('s3cret', 's3cret-key') gives True, expected False")(
    lambda given, key: not sum(given[i] != key[i] for i in range(min(len(given), len(key)))))
wrong(openai_api.check_same_key, "raises IndexError")(lambda given, key: not sum(given[i] != key[i] for i in range(len(key))))
wrong(openai_api.check_same_key, "takes slices")(lambda given, key: given[:] == key[:])
wrong(openai_api.check_same_key, "Is a `return` missing?")(lambda given, key: [given[i] == key[i] for i in range(min(len(given), len(key)))] and None)


@right(openai_api.check_shown)
def _(pieces, tag):                    # all of the text so far, again for each piece
    texts, done = [], 0
    for i in range(len(pieces)):
        text = "".join(pieces[:i + 1])
        end = text.find(tag)
        if end < 0: end = len(text) - max(k for k in range(len(tag)) if text.endswith(tag[:k]))
        texts.append(text[done:end])
        done = max(done, end)
    return texts


def by_piece(pieces, tag):             # looks for the tag in each piece alone
    texts, found = [], False
    for piece in pieces:
        before, hit, _ = piece.partition(tag)
        texts.append("" if found else before)
        found |= bool(hit)
    return texts


wrong(openai_api.check_shown, "is shown with the next piece")(by_piece)
wrong(openai_api.check_shown, "gives 5, expected ['Hello'")(lambda pieces, tag: 5)
@wrong(openai_api.check_shown, "raises KeyError")
def _(pieces, tag):
    yield "Hello"
    raise KeyError(tag)


@wrong(openai_api.check_shown, "the tag may come in three pieces")
def _(pieces, tag):                    # looks for the tag's beginning at the end of the last piece alone
    texts, text, done = [], "", 0
    for piece in pieces:
        text += piece
        end = text.find(tag)
        if end < 0: end = len(text) - max(k for k in range(len(tag)) if piece.endswith(tag[:k]))
        texts.append(text[done:end])
        done = max(done, end)
    return texts


wrong(openai_api.check_shown, "nothing of it may become the tag")(lambda pieces, tag: [""] * (len(pieces) - 1) + ["".join(pieces).split(tag)[0]])
@wrong(openai_api.check_shown, "only the second `<`")
def _(pieces, tag):                    # begins anew with the letter after the one that did not fit
    texts, k = [], 0
    for piece in pieces:
        text = ""
        for char in piece:
            if k == len(tag): break
            if char == tag[k]: k += 1
            else: text, k = text + tag[:k] + char, 0
        texts.append(text)
    return texts


# ---- speculative decoding

@right(speculative.check_expected_tokens)
def _(chance, num_guesses): return num_guesses + 1 if chance == 1 else (1 - chance**(num_guesses + 1)) / (1 - chance)


wrong(speculative.check_expected_tokens, "a step without guesses gives a token")(lambda chance, num_guesses: sum(chance**i for i in range(1, num_guesses + 1)))
wrong(speculative.check_expected_tokens, "the second counts only if the first is right")(lambda chance, num_guesses: 1 + chance * num_guesses)


@right(speculative.check_kept)
def _(guesses, chosen):
    for i, guess in enumerate(guesses):
        if guess != chosen[i]: return chosen[:i + 1]
    return chosen[:]


wrong(speculative.check_kept, "what follows a wrong guess is worthless")(lambda guesses, chosen: chosen)
wrong(speculative.check_kept, "even if it looks so")(lambda guesses, chosen: chosen[:1 + sum(g == c for g, c in zip(guesses, chosen))])


@right(speculative.check_sample)
def _(p, q, draft, rng):
    if p[draft] >= q[draft] or rng.random() < p[draft] / q[draft]: return [draft, True]
    excess = [max(0, a - b) for a, b in zip(p, q)]
    at = rng.random() * sum(excess)
    for token, e in enumerate(excess):
        at -= e
        if at < 0 and e: return [token, False]


@wrong(speculative.check_sample, "not those of p")
def _(p, q, draft, rng):                   # draws from p where it should draw from the excess
    return (draft, True) if rng.random() * q[draft] < p[draft] else (rng.choices(range(len(p)), p)[0], False)


@wrong(speculative.check_sample, "could be: the sum of the smaller")
def _(p, q, draft, rng):                   # draws without the draft
    token = rng.choices(range(len(p)), p)[0]
    return token, token == draft


@right(speculative.check_best_length)
def _(chance, seconds):
    best, tokens = (0, 1 / seconds[0]), 1
    for k in range(1, len(seconds)):
        tokens += chance**k
        if tokens / seconds[k] > best[1]: best = k, tokens / seconds[k]
    return best[0]


@wrong(speculative.check_best_length, "a first guess that is dear")      # as far as each further guess is a gain
def _(chance, seconds):
    def rate(k): return sum(chance**i for i in range(k + 1)) / seconds[k]
    return next(k for k in range(len(seconds)) if k + 1 == len(seconds) or rate(k + 1) <= rate(k))


wrong(speculative.check_best_length, "of which the least is asked for")(
    lambda chance, seconds: max(range(len(seconds)), key=lambda k: (sum(chance**i for i in range(k + 1)) / seconds[k], k)))
wrong(speculative.check_best_length, "more seconds for each guess")(lambda chance, seconds: len(seconds) - 1)
wrong(speculative.check_best_length, "tokens a second")(lambda chance, seconds: sum(chance**k > seconds[k] - seconds[k-1] for k in range(1, len(seconds))))


# ---- LoRA

right(lora.check_adapter_numbers)(lambda shapes, layers, rank: sum(sum(shape) for shape in shapes) * rank * layers)
wrong(lora.check_adapter_numbers, "gives 13271040, expected 460800")(lambda shapes, layers, rank: layers * sum(o * i for o, i in shapes))
wrong(lora.check_adapter_numbers, "gives 15360, expected 460800")(lambda shapes, layers, rank: rank * sum(o + i for o, i in shapes))
wrong(lora.check_adapter_numbers, "gives 276480, expected 460800")(lambda shapes, layers, rank: layers * rank * sum(i for _, i in shapes))


@right(lora.check_by_mask)
def _(x, slots, a, b):
    mine = torch.nn.functional.one_hot(slots + 1, len(a) + 1)[:, 1:].to(x.dtype)
    return torch.einsum("ni,sri,ns,sro->no", x, a, mine, b)


def masked(x, slots, a, b, mask):
    answers = (x @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])
    return (answers * mask(slots, len(a))[:, :, None]).flatten(1) @ b.flatten(0, 1)


wrong(lora.check_by_mask, "for row 0, expected")(lambda *args: masked(*args, lambda slots, n: torch.ones(len(slots), n)))
wrong(lora.check_by_mask, "1 row without an adapter: by_mask")(     # -1 is taken for the last slot
    lambda *args: masked(*args, lambda slots, n: slots[:, None] % n == torch.arange(n)))
wrong(lora.check_by_mask, "has shape (2, 2, 4), expected (2, 4)")(lambda x, slots, a, b: (a @ x.T).mT @ b)
wrong(lora.check_by_mask, "Is a `return` missing?")(lambda x, slots, a, b: None)


@right(lora.check_grouped)
def _(x, slots, width, run):
    order = slots.argsort(stable=True)
    added = torch.zeros(len(x), width)
    for rows in order.split(slots[order].unique_consecutive(return_counts=True)[1].tolist()):
        if slots[rows[0]] >= 0: added[rows] = run(slots[rows[0]], x[rows])
    return added


@wrong(lora.check_grouped, "slot 2 is run a second time")
def _(x, slots, width, run):
    return torch.stack([run(s, row[None])[0] if s >= 0 else torch.zeros(width) for s, row in zip(slots, x)])


@wrong(lora.check_grouped, "there is no slot -1")
def _(x, slots, width, run):
    added = torch.zeros(len(x), width)
    for s in slots.unique(): added[slots == s] = run(s, x[slots == s])
    return added


@wrong(lora.check_grouped, "is run without rows")
def _(x, slots, width, run):
    added = torch.zeros(len(x), width)
    for s in range(int(slots.max()) + 1): added[slots == s] = run(s, x[slots == s])
    return added


@wrong(lora.check_grouped, "2 rows, one adapter each: slot 0 gets 2 rows, and only 1 want it")
def _(x, slots, width, run):            # right, but each row meets all adapters
    added = torch.zeros(len(x), width)
    for s in slots[slots >= 0].unique(): added[slots == s] = run(s, x)[slots == s]
    return added


@wrong(lora.check_grouped, "6 rows, 3 slots: grouped gives")
def _(x, slots, width, run):            # sorted, and not put back
    wanted = [s for s in slots.unique().tolist() if s >= 0]
    parts = [x.new_zeros(int((slots < 0).sum()), width)] + [run(s, x[slots == s]) for s in wanted]
    return torch.cat(parts)


# ---- sliding windows

right(sliding_windows.check_share)(lambda full, local, window, length: (full + local * min(1, window / length)) / (full + local))
wrong(sliding_windows.check_share, "the whole text if that is shorter")(
    lambda full, local, window, length: (full * length + local * window) / ((full + local) * length))
wrong(sliding_windows.check_share, "expected 0.21875")(lambda full, local, window, length: full / (full + local))


@right(sliding_windows.check_blocks_in_sight)
def _(start, end, window, size):
    blocks = {p // size for q in range(start, end) for p in range(max(0, q - window + 1), q + 1)}
    return min(blocks), len(blocks)


wrong(sliding_windows.check_blocks_in_sight, "itself included")(
    lambda start, end, window, size: (max(0, start - window) // size, (end - 1) // size - max(0, start - window) // size + 1))
wrong(sliding_windows.check_blocks_in_sight, "expected (0, 5)")(     # the last token's window in place of the first one's
    lambda start, end, window, size: (max(0, end - window) // size, (end - 1) // size - max(0, end - window) // size + 1))
wrong(sliding_windows.check_blocks_in_sight, "expected (1, 3)")(lambda start, end, window, size: (max(0, start + 1 - window) // size, -(-window // size) + 1))


@right(sliding_windows.check_longest_hit)
def _(full, local, window, size):
    best = 0
    for n in range(1, len(full) + 1):
        if not full[n - 1]: break
        if all(local[i] for i in range(n) if (i + 1) * size > n * size + 1 - window): best = n
    return best


wrong(sliding_windows.check_longest_hit, "gives 4, expected")(lambda full, local, window, size: len(full) if all(full) else full.index(False))
wrong(sliding_windows.check_longest_hit, "gives 0, expected")(     # both from the beginning on
    lambda full, local, window, size: [*(a and b for a, b in zip(full, local)), False].index(False))
wrong(sliding_windows.check_longest_hit, "itself included")(
    lambda full, local, window, size: next(n for n in range(len(full), -1, -1)
                                           if all(full[:n]) and all(local[max(0, n - max(1, window // size)):n])))


# ---- routing

right(routing.check_expected_hit_rate)(lambda texts, replicas, room, spread: min(texts, room * (replicas if spread else 1)) / texts)
wrong(routing.check_expected_hit_rate, "(8, 4, 3, True) gives 0.375, expected 1")(lambda texts, replicas, room, spread: min(1, room / texts))
wrong(routing.check_expected_hit_rate, "(8, 4, 3, True) gives 1.5, expected 1")(lambda texts, replicas, room, spread: room / (texts / replicas if spread else texts))


def sums(router, hashes, per_request, size, count):
    return {n: load * per_request + (len(hashes) - count(hashes, router.known[n])) * size for n, load in router.load.items()}


def leading(hashes, known): return next((i for i, h in enumerate(hashes) if h not in known), len(hashes))


@right(routing.check_weighted_rule)
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    return next(name for name in router.load if work[name] == min(work.values()))


@wrong(routing.check_weighted_rule, "of equal sums the first in `router.load` is wanted")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    return min(sorted(router.load), key=work.get)


@wrong(routing.check_weighted_rule, "up to the end that the replica has not")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, lambda hashes, known: 0)
    return min(router.load, key=work.get)


@wrong(routing.check_weighted_rule, "the rule changes the router")
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    name = min(router.load, key=work.get)
    router.load[name] += 1
    return name


@wrong(routing.check_weighted_rule, "the rule changes the router")       # only an order
def _(router, hashes, tokens_per_request=100, block_size=16):
    work = sums(router, hashes, tokens_per_request, block_size, leading)
    name = min(router.load, key=work.get)
    router.load.move_to_end(name)
    return name


wrong(routing.check_weighted_rule, "expected a name of `router.load`")(lambda router, hashes, *given: list(router.load)[:1])


def first_tokens(requests, step, token, late=False, everyone=True):
    "Another way: who runs is looked up in each step."
    first, ends, begun, now = [None] * len(requests), [None] * len(requests), [0] * len(requests), 0
    while None in ends:
        there = [i for i, (at, *_) in enumerate(requests) if (at < now or at == now and not late or now == 0 and at == 0) and ends[i] is None]
        if not there:
            now = min(at for i, (at, *_) in enumerate(requests) if ends[i] is None) + (1e-12 if late else 0)
            continue
        now += step + token * sum(1 if begun[i] else requests[i][1] if everyone else 0 for i in there)
        for i in there:
            begun[i] += 1
            if begun[i] == 1: first[i] = now
            if begun[i] == requests[i][2]: ends[i] = now
    return first


right(routing.check_simulate_one)(first_tokens)
wrong(routing.check_simulate_one, "([(0, 10, 1)], 5, 1) gives [5], expected [15]")(lambda *args: first_tokens(*args, everyone=False))
wrong(routing.check_simulate_one, "expected [18]")(lambda requests, step, token: [step + token * n for _, n, _ in requests])


# ---- replicas

@right(replicas.check_computed_again)
def _(prompt, delivered, known, block_size):
    while known >= prompt + delivered: known -= block_size
    return prompt + delivered - known


wrong(replicas.check_computed_again, "(96, 0, 96, 16) gives 0, expected 16")(lambda prompt, delivered, known, block_size: prompt + delivered - known)
wrong(replicas.check_computed_again, "(100, 50, 0, 16) gives 100, expected 150")(
    lambda prompt, delivered, known, block_size: prompt - min(known, (prompt - 1) // block_size * block_size))


@right(replicas.check_join_reports)
def _(reports):
    known = {}
    for start, tokens in reports:
        if start > len(known): raise ValueError("gap")
        for i, token in enumerate(tokens, start):
            if known.setdefault(i, token) != token: raise ValueError("another token")
    return [known[i] for i in range(len(known))]


wrong(replicas.check_join_reports, "gives [1, 2, 1, 2], expected [1, 2]")(lambda reports: [t for _, tokens in reports for t in tokens])


@wrong(replicas.check_join_reports, "expected ValueError: there is a gap")
def _(reports):
    answer = []
    for start, tokens in reports: answer += tokens[len(answer) - start if len(answer) > start else 0:]
    return answer


@wrong(replicas.check_join_reports, "gives [1, 2, 3], expected ValueError: there is a gap when the second comes")
def _(reports):
    answer = []
    for start, tokens in sorted(reports):
        if start > len(answer) or answer[start:start + len(tokens)] != tokens[:len(answer) - start]: raise ValueError
        answer += tokens[len(answer) - start:]
    return answer


@wrong(replicas.check_join_reports, "there is a token that contradicts")
def _(reports):
    answer = []
    for start, tokens in reports:
        if start > len(answer): raise ValueError("gap")
        answer += tokens[len(answer) - start:]
    return answer


def fleet(lives, prompts, keep=True, delivered=True):
    "One sequence after the other, each with whoever is alive."
    answers = {}
    for key, n in prompts.items():
        answers[key], alive = [], lives
        for replica in list(alive):
            try:
                said = replica.step([[key, list(answers[key]) if delivered else [], n]])
                while len(answers[key]) < n:
                    answers[key].append(said[key])
                    if len(answers[key]) < n: said = replica.step([])
                break
            except replicas.LostReplica: lives = [r for r in lives if r is not replica]
        if not lives: raise replicas.LostReplica("all are dead")
    return answers


right(replicas.check_answer_all)(fleet)
wrong(replicas.check_answer_all, "a token is at a wrong place")(lambda lives, prompts: fleet(lives, prompts, delivered=False))


@wrong(replicas.check_answer_all, "raises KeyError")
def _(lives, prompts):
    "Forgets whom it has just told of something."
    answers = {key: [] for key in prompts}
    told = [[key, [], n] for key, n in prompts.items()]
    for replica in lives:
        try:
            while any(len(answers[k]) < n for k, n in prompts.items()):
                said, told = replica.step(told), []
                for key in prompts: answers[key] += [said[key]] if len(answers[key]) < prompts[key] else []
            return answers
        except replicas.LostReplica: continue
    return answers


# ---- disaggregated prefill

right(kv_transfer.check_seconds_to_send)(
    lambda n, size, layers, heads, dim, itemsize, bandwidth: (n - n % size) / bandwidth * (2 * layers) * (heads * dim * itemsize))
wrong(kv_transfer.check_seconds_to_send, "96 of the 100 tokens are in full blocks")(
    lambda n, size, layers, heads, dim, itemsize, bandwidth: n * 2 * layers * heads * dim * itemsize / bandwidth)
wrong(kv_transfer.check_seconds_to_send, "a key and a value in each layer")(
    lambda n, size, layers, heads, dim, itemsize, bandwidth: n // size * size * layers * heads * dim * itemsize / bandwidth)


@right(kv_transfer.check_first_step)
def _(prompt, block_size, known, arrived, free):
    found, left = 0, prompt
    while left >= block_size:
        if found >= known:
            if found >= arrived or not free: break
            free -= 1
        found, left = found + 1, left - block_size
    return left + 1


wrong(kv_transfer.check_first_step, "(100, 16, 0, 6, 100) gives 4, expected 5")(
    lambda prompt, size, known, arrived, free: prompt - size * min(prompt // size, known + min(max(arrived - known, 0), free)))
wrong(kv_transfer.check_first_step, "(100, 16, 2, 6, 1) gives 5, expected 53")(
    lambda prompt, size, known, arrived, free: prompt + 1 - size * min(prompt // size, max(known, arrived)))
wrong(kv_transfer.check_first_step, "(96, 16, 9, 0, 0) gives -47, expected 1: 97 tokens are known, and 6 blocks are found")(
    lambda prompt, size, known, arrived, free: prompt + 1 - size * (known + min(max(arrived - known, 0), free)))


def put(free, cache, hashes, hold=True, forget=True, reverse=True):
    "By a table of who has what, turned round."
    where = {block: name for name, block in cache.items()}
    known = []
    while len(known) < len(hashes) and hashes[len(known)] in cache: known.append(cache[hashes[len(known)]])
    last = [block for block in known if block in free]
    if hold: free[:] = [block for block in free if block not in last]
    new, free[:] = free[:len(hashes) - len(known)], free[len(hashes) - len(known):]
    for name, block in zip(hashes[len(known):], new):
        if forget and block in where: cache.pop(where[block], None)
        cache[name] = block
    if not hold: free[:] = [block for block in free if block not in last]
    free.extend((last + new)[::-1] if reverse else last + new)
    return known + new


right(kv_transfer.check_store)(put)
wrong(kv_transfer.check_store, "are not given up for others of the same text")(lambda *args: put(*args, hold=False))
wrong(kv_transfer.check_store, "what it held before is forgotten")(lambda *args: put(*args, forget=False))
wrong(kv_transfer.check_store, "the text's last one first")(lambda *args: put(*args, reverse=False))


@right(kv_transfer.check_num_producers)
def _(num_replicas, prefill, decode):
    best = 1
    for p in range(2, num_replicas):
        if max(prefill / p, decode / (num_replicas - p)) < max(prefill / best, decode / (num_replicas - best)): best = p
    return best


wrong(kv_transfer.check_num_producers, "requests a second are answered")(lambda n, prefill, decode: n // 2)
wrong(kv_transfer.check_num_producers, "(2, 1.0, 9.0) gives 0, expected 1")(lambda n, prefill, decode: round(n * prefill / (prefill + decode)))


# ---- structured output

def continuations(texts, said): return [t.removeprefix(said) for t in texts if t.startswith(said)]


right(structured_output.check_allowed_tokens)(
    lambda texts, said, vocabulary: [any(c.startswith(t) for c in continuations(texts, said)) if t else "" in continuations(texts, said) for t in vocabulary])
wrong(structured_output.check_allowed_tokens, "expected [False, True")(
    lambda texts, said, vocabulary: [any(c.startswith(t) for c in continuations(texts, said)) for t in vocabulary])
wrong(structured_output.check_allowed_tokens, "expected [")(lambda texts, said, vocabulary: [said + t in texts for t in vocabulary])
wrong(structured_output.check_allowed_tokens, "expected [")(
    lambda texts, said, vocabulary: [said in texts if not t else any(t in c for c in continuations(texts, said)) for t in vocabulary])


@right(structured_output.check_forced)
def _(texts, said):
    "A letter at a time."
    made = ""
    while True:
        rest = continuations(texts, said + made)
        letters = {r[:1] for r in rest}
        if len(letters) != 1 or "" in letters: return made
        made += letters.pop()


wrong(structured_output.check_forced, "only 'yes' begins so")(lambda texts, said: os.path.commonprefix(texts)[len(said):])
wrong(structured_output.check_forced, "expected 'es'")(lambda texts, said: said + os.path.commonprefix(continuations(texts, said)))


@wrong(structured_output.check_forced, "the answer may end here")
def _(texts, said):
    "Forgets that the answer may end."
    rest = [c for c in continuations(texts, said) if c]
    return os.path.commonprefix(rest)


class Counting:
    "Brackets as a text that is looked at anew."
    def __init__(self, text=b""): self.text = text

    @property
    def is_complete(self): return bool(self.text) and self.text.count(b"[") == self.text.count(b"]")

    def after(self, byte):
        text = self.text + bytes([byte])
        fits = byte in b"[]" and not self.is_complete and text.count(b"[") >= text.count(b"]")
        return type(self)(text) if fits else None


right(structured_output.check_brackets)(Counting)


@wrong(structured_output.check_brackets, "there is one outer list")
class _(Counting):
    "Goes on behind the end."
    def after(self, byte):
        text = self.text + bytes([byte])
        return type(self)(text) if byte in b"[]" and text.count(b"[") >= text.count(b"]") else None


@wrong(structured_output.check_brackets, "behind '', is_complete is True")
class _(Counting):
    @property
    def is_complete(self): return self.text.count(b"[") == self.text.count(b"]")


@wrong(structured_output.check_brackets, "after() changes the state")
class _(Counting):
    "One object for all states."
    def after(self, byte):
        made = super().after(byte)
        if made is None: return None
        self.text = made.text
        return self


@right(structured_output.check_at_most)
def _(inner, n, then, either, EMPTY):
    "From the outside: n options in a row."
    return EMPTY if n == 0 else reduce(then, [either(inner, EMPTY)] * n)


wrong(structured_output.check_at_most, "behind 0 of them the text may end")(lambda inner, n, then, either, EMPTY: reduce(then, [inner] * n, EMPTY))
wrong(structured_output.check_at_most, "refuses 1 of them")(lambda inner, n, then, either, EMPTY: EMPTY)
wrong(structured_output.check_at_most, "Is a `return` missing?")(lambda inner, n, then, either, EMPTY: None)


@wrong(structured_output.check_at_most, "takes 1 of them")
def _(inner, n, then, either, EMPTY):
    "One too many."
    return reduce(then, [either(inner, EMPTY)] * (n + 1))


# ---- pipeline parallelism

@right(pipeline.check_pipeline_time)
def _(num_steps, num_stages, seconds):
    "Played: when each stage has ended with each step."
    ends = [0] * num_stages
    for _ in range(num_steps):
        for stage in range(num_stages): ends[stage] = max(ends[stage], ends[stage - 1] if stage else 0) + seconds
    return [ends[-1], 1 - num_steps * seconds / ends[-1]]


wrong(pipeline.check_pipeline_time, "after it one step leaves the last stage")(lambda n, p, t: (n * p * t, 1 - 1 / p))
wrong(pipeline.check_pipeline_time, "a stage works 8 of 11 s")(lambda n, p, t: ((n + p - 1) * t, (p - 1) / p))

right(pipeline.check_crowd)(lambda memory, weights, kv, n: [n * (max(memory - weights, 0) // kv), max(n * memory - weights, 0) // kv])
wrong(pipeline.check_crowd, "expected [256, 304]")(lambda memory, weights, kv, n: (n * int((memory - weights) / kv), n * int((memory - weights / 1) / kv)))
wrong(pipeline.check_crowd, "a cache is not divided among replicas")(lambda memory, weights, kv, n: (max(0, int(n * (memory - weights) / kv)), max(0, int((n * memory - weights) / kv))))
wrong(pipeline.check_crowd, "(24, 30, 1, 2) gives")(lambda memory, weights, kv, n: (n * int((memory - weights) // kv), int((n * memory - weights) // kv)))
wrong(pipeline.check_crowd, "(80, 16.2, 1, 4) gives (256, 304)")(
    lambda memory, weights, kv, n: (n * max(0, round((memory - weights) / kv)), max(0, round((n * memory - weights) / kv))))


@right(pipeline.check_next_turn)
def _(sequences, num_stages):
    "One at a time, the one with the oldest turn."
    left, chosen = [s for s in sequences if not s[2]], []
    while left and len(chosen) * num_stages < len(sequences):
        chosen.append(min(left, key=lambda s: s[1]))
        left.remove(chosen[-1])
    return [name for name, *_ in chosen]


wrong(pipeline.check_next_turn, "one waits for its token")(lambda seqs, p: [name for name, _, waits in seqs if not waits][:-(-len(seqs) // p)])
wrong(pipeline.check_next_turn, "those that wait included")(
    lambda seqs, p: [n for _, n in sorted((t, n) for n, t, w in seqs if not w)][:-(-sum(not w for *_, w in seqs) // p)])
wrong(pipeline.check_next_turn, "all wait")(lambda seqs, p: [n for n, _, w in sorted(seqs, key=lambda s: (s[2], s[1]))][:-(-len(seqs) // p)])
wrong(pipeline.check_next_turn, "expected a list of names")(lambda seqs, p: "".join(sorted(n for n, _, w in seqs if not w))[:-(-len(seqs) // p)])
wrong(pipeline.check_next_turn, "gives 1, expected a list of names")(lambda seqs, p: 1)


@right(pipeline.check_best_split)
def _(weights, num_stages):
    "Every limit in turn: fill the stages greedily, and see if they suffice."
    def fill(limit):
        lengths, room = [0], limit
        for i, w in enumerate(weights):
            needed = num_stages - len(lengths)          # stages that must still get a layer
            if lengths[-1] and (w > room or len(weights) - i == needed):
                lengths.append(0)
                room = limit
            lengths[-1] += 1
            room -= w
        return lengths if len(lengths) == num_stages and pipeline.heaviest(weights, lengths) <= limit else None
    return next(filter(None, map(fill, range(1, sum(weights) + 1))))


wrong(pipeline.check_best_split, "whose heaviest stage weighs")(
    lambda weights, p: [len(weights) * (i + 1) // p - len(weights) * i // p for i in range(p)])
wrong(pipeline.check_best_split, "no cut of 4 layers into 2 stages")(lambda weights, p: [len(weights)] + [0] * (p - 1))
wrong(pipeline.check_best_split, "expected a list of 2 whole numbers")(lambda weights, p: [len(weights) / p] * p)
wrong(pipeline.check_best_split, "gives 3, expected a list of 2 whole numbers")(lambda weights, p: 3)
# ---- batch invariance

@right(batch_invariance.check_num_sums)
def _(values):
    "From one order to the next, with numpy's numbers."
    found = set()
    for order in itertools.permutations(values):
        total = np.float32(0)
        for value in order: total = np.float32(total + np.float32(value))
        found.add(float(total))
    return len(found)


wrong(batch_invariance.check_num_sums, "gives 1, expected 2")(lambda values: len({sum(o) for o in itertools.permutations(values)}))
wrong(batch_invariance.check_num_sums, "gives 3, expected 2")(lambda values: math.factorial(len(values)) // 2 or 1)
wrong(batch_invariance.check_num_sums, "gives None")(lambda values: None)


right(batch_invariance.check_sum_in_pieces)(lambda pieces, swap, share: share(list(itertools.accumulate(swap(pieces), torch.add))[-1]))
right(batch_invariance.check_sum_in_pieces)(lambda pieces, swap, share: tuple(share(reduce(torch.add, swap(pieces)))))
wrong(batch_invariance.check_sum_in_pieces, "its order of adding is another")(
    lambda pieces, swap, share: share(reduce(torch.add, reversed(swap(pieces)))))
wrong(batch_invariance.check_sum_in_pieces, "piece 0 is not the sum of all ranks")(lambda pieces, swap, share: share(swap(pieces)[0]))
wrong(batch_invariance.check_sum_in_pieces, "one piece is enough")(lambda pieces, swap, share: share(torch.stack(pieces)))
wrong(batch_invariance.check_sum_in_pieces, "calls share twice")(lambda pieces, swap, share: [share(piece) for piece in pieces])
wrong(batch_invariance.check_sum_in_pieces, "not 2 pieces")(lambda pieces, swap, share: sum(swap(pieces)))
wrong(batch_invariance.check_sum_in_pieces, "Is a `return` missing?")(lambda pieces, swap, share: None)


@right(batch_invariance.check_constant_tiles)
def _(product, x, tile):
    "The last rows are taken twice, and what is left of them is put at the end."
    rows = []
    for start in range(0, len(x), tile):
        index = [min(i, len(x) - 1) for i in range(start, start + tile)]
        rows.append(product(x[index])[:len(x) - start])
    return torch.cat(rows)


def filled(x, n): return torch.cat([x, x.new_zeros(n, x.shape[1])])


@wrong(batch_invariance.check_constant_tiles, "constant_tiles changes what it is given")
def _(product, x, tile):
    whole = torch.cat([x, x.new_zeros(-len(x) % tile, x.shape[1])])
    got = torch.cat([product(part) for part in whole.split(tile)])[:len(x)]
    x.zero_()
    return got


wrong(batch_invariance.check_constant_tiles, "calls product with 1 rows")(lambda product, x, tile: torch.cat([product(p) for p in x.split(tile)]))
wrong(batch_invariance.check_constant_tiles, "rows that were filled up are nobody's")(
    lambda product, x, tile: torch.cat([product(p) for p in filled(x, -len(x) % tile).split(tile)]))
wrong(batch_invariance.check_constant_tiles, "calls product 4 times, expected 1")(
    lambda product, x, tile: torch.cat([product(filled(row[None], tile - 1))[:1] for row in x]))


# ---- four bits

right(int4.check_megabytes)(lambda in_layers, in_head, group, scale_bits: (in_layers / 2 + in_layers / group * scale_bits / 8 + in_head) / 1e6)
wrong(int4.check_megabytes, "32 weights share the 16 bits of a scale")(lambda in_layers, in_head, group, scale_bits: (in_layers / 2 + in_head) / 1e6)
wrong(int4.check_megabytes, "expected 88.03")(lambda in_layers, in_head, group, scale_bits: (in_layers + in_head) * (4 + scale_bits / group) / 8e6)


@right(int4.check_unpack_nibbles)
def _(words):
    "By bytes."
    bytes = words.contiguous().view(torch.uint8).unflatten(1, (-1, 4))
    return torch.stack([bytes & 15, bytes >> 4], 2).flatten(1).to(torch.int8) - 8


def by_shifts(words, order=(0, 8, 16, 24, 4, 12, 20, 28), mask=15, less=8):
    return torch.stack([words >> at & mask for at in order], 2).flatten(1).to(torch.int8) - less


right(int4.check_unpack_nibbles)(by_shifts)
wrong(int4.check_unpack_nibbles, "their order is not: byte i holds numbers i and 4 + i")(lambda words: by_shifts(words, range(0, 32, 4)))
wrong(int4.check_unpack_nibbles, "8 was added before they were packed")(lambda words: by_shifts(words, less=0))
wrong(int4.check_unpack_nibbles, "what else came along in the shift?")(lambda words: by_shifts(words, mask=-1))
wrong(int4.check_unpack_nibbles, "gives torch.int32, expected torch.int8")(lambda words: by_shifts(words).int())


@right(int4.check_product_with_minimum)
def _(q, scale, minimum, x):
    "As the kernel: whole sums of each group, and the sums of the rows' numbers."
    y = torch.zeros(len(x), len(q))
    for g, (rows, weights) in enumerate(zip(x.int().split(32, 1), q.int().split(32, 1))):
        y += rows @ weights.T * scale[:, g] + rows.sum(1, keepdim=True) * minimum[:, g]
    return y


def with_minimum(q, scale, minimum, x, kind=torch.int64, of_x=lambda rows: rows.sum(-1), factor=lambda scale: 1):
    groups, rows = q.to(kind).unflatten(1, (-1, 32)), x.to(kind).unflatten(1, (-1, 32))
    dots = (rows[:, None] * groups).sum(-1, dtype=kind)
    return ((dots * scale).sum(-1) + (of_x(rows)[:, None] * minimum * factor(scale)).sum(-1)).float()


right(int4.check_product_with_minimum)(with_minimum)
wrong(int4.check_product_with_minimum, "the minimum is missing")(lambda *a: with_minimum(*a, of_x=lambda rows: 0 * rows.sum(-1)))
wrong(int4.check_product_with_minimum, "it belongs to each of the 32 numbers")(lambda *a: with_minimum(*a, of_x=lambda rows: rows.sum(-1) * 0 + 1))
wrong(int4.check_product_with_minimum, "the minimum has been scaled, too")(lambda *a: with_minimum(*a, factor=lambda scale: scale))
wrong(int4.check_product_with_minimum, "the largest sum of a group is")(lambda *a: with_minimum(*a, kind=torch.int8))
wrong(int4.check_product_with_minimum, "Is a `return` missing?")(lambda *a: None)


@wrong(int4.check_product_with_minimum, "floats of weights")
def _(q, scale, minimum, x):     # weights in floats, and a product of floats
    weight = (q.unflatten(1, (-1, 32)) * scale[..., None] + minimum[..., None]).flatten(1)
    return x.float() @ weight.T


wrong(int4.check_product_with_minimum, "`_to_copy` makes")(lambda *a: with_minimum(*a, kind=torch.float32))


# ---- FP8

def by_value(byte, bias=15, subnormal=True, specials=True):
    e, m, sign = byte >> 2 & 31, byte & 3, (-1)**(byte >> 7)
    if specials and e == 31: return math.nan if m else sign * math.inf
    if e == 0 and subnormal: return sign * m * 2.0**(-1 - bias)
    return sign * (4 + m) * 2.0**(e - bias - 2)


right(fp8.check_decode_e5m2)(by_value)
right(fp8.check_decode_e5m2)(lambda byte: float(np.array([byte << 8], np.uint16).view(np.float16)[0]))
wrong(fp8.check_decode_e5m2, "the bias of the exponent is 15")(lambda byte: by_value(byte, 7) if byte > 3 else by_value(byte))
wrong(fp8.check_decode_e5m2, "these are subnormal")(lambda byte: by_value(byte, subnormal=False))
wrong(fp8.check_decode_e5m2, "there is such a thing in e5m2")(lambda byte: by_value(byte, specials=False))
wrong(fp8.check_decode_e5m2, "is no number")(lambda byte: by_value(byte, specials=byte & 3 == 0))


def to_steps(x, least=-6, most=448, rounding=torch.round):
    "By the logarithm instead of frexp: of exact powers of two it may be one too low, where the coarser grid has them, too."
    power = torch.floor(torch.log2(x.double().abs().clamp(min=1e-300))).clamp(min=least)
    step = torch.pow(2.0, power - 3)
    return (rounding(x.double() / step) * step).clamp(-most, most).float()


right(fp8.check_round_e4m3)(to_steps)


@right(fp8.check_round_e4m3)
def _(x):
    "By the bits: half of what is cut off is added, a bit less if the last one that stays is even."
    bits = x.abs().view(torch.int32)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & ~0xFFFFF).view(torch.float32)
    small = (x.abs() + 2.0**14) - 2.0**14        # there neighbours are 2^-9 apart
    return torch.where(x.abs() < 2**-6, small, normal).clamp(max=448).copysign(x)


wrong(fp8.check_round_e4m3, "changes what it is given")(lambda x: x.copy_(to_steps(x)))
wrong(fp8.check_round_e4m3, "what is too large becomes 448")(lambda x: to_steps(x, most=480))
wrong(fp8.check_round_e4m3, "down there all neighbours are 2^-9 apart")(lambda x: to_steps(x, least=-9))
wrong(fp8.check_round_e4m3, "the one with the even mantissa counts")(lambda x: to_steps(x, rounding=lambda y: (y.abs() + 0.5).floor() * y.sign()))
wrong(fp8.check_round_e4m3, "numbers between: round_e4m3 makes")(lambda x: to_steps(x, rounding=torch.trunc))
wrong(fp8.check_round_e4m3, "expected torch.float32")(lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn))


def in_blocks(x, weight, size, rows=True, weights=True):
    y = torch.zeros(len(x), len(weight))
    for a, b in zip(x.split(size, 1), weight.split(size, 1)):
        (a, a_scale), (b, b_scale) = ((n / s, s) for n, s in ((n, n.abs().amax(1, keepdim=True) / 448) for n in (a, b)))
        y += (a.to(fp8.E4M3).float() @ b.to(fp8.E4M3).float().T) * (a_scale if rows else 1) * (b_scale.T if weights else 1)
    return y


def unscaled(x, size):           # rounded, and the scales multiplied in again, too early
    groups = x.unflatten(1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).to(fp8.E4M3).float() * scale).flatten(1)


right(fp8.check_block_product)(in_blocks)
right(fp8.check_block_product)(lambda x, weight, size: in_blocks(x.double(), weight.double(), size).float())
wrong(fp8.check_block_product, "only then come the scales")(
    lambda x, weight, size: (lambda a, b: a @ b.T)(*(unscaled(n, size) for n in (x, weight))))
wrong(fp8.check_block_product, "nothing was rounded")(lambda x, weight, size: x @ weight.T)
wrong(fp8.check_block_product, "a scale belongs to each block")(lambda x, weight, size: in_blocks(x, weight, x.shape[1]))
wrong(fp8.check_block_product, "the weights' scales are missing")(lambda *a: in_blocks(*a, weights=False))
wrong(fp8.check_block_product, "the rows' scales are missing")(lambda *a: in_blocks(*a, rows=False))
wrong(fp8.check_block_product, "Is a `return` missing?")(lambda *a: None)


# ---- latent attention

right(latent_attention.check_share)(lambda heads, nope, rope, value, rank: (rank / heads + rope / heads) / (nope + rope + value))
wrong(latent_attention.check_share, "the latent and one rotated key")(lambda heads, nope, rope, value, rank: rank / (heads * (nope + rope + value)))
wrong(latent_attention.check_share, "whatever the number of heads")(lambda heads, nope, rope, value, rank: (rank + heads * rope) / (heads * (nope + rope + value)))
wrong(latent_attention.check_share, "expected 0.1125")(lambda heads, nope, rope, value, rank: (rank + rope) / (2 * heads * (nope + rope)))


@right(latent_attention.check_absorbed_scores)
def _(q_nope, q_rope, w_uk, latents, rope_keys):
    "Head by head, with both parts in one product."
    entries = torch.cat((latents, rope_keys), -1)
    return torch.stack([torch.cat((q_nope[:, h] @ w_uk[h], q_rope[:, h]), -1) @ entries.T for h in range(len(w_uk))])


@wrong(latent_attention.check_absorbed_scores, "as many as all keys have; multiply the queries by w_uk instead")
def _(q_nope, q_rope, w_uk, latents, rope_keys):
    keys = torch.einsum("hdr,kr->hkd", w_uk, latents)
    return torch.einsum("qhd,hkd->hqk", q_nope, keys) + torch.einsum("qhr,kr->hqk", q_rope, rope_keys)


wrong(latent_attention.check_absorbed_scores, "lacks the rotated part")(
    lambda q_nope, q_rope, w_uk, latents, rope_keys: torch.einsum("qhd,hdr->hqr", q_nope, w_uk) @ latents.T)
wrong(latent_attention.check_absorbed_scores, "heads, queries, tokens")(
    lambda q_nope, q_rope, w_uk, latents, rope_keys: torch.einsum("qhd,hdr->qhr", q_nope, w_uk) @ latents.T + q_rope @ rope_keys.T)
wrong(latent_attention.check_absorbed_scores, "Is a `return` missing?")(lambda q_nope, q_rope, w_uk, latents, rope_keys: None)
wrong(latent_attention.check_absorbed_scores, "is a ndarray, expected a tensor")(
    lambda q_nope, q_rope, w_uk, latents, rope_keys: (torch.einsum("qhd,hdr->hqr", q_nope, w_uk) @ latents.T + q_rope.transpose(0, 1) @ rope_keys.T).numpy())
wrong(latent_attention.check_absorbed_scores, "differs from the scores of keys that are made first")(
    lambda q_nope, q_rope, w_uk, latents, rope_keys: torch.einsum("qhd,hdr->hqr", q_nope, w_uk.flip(0)) @ latents.T + q_rope.transpose(0, 1) @ rope_keys.T)


@right(latent_attention.check_break_even)
def _(length, rank, nope, rope, value):
    "The first of all numbers."
    made = rank * (nope + value)
    more = (n for n in range(1, length + 1) if n * made + n * length * (2*rank + rope) > length * made + n * length * (nope + rope + value))
    return next(more, None)


wrong(latent_attention.check_break_even, "the absorbed one multiplies each query and each output")(      # without that
    lambda length, rank, nope, rope, value: rank * (nope + value) // max(1, 2*rank - nope - value) + 1)
wrong(latent_attention.check_break_even, "up to so many queries absorbing is never more work")(
    lambda length, rank, nope, rope, value: math.floor(length * rank * (nope + value) / (rank * (nope + value) + length * (2*rank - nope - value))) + 1)


def first_of(length, rank, nope, rope, value, last=None, equal=False):
    "The least number of queries up to `last`; `equal`: as much work is enough."
    made, slope = rank * (nope + value), rank * (nope + value) + length * (2*rank - nope - value)
    if slope <= 0: return None
    n = -(-length * made // slope) if equal else length * made // slope + 1
    return n if n <= (last or length) else None


right(latent_attention.check_break_even)(first_of)
wrong(latent_attention.check_break_even, "gives 57, expected None")(lambda *sizes: first_of(*sizes, last=10**9))
wrong(latent_attention.check_break_even, "gives 2, expected 3")(lambda *sizes: first_of(*sizes, equal=True))


# ---- pooling

@right(pooling.check_shorten_vector)
def _(vector, n):
    "With plain numbers."
    length = math.sqrt(sum(x * x for x in vector[:n]))
    return [x / length for x in vector[:n]]


wrong(pooling.check_shorten_vector, "and should be 1")(lambda vector, n: vector[:n])
wrong(pooling.check_shorten_vector, "expected (2,)")(lambda vector, n: vector)
wrong(pooling.check_shorten_vector, "Is a `return` missing?")(lambda vector, n: None)
wrong(pooling.check_shorten_vector, "gives 'short', which is no tensor")(lambda vector, n: "short")
wrong(pooling.check_shorten_vector, "which is no tensor")(lambda vector, n: (x for x in vector[:n]))


@right(pooling.check_mean_pool)
def _(states, lengths):
    "By a matrix that adds up; the length of a sum does not matter."
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sums = torch.zeros(len(lengths), states.shape[1]).index_add_(0, owner, states)
    return sums / sums.norm(dim=1, keepdim=True)


def parts_of_texts(states, lengths): return states.split(lengths)


@right(pooling.check_mean_pool)
def _(states, lengths): return [torch.nn.functional.normalize(p.mean(0), dim=0) for p in parts_of_texts(states, lengths)]


wrong(pooling.check_mean_pool, "should have length 1")(lambda states, lengths: torch.stack([p.mean(0) for p in parts_of_texts(states, lengths)]))
wrong(pooling.check_mean_pool, "the last state, not the mean")(lambda states, lengths: torch.stack([p[-1] / p[-1].norm() for p in parts_of_texts(states, lengths)]))
wrong(pooling.check_mean_pool, "which tokens belong to which text?")(
    lambda states, lengths: torch.nn.functional.normalize(states.mean(0).expand(len(lengths), -1), dim=1))


@right(pooling.check_running_mean)
class MovingMean:
    "The mean itself, moved towards each piece by its share."
    def __init__(self): self.mean, self.count = None, 0

    def add(self, states):
        self.count += len(states)
        if self.mean is None: self.mean = torch.zeros(states.shape[1])
        self.mean = self.mean + (states - self.mean).sum(0) / self.count

    def vector(self): return self.mean / self.mean.norm()


@wrong(pooling.check_running_mean, "a piece counts by its tokens")
class MeanOfMeans:
    def __init__(self): self.total = 0
    def add(self, states): self.total = self.total + states.mean(0)
    def vector(self): return self.total / self.total.norm()


@wrong(pooling.check_running_mean, "one vector and one number are enough")
class KeepsAll:
    def __init__(self): self.states = []
    def add(self, states): self.states += list(states)
    def vector(self): return torch.nn.functional.normalize(torch.stack(self.states).mean(0), dim=0)


@right(pooling.check_running_mean)
class Slotted:
    __slots__ = ["total"]
    def __init__(self): self.total = None
    def add(self, states): self.total = states.sum(0) if self.total is None else self.total + states.sum(0)
    def vector(self): return self.total / self.total.norm()


class KeepsPieces:
    def __init__(self): self.pieces = ()
    def add(self, states): self.pieces += (states,)
    def vector(self): return torch.nn.functional.normalize(torch.cat(self.pieces).mean(0), dim=0)


class KeepsPiecesInASlot(KeepsPieces):
    __slots__ = ["pieces"]


for keeps in (KeepsPieces, KeepsPiecesInASlot): wrong(pooling.check_running_mean, "keeps 23 numbers or entries")(keeps)


@wrong(pooling.check_running_mean, "changes the states it is given")
class InPlace:
    def __init__(self): self.total = None
    def add(self, states):
        if self.total is None: self.total = torch.zeros(states.shape[1])
        self.total += states.cumsum_(0)[-1]
    def vector(self): return self.total / self.total.norm()


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)
