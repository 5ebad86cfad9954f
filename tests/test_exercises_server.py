"""The exercises of the part "Serving, next": each check accepts other right answers, and says what is wrong with wrong ones.

What holds for the notebooks of all chapters with solutions stands in test_exercises.py."""
import asyncio
import hmac
import json
import re

import pytest

from exercise_answers import Answers, assert_all_tried, checks_of, name_of, try_answer
from solutions.checks import server

MODULES = [server]
CHECKS = checks_of(MODULES)
ANSWERS = Answers()
right, wrong = ANSWERS.right, ANSWERS.wrong


# ---- 29, a server

right(server.check_share_lost)(lambda step, cores, n, chunk: 1 - step / (step + n * chunk / cores))
wrong(server.check_share_lost, "of 41.6 ms in all")(lambda step, cores, n, chunk: n * chunk / cores / step)
wrong(server.check_share_lost, "the step becomes 1.6 ms longer")(lambda step, cores, n, chunk: n * chunk / (step + n * chunk))


@right(server.check_same_key)
def _(given, key):
    letters = [given[i] for i in range(len(given))]
    return hmac.compare_digest("".join(letters), "".join(key[i] for i in range(len(key))))


wrong(server.check_same_key, "the time tells where the first difference is")(
    lambda given, key: len(given) == len(key) and all(given[i] == key[i] for i in range(len(key))))
wrong(server.check_same_key, "same_key('s3cret', 's3cret-key') gives True, expected False")(
    lambda given, key: not sum(given[i] != key[i] for i in range(min(len(given), len(key)))))
wrong(server.check_same_key, "raises IndexError")(lambda given, key: not sum(given[i] != key[i] for i in range(len(key))))
wrong(server.check_same_key, "takes slices")(lambda given, key: given[:] == key[:])
wrong(server.check_same_key, "Is a `return` missing?")(lambda given, key: [given[i] == key[i] for i in range(min(len(given), len(key)))] and None)


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


class WithQueue:
    def __init__(self): self.queue = asyncio.Queue()
    def put(self, text): self.queue.put_nowait(text)
    def close(self): self.queue.put_nowait(None)
    def rest(self): return []

    async def take(self):
        found = [await self.queue.get(), *self.rest()]
        return "".join(found) if None not in found else None


@right(server.check_box)
class WithCondition:
    def __init__(self): self.parts, self.open, self.waiter = [], True, None

    def wake(self):
        if self.waiter and not self.waiter.done(): self.waiter.set_result(None)

    def put(self, text):
        self.parts.append(text)
        self.wake()

    def close(self):
        self.open = False
        self.wake()

    async def take(self):
        if self.open and not self.parts:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        parts, self.parts = self.parts, []
        return "".join(parts) if parts else None


wrong(server.check_box, "take gives 'One,', expected 'One, two'")(WithQueue)


@wrong(server.check_box, "two takes give (None, None)")
class ForgetsTheEnd(WithCondition):
    async def take(self):
        text = await super().take()
        return text if self.open else None


@wrong(server.check_box, "it has to wait")
class NeverWaits(WithCondition):
    async def take(self):
        parts, self.parts = self.parts, []
        return "".join(parts)


@wrong(server.check_box, "what has been read is not given again")
class Repeats(WithCondition):
    async def take(self):
        if not hasattr(self, "all"): self.all = ""
        new = await super().take()
        self.all += new or ""
        return self.all if new else None


@wrong(server.check_box, "though there is something to give")
class SleepsOn(WithCondition):
    def wake(self): pass


# ---- what holds for all

@pytest.mark.parametrize("case", ANSWERS, ids=name_of)
def test_check_accepts_right_answers_and_says_what_is_wrong_with_others(case, capsys):
    try_answer(case, capsys)


def test_every_check_has_been_tried_with_right_and_wrong_answers():
    assert_all_tried(CHECKS, ANSWERS)
