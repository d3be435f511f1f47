"""`load`: the model in a checkpoint, its weights read by slice into their places on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from convert.checkpoint import configuration, tensor_source
from convert.configs import DTYPES, decoder_config, family_of
from convert.families import Family
from convert.hub import hub_config, local_directory
from convert.mapping import Row, axis_sizes, checked_rows
from convert.orbax_checkpoint import is_orbax, parameter_shardings, restore, saved_config
from convert.source import TensorSource
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, LanguageModel, Params, abstract_params

BLOCK_BYTES = 2**26
"""Weights of several layers are read together up to this size; a larger tensor is read alone. 64 MiB."""

_EXPONENT_BITS = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}


def load(
    path_or_hub_id: str | Path, mesh: Mesh | None = None, dtype: str | None = None, revision: str | None = None
) -> LanguageModel:
    """The model in a checkpoint, placed on `mesh`.

    Host memory beyond the arrays stays near the largest tensor of the files: every device's part of every layer is
    read by slice and moved to its place before the next is read. Of several processes each reads the parts of its own
    devices.

    Examples:
        >>> import convert
        >>> convert.load("scripts/tiny").param_dtype
        'float32'

    Args:
        path_or_hub_id: A Hugging Face directory, a GGUF file or a directory with a single one, a directory that
            `python -m convert` wrote, or a hub id. Weights in MXFP4, FP8 or GGUF's types are dequantized by slice.
        mesh: Where the weights shall live (`jaxhess.distributed.mesh.make_mesh`); None: on the first device.
        dtype: Weights and computation: float32, bfloat16, float16 or float64 (needs `jax_enable_x64`). None keeps what
            the files hold; where they hold several, what `config.json` says, or else the widest.
        revision: A branch, tag or commit of the hub id, such as Pythia's `step1000`; None: the newest.

    Raises:
        InputError: There is no such directory, hub id or revision; a file of the checkpoint is missing or damaged; an
            unsupported architecture or option; a tensor is missing, extra, duplicate or wrongly shaped; a weight is NaN
            or infinite; float64 without `jax_enable_x64`; `.bin` files without torch, or GGUF files without gguf;
            weights quantized in a way that is not read. Raised in every process, also where only one of them finds it.
    """
    check_dtype(dtype)
    directory = local_directory(path_or_hub_id, revision)
    if processes.agreed(is_orbax(directory)):
        check_dtype(processes.on_every(lambda: saved_config(directory, dtype)).dtype)
        return restore(directory, mesh, dtype)
    family, config, source, rows = processes.on_every(lambda: _open(directory, dtype))
    check_dtype(config.dtype)
    if config.tied_embeddings:
        processes.on_first(lambda: _check_tied(family, rows, source))
    return LanguageModel(config, processes.on_every(lambda: read_parameters(config, source, rows, mesh)), mesh)


def load_config(path_or_hub_id: str | Path, dtype: str | None = None, *, revision: str | None = None) -> DecoderConfig:
    """The configuration that `load` with the same arguments gives its model; no weight is read.

    Examples:
        >>> import convert
        >>> config = convert.load_config("scripts/tiny", dtype="bfloat16")
        >>> config.dtype, config.num_heads * config.head_dim == config.embed_dim
        ('bfloat16', True)

    Raises:
        InputError: As for `load`, as far as names, shapes and headers tell.
    """
    directory = local_directory(path_or_hub_id, revision)
    if processes.agreed(is_orbax(directory)):
        return processes.on_every(lambda: saved_config(directory, dtype))
    return processes.on_every(lambda: _open(directory, dtype))[1]


def read_config(path_or_hub_id: str | Path, dtype: str | None = None) -> DecoderConfig:
    """The configuration alone, of a checkpoint or of one that has no weights here: of a `config.json` by itself.

    Examples:
        >>> import convert
        >>> convert.read_config("scripts/tiny/config.json") == convert.load_config("scripts/tiny")
        True

    Args:
        path_or_hub_id: A `config.json` (under any name), a directory with one, a GGUF file or a directory with a
            single one, a directory that `python -m convert` wrote, or a hub id, of which nothing else is downloaded.
        dtype: None: the one that `config.json` names, or float32.

    Raises:
        InputError: There is no such file, directory or hub id; an unsupported architecture or option; an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
    path = Path(path_or_hub_id).expanduser()
    if is_orbax(path):
        return saved_config(path, dtype)
    hf_config, file = configuration(path if path.exists() else hub_config(str(path)))
    named = hf_config.get("dtype", hf_config.get("torch_dtype"))
    return decoder_config(hf_config, dtype or (named if named in DTYPES else "float32"), file)


def _open(directory: Path, dtype: str | None) -> tuple[Family, DecoderConfig, TensorSource, list[Row]]:
    """Everything about a Hugging Face checkpoint but its weights, checked against each other."""
    hf_config, file = configuration(directory)
    family = family_of(hf_config, file)
    config = decoder_config(hf_config, file=file)
    source = tensor_source(directory, hf_config)
    rows = checked_rows(family, config, source)
    return family, dataclasses.replace(config, dtype=dtype or stored_dtype(hf_config, rows, source)), source, rows


