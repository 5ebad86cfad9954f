"What a request may ask of the sampler, in vLLM's terms, checked before any work."

# %%
import math
from dataclasses import dataclass
from numbers import Integral, Real

# %%
MAX_N, MAX_LOGPROBS = 16384, 20  # vLLM's: completions of a prompt, logprobs of a token
LIMITS = dict(
    n=(int, 1, MAX_N), temperature=(float, 0, 1e6), top_p=(float, 0, 1),
    top_k=(int, -1, math.inf), min_p=(float, 0, 1), presence_penalty=(float, -2, 2),
    frequency_penalty=(float, -2, 2), repetition_penalty=(float, 0.01, 100),
    seed=(int, -2**63, 2**63 - 1), max_tokens=(int, 1, math.inf),
    min_tokens=(int, 0, math.inf), logprobs=(int, 0, MAX_LOGPROBS),
    prompt_logprobs=(int, 0, MAX_LOGPROBS), ignore_eos=(bool, False, True),
    skip_special_tokens=(bool, False, True))
KINDS = {int: (Integral, "an integer"), float: (Real, "a number"), bool: (bool, "bool")}
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}  # these may be None

# %%
def check_number(name, value, kind, low, high):
    "`value` as a `kind`; ValueError unless it is a number from `low` to `high`."
    base, noun = KINDS[kind]
    limit = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    known = isinstance(value, base) and isinstance(value, bool) == (kind is bool)
    if known and low <= value <= high: return kind(value)
    raise ValueError(f"{name} must be {noun} {limit}, got {value!r}")

# %%
def is_unicode(text) -> bool:
    "Is `text` a string that can be written as UTF-8? Lone surrogates cannot."
    return isinstance(text, str) and text == text.encode("utf-8", "ignore").decode()


def is_token_id(t):
    return isinstance(t, Integral) and not isinstance(t, bool) and t >= 0


def is_stop_string(s):
    "Is `s` text that can occur in an output? Lone surrogates never do."
    return is_unicode(s) and s != ""


def check_list(name, value, good, limit):
    "`value` (None, string, collection) as a list; ValueError unless all are `good`."
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set)) or not all(map(good, items)):
        raise ValueError(f"{name} must be {limit}, got {value!r}")
    return list(items)

# %%
def check_params(p):
    "Check the fields of the SamplingParams `p` and bring them to their normal form."
    for name, limits in LIMITS.items():
        value = getattr(p, name)
        if value is None and name in OPTIONAL: continue
        setattr(p, name, check_number(name, value, *limits))
    p.stop = check_list("stop", p.stop, is_stop_string,
                        "a non-empty string or a list of them")
    p.stop_token_ids = check_list("stop_token_ids", p.stop_token_ids,
                                  is_token_id,
                                  "a list of integers of at least 0")
    if p.top_p == 0: raise ValueError("top_p must be greater than 0, got 0.0")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        limit = f"at most max_tokens={p.max_tokens}"
        raise ValueError(f"min_tokens must be {limit}, got {p.min_tokens}")
    if p.n > 1 and p.greedy:
        raise ValueError(f"n must be 1 in greedy sampling (temperature 0), got {p.n}")

# %%
GREEDY_BELOW = 1e-5


@dataclass
class SamplingParams:
    "How to choose a request's tokens, in vLLM's terms; ValueError on a bad value."
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self): check_params(self)

    @property
    def greedy(self) -> bool: return self.temperature < GREEDY_BELOW

    @property
    def has_penalty(self) -> bool:
        "Does the next token depend on which tokens came before it?"
        return (self.repetition_penalty, self.frequency_penalty,
                self.presence_penalty) != (1, 0, 0)

# %%
@dataclass
class Logprob:
    "Log-probability of a token and its place (1 is best); the engine adds the text."
    logprob: float
    rank: int
    decoded_token: str | None = None
