"""All layers in one call: the same hidden states and the same cache as the plain model, whatever the batch, and what does not fit goes the usual way."""
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels, cpu_steps
from nano_vllm.attention import TorchAttention, make_batch
from nano_vllm.cpu_attention import TiledAttention
from nano_vllm.cpu_kernels import CAN_BUILD, InPlaceAttention, can_build, packed_linear
from nano_vllm.cpu_products import best_linear
from nano_vllm.cpu_steps import PIECE_TOKENS, only_part, layer_table, run_layers_at_once
from nano_vllm.kv_blocks import ScheduledSequence, Sequence
from nano_vllm.layers import OPS, Ops, choose_ops
from nano_vllm.model import ModelConfig
from nano_vllm.weights import load_model
from test_cpu_kernels import close, target
from test_model import make, our_logits

compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
FITTING = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16, max_position_embeddings=512)


def random_batch(draw, size, longest=70):
    "Texts with their past in blocks anywhere in the cache; each computes some of its last tokens."
    texts = draw(st.lists(st.integers(1, longest).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6))
    width = longest // size + 1
    blocks, chunks = draw(st.permutations(range(width * len(texts)))), []
    for i, (n, m) in enumerate(texts):
        seq = Sequence(str(i), [(7*j + i) % 90 for j in range(n)], SamplingParams())
        seq.block_table = list(blocks[i*width:(i + 1)*width])
        chunks.append(ScheduledSequence(seq, n - m, m, True))
    return make_batch(chunks, size), len(blocks)


@pytest.fixture(scope="module", params=[("Llama", {}), ("Llama", dict(attention_bias=True, mlp_bias=True)), ("Qwen2", {}), ("Mistral", dict(sliding_window=20)), ("Qwen3", {})],
                ids=["Llama", "biases", "Qwen2", "window", "norms"])
def models(request, tmp_path_factory):
    folder, (family, changes) = tmp_path_factory.mktemp("steps"), request.param
    make(family, folder, **FITTING | changes)
    config = ModelConfig.from_folder(folder)
    return [load_model(folder, config, torch.float32, "cpu", ops=OPS[name](target(config))) for name in ("torch", "cpu_steps")]


