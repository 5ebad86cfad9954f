"vLLM's interface as a contract: every public name of vLLM 0.32 works, is accepted, or is refused by name; and what works, works."
import json
import logging
import random
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_idle
from tqdm import tqdm

import nano_vllm
from nano_vllm import LLM, EngineArgs, LLMEngine, SamplingParams, TokensPrompt, sampling_params
from nano_vllm.kv_blocks import Sequence
from nano_vllm.llm import NEUTRAL_VALUES, status_of
from nano_vllm.model_runner import LogitsProcessor, compare_rows
from nano_vllm.prefix_cache import KVCacheManager
from nano_vllm.sampler import LOGIT_STAGES, AllowedTokens, SamplingMetadata, pack_mask, run_stages, unpack_mask
from nano_vllm.sampling_params import BeamSearchParams, RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams, log_once, repeats
from nano_vllm.scheduler import PriorityQueue, PriorityScheduler
from nano_vllm.tokenizer import Detokenizer, Tokenizer
from nano_vllm.workbench import fetch, recorded

ROOT = Path(__file__).parent.parent
FACTS = json.loads((ROOT/"nbs/data/vllm_0.32.json").read_text())


@pytest.fixture(scope="module")
def llm(tiny): return LLM(tiny, num_kv_blocks=200, max_logprobs=-1, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer(fetch())


@pytest.fixture(autouse=True)
def idle(request):
    yield
    if "llm" in request.fixturenames: assert_idle(request.getfixturevalue("llm"))


def greedy(**options): return SamplingParams(**dict(temperature=0, max_tokens=8, ignore_eos=True) | options)
def ask(llm, prompts, params, **options): return llm.generate(prompts, params, use_tqdm=False, **options)
def ids_of(llm, prompts, params, **options): return [o["token_ids"] for o in ask(llm, prompts, params, **options)]


# ---- The table, walked ----

# a value that asks for something, where it is not simply True
VALUES = dict(
    n=2, presence_penalty=1, frequency_penalty=1, repetition_penalty=2, temperature=.5, top_p=.5, top_k=3, min_p=.1, seed=5, stop=["x"],
    stop_token_ids=[5], max_tokens=3, min_tokens=2, logprobs=1, prompt_logprobs=1, logit_bias={5: 1}, allowed_token_ids=[5], bad_words=["x"],
    output_kind=RequestOutputKind.DELTA, repetition_detection=RepetitionDetectionParams(3, 1, 2), extra_args={"a": 1}, stream_interval=2,
    logprob_token_ids=[1], prompt_logprob_token_ids=[[1]], prompt_logprob_start=2, thinking_token_budget=9, routed_experts_prompt_start=2,
    trace_decode_token_ids=[1], output_text_buffer_length=2, structured_outputs=StructuredOutputsParams(regex="a"),
    tokenizer="x", dtype="half", quantization="int8", tensor_parallel_size=1, chat_template="{{ 1 }}", gpu_memory_utilization=.5,
    logits_processors=[LogitsProcessor], kv_cache_memory_bytes=2**20, kv_cache_dtype="float32", block_size=8, max_model_len=64, max_num_seqs=3,
    max_num_batched_tokens=99, long_prefill_token_threshold=9, attention_backend="torch", load_format="dummy", max_logprobs=5,
    scheduling_policy="priority", generation_config="vllm", override_generation_config={"top_k": 3}, num_gpu_blocks_override=7, pipeline_parallel_size=2,
    data_parallel_size=2, nnodes=2, decode_context_parallel_size=2, max_loras=2, max_lora_rank=64, offload_num_in_group=2, offload_prefetch_step=2,
    hf_token="secret", download_dir="folder", hf_overrides={"x": 1}, profiler_config={"torch_profiler_dir": "x"}, spec_method="ngram", spec_model="x", spec_tokens=3,
    runner="pooling", convert="embed", revision="v2", tokenizer_revision="v2", logprobs_mode="processed_logits", worker_cls="mine")
OFF = {"detokenize", "skip_special_tokens", "spaces_between_special_tokens"}    # True is the default


def value_of(name): return VALUES.get(name, name not in OFF)


def behaves(make, name, state, caplog):
    "Does giving `name` to `make` do what `state` says of it?"
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "nano_vllm"):
        if state == "refused":
            with pytest.raises(ValueError, match=rf"\b{name}\b"): make({name: value_of(name)})
            return None
        made = make({name: value_of(name)})
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"{name} has no effect")]
    assert len(said) == (state == "accepted"), (name, state, said)
    return made


