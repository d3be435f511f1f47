"""`config.json` of a Hugging Face checkpoint -> `DecoderConfig`, and back.

The `transformers` configuration class of the model fills the defaults and brings old and new spellings into one form;
the tables of `convert.families` say what each attribute means here, those of `convert.config_keys` which keys there
are. What our decoder cannot compute is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

from convert.config_keys import ROPE_VALUES, relevant
from convert.families import ACTIVATIONS, FAMILIES, UNCOVERED, Family
from convert.json_files import check, one_line, shown
from convert.quantized import quantization_method
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, ExpertsConfig, LatentConfig, RopeConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")


def family_of(hf_config: dict[str, Any], file: str | Path = "config.json") -> Family:
    """The table of the model that a raw `config.json` describes; InputError names an unsupported one."""
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = f"supported are {', '.join(sorted(FAMILIES))}"
        if isinstance(model_type, str) and model_type in UNCOVERED:
            nearest, lacking = UNCOVERED[model_type]
            known = f"the nearest that is supported is {nearest}, which lacks {lacking}"
        said = f"has model_type {shown(model_type)}, which is unsupported"
        raise InputError(f"{file} {'names no model_type' if model_type is None else said}; {known}.")
    return FAMILIES[model_type]


def decoder_config(
    hf_config: dict[str, Any], dtype: str = "float32", file: str | Path = "config.json"
) -> DecoderConfig:
    """The decoder that a raw `config.json` describes, computing in `dtype`; `file` is what errors call it.

    Raises:
        InputError: An unsupported model, a key that is not understood, a value of the wrong type or range, or an option
            that our decoder cannot represent; the sentence names it.

    Warns:
        UserWarning: Keys that `transformers` ignores as well.
    """
    family = family_of(hf_config, file)
    quantization_method(hf_config, file)  # refuses what is not read
    full = _filled_in(family, relevant(family, hf_config, file), file)
    try:
        return DecoderConfig(**_fields(family, full), dtype=dtype, family=family.model_type)
    except ValueError as error:
        raise InputError(f"{file} describes no model that is supported: {one_line(error)}.") from error


def _fields(family: Family, full: Any) -> dict[str, Any]:
    """Fields of `DecoderConfig` from the `transformers` configuration."""
    for name, value in family.required.items():
        if getattr(full, name) != value:
            raise InputError(
                f"{family.model_type} with {name}={getattr(full, name)} is not supported; only {value} is."
            )

    fields: dict[str, Any] = {ours: getattr(full, theirs, None) for ours, theirs in family.fields.items()}
    fields |= family.constants
    if family.derive is not None:
        fields |= family.derive(full)
    fields, inner = _by_owner(fields)
    for owner, kind in {"latent": LatentConfig, "experts": ExpertsConfig}.items():
        if owner in inner and owner not in fields:
            fields[owner] = kind(**inner[owner])
    if fields.get("num_kv_heads") is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["mlp_dim"] is None:  # GPT-2 leaves it open
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    fields.setdefault("head_dim", None)
    if fields["head_dim"] is None:
        if fields["embed_dim"] % fields["num_heads"]:
            raise InputError(f"The width {fields['embed_dim']} is not a multiple of {fields['num_heads']} heads.")
        fields["head_dim"] = fields["embed_dim"] // fields["num_heads"]
    activation = getattr(full, family.activation)
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{family.activation}={shown(activation)} is not supported; known are {', '.join(ACTIVATIONS)}."
        )
    fields.setdefault("activation", ACTIVATIONS[activation])
    fields["sliding_window"], fields["sliding_layers"] = _sliding(family, full)
    if "rope" not in fields:
        fields |= _ropes(family, full, fields["head_dim"])
        fields["rope"] = dataclasses.replace(fields["rope"], **inner.get("rope", {}))
    return fields


def _by_owner(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The fields of `DecoderConfig` itself, and those of each configuration inside it."""
    inner: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        owner, dot, own = name.partition(".")
        if dot:
            inner.setdefault(owner, {})[own] = value
    return {name: value for name, value in fields.items() if "." not in name}, inner


