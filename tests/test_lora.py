"""LoRA: each request is computed as peft's merged model would, whoever shares its batch; slots, salts, and what is refused."""
import gc
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from fuzz import Workload, plant, run_workload
from helpers import assert_idle, logits_tolerance, rounding_tolerance, tiny_folder
from nano_vllm import LLM, LoRARequest, SamplingParams, cpu_kernels, lora
from nano_vllm.attention import make_batch
from nano_vllm.cpu_kernels import PlainProduct
from nano_vllm.cpu_products import best_linear
from nano_vllm.cuda_graphs import DecodeGraphs
from nano_vllm.kv_blocks import ScheduledSequence, SchedulerOutput, Sequence
from nano_vllm.layers import Linear
from nano_vllm.scheduler import Scheduler
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMITS = dict(device="cpu", max_model_len=128, num_kv_blocks=64, block_size=4)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [300, 5, 6], [17] * 13, [1, 2], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
needs_kernels = pytest.mark.skipif(not cpu_kernels.can_build(), reason="no g++ or no vectors here")


def hf_model(folder): return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_adapter(base, folder, seed=0, **settings):
    "An adapter that peft made for the model in `base`, with random A and B."
    torch.manual_seed(seed)
    config = peft.LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False) | settings)
    peft.get_peft_model(hf_model(base), config).save_pretrained(folder)
    return folder


def merged_logits(base, adapter, ids):
    "Logits of peft's merged model for all positions of `ids`."
    model = hf_model(base)
    if adapter: model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.inference_mode(): return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory): return tiny_folder(tmp_path_factory.mktemp("base"))


KINDS = [dict(), dict(target_modules=ALL, r=8), dict(target_modules=["k_proj", "o_proj", "down_proj"], r=3),
         dict(target_modules=ALL, r=4, use_rslora=True, rank_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 7})]


@pytest.fixture(scope="module")
def requests(base, tmp_path_factory):
    "Four adapters of different kinds for the tiny model."
    folder = tmp_path_factory.mktemp("adapters")
    return [LoRARequest(f"a{i}", i + 1, str(make_adapter(base, folder/f"a{i}", i, **kind))) for i, kind in enumerate(KINDS)]


def tokens(outs): return [list(o["token_ids"]) for o in outs]


def all_logits(llm, request, ids, pieces):
    "Logits of all positions of `ids`, as they come with `pieces` tokens in each step."
    runner = llm.engine.runner
    adapter = request and runner.adapters.get(request)
    seq = Sequence("a", ids, SamplingParams(), block_table=list(range(9, 0, -1)), adapter=adapter)
    found, start = [], 0
    for n in pieces:
        scheduled = [ScheduledSequence(seq, start, n, samples=True)]
        batch = make_batch(scheduled, 4)
        batch.adapters = runner.adapters.plan(scheduled)
        with runner.group.collective_guard():
            runner.group.broadcast(batch)
            found.append(runner.compute(batch))
        start += n
    return torch.cat(found), np.cumsum(pieces) - 1


@pytest.mark.parametrize("ops", ["torch", "auto"])
def test_logits_equal_pefts_merged_model(base, requests, ops):
    llm = LLM(base, ops=ops, enable_lora=True, max_loras=2, **LIMITS)
    ids = [(7 * i + i * i) % 900 for i in range(16)]
    for request in [None, *requests]:
        expected = merged_logits(base, request and request.lora_path, ids)
        allowed = logits_tolerance(llm.engine.runner.model.config, len(ids), expected)
        got, where = all_logits(llm, request, ids, (5, 7, 1, 1, 2))
        assert allowed <= 1e-4
        torch.testing.assert_close(got, expected[where], atol=allowed, rtol=0)
    plain = merged_logits(base, None, ids)
    assert all((merged_logits(base, r.lora_path, ids) - plain).abs().max() > 0.1 for r in requests)   # they do something


SEEDED = SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)
KINDS_OF_ENGINE = [dict(), dict(ops="torch"), dict(dtype="bfloat16"), dict(quantization="int8")]