@pytest.mark.parametrize("name", FACTS["SamplingParams"])
def test_sampling_params(name, caplog):
    state, _ = status_of("SamplingParams", name)
    made = behaves(lambda options: SamplingParams(**options), name, state, caplog)
    if state == "works": assert getattr(made, name) == value_of(name)


def test_defaults_are_vllms():
    ours = {f.name: getattr(SamplingParams(), f.name) for f in fields(SamplingParams)}
    ours["output_kind"] = ours["output_kind"].name
    assert ours.pop("speculative")                               # our own: may the engine guess ahead?
    assert ours | {"skip_reading_prefix_cache": False} == FACTS["SamplingParams"]
    for name, default in FACTS["SamplingParams"].items():       # they ask for nothing
        if name != "output_kind": SamplingParams(**{name: default})


@pytest.mark.parametrize("name", FACTS["EngineArgs"] | FACTS["LLM"])
def test_engine_arguments(name, caplog):
    if name == "model": return
    state, _ = status_of("EngineArgs", name)
    assert status_of("LLM", name)[0] == state
    made = behaves(lambda options: EngineArgs("x", **options), name, state, caplog)
    if state == "works" and hasattr(made, name): assert getattr(made, name) == value_of(name)


@pytest.mark.parametrize("name", [n for n in FACTS["EngineArgs"] | FACTS["LLM"] if status_of("EngineArgs", n)[1] != "no name of this engine"])
def test_what_asks_for_nothing_passes(name, caplog):
    for value in (None, *NEUTRAL_VALUES.get(name, ())):
        if status_of("LLM", name)[0] != "works": EngineArgs("x", **{name: value})
    assert not caplog.records


def test_a_misspelt_argument_is_told_its_name():
    with pytest.raises(ValueError, match="max_model_length is no argument of this engine; did you mean max_model_len?"):
        LLM("x", max_model_length=512)


CALL = dict(sampling_params=greedy(max_tokens=1), use_tqdm=False, priority=3, tokenization_kwargs=dict(truncation=True, max_length=1),
            lora_request=[None], mm_processor_kwargs={"x": 1}, chat_template="{{ messages[0].content }}", add_generation_prompt=False,
            continue_final_message=False, tools=[{"type": "function", "function": {"name": "f"}}], chat_template_kwargs={"x": 1},
            chat_template_content_format="openai")


@pytest.mark.parametrize("method, name", [(m, n) for m in ("generate", "chat") for n in FACTS[m]])
def test_calls(llm, method, name):
    first = {"generate": "Hello there", "chat": [{"role": "user", "content": "Hello there"}]}[method]
    if name in ("prompts", "messages"): options = {name: first}
    else: options = {FACTS[method] and next(iter(FACTS[method])): first, "sampling_params": greedy(max_tokens=1), name: CALL[name]}
    call = partial(getattr(llm, method), **dict(use_tqdm=False) | options)
    if status_of(method, name)[0] == "works": assert len(call()[0]["token_ids"]) >= 1
    else:
        with pytest.raises(ValueError, match=f"{name} is refused: "): call()


@pytest.mark.parametrize("name", FACTS["methods"])
def test_methods(llm, name):
    state, why = status_of("methods", name)
    assert hasattr(llm, name) == (state == "works")
    if state == "works": return
    with pytest.raises(AttributeError) as e: getattr(llm, name)
    assert name in str(e.value) and why in str(e.value)


@pytest.mark.parametrize("where", ["RequestOutput", "CompletionOutput"])
def test_outputs(llm, where):
    out, = ask(llm, "Hello", greedy(max_tokens=1, logprobs=0, prompt_logprobs=0))
    value = out if where == "RequestOutput" else out.outputs[0]
    for name in FACTS[where]:
        if status_of(where, name)[0] == "accepted": assert getattr(value, name) is None
        else: assert hasattr(value, name)
    assert out.outputs[0].finished()


@pytest.mark.parametrize("path, name", [(p, n) for p, names in FACTS["modules"].items() for n in names])
def test_module_paths(path, name):
    module = __import__(f"nano_vllm.{path}".rstrip("."), fromlist=[name])
    found = getattr(module, name, None)
    assert found is not None or name == "PromptType"


