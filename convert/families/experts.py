"""Families with a mixture of experts in the place of Llama's feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.llama import (
    ATTENTION_BIAS,
    GATED_RMS,
    GRANITE,
    LLAMA,
    LLAMA_FIELDS,
    LLAMA_TENSORS,
    MISTRAL,
    NO_BIAS,
    PROJECTION_NORMS,
    WINDOW_KEYS,
    described_window,
)
from convert.json_files import FLAG, Kind, integer, number, optional
from jaxhess.models import DecoderConfig

ROUTER = ("layers.{layer}.mlp.gate.weight", "layers/experts/router/kernel", "routes embed")

EXPERT_TENSORS = (
    ("layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "layers/experts/gate/kernel", "expert_mlp embed"),
    ("layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers/experts/up/kernel", "expert_mlp embed"),
    ("layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layers/experts/down/kernel", "embed expert_mlp"),
)


def together(name: str) -> tuple[tuple[str, str, str], ...]:
    """The rows of a tensor with the gates of all experts of a layer, and beside each its `up`."""
    return (
        (name, "layers/experts/gate/kernel", "experts (0/2 expert_mlp) embed"),
        (name, "layers/experts/up/kernel", "experts (1/2 expert_mlp) embed"),
    )


def shared_experts(name: str) -> tuple[tuple[str, str, str], ...]:
    """The rows of what every token goes through, under the name it has in the file."""
    own = "layers.{layer}.mlp." + name
    return (
        (f"{own}.gate_proj.weight", "layers/experts/shared/gate/kernel", "shared_mlp embed"),
        (f"{own}.gate_proj.bias", "layers/experts/shared/gate/bias", "shared_mlp"),
        (f"{own}.up_proj.weight", "layers/experts/shared/up/kernel", "shared_mlp embed"),
        (f"{own}.up_proj.bias", "layers/experts/shared/up/bias", "shared_mlp"),
        (f"{own}.down_proj.weight", "layers/experts/shared/down/kernel", "embed shared_mlp"),
        (f"{own}.down_proj.bias", "layers/experts/shared/down/bias", "embed"),
    )


IN_MEMORY = (
    *together("layers.{layer}.mlp.experts.gate_up_proj"),
    ("layers.{layer}.mlp.experts.down_proj", "layers/experts/down/kernel", "experts embed expert_mlp"),
)
"""`transformers` 5 holds all experts of a layer in one tensor."""

UNUSED: dict[str, Kind] = {
    "output_router_logits": FLAG,
    "router_aux_loss_coef": number(0, 1e6),
    "router_jitter_noise": number(0, 1e6),
}
"""Keys of training: an auxiliary loss, and noise. Ours is an option of the loss (`NextTokenLoss.balance`)."""

MIXTRAL_ROUTING = {
    "experts.num_experts": "num_local_experts",
    "experts.top_k": "num_experts_per_tok",
    "experts.mlp_dim": "intermediate_size",
}

MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        ("layers.{layer}.block_sparse_moe.gate.weight", "layers/experts/router/kernel", "routes embed"),
        (
            "layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "layers/experts/gate/kernel",
            "expert_mlp embed",
        ),
        ("layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "layers/experts/up/kernel", "expert_mlp embed"),
        (
            "layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            "layers/experts/down/kernel",
            "embed expert_mlp",
        ),
    ),
    memory=(ROUTER, *IN_MEMORY),
    fields={
        **LLAMA_FIELDS,
        **MIXTRAL_ROUTING,
    },
    constants={**GATED_RMS, **NO_BIAS, "qk_norm": False, "experts.renormalized": True},
    keys=UNUSED,
)


def sparse_layers(full: Any) -> dict[str, Any]:
    """Qwen's rule for which layers have experts."""
    dense = set(full.mlp_only_layers or ())
    sparse = tuple((i + 1) % full.decoder_sparse_step == 0 and i not in dense for i in range(full.num_hidden_layers))
    return {"experts.layers": sparse} if any(sparse) else {"experts": None}


