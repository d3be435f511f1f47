"""Exact columns of an operator's matrix, how large their entries are, and small parts of the matrix itself.

An entry of a vector has a number: its place in the order of `jax.flatten_util.ravel_pytree`, in which `to_matrix` has
rows and columns. Numbers are whole numbers of any size on the host; nothing is made flat on a device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import non_finite
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector, widen

Indices = Sequence[int] | npt.NDArray[np.int64]
COUNTER = jnp.uint32
"""What counts are summed in on the device."""
LIMB = 12
"""Bits of the low part of a sum that fits into 32 bits. Low parts add up to less than 2^32 for a million such sums, and
high parts for 10^13 entries."""


def columns(operator: LinearOperator, indices: Indices, batch_size: int = 1) -> Iterator[Vector]:
    """The columns A e_i, one after the other: trees like the operator's vectors, in at least float32.

    Each costs one product; several at once share the primal pass. They are sharded like the operator's vectors.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess import MatrixOperator
        >>> from jaxhess.structure.columns import columns
        >>> A = MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
        >>> [column.tolist() for column in columns(A, [1, 0])]
        [[1.0, 3.0], [2.0, 1.0]]

    Args:
        operator: Any.
        indices: The entries i.
        batch_size: Products at once; each takes the memory of a column and of the tangents of the activations.

    Raises:
        InputError: There is no such entry, or a column is not finite (names its entry).
    """
    indices = _checked(operator.shape_dtype, indices)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; at least one product is made at once.")
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        found = _products(operator, _places(operator.shape_dtype, _padded(chosen, batch_size)))
        for k, index in enumerate(chosen.tolist()):
            column = jax.tree.map(lambda x, k=k: x[k], found)
            if k == len(chosen) - 1:
                del found  # before somebody works on the last one
            if not bool(_finite(column)):
                unit = jax.tree.map(lambda x: x[0], _units(operator, _places(operator.shape_dtype, np.array([index]))))
                raise non_finite(f"The column of {entry_name(operator, index)}", operator, unit)
            yield column


def submatrix(operator: LinearOperator, indices: Indices, batch_size: int = 16) -> npt.NDArray[np.floating]:
    """The part A[S, S] of the matrix, [k, k], for k entries S: k products, of which k numbers are kept each.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess import MatrixOperator
        >>> from jaxhess.structure.columns import submatrix
        >>> submatrix(MatrixOperator(jnp.arange(9.0).reshape(3, 3)), [0, 2]).tolist()
        [[0.0, 2.0], [6.0, 8.0]]

    Args:
        operator: Any.
        indices: S.
        batch_size: Products at once.

    Raises:
        InputError: There is no such entry.
    """
    indices = _checked(operator.shape_dtype, indices)
    rows = _places(operator.shape_dtype, indices)
    parts = []
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        found = _rows_of_products(operator, _places(operator.shape_dtype, _padded(chosen, batch_size)), rows)
        parts.append(np.asarray(found)[: len(chosen)])
    return np.concatenate(parts).T


def threshold_counts(
    vector: Vector, thresholds: Sequence[float] | npt.NDArray[np.floating], blocks: Blocks | None = None
) -> npt.NDArray[np.int64]:
    """How many entries have a magnitude at or below each threshold, [B, T]; without blocks [1, T].

    Counted on device in whole numbers, exact up to 10^13 entries: of the same vector the same counts on any mesh.
    Columns that are computed on different meshes differ by rounding, and so may the count at a threshold that an entry
    is within rounding of: in float64 by chance never, in float32 easily at thresholds near the noise of the products.
    Each threshold reads the vector once; none makes a copy of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess.structure.columns import threshold_counts
        >>> threshold_counts({"a": jnp.array([0.0, -1e-3]), "b": jnp.ones(3)}, [0.0, 1e-2, 1.0]).tolist()
        [[1, 2, 5]]

    Args:
        vector: A tree of arrays.
        thresholds: T numbers, not negative; 0 counts zeros.
        blocks: A partition of the entries, to count in each.

    Raises:
        InputError: A threshold is negative or NaN, or the blocks are those of other vectors.
    """
    limits = np.asarray(thresholds, np.float64)
    if limits.ndim != 1 or not (limits >= 0).all():
        raise InputError(f"The thresholds are {limits.tolist()}; they must be a list of numbers, 0 or more.")
    if blocks is None:
        blocks = _one_block(vector)
    blocks.check(vector)
    high, low = (np.asarray(x).astype(np.int64) for x in _counts(vector, jnp.asarray(limits), blocks))
    return (high << LIMB) + low


def random_entries(blocks: Blocks, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Entries drawn from every block, each with the same chance and with replacement, [B, count].

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.structure.columns import random_entries
        >>> blocks = jaxhess.Blocks.by({"a": jnp.zeros(5), "b": jnp.zeros((2, 2))}, "matrices")
        >>> a, b = random_entries(blocks, 100)
        >>> sorted(set(a.tolist())), sorted(set(b.tolist()))
        ([0, 1, 2, 3, 4], [5, 6, 7, 8])

    Args:
        blocks: A partition, such as `Blocks.by(operator, "kinds")`.
        count: Entries of each.
        seed: Of NumPy's generator, on the host.
    """
    numbers = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum([_size(shape) for shape in blocks.shapes], dtype=np.int64)])
    drawn = []
    for block in range(len(blocks)):
        cells: list[tuple[int, npt.NDArray[np.int64]]] = []  # leaves, and where in their labels the block is
        for leaf, labels in enumerate(blocks.labels):
            cells += [(leaf, cell) for cell in np.argwhere(labels == block)]
        weights = np.array([_size(blocks.shapes[leaf]) / blocks.labels[leaf].size for leaf, _ in cells])
        entries = []
        for chosen in numbers.choice(len(cells), count, p=weights / weights.sum()):
            leaf, cell = cells[chosen]
            shape, free = blocks.shapes[leaf], blocks.labels[leaf].shape
            place = [int(numbers.integers(n)) if m == 1 else int(c) for n, m, c in zip(shape, free, cell, strict=True)]
            entries.append(offsets[leaf] + (np.ravel_multi_index(place, shape) if shape else 0))
        drawn.append(entries)
    return np.array(drawn, np.int64).reshape(len(blocks), count)


