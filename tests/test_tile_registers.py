"""Registers with rows (AMX), by the processor where it has them, and everywhere by a model of them in C++ that is strict: a register is
never read or multiplied in a shape that it does not have. Few machines have AMX, and the tile must be right on those, too."""
import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from nano_vllm import bfloat16, cpu_kernels, quantization
from nano_vllm.bfloat16 import TILE_REGISTERS, Bfloat16Product, bfloat16_product, fits_tile_registers, has_tile_registers
from nano_vllm.cpu_attention import attention_source, in_registers
from nano_vllm.cpu_kernels import COMMON, LANES, Queries, address, can_build, load_library, predefined_macros, run_compiler, toolchain
from nano_vllm.cpu_products import TILE, load_product
from nano_vllm.quantization import TiledInt8Product, int8_product
from test_compilers import WARNINGS, sources
from test_cpu_products import check_product, random

# the model: registers by number, whose sizes come from the same 64 bytes; whatever a processor would refuse ends the process
MODEL = r"""
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_zero
#define _tile_loadconfig model_config
#define _tile_release model_release
struct Register { int rows, bytes; uint8_t data[16][64]; };
static thread_local Register reg[8];
static thread_local bool configured = false;
static void must(bool holds) { if (!holds) abort(); }
static void model_config(const void* p) {
  const uint8_t* c = (const uint8_t*)p;
  must(c[0] == 1);
  for (int i = 1; i < 16; i++) must(c[i] == 0);
  for (int t = 0; t < 8; t++) {
    uint16_t bytes; std::memcpy(&bytes, c + 16 + 2 * t, 2);
    must(0 < bytes && bytes <= 64 && bytes % 4 == 0 && 0 < c[48 + t] && c[48 + t] <= 16);
    reg[t] = {c[48 + t], bytes, {}};
  }
  for (int t = 8; t < 16; t++) must(c[16 + 2 * t] == 0 && c[17 + 2 * t] == 0 && c[48 + t] == 0);
  configured = true;
}
static void model_release() { must(configured); configured = false; }
static void _tile_zero(int t) { must(configured); std::memset(reg[t].data, 0, sizeof reg[t].data); }
static void _tile_loadd(int t, const void* base, int64_t stride) {
  must(configured);
  for (int r = 0; r < reg[t].rows; r++) std::memcpy(reg[t].data[r], (const char*)base + r * stride, reg[t].bytes);
}
static void _tile_stored(int t, void* base, int64_t stride) {
  must(configured);
  for (int r = 0; r < reg[t].rows; r++) std::memcpy((char*)base + r * stride, reg[t].data[r], reg[t].bytes);
}
template <class Sum, class Number, class Value>
static void multiply_registers(int c, int a, int b, Value value) {
  must(configured && reg[c].rows == reg[a].rows && reg[a].bytes == 4 * reg[b].rows && reg[c].bytes == reg[b].bytes);
  constexpr int PER = 4 / sizeof(Number);
  for (int r = 0; r < reg[c].rows; r++)
    for (int o = 0; o < reg[c].bytes / 4; o++)
      for (int k = 0; k < reg[b].rows; k++)
        for (int i = 0; i < PER; i++)
          ((Sum*)reg[c].data[r])[o] += value(((Number*)reg[a].data[r])[PER * k + i]) * value(((Number*)reg[b].data[k])[PER * o + i]);
}
static void _tile_dpbf16ps(int c, int a, int b) {
  multiply_registers<float, uint16_t>(c, a, b, [](uint16_t x) {
    uint32_t bits = (uint32_t)x << 16; float y; std::memcpy(&y, &bits, 4); return y; });
}
static void _tile_dpbssd(int c, int a, int b) { multiply_registers<int32_t, int8_t>(c, a, b, [](int8_t x) { return (int32_t)x; }); }
"""
on_x86 = pytest.mark.skipif(not can_build() or LANES < 16 or "__x86_64__" not in predefined_macros(toolchain().compile), reason="no vectors of 16 floats")
has_them = pytest.mark.skipif(not has_tile_registers(), reason="no AMX here")
rounds_rows = pytest.mark.skipif(not can_build() or "__AVX512BF16__" not in predefined_macros(toolchain().compile), reason="no AVX512-BF16 here")
seeds, rows, words = st.integers(0, 2**31), st.integers(0, 70), st.sampled_from([16, 48])


def modelled(source: str) -> str:
    assert source.count(TILE_REGISTERS) == 1
    return source.replace(TILE_REGISTERS, TILE_REGISTERS.replace("#include <immintrin.h>", MODEL))


# the product itself is made before anything is changed: what it loads is kept for all that come later
def model_of_bfloat16(weight: torch.Tensor) -> Bfloat16Product:
    product = Bfloat16Product(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "load_product", lambda source, **numbers: load_product(modelled(source), **numbers))
        product.hold(bfloat16_product.__wrapped__(registers=True), weight.shape, product.tensors[0])
    return product


def model_of_int8(weight: torch.Tensor, change=lambda source: source) -> TiledInt8Product:
    product = TiledInt8Product(weight)
    packed, scale, _ = product.tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "load_product", lambda source, **numbers: load_product(change(modelled(source)), **numbers))
        product.hold(int8_product.__wrapped__(weight.shape[1], registers=True), weight.shape, packed, scale)
    return product


