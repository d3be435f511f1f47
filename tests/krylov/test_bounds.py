"""The Chebyshev-Markov-Stieltjes bounds contain the distribution function of the probe, known here exactly."""

import numpy as np
import pytest
from known_spectra import MATRICES, lanczos_of_diagonal

from jaxhess.krylov.bounds import distribution_bounds
from jaxhess.krylov.ghosts import relative_tolerance
from jaxhess.krylov.quadrature import quadrature


def _distribution(eigenvalues, masses, x):
    """F(x), and the gap between the eigenvalues on either side of x."""
    places, inverse = np.unique(eigenvalues, return_inverse=True)
    upto = np.append(0.0, np.cumsum(np.bincount(inverse, masses)))
    passed = np.searchsorted(places, x, side="right")
    gap = np.diff(places, prepend=-np.inf, append=np.inf)
    return np.minimum(upto, 1.0)[passed], gap[passed]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MATRICES)
def test_bounds_contain_the_distribution_of_the_probe_at_between_and_beside_eigenvalues(name, dtype):
    eps = float(np.finfo(dtype).eps)
    eigenvalues = MATRICES[name].astype(dtype).astype(np.float64)
    places = np.unique(eigenvalues)
    widths = []
    for steps in (1, 2, 3, 5, 20, 60):
        alphas, betas, masses, broke = lanczos_of_diagonal(MATRICES[name], steps, dtype, seed=steps)
        theta, weights, *_ = quadrature(alphas, betas)
        slack = relative_tolerance(theta.size, eps) * np.abs(theta).max() + (betas[-1] if broke else 0)
        beside = [sign * amount for sign in (-1, 1) for amount in (1e-15, 0.5 * slack, slack, 2 * slack)]
        x = np.concatenate(
            [
                places,
                *(places + amount for amount in beside),
                (places[1:] + places[:-1]) / 2,
                theta,
                np.nextafter(theta, -np.inf),
                [places[0] - 1, places[-1] + 1, -np.inf, np.inf],
            ]
        )
        true, gap = _distribution(eigenvalues, masses, x)
        # Davis and Kahan: rounding of size `slack` turns the eigenvectors on one side of x towards those on the other
        # by slack/gap, which moves mass of 2 sqrt(F (1 - F)) times that; and sums of float64 round.
        moved = 2 * slack / gap * np.sqrt(np.abs(true * (1 - true))) + 1e-15 * theta.size
        lower, upper = distribution_bounds(theta, weights, x, slack, exhausted=broke)
        if broke:  # Eigenvalues within the slack are one node: compare where none is.
            clear = gap > 4 * slack
            lower, upper, true, moved, x = (values[clear] for values in (lower, upper, true, moved, x))
        assert (lower <= true + moved).all()
        assert (true <= upper + moved).all()
        assert (lower <= upper).all()
        widths.append(np.mean(upper - lower))
    assert widths[0] > 0.5 > widths[-1]


def test_between_nodes_the_bounds_are_the_neighbouring_sums_and_at_a_node_its_own():
    theta, weights = np.array([-1.0, 0.0, 2.0, 5.0]), np.array([0.1, 0.2, 0.3, 0.4])
    x = np.array([-np.inf, -1.5, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0, 5.0, 6.0, np.inf])
    lower, upper = distribution_bounds(theta, weights, x)
    np.testing.assert_allclose(lower, [0, 0, 0, 0, 0.1, 0.1, 0.3, 0.3, 0.6, 0.6, 0.6], atol=1e-15)
    np.testing.assert_allclose(upper, [0.1, 0.1, 0.1, 0.3, 0.3, 0.6, 0.6, 1, 1, 1, 1], atol=1e-15)


@pytest.mark.parametrize("steps", [1, 4, 25, 200])
def test_semicircle_law_lies_between_bounds_whose_gap_is_known(steps):
    # T with zeros and halves: the Chebyshev polynomials of the second kind, orthogonal under the semicircle law.
    theta, weights, *_ = quadrature(np.zeros(steps), np.full(steps, 0.5))
    angle = np.arange(steps, 0, -1) * np.pi / (steps + 1)
    exact = 2 / (steps + 1) * np.sin(angle) ** 2

    def law(x):
        x = np.clip(x, -1, 1)
        return 0.5 + (x * np.sqrt(1 - x**2) + np.arcsin(x)) / np.pi

    between = (theta[1:] + theta[:-1]) / 2
    x = np.concatenate([np.linspace(-1.1, 1.1, 1001), theta, between])
    lower, upper = distribution_bounds(theta, weights, x)
    assert (lower <= law(x) + 1e-14).all()
    assert (law(x) <= upper + 1e-14).all()
    lower, upper = distribution_bounds(theta, weights, np.cos(angle), slack=0.0)
    np.testing.assert_allclose(
        np.subtract(*distribution_bounds(theta, weights, between)[::-1]), exact[1:] + exact[:-1], atol=1e-13
    )
    np.testing.assert_allclose(np.subtract(*distribution_bounds(theta, weights, theta)[::-1]), exact, atol=1e-13)


def test_after_a_breakdown_both_bounds_are_the_measure():
    theta, weights = np.array([-1.0, 2.0]), np.array([0.25, 0.75])
    x = np.array([-1.5, -1.0, 0.0, 2.0, 3.0])
    for bound in distribution_bounds(theta, weights, x, exhausted=True):
        assert bound.tolist() == [0, 0.25, 0.25, 1, 1]
    lower, upper = distribution_bounds(theta, weights, x, slack=0.1, exhausted=True)
    assert lower.tolist() == [0, 0, 0.25, 0.25, 1]
    assert upper.tolist() == [0, 0.25, 0.25, 1, 1]


def test_slack_covers_a_node_that_lies_beside_its_eigenvalue_on_either_side():
    # The eigenvalue 1 has mass 0.5 and its node lies 1e-9 off, to the left, then to the right.
    for node in (1 - 1e-9, 1 + 1e-9):
        theta, weights = np.array([0.0, node]), np.array([0.5, 0.5])
        lower, upper = distribution_bounds(theta, weights, [1 - 2e-9, 1.0, 1 + 2e-9], slack=1.5e-9, exhausted=True)
        assert (lower <= [0.5, 1, 1]).all()
        assert (upper >= [0.5, 1, 1]).all()


def test_bounds_keep_the_shape_of_x_and_never_fall():
    theta, weights, *_ = quadrature([0.3, -0.2, 0.1], [0.4, 0.5, 0.6])
    x = np.linspace(-2, 2, 12).reshape(3, 4)
    lower, upper = distribution_bounds(theta, weights, x, 0.05)
    assert lower.shape == upper.shape == (3, 4)
    assert (np.diff(lower.ravel()) >= 0).all()
    assert (np.diff(upper.ravel()) >= 0).all()
    assert np.shape(distribution_bounds(theta, weights, 0.0)) == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ritz_values": [1.0, 0.0]}, "ascending"),
        ({"ritz_values": [[0.0, 1.0]]}, "steps"),
        ({"ritz_values": [0.0, np.nan]}, "finite"),
        ({"weights": [1.0]}, "steps"),
        ({"weights": [-0.5, 1.5]}, "negative"),
        ({"weights": [0.5, 0.6]}, "sum to one"),
        ({"slack": -1.0}, "slack"),
        ({"x": [np.nan]}, "not a number"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    good = {"ritz_values": [0.0, 1.0], "weights": [0.5, 0.5], "x": [0.5], "slack": 0.0}
    with pytest.raises(ValueError, match=message):
        distribution_bounds(**{**good, **changes})
