"Tests of sampling_params and sampler: parameters, the noise, every filter against exact distributions, laws 6 and 7."
import math
import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano_vllm import sampler
from nano_vllm.sampler import (LOGIT_STAGES, NUMBERS, SAMPLING_STAGES, SamplingMetadata, compute_logprobs, gather_logprobs,
                               gumbel, gumbel_sample, hash_bits, make_keys, mix64, random_sample, row_keys, run_stages, sample,
                               to_entries)
from nano_vllm.sampling_params import Logprob, SamplingParams

V, N = 12, 20_000


def row(seed=0, prompt=(), output=(), stop=(), **params):
    return SimpleNamespace(params=SamplingParams(**params), seed=seed, prompt_token_ids=list(prompt),
                           output_token_ids=list(output), stop_token_ids=set(stop))


def same(n, start=0, **kwargs):
    "n rows that differ only in their seed (the parameters are checked once: that takes its time)."
    first = vars(row(**kwargs))
    return [SimpleNamespace(**{**first, "seed": start + i}) for i in range(n)]


def metadata(rows): return SamplingMetadata.of(rows)


def keys_of(rows): return row_keys(metadata(rows), "cpu")


def tokens_of(x, rows): return sample(x, metadata(rows))


def rand(*shape, seed=0, scale=1.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def p_value(counts, expected):
    counts, expected = counts.double(), expected.double()
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected)**2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def uniform(values, n):
    counts = values.flatten().long().bincount(minlength=n)
    return p_value(counts, torch.full((n,), values.numel() / n))


# ---------------------------------------------------------------- parameters

def test_fields_and_defaults():
    expected = dict(n=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                    repetition_penalty=1.0, seed=None, max_tokens=16, min_tokens=0, stop=None, stop_token_ids=None,
                    ignore_eos=False, logprobs=None, prompt_logprobs=None, skip_special_tokens=True, speculative=True)
    assert {f.name: f.default for f in fields(SamplingParams)} == expected
    assert [f.name for f in fields(SamplingParams)] == list(expected)


@pytest.mark.parametrize("good", [
    dict(n=4), dict(temperature=0), dict(temperature=0, n=1), dict(top_p=1), dict(top_p=1e-9), dict(top_k=-1),
    dict(top_k=10**9), dict(min_p=1), dict(presence_penalty=-2), dict(frequency_penalty=2.0), dict(repetition_penalty=2),
    dict(seed=-2**63), dict(seed=2**63 - 1), dict(seed=0), dict(max_tokens=None), dict(max_tokens=None, min_tokens=99),
    dict(min_tokens=16), dict(stop="x"), dict(stop=["x", "yz"]), dict(stop=("x",)), dict(stop=[]),
    dict(stop_token_ids=[0, 5]), dict(stop_token_ids={1}), dict(logprobs=0), dict(logprobs=20), dict(prompt_logprobs=5),
    dict(ignore_eos=True), dict(skip_special_tokens=False)], ids=str)
def test_good_values(good): SamplingParams(**good)


NAN, INF = float("nan"), float("inf")
BAD = dict(
    n=[0, -1, 1.0, True, None, "1", 16385, NAN], temperature=[-0.1, NAN, INF, "0", None, True, [1], 1e300, 1j],
    top_p=[0, 0.0, -0.5, 1.01, NAN, INF, None, "1", True], top_k=[-2, 1.5, True, None, "5", NAN],
    min_p=[-0.1, 1.1, NAN, None, False, "0"], presence_penalty=[-2.1, 2.1, NAN, None, True, "1"],
    frequency_penalty=[-2.1, 2.1, INF, None, True], repetition_penalty=[0, -1, NAN, INF, None, True, 1e9],
    seed=[2**63, -2**63 - 1, 1.0, True, "7"], max_tokens=[0, -1, 1.5, True, "16", NAN],
    min_tokens=[-1, 17, 1.0, True, None], stop=["", ["a", ""], [1], 5, {"a": 1}, b"x", [None]],
    stop_token_ids=[5, [1.0], ["a"], [-1], [True], "12", [None]], ignore_eos=[1, 0, None, "yes"],
    logprobs=[-1, 21, 1.0, True, "1"], prompt_logprobs=[-1, 21, 2.0, False], skip_special_tokens=[1, None, "no"])


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in BAD.items() for v in vs], ids=repr)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError) as error: SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name + " must be ")
    assert repr(value) in message or repr(float(value)) in message


