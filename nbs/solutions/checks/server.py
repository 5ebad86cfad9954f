"Checks of the exercises of the chapter on the server. Nothing here opens a socket."
import asyncio
import json
import threading

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_share_lost(share_lost):
    for step, cores, readers, chunk in ((.04, 2, 32, 1e-4), (.02, 2, 0, 1e-4), (.01, 1, 100, 1e-4), (.05, 16, 256, 5e-5)):
        extra = readers * chunk / cores
        expect(share_lost, (step, cores, readers, chunk), extra / (step + extra),
               f"the step becomes {1e3*extra:.1f} ms longer, of {1e3*(step + extra):.1f} ms in all", tolerance=1e-9)


class Spied:
    "A key that notes which of its letters have been looked at."
    def __init__(self, text): self.text, self.seen = text, []
    def __len__(self): return len(self.text)

    def __getitem__(self, i):
        if not isinstance(i, int): raise WrongAnswer("same_key takes slices; look at one letter at a time, so that they can be counted")
        letter = self.text[i]                    # IndexError ends a loop over the letters
        self.seen.append(i)
        return letter


@exercise
def check_same_key(same_key):
    key = "s3cret-key"
    looks = {}
    for given in (key, "S3cret-key", "s3cret-keY", "s3cret-kex", "xxxxxxxxxx", "s3cret", "s3cret-key-and-more", ""):
        a, b = Spied(given), Spied(key)
        case = f"same_key({given!r}, {key!r})"
        got = attempt(case, same_key, a, b)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(bool(got) == (given == key), f"{case} gives {show(got)}, expected {given == key}")
        looks.setdefault(len(given), {})[given] = len(a.seen)
    for length, counts in looks.items():
        if len(set(counts.values())) == 1: continue
        (one, n), (other, m) = min(counts.items(), key=lambda c: c[1]), max(counts.items(), key=lambda c: c[1])
        raise WrongAnswer(f"same_key looks at {n} letters of {one!r} and at {m} of {other!r}: the time tells where the first difference is")


EVENTS = [{"text": "One,"}, {"text": "naïve 👋"}, {"text": "a\nb data: [DONE]"}, {"text": "", "usage": {"n": 3}}]


def stream_of(events, end="\n\n", extra=""):
    return (extra + "".join(f"data: {json.dumps(e, ensure_ascii=False)}{end}" for e in events) + f"data: [DONE]{end}").encode()


@exercise
def check_parse_events(parse_events):
    whole = stream_of(EVENTS)
    cases = {"all at once": [whole], "a line at a time": whole.splitlines(keepends=True),
             "a byte at a time": [whole[i:i+1] for i in range(len(whole))], "seven bytes at a time": [whole[i:i+7] for i in range(0, len(whole), 7)],
             "with a comment before it": [stream_of(EVENTS, extra=": keep-alive\n\n")], "with CRLF": [stream_of(EVENTS, end="\r\n\r\n")]}
    for name, pieces in cases.items():
        got = attempt(f"parse_events of a stream, {name},", lambda: list(parse_events(iter(pieces))))
        require(got == EVENTS, f"of a stream, {name}, parse_events yields {show(got)}, expected {show(EVENTS)}")
    left = iter([whole, b"data: {\"of\": \"nobody\"}\n\n"])
    require(list(parse_events(left)) == EVENTS, "parse_events goes on behind [DONE]")
    seen, taken = [], []
    def noted():
        for piece in (stream_of(EVENTS[:1])[:-14], stream_of(EVENTS)):
            taken.append(list(seen))
            yield piece
    for event in parse_events(noted()): seen.append(event)
    require(len(taken) == 2 and taken[1], "the first event was there, and parse_events waits for more before it yields it: a reader wants it at once")


@exercise
def check_box(Box):
    async def scenario():
        box = Box()
        for text in ("One,", " two"): box.put(text)
        got = await asyncio.wait_for(box.take(), 1)
        require(got == "One, two", f"after put('One,') and put(' two'), take gives {show(got)}, expected 'One, two'", "all that there is, at once")
        waiting = asyncio.ensure_future(box.take())
        await asyncio.sleep(.01)
        require(not waiting.done(), f"nothing new is in the box, and take gives {show(waiting.done() and waiting.result())}; it has to wait")
        box.put("!")
        got = await asyncio.wait_for(waiting, 1)
        require(got == "!", f"take, which waited, gives {show(got)} after put('!')", "what has been read is not given again")
        box.put("end")
        box.close()
        got = await asyncio.wait_for(box.take(), 1), await asyncio.wait_for(box.take(), 1)
        require(got == ("end", None), f"after put('end') and close(), two takes give {show(got)}, expected ('end', None)", "what is unread comes before the end")
        box = Box()
        waiting = asyncio.ensure_future(box.take())
        await asyncio.sleep(.01)
        box.close()
        got = await asyncio.wait_for(waiting, 1)
        require(got is None, f"take waits when the box is closed, and gives {show(got)}, expected None")
    in_its_own_loop(scenario)


def in_its_own_loop(scenario):
    "Run the coroutine in another thread: a notebook's has a loop already."
    failed = []
    def run():
        try: asyncio.run(scenario())
        except WrongAnswer as error: failed.append(error)
        except (TimeoutError, asyncio.TimeoutError): failed.append(WrongAnswer("take waits, though there is something to give"))
        except Exception as error: failed.append(WrongAnswer(f"the box raises {type(error).__name__}: {error}"))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed: raise failed[0]