def vectors_of_int8(*weight: torch.Tensor) -> TiledInt8Product:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "fits_tile_registers", lambda _: False)
        return TiledInt8Product(*weight)


@on_x86
@rounds_rows
@settings(max_examples=40, deadline=None)
@given(seeds, rows, words, st.sampled_from([16, 48, 160]), st.booleans())
def test_the_tile_in_bfloat16(seed, n, words, outputs, has_bias):
    "Sums of rounded rows within float32's bound, in the model and, where there is one, by the processor."
    weight, x = random(seed, outputs, 2 * words).bfloat16(), random(seed + 1, n, 2 * words).bfloat16().float()
    bias = random(seed + 2, outputs) if has_bias else None
    check_product(model_of_bfloat16(weight), x, weight.float(), bias)
    check_product(Bfloat16Product(weight), x, weight.float(), bias)


@on_x86
@settings(max_examples=40, deadline=None)
@given(seeds, rows, words, st.sampled_from([16, 48, 160]), st.booleans())
def test_the_tile_in_whole_numbers(seed, n, words, outputs, has_bias):
    "All kinds give the same bits."
    weight, x = random(seed, outputs, 4 * words), random(seed + 1, n, 4 * words)
    bias = random(seed + 2, outputs) if has_bias else None
    expected = vectors_of_int8(weight)(x, bias)
    assert torch.equal(model_of_int8(weight)(x, bias), expected) and torch.equal(TiledInt8Product(weight)(x, bias), expected)


@on_x86
def test_all_numbers_at_the_end_of_their_range():
    "Also -128, which a checkpoint in W8A8 may bring, in the longest rows of a model."
    weight = torch.full((16, 16384), -128, dtype=torch.int8)
    weight[1::2] = 127
    x, scale = torch.ones(33, 16384), torch.ones(16, 1)
    expected = vectors_of_int8(weight, scale)(x)
    assert torch.equal(TiledInt8Product(weight, scale)(x), expected)
    assert torch.allclose(expected[0, :2], torch.tensor([-128., 127.]) * 16384)


def attends(source: str, q, kv, lens, window) -> torch.Tensor:
    "Outputs of the last tokens of texts, by a compiled `attend_all`: q (tokens, heads, dim), kv (2, blocks, 16, 2, dim), one block table a text."
    dim = q.shape[2]
    library = load_library(source, HEAD_DIM=dim, KV_HEADS=2, GROUP=3, CACHE_BITS=16)
    library.attend_all.argtypes = [ctypes.c_void_p]*5 + [ctypes.c_float]
    num_blocks = kv.shape[1] // len(lens)
    tables = torch.arange(kv.shape[1]).view(len(lens), num_blocks)
    rows = torch.cat([torch.full((new,), i) for i, (new, _) in enumerate(lens)])
    ends = torch.cat([torch.arange(length - new, length) + 1 for new, length in lens])
    starts, tokens, out = (ends - window).clamp(min=0), torch.arange(len(rows)), torch.full_like(q, 7.0)
    record = Queries(*map(address, (tables, rows, tokens, starts, ends)), len(rows), num_blocks, 16)
    library.attend_all(ctypes.addressof(record), address(q), address(kv[0]), address(kv[1]), address(out), dim**-0.5)
    return out


def check_attention(seed, lens, window, dim):
    """The model, and the processor where it can, against vectors: texts of (new, all) tokens.

    Both round weights to bfloat16: a score that differs in its last bit may move one by 2**-8 of itself. What nobody may see is not a number."""
    tokens = sum(new for new, _ in lens)
    q, kv = random(seed, tokens, 6, dim), random(seed + 1, 2, 14 * len(lens), 16, 2, dim).bfloat16()
    for i, (_, length) in enumerate(lens): kv[:, 14*i : 14*(i + 1)].flatten(1, 2)[:, length:] = torch.nan
    expected = attends(attention_source(), q, kv, lens, window)
    assert expected.isfinite().all()
    kinds = [modelled(attention_source(True))] + [attention_source(True)] * in_registers(dim, 16)
    for source in kinds: assert (attends(source, q, kv, lens, window) - expected).abs().max() <= 2**-7 * kv.nan_to_num().abs().max()


@on_x86
@rounds_rows
@settings(max_examples=30, deadline=None)
@given(seeds, st.lists(st.tuples(st.integers(1, 120), st.integers(0, 100)), min_size=1, max_size=3), st.sampled_from([5, 60, 10**6]),
       st.sampled_from([32, 96]))
def test_attention(seed, texts, window, dim):
    "Prompts and chunks, with and without a window."
    check_attention(seed, [(new, new + before) for new, before in texts], window, dim)


@on_x86
@rounds_rows
def test_memory_that_holds_anything():
    "What malloc gives is full of large numbers (glibc's MALLOC_PERTURB_), and nothing of it gets into a sum."
    script = "import sys; sys.path.insert(0, 'tests'); from test_tile_registers import *; check_attention(0, [(20, 20), (9, 9)], 10**6, 32)"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | dict(MALLOC_PERTURB_="1"))


