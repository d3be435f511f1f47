"""The finite-difference step that balances rounding against truncation, measured for the vector at hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess.operators.loss import LossOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.operators.precision import product_dtypes
from jaxhess.vectors import Vector, norm, size

TRIAL = 0.01
"""Shift of the first trial relative to the leaf that it changes the most.

A trial must be long enough for the third difference to rise above rounding and short against the distance over which
the third derivative changes. In float32 one to two decades lie between, but not the same ones for every vector.
"""
CONCENTRATION = 16.0
"""A trial changes no entry by more than this times TRIAL times the leaf's typical entry; for normal v it never does."""

FAINT = 1e-3
"""A leaf's scale is at least this times the typical one, the geometric mean over all entries that may move.

The entries of some leaves are nothing but rounding, such as biases of keys, which softmax ignores. They say nothing
about how far parameters may be moved. A smaller leaf that does (before a norm) costs the search a few shorter trials.
"""

FINEST = 1e-4
"""How far rounding is measured: this part of TRIAL for every leaf, in float32 16 of its rounding units.

All parameters that v moves then take different values, and the true third difference is 1e-12 of the trial's.
"""
REACH = 2.0
"""Length of a trial over that of the balanced step as known before: rounding is then 3% of the third difference."""

CLEAR, STEEP = 8.0, 500.0
"""Third differences between these multiples of their rounding are believed: trials from 1.3 to 5 balanced steps.

Below, rounding is more than an eighth of it; above, the third derivative may have changed on the way.
"""
CLIMB = 10.0
"""Factor from the first trial, if it is lost in rounding, to the next; then its square and its cube.

For as long as no trial that was too long is known.
"""

TRIALS = 8
"""Third differences at most after the one for the rounding."""

# A third difference: shift along v in trial lengths, weight in the sum. The first two make a central difference.
_ROWS = ((3, 1), (-3, -1), (1, -3), (-1, 3))
_CENTRAL, _THIRD = 1, 3  # the rows after which they are complete
_NOISE = math.sqrt(2 * (1 + 9 + 9 + 1))
"""Rounding of the third difference over that of a central one: independent errors, weights 1, 3, 3, 1 against 1/2."""


def balanced_length(operator: LossOperator, v: Vector, dtypes: Iterable[str]) -> jax.Array:
    """The length e of the shift along v at which a central difference of gradients errs least: a scalar.

    A central difference at e errs by a / e + e^2 / 6 |D|, with a the rounding of half a difference of two gradients and
    D the third derivative of the gradient along u = v / |v|, so that e = (3 a / |D|)^(1/3) (the balance of Theorem 3.1
    of arXiv 2602.00816, its D^3 f read as the gradient's: truncation of a central difference knows nothing of the
    second). Both are read off third differences of the gradient g along u on the first microbatch,

        g(3 t) - 3 g(t) + 3 g(-t) - g(-3 t) = 8 t^3 D + rounding:

    at a t of a few rounding units of every leaf only rounding is left, which gives a whatever the parameters are
    (moving each entry by its own rounding unit would leave those that are zero where they are, and show nothing); at a
    longer t, the same for all leaves, the rest is D.
    Where a trial is lost in rounding the next is longer, and where it is far above, shorter, by the cube root. With the
    one for the rounding two to four third differences do as a rule, and nine at most, of four gradients each. A
    gradient with jumps (ReLU) has no such t: from one side of the first jump to the other the third difference leaps
    from rounding to far above. Then e is the longest trial that met no jump. Where the first microbatch does not
    respond to v (an embedding of a token that is not in it) all are measured; under `vmap`, where both sides of a
    condition are computed, always. The cube root forgives: a step off by 2.5 either way costs a factor of 3 in error.

    All parameters move by the same e along v: with a length for every leaf the difference would be the product with
    another vector. Where a leaf needs a step that is below another's rounding, no e is right for both.

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
    return e * (rounding_unit(dtypes) / rounding_unit(product_dtypes(operator))) ** (1 / 3)


def add_gradient(
    operator: LossOperator, total: Vector, count: jax.Array, weight: jax.Array, at: Any, groups: tuple
) -> tuple[Vector, jax.Array]:
    """`total` plus weight times the gradient of the summed losses of `groups` at `at`, and `count` plus theirs."""

    def add(carry: Any, batch: Any) -> tuple[Any, None]:
        total, count = carry
        gradient, n = operator.gradient_sum(at, batch)
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


class _Search(NamedTuple):
    """Where the search for the balanced step is."""

    trials: jax.Array  # made
    trial: jax.Array  # the next one's length
    noise: jax.Array  # of a third difference
    below: jax.Array  # the longest trial that was lost in rounding
    above: jax.Array  # the shortest that was too long
    e: jax.Array
    responds: jax.Array
    done: jax.Array


def _measured(operator: LossOperator, v: Vector, groups: tuple) -> tuple[jax.Array, jax.Array]:
    """The balanced length in the operator's own precision, and whether the gradients of `groups` respond to v."""
    length = norm(v)
    inverse = jnp.where(length > 0, 1 / length, 0)
    most, strains = _strain(operator, v)
    first = TRIAL / jnp.where(length > 0, inverse * most, 1).astype(length.dtype)
    # For the rounding every leaf has its own shift; one that v hardly touches at most that of the first trial.
    factors = [jnp.where(x > 0, most / jnp.where(x > 0, x, 1), 1) for x in strains]
    factors = [jnp.minimum(x, 1 / FINEST).astype(length.dtype) for x in factors]
    shortest = functools.reduce(jnp.minimum, factors)

    def measure(at: _Search) -> _Search:
        finest = at.trials == 0
        shifts = [at.trial * inverse * jnp.where(finest, x, 1) for x in factors]
        gradient, central, third = _third_difference(operator, v, shifts, groups)
        noise = jnp.where(finest, jnp.maximum(third, rounding_unit(product_dtypes(operator)) * gradient), at.noise)
        lost, steep = third <= CLEAR * noise, ~(third <= STEEP * noise)  # steep: NaN and infinity too
        moved = at.trial * jnp.where(finest, shortest, 1)  # by all leaves
        below = jnp.where(lost, jnp.maximum(at.below, moved), at.below)
        above = jnp.where(steep, jnp.minimum(at.above, at.trial), at.above)
        balanced = at.trial * jnp.cbrt(24 / _NOISE * noise / third)
        middle = jnp.sqrt(below) * jnp.sqrt(above)
        shorter = jnp.where(jnp.isfinite(third), jnp.maximum(REACH * balanced, middle), middle)
        longer = jnp.where(jnp.isfinite(above), middle, CLIMB ** at.trials.astype(length.dtype) * at.trial)
        trial = jnp.where(finest, first, jnp.where(lost, longer, shorter))
        e = jnp.where(lost | steep, below, balanced)
        responds = central > CLEAR * noise
        unmoved = ~responds & (at.trials > 2)
        done = ~finest & (~(lost | steep) | unmoved | (above < 2 * REACH * below))
        return _Search(at.trials + 1, trial, noise, below, above, e, responds, done)

    def goes_on(at: _Search) -> jax.Array:
        return ~at.done & (at.trials <= TRIALS)

    zero = jnp.zeros_like(length)
    start = _Search(jnp.int32(0), FINEST * first, zero, zero, zero + jnp.inf, first, length < 0, length <= 0)
    found = jax.lax.while_loop(goes_on, measure, start)
    return jnp.where(found.responds, found.e, first), found.responds


