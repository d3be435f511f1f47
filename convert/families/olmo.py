"""OLMo 2 and 3: norms after attention and feed-forward, and of all heads' queries and keys together."""

from __future__ import annotations

import dataclasses

from convert.families.llama import ATTENTION_BIAS, GATED_RMS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS, PROJECTION_NORMS

NORMS = (
    *PROJECTION_NORMS,
    ("layers.{layer}.post_attention_layernorm.weight", "layers/attention_out_norm/scale", "embed"),
    ("layers.{layer}.post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale", "embed"),
)

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=(*(row for row in LLAMA_TENSORS if "norm" not in row[1] or row[1] == "final_norm/scale"), *NORMS),
    fields={**LLAMA_FIELDS, **ATTENTION_BIAS},
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": "projection", "norms": "after"},
)

OLMO3 = dataclasses.replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    window="layer types",
    rope_by_layer=True,
)
