"""Batch invariance: a request gets the same bits alone, in company, in chunks, from the cache and after a preemption; or is refused by name.

Bits are compared, so there is no tolerance. What is random is the model, which has nothing to do with language, and the texts."""
import random
from dataclasses import replace

import pytest
import torch
from helpers import assert_idle, tiny_folder
from rank_targets import partial_sums

from nano_vllm import LLM, SamplingParams
from nano_vllm.batch_invariance import (
    NUM_ROWS, TokenwiseAttention, batch_invariant_ops, keeps_rows_apart, num_differing_cuts, obstacle, ordered_all_reduce, sample_rows)
from nano_vllm.bfloat16 import Bfloat16Product
from nano_vllm.cpu_attention import TiledAttention
from nano_vllm.cpu_kernels import CAN_BUILD, can_build, fused_norm, fused_swiglu
from nano_vllm.cpu_products import TiledProduct
from nano_vllm.layers import OPS, Ops, Target, TensorParallelGroup, choose_ops
from nano_vllm.model import ModelConfig
from nano_vllm.moe import MoE
from nano_vllm.parallel import StartedGroup
from nano_vllm.quantization import TiledInt8Product
from nano_vllm.sampler import SamplingMetadata

compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
LIMITS = dict(max_model_len=96, block_size=4, num_kv_blocks=200)
PROMPTS = [[(31 * i + 7 * j) % 49152 for j in range(3 + 5 * i)] for i in range(6)]
PARAMS = [SamplingParams(seed=i, temperature=(.8, 0, 1.)[i % 3], top_p=(1., .9)[i % 2], presence_penalty=i % 3 / 2, max_tokens=10, ignore_eos=True, logprobs=2)
          for i in range(6)]
KINDS = {"float32": dict(dtype="float32"), "bfloat16": dict(dtype="bfloat16"), "int8": dict(dtype="float32", quantization="int8"),
         "int8 of bfloat16": dict(dtype="bfloat16", quantization="int8"), "int4": dict(dtype="bfloat16", quantization="int4"),
         "bfloat16 KV": dict(dtype="float32", kv_cache_dtype="bfloat16")}


def make(folder, **options): return LLM(folder, device="cpu", skip_tokenizer_init=True, **dict(LIMITS, batch_invariant=True) | options)


def ask(llm, which=range(6), params=PARAMS):
    "Per request: its tokens, and what it was told of each and of the two best, to the bit."
    prompts = [{"prompt_token_ids": PROMPTS[i]} for i in which]
    outs = [out.outputs[0] for out in llm.generate(prompts, [params[i] for i in which], use_tqdm=False)]
    return [(out.token_ids, [{t: entry.logprob for t, entry in entries.items()} for entries in out.logprobs]) for out in outs]


def lives(folder, **options):
    "{how: what the six requests got}: alone, together, in chunks, from the cache, preempted."
    llm = make(folder, enable_prefix_caching=False, **options)
    found = {"alone": [ask(llm, [i])[0] for i in range(6)], "together": ask(llm), "another order": ask(llm, range(5, -1, -1))[::-1]}
    assert_idle(llm)
    found["chunks"] = ask(make(folder, enable_prefix_caching=False, max_num_batched_tokens=7, max_num_seqs=3, **options))
    cached = make(folder, **options)
    ask(cached)
    found["cached"] = [ask(cached, [i])[0] for i in range(6)]
    tight = make(folder, **options, num_kv_blocks=20)
    found["preempted"] = ask(tight)
    assert tight.engine.scheduler.num_preemptions > 0
    return found


def differing(found): return [how for how, answers in found.items() if answers != found["alone"]]


# ---- engines

@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_the_same_bits_in_every_life(tiny, kind):
    assert differing(lives(tiny, **KINDS[kind])) == []


@compiled
def test_a_single_leak_is_found(tiny, monkeypatch):
    "Tiles for chunks in place of single tokens, as without the wish: the lives differ."
    leaking = lambda target: replace(batch_invariant_ops(target), attention=TiledAttention)
    monkeypatch.setitem(OPS, "batch_invariant", leaking)
    assert {"chunks", "cached"} <= set(differing(lives(tiny, dtype="float32")))


