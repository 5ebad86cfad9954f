"""Several engines as one: the same tokens whoever computes them, and whichever of them is killed; a clear error where nobody is left.

One local Ray cluster for the whole file. The replicas are small random models."""
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers import rounding_tolerance, tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.engine_args import EngineArgs
from nano_vllm.kv_blocks import Sequence
from nano_vllm.llm import new_outputs
from nano_vllm import cli, replicas
from nano_vllm.replicas import Replica, key_of
from nano_vllm.routing import FEATURES, RULES

ROOT = Path(__file__).parent.parent
LIMITS = dict(max_model_len=256, num_kv_blocks=200, device="cpu")
PROMPTS = [[7 + i, 8, 9, 10 + i] * (5 + i) for i in range(10)]
PARAMS = [SamplingParams(temperature=.9, seed=i, max_tokens=20 + 2 * i, ignore_eos=True) for i in range(6)]
PARAMS += [SamplingParams(temperature=.9, max_tokens=40, n=3), SamplingParams(temperature=.8, seed=3, max_tokens=60, stop=["e", "th"]),
           SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1), SamplingParams(temperature=.9, seed=1, max_tokens=30, stop_token_ids=list(range(5000)))]


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=2**27, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tiny):
    "What one engine says."
    return answers_of(LLM(tiny, **LIMITS).generate(PROMPTS, PARAMS, use_tqdm=False))


def wait_for_all(llm, seconds=60):
    "Until no replica is starting any more."
    deadline, fleet = time.monotonic() + seconds, llm.engine.scheduler
    while any(a.starting for a in fleet.actors.values()) and time.monotonic() < deadline: fleet.hear()


@pytest.fixture(scope="module")
def llm(ray, tiny):
    llm = LLM(tiny, data_parallel_size=2, **LIMITS)
    yield llm
    llm.engine.scheduler.close()


@pytest.fixture()
def both(llm):
    "The LLM with both its replicas there and the seeds it began with."
    llm.engine.input_processor.random.seed(0)
    fleet = llm.engine.scheduler
    wait_for_all(llm)
    assert len(fleet.actors) == len(fleet.router.load) == 2
    yield llm
    assert_idle(llm)


def rated(entries):
    "Log-probabilities that are equal if they differ by rounding only: what is computed again is computed in other company."
    close = rounding_tolerance(1000, 20)       # a thousand terms of up to 20, the largest logits
    return entries and [e and {t: (pytest.approx(p.logprob, abs=close), p.rank, p.decoded_token) for t, p in e.items()} for e in entries]


def answers_of(outs):
    return [(out.prompt_token_ids, rated(out.prompt_logprobs), [(o.text, o.token_ids, o.finish_reason, o.stop_reason, rated(o.logprobs))
                                                               for o in out.outputs]) for out in outs]


def assert_idle(llm):
    engine = llm.engine
    fleet = engine.scheduler
    assert not engine.requests and not engine.in_flight and not fleet.waiting and not fleet.homes
    assert all(not a.sequences and not a.added for a in fleet.actors.values()) and not any(fleet.router.load.values())


def streamed(llm, on_piece=lambda i: None):
    "The answers, joined from their pieces, with `on_piece(i)` called after the i-th."
    requests = llm.engine.input_processor.make_requests(PROMPTS, PARAMS)
    ids = {r.request_id: [[] for _ in r.completions] for r in requests}
    texts = {r.request_id: [""] * len(r.completions) for r in requests}
    for i, piece in enumerate(new_outputs(llm.engine, requests)):
        for o in piece.outputs:
            ids[piece.request_id][o.index] += o.token_ids
            texts[piece.request_id][o.index] += o.text
        on_piece(i)
    whole = answers_of([r.output() for r in requests])
    assert [[o[:2] for o in answer] for *_, answer in whole] == [list(zip(texts[r.request_id], ids[r.request_id])) for r in requests]
    return whole


def pids(llm): return [a.pid for a in llm.engine.scheduler.actors.values() if a.pid and not a.starting]


