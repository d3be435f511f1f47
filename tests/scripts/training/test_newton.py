"""Truncated Newton steps: a quadratic in one step, a damping that grows until steps are taken, and what is counted."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from scripts.training.newton import WEAKER, newton_run

SCALES = jnp.array([1.0, 4.0])


def quadratic(params, batch):
    return jnp.sum(batch * SCALES * (params - 1) ** 2), jnp.float32(1)


def quartic(params, batch):
    return jnp.sum(batch * (params**4 - 2 * params**2)), jnp.float32(1)


def test_a_quadratic_is_solved_in_one_step_without_damping():
    start = jaxhess.Hessian(quadratic, jnp.array([3.0, -1.0]), [jnp.ones(2)])
    run = newton_run(start, lambda exact: exact, 2, 5, damping=1e-6, tolerance=1e-5)
    # (A + d I) x = -g: of the distance to the minimum d / (A + d) is left.
    np.testing.assert_allclose(run.losses, [20, 0, 0], atol=1e-5)
    assert run.dampings[1] == pytest.approx(WEAKER * 1e-6)
    # Two conjugate gradient steps, the residual's product and the model's.
    assert run.products[1] == 4
    assert run.gradients[1] == 1
    assert run.cost(2.0)[1] == 9


def test_at_a_maximum_the_damping_grows_and_the_loss_never_rises():
    # Near 0 the curvature is -4: dampings below 4 meet negative curvature at once, and the step is along -gradient.
    start = jaxhess.Hessian(quartic, jnp.array([1e-3, -1e-3]), [jnp.ones(2)])
    run = newton_run(start, lambda exact: exact, 25, 5, damping=0.5)
    assert (np.diff(run.losses) <= 0).all()
    assert run.dampings[1] > run.dampings[0]
    assert run.losses[-1] == pytest.approx(-2, abs=1e-3)
