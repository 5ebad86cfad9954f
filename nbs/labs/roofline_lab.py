"""The roofline lab: what a model's shape and a machine's numbers allow.

It counts as the benchmark's chapter does.

The page hands this file to Python in the browser; the tests import it as it is.
"""
from nano_vllm.kv_blocks import blocks_needed

BLOCK_SIZE = 16
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
BATCHES = [2**i for i in range(11)]
CONTEXTS = [2**i for i in range(8, 18)]


def embedding_weights(config): return config["vocab_size"] * config["hidden_size"]


def layer_weights(config):
    "The matrices and norms of one layer."
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    mlp = 3 * hidden * config["intermediate_size"]
    qk_norms = 2 * head_dim if config["model_type"] == "qwen3" else 0
    return heads * head_dim * hidden + mlp + 2 * hidden + qk_norms


def num_weights(config):
    "All weights; an output layer that is tied to the embedding counts once."
    ends = embedding_weights(config) * (1 if config["tie_word_embeddings"] else 2)
    return (ends + config["num_hidden_layers"] * layer_weights(config)
            + config["hidden_size"])


def weights_read(config):
    "What a step reads: of an embedding that is not the output layer, next to nothing."
    if config["tie_word_embeddings"]: return num_weights(config)
    return num_weights(config) - embedding_weights(config)


def kv_token_bytes(config, dtype):
    "Keys and values of one token in all layers."
    return (2 * config["num_hidden_layers"] * config["num_key_value_heads"]
            * config["head_dim"] * BYTES[dtype])


def requests_that_fit(config, setting, context):
    "How many texts of `context` tokens the memory holds beside the weights."
    free = setting["memory"] - num_weights(config) * BYTES[setting["weights"]]
    block = BLOCK_SIZE * kv_token_bytes(config, setting["kv"])
    return max(0, int(free // block)) // blocks_needed(context, BLOCK_SIZE)


def step(config, setting, batch, context):
    "The least time of a decode step, and what sets it."
    read = weights_read(config)
    moved = (read * BYTES[setting["weights"]]
             + batch * context * kv_token_bytes(config, setting["kv"]))
    attention = (4 * config["num_hidden_layers"] * config["num_attention_heads"]
                 * config["head_dim"] * context)
    computed = batch * (2 * read + attention)
    memory, arithmetic = moved / setting["bandwidth"], computed / setting["peak"]
    seconds = max(memory, arithmetic)
    return dict(batch=batch, seconds=seconds, rate=batch / seconds, moved=moved,
                computed=computed, memory=memory, arithmetic=arithmetic)


def at_most(config, setting, context):
    "A row of the table of contexts: as many requests as fit, and their rate."
    fit = requests_that_fit(config, setting, context)
    rate = step(config, setting, fit, context)["rate"] if fit else 0
    return dict(context=context, fit=fit, rate=rate,
                one=step(config, setting, 1, context)["rate"])


def run(config, setting):
    "All that the page shows."
    context, batch = setting["context"], setting["batch"]
    token = kv_token_bytes(config, setting["kv"])
    return dict(weights=num_weights(config),
                weight_bytes=num_weights(config) * BYTES[setting["weights"]],
                token_bytes=token, request_bytes=token * context,
                fit=requests_that_fit(config, setting, context),
                step=step(config, setting, batch, context),
                curve=[step(config, setting, b, context) for b in BATCHES],
                contexts=[at_most(config, setting, c) for c in CONTEXTS
                          if c <= config["max_position_embeddings"]])
