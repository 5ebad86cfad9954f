"""The engine and its parts: what it computes with, how much memory it takes and when it gives it back, what a step costs, and what
interrupts do to those who only stand beside."""
import gc
import sys
import weakref
from collections import OrderedDict
from contextlib import contextmanager

import pytest
from fake_engine import assert_all_free, check_books, expected, fake_engine
from helpers import Tracing, assert_idle
from nano_vllm import LLM, SamplingParams, engine_args as module
from nano_vllm.attention import TorchAttention
from nano_vllm.layers import OPS, Linear, Ops
from nano_vllm.llm import new_outputs
from nano_vllm.model_runner import kv_block_bytes

LIMITS = dict(num_kv_blocks=40, device="cpu")


# ---- Ops ----

def test_the_engine_of_chapter_14_is_chosen_by_name(tiny):
    "No later chapter's kernel is in it."
    llm = LLM(tiny, ops="torch", **LIMITS)
    runner = llm.engine.runner
    assert runner.ops == Ops() and runner.ops.attention is TorchAttention and runner.graphs is None
    linears = [m for m in runner.model.modules() if isinstance(m, Linear)]
    assert len(linears) > 4 and all(m.product is None and m.weight is not None for m in linears)
    assert all(m.ops is runner.ops for m in runner.model.modules() if hasattr(m, "ops"))
    assert type(runner.forward.__self__.model).forward is type(runner.model).forward and "forward" not in vars(runner.model)


def test_all_ops_that_suit_give_the_same_tokens(tiny):
    "Greedy and seeded ones; those that round more than float32 does are left out."
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0, 0, 0.8, 1)]
    prompts = ["A cat", "In a hole in the ground " * 5, "A dog", "B"]
    def answers(**options):
        outs = LLM(tiny, dtype="float32", **LIMITS, **options).generate(prompts, params, use_tqdm=False)
        return [out["token_ids"] for out in outs]
    plain, tried = answers(ops="torch"), []
    assert answers() == plain
    for name in OPS:
        try: assert answers(ops=name) == plain, name
        except ValueError as e: assert name in str(e) and "does not suit" in str(e)
        else: tried.append(name)
    assert "torch" in tried


# ---- Memory ----

def engines_of_all_ops():
    "Options for each of the ops: they keep what they need in different places."
    return [{}, dict(async_scheduling=True), *(dict(ops=name, quantization=name[:4] if name.startswith("int") else None)
                                               for name in OPS if name != "fusions")]


@pytest.mark.parametrize("options", engines_of_all_ops(), ids=str)
def test_a_deleted_llm_frees_its_model_at_once(tiny, options):
    "By reference counts alone: nothing of it stands in a cycle."
    gc.collect()
    gc.disable()
    try:
        try: llm = LLM(tiny, **LIMITS, **options)
        except ValueError as e: pytest.skip(str(e))    # not here
        llm.generate(["A cat", "A dog"], SamplingParams(max_tokens=3, logprobs=1), use_tqdm=False)
        stream = llm.stream("A cow", SamplingParams(max_tokens=9))
        next(stream)
        stream.close()
        runner = llm.engine.runner
        kept = [weakref.ref(x) for x in (llm, llm.engine, runner, runner.model, runner.kv_cache, runner.input_batch)]
        del llm, runner, stream
        if sys.version_info < (3, 11): gc.collect()    # there contextlib leaves what ended a generator in a cycle with its own frame
        assert [ref() for ref in kept] == [None] * len(kept)
    finally: gc.enable()


TOTAL, FREE = 2**30, 900 * 2**20


@pytest.fixture
def num_blocks(tiny, monkeypatch):
    "How many KV blocks an engine gets on a CPU with 1 GiB of memory, 900 MiB of it free, and how large they are."
    monkeypatch.setattr(module, "device_memory", lambda device: (FREE, TOTAL))
    def count(share=None, **options):
        llm = LLM(tiny, device="cpu", gpu_memory_utilization=share, max_num_seqs=4096, max_num_batched_tokens=64, **options)
        runner = llm.engine.runner
        size = kv_block_bytes(runner.model.kv_config, 16, runner.kv_cache.dtype)
        assert runner.kv_cache.nbytes == size * runner.kv_cache.shape[2] and llm.engine.scheduler.manager.pool.num_blocks == runner.kv_cache.shape[2]
        return runner.kv_cache.shape[2], size
    return count


