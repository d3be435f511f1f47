"""gpt-oss: attention with sinks, and experts with a clamped gate."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.experts import MIXTRAL_ROUTING, UNUSED
from convert.families.llama import ATTENTION_BIAS, GATED_RMS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS
from convert.json_files import integer, optional
from jaxhess.errors import InputError

# The columns of an expert's first map are gate and up in turn. These are the names and shapes without MXFP4.
EXPERT_TENSORS = (
    ("layers.{layer}.mlp.router.weight", "layers/experts/router/kernel", "routes embed"),
    ("layers.{layer}.mlp.router.bias", "layers/experts/router/bias", "routes"),
    ("layers.{layer}.mlp.experts.gate_up_proj", "layers/experts/gate/kernel", "experts embed (expert_mlp 0/2)"),
    ("layers.{layer}.mlp.experts.gate_up_proj", "layers/experts/up/kernel", "experts embed (expert_mlp 1/2)"),
    ("layers.{layer}.mlp.experts.gate_up_proj_bias", "layers/experts/gate/bias", "experts (expert_mlp 0/2)"),
    ("layers.{layer}.mlp.experts.gate_up_proj_bias", "layers/experts/up/bias", "experts (expert_mlp 1/2)"),
    ("layers.{layer}.mlp.experts.down_proj", "layers/experts/down/kernel", "experts expert_mlp embed"),
    ("layers.{layer}.mlp.experts.down_proj_bias", "layers/experts/down/bias", "experts embed"),
)


def _said_twice(full: Any) -> dict[str, Any]:
    """No fields: what OpenAI's own code reads must be what `transformers` reads."""
    trained = full.rope_parameters.get("original_max_position_embeddings")
    same = {
        "experts_per_token": ("num_experts_per_tok", full.num_experts_per_tok),
        "initial_context_length": ("original_max_position_embeddings", trained),
    }
    for name, (other, value) in same.items():
        if getattr(full, name, None) not in (None, value):
            raise InputError(f"{name}={getattr(full, name)} and {other}={value} must be the same.")
    return {}


GPT_OSS = dataclasses.replace(
    LLAMA,
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        ("layers.{layer}.self_attn.sinks", "layers/attention/sinks", "heads"),
        *EXPERT_TENSORS,
    ),
    fields={
        **LLAMA_FIELDS,
        **ATTENTION_BIAS,
        **MIXTRAL_ROUTING,
    },
    constants={
        **GATED_RMS,
        "mlp_bias": False,
        "qk_norm": False,
        "activation": "clamped_silu",
        "attention_sinks": True,
        "experts.scores": "softmax of chosen",
        "experts.router_bias": True,
        "experts.bias": True,
    },
    required={"hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    window="layer types",
    aliases={"num_experts": "num_local_experts"},
    derive=_said_twice,
    keys={**UNUSED, **dict.fromkeys(("experts_per_token", "initial_context_length"), optional(integer(1)))},
)
