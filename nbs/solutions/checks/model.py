"Checks of the exercises of the chapter on the model."
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import torch

from nano_vllm.model import Decoder, ModelConfig, PlainAttention, weight_shards

from . import attempt, exercise, expect, require, same, show
from .layers import near

TOY = ModelConfig(vocab_size=11, hidden_size=6, intermediate_size=5, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2,
                  rms_norm_eps=1e-5, rope=dict(rope_theta=1e4), max_position=64)
LLAMA_8B = replace(TOY, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
                   num_kv_heads=8, head_dim=128)
BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True)


def random_model(config):
    "A decoder whose weights are neither small nor alike."
    model, g = Decoder(config), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters(): p.normal_(float("norm" in name), .4, generator=g)
    return model


def roundings(wanted):
    "What some thousand roundings of float32 come to at most: two layers are fewer."
    return 2000 * torch.finfo(torch.float32).eps * wanted.abs().max()


@exercise
def check_output_share(output_share):
    for inner, head, tokens, rows in ((106e6, 28e6, 1000, 1000), (106e6, 28e6, 1000, 1), (106e6, 28e6, 1, 1), (100, 100, 3, 1)):
        wanted = head*rows / (head*rows + inner*tokens)
        expect(output_share, (inner, head, tokens, rows), wanted,
               f"{tokens} tokens go through the layers, and {rows} of them through the output layer", tolerance=1e-9)


@exercise
def check_count_parameters(count_parameters):
    for says, c in {"the plain toy": TOY, "the toy with biases": replace(TOY, **BIASES), "the toy with a tied embedding": replace(TOY, tied=True),
                    "the toy with norms on q and k": replace(TOY, qk_norm=True),
                    "the toy with a bias on q, k and v": replace(TOY, qkv_bias=True), "Llama 3.1 8B": LLAMA_8B}.items():
        with torch.device("meta"): wanted = sum(p.numel() for p in Decoder(c).parameters())
        expect(count_parameters, (c,), wanted, case=f"count_parameters(c) for {says}")


@exercise
def check_switches(switches):
    cases = {"Llama": TOY, "Qwen2": replace(TOY, qkv_bias=True, tied=True), "Qwen3": replace(TOY, qk_norm=True, num_layers=12),
             "Llama with biases": replace(TOY, **BIASES), "tied Llama": replace(TOY, tied=True, num_layers=1)}
    for family, c in cases.items():
        with torch.device("meta"): names = sorted(weight_shards(Decoder(c)))
        wanted = {name: getattr(c, name) for name in ("num_layers", "tied", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")}
        case = f"switches(names) for a {family} of {c.num_layers} layers"
        got = attempt(case, switches, list(names))
        require(isinstance(got, dict), f"{case} gives {show(got)}, not a dictionary")
        require(set(got) == set(wanted), f"{case} has the keys {sorted(map(str, got))}, expected {sorted(wanted)}")
        for name, value in wanted.items():
            require(same(got[name], value), f"{case} says {name}={show(got[name])}, expected {value!r}")


@exercise
def check_hidden_states(hidden_states):
    for says, c in {"the toy": TOY, "the toy with biases and norms on q and k": replace(TOY, qk_norm=True, **BIASES)}.items():
        model, ids = random_model(c), torch.tensor([3, 1, 4, 1, 5, 9, 2])
        positions, case = torch.arange(len(ids)), f"hidden_states(parts, rotary, token_ids, positions, attention) for {says}"
        wanted = model(ids, positions, PlainAttention(c.head_dim**-.5))
        got = attempt(case, hidden_states, model.model, model.rotary, ids, positions, PlainAttention(c.head_dim**-.5))
        near(case, got, wanted, roundings(wanted),
             "each sublayer reads the norm of the stream and adds to the stream, and the last norm comes at the end")


MULTIPLIERS = SimpleNamespace(embedding_multiplier=12., attention_multiplier=.3, residual_multiplier=.22, logits_scaling=8.)


def granite(model, ids, m):
    "Granite's logits, with the multipliers where its authors have them."
    positions, parts = torch.arange(len(ids)), model.model
    rows, attention = model.rotary(positions), PlainAttention(m.attention_multiplier)
    x = parts.embed_tokens(ids) * m.embedding_multiplier
    for layer in parts.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), *rows, attention) * m.residual_multiplier
        x = x + layer.mlp(layer.post_attention_layernorm(x)) * m.residual_multiplier
    return model.compute_logits(parts.norm(x)) / m.logits_scaling


@exercise
def check_fold(fold):
    for says, c in {"untied": TOY, "tied": replace(TOY, tied=True), "untied, with biases": replace(TOY, **BIASES)}.items():
        model, ids = random_model(c), torch.tensor([3, 1, 4, 1, 5, 9, 2])
        for name in vars(MULTIPLIERS):          # one by one, then all
            m = SimpleNamespace(**{**dict.fromkeys(vars(MULTIPLIERS), 1.), "attention_multiplier": c.head_dim**-.5, name: getattr(MULTIPLIERS, name)})
            compare(fold, model, ids, m, f"fold of a model that is {says}, with {name}={getattr(m, name)}")
        compare(fold, model, ids, MULTIPLIERS, f"fold of a model that is {says}, with all multipliers")


def compare(fold, model, ids, m, case):
    "Folded, the plain decoder must give Granite's logits."
    wanted, folded = granite(model, ids, m), deepcopy(model)
    attempt(case, fold, folded, m)
    got = attempt(f"the decoder after {case}", lambda: folded.compute_logits(folded(ids, torch.arange(len(ids)), PlainAttention(model.config.head_dim**-.5))))
    near(f"the logits after {case}", got, wanted, roundings(wanted))
