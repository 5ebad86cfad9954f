"""Model families through the whole engine: tiny random models that transformers saved, logits and greedy tokens against transformers'.

Each family runs alone and cut into 2 and 3 ranks; prompts go in whole, in chunks, and together with others. The ranks are threads
of this process, which start at once; test_tensor_parallel.py has processes, and so has one test here."""
import json
import threading
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from greedy_reference import hf_greedy
from helpers import assert_idle, logits_tolerance, rounding_tolerance
from hypothesis import given, settings, strategies as st
from nano_vllm import LLM, SamplingParams, engine_args
from nano_vllm.layers import LAUNCHERS, Ops, TensorParallelGroup, silu_and_mul
from nano_vllm.model import ModelConfig, weight_shards
from nano_vllm.moe import Experts, MoE, WholeExperts, grouped_linear, route
from nano_vllm.sampling_params import log_once
from nano_vllm.workbench import fetch
from safetensors.torch import load_file, save_file
from test_model import make

SIZES = (1, 2, 3)
SHAPE = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=10, intermediate_size=43, vocab_size=97)  # 43, 97: primes
EXPERTS = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=11, norm_topk_prob=True)
WINDOW = 5
GEMMA = dict(sliding_window=WINDOW, query_pre_attn_scalar=7, tie_word_embeddings=True, num_hidden_layers=5,
             layer_types=["sliding_attention"]*2 + ["full_attention"] + ["sliding_attention"]*2)
DEEPSEEK = dict(num_key_value_heads=6, q_lora_rank=None, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=9, num_hidden_layers=3,
                first_k_dense_replace=1, n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=11, n_shared_experts=2, routed_scaling_factor=1.5)
FAMILIES = {
    "Llama": ("Llama", {}), "Llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "Llama biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "Mistral": ("Mistral", dict(sliding_window=None)), "Mistral with a window": ("Mistral", dict(sliding_window=WINDOW)),
    "Qwen2": ("Qwen2", {}), "Qwen3": ("Qwen3", {}), "Qwen3-MoE": ("Qwen3Moe", EXPERTS),
    "Gemma3": ("Gemma3", GEMMA), "Gemma3 windows only": ("Gemma3", GEMMA | dict(layer_types=["sliding_attention"]*2, num_hidden_layers=2)),
    "Gemma3 in whole vectors": ("Gemma3", GEMMA | dict(head_dim=16, intermediate_size=64)),
    "Gemma3 biases": ("Gemma3", GEMMA | dict(attention_bias=True, tie_word_embeddings=False)),
    "DeepSeek-V2": ("DeepseekV2", DEEPSEEK), "DeepSeek-V2 compressed queries": ("DeepseekV2", DEEPSEEK | dict(q_lora_rank=5)),
    "Qwen3-MoE raw weights": ("Qwen3Moe", EXPERTS | dict(norm_topk_prob=False, num_experts_per_tok=1, attention_bias=True)),
}
IDS = [(7*i + i*i) % 97 for i in range(23)]
NUM_TOKENS = 12


class ThreadGroup(TensorParallelGroup):
    "Ranks that are threads. All see the list of what each has given, once it is complete."
    def __init__(self, rank, size, given, barrier, messages):
        super().__init__(rank, size)
        self.given, self.barrier, self.messages = given, barrier, messages

    def exchange(self, x):
        self.given[self.rank] = x
        self.barrier.wait(60)
        given = list(self.given)
        self.barrier.wait(60)
        return given

    def all_reduce(self, x): return sum(self.exchange(x.clone()))
    def gather(self, x): return torch.cat(self.exchange(x), dim=-1)
    def minimum(self, n): return min(self.exchange(n))
    def broadcast(self, message):
        for queue in self.messages[1:]: queue.put(message)
    def receive(self): return self.messages[self.rank].get(timeout=60)
    def close(self): self.broadcast(None)


def start_threads(size, device_type, target, args):
    "A launcher: the other ranks serve as threads; what breaks one breaks all."
    given, barrier, messages = [None]*size, threading.Barrier(size), [SimpleQueue() for _ in range(size)]
    groups = [ThreadGroup(rank, size, given, barrier, messages) for rank in range(size)]
    def serve(group):
        try: engine_args.serve_rank(group, args)
        except BaseException: barrier.abort(); raise
    for group in groups[1:]: threading.Thread(target=serve, args=(group,), daemon=True).start()
    return groups[0]


