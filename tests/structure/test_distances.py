"""Distances between spectra."""

import numpy as np

from jaxhess.structure.distances import _divergence


def test_masses_whose_half_underflows_leave_a_divergence_finite():
    smallest = np.nextafter(0.0, 1.0)
    assert _divergence(np.array([1.0, smallest]), np.array([1.0, 0.0])) == 0
