"From logits to one token id: what each sampling parameter does, and noise that belongs to the request."

# %%
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
import torch
from torch import Tensor
from nano_vllm.sampling_params import GREEDY_BELOW, Logprob

# %%
def signed(value, bits):
    "The unsigned `value` as the signed integer with the same `bits`."
    return value - 2**bits if value >> bits - 1 else value


def mix64(z):
    "SplitMix64 (Steele et al. 2014), elementwise: int64 -> int64, a bijection."
    z = z + signed(0x9e3779b97f4a7c15, 64)
    for shift, factor in ((30, 0xbf58476d1ce4e5b9), (27, 0x94d049bb133111eb), (31, 1)):
        shifted = z >> shift & 2**(64 - shift) - 1  # the mask clears copies of the sign
        z = (z ^ shifted) * signed(factor, 64)
    return z

# %%
def make_keys(seeds, num_output_tokens):
    "Hash seeds and counts, (B,) int64 each on any device, to keys (B, 2) int32."
    return mix64(mix64(seeds) + num_output_tokens).view(torch.int32).view(-1, 2)

# %%
ROUNDS = ((0xed5ad4bb, 11), (0xac4c1b51, 15), (0x31848bab, 14))  # Wellons 2018


def hash_bits(keys, vocab_size):
    "31 random bits for each row and token: keys (B, 2) int32 -> (B, V) int32 >= 0."
    x = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) ^ keys[:, :1]
    for i, (factor, shift) in enumerate(ROUNDS):
        x.mul_(signed(factor, 32))
        x.bitwise_xor_(x >> shift)
        if i == 0: x.add_(keys[:, 1:])
    return x

# %%
def gumbel(keys, vocab_size):
    "Gumbel noise -log(-log(1-u)), u in (0, 1) hashed: keys (B, 2) -> (B, V) float32."
    minus_u = hash_bits(keys, vocab_size).float().add_(0.5).mul_(-2**-31 * (1 - 2**-24))
    return minus_u.log1p_().neg_().log_().neg_()


def gumbel_argmax(x, keys):
    "A draw from softmax(x) for each row, by its key: x (B, V), keys (B, 2) -> (B,)."
    return gumbel(keys, x.shape[1]).add_(x).argmax(-1)

# %%
def to_device(x: Tensor, device) -> Tensor:
    "The tensor `x` on `device`, without waiting for what the device is doing."
    if torch.device(device).type != "cuda": return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)

# %%
NUMBERS = dict(temperature=torch.float32, top_p=torch.float32, top_k=torch.int64,
               min_p=torch.float32, presence_penalty=torch.float32,
               frequency_penalty=torch.float32, repetition_penalty=torch.float32,
               min_tokens=torch.int64)   # the parameters that the sampler reads


@dataclass
class SamplingMetadata:
    """What the sampler must know of the R rows of a step, in tensors (R,) on the host.

    `sequences` are R objects with the lists `prompt_token_ids`, `output_token_ids` and
    the set `stop_token_ids`, for what depends on tokens. A row is one sequence."""
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    min_tokens: Tensor
    seeds: Tensor                 # int64
    num_output_tokens: Tensor     # int64: how many tokens each row has sampled before
    sequences: list

    @classmethod
    def of(cls, sequences) -> "SamplingMetadata":
        "From objects with `params` and `seed` as well, one by one: the slow way."
        columns = {name: torch.tensor([getattr(s.params, name) for s in sequences],
                                      dtype=dtype) for name, dtype in NUMBERS.items()}
        def whole(numbers): return torch.tensor(numbers, dtype=torch.int64)
        return cls(**columns, seeds=whole([s.seed for s in sequences]),
                   num_output_tokens=whole([len(s.output_token_ids)
                                            for s in sequences]),
                   sequences=list(sequences))

    def __len__(self): return len(self.sequences)

    def select(self, index: Tensor | slice) -> "SamplingMetadata":
        "The metadata of the rows in `index`: a slice, or int64 on the host."
        columns = {name: value[index] for name, value in vars(self).items()
                   if isinstance(value, Tensor)}
        chosen = (self.sequences[index] if isinstance(index, slice)
                  else [self.sequences[i] for i in index.tolist()])
        return SamplingMetadata(**columns, sequences=chosen)

    def column(self, name: str, x: Tensor) -> Tensor:
        "The parameter `name` as a (R, 1) tensor beside `x`, in its number type."
        return to_device(getattr(self, name).to(x.dtype), x.device).unsqueeze(1)

    @cached_property
    def is_plain(self) -> bool:
        "Does no row ask for more than a temperature?"
        return not any(asks(self).any() for asks, _ in LOGIT_STAGES + FILTERS)

