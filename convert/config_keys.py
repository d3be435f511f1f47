"""The keys of a `config.json`: every one is understood, irrelevant for a stated reason, or refused by name.

A key that means something in another supported family but is not read by this one's code in `transformers` is warned
about: the file says something that neither `transformers` nor we do.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from convert.families import FAMILIES, Family
from convert.json_files import (
    ANYTHING,
    FLAG,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    Kind,
    check,
    integer,
    number,
    optional,
    shown,
)
from jaxhess.errors import InputError

SIZE, LAYERS = integer(1), integer(1, 10_000)
FRACTION, POSITIVE = number(1e-6, 1), number(1e-30, 1e30)

FIELD_KINDS = {
    **dict.fromkeys(("vocab_size", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"), SIZE),
    "num_layers": LAYERS,
    "max_positions": SIZE,
    "norm_eps": number(0, 1),
    **dict.fromkeys(("tied_embeddings", "parallel_residual", "shared_norm"), FLAG),
    **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), FLAG),
    **dict.fromkeys(("experts.num_experts", "experts.top_k", "experts.mlp_dim", "experts.shared_dim"), SIZE),
    **dict.fromkeys(("experts.groups", "experts.top_groups"), optional(SIZE)),
    "experts.renormalized": FLAG,
    **dict.fromkeys(("latent.kv_rank", "latent.value_dim"), SIZE),
    "latent.query_rank": optional(SIZE),
    **dict.fromkeys(("attention_softcap", "logit_softcap", "attention_scale"), optional(POSITIVE)),
    **dict.fromkeys(("embed_scale", "residual_scale", "logit_scale", "experts.scale"), number(-1e30, 1e30)),
}
"""Fields of `DecoderConfig` -> what the attribute of the same meaning must be."""

ROPE_VALUES = {
    "rope_theta": POSITIVE,
    "factor": optional(number(1, 1e6)),
    "original_max_position_embeddings": SIZE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "beta_fast": optional(number(0, 1e6)),
    "beta_slow": optional(number(0, 1e6)),
    "truncate": FLAG,
    "attention_factor": optional(POSITIVE),
    **dict.fromkeys(("short_factor", "long_factor"), optional(NUMBERS)),
    "mscale": optional(number(0, 1e3)),
    "mscale_all_dim": optional(number(0, 1e3)),
    "partial_rotary_factor": optional(FRACTION),
    "rope_type": TEXT,
    "type": TEXT,  # its older name
    "finetuned": FLAG,
    "attn_factor": optional(POSITIVE),
}
"""Keys of `rope_parameters`, or of `rope_scaling` as it was called before."""

ROPE_IGNORED = ("finetuned", "attn_factor")
"""Those that published checkpoints have (the first with YaRN, and DeepSeek-R1-0528-Qwen3-8B), and nothing reads."""

ROTARY_KINDS = {
    "rope_theta": optional(POSITIVE),
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
    "partial_rotary_factor": optional(FRACTION),
    "original_max_position_embeddings": optional(SIZE),
}
"""What models with rotary positions say of them outside `rope_parameters`."""

IGNORED = ("dual_chunk_attention_config",)
"""Keys that change the function in other programs (vLLM, for Qwen2.5-1M), and that nothing in `transformers` reads."""

IRRELEVANT = {
    "what wrote the file, or what it is for": (
        "transformers_version name_or_path dtype torch_dtype tokenizer_class prefix finetuning_task "
        "task_specific_params custom_pipelines transformers.js_config is_llama_config unsloth_version unsloth_fixed "
        "unsloth_training_args model_max_length max_sequence_length n_ctx num_steps"
    ),
    "how the same function is computed": (
        "use_cache output_attentions output_hidden_states output_past return_dict torchscript use_bfloat16 "
        "attn_implementation use_flash_attention use_flash_attn chunk_size_feed_forward reorder_and_upcast_attn "
        "pretraining_tp ep_size cache_implementation gradient_checkpointing is_decoder tf_legacy_loss"
    ),
    "training: where it starts, and dropout, which we leave out as `transformers` does in evaluation": (
        "initializer_range attention_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob "
        "classifier_dropout resid_pdrop embd_pdrop attn_pdrop neftune_noise_alpha"
    ),
    "which outputs `Trainer` does not gather": "keys_to_ignore_at_inference",
    "token ids, which the tokenizer knows": "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id "
    "decoder_start_token_id mask_token_id",
    "heads for other tasks": (
        "id2label label2id num_labels problem_type summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout n_special predict_special_tokens"
    ),
    "generation of text": (
        "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty "
        "do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length "
        "max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
        "num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
        "return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p"
    ),
}
"""Why a key says nothing about the function that a checkpoint computes -> such keys."""

ONLY_AT: dict[str, Any] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "auto_map": {},
    "alibi": False,
    "rope_interleaved": False,
    "use_mrope": False,
    "moe_layer_freq": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "logit_scale": None,
    "no_rope_layers": None,
}
"""Keys that change the function of a family that reads them, except at this value (or null); of one that does not they
say that the file is another's. One that is in no table here is refused unless it is null."""

