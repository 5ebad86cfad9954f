"""The model runner: its KV cache fits or is refused with a reason, and a step is the forward pass that one would write by hand."""
import pytest
import torch
import torch.nn.functional as F

from helpers import checkpoint_views
from nano_vllm import model_runner
from nano_vllm.attention import ReferenceAttention, TorchAttention, make_batch
from nano_vllm.kv_blocks import BlockPool, Chunk, Sequence
from nano_vllm.model import ModelConfig
from nano_vllm.model_runner import ModelRunner, allocate_kv_cache, free_memory, kv_block_bytes, kv_memory
from nano_vllm.sampling import SamplingParams
from nano_vllm.weights import load_model

CPU = torch.device("cpu")


def make_config(**changed):
    shape = dict(vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=6, num_kv_heads=2,
                 head_dim=10, rms_norm_eps=1e-5, max_position=64,
                 rope=dict(rope_type="default", rope_theta=100.0, original_max_position_embeddings=64))
    return ModelConfig(**(shape | changed))


def make_runner(backend, config=None, dtype=torch.float32, num_blocks=16, block_size=4):
    model = load_model("unused", config or make_config(), dtype, CPU, load_format="dummy")
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters(): p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=rng)
    return ModelRunner(model, backend, num_blocks, block_size)


# ---- memory

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_block_bytes_are_those_of_the_tensor(dtype, block_size):
    config = make_config(num_kv_heads=3, num_heads=9)
    cache = allocate_kv_cache(config, 7, block_size, dtype, CPU)
    assert cache.shape == (3, 2, 7, block_size, 3, 10) and cache.dtype == dtype and cache.is_contiguous()
    assert cache.nbytes == 7 * kv_block_bytes(config, block_size, dtype)
    assert not cache.any()


@pytest.mark.parametrize("num_blocks", [10**9, 2**40])
def test_a_cache_that_cannot_fit_is_refused_by_name(num_blocks):
    with pytest.raises(ValueError) as e: make_runner(ReferenceAttention, num_blocks=num_blocks)
    needed = num_blocks * kv_block_bytes(make_config(), 4, torch.float32) / 2**30
    for part in (f"num_kv_blocks is {num_blocks}", f"{needed:,.2f} GiB", "GiB free", "for at most"): assert part in str(e.value)


def test_the_advice_in_the_message_works(monkeypatch):
    block = kv_block_bytes(make_config(), 4, torch.float32)
    monkeypatch.setattr(model_runner, "free_memory", lambda device: 5*block + 1)
    with pytest.raises(ValueError, match="num_kv_blocks is 6.* at most 5 blocks"): make_runner(TorchAttention, num_blocks=6)
    assert make_runner(TorchAttention, num_blocks=5).kv_cache.nbytes == 5*block


def test_what_the_system_refuses_is_reported_likewise(monkeypatch):
    def refuse(*args, **kwargs): raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(model_runner.mmap, "mmap", refuse)
    with pytest.raises(ValueError, match="num_kv_blocks is 3.*GiB"): make_runner(TorchAttention, num_blocks=3)


def test_reserving_touches_nothing():
    config, blocks = make_config(), 2**30 // kv_block_bytes(make_config(), 4, torch.float32)
    if free_memory(CPU) < 2**31: pytest.skip("less than 2 GiB are free")
    before = resident()
    cache = allocate_kv_cache(config, blocks, 4, torch.float32, CPU)
    assert resident() - before < 2**26 and cache[-1, -1, -1].sum() == 0


def resident():
    try: pages = int(open("/proc/self/statm").read().split()[1])
    except OSError: pytest.skip("no /proc here")
    return pages * model_runner.os.sysconf("SC_PAGE_SIZE")


def test_kv_memory_is_a_share_of_what_is_free(monkeypatch):
    assert 0 < kv_memory(CPU, 0.01) <= kv_memory(CPU, 0.9) <= 4*2**30
    monkeypatch.setattr(model_runner, "free_memory", lambda device: 1000)
    assert kv_memory(CPU, 0.5) == 500
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10_000))
    assert kv_memory(torch.device("cuda"), 0.95) == 500    # 9,000 are in use, 9,500 may be


