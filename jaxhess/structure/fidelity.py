"""What the block-diagonal part of an operator gets right of a product, block by block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator, compiled_mv
from jaxhess.operators.blocks import Blocks
from jaxhess.vectors import Vector, widen

Array = npt.NDArray[np.float64]


class Fidelity(NamedTuple):
    """How the block-diagonal product d = H_bb v_b compares with the part y = (Hv)_b of the whole product.

    The last entry is of all blocks together, NaN where some were left out.

    Attributes:
        full: [..., B + 1] lengths |y|.
        own: [..., B + 1] lengths |d|.
        missed: [..., B + 1] lengths |o| of o = y - d, what other blocks contribute.
        cosine: [..., B + 1] of the angle between y and d (arXiv 2602.00816, Table 6); NaN where one is zero.
    """

    full: Array
    own: Array
    missed: Array
    cosine: Array

    @property
    def error(self) -> Array:
        """|y - d| / |y|, the relative error of arXiv 2602.00816, Mechanism 3."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.missed / self.full

    @property
    def ratio(self) -> Array:
        """|d| / |y|."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.own / self.full

    @property
    def excess(self) -> Array:
        """error^2 + cosine^2 - 1 = (|d|/|y| - cosine)^2 = error^2 cos^2(d, o): zero where d and o are orthogonal.

        From |y - d|^2 = |y|^2 + |d|^2 - 2 <y, d>, for any two vectors: it is never negative.
        """
        return (self.ratio - self.cosine) ** 2

    @property
    def alignment(self) -> Array:
        """The cosine of the angle between d and o = y - d, (cosine - |d|/|y|) / error.

        Where v has independent entries of symmetric distribution, its mean over draws is zero for every fixed matrix:
        (d, o) and (d, -o) are equally likely. Noise in d that is not in y makes it negative.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.cosine - self.ratio) / self.error

    @classmethod
    def stacked(cls, several: Sequence[Fidelity]) -> Fidelity:
        """Those of several probes along a leading axis."""
        full, own, missed, cosine = map(np.stack, zip(*several, strict=True))
        return cls(full, own, missed, cosine)


def block_fidelity(
    operator: LinearOperator, blocks: Blocks, v: Vector, numbers: Sequence[int] | None = None
) -> Fidelity:
    """How well the block-diagonal part of an operator does along v: arrays [B + 1].

    One product along v and one along its part in each block. `coupling_map` measures the same of a matrix, and adds the
    products of all blocks up to that along v; for finite differences these are not the same, and their noise would be
    in both.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.structure.fidelity import block_fidelity
        >>> A = jaxhess.MatrixOperator(jnp.array([[3.0, 4.0], [4.0, 3.0]]))
        >>> rows = jaxhess.Blocks.by(A.shape_dtype, "matrices").split("*", axis=0)
        >>> found = block_fidelity(A, rows, jnp.array([1.0, 0.0]))  # Hv = (3, 4); the diagonal gives (3, 0)
        >>> found.error.round(3), found.cosine.round(3)
        (array([0. , 1. , 0.8]), array([1. , nan, 0.6]))

    Args:
        operator: Any; where products are not linear in v, these are the products taken.
        blocks: Of its vectors.
        v: The direction.
        numbers: Of the blocks to look at; None: all.

    Raises:
        InputError: The blocks are those of other vectors, or have no such number.
    """
    return compared(blocks, *full_and_own(operator, blocks, v, numbers), numbers)


def full_and_own(
    operator: LinearOperator, blocks: Blocks, v: Vector, numbers: Sequence[int] | None = None
) -> tuple[Vector, Vector]:
    """The product along v, and the vector of all H_bb v_b, zero in blocks that are left out; see `block_fidelity`."""
    blocks.check(operator.shape_dtype)
    wanted = range(len(blocks)) if numbers is None else numbers
    if bad := [b for b in wanted if not 0 <= b < len(blocks)]:
        raise InputError(f"There is no block {bad[0]}: the numbers are 0 to {len(blocks) - 1}.")
    v = widen(v)
    own = jax.tree.map(jnp.zeros_like, v)
    for b in map(np.int32, wanted):  # one program for products: that along v, and those along its parts
        own = _with_own(blocks, own, b, compiled_mv(operator, _part(blocks, v, b)))
        jax.block_until_ready(own)  # else all parts of v would be in memory at once
    return compiled_mv(operator, v), own


def compared(blocks: Blocks, full: Vector, own: Vector, numbers: Sequence[int] | None = None) -> Fidelity:
    """The fidelity of products that are there already; see `block_fidelity`."""
    found = of_lengths(*(np.asarray(x, np.float64) for x in _lengths(blocks, full, own)))
    if numbers is not None and len(set(numbers)) < len(blocks):
        for values in found:
            values[~np.isin(np.arange(len(blocks) + 1), numbers)] = np.nan
    return found


def of_lengths(full: Array, own: Array, missed: Array, inner: Array) -> Fidelity:
    """The fidelity from what `lengths` gives for each block, [..., B], with that of all blocks together."""
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = [np.sqrt((x**2).sum(-1, keepdims=True)) for x in (full, own, missed)]
        dot = (inner * full * own).sum(-1, keepdims=True)
        cosines = [np.where((full > 0) & (own > 0), inner, np.nan), dot / whole[0] / whole[1]]
    parts = [np.concatenate(pair, axis=-1) for pair in zip((full, own, missed), whole, strict=True)]
    return Fidelity(parts[0], parts[1], parts[2], np.concatenate(cosines, axis=-1))


def lengths(blocks: Blocks, full: Vector, own: Vector) -> list[jax.Array]:
    """[B] |y|, |d|, |y - d|, and the inner product of y / |y| and d / |d|, zero where one is zero; see `Fidelity`."""
    found = [blocks.norm(full), blocks.norm(own), blocks.norm(jax.tree.map(jnp.subtract, full, own))]
    # Vectors of length about one: their products neither overflow nor vanish.
    units = [
        jax.tree.map(lambda e, n: e / jnp.where(n > 0, n, 1), x, blocks.spread(n, x))
        for x, n in zip((full, own), found[:2], strict=True)
    ]
    return [*found, blocks.dot(*units)]


_lengths = jax.jit(lengths, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _part(blocks: Blocks, v: Vector, b: jax.Array) -> Vector:
    return blocks.part(v, b)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_own(blocks: Blocks, own: Vector, b: jax.Array, product: Vector) -> Vector:
    return jax.tree.map(jnp.add, own, blocks.part(product, b))
