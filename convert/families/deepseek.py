"""DeepSeek-V2 and V3 (and R1): latent attention, experts beside shared ones, dense first layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from convert.families.experts import EXPERT_TENSORS, IN_MEMORY, ROUTER, UNUSED, shared_experts
from convert.families.llama import ATTENTION_BIAS, GATED_RMS, LLAMA, LLAMA_TENSORS, SIZES
from convert.json_files import FLAG, OBJECT, TEXT, Kind, integer, number, optional, shown
from jaxhess.errors import InputError

TENSORS = (
    *(row for row in LLAMA_TENSORS if "self_attn" not in row[0]),
    ("layers.{layer}.self_attn.q_proj.weight", "layers/attention/query/kernel", "(heads head_dim) embed"),
    ("layers.{layer}.self_attn.q_a_proj.weight", "layers/attention/query_down/kernel", "query_rank embed"),
    ("layers.{layer}.self_attn.q_a_proj.bias", "layers/attention/query_down/bias", "query_rank"),
    ("layers.{layer}.self_attn.q_a_layernorm.weight", "layers/attention/query_norm/scale", "query_rank"),
    ("layers.{layer}.self_attn.q_b_proj.weight", "layers/attention/query/kernel", "(heads head_dim) query_rank"),
    # Latent state and rotated key come out of one matrix, keys and values of every head out of another.
    (
        "layers.{layer}.self_attn.kv_a_proj_with_mqa.weight",
        "layers/attention/kv_down/kernel",
        "kv_rank+rotated_dim@0 embed",
    ),
    (
        "layers.{layer}.self_attn.kv_a_proj_with_mqa.weight",
        "layers/attention/rotated_key/kernel",
        "kv_rank+rotated_dim@1 embed",
    ),
    ("layers.{layer}.self_attn.kv_a_proj_with_mqa.bias", "layers/attention/kv_down/bias", "kv_rank+rotated_dim@0"),
    ("layers.{layer}.self_attn.kv_a_proj_with_mqa.bias", "layers/attention/rotated_key/bias", "kv_rank+rotated_dim@1"),
    ("layers.{layer}.self_attn.kv_a_layernorm.weight", "layers/attention/kv_norm/scale", "kv_rank"),
    (
        "layers.{layer}.self_attn.kv_b_proj.weight",
        "layers/attention/key/kernel",
        "(heads still_dim+value_dim@0) kv_rank",
    ),
    (
        "layers.{layer}.self_attn.kv_b_proj.weight",
        "layers/attention/value/kernel",
        "(heads still_dim+value_dim@1) kv_rank",
    ),
    ("layers.{layer}.self_attn.o_proj.weight", "layers/attention/out/kernel", "embed (heads value_dim)"),
    ("layers.{layer}.self_attn.o_proj.bias", "layers/attention/out/bias", "embed"),
    ROUTER,
    *EXPERT_TENSORS,
    *shared_experts("shared_experts"),
)


FIELDS = {
    **SIZES,
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    **ATTENTION_BIAS,
    "latent.query_rank": "q_lora_rank",
    "latent.kv_rank": "kv_lora_rank",
    "latent.value_dim": "v_head_dim",
    "experts.num_experts": "n_routed_experts",
    "experts.top_k": "num_experts_per_tok",
    "experts.mlp_dim": "moe_intermediate_size",
    "experts.scale": "routed_scaling_factor",
}
SIZES_SAID = ("qk_nope_head_dim", "qk_rope_head_dim", "n_shared_experts")
KEYS: dict[str, Kind] = {
    **UNUSED,
    "aux_loss_alpha": number(0, 1e6),
    "seq_aux": FLAG,
    "auto_map": OBJECT,  # to the code in the repository, which `transformers` has since taken over
    "first_k_dense_replace": integer(0),
    "scoring_func": TEXT,
    "topk_method": TEXT,
    **dict.fromkeys(("head_dim", "qk_head_dim"), optional(integer(1))),  # which follow from the others
}


def _derived(full: Any) -> dict[str, Any]:
    """What V2 and V3 have in common."""
    rope, dims = full.rope_parameters, full.qk_nope_head_dim + full.qk_rope_head_dim
    fields: dict[str, Any] = {
        "head_dim": dims,
        "rope.dims": full.qk_rope_head_dim,
        "experts.shared_dim": full.n_shared_experts * full.moe_intermediate_size,
        "experts.layers": tuple(i >= full.first_k_dense_replace for i in range(full.num_hidden_layers)),
    }
    if rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim"):
        if rope.get("factor") is None:
            raise InputError("mscale_all_dim in rope_parameters needs the number factor beside it.")
        fields["attention_scale"] = dims**-0.5 * _stretch(rope["factor"], rope["mscale_all_dim"]) ** 2
    return fields if any(fields["experts.layers"]) else fields | {"experts": None}


def _stretch(factor: float, mscale: float) -> float:
    """By which queries, and keys as well, grow in a context that is `factor` times as long (arXiv 2309.00071)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _derived_v2(full: Any) -> dict[str, Any]:
    method, groups = full.topk_method, (full.n_group, full.topk_group)
    _refuse_others(full, {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy")})
    if method == "group_limited_greedy" and None in groups:
        raise InputError("topk_method group_limited_greedy needs the numbers n_group and topk_group.")
    names = ("experts.groups", "experts.top_groups")
    return _derived(full) | dict(zip(names, (1, 1) if method == "greedy" else groups, strict=True))


def _derived_v3(full: Any) -> dict[str, Any]:
    _refuse_others(full, {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)})
    return _derived(full) | {"rope.interleaved": bool(full.rope_interleave)}


def _refuse_others(full: Any, known: dict[str, tuple[str, ...]]) -> None:
    """InputError for a router of another kind; `transformers` reads only part of this."""
    for name, values in known.items():
        if getattr(full, name, values[0]) not in values:
            raise InputError(
                f"{name} {shown(getattr(full, name))} is not supported for {full.model_type}; only "
                f"{' and '.join(values)}."
            )


def _described(config: Any) -> dict[str, Any]:
    """The reverse of `_derived`, of a `DecoderConfig` with experts."""
    experts, rope = config.experts, config.rope
    described: dict[str, Any] = {
        "qk_nope_head_dim": config.head_dim - config.rotary_dims,
        "qk_rope_head_dim": config.rotary_dims,
        "n_shared_experts": experts.shared_dim // experts.mlp_dim,
        "first_k_dense_replace": config.num_layers - sum(config.expert_layers),
    }
    if config.attention_scale is not None and rope.factor > 1:
        stretch = (config.attention_scale * config.head_dim**0.5) ** 0.5
        mscale = (stretch - 1) / (0.1 * math.log(rope.factor))
        described["rope_parameters"] = {"mscale_all_dim": float(f"{mscale:.10g}")}  # it was written with few digits
    return described


def _described_v2(config: Any) -> dict[str, Any]:
    return _described(config) | {
        "topk_method": "group_limited_greedy" if config.experts.groups > 1 else "greedy",
        "n_group": config.experts.groups,
        "topk_group": config.experts.top_groups,
    }


def _described_v3(config: Any) -> dict[str, Any]:
    return _described(config) | {"rope_interleave": config.rope.interleaved}


DEEPSEEK_V2 = dataclasses.replace(
    LLAMA,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    tensors=TENSORS,
    memory=IN_MEMORY,
    fields={**FIELDS, "mlp_bias": "mlp_bias"},
    constants={**GATED_RMS, "qk_norm": False, "rope.interleaved": True},
    required={"norm_topk_prob": False},  # `transformers` ignores it
    sizes=SIZES_SAID,
    aliases={"num_experts": "n_routed_experts"},
    derive=_derived_v2,
    describe=_described_v2,
    keys={**KEYS, **dict.fromkeys(("n_group", "topk_group"), optional(integer(1)))},
)

DEEPSEEK_V3 = dataclasses.replace(
    LLAMA,
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    tensors=(
        *TENSORS,
        ("layers.{layer}.mlp.gate.e_score_correction_bias", "layers/experts/selection_bias", "routes"),
    ),
    memory=IN_MEMORY,
    fields={
        **FIELDS,
        "experts.renormalized": "norm_topk_prob",
        "experts.groups": "n_group",
        "experts.top_groups": "topk_group",
    },
    constants={
        **GATED_RMS,
        "mlp_bias": False,
        "qk_norm": False,
        "experts.scores": "sigmoid",
        "experts.selection_bias": True,
        "experts.group_score": "best two",
    },
    sizes=(*SIZES_SAID, "n_group", "topk_group"),
    aliases={"num_local_experts": "n_routed_experts"},
    later_layer="eh_proj.weight",
    derive=_derived_v3,
    describe=_described_v3,
    keys={**KEYS, "rope_interleave": FLAG, **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), integer(0))},
)
"""V3 ranks the groups of experts by the sum of their best two scores (arXiv 2412.19437, section 2.1.2)."""
