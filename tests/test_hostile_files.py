"""Files as an enemy, or a bad disk, would write them: each is refused by a ValueError that names it, in time, with nothing left behind.

The cases are made at random from good files: bytes flipped, cut, doubled and overwritten by lengths, values of JSON replaced. NANO_VLLM_FUZZ
asks for so many of each kind (`make fuzz`)."""
import json
import os
import random
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_folder
from nano_vllm import LLM
from nano_vllm.workbench import convert_gguf, from_gguf

NUM_CASES = int(os.environ.get("NANO_VLLM_FUZZ", 30))
SECONDS = 30     # far more than any case needs, far less than for ever
LENGTHS = 0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1
VALUES = (0, -1, 1, 3, 2**31, 10**12, 10**30, 0.5, float("nan"), float("inf"), -float("inf"), "", "x", "../x", None, True, [], [1], ["x"], {},
          {"a": 1}, "\ud800", "y" * 10_000)


@contextmanager
def time_limit(seconds=SECONDS):
    def stop(*_): raise TimeoutError(f"still busy after {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def spoil_bytes(rng, data: bytes, header: int) -> bytes:
    "One to three random changes, most of them in the first `header` bytes, where sizes and names stand."
    for _ in range(rng.randint(1, 3)):
        end = max(1, min(len(data), header if rng.random() < 0.9 else len(data)))
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind == 0: data = data[:at]
        if kind == 1: data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
        if kind == 2: data = data[:at] + rng.choice(LENGTHS).to_bytes(8, "little") + data[at + 8:]
        if kind == 3: data = data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:]
        if kind == 4: data = data[:at] + data[at + rng.randint(1, 20):]
        if kind == 5: data = data[:at] + bytes(rng.randint(1, 40)) + data[at + 40:]
    return data


def spoil_value(rng, data):
    "JSON data with one value, at any depth, replaced or gone."
    if not isinstance(data, (dict, list)) or not data: return rng.choice(VALUES)
    data = dict(data) if isinstance(data, dict) else list(data)
    key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
    if rng.random() < 0.1: del data[key]
    else: data[key] = spoil_value(rng, data[key]) if rng.random() < 0.8 else rng.choice(VALUES)
    return data


def refused_or_right(work, *names):
    "Whatever `work` does, it does it in time, and a complaint is a ValueError that says where."
    try:
        with time_limit(): return work()
    except ValueError as e:
        assert not names or any(name in str(e) for name in names), e
        assert len(str(e)) < 3000, f"a message of {len(str(e))} characters"


# ---- GGUF ----

@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    "A tiny Llama with a vocabulary of 300 tokens; (the file's bytes, how many of them are the header)."
    import gguf
    rng, file = random.Random(0), tmp_path_factory.mktemp("gguf")/"good.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    sizes = dict(context_length=64, embedding_length=8, block_count=2, feed_forward_length=12, head_count=2, head_count_kv=1, key_length=4,
                 layer_norm_rms_eps=1e-5, rope_freq_base=1e4, tokenizer_model="gpt2", bos_token_id=1, eos_token_id=2)
    for name, value in sizes.items(): getattr(writer, f"add_{name}")(value)
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", "Āā"] + [chr(i) for i in range(256, 552)])
    writer.add_token_types([3] * 3 + [1] * 297)
    writer.add_token_merges(["Ā ā"])
    shapes = {"token_embd": (300, 8), "output_norm": (8,)}
    for i in range(2):
        for name in ("attn_norm", "ffn_norm"): shapes[f"blk.{i}.{name}"] = (8,)
        shapes |= {f"blk.{i}.attn_q": (8, 8), f"blk.{i}.attn_output": (8, 8), f"blk.{i}.attn_k": (4, 8), f"blk.{i}.attn_v": (4, 8),
                   f"blk.{i}.ffn_gate": (12, 8), f"blk.{i}.ffn_up": (12, 8), f"blk.{i}.ffn_down": (8, 12)}
    torch.manual_seed(0)
    for name, shape in shapes.items(): writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    data = file.read_bytes()
    return data, len(data) - sum(torch.Size(s).numel() * 4 for s in shapes.values())


