"""The stored Lanczos basis: vectors stacked along a leading axis, on the devices or in pinned memory of the host.

On the devices a pass over a full basis is one batched product. From the host rows come one at a time, so that the
devices hold one of them, or three while orthogonality is measured. Rows of a window come one at a time too. The host's
basis has one more row than asked for, where the vector after the last step is written and never read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.krylov import inner
from jaxhess.operators.blocks import Blocks
from jaxhess.vectors import Vector, basis_sum, dot, norm

HOST = "pinned_host"
TOGETHER = 2
"""Rows of the host's basis that are on the devices at once when all are compared: with a third no more than a step
holds, whose product and sum are two vectors beside a row."""


def on_memory(sharding: Any, on_host: bool) -> Any:
    """The sharding in pinned memory of the host, or as it is."""
    return sharding.with_memory_kind(HOST) if on_host else sharding


def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of zeros; one of the host's never on a device, not even while it is made."""
    if like.sharding.memory_kind != HOST:
        return jnp.zeros(like.shape, like.dtype, device=like.sharding)
    if not isinstance(like.sharding, NamedSharding):  # the other way JAX 0.10 and 0.11 forget that it is the host's
        return jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)

    def shard(index: Any) -> np.ndarray:
        return np.zeros([len(range(*i.indices(n))) for i, n in zip(index, like.shape, strict=True)], like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def write_row(basis: Vector, row: jax.Array, vector: Vector) -> Vector:
    """The basis with the vector in this row, rounded to its dtype."""

    def leaf(b: jax.Array, x: jax.Array) -> jax.Array:
        x = x.astype(b.dtype)
        if not _on_host(b):
            return jax.lax.dynamic_update_index_in_dim(b, x, row, 0)
        return jax.lax.dynamic_update_slice_in_dim(b, jax.device_put(x[None], jax.memory.Space.Host), row, 0)

    return jax.tree.map(leaf, basis, vector)


def project_out(basis: Vector, w: Vector, count: jax.Array, blocks: Blocks | None = None) -> tuple[Vector, jax.Array]:
    """w without its components along the basis, and how long those were: one pass of Gram-Schmidt.

    On the devices the pass is classical, one batched product; from the host it is `project_out_in_turn`.

    Args:
        basis: Orthonormal but for rounding; rows that are not yet written are zero.
        w: In at least float32.
        count: How many rows can have been written: from the host no more are fetched.
        blocks: Whose parts of the vectors are each projected by themselves; None: whole vectors.
    """
    if any(map(_on_host, jax.tree.leaves(basis))):
        return project_out_in_turn(basis, w, count, blocks)
    overlaps = inner.basis_dot(blocks, basis, w)
    length = norm if blocks is None else jax.vmap(norm, in_axes=1)
    return inner.add_basis_sum(blocks, w, -overlaps, basis), length(overlaps)  # whose squares do not overflow


def project_out_in_turn(
    basis: Vector, w: Vector, count: jax.Array, blocks: Blocks | None = None
) -> tuple[Vector, jax.Array]:
    """w without its components along the rows, and the sum of their lengths: one pass of modified Gram-Schmidt.

    Rows are a ring: of `count` vectors so far the last ones, which are taken from the oldest to the newest.
    """
    on_host = any(map(_on_host, jax.tree.leaves(basis)))
    rows = jax.tree.leaves(basis)[0].shape[0] - on_host
    trips = jnp.minimum(count, rows) if on_host else rows  # rows not yet written are zero

    def take_away(k: jax.Array, carry: tuple[Vector, jax.Array]) -> tuple[Vector, jax.Array]:
        left, removed = carry
        row = _fetch(basis, (count - trips + k) % rows)
        overlap = inner.dot(blocks, row, left)
        return inner.add_scaled(blocks, left, -overlap, row), removed + jnp.abs(overlap)

    shape = () if blocks is None else (len(blocks),)
    start = jnp.zeros(shape, jnp.result_type(*[x.dtype for x in jax.tree.leaves(w)]))
    return jax.lax.fori_loop(0, trips, take_away, (w, start))


def combine(basis: Vector, coefficients: jax.Array) -> Vector:
    """Linear combinations [k, ...] of the rows, with coefficients [k, rows]; in at least float32."""
    if not any(map(_on_host, jax.tree.leaves(basis))):
        return jax.vmap(lambda c: basis_sum(c, basis))(coefficients)

    def add(k: jax.Array, sums: Vector) -> Vector:
        row = _fetch(basis, k)
        return jax.tree.map(
            lambda s, x: s + coefficients[:, k].reshape(-1, *[1] * x.ndim).astype(s.dtype) * x.astype(s.dtype),
            sums,
            row,
        )

    start = jax.tree.map(
        lambda b: jnp.zeros((len(coefficients), *b.shape[1:]), jnp.promote_types(b.dtype, "float32")), basis
    )
    return jax.lax.fori_loop(0, coefficients.shape[1], add, start)


def gram(basis: Vector, blocks: Blocks | None = None) -> jax.Array:
    """Inner products [rows, rows] (of blocks [rows, rows, B]) of all rows with each other.

    From the host `TOGETHER` rows come at a time, and every row below them once: about rows^2 / 4 are read.
    """
    if not any(map(_on_host, jax.tree.leaves(basis))):
        count = jax.tree.leaves(basis)[0].shape[0]
        return jax.lax.map(lambda i: inner.basis_dot(blocks, basis, _fetch(basis, i)), jnp.arange(count))
    rows = jax.tree.leaves(basis)[0].shape[0] - 1
    width = min(TOGETHER, rows)

    def columns(k: jax.Array, products: jax.Array) -> jax.Array:
        start = jnp.minimum(k * width, rows - width)
        block = [_fetch(basis, start + i) for i in range(width)]

        def below(row: jax.Array, products: jax.Array) -> jax.Array:
            other = _fetch(basis, row)
            overlaps = jnp.stack([dot(q, other) for q in block]).astype(products.dtype)
            return jax.lax.dynamic_update_slice(products, overlaps[None], (row, start))

        return jax.lax.fori_loop(start, rows, below, products)

    dtype = jnp.promote_types("float32", jnp.result_type(*[x.dtype for x in jax.tree.leaves(basis)]))
    lower = jax.lax.fori_loop(0, -(-rows // width), columns, jnp.zeros((rows, rows), dtype))
    return jnp.tril(lower) + jnp.tril(lower, -1).T


def moved(old: Vector, new: Vector, rows: int) -> Vector:
    """`new`, a larger basis of the same dtypes in the same memory, with the first `rows` of `old`; one on a device at a
    time."""
    return jax.lax.fori_loop(0, rows, lambda k, basis: write_row(basis, k, _fetch(old, k)), new)


def narrower(basis: Vector | None, vector: Vector) -> bool:
    """Whether the basis is stored in a narrower dtype than the vectors."""
    if basis is None:
        return False
    pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(vector), strict=True)
    return any(jnp.finfo(b.dtype).bits < jnp.finfo(x.dtype).bits for b, x in pairs)


def stacked_sharding(sharding: Any, axes: int = 1) -> Any:
    """The sharding of arrays stacked along so many new leading axes, which are not cut."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * axes, *sharding.spec))


def unstacked_sharding(sharding: Any) -> Any:
    """The sharding of one of the arrays that are stacked along the leading axis."""
    return (
        NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else None
    )


def _fetch(basis: Vector, row: jax.Array) -> Vector:
    """One row, on the device."""

    def leaf(b: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(b, row, 1, 0)
        return (jax.device_put(x, jax.memory.Space.Device) if _on_host(b) else x)[0]

    return jax.tree.map(leaf, basis)


def _on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