def test_the_book_shows_the_table():
    "What chapter 18 prints, and what README says, is what the code does."
    cells = json.loads((ROOT/"nbs/18_llm.ipynb").read_text())["cells"]
    shown = "\n".join("".join(data) for c in cells for o in c.get("outputs", ()) for data in [o.get("data", {}).get("text/markdown", ""), o.get("text", "")])
    for where in ("SamplingParams", "LLM", "generate", "chat", "methods", "RequestOutput", "CompletionOutput"):
        for name in FACTS[where]:
            state, why = status_of(where, name)
            assert f"| {where} | `{name}` | {state} | {why} |" in shown
    readme = (ROOT/"README.md").read_text()
    counts = [(sum(status_of(where, name)[0] == "works" for name in FACTS[where]), len(FACTS[where])) for where in ("SamplingParams", "LLM", "methods")]
    for works, total in counts: assert f"{works} of {total}" in readme, f"README should say {works} of {total}"


def test_the_record_of_vllms_own_examples():
    "What README says of them is what `tools/vllm_examples.py` has found."
    entry, = recorded("vllm-examples")
    states = [state for state, _ in entry["data"].values()]
    assert set(states) == {"runs", "refused"} and all(message for state, message in entry["data"].values() if state == "refused")
    assert f"Of the {len(states)} offline examples" in (ROOT/"README.md").read_text() and f"distribution {states.count('runs')} run" in (ROOT/"README.md").read_text()


# ---- Logits of chosen tokens ----

