"""The Triton kernels, interpreted: each against `ReferenceAttention` over random mixed batches, and compiled where no GPU is."""
import mmap
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import nano_vllm.triton_attention as module
import nano_vllm.triton_kernels as stores
from gpu_checks import attend as store_and_attend, mixed
from helpers import run_compiler, tiny_folder
from nano_vllm.attention import BACKENDS, ReferenceAttention, TorchAttention, attention_backend, make_batch, slots_of
from nano_vllm.kv_blocks import ScheduledSequence, Sequence
from nano_vllm.layers import Target, choose_ops
from nano_vllm.sampling_params import SamplingParams, log_once
from nano_vllm.triton_attention import MIN_DOT, AttentionMetadata, FlashAttention, Tiles, TritonAttention, count_items
from nano_vllm.triton_kernels import store_kv
from test_attention import float32_tolerance
from test_model_runner import make_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; make gpu runs them on one")
SIZES = [1, 8, 16, 32, 64, 128, 256]
DTYPES = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-8}     # and what one rounding may change


def few(n): return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def poison():
    "torch.empty gives NaN: whatever a kernel should have written and did not is seen."
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def cases(draw, sizes=SIZES, dtypes=(torch.float32,)):
    "(batch, cache, q, k, v, tiles, window)."
    size = draw(st.sampled_from(sizes))
    dim = draw(st.sampled_from([32, 32, 64, 64, 80, 96, 128, 20]))
    edges = {1, size - 1, size, size + 1, 2*size, 63, 64, 65, 127, 128, 129, 257} - {0}
    lengths = draw(st.lists(st.sampled_from(sorted(edges)) | st.integers(1, 300), min_size=1, max_size=3))
    new_tokens = [draw(st.sampled_from([1, min(n, 40)]) | st.integers(1, min(n, 40))) for n in lengths]
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (1, 5), (1, 7), (1, 17)]))
    tiles = Tiles(kv_heads, group, dim, split=draw(st.sampled_from([64, 128, 256])), chunk=draw(st.sampled_from([64, 64, 32])))
    window = draw(st.none() | st.sampled_from([1, 63, 64, 65]) | st.integers(1, 300))
    return (*mixed(lengths, new_tokens, size, kv_heads, group, dim, draw(st.integers(0, 2**31)), draw(st.sampled_from(dtypes))),
            tiles, window)


def attend(batch, cache, q, k, v, tiles=None, window=None, layer=1, metadata=None):
    "(output, the cache afterwards); the arguments are checked to be as they were."
    cache, before = cache.clone(), [x.clone() for x in (q, k, v)]
    metadata = metadata or tiles and AttentionMetadata.of(batch, tiles, window)
    out = store_and_attend(TritonAttention(batch, cache, 0.3, window, metadata), q, k, v, layer)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before)), "law 7: an input was written to"
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    return out, cache


def reference(batch, cache, q, k, v, window=None, layer=1):
    cache = cache.clone()
    return store_and_attend(ReferenceAttention(batch, cache, 0.3, window), q, k, v, layer), cache


def permuted(cache):
    "The same numbers, laid out with each page contiguous for a KV head."
    return cache.transpose(3, 4).contiguous().transpose(3, 4)


# ---- storing

@few(40)
@given(st.sampled_from(SIZES + [3]), st.integers(1, 5), st.sampled_from([1, 20, 64, 80]), st.integers(1, 9),
       st.sampled_from(list(DTYPES)), st.booleans(), st.randoms(use_true_random=False))
