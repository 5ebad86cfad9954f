"""layers: each one against an independent computation, and against transformers' own modules; and how Ops are chosen."""
import ast
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import nano_vllm.layers
from nano_vllm.attention import ReferenceAttention, TorchAttention
from nano_vllm.layers import (OPS, ColumnParallelLinear, Linear, Ops, RMSNorm, Rotary, RowParallelLinear, ShardRange, Target,
                              TensorParallelGroup, VocabParallelEmbedding, choose_ops, rope_frequencies, rotate, shard, silu_and_mul,
                              torch_ops, what_it_suits)
from nano_vllm.sampling_params import log_once

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
    hidden_states = torch.ones_like(x)
    normed, residual = ours(hidden_states, x)
    torch.testing.assert_close(residual, x + hidden_states, rtol=0, atol=0)
    torch.testing.assert_close(normed, theirs(x + hidden_states), rtol=0, atol=0)


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
    silu_and_mul(x)
    for layer in (Linear(12, 5, True), ColumnParallelLinear(12, dict(a=ShardRange(0, 2, 2)))): filled(layer).to(dtype)(x)
    for group in (TensorParallelGroup(), TensorParallelGroup(0, 2)):
        filled(VocabParallelEmbedding(4, 3, group))(ids)
        filled(RowParallelLinear(ShardRange(0, 12, 24), 5, group, True)).to(dtype)(x)
    rotate(heads, cos, sin)
    for t, b in zip(inputs, before): assert torch.equal(t, b)
    assert not {o.data_ptr() for o in out} & {x.data_ptr(), r.data_ptr()}


def angle_tolerance(longest):
    """How far a cos or a sin of two right computations may lie apart, for positions below `longest`.

    A frequency is at most 1 and comes out of at most 8 float32 operations, each off by up to 2**-24 of it; so the angle at `longest` is off
    by `longest` times as much, and cos and sin move by no more than the angle."""
    return 8 * 2**-24 * longest


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
    tolerance = angle_tolerance(longest) * max(1, float(cos.abs().max()))   # yarn multiplies by a factor
    torch.testing.assert_close(ours[0][:, 0], cos[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours[1][:, 0, half:], sin[0, :, half:], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours[1][:, 0, :half], -sin[0, :, :half], rtol=0, atol=tolerance)


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
    g = torch.Generator().manual_seed(0)
    rope, (q, k) = Rotary(16, ROPES["default"], 200), torch.randn(2, 1, 1, 16, generator=g)
    at = lambda x, p: rotate(x, *rope(torch.tensor([p])))
    scores = [(at(q, p + 5) * at(k, p)).sum() for p in (0, 1, 50, 190)]
    tolerance = 2 * angle_tolerance(200) * float(q.norm() * k.norm())   # both are turned, the product is at most so large
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), rtol=0, atol=tolerance)


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
    alone = TensorParallelGroup()
    merged = filled(ColumnParallelLinear(6, dict(q_proj=shard(5, alone), k_proj=shard(3, alone), v_proj=shard(3, alone)), bias))
    views = {n: s.parameter for n, s in merged.weight_shards("model.layers.0.self_attn.qkv_proj").items()}
    kinds = ["weight", "bias"] if bias else ["weight"]
    assert set(views) == {f"model.layers.0.self_attn.{p}.{k}" for p in ("q_proj", "k_proj", "v_proj") for k in kinds}
    x = torch.randn(4, 6)
    outs = [torch.nn.functional.linear(x, views[f"model.layers.0.self_attn.{p}.weight"],
                                       views.get(f"model.layers.0.self_attn.{p}.bias")) for p in merged.parts]
    torch.testing.assert_close(merged(x), torch.cat(outs, -1))
    views["model.layers.0.self_attn.k_proj.weight"].zero_()  # a view: writing to it writes to the parameter
    assert merged.weight[5:8].eq(0).all() and merged.weight[:5].ne(0).all()


def test_silu_and_mul_equals_its_formula():
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(silu_and_mul(torch.cat((gate, up), -1)), gate / (1 + (-gate).exp()) * up)


# ---- tensor parallelism: what a group of one does, and what the parts are

