"Checks of the exercises of the chapter on the engine, and an engine without a model to try them with."
from types import SimpleNamespace

from nano_vllm.engine import Engine
from nano_vllm.request import InputProcessor, OutputProcessor, RequestOutput
from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler
from nano_vllm.tokenizer import NoTokenizer

from . import WrongAnswer, attempt, exercise, require

EOS = 0


def next_token(text):
    "The token that the toy model puts after `text`: from 0 to 9, and 0 ends an answer."
    return sum((i + 1) * token for i, token in enumerate(text)) * 31 % 97 % 10


def answer_to(prompt, max_tokens):
    "The whole answer of the toy model, as nothing but a loop gives it."
    text = list(prompt)
    while len(text) - len(prompt) < max_tokens:
        text.append(next_token(text))
        if text[-1] == EOS: break
    return text[len(prompt):]


class ToyRunner:
    "Stands in for `ModelRunner`: each token is a function of the text before it."

    def __init__(self): self.steps = 0

    def clear(self): "It keeps nothing."

    def execute(self, output):
        self.steps += 1
        if not output:
            raise WrongAnswer("the runner was given an empty step: nobody has a token to compute. Has a sequence that is as "
                              "long as it may get not been finished?")
        if self.steps > 1000: raise WrongAnswer("after 1,000 steps there is still somebody to compute")
        for s in output.scheduled:
            if s.seq.finish_reason:
                raise WrongAnswer(f"sequence {s.seq.request_id} has ended and is computed all the same")
        tokens = [next_token(s.seq.tokens(0, s.end)) for s in output.sampled]
        result = SimpleNamespace(token_ids=tokens, logprobs=[None] * len(tokens), prompt_logprobs=[], accepted={})
        return SimpleNamespace(result=lambda: result)


def toy_scheduler(num_blocks=400, budget=16):
    return Scheduler(KVCacheManager(num_blocks, 4), 8, budget)


def toy_engine():
    "An `Engine` with everything in it but a model; prompts are lists of token ids."
    tokenizer = NoTokenizer("toy")
    inputs = InputProcessor(tokenizer, 100, 200, 400, 4, {EOS})
    return Engine(inputs, toy_scheduler(), ToyRunner(), OutputProcessor(tokenizer, {EOS}))


def require_idle(scheduler, case):
    pool = scheduler.manager.pool
    require(not scheduler.running and not scheduler.waiting,
            f"{case}: {len(scheduler.running)} sequences still run and {len(scheduler.waiting)} wait")
    require(len(pool.free_blocks) == pool.num_blocks,
            f"{case}: {pool.num_blocks - len(pool.free_blocks)} blocks have not been given back")


@exercise
def check_run(run):
    prompts = [[5, 3, 8], [9] * 30, [1, 2, 3, 4, 5, 6], [4], [2, 2, 7], [6, 1]]
    for blocks, budget, max_tokens, kind in ((40, 64, 12, "a step has room for all"), (40, 8, 12, "long prompts take several steps"),
                                             (12, 16, 9, "memory runs out, and sequences start again"), (40, 64, 1, "one token each")):
        scheduler, runner = toy_scheduler(blocks, budget), ToyRunner()
        seqs = [Sequence(str(i), list(ids), SamplingParams(), stop_token_ids=frozenset({EOS}), max_len=len(ids) + max_tokens)
                for i, ids in enumerate(prompts)]
        case = f"run, where {kind} (budget {budget}, {blocks} blocks, at most {max_tokens} tokens)"
        attempt(case, run, scheduler, runner, seqs)
        for seq, ids in zip(seqs, prompts):
            wanted = answer_to(ids, max_tokens)
            require(seq.output_token_ids == wanted,
                    f"{case}: the prompt {ids if len(ids) < 9 else '9, 9, ...'} gets {seq.output_token_ids}, expected {wanted}")
            reason = "stop" if wanted[-1] == EOS else "length"
            require(seq.finish_reason == reason,
                    f"{case}: the answer {wanted} has finish_reason {seq.finish_reason!r}, expected {reason!r}",
                    "0 is its stop token" if reason == "stop" else "it has all the tokens that it may have")
        require_idle(scheduler, case)


