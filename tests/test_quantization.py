"""Eight bits: rounding within its bound, rotations that change nothing, products of whole numbers that are exact, and a request
whose numbers nobody else can move."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, quantization
from nano_vllm.model import ModelConfig
from nano_vllm.quantization import CAN_BUILD, TiledInt8Product, best_int8_product, group_size, quantize, to_int8, turn, turned_int8
from nano_vllm.weights import load_model
from test_model import make, our_logits

seeds = st.integers(0, 2**31)
widths = st.sampled_from([16, 32, 48, 64, 112, 576]) | st.integers(2, 80)   # of one input torch._int_mm makes nonsense; no model has that
quick = settings(max_examples=60, deadline=None)


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(seeds, widths, st.floats(1e-6, 1e6))
def test_rounding_stays_within_half_a_step(seed, n, size):
    x = random(seed, 5, n) * size
    q, scale = quantize(x)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and scale.shape == (5, 1)
    assert ((x - q * scale).abs() <= scale * 0.5001).all()


def test_a_row_of_zeros():
    for q, scale in (quantize(torch.zeros(2, 64)), turned_int8(torch.zeros(2, 64))):
        assert not q.any() and scale.isfinite().all() and (scale > 0).all()
    assert not best_int8_product(torch.zeros(3, 64))(torch.zeros(2, 64)).any()


@quick
@given(seeds, widths)
def test_turning_both_sides_changes_no_product(seed, n):
    x, w = random(seed, 3, n), random(seed + 1, 4, n)
    torch.testing.assert_close(turn(x) @ turn(w).T, x @ w.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turn(turn(x)), x, atol=1e-5, rtol=0)   # it is its own inverse
    assert n % group_size(n) == 0


@pytest.mark.skipif(not CAN_BUILD, reason="no AVX-512 or no g++ here")
@quick
@given(seeds, widths, st.integers(1, 9))
def test_the_kernel_turns_and_rounds_as_pytorch_does(seed, n, rows):
    x = random(seed, rows, n)
    (q, scale), (expected, expected_scale) = turned_int8(x), quantize(turn(x))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    off = (q.int() - expected.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.02   # a number between two steps may go either way


def test_a_step_that_wants_no_logits():
    assert best_int8_product(random(0, 5, 64))(random(1, 0, 64)).shape == (0, 5)


@quick
@given(seeds, widths, st.integers(1, 40), st.sampled_from([13, 32, 96]), st.booleans())
def test_the_product_of_whole_numbers_is_exact(seed, n, rows, outputs, has_bias):
    x, weight = random(seed, rows, n), random(seed + 1, outputs, n)
    bias = random(seed + 2, outputs) if has_bias else None
    product, (whole, weight_scale) = best_int8_product(weight), turned_int8(weight)
    assert isinstance(product, TiledInt8Product) == (CAN_BUILD and n % 16 == 0 and outputs % 16 == 0)
    q, scale = turned_int8(x)
    exact = (q.double() @ whole.double().T) * scale.double() * weight_scale[:, 0].double() + (0 if bias is None else bias)
    torch.testing.assert_close(product(x, None, bias).double(), exact, rtol=1e-5, atol=1e-5)


@quick
@given(seeds, st.sampled_from([48, 576, 20]), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_neighbours_move_nothing_to_the_bit(seed, n, rows, size):
    for outputs in (40, 64):
        x, product = random(seed, rows, n), best_int8_product(random(seed + 1, outputs, n))
        x[1:] *= size
        assert torch.equal(product(x)[:1], product(x[:1]))


@pytest.mark.parametrize("outputs", [40, 64])
def test_the_extremes_do_not_overflow(outputs):
    "All numbers at the end of their range, in the longest rows that a model has."
    x, product = torch.ones(9, 16384), best_int8_product(-torch.ones(outputs, 16384))
    torch.testing.assert_close(product(x), torch.full((9, outputs), -16384.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("outputs", [40, 64])
def test_no_rows_at_all(outputs):
    assert best_int8_product(random(0, outputs, 64))(torch.zeros(0, 64)).shape == (0, outputs)


@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Qwen2", {}), ("Qwen3", {})])
def test_a_model_in_int8_stays_near_the_floats(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, small = (load_model(tmp_path, config, torch.float32, "cpu") for _ in range(2))
    to_int8(small)
    expected, logits = our_logits(plain, ids), our_logits(small, ids)
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05
    assert {n for n, p in small.named_parameters() if p.dim() == 2} == {"model.embed_tokens.weight"}


def test_bfloat16_models_go_without_the_kernels(tmp_path):
    make("Llama", tmp_path)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.bfloat16, "cpu")
    expected = our_logits(model, list(range(20))).float()
    to_int8(model)
    logits = our_logits(model, list(range(20)))
    assert logits.dtype == torch.bfloat16 and (logits.float() - expected).norm() / expected.norm() < 0.06


def test_other_devices_are_refused(tmp_path):
    make("Llama", tmp_path)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu").to("meta")
    with pytest.raises(ValueError, match="quantization='int8' is for device 'cpu', the model is on 'meta'"): to_int8(model)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_engine_in_int8(kernels, tmp_path, monkeypatch):
    "Answers do not depend on the batch or on chunks, greedy or drawn; without a compiler either."
    monkeypatch.setattr(quantization, "CAN_BUILD", kernels and CAN_BUILD)
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    llm = LLM(folder, quantization="int8", num_kv_blocks=60)
    together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == [llm.generate(p, s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params)]
    assert_idle(llm)
    chunked = LLM(folder, quantization="int8", num_kv_blocks=60, max_num_batched_tokens=16)
    assert together == [o["token_ids"] for o in chunked.generate(prompts, params, use_tqdm=False)]


def test_int8_over_two_ranks(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    greedy = SamplingParams(temperature=0, max_tokens=5)
    llm = LLM(folder, quantization="int8", tensor_parallel_size=2, device="cpu", num_kv_blocks=40)
    assert len(llm.generate("Hello", greedy, use_tqdm=False)[0]["token_ids"]) >= 1
