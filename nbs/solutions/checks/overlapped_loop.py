"Checks of the exercises of the chapter on the overlapped loop, and a device that is late."
from itertools import product
from types import SimpleNamespace

from nano_vllm.kv_blocks import Sequence
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.tokenizer import NoTokenizer
from nano_vllm.engine import Engine
from nano_vllm.request import InputProcessor, OutputProcessor

from . import WrongAnswer, attempt, exercise, expect, require
from .engine import EOS, answer_to, next_token, require_idle, toy_scheduler


@exercise
def check_to_schedule(to_schedule):
    for (known, expected, computed, max_len), wanted, why in (
            ((6, 0, 0, 20), 6, "a prompt of 6 tokens that has not begun"), ((6, 1, 6, 20), 1, "its first token is being sampled, and can be scheduled"),
            ((7, 0, 6, 20), 1, "its first token has come"), ((7, 1, 7, 20), 1, "7 are known, and one is on its way"),
            ((6, 0, 4, 20), 2, "two tokens of the prompt are left"), ((7, 1, 8, 20), 0, "all has been scheduled"),
            ((7, 1, 7, 8), 0, "the token on its way is the last permitted one, and nobody needs its key and value"),
            ((7, 0, 6, 8), 1, "one more token may come"), ((6, 1, 6, 7), 0, "a single token was wanted")):
        expect(to_schedule, (known, expected, computed, max_len), wanted, why)


@exercise
def check_wasted_rows(wasted_rows):
    for answers, depth, wanted, why in (
            ([(5, True, 100)], 1, 0, "nothing is launched on trust"), ([(5, True, 100)], 2, 1, "one row was launched before its end was seen"),
            ([(5, False, 5)], 2, 0, "the host can count"), ([(5, True, 100)], 3, 2, "two steps were in flight"),
            ([(5, True, 6)], 3, 1, "only one more token was permitted"), ([(6, True, 6)], 2, 0, "the last permitted token ended it"),
            ([(5, True, 100), (200, False, 200), (1, True, 9)], 2, 2, "two of three ended by themselves")):
        expect(wasted_rows, (answers, depth), wanted, why)


def ends(hosts, devices, depth):
    "When each step ends on the device."
    ended, host_free = [], 0
    for i, (host, device) in enumerate(zip(hosts, devices)):
        host_free = max(host_free, ended[i - depth] if i >= depth else 0) + host
        ended.append(max(host_free, ended[-1] if ended else 0) + device)
    return ended


@exercise
def check_end_of_run(end_of_run):
    for hosts, devices, depth, why in (
            ([10], [20], 2, "a single step has nothing to overlap with"), ([10] * 4, [20] * 4, 1, "in turn"),
            ([10] * 4, [20] * 4, 2, "the host's work is hidden but for the first"), ([20] * 4, [10] * 4, 2, "the device's work is hidden but for the last"),
            ([10, 10, 50, 10, 10], [20] * 5, 2, "the host is slow once"), ([10, 10, 50, 10, 10], [20] * 5, 3, "the host is slow once, and may be further ahead"),
            ([10, 10, 10, 10], [20, 70, 5, 20], 2, "the device is slow once")):
        wanted = ends(hosts, devices, depth)[-1]
        expect(end_of_run, (hosts, devices, depth), wanted,
               f"{why}; the host begins with a step when it is done with the one before and has received the step {depth} before it", 1e-9)


