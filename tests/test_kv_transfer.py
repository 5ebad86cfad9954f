"""Prompts computed on one replica, answers on another: the same tokens as from one engine, whatever arrives of the blocks and whoever is killed.

One local Ray cluster for the whole file. The replicas are small random models."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from helpers import tiny_folder
from nano_vllm import LLM, SamplingParams, kv_transfer, prefix_cache
from nano_vllm.engine_args import EngineArgs, resolve_args
from nano_vllm.kv_blocks import Sequence
from nano_vllm.kv_transfer import (CONNECTORS, DisaggregatedSimulation, KVFormat, RoleRouter, SharedMemoryConnector, TransferReplica, fingerprint,
                                   kv_format, store_prefix)
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.replicas import Replica
from nano_vllm.routing import Arrival, Machine, Simulation, Traffic
from test_replicas import (  # noqa: F401: ray and alone are fixtures
    LIMITS, PARAMS, PROMPTS, alone, answers_of, assert_idle, kill, pids, ray, streamed, wait_for_all)

TRANSFER = dict(kv_connector="SharedMemoryConnector")


def args_of(folder, **options): return EngineArgs(folder, data_parallel_size=2, kv_transfer_config=TRANSFER, **LIMITS | options)


# ---- what both sides must agree on

def test_a_fingerprint_is_of_what_a_model_is(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path/"copy")
    assert fingerprint(copy) == fingerprint(tiny)
    assert fingerprint(tiny_folder(tmp_path/"other", tokenizer=False, rms_norm_eps=1e-3)) != fingerprint(tiny)
    from safetensors.torch import load_file, save_file
    weights = load_file(copy/"model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01       # 6 KB of 6 MB
    save_file(weights, copy/"model.safetensors", metadata=dict(format="pt"))
    assert fingerprint(copy) != fingerprint(tiny)


def test_another_format_is_refused_by_the_fields_name(tiny):
    ours = kv_format(resolve_args(args_of(tiny)))
    ours.check(replace(ours))
    for f in fields(KVFormat):
        with pytest.raises(ValueError, match=f"{f.name} must be .*, got 'another'"): ours.check(replace(ours, **{f.name: "another"}))


@pytest.mark.parametrize("options, field", [(dict(block_size=8), "block_size"), (dict(dtype="bfloat16"), "dtype"), (dict(kv_cache_dtype="bfloat16"), "dtype"),
                                            (dict(quantization="int8"), "quantization")], ids=str)
def test_an_engine_of_another_kind_refuses_the_blocks_before_any_work(tiny, options, field):
    handle = sent_by(TransferReplica(args_of(tiny)), [5] * 40)[1]
    consumer = TransferReplica(args_of(tiny, **options))
    with pytest.raises(ValueError, match=f"^{field} must be"): consumer.load(sequence([5] * 40, handle=handle))
    assert not consumer.parts.scheduler.manager.cache.block_of
    assert_all_free(consumer)


def test_another_model_is_refused(tiny, tmp_path):
    handle = sent_by(TransferReplica(args_of(tiny)), [5] * 40)[1]
    other = TransferReplica(args_of(tiny_folder(tmp_path, rms_norm_eps=1e-4)))
    with pytest.raises(ValueError, match="^model must be"): other.load(sequence([5] * 40, handle=handle))


@pytest.mark.parametrize("options, match", [
    (dict(data_parallel_size=1), "kv_transfer_config must be left out where data_parallel_size is 1"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_port=1)), "kv_transfer_config must be a dict .*kv_port"),
    (dict(kv_transfer_config="SharedMemoryConnector"), "kv_transfer_config must be a dict"),
    (dict(kv_transfer_config=dict(kv_connector="Pigeon")), "kv_connector must be one of SharedMemoryConnector, RayConnector, got 'Pigeon'"),
    (dict(kv_transfer_config=dict(kv_connector=["x"])), "kv_connector must be one of"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_role="kv_producer")), "kv_role must be kv_both"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_role="cook")), "kv_role must be one of"),
    (dict(kv_transfer_config=dict(TRANSFER, num_prefill_replicas=2)), "num_prefill_replicas must be an integer from 1 to 1, got 2"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_connector_extra_config=dict(capacity=-1))), "capacity must be"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_connector_extra_config=dict(speed=1))), "kv_connector_extra_config .*speed"),
    (dict(kv_transfer_config=dict(TRANSFER, kv_connector_extra_config=3)), "kv_connector_extra_config"),
    (dict(enable_prefix_caching=False), "enable_prefix_caching must be True"), (dict(enable_lora=True), "enable_lora must be left out"),
    (dict(tensor_parallel_size=2), "tensor_parallel_size must be left out with kv_transfer_config")], ids=str)
def test_bad_configurations_are_refused_before_any_replica_is_started(tiny, monkeypatch, options, match):
    pytest.importorskip("ray")
    def started(*_): raise AssertionError("a replica was started")
    monkeypatch.setattr(kv_transfer, "Actor", started)
    options = dict(data_parallel_size=2, kv_transfer_config=TRANSFER, **LIMITS) | options
    with pytest.raises(ValueError, match=match): LLM(tiny, **options)


def test_a_model_with_a_window_is_refused(tmp_path):
    import json
    folder = tiny_folder(tmp_path)
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=32)))
    with pytest.raises(ValueError, match="kv_transfer_config must be left out for a model with sliding windows"): kv_format(resolve_args(args_of(folder)))


# ---- into the pool

def text(n, first=0, salt=0): return Sequence("t", [first + i // 3 for i in range(n)], SamplingParams(), cache_salt=salt)


def assert_partition(manager, held=()):
    pool = manager.pool
    assert sorted([*pool.free_blocks, *held]) == list(range(pool.num_blocks))
    assert all(pool.ref_counts[b] == (b in held) for b in range(pool.num_blocks))
    for hash, block in manager.cache.block_of.items(): assert manager.cache.entries[block].hash == hash


@pytest.mark.parametrize("collide", [False, True])
def test_whatever_arrives_the_pool_is_whole_and_what_is_found_is_the_text(monkeypatch, collide):
    "Messages of texts with common beginnings, into pools in use; also if half of all hashes are equal."
    if collide: monkeypatch.setattr(prefix_cache, "hash_block", lambda parent, tokens: sum(tokens) % 3)
    rng, stored = random.Random(0), 0
    for _ in range(300):
        size, num_blocks = rng.choice([1, 2, 4]), rng.randint(1, 12)
        manager = KVCacheManager(num_blocks, size)
        held = [manager.new_block() for _ in range(rng.randint(0, num_blocks))]
        contents = {}                                # block -> the tokens it was filled with, the whole text before them included
        for _ in range(6):
            seq = text(rng.randint(1, 30), rng.randint(0, 1))
            before, n = manager.get_computed_blocks(seq), rng.randint(0, 30)

            def write(blocks, first):
                assert not set(blocks) & {*held, *before} and not any(b in manager.cache.block_of.values() for b in blocks), "found before it is filled"
                for i, b in enumerate(blocks, first): contents[b] = seq.tokens(0, (i + 1) * size)
            stored += store_prefix(manager, seq, n, write)
            assert_partition(manager, held)
            found = manager.get_computed_blocks(seq)
            for i, b in enumerate(found): assert contents[b] == seq.tokens(0, (i + 1) * size)
            useful = min(n, (seq.num_tokens - 1) // size)
            if not collide:
                assert found[:len(before)] == before
                assert len(found) >= min(useful, max(len(before), num_blocks - len(held)))
    assert stored > 200


def test_known_blocks_are_not_given_up_for_others_of_the_text():
    manager = KVCacheManager(4, 2)
    store_prefix(manager, text(5), 2, lambda *_: None)
    known = manager.get_computed_blocks(text(5))
    for b in [b for b in manager.pool.free_blocks if b not in known]: manager.pool.free_blocks.move_to_end(b)   # ours are next to be reused
    assert store_prefix(manager, text(20), 9, lambda *_: None) == 2
    assert manager.get_computed_blocks(text(20))[:2] == known and len(manager.get_computed_blocks(text(20))) == 4
    assert list(manager.pool.free_blocks) == manager.get_computed_blocks(text(20))[::-1], "what is forgotten first is the end"


def test_a_failing_write_leaves_nothing():
    manager = KVCacheManager(6, 2)
    store_prefix(manager, text(5), 2, lambda *_: None)
    def fail(*_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): store_prefix(manager, text(11), 5, fail)
    assert_partition(manager)
    assert len(manager.get_computed_blocks(text(11))) == 2


# ---- connectors

def some(n, first=0): return (torch.arange(n) + first).to(torch.uint8)


def test_shared_memory_is_received_once_and_let_go_of():
    connector = SharedMemoryConnector()
    places = [connector.send(some(1000, i)) for i in range(5)]
    for i in (3, 0, 4): assert torch.equal(SharedMemoryConnector().receive(places[i]), some(1000, i))
    assert all(connector.receive(places[i]) is None for i in (3, 0, 4))
    connector.tidy()
    assert len(connector.kept) == 2 and len(connector.unused) == 3 and torch.equal(connector.receive(places[1]), some(1000, 1))
    short, long = connector.send(some(10)), connector.send(some(5000))          # into memory that has been used
    assert torch.equal(connector.receive(short), some(10)) and torch.equal(connector.receive(long), some(5000)) and connector.receive(places[0]) is None
    assert torch.equal(connector.receive(connector.send(some(0))), some(0))


def test_an_old_place_does_not_lead_to_new_memory_nor_to_anything_else():
    connector = SharedMemoryConnector()
    path, ticket, size = place = connector.send(some(10))
    connector.let_go(fd := next(iter(connector.kept)))
    assert connector.send(some(10))[0] == path and connector.receive(place) is None       # the number was used again
    connector.let_go(fd)
    ends = os.pipe()
    try:
        assert fd in ends and connector.receive(place) is None           # to read from it would wait for ever
    finally:
        for end in ends: os.close(end)
    assert connector.receive(place) is None


def test_what_nobody_wants_is_bounded(monkeypatch):
    monkeypatch.setattr(kv_transfer, "MAX_KEPT", 8)
    connector = SharedMemoryConnector(capacity=1000)
    places = [connector.send(some(300)) for _ in range(5)]
    assert sum(connector.kept.values()) <= 1000 and connector.receive(places[0]) is None is connector.receive(places[1])
    assert connector.receive(places[4]) is not None
    for _ in range(20): connector.send(some(1))
    assert len(connector.kept) <= 8 and len(connector.unused) <= kv_transfer.MAX_UNUSED
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50): connector.receive(connector.send(some(100)))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_what_could_not_be_written_is_let_go_of():
    "Memory that was opened for a message and then not filled."
    class Failing:
        def __len__(self): return 400
        def numpy(self): raise MemoryError
    connector, before = SharedMemoryConnector(capacity=1000), len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with pytest.raises(MemoryError): connector.send(Failing())
    assert len(os.listdir("/proc/self/fd")) <= before + 2 and len(connector.kept) <= 2
    whole = connector.send(some(2000))                        # one message is kept, however large
    assert len(connector.kept) == 1 and torch.equal(connector.receive(whole), some(2000))


OWNER = """
import sys, torch
from nano_vllm.kv_transfer import SharedMemoryConnector
connector = SharedMemoryConnector()
print([connector.send(torch.full((2**24,), i, dtype=torch.uint8)) for i in range(2)], flush=True)
print(connector.receive(eval(sys.stdin.readline())).sum().item(), flush=True)
sys.stdin.read()"""


@pytest.mark.slow
def test_memory_goes_with_a_killed_process_on_either_side():
    mine, names = SharedMemoryConnector(), set(os.listdir("/dev/shm"))
    other = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    places = eval(other.stdout.readline())
    other.stdin.write(f"{mine.send(some(100))}\n")
    other.stdin.flush()
    assert int(other.stdout.readline()) == sum(range(100))
    received = mine.receive(places[1])
    other.kill()
    other.wait()
    assert received.sum() == 2**24 and mine.receive(places[0]) is None
    mine.tidy()
    assert not mine.kept and set(os.listdir("/dev/shm")) <= names


# ---- two replicas, by hand

def sequence(prompt, params=SamplingParams(temperature=0), max_tokens=1, have=(), seed=0, **transfer):
    params = replace(params, extra_args=dict(kv_transfer_params=transfer))
    return Sequence("a", list(prompt), params, seed=seed, output_token_ids=list(have), max_len=len(prompt) + max_tokens)


def sent_by(producer, prompt, params=SamplingParams(temperature=0), seed=0):
    "The first token that a producer computes, and the handle of the blocks."
    report = producer.step([sequence(prompt, params, seed=seed, do_remote_decode=True)], [])
    while not report.sent: report = producer.step([], [])
    return report.token_ids, report.sent["a", 0]


def rest_by(replica, seq):
    "All tokens of a sequence, and where its first step began."
    report = first = replica.step([seq], [])
    while replica.sequences: report = replica.step([], [])
    return seq.output_token_ids, first.scheduled[0][1] if first.scheduled else report.scheduled[0][1]


def assert_all_free(replica):
    manager = replica.parts.scheduler.manager
    assert_partition(manager)
    assert not manager.pending and not replica.sequences and not replica.sent


@pytest.mark.parametrize("options", [{}, dict(block_size=1), dict(block_size=5), dict(dtype="bfloat16"), dict(max_num_batched_tokens=16),
                                     dict(kv_cache_dtype="bfloat16"), dict(kv_cache_dtype="fp8")], ids=str)
def test_two_replicas_say_what_one_says(tiny, options):
    args, size = args_of(tiny, **options), options.get("block_size", 16)
    producer, consumer, mixed = TransferReplica(args), TransferReplica(args), Replica(args)
    for i, n in enumerate((1, 2, 15, 16, 17, 31, 32, 33, 100)):
        prompt, params = [7 + i, *range(20, 19 + n)], SamplingParams(temperature=.9 * (i % 2), ignore_eos=True)
        token, handle = sent_by(producer, prompt, params, seed=i)
        got, start = rest_by(consumer, sequence(prompt, params, 12, token, i, do_remote_prefill=True, handle=handle))
        assert got == rest_by(mixed, sequence(prompt, params, 12, seed=i))[0]
        assert start == n // size * size, "the consumer computed what had been sent"
    for replica in (producer, consumer): assert_all_free(replica)


def test_the_consumers_blocks_are_the_producers_bit_for_bit(tiny):
    producer, consumer = TransferReplica(args_of(tiny)), TransferReplica(args_of(tiny))
    consumer.parts.runner.kv_cache.fill_(float("nan"))           # what is not written is poison
    prompt = list(range(100, 180))
    token, handle = sent_by(producer, prompt)
    seq = sequence(prompt, max_tokens=9, have=token, handle=handle)
    assert consumer.load(seq) == 5
    here, there = (r.parts.scheduler.manager.get_computed_blocks(seq) for r in (producer, consumer))
    assert torch.equal(producer.parts.runner.kv_cache[:, :, here], consumer.parts.runner.kv_cache[:, :, there]) and len(here) == 5


def test_a_shared_beginning_is_written_once(tiny):
    producer, consumer = TransferReplica(args_of(tiny)), TransferReplica(args_of(tiny))
    document = list(range(100, 164))
    stored = []
    for question in ([1] * 20, [2] * 20, [3] * 5):
        token, handle = sent_by(producer, document + question)
        stored.append(consumer.load(sequence(document + question, max_tokens=9, have=token, handle=handle)))
    assert stored == [5, 1, 0]
    assert_all_free(consumer)


def test_what_does_not_arrive_is_computed(tiny):
    "No handle, one whose blocks are gone, one of another text, one of a part of the text."
    args, prompt = args_of(tiny), list(range(50, 120))
    producer, mixed = TransferReplica(args), Replica(args)
    wanted = rest_by(mixed, sequence(prompt, max_tokens=12))[0]
    token, handle = sent_by(producer, prompt)
    producer.connector.let_go(next(iter(producer.connector.kept)))
    _, others = sent_by(producer, prompt[:-10] + [9] * 10)
    _, shorter = sent_by(producer, prompt[:35])
    for h, begin in ((None, 0), (handle, 0), (others, 0), (replace(shorter, token_ids=[1, 2]), 0), (shorter, 32)):
        consumer = TransferReplica(args)
        got, start = rest_by(consumer, sequence(prompt, max_tokens=12, have=token, handle=h))
        assert (got, start) == (wanted, begin)
        assert_all_free(consumer)


@pytest.mark.parametrize("num_kv_blocks", [6, 12])
def test_a_consumer_short_of_blocks_says_the_same(tiny, num_kv_blocks):
    "Ten texts at a time in a pool with room for one or two: blocks that have come are evicted, texts preempted."
    args = args_of(tiny)
    producer, mixed, consumer = TransferReplica(args), Replica(args), TransferReplica(replace(args, num_kv_blocks=num_kv_blocks))
    prompts = [[30 + i] * (30 + 5 * i) for i in range(8)]
    params = SamplingParams(temperature=.9, ignore_eos=True)
    wanted = [rest_by(mixed, sequence(p, params, 12, seed=i))[0] for i, p in enumerate(prompts)]
    seqs = []
    for i, p in enumerate(prompts):
        token, handle = sent_by(producer, p, params, seed=i)
        seqs.append(replace(sequence(p, params, 12, token, i, handle=handle), request_id=str(i)))
    consumer.step(seqs, [])
    while consumer.sequences: consumer.step([], [])
    assert [seq.output_token_ids for seq in seqs] == wanted
    assert_all_free(consumer)


def test_an_aborted_prompt_is_not_sent(tiny):
    producer = TransferReplica(args_of(tiny, max_num_batched_tokens=16))
    producer.step([sequence([5] * 60, do_remote_decode=True)], [])
    report = producer.step([], [("a", 0)])
    assert not report.sent and not producer.connector.kept
    assert_all_free(producer)


# ---- routing and simulation

def test_a_role_is_a_preference():
    router = RoleRouter(2)
    for name in range(5): router.add(name)
    assert {router.route([i], "kv_producer") for i in range(9)} == {0, 1} and {router.route([i], "kv_consumer") for i in range(9)} == {2, 3, 4}
    assert router.num_known([3, 99]) == 1 and router.num_known([98, 99]) == 0
    for name in (0, 1): router.remove(name)
    assert {router.route([i], "kv_producer") for i in range(9)} <= {2, 3, 4}
    for name in (2, 3, 4): router.remove(name)
    with pytest.raises(RuntimeError, match="no replica"): router.route([1], "kv_producer")
    router.add(0)
    assert router.route([1], "kv_consumer") == 0


def test_the_load_is_bounded_for_each_role():
    "A text that everybody asks about does not stay with one consumer, however many producers there are."
    router = RoleRouter(4)
    for name in range(7): router.add(name)
    for _ in range(60): router.route([1], "kv_consumer")
    loads = [router.load[name] for name in range(4, 7)]
    assert sum(loads) == 60 and max(loads) <= 1.25 * 20 + 4 + 1


def test_the_simulation_without_producers_is_the_one_of_routing():
    machine = Machine((.02, .001, .0005, 1e-6, 0))
    for seed in range(3):
        traffic = Traffic(6, 100, seed=seed)
        lines = DisaggregatedSimulation(machine, 0, 3).run(traffic)
        served = list(Simulation(machine, 3, "prefix").run(traffic))
        assert sorted((line.arrival, line.tokens[0], line.tokens[-1]) for line in lines) == sorted((s.arrival, s.first_token, s.end) for s in served)


def test_the_simulation_loses_no_token():
    rng = random.Random(0)
    requests = [Arrival(i * .05, [rng.randrange(5)] * rng.randint(1, 90), rng.randint(1, 20)) for i in range(80)]
    simulation = DisaggregatedSimulation(Machine((.02, .001, 0, 0, 0), num_blocks=30), 2, 2, 1e-4)
    lines = simulation.run(requests)
    assert [len(line.tokens) for line in lines] == [r.output_len for r in requests]
    assert all(line.tokens == sorted(line.tokens) and line.ttft > 0 for line in lines)
    assert not simulation.readers and not simulation.router.num_unfinished
    for replica in simulation.replicas: assert_partition(replica.scheduler.manager)


# ---- with Ray

@pytest.fixture(scope="module", params=list(CONNECTORS))
def llm(ray, tiny, request):  # noqa: F811
    llm = LLM(tiny, data_parallel_size=2, kv_transfer_config=dict(kv_connector=request.param), **LIMITS)
    yield llm
    llm.engine.scheduler.close()


@pytest.fixture()
def apart(llm):
    "The LLM with both its replicas there, the seeds it began with, and nothing of an earlier test in mind; idle afterwards."
    llm.engine.input_processor.random.seed(0)
    wait_for_all(llm)
    fleet = llm.engine.scheduler
    assert len(fleet.actors) == len(fleet.router.load) == 2
    fleet.reset([])
    for name in list(fleet.router.load):
        fleet.router.remove(name)
        fleet.router.add(name)
    yield llm
    assert_idle(llm)
    assert not fleet.handles
    wait_for_all(llm)
    assert_nothing_is_left(llm)


def assert_nothing_is_left(llm):
    def left(replica):      # in an actor, so it must not be a function of this module; aborts are told with the next call, which may be still to come
        for seq in list(replica.sequences.values()): replica.finish(seq, "abort")
        pool = replica.parts.scheduler.manager.pool
        return sorted(pool.free_blocks) == list(range(pool.num_blocks)) and not any(pool.ref_counts)
    fleet = llm.engine.scheduler
    for actor in fleet.actors.values():
        for attempt in range(300):
            try: assert fleet.ray.get(actor.handle.__ray_call__.remote(left))
            except fleet.ray.exceptions.ActorUnavailableError: time.sleep(.1)        # it was killed when it had nothing to do, and is coming back
            else: break
        assert attempt < 299


@pytest.mark.ci
def test_the_fleet_says_what_one_engine_says(apart, alone):  # noqa: F811
    fleet, sent = apart.engine.scheduler, []
    read_report = fleet.read_report
    fleet.read_report = lambda name, report: sent.append(report.sent) or read_report(name, report)
    try:
        assert answers_of(apart.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
        handles = [h for s in sent for h in s.values()]
        assert len(handles) >= 9 and all(handles), "prompts were not computed by the producer"
        sent.clear()
        again = apart.generate(PROMPTS[:4], PARAMS[:4], use_tqdm=False)
        assert not any(sent) and all(out.num_cached_tokens for out in again), "the consumer has them, and is not asked"
    finally: del fleet.read_report
    apart.engine.input_processor.random.seed(0)


def test_streamed_pieces_join(apart, alone): assert streamed(apart) == alone  # noqa: F811


@pytest.mark.ci
@pytest.mark.parametrize("role, at", [(0, 0), (0, 60), (1, 3), (1, 60), (None, 30)])
def test_whoever_is_killed_the_texts_are_the_same(apart, alone, role, at):  # noqa: F811
    def strike(i):
        if i != at: return
        actors = apart.engine.scheduler.actors
        for name in ([role] if role is not None else list(actors)): kill(actors[name].pid)
    assert streamed(apart, strike) == alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_replicas_killed_at_random(apart, alone, seed):  # noqa: F811
    rng = random.Random(seed)
    moments = {rng.randrange(250) for _ in range(3)}
    def strike(i):
        if i in moments and (alive := pids(apart)): kill(rng.choice(alive))
    assert streamed(apart, strike) == alone


def test_a_reader_who_leaves_leaves_nothing(apart):
    for at in (0, 5, 40):
        stream = apart.stream(PROMPTS, PARAMS)
        for _ in range(at + 1): next(stream)
        stream.close()
        assert_idle(apart)


def test_an_interrupt_between_the_roles_loses_no_token(apart, alone):  # noqa: F811
    fleet, left = apart.engine.scheduler, [3]
    update = fleet.update
    def failing(*args):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        return update(*args)
    requests = apart.engine.input_processor.make_requests(PROMPTS, PARAMS)
    fleet.update, interrupts = failing, 0
    try:
        for request in requests: apart.engine.add(request)
        while apart.engine.requests:
            try: apart.engine.step()
            except KeyboardInterrupt:
                interrupts += 1
                left[0] = 5 if interrupts < 4 else 10**9
    finally: del fleet.update
    assert interrupts == 4 and answers_of([r.output() for r in requests]) == alone


@pytest.mark.ci
def test_resizing_to_one_role_and_back(apart, alone):  # noqa: F811
    fleet = apart.engine.scheduler
    def resize(i):
        if i == 20: fleet.resize(1)           # the producer does it all
        if i == 60: fleet.resize(2)
    assert streamed(apart, resize) == alone
    wait_for_all(apart)
    assert sorted(map(fleet.router.role_of, fleet.actors)) == ["kv_consumer", "kv_producer"]


def test_a_producer_that_is_gone_for_good_is_replaced_by_the_others(apart, alone):  # noqa: F811
    "The last test of a connector: Ray is told not to start it again, and consumers compute prompts."
    fleet = apart.engine.scheduler
    def strike(i):
        if i == 0: fleet.ray.kill(fleet.actors[0].handle)
    for _ in range(2):                 # it may have been idle the first time
        apart.engine.input_processor.random.seed(0)
        assert streamed(apart, strike if 0 in fleet.actors else lambda i: None) == alone
    assert list(map(fleet.router.role_of, fleet.actors)) == ["kv_consumer"]
