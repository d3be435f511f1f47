"""StableLM and Cohere 2: Llama with LayerNorm, whose layers may have one norm for attention and feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.llama import ATTENTION_BIAS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS
from convert.json_files import FLAG, integer, only, optional

FIELDS = {**LLAMA_FIELDS, "norm_eps": "layer_norm_eps"}
LAYER_NORM = {"norm": "layer", "gated_mlp": True, "mlp_bias": False, "qk_norm": False}
NORM_BIAS = (
    ("layers.{layer}.input_layernorm.bias", "layers/attention_norm/bias", "embed"),
    ("layers.{layer}.post_attention_layernorm.bias", "layers/mlp_norm/bias", "embed"),
    ("norm.bias", "final_norm/bias", "embed"),
)

STABLELM = dataclasses.replace(
    LLAMA,
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    tensors=(*LLAMA_TENSORS, *NORM_BIAS),
    fields={
        **{ours: theirs for ours, theirs in FIELDS.items() if ours != "head_dim"},
        "parallel_residual": "use_parallel_residual",
        "shared_norm": "use_parallel_residual",
        "qkv_bias": "use_qkv_bias",
    },
    constants={**LAYER_NORM, "out_bias": False},
    required={"qk_layernorm": False},  # a LayerNorm for every head
    refused=("head_dim",),  # its rotary frequencies would follow it
    partial_rotary=True,
    keys={"rotary_scaling_factor": only(1.0), "use_norm_bias": FLAG},  # of the first release; norms always have a bias
)


def _rotated_where_sliding(full: Any) -> dict[str, Any]:
    return {"rope_layers": tuple("main" if kind == "sliding_attention" else "none" for kind in full.layer_types)}


COHERE2 = dataclasses.replace(
    LLAMA,
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    tensors=LLAMA_TENSORS,
    fields={**FIELDS, **ATTENTION_BIAS, "logit_scale": "logit_scale"},
    constants={
        **LAYER_NORM,
        "norm_bias": False,
        "parallel_residual": True,
        "shared_norm": True,
        "rope.interleaved": True,
    },
    window="layer types",
    derive=_rotated_where_sliding,
    keys={
        "sliding_window_pattern": optional(integer(1)),
        # What the first release says of itself, and `transformers` always does.
        "layer_switch": optional(integer(1)),
        "order_of_interleaved_layers": only("local_attn_first"),
        "position_embedding_type": only("rope_gptj"),
        "rotary_pct": only(1.0),
        "use_embedding_sharing": only(True),
        "use_gated_activation": only(True),
        "use_parallel_block": only(True),
        "use_parallel_embedding": FLAG,  # how it is cut for several devices
        "use_qk_norm": only(False),
    },
)
