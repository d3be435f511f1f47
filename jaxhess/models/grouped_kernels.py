"""Grouped matrix products: kernels in Pallas for Triton on NVIDIA GPUs, the loops of `grouped_loops` elsewhere.

Shapes, for P vectors or without P: rows [R, P, D], other rows [R, P, F], kernels [P, E, D, F]. Products take operands
in the arrays' dtype and accumulate in at least float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxhess.models import grouped_loops
from jaxhess.models.grouped_loops import dot, wide
from jaxhess.models.grouped_tiles import Cut, most_tiles, outer_cut, product_cut, tiles_of


def product(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, *, transposed: bool, precision: Any) -> jax.Array:
    """Every row times the kernel of its group, or times its transpose; zeros for the rows of no group."""
    return jax.lax.platform_dependent(
        rows,
        kernels,
        sizes,
        cuda=functools.partial(product_kernel, transposed=transposed, precision=precision),
        default=functools.partial(grouped_loops.product, transposed=transposed),
    )


def outer(rows: jax.Array, others: jax.Array, sizes: jax.Array, *, precision: Any) -> jax.Array:
    """The sum over the rows of each group of their outer products with the other rows."""
    kernel = functools.partial(outer_kernel, precision=precision)
    return jax.lax.platform_dependent(rows, others, sizes, cuda=kernel, default=grouped_loops.outer)


def product_kernel(
    rows: jax.Array,
    kernels: jax.Array,
    sizes: jax.Array,
    *,
    transposed: bool,
    precision: str | None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> jax.Array:
    """A program for each tile of rows and block of columns. The rows of no group are one more, which has no kernel."""
    count, vectors = len(rows), kernels.shape[0] if kernels.ndim == 4 else 1
    groups, *shape = kernels.shape[-3:]
    depth, columns = reversed(shape) if transposed else shape
    cut = cut or product_cut(count, groups, depth, columns, rows.dtype)
    _, tiles = tiles_of(jnp.append(sizes, count - jnp.sum(sizes)).astype(jnp.int32), count, cut.rows)
    grid = (pl.cdiv(columns, cut.columns), len(tiles.group), vectors)
    whole = [pl.BlockSpec(tiles.group.shape, lambda i, n, v: (0,))] * 3
    padded = _padded(depth, cut.depth), grid[0] * cut.columns
    by_kernel = (groups, *(reversed(padded) if transposed else padded))
    kernel_spec = pl.BlockSpec(by_kernel, lambda i, n, v: (0, 0, 0))
    if kernels.ndim == 4:
        kernel_spec = pl.BlockSpec((None, *by_kernel), lambda i, n, v: (v, 0, 0, 0))

    def per_row(ndim: int, width: int) -> pl.BlockSpec:
        height = max(count, cut.rows)
        if ndim == 3:
            return pl.BlockSpec((height, None, width), lambda i, n, v: (0, v, 0))
        return pl.BlockSpec((height, width), lambda i, n, v: (0, 0))

    return _call(
        functools.partial(_product, cut=cut, shape=(groups, depth, columns), transposed=transposed),
        [rows, kernels, *tiles],
        grid=grid,
        in_specs=[per_row(rows.ndim, padded[0]), kernel_spec, *whole],
        out_specs=per_row(kernels.ndim - 1, padded[1]),
        out_shape=(count, *kernels.shape[:-3], columns),
        cut=cut,
        flops=2 * vectors * most_tiles(count, groups, cut.rows) * cut.rows * math.prod(padded),
        precision=precision,
        interpret=interpret,
    )


def outer_kernel(
    rows: jax.Array,
    others: jax.Array,
    sizes: jax.Array,
    *,
    precision: str | None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> jax.Array:
    """A program for each block of each group's sum, which goes through the rows of the group."""
    count, groups = len(rows), len(sizes)
    shape = rows.shape[-1], others.shape[-1]
    vectors = [x.shape[1] for x in (rows, others) if x.ndim == 3][:1]
    cut = cut or outer_cut(*shape, rows.dtype)
    grid = (pl.cdiv(shape[1], cut.columns), pl.cdiv(shape[0], cut.rows), math.prod(vectors) * groups)
    ends = jnp.cumsum(sizes).astype(jnp.int32)
    padded = grid[1] * cut.rows, grid[0] * cut.columns

    def per_row(x: jax.Array, width: int) -> pl.BlockSpec:
        height = max(count, cut.depth)
        if x.ndim == 3:
            return pl.BlockSpec((height, None, width), lambda i, j, z: (0, _div(z, groups), 0))
        return pl.BlockSpec((height, width), lambda i, j, z: (0, 0))

    whole = [pl.BlockSpec((groups,), lambda i, j, z: (0,))] * 2
    block = pl.BlockSpec((None, cut.rows, cut.columns), lambda i, j, z: (z, j, i))
    if vectors:
        block = pl.BlockSpec(
            (None, None, cut.rows, cut.columns), lambda i, j, z: (_div(z, groups), _rem(z, groups), j, i)
        )
    return _call(
        functools.partial(_outer, cut=cut, shape=(groups, *shape)),
        [rows, others, ends - sizes, ends],
        grid=grid,
        in_specs=[per_row(rows, padded[0]), per_row(others, padded[1]), *whole],
        out_specs=block,
        out_shape=(*vectors, groups, *shape),
        cut=cut,
        flops=2 * math.prod(vectors) * most_tiles(count, groups, cut.depth) * cut.depth * math.prod(padded),
        precision=precision,
        interpret=interpret,
    )


