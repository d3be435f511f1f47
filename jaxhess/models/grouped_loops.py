"""Grouped matrix products on a CPU: a loop over the tiles, with one matrix product for each."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.models.grouped_tiles import Tile, tile_rows, tiles_of
from jaxhess.models.vocabulary import narrow_precision

SMALLEST, LARGEST = 32, 256
"""Rows of a tile: with fewer a kernel is read too often, with more nothing is gained."""


def product(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """Tile by tile; the kernel of a group is copied out once, for all its tiles."""
    if kernels.ndim == 4:
        if rows.ndim == 2:
            many = jax.lax.map(lambda k: product(rows, k, sizes, transposed=transposed), kernels)
        else:
            pairs = jnp.moveaxis(rows, 1, 0), kernels
            many = jax.lax.map(lambda x: product(x[0], x[1], sizes, transposed=transposed), pairs)
        return jnp.moveaxis(many, 0, 1)
    size = min(tile_rows(len(rows), len(sizes), SMALLEST, LARGEST), len(rows))
    count, tiles = tiles_of(sizes, len(rows), size)

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, kernel = carry
        tile = Tile(*(x[number] for x in tiles))
        new = (number == 0) | (tile.group != tiles.group[jnp.maximum(number - 1, 0)])
        kernel = jax.lax.cond(new, lambda _: kernels[tile.group], lambda kept: kept, kernel)
        start, own = _rows_of(tile, len(rows), size)
        found = dot(_slice(rows, start, size), kernel, 1, 1 if transposed else 0).astype(out.dtype)
        found = jnp.where(own, found, _slice(out, start, size))
        return jax.lax.dynamic_update_slice_in_dim(out, found, start, 0), kernel

    out = jnp.zeros((len(rows), kernels.shape[1 if transposed else 2]), rows.dtype)
    return _existing(count, len(tiles.group), step, (out, jnp.zeros_like(kernels[0])))[0]


def outer(rows: jax.Array, others: jax.Array, sizes: jax.Array) -> jax.Array:
    """Tile by tile; the sum of a group is written once, after its last tile."""
    if rows.ndim == 3 or others.ndim == 3:
        pair = [jnp.moveaxis(x, 1, 0) if x.ndim == 3 else None for x in (rows, others)]

        def one(x: list[jax.Array | None]) -> jax.Array:
            return outer(rows if x[0] is None else x[0], others if x[1] is None else x[1], sizes)

        return jax.lax.map(one, pair)
    # Every tile adds to a block as large as a kernel: they are twice as high as for products.
    size = min(tile_rows(2 * len(rows), len(sizes), SMALLEST, LARGEST), len(rows))
    count, tiles = tiles_of(sizes, len(rows), size)

    def step(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, total = carry
        tile = Tile(*(x[number] for x in tiles))
        new = (number == 0) | (tile.group != tiles.group[jnp.maximum(number - 1, 0)])
        start, own = _rows_of(tile, len(rows), size)
        x, y = (jnp.where(own, _slice(array, start, size), 0) for array in (rows, others))
        found = dot(x, y, 0, 0)
        total = jnp.where(new, found, total + found)

        def write(out: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(out, total.astype(out.dtype)[None], tile.group, 0)

        return jax.lax.cond(tile.first + size >= tile.end, write, lambda out: out, out), total

    shape = rows.shape[1], others.shape[1]
    carry = jnp.zeros((len(sizes), *shape), rows.dtype), jnp.zeros(shape, wide(rows.dtype))
    return _existing(count, len(tiles.group), step, carry)[0]


def _existing(count: jax.Array, most: int, step: Any, carry: Any) -> Any:
    """`step` for every tile there is. The number of rounds is a constant, so that `jaxhess.plan` can read it."""

    def guarded(number: jax.Array, carry: Any) -> Any:
        return jax.lax.cond(number < count, step, lambda _, kept: kept, number, carry)

    return jax.lax.fori_loop(np.int32(0), np.int32(most), guarded, carry)


def _rows_of(tile: Tile, rows: int, size: int) -> tuple[jax.Array, jax.Array]:
    """First row of a slice of `size` that lies inside the array, and which of its rows the tile has, [size, 1]."""
    start = jnp.minimum(tile.first, rows - size)
    row = start + jnp.arange(size, dtype=jnp.int32)
    return start, ((row >= tile.first) & (row < tile.end))[:, None]


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """The sum over these axes, accumulated in at least float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((of_a,), (of_b,)), ((), ())),
        precision=narrow_precision(a.dtype),
        preferred_element_type=wide(a.dtype),
    )


def wide(dtype: Any) -> Any:
    """What sums of this dtype are accumulated in."""
    return jnp.promote_types(dtype, jnp.float32)
