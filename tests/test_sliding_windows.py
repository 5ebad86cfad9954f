"""Layers with a window: Gemma 3 through every path that a CPU takes, the blocks it holds, and what is refused by name."""
import copy
from collections import defaultdict

import pytest
import torch
from greedy_reference import hf_greedy
from helpers import assert_idle, config_of, logits_tolerance
from nano_vllm import LLM, SamplingParams
from nano_vllm.attention import BACKENDS
from nano_vllm.kv_blocks import Sequence, blocks_needed
from nano_vllm.layers import Ops
from nano_vllm.model import ModelConfig, PlainAttention
from nano_vllm.scheduler import Scheduler
from nano_vllm.sliding_windows import (GEMMA, GEMMA_NAMES, GemmaRMSNorm, GroupedAttention, KVLayout, fetch_gemma, gelu_and_mul,
                                       gemma_config, make_layout, without_one)
from nano_vllm.weights import load_model
from nano_vllm.workbench import cache_dir, fetch, hf_name
from test_families import GEMMA as SETTINGS, IDS, NUM_TOKENS, SHAPE, WINDOW, greedy, logits_of_all_positions
from test_model import make

VECTORS = dict(head_dim=16, intermediate_size=64)      # sizes that the kernels take
LAYOUT = KVLayout((5, 11, 17), tuple(i for i in range(18) if i % 6 != 5), 512)      # of Gemma 3 270M


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    "(transformers' model, its folder)"
    folder = tmp_path_factory.mktemp("gemma")
    return make("Gemma3", folder, **SHAPE | SETTINGS | VECTORS), folder


def make_llm(folder, **options):
    return LLM(folder, **dict(tokenizer=fetch(), device="cpu", block_size=4, num_kv_blocks=200, max_model_len=64) | options)


# ---- the family

@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attention_gives_transformers_logits(gemma, backend):
    theirs, folder = gemma
    try: llm = make_llm(folder, attention_backend=backend, enable_prefix_caching=False)
    except ValueError as e: pytest.skip(str(e))
    expected_answer = hf_greedy(theirs, IDS, NUM_TOKENS)
    with torch.inference_mode(): expected = theirs(torch.tensor([IDS + expected_answer])).logits[0, :-1]
    for budget in (64, 7):
        answer, logits = logits_of_all_positions(llm, IDS, budget)
        assert answer == expected_answer
        torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(llm.engine.runner.model.config, len(logits), expected))


def test_the_plain_formula_gives_transformers_logits(gemma):
    theirs, folder = gemma
    config = ModelConfig.from_folder(folder)
    model = load_model(folder, config, torch.float32, "cpu")
    windows = [None] + [WINDOW] * config.kv_layout.num_local_groups
    attention = GroupedAttention([PlainAttention(config.attention_scale, w) for w in windows])
    with torch.inference_mode():
        logits = model.compute_logits(model(torch.tensor(IDS), torch.arange(len(IDS)), attention))
        expected = theirs(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(config, len(IDS), expected))
        parts = GroupedAttention([PlainAttention(config.attention_scale)] * len(windows))     # all layers see all
        wrong = model.compute_logits(model(torch.tensor(IDS), torch.arange(len(IDS)), parts))
    differ = (wrong - expected).abs().amax(-1)
    assert differ[:WINDOW].max() < logits_tolerance(config, len(IDS), expected) < differ[WINDOW:].min() / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_activation_round_as_transformers_do(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    rng = torch.Generator().manual_seed(0)
    theirs, ours = Gemma3RMSNorm(48, 1e-6).to(dtype), GemmaRMSNorm(48, 1e-6, Ops())
    weight = torch.randn(48, generator=rng).to(dtype)
    theirs.weight.data, ours.weight.data = weight.clone(), weight.clone()
    ours.pack()
    x, residual = torch.randn(2, 9, 48, generator=rng).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=torch.finfo(dtype).eps, atol=0)
    y, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, theirs(x + residual), rtol=torch.finfo(dtype).eps, atol=0)
    gate, up = x[:, :24], x[:, 24:]
    assert torch.equal(gelu_and_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_scaled_as_transformers_do(gemma, dtype):
    theirs, folder = gemma
    model = load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu")
    expected = copy.deepcopy(theirs.model.embed_tokens).to(dtype)(torch.tensor(IDS))
    assert torch.equal(model.embed(torch.tensor(IDS)), expected)


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(quantization="int8"), dict(dtype="float16")], ids=str)
def test_other_number_types_stay_near(gemma, options):
    theirs, folder = gemma
    try: llm = make_llm(folder, **options)
    except ValueError as e: pytest.skip(str(e))      # without VNNI, sizes that are no multiples of 16 have no exact int8
    with torch.inference_mode(): expected = theirs(torch.tensor([IDS])).logits[0]
    logits = logits_of_all_positions(llm, IDS, 7)[1][:len(IDS)].float()
    assert (logits - expected).norm() < 0.15 * expected.norm()