def test_gpu_memory_utilization_counts_on_a_cpu(num_blocks):
    "The cache, what is in use already and a step's activations stay within the share, and use it up."
    (small, size), (large, _), (default, _) = num_blocks(0.3), num_blocks(0.5), num_blocks()
    assert abs((large - small) * size - 0.2 * TOTAL) <= size         # what else is needed is the same
    activations = 0.3 * TOTAL - (TOTAL - FREE) - small * size
    assert 64 * 49152 * 4 <= activations < 5 * 64 * 49152 * 4        # 64 rows of logits in float32, three times that to rate 64 tokens, and some
    # unless asked otherwise, a part of what is free
    assert abs(default * size - (module.OF_FREE_MEMORY * FREE - activations)) <= size


def test_a_share_that_is_in_use_already_is_refused_by_name(num_blocks, monkeypatch):
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.125 leaves no memory for a KV block of \d+ bytes"): num_blocks(0.125)
    monkeypatch.setattr(module, "OF_FREE_MEMORY", 1e-3)
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=None leaves no memory"): num_blocks()


# ---- What a step costs ----

class Counted(OrderedDict):
    "Counts what is taken out of it by going through it."
    taken = 0

    def counted(self, iterator):
        for item in iterator:
            Counted.taken += 1
            yield item

    def __iter__(self): return self.counted(super().__iter__())
    def keys(self): return self.counted(super().keys())
    def values(self): return self.counted(super().values())
    def items(self): return self.counted(super().items())