def described_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `sparse_layers` reads."""
    return {
        **described_window(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(config.expert_layers) if not sparse],
    }


SPARSE_KEYS: dict[str, Kind] = {
    "decoder_sparse_step": integer(1),
    "mlp_only_layers": optional(
        Kind("a list of layer numbers", lambda v: isinstance(v, list) and all(type(i) is int for i in v))
    ),
    **WINDOW_KEYS,
}

QWEN_ROUTING = {
    "experts.num_experts": "num_experts",
    "experts.top_k": "num_experts_per_tok",
    "experts.mlp_dim": "moe_intermediate_size",
    "experts.renormalized": "norm_topk_prob",
}

QWEN3_MOE = dataclasses.replace(
    LLAMA,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=(*LLAMA_TENSORS, ROUTER, *EXPERT_TENSORS),
    memory=IN_MEMORY,
    fields={
        **LLAMA_FIELDS,
        **ATTENTION_BIAS,
        **QWEN_ROUTING,
    },
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": True},
    window="all layers",
    aliases={"num_local_experts": "num_experts"},
    derive=sparse_layers,
    describe=described_sparse_layers,
    keys={**UNUSED, **SPARSE_KEYS},
)

QWEN2_MOE = dataclasses.replace(
    LLAMA,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        ROUTER,
        *EXPERT_TENSORS,
        *shared_experts("shared_expert"),
        ("layers.{layer}.mlp.shared_expert_gate.weight", "layers/experts/shared_gate/kernel", "one embed"),
    ),
    memory=IN_MEMORY,
    fields={
        **LLAMA_FIELDS,
        "qkv_bias": "qkv_bias",
        **QWEN_ROUTING,
        "experts.shared_dim": "shared_expert_intermediate_size",
    },
    constants={**GATED_RMS, "out_bias": False, "mlp_bias": False, "qk_norm": False, "experts.shared_gate": True},
    window="layer types",
    derive=sparse_layers,
    describe=described_sparse_layers,
    keys={**UNUSED, **SPARSE_KEYS, "sliding_window": optional(integer(0))},  # 0 where it is not used
)

OLMOE = dataclasses.replace(
    LLAMA,
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    tensors=(
        *(row for row in LLAMA_TENSORS if not row[1].endswith(("query_norm/scale", "key_norm/scale"))),
        *PROJECTION_NORMS,
        ROUTER,
        *EXPERT_TENSORS,
    ),
    memory=IN_MEMORY,
    fields={
        **LLAMA_FIELDS,
        **ATTENTION_BIAS,
        **QWEN_ROUTING,
        "experts.mlp_dim": "intermediate_size",
    },
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": "projection"},
    required={"clip_qkv": None},
    refused=("sliding_window",),
    aliases={"num_local_experts": "num_experts"},
    keys=UNUSED,
)

GRANITE_MOE = dataclasses.replace(
    LLAMA,
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    tensors=(
        *LLAMA_TENSORS,
        ("layers.{layer}.block_sparse_moe.router.layer.weight", "layers/experts/router/kernel", "routes embed"),
        *together("layers.{layer}.block_sparse_moe.input_linear.weight"),
        (
            "layers.{layer}.block_sparse_moe.output_linear.weight",
            "layers/experts/down/kernel",
            "experts embed expert_mlp",
        ),
    ),
    memory=(
        ("layers.{layer}.block_sparse_moe.router.weight", "layers/experts/router/kernel", "routes embed"),
        *together("layers.{layer}.block_sparse_moe.experts.gate_up_proj"),
        (
            "layers.{layer}.block_sparse_moe.experts.down_proj",
            "layers/experts/down/kernel",
            "experts embed expert_mlp",
        ),
    ),
    fields={
        **{ours: theirs for ours, theirs in GRANITE.fields.items() if ours != "mlp_bias"},
        **MIXTRAL_ROUTING,
    },
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": False, "experts.scores": "softmax of chosen"},
    derive=GRANITE.derive,
    describe=GRANITE.describe,
    keys={**UNUSED, **GRANITE.keys},
)