def test_bad_combinations():
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens=3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
    for temperature in (0, 1e-6):
        with pytest.raises(ValueError, match="n must be 1 .* got 2"): SamplingParams(n=2, temperature=temperature)


def test_normal_form():
    stops = ["a"]
    p = SamplingParams(temperature=1, stop=stops, stop_token_ids=(3,))
    stops.append("b")
    assert p.stop == ["a"] and p.stop_token_ids == [3] and isinstance(p.temperature, float)
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams().stop == [] == SamplingParams().stop_token_ids
    assert replace(p, top_k=3).top_k == 3
    with pytest.raises(ValueError, match="top_k"): replace(p, top_k=-3)


# ---------------------------------------------------------------- the noise

def test_mix64_is_splitmix64():
    assert mix64(torch.tensor([1234567])).item() == 6457827717110365317
    assert mix64(torch.tensor([0])).item() == 0xe220a8397b1dcdaf - 2**64


def test_hash_against_plain_python():
    "The torch code is the formula: 32-bit arithmetic, shifts that carry the sign."
    def signed(x): return (x + 2**31) % 2**32 - 2**31
    def one(v, k0, k1):
        x = v ^ k0
        for i, (factor, shift) in enumerate(((0xed5ad4bb, 11), (0xac4c1b51, 15), (0x31848bab, 14))):
            x = signed(x * factor)
            x ^= x >> shift
            if i == 0: x = signed(x + k1)
        return x
    keys = keys_of([row(seed=s, output=[0] * s) for s in range(5)])
    assert hash_bits(keys, 40).tolist() == [[one(v, k0, k1) for v in range(40)] for k0, k1 in keys.tolist()]


@pytest.mark.parametrize("shift", [0, 8, 15, 23])
def test_bits_are_uniform_and_neighbours_independent(shift):
    def byte(rows): return (hash_bits(keys_of(rows), 20_000) >> shift) & 255
    by_seed = byte([row(seed=s) for s in range(200)])
    by_step = byte([row(seed=3, output=[0] * t) for t in range(200)])
    ps = [uniform(by_seed, 256), uniform(by_step, 256), uniform(by_seed[:-1] * 256 + by_seed[1:], 2**16),
          uniform(by_step[:-1] * 256 + by_step[1:], 2**16), uniform(by_step[:-1, :-1] * 256 + by_step[1:, 1:], 2**16)]
    ps += [uniform(by_seed[:, :-d] * 256 + by_seed[:, d:], 2**16) for d in (1, 2, 3, 64, 256, 1024, 16384)]
    assert min(ps) > 1e-4, ps


def test_every_bit_of_the_seed_matters():
    rng = random.Random(0)
    seeds = [rng.randrange(-2**63, 2**63) for _ in range(500)]
    flip = lambda s, bit: (s + 2**63 ^ 1 << bit) - 2**63
    bits = hash_bits(keys_of([row(seed=s) for s in seeds]), 16)
    for bit in range(64):
        changed = bits ^ hash_bits(keys_of([row(seed=flip(s, bit)) for s in seeds]), 16)
        share = torch.stack([(changed >> b & 1).float().mean() for b in range(31)])
        assert (share - 0.5).abs().max() < 0.04, bit


def test_keys_do_not_repeat():
    keys = keys_of([row(seed=s, output=[0] * t) for s in range(-50, 50) for t in range(50)])
    assert len({tuple(k) for k in keys.tolist()}) == 5000


def test_gumbel_is_gumbel():
    g = gumbel(keys_of([row(seed=s) for s in range(100)]), 40_000)
    assert g.isfinite().all()
    cdf = torch.exp(-torch.exp(-g.double()))
    assert uniform((cdf * 1000).long().clamp(max=999), 1000) > 1e-4
    tail = (g > 10).sum().item()  # P(G > 10) = 1 - exp(-exp(-10)): the tail that decides for rare tokens
    expected = g.numel() * -math.expm1(-math.exp(-10))
    assert abs(tail - expected) < 4 * math.sqrt(expected)


def test_extreme_bits_stay_finite(monkeypatch):
    extremes = torch.tensor([[0, 2**31 - 1]], dtype=torch.int32)
    monkeypatch.setattr(sampler, "hash_bits", lambda keys, vocab_size: extremes)
    assert gumbel(None, 2).isfinite().all()


