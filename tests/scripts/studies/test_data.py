"""Spectra and their data: a decay that is known, claims on made-up spectra, and texts that do not suffice."""

import dataclasses
import math

import numpy as np
import pytest

import jaxhess
from jaxhess.errors import InputError
from scripts.studies import data as script
from scripts.studies.data import RANDOM, SEEN, UNSEEN
from scripts.studies.samples import shapes
from scripts.studies.samples.shapes import SampleShape


def made(largest=10.0, smallest=-1.0, rms=1.0, kurtosis=100.0, outliers=2.0, tail=0.9, norm=50.0, sequences=2):
    return SampleShape(sequences, 64, largest, smallest, rms, kurtosis, outliers, tail, 0.05, norm, (40.0, 45.0, 51.0))


def verdicts(found):
    claims = list(script.claims(found, script.Options(sizes=(2, 60)), 100))
    return {(c.statement, c.quantity): c.verdict for c in claims}, claims


def test_claims_hold_where_spectra_are_as_the_papers_say():
    semicircle = made(largest=2.0, smallest=-2.0, kurtosis=2.0)
    text = {
        (SEEN, 2): [made(outliers=2), made(outliers=2)],
        (SEEN, 60): [made(smallest=-0.1, outliers=9)] * 2,
        (UNSEEN, 2): [made(), made()],
        (UNSEEN, 60): [made(outliers=9)] * 2,
        (RANDOM, 2): [semicircle, semicircle],
    }
    found, _ = verdicts(text)
    assert set(found.values()) == {"holds"}
    text[SEEN, 60] = [made(smallest=-5.0, outliers=2, largest=30.0, norm=200.0, tail=0.01)] * 2
    other = dataclasses.replace(made(), sequences=8, kurtosis=1000.0)
    text[RANDOM, 2] = [made(), made(), other, other]
    found, claims = verdicts(text)
    on_seen = [
        c
        for c in claims
        if SEEN in c.statement or "trained on, negative" in c.statement or "random data the" in c.statement
    ]
    assert len(on_seen) == 8
    assert {c.verdict for c in on_seen if "power" not in c.statement} == {"does not hold"}


def test_what_is_not_known_cannot_be_told():
    text = {(name, size): [made(tail=None)] * 2 for name in (SEEN, UNSEEN, RANDOM) for size in (2, 60)}
    claims = list(script.claims(text, script.Options(sizes=(2, 60), model="another"), 100))
    untold = [c for c in claims if c.obstacle]
    assert {c.verdict for c in untold} == {"cannot tell"}
    assert len(untold) == 4  # two tails, and what the model has seen


def test_the_exponent_of_a_decay_is_found_within_its_error():
    rng = np.random.default_rng(0)
    values = np.sort(rng.pareto(4, 4000) + 1)[::-1]  # quantile ~ rank^(-1/4)
    a, error = shapes.hill(values[:400])
    assert abs(a - 0.25) < 4 * error
    assert math.isclose(error, a / math.sqrt(399))
    assert shapes.hill(values[:7]) == (None, None)


def test_converged_values_are_eigenvalues():
    import jax.numpy as jnp

    entries = jnp.concatenate([jnp.linspace(0, 0.1, 200), jnp.array([1.0, 2.0, 5.0])])
    result = jaxhess.spectrum(jaxhess.MatrixOperator(jnp.diag(entries)), steps=12, probes=1)
    np.testing.assert_allclose(shapes.converged(result, 0)[-3:], [1, 2, 5], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sizes": (8, 2)}, "ascending"),
        ({"draws": 1}, "at least 2, 4 and 2"),
        ({"unseen": "LICENSE"}, "has .* sequences; --sizes asks for 1000"),
    ],
)
def test_bad_options_are_refused(change, sentence):
    options = script.Options(**{"sizes": (2, 1000), **change})
    with pytest.raises(InputError, match=sentence):
        script.study(options)


def test_the_figure_has_every_kind():
    found = {(name, size): [made(sequences=size)] * 2 for name in (SEEN, UNSEEN, RANDOM) for size in (2, 60)}
    panels = script.figure(found).axes
    assert [len(panel.containers) for panel in panels] == [3, 3, 6]
