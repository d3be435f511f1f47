"""A partition of the parameters into named blocks: by layer, kind, matrix, attention head, row, or pattern."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.operators.restriction import STACKED, layer_number, leaf_name, matches, stack_of
from jaxhess.vectors import Vector, widen

Labels = npt.NDArray[np.int32]

KINDS = {
    "embedding": ("embed", "positions"),
    "head": ("head",),
    "query": ("query", "query_down"),
    "key": ("key", "rotated_key"),
    "value": ("value",),
    "key and value": ("kv_down",),
    "attention out": ("out",),
    "attention sinks": ("sinks",),
    "router": ("router", "selection_bias", "shared_gate"),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
}
"""Of every kind of parameters the components of their names."""

ORDER = ("embed", "positions", *list(KINDS)[:1], *list(KINDS)[2:], "experts", STACKED, "norms", "final_norm", "head")
"""In which blocks are listed, by the first component of their names; others come where the layers do."""

HEAD_AXES = {
    "attention/query/kernel": -2,
    "attention/key/kernel": -2,
    "attention/value/kernel": -2,
    "attention/query/bias": -2,
    "attention/key/bias": -2,
    "attention/value/bias": -2,
    "attention/out/kernel": -3,
    "attention/sinks": -1,
}
"""The axis over attention heads of the decoder's parameters."""


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A partition of the entries of vectors that are pytrees: every entry is in one block.

    Nothing is cut or moved: a block is a number on entries, so that layers stay stacked and vectors stay sharded. It is
    hashable by its content, and so may be a static argument of a jitted function.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> params = {"embed": jnp.zeros((9, 4)), "layers": {"mlp": jnp.zeros((2, 4, 4))}, "head": jnp.zeros((9, 4))}
        >>> blocks = jaxhess.Blocks.by(params, "layers")
        >>> dict(zip(blocks.names, blocks.sizes.tolist()))
        {'embed': 36, 'layers/0': 16, 'layers/1': 16, 'head': 36}
        >>> len(jaxhess.Blocks.by(params, "matrices").split("head", axis=0))  # with every row of the head
        12

    Attributes:
        names: Of the blocks.
        labels: For every leaf, in the order of `jax.tree.leaves`, the number of each entry's block, int32; as many
            axes as the leaf, of length 1 where the number does not depend on them.
        leaf_names: Of the leaves.
        shapes: Of the leaves.

    Raises:
        InputError: A label is not that of a block, or a block has no entry.
    """

    names: tuple[str, ...]
    labels: tuple[Labels, ...]
    leaf_names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        sizes = self.sizes
        if (sizes == 0).any():
            raise InputError(f"Block {self.names[int(np.argmin(sizes))]!r} has no parameters.")

    @classmethod
    def by(cls, like: Vector, *by: str, stacks: Mapping[str, Sequence[int]] | None = None) -> Blocks:
        """The partition of vectors like these.

        Args:
            like: Parameters, or an operator's `shape_dtype`.
            by: One of these words, or patterns.

                - `layers`: `embed` (with learned positions), `layers/0` and so on, `final_norm`, `head`. Of a model
                  without `layers` in its names, the first component of the names.
                - `kinds`: embedding, query, key, value, attention out, gate, up, down, experts, router, norms, head,
                  over all layers.
                - `matrices`: every array; of layers that are stacked, that of each layer.
                - `heads`: as `matrices`, with a block for every attention head (of queries, keys, values and output).
                - patterns, as in `LossOperator.restrict`: a block for each. They are compared with names as `matrices`
                  has them, `layers/3/mlp/up/kernel`, and with those of all layers, `layers/mlp/up/kernel`.
            stacks: Where layers are stacked under several names, the numbers of those under each, as
                `DecoderConfig.stacks`. None: all are under `layers`.

        Raises:
            InputError: Nothing was asked for; a pattern matches nothing, or patterns overlap or leave parameters out
                (the message names the first).
        """
        matrices = _matrices(like, stacks)
        if by == ("matrices",):
            return matrices
        if by == ("layers",):
            return matrices.merged(layer_of)
        if by == ("kinds",):
            return matrices.merged(kind_of)
        if by == ("heads",):
            for name in matrices.leaf_names:
                axis = next((axis for part, axis in HEAD_AXES.items() if f"/{name}".endswith(f"/{part}")), None)
                matrices = matrices if axis is None else matrices.split(name, axis)
            return matrices
        if not by:
            raise InputError("Blocks are made by layers, kinds, matrices, heads, or patterns of names.")
        return matrices.merged(_by_patterns(matrices, by))

    def merged(self, group: Callable[[str], str]) -> Blocks:
        """A coarser partition: blocks that `group` gives one name become one.

        Examples:
            >>> import jax.numpy as jnp, jaxhess
            >>> blocks = jaxhess.Blocks.by({"a": {"u": jnp.zeros(2), "v": jnp.zeros(3)}, "b": jnp.zeros(4)}, "matrices")
            >>> blocks.merged(lambda name: name.split("/")[0]).sizes
            array([5, 4])
        """
        groups = [group(name) for name in self.names]
        names = sorted(dict.fromkeys(groups), key=_place)
        places = {name: k for k, name in enumerate(names)}
        numbers = np.array([places[name] for name in groups], np.int32)
        return dataclasses.replace(self, names=tuple(names), labels=tuple(_shortened(numbers[x]) for x in self.labels))

    def split(self, pattern: str, axis: int) -> Blocks:
        """A finer partition: a block for every index along an axis of the leaves that match: rows, neurons, classes.

        Args:
            pattern: As in `LossOperator.restrict`, for the leaves' names.
            axis: Of the leaf, negative from its end.

        Raises:
            InputError: No leaf matches, or one has no such axis.
        """
        if not any(matches(name, pattern) for name in self.leaf_names):
            raise InputError(f"No parameter matches {pattern!r}; there are {', '.join(self.leaf_names)}.")
        names: dict[str, int] = {}
        labels: list[Labels] = []
        for name, shape, own in zip(self.leaf_names, self.shapes, self.labels, strict=True):
            if not matches(name, pattern):
                texts, places = [self.names[k] for k in own.ravel()], own.shape
            else:
                if not -len(shape) <= axis < len(shape):
                    raise InputError(f"{name} has {len(shape)} axes, and none with number {axis}.")
                places = tuple(n if k == axis % len(shape) else 1 for k, n in enumerate(shape))
                index = np.broadcast_to(np.arange(shape[axis]).reshape(places), np.broadcast_shapes(own.shape, places))
                both = zip(np.broadcast_to(own, index.shape).ravel(), index.ravel(), strict=True)
                texts, places = [f"{self.names[k]}[{i}]" for k, i in both], index.shape
            numbers = [names.setdefault(text, len(names)) for text in texts]
            labels.append(np.array(numbers, np.int32).reshape(places))
        return dataclasses.replace(self, names=tuple(names), labels=tuple(labels)).merged(lambda name: name)

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[B] entries of each block."""
        sizes = np.zeros(len(self.names), np.int64)
        for labels, shape in zip(self.labels, self.shapes, strict=True):
            if labels.size and not 0 <= labels.min() <= labels.max() < len(sizes):
                raise InputError(f"A label is {labels.min()} to {labels.max()}; there are {len(sizes)} blocks.")
            np.add.at(sizes, labels.ravel(), int(np.prod(shape)) // labels.size)
        return sizes

    def check(self, like: Vector) -> None:
        """Raises InputError where vectors like these are not those of the partition."""
        found = [(leaf_name(path), x.shape) for path, x in jax.tree.flatten_with_path(like)[0]]
        for name, shape in zip(self.leaf_names, self.shapes, strict=True):
            if (name, shape) not in found:
                raise InputError(f"The blocks are of other vectors: these have no {name} of shape {shape}.")
        if len(found) != len(self.shapes):
            raise InputError(f"The blocks are of {len(self.shapes)} arrays, and the vectors of {len(found)}.")

    def part(self, v: Vector, block: int | jax.Array) -> Vector:
        """v with zeros outside of one block, whose number may be traced; of no block, for the number B."""
        leaves, treedef = jax.tree.flatten(v)
        parts = [jnp.where(labels == block, x, 0) for labels, x in zip(self.labels, leaves, strict=True)]
        return jax.tree.unflatten(treedef, parts)

    def dot(self, x: Vector, y: Vector, dtype: Any = "float32") -> jax.Array:
        """[B] inner products, one per block, accumulated in at least `dtype`."""
        pairs = zip(jax.tree.leaves(widen(x)), jax.tree.leaves(widen(y)), strict=True)
        products = [(a.astype(jnp.promote_types(a.dtype, dtype)) * b) for a, b in pairs]
        total = jnp.zeros(len(self), jnp.result_type(dtype, *products))
        for labels, product in zip(self.labels, products, strict=True):
            axes = tuple(k for k, n in enumerate(labels.shape) if n == 1)
            total = total.at[labels.ravel()].add(jnp.sum(product, axis=axes, keepdims=True).ravel())
        return total

    def largest(self, x: Vector) -> jax.Array:
        """[B] largest magnitudes of entries, one per block."""
        leaves = jax.tree.leaves(widen(x))
        total = jnp.zeros(len(self), jnp.result_type(*leaves))
        for labels, leaf in zip(self.labels, leaves, strict=True):
            axes = tuple(k for k, n in enumerate(labels.shape) if n == 1)
            total = total.at[labels.ravel()].max(jnp.max(jnp.abs(leaf), axis=axes, keepdims=True).ravel())
        return total

    def norm(self, x: Vector, dtype: Any = "float32") -> jax.Array:
        """[B] Euclidean norms, one per block, right wherever the entries themselves are representable."""
        largest = self.largest(x)
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        scaled = jax.tree.map(lambda e, u: e / u, widen(x), self.spread(unit, x))
        return unit * jnp.sqrt(self.dot(scaled, scaled, dtype))

    def spread(self, values: jax.Array, like: Vector) -> Vector:
        """A tree of arrays that broadcast to the leaves of `like`, with the value [B] of each entry's block."""
        values = jnp.broadcast_to(values, len(self))
        found = [values.at[labels].get(mode="promise_in_bounds") for labels in self.labels]
        return jax.tree.unflatten(jax.tree.structure(like), found)

    @functools.cached_property
    def _key(self) -> tuple:
        return self.names, self.leaf_names, self.shapes, tuple((x.shape, x.tobytes()) for x in self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _shortened(labels: Labels) -> Labels:
    """Without the axes that the labels do not depend on: of length 1."""
    for axis in range(labels.ndim):
        first = labels.take([0], axis)
        if (labels == first).all():
            labels = first
    return labels


def _matrices(like: Vector, stacks: Mapping[str, Sequence[int]] | None) -> Blocks:
    """A block for every leaf, and for every layer of one that is stacked."""
    names: list[str] = []
    labels, leaf_names, shapes = [], [], []
    for path, leaf in jax.tree.flatten_with_path(like)[0]:
        name = leaf_name(path)
        stack = stack_of(name, tuple(stacks or (STACKED,)))
        if stack is None or not leaf.shape or layer_number(name) is not None:
            found = [name]
        else:
            numbers = range(leaf.shape[0]) if stacks is None else stacks[stack]
            if len(numbers) != leaf.shape[0]:
                raise InputError(f"{name} has {leaf.shape[0]} rows and {stack} {len(numbers)} layers.")
            found = [re.sub(rf"(^|/){stack}(/|$)", rf"\g<1>{STACKED}/{k}\g<2>", name, count=1) for k in numbers]
        start = len(names)
        names += found
        axes = (len(found), *[1] * len(leaf.shape))[: len(leaf.shape)]
        labels.append(np.arange(start, start + len(found), dtype=np.int32).reshape(axes))
        leaf_names.append(name)
        shapes.append(tuple(leaf.shape))
    blocks = Blocks(tuple(names), tuple(labels), tuple(leaf_names), tuple(shapes))
    return blocks.merged(lambda name: name)  # in the order of the layers


def _place(name: str) -> tuple[int, int]:
    """Where a block comes in the order of a model; otherwise blocks keep the order of the parameters."""
    first = re.split(r"[/\[]", name)[0]
    layer = re.match(rf"{STACKED}/(\d+)", name)
    return ORDER.index(first) if first in ORDER else ORDER.index(STACKED), int(layer[1]) if layer else 0


def layer_of(name: str) -> str:
    """The block by layers that a block by matrices is in: `layers/3`, or the first component of its name."""
    parts = name.split("/")
    if STACKED in parts:
        place = parts.index(STACKED)
        return "/".join(parts[: place + 2])
    return "embed" if parts[0] == "positions" else parts[0]


def kind_of(name: str) -> str:
    """The block by kinds that a block by matrices is in."""
    parts = [part for part in name.split("/") if not part.isdigit()]
    if any("norm" in part for part in parts):
        return "norms"
    kind = next((kind for kind, words in KINDS.items() if set(words) & set(parts)), None)
    if "experts" in parts and "shared" not in parts and kind != "router":
        return "experts"
    if kind is not None:
        return kind
    named = [part for part in parts if part not in ("kernel", "bias", "scale", STACKED)]
    return "/".join(named or parts)


def _by_patterns(matrices: Blocks, patterns: Sequence[str]) -> Callable[[str], str]:
    """The pattern that each matrix matches."""
    of_layers = {name: re.sub(rf"(^|/){STACKED}/\d+", rf"\g<1>{STACKED}", name) for name in matrices.names}
    found = {
        name: [p for p in dict.fromkeys(patterns) if matches(name, p) or matches(of_layers[name], p)]
        for name in matrices.names
    }
    idle = next((p for p in patterns if not any(p in ps for ps in found.values())), None)
    if idle is not None:
        raise InputError(f"No parameter matches {idle!r}; there are {', '.join(dict.fromkeys(of_layers.values()))}.")
    twice = next((name for name in found if len(found[name]) > 1), None)
    if twice is not None:
        raise InputError(
            f"{twice} is in two blocks, {found[twice][0]!r} and {found[twice][1]!r}: they must not overlap."
        )
    out = [name for name in found if not found[name]]
    if out:
        more = f" and {len(out) - 1} more" if len(out) > 1 else ""
        raise InputError(f"{out[0]}{more} is in no block: add a pattern for what is left, or restrict the operator.")
    return lambda name: found[name][0]
