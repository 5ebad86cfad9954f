"""The asynchronous engine: readers get their tokens whoever comes and goes, and nothing of them stays in the engine.

The engine has everything in it but a model, so all answers are known beforehand."""
import asyncio
import random
import threading
import time
from contextlib import aclosing, contextmanager

import pytest

import fake_engine as fake
from nano_vllm import SamplingParams
from nano_vllm.async_llm import AsyncLLM, EngineDeadError, QueueFullError, joined
from nano_vllm.server import API


def work_of(rng, num):
    return [[rng.randint(1, 3) for _ in range(rng.randint(1, 20))] for _ in range(num)], [fake.some_params(rng) for _ in range(num)]


async def read(llm, requests, streams=True):
    "{request id: all of its answer}, joined from the pieces."
    found = {}
    async for piece in llm.follow(requests, streams):
        found[piece.request_id] = joined(found[piece.request_id], piece) if piece.request_id in found else piece
    return found


def check_answers(requests, found):
    for r in requests:
        for completion, out in zip(r.completions, found[r.request_id].outputs):
            e = fake.expected_answer(completion.seq)
            assert (out.token_ids, out.text, out.finish_reason, out.stop_reason) == (e.token_ids, e.text, e.finish_reason, e.stop_reason)
            assert out.logprobs == e.logprobs


@contextmanager
def fake_llm(**options):
    llm = AsyncLLM(fake.fake_engine(**options)).start()
    try: yield llm
    finally: llm.shutdown()
    fake.assert_all_free(llm.engine)
    assert llm.num_open == 0 and not llm.readers


