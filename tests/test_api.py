"The public interface: scripts written for vLLM and nano-vllm, streams, aborts, seeds, metrics, and what Ctrl-C leaves."
import gc
import re
from dataclasses import replace

import pytest
import torch
from helpers import assert_idle, logits_tolerance, tiny_folder
from nano_vllm import LLM, SamplingParams

# ---- Scripts of others: only the name of the package in the import is changed ----

VLLM_BASIC = '''
from vllm import LLM, SamplingParams

prompts = ["The capital of France is", "A recipe for pancakes:", "My favourite colour is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=12)
llm = LLM(model=MODEL)

outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt, generated_text = output.prompt, output.outputs[0].text
    print(f"Prompt: {prompt!r}, generated: {generated_text!r}")

greedy = SamplingParams(temperature=0.0, max_tokens=8)
[answer] = llm.generate("The capital of France is", greedy, use_tqdm=False)
ids = llm.get_tokenizer().encode("The capital of France is")
[from_ids] = llm.generate({"prompt_token_ids": ids}, sampling_params=greedy, use_tqdm=False)
mixed = llm.generate([{"prompt": "The capital of France is"}, {"prompt_token_ids": ids}], [greedy, greedy])

conversation = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Name a colour."},
]
[reply] = llm.chat(conversation, greedy, use_tqdm=False)
replies = llm.chat([conversation, conversation[1:]], sampling_params=greedy, use_tqdm=False)
'''

VLLM_OPTIONS = '''
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, tokenizer=MODEL, dtype="float32", tensor_parallel_size=1, seed=7, max_model_len=256,
          gpu_memory_utilization=0.95, max_num_seqs=8, max_num_batched_tokens=128, block_size=16,
          enable_prefix_caching=True, enforce_eager=True)
several = llm.generate(["Tell me a story."], SamplingParams(n=3, temperature=1.0, seed=42, max_tokens=10))[0]
again = llm.generate(["Tell me a story."], SamplingParams(n=3, temperature=1.0, seed=42, max_tokens=10))[0]
rated = llm.generate("To be or not to be", SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2))[0]
first = max(rated.outputs[0].logprobs[0].values(), key=lambda lp: lp.logprob)
penalised = llm.generate("one one one", SamplingParams(
    temperature=0.7, top_k=20, min_p=0.01, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1,
    stop=["zzzz"], stop_token_ids=[5], min_tokens=4, max_tokens=9, ignore_eos=True, skip_special_tokens=False))[0]
lines = [(o.index, o.text, o.token_ids, o.cumulative_logprob, o.finish_reason, o.stop_reason) for o in several.outputs]
summary = (several.request_id, several.finished, several.num_cached_tokens, several.metrics, several.prompt_logprobs)
'''

NANO_VLLM_EXAMPLE = '''
import os
from nanovllm import LLM, SamplingParams
from transformers import AutoTokenizer

path = os.path.expanduser(MODEL)
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

sampling_params = SamplingParams(temperature=0.6, max_tokens=20)
prompts = ["who are you?", "count from one to ten"]
prompts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
           for p in prompts]
outputs = llm.generate(prompts, sampling_params)
for prompt, output in zip(prompts, outputs):
    print(f"Prompt: {prompt!r}\\nCompletion: {output['text']!r}")
'''

NANO_VLLM_BENCH = '''
import time
from random import randint, seed
from nanovllm import LLM, SamplingParams

seed(0)
llm = LLM(MODEL, enforce_eager=False, max_model_len=512)
prompt_token_ids = [[randint(0, 10000) for _ in range(randint(10, 100))] for _ in range(6)]
sampling_params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(5, 20)) for _ in range(6)]
llm.generate(["Benchmark: "], SamplingParams())
t = time.time()
outputs = llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
t = time.time() - t
total_tokens = sum(sp.max_tokens for sp in sampling_params)
print(f"{total_tokens} tokens, {total_tokens / t:.1f} tokens/s")
'''


def run_script(source, model):
    "What `source` has defined after a run with nothing changed but the package it imports from."
    names = {"MODEL": str(model)}
    exec(re.sub(r"^from (vllm|nanovllm) import", "from nano_vllm import", source, flags=re.M), names)
    assert_idle(names["llm"])
    return names


@pytest.fixture(scope="module")
def folder(tiny): return tiny


@pytest.fixture(scope="module")
def llm(folder): return LLM(folder, num_kv_blocks=200)


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    "After every test its engines are idle."
    yield
    gc.collect()
    for name in {"llm", "smol"} & set(request.fixturenames): assert_idle(request.getfixturevalue(name))


def texts(outs): return [c.text for out in outs for c in out.outputs]
def tokens(outs): return [c.token_ids for out in outs for c in out.outputs]


