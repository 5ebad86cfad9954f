"""weights: law 9, the loader writes every parameter exactly once or raises. And the ways a model can be named."""
import json
import struct
import pytest
import torch
from safetensors.torch import load_file, save_file
from helpers import weight_views
from nano_vllm import weights
from nano_vllm.model import ModelConfig
from nano_vllm.weights import empty_model, load_model, load_weights, read_tensors, resolve_model, weight_files
from nano_vllm.workbench import fetch
from test_model import make, our_logits

DEMO = fetch()


@pytest.fixture
def folder(tmp_path):
    make("Qwen3", tmp_path/"tiny")
    return tmp_path/"tiny"


def load(folder, dtype=torch.float32, **kw): return load_model(folder, ModelConfig.from_folder(folder), dtype, "cpu", **kw)


def change(folder, edit):
    "Apply `edit` to the checkpoint's dict of tensors."
    tensors = load_file(folder/"model.safetensors")
    edit(tensors)
    save_file(tensors, folder/"model.safetensors")


def test_every_parameter_is_written_exactly_once(folder):
    tensors = load_file(folder/"model.safetensors")
    for i, name in enumerate(sorted(tensors)): tensors[name] = torch.full_like(tensors[name], i + 1.0)
    save_file(tensors, folder/"model.safetensors")
    model = empty_model(ModelConfig.from_folder(folder), torch.float32, "cpu")
    for p in model.parameters(): p.fill_(float("nan"))
    load_weights(model, folder)
    assert not any(p.isnan().any() for p in model.parameters())
    views = weight_views(model)
    for name in tensors: assert torch.equal(views[name], tensors[name])
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in model.parameters())


def test_views_partition_the_parameters(folder):
    "Each number of each parameter belongs to exactly one view."
    model = empty_model(ModelConfig.from_folder(folder), torch.float32, "cpu")
    for p in model.parameters(): p.zero_()
    for view in weight_views(model).values(): view += 1
    for p in model.parameters(): assert p.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_converted_on_copy(folder, dtype):
    model, tensors = load(folder, dtype), load_file(folder/"model.safetensors")
    for name, view in weight_views(model).items(): assert torch.equal(view, tensors[name].to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.rotary.cos.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())


def test_bfloat16_checkpoint(folder):
    change(folder, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    for name, view in weight_views(load(folder)).items():
        assert torch.equal(view, load_file(folder/"model.safetensors")[name].float())


def shard(folder, num=3):
    "Split the checkpoint over `num` files with an index, as save_pretrained(max_shard_size=...) does."
    tensors = load_file(folder/"model.safetensors")
    (folder/"model.safetensors").unlink()
    places = {n: f"model-{i%num + 1:05}-of-{num:05}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(places.values()): save_file({n: t for n, t in tensors.items() if places[n] == file}, folder/file)
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=places)))
    return places


def test_sharded_equals_single(folder):
    ids = list(range(20))
    expected = our_logits(load(folder), ids)
    shard(folder)
    assert len(weight_files(folder)) == 3
    assert torch.equal(our_logits(load(folder), ids), expected)


def test_shards_as_transformers_writes_them(tmp_path):
    model = make("Llama", tmp_path)
    expected = our_logits(load(tmp_path), [5, 6, 7])
    (tmp_path/"model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 1
    assert torch.equal(our_logits(load(tmp_path), [5, 6, 7]), expected)


def test_missing_tensors(folder):
    change(folder, lambda t: [t.pop(n) for n in sorted(t) if "layers.1" in n])
    with pytest.raises(ValueError, match=r"11 tensors are missing: model.layers.1\S+, .* and 8 more"): load(folder)
    change(folder, lambda t: t.clear())
    with pytest.raises(ValueError, match="are missing"): load(folder)


def test_surplus_tensors(folder):
    change(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="1 tensors are surplus: model.layers.2.mlp.up_proj.weight"): load(folder)


def test_a_tensor_in_two_shards_is_surplus(folder):
    places = shard(folder)
    name = sorted(places)[0]
    other = next(f for f in places.values() if f != places[name])
    tensors = load_file(folder/other)
    save_file(tensors | {name: load_file(folder/places[name])[name]}, folder/other)
    with pytest.raises(ValueError, match=f"surplus: {name}"): load(folder)


def test_wrong_shape(folder):
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(1)}))  # copy_ alone would broadcast it
    with pytest.raises(ValueError, match=r"model.norm.weight: shape .*\[1\], expected \[48\]"): load(folder)


