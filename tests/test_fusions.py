"""Compiled fusions: the same numbers as the functions they replace, compiled at the first step and never again."""
import functools
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nano_vllm import fusions
from nano_vllm.layers import OPS, Ops, Target, choose_ops, last_that_suits
from nano_vllm.model import ModelConfig
from nano_vllm.weights import load_model

inductor = pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None, reason="no compiler for C++ here")
FUSED = Ops(norm=fusions.compiled_norm, activation=fusions.compiled_activation, rope_and_cache=fusions.fused_or_compiled_rope_and_cache)


def config(**changes):
    return ModelConfig(**dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_layers=10, num_heads=6, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
                              rope=dict(rope_theta=1e4), max_position=64) | changes)


def lively(c, ops=Ops(), dtype=torch.float32):
    model = load_model("", c, dtype, "cpu", "dummy", ops=ops)
    for p in model.parameters(): p.mul_(5) if p.dim() > 1 else p.add_(1)
    return model


class Mixing:
    "What stands in for attention: a function of queries, keys and values of this token and the one before."
    def store(self, k, v, layer): self.k, self.v = k, v
    def __call__(self, q, layer):
        return q.roll(1, 0) + self.v.repeat_interleave(3, 1) + self.k.repeat_interleave(3, 1).roll(1, 0)


@torch.inference_mode()
def run(model, n):
    ids = torch.arange(n) % 50
    return model(ids, ids, Mixing())


def start(model):
    "The first steps: one of several tokens, and one of a single token."
    for n in (7, 1): run(model, n)
    return model


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
    plain, fast = lively(config(**changes)), start(lively(config(**changes), FUSED))
    traced = len(backend)
    assert 0 < traced <= 2*4                 # four functions, each for several rows and for one, however many layers
    for n in (1, 2, 3, 48, 16, 6): torch.testing.assert_close(run(fast, n), run(plain, n), atol=1e-5, rtol=1e-5)
    assert len(backend) == traced, "something was compiled after the start"


def test_a_second_model_of_the_same_kind_compiles_nothing(backend):
    start(lively(config(), FUSED))
    traced = len(backend)
    start(lively(config(), FUSED))
    assert len(backend) == traced > 0


def test_inputs_stay_as_they_are(backend):
    g = torch.Generator().manual_seed(0)
    x, residual, weight, gate_up, qkv = (torch.randn(*s, generator=g) for s in ((5, 32), (5, 32), (32,), (5, 64), (5, 8*16)))
    turned = torch.randn(5, 1, 16, generator=g), torch.randn(5, 1, 16, generator=g)
    before = [t.clone() for t in (x, residual, weight, gate_up, qkv, *turned)]
    fusions.compiled_norm(x, weight, 1e-6)
    fusions.compiled_norm(x, weight, 1e-6, residual)
    fusions.compiled_activation(gate_up)
    fusions.compiled(fusions.split_norm_rotate)(qkv, [64, 32, 32], 16, *turned, [(weight[:16], 1e-6)]*2)
    for old, new in zip(before, (x, residual, weight, gate_up, qkv, *turned)): assert torch.equal(old, new)
    assert len(backend) == 4


def target(**changes): return replace(Target(config(), torch.device("cpu"), torch.float32, torch.float32), **changes)


def test_off_changes_nothing():
    ops = choose_ops(target())
    assert not {ops.norm, ops.activation, ops.rope_and_cache} & {FUSED.norm, FUSED.activation, FUSED.rope_and_cache}
    assert OPS["fusions"](target()) is None
    for chosen in (ops, FUSED): assert not any("forward" in vars(m) for m in lively(config(), chosen).modules())


@pytest.mark.parametrize("changes", [{}, dict(quantization="int8"), dict(dtype=torch.bfloat16, kv_cache_dtype=torch.bfloat16),
                                     dict(device=torch.device("cuda"))], ids=str)
def test_on_it_joins_the_small_operations_of_what_is_chosen_otherwise(changes):
    name, ops = last_that_suits(target(compile=True, **changes))
    _, without = last_that_suits(target(**changes))
    assert name == ("sampling_kernels" if "device" in changes else "fusions")     # which asks the fusions for all but the sampler
    assert ops == replace(without, norm=FUSED.norm, activation=FUSED.activation, rope_and_cache=FUSED.rope_and_cache)


def test_what_cannot_be_had_is_refused_with_compile_as_without():
    with pytest.raises(ValueError, match="quantization is 'int8'.*'cpu'"):
        choose_ops(target(compile=True, quantization="int8", device=torch.device("cuda")))
    with pytest.raises(ValueError, match="ops is 'fusions'.*compile"): choose_ops(target(), "fusions")


@pytest.mark.ci
@inductor
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_same_numbers_from_the_real_compiler(dtype, allowed):
    plain, fast = (lively(config(qk_norm=True, num_layers=2), ops, dtype) for ops in (Ops(), FUSED))
    for n in (1, 9):
        a, b = run(plain, n).float(), run(fast, n).float()
        assert float((a - b).abs().max() / a.abs().max()) < allowed


WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton": raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
from nano_vllm import fusions, cuda_graphs
from nano_vllm.attention import BACKENDS
from nano_vllm.layers import OPS
assert "triton" not in BACKENDS and "triton" not in OPS and "fusions" in OPS
print("imported")
"""


def test_without_triton_there_is_no_error():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=os.getcwd()))
    assert done.stdout == "imported\n", done.stderr
