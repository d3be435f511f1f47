"""Block norms by products with unit vectors against the dense Hessian, and training."""

import jax
import jax.numpy as jnp
import numpy as np

from scripts.studies.theory import training
from scripts.studies.theory.states import hessian


def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    X, labels = jax.random.normal(keys[0], (20, 4)), jax.random.randint(keys[1], (20,), 0, 3)
    return training.initialize(keys[2], (4, 5, 3)), X, labels


def test_the_map_of_blocks_is_that_of_the_dense_hessian():
    """In float32: squares of entries that err by 1e-6 of the largest."""
    weights, X, labels = problem()
    dense = hessian(lambda w: training.loss(w, X, labels), weights)
    block = training.neuron_blocks(weights)
    assert block.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 5 + [6] * 5 + [7] * 5
    cut = np.eye(8)[block]
    expected = cut.T @ np.square(dense.astype(np.float64)) @ cut
    found = training.block_map(weights, X, labels, batch=8)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_snapshots_are_of_one_training():
    """The middle of 20 steps is the end of 10, and the first step of Adam moves every weight by its rate."""
    weights, X, labels = problem()
    start, middle, _ = training.train(weights, X, labels, 20, 1e-3, (0.0, 0.5, 1.0))
    (other,) = training.train(weights, X, labels, 10, 1e-3, (1.0,))
    np.testing.assert_array_equal(start.weights[0], weights[0])
    np.testing.assert_allclose(middle.weights[1], other.weights[1], rtol=1e-5)
    (one,) = training.train(weights, X, labels, 1, 1e-3, (1.0,))
    moved = jnp.abs(one.weights[1] - weights[1])
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)
    assert one.loss < start.loss
