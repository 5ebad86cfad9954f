"""Run vLLM's own examples of text generation with another import, and record which run and what refuses the others.

    pip download vllm==0.32.0 --no-deps --no-binary :all:     # or fetch the sdist from its page on PyPI; then unpack it
    python tools/vllm_examples.py vllm-0.32.0/examples [part of a name ...]

Each is copied, `vllm` becomes `nano_vllm` in its imports, and it runs with the options that its own text proposes. Models and adapters come from a
hub's cache made here, in which every name that a script mentions is the demo model, or an adapter with random numbers for it. Of vLLM's
offline examples these are the ones whose subject is generated text: no pictures, no vectors, and neither a connector of another project's
nor a trainer at the other end. With part of a name nothing is recorded. About five minutes on two cores.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from book import ROOT
from nano_vllm.workbench import fetch, record

FEATURES = {   # in features/, and the options
    "automatic_prefix_caching/automatic_prefix_caching_offline": "", "automatic_prefix_caching/prefix_caching_offline": "",
    "context_extension/context_extension_offline": "", "data_parallel/data_parallel_offline": "-dp=2", "data_parallel/multi_instance_data_parallel": "",
    "logits_processor/custom": "", "logits_processor/custom_req": "", "logits_processor/custom_req_init": "", "logits_processor/dry": "",
    "lora/lora_with_quantization_offline": "", "lora/multilora_offline": "", "profiling/run_one_batch_offline": "--profile both --profile-dir traces",
    "profiling/simple_profiling_offline": "", "prompt_embed/prompt_embed_offline": "", "reset_kv/reset_kv_offline": "--model facebook/opt-125m",
    "sharded_state/load_sharded_state_offline": "--model facebook/opt-125m", "speculative_decoding/extract_hidden_states_offline": "",
    "speculative_decoding/mlpspeculator_offline": "",
    "speculative_decoding/spec_decode_offline": "--method ngram --num-prompts 4 --random-input-len 64 --max-model-len 4096 --output-len 48",
    "structured_outputs/structured_outputs_offline": "", "torchrun/torchrun_dp_example_offline": "", "torchrun/torchrun_example_offline": ""}
EXAMPLES = {"basic/offline_inference/basic": "", "basic/offline_inference/chat": "", "basic/offline_inference/generate": "",
            "deployment/async_llm_streaming": "", "deployment/llm_engine_example": "--model facebook/opt-125m",
            **{f"features/{name}": options for name, options in FEATURES.items()},
            "generate/qwen_1m_offline": "", "generate/trace_replay_offline": "", "observability/metrics/offline": "",
            "rl/batch_invariance/reproducibility_offline": "", "rl/pause_resume/pause_resume_offline": "",
            "rl/skip_loading_weights_in_engine_init": "", "tool_calling/chat_with_tools_offline": ""}
RANKS = {"torchrun_dp_example_offline": 2, "torchrun_example_offline": 4}


def write_adapter(folder, rank=8):
    "An adapter of the demo model's attention, in PEFT's form."
    c, tensors = json.loads((fetch()/"config.json").read_text()), {}
    sizes = dict(q_proj=c["hidden_size"], v_proj=c["hidden_size"] * c["num_key_value_heads"] // c["num_attention_heads"])
    for layer in range(c["num_hidden_layers"]):
        for name, size in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors |= {f"{prefix}.lora_A.weight": torch.randn(rank, c["hidden_size"]) / 50, f"{prefix}.lora_B.weight": torch.randn(size, rank) / 50}
    save_file(tensors, folder/"adapter_model.safetensors")
    (folder/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=rank, lora_alpha=16, target_modules=list(sizes), bias="none")))


def write_small_model(folder):
    "A random Llama whose heads four ranks can share, with the demo model's tokenizer."
    import transformers
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=131072, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"): (folder/name).symlink_to(fetch()/name)


def stand_in(hub, name):
    "Put a model or an adapter into the hub's cache under `name`."
    folder, commit = hub/f"models--{name.replace('/', '--')}", "0" * 40
    if folder.exists(): return
    files = folder/"snapshots"/commit
    for made in (files, folder/"refs"): made.mkdir(parents=True)
    (folder/"refs"/"main").write_text(commit)
    if re.search("lora|sql", name): write_adapter(files)
    elif name in ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B"): write_small_model(files)     # scripts share them by four
    else:
        for file in fetch().iterdir(): (files/file.name).symlink_to(file)


def last_error(text):
    "(is it ours, message) of the error that ended a script: raised by this package, or about what the package does not have."
    errors = list(re.finditer(r"^(?:\[rank\d\]: ?)?(\w+(?:Error|Exception): .*)", text, re.M))     # not torchrun's own, which has dots
    if not errors: return False, (text.strip().splitlines() or ["no message"])[-1]
    message, frames = errors[-1][1], re.findall(r'File "([^"]+)", line \d+', text[:errors[-1].start()])
    ours = str(ROOT/"nano_vllm") in frames[-1] and message.startswith(("ValueError", "ImportError"))
    return ours or "No module named 'nano_vllm." in message, message


def run(examples, name, options, home, limit=240):
    "(runs, refused or broken, message) of an example."
    text = (examples/f"{name}.py").read_text()
    for wanted in re.findall(r"[\"']([\w-]+/[\w.-]+)[\"']", text): stand_in(home/"hub", wanted)
    script = Path(tempfile.mkdtemp())/Path(name).with_suffix(".py").name
    script.write_text(re.sub(r"^(\s*(?:from|import) )vllm\b", r"\1nano_vllm", text, flags=re.M))
    ranks = RANKS.get(script.stem)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else []
    environment = os.environ | dict(PYTHONPATH=str(ROOT), HF_HOME=str(home), HF_HUB_OFFLINE="1")
    try: done = subprocess.run([sys.executable, *launcher, script.name, *options.split()], cwd=script.parent, env=environment,
                               capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: return "broken", f"no end within {limit} s"
    if done.returncode == 0: return "runs", ""
    ours, message = last_error(done.stderr)
    return "refused" if ours else "broken", message


def main():
    examples, parts = Path(sys.argv[1]), sys.argv[2:]
    chosen = {name: options for name, options in EXAMPLES.items() if not parts or any(part in name for part in parts)}
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for name, options in chosen.items():
            found[name] = run(examples, name, options, Path(home))
            print(f"{found[name][0]:8s} {name} {found[name][1]}", flush=True)
    print(sum(state == "runs" for state, _ in found.values()), "of", len(found), "run")
    if parts: return
    os.environ["NANO_VLLM_RECORD"] = "1"
    record("vllm-examples", found)


if __name__ == "__main__": main()