_IRRELEVANT = {key for keys in IRRELEVANT.values() for key in keys.split()}


def understood(family: Family) -> dict[str, Kind]:
    """The keys that describe a model of this family, and what their values must be."""
    kinds = {name: FIELD_KINDS[ours] for ours in family.fields for name in _names(family, ours)}
    kinds |= {name: FLAG if type(value) is bool else ANYTHING for name, value in family.required.items()}
    kinds |= {family.activation: TEXT, "layer_types": optional(TEXTS), **dict.fromkeys(family.sizes, SIZE)}
    if "rope" not in family.constants:
        kinds |= ROTARY_KINDS
    if family.window != "none":
        kinds["sliding_window"] = optional(SIZE)
    return {**kinds, **family.keys}


def relevant(family: Family, hf_config: dict[str, Any], file: str | Path) -> dict[str, Any]:
    """The part of a raw `config.json` that describes the function it computes, checked key by key.

    Raises:
        InputError: A key that we do not understand, or a value of the wrong type or range; the sentence names it.

    Warns:
        UserWarning: Keys that this family's code in `transformers` does not read.
    """
    kinds = understood(family)
    elsewhere = {key for other in FAMILIES.values() for key in understood(other)} - kinds.keys() - set(family.refused)
    check(hf_config, {"architectures": optional(TEXTS), "dtype": optional(TEXT), "torch_dtype": optional(TEXT)}, file)
    own = {family.architecture.lower(), family.base_architecture.lower()}  # LLaMAForCausalLM was one spelling
    foreign = [name for name in hf_config.get("architectures") or () if name.lower() not in own]
    if foreign:
        raise InputError(
            f"{file} has architectures {shown(foreign)}; a {family.model_type} that is a language model has "
            f"{family.architecture}."
        )
    ignored = []
    for key, value in hf_config.items():
        known = key in kinds or key in _IRRELEVANT or key in ("model_type", "architectures", "quantization_config")
        if known or value is None or key.startswith("_"):  # transformers' own notes to itself
            continue
        if key not in ONLY_AT and (key in elsewhere or key in IGNORED):
            ignored.append(key)
        elif key not in ONLY_AT or value != ONLY_AT[key]:
            right = ONLY_AT.get(key)
            only = "it is not understood" if right is None else f"only {shown(right)} is supported"
            raise InputError(f"{file} has {shown(key)[1:-1]} {shown(value)}; {only} for {family.model_type}.")
    chosen = {key: value for key, value in hf_config.items() if key in kinds}
    unsaid = _check_sizes(family, chosen, file)
    check({key: value for key, value in chosen.items() if key not in unsaid}, kinds, file)
    for name in ("rope_scaling", "rope_parameters"):
        rope = chosen.get(name) or {}
        by_layer = [value for value in rope.values() if isinstance(value, dict)]
        for part in [rope, *by_layer]:
            check(part, ROPE_VALUES, f"{name} in {file}")
            ignored += [key for key in ROPE_IGNORED if key in part]
    if ignored:
        warnings.warn(
            f"{file} has {', '.join(sorted(ignored))}: ignored, as transformers ignores it in a {family.model_type}.",
            stacklevel=3,
        )
    return chosen


def _names(family: Family, field: str) -> list[str]:
    """The keys under which a `config.json` may say a field of `DecoderConfig`."""
    own = family.fields[field]
    return [own, *(alias for alias, name in family.aliases.items() if name == own)]


def _check_sizes(family: Family, chosen: dict[str, Any], file: str | Path) -> set[str]:
    """Names of the sizes that are null, where a size may be left open.

    What fixes shapes must be there: the configuration class would fill in the sizes of some 7B model unsaid.
    """
    unsaid = set()
    fields = [field for field in family.fields if FIELD_KINDS[field] in (SIZE, LAYERS)]
    sizes = [(_names(family, field), field in family.optional_sizes) for field in fields]
    for names, may_be_open in [*sizes, *(([name], False) for name in family.sizes)]:
        said = [name for name in names if chosen.get(name) is not None]
        if not said and not may_be_open:
            raise InputError(f"{file} does not say {names[0]}.")
        if any(chosen[name] != chosen[said[0]] for name in said):
            raise InputError(f"{file} gives different values for {names[0]} and {said[-1]}, which mean the same size.")
        unsaid |= set(names) - set(said)
    return unsaid