def hugging_face_config(config: DecoderConfig) -> dict[str, Any]:
    """A `config.json` that describes `config`: of the family it was read from, or the first that can say all of it.

    Token ids are left out: the tokenizer knows them.

    Raises:
        InputError: No supported family has this combination of options.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != config.family):
        hf_config = _described_by(family, config)
        try:
            if comparable(decoder_config(hf_config, config.dtype)) == comparable(config):
                return hf_config
        except ValueError:
            continue
    raise InputError(f"No supported Hugging Face architecture describes {config}.")


def _filled_in(family: Family, relevant: dict[str, Any], file: str | Path) -> Any:
    """The `transformers` configuration, with its defaults and in its newest spelling."""
    from transformers import CONFIG_MAPPING  # slow to import, and `import convert` should not be

    try:
        # Copied, for it writes into nested dictionaries.
        return CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(relevant))
    except Exception as error:  # its validators raise classes of their own, by release
        raise InputError(f"{file} is not a valid {family.model_type} configuration: {one_line(error)}.") from error


def _sliding(family: Family, full: Any) -> tuple[int | None, tuple[bool, ...]]:
    """The look-back in tokens and the layers it applies to (none listed: all)."""
    window = getattr(full, "sliding_window", None)
    kinds: Any = getattr(full, "layer_types", None)
    if family.window == "layer types":
        unknown = sorted(set(kinds) - set(LAYER_TYPES))
        if unknown:
            raise InputError(
                f"layer_types has {unknown[0]!r}; only full_attention and sliding_attention are supported."
            )
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
        if not any(sliding):
            return None, ()
        if not window or getattr(full, "use_sliding_window", True) is False:
            raise InputError("layer_types asks for sliding_attention but use_sliding_window or sliding_window is off.")
        return window, () if all(sliding) else sliding
    if family.window == "none":
        window = None
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds and set(kinds) != {expected}:
        raise InputError(f"{family.model_type} with layer_types is not supported, except {expected} in every layer.")
    return window, ()


def _ropes(family: Family, full: Any, head_dim: int) -> dict[str, Any]:
    """Rotary positions from the standardised `rope_parameters`, and which layers have others."""
    parameters = full.rope_parameters
    if not family.rope_by_layer:
        return {"rope": _rope(family, full, parameters, head_dim)}
    unknown = sorted(parameters.keys() - set(LAYER_TYPES))
    if unknown:
        raise InputError(f"rope_parameters has {shown(unknown[0])}, which is not understood beside layer types.")
    main, local = (_rope(family, full, parameters[kind], head_dim) for kind in LAYER_TYPES)
    if main == local:
        return {"rope": main}
    layers = tuple("local" if kind == "sliding_attention" else "main" for kind in full.layer_types)
    return {"rope": main, "local_rope": local, "rope_layers": layers}


def _rope(family: Family, full: Any, parameters: dict[str, Any], head_dim: int) -> RopeConfig:
    rope = dict(parameters)
    kind = rope.get("rope_type", "default")
    if any(isinstance(value, dict) for value in rope.values()):
        raise InputError("rope_parameters differ by layer type, which is not supported.")
    if kind not in ROPE_KINDS:
        raise InputError(f"RoPE scaling {shown(kind)} is not supported; known are {', '.join(ROPE_KINDS)}.")
    unknown = sorted(rope.keys() - ROPE_VALUES.keys())
    if unknown:
        raise InputError(f"rope_parameters has {shown(unknown[0])}, which is not understood.")
    if rope.get("type") not in (None, kind):
        raise InputError(f"rope_parameters has rope_type {kind!r} and type {shown(rope['type'])}.")
    check(rope, ROPE_VALUES, "rope_parameters")
    part = rope.get("partial_rotary_factor")
    part = 1.0 if part is None else part
    if part != 1 and not family.partial_rotary:
        raise InputError(f"partial_rotary_factor={part} is not supported for {family.model_type}.")
    options: dict[str, Any] = {"theta": float(rope["rope_theta"]), "kind": kind}
    if int(head_dim * part) != head_dim:
        options["dims"] = int(head_dim * part)
    if kind == "default":
        return RopeConfig(**options)

    trained = full.max_position_embeddings if kind == "dynamic" else rope.get("original_max_position_embeddings")
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = full.max_position_embeddings / trained
    if kind != "linear":
        options["original_max_positions"] = trained
    if kind == "longrope":
        return RopeConfig(**options, **_longrope(rope, factor, int(head_dim * part)))
    options["factor"] = _number(rope | {"factor": factor}, "factor", kind)
    if kind == "llama3":
        options["low_freq_factor"] = _number(rope, "low_freq_factor", kind)
        options["high_freq_factor"] = _number(rope, "high_freq_factor", kind)
    if kind == "yarn":
        options["beta_fast"] = float(rope.get("beta_fast") or 32)
        options["beta_slow"] = float(rope.get("beta_slow") or 1)
        options["truncate"] = bool(rope.get("truncate", True))
        options["attention_factor"] = yarn_attention_factor(rope, options["factor"])
    return RopeConfig(**options)


def _number(rope: dict[str, Any], name: str, kind: str) -> float:
    if rope.get(name) is None:
        raise InputError(f"RoPE scaling {kind!r} needs the number {name}.")
    return float(rope[name])


def _longrope(rope: dict[str, Any], factor: Any, dims: int) -> dict[str, Any]:
    """Factors on the frequencies, and sqrt(1 + ln(factor) / ln(trained length)) on cos and sin (arXiv 2402.13753)."""
    fields: dict[str, Any] = {"attention_factor": rope.get("attention_factor")}
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name) or ()
        if len(factors) != dims // 2:
            raise InputError(f"{name} has {len(factors)} numbers for {dims // 2} frequencies.")
        fields[f"{name}s"] = tuple(map(float, factors))
    if fields["attention_factor"] is None:
        trained = rope["original_max_position_embeddings"]
        if trained == 1:
            raise InputError("original_max_position_embeddings is 1; longrope needs a trained context.")
        fields["attention_factor"] = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return fields


def yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """The factor on cos and sin that `attention_factor`, or else `mscale` and `mscale_all_dim`, ask for.

    0.1 m ln(factor) + 1 with m = 1 by default (arXiv 2309.00071, equation 22), the ratio of two where both are given.
    """
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _described_by(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """`config` in the words of `family`; what they cannot say is lost, which the caller finds out by reading back."""
    spelling = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    described: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    described |= {theirs: _field(config, ours) for ours, theirs in family.fields.items()}
    described |= family.required
    inner = {name.partition(".")[0] for name in family.fields if "." in name}
    if family.describe is not None and all(getattr(config, name) is not None for name in inner):
        described |= family.describe(config)
    described.setdefault(family.activation, spelling.get(config.activation))
    described |= {"bos_token_id": None, "eos_token_id": None, "dtype": config.dtype}
    if family.window != "none":
        described["sliding_window"] = config.sliding_window
    if family.window == "layer types":
        layers = config.sliding_layers or (config.sliding_window is not None,) * config.num_layers
        described["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in layers]
    if config.rope is not None and "rope" not in family.constants:
        ropes = (config.rope, config.local_rope or config.rope)
        main, local = (_described_rope(config, rope, family.partial_rotary) for rope in ropes)
        if family.rope_by_layer:
            described["rope_parameters"] = dict(zip(LAYER_TYPES, (main, local), strict=True))
        else:
            described["rope_parameters"] = {**main, **described.get("rope_parameters", {})}
    return described


def _field(config: Any, name: str) -> Any:
    """A field, also one inside another: `experts.top_k`; None where that is missing."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def _described_rope(config: DecoderConfig, rope: RopeConfig, partial: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if partial:
        described["partial_rotary_factor"] = config.rotary_dims / config.head_dim
    if rope.kind not in ("default", "longrope"):
        described["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        described["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        described |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        described |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.kind == "longrope":
        described |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.kind in ("yarn", "longrope"):
        described["attention_factor"] = rope.attention_factor
    return described


def comparable(config: DecoderConfig) -> DecoderConfig:
    """`config` without what no checkpoint stores: how it is computed, and defaults that are spelled out."""
    rope = config.rope
    if rope is not None and rope.dims == config.head_dim:
        rope = dataclasses.replace(rope, dims=None)
    layers = () if all(config.sliding_layers) else config.sliding_layers
    experts = config.experts
    if experts is not None and all(experts.layers):
        experts = dataclasses.replace(experts, layers=())
    window = None if layers and not any(layers) else config.sliding_window
    return dataclasses.replace(
        config,
        rope=rope,
        rope_layers=() if set(config.rope_layers) <= {"main"} else config.rope_layers,
        attention_scale=config.score_scale,
        experts=experts,
        sliding_window=window,
        sliding_layers=layers if window is not None else (),
        query_chunk=DecoderConfig.query_chunk,
        attention=DecoderConfig.attention,
        remat=DecoderConfig.remat,
    )