def entry_name(like: Vector | LinearOperator, index: int) -> str:
    """The entry's leaf and its place there.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess.structure.columns import entry_name
        >>> entry_name({"a": jnp.zeros(5), "b": jnp.zeros((2, 3))}, 9)
        'b[1,1]'

    Raises:
        InputError: There is no such entry.
    """
    like = like.shape_dtype if isinstance(like, LinearOperator) else like
    (number,), (place,) = _places(like, _checked(like, [index]))
    path, leaf = jax.tree.flatten_with_path(like)[0][number]
    return f"{leaf_name(path)}[{','.join(str(i) for i in place[: len(leaf.shape)])}]"


class Places(NamedTuple):
    """Entries by leaf: numbers of leaves [k], and places in them [k, axes], 0 beyond a leaf's own axes; int32."""

    leaves: npt.NDArray[np.int32]
    axes: npt.NDArray[np.int32]


def _places(like: Vector, indices: npt.NDArray[np.int64]) -> Places:
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    ends = np.cumsum([_size(shape) for shape in shapes], dtype=np.int64)
    numbers = np.searchsorted(ends, indices, side="right")
    axes = np.zeros((len(indices), max(1, *map(len, shapes)) if shapes else 1), np.int32)
    for row, (number, index) in enumerate(zip(numbers, indices, strict=True)):
        shape = shapes[number]
        if shape:
            axes[row, : len(shape)] = np.unravel_index(index - (ends[number] - _size(shape)), shape)
    return Places(numbers.astype(np.int32), axes)


