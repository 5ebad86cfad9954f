"What several test files need: an engine that has to be idle, and a tiny model in a folder of its own."
import shutil

import torch
from nano_vllm.model import checkpoint_pieces
from nano_vllm.workbench import fetch


def checkpoint_views(model):
    "Checkpoint name -> the place of this tensor in `model`."
    return {name: piece.place for name, piece in checkpoint_pieces(model).items()}


def assert_idle(llm):
    "Nothing is under way and nothing was left behind: law 1 for an engine at rest."
    pool = llm.pool
    assert sorted(pool.free_blocks) == list(range(pool.num_blocks)) and not any(pool.ref_counts)
    assert not pool.pending
    assert not llm.requests and not llm.scheduler.waiting and not llm.scheduler.running


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
