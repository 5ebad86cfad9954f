"""Eight bits: rounding within its bound, rotations that change nothing, products of whole numbers that are exact, and a request
whose numbers nobody else can move. Where 8-bit sums are not exact, each of these is a refusal."""
import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from helpers import assert_idle, tiny_folder, weight_views
from nano_vllm import LLM, SamplingParams, cpu_kernels, quantization
from nano_vllm.cpu_kernels import CAN_BUILD, can_build
from nano_vllm.cpu_products import load_product, tiled
from nano_vllm.engine_args import EngineArgs, resolve_args
from nano_vllm.layers import OPS, Ops, TensorParallelGroup, choose_ops
from nano_vllm.model import ModelConfig, weight_shards
from nano_vllm.quantization import (W8A8_CONFIG, Int8Product, TiledInt8Product, check_int_mm, group_size, hadamard, hadamard_int8, int8_linear,
                                    int8_linear_widened, int8_source, int_mm_is_exact, quantize, read_w8a8, write_w8a8)
from nano_vllm.weights import empty_model, load_model, load_weights
from test_cpu_kernels import ROUNDING, target
from test_model import make, our_logits

seeds = st.integers(0, 2**31)
widths = st.sampled_from([16, 32, 48, 64, 112, 576]) | st.integers(2, 80)   # of one input torch._int_mm makes nonsense; no model has that
quick = settings(max_examples=60, deadline=None)
compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
REFUSAL = "quantization must be None here, got 'int8': .*saturate.* need AVX512-VNNI or AMX, or AVX2 or NEON, g"


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_product(weight):
    "The product with `weight` in int8; None, after a look at the refusal, if this machine has no exact one."
    outputs, inputs = weight.shape
    has_kernel = CAN_BUILD and weight.dtype == torch.float32 and inputs % 16 == 0 and outputs % 16 == 0
    if has_kernel or int_mm_is_exact():
        product = int8_linear(weight)
        assert type(product) is (TiledInt8Product if has_kernel else Int8Product)
        return product
    with pytest.raises(ValueError, match=REFUSAL): int8_linear(weight)


@quick
@given(seeds, widths, st.floats(1e-6, 1e6))
def test_rounding_stays_within_half_a_step(seed, n, size):
    "Besides half a step, a quotient of up to 127 is off by two roundings."
    x = random(seed, 5, n) * size
    q, scale = quantize(x)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and scale.shape == (5, 1)
    assert ((x.double() - q * scale.double()).abs() <= scale * (0.5 + 127 * 3 * ROUNDING)).all()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("outputs", [16, 24])
def test_what_is_no_number_stays_none_and_in_its_row(outputs, odd):
    "A model that is broken must not look whole: NaN is never the largest of a row."
    product, x = exact_product(random(0, outputs, 64)), random(1, 5, 64)
    if not product: return
    whole = product(x)
    x[2, 7] = odd
    y = product(x)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


@pytest.mark.parametrize("outputs", [16, 24])
def test_a_lone_row_and_weights_that_lie_otherwise(outputs):
    weight, x = random(0, 64, outputs).T, random(1, 3, 64)
    product = exact_product(weight)
    if not product: return
    assert torch.equal(product(x[0]), product(x)[0])
    numbers, scale = hadamard_int8(weight)
    given = type(product)(numbers.T.contiguous().T, scale)
    assert torch.equal(given(x), type(product)(numbers, scale)(x))


def test_a_row_of_zeros():
    for q, scale in (quantize(torch.zeros(2, 64)), hadamard_int8(torch.zeros(2, 64))):
        assert not q.any() and scale.isfinite().all() and (scale > 0).all()
    product = exact_product(torch.zeros(16, 64))
    if product: assert not product(torch.zeros(2, 64)).any()
    product = exact_product(torch.zeros(3, 64))
    if product: assert not product(torch.zeros(2, 64)).any()


@quick
@given(seeds, widths)
def test_rotating_both_sides_changes_no_product(seed, n):
    "Each of up to 6 stages and the last factor keep a row's norm, but for a rounding of it; the product then sums n numbers."
    x, w = random(seed, 3, n), random(seed + 1, 4, n)
    lengths = x.double().norm(dim=-1)[:, None] * w.double().norm(dim=-1)
    error = (hadamard(x) @ hadamard(w).T).double() - x.double() @ w.double().T
    assert (error.abs() <= (n + 2 * 8) * ROUNDING * lengths).all()
    back = hadamard(hadamard(x)) - x   # it is its own inverse
    assert (back.norm(dim=-1) <= 2 * 8 * ROUNDING * x.norm(dim=-1)).all()
    assert n % group_size(n) == 0


