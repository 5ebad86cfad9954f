"""Latent attention: a DeepSeek-V2 model through every path that a CPU takes, what its cache holds, and what is refused by name.

test_families.py has the same family cut into ranks."""
import json
import math

import numpy as np
import pytest
import torch
from greedy_reference import hf_greedy
from helpers import assert_idle, config_of, logits_tolerance, rounding_tolerance
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import BACKENDS, Batch, attention_backend
from nano_vllm.engine_args import EngineArgs, EngineConfig
from nano_vllm.latent_attention import HeadMatrices, LatentSizes, check_engine, pairs_to_halves, score_scale
from nano_vllm.layers import Ops, Rotary, ShardRange, rotate
from nano_vllm.model import ModelConfig, PlainAttention
from nano_vllm.model_runner import kv_block_bytes
from nano_vllm.weights import load_model
from nano_vllm.workbench import fetch
from test_families import DEEPSEEK, IDS, NUM_TOKENS, SHAPE, logits_of_all_positions, make_eager

VECTORS = dict(kv_lora_rank=24, qk_rope_head_dim=8)       # 32 numbers a token: the kernels read them in place
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
SIZES = LatentSizes(10, 6, 7, 9, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "changes -> (transformers' model, its folder), made when first asked for."
    made = {}
    def get(rope=None, **changes):
        key = json.dumps([rope, changes])
        if key not in made:
            folder = tmp_path_factory.mktemp("deepseek")
            made[key] = make_eager("DeepseekV2", folder, rope, **SHAPE | DEEPSEEK | changes), folder
        return made[key]
    return get


def make_llm(folder, **options):
    return LLM(folder, **dict(tokenizer=fetch(), device="cpu", block_size=4, num_kv_blocks=100, max_model_len=64) | options)


def answers(llm, prompts, num_tokens=NUM_TOKENS, **params):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **params)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert_idle(llm)
    return outs


def tokens(outs): return [list(out["token_ids"]) for out in outs]


# ---- the same logits

@pytest.mark.parametrize("changes", [dict(), VECTORS, dict(q_lora_rank=5), dict(first_k_dense_replace=0), dict(first_k_dense_replace=9)], ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_attention_gives_transformers_logits(saved, backend, changes):
    "Prompts whole and in chunks of 7, then decoding: positions of all three kinds."
    theirs, folder = saved(**changes)
    try: llm = make_llm(folder, attention_backend=backend, enable_prefix_caching=False)
    except ValueError as e:
        assert "attention_backend is" in str(e)
        pytest.skip(str(e))
    expected_answer = hf_greedy(theirs, IDS, NUM_TOKENS)
    with torch.inference_mode(): expected = theirs(torch.tensor([IDS + expected_answer])).logits[0, :-1]
    for budget in (64, 7):
        answer, logits = logits_of_all_positions(llm, IDS, budget)
        assert answer == expected_answer
        tolerance = logits_tolerance(llm.engine.runner.model.config, len(logits), expected)
        assert tolerance < 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rope", [YARN, YARN | dict(mscale_all_dim=0), dict(rope_type="linear", factor=2.0)], ids=str)
def test_rope_scaling(saved, rope):
    theirs, folder = saved(rope)
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, torch.float32, "cpu")
    ids = torch.tensor(IDS + IDS[::-1])
    with torch.inference_mode():
        logits = model.compute_logits(model(ids, torch.arange(len(ids)), PlainAttention(config.attention_scale)))
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(config, len(ids), expected))


def test_scores_of_yarn():
    assert score_scale(192, dict(rope_type="default", mscale_all_dim=1)) == 192**-.5
    assert score_scale(192, dict(rope_type="yarn", factor=40)) == 192**-.5
    assert score_scale(192, dict(rope_type="yarn", factor=40, mscale_all_dim=.707)) == pytest.approx(192**-.5 * (.0707*math.log(40) + 1)**2)


def test_absorbed_equals_expanded():
    "Any texts and heads: keys and values made of the latents, or queries made for them."
    rng = torch.Generator().manual_seed(0)
    heads, n = 3, 11
    module = HeadMatrices(SIZES, ShardRange(0, heads, heads))
    module.weight.normal_(generator=rng)
    latents, rope_key = torch.randn(n, 10, generator=rng), torch.randn(n, 1, 6, generator=rng)
    q_nope, q_rope = torch.randn(n, heads, 7, generator=rng), torch.randn(n, heads, 6, generator=rng)
    expanded, absorbed = PlainAttention(.3), PlainAttention(.3)
    kv = (latents @ module.weight.T).unflatten(-1, (heads, 16))
    keys, values = kv.split([7, 9], dim=-1)
    expanded.store(torch.cat((keys, rope_key.expand(-1, heads, -1)), -1), values, 0)
    entries = torch.cat((latents[:, None], rope_key), -1)
    absorbed.store(entries, entries, 0)
    y = module.values(absorbed(torch.cat((module.absorb(q_nope), q_rope), -1), 0)[..., :10])
    wanted = expanded(torch.cat((q_nope, q_rope), -1), 0)
    torch.testing.assert_close(y, wanted, rtol=0, atol=rounding_tolerance(10 + 7 + 6 + n + 9, float(wanted.abs().max()) * 10))


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = Rotary(8, dict(rope_theta=100.0), 9)(torch.arange(5) + 3)
    turned = rotate(pairs_to_halves(x), cos, sin)
    angles = torch.outer(torch.arange(5) + 3., 100.0 ** (-torch.arange(0, 8, 2) / 8))
    wanted = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(5, 1, 4), angles[:, None])
    torch.testing.assert_close(turned, torch.cat((wanted.real, wanted.imag), -1), rtol=0, atol=1e-5)