def test_vllm_basic(smol, capsys):
    s = run_script(VLLM_BASIC, smol.model_path)
    assert [o.prompt for o in s["outputs"]] == s["prompts"]
    assert all(0 < len(o.outputs[0].token_ids) <= 12 and isinstance(o.outputs[0].text, str) for o in s["outputs"])
    assert capsys.readouterr().out.count("Prompt: ") == 3
    assert s["answer"].outputs[0].text.startswith(" Paris") and s["answer"].prompt_token_ids == s["ids"]
    assert tokens([s["answer"]]) == tokens([s["from_ids"]]) and tokens(s["mixed"]) == tokens([s["answer"]]) * 2
    assert s["reply"].outputs[0].text and tokens(s["replies"])[0] == tokens([s["reply"]])[0]
    template = s["llm"].get_tokenizer().apply_chat_template(s["conversation"], tokenize=False, add_generation_prompt=True)
    assert s["llm"].get_tokenizer().decode(s["reply"].prompt_token_ids) == template


def test_vllm_options(folder):
    s = run_script(VLLM_OPTIONS, folder)
    assert [line[0] for line in s["lines"]] == [0, 1, 2] and len({tuple(line[2]) for line in s["lines"]}) == 3
    assert tokens([s["several"]]) == tokens([s["again"]])
    assert all(line[3] is None and line[4] in ("length", "stop") for line in s["lines"])
    assert s["first"].rank == 1 and isinstance(s["first"].decoded_token, str) and s["first"].logprob < 0
    assert 4 <= len(s["penalised"].outputs[0].token_ids) <= 9
    assert s["summary"][1] is True and isinstance(s["summary"][0], str) and s["summary"][4] is None


def test_nano_vllm_example(folder):
    s = run_script(NANO_VLLM_EXAMPLE, folder)
    for prompt, output in zip(s["prompts"], s["outputs"], strict=True):
        assert output["text"] == output.outputs[0].text and output["token_ids"] == output.outputs[0].token_ids
        assert output.prompt_token_ids == s["tokenizer"].encode(prompt, add_special_tokens=False)


def test_nano_vllm_bench(folder):
    s = run_script(NANO_VLLM_BENCH, folder)
    assert [len(o["token_ids"]) for o in s["outputs"]] == [p.max_tokens for p in s["sampling_params"]]
    assert [o.prompt_token_ids for o in s["outputs"]] == s["prompt_token_ids"]


# ---- What goes in ----

def test_forms_of_a_prompt(llm):
    text, ids = "A cat sat", llm.tokenizer.encode("A cat sat")
    greedy = SamplingParams(temperature=0, max_tokens=4)
    for form in (text, [text], ids, tuple(ids), [ids], {"prompt": text}, [{"prompt_token_ids": ids}], (text,)):
        out, = llm.generate(form, greedy, use_tqdm=False)
        assert out.prompt_token_ids == ids and isinstance(out.prompt_token_ids, list)
        assert tokens([out]) == tokens(llm.generate(text, greedy, use_tqdm=False))
        assert out.prompt == (text if "cat" in str(form) else None)
    assert len(llm.generate([ids, ids], greedy, use_tqdm=False)) == 2  # two prompts, not one of lists


def test_numpy_integers(llm):
    np = pytest.importorskip("numpy")
    params = SamplingParams(temperature=np.float32(0), max_tokens=np.int64(3), seed=np.int64(3), top_p=np.float64(.5))
    out, = llm.generate([np.int64(5), np.int32(6)], params, use_tqdm=False)
    assert out.prompt_token_ids == [5, 6] and all(type(t) is int for t in out.prompt_token_ids + out["token_ids"])
    assert tokens([out]) == tokens(llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False))
    stop = out["token_ids"][0]
    out, = llm.generate([5, 6], SamplingParams(temperature=0, stop_token_ids=[np.int64(stop)]), use_tqdm=False)
    assert out["stop_reason"] == stop


def test_no_prompts_no_answers(llm):
    assert llm.generate([], use_tqdm=False) == llm.generate([], SamplingParams()) == llm.generate((), []) == []
    assert list(llm.stream([])) == []


def test_defaults(llm):
    out, = llm.generate("Hello", use_tqdm=False)
    assert len(out["token_ids"]) <= 16 and out.finished and out.outputs[0].logprobs is None


def test_outputs_are_in_the_order_of_the_prompts(llm):
    prompts = [f"Number {i} " * (7 - i) for i in range(7)]
    params = [SamplingParams(temperature=0, max_tokens=1 + (5 * i) % 7, ignore_eos=True) for i in range(7)]
    outs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outs] == prompts and [len(o["token_ids"]) for o in outs] == [p.max_tokens for p in params]
    assert len({o.request_id for o in outs}) == 7


