"""Blocks in closed form against the dense Hessian of JAX in float64."""

import itertools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from scripts.studies.theory import blocks

N, D, M, C = 30, 5, 3, 4


@pytest.fixture
def sizes():
    rng = np.random.default_rng(0)
    X, labels = rng.normal(size=(N, D)), rng.integers(0, C, N)
    return X, labels, rng.normal(size=(M, D)), rng.normal(size=(C, M))


def squared_norms(dense, sizes) -> np.ndarray:
    """Of the blocks of a dense matrix."""
    cuts = np.cumsum([0, *sizes])
    return np.array([
        [np.sum(np.square(dense[a:b, c:d])) for c, d in itertools.pairwise(cuts)]
        for a, b in itertools.pairwise(cuts)
    ])  # fmt: skip


def dense_hessian(loss, *parameters) -> np.ndarray:
    """In float64, of parameters one after the other."""
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(tuple(jnp.asarray(p) for p in parameters))
        return np.asarray(jax.hessian(lambda x: loss(*unravel(x)))(flat))


def cross_entropy(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def squared_error(logits, labels):
    return jnp.mean(jnp.sum((logits - jax.nn.one_hot(labels, logits.shape[1])) ** 2, 1))


def test_a_network_with_cross_entropy_has_these_blocks(sizes):
    X, labels, W, V = sizes
    dense = dense_hessian(lambda W, V: cross_entropy(jax.nn.relu(X @ W.T) @ V.T, labels), W, V)
    found = blocks.network_norms(X, labels, W, V, blocks.squared_gram(X))
    expected = squared_norms(dense, [D] * M + [M] * C)
    np.testing.assert_allclose(found.map, expected, rtol=1e-9)
    assert found.total == pytest.approx(np.sum(dense**2))
    columns = squared_norms(dense, [D] * M + [1] * M * C)[:M, M:].reshape(M, C, M)
    np.testing.assert_allclose(found.wv, columns, rtol=1e-9)
    assert found.circulant + found.rest == pytest.approx(found.wv.sum())
    h = blocks.hidden(X, W, V)
    diagonal, others = blocks.class_means(h.probabilities, h.features @ h.features.T)
    vv = expected[M:, M:]
    assert (diagonal, others) == pytest.approx((vv.trace() / C, (vv.sum() - vv.trace()) / (C * (C - 1))))


def test_a_network_with_squared_error_has_twice_the_blocks_that_the_talk_writes(sizes):
    X, labels, W, V = sizes
    dense = dense_hessian(lambda W, V: squared_error(jax.nn.relu(X @ W.T) @ V.T, labels), W, V)
    expected = squared_norms(dense, [D] * M + [M] * C)
    pairs = blocks.hidden_norms(blocks.active_pairs(blocks.hidden(X, W, V).active), blocks.squared_gram(X))
    np.testing.assert_allclose(pairs * (2 * V.T @ V) ** 2, expected[:M, :M], rtol=1e-9)
    found = blocks.network_norms(X, labels, W, V, blocks.squared_gram(X), "MSE")
    np.testing.assert_allclose(found.map, expected, rtol=1e-9)


def test_a_linear_model_has_these_blocks(sizes):
    X, labels, W, _ = sizes
    V = np.concatenate([W, W[:1] + 1])
    dense = dense_hessian(lambda V: cross_entropy(X @ V.T, labels), V)
    expected = squared_norms(dense, [D] * C)
    probabilities = blocks.softmax(X @ V.T, axis=1)
    np.testing.assert_allclose(blocks.class_map(probabilities, blocks.outer_features(X)), expected, rtol=1e-9)
    squares = blocks.squared_gram(X)
    np.testing.assert_allclose(blocks.linear_map(X, V, squares, "CE"), expected, rtol=1e-9)
    mean_square = dense_hessian(lambda V: squared_error(X @ V.T, labels), V)
    np.testing.assert_allclose(blocks.linear_map(X, V, squares, "MSE"), squared_norms(mean_square, [D] * C), atol=1e-9)
    diagonal, others = blocks.class_means(probabilities, squares)
    assert diagonal == pytest.approx(expected.trace() / C)
    assert others == pytest.approx((expected.sum() - expected.trace()) / (C * (C - 1)))
