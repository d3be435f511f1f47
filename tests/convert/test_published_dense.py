"""config.json of published models without experts: they load, and have the published sizes.

The dictionaries are written from memory, with all keys that such files have; parameters are those of the cards.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from published import check_published

from convert.configs import decoder_config

COMMON = {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
          "torch_dtype": "bfloat16", "rope_scaling": None}  # fmt: skip
SILU = {**COMMON, "hidden_act": "silu"}
GELU = {**COMMON, "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "pad_token_id": 0}

GEMMA = {
    **COMMON, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "bos_token_id": 2, "eos_token_id": 1,
    "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
    "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "transformers_version": "4.38.0.dev0",
    "vocab_size": 256000,
}  # fmt: skip
GEMMA2 = {
    **GELU, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "transformers_version": "4.42.0.dev0", "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    **GELU, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "transformers_version": "4.50.0.dev0", "vocab_size": 262144,
}  # fmt: skip
GEMMA3_270M = GEMMA3 | {
    "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "rope_local_base_freq": 10000.0,
    "use_bidirectional_attention": False,
}  # fmt: skip
OLMO2 = {
    **SILU, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "eos_token_id": 100257, "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_theta": 500000,
    "tie_word_embeddings": False, "transformers_version": "4.47.0.dev0", "vocab_size": 100352,
}  # fmt: skip
OLMO3 = OLMO2 | {
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "max_position_embeddings": 65536,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096, "vocab_size": 100278,
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                     "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    "transformers_version": "4.57.1",
}  # fmt: skip
PHI = {
    **SILU, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
}  # fmt: skip
PHI3 = PHI | {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                 "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 32000, "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.03] * 24 + [64.0] * 24},
    "sliding_window": 262144, "tie_word_embeddings": False, "transformers_version": "4.40.2", "vocab_size": 32064,
}  # fmt: skip
PHI4 = PHI | {
    "bos_token_id": 100257, "eos_token_id": 100265, "hidden_size": 5120, "intermediate_size": 17920,
    "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "pad_token_id": 100349, "rope_theta": 250000, "sliding_window": None,
    "tie_word_embeddings": False, "transformers_version": "4.47.0", "vocab_size": 100352,
}  # fmt: skip
PHI4_MINI = PHI3 | {
    "auto_map": {**PHI3["auto_map"], "AutoTokenizer": "Xenova/gpt-4o"}, "bos_token_id": 199999, "eos_token_id": 199999,
    "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "num_attention_heads": 24,
    "num_key_value_heads": 8, "pad_token_id": 199999, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    "transformers_version": "4.45.0", "vocab_size": 200064,
}  # fmt: skip
SMOLLM3 = {
    **SILU, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "bos_token_id": None,
    "eos_token_id": 128012, "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0,
    "sliding_window": None, "transformers_version": "4.54.0.dev0", "use_cache": False, "use_sliding_window": False,
    "vocab_size": 128256,
}  # fmt: skip
GRANITE = {
    **SILU, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_theta": 5000000.0, "tie_word_embeddings": True,
    "transformers_version": "4.47.0.dev0", "vocab_size": 49155,
}  # fmt: skip
STABLELM = {
    **{key: value for key, value in SILU.items() if key not in ("attention_bias", "rope_scaling")},
    "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "bos_token_id": 100257,
    "eos_token_id": 100257, "hidden_dropout": 0.0, "hidden_size": 2048, "intermediate_size": 5632,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 24,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 10000,
    "tie_word_embeddings": False, "transformers_version": "4.40.0", "use_parallel_residual": False,
    "use_qkv_bias": True, "vocab_size": 100352,
}  # fmt: skip
COHERE2 = {
    **SILU, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "bos_token_id": 5,
    "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128, "hidden_size": 4096,
    "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
    "max_position_embeddings": 132096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0, "position_embedding_type": "rope_gptj",
    "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "transformers_version": "4.48.0.dev0", "use_embedding_sharing": True, "use_gated_activation": True,
    "use_parallel_block": True, "use_parallel_embedding": True, "vocab_size": 256000,
}  # fmt: skip

# Parameters in billions, to the digits of the model's card or paper; a tied output matrix is counted once.
PUBLISHED = [
    ("gemma-2b", GEMMA, 2.51),
    ("gemma-2-27b", GEMMA2, 27.2),
    ("gemma-3-1b-it", GEMMA3, 1.0),
    ("gemma-3-270m", GEMMA3_270M, 0.268),
    ("OLMo-2-1124-7B", OLMO2, 7.3),
    ("Olmo-3-1025-7B", OLMO3, 7.3),
    ("Phi-3-mini-128k-instruct", PHI3, 3.8),
    ("phi-4", PHI4, 14.7),
    ("Phi-4-mini-instruct", PHI4_MINI, 3.8),
    ("SmolLM3-3B", SMOLLM3, 3.1),
    ("granite-3.1-2b-base", GRANITE, 2.5),
    ("stablelm-2-1_6b", STABLELM, 1.64),
    ("c4ai-command-r7b-12-2024", COHERE2, 8.0),
]


@pytest.mark.parametrize(("config", "billions"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED])
def test_a_published_config_loads_has_the_published_size_and_is_written_back(config: Any, billions: float) -> None:
    check_published(config, billions)


def test_layers_and_scales_of_published_models() -> None:
    gemma = decoder_config(GEMMA3)
    assert gemma.rope_layers == (("local",) * 5 + ("main",)) * 4 + ("local",) * 2
    assert (gemma.rope.theta, gemma.local_rope.theta) == (1e6, 1e4)
    assert gemma.sliding_layers == tuple(kind == "local" for kind in gemma.rope_layers)
    assert decoder_config(GEMMA2).score_scale == 1 / 12
    assert decoder_config(OLMO3).local_rope.kind == "default"
    phi = decoder_config(PHI3).rope
    # Phi-3's technical report, arXiv 2404.14219, extends 4,096 tokens to 131,072 by LongRoPE.
    assert phi.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-12)
    assert decoder_config(PHI4_MINI).rotary_dims == 96
    assert decoder_config(SMOLLM3).rope_layers == ("main", "main", "main", "none") * 9
    assert decoder_config(COHERE2).rope_layers == ("main", "main", "main", "none") * 8
    assert decoder_config(GRANITE).logit_scale == 0.125
