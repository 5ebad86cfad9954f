# For chapter 07_model, under "## Exercises": one markdown cell and one folded cell (33 lines of code). It uses what the chapter
# has by then: tempfile, Path, torch, replace, test_close, load_file, ARCHITECTURES, ModelConfig, Decoder, checkpoint_pieces, logits_of.

# %% [markdown]
# 4. Granite is Llama with four multipliers: on the embedding, on the scores in place of $1/\sqrt{d}$, on what a sublayer
#    adds to the stream, and a divisor of the logits. Add the family without touching the decoder: multiply them into the
#    weights. Mind that a tied embedding is the output layer, too.

# %%
#| code-fold: true
#| code-summary: "Solution"
from transformers import GraniteConfig, GraniteForCausalLM
ARCHITECTURES["GraniteForCausalLM"] = llama  # the tensors have the same names

def fold(model, hf):
    "Multiply Granite's multipliers into the weights (and biases) of a loaded decoder."
    c, m = model.config, model.model
    for layer in m.layers:
        qkv, o = layer.self_attn.qkv_proj, layer.self_attn.o_proj
        for p in qkv.parameters():
            qkv.split(p, 0)[0].mul_(hf.attention_multiplier * c.head_dim**0.5)
        for part in (o, layer.mlp.down_proj):
            for p in part.parameters(): p.mul_(hf.residual_multiplier)
    m.embed_tokens.weight.mul_(hf.embedding_multiplier)
    m.norm.weight.div_(hf.logits_scaling * (hf.embedding_multiplier if c.tied else 1))

sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=2, attention_bias=True)
multipliers = dict(embedding_multiplier=12.0, attention_multiplier=0.3,
                   residual_multiplier=0.22, logits_scaling=8.0)
for tied in (True, False):
    hf = GraniteConfig(**sizes, **multipliers, tie_word_embeddings=tied)
    theirs = GraniteForCausalLM(hf).eval()
    for name, p in theirs.named_parameters(): p.data.normal_(float("norm" in name), 0.2)
    theirs.save_pretrained(folder := tempfile.mkdtemp())
    ours = Decoder(ModelConfig.from_folder(folder))
    tensors, ids = load_file(f"{folder}/model.safetensors"), torch.arange(50)
    for name, piece in checkpoint_pieces(ours).items(): piece.place.copy_(tensors[name])
    fold(ours, hf)
    with torch.inference_mode(): expected = theirs(ids[None]).logits[0]
    test_close(logits_of(ours, ids), expected, eps=1e-5)
    print(f"largest logit {expected.max():.1f}, differences below 1e-5")
# In bfloat16 one would fold before rounding: a folded weight is rounded once more.
