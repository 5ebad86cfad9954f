"""A model folder of the Llama or Qwen3 kind as a GGUF file in BF16 or Q8_0, for llama.cpp: `python tools/write_gguf.py FOLDER FILE.gguf BF16|Q8_0`.

It has no tokenizer: ids in, ids out. A folder without weights gets random ones, a few rows over and over, since the speed of an engine does not
depend on the values."""
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from nano_vllm.layers import rope_frequencies
from nano_vllm.model import Decoder, ModelConfig, weight_shards
from nano_vllm.weights import is_harmless, read_tensors, weight_files
from nano_vllm.workbench import HF_NAMES, WHOLE_NAMES

PARTS = {hf: part for part, hf in HF_NAMES.items()} | {f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"}
WHOLE = {hf: name for name, hf in WHOLE_NAMES.items()}


def gguf_name(name: str) -> str:
    "GGUF's name of a tensor of a Hugging Face checkpoint."
    if name in WHOLE: return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def join_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    "The rows of a `q` or `k` matrix as llama.cpp's Llama rotates them, as pairs: the reverse of `workbench.split_halves`."
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def random_tensors(config: ModelConfig):
    "(name, float32 numbers, their shape): at most 64 rows, to be repeated until the shape is full."
    rng = np.random.default_rng(0)
    with torch.device("meta"): shards = weight_shards(Decoder(config))
    for name, shard in shards.items():
        rows = min(64, shard.shape[0]) if len(shard.shape) > 1 else shard.shape[0]
        yield name, rng.normal(0, 0.02, (rows, *shard.shape[1:])).astype(np.float32), shard.shape


def stored_tensors(folder: Path, config: ModelConfig):
    "(name, float32 numbers, their shape) of a checkpoint."
    for name, tensor in chain.from_iterable(map(read_tensors, weight_files(folder))):
        if not is_harmless(name, config): yield name, tensor[:].float().numpy(), tuple(tensor.get_shape())


def add_header(writer: GGUFWriter, c: ModelConfig):
    "What llama.cpp has to know about a model besides its weights."
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count): add(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope["rope_theta"])
    if c.rope["rope_type"] == "llama3":
        plain = c.rope["rope_theta"] ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rope_frequencies(c.head_dim, c.rope)[0]).numpy())


def write_gguf(folder: Path, file: Path, kind: str):
    "Write the model in `folder` into `file`; matrices as `kind`, BF16 or Q8_0, norms and biases in float32."
    config, rotates_pairs = ModelConfig.from_folder(folder), False
    if not config.qk_norm: rotates_pairs = True   # llama.cpp's Qwen3 rotates halves, as Hugging Face does
    writer = GGUFWriter(file, "llama" if rotates_pairs else "qwen3")
    add_header(writer, config)
    heads = dict(q_proj=config.num_heads, k_proj=config.num_kv_heads)
    has_weights = any(folder.glob("*.safetensors"))
    for name, numbers, shape in stored_tensors(folder, config) if has_weights else random_tensors(config):
        part = name.split(".")[-2]
        if rotates_pairs and part in heads and has_weights: numbers = join_pairs(numbers, heads[part])
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), numbers)
            continue
        rows = quants.quantize(numbers, GGMLQuantizationType[kind])
        writer.add_tensor(gguf_name(name), np.resize(rows, (shape[0], rows.shape[1])), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__": write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
