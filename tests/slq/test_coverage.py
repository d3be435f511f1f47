"""How often 95% intervals hold the truth: every estimator, from 2 probes to 10, on spectra hard for intervals.

The estimators' laws are sampled in NumPy, in the eigenbasis (normal probes) or with random signs in a basis in which
the matrix is dense; that the library computes the same numbers from its products is the subject of test_trace.
"""

import numpy as np
import pytest
from small_models import diagonal_lanczos

from jaxhess.krylov.errors import Estimate, across_probes, of_forms, of_squares, student_factor
from jaxhess.krylov.sketch import _covariance, _leave_one_out, _Sketch
from jaxhess.slq.record import Probes, RunRecord
from jaxhess.slq.spectrum import Spectrum

PROBES = (2, 3, 4, 6, 10)
N = 300
OUTLIERS = np.geomspace(1e-2, 1e2, 30) * np.where(np.arange(30) % 4 == 1, -1, 1)
NEAR_ZERO = 1e-4 * np.random.default_rng(1).normal(size=60)

SPECTRA = {  # Different eigenvalues, and how often each occurs.
    "power law": (1 / np.arange(1.0, N + 1), np.ones(N, int)),
    "one outlier": (np.append(1e-3 * np.random.default_rng(2).normal(size=N - 1), 50.0), np.ones(N, int)),
    "LLM-like": (np.append(NEAR_ZERO, OUTLIERS), np.append(np.full(60, 5000), np.ones(30, int))),
    "rank-deficient": (
        np.append(np.random.default_rng(3).uniform(0.5, 2, 20), 0.0),
        np.append(np.ones(20, int), N - 20),
    ),
}
STEPS = 12


def spread_out(name):
    """[N] eigenvalues: those of the spectrum, or where they are more, its outliers and as much of its bulk."""
    values, multiplicities = SPECTRA[name]
    return (
        np.repeat(values, np.where(multiplicities == 5000, 4, multiplicities))
        if name == "LLM-like"
        else np.repeat(values, multiplicities)
    )


def in_a_dense_basis(name, count, seed):
    """A, and [N, count] random signs and products of such a matrix."""
    rng = np.random.default_rng(seed)
    values = spread_out(name)
    q = np.linalg.qr(rng.normal(size=(values.size, values.size)))[0]
    a = (q * values) @ q.T
    v = rng.choice([-1.0, 1.0], (values.size, count))
    return a, v, a @ v


def hutchinson_normal(name, k, runs):
    values, multiplicities = SPECTRA[name]
    z = np.random.default_rng(k).chisquare(multiplicities, (runs, k, values.size))
    for x, squares in zip(z @ values, z @ values**2, strict=True):
        yield Estimate(x.mean(), *of_forms(2 * squares.mean(), squares)), multiplicities @ values


def hutchinson_signs(name, k, runs):
    a, v, y = in_a_dense_basis(name, k * runs, k)
    for entries in np.split(v * y, runs, axis=1):
        variance = 2 * entries.var(axis=1, ddof=1).sum()
        yield Estimate(entries.sum(0).mean(), *of_forms(variance, (entries**2).sum(0))), np.trace(a)


def frobenius(name, k, runs):
    a, _, y = in_a_dense_basis(name, k * runs, k)
    for products in np.split(y, runs, axis=1):
        squares = (products**2).sum(0)
        value, (error, freedom) = np.sqrt(squares.mean()), of_squares(squares)
        yield Estimate(value, error / (2 * value), freedom, positive=True), np.linalg.norm(a)


def diagonal(name, k, runs):
    a, v, y = in_a_dense_basis(name, k * runs, k)
    for entries in np.split(v * y, runs, axis=1):  # one entry of every run, for entries of one run are not independent
        i = np.random.default_rng(runs).integers(len(a))
        yield Estimate(entries[i].mean(), *across_probes(entries[i])), a[i, i]