def make_eager(*args, **changes):
    "A random model; its experts one after the other, as grouped_mm would want widths that are multiples of 16 bytes."
    model = make(*args, **changes)
    model.config._experts_implementation = "eager"
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "name -> (transformers' model, its folder), made when first asked for."
    made = {}
    def get(name):
        if name not in made:
            family, changes = FAMILIES[name]
            folder = tmp_path_factory.mktemp("model")
            made[name] = make_eager(family, folder, **SHAPE | changes), folder
        return made[name]
    return get


def make_llm(folder, size=1, **options):
    return LLM(folder, tokenizer=fetch(), tensor_parallel_size=size, device="cpu", block_size=4, num_kv_blocks=64,
               max_model_len=64, enable_prefix_caching=False, **options)


@pytest.fixture(scope="module", params=[(name, size) for name in FAMILIES for size in SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request, saved):
    "(transformers' model, our engine with its model cut into 1, 2 or 3 ranks)."
    name, size = request.param
    theirs, folder = saved(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAUNCHERS, "processes", start_threads)
        llm = make_llm(folder, size)
    yield theirs, llm
    if size > 1: llm.engine.runner.group.close()


def greedy(llm, prompts, budget, **params):
    "Token ids of the answers, with at most `budget` tokens in a step."
    llm.engine.scheduler.budget = budget
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **params)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    assert_idle(llm)
    return [list(out["token_ids"]) for out in outs]


def logits_of_all_positions(llm, ids, budget):
    "(answer, position -> logits): what the model gave for the prompt and the answer, in whatever pieces it was asked."
    runner, rows, wanted = llm.engine.runner, {}, []
    model, forward, compute_logits = runner.model, runner.forward, runner.model.compute_logits

    def watch_forward(batch):
        hidden = forward(batch)
        order = torch.cat((batch.logits_indices, batch.prompt_indices))
        wanted[:] = batch.positions[order].tolist()
        return hidden

    def watch_logits(hidden):
        logits = compute_logits(hidden)
        for row in logits: rows[wanted.pop(0)] = row
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "forward", watch_forward)
        patch.setattr(model, "compute_logits", watch_logits)
        answer, = greedy(llm, [ids], budget, prompt_logprobs=0)
    assert not wanted
    return answer, torch.stack([rows[p] for p in sorted(rows)])


def check_against_transformers(theirs, llm):
    "A whole prompt, one in chunks that straddle blocks and windows, one token by token; each then decodes. (Largest logit, largest difference)."
    worst = 0
    expected_answer = hf_greedy(theirs, IDS, NUM_TOKENS)
    with torch.inference_mode(): expected = theirs(torch.tensor([IDS + expected_answer])).logits[0, :-1]
    for budget in (64, 7, 1):
        answer, logits = logits_of_all_positions(llm, IDS, budget)
        assert answer == expected_answer
        torch.testing.assert_close(logits, expected, rtol=0, atol=logits_tolerance(llm.engine.runner.model.config, len(logits), expected))
        worst = max(worst, float((logits - expected).abs().max()))
    return float(expected.abs().max()), worst


def test_logits_and_greedy_tokens_equal_transformers(pair, request):
    largest, worst = check_against_transformers(*pair)
    print(f"{request.node.callspec.id} ranks: largest logit {largest:.1f}, largest difference {worst:.1e}")


def test_answers_do_not_depend_on_companions(pair):
    theirs, llm = pair
    prompts = [IDS, IDS[5:6], IDS[3:20], IDS[::-1], IDS[2:10]]
    expected = [hf_greedy(theirs, ids, NUM_TOKENS) for ids in prompts]
    for budget in (64, 9): assert greedy(llm, prompts, budget) == expected


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V2"])
def test_the_engine_finds_out_how_many_blocks_a_mixture_may_have(saved, name):
    "It computes a step on a device without numbers, where no expert can be chosen."
    theirs, folder = saved(name)
    llm = LLM(folder, tokenizer=fetch(), device="cpu", block_size=4, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64)
    assert llm.engine.runner.kv_cache.shape[2] == 2 * 64 / 4
    assert greedy(llm, [IDS], 64) == [hf_greedy(theirs, IDS, NUM_TOKENS)]


@pytest.mark.parametrize("whole", [False, True])
def test_a_mixture_in_processes_of_its_own(tmp_path, whole):
    "Each of 2 processes has a copy of the one KV head, and 5 or 6 of the 11 rows of every expert; or 3 or 4 of 7 whole experts."
    theirs = make_eager("Qwen3Moe", tmp_path, **SHAPE | EXPERTS | dict(num_key_value_heads=1))
    llm = make_llm(tmp_path, 2, enable_expert_parallel=whole)
    assert greedy(llm, [IDS], 7) == [hf_greedy(theirs, IDS, NUM_TOKENS)]
    llm.engine.runner.group.close()


