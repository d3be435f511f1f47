"""Families with a mixture of experts in the place of Llama's feed-forward."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.llama import GATED_RMS, LLAMA, LLAMA_FIELDS, LLAMA_TENSORS, MISTRAL, NO_BIAS
from convert.json_files import FLAG, Kind, integer, number, optional
from jaxhess.models import DecoderConfig

ROUTER = ("layers.{layer}.mlp.gate.weight", "layers/experts/router/kernel", "routes embed")

EXPERT_TENSORS = (
    ("layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "layers/experts/gate/kernel", "expert_mlp embed"),
    ("layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layers/experts/up/kernel", "expert_mlp embed"),
    ("layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layers/experts/down/kernel", "embed expert_mlp"),
)

IN_MEMORY = (
    ("layers.{layer}.mlp.experts.gate_up_proj", "layers/experts/gate/kernel", "experts (0/2 expert_mlp) embed"),
    ("layers.{layer}.mlp.experts.gate_up_proj", "layers/experts/up/kernel", "experts (1/2 expert_mlp) embed"),
    ("layers.{layer}.mlp.experts.down_proj", "layers/experts/down/kernel", "experts embed expert_mlp"),
)
"""`transformers` 5 holds all experts of a layer in one tensor."""

UNUSED: dict[str, Kind] = {
    "output_router_logits": FLAG,
    "router_aux_loss_coef": number(0, 1e6),
    "router_jitter_noise": number(0, 1e6),
}
"""Keys of training: an auxiliary loss, and noise. Ours is an option of the loss (`NextTokenLoss.balance`)."""

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
        "experts.num_experts": "num_local_experts",
        "experts.top_k": "num_experts_per_tok",
        "experts.mlp_dim": "intermediate_size",
    },
    constants={**GATED_RMS, **NO_BIAS, "qk_norm": False, "experts.renormalized": True},
    keys=UNUSED,
)


def sparse_layers(full: Any) -> dict[str, Any]:
    """Qwen's rule for which layers have experts."""
    dense = full.mlp_only_layers or []
    sparse = tuple((i + 1) % full.decoder_sparse_step == 0 and i not in dense for i in range(full.num_hidden_layers))
    return {"experts.layers": sparse} if any(sparse) else {"experts": None}


def described_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `sparse_layers` reads."""
    return {
        "use_sliding_window": config.sliding_window is not None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(config.expert_layers) if not sparse],
    }


LAYER_NUMBERS = Kind("a list of layer numbers", lambda v: isinstance(v, list) and all(type(i) is int for i in v))

QWEN3_MOE = dataclasses.replace(
    LLAMA,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=(*LLAMA_TENSORS, ROUTER, *EXPERT_TENSORS),
    memory=IN_MEMORY,
    fields={
        **LLAMA_FIELDS,
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "experts.num_experts": "num_experts",
        "experts.top_k": "num_experts_per_tok",
        "experts.mlp_dim": "moe_intermediate_size",
        "experts.renormalized": "norm_topk_prob",
    },
    constants={**GATED_RMS, "mlp_bias": False, "qk_norm": True},
    window="all layers",
    aliases={"num_local_experts": "num_experts"},
    derive=sparse_layers,
    describe=described_sparse_layers,
    keys={
        **UNUSED,
        "decoder_sparse_step": integer(1),
        "mlp_only_layers": optional(LAYER_NUMBERS),
        "use_sliding_window": FLAG,
        "max_window_layers": integer(0),
    },
)
