"What several test files need: an engine that has to be idle, and a tiny model in a folder of its own."
import json
import os
import shutil
import subprocess
import sys

import torch
from nano_vllm.model import ModelConfig, weight_shards
from nano_vllm.workbench import fetch


def weight_views(model):
    "Checkpoint name -> the place of this tensor in `model`."
    return {name: shard.parameter for name, shard in weight_shards(model).items()}


def rounding_tolerance(num_terms, largest, dtype=torch.float32):
    """How far two right computations of numbers up to `largest` may lie apart, each by sums of `num_terms` terms in all.

    A rounding moves a number by at most eps/2 of its size. As often up as down: `n` of them add up to about the root of `n`. Eight times
    that leaves room for both computations, for the worst of thousands of results, and for a network that magnifies what comes in."""
    return 8 * torch.finfo(dtype).eps / 2 * num_terms**0.5 * largest


def logits_tolerance(config, num_tokens, logits):
    "How far two right computations of a model's float32 `logits`, of texts of up to `num_tokens` tokens, may lie apart."
    heads = config.num_heads * config.head_dim
    attention = config.hidden_size + config.head_dim + num_tokens + heads
    mlp = config.hidden_size + config.intermediate_size
    num_terms = config.num_layers * (attention + mlp) + config.hidden_size
    return rounding_tolerance(num_terms, float(logits.abs().max()))


def assert_idle(llm):
    "Nothing runs and nothing was left behind: law 1 for an engine at rest."
    engine = llm.engine
    manager, scheduler = engine.scheduler.manager, engine.scheduler
    pool = manager.pool
    assert sorted(pool.free_blocks) == list(range(pool.num_blocks)) and not any(pool.ref_counts)
    assert not manager.pending and not engine.in_flight
    assert not engine.requests and not scheduler.waiting and not scheduler.running


def tiny_folder(folder, tokenizer=True, **changes):
    "A small random Llama with the demo model's vocabulary (and tokenizer), as transformers saves it."
    import transformers
    settings = dict(vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
                    tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).float()
    for name, p in model.named_parameters(): torch.nn.init.normal_(p, float("norm" in name), 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja") if tokenizer else ():
        shutil.copy(fetch()/name, folder/name)
    return folder


def config_of(folder, tmp_path, **changes):
    "What the engine reads of a folder's config.json with these changes, written into `tmp_path`."
    config = json.loads((folder/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | changes))
    return ModelConfig.from_folder(tmp_path)


class Tracing:
    "Within the block, Python calls the method `trace` at every line that it runs, as `sys.settrace` says."

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_): sys.settrace(self.before)


def run_compiler(script: str, tmp_path) -> str:
    "What a program prints that compiles kernels for a GPU: the interpreter takes more Python than the compiler does, which needs no GPU."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    file = tmp_path/"compile.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=env | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    return done.stdout
