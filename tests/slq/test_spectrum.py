"""Moments, extremes and ghosts of a spectrum against dense matrices of known spectrum."""

import numpy as np
import pytest
from known_spectra import (
    EIGENVALUES,
    EXACT,
    interval_of,
    run_record,
    sampled,
)
from scipy.stats import t as student
from small_models import diagonal_lanczos

from jaxhess.results.summary import checks, summary
from jaxhess.slq.record import Probes, RunRecord
from jaxhess.slq.spectrum import Spectrum


def _one_step(vector, eigenvalues):
    alpha = vector @ (eigenvalues * vector)
    return alpha, np.linalg.norm(eigenvalues * vector - alpha * vector)


def test_moments_agree_with_the_dense_traces_within_standard_errors():
    spectrum = sampled(probes=40, steps=3)
    for k in range(7):
        estimate = spectrum.moment(k)
        if k == 5:  # Odd, and its square is beyond degree 6.
            assert np.isnan(estimate.interval()).all()
            continue
        # A false alarm in 1e4 (normal) for each of the moments; k = 0 is exact.
        low, high = estimate.interval(0.9999)
        assert low - 1e-14 <= np.mean(EIGENVALUES**k) <= high + 1e-14
    assert 0 < spectrum.moment(1).standard_error < 0.1