def kill(pid):
    "End a process that may have ended already."
    if psutil.pid_exists(pid): os.kill(pid, signal.SIGKILL)


# ---- without Ray

def test_a_replica_alone_gives_the_engines_tokens(tiny, alone):
    "The half of an engine that runs in an actor, called from here; ends by text are the other half's business."
    replica = Replica(EngineArgs(tiny, **LIMITS))
    seqs = [Sequence(str(i), p, q, seed=i, max_len=len(p) + q.max_tokens) for i, (p, q) in enumerate(zip(PROMPTS[:6], PARAMS))]
    got, added, aborted = {key_of(s): [] for s in seqs}, [Sequence(**vars(s)) for s in seqs], []
    while added or replica.sequences:
        report = replica.step(added, aborted)
        added, sampled = [], [key for key, *_, samples in report.scheduled if samples]
        for key, token in zip(sampled, report.token_ids, strict=True): got[key].append(token)
    assert [got[key_of(s)] for s in seqs] == [answer[0][1] for *_, answer in alone[:6]]
    pool = replica.parts.scheduler.manager.pool
    assert len(pool.free_blocks) == pool.num_blocks and not replica.in_flight
    replica.step([Sequence("x", [5] * 40, PARAMS[0], max_len=60)], [])
    replica.step([], [("x", 0), ("unknown", 0)])
    assert len(pool.free_blocks) == pool.num_blocks and not replica.sequences


def test_a_continuation_says_what_was_to_come(tiny, alone):
    "A sequence that comes with the tokens it has goes on as if nothing had happened: noise is keyed by seed and number of tokens."
    (_, _, [(_, ids, *_)]), p = alone[5], PARAMS[5]
    for have in (1, 7, len(ids) - 1):
        replica = Replica(EngineArgs(tiny, **LIMITS))
        seq, rest = Sequence("a", PROMPTS[5], p, seed=5, max_len=len(PROMPTS[5]) + p.max_tokens, output_token_ids=ids[:have]), []
        report = replica.step([seq], [])
        while replica.sequences or report.token_ids:
            rest += report.token_ids
            report = replica.step([], [])
        assert ids[:have] + rest == ids


def test_without_ray_the_error_names_the_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)          # importing it fails
    LLM(tiny, **LIMITS)
    with pytest.raises((ValueError, ModuleNotFoundError)) as told: LLM(tiny, data_parallel_size=2, **LIMITS)
    assert isinstance(told.value, ValueError) and "data_parallel_size must be 1 without Ray" in str(told.value) and "nano_vllm[ray]" in str(told.value)
    with pytest.raises(ValueError, match="data_parallel_size must be an integer"): LLM(tiny, data_parallel_size=0, **LIMITS)


def test_bench_plan_measures_prints_and_writes_the_answer(tiny, tmp_path, capsys):
    args = ["bench", "plan", "--model", str(tiny), "--device", "cpu", "--max-model-len", "200", "--num-kv-blocks", "100"]
    traffic = ["--request-rate", "300", "--num-requests", "200", "--num-prefixes", "5", "--prefix-len", "64", "--question-len", "8", "--output-len", "8"]
    assert cli.main([*args, *traffic, "--p99-ttft-ms", "2000", "--output-json", str(tmp_path/"plan.json")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path/"plan.json").read_text()) == answer
    assert set(answer) == {"costs", *RULES} and list(answer["costs"]) == list(FEATURES) and sum(answer["costs"].values()) > 0
    for rule in RULES: assert answer[rule]["replicas"] >= 1 and answer[rule]["p99_ttft_ms"] <= 2000 and answer[rule]["num_requests"] == 200
    for bad, what in (("--num-prefixes", "num_prefixes"), ("--p99-ttft-ms", "p99_ttft_ms"), ("--request-rate", "request_rate")):
        assert cli.main([*args, bad, "-1"]) == 2 and what in capsys.readouterr().err
    assert cli.main([*args, "--prefix-len", "5000"]) == 2          # no replica ever has room for one
    assert "prefix_len + question_len + output_len must be an integer from 1 to 1600, got 5128" in capsys.readouterr().err


