"Scripts in the shapes that vLLM's examples have, with its names: each runs as a program of its own, as a user would run it."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm

from nano_vllm.utils.network_utils import get_open_port

ROOT = Path(__file__).parent.parent
HELLO = 'prompts = ["Hello, my name is", "The capital of France is"]\n'


def run(tmp_path, text, *words, ok=True, head=()):
    "Standard output and error of a script, after `head` in an interpreter of its own; it may end by an error only if that is said."
    (tmp_path/"script.py").write_text(text)
    env = os.environ | dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", NANO_VLLM_CACHE=os.environ.get("NANO_VLLM_CACHE", str(Path.home()/".cache/nano_vllm")))
    command = [sys.executable, *head, "script.py", *map(str, words)]
    if head: done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    else: done = warm.run(command, cwd=tmp_path, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_options_of_the_shell(tmp_path, tiny):
    "basic/chat, deployment/llm_engine_example, features/reset_kv: a parser's options go to LLM, EngineArgs and LLMEngine."
    out, _ = run(tmp_path, HELLO + '''
from nano_vllm import LLM, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from nano_vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
parser.set_defaults(model="org/none", seed=5)
parser.add_argument_group("Sampling").add_argument("--max-tokens", type=int)
args = parser.parse_args()
engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
assert engine.vllm_config.parallel_config.data_parallel_size == 1
params = [SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1), SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1)]
for i, (prompt, p) in enumerate(zip(prompts, params)): engine.add_request(str(i), prompt, p, lora_request=None)
steps = 0
while engine.has_unfinished_requests():
    if steps == 3: assert not engine.reset_prefix_cache() and engine.reset_prefix_cache(reset_running_requests=True)
    for output in engine.step():
        if output.finished: print("finished", output.request_id, len(output.outputs), type(output) is RequestOutput)
    steps += 1
options = vars(args)
max_tokens = options.pop("max_tokens")
llm = LLM(**options)
params = llm.get_default_sampling_params()
params.max_tokens = max_tokens
print(len(llm.generate(prompts, params, use_tqdm=False)[0].outputs[0].token_ids), llm.args.seed, llm.args.max_num_seqs, llm.args.enforce_eager)
''', "--model", tiny, "--max_tokens", 4, "-tp=1", "--max-num-seqs", 3, "--enforce-eager", "--num-kv-blocks=50", "--dtype", "float32", "--hf-overrides", '{"rms_norm_eps": 1e-4}')
    assert sorted(out.splitlines()) == ["4 5 3 True", "finished 0 1 True", "finished 1 2 True"]


def test_streams_of_an_event_loop(tmp_path, tiny):
    "deployment/async_llm_streaming and rl/pause_resume: DELTA, AsyncEngineArgs, pause_generation."
    out, _ = run(tmp_path, f'''
import asyncio, time
from nano_vllm import SamplingParams
from nano_vllm.engine.arg_utils import AsyncEngineArgs
from nano_vllm.engine.async_llm_engine import AsyncLLMEngine
from nano_vllm.sampling_params import RequestOutputKind
from nano_vllm.v1.engine.async_llm import AsyncLLM

async def texts(engine, kind):
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, output_kind=kind)
    return [(o.outputs[0].text, o.finished) async for o in engine.generate(request_id=kind.name, prompt="The future is", sampling_params=params)]

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model={str(tiny)!r}, enforce_eager=True, num_kv_blocks=50))
    all, new, last = [await texts(engine, kind) for kind in RequestOutputKind]
    assert "".join(t for t, _ in new) == all[-1][0] == last[0][0] and len(last) == 1 and len(new) > 3 and new[-1][1]
    times = []
    async def read():
        async for o in engine.generate(request_id="r", prompt="Once", sampling_params=SamplingParams(max_tokens=100, ignore_eos=True)): times.append(time.monotonic())
        return o
    reader = asyncio.create_task(read())
    while len(times) < 5: await asyncio.sleep(0.001)
    await engine.pause_generation(mode="keep")
    at = len(times)
    assert await engine.is_paused()
    await asyncio.sleep(0.5)
    assert len(times) == at < 100
    await engine.resume_generation()
    assert len((await reader).outputs[0].token_ids) == 100 and times[at] - times[at - 1] >= 0.45
    reader = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    await engine.pause_generation(mode="wait")
    assert (await reader).finished
    await engine.resume_generation()
    reader = asyncio.create_task(read())
    while not engine.engine.requests: await asyncio.sleep(0.001)
    await engine.pause_generation()
    assert (await reader).outputs[0].finish_reason == "abort"
    await engine.resume_generation()
    engine.shutdown()
    print("ended", AsyncLLMEngine is AsyncLLM)
asyncio.run(main())
''')
    assert out == "ended True\n"


def test_a_given_answer(tmp_path, tiny):
    "generate/trace_replay: the same tokens, with the same log-probabilities; end tokens do not end it."
    out, err = run(tmp_path, f'''
from nano_vllm import LLM, SamplingParams
for options in (dict(), dict(async_scheduling=True), dict(num_kv_blocks=5)):
    llm = LLM(model={str(tiny)!r}, enable_trace_replay=True, enforce_eager=True, **dict(num_kv_blocks=60) | options)
    first, = llm.generate(["Hello, my name is"], SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True), use_tqdm=False)
    ids = list(first.outputs[0].token_ids)
    again, other = llm.generate(["Hello, my name is"] * 2, [SamplingParams(trace_decode_token_ids=ids, logprobs=5), SamplingParams(trace_decode_token_ids=[7, 2, 2, 9])], use_tqdm=False)
    assert again.outputs[0].token_ids == ids and other.outputs[0].token_ids == [7, 2, 2, 9]
    for a, b, token in zip(first.outputs[0].logprobs, again.outputs[0].logprobs, ids): assert abs(a[token].logprob - b[token].logprob) < 1e-4 and b[token].rank == 1
    try: llm.generate("x", SamplingParams(trace_decode_token_ids=[10**6]))
    except ValueError as e: print(e)
''')
    assert out == 3 * "prompts[0]: trace_decode_token_ids must have token ids from 0 to 49151, got 1000000\n"
    assert err.count("enable_trace_replay has no effect here") == 1


def test_numbers_of_an_engine(tmp_path, tiny):
    "observability/metrics and features/speculative_decoding: kinds of metrics, requests of vLLM's benchmarks."
    (tmp_path/"lines.jsonl").write_text('{"prompt": "a b c d a b c d a b c"}\n{"prompt": "one two one two one"}\n')
    out, _ = run(tmp_path, f'''
import argparse
from nano_vllm import LLM, SamplingParams
from nano_vllm.benchmarks.datasets import add_dataset_parser, get_samples
from nano_vllm.v1.metrics.reader import Counter, Gauge, Histogram, Vector
parser = argparse.ArgumentParser()
add_dataset_parser(parser)
args = parser.parse_args()
llm = LLM(model={str(tiny)!r}, num_kv_blocks=60, disable_log_stats=False, limit_mm_per_prompt={{"image": 5}}, disable_chunked_mm_input=True, allowed_local_media_path="",
          spec_method="ngram", spec_tokens=2, max_num_seqs=None, enable_chunked_prefill=True)
prompts = [{{"prompt_token_ids": llm.get_tokenizer().encode(s.prompt, add_special_tokens=False), "multi_modal_data": s.multi_modal_data}} for s in get_samples(args, llm.get_tokenizer())]
llm.generate(prompts, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), use_tqdm=False)
for metric in llm.get_metrics():
    if isinstance(metric, Vector): print(metric.name, "vector", len(metric.values))
    elif isinstance(metric, (Counter, Gauge)): print(metric.name, type(metric).__name__, metric.value >= 0)
    elif isinstance(metric, Histogram): print(metric.sum, metric.count, metric.buckets)
''', "--dataset-name", "custom", "--dataset-path", "lines.jsonl", "--num-prompts", 3)
    lines = out.splitlines()
    assert "vllm:num_requests_running Gauge True" in lines and "vllm:spec_decode_num_drafts Counter True" in lines
    assert "vllm:spec_decode_num_accepted_tokens_per_pos vector 2" in lines
    out, _ = run(tmp_path, '''
import argparse
from transformers import AutoTokenizer
from nano_vllm.benchmarks.datasets import add_dataset_parser, get_samples
parser = argparse.ArgumentParser()
add_dataset_parser(parser)
tokenizer = AutoTokenizer.from_pretrained(parser.prog and __import__("sys").argv.pop(1))
samples = get_samples(parser.parse_args(), tokenizer)
print(len(samples), samples[0].prompt_len, samples[0].expected_output_len, samples[0].prompt != samples[1].prompt)
''', tiny, "--num-prompts", 2, "--random-input-len", 9)
    assert out == "2 9 128 True\n"


@pytest.mark.ci
def test_weights_read_anew_on_all_ranks(tmp_path, tiny):
    "rl/skip_loading_weights_in_engine_init: collective_rpc on two ranks, and an error on them."
    (tmp_path/"mine.py").write_text("def rank_of(runner, more): return runner.group.rank + more\n"
                                    "def spoil(model): model.model.norm.weight.zero_()\n")
    out, _ = run(tmp_path, HELLO + f'''
from mine import rank_of, spoil
from nano_vllm import LLM, SamplingParams
def of_the_script(runner): return 1
if __name__ == "__main__":
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    def ids(llm): return [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)]
    right = ids(LLM(model={str(tiny)!r}, num_kv_blocks=40))
    llm = LLM(model={str(tiny)!r}, load_format="dummy", enforce_eager=True, tensor_parallel_size=2)
    assert ids(llm) != right
    llm.collective_rpc("update_config", args=({{"load_config": {{"load_format": "auto"}}}},))
    llm.collective_rpc("reload_weights")
    assert ids(llm) == right
    assert llm.collective_rpc(rank_of, args=(5,)) == [5, 6]
    for method in ("nonsense", "update_config", of_the_script, lambda runner: 1):
        try: llm.collective_rpc(method, args=({{"x": 1}},))
        except (AttributeError, ValueError) as e: print(e)
    assert ids(llm) == right
    assert len(llm.apply_model(spoil)) == 2 and ids(llm) != right      # and no old keys are found
    stream = llm.stream(prompts[0], greedy)
    before = next(stream).outputs[0].token_ids
    llm.collective_rpc("reload_weights")
    list(stream)
    assert ids(llm) == right
    def cached(): return llm.generate("one two three " * 20, greedy, use_tqdm=False)[0].num_cached_tokens
    assert cached() == 0 < cached() and llm.collective_rpc(rank_of, args=(0,)) == [0, 1] and cached() == 0
    print("ended")
''')
    lines = out.splitlines()
    assert "nonsense" in lines[0] and "update_config takes" in lines[1] and lines[4] == "ended"
    assert "of_the_script of __main__ must be a function of a module" in lines[2] and "<lambda>" in lines[3]


def test_weights_given_away(tmp_path, tiny):
    "Level 2: the weights' memory is gone until they are read again, by wake_up or as in vLLM's scripts."
    out, _ = run(tmp_path, f'''
from nano_vllm import LLM, SamplingParams
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
def answer(): return llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].token_ids
def size_of(model): return sum(p.nbytes for p in model.parameters())
llm = LLM(model={str(tiny)!r}, num_kv_blocks=50, load_format="dummy", hf_overrides=dict(hidden_size=512))
whole, size = answer(), llm.apply_model(size_of)[0]
assert size > 50e6, size                # enough to be seen
full = resident()
llm.sleep(level=2)
assert llm.engine.runner.model is None and resident() < full - .8 * size, (full, resident(), size)
try: llm.apply_model(size_of)
except RuntimeError as e: print(e)
llm.wake_up(tags=["weights"])
llm.collective_rpc("reload_weights")
llm.wake_up(tags=["kv_cache"])
assert answer() == whole
for tags in (None, ["kv_cache"]):
    llm.sleep(level=2)
    llm.wake_up(tags)
    if tags:
        try: answer()
        except RuntimeError as e: print(e)
        llm.wake_up()
    assert answer() == whole and size_of(llm.engine.runner.model) == size
try: LLM(model={str(tiny)!r}, num_kv_blocks=50, enable_lora=True).sleep(2)
except ValueError as e: print(e)
''')
    assert out.splitlines() == ["there are no weights after sleep(level=2) until wake_up()", "the engine sleeps until wake_up() is called",
                                "level must be at most 1 with enable_lora, got 2"]


def test_memory_given_back(tmp_path, tiny):
    "The parts of RL loops that sleep: requests end, wait or go on, and the memory is really gone."
    out, _ = run(tmp_path, f'''
from nano_vllm import LLM, SamplingParams
greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
llm = LLM(model={str(tiny)!r}, enable_sleep_mode=True, num_kv_blocks=200_000, async_scheduling=True)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
whole = llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0]
llm.engine.runner.kv_cache.fill_(1)
full = resident()
assert full > 500 + 0 * 1, full
llm.sleep(level=1)
assert resident() < full - 300, (full, resident())
try: llm.generate("Hello")
except RuntimeError as e: print(e)
llm.wake_up(tags=["weights"])
try: llm.generate("Hello")
except RuntimeError as e: print(e)
assert llm.wake_up(tags=["kv_cache"]) and llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].token_ids == whole.token_ids
for mode, reason in dict(keep="length", wait="length", abort="abort").items():
    stream = llm.stream("Hello", greedy)
    ids = list(next(stream).outputs[0].token_ids)
    llm.sleep(2, mode)
    llm.wake_up()
    for piece in stream: ids += piece.outputs[0].token_ids
    assert piece.outputs[0].finish_reason == reason and (ids == whole.token_ids) == (mode != "abort") and ids == whole.token_ids[:len(ids)]
stream = llm.stream("Hello", greedy)
next(stream)
llm.release_kv_cache_memory()
llm.release_kv_cache_memory()
try: next(stream)                     # no step without a cache
except RuntimeError as e: print(e)
llm.wake_up()
assert not llm.engine.requests and llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].token_ids == whole.token_ids
for call in (lambda: llm.sleep(3), lambda: llm.sleep(1, "now"), lambda: llm.wake_up(["x"])):
    try: call()
    except ValueError as e: print(e)
''')
    assert out.splitlines() == 3*["the engine sleeps until wake_up() is called"] + [
        "level must be an integer from 0 to 2, got 3", "mode must be abort, wait or keep, got 'now'", "tags must be of weights, kv_cache, scheduling, got 'x'"]


def test_traces(tmp_path, tiny):
    "features/profiling: start_profile and stop_profile, and what they need."
    out, _ = run(tmp_path, HELLO + f'''
import gzip, json
from nano_vllm import LLM, SamplingParams
from nano_vllm.config import ProfilerConfig
for config in (dict(profiler="torch", torch_profiler_dir="./traces"), ProfilerConfig(torch_profiler_dir="./traces")):
    llm = LLM(model={str(tiny)!r}, num_kv_blocks=40, profiler_config=config)
    llm.start_profile()
    llm.generate(prompts, SamplingParams(max_tokens=3), use_tqdm=False)
    llm.stop_profile()
    assert len(json.loads(gzip.open("traces/profile_rank0.pt.trace.json.gz").read())["traceEvents"]) > 50
for call in (llm.stop_profile, lambda: ProfilerConfig(), lambda: ProfilerConfig(torch_profiler_dir="x", max_iterations=3), LLM(model={str(tiny)!r}, num_kv_blocks=40).start_profile):
    try: call()
    except ValueError as e: print(e)
''')
    assert [line.split()[0] for line in out.splitlines()] == ["stop_profile:", "profiler_config", "profiler_config:", "start_profile"]


@pytest.mark.ci
@pytest.mark.parametrize("size", [2, 4])
def test_replicas_under_torchrun(tmp_path, tiny, size):
    "features/torchrun: two engines, of one rank each or of two, which share the prompts by their numbers."
    run(tmp_path, f'''
import json, os
from nano_vllm import LLM, SamplingParams
prompts = ["A cat", "A dog", "A cow"]
llm = LLM(model={str(tiny)!r}, tensor_parallel_size={size // 2}, data_parallel_size=2, pipeline_parallel_size=1, distributed_executor_backend="external_launcher",
          max_model_len=256, num_kv_blocks=40, seed=1)
parallel = llm.llm_engine.vllm_config.parallel_config
mine = [p for i, p in enumerate(prompts) if i % parallel.data_parallel_size == parallel.data_parallel_rank]
outputs = llm.generate(mine, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
with open(os.environ["RANK"], "w") as f: json.dump([[parallel.data_parallel_rank, o.prompt, o.outputs[0].token_ids] for o in outputs], f)
''', head=("-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={get_open_port()}"))
    found = sorted(row for rank in range(size) for row in json.loads((tmp_path/str(rank)).read_text()))
    assert [(r, p) for r, p, _ in found[::size // 2]] == [(0, "A cat"), (0, "A cow"), (1, "A dog")]
    from nano_vllm import LLM, SamplingParams
    alone = LLM(tiny, num_kv_blocks=40).generate(["A cat", "A cow", "A dog"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert [ids for _, _, ids in found[::size // 2]] == [o["token_ids"] for o in alone]


@pytest.mark.ci
def test_processes_that_share_prompts(tmp_path, tiny):
    "features/data_parallel: a parser's options, a free port, the platform, and an engine in each of two processes."
    run(tmp_path, HELLO + '''
from multiprocessing import Process
from nano_vllm import LLM, EngineArgs, SamplingParams
from nano_vllm.platforms import current_platform
from nano_vllm.utils.argparse_utils import FlexibleArgumentParser
from nano_vllm.utils.network_utils import get_open_port
def main(rank, options):
    outputs = LLM(**options).generate(prompts[rank::2], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    with open(str(rank), "w") as f: f.writelines(o.prompt for o in outputs)
if __name__ == "__main__":
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(enable_expert_parallel=True)
    options = vars(parser.parse_args())
    assert options.pop("data_parallel_size") == 2 and 0 < get_open_port() < 2**16 and not current_platform.is_rocm() and current_platform.device_type
    processes = [Process(target=main, args=(rank, options)) for rank in range(2)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert not any(p.exitcode for p in processes)
''', "--model", tiny, "-dp=2", "--num-kv-blocks", 20, "--device", "cpu", head=["-B"])
    assert [(tmp_path/str(rank)).read_text() for rank in range(2)] == ["Hello, my name is", "The capital of France is"]


@pytest.mark.parametrize("line, parts", [
    ("from nano_vllm.config import KVTransferConfig", ["KVTransferConfig is refused"]),
    ("from nano_vllm.v1.metrics.loggers import AggregatedLoggingStatLogger", ["AggregatedLoggingStatLogger is refused", "get_metrics"]),
    ("from nano_vllm.v1.worker.gpu.sample.logits_processor import LogitsContext", ["LogitsContext is refused", "v1.sample.logits_processor"]),
    ("from nano_vllm.model_executor.model_loader import ShardedStateLoader", ["ShardedStateLoader is refused", "load_format"]),
    ("from nano_vllm.config import NoSuchName", ["NoSuchName", "nano_vllm.config"]),
    ("import nano_vllm.no_such_module", ["nano_vllm.no_such_module"])])
def test_imports_that_are_refused(line, parts):
    with pytest.raises(ImportError) as e: exec(line)
    for part in parts: assert part in str(e.value)


def test_refusing_a_name_leaves_the_rest_alone():
    import inspect

    import nano_vllm.config
    assert not hasattr(nano_vllm.config, "__wrapped__") and not hasattr(nano_vllm.config, "nothing") and inspect.ismodule(nano_vllm.config)
    from nano_vllm.config import VllmConfig
    assert VllmConfig.__name__ == "EngineConfig"


def test_a_revision_and_a_token_reach_the_hub(tmp_path, monkeypatch, tiny):
    import huggingface_hub
    from nano_vllm import LLM
    asked = {}
    def fake(name, **options): return asked.update(options, name=name) or str(tiny)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    llm = LLM("org/name", revision="v2", hf_token="secret", download_dir=tmp_path, num_kv_blocks=9)
    assert (asked["name"], asked["revision"], asked["token"], asked["cache_dir"]) == ("org/name", "v2", "secret", tmp_path) and llm.model_path == tiny


def test_another_config(tmp_path, monkeypatch, tiny):
    from nano_vllm import LLM, SamplingParams
    from nano_vllm.weights import with_overrides
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    rope = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=512)
    plain, longer = LLM(tiny, num_kv_blocks=99), LLM(tiny, num_kv_blocks=99, hf_overrides={"rope_parameters": rope})
    assert longer.engine.input_processor.max_model_len == 4 * plain.engine.input_processor.max_model_len == 2048
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    a, b = [llm.generate("Hello there", greedy, use_tqdm=False)[0]["token_ids"] for llm in (plain, longer)]
    def made(): return [path for path in tmp_path.iterdir() if path.name != "kernels"]     # which are compiled by whoever is first
    assert len(a) == len(b) and len(made()) == 1
    hf = __import__("transformers").AutoModelForCausalLM.from_pretrained(longer.model_path, dtype=torch.float32)
    ids = torch.tensor([longer.tokenizer.encode("Hello there")])
    assert hf.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, ids.shape[1]:].tolist() == b
    with_overrides(tiny, {"rope_parameters": rope})
    assert len(made()) == 1                       # found again
    with pytest.raises(ValueError, match="hf_overrides must be a dict"): LLM(tiny, hf_overrides=lambda c: c)
    with pytest.raises(ValueError, match="rope"): LLM(tiny, hf_overrides={"rope_parameters": {"rope_type": "odd"}})


def test_short_names_of_speculation(tiny):
    from nano_vllm import EngineArgs
    args = EngineArgs(tiny, spec_method="ngram", spec_tokens=3, speculative_config=dict(prompt_lookup_max=4))
    assert args.speculative_config == dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4)
    with pytest.raises(ValueError, match="speculative_config has method"): EngineArgs(tiny, spec_method="ngram", speculative_config=dict(method="self"))
