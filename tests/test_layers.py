"""layers: each one against an independent computation, and against transformers' own modules."""
import pytest
import torch
from nano_vllm.layers import (ColumnParallelLinear, Linear, RMSNorm, Rotary, RowParallelLinear, Share, SwiGLU,
                              VocabParallelEmbedding, rope_frequencies, rotate, share)
from nano_vllm.parallel import Ranks

ROPES = {
    "default": dict(rope_type="default", rope_theta=10000.0),
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    "llama3": dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64),
    "yarn": dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64),
    "yarn, all fields": dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64,
                             beta_fast=16, beta_slow=2, truncate=False, attention_factor=1.3),
    "yarn, mscale": dict(rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=64,
                         mscale=1.0, mscale_all_dim=0.5),
}


def filled(module, seed=0):
    "`module` with random parameters."
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters(): p.normal_(1, 0.3, generator=rng)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7), (5, 48), (3, 2, 16)])
def test_rmsnorm_equals_transformers(shape, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    ours, theirs = filled(RMSNorm(shape[-1], 1e-5)).to(dtype), LlamaRMSNorm(shape[-1], 1e-5).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 20
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    delta = torch.ones_like(x)
    normed, stream = ours(delta, x)
    torch.testing.assert_close(stream, x + delta, rtol=0, atol=0)
    torch.testing.assert_close(normed, theirs(x + delta), rtol=0, atol=0)


def test_rmsnorm_is_float32_inside():
    "The sum of squares of 300s overflows float16; the result must not."
    norm = RMSNorm(64).half()
    norm.weight.fill_(1)
    torch.testing.assert_close(norm(torch.full((2, 64), 300.0).half()), torch.ones(2, 64).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_writes_to_its_inputs(dtype):  # law 7
    x, r = torch.randn(4, 12).to(dtype), torch.randn(4, 12).to(dtype)
    heads, ids = torch.randn(4, 3, 12).to(dtype), torch.tensor([0, 2, 2, 1])
    rope = Rotary(12, ROPES["default"], 16)
    inputs = [x, r, heads, ids]
    before = [t.clone() for t in inputs]
    cos, sin = rope(ids)
    filled(RMSNorm(12)).to(dtype)(x)
    out = filled(RMSNorm(12)).to(dtype)(x, r)
    SwiGLU()(x), filled(Linear(12, 5, True)).to(dtype)(x), filled(ColumnParallelLinear(12, dict(a=Share(0, 2, 2)))).to(dtype)(x)
    for size in (1, 2): filled(VocabParallelEmbedding(4, 3, Ranks(0, size)))(ids), filled(RowParallelLinear(Share(0, 12, 24), 5, Ranks(0, size), True)).to(dtype)(x)
    rotate(heads, cos, sin)
    for t, b in zip(inputs, before): assert torch.equal(t, b)
    assert not {o.data_ptr() for o in out} & {x.data_ptr(), r.data_ptr()}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [2, 10, 16, 64])
def test_rope_tables_equal_transformers(name, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    rope, longest = ROPES[name], 256
    extra = {k: v for k, v in rope.items() if k != "rope_theta"}
    try: config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=longest,
                              rope_parameters=dict(rope))
    except TypeError: config = None
    if not getattr(config, "rope_parameters", None) or not hasattr(config, "standardize_rope_params"):  # transformers 4
        config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=longest,
                             rope_theta=rope["rope_theta"], rope_scaling=extra if name != "default" else None)
    positions = torch.arange(longest)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.float32), positions[None])
    ours, half = Rotary(head_dim, rope, longest)(positions), head_dim//2
    for rows in ours: assert rows.shape == (longest, 1, head_dim) and rows.dtype == torch.float32
    torch.testing.assert_close(ours[0][:, 0], cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1][:, 0, half:], sin[0, :, half:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1][:, 0, :half], -sin[0, :, :half], rtol=0, atol=1e-5)


def test_rotate_equals_transformers_and_complex_multiplication():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    x, positions = torch.randn(5, 3, 8), torch.tensor([0, 7, 3, 3, 100])
    cos, sin = Rotary(8, ROPES["default"], 101)(positions)
    ours = rotate(x, cos, sin)
    theirs, _ = apply_rotary_pos_emb(x, x, cos[:, 0], torch.cat((sin[:, 0, 4:], sin[:, 0, 4:]), -1), unsqueeze_dim=1)
    torch.testing.assert_close(ours, theirs)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos[..., :4], sin[..., 4:])
    torch.testing.assert_close(ours, torch.cat((z.real, z.imag), -1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_scores_depend_on_distance_only():
    rope, q, k = Rotary(16, ROPES["default"], 200), torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    at = lambda x, p: rotate(x, *rope(torch.tensor([p])))
    scores = [(at(q, p + 5) * at(k, p)).sum() for p in (0, 1, 50, 190)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope, words", [
    (dict(rope_type="dynamic", rope_theta=1e4, factor=2.0), "rope_type is 'dynamic'"),
    (dict(rope_type="longrope", rope_theta=1e4), "rope_type is 'longrope'"),
    (dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_type="linear", rope_theta=1e4), "needs field 'factor'"),
    (dict(rope_type="yarn", rope_theta=1e4, factor=2.0), "original_max_position_embeddings"),
    (dict(rope_type="llama3", rope_theta=1e4, factor=2.0), "low_freq_factor"),
])
def test_rope_refuses_by_name(rope, words):
    with pytest.raises(ValueError, match=words): rope_frequencies(8, rope)


def test_rope_refuses_odd_head_dim():
    with pytest.raises(ValueError, match="head_dim is 7"): Rotary(7, ROPES["default"], 8)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_linear_equals_its_parts(bias):
    merged = filled(ColumnParallelLinear(6, dict(q_proj=share(5, Ranks()), k_proj=share(3, Ranks()), v_proj=share(3, Ranks())), bias))
    views = {n: p.place for n, p in merged.checkpoint_pieces("model.layers.0.self_attn.qkv_proj").items()}
    kinds = ["weight", "bias"] if bias else ["weight"]
    assert set(views) == {f"model.layers.0.self_attn.{p}.{k}" for p in ("q_proj", "k_proj", "v_proj") for k in kinds}
    x = torch.randn(4, 6)
    outs = [torch.nn.functional.linear(x, views[f"model.layers.0.self_attn.{p}.weight"],
                                       views.get(f"model.layers.0.self_attn.{p}.bias")) for p in merged.parts]
    torch.testing.assert_close(merged(x), torch.cat(outs, -1))
    views["model.layers.0.self_attn.k_proj.weight"].zero_()  # a view: writing to it writes to the parameter
    assert merged.weight[5:8].eq(0).all() and merged.weight[:5].ne(0).all()


def test_swiglu_equals_its_formula():
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(SwiGLU()(torch.cat((gate, up), -1)), gate / (1 + (-gate).exp()) * up)
