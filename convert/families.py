"""One table per model family: the names and axes of its checkpoint tensors, and what its configuration says.

Adding a family whose architecture the decoder covers means adding a table here, nothing else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        model_type: Its name in `config.json`.
        architecture: The `transformers` class with a language-model head.
        tensors: Name in the checkpoint -> our path, and the axes of the file's tensor (`convert.layout`). Names are
            without `prefix`; `{layer}` is the layer's number. A row whose path the model lacks (a bias, an untied
            head) is skipped. A fused tensor has one row for each of its parts.
        prefix: Begins the names of all tensors but the head's; files saved from the base model lack it.
        buffers: Regular expressions of names that old checkpoints hold although they are no parameters.
        head: Name of the output matrix in the file; it never has the prefix.
        head_alias: Another name under which it is accepted.
        fields: Field of `DecoderConfig` -> attribute of the `transformers` configuration with the same meaning.
        optional_sizes: Fields of `DecoderConfig` with a size that `config.json` may leave open; it must say the others.
        constants: Fields of `DecoderConfig` that this family fixes.
        required: Attributes of the `transformers` configuration that our decoder can represent only at this value.
        activation: The attribute that names the activation.
        window: Which attributes say where the sliding window applies.
        partial_rotary: Only a part of each head may be rotated.
        aliases: Other names in `config.json` of attributes in `fields` -> their own.
        refused: Keys of other families that this one's code in `transformers` reads too, and our decoder cannot.
    """

    model_type: str
    architecture: str
    tensors: tuple[tuple[str, str, str], ...]
    prefix: str
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    head: str = "lm_head.weight"
    head_alias: str | None = None
    activation: str = "hidden_act"
    window: Literal["none", "all layers", "layer types"] = "none"
    partial_rotary: bool = False
    optional_sizes: tuple[str, ...] = ("num_kv_heads", "head_dim", "max_positions")
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: tuple[str, ...] = ()

    @property
    def base_architecture(self) -> str:
        """The `transformers` class without its head."""
        return re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.architecture)


_SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}

_LLAMA_FIELDS = {
    **_SIZES,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}

_LLAMA_TENSORS = (
    ("embed_tokens.weight", "embed/kernel", "vocab embed"),
    ("layers.{layer}.input_layernorm.weight", "layers/attention_norm/scale", "embed"),
    ("layers.{layer}.self_attn.q_proj.weight", "layers/attention/query/kernel", "(heads head_dim) embed"),
    ("layers.{layer}.self_attn.q_proj.bias", "layers/attention/query/bias", "(heads head_dim)"),
    ("layers.{layer}.self_attn.k_proj.weight", "layers/attention/key/kernel", "(kv_heads head_dim) embed"),
    ("layers.{layer}.self_attn.k_proj.bias", "layers/attention/key/bias", "(kv_heads head_dim)"),
    ("layers.{layer}.self_attn.v_proj.weight", "layers/attention/value/kernel", "(kv_heads head_dim) embed"),
    ("layers.{layer}.self_attn.v_proj.bias", "layers/attention/value/bias", "(kv_heads head_dim)"),
    ("layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "head_dim"),
    ("layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "head_dim"),
    ("layers.{layer}.self_attn.o_proj.weight", "layers/attention/out/kernel", "embed (heads head_dim)"),
    ("layers.{layer}.self_attn.o_proj.bias", "layers/attention/out/bias", "embed"),
    ("layers.{layer}.post_attention_layernorm.weight", "layers/mlp_norm/scale", "embed"),
    ("layers.{layer}.mlp.gate_proj.weight", "layers/mlp/gate/kernel", "mlp embed"),
    ("layers.{layer}.mlp.gate_proj.bias", "layers/mlp/gate/bias", "mlp"),
    ("layers.{layer}.mlp.up_proj.weight", "layers/mlp/up/kernel", "mlp embed"),
    ("layers.{layer}.mlp.up_proj.bias", "layers/mlp/up/bias", "mlp"),
    ("layers.{layer}.mlp.down_proj.weight", "layers/mlp/down/kernel", "embed mlp"),
    ("layers.{layer}.mlp.down_proj.bias", "layers/mlp/down/bias", "embed"),
    ("norm.weight", "final_norm/scale", "embed"),
    ("lm_head.weight", "head/kernel", "vocab embed"),
)

_GPT_NEOX_TENSORS = (
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
_GPT2_TENSORS = (
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

_GATED_RMS = {"norm": "rms", "gated_mlp": True, "parallel_residual": False}
_ROTARY_BUFFER = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")

_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=_LLAMA_TENSORS,
    prefix="model.",
    buffers=_ROTARY_BUFFER,
    fields={**_LLAMA_FIELDS, "qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    constants={**_GATED_RMS, "qk_norm": False},
)

_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

_MISTRAL = dataclasses.replace(
    _LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=_LLAMA_FIELDS,
    constants={**_GATED_RMS, **_NO_BIAS, "qk_norm": False},
    window="all layers",
)

_QWEN2 = dataclasses.replace(
    _LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=_LLAMA_FIELDS,
    constants={**_GATED_RMS, **_NO_BIAS, "qkv_bias": True, "qk_norm": False},
    window="layer types",
)

_QWEN3 = dataclasses.replace(
    _LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={**_LLAMA_FIELDS, "qkv_bias": "attention_bias", "out_bias": "attention_bias"},
    constants={**_GATED_RMS, "mlp_bias": False, "qk_norm": True},
    window="layer types",
)

_GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    tensors=_GPT_NEOX_TENSORS,
    prefix="gpt_neox.",
    buffers=(
        r"layers\.\d+\.attention\.(bias|masked_bias)",
        r"layers\.\d+\.attention\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    ),
    fields={
        **_SIZES,
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
)

_GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    tensors=_GPT2_TENSORS,
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

FAMILIES = {f.model_type: f for f in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GPT_NEOX, _GPT2)}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Name in `transformers` -> ours. The first of several names is the one written back."""