# ---- what the cache holds

def test_the_cache_has_one_vector_a_token(saved):
    llm = make_llm(saved()[1])
    config, cache = llm.engine.runner.model.config, llm.engine.runner.kv_cache
    assert cache.shape == (3, 1, 100, 4, 1, DEEPSEEK["kv_lora_rank"] + DEEPSEEK["qk_rope_head_dim"])
    assert cache.nbytes == 100 * kv_block_bytes(config, 4, torch.float32) == 100 * 4 * 3 * 16 * 4
    assert llm.engine.runner.model.rotary.cos.shape[1] == DEEPSEEK["qk_rope_head_dim"] // 2
    answers(llm, [IDS[:8]], 1)
    assert len(cache.abs().sum((0, 1, 3, 4, 5)).nonzero()) == 2        # of the prompt's 8 tokens; nobody looked at the ninth


@pytest.mark.parametrize("options", [
    dict(), dict(block_size=1), dict(block_size=3), dict(max_num_batched_tokens=5), dict(long_prefill_token_threshold=3), dict(async_scheduling=True),
    dict(async_scheduling=True, max_num_batched_tokens=6), dict(speculative_config=dict(method="ngram", num_speculative_tokens=3))], ids=str)
@pytest.mark.parametrize("changes", [dict(q_lora_rank=5), VECTORS], ids=str)
def test_tokens_do_not_depend_on_blocks_chunks_or_companions(saved, options, changes):
    theirs, folder = saved(**changes)
    llm = make_llm(folder, **options)
    prompts = [IDS, IDS[:13], IDS[3:20], IDS[::-1], IDS[:17] + IDS[:5], IDS]
    expected = [hf_greedy(theirs, ids, NUM_TOKENS) for ids in prompts]
    for _ in range(2):      # the second time with blocks that are found again
        outs = answers(llm, prompts)
        assert tokens(outs) == expected
    if "block_size" not in options: assert outs[0].num_cached_tokens == len(IDS) // 4 * 4


def test_several_answers_share_the_prompts_latents(saved):
    "Three for one prompt, drawn: the same whatever the blocks and chunks."
    several = []
    for options in (dict(), dict(max_num_batched_tokens=6, block_size=3)):
        llm = make_llm(saved()[1], **options)
        out, = llm.generate([{"prompt_token_ids": IDS}], SamplingParams(n=3, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True), use_tqdm=False)
        assert_idle(llm)
        several.append([list(o.token_ids) for o in out.outputs])
    assert several[0] == several[1] and len(set(map(tuple, several[0]))) == 3


def test_a_sequence_that_gave_way_says_the_same(saved):
    theirs, folder = saved()
    llm = make_llm(folder, num_kv_blocks=14)
    prompts = [IDS[i:i + 3] for i in range(6)]
    outs = answers(llm, prompts, 30)
    assert tokens(outs) == [hf_greedy(theirs, ids, 30) for ids in prompts] and llm.engine.scheduler.num_preemptions


def test_it_sleeps_and_drafts(saved):
    theirs, folder = saved()
    llm = make_llm(folder, speculative_config=dict(model=str(folder), num_speculative_tokens=3))
    assert tokens(answers(llm, [IDS])) == [hf_greedy(theirs, IDS, NUM_TOKENS)]
    llm = make_llm(folder)
    llm.sleep()
    llm.wake_up()
    assert tokens(answers(llm, [IDS])) == [hf_greedy(theirs, IDS, NUM_TOKENS)]


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(quantization="int8"), dict(dtype="float16"), dict(kv_cache_dtype="bfloat16")], ids=str)
def test_other_number_types_stay_near(saved, options):
    theirs, folder = saved(**VECTORS)
    try: llm = make_llm(folder, **options)
    except ValueError as e: pytest.skip(str(e))      # without VNNI, sizes that are no multiples of 16 have no exact int8
    with torch.inference_mode(): expected = theirs(torch.tensor([IDS])).logits[0]
    logits = logits_of_all_positions(llm, IDS, 7)[1][:len(IDS)].float()
    assert (logits - expected).norm() < 0.15 * expected.norm()


# ---- what is refused