def test_params_belong_to_their_owner(llm):
    params = SamplingParams(temperature=0, max_tokens=6, stop="never")
    before = repr(params)
    stream = llm.stream("Hello", params)
    first = next(stream)
    params.max_tokens = 1                              # too late to matter for this request
    rest = list(stream)
    params.max_tokens = 6
    assert sum(len(p["token_ids"]) for p in [first, *rest]) == 6 and repr(params) == before


def test_tokenizer_and_folder(llm, folder):
    assert llm.model_path == folder
    ids = llm.tokenizer.encode("text")
    assert isinstance(ids, list) and llm.get_tokenizer().decode(ids) == llm.tokenizer.decode(ids) == "text"


def test_progress_bar(llm, capsys):
    llm.generate(["a", "b", "c"], use_tqdm=True)
    assert re.search(r"100%.*3/3", capsys.readouterr().err)
    llm.generate("a", use_tqdm=False)
    llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_chat_equals_the_rendered_prompt(smol):
    messages, greedy = [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=10)
    rendered = smol.get_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    out, = smol.chat(messages, greedy, use_tqdm=False)
    assert tokens([out]) == tokens(smol.generate(rendered, greedy, use_tqdm=False)) and "Paris" in out["text"]
    both = smol.chat([messages, [dict(messages[0], content="Say hello.")]], [greedy, SamplingParams(max_tokens=2)], use_tqdm=False)
    assert tokens(both)[0] == tokens([out])[0] and len(tokens(both)[1]) <= 2


# ---- How an answer ends ----

STORY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
FRANCE, ONCE = "The capital of France is", "Once upon a time"


@pytest.fixture(scope="module")
def wholes(smol):
    "Greedy answers of 36 and 24 tokens that nothing ends early."
    params = [SamplingParams(temperature=0, max_tokens=36, ignore_eos=True), STORY]
    return dict(zip((FRANCE, ONCE), smol.generate([FRANCE, ONCE], params, use_tqdm=False)))


def test_end_of_text(smol, wholes):
    on = wholes[FRANCE]
    out, shown = smol.generate([FRANCE] * 2, [SamplingParams(temperature=0, max_tokens=64), SamplingParams(
        temperature=0, max_tokens=36, ignore_eos=True, skip_special_tokens=False)], use_tqdm=False)
    assert (out["finish_reason"], out["stop_reason"], out["token_ids"][-1]) == ("stop", None, 2) and 2 not in out["token_ids"][:-1]
    n = len(out["token_ids"])
    assert n < 36 and on["token_ids"][:n] == out["token_ids"] and len(on["token_ids"]) == 36 and on["finish_reason"] == "length"
    assert "<|im_end|>" in shown["text"] and shown["token_ids"] == on["token_ids"]
    assert "<|im_end|>" not in out["text"] + on["text"]


@pytest.mark.parametrize("start,length", [(1, 1), (1, 5), (7, 12), (20, 5), (30, 20)])
def test_stop_strings(smol, wholes, start, length):
    whole = wholes[ONCE]
    stop = whole["text"][start:start + length]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=["not in there", stop])
    out, = smol.generate(ONCE, params, use_tqdm=False)
    assert out["text"] == whole["text"][:whole["text"].index(stop)]
    assert (out["finish_reason"], out["stop_reason"]) == ("stop", stop)
    n = len(out["token_ids"])
    assert out["token_ids"] == whole["token_ids"][:n] and stop in smol.tokenizer.decode(out["token_ids"])
    assert stop not in smol.tokenizer.decode(out["token_ids"][:-1])  # it went no further than it had to
    pieces = list(smol.stream(ONCE, params))
    assert "".join(texts(pieces)) == out["text"] and sum(tokens(pieces), []) == out["token_ids"]
    assert (pieces[-1]["finish_reason"], pieces[-1]["stop_reason"]) == ("stop", stop)


def test_stop_string_that_never_completes(smol, wholes):
    whole = wholes[ONCE]
    params = replace(STORY, stop=whole["text"][-6:] + "never")  # held back to the last token, then given out
    pieces = list(smol.stream(ONCE, params))
    assert "".join(texts(pieces)) == whole["text"] and pieces[-1]["text"].endswith(whole["text"][-6:])
    assert pieces[-1]["finish_reason"] == "length" and pieces[-1]["stop_reason"] is None


def test_stop_token_ids(smol, wholes):
    whole = wholes[ONCE]
    stop = whole["token_ids"][9]
    n = whole["token_ids"].index(stop) + 1
    out, = smol.generate(ONCE, replace(STORY, stop_token_ids=[stop]), use_tqdm=False)
    assert out["token_ids"] == whole["token_ids"][:n] and (out["finish_reason"], out["stop_reason"]) == ("stop", stop)
    assert out["text"] == smol.tokenizer.decode(whole["token_ids"][:n - 1])


