"The tiny engine against Hugging Face, and against itself: alone or in company, with or without a cache."
import ast
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from greedy_reference import load_hf
from nano_vllm import tiny
from nano_vllm.workbench import fetch

TEXTS = ["Hello", "The capital of France is", "def fibonacci(n):",
         "Once upon a time, in a small village by the sea, there lived",
         "Water boils at a temperature of 100 degrees. " * 12,
         "List: " + ", ".join(f"item {i}" for i in range(60)), "日本の首都は", "2 + 2 ="]
MAX_TOKENS = 24


@lru_cache
def engine(): return tiny.TinyEngine(fetch())


def reference(): return load_hf()[0]


def prompts():
    chat = [{"role": "user", "content": "How many days are in a week?"}]
    template = engine().tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return [engine().tokenizer.encode(t) for t in TEXTS + [template]]


def hf_logits(model, ids):
    with torch.inference_mode(): return model(torch.tensor([ids])).logits[0]


def our_logits(config, weights, rows):
    ids, padding = tiny.pad_left(rows)
    with torch.inference_mode():
        hidden = tiny.forward(config, weights, ids, *tiny.locate(padding, 0, ids.shape[1]))
        return tiny.to_logits(weights, hidden), padding


def assert_same_or_tied(prompt, ours, theirs):
    "Equal token for token; a first difference is excused only by a near-tie, whose logits are printed."
    if ours == theirs: return
    i = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    a, b = hf_logits(reference(), prompt + ours[:i])[-1][[ours[i], theirs[i]]].tolist()
    print(f"near-tie at token {i}: {ours[i]} has logit {a}, {theirs[i]} has {b}")
    assert abs(a - b) < 1e-3


@lru_cache
def answers(): return engine().generate_ids(prompts(), MAX_TOKENS)


def test_at_most_150_lines():
    source = Path(tiny.__file__).read_text()
    docs = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr)
            and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)]
    prose = {line for n in docs for line in range(n.lineno, n.end_lineno + 1)}
    lines = ((i, s.strip()) for i, s in enumerate(source.splitlines(), 1))
    count = sum(bool(s) and not s.startswith("#") and i not in prose for i, s in lines)
    print(count, "lines")
    assert count <= 150


@lru_cache
def their_logits():
    "Of each prompt and our answer to it, (N, vocabulary), by transformers."
    return [hf_logits(reference(), prompt + ours) for prompt, ours in zip(prompts(), answers())]


@pytest.mark.ci
def test_greedy_equals_hugging_face():
    "Each token is the best after all that stand before it, as transformers sees them; for two prompts its `generate` says so itself."
    for prompt, ours, logits in zip(prompts(), answers(), their_logits()):
        for token, row in zip(ours, logits[len(prompt) - 1:]):
            if token == row.argmax(): continue
            print(f"near-tie: {token} has logit {row[token]}, {row.argmax()} has {row.max()}")
            assert row.max() - row[token] < 1e-3
    for i in (0, -1):
        inputs = dict(inputs=torch.tensor([prompts()[i]]), attention_mask=torch.ones(1, len(prompts()[i])))
        theirs = reference().generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0)
        assert_same_or_tied(prompts()[i], answers()[i], theirs[0, len(prompts()[i]):].tolist())


def test_greedy_alone_equals_batch():
    for prompt, together in list(zip(prompts(), answers()))[::3]:
        alone, = engine().generate_ids([prompt], MAX_TOKENS)
        assert_same_or_tied(prompt, together, alone)


def test_batch_covers_both_ways_to_end():
    ended = [a[-1] in engine().stops for a in answers()]
    assert any(ended) and not all(ended)
    for a in answers():
        assert 1 <= len(a) <= MAX_TOKENS and not set(a[:-1]) & engine().stops
        assert len(a) == MAX_TOKENS or a[-1] in engine().stops


def test_logits_equal_hugging_face_with_padding():
    logits, padding = our_logits(engine().config, engine().weights, prompts())
    for row, (prompt, theirs) in enumerate(zip(prompts(), their_logits())):
        assert (logits[row, padding[row]:] - theirs[:len(prompt)]).abs().max() < 1e-3


