"""The sampler in Triton, interpreted: against the sampler in PyTorch, its launches and bytes counted, and in the engine.

Noise may differ in last bits, and a mass that is to reach p is summed in another order. So a token may be another one than the oracle's, or
stay where the oracle's does not, exactly where two numbers are as close as roundings: `near_tie` says where. Greedy rows have no such excuse.

Ties of top-p are ties of logits here, and of probabilities in the oracle: logits that differ by less than 1e-7 may be told apart here only."""
import math
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import run_compiler, tiny_folder
from nano_vllm import LLM, cuda_graphs, engine_args as engine_module, sampler
from nano_vllm.cuda_graphs import make_graphs
from nano_vllm.layers import OPS, Ops, Target, choose_ops
from nano_vllm.sampler import FILTERS, SAMPLING_STAGES, gumbel, gumbel_sample, make_keys, row_keys, run_stages, sample
from nano_vllm.sampling_params import SamplingParams
from test_graphs import StandIn, own_tables
from test_sampling import metadata, p_value, rand, random_rows, row, same

kernels = pytest.importorskip("nano_vllm.sampling_kernels")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from nano_vllm.sampling_kernels import (SPLIT, TILE, find_thresholds, fused_gumbel_sample, fused_sample,  # noqa: E402
                                        sampling_kernels_ops)
from nano_vllm.triton_kernels import counting  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no GPU; make gpu runs them on one")
INF, ROUNDINGS = math.inf, 2**-19        # of a score: some last bits of the noise and of the logit


# ---- the oracle

def filters_of(m, vocab): return torch.stack([m.top_k.clamp(0, vocab).float(), m.top_p, m.min_p], 1)


def as_number(keys): return (keys ^ (keys >> 31 & 0x7fffffff)).view(torch.float32)


def near_threshold(x, m, token):
    "Is the mass of the tokens better than this one, in float64, as close to p as sums of float32 may be off?"
    p = float(m.top_p[0])
    stages = [s for s in SAMPLING_STAGES if s is not FILTERS[-1]]
    left = run_stages(stages, x, m)[0].double()
    better = float(left.softmax(-1)[left > left[token]].sum())
    return p < 1 and abs(better - p) < (x.shape[1] / TILE + 16) * 2**-23


def near_tie(x, m, ours, theirs):
    "May `ours` stand in the place of `theirs`? x (1, V), m of the same row."
    scores = run_stages(SAMPLING_STAGES[:1], x, m)[0] + gumbel(row_keys(m, "cpu"), x.shape[1])[0]
    a, b = scores[ours], scores[theirs]
    return bool((a - b).abs() < ROUNDINGS * (1 + a.abs() + b.abs())) or any(near_threshold(x, m, t) for t in (ours, theirs))


def agree(x, rows):
    "Tokens as the oracle's, up to near ties; nothing that was given is changed."
    m, before = metadata(rows), x.clone()
    ours, theirs = fused_sample(x, m), sample(x, m)
    assert ours.dtype == torch.int64 and ours.shape == theirs.shape and torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    for i in (ours != theirs).nonzero().flatten().tolist():
        only = m.select(slice(i, i + 1))
        assert not rows[i].params.greedy and near_tie(x[i:i+1].float(), only, int(ours[i]), int(theirs[i])), (i, rows[i].params, int(ours[i]), int(theirs[i]))


def same_tokens_stay(x, rows):
    "The thresholds keep what the sampler's filters keep."
    m = metadata(rows)
    tops, keys = find_thresholds(x, m.temperature, filters_of(m, x.shape[1]))
    for i in range(len(x)):
        only, one = m.select(slice(i, i + 1)), x[i:i+1].float()
        scaled = run_stages(SAMPLING_STAGES[:1], one, only)[0]
        wanted = run_stages(SAMPLING_STAGES, one, only)[0] > -INF
        kept = (scaled >= as_number(keys[i])) & (scaled > -INF) if keys[i] > -2**31 else scaled > -INF
        differ = (kept != wanted).nonzero().flatten().tolist()
        assert all(near_threshold(one, only, t) for t in differ), (i, rows[i].params, len(differ), int(kept.sum()), int(wanted.sum()))
        if keys[i] > -2**31: assert tops[i] == one.max()