@compiled
def test_windows_biases_norms_on_heads_and_guesses(tmp_path):
    import transformers
    torch.manual_seed(3)
    sizes = dict(vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                 max_position_embeddings=128)
    for name, more in dict(Mistral=dict(sliding_window=9), Qwen2={}, Qwen3={}).items():
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **more))
        for p in model.parameters(): torch.nn.init.normal_(p, .05, .3)
        model.save_pretrained(tmp_path/name)
        prompts = [[(i + 3) * (j + 1) % 320 for j in range(9 * i + 4)] for i in range(3)]
        params = SamplingParams(seed=1, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        def told(llm, prompts):
            outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            return [(o.outputs[0].token_ids, str(o.outputs[0].logprobs), str(o.prompt_logprobs)) for o in outs]
        llm = make(tmp_path/name, dtype="float32", enable_prefix_caching=False)
        alone = [told(llm, [p])[0] for p in prompts]
        assert told(llm, prompts) == alone
        for options in (dict(max_num_batched_tokens=5), dict(speculative_config=dict(method="ngram", num_speculative_tokens=3))):
            assert told(make(tmp_path/name, dtype="float32", **options), prompts) == alone, (name, options)


# number of ranks -> sizes of a model that its kernels can hold a part of; with four, each KV head is on two ranks
SHAPES = {2: dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=320),
          3: dict(hidden_size=80, intermediate_size=96, num_attention_heads=5, num_key_value_heads=5, vocab_size=336),
          4: dict(hidden_size=128, intermediate_size=64, num_attention_heads=8, num_key_value_heads=2, vocab_size=320)}
MANY = [dict(prompt=[(11 * i + 5 * j * j) % 311 for j in range(1 + 3 * i)],
             params=SamplingParams(seed=i, temperature=(.9, 0)[i == 3], max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=0)) for i in range(5)]


def make_ranks(tmp_path, size, **options):
    folder = tiny_folder(tmp_path, tokenizer=False, **SHAPES[size])
    return make(folder, tensor_parallel_size=size, **options)


def ask_many(llm, which, budget=8192):
    "Per request of MANY all that it was told, to the bit; `budget`: tokens of a step."
    scheduler = llm.engine.scheduler
    scheduler.budget = scheduler.max_tokens_per_sequence = budget
    outs = llm.generate([{"prompt_token_ids": MANY[i]["prompt"]} for i in which], [MANY[i]["params"] for i in which], use_tqdm=False)
    told = lambda found: [{t: e.logprob for t, e in entries.items()} for entries in found or [] if entries]
    return [(o.outputs[0].token_ids, told(o.outputs[0].logprobs), told(o.prompt_logprobs)) for o in outs]


def count_changes(llm, num_rounds=5):
    "Of that many batches of some requests, in chunks of some size, how many tell a request other bits than it gets alone."
    alone, rng, num = [ask_many(llm, [i])[0] for i in range(len(MANY))], random.Random(0), 0
    for _ in range(num_rounds):
        which = rng.sample(range(len(MANY)), rng.randint(2, len(MANY)))
        num += ask_many(llm, which, rng.choice([3, 5, 17, 8192])) != [alone[i] for i in which]
    assert_idle(llm)
    return num


@compiled
@pytest.mark.parametrize("size, options", [(2, dict(dtype="bfloat16")), *((n, dict(dtype="float32", enable_prefix_caching=False)) for n in (3, 4))])
def test_requests_over_ranks_get_the_same_bits_in_random_batches(size, options, tmp_path):
    assert count_changes(make_ranks(tmp_path, size, **options)) == 0


@compiled
def test_an_order_of_ranks_that_depends_on_the_rows_is_found(tmp_path, monkeypatch):
    "On rank 0 alone, the only one that this process can change: three parts are added from the other end if there are many rows."
    def leaking(group, x):
        parts = group.all_gather(x)
        return sum(parts[::-1] if len(x) > 4 else parts)

    monkeypatch.setitem(OPS, "batch_invariant", lambda target: replace(batch_invariant_ops(target), all_reduce=leaking))
    assert count_changes(make_ranks(tmp_path, 3, dtype="float32", enable_prefix_caching=False)) > 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ordered_sum_is_that_of_the_ranks_in_their_order(size):
    "Bit for bit, on all ranks, and a row's is the same in messages of all sizes; that of gloo is not, from three ranks on."
    cases = [(n, hidden, dtype) for dtype in (torch.float32, torch.bfloat16) for hidden in (37, 576) for n in (64, 1, 2, 3, 5, 8, 17, 63)]
    group, differing = StartedGroup(size, "cpu", "rank_targets.add_in_order", cases), 0
    with group.collective_guard():
        for case in cases:
            expected = partial_sums(0, *case)
            for rank in range(1, size): expected = expected + partial_sums(rank, *case)
            mine = [add(group, partial_sums(0, *case)).float() for add in (ordered_all_reduce, StartedGroup.all_reduce)]
            for ordered, own in group.collect(mine):
                assert torch.equal(ordered, expected.float())
                differing += not torch.equal(own, expected.float())
    group.close()
    assert (differing > 0) == (size > 2)


def test_one_rank_has_nothing_to_add():
    x = torch.randn(3, 5)
    assert ordered_all_reduce(TensorParallelGroup(), x) is x


