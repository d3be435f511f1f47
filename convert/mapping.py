"""Which checkpoint tensor holds which parameter: a family's table applied to one model, checked against its files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

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
        names: The tensors, in the order of the parameter's leading axes; the only one where it has none.
        path: Keys of the parameter in the nested dictionary.
        layout: Axes of a file tensor.
        axes: Logical axes of the parameter; `layers` comes first where it is stacked.
        leading: Sizes of the leading axes along which every entry has a tensor of its own: none, layers, or layers and
            experts.
        layers: Numbers of the layers that are stacked.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    layout: Layout
    axes: tuple[str, ...]
    leading: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        """The parameter has a leading axis of layers, each in a tensor, or several, of its own."""
        return bool(self.leading)

    @property
    def tensor_axes(self) -> tuple[str, ...]:
        """Logical axes of what one tensor holds."""
        return self.axes[len(self.leading) :]

    def place(self, tensor: int) -> tuple[int, ...]:
        """Where in the parameter the given one of `names` goes: indices along the leading axes."""
        return tuple(int(i) for i in np.unravel_index(tensor, self.leading)) if self.leading else ()


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Size of every logical axis that is no leading one."""
    sizes = {
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "embed": config.embed_dim,
        "mlp": config.mlp_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "one": 1,
    }
    if config.latent is not None:
        sizes |= {
            "query_rank": config.latent.query_rank or 0,
            "kv_rank": config.latent.kv_rank,
            "rotated_dim": config.rotary_dims,
            "still_dim": config.head_dim - config.rotary_dims,
            "value_dim": config.value_dim,
        }
    if config.experts is not None:
        sizes |= {
            "experts": config.experts.num_experts,
            "routes": config.experts.num_experts,
            "expert_mlp": config.experts.mlp_dim,
            "shared_mlp": config.experts.shared_dim,
        }
    return sizes


def mapping_rows(
    family: Family, config: DecoderConfig, *, prefix: str, head: str, in_memory: bool = False
) -> list[Row]:
    """The rows of `family` for the parameters that `config` has, every parameter exactly once.

    Args:
        family: The table.
        config: The model.
        prefix: Begins the name of every tensor but the head's.
        head: Name of the output matrix.
        in_memory: The names are those of `named_parameters()` in `transformers`, not of its files.
    """
    axes = logical_axes(config)
    tensors = family.tensors
    if in_memory:
        replaced = {path for _, path, _ in family.memory}
        tensors = (*(row for row in tensors if row[1] not in replaced), *family.memory)
    rows = []
    for pattern, path_text, layout in tensors:
        full = head if pattern == family.head else prefix + pattern
        first, *rest = path_text.split("/")
        for stack, numbers in config.stacks.items() if first == "layers" else [(first, ())]:
            path = (stack, *rest)
            names_axes = _at(axes, path)
            if names_axes is not None:
                row = _row(full, path, layout, names_axes, numbers, config)
                if sorted(row.layout.named) == sorted(row.tensor_axes):
                    rows.append(row)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    missing = {tuple(key.key for key in path) for path, _ in leaves} - {row.path for row in rows}
    if missing or len(leaves) != len(rows):
        raise InputError(f"The table of {family.model_type} has no row for {sorted(missing)}.")
    return rows


def _row(
    pattern: str, path: tuple[str, ...], layout: str, axes: tuple[str, ...], layers: tuple[int, ...], config: Any
) -> Row:
    if not layers:
        return Row((pattern,), path, parse_layout(layout), axes)
    if "{expert}" not in pattern:
        names = tuple(pattern.format(layer=layer) for layer in layers)
        return Row(names, path, parse_layout(layout), axes, (len(layers),), layers)
    experts = config.experts.num_experts
    names = tuple(pattern.format(layer=layer, expert=expert) for layer in layers for expert in range(experts))
    return Row(names, path, parse_layout(layout), axes, (len(layers), experts), layers)


def checked_rows(family: Family, config: DecoderConfig, source: TensorSource) -> list[Row]:
    """The rows for the files at hand, after comparing every name and shape; no weight is read.

    Raises:
        InputError: A tensor is missing, has no place in the model, has the wrong shape or kind, or is there under two
            names. The sentence names the tensor.
    """
    names = set(source.tensors)
    # Before there is a row for each of a million layers, or experts of theirs.
    experts = (
        config.experts.num_experts if config.experts and any("{expert}" in row[0] for row in family.tensors) else 0
    )
    if max(config.num_layers, experts * sum(config.expert_layers)) > len(names):
        said = f"{config.num_layers} layers" + (f" and {experts} experts" if experts else "")
        raise InputError(f"{source.directory} has {len(names)} tensors in all; config.json says {said}.")
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
    _check_names(names, set(expected), family, config, prefix, source)
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


def _check_names(
    names: set[str], expected: set[str], family: Family, config: DecoderConfig, prefix: str, source: TensorSource
) -> None:
    def is_buffer(name: str) -> bool:
        if any(re.fullmatch(re.escape(prefix) + pattern, name) for pattern in family.buffers):
            return True
        layer = re.match(re.escape(prefix) + r"layers\.(\d+)\.", name) if family.later_layer else None
        return layer is not None and int(layer[1]) >= config.num_layers and layer[0] + str(family.later_layer) in names

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