def test_the_window_is_what_the_config_says(saved):
    "The texts above are longer than it, and it makes a difference."
    theirs, folder = saved("Mistral with a window")
    plain = saved("Mistral")[0]
    assert ModelConfig.from_folder(folder).sliding_window == WINDOW
    assert ModelConfig.from_folder(saved("Mistral")[1]).sliding_window is None
    with torch.inference_mode(): a, b = (m(torch.tensor([IDS])).logits[0] for m in (theirs, plain))
    differ, tolerance = (a - b).abs().amax(-1), logits_tolerance(ModelConfig.from_folder(folder), len(IDS), a)
    assert differ[:WINDOW].max() < tolerance and differ[WINDOW:].min() > 10 * tolerance  # the same weights


@pytest.mark.parametrize("size", SIZES)
def test_whole_experts_on_each_rank_give_the_same_logits(saved, size):
    theirs, folder = saved("Qwen3-MoE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAUNCHERS, "processes", start_threads)
        llm = make_llm(folder, size, enable_expert_parallel=True)
    check_against_transformers(theirs, llm)
    layer = llm.engine.runner.model.model.layers[0].mlp.experts
    assert isinstance(layer, WholeExperts) and layer.gate_up_proj.shape == (7 // size, 22, llm.engine.runner.model.config.hidden_size)
    if size > 1: llm.engine.runner.group.close()


def test_whole_experts_need_experts(saved, caplog):
    log_once.cache_clear()
    assert len(make_llm(saved("Llama")[1], enable_expert_parallel=True).generate("a", use_tqdm=False)) == 1     # vLLM refuses it
    assert "enable_expert_parallel has no effect here" in caplog.text
    with pytest.raises(ValueError, match="enable_expert_parallel must be bool"): make_llm(saved("Llama")[1], enable_expert_parallel="yes")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 4), st.data())
def test_parts_of_whole_experts_add_up(num_tokens, num_experts, num_ranks, data):
    "Also where a rank's experts are chosen by nobody, and for any way to share them."
    num_ranks, top_k = min(num_ranks, num_experts), data.draw(st.integers(1, num_experts))
    whole = random_layer(Experts, 8, 6, num_experts, TensorParallelGroup())
    rng = torch.Generator().manual_seed(num_tokens)
    x, favourites = torch.randn(num_tokens, 8, generator=rng), torch.randn(num_experts, generator=rng) * 5
    chosen, weights = route(torch.randn(num_tokens, num_experts, generator=rng) + favourites, top_k, True)
    values, total = whole.weight_shards("e"), 0
    for rank in range(num_ranks):
        part = WholeExperts(8, 6, num_experts, TensorParallelGroup(rank, num_ranks))
        shards = part.weight_shards("e")
        assert shards.keys() == values.keys() and sum(s.parameter.numel() > 0 for s in shards.values()) == 3 * len(part.down_proj)
        for name, shard in shards.items(): shard.parameter.copy_(values[name].parameter[shard.index])
        total = total + part(x, chosen, weights)
    wanted = whole(x, chosen, weights)
    tolerance = rounding_tolerance(8 + 6 + top_k, float(wanted.abs().max()) + 1)
    torch.testing.assert_close(total, wanted, rtol=0, atol=tolerance)


# ---- mixtures of experts

def one_by_one(experts, x, chosen, weights):
    "Each token to each of its experts, in float64."
    out, gate_up, down = torch.zeros(x.shape, dtype=torch.float64), experts.gate_up_proj.double(), experts.down_proj.double()
    for t in range(len(x)):
        for e, w in zip(chosen[t].tolist(), weights[t].double()):
            out[t] += w * (down[e] @ silu_and_mul(gate_up[e] @ x[t].double()))
    return out


def random_layer(kind, *args, seed=0, **kwargs):
    layer, rng = kind(*args, **kwargs), torch.Generator().manual_seed(seed)
    for p in layer.parameters(): p.normal_(0, 0.3, generator=rng)
    return layer


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_grouped_experts_equal_one_by_one(num_tokens, num_experts, data):
    top_k, only = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, num_experts))
    hidden, inner = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layer = random_layer(Experts, hidden, inner, num_experts, TensorParallelGroup(), seed=data.draw(st.integers(0, 9)))
    scores = torch.randn(num_tokens, num_experts, generator=rng)
    scores[:, :only] += 9  # skewed: some experts stay without a row
    x = torch.randn(num_tokens, hidden, generator=rng)
    chosen, weights = route(scores, top_k, True)
    before = x.clone(), chosen.clone(), weights.clone()
    torch.testing.assert_close(layer(x, chosen, weights).double(), one_by_one(layer, x, chosen, weights), atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, (x, chosen, weights), before))  # law 7


