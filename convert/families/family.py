"""What a family's table says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from convert.json_files import Kind
from jaxhess.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        model_type: Its name in `config.json`.
        architecture: The `transformers` class with a language-model head.
        tensors: Name in the checkpoint -> our path, and the axes of the file's tensor (`convert.layout`). Names are
            without `prefix`; `{layer}` is the layer's number. A row whose path the model lacks (a bias, an untied
            head), or has with other axes, is skipped. A fused tensor has one row for each of its parts.
        prefix: Begins the names of all tensors but the head's; files saved from the base model lack it.
        buffers: Regular expressions of names that old checkpoints hold although they are no parameters.
        head: Name of the output matrix in the file; it never has the prefix.
        head_alias: Another name under which it is accepted.
        fields: Field of `DecoderConfig` -> attribute of the `transformers` configuration with the same meaning. Fields
            of a configuration inside it have a dot: `experts.top_k`.
        optional_sizes: Fields of `DecoderConfig` with a size that `config.json` may leave open; it must say the others.
        sizes: Further keys with a size, which `config.json` must say.
        constants: Fields of `DecoderConfig` that this family fixes.
        required: Attributes of the `transformers` configuration that our decoder can represent only at this value.
        activation: The attribute that names the activation.
        window: Which attributes say where the sliding window applies.
        partial_rotary: Only a part of each head may be rotated.
        rope_by_layer: `rope_parameters` has those of full and of sliding attention.
        aliases: Other names in `config.json` of attributes in `fields` -> their own.
        refused: Keys of other families that this one's code in `transformers` reads too, and our decoder cannot.
        memory: Rows like those of `tensors`, and in place of them, for the names of `named_parameters()` in
            `transformers`, where these differ from the file's.
        later_layer: Files may hold layers beyond `num_hidden_layers`, for the prediction of several tokens, which are
            left out as `transformers` leaves them out. Such a layer is known by this tensor of its own.
        derive: Further fields of `DecoderConfig` from the `transformers` configuration.
        describe: The reverse: keys of `config.json` for what `derive` reads. Called where the model has all that
            `fields` has: experts, latent attention.
        keys: Keys that `derive` reads, and what their values must be.
    """

    model_type: str
    architecture: str
    tensors: tuple[tuple[str, str, str], ...]
    prefix: str
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    head: str = "lm_head.weight"
    head_alias: str | None = None
    activation: str = "hidden_act"
    window: Literal["none", "all layers", "layer types"] = "none"
    partial_rotary: bool = False
    rope_by_layer: bool = False
    sizes: tuple[str, ...] = ()
    optional_sizes: tuple[str, ...] = ("num_kv_heads", "head_dim", "max_positions")
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: tuple[str, ...] = ()
    memory: tuple[tuple[str, str, str], ...] = ()
    later_layer: str | None = None
    derive: Callable[[Any], dict[str, Any]] | None = None
    describe: Callable[[DecoderConfig], dict[str, Any]] | None = None
    keys: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    @property
    def base_architecture(self) -> str:
        """The `transformers` class without its head."""
        return re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.architecture)