def test_compile_and_graphs_are_not_for_it(gemma):
    with pytest.raises(ValueError, match="compile is True, which no ops suit"): make_llm(gemma[1], compile=True)
    assert make_llm(gemma[1]).engine.runner.graphs is None


@pytest.mark.parametrize("changes, words", [
    (dict(hidden_activation="relu"), "hidden_activation is 'relu', supported: 'gelu_pytorch_tanh'"),
    (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0, supported: None"),
    (dict(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (dict(sliding_window=0), "sliding_window must be"),
    (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar must be a number from 1e-06 to 1000000.0, got 0"),
    (dict(query_pre_attn_scalar=-4), "query_pre_attn_scalar must be .*, got -4"),
    (dict(sliding_window=None), "sliding_window is None, but layer_types"),
    (dict(layer_types=["full_attention"] * 4), "layer_types|5|layers"),
    (dict(layer_types=["chunked_attention"] * 5), "layer_types"),
])
def test_refused_by_name(gemma, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): config_of(gemma[1], tmp_path, **changes)


def test_the_layout_follows_the_config(gemma, tmp_path):
    config = config_of(gemma[1], tmp_path)
    assert config.kv_layout == KVLayout((2,), (0, 1, 3, 4), WINDOW) and config.sliding_window is None
    assert config.num_cache_layers == 1 and config.attention_scale == 7**-0.5
    same = config_of(gemma[1], tmp_path, layer_types=["sliding_attention"] * 5)
    assert same.kv_layout is None and same.sliding_window == WINDOW
    full = config_of(gemma[1], tmp_path, layer_types=["full_attention"] * 5)
    assert full.kv_layout is None and full.sliding_window is None


@pytest.mark.parametrize("windows", [(4, 4, None, 4), (None, 4), (4, 4, None, None, 4), (None, None, None, 4), (4,) * 22 + (None,) * 4])
def test_every_layer_has_a_place_of_its_own(windows):
    layout = make_layout(windows)
    places = [layout.place(i) for i in range(len(windows))]
    assert len(set(places)) == len(windows)
    assert all((group == 0) == (w is None) for (group, _), w in zip(places, windows))
    assert all(index < layout.group_size and group <= layout.num_local_groups for group, index in places)


# ---- blocks

@pytest.mark.parametrize("options", [dict(), dict(block_size=1), dict(block_size=3), dict(max_num_batched_tokens=5),
                                     dict(long_prefill_token_threshold=3), dict(async_scheduling=True),
                                     dict(speculative_config=dict(method="ngram", num_speculative_tokens=3))], ids=str)
def test_tokens_do_not_depend_on_blocks_chunks_or_companions(gemma, options):
    theirs, folder = gemma
    llm = make_llm(folder, **options)
    prompts = [IDS, IDS[:13], IDS[3:20], IDS[::-1], IDS[:17] + IDS[:5], IDS]
    expected = [hf_greedy(theirs, ids, NUM_TOKENS) for ids in prompts]
    for _ in range(2):      # the second time with blocks that are found again
        outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True), use_tqdm=False)
        assert [list(out["token_ids"]) for out in outs] == expected
        assert_idle(llm)
    if "block_size" not in options: assert outs[0].num_cached_tokens > 0


def test_a_sequence_that_gave_way_says_the_same(gemma):
    theirs, folder = gemma
    llm = make_llm(folder, num_kv_blocks=56)
    prompts = [IDS[i:i + 3] for i in range(6)]
    expected = [hf_greedy(theirs, ids, 30) for ids in prompts]
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    assert [list(out["token_ids"]) for out in outs] == expected and llm.engine.scheduler.num_preemptions
    assert_idle(llm)


def test_what_cannot_fit_is_refused_and_what_fits_ends(gemma):
    llm = make_llm(gemma[1], num_kv_blocks=30, max_num_batched_tokens=4)
    layout = llm.engine.runner.model.config.kv_layout
    count = layout.block_counter(4)
    longest = max(n for n in range(1, 64) if count(n, 4) <= 30)
    assert count(longest, 4) < (1 + layout.num_local_groups) * blocks_needed(longest, 4)     # a window's blocks are enough
    prompt = (IDS * 3)[:longest + 1 - 8]
    assert len(greedy(llm, [prompt], 4)[0]) == NUM_TOKENS if count(len(prompt) + NUM_TOKENS - 1, 4) <= 30 else True
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    out, = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert len(out["token_ids"]) == 8
    with pytest.raises(ValueError, match="KV blocks, but num_kv_blocks is 30"):
        llm.generate([{"prompt_token_ids": prompt + [1]}], params, use_tqdm=False)


def held_blocks(num_tokens, chunk, num_decodes=20, block_size=16):
    "(most blocks held at any time, blocks held at the end) by one text of so many tokens, in chunks."
    manager = LAYOUT.manager(4000, block_size, chunk)
    scheduler = Scheduler(manager, 1, chunk)
    seq = Sequence("a", list(range(num_tokens)), SamplingParams(max_tokens=num_decodes), max_len=num_tokens + num_decodes)
    scheduler.add(seq)
    held = []
    while seq.num_tokens < seq.max_len:
        output = scheduler.schedule()
        held.append(manager.pool.num_blocks - len(manager.pool.free_blocks))
        scheduler.update(output, [0] * len(output.sampled))
    return max(held), held[-1]


@pytest.mark.parametrize("chunk, most", [(256, .30), (512, .30), (1024, .40)])
def test_memory_at_8k_is_a_fraction(chunk, most):
    full = blocks_needed(8192, 16) * (1 + LAYOUT.num_local_groups)      # as many bytes as all layers take that keep all
    peak, end = held_blocks(8172, chunk)
    assert peak <= most * full and end <= .23 * full
    assert peak <= LAYOUT.block_counter(chunk)(8192, 16)


def test_a_hit_needs_the_whole_prefix_and_the_last_window():
    layout = KVLayout((0,), (1, 2), 6)
    manager = layout.manager(100, 2, 4)
    scheduler = Scheduler(manager, 1, 4)

    def run(tokens):
        seq = Sequence("a", tokens, SamplingParams(max_tokens=1), max_len=len(tokens) + 1)
        found = len(manager.get_computed_blocks(seq)) * 2
        scheduler.add(seq)
        while not seq.output_token_ids:
            output = scheduler.schedule()
            scheduler.update(output, [0] * len(output.sampled))
        scheduler.finish(seq, "length")
        return found

    text = list(range(20))
    assert run(text) == 0 and run(text) == 18                     # all but the block of the last token
    assert run(text[:10]) == 8                                    # what lies behind the window is found as long as it is there
    cache = manager.cache
    uid = {tuple(e.tokens): e.uid for e in cache.entries if e}
    cache.evict(cache.local_blocks[uid[(6, 7)], 1])               # one block of one group is gone
    assert run(text[:10]) == 6                                    # tokens 6 and 7 are in sight of 8 and 10, and not of 6
    cache.evict(cache.local_blocks[uid[(2, 3)], 0])
    assert run(text) == 18                                        # nobody looks at 2 and 3
    block = cache.block_of[next(e.hash for e in cache.entries if e and e.tokens == [2, 3])]
    cache.evict(block)
    assert run(text) == 2                                         # but in group 0 all count


# ---- the real model

def test_names_and_numbers_of_a_gguf_file():
    assert hf_name("blk.3.ffn_norm.weight", GEMMA_NAMES) == "model.layers.3.pre_feedforward_layernorm.weight"
    assert hf_name("blk.3.ffn_norm.weight") == "model.layers.3.post_attention_layernorm.weight"
    weight = torch.arange(3).numpy()
    assert without_one("attn_q_norm", weight, {}).tolist() == [-1, 0, 1] and without_one("attn_q", weight, {}) is weight
    header = defaultdict(lambda: 0, {"gemma3.attention.key_length": 256, "gemma3.attention.sliding_window": 512})
    header |= {"tokenizer.ggml.tokens": "ab", "tokenizer.ggml.eos_token_id": 1, "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07}
    config = gemma_config(header, True)
    assert config["rms_norm_eps"] == 1e-6 and config["vocab_size"] == 2 and config["eos_token_id"] == [1, 106]


@pytest.mark.slow
@pytest.mark.skipif(not (cache_dir()/GEMMA).exists(), reason="Gemma 3 270M is not in the cache: nano_vllm.LLM('gemma3-270m') fetches it")
def test_the_real_model_says_what_transformers_says():
    "Three short prompts together, and one of 722 tokens, more than the window, in chunks."
    from transformers import AutoModelForCausalLM
    llm = LLM("gemma3-270m", device="cpu", max_model_len=2048, max_num_batched_tokens=256)
    theirs = AutoModelForCausalLM.from_pretrained(fetch_gemma(), dtype=torch.float32).eval()
    texts = ["The capital of France is", "Once upon a time", "1, 2, 3, 4,", "The river runs through the valley and past the old mill. " * 60]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    assert len(prompts[3]) > 512 and prompts[0] == [2, 818, 5279, 529, 7001, 563]
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True), use_tqdm=False)
    assert [list(out["token_ids"]) for out in outs] == [hf_greedy(theirs, ids, 32) for ids in prompts]
    chat, = llm.chat([dict(role="user", content="Hi")], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert chat.prompt.endswith("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n")
