"Checks of the exercises of the chapter on LLM, with a toy model behind a real engine."
import math
from contextlib import closing

from nano_vllm.engine import Engine
from nano_vllm.request import InputProcessor, OutputProcessor
from nano_vllm.layers import TensorParallelGroup
from nano_vllm.llm import LLM
from nano_vllm.sampling_params import Logprob, SamplingParams
from nano_vllm.tokenizer import NoTokenizer

from . import WrongAnswer, attempt, exercise, expect, require
from .engine import EOS, ToyRunner, answer_to, require_idle, toy_scheduler

LETTERS = ["", *"bcdefghij"]       # of the toy model's ten tokens; the first ends an answer


class LetterTokenizer(NoTokenizer):
    "A token is a letter."
    def decode(self, ids, skip_special_tokens=True): return "".join(LETTERS[i] for i in ids)
    def token_bytes(self, token_id, skip_special_tokens=True, first=False): return LETTERS[token_id].encode()
    def encode(self, text): return [LETTERS.index(letter) for letter in text]


class ToyLLM(LLM):
    "An LLM without a model, whose next request is number 8."
    def __init__(self):
        self.tokenizer = LetterTokenizer("toy")
        inputs = InputProcessor(self.tokenizer, len(LETTERS), 200, 400, 4, {EOS})
        inputs.num_made = 8
        runner = ToyRunner()
        runner.group = TensorParallelGroup()
        self.engine = Engine(inputs, toy_scheduler(), runner, OutputProcessor(self.tokenizer, {EOS}))

    def generate(self, *args, **options): raise WrongAnswer("`generate` was called; use nothing but `stream`")


@exercise
def check_perplexity(perplexity):
    for says, entries, tokens, wanted in (
            ("certain tokens", [None, {4: Logprob(0., 1)}, {7: Logprob(0., 1)}], [3, 4, 7], 1.),
            ("tokens of probability 1/2 and 1/8", [None, {4: Logprob(math.log(.5), 1)}, {7: Logprob(math.log(.125), 3)}], [3, 4, 7], 4.),
            ("a token of probability 1/8, whose entry also has the best one", [None, {9: Logprob(math.log(.5), 1), 4: Logprob(math.log(.125), 2)}], [3, 4], 8.)):
        expect(perplexity, (entries, tokens), wanted, "the first token is given, and does not count", 1e-9 * wanted, f"perplexity of {says}")


@exercise
def check_whole_words(whole_words):
    for pieces in (["The r", "iver r", "uns ", "to the", " sea."], ["a b ", "", "c"], ["one"], [], ["x ", "y ", " z"], ["two words ", "at", " once, here"]):
        given, shown = "", ""

        def feed():
            nonlocal given
            for piece in pieces:
                compare()
                given += piece
                yield piece
            compare()

        def compare():
            wanted = given[:given.rfind(" ") + 1]
            require(shown == wanted, f"of {pieces}, when {given!r} had come, {shown!r} was given on, expected {wanted!r}",
                    "a word is given on once the space behind it is there, and not later")

        case, words = f"whole_words({pieces})", attempt(f"whole_words({pieces})", whole_words, feed())
        require(words is not None, f"{case} gives None. Is a `yield` missing?")
        words = iter(words)
        while True:
            word = attempt(case, next, words, None)
            if word is None: break
            shown += word
        require(shown == "".join(pieces), f"{case} gives {shown!r} in all", "at the end, all of the text")


@exercise
def check_by_streaming(by_streaming):
    params = SamplingParams(temperature=0, max_tokens=12)
    for prompts in (["bcd"], ["hhd", "bc", "hhd", "e"], ["b", "c", "b", "d", "b"]):
        llm, case = ToyLLM(), f"by_streaming(llm, {prompts}, params)"
        wanted = [llm.tokenizer.decode(answer_to(llm.tokenizer.encode(p), 12)) for p in prompts]
        got = attempt(case, by_streaming, llm, prompts, params)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(list(got) == wanted, f"{case} gives {got}, expected {wanted}",
                "equal prompts are requests of their own; the first here has the request_id '8', and after '9' comes '10'")
        require_idle(llm.engine.scheduler, case)


def toy_requests(engine, *lens):
    "A request for each answer's length, of prompts that differ."
    prompts = [[1 + i, 2, 3] for i in range(len(lens))]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lens]
    return engine.input_processor.make_requests(prompts, params)


def names(requests): return [request.request_id for request in requests]


@exercise
def check_ended(ended):
    def begin(*lens):
        engine = ToyLLM().engine
        other, *requests = toy_requests(engine, 60, *lens)
        engine.add(other)
        return engine, other, requests

    def only_the_other(engine, other, case):
        require(not other.finished, f"{case}, a request that somebody else had added has ended with {other.output()['finish_reason']!r}",
                "abort only your own")
        require(list(engine.requests) == [other.request_id], f"{case}, the engine still has the requests {list(engine.requests)}",
                f"only {other.request_id}, somebody else's, should be there")

    engine, other, requests = begin(20, 3, 9, 3)
    case, seen = "reading ended(engine, requests), of 20, 3, 9 and 3 tokens, to its end", []
    readings = attempt(case, ended, engine, requests)
    require(hasattr(readings, "__next__"), f"ended(engine, requests) gives a {type(readings).__name__}", "write a generator, with `yield`")
    with closing(readings):
        while (request := attempt(case, next, readings, None)) is not None:
            require(request.finished, f"{case}: request {request.request_id} is given before it has ended")
            if not seen: require(not requests[0].finished, f"{case}: the first is given when all have ended", "give each when it ends")
            seen.append(request)
    require(sorted(names(seen)) == sorted(names(requests)), f"{case} gives the requests {names(seen)}, expected each of {names(requests)} once")
    require([len(r.output()["token_ids"]) for r in requests] == [20, 3, 9, 3], f"{case}: not all answers are whole")
    only_the_other(engine, other, f"after {case}")

    for way in ("closed", "left by an exception", "left by Ctrl-C in a step"):
        engine, other, requests = begin(30, 2, 30)
        readings, case = ended(engine, requests), f"after ended(engine, requests) was {way}"
        attempt(case, next, readings)
        if way == "closed": readings.close()
        elif way == "left by an exception": interrupt(lambda: readings.throw(KeyError("reader")), KeyError, case)
        else:
            schedule = engine.scheduler.schedule
            engine.scheduler.schedule = raise_interrupt
            interrupt(lambda: next(readings), KeyboardInterrupt, case)
            engine.scheduler.schedule = schedule
            engine.step()                    # makes good what the interrupt left
        only_the_other(engine, other, case)

    engine, other, first = begin(12, 4)
    second = toy_requests(engine, 5, 3)
    pair, counts, turn = [ended(engine, first), ended(engine, second)], [0, 0], 0
    while any(pair):
        if pair[turn] is not None:
            case = f"reading two of them in turn, number {turn}"
            if attempt(case, next, pair[turn], None) is None: pair[turn] = None
            else: counts[turn] += 1
        turn = 1 - turn
    require(counts == [2, 2], f"reading two of them in turn gives {counts[0]} and {counts[1]} requests, expected 2 and 2",
            "a request may end in a step that another reader has asked for")
    only_the_other(engine, other, "after reading two of them in turn")


def raise_interrupt(): raise KeyboardInterrupt


def interrupt(action, kind, case):
    try: action()
    except kind: return
    except StopIteration: pass
    raise WrongAnswer(f"{case}, nobody hears of it: what is raised must go on to the caller")
