"""The router against one that asks every replica, the simulation against hand and engine, and what a plan is to say."""
import math
import random
from collections import Counter

import pytest
from nano_vllm import LLM, SamplingParams
from nano_vllm.kv_blocks import ScheduledSequence, SchedulerOutput, Sequence
from nano_vllm.prefix_cache import hash_blocks
from nano_vllm.routing import (BOUND, FEATURES, RULES, SLACK, Arrival, Machine, Router, Simulation, StepWatch, Traffic, features, fit_costs,
                               replicas_needed, simulate)
from nano_vllm.scheduler import check_fits

TOY = Machine((5, 1, 0, 0, 0))


class SlowRouter:
    "The prefix rule without an index: looks at every replica's list of blocks."
    def __init__(self, num_blocks): self.num_blocks, self.load, self.known, self.last, self.now = num_blocks, {}, {}, {}, 0

    def add(self, name): self.load[name], self.known[name], self.last[name] = 0, [], self.tick()

    def tick(self):
        self.now += 1
        return self.now

    def choose(self, hashes):
        limit = BOUND * sum(self.load.values()) / len(self.load) + SLACK
        def cached(name): return max((i + 1 for i, h in enumerate(hashes) if h in self.known[name]), default=0)
        able = {n for n in self.load if self.load[n] <= limit and cached(n)} or set(self.load)
        most = max(map(cached, able)) if able != set(self.load) or any(cached(n) and self.load[n] <= limit for n in able) else 0
        best = [n for n in able if cached(n) == most] if most else list(able)
        return {n for n in best if self.load[n] == min(self.load[m] for m in best)}

    def note(self, name, hashes):
        self.load[name] += 1
        self.last[name] = self.tick()
        for h in reversed(hashes):
            if h in self.known[name]: self.known[name].remove(h)
            self.known[name].append(h)
        del self.known[name][:max(0, len(self.known[name]) - self.num_blocks)]


@pytest.mark.parametrize("seed", range(20))
def test_prefix_rule_equals_a_look_at_every_replica(seed):
    rng, fast, slow, out = random.Random(seed), Router("prefix", 12), SlowRouter(12), []
    for name in "ABC":
        fast.add(name)
        slow.add(name)
    for i in range(200):
        if rng.random() < .03 and len(fast.load) > 1:
            gone = rng.choice(list(fast.load))
            fast.remove(gone)
            for d in (slow.load, slow.known, slow.last): del d[gone]
            out = [name for name in out if name != gone]
        if rng.random() < .05 and len(fast.load) < 4:
            fast.add(i)
            slow.add(i)
        text = rng.randrange(4)
        hashes = [100 * text + k for k in range(rng.randint(0, 6))]
        allowed = slow.choose(hashes)
        name = fast.route(hashes)
        assert name in allowed
        slow.note(name, hashes)
        out.append(name)
        for _ in range(rng.randint(0, 2)):
            if out and rng.random() < .5:
                done = out.pop(rng.randrange(len(out)))
                fast.finished(done)
                slow.load[done] -= 1
        assert dict(fast.load) == slow.load and {n: list(k) for n, k in fast.known.items()} == slow.known
        assert fast.num_unfinished == sum(slow.load.values())
        assert fast.holders == {h: dict.fromkeys(n for n in slow.known if h in slow.known[n]) for k in slow.known.values() for h in k}


def test_a_popular_prefix_spreads_and_the_load_stays_bounded():
    router, rng = Router("prefix"), random.Random(0)
    for name in range(10): router.add(name)
    for i in range(1000):
        name = router.route([1, 2, 3, 100 + i])
        assert router.load[name] <= BOUND * router.num_unfinished / 10 + SLACK + 1
        if router.num_unfinished > 100: router.finished(rng.choice([n for n, k in router.load.items() if k]))
    assert len(router.holders[1]) * (BOUND * 10 + SLACK + 1) >= 100       # as many as are needed, at least


@pytest.mark.parametrize("rule, wanted", [("round_robin", "ABCABC"), ("least_loaded", "ABCABC")])
def test_turns(rule, wanted):
    router = Router(rule)
    for name in "ABC": router.add(name)
    assert "".join(router.route([1]) for _ in range(6)) == wanted


def test_bad_rules_and_no_replicas():
    with pytest.raises(ValueError, match="rule must be one of .*prefix.*got 'best'"): Router("best")
    router = Router()
    router.add("A")
    router.remove("A")
    router.finished("A")         # comes too late, and is nobody's business any more
    with pytest.raises(RuntimeError, match="no replica"): router.route([])


def test_a_router_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="num_blocks must be an integer of at least 1, got -1"): Router("prefix", -1)
    router = Router()
    router.add("A")
    router.route([1])
    with pytest.raises(ValueError, match="there is a replica 'A' already"): router.add("A")
    assert router.load == {"A": 1} and router.holders == {1: {"A": None}}      # its notes are still there