@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 100, 49152])
def test_masks_pack_and_unpack(size):
    allowed = torch.rand(3, size, generator=torch.Generator().manual_seed(size)) < .5
    masks = torch.stack([pack_mask(row) for row in allowed])
    assert masks.shape == (3, -(-size // 32)) and masks.dtype == torch.int32
    assert torch.equal(unpack_mask(masks, size), allowed)
    for t in range(min(size, 70)): assert bool(masks[0, t // 32] >> t % 32 & 1) == allowed[0, t]


def row(rng, V):
    pick = rng.choice
    params = SamplingParams(logit_bias=pick([None, None, {1: 5.0, V - 1: -3}]), bad_words=pick([[], ["x"]]), min_tokens=pick([0, 4]),
                            allowed_token_ids=pick([None, None, rng.sample(range(V), 7)]), repetition_penalty=pick([1, 1.5]))
    seq = Sequence("0", rng.choices(range(V), k=3), params, stop_token_ids={1, 2}, output_token_ids=rng.choices(range(3), k=rng.randrange(5)))
    if params.bad_words: seq.bad_words_token_ids = [[1], [0, 2], [2, 2, 0], [9, 9, 9, 9, 9, 9]]
    if params.allowed_token_ids: seq.token_mask = AllowedTokens(params.allowed_token_ids, V)
    return seq


def slow(x, seq):
    "Token by token, in plain Python."
    p, out = seq.params, []
    for v, l in enumerate(x.tolist()):
        l += (p.logit_bias or {}).get(v, 0)
        seen = v in seq.prompt_token_ids or v in seq.output_token_ids
        if seen: l = l / p.repetition_penalty if l > 0 else l * p.repetition_penalty
        text = [*seq.output_token_ids, v]
        banned = any(text[len(text) - len(w):] == w for w in seq.bad_words_token_ids if len(w) <= len(text))
        if p.allowed_token_ids is not None: banned |= v not in p.allowed_token_ids
        banned |= len(seq.output_token_ids) < p.min_tokens and v in seq.stop_token_ids
        out.append(-torch.inf if banned else l)
    return torch.tensor(out)


@pytest.mark.parametrize("seed", range(5))
def test_edits_against_the_slow_way(seed):
    rng, V = random.Random(seed), 40
    rows, x = [row(rng, V) for _ in range(60)], torch.randn(60, V, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    found = run_stages(LOGIT_STAGES, x, SamplingMetadata.of(rows))
    torch.testing.assert_close(found, torch.stack([slow(*pair) for pair in zip(x, rows)]))
    assert torch.equal(x, before)                                           # law 7


def test_allowed_tokens(llm):
    allowed = [7, 300, 40000]
    for params in (greedy(allowed_token_ids=allowed), greedy(allowed_token_ids=allowed, temperature=1, seed=3)):
        ids, = ids_of(llm, "Hello", params)
        assert set(ids) <= set(allowed)
    with pytest.raises(ValueError, match="allowed_token_ids must have token ids from 0 to 49151, got 49152"):
        ask(llm, "Hello", greedy(allowed_token_ids=[1, 49152]))
    with pytest.raises(ValueError, match="allowed_token_ids must be None or"): greedy(allowed_token_ids=[])


def test_bias(llm):
    plain, = ids_of(llm, "Hello", greedy())
    assert set(ids_of(llm, "Hello", greedy(logit_bias={77: 1000}))[0]) == {77}
    assert plain[0] not in ids_of(llm, "Hello", greedy(logit_bias={plain[0]: -1000}))[0]
    assert ids_of(llm, "Hello", greedy(logit_bias={}))[0] == plain


@pytest.mark.parametrize("options", [dict(), dict(async_scheduling=True), dict(num_kv_blocks=3, block_size=16)], ids=str)
def test_bad_words_and_companions(tiny, options):
    "A bad word of several tokens is never said, in both loops and after preemption; and nobody else notices."
    llm = LLM(tiny, device="cpu", dtype="float32", **dict(num_kv_blocks=60) | options)
    plain, = ids_of(llm, "Hello", greedy(max_tokens=20))
    tokenizer = llm.tokenizer
    words = [tokenizer.decode(plain[i:i + 2]) for i in range(0, 10, 2)]
    words = [w for w in words if tokenizer.encode(w, add_special_tokens=False) and w.strip()]
    spelled = [tokenizer.encode(w.lstrip(), add_special_tokens=False) for w in words]
    prompts, both = ["Hello", "Hello"], [greedy(max_tokens=20, bad_words=words), greedy(max_tokens=20)]
    changed, other = ids_of(llm, prompts, both)
    assert other == plain
    for word in spelled: assert all(changed[i:i + len(word)] != word for i in range(20))
    assert ids_of(llm, "Hello", both[0])[0] == changed
    assert_idle(llm)


def test_a_bad_word_is_forbidden_where_it_would_have_come(smol):
    plain, = ask(smol, "The capital of France is", greedy(max_tokens=4))
    assert " Paris" in plain["text"]
    changed, = ask(smol, "The capital of France is", greedy(max_tokens=4, bad_words=["Paris"]))
    assert "Paris" not in changed["text"]


# ---- Text ----

def test_stop_strings_across_min_tokens(tokenizer):
    ids = tokenizer.encode("One. Two. Three.")
    d = Detokenizer(tokenizer, stop="e. T", min_tokens=2)
    d.add(ids)
    assert (d.text, d.num_tokens, d.stop_reason) == ("On", 3, "e. T")
    d = Detokenizer(tokenizer, stop="e.", min_tokens=2)     # the first is complete within the two
    d.add(ids)
    assert d.text + (d.stop_reason or "") == "One. Two. Three."
    d = Detokenizer(tokenizer, stop="..", min_tokens=3)
    d.add(tokenizer.encode("a...."))
    d.finish()
    assert d.num_tokens <= 3 or d.stop_reason == ".."


def test_the_stop_string_in_the_output(llm):
    plain, = ask(llm, "Hello", greedy(max_tokens=12))
    stop = plain["text"][3:6]
    without, = ask(llm, "Hello", greedy(max_tokens=12, stop=stop))
    within, = ask(llm, "Hello", greedy(max_tokens=12, stop=stop, include_stop_str_in_output=True))
    assert without["text"] == plain["text"][:plain["text"].index(stop)] and within["text"] == without["text"] + stop
    assert "".join(p["text"] for p in llm.stream("Hello", greedy(max_tokens=12, stop=stop, include_stop_str_in_output=True))) == within["text"]
    token = plain["token_ids"][2]
    shown, = ask(llm, "Hello", greedy(stop_token_ids=[token], include_stop_str_in_output=True))
    assert shown["text"] == llm.tokenizer.decode(plain["token_ids"][:3]) and shown["stop_reason"] == token


def test_ids_only(llm):
    plain, = ask(llm, "Hello", greedy())
    bare, = ask(llm, "Hello", greedy(detokenize=False))
    assert (bare["text"], bare["token_ids"]) == ("", plain["token_ids"])
    with pytest.raises(ValueError, match="stop must be empty if detokenize is False"): greedy(detokenize=False, stop="x")


def test_eos_among_the_stop_tokens_of_one_who_ignores_it(llm):
    out, = ask(llm, "Hello", greedy(stop_token_ids=[2], logit_bias={2: 1000}))
    assert (out["finish_reason"], out["stop_reason"]) == ("stop", 2)
    out, = ask(llm, "Hello", greedy(ignore_eos=False, logit_bias={2: 1000}))
    assert (out["finish_reason"], out["stop_reason"]) == ("stop", None)


def test_text_of_torn_characters(tokenizer):
    wave = tokenizer.encode("a👋b")
    shown = [tokenizer.token_text(t, wave[:i]) for i, t in enumerate(wave)]
    assert "".join(shown) == "a👋b" and "\ufffd" not in "".join(shown) and "" in shown


def test_all_logprobs(llm):
    out, = ask(llm, "Hello there", greedy(max_tokens=1, logprobs=-1, prompt_logprobs=-1))
    assert len(out["logprobs"][0]) == llm.vocab_size and len(out.prompt_logprobs[-1]) == llm.vocab_size
    assert abs(sum(torch.tensor(e.logprob).exp().item() for e in out["logprobs"][0].values()) - 1) < 1e-3


def test_logprobs_of_named_tokens(llm):
    "Of these ids, whatever their place; more of them than max_logprobs would give."
    every, = ask(llm, "Hello there", greedy(max_tokens=3, logprobs=-1))
    wanted = [7, 49151, *range(100, 130)]
    named, = ask(llm, "Hello there", greedy(max_tokens=3, logprob_token_ids=wanted))
    assert named["token_ids"] == every["token_ids"]
    for token, some, all_entries in zip(named["token_ids"], named["logprobs"], every["logprobs"]):
        assert list(some) == [token, *(t for t in wanted if t != token)]
        for t, entry in some.items(): assert entry.logprob == pytest.approx(all_entries[t].logprob, abs=1e-5) and abs(entry.rank - all_entries[t].rank) <= 1
    for bad in (dict(logprob_token_ids=[]), dict(logprob_token_ids=[-1]), dict(logprob_token_ids=[1, 2], logprobs=3)):
        with pytest.raises(ValueError, match="logprob"): greedy(**bad)
    with pytest.raises(ValueError, match="logprob_token_ids must have token ids from 0 to 49151, got 49152"): ask(llm, "x", greedy(logprob_token_ids=[49152]))


def test_max_logprobs(tiny):
    llm = LLM(tiny, num_kv_blocks=20, max_logprobs=3)
    for asked in (4, -1):
        with pytest.raises(ValueError, match=f"logprobs must be at most max_logprobs=3, got {asked}"): ask(llm, "Hi", greedy(logprobs=asked))
    assert len(ask(llm, "Hi", greedy(logprobs=3))[0]["logprobs"][0]) in (3, 4)


@pytest.mark.parametrize("ids, found", [([1, 1, 1], True), ([1, 1], False), ([1, 2, 1, 2, 1, 2], True), ([9, 1, 2, 1, 2, 1, 2], True),
                                        ([1, 2, 3] * 3, False), ([1, 2, 1, 2, 1, 3], False), ([], False)])
def test_repetition(ids, found):
    assert repeats(ids, RepetitionDetectionParams(max_pattern_size=2, min_count=3)) is found


def test_repetition_ends_a_text(llm):
    wanted = RepetitionDetectionParams(max_pattern_size=2, min_count=4)
    out, = ask(llm, "Hello", greedy(max_tokens=30, logit_bias={77: 1000}, repetition_detection=wanted))
    assert (out["token_ids"], out["finish_reason"], out["stop_reason"]) == ([77] * 4, "repetition", "repetition_detected")
    out, = ask(llm, "Hello", greedy(max_tokens=30, min_tokens=7, logit_bias={77: 1000}, repetition_detection=wanted))
    assert len(out["token_ids"]) == 7
    for bad in (dict(max_pattern_size=-1), dict(max_pattern_size=2, min_count=1), dict(max_pattern_size=1, min_pattern_size=2, min_count=2)):
        with pytest.raises(ValueError): RepetitionDetectionParams(**bad)


# ---- Calls ----

def test_chat_options(llm):
    talk, one = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, my"}], greedy(max_tokens=1)
    def prompt(**options): return llm.chat(talk, one, use_tqdm=False, **options)[0].prompt
    assert prompt().endswith("<|im_start|>assistant\n")
    assert prompt(add_generation_prompt=False).endswith("Hello, my<|im_end|>\n")
    assert prompt(add_generation_prompt=False, continue_final_message=True).endswith("Hello, my")
    assert prompt(chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}", chat_template_kwargs={"mood": "!"}) == "[Hi][Hello, my]!"
    assert prompt(chat_template="{{ tools[0].name }}", tools=[{"name": "weather"}]) == "weather"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert llm.chat(parts, one, False, chat_template="{{ messages[0].content }}")[0].prompt == "a\nb"
    with pytest.raises(ValueError, match="messages"): prompt(continue_final_message=True)      # both at once


def test_the_engines_own_template(tiny, tmp_path):
    (tmp_path/"t.jinja").write_text("<{{ messages[0].content }}>")
    for template in ("<{{ messages[0].content }}>", str(tmp_path/"t.jinja")):
        llm = LLM(tiny, num_kv_blocks=20, chat_template=template)
        assert llm.chat([{"role": "user", "content": "Hi"}], greedy(max_tokens=1), False)[0].prompt == "<Hi>"


def test_prompts_with_both(llm):
    out, = ask(llm, TokensPrompt(prompt_token_ids=[5, 6], prompt="as I said"), greedy(max_tokens=1))
    assert (out.prompt, out.prompt_token_ids) == ("as I said", [5, 6])


def test_tokenization_kwargs(llm):
    out, = ask(llm, "one two three", greedy(max_tokens=1), tokenization_kwargs=dict(truncation=True, max_length=2))
    assert out.prompt_token_ids == llm.tokenizer.encode("one two three")[:2]


def test_a_bar_of_ones_own(llm):
    made = []
    def bar(*args, **options): made.append(options); return tqdm(*args, **options | dict(disable=True))
    llm.generate(["a", "b"], greedy(max_tokens=1), use_tqdm=bar)
    assert made[0]["total"] == 2


def test_enqueue(llm):
    ids = llm.enqueue(["a", "b"], greedy(max_tokens=2)) + llm.enqueue("c", greedy(max_tokens=1))
    assert [o.request_id for o in llm.wait_for_completion(use_tqdm=False)] == ids and llm.wait_for_completion(use_tqdm=False) == []


def test_the_models_recommendation(tiny, tmp_path):
    (tmp_path/"generation_config.json").write_text('{"top_k": 7}')
    def params(**options): return LLM(tiny, num_kv_blocks=9, **options).get_default_sampling_params()
    assert params(generation_config=str(tmp_path)).top_k == 7 and params(generation_config="vllm").top_k == 0
    assert params(override_generation_config={"top_k": 3, "max_new_tokens": 5}).max_tokens == 5


def test_other_arguments(tiny):
    llm = LLM(tiny, kv_cache_memory_bytes=2**16, skip_tokenizer_init=True, dtype="float")
    cache = llm.engine.runner.kv_cache
    assert cache.nbytes <= 2**16 and cache.dtype == torch.float32 and ask(llm, [1, 2], greedy(max_tokens=1))[0]["text"] == ""
    assert LLM(tiny, num_gpu_blocks_override=7).engine.scheduler.manager.pool.num_blocks == 7


# ---- Priorities ----

def test_the_most_important_first(tiny):
    llm, ended = LLM(tiny, num_kv_blocks=20, max_num_seqs=1, scheduling_policy="priority"), []
    class Bar:
        def __init__(self, **options): pass
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def update(self): pass
    requests = llm.engine.input_processor.make_requests(["a", "b", "c", "d"], greedy(max_tokens=2), [1, 0, 1, -1])
    from nano_vllm.llm import progress
    ended = [requests.index(r) for r in progress(llm.engine, requests)]
    assert ended == [3, 1, 0, 2]
    with pytest.raises(ValueError, match="priority must be one or a list of 2"): ask(llm, ["a", "b"], greedy(), priority=[1, 2, 3])
    with pytest.raises(ValueError, match="scheduling_policy must be one of fcfs, priority"): LLM(tiny, scheduling_policy="lifo")


@pytest.mark.parametrize("seed", range(5))
def test_a_priority_queue_against_a_sorted_list(seed):
    rng, queue, slow, count = random.Random(seed), PriorityQueue(), [], 0
    for step in range(300):
        what = rng.choice(["add", "add", "remove", "front"])
        if what == "add":
            seq = Sequence(str(step), [1], SamplingParams(), priority=rng.randint(-2, 2))
            queue[seq] = None
            slow.append(seq)
        elif slow:
            seq = rng.choice(slow)
            slow.remove(seq)
            if what == "remove": del queue[seq]
            else:
                queue.move_to_end(seq, last=False)
                slow.insert(0, seq)
        slow.sort(key=lambda s: s.priority)
        assert list(queue) == slow and len(queue) == len(slow) and all(seq in queue for seq in slow)


@pytest.mark.parametrize("seed", range(3))
def test_who_is_less_important_gives_way(seed):
    "Small pools: all finish, nobody who matters more waits for blocks of one who matters less."
    rng, scheduler = random.Random(seed), PriorityScheduler(KVCacheManager(7, 4), 8, 16)
    seqs = [Sequence(str(i), [100 * i + k for k in range(4)], SamplingParams(max_tokens=12), max_len=16, priority=rng.randint(0, 3)) for i in range(8)]
    for seq in seqs: scheduler.add(seq)
    ended = []
    for _ in range(500):
        output = scheduler.schedule()
        assert [s.priority for s in scheduler.running] == sorted(s.priority for s in scheduler.running)
        scheduler.update(output, [7] * len(output.sampled))
        for s in output.sampled:
            if s.seq.num_tokens == s.seq.max_len:
                scheduler.finish(s.seq, "length")
                ended.append(s.seq.priority)
        if len(ended) == 8: break
    assert len(ended) == 8 and scheduler.num_preemptions > 0 and ended == sorted(ended)


# ---- Logits processors ----

class Target(LogitsProcessor):
    "Each request gets the token that it names, and the next one after it, in turn."
    @classmethod
    def validate_params(cls, params):
        if "target" not in (params.extra_args or {"target": 0}): raise ValueError("extra_args must have target")

    def __init__(self, config, device, is_pin_memory): self.rows = {}

    def update_state(self, update):
        if update is None: return
        for r in update.removed: self.rows.pop(r)
        for r, params, prompt, output in update.added: self.rows[r] = (params, output)

    def apply(self, logits):
        assert len(logits) == len(self.rows)
        for r, (params, output) in self.rows.items():
            if params.extra_args: logits[r, params.extra_args["target"] + len(output) % 2] += 1e6
        return logits


@pytest.mark.parametrize("options", [dict(), dict(async_scheduling=True), dict(num_kv_blocks=5)], ids=str)
def test_logits_processors(tiny, options):
    plain, = ids_of(LLM(tiny, num_kv_blocks=20), "Hello", greedy())
    llm = LLM(tiny, logits_processors=[Target], **dict(num_kv_blocks=100) | options)
    params = [greedy(max_tokens=3 + i, extra_args={"target": 10 * i + 5}, logprobs=0) for i in range(6)] + [greedy()]
    outs = ask(llm, ["a b c d e f g h"] * 6 + ["Hello"], params)
    for i, out in enumerate(outs[:6]): assert out["token_ids"] == [10 * i + 5 + n % 2 for n in range(3 + i)]
    assert outs[6]["token_ids"] == plain
    assert all(e.logprob < 0 for o in outs[:6] for entry in o["logprobs"] for e in entry.values())     # of the raw logits
    with pytest.raises(ValueError, match="extra_args must have target"): ask(llm, "x", greedy(extra_args={"a": 1}))
    assert_idle(llm)


def test_processors_by_name(tiny):
    LLM(tiny, num_kv_blocks=9, logits_processors=["nano_vllm.model_runner:LogitsProcessor"])
    with pytest.raises(ValueError, match="logits_processors: 'no.such:Thing'"): LLM(tiny, logits_processors=["no.such:Thing"])


def test_rows_are_told_as_they_change():
    rng, all_seqs, told, old = random.Random(0), [Sequence(str(i), [i], SamplingParams()) for i in range(6)], {}, []
    for _ in range(200):
        new = rng.sample(all_seqs, rng.randint(0, 6))
        update = compare_rows(old, new)
        if update:
            for r in update.removed: del told[r]
            for r, _, prompt, _ in update.added: told[r] = prompt
        assert told == {r: seq.prompt_token_ids for r, seq in enumerate(new)} and (update is None) == (old == new)
        old = new


# ---- Methods ----

def test_llm_engine(llm):
    engine, seen = llm.llm_engine, {}
    whole, = ask(llm, "Hello", greedy())
    for kind in RequestOutputKind: engine.add_request(kind.name, "Hello", greedy(output_kind=kind))
    with pytest.raises(ValueError, match="request_id must be new, got 'DELTA'"): engine.add_request("DELTA", "x", greedy())
    while engine.has_unfinished_requests():
        for out in engine.step(): seen.setdefault(out.request_id, []).append(out)
    assert [len(outs) for outs in seen.values()] == [8, 8, 1]
    assert [o["token_ids"] for o in seen["CUMULATIVE"]] == [whole["token_ids"][:n] for n in range(1, 9)]
    assert sum((o["token_ids"] for o in seen["DELTA"]), []) == whole["token_ids"] and "".join(o["text"] for o in seen["DELTA"]) == whole["text"]
    assert seen["FINAL_ONLY"][0]["text"] == whole["text"] and all(outs[-1].finished for outs in seen.values())
    engine.add_request("x", "Hello", greedy())
    engine.step()
    engine.abort_request(["x", "never asked"])
    assert not engine.has_unfinished_requests()


def test_from_engine_args(tiny):
    args = EngineArgs(tiny, num_kv_blocks=20)
    assert LLM.from_engine_args(args).get_world_size() == 1
    engine = LLMEngine.from_engine_args(args)
    engine.add_request("0", [1, 2], greedy(max_tokens=1))
    assert engine.step()[0].finished


def slow_beams(llm, ids, width, num_tokens):
    "All continuations of all beams, sorted."
    beams = [(0.0, ids)]
    for _ in range(num_tokens):
        longer = []
        for total, tokens in beams:
            entry = ask(llm, tokens and {"prompt_token_ids": tokens}, greedy(max_tokens=1, logprobs=-1))[0]["logprobs"][0]
            longer += [(total + e.logprob, [*tokens, t]) for t, e in entry.items() if t != 2]
        beams = sorted(longer, key=lambda b: -b[0])[:width]
    return beams


def test_beam_search(llm):
    ids = llm.tokenizer.encode("Hello")
    found, = llm.beam_search([{"prompt_token_ids": ids}], BeamSearchParams(beam_width=3, max_tokens=3, length_penalty=0.0))
    expected = slow_beams(llm, ids, 3, 3)
    going_on = [b for b in found.sequences if b.finish_reason is None]
    assert going_on and [b.tokens for b in going_on] == [tokens for _, tokens in expected][:len(going_on)]
    assert [b.cum_logprob for b in going_on] == pytest.approx([total for total, _ in expected][:len(going_on)])
    two = llm.beam_search(["Hello", "A longer one"], BeamSearchParams(beam_width=1, max_tokens=4, ignore_eos=True))
    assert [b.sequences[0].tokens[-4:] for b in two] == ids_of(llm, ["Hello", "A longer one"], greedy(max_tokens=4))
    assert two[0].sequences[0].text.startswith("Hello")
    with pytest.raises(ValueError, match="beam_width"): BeamSearchParams(beam_width=0, max_tokens=3)


def test_reset_prefix_cache(tiny):
    llm = LLM(tiny, num_kv_blocks=50)
    prompt, params = [5] * 40, greedy(max_tokens=12)
    def cached(): return ask(llm, prompt, params)[0].num_cached_tokens
    assert [cached(), cached()] == [0, 32] and llm.reset_prefix_cache() and cached() == 0
    whole, = ask(llm, prompt, params)
    stream = llm.stream(prompt, params)
    pieces = [next(stream), next(stream)]
    assert not llm.reset_prefix_cache() and llm.reset_prefix_cache(reset_running_requests=True)
    assert sum((p["token_ids"] for p in [*pieces, *stream]), []) == whole["token_ids"]
    assert ask(llm, prompt, greedy(skip_reading_prefix_cache=True))[0].num_cached_tokens == 0
    assert_idle(llm)


def test_metrics(llm):
    stream = llm.stream("Hello", greedy())
    next(stream)
    values = {m.name: m.value for m in llm.get_metrics()}
    assert values["vllm:num_requests_running"] == 1 and 0 < values["vllm:kv_cache_usage_perc"] < 1
    stream.close()
    assert all(m.value == 0 for m in llm.get_metrics() if type(m).__name__ == "Gauge")


def test_a_form_changes_logits_and_depends_on_what_was_said():
    p = SamplingParams(structured_outputs={"regex": "a"})
    assert p.edits_logits and p.depends_on_output and status_of("SamplingParams", "structured_outputs")[0] == "works"


def test_aliases():
    p = SamplingParams(seed=-1, logprobs=True, prompt_logprobs=True, temperature=1e-4)
    assert (p.seed, p.logprobs, p.prompt_logprobs, p.temperature, p.skip_reading_prefix_cache) == (None, 1, 1, .01, True)
    for bad in (dict(temperature=2.1), dict(repetition_penalty=0), dict(logprobs=-2), dict(bad_words=[""]), dict(logit_bias={-1: 1}),
                dict(output_kind="DELTA"), dict(extra_args=3), dict(repetition_detection={"x": 1})):
        with pytest.raises(ValueError, match=re.escape(next(iter(bad)))): SamplingParams(**bad)
    assert nano_vllm.SamplingParams is SamplingParams
