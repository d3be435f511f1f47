"""Linear systems with a damped Hessian, solved with other curvatures, and what is wrong with the solutions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxhess
from jaxhess.errors import InputError
from jaxhess.operators.base import compiled_mv
from jaxhess.vectors import Vector, add_scaled, cast, norm, random_key, random_probe
from scripts.studies.step_size import extremes


class Solve(NamedTuple):
    """A system solved with one curvature.

    Attributes:
        name: Of the curvature.
        damping: In |smallest Ritz value| of the exact Hessian.
        steps: Products until the end.
        claimed: Relative residual by this curvature's own products.
        residual: By the exact Hessian in float64.
        error: |x - solution of the exact system in float64|, relative to the latter.
        ended: "converged", "not converged", "negative curvature", or why it was refused.
    """

    name: str
    damping: float
    steps: int
    claimed: float
    residual: float
    error: float
    ended: str


class Systems(NamedTuple):
    """All solves, and the ends of the exact Hessian's spectrum that dampings come from."""

    smallest: float
    largest: float
    solves: list[Solve]


def solve_all(
    exact: jaxhess.Hessian,
    curvatures: Mapping[str, jaxhess.LinearOperator],
    dampings: Sequence[float],
    tolerance: float,
    max_steps: int,
    seed: int,
    reference: str = "float64",
) -> Systems:
    """(A + damping I) x = gradient of the loss, with every curvature A; 64-bit mode must be on for float64.

    Args:
        dampings: In |smallest Ritz value|; above one, for the damped Hessian to be positive definite.
        reference: Dtype of the exact system.
    """
    wide = exact.in_dtype(reference)
    probe = random_probe(random_key(seed), exact.shape_dtype)
    low, high = extremes(wide, cast(probe, reference), 40)
    gradient = jax.jit(type(wide).value_and_gradient)(wide)[1]
    rows = []
    for factor in dampings:
        damping = factor * abs(low)
        true = jaxhess.conjugate_gradients(wide, gradient, damping=damping, tolerance=1e-6, max_steps=20 * max_steps)
        for name, curvature in curvatures.items():
            try:
                with warnings.catch_warnings():  # of parameters that a step does not move: the errors show it
                    warnings.simplefilter("ignore")
                    found = jaxhess.conjugate_gradients(
                        curvature, cast(gradient, "float32"), damping=damping, tolerance=tolerance, max_steps=max_steps
                    )
            except InputError as error:
                nan = float("nan")
                rows.append(Solve(name, factor, 0, nan, nan, nan, f"refused: {str(error).split(':')[0]}"))
                continue
            x = cast(found.solution, reference)
            left = add_scaled(gradient, jnp.float32(-1), add_scaled(compiled_mv(wide, x), jnp.asarray(damping), x))
            how = (
                "negative curvature"
                if found.nonpositive_curvature
                else "converged"
                if found.converged
                else "not converged"
            )
            rows.append(
                Solve(
                    name,
                    factor,
                    len(found.history) - 1,
                    found.residual,
                    float(norm(left) / norm(gradient)),
                    distance(x, true.solution),
                    how,
                )
            )
    return Systems(low, high, rows)


@jax.jit
def _distance(found: Vector, true: Vector) -> jax.Array:
    return norm(add_scaled(found, jnp.float32(-1), true)) / norm(true)


def distance(found: Vector, true: Vector) -> float:
    """|found - true| / |true|."""
    return float(_distance(found, true))
