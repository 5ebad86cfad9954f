"""A day of a thousand replicas: a million simulated requests for each rule of the router. Chapter 45 draws what it stores.

`NANO_VLLM_RECORD=1 python tools/simulate_fleet.py` takes some minutes for each rule, on one idle core, and a few GB. With `--replicas 100`
all is a tenth: replicas, requests, requests a second, and texts."""
import argparse
import gc
import time

import numpy as np
from nano_vllm.routing import Machine, Simulation, Traffic, summarize
from nano_vllm.workbench import record, recorded

DAY, SWING, TENTHS = 1000 / 3, 0.5, 10     # a day has so many seconds, so that 3 requests a second are 1,000 for each replica


def simulate_day(machine, num_replicas, rule, traffic):
    "The figures of one day, and the mean TTFT of the requests that came in each tenth of it."
    gc.collect()
    gc.disable()                 # there are no cycles, and looking for them among millions of objects takes long
    start = time.perf_counter()
    simulation = Simulation(machine, num_replicas, rule)
    served = list(simulation.run(traffic))
    seconds = time.perf_counter() - start
    gc.enable()
    tenth = [min(TENTHS - 1, int(TENTHS * s.arrival / traffic.period)) for s in served]
    ttft = [1e3 * float(np.mean([s.ttft for s, t in zip(served, tenth) if t == i])) for i in range(TENTHS)]
    return dict(summarize(served, simulation), ttft_by_tenth=ttft, wall_seconds=seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1000)
    n = parser.parse_args().replicas
    machine = Machine(tuple(recorded("step-costs")[0]["data"]["costs"]))
    traffic = Traffic(3.0 * n, 1000 * n, num_prefixes=20 * n, swing=SWING, period=DAY)
    rates = [traffic.rate_at((i + .5) * traffic.period / TENTHS) for i in range(TENTHS)]
    runs = {}
    for rule in ("prefix", "round_robin"):
        runs[rule] = simulate_day(machine, n, rule, traffic)
        print(rule, {k: v for k, v in runs[rule].items() if k != "ttft_by_tenth"}, flush=True)
        record("fleet-day", dict(num_replicas=n, num_prefixes=traffic.num_prefixes, num_blocks=machine.num_blocks, costs=machine.costs, rules=runs, rate_by_tenth=rates))


if __name__ == "__main__": main()
