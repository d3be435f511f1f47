"""Retraining without an example: minima by another optimiser, and examples that count for nothing."""

import jax
import jax.flatten_util
import numpy as np
import pytest
from scipy.optimize import minimize

from scripts.studies.bias.retraining import CONVERGED, Classifier, losses, retrained


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("hidden", [None, 2])
def test_minima_are_those_of_another_optimiser(float64, hidden, again):
    classifier = Classifier("small", hidden, 4)  # four features
    train, test = classifier.images("prototypes", 0, 12, 2)
    found = retrained(classifier, train, test, 0.1, 0, np.array([3, 7]), again)
    assert found.gradient <= CONVERGED
    theta, unravel = jax.flatten_util.ravel_pytree(found.params)
    kept = np.arange(12) != 7
    data = (train[0][kept], train[1][kept])

    @jax.jit
    @jax.value_and_grad
    def objective(theta):
        return losses(unravel(theta), data).sum() / 12 + 0.05 * theta @ theta

    def both(theta):
        value, gradient = objective(theta)
        return float(value), np.asarray(gradient)

    other = minimize(both, np.asarray(theta), jac=True, tol=1e-9, options={"gtol": 1e-8}).x
    change = losses(unravel(other), test) - losses(found.params, test)
    # The minimum is found to 1e-8 over the smallest eigenvalue of the penalised Hessian.
    np.testing.assert_allclose(found.changes[1], change, atol=1e-5)
    assert np.abs(change).max() > 1e-3
    assert found.smallest > -0.1
    assert (found.moved > 0).all()