def test_a_group_without_rows_costs_nothing(monkeypatch):
    weight = torch.randn(4, 3, 2)
    weight[[0, 2]] = torch.nan
    x = torch.randn(5, 2)
    out = grouped_linear(x, weight, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(out, torch.cat((x[:2] @ weight[1].T, x[2:] @ weight[3].T)))
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: rows.append(len(x)) or linear(x, w))
    grouped_linear(x, weight, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert rows == [2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inner", [32, 11])
def test_experts_on_a_gpu(dtype, inner):
    layer, x = random_layer(Experts, 64, inner, 8, TensorParallelGroup()), torch.randn(50, 64)
    chosen, weights = route(torch.randn(50, 8), 3, True)
    low = layer.to("cuda", dtype)
    out = low(x.to("cuda", dtype), chosen.cuda(), weights.to("cuda", dtype)).cpu().double()
    expected = one_by_one(layer.cpu(), x.to(dtype), chosen, weights.to(dtype))
    bound = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}[dtype]
    assert (out - expected).abs().max() < bound * expected.abs().max()


def test_route_works_in_float32():
    scores = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen, weights = route(scores, 8, True)
    exact = scores.double().softmax(-1).topk(8)
    assert weights.dtype == torch.bfloat16
    error = weights.double() / (exact.values / exact.values.sum(-1, keepdim=True)) - 1
    assert error.abs().max() <= 2**-8  # one rounding, at the end
    raw = route(scores, 8, False)[1].double()
    assert (raw / exact.values - 1).abs().max() <= 2**-8


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_sum_to_the_whole_and_their_shards_cover_it(size):
    "Also where there are more ranks than rows."
    c, numbers = SimpleNamespace(hidden_size=12), dict(num_experts=5, top_k=2, intermediate_size=4, normalise=True)
    whole, x = random_layer(MoE, c, TensorParallelGroup(), **numbers), torch.randn(9, 12)
    tensors = {n: s.parameter.clone() for n, s in weight_shards(whole).items()}
    seen, total = {n: torch.zeros_like(t) for n, t in tensors.items()}, 0
    for rank in range(size):
        part = MoE(c, TensorParallelGroup(rank, size), **numbers)
        for n, shard in weight_shards(part).items():
            assert shard.shape == tensors[n].shape
            shard.parameter.copy_(tensors[n][shard.index])
            seen[n][shard.index] += 1
        total = total + part(x)
    torch.testing.assert_close(total, whole(x), atol=1e-5, rtol=1e-5)
    for n, count in seen.items(): assert torch.equal(count, torch.full_like(count, size if n.startswith("gate") else 1))


@pytest.mark.parametrize("changes, words", [
    (dict(decoder_sparse_step=2), "decoder_sparse_step is 2, supported: 1"),
    (dict(mlp_only_layers=[1]), r"mlp_only_layers is \[1\]"),
    (dict(num_experts_per_tok=8), "num_experts_per_tok is 8, supported: 1 to num_experts, 7"),
    (dict(num_experts_per_tok=0), "num_experts_per_tok is 0"),
    (dict(moe_intermediate_size=0), "moe_intermediate_size is 0"),
    (dict(use_sliding_window=True, sliding_window=8), "use_sliding_window"),
])
def test_mixtures_refused_by_name(changes, words, saved, tmp_path):
    config = json.loads((saved("Qwen3-MoE")[1]/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=words): ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.layers.1.mlp.experts.6.up_proj.weight"), r"1 tensors are missing: model\.layers\.1\.mlp\.experts\.6\.up"),
    (lambda t: t.pop("model.layers.0.mlp.gate.weight"), r"missing: model\.layers\.0\.mlp\.gate\.weight"),
    (lambda t: t.update({"model.layers.0.mlp.experts.7.up_proj.weight": torch.zeros(11, 48)}), r"surplus: .*experts\.7\.up_proj"),
    (lambda t: t.update({"model.layers.0.mlp.experts.2.down_proj.weight": torch.zeros(11, 48)}), r"experts\.2\.down_proj.*\[11, 48\], expected \[48, 11\]"),
], ids=["no expert", "no router", "an expert too many", "wrong shape"])
def test_experts_that_do_not_fit_are_named(change, words, saved, tmp_path):
    folder = saved("Qwen3-MoE")[1]
    tensors = load_file(folder/"model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path/"model.safetensors")
    (tmp_path/"config.json").write_text((folder/"config.json").read_text())
    with pytest.raises(ValueError, match=words): make_llm(tmp_path)
