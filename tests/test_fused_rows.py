"""Norm, rotation and store in one launch, interpreted: against the functions it replaces, and in the engine."""
import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import run_compiler, tiny_folder
from nano_vllm import LLM, engine_args as engine_module, fusions
from nano_vllm.attention import TorchAttention, slots_of
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.fusions import fused_or_compiled_rope_and_cache, norm_rotate_store
from nano_vllm.layers import OPS, Ops, Rotary, Target, choose_ops, last_that_suits, qk_norm_rope, rotate
from nano_vllm.sampling_params import SamplingParams
from test_graphs import StandIn, make_config, make_model, own_tables
from test_triton_attention import few, permuted, poison  # noqa: F401 (a fixture: torch.empty gives NaN)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; make gpu runs them on one")
HEADS = [(1, 1), (2, 1), (9, 3), (5, 1), (3, 3), (7, 7), (16, 8), (17, 1)]     # query heads over KV heads
DTYPES = torch.float32, torch.float16, torch.bfloat16


def cut(x):
    "float32 cut to bfloat16, as the interpreter does it, where PyTorch and GPUs round."
    return (x.contiguous().view(torch.int32) & -2**16).view(torch.float32)


def rounded(x, dtype):
    "float32 numbers as `dtype` can hold them, by the interpreter's rule."
    return cut(x) if dtype == torch.bfloat16 else x.to(dtype).float()


def normed(x, weight, eps):
    "RMSNorm in float32, rounded after scaling and after the weight."
    x = x.float()
    y = rounded(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), weight.dtype)
    return rounded(y * weight.float(), weight.dtype)


def expected(qkv, cos, sin, weights, eps, slots, cache, layer):
    "(q, cache) by the formulas; padded rows of q are NaN."
    kv_heads, dim = cache.shape[-2:]
    cache, num_slots, dtype = cache.clone(), cache.shape[2] * cache.shape[3], qkv.dtype
    x = qkv.view(len(qkv), -1, dim)
    q, k, v = x.split([x.shape[1] - 2*kv_heads, kv_heads, kv_heads], 1)
    q, k = (rounded(rotate(normed(y, w, eps) if w is not None else y.float(), cos, sin), dtype).to(dtype) for y, w in zip((q, k), weights))
    there = (slots >= 0) & (slots < num_slots)
    for place, new in zip(slots_of(cache, layer), (k, v)): place[slots[there]] = new[there]
    return q.masked_fill(~there[:, None, None], torch.nan), cache


