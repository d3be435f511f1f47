"""Every key of a config.json is understood, irrelevant, warned about or refused by name, and every value is checked."""

from __future__ import annotations

import inspect
import json
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import DEFAULTS, write_checkpoint

import convert
from convert.config_keys import _IRRELEVANT, ONLY_AT, understood
from convert.configs import decoder_config
from convert.families import FAMILIES
from convert.json_files import read_json
from convert.loading import read_config

# Keys of published checkpoints that say nothing about the function, as they stand in the files.
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
              "resid_pdrop": 0.1, "summary_type": "cls_index", "_num_labels": 1, "output_past": True}],
    "gpt_neox": [{"rotary_emb_base": 10000, "torch_dtype": "float16", "transformers_version": "4.24.0"},
                 {"custom_pipelines": {"text-generation": {"impl": "x.Y", "pt": "AutoModelForCausalLM"}}},
                 {"num_steps": "global_step301000"}],  # Polyglot-Ko
    # SmolLM2 and TinyLlama, and one that a fine-tuning tool wrote
    "llama": [{"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "attention_dropout": 0.1,
               "transformers.js_config": {"kv_cache_dtype": {}}, "bos_token_id": 0, "eos_token_id": [0, 2],
               "rope_scaling": None, "rope_theta": 100000, "architectures": ["LLaMAForCausalLM"]},
              {"_name_or_path": "x/y", "max_sequence_length": 2048, "unsloth_version": "1", "use_cache": False,
               "keys_to_ignore_at_inference": ["past_key_values"]}],
    "mistral": [{"sliding_window": 4096, "architectures": ["MistralForCausalLM"]}],
    "qwen2": [{"use_mrope": False, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 70}],
    "qwen3": [{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "rope_scaling": None}],
}  # fmt: skip