@pytest.mark.parametrize("seed", range(8))
def test_readers_get_their_tokens_whoever_comes_and_goes(seed):
    "Readers of all kinds, some of whom leave, are cancelled or aborted: the others' answers are right, and nothing is left."
    rng, told = random.Random(seed), []

    async def reader(llm, prompts, params, fate):
        requests = await llm.make_requests(prompts, params)
        if fate == "stays": check_answers(requests, await read(llm, requests, rng.random() < .5))
        if fate == "leaves":
            async with aclosing(llm.follow(requests, True)) as pieces:
                async for _ in pieces: break
        if fate == "is aborted":
            task = asyncio.ensure_future(read(llm, requests))
            await asyncio.sleep(rng.random() * .01)
            for r in requests: await llm.abort(r.request_id)
            for piece in (await task).values(): told.append({o.finish_reason for o in piece.outputs})
        if fate == "is cancelled":
            task = asyncio.ensure_future(read(llm, requests))
            await asyncio.sleep(rng.random() * .01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def all_of_them(llm):
        fates = rng.choices(["stays", "leaves", "is aborted", "is cancelled"], [3, 1, 1, 1], k=25)
        await asyncio.gather(*[reader(llm, *work_of(rng, rng.choice([1, 1, 3])), fate) for fate in fates])

    with fake_llm() as llm: asyncio.run(all_of_them(llm))
    assert all(None not in reasons for reasons in told)


def test_a_reader_who_leaves_is_gone_before_the_next_step():
    "Its abort is taken between steps: the step under way is the last that computes anything for it."
    with fake_llm() as llm:
        leaves, stepped = threading.Event(), []
        schedule = llm.engine.scheduler.schedule

        def noted():
            output = schedule()
            stepped.append((leaves.is_set(), {s.seq.request_id for s in output.scheduled}))
            return output
        llm.engine.scheduler.schedule = noted
        step = llm.engine.step
        llm.engine.step = lambda: (time.sleep(.005), step())

        async def go():
            requests = await llm.make_requests([[1, 2, 3]] * 2, SamplingParams(max_tokens=50, ignore_eos=True))
            stays = asyncio.ensure_future(read(llm, requests[:1]))
            async with aclosing(llm.follow(requests[1:], True)) as pieces:
                async for _ in pieces: break
            leaves.set()
            await stays
            return requests[1].request_id
        gone = asyncio.run(go())
        late = [ids for after, ids in stepped if after]
        assert len(late) > 5 and sum(gone in ids for ids in late) <= 1


def test_a_slow_reader_holds_one_piece():
    with fake_llm() as llm:
        async def go():
            requests = await llm.make_requests([[1, 2, 3]], SamplingParams(max_tokens=50, ignore_eos=True))
            pieces = llm.follow(requests, True)
            found = await anext(pieces)
            while not requests[0].finished: await asyncio.sleep(.005)
            await asyncio.sleep(.05)
            reader, = llm.readers.values()
            assert len(reader.new) == 1
            async for piece in pieces: found = joined(found, piece)
            check_answers(requests, {found.request_id: found})
        asyncio.run(go())


def test_one_message_a_step_whoever_reads():
    with fake_llm() as llm:
        messages = []
        tell = llm.tell
        llm.tell = lambda f, *args: (messages.append(f.__name__), tell(f, *args))

        async def go():
            requests = await llm.make_requests([[1, 2, i % 3] for i in range(6)], SamplingParams(max_tokens=5, ignore_eos=True))
            await read(llm, requests)
        asyncio.run(go())
        assert 0 < len(messages) <= 10 and set(messages) == {"receive"}


def test_the_event_loop_neither_encodes_nor_steps(monkeypatch):
    with fake_llm() as llm:
        seen, inputs = {}, type(llm.engine.input_processor)
        def noted(name, function):
            def call(*args):
                seen.setdefault(name, set()).add(threading.current_thread().name.split("_")[0])
                return function(*args)
            return call
        monkeypatch.setattr(inputs, "make_requests", noted("make_requests", inputs.make_requests))
        for name in ("add", "abort", "step"): setattr(llm.engine, name, noted(name, getattr(llm.engine, name)))

        async def go():
            params = SamplingParams(max_tokens=200, ignore_eos=True)     # too long to be told in one piece
            async for _ in llm.generate([1, 2], params): break
            async for _ in llm.generate([1, 2], params): pass
        asyncio.run(go())
        assert seen == dict(make_requests={"input"}, add={"engine"}, step={"engine"}, abort={"engine"})


def test_generate_is_vllms():
    "Outputs hold all so far; an id that is in use is refused; an abort ends with what there is."
    with fake_llm() as llm:
        async def go():
            outs = [o async for o in llm.generate([1, 2], SamplingParams(max_tokens=9, ignore_eos=True), "mine")]
            lengths = [len(o.outputs[0].token_ids) for o in outs]
            assert lengths == sorted(lengths) and lengths[-1] == 9 and outs[-1].finished and outs[0].request_id == "mine"
            params = SamplingParams(max_tokens=58, ignore_eos=True)
            first = llm.generate([1, 2], params, "x")
            await anext(first)
            with pytest.raises(ValueError, match="request_id must be new, got 'x'"): await anext(llm.generate([1], params, "x"))
            await llm.abort("x")
            await llm.abort("nobody")
            async for out in first: pass
            assert out.finished and out.outputs[0].finish_reason in ("abort", "length")
        asyncio.run(go())


def test_the_queue_is_bounded_in_sequences():
    with fake_llm() as llm:
        llm.max_open, several = 4, [SamplingParams(n=2), SamplingParams(n=3)]
        params = SamplingParams(max_tokens=50, ignore_eos=True)

        async def go():
            held = llm.follow(await llm.make_requests([[1]] * 3, params), True)
            await anext(held)
            for prompts, p in (([[1]], SamplingParams(n=5)), ([[1]] * 5, None), ([[1]] * 3, SamplingParams(n=2)), ([[1]] * 2, several)):
                with pytest.raises(ValueError, match="n for each prompt must make at most 4 sequences, got [56]"): await llm.make_requests(prompts, p)
            two = await llm.make_requests([[1]] * 2, params)
            with pytest.raises(QueueFullError, match="3 of 4"): await anext(llm.follow(two, True))
            assert await read(llm, two[:1])
            await held.aclose()
            assert llm.num_open == 0
        asyncio.run(go())


def test_a_failed_step_is_told_to_those_who_were_in_it_and_to_nobody_else():
    with fake_llm() as llm:
        execute, broken = llm.engine.runner.execute, []

        def fails_once(output):
            if not broken and len(output.scheduled) == 3:
                broken.append(True)
                raise RuntimeError("once")
            return execute(output)
        llm.engine.runner.execute = fails_once

        async def go():
            requests = await llm.make_requests([[1, 2, 3], [1, 1], [2]], SamplingParams(max_tokens=20, ignore_eos=True))
            failed = await asyncio.wait_for(asyncio.gather(*[read(llm, [r]) for r in requests], return_exceptions=True), 10)
            assert [str(e) for e in failed] == ["once"] * 3
            requests = await llm.make_requests([[1, 2, 3], [1, 1]], SamplingParams(max_tokens=20))
            check_answers(requests, await read(llm, requests))
        asyncio.run(go())
        assert not llm.errored


def test_a_dead_engine_hangs_nobody():
    llm = AsyncLLM(fake.fake_engine()).start()

    def fails(*args): raise RuntimeError("the device is gone")
    llm.engine.runner.execute = llm.engine.runner.clear = fails

    async def go():
        requests = await llm.make_requests([[1, 2, 3], [1, 1]], SamplingParams(max_tokens=20))
        failed = await asyncio.wait_for(asyncio.gather(*[read(llm, [r]) for r in requests], return_exceptions=True), 10)
        assert all(isinstance(e, RuntimeError) for e in failed)
        llm.thread.join(10)
        assert llm.errored and not llm.thread.is_alive()
        with pytest.raises(EngineDeadError, match="the device is gone"): await read(llm, await llm.make_requests([[1]], None))
        api = API(llm, "tiny")
        with pytest.raises(EngineDeadError): await api.health({}, {})
    asyncio.run(go())


def test_shutdown_ends_what_is_open():
    llm = AsyncLLM(fake.fake_engine()).start()

    async def go():
        reading = asyncio.ensure_future(read(llm, await llm.make_requests([[1]], SamplingParams(max_tokens=59, ignore_eos=True))))
        await asyncio.sleep(.01)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        done, = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(done, EngineDeadError) or done.popitem()[1].finished
    asyncio.run(go())
    fake.assert_all_free(llm.engine)


def test_vllms_paths_lead_here():
    from nano_vllm.v1.engine.async_llm import AsyncLLM as found
    from nano_vllm.v1.engine.exceptions import EngineDeadError as error
    assert (found, error) == (AsyncLLM, EngineDeadError)


def test_who_has_ended_is_told_though_its_last_piece_could_not_be_made(monkeypatch):
    "A step that ends one request and fails while the pieces are made: both readers learn it, none waits for ever."
    async def main(llm):
        requests = await llm.make_requests([[1, 2], [3]], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 30)])
        broken = lambda: (_ for _ in ()).throw(ValueError("no piece"))
        for r in requests: monkeypatch.setattr(r, "new_output", broken, raising=False)
        readers = [asyncio.ensure_future(read(llm, [r])) for r in requests]
        done, waiting = await asyncio.wait(readers, timeout=10)
        for task in waiting: task.cancel()
        assert not waiting and all(isinstance(task.exception(), ValueError) for task in done)

    with fake_llm() as llm: asyncio.run(main(llm))


