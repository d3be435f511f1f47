"""Predicted norms of blocks against sums, closed forms and samples that do not use them."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from scripts.studies.theory import limits


@pytest.mark.parametrize("classes", [2, 7, 300])
def test_moments_of_the_softmax_add_up(classes):
    """Probabilities have sum one: E p = 1/C, and the second and fourth moments of their sum are one."""
    moment = limits.softmax_moment
    assert moment(1, 0, classes) == pytest.approx(1 / classes, rel=1e-9)
    assert classes * (moment(2, 0, classes) + (classes - 1) * moment(1, 1, classes)) == pytest.approx(1, rel=1e-9)
    if classes == 2:
        fourth = 2 * moment(4, 0, 2) + 8 * moment(3, 1, 2) + 6 * moment(2, 2, 2)
        assert fourth == pytest.approx(1, rel=1e-9)


def test_moments_of_the_softmax_are_those_of_samples():
    """Within five standard errors of the sample."""
    p = softmax(np.random.default_rng(0).normal(size=(200_000, 5)), axis=1)
    for i, j in ((2, 0), (3, 0), (4, 0), (1, 1), (2, 2)):
        found = p[:, 0] ** i * p[:, 1] ** j
        assert abs(found.mean() - limits.softmax_moment(i, j, 5)) < 5 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize("ratio", [0.1, 3.0])
def test_theorem_1_tends_to_equation_20(ratio):
    """The error of E p² at C classes is of order 1/C: ten times the classes, a tenth of the distance."""
    distances = []
    for classes in (1_000, 10_000):
        diagonal, others = limits.linear_norms(ratio, classes)
        distances.append(abs(classes**2 * others / diagonal / limits.linear_constant(ratio) - 1))
    assert distances[0] < 0.1
    assert distances[1] == pytest.approx(distances[0] / 10, rel=0.2)


@pytest.mark.parametrize("t", [0.1, 0.25])
def test_expectations_over_a_unit_are_those_of_a_grid(t):
    u = np.arange(0.005, 12, 0.01)
    weight = np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi) * 0.01
    product, both = np.outer(u, u), np.outer(weight, weight)
    for found, s, w in (
        (limits._same(t), u**2, weight),
        (limits._different(t), product, both),
    ):
        for power, value in enumerate((found.marked, found.first, found.second)):
            assert np.sum(w * np.exp(t * s) * s**power) == pytest.approx(value, rel=1e-4)
        assert found.mass == pytest.approx(1 - w.sum() + np.sum(w * np.exp(t * s)), rel=1e-4)


def test_norms_of_a_network_with_many_classes_have_the_predicted_constants():
    """m = 4 units, 40,000 draws of (h, g), V by its exact moments: within five standard errors."""
    m, ratio = 4, 0.5
    h, g = np.maximum(np.random.default_rng(0).normal(size=(2, 400_000, m)), 0)

    def covariance(h, g):
        active = (h[:, :2] > 0).all(1) & (g[:, :2] > 0).all(1)
        factors = (1 / m + h[:, :2] * g[:, :2] / m**2).prod(1)
        return active * np.exp((h * g).sum(1) / m) * factors / ((ratio / 2 + 1 / 4) / m**2)

    sample = ratio * covariance(h, h) + covariance(h, g)
    error = sample.std() / math.sqrt(len(sample))
    assert abs(sample.mean() - limits.hidden_constant(ratio, m)) < 5 * error
    s = (h * g).sum(1)
    top, bottom = np.exp(2 * s / m) * s**2, np.exp(s / m) * s**2
    value = limits.output_constant(m)
    error = (top - value * bottom).std() / math.sqrt(len(s)) / bottom.mean()
    assert abs(top.mean() / bottom.mean() - value) < 5 * error


def test_more_classes_make_the_hidden_ratio_smaller_by_the_formula():
    assert limits.hidden_squared_error(0, 2) == pytest.approx(1 / 16)
    assert limits.hidden_squared_error(1e9, 8) == pytest.approx(1 / 20)
