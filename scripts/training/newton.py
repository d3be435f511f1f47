"""Training by truncated Newton steps: conjugate gradients with any curvature, Levenberg-Marquardt damping."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.krylov.solve import conjugate_gradients
from jaxhess.operators.base import compiled_mv
from jaxhess.vectors import Vector, add_scaled, cast, dot, scale

Array = npt.NDArray[np.float64]

WEAKER, STRONGER = 1 / 3, 4.0
"""Factors on the damping after a step that the quadratic model predicted well, and after one that it did not."""


@dataclasses.dataclass(frozen=True, eq=False)
class NewtonRun:
    """What a run went through; entry 0 of losses, products and seconds is of the start.

    Attributes:
        losses: [steps + 1] mean training loss.
        products: [steps + 1] curvature products so far.
        gradients: [steps + 1] gradients so far; a loss alone counts for a third of one.
        seconds: [steps + 1] seconds so far, by the clock.
        dampings: [steps].
        refused: Steps that would have raised the loss, or had no direction, and were not taken.
    """

    losses: Array
    products: Array
    gradients: Array
    seconds: Array
    dampings: Array
    refused: int

    @property
    def seconds_without_first(self) -> float:
        """Seconds of all steps as if the first, which compiles, had taken as long as the others."""
        return float(self.seconds[-1] - self.seconds[1]) * len(self.dampings) / max(len(self.dampings) - 1, 1)

    def cost(self, per_product: float) -> Array:
        """[steps + 1] what was spent, in gradients."""
        return self.gradients + per_product * self.products


def newton_run(
    training: jaxhess.Hessian,
    curvature: Callable[[jaxhess.Hessian], jaxhess.LinearOperator],
    steps: int,
    solve_steps: int,
    damping: float = 1.0,
    tolerance: float = 0.1,
) -> NewtonRun:
    """Truncated Newton steps on all training data: d of (A + damping I) d = -g by at most `solve_steps` products.

    The damping goes by how much of the reduction that the quadratic model g'd + d'A d / 2 predicts comes true
    (Levenberg and Marquardt's rule): below a quarter, or where the loss would rise, or where A + damping I is not
    positive definite, it is multiplied by `STRONGER`; above three quarters by `WEAKER`. Where conjugate gradients met
    negative curvature the iterate before is the step, and minus the gradient over the damping where there is none.

    Args:
        training: The loss, the starting point and the data.
        curvature: From the Hessian at a point to A.
        steps: Newton steps, taken or refused.
        solve_steps: Products of a solve at most.
        damping: Of the first step.
        tolerance: Of the solve.
    """
    losses, products, gradients, seconds, dampings, refused = [], [0.0], [0.0], [0.0], [], 0
    value, slope = _value_and_gradient(training)
    losses.append(float(value))
    fresh = 1.0  # the gradient at the start; a refused step leaves it as it was
    for _ in range(steps):
        began = time.perf_counter()
        A = curvature(training)
        found = conjugate_gradients(
            A, scale(jnp.float32(-1), slope), damping=damping, tolerance=tolerance, max_steps=solve_steps
        )
        taken = len(found.history) + found.nonpositive_curvature  # with the one that measures the residual
        direction = found.solution
        if found.nonpositive_curvature and len(found.history) == 1:
            direction = scale(jnp.float32(-1 / damping), slope)
        predicted = float(_model(slope, compiled_mv(A, direction), direction))
        moved = dataclasses.replace(training, params=_moved(training.params, direction))
        new_value, new_slope = jax.block_until_ready(_value_and_gradient(moved))
        gain = losses[-1] - float(new_value)
        accepted = gain > 0
        dampings.append(damping)
        share = gain / -predicted if predicted < 0 else 0.0
        if not accepted or share < 0.25 or found.nonpositive_curvature:
            damping *= STRONGER
        elif share > 0.75:
            damping *= WEAKER
        gradients.append(gradients[-1] + fresh + (0.0 if accepted else 1 / 3))
        products.append(products[-1] + taken + 1)
        seconds.append(seconds[-1] + time.perf_counter() - began)
        fresh = 1.0 if accepted else 0.0
        if accepted:
            training, slope = moved, new_slope
        refused += not accepted
        losses.append(float(new_value) if accepted else losses[-1])
    spent = (np.array(products), np.array(gradients), np.array(seconds))
    return NewtonRun(np.array(losses), *spent, np.array(dampings), refused)


@jax.jit
def _value_and_gradient(operator: jaxhess.Hessian) -> tuple[jax.Array, Vector]:
    return operator.value_and_gradient()


@jax.jit
def _model(slope: Vector, product: Vector, direction: Vector) -> jax.Array:
    """g'd + d'A d / 2."""
    return dot(slope, direction) + dot(direction, product) / 2


@jax.jit
def _moved(params: Any, direction: Vector) -> Any:
    return cast(add_scaled(params, jnp.float32(1), direction), params)
