"""Every number of a checkpoint lands in exactly one place, or loading fails with a name."""

# %%
import os
import re
from itertools import chain
from pathlib import Path
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from nano_vllm.layers import Ops, TensorParallelGroup
from nano_vllm.model import Decoder, ModelConfig, read_json, weight_shards
from nano_vllm.workbench import MODEL_NAME, fetch, from_gguf

# %%
def weight_files(path: Path) -> list[Path]:
    "The safetensors files of a model folder: the single one, or those in the index."
    single, index = path/"model.safetensors", path/"model.safetensors.index.json"
    if single.exists(): return [single]
    if not index.exists():
        raise ValueError(f"model folder {path}: no {single.name} and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict): raise ValueError(f"{index}: no weight_map")
    if odd := [f for f in weight_map.values() if not isinstance(f, str)]:
        raise ValueError(f"{index}: weight_map holds {odd[0]!r}, not a file name")
    files = [path/name for name in sorted(set(weight_map.values()))]
    if gone := [f.name for f in files if not f.exists()]:
        raise ValueError(f"model folder {path}: no {some(gone)}, named in {index.name}")
    return files


def some(names) -> str:
    "The first three of `names`, and how many more there are."
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")

# %%
def read_tensors(file: Path):
    "Each (name, slice) of a safetensors file; indexing a slice reads that part."
    try:
        with safe_open(file, "pt") as f:
            for name in f.keys(): yield name, f.get_slice(name)
    except (SafetensorError, OSError) as e: raise ValueError(f"{file}: {e}") from e

# %%
def load_weights(model: Decoder, path: Path):
    "Copy each tensor of a checkpoint to its place; ValueError unless all fit, once."
    missing, surplus = weight_shards(model), []
    for name, tensor in chain.from_iterable(map(read_tensors, weight_files(path))):
        if name not in missing:
            surplus.append(name)
            continue
        parameter, shape, index = missing.pop(name)
        if tensor.get_shape() != list(shape):
            raise ValueError(f"{name}: shape in the checkpoint is "
                             f"{tensor.get_shape()}, expected {list(shape)}")
        parameter.copy_(tensor[index])
    surplus = [name for name in surplus if not is_harmless(name, model.config)]
    for kind, names in (("missing", missing), ("surplus", surplus)):
        if names: raise ValueError(f"model folder {path}: {len(names)} tensors are "
                                   f"{kind}: {some(names)}")


def is_harmless(name: str, config: ModelConfig) -> bool:
    "Is this a tensor that checkpoints may hold although nothing needs it?"
    is_copy = config.tied and name == "lm_head.weight"   # of the embedding
    return is_copy or name.endswith("rotary_emb.inv_freq")

# %%
def empty_model(config: ModelConfig, dtype: torch.dtype, device,
                group: TensorParallelGroup = TensorParallelGroup(),
                ops: Ops = Ops()) -> Decoder:
    "A decoder on `device` whose parameters have memory, allocated once, and no values."
    with torch.device("meta"): model = Decoder(config, group, ops)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            memory = torch.empty_like(p, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
    return model.to(device)

# %%
def fill_randomly(model: Decoder, device):
    "Small random weights, the same in every process."
    rng = torch.Generator(device).manual_seed(0)
    for p in model.parameters(): p.normal_(0, 0.02, generator=rng)


def load_model(path, config: ModelConfig, dtype: torch.dtype, device,
               load_format: str = "auto",
               group: TensorParallelGroup = TensorParallelGroup(),
               ops: Ops = Ops()) -> Decoder:
    """This rank's part of the model in folder `path`, its weights packed for `ops`.

    load_format: "auto" reads the checkpoint, "dummy" draws random weights."""
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format is {load_format!r}, supported: 'auto', 'dummy'")
    model = empty_model(config, dtype, device, group, ops)
    if load_format == "auto": load_weights(model, Path(path))
    else: fill_randomly(model, device)
    model.pack()
    return model.eval()

# %%
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def download(name: str) -> Path:
    "The folder of hub model `name`, from the hub or its local cache."
    from huggingface_hub import snapshot_download
    try: return Path(snapshot_download(name, allow_patterns=PATTERNS,
                                       ignore_patterns=["*/*", "consolidated*"]))
    except Exception as e:
        raise ValueError(f"model is {name!r}: there is no such folder, and asking the "
                         f"Hugging Face hub for it failed: {e}") from e


def resolve_model(name) -> Path:
    "The folder of a model: the demo's alias, a folder or GGUF file, or a hub id."
    name = str(name)
    if name == MODEL_NAME: return fetch()
    if os.path.isdir(name):
        if (Path(name)/"config.json").exists(): return Path(name)
        raise ValueError(f"model is {name!r}: this folder has no config.json")
    if name.endswith(".gguf") and os.path.isfile(name): return from_gguf(Path(name))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name): return download(name)
    raise ValueError(f"model is {name!r}, supported: {MODEL_NAME!r}, the path of a "
                     "model folder or GGUF file, or a hub name such as 'org/name'")
