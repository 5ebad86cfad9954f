"""model: tiny random models built by transformers, and the demo model, against transformers' logits."""
import json
from dataclasses import replace

import pytest
import torch
from helpers import logits_tolerance, rounding_tolerance, weight_views
from nano_vllm.layers import Ops, TensorParallelGroup, silu_and_mul
from nano_vllm.model import ARCHITECTURES, Decoder, ModelConfig, PlainAttention, rope_settings
from nano_vllm.weights import empty_model, load_model
from nano_vllm.workbench import fetch

TINY = dict(vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, head_dim=10, max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=False, eos_token_id=2)
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
}
CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama attention bias": ("Llama", dict(attention_bias=True)),
    "llama mlp bias": ("Llama", dict(mlp_bias=True)),
    "llama many kv heads": ("Llama", dict(num_attention_heads=6, num_key_value_heads=3, head_dim=6)),
    "llama no gqa": ("Llama", dict(num_key_value_heads=3, head_dim=16)),
    "llama one head": ("Llama", dict(num_attention_heads=1, head_dim=64)),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=2, head_dim=8)),
    "qwen3": ("Qwen3", {}),
    "qwen3 tied": ("Qwen3", dict(tie_word_embeddings=True, num_key_value_heads=3, head_dim=20)),
    "qwen3 bias": ("Qwen3", dict(attention_bias=True)),
}


CONFIGS = dict(Gemma3="Gemma3TextConfig")     # where it is not the family's name and Config


def make(family, folder, rope=None, **changes):
    "A random `family` model of transformers, saved in `folder`."
    import transformers
    settings = {**TINY, **changes}
    rope = dict(rope or ROPES["default"], rope_theta=10000.0)
    if int(transformers.__version__.split(".")[0]) >= 5: settings["rope_parameters"] = rope
    else: settings |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope if len(rope) > 1 else None)
    if family == "Gemma3": settings["rope_parameters"] = dict(sliding_attention=rope, full_attention=rope | dict(rope_theta=1e6))
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, p in model.named_parameters(): torch.nn.init.normal_(p, float("norm" in name), 0.2)
    model.save_pretrained(folder)
    return model


class FormulaAttention:
    "Causal attention of one whole text by the textbook formula, written apart from the package's; notes what it is given."
    def __init__(self): self.seen = []

    def store(self, k, v, layer):
        self.k, self.v = k, v
        self.seen.append((layer, tuple(k.shape), tuple(v.shape)))

    def __call__(self, q, layer):
        self.seen.append((layer, tuple(q.shape)))
        n, heads, d = q.shape
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * d**-0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@torch.inference_mode()
def our_logits(model, ids):
    ids = torch.as_tensor(ids)
    return model.compute_logits(model(ids, torch.arange(len(ids)), FormulaAttention()))


@torch.inference_mode()
def check(theirs, folder, num_tokens):
    config = ModelConfig.from_folder(folder)
    ours = load_model(folder, config, torch.float32, "cpu")
    ids = torch.randint(0, config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))
    expected, logits = theirs(ids[None]).logits[0], our_logits(ours, ids)
    assert logits.shape == (num_tokens, config.vocab_size) and expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(config, num_tokens, expected))
    return config


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_logits_equal_transformers(case, num_tokens, tmp_path):
    family, changes = CASES[case]
    config = check(make(family, tmp_path, **changes), tmp_path, num_tokens)
    assert config.eos_token_ids == {2}


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_types_beyond_the_original_length(family, rope, tmp_path):
    theirs = make(family, tmp_path, ROPES[rope], max_position_embeddings=256 if rope == "yarn" else 64)
    config = check(theirs, tmp_path, {"default": 64, "llama3": 64, "linear": 200, "yarn": 200}[rope])
    assert config.max_position == (64 if rope in ("default", "llama3") else 256)


