"""Waits: arrivals are random as they should be, clocks start at the arrival, and figures follow from the readings."""
import json
import math
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given, strategies as st

import peers
from helpers import assert_idle
from nano_vllm import latency as module
from nano_vllm.benchmark import peak_memory, random_workload
from nano_vllm.cli import main
from nano_vllm.llm import LLM
from nano_vllm.latency import Timeline, latency, poisson_arrivals, serve, serve_like, stall, summarize, with_prefix
from nano_vllm.workbench import record, recorded
from test_benchmark import VOCAB, folder  # noqa: F401

SERVE_KEYS = {"request_rate", "duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput",
              "output_throughput"} | {f"{k}_{n}_ms" for k in ("mean", "median", "std", "p99") for n in ("ttft", "tpot", "itl")}


@pytest.fixture(scope="module")
def llm(folder): return LLM(folder, num_kv_blocks=400, max_num_batched_tokens=64)  # noqa: F811


def works(number, output=(2, 5), seed=0): return random_workload(number, (3, 9), output, VOCAB, seed)


# ---- arrivals

def test_arrivals_are_a_poisson_process():
    arrivals = np.array(poisson_arrivals(20_000, 5.0, seed=1))
    gaps = np.diff(arrivals, prepend=0)
    assert (gaps >= 0).all() and math.isclose(gaps.mean(), 0.2, rel_tol=0.03)
    for t in (0.05, 0.2, 0.6): assert abs((gaps > t).mean() - math.exp(-5 * t)) < 0.015
    counts = np.bincount(arrivals.astype(int))[:3000]                    # requests in each second: variance equals mean
    assert abs(counts.var() / counts.mean() - 1) < 0.1


def test_arrivals_are_seeded_and_all_at_once_at_an_infinite_rate():
    assert poisson_arrivals(9, 2.0, 3) == poisson_arrivals(9, 2.0, 3) != poisson_arrivals(9, 2.0, 4)
    assert poisson_arrivals(5, math.inf) == [0] * 5


# ---- the loop, on an engine whose steps take one second of a clock of ours

class Toy:
    "An LLM, its engine and its input processor: gives each request a token in every step; a step takes a second."
    def __init__(self, monkeypatch):
        self.engine = self.input_processor = self
        self.now, self.requests, self.slept = 0.0, {}, []
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def make_requests(self, prompts, params):
        return [SimpleNamespace(request_id=i, left=p.max_tokens, metrics=SimpleNamespace(num_generated_tokens=0))
                for i, p in enumerate(params)]

    def add(self, request): self.requests[request.request_id] = request
    def abort(self, request_id): self.requests.pop(request_id, None)

    def step(self):
        self.now += 1
        for r in list(self.requests.values()):
            r.metrics.num_generated_tokens += 1
            if r.metrics.num_generated_tokens == r.left: self.abort(r.request_id)


def test_a_clock_starts_at_the_arrival_and_not_when_the_loop_looks(monkeypatch):
    toy = Toy(monkeypatch)
    first, second, third = serve(toy, works(3, output=(3, 3)), [0, 0.25, 9.5])
    assert first.tokens == [1, 2, 3] and first.ttft == 1
    assert second.tokens == [2, 3, 4] and second.ttft == 1.75            # 0.75 of it before anybody could see the request
    assert third.tokens == [10.5, 11.5, 12.5] and toy.slept == [5.5]     # nothing to do in between
    assert not toy.requests


def test_a_step_that_fails_leaves_nothing_behind(llm, monkeypatch):
    def step(): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(llm.engine, "step", step)
        with pytest.raises(KeyboardInterrupt): serve(llm, works(3), [0, 0, 100])
    assert_idle(llm)


def test_work_and_arrivals_of_different_lengths_are_refused(llm):
    with pytest.raises(ValueError): serve(llm, works(3), [0, 0])


def test_every_request_gets_its_tokens_after_its_arrival(llm):
    work, arrivals = works(20, seed=3), poisson_arrivals(20, 400, 3)
    lines = serve(llm, work, arrivals)
    assert [len(line.tokens) for line in lines] == [p.max_tokens for p in work.params]
    for line, at in zip(lines, arrivals): assert line.arrival == at < line.tokens[0] and (line.gaps > 0).all()
    assert_idle(llm)


# ---- the figures