def test_min_tokens(smol, wholes):
    "No end of text, stop token or stop string counts before so many tokens."
    first = wholes[FRANCE]["token_ids"][0]
    late, no_token, no_string = smol.generate([FRANCE] * 3, [
        SamplingParams(temperature=0, max_tokens=34, min_tokens=33),
        SamplingParams(temperature=0, max_tokens=12, min_tokens=10, stop_token_ids=[first]),
        SamplingParams(temperature=0, max_tokens=12, min_tokens=10, stop=" Paris")], use_tqdm=False)
    assert len(late["token_ids"]) >= 33 and 2 not in late["token_ids"][:33]
    assert len(no_token["token_ids"]) >= 10 and first not in no_token["token_ids"][:10]
    assert len(no_string["token_ids"]) >= 10 and no_string["text"].startswith(" Paris")  # as in vLLM


@pytest.mark.parametrize("max_tokens", [None, 10**6, 10**30])
def test_room_is_the_last_limit(llm, max_tokens):
    params = SamplingParams(temperature=.9, seed=1, max_tokens=max_tokens, ignore_eos=True)
    for n in (400, 500, 511):
        out, = llm.generate([[7] * n], params, use_tqdm=False)
        assert n + len(out["token_ids"]) == 512 and out["finish_reason"] == "length"


# ---- Log-probabilities ----

@pytest.fixture(scope="module")
def theirs(folder):
    import transformers
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def check_logprobs(theirs, llm, out, k, prompt_k):
    "All log-probabilities of `out` against transformers' logits, and their form against vLLM's."
    completion, prompt_ids = out.outputs[0], out.prompt_token_ids
    ids = prompt_ids + completion.token_ids
    logits = theirs(torch.tensor([ids])).logits[0]
    expected, allowed = logits.log_softmax(-1), 2 * logits_tolerance(llm.engine.runner.model.config, len(ids), logits)  # its own, and that of the sum
    assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(prompt_ids)
    entries = [(e, prompt_k) for e in out.prompt_logprobs[1:]] + [(e, k) for e in completion.logprobs]
    assert len(entries) == len(ids) - 1
    for (entry, num), token, row in zip(entries, ids[1:], expected):
        assert num <= len(entry) <= num + 1 and token in entry
        best = row.topk(num).indices.tolist() if num else []
        assert {token} <= set(entry) and all(t in entry or row[t] < row[token] + allowed for t in best)
        for t, logprob in entry.items():
            assert type(t) is int and type(logprob.rank) is int and type(logprob.logprob) is float
            assert abs(logprob.logprob - row[t].item()) < allowed
            assert (row > row[t] + allowed).sum() < logprob.rank <= (row > row[t] - allowed).sum() + 1
            alone = llm.tokenizer.decode([t], skip_special_tokens=False)     # of torn characters test_contract.py tells
            assert logprob.decoded_token == alone or alone.endswith("\ufffd") and "\ufffd" not in logprob.decoded_token
    assert abs(completion.cumulative_logprob - sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids))) < 1e-4


@pytest.mark.parametrize("k,prompt_k", [(3, 2), (0, 0), (20, 20), (1, 5)])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_logprobs(llm, theirs, k, prompt_k, temperature):
    params = SamplingParams(temperature=temperature, seed=5, max_tokens=6, logprobs=k, prompt_logprobs=prompt_k, ignore_eos=True,
                            repetition_penalty=1.3)
    for _ in range(2):  # the second time the prompt's KV stands in the cache
        out, = llm.generate("Why should the prompt be read again, when it has been read before? Because.", params, use_tqdm=False)
        check_logprobs(theirs, llm, out, k, prompt_k)


def test_logprobs_of_chunks_and_of_preempted_sequences(folder, theirs):
    llm = LLM(folder, max_model_len=64, num_kv_blocks=20, block_size=4, max_num_batched_tokens=7)
    params = SamplingParams(temperature=1, max_tokens=25, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    outs = llm.generate([list(range(10 * i, 10 * i + 9 + i)) for i in range(1, 9)], params, use_tqdm=False)
    assert llm.engine.scheduler.num_preemptions > 0
    for out in outs: check_logprobs(theirs, llm, out, 2, 2)
    assert_idle(llm)


def test_logprobs_that_nobody_asked_for(llm):
    out, other = llm.generate(["a", "b"], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=3, logprobs=1)], use_tqdm=False)
    assert out["logprobs"] is out["cumulative_logprob"] is out.prompt_logprobs is None and len(other["logprobs"]) == len(other["token_ids"])


# ---- Seeds, n, and company ----

