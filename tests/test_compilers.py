"""The kernels by other compilers and for other processors: all of them compile without a warning, and give PyTorch's numbers.

An ARM processor is emulated: `apt-get install clang libomp-dev g++-aarch64-linux-gnu qemu-user` brings all that is needed on Debian."""
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nano_vllm import SamplingParams, bfloat16, cpu_attention, cpu_kernels, cpu_products, cpu_steps, int4, lora, quantization
from nano_vllm.attention import make_batch
from nano_vllm.bfloat16 import bfloat16_product
from nano_vllm.cpu_kernels import COMMON, InPlaceQueries, Queries, Toolchain, build, can_build, run_compiler, toolchain
from nano_vllm.cpu_products import Matrix, tiled
from nano_vllm.cpu_steps import Layer, Step
from nano_vllm.kv_blocks import ScheduledSequence
from nano_vllm.layers import Rotary, rms_norm, rotate, silu_and_mul
from nano_vllm.lora import LoRARecord
from nano_vllm.quantization import hadamard, quantize
from nano_vllm.sampler import SamplingMetadata, make_keys, random_sample
from test_attention import new

TESTS = Path(__file__).parent
ROUNDING = 2**-24
WARNINGS = "-Wall -Wextra -Werror -Wno-unused-function -Wno-unused-const-variable -Wno-align-mismatch".split()   # the pieces stand in several libraries
HEAD_DIM, KV_HEADS, GROUP, INPUTS = 32, 2, 3, 64


def sources(bits, registers=False):
    "All libraries of the project, by name: (C++, constants), for a cache of numbers with `bits` bits; `registers`: with AMX."
    found, heads = {}, (HEAD_DIM, KV_HEADS, GROUP, bits)
    def keep(source, **numbers):
        found[name] = source, numbers
        return MagicMock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (cpu_kernels, cpu_products, quantization, cpu_attention, cpu_steps): patch.setattr(module, "load_library", keep)
        patch.setattr(bfloat16, "has_tile_registers", lambda: registers)
        for name, make in {"decode": lambda: cpu_kernels.kernels.__wrapped__(*heads), "small": cpu_kernels.small_kernels.__wrapped__,
                           "product": cpu_products.float_product.__wrapped__, "rope": lambda: cpu_products.rope_kernel.__wrapped__(*heads),
                           "draw": cpu_products.draw_kernel.__wrapped__, "bfloat16": lambda: bfloat16_product.__wrapped__(registers=registers),
                           "widened": lambda: bfloat16_product.__wrapped__(True), "quantize": lambda: quantization.quantize_kernel.__wrapped__(INPUTS),
                           "int8": lambda: quantization.int8_product.__wrapped__(INPUTS, registers=registers), "int4": lambda: int4.int4_product.__wrapped__(INPUTS),
                           "attend_all": lambda: cpu_attention.attention_kernel.__wrapped__(*heads),
                           "run_layers": lambda: cpu_steps.run_layers_kernel.__wrapped__(*heads), "lora": lora.lora_product_kernel.__wrapped__}.items(): make()
    return found


# ---- compilers of this machine

needs_kernels = pytest.mark.skipif(not can_build(), reason="no kernels for this CPU here")
NAMES = [pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name} here")) for name in ("g++", "clang++")]


def run_python(code, **environment):
    "Run `code` in a process of its own: what it prints, without the end of the line."
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.ci
@needs_kernels
@pytest.mark.parametrize("compiler", NAMES)
def test_every_library_is_read_without_a_warning(compiler):
    words = [compiler, *toolchain().compile[1:], *WARNINGS, "-fsyntax-only", "-xc++", "-"]
    for source, *numbers in {(source, *numbers.items()) for bits in (32, 16) for source, numbers in sources(bits).values()}:
        run_compiler(*words, f"-DLANES={cpu_kernels.LANES}", *(f"-D{key}={n}" for key, n in numbers), source=source)


ASK = "from nano_vllm.cpu_kernels import can_build, toolchain; print(can_build(), *(toolchain() or [()])[0])"


@needs_kernels
@pytest.mark.parametrize("compiler", NAMES)
def test_the_variable_names_the_compiler(compiler, tmp_path):
    "With words before it or behind it, as users have them; another compiler has another library."
    out, said = run_python(ASK, CXX=f"env {compiler} -g0", NANO_VLLM_CACHE=str(tmp_path))
    if not out.startswith("True"): pytest.skip(f"{compiler} has no OpenMP here: {said}")
    assert out.startswith(f"True env {compiler} -g0 -std") and not said


