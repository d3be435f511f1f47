"""Theorems: differences and third derivatives of a loss that is known, and Ritz values beside their bound."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import run_command

from jaxhess.results.study import Study
from scripts.studies import theorems as script


def loss_of(factor: float = 1.0) -> script.Loss:
    """Two classes of one example with input 1: log(1 + exp(b - a)) of the parameters a, b, without a penalty."""

    def unravel(theta):
        return {"out": {"bias": jnp.zeros(2, theta.dtype), "kernel": theta[None]}}

    return script.Loss(unravel, (jnp.ones((1, 1)), jnp.array([0])), 0.0, factor)


def test_derivatives_along_a_direction_are_those_of_the_logistic_function(float64):
    loss, theta, u = loss_of(3.0), jnp.array([0.3, -0.2]), jnp.array([1.0, 0.0])
    s = 1 / (1 + np.exp(0.5))  # the probability of the other class
    slope, curved = s * (1 - s), s * (1 - s) * (1 - 6 * s + 6 * s * s)
    np.testing.assert_allclose(loss.gradient(theta), [-3 * s, 3 * s], rtol=1e-12)
    np.testing.assert_allclose(loss.product(theta, u), [3 * slope, -3 * slope], rtol=1e-12)
    np.testing.assert_allclose(loss.third(theta, u), [3 * curved, -3 * curved], rtol=1e-12)
    # A central difference errs by step^2 / 6 times that, and step^4 times the next one.
    error = loss.difference(theta, u, 1e-2) - np.asarray(loss.product(theta, u))
    np.testing.assert_allclose(error, 1e-4 / 6 * np.asarray(loss.third(theta, u)), rtol=1e-3)


def test_a_point_has_the_average_and_the_bound(float64):
    at = script.at_point(loss_of(), jnp.array([0.3, -0.2]), [jnp.array([1.0, 0.0]), jnp.array([0.6, -0.8])])
    assert at.averaged.max() < 1e-8
    clear = slice(12, None)  # steps from 1e-2
    assert (at.wide <= 1.001 * at.bound)[:, clear].all()
    assert (at.wide > 0.1 * at.bound)[:, clear].all()


def test_ritz_values_with_differences(float64):
    # The Hessian has the eigenvalues 0 and 2 s (1 - s): two steps find both, up to the error of products.
    found = script.ritz_errors(loss_of(), jnp.array([0.3, -0.2]), [jnp.array([0.6, 0.8])], 2, 1e-2)
    assert 0 < found.error <= 2 * np.sqrt(2) * found.product < 1e-3


def test_claims_can_fail():
    at = script.AtPoint(
        1.0, np.ones(2), *(np.ones((2, 21)) * np.outer([1, 1], script.STEPS**p) for p in (2, -1, 2)),
        np.array([1e-3, 1e-9]), np.array([1e-2, 1e-2]), np.array([1e-2, 1e-2]),
    )  # fmt: skip
    at = at._replace(wide=3 * at.wide + 1e-15 / script.STEPS)
    ritz = [script.RitzErrors(4, 3.0, 1.0, 1.0)]
    verdicts = [c.verdict for c in script.claims({"here": at}, ritz, 0.0, "")]
    assert verdicts == ["holds", "cannot tell", "holds"]
    far = at._replace(predicted=np.array([1e-4, 1e-4]))
    assert [c.verdict for c in script.claims({"here": far}, ritz, -2.0, "")][::2] == ["does not hold"] * 2
    rows = script.checks({"here": at}, ritz)
    assert [value for _, _, value, _ in rows] == pytest.approx([3, 1e-3, 1.5], rel=1e-3)
    assert [row[-1] for row in script.check_table(rows).rows] == ["NO", "NO", "NO"]


@pytest.mark.slow
def test_a_small_run(tmp_path):
    options = "--images prototypes --examples 20 --probes 2 --lanczos 4"
    run_command(script, *options.split(), "--out", str(tmp_path / "out"))
    found = Study.load(tmp_path / "out")
    assert len(found.claims) == 4
    assert [row[-1] for row in found.tables[0].rows] == ["yes"] * 4
    assert found.record["power_of_the_loss"] == pytest.approx(-2, abs=0.1)
    assert len(found.figures[0].png) > 10_000
