"""Four bits: rounding within its bound, bytes that hold what was put into them, products that equal whole numbers times scales, and
a request whose numbers nobody else can move."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, cpu_kernels
from nano_vllm.cpu_attention import TiledAttention
from nano_vllm.cpu_kernels import CAN_BUILD
from nano_vllm.cpu_products import TILE_OUTPUTS, load_product
from nano_vllm.cpu_steps import run_layers_at_once
from nano_vllm.int4 import (
    GROUP, INT4_SOURCE, LANES, WIDE, TiledInt4Product, int4_linear, pack_blocks, pack_nibbles, quantize_groups)
from nano_vllm.layers import OPS, Ops, choose_ops
from nano_vllm.model import ModelConfig
from nano_vllm.quantization import TiledInt8Product, group_size, hadamard, hadamard_int8, int8_linear_widened, int_mm_is_exact, quantize
from nano_vllm.weights import load_model
from test_cpu_kernels import ROUNDING, target
from test_model import make, our_logits

seeds = st.integers(0, 2**31)
widths = st.sampled_from([32, 64, 96, 160, 576, 1536])
quick = settings(max_examples=40, deadline=None)
compiled = pytest.mark.skipif(not CAN_BUILD, reason="no AVX2 or no g++ here")
REFUSAL = "quantization must be None or 'int8' here, got 'int4', which needs AVX2 or NEON, g"


def random(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- rounding and packing

@quick
@given(seeds, widths, st.floats(1e-6, 1e6))
def test_rounding_stays_within_half_a_step(seed, n, size):
    """Within a step where a number has the largest one's size and the other sign. A scale has 8 bits, so -8 of them may be
    off from the largest by 8 * 2^-8 of a step."""
    weight = random(seed, 6, n) * size
    q, scale = quantize_groups(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (6, n // GROUP)
    assert q.min() >= -8 and q.max() <= 7
    groups, steps = weight.view(6, -1, GROUP).double(), scale.double()[..., None]
    error = (groups - q.view(6, -1, GROUP) * steps).abs() / steps.abs()
    fits = groups / steps <= 7.5
    assert (error[fits] <= 0.5 + 8 * 2**-8).all() and (error <= 1 + 8 * 2**-8).all()
    largest = groups.abs().argmax(-1, keepdim=True)
    assert (q.view(6, -1, GROUP).gather(-1, largest) == -8).all()


def test_groups_of_zeros():
    weight = torch.zeros(16, 64)
    weight[3, 40] = 2e-38     # the scale of its group is below the smallest normal number
    q, scale = quantize_groups(weight)
    assert not q[:3].any() and scale.isfinite().all() and (scale != 0).all()
    if CAN_BUILD: assert not int4_linear(torch.zeros(16, 64))(random(0, 3, 64)).any()


def unpacked(packed, outputs):
    "(q, scale) out of the bytes of `pack_blocks`, number by number."
    tiles, _, groups, size = packed.shape
    q, scale = torch.zeros(outputs, groups * GROUP, dtype=torch.int8), torch.zeros(outputs, groups)
    for out in range(outputs):
        blocks = packed[out // TILE_OUTPUTS, out % TILE_OUTPUTS // LANES]
        lane = out % LANES
        for g in range(groups):
            for i in range(GROUP):
                byte = int(blocks[g, i // 8 * 4 * LANES + 4 * lane + i % 4])
                q[out, g * GROUP + i] = (byte >> 4 if i % 8 > 3 else byte & 15) - 8
            scale[out, g] = blocks[g, 16 * LANES + 2 * lane:][:2].view(torch.bfloat16).float()
    return q, scale


@settings(max_examples=6, deadline=None)
@given(seeds, st.sampled_from([16, 48, 64]), st.sampled_from([32, 96]))
def test_what_is_packed_can_be_found_again(seed, outputs, inputs):
    q = torch.randint(-8, 8, (outputs, inputs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    scale = random(seed, outputs, inputs // GROUP).bfloat16()
    packed = pack_blocks(q, scale)
    assert packed.shape == (-(-outputs // TILE_OUTPUTS), WIDE, inputs // GROUP, 18 * LANES) and packed.dtype == torch.uint8
    found, its_scale = unpacked(packed, outputs)
    assert torch.equal(found, q) and torch.equal(its_scale, scale.float())
    assert pack_nibbles(q).shape == (outputs, inputs // 8)


# ---- the product

def assert_exact(product, x, weight, bias=None):
    """A sum of a group is exact, and so is the float that it becomes; to scale and to add it, for each group, rounds twice, and so do
    the scale of the row and the bias."""
    (q, scale), (xq, x_scale) = quantize_groups(hadamard(weight)), hadamard_int8(x)
    dots = torch.einsum("rgi,ogi->rog", *(n.double().unflatten(1, (-1, GROUP)) for n in (xq, q)))   # exact: below 2^53
    terms = dots * scale.double() * x_scale.double()[..., None]
    bias = torch.zeros(len(weight)) if bias is None else bias
    size = terms.abs().sum(-1) + bias.abs()
    error = product.double() - (terms.sum(-1) + bias)
    assert (error.abs() <= (2 * scale.shape[1] + 4) * ROUNDING * size).all()


@compiled
@quick
@given(seeds, widths, st.integers(1, 40), st.sampled_from([16, 48, 112]), st.booleans())
def test_the_product_is_whole_numbers_times_scales(seed, n, rows, outputs, has_bias):
    x, weight = random(seed, rows, n), random(seed + 1, outputs, n)
    bias = random(seed + 2, outputs) if has_bias else None
    product = int4_linear(weight)
    assert type(product) is TiledInt4Product
    assert_exact(product(x, bias), x, weight, bias)


def extremes(n):
    "Rows and weights that are at the ends of their ranges everywhere once they are rotated, with all signs, and their product."
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    x, weight = (hadamard(sign[:, None].expand(4, n).contiguous()) for sign in signs.T)
    return x, weight.repeat(4, 1)


KINDS = {"": [], "without VNNI": ["__AVX512VNNI__", "__AVXVNNI__"],
         "without 16-bit products": ["__AVX512VNNI__", "__AVXVNNI__", "__AVX512BW__", "defined(__AVX2__)"]}


def product_without(names, weight):
    "The product with `weight` as a processor without some instructions computes it."
    source = INT4_SOURCE
    for name in names:
        assert name in source
        source = source.replace(name, "0" if "(" in name else "NOWHERE")
    product = int4_linear(weight)
    q, scale = quantize_groups(hadamard(weight))
    n = weight.shape[1]
    product.hold(load_product(source, N=n, SIZE=group_size(n)), weight.shape, pack_blocks(q, scale))
    return product


@compiled
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind or "as it is")
@pytest.mark.parametrize("n", [32, 576, 4096])
def test_all_instructions_give_the_same_sums(kind, n):
    "At the ends of the ranges, too: -8 and 7, -127 and 127."
    x, weight = random(1, 13, n), random(2, 48, n)
    product = product_without(KINDS[kind], weight)
    assert_exact(product(x), x, weight)
    assert torch.equal(product(x), int4_linear(weight)(x))
    x, weight = extremes(n)
    (q, _), (xq, _) = quantize_groups(hadamard(weight)), hadamard_int8(x)
    assert set(q.flatten().tolist()) == {-8} and set(xq.flatten().tolist()) == {-127, 127}
    assert_exact(product_without(KINDS[kind], weight)(x), x, weight)
    mixed = weight.clone()
    mixed[:, ::2] *= -1       # in a group, numbers of one size and both signs: -8 and 7
    assert_exact(product_without(KINDS[kind], hadamard(mixed))(x), x, hadamard(mixed))


@compiled
@quick
@given(seeds, st.sampled_from([64, 576]), st.integers(2, 30), st.floats(1e-3, 1e3))
def test_neighbours_move_nothing_to_the_bit(seed, n, rows, size):
    x, product = random(seed, rows, n), int4_linear(random(seed + 1, 64, n))
    x[1:] *= size
    together = product(x)
    assert torch.equal(together[:1], product(x[:1]))
    assert torch.equal(together[rows // 2:], product(x[rows // 2:].contiguous()))


@compiled
def test_shapes_of_rows():
    product = int4_linear(random(0, 64, 32))
    assert product(torch.zeros(0, 32)).shape == (0, 64)
    x = random(1, 2, 3, 32)
    assert torch.equal(product(x).flatten(0, 1), product(x.flatten(0, 1)))
    assert torch.equal(product(x.transpose(0, 1)), product(x).transpose(0, 1))


@compiled
def test_sixteen_bits_are_widened_first():
    weight, x = random(0, 48, 64).bfloat16(), random(1, 5, 64)
    assert torch.equal(int4_linear(weight)(x), int4_linear(weight.float())(x))


@compiled
@pytest.mark.parametrize("outputs, inputs", [(16, 48), (40, 64)])
def test_matrices_that_do_not_fit_have_eight_bits(outputs, inputs):
    weight, x = random(0, outputs, inputs), random(1, 3, inputs)
    if outputs % 16 and not int_mm_is_exact():
        with pytest.raises(ValueError, match="got 'int8'"): int4_linear(weight)
        return
    assert torch.equal(int4_linear(weight)(x), int8_linear_widened(weight)(x))


# ---- what is chosen, and what refused

FITTING = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, head_dim=16)


@compiled
def test_what_is_chosen(tmp_path):
    "What int8 has, with other products; all layers in one call; nothing without quantization, or on other devices."
    make("Llama", tmp_path, **FITTING)
    config = ModelConfig.from_folder(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        asked = target(config, dtype, quantization="int4")
        ops = OPS["int4"](asked)
        assert ops == replace(OPS["int8"](replace(asked, quantization="int8")), linear=int4_linear, head_linear=int8_linear_widened)
        assert choose_ops(asked) == replace(ops, run_layers=run_layers_at_once, attention=TiledAttention)
        assert choose_ops(asked, "int4") == ops
    assert choose_ops(target(config, quantization="int8")).head_linear is None
    for other in (target(config), target(config, quantization="int8"), target(config, quantization="int4", compile=True)):
        assert OPS["int4"](other) is None is OPS["int4_steps"](other)


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"quantization is 'int4', supported on device 'cpu'; .*{device}"):
        choose_ops(target(device=device, quantization="int4"))


def test_what_cannot_be_is_refused_by_name(tmp_path, monkeypatch):
    "Before any work: float16, experts in bfloat16, and a machine without a compiler."
    folder = tiny_folder(tmp_path, tokenizer=False)
    dense, sparse = (SimpleNamespace(mlp=mlp, quantization=None) for mlp in (None, "experts"))
    for asked in (target(dense, torch.float16), target(sparse, torch.bfloat16)):
        with pytest.raises(ValueError, match=REFUSAL): OPS["int4"](replace(asked, quantization="int4"))
    if CAN_BUILD: assert OPS["int4"](target(sparse, quantization="int4")).linear is int4_linear
    with pytest.raises(ValueError, match=REFUSAL): LLM(folder, dtype="float16", quantization="int4")
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    with pytest.raises(ValueError, match=REFUSAL): LLM(folder, quantization="int4")


# ---- models

def in_floats(weight):
    "An `ops.linear` which computes in float64 what the kernel has to."
    q, scale = quantize_groups(hadamard(weight.float()))
    kept = (q.double().unflatten(1, (-1, GROUP)) * scale.double()[..., None]).flatten(1)

    def product(x, bias=None):
        xq, x_scale = hadamard_int8(x.flatten(0, -2))
        y = (xq.double() @ kept.T * x_scale.double()).float()
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    return product


def head_in_floats(weight):
    q, scale = quantize(hadamard(weight.float()))
    return lambda x, bias=None: (lambda xq, s: xq.float() @ q.float().T * s * scale[:, 0])(*hadamard_int8(x))


@compiled
@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Llama", {}), ("Qwen2", {}), ("Qwen3", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_int4_is_the_rounded_model(family, changes, dtype, tmp_path):
    "The same model with other products; what a rounding of floats moves is here and there an activation, by a step of 1/127."
    make(family, tmp_path, **FITTING, vocab_size=96, **changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    asked = target(config, dtype, quantization="int4")
    small = load_model(tmp_path, config, dtype, "cpu", ops=choose_ops(asked))
    layer = small.model.layers[1]
    products = [m.product for m in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)]
    assert {type(p) for p in products} == {TiledInt4Product}
    head = small.model.embed_tokens if changes else small.lm_head
    assert family != "Llama" or type(head.product) is TiledInt8Product
    assert {n for n, p in small.named_parameters() if p.dim() == 2} == {"model.embed_tokens.weight"}
    ops = replace(choose_ops(asked), linear=in_floats, head_linear=head_in_floats, run_layers=Ops().run_layers)
    wanted = our_logits(load_model(tmp_path, config, dtype, "cpu", ops=ops), ids)
    floats = our_logits(load_model(tmp_path, config, torch.float32, "cpu"), ids)
    logits = our_logits(small, ids)
    assert logits.dtype == torch.float32 and (logits - wanted).norm() / wanted.norm() < 0.02
    assert (logits - floats).norm() / floats.norm() > 0.05     # four bits are no rounding error


@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_in_int4(dtype, tmp_path):
    "Answers do not depend on the batch or on chunks, greedy or drawn."
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    options = dict(dtype=dtype, quantization="int4", num_kv_blocks=60)
    llm = LLM(folder, **options)
    together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == [llm.generate(p, s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params)]
    assert_idle(llm)
    chunked = LLM(folder, **options, batch_invariant=True, max_num_batched_tokens=16)
    whole = LLM(folder, **options, batch_invariant=True)
    assert len({str([o["token_ids"] for o in made.generate(prompts, params, use_tqdm=False)]) for made in (chunked, whole)}) == 1
    slower = LLM(folder, **options, ops="int4")
    assert [len(o["token_ids"]) for o in slower.generate(prompts, params, use_tqdm=False)] == [20] * 3


@compiled
def test_int4_over_two_ranks(tmp_path):
    folder = tiny_folder(tmp_path, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
    llm = LLM(folder, quantization="int4", tensor_parallel_size=2, device="cpu", num_kv_blocks=40)
    assert len(llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0]["token_ids"]) >= 1
