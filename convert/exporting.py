"""Hugging Face checkpoints from our models: safetensors files that `transformers` loads, bit for bit."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.configs import comparable, decoder_config, family_of, hugging_face_config
from convert.destination import appearing
from convert.mapping import Row, axis_sizes, mapping_rows
from convert.quantized import unquantized
from convert.tokenizer import add_tokenizer
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, LanguageModel

SHARD_BYTES = 5 * 10**9
"""Largest weight file, as `transformers` writes them by default."""

_SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def export(
    model: LanguageModel,
    directory: str | Path,
    *,
    hf_config: dict[str, Any] | None = None,
    tokenizer_source: Any = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model` as a Hugging Face checkpoint; the directory appears complete or not at all.

    Examples:
        >>> import convert, tempfile
        >>> model = convert.load("scripts/tiny")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert.export(model, folder, tokenizer_source="scripts/tiny")
        ...     convert.load(folder).num_params == model.num_params
        True

    Args:
        model: All its arrays must be addressable from this process.
        directory: New, empty, or a checkpoint to replace with `overwrite`.
        hf_config: The `config.json` the model came from (what it says of quantization is left out); None: one is made
            from its `DecoderConfig`.
        tokenizer_source: A directory whose tokenizer files are copied, or a tokenizer with `save_pretrained`.
        overwrite: Replace a checkpoint that is already there.
        shard_bytes: Weights beyond this go to several files with an index.

    Raises:
        InputError: The directory is not empty, or no checkpoint that could be replaced; `hf_config` describes another
            model, or no supported family describes this one.
    """
    with appearing(Path(directory), overwrite) as partial:
        write_hugging_face(model, partial, hf_config, shard_bytes)
        add_tokenizer(tokenizer_source, partial)


def write_hugging_face(
    model: LanguageModel, directory: Path, hf_config: dict[str, Any] | None, shard_bytes: int = SHARD_BYTES
) -> None:
    """`config.json` and weight files in an existing directory; arguments as for `export`."""
    config = model.config
    if hf_config is None:
        hf_config = hugging_face_config(config)
    elif comparable(decoder_config(hf_config, config.dtype)) != comparable(config):
        raise InputError("hf_config does not describe this model: read back, it gives another DecoderConfig.")
    if not all(array.is_fully_addressable for array in jax.tree.leaves(model.params)):
        raise InputError("Parts of the model are on other processes; export it from a single process.")
    key = "torch_dtype" if "torch_dtype" in hf_config and "dtype" not in hf_config else "dtype"
    hf_config = {**unquantized(hf_config), key: model.param_dtype}
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")

    family = family_of(hf_config)
    sizes = axis_sizes(config)
    tensors = parts_of_tensors(mapping_rows(family, config, prefix=family.prefix, head=family.head))
    shapes = {
        name: jax.ShapeDtypeStruct(held[0][0].layout.shape(sizes), dtype_of(held, model.params))
        for name, held in tensors.items()
    }
    # In the order in which `safetensors` itself writes, so that one file comes back byte for byte.
    in_order = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))
    files = _cut_into_files({name: _bytes(shapes[name]) for name in in_order}, shard_bytes)
    for file, names in files.items():
        with (directory / file).open("wb") as stream:
            stream.write(_header({name: shapes[name] for name in names}))
            for name in names:
                tensor = file_tensor(model.params, config, tensors[name], shapes[name].shape)
                # bfloat16 has no buffer protocol
                stream.write(tensor.view(f"uint{8 * tensor.dtype.itemsize}").data.cast("B"))
    if len(files) > 1:
        total = sum(_bytes(s) for s in shapes.values())
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parts_of_tensors(rows: list[Row]) -> dict[str, list[tuple[Row, int]]]:
    """For each file tensor the parameters that it holds parts of, and which of the row's tensors it is."""
    tensors: dict[str, list[tuple[Row, int]]] = {}
    for row in rows:
        for number, name in enumerate(row.names):
            tensors.setdefault(name, []).append((row, number))
    return tensors


def _cut_into_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> its tensors, each file filled up to `limit` bytes (a larger tensor has one of its own)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _bytes(s: jax.ShapeDtypeStruct) -> int:
    return s.size * s.dtype.itemsize


def _header(shapes: dict[str, jax.ShapeDtypeStruct]) -> bytes:
    """The start of a safetensors file: length of the header, and a JSON object padded to 8 bytes.

    Written here because the library's writer wants all tensors of a file in memory at once.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, s in shapes.items():
        end = offset + _bytes(s)
        dtype = _SAFETENSORS_NAMES[s.dtype.name]
        entries[name] = {"dtype": dtype, "shape": list(s.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_tensor(params: Any, config: DecoderConfig, parts: list[tuple[Row, int]], shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as the file has it, put together from the parameters (or what is like them) that it holds."""
    tensor = np.empty(shape, dtype_of(parts, params))
    for row, number in parts:
        values = np.asarray(_entry(_leaf(params, row), row.place(number)))
        row.layout.write(tensor, values, row.tensor_axes, axis_sizes(config))
    return tensor


def dtype_of(parts: list[tuple[Row, int]], params: Any) -> np.dtype:
    """That of the parameters which a tensor holds."""
    return np.dtype(_leaf(params, parts[0][0]).dtype)


def _leaf(params: Any, row: Row) -> Any:
    return functools.reduce(lambda tree, key: tree[key], row.path, params)


@jax.jit
def _entry(array: jax.Array, place: tuple[int, ...]) -> jax.Array:
    for i in place:
        array = jax.lax.dynamic_index_in_dim(array, jnp.asarray(i, jnp.int32), keepdims=False)
    return array