@pytest.fixture(scope="module")
def alone(base, requests):
    "What each request says alone, without an adapter and with each: greedy, then seeded; for several kinds of engines."
    found = {}
    for kind in KINDS_OF_ENGINE:
        llm = LLM(base, **LIMITS, enable_lora=True, **kind)
        found[str(kind)] = [[llm.generate(prompt, params, use_tqdm=False, lora_request=r)[0]["token_ids"] for prompt, r in zip(PROMPTS, [None, *requests])]
                            for params in (GREEDY, SEEDED)]
    return found


@pytest.fixture(scope="module")
def solo(alone): return alone["{}"][0]


@pytest.mark.parametrize("options", [dict(), dict(max_num_batched_tokens=7), dict(num_kv_blocks=14), dict(async_scheduling=True), *KINDS_OF_ENGINE[1:]],
                         ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()) or "as it is")
def test_a_batch_of_four_adapters_and_the_base_gives_each_its_solo_tokens(base, requests, alone, options):
    llm = LLM(base, **{**LIMITS, **options}, enable_lora=True, max_loras=4)
    for params, expected in zip((GREEDY, SEEDED), alone[str(options if options in KINDS_OF_ENGINE else {})]):
        assert tokens(llm.generate(PROMPTS, params, use_tqdm=False, lora_request=[None, *requests])) == expected
        assert len(set(map(tuple, expected))) == 5
        assert_idle(llm)


def test_tokens_equal_those_of_pefts_merged_model(base, requests):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=4)
    outs = llm.generate(PROMPTS[1:], GREEDY, use_tqdm=False, lora_request=requests)
    for prompt, request, out in zip(PROMPTS[1:], requests, outs):
        theirs = peft.PeftModel.from_pretrained(hf_model(base), request.lora_path).merge_and_unload()
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out["token_ids"] == ids[0, len(prompt):].tolist()


def test_ranks_cut_adapters_as_they_cut_the_model(base, requests, tmp_path):
    "Also an adapter that is loaded and one that gives way while both ranks compute."
    folder = tiny_folder(tmp_path/"two", num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    mine = [LoRARequest(f"b{i}", i + 1, str(make_adapter(folder, tmp_path/f"b{i}", i, **kind))) for i, kind in enumerate(KINDS)]
    ids = [(7 * i + i * i) % 900 for i in range(12)]
    llm = LLM(folder, tensor_parallel_size=2, enable_lora=True, **LIMITS)
    for request in [*mine, mine[0]]:
        expected = merged_logits(folder, request.lora_path, ids)
        got, where = all_logits(llm, request, ids, (5, 6, 1))
        torch.testing.assert_close(got, expected[where], atol=logits_tolerance(llm.engine.runner.model.config, 12, expected), rtol=0)
    whole = LLM(folder, enable_lora=True, max_loras=4, **LIMITS)
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=[None, *mine])) == tokens(
        whole.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=[None, *mine]))
    llm.engine.runner.group.close()


# ---- the products, one by one