@pytest.mark.parametrize("compiler", [pytest.param("clang++", marks=NAMES[1].marks)])
@pytest.mark.slow
def test_kernels_by_another_compiler_pass_their_tests(compiler):
    out, said = run_python(ASK, CXX=compiler)
    if not out.startswith("True"): pytest.skip(f"{compiler} has no OpenMP here: {said}")
    files = [f"tests/test_{name}.py" for name in ("cpu_kernels", "cpu_products", "cpu_attention", "cpu_steps", "bfloat16", "quantization", "lora", "batch_invariance")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files], cwd=TESTS.parent,
                          env=os.environ | dict(CXX=compiler), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


REFUSES = {"OpenMP as Apple's compiler does": ("-fopenmp", True), "OpenMP altogether": ("-Xclang|-fopenmp", False),
           "this processor": ("-march=native", False), "C++17": ("-std=gnu++17", False)}


@pytest.mark.ci
@needs_kernels
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="another compiler is made of g++ on Linux")
@pytest.mark.parametrize("refused", REFUSES)
def test_what_a_compiler_refuses_costs_the_kernels_at_most(refused, tmp_path):
    """A compiler that behaves as Apple's, with the tries for macOS: it takes -fopenmp behind -Xclang only, and its linker leaves functions open.

    Where no try is left the log says why, once; the kernels' tests show that the engine answers all the same."""
    words, builds = REFUSES[refused]
    compiler = tmp_path/"apple clang++"
    compiler.write_text(f"""#!/bin/sh
for word in "$@"; do
  case "$before$word" in {words}) echo "unsupported option $word" >&2; exit 1;; esac
  [ "$word" = -Xclang ] && before=$word || before=
  case "$word" in -Xclang|-undefined|dynamic_lookup) shift;; *) shift; set -- "$@" "$word";; esac
done
exec g++ "$@"
""")
    compiler.chmod(0o755)
    code = f"from nano_vllm import cpu_kernels; cpu_kernels.OPENMP['linux'] = cpu_kernels.OPENMP['darwin']; {ASK}; can_build()"
    out, said = run_python(code, CXX=f"'{compiler}'", NANO_VLLM_CACHE=str(tmp_path/"cache"))
    assert out.split()[0] == str(builds) and ("-Xclang -fopenmp" in out) == builds
    assert said.count("no kernels for the CPU, PyTorch's path is taken") + builds == 1 and ("unsupported option" in said) != builds


@pytest.mark.ci
@needs_kernels
def test_a_variable_that_is_no_command_costs_the_kernels_at_most(tmp_path):
    out, said = run_python(ASK, CXX="g++ '-g", NANO_VLLM_CACHE=str(tmp_path))
    assert out == "False" and said.count("no kernels for the CPU") == 1 and "CXX is not a command: No closing quotation" in said
    out, said = run_python(ASK, CXX="  ", NANO_VLLM_CACHE=str(tmp_path))
    assert out.startswith("True") and not said


@pytest.mark.ci
def test_without_a_compiler_the_log_says_so_once(tmp_path):
    code = "from nano_vllm.cpu_kernels import can_build; print(can_build(), can_build())"
    out, said = run_python(code, PATH=str(tmp_path), CXX="")
    assert out == "False False" and said.count("no kernels for the CPU") == 1 and "they need g++ or clang++" in said
    out, said = run_python(code, CXX=str(tmp_path/"nothing"))
    assert out == "False False" and said.count("no kernels for the CPU") == 1 and "nothing" in said


# ---- ARM, emulated

CROSS, QEMU, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
ADDRESS, SIZE = 0x20_0000_0000, 2**24
emulated = pytest.mark.skipif(not (sys.platform == "linux" and shutil.which(CROSS) and shutil.which(QEMU)), reason=f"no {CROSS} or no {QEMU} here")