@contextmanager
def lines_counted():
    "Counts the lines of this package's code that the block runs: {'lines': ...} when it is done."
    result, before = dict(lines=0), sys.gettrace()

    def trace(frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith("nano_vllm."): return None
        result["lines"] += event == "line"
        return trace
    sys.settrace(trace)
    try: yield result
    finally: sys.settrace(before)


# why those who wait do: all seats are taken, no blocks are left, or somebody computes the prefix that they share
SITUATIONS = {"no seat": dict(max_num_seqs=4), "no blocks": dict(max_num_seqs=64, num_blocks=56),
              "pending prefix": dict(max_num_seqs=64, threshold=2)}


def operations(situation, num_waiting):
    "(lines, items taken out of tables) of three steps, of a new request, and of the abort of one that waits."
    engine = fake_engine(**dict(num_blocks=4000, max_num_batched_tokens=64) | SITUATIONS[situation])
    params = SamplingParams(seed=5, max_tokens=20, ignore_eos=True)
    def add(first, length):
        request, = engine.input_processor.make_requests([[first] * length], params)
        engine.add(request)
        return request
    for i in range(4): add(1 + i, 40)
    shares = situation == "pending prefix"
    for _ in range(1 if shares else 3): engine.step()
    first = 1 if shares else 7
    waiting = [add(first, 40) for _ in range(num_waiting)]
    scheduler = engine.scheduler
    assert len(scheduler.waiting) == num_waiting
    scheduler.waiting, engine.requests = Counted(scheduler.waiting), Counted(engine.requests)
    Counted.taken = 0
    with lines_counted() as result:
        for _ in range(3): engine.step()
        add(first, 40)
        engine.abort(waiting[-2].request_id)
        engine.abort(waiting[num_waiting // 2].request_id)
    found = result["lines"], Counted.taken
    assert len(scheduler.waiting) == num_waiting - 1 and len(scheduler.running) == 4    # they did wait
    check_books(engine)
    return found


@pytest.mark.parametrize("situation", SITUATIONS)
def test_8000_waiting_requests_make_no_step_slower(situation):
    "Counted, not timed: the very same operations as with 80 of them."
    few, many = operations(situation, 80), operations(situation, 8000)
    assert few == many and few[0] > 100 and few[1] < 3 * 80


# ---- Interrupts ----

def stream_of(engine, *prompts):
    "The first request of a stream, the stream, and the tokens of its first piece."
    requests = engine.input_processor.make_requests(list(prompts), SamplingParams(seed=1, max_tokens=12, ignore_eos=True))
    stream = new_outputs(engine, requests)
    return requests[0], stream, next(stream)["token_ids"]


def fail_once(engine, monkeypatch, where, name):
    "One step of the engine raises, in the method `name`."
    def fail(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(where, name, fail)
        with pytest.raises(KeyboardInterrupt): engine.step()
    assert not engine.is_consistent


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_a_reader_hears_of_an_abort_that_follows_an_interrupt(monkeypatch, num_in_flight):
    engine = fake_engine(num_in_flight=num_in_flight)
    (lost, lost_stream, lost_ids), (kept, kept_stream, kept_ids) = stream_of(engine, [1, 2]), stream_of(engine, [3, 2])
    fail_once(engine, monkeypatch, engine.runner, "execute")
    engine.abort(lost.request_id)
    pieces = list(lost_stream)
    for piece in pieces: lost_ids += piece["token_ids"]
    assert pieces[-1].finished and pieces[-1]["finish_reason"] == "abort" and not any(p.finished for p in pieces[:-1])
    assert 0 < len(lost_ids) < 12 and lost_ids == expected(lost)[0][:len(lost_ids)] and lost.metrics.finished_time
    for piece in kept_stream: kept_ids += piece["token_ids"]
    assert [kept_ids] == expected(kept)
    assert_all_free(engine)


def test_nothing_is_held_once_an_interrupted_engine_has_no_requests(monkeypatch):
    "Also where no step follows that would begin anew."
    engine = fake_engine(num_in_flight=2)
    streams = [stream_of(engine, [first, 2]) for first in (1, 2, 3)]
    fail_once(engine, monkeypatch, engine.scheduler, "update")
    for request, *_ in streams: engine.abort(request.request_id)
    assert engine.is_consistent and not engine.in_flight and not engine.runner.input_batch.seqs
    assert_all_free(engine)


class AtLine(Tracing):
    "Calls `function` before the line of number `at` that this package's code runs within the block, once; `left`: lines still to come."

    def __init__(self, at, function): self.left, self.function = at, function

    def trace(self, frame, event, arg):
        if not frame.f_globals.get("__name__", "").startswith("nano_vllm."): return None
        if event == "line":
            self.left -= 1
            if self.left == 0: self.function()
        return self.trace


@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_a_stream_that_is_collected_amid_the_step_of_another(num_in_flight, stride):
    "Python closes an abandoned stream when it likes, so requests that run or wait may be aborted before any line of a step."
    for at in range(1, 10**6, stride):
        engine = fake_engine(num_in_flight=num_in_flight, max_num_seqs=3, max_num_batched_tokens=8)
        kept, kept_stream, ids = stream_of(engine, [1, 2])
        abandoned = stream_of(engine, [3] * 6, [2] * 9, [3, 2], [1] * 7)[1]
        with AtLine(at, abandoned.close) as place:
            for piece in kept_stream: ids += piece["token_ids"]
        assert [ids] == expected(kept) and piece.finished and piece["finish_reason"] == "length"
        if place.left > 0: break
        late, stream, late_ids = stream_of(engine, [2, 3])
        for piece in stream: late_ids += piece["token_ids"]
        assert [late_ids] == expected(late)
        assert_all_free(engine)
    assert at > 1000


def test_an_interrupted_llm_is_idle_at_once(tiny, monkeypatch):
    llm = LLM(tiny, **LIMITS)
    with monkeypatch.context() as m:
        m.setattr(llm.engine.runner, "execute", lambda output: 1 / 0)
        with pytest.raises(ZeroDivisionError): llm.generate(["A cat", "A dog"], use_tqdm=False)
    assert_idle(llm)