def test_seeds(folder, llm):
    def sampled(llm, seed=None, prompts=("Hello", "Hello")):
        params = SamplingParams(temperature=1, max_tokens=12, seed=seed, ignore_eos=True)
        return tokens(llm.generate(list(prompts), params, use_tqdm=False))
    a, b = sampled(llm)
    assert a != b and sampled(llm) != [a, b]  # without a seed, no two requests are the same
    assert sampled(llm, 3) == sampled(llm, 3) and len(set(map(tuple, sampled(llm, 3)))) == 1
    assert sampled(llm, 3) != sampled(llm, 4) and sampled(llm, -1) != sampled(llm, 1)
    assert sampled(LLM(folder, num_kv_blocks=20, seed=5)) == sampled(LLM(folder, num_kv_blocks=20, seed=5))
    assert sampled(LLM(folder, num_kv_blocks=20, seed=5)) != sampled(LLM(folder, num_kv_blocks=20, seed=6))


def company(i):
    return [SamplingParams(temperature=0, max_tokens=20), SamplingParams(temperature=1.7, max_tokens=11 + i),
            SamplingParams(top_k=5, max_tokens=9, logprobs=3), SamplingParams(n=3, top_p=.5, max_tokens=5),
            SamplingParams(repetition_penalty=1.5, min_p=.1, max_tokens=30, seed=i)][i % 5]


@pytest.mark.parametrize("params", [
    dict(temperature=0), dict(temperature=.8, seed=11), dict(temperature=1.2, top_p=.9, seed=12),
    dict(temperature=.9, top_k=30, min_p=.02, seed=13, presence_penalty=1., frequency_penalty=.3),
    dict(temperature=1., seed=14, n=3), dict(temperature=0, repetition_penalty=1.4)], ids=str)
def test_the_same_whoever_shares_the_batch(folder, llm, params):
    prompt, params = "In a hole in the ground there lived a", SamplingParams(max_tokens=24, ignore_eos=True, **params)
    expected = tokens(llm.generate(prompt, params, use_tqdm=False))
    tight = LLM(folder, num_kv_blocks=20, block_size=4, max_model_len=80, max_num_batched_tokens=13, max_num_seqs=6)
    for engine in (llm, tight):
        for place in (0, 9):
            prompts, all_params = [f"Companion {i} says " * (1 + i % 3) for i in range(9)], [company(i) for i in range(9)]
            prompts.insert(place, prompt)
            all_params.insert(place, params)
            assert tokens([engine.generate(prompts, all_params, use_tqdm=False)[place]]) == expected
    assert tight.engine.scheduler.num_preemptions > 0
    assert_idle(tight)


def test_greedy_rows_of_a_mixed_batch(llm):
    prompts = [f"Line {i} of the poem" for i in range(6)]
    greedy, hot = SamplingParams(temperature=0, max_tokens=15), SamplingParams(temperature=2, max_tokens=15)
    alone = [tokens(llm.generate(p, greedy, use_tqdm=False))[0] for p in prompts]
    mixed = tokens(llm.generate(prompts, [greedy, hot] * 3, use_tqdm=False))
    assert mixed[::2] == alone[::2] and all(a != b for a, b in zip(mixed[1::2], alone[1::2]))


def test_n_answers_share_the_blocks_of_their_prompt(llm):
    ids = list(range(100, 170))  # four full blocks of 16, and 6 tokens more
    stream = llm.stream([ids], SamplingParams(n=4, temperature=1, max_tokens=30, seed=0, ignore_eos=True))
    pool, seen = llm.engine.scheduler.manager.pool, 0
    for _ in stream:
        tables = [seq.block_table for seq in llm.engine.scheduler.running]
        if len(tables) < 4: continue
        seen += 1
        assert all(table[:4] == tables[0][:4] for table in tables) and len({table[4] for table in tables}) == 4
        assert [pool.ref_counts[b] for b in tables[0][:4]] == [4] * 4
        assert pool.num_blocks - len(pool.free_blocks) == 4 + sum(len(table) - 4 for table in tables)
    assert seen > 10


def test_n_answers(llm):
    out, = llm.generate("Hello", SamplingParams(n=5, temperature=1, max_tokens=7, ignore_eos=True), use_tqdm=False)
    assert [c.index for c in out.outputs] == list(range(5)) and len({tuple(c.token_ids) for c in out.outputs}) == 5
    assert [len(c.token_ids) for c in out.outputs] == [7] * 5
    many, = llm.generate("Hello", SamplingParams(n=300, temperature=1, max_tokens=2), use_tqdm=False)  # more than may run at a time
    assert len(many.outputs) == 300