@pytest.mark.parametrize("changes, words", [
    (dict(topk_method="group_limited_greedy"), "topk_method is 'group_limited_greedy', supported: 'greedy'"),
    (dict(norm_topk_prob=True), "norm_topk_prob is True, supported: False"),
    (dict(attention_bias=True), "attention_bias is True"), (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(num_experts_per_tok=8), "num_experts_per_tok must be"), (dict(num_experts_per_tok=None), "num_experts_per_tok must be"),
    (dict(kv_lora_rank=0), "kv_lora_rank must be"), (dict(q_lora_rank=0), "q_lora_rank must be"),
    (dict(qk_rope_head_dim=7), "even"), (dict(n_shared_experts=0), "n_shared_experts must be"),
    (dict(routed_scaling_factor=0.0), "routed_scaling_factor must be"),
    (dict(num_key_value_heads=3), "num_key_value_heads is 3, supported: num_attention_heads, 6"),
    (dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), "rope_type is 'dynamic'"),
    (dict(rope_parameters=YARN | dict(rope_theta=1e4, mscale_all_dim="1")), "mscale_all_dim must be a number from 0 to 1000.0, got '1'"),
    (dict(rope_parameters=YARN | dict(rope_theta=1e4, mscale_all_dim=math.nan)), "mscale_all_dim must be a number"),
    (dict(rope_parameters=YARN | dict(rope_theta=1e4, mscale=-1.0)), "mscale must be a number"),
])
def test_configs_refused_by_name(saved, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): config_of(saved()[1], tmp_path, **changes)


@pytest.mark.parametrize("options, words", [
    (dict(enable_lora=True), "enable_lora must be left out with latent attention"),
    (dict(data_parallel_size=2, kv_transfer_config=dict(num_prefill_replicas=1)), "kv_transfer_config must be left out with latent attention"),
    (dict(compile=True), "compile is True, which no ops suit"),
    (dict(kv_cache_dtype="fp8"), "kv_cache_dtype must be 'auto' or a dtype of 16 bits or more with latent attention, got 'fp8'"),
    (dict(batch_invariant=True), "batch_invariant must be False"),
    (dict(tensor_parallel_size=7), "tensor_parallel_size is 7, supported for 6 heads"),
])
def test_engines_refused_by_name_before_any_work(saved, monkeypatch, options, words):
    monkeypatch.setattr("nano_vllm.engine_args.load_model", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=words): make_llm(saved()[1], **options)


def test_attention_that_cannot_do_it_is_refused_by_name(saved, monkeypatch):
    class Other: check = classmethod(lambda *args: None)
    monkeypatch.setitem(BACKENDS, "other", Other)
    with pytest.raises(ValueError, match="attention_backend is 'other', which has no latent attention; supported: 'reference', 'torch'"):
        make_llm(saved()[1], attention_backend="other")
    assert make_llm(saved()[1]).engine.runner.graphs is None


def test_gpus_are_refused_by_name(saved):
    args = EngineArgs(saved()[1])
    config = EngineConfig(args, args.model, None, torch.device("cuda:1"), None, None, 64, Ops())
    with pytest.raises(ValueError, match="device is 'cuda:1', latent attention is supported on 'cpu'"): check_engine(config)


LITE = """{"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
"eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
"kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
"n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
"num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
"rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
"type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true, "tie_word_embeddings": false,
"topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}"""


def test_the_lite_models_config_as_it_was_published(tmp_path):
    (tmp_path/"config.json").write_text(LITE)
    config = ModelConfig.from_folder(tmp_path)
    sizes = config.decoder.keywords["sizes"]
    assert (sizes, config.num_heads, config.max_position) == (LatentSizes(512, 64, 128, 128, None, 1), 16, 163840)
    assert kv_block_bytes(config, 1, torch.bfloat16) == 27 * 576 * 2 and config.attention_scale == score_scale(192, config.rope)
    (tmp_path/"config.json").write_text(LITE.replace('"softmax"', '"sigmoid"'))
    with pytest.raises(ValueError, match="scoring_func is 'sigmoid', supported: 'softmax'"): ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("backend", ["torch", "in_place", "tiled"])
@pytest.mark.parametrize("heads", [16, 128])
def test_latents_of_real_size(backend, heads):
    "A decode and a chunk, with the heads of V2-Lite and of V3, against the formula in float64."
    try: attention = attention_backend(backend)
    except ValueError as e: pytest.skip(str(e))
    rng, lens = torch.Generator().manual_seed(0), [(1, 37), (11, 30)]
    cache = torch.randn(1, 1, 6, 16, 1, 576, generator=rng)
    tables = torch.tensor([[5, 0, 3], [1, 4, 0]])
    positions = torch.cat([torch.arange(end - n, end) for n, end in lens])
    none = torch.tensor([], dtype=torch.int64)
    batch = Batch(none, positions, none, tables, *np.array(lens).T, none, none)
    q = torch.randn(12, heads, 576, generator=rng)
    y = attention(batch, cache, 576**-.5)(q, 0)
    for token, (row, position) in enumerate(zip([0] + [1] * 11, positions)):
        seen = cache[0, 0, tables[row]].flatten(0, 1)[:position + 1, 0].double()
        wanted = (q[token].double() @ seen.T * 576**-.5).softmax(-1) @ seen
        torch.testing.assert_close(y[token].double(), wanted, rtol=0, atol=rounding_tolerance(576 + 37, float(seen.abs().max())))