def raw(model_type: str, **options: Any) -> dict[str, Any]:
    """A config.json of a tiny model."""
    return {"model_type": model_type, **DEFAULTS[model_type], **options}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_as_transformers_writes_it_loads_without_a_warning(model_type: str, tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING[model_type](**DEFAULTS[model_type])
    config.architectures = [FAMILIES[model_type].architecture]
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = read_config(tmp_path)
        everything = decoder_config(json.loads(config.to_json_string(use_diff=False)))
    assert saved == everything == decoder_config(raw(model_type))


@pytest.mark.parametrize(("model_type", "index"), [(f, i) for f, group in PUBLISHED.items() for i in range(len(group))])
def test_a_config_with_the_keys_of_a_published_checkpoint_loads_without_a_warning(model_type: str, index: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder_config(raw(model_type, **PUBLISHED[model_type][index]))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_said_to_be_ignored_is_not_read_by_transformers(model_type: str) -> None:
    family = FAMILIES[model_type]
    module = inspect.getmodule(getattr(transformers, family.architecture))
    assert module is not None
    read = set(re.findall(r"""config(?:\.|, ["'])(\w+)""", inspect.getsource(module)))
    warned = {key for other in FAMILIES.values() for key in understood(other)} - set(understood(family))
    warned -= set(family.refused)
    assert {"hidden_size", "n_embd"} & read  # the expression finds what is read
    assert not read & warned


def test_no_key_of_generation_stops_a_checkpoint() -> None:
    from transformers import GenerationConfig

    assert set(GenerationConfig._get_default_generation_params()) <= _IRRELEVANT
    for family in FAMILIES.values():
        assert not understood(family).keys() & _IRRELEVANT
    assert not _IRRELEVANT & ONLY_AT.keys()


@pytest.mark.parametrize(
    ("model_type", "options", "names"),
    [
        ("llama", {"sliding_window": 7}, ["sliding_window"]),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, ["attention_bias", "mlp_bias"]),
        ("gpt2", {"rope_theta": 5.0}, ["rope_theta"]),
    ],
)
def test_what_transformers_ignores_too_is_warned_about_by_name(model_type: str, options: Any, names: Any) -> None:
    with pytest.warns(
        UserWarning, match=f"has {', '.join(names)}: ignored, as transformers ignores it in a {model_type}"
    ):
        assert decoder_config(raw(model_type, **options)) == decoder_config(raw(model_type))


def test_dual_chunk_attention_of_qwen_with_a_million_tokens_is_warned_about() -> None:
    config = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    with pytest.warns(UserWarning, match="has dual_chunk_attention_config: ignored, as transformers ignores it"):
        found = decoder_config(raw("qwen2", dual_chunk_attention_config=config))
    assert found == decoder_config(raw("qwen2"))


def test_a_rope_key_that_nothing_reads_is_warned_about() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.warns(UserWarning, match="has attn_factor: ignored"):
        config = decoder_config(raw("qwen3", rope_scaling=rope | {"attn_factor": 0.88}))
    assert config == decoder_config(raw("qwen3", rope_scaling=rope))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"is_causal": False}, "has is_causal False; only True is supported for llama."),
    ("llama", {"architectures": ["GraniteForCausalLM"]}, "has architectures ['GraniteForCausalLM']; a llama that is"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "has architectures 'LlamaForCausalLM'; it must be a list"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "has auto_map {"),
    ("llama", {"embedding_multiplier": 12.0}, "has embedding_multiplier 12.0; only 1 is supported"),
    ("llama", {"attention_multiplier": 0.015625}, "has attention_multiplier 0.015625"),
    ("llama", {"residual_multiplier": 0.22}, "has residual_multiplier 0.22"),
    ("llama", {"logits_scaling": 8.0}, "has logits_scaling 8.0"),
    ("llama", {"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping 50.0; it is not understood"),
    ("llama", {"final_logit_softcapping": 30.0}, "has final_logit_softcapping 30.0; it is not understood"),
    ("llama", {"no_rope_layers": [1, 0]}, "has no_rope_layers [1, 0]; it is not understood"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, -1]}}, "it must be a list of positive"),
    ("gemma2", {"use_bidirectional_attention": True}, "has use_bidirectional_attention True; it must be false or null"),
    ("gemma2", {"hidden_act": "silu"}, "has hidden_act 'silu'; it must be \"gelu_pytorch_tanh\" or null"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "with attn_logit_softcapping=5.0 is not supported; only None is."),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has 'rope_theta', which is not"),
    ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "it must be that of the first release"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "must have length 2"),
    ("smollm3", {"no_rope_layers": []}, "has no_rope_layers []; it must be a list of 0 and 1"),
    ("stablelm", {"qk_layernorm": True}, "stablelm with qk_layernorm=True is not supported; only False is."),
    ("cohere2", {"use_parallel_block": False}, "has use_parallel_block False; it must be true"),
    ("llama", {"per_layer_config": {"0": {"hidden_act": "relu"}}}, "has per_layer_config {'0'"),
    ("llama", {"pruned_heads": {"0": [1]}}, "has pruned_heads {'0': [1]}"),
    ("llama", {"a\nb": 1}, r"has a\nb 1; it is not understood"),
    ("gpt_neox", {"head_dim": 8}, "has head_dim 8; it is not understood for gpt_neox."),
    ("gpt2", {"hidden_size": 32}, "gives different values for n_embd and hidden_size, which mean the same size."),
    ("llama", {"rms_norm_eps": float("inf")}, "has rms_norm_eps inf; it must be a number from 0 to 1."),
    ("llama", {"rms_norm_eps": 1e300}, "has rms_norm_eps 1e+300; it must be a number from 0 to 1."),
    ("llama", {"rms_norm_eps": -1e-6}, "has rms_norm_eps -1e-06; it must be"),
    ("llama", {"rms_norm_eps": float("nan")}, "has rms_norm_eps nan; it must be"),
    ("llama", {"rms_norm_eps": None}, "has rms_norm_eps None; it must be"),
    ("gpt2", {"layer_norm_epsilon": True}, "has layer_norm_epsilon True; it must be"),
    ("llama", {"rope_theta": float("inf")}, "has rope_theta inf; it must be a number"),
    ("llama", {"rope_theta": None}, "rope_theta None; it must be a number"),
    ("llama", {"rope_theta": 0}, "has rope_theta 0; it must be a number"),
    ("gpt_neox", {"rotary_emb_base": -1}, "has rotary_emb_base -1; it must be a number"),
    ("gpt_neox", {"rotary_pct": 2}, "has rotary_pct 2; it must be a number"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, "has factor -2; it must be a number from 1"),
    ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
     "low_freq_factor=4.0 must be below high_freq_factor=1.0"),
    ("llama", {"rope_scaling": {**YARN, "mscale": "a", "mscale_all_dim": 1}}, "has mscale 'a'; it must be a number"),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_slow=2.0 must be positive and at most"),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "has original_max_position_e"),
    ("llama", {"rope_scaling": {**YARN, "unheard": 1}}, "has 'unheard', which is not understood"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type 'linear' and type"),
    ("llama", {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "has rope_type ['linear']; it must be text"),
    ("llama", {"model_type": ["llama"]}, "has model_type ['llama'], which is unsupported"),
    ("llama", {"quantization_config": 5}, "quantized (quantization_config: 5)"),
    ("llama", {"quantization_config": True}, "quantized (quantization_config: True)"),
    ("llama", {"head_dim": 10**400}, "0000000000...; it must be a positive integer up to 2147483647."),
    ("llama", {"num_hidden_layers": 1_000_000}, "has num_hidden_layers 1000000; it must be a positive integer"),
    ("llama", {"num_hidden_layers": 2.0}, "has num_hidden_layers 2.0; it must be"),
    ("llama", {"hidden_act": ["silu"]}, "has hidden_act ['silu']; it must be text"),
    ("llama", {"tie_word_embeddings": "yes"}, "has tie_word_embeddings 'yes'; it must be true or false"),
    ("qwen2", {"layer_types": 5}, "has layer_types 5; it must be a list of texts"),
    ("mistral", {"sliding_window": 0}, "has sliding_window 0; it must be a positive integer"),
    ("llama", {"dtype": 5}, "has dtype 5; it must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "options", "sentence"), REFUSED, ids=[sentence for *_, sentence in REFUSED])
def test_what_is_not_understood_is_refused_with_file_key_and_value(
    model_type: str, options: Any, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw(model_type) | options))
    with pytest.raises(ValueError) as caught:
        read_config(file)
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": ' * 100_000, "is nested too deeply"),
        ('{"a": ' + "[" * 10_000 + "]" * 10_000 + "}", "is nested too deeply"),
        ('{"a": 1, "a": 2}', "is not valid JSON: it names 'a' twice."),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
        (b"\xff\xfe{}", "is not valid JSON: 'utf-8' codec"),
        ("", "is not valid JSON"),
    ],
    ids=range(6),
)
def test_a_file_that_is_no_json_object_is_refused_in_a_sentence(text: Any, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in str(caught.value)


def test_more_layers_than_tensors_are_refused_before_anything_is_made_for_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10_000}))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"has 21 tensors in all; config.json says 10000 layers"):
        convert.load_config(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # a megabyte; the names alone of 10,000 layers take ten