@exercise
def check_with_deadline(with_deadline):
    params = SamplingParams(temperature=0, max_tokens=12)
    prompts = [[5, 3, 8], [1, 2, 3, 4, 5, 6], [4], [2, 2, 7]]
    whole = [answer_to(ids, 12) for ids in prompts]
    for steps in (1, 3, 5, 50):
        engine = toy_engine()
        other, = engine.input_processor.make_requests([[8, 8, 1]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        engine.add(other)
        requests = engine.input_processor.make_requests([list(ids) for ids in prompts], params)
        case = f"with_deadline for four requests and {steps} steps"
        outputs = attempt(case, with_deadline, engine, requests, steps)
        require(engine.runner.steps <= steps, f"{case}: {engine.runner.steps} steps were taken")
        require(outputs is not None, f"{case} gives None. Is a `return` missing?")
        require(isinstance(outputs, (list, tuple)) and all(isinstance(output, RequestOutput) for output in outputs),
                f"{case} gives {outputs!r:.200}", "a list of `request.output()` is asked for")
        require(len(outputs) == 4, f"{case} gives {len(outputs)} outputs, expected one for each request")
        for ids, answer, output in zip(prompts, whole, outputs):
            got, reason = output["token_ids"], output["finish_reason"]
            require(got == answer[:steps], f"{case}: the prompt {ids} gets {got}, expected {answer[:steps]}",
                    "all are prompts of a few tokens, so each step gives each a token until it ends")
            wanted = "abort" if len(answer) > steps else ("stop" if answer[-1] == EOS else "length")
            require(reason == wanted, f"{case}: the answer {got} has finish_reason {reason!r}, expected {wanted!r}")
        require(not set(r.request_id for r in requests) & set(engine.requests),
                f"{case}: the engine still has some of the requests")
        reason = other.output()["finish_reason"]
        require(reason != "abort", f"{case}: a fifth request, which was in the engine before, has been aborted, too")
        while engine.requests: engine.step()
        require_idle(engine.scheduler, case)
        require(len(other.output()["token_ids"]) == 20, f"{case}: a fifth request was left without its tokens")


class Failing(ToyRunner):
    "A toy runner whose third step is interrupted, once."
    raised = False

    def execute(self, output):
        if self.steps == 2 and not self.raised:
            self.raised = True
            raise KeyboardInterrupt
        return super().execute(output)


def computed(output):
    "{request id: tokens} of a step."
    numbers = {}
    for s in output.scheduled: numbers[s.seq.request_id] = numbers.get(s.seq.request_id, 0) + s.num_tokens
    return numbers


@exercise
def check_timeline(timeline):
    for prompts, n, kind in (([[5, 3, 8], [4]], 1, "two short prompts"), ([[9] * 40, [1, 2]], 1, "a prompt that takes several steps"),
                             ([[2, 2, 7]], 3, "one request of three answers")):
        params = SamplingParams(max_tokens=6, ignore_eos=True, n=n, seed=1)
        case, expected, engine = f"timeline, with {kind}", [], toy_engine()
        execute = engine.runner.execute
        engine.runner.execute = lambda output: expected.append(computed(output)) or execute(output)
        for request in engine.input_processor.make_requests(prompts, params): engine.add(request)
        while engine.requests: engine.step()
        engine = toy_engine()
        got = attempt(case, timeline, engine, engine.input_processor.make_requests(prompts, params))
        require(got is not None, f"{case} gives None", "is a `return` missing?")
        require(isinstance(got, (list, tuple)) and all(isinstance(step, dict) for step in got), f"{case} gives {got!r}",
                "a list with a dict for each step is asked for")
        require(list(map(dict, got)) == expected, f"{case} gives {list(got)}, expected {expected}")
        require("execute" not in vars(engine.runner) or engine.runner.execute == ToyRunner.execute.__get__(engine.runner),
                f"{case}: engine.runner.execute is not what it was before")
        require_idle(engine.scheduler, case)
    engine, case = toy_engine(), "timeline, whose third step is interrupted,"
    engine.runner = Failing()
    try: timeline(engine, engine.input_processor.make_requests([[5, 3, 8]], SamplingParams(max_tokens=6, ignore_eos=True)))
    except KeyboardInterrupt:
        require("execute" not in vars(engine.runner) or engine.runner.execute == Failing.execute.__get__(engine.runner),
                f"{case} leaves its notes around engine.runner.execute", "`try: ... finally: ...` takes them away in any case")
    else: require(False, f"{case} does not raise KeyboardInterrupt", "who pressed Ctrl-C wants it to end")
