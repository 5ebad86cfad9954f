"""The scheduler's lab: the engine's scheduler and blocks, and made-up tokens.

The page hands this file to Python in the browser; the tests import it as it is.
"""
from collections import Counter

from nano_vllm.kv_blocks import Sequence
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampling_params import SamplingParams
from nano_vllm.scheduler import Scheduler, check_fits

MAX_STEPS = 400
MAX_LEN = 1000          # tokens of a request, so that a page never computes for long


def make_sequence(index, request):
    "A sequence whose first `shared` tokens are everyone's, the others its own."
    prompt, shared = request["prompt"], min(request["shared"], request["prompt"])
    own = 10_000 * (index + 1)
    tokens = [*range(shared), *range(own, own + prompt - shared)]
    return Sequence(request["name"], tokens, SamplingParams(),
                    max_len=prompt + request["output"])


def check(settings, requests):
    "Raise ValueError, with the name of the request, for what could never finish."
    names = Counter(r["name"] for r in requests)
    for r in requests:
        if names[r["name"]] > 1:
            raise ValueError(f"two requests are called {r['name']!r}")
        try:
            check_fits(r["prompt"], r["output"], MAX_LEN,
                       settings["num_blocks"], settings["block_size"])
        except ValueError as error:
            raise ValueError(f"request {r['name']}: {error}") from error


def make_scheduler(settings):
    manager = KVCacheManager(settings["num_blocks"], settings["block_size"])
    return Scheduler(manager, settings["max_num_seqs"],
                     settings["max_num_batched_tokens"],
                     settings["long_prefill_token_threshold"])


def made_up_token(seq):
    "What the model would say: a token that no other text has at this place."
    return -1 - seq.prompt_token_ids[-1] * MAX_LEN - len(seq.output_token_ids)


def receive(scheduler, output):
    "Book a step, and end the sequences that are as long as they may get."
    scheduler.update(output, [made_up_token(s.seq) for s in output.sampled])
    ended = [s.seq for s in output.sampled if s.seq.num_tokens == s.seq.max_len]
    for seq in ended: scheduler.finish(seq, "length")
    return ended


def count_blocks(manager):
    "Blocks that are held, free but findable, and free."
    free = manager.pool.free_blocks
    found = sum(manager.cache.entries[b] is not None for b in free)
    return dict(used=manager.pool.num_blocks - len(free), found=found,
                free=len(free) - found)


def scheduled_cell(s, admitted):
    "What a step does for a sequence: so many tokens, and how many were found cached."
    decode = s.start >= len(s.seq.prompt_token_ids)
    return dict(state="decode" if decode else "prompt", start=s.start,
                tokens=s.num_tokens, samples=s.samples,
                cached=s.start if admitted else 0)


def resting_cell(seq, scheduler, has_run):
    "The state of a sequence that gets nothing in this step."
    if seq.finish_reason: return dict(state="finished")
    if seq in scheduler.running: return dict(state="idle")
    return dict(state="preempted" if seq in has_run else "waiting")


def steps(scheduler, arrivals):
    "Step after step: (what was scheduled, cells by name, blocks, who ended)."
    present, has_run = [], set()
    for step in range(MAX_STEPS):
        for seq in arrivals.get(step, ()):
            present.append(seq)
            scheduler.add(seq)
        output = scheduler.schedule()
        has_run.update(s.seq for s in output.scheduled)
        cells = {seq.request_id: resting_cell(seq, scheduler, has_run)
                 for seq in present}
        for s in output.scheduled:
            cells[s.seq.request_id] = scheduled_cell(s, s in output.admitted)
        blocks = count_blocks(scheduler.manager)
        yield output, cells, blocks, receive(scheduler, output)
        is_idle = not (scheduler.waiting or scheduler.running)
        if is_idle and step >= max(arrivals): return
    raise ValueError(f"this takes more than {MAX_STEPS} steps")


def note_losses(cells, before):
    "Mark the cells of those that gave their blocks back in this step."
    for name, cell in cells.items():
        cell["lost"] = cell["state"] == "preempted" and before.get(name) != "preempted"
        before[name] = cell["state"]


def summarize(report):
    "When each request got its first token, ended, lost its blocks; what it found."
    found = dict(first_token={}, end={}, preempted={}, cached={})
    for i, step in enumerate(report):
        for name, cell in step["cells"].items():
            if cell.get("samples"): found["first_token"].setdefault(name, i)
            if cell.get("cached"): found["cached"].setdefault(name, cell["cached"])
            if cell["lost"]: found["preempted"].setdefault(name, i)
        found["end"] |= {name: i for name in step["ended"]}
    return found


def run(settings, requests):
    "The whole schedule, as a page draws it."
    check(settings, requests)
    scheduler, arrivals = make_scheduler(settings), {}
    for i, request in enumerate(requests):
        arrivals.setdefault(request["arrival"], []).append(make_sequence(i, request))
    report, before = [], {}
    for output, cells, blocks, ended in steps(scheduler, arrivals):
        note_losses(cells, before)
        report.append(dict(cells=cells, **blocks,
                           num_tokens=sum(s.num_tokens for s in output.scheduled),
                           ended=[seq.request_id for seq in ended]))
    return dict(steps=report, **summarize(report),
                computed=sum(step["num_tokens"] for step in report),
                preemptions=scheduler.num_preemptions)
