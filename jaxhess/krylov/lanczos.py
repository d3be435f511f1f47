"""The Lanczos iteration on vectors that are sharded pytrees, as one compiled segment over a state that can be saved."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import (
    Vector,
    add_scaled,
    basis_dot,
    basis_sum,
    check_accumulation_dtype,
    dot,
    norm,
    scale,
    size,
    widen,
)

Reorthogonalize = Literal["none", "full"]

BREAKDOWN = 32
"""Rounding units within which a beta is noise: the Krylov space is exhausted.

Two sources of noise set the scale. The step's own scalars: beta against |alpha| plus the beta before. And the rounding
of the stored vector, which leaks about eps / sqrt(n) of every eigenvector into it, so that even in the null space
products are no smaller than that times the largest |alpha| + beta so far. Both are relative: a scaled loss breaks down
at the same step. (Relative to the largest eigenvalue alone, without sqrt(n), the bulk of a large model, often seven
decades below the outliers, would pass for noise in float32.) With a stored basis there is a third sign, see the step.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanczosState:
    """A Lanczos run after `step` products; `m` is the most it has room for.

    Attributes:
        step: int32 scalar, products done.
        size: int32 scalar, rows of T that are valid; smaller than `step` only after a breakdown.
        broken: bool scalar, whether the Krylov space was exhausted.
        alphas: [m] diagonal of T, in the accumulation dtype (float32 or wider).
        betas: [m]; betas[j] is the norm left after step j: the off-diagonal, and the last one bounds the residuals.
        previous, current: Vectors q_{j-1} and q_j, in the storage dtype.
        basis: All Lanczos vectors stacked along a leading axis [m, ...], zero where not yet computed; None if not kept.
    """

    step: jax.Array
    size: jax.Array
    broken: jax.Array
    alphas: jax.Array
    betas: jax.Array
    previous: Vector
    current: Vector
    basis: Vector | None


