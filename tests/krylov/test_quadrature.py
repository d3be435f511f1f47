"""Gauss quadrature against closed forms and dense linear algebra."""

import numpy as np
import pytest
from scipy.linalg import hessenberg
from scipy.special import comb

from jaxhess.krylov.quadrature import quadrature


def _krylov(dim, steps, seed=0):
    """A random symmetric matrix, and its Krylov basis, alphas and betas from e_1 by Householder tridiagonalisation."""
    matrix = np.random.default_rng(seed).normal(size=(dim, dim))
    matrix = matrix + matrix.T
    tridiagonal, basis = hessenberg(matrix, calc_q=True)
    alphas, betas = np.diag(tridiagonal), np.abs(np.diag(tridiagonal, 1))
    return matrix, basis[:, :steps], alphas[:steps], betas[:steps]


def _krawtchouk(steps, p):
    """The Jacobi matrix of the binomial distribution: nodes 0..N and weights comb(N, k) p^k (1 - p)^(N - k)."""
    n = np.arange(steps)
    total = steps - 1
    betas = np.sqrt(n[1:] * p * (1 - p) * (total - n[1:] + 1))
    weights = comb(total, n) * p**n * (1 - p) ** (total - n)
    return p * (total - n) + n * (1 - p), np.append(betas, 0.0), n, weights


@pytest.mark.parametrize(("steps", "p"), [(31, 0.5), (101, 0.5), (61, 0.1), (101, 0.05)])
def test_tiny_weights_are_the_binomial_probabilities_to_relative_accuracy(steps, p):
    alphas, betas, nodes, weights = _krawtchouk(steps, p)
    found = quadrature(alphas, betas)
    assert weights.min() < 1e-9
    # Entries of T are rounded: nodes move by some eps ||T||, relative weights by eps times the condition 1/gap ~ steps.
    np.testing.assert_allclose(found.ritz_values, nodes, atol=1e-14 * steps, rtol=0)
    seen = weights > 1e-40
    np.testing.assert_allclose(found.weights[seen], weights[seen], rtol=1e-14 * steps)
    assert (found.weights[~seen] < 2e-40).all()


@pytest.mark.parametrize("steps", [2, 3, 50])
def test_toeplitz_nodes_weights_and_bounds_are_the_closed_form(steps):
    angle = np.arange(steps, 0, -1) * np.pi / (steps + 1)
    found = quadrature(np.full(steps, 0.5), np.ones(steps))
    np.testing.assert_allclose(found.ritz_values, 0.5 + 2 * np.cos(angle), atol=1e-14)
    np.testing.assert_allclose(found.weights, 2 / (steps + 1) * np.sin(angle) ** 2, rtol=1e-11)
    last = np.sqrt(2 / (steps + 1)) * np.abs(np.sin(steps * angle))
    np.testing.assert_allclose(found.residual_bounds, last, rtol=1e-11)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_quadrature_is_exact_to_degree_2m_minus_1_and_no_further(steps):
    matrix, basis, alphas, betas = _krylov(30, steps)
    found = quadrature(alphas, betas)
    vector, scale = basis[:, 0], np.linalg.norm(matrix, 2)
    for degree in range(2 * steps + 1):
        dense = vector @ np.linalg.matrix_power(matrix / scale, degree) @ vector
        error = abs(found.weights @ (found.ritz_values / scale) ** degree - dense)
        assert error < 1e-13 if degree < 2 * steps else error > 1e-6


def test_residual_bound_is_the_norm_of_the_residual_and_holds_an_eigenvalue():
    matrix, basis, alphas, betas = _krylov(40, 8)
    found = quadrature(alphas, betas)
    projected = basis.T @ matrix @ basis
    theta, vectors = np.linalg.eigh(projected)
    residuals = np.linalg.norm(matrix @ basis @ vectors - basis @ vectors * theta, axis=0)
    np.testing.assert_allclose(found.residual_bounds, residuals, rtol=1e-10)
    distance = np.abs(found.ritz_values[:, None] - np.linalg.eigvalsh(matrix)).min(1)
    assert (distance <= found.residual_bounds).all()


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e30, 1e200])
def test_scaling_the_operator_scales_nodes_and_bounds_and_keeps_weights(factor):
    alphas, betas, _, weights = _krawtchouk(41, 0.3)
    betas[-1] = 2.0
    plain, scaled = quadrature(alphas, betas), quadrature(alphas * factor, betas * factor)
    np.testing.assert_allclose(scaled.ritz_values / factor, plain.ritz_values, atol=1e-12, rtol=0)
    np.testing.assert_allclose(scaled.weights, weights, rtol=1e-11)
    # Last components range to 1e-11 of the first; they have the same relative accuracy.
    np.testing.assert_allclose(scaled.residual_bounds / factor, plain.residual_bounds, rtol=1e-10)


def test_one_step_is_one_node():
    found = quadrature([-3.0], [0.25])
    assert [list(field) for field in found] == [[-3.0], [1.0], [0.25], [0.0]]


def test_zero_operator_has_zero_nodes_and_unit_mass():
    found = quadrature(np.zeros(4), np.zeros(4))
    assert not found.ritz_values.any()
    assert found.weights.sum() == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_entry_that_is_not_finite_is_refused_with_its_step(bad):
    with pytest.raises(ValueError, match=r"alphas\[2\].*step 2"):
        quadrature([1.0, 2.0, bad], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"betas\[1\].*step 1"):
        quadrature([1.0, 2.0, 3.0], [1.0, bad, 1.0])


@pytest.mark.parametrize(("alphas", "betas"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_wrong_shapes_are_refused(alphas, betas):
    with pytest.raises(ValueError, match="steps"):
        quadrature(alphas, betas)


def test_negative_beta_is_refused_with_its_step():
    with pytest.raises(ValueError, match=r"betas\[0\].*not negative"):
        quadrature([1.0, 2.0], [-1.0, 1.0])
