"""Linear systems with a damped Hessian, solved with other curvatures, and what is wrong with the solutions."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxhess
from jaxhess.errors import InputError
from jaxhess.operators.base import compiled_mv
from jaxhess.vectors import Vector, add_scaled, cast, norm, random_key, random_probe
from scripts.studies.step_size import extremes

CONVERGED, STALLED, NEGATIVE, REFUSED = "converged", "not converged", "negative curvature", "refused"


class Solve(NamedTuple):
    """A system solved with one curvature.

    Attributes:
        name: Of the curvature.
        damping: In |smallest Ritz value| of the exact Hessian.
        side: Number of the right-hand side.
        steps: Products until the end.
        claimed: Relative residual by this curvature's own products.
        residual: By the exact Hessian in float64.
        error: |x - solution of the exact system in float64|, relative to the latter.
        ended: "converged", "not converged", "negative curvature" or "refused".
    """

    name: str
    damping: float
    side: int
    steps: int
    claimed: float
    residual: float
    error: float
    ended: str

    @property
    def failed(self) -> bool:
        """Whether there is no solution to speak of."""
        return self.ended in (NEGATIVE, REFUSED)

    @property
    def counted(self) -> float:
        """The error, and that of x = 0 where the solve failed: 1."""
        return 1.0 if self.failed else self.error


class Systems(NamedTuple):
    """All solves, and the ends of the exact Hessian's spectrum that dampings come from."""

    smallest: float
    largest: float
    solves: list[Solve]

    def of(self, name: str, damping: float) -> list[Solve]:
        """Those of all right-hand sides with one curvature and damping."""
        return [solve for solve in self.solves if (solve.name, solve.damping) == (name, damping)]


def solve_all(
    exact: jaxhess.Hessian,
    curvatures: Mapping[str, jaxhess.LinearOperator],
    sides: Sequence[Vector],
    dampings: Sequence[float],
    tolerance: float,
    max_steps: int,
    seed: int,
    reference: str = "float64",
) -> Systems:
    """(A + damping I) x = b for every right-hand side b, with every curvature A; 64-bit mode must be on for float64.

    Args:
        sides: In the reference's dtype.
        dampings: In |smallest Ritz value|; above one, for the damped Hessian to be positive definite.
        reference: Dtype of the exact system.
    """
    wide = exact.in_dtype(reference)
    probe = random_probe(random_key(seed), exact.shape_dtype)
    low, high = extremes(wide, cast(probe, reference), 40)
    rows = []
    for factor, (side, b) in itertools.product(dampings, enumerate(sides)):
        damping = factor * abs(low)
        true = jaxhess.conjugate_gradients(wide, b, damping=damping, tolerance=1e-6, max_steps=20 * max_steps)
        for name, curvature in curvatures.items():
            try:
                with warnings.catch_warnings():  # of parameters that a step does not move: the errors show it
                    warnings.simplefilter("ignore")
                    found = jaxhess.conjugate_gradients(
                        curvature, cast(b, "float32"), damping=damping, tolerance=tolerance, max_steps=max_steps
                    )
            except InputError:
                nan = float("nan")
                rows.append(Solve(name, factor, side, 0, nan, nan, nan, REFUSED))
                continue
            x = cast(found.solution, reference)
            left = add_scaled(b, jnp.float32(-1), add_scaled(compiled_mv(wide, x), jnp.asarray(damping), x))
            ended = NEGATIVE if found.nonpositive_curvature else CONVERGED if found.converged else STALLED
            numbers = (found.residual, float(norm(left) / norm(b)), distance(x, true.solution))
            rows.append(Solve(name, factor, side, len(found.history) - 1, *numbers, ended))
    return Systems(low, high, rows)


def gradients(exact: jaxhess.Hessian, batches: Sequence[Any], reference: str) -> list[Vector]:
    """The gradients of the mean loss of each of these batches, computed in the reference's dtype."""
    wide = exact.in_dtype(reference)
    gradient = jax.jit(lambda operator: operator.value_and_gradient()[1])
    return [gradient(dataclasses.replace(wide, batches=(jaxhess.Microbatches(batch),))) for batch in batches]


@jax.jit
def _distance(found: Vector, true: Vector) -> jax.Array:
    return norm(add_scaled(found, jnp.float32(-1), true)) / norm(true)


def distance(found: Vector, true: Vector) -> float:
    """|found - true| / |true|."""
    return float(_distance(found, true))