class LateRunner:
    "A toy model whose tokens stay on the device until somebody asks for a step's result."

    def __init__(self, may_fail=lambda where: None):
        self.may_fail = may_fail
        self.clear()

    def clear(self):
        self.sampled, self.in_flight, self.most, self.steps = {}, [], 0, 0

    def token_at(self, seq, position):
        if position < seq.num_tokens: return seq.tokens(position, position + 1)[0]
        return self.sampled[seq.request_id, position]

    def execute(self, output):
        self.may_fail("execute")
        self.steps += 1
        if not output: raise WrongAnswer("the runner was given an empty step: nobody has a token to compute")
        if self.steps > 1000: raise WrongAnswer("after 1,000 steps there is still somebody to compute")
        tokens = []
        for s in output.sampled:
            tokens.append(next_token([self.token_at(s.seq, position) for position in range(s.end)]))
            self.sampled[s.seq.request_id, s.end] = tokens[-1]
        result, number = SimpleNamespace(token_ids=tokens, logprobs=[None] * len(tokens), prompt_logprobs=[], accepted={}), self.steps
        self.in_flight.append(number)
        self.most = max(self.most, len(self.in_flight))

        def receive():
            self.may_fail("result")
            if self.in_flight and self.in_flight[0] != number and number in self.in_flight:
                raise WrongAnswer(f"the result of step {number} is asked for before that of step {self.in_flight[0]}, which was launched before it")
            if number in self.in_flight: self.in_flight.remove(number)
            return result
        return SimpleNamespace(result=receive)


def watch(scheduler):
    "Let a scheduler notice a loop that waits for nothing, and an end that comes twice."
    schedule, finish, calls = scheduler.schedule, scheduler.finish, []

    def counting():
        calls.append(1)
        if len(calls) > 2000: raise WrongAnswer("after 2,000 calls of `schedule` the loop has not ended: if nothing can be scheduled, the oldest step in flight has to be received")
        return schedule()

    def finish_once(seq, reason):
        if seq.finish_reason: raise WrongAnswer(f"`finish` is called for sequence {seq.request_id}, which has ended: the token of a step that was in flight then is dropped")
        finish(seq, reason)
    scheduler.schedule, scheduler.finish = counting, finish_once


@exercise
def check_run_ahead(run_ahead):
    prompts = [[5, 3, 8], [9] * 30, [1, 2, 3, 4, 5, 6], [4], [2, 2, 7], [6, 1]]
    for (blocks, budget, max_tokens, kind), depth in product(
            ((40, 64, 12, "a step has room for all"), (40, 8, 12, "long prompts take several steps"),
             (12, 16, 9, "memory runs out, and sequences start again"), (40, 64, 1, "one token each"), (40, 64, 2, "a stop token may be the last that is permitted"), (200, 64, 60, "all answers end by a stop token")), (1, 2)):
        scheduler, runner = toy_scheduler(blocks, budget), LateRunner()
        seqs = [Sequence(str(i), list(ids), SamplingParams(), stop_token_ids=frozenset({EOS}), max_len=len(ids) + max_tokens)
                for i, ids in enumerate(prompts)]
        case = f"run_ahead at depth {depth}, where {kind}"
        watch(scheduler)
        attempt(case, run_ahead, scheduler, runner, seqs, depth)
        for seq, ids in zip(seqs, prompts):
            wanted, prompt = answer_to(ids, max_tokens), ids if len(ids) < 9 else "9, 9, ..."
            require(seq.output_token_ids == wanted, f"{case}: the prompt {prompt} gets {seq.output_token_ids}, expected {wanted}")
            reason = "stop" if wanted[-1] == EOS else "length"
            require(seq.finish_reason == reason, f"{case}: the answer {wanted} has finish_reason {seq.finish_reason!r}, expected {reason!r}")
        require(not runner.in_flight, f"{case}: {len(runner.in_flight)} steps in flight were never received")
        require(runner.most <= depth, f"{case}: {runner.most} steps were in flight at a time")
        require(runner.most == depth or max_tokens == 1, f"{case}: never more than {runner.most} steps were in flight",
                "the next step is launched before the oldest is received")
        require_idle(scheduler, case)
    return "and at depth 2 a step was launched before the last one was received"


def late_engine(num_in_flight=2, may_fail=lambda where: None):
    "An `Engine` around the toy model; `may_fail` is called with 'execute' or 'result', and may raise."
    tokenizer = NoTokenizer("toy")
    inputs = InputProcessor(tokenizer, 100, 200, 400, 4, {EOS})
    return Engine(inputs, toy_scheduler(), LateRunner(may_fail), OutputProcessor(tokenizer, {EOS}), num_in_flight)