class Guest:
    "An emulated processor with kernels, and memory that it shares with this process."
    def __init__(self, folder):
        self.folder, self.program, self.memory = folder, folder/"call_kernels", folder/"memory"
        subprocess.run([CROSS, TESTS/"call_kernels.cpp", "-std=gnu++17", "-O1", "-ldl", "-o", self.program], check=True)
        self.memory.write_bytes(bytes(SIZE))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int]*3 + [ctypes.c_long]
        there_or_nowhere = 0x100000     # MAP_FIXED_NOREPLACE
        with open(self.memory, "r+b") as file:
            place = libc.mmap(ADDRESS, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | there_or_nowhere, file.fileno(), 0)
        assert place == ADDRESS, os.strerror(ctypes.get_errno())
        self.next, self.stores = ADDRESS, []

    def room(self, size):
        "The address of so many bytes that nobody has yet."
        place, self.next = self.next, self.next + -(-size // 64) * 64
        assert self.next <= ADDRESS + SIZE
        return place

    def put(self, x):
        "A copy of a tensor in the shared memory."
        data = (ctypes.c_char * x.nbytes).from_address(self.room(x.nbytes))
        return torch.frombuffer(data, dtype=x.dtype).view(x.shape).copy_(x)

    def record(self, kind, **fields):
        "The address of a record of C, whose tensors are in the shared memory."
        place = self.room(ctypes.sizeof(kind))
        kind.from_address(place).__init__(**{name: x.data_ptr() if isinstance(x, torch.Tensor) else x for name, x in fields.items()})
        return place

    def matrix(self, packed, shape, library="product", march="armv8-a", **fields):
        "The address of a matrix of a shape (outputs, inputs), whose product is a library's."
        place = self.record(Matrix, packed=packed, outputs=shape[0], inputs=shape[1], **fields)
        self.stores.append(f"store {place} {self.library(library, march)} product")
        return place

    def library(self, name, march="armv8-a", bits=32):
        path = self.folder/f"{name}-{march}-{bits}.so"
        if not path.exists():
            source, numbers = sources(bits)[name]
            defines = [f"-D{key}={n}" for key, n in dict(LANES=4, **numbers).items()]
            build(Toolchain((CROSS, *COMMON, f"-march={march}", "-fopenmp"), (CROSS, "-shared", "-fopenmp")), source, defines, path)
        return path

    def call(self, name, function, *numbers, number=0.0, **which):
        "Call a function of a library with whole numbers, addresses and tensors, and the one float it takes."
        words = [str(n.data_ptr() if isinstance(n, torch.Tensor) else n or 0) for n in numbers]
        lines = [f"map {self.memory} {ADDRESS} {SIZE}", *self.stores, " ".join(["call", str(self.library(name, **which)), function, str(number), *words])]
        done = subprocess.run([QEMU, "-cpu", "max", "-L", ROOT, self.program], input="\n".join(lines), text=True, capture_output=True,
                              env=os.environ | dict(OMP_NUM_THREADS="2"))
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "TILE_OUTPUTS", 16)      # of a tile for vectors of 4 numbers
        for name, number in dict(LANES=4, WIDE=4).items(): patch.setattr(int4, name, number)
        yield Guest(tmp_path_factory.mktemp("guest"))


def random(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(ours, exact, terms):
    "Are these sums of so many terms, each term off by a rounding or two, and the sum by as many as it has terms?"
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=float(terms * 2 * ROUNDING * exact.abs().max()))


@emulated
def test_norm_and_activation(guest):
    x, residual, weight, out, total = map(guest.put, (random(5, 48), random(5, 48) * 7, random(48), torch.zeros(5, 48), torch.zeros(5, 48)))
    guest.call("small", "norm", x, residual, weight, out, total, 5, 48, number=1e-6)
    assert torch.equal(total, x + residual)
    close(out, rms_norm(total.double(), weight.double(), 1e-6), 48)
    guest.call("small", "norm", x, None, weight, out, out, 5, 48, number=1e-6)
    close(out, rms_norm(x.double(), weight.double(), 1e-6), 48)
    wide = guest.put(random(5, 96) * 20)
    guest.call("small", "swiglu", wide, out, 5, 48)
    close(out, silu_and_mul(wide.double()), 8)


@emulated
@pytest.mark.parametrize("library", ["product", "bfloat16", "widened"])
@pytest.mark.parametrize("rows", [1, 5, 6, 13])
def test_products(guest, library, rows):
    weight, x, bias, y = random(48, INPUTS), guest.put(random(rows, INPUTS)), guest.put(random(48)), guest.put(torch.zeros(rows, 48))
    if library != "product": weight = weight.bfloat16()
    packed = guest.put(tiled(weight if library == "product" else weight.view(torch.int32)))
    matrix = guest.matrix(packed, weight.shape, library)
    for b in (bias, None):
        guest.call(library, "product", matrix, x, b, y, rows)
        close(y, F.linear(x.double(), weight.double(), None if b is None else b.double()), INPUTS)


