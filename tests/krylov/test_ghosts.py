"""Ghosts of Lanczos without re-orthogonalisation, on diagonal matrices whose eigenvalues are known."""

import numpy as np
import pytest
from scipy.linalg import eigvalsh_tridiagonal

from jaxhess.krylov.ghosts import classify, find_ghosts, relative_tolerance, unflagged
from jaxhess.krylov.quadrature import Quadrature, quadrature


def _matrices(n):
    """Eigenvalues: two laws at their quantiles, and what makes Lanczos lose orthogonality early."""
    x = np.linspace(-2, 2, 100_001)
    semicircle = _quantiles(x, np.sqrt(4 - x**2), n)
    low, high = (1 - np.sqrt(0.5)) ** 2, (1 + np.sqrt(0.5)) ** 2
    x = np.linspace(low, high, 100_001)
    marchenko_pastur = _quantiles(x, np.sqrt((high - x) * (x - low)) / x, n)
    marchenko_pastur[-5:] = [5, 8, 13, 21, 50]
    rng = np.random.default_rng(1)
    return {
        "semicircle": semicircle,
        "Marchenko-Pastur and outliers": marchenko_pastur,
        "six values": np.repeat([-3.0, -1.0, 0.5, 1.0, 2.0, 7.0], n // 6),
        "six decades": np.concatenate([np.geomspace(1e-6, 1, 40), -np.geomspace(1e-5, 0.3, 17)]),
        "indefinite": np.concatenate([np.linspace(-2, -1, n // 2), np.linspace(1, 2, n // 2), [30.0, -20.0]]),
        "rank-deficient": np.concatenate([np.zeros(n - 30), np.linspace(1, 4, 30)]),
        "bulk far below outliers": np.concatenate([rng.normal(size=n) * 1e-3, [1, 2, 5, 10, 40.0, -1, -0.5]]),
    }


def _quantiles(x, density, n):
    upto = np.cumsum(density)
    return np.interp((np.arange(n) + 0.5) / n, upto / upto[-1], x)


SMALL, LARGE = _matrices(300), _matrices(1998)


def _lanczos(eigenvalues, steps, dtype, seed):
    """The three-term recurrence and nothing else, in `dtype`; eigenvalues are those that `dtype` holds."""
    diagonal = eigenvalues.astype(dtype)
    q = np.random.default_rng(seed).normal(size=diagonal.size).astype(dtype)
    q /= np.linalg.norm(q)
    previous, beta = np.zeros_like(q), dtype(0)
    alphas, betas = [], []
    for _ in range(steps):
        w = diagonal * q - beta * previous
        alpha = w @ q
        w -= alpha * q
        beta = np.linalg.norm(w)
        previous, q = q, w / beta
        alphas.append(alpha)
        betas.append(beta)
    return np.array(alphas, np.float64), np.array(betas, np.float64), np.unique(diagonal.astype(np.float64))


def _runs(name, dtype):
    for size, steps, seeds in ((SMALL, 60, 2), (SMALL, 300, 2), (SMALL, 600, 1), (LARGE, 400, 1)):
        for seed in range(seeds):
            alphas, betas, eigenvalues = _lanczos(size[name], steps, dtype, seed)
            yield alphas, betas, eigenvalues, float(np.finfo(dtype).eps)


def _nearest(theta, eigenvalues):
    distances = np.abs(theta[:, None] - eigenvalues)
    return distances.argmin(1), distances.min(1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SMALL)
def test_flags_are_all_planted_ghosts_and_what_is_left_lies_within_its_bound_of_an_eigenvalue(name, dtype):
    planted = 0
    for alphas, betas, eigenvalues, eps in _runs(name, dtype):
        nodes = quadrature(alphas, betas)
        theta, bounds = nodes.ritz_values, nodes.residual_bounds
        flags, clusters = find_ghosts(alphas, betas, eps)
        tolerance = relative_tolerance(alphas.size, eps) * np.abs(theta).max()
        nearest, distance = _nearest(theta, eigenvalues)
        assert (distance <= bounds + tolerance)[~flags].all()

        # Copies, counted without the library: at an eigenvalue every Ritz value within rounding beyond the first. The
        # tolerance holds for a value outside of clusters. Inside one any two may be twice as far apart, and the
        # heaviest, which stays, may be any of them: it was 1.15 tolerances from 7, with one BLAS and not with another.
        at = distance <= 2 * tolerance
        copies = np.bincount(nearest[at], minlength=eigenvalues.size)
        stayed = np.bincount(nearest[at & ~flags], minlength=eigenvalues.size)
        planted += np.maximum(copies - 1, 0).sum()
        assert stayed.max() <= 1
        # No eigenvalue is lost to a flag, where the probe sees it and rounding tells it from the next: of its cluster
        # one value stays, nearer to it than to any other. Not always within the tolerance: the heaviest copy may be one
        # that has not converged, and its residual bound can be several tolerances.
        gap = np.diff(eigenvalues, prepend=-np.inf, append=np.inf)
        alone = np.minimum(gap[:-1], gap[1:]) > 8 * tolerance
        weight = np.bincount(nearest[at], nodes.weights[at], eigenvalues.size)
        near = np.bincount(nearest[~flags & (distance <= 4 * tolerance)], minlength=eigenvalues.size)
        assert (near[alone & (weight > 1e-12)] >= 1).all()

        # Converged Ritz values that stay are different eigenvalues.
        converged = nearest[~flags & (bounds <= tolerance)]
        assert np.unique(converged).size == converged.size

        assert clusters.weights.sum() == pytest.approx(1, abs=1e-13)
        assert clusters.copies.sum() == theta.size
        assert (~flags).sum() == clusters.copies.size - clusters.spurious.sum()
    assert planted > 100


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outliers_are_counted_once_each_with_the_weight_of_the_probe_on_them(dtype):
    eigenvalues = SMALL["bulk far below outliers"]
    outliers = np.sort(eigenvalues[np.abs(eigenvalues) > 0.1])
    eps = float(np.finfo(dtype).eps)
    start = np.random.default_rng(0).normal(size=eigenvalues.size).astype(dtype).astype(np.float64) ** 2
    alphas, betas, _ = _lanczos(eigenvalues, 100, dtype, 0)
    found, clusters = find_ghosts(alphas, betas, eps)
    beyond = (np.abs(clusters.values) > 0.1) & ~clusters.spurious
    tolerance = relative_tolerance(100, eps) * 40
    np.testing.assert_allclose(clusters.values[beyond], outliers, atol=tolerance)
    weights = start[np.argsort(eigenvalues)] / start.sum()
    expected = weights[np.abs(np.sort(eigenvalues)) > 0.1]
    # Rounding turns an eigenvector by at most its size over the gap to the next eigenvalue, here one half.
    np.testing.assert_allclose(clusters.weights[beyond], expected, rtol=2 * tolerance / 0.5)
    assert found.sum() > 50
    assert clusters.copies[beyond].max() > 10


@pytest.mark.parametrize("name", SMALL)
def test_spurious_values_are_eigenvalues_of_t_without_its_first_row_and_column(name):
    seen = 0
    for alphas, betas, _, eps in _runs(name, np.float32):
        nodes = quadrature(alphas, betas)
        flags, clusters = classify(nodes, eps)
        shortened = eigvalsh_tridiagonal(alphas[1:], betas[1:-1])
        size = np.abs(nodes.ritz_values).max()
        # With s the eigenvector of T without its first entry s_1, |(T' - theta) s| = beta_1 |s_1|, and s_1 is rounding.
        reach = betas[0] * 2.0**-26 / np.sqrt(1 - 2.0**-52) + alphas.size * 2.0**-52 * size
        spurious = clusters.values[clusters.spurious]
        assert (_nearest(spurious, shortened)[1] <= reach).all() if spurious.size else True
        assert (clusters.copies[clusters.spurious] == 1).all()
        assert flags[np.isin(nodes.ritz_values, spurious)].all()
        seen += spurious.size
    assert seen > 3


def test_planted_spurious_value_is_flagged_and_the_outlier_of_a_huge_model_is_not():
    # First row coupled by rounding only: 5 and 7 are eigenvalues of both matrices, 1 of the whole one.
    flags, clusters = find_ghosts([1.0, 5.0, 7.0], [1e-9, 1e-3, 0.5], 2.0**-23)
    assert flags.tolist() == [False, True, True]
    assert clusters.spurious.tolist() == flags.tolist()
    # A lone eigenvalue of 1e12 parameters carries 1e-12 of a probe, far below float32's rounding.
    theta, weights = np.array([0.0, 0.01, 1.0]), np.array([0.4, 0.6 - 1e-12, 1e-12])
    tridiagonal = _from_measure(theta, weights)
    flags, clusters = find_ghosts(*tridiagonal, 2.0**-23)
    np.testing.assert_allclose(clusters.weights[-1], 1e-12, rtol=1e-3)
    assert not flags.any()


def _from_measure(theta, weights):
    """alphas and betas of the measure, by Lanczos in extended precision from the square roots of the weights."""
    theta, q = theta.astype(np.longdouble), np.sqrt(weights.astype(np.longdouble))
    basis, alphas, betas = [q], [], []
    for _ in range(theta.size):
        w = theta * basis[-1]
        alphas.append(w @ basis[-1])
        for _ in range(2):
            w = w - sum((w @ b) * b for b in basis)
        betas.append(np.sqrt(w @ w))
        basis.append(w / betas[-1])
    return np.array(alphas, np.float64), np.append(np.array(betas[:-1], np.float64), 0.0)


def test_cluster_is_the_weighted_mean_and_the_heaviest_member_stays():
    theta = np.array([-2.0, 1.0 - 1e-7, 1.0, 1.0 + 2e-7, 3.0])
    weights = np.array([0.25, 1e-9, 0.3, 0.2, 0.25 - 1e-9])
    bounds = np.array([0.5, 1e-9, 1e-8, 1e-3, 0.0])
    flags, clusters = classify(_nodes(theta, weights, bounds), 2.0**-23)
    assert flags.tolist() == [False, True, False, True, False]
    assert clusters.copies.tolist() == [1, 3, 1]
    np.testing.assert_allclose(clusters.values, [-2, 1 + (0.2 * 2e-7 - 1e-16) / 0.5, 3], rtol=1e-14)
    np.testing.assert_allclose(clusters.weights, [0.25, 0.5 + 1e-9, 0.25 - 1e-9], rtol=1e-14)
    np.testing.assert_allclose(clusters.residual_bounds, [0.5, 1e-8 + 0.2 * 2e-7 / 0.5, 0.0], rtol=1e-6)
    # The same values in float64 are three eigenvalues.
    assert not classify(_nodes(theta, weights, bounds), 2.0**-52).flags.any()


def _nodes(theta, weights, bounds):
    return Quadrature(theta, weights, bounds, np.zeros_like(theta))


@pytest.mark.parametrize("factor", [1e-200, 1e-7, 1e200])
def test_flags_do_not_depend_on_the_scale_or_the_sign_of_the_operator(factor):
    alphas, betas, _ = _lanczos(SMALL["indefinite"], 200, np.float32, 0)
    plain = find_ghosts(alphas, betas)
    scaled = find_ghosts(alphas * factor, betas * factor)
    np.testing.assert_array_equal(scaled.flags, plain.flags)
    np.testing.assert_allclose(scaled.clusters.values / factor, plain.clusters.values, rtol=1e-8, atol=1e-12)
    mirrored = find_ghosts(-alphas, betas)
    assert mirrored.flags.sum() == plain.flags.sum() > 50


def test_bulk_within_rounding_of_the_largest_value_merges_and_keeps_its_weight():
    theta = np.concatenate([np.linspace(-1e-7, 1e-7, 9), [1.0]])
    weights = np.append(np.full(9, 0.11), 0.01)
    flags, clusters = classify(_nodes(theta, weights, np.zeros(10)), 2.0**-23)
    assert clusters.copies.tolist() == [9, 1]
    np.testing.assert_allclose(clusters.weights, [0.99, 0.01], rtol=1e-12)
    assert flags.sum() == 8


def test_zero_operator_and_one_step_have_no_tolerance_to_divide_by():
    assert find_ghosts([3.0], [0.5]).flags.tolist() == [False]
    flags, clusters = find_ghosts(np.zeros(3), np.zeros(3))
    assert flags.sum() == 2
    assert clusters.values.tolist() == [0.0]
    assert clusters.weights.tolist() == [1.0]


def test_without_flags_every_value_is_a_cluster():
    alphas, betas, _ = _lanczos(SMALL["semicircle"], 200, np.float32, 0)
    nodes = quadrature(alphas, betas)
    flags, clusters = unflagged(nodes)
    assert not flags.any()
    np.testing.assert_array_equal(clusters.values, nodes.ritz_values)
    np.testing.assert_array_equal(clusters.weights, nodes.weights)


@pytest.mark.parametrize("rounding", [0.0, -1e-7, 1.0, np.nan])
def test_bad_rounding_is_refused(rounding):
    with pytest.raises(ValueError, match="rounding must be"):
        find_ghosts([1.0], [0.0], rounding)


def test_recurrence_column_errors_are_the_rounding_that_the_tolerance_takes_them_for():
    """|A q_j - beta_{j-1} q_{j-1} - alpha_j q_j - beta_j q_{j+1}| <= 1.2 eps |A|, in extended precision."""
    worst = 0.0
    for dtype in (np.float32, np.float64):
        for eigenvalues in SMALL.values():
            diagonal = eigenvalues.astype(dtype)
            exact, wide = diagonal.astype(np.longdouble), np.longdouble
            q = np.random.default_rng(0).normal(size=diagonal.size).astype(dtype)
            q /= np.linalg.norm(q)
            previous, beta = np.zeros_like(q), dtype(0)
            for _ in range(100):
                w = diagonal * q - beta * previous
                alpha = w @ q
                w -= alpha * q
                following = np.linalg.norm(w)
                error = exact * q - wide(beta) * previous - wide(alpha) * q - wide(following) * (w / following)
                worst = max(worst, float(np.linalg.norm(error) / np.finfo(dtype).eps / np.abs(exact).max()))
                previous, q, beta = q, w / following, following
    assert 0.3 < worst <= 1.2
