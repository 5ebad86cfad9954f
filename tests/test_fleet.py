"""A fleet of which anything is interrupted, lost or out of reach: every answer is whole, and nothing is left behind.

Ray is a stand-in in this process, and the replicas are those of fake_engine.py, which have no model. So an interrupt can come before each of the fleet's
own lines in turn, and a replica be lost at any moment, within seconds."""
import copy
import random
from types import SimpleNamespace

import pytest
from fake_engine import expected_answer, fake_engine, some_params
from helpers import Tracing
from nano_vllm import SamplingParams, replicas
from nano_vllm.engine_args import EngineArgs, Parts
from nano_vllm.kv_blocks import Sequence
from nano_vllm.kv_transfer import DisaggregatedFleet, KVHandle, KVTransferConfig, TransferReplica, store_prefix, transfer_params
from nano_vllm.replicas import Actor, Fleet, Replica

WATCHED = {"nano_vllm.replicas", "nano_vllm.routing", "nano_vllm.kv_transfer"}
BLOCKS, SIZE = 40, 4


class Lost(Exception): "What Ray says of an actor that may come back."
class Gone(Lost): "And of one that will not."
class Injected(BaseException): "What comes before a line; no code catches it by name."


class Call:
    def __init__(self, handle, method, args): self.handle, self.method, self.args, self.answer, self.error = handle, method, copy.deepcopy(args), None, None


class Handle:
    "An actor: what it was asked for is done, in order, when somebody wants an answer."
    def __init__(self, make): self.make, self.replica, self.calls, self.gone = make, None, [], False
    def __getattr__(self, method): return SimpleNamespace(remote=lambda *args: self.ask(method, args))

    def ask(self, method, args):
        call = Call(self, method, args)
        if self.gone: call.error = Gone("it is gone")
        else: self.calls.append(call)
        return call

    def answer_next(self):
        call = self.calls.pop(0)
        if self.replica is None: self.replica = self.make()
        call.answer = getattr(self.replica, call.method)(*call.args)

    def cut_off(self, error=Lost):
        "It is out of reach, for a moment; what it does meanwhile nobody hears."
        for call in self.calls: call.error = error("out of reach")
        self.calls.clear()

    def die(self):
        self.cut_off()
        self.replica = None


class Ray:
    "As much of the module as a fleet needs."
    exceptions = SimpleNamespace(RayActorError=Lost, ActorDiedError=Gone)
    util = SimpleNamespace(remove_placement_group=lambda room: None)
    is_elsewhere = False         # a replica is at work, which would be another process

    def __init__(self, rng): self.rng = rng
    def is_initialized(self): return True

    def wait(self, calls):
        first = self.rng.choice(calls)
        return [first], [c for c in calls if c is not first]

    def get(self, call):
        Ray.is_elsewhere = True
        while call in call.handle.calls: call.handle.answer_next()
        Ray.is_elsewhere = False
        if call.error: raise call.error
        return call.answer

    def kill(self, handle):
        handle.cut_off(Gone)
        handle.gone = True


def parts():
    engine = fake_engine(num_blocks=BLOCKS, block_size=SIZE, max_num_batched_tokens=8)
    return Parts(engine.scheduler, engine.runner, BLOCKS, 1)


class LocalReplica(Replica):
    def __init__(self):
        self.parts = parts()
        self.clear()


class LocalTransferReplica(TransferReplica):
    "What is sent are the slots of the fake runner's cache."
    def __init__(self):
        self.parts = parts()
        self.clear()

    def send(self, seq):
        n = seq.num_computed_tokens // SIZE
        slots = [self.parts.runner.kv[b * SIZE:b * SIZE + SIZE] for b in seq.block_table[:n]]
        return KVHandle(None, seq.tokens(0, n * SIZE), slots) if n else None

    def load(self, seq):
        handle = transfer_params(seq).get("handle")
        if handle is None: return 0
        def write(blocks, first):
            for block, slots in zip(blocks, handle.place[first:]): self.parts.runner.kv[block * SIZE:block * SIZE + SIZE] = slots
        return store_prefix(self.parts.scheduler.manager, seq, len(handle.place), write)


