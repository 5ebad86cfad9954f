"""The engine's own products, its way into attention, and its draw: each against the plain operators, and to the bit where it matters."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import FASTEST
from nano_vllm.cpu_kernels import PackedProduct, prepare
from nano_vllm.cpu_products import TiledProduct, best_product, fast_draw, finish
from nano_vllm.model import ModelConfig
from nano_vllm.sampling import DRAWS, draw
from nano_vllm.weights import FORMS, load_model
from test_model import make, our_logits

pytestmark = pytest.mark.skipif(FASTEST["cpu"] != "in_place", reason="no AVX-512 or no g++ here")
quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(seeds, st.integers(0, 70), st.integers(1, 130), st.sampled_from([32, 64, 160]), st.booleans())
def test_the_product(seed, rows, inputs, outputs, has_bias):
    x, weight, bias = random(seed, rows, inputs), random(seed + 1, outputs, inputs), random(seed + 2, outputs)
    before = x.clone()
    y = TiledProduct(weight)(x, None, bias if has_bias else None)
    torch.testing.assert_close(y, x @ weight.T + (bias if has_bias else 0), rtol=1e-5, atol=1e-4)
    assert torch.equal(x, before)


@quick
@given(seeds, st.integers(2, 40), st.integers(0, 39))
def test_a_row_is_the_same_to_the_bit_in_every_batch(seed, rows, which):
    x, product = random(seed, rows, 80), TiledProduct(random(seed + 1, 64, 80))
    which %= rows
    assert torch.equal(product(x)[which], product(x[which:which+1])[0])


def test_shapes_and_views():
    product, weight = TiledProduct(random(1, 32, 20)), random(1, 32, 20)
    x = random(2, 6, 5, 40)[..., ::2]
    torch.testing.assert_close(product(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert isinstance(best_product(random(1, 32, 20)), TiledProduct) and isinstance(best_product(random(1, 40, 20)), PackedProduct)


def test_one_rows_infinity_stays_its_own():
    x = random(0, 20, 48)
    clean = TiledProduct(random(1, 64, 48))(x)
    x[3] = float("nan")
    spoiled = TiledProduct(random(1, 64, 48))(x)
    assert spoiled[3].isnan().all() and torch.equal(spoiled[:3], clean[:3]) and torch.equal(spoiled[4:], clean[4:])


def make_rows(n, seed, **params):
    return [SimpleNamespace(params=SamplingParams(**params), seed=seed + i, output_token_ids=[5] * i) for i in range(n)]


ASKED = [dict(temperature=1.0), dict(temperature=0.3), dict(temperature=2.5), dict(temperature=0.6, top_k=5), dict(top_p=0.7), dict(min_p=0.1)]


@quick
@given(seeds, st.lists(st.sampled_from(ASKED), min_size=1, max_size=9), st.sampled_from([16, 33, 160, 4096]),
       st.sampled_from([0.0, 1e-3, 1.0, 30.0]), st.booleans())
def test_the_draw_is_the_samplers(seed, asked, vocab, spread, masked):
    rows = [row for i, params in enumerate(asked) for row in make_rows(1, seed + i, **params)]
    x = random(seed, len(rows), vocab) * spread
    if masked: x[:, torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < 0.9] = -torch.inf
    x[:, vocab // 2] = 0.1   # at least one token is left
    before = x.clone()
    assert torch.equal(fast_draw(x, rows), draw(x, rows)) and torch.equal(x, before)
    plain = [row for row in rows if row.params.temperature != 1 and not row.params.top_k]
    if plain and len(plain) < len(rows):   # nobody's token depends on who else is drawn for
        at = [i for i, row in enumerate(rows) if row in plain]
        assert torch.equal(fast_draw(x[at], plain), fast_draw(x, rows)[at])


@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(vocab_size=96)),
                                             ("Qwen2", {}), ("Qwen3", {})])
def test_a_finished_model_gives_the_plain_models_logits(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, ours = (load_model(tmp_path, config, torch.float32, "cpu") for _ in range(2))
    finish(ours)
    torch.testing.assert_close(our_logits(ours, ids), our_logits(plain, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, dict(attention_bias=True), dict(head_dim=32)])
def test_the_engine_answers_as_without_the_kernels(changes, tmp_path, monkeypatch):
    "Chunks, decodes and shared prefixes, with rotation and storing in one kernel and apart."
    folder = tiny_folder(tmp_path, **dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2) | changes)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20, "1 2 3 " * 20 + "4"]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=30, ignore_eos=True) for t in (0.0, 0.8, 0.0, 1.0)]
    answers = []
    for form, draws in ((lambda model: None, {}), (prepare, {}), (finish, {"cpu": fast_draw})):
        monkeypatch.setitem(FORMS, None, form)
        monkeypatch.setattr("nano_vllm.sampling.DRAWS", draws)
        llm = LLM(folder, num_kv_blocks=40, max_num_batched_tokens=32)
        answers.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
        assert_idle(llm)
    assert answers[0] == answers[1] == answers[2]


def test_what_the_engine_uses():
    assert FORMS[None].args == (finish,) and DRAWS == {"cpu": fast_draw}