@pytest.mark.parametrize("prompt_len, output_len, words", [
    (60, 6, "60 prompt tokens and max_tokens=6 need 5 KV blocks, but num_kv_blocks is 4"), (65, 1, "need 5 KV blocks"),
    (10, 0, "output_len must be an integer of at least 1, got 0")])
def test_a_request_that_can_never_end_is_refused_and_disturbs_nobody(prompt_len, output_len, words):
    simulation = Simulation(Machine(TOY.costs, num_blocks=4), 1)
    with pytest.raises(ValueError, match=words): simulation.arrive(Arrival(0, [1] * prompt_len, output_len))
    assert not simulation.router.num_unfinished and not simulation.router.holders
    served, = simulation.run([Arrival(1, [1] * 60, 5)])       # all four blocks
    assert served.num_output == 5


@pytest.mark.parametrize("make, words", [
    (lambda: Machine((1, 0)), "costs must be 5, got 2"), (lambda: Machine((1, 0, 0, 0, -1)), "costs must be a number of at least 0, got -1"),
    (lambda: Machine((1, 0, 0, 0, math.nan)), "costs must be a number"), (lambda: Machine(TOY.costs, block_size=0), "block_size must be an integer"),
    (lambda: Machine(TOY.costs, max_num_seqs=0), "max_num_seqs must be"), (lambda: Traffic(0), "request_rate must be a number from"),
    (lambda: Traffic(-1), "request_rate must be"), (lambda: Traffic(1, num_requests=0), "num_requests must be"), (lambda: Traffic(1, num_prefixes=0), "num_prefixes"),
    (lambda: Traffic(1, prefix_len=-1), "prefix_len must be"), (lambda: Traffic(1, swing=1.5), "swing must be a number from 0 to 1, got 1.5"),
    (lambda: Traffic(1, period=0), "period must be"), (lambda: Traffic(1, question_len=(9, 3)), "question_len must be an integer from 1 to 3, got 9"),
    (lambda: Traffic(1, output_len=(0, 3)), "output_len must be an integer from 1 to 3, got 0"), (lambda: simulate(TOY, 1, "prefix", []), "no request to describe"),
    (lambda: fit_costs([]), "steps must be at least one"), (lambda: fit_costs([((1, 2, 3, 4, 5), 0.0)]), "each of more than 0 seconds")])
def test_numbers_that_cannot_be_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_a_simulated_step_by_hand():
    a, b = Simulation(TOY, 1).run([Arrival(0, [1] * 10, 2), Arrival(1, [2] * 3, 1)])
    assert (a.first_token, a.end, b.first_token, b.end) == (15, 24, 24, 24)
    assert (a.num_prompt, a.num_output, a.num_cached, b.num_output) == (10, 2, 0, 1)


@pytest.mark.parametrize("rule", ["round_robin", "least_loaded", "prefix"])
@pytest.mark.parametrize("num_blocks", [20, 1000])
def test_every_request_is_served_once_and_nothing_is_left(rule, num_blocks):
    traffic = list(Traffic(20, 300, num_prefixes=5, prefix_len=100, output_len=(1, 40)))
    simulation = Simulation(Machine((.01, .0005, 0, 1e-6, 0), num_blocks=num_blocks, max_num_seqs=8, max_num_batched_tokens=256), 3, rule)
    served = list(simulation.run(traffic))
    key = Counter((a.time, len(a.prompt), a.output_len) for a in traffic)
    assert Counter((s.arrival, s.num_prompt, s.num_output) for s in served) == key
    assert all(s.arrival < s.first_token <= s.end for s in served)
    assert [s.end for s in served] == sorted(s.end for s in served)
    assert not simulation.under_way and not simulation.ends and not any(simulation.router.load.values())
    for replica in simulation.replicas:
        assert len(replica.scheduler.manager.pool.free_blocks) == num_blocks and not replica.scheduler.running
    if num_blocks == 20: assert sum(r.scheduler.num_preemptions for r in simulation.replicas) > 0
    check_fits(max(len(a.prompt) for a in traffic), 40, 1000, 20, 16)     # so that all could end


def test_the_simulation_schedules_as_the_engine_does(tiny):
    "The same prompts before the same steps: the same tokens, sequences and keys in each step, cache hits and preemptions included."
    llm = LLM(tiny, max_model_len=256, num_kv_blocks=12, max_num_batched_tokens=64, max_num_seqs=4, device="cpu")
    engine, prompts = llm.engine, [a.prompt for a in Traffic(1, 20, num_prefixes=2, prefix_len=64, seed=3)]
    engine.scheduler = watch = StepWatch(engine.scheduler)
    requests = engine.input_processor.make_requests(prompts, SamplingParams(max_tokens=30, ignore_eos=True, temperature=0))
    simulation = Simulation(Machine((1, 0, 0, 0, 0), num_blocks=12, max_num_seqs=4, max_num_batched_tokens=64), 1)
    simulated, coming = [], list(zip(requests, prompts))
    replica = simulation.replicas[0]
    while coming or engine.requests:
        for request, prompt in [coming.pop(0)] if coming else []:
            engine.add(request)
            replica.scheduler.add(Sequence("", prompt, SamplingParams(), max_len=len(prompt) + 30))
        engine.step()
        assert replica.begin() == 1
        simulated.append(features(replica.step))
        replica.end()
    assert [f for f, _ in watch.steps] == simulated and all(seconds > 0 for _, seconds in watch.steps)
    assert replica.begin() is None and replica.scheduler.num_preemptions == engine.scheduler.num_preemptions > 0