# ---- against the oracle

@pytest.mark.parametrize("vocab", [1, 2, 7, 100, SPLIT - 1, SPLIT, SPLIT + 1, 5001])
def test_tokens_of_mixed_batches(vocab):
    "Greedy, with a temperature, with every mixture of filters, with penalties and forbidden stop tokens."
    agree(rand(25, vocab, seed=vocab, scale=3), random_rows(random.Random(vocab), 25, vocab))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_they_are(dtype):
    "So many logits are equal. Without edits they are not even converted."
    rows = [row(seed=i, **p) for i, p in enumerate([dict(temperature=0), dict(), dict(temperature=.6), dict(top_k=30), dict(top_p=.8), dict(min_p=.1), dict(top_k=9, top_p=.9)])]
    x = rand(7, 3001, seed=1, scale=3).to(dtype)
    agree(x, rows)
    same_tokens_stay(x, rows)
    with counting(x) as count: fused_sample(x[:1], metadata(rows[:1]))
    assert count["bytes"] == 2 * (3001 + 2)


VOCAB = TILE + 552        # two tiles, and no power of two
ADVERSARIAL = {
    "all equal": torch.zeros(VOCAB), "two values": (torch.arange(VOCAB) % 3 == 0).float(), "ties in eighths": (rand(VOCAB, seed=3) * 8).round() / 8,
    "zeros of both signs": torch.where(torch.arange(VOCAB) % 2 == 0, 0., -0.) - (torch.arange(VOCAB) % 5 == 0).float(),
    "one left by a mask": torch.full((VOCAB,), -INF).index_fill(0, torch.tensor(2300), 1.), "half masked": rand(VOCAB, seed=4).masked_fill(torch.arange(VOCAB) % 2 == 0, -INF),
    "none left": torch.full((VOCAB,), -INF), "forced": rand(VOCAB, seed=5).index_fill(0, torch.tensor(77), INF), "two forced": rand(VOCAB, seed=5).index_fill(0, torch.tensor([77, 2300]), INF),
    "all negative": -rand(VOCAB, seed=6).abs() - 1, "one far above": rand(VOCAB, seed=7).index_fill(0, torch.tensor(VOCAB - 1), 200.),
    "falling": -torch.arange(VOCAB) / 100, "huge": rand(VOCAB, seed=8) * 1e30, "small": rand(VOCAB, seed=9) * 1e-3, "close": 10 + torch.arange(VOCAB) * 2**-20}
ASKED = [dict(top_k=1), dict(top_k=VOCAB), dict(top_k=VOCAB - 1), dict(top_k=TILE), dict(top_k=TILE + 1), dict(top_k=40, temperature=.3), dict(top_p=1e-50), dict(top_p=1e-9),
         dict(top_p=.5), dict(top_p=.999, temperature=2), dict(top_p=1 - 2**-24), dict(min_p=1), dict(min_p=.5, temperature=.01), dict(top_k=99, top_p=.5, min_p=1e-3), dict(), dict(temperature=0)]


@pytest.mark.ci
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_logits(name):
    x = ADVERSARIAL[name].expand(len(ASKED), -1)
    rows = [row(seed=i, **asked) for i, asked in enumerate(ASKED)]
    agree(x, rows)
    if name not in ("none left", "forced", "two forced"): same_tokens_stay(x.contiguous(), rows)