def _third_difference(
    operator: LossOperator, v: Vector, shifts: list[jax.Array], groups: tuple
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Norms of g at 3 t v, of g(3 t v) - g(-3 t v) and of the third difference, g the gradient of summed losses.

    t is a number for every leaf, `shifts` in their order.
    """
    theta, dtype = operator.free, shifts[0].dtype
    shift = jax.tree.unflatten(jax.tree.structure(theta), shifts)

    def add(total: Vector, row: jax.Array) -> tuple[Vector, jax.Array]:
        along, weight = row

        def moved(x: jax.Array, d: jax.Array, t: jax.Array) -> jax.Array:
            x_wide, d_wide = (y.astype(jnp.promote_types(row.dtype, y.dtype)) for y in (x, d))
            return (x_wide + (along * t) * d_wide).astype(x.dtype)

        shifted = operator.pin(jax.tree.map(moved, theta, v, shift))
        total, _ = add_gradient(operator, total, jnp.zeros((), count.dtype), weight, shifted, groups)
        return total, norm(total).astype(dtype)

    one = jax.tree.map(lambda x: x[0], groups[0].stacked)
    _, count = jax.eval_shape(operator.sum_and_count, theta, one)
    zeros = operator.pin(jax.tree.map(jnp.zeros_like, theta))
    _, norms = jax.lax.scan(add, zeros, jnp.array(_ROWS, dtype))
    return norms[0], norms[_CENTRAL], norms[_THIRD]


def _strain(operator: LossOperator, v: Vector) -> tuple[jax.Array, list[jax.Array]]:
    """How much v changes each leaf relative to it; before these the largest, for which scales are at least `FAINT`.

    A leaf of zeros has no scale and is left out; if v moves no other, all parameters tell what is typical, or 1 does.
    """
    leaves, along = jax.tree.leaves(operator.free), jax.tree.leaves(v)
    scales = [norm(x) / math.sqrt(x.size) for x in leaves]
    # A geometric mean: a single constant of 1e9 among the parameters says nothing about the others.
    entries = [jnp.where(s > 0, x.size, 0.0) for x, s in zip(leaves, scales, strict=True)]
    logarithms = [n * jnp.log(jnp.where(s > 0, s, 1)) for n, s in zip(entries, scales, strict=True)]
    typical = jnp.exp(sum(logarithms) / jnp.maximum(sum(entries), 1))

    def changed(d: jax.Array, s: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(d)).astype(s.dtype) / CONCENTRATION
        return jnp.where(s > 0, jnp.maximum(norm(d) / math.sqrt(d.size), largest), 0)

    changes = list(map(changed, along, scales))
    own = [c / jnp.where(s > 0, s, 1) for c, s in zip(changes, scales, strict=True)]
    floored = [c / jnp.maximum(s, FAINT * typical) for c, s in zip(changes, scales, strict=True)]
    most = functools.reduce(jnp.maximum, floored)
    everywhere = norm(operator.params) / math.sqrt(size(operator.params))
    of_zeros = norm(v) / math.sqrt(size(v)) / jnp.where(everywhere > 0, everywhere, 1)
    return jnp.where(most > 0, most, of_zeros), own


def rounding_unit(dtypes: Iterable[str]) -> float:
    """The rounding unit of the narrowest dtype."""
    return max(float(jnp.finfo(dtype).eps) / 2 for dtype in dtypes)
