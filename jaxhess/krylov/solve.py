"""Linear systems with an operator, by conjugate gradients on vectors that are sharded pytrees."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.products import pinned
from jaxhess.operators.base import LinearOperator, check_structure
from jaxhess.operators.facts import non_finite, validated
from jaxhess.vectors import Vector, add_scaled, dot, norm, scale, widen


class Solution(NamedTuple):
    """What conjugate gradients found, and how far it can be trusted.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([1.0, -1.0])))  # not positive definite
        >>> found = jaxhess.conjugate_gradients(A, jnp.ones(2))
        >>> found.converged, found.nonpositive_curvature, len(found.history)
        (False, True, 1)

    Attributes:
        solution: x, a tree like b in at least float32.
        history: [steps + 1] float64, |r_k| / |b| by the recursion, from r_0 = b on; where the run was restarted and at
            its end, measured like `residual`.
        residual: |b - (A + damping I) x| / |b|, from x.
        converged: Whether `residual` is within the tolerance. Where it is not before `max_steps`, rounding has decided:
            the tolerance is below what dtype and condition number allow.
        nonpositive_curvature: Whether it ended at a direction p with p'(A + damping I)p not above zero, within
            rounding: the matrix is not positive definite, and x is the iterate before.
    """

    solution: Vector
    history: npt.NDArray[np.float64]
    residual: float
    converged: bool
    nonpositive_curvature: bool


CAPACITY = 1024
"""Length of the history's buffer, doubled until `max_steps` fits: only then is a run compiled for itself."""


class _State(NamedTuple):
    step: jax.Array
    x: Vector
    r: Vector
    p: Vector
    squared: jax.Array  # r'z
    history: jax.Array
    largest: jax.Array  # Rayleigh quotient of a direction so far
    nonpositive: jax.Array
    bad_preconditioner: jax.Array
    residual: jax.Array  # of x, as last measured
    ended: jax.Array


def conjugate_gradients(
    operator: LinearOperator,
    b: Vector,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    max_steps: int = 100,
    preconditioner: LinearOperator | None = None,
) -> Solution:
    """The solution of (A + damping I) x = b by conjugate gradients (Hestenes and Stiefel 1952) from x = 0.

    `jax.scipy.sparse.linalg.cg` keeps no history and does not see negative curvature, which a Hessian has. Here the
    loop ends where p'(A + damping I)p is not above rounding, eps times the largest Rayleigh quotient so far times p'p.
    Where the recursion has reached the tolerance the residual is measured, with one more product, for rounding makes
    the two part (Greenbaum 1997); if it is not within the tolerance the run restarts from x and the measured residual,
    as long as that takes off a quarter. Vectors are in at least float32, sharded like the operator's: b, x, r, p, and
    b over its length.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> found = jaxhess.conjugate_gradients(A, jnp.array([3.0, 0.0]))
        >>> found.solution.round(3), found.converged
        (Array([ 2., -1.], dtype=float32), True)

    Args:
        operator: Symmetric; positive definite once damped.
        b: A tree like the operator's vectors; zero gives zero.
        damping: Not negative; data, so that another one compiles nothing again.
        tolerance: Of |b - (A + damping I) x| / |b|.
        max_steps: Products at most, without those that measure the residual.
        preconditioner: An approximation of the inverse of A + damping I: symmetric and positive definite.

    Raises:
        InputError: b is not like the operator's vectors or not finite, an option is out of its range, or the
            preconditioner is not positive definite; the loss or a product is not finite.
    """
    check_structure(b, operator.shape_dtype)
    if not 0 <= damping < math.inf:
        raise InputError(f"damping is {damping}; it must be finite and not negative.")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance is {tolerance}; it must be between 0 and 1, a part of |b|.")
    if not isinstance(max_steps, int | np.integer) or max_steps < 1:
        raise InputError(f"max_steps is {max_steps}; it must be a whole number, at least 1.")
    if preconditioner is not None:
        check_structure(preconditioner.shape_dtype, operator.shape_dtype)
    if not math.isfinite(float(norm(b))):
        raise InputError("b has entries that are not finite.")
    validated(operator)
    capacity = CAPACITY * 2 ** max(0, math.ceil(math.log2((max_steps + 1) / CAPACITY)))
    state, solution = _solved(operator, b, damping, tolerance, max_steps, preconditioner, capacity)
    steps = int(state.step)
    history = np.asarray(state.history, np.float64)[: steps + 1]
    if bool(state.bad_preconditioner):
        raise InputError(f"The preconditioner M is not positive definite: r'M r is not positive at step {steps}.")
    if not np.isfinite(history[-1]):
        raise non_finite(f"The product at step {steps} of conjugate gradients", operator, state.p)
    nonpositive, residual = bool(state.nonpositive), float(state.residual)
    return Solution(solution, history, residual, residual <= tolerance and not nonpositive, nonpositive)