def test_rows_far_apart_and_a_slice_of_wider_ones():
    "Rows of a view; an expanded row has a stride of 0, above."
    wide = rand(8, 9000, seed=2, scale=3)
    agree(wide[::2, :4000], [row(seed=i, **p) for i, p in enumerate([dict(), dict(top_k=9), dict(temperature=0), dict(top_p=.7)])])


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_of_qwen3(dtype):
    x = rand(5, 151_936, seed=1, scale=3).to(dtype)
    agree(x, [row(seed=i, **p) for i, p in enumerate([dict(temperature=0), dict(temperature=.7), dict(top_k=50), dict(top_p=.9), dict(top_k=1000, top_p=.95, temperature=.8)])])


def test_no_rows():
    assert fused_sample(torch.empty(0, 10), metadata([])).shape == (0,)
    assert fused_sample(torch.empty(0, 10), metadata([row(top_k=3)]).select(slice(0, 0))).shape == (0,)


def test_tokens_belong_to_the_seed_and_not_to_the_batch():
    "Alone, beside others with filters, in another order: each row has its token."
    rows, x = random_rows(random.Random(3), 14, 3000), rand(14, 3000, seed=3, scale=3)
    together = fused_sample(x, metadata(rows))
    assert torch.equal(torch.cat([fused_sample(x[i:i+1], metadata(rows[i:i+1])) for i in range(14)]), together)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fused_sample(x[order], metadata([rows[i] for i in order])), together[order])


@pytest.mark.parametrize("params", [dict(temperature=.8), dict(top_k=5), dict(top_p=.8, temperature=1.3)], ids=str)
def test_draws_follow_the_distribution(params):
    "The threshold of one row serves for all: they differ in their seeds alone."
    x, n = rand(1, 12, seed=1), 300
    m = metadata(same(n, **params))
    one = m.select(slice(0, 1))
    limits = [limit.expand(n).contiguous() for limit in find_thresholds(x, one.temperature, filters_of(one, 12))]
    tokens = fused_gumbel_sample(x.expand(n, -1), m.temperature, row_keys(m, "cpu"), *limits)
    assert p_value(tokens.bincount(minlength=12), run_stages(SAMPLING_STAGES, x, one).softmax(-1)[0] * n) > 1e-4


@triton.jit
def noise_kernel(keys, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, kernels.noise(i, tl.load(keys), tl.load(keys + 1)))


def test_the_noise_is_the_samplers():
    "But for last bits, also where u is so small that 1 - u has forgotten it."
    for seed in range(4):
        key, ours = make_keys(torch.tensor([seed]), torch.tensor([9])), torch.zeros(2**16)
        noise_kernel[(1,)](key, ours, 2**16)
        theirs = gumbel(key, 2**16)[0]
        assert ((ours - theirs).abs() <= 2**-21 * (1 + theirs.abs())).all()


# ---- bytes and launches

@contextmanager
def launches(monkeypatch):
    "The names of the kernels that are launched."
    from triton.runtime.interpreter import InterpretedFunction
    names, run = [], InterpretedFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", lambda self, *args, **kw: names.append(self.fn.__name__) or run(self, *args, **kw))
        yield names


@pytest.mark.parametrize("params, readings", [
    (dict(temperature=0), 1), (dict(temperature=0, top_k=5, top_p=.5, min_p=.1), 1), (dict(), 1), (dict(temperature=.7), 1), (dict(min_p=.1), 2), (dict(top_k=50), 3),
    (dict(top_k=50, top_p=.9, min_p=.01), 3), (dict(top_p=.9), 4), (dict(top_p=.9, min_p=.01, temperature=.7), 4)], ids=str)
