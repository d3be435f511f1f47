"""Short trainings: the best learning rate of a quadratic, divergence, errors over seeds."""

import doctest

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import t as student

from jaxhess.errors import InputError
from scripts.training import short_runs as script
from scripts.training.short_runs import TrainingTask, adam, check_runs, mean_loss, missed, over_seeds, sgd, sweep


def loss(params, batch):
    return jnp.sum((params - batch) ** 2), jnp.float32(len(batch))


QUADRATIC = TrainingTask("quadratic", loss, lambda seed: jnp.float32(seed + 1), jnp.array([3.0, 5.0]))
"""Mean loss (w - 4)^2 + 1."""


def test_a_quadratic_is_minimised_at_the_best_rate_and_diverges_beyond():
    found = sweep(QUADRATIC, sgd, (1e30, 1e-4, 0.05), [0, 1], 80)
    assert found.rates == (1e-4, 0.05, 1e30)
    assert found.best == 1
    assert not found.at_an_end
    assert np.isinf(found.losses[2]).all()
    np.testing.assert_allclose(found.at(0.05), 1, atol=1e-2)
    assert found.losses.shape == (3, 2)
    assert mean_loss(QUADRATIC, jnp.float32(1.0)) == pytest.approx(10)
    assert (found.losses[0] > 3).all()
    assert sweep(QUADRATIC, adam, (0.01, 0.3), [0], 80).at_an_end


def test_the_order_is_that_of_the_seed():
    small = TrainingTask("", loss, lambda seed: 0, jnp.arange(10.0), batch=4)
    assert (small.order(3, 0) == small.order(3, 0)).all()
    assert (small.order(3, 0) != small.order(3, 1)).any()
    assert small.order(3, 0).shape == (3, 4)
    assert (QUADRATIC.order(2, 0) == jnp.array([[0, 1], [0, 1]])).all()


def test_errors_are_those_of_students_t():
    values = np.array([1.0, 2.0, 4.0])
    low, high = student.interval(0.95, 2, loc=values.mean(), scale=values.std(ddof=1) / np.sqrt(3))
    mean, error = over_seeds(values)
    assert mean - error == pytest.approx(low)
    assert mean + error == pytest.approx(high)
    assert np.isnan(over_seeds([1.0, np.inf])[0])
    with pytest.raises(InputError, match="two seeds"):
        over_seeds([1.0])
    np.testing.assert_allclose(missed([3.0, 1.0], [1.0, 1.0], [5.0, 5.0]), [0.5, 0])


@pytest.mark.parametrize("bad", [(1, 20, (0.1,)), (2, 5, (0.1,)), (2, 20, ()), (2, 20, (0.0,)), (2, 20, (np.inf,))])
def test_options_that_make_no_comparison_are_refused(bad):
    with pytest.raises(InputError):
        check_runs(*bad)


def test_the_examples_run():
    assert doctest.testmod(script).failed == 0