@st.composite
def cases(draw):
    "(arguments of `norm_rotate_store`): a NaN-poisoned cache of 2 layers, padded rows among the others."
    heads, kv_heads = draw(st.sampled_from(HEADS))
    dim, dtype = draw(st.sampled_from([32, 64, 80, 96, 128, 192, 256, 20, 2])), draw(st.sampled_from(DTYPES))
    n, size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 16, 64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_blocks = -(-n // size) + 1
    slots = torch.randperm(num_blocks * size, generator=g)[:n]
    padded = torch.rand(n, generator=g) < 0.3
    slots[padded] = draw(st.sampled_from([-1, num_blocks*size, 2**40]))
    wide = torch.randn(n, (heads + 2*kv_heads)*dim + draw(st.sampled_from([0, 0, 5])), generator=g).to(dtype) * draw(st.sampled_from([1, 1, .01, 50]))
    turned = Rotary(dim, dict(rope_theta=1e4), 5000)(torch.randint(0, 5000, (n,), generator=g))
    weights = list(torch.randn(2, dim, generator=g).to(dtype)) if draw(st.booleans()) else [None, None]
    cache = torch.full((2, 2, num_blocks, size, kv_heads, dim), torch.nan, dtype=dtype)
    return wide[:, :(heads + 2*kv_heads)*dim], *turned, weights, draw(st.sampled_from([1e-6, 1e-2])), slots, cache, 1


@few(80)
@given(cases(), st.booleans())
def test_one_launch_is_the_unfused_functions(case, by_head):
    """Same bits for what is only copied, and for rotation alone; with a norm, whose mean is summed in another order, a rounding
    now and then. Nothing else is written, and the inputs stay."""
    *args, cache, layer = case
    qkv, weights = args[0], args[3]
    before = [x.clone() for x in (qkv, args[1], args[2], args[5], *(w for w in weights if w is not None))]
    q0, cache0 = expected(*case)
    cache = permuted(cache) if by_head else cache.clone()
    q = norm_rotate_store(*args, cache, layer)
    assert q.dtype == qkv.dtype and q.is_contiguous() and q.shape == q0.shape
    assert torch.equal(cache[:, 1].nan_to_num(1e4), cache0[:, 1].nan_to_num(1e4)), "values, or what nobody should have written"
    if weights[0] is None or qkv.dtype == torch.float32: allowed = 2**-20
    else: allowed = 3*2**-10 if qkv.dtype == torch.float16 else 4*2**-7
    for ours, theirs in ((q, q0), (cache[:, 0], cache0[:, 0])):
        assert torch.equal(ours.isnan(), theirs.isnan()), "what should be written, and nothing else"
        ours, theirs = ours.float().nan_to_num(0), theirs.float().nan_to_num(0)
        gap = (ours - theirs).abs()
        assert float(gap.max()) <= allowed * float(theirs.abs().max())
        if qkv.dtype != torch.float32: assert int((gap > 0).sum()) <= (0 if weights[0] is None else .005*gap.numel() + 2)
    for x, y in zip(before, (qkv, args[1], args[2], args[5], *(w for w in weights if w is not None))): assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_formulas_are_the_modules(dtype):
    "The oracle of these tests is what the model runs."
    c = make_config(num_heads=3, num_kv_heads=1, head_dim=32, qk_norm=True)
    layer = make_model(c).model.layers[0].self_attn.to(dtype)
    torch.manual_seed(0)
    for n in (layer.q_norm, layer.k_norm): n.weight.normal_()
    qkv, turned = torch.randn(7, 5*32).to(dtype), Rotary(32, c.rope, 64)(torch.arange(7))
    q, k, v = qk_norm_rope(layer, qkv, *turned)
    cache = torch.zeros(1, 2, 1, 7, 1, 32, dtype=dtype)
    ours, cache = expected(qkv, *turned, [layer.q_norm.weight, layer.k_norm.weight], c.rms_norm_eps, torch.arange(7), cache, 0)
    assert torch.equal(ours, q) and torch.equal(cache[0, 0, 0], k) and torch.equal(cache[0, 1, 0], v)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_dim(dim):
    torch.manual_seed(0)
    args = (torch.randn(3, 5*dim), *Rotary(dim, dict(rope_theta=1e4), 9)(torch.arange(3)), list(torch.randn(2, dim)), 1e-6, torch.tensor([4, 0, 2]))
    cache = torch.full((1, 2, 2, 4, 1, dim), torch.nan)
    q0, cache0 = expected(*args, cache, 0)
    q = norm_rotate_store(*args, cache, 0)
    torch.testing.assert_close(q, q0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache, cache0, atol=1e-5, rtol=1e-5, equal_nan=True)


def sparse(numbers):
    "So many float16 zeros, of which only the touched pages exist."
    try: return torch.frombuffer(mmap.mmap(-1, 2*numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | getattr(mmap, "MAP_NORESERVE", 0)), dtype=torch.float16)
    except OSError: pytest.skip("no address space for it")


def test_offsets_beyond_32_bits():
    "A cache of more than 2**32 numbers, and rows of the product so far from each other that the third lies beyond 2**31."
    dim = 64
    num_blocks, apart = 2**31 // (16*dim) + 3, 2**30 + 16
    cache = sparse(2*num_blocks*16*dim).view(1, 2, num_blocks, 16, 1, dim)
    qkv = sparse(2*apart + 4*dim).as_strided((3, 4*dim), (apart, 1))
    qkv.copy_(torch.randn(3, 4*dim))
    args = *Rotary(dim, dict(rope_theta=1e4), 9)(torch.arange(3)), [None, None], 0.
    small = torch.zeros(1, 2, 1, 16, 1, dim).half()
    last = num_blocks*16
    q = norm_rotate_store(qkv, *args, torch.tensor([last - 1, last - 16, last - 5]), cache, 0)
    assert torch.equal(q, norm_rotate_store(qkv.contiguous(), *args, torch.tensor([15, 0, 11]), small, 0))
    assert torch.equal(cache[0, :, -1], small[0, :, 0]) and small[0, :, 0, [15, 0, 11]].any(-1).all()


def test_one_launch_whose_arguments_stay(monkeypatch):
    "A CUDA graph may repeat it: one launch, each tensor at its address, nothing read back."
    launches = []

    class Spy:
        def __getitem__(self, grid): return lambda *args, **kw: launches.append((grid, *(x.data_ptr() if torch.is_tensor(x) else x for x in args), kw))

    monkeypatch.setattr(fusions, "norm_rotate_store_kernel", Spy())
    out, args = torch.zeros(3, 2, 32), (torch.randn(3, 4*32), *torch.randn(2, 3, 1, 32), list(torch.randn(2, 32)), 1e-6)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: out)
    cache, slots = torch.zeros(1, 2, 4, 16, 1, 32), torch.tensor([3, -1, 5])
    for name in ("item", "tolist", "__int__", "__bool__", "cpu", "numpy"): monkeypatch.setattr(torch.Tensor, name, None)
    for new in (3, 7):
        slots.fill_(new)
        norm_rotate_store(*args, slots, cache, 0)
    assert len(launches) == 2 and launches[0] == launches[1]


# ---- in a model and in the engine

def by_hand_ops(target: Target) -> Ops | None:
    "For compile: the kernel alone."
    if not target.compile: return None
    return replace(last_that_suits(replace(target, compile=False))[1], rope_and_cache=fused_or_compiled_rope_and_cache)