def test_how_often_the_logits_are_read(params, readings):
    "Each reading is 4 bytes a logit; the final reads a winner for each piece. A greedy neighbour adds one reading and no more."
    vocab = 6001
    x, pieces = rand(2, vocab, seed=1, scale=3), -(-vocab // SPLIT)
    with counting(x) as count: fused_sample(x[:1], metadata([row(seed=1, **params)]))
    assert count["bytes"] == 4 * (readings*vocab + pieces)
    with counting(x) as count: fused_sample(x, metadata([row(seed=1, **params), row(temperature=0)]))
    assert count["bytes"] == 4 * ((readings + 1)*vocab + 2*pieces)


def test_how_many_launches(monkeypatch):
    "Whatever the rows ask for: two, or three where some have filters."
    x = rand(3, 3000)
    for rows, names in (([row(temperature=0)]*3, []), ([row(), row(temperature=.5), row(temperature=0)], []), ([row(top_k=3), row(), row(temperature=0)], ["threshold_kernel"]),
                        ([row(top_k=3, top_p=.5, min_p=.1)]*3, ["threshold_kernel"])):
        with launches(monkeypatch) as seen: fused_sample(x, metadata(rows))
        assert seen == names + ["race_kernel", "final_kernel"]


def test_few_logits_are_gathered(monkeypatch):
    "As many as reach a bound close below the threshold; all of them where all are equal."
    gathered, empty = [], torch.empty
    def kept(*shape, **kw):
        gathered.append(empty(*shape, **kw))
        return gathered[-1].fill_(torch.nan) if gathered[-1].is_floating_point() else gathered[-1]
    def gathered_of(x, **params):
        m = metadata([row(**params)])
        gathered.clear()
        find_thresholds(x, m.temperature, filters_of(m, x.shape[1]))
        return int((~gathered[0].isnan()).sum())
    monkeypatch.setattr(kernels.torch, "empty", kept)
    x = rand(1, 40_000, seed=1, scale=3)
    few, all_equal = gathered_of(x, top_p=.5), gathered_of(torch.zeros(1, 40_000), top_p=.5)
    assert few < 2000 < all_equal == 40_000
    assert gathered_of(x, min_p=.1) == 0 and gathered_of(x, temperature=0, top_k=5) == 0 and gathered_of(x) == 0
    assert gathered_of(x, top_k=50) == TILE          # the lanes' largest, and the gathered ones over them


def test_a_graph_can_repeat_it(monkeypatch):
    "The launches of step after step have the same arguments, each tensor at its address, and nothing is read back."
    seen = []
    class Spy:
        def __getitem__(self, grid): return lambda *args, **kw: seen.append((grid, *(x.data_ptr() if torch.is_tensor(x) else x for x in args), kw))
    for name in ("race_kernel", "final_kernel", "threshold_kernel"): monkeypatch.setattr(kernels, name, Spy())
    made = {}
    monkeypatch.setattr(kernels.torch, "empty", lambda *shape, **kw: made.setdefault((shape, str(kw)), torch.zeros(*shape, **kw)))
    x, temperatures, keys, filters = torch.zeros(3, 5000), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 3)
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "cpu", "numpy"): monkeypatch.setattr(torch.Tensor, name, None)
    for value in (0., 1.):
        x.normal_(), temperatures.fill_(value), keys.random_()
        fused_gumbel_sample(x, temperatures, keys, *find_thresholds(x, temperatures, filters))
    assert len(seen) == 6 and seen[:3] == seen[3:]


# ---- bugs that the tests above must find

def edges():
    "A few rows on which every piece of the kernels matters."
    test_the_noise_is_the_samplers()
    for name in ("zeros of both signs", "two forced", "half masked"):
        x = ADVERSARIAL[name][:TILE + 52].expand(6, -1).contiguous()
        rows = [row(seed=i, **p) for i, p in enumerate([dict(top_k=3), dict(top_p=.7), dict(temperature=.5), dict(top_p=1e-50), dict(top_k=600, top_p=.5, temperature=2), dict(temperature=0)])]
        agree(x, rows)
        if name != "two forced": same_tokens_stay(x, rows)


def test_the_edges_hold(): edges()


