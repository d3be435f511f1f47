"""GPT-NeoX (Pythia) and GPT-2."""

from __future__ import annotations

from convert.families.family import Family
from convert.families.llama import SIZES
from convert.json_files import number, optional

GPT_NEOX_TENSORS = (
    ("embed_in.weight", "embed/kernel", "vocab embed"),
    ("layers.{layer}.input_layernorm.weight", "layers/attention_norm/scale", "embed"),
    ("layers.{layer}.input_layernorm.bias", "layers/attention_norm/bias", "embed"),
    # One matrix holds, for every head in turn, its query, key and value rows.
    ("layers.{layer}.attention.query_key_value.weight", "layers/attention/query/kernel", "(heads 0/3 head_dim) embed"),
    ("layers.{layer}.attention.query_key_value.weight", "layers/attention/key/kernel", "(kv_heads 1/3 head_dim) embed"),
    (
        "layers.{layer}.attention.query_key_value.weight",
        "layers/attention/value/kernel",
        "(kv_heads 2/3 head_dim) embed",
    ),
    ("layers.{layer}.attention.query_key_value.bias", "layers/attention/query/bias", "(heads 0/3 head_dim)"),
    ("layers.{layer}.attention.query_key_value.bias", "layers/attention/key/bias", "(kv_heads 1/3 head_dim)"),
    ("layers.{layer}.attention.query_key_value.bias", "layers/attention/value/bias", "(kv_heads 2/3 head_dim)"),
    ("layers.{layer}.attention.dense.weight", "layers/attention/out/kernel", "embed (heads head_dim)"),
    ("layers.{layer}.attention.dense.bias", "layers/attention/out/bias", "embed"),
    ("layers.{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "embed"),
    ("layers.{layer}.post_attention_layernorm.bias", "layers/mlp_norm/bias", "embed"),
    ("layers.{layer}.mlp.dense_h_to_4h.weight", "layers/mlp/up/kernel", "mlp embed"),
    ("layers.{layer}.mlp.dense_h_to_4h.bias", "layers/mlp/up/bias", "mlp"),
    ("layers.{layer}.mlp.dense_4h_to_h.weight", "layers/mlp/down/kernel", "embed mlp"),
    ("layers.{layer}.mlp.dense_4h_to_h.bias", "layers/mlp/down/bias", "embed"),
    ("final_layer_norm.weight", "final_norm/scale", "embed"),
    ("final_layer_norm.bias", "final_norm/bias", "embed"),
    ("embed_out.weight", "head/kernel", "vocab embed"),
)

# GPT-2's linear maps store [inputs, outputs]; its fused attention matrix holds all queries, then all keys, all values.
GPT2_TENSORS = (
    ("wte.weight", "embed/kernel", "vocab embed"),
    ("wpe.weight", "positions/kernel", "positions embed"),
    ("h.{layer}.ln_1.weight", "layers/attention_norm/scale", "embed"),
    ("h.{layer}.ln_1.bias", "layers/attention_norm/bias", "embed"),
    ("h.{layer}.attn.c_attn.weight", "layers/attention/query/kernel", "embed (0/3 heads head_dim)"),
    ("h.{layer}.attn.c_attn.weight", "layers/attention/key/kernel", "embed (1/3 kv_heads head_dim)"),
    ("h.{layer}.attn.c_attn.weight", "layers/attention/value/kernel", "embed (2/3 kv_heads head_dim)"),
    ("h.{layer}.attn.c_attn.bias", "layers/attention/query/bias", "(0/3 heads head_dim)"),
    ("h.{layer}.attn.c_attn.bias", "layers/attention/key/bias", "(1/3 kv_heads head_dim)"),
    ("h.{layer}.attn.c_attn.bias", "layers/attention/value/bias", "(2/3 kv_heads head_dim)"),
    ("h.{layer}.attn.c_proj.weight", "layers/attention/out/kernel", "(heads head_dim) embed"),
    ("h.{layer}.attn.c_proj.bias", "layers/attention/out/bias", "embed"),
    ("h.{layer}.ln_2.weight", "layers/mlp_norm/scale", "embed"),
    ("h.{layer}.ln_2.bias", "layers/mlp_norm/bias", "embed"),
    ("h.{layer}.mlp.c_fc.weight", "layers/mlp/up/kernel", "embed mlp"),
    ("h.{layer}.mlp.c_fc.bias", "layers/mlp/up/bias", "mlp"),
    ("h.{layer}.mlp.c_proj.weight", "layers/mlp/down/kernel", "mlp embed"),
    ("h.{layer}.mlp.c_proj.bias", "layers/mlp/down/bias", "embed"),
    ("ln_f.weight", "final_norm/scale", "embed"),
    ("ln_f.bias", "final_norm/bias", "embed"),
    ("lm_head.weight", "head/kernel", "vocab embed"),
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    tensors=GPT_NEOX_TENSORS,
    prefix="gpt_neox.",
    buffers=(
        r"layers\.\d+\.attention\.(bias|masked_bias)",
        r"layers\.\d+\.attention\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    ),
    fields={
        **SIZES,
        "norm_eps": "layer_norm_eps",
        "parallel_residual": "use_parallel_residual",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
    },
    constants={"norm": "layer", "gated_mlp": False, "mlp_bias": True, "qk_norm": False},
    head="embed_out.weight",
    head_alias="lm_head.weight",  # its name inside transformers 5, and in files that were saved without renaming
    partial_rotary=True,
    refused=("head_dim",),  # its rotary frequencies would follow it
    keys={"rotary_pct": optional(number(1e-6, 1)), "rotary_emb_base": optional(number(1e-30, 1e30))},
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=GPT2_TENSORS,
    prefix="transformer.",
    buffers=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    fields={
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "mlp_dim": "n_inner",
        "max_positions": "n_positions",
        "tied_embeddings": "tie_word_embeddings",
        "norm_eps": "layer_norm_epsilon",
    },
    optional_sizes=("mlp_dim",),
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    constants={
        "norm": "layer",
        "gated_mlp": False,
        "parallel_residual": False,
        "rope": None,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
    },
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    activation="activation_function",
)
