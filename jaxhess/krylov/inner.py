"""The algebra of a Lanczos step: on whole vectors, with scalars, or on blocks of one vector, with a scalar for each.

The Lanczos vectors of all blocks of one operator take no more memory than those of one run: they are the parts of one.
With `blocks` None every function here is that of `jaxhess.vectors`; otherwise what is a scalar there is an array [B].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxhess import vectors
from jaxhess.operators.blocks import Blocks
from jaxhess.vectors import Vector, widen


def dot(blocks: Blocks | None, x: Vector, y: Vector, dtype: Any = "float32") -> jax.Array:
    """Inner product, accumulated in at least `dtype`."""
    return vectors.dot(x, y, dtype) if blocks is None else blocks.dot(x, y, dtype)


def norm(blocks: Blocks | None, x: Vector, dtype: Any = "float32") -> jax.Array:
    """Euclidean norm."""
    return vectors.norm(x, dtype) if blocks is None else blocks.norm(x, dtype)


def scale(blocks: Blocks | None, a: jax.Array, x: Vector) -> Vector:
    """a x in the dtype of x, computed in at least float32."""
    if blocks is None:
        return vectors.scale(a, x)
    return jax.tree.map(lambda f, e, like: (f * e).astype(like.dtype), blocks.spread(a, x), widen(x), x)


def add_scaled(blocks: Blocks | None, y: Vector, a: jax.Array, x: Vector) -> Vector:
    """y + a x in the dtype of y, computed in at least float32."""
    if blocks is None:
        return vectors.add_scaled(y, a, x)
    wide = jax.tree.map(lambda e, f, g: e + f * g, widen(y), blocks.spread(a, x), widen(x))
    return vectors.cast(wide, y)


def where(blocks: Blocks | None, condition: jax.Array, x: Vector, y: Vector) -> Vector:
    """x where the condition holds, else y."""
    chosen = jax.tree.map(lambda _: condition, x) if blocks is None else blocks.spread(condition, x)
    return jax.tree.map(jnp.where, chosen, x, y)


def size(blocks: Blocks | None, x: Vector) -> Any:
    """Number of entries."""
    return vectors.size(x) if blocks is None else blocks.sizes


def basis_dot(blocks: Blocks | None, basis: Vector, x: Vector) -> jax.Array:
    """Inner products [m] (or [m, B]) with the vectors stacked along the leading axis of `basis`."""
    if blocks is None:
        return vectors.basis_dot(basis, x)
    return jax.vmap(lambda row: blocks.dot(row, x))(basis)


def add_basis_sum(blocks: Blocks | None, y: Vector, coefficients: jax.Array, basis: Vector) -> Vector:
    """y, in at least float32, plus the combination of the stacked vectors with these coefficients [m] (or [m, B])."""
    if blocks is None:
        return vectors.add_basis_sum(y, coefficients, basis)
    factors = jax.vmap(lambda c: blocks.spread(c, y))(coefficients)
    return jax.tree.map(lambda e, f, b: e + jnp.sum(f * b.astype(e.dtype), axis=0), y, factors, basis)