@compiled
@settings(max_examples=20, deadline=None)
@given(data=st.data(), size=st.sampled_from([16, 32]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_call_computes_what_the_model_does(data, size, dtype, models):
    plain, ours = models
    batch, blocks = random_batch(data.draw, size)
    c, window = plain.config, plain.config.sliding_window
    cache = torch.full((c.num_layers, 2, blocks, size, c.num_kv_heads, c.head_dim), float("nan"))
    used = torch.cat([t.repeat_interleave(size)[:n] * size + torch.arange(n) % size for t, n in zip(batch.block_tables, batch.context_lens)])
    cache.flatten(2, 3)[:, :, used] = torch.randn(c.num_layers, 2, len(used), c.num_kv_heads, c.head_dim, generator=torch.Generator().manual_seed(size))
    caches, outs = [cache.to(dtype, copy=True) for _ in range(2)], []
    with torch.inference_mode():
        for model, kind, own in zip((plain, ours), (TorchAttention, InPlaceAttention), caches):
            attention = kind(batch, own, c.head_dim**-0.5, window)
            assert (only_part(attention) is not None) == (kind is not TorchAttention)
            outs.append(model(batch.token_ids, batch.positions, attention))
    unit = 2**-24 if dtype == torch.float32 else 2**-7   # from one number to the next, in parts of it
    for mine, expected in (outs[::-1], caches[::-1]): close(mine.float(), expected.float(), c, 70, unit)


@compiled
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_engine_gives_the_same_tokens_call_by_call(quantization, tmp_path, monkeypatch):
    "Long prompts, short ones and decodes, in chunks and with shared prefixes."
    folder = tiny_folder(tmp_path, **FITTING)
    prompts = [[(i*j) % 900 + 100 for j in range(1, n)] for i, n in ((3, 300), (3, 290), (5, 20), (7, 2), (9, 100))]
    params = [SamplingParams(temperature=t, seed=5, max_tokens=25, ignore_eos=True) for t in (0, 0.8, 0, 1.0, 0)]
    answers = []
    for one_call in (True, False):
        llm = LLM(folder, quantization=quantization, num_kv_blocks=60, max_num_batched_tokens=320, max_model_len=400)
        assert llm.engine.runner.ops.run_layers is run_layers_at_once
        found = []
        monkeypatch.setattr(cpu_steps, "only_part", (lambda attention: found.append(only_part(attention)) or found[-1]) if one_call else lambda attention: None)
        answers.append([o["token_ids"] for o in llm.generate([dict(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)])
        assert_idle(llm)
        if one_call: assert None not in found and len(found) > 20
    assert answers[0] == answers[1]


@compiled
def test_a_long_prompt_in_pieces(tmp_path, monkeypatch):
    "Many short prompts are several pieces, and the last one is not full."
    make("Llama", tmp_path, **FITTING)
    config = ModelConfig.from_folder(tmp_path)
    plain, ours = (load_model(tmp_path, config, torch.float32, "cpu", ops=OPS[name](target(config))) for name in ("torch", "cpu_steps"))
    chunks = []
    for i in range(20):
        seq = Sequence(str(i), [(3*j + i) % 90 for j in range(60)], SamplingParams())
        seq.block_table = list(range(4*i, 4*i + 4))
        chunks.append(ScheduledSequence(seq, 0, 60, True))
    batch, c = make_batch(chunks, 16), plain.config
    assert len(batch.token_ids) > 4 * PIECE_TOKENS
    cache = torch.zeros(c.num_layers, 2, 80, 16, c.num_kv_heads, c.head_dim)
    with torch.inference_mode():
        a, b = (m(batch.token_ids, batch.positions, kind(batch, cache.clone(), 0.25, None))
                for m, kind in ((plain, TorchAttention), (ours, InPlaceAttention)))
    close(b, a, config, 60)


@pytest.mark.parametrize("family, changes", [("Llama", dict(head_dim=8)), ("Llama", dict(intermediate_size=40)), ("Llama", dict(hidden_size=72))])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_other_models_keep_their_loop(family, changes, quantization, tmp_path):
    "Heads of 8; an MLP or a hidden size that no tile fits."
    make(family, tmp_path, **FITTING | changes)
    config = ModelConfig.from_folder(tmp_path)
    assert all(OPS[name](target(config, quantization=quantization)) is None for name in ("cpu_steps", "int8_steps"))
    if quantization is None: assert choose_ops(target(config)).run_layers is Ops().run_layers


@pytest.mark.parametrize("changes", [dict(dtype=torch.bfloat16), dict(device="cuda"), dict(tensor_parallel_size=2), dict(compile=True), {}])
def test_where_it_suits(changes, tmp_path, monkeypatch):
    make("Llama", tmp_path, **FITTING)
    config = ModelConfig.from_folder(tmp_path)
    kinds = dict(cpu_steps=("cpu_products", None, torch.float32), bfloat16_steps=("bfloat16", None, torch.bfloat16),
                 int8_steps=("int8", "int8", changes.get("dtype", torch.float32)))
    for name, (other, quantization, dtype) in kinds.items():
        asked = target(config, **(dict(dtype=dtype) | changes), quantization=quantization)
        suits = CAN_BUILD and asked.dtype == dtype and not set(changes) - {"dtype"}
        if suits: assert OPS[name](asked) == replace(OPS[other](asked), run_layers=run_layers_at_once, attention=TiledAttention) == choose_ops(asked)
        elif quantization is None: assert OPS[name](asked) is None
    if not changes:
        monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)   # as on a CPU without AVX2: what is left is packed
        assert OPS["cpu_steps"](target(config)) is None
        ops = choose_ops(target(config))
        plain, ours = (load_model(tmp_path, config, torch.float32, "cpu", ops=o) for o in (Ops(), ops))
        close(our_logits(ours, list(range(20))), our_logits(plain, list(range(20))), config, 20)


@compiled
@pytest.mark.parametrize("ops, changes", [
    (Ops(), {}), (Ops(linear=packed_linear), {}), (Ops(linear=best_linear), dict(intermediate_size=40)), (Ops(linear=best_linear), dict(hidden_size=72))])
def test_layers_of_another_kind_go_one_by_one(ops, changes, tmp_path):
    "Whoever joins the call with other products, with none, or with sizes that the kernel does not know gets the loop."
    make("Llama", tmp_path, **FITTING | changes)
    config = ModelConfig.from_folder(tmp_path)
    model = load_model(tmp_path, config, torch.float32, "cpu", ops=replace(ops, run_layers=run_layers_at_once, attention=InPlaceAttention))
    assert layer_table(model.model.layers) is None
    seq = Sequence("0", list(range(20)), SamplingParams())
    seq.block_table = [1, 0]
    batch = make_batch([ScheduledSequence(seq, 0, 20, True)], 16)
    cache = torch.zeros(config.num_layers, 2, 2, 16, config.num_kv_heads, config.head_dim)
    with torch.inference_mode():
        attention = InPlaceAttention(batch, cache, config.head_dim**-0.5)
        assert only_part(attention) is not None
        logits = model.compute_logits(model(batch.token_ids, batch.positions, attention))
    assert cache.any()
    close(logits, our_logits(load_model(tmp_path, config, torch.float32, "cpu"), list(range(20))), config, 20)


@compiled
def test_no_table_keeps_a_model_alive(tmp_path):
    make("Llama", tmp_path, **FITTING)
    config = ModelConfig.from_folder(tmp_path)
    model = load_model(tmp_path, config, torch.float32, "cpu", ops=OPS["cpu_steps"](target(config)))
    assert layer_table(model.model.layers) is layer_table(model.model.layers) is not None
    gc.collect()
    gone, size = weakref.ref(model.model.layers), len(cpu_steps.TABLES)
    del model
    gc.collect()
    assert gone() is None and len(cpu_steps.TABLES) == size - 1


def test_an_engine_is_freed(tmp_path):
    llm = LLM(tiny_folder(tmp_path, **FITTING), num_kv_blocks=8)
    gone = weakref.ref(llm.engine.runner.model)
    del llm
    gc.collect()
    assert gone() is None