@functools.partial(jax.jit, static_argnums=6)
def _solved(
    operator: LinearOperator,
    b: Vector,
    damping: jax.Array,
    tolerance: jax.Array,
    max_steps: jax.Array,
    preconditioner: LinearOperator | None,
    capacity: int,
) -> tuple[_State, Vector]:
    """The last state, and x."""

    def product(v: Vector) -> Vector:
        return add_scaled(operator.mv(v), damping, v)

    def conditioned(r: Vector) -> Vector:
        return r if preconditioner is None else preconditioner.mv(r)

    b = pinned(operator, widen(b))
    length = norm(b)
    b = scale(1 / jnp.where(length > 0, length, 1), b)  # of length one: squares of a tiny gradient's entries vanish
    rounding = max(float(jnp.finfo(e.dtype).eps) for e in jax.tree.leaves(b))

    def goes_on(state: _State) -> jax.Array:
        left = state.history[state.step]
        unfinished = (left > tolerance) & jnp.isfinite(left) & (state.step < max_steps)
        return unfinished & ~state.nonpositive & ~state.bad_preconditioner

    def step(state: _State) -> _State:
        ap = product(state.p)
        curvature, squared_p = dot(state.p, ap), dot(state.p, state.p)
        largest = jnp.maximum(state.largest, curvature / squared_p)
        nonpositive = curvature <= rounding * largest * squared_p
        alpha = jnp.where(nonpositive, 0, state.squared / curvature)
        x = add_scaled(state.x, alpha, state.p)
        r = add_scaled(state.r, -alpha, ap)
        z = conditioned(r)
        squared = dot(r, z)
        left = norm(r)
        # A product that is not finite leaves p as it was: the error message is about it.
        beta = squared / state.squared
        p = jax.tree.map(lambda e, f: jnp.where(jnp.isfinite(left), e, f), add_scaled(z, beta, state.p), state.p)
        done = jnp.where(nonpositive, state.step, state.step + 1)
        history = state.history.at[done].set(left)
        bad = ~(squared > 0) & (left > 0)
        return state._replace(
            step=done,
            x=x,
            r=r,
            p=p,
            squared=squared,
            history=history,
            largest=largest,
            nonpositive=nonpositive,
            bad_preconditioner=bad,
        )

    def started(state: _State, r: Vector) -> _State:
        z = conditioned(r)
        squared = dot(r, z)
        return state._replace(r=r, p=z, squared=squared, bad_preconditioner=~(squared > 0) & (state.residual > 0))

    def run(state: _State) -> _State:
        state = jax.lax.while_loop(goes_on, step, state)
        reached = state.history[state.step] <= tolerance
        r = add_scaled(b, jnp.float32(-1), product(state.x))
        residual = norm(r)
        again = reached & (residual > tolerance) & (residual < 0.75 * state.residual)
        history = state.history.at[state.step].set(jnp.where(reached, residual, state.history[state.step]))
        state = state._replace(history=history, residual=residual, ended=~again)
        return jax.lax.cond(again, lambda: started(state, r), lambda: state)

    left = norm(b)
    zero, zeros = jnp.zeros_like(left), jax.tree.map(jnp.zeros_like, b)
    history = jnp.zeros((capacity,), left.dtype).at[0].set(left)
    no = jnp.bool_(False)
    state = started(_State(jnp.int32(0), zeros, b, b, zero, history, zero, no, no, left, no), b)
    state = jax.lax.while_loop(lambda state: ~state.ended, run, state)
    return state, pinned(operator, scale(length, state.x))