def test_the_good_gguf_file(gguf_bytes, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path/"cache"))
    (tmp_path/"good.gguf").write_bytes(gguf_bytes[0])
    out = LLM(tmp_path/"good.gguf", num_kv_blocks=8, device="cpu").generate([[5, 6]], use_tqdm=False)
    assert len(out[0]["token_ids"]) > 0


def test_fuzz_gguf_bytes(gguf_bytes, tmp_path, monkeypatch):
    "Broken files are refused; those that are read leave one folder in the cache, the others none."
    data, header = gguf_bytes
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path/"cache"))
    (tmp_path/"cache").mkdir()
    for seed in range(2 * NUM_CASES):
        rng, file = random.Random(seed), tmp_path/f"case-{seed}.gguf"
        file.write_bytes(spoil_bytes(rng, data, header))
        folder = refused_or_right(lambda: from_gguf(file), file.name)
        assert os.listdir(tmp_path/"cache") == ([folder.name] if folder else []), seed
        if folder: shutil.rmtree(folder)
        file.unlink()


@pytest.mark.parametrize("count", [2**31, 2**62])
def test_a_length_that_no_file_has(gguf_bytes, tmp_path, count):
    "The reader of the library would look for two thousand million tokens behind the end of the file."
    data, _ = gguf_bytes
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8   # after the type and the items' type
    (tmp_path/"x.gguf").write_bytes(data[:at] + count.to_bytes(8, "little") + data[at + 8:])
    with time_limit(), pytest.raises(ValueError, match="and promises"): convert_gguf(tmp_path/"x.gguf", tmp_path)


# ---- The files of a model folder ----

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A small model, with the first of the demo model's tokens: it is loaded often."
    folder = tiny_folder(tmp_path_factory.mktemp("good"))
    data = json.loads((folder/"tokenizer.json").read_text())
    model = data["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 300}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair if isinstance(pair, list) else pair.split(" ")) in model["vocab"]]
    (folder/"tokenizer.json").write_text(json.dumps(data))
    assert use(folder)
    return folder


def use(folder):
    "Load the model and let it speak; True if it does."
    llm = LLM(folder, num_kv_blocks=8, device="cpu")
    return bool(llm.generate([[5, 6]], use_tqdm=False))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_fuzz_json_values(good, tmp_path, name):
    for seed in range(NUM_CASES):
        rng, folder = random.Random(f"{name} {seed}"), shutil.copytree(good, tmp_path/"model")
        data = json.loads((folder/name).read_text())
        (folder/name).write_text(json.dumps(spoil_value(rng, data)))
        refused_or_right(lambda: use(folder))
        shutil.rmtree(folder)


@pytest.mark.parametrize("name,header", [("config.json", 10**6), ("model.safetensors", 2000), ("generation_config.json", 10**6)])
def test_fuzz_bytes_of_a_model(good, tmp_path, name, header):
    for seed in range(NUM_CASES):
        rng, folder = random.Random(f"{name} {seed}"), shutil.copytree(good, tmp_path/"model")
        (folder/name).write_bytes(spoil_bytes(rng, (folder/name).read_bytes(), header))
        refused_or_right(lambda: use(folder))
        shutil.rmtree(folder)


def test_fuzz_the_index(good, tmp_path):
    folder = shutil.copytree(good, tmp_path/"model")
    (folder/"model.safetensors").rename(folder/"one.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "one.safetensors"}}
    for seed in range(NUM_CASES):
        rng = random.Random(seed)
        text = json.dumps(spoil_value(rng, index)).encode()
        (folder/"model.safetensors.index.json").write_bytes(text if seed % 2 else spoil_bytes(rng, text, len(text)))
        refused_or_right(lambda: use(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_is_no_file(good, tmp_path, name):
    "Nobody would ever write into it: a program that opened it would wait for ever."
    folder = shutil.copytree(good, tmp_path/"model")
    (folder/name).unlink(missing_ok=True)
    os.mkfifo(folder/name)
    with time_limit(), pytest.raises(ValueError, match=name): use(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_deep_json(good, tmp_path, name):
    folder = shutil.copytree(good, tmp_path/"model")
    (folder/name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=name): use(folder)
