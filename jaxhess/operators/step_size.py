"""The finite-difference step that balances rounding against truncation, measured for the vector at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.operators.loss import LossOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.vectors import Vector, norm, size

TRIAL = 0.01
"""Shift of the first trial gradients relative to the leaf that it changes the most.

A trial must be long enough for the third difference to rise above rounding and short against the distance over which
the third derivative changes. In float32 one to two decades lie between, but not the same ones for every vector: the
second trial is placed by what the first has found, wherever it was.
"""
REACH = 2.0
"""Length of the second trial over that of the balanced step in float32: rounding is then 3% of the third difference."""

SHARE = 1 / 3
"""The rounding of a difference along v over that between parameters all moved by one unit, which share the least.

Measured on trained and untrained decoders, over random, Lanczos and single-coordinate vectors: 0.45 to 1 in float32 and
0.1 to 0.9 in bfloat16, the least where one coordinate alone is shifted. Its cube root is what enters.
"""

# Trial gradients: shift along v in trial lengths, shift along the parameters in rounding units, weight in the sum,
# whether it goes on from the row before, whether it ends here as a rounding (1) or as a third difference (2).
_ROUNDING = ((0, 1, SHARE / 2, 0, 0), (0, -1, -SHARE / 2, 1, 1))
_THIRD = ((3, 0, 1, 0, 0), (1, 0, -3, 1, 0), (-1, 0, 3, 1, 0), (-3, 0, -1, 1, 2))
_THIRD_NOISE = math.sqrt(2 * (1 + 9 + 9 + 1))
"""Rounding of the third difference over that of a central one: independent errors, weights 1, 3, 3, 1 against 1/2."""


def balanced_length(operator: LossOperator, v: Vector, dtypes: Iterable[str]) -> jax.Array:
    """The length e of the shift along v at which a central difference of gradients errs least: a scalar.

    A central difference at e errs by a / e + e^2 / 6 |D|, with a the rounding of half a difference of two gradients and
    D the third derivative of the gradient along v / |v|, so that e = (3 a / |D|)^(1/3) (the balance of Theorem 3.1 of
    arXiv 2602.00816, its D^3 f read as the gradient's: truncation of a central difference knows nothing of the second).
    Both are measured on the first microbatch by ten gradients: a by moving every parameter one rounding unit up and
    down, D by third differences at a trial shift and at a better one. Where the first microbatch does not respond to v
    (an embedding of a token that is not in it) all are measured, ten gradients of each; under `vmap`, where both sides
    of a condition are computed, always. The cube root forgives: a step off by 2.5 either way costs a factor of 3 in
    error.

    Differences, because three nested `jvp` of the gradient, which give D exactly, take 14 gradients and up to nine
    parameter-sized buffers.

    Measured in float32 or wider, where the trials have room, then scaled: a is proportional to the rounding unit.

    Args:
        operator: With its parameters and loss in float32 or wider.
        v: Where it is zero the length is a positive number.
        dtypes: In which the parameters are shifted and gradients computed.
    """
    groups = operator.groups
    first = Microbatches(jax.tree.map(lambda x: x[:1], groups[0].stacked))
    e, responds = _measured(operator, v, (first,))
    if sum(map(len, groups)) > 1:
        e = jax.lax.cond(responds, lambda: e, lambda: _measured(operator, v, groups)[0])
    return e * (_unit(dtypes) / _unit(operator.dtypes)) ** (1 / 3)


def add_gradient(
    operator: LossOperator, total: Vector, count: jax.Array, weight: jax.Array, at: Any, groups: tuple
) -> tuple[Vector, jax.Array]:
    """`total` plus weight times the gradient of the summed losses of `groups` at `at`, and `count` plus theirs."""

    def add(carry: Any, batch: Any) -> tuple[Any, None]:
        total, count = carry
        gradient, n = jax.grad(operator.sum_and_count, has_aux=True)(at, batch)
        gradient = operator.pin(gradient)
        return (
            jax.tree.map(lambda t, g: t + weight.astype(t.dtype) * g.astype(t.dtype), total, gradient),
            count + n,
        ), None

    for group in groups:
        if len(group) == 1:
            (total, count), _ = add((total, count), jax.tree.map(lambda x: x[0], group.stacked))
        else:
            (total, count), _ = jax.lax.scan(add, (total, count), group.stacked)
    return total, count


def _measured(operator: LossOperator, v: Vector, groups: tuple) -> tuple[jax.Array, jax.Array]:
    """The balanced length in the operator's own precision, and whether the gradients of `groups` respond to v."""
    theta = operator.free
    length = norm(v)
    inverse = jnp.where(length > 0, 1 / length, 0)
    unit = _unit(operator.dtypes)

    def add(carry: Any, row: jax.Array) -> tuple[Any, None]:
        total, trial, rounding, e, responds = carry
        along_v, along_theta, weight, going_on, end = row

        def moved(x: jax.Array, d: jax.Array) -> jax.Array:
            x_wide, d_wide = (y.astype(jnp.promote_types(row.dtype, y.dtype)) for y in (x, d))
            return (x_wide * (1 + along_theta * unit) + (along_v * trial * inverse) * d_wide).astype(x.dtype)

        kept = jax.tree.map(lambda t: going_on.astype(t.dtype) * t, total)
        shifted = operator.pin(jax.tree.map(moved, theta, v))
        total, _ = add_gradient(operator, kept, jnp.zeros((), count.dtype), weight, shifted, groups)
        found = norm(total).astype(length.dtype)
        rounding = jnp.where(end == 1, found, rounding)
        noise = _THIRD_NOISE * rounding / SHARE
        responds = jnp.where(end == 2, found > noise, responds)
        # A third difference below its rounding only says that e is no smaller.
        better = 2 * trial * jnp.cbrt(3 * rounding / jnp.maximum(found, SHARE * noise))
        e = jnp.where((end == 2) & jnp.isfinite(better) & (better > 0), better, e)
        return (total, jnp.where(end == 2, REACH * e, trial), rounding, e, responds), None

    one = jax.tree.map(lambda x: x[0], groups[0].stacked)
    _, count = jax.eval_shape(operator.sum_and_count, theta, one)
    zeros = operator.pin(jax.tree.map(jnp.zeros_like, theta))
    trial = (TRIAL / jnp.where(length > 0, inverse * _strain(theta, v), 1)).astype(length.dtype)
    start = (zeros, trial, jnp.zeros_like(length), trial, length < 0)
    (_, _, _, e, responds), _ = jax.lax.scan(add, start, jnp.array(_ROUNDING + 2 * _THIRD, length.dtype))
    return e, responds


def _strain(theta: Any, v: Vector) -> jax.Array:
    """The largest over leaves of |v| / |theta|, a leaf of zeros counting as one of typical parameters."""
    typical = norm(theta) / math.sqrt(size(theta))
    typical = jnp.where(typical > 0, typical, 1)
    pairs = zip(jax.tree.leaves(theta), jax.tree.leaves(v), strict=True)
    strains = [norm(d) / jnp.maximum(norm(x), typical * math.sqrt(x.size)) for x, d in pairs if x.size]
    return functools.reduce(jnp.maximum, strains)


def _unit(dtypes: Iterable[str]) -> float:
    """The rounding unit of the narrowest dtype."""
    return max(float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes)
