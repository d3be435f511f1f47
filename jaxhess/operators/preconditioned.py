"""An operator seen through a positive diagonal: what an optimiser that scales each parameter meets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess import vectors
from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator, check_structure
from jaxhess.operators.facts import checksum, explain_non_finite, validate
from jaxhess.operators.restriction import leaf_name
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, cast, named_sharding, widen


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioned(LinearOperator):
    """`D^-1/2 A D^-1/2` for a positive diagonal D; `A.preconditioned(diagonal)` makes it.

    It is symmetric, and its eigenvalues are those of `D^-1 A`: if q is an eigenvector of it, `D^-1/2 q` is one of
    `D^-1 A` with the same eigenvalue. A step `-rate * D^-1 gradient` sees the curvature of this matrix; see
    `jaxhess.adam_preconditioner`.

    A product costs one of A and two passes over the vector. Roots are taken in at least float32.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[8.0, 2.0], [2.0, 3.0]]))
        >>> A.preconditioned(jnp.array([4.0, 1.0])).to_matrix()
        Array([[2., 1.],
               [1., 3.]], dtype=float32)

    Attributes:
        operator: A.
        diagonal: The entries of D, a tree like A's vectors and laid out like them; at least float32 is best.
        threshold: Below which the optimiser that D is from is stable (`jaxhess.adam_threshold`), for the record; None:
            not known. Static.
    """

    operator: LinearOperator
    diagonal: Vector
    threshold: float | None = dataclasses.field(default=None, metadata={"static": True})

    def mv(self, v: Vector) -> Vector:
        return cast(self.scaled(self.operator.mv(self.scaled(widen(v)))), v)

    def product_and_each(self, v: Vector, each: Callable[[tuple[Vector, jax.Array]], Any]) -> tuple[Vector, Any]:
        """As that of A, where A has one: `D^-1/2 S D^-1/2 v` of every microbatch's S."""
        inner: Any = self.operator
        product, found = inner.product_and_each(self.scaled(v), lambda part: each((self.scaled(part[0]), part[1])))
        return self.scaled(product), found

    def scaled(self, v: Vector) -> Vector:
        """`D^-1/2 v`, in the dtypes of v."""

        def leaf(d: jax.Array, x: jax.Array) -> jax.Array:
            wide = jnp.promote_types(jnp.promote_types(d.dtype, x.dtype), jnp.float32)
            return (x.astype(wide) / jnp.sqrt(d.astype(wide))).astype(x.dtype)

        return jax.tree.map(leaf, self.diagonal, v)

    @property
    def shape_dtype(self) -> Vector:
        return self.operator.shape_dtype


def preconditioned(operator: LinearOperator, diagonal: Vector) -> Preconditioned:
    """The operator seen through this diagonal, which is laid out like the operator's vectors and checked.

    Raises:
        InputError: See `LinearOperator.preconditioned`.
    """
    like = operator.shape_dtype
    check_structure(diagonal, like, "preconditioner")
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(diagonal)):
        diagonal = jax.tree.map(_laid_out, diagonal, like)
        _range(diagonal)
    return Preconditioned(operator, diagonal)


@validate.register
def _(operator: Preconditioned) -> dict[str, Any]:
    """With the smallest and the largest entry of the diagonal.

    Raises:
        InputError: An entry of the diagonal is not positive and finite.
    """
    return {**validate(operator.operator), "preconditioner": _range(operator.diagonal)}


@checksum.register
def _(operator: Preconditioned) -> str:
    """The diagonal's too, whole: parameters may be single numbers, which a checksum of other operators leaves out."""
    return f"{vectors.checksum(operator.diagonal)} {checksum(operator.operator)}"


@explain_non_finite.register
def _(operator: Preconditioned, v: Vector) -> str:
    return explain_non_finite(operator.operator, operator.scaled(widen(v)))


def _laid_out(d: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = named_sharding(like)
    return jnp.asarray(d) if sharding is None else jax.device_put(d, sharding)


def _range(diagonal: Vector) -> list[float]:
    """The smallest and the largest entry.

    Raises:
        InputError: One is not positive and finite; names its leaf.
    """
    ends = _ends(diagonal)
    for (path, _), (low, _, finite) in zip(jax.tree.flatten_with_path(diagonal)[0], ends, strict=True):
        if not (bool(finite) and float(low) > 0):
            found = f"has an entry {float(low):.3g}" if finite else "has entries that are NaN or infinite"
            raise InputError(
                f"The preconditioner's leaf {leaf_name(path) or 'itself'} {found}; all must be positive and finite."
            )
    return [min(float(low) for low, _, _ in ends), max(float(high) for _, high, _ in ends)]


@jax.jit
def _ends(diagonal: Vector) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    return [(x.min(), x.max(), jnp.isfinite(x).all()) for x in jax.tree.leaves(diagonal)]