def test_two_engines(llm, tmp_path):
    other = LLM(tiny_folder(tmp_path, hidden_size=48, num_attention_heads=3, num_key_value_heads=3), num_kv_blocks=30, block_size=8)
    params = SamplingParams(temperature=.7, seed=9, max_tokens=20, ignore_eos=True)
    expected = [texts(e.generate("Two engines", params, use_tqdm=False))[0] for e in (llm, other)]
    streams, parts = [e.stream("Two engines", params) for e in (llm, other)], ["", ""]
    for _ in range(21):
        for i, stream in enumerate(streams): parts[i] += "".join(texts([p for p in [next(stream, None)] if p]))
    assert parts == expected and parts[0] != parts[1]
    assert_idle(other)


def test_prefix_cache_on_and_off(folder, llm):
    off = LLM(folder, num_kv_blocks=200, enable_prefix_caching=False)
    params, prompts = SamplingParams(temperature=.8, seed=2, n=2, max_tokens=15, ignore_eos=True), ["again and " * 30, "again and " * 31]
    expected = tokens(llm.generate(prompts, params, use_tqdm=False))
    for _ in range(2):
        outs = off.generate(prompts, params, use_tqdm=False)
        assert tokens(outs) == expected and [o.num_cached_tokens for o in outs] == [0, 0]
    assert_idle(off)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 48])
def test_prompts_that_end_at_the_end_of_a_block(llm, n):
    "A prompt that stands in the cache as a whole still has its last token computed."
    params, ids = SamplingParams(temperature=.8, seed=2, n=2, max_tokens=20, logprobs=1, ignore_eos=True), [1000 + n, *range(n - 1)]
    first, again, longer = (llm.generate([ids + more], params, use_tqdm=False)[0] for more in ([], [], [7]))
    assert tokens([first]) == tokens([again]) and longer.num_cached_tokens == n // 16 * 16
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, (n - 1) // 16 * 16)
    for a, b in zip(first.outputs, again.outputs): assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)


# ---- Streams ----

@pytest.mark.parametrize("params", [
    dict(temperature=0), dict(temperature=1.2, seed=1), dict(temperature=1, seed=2, n=3), dict(temperature=0, stop=["a", "e"]),
    dict(temperature=1.5, seed=3, logprobs=2), dict(temperature=2, seed=5, skip_special_tokens=False)], ids=str)
@pytest.mark.parametrize("prompts", ["Once upon a time", ["One", "Two two two", "Three 🎉"]], ids=["one", "three"])
def test_pieces_join(llm, params, prompts):
    params = SamplingParams(max_tokens=25, ignore_eos=True, **params)
    whole = llm.generate(prompts, params, use_tqdm=False)
    joined, last = {}, {}
    for piece in llm.stream(prompts, params):
        assert piece.finished or any(c.text for c in piece.outputs) and not any(r.request_id == piece.request_id for r in last.values())
        for c in piece.outputs:
            key = piece.prompt, c.index
            old = joined.setdefault(key, ["", [], []])
            joined[key] = [old[0] + c.text, old[1] + c.token_ids, old[2] + (c.logprobs or [])]
            if piece.finished: last[key] = piece
    assert len(joined) == len(last) == len(whole) * params.n
    for out in whole:
        for c in out.outputs:
            text, token_ids, logprobs = joined[out.prompt, c.index]
            assert (text, token_ids) == (c.text, c.token_ids) and len(logprobs) == (len(token_ids) if params.logprobs else 0)
            end = last[out.prompt, c.index].outputs[c.index]
            assert (end.finish_reason, end.stop_reason) == (c.finish_reason, c.stop_reason)


def test_pieces_come_as_they_are_made(llm):
    "A reader has the first piece while the rest is still to be computed."
    steps, step = [], llm.engine.step
    llm.engine.step = lambda: steps.append(1) or step()
    try:
        stream, seen = llm.stream("Hello there", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)), []
        for piece in stream: seen.append(len(steps))
    finally: del llm.engine.step
    assert len(steps) == 30 and seen[0] <= 4 and len(set(seen)) > 10


LONG, SHORT = (SamplingParams(temperature=.9, seed=s, max_tokens=n, ignore_eos=True) for s, n in ((1, 40), (2, 8)))


def test_two_streams_and_a_generate_between(llm):
    expected = [llm.generate(p, q, use_tqdm=False)[0] for p, q in (("A cat", LONG), ("A dog", LONG), ("A cow", SHORT))]
    one, two, got = llm.stream("A cat", LONG), llm.stream("A dog", LONG), ([], [])
    for i in range(5):
        got[0].append(next(one))
        got[1].append(next(two))
        if i == 2: between, = llm.generate("A cow", SHORT, use_tqdm=False)
    got[1].extend(two)
    got[0].extend(one)
    for pieces, whole in zip(got, expected):
        assert "".join(texts(pieces)) == whole["text"] and sum(tokens(pieces), []) == whole["token_ids"]
        assert pieces[-1].finished and not any(p.finished for p in pieces[:-1])
    assert tokens([between]) == tokens(expected[2:])