@compiled
@quick
@given(seeds, widths, st.integers(1, 9))
def test_the_kernel_rotates_and_rounds_as_pytorch_does(seed, n, rows):
    "A rotated number is off by 8 roundings of its group's norm, which is at most 8 times the group's largest number."
    x = random(seed, rows, n)
    (q, scale), (expected, expected_scale) = hadamard_int8(x), quantize(hadamard(x))
    relative = (8 * group_size(n)**0.5 + 4) * ROUNDING
    torch.testing.assert_close(scale, expected_scale, rtol=2 * relative, atol=0)
    steps = hadamard(x.double()) / expected_scale.double()
    between = (steps.frac().abs() - 0.5).abs() <= 127 * 2 * relative   # a number between two steps may go either way
    off = (q.int() - expected.int()).abs()
    assert off.max() <= 1 and (between | (off == 0)).all()


def test_a_step_that_wants_no_logits():
    for outputs in (5, 16):
        product = exact_product(random(0, outputs, 64))
        if product: assert product(random(1, 0, 64)).shape == (0, outputs)


@quick
@given(seeds, widths, st.integers(1, 40), st.sampled_from([13, 32, 96]), st.booleans())
def test_the_product_of_whole_numbers_is_exact(seed, n, rows, outputs, has_bias):
    "Only turning the sum into a float, both scales and the bias round."
    x, weight = random(seed, rows, n), random(seed + 1, outputs, n)
    bias = random(seed + 2, outputs) if has_bias else torch.zeros(outputs)
    product, (whole, weight_scale) = exact_product(weight), hadamard_int8(weight)
    if product is None: return
    q, scale = hadamard_int8(x)
    exact = (q.double() @ whole.double().T) * scale.double() * weight_scale[:, 0].double()
    error = product(x, bias if has_bias else None).double() - (exact + bias)
    assert (error.abs() <= 6 * ROUNDING * (exact.abs() + bias.abs())).all()


