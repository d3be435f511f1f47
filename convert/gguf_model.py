"""A GGUF file as a Hugging Face checkpoint: its metadata as `config.json`, its tensors under `transformers`' names.

llama.cpp stores the rows of queries and keys of its architecture `llama` in another order than `transformers`: within a
head, those that are rotated together lie beside each other, not half a head apart. That is undone here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_file import GgufFile
from convert.json_files import shown
from convert.layout import Slices
from convert.source import StoredTensor
from jaxhess.errors import InputError

SUFFIX = ".gguf"


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What llama.cpp calls an architecture.

    Attributes:
        name: In `transformers`, as `architectures` has it.
        permuted: Rows of queries and keys are in llama.cpp's order.
        biases: Keys of `config.json` -> a tensor of layer 0 that is there when they are true.
    """

    name: str
    permuted: bool = False
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)


ARCHITECTURES = {
    "llama": _Architecture(
        "LlamaForCausalLM", True, {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    ),
    "qwen2": _Architecture("Qwen2ForCausalLM"),
    "qwen3": _Architecture("Qwen3ForCausalLM", biases={"attention_bias": "blk.0.attn_output.bias"}),
}
"""`general.architecture` -> what it is; the keys are model types of `transformers` too. Mistral is stored as llama."""

_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
"""Keys of the metadata, without the architecture, that must be there -> keys of `config.json`."""

_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

_OTHERS = (
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "tensor_data_layout",
)  # fmt: skip
"""Further keys that are understood, or say nothing of the function that is computed (the last two)."""

_NOTHING = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
"""Keys that ask for nothing at these values."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_ROPE_FREQUENCIES = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all models of Meta's that have it (Llama 3.1 to 3.3); a GGUF has only the factors that follow."""


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without other weights; None: no such.

    Raises:
        InputError: Several GGUF files in such a folder.
    """
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "model.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files or any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return None
    if len(files) > 1:
        raise InputError(f"{path} has {len(files)} GGUF files, such as {files[0].name}: give the path of one.")
    return files[0]


class GgufSource:
    """The tensors of a GGUF file under the names, and in the order of rows, of `transformers`: a `TensorSource`."""

    def __init__(self, file: GgufFile):
        architecture = _architecture(file)
        self.directory = file.path
        self._file = file
        self._names: dict[str, str] = {}
        heads = {"attn_q": _field(file, "attention.head_count"), "attn_k": _kv_heads(file)}
        self._heads: dict[str, int] = {}  # of tensors whose rows are permuted
        tensors: dict[str, StoredTensor] = {}
        for stored_name, tensor in file.tensors.items():
            name, part = _transformers_name(stored_name)
            if name in tensors:
                raise InputError(f"{file.path} has tensor {name} twice, once as {stored_name}.")
            if name == _ROPE_FREQUENCIES:
                continue  # in the configuration
            self._names[name] = stored_name
            tensors[name] = StoredTensor(file.path, tensor.shape, tensor.dtype)
            if architecture.permuted and part in heads:
                self._heads[name] = heads[part]
        self.tensors: Mapping[str, StoredTensor] = tensors

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """A slice in `StoredTensor.dtype`; of permuted rows, whole heads are read."""
        if name not in self._heads:
            return self._file.read(self._names[name], slices)
        rows, *others = slices
        head_dim = self.tensors[name].shape[0] // self._heads[name]
        first, last = rows.start // head_dim, -(-rows.stop // head_dim)
        pairs = self._file.read(self._names[name], (slice(first * head_dim, last * head_dim), *others))
        halves = pairs.reshape(last - first, head_dim // 2, 2, *pairs.shape[1:]).swapaxes(1, 2).reshape(pairs.shape)
        return halves[rows.start - first * head_dim : rows.stop - first * head_dim]


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of the model in a GGUF file.

    Raises:
        InputError: An architecture that is not read, a key that is missing or not understood, or a value that this
            architecture does not have in `transformers`; the sentence names it.
    """
    architecture, path = _architecture(file), file.path
    model_type = file.fields["general.architecture"]
    _check_keys(file, model_type)
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture.name], "hidden_act": "silu"}
    config |= {theirs: _field(file, key) for key, theirs in _SIZES.items()}
    config["num_key_value_heads"] = _kv_heads(file)
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = file.fields.get(f"{model_type}.vocab_size", embedding.shape[0] if embedding else None)
    if vocab_size is None:
        raise InputError(f"Tensor token_embd.weight is missing from {path}.")
    config["vocab_size"] = vocab_size
    config["head_dim"] = _head_dim(file)
    config["rope_parameters"] = _rope(file, config)
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config |= {key: tensor in file.tensors for key, tensor in architecture.biases.items()}
    for key, theirs in _TOKENS.items():
        config[theirs] = file.fields.get(f"tokenizer.ggml.{key}")
    config["dtype"] = "float32"
    return config


