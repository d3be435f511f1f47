"""Small random GGUF files, written from `transformers` models as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import torch_model

gguf = pytest.importorskip("gguf")  # Modules that import anything from here are skipped without it.

SIZES = {"hidden_size": 64, "intermediate_size": 96}
"""Multiples of 32, the values of a block."""

TOKENS = [*map(chr, range(33, 84)), "Ġ", "AB"]
MERGES = ["A B"]


def write_gguf(
    file: Path, model_type: str, kind: str = "F32", seed: int = 0, fields: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Writes a model with its matrices in the type `kind`; returns the `transformers` model with the unrounded weights.

    Args:
        fields: Further metadata, of integers, numbers and texts.
        options: Of `checkpoints.torch_model`.
    """
    model = torch_model(model_type, seed, **{**SIZES, **options})
    config = model.config
    writer = gguf.GGUFWriter(file, model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if model_type == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS[: config.vocab_size])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(1)
    for key, value in (fields or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, model_type.upper()), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        module, part = name.rsplit(".", 1)
        values = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if model_type == "llama" and heads:
            values = _permuted(values, heads)
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{names.get_name(module)}.{part}", gguf.quantize(values, stored), raw_dtype=stored)
    _finish(writer)
    return model


def add_tensor(file: Path, name: str, values: np.ndarray) -> None:
    """Writes the file again with one more float32 tensor."""
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(file.with_suffix(".new"), architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, values.astype(np.float32))
    _finish(writer)
    file.with_suffix(".new").replace(file)


def _permuted(values: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