@quick
@given(seeds, st.sampled_from([48, 576, 20]), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_neighbours_move_nothing_to_the_bit(seed, n, rows, size):
    for outputs in (40, 64):
        x, product = random(seed, rows, n), exact_product(random(seed + 1, outputs, n))
        if product is None: continue
        x[1:] *= size
        assert torch.equal(product(x)[:1], product(x[:1]))


@pytest.mark.parametrize("outputs", [40, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_extremes_do_not_overflow(outputs, sign):
    "All whole numbers at the end of their range, in the longest rows that a model has; in their sizes nothing rounds but the result."
    for ends in (torch.ones(1, 16384), hadamard(torch.ones(1, 16384))):
        x, product = ends.repeat(9, 1), exact_product(sign * ends.repeat(outputs, 1))
        if product: torch.testing.assert_close(product(x), torch.full((9, outputs), sign * 16384.0), rtol=8 * ROUNDING, atol=0)


@pytest.mark.parametrize("outputs", [40, 64])
def test_no_rows_at_all(outputs):
    product = exact_product(random(0, outputs, 64))
    if product: assert product(torch.zeros(0, 64)).shape == (0, outputs)


# ---- where sums are exact, and where not

@quick
@given(seeds, st.integers(1, 40), st.integers(2, 600), st.integers(2, 40))
def test_the_probe_tells_whether_pytorch_adds_right(seed, rows, inputs, outputs):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-127, 128, (n, inputs), generator=g, dtype=torch.int8) for n in (rows, outputs))
    if int_mm_is_exact(): assert torch.equal(torch._int_mm(x, w.T).long(), x.long() @ w.long().T)
    else: assert not torch.equal(torch._int_mm(x.fill_(127), w.fill_(127).T).long(), x.long() @ w.long().T)


@compiled
@pytest.mark.parametrize("n", [16, 64, 112, 576])
def test_the_kernel_is_exact_without_instructions_for_it(n):
    "As a processor with AVX-512 but without VNNI computes it."
    class Plain(TiledInt8Product):
        def __init__(self, weight):
            q, scale = hadamard_int8(weight)
            source = int8_source(registers=False).replace("__AVX512VNNI__", "NOWHERE")
            assert source.count("NOWHERE") == int8_source(registers=False).count("__AVX512VNNI__") > 0
            self.hold(load_product(source, N=n, SIZE=group_size(n)), weight.shape, tiled(q.view(torch.int32)), scale[:, 0].contiguous(),
                      128 * q.sum(1, dtype=torch.int32))
    weight, x = random(1, 64, n), random(2, 13, n)
    weight[0], x[0] = hadamard(torch.ones(n)), hadamard(torch.ones(n))
    assert torch.equal(Plain(weight)(x), TiledInt8Product(weight)(x))


def test_a_machine_without_exact_sums_refuses(monkeypatch, tmp_path):
    "By name and before any work; what computes in float32 with AVX-512 has its own kernel."
    monkeypatch.setattr(quantization, "int_mm_is_exact", lambda: False)
    config = ModelConfig.from_folder(tiny_folder(tmp_path, tokenizer=False, intermediate_size=64))
    asked = target(config, torch.float16, quantization="int8")
    for choose in (check_int_mm, lambda: choose_ops(asked), lambda: choose_ops(asked, "int8"), lambda: int8_linear(random(0, 5, 16))):
        with pytest.raises(ValueError, match=REFUSAL): choose()
    with pytest.raises(ValueError, match=REFUSAL): LLM(tmp_path, dtype="float16", quantization="int8")
    for dtype in (torch.float32, torch.bfloat16):
        if CAN_BUILD: assert choose_ops(replace(asked, dtype=dtype)).linear is int8_linear_widened
        with monkeypatch.context() as without:
            without.setattr(cpu_kernels, "CAN_BUILD", False)
            with pytest.raises(ValueError, match=REFUSAL): choose_ops(replace(asked, dtype=dtype))


def test_what_is_chosen():
    "What cpu_products or bfloat16 have besides their products; nothing without quantization, or on other devices."
    dense = SimpleNamespace(mlp=None, quantization=None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        asked, own = target(dense, dtype, quantization="int8"), CAN_BUILD and dtype != torch.float16
        if not (int_mm_is_exact() or own): continue
        plain = OPS["bfloat16" if own and dtype == torch.bfloat16 else "cpu_products"](target(dense, dtype)) or Ops()
        assert OPS["int8"](asked) == replace(plain, linear=int8_linear_widened if own else int8_linear)
    assert OPS["int8"](target()) is None and OPS["int8"](target(quantization="int8", compile=True)) is None


# ---- models

def int8_model(folder, dtype):
    "A model in int8; None, after a look at the refusal, if this machine has no exact products for it."
    config = ModelConfig.from_folder(folder)
    asked = target(config, dtype, quantization="int8")
    if int_mm_is_exact(): return load_model(folder, config, dtype, "cpu", ops=choose_ops(asked))
    with pytest.raises(ValueError, match=REFUSAL): load_model(folder, config, dtype, "cpu", ops=choose_ops(asked))


@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Qwen2", {}), ("Qwen3", {})])
def test_a_model_in_int8_stays_near_the_floats(family, changes, tmp_path):
    make(family, tmp_path, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    plain, small = load_model(tmp_path, config, torch.float32, "cpu"), int8_model(tmp_path, torch.float32)
    if small is None: return
    expected, logits = our_logits(plain, ids), our_logits(small, ids)
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05
    assert {n for n, p in small.named_parameters() if p.dim() == 2} == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{}, dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)], ids=["any sizes", "16 n"])
def test_models_in_sixteen_bits(sizes, dtype, tmp_path):
    "bfloat16 ones compute in float32 where there are kernels, and then have the same whole numbers as float32 ones."
    make("Llama", tmp_path, **sizes)
    config, ids = ModelConfig.from_folder(tmp_path), list(range(20))
    model, small = load_model(tmp_path, config, torch.float32, "cpu"), int8_model(tmp_path, dtype)
    if small is None: return
    expected, logits = our_logits(model, ids), our_logits(small, ids)
    widened = CAN_BUILD and dtype == torch.bfloat16
    assert logits.dtype == (torch.float32 if widened else dtype)
    assert (logits.float() - expected).norm() / expected.norm() < 0.06
    if sizes: assert (type(small.model.layers[0].mlp.down_proj.product) is TiledInt8Product) == widened


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_other_devices_are_refused(device):
    asked = target(device=device, quantization="int8")
    with pytest.raises(ValueError, match=f"quantization is 'int8', supported on device 'cpu'; .*{device}"): choose_ops(asked)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_engine_in_int8(kernels, tmp_path, monkeypatch):
    "Answers do not depend on the batch or on chunks, greedy or drawn; without a compiler either."
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", kernels and CAN_BUILD)
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    if not (int_mm_is_exact() or cpu_kernels.CAN_BUILD):
        with pytest.raises(ValueError, match=REFUSAL): LLM(folder, quantization="int8", num_kv_blocks=60)
        return
    llm = LLM(folder, quantization="int8", num_kv_blocks=60)
    together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == [llm.generate(p, s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params)]
    assert_idle(llm)
    chunked = LLM(folder, quantization="int8", num_kv_blocks=60, max_num_batched_tokens=16)
    assert together == [o["token_ids"] for o in chunked.generate(prompts, params, use_tqdm=False)]


