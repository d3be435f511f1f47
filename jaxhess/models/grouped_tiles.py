"""How grouped matrix products cut their work.

A group's rows are cut into tiles of M, the last of which is not full. Where tiles begin depends on the sizes of the
groups, which only the device knows; how many there can be does not:

    sum of ceil(s / M) over E groups  <=  (R + E (M - 1)) / M   tiles, for R rows.

Programs are made for so many, and those without a tile do nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cut(NamedTuple):
    """How a kernel cuts its work: rows and columns of the block that a program computes, how much of the summed axis
    it takes at a time, its warps, and how many such steps are loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def product_cut(rows: int, groups: int, depth: int, columns: int, dtype: Any) -> Cut:
    """Of products of rows with kernels [depth, columns]."""
    if jnp.dtype(dtype).itemsize > 2:
        return Cut(tile_rows(rows, groups, 16, 64), _at_most(64, columns), _at_most(32, depth), 4, 2)
    size = tile_rows(rows, groups, 16, 128)
    return Cut(size, _at_most(128, columns), _at_most(64, depth), 8 if size == 128 else 4, 3)


def outer_cut(width: int, columns: int, dtype: Any) -> Cut:
    """Of sums over the rows of a group, [width, columns]."""
    if jnp.dtype(dtype).itemsize > 2:
        return Cut(_at_most(64, width), _at_most(64, columns), 16, 4, 2)
    return Cut(_at_most(128, width), _at_most(128, columns), 32, 8, 3)


def _at_most(most: int, size: int) -> int:
    """A power of two from 16, the least that Triton multiplies, to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


class Tile(NamedTuple):
    """Of each tile, int32 [T], or of one: its group, its first row, and the row after the group's last."""

    group: jax.Array
    first: jax.Array
    end: jax.Array


def most_tiles(rows: int, groups: int, size: int) -> int:
    """Tiles of `size` rows that `groups` of `rows` in all have at most."""
    return (rows + groups * (size - 1)) // size


def tile_rows(rows: int, groups: int, smallest: int, largest: int) -> int:
    """Rows of a tile: a quarter of a mean group's, so that groups that are cut anywhere add an eighth to the work."""
    quarter = max(1, rows // (4 * groups))
    return min(max(smallest, 1 << (quarter.bit_length() - 1)), largest)


def tiles_of(sizes: jax.Array, rows: int, size: int) -> tuple[jax.Array, Tile]:
    """(How many tiles there are, the tiles). Tiles that there are not are of the last group and have no row."""
    groups = len(sizes)
    counts = (sizes + (size - 1)) // size
    # Sums of few small numbers: all at once they are one kernel on a GPU, where `cumsum` is several.
    before = jnp.tri(groups, dtype=bool)
    ends, after = (jnp.sum(jnp.where(before, x, 0), axis=1, dtype=jnp.int32) for x in (sizes, counts))
    number = jnp.arange(most_tiles(rows, groups, size), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= after, axis=1, dtype=jnp.int32), groups - 1)
    first = (ends - sizes)[group] + (number - (after - counts)[group]) * size
    return after[-1], Tile(*(x.astype(jnp.int32) for x in (group, first, ends[group])))