@compiled
def test_without_the_wish_nothing_is_chosen_and_nothing_changes(tiny):
    plain = Target(ModelConfig.from_folder(tiny), torch.device("cpu"), torch.float32, torch.float32)
    assert batch_invariant_ops(plain) is None and not choose_ops(plain).batch_invariant
    assert choose_ops(replace(plain, batch_invariant=True)).batch_invariant
    assert choose_ops(replace(plain, batch_invariant=True), "auto", "reference").batch_invariant


# ---- parts

@compiled
def test_our_kernels_keep_rows_apart():
    g = torch.Generator().manual_seed(0)
    for inputs, outputs in ((64, 96), (576, 960), (1536, 576)):
        x, weight = torch.randn(NUM_ROWS, inputs, generator=g), torch.randn(outputs, inputs, generator=g)
        for product in (TiledProduct(weight), Bfloat16Product(weight.bfloat16()), Bfloat16Product(weight.bfloat16(), widen=True), TiledInt8Product(weight)):
            assert num_differing_cuts(product, x) == 0
        assert num_differing_cuts(lambda x: fused_norm(x, weight[0], 1e-5), x) == num_differing_cuts(fused_swiglu, x) == 0


@compiled
def test_a_product_that_looks_at_the_number_of_rows_is_refused(tiny, monkeypatch):
    class Leaking(TiledProduct):
        def __call__(self, x, bias=None): return super().__call__(x, bias) * (1 + 1e-6 * (len(x) > 5))

    assert num_differing_cuts(Leaking(torch.randn(32, 32)), torch.randn(NUM_ROWS, 32)) > 0
    assert not keeps_rows_apart(Leaking, torch.float32)
    monkeypatch.setattr("nano_vllm.batch_invariance.plain_ops", lambda target: Ops(linear=Leaking))
    with pytest.raises(ValueError, match="batch_invariant must be False here.*depend on the number of rows"): make(tiny, dtype="float32")


def test_sampling_of_no_rows_and_of_some():
    from nano_vllm.cpu_products import fast_sample
    seqs = [type("Row", (), dict(params=PARAMS[i], seed=i, output_token_ids=[3], prompt_token_ids=[1], stop_token_ids=set(), token_mask=None,
                                 bad_words_token_ids=[])) for i in range(6)]
    m, logits = SamplingMetadata.of(seqs), torch.randn(6, 320, generator=torch.Generator().manual_seed(1))
    assert sample_rows(logits, m).tolist() == fast_sample(logits, m).tolist()
    assert sample_rows(logits[:0], m.select(slice(0, 0))).shape == (0,)


# ---- refusals

@compiled
def test_obstacles(tiny):
    config = ModelConfig.from_folder(tiny)
    target = Target(config, torch.device("cpu"), torch.float32, torch.float32, batch_invariant=True)
    assert obstacle(target) is obstacle(replace(target, tensor_parallel_size=2, config=replace(config, intermediate_size=64))) is None
    assert obstacle(replace(target, tensor_parallel_size=3)) is None       # 48 and 49,152 are multiples of 48
    for changes, says in ((dict(device=torch.device("cuda")), "on device 'cuda'"), (dict(compile=True), "with compile"),
                          (dict(dtype=torch.float16), "with float16"), (dict(kv_cache_dtype=torch.float16), "with float16"),
                          (dict(config=replace(config, mlp=MoE)), "for a mixture of experts"),
                          (dict(config=replace(config, quantization="int8")), "for a checkpoint in int8"),
                          (dict(tensor_parallel_size=5, config=replace(config, intermediate_size=80)), "unless vocab_size is a multiple of 80"),
                          (dict(tensor_parallel_size=2), "unless intermediate_size is a multiple of 32"),
                          (dict(config=replace(config, hidden_size=40)), "unless hidden_size is a multiple of 16"),
                          (dict(config=replace(config, vocab_size=100)), "unless vocab_size is a multiple of 16")):
        assert obstacle(replace(target, **changes)) == says
        with pytest.raises(ValueError, match=f"batch_invariant must be False {says}, got True"): choose_ops(replace(target, **changes))


def test_without_kernels_it_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("nano_vllm.batch_invariance.can_build", lambda: False)
    with pytest.raises(ValueError, match=r"batch_invariant must be False without kernels for this CPU"): make(tiny)


@compiled
def test_other_names_do_not_keep_it(tiny):
    with pytest.raises(ValueError, match="ops is 'cpu_steps', which does not suit .*batch_invariant True"): make(tiny, dtype="float32", ops="cpu_steps")
    with pytest.raises(ValueError, match="attention_backend is 'tiled', which is not batch_invariant"): make(tiny, attention_backend="tiled")
    with pytest.raises(ValueError, match="ops is 'batch_invariant', which does not suit"): make(tiny, ops="batch_invariant", batch_invariant=False)
    with pytest.raises(ValueError, match="batch_invariant must be bool"): make(tiny, batch_invariant=2)
    assert TokenwiseAttention.batch_invariant and not TiledAttention.batch_invariant
