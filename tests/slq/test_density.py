"""Densities and distributions of eigenvalues, with their bands, against matrices of known spectrum."""

import numpy as np
import pytest
from known_spectra import (
    EIGENVALUES,
    EXACT,
    forward,
    interval_of,
    llm_like,
    masses,
    of_diagonal,
    sampled,
)
from scipy.stats import norm
from small_models import diagonal_lanczos

from jaxhess.slq.spectrum import Spectrum


@pytest.mark.parametrize("width", [None, 1e-9, 1e-3, 1.0, 1e2])
@pytest.mark.parametrize("axis", ["symlog", "linear"])
def test_mass_of_every_probe_is_one_at_any_width(axis, width):
    density = sampled(probes=3, steps=20).density(points=64, axis=axis, width=width)
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    assert (density.mass >= 0).all()
    assert np.sum(density.density * np.diff(density.edges)) == pytest.approx(1, abs=1e-13)


def test_mass_is_the_gaussian_mixture_in_the_axis_coordinate():
    spectrum = sampled(probes=2, steps=8)
    for axis, linthresh in (("linear", None), ("symlog", 0.3)):
        density = spectrum.density(points=30, axis=axis, width=0.2, linthresh=linthresh)
        forward = (lambda x: x) if axis == "linear" else lambda x: np.arcsinh(x / 0.3)
        edges, nodes = forward(density.edges), forward(spectrum.ritz_values)
        upto = (spectrum.weights[..., None] * norm.cdf((edges - nodes[..., None]) / 0.2)).sum(1)
        np.testing.assert_allclose(density.mass[:, 1:-1], np.diff(upto)[:, 1:-1], atol=1e-13)
        np.testing.assert_allclose(density.mass[:, 0], upto[:, 1], atol=1e-13)
        np.testing.assert_allclose(np.diff(edges), np.ptp(edges) / 30, rtol=1e-10)
        assert np.all((forward(density.centers) > edges[:-1]) & (forward(density.centers) < edges[1:]))


def test_grid_spans_the_extremes_of_all_probes():
    density = Spectrum([[-5.0], [1.0], [40.0]], [[0.0]] * 3, [1, 1, 1], 3).density()
    assert density.edges[0] < -5
    assert density.edges[-1] > 40


@pytest.mark.parametrize("axis", ["symlog", "linear"])
@pytest.mark.parametrize("factor", [1e-30, 1e-7, 1e30])
def test_density_is_equivariant_under_scaling(axis, factor):
    plain = sampled(probes=3, steps=12)
    scaled = Spectrum(plain.alphas * factor, plain.betas * factor, plain.sizes, plain.dim)
    one, other = plain.density(axis=axis), scaled.density(axis=axis)
    np.testing.assert_allclose(other.edges / factor, one.edges, rtol=1e-9, atol=1e-12)
    # Moving an edge by a rounding error moves mass by the density there.
    np.testing.assert_allclose(other.mass, one.mass, atol=1e-11)
    np.testing.assert_allclose(other.bounds, one.bounds, atol=1e-11)
    np.testing.assert_allclose(interval_of(scaled.trace()), interval_of(plain.trace().times(factor)), rtol=1e-10)
    np.testing.assert_allclose(
        interval_of(scaled.frobenius_norm()), interval_of(plain.frobenius_norm().times(factor)), rtol=1e-10
    )


@pytest.mark.parametrize("axis", ["symlog", "linear"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e-12, 1e20])
def test_a_spectrum_of_one_point_has_a_grid_around_it(axis, value):
    spectrum = Spectrum([[value, value], [value, value]], np.zeros((2, 2)), [1, 2], dim=4)
    density = spectrum.density(points=41, axis=axis)
    assert (np.diff(density.edges) > 0).all()
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    peak = density.mean.argmax()
    assert density.edges[peak] <= value <= density.edges[peak + 1]


def test_symlog_threshold_is_not_zero_when_most_eigenvalues_are():
    spectrum = sampled(probes=2, steps=3, eigenvalues=np.append(np.zeros(30), [1.0, 4.0]))
    exact_zeros = Spectrum([[0.0], [0.0], [2.0]], np.zeros((3, 1)), [1, 1, 1], dim=3)
    assert exact_zeros.density().linthresh == 2
    assert spectrum.density().linthresh >= np.finfo(np.float32).eps * spectrum.ritz_values.max()


@pytest.mark.parametrize(
    "arguments", [{"points": 0}, {"axis": "log"}, {"width": 0.0}, {"width": 1e3}, {"linthresh": -1.0}]
)
def test_density_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sampled(1, 2).density(**arguments)


