"""The peers that `make peers` measures: the copies of a model that they read hold its numbers, llama.cpp is asked for what the others are, and
whatever is measured can be drawn."""
import ctypes
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import draw_throughput
import peer_worker
import peers
from helpers import tiny_folder
from nano_vllm import LLM, SamplingParams
from nano_vllm.model import ModelConfig
from nano_vllm.workbench import HF_NAMES, hf_name, read_gguf, split_halves
from test_model import make
from write_gguf import write_gguf

NAMES = HF_NAMES | {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
HEADS = {"attn_q": 4, "attn_k": 2}
CONFIGS = peers.ROOT/"nbs/data/configs"


def numbers_of(file, rotates_pairs):
    "{Hugging Face's name: float32 numbers} of a GGUF file, as it stores them there."
    from gguf import dequantize
    found = {}
    for t in read_gguf(file).tensors:
        part, numbers = t.name.split(".")[-2], dequantize(t.data, t.tensor_type).astype(np.float32)
        if rotates_pairs and part in HEADS: numbers = split_halves(numbers, HEADS[part])
        found[hf_name(t.name, NAMES)] = torch.from_numpy(numbers.copy())
    return found


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
@pytest.mark.parametrize("family, changes", [("Llama", dict(tie_word_embeddings=True)), ("Llama", {}), ("Qwen3", {})])
def test_a_gguf_copy_has_the_numbers_of_the_model(family, changes, kind, tmp_path):
    "In bfloat16 all of them, rounded; in Q8_0 within half a step of 1/127 of the largest of 32. Norms stay."
    make(family, tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **changes)
    write_gguf(tmp_path, tmp_path/"copy.gguf", kind)
    tensors, found = load_file(tmp_path/"model.safetensors"), numbers_of(tmp_path/"copy.gguf", family == "Llama")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.dim() == 1: assert torch.equal(found[name], tensor)
        elif kind == "BF16": assert torch.equal(found[name], tensor.bfloat16().float())
        else:
            step = tensor.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            assert ((found[name] - tensor).unflatten(-1, (-1, 32)).abs() <= step * (0.5 + 127 * 2**-11)).all()   # the scale has 11 bits


@pytest.mark.parametrize("name", peers.LARGER)
def test_the_larger_models_have_copies_without_weights(name, tmp_path, monkeypatch):
    "The config for vLLM; its shapes, made small, for llama.cpp."
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    copy = peers.w8a8_copy(CONFIGS/name)
    assert ModelConfig.from_folder(copy).quantization == "int8" and ModelConfig.from_folder(CONFIGS/name).quantization is None
    config = json.loads((CONFIGS/name/"config.json").read_text())
    small = tmp_path/"small"
    small.mkdir()
    (small/"config.json").write_text(json.dumps(config | dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
                                                              num_attention_heads=4, num_key_value_heads=2)))
    file = peers.gguf_copy(small, "Q8_0")
    assert [f.name for f in tmp_path.glob("*.gguf")] == ["small-q8_0.gguf"] and peers.gguf_copy(small, "Q8_0") == file
    shapes = {t.name: t.shape.tolist()[::-1] for t in read_gguf(file).tensors}
    assert shapes["token_embd.weight"] == [320, 64] and shapes["blk.1.ffn_down.weight"] == [64, 96]
    assert ("rope_freqs.weight" in shapes) == ("llama" in name) and ("blk.0.attn_q_norm.weight" in shapes) == ("qwen3" in name)


def test_our_engine_loads_what_vllm_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    folder = tiny_folder(tmp_path/"tiny", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    copy = peers.w8a8_copy(folder)
    assert {p.name for p in copy.iterdir()} == {p.name for p in folder.iterdir()} and peers.w8a8_copy(folder) == copy
    try: llm = LLM(copy, num_kv_blocks=40)
    except ValueError as e: return "saturate" in str(e) or pytest.fail(str(e))
    assert llm.engine.config.args.quantization == "int8"
    assert len(llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)[0]["token_ids"]) == 5