def start_lanczos(
    probe: Vector, steps: int, reorthogonalize: Reorthogonalize = "none", accumulation_dtype: str = "float32"
) -> LanczosState:
    """The state before the first step, from any nonzero probe; vectors are stored in the probe's dtypes and shardings.

    Args:
        probe: Where the Krylov space starts.
        steps: What the state has room for.
        reorthogonalize: "full" keeps every vector, "none" two.
        accumulation_dtype: Of inner products and norms, and so of alphas and betas: "float32" or "float64" (which needs
            JAX in 64-bit mode); never narrower than the vectors.

    Raises:
        ValueError: `steps` below 1, an unknown re-orthogonalisation or accumulation dtype.
    """
    check_accumulation_dtype(accumulation_dtype)
    if steps < 1:
        raise ValueError(f"steps is {steps}; a Lanczos run takes at least 1.")
    if reorthogonalize not in ("none", "full"):
        raise ValueError(f"Unknown re-orthogonalisation {reorthogonalize!r}; it is 'none' or 'full'.")
    for path, leaf in jax.tree.flatten_with_path(probe)[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name, dtype = jax.tree_util.keystr(path), jnp.result_type(leaf)
            raise ValueError(f"The probe's leaf {name} has dtype {dtype}; Lanczos vectors are floating point.")
    probe = jax.tree.map(jnp.asarray, probe)
    leaves, treedef = jax.tree.flatten(probe)
    create = _starter(treedef, tuple(x.sharding for x in leaves), steps, reorthogonalize == "full", accumulation_dtype)
    return create(probe)


def lanczos_segment(operator: LinearOperator, state: LanczosState, end: int) -> LanczosState:
    """The state after step `end` (at most m), in the shardings it came in: one compilation serves every segment.

    Each step is w = A q_j - beta_{j-1} q_{j-1}; alpha_j = <w, q_j>; w -= alpha_j q_j; with a stored basis two passes of
    classical Gram-Schmidt, each one batched product over it; beta_j = |w|, recorded after them; q_{j+1} = w / beta_j
    (Paige 1972, variant A1 of the three-term recurrence). Scalars stay on device. After a breakdown `previous` keeps
    the last vector, `current` is zero, and further steps only count. `state` is donated: its buffers become those of
    the result.
    """
    return _segment_program(state)(operator, state, jnp.int32(end))


def compile_segment(operator: LinearOperator, state: LanczosState) -> jax.stages.Compiled:
    """The compiled program that `lanczos_segment` runs, with its memory and cost analyses; compiled at most once.

    Both arguments may be abstract (`jax.ShapeDtypeStruct` leaves with shardings).
    """
    return _segment_program(state).lower(operator, state, jnp.int32(0)).compile()


def _segment_program(state: LanczosState) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return _program_for(treedef, tuple(leaf.sharding for leaf in leaves))


@functools.cache
def _program_for(treedef: Any, shardings: tuple[Any, ...]) -> Any:
    def segment(operator: LinearOperator, state: LanczosState, end: jax.Array) -> LanczosState:
        last = jnp.minimum(end, state.alphas.size)
        return jax.lax.fori_loop(state.step, last, lambda _, s: _lanczos_step(operator, s), state)

    return jax.jit(segment, donate_argnums=(1,), out_shardings=jax.tree.unflatten(treedef, shardings))


def _lanczos_step(operator: LinearOperator, state: LanczosState) -> LanczosState:
    j, q = state.step, state.current
    beta_before = jnp.where(j > 0, state.betas[jnp.maximum(j - 1, 0)], 0)
    w = operator.mv(widen(q))
    w = add_scaled(w, -beta_before, state.previous)
    alpha = dot(w, q, state.alphas.dtype)
    w = add_scaled(w, -alpha, q)
    basis, removed = state.basis, jnp.zeros_like(alpha)
    if basis is not None:
        for _ in range(2):
            overlap = basis_dot(basis, w)
            w = add_scaled(w, jnp.float32(-1), basis_sum(overlap, basis))
        removed = jnp.sqrt(jnp.sum(jnp.square(overlap)))
    beta = norm(w, state.alphas.dtype)

    local = jnp.abs(alpha) + beta_before
    largest = jnp.maximum(local, jnp.max(jnp.abs(state.alphas) + state.betas))
    rounding = max(float(jnp.finfo(e.dtype).eps) for e in jax.tree.leaves(w))
    noise = BREAKDOWN * rounding * jnp.maximum(local, largest / size(q) ** 0.5)
    # A second pass that removed more than it left: what is left is the rounding of the stored basis, inside its span.
    exhausted = (beta <= noise) | (beta < removed) | ~jnp.isfinite(beta)
    broken = state.broken | exhausted
    inverse = 1 / jnp.where(broken, 1, beta)
    following = jax.tree.map(lambda e, like: jnp.where(broken, 0, inverse * e).astype(like.dtype), w, q)
    if basis is not None:  # row m is out of range after the last step, and dropped
        basis = jax.tree.map(lambda b, x: b.at[j + 1].set(x, mode="drop"), basis, following)

    def record(values: jax.Array, value: jax.Array) -> jax.Array:
        return values.at[j].set(jnp.where(state.broken, 0, value))

    # That beta is not above infinity is always true, but XLA does not know: it moves q to its new place at the end of
    # the step, not at the beginning, where the copy would be one more vector beside the product's temporaries.
    ended = state.broken & ~(beta > jnp.inf)
    return LanczosState(
        step=j + 1,
        size=jnp.where(state.broken, state.size, j + 1),
        broken=broken,
        alphas=record(state.alphas, alpha),
        betas=record(state.betas, beta),
        previous=jax.tree.map(lambda old, new: jnp.where(ended, old, new), state.previous, q),
        current=following,
        basis=basis,
    )


@functools.cache
def _starter(treedef: Any, shardings: tuple[Any, ...], steps: int, keep_basis: bool, accumulation_dtype: str) -> Any:
    def create(probe: Vector) -> LanczosState:
        length = norm(probe, accumulation_dtype)
        current = scale(1 / length, probe)
        zero = jnp.zeros((), jnp.int32)
        scalars = jnp.zeros((steps,), length.dtype)
        basis = None
        if keep_basis:
            basis = jax.tree.map(lambda q: jnp.zeros((steps, *q.shape), q.dtype).at[0].set(q), current)
        previous = jax.tree.map(jnp.zeros_like, current)
        return LanczosState(zero, zero, zero > 0, scalars, scalars, previous, current, basis)

    # Explicit even on one device: arrays that are not committed to theirs would compile the segment twice.
    return jax.jit(create, out_shardings=_state_shardings(jax.tree.unflatten(treedef, shardings), keep_basis))


def _state_shardings(vector: Any, keep_basis: bool) -> LanczosState:
    """A state with shardings for leaves, from those of a vector."""
    first: Any = jax.tree.leaves(vector)[0]
    scalar: Any = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def stacked(sharding: Any) -> Any:
        if not isinstance(sharding, NamedSharding):
            return sharding
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))

    basis = jax.tree.map(stacked, vector) if keep_basis else None
    return LanczosState(scalar, scalar, scalar, scalar, scalar, vector, vector, basis)