# ---- computing

def by_hand(model, ids):
    "Logits (N, vocab_size) of the text `ids`: no cache, no batch, no module; float64."
    c = model.config
    w = {name: p.double() for name, p in checkpoint_views(model).items()}

    def norm(x, name): return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def linear(x, name): return x @ w[name + ".weight"].T

    half = c.head_dim // 2
    angles = torch.outer(torch.arange(len(ids)).double(), c.rope["rope_theta"] ** -(torch.arange(half).double() / half))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotated(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (linear(h, f"{at}self_attn.{n}_proj").unflatten(-1, (-1, c.head_dim)) for n in "qkv")
        q, k, heads = rotated(q), rotated(k), []
        for head in range(c.num_heads):
            kv = head // (c.num_heads // c.num_kv_heads)
            scores = q[:, head] @ k[:, kv].T / c.head_dim**0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, kv])
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        x = x + linear(F.silu(linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head = "model.embed_tokens" if c.tied else "lm_head"
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backend", [ReferenceAttention, TorchAttention])
def test_execute_equals_a_forward_by_hand(backend, tied):
    runner, pool = make_runner(backend, make_config(tied=tied)), BlockPool(16, 4)
    texts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [36]]
    seqs = [Sequence(str(i), t, SamplingParams()) for i, t in enumerate(texts)]
    for seq in seqs: assert pool.grow(seq, 16)
    steps = [[(0, 4), (1, 3)], [(1, 0), (0, 7), (2, 1)], [(0, 1), (2, 1), (1, 1)], [(2, 1), (0, 1)]]
    for step in steps:                                           # chunks, mixtures, decodes, in changing order
        work = [Chunk(seqs[i], n) for i, n in step if n]
        logits = runner.execute(make_batch(work, 4))
        sampling = [chunk.seq for chunk in work if chunk.samples]
        assert logits.shape == (len(sampling), 37) and logits.dtype == torch.float32
        for chunk in work: chunk.seq.num_computed_tokens += chunk.num_new_tokens
        for row, seq in zip(logits, sampling):
            expected = by_hand(runner.model, seq.tokens(0, seq.num_tokens))[-1]
            torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=1e-4)
            seq.output_token_ids.append(int(row.argmax()))


def test_every_wanted_row_comes_back():
    runner, pool, ids = make_runner(TorchAttention), BlockPool(16, 4), [5, 6, 7, 8, 9]
    seq = Sequence("a", ids, SamplingParams(prompt_logprobs=1))
    assert pool.grow(seq, 5)
    logits = runner.execute(make_batch([Chunk(seq, 5)], 4))
    torch.testing.assert_close(logits.double(), by_hand(runner.model, ids), atol=1e-4, rtol=1e-4)


def test_a_step_writes_its_own_slots_and_no_others():
    runner, pool = make_runner(TorchAttention), BlockPool(16, 4)
    runner.kv_cache.fill_(7.)
    seq = Sequence("a", [5, 6, 7, 8, 9], SamplingParams())
    assert pool.grow(seq, 5)
    runner.execute(make_batch([Chunk(seq, 5)], 4))
    written = (runner.kv_cache != 7.).any(-1).any(-1).all(0).all(0).flatten()
    assert written.nonzero().flatten().tolist() == sorted(seq.block_table[p//4]*4 + p % 4 for p in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_in_any_dtype(dtype):
    runner, seq = make_runner(TorchAttention, dtype=dtype), Sequence("a", [5, 6, 7], SamplingParams())
    assert BlockPool(16, 4).grow(seq, 3) and runner.kv_cache.dtype == dtype
    logits = runner.execute(make_batch([Chunk(seq, 3)], 4))
    assert logits.dtype == torch.float32 and logits.isfinite().all() and not logits.requires_grad