def test_cache_changes_nothing():
    e, ids = engine(), torch.tensor([prompts()[3]])
    zero, T = torch.tensor([0]), ids.shape[1]
    with torch.inference_mode():
        whole = tiny.forward(e.config, e.weights, ids, *tiny.locate(zero, 0, T))
        cache, pieces = tiny.KVCache(e.config, 1, T), []
        for start, end in (0, 3), (3, 4), (4, 9), (9, T):
            view = tiny.locate(zero, start, end)
            pieces.append(tiny.forward(e.config, e.weights, ids[:, start:end], *view, cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-3, rtol=1e-3)
    assert cache.filled == [T] * e.config.layers


def test_sampling_ignores_company_and_follows_the_seed():
    few = prompts()[:4]
    together = engine().generate_ids(few, 12, temperature=0.9, seed=3)
    assert together == engine().generate_ids(few, 12, temperature=0.9, seed=3)
    assert together == [engine().generate_ids([p], 12, temperature=0.9, seed=3)[0] for p in few]
    assert together != engine().generate_ids(few, 12, temperature=0.9, seed=4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature):
    logits, n = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0]), 20_000
    generator = torch.Generator().manual_seed(1)
    rows = logits.repeat(n, 1)
    seen = tiny.sample_tokens(rows, temperature, [generator]*n).bincount(minlength=5)
    expected = n * (logits / temperature).softmax(-1)
    assert ((seen - expected)**2 / expected).sum() < 18.47  # chi-square, 4 degrees, p = 0.001
    assert rows.equal(logits.repeat(n, 1))                  # the input is not written to


def test_text_is_decoded_ids():
    texts = engine().generate(TEXTS[:2], 8)
    ids = engine().generate_ids([engine().tokenizer.encode(t) for t in TEXTS[:2]], 8)
    assert texts == [engine().tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    assert engine().generate([]) == [] and engine().generate_ids([]) == []
    assert [len(i) for i in engine().generate_ids([[1], [1, 2]], 1)] == [1, 1]


@pytest.mark.parametrize("change, value", [
    (dict(max_tokens=0), "max_tokens is 0"), (dict(max_tokens=-1), "max_tokens is -1"),
    (dict(max_tokens=8192), "8191"), (dict(temperature=-0.1), "temperature is -0.1"),
    (dict(temperature=float("nan")), "temperature is nan"), (dict(prompt_ids=[[5], []]), r"prompt_ids\[1\]"),
    (dict(prompt_ids=[[5] * 8190]), "8188"), (dict(prompt_ids=[[-1]]), "holds -1"),
    (dict(prompt_ids=[[49152]]), "49151")])
def test_bad_requests_are_refused(change, value):
    good = dict(prompt_ids=[[5]], max_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match=value): engine().generate_ids(**{**good, **change})


def test_a_string_is_not_a_list_of_prompts():
    with pytest.raises(ValueError, match="prompts is a str"): engine().generate("Hello")


def save_model(folder, **change):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                 num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128,
                 initializer_range=0.2, eos_token_id=2, bos_token_id=1)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **change}))
    for name, p in model.named_parameters():  # biases and norms start as constants: make them count
        if p.dim() == 1: p.data = p.data + 0.1*torch.randn_like(p)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model.eval()


@pytest.mark.parametrize("change", [
    dict(), dict(head_dim=20), dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    dict(tie_word_embeddings=True), dict(attention_bias=True, mlp_bias=True),
    dict(rms_norm_eps=1e-3, num_key_value_heads=3)], ids=str)
def test_random_llamas(tmp_path, change):
    model = save_model(tmp_path, **change)
    assert len(list(tmp_path.glob("model*.safetensors"))) > 1  # sharded
    rows = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 41, 42]]
    logits, padding = our_logits(tiny.load_config(tmp_path), tiny.load_weights(tmp_path), rows)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(logits[row, padding[row]:], hf_logits(model, ids), atol=1e-4, rtol=1e-4)


def test_unknown_models_are_refused(tmp_path):
    config = json.loads((fetch()/"config.json").read_text())
    for change in (dict(model_type="qwen2"), dict(hidden_act="gelu"),
                   dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
                   dict(rope_parameters={"type": "linear", "rope_theta": 1e4})):
        (tmp_path/"config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match="must be llama"): tiny.load_config(tmp_path)
    with pytest.raises(ValueError, match="must hold"): tiny.load_weights(tmp_path)


def test_rope_theta_old_and_new_style(tmp_path):
    config = json.loads((fetch()/"config.json").read_text())
    old = tiny.load_config(fetch()).theta
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": old}
    (tmp_path/"config.json").write_text(json.dumps(config))
    assert tiny.load_config(tmp_path).theta == old


@pytest.mark.parametrize("first, second, expected", [
    (2, 2, {2}), (2, [2, 7], {2, 7}), (None, 3, {3}), ([4], None, {4}), (None, None, set())])
def test_stop_ids(tmp_path, first, second, expected):
    (tmp_path/"config.json").write_text(json.dumps(dict(eos_token_id=first)))
    (tmp_path/"generation_config.json").write_text(json.dumps(dict(eos_token_id=second)))
    assert tiny.stop_ids(tmp_path) == expected


