"""Small random Hugging Face checkpoints, and the torch models they came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import transformers

torch = pytest.importorskip("torch")  # Modules that import it, or anything else, from here are skipped without it.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 53

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 7,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 10,
    "first_k_dense_replace": 1,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 6},
    "gpt_neox": {**_NEOX, "rotary_pct": 0.5},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
    },
    "qwen2_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 12,
    },
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_LLAMA, "head_dim": 6, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": {**_DEEPSEEK, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "gemma": {**_LLAMA, "head_dim": 6},
    "gemma2": {**_LLAMA, "head_dim": 6, "sliding_window": 5},
    "gemma3_text": {**_LLAMA, "head_dim": 6, "sliding_window": 5},
    "olmo2": _LLAMA,
    "olmo3": {**_LLAMA, "sliding_window": 5},
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "stablelm": {**_LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1},  # a quarter of a head is rotated
    "cohere2": {**_LLAMA, "sliding_window": 5},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
"""Options of a tiny model of each family."""


def torch_model(model_type: str, seed: int = 0, **options: Any) -> Any:
    """A float32 `transformers` model with eager attention and every parameter random.

    Norm gains and biases too: at their usual 1 and 0 a mapping could lose or swap them unseen.
    """
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # transformers writes into the dictionaries it is given (rope_scaling), which tests share.
    everything = copy.deepcopy({**DEFAULTS[model_type], **no_tokens, **options})
    config = transformers.CONFIG_MAPPING[model_type](**everything)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        saved = model.state_dict()
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
        for name, parameter in [*model.named_parameters(), *buffers]:
            noise = torch.randn(parameter.shape)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.2 * noise)
    return model


def write_checkpoint(directory: Path, model_type: str, seed: int = 0, **options: Any) -> Any:
    """Saves such a model in `directory` as `transformers` does; returns it."""
    model = torch_model(model_type, seed, **options)
    model.save_pretrained(directory)
    return model
