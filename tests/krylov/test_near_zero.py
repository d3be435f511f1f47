"""Bounds of the mass near zero contain the probe's own, known here exactly, and are the best where those are known."""

import numpy as np
import pytest
from known_spectra import MATRICES, lanczos_of_diagonal
from scipy.optimize import linprog

from jaxhess.krylov.bounds import distribution_bounds
from jaxhess.krylov.ghosts import relative_tolerance
from jaxhess.krylov.near_zero import near_zero_bounds
from jaxhess.krylov.quadrature import quadrature


def _within(eigenvalues, masses, x):
    return np.array([masses[np.abs(eigenvalues) <= y].sum() for y in x])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_bounds_contain_the_mass_of_the_probe_and_are_narrower_than_a_difference(name, dtype):
    eigenvalues = MATRICES[name].astype(dtype).astype(np.float64)
    sizes = np.unique(np.abs(eigenvalues))
    chosen = sizes[np.linspace(0, sizes.size - 1, 12).astype(int)]
    x = np.concatenate([chosen, chosen * 1.01, chosen * 0.99, [0.0, 2 * sizes[-1], np.inf]])
    for steps in (1, 2, 3, 20, 60):
        alphas, betas, masses, broke = lanczos_of_diagonal(MATRICES[name], steps, dtype, seed=steps)
        theta, weights, *_ = quadrature(alphas, betas)
        slack = relative_tolerance(theta.size, float(np.finfo(dtype).eps)) * np.abs(theta).max() + broke * betas[-1]
        low, high = near_zero_bounds(alphas, betas, x, slack, broke)
        true = _within(eigenvalues, masses, x)
        # As in test_bounds: across a gap, rounding moves mass by at most the slack over it.
        beside = np.abs(sizes[:, None] - x)
        gap = np.where(beside > slack, beside, np.inf).min(0)
        moved = 4 * slack / gap * np.sqrt(np.abs(true * (1 - true))) + 1e-14 * theta.size
        clear = np.ones_like(x, bool)
        if broke:  # Eigenvalues within the slack are one node: compare where none is.
            clear = gap > 4 * slack
        assert (low <= true + moved)[clear].all()
        assert (true <= high + moved)[clear].all()
        assert (low <= high).all()
        upto, below = (distribution_bounds(theta, weights, y, slack, broke) for y in (x, np.nextafter(-x, -np.inf)))
        difference = np.clip(upto[1] - below[0], 0, 1) - np.clip(upto[0] - below[1], 0, 1)
        assert (high - low <= difference + 1e-6)[clear].all()  # the squares are blurred by 1e-15 of the largest
        if steps < 20:
            assert (high - low).mean() < 0.95 * difference.mean()
    assert (high - low).mean() < 0.5


def test_one_step_gives_the_inequalities_of_chebyshev_and_cantelli():
    low, high = near_zero_bounds([3.0], [4.0], [1.0, 5.0, 10.0, 50.0])
    np.testing.assert_allclose(low, [0, 0, 1 - 25 / 100, 1 - 25 / 2500], atol=1e-13)
    np.testing.assert_allclose(high, [1 - 4 / (16 + 4), 1, 1, 1], atol=1e-13)


@pytest.mark.parametrize("last", [0.7, np.nan])
def test_symmetric_measures_have_the_best_bounds_there_are(last):
    """A linear program over measures on a grid with the same moments; for a symmetric one the even moments suffice."""
    alphas, betas = np.zeros(4), np.array([1.0, 0.5, 0.8, last])
    matrix = np.diag(np.append(alphas, 0.0)) + np.diag(np.nan_to_num(betas), 1) + np.diag(np.nan_to_num(betas), -1)
    degree = 7 if np.isnan(last) else 8
    x = np.array([0.35, 0.8, 1.3])
    low, high = near_zero_bounds(alphas, betas, x)
    grid = np.linspace(-4, 4, 3201)
    chebyshev = np.polynomial.chebyshev.chebvander(grid / 4, degree).T
    values, vectors = np.linalg.eigh(matrix)
    moments = np.polynomial.chebyshev.chebvander(values / 4, degree).T @ vectors[0] ** 2
    for y, least, most in zip(x, low, high, strict=True):
        inside = (np.abs(grid) < y - 1e-9).astype(float), (np.abs(grid) <= y + 1e-9).astype(float)
        found = [linprog(c, A_eq=chebyshev, b_eq=moments, bounds=(0, None)) for c in (inside[0], -inside[1])]
        # The measures on the grid are some of those that the bounds are for, and come close to the worst of them.
        assert least - 1e-7 <= found[0].fun <= least + 0.02
        assert most - 0.02 <= -found[1].fun <= most + 1e-7


def test_a_cluster_at_zero_is_counted_after_a_breakdown_and_nearly_so_before():
    eigenvalues = np.concatenate([np.zeros(950), np.linspace(1, 2, 25), np.linspace(-2, -1, 25)])
    for steps, width in ((2, 0.9), (20, 1e-3), (80, 1e-13)):
        alphas, betas, masses, broke = lanczos_of_diagonal(eigenvalues, steps, np.float64, seed=0)
        slack = 1e-13 + broke * betas[-1]
        low, high = near_zero_bounds(alphas, betas, [0.5], slack, broke)
        assert low[0] - 1e-12 <= masses[:950].sum() <= high[0] + 1e-12
        assert high[0] - low[0] < width
    assert broke


def test_a_node_at_the_distance_itself_and_distances_in_any_order():
    alphas, betas = np.array([0.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0])  # Ritz values 0 and +-sqrt(2)
    x = np.array([np.sqrt(2), 0.0, 1.0, np.inf, 1e-300])
    low, high = near_zero_bounds(alphas, betas, x)
    assert low[3] == high[3] == 1
    order = np.argsort(x)
    assert (np.diff(low[order]) >= 0).all()
    assert (np.diff(high[order]) >= 0).all()
    np.testing.assert_allclose(near_zero_bounds(alphas, betas, x[order]), (low[order], high[order]))
    assert [list(bound) for bound in near_zero_bounds([0.0], [0.0], [0.0, 1.0])] == [[0, 0], [1, 1]]
    assert [list(bound) for bound in near_zero_bounds([0.0], [0.0], [0.0], exhausted=True)] == [[1], [1]]


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_the_unit_of_eigenvalues_does_not_matter(scale):
    alphas, betas, x = np.array([0.1, -0.2, 0.3, 2.0]), np.array([0.4, 0.5, 0.2, 0.3]), np.array([0.05, 0.3, 1.0, 3.0])
    expected = near_zero_bounds(alphas, betas, x, 1e-9)
    found = near_zero_bounds(scale * alphas, scale * betas, scale * x, scale * 1e-9)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [-1.0]}, "not negative"),
        ({"x": [np.nan]}, "not negative"),
        ({"x": 1.0}, "list"),
        ({"slack": -1.0}, "slack"),
        ({"alphas": [np.inf]}, "finite"),
        ({"betas": [1.0, 2.0]}, "steps"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    good = {"alphas": [1.0], "betas": [1.0], "x": [0.5], "slack": 0.0}
    with pytest.raises(ValueError, match=message):
        near_zero_bounds(**{**good, **changes})
