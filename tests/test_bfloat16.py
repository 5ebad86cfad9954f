"""Weights in bfloat16, all else in float32: products within their bounds, rows that nobody else can move, and a model that is the
float32 one of the same weights, but for the rounding of rows."""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from helpers import assert_idle, tiny_folder
from nano_vllm import LLM, SamplingParams, bfloat16, cpu_kernels, cpu_steps
from nano_vllm.attention import TorchAttention
from nano_vllm.bfloat16 import Bfloat16Product, EitherProduct, LibraryProduct, bfloat16_linear, bfloat16_ops, library_border
from nano_vllm.cpu_kernels import CAN_BUILD, PlainProduct, can_build, predefined_macros, toolchain
from nano_vllm.cpu_products import TiledProduct
from nano_vllm.layers import OPS, Ops, choose_ops
from nano_vllm.model import ModelConfig
from nano_vllm.weights import load_model
from test_cpu_kernels import ROUNDING, target
from test_cpu_products import check_product, random
from test_cpu_steps import FITTING
from test_model import make, our_logits

compiled = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
seeds = st.integers(0, 2**31)
HALF = torch.bfloat16


@compiled
@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 70), st.sampled_from([16, 32, 112, 576]), st.sampled_from([16, 32, 64, 160]), st.booleans(), st.booleans())
def test_the_product(seed, rows, inputs, outputs, has_bias, widen):
    "Against exact sums: of the rows themselves, or of the rows rounded to bfloat16, where the processor multiplies pairs."
    x, weight, bias = random(seed, rows, inputs), random(seed + 1, outputs, inputs).to(HALF), random(seed + 2, outputs)
    product = Bfloat16Product(weight, widen)
    rounds = not widen and "__AVX512BF16__" in predefined_macros(toolchain().compile)
    seen = x.to(HALF).float() if rounds else x
    assert torch.equal(product(x), product(seen))
    check_product(product, seen, weight.float(), bias if has_bias else None)


@compiled
@pytest.mark.parametrize("widen", [False, True])
def test_a_row_is_the_same_in_every_batch(widen):
    x, product = random(0, 40, 64), Bfloat16Product(random(1, 96, 64).to(HALF), widen)
    for n in range(1, 40): assert torch.equal(product(x[:n]), product(x)[:n])
    assert torch.equal(product(x.view(4, 10, 64)).view(40, 96), product(x))


@compiled
def test_what_does_not_fit_is_held_in_float32(monkeypatch):
    finding(monkeypatch, NEVER)
    kinds = {(o, i): type(bfloat16_linear(torch.randn(o, i).to(HALF))) for o, i in ((32, 32), (32, 24), (33, 32))}
    assert kinds[32, 32] is Bfloat16Product and kinds[32, 24] is TiledProduct
    assert kinds[33, 32] not in (Bfloat16Product, TiledProduct, PlainProduct)


FAMILIES = [("Llama", {}), ("Llama", dict(attention_bias=True, mlp_bias=True)), ("Qwen2", dict(tie_word_embeddings=True)), ("Qwen3", {}),
            ("Llama", dict(hidden_size=72, intermediate_size=40))]


@compiled
@pytest.mark.parametrize("name", ["bfloat16", "auto"])
@pytest.mark.parametrize("family, changes", FAMILIES)
def test_a_model_is_the_float32_one_of_the_same_weights(family, changes, name, tmp_path):
    """Rows are rounded on their way into each product: 2**-9 of their size at most, four times a layer and once for the logits.

    The errors partly cancel, so a tenth of all of them together leaves room and would not hide a wrong number."""
    make(family, tmp_path, **FITTING | changes)
    config, ids = ModelConfig.from_folder(tmp_path), [(7*i + i*i) % 90 for i in range(40)]
    same = load_model(tmp_path, config, HALF, "cpu").float()
    ours = load_model(tmp_path, config, HALF, "cpu", ops=choose_ops(target(config, HALF), name))
    expected, logits = our_logits(same, ids), our_logits(ours, ids)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() < 2**-9 * (4*config.num_layers + 1)
    held = {n: p.dtype for n, p in ours.named_parameters()}
    assert all(dtype == (HALF if "embed" in n or "lm_head" in n else torch.float32) for n, dtype in held.items())
    assert {n for n, p in ours.named_parameters() if p.dim() == 2} == {"model.embed_tokens.weight"}


NEVER, ALWAYS, FROM_8 = {1: (1, 2), 8: (1, 2)}, {1: (2, 1), 8: (2, 1)}, {1: (1, 2), 8: (2, 1)}
with_library = pytest.mark.skipif(not can_build() or cpu_kernels.LANES < 16, reason="oneDNN has no product in bfloat16 for this CPU")