@pytest.mark.parametrize("rope_type_key", ["rope_type", "type"])
def test_config_as_transformers_4_writes_it(rope_type_key, tmp_path):
    "rope_theta and rope_scaling at the top level, dtype as torch_dtype."
    theirs = make("Llama", tmp_path, ROPES["linear"])
    raw = json.loads((tmp_path/"config.json").read_text())
    raw.pop("rope_parameters", None), raw.pop("dtype", None)
    raw |= {"rope_theta": 10000.0, "rope_scaling": {rope_type_key: "linear", "factor": 4.0}, "torch_dtype": "bfloat16"}
    (tmp_path/"config.json").write_text(json.dumps(raw))
    config = check(theirs, tmp_path, 200)
    assert config.dtype == torch.bfloat16 and config.rope["rope_type"] == "linear"


def test_rope_settings_in_both_spellings():
    from types import SimpleNamespace
    scaling = dict(factor=4.0, original_max_position_embeddings=64)
    old = SimpleNamespace(max_position_embeddings=100, rope_theta=5e5, rope_scaling=dict(scaling, type="yarn"))
    new = SimpleNamespace(max_position_embeddings=100, rope_parameters=dict(scaling, rope_type="yarn", rope_theta=5e5))
    for hf in (old, new):
        rope, longest = rope_settings(hf, 16)
        assert (rope["rope_type"], rope["rope_theta"], longest) == ("yarn", 5e5, 256)
    plain = SimpleNamespace(max_position_embeddings=100, rope_theta=5e5, rope_scaling=None)
    assert rope_settings(plain, 16) == (dict(rope_type="default", rope_theta=5e5, original_max_position_embeddings=100), 100)


def test_yarn_reaches_factor_times_its_original_length(tmp_path):
    make("Qwen2", tmp_path, ROPES["yarn"], max_position_embeddings=64)  # as Qwen2.5's README says to do it
    assert ModelConfig.from_folder(tmp_path).max_position == 256


def test_several_eos_ids(tmp_path):
    make("Llama", tmp_path)
    (tmp_path/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[5, 7])))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == {2, 5, 7}
    (tmp_path/"generation_config.json").unlink()
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == {2}
    raw = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(raw | dict(eos_token_id=None)))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == set()