@emulated
@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod", "armv8.6-a"])
def test_whole_numbers(guest, march):
    "By multiplications of 32 bits, by `sdot` and by `usdot`."
    weight, x, bias, y = random(48, INPUTS), guest.put(random(7, INPUTS)), guest.put(random(48)), guest.put(torch.zeros(7, 48))
    q, scale = guest.put(torch.zeros(7, INPUTS, dtype=torch.int8)), guest.put(torch.zeros(7, 1))
    guest.call("quantize", "quantize", x, q, scale, 7, march=march)
    expected_q, expected_scale = quantize(hadamard(x))
    close(scale, expected_scale, 16)
    assert (q - expected_q).abs().max() <= 1 and (q != expected_q).float().mean() < 0.01     # in the middle of two either way is right
    w, w_scale = quantize(hadamard(weight))
    matrix = guest.matrix(guest.put(tiled(w.view(torch.int32))), weight.shape, "int8", march, scale=guest.put(w_scale[:, 0].contiguous()),
                          excess=guest.put(128 * w.sum(1, dtype=torch.int32)))
    guest.call("int8", "product", matrix, x, bias, y, 7, march=march)
    close(y, (q.double() @ w.double().T) * scale.double() * w_scale[:, 0].double() + bias.double(), 8)
    dots = dict(zip(("sdot", "usdot"), ("dotprod" in march, "8.6" in march)))
    text = subprocess.run([CROSS.replace("g++", "objdump"), "-d", guest.library("int8", march)], capture_output=True, text=True, check=True).stdout
    assert {word: f"\t{word}\t" in text for word in dots} == dots


@emulated
@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod"])
def test_four_bits(guest, march):
    "By multiplications of 32 bits and by `sdot`."
    weight, x, bias, y = random(48, INPUTS), random(7, INPUTS), guest.put(random(48)), guest.put(torch.zeros(7, 48))
    q, scale = int4.quantize_groups(hadamard(weight))
    matrix = guest.matrix(guest.put(int4.pack_blocks(q, scale)), weight.shape, "int4", march)
    guest.call("int4", "product", matrix, guest.put(x), bias, y, 7, march=march)
    rows, row_scale = quantize(hadamard(x))
    exact = (rows.double() * row_scale.double()) @ (q.double() * scale.double().repeat_interleave(int4.GROUP, 1)).T + bias.double()
    unit = float((row_scale * scale.float().abs().max() * 8).max())       # what one step more or less of an input can do
    assert (y.double() - exact).abs().max() <= 2 * unit and (y.double() - exact).abs().mean() < unit / 4
    text = subprocess.run([CROSS.replace("g++", "objdump"), "-d", guest.library("int4", march)], capture_output=True, text=True, check=True).stdout
    assert ("\tsdot\t" in text) == ("dotprod" in march)


@emulated
def test_the_draw(guest):
    rows = [SimpleNamespace(params=SamplingParams(temperature=t), seed=5 + i, prompt_token_ids=[1], output_token_ids=[5] * i, stop_token_ids=set())
            for i, t in enumerate((1.0, 0.3, 2.0))]
    metadata, x = SamplingMetadata.of(rows), random(3, 160)
    tokens = guest.put(torch.zeros(3, dtype=torch.int64))
    keys = make_keys(metadata.seeds, metadata.num_output_tokens)
    guest.call("draw", "draw", *map(guest.put, (x, keys, metadata.temperature)), tokens, *x.shape)
    assert torch.equal(tokens, random_sample(x, metadata))


def rotation(positions):
    "cos and sin for positions, (N, 1, HEAD_DIM) each."
    return Rotary(HEAD_DIM, dict(rope_theta=1e4), 512)(positions)


