"""Pipeline parallelism: stages give one process's logits and tokens, no stage stands idle while there is work, nothing is lost."""
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import count

import pytest
import torch
from fake_engine import fake_engine
from fuzz import plant
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, prefix_cache
from nano_vllm.cli import get_open_port
from nano_vllm.kv_blocks import ScheduledSequence, SchedulerOutput, Sequence
from nano_vllm.model import ModelConfig
from nano_vllm.model_runner import InputBatch
from nano_vllm.pipeline import (TURNS, PipelinedStep, StageRunner, TakesTurns, TurnScheduler, find_channels, head_in_layers,
                                split_layers, stage_ranks)
from nano_vllm.scheduler import Scheduler
from nano_vllm.workbench import fetch
from test_model import make
from test_overlap import Watch, Workload
from test_tensor_parallel import (ROOT, alone, assert_logits_in_chunks, assert_tokens_of_the_demo_model, children, tokens,  # noqa: F401
                                  wait_until)

EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
LATENT = dict(num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, kv_lora_rank=10,
              q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=9)


# ---- equal to one process

@pytest.mark.parametrize("family, stages, ranks, changes, options", [
    ("Llama", 2, 1, {}, {}), ("Llama", 3, 1, dict(tie_word_embeddings=True), {}), ("Qwen3", 2, 2, dict(tie_word_embeddings=True), {}),
    ("Mistral", 5, 1, dict(sliding_window=5), {}), ("Qwen3Moe", 2, 2, EXPERTS, dict(enable_expert_parallel=True)),
    ("DeepseekV2", 2, 2, LATENT, dict(enable_expert_parallel=True))])
def test_logits_equal_transformers(family, stages, ranks, changes, options, tmp_path):
    theirs = make(family, tmp_path, num_hidden_layers=5, num_attention_heads=4, **dict(num_key_value_heads=2) | changes)
    runner = assert_logits_in_chunks(theirs, tmp_path, pipeline_parallel_size=stages, tensor_parallel_size=ranks, **options)
    assert runner.kv_cache.shape[0] < 5
    runner.group.world.close()