@pytest.mark.parametrize("changes, words", [
    (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    (dict(architectures=None), "architectures"),
    (dict(quantization_config=dict(quant_method="awq", bits=4)), "quantization_config"),
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "use_sliding_window"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(num_attention_heads=3, num_key_value_heads=2), "num_key_value_heads"),
    (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "rope_type is 'dynamic'"),
    (dict(rope_parameters=None, rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type is 'dynamic'"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "factor"),
    (dict(head_dim=7), "head_dim"),
    (dict(num_hidden_layers="two"), "config.json"),
])
def test_config_refused_by_name(changes, words, tmp_path):
    import transformers
    if changes == dict(num_hidden_layers="two") and transformers.__version__ < "5": pytest.skip("4 does not validate")
    make("Qwen2", tmp_path)
    raw = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=words): ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", [None, "{not json", "[]"])
def test_config_file_missing_or_broken(text, tmp_path):
    if text: (tmp_path/"config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"): ModelConfig.from_folder(tmp_path)


def test_a_family_can_be_registered(tmp_path):
    theirs = make("Llama", tmp_path, attention_bias=True)
    raw = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(raw | dict(architectures=["MyForCausalLM"])))
    with pytest.raises(ValueError, match="MyForCausalLM"): ModelConfig.from_folder(tmp_path)
    ARCHITECTURES["MyForCausalLM"] = ARCHITECTURES["LlamaForCausalLM"]
    try: check(theirs, tmp_path, 20)
    finally: del ARCHITECTURES["MyForCausalLM"]


def test_tokens_are_independent_of_their_companions(tmp_path):
    "Two sequences laid end to end in the flat batch give what each gives alone."
    make("Qwen3", tmp_path)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu")
    a, b = torch.arange(9), torch.arange(40, 45)

    class BothAttention:
        def __init__(self): self.first, self.second = FormulaAttention(), FormulaAttention()
        def store(self, k, v, layer):
            self.first.store(k[:9], v[:9], layer)
            self.second.store(k[9:], v[9:], layer)
        def __call__(self, q, layer): return torch.cat((self.first(q[:9], layer), self.second(q[9:], layer)))

    positions = torch.cat((torch.arange(9), torch.arange(5)))
    with torch.inference_mode(): both = model.compute_logits(model(torch.cat((a, b)), positions, BothAttention()))
    tolerance = logits_tolerance(model.config, 9, both)
    torch.testing.assert_close(both[:9], our_logits(model, a), rtol=0, atol=tolerance)
    torch.testing.assert_close(both[9:], our_logits(model, b), rtol=0, atol=tolerance)


def test_attention_sees_each_layer_once_and_no_input_is_written(tmp_path):
    make("Llama", tmp_path)
    model = load_model(tmp_path, ModelConfig.from_folder(tmp_path), torch.float32, "cpu")
    attention = FormulaAttention()
    ids, positions = torch.tensor([3, 1, 4]), torch.arange(3)
    params = {n: p.clone() for n, p in model.named_parameters()}
    with torch.inference_mode(): hidden = model(ids, positions, attention)
    each = [[(i, (3, 1, 10), (3, 1, 10)), (i, (3, 3, 10))] for i in range(2)]
    assert attention.seen == each[0] + each[1] and hidden.shape == (3, 48)
    assert ids.tolist() == [3, 1, 4] and positions.tolist() == [0, 1, 2]
    for n, p in model.named_parameters(): assert torch.equal(p, params[n])


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_checkpoint_names_are_transformers_names(family, tmp_path):
    theirs = make(family, tmp_path, attention_bias=True)
    views = weight_views(Decoder(ModelConfig.from_folder(tmp_path)))
    assert {n: tuple(v.shape) for n, v in views.items()} == {n: tuple(p.shape) for n, p in theirs.state_dict().items()}


@torch.inference_mode()
def test_demo_model_equals_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = fetch()
    config = ModelConfig.from_folder(path)
    ids = AutoTokenizer.from_pretrained(path).encode(
        "Paged attention stores the keys and values of a sequence in blocks of fixed size, "
        "so that memory is never wasted on tokens which may not come. 日本語 😀")
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    logits = our_logits(load_model(path, config, torch.float32, "cpu"), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1)) and config.eos_token_ids == {2}


# ---- PlainAttention, the package's own oracle

@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_plain_attention_equals_the_formula(window):
    q, k, v = (torch.randn(9, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2, 2))
    attention, expected = PlainAttention(8**-0.5, window), torch.zeros_like(q)
    for token in range(9):
        seen = range(max(0, token + 1 - (window or 9)), token + 1)
        for head in range(6):
            weights = (k[seen, head // 3] @ q[token, head] * 8**-0.5).softmax(0)
            expected[token, head] = weights @ v[seen, head // 3]
    attention.store(k, v, 0)
    torch.testing.assert_close(attention(q, 0), expected, rtol=0, atol=rounding_tolerance(8 + 9 + 9, float(v.abs().max())))


# ---- Ops: handed down at construction

TINY_CONFIG = ModelConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                          rms_norm_eps=1e-5, rope=dict(rope_theta=10000.0), max_position=64, qk_norm=True)
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2])


class Product:
    "A product with `weight`, held apart from the model."
    def __init__(self, weight, calls):
        self.weight, self.calls = weight, calls

    def __call__(self, x, bias):
        self.calls.append(("linear", tuple(self.weight.shape)))
        return torch.nn.functional.linear(x, self.weight, bias)


def noting(calls):
    "Ops that compute as the plain ones do, and note that they did."
    def note(name):
        plain = getattr(Ops(), name)
        def op(*args, **kwargs):
            calls.append((name,))
            return plain(*args, **kwargs)
        return op
    return Ops(linear=lambda weight: Product(weight, calls),
               **{name: note(name) for name in ("norm", "activation", "rope_and_cache", "run_layers")})