@pytest.mark.parametrize("total", [1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shards_are_a_partition_and_differ_by_one_at_most(total, size):
    shards = [shard(total, TensorParallelGroup(rank, size)) for rank in range(size)]
    assert [i for s in shards for i in range(total)[s.slice]] == list(range(total))
    assert max(s.length for s in shards) - min(s.length for s in shards) <= 1
    for s in shards: assert s.times(3).slice == slice(3*s.start, 3*(s.start + s.length)) and s.times(3).total == 3*total


def test_a_group_of_one_changes_nothing():
    group, x = TensorParallelGroup(), torch.randn(3)
    assert group.all_reduce(x) is x and group.gather(x) is x and group.minimum(5) == 5 and not group.shares_script
    group.broadcast("a message that nobody hears")
    with group.collective_guard(): pass
    with pytest.raises(NotImplementedError): group.receive()


# ---- Ops

TARGET = Target(config=None, device=torch.device("cpu"), dtype=torch.float32, kv_cache_dtype=torch.float32)


class Recorded:
    "A product with `weight` that notes what it was given."
    made = []

    def __init__(self, weight):
        self.weight, self.given = weight, []
        Recorded.made.append(self)

    def __call__(self, x, bias):
        self.given.append((x, bias))
        return torch.nn.functional.linear(x, self.weight, bias)


def test_ops_are_frozen():
    ops = Ops()
    for field in dataclasses.fields(Ops):
        with pytest.raises(dataclasses.FrozenInstanceError): setattr(ops, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError): ops.something_else = 1
    with pytest.raises(dataclasses.FrozenInstanceError): TARGET.dtype = torch.float16


def test_a_layer_uses_only_what_it_was_handed(monkeypatch):
    "What was chosen at construction stays chosen, whatever becomes of the names in the module."
    norm, linear = filled(RMSNorm(6)), filled(Linear(6, 4, True))
    x, r = torch.randn(2, 6), torch.randn(2, 6)
    expected = norm(x), norm(x, r), linear(x)
    def forbidden(*args): raise AssertionError("a layer looked for its operation anew")
    for name in ("rms_norm", "Ops", "choose_ops", "OPS"): monkeypatch.setattr(nano_vllm.layers, name, forbidden)
    for a, b in zip((norm(x), *norm(x, r), linear(x)), (expected[0], *expected[1], expected[2])): assert torch.equal(a, b)
    double = Ops(norm=lambda x, weight, eps, residual=None: 2*x)
    assert torch.equal(RMSNorm(6, ops=double)(x), 2*x) and torch.equal(norm(x), expected[0])   # beside each other


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_multiplies_with_its_weight_until_it_is_packed(bias):
    x, group = torch.randn(3, 6), TensorParallelGroup()
    for make in (lambda ops: Linear(6, 4, bias, ops), lambda ops: ColumnParallelLinear(6, dict(a=ShardRange(0, 4, 4)), bias, ops),
                 lambda ops: RowParallelLinear(ShardRange(0, 6, 6), 4, group, bias, ops)):
        plain, packed = filled(make(Ops())), filled(make(Ops(linear=Recorded)))
        expected, weight = plain(x), packed.weight
        plain.pack()
        assert plain.weight is not None and torch.equal(plain(x), expected)
        assert torch.equal(packed(x), expected) and packed.product is None
        packed.pack()
        assert packed.product.weight is weight and packed.weight is None
        assert torch.equal(packed(x), expected)
        (given, added), = packed.product.given
        assert given is x and added is packed.bias


def test_a_packed_row_parallel_layer_adds_its_bias_once():
    "After the sum over the ranks: the product itself gets none."
    class TwoAlike(TensorParallelGroup):
        def all_reduce(self, x): return 2*x
    layer = filled(RowParallelLinear(ShardRange(0, 6, 12), 4, TwoAlike(0, 2), True, Ops(linear=Recorded)))
    x = torch.randn(3, 6)
    expected = 2*torch.nn.functional.linear(x, layer.weight) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    layer.pack()
    torch.testing.assert_close(layer(x), expected)
    assert [bias for _, bias in layer.product.given] == [None]


@pytest.mark.parametrize("keep_weight", [True, False])
def test_an_embedding_keeps_its_rows_if_it_is_to(keep_weight):
    layer, ids, hidden = filled(VocabParallelEmbedding(7, 6, TensorParallelGroup(), Ops(linear=Recorded))), torch.tensor([3, 0]), torch.randn(2, 6)
    rows, logits = layer(ids), layer.logits(hidden)
    layer.pack(keep_weight)
    assert torch.equal(layer.logits(hidden), logits) and len(layer.product.given) == 1
    assert (layer.weight is not None) == keep_weight
    if keep_weight: assert torch.equal(layer(ids), rows)


def only(monkeypatch, **builders):
    "Let the table have `torch` and the builders, and nothing else."
    monkeypatch.setattr(nano_vllm.layers, "OPS", dict(torch=torch_ops, **builders))


def test_the_ops_registered_last_that_suit_are_chosen(monkeypatch):
    first, second = Ops(max_mlp_tokens=1), Ops(max_mlp_tokens=2)
    only(monkeypatch, first=lambda target: first, second=lambda target: second, third=lambda target: None)
    assert choose_ops(TARGET) is second and choose_ops(TARGET, "first") is first
    assert choose_ops(TARGET, "torch") == Ops()
    only(monkeypatch)
    assert choose_ops(TARGET) == Ops()


def test_a_named_attention_backend_takes_the_place_of_the_ops_own(monkeypatch):
    only(monkeypatch, mine=lambda target: Ops(max_mlp_tokens=3))
    for name in ("auto", "mine"):
        assert choose_ops(TARGET, name, "reference") == Ops(max_mlp_tokens=3, attention=ReferenceAttention)
    assert choose_ops(TARGET).attention is TorchAttention


def test_the_ops_own_backend_is_checked_too(monkeypatch):
    class Picky(TorchAttention):
        @classmethod
        def check(cls, device_type, block_size): raise ValueError(f"block_size is {block_size} on {device_type!r}")
    only(monkeypatch, picky=lambda target: Ops(attention=Picky))
    with pytest.raises(ValueError, match="block_size is 16 on 'cpu'"): choose_ops(TARGET)
    assert choose_ops(TARGET, attention_backend="torch").attention is TorchAttention


def picky(target):
    """Something for
    machines that nobody has.

    And a second paragraph."""


@pytest.mark.parametrize("change, name, backend, words", [
    ({}, "fastest", "auto", r"ops is 'fastest', must be one of \['auto', 'torch', 'picky'\]"),
    ({}, None, "auto", "ops is None, must be one of"), ({}, ["torch"], "auto", r"ops is \['torch'\], must be one of"), ({}, {}, "auto", "ops is {}"),
    ({}, "picky", "auto", "ops is 'picky', which does not suit device 'cpu', torch.float32.*: Something for machines that nobody has.$"),
    ({}, "auto", "flsh", r"attention_backend is 'flsh', must be one of \['auto', 'reference', 'torch'"),
    ({}, "auto", [], r"attention_backend is \[\], must be one of"), ({}, "torch", None, "attention_backend is None"),
    (dict(quantization="int3"), "auto", "auto", r"quantization must be one of \[None, 'int8', 'int4', 'fp8', 'fp8_per_channel'\], got 'int3'"),
    (dict(quantization=["int8"]), "auto", "auto", r"quantization must be one of .*, got \['int8'\]"),
    (dict(quantization={}), "torch", "auto", "quantization must be one of .*, got {}"),
    (dict(quantization="int8", device=torch.device("cuda")), "auto", "auto", "quantization is 'int8', supported on device 'cpu'; no ops suit device 'cuda'"),
    (dict(quantization="int8"), "torch", "auto", "ops is 'torch', which does not suit .*quantization 'int8'.*neither quantization nor compile"),
    (dict(compile=True), "auto", "auto", "compile is True, which no ops suit on device 'cpu'"),
    (dict(compile=True), "torch", "auto", "ops is 'torch', which does not suit .*compile True"),
])
def test_what_is_unknown_or_does_not_suit_is_refused_by_name(change, name, backend, words, monkeypatch):
    only(monkeypatch, picky=picky)
    with pytest.raises(ValueError, match=words): choose_ops(dataclasses.replace(TARGET, **change), name, backend)


def test_triton_is_for_gpus():
    if "triton" not in OPS: pytest.skip("Triton is not to be had here")
    with pytest.raises(ValueError, match="ops is 'triton', which does not suit device 'cpu'.*device 'cuda'"): choose_ops(TARGET, "triton")
    on_gpu = dataclasses.replace(TARGET, device=torch.device("cuda"))
    assert OPS["triton"](on_gpu).attention.__name__ == "TritonAttention"
    assert OPS["triton"](dataclasses.replace(on_gpu, compile=True)) is None


def test_every_entry_says_what_it_suits():
    "A builder's docstring begins with what a user reads who asks for it in vain."
    for name in OPS: assert what_it_suits(name), name


def test_the_choice_is_logged_once(monkeypatch, caplog):
    only(monkeypatch)
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="nano_vllm"):
        for name in ("auto", "auto", "torch"): choose_ops(TARGET, name)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("ops: torch with TorchAttention, the last that suit device 'cpu', torch.float32")
    assert second.startswith("ops: torch with TorchAttention, as asked for on device 'cpu'")


# ---- nothing leaks back: what the sources may not do

SOURCES = sorted(Path(nano_vllm.layers.__file__).parent.glob("*.py"))
TABLES = ("OPS", "BACKENDS", "ARCHITECTURES", "LAUNCHERS", "ROPE_TYPES")


def entries(tree):
    "(table, key) of every entry that a module writes into one of the tables: in its definition, or later."
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)): continue
        for target in getattr(node, "targets", None) or [node.target]:
            if isinstance(target, ast.Name) and target.id in TABLES:
                if isinstance(node.value, ast.Dict): yield from ((target.id, key.value) for key in node.value.keys)
                else: yield from ((target.id, keyword.arg) for keyword in node.value.keywords)
            if isinstance(target, ast.Subscript) and getattr(target.value, "id", None) in TABLES:
                yield target.value.id, ast.literal_eval(target.slice)


def test_no_entry_of_a_table_is_ever_assigned_over():
    written = [entry for file in SOURCES for entry in entries(ast.parse(file.read_text()))]
    assert ("OPS", "torch") in written and ("BACKENDS", "torch") in written and ("ROPE_TYPES", "yarn") in written
    assert len(written) == len(set(written)), sorted(e for e in written if written.count(e) > 1)
    for table in (OPS, nano_vllm.attention.BACKENDS):   # as they are after all imports
        assert set(table) <= {key for _, key in written}


def test_no_forward_is_ever_patched():
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            assert not any(isinstance(t, ast.Attribute) and t.attr == "forward" for t in targets), f"{file.name}:{node.lineno}"
