"""The Lanczos iteration on vectors that are sharded pytrees, as one compiled segment over a `LanczosState`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.krylov import inner
from jaxhess.krylov.basis import (
    combine,
    gram,
    narrower,
    project_out,
    project_out_in_turn,
    unstacked_sharding,
    write_row,
)
from jaxhess.krylov.state import FORM_STEPS, LanczosState, cached_program, over_runs, run_axes
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.forms import product_and_forms
from jaxhess.vectors import Vector, cast, dot, in_order, scale

BREAKDOWN = 32
"""Rounding units within which a beta is noise: the Krylov space is exhausted.

Two sources of noise set the scale. The step's own scalars: beta against |alpha| plus the beta before. And the rounding
of the stored vector, which leaks about eps / sqrt(n) of every eigenvector into it, so that even in the null space
products are no smaller than that times the largest |alpha| + beta so far. Both are relative: a scaled loss breaks down
at the same step. The eps is that of the recurrence, float32 or wider: vectors stored narrower round more, and there a
breakdown may go unseen. (Relative to the largest eigenvalue alone, without sqrt(n), the bulk of a large model, often
seven decades below the outliers, would pass for noise in float32.) With "full" there is a third sign: most of what is
left lies in the span of the basis.
"""


def lanczos_segment(operator: LinearOperator, state: LanczosState, end: int) -> LanczosState:
    """The state after step `end` (at most m), in the shardings it came in: one compilation serves every segment.

    Each step is w = A q_j - beta_{j-1} q_{j-1}; alpha_j = <w, q_j>; w -= alpha_j q_j; re-orthogonalisation;
    beta_j = |w|, recorded after it; q_{j+1} = w / beta_j (Paige 1972, variant A1 of the three-term recurrence). Vectors
    that are stored narrower than float32 are not of length one, so q_j stands for the stored vector over its length.

    Re-orthogonalisation takes two passes of Gram-Schmidt, three against vectors in 16 bits. For "full" they are
    classical: each is one batched product over the basis. For a window they are modified: one vector after the other,
    from the oldest on. The vectors of a window are orthogonal only within the rounding of their storage, or less, and a
    classical pass multiplies a component that k of them share by 1 - k: with bfloat16 vectors a copy of an outlier grew
    in every step. A modified pass makes no vector longer.

    Scalars stay on device. After a breakdown `previous` keeps the last vector, `current` is zero, and further steps
    only increase `step`. `state` is donated: its buffers become those of the result.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
        >>> state = jaxhess.start_lanczos([jnp.ones(3)], steps=3)
        >>> for end in (2, 3):  # between segments a run saves itself, and shows how far it is
        ...     state = jaxhess.lanczos_segment(A, state, end)
        >>> round(float(state.alphas.sum()), 3)  # the trace, after as many steps as there are rows
        7.0
    """
    return _segment_program(state)(operator, state, jnp.int32(end))


def compile_segment(
    operator: LinearOperator, state: LanczosState, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """The compiled program that `lanczos_segment` runs, with its memory and cost analyses; compiled at most once.

    Operator and state may be abstract (`jax.ShapeDtypeStruct` leaves with shardings); `options` are XLA's.
    """
    return _segment_program(state).lower(operator, state, jnp.int32(0)).compile(compiler_options=options)


def orthogonality_loss(state: LanczosState) -> np.ndarray:
    """The largest |Q'Q - I| over the vectors of the stored basis, [runs], or [runs, B] of blocks.

    For a window they are the last r vectors. NaN where no basis is stored.
    """
    if state.basis is None:
        return np.full(state.size.shape, np.nan)
    products = np.asarray(_grams(state), np.float64)
    if state.blocks is not None:
        products = np.moveaxis(products, -1, 1)
    present = np.diagonal(products, axis1=-2, axis2=-1) > 0.25  # rows not yet written are zero
    both = present[..., :, None] & present[..., None, :]
    return np.abs(np.where(both, products - np.eye(products.shape[-1]), 0)).max((-1, -2))


def lanczos_vectors(state: LanczosState, coefficients: np.ndarray) -> Vector:
    """Combinations [k, ...] of the first run's stored basis, with coefficients [k, rows]; in at least float32.

    Raises:
        InputError: The state keeps no basis of all vectors.
    """
    if state.reorthogonalize != "full":
        raise InputError(f"Re-orthogonalisation {state.reorthogonalize!r} does not keep all Lanczos vectors.")
    return _combiner(state)(state.basis, jnp.asarray(coefficients))


@cached_program
def _segment_program(state: LanczosState) -> Any:
    shardings = [unstacked_sharding(x.sharding) for x in jax.tree.leaves(state.current)]

    def segment(operator: LinearOperator, state: LanczosState, end: jax.Array) -> LanczosState:
        last = jnp.minimum(end, state.alphas.shape[-1])

        def steps(state: LanczosState) -> LanczosState:
            return jax.lax.fori_loop(state.step, last, lambda _, s: _lanczos_step(operator, s, shardings), state)

        axes = run_axes(state)
        return over_runs(steps, state.runs, (axes,), axes)(state)

    return jax.jit(segment, donate_argnums=(1,), out_shardings=jax.tree.map(lambda x: x.sharding, state))


def _lanczos_step(operator: LinearOperator, state: LanczosState, shardings: list[Any]) -> LanczosState:
    j, q, blocks = state.step, state.current, state.blocks
    wide = state.alphas.dtype
    beta_before = jnp.where(j > 0, state.betas[..., jnp.maximum(j - 1, 0)], 0)
    length, length_before = _length(q, wide), _length(state.previous, wide)
    product, forms = _product(operator, state, length, length_before)
    product = in_order(product, shardings)
    taken = [(-beta_before / length_before, state.previous)]
    alpha = inner.dot(blocks, _left_over(blocks, product, length, taken), q, wide) / length
    taken.append((-alpha / length, q))
    if state.basis is None:
        w = _left_over(blocks, product, length, taken)
        overlaps = _overlaps(w, state)
        taken += [(-x / _length(v, wide), v) for x, v in zip(overlaps, (state.previous, q), strict=True)]
        removed, left = sum(map(jnp.abs, overlaps), jnp.zeros((), wide)), jnp.zeros((), wide)
        rest = _left_over(blocks, product, length, taken)
        beta = _norm_near(_largest(w).astype(wide), rest) if _is_narrow(q) else inner.norm(blocks, rest, wide)
        w = _left_over(blocks, product, length, taken)
    else:
        w, removed, left = _reorthogonalized(state, _left_over(blocks, product, length, taken))
        beta = inner.norm(blocks, w, wide)

    local = jnp.abs(alpha) + beta_before
    largest = jnp.maximum(local, jnp.max(jnp.abs(state.alphas) + state.betas, axis=-1))
    rounding = max(float(jnp.finfo(e.dtype).eps) for e in jax.tree.leaves(w))
    noise = BREAKDOWN * rounding * jnp.maximum(local, largest / inner.size(blocks, q) ** 0.5)
    # Where most of w still lies in the span of the basis, nothing of the operator is in it any more.
    exhausted = (beta <= noise) | (beta < 2 * left) | ~jnp.isfinite(beta)
    broken = state.broken | exhausted
    following = inner.scale(blocks, 1 / jnp.where(broken, 1, beta), w)
    # Both vectors are written in place, at the end of the step, because XLA does not know that beta is never above
    # infinity: it can neither move q_j to its new place at the beginning nor write q_{j+1} before that is done, and so
    # keeps no copy of q_j beside the product's temporaries.
    never = beta > jnp.inf
    ended = state.broken & ~never
    previous = inner.where(blocks, ended, state.previous, q)
    emptied = inner.where(blocks, broken, jax.tree.map(jnp.zeros_like, following), following)
    stored = inner.where(blocks, never, previous, cast(emptied, previous))
    error = removed + jnp.where(exhausted, beta, beta * _rounding_error(following, q, wide))

    def record(values: jax.Array, value: jax.Array) -> jax.Array:
        return values.at[..., j].set(jnp.where(state.broken, 0, value))

    return dataclasses.replace(
        state,
        step=j + 1,
        size=jnp.where(state.broken, state.size, j + 1),
        broken=broken,
        alphas=record(state.alphas, alpha),
        betas=record(state.betas, beta),
        step_errors=record(state.step_errors, error),
        previous=previous,
        current=stored,
        basis=_with_following(state, stored, previous),
        forms=forms,
    )


def _product(
    operator: LinearOperator, state: LanczosState, length: jax.Array, length_before: jax.Array
) -> tuple[Vector, jax.Array | None]:
    """The product with q_j; and the microbatches' forms, with those of this step where it is one of the first."""
    q, j = state.current, state.step
    if state.forms is None:
        return operator.wide_mv(q), None
    product, found = product_and_forms(operator, q, state.previous, state.alphas.dtype, j < FORM_STEPS)
    found = found / jnp.stack([length**2, length * length_before, length**2, jnp.ones_like(length)])
    row = jnp.minimum(j, FORM_STEPS - 1)
    kept = (j < FORM_STEPS) & ~state.broken
    return product, state.forms.at[row].set(jnp.where(kept, found, state.forms[row]))