def test_full_krylov_space_gives_each_probe_the_exact_quadratic_forms():
    spectrum = sampled(probes=1, steps=EIGENVALUES.size)
    np.testing.assert_allclose(spectrum.ritz_values[0], np.sort(EIGENVALUES), atol=1e-13)
    assert spectrum.broke_down.all()
    assert spectrum.exact_degree is None
    np.testing.assert_allclose(
        spectrum.moment(100).value, spectrum.weights[0] @ np.sort(EIGENVALUES) ** 100, rtol=1e-11
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_moment_of_degree_2m_is_exact_and_beyond_is_refused(steps):
    short, long = sampled(probes=3, steps=steps), sampled(probes=3, steps=20)
    for k in range(2 * steps + 1):
        np.testing.assert_allclose(short.moment(k).value, long.moment(k).value, rtol=1e-12, atol=1e-15)
        if 4 * k < 2 * steps:  # Up to there the error and its own error are moments that few steps know exactly.
            np.testing.assert_allclose(
                interval_of(short.moment(k)), interval_of(long.moment(k)), rtol=1e-10, atol=1e-15
            )
    with pytest.raises(ValueError, match=f"moment {2 * steps + 1} .* at least {steps + 1} steps"):
        short.moment(2 * steps + 1)
    with pytest.raises(ValueError, match="integer"):
        short.moment(-1)


def test_single_probe_error_is_the_spread_between_probes_on_the_sphere():
    rng = np.random.default_rng(3)
    eigenvalues = rng.normal(size=300) + 1
    vectors = rng.normal(size=(400, 300))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    coefficients = np.array([_one_step(vector, eigenvalues) for vector in vectors])
    single = [Spectrum([[a]], [[b]], [1], 300).trace() for a, b in coefficients]
    exact = np.sqrt(2 * 300 / 302 * (np.sum(eigenvalues**2) - np.sum(eigenvalues) ** 2 / 300))
    # The plug-in lacks a fraction 2/302 of the variance; 400 probes know their own std to 1/sqrt(800) = 3.5%.
    assert np.sqrt(np.mean([e.standard_error**2 for e in single])) == pytest.approx(exact, rel=0.02)
    assert np.std([e.value for e in single]) == pytest.approx(exact, rel=0.14)
    together = Spectrum(coefficients[:, :1], coefficients[:, 1:], np.ones(400, int), 300).trace()
    assert together.standard_error == pytest.approx(exact / 20, rel=0.14)


def test_single_probe_error_is_unknown_beyond_the_known_degree():
    spectrum = sampled(probes=1, steps=2)
    assert np.isfinite(spectrum.moment(2).standard_error)
    assert np.isnan(spectrum.moment(3).standard_error)


def test_frobenius_norm_and_trace_agree_with_the_dense_matrix_from_one_step_on():
    for steps in (1, 5):
        spectrum = sampled(probes=60, steps=steps, seed=steps)
        norm_, trace = spectrum.frobenius_norm(), spectrum.trace()
        assert abs(norm_.value - np.linalg.norm(EIGENVALUES)) < 4 * norm_.standard_error < norm_.value
        assert abs(trace.value - EIGENVALUES.sum()) < 4 * trace.standard_error
        squares = spectrum.alphas[:, 0] ** 2 + spectrum.betas[:, 0] ** 2
        # One step does not know fourth moments: the scatter of 60 probes, corrected for skew. More steps know them.
        c = 1 / (squares.mean() ** 2 / np.var(squares, ddof=1) - 1 / 60)
        scatter = squares.mean() * np.sqrt(c / 60)
        second, fourth = squares.mean(), max(spectrum.moment(2 * min(steps, 2)).value, squares.mean() ** 2)
        sphere = np.sqrt(2 * (fourth - second**2) / (57 * 60 - 2))
        expected = np.sqrt(55) / (2 * np.sqrt(second)) * (scatter if steps == 1 else sphere)
        assert norm_.standard_error == pytest.approx(expected, rel=1e-10)


def test_extremes_lie_within_their_bounds_of_an_eigenvalue():
    spectrum = sampled(probes=5, steps=7)
    smallest, largest = spectrum.extreme()
    for found, true, per_probe in (
        (smallest, -3.0, np.nanmin(spectrum.ritz_values, 1)),
        (largest, 5.0, np.nanmax(spectrum.ritz_values, 1)),
    ):
        assert abs(found.value - true) <= found.residual_bound + 1e-14
        assert found.spread == pytest.approx(np.std(per_probe, ddof=1))
    assert smallest.value == spectrum.ritz_values.min()
    assert largest.value == spectrum.ritz_values.max()
    assert np.isnan(sampled(1, 7).extreme().largest.spread)


def test_checks_hold_to_rounding_and_notice_wrong_weights():
    spectrum = sampled(probes=3, steps=10)
    assert max(checks(spectrum).values()) < 1e-13
    assert set(checks(sampled(1, 1))) == {"sum_weights", "first_moment"}
    spectrum.__dict__["weights"] = spectrum.weights * 1.01
    assert all(violation > 1e-4 for violation in checks(spectrum).values())
    assert checks(spectrum)["sum_weights"] == pytest.approx(0.01)


def test_breakdown_pads_and_ignores_what_lies_beyond():
    alphas, betas = np.array([[1.0, 2.0, 3.0], [1.0, 99.0, np.nan]]), np.array([[1.0, 1.0, 0.5], [0.0, -5.0, np.inf]])
    spectrum = Spectrum(alphas, betas, [3, 1], dim=9)
    assert spectrum.broke_down.tolist() == [False, True]
    assert np.isnan(spectrum.alphas[1, 1:]).all()
    assert np.isnan(spectrum.betas[1, 1:]).all()
    for field in (spectrum.ritz_values, spectrum.residual_bounds):
        assert np.isnan(field[1, 1:]).all()
        assert np.isfinite(field[0]).all()
    assert spectrum.weights[1].tolist() == [1, 0, 0]
    assert spectrum.ritz_values[1, 0] == 1
    assert spectrum.exact_degree == 6
    # The broken-down probe knows all moments, the other one e_1'T^6 e_1 with the next row of T, which degree 6 needs.
    extended = np.diag([1.0, 2.0, 3.0, 0.0]) + np.diag([1.0, 1.0, 0.5], 1) + np.diag([1.0, 1.0, 0.5], -1)
    assert spectrum.moment(6).value == pytest.approx((np.linalg.matrix_power(extended, 6)[0, 0] + 1) / 2)
    np.testing.assert_allclose(spectrum.density(points=50).mass.sum(1), 1, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": [1.0, 2.0]}, "probes, steps"),
        ({"betas": [[1.0]]}, "probes, steps"),
        ({"sizes": [1]}, "sizes"),
        ({"sizes": [0, 2]}, "sizes"),
        ({"sizes": [3, 2]}, "sizes"),
        ({"dim": 0}, "dim"),
        ({"alphas": [[1.0, 2.0], [1.0, np.nan]]}, "probe 1 step 1"),
        ({"betas": [[1.0, 2.0], [-1.0, 2.0]]}, "probe 1 step 0"),
    ],
)
def test_bad_coefficients_are_refused_by_name(changes, message):
    good = {"alphas": [[1.0, 2.0]] * 2, "betas": [[1.0, 2.0]] * 2, "sizes": [2, 2], "dim": 5}
    Spectrum(**good)
    with pytest.raises(ValueError, match=message):
        Spectrum(**{**good, **changes})


def test_coefficients_cannot_be_changed_under_the_cached_quadrature():
    with pytest.raises(ValueError, match="read-only"):
        sampled(1, 2).alphas[0, 0] = 3.0


