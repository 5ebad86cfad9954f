"""A day of a thousand replicas: a million simulated requests for each rule of the router. Chapter 33 draws what it stores.

`NANO_VLLM_RECORD=1 python tools/simulate_fleet.py` takes some minutes for each rule, on one core, and a few GB; `--num-requests` makes it shorter."""
import argparse
import gc
import time

import numpy as np
from nano_vllm.routing import Machine, Simulation, Traffic, summarize
from nano_vllm.workbench import record, recorded

REPLICAS, RATE, SWING, TENTHS = 1000, 3000.0, 0.5, 10


def simulate_day(machine, rule, traffic):
    "The figures of one day, and the mean TTFT of the requests that came in each tenth of it."
    gc.collect()
    gc.disable()                 # there are no cycles, and looking for them among millions of objects takes long
    start = time.perf_counter()
    simulation = Simulation(machine, REPLICAS, rule)
    served = list(simulation.run(traffic))
    seconds = time.perf_counter() - start
    gc.enable()
    tenth = [min(TENTHS - 1, int(TENTHS * s.arrival / traffic.period)) for s in served]
    ttft = [1e3 * float(np.mean([s.ttft for s, t in zip(served, tenth) if t == i])) for i in range(TENTHS)]
    return dict(summarize(served, simulation), ttft_by_tenth=ttft, routing_seconds=simulation.routing_seconds, wall_seconds=seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-requests", type=int, default=10**6)
    n = parser.parse_args().num_requests
    machine = Machine(tuple(recorded("step-costs")[0]["data"]["costs"]))
    traffic = Traffic(RATE, n, num_prefixes=20_000, swing=SWING, period=n / RATE)
    rates = [traffic.rate_at((i + .5) * traffic.period / TENTHS) for i in range(TENTHS)]
    runs = {}
    for rule in ("prefix", "least_loaded", "round_robin"):
        runs[rule] = simulate_day(machine, rule, traffic)
        print(rule, {k: v for k, v in runs[rule].items() if k != "ttft_by_tenth"}, flush=True)
    record("fleet-day", dict(num_replicas=REPLICAS, num_blocks=machine.num_blocks, rules=runs, rate_by_tenth=rates))


if __name__ == "__main__": main()
