"""`config.json` -> DecoderConfig and back; what the decoder cannot compute is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import transformers
from checkpoints import DEFAULTS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from convert.configs import ROPE_KINDS, decoder_config, hugging_face_config
from convert.families import FAMILIES, UNCOVERED
from jaxhess.models import DecoderConfig, RopeConfig
from jaxhess.models.rotary import frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MSCALE = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
          "mscale_all_dim": 1.0}  # fmt: skip
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    {**LLAMA3, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
     "mscale_all_dim": 0.707, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.3,
     "truncate": False},
    # Contexts so short that the ramp ends before it begins.
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    # The factors have a number for each frequency: those of the heads' width in the test.
    {"rope_type": "longrope", "original_max_position_embeddings": 2048},
    {"rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 2.0},
    {"rope_type": "longrope", "original_max_position_embeddings": 4096, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
]  # fmt: skip
# How far two float32 evaluations of one formula lie apart, in eps = 2^-23: the powers of NumPy and torch each round by
# up to eps (measured: 0.94 with AVX-512, 0.5 without), which makes 2, and every later operation by half an eps on each
# side. `dynamic`: 1 / power. `longrope`: times a factor first. `linear`: divided once more. `yarn`: 1 / (factor power),
# times a weight, plus the other.
# `llama3`: the ramp's position has 2 pi and the trained length divided in, 5, and moves the frequency by up to
# (factor - 1) / (high_freq_factor - low_freq_factor) = 2.33 times as much where the ramp begins; 3 for the frequency,
# and 7 operations of the ramp and the mean.
ROUNDINGS = {"dynamic": 3, "longrope": 4, "linear": 4, "yarn": 6, "llama3": 22}


def raw(model_type: str, **options: Any) -> dict[str, Any]:
    """A config.json of a tiny model."""
    return {"model_type": model_type, **DEFAULTS[model_type], **options}


def with_factors(rope: dict[str, Any], count: int) -> dict[str, Any]:
    if rope["rope_type"] != "longrope":
        return rope
    factors = np.linspace(1, 3, count).tolist()
    return {**rope, "short_factor": factors, "long_factor": [1.7 * x for x in factors]}


@pytest.mark.parametrize("head_dim", [8, 128])
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rotary_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    rope = with_factors(rope, head_dim // 2)
    hf_config = raw("llama", rope_theta=10000.0, rope_scaling=rope, head_dim=head_dim, max_position_embeddings=4096)
    full = transformers.LlamaConfig.from_dict(copy.deepcopy(hf_config))
    ours = decoder_config(hf_config).rope
    assert ours is not None
    for length in (100, 4096, 4097, 20000):
        rates, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](full, "cpu", seq_len=length)
        narrow = frequencies(ours, head_dim, length, np.float32)
        np.testing.assert_allclose(narrow, rates.numpy(), rtol=ROUNDINGS[rope["rope_type"]] * 2.0**-23)
        np.testing.assert_allclose(frequencies(ours, head_dim, length), rates.numpy(), rtol=3e-6)
        assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_every_kind_of_rope_that_transformers_scales_is_checked_or_refused() -> None:
    assert {rope["rope_type"] for rope in ROPES} == set(ROPE_KINDS) - {"default"}
    for kind in set(ROPE_INIT_FUNCTIONS) - set(ROPE_KINDS):
        rope = {"rope_type": kind, "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
        with pytest.raises(ValueError, match=f"RoPE scaling '{kind}' is not supported"):
            decoder_config(raw("llama", rope_scaling=rope))


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2}}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2}},
         {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500},
         {"rotary_pct": None, "rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}}),
    ],
)  # fmt: skip
def test_old_and_new_spellings_of_rope_mean_the_same(model_type: str, old: Any, new: Any) -> None:
    assert decoder_config(raw(model_type, **old)) == decoder_config(raw(model_type, **new))


@pytest.mark.parametrize(
    ("model_type", "options", "window", "layers"),
    [
        ("mistral", {"sliding_window": 7}, 7, ()),
        ("mistral", {"sliding_window": None}, None, ()),
        ("qwen2", {"sliding_window": 7}, None, ()),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7, ()),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}, 7, (False, True)),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, None, ()),
        ("llama", {"sliding_window": 7}, None, ()),  # transformers' Llama has no window either
    ],
)
def test_sliding_window_applies_where_transformers_applies_it(
    model_type: str, options: Any, window: int | None, layers: Any
) -> None:
    config = decoder_config(raw(model_type, **options))
    assert (config.sliding_window, config.sliding_layers) == (window, layers)


@pytest.mark.parametrize(
    ("hf_config", "sentence"),
    [
        ({}, f"config.json names no model_type; supported are {', '.join(sorted(FAMILIES))}."),
        ({"model_type": "maba"}, "config.json has model_type 'maba', which is unsupported; supported are "),
        (
            {"model_type": "mamba"},
            "unsupported; the nearest that is supported is llama, which lacks layers with a state",
        ),
        ({"model_type": "gemma3"}, "the nearest that is supported is gemma3_text, which lacks images (its text model"),
        (raw("llama", quantization_config={"quant_method": "gptq"}), "quantized (quantization_config: gptq)"),
        (raw("llama", hidden_act="quick_gelu"), "hidden_act='quick_gelu' is not supported; known are silu"),
        (raw("llama", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported for llama"),
        (
            raw("llama", rope_scaling={"rope_type": "linear", "factor": None}),
            "'linear' needs the number factor",
        ),
        (raw("llama", num_attention_heads=3), "not a valid llama configuration: "),
        (raw("llama", num_key_value_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (raw("llama", num_hidden_layers=0), "config.json has num_hidden_layers 0; it must be a positive integer"),
        (raw("llama", num_attention_heads=0), "has num_attention_heads 0; it must be a positive integer"),
        (raw("llama", head_dim=-1), "config.json has head_dim -1; it must be a positive integer"),
        (raw("llama", hidden_size="16"), "config.json has hidden_size '16'; it must be a positive integer"),
        (raw("gpt2", n_inner=0), "config.json has n_inner 0; it must be a positive integer"),
        (raw("llama", rope_scaling="linear"), "config.json has rope_scaling 'linear'; it must be an object or null."),
        (raw("mistral", layer_types=["sliding_attention", "full_attention"]), "mistral with layer_types is not"),
        (
            raw("qwen2", layer_types=["full_attention", "sliding_attention"]),
            "sliding_window is off",
        ),
        (raw("gpt2", scale_attn_weights=False), "gpt2 with scale_attn_weights=False is not supported; only True is."),
        (raw("gpt2", scale_attn_by_inverse_layer_idx=True), "gpt2 with scale_attn_by_inverse_layer_idx=True"),
        (raw("gpt2", add_cross_attention=True), "gpt2 with add_cross_attention=True is not supported"),
        (raw("gpt2", n_head=3), "The width 16 is not a multiple of 3 heads"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_name(hf_config: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        decoder_config(hf_config)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


OPEN = {"num_key_value_heads", "head_dim", "max_position_embeddings", "q_lora_rank", "first_k_dense_replace"}
# The others fix shapes, but for what is no size.
SIZES = [
    (family, name) for family in DEFAULTS for name in DEFAULTS[family].keys() - OPEN - {"rotary_pct", "sliding_window"}
]


@pytest.mark.parametrize(("model_type", "name"), sorted(SIZES))
def test_a_size_that_fixes_shapes_is_not_filled_in(model_type: str, name: str) -> None:
    hf_config = raw(model_type)
    del hf_config[name]
    with pytest.raises(ValueError, match=f"^config.json does not say {name}.$"):
        decoder_config(hf_config)
    with pytest.raises(ValueError, match=f"^config.json does not say {name}.$"):
        decoder_config({**hf_config, name: None})


def test_sizes_with_a_default_may_be_left_out_and_general_names_are_understood() -> None:
    hf_config = raw("gpt2")
    assert decoder_config(hf_config).mlp_dim == 4 * 16
    general = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_positions": "max_position_embeddings"}  # fmt: skip
    assert decoder_config({general.get(k, k): v for k, v in hf_config.items()}) == decoder_config(hf_config)
    llama = raw("llama")
    del llama["num_key_value_heads"]
    config = decoder_config(llama)
    assert (config.num_kv_heads, config.head_dim) == (4, 4)


@pytest.mark.parametrize("rope", ROPES[:-1], ids=str)
def test_a_config_made_from_a_decoder_with_scaled_rope_reads_back(rope: dict[str, Any]) -> None:
    config = decoder_config(raw("qwen2", rope_scaling=with_factors(rope, 2)))
    assert decoder_config(hugging_face_config(config)) == config


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"attention_bias": True, "head_dim": 10, "tie_word_embeddings": True}),
        ("llama", {"mlp_bias": True, "hidden_act": "gelu_new"}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
        ("gpt2", {"n_inner": 24, "tie_word_embeddings": False}),
        ("granitemoe", {"logits_scaling": 8 / 3, "attention_multiplier": 0.1}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma2", {"query_pre_attn_scalar": 144, "attn_logit_softcapping": None}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2, "final_logit_softcapping": 30.0}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2, "rope_theta": 10000.0}),
        ("olmo3", {"rope_scaling": MSCALE, "attention_bias": True}),
        (
            "phi3",
            {
                "sliding_window": 7,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 4.0]},
            },
        ),
        ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 7}),
        ("granite", {"logits_scaling": 7.0, "attention_multiplier": 0.5}),  # a scale of 4^-0.5 like the others
        ("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 0.5}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("deepseek_v2", {"rope_scaling": MSCALE, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
        ("deepseek_v3", {"rope_scaling": MSCALE | {"mscale_all_dim": 0.707}, "rope_interleave": False}),
    ],
)
def test_a_config_made_from_a_decoder_names_its_family_and_reads_back(model_type: str, options: Any) -> None:
    config = decoder_config(raw(model_type, **options), "bfloat16")
    made = hugging_face_config(config)
    assert made["model_type"] == model_type
    assert decoder_config(made, "bfloat16") == config


def test_what_is_nearest_to_an_uncovered_architecture_is_covered_and_both_exist() -> None:
    assert {nearest for nearest, _ in UNCOVERED.values()} <= FAMILIES.keys()
    assert not UNCOVERED.keys() & FAMILIES.keys()
    code_of_their_own = {"internlm2", "phi3_v"}  # on the hub, not in transformers
    assert UNCOVERED.keys() - code_of_their_own <= set(transformers.CONFIG_MAPPING)


def test_how_a_model_is_computed_is_no_part_of_its_config() -> None:
    config = dataclasses.replace(decoder_config(raw("gpt_neox")), query_chunk=7, remat=False)
    assert hugging_face_config(config) == hugging_face_config(decoder_config(raw("gpt_neox")))


def test_a_decoder_of_no_family_is_not_described() -> None:
    mixed = DecoderConfig(8, 8, 1, 1, 1, 8, 8, 8, norm="layer", norms="after", rope=RopeConfig())
    with pytest.raises(ValueError, match="No supported Hugging Face architecture describes"):
        hugging_face_config(mixed)