BROKEN = {"both halves are the first": ("x + 16 * inputs + i", "x + i"),
          "the second half is stored over the first": ("sum[16]", "sum[0]"),
          "a line too far": ("w + 1, 64 * WIDE", "w + 4, 64 * WIDE"),
          "only the first sixteen rows": ("if (R > 16) { ADD_ROWS", "if (R > 32) { ADD_ROWS")}


@on_x86
@pytest.mark.parametrize("what", BROKEN)
def test_a_wrong_tile_would_be_found(what):
    old, new = BROKEN[what]
    assert TILE_REGISTERS.count(old) == 1
    weight, x = random(0, 48, 64), random(1, 21, 64)
    assert not torch.equal(model_of_int8(weight, lambda source: source.replace(old, new))(x), vectors_of_int8(weight)(x))


@on_x86
def test_a_shape_that_does_not_fit_would_end_the_model():
    script = f"""
import sys
sys.path.insert(0, "tests")
from test_tile_registers import *
x = random(1, 21, 64)
model_of_int8(random(0, 48, 64), lambda source: source.replace("rows[16] = {{16", "rows[16] = {{15"))(x)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -6, done.stderr      # abort()


@has_them
def test_where_they_are_they_are_used():
    pairs = dict(bf16=Bfloat16Product(random(0, 48, 64).bfloat16()), int8=TiledInt8Product(random(0, 48, 64)))
    assert pairs["bf16"].product is bfloat16_product(False, True) and pairs["int8"].product is int8_product(64, rotated=True, registers=True)
    assert pairs["int8"].matrix.excess is None
    assert Bfloat16Product(random(0, 48, 64).bfloat16(), widen=True).product is bfloat16_product(True, False)
    assert fits_tile_registers(32) and not fits_tile_registers(24)
    odd = Bfloat16Product(random(0, 48, 48).bfloat16())        # 24 words: vectors
    assert odd.product is bfloat16_product(False, False)


@has_them
def test_a_row_is_the_same_in_every_batch():
    x, product = random(0, 70, 64), Bfloat16Product(random(1, 96, 64).bfloat16())
    for n in range(1, 70): assert torch.equal(product(x[:n]), product(x)[:n])


@has_them
def test_another_library_in_the_same_threads():
    "oneDNN sets the registers' shapes for itself; ours are set for each product and given back."
    weight, x = random(0, 96, 512).bfloat16(), random(1, 40, 512)
    product, big = Bfloat16Product(weight), torch.randn(300, 512).bfloat16()
    expected, theirs = product(x), big @ big.T
    for _ in range(20):
        assert torch.equal(product(x), expected)
        assert torch.equal(big @ big.T, theirs)


@has_them
def test_a_process_that_may_not_use_them(monkeypatch):
    "As in a sandbox, or where a thread has too small a stack for signals: vectors."
    class Refuses:
        def syscall(self, *_): return -1
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Refuses())
    assert not has_tile_registers.__wrapped__()


@pytest.mark.parametrize("missing", ["AMX_TILE", "AMX_BF16", "AMX_INT8", "AVX512BF16", "linux"])
def test_what_is_missing_is_not_asked_for(missing, monkeypatch):
    monkeypatch.setattr(bfloat16, "LANES", 16)
    monkeypatch.setattr(bfloat16, "fits_kernels", lambda *_: True)
    monkeypatch.setattr(bfloat16, "toolchain", lambda: cpu_kernels.Toolchain((), ()))
    names = {"AMX_TILE", "AMX_BF16", "AMX_INT8", "AVX512BF16", "linux"}
    def fail(_): raise AssertionError("the system was asked")
    monkeypatch.setattr(ctypes, "CDLL", fail)
    monkeypatch.setattr(bfloat16, "predefined_macros", lambda _: "".join(f"#define __{name}__ 1\n" for name in names - {missing}))
    assert not has_tile_registers.__wrapped__()
    monkeypatch.setattr(bfloat16, "predefined_macros", lambda _: "".join(f"#define __{name}__ 1\n" for name in names))
    with pytest.raises(AssertionError, match="the system was asked"): has_tile_registers.__wrapped__()
    monkeypatch.setattr(bfloat16, "LANES", 8)
    assert not has_tile_registers.__wrapped__()


@on_x86
@pytest.mark.parametrize("compiler", [pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name} here")) for name in ("g++", "clang++")])
def test_it_is_read_without_a_warning(compiler):
    "For a processor that need not be this one."
    amx = "-march=sapphirerapids -mprefer-vector-width=512".split()
    found = {name: of for name, of in sources(16, registers=True).items() if TILE_REGISTERS in of[0]}
    assert set(found) == {"bfloat16", "int8", "attend_all", "run_layers"} and not any(TILE in source for source, _ in found.values())
    for source, numbers in found.values():
        run_compiler(compiler, *COMMON, *amx, "-fopenmp", *WARNINGS, "-fsyntax-only", "-xc++", "-", "-DLANES=16", *(f"-D{k}={n}" for k, n in numbers.items()),
                     source=source)
