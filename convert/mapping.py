"""Which checkpoint tensor holds which parameter: a family's table applied to one model, checked against its files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from convert.families import Family
from convert.layout import Layout, parse_layout
from convert.source import TensorSource
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, abstract_params, logical_axes

FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter and the tensors that hold it.

    Attributes:
        names: Tensor of each layer, or the only one for a parameter that is not stacked.
        path: Keys of the parameter in the nested dictionary.
        layout: Axes of the file tensor.
        axes: Logical axes of the parameter; `layers` comes first where it is stacked.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    layout: Layout
    axes: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        """The parameter has a leading axis of layers, each in a tensor of its own."""
        return self.axes[:1] == ("layers",)

    @property
    def layer_axes(self) -> tuple[str, ...]:
        """Logical axes of what one tensor holds."""
        return self.axes[1:] if self.stacked else self.axes


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Size of every logical axis."""
    return {
        "layers": config.num_layers,
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def mapping_rows(family: Family, config: DecoderConfig, *, prefix: str, head: str) -> list[Row]:
    """The rows of `family` for the parameters that `config` has, every parameter exactly once.

    Args:
        family: The table.
        config: The model.
        prefix: Begins the name of every tensor but the head's.
        head: Name of the output matrix.
    """
    axes = logical_axes(config)
    rows = []
    for pattern, path_text, layout in family.tensors:
        path = tuple(path_text.split("/"))
        names_axes = _at(axes, path)
        if names_axes is None:
            continue
        full = head if pattern == family.head else prefix + pattern
        layers = config.num_layers if names_axes[:1] == ("layers",) else 1
        names = tuple(full.format(layer=layer) for layer in range(layers))
        rows.append(Row(names, path, parse_layout(layout), names_axes))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    missing = {tuple(key.key for key in path) for path, _ in leaves} - {row.path for row in rows}
    if missing or len(leaves) != len(rows):
        raise InputError(f"The table of {family.model_type} has no row for {sorted(missing)}.")
    return rows


def checked_rows(family: Family, config: DecoderConfig, source: TensorSource) -> list[Row]:
    """The rows for the files at hand, after comparing every name and shape; no weight is read.

    Raises:
        InputError: A tensor is missing, has no place in the model, has the wrong shape or kind, or is there under two
            names. The sentence names the tensor.
    """
    names = set(source.tensors)
    if config.num_layers > len(names):  # before there is a row for each of a million layers
        raise InputError(
            f"{source.directory} has {len(names)} tensors in all; config.json says {config.num_layers} layers."
        )
    prefix = family.prefix if any(name.startswith(family.prefix) for name in names) else ""
    head = family.head
    if family.head_alias in names:
        if family.head in names:
            raise InputError(f"{source.directory} has the output matrix twice: {family.head} and {family.head_alias}.")
        head = family.head_alias
    rows = mapping_rows(family, config, prefix=prefix, head=head)
    sizes = axis_sizes(config)
    expected = {name: row.layout.shape(sizes) for row in rows for name in row.names}
    if config.tied_embeddings and head in names:  # a copy of the embedding, compared when it is read
        expected[head] = (config.vocab_size, config.embed_dim)
    _check_names(names, set(expected), family, prefix, source)
    for name, shape in expected.items():
        stored = source.tensors[name]
        if stored.shape != shape:
            raise InputError(
                f"Tensor {name} in {stored.file.name} has shape {list(stored.shape)}; expected {list(shape)}."
            )
        if stored.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"Tensor {name} in {stored.file.name} is {stored.dtype}; weights must be {', '.join(FLOAT_DTYPES)}."
            )
    return rows


def _check_names(names: set[str], expected: set[str], family: Family, prefix: str, source: TensorSource) -> None:
    def is_buffer(name: str) -> bool:
        return any(re.fullmatch(re.escape(prefix) + pattern, name) for pattern in family.buffers)

    missing = sorted(expected - names)
    extra = sorted(name for name in names - expected if not is_buffer(name))
    if missing:
        raise InputError(
            f"Tensor {missing[0]} is missing from {source.directory}{_and_more(missing, 'missing')}"
            + (f" It has {extra[0]}, which {family.model_type} has no place for." if extra else "")
        )
    if extra:
        raise InputError(
            f"Tensor {extra[0]} in {source.tensors[extra[0]].file.name} has no place in this {family.model_type} model"
            + _and_more(extra, "without a place")
        )


def _and_more(names: Iterable[str], what: str) -> str:
    count = len(list(names)) - 1
    return f" ({count} more {what})." if count else "."


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree
