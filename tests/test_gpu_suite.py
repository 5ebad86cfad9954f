"""`make gpu`, run end to end on the processor: all of it but the hardware."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_suite
import gpu_timings

SUITE = Path(gpu_suite.__file__)
BLOCKED = ["nbdev", "execnb", "jupytext", "nbclient", "nbformat", "pip", "matplotlib"]
NO_SUCH = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}: raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
"""


def suite(*args, **env):
    "The suite in a process of its own, where the packages of the book and the tests cannot be imported."
    return subprocess.run([sys.executable, SUITE, *map(str, args)], capture_output=True, text=True, timeout=600,
                          env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "(output of a whole toy run, the folder of its files, the environment it ran in)."
    folder = tmp_path_factory.mktemp("gpu")
    (folder/"sitecustomize.py").write_text(NO_SUCH)
    env = dict(PYTHONPATH=str(folder))
    return suite("--toy", "--out", folder/"out", **env), folder/"out", env


@pytest.mark.ci
def test_every_job_runs(toy):
    done, out, _ = toy
    assert done.returncode == 0, done.stdout + done.stderr
    known = gpu_suite.parts()
    for part, (_, jobs) in known.items():
        file, = out.glob(f"*-gpu-{part}.json")
        entry = json.loads(file.read_text())
        assert entry["data"].keys() == jobs.keys() and not entry["failed"]
        assert entry["machine"]["name"] and entry["date"] and entry["toy"] and entry["source"] == gpu_suite.source()
        assert entry["versions"].keys() >= {"torch", "triton", "transformers", "cuda"}
    assert len(list(out.iterdir())) == len(known)


def test_what_is_there_is_not_repeated(toy):
    _, out, env = toy
    done = suite("--toy", "--out", out, "tests", "kernels", **env)
    assert done.returncode == 0 and done.stdout.count("already in") == 2 and "done in" not in done.stdout


def test_what_is_missing_is_made_and_nothing_of_other_code_is_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_suite, "parts", lambda: dict(kernels=(1, dict(good=(good, 60), other=(good, 60)))))
    args, about = gpu_suite.parse(["--toy", "--out", str(tmp_path)]), dict(machine=dict(name="A GPU"), versions=dict(torch="2"))
    file = tmp_path/"a-gpu-gpu-kernels.json"

    def run(**changed):
        "What was run, after the file was `changed`, and the results."
        if changed: file.write_text(json.dumps(json.loads(file.read_text()) | changed))
        assert gpu_suite.run_part("kernels", about, args, time.monotonic() + 60)
        return capfd.readouterr().out.count("done in"), json.loads(file.read_text())["data"]

    assert run() == (2, dict(good=2, other=2))
    assert run(data=dict(good="kept")) == (1, dict(good="kept", other=2))
    assert run(source="of another version") == (2, dict(good=2, other=2))
    assert run(versions=dict(torch="1")) == (2, dict(good=2, other=2)) and run() == (0, dict(good=2, other=2))
    args.force = True
    assert run()[0] == 2


FAKES = {"nanovllm": """
class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos): self.max_tokens = max_tokens
class LLM:
    def __init__(self, folder, max_model_len):
        import json
        assert json.load(open(folder + "/config.json"))["vocab_size"] == 300 and max_model_len == 100
    def generate(self, prompts, params, use_tqdm): return [dict(text="", token_ids=p[:1] * s.max_tokens) for p, s in zip(prompts, params)]
""", "vllm": "import a_library_for_gpus"}


