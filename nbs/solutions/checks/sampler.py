"Checks of the exercises of the chapter on sampling."
from collections.abc import Iterable
from types import SimpleNamespace

import torch

from nano_vllm.sampler import SamplingMetadata, run_stages, LOGIT_STAGES, SAMPLING_STAGES
from nano_vllm.sampling_params import SamplingParams

from . import attempt, exercise, expect, require, show

TOY = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def sequence(prompt=(), output=(), stop=(), seed=0, **params):
    return SimpleNamespace(params=SamplingParams(**params), seed=seed, prompt_token_ids=list(prompt),
                           output_token_ids=list(output), stop_token_ids=set(stop), bad_words_token_ids=[], token_mask=None)


@exercise
def check_rank(rank):
    for logits, token, why in (([2., 1., .5], 0, "no token is better"), ([2., 1., .5], 2, "two tokens are better"),
                               ([-1., 3., 0.], 0, "two tokens are better"), ([1., 1., 0.], 1, "the other one is as good, not better"),
                               ([0., 0., 0.], 2, "no token is better"), ([-5.], 0, "it is the only one")):
        expect(rank, (logits, token), 1 + sum(x > logits[token] for x in logits), why)


@exercise
def check_nucleus(nucleus):
    cases = [([.5, .3, .15, .05], .8, "0.5 + 0.3 is just enough"), ([.5, .3, .15, .05], .81, "0.5 + 0.3 is not enough, so the token "
             "that crosses the border stays"), ([.5, .3, .15, .05], .4, "the best token is always kept"),
             ([.05, .15, .3, .5], .7, "the best are the last here"), ([.25] * 4, .5, "four tokens as likely, of which two are enough"),
             ([1.], .1, "there is one"), ([.6, .4, 0.], 1., "a token without mass adds nothing"),
             ([.125, .5, .25, .125], .75, "0.5 + 0.25 is just enough")]
    for probs, top_p, why in cases:
        wanted, mass = set(), 0.
        for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
            if mass >= top_p - 1e-12: break
            wanted.add(token)
            mass += probs[token]
        case = f"nucleus({probs}, {top_p})"
        got = attempt(case, nucleus, list(probs), top_p)
        require(got is not None, f"{case} gives None. Is a `return` missing?")
        require(isinstance(got, Iterable), f"{case} gives {show(got)}, which is no list of ids")
        tokens = list(got)
        allowed = range(len(probs)) if len(set(probs)) == 1 else sorted(wanted)      # of equally likely ones any will do
        require(len(tokens) == len(wanted) and all(tokens.count(t) == 1 and t in allowed for t in tokens),
                f"{case} gives {show(got)}, expected {sorted(wanted)}", why)


@exercise
def check_two_tokens(two_tokens):
    g = torch.Generator().manual_seed(0)
    logits = TOY.expand(4000, 5)
    noise = -(-torch.rand(4000, 5, generator=g).log()).log()
    got = attempt("two_tokens of 4,000 rows", two_tokens, logits.clone(), noise.clone())
    require(torch.is_tensor(got) and got.shape == (4000, 2), f"the result has shape {tuple(getattr(got, 'shape', ()))}, expected (4000, 2)")
    for row, (mine, wanted) in enumerate(zip(got.tolist(), (logits + noise).topk(2).indices.tolist())):
        require(mine == wanted, f"with logits {show(TOY)} and noise {show(noise[row])} you draw {mine}, expected {wanted}",
                "whoever comes second in the race is the draw from those that are left")


@exercise
def check_sampling_probabilities(sampling_probabilities):
    asks = {"temperature=0": sequence(temperature=0), "top_k=3": sequence(top_k=3), "temperature=2": sequence(temperature=2),
            "top_p=0.8": sequence(top_p=.8), "min_p=0.3, temperature=0.5": sequence(min_p=.3, temperature=.5),
            "penalties": sequence([3], [1, 1], repetition_penalty=2, frequency_penalty=.5, presence_penalty=.25),
            "temperature=0, penalties": sequence([0], [0, 0], temperature=0, repetition_penalty=2, frequency_penalty=1.5),
            "min_tokens=4 and stop token 0": sequence(output=[1], stop=[0], min_tokens=4),
            "logit_bias={4: 6}": sequence(logit_bias={4: 6})}
    m = SamplingMetadata.of(asks.values())
    x = TOY.expand(len(asks), -1)
    logits = run_stages(LOGIT_STAGES, x, m)
    for mix in (list(range(len(asks))), [0], [1], [0, 6], [2, 0, 4]):
        case = f"sampling_probabilities of rows with {', '.join(list(asks)[i] for i in mix)}"
        part = m.select(torch.tensor(mix))
        got = attempt(case, sampling_probabilities, x[mix].clone(), part)
        require(torch.is_tensor(got) and got.shape == (len(mix), 5), f"{case}: the shape is {tuple(getattr(got, 'shape', ()))}, "
                f"expected {(len(mix), 5)}. Is a `return` missing?")
        for row, i in enumerate(mix):
            wanted = torch.zeros(5)
            if m.temperature[i] == 0: wanted[logits[i].argmax()] = 1
            else: wanted = run_stages(SAMPLING_STAGES, logits[i:i + 1], m.select(torch.tensor([i])))[0].softmax(-1)
            require(torch.allclose(got[row].float(), wanted, atol=1e-5),
                    f"for {list(asks)[i]} and logits {show(TOY)} you give {show(got[row].float())}, expected {show(wanted)}",
                    "the best token after the penalties has all of it" if m.temperature[i] == 0 else
                    "what the stages leave, as a softmax")
