"""Greedy answers of the engine, against transformers' `generate`: token for token, however the work is cut up.

greedy_reference.py wrote the reference, data/greedy_reference.json; the first tests check it against transformers as installed here."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_idle
from greedy_reference import NUM_TOKENS, hf_greedy
from nano_vllm import LLM, SamplingParams

DATA = Path(__file__).parent/"data"
PROMPTS = json.loads((DATA/"prompts.json").read_text())
REFERENCE = json.loads((DATA/"greedy_reference.json").read_text())
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
# in which an engine that cuts the work differently says the same: one token and some hundred, a common beginning, many scripts
FEW, FEW_TOKENS = [1, 3, 9, 11, 12, 16, 21, 23, 24, 26, 27], 24
NEAR_TIE = 1e-3  # logits that differ by less are as good as equal: rounding decides


def make_llm(block_size=16, num_tokens=8192, **options):
    "An engine whose pool has room for `num_tokens` tokens."
    return LLM("smollm2-135m", dtype="float32", device="cpu", max_model_len=2048, block_size=block_size,
               num_kv_blocks=num_tokens // block_size, **options)


@torch.inference_mode()
def shortfalls(model, prompt_ids, token_ids):
    "For each of `token_ids`, given all before it: (the best logit, its own logit, the best token) by transformers."
    logits = model(torch.tensor([prompt_ids + token_ids]), logits_to_keep=len(token_ids) + 1).logits[0, :-1]
    best, own = logits.max(-1), logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return list(zip(best.values.tolist(), own.tolist(), best.indices.tolist()))


def unexcused(model, i, token_ids):
    "Places where the answer `token_ids` to prompt i is not greedy; a near-tie is printed and excused."
    wrong = []
    for at, (best, own, token) in enumerate(shortfalls(model, REFERENCE[i]["prompt_token_ids"], token_ids)):
        if token == token_ids[at]: continue
        print(f"prompt {i}, token {at}: chose {token_ids[at]} with logit {own:.6f}, transformers {token} with {best:.6f}")
        if best - own >= NEAR_TIE: wrong.append((i, at))
    return wrong


def check(outs, hf, indices=range(len(PROMPTS)), num_tokens=NUM_TOKENS):
    "Each answer is the reference's, or differs by near-ties only."
    assert len(outs) == len(indices)
    for i, out in zip(indices, outs):
        token_ids = out["token_ids"]
        assert out.prompt_token_ids == REFERENCE[i]["prompt_token_ids"] and len(token_ids) == num_tokens
        if token_ids != REFERENCE[i]["token_ids"][:num_tokens]: assert unexcused(hf[0], i, token_ids) == []


def test_prompts_are_what_they_should_be():
    lengths = [len(r["prompt_token_ids"]) for r in REFERENCE]
    assert len(PROMPTS) == len(REFERENCE) == len(set(PROMPTS)) == 32
    assert min(lengths) == 1 and max(lengths) == 1500 and sum(lengths) > 4000
    shared = [b for a in PROMPTS for b in PROMPTS if a != b and b[:200] == a[:200] and len(b) > 200]
    assert len(shared) >= 6


def test_reference_is_what_generate_gives(hf):
    for i in (0, 3, 23):
        assert hf[1].encode(PROMPTS[i]) == REFERENCE[i]["prompt_token_ids"]
        token_ids = hf_greedy(hf[0], REFERENCE[i]["prompt_token_ids"], 16)
        if token_ids != REFERENCE[i]["token_ids"][:16]: assert unexcused(hf[0], i, token_ids) == []


def test_reference_is_greedy_token_by_token(hf):
    "Every fourth; that the engine, which knows nothing of the reference, says all of it is the test of the others."
    for i, r in enumerate(REFERENCE):
        assert hf[1].encode(PROMPTS[i]) == r["prompt_token_ids"] and len(r["token_ids"]) == NUM_TOKENS
        if i % 4 == 2: assert unexcused(hf[0], i, r["token_ids"]) == []


def test_the_excuse_is_narrow(hf):
    for place in (0, 31, 63):
        token_ids = list(REFERENCE[5]["token_ids"])
        token_ids[place] = 1234
        assert (5, place) in unexcused(hf[0], 5, token_ids)


def test_all_in_one_batch(smol, hf):
    outs = smol.generate(PROMPTS, GREEDY, use_tqdm=False)
    check(outs, hf)
    for out in outs:
        assert out["text"] == hf[1].decode(out["token_ids"], skip_special_tokens=True)
        assert out["finish_reason"] == "length" and out.finished
    assert sum(out.num_cached_tokens for out in outs) > 500  # the shared prefixes were shared
    assert_idle(smol)


def test_the_same_again_from_the_cache(smol, hf):
    outs = smol.generate(PROMPTS, replace(GREEDY, max_tokens=8), use_tqdm=False)
    check(outs, hf, num_tokens=8)
    for out in outs: assert out.num_cached_tokens == (len(out.prompt_token_ids) - 1) // 16 * 16
    assert_idle(smol)


def test_answers_that_end_by_themselves(smol, hf):
    indices = [i for i, r in enumerate(REFERENCE) if 2 in r["token_ids"]]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    assert len(indices) >= 3
    for i, out in zip(indices, smol.generate([PROMPTS[i] for i in indices], params, use_tqdm=False)):
        whole = REFERENCE[i]["token_ids"]
        expected = whole[:whole.index(2) + 1]  # generate, too, keeps the token that ends the text
        if out["token_ids"] != expected: assert unexcused(hf[0], i, out["token_ids"]) == [] and out["token_ids"][-1] == 2
        assert out["finish_reason"] == "stop" and out["stop_reason"] is None and "<|im_end|>" not in out["text"]
    ids, whole = REFERENCE[4]["prompt_token_ids"], REFERENCE[4]["token_ids"]
    assert hf_greedy(hf[0], ids, eos=2) == whole[:whole.index(2) + 1] != whole
    assert_idle(smol)


@pytest.mark.ci
@pytest.mark.parametrize("options", [
    dict(max_num_batched_tokens=16), dict(max_num_batched_tokens=64), dict(block_size=1), dict(block_size=8),
    dict(block_size=64), dict(enable_prefix_caching=False), dict(async_scheduling=True), dict(ops="torch")],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
def test_the_same_with(options, hf):
    llm = make_llm(**options)
    outs = llm.generate([PROMPTS[i] for i in FEW], replace(GREEDY, max_tokens=FEW_TOKENS), use_tqdm=False)
    check(outs, hf, FEW, FEW_TOKENS)
    assert llm.engine.scheduler.num_preemptions == 0
    if not options.get("enable_prefix_caching", True): assert not any(out.num_cached_tokens for out in outs)
    assert_idle(llm)


@pytest.mark.ci
def test_the_same_after_preemptions(hf):
    llm = make_llm(num_tokens=448)  # the longest needs 422 of them
    check(llm.generate([PROMPTS[i] for i in FEW], GREEDY, use_tqdm=False), hf, FEW)
    print(f"{llm.engine.scheduler.num_preemptions} preemptions")
    assert llm.engine.scheduler.num_preemptions > 0
    assert_idle(llm)


def test_the_same_with_everything_scarce(hf):
    "Few residents, small steps, small blocks, few of them, and the long prompts first."
    llm = make_llm(block_size=4, num_tokens=384, max_num_seqs=4, max_num_batched_tokens=24)
    indices = [26, 27, *range(4, 16, 2)]
    outs = llm.generate([PROMPTS[i] for i in indices], replace(GREEDY, max_tokens=24), use_tqdm=False)
    check(outs, hf, indices, num_tokens=24)
    assert llm.engine.scheduler.num_preemptions > 0
    assert_idle(llm)


@pytest.mark.ci
def test_each_prompt_alone(hf):
    llm = make_llm(num_tokens=1600, enable_prefix_caching=False)
    lengths = [len(r["prompt_token_ids"]) for r in REFERENCE]
    for i in {*range(2, 32, 8), lengths.index(1), lengths.index(1500)}:
        check(llm.generate(PROMPTS[i], replace(GREEDY, max_tokens=FEW_TOKENS), use_tqdm=False), hf, [i], FEW_TOKENS)
    assert_idle(llm)
