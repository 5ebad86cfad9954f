"""The benchmark: its workloads are what they say, and its figures follow from the work and the clock."""
import json
import math

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer, models, pre_tokenizers

from helpers import assert_idle
from nano_vllm import benchmark
from nano_vllm.benchmark import measure, peak_memory, random_workload, throughput
from nano_vllm.cli import main
from nano_vllm.llm import LLM

VOCAB = 61
VLLM_KEYS = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A random model of two layers, with a tokenizer of one word for each token."
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=640, eos_token_id=0, bos_token_id=1)).save_pretrained(path)
    raw = RawTokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w0").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder): return LLM(folder, num_kv_blocks=400)


def answer(work): return [[0] * p.max_tokens for p in work.params]


# ---- the work

def test_lengths_and_tokens_are_within_their_ranges():
    work = random_workload(500, (3, 9), (2, 5), VOCAB, seed=3)
    assert {len(p) for p in work.prompts} == set(range(3, 10))
    assert {p.max_tokens for p in work.params} == set(range(2, 6))
    assert {t for p in work.prompts for t in p} == set(range(VOCAB))
    assert all(p.ignore_eos and p.temperature == 0.6 and p.n == 1 and not p.stop for p in work.params)
    assert work.num_prompt_tokens == sum(len(p) for p in work.prompts)
    assert work.num_output_tokens == sum(p.max_tokens for p in work.params)


def test_lengths_are_uniform():
    work = random_workload(4000, (1, 4), (1, 4), VOCAB)
    for lens in ([len(p) for p in work.prompts], [p.max_tokens for p in work.params]):
        counts = [lens.count(n) for n in range(1, 5)]
        assert sum((c - 1000)**2 / 1000 for c in counts) < 25      # chi-square, 3 degrees of freedom: p < 1e-4


def test_a_seed_gives_the_same_work_and_another_seed_another():
    works = [random_workload(20, (3, 9), (2, 5), VOCAB, seed=s) for s in (1, 1, 2)]
    assert works[0] == works[1] and works[0].prompts != works[2].prompts
    assert random_workload(2, (3, 3), (2, 2), VOCAB, temperature=0).params[0].temperature == 0


@pytest.mark.parametrize("lens", [(0, 4), (5, 4), (-3, -1)])
@pytest.mark.parametrize("name", ["prompt_lens", "output_lens"])
def test_an_impossible_range_is_refused_by_name(name, lens):
    with pytest.raises(ValueError, match=name):
        random_workload(1, **dict(prompt_lens=(1, 2), output_lens=(1, 2)) | {name: lens}, vocab_size=VOCAB)


# ---- the figures

def test_figures_follow_from_the_work_and_the_clock(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    work = random_workload(6, (3, 9), (2, 5), VOCAB)
    result = measure(answer, work)
    total = work.num_prompt_tokens + work.num_output_tokens
    assert result.pop("peak_memory") > 0
    assert result == dict(elapsed_time=4.0, num_requests=6, total_num_tokens=total, requests_per_second=1.5,
                          tokens_per_second=total/4, output_tokens_per_second=work.num_output_tokens/4)


@pytest.mark.parametrize("cheat", [lambda ids: ids[1:], lambda ids: ids + [0]])
def test_work_that_was_not_done_is_not_counted(cheat):
    work = random_workload(3, (3, 9), (2, 5), VOCAB)
    with pytest.raises(ValueError, match="output 0"): measure(lambda w: [cheat(ids) for ids in answer(w)], work)
    with pytest.raises(ValueError): measure(lambda w: answer(w)[:-1], work)


def test_throughput_of_an_llm(llm):
    work = random_workload(12, (3, 20), (2, 9), VOCAB, seed=4)
    result = throughput(llm, work)
    assert set(result) == VLLM_KEYS | {"output_tokens_per_second", "peak_memory"}
    total = work.num_prompt_tokens + work.num_output_tokens      # random tokens and samples hold EOS: it ends nothing
    assert result["num_requests"] == 12 and result["total_num_tokens"] == total
    for rate, amount in (("requests_per_second", 12), ("tokens_per_second", total),
                         ("output_tokens_per_second", work.num_output_tokens)):
        assert math.isclose(result[rate] * result["elapsed_time"], amount)
    assert json.loads(json.dumps(result)) == result
    assert_idle(llm)


def test_a_new_seed_finds_nothing_in_the_prefix_cache(llm):
    def cached(seed):
        work = random_workload(4, (64, 64), (2, 2), VOCAB, seed=seed)
        return sum(o.num_cached_tokens for o in llm.generate(work.prompts, work.params, use_tqdm=False))
    assert cached(50) == 0 and cached(50) == 4*48 and cached(51) == 0


def test_peak_memory_is_in_bytes():
    before = peak_memory()
    assert 2**25 < before < 2**42                                # torch alone takes more than 32 MiB
    ones = torch.ones(2**26)
    assert peak_memory() >= max(before, ones.nbytes)


# ---- the command

def test_bench_prints_and_writes_the_figures(folder, tmp_path, capsys):
    file = tmp_path/"out.json"
    assert main(["bench", "throughput", "--model", str(folder), "--num-prompts", "2", "--output-json", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) and VLLM_KEYS <= set(printed) and printed["num_requests"] == 2


@pytest.mark.parametrize("wrong, says", [(["--num-prompts", "0"], "num_prompts"), (["--max-model-len", "100"], "max_model_len")])
def test_bench_refuses_plainly(folder, capsys, wrong, says):
    assert main(["bench", "throughput", "--model", str(folder), *wrong]) == 2
    assert says in capsys.readouterr().err