def finding(monkeypatch, times): monkeypatch.setattr(bfloat16, "product_times", lambda: times)


@with_library
@pytest.mark.parametrize("times, kind", [(NEVER, Bfloat16Product), (ALWAYS, LibraryProduct), (FROM_8, EitherProduct)], ids=["never", "always", "from 8"])
def test_where_the_library_is_faster_it_gets_the_matrices(times, kind, tmp_path, monkeypatch):
    "Its results are rounded to bfloat16, too, so there is twice as much to allow."
    finding(monkeypatch, times)
    make("Qwen2", tmp_path, **FITTING)
    config, ids = ModelConfig.from_folder(tmp_path), list(range(40))
    same = load_model(tmp_path, config, HALF, "cpu").float()
    ours = load_model(tmp_path, config, HALF, "cpu", ops=choose_ops(target(config, HALF)))
    kinds = {type(m.product) for m in ours.model.modules() if getattr(m, "product", None)}
    assert kinds & {Bfloat16Product, LibraryProduct, EitherProduct} == {kind}
    for some in (ids, ids[:7]):
        expected, logits = our_logits(same, some), our_logits(ours, some)
        assert logits.dtype == torch.float32 and (logits - expected).norm() / expected.norm() < 2**-8 * (4*config.num_layers + 1)


@with_library
def test_few_rows_are_ours_and_many_the_librarys():
    weight, x, bias = random(1, 96, 64).to(HALF), random(0, 40, 64), random(2, 96)
    ours, library, either = Bfloat16Product(weight), LibraryProduct(weight), EitherProduct(weight, 8)
    for n in (1, 7, 8, 40):
        owner, other = (ours, library) if n < 8 else (library, ours)
        assert torch.equal(either(x[:n], bias), owner(x[:n], bias)) and not torch.equal(either(x[:n], bias), other(x[:n], bias))
    assert torch.equal(either(x.view(2, 20, 64)), library(x.view(2, 20, 64)))      # rows, not the first dimension