# %%
def divide_by_temperature(x, m):
    "x / T, shifted so that each row's best is 0, where float32 resolves best."
    return (x - x.amax(-1, keepdim=True)).div_(m.column("temperature", x))

# %%
def keep_min_p(x, m):
    "-inf for tokens less likely than min_p times the best one (Nguyen et al. 2024)."
    least = x.amax(-1, keepdim=True) + m.column("min_p", x).log()
    return x.masked_fill(x < least, -math.inf)


def keep_top_k(x, m):
    "-inf for tokens below the top_k-th best (Fan et al. 2018); ties with it stay."
    ks = m.top_k.clamp(max=x.shape[1])
    last = to_device(ks - 1, x.device).unsqueeze(1)
    return x.masked_fill(x < x.topk(int(ks.max())).values.gather(1, last), -math.inf)

# %%
def keep_top_p(x, m):
    "-inf outside the smallest set of best tokens with mass >= top_p; ties stay."
    p, probs, V = m.column("top_p", x), x.softmax(-1), x.shape[1]
    k = V if x.is_cuda else int((probs >= (1 - p) / V).sum(-1).max().clamp(min=1))
    top = probs.topk(k).values
    before = top.cumsum(-1) - top  # the mass of all better tokens
    last = (before < p).sum(-1, keepdim=True).clamp(min=1) - 1
    return x.masked_fill(probs < top.gather(1, last), -math.inf)

# %%
def token_places(lists, device):
    "All tokens of B lists as indices (row, token): two int64 tensors."
    lengths = torch.tensor([len(tokens) for tokens in lists])
    row = torch.arange(len(lists)).repeat_interleave(lengths)
    token = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
    return to_device(row, device), to_device(token, device)

# %%
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


def penalize(x, m):
    "Repetition penalty on tokens of prompt and output; frequency and presence: output."
    known = [[*s.prompt_token_ids, *s.output_token_ids] for s in m.sequences]
    i, t = token_places(known, x.device)
    repetition, frequency, presence = (m.column(p, x)[i, 0] for p in PENALTIES)
    at = token_places([s.output_token_ids for s in m.sequences], x.device)
    counts = torch.zeros_like(x).index_put_(at, x.new_ones(()), accumulate=True)[i, t]
    old = x[i, t]
    new = torch.where(old > 0, old / repetition, old * repetition)
    return x.index_put((i, t), new - frequency*counts - presence*(counts > 0))


def forbid_stop_tokens(x, m):
    "-inf for the tokens that would end a row now."
    stops = [[t for t in s.stop_token_ids if t < x.shape[1]] for s in m.sequences]
    return x.index_put(token_places(stops, x.device), x.new_full((), -math.inf))

# %%
def on_rows(chosen, change, x, m, rest=lambda x: x):
    "`change(x, m)` for the rows where `chosen` (R,) holds, `rest(x)` for the others."
    if not chosen.any(): return rest(x)
    if chosen.all(): return change(x, m)
    index = chosen.nonzero().squeeze(1)
    at = to_device(index, x.device)
    return rest(x).index_copy(0, at, change(x[at], m.select(index)))

# %%
def has_penalty(m):
    return ((m.repetition_penalty != 1) | (m.frequency_penalty != 0)
            | (m.presence_penalty != 0))