@triton.jit
def bits_as_they_are(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def two_zeros(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ (bits >> 31 & 0x7fffffff)


@triton.jit
def naive_noise(tokens, key, other_key):
    u = (kernels.token_bits(tokens, key, other_key).to(tl.float32) + 0.5) * kernels.UNIT
    return -tl.log(-tl.log(1 - u))


@triton.jit
def other_bits(tokens, key, other_key):
    return (tokens * 747796405 ^ key + other_key) & 0x7fffffff


@triton.jit
def without_a_shift(x, top, temperature):
    return tl.div_rn(x, temperature)


@triton.jit
def nan_stays(x, top, temperature):
    return tl.div_rn(x - top, temperature)


@triton.jit
def one_fewer(numbers, n, k, low, largest, temperature, TILE: tl.constexpr):
    return tl.maximum(low, kernels.search(numbers, n, tl.minimum(k, n.to(tl.float32)) - 1, kernels.LOWEST, largest, temperature, False, TILE))


@triton.jit
def all_weigh_one(scaled, top):
    return tl.where(scaled < top, 1., 1.)


@triton.jit
def no_bound(logits, vocab, p, low, largest, temperature, TILE: tl.constexpr):
    return kernels.order_key(kernels.scale(largest, largest, temperature) - 1), kernels.mass_of(logits, vocab, low, largest, temperature, TILE)


@triton.jit
def forgets_the_rest(numbers, n, low, largest, temperature, TILE: tl.constexpr):
    return tl.max(kernels.weigh(numbers, n, tl.full([16], kernels.LOWEST, tl.int32), kernels.LOWEST, largest, temperature, True, TILE), 0)


@triton.jit
def overwrites(logits, vocab, bound, largest, temperature, numbers, TILE: tl.constexpr):
    count = tl.full([], 0, tl.int32)
    for first in tl.range(0, vocab, TILE):
        x = kernels.load_tile(logits, first, vocab, TILE)
        kept = (kernels.order_key(kernels.scale(x, largest, temperature)) >= bound).to(tl.int32)
        tl.store(numbers + tl.cumsum(kept, 0) - 1, x, mask=kept > 0)
        count = tl.maximum(count, tl.sum(kept, 0))
    return count


@triton.jit
def ignores_thresholds(x, tokens, row, top, temperatures, keys, thresholds):
    return kernels.scale(x, top, tl.load(temperatures + row)) + kernels.noise(tokens, tl.load(keys + 2*row), tl.load(keys + 2*row + 1))


PLANTED = [("order_key", bits_as_they_are), ("order_key", two_zeros), ("noise", naive_noise), ("token_bits", other_bits), ("scale", without_a_shift),
           ("scale", nan_stays), ("limit_k", one_fewer), ("weight", all_weigh_one), ("bound_p", no_bound), ("mass_of", forgets_the_rest), ("gather", overwrites), ("score", ignores_thresholds)]


@pytest.mark.ci
@pytest.mark.parametrize("name, broken", PLANTED, ids=[b.fn.__name__ for _, b in PLANTED])
def test_a_planted_bug_is_found(monkeypatch, name, broken):
    monkeypatch.setattr(kernels, name, broken)
    with pytest.raises(AssertionError): edges()


# ---- in the engine

def target(**changes): return replace(Target(SimpleNamespace(decoder=None), torch.device("cuda"), torch.bfloat16, torch.bfloat16), **changes)


def test_who_gets_it():
    "Every GPU without quantization, compiled or not; the others keep what they have."
    for changes in (dict(), dict(compile=True), dict(dtype=torch.float32)):
        ops = choose_ops(target(**changes))
        assert (ops.sample, ops.gumbel_sample) == (fused_sample, fused_gumbel_sample) and ops.attention.__name__ == "TritonAttention"
    compiled, eager = (choose_ops(target(compile=c)) for c in (True, False))
    assert compiled.norm.__name__ == "compiled_norm" and eager == replace(OPS["triton_fusions"](target()), sample=fused_sample, gumbel_sample=fused_gumbel_sample)
    assert sampling_kernels_ops(target(quantization="int8")) is None
    assert sampling_kernels_ops(target(device=torch.device("cpu"))) is None
    assert Ops().gumbel_sample is gumbel_sample and Ops().sample is sample
    with pytest.raises(ValueError, match="ops is 'sampling_kernels'.*device 'cuda'"): choose_ops(target(device=torch.device("cpu")), "sampling_kernels")


@pytest.mark.ci
@pytest.mark.parametrize("graphs", [False, True])
def test_the_engine_gives_the_same_tokens(tmp_path, monkeypatch, graphs):
    "Greedy, drawn and filtered requests, one step under way while the next is prepared; in graphs what only has a temperature."
    folder, called = tiny_folder(tmp_path/"m"), []
    def counted(function, *args):
        called.append(function)
        return function(*args)
    params = [SamplingParams(seed=i, max_tokens=4, ignore_eos=True, **p) for i, p in enumerate(
        [dict(temperature=0), dict(temperature=.8, logprobs=2), dict(top_k=20, top_p=.9), dict(temperature=1.2, presence_penalty=.5, logit_bias={5: 3.})])]
    if graphs: monkeypatch.setattr(engine_module, "make_graphs", lambda runner, max_model_len: make_graphs(own_tables(runner), max_model_len, StandIn()))
    def answers():
        llm = LLM(str(folder), num_kv_blocks=60, max_num_seqs=4, max_model_len=64, device="cpu", attention_backend="triton", enforce_eager=not graphs, async_scheduling=True)
        return [o["token_ids"] for o in llm.generate([{"prompt_token_ids": [7, 8, 9 + i]} for i in range(4)], params, use_tqdm=False)]
    plain = answers()
    monkeypatch.setitem(OPS, "by_hand", lambda asked: Ops(sample=partial(counted, fused_sample), gumbel_sample=partial(counted, fused_gumbel_sample)))
    assert answers() == plain
    assert fused_sample in called and (fused_gumbel_sample in called) == graphs


def test_the_graphs_ask_the_ops(): assert not hasattr(cuda_graphs, "gumbel_sample") and hasattr(sampler, "gumbel_sample")


WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton": raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import torch
from types import SimpleNamespace
from nano_vllm.layers import OPS, Target
target = Target(SimpleNamespace(decoder=None), torch.device("cuda"), torch.bfloat16, torch.bfloat16)
print(OPS["sampling_kernels"](target))
"""


def test_without_triton_it_suits_nobody():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=os.getcwd()))
    assert done.stdout == "None\n", done.stderr


# ---- on the way to a GPU

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nano_vllm import sampling_kernels as k
TYPES = dict(temperatures="*fp32", keys="*i32", tops="*fp32", thresholds="*i32", winners="*i32", maxima="*fp32", token_ids="*i64", filters="*fp32", numbers="*fp32")
def compiled(kernel, capability, dtype, warps, constants):
    types = TYPES | dict(logits="*" + dtype)
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    return triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, enable_fp_fusion=False))
plain, filtered = dict(tops=None, thresholds=None), {}
for i, (capability, limit) in enumerate(((80, 163), (86, 99), (89, 99), (90, 227), (100, 227))):
    none, dtype = (plain, filtered)[i % 2], ("bf16", "fp32")[i % 2]
    for kernel, warps, constants in ((k.race_kernel, 8, dict(SPLIT=k.SPLIT, **none)), (k.final_kernel, 4, dict(SPLITS=128, **none)), (k.threshold_kernel, 16, dict(TILE=k.TILE))):
        done = compiled(kernel, capability, dtype, warps, {n: v for n, v in constants.items() if n in kernel.arg_names})
        assert done.metadata.shared <= limit * 1024, (kernel, done.metadata.shared)
        assert "div.rn.f32" in done.asm["ptx"], "a division that does not round correctly"
        if kernel is k.threshold_kernel: assert done.asm["ptx"].count("bar.sync") > 3, "the barriers are gone"
print("compiled")
"""


@pytest.mark.ci
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    "And fit into their shared memory, in KiB a block."
    assert run_compiler(COMPILE, tmp_path) == "compiled\n"
