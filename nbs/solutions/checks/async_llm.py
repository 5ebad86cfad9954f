"Checks of the exercises of the chapter on the asynchronous engine. Nothing here needs an engine."
import asyncio
import numbers
import threading
import time
import weakref
from concurrent.futures import TimeoutError as NotDone

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_share_lost(share_lost):
    for step, cores, readers, chunk in ((.04, 2, 32, 1e-4), (.02, 2, 0, 1e-4), (.01, 1, 100, 1e-4), (.05, 16, 256, 5e-5)):
        extra = readers * chunk / cores
        expect(share_lost, (step, cores, readers, chunk), extra / (step + extra),
               f"the step becomes {1e3*extra:.1f} ms longer, of {1e3*(step + extra):.1f} ms in all", tolerance=1e-9)


@exercise
def check_pieces_sent(pieces_sent):
    for num_tokens, interval in ((10, 4), (9, 4), (1, 4), (2, 4), (5, 1), (6, 5), (100, 10)):
        wanted, left = [1], num_tokens - 1
        while left:
            wanted.append(min(interval, left))
            left -= wanted[-1]
        case = f"pieces_sent({num_tokens}, {interval})"
        got = attempt(case, pieces_sent, num_tokens, interval)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(hasattr(got, "__iter__"), f"{case} gives {show(got)}, expected the list {show(wanted)}")
        got = list(got)
        require(all(isinstance(n, numbers.Integral) for n in got), f"{case} gives {show(got)}, expected whole numbers")
        require(sum(got) == num_tokens, f"{case} gives {show(got)}, {sum(got)} tokens of {num_tokens}", "no token may be lost or sent twice")
        require(got[:1] == [1], f"{case} gives {show(got)}", "the first token is to be sent at once")
        require(got == wanted, f"{case} gives {show(got)}, expected {show(wanted)}")


@exercise
def check_stepper(Stepper):
    inside, threads, count = [], set(), [0]

    def step():
        inside.append(True)
        threads.add(threading.current_thread())
        count[0] += 1
        time.sleep(.002)
        inside.pop()

    def asked(): return bool(inside), threading.current_thread()
    def broken(): raise KeyError("odd")
    stepper = attempt("Stepper(step)", Stepper, step)
    def result(future, what):
        require(hasattr(future, "result"), f"ask gives {show(future)}, expected a concurrent.futures.Future")
        try: return future.result(5)
        except (NotDone, TimeoutError): raise WrongAnswer(f"after 5 seconds {what} has no result") from None
    for _ in range(20):
        within, thread = result(attempt("ask(function)", stepper.ask, asked), "a function that was asked")
        require(thread is not threading.current_thread(), "ask calls the function in the asker's thread; the stepping thread is to call it")
        require(not within, "a function is called while a step is under way")
    require(threads == {thread}, "the function is called by another thread than the steps are")
    future = attempt("ask(function) of a function that raises", stepper.ask, broken)
    try: found = result(future, "a function that raises")
    except KeyError: found = KeyError
    require(found is KeyError, f"a function raises a KeyError, and its future gives {show(found)}")
    require(result(attempt("ask(function)", stepper.ask, lambda: 7), "a function asked after one that raised") == 7, "the thread does not survive a function that raises")
    before = count[0]
    time.sleep(.05)
    require(count[0] > before, "nothing is asked, and no step is made: the thread waits for an ask")
    last = [stepper.ask(lambda i=i: i) for i in range(5)]
    attempt("close()", stepper.close)
    require(all(f.done() for f in last), "close has returned, and something asked for before has not been done")
    require(not thread.is_alive(), "close has returned, and the thread is still alive")


class Text(str):
    "A string of which one can tell whether somebody holds it."


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
        box, seen = Box(), weakref.WeakSet()
        for i in range(100):
            seen.add(text := Text(f"word {i} "))
            box.put(text)
        del text
        require(len(seen) < 2, f"after 100 puts that nobody has read, the box holds {len(seen)} texts", "it is to hold one string, with all of them in it")
    in_its_own_loop(scenario)


def in_its_own_loop(scenario):
    "Run the coroutine in another thread: a notebook's has a loop already."
    failed = []
    def run():
        try: asyncio.run(scenario())
        except WrongAnswer as error: failed.append(error)
        except (TimeoutError, asyncio.TimeoutError): failed.append(WrongAnswer("take waits, though there is something to give"))
        except Exception as error: failed.append(WrongAnswer(f"the box raises {type(error).__name__}: {error}"))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    require(not thread.is_alive(), "after 10 seconds take has neither given something nor let go of the event loop",
            "a loop without `await` keeps all others waiting; restart the kernel, it is still running")
    if failed: raise failed[0]
