"""Compiled fusions: the same numbers as the modules they replace, compiled at the start and never again."""
import functools
import shutil

import pytest
import torch

from nano_vllm import fusions
from nano_vllm.model import ModelConfig
from nano_vllm.weights import FUSIONS, load_model

inductor = pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None, reason="no compiler for C++ here")


def config(**changes):
    return ModelConfig(**dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_layers=10, num_heads=6, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
                              rope=dict(rope_theta=1e4), max_position=64) | changes)


def lively(c, dtype=torch.float32):
    model = load_model("", c, dtype, "cpu", "dummy")
    for p in model.parameters(): p.mul_(5) if p.dim() > 1 else p.add_(1)
    return model


@torch.inference_mode()
def run(model, n):
    ids = torch.arange(n) % 50
    return model(ids, ids, lambda q, k, v, layer: q.roll(1, 0) + v.repeat_interleave(3, 1) + k.repeat_interleave(3, 1).roll(1, 0))


@pytest.fixture
def backend(monkeypatch):
    "Use the compiler's tracing without its code generation; gives the list of graphs that were traced."
    graphs = []
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    fusions.compiled.cache_clear()
    monkeypatch.setattr(fusions.torch, "compile", functools.partial(torch.compile, backend=count))
    yield graphs
    torch.compiler.reset()
    fusions.compiled.cache_clear()


@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True), dict(qkv_bias=True, o_bias=True, mlp_bias=True), dict(tied=True, num_kv_heads=2)], ids=str)
def test_same_numbers_for_each_family(backend, changes):
    plain, fast = lively(config(**changes)), lively(config(**changes))
    FUSIONS[True](fast)
    traced = len(backend)
    assert 0 < traced <= 2*4                 # four functions, each for several rows and for one, however many layers
    for n in (1, 2, 3, 48, 16, 6): torch.testing.assert_close(run(fast, n), run(plain, n), atol=1e-5, rtol=1e-5)
    assert len(backend) == traced, "something was compiled after the start"


def test_a_second_model_of_the_same_kind_compiles_nothing(backend):
    FUSIONS[True](lively(config()))
    traced = len(backend)
    FUSIONS[True](lively(config()))
    assert len(backend) == traced


def test_inputs_stay_as_they_are(backend):
    g = torch.Generator().manual_seed(0)
    x, residual, weight, gate_up, qkv = (torch.randn(*s, generator=g) for s in ((5, 32), (5, 32), (32,), (5, 64), (5, 8*16)))
    turned = torch.randn(5, 1, 16, generator=g), torch.randn(5, 1, 16, generator=g)
    before = [t.clone() for t in (x, residual, weight, gate_up, qkv, *turned)]
    fusions.compiled(fusions.norm)(x, weight, 1e-6)
    fusions.compiled(fusions.add_norm)(x, residual, weight, 1e-6)
    fusions.compiled(fusions.swiglu)(gate_up)
    fusions.compiled(fusions.split_and_turn)(qkv, [64, 32, 32], 16, *turned, [(weight[:16], 1e-6)]*2)
    for old, new in zip(before, (x, residual, weight, gate_up, qkv, *turned)): assert torch.equal(old, new)


def test_off_changes_nothing():
    model = lively(config())
    FUSIONS[False](model)
    assert not any("forward" in vars(m) or "turn" in vars(m) for m in model.modules())


@inductor
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_same_numbers_from_the_real_compiler(dtype, allowed):
    plain, fast = (lively(config(qk_norm=True, num_layers=2), dtype) for _ in range(2))
    FUSIONS[True](fast)
    for n in (1, 9):
        a, b = run(plain, n).float(), run(fast, n).float()
        assert float((a - b).abs().max() / a.abs().max()) < allowed