def hutch_plus_plus(name, products, runs):
    """For products from 4 on: with 3 the error is not known."""
    products += 2
    sketch = products // 3
    samples = products - 2 * sketch
    a, v, y = in_a_dense_basis(name, products * runs, products)
    for signs, images in zip(np.split(v, runs, axis=1), np.split(y, runs, axis=1), strict=True):
        q = np.linalg.qr(images[:, :sketch])[0]
        g = signs[:, sketch : sketch + samples]
        g = g - q @ (q.T @ g)
        rest = (g * (a @ g)).sum(0)
        yield Estimate(np.trace(q.T @ a @ q) + rest.mean(), *across_probes(rest)), np.trace(a)


def xtrace(name, m, runs):
    """m is half of the products."""
    values, rng = spread_out(name), np.random.default_rng(m)
    for _ in range(runs):
        omega = rng.normal(size=(values.size, m))
        y = values[:, None] * omega
        q, r = np.linalg.qr(y)
        sketch = _Sketch(values.size, r, q.T @ omega, (q.T * values) @ q, (omega * y).sum(0), (omega**2).sum(0))
        found = _leave_one_out(sketch)
        error, freedom = across_probes(found)
        yield Estimate(found.mean(), np.hypot(error, np.sqrt(_covariance(sketch, found))), freedom), values.sum()


def spectra(name, k, runs, steps=STEPS):
    """Spectra of normal probes, drawn as the mass that each has on every different eigenvalue."""
    values, multiplicities = SPECTRA[name]
    mass = np.random.default_rng(k).chisquare(multiplicities, (runs * k, values.size))
    coefficients = diagonal_lanczos(values, np.sqrt(mass), steps)
    for alphas, betas in zip(*(np.split(c, runs) for c in coefficients), strict=True):
        yield Spectrum(alphas, betas, np.full(k, steps), int(multiplicities.sum()))


def spectra_of_signs(name, k, runs, steps=STEPS):
    """Of random signs, in a dense basis."""
    values, rng = spread_out(name), np.random.default_rng(k)
    q = np.linalg.qr(rng.normal(size=(values.size, values.size)))[0]
    coefficients = diagonal_lanczos(values, rng.choice([-1.0, 1.0], (runs * k, values.size)) @ q, steps)
    record = RunRecord(Probes(distribution="rademacher"))
    for alphas, betas in zip(*(np.split(c, runs) for c in coefficients), strict=True):
        yield Spectrum(alphas, betas, np.full(k, steps), values.size, run=record)


def of_spectrum(estimate, f, draw=spectra, **options):
    """What `estimate` makes of every spectrum, and the truth: f of eigenvalues and how often each occurs."""

    def found(name, k, runs):
        values, multiplicities = SPECTRA[name] if draw is spectra else np.unique(spread_out(name), return_counts=True)
        for spectrum in draw(name, k, runs, **options):
            yield estimate(spectrum), f(values, multiplicities)

    return found


def shift(values):
    return 0.1 * np.abs(values).max() - 1.1 * min(values.min(), 0)


def log_determinant(name, k, runs):
    by = shift(SPECTRA[name][0])
    return of_spectrum(lambda s: s.log_determinant(by), lambda x, m: m @ np.log(x + by))(name, k, runs)


ESTIMATORS = {
    "hutchinson, normal": hutchinson_normal,
    "hutchinson, signs": hutchinson_signs,
    "frobenius_norm": frobenius,
    "diagonal": diagonal,
    "hutch_plus_plus": hutch_plus_plus,
    "xtrace": xtrace,
    "Spectrum.trace": of_spectrum(lambda s: s.trace(), lambda x, m: m @ x),
    "Spectrum.frobenius_norm": of_spectrum(lambda s: s.frobenius_norm(), lambda x, m: np.sqrt(m @ x**2)),
    "Spectrum.moment(3)": of_spectrum(lambda s: s.moment(3), lambda x, m: m @ x**3 / m.sum()),
    "Spectrum.moment(4)": of_spectrum(lambda s: s.moment(4), lambda x, m: m @ x**4 / m.sum()),
    "moment(2), 1 step": of_spectrum(lambda s: s.moment(2), lambda x, m: m @ x**2 / m.sum(), steps=1),
    "moment(4), 2 steps": of_spectrum(lambda s: s.moment(4), lambda x, m: m @ x**4 / m.sum(), steps=2),
    "trace, signs": of_spectrum(lambda s: s.trace(), lambda x, m: m @ x, spectra_of_signs),
    "frobenius_norm, signs": of_spectrum(
        lambda s: s.frobenius_norm(), lambda x, m: np.sqrt(m @ x**2), spectra_of_signs
    ),
    "log_determinant": log_determinant,
}
BOUNDED = {
    "trace of abs": of_spectrum(lambda s: s.trace_function(np.abs), lambda x, m: m @ np.abs(x)),
    "trace of tanh": of_spectrum(lambda s: s.trace_function(np.tanh), lambda x, m: m @ np.tanh(x)),
    "trace of abs, 4 steps": of_spectrum(lambda s: s.trace_function(np.abs), lambda x, m: m @ np.abs(x), steps=4),
}
"""Their bounds of the quadrature error hold always, and may be wider than the sampling error."""


