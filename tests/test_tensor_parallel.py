"""Tensor parallelism: a model cut into N ranks gives TP=1's logits and tokens, and no process outlives its engine."""
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import warm
from helpers import assert_idle, logits_tolerance, tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import Batch, make_batch
from nano_vllm.cli import get_open_port
from nano_vllm.kv_blocks import ScheduledSequence, Sequence
from nano_vllm.parallel import StartedGroup, describe_end, hold_interrupts, step_seconds, to_bytes
from nano_vllm.workbench import fetch
from test_model import make

PROMPTS = ["The capital of France is", "Once upon a time there was a", "One, two, three, four,", "Water boils at"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LIMITS = dict(device="cpu", max_model_len=256, num_kv_blocks=64)
ROOT = Path(__file__).parent.parent


def children(): return {p.pid for p in psutil.Process().children(recursive=True)} - {warm.server().pid}


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline: time.sleep(0.05)
    return condition()


def tokens(outs): return [list(out["token_ids"]) for out in outs]


@pytest.fixture(scope="module")
def alone():
    "TP=1's greedy and sampled tokens of the demo model."
    llm = LLM("smollm2-135m", **LIMITS)
    seeded = SamplingParams(temperature=0.9, seed=5, max_tokens=8)
    return {"greedy": tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)),
            "seeded": tokens(llm.generate(PROMPTS, seeded, use_tqdm=False))}, seeded


def assert_logits_in_chunks(theirs, folder, **options):
    "In chunks of 5 and 7 tokens and in single ones, the model in `folder` says what transformers' model says; the runner, still there."
    for name in ("tokenizer.json", "tokenizer_config.json"): (folder/name).write_bytes((fetch()/name).read_bytes())
    ids = [(7 * i + i * i) % 97 for i in range(16)]
    with torch.inference_mode(): expected = theirs(torch.tensor([ids])).logits[0]
    llm = LLM(folder, block_size=4, num_kv_blocks=8, device="cpu", max_model_len=32, **options)
    seq, runner, start = Sequence("a", ids, SamplingParams(), block_table=[5, 0, 7, 2]), llm.engine.runner, 0
    allowed = logits_tolerance(runner.model.config, len(ids), expected)
    assert allowed <= 1e-4
    for n in (5, 7, 1, 1, 2):
        batch = make_batch([ScheduledSequence(seq, start, n, samples=True)], 4)
        with runner.group.collective_guard():
            runner.group.broadcast(batch)
            logits = runner.compute(batch)
        start += n
        assert logits.shape == (1, 97)
        torch.testing.assert_close(logits[0], expected[start - 1], atol=allowed, rtol=0)
    return runner


@pytest.mark.parametrize("family, heads, kv_heads, size, changes", [
    ("Llama", 6, 3, 2, {}), ("Llama", 6, 3, 3, dict(tie_word_embeddings=False)), ("Llama", 8, 2, 4, dict(attention_bias=True, mlp_bias=True)),
    ("Mistral", 4, 2, 2, dict(sliding_window=5)), ("Mistral", 6, 1, 3, dict(sliding_window=None)),
    ("Qwen2", 6, 3, 2, {}), ("Qwen2", 3, 3, 3, dict(tie_word_embeddings=True)), ("Qwen3", 4, 2, 2, {}), ("Qwen3", 9, 3, 3, dict(attention_bias=True))])
def test_logits_of_each_family_equal_transformers(family, heads, kv_heads, size, changes, tmp_path):
    "Vocabulary and MLP do not divide by the number of ranks."
    theirs = make(family, tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=43, vocab_size=97, **changes)
    assert_logits_in_chunks(theirs, tmp_path, tensor_parallel_size=size).group.close()


def assert_tokens_of_the_demo_model(alone, num_processes, **options):
    "In small chunks; afterwards nothing is left of the engine."
    expected, seeded = alone
    before = children()
    llm = LLM("smollm2-135m", block_size=8, max_num_batched_tokens=16, **options, **LIMITS)
    assert len(children() - before) == num_processes - 1
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected["greedy"]
    assert tokens(llm.generate(PROMPTS, seeded, use_tqdm=False)) == expected["seeded"]
    assert_idle(llm)
    del llm
    gc.collect()
    assert children() == before


@pytest.mark.parametrize("size", [2, 3])
def test_the_demo_model_gives_the_same_tokens(size, alone): assert_tokens_of_the_demo_model(alone, size, tensor_parallel_size=size)


