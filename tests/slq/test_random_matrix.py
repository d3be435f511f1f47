"""Limit laws of random matrices against their moments, each other, and sampled matrices."""

import numpy as np
import pytest

from jaxhess import InputError, generalized_marchenko_pastur, marchenko_pastur, semicircle

RATIOS = [0.1, 0.5, 1.0, 2.0, 6.0]


def angles(a: float, b: float, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Places in [a, b] and weights with which a sum is the integral: exponentially accurate for square-root edges."""
    theta = (np.arange(count) + 0.5) * np.pi / count
    return (a + b) / 2 - (b - a) / 2 * np.cos(theta), (b - a) / 2 * np.sin(theta) * np.pi / count


def test_semicircle_has_mass_one_and_the_moments_of_catalan():
    x, weights = angles(-2 * np.sqrt(3), 2 * np.sqrt(3))
    density = semicircle(x, variance=3).density
    moments = [weights @ (density * x**k) for k in range(7)]
    np.testing.assert_allclose(moments, [1, 0, 3, 0, 2 * 3**2, 0, 5 * 3**3], atol=1e-9)
    np.testing.assert_allclose(np.cumsum(weights * density), semicircle(x, 3).distribution, atol=1 / 4000)


@pytest.mark.parametrize("ratio", RATIOS)
def test_marchenko_pastur_has_mass_one_and_its_moments(ratio):
    """Moments of Narayana: 1, 1 + r, 1 + 3r + r². With r = 1 the sum has the error of 1/√x at zero, of one place."""
    x, weights = angles(2 * (1 - np.sqrt(ratio)) ** 2, 2 * (1 + np.sqrt(ratio)) ** 2)
    law = marchenko_pastur(x, ratio, variance=2)
    moments = [weights @ (law.density * x**k) for k in range(4)]
    expected = [1 - law.atom, 2, 4 * (1 + ratio), 8 * (1 + 3 * ratio + ratio**2)]
    np.testing.assert_allclose(moments, expected, rtol=1e-9)
    assert law.atom == max(0, 1 - 1 / ratio)
    halfway = np.cumsum(weights * law.density) - weights * law.density / 2 + law.atom
    np.testing.assert_allclose(law.distribution, halfway, atol=1e-3)
    ends = marchenko_pastur([-1e-9, 0, 100], ratio, 2).distribution
    np.testing.assert_allclose(ends, [0, law.atom, 1], atol=1e-12)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_generalised_law_of_the_identity_is_marchenko_pastur(ratio):
    """The error at height y is of order y inside, and √y = 1e-5 of the peak at an edge, or at 0 where r = 1."""
    a, b = 3 * (1 - np.sqrt(ratio)) ** 2, 3 * (1 + np.sqrt(ratio)) ** 2
    inside = np.linspace(a, b, 203)[1:-1]
    x = np.concatenate([[-b, 0, a, b, 2 * b], inside])
    known, found = marchenko_pastur(x, ratio, 3), generalized_marchenko_pastur(x, ratio, [3.0, 3.0], [0.25, 0.75])
    assert found.atom == known.atom
    finite = np.isfinite(known.density)
    peak = known.density[finite].max()
    np.testing.assert_allclose(found.density[finite], known.density[finite], atol=1e-3 * peak)
    np.testing.assert_allclose(found.density[5:], known.density[5:], atol=1e-7 * peak)
    np.testing.assert_allclose(found.distribution[5:], known.distribution[5:], atol=1e-8)
    np.testing.assert_allclose(found.distribution, known.distribution, atol=2e-5)


def test_the_generalised_law_has_its_mass_and_moments_with_values_of_both_signs_and_zeros():
    """E t = E λ and E t² = (E λ)² + ratio E λ²; by parts over the distribution: trapezoids err by h² times slopes."""
    values, weights, ratio = np.array([-2.0, 0.0, 1.0, 4.0]), np.array([0.2, 0.4, 0.3, 0.1]), 1.5
    x = np.linspace(-12, 24, 2001)
    law = generalized_marchenko_pastur(x, ratio, values, weights)
    assert law.atom == pytest.approx(1 - 0.6 / 1.5)
    upto = np.where(x >= 0, law.distribution - law.atom, law.distribution)  # without the step, whose moments are zero
    first, second = values @ weights, (values @ weights) ** 2 + ratio * values**2 @ weights
    step, mass = np.diff(x)[0], 1 - law.atom
    error = step**2 * np.ptp(x) * law.density.max()
    np.testing.assert_allclose(upto[[0, -1]], [0, mass], atol=1e-8)
    assert x[-1] * mass - np.trapezoid(upto, x) == pytest.approx(first, abs=error)
    assert x[-1] ** 2 * mass - np.trapezoid(2 * x * upto, x) == pytest.approx(second, abs=error * 48)
    # The density is the distribution's slope. Differences err, δ steps from where a square root begins, by 1/(24 δ²).
    slope = (upto[2:] - upto[:-2]) / (2 * step)
    empty = np.convolve(law.density < 1e-6, np.ones(21), "same") > 0
    smooth = ~empty[1:-1]
    assert smooth.sum() > 300
    np.testing.assert_allclose(slope[smooth], law.density[1:-1][smooth], rtol=2 / (24 * 10**2) * 4)


def test_the_law_scales_with_its_values():
    x = np.linspace(-3, 9, 60)
    one = generalized_marchenko_pastur(x, 0.3, [1.0, -0.5])
    tiny = generalized_marchenko_pastur(1e-12 * x, 0.3, [1e-12, -0.5e-12])
    np.testing.assert_allclose(tiny.density * 1e-12, one.density, atol=1e-9)
    np.testing.assert_allclose(tiny.distribution, one.distribution, atol=1e-9)


def test_sampled_matrices_have_these_distributions():
    """Of R matrices with N independent columns, the mean distribution function at x is within ε of its expectation but
    with probability 2 exp(−2 R d² ε²/N) (McDiarmid: a column moves it by 1/d); the expectation is within two
    eigenvalues of the limit. ε here is passed with probability 1e-6."""
    rng, d, N, R = np.random.default_rng(0), 50, 100, 50
    entries = np.where(np.arange(N) < 20, -1.0, np.where(np.arange(N) < 70, 0.5, 4.0))
    x = np.linspace(-1, 8, 40)

    def of(matrices):
        return np.mean([(np.linalg.eigvalsh(m)[:, None] <= x).mean(0) for m in matrices], 0)

    tolerance = np.sqrt(N * np.log(2e6) / (2 * R)) / d + 2 / d
    found = of((X * entries) @ X.T / N for X in rng.normal(size=(R, d, N)))
    assert np.abs(found - generalized_marchenko_pastur(x, d / N, entries).distribution).max() < tolerance
    assert np.abs(found - marchenko_pastur(x, d / N, entries.mean()).distribution).max() > tolerance
    wide = of(X @ X.T / d for X in rng.normal(size=(R, N, d)))
    assert np.abs(wide - marchenko_pastur(x, N / d).distribution).max() < tolerance
    wigner = of((A + A.T) / np.sqrt(2 * N) for A in rng.normal(size=(R, N, N)))
    assert np.abs(wigner - semicircle(x).distribution).max() < tolerance


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: semicircle([0.0], variance=0), "variance must be positive"),
        (lambda: marchenko_pastur([np.nan], 1), "x must be a list of finite numbers"),
        (lambda: marchenko_pastur([0.0], -1), "ratio must be positive"),
        (lambda: generalized_marchenko_pastur([0.0], 1, []), "values must be a list"),
        (lambda: generalized_marchenko_pastur([0.0], 1, [1.0, 2.0], [0.5, 0.6]), "of sum one"),
        (lambda: generalized_marchenko_pastur([0.0], 1, [0.0]), "All values are zero"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
