"""How many eigenvalues lie near zero: intervals cover what matrices of known spectrum have."""

import jax.numpy as jnp
import numpy as np
import pytest
from known_spectra import EIGENVALUES, EXACT, llm_like, masses, sampled

import jaxhess
from jaxhess.errors import InputError
from jaxhess.slq.spectrum import Spectrum


@pytest.mark.parametrize("probes", [1, 2, 10])
@pytest.mark.parametrize("steps", [1, 6, 25])
def test_intervals_cover_the_share_of_a_matrix_of_known_spectrum(probes, steps):
    """At 200 draws a coverage of 95% shows as 90 or more: 90 is 3.2 standard deviations below."""
    x = np.array([0.0, 0.05, 0.2, 0.5, 1.5, 4.0])
    share = (np.abs(EIGENVALUES) <= x[:, None]).mean(1)
    every = sampled(200, steps)
    inside = []
    for first in range(0, 200, probes):
        rows = slice(first, first + probes)
        part = Spectrum(every.alphas[rows], every.betas[rows], every.sizes[rows], every.dim, run=EXACT)
        low, high = jaxhess.near_zero(part, x).interval()
        inside.append((low <= share) & (share <= high))
    assert np.mean(inside, axis=0).min() >= 0.9


def test_a_language_models_spectrum_is_counted_to_single_eigenvalues_in_a_hundred_million():
    values, multiplicities = llm_like()
    found = []
    for mass in masses(values, multiplicities, 4):
        q, alphas, betas, basis = np.sqrt(mass / mass.sum()), [], [], []
        for _ in range(60):
            basis.append(q)
            w = values * q
            alphas.append(w @ q)
            for _ in range(2):
                w = w - np.transpose(basis) @ (basis @ w)
            betas.append(np.linalg.norm(w))
            q = w / betas[-1]
        found.append((alphas, betas))
    alphas, betas = (np.array(rows) for rows in zip(*found, strict=True))
    dim = int(multiplicities.sum())
    result = Spectrum(alphas, betas, np.full(4, 60), dim, run=EXACT)
    low, high = jaxhess.near_zero(result, [5e-3, 2.0]).counts()
    outside = [30, int((np.abs(values) > 2).sum())]
    for k, count in enumerate(outside):
        # The error of a count k near the end is about 2 sqrt(k / 2 probes); the interval is 95%, this one 99.9%.
        assert dim - high[k] - 2 < count < dim - low[k] + 4
        assert high[k] - low[k] < 60


def test_low_rank_with_one_probe_and_a_breakdown():
    factor = jnp.asarray(np.random.default_rng(0).normal(size=(40, 4)), jnp.float32)
    result = jaxhess.spectrum(jaxhess.MatrixOperator(factor @ factor.T), steps=12, probes=1)
    assert result.broke_down.all()
    found = jaxhess.near_zero(result, [0.0, 0.1, 1e3])
    assert found.low[0, 0] == 0  # below the rounding of the run nothing is known
    np.testing.assert_allclose(found.low[:, 1], found.high[:, 1])
    low, high = found.counts()
    assert low[1] <= 36 <= high[1]
    assert (low[2], high[2]) == (pytest.approx(40, abs=3), 40)


def test_distances_and_levels_are_checked():
    result = Spectrum([[1.0]], [[1.0]], [1], 4)
    with pytest.raises(InputError, match="not negative"):
        jaxhess.near_zero(result, [-1.0])
    with pytest.raises(InputError, match="level"):
        jaxhess.near_zero(result, [1.0]).interval(1.0)