def _architecture(file: GgufFile) -> _Architecture:
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"{file.path} has general.architecture {shown(name)}, which is not read from GGUF; "
            f"{', '.join(ARCHITECTURES)} are."
        )
    parts = file.fields.get("split.count", 1)
    if parts not in (0, 1):
        raise InputError(
            f"{file.path} is one of {shown(parts)} parts of a model; join them: llama-gguf-split --merge, of llama.cpp."
        )
    return ARCHITECTURES[name]


def _check_keys(file: GgufFile, model_type: str) -> None:
    """Raises InputError for a key about the architecture that would be left unread."""
    known = {*_SIZES, *_OTHERS}
    for key, value in file.fields.items():
        prefix, _, name = key.partition(".")
        if prefix != model_type or name in known or _NOTHING.get(name) == value:
            continue
        raise InputError(f"{file.path} has {key} {shown(value)}, which is not understood for {model_type}.")


def _field(file: GgufFile, name: str) -> Any:
    key = f"{file.fields['general.architecture']}.{name}"
    if key not in file.fields:
        raise InputError(f"{file.path} has no {key}.")
    value = file.fields[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InputError(f"{file.path} has {key} {shown(value)}; it must be a positive number.")
    return value


def _optional(file: GgufFile, name: str, default: Any) -> Any:
    return _field(file, name) if f"{file.fields['general.architecture']}.{name}" in file.fields else default


def _kv_heads(file: GgufFile) -> int:
    return _optional(file, "attention.head_count_kv", _field(file, "attention.head_count"))


def _head_dim(file: GgufFile) -> int:
    """Values of a head, all of which are rotated in these architectures."""
    rotated = _optional(file, "rope.dimension_count", None)
    head_dim = _optional(file, "attention.key_length", rotated)
    if head_dim is None:
        head_dim = _field(file, "embedding_length") // _field(file, "attention.head_count")
    for name in ("attention.value_length", "rope.dimension_count"):
        value = _optional(file, name, head_dim)
        if value != head_dim:
            raise InputError(f"{file.path} has {name} {value}; only {head_dim}, as keys have, is supported.")
    return head_dim


def _rope(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    theta = _optional(file, "rope.freq_base", 10_000.0)
    scaling = file.fields.get(f"{config['model_type']}.rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theta)}
    if scaling not in ("none", "linear", "yarn"):
        raise InputError(f"{file.path} has rope.scaling.type {shown(scaling)}; none, linear and yarn are supported.")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": _field(file, "rope.scaling.factor")}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = _field(file, "rope.scaling.original_context_length")
    if _ROPE_FREQUENCIES in file.tensors:
        rope |= _llama3(file, float(theta), config["head_dim"])
        if scaling != "none":
            raise InputError(f"{file.path} has both {_ROPE_FREQUENCIES} and rope.scaling.type; one is supported.")
    return rope


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """RoPE scaling of Llama 3.1, if the factors by which the file divides the frequencies are those that it gives."""
    pairs = file.tensors[_ROPE_FREQUENCIES].shape[0]
    if file.tensors[_ROPE_FREQUENCIES].shape == (pairs,) and head_dim == 2 * pairs:
        factors = file.read(_ROPE_FREQUENCIES, (slice(0, pairs),)).astype(np.float64)
        factor = float(np.max(factors))
        low, high, length = _LLAMA3.values()
        turns = length * theta ** (-np.arange(pairs) / pairs) / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        # The file's are from float32 frequencies; near smooth = 0 an error in these counts `factor` times.
        if factor >= 1 and np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise InputError(
        f"Tensor {_ROPE_FREQUENCIES} in {file.path} divides the rotary frequencies by other factors than those of "
        "Llama 3.1, which are supported."
    )


def _transformers_name(name: str) -> tuple[str, str]:
    """The name in `transformers`, and what the tensor is to llama.cpp; an unknown one keeps its own."""
    match = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name, ""
    layer, part, kind = match.groups()
    return f"{f'model.layers.{int(layer)}.' if layer else ''}{_NAMES[part]}.{kind}", part