def test_a_killed_rank_ends_the_engine_with_its_name(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    llm = LLM(folder, tensor_parallel_size=3, device="cpu", num_kv_blocks=100)
    llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
    threading.Timer(0.5, os.kill, (llm.engine.runner.group.processes[1].pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 2 was killed by SIGKILL"):
        for _ in range(1000): llm.generate("Hello", SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert time.monotonic() - start < 10
    assert all(p.poll() is not None for p in llm.engine.runner.group.processes)
    with pytest.raises(RuntimeError, match="this engine has ended: rank 2"): llm.generate("Hello", use_tqdm=False)
    assert_idle(llm)


def test_a_rank_that_does_nothing_is_not_waited_for(tmp_path, monkeypatch):
    "It is alive, its sockets are open, and it does not move: a debugger may have stopped it."
    monkeypatch.setenv("NANO_VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "55")
    llm = LLM(tiny_folder(tmp_path), tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
    llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
    worker = llm.engine.runner.group.processes[0]
    assert llm.engine.runner.group.limit == 55
    llm.engine.runner.group.limit = 1
    worker.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the other ranks did not answer in 1 s"): llm.generate("Hello", use_tqdm=False)
    assert 1 <= time.monotonic() - start < 20 and worker.poll() is not None
    with pytest.raises(RuntimeError, match="this engine has ended: rank 0 failed"): llm.generate("Hello", use_tqdm=False)
    assert_idle(llm)


def test_an_engine_that_nobody_holds_ends_its_workers_at_once(tmp_path):
    llm = LLM(tiny_folder(tmp_path), tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
    llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
    worker = llm.engine.runner.group.processes[0]
    gc.disable()
    try:
        del llm
        assert worker.poll() is not None
    finally: gc.enable()


def test_a_rank_that_fails_tells_its_traceback(tmp_path):
    llm = LLM(tiny_folder(tmp_path), tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
    group = llm.engine.runner.group
    with pytest.raises(RuntimeError, match="(?s)rank 1 failed:.*Traceback.*TypeError"), group.collective_guard():
        group.broadcast(Batch(*[None] * 8))
        group.all_reduce(torch.ones(1))
    assert wait_until(lambda: all(p.poll() is not None for p in group.processes))


def test_what_cannot_be_cut_is_refused_before_any_process_starts():
    before = children()
    with pytest.raises(ValueError, match="tensor_parallel_size is 4, supported for 9 heads with 3 KV heads"):
        LLM("smollm2-135m", tensor_parallel_size=4, device="cpu")
    assert children() == before


def shared_memory(pids) -> set[str]:
    "The files in /dev/shm that these processes have open or mapped: theirs, whatever others keep there."
    found = set()
    for folder in (Path(f"/proc/{pid}") for pid in pids):
        found |= {line.split(maxsplit=5)[-1] for line in (folder/"maps").read_text().splitlines()}
        for fd in (folder/"fd").iterdir():
            try: found.add(os.readlink(fd))
            except OSError: pass     # closed meanwhile
    return {name.removesuffix(" (deleted)") for name in found if name.startswith("/dev/shm/")}


def test_engines_come_and_go_without_a_trace(tmp_path):
    folder, used, me = tiny_folder(tmp_path), set(), psutil.Process()
    def once():
        llm = LLM(folder, tensor_parallel_size=2, device="cpu", num_kv_blocks=50)
        out, = llm.generate("Hello", SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)
        used.update(shared_memory([me.pid, *(p.pid for p in llm.engine.runner.group.processes)]))
        return out["token_ids"]
    def left(): return me.num_fds(), children(), shared_memory([me.pid]), torch.get_num_threads()
    first = once()
    gc.collect()
    before = left()
    for _ in range(9): assert once() == first
    gc.collect()
    assert left() == before
    assert not {name for name in used if os.path.exists(name)} - before[2], "something of the ranks' is left in /dev/shm"


def test_two_engines_in_one_process(tmp_path):
    folder, greedy = tiny_folder(tmp_path), SamplingParams(max_tokens=8, temperature=0)
    options = dict(device="cpu", num_kv_blocks=50)
    expected = LLM(folder, **options).generate("Hello", greedy, use_tqdm=False)[0]["text"]
    threads = torch.get_num_threads()
    streams = [LLM(folder, tensor_parallel_size=2, **options).stream("Hello", greedy) for _ in range(2)]
    assert torch.get_num_threads() == threads
    texts = ["", ""]
    for pieces in zip(*streams): texts = [t + p["text"] for t, p in zip(texts, pieces)]
    assert texts == [expected] * 2


def test_a_step_may_be_of_any_size():
    group = StartedGroup(2, "cpu", "rank_targets.echo", None)
    n = 64 * 4096
    lens = np.full(64, 4096)
    batch = Batch(*[torch.arange(n) for _ in range(3)], torch.zeros(64, 256, dtype=torch.int64), lens, lens, torch.arange(64), torch.arange(0))
    with group.collective_guard():
        group.broadcast(batch)
        assert group.gather(torch.zeros(2, dtype=torch.int64)).tolist() == [0, 0, n * (n - 1) // 2, n]
    group.close()


def test_a_rank_loads_no_more_than_its_share():
    "Anonymous memory at the peak, in a process of its own: the share, and not another tensor's worth."
    code = '''
        import ctypes, threading, torch
        from nano_vllm.model import ModelConfig
        from nano_vllm.layers import TensorParallelGroup
        from nano_vllm.weights import load_model
        from nano_vllm.workbench import fetch
        def anonymous(): return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
        config, readings, done = ModelConfig.from_folder(fetch()), [anonymous()], threading.Event()
        def watch():
            while not done.wait(0.001): readings.append(anonymous())
        (watcher := threading.Thread(target=watch)).start()
        model = load_model(fetch(), config, torch.float32, "cpu", group=TensorParallelGroup(1, 2))
        done.set(), watcher.join()
        print(max(readings) - readings[0], sum(p.nbytes for p in model.parameters()), sum(b.nbytes for b in model.buffers()))
    '''
    peak, share, tables = map(int, subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)]).split())
    largest = 49152 // 2 * 576 * 4
    assert share < peak < share + largest + tables + 2e7


SCRIPT = '''
import sys, time
from nano_vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
print("ready", flush=True)
if sys.argv[2] == "raise": raise KeyError("on purpose")
while True: llm.generate("Hello", SamplingParams(max_tokens=50), use_tqdm=False)
'''


@pytest.mark.parametrize("end", ["raise", "SIGINT", "SIGKILL"])
def test_no_process_outlives_the_program(end, tmp_path):
    "Nor does the script need an `if __name__ == '__main__'`."
    (tmp_path/"script.py").write_text(SCRIPT)
    program = subprocess.Popen([sys.executable, tmp_path/"script.py", tiny_folder(tmp_path/"model"), end], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert program.stdout.readline() == "ready\n"
    family = psutil.Process(program.pid).children() if end != "raise" else []
    assert len(family) == (end != "raise")
    time.sleep(0.5)
    if end == "SIGINT": os.killpg(program.pid, signal.SIGINT)
    if end == "SIGKILL": program.kill()
    _, errors = program.communicate(timeout=20)
    assert program.returncode != 0
    assert {"raise": "KeyError: 'on purpose'", "SIGINT": "KeyboardInterrupt", "SIGKILL": ""}[end] in errors
    assert wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in family))


STOPPED = '''
import os, signal, sys, threading, time
from nano_vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
os.kill(llm.engine.runner.group.processes[0].pid, signal.SIGSTOP)
print("ready", flush=True)
llm.generate("Hello", SamplingParams(max_tokens=50), use_tqdm=False)
'''


@pytest.mark.ci
def test_the_second_interrupt_gets_through_a_stopped_rank(tmp_path):
    "The first is put off to the end of the step, which never comes."
    (tmp_path/"script.py").write_text(STOPPED)
    with subprocess.Popen([sys.executable, tmp_path/"script.py", tiny_folder(tmp_path/"model")], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "ready\n"
        worker, = psutil.Process(program.pid).children()
        time.sleep(1)
        program.send_signal(signal.SIGINT)
        time.sleep(2)
        assert program.poll() is None and worker.is_running()
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=20)
    assert program.returncode != 0 and "KeyboardInterrupt" in errors
    assert wait_until(lambda: not worker.is_running())


UNDER_TORCHRUN = '''
import os, sys
from nano_vllm import LLM, SamplingParams
llm = LLM("smollm2-135m", tensor_parallel_size=2, device="cpu", max_model_len=256, num_kv_blocks=64)
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outs = llm.generate(PROMPTS, greedy, use_tqdm=False)
stream = llm.stream(PROMPTS[0], greedy)
next(stream), stream.close()
text = "".join(piece["text"] for piece in llm.stream(PROMPTS[0], greedy))
assert text == outs[0]["text"]
try: llm.generate("", use_tqdm=False)
except ValueError: pass
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as f: print([list(o["token_ids"]) for o in outs], file=f)
'''


@pytest.mark.ci
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_torchrun_on_one_host_and_on_two(num_hosts, alone, tmp_path):
    "Two agents on the loopback stand for two hosts; every rank runs the same script and gets TP=1's tokens."
    (tmp_path/"script.py").write_text(f"PROMPTS = {PROMPTS!r}\n" + UNDER_TORCHRUN)
    port = get_open_port()
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_hosts), "--node-rank", str(i),
                                "--nproc-per-node", str(2 // num_hosts), "--master-addr", "127.0.0.1", "--master-port", str(port),
                                tmp_path/"script.py", tmp_path], cwd=ROOT) for i in range(num_hosts)]
    try:
        for agent in agents: assert agent.wait(timeout=200) == 0
    finally:
        for agent in agents: agent.kill()
    for rank in range(2): assert eval((tmp_path/str(rank)).read_text()) == alone[0]["greedy"]


LEAVES_AT_ONCE = """
import sys, time, torch, torch.distributed as dist
from nano_vllm.parallel import DistributedGroup
rank, port = int(sys.argv[1]), int(sys.argv[2])
group = DistributedGroup(dist.TCPStore("127.0.0.1", port, is_master=not rank), rank, 2)
sys.setswitchinterval(10)   # the thread of the group gets Python only once the script has ended
def listen():
    for _ in range(50):
        group.broadcast_tensor(length := torch.zeros(1, dtype=torch.int64))
        group.broadcast_tensor(data := torch.zeros(int(length), dtype=torch.uint8))
if rank: listen()
else:
    for _ in range(50): group.broadcast("news")
time.sleep(0 if rank else 2)
"""


@pytest.mark.ci
def test_a_rank_may_end_right_after_a_message():
    "The group's thread lets go of its last tensor before Python ends, or the process would abort."
    ports = [get_open_port() for _ in range(2)]
    ranks = [subprocess.Popen([sys.executable, "-c", LEAVES_AT_ONCE, str(rank), str(port)], cwd=ROOT)
             for port in ports for rank in range(2)]
    try: assert [p.wait(timeout=100) for p in ranks] == [0] * len(ranks)
    finally:
        for p in ranks: p.kill()


def test_a_rank_that_cannot_be_imported_is_told_at_once():
    "And not after the two minutes that the ranks may take to find each other."
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="No module named 'nowhere'"): StartedGroup(2, "cpu", "nowhere.nothing", None)
    assert time.monotonic() - start < 100


def test_why_rank_0_left_is_told_without_words_too():
    group = StartedGroup(2, "cpu", "rank_targets.echo", None)
    with pytest.raises(KeyboardInterrupt), group.collective_guard(): raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="this engine has ended: rank 0 failed: KeyboardInterrupt"):
        with group.collective_guard(): pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_message_carries_tensors_of_any_type_and_shape(dtype):
    for x in (torch.tensor(1.), torch.arange(6.).view(2, 3).T, torch.zeros(0, 2), torch.ones(2, requires_grad=True) * 2):
        again, = pickle.loads(to_bytes([x.to(dtype)]))
        assert again.dtype == dtype and torch.equal(again.float(), x.detach().to(dtype).float())
        again.zero_()      # it is the receiver's own


