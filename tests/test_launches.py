"""Add and norm, SwiGLU, and the rounding of rows to e4m3, in one launch each, interpreted: against the functions they replace; and how many launches a layer of a decode step has."""
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import run_compiler
from nano_vllm import fusions
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.fp8 import EmulatedFp8Product, Fp8Product, fp8_linear, quantize_fp8
from nano_vllm.fusions import (
    CountingRecorder, FusedFp8Product, fused_norm, fused_rope_and_cache, fused_silu_and_mul, launches, quantize_rows)
from nano_vllm.layers import Ops, Target, choose_ops, rms_norm, rope_and_cache, silu_and_mul
from nano_vllm.model_runner import ModelRunner
from nano_vllm.cpu_kernels import PlainProduct
from nano_vllm.triton_attention import TritonAttention
from nano_vllm.weights import load_model
from test_fused_rows import rounded
from test_graphs import make_config
from test_triton_attention import few, poison  # noqa: F401 (a fixture: torch.empty gives NaN)

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; make gpu runs them on one"),
              pytest.mark.filterwarnings("ignore:overflow encountered in exp")]
DTYPES = torch.float32, torch.float16, torch.bfloat16
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}     # between two numbers, as a part of them
WIDTHS = [1, 2, 3, 31, 48, 64, 100, 576, 1000, 1024, 1025, 3072, 5000]


def with_steps(draw, g, *shape):
    "Numbers of that shape which need not lie side by side: rows of a wider matrix, every second number, or columns."
    kind = draw(st.sampled_from(["contiguous", "wide", "second", "columns"]))
    *rows, dim = shape
    if kind == "contiguous": return torch.randn(*shape, generator=g)
    if kind == "wide": return torch.randn(*rows, dim + 7, generator=g)[..., 3:3 + dim]
    if kind == "second": return torch.randn(*rows, 2*dim, generator=g)[..., ::2]
    return torch.randn(dim, *rows, generator=g).movedim(0, -1)


@st.composite
def norms(draw):
    "(x, weight, eps, residual or None)."
    g, dtype = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.sampled_from(DTYPES))
    shape = *draw(st.sampled_from([(), (1,), (4,), (3, 2), (0,)])), draw(st.sampled_from(WIDTHS))
    scale = draw(st.sampled_from([1, 1, .01, 50]))
    x, residual = ((scale * with_steps(draw, g, *shape)).to(dtype) for _ in range(2))
    return x, torch.randn(shape[-1], generator=g).to(dtype), draw(st.sampled_from([1e-6, 1e-2])), residual if draw(st.booleans()) else None


def assert_rounded_alike(ours, exact, dtype):
    """`ours` is `exact`, float64 numbers that were rounded where the model rounds, but for the last bits of float32.

    In 16 bits such a bit seldom decides how a number is rounded, and then by one step of this number, or of the one it is made of."""
    assert ours.dtype == dtype and ours.shape == exact.shape and not ours.isnan().any()
    gap, size = (ours.double() - exact).abs(), exact.abs()
    if dtype == torch.float32: assert (gap <= 16 * STEP[dtype] * size + 1e-30).all()
    else:
        assert (gap <= 2.01 * STEP[dtype] * size + torch.finfo(dtype).smallest_normal * 2.01 * STEP[dtype]).all()
        assert int((gap > 0).sum()) <= .005*gap.numel() + 2


@few(120)
@given(norms())
def test_the_norm(case):
    x, weight, eps, residual = case
    kept = [y.clone() for y in (x, weight, residual) if y is not None]
    got = fused_norm(x, weight, eps, residual)
    dtype, z = x.dtype, x.float()
    if residual is None: assert got.is_contiguous()
    else:
        z = rounded(z + residual.float(), dtype)
        got, total = got
        assert total.dtype == dtype and got.is_contiguous() and total.is_contiguous() and torch.equal(total.float(), z), "the sum is the same to the last bit"
    scaled = rounded((z.double() * torch.rsqrt(z.double().square().mean(-1, keepdim=True) + eps)).float(), dtype)
    assert_rounded_alike(got, rounded((scaled.double() * weight.double()).float(), dtype).double(), dtype)
    assert all(torch.equal(old, new) for old, new in zip(kept, (y for y in (x, weight, residual) if y is not None))), "an input was written to"


