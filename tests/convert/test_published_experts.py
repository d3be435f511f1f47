"""config.json of published models of mixtures of experts: they load, and have the published sizes.

The dictionaries are written from memory, with all keys that such files have; parameters are those of the cards.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from published import check_published

from convert.configs import decoder_config

SILU = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "attention_dropout": 0.0}
BF16 = {"torch_dtype": "bfloat16", "tie_word_embeddings": False, **SILU}

MIXTRAL = {
    **BF16, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "transformers_version": "4.36.0.dev0", "vocab_size": 32000,
}  # fmt: skip
QWEN2_MOE = {
    **BF16, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "transformers_version": "4.39.0.dev0",
    "use_sliding_window": False, "vocab_size": 151936, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN3_MOE = {
    **BF16, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "transformers_version": "4.51.0", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMOE = {
    **BF16, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
    "eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "transformers_version": "4.43.0.dev0", "vocab_size": 50304,
}  # fmt: skip
GRANITE = {
    **BF16, "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_bias": False,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_size": 1024, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096,
    "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True, "transformers_version": "4.46.0.dev0", "vocab_size": 49155,
}  # fmt: skip
GPT_OSS = {
    **SILU, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
    "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
    "vocab_size": 201088, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
GPT_OSS_120B = GPT_OSS | {
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_hidden_layers": 36, "num_local_experts": 128,
}  # fmt: skip
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
DEEPSEEK = {
    **BF16, "attention_bias": False, "aux_loss_alpha": 0.001, "max_position_embeddings": 163840, "moe_layer_freq": 1,
    "auto_map": {"AutoConfig": "configuration_deepseek.Config", "AutoModelForCausalLM": "modeling_deepseek.Model"},
    "kv_lora_rank": 512, "pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "seq_aux": True, "transformers_version": "4.33.1", "v_head_dim": 128,
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
    "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
DEEPSEEK_R1 = {key: value for key, value in DEEPSEEK_V3.items() if key not in ("aux_loss_alpha", "seq_aux")}

# Parameters in billions, to the digits of the model's card or paper. The bias that chooses experts is none of them.
PUBLISHED = [
    ("Mixtral-8x7B-v0.1", MIXTRAL, 46.7),
    ("Qwen1.5-MoE-A2.7B", QWEN2_MOE, 14.3),
    ("Qwen3-30B-A3B", QWEN3_MOE, 30.5),
    ("OLMoE-1B-7B-0924", OLMOE, 6.9),
    ("granite-3.0-1b-a400m", GRANITE, 1.3),
    ("gpt-oss-20b", GPT_OSS, 20.91),
    ("gpt-oss-120b", GPT_OSS_120B, 116.83),
    ("DeepSeek-V2-Lite", DEEPSEEK_V2_LITE, 15.7),
    ("DeepSeek-V3", DEEPSEEK_V3, 671),
    ("DeepSeek-R1", DEEPSEEK_R1, 671),
]


@pytest.mark.parametrize(("config", "billions"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED])
def test_a_published_config_loads_has_the_published_size_and_is_written_back(config: Any, billions: float) -> None:
    check_published(config, billions)


def test_softmax_of_deepseek_is_sharpened_as_its_context_is_stretched() -> None:
    for config, mscale in ((DEEPSEEK_V2_LITE, 0.707), (DEEPSEEK_V3, 1.0)):
        stretch = 0.1 * mscale * math.log(40) + 1  # arXiv 2309.00071, section 3.4, and DeepSeek's own code
        assert decoder_config(config).score_scale == pytest.approx(192**-0.5 * stretch**2, rel=1e-12)
        assert decoder_config(config).rope.attention_factor == 1


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (GPT_OSS, {"swiglu_limit": 5.0}, "gpt_oss with swiglu_limit=5.0 is not supported; only 7.0 is."),
        (GPT_OSS, {"hidden_act": "gelu"}, "gpt_oss with hidden_act=gelu is not supported; only silu is."),
        (GPT_OSS, {"experts_per_token": 2}, "experts_per_token=2 and num_experts_per_tok=4 must be the same."),
        (GPT_OSS, {"initial_context_length": 8192}, "and original_max_position_embeddings=4096 must be the same."),
        (OLMOE, {"clip_qkv": 8.0}, "olmoe with clip_qkv=8.0 is not supported; only None is."),
        (
            DEEPSEEK_V2_LITE,
            {"scoring_func": "sigmoid"},
            "scoring_func 'sigmoid' is not supported for deepseek_v2; only",
        ),
        (DEEPSEEK_V2_LITE, {"topk_method": "best"}, "topk_method 'best' is not supported for deepseek_v2; only greedy"),
        (DEEPSEEK_V2_LITE, {"topk_method": "group_limited_greedy", "n_group": None}, "needs the numbers n_group"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "deepseek_v2 with norm_topk_prob=True is not supported"),
        (DEEPSEEK_V2_LITE, {"moe_layer_freq": 2}, "has moe_layer_freq 2; only 1 is supported for deepseek_v2."),
        (DEEPSEEK_V2_LITE, {"num_key_value_heads": 8}, "a key head for every query head"),
        (DEEPSEEK_V2_LITE, {"n_routed_experts": 10**10}, "has n_routed_experts 10000000000; it must be a positive"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported for deepseek_v3; only"),
        (
            DEEPSEEK_V3,
            {"topk_method": "greedy"},
            "topk_method 'greedy' is not supported for deepseek_v3; only noaux_tc",
        ),
        (DEEPSEEK_V3, {"n_group": 7}, "256 experts cannot be chosen from 4 of 7 groups: the groups must be of equal"),
        (DEEPSEEK_V3, {"n_group": 256}, "256 groups of one expert each have no best two."),
        (DEEPSEEK_V3, {"num_experts_per_tok": 129}, "top_k=129 experts cannot be chosen from 128 of 256."),
        (DEEPSEEK_V3, {"rope_scaling": YARN | {"factor": None, "mscale_all_dim": 1.0}}, "needs the number factor"),
        (MIXTRAL, {"num_local_experts": 1}, "top_k=2 experts cannot be chosen from 1 of 1."),
        (QWEN3_MOE, {"mlp_only_layers": [True]}, "has mlp_only_layers [True]; it must be a list of layer numbers or"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "has decoder_sparse_step 0; it must be a positive integer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_router_of_another_kind_and_what_contradicts_itself_are_refused(
    config: Any, options: Any, sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        decoder_config({**config, **options})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