def test_int8_over_two_ranks(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    greedy = SamplingParams(temperature=0, max_tokens=5)
    def make_llm(): return LLM(folder, quantization="int8", tensor_parallel_size=2, device="cpu", num_kv_blocks=40)
    if not int_mm_is_exact():   # a rank's part of the MLP has 24 columns, which the kernel does not take
        with pytest.raises(ValueError, match=REFUSAL): make_llm()
        return
    assert len(make_llm().generate("Hello", greedy, use_tqdm=False)[0]["token_ids"]) >= 1


# ---- checkpoints in W8A8

SIZES = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)


def w8a8_folder(tmp_path, family="Llama", **changes):
    """A random model of a family in W8A8, its matrices made anew: of whole numbers from -128, rows without 127, and scales of two signs.

    What rounds them once more, or drops a sign, moves them."""
    make(family, tmp_path/"floats", **changes)
    made = tmp_path/"w8a8"
    made.mkdir()
    write_w8a8(tmp_path/"floats", made)
    tensors, g = load_file(made/"model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight = tensors[name.removesuffix("_scale")]
        weight.copy_(torch.randint(-128, 101, weight.shape, generator=g))
        tensors[name] = 0.003 * torch.randn(len(weight), 1, generator=g)
    save_file(tensors, made/"model.safetensors")
    return made


def with_config(folder, change):
    "The folder after `change` has edited its quantization_config."
    config = json.loads((folder/"config.json").read_text())
    change(config["quantization_config"])
    (folder/"config.json").write_text(json.dumps(config))
    return folder


def w8a8_target(folder, dtype=torch.float32): return target(ModelConfig.from_folder(folder), dtype, quantization="int8")


def has_products(folder, dtype):
    "Has this machine exact products for a W8A8 folder? If not, a look at the refusal. Its output layer, in floats, needs none."
    config = ModelConfig.from_folder(folder)
    fits = all(n % 16 == 0 for n in (config.hidden_size, config.intermediate_size, config.head_dim))
    if int_mm_is_exact() or CAN_BUILD and fits and dtype != torch.float16: return True
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu", ops=choose_ops(w8a8_target(folder, dtype)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(mlp_bias=True, attention_bias=True)),
                                             ("Qwen2", {}), ("Qwen3", {})])
def test_the_whole_numbers_of_a_checkpoint_are_kept_to_the_bit(family, changes, ranks, tmp_path):
    "In merged matrices and in the parts of ranks, whatever the model's number type; and the scales, which stay in float32."
    folder = w8a8_folder(tmp_path, family, **changes)
    config, tensors = ModelConfig.from_folder(folder), load_file(folder/"model.safetensors")
    assert config.quantization == "int8" and config.tied == changes.get("tie_word_embeddings", False)
    for dtype in (torch.float32, torch.bfloat16):
        ops = replace(Ops(), int8_weights=True)
        for rank in range(ranks):
            group = TensorParallelGroup(rank, ranks)
            model = empty_model(config, dtype, "cpu", group, ops)
            load_weights(model, folder)
            for name, (view, shape, index) in weight_shards(model).items():
                kind = tensors[name].dtype if "_proj.weight" in name else dtype
                assert view.dtype == kind and torch.equal(view, tensors[name][index].to(kind)), name
    assert {n for n, t in tensors.items() if t.dtype == torch.int8} == {n for n in tensors if n.endswith("_proj.weight")}