# ---------------------------------------------------------------- distributions

def exact(logits, r):
    "The distribution of the next token of one row, in plain Python: the oracle."
    p, x = r.params, [float(l) for l in logits]
    for v in range(len(x)):
        count = r.output_token_ids.count(v)
        if v in r.prompt_token_ids or count: x[v] = x[v] / p.repetition_penalty if x[v] > 0 else x[v] * p.repetition_penalty
        x[v] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        if v in r.stop_token_ids and len(r.output_token_ids) < p.min_tokens: x[v] = -math.inf
    if p.temperature < 1e-5: return torch.eye(len(x), dtype=torch.float64)[x.index(max(x))]
    q = [math.exp((l - max(x)) / p.temperature) for l in x]
    keep = {v for v in range(len(q)) if q[v] > 0 and q[v] >= p.min_p * max(q)}
    if p.top_k > 0:
        bound = sorted((q[v] for v in keep), reverse=True)[:p.top_k][-1]
        keep = {v for v in keep if q[v] >= bound}
    if p.top_p < 1:
        total, mass, nucleus = sum(q[v] for v in keep), 0.0, set()
        for v in sorted(keep, key=lambda v: -q[v]):
            if mass < p.top_p * total: bound = q[v]
            mass += q[v]
        keep = {v for v in keep if q[v] >= bound}
    return torch.tensor([q[v] if v in keep else 0.0 for v in range(len(q))], dtype=torch.float64) / sum(q[v] for v in keep)