def _left_over(
    blocks: Blocks | None, product: Vector, length: jax.Array, taken: list[tuple[jax.Array, Vector]]
) -> Vector:
    """product / length plus all multiples of vectors in `taken`, one after the other.

    Of vectors in 16 bits computed again wherever it is called, for the barrier makes the factors others: three vectors
    in 16 bits are read, where one in 32 would be written, read and kept.
    """
    inverse, factors = 1 / length, [factor for factor, _ in taken]
    if any(_is_narrow(vector) for _, vector in taken):
        inverse, *factors = jax.lax.optimization_barrier([inverse, *factors])
    w = inner.scale(blocks, inverse, product)
    for factor, (_, vector) in zip(factors, taken, strict=True):
        w = inner.add_scaled(blocks, w, factor, vector)
    return w


def _overlaps(w: Vector, state: LanczosState) -> list[jax.Array]:
    """What w has of q_{j-1} and q_j."""
    wide = state.alphas.dtype
    return [inner.dot(state.blocks, w, q, wide) / _length(q, wide) for q in (state.previous, state.current)]


def _largest(w: Vector) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(e)) for e in jax.tree.leaves(w)])


def _norm_near(largest: jax.Array, w: Vector) -> jax.Array:
    """The norm of w, whose largest entry is near this: divided by a power of two near it, its squares are safe.

    That rounds nothing. `norm` would need w in memory, for a second look at it.
    """
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
    exponent = jnp.clip(exponent, -126, 126)
    scaled = scale(jnp.ldexp(jnp.ones_like(largest), -exponent), w)
    return jnp.ldexp(jnp.sqrt(dot(scaled, scaled, largest.dtype)), exponent)


