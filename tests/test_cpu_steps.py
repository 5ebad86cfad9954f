"""All layers in one call: the same hidden states and the same cache as the plain model, whatever the batch, and what does not fit goes the usual way."""
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels, cpu_steps
from nano_vllm.attention import FASTEST, TorchAttention, make_batch
from nano_vllm.cpu_kernels import InPlaceAttention
from nano_vllm.cpu_products import finish
from nano_vllm.cpu_steps import Steps, decodes
from nano_vllm.kv_blocks import Chunk, Sequence
from nano_vllm.model import Decoder, ModelConfig
from nano_vllm.weights import FORMS, load_model
from test_model import make

pytestmark = pytest.mark.skipif(FASTEST["cpu"] != "in_place", reason="no AVX-512 or no g++ here")
FITTING = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16, max_position_embeddings=512)


def random_batch(draw, size, longest=70):
    "Texts with their past in blocks anywhere in the cache; each computes some of its last tokens."
    texts = draw(st.lists(st.integers(1, longest).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6))
    width = longest // size + 1
    blocks, chunks = draw(st.permutations(range(width * len(texts)))), []
    for i, (n, m) in enumerate(texts):
        seq = Sequence(str(i), [(7*j + i) % 90 for j in range(n)], SamplingParams(), num_computed_tokens=n - m)
        seq.block_table = list(blocks[i*width:(i + 1)*width])
        chunks.append(Chunk(seq, m))
    return make_batch(chunks, size), len(blocks)


@pytest.fixture(scope="module", params=[("Llama", {}), ("Llama", dict(attention_bias=True, mlp_bias=True)), ("Qwen2", {}), ("Mistral", dict(sliding_window=20))],
                ids=["Llama", "biases", "Qwen2", "window"])
def models(request, tmp_path_factory):
    folder, (family, changes) = tmp_path_factory.mktemp("steps"), request.param
    make(family, folder, **FITTING | changes)
    config = ModelConfig.from_folder(folder)
    plain, ours = (load_model(folder, config, torch.float32, "cpu") for _ in range(2))
    FORMS[None](ours)
    assert isinstance(ours.forward, Steps)
    return plain, ours


@settings(max_examples=20, deadline=None)
@given(data=st.data(), size=st.sampled_from([16, 32]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_call_computes_what_the_model_does(data, size, dtype, models):
    plain, ours = models
    batch, blocks = random_batch(data.draw, size)
    c, window = plain.config, plain.config.sliding_window
    cache = torch.full((c.num_layers, 2, blocks, size, c.num_kv_heads, c.head_dim), float("nan"))
    used = torch.cat([t.repeat_interleave(size)[:n] * size + torch.arange(n) % size for t, n in zip(batch.block_tables, batch.context_lens)])
    cache.flatten(2, 3)[:, :, used] = torch.randn(c.num_layers, 2, len(used), c.num_kv_heads, c.head_dim, generator=torch.Generator().manual_seed(size))
    caches, outs = [cache.to(dtype), cache.to(dtype)], []
    with torch.inference_mode():
        for model, kind, own in zip((plain, ours), (TorchAttention, InPlaceAttention), caches):
            attend = kind(batch, own, c.head_dim**-0.5, window)
            assert (decodes(attend) is not None) == (kind is InPlaceAttention)
            outs.append(model(batch.token_ids, batch.positions, attend))
    exact = dtype == torch.float32
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4 if exact else 3e-2, rtol=0 if exact else 2e-2)
    torch.testing.assert_close(*caches, atol=1e-4 if exact else 3e-2, rtol=0 if exact else 2e-2, equal_nan=True)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_engine_gives_the_same_tokens_call_by_call(quantization, tmp_path, monkeypatch):
    "Long prompts, which do not fit, short ones and decodes, in chunks and with shared prefixes."
    folder = tiny_folder(tmp_path, **FITTING)
    prompts = [[(i*j) % 900 + 100 for j in range(1, n)] for i, n in ((3, 300), (3, 290), (5, 20), (7, 2), (9, 100))]
    params = [SamplingParams(temperature=t, seed=5, max_tokens=25, ignore_eos=True) for t in (0, 0.8, 0, 1.0, 0)]
    answers = []
    for one_call in (True, False):
        llm = LLM(folder, quantization=quantization, num_kv_blocks=60, max_num_batched_tokens=320, max_model_len=400)
        steps, calls = llm.runner.model.forward, []
        assert isinstance(steps, Steps)
        monkeypatch.setattr(cpu_steps, "decodes", (lambda attend: calls.append(decodes(attend)) or calls[-1]) if one_call else lambda attend: None)
        answers.append([o["token_ids"] for o in llm.generate([dict(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)])
        assert_idle(llm)
        if one_call: assert None in calls and sum(c is not None for c in calls) > 20   # both ways were gone
    assert answers[0] == answers[1]


def test_a_long_prompt_in_pieces(tmp_path, monkeypatch):
    "Many short prompts are more tokens than the MLP takes at a time."
    make("Llama", tmp_path, **FITTING)
    plain, ours = (load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu") for _ in range(2))
    FORMS[None](ours)
    chunks = []
    for i in range(20):
        seq = Sequence(str(i), [(3*j + i) % 90 for j in range(60)], SamplingParams())
        seq.block_table = list(range(4*i, 4*i + 4))
        chunks.append(Chunk(seq, 60))
    batch, c = make_batch(chunks, 16), plain.config
    assert len(batch.token_ids) > cpu_steps.PIECE
    cache = torch.zeros(c.num_layers, 2, 80, 16, c.num_kv_heads, c.head_dim)
    with torch.inference_mode():
        a, b = (m(batch.token_ids, batch.positions, kind(batch, cache.clone(), 0.25, None))
                for m, kind in ((plain, TorchAttention), (ours, InPlaceAttention)))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, changes", [("Qwen3", {}), ("Llama", dict(head_dim=8)), ("Llama", dict(intermediate_size=40))])
def test_other_models_keep_their_forward(family, changes, tmp_path):
    "Norms on q and k; heads of 8; an MLP that no tile fits."
    make(family, tmp_path, **FITTING | changes)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu")
    FORMS[None](model)
    assert not isinstance(model.forward, Steps)


def test_an_engine_is_freed(tmp_path):
    llm = LLM(tiny_folder(tmp_path, **FITTING), num_kv_blocks=8)
    gone = weakref.ref(llm.runner.model)
    del llm
    gc.collect()
    assert gone() is None