ENDLESS = SamplingParams(max_tokens=50, ignore_eos=True)


async def beside_a_reader(llm, what):
    "Does `what`, a coroutine, while somebody reads; nothing may happen to the reader."
    requests = await llm.make_requests([[1, 2]], ENDLESS)
    reading = asyncio.ensure_future(read(llm, requests))
    while not llm.engine.requests: await asyncio.sleep(.001)
    try: return await what
    finally: check_answers(requests, await asyncio.wait_for(reading, 10))


@pytest.mark.parametrize("request_id", [None, 5, b"x", ["x", 5], ["x", ["y"]]])
def test_an_id_that_is_no_string_is_refused_and_harms_nobody(request_id):
    with fake_llm() as llm:
        with pytest.raises(ValueError, match="request_id must be a string, got"): asyncio.run(beside_a_reader(llm, llm.abort(request_id)))
        if request_id is None: return
        with pytest.raises(ValueError, match="request_id must be a string, got"): asyncio.run(llm.make_requests([[1]], ENDLESS, request_id))


@pytest.mark.parametrize("kind", [list, tuple, set, iter])
def test_several_requests_are_aborted_by_one_call(kind):
    async def go(llm):
        requests = await llm.make_requests([[1], [2], [3]], ENDLESS)
        reading = [asyncio.ensure_future(read(llm, [r])) for r in requests]
        while len(llm.engine.requests) < 3: await asyncio.sleep(.001)
        await llm.abort(kind([r.request_id for r in requests[:2]]))
        ends = [found.popitem()[1].outputs[0].finish_reason for found in await asyncio.wait_for(asyncio.gather(*reading), 10)]
        assert ends == ["abort", "abort", "length"]
    with fake_llm() as llm: asyncio.run(go(llm))


