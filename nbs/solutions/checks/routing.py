"Checks of the exercises of the chapter on routing."
import random

from nano_vllm.routing import Router

from . import attempt, exercise, expect, require, show


@exercise
def check_expected_hit_rate(expected_hit_rate):
    for texts, replicas, room, spread in ((8, 4, 3, False), (8, 4, 3, True), (100, 10, 5, True), (100, 10, 5, False), (4, 2, 9, False), (4, 2, 9, True)):
        seen = texts / replicas if spread else texts
        kind = "each text has a place" if spread else "in turn"
        expect(expected_hit_rate, (texts, replicas, room, spread), min(1, room / seen),
               f"{kind}, so a replica is asked for {seen:g} texts and has room for {room}", tolerance=1e-9)


def work(router, name, hashes, tokens_per_request, block_size):
    known = 0
    while known < len(hashes) and hashes[known] in router.known[name]: known += 1
    return router.load[name] * tokens_per_request + (len(hashes) - known) * block_size


def book(router):
    "All that a router notes, orders included."
    holders = {hash: list(names) for hash, names in router.holders.items()}
    return list(router.load.items()), router.num_unfinished, {name: list(known) for name, known in router.known.items()}, holders


@exercise
def check_weighted_rule(least_work):
    rng = random.Random(0)
    for case in range(200):
        router = Router("round_robin", num_blocks=12)
        for name in "XYZ": router.add(name)
        for _ in range(rng.randint(0, 12)):
            start = rng.choice([1, 1, 2])
            name = router.route([10 * start + i for i in range(rng.randint(1, 9))])
            if rng.random() < .5: router.finished(name)
        hashes = [10 * rng.choice([1, 2]) + i for i in range(rng.randint(0, 9))]
        given = rng.choice([(100, 16), (20, 16), (0, 8)])
        sums = {name: work(router, name, hashes, *given) for name in router.load}
        wanted = min(router.load, key=sums.get)
        before = book(router)
        got = attempt(f"case {case}, a router with the loads {dict(router.load)}", least_work, router, list(hashes), *given)
        require(isinstance(got, str), f"case {case}: you choose {show(got)}, expected a name of `router.load`, {wanted!r}")
        require(got == wanted, f"case {case}: the sums are {sums}, and you choose {got!r}, expected {wanted!r}",
                "of equal sums the first in `router.load` is wanted" if got in sums and sums[got] == sums[wanted]
                else f"load, times {given[0]}, and {given[1]} for each block up to the end that the replica has not from the beginning on")
        require(before == book(router), f"case {case}: the rule changes the router", "it is only to choose; `route` keeps the book")


def first_tokens(requests, step, token):
    now, coming, running, first = 0, list(range(len(requests))), {}, [None] * len(requests)
    while coming or running:
        if not running: now = max(now, requests[coming[0]][0])
        tokens = len(running)
        while coming and requests[coming[0]][0] <= now:
            i = coming.pop(0)
            running[i] = requests[i][2]
            tokens += requests[i][1]
        now += step + token * tokens
        for i in list(running):
            if first[i] is None: first[i] = now
            running[i] -= 1
            if not running[i]: del running[i]
    return first


@exercise
def check_simulate_one(answer):
    cases = [([(0, 10, 1)], 5, 1), ([(3, 10, 2)], 5, 1), ([(0, 10, 2), (1, 3, 1)], 5, 1), ([(0, 4, 1), (100, 4, 1)], 2, 1),
             ([(0, 4, 3), (0, 6, 1), (7, 2, 2)], 2, 1), ([(0, 1, 2), (3, 1, 1)], 2, 1)]
    rng = random.Random(0)
    for _ in range(50):
        arrivals = sorted(rng.randint(0, 60) for _ in range(rng.randint(1, 8)))
        cases.append(([(at, rng.randint(1, 9), rng.randint(1, 4)) for at in arrivals], rng.randint(1, 5), rng.randint(0, 2)))
    for case in cases:
        expect(answer, case, first_tokens(*case), "who arrives during a step, or at its end, takes part in the next; "
               "an idle replica begins when somebody comes; an answer's last token ends it", tolerance=1e-9)