def attended(q, keys, values, batch, scale):
    "What tokens with queries (N, heads, HEAD_DIM) see of a cache (blocks, size, KV heads, HEAD_DIM), text by text; float64."
    out, first = [], 0
    for table, n, length in zip(batch.block_tables, batch.query_lens, batch.context_lens):
        k, v = (c.double()[table].flatten(0, 1)[:length].repeat_interleave(GROUP, 1) for c in (keys, values))
        scores = torch.einsum("nhd,lhd->hnl", q[first:first + n].double(), k) * scale
        later = torch.arange(length) > torch.arange(length - n, length)[:, None]
        out.append(torch.einsum("hnl,lhd->nhd", scores.masked_fill(later, -torch.inf).softmax(-1), v))
        first += n
    return torch.cat(out)


def step(guest):
    "A batch of a decode, a short piece and a longer one, and the record of its queries."
    texts = [(40, 39, [0, 5, 1]), (21, 18, [2, 7]), (70, 40, [6, 3, 9, 8, 4])]
    batch = make_batch([ScheduledSequence(new(n, start, table), start, n - start, True) for n, start, table in texts], 16)
    part = InPlaceQueries(batch, np.arange(3), 16)
    tables, tokens, table_rows, starts, ends = map(guest.put, part.tensors)
    return batch, guest.record(Queries, block_tables=tables, table_rows=table_rows, tokens=tokens, starts=starts, ends=ends, num_tokens=len(tokens),
                               stride=tables.stride(0), block_size=16)


@emulated
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("library, function", [("decode", "decode"), ("attend_all", "attend_all")])
def test_attention(guest, library, function, bits):
    batch, queries = step(guest)
    cache = random(2, 10, 16, KV_HEADS, HEAD_DIM).to(torch.float32 if bits == 32 else torch.bfloat16)
    q = random(len(batch.positions), GROUP * KV_HEADS, HEAD_DIM)
    out = guest.put(torch.zeros(q.shape))
    guest.call(library, function, queries, guest.put(q), *map(guest.put, cache), out, number=0.25, bits=bits)
    close(out, attended(q, *cache, batch, 0.25), HEAD_DIM + 70)