class FakeLibrary:
    "Stands for llama.cpp's interface: keeps what is decoded, and takes for the likeliest the token that its sum of a text names."
    VOCAB = 97

    def __init__(self): self.texts, self.sizes = {}, []
    def llama_backend_init(self): pass
    def llama_model_default_params(self): return None
    def llama_model_load_from_file(self, file, params): return "model"
    def llama_model_get_vocab(self, model): return "vocab"
    def llama_vocab_n_tokens(self, vocab): return self.VOCAB
    def llama_context_default_params(self): return SimpleNamespace()
    def llama_get_memory(self, context): return context

    def llama_init_from_model(self, model, params):
        assert params.n_threads == params.n_threads_batch and params.n_batch == peer_worker.LlamaCpp.max_batch
        return params

    def llama_batch_init(self, num_tokens, embd, num_seqs):
        return SimpleNamespace(token=[0]*num_tokens, pos=[0]*num_tokens, n_seq_id=[0]*num_tokens, logits=[0]*num_tokens,
                               seq_id=[[0] for _ in range(num_tokens)])

    def llama_memory_seq_rm(self, context, seq, first, last):
        assert seq == last == -1
        for text in self.texts.setdefault(id(context), {}).values(): del text[first:]

    def llama_decode(self, context, batch):
        self.sizes.append(batch.n_tokens)
        self.likeliest, texts = [], self.texts[id(context)]
        for i in range(batch.n_tokens):
            assert batch.n_seq_id[i] == 1 and 0 <= (seq := batch.seq_id[i][0]) < context.n_seq_max
            text = texts.setdefault(seq, [])
            assert batch.pos[i] == len(text) < context.n_ctx // context.n_seq_max     # in order, each position once
            text.append(batch.token[i])
            if batch.logits[i]: self.likeliest.append(sum(text) % self.VOCAB)
        return 0

    def llama_get_logits(self, context):
        self.logits = np.eye(self.VOCAB, dtype=np.float32)[self.likeliest]
        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def llama(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLibrary())
    monkeypatch.setattr(peer_worker.LlamaCpp, "max_batch", 16)
    return peer_worker.start("llama_cpp", "model.gguf")


def answer(prompt, length):
    "What the fake library's model says."
    text = list(prompt)
    for _ in range(length): text.append(sum(text) % FakeLibrary.VOCAB)
    return text[len(prompt):]


def test_llama_cpp_is_asked_for_each_token_once(llama):
    engine, params = llama
    prompts, lengths = [[1, 2, 3], list(range(5, 45)), [7]], [4, 9, 1]
    for _ in range(2):      # the second time the context is there, and must be empty
        outs = engine.generate([{"prompt_token_ids": p} for p in prompts], [params(max_tokens=n) for n in lengths])
        assert [o.outputs[0].token_ids for o in outs] == [answer(p, n) for p, n in zip(prompts, lengths)]
    sizes = engine.lib.sizes[:len(engine.lib.sizes) // 2]
    assert sizes == [16, 16, 12] + [2, 2, 2] + [1]*5     # the prompts in full batches, then all that are not done, side by side


def test_llama_cpp_keeps_what_was_computed_before(llama):
    "Of one text that goes on, as `after` asks for; not of another, and not of an answer."
    engine, params = llama
    def ask(prompt, length): return engine.generate([{"prompt_token_ids": prompt}], [params(max_tokens=length)])[0].outputs[0].token_ids
    before = list(range(30))
    for prompt, computed in ((before + [3, 4], 2), (before + [5], 1), (list(range(1, 10)), 9), (before + [5], 31)):
        if computed < 9: ask(before, 1)
        engine.lib.sizes.clear()
        assert ask(prompt, 2) == answer(prompt, 2) and sum(engine.lib.sizes) == computed + 1


def test_the_worker_measures_it(llama):
    result = peer_worker.run(*llama, requests=3, prompt=[5, 20], output=[3, 9], seed=1, vocab_size=150)
    assert 9 <= result["output_tokens"] <= 27 and result["seconds"] > 0
    llama[0].lib.sizes.clear()
    peer_worker.run(*llama, requests=1, prompt=[20, 20], output=[1, 1], after=70, seed=1, vocab_size=150)
    assert llama[0].lib.sizes == [16]*4 + [6] + [16, 4]


def test_all_engines_can_be_drawn(tmp_path):
    runs = {work: [dict(output_tokens_per_second=2.0 + i) for i in range(3)] for work in ("32 requests", "batch 8", "batch 1")}
    record = dict(machine=dict(name="a machine"), data={name: dict(runs=runs) for name in draw_throughput.NAMES})
    draw_throughput.draw(record, tmp_path/"all.svg")
    drawn = (tmp_path/"all.svg").read_text()
    assert all(f">{label}<" in drawn for label in draw_throughput.NAMES.values())
    ours = {f"{engine}{name}" for engine in ("vllm", "nano_vllm") for name in peers.TYPES.values()}
    assert ours | {f"llama.cpp {kind.lower()}" for kind in peers.GGUF.values()} == set(draw_throughput.NAMES)


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    def run(command, **options):
        (tmp_path/"llama").mkdir(exist_ok=True)
        if "install" in command: raise peers.subprocess.CalledProcessError(1, command)
    monkeypatch.setattr(peers.subprocess, "run", run)
    assert peers.make_llama.__wrapped__() is None and not (tmp_path/"llama").exists()
    assert "without llama.cpp, which cannot be built here" in capsys.readouterr().out