def test_costs_are_found_again_and_none_is_negative():
    rng, true = random.Random(0), (.02, .001, .0005, 1e-6, 2e-8)
    steps = [(1, n := rng.randint(1, 500), rng.randint(1, 9), rng.randint(n, 9999), rng.randint(n, 10**5)) for _ in range(300)]
    def seconds(f): return sum(a * b for a, b in zip(f, true))
    assert fit_costs([(f, seconds(f)) for f in steps]) == pytest.approx(true, rel=1e-6)
    noisy = fit_costs([(f, seconds(f) * rng.uniform(.9, 1.1) - 1e-7 * f[3]) for f in steps])
    assert min(noisy) >= 0 and len(noisy) == len(FEATURES)


def test_traffic_is_what_it_says():
    traffic = Traffic(50, 5000, num_prefixes=4, zipf=1, swing=.5, period=100, seed=1)
    arrivals = list(traffic)
    assert arrivals == list(traffic) and len(arrivals) == 5000
    assert all(a.time < b.time for a, b in zip(arrivals, arrivals[1:]))
    assert all(528 <= len(a.prompt) <= 576 and 16 <= a.output_len <= 64 for a in arrivals)
    counts = Counter(a.prompt[0] for a in arrivals)
    for k in range(1, 5):          # within four standard deviations
        share = 1 / k / sum(1 / j for j in range(1, 5))
        assert abs(counts[k] / 5000 - share) < 4 * (share * (1 - share) / 5000)**.5
    busy = sum(25 <= a.time % 100 < 75 for a in arrivals if a.time < 100)    # 1/2 + swing/pi of a day's requests
    day, share = sum(a.time < 100 for a in arrivals), .5 + .5 / math.pi
    assert abs(busy / day - share) < 4 * (share * (1 - share) / day)**.5
    assert traffic.rate_at(0) == 25 and traffic.rate_at(50) == 75


def test_the_rules_differ_as_the_caches_say():
    "Room for three of eight documents each: in turn 3/8 are found, by prefix nearly all."
    room = Machine((.02, .001, 0, 0, 0), num_blocks=3 * 32 + 24)
    found = {rule: simulate(room, 4, rule, Traffic(8, 800, zipf=0))["hit_rate"] for rule in ("round_robin", "prefix")}
    share = 512 / 552
    assert abs(found["round_robin"] / (share * 3 / 8) - 1) < .25 and found["prefix"] > .85 * share


def test_a_plan_is_the_fewest_that_are_enough():
    machine, traffic = Machine((.02, .001, 0, 0, 0)), Traffic(20, 300, num_prefixes=10)
    n, run = replicas_needed(machine, traffic, 700, "prefix")
    assert run == simulate(machine, n, "prefix", traffic) and run["p99_ttft_ms"] <= 700
    assert n > 1 and simulate(machine, n - 1, "prefix", traffic)["p99_ttft_ms"] > 700
    with pytest.raises(ValueError, match="p99_ttft_ms must be more than 10: 8 replicas need"):
        replicas_needed(machine, traffic, 10, "prefix", most=8)


def test_hashes_are_those_of_the_cache():
    "The router and the prefix cache speak of the same blocks."
    seq = Sequence("", list(range(40)), SamplingParams())
    simulation = Simulation(Machine((1, 0, 0, 0, 0), num_blocks=10), 1)
    list(simulation.run([Arrival(0, list(range(40)), 1)]))
    assert set(hash_blocks(seq, 16)) == set(simulation.router.known[0]) == set(simulation.replicas[0].scheduler.manager.cache.block_of)
    assert "longest" not in RULES


def test_features_by_hand():
    "Two sequences: one reads 30 keys for a token, the other compares 10 tokens with each other."
    reader, prompt = Sequence("r", [7] * 30, SamplingParams()), Sequence("p", [7] * 10, SamplingParams())
    step = SchedulerOutput((ScheduledSequence(reader, 29, 1, True), ScheduledSequence(prompt, 0, 10, True)))
    assert features(step) == (1, 11, 2, 30 + 10, 30 + 55)


def test_what_was_found_is_noted_at_the_first_admission():
    "One of two is preempted, and then finds what it had computed itself: that was not in the cache when it came."
    machine = Machine((1, 0, 0, 0, 0), num_blocks=6, block_size=4)
    simulation = Simulation(machine, 1)
    served = list(simulation.run([Arrival(0, [1] * 8, 9), Arrival(0, [2] * 8, 9)]))
    assert simulation.replicas[0].scheduler.num_preemptions > 0 and [s.num_cached for s in served] == [0, 0]