def _product(
    rows_ref: Any,
    kernels_ref: Any,
    group_ref: Any,
    first_ref: Any,
    end_ref: Any,
    out_ref: Any,
    *,
    cut: Cut,
    shape: tuple[int, int, int],
    transposed: bool,
) -> None:
    groups, depth, columns = shape
    number, column = pl.program_id(1), pl.program_id(0) * cut.columns
    group, first, end = group_ref[number], first_ref[number], end_ref[number]
    own, inside = _iota(first, cut.rows) < end, _iota(column, cut.columns) < columns

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        start = k * cut.depth
        summed = _iota(start, cut.depth) < depth
        rows = _load(rows_ref.at[pl.ds(first, cut.rows), pl.ds(start, cut.depth)], own, summed)
        at: Any = pl.ds(start, cut.depth), pl.ds(column, cut.columns)
        if transposed:
            kernel = _load(kernels_ref.at[group, at[1], at[0]], inside, summed)
        else:
            kernel = _load(kernels_ref.at[group, at[0], at[1]], summed, inside)
        return total + dot(rows, kernel, 1, 1 if transposed else 0)

    total = jnp.zeros((cut.rows, cut.columns), wide(rows_ref.dtype))
    steps = jnp.where(group < groups, np.int32(pl.cdiv(depth, cut.depth)), np.int32(0))
    total = jax.lax.fori_loop(np.int32(0), steps, step, total)
    _store(out_ref.at[pl.ds(first, cut.rows), pl.ds(column, cut.columns)], total, own, inside)


def _outer(
    rows_ref: Any, others_ref: Any, first_ref: Any, end_ref: Any, out_ref: Any, *, cut: Cut, shape: tuple[int, int, int]
) -> None:
    groups, width, columns = shape
    column, row = pl.program_id(0) * cut.columns, pl.program_id(1) * cut.rows
    group = _rem(pl.program_id(2), groups)
    first, end = first_ref[group], end_ref[group]
    across, inside = _iota(row, cut.rows) < width, _iota(column, cut.columns) < columns

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        start = first + k * cut.depth
        own = _iota(start, cut.depth) < end
        rows = _load(rows_ref.at[pl.ds(start, cut.depth), pl.ds(row, cut.rows)], own, across)
        others = _load(others_ref.at[pl.ds(start, cut.depth), pl.ds(column, cut.columns)], own, inside)
        return total + dot(rows, others, 0, 0)

    total = jnp.zeros((cut.rows, cut.columns), wide(rows_ref.dtype))
    total = jax.lax.fori_loop(np.int32(0), _div(end - first + (cut.depth - 1), cut.depth), step, total)
    _store(out_ref.at[:, :], total, across, inside)


def _call(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: pl.BlockSpec,
    out_shape: tuple[int, ...],
    cut: Cut,
    flops: int,
    precision: str | None,
    interpret: bool,
) -> jax.Array:
    """`flops` is declared for `jaxhess.plan`, which takes the first two arrays to be those that are multiplied: of all
    tiles that there may be, the last of each group whole."""
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=jax.ShapeDtypeStruct(out_shape, arrays[0].dtype),
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
        metadata={"flops": str(flops), "programs": str(math.prod(grid))},
        name=f"grouped{kernel.func.__name__}",  # type: ignore[attr-defined]
    )
    # Of products of float32 from bfloat16 parts Triton has none: those of float32 itself are at least as precise.
    parts = (precision or "").startswith("BF16")
    with jax.default_matmul_precision("highest" if interpret or parts else precision):
        return call(*arrays)


def _load(ref: Any, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Zeros outside of these rows and columns, whatever is there."""
    return triton.load(ref, mask=rows[:, None] & columns[None, :], other=0.0)


def _store(ref: Any, x: jax.Array, rows: jax.Array, columns: jax.Array) -> None:
    triton.store(ref, x.astype(ref.dtype), mask=rows[:, None] & columns[None, :])


def _iota(start: Any, size: int) -> jax.Array:
    return start + jnp.arange(size, dtype=jnp.int32)


def _div(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.div(a, np.int32(b))


def _rem(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.rem(a, np.int32(b))


def _padded(size: int, step: int) -> int:
    return pl.cdiv(size, step) * step