def test_the_steps_of_several_are_not_those_of_a_machine(tiny):
    llm = LLM(tiny, **LIMITS)
    llm.engine.config = replace(llm.engine.config, args=replace(llm.engine.config.args, data_parallel_size=2))
    with pytest.raises(ValueError, match="data_parallel_size must be left out to measure one machine, got 2"): replicas.measure_machine(llm)


# ---- with Ray

def test_two_replicas_say_what_one_engine_says(both, alone):
    outs = both.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert answers_of(outs) == alone
    assert streamed_again(both) == alone
    homes = both.engine.scheduler.router.known
    assert all(homes.values()), "a replica had nothing to do"
    again = both.generate(PROMPTS[6:], PARAMS[:4], use_tqdm=False)
    assert all(out.num_cached_tokens > 0 for out in again), "the router did not find what was cached"


def streamed_again(llm):
    llm.engine.input_processor.random.seed(0)
    return streamed(llm)


@pytest.mark.parametrize("at", [0, 60])
def test_a_killed_replica_is_not_noticed(both, alone, at):
    def strike(i):
        if i == at: kill(pids(both)[0])
    assert streamed(both, strike) == alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_replicas_killed_at_random(both, alone, seed):
    rng = random.Random(seed)
    moments = {rng.randrange(250) for _ in range(3)}
    def strike(i):
        if i in moments and (alive := pids(both)): kill(rng.choice(alive))
    assert streamed(both, strike) == alone


@pytest.mark.ci
def test_all_replicas_killed_at_once_come_back(both, alone):
    def strike(i):
        if i == 30:
            for pid in pids(both): kill(pid)
    assert streamed(both, strike) == alone


def test_a_reader_who_leaves_and_an_exception_leave_nothing(both, alone):
    "Tokens that were under way are computed again, after Ctrl-C in the middle of a step, too."
    stream = both.stream(PROMPTS, PARAMS)
    for _ in range(9): next(stream)
    stream.close()
    assert_idle(both)
    update, fleet, left = both.engine.scheduler.update, both.engine.scheduler, [3]
    def failing(*args):
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        return update(*args)
    both.engine.input_processor.random.seed(0)
    requests = both.engine.input_processor.make_requests(PROMPTS, PARAMS)
    fleet.update = failing
    try:
        for request in requests: both.engine.add(request)
        interrupts = 0
        while both.engine.requests:
            try: both.engine.step()
            except KeyboardInterrupt:
                interrupts += 1
                left[0] = 5 if interrupts < 4 else 10**9
    finally: del fleet.update
    assert interrupts == 4 and answers_of([r.output() for r in requests]) == alone


@pytest.mark.ci
def test_resizing_while_requests_run(both, alone):
    fleet = both.engine.scheduler
    def resize(i):
        if i == 20: fleet.resize(3)
        if i == 60: fleet.resize(1)
        if i == 100: fleet.resize(2)
    assert streamed(both, resize) == alone
    wait_for_all(both, seconds=30)
    assert len(fleet.actors) == 2 and not any(a.draining for a in fleet.actors.values())