@with_library
def test_a_step_from_the_border_on_is_not_one_call(tmp_path, monkeypatch):
    "Steps of few tokens go through all layers at once, by our products; others layer by layer, by oneDNN's."
    finding(monkeypatch, FROM_8)
    run, alone, together = cpu_steps.LayerTable.run, [], []
    monkeypatch.setattr(cpu_steps.LayerTable, "run", lambda self, x, *args: (alone.append(len(x)), run(self, x, *args)))
    monkeypatch.setattr(EitherProduct, "__call__", lambda self, x, bias=None: (together.append(x.numel() // x.shape[-1]), self.library(x, bias))[1])
    llm = LLM(tiny_folder(tmp_path, **FITTING), dtype="bfloat16", num_kv_blocks=60)
    llm.generate([[5] * n for n in (7, 8, 20)], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    llm.generate([5] * 7, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert set(alone) == {1, 3, 7} and {n for n in together if n > 7} == {35}
    assert_idle(llm)


@pytest.mark.parametrize("times, border", [
    (NEVER, math.inf), (ALWAYS, 1), (FROM_8, 8), ({8: (3, 2), 64: (3, 2.01)}, math.inf), ({8: (3, 2), 64: (3, 2)}, 8),
    ({1: (3, 1), 8: (1, 1), 64: (3, 1)}, 64), ({64: (3, 1), 8: (1, 1), 1: (3, 1)}, 64)])
def test_the_library_has_to_be_much_faster(times, border): assert library_border(times) == border


@pytest.fixture
def asked(tmp_path, monkeypatch):
    "The numbers of rows that were timed, in pretence, with a cache that is empty at first."
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path))
    rows_asked = []
    monkeypatch.setattr(bfloat16, "time_both", lambda rows: (rows_asked.append(rows), (0.25, rows))[1])
    return rows_asked


def measure(): return bfloat16.product_times.__wrapped__()      # as another process would


@with_library
def test_products_are_timed_once_on_a_machine(asked, tmp_path, monkeypatch):
    "What was found is kept, whole, for those processors, threads and versions of PyTorch for which it holds."
    first = measure()
    assert list(first) == asked == list(bfloat16.TIMED_ROWS) and measure() == first == {n: (0.25, n) for n in asked} and len(asked) == len(first)
    kept, = (tmp_path/"products").iterdir()
    for change in (lambda: monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"), lambda: monkeypatch.setattr(torch, "__version__", "9"),
                   lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
                   lambda: monkeypatch.setattr(bfloat16, "predefined_macros", lambda _: "#define __AMX_BF16__ 1")):
        before = len(asked)
        change()
        measure()
        assert len(asked) == before + len(first)
    assert len(list((tmp_path/"products").iterdir())) == 5 and kept.exists()


@with_library
@pytest.mark.parametrize("held", [b"", b"{", b"null", b"[]", b"3", b'{"1": null}', b'{"1": [1]}', b'{"a": [1, 2]}', b'{"1": ["x", 2]}', b"\xff\x00"], ids=str)
def test_a_file_that_holds_no_times_is_replaced(held, asked, tmp_path):
    path = tmp_path/"products"/f"{bfloat16.times_key()}.json"
    path.parent.mkdir()
    path.write_bytes(held)
    assert measure() == measure() and len(asked) == len(bfloat16.TIMED_ROWS) and list(path.parent.iterdir()) == [path]


@with_library
@pytest.mark.parametrize("spoil", [lambda products: products.write_text(""), lambda products: None], ids=["no folder", "a folder where the file should be"])
def test_a_cache_that_takes_nothing_stops_no_engine(spoil, asked, tmp_path):
    "As one that belongs to somebody else: the products are timed, and what was found is used."
    spoil(tmp_path/"products")
    if not (tmp_path/"products").exists(): (tmp_path/"products"/f"{bfloat16.times_key()}.json").mkdir(parents=True)
    assert measure() == {n: (0.25, n) for n in bfloat16.TIMED_ROWS}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tmp")]


@with_library
def test_engines_that_start_together_disturb_nobody(asked, tmp_path):
    "Threads of one process here, which also share its number."
    key = bfloat16.times_key()
    for _ in range(10):
        with ThreadPoolExecutor(8) as threads: made = list(threads.map(lambda _: measure(), range(8)))
        assert made == [made[0]] * 8 and [path.name for path in (tmp_path/"products").iterdir()] == [f"{key}.json"]
        (tmp_path/"products"/f"{key}.json").unlink()


@with_library
def test_a_measurement_is_of_both():
    times = bfloat16.time_both(rows=2, size=64, copies=2)
    assert len(times) == 2 and all(0 < t < 1 for t in times)


def test_where_it_suits(tmp_path, monkeypatch):
    make("Llama", tmp_path, **FITTING)
    asked = target(ModelConfig.from_folder(tmp_path), HALF)
    if CAN_BUILD: assert choose_ops(asked) == OPS["bfloat16_steps"](asked)
    others = dict(dtype=torch.float16), dict(dtype=torch.float32), dict(quantization="int8"), dict(compile=True), dict(device=torch.device("cuda"))
    for change in others: assert bfloat16_ops(replace(asked, **change)) is None
    assert bfloat16_ops(replace(asked, config=replace(asked.config, mlp=lambda *_: None))) is None      # experts
    monkeypatch.setattr(cpu_kernels, "CAN_BUILD", False)
    assert bfloat16_ops(asked) is None and choose_ops(asked) == Ops()


@compiled
@pytest.mark.parametrize("options", [{}, dict(quantization="int8"), dict(tensor_parallel_size=2)], ids=["", "int8", "two ranks"])
def test_the_engine(options, tmp_path, monkeypatch):
    """A bfloat16 checkpoint takes the kernels and a bfloat16 cache by default; answers do not depend on the batch or on chunks.

    So they are where all products are ours; oneDNN's would round the rows of a larger step in another way."""
    if "tensor_parallel_size" in options and cpu_kernels.LANES == 16 and library_border(bfloat16.product_times()) < math.inf:
        pytest.skip("the process of the other rank would take oneDNN's")
    finding(monkeypatch, NEVER)
    folder = tiny_folder(tmp_path, **FITTING)
    prompts = ["Hello", "Once upon a time there was a cat", "1 2 3 " * 20]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True) for t in (0.0, 0.8, 0.0)]
    llm = LLM(folder, dtype="bfloat16", num_kv_blocks=60, **options)
    runner = llm.engine.runner
    assert runner.ops.hidden_dtype == torch.float32 and runner.kv_cache.dtype == HALF
    together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert_idle(llm)
    small = LLM(folder, dtype="bfloat16", num_kv_blocks=60, max_num_batched_tokens=8, enable_prefix_caching=False, **options)
    alone = [small.generate(p, q, use_tqdm=False)[0]["token_ids"] for p, q in zip(prompts, params)]
    assert alone == together


@compiled
def test_by_another_backend(tmp_path):
    "Attention by gather takes float32 queries over a bfloat16 cache, too."
    folder, greedy = tiny_folder(tmp_path, **FITTING), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = []
    for backend in ("auto", "torch", "reference"):
        llm = LLM(folder, dtype="bfloat16", num_kv_blocks=60, attention_backend=backend)
        answers.append(llm.generate("Once upon a time", greedy, use_tqdm=False)[0]["token_ids"])
    assert answers[0] == answers[1] == answers[2]
