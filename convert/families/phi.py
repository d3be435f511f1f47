"""Phi-3 and Phi-4: Llama with fused projections, of heads that may be rotated in part."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.llama import GATED_RMS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS, NO_BIAS
from convert.json_files import Kind, only
from jaxhess.models import DecoderConfig

QKV, GATE_UP = "layers.{layer}.self_attn.qkv_proj.weight", "layers.{layer}.mlp.gate_up_proj.weight"

FUSED = (
    (QKV, "layers/attention/query/kernel", "(heads+kv_heads+kv_heads@0 head_dim) embed"),
    (QKV, "layers/attention/key/kernel", "(heads+kv_heads+kv_heads@1 head_dim) embed"),
    (QKV, "layers/attention/value/kernel", "(heads+kv_heads+kv_heads@2 head_dim) embed"),
    (GATE_UP, "layers/mlp/gate/kernel", "(0/2 mlp) embed"),
    (GATE_UP, "layers/mlp/up/kernel", "(1/2 mlp) embed"),
)

OWN_CODE = {"configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM"}
"""What `transformers` took over from the first release, whose files name both."""


def _is_own(value: Any) -> bool:
    models = (
        {key: code for key, code in value.items() if key != "AutoTokenizer"} if isinstance(value, dict) else {"": 0}
    )
    return all(isinstance(code, str) and code.split("--")[-1] in OWN_CODE for code in models.values())


def _described_context(config: DecoderConfig) -> dict[str, Any]:
    """What `transformers` reads of a Phi-3 outside of `rope_parameters` alone."""
    trained = config.rope and config.rope.original_max_positions
    return {"original_max_position_embeddings": trained} if trained else {}


PHI3 = dataclasses.replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=(*(row for row in LLAMA_TENSORS if row[1] not in {path for _, path, _ in FUSED}), *FUSED),
    fields=LLAMA_FIELDS,
    constants={**GATED_RMS, **NO_BIAS, "qk_norm": False},
    window="all layers",
    partial_rotary=True,
    describe=_described_context,
    keys={
        "auto_map": Kind(f"that of the first release, {' and '.join(sorted(OWN_CODE))}", _is_own),
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), only(False)),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), only(1)),
    },
)