LOGIT_STAGES = [  # (which rows ask for it, what it does); greedy rows take part, too
    (lambda m: m.num_output_tokens < m.min_tokens, forbid_stop_tokens),
    (has_penalty, penalize)]
FILTERS = [
    (lambda m: m.min_p > 0, keep_min_p),
    (lambda m: m.top_k > 0, keep_top_k),
    (lambda m: m.top_p < 1, keep_top_p)]
SAMPLING_STAGES = [(lambda m: m.temperature != 1, divide_by_temperature), *FILTERS]


def run_stages(stages, x, m):
    "The logits (R, V) after all stages that rows ask for, in order."
    for asks, change in stages: x = on_rows(asks(m), change, x, m)
    return x

# %%
def row_keys(m, device):
    "The rows' keys (R, 2) for their next token, on the device."
    return to_device(make_keys(m.seeds, m.num_output_tokens), device)


def random_sample(x, m):
    "A token for each row, all with a temperature: (R, V) float32 -> (R,) int64."
    return gumbel_argmax(run_stages(SAMPLING_STAGES, x, m), row_keys(m, x.device))


def choose_tokens(x, m, draw):
    "A token for each row, the best or by `draw`: (R, V) float32 -> (R,) int64."
    x = run_stages(LOGIT_STAGES, x, m)
    is_random = m.temperature >= GREEDY_BELOW
    return on_rows(is_random, draw, x, m, rest=lambda x: x.argmax(-1))

# %%
PIECE = 2**19  # numbers of 4 bytes; a CPU's cache holds that a few times over


def sample(logits: Tensor, m: SamplingMetadata, draw=random_sample) -> Tensor:
    """The next token of each row: logits (R, V) of any float dtype -> ids (R,) int64.

    No row depends on another. `draw(x, m)` is what samples for rows with a
    temperature: `random_sample`, or something faster that gives the same."""
    R, V = logits.shape
    step = max(1, PIECE // V if logits.device.type == "cpu" else R)
    if R <= step: return choose_tokens(logits.float(), m, draw)
    pieces = [slice(i, i + step) for i in range(0, R, step)]
    return torch.cat([choose_tokens(logits[rows].float(), m.select(rows), draw)
                      for rows in pieces])

# %%
def gumbel_sample(x, temperatures, keys):
    "`sample` for plain rows, by tensors alone: (B, V) float32, (B,), (B, 2) -> (B,)."
    T = temperatures[:, None]
    scaled = torch.where(T == 1, x, (x - x.amax(-1, keepdim=True)) / T)
    drawn = gumbel_argmax(scaled, keys)
    return torch.where(temperatures < GREEDY_BELOW, x.argmax(-1), drawn)

# %%
def gather_logprobs(logits, token_ids, num_logprobs):
    """(ids, values, ranks), all (B, 1 + num_logprobs): the given tokens, then the best.

    logits (B, V) of any float dtype, token_ids (B,); the values: log_softmax."""
    logprobs = logits.float().log_softmax(-1)
    given = torch.as_tensor(token_ids, device=logits.device).view(-1, 1)
    best = logprobs.topk(min(num_logprobs, logits.shape[1])).indices
    ids = torch.cat([given, best], 1)
    values = logprobs.gather(1, ids)
    rank = (logprobs > values[:, :1]).sum(-1, keepdim=True) + 1
    ranks = torch.cat([rank, torch.ones_like(best).cumsum(-1)], 1)
    return ids, values, ranks


def to_entries(ids, values, ranks) -> list[dict[int, Logprob]]:
    "{token id: Logprob} for each row of what `gather_logprobs` gave."
    rows = zip(ids.tolist(), values.tolist(), ranks.tolist())
    return [{token: Logprob(value, rank) for token, value, rank in zip(*row)}
            for row in rows]


def compute_logprobs(logits, token_ids, num_logprobs) -> list[dict[int, Logprob]]:
    "For each row {token id: Logprob}: the given token, then the `num_logprobs` best."
    return to_entries(*gather_logprobs(logits, token_ids, num_logprobs))