def _checked(like: Vector, indices: Indices) -> npt.NDArray[np.int64]:
    found = np.asarray(indices)
    dim = sum(_size(leaf.shape) for leaf in jax.tree.leaves(like))
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise InputError("Entries are given by their numbers: a list of at least one whole number.")
    if found.min() < 0 or found.max() >= dim:
        odd = found.min() if found.min() < 0 else found.max()
        raise InputError(f"There is no entry {odd}: vectors have {dim:,}, numbered from 0.")
    return found.astype(np.int64)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _padded(indices: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """The last one repeated: a shorter batch would be compiled for itself."""
    return np.concatenate([indices, np.repeat(indices[-1:], length - len(indices))])


def _units(operator: LinearOperator, places: Places) -> Vector:
    """Unit vectors [b, ...], made where they lie."""
    leaves, treedef = jax.tree.flatten(operator.shape_dtype)

    def unit(leaf: jax.Array, axes: jax.Array) -> Vector:
        found = []
        for k, x in enumerate(leaves):
            here = jnp.broadcast_to(leaf == k, x.shape)
            for axis in range(len(x.shape)):
                here &= jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) == axes[axis]
            found.append(here.astype(x.dtype))
        return widen(jax.tree.unflatten(treedef, found))

    return jax.vmap(unit)(jnp.asarray(places.leaves), jnp.asarray(places.axes))


@jax.jit
def _products(operator: LinearOperator, places: Places) -> Vector:
    return jax.vmap(operator.mv)(_units(operator, places))


@jax.jit
def _rows_of_products(operator: LinearOperator, places: Places, rows: Places) -> jax.Array:
    """Entries [b, k] at `rows` of the products with unit vectors."""

    def entry(product: Vector, leaf: jax.Array, axes: jax.Array) -> jax.Array:
        found = [x[tuple(jnp.minimum(axes[: x.ndim], jnp.array(x.shape, jnp.int32)[: x.ndim] - 1))] if x.ndim else x
                 for x in jax.tree.leaves(product)]  # fmt: skip
        return jnp.select([leaf == k for k in range(len(found))], found)

    products = jax.vmap(operator.mv)(_units(operator, places))
    leaves, axes = jnp.asarray(rows.leaves), jnp.asarray(rows.axes)
    return jax.vmap(lambda p: jax.vmap(functools.partial(entry, p))(leaves, axes))(products)


@jax.jit
def _finite(v: Vector) -> jax.Array:
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in jax.tree.leaves(v)])


@functools.partial(jax.jit, static_argnames="blocks")
def _counts(vector: Vector, thresholds: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """High and low parts [B, T] of the counts."""

    def at(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        high, low = jnp.zeros((2, len(blocks)), COUNTER)
        for labels, x in zip(blocks.labels, jax.tree.leaves(widen(vector)), strict=True):
            small = jnp.abs(x) <= threshold.astype(x.dtype)
            free = tuple(k for k, n in enumerate(labels.shape) if n == 1)
            counts = jnp.sum(small, axis=_summed_at_once(x.shape, free), keepdims=True, dtype=COUNTER)
            parts = [counts >> LIMB, counts & (2**LIMB - 1)]
            parts = [jnp.sum(p, axis=free, keepdims=True, dtype=COUNTER) for p in parts]
            high, low = (t.at[labels.ravel()].add(p.ravel()) for t, p in zip((high, low), parts, strict=True))
        return high, low

    high, low = jax.lax.map(at, thresholds)
    return high.T, low.T


def _summed_at_once(shape: Sequence[int], free: Sequence[int]) -> tuple[int, ...]:
    """Of the free axes those with the most entries that one sum can count; of most leaves all."""

    def entries(axes: tuple[int, ...]) -> int:
        return _size([shape[axis] for axis in axes])

    some = itertools.chain.from_iterable(itertools.combinations(free, k) for k in range(len(free) + 1))
    return max((axes for axes in some if entries(axes) <= jnp.iinfo(COUNTER).max), key=entries)


def _one_block(like: Vector) -> Blocks:
    named = [(leaf_name(path), tuple(x.shape)) for path, x in jax.tree.flatten_with_path(like)[0]]
    labels = tuple(np.zeros([1] * len(shape), np.int32) for _, shape in named)
    return Blocks(("all",), labels, tuple(name for name, _ in named), tuple(shape for _, shape in named))