@pytest.fixture
def by_hand(monkeypatch):
    "compile=True puts in this kernel alone, without the minutes of a compiler; counts its launches."
    count = []
    def counted(*args):
        count.append(len(args[0]))
        return norm_rotate_store(*args)
    monkeypatch.setitem(OPS, "by_hand", by_hand_ops)
    monkeypatch.setattr(fusions, "norm_rotate_store", counted)
    monkeypatch.setattr(fusions, "compiled", lambda function: function)
    return count


def test_the_switch():
    "compile=True is all fusions; which one stores keys and values depends on the attention that is there."
    target = Target(make_config(), torch.device("cpu"), torch.float32, torch.float32, compile=True)
    for name in ("torch", "triton"): assert choose_ops(target, attention_backend=name).rope_and_cache is fused_or_compiled_rope_and_cache


@pytest.mark.parametrize("qk_norm", [False, True])
def test_other_attention_gets_the_compiled_functions(monkeypatch, qk_norm):
    "By the backend's own store, and with the same numbers."
    called = []
    monkeypatch.setattr(fusions, "compiled", lambda function: called.append(function) or function)
    monkeypatch.setattr(fusions, "norm_rotate_store", None)
    c = make_config(qk_norm=qk_norm, num_layers=3)
    layer = make_model(c, TorchAttention).model.layers[2].self_attn
    qkv, turned = torch.randn(7, 10*10), Rotary(10, c.rope, 64)(torch.arange(7))
    class Kept:
        def store(self, k, v, layer): self.stored = k, v, layer
    attention = Kept()
    q = fused_or_compiled_rope_and_cache(layer, qkv, *turned, attention)
    for ours, theirs in zip((q, *attention.stored), (*qk_norm_rope(layer, qkv, *turned), 2)):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
    assert called == [fusions.split_norm_rotate]


def tokens(folder, prompts, params, **wanted):
    llm = LLM(str(folder), num_kv_blocks=40, max_num_batched_tokens=16, max_num_seqs=3, max_model_len=64, **wanted)
    return [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.ci
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_engine_gives_the_same_tokens(tmp_path, by_hand, monkeypatch, qk_norm, graphs):
    import transformers
    folder, changes = tmp_path/"m", dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=192)
    if qk_norm:
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=300, intermediate_size=96, num_hidden_layers=2, head_dim=32, max_position_embeddings=128, eos_token_id=2, **changes)).float()
        for name, p in model.named_parameters(): torch.nn.init.normal_(p, float("norm" in name), 0.3)
        model.save_pretrained(folder)
        tiny_folder(tmp_path/"other")                                   # for its tokenizer
        for f in (tmp_path/"other").glob("*token*"): (folder/f.name).write_bytes(f.read_bytes())
    else: tiny_folder(folder, **changes)
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 20, 9)]
    params = [SamplingParams(temperature=t, seed=1, max_tokens=4, ignore_eos=True) for t in (0, .8, 0)]
    if graphs: monkeypatch.setattr(engine_module, "make_graphs", lambda runner, max_model_len: make_graphs(own_tables(runner), max_model_len, StandIn()))
    wanted = dict(attention_backend="triton", enforce_eager=not graphs)
    plain = tokens(folder, prompts, params, **wanted)
    assert not by_hand
    assert tokens(folder, prompts, params, compile=True, **wanted) == plain
    assert by_hand and (not graphs or StandIn.made[-1].replayed)
    by_hand.clear()
    assert tokens(folder, prompts, params, compile=True, attention_backend="torch") == plain and not by_hand


# ---- on the way to a GPU

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nano_vllm.fusions import norm_rotate_store_kernel as kernel
for dtype, heads, kv_heads, dim, norm, warps in (("bf16", 16, 8, 128, True, 4), ("bf16", 9, 3, 80, False, 4), ("fp16", 64, 8, 128, True, 8), ("fp32", 3, 3, 256, True, 4)):
    up = triton.next_power_of_2
    constants = dict(qkv_dim=1, cache_dim=1, SIZE=16, HEADS=heads, KV_HEADS=kv_heads, HALF=dim//2, ROWS=up(heads), KV_ROWS=up(kv_heads), WIDTH=up(dim//2))
    if not norm: constants |= dict(q_weight=None, k_weight=None)
    types = dict.fromkeys(["qkv", "q_weight", "k_weight", "q", "keys", "values"], "*" + dtype)
    types |= dict(cos="*fp32", sin="*fp32", slot_mapping="*i64", eps="fp32")
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    asm = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, enable_fp_fusion=False)).asm
    assert len(asm["cubin"]) > 1000
    assert ("rsqrt" in asm["ptx"]) == norm, "the norm is there exactly where there are weights"
    if dtype == "bf16": assert "cvt.rn.bf16" in asm["ptx"], "bfloat16 is rounded, not cut"
print("compiled")
"""


def test_the_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    assert run_compiler(COMPILE, tmp_path) == "compiled\n"