def test_store_kv(size, heads, dim, n, dtype, by_head, rng):
    "Split and transposed inputs, both layouts; padded rows write nothing, and nothing else is touched."
    num_blocks = -(-n // size) + 1
    cache = torch.full((2, 2, num_blocks, size, heads, dim), torch.nan, dtype=dtype)
    slots = torch.tensor(rng.sample(range(num_blocks*size), n))
    padded = torch.tensor([rng.random() < 0.3 for _ in range(n)])
    slots[padded] = rng.choice([-1, num_blocks*size, 2**40])
    qkv = torch.randn(n, 5*heads*dim).to(dtype)
    v = qkv[:, 3*heads*dim:4*heads*dim].view(n, heads, dim)             # as a split of one matrix product gives it
    k = torch.randn(dim, heads, n).to(dtype).permute(2, 1, 0)
    expected, before = cache.clone(), (k.clone(), v.clone())
    for x, new in zip(slots_of(expected, 1), (k, v)): x[slots[~padded]] = new[~padded]
    if by_head: cache = permuted(cache)
    store_kv(cache, 1, k, v, slots)
    torch.testing.assert_close(cache, expected, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


def test_offsets_beyond_32_bits():
    "A cache of 2**32 and more numbers, of which only the touched pages exist: its last block is written and read."
    size, heads, dim = 16, 1, 64
    num_blocks = 2**31 // (size*heads*dim) + 3
    shape = (1, 2, num_blocks, size, heads, dim)
    numbers = 2 * num_blocks * size * heads * dim
    try: pages = mmap.mmap(-1, numbers*2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | getattr(mmap, "MAP_NORESERVE", 0))
    except OSError: pytest.skip("no address space for it")
    cache = torch.frombuffer(pages, dtype=torch.float16).view(shape)
    seq = Sequence("test", list(range(20)), SamplingParams())
    seq.block_table = [num_blocks - 1, num_blocks - 2]
    batch = make_batch([ScheduledSequence(seq, 0, 20, samples=True)], size)
    q, k, v = (torch.randn(20, h, dim).half() for h in (2, heads, heads))
    out = store_and_attend(TritonAttention(batch, cache, 0.3), q, k, v, 0)
    assert torch.equal(cache[0, 0, num_blocks-1], k[:16]) and torch.equal(cache[0, 1, num_blocks-2, :4], v[16:])
    small = torch.zeros(1, 2, 2, size, heads, dim).half()
    near = replace(batch, block_tables=torch.tensor([[1, 0]]), slot_mapping=batch.slot_mapping - (num_blocks - 2)*size)
    assert torch.equal(out, store_and_attend(TritonAttention(near, small, 0.3), q, k, v, 0))


# ---- against the oracle

def agrees(batch, cache, q, k, v, tiles=None, window=None):
    "Equal in float32, as far as two right computations must be, and the cache in every bit."
    expected, stored = reference(batch, cache, q, k, v, window)
    out, after = attend(batch, cache, q, k, v, tiles, window)
    allowed = float32_tolerance((batch, cache, q, k, v, 1), stored)
    torch.testing.assert_close(out, expected, atol=allowed, rtol=0)           # NaN differs from any number
    torch.testing.assert_close(after, stored, atol=0, rtol=0, equal_nan=True)


@few(30)
@given(cases())
def test_agrees_with_the_reference(case):
    agrees(*case)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_every_head_dim(dim, size):
    agrees(*mixed([65, 300, 17], [30, 1, 17], size, 1, 3, dim))


@pytest.mark.parametrize("size", SIZES + [3, 48])
def test_the_lengths_where_paging_goes_wrong(size):
    lengths = [n for n in (1, size - 1, size, size + 1, 2*size) if n] * 2
    new_tokens = [1]*(len(lengths) // 2) + [min(n, 130) for n in lengths[len(lengths) // 2:]]
    agrees(*mixed(lengths, new_tokens, size, 2, 3, 32))


@pytest.mark.parametrize("length", [255, 256, 257, 511, 513, 1300, 4500])
def test_long_decodes_with_the_default_tiles(length):
    "4,500 tokens make more splits than one turn of the reduction takes."
    agrees(*mixed([length, 40], [1, 1], 64, 1, 2, 64))


@pytest.mark.parametrize("grow", [8., -8.])
@pytest.mark.parametrize("new_tokens", [1, 20])
def test_scores_that_grow_or_fall_along_the_context(grow, new_tokens):
    "Each tile's, split's and turn's top is far above or below the last one's: whatever is not rescaled is seen."
    batch, cache, q, k, v = mixed([4500], [new_tokens], 64, 1, 2, 32, layers=1)
    along = torch.linspace(0, grow, 4500) + torch.randn(4500)*0.1
    q.zero_()[..., 0], k[..., 0] = 10., along[-new_tokens:, None]
    slots = torch.tensor([int(batch.block_tables[0, p // 64])*64 + p % 64 for p in range(4500 - new_tokens)])
    slots_of(cache, 0)[0][slots, :, 0] = along[:4500-new_tokens, None]
    out, expected = attend(batch, cache, q, k, v, layer=0)[0], reference(batch, cache, q, k, v, layer=0)[0]
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@few(20)
@given(cases(dtypes=(torch.float16, torch.bfloat16)))
def test_agrees_in_half_precision(case):
    """The oracle runs in float32 on the same rounded inputs, so only the operator's own rounding is measured: scores stay
    float32, a weight and an output are rounded once each, and an output is an average of values. So it is off by 2u max|v|."""
    batch, cache, q, k, v, tiles, window = case
    expected, stored = reference(batch, *(x.float() for x in (cache, q, k, v)), window)
    out, _ = attend(*case)
    largest = float(slots_of(stored, 1)[1].nan_to_num().abs().max())
    assert not out.isnan().any()
    assert float((out.float() - expected).abs().max()) <= 2.1 * DTYPES[q.dtype] * largest


@pytest.mark.ci
@few(20)
@given(cases())
def test_nothing_before_the_window_is_read(case):
    batch, cache, q, k, v, tiles, window = case
    cache, size = cache.clone(), cache.shape[3]
    for table, n, context in zip(batch.block_tables.tolist(), batch.query_lens, batch.context_lens):
        for p in range(max(context - n - window + 1, 0) if window else 0): cache[1, :, table[p // size], p % size] = torch.nan
    assert not attend(batch, cache, q, k, v, tiles, window)[0].isnan().any()


@pytest.mark.ci
@few(10)
@given(cases(dtypes=list(DTYPES)))
def test_the_layout_makes_no_difference(case):
    batch, cache, q, k, v, tiles, window = case
    by_head = permuted(cache)
    assert by_head.shape == cache.shape and (by_head.stride() != cache.stride() or 1 in by_head.shape[3:5])
    out, expected = (store_and_attend(TritonAttention(batch, c, 0.3, window), q, k, v, 1) for c in (by_head, cache.clone()))
    assert torch.equal(out, expected)


def test_split_and_transposed_inputs():
    batch, cache, q, k, v = mixed([70, 20, 5], [1, 20, 3], 16, 2, 3, 32)
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    views = [x.view(len(q), -1, 32) for x in qkv.split([6*32, 2*32, 2*32], 1)]
    views[0] = views[0].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not any(x.is_contiguous() for x in views)
    assert torch.equal(attend(batch, cache, *views)[0], attend(batch, cache, q, k, v)[0])


@pytest.mark.ci
@few(12)
@given(cases(dtypes=list(DTYPES)), st.randoms(use_true_random=False))
def test_a_sequence_gets_the_same_bits_whoever_shares_its_batch(case, rng):
    batch, cache, q, k, v, tiles, window = case
    both, _ = attend(*case)
    row = rng.randrange(len(batch.query_lens))
    start = int(batch.query_lens[:row].sum())
    span = slice(start, start + int(batch.query_lens[row]))
    alone = type(batch)(batch.token_ids[span], batch.positions[span], batch.slot_mapping[span], batch.block_tables[row:row+1],
                        batch.query_lens[row:row+1], batch.context_lens[row:row+1], batch.logits_indices[:0], batch.prompt_indices[:0])
    assert torch.equal(attend(alone, cache, q[span], k[span], v[span], tiles, window)[0], both[span])


@pytest.mark.ci
@few(15)
@given(cases(dtypes=list(DTYPES)), st.randoms(use_true_random=False))
def test_block_tables_may_be_a_view_of_wider_ones(case, rng):
    "As in the persistent tables of the engine: past a sequence's own blocks stands whatever stood there before."
    batch, cache, q, k, v, tiles, window = case
    num_seqs, width = batch.block_tables.shape
    wide = torch.tensor([[rng.randrange(cache.shape[2]) for _ in range(width + 3)] for _ in range(num_seqs + 2)])
    for row, context in enumerate(batch.context_lens.tolist()):
        own = -(-context // cache.shape[3])
        wide[row, :own] = batch.block_tables[row, :own]
    view = replace(batch, block_tables=wide[:num_seqs, :width + 1])
    assert view.block_tables.stride(0) == width + 3
    assert torch.equal(attend(view, cache, q, k, v, tiles, window)[0], attend(*case)[0])


# ---- the metadata

@few(200)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 1]) | st.integers(0, 300), st.integers(0, 900)), min_size=1, max_size=9), st.none() | st.integers(1, 600),
       st.sampled_from([1, 2, 3, 17, 40]))
def test_count_items(pairs, window, group):
    tiles = Tiles(2, group, 64)
    new, context = torch.tensor([(n, max(n, c) if n else 0) for n, c in pairs], dtype=torch.int32).T
    for n, c, got in zip(new.tolist(), context.tolist(), count_items(new, context, tiles, window).tolist()):
        seen = range(max(c - window, 0) if window else 0, c)
        if n == 1: assert got == len({p // tiles.split for p in seen})
        else: assert got == len({token*group // (tiles.chunk_rows // group * group) for token in range(n)})


def static_metadata(rows, tiles, window=None, width=40, capacity=60):
    "Metadata for decodes such as a CUDA graph keeps: `rows` rows, all of them padding."
    return AttentionMetadata(torch.arange(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32),
                             torch.zeros(rows, width, dtype=torch.int64), torch.full((rows,), -1), tiles, capacity, window)


def fill(metadata, batch):
    "What a replay writes before it starts: the step's numbers into the first rows, padding into the others."
    n, w = batch.block_tables.shape
    metadata.context_lens.zero_()[:n] = torch.tensor(batch.context_lens)
    metadata.block_tables[:n, :w] = batch.block_tables
    metadata.slot_mapping.fill_(-1)[:n] = batch.slot_mapping
    metadata.list_work()


@pytest.mark.ci
@few(8)
@given(st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=6), min_size=2, max_size=3), st.none() | st.integers(1, 400),
       st.integers(0, 99))
def test_static_metadata_serves_step_after_step(steps, window, seed):
    "Padded rows give zeros and store nothing, stale tables do no harm, and the bits are those of metadata made anew."
    tiles = Tiles(1, 3, 32, split=64)
    metadata = static_metadata(6, tiles, window)
    for lengths in steps:
        batch, cache, q, k, v = mixed(lengths, [1]*len(lengths), 16, 1, 3, 32, seed)
        fill(metadata, batch)
        wide = [torch.cat([x, torch.full((6 - len(x), *x.shape[1:]), torch.nan)]) for x in (q, k, v)]
        (q6, k6, v6), stored = wide, cache.clone()
        out = store_and_attend(TritonAttention(None, stored, 0.3, window, metadata), q6, k6, v6, 1)
        expected, after = attend(batch, cache, q, k, v, tiles, window)
        assert torch.equal(out[:len(q)], expected) and not out[len(q):].any()
        torch.testing.assert_close(stored, after, atol=0, rtol=0, equal_nan=True)


def test_sequences_without_new_tokens_do_no_harm():
    batch, cache, q, k, v = mixed([30, 50, 9], [1, 20, 9], 16, 2, 2, 32)
    start = torch.tensor([0, 0, 1, 1, 21, 30, 30], dtype=torch.int32)
    context = torch.tensor([0, 30, 0, 50, 9, 0], dtype=torch.int32)
    tables = torch.full((6, batch.block_tables.shape[1]), 10**9)
    tables[[1, 3, 4]] = batch.block_tables
    metadata = AttentionMetadata(start, context, tables, batch.slot_mapping, Tiles(2, 2, 32), 20, has_chunks=True)
    assert torch.equal(attend(batch, cache, q, k, v, metadata=metadata)[0], attend(batch, cache, q, k, v)[0])


def test_nothing_in_a_launch_changes_from_step_to_step(monkeypatch):
    "Every tensor at its address, every number the same: then a CUDA graph may repeat the launches. None is read back."
    launches = []

    class Spy:
        def __init__(self, kernel): self.kernel = kernel
        def __getitem__(self, grid): return lambda *args, **kwargs: launches[-1].append((grid, *map(known, args), kwargs))

    def known(x): return (x.data_ptr(), x.shape, x.stride()) if torch.is_tensor(x) else x

    for where, name in ((stores, "store_kv_kernel"), (module, "attention_kernel"), (module, "reduce_kernel")):
        monkeypatch.setattr(where, name, Spy(getattr(where, name)))
    metadata = static_metadata(4, Tiles(1, 2, 32))
    cache, q, k, v, out = torch.zeros(1, 2, 90, 16, 1, 32), *(torch.zeros(4, h, 32) for h in (2, 1, 1, 2))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: out)
    for lengths in ([1], [40, 300, 7], [1200, 3, 5, 90]):
        fill(metadata, mixed(lengths, [1]*len(lengths), 16, 1, 2, 32)[0]) if max(lengths) < 600 else metadata.context_lens.fill_(600)
        launches.append([])
        with monkeypatch.context() as m:
            for name in ("item", "tolist", "__int__", "__bool__", "cpu", "numpy"): m.setattr(torch.Tensor, name, None)
            metadata.list_work()
            store_and_attend(TritonAttention(None, cache, 0.3, None, metadata), q, k, v, 0)
    assert len(launches[0]) == 3 and launches[0] == launches[1] == launches[2]


def test_a_short_context_writes_no_partial_results():
    batch = mixed([256, 30, 300], [1, 1, 70], 16, 1, 1, 32)[0]
    short = AttentionMetadata.of(batch, Tiles(1, 1, 32))
    assert short.splits.out.numel() == 0 and not short.has_splits
    longer = mixed([257, 30], [1, 1], 16, 1, 1, 32)
    metadata = AttentionMetadata.of(longer[0], Tiles(1, 1, 32))
    assert metadata.splits.out.shape[0] == 3
    attend(*longer, metadata=metadata)
    assert metadata.splits.out[:2].isfinite().all() and metadata.splits.out[2].isnan().all()        # of 30 tokens nothing was written


def test_tiles_respect_the_least_sizes_of_dot():
    for group in range(1, 65):
        for dim in (1, 16, 20, 32, 64, 80, 128, 192, 256, 512):
            t = Tiles(1, group, dim)
            wide = Tiles(1, group, dim, itemsize=4)
            assert wide.keys >= MIN_DOT and wide.split % wide.keys == 0
            assert min(t.keys, t.width, t.decode_rows, t.chunk_rows) >= MIN_DOT == 16
            assert t.decode_rows >= group and t.chunk_rows >= group and t.width >= dim and t.split % t.keys == 0


# ---- in the engine, and on the way to a GPU

def test_backends_by_name():
    assert BACKENDS["triton"] is TritonAttention is attention_backend("triton")


def test_the_engine_gives_the_same_tokens(tmp_path):
    from nano_vllm import LLM
    folder = tiny_folder(tmp_path/"m", num_attention_heads=6, num_key_value_heads=2, hidden_size=192)
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 40, 17)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    tokens = [[o["token_ids"] for o in LLM(str(folder), num_kv_blocks=40, max_num_batched_tokens=32, attention_backend=name)
               .generate(prompts, params, use_tqdm=False)] for name in ("torch", "triton")]
    assert tokens[0] == tokens[1]


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import nano_vllm.triton_attention as module
import nano_vllm.triton_kernels as stores
from nano_vllm.triton_attention import Tiles, TritonAttention
try: TritonAttention(None, torch.zeros(1, 2, 1, 16, 1, 32), 1.)
except ValueError as e: assert "attention_backend is 'triton'" in str(e) and "TRITON_INTERPRET" in str(e)
else: raise AssertionError("neither a GPU nor the interpreter, and no error")

def compiled(name, types, constants, capability=90, **options):
    kernel = getattr(stores if name == "store_kv_kernel" else module, name)
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    found = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", capability, 32), options=options)
    assert len(found.asm["cubin"]) > 1000
    return found

floats = dict.fromkeys(["split_out", "split_best", "split_mass"], "*fp32")
ints = dict.fromkeys(["query_start", "context_lens", "first_item", "item_seq"], "*i32")
for dtype, t, chunks, window in (("bf16", Tiles(8, 2, 128), 0, 0), ("fp16", Tiles(3, 3, 80), 1, 4096)):
    data = dict.fromkeys(["q", "k", "v", "keys", "values", "out"], "*" + dtype)
    ptx = compiled("attention_kernel", data | floats | ints | dict(tables="*i64", scale="fp32"), dict(
        q_dim=1, cache_dim=1, KV_HEADS=t.kv_heads, GROUP=t.group, DECODE_ROWS=t.decode_rows, CHUNK_ROWS=chunks*t.chunk_rows,
        SPLIT=t.split, WINDOW=window, SIZE=16, DIM=t.dim, D=t.width, TILE=t.keys, WIDEN=False)).asm["ptx"]
    assert "mma" in ptx
    compiled("reduce_kernel", data | floats | ints, dict(HEADS=t.kv_heads*t.group, DIM=t.dim, D=t.width, SPLITS=16))
    compiled("store_kv_kernel", data | dict(slot_mapping="*i64"), dict(
        k_dim=1, v_dim=1, cache_dim=1, SIZE=16, HEADS=t.kv_heads, DIM=t.dim, WIDTH=1024))
# a cache of one byte a number, on the first GPU that converts such numbers
t, data = Tiles(8, 2, 128, itemsize=1), dict(q="*bf16", out="*bf16", k="*fp8e4nv", v="*fp8e4nv", keys="*fp8e4nv", values="*fp8e4nv")
ptx = compiled("attention_kernel", data | floats | ints | dict(tables="*i64", scale="fp32"), dict(
    q_dim=1, cache_dim=1, KV_HEADS=t.kv_heads, GROUP=t.group, DECODE_ROWS=t.decode_rows, CHUNK_ROWS=t.chunk_rows,
    SPLIT=t.split, WINDOW=0, SIZE=16, DIM=t.dim, D=t.width, TILE=t.keys, WIDEN=False), 89).asm["ptx"]
assert "mma" in ptx and "e4m3x2" in ptx
compiled("store_kv_kernel", data | dict(slot_mapping="*i64"), dict(
    k_dim=1, v_dim=1, cache_dim=1, SIZE=16, HEADS=t.kv_heads, DIM=t.dim, WIDTH=1024), 89)
print("compiled")
"""


@pytest.mark.ci
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path): assert run_compiler(COMPILE, tmp_path) == "compiled\n"


SHARED = COMPILE.partition("for dtype, t, chunks")[0] + """
# KiB of shared memory that a program may have
LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
def check(capability, dtype, dim, chunks, group=4):
    "Compiled as `TritonAttention.launch` has it."
    t, data = Tiles(2, group, dim, itemsize=4 if dtype == "fp32" else 2), dict.fromkeys(["q", "keys", "values", "out"], "*" + dtype)
    shared = compiled("attention_kernel", data | floats | ints | dict(tables="*i64", scale="fp32"), dict(
        q_dim=1, cache_dim=1, KV_HEADS=t.kv_heads, GROUP=t.group, DECODE_ROWS=t.decode_rows, CHUNK_ROWS=chunks*t.chunk_rows,
        SPLIT=t.split, WINDOW=0, SIZE=16, DIM=t.dim, D=t.width, TILE=t.keys, WIDEN=False), capability,
        num_stages=3 if chunks else 5, num_warps=4 if t.width <= 128 else 8).metadata.shared
    assert shared <= LIMITS[capability] * 1024, f"sm_{capability}, {dtype}, head_dim {dim}, chunks {chunks}: {shared / 1024} KiB"
"""


@pytest.mark.ci
def test_the_largest_tiles_fit_the_smallest_shared_memory(tmp_path):
    "Keys of float32 and 256 numbers, the most that a model has here, on sm_86, for prompts."
    assert run_compiler(SHARED + 'check(86, "fp32", 256, 1)\nprint("fits")', tmp_path) == "fits\n"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_tiles_fit_the_shared_memory_of_each_gpu(tmp_path, capability):
    every = f"""
for dtype in ("bf16", "fp32"):
    for dim in (64, 128, 256):
        for chunks in (0, 1): check({capability}, dtype, dim, chunks)
check({capability}, "bf16", 128, 1, group=71)
print("fits")
"""
    assert run_compiler(SHARED + every, tmp_path) == "fits\n"


# ---- flash-attn, or what stands in for it

def stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
             window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
    "flash_attn_varlen_func as its documentation has it, written by the formula: causal means that the last query sees the last key."
    assert causal and dropout_p == softcap == 0 and k.shape[1] % 256 == 0 and block_table.dtype == torch.int32 and q.dtype in (torch.float16, torch.bfloat16)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    out, group, (left, right) = torch.empty_like(q), q.shape[1] // k.shape[2], window_size
    assert right in (-1, 0)
    for s, table in enumerate(block_table.long()):
        first, new, context = int(cu_seqlens_q[s]), int(cu_seqlens_q[s+1] - cu_seqlens_q[s]), int(cu_seqlens_k[s+1] - cu_seqlens_k[s])
        keys, values = (x[table].flatten(0, 1)[:context].repeat_interleave(group, 1).float() for x in (k, v))
        for i in range(new):
            last = context - new + i
            seen = slice(0 if left < 0 else max(0, last - left), last + 1)
            weights = (torch.einsum("hd,shd->hs", q[first+i].float(), keys[seen]) * softmax_scale).softmax(1)
            out[first+i] = torch.einsum("hs,shd->hd", weights, values[seen])
    return out


@pytest.fixture
def flash(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func, module.__spec__ = stand_in, ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("window", [None, 1, 60, 400])
@pytest.mark.parametrize("size", [256, 512])
def test_flash_is_given_the_right_arguments(flash, window, size):
    batch, cache, q, k, v = mixed([1, 300, 256, 257, 70], [1, 40, 1, 1, 70], size, 2, 3, 32, dtype=torch.bfloat16)
    wide = [x.float() for x in (cache, q, k, v)]
    expected = store_and_attend(ReferenceAttention(batch, wide[0], 0.3, window), *wide[1:], 1)
    out = store_and_attend(FlashAttention(batch, cache, 0.3, window), q, k, v, 1)
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0)
    torch.testing.assert_close(cache.float(), wide[0], atol=0, rtol=0, equal_nan=True)


def test_what_flash_cannot_take_is_refused(flash):
    for size in (1, 16, 128, 257):
        with pytest.raises(ValueError, match=f"block_size is {size}: .*multiple of 256"): attention_backend("flash", "cuda", size)
    assert attention_backend("flash", "cuda", 256) is FlashAttention
    with pytest.raises(ValueError, match="attention_backend is 'flash': it needs a GPU.*'cpu'"): attention_backend("flash", "cpu", 256)
    batch, cache, *_ = mixed([5], [1], 256, 1, 1, 32)
    with pytest.raises(ValueError, match="dtype is torch.float32.*'flash'"): FlashAttention(batch, cache, 1.)
    for dim in (20, 264):
        batch, cache, *_ = mixed([5], [1], 256, 1, 1, dim, dtype=torch.float16)
        with pytest.raises(ValueError, match=f"head_dim is {dim}: .*multiple of 8"): FlashAttention(batch, cache, 1.)


def test_flash_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="attention_backend is 'flash': it needs the package flash-attn .*'triton' and 'torch' do not"):
        attention_backend("flash", "cuda", 256)
    from nano_vllm import LLM
    with pytest.raises(ValueError, match="flash-attn"): LLM("smollm2-135m", attention_backend="flash")


def test_the_engine_with_flash(tmp_path, flash, monkeypatch):
    from nano_vllm import LLM
    check = FlashAttention.check
    monkeypatch.setattr(FlashAttention, "check", classmethod(lambda cls, device_type, block_size: check("cuda", block_size)))
    folder = tiny_folder(tmp_path/"m", num_attention_heads=4, num_key_value_heads=2, hidden_size=64, max_position_embeddings=512)
    work = [list(range(5, 5 + n)) for n in (3, 300)], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with pytest.raises(ValueError, match="block_size is 16"): LLM(folder, attention_backend="flash")
    tokens = [[o["token_ids"] for o in LLM(folder, dtype="float16", num_kv_blocks=8, block_size=256, attention_backend=name, max_num_batched_tokens=64)
               .generate(*work, use_tqdm=False)] for name in ("torch", "flash")]
    assert tokens[0] == tokens[1]


# ---- the choice, and its reason

def test_the_choice_is_logged_once(caplog):
    log_once.cache_clear()
    target = Target(None, torch.device("cuda"), torch.float32, torch.float32)
    with caplog.at_level("INFO", "nano_vllm"):
        for name in ("auto", "auto", "torch", "torch", "auto"): choose_ops(target, "triton", attention_backend=name)
    assert [r.message for r in caplog.records] == [
        f"ops: triton with {backend}, as asked for on {target}" for backend in ("TritonAttention", "TorchAttention")]


def test_the_kernels_are_what_a_gpu_gets():
    target = Target(make_config(), torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    assert choose_ops(target).attention is TritonAttention
    assert choose_ops(target, "torch").attention is TorchAttention