def test_a_stream_that_others_finish(llm):
    "Its request ends while somebody else turns the wheel; nothing of it may be lost."
    whole, = llm.generate("A cat", SHORT, use_tqdm=False)
    stream = llm.stream("A cat", SHORT)
    pieces = [next(stream)]
    llm.generate("A dog", LONG, use_tqdm=False)
    pieces += stream
    assert "".join(texts(pieces)) == whole["text"] and sum(tokens(pieces), []) == whole["token_ids"]
    assert pieces[-1].finished and pieces[-1]["finish_reason"] == "length"


def test_a_stream_is_queued_when_it_is_first_read(llm):
    stream = llm.stream("A cat", SHORT)
    assert len(llm.engine.requests) <= 1
    del stream
    gc.collect()
    assert_idle(llm)


@pytest.mark.parametrize("num_read", [1, 5])
def test_closing_a_stream(llm, num_read):
    other = llm.stream("A dog", LONG)
    kept = [next(other)]
    stream = llm.stream(["A cat " * 20, "A cow"], SamplingParams(n=2, max_tokens=40, ignore_eos=True))
    for _ in range(num_read): next(stream)
    assert len(llm.engine.requests) == 3
    stream.close()
    assert len(llm.engine.requests) == 1
    assert list(stream) == []
    kept += other
    assert "".join(texts(kept)) == texts(llm.generate("A dog", LONG, use_tqdm=False))[0]
    assert_idle(llm)


def test_an_exception_in_the_reader(llm):
    with pytest.raises(ZeroDivisionError):
        for piece in llm.stream("A cat", LONG): 1 / 0
    gc.collect()
    assert_idle(llm)


def test_bad_input_to_a_stream_is_refused_at_the_call(llm):
    for bad in ("", [], [[]], [1, -1]):
        if bad == []: continue
        with pytest.raises(ValueError): llm.stream(bad)
    assert_idle(llm)


# ---- Abort ----

def test_abort(llm):
    stream, other = llm.stream("A cat", LONG), llm.stream("A dog", LONG)
    kept, lost = [next(other)], [next(stream) for _ in range(3)]
    llm.engine.abort(lost[0].request_id)
    lost += stream
    assert lost[-1].finished and lost[-1]["finish_reason"] == "abort"
    whole, = llm.generate("A cat", LONG, use_tqdm=False)
    made = sum(tokens(lost), [])
    assert 3 <= len(made) < 40 and made == whole["token_ids"][:len(made)]
    kept += other
    assert sum(tokens(kept), []) == tokens(llm.generate("A dog", LONG, use_tqdm=False))[0]


def test_abort_of_what_waits_and_of_what_is_unknown(folder):
    llm = LLM(folder, num_kv_blocks=100, max_num_seqs=1)
    engine = llm.engine
    requests = engine.input_processor.make_requests(["A cat", "A dog", "A cow"], LONG)
    for r in requests: engine.add(r)
    for _ in range(3): engine.step()
    for i in (1, 1, 0): engine.abort(requests[i].request_id)
    engine.abort("nobody")
    while engine.requests: engine.step()
    reasons = [r.output()["finish_reason"] for r in requests]
    assert reasons == ["abort", "abort", "length"] and [len(r.output()["token_ids"]) for r in requests] == [3, 0, 40]
    assert requests[1].output().finished and requests[1].output()["text"] == ""
    for name in ("queue_time", "time_to_first_token", "tokens_per_second"):
        getattr(requests[1].output().metrics, name)  # there is no number to give, but no reason to fail either
        getattr(requests[0].output().metrics, name)
    assert_idle(llm)


# ---- Metrics ----

def test_metrics(llm):
    prompt = "The metrics of a request are read from a clock. " * 5
    first, = llm.generate(prompt, LONG, use_tqdm=False)
    again, = llm.generate(prompt, LONG, use_tqdm=False)
    n = len(first.prompt_token_ids)
    assert first.num_cached_tokens == 0 and again.num_cached_tokens == (n - 1) // 16 * 16 > 0
    for m in (first.metrics, again.metrics):
        assert 0 <= m.queue_time < m.time_to_first_token and m.tokens_per_second > 0 and m.num_generated_tokens == 40
        assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.finished_time
        assert m.tokens_per_second == pytest.approx(40 / (m.finished_time - m.first_scheduled_time))


def test_metrics_of_those_who_wait(folder):
    outs = LLM(folder, num_kv_blocks=100, max_num_seqs=1).generate(["A cat", "A dog"], SHORT, use_tqdm=False)
    a, b = (o.metrics for o in outs)
    assert b.first_scheduled_time >= a.finished_time and b.queue_time > a.queue_time
    assert b.time_to_first_token > b.queue_time