def check_dtype(dtype: str | None) -> None:
    """Raises InputError for a dtype that is unknown or that JAX would silently narrow."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}.")
    if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise InputError(
            "float64 needs JAX in 64-bit mode: set JAX_ENABLE_X64=1 before starting, or give a command --dtype float64."
        )


def stored_dtype(hf_config: dict[str, Any], rows: list[Row], source: TensorSource) -> str:
    """The dtype of the files' weights; where they differ, the one `config.json` names, or else the widest."""
    found = {source.tensors[name].dtype for row in rows for name in row.names}
    if len(found) == 1:
        return found.pop()
    named = hf_config.get("dtype", hf_config.get("torch_dtype"))
    if named in DTYPES:
        return str(named)
    return str(jnp.result_type(*found))


def read_parameters(config: DecoderConfig, source: TensorSource, rows: list[Row], mesh: Mesh | None) -> Params:
    """The parameters in these tensors, in the configuration's dtype, each in its place on the mesh.

    Raises:
        InputError: A value is NaN or infinite; the message names its tensor.
    """
    shardings = parameter_shardings(config, mesh)
    abstract = abstract_params(config)
    params: Params = {}
    for row in rows:
        place = params
        for key in row.path[:-1]:
            place = place.setdefault(key, {})
        place[row.path[-1]] = _place(row, config, source, _leaf(abstract, row.path), _leaf(shardings, row.path))
    return params


def _place(
    row: Row, config: DecoderConfig, source: TensorSource, leaf: jax.ShapeDtypeStruct, sharding: Sharding
) -> jax.Array:
    """One parameter, read layer by layer into an array that is already in its place."""
    sizes = axis_sizes(config)

    def tensor_slice(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = row.layout.read(lambda slices: source.read(name, slices), row.tensor_axes, index, sizes)
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused by name below
            values = values.astype(leaf.dtype)
        _check_finite(values, name, source, leaf.dtype.name)
        return values

    def block(first: int, count: int) -> jax.Array:
        """Layers [first, first + count) of a stacked parameter, or the whole of another."""
        shape = (count, *leaf.shape[1:]) if row.stacked else leaf.shape

        def device_slice(index: Any) -> np.ndarray:
            bounds = [slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]
            if not row.stacked:
                return np.ascontiguousarray(tensor_slice(row.names[0], tuple(bounds)))
            part = np.empty([b.stop - b.start for b in bounds], leaf.dtype)
            axes = len(row.leading)
            for place in np.ndindex(*part.shape[:axes]):
                layer, *others = (b.start + i for b, i in zip(bounds, place, strict=False))
                tensor = np.ravel_multi_index((first + layer, *others), row.leading)
                part[place] = tensor_slice(row.names[tensor], tuple(bounds[axes:]))
            return part

        return jax.make_array_from_callback(shape, _block_sharding(sharding, leaf.shape, shape), device_slice)

    if not row.stacked:
        return block(0, 1)
    layers = leaf.shape[0]
    per_layer = leaf.size * leaf.dtype.itemsize // layers
    count = _block_length(layers, BLOCK_BYTES // max(per_layer, 1))
    if count == layers:
        return block(0, count)
    whole = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for first in range(0, layers, count):
        whole = _insert(whole, block(first, count), first)
        jax.block_until_ready(whole)  # or the blocks queue up in host memory
    return whole


def _block_length(layers: int, fitting: int) -> int:
    """The largest divisor of `layers` that is at most `fitting` (at least 1): equal blocks share one compilation."""
    return max(n for n in range(1, layers + 1) if layers % n == 0 and n <= max(fitting, 1))


def _block_sharding(sharding: Sharding, whole: tuple[int, ...], block: tuple[int, ...]) -> Sharding:
    """`sharding` for a block of layers: cut like the whole along every axis but the layers themselves."""
    if whole == block or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))


def _insert(whole: jax.Array, block: jax.Array, first: int) -> jax.Array:
    return _inserter(whole.sharding)(whole, block, first)


@functools.cache
def _inserter(sharding: Sharding) -> Any:
    def insert(whole: jax.Array, block: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, block, first, axis=0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _check_finite(values: np.ndarray, name: str, source: TensorSource, dtype: str) -> None:
    mask = np.array(_EXPONENT_BITS[dtype], f"uint{8 * values.dtype.itemsize}")
    if ((values.view(mask.dtype) & mask) == mask).any():  # on bits: bfloat16's own isfinite is slow
        stored = source.tensors[name]
        narrowed = "" if stored.dtype == dtype else f" once it is {dtype}"
        raise InputError(f"Tensor {name} in {stored.file} holds NaN or infinite values{narrowed}.")


def _check_tied(family: Family, rows: list[Row], source: TensorSource) -> None:
    """The file's output matrix, if it has one although embeddings are tied, must be the embedding."""
    embedding = next(row.names[0] for row in rows if row.path == ("embed", "kernel"))
    head = next((name for name in (family.head, family.head_alias) if name in source.tensors), None)
    if head is None:
        return
    vocab, width = source.tensors[embedding].shape
    step = max(1, BLOCK_BYTES // (8 * width))
    for start in range(0, vocab, step):
        block = (slice(start, min(start + step, vocab)), slice(0, width))
        if not np.array_equal(source.read(embedding, block), source.read(head, block), equal_nan=False):
            raise InputError(
                f"config.json ties the output matrix to the embedding, but {head} differs from {embedding} "
                f"in {source.directory}: set tie_word_embeddings to false to keep both."
            )


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