class LocalDisaggregatedFleet(DisaggregatedFleet):
    def __init__(self, config):
        self.transfer, self.handles = KVTransferConfig("SharedMemoryConnector"), {}
        Fleet.__init__(self, config)

    def make_actor(self): return Actor(self.ray, self.config, TransferReplica)


@pytest.fixture()
def make_engine(monkeypatch):
    "Makes an engine whose steps two replicas compute."
    def make(kind=Fleet, seed=0):
        replica = LocalReplica if kind is Fleet else LocalTransferReplica
        monkeypatch.setattr(replicas, "start_ray", lambda: Ray(random.Random(seed)))
        monkeypatch.setattr(replicas, "start_actor", lambda ray, config, _: (Handle(replica), None))
        engine = fake_engine(num_blocks=BLOCKS, block_size=SIZE)
        engine.input_processor.random.seed(seed)
        config = SimpleNamespace(args=EngineArgs("m", data_parallel_size=2, block_size=SIZE))
        engine.scheduler = engine.runner = kind(config)
        return engine
    return make


def answer_all(engine, prompts, params, on_step=lambda i: None, most=3000):
    "Compute the requests to their ends, whatever comes, and look at what they say."
    requests = engine.input_processor.make_requests(prompts, params)
    wanted = [[expected_answer(c.seq) for c in r.completions] for r in requests]
    for request in requests: engine.add(request)
    for i in range(most):
        if not engine.requests: break
        try:
            on_step(i)
            engine.step()
        except Injected: pass
    assert not engine.requests, "no end in sight"
    for request, answers in zip(requests, wanted):
        for o, e in zip(request.output().outputs, answers, strict=True): assert (o.token_ids, o.text, o.finish_reason) == (e.token_ids, e.text, e.finish_reason)


def assert_idle(fleet, num_replicas=2):
    "All replicas are up and known to the router, with nothing to do and all their blocks free."
    while any(a.starting for a in fleet.actors.values()): fleet.hear()
    assert not fleet.homes and not fleet.waiting and not getattr(fleet, "handles", None)
    assert len(fleet.actors) == num_replicas and set(fleet.router.load) == set(fleet.actors), "somebody is not asked any more"
    assert not any(fleet.router.load.values()) and fleet.router.num_unfinished == 0, "a load of nobody"
    for actor in fleet.actors.values():
        assert not actor.sequences and not actor.added and not actor.draining
        fleet.ray.get(actor.handle.step.remote([], actor.aborted))
        pool = actor.handle.replica.parts.scheduler.manager.pool
        assert sorted(pool.free_blocks) == list(range(BLOCKS)) and not actor.handle.replica.sequences


class AtLine(Tracing):
    "Within the block, raises before the `at`-th line of the fleet's modules, once."
    def __init__(self, at): self.at, self.count = at, 0

    def trace(self, frame, event, arg):
        if frame.f_globals.get("__name__") not in WATCHED or Ray.is_elsewhere or frame.f_code.co_name == "end_actors": return None
        if event == "line":
            self.count += 1
            if self.count == self.at: raise Injected(f"line {frame.f_lineno} of {frame.f_code.co_name}")
        return self.trace


PROMPTS = [[1, 2, 3, 1, 2, 3, 1, i] for i in (1, 2, 3)] + [[3, 2]]
PARAMS = [SamplingParams(max_tokens=8, ignore_eos=True), SamplingParams(max_tokens=6, n=2), SamplingParams(max_tokens=9, stop="CC"), SamplingParams(max_tokens=1)]


