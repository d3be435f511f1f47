"""Trace functions and their bounds against matrices of known spectrum."""

import dataclasses
import json

import numpy as np
import pytest
from known_spectra import (
    EIGENVALUES,
    EXACT,
    llm_like,
    masses,
    of_diagonal,
    sampled,
)
from small_models import diagonal_lanczos

from jaxhess.krylov.integrals import integral_bounds
from jaxhess.results.summary import summary
from jaxhess.slq.spectrum import Spectrum


def test_trace_functions_of_polynomials_are_the_moments():
    spectrum = dataclasses.replace(sampled(probes=4, steps=12), run=EXACT)
    for k in range(1, 6):
        found, moment = spectrum.trace_function(lambda theta, k=k: theta**k), spectrum.moment(k).times(spectrum.dim)
        assert found.value == pytest.approx(moment.value, rel=1e-9)
        assert found.standard_error == pytest.approx(moment.standard_error, rel=1e-9)
        # Polynomials leave nothing open but rounding, of sums of up to as many terms as points in all gaps.
        np.testing.assert_allclose(found.bounds, moment.value, atol=1e-9 * 55 * 5.0**k)
    assert spectrum.trace_function(np.ones_like).value == pytest.approx(spectrum.dim)
    assert spectrum.trace_function(np.ones_like).standard_error == pytest.approx(0, abs=1e-10)


def test_trace_functions_are_exact_where_the_krylov_space_is_exhausted():
    # Over all starts e_i, i = 1..n, the mean of the probes is the exact trace divided by n.
    n = EIGENVALUES.size
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    alphas, betas = diagonal_lanczos(EIGENVALUES, rotation, n)
    betas[:, -1] = 0
    spectrum = Spectrum(alphas, betas, np.full(n, n), n)
    assert spectrum.trace_function(np.cos).value == pytest.approx(np.cos(EIGENVALUES).sum(), rel=1e-12)
    assert spectrum.log_determinant(4.0).value == pytest.approx(np.log(EIGENVALUES + 4).sum(), rel=1e-12)


def test_trace_function_refuses_what_is_not_finite_or_not_vectorised():
    spectrum = sampled(probes=2, steps=6)
    with pytest.raises(ValueError, match=r"f is nan at the Ritz value -"):
        spectrum.trace_function(np.sqrt)
    with pytest.raises(ValueError, match="vectorised"):
        spectrum.trace_function(lambda theta: 1.0)


def test_log_determinant_refuses_a_shift_that_is_too_small_and_names_one_that_is_right():
    spectrum = sampled(probes=2, steps=20)
    with pytest.raises(ValueError, match=r"smallest Ritz value is -3\.0") as caught:
        spectrum.log_determinant(1.0)
    right = float(str(caught.value).split("above ")[1])
    assert 3 - 1e-12 < right < 3.001
    assert np.isfinite(spectrum.log_determinant(1.001 * right).value)


def test_interval_of_a_trace_function_holds_the_truth_that_few_steps_do_not_see():
    values, multiplicities = llm_like()
    mass = masses(values, multiplicities, 4)
    coefficients = diagonal_lanczos(values, np.sqrt(mass), 20)
    spectrum = Spectrum(*coefficients, [20] * 4, int(multiplicities.sum()), run=EXACT)
    found, truth = spectrum.trace_function(np.abs), multiplicities @ np.abs(values)
    assert abs(found.value - truth) > 4 * found.standard_error  # the sampling error alone would not do
    low, high = found.interval()
    assert low <= truth <= high
    assert found.bounds[0] <= found.value <= found.bounds[1]
    # A smooth function leaves nothing open, at any depth between the steps.
    smooth = spectrum.trace_function(lambda x: np.log(x + 200))
    assert np.ptp(smooth.bounds) < 1e-9 * smooth.value


@pytest.mark.parametrize(
    "f",
    [np.abs, np.tanh, lambda x: np.exp(-50 * x), lambda x: np.sin(40 * x), lambda x: (x > 0.3) * 1.0, np.cbrt],
    ids=["abs", "tanh", "exp", "sin", "step", "cbrt"],
)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_bounds_of_trace_functions_hold_for_each_probe_and_narrow_with_steps(f, steps):
    masses = np.random.default_rng(2).normal(size=(5, EIGENVALUES.size)) ** 2
    values = EIGENVALUES.size * (masses / masses.sum(1, keepdims=True)) @ f(EIGENVALUES)

    def bounds(count):
        coefficients = diagonal_lanczos(EIGENVALUES, np.sqrt(masses), count)
        return [
            # The ends are certain once the extremes have converged; before, they are given.
            _with_ends(Spectrum(a[None], b[None], [count], EIGENVALUES.size, run=EXACT)).trace_function(f).bounds
            for a, b in zip(*coefficients, strict=True)
        ]

    few, more = np.array(bounds(steps)), np.array(bounds(2 * steps))
    slack = 1e-9 * np.abs(values).max()
    assert (few[:, 0] - slack <= values).all()
    assert (values <= few[:, 1] + slack).all()
    # (Of a function that oscillates faster than the steps resolve, nothing but its size is known.)
    assert f(np.pi / 80) == 1 or np.ptp(more, axis=1).mean() <= np.ptp(few, axis=1).mean() + slack


def _with_ends(spectrum):
    spectrum.__dict__["_ends"] = (EIGENVALUES.min(), EIGENVALUES.max())
    return spectrum


def test_trace_function_is_unbounded_where_the_function_may_not_be_finite_and_exact_after_breakdown():
    spectrum = sampled(probes=2, steps=6, eigenvalues=EIGENVALUES + 3.0001)
    found = spectrum.trace_function(np.log)
    assert found.bounds[0] == -np.inf
    assert str(found).endswith("(error not known)")
    json.dumps(summary(spectrum), allow_nan=False)
    exhausted = dataclasses.replace(sampled(probes=2, steps=EIGENVALUES.size), run=EXACT)
    assert exhausted.trace_function(np.abs).bounds is None


def test_one_step_does_not_know_the_error_of_a_trace_function_but_that_of_the_trace():
    found = of_diagonal([-5.0, -4.0, -1.0], steps=1, probes=1)
    assert str(found.trace_function(np.abs)).endswith("(error not known)")
    assert found.trace().freedom == 1  # the fewest possible, for one step does not know the fourth moment
    low, high = found.trace().interval()
    assert low <= -10 <= high
    low, high = of_diagonal([-5.0, -4.0, -1.0], steps=2, probes=1).trace_function(np.abs).interval()
    assert low <= 10 <= high


def test_bounds_of_a_polynomial_are_those_of_a_matrix_within_the_slack():
    # An operator within 0.01 of the one whose measure has these nodes: that measure moved by as much.
    nodes, weights, slack = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.5, 0.3]), 0.01
    for f in (lambda x: x, lambda x: x**3, lambda x: x**2):
        for exhausted in (False, True):
            low, high = integral_bounds(f, nodes, weights, (-1.5, 3.0), slack, exhausted)
            for moved in (nodes - slack, nodes + slack, nodes + slack * np.sign(nodes), nodes - slack * np.sign(nodes)):
                assert low - 1e-12 <= weights @ f(moved) <= high + 1e-12
            assert high - low < 1
    low, high = integral_bounds(lambda x: x, nodes, weights, (-1.5, 3.0), 0.0)
    assert high - low < 1e-12