@pytest.mark.parametrize("dies", [False, True])
def test_who_waits_for_a_call_waits_no_longer_than_the_engine_lives(dies):
    "Also where nothing but the call has gone through the loop, and where the engine dies instead of ending."
    llm, gate = AsyncLLM(fake.fake_engine()).start(), threading.Event()

    def fails(*args):
        gate.wait()
        raise RuntimeError("the device is gone")
    if dies: llm.abort_all = fails
    for ask in (fails if dies else gate.wait, None): llm.asks.put(ask)

    async def go():
        asking = asyncio.ensure_future(llm.ask(print, "never"))
        await asyncio.sleep(0)      # it is in the queue, behind the end
        gate.set()
        with pytest.raises(EngineDeadError, match="gone" if dies else "shut down"): await asyncio.wait_for(asking, 10)
        assert not llm.answers
    asyncio.run(go())
    llm.shutdown()


def test_a_call_that_nobody_waits_for_any_more_is_not_made_and_harms_nobody():
    with fake_llm() as llm:
        async def leaves():
            gate = threading.Event()
            llm.asks.put(gate.wait)
            asking = asyncio.ensure_future(llm.pause_generation(mode="keep"))
            await asyncio.sleep(.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            gate.set()
        asyncio.run(beside_a_reader(llm, leaves()))
        assert not llm.is_paused_now and not llm.answers


def test_a_pause_waits_for_what_an_earlier_one_has_kept():
    async def go(llm):
        requests = await llm.make_requests([[1, 2]], ENDLESS)
        reading = asyncio.ensure_future(read(llm, requests))
        while not llm.engine.requests: await asyncio.sleep(.001)
        await llm.pause_generation(mode="keep")
        assert not reading.done()
        await asyncio.wait_for(llm.pause_generation(mode="wait"), 10)
        check_answers(requests, await reading)
        assert await llm.is_paused()
        await llm.pause_generation(mode="wait")      # nobody is there
        assert await llm.is_paused()
        await llm.resume_generation()
    with fake_llm() as llm: asyncio.run(go(llm))


def test_an_engine_that_was_never_started_can_be_shut_down(): AsyncLLM(fake.fake_engine()).shutdown()


def test_from_engine_args_takes_its_arguments_as_vllm_does(monkeypatch):
    monkeypatch.setattr("nano_vllm.async_llm.make_engine", lambda args: fake.fake_engine())
    for llm in (AsyncLLM.from_engine_args(None, True), AsyncLLM.from_engine_args(engine_args=None, start_engine_loop=True, max_open=7)):
        llm.shutdown()
        assert llm.max_open in (2**20, 7)
    with pytest.raises(ValueError, match="stat_loggers is refused"): AsyncLLM.from_engine_args(None, True, None, [print])