def case(num_rows, inputs, outputs, ranks, seed=0, parts=1, dtype=torch.float32):
    "A layer of random weights with an adapter of each rank in `ranks`, in `parts` parts; slots for its rows; and what a loop gives, in float64."
    rng = torch.Generator().manual_seed(seed)
    layer = Linear(inputs, outputs)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=rng))
    weights = lora.LoRAWeights(layer, len(ranks), -(-max(ranks) * parts // 8) * 8, dtype=dtype)
    adapters, size = [], outputs // parts
    for slot, rank in enumerate(ranks):
        weights.a[slot].fill_(7)           # what an adapter before it may have left
        weights.clear(slot)
        delta = torch.zeros(outputs, inputs, dtype=torch.float64)
        for part in range(parts if rank else 0):
            a, b = torch.randn(rank, inputs, generator=rng).to(dtype), torch.randn(size, rank, generator=rng).to(dtype)
            weights.add(slot, a, b, part * size)
            delta[part * size:(part + 1) * size] = b.double() @ a.double()
        adapters.append(delta)
    x = torch.randn(num_rows, inputs, generator=rng).to(dtype)
    slots = np.random.default_rng(seed).integers(-1, len(ranks), num_rows)
    added = torch.stack([adapters[s] @ row if s >= 0 else torch.zeros(outputs, dtype=torch.float64) for s, row in zip(slots, x.double())])
    return layer, weights, x, slots, added


SHAPES = [(1, 16, 16, [4]), (16, 32, 48, [4, 1, 3]), (7, 48, 96, [8, 0, 16, 5], 3, 3), (40, 64, 32, [2, 2], 1, 2), (300, 16, 64, [4, 4, 4, 4], 2)]


@pytest.mark.parametrize("kind", ["grouped", pytest.param("kernel", marks=needs_kernels)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_a_loop_over_rows(kind, shape):
    "All rows at once, and in pieces, as an MLP may have them."
    layer, weights, x, slots, added = case(*shape)
    tokens = lora.AdapterTokens(3, len(weights.ranks), "cpu")
    if kind == "kernel": product = lora.TiledLoRAProduct(best_linear(layer.weight), weights, tokens, 2)
    else: product = lora.LoRAProduct(PlainProduct(layer.weight), weights, tokens, 2)
    bias, before = torch.randn(len(layer.weight)), x.clone()
    expected = x.double() @ layer.weight.double().T + bias + added
    allowed = rounding_tolerance(2 * x.shape[1] + 2 * weights.a.shape[1], float(expected.abs().max()))
    for size in (len(x), 5, 1):
        for _ in range(2):
            tokens.begin(slots)
            got = torch.cat([product(piece, bias) for piece in x.split(size)])
            torch.testing.assert_close(got.double(), expected, atol=allowed, rtol=0)
    tokens.begin(lora.NO_SLOTS)
    torch.testing.assert_close(product(x, bias).double(), expected - added, atol=allowed, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernels_equal_a_loop_over_rows(shape, dtype):
    layer, weights, x, slots, added = case(*shape, **{} if len(shape) > 4 else dict(seed=0), dtype=dtype)
    if not (slots >= 0).any(): slots[0] = 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = slots.argsort(kind="stable")[(slots < 0).sum():]
    piece = lora.make_piece(order, slots[order], len(weights.ranks), device)
    rank = max(1, int(weights.ranks[piece.slots].max()))
    y = torch.randn(len(x), len(layer.weight)).to(dtype)
    a, b = weights.a[:, :rank].to(device), weights.b[:, :rank].to(device)
    got = lora.add_with_triton(y.clone().to(device), x.to(device), piece, a, b).cpu()
    moved = torch.zeros(len(x), dtype=torch.bool)
    moved[order] = True
    added = torch.where(moved[:, None], added, 0)
    expected = y.double() + added
    allowed = rounding_tolerance(2 * x.shape[1], float(expected.abs().max())) + torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, atol=allowed, rtol=0)
    assert torch.equal(got[~moved], y[~moved])


def test_tiles_cover_each_row_once_and_never_two_slots():
    slots = np.repeat([0, 2, 3], [1, 33, 16])
    piece = lora.make_piece(np.arange(50), slots, 5, "cpu")
    covered = [i for slot, first, end in piece.tiles.tolist() for i in range(first, end) if slots[i] == slot]
    assert covered == list(range(50)) and max(end - first for _, first, end in piece.tiles.tolist()) == lora.TILE
    assert piece.ends.tolist() == [1, 1, 34, 50, 50]


@needs_kernels
def test_the_step_stays_one_call(base, requests, monkeypatch):
    "Layers of a model with adapters are still what the kernel of a whole step computes, and it does compute them."
    from nano_vllm import cpu_steps
    calls, run = [], cpu_steps.LayerTable.run
    monkeypatch.setattr(cpu_steps.LayerTable, "run", lambda self, *args: calls.append(1) or run(self, *args))
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=4)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=[None, *requests])
    assert len(calls) >= 10


def test_recorded_steps_are_those_without_adapters():
    seq = Sequence("a", [1], SamplingParams())
    graphs = SimpleNamespace(input_batch=SimpleNamespace(row_of={seq: 0}), has_room=lambda lens: True)
    step = SchedulerOutput((ScheduledSequence(seq, 0, 1, True),))
    assert DecodeGraphs.fits(graphs, step)
    seq.adapter = "pirate"
    assert not DecodeGraphs.fits(graphs, step)


def test_without_lora_nothing_is_different(base):
    llm = LLM(base, **LIMITS)
    assert llm.engine.runner.adapters is None
    assert not any(isinstance(m.product, (lora.LoRAProduct, lora.TiledLoRAProduct)) for m in llm.engine.runner.model.modules() if isinstance(m, Linear))


# ---- slots, salts, and the life of an adapter

def test_more_adapters_than_slots_take_turns(base, requests, solo, monkeypatch):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=2)
    seen, plan = [], lora.Adapters.plan
    def noted(self, scheduled):
        seen.append({s.seq.adapter for s in scheduled} - {None})
        return plan(self, scheduled)
    monkeypatch.setattr(lora.Adapters, "plan", noted)
    wanted = [None, *requests] * 3
    prompts = PROMPTS * 3
    outs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=wanted)
    assert tokens(outs) == solo * 3
    assert max(map(len, seen)) == 2
    assert_idle(llm)
    assert not llm.engine.scheduler.adapters


