"""The finite-difference step that balances rounding against truncation, measured for the vector at hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.operators.loss import LossOperator
from jaxhess.vectors import Vector, norm, size

TRIAL = 0.01
"""Shift of the trial gradients relative to the leaf that it changes the most.

It must be long enough for the third difference to rise above rounding and short against the distance over which the
gradient's third derivative changes. In float32 these are decades apart: on trained and untrained decoders, for random,
Lanczos and single-coordinate vectors, trials from a quarter of this to four times as long gave the same step within 2.
"""

# Trial gradients: shift along v in units of the trial, along theta in rounding units, weight, whether to go on summing.
_ROUNDING = ((0, 1, 0.5, 0), (0, -1, -0.5, 1))
_THIRD = ((3, 0, 1, 0), (1, 0, -3, 1), (-1, 0, 3, 1), (-3, 0, -1, 1))
_THIRD_NOISE = math.sqrt(2 * (1 + 9 + 9 + 1))
"""Rounding of the third difference over that of a central one: independent errors, weights 1, 3, 3, 1 against 1/2."""


def balanced_length(operator: LossOperator, v: Vector, dtypes: Any) -> jax.Array:
    """The length e of the shift along v at which a central difference of gradients errs least: a scalar.

    A central difference at e errs by a / e + e^2 / 6 |g'''|, with a the rounding of half a difference of two gradients
    and g''' the third derivative of the gradient along v / |v|, so that e = (3 a / |g'''|)^(1/3) (the balance of
    Theorem 3.1 of arXiv 2602.00816, its D^3 f read as a derivative of the gradient: truncation of a central difference
    knows nothing of the second). Both are measured on the first microbatch by six gradients: a by moving every
    parameter one rounding unit up and down, g''' by a third difference at a trial shift. The cube root forgives: a step
    off by 2.5 either way costs a factor of 3 in error.

    Measured in float32 or wider, where the trial has room, then scaled: a is proportional to the rounding unit.

    Args:
        operator: With its parameters and loss in float32 or wider.
        v: Where it is zero the length is that of the trial, a positive number.
        dtypes: A tree of arrays in the dtypes that the parameters are shifted and gradients computed in.
    """
    theta = operator.free
    length = norm(v)
    inverse = jnp.where(length > 0, 1 / length, 0)
    trial = TRIAL / jnp.where(length > 0, inverse * _strain(theta, v), 1)
    unit = _unit(theta)
    batch = jax.tree.map(lambda x: x[0], operator.groups[0].stacked)

    def add(total: Vector, row: jax.Array) -> tuple[Vector, jax.Array]:
        along_v, along_theta, weight, going_on = row

        def moved(x: jax.Array, d: jax.Array) -> jax.Array:
            x_wide, d_wide = (e.astype(jnp.promote_types(row.dtype, e.dtype)) for e in (x, d))
            return (x_wide * (1 + along_theta * unit) + (along_v * trial * inverse) * d_wide).astype(x.dtype)

        gradient, _ = jax.grad(operator.sum_and_count, has_aux=True)(operator.pin(jax.tree.map(moved, theta, v)), batch)
        total = jax.tree.map(lambda t, g: (going_on * t + weight * g).astype(t.dtype), total, operator.pin(gradient))
        return total, norm(total)

    zeros = operator.pin(jax.tree.map(jnp.zeros_like, theta))
    _, norms = jax.lax.scan(add, zeros, jnp.array(_ROUNDING + _THIRD, length.dtype))
    rounding, third = norms[len(_ROUNDING) - 1], norms[-1]
    third = jnp.maximum(third, _THIRD_NOISE * rounding)  # below its own rounding it says only that e is no smaller
    e = 2 * trial * jnp.cbrt(3 * (_unit(dtypes) / unit) * rounding / third)
    return jnp.where(jnp.isfinite(e) & (e > 0), e, trial)


def _strain(theta: Any, v: Vector) -> jax.Array:
    """The largest over leaves of |v| / |theta|, a leaf of zeros counting as one of typical parameters."""
    typical = norm(theta) / math.sqrt(size(theta))
    typical = jnp.where(typical > 0, typical, 1)
    pairs = zip(jax.tree.leaves(theta), jax.tree.leaves(v), strict=True)
    strains = [norm(d) / jnp.maximum(norm(x), typical * math.sqrt(x.size)) for x, d in pairs if x.size]
    return functools.reduce(jnp.maximum, strains)


def _unit(tree: Any) -> float:
    """The rounding unit of the narrowest dtype in a tree."""
    return max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(tree))
