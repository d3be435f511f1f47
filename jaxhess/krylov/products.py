"""An operator's products with many vectors, drawn or computed, a batch at a time.

No more than a batch of vectors and their products exists at once, stacked along a leading axis and sharded like the
operator's vectors. Vectors are kept in at least float32; what is left of them, a few numbers per product, goes to the
host in float64.

All programs here take the operator, if only for the shardings of its vectors. Products are one by themselves, which is
the same for every estimator: of a large model it is the one that takes long to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.facts import non_finite, validated
from jaxhess.vectors import Distribution, Vector, dot, named_sharding, norm, random_probe, widen

Array = npt.NDArray[np.float64]


Numbers = npt.NDArray[np.int32]
"""Which of an estimator's probes (or of a sketch's rows) a batch holds."""


def collected(
    operator: LinearOperator,
    vectors: Callable[[Numbers], Vector],
    values: Callable[[Numbers, Vector, Vector], jax.Array],
    count: int,
    batch_size: int,
    kind: str = "probe",
) -> Array:
    """What is made of products with the vectors of numbers 0 to count - 1, [count, ...], a batch at a time.

    The host waits for each batch: an error is raised where it happens, and no two programs with collectives of their
    own are in flight.

    Args:
        vectors: From numbers [b] to vectors [b, ...].
        values: From numbers, vectors and products to values [b, ...].
        kind: Of the vectors, for the message.

    Raises:
        InputError: A value is not finite.
    """
    parts = []
    for numbers in batches(count, batch_size):
        block = vectors(numbers)
        found = np.asarray(values(numbers, block, products_with(operator, block)), np.float64)[: count - numbers[0]]
        bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
        if bad.size:
            raise non_finite(f"The product with {kind} {numbers[bad[0]] + 1}", operator, row(block, int(bad[0])))
        parts.append(found)
        del block  # or it would be there beside the next one
    return np.concatenate(parts)


def batches(count: int, batch_size: int) -> list[Numbers]:
    """Numbers from 0 on, in batches of one length, which one program serves: the last may go beyond the count."""
    width = min(batch_size, count)
    return [np.arange(start, start + width, dtype=np.int32) for start in range(0, count, width)]


def drawer(operator: LinearOperator, key: jax.Array, distribution: Distribution) -> Callable[[Numbers], Vector]:
    """From numbers to the probes of these numbers."""
    return lambda numbers: _drawn(operator, key, numbers, distribution)


def check_count(name: str, value: int, least: int, why: str) -> None:
    """Raises InputError for what is no whole number, or less than `least`."""
    if not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} is {value}; it must be a whole number, at least {least}: {why}.")


def check_operator(operator: LinearOperator, batch_size: int) -> None:
    """Raises InputError for a batch size below 1 and for an operator whose products would be meaningless."""
    check_count("batch_size", batch_size, 1, "products are computed so many at once")
    validated(operator)


@jax.jit
def products_with(operator: LinearOperator, block: Vector) -> Vector:
    """A times every vector of a block [b, ...]."""
    return pinned(operator, jax.vmap(operator.mv)(block))


@functools.partial(jax.jit, static_argnums=3)
def _drawn(operator: LinearOperator, key: jax.Array, numbers: jax.Array, distribution: Distribution) -> Vector:
    """The probes of these numbers, [b, ...]."""

    def probe(number: jax.Array) -> Vector:
        return widen(random_probe(jax.random.fold_in(key, number), operator.shape_dtype, distribution))

    return pinned(operator, jax.vmap(probe)(numbers))


@jax.jit
def quadratic_forms(operator: LinearOperator, vectors: Vector, products: Vector) -> jax.Array:
    """[b, 2]: v'Av and v'v of every vector."""
    both = [jax.vmap(dot)(vectors, products), jax.vmap(dot)(vectors, vectors)]
    return everywhere(operator, jnp.stack(both, axis=1))


@jax.jit
def forms_and_lengths(operator: LinearOperator, vectors: Vector, products: Vector) -> jax.Array:
    """[b, 2]: v'Av and |Av| of every vector."""
    return everywhere(operator, jnp.stack([jax.vmap(dot)(vectors, products), jax.vmap(norm)(products)], axis=1))


@functools.partial(jax.jit, static_argnums=1)
def zeros(operator: LinearOperator, count: int) -> Vector:
    """A block of so many zero vectors."""
    return pinned(operator, jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), wide_shape_dtype(operator)))


def row(block: Vector, number: Any) -> Vector:
    """The vector, or vectors, of a block with this number."""
    return jax.tree.map(lambda b: b[number], block)


def pinned(operator: LinearOperator, v: Vector) -> Vector:
    """A vector, or a block [b, ...] with every vector of it, sharded like the operator's."""

    def leaf(x: Any, e: jax.Array) -> jax.Array:
        sharding = named_sharding(x)
        if sharding is None or sharding.mesh.size == 1:
            return e
        spec = PartitionSpec(*[None] * (e.ndim - len(x.shape)), *sharding.spec)
        return jax.lax.with_sharding_constraint(e, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(leaf, operator.shape_dtype, v)


def everywhere(operator: LinearOperator, values: jax.Array) -> jax.Array:
    """Small values whole on every device, where every process can read them."""
    shardings = [s for s in map(named_sharding, jax.tree.leaves(operator.shape_dtype)) if s is not None]
    if not shardings or shardings[0].mesh.size == 1:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(shardings[0].mesh, PartitionSpec()))


def wide_shape_dtype(operator: LinearOperator) -> Vector:
    """The operator's `shape_dtype`, in at least float32."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=named_sharding(x))

    return jax.tree.map(leaf, operator.shape_dtype)