@pytest.mark.parametrize("stages, ranks", [(2, 1), (3, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_demo_model_gives_the_same_tokens(stages, ranks, alone):  # noqa: F811
    "The chunks are small, so that several steps of one prompt are on their way."
    assert_tokens_of_the_demo_model(alone, stages * ranks, pipeline_parallel_size=stages, tensor_parallel_size=ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


POOL = dict(device="cpu", num_kv_blocks=14, block_size=4, max_model_len=40, max_num_batched_tokens=24, max_num_seqs=6)


def everything(seed):
    "Requests of all kinds, more than the pool holds at a time."
    kinds = [dict(), dict(temperature=1.2, top_p=.9), dict(repetition_penalty=1.3, temperature=0), dict(n=2, temperature=1), dict(logprobs=2),
             dict(prompt_logprobs=1, temperature=0), dict(logit_bias={5: 3.0}), dict(min_tokens=9, stop="e"), dict(allowed_token_ids=[11, 12, 13])]
    params = [SamplingParams(max_tokens=14, seed=seed + i, **k) for i, k in enumerate(kinds)]
    return [[100 + (i * seed + j) % 7 for j in range(5 + 2 * i)] for i in range(len(kinds))], params


def results(outs): return [(c.token_ids, c.text, c.finish_reason) for o in outs for c in o.outputs]


@pytest.fixture(scope="module")
def answers(folder):
    llm = LLM(folder, **POOL)
    return {seed: results(llm.generate(*everything(seed), use_tqdm=False)) for seed in (1, 2, 3)}


@pytest.mark.parametrize("policy", TURNS)
def test_every_kind_of_request_while_sequences_are_preempted(folder, answers, policy):
    llm = LLM(folder, pipeline_parallel_size=3, scheduling_policy=policy, **POOL)
    for seed, expected in answers.items(): assert results(llm.generate(*everything(seed), use_tqdm=False)) == expected
    assert llm.engine.scheduler.num_preemptions > 5
    assert_idle(llm)


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(kv_cache_dtype="bfloat16"), dict(quantization="int8")], ids=str)
def test_other_numbers_give_the_same_tokens(folder, options):
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    def answer(num_stages):
        llm = LLM(folder, pipeline_parallel_size=num_stages, device="cpu", num_kv_blocks=50, **options)
        return tokens(llm.generate([[5, 6, 7], [8] * 20, [9]], params, use_tqdm=False))
    try: expected = answer(1)
    except ValueError as e: pytest.skip(str(e))      # int8 without its instructions
    assert answer(2) == expected


# ---- who is in which step

class PipelineWatch(Watch):
    "Nobody rests for more steps than there are stages; nobody is in a step while a token of it is to come."

    def __init__(self, engine):
        super().__init__(engine)
        self.rests = Counter()

    def checked_schedule(self):
        s, flying = self.engine.scheduler, set().union(*self.engine.scheduler.in_flight)
        assert len(s.in_flight) == len(self.engine.in_flight) < self.engine.num_in_flight
        unknown = {seq for seq in s.running if seq.num_output_placeholders}
        output = super().checked_schedule()
        working = {x.seq for x in output.scheduled}
        assert not working & unknown, "a token that nobody knows is needed"
        assert not {x.seq for x in output.admitted} & flying, "it comes back while a step of it is on its way"
        assert all(x.samples <= 1 for x in output.scheduled)
        if output: self.rests = Counter({seq: self.rests[seq] + 1 for seq in s.running if seq not in working})
        return output

    def waits(self, seq): return self.rests[seq] <= self.engine.num_in_flight


class PipelineWorkload(Workload):
    watch, most_guesses = PipelineWatch, (0, 0)

    @staticmethod
    def scheduler(*options):
        made = PipelineWorkload.made = TurnScheduler(*options)
        made.num_stages = PipelineWorkload.num_stages
        return made


def run_pipeline(seed, num_stages):
    PipelineWorkload.num_stages = num_stages
    strong = prefix_cache.hash_block
    if seed % 3 == 0: prefix_cache.hash_block = lambda parent, tokens: (parent * 31 + sum(tokens)) % 7
    try: return PipelineWorkload(seed, num_stages).run()
    except AssertionError as e: raise AssertionError(f"workload {seed}: {e}") from e
    finally: prefix_cache.hash_block = strong


@pytest.mark.ci
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_fuzz_of_random_workloads(num_stages):
    total = Counter()
    for seed in range(200): total.update(run_pipeline(seed, num_stages))
    assert total["finished"] > 400 and total["preempted"] > 20 and total["gone"] > 20 and total["aborted"] > 20
    assert total["unknown"] == 0


# The fuzz bites.

PLANTED = {
    "the oldest always first": ("key=self.last_turn.get", "key=lambda seq: 0"),
    "a token that is on its way is needed": ("if not seq.num_output_placeholders", ""),
    "it comes back while a step of it is on its way": ("if seq not in busy", ""),
    "a step has them all": ("// self.num_stages", "// 1"),
}


def caught(error=AssertionError):
    with pytest.raises(error):
        for seed in [*range(100), *range(700, 720)]:
            run_pipeline(seed, 4)
            assert set(PipelineWorkload.made.last_turn) <= set(PipelineWorkload.made.running)
        for num_seqs in (3, 8): check_steps(4, num_seqs)


@pytest.mark.ci
@pytest.mark.parametrize("old, new", PLANTED.values(), ids=PLANTED)
def test_catches(monkeypatch, old, new):
    plant(monkeypatch, TakesTurns, "whose_turn", old, new)
    caught()


def test_catches_turns_that_are_not_booked(monkeypatch):
    monkeypatch.setattr(TakesTurns, "remove", Scheduler.remove)
    caught()
    monkeypatch.undo()
    monkeypatch.setattr(TakesTurns, "update", Scheduler.update)
    caught()


def steps_of(num_stages, num_seqs, prompt_len=4, **options):
    "The sequences of each step of some requests with 6 tokens each."
    PipelineWorkload.num_stages = num_stages
    engine = fake_engine(200, 4, 64, num_in_flight=num_stages, scheduler=PipelineWorkload.scheduler, **options)
    for request in engine.input_processor.make_requests([[1] * prompt_len] * num_seqs, SamplingParams(max_tokens=6, ignore_eos=True)):
        engine.add(request)
    steps, schedule = [], engine.scheduler.schedule
    def watched():
        output = schedule()
        if output: steps.append([(s.seq.request_id, s.num_tokens) for s in output.scheduled])
        return output
    engine.scheduler.schedule = watched
    while engine.requests: engine.step()
    return steps


def check_steps(num_stages, num_seqs):
    steps, share = steps_of(num_stages, num_seqs, enable_prefix_caching=False, max_num_batched_tokens=64), -(-num_seqs // num_stages)
    assert max(map(len, steps)) == share and len(steps) == 6 * -(-num_seqs // share)


@pytest.mark.parametrize("num_stages, num_seqs", [(2, 8), (3, 9), (4, 8), (4, 3)])
def test_steps_are_of_equal_size_and_as_few_as_can_be(num_stages, num_seqs): check_steps(num_stages, num_seqs)


def test_the_chunks_of_one_prompt_follow_each_other_without_a_gap():
    steps = steps_of(4, 1, prompt_len=40, max_num_batched_tokens=8)
    assert [n for (_, n), in steps] == [8] * 5 + [1] * 5


@pytest.mark.parametrize("head", [0, 0.4, 1.5, 8, 1000])
def test_layers_are_split_by_weight(head):
    for num_layers in range(1, 34):
        for num_stages in range(1, num_layers + 1):
            parts = split_layers(num_layers, num_stages, head)
            assert [p.start for p in parts] == [0, *(p.start + p.length for p in parts)][:-1] and sum(p.length for p in parts) == num_layers
            weights = [p.length for p in parts[:-1]] + [parts[-1].length + head]
            assert min(p.length for p in parts) >= 1
            fair = (num_layers + head) / num_stages
            if head + 1 <= fair: assert max(weights) - fair <= 1
    assert head_in_layers(ModelConfig.from_folder(fetch())) == pytest.approx(49152 * 576 / 3540096)


def test_every_rank_has_its_channels():
    "Whoever takes part in a step hears of it once, and each stage but the first gets what the one before has made."
    for num_stages in (2, 3, 5):
        for size in (1, 2, 3):
            stages, pairs = [stage_ranks(s, num_stages, size) for s in range(num_stages)], find_channels(num_stages, size)
            assert sorted(r for ranks in stages for r in ranks) == list(range(num_stages * size)) and 0 in stages[-1]
            assert Counter(receiver for _, receiver in pairs) == Counter(range(num_stages * size))
            for before, after in zip(stages, stages[1:]): assert {(a, b) for a, b in pairs if b in after} == set(zip(before, after))


def test_a_step_keeps_what_it_was_given():
    "Rows change while it is on its way, and what `prepare` gives may be a view of them."
    rows = InputBatch(4, 32, 4, torch.device("cpu"))
    seqs = [Sequence(name, [1, 2], SamplingParams(temperature=t), seed=t, block_table=[t]) for name, t in zip("ab", (1, 2))]
    output = SchedulerOutput(tuple(ScheduledSequence(seq, 0, 2, True) for seq in seqs), 2)
    rows.update(output)
    batch, inputs = rows.prepare(output)
    step = PipelinedStep(None, output, batch, inputs)
    rows.update(SchedulerOutput((), 0, (seqs[0],)))
    for column in (rows.seeds, rows.prompt_lens, rows.block_tables, *rows.params.values()): column[:] = 7
    assert batch.block_tables.tolist() != [[1], [2]] and inputs.metadata.temperature.tolist() != [1, 2]    # or nothing is tested
    assert step.batch.block_tables.tolist() == [[1], [2]]
    assert step.inputs.metadata.temperature.tolist() == step.inputs.metadata.seeds.tolist() == [1, 2]


# ---- nothing is lost

class Stop(Exception): pass


def stopping(function, period, when="before"):
    "The function, which now and then raises instead, or after its work."
    calls = count()
    def wrapped(*options):
        stops = next(calls) % period == 1
        if stops and when == "before": raise Stop
        result = function(*options)
        if stops: raise Stop
        return result
    return wrapped


@pytest.mark.parametrize("method", ["execute", "finish", "choose", "clear"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exception_on_rank_0_loses_no_token(folder, answers, monkeypatch, method, when):
    "What is on its way runs out, and the next step begins from what is certain; the stages stay in step."
    llm = LLM(folder, pipeline_parallel_size=3, **POOL)
    monkeypatch.setattr(StageRunner, method, stopping(getattr(StageRunner, method), 5, when))
    if method == "clear": monkeypatch.setattr(StageRunner, "choose", stopping(StageRunner.choose, 7))     # so that there is something to clear
    requests, stops = llm.engine.input_processor.make_requests(*everything(1)), 0
    for request in requests: llm.engine.add(request)
    while llm.engine.requests:
        try: llm.engine.step()
        except Stop: stops += 1
    assert stops > 3 and results([r.output() for r in requests]) == answers[1]
    assert_idle(llm)


SCRIPT = '''
import os, signal, sys, threading, time
from nano_vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], pipeline_parallel_size=3, device="cpu", num_kv_blocks=100)
prompts, params = ["A", "B b", "C c c"] * 3, SamplingParams(max_tokens=60, seed=4, ignore_eos=True)
whole = [o["text"] for o in llm.generate(prompts, params, use_tqdm=False)]
num_interrupts = 0
for delay in (0.01, 0.02, 0.04, 0.07, 0.1):
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    texts = {}
    try:
        timer.start()
        for piece in llm.stream(prompts, params): texts.setdefault(piece.request_id, []).append(piece["text"])
        timer.join()
        time.sleep(1)
    except KeyboardInterrupt: num_interrupts += 1
    assert [o["text"] for o in llm.generate(prompts, params, use_tqdm=False)] == whole
assert num_interrupts == 5 and not llm.engine.requests
print("ready", flush=True)
'''


@pytest.mark.ci
def test_ctrl_c_at_any_moment(folder, tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT)
    out = subprocess.run([sys.executable, tmp_path/"script.py", folder], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.stdout == "ready\n", out.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_stage_ends_the_engine_with_its_name(folder, victim):
    llm = LLM(folder, pipeline_parallel_size=3, device="cpu", num_kv_blocks=100)
    llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)
    processes = llm.engine.runner.group.world.processes
    threading.Timer(0.5, os.kill, (processes[victim].pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"rank {victim + 1} was killed by SIGKILL"):
        for _ in range(1000): llm.generate(["Hello"] * 4, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
    assert time.monotonic() - start < 10
    assert wait_until(lambda: all(p.poll() is not None for p in processes))
    with pytest.raises(RuntimeError, match=f"this engine has ended: rank {victim + 1}"): llm.generate("Hello", use_tqdm=False)


def test_engines_come_and_go(folder):
    import psutil
    me = psutil.Process()
    def once():
        llm = LLM(folder, pipeline_parallel_size=2, tensor_parallel_size=2, device="cpu", num_kv_blocks=50)
        return llm.generate("Hello", SamplingParams(max_tokens=3, temperature=0), use_tqdm=False)[0]["token_ids"]
    first = once()
    gc.collect()
    before = me.num_fds(), children(), torch.get_num_threads()
    assert once() == first
    gc.collect()
    assert (me.num_fds(), children(), torch.get_num_threads()) == before


UNDER_TORCHRUN = '''
import os, sys, torch
from nano_vllm import LLM, SamplingParams
llm = LLM(sys.argv[2], pipeline_parallel_size=3, device="cpu", num_kv_blocks=64)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outs = llm.generate(["Hello", "A b"], params, use_tqdm=False)
assert "".join(piece["text"] for piece in llm.stream("Hello", params)) == outs[0]["text"]
assert str(torch.distributed.get_rank()) == os.environ["RANK"]     # as scripts of vLLM's do
with open(f"{sys.argv[1]}/{os.environ['RANK']}", "w") as f: print([list(o["token_ids"]) for o in outs], file=f)
'''


@pytest.mark.ci
def test_torchrun_starts_the_stages(folder, tmp_path):
    (tmp_path/"script.py").write_text(UNDER_TORCHRUN)
    agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-addr", "127.0.0.1",
                              "--master-port", str(get_open_port()), tmp_path/"script.py", tmp_path, folder], cwd=ROOT)
    try: assert agent.wait(timeout=200) == 0
    finally: agent.kill()
    alone = LLM(folder, device="cpu", num_kv_blocks=64)  # noqa: F811
    expected = tokens(alone.generate(["Hello", "A b"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False))
    for rank in range(3): assert eval((tmp_path/str(rank)).read_text()) == expected


# ---- what cannot be had

@pytest.mark.parametrize("options, message", [
    (dict(pipeline_parallel_size=5), "pipeline_parallel_size must be at most 4, the model's layers, got 5"),
    (dict(pipeline_parallel_size=0), "pipeline_parallel_size must be an integer from 1 to 1024, got 0"),
    (dict(pipeline_parallel_size=2, enable_lora=True), "enable_lora must be left out with pipeline_parallel_size"),
    (dict(pipeline_parallel_size=2, speculative_config=dict(method="ngram", num_speculative_tokens=2)), "pipeline_parallel_size must be left out"),
    (dict(pipeline_parallel_size=2, data_parallel_size=2), "pipeline_parallel_size must be left out")])
def test_what_cannot_be_cut_is_refused_before_any_process_starts(folder, options, message):
    before = children()
    with pytest.raises(ValueError, match=message): LLM(folder, device="cpu", **options)
    assert children() == before


def test_layers_of_several_windows_are_refused(tmp_path):
    make("Gemma3", tmp_path, num_hidden_layers=4, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=10)
    with pytest.raises(ValueError, match="pipeline_parallel_size must be 1 for a model whose layers share KV blocks by kind, got 2"):
        LLM(tmp_path, pipeline_parallel_size=2, device="cpu", skip_tokenizer_init=True)


def test_a_call_reaches_all_stages_while_steps_are_on_their_way(folder):
    "Ranks that share the last stage with rank 0 wait for it in the middle of a step: it must be over before they can hear."
    llm = LLM(folder, pipeline_parallel_size=2, tensor_parallel_size=2, device="cpu", num_kv_blocks=100)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    whole = tokens(llm.generate(["Hello", "A b"], params, use_tqdm=False))
    requests = llm.engine.input_processor.make_requests(["Hello", "A b"], params)
    for request in requests: llm.engine.add(request)
    for _ in range(3): llm.engine.step()
    assert llm.engine.runner.on_the_way
    assert llm.collective_rpc("reload_weights") == [None] * 4
    while llm.engine.requests: llm.engine.step()
    assert [r.output()["token_ids"] for r in requests] == whole
    assert_idle(llm)