CASES = [dict(), dict(temperature=0.5), dict(temperature=2), dict(top_k=3), dict(top_k=-1), dict(top_k=99), dict(top_p=0.8),
         dict(top_p=0.3), dict(min_p=0.2), dict(temperature=1.5, top_k=8, top_p=0.9, min_p=0.05),
         dict(temperature=0.7, top_p=0.95, repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=-0.2),
         dict(min_tokens=10, top_p=0.9)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_exact_distribution(case):
    x = rand(V, seed=1)
    rows = same(N, prompt=[1, 2], output=[3, 3, 4], stop=[0, 5], **case)
    counts = tokens_of(x.expand(N, -1), rows).bincount(minlength=V)
    assert p_value(counts, exact(x, rows[0]) * N) > 1e-4


def test_draws_over_positions_of_one_seed():
    x = rand(V, seed=2)
    r = [row(seed=5, output=[0] * t) for t in range(3000)]
    tokens = tokens_of(x.expand(3000, -1), r)
    assert p_value(tokens.bincount(minlength=V), x.softmax(-1) * 3000) > 1e-4
    pairs = (tokens[:-1] * V + tokens[1:]).bincount(minlength=V * V)  # consecutive draws are independent
    assert p_value(pairs, torch.outer(x.softmax(-1), x.softmax(-1)).flatten() * 2999) > 1e-4


def test_draws_over_a_real_vocabulary():
    x = rand(49152, seed=3, scale=3)
    tokens = torch.cat([tokens_of(x.expand(100, -1), same(100, start=100 * b)) for b in range(20)])
    group = x.argsort(descending=True).argsort() // 3072  # 16 groups by rank
    expected = torch.zeros(16).index_add_(0, group, x.softmax(-1)) * len(tokens)
    assert p_value(group[tokens].bincount(minlength=16)[expected > 1], expected[expected > 1]) > 1e-4


def test_a_rare_token_is_drawn_as_often_as_it_should():
    n, batches = 20_000, 10
    x = torch.tensor([0.0, math.log(1e-3)])
    hits = sum(tokens_of(x.expand(n, -1), same(n, start=n * b)).sum().item() for b in range(batches))
    expected = n * batches * 1e-3 / 1.001
    assert abs(hits - expected) < 4 * math.sqrt(expected)


def random_rows(rng, n, V):
    pick = lambda *values: rng.choice(values)
    return [row(seed=rng.randrange(2**40), prompt=rng.choices(range(V), k=rng.randrange(6)),
                output=rng.choices(range(V), k=rng.randrange(9)), stop=rng.choices(range(V + 3), k=2),
                temperature=pick(0, 1, 1, 0.3, 1.7), top_k=pick(0, -1, 1, 5, 40, 999), top_p=pick(1, 1, 0.95, 0.6, 0.1, 1e-9),
                min_p=pick(0, 0, 0.02, 0.3, 1), min_tokens=pick(0, 4), repetition_penalty=pick(1, 1, 1.3, 0.8),
                frequency_penalty=pick(0, 0, 0.4, -1), presence_penalty=pick(0, 0, -0.5, 1)) for _ in range(n)]


@pytest.mark.parametrize("trial", range(6))
def test_stages_against_the_oracle(trial):
    rng, size = random.Random(trial), (20, 64, 151)[trial % 3]
    rows, x = random_rows(rng, 150, size), rand(150, size, seed=trial, scale=3)
    m, hot = metadata(rows), [i for i, r in enumerate(rows) if not r.params.greedy]
    after = run_stages(SAMPLING_STAGES, run_stages(LOGIT_STAGES, x, m)[hot], m.select(torch.tensor(hot))).softmax(-1).double()
    wanted = torch.stack([exact(x[i], rows[i]) for i in hot])
    assert ((after > 0) == (wanted > 0)).all()
    assert (after - wanted).abs().max() < 1e-5
    tokens = tokens_of(x, rows)
    assert all(exact(x[i], rows[i])[t] > 0 for i, t in enumerate(tokens.tolist()))


# ---------------------------------------------------------------- laws 6 and 7

def test_law6_greedy_is_argmax_in_mixed_batches():
    x = rand(40, 500)
    rows = [row(seed=i, temperature=i % 2, top_k=3, top_p=0.5, min_p=0.1) for i in range(40)]
    assert torch.equal(tokens_of(x, rows)[::2], x[::2].argmax(-1))
    rows = [row(temperature=0, output=[x[i].argmax().item()], presence_penalty=2) for i in range(40)]
    penalised = x.clone()
    for i, r in enumerate(rows): penalised[i, r.output_token_ids[0]] -= 2
    assert torch.equal(tokens_of(x, rows), penalised.argmax(-1))


def test_law6_top_p_keeps_the_token_that_crosses():
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    for p, kept in ((1e-9, 1), (0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.9999, 3)):
        after = run_stages(SAMPLING_STAGES, probs.log(), metadata([row(top_p=p)]))
        assert (after > -math.inf).sum() == kept, p


def test_top_p_on_a_flat_distribution():
    for p in (1e-9, 0.5, 0.999999):  # all tie with the last token kept, so all stay
        after = run_stages(SAMPLING_STAGES, torch.zeros(2, 1000), metadata([row(top_p=p)] * 2))
        assert (after > -math.inf).all()


def test_law6_tokens_do_not_depend_on_the_batch():
    rng = random.Random(9)
    rows, x = random_rows(rng, 64, 3000), rand(64, 3000, seed=9, scale=3)
    together = tokens_of(x, rows)
    alone = torch.cat([tokens_of(x[i:i + 1], rows[i:i + 1]) for i in range(64)])
    assert torch.equal(alone, together)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens_of(x[order], [rows[i] for i in order]), together[order])


@pytest.mark.parametrize("size", [7, 1000, 49152])
def test_noise_bits_and_floats_do_not_depend_on_the_batch(size):
    keys = keys_of([row(seed=s) for s in range(9)])
    whole = gumbel(keys, size)
    for i in range(9): assert torch.equal(gumbel(keys[i:i + 1], size)[0], whole[i])