@st.composite
def gates(draw):
    g, dtype = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.sampled_from(DTYPES))
    shape = *draw(st.sampled_from([(), (1,), (4,), (3, 2), (0,)])), 2*draw(st.sampled_from(WIDTHS))
    scales = [1, 10, .01] + [100] * (dtype != torch.float16)      # its numbers end at 65,504
    return (draw(st.sampled_from(scales)) * with_steps(draw, g, *shape)).to(dtype)


@few(120)
@given(gates())
def test_the_activation(x):
    kept = x.clone()
    got, (gate, up) = fused_silu_and_mul(x), x.double().chunk(2, -1)
    assert got.is_contiguous()
    silu = rounded((gate / (1 + torch.exp(-gate))).float(), x.dtype)
    wanted = rounded((silu.double() * up).float(), x.dtype).double()
    # below, numbers have fewer digits; and e**89 is infinite in float32, so a silu of -89 * e**-89 is 0
    tiny = max(torch.finfo(x.dtype).smallest_normal, 3e-37)
    plain = (wanted.abs() > tiny * up.abs().clamp(min=1)) | (wanted == 0)
    assert_rounded_alike(got.where(plain, 0), wanted.where(plain, 0), x.dtype)
    assert (got[~plain].double() - wanted[~plain]).abs().le(2 * tiny * up[~plain].abs().clamp(min=1)).all()
    assert torch.equal(x, kept), "the input was written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_formulas_are_the_functions(dtype):
    "What these tests compare with is what a model runs without these kernels; the interpreter cuts bfloat16, so that is left out."
    torch.manual_seed(0)
    x, residual, weight = torch.randn(2, 7, 100).to(dtype).unbind() + (torch.randn(100).to(dtype),)
    ours, theirs = fused_norm(x, weight, 1e-6, residual), rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(ours[1], theirs[1])
    for a, b in ((ours[0], theirs[0]), (fused_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6)), (fused_silu_and_mul(x), silu_and_mul(x))):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, atol=0, rtol=2.01*STEP[dtype] if dtype != torch.float32 else 16*STEP[dtype])


def test_a_weight_of_float32_widens_the_result():
    x, weight = torch.randn(3, 20).half(), torch.randn(20)
    ours, theirs = fused_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=2**-9, rtol=2**-9)


# ---- rows in eight bits

def alike(ours, theirs): return torch.equal(ours.float().nan_to_num(7777), theirs.float().nan_to_num(7777))


@st.composite
def wide_rows(draw):
    g, dtype = torch.Generator().manual_seed(draw(st.integers(0, 2**31))), draw(st.sampled_from(DTYPES))
    count, width = draw(st.sampled_from([0, 1, 3, 17])), draw(st.sampled_from(WIDTHS))
    sizes = 10. ** torch.randint(-6, 4, (count, 1), generator=g) * torch.where(torch.rand(count, width, generator=g) < .02, 50, 1)
    return (with_steps(draw, g, count, width) * sizes).clamp(-6e4, 6e4).to(dtype)


@few(120)
@given(wide_rows())
def test_rows_in_eight_bits(x):
    "The numbers and scales of the function, to the last bit; a zero may have another sign."
    kept = x.clone()
    (q, scale), (wanted, its_scale) = quantize_rows(x), quantize_fp8(x)
    assert q.dtype == wanted.dtype and scale.dtype == torch.float32 and torch.equal(scale, its_scale) and q.is_contiguous()
    assert q.shape == wanted.shape and alike(q, wanted)
    assert torch.equal(x, kept), "the input was written to"