def covered(estimator, name, probes, runs):
    """The share of intervals that hold the truth."""
    hits = []
    for estimate, truth in estimator(name, probes, runs):
        low, high = estimate.interval()
        slack = 1e-9 * abs(truth)  # Where there is no error but rounding.
        hits.append(low - slack <= truth <= high + slack)
    assert len(hits) == runs
    return np.mean(hits)


@pytest.mark.parametrize(("name", "probes"), [("one outlier", 2), ("LLM-like", 4)])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *BOUNDED])
def test_intervals_of_few_probes_hold_the_truth_as_often_as_they_say(estimator, name, probes):
    # The shares are 90% or more (see the study); 100 runs know them to 3% at worst.
    assert covered({**ESTIMATORS, **BOUNDED}[estimator], name, probes, 100) >= 0.9 - 2 * 0.03


@pytest.mark.parametrize("f", [np.square, np.abs, lambda x: x**5], ids=["square", "abs", "fifth power"])
@pytest.mark.parametrize("name", ["power law", "one outlier"])
def test_trace_functions_of_two_steps_hold_the_truth_and_of_one_step_have_no_interval(name, f):
    estimator = of_spectrum(lambda s: s.trace_function(f), lambda x, m: m @ f(x), steps=2)
    for probes in (1, 2):
        assert covered(estimator, name, probes, 100) >= 0.9 - 2 * 0.03
        assert np.isnan(next(spectra(name, probes, 1, steps=1)).trace_function(f).interval()).all()


@pytest.mark.parametrize("name", SPECTRA)
def test_the_trace_of_one_step_holds_the_truth(name):
    estimator = of_spectrum(lambda s: s.trace(), lambda x, m: m @ x, steps=1)
    for probes in (1, 2):
        assert covered(estimator, name, probes, 100) >= 0.9 - 2 * 0.03


@pytest.mark.study
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *BOUNDED])
def test_intervals_hold_the_truth_in_90_to_99_percent_of_300_runs(estimator):
    rows = {name: [covered({**ESTIMATORS, **BOUNDED}[estimator], name, k, 300) for k in PROBES] for name in SPECTRA}
    print(f"\n{estimator:24s} " + "  ".join(f"{100 * min(r):3.0f} to {100 * max(r):3.0f}" for r in rows.values()))
    # 300 runs know a share of 90% to 1.7%, one of 99% to 0.6%. Those of 2 probes may be wider than they need to be.
    for name, found in rows.items():
        assert min(found) >= 0.9 - 0.017, (name, found)
        assert estimator in BOUNDED or max(found[1:]) <= 0.99 + 2 * 0.006, (name, found)


def test_what_cannot_be_known_is_said():
    spectrum = next(spectra("LLM-like", 2, 1, steps=2))
    assert np.isnan(spectrum.moment(3).interval()).all()  # its square is of degree 6, and odd values are skewed
    assert str(spectrum.moment(3)).endswith("(error not known)")
    assert np.isfinite(spectrum.moment(4).interval()).all()
    assert np.isnan(next(spectra("LLM-like", 1, 1, steps=2)).moment(4).interval()).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        spectrum.trace().interval(95)
    assert student_factor(np.inf, 0.95) == pytest.approx(1.96, abs=1e-3)
