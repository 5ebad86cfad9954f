"""Bad input: each case is a ValueError that names field, value and limit, and the engine goes on as if nothing had happened."""
import json
import math
import re
import shutil

import pytest
import torch
from helpers import assert_idle
from nano_vllm import LLM, SamplingParams
from nano_vllm.sampling_params import log_once
from safetensors.torch import load_file, save_file

GOOD = "A good request, on either side of the bad one", SamplingParams(temperature=.7, seed=3, max_tokens=6, logprobs=1, ignore_eos=True)
NAN, INF = math.nan, math.inf
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def folder(tiny): return tiny


@pytest.fixture(scope="module")
def llm(folder): return LLM(folder, num_kv_blocks=20)  # 320 tokens; max_model_len is 512


@pytest.fixture(scope="module")
def answer(llm): return ask(llm)


def ask(llm): return [(o["text"], o["token_ids"], o["logprobs"]) for o in llm.generate(*GOOD, use_tqdm=False)]


def refused(llm, answer, call, *parts):
    "`call()` raises a ValueError with all of `parts` in its message, and `llm` does not notice."
    with pytest.raises(ValueError) as e: call()
    assert type(e.value) is ValueError, type(e.value)  # a UnicodeDecodeError, say, is one by accident
    for part in parts: assert re.search(part, str(e.value)), (part, str(e.value))
    assert_idle(llm)
    assert ask(llm) == answer
    assert_idle(llm)


def cases(table):
    "Test ids that can be read, and are the same in all processes: the value without addresses, shortened."
    def name(i, v): return re.sub(" at 0x[0-9a-f]+", "", f"{i} {v!r}")[:50].encode("ascii", "replace").decode()
    return pytest.mark.parametrize("value,parts", [pytest.param(v, p, id=name(i, v)) for i, (v, *p) in enumerate(table)])


# ---- Prompts ----

class Odd:
    def __repr__(self): return "<odd>"