def _with_following(state: LanczosState, following: Vector, q: Vector) -> Vector | None:
    """The basis with q_{j+1}, which has no row after the last step: the host's has a spare one."""
    row = state.step + 1
    if state.basis is None:
        return None
    if isinstance(state.reorthogonalize, int):
        return write_row(state.basis, row % state.reorthogonalize, following)
    rows = jax.tree.leaves(state.basis)[0].shape[0]
    # After the last step q_j is written where it is already: to write nothing the whole basis would be copied.
    written = (row < rows) | state.broken  # then both are zero
    return write_row(state.basis, jnp.minimum(row, rows - 1), inner.where(state.blocks, written, following, q))


def _reorthogonalized(state: LanczosState, w: Vector) -> tuple[Vector, jax.Array, jax.Array]:
    """w without its components along what it should be orthogonal to, how long these were in all, and what is left.

    What is left of them is estimated, for "full" only: a pass over a basis with Q'Q = I + D leaves D times what it
    takes away. Two passes show how large D is, and so what the last one leaves. Rows in 16 bits have a D of 2^-9 and
    more, and outliers a million times the bulk let in as much: they take a third pass.
    """
    wide = state.alphas.dtype
    removed = left = last = jnp.zeros((), wide)
    project = project_out if state.reorthogonalize == "full" else project_out_in_turn
    for _ in range(3 if _is_narrow(state.basis) else 2):
        before = last
        w, last = project(state.basis, w, state.step + 1, state.blocks)
        removed = removed + last.astype(wide)
    if state.reorthogonalize == "full":
        left = (last * (last / jnp.where(before > 0, before, 1))).astype(wide)
    if narrower(state.basis, state.current):
        overlaps = _overlaps(w, state)
        for overlap, q in zip(overlaps, (state.previous, state.current), strict=True):
            w = inner.add_scaled(state.blocks, w, -overlap / _length(q, wide), q)
            removed = removed + jnp.abs(overlap)
    return w, removed, left


def _length(q: Vector, dtype: Any) -> jax.Array:
    """The length of a stored Lanczos vector: one within rounding if it is stored as wide as it is computed."""
    if not _is_narrow(q):
        return jnp.ones((), dtype)
    length = jnp.sqrt(dot(q, q, dtype))  # about one: squares that vanish are too small to matter
    return jnp.where(length > 0, length, 1)  # the vector before the first is zero


def _rounding_error(unit: Vector, like: Vector, dtype: Any) -> jax.Array:
    """How far storing a unit vector in these dtypes moves it; zero where it is stored as it is."""
    if not _is_narrow(like):
        return jnp.zeros((), dtype)

    def leaf(e: jax.Array, x: jax.Array) -> jax.Array:
        kind = jnp.finfo(x.dtype)
        lost = jnp.abs(e - jax.lax.reduce_precision(e, kind.nexp, kind.nmant))  # a cast and back may be optimised away
        # This flushes entries to zero that the cast keeps as subnormal numbers.
        return jnp.where(jnp.abs(e) < kind.tiny, jnp.minimum(lost, kind.smallest_subnormal / 2), lost)

    lost = jax.tree.map(leaf, unit, like)
    return jnp.sqrt(dot(lost, lost, dtype))  # beside a unit vector squares that vanish are too small to matter


def _is_narrow(q: Vector) -> bool:
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(q))


@jax.jit
def _grams(state: LanczosState) -> jax.Array:
    return over_runs(lambda basis: gram(basis, state.blocks), state.runs)(state.basis)


@cached_program
def _combiner(state: LanczosState) -> Any:
    def combined(basis: Vector, coefficients: jax.Array) -> Vector:
        first = jax.tree.map(lambda b: jax.lax.squeeze(b[:1], (0,)), basis)
        return combine(first, coefficients)

    return jax.jit(combined, out_shardings=jax.tree.map(lambda x: x.sharding, state.current))