def all_layers(weights, x, batch, cache, eps):
    "What layers of `weights` make of hidden states, in float64; `cache` (layers, 2, ...) is written."
    residual, (cos, sin) = torch.zeros_like(x), (t.double() for t in rotation(batch.positions))
    for w, (keys, values) in zip(weights, cache):
        residual = residual + x
        q, k, v = F.linear(rms_norm(residual, w["norm"], eps), w["qkv"], w["qkv_bias"]).unflatten(-1, (-1, HEAD_DIM)).split([GROUP * KV_HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = (rotate(rms_norm(t, w[name], eps), cos, sin) for t, name in ((q, "q_norm"), (k, "k_norm")))
        for pages, new in ((keys, k), (values, v)): pages.flatten(0, 1)[batch.slot_mapping] = new
        x = F.linear(attended(q, keys, values, batch, HEAD_DIM**-0.5).flatten(1), w["o"])
        residual = residual + x
        x = F.linear(silu_and_mul(F.linear(rms_norm(residual, w["mlp_norm"], eps), w["gate_up"])), w["down"])
    return x, residual


@emulated
def test_all_layers_in_one_call(guest):
    "With it the rotation into the cache, whose function it contains."
    batch, queries = step(guest)
    hidden, inner, N, eps = 64, 96, len(batch.positions), 1e-5
    heads, kv = GROUP * KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = dict(qkv=(heads + 2*kv, hidden), o=(hidden, heads), gate_up=(2*inner, hidden), down=(hidden, inner))
    weights = []
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        w = {name: torch.randn(shape, generator=g) / shape[1]**0.5 for name, shape in shapes.items()}
        w |= {name: torch.randn(n, generator=g) for name, n in dict(qkv_bias=heads + 2*kv, norm=hidden, mlp_norm=hidden, q_norm=HEAD_DIM, k_norm=HEAD_DIM).items()}
        weights.append(w)
    records = [{name: guest.matrix(guest.put(tiled(t)), t.shape) if name in shapes else guest.put(t) for name, t in w.items()} for w in weights]
    table = guest.room(2 * ctypes.sizeof(Layer))
    for i, record in enumerate(records):
        ctypes.memmove(table + i * ctypes.sizeof(Layer), guest.record(Layer, **record), ctypes.sizeof(Layer))
    x, cache = random(N, hidden), random(2, 2, 10, 16, KV_HEADS, HEAD_DIM)
    cos, sin = (t.flatten(1) for t in rotation(batch.positions))
    tensors = dict(hidden_states=x, residual=torch.zeros(N, hidden), normed=torch.zeros(N, hidden), wide=torch.zeros(N, max(heads + 2*kv, 2*inner)),
                   gated=torch.zeros(N, inner), q=torch.zeros(N, heads), attended=torch.zeros(N, heads), cos=cos, sin=sin,
                   slot_mapping=batch.slot_mapping, kv_cache=cache)
    tensors = {name: guest.put(t) for name, t in tensors.items()}
    place = guest.record(Step, layers=table, num_layers=2, num_tokens=N, hidden_size=hidden, intermediate_size=inner, eps=eps, scale=HEAD_DIM**-0.5,
                         cache_size=cache[0, 0].numel(), queries=queries, **tensors)
    guest.call("run_layers", "run_layers", place)
    exact_cache = cache.double()
    exact = all_layers([{name: t.double() for name, t in w.items()} for w in weights], x.double(), batch, exact_cache, eps)
    terms = 2 * (4*hidden + HEAD_DIM + 70 + heads + inner)    # as `close` of the kernels' tests counts
    for ours, expected in zip((tensors["hidden_states"], tensors["residual"], tensors["kv_cache"]), (*exact, exact_cache)): close(ours, expected, terms)


@emulated
@pytest.mark.parametrize("bits", [32, 16])
def test_rotating_and_storing(guest, bits):
    N, dtype = 5, torch.float32 if bits == 32 else torch.bfloat16
    qkv, slots = random(N, (GROUP + 2) * KV_HEADS * HEAD_DIM), torch.tensor([3, 17, 0, 30, 31])
    q, norms = guest.put(torch.zeros(N, GROUP * KV_HEADS, HEAD_DIM)), [random(HEAD_DIM), random(HEAD_DIM + 1)[1:]]
    cache, (cos, sin) = guest.put(torch.zeros(2, 32, KV_HEADS, HEAD_DIM, dtype=dtype)), rotation(torch.arange(N) * 9)
    guest.call("rope", "rope_and_cache", *map(guest.put, (qkv, *norms, cos, sin, slots)), q, *cache, N, number=1e-5, bits=bits)
    exact = qkv.double().unflatten(-1, (-1, HEAD_DIM)).split([GROUP * KV_HEADS, KV_HEADS, KV_HEADS], 1)
    exact_q, exact_k = (rotate(rms_norm(t, w.double(), 1e-5), cos.double(), sin.double()) for t, w in zip(exact, norms))
    close(q, exact_q, HEAD_DIM)
    for pages, numbers in zip(cache, (exact_k, exact[2])):
        if bits == 32: close(pages[slots], numbers, HEAD_DIM)
        else: torch.testing.assert_close(pages[slots].double(), numbers, rtol=2**-8 * 1.01, atol=1e-6)
    assert torch.equal((cache != 0).any(-1).any(-1).nonzero()[:, 1].sort().values, slots.repeat(2).sort().values)


@emulated
def test_adapters(guest):
    "Rows 1 and 4 of six have an adapter of rank 8, in slot 1."
    inputs, outputs, N = INPUTS, 48, 6
    weight, x, a, b = random(outputs, inputs), random(N, inputs), random(2, 8, inputs), random(2, 8, outputs)
    y, seen = guest.put(torch.zeros(N, outputs)), guest.put(torch.zeros(1, dtype=torch.int64))
    rows, slots, ranks = (guest.put(torch.tensor(numbers)) for numbers in ([1, 4], [1, 1], [0, 8]))
    spans = guest.put(torch.tensor([0, outputs]).repeat(2, 8, 1))
    tokens = guest.put(torch.tensor([rows.data_ptr(), slots.data_ptr(), 2]))
    base = guest.matrix(guest.put(tiled(weight)), weight.shape)
    record = guest.record(LoRARecord, base=base, a=guest.put(a), b=guest.put(b), max_rank=8, ranks=ranks, spans=spans, tokens=tokens, seen=seen)
    matrix = guest.record(Matrix, packed=record, outputs=outputs, inputs=inputs)
    guest.call("lora", "product", matrix, guest.put(x), None, y, N)
    exact = x.double() @ weight.double().T
    for row in (1, 4): exact[row] += (x[row].double() @ a[1].double().T) @ b[1].double()
    close(y, exact, 2 * inputs)
    assert seen.item() == N