def expected_logits(folder, ids):
    "By a float32 model whose layers multiply as W8A8 says: rows and weights in whole numbers, exact sums, two scales."
    tensors = load_file(folder/"model.safetensors")
    config = replace(ModelConfig.from_folder(folder), quantization=None)
    model = empty_model(config, torch.float32, "cpu")
    for name, view in weight_views(model).items():
        view.copy_(tensors[name].double() * tensors[f"{name}_scale"].double() if f"{name}_scale" in tensors else tensors[name])

    def pretend(module, args):
        q, scale = quantize(args[0])
        return q * scale
    for name, module in model.named_modules():
        if name.endswith("_proj"): module.register_forward_pre_hook(pretend)
    return our_logits(model, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{}, SIZES], ids=["any sizes", "16 n"])
@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Qwen2", {}), ("Qwen3", {})])
def test_a_checkpoint_in_w8a8(family, changes, sizes, dtype, tmp_path):
    "No rotation; the output layer in the model's own number type. A float32 number on the edge of two steps may go either way: 1/254 of a row."
    folder, ids = w8a8_folder(tmp_path, family, **sizes | changes), [(7*i + i*i) % 90 for i in range(24)]
    if not has_products(folder, dtype): return
    ops = choose_ops(w8a8_target(folder, dtype))
    small = load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu", ops=ops)
    logits, expected = our_logits(small, ids), expected_logits(folder, ids)
    assert (logits.float() - expected).norm() / expected.norm() < (0.01 if dtype == torch.float32 else 0.06)
    product, own = small.model.layers[0].mlp.down_proj.product, CAN_BUILD and dtype != torch.float16
    assert type(product) is (TiledInt8Product if own and sizes else Int8Product)
    assert type(small.head.product) is not TiledInt8Product and "model.layers.0.mlp.down_proj.weight_scale" not in dict(small.named_parameters())


def test_a_second_rounding_would_be_seen(tmp_path, monkeypatch):
    "The planted bug: numbers times scales, rotated and rounded like floats."
    folder, ids = w8a8_folder(tmp_path, **SIZES), list(range(24))
    if not has_products(folder, torch.float32): return
    monkeypatch.setattr(quantization, "int8_as_it_is", lambda weight, scale: int8_linear(weight * scale))
    monkeypatch.setattr(quantization, "Int8Product", lambda weight, scale: int8_linear(weight * scale))
    small = load_model(folder, ModelConfig.from_folder(folder), torch.float32, "cpu", ops=choose_ops(w8a8_target(folder)))
    expected = expected_logits(folder, ids)
    assert (our_logits(small, ids) - expected).norm() / expected.norm() > 0.01


@quick
@given(seeds, widths, st.integers(1, 40), st.sampled_from([13, 32, 96]), st.booleans())
def test_the_product_of_given_numbers_is_exact(seed, n, rows, outputs, has_bias):
    "From -128 to 127; only the rows are rounded, and turning the sum into a float, both scales and the bias round."
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, n), generator=g).to(torch.int8)
    x, scale, bias = random(seed, rows, n), random(seed + 1, outputs, 1), random(seed + 2, outputs) if has_bias else None
    kinds = [Int8Product] * int_mm_is_exact() + [TiledInt8Product] * (CAN_BUILD and n % 16 == 0 and outputs % 16 == 0)
    for kind in kinds:
        y, (q, row_scale) = kind(weight, scale)(x, bias), quantize(x)
        exact = (q.double() @ weight.double().T) * row_scale.double() * scale[:, 0].double()
        size = (q.double().abs() @ weight.double().abs().T) * row_scale.double() * scale[:, 0].double().abs()
        slack = row_scale * 128 * scale[:, 0].abs() * (kind is TiledInt8Product)   # a number of a row may lie between two steps
        error = (y.double() - (exact + (0 if bias is None else bias))).abs()
        assert (error <= 8 * ROUNDING * (size + (0 if bias is None else bias.abs())) + slack).all()