def test_the_adapter_used_least_recently_gives_way(base, requests):
    adapters = LLM(base, **LIMITS, enable_lora=True, max_loras=2).engine.runner.adapters
    found = [adapters.get(r) for r in requests]
    def step(*numbers):
        seqs = [Sequence("a", [1], SamplingParams(), adapter=found[i]) for i in numbers]
        plan = adapters.plan([ScheduledSequence(seq, 0, 1, True) for seq in seqs])
        return [found.index(adapter) for _, adapter in plan.loads]
    assert step(0, 1) == [0, 1] and step(0) == [] and step(2) == [2] and step(0) == [] and step(1) == [1]
    assert step(2, 1) == [2] and adapters.plan([]) is None
    assert step(2, 0) == [0] and step(2, 0) == []      # 2 was used longest ago, but is wanted


def test_an_adapter_without_slot_and_request_is_let_go(base, requests):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=1)
    for request in requests: llm.generate(PROMPTS[0], GREEDY, use_tqdm=False, lora_request=request)
    gc.collect()
    assert list(llm.engine.runner.adapters.known) == [requests[-1]]


def test_cached_blocks_are_of_one_adapter(base, requests):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=4)
    prompt, first = list(range(40, 60)), [None, requests[0], requests[1]]
    uncached = LLM(base, **LIMITS, enable_lora=True, enable_prefix_caching=False)
    expected = [uncached.generate(prompt, GREEDY, use_tqdm=False, lora_request=r)[0]["token_ids"] for r in first]
    for cached in (0, 16):
        for request, ids in zip(first, expected):
            out, = llm.generate(prompt, GREEDY, use_tqdm=False, lora_request=request)
            assert out.num_cached_tokens == cached and out["token_ids"] == ids


def test_an_adapter_is_loaded_while_others_run(base, requests, solo):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=2)
    stream = llm.stream(PROMPTS[1], GREEDY, lora_request=requests[0])
    got = list(next(stream)["token_ids"])
    assert tokens(llm.generate(PROMPTS[2:4], GREEDY, use_tqdm=False, lora_request=requests[1:3])) == solo[2:4]
    for piece in stream: got += piece["token_ids"]
    assert got == solo[1]
    assert_idle(llm)