@cases([
    (None, "prompts", "None"), (5, "prompts", "5"), (1.5, "prompts", "1.5"), (NAN, "prompts", "nan"), (True, "prompts", "True"),
    (b"hi", "prompts", "b'hi'"), (bytearray(b"hi"), "prompts", "bytearray"), ({"hi"}, "prompts", "hi"), (range(3), "prompts", "range"),
    (Odd(), "prompts", "<odd>"), ((p for p in "ab"), "prompts", "generator"),
    ("", r"prompts\[0\]", "prompt", "''", "1 token"), ([""], r"prompts\[0\]", "1 token"), ([[]], r"prompts\[0\]", "1 token"),
    (["fine", ""], r"prompts\[1\]", "1 token"), (["fine", None], r"prompts\[1\]", "None"), (["fine", 5], r"prompts\[1\]", "5"),
    ([5, "fine"], r"prompts\[0\]", "5"), ([1.0, 2.0], r"prompts\[0\]", "1.0"), ([[1.0]], r"prompts\[0\]", r"\[1.0\]"),
    ([[[1, 2]]], r"prompts\[0\]", r"\[\[1, 2\]\]"), ([["a", "b"]], r"prompts\[0\]", "'a', 'b'"), ([[1, None]], r"prompts\[0\]", "None"),
    ([b"hi"], r"prompts\[0\]", "b'hi'"), ([{1, 2}], r"prompts\[0\]", r"\{1, 2\}"),
    ([1, -1], "token ids", "-1", "0 to 49151"), ([49152], "token ids", "49152", "0 to 49151"), ([10**30], "token ids", "10{30}", "49151"),
    ([2**63], "token ids", str(2**63), "49151"), ([-2**63], "token ids", str(-2**63), "0 to"), ([True, False], "token ids", "True"),
    ("\ud800", r"prompts\[0\]", r"\\ud800"), ("fine until \udfff here", r"prompts\[0\]", r"\\udfff"),
    ({}, "prompt_token_ids"), ({"text": "hi"}, "prompt_token_ids", "text"), ({"prompt": None}, "prompt", "None"),
    ({"prompt": "a", "prompt_token_ids": [-1]}, "token ids", "-1"), ({"prompt": "a", "multi_modal_data": {}}, "multi_modal_data"), ({"prompt_token_ids": "abc"}, r"prompts\[0\]"),
    ({"prompt_token_ids": None}, "None"), ({"prompt_token_ids": []}, "1 token"), ({"prompt_token_ids": [1.5]}, "1.5"),
    ({"prompt": ""}, "1 token"), ({"prompt": 5}, "5"), ({"prompt": {"prompt": "a"}}, "prompt"), ({"prompt": "\ud83d"}, r"\\ud83d"),
    ({"a": 1, 3: 2}, "prompt_token_ids"), ({"prompt": "hi", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
    ([[7] * 512], r"prompts\[0\]", "512 tokens", "max_model_len"), ([[7] * 5000], "5000 tokens", "max_model_len is 512"),
    ("word " * 600, "60[01] tokens", "512"), ([[7] * 320], "320 (prompt )?tokens", "max_tokens=8", "num_kv_blocks", "20"),
])
def test_prompts(llm, answer, value, parts):
    params = SamplingParams(max_tokens=8)
    refused(llm, answer, lambda: llm.generate(value, params, use_tqdm=False), *parts)
    refused(llm, answer, lambda: llm.stream(value, params), *parts)


def test_arrays_are_no_prompts(llm, answer):
    np = pytest.importorskip("numpy")
    for array in (np.array([1, 2, 3]), torch.tensor([1, 2, 3]), np.array([[1, 2], [3, 4]]), np.array([]), torch.tensor([])):
        refused(llm, answer, lambda: llm.generate(array, use_tqdm=False), "prompts")
        refused(llm, answer, lambda: llm.generate({"prompt_token_ids": array}, use_tqdm=False), r"prompts?\b")
        refused(llm, answer, lambda: llm.generate([array], use_tqdm=False), r"prompts\[0\]")
    refused(llm, answer, lambda: llm.generate([np.float32(3)], use_tqdm=False), r"prompts\[0\]")
    refused(llm, answer, lambda: llm.generate([np.int64(49152)], use_tqdm=False), "49152", "49151")
    refused(llm, answer, lambda: llm.generate([np.int64(-1)], use_tqdm=False), "-1")


def test_the_limits_themselves_are_fine(llm):
    llm.generate(["\x00", [0, 49151], " ", "\n", "😀\u200d", "a\u0301"], use_tqdm=False)
    out, = llm.generate([[7] * 312], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)
    assert len(out["token_ids"]) == 9  # the last token needs no KV: 320 slots are enough for 321 tokens
    assert_idle(llm)


# ---- Sampling parameters ----

@cases([
    (dict(n=0), "n must", "1 to", "0"), (dict(n=-3), "n must", "-3"), (dict(n=1.5), "n must", "1.5"), (dict(n=10**9), "n must", "10{9}"),
    (dict(n=True), "n must", "True"), (dict(n=None), "n must", "None"), (dict(n=2, temperature=0), "n must be 1", "2"),
    (dict(temperature=-.1), "temperature", "-0.1", "0"), (dict(temperature=NAN), "temperature", "nan"),
    (dict(temperature=INF), "temperature", "inf"), (dict(temperature="1"), "temperature", "'1'"), (dict(temperature=None), "temperature", "None"),
    (dict(temperature=True), "temperature", "True"), (dict(temperature=10**400), "temperature", r"10{99} \.\.\. 0+ \(401 characters\)"), (dict(temperature=1j), "temperature", "1j"),
    (dict(top_p=0), "top_p", "0"), (dict(top_p=1.01), "top_p", "1.01", "to 1"), (dict(top_p=-1), "top_p", "-1"), (dict(top_p=NAN), "top_p", "nan"),
    (dict(top_p="all"), "top_p", "'all'"), (dict(top_k=-2), "top_k", "-2", "-1"), (dict(top_k=2.0), "top_k", "2.0"), (dict(top_k=None), "top_k", "None"),
    (dict(min_p=-.1), "min_p", "-0.1"), (dict(min_p=1.5), "min_p", "1.5", "to 1"), (dict(min_p=[]), "min_p", r"\[\]"),
    (dict(presence_penalty=2.1), "presence_penalty", "2.1", "2"), (dict(presence_penalty=NAN), "presence_penalty", "nan"),
    (dict(frequency_penalty=-2.1), "frequency_penalty", "-2.1", "-2"), (dict(repetition_penalty=0), "repetition_penalty", "0"),
    (dict(repetition_penalty=-1), "repetition_penalty", "-1"), (dict(repetition_penalty=INF), "repetition_penalty", "inf"),
    (dict(seed="abc"), "seed", "'abc'"), (dict(seed=1.0), "seed", "1.0"), (dict(seed=2**63), "seed", str(2**63)), (dict(seed=True), "seed", "True"),
    (dict(max_tokens=0), "max_tokens", "0", "1"), (dict(max_tokens=-1), "max_tokens", "-1"), (dict(max_tokens=1.0), "max_tokens", "1.0"),
    (dict(max_tokens="16"), "max_tokens", "'16'"), (dict(max_tokens=NAN), "max_tokens", "nan"), (dict(max_tokens=INF), "max_tokens", "inf"),
    (dict(min_tokens=-1), "min_tokens", "-1", "0"), (dict(min_tokens=17), "min_tokens", "17", "max_tokens=16"), (dict(min_tokens=None), "min_tokens", "None"),
    (dict(stop=""), "stop", "''"), (dict(stop=["ok", ""]), "stop", "'ok', ''"), (dict(stop=3), "stop", "3"), (dict(stop=[3]), "stop", r"\[3\]"),
    (dict(stop=b"x"), "stop", "b'x'"), (dict(stop=[None]), "stop", "None"), (dict(stop={"a": 1}), "stop", "'a': 1"), (dict(stop=[["a"]]), "stop", "'a'"),
    (dict(stop="\ud800"), "stop", r"\\ud800"), (dict(stop=["ok", "\udc00"]), "stop", r"\\udc00"),
    (dict(bad_words="\u3000"), "bad_words", "3000"), (dict(bad_words=["ok", " \n"]), "bad_words", "ok"),
    (dict(stop_token_ids=5), "stop_token_ids", "5"), (dict(stop_token_ids=[-1]), "stop_token_ids", "-1", "0"), (dict(stop_token_ids="12"), "stop_token_ids", "'12'"),
    (dict(stop_token_ids=["1"]), "stop_token_ids", "'1'"), (dict(stop_token_ids=[1.0]), "stop_token_ids", "1.0"), (dict(stop_token_ids=[True]), "stop_token_ids", "True"),
    (dict(stop_token_ids=[None]), "stop_token_ids", "None"), (dict(stop_token_ids=[[1]]), "stop_token_ids", r"\[\[1\]\]"),
    (dict(ignore_eos=1), "ignore_eos", "1"), (dict(ignore_eos=None), "ignore_eos", "None"), (dict(ignore_eos="no"), "ignore_eos", "'no'"),
    (dict(logprobs=21), "logprobs", "21", "20"), (dict(logprobs=-1), "logprobs", "-1"), (dict(logprobs=False), "logprobs", "False"), (dict(logprobs=1.0), "logprobs", "1.0"),
    (dict(prompt_logprobs=21), "prompt_logprobs", "21", "20"), (dict(prompt_logprobs="1"), "prompt_logprobs", "'1'"), (dict(skip_special_tokens=0), "skip_special_tokens", "0"),
])
def test_sampling_params(llm, answer, value, parts):
    refused(llm, answer, lambda: llm.generate("hi", SamplingParams(**value), use_tqdm=False), *parts)
    if "n" in value and "temperature" in value: return
    changed = SamplingParams()  # made well, and spoiled later
    for name, v in value.items(): setattr(changed, name, v)
    refused(llm, answer, lambda: llm.generate(["hi", "ho"], [SamplingParams(), changed], use_tqdm=False), *parts)
    refused(llm, answer, lambda: llm.stream("hi", changed), *parts)


P = SamplingParams()


@cases([
    ([], "sampling_params", "list of 0", "2"), ([P], "sampling_params", "list of 1", "2"), ([P] * 3, "sampling_params", "list of 3", "2"),
    ({"temperature": 1}, "sampling_params", "temperature"), ("greedy", "sampling_params", "'greedy'"), (0, "sampling_params", "0"),
    (SamplingParams, "sampling_params", "class"), ([P, None], "sampling_params", "None"), ([P, {}], "sampling_params", r"\{\}"), ([[P], [P]], "sampling_params"),
    (False, "sampling_params", "False"), (Odd(), "sampling_params", "<odd>"),
])
def test_lists_of_parameters(llm, answer, value, parts):
    refused(llm, answer, lambda: llm.generate(["hi", "ho"], value, use_tqdm=False), *parts)


def test_parameters_for_no_prompts(llm, answer):
    refused(llm, answer, lambda: llm.generate([], [P], use_tqdm=False), "sampling_params", "list of 1", "0")


@pytest.mark.parametrize("make", [lambda: SamplingParams(best_of=3), lambda: SamplingParams(temprature=.5), lambda: LLM("x", num_gpu_blocks=4)])
def test_unknown_keywords(make):
    "What Python itself says about an argument that does not exist, and it names it."
    with pytest.raises((TypeError, ValueError), match="best_of|temprature|num_gpu_blocks"): make()


# ---- Requests that do not fit ----

@cases([
    (dict(max_tokens=None), "max_tokens=None", "num_kv_blocks is 20"), (dict(max_tokens=10**30), "max_tokens=10{30}", "num_kv_blocks is 20"),
    (dict(max_tokens=400), "max_tokens=400", "num_kv_blocks is 20"),
])
def test_requests_that_can_never_fit(llm, answer, value, parts):
    refused(llm, answer, lambda: llm.generate("hi", SamplingParams(**value), use_tqdm=False), *parts)


# ---- Conversations ----

@cases([
    ("hi", "messages", "'hi'"), (None, "messages", "None"), (3, "messages", "3"), ([], "messages", r"\[\]"), (USER, "messages", "'user'"), ({}, "messages"),
    ([[]], "messages", r"\[\]"), ([[USER], []], "messages", r"\[\]"), ([[USER], USER], "messages"), ([USER, [USER]], r"messages\[1\]"),
    (["hi"], r"messages\[0\]"), ([None], r"messages\[0\]"), ([{}], r"messages\[0\].role", "None"), ([{"role": "user"}], r"messages\[0\].content", "None"),
    ([{"content": "x"}], r"messages\[0\].role", "None"), ([USER, {"role": 1, "content": "x"}], r"messages\[1\].role", "1"),
    ([{"role": "user", "content": None}], r"messages\[0\].content", "None"), ([{"role": "user", "content": b"x"}], r"messages\[0\].content", "b'x'"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content", "5"), ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\].content", "image"),
    ([{"role": "user", "content": "a\ud800b"}], "messages", r"\\ud800"), ([{"role": "\ud800", "content": "x"}], "messages", r"\\ud800"),
    ([{"role": "user", "content": "x " * 900}], "tokens", "max_model_len is 512"),
])
def test_messages(llm, answer, value, parts):
    refused(llm, answer, lambda: llm.chat(value, SamplingParams(max_tokens=2), use_tqdm=False), *parts)


def test_conversations_and_parameters_must_match(llm, answer):
    refused(llm, answer, lambda: llm.chat([USER], [P, P], use_tqdm=False), "sampling_params", "list of 2")


def test_a_model_without_a_chat_template(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    (tmp_path/"m"/"chat_template.jinja").unlink()
    plain = LLM(tmp_path/"m", num_kv_blocks=20)
    refused(plain, ask(plain), lambda: plain.chat([USER], use_tqdm=False), "messages", "chat template")


def test_a_template_that_refuses(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    (tmp_path/"m"/"chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    strict = LLM(tmp_path/"m", num_kv_blocks=20)
    refused(strict, ask(strict), lambda: strict.chat([USER], use_tqdm=False), "messages", "roles must alternate")


# ---- What is under way goes on ----

@pytest.mark.parametrize("bad", ["", [49152], None, [[7] * 600], "\ud800", {"text": 1}])
def test_a_refusal_beside_a_stream(llm, answer, bad):
    whole = ask(llm)[0]
    stream = llm.stream(*GOOD)
    pieces = [next(stream)]
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError): call(["fine", *([bad] if not isinstance(bad, list) else bad)])
    with pytest.raises(ValueError): llm.generate("fine", [P, P])
    pieces += stream
    assert ("".join(p["text"] for p in pieces), sum((p["token_ids"] for p in pieces), [])) == whole[:2]
    assert_idle(llm)


# ---- Engine arguments ----

@cases([
    (dict(block_size=0), "block_size", "0", "1 to"), (dict(block_size=-16), "block_size", "-16"), (dict(block_size=16.0), "block_size", "16.0"),
    (dict(block_size="16"), "block_size", "'16'"), (dict(block_size=True), "block_size", "True"),
    (dict(block_size=10**30), "block_size", "10{30}"), (dict(max_model_len=0), "max_model_len", "0"), (dict(max_model_len=1), "max_model_len", "1"),
    (dict(max_model_len=513), "max_model_len", "513", "512"), (dict(max_model_len=10**9), "max_model_len", "10{9}", "512"), (dict(max_model_len=NAN), "max_model_len", "nan"),
    (dict(max_model_len="4k"), "max_model_len", "'4k'"), (dict(max_num_seqs=0), "max_num_seqs", "0"), (dict(max_num_seqs=2.5), "max_num_seqs", "2.5"),
    (dict(max_num_batched_tokens=0), "max_num_batched_tokens", "0"), (dict(max_num_batched_tokens=-1), "max_num_batched_tokens", "-1"),
    (dict(num_kv_blocks=0), "num_kv_blocks", "0"), (dict(num_kv_blocks=-1), "num_kv_blocks", "-1"),
    (dict(num_kv_blocks=1.5), "num_kv_blocks", "1.5"), (dict(num_kv_blocks=10**10), "num_kv_blocks", "10{10}"), (dict(num_kv_blocks=2**40), "num_kv_blocks", str(2**40)),
    (dict(num_kv_blocks=10**30), "num_kv_blocks", "10{30}"), (dict(num_kv_blocks=None, block_size=2**20, gpu_memory_utilization=.01), "gpu_memory_utilization", "0.01", "bytes"),
    (dict(gpu_memory_utilization=0), "gpu_memory_utilization", "0"), (dict(gpu_memory_utilization=1.1), "gpu_memory_utilization", "1.1"),
    (dict(gpu_memory_utilization=NAN), "gpu_memory_utilization", "nan"), (dict(gpu_memory_utilization="90%"), "gpu_memory_utilization", "90%"),
    (dict(tensor_parallel_size=0), "tensor_parallel_size", "0"), (dict(tensor_parallel_size=5), "tensor_parallel_size", "5"), (dict(tensor_parallel_size=1025), "tensor_parallel_size", "1025"), (dict(tensor_parallel_size=None), "tensor_parallel_size", "None"),
    (dict(dtype="float8"), "dtype", "'float8'", "float32"), (dict(dtype=None), "dtype", "None"), (dict(dtype=torch.int8), "dtype", "int8"), (dict(dtype=[]), "dtype", r"\[\]"),
    (dict(dtype=float), "dtype", "float"), (dict(device="tpu"), "device", "'tpu'", "cpu"), (dict(device="cuda:99"), "device", "cuda:99"), (dict(device=None), "device", "None"),
    (dict(device="meta"), "device", "'meta'"), (dict(device=""), "device", "''"), (dict(attention_backend="flash"), "attention_backend", "'flash'", "torch"),
    (dict(attention_backend=[]), "attention_backend", r"\[\]"), (dict(attention_backend={}), "attention_backend", r"\{\}"),
    (dict(ops="fast"), "ops", "'fast'", "auto", "torch"), (dict(ops="Torch"), "ops", "'Torch'", "torch"), (dict(ops=None), "ops", "None"), (dict(ops=[]), "ops", r"\[\]"),
    (dict(ops={}), "ops", r"\{\}"), (dict(ops="fusions"), "ops", "'fusions'", "compile"), (dict(ops="int8"), "ops", "'int8'", "quantization"),
    (dict(ops="torch", quantization="int8"), "ops", "'torch'", "quantization"), (dict(ops="torch", compile=True), "ops", "'torch'", "compile"),
    (dict(quantization="int3"), "quantization", "'int3'", "int8"), (dict(quantization=[]), "quantization", r"\[\]"), (dict(compile=1), "compile", "1"),
    (dict(async_scheduling="yes"), "async_scheduling", "'yes'"), (dict(async_scheduling=1), "async_scheduling", "1"),
    (dict(long_prefill_token_threshold=-1), "long_prefill_token_threshold", "-1"), (dict(kv_cache_dtype="int8"), "kv_cache_dtype", "'int8'", "float32"),
    (dict(load_format="gguf"), "load_format", "'gguf'", "dummy"), (dict(load_format=None), "load_format", "None"), (dict(load_format=[]), "load_format", r"\[\]"),
    (dict(enable_prefix_caching=1), "enable_prefix_caching", "1"), (dict(enable_prefix_caching="yes"), "enable_prefix_caching", "'yes'"),
    (dict(enforce_eager=None), "enforce_eager", "None"), (dict(seed=None), "seed", "None"), (dict(seed=1.5), "seed", "1.5"), (dict(seed=2**63), "seed", str(2**63)),
    (dict(tokenizer="/no/such/folder"), "tokenizer", "/no/such/folder"), (dict(tokenizer=3), "tokenizer", "3"), (dict(tokenizer=""), "tokenizer", "''"),
    (dict(tokenizer="\x00"), "tokenizer", r"\\x00"), (dict(tokenizer=b"x"), "tokenizer", "b'x'"),
    (dict(model="/no/such/folder"), "model", "/no/such/folder"), (dict(model=""), "model", "''"), (dict(model=None), "model", "None"), (dict(model=5), "model", "5"),
    (dict(model=[]), "model", r"\[\]"), (dict(model="\x00"), "model", r"\\x00"), (dict(model="no spaces/in names"), "model", "no spaces"), (dict(model="gpt2"), "model", "gpt2"),
    (dict(model="\ud800"), "model", "ud800"), (dict(model="x" * 5000), "model"), (dict(model="no/suchmodel"), "model", "no/suchmodel"),
])
def test_engine_arguments(llm, answer, folder, value, parts, monkeypatch):
    if not {"num_kv_blocks", "load_format"} & value.keys():  # before any work
        monkeypatch.setattr("nano_vllm.engine_args.load_model", lambda *args, **kw: pytest.fail("the weights were loaded first"))
    refused(llm, answer, lambda: LLM(**{"model": folder, "num_kv_blocks": 20, **value}), *parts)


# ---- Model folders ----

@pytest.fixture
def broken(folder, tmp_path):
    "A copy of the good folder, to be spoiled."
    return shutil.copytree(folder, tmp_path/"broken")


def edit_config(folder, **changes):
    config = json.loads((folder/"config.json").read_text()) | changes
    (folder/"config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_weights(folder, change):
    tensors = load_file(folder/"model.safetensors")
    change(tensors)
    save_file(tensors, folder/"model.safetensors")


def remove(*names): return lambda folder: [(folder/name).unlink() for name in names]
def config(**changes): return lambda folder: edit_config(folder, **changes)


def index(text):
    def spoil(folder):
        (folder/"model.safetensors").unlink()
        (folder/"model.safetensors.index.json").write_text(text)
    return spoil


def make_folder(name):
    def spoil(folder):
        (folder/name).unlink()
        (folder/name).mkdir()
    return spoil


def write(name, text): return lambda folder: (folder/name).write_bytes(text.encode("latin1"))
def truncate(name, end): return lambda folder: (folder/name).write_bytes((folder/name).read_bytes()[:end])
def weights(change): return lambda folder: edit_weights(folder, change)


FIRST = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
FOLDERS = {
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "config.json"),
    "no config": (remove("config.json"), "config.json"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer", "tokenizer.json"),
    "weights cut short": (truncate("model.safetensors", -100), "model.safetensors"),
    "weights cut in the header": (truncate("model.safetensors", 20), "model.safetensors"),
    "weights empty": (truncate("model.safetensors", 0), "model.safetensors"),
    "weights of text": (write("model.safetensors", "<html>not found</html>"), "model.safetensors"),
    "weights a folder": (make_folder("model.safetensors"), "model.safetensors"),
    "a tensor missing": (weights(lambda t: t.pop(FIRST)), "missing", FIRST),
    "a tensor too many": (weights(lambda t: t.update(extra=torch.zeros(2))), "surplus", "extra"),
    "a layer too many": (config(num_hidden_layers=1), "surplus", "layers.1"),
    "a layer missing": (config(num_hidden_layers=3), "missing", "layers.2"),
    "a wrong shape": (weights(lambda t: t.update({FIRST: torch.zeros(3, 5)})), FIRST, r"\[3, 5\]", r"\[32, 32\]"),
    "a scalar": (weights(lambda t: t.update({"model.norm.weight": torch.zeros(())})), "norm.weight", r"\[\]", r"\[32\]"),
    "a transposed tensor": (weights(lambda t: t.update({UP: t[UP].T.contiguous()})), UP, r"\[32, 48\]", r"\[48, 32\]"),
    "whole numbers": (weights(lambda t: t.update({FIRST: t[FIRST].int()})), FIRST, "I32", "BF16"),
    "truth values": (weights(lambda t: t.update({FIRST: t[FIRST] > 0})), FIRST, "BOOL", "BF16"),
    "eight bits": (weights(lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)})), FIRST, "F8_E4M3", "BF16"),
    "a weight that is no number": (weights(lambda t: t[UP].view(-1)[-1:].fill_(NAN)), UP, "NaN"),
    "a weight that is infinite": (weights(lambda t: t["model.norm.weight"][3:4].fill_(-INF)), "model.norm.weight", "infinite"),
    "weights of both infinities": (weights(lambda t: t[UP][0, :2].copy_(torch.tensor([INF, -INF]))), UP, "infinite"),
    "an index to nowhere": (index('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    "an index that is no JSON": (index("{"), "index.json"),
    "an index with a number": (index('{"weight_map": {"a": 3}}'), "index.json"),
    "an index that leaves the folder": (index('{"weight_map": {"a": "../model.safetensors"}}'), "index.json", r"\.\./model.safetensors", "in the folder"),
    "an index to the root": (index('{"weight_map": {"a": "/etc/hostname"}}'), "index.json", "/etc/hostname"),
    "an index of nothing": (index('{"weight_map": {}}'), "index"),
    "config is no JSON": (write("config.json", "{nope"), "config.json"),
    "config is empty": (write("config.json", ""), "config.json"),
    "config is a list": (write("config.json", "[]"), "config.json", "list"),
    "config is binary": (write("config.json", "\xff\xfe\x00"), "config.json"),
    "config is a folder": (make_folder("config.json"), "config.json"),
    "another architecture": (config(architectures=["GPT2LMHeadModel"]), "architectures", "GPT2LMHeadModel", "Llama"),
    "no architecture": (config(architectures=[]), "architectures", "Llama"),
    "architectures is None": (config(architectures=None), "architectures", "Llama"),
    "architectures is a number": (config(architectures=3), "architectures", "3"),
    "architectures holds a list": (config(architectures=[["LlamaForCausalLM"]]), "architectures"),
    "an unknown model type": (config(model_type="nonsense"), "nonsense|config.json"),
    "another activation": (config(hidden_act="gelu"), "hidden_act", "gelu", "silu"),
    "heads that do not divide": (config(num_attention_heads=4, num_key_value_heads=3), "num_attention_heads", "4", "3"),
    "no heads": (config(num_attention_heads=0, head_dim=16), "config.json|num_attention_heads"),
    "a vocabulary of text": (config(vocab_size="many"), "vocab_size", "many"),
    "a negative vocabulary": (config(vocab_size=-5), "vocab_size|config.json|embed_tokens", "-5"),
    "less than no layers": (config(num_hidden_layers=-1), "num_hidden_layers|surplus"),
    "a rope that nobody knows": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4},
                                        rope_scaling={"rope_type": "spiral"}), "rope", "spiral"),
    "quantized": (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantization_config", "awq"),
    "generation config is no JSON": (write("generation_config.json", "{"), "generation_config.json"),
    "generation config recommends nonsense": (write("generation_config.json", '{"temperature": -1}'), "generation_config.json: temperature", "-1"),
    "tokenizer is no JSON": (write("tokenizer.json", "{"), "tokenizer"),
    "tokenizer is empty": (write("tokenizer.json", ""), "tokenizer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_model_folders(llm, answer, broken, name):
    spoil, *parts = FOLDERS[name]
    spoil(broken)
    refused(llm, answer, lambda: LLM(broken, num_kv_blocks=20), *parts)


CODE = """
import pathlib
pathlib.Path(__file__).with_name("executed").write_text("")
from transformers import LlamaConfig, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


def test_a_folder_is_data(llm, answer, broken, monkeypatch):
    "Code that it brings is not run, and nobody is asked whether it may be: it is refused, or done without."
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (broken/"own.py").write_text(CODE)
    edit_config(broken, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    path = broken/"tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | dict(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})))
    try: assert len(LLM(broken, num_kv_blocks=20).generate("hi", use_tqdm=False)) == 1
    except ValueError as e: assert str(broken) in str(e)
    edit_config(broken, model_type="own")
    refused(llm, answer, lambda: LLM(broken, num_kv_blocks=20), "config.json", "own|custom code")
    assert not list(broken.rglob("executed"))


def test_a_file_is_no_folder(llm, answer, folder):
    refused(llm, answer, lambda: LLM(folder/"config.json"), "model", "config.json")
    refused(llm, answer, lambda: LLM(str(folder/"model.safetensors")), "model", "model.safetensors")


def test_dummy_weights_need_a_good_config(llm, answer, broken):
    (broken/"model.safetensors").unlink()
    assert len(LLM(broken, num_kv_blocks=20, load_format="dummy").generate("hi", use_tqdm=False)) == 1
    edit_config(broken, architectures=["Nonsense"])
    refused(llm, answer, lambda: LLM(broken, num_kv_blocks=20, load_format="dummy"), "architectures", "Nonsense")


def test_how_many_cases_there_are():
    tables = [m.args[1] for f in (test_prompts, test_sampling_params, test_lists_of_parameters, test_requests_that_can_never_fit, test_messages,
                                  test_engine_arguments) for m in f.pytestmark]
    assert sum(map(len, tables)) + len(FOLDERS) >= 200


# ---- what is said stays short, and is said once

LONG = "x" * 100_000


@pytest.mark.parametrize("name, make", [
    ("stop", lambda: SamplingParams(stop=LONG, detokenize=False)), ("logit_bias", lambda: SamplingParams(logit_bias=[LONG])),
    ("structured_outputs", lambda: SamplingParams(structured_outputs=LONG)), ("output_kind", lambda: SamplingParams(output_kind=LONG)),
    *((name, lambda name=name: LLM("smollm2-135m", device="cpu", num_kv_blocks=8, **{name: LONG}))
      for name in ("scheduling_policy", "attention_backend", "ops", "quantization", "load_format", "speculative_config")),
    ("logits_processors", lambda: LLM("smollm2-135m", logits_processors=[LONG])), ("model", lambda: LLM(LONG + "/y"))])
def test_a_message_is_short_whatever_it_refuses(name, make):
    with pytest.raises(ValueError, match=name) as e: make()
    assert len(str(e.value)) < 1500


def test_what_has_no_effect_is_said_once_whatever_the_value(caplog):
    "Who asks for something else each time fills neither the log nor the memory of what has been said."
    log_once.cache_clear()
    with caplog.at_level("WARNING", "nano_vllm"):
        for i in range(500): SamplingParams(stream_interval=i + 2, watermarking=f"{LONG} {i}")
    assert len(caplog.records) == log_once.cache_info().currsize == 2 < log_once.cache_info().maxsize <= 1000
    assert all(len(r.getMessage()) < 200 for r in caplog.records)