def test_pieces_do_not_matter(monkeypatch):
    rows, x = random_rows(random.Random(4), 33, 200), rand(33, 200, seed=4)
    whole = tokens_of(x, rows)
    for piece in (1, 200, 1999, 10**9):
        monkeypatch.setattr(sampler, "PIECE", piece)
        assert torch.equal(tokens_of(x, rows), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_law7_inputs_are_not_written(dtype):
    rows, x = random_rows(random.Random(5), 50, 100), rand(50, 100).to(dtype)
    before, lists = x.clone(), [(list(r.prompt_token_ids), list(r.output_token_ids)) for r in rows]
    for chosen in (rows, [r for r in rows if not r.params.greedy][:1] * 50, [row()] * 50, [row(temperature=0)] * 50):
        tokens = tokens_of(x, chosen)
        assert tokens.dtype == torch.int64 and tokens.shape == (50,)
    compute_logprobs(x, tokens, 5)
    assert torch.equal(x, before)
    assert lists == [(r.prompt_token_ids, r.output_token_ids) for r in rows]


def test_law7_the_metadata_is_not_written():
    rows, x = random_rows(random.Random(6), 50, 100), rand(50, 100)
    m, fresh = metadata(rows), metadata(rows)
    sample(x, m)
    assert same_metadata(m, fresh)


def test_masked_tokens_are_never_drawn():
    x = torch.full((5000, 50), -math.inf)
    x[:, 7], x[:, 33] = 0.0, -80.0
    assert (tokens_of(x, same(5000)) == 7).all()
    x[:, 33] = 0.0
    for params in (dict(), dict(temperature=1e5), dict(temperature=1e-4), dict(top_p=0.9, top_k=10, min_p=0.5)):
        tokens = tokens_of(x, same(5000, **params))
        assert set(tokens.tolist()) == {7, 33}
        assert abs((tokens == 7).float().mean() - 0.5) < 0.05  # a tie, also at extreme temperatures


def test_min_tokens():
    x = torch.zeros(3, 4)
    x[:, 2] = 50.0
    rows = [row(seed=1, output=[0] * n, stop=[2, 99], min_tokens=2) for n in (0, 1, 2)]
    assert (tokens_of(x, rows) == 2).tolist() == [False, False, True]
    rows = [row(output=[0] * n, stop=[2, 99], min_tokens=2, temperature=0) for n in (0, 1, 2)]
    assert tokens_of(x, rows).tolist() == [0, 0, 2]
    assert tokens_of(x, [row(min_tokens=2, temperature=0)] * 3).tolist() == [2, 2, 2]  # nothing stops these rows


def test_empty_batch_and_empty_prompt():
    assert tokens_of(torch.empty(0, 10), []).shape == (0,)
    assert compute_logprobs(torch.empty(0, 10), [], 3) == []
    assert tokens_of(torch.zeros(1, 4), [row(temperature=0, repetition_penalty=2)]).tolist() == [0]


# ---------------------------------------------------------------- what a step's rows ask for

def columns(m): return {name: value for name, value in vars(m).items() if isinstance(value, torch.Tensor)}


def same_metadata(a, b):
    "Are two SamplingMetadata alike, number by number and type by type?"
    if columns(a).keys() != columns(b).keys() or [id(s) for s in a.sequences] != [id(s) for s in b.sequences]: return False
    return all(torch.equal(x, columns(b)[name]) and x.dtype == columns(b)[name].dtype for name, x in columns(a).items())


def test_metadata_of_rows():
    rows = [row(seed=-2**63, prompt=[1], output=[5, 6], stop=[3], top_k=7, top_p=.5, min_p=.25, temperature=2, min_tokens=4,
                presence_penalty=.5, frequency_penalty=-.5, repetition_penalty=1.5), row(seed=2**63 - 1, top_k=10**9)]
    m = metadata(rows)
    assert len(m) == 2 and m.sequences == rows and set(columns(m)) == {*NUMBERS, "seeds", "num_output_tokens"}
    for name, dtype in NUMBERS.items():
        assert columns(m)[name].tolist() == [getattr(r.params, name) for r in rows] and columns(m)[name].dtype == dtype
    assert m.seeds.tolist() == [-2**63, 2**63 - 1] and m.seeds.dtype == m.num_output_tokens.dtype == torch.int64
    assert m.num_output_tokens.tolist() == [2, 0]
    empty = metadata([])
    assert len(empty) == 0 and empty.is_plain and all(x.shape == (0,) for x in columns(empty).values())
    for name in NUMBERS: assert columns(empty)[name].dtype == NUMBERS[name]


INDICES = [slice(0, 9), slice(2, 5), slice(4, 4), slice(7, 99), [0], [8, 3, 3, 0], [], list(range(9))]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_select_gives_the_metadata_of_the_rows(index):
    rows = random_rows(random.Random(1), 9, 50)
    m = metadata(rows)
    _ = m.is_plain            # what is cached of all must not be taken for what is true of some
    if isinstance(index, slice): chosen, rows = m.select(index), rows[index]
    else: chosen, rows = m.select(torch.tensor(index, dtype=torch.int64)), [rows[i] for i in index]
    assert same_metadata(chosen, metadata(rows)) and chosen.is_plain == metadata(rows).is_plain


@pytest.mark.parametrize("seed", range(4))
def test_no_row_depends_on_another_through_select(seed):
    "Whichever rows are drawn together, each gets its own token; also by a selection of a selection."
    rng = random.Random(seed)
    rows, x = random_rows(rng, 30, 300), rand(30, 300, seed=seed, scale=3)
    m, alone = metadata(rows), torch.cat([tokens_of(x[i:i + 1], rows[i:i + 1]) for i in range(30)])
    for _ in range(10):
        index = torch.tensor(rng.sample(range(30), rng.randint(1, 30)))
        part = slice(a := rng.randrange(len(index)), rng.randint(a, len(index)))
        chosen = m.select(index)
        assert torch.equal(sample(x[index], chosen), alone[index])
        assert torch.equal(sample(x[index][part], chosen.select(part)), alone[index][part])


@pytest.mark.parametrize("params, plain", [
    (dict(), True), (dict(temperature=0), True), (dict(temperature=.3), True), (dict(top_k=-1), True), (dict(top_p=1), True),
    (dict(seed=5, max_tokens=3, stop="x", logprobs=2, n=3, stop_token_ids=[4], ignore_eos=True), True),
    (dict(min_p=.1), False), (dict(top_k=1), False), (dict(top_p=.999), False), (dict(presence_penalty=.1), False),
    (dict(frequency_penalty=-.1), False), (dict(repetition_penalty=.9), False), (dict(min_tokens=1), False)], ids=str)
def test_is_plain(params, plain):
    assert metadata([row(**params)]).is_plain is plain
    assert metadata([row(), row(**params), row(temperature=0)]).is_plain is plain


def test_min_tokens_are_plain_once_there_are_so_many():
    assert [metadata([row(min_tokens=2, output=[1] * n)]).is_plain for n in range(4)] == [False, False, True, True]


def test_plain_rows_by_tensors_alone_are_the_same():
    "What a recorded step calls gives what `sample` gives."
    rows = [row(seed=s, output=[1] * (s % 5), temperature=t) for s, t in enumerate((0, 1, .3, 1.7, 1, 0, 1e-6, 5) * 8)]
    m, x = metadata(rows), rand(64, 500, scale=3)
    assert m.is_plain
    assert torch.equal(gumbel_sample(x, m.temperature, make_keys(m.seeds, m.num_output_tokens)), sample(x, m))


def test_only_rows_with_a_temperature_are_drawn():
    rows, x, drawn = random_rows(random.Random(7), 40, 60), rand(40, 60), []
    def draw(x, m):
        drawn.append(m)
        return random_sample(x, m)
    assert torch.equal(sample(x, metadata(rows), draw), tokens_of(x, rows))
    assert [s for m in drawn for s in m.sequences] == [r for r in rows if not r.params.greedy]


def test_a_column_stands_beside_its_logits():
    m, x = metadata([row(top_p=.5), row(top_p=.25, temperature=0)]), torch.zeros(2, 4, dtype=torch.float64)
    assert m.column("top_p", x).tolist() == [[.5], [.25]] and m.column("top_p", x).dtype == torch.float64
    assert m.column("top_k", torch.zeros(2, 4)).dtype == torch.float32


# ---------------------------------------------------------------- cost

class Ops(TorchDispatchMode):
    "Records the name and the number of rows of each tensor operation; size None: of a metadata's column, or of a number."
    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[0][0] if args and isinstance(args[0], (list, tuple)) and args[0] else args[0] if args else None
        size = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() > 1 else None
        self.seen.append((func.overloadpacket.__name__, size))
        return func(*args, **(kwargs or {}))


def test_no_tensor_work_per_row():
    def count(n):
        with Ops() as ops: tokens_of(torch.zeros(n, 100), [row(top_p=0.9, top_k=5, min_p=0.1, temperature=0.5, min_tokens=2,
                                                                 stop=[1], output=[2], repetition_penalty=1.1)] * n)
        return len(ops.seen)
    assert count(4) == count(64)


def test_only_rows_that_ask_pay():
    x = torch.zeros(8, 100)
    with Ops() as ops: tokens_of(x, [row(temperature=0)] * 8)
    assert {name for name, size in ops.seen if size} <= {"slice", "argmax", "cat", "alias", "_to_copy"}
    with Ops() as ops: tokens_of(x, [row()] * 8)
    assert not {"topk", "sort", "_softmax", "div", "div_", "index_copy"} & {name for name, _ in ops.seen}
    with Ops() as ops: tokens_of(x, [row()] * 5 + [row(top_k=3), row(top_p=0.5), row(temperature=0)])
    assert [size for name, size in ops.seen if name == "topk"] == [1, 1]
    assert "sort" not in {name for name, _ in ops.seen}


# ---------------------------------------------------------------- logprobs

def test_compute_logprobs():
    x = rand(6, 40)
    wanted, ids = x.double().log_softmax(-1), [3, 0, 39, 7, x[4].argmax().item(), x[5].argmin().item()]
    for k in (0, 1, 5):
        for i, entry in enumerate(compute_logprobs(x, torch.tensor(ids), k)):
            order = wanted[i].argsort(descending=True).tolist()
            assert next(iter(entry)) == ids[i]
            assert set(entry) == {ids[i], *order[:k]}
            for token, info in entry.items():
                assert type(info) is Logprob and type(info.logprob) is float and info.decoded_token is None
                assert info.rank == order.index(token) + 1
                assert abs(info.logprob - wanted[i, token]) < 1e-5
    assert compute_logprobs(x, ids, 100)[0].keys() == set(range(40))
    assert compute_logprobs(x, ids, 2) == compute_logprobs(x, torch.tensor(ids), 2)
    tensors = gather_logprobs(x, torch.tensor(ids), 2)        # what a step keeps, to be turned into entries later
    assert [t.shape for t in tensors] == [(6, 3)] * 3 and to_entries(*tensors) == compute_logprobs(x, ids, 2)


# ---------------------------------------------------------------- a GPU is never waited for

class Watch(TorchDispatchMode):
    "The host may hand numbers to the device by `to_device`, and in no other way."
    sending = False
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, out)) if isinstance(x, torch.Tensor) and x.dim()]
        assert self.sending or len({x.device for x in tensors}) < 2, f"{op} takes numbers of the host"
        return out