@pytest.mark.parametrize("where", ["load", "plan", "begin"])
def test_an_interrupted_step_is_made_good(base, requests, solo, where, monkeypatch):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=2)
    calls, function = [], getattr(lora.Adapters, where)
    def fails_once(self, *args):
        calls.append(1)
        result = function(self, *args) if where == "plan" else None
        if len(calls) == 2: raise KeyboardInterrupt
        return result if where == "plan" else function(self, *args)
    monkeypatch.setattr(lora.Adapters, where, fails_once)
    made = llm.engine.input_processor.make_requests(PROMPTS, GREEDY, lora_request=[None, *requests])
    for request in made: llm.engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        while True: llm.engine.step()
    while llm.engine.requests: llm.engine.step()
    assert [r.output()["token_ids"] for r in made] == solo
    assert_idle(llm)


def test_an_aborted_request_gives_its_slot_back(base, requests, solo):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=1)
    stream = llm.stream(PROMPTS[1], GREEDY, lora_request=requests[0])
    next(stream)
    stream.close()
    assert not llm.engine.scheduler.adapters
    assert tokens(llm.generate(PROMPTS[2], GREEDY, use_tqdm=False, lora_request=requests[1])) == solo[2:3]


def test_chat_and_stream_take_one_or_a_list(base, requests):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=2)
    talk = [{"role": "user", "content": "Hi"}]
    one, = llm.chat(talk, GREEDY, use_tqdm=False, lora_request=requests[0])
    two = llm.chat([talk, talk], GREEDY, use_tqdm=False, lora_request=[requests[0], None])
    assert one["token_ids"] == two[0]["token_ids"] != two[1]["token_ids"]
    pieces = [p["token_ids"] for p in llm.stream(one.prompt_token_ids, GREEDY, lora_request=requests[0])]
    assert sum(pieces, []) == one["token_ids"]


# ---- what is refused, by name, before anything is done

def edited(folder, tmp_path, config=None, tensors=None, remove=()):
    "A copy of an adapter with another config, other tensors, or without a file."
    copy = tmp_path/"edited"
    shutil.copytree(folder, copy)
    file = copy/"adapter_config.json"
    if config: file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors:
        found = load_file(copy/"adapter_model.safetensors")
        tensors(found)
        save_file(found, copy/"adapter_model.safetensors")
    for name in remove: (copy/name).unlink()
    return LoRARequest("edited", 9, copy)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
BAD = {
    "no config": (dict(remove=["adapter_config.json"]), "adapter_config.json"),
    "no weights": (dict(remove=["adapter_model.safetensors"]), "there is no adapter_model.safetensors"),
    "another kind": (dict(config=dict(peft_type="IA3")), "peft_type is 'IA3', supported: 'LORA'"),
    "dora": (dict(config=dict(use_dora=True)), "use_dora is True, which is not supported"),
    "bias": (dict(config=dict(bias="all")), "bias is 'all', supported: 'none'"),
    "no alpha": (dict(config=dict(lora_alpha=None)), "lora_alpha must be a number from -1048576 to 1048576, got None"),
    "an alpha that is no number": (dict(config=dict(lora_alpha=float("nan"))), "lora_alpha must be a number .*, got nan"),
    "an alpha beyond all floats": (dict(config=dict(lora_alpha=10**400)), "lora_alpha must be a number"),
    "a wrong shape": (dict(tensors=lambda t: t.update({Q + "A.weight": torch.zeros(4, 33)})), r"q_proj has A \(4, 33\) and B \(32, 4\), this model needs \(4, 32\) and \(32, 4\); it was made for"),
    "no rank": (dict(tensors=lambda t: t.update({Q + "A.weight": torch.zeros(0, 32), Q + "B.weight": torch.zeros(32, 0)})), r"q_proj has A \(0, 32\) and B \(32, 0\), this model needs \(1, 32\)"),
    "no matrix": (dict(tensors=lambda t: t.update({Q + "A.weight": torch.tensor(1.)})), r"q_proj.lora_A.weight has shape \[\], must be a matrix"),
    "half": (dict(tensors=lambda t: t.pop(Q + "B.weight")), "layers.0.self_attn.q_proj lacks one of lora_A, lora_B"),
    "another layer": (dict(tensors=lambda t: t.update({Q.replace("0", "7") + x: t[Q + x].clone() for x in ("A.weight", "B.weight")})), "layers.7.self_attn.q_proj is not a layer that can be adapted here"),
    "another tensor": (dict(tensors=lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})), "tensor base_model.model.lm_head.weight is of a kind that is unknown"),
    "not a number": (dict(tensors=lambda t: t[Q + "A.weight"].fill_(float("nan"))), "q_proj: some of its numbers are NaN or infinite"),
    "too large with its scale": (dict(tensors=lambda t: t[Q + "B.weight"].fill_(3e38)), "q_proj: some of its numbers are NaN or infinite in torch.float32"),
    "nothing": (dict(tensors=lambda t: t.clear()), "adapter_model.safetensors is empty"),
}


