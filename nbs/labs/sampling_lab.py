"""The sampling lab: temperature, filters and the race, for one row, in plain Python.

The engine's sampler does this for a batch of rows with PyTorch, which no browser has; a
test holds the two together. The likeliest tokens are listed. All others run as one, of
which `logits.json` keeps a sum for each temperature.
The page hands this file to Python in the browser; the tests import it as it is.
"""
import math
from collections import Counter

from nano_vllm.sampling_params import SamplingParams

SHOWN = 12                # rows of the page's tables
NUM_DRAWS = 200
ROUNDS = ((0xed5ad4bb, 11), (0xac4c1b51, 15), (0x31848bab, 14))
BITS32, BITS64 = 2**32 - 1, 2**64 - 1


# ---- temperature and filters; a row: the listed tokens' logits and, last, the others'

def log_sum_exp(row):
    best = max(row)
    return best + math.log(sum(math.exp(x - best) for x in row))


def softmax(row):
    total = log_sum_exp(row)
    return [math.exp(x - total) for x in row]


def divide_by_temperature(entry, temperature):
    "x / T for every token; the others' sum is stored for each T."
    rest = entry["rest"][str(float(temperature))]
    return [x / temperature for x in entry["logits"]] + [rest]


def keep(row, least):
    "-inf below `least`; the others stay, all of them, if everything listed stays."
    listed, rest = row[:-1], row[-1]
    kept = [x if x >= least else -math.inf for x in listed]
    return kept + [rest if least < min(listed) else -math.inf]


def keep_min_p(row, min_p): return keep(row, row[0] + math.log(min_p))


def keep_top_k(row, k): return keep(row, row[min(k, len(row) - 1) - 1])


def keep_top_p(row, p):
    "The smallest set of best tokens with mass >= p: the one that crosses stays."
    mass, last = 0.0, 0
    for i, prob in enumerate(softmax(row)[:-1]):
        if mass >= p: break
        mass, last = mass + prob, i
    return keep(row, row[last]) if mass >= p else row


def stages(entry, params):
    "(name, row) after each stage, in the engine's order."
    yield "raw", divide_by_temperature(entry, 1.0)
    row = divide_by_temperature(entry, params.temperature)
    yield "temperature", row
    if params.min_p > 0: row = keep_min_p(row, params.min_p)
    yield "min_p", row
    if params.top_k > 0: row = keep_top_k(row, params.top_k)
    yield "top_k", row
    if params.top_p < 1: row = keep_top_p(row, params.top_p)
    yield "top_p", row


# ---- the race: noise from a hash of seed, count and token, as in the engine

def mix64(z):
    z = (z + 0x9e3779b97f4a7c15) & BITS64
    for shift, factor in ((30, 0xbf58476d1ce4e5b9), (27, 0x94d049bb133111eb), (31, 1)):
        z = ((z ^ (z >> shift)) * factor) & BITS64
    return z


def make_key(seed, num_output_tokens):
    return mix64((mix64(seed) + num_output_tokens) & BITS64)


def signed_shift(x, shift):
    "The 32 bits of `x` shifted right, with copies of the first one coming in."
    signed = x - 2**32 if x >> 31 else x
    return (signed >> shift) & BITS32


def hash_bits(key, token):
    "31 random bits for a token."
    x = token ^ (key & BITS32)
    for i, (factor, shift) in enumerate(ROUNDS):
        x = (x * factor) & BITS32
        x ^= signed_shift(x, shift)
        if i == 0: x = (x + (key >> 32)) & BITS32
    return x


def gumbel(bits):
    "Gumbel noise -log(-log(1-u)), u in (0, 1)."
    return -math.log(-math.log1p(-(bits + 0.5) * 2**-31 * (1 - 2**-24)))


def race(entry, row, seed, num_output_tokens):
    "(index, logit, noise) of every token that is left; the largest sum wins."
    ids = [*entry["ids"], entry["vocab_size"]]      # the others run under a free number
    key = make_key(seed, num_output_tokens)
    return [(i, x, gumbel(hash_bits(key, ids[i])))
            for i, x in enumerate(row) if x > -math.inf]


def winner(runners): return max(runners, key=lambda r: r[1] + r[2])[0]


# ---- what the page shows

def describe(entry, name, row):
    "A column of the table: probabilities, and what is left."
    probs = softmax(row)
    return dict(name=name, probs=probs[:SHOWN], others=sum(probs[SHOWN:]),
                kept=sum(x > -math.inf for x in row[:-1]),
                rest_kept=row[-1] > -math.inf)


def name_of(entry, i):
    return entry["texts"][i] if i < len(entry["texts"]) else None


def run(entry, settings, seed, num_output_tokens):
    "The stages, one race with the winner and the likeliest, and many draws."
    params = SamplingParams(**settings)
    columns = list(stages(entry, params))
    row = columns[-1][1]
    runners = race(entry, row, seed, num_output_tokens)
    won = winner(runners)
    total = log_sum_exp(row)
    shown = [r for i, r in enumerate(runners) if i < SHOWN or r[0] == won]
    is_filtered = params.min_p > 0 or params.top_p < 1
    return dict(
        partial=is_filtered and row[-1] > -math.inf,    # the cut is among the others
        columns=[describe(entry, *column) for column in columns],
        texts=[name_of(entry, i) for i in range(SHOWN)],
        num_rest=entry["vocab_size"] - len(entry["ids"]),
        race=[dict(text=name_of(entry, i), logprob=x - total, noise=noise, won=i == won)
              for i, x, noise in shown])


def draws(entry, settings, seed):
    "How often each token wins in the next draws, beside its probability."
    row = list(stages(entry, SamplingParams(**settings)))[-1][1]
    counts = Counter(winner(race(entry, row, seed, n)) for n in range(NUM_DRAWS))
    probs = softmax(row)
    return [dict(text=name_of(entry, i), share=count / NUM_DRAWS, prob=probs[i])
            for i, count in counts.most_common(SHOWN)]
