"""The tables of Ritz values and of eigenvalues near zero, beside figures that are known."""

import dataclasses

import numpy as np
import pytest
from known_spectra import EXACT, of_diagonal

from jaxhess.operators.audit import Noise, NoiseAlong
from jaxhess.results.ritz_table import ritz_tables
from jaxhess.slq.spectrum import Spectrum

MINUS = "\N{MINUS SIGN}"


def _numbers(text):
    return [float(part.replace(MINUS, "-").replace(",", "")) for part in text.split(" to ")]


def test_the_heaviest_ritz_value_and_the_farthest_stand_with_their_weights():
    eigenvalues = np.concatenate([np.zeros(180), -np.arange(1.0, 9), np.arange(10.0, 18)])
    result = of_diagonal(eigenvalues, steps=20, probes=4, seed=1)
    table, note, near, _ = ritz_tables(result)
    assert "3 of 4 probes" in table.title
    assert "copies merged" in note
    assert len(table.rows) == 30
    for probe in ("1", "2", "3"):
        rows = [row for row in table.rows if row[0] == probe]
        values = [_numbers(row[1])[0] for row in rows]
        assert values == sorted(values)
        heaviest = max(rows, key=lambda row: _numbers(row[2]))
        assert abs(_numbers(heaviest[1])[0]) < 1e-5
        assert _numbers(heaviest[3])[0] == pytest.approx(196 * _numbers(heaviest[2])[0], rel=0.01)
        np.testing.assert_allclose([v for v in values if abs(v) > 1], [-8, *range(10, 18)], rtol=1e-5)
    # Of 196, those farther than a tenth of 17 are 15.
    low, high = _numbers(next(row for row in near.rows if row[1].startswith("0.1"))[4])
    assert low <= 15 <= high


def test_the_noise_floor_is_a_distance_where_it_was_measured_and_unknown_bounds_are_called_so():
    noise = Noise(0.0, 0.0, "", NoiseAlong(0.0, 0.0), NoiseAlong(0.5, 0.1))
    result = Spectrum([[0.0, 2.0, 1.0]], [[1.0, 1.0, np.nan]], [3], 10**9, run=dataclasses.replace(EXACT, noise=noise))
    table, _, near, _ = ritz_tables(result)
    assert [row[4] for row in table.rows] == ["unknown"] * 3
    assert "0.5" in [row[0] for row in near.rows if row[1].startswith("noise")]


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e300])
def test_scales_at_the_ends_of_float64_have_tables(scale):
    result = Spectrum([[0.0, scale]], [[scale, 0.0]], [2], 10**20)
    tables = ritz_tables(result)
    assert len(tables) == (4 if scale else 2)