@pytest.fixture(scope="module")
def one_slot(base): return LLM(base, **LIMITS, enable_lora=True)


@pytest.mark.parametrize("edit, says", BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused_by_name_and_others_do_not_notice(one_slot, requests, solo, tmp_path, edit, says):
    llm = one_slot
    bad = edited(requests[0].lora_path, tmp_path, **edit)
    stream = llm.stream(PROMPTS[1], GREEDY, lora_request=requests[0])
    got = list(next(stream)["token_ids"])
    with pytest.raises(ValueError, match="adapter 'edited' in .*" + says): llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=bad)
    for piece in stream: got += piece["token_ids"]
    assert got == solo[1]
    assert_idle(llm)


def test_an_adapter_too_large_for_the_models_number_type_is_refused(base, requests, tmp_path):
    large = edited(requests[0].lora_path, tmp_path, tensors=lambda t: t[Q + "B.weight"].fill_(1e5))
    llm = LLM(base, **LIMITS, enable_lora=True, dtype="float16")
    with pytest.raises(ValueError, match="q_proj: some of its numbers are NaN or infinite in torch.float16"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=large)
    assert_idle(llm)


def test_unknown_adapter_wrong_base_large_rank_and_misuse_are_refused(base, requests, tmp_path):
    llm = LLM(base, **LIMITS, enable_lora=True, max_lora_rank=4)
    def refused(request, says, prompts="Hi"):
        with pytest.raises(ValueError, match=says): llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=request)
    refused(LoRARequest("pirate", 1, "/nowhere"), "adapter 'pirate' in /nowhere: there is no such folder")
    refused(requests[1], "adapter 'a1' in .* has rank 8, max_lora_rank is 4")
    other = tiny_folder(tmp_path/"other", hidden_size=64)
    refused(LoRARequest("other", 5, make_adapter(other, tmp_path/"o")), f"adapter 'other'.* made for {re.escape(str(other))}")
    refused("pirate", "lora_request must be a LoRARequest, got 'pirate'")
    refused([requests[0]], "lora_request must be one or a list of 2, one for each prompt, got a list of 1", ["Hi", "there"])
    with pytest.raises(ValueError, match="lora_request must be None without enable_lora"):
        LLM(base, **LIMITS).generate("Hi", GREEDY, use_tqdm=False, lora_request=requests[0])
    for bad, says in (("", 1, "x"), "lora_name"), ((3, 1, "x"), "lora_name"), (("a", 0, "x"), "lora_int_id"), (("a", True, "x"), "lora_int_id"), (("a", 1, 5), "lora_path"):
        with pytest.raises(ValueError, match=f"{says} must be"): LoRARequest(*bad)
    for name in "max_loras", "max_lora_rank":
        with pytest.raises(ValueError, match=f"{name} must be"): LLM(base, enable_lora=True, **{name: 0})
    assert_idle(llm)


# ---- the fuzz of the scheduler, with adapters