def test_the_engine_loads_a_checkpoint_in_w8a8(tmp_path, tiny):
    "By itself in int8; the same answers alone, together and in chunks; over two ranks; what says otherwise is refused by name."
    made = tmp_path/"w8a8"
    made.mkdir()
    write_w8a8(tiny_folder(tmp_path/"floats", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64), made)
    for wrong in ("int4", "awq"):
        with pytest.raises(ValueError, match=f"quantization must be 'int8' or left out, as the checkpoint's matrices are in int8, got '{wrong}'"):
            LLM(made, quantization=wrong)
    with pytest.raises(ValueError, match="quantization must be one of .*, got 'compressed-tensors'"): LLM(tiny, quantization="compressed-tensors")
    if not (int_mm_is_exact() or CAN_BUILD):
        with pytest.raises(ValueError, match=REFUSAL): LLM(made)
        return
    with pytest.raises(ValueError, match="ops is 'torch', which does not suit"): LLM(made, ops="torch")
    with pytest.raises(ValueError, match="batch_invariant must be False"): LLM(made, batch_invariant=True)
    with pytest.raises(ValueError, match="'self' needs quantization=None, got 'int8'"):
        LLM(made, speculative_config=dict(method="self", num_speculative_tokens=2))
    prompts, params = ["Hello", "Once upon a time there was a cat"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = []
    for options in ({}, dict(quantization="int8"), dict(quantization="compressed-tensors"), dict(max_num_batched_tokens=16), dict(tensor_parallel_size=2)):
        llm = LLM(made, num_kv_blocks=60, device="cpu", **options)
        assert llm.engine.config.args.quantization == "int8" and llm.engine.config.ops.int8_weights
        answers.append([o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)])
        assert_idle(llm)
    assert all(given == answers[0] for given in answers[:4]) and [len(ids) for ids in answers[4]] == [12, 12]


def test_dummy_weights_in_w8a8(tmp_path):
    folder = w8a8_folder(tmp_path, **SIZES)
    if not has_products(folder, torch.float32): return
    (folder/"model.safetensors").unlink()
    def logits():
        return our_logits(load_model(folder, ModelConfig.from_folder(folder), torch.float32, "cpu", "dummy", ops=choose_ops(w8a8_target(folder))), [1, 2, 3])
    assert logits().isfinite().all() and torch.equal(logits(), logits()) and logits().std() > 0


def group(change): return lambda config: change(config["config_groups"]["group_0"])