def test_every_number_of_e4m3_and_the_middles_between():
    "Ties go to the even number; below 2**-6 numbers lie 2**-9 apart."
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([numbers, middles, middles.nextafter(torch.tensor(0.)), middles.nextafter(torch.tensor(500.))])
    x = torch.cat([near, -near])[None]
    q, scale = quantize_rows(x)
    assert scale.item() == 1 and q[0, :127].float().equal(numbers) and alike(q, x.to(torch.float8_e4m3fn))


def test_a_row_of_zeros_and_one_that_is_not_finite():
    x = torch.zeros(3, 16)
    x[1, 4], x[2] = torch.nan, 5
    q, scale = quantize_rows(x)
    assert (q[0].float() == 0).all() and (q[2].float() == 448).all() and scale[2].item() == torch.tensor(5 / 448).item()
    assert scale[0].item() == quantize_fp8(x)[1][0].item() > 0
    assert not (q[1].float() * scale[1]).sum().isfinite(), "NaN is not hidden"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)
def test_a_gpu_with_fp8_rounds_rows_in_one_launch(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    asked = target(quantization="fp8")
    plain, ops = choose_ops(asked, "fp8"), choose_ops(asked)
    if capability < (8, 9): assert ops.linear.keywords["product"] is EmulatedFp8Product and fusions.fp8_fusion_ops(asked) is None
    else:
        assert ops.linear.keywords == plain.linear.keywords | dict(product=FusedFp8Product) and ops == replace(plain, linear=ops.linear)
        assert ops.norm is fused_norm and choose_ops(replace(asked, compile=True)).linear.keywords["product"] is FusedFp8Product
    for changes in (dict(quantization=None), dict(quantization="int8"), dict(device=torch.device("cpu"))):
        assert fusions.fp8_fusion_ops(replace(asked, **changes)) is None
    with pytest.raises(ValueError, match="ops is 'fp8_fusions'.*GPU that has units for it"): choose_ops(target(), "fp8_fusions")


def test_the_product_with_its_rows_rounded_at_once():
    x, weight, bias = torch.randn(2, 3, 64), torch.randn(48, 64), torch.randn(48)
    try: expected = Fp8Product(weight)(x, bias)
    except (RuntimeError, NotImplementedError): pytest.skip("this PyTorch has no FP8 product for processors")
    fused = FusedFp8Product(weight)
    assert torch.equal(fused(x, bias), expected)
    with launches() as names: fused(x)
    assert names.count("quantize_kernel") == 1 and "amax" not in names


# ---- what a GPU is given

def target(**changes):
    return replace(Target(make_config(), torch.device("cuda"), torch.bfloat16, torch.bfloat16), **changes)


def test_a_gpu_gets_them_by_default():
    fused = Ops(norm=fused_norm, activation=fused_silu_and_mul, rope_and_cache=fused_rope_and_cache, attention=TritonAttention)
    def sampled_plainly(ops): return replace(ops, sample=Ops().sample, gumbel_sample=Ops().gumbel_sample)   # the sampler is another chapter's
    assert sampled_plainly(choose_ops(target())) == fused == choose_ops(target(), "triton_fusions")
    assert choose_ops(target(), "triton") == Ops(attention=TritonAttention)
    assert sampled_plainly(choose_ops(target(config=make_config(decoder=len)))) == replace(fused, rope_and_cache=rope_and_cache)
    assert choose_ops(target(compile=True)).norm is fusions.compiled_norm
    with pytest.raises(ValueError, match="ops is 'triton_fusions'.*device 'cuda', neither quantization nor compile"):
        choose_ops(target(device=torch.device("cpu")), "triton_fusions")


def test_another_attention_stores_as_it_always_did(monkeypatch):
    "Without compile nothing is compiled, whatever the backend."
    called = []
    monkeypatch.setattr(fusions, "compiled", None)
    monkeypatch.setattr(fusions, "norm_rotate_store", None)
    assert fused_rope_and_cache(1, 2, 3, 4, "another", otherwise=lambda *args: called.append(args) or "q") == "q"
    assert called == [(1, 2, 3, 4, "another")]


def decode_launches(config, ops, dtype=torch.bfloat16):
    "The names of what the recorder of graphs is given for a decode step of two rows."
    model = load_model("unused", config, dtype, torch.device("cpu"), "dummy", ops=ops)
    counter = CountingRecorder()
    make_graphs(ModelRunner(model, 60, 4, 2, 40), 40, counter)
    return counter.steps[0]


def launches_a_layer(ops, **changes):
    "The names that a layer adds to the step of a model with one less."
    two, one = (len(decode_launches(make_config(num_layers=n, **changes), ops)) for n in (2, 1))
    return two - one


FAMILIES = {"Llama": {}, "Qwen2": dict(qkv_bias=True), "Qwen3": dict(qk_norm=True), "biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True)}


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_layer_of_a_decode_step_has_ten_launches(changes):
    "Without these kernels there are some forty, with norms on heads some fifty."
    torch.use_deterministic_algorithms(False)          # it fills what is empty, which is a launch
    assert launches_a_layer(choose_ops(target()), **changes) <= 10
    assert launches_a_layer(choose_ops(target(), "triton"), **changes) > 35


def test_with_fp8_a_layer_has_four_more():
    "One for the rows of each product; PyTorch's own operators are eight each."
    torch.use_deterministic_algorithms(False)
    try: Fp8Product(torch.ones(16, 16))(torch.ones(1, 16))
    except (RuntimeError, NotImplementedError): pytest.skip("this PyTorch has no FP8 product for processors")
    def a_layer(product):
        ops = replace(choose_ops(target()), linear=partial(fp8_linear, product=product, plain=PlainProduct), head_linear=PlainProduct)
        return launches_a_layer(ops, head_dim=16, hidden_size=64, intermediate_size=96)
    assert a_layer(FusedFp8Product) <= 14 and a_layer(Fp8Product) == a_layer(FusedFp8Product) + 4*7


def test_views_and_memory_are_no_launches():
    torch.use_deterministic_algorithms(False)
    with launches() as names:
        x = torch.empty(4, 6)
        x.zero_()
        y = x.view(2, 12).T[1:].contiguous()
        y.add_(1)
        fused_silu_and_mul(x)
    assert names == ["zero_", "clone", "add_", "silu_and_mul_kernel"]
    kernel = type(fusions.add_norm_kernel)
    assert kernel.run.__name__ == "run" and not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


# ---- on the way to a GPU

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nano_vllm import fusions
def shared(name, types, constants, capability, warps):
    kernel = getattr(fusions, name)
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    made = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, enable_fp_fusion=False))
    assert len(made.asm["cubin"]) > 1000
    if "q" in types: assert "cvt.rn.satfinite.e4m3x2.f32" in made.asm["ptx"]
    elif types["x"] == "*bf16" and capability >= 90: assert "cvt.rn.bf16" in made.asm["ptx"], "bfloat16 is rounded, not cut"
    return made.metadata.shared
for capability in (80, 86, 89, 90, 100):
    for dtype, width, warps, adds in (("bf16", 1024, 4, True), ("fp16", 8192, 16, True), ("fp32", 5000, 16, False)):
        data = dict.fromkeys(["x", "residual", "weight", "y", "total"], "*" + dtype)
        constants = dict(x_dim=1, DIM=width, WIDTH=triton.next_power_of_2(width)) | (dict(residual_dim=1) if adds else dict(residual=None, residual_dim=1))
        assert shared("add_norm_kernel", data | dict(eps="fp32"), constants, capability, warps) <= 1024
        assert shared("silu_and_mul_kernel", data, dict(x_dim=1, DIM=width, BLOCK=1024), capability, 4) == 0
        if capability < 89: continue       # older ones have no e4m3
        rows = dict(x="*" + dtype, q="*fp8e4nv", scale="*fp32")
        assert shared("quantize_kernel", rows, dict(x_dim=1, DIM=width, WIDTH=triton.next_power_of_2(width)), capability, warps) <= 1024
print("compiled")
"""


@pytest.mark.ci
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    "From sm_80 to sm_100; they hardly use shared memory."
    assert run_compiler(COMPILE, tmp_path) == "compiled\n"