ASKING = [dict(top_p=.9), dict(top_k=5), dict(min_p=.1), dict(temperature=.7), dict(temperature=0),
          dict(repetition_penalty=1.2), dict(frequency_penalty=.5), dict(presence_penalty=.5), dict(min_tokens=9),
          dict(top_k=3, top_p=.5, min_p=.01, temperature=2, repetition_penalty=2)]


@pytest.fixture
def device_without_numbers(monkeypatch):
    "A device whose tensors have shapes and no numbers: who asks for one, or for a shape that depends on one, gets an error."
    watch = Watch()
    def send(x, device):
        watch.sending = True
        try: return x.to(device)
        finally: watch.sending = False
    monkeypatch.setattr(sampler, "to_device", send)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    with watch: yield torch.device("meta")


@pytest.mark.parametrize("params", [[p] for p in ASKING] + [[{}, p] for p in ASKING] + [ASKING], ids=str)
def test_sampling_asks_a_gpu_for_nothing(device_without_numbers, params):
    rows = [row(prompt=[1, 2], output=[2, 3], stop=[4], **p) for p in params]
    logits = torch.zeros(len(rows), 1000, device=device_without_numbers, dtype=torch.bfloat16)
    ids = tokens_of(logits, rows)
    assert ids.device == logits.device and ids.shape == (len(rows),) and ids.dtype == torch.int64


