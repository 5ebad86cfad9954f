"Checks of the exercises of the chapter on latency. Time is simulated: nothing here waits or measures."
import random

from . import WrongAnswer, attempt, exercise, expect, require, show


@exercise
def check_longest_gap(longest_gap):
    for n, tpot in ((64, .05), (2, .3), (3, 1.), (1000, .01)):
        expect(longest_gap, (n, tpot), (n - 1) * tpot,
               f"{n} tokens have {n - 1} gaps, whose mean is {tpot}; all but one may be 0", tolerance=1e-9)


@exercise
def check_what_a_reader_sees(what_a_reader_sees):
    for says, arrival, tokens, wanted in (
            ("four tokens", 10., [12., 13., 17., 18.], (2., 2., 4.)), ("tokens at even distances", 0., [1., 1.5, 2.], (1., .5, .5)),
            ("a single token", 3., [4.], (1., None, None)), ("two tokens at once", 0., [2., 2.], (2., 0., 0.))):
        case = f"what_a_reader_sees({arrival}, {tokens}), {says},"
        got = attempt(case, what_a_reader_sees, arrival, list(tokens))
        require(isinstance(got, (tuple, list)) and len(got) == 3, f"{case} gives {show(got)}, not three numbers")
        for name, value, right in zip(("time to the first token", "time per output token", "longest gap"), got, wanted):
            close = value is None if right is None else value is not None and abs(value - right) < 1e-9
            require(close, f"{case} gives a {name} of {value}, expected {right}",
                    "a single token has no gap" if right is None else "times count from the arrival, gaps from token to token")


@exercise
def check_waits(waits):
    rng = random.Random(0)
    for says, arrivals, seconds in (("requests far apart", [0., 5., 10.], [1., 2., 3.]), ("all at once", [1., 1., 1.], [2., 3., 4.]),
                                    ("one that comes while another is served", [0., .5, 4.], [1., 1., 1.]),
                                    ("a queue that empties", [0., .1, .2, 10., 10.5], [1., 1., 1., 2., 1.]),
                                    ("fifty at random", sorted(rng.uniform(0, 50) for _ in range(50)), [rng.random() * 2 for _ in range(50)])):
        free, wanted = 0., []
        for at, n in zip(arrivals, seconds):
            wanted.append(max(free - at, 0.))
            free = max(free, at) + n
        got, case = attempt(f"waits of {says}", waits, list(arrivals), list(seconds)), f"waits({show(arrivals)}, {show(seconds)}), {says},"
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        got = [float(x) for x in got]
        require(len(got) == len(wanted), f"{case} gives {len(got)} waits for {len(wanted)} requests")
        for i, (a, b) in enumerate(zip(got, wanted)):
            require(abs(a - b) < 1e-6, f"in {case} request {i} waits {a:.3f} s, expected {b:.3f}",
                    "it is served when it is there and all before it are done")


class ToyRequest:
    "A request that is to get so many tokens, one a step."
    def __init__(self, name, wanted): self.name, self.wanted, self.num_generated_tokens = name, wanted, 0
    def __repr__(self): return f"request {self.name}"


class ToyEngine:
    "Takes 0.3 s for a step of any number of requests; there is nothing else that takes time, but sleeping."
    def __init__(self, arrivals):
        self.time, self.requests, self.added, self.due, self.naps = 0., [], {}, arrivals, []

    def clock(self): return self.time

    def sleep(self, seconds):
        require(seconds >= 0, f"at {self.time:.1f} s `sleep({seconds:.1f})` was called")
        require(not self.requests, f"at {self.time:.1f} s `sleep` was called, while {self.requests} are in the engine")
        require(seconds > 0 or len(self.naps) < 1000, "`sleep(0)` was called again and again")
        self.naps.append(seconds)
        self.time += seconds
        if self.time > 1e4: raise WrongAnswer("the loop still sleeps after 10,000 s")

    def add(self, request):
        require(request not in self.added, f"{request} was added twice")
        require(self.time >= self.due[request] - 1e-9, f"{request} was added at {self.time:.1f} s",
                f"it arrives only at {self.due[request]:.1f} s")
        self.added[request] = self.time
        self.requests.append(request)

    def step(self):
        require(self.requests, f"at {self.time:.1f} s `step` was called, and there is nothing to compute: sleep until the next arrival")
        late = [r for r, at in self.due.items() if at <= self.time and r not in self.added]
        require(not late, f"at {self.time:.1f} s a step begins without {late and late[0]}", "it has arrived by then")
        self.time += .3
        for request in self.requests: request.num_generated_tokens += 1
        self.requests = [r for r in self.requests if r.num_generated_tokens < r.wanted]


@exercise
def check_serve(serve):
    for says, plan in (("one request", [(0., 3)]), ("two at once", [(.5, 2), (.5, 4)]), ("one that comes during a step", [(0., 4), (.4, 2)]),
                       ("a pause between two", [(1., 1), (7., 2)]), ("six in a row", [(.2 * i, 3) for i in range(6)])):
        requests = [ToyRequest(i, wanted) for i, (_, wanted) in enumerate(plan)]
        engine = ToyEngine({r: at for r, (at, _) in zip(requests, plan)})
        case = f"serve, with {says},"
        got = attempt(case, serve, engine, list(requests), [at for at, _ in plan], engine.clock, engine.sleep)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        unserved = [r for r in requests if r.num_generated_tokens < r.wanted]
        require(not unserved, f"{case} ends before {unserved and unserved[0]} has all of its tokens")
        require(engine.time < plan[-1][0] + 20, f"{case} takes {engine.time:.1f} s")
        for request, times in zip(requests, got, strict=True):
            added = engine.added[request]
            wanted = [added + .3 * (i + 1) for i in range(request.wanted)]
            require(len(times) == len(wanted), f"{case} has {len(times)} times for the {len(wanted)} tokens of {request}")
            for i, (a, b) in enumerate(zip(times, wanted)):
                require(abs(a - b) < 1e-6, f"{case} says that token {i} of {request} was there at {a:.2f} s, expected {b:.2f}",
                        "read the clock after the step")