class AdapterWorkload(Workload):
    "Sequences with some of six adapters, of which one to three may run; KV is written for a text and an adapter."
    def __init__(self, seed):
        super().__init__(seed)
        self.scheduler.max_adapters = self.rng.randint(1, 3)
        self.names = ["a", "b", "c", "d", "e", "f"]

    def arrive(self):
        before = len(self.live)
        super().arrive()
        adapter = self.rng.choice([None, *self.names])
        for seq in self.live[before:]:
            seq.adapter = adapter
            if adapter and self.sharing: seq.cache_salt = 1 + self.names.index(adapter)

    def compute(self, scheduled):
        self.check_adapters()
        seq, size = scheduled.seq, self.pool.block_size
        super().compute(scheduled)
        written = scheduled.seq.block_table
        for p in range(scheduled.start, scheduled.end): self.owner[written[p // size] * size + p % size] = seq.adapter
        first = self.first_seen(scheduled.start)
        for p in range(first, scheduled.end):
            assert self.owner[written[p // size] * size + p % size] == seq.adapter, "KV of another adapter is read"

    @property
    def owner(self): return self.__dict__.setdefault("owners", {})

    def check_adapters(self):
        used = [seq.adapter for seq in self.scheduler.running if seq.adapter]
        assert len(set(used)) <= self.scheduler.max_adapters, "more adapters than slots"
        assert self.scheduler.adapters == {a: used.count(a) for a in set(used)}, "adapters are miscounted"

    def check_schedule(self, output, residents, preempted):
        if output.scheduled: super().check_schedule(output, residents, preempted)
        else: assert not self.live, "law 4: nobody moves"


def test_random_workloads_with_adapters():
    finished = sum(run_workload(seed, AdapterWorkload)["finished"] for seed in range(300))
    assert finished > 300


PLANTED = {
    "a slot too many": (Scheduler, "has_adapter_slot", "< self.max_adapters", "<= self.max_adapters"),
    "an adapter that stays counted": (Scheduler, "remove", "self.adapters -= Counter([seq.adapter])", "pass"),
    "an adapter that is not counted": (Scheduler, "schedule_waiting", "self.adapters[seq.adapter] += 1", "pass"),
}


@pytest.mark.parametrize("owner, name, old, new", PLANTED.values(), ids=PLANTED)
def test_the_fuzz_catches(monkeypatch, owner, name, old, new):
    plant(monkeypatch, owner, name, old, new)
    with pytest.raises(AssertionError):
        for seed in range(100): run_workload(seed, AdapterWorkload)


def test_the_fuzz_catches_a_shared_cache(monkeypatch):
    arrive = AdapterWorkload.arrive
    def unsalted(self):
        before = len(self.live)
        arrive(self)
        for seq in self.live[before:]: seq.cache_salt = 0 if self.sharing else seq.cache_salt
    monkeypatch.setattr(AdapterWorkload, "arrive", unsalted)
    with pytest.raises(AssertionError, match="KV of another adapter"):
        for seed in range(100): run_workload(seed, AdapterWorkload)


def test_the_engine_salts_by_adapter(base, requests):
    llm = LLM(base, **LIMITS, enable_lora=True, max_loras=4)
    made = llm.engine.input_processor.make_requests([[1, 2]] * 6, GREEDY, lora_request=[None, *requests, requests[0]])
    salts = [r.completions[0].seq.cache_salt for r in made]
    assert salts[0] == 0 and len(set(salts[:5])) == 5 and salts[5] == salts[1]


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_batch_invariance_a_request_gets_its_bits_whoever_brings_which_adapter(base, requests, dtype):
    "The base and four adapters of different ranks: alone, together, in chunks."
    options = dict(LIMITS, dtype=dtype, batch_invariant=True, enable_prefix_caching=False, enable_lora=True, max_loras=4)
    params, wanted = SamplingParams(seed=3, max_tokens=8, ignore_eos=True, logprobs=0), [None, *requests]
    def told(llm, which):
        outs = llm.generate([PROMPTS[i] for i in which], params, use_tqdm=False, lora_request=[wanted[i] for i in which])
        return [(o["token_ids"], str(o["logprobs"])) for o in outs]
    llm = LLM(base, **options)
    alone = [told(llm, [i])[0] for i in range(5)]
    assert told(llm, range(5)) == alone == told(LLM(base, max_num_batched_tokens=6, **options), range(5))