# ---- Interrupts ----

class Trap:
    "Calls `function`, but raises `error` before or after the call of number `at`."
    def __init__(self, function, at, after, error=KeyboardInterrupt): self.function, self.at, self.after, self.error = function, at, after, error
    def __call__(self, *args, **kw):
        self.at -= 1
        if self.at == 0 and not self.after: raise self.error
        result = self.function(*args, **kw)
        if self.at == 0 and self.after: raise self.error
        return result


PLACES = ["runner.execute", "launch", "scheduler.schedule", "note_start", "scheduler.manager.begin", "runner.input_batch.prepare",
          "scheduler.update", "scheduler.finish", "receive", "scheduler.manager.cache_blocks",   # these, while a step is booked
          "receive_logprobs", "output_processor.process", "output_processor.keep_logprobs", "output_processor.finish"]
ONCE_FOR_EACH = ["note_start", "scheduler.finish", "scheduler.manager.begin", "scheduler.manager.cache_blocks", "output_processor.finish"]


@pytest.fixture
def rough(folder, made={}):
    "An LLM for rough handling; a new one if the last test has left something behind."
    try: assert_idle(made["llm"])
    except (KeyError, AssertionError): made["llm"] = LLM(folder, num_kv_blocks=100)
    return made["llm"]


def set_trap(monkeypatch, llm, place, at, after, error=KeyboardInterrupt):
    *path, name = place.split(".")
    owner = llm.engine
    for part in path: owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, Trap(getattr(owner, name), at, after, error))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("n", [1, 2])
def test_interrupt_leaves_nothing_behind(rough, monkeypatch, place, after, n):
    prompts, params = ["A cat " * 20, "A dog " * 9, "A cow " * 9], SamplingParams(temperature=.8, seed=3, n=n, max_tokens=4, logprobs=1, ignore_eos=True)
    expected = rough.generate(prompts, params, use_tqdm=False)
    for at in (1, 3):
        with monkeypatch.context() as m:
            set_trap(m, rough, place, at, after)
            with pytest.raises(KeyboardInterrupt): rough.generate(["!" * at + p for p in prompts], params, use_tqdm=False)
        assert_idle(rough)
        outs = rough.generate(prompts, params, use_tqdm=False)
        assert tokens(outs) == tokens(expected) and texts(outs) == texts(expected)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_interrupt_does_not_touch_a_stream_beside_it(rough, monkeypatch, place, after):
    params = SamplingParams(temperature=.9, seed=1, max_tokens=20, logprobs=1, ignore_eos=True)
    whole, = rough.generate("A cat", params, use_tqdm=False)
    stream = rough.stream("A cat", params)
    pieces = [next(stream)]
    with monkeypatch.context() as m:
        set_trap(m, rough, place, 2 if place in ONCE_FOR_EACH else 4, after)
        with pytest.raises(KeyboardInterrupt): rough.generate(["A dog " * 8, "A cow " * 8], replace(SHORT, logprobs=1), use_tqdm=False)
    pieces += stream
    assert sum(tokens(pieces), []) == whole["token_ids"] and "".join(texts(pieces)) == whole["text"]
    rated = sum((p["logprobs"] for p in pieces), [])
    assert [set(entry) for entry in rated] == [set(entry) for entry in whole["logprobs"]]


def test_an_error_inside_a_step(rough, monkeypatch):
    with monkeypatch.context() as m:
        set_trap(m, rough, "runner.execute", 2, False, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"): rough.generate(["A cat", "A dog"], LONG)
    assert_idle(rough)
    assert len(rough.generate("A cat", use_tqdm=False)) == 1


def test_a_call_without_parameters_follows_generation_config(tmp_path):
    "As in vLLM: the recommendation stands for the whole of sampling_params, and is not mixed with a user's own."
    folder = tiny_folder(tmp_path)
    (folder/"generation_config.json").write_text('{"temperature": 0.0, "max_new_tokens": 3, "top_k": 7, "eos_token_id": [2, 4], "do_sample": true}')
    llm = LLM(folder, num_kv_blocks=20)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3, top_k=7)
    expected = llm.generate("A cat", SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True), use_tqdm=False)[0]["token_ids"]
    assert llm.generate("A cat", use_tqdm=False)[0]["token_ids"] == expected[:3]
    assert [t for piece in llm.stream("A cat") for t in piece["token_ids"]] == expected[:3]
    assert len(llm.generate("A cat", SamplingParams(ignore_eos=True), use_tqdm=False)[0]["token_ids"]) == 16
    llm.get_default_sampling_params().max_tokens = 9   # a copy
    assert llm.get_default_sampling_params().max_tokens == 3