def _ghostly(probes=2, steps=80, **facts):
    eigenvalues = np.concatenate([np.random.default_rng(5).normal(size=300) * 1e-2, [-1.0, 2.0, 5.0, 10.0]])
    start = np.random.default_rng(0).normal(size=(probes, eigenvalues.size))
    coefficients = diagonal_lanczos(eigenvalues, start, steps, np.float32, orthogonal=False)
    return Spectrum(*coefficients, np.full(probes, steps), eigenvalues.size, **facts)


def test_ghosts_are_flagged_per_probe_and_clusters_keep_all_the_weight():
    spectrum = _ghostly()
    assert spectrum.ghosts.shape == spectrum.alphas.shape
    assert summary(spectrum)["num_ghosts"] == spectrum.ghosts.sum() > 50
    for probe in range(2):
        clusters = spectrum.clusters(probe)
        outliers = (np.abs(clusters.values) > 0.1) & ~clusters.spurious
        np.testing.assert_allclose(clusters.values[outliers], [-1, 2, 5, 10], atol=2e-5)
        assert clusters.weights.sum() == pytest.approx(1, abs=1e-14)
        assert (~spectrum.ghosts[probe]).sum() == (~clusters.spurious).sum()
    double = Spectrum(spectrum.alphas, spectrum.betas, spectrum.sizes, spectrum.dim, run=EXACT)
    assert double.ghosts.sum() < spectrum.ghosts.sum()
    short = Spectrum(spectrum.alphas, spectrum.betas, [80, 40], spectrum.dim)
    assert not short.ghosts[1, 40:].any()


@pytest.mark.parametrize(
    ("run", "flagged"),
    [
        ({}, True),
        ({"reorthogonalize": "none"}, True),
        ({"reorthogonalize": 10, "orthogonality": [1e-6, 1e-6]}, True),  # of a window, not of all vectors
        ({"reorthogonalize": "full"}, False),
        ({"reorthogonalize": "full", "orthogonality": [1e-6, np.nan]}, False),
        ({"reorthogonalize": "full", "orthogonality": [0.5, 0.5]}, True),
    ],
)
def test_vectors_that_are_known_to_be_independent_leave_no_ghosts(run, flagged):
    spectrum = _ghostly(run=run_record(**run))
    assert spectrum.ghosts.any(1).tolist() == [flagged, flagged]
    assert (spectrum.clusters(0).copies.max() > 1) == flagged


def test_full_reorthogonalisation_counts_close_eigenvalues_that_rounding_alone_would_merge():
    eigenvalues = np.concatenate([np.linspace(0, 1e-6, 20), [1.0]])
    start = np.random.default_rng(0).normal(size=(1, 21))
    coefficients = diagonal_lanczos(eigenvalues, start, 21)
    plain = Spectrum(*coefficients, [21], 21)
    full = Spectrum(*coefficients, [21], 21, run=run_record("full"))
    assert plain.clusters(0).copies.tolist() == [20, 1]
    assert full.clusters(0).copies.tolist() == [1] * 21
    np.testing.assert_allclose(full.clusters(0).values, eigenvalues, atol=1e-14)


def test_error_has_as_many_degrees_of_freedom_as_probes_where_one_eigenvalue_dominates_and_many_for_a_bulk():
    rng = np.random.default_rng(0)
    bulk, alone = rng.normal(size=400) + 1, np.append(rng.normal(size=399) * 1e-3, 50.0)
    for eigenvalues, least, most in ((bulk, 200, np.inf), (alone, 4, 20)):
        spectrum = Spectrum(*diagonal_lanczos(eigenvalues, rng.normal(size=(4, 400)), 10), [10] * 4, 400)
        variance = spectrum.moment(2).value - spectrum.moment(1).value ** 2
        plain = 400 * np.sqrt(2 * variance / (402 * 4 - 2))
        trace = spectrum.trace()
        assert trace.standard_error == pytest.approx(plain)
        assert least <= trace.freedom <= most
        half = student.ppf(0.975, trace.freedom) * plain
        np.testing.assert_allclose(trace.interval(), [trace.value - half, trace.value + half])


def test_random_signs_on_a_diagonal_matrix_have_no_error_and_say_so():
    n = EIGENVALUES.size
    start = np.random.default_rng(0).choice([-1.0, 1.0], (4, n))
    coefficients = diagonal_lanczos(EIGENVALUES, start, 10)
    signs = Spectrum(*coefficients, [10] * 4, n, run=RunRecord(Probes(distribution="rademacher")))
    assert signs.trace().standard_error < 1e-10
    assert signs.trace().value == pytest.approx(EIGENVALUES.sum(), abs=1e-10)