def test_peers_that_can_be_imported_do_the_same_work(tmp_path, monkeypatch):
    "A stand-in for nano-vllm, whose lists and dicts are its own; a vllm that lacks something; and ourselves."
    for name, source in FAKES.items(): (tmp_path/f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours, theirs = gpu_timings.peer_nano_vllm(True), gpu_timings.peer_nanovllm(True)
    assert [r["output_tokens"] for r in ours["runs"]] == [r["output_tokens"] for r in theirs["runs"]] and len(ours["runs"]) == 2
    assert gpu_timings.peer_vllm(True) == "not run: ModuleNotFoundError: No module named 'a_library_for_gpus'"


def test_launches_of_a_step(toy):
    "On the processor operations are not fused, and the model has 2 layers."
    file, = toy[1].glob("*-gpu-throughput.json")
    data = json.loads(file.read_text())["data"]
    found = data["launches"]
    assert found["layers"] == 2 and found["a_step"] == sum(found["names"].values()) >= 2*found["a_layer"] > 40
    assert data["host_gap"]["kernels_per_step"] == data["host_gap"]["kernels"] / data["host_gap"]["steps"]


def test_the_decode_table_counts_bytes(toy):
    "Keys and values of 2 texts of 40 tokens with 1 head of 32 in 2 bytes, a query and an output of 2 heads, a key and a value read and written."
    file, = toy[1].glob("*-gpu-kernels.json")
    row = json.loads(file.read_text())["data"]["decode"]["rows"][3]
    assert (row["batch"], row["context"]) == (2, 40)
    assert row["bytes"] == 2*40*2*32*2 + 2*(2*2*32*2) + 2*2*(2*32*2)


def test_the_table_of_rotated_and_stored_rows_counts_bytes(toy):
    "5 tokens: a row of 4 heads of 32 in 2 bytes, read and written; 32 numbers of 4 bytes of the tables, a slot; two weights."
    file, = toy[1].glob("*-gpu-kernels.json")
    row = json.loads(file.read_text())["data"]["rope_and_cache"]["rows"][1]
    assert row["tokens"] == 5 and row["bytes"] == 5*(2*4*32*2 + 32*4 + 8) + 2*32*2 and row["microseconds"].keys() == {"eager", "fused"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = suite()
    assert done.returncode == 3 and "no GPU" in done.stderr


def test_unknown_part():
    done = suite("--toy", "tset")
    assert done.returncode == 2 and "'tset'" in done.stderr


# ---- jobs

def good(x): return x + 1
def bad(x): raise ValueError("on purpose")
def crash(x): os._exit(7)
def hang(x): time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_jobs_that_fail_leave_the_others_alone(monkeypatch, method):
    monkeypatch.setattr(gpu_suite, "METHOD", method)
    jobs = [(f.__name__, f, (1,), seconds) for f, seconds in ((good, 60), (bad, 60), (crash, 60), (hang, 2), (good, 60))]
    start = time.monotonic()
    found = list(gpu_suite.run_jobs(jobs, 2, start + 100))
    assert time.monotonic() - start < 60
    results = {name: (result, error) for name, _, result, error in found}
    assert results["good"] == (2, None) and len(found) == 5
    assert "ValueError: on purpose" in results["bad"][1] and "exit code 7" in results["crash"][1] and "stopped after" in results["hang"][1]


def test_no_job_starts_after_the_deadline():
    (name, _, result, error), = gpu_suite.run_jobs([("good", good, (1,), 10)], 1, time.monotonic())
    assert result is None and "no time left" in error


def test_timeline():
    "Two steps of two layers; within each, kernels 1 apart, between them 50; a copy overlaps the first kernel."
    steps = [[(t + i*11, t + i*11 + 10, "attention_kernel") for i in range(2)] for t in (0, 71)]
    found = gpu_timings.timeline(sorted(sum(steps, []) + [(2, 8, "memcpy")]), layers=2)
    assert found["steps"] == 2 and found["largest_gap_microseconds"] == 50
    assert found["idle_fraction"] == pytest.approx(52 / 92) and found["microseconds_per_step"] == 46


def test_the_bound():
    "By hand: 2 layers, 1 KV head of 32, float32: 512 bytes a token."
    from nano_vllm.benchmark import Workload
    from nano_vllm.sampling_params import SamplingParams
    work = Workload([[1]*3, [1]*5], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=4)])
    found = gpu_timings.bound(True, work)
    assert found["kv_bytes_written"] == 512*(5 + 9) and found["kv_bytes_read"] == 512*((3 + 4) + (5 + 6 + 7 + 8)) and found["steps"] == 4
    total = found["kv_bytes_written"] + found["kv_bytes_read"] + 4*found["weight_bytes"]
    assert found["output_tokens_per_second"] == pytest.approx(6 * found["copy_bytes_per_second"] / total)