def test_the_bite_of_a_question(device_without_numbers):
    "The forms for a CPU are noticed."
    x = torch.zeros(2, 9, device=device_without_numbers)
    for question in (lambda: int(x.sum()), lambda: x[x > 0], lambda: x.tolist(), lambda: x[:, torch.tensor([1])]):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)): question()


def test_to_device_pins_and_does_not_wait(monkeypatch):
    calls = []
    class Spy:
        def pin_memory(self): return calls.append("pin") or self
        def to(self, device, **kw): calls.append((device, kw))
    sampler.to_device(Spy(), "cuda:1")
    assert calls == ["pin", ("cuda:1", dict(non_blocking=True))]


@pytest.mark.parametrize("scale", [0, .1, 3, 30])
def test_top_p_keeps_the_same_tokens_on_a_gpu(monkeypatch, scale):
    "There all tokens are sorted, on a CPU those that can matter."
    x = rand(40, 500, seed=int(scale*10), scale=scale)
    rows = [row(top_p=p) for p in (1e-9, .01, .5, .9, .999999) for _ in range(8)]
    expected = sampler.keep_top_p(x, metadata(rows))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: found.append(k) or topk(x, k))
    assert torch.equal(sampler.keep_top_p(x, metadata(rows)), expected) and found == [500]