def lines_of_a_day(engine, at):
    "A replica dies, another is out of reach, one comes and one is drained; how many lines the fleet ran."
    fleet = engine.scheduler
    def on_step(i):
        names = sorted(fleet.actors)
        if i == 4: fleet.actors[names[0]].handle.die()
        if i == 9: fleet.actors[names[-1]].handle.cut_off()
        if i == 12: fleet.resize(3)
        if i == 16: fleet.drain(names[0])
    lines, step = AtLine(at), engine.step
    def watched():
        with lines: step()
    engine.step = watched
    answer_all(engine, PROMPTS, PARAMS, on_step)
    return lines.count


@pytest.mark.ci
@pytest.mark.parametrize("kind", [Fleet, LocalDisaggregatedFleet])
def test_whatever_line_is_interrupted_no_token_is_lost_and_no_replica(make_engine, kind):
    "In steps: what a caller of `resize` interrupts is his own."
    total = lines_of_a_day(make_engine(kind), at=0)
    assert total > 1000
    for at in range(1, total, 17):
        engine = make_engine(kind)
        try: lines_of_a_day(engine, at)
        except AssertionError as e: raise AssertionError(f"interrupted at line {at}") from e
        while any(a.starting for a in engine.scheduler.actors.values()): engine.scheduler.hear()
        assert_idle(engine.scheduler, len(engine.scheduler.actors))


@pytest.mark.parametrize("kind", [Fleet, LocalDisaggregatedFleet])
def test_replicas_that_die_or_are_out_of_reach_at_random(make_engine, kind):
    "One that is only out of reach has its sequences still, and must not go on with them beside the new ones."
    for seed in range(25):
        rng, engine = random.Random(seed), make_engine(kind, seed)
        fleet = engine.scheduler
        prompts = [[rng.randint(1, 3) for _ in range(rng.randint(1, 20))] for _ in range(5)]
        def on_step(i):
            if rng.random() > .15: return
            handle = rng.choice(list(fleet.actors.values())).handle
            for _ in range(rng.randint(0, len(handle.calls))): handle.answer_next()      # and nobody hears of it
            rng.choice([handle.die, handle.cut_off])()
        answer_all(engine, prompts, [some_params(rng) for _ in prompts], on_step)
        assert_idle(fleet)


def test_a_draining_replica_goes_when_all_begins_anew(make_engine):
    "An interrupt takes its last requests from it."
    engine = make_engine()
    fleet = engine.scheduler
    def on_step(i):
        if i != 5: return
        fleet.drain(next(name for name, a in fleet.actors.items() if a.sequences))
        engine.must_recover = True
    answer_all(engine, PROMPTS, PARAMS, on_step)
    assert_idle(fleet, num_replicas=1)


def test_what_begins_anew_is_shared(make_engine):
    "Nothing is sent before all have forgotten: the first to say so would get it all."
    engine = make_engine()
    fleet, loads = engine.scheduler, []
    def on_step(i):
        if i == 3: engine.must_recover = True
        if i == 4: loads.append(sorted(fleet.router.load.values()))
    answer_all(engine, [[1] * 5, [2] * 5, [3] * 5, [1, 2] * 3], [PARAMS[0]] * 4, on_step)        # no two begin alike
    assert loads == [[2, 2]]


def test_a_fleet_is_resized_to_whole_numbers(make_engine):
    fleet = make_engine().scheduler
    for bad in (-1, 2.5, True, "2", None, 2**10 + 1):
        with pytest.raises(ValueError, match="num_replicas must be an integer from 0 to 1024, got"): fleet.resize(bad)
        assert_idle(fleet)
    fleet.resize(3)
    fleet.resize(2)
    assert sorted(fleet.actors) == [0, 1], "one that is loading has nothing to finish"
    assert_idle(fleet)
    fleet.resize(0)
    fleet.add(Sequence("1", [1, 2], SamplingParams()))
    with pytest.raises(RuntimeError, match="there is no replica left: all were ended"): fleet.schedule()
