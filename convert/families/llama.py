"""Llama and the families that follow it closely."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.family import Family
from convert.json_files import FLAG, Kind, integer, number, optional
from jaxhess.models import DecoderConfig

SIZES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}

LLAMA_FIELDS = {
    **SIZES,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}

ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}

LLAMA_TENSORS = (
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

PROJECTION_NORMS = (
    ("layers.{layer}.self_attn.q_norm.weight", "layers/attention/query_norm/scale", "(heads head_dim)"),
    ("layers.{layer}.self_attn.k_norm.weight", "layers/attention/key_norm/scale", "(kv_heads head_dim)"),
)
"""Of all heads together, where `LLAMA_TENSORS` has norms of every head."""

GATED_RMS = {"norm": "rms", "gated_mlp": True, "parallel_residual": False}
ROTARY_BUFFER = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=LLAMA_TENSORS,
    prefix="model.",
    buffers=ROTARY_BUFFER,
    fields={**LLAMA_FIELDS, **ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    constants={**GATED_RMS, "qk_norm": False},
)

NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

MISTRAL = dataclasses.replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA_FIELDS,
    constants={**GATED_RMS, **NO_BIAS, "qk_norm": False},
    window="all layers",
)

WINDOW_KEYS: dict[str, Kind] = {"use_sliding_window": FLAG, "max_window_layers": integer(0)}


def described_window(config: DecoderConfig) -> dict[str, Any]:
    """Qwen's switch; which layers it is for follows from `layer_types`."""
    return {"use_sliding_window": config.sliding_window is not None}


QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=LLAMA_FIELDS,
    constants={**GATED_RMS, **NO_BIAS, "qkv_bias": True, "qk_norm": False},
    window="layer types",
    describe=described_window,
    keys=WINDOW_KEYS,
)

QWEN3 = dataclasses.replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={**LLAMA_FIELDS, **ATTENTION_BIAS},
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": True},
    window="layer types",
    describe=described_window,
    keys=WINDOW_KEYS,
)


ROTATED = Kind(
    "a list of 0 and 1, the latter for layers with rotary positions",
    lambda v: isinstance(v, list) and len(v) > 0 and all(type(x) is int and x in (0, 1) for x in v),
)


def _rotated_layers(full: Any) -> dict[str, Any]:
    return {
        "rope_layers": tuple("main" if rotated else "none" for rotated in full.no_rope_layers[: full.num_hidden_layers])
    }


def _described_layers(config: DecoderConfig) -> dict[str, Any]:
    rotated = config.rope_layers or ("main",) * config.num_layers
    return {**described_window(config), "no_rope_layers": [int(kind == "main") for kind in rotated]}


SMOLLM3 = dataclasses.replace(
    QWEN3,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields={**LLAMA_FIELDS, **ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    constants={**GATED_RMS, "qk_norm": False},
    derive=_rotated_layers,
    describe=_described_layers,
    keys={
        **WINDOW_KEYS,
        "no_rope_layers": optional(ROTATED),
        "no_rope_layer_interval": integer(1),
    },
)

GRANITE = dataclasses.replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    fields={
        **LLAMA.fields,
        "embed_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier",
    },
    derive=lambda full: {"logit_scale": 1 / full.logits_scaling},
    describe=lambda config: {
        "logits_scaling": 1 / config.logit_scale,  # 1 / (1 / (1 / x)) is 1 / x
        "attention_multiplier": config.score_scale,
    },
    keys={"logits_scaling": number(1e-30, 1e30)},
)
