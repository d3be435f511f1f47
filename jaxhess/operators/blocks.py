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
from jaxhess.operators.base import LinearOperator, parts
from jaxhess.operators.block_names import HEAD_AXES, by_patterns, in_model_order, kind_of, layer_of
from jaxhess.operators.restriction import STACKED, layer_number, leaf_name, matches, stack_of
from jaxhess.vectors import Vector, widen

Labels = npt.NDArray[np.int32]


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
    def by(cls, like: Vector | LinearOperator, *by: str, stacks: Mapping[str, Sequence[int]] | None = None) -> Blocks:
        """The partition of the vectors of an operator, or of vectors like these.

        Args:
            like: An operator, whose layers have then the numbers that they have in the model, also where it is
                restricted to some of them; or parameters.
            by: One of these words, or patterns.

                - `layers`: `embed` (with learned positions), `layers/0` and so on, `final_norm`, `head`. Of a model
                  without `layers` in its names, the first component of the names.
                - `kinds`: embedding, query, key, value, attention out, gate, up, down, experts, router, norms, head,
                  over all layers.
                - `matrices`: every array; of layers that are stacked, that of each layer.
                - `heads`: as `matrices`, with a block for every attention head (of queries, keys, values and output).
                - patterns, as in `LossOperator.restrict`: a block for each. They are compared with names as `matrices`
                  has them, `layers/3/mlp/up/kernel`, and with those of the parameters, `layers/mlp/up/kernel`.
            stacks: Where parameters have layers stacked under several names, the numbers of those under each, as
                `DecoderConfig.stacks`; an operator knows them. None: all are under `layers`.

        Raises:
            InputError: Nothing was asked for; a pattern matches nothing, or patterns overlap or leave parameters out
                (the message names the first).
        """
        if isinstance(like, LinearOperator):
            like, stacks = like.shape_dtype, stacks or _stacks_of(like)
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
        pairs = zip(matrices.leaf_names, matrices.labels, strict=True)
        leaves = {matrices.names[k]: name for name, labels in pairs for k in labels.ravel()}
        return matrices.merged(by_patterns(leaves, by))

    def merged(self, group: Callable[[str], str]) -> Blocks:
        """A coarser partition: blocks that `group` gives one name become one.

        Examples:
            >>> import jax.numpy as jnp, jaxhess
            >>> blocks = jaxhess.Blocks.by({"a": {"u": jnp.zeros(2), "v": jnp.zeros(3)}, "b": jnp.zeros(4)}, "matrices")
            >>> blocks.merged(lambda name: name.split("/")[0]).sizes
            array([5, 4])
        """
        groups = [group(name) for name in self.names]
        names = in_model_order(groups)
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
            np.add.at(sizes, labels.ravel(), int(np.prod(shape)) // max(labels.size, 1))
        return sizes

    def check(self, like: Vector) -> None:
        """Raises InputError where vectors like these are not those of the partition."""
        found = [(leaf_name(path), tuple(x.shape)) for path, x in jax.tree.flatten_with_path(like)[0]]
        wanted = list(zip(self.leaf_names, self.shapes, strict=True))
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise InputError(f"The blocks are of other vectors: of {len(wanted)} arrays, and these have {len(found)}.")
        (name, shape), (other, theirs) = next(pair for pair in zip(wanted, found, strict=True) if pair[0] != pair[1])
        raise InputError(f"The blocks are of other vectors: of {name} {shape}, where these have {other} {theirs}.")

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
    named = [(leaf_name(path), tuple(leaf.shape)) for path, leaf in jax.tree.flatten_with_path(like)[0]]
    stacked = {
        name: stack
        for name, shape in named
        if shape and layer_number(name) is None and (stack := stack_of(name, tuple(stacks or (STACKED,))))
    }
    if stacks is None:
        counts = {shape[0] for name, shape in named if name in stacked}
        if len(counts) > 1:  # no stacks of layers: arrays of one's own below this name
            stacked = {}
        stacks = {STACKED: range(max(counts, default=0))}
    names: list[str] = []
    labels = []
    for name, shape in named:
        found = [name]
        if name in stacked:
            stack, numbers = stacked[name], stacks[stacked[name]]
            if len(numbers) != shape[0]:
                raise InputError(f"{name} has {shape[0]} rows and {stack} {len(numbers)} layers.")
            found = [re.sub(rf"(^|/){stack}(/|$)", rf"\g<1>{STACKED}/{k}\g<2>", name, count=1) for k in numbers]
        axes = (len(found), *[1] * len(shape))[: len(shape)]
        labels.append(np.arange(len(names), len(names) + len(found), dtype=np.int32).reshape(axes))
        names += found
    blocks = Blocks(tuple(names), tuple(labels), tuple(x for x, _ in named), tuple(x for _, x in named))
    return blocks.merged(lambda name: name)  # in the order of the model


def _stacks_of(operator: LinearOperator) -> Mapping[str, Sequence[int]] | None:
    """Of the loss that the operator is made of: the numbers of the layers under each name, those that are free."""
    if not hasattr(operator, "restriction"):
        return next((found for part in parts(operator) if (found := _stacks_of(part)) is not None), None)
    stacks = getattr(operator.loss, "stacks", None) if hasattr(operator, "loss") else None
    block = operator.restriction and operator.restriction.block
    if not block or block.layers is None:
        return stacks
    return {
        name: [number for number in numbers if number in block.layers]
        for name, numbers in (stacks or {STACKED: block.layers}).items()
    }