def random_decoder(ops=Ops(), group=TensorParallelGroup(), **changes):
    model = empty_model(replace(TINY_CONFIG, **changes), torch.float32, "cpu", group, ops)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.normal_(0, 0.3, generator=rng)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_uses_only_the_ops_it_was_handed(tied):
    calls = []
    plain, noted = random_decoder(tied=tied), random_decoder(noting(calls), tied=tied)
    expected = our_logits(plain, IDS)
    noted.pack()
    assert not calls and torch.equal(our_logits(noted, IDS), expected)
    count = {name: [c[0] for c in calls].count(name) for name in {c[0] for c in calls}}
    # norms: two a layer and two in its attention, and one at the end; products: four a layer, and the logits'
    assert count == dict(norm=2*4 + 1, activation=2, rope_and_cache=2, run_layers=1, linear=2*4 + 1)
    calls.clear()
    assert torch.equal(our_logits(plain, IDS), expected) and not calls   # two models in one process
    for module in noted.modules(): assert "forward" not in vars(module)


@pytest.mark.parametrize("tied", [True, False])
def test_packing_hands_over_every_matrix_and_keeps_the_embedding(tied):
    calls, biases = [], dict(qkv_bias=True, o_bias=True, mlp_bias=True)
    model = random_decoder(noting(calls), tied=tied, **biases)
    matrices = {n for n, p in model.named_parameters() if p.dim() == 2}
    expected = our_logits(model, IDS)
    model.pack()
    assert torch.equal(our_logits(model, IDS), expected)
    left = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert left == {"model.embed_tokens.weight"} and len(matrices) == 2*4 + (1 if tied else 2)
    shapes = sorted(shape for name, *rest in calls if name == "linear" for shape in rest)
    assert shapes == sorted([(31, 16)] + 2*[(64, 16), (16, 32), (48, 16), (16, 24)])


def test_packing_without_linear_changes_nothing():
    model = random_decoder()
    before = [(n, p.data_ptr()) for n, p in model.named_parameters()]
    model.pack()
    assert [(n, p.data_ptr()) for n, p in model.named_parameters()] == before


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
def test_an_mlp_takes_many_tokens_in_pieces(limit):
    "Of `limit` tokens at most, with the same result; other layers see them all at once."
    sizes = []
    def activation(x):
        sizes.append(len(x))
        return silu_and_mul(x)
    model = random_decoder(Ops(activation=activation, max_mlp_tokens=limit))
    expected, logits = our_logits(random_decoder(), IDS), our_logits(model, IDS)
    torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(TINY_CONFIG, len(IDS), expected))
    assert sum(sizes) == 2*len(IDS) and max(sizes) == min(limit, len(IDS)) and len(sizes) == 2 * -(-len(IDS) // limit)


def test_run_layers_may_write_to_what_it_is_given():
    "An implementation may compute in place: nobody reads what went in."
    def in_place(layers, hidden_states, residual, *rest):
        for layer in layers:
            new_hidden_states, new_residual = layer(hidden_states, residual, *rest)
            hidden_states.copy_(new_hidden_states)
            residual.copy_(new_residual)
        return hidden_states, residual
    model, expected = random_decoder(Ops(run_layers=in_place)), our_logits(random_decoder(), IDS)
    for _ in range(2): assert torch.equal(our_logits(model, IDS), expected)


def test_a_family_with_an_mlp_of_its_own_gets_group_and_ops():
    seen = []
    class Mine(torch.nn.Module):
        def __init__(self, c, group, ops):
            super().__init__()
            seen.append((c, group, ops))
        def forward(self, x): return x
    ops, group = Ops(max_mlp_tokens=5), TensorParallelGroup()
    model = random_decoder(ops, group, mlp=Mine)
    assert seen == 2*[(model.config, group, ops)] and our_logits(model, IDS).shape == (7, 31)