def test_distribution_bounds_contain_each_probe_and_narrow_with_steps():
    n = EIGENVALUES.size
    start = np.random.default_rng(2).normal(size=(3, n))
    order = np.argsort(EIGENVALUES)
    masses = (start**2 / (start**2).sum(1, keepdims=True))[:, order]
    x = np.sort(np.concatenate([EIGENVALUES, EIGENVALUES - 1e-3, [-9, 9]]))
    true = np.array([[m[EIGENVALUES[order] <= y].sum() for y in x] for m in masses])
    widths = []
    for steps in (2, 8, 30):
        coefficients = diagonal_lanczos(EIGENVALUES, start, steps)
        spectrum = Spectrum(*coefficients, [steps] * 3, n, run=EXACT)
        lower, upper = spectrum.distribution_bounds(x)
        assert lower.shape == upper.shape == (3, x.size)
        assert (lower <= true + 1e-12).all()
        assert (true <= upper + 1e-12).all()
        widths.append((upper - lower).mean())
    assert widths[0] > widths[1] > widths[2]
    # Nothing is left to bound where the Krylov space was exhausted: away from eigenvalues both are the measure.
    alphas, betas = diagonal_lanczos(EIGENVALUES, start, n)
    betas[:, -1] = 0
    clear = np.abs(x[:, None] - EIGENVALUES).min(1) > 1e-10
    for bound in Spectrum(alphas, betas, [n] * 3, n, run=EXACT).distribution_bounds(x[clear]):
        np.testing.assert_allclose(bound, true[:, clear], atol=1e-10)
    with pytest.raises(ValueError, match="one-dimensional"):
        spectrum.distribution_bounds(0.0)


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("kind", ["LLM-like", "semi-definite"])
def test_bands_of_distribution_and_density_hold_the_operator_s_own(kind, steps):
    values, multiplicities = llm_like(10**6)
    if kind == "semi-definite":
        values = np.where(np.arange(values.size) < 400, 0.0, np.abs(values))
    share = multiplicities / multiplicities.sum()
    inside, narrower = [], []
    for seed in range(10):
        coefficients = diagonal_lanczos(values, np.sqrt(masses(values, multiplicities, 2, seed)), steps)
        spectrum = Spectrum(*coefficients, [steps] * 2, int(multiplicities.sum()))
        density = spectrum.density(points=100)
        assert density.reflected == (kind == "semi-definite")
        grid = forward(density.edges, density)
        upto = norm.cdf((grid - forward(values, density)[:, None]) / density.width)
        if density.reflected:
            upto = upto - norm.cdf((-grid - forward(values, density)[:, None]) / density.width)
        upto[:, 0], upto[:, -1] = 0.0, 1.0
        truth = share @ np.diff(upto) / np.diff(density.edges)
        low, high = density.band
        inside.append(((low <= truth * (1 + 1e-9)) & (truth <= high * (1 + 1e-9))).mean())
        x = np.sort(np.append(values, np.linspace(-101, 101, 50)))
        true = np.array([share[values <= y].sum() for y in x])
        low, high = spectrum.distribution_interval(x)
        inside.append(((low <= true + 1e-12) & (true <= high + 1e-12)).mean())
        certain = [bound.mean(0) for bound in spectrum.distribution_bounds(x)]
        narrower.append((low <= certain[0]).all() and (certain[1] <= high + 1e-15).all())
    assert min(inside) >= 0.9
    assert all(narrower)


def test_half_of_a_semidefinite_spectrum_is_not_drawn_below_zero():
    values = np.append(np.zeros(90), np.linspace(0.1, 5, 10))
    coefficients = diagonal_lanczos(values, np.random.default_rng(0).normal(size=(3, 100)), 8)
    density = Spectrum(*coefficients, [8] * 3, 100).density()
    assert density.edges[0] == 0
    np.testing.assert_allclose(density.mass.sum(1), 1, atol=1e-14)
    assert not sampled(probes=2, steps=8).density().reflected
    assert Spectrum(*coefficients, [8] * 3, 100).density(axis="linear").edges[0] == 0


def test_after_a_breakdown_the_spectrum_is_known_up_to_the_slack_only():
    eigenvalues = np.append(np.geomspace(1e-3, 0.1, 199), 1e6)
    found = of_diagonal(eigenvalues, steps=30, probes=8, seed=1)
    assert found.broke_down.all()  # float32 does not resolve the 199 beside a million
    step = found.trace_function(lambda x: (x > 0.01) * 1.0)
    low, high = step.interval()
    assert low <= (eigenvalues > 0.01).sum() <= high
    assert step.bounds[0] < (eigenvalues > 0.01).sum() < step.bounds[1]
    # Within the slack of the smallest Ritz value the logarithm need not exist.
    assert np.isnan(found.log_determinant(1e-3).interval()).all()
    low, high = found.log_determinant(100.0).interval()
    assert low <= np.log(eigenvalues + 100).sum() <= high
    density = found.density()
    grid = forward(density.edges, density)
    upto = norm.cdf((grid - forward(eigenvalues, density)[:, None]) / density.width)
    if density.reflected:
        upto = upto - norm.cdf((-grid - forward(eigenvalues, density)[:, None]) / density.width)
    upto[:, 0], upto[:, -1] = 0.0, 1.0
    truth = np.diff(upto).mean(0) / np.diff(density.edges)
    low, high = density.band
    outside = (truth < low * (1 - 1e-9)) | (truth > high * (1 + 1e-9))
    assert (truth * np.diff(density.edges))[outside].sum() < 1e-9