def test_untied_checkpoint_without_lm_head(folder):
    change(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="1 tensors are missing: lm_head.weight"): load(folder)


def test_tolerated_by_name(tmp_path):
    make("Llama", tmp_path, tie_word_embeddings=True)
    expected = our_logits(load(tmp_path), [5, 6, 7])
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}))
    assert torch.equal(our_logits(load(tmp_path), [5, 6, 7]), expected)
    change(tmp_path, lambda t: t.update({"lm_head.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match="surplus: lm_head.bias"): load(tmp_path)


def test_no_weights(folder):
    (folder/"model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"): load(folder)
    (folder/"model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="are missing"): load(folder)


def test_missing_shard(folder):
    shard(folder)
    (folder/"model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"): load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(folder, text):
    (folder/"model.safetensors").unlink()
    (folder/"model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json"): load(folder)


@pytest.mark.parametrize("broken", [b"", b"abc", b"\xff"*100, struct.pack("<Q", 50) + b"{not json" + b" "*41,
                                    b"<!DOCTYPE html><html>Not found</html>"])
def test_corrupt_file(folder, broken):
    (folder/"model.safetensors").write_bytes(broken)
    with pytest.raises(ValueError, match="model.safetensors: "): load(folder)


@pytest.mark.parametrize("keep", [4, 100, -1, -1000])
def test_truncated_file(folder, keep):
    data = (folder/"model.safetensors").read_bytes()
    (folder/"model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="model.safetensors: "): load(folder)


def test_dummy_weights(folder):
    expected = our_logits(load(folder), [1, 2, 3])
    (folder/"model.safetensors").unlink()
    a, b = load(folder, load_format="dummy"), load(folder, torch.bfloat16, load_format="dummy")
    logits = our_logits(a, [1, 2, 3])
    assert torch.equal(logits, our_logits(load(folder, load_format="dummy"), [1, 2, 3]))  # seeded
    assert logits.isfinite().all() and logits.std() > 0 and not torch.equal(logits, expected)
    assert our_logits(b, [1, 2, 3]).isfinite().all()
    assert all(p.abs().max() < 0.2 for p in a.parameters())


def test_unknown_load_format(folder):
    with pytest.raises(ValueError, match="load_format is 'gguf', supported: 'auto', 'dummy'"): load(folder, load_format="gguf")


def test_tensors_are_read_one_at_a_time_and_mapped(folder):
    reader = read_tensors(folder/"model.safetensors")
    name, tensor = next(reader)
    assert torch.equal(tensor[:], load_file(folder/"model.safetensors")[name])


def test_empty_model_allocates_each_parameter_once(folder):
    config, allocated = ModelConfig.from_folder(folder), []
    real = torch.empty_like
    try:
        torch.empty_like = lambda p, **kw: allocated.append(p.device.type) or real(p, **kw)
        model = empty_model(config, torch.bfloat16, "cpu")
    finally: torch.empty_like = real
    assert allocated == ["meta"] * len(list(model.parameters()))


def test_a_loaded_model_is_packed_for_its_ops(folder):
    "Each matrix is handed over once, when it has its values; what is not a matrix of a product stays."
    from nano_vllm.layers import Ops
    tensors, handed = load_file(folder/"model.safetensors"), []
    def linear(weight):
        handed.append(weight)
        return lambda x, bias: torch.nn.functional.linear(x, weight, bias)
    model = load(folder, ops=Ops(linear=linear))
    assert sum(w.numel() for w in handed) == sum(t.numel() for n, t in tensors.items() if t.dim() == 2 and "embed" not in n)
    assert any(torch.equal(w, tensors["lm_head.weight"]) for w in handed)
    assert [n for n, p in model.named_parameters() if p.dim() == 2] == ["model.embed_tokens.weight"]
    assert torch.equal(our_logits(model, [5, 6, 7]), our_logits(load(folder), [5, 6, 7])) and not model.training


def test_two_models_share_nothing(folder):
    a, b = load(folder), load(folder)
    for p in a.parameters(): p.zero_()
    assert all(p.ne(0).any() for p in b.parameters())


def test_resolve_alias_and_folder(folder):
    assert resolve_model("smollm2-135m") == fetch()
    assert resolve_model(folder) == folder and resolve_model(str(folder)) == folder


@pytest.mark.parametrize("name", ["", "nothing-like-it", "/no/such/folder", "a/b/c", "../x", "gpt 2", "org/", "https://x.org/m"])
def test_resolve_refuses(name):
    with pytest.raises(ValueError, match="model is ") as e: resolve_model(name)
    assert repr(name) in str(e.value)


def test_resolve_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="no config.json"): resolve_model(tmp_path)


def test_resolve_file_is_refused(folder):
    with pytest.raises(ValueError): resolve_model(str(folder/"model.safetensors"))


def test_hub_id_from_the_offline_cache(folder, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants
    hub, commit = tmp_path/"hub", "0"*40
    snapshot = hub/"models--some--tiny"/"snapshots"/commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (hub/"models--some--tiny"/"refs").mkdir()
    (hub/"models--some--tiny"/"refs"/"main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: real(*a, cache_dir=hub, **kw))
    assert resolve_model("some/tiny") == snapshot
    load(resolve_model("some/tiny"))
    with pytest.raises(ValueError, match="some/other"): resolve_model("some/other")


def test_hub_download_asks_for_the_right_files(monkeypatch, tmp_path):
    import huggingface_hub
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or str(tmp_path))
    assert resolve_model("org/na.me-1_b") == tmp_path and asked["name"] == "org/na.me-1_b"
    from huggingface_hub.utils import filter_repo_objects
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
             "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"]
    unwanted = ["pytorch_model.bin", "original/params.json", "consolidated.safetensors", "onnx/model.onnx", "README.md", "x.gguf"]
    kept = list(filter_repo_objects(files + unwanted, allow_patterns=asked["allow_patterns"],
                                    ignore_patterns=asked["ignore_patterns"]))
    assert kept == files


def test_hub_failure_is_told(monkeypatch):
    import huggingface_hub
    def refuse(*a, **kw): raise OSError("401 Unauthorized")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="org/secret.*401 Unauthorized"): resolve_model("org/secret")


def test_demo_model_loads_quickly():
    import time
    path = resolve_model("smollm2-135m")
    start = time.perf_counter()
    model = load(path)
    assert time.perf_counter() - start < 20
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(weight_views(model)) == 272


def write_gguf(file, model, architecture="llama"):
    "A Llama of transformers as llama.cpp would write it: its names, rotary pairs side by side, the demo model's tokenizer."
    import gguf
    from nano_vllm.workbench import HF_NAMES, WHOLE_NAMES
    c, writer = model.config, gguf.GGUFWriter(file, architecture)
    theta = c.rope_parameters["rope_theta"] if hasattr(c, "rope_parameters") else c.rope_theta    # transformers 5 and 4
    entries = dict(context_length=c.max_position_embeddings, embedding_length=c.hidden_size, block_count=c.num_hidden_layers,
                   feed_forward_length=c.intermediate_size, head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
                   key_length=c.head_dim, layer_norm_rms_eps=c.rms_norm_eps, rope_freq_base=theta)
    for name, value in entries.items(): getattr(writer, f"add_{name}")(value)
    vocab = json.loads((fetch()/"tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocab["vocab"], key=vocab["vocab"].get))
    writer.add_token_types([3 if i < 17 else 1 for i in range(len(vocab["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in vocab["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    theirs = {v: k for k, v in HF_NAMES.items()}
    whole = {v: k for k, v in WHOLE_NAMES.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings: continue
        if name not in whole:
            _, _, layer, part, kind = name.split(".", 4) if "layernorm" not in name else (*name.split(".")[:3], name.split(".")[3], "weight")
            part, kind = f"{part}.{kind}".rsplit(".", 1)
            heads = dict(q_proj=c.num_attention_heads, k_proj=c.num_key_value_heads).get(part.split(".")[-1])
            if heads: tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
            name = f"blk.{layer}.{theirs[part]}.{kind}"
        writer.add_tensor(whole.get(name, name), tensor.contiguous().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return file


@pytest.mark.ci
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_goes_through_the_demo_models_door(tied, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_VLLM_CACHE", str(tmp_path/"cache"))
    (tmp_path/"cache").mkdir()
    (tmp_path/"cache/smollm2-135m").symlink_to(DEMO)
    theirs = make("Llama", tmp_path/"hf", tie_word_embeddings=tied, vocab_size=49152)
    file, ids = write_gguf(tmp_path/"tiny.gguf", theirs), [5, 600, 7000, 8, 9, 10, 11]
    folder = resolve_model(file)
    with torch.inference_mode(): expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(our_logits(load(folder), ids), expected, atol=1e-4, rtol=0)
    ours, demos = (json.loads((path/"tokenizer.json").read_text()) for path in (folder, DEMO))
    for part in "vocab", "merges": assert ours["model"][part] == demos["model"][part]    # transformers 4 writes the flags of unknown bytes otherwise
    assert ours["pre_tokenizer"] == demos["pre_tokenizer"]
    assert resolve_model(file) == folder and len(list((tmp_path/"cache").iterdir())) == 2
    if not tied: return
    write_gguf(file, make("Llama", tmp_path/"hf2", tie_word_embeddings=tied, vocab_size=49152, hidden_size=24))
    assert ModelConfig.from_folder(resolve_model(file)).hidden_size == 24   # another file under the same name


def test_gguf_files_that_are_refused(tmp_path, monkeypatch):
    file = write_gguf(tmp_path/"other.gguf", make("Llama", tmp_path/"hf", vocab_size=49152), "mamba")
    with pytest.raises(ValueError, match="other.gguf: architecture is mamba, supported: llama"): resolve_model(file)
    file = write_gguf(tmp_path/"bias.gguf", make("Llama", tmp_path/"hf2", vocab_size=49152))
    whole = file.read_bytes()
    for broken in (whole[:len(whole) // 2], whole[:100], b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="bias.gguf: "): resolve_model(file)
    with pytest.raises(ValueError, match="model is 'nowhere.gguf'"): resolve_model("nowhere.gguf")


# ---- nothing but a config

def bare_folder(folder):
    "A folder with a config.json and nothing else."
    folder.mkdir()
    config = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=7)
    (folder/"config.json").write_text(json.dumps(config))
    return folder


def test_a_config_is_enough(tmp_path):
    from nano_vllm import LLM, SamplingParams
    llm = LLM(bare_folder(tmp_path/"m"), load_format="dummy", num_kv_blocks=30)
    out, = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1, stop="x"), use_tqdm=False)
    assert len(out["token_ids"]) == 5 and out["text"] == "" and out["finish_reason"] == "length"
    assert llm.engine.input_processor.eos_token_ids == {7} and llm.get_tokenizer() is None
    assert [len(p["token_ids"]) for p in llm.stream([[5]], SamplingParams(max_tokens=3, ignore_eos=True))][-1] >= 1
    for call in (lambda: llm.generate("Hi"), lambda: llm.chat([{"role": "user", "content": "Hi"}])):
        with pytest.raises(ValueError, match=r"Hi.* has no tokenizer; give token ids"): call()


def test_a_tokenizer_is_missed_where_it_is_needed(tmp_path):
    from nano_vllm import LLM
    folder = bare_folder(tmp_path/"m")
    with pytest.raises(ValueError, match="tokenizer: .* has none of"): LLM(folder)
    with pytest.raises(ValueError, match="tokenizer: .* has none of"): LLM(folder, load_format="dummy", tokenizer=tmp_path)