@pytest.mark.parametrize("seconds", ["", "soon", "-1", "0", "nan"])
def test_a_limit_that_is_none_is_refused_by_name(seconds, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", seconds)
    with pytest.raises(ValueError, match=f"NANO_VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS must be a number over 0, got '{seconds}'"): step_seconds()
    monkeypatch.setenv("NANO_VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "1.5")
    assert step_seconds() == 1.5


def test_every_end_of_a_process_has_words():
    assert [describe_end(1, -signal.SIGKILL), describe_end(2, -40)] == ["rank 1 was killed by SIGKILL", "rank 2 was killed by signal 40"]


@pytest.mark.parametrize("known", [signal.SIG_IGN, None], ids=["ignored", "set by C"])
def test_an_interrupt_that_the_program_ignores_stays_ignored(known, monkeypatch):
    "Nor is a handler touched that Python does not know."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(signal, "getsignal", lambda number: known)
    try:
        with hold_interrupts():
            for _ in range(2): signal.raise_signal(signal.SIGINT)
    finally: signal.signal(signal.SIGINT, before)


def unpicklable(runner):
    "What a user's function might give."
    return (i for i in range(runner.group.rank))


def test_an_answer_that_cannot_be_sent_is_an_error_and_the_engine_goes_on(tmp_path):
    llm = LLM(tiny_folder(tmp_path), tensor_parallel_size=2, **LIMITS)
    with pytest.raises(TypeError, match="cannot pickle 'generator' object"): llm.collective_rpc(unpicklable)
    assert len(llm.collective_rpc("clear")) == 2
    llm.engine.runner.group.close()
