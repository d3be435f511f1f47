"""The entries of columns of a Hessian: their sizes, and which of the small ones are zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.structure.columns import columns, entry_name, threshold_counts
from jaxhess.vectors import Vector, add_scaled, norm, random_key, random_probe, size

Counts = npt.NDArray[np.int64]

THRESHOLDS = 10.0 ** np.arange(-12, 0)
"""Of the paper's tables."""
EPSILON = 1e-7
"""The threshold of the tables that is next to float32's machine epsilon, 1.2e-7."""
GRID = 10.0 ** np.arange(-18, 8.5, 0.5)
"""Of histograms."""
DIGIT = 0.1
"""A number that is off by this share of itself has not one digit. (Of numbers that are noise and nothing else, 97%
differ by more from another one.)"""
CLASSES = ("exactly zero", "zero within float64's rounding", "below float32's noise", "nonzero in float32 too")
"""What an entry is. Of the second not one digit stays if weights change in their last bit of float64; the third is a
number in float64 of which float32 has not one digit."""


class ColumnEntries(NamedTuple):
    """What is kept of a column.

    Attributes:
        entry: Its number's name.
        kind: Of the parameter.
        below: By dtype: entries at or below each of `THRESHOLDS`.
        histogram: By dtype: entries at or below each of `GRID`.
        relative: At or below each of `GRID` times the column's norm, in the widest dtype.
        to_floor: At or below each of `GRID` times the root mean square of float32's noise in this column.
        classes: [kinds of rows, 4] entries of each of `CLASSES`.
        small: [4] those at or below `EPSILON`.
        near_zero: Entries at or below 1% of the column's largest.
        negligible: Entries at or below float32's machine epsilon times the column's largest.
        length: Norm of the column.
        floor: That root mean square.
    """

    entry: str
    kind: str
    below: dict[str, Counts]
    histogram: dict[str, Counts]
    relative: Counts
    to_floor: Counts
    classes: Counts
    small: Counts
    near_zero: int
    negligible: int
    length: float
    floor: float


@dataclasses.dataclass(frozen=True)
class ColumnOperators:
    """The operators that columns are compared between.

    Attributes:
        plain: The Hessian in float32.
        wide: In float64; None: there is no such reference.
        nudged: The widest of them at weights that are changed in their last bit.
    """

    plain: jaxhess.Hessian
    wide: jaxhess.Hessian | None
    nudged: jaxhess.Hessian

    @property
    def widest(self) -> jaxhess.Hessian:
        """In float64 where there is one."""
        return self.plain if self.wide is None else self.wide


def nudged(operator: jaxhess.Hessian, seed: int) -> jaxhess.Hessian:
    """The operator at weights that differ by a relative eps, up or down at random: all it computes is rounded anew."""
    signs = random_probe(random_key(seed), operator.params, "rademacher")
    return dataclasses.replace(operator, params=_nudged(operator.params, signs))


@jax.jit
def _nudged(params: Vector, signs: Vector) -> Vector:
    return jax.tree.map(lambda x, s: x * (1 + jnp.finfo(x.dtype).eps * s).astype(x.dtype), params, signs)


def measured(
    products: ColumnOperators, indices: Sequence[int], kinds: jaxhess.Blocks, batch_size: int
) -> Iterator[ColumnEntries]:
    """The columns of these entries."""
    chosen = np.asarray(indices, np.int64)
    operators = [products.plain, products.nudged, *([products.wide] if products.wide is not None else [])]
    streams = (columns(operator, chosen, batch_size) for operator in operators)
    for index, (plain, other, *reference) in zip(chosen.tolist(), zip(*streams, strict=True), strict=True):
        wide = reference[0] if reference else None
        yield entries_of(entry_name(products.plain, index), kinds, kind_of(kinds, index), plain, wide, other)


def entries_of(
    entry: str, kinds: jaxhess.Blocks, kind: str, plain: Vector, wide: Vector | None, other: Vector
) -> ColumnEntries:
    """What is kept of one column.

    Args:
        entry, kind: Its name and kind.
        kinds: The partition of rows.
        plain: In float32.
        wide: In float64; None: not known.
        other: Of nudged weights, in the widest dtype.
    """
    widest = plain if wide is None else wide
    codes = _codes(widest, other if wide is None else plain, None if wide is None else other)
    noise = _difference(widest, other if wide is None else plain)
    length, floor = float(norm(widest)), float(norm(noise)) / np.sqrt(size(widest))
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(widest))
    by_dtype = {"float32": plain} | ({} if wide is None else {"float64": wide})
    counted = {
        dtype: threshold_counts(column, np.concatenate([THRESHOLDS, GRID]))[0] for dtype, column in by_dtype.items()
    }
    ends = [0.01 * largest, float(jnp.finfo("float32").eps) * largest]
    others = threshold_counts(widest, np.concatenate([GRID * length, GRID * floor, ends]))[0]
    steps = np.arange(len(CLASSES)) + 0.5
    small = threshold_counts(_where_small(widest, codes), steps)
    return ColumnEntries(
        entry,
        kind,
        {dtype: counts[: len(THRESHOLDS)] for dtype, counts in counted.items()},
        {dtype: counts[len(THRESHOLDS) :] for dtype, counts in counted.items()},
        others[: len(GRID)],
        others[len(GRID) : -2],
        np.diff(threshold_counts(codes, steps, kinds), prepend=0, axis=1),
        np.diff(small[0], prepend=0),
        int(others[-2]),
        int(others[-1]),
        length,
        float(floor),
    )


def kind_of(kinds: jaxhess.Blocks, index: int) -> str:
    """The block that an entry is in."""
    for shape, labels in zip(kinds.shapes, kinds.labels, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        if index < count:
            place = np.unravel_index(index, shape) if shape else ()
            return kinds.names[labels[tuple(0 if n == 1 else i for i, n in zip(place, labels.shape, strict=True))]]
        index -= count
    raise IndexError(index)


@jax.jit
def _codes(widest: Vector, noisy: Vector, again: Vector | None) -> Vector:
    """The class of each entry, as a float."""

    def leaf(w: jax.Array, n: jax.Array, a: jax.Array) -> jax.Array:
        rounding, lost = (abs(other.astype(w.dtype) - w) >= DIGIT * abs(w) for other in (a, n))
        return jnp.select([(w == 0) & (a == 0), rounding, lost], [0.0, 1.0, 2.0], 3.0).astype(jnp.float32)

    return jax.tree.map(leaf, widest, noisy, widest if again is None else again)


@jax.jit
def _difference(x: Vector, y: Vector) -> Vector:
    return add_scaled(x, jnp.float32(-1), y)


@jax.jit
def _where_small(x: Vector, codes: Vector) -> Vector:
    """The classes of small entries; others beyond all classes."""
    return jax.tree.map(lambda e, c: jnp.where(abs(e) <= EPSILON, c, float(len(CLASSES))), x, codes)