@pytest.mark.ci
def test_a_server_answers_from_both_and_shows_them_as_one(both, alone):
    "Over HTTP, while one is killed; the figures are sums, and nothing is in them at the end."
    httpx = pytest.importorskip("httpx")
    from nano_vllm.async_llm import AsyncLLM
    from nano_vllm.server import serving
    behind = AsyncLLM(both.engine).start()

    def ask(i):
        body = dict(prompt=PROMPTS[i], temperature=.9, seed=i, max_tokens=20 + 2 * i, ignore_eos=True)
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    def figures():
        lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith("vllm:")]
        return {line.split("{")[0][5:]: float(line.split()[-1]) for line in lines}

    with serving(behind, "m", shutdown_timeout=1) as url, ThreadPoolExecutor(6) as clients:
        answers, most = [clients.submit(ask, i) for i in range(6)], 0
        deadline, killed = time.monotonic() + 60, False
        while not all(a.done() for a in answers) and time.monotonic() < deadline:
            now = figures()
            most = max(most, now["num_requests_running"] + now["num_requests_waiting"])
            busy = [a for a in list(both.engine.scheduler.actors.values()) if a.sequences and not a.starting]
            if busy and not killed:
                os.kill(busy[0].pid, signal.SIGKILL)
                killed = True
        assert [a.result() for a in answers] == [alone[i][2][0][0] for i in range(6)]
        assert killed and 0 < most <= 12
        done = figures()
        assert done["num_requests_running"] == done["num_requests_waiting"] == done["kv_cache_usage_perc"] == 0
        assert done["generation_tokens_total"] == sum(20 + 2 * i for i in range(6))
    behind.shutdown()
    wait_for_all(both)
    assert both.engine.scheduler.make_stats()[2] == 2 * LIMITS["num_kv_blocks"]
    assert [metric.value for metric in both.get_metrics()][:3] == [0, 0, 0]


def test_no_room_is_said(both, monkeypatch):
    monkeypatch.setattr(replicas, "SECONDS_FOR_ROOM", 1)
    with pytest.raises(RuntimeError, match="no room for another replica, which needs 1 CPU on one machine; it has in all 4"):
        both.engine.scheduler.resize(5)
    both.engine.scheduler.resize(2)


@pytest.mark.slow
def test_a_model_that_is_gone_is_said(ray, llm, tmp_path):
    "Replicas that were killed and cannot come back: what runs ends with an error, as soon as a start has failed. Then a start that fails."
    tiny_folder(tmp_path)
    start = time.monotonic()
    two = LLM(tmp_path, data_parallel_size=2, **LIMITS)
    seconds = time.monotonic() - start
    (tmp_path/"model.safetensors").unlink()
    dying = pids(two)
    with pytest.raises(RuntimeError, match="there is no replica left: replica . ended"):
        for i, _ in enumerate(two.stream(PROMPTS, PARAMS)):
            if i == 20:
                start = time.monotonic()
                for pid in dying: kill(pid)
    assert time.monotonic() - start < 10 + 2 * seconds and not two.engine.requests
    with pytest.raises(RuntimeError, match="replica . ended"): LLM(tmp_path, data_parallel_size=2, **LIMITS)
    assert not any(psutil.pid_exists(pid) for pid in dying)


@pytest.mark.slow
def test_no_process_outlives_a_killed_script(tmp_path):
    tiny_folder(tmp_path)
    script = textwrap.dedent("""
        import sys
        from nano_vllm import LLM, SamplingParams
        llm = LLM(sys.argv[1], data_parallel_size=2, max_model_len=256, num_kv_blocks=100, device="cpu")
        for i, _ in enumerate(llm.stream([[5, 6]] * 4, SamplingParams(max_tokens=200, ignore_eos=True))):
            if i == 5: print("running", flush=True)
        input()""")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "running\n"
    family = psutil.Process(process.pid).children(recursive=True)
    shared = set(os.listdir("/dev/shm"))
    ours = [p for p in family if "Replica" in " ".join(p.cmdline())]
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(ours, timeout=15)
    assert ours and not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    gone, alive = psutil.wait_procs(family, timeout=120)             # Ray's own agents look for their parent now and then
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.ci
def test_no_replica_left_is_said_within_ten_seconds(ray, both):
    "The last test of this file: Ray is told not to start them again."
    fleet, start = both.engine.scheduler, 0
    with pytest.raises(RuntimeError, match="there is no replica left: replica . ended"):
        for i, _ in enumerate(both.stream(PROMPTS, PARAMS)):
            if i == 20:
                start = time.monotonic()
                for actor in list(fleet.actors.values()): ray.kill(actor.handle)
    assert time.monotonic() - start < 10
    assert not fleet.actors
    with pytest.raises(RuntimeError, match="there is no replica left"): both.generate(PROMPTS, PARAMS, use_tqdm=False)