@given(st.lists(st.tuples(st.floats(0, 9), st.lists(st.floats(0.01, 2), min_size=1, max_size=6)), min_size=1, max_size=6))
def test_figures_follow_from_the_readings(readings):
    lines = [Timeline(at, list(at + np.cumsum(waits))) for at, waits in readings]
    figures, gaps = summarize(lines), [w for _, waits in readings for w in waits[1:]]
    num_tokens, end = sum(len(waits) for _, waits in readings), max(at + sum(waits) for at, waits in readings)
    assert (figures["completed"], figures["total_output_tokens"]) == (len(readings), num_tokens)
    assert np.isclose(figures["duration"], end) and np.isclose(figures["output_throughput"], num_tokens / end)
    ttfts, tpots = [waits[0] for _, waits in readings], [np.mean(waits[1:]) for _, waits in readings if len(waits) > 1]
    for name, values in dict(ttft=ttfts, tpot=tpots or [0], itl=gaps or [0]).items():
        for kind, value in dict(mean=np.mean(values), median=np.median(values), p99=np.percentile(values, 99)).items():
            assert np.isclose(figures[f"{kind}_{name}_ms"], 1e3 * value, atol=1e-6)


def test_serve_like_has_the_names_of_vllm_bench_serve(llm):
    work = works(5)
    result = serve_like(llm, work, request_rate=500.0)
    assert set(result) == SERVE_KEYS and result["request_rate"] == 500
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (work.num_prompt_tokens, work.num_output_tokens)
    assert json.loads(json.dumps(serve_like(llm, work), allow_nan=False))["request_rate"] == "inf"


def test_latency_has_the_names_of_vllm_bench_latency_and_leaves_the_warm_up_out(llm, monkeypatch):
    seconds = iter([9.0, 8.0, 1.0, 2.0, 3.0])
    works_seen = []
    def throughput(llm, work): works_seen.append(work); return dict(elapsed_time=next(seconds))
    monkeypatch.setattr(module, "throughput", throughput)
    result = latency(llm, batch_size=3, input_len=4, output_len=5, num_iters_warmup=2, num_iters=3)
    assert result["avg_latency"] == 2 and result["latencies"] == [1, 2, 3]
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"} and result["percentiles"]["50"] == 2
    assert len({str(w.prompts) for w in works_seen}) == 5                # fresh prompts each time
    assert all([len(p) for p in w.prompts] == [4] * 3 and w.params[0].max_tokens == 5 for w in works_seen)


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(input_len=0), dict(output_len=1.5), dict(num_iters=0),
                                   dict(num_iters_warmup=-1)])
def test_latency_refuses_by_name(llm, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): latency(llm, **wrong)


@pytest.mark.parametrize("wrong", [dict(request_rate=0), dict(request_rate=-1), dict(request_rate=math.nan), dict(seed=-1)])
def test_serve_like_refuses_by_name(llm, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): serve_like(llm, works(2), **wrong)


def test_stall_counts_every_step_of_the_prompt(llm):
    result = stall(llm, num_readers=4, prompt_len=300)
    assert len(result["gaps"]) == math.ceil(300 / (64 - 4)) and result["usual"] > 0 and min(result["gaps"]) > 0
    assert_idle(llm)


def test_a_prefix_stands_before_each_prompt():
    work = works(3)
    longer = with_prefix(work, [7, 8])
    assert longer.prompts == [[7, 8] + p for p in work.prompts] and longer.params == work.params


# ---- the commands and the files

@pytest.mark.parametrize("command, keys", [
    (["latency", "--batch-size", "2", "--input-len", "3", "--output-len", "2", "--num-iters", "2"],
     {"avg_latency", "latencies", "percentiles"}),
    (["serve-like", "--num-prompts", "2", "--request-rate", "50"], SERVE_KEYS)])
def test_bench_commands_print_and_write_the_figures(folder, tmp_path, capsys, command, keys):  # noqa: F811
    file = tmp_path/"out.json"
    assert main(["bench", *command, "--model", str(folder), "--output-json", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) and set(printed) == keys


@pytest.mark.parametrize("wrong, says", [
    (["serve-like", "--request-rate", "-2"], "request_rate"), (["serve-like", "--num-prompts", "0"], "num_prompts"),
    (["latency", "--num-iters", "0"], "num_iters")])
def test_bad_numbers_are_refused_before_a_model_is_looked_for(capsys, wrong, says):
    assert main(["bench", *wrong, "--model", "/no/such/folder"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [[], ["latency", "--request-rate", "2"], ["nonsense"]])
def test_a_command_takes_only_its_own_options(wrong):
    with pytest.raises(SystemExit) as e: main(["bench", *wrong])
    assert e.value.code == 2


def test_make_bench_writes_the_file_with_the_machines_bare_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_RECORD", "1")
    for name in ("bench", "other"): record(name, [name], tmp_path)
    short, long = sorted((p.stem for p in tmp_path.iterdir()), key=len)
    assert long == short + "-other"
    assert [e["data"] for e in recorded("bench", tmp_path)] == [["bench"]] and recorded("other", tmp_path)[0]["data"] == ["other"]


def test_the_peers_memory_is_a_peak_without_what_is_shared():
    own, peak = psutil.Process().memory_full_info(), peers.peak_memory(psutil.Process())
    assert own.uss <= peak <= peak_memory()
