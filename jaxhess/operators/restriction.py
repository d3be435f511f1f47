"""A choice of parameters: curvature on a block of them, the rest held fixed."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.vectors import named_sharding

STACKED = "layers"
"""Leaves with this name in their path are a layer's: `layers/3/...` of that one, others of all, stacked along their
leading axis."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """The patterns and layers that were asked for: see `restriction`.

    Examples:
        >>> from jaxhess.operators.restriction import Selection
        >>> print(Selection(("mlp", "norm"), (0, 3)))
        mlp norm in layers 0,3
    """

    patterns: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = " ".join(self.patterns) or "*"
        return text if self.layers is None else f"{text} in layers {','.join(map(str, self.layers))}"


@dataclasses.dataclass(frozen=True)
class Restriction:
    """Which parameters are free: for every leaf True, False, or the chosen layers of a stacked leaf.

    A vector of the restricted space is a tree like the parameters with None in place of every leaf held fixed, and with
    the chosen layers only, in their order, in stacked leaves.
    """

    selection: tuple[bool | tuple[int, ...], ...]
    block: Selection

    def __str__(self) -> str:
        return str(self.block)

    def take(self, params: Any) -> Any:
        """The free parameters (or a vector's entries on them), out of a whole tree."""
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, [_taken(x, s) for x, s in zip(leaves, self.selection, strict=True)])

    def insert(self, free: Any, params: Any) -> Any:
        """`params` with the free ones replaced."""
        leaves, treedef = jax.tree.flatten(params)
        replacements = iter(jax.tree.leaves(free))
        return jax.tree.unflatten(
            treedef, [_inserted(x, s, replacements) for x, s in zip(leaves, self.selection, strict=True)]
        )

    def shardings(self, params: Any) -> list[NamedSharding | None]:
        """For every free leaf the sharding of the parameter it is cut from."""
        chosen = zip(jax.tree.leaves(params), self.selection, strict=True)
        return [_cut_sharding(named_sharding(x), s) for x, s in chosen if s is not False]


def restriction(
    params: Any,
    patterns: Iterable[str],
    layers: Iterable[int] | None = None,
    stacks: Mapping[str, Sequence[int]] | None = None,
) -> Restriction:
    """The restriction of `params` to the leaves that match any of `patterns`, in the given layers.

    Args:
        params: Any pytree; a leaf's name is its path, `layers/attention/query/kernel`.
        patterns: With `*`, `?` or `/`: a shell pattern for the whole name, `layers/mlp/*`. A bare word matches a
            component of the name, or the end of one after an underscore: `attention`, `mlp`, `embed`, `head`, and
            `norm` for all of `attention_norm`, `mlp_norm`, `final_norm`. No pattern: every leaf.
        layers: Indices of layers, negative from the end; leaves outside `layers` are then held fixed.
        stacks: Where layers are stacked under several names, the numbers of those under each:
            `{"dense_layers": (0,), "layers": (1, 2)}`. None: all are under `layers`.

    Raises:
        InputError: A pattern matches nothing (the message lists the names), or nothing in a layer; no such layer.
    """
    patterns = tuple(patterns)
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree.flatten_with_path(params)[0]]
    for pattern in patterns:
        if not any(matches(name, pattern) for name, _ in named):
            names = ", ".join(name for name, _ in named)
            raise InputError(
                f"No parameter matches {pattern!r}. Use attention, mlp, norm, embed or head where the names have these "
                f"words, or a pattern over these names: {names}."
            )
    wanted = [not patterns or any(matches(name, pattern) for pattern in patterns) for name, _ in named]
    if layers is None:
        return Restriction(tuple(wanted), Selection(patterns))
    stack_names = tuple(stacks or (STACKED,))
    listed = {name: number for name, _ in named if (number := layer_number(name)) is not None}
    stacked = {name: leaf.shape[0] for name, leaf in named if name not in listed and stack_of(name, stack_names)}
    for pattern in patterns or ("*",):
        if not any(matches(name, pattern) for name in (*listed, *stacked)):
            raise InputError(f"{pattern!r} matches no parameter inside a layer, so layers cannot be chosen with it.")
    if stacks is None:
        count = max([number + 1 for number in listed.values()] + list(stacked.values()))
        stacks = {STACKED: range(count)}
    count = sum(map(len, stacks.values()))
    places = {name: stacks[stack_of(name, stack_names) or STACKED] for name in stacked}
    odd = next((name for name in stacked if stacked[name] != len(places[name])), None)
    if odd is not None:
        raise InputError(
            f"{odd} has {stacked[odd]} rows and the model {len(places[odd])} layers: it is not a stack of them."
        )
    indices = _normalised(layers, count)
    rows = {name: tuple(i for i, number in enumerate(of) if number in indices) or False for name, of in places.items()}
    selection = [
        keep and (rows[name] if name in stacked else name in listed and listed[name] in indices)
        for (name, _), keep in zip(named, wanted, strict=True)
    ]
    for pattern in patterns or ("*",):
        if not any(kept and matches(name, pattern) for (name, _), kept in zip(named, selection, strict=True)):
            raise InputError(f"{pattern!r} matches no parameter in layers {list(indices)}.")
    return Restriction(tuple(selection), Selection(patterns, indices))


def leaf_name(path: tuple) -> str:
    """A leaf's path as a name: `layers/attention/query/kernel`."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # of an `nnx.Variable`
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def layer_number(name: str) -> int | None:
    """Which layer of a list a leaf belongs to, `layers/3/mlp/kernel`; None for a stacked leaf, and outside layers."""
    parts = name.split("/")
    following = parts[parts.index(STACKED) + 1 :] if STACKED in parts else []
    return int(following[0]) if following and following[0].isdigit() else None


def stack_of(name: str, stacks: Sequence[str]) -> str | None:
    """The stack that a leaf is in."""
    return next((part for part in name.split("/") if part in stacks), None)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name matches a pattern as `restriction` has them."""
    if any(character in pattern for character in "*?[/"):
        return fnmatch.fnmatchcase(name, pattern)
    return any(part == pattern or part.endswith(f"_{pattern}") for part in name.split("/"))


def _normalised(layers: Iterable[int], count: int) -> tuple[int, ...]:
    given = list(layers)
    bad = [k for k in given if not isinstance(k, int | np.integer) or not -count <= k < count]
    if bad or not given:
        raise InputError(f"Layers {given}: the model has layers 0 to {count - 1}; name at least one of them.")
    return tuple(sorted({int(k) % count for k in given}))


def _range(indices: tuple[int, ...]) -> Any:
    """The indices as a slice where they are consecutive, which needs no gather."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else np.asarray(indices)


def _taken(leaf: Any, selected: bool | tuple[int, ...]) -> Any:
    if selected is False:
        return None
    if selected is True:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(selected), *leaf.shape[1:]), leaf.dtype)
    return leaf[_range(selected)]


def _inserted(leaf: Any, selected: bool | tuple[int, ...], replacements: Any) -> Any:
    if selected is False:
        return leaf
    replacement = next(replacements)
    return replacement if selected is True else leaf.at[_range(selected)].set(replacement)


def _cut_sharding(sharding: NamedSharding | None, selected: bool | tuple[int, ...]) -> NamedSharding | None:
    if sharding is None or selected is True or not sharding.spec:
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
