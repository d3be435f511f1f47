"""Gemma: norms that multiply by 1 + gain, and embeddings times the root of their width."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.llama import ATTENTION_BIAS, GATED_RMS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS
from convert.json_files import integer, number, only, optional
from jaxhess.models import DecoderConfig

CAUSAL = {"use_bidirectional_attention": optional(only(False))}
UNREAD = optional(only("gelu_pytorch_tanh"))
"""Files name the activation twice, and each model of `transformers` reads one of the names."""

GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields={**LLAMA_FIELDS, **ATTENTION_BIAS},
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": False, "norm_offset": True},
    optional_sizes=("max_positions",),  # Gemma's heads are not the width divided by their number
    derive=lambda full: {"embed_scale": full.hidden_size**0.5},
    keys={**CAUSAL, "hidden_activation": UNREAD},
)

NORMS = (
    ("layers.{layer}.post_attention_layernorm.weight", "layers/attention_out_norm/scale", "embed"),
    ("layers.{layer}.pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", "embed"),
    ("layers.{layer}.post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale", "embed"),
)


def _scales(full: Any) -> dict[str, Any]:
    return {"embed_scale": full.hidden_size**0.5, "attention_scale": full.query_pre_attn_scalar**-0.5}


def _described_scales(config: DecoderConfig) -> dict[str, Any]:
    return {"query_pre_attn_scalar": round(config.score_scale**-2)}


GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=(*(row for row in LLAMA_TENSORS if row[1] != "layers/mlp_norm/scale"), *NORMS),
    fields={
        **GEMMA.fields,
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    constants={**GEMMA.constants, "norms": "both"},
    activation="hidden_activation",
    window="layer types",
    derive=_scales,
    describe=_described_scales,
    keys={**CAUSAL, "hidden_act": UNREAD, "query_pre_attn_scalar": integer(1)},
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields={**GEMMA.fields, "logit_softcap": "final_logit_softcapping"},
    constants={**GEMMA2.constants, "qk_norm": True},
    required={"attn_logit_softcapping": None},  # `transformers` keeps it and does not use it
    rope_by_layer=True,
    keys={
        **GEMMA2.keys,
        "rope_local_base_freq": optional(number(1e-30, 1e30)),
        "sliding_window_pattern": optional(integer(1)),
    },
)