WRONG = {
    "floats of eight bits": (lambda c: c.update(format="float-quantized"), "format is 'float-quantized', supported: 'int-quantized'"),
    "packed": (lambda c: c.update(format="pack-quantized"), "format is 'pack-quantized'"),
    "no format": (lambda c: c.pop("format"), "format is None"),
    "four bits": (group(lambda g: g["weights"].update(num_bits=4)), r"config_groups.group_0.weights.num_bits is 4, supported: 8 \(W8A8: "),
    "fp8": (group(lambda g: g["weights"].update(type="float")), "weights.type is 'float', supported: 'int'"),
    "asymmetric weights": (group(lambda g: g["weights"].update(symmetric=False)), "weights.symmetric is False, supported: True"),
    "groups": (group(lambda g: g["weights"].update(strategy="group", group_size=128)), "weights.strategy is 'group', supported: 'channel'"),
    "one scale": (group(lambda g: g["weights"].update(strategy="tensor")), "weights.strategy is 'tensor'"),
    "no strategy": (group(lambda g: g["weights"].pop("strategy")), "weights.strategy is None"),
    "dynamic weights": (group(lambda g: g["weights"].update(dynamic=True)), "weights.dynamic is True"),
    "static activations": (group(lambda g: g["input_activations"].update(dynamic=False)), "input_activations.dynamic is False, supported: True"),
    "left out and so static": (group(lambda g: g["input_activations"].pop("dynamic")), "input_activations.dynamic is False, supported: True"),
    "asymmetric activations": (group(lambda g: g["input_activations"].update(symmetric=False)), "input_activations.symmetric is False"),
    "activations by tensor": (group(lambda g: g["input_activations"].update(strategy="tensor")), "input_activations.strategy is 'tensor', supported: 'token'"),
    "activations in floats": (group(lambda g: g.update(input_activations=None)), "input_activations.num_bits is None"),
    "weights in floats": (group(lambda g: g.pop("weights")), "weights.num_bits is None"),
    "output activations": (group(lambda g: g.update(output_activations=dict(num_bits=8))), "output_activations is {'num_bits': 8}, supported: None"),
    "other targets": (group(lambda g: g.update(targets=["re:.*q_proj"])), "targets is ..re:.*q_proj.., supported: .'Linear'."),
    "a format of its own": (group(lambda g: g.update(format="naive-quantized")), "group_0.format is 'naive-quantized'"),
    "two groups": (lambda c: c["config_groups"].update(group_1={}), "config_groups is .*, supported: one group"),
    "no groups": (lambda c: c.pop("config_groups"), "config_groups is None, supported: one group"),
    "a group that is a list": (lambda c: c["config_groups"].update(group_0=[]), "group_0.targets is None"),
    "a layer in floats": (lambda c: c["ignore"].append("model.layers.0.mlp.down_proj"), "ignore is .*down_proj.*, supported: .'lm_head'."),
    "an output layer in int8": (lambda c: c.update(ignore=[]), r"ignore is \[\], supported: .'lm_head'."),
    "keys and values in eight bits": (lambda c: c.update(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme is {'num_bits': 8}, supported: None"),
    "two of four": (lambda c: c.update(sparsity_config=dict(format="sparse-24-bitmask")), "sparsity_config.format is 'sparse-24-bitmask', supported: 'dense'"),
    "pruned in some way": (lambda c: c.update(sparsity_config=[1]), "sparsity_config.format is None"),
    "rotated": (lambda c: c.update(transform_config=dict(config_groups=dict(R1={}))), "transform_config is"),
    "another method": (lambda c: c.update(quant_method="gptq"), "quantization_config is .*gptq.*, supported as its quant_method: compressed-tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_schemes_are_refused_by_name(name, tmp_path):
    make("Llama", tmp_path)
    config, (change, words) = json.loads((tmp_path/"config.json").read_text()), WRONG[name]
    (tmp_path/"config.json").write_text(json.dumps(config | {"quantization_config": copy.deepcopy(W8A8_CONFIG)}))
    assert ModelConfig.from_folder(tmp_path).quantization == "int8"
    with pytest.raises(ValueError, match=words): ModelConfig.from_folder(with_config(tmp_path, change))


def test_what_such_configs_say_besides():
    "As llm-compressor writes them."
    said = copy.deepcopy(W8A8_CONFIG) | dict(kv_cache_scheme=None, sparsity_config={}, transform_config={}, version="0.12", quantization_status="compressed",
                                             global_compression_ratio=None)
    said["config_groups"]["group_0"] |= dict(output_activations=None, format="int-quantized")
    said["config_groups"]["group_0"]["weights"] |= dict(actorder=None, block_structure=None, group_size=None, observer="minmax", observer_kwargs={})
    for name in ("num_bits", "type", "symmetric"): said["config_groups"]["group_0"]["input_activations"].pop(name)    # which are the defaults
    assert read_w8a8(said) == read_w8a8(said | dict(ignore=["re:.*lm_head"])) == "int8"
    pruned = dict(format="dense", global_sparsity=0.14, ignore=[], registry_requires_subclass=False, sparsity_structure="unstructured", targets=[])
    assert read_w8a8(said | dict(sparsity_config=pruned)) == "int8"       # zeros that are stored like other numbers


def test_a_checkpoint_that_is_not_as_its_config_says(tmp_path):
    "Floats in the place of whole numbers, scales that are missing, or too few."
    folder = w8a8_folder(tmp_path)
    tensors, config = load_file(folder/"model.safetensors"), ModelConfig.from_folder(folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    def load(**changes):
        save_file({n: t for n, t in (tensors | changes).items() if t is not None}, folder/"model.safetensors")
        load_weights(empty_model(config, torch.float32, "cpu", ops=Ops(int8_weights=True)), folder)
    load()
    with pytest.raises(ValueError, match=f"{name}: numbers in the checkpoint are F32, supported: I8"): load(**{name: tensors[name].float()})
    with pytest.raises(ValueError, match=f"{name}: numbers in the checkpoint are F8_E4M3, supported: I8"):
        load(**{name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=f"1 tensors are missing: {name}_scale"): load(**{f"{name}_scale": None})
    with pytest.raises(ValueError, match=f"{name}_scale: shape in the checkpoint is .1, 1.,"): load(**{f"{name}_scale": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=f"1 tensors are surplus: {name}_zero_point"): load(**{f"{name}_zero_point": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{name}_scale: some of its numbers are NaN"):
        load(**{f"{name}_scale": tensors[f"{name}_scale"] * float("nan")})


def test_no_experts_in_w8a8(tmp_path):
    folder = w8a8_folder(tmp_path)
    config = replace(ModelConfig.from_folder(folder), mlp=object)
    with pytest.raises(ValueError, match="quantization_config must be left out for a mixture of experts"):
        choose_ops(target(config, quantization="int8"))
