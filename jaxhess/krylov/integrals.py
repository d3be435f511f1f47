"""Bounds of a function's integral over a spectral measure, of which a few Lanczos steps are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_NEAR = np.geomspace(1e-8, 0.1, 15)
SAMPLES = np.concatenate([[0.0], _NEAR, np.linspace(0.13, 0.87, 27), 1 - _NEAR[::-1], [1.0]])
"""Where a function is looked at between two Ritz values, as parts of the gap: closer towards either."""

WITHIN_SLACK = np.array([-1.0, -0.5, 0.5, 1.0])
"""Where a polynomial is looked at around a node, in units of the slack."""

MOST_DEGREES = 100
"""Up to which polynomials are tried: their number times the points is what this costs."""


def integral_bounds(
    f: Callable[[Array], npt.ArrayLike],
    ritz_values: Array,
    weights: Array,
    ends: tuple[float, float],
    slack: npt.ArrayLike = 0.0,
    exhausted: bool = False,
) -> tuple[float, float]:
    """Lower and upper bounds of the integral of f over every measure on [ends] with this Gauss quadrature.

    By the Chebyshev-Markov-Stieltjes inequalities (see `krylov.bounds`) the mass w_k of node theta_k lies between
    theta_{k-1} and theta_{k+1}, the outer ones being `ends`: the integral is between the sums of w_k times the least
    and the greatest value of f there. The same holds of f - p for any polynomial p, and that of p is the quadrature's
    where its degree is below 2m, but for the slack of the nodes: sum_k w_k max |p(x) - p(theta_k)| over x within
    slack_k of theta_k. We use the tightest of these bounds: without a polynomial, and with the fit of every such
    degree, least-squares to f, each gap with the weight that it has in the bounds. Little is left then where f is
    smooth, and only the slack where f is a polynomial.

    Least and greatest are over the points `SAMPLES` of every gap, and zero: a function that varies within those is
    not bounded. Where f is not finite the bounds are infinite.

    Args:
        f: Vectorised.
        ritz_values, weights: [m] nodes, ascending, and their weights.
        ends: Between which the operator's eigenvalues lie.
        slack: By how far rounding may have moved a node, a scalar or [m].
        exhausted: The Krylov space was exhausted: the mass w_k lies within slack_k of theta_k, and `ends` are not used.
    """
    slack = np.broadcast_to(slack, ritz_values.shape)
    if exhausted:
        low, high = ritz_values - slack, ritz_values + slack
        around = np.concatenate([_between(low, high), ritz_values[:, None]], 1)
        least, greatest = _extremes(_values(f, around))
        return _total(least, weights), _total(greatest, weights)
    cuts = np.concatenate([[min(ends[0], ritz_values[0])], ritz_values, [max(ends[1], ritz_values[-1])]])
    moved = np.pad(slack, 1)
    low, high = np.maximum(cuts[:-1] - moved[:-1], cuts[0]), np.minimum(cuts[1:] + moved[1:], cuts[-1])
    # Every gap has the nodes at its ends among its points, the lower one in the last column.
    points = np.concatenate([_between(low, high), cuts[1:, None], cuts[:-1, None]], 1)
    values = _values(f, points)
    best = _arranged(values, weights)
    if not np.isfinite(values).all():
        return best
    masses = np.pad(weights, 1)
    importance = np.repeat((masses[:-1] + masses[1:])[:, None], points.shape[1], 1)
    within = ritz_values[:, None] + slack[:, None] * WITHIN_SLACK
    for fit, beside in _fits(points, values, importance, min(2 * ritz_values.size, MOST_DEGREES), within):
        integral = float(weights @ fit[1:, -1])
        moved_by = float(weights @ np.abs(beside - fit[1:, -1:]).max(1))
        lower, upper = _arranged(values - fit, weights)
        best = max(best[0], integral + lower - moved_by), min(best[1], integral + upper + moved_by)
    value = float(weights @ values[1:, -1])
    return min(best[0], value), max(best[1], value)


def _between(low: Array, high: Array) -> Array:
    """[intervals, points] where a function is looked at between low and high."""
    low, high = low[:, None], high[:, None]
    return np.concatenate([np.minimum(low + (high - low) * SAMPLES, high), np.clip(0.0, low, high)], 1)


def _values(f: Callable[[Array], npt.ArrayLike], points: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(f(points.ravel()), np.float64).reshape(points.shape)


def _extremes(values: Array) -> tuple[Array, Array]:
    """Least and greatest of each row; infinite where a value is not finite."""
    unknown = ~np.isfinite(values)
    return np.where(unknown, -np.inf, values).min(1), np.where(unknown, np.inf, values).max(1)


def _total(values: Array, weights: Array) -> float:
    used = weights > 0
    return float(weights[used] @ values[used])


def _arranged(values: Array, weights: Array) -> tuple[float, float]:
    """The least and the greatest integral, from values [gaps, points]: the mass of node k is in the gaps beside it."""
    least, greatest = _extremes(values)
    lower, upper = np.minimum(least[:-1], least[1:]), np.maximum(greatest[:-1], greatest[1:])
    return _total(lower, weights), _total(upper, weights)


def _fits(points: Array, values: Array, importance: Array, count: int, beside: Array) -> Iterator[tuple[Array, Array]]:
    """Polynomials of degree 0 to count - 1, at the points and beside them: the least-squares fits to the values.

    In a basis that is orthogonal over the points (Brubeck, Nakatsukasa and Trefethen 2021), stable at any degree.
    """
    here = points.size
    x = np.concatenate([points.ravel(), beside.ravel()]) / (np.abs(points).max() or 1.0)
    root = np.sqrt(np.maximum(importance.ravel(), 1e-30 * importance.max()))
    basis = np.empty((count, x.size))  # The polynomials times `scale`.
    scale = np.concatenate([root, np.ones(beside.size)])
    left, vector, fit = root * values.ravel(), scale, np.zeros(x.size)
    for degree in range(count):
        before = np.linalg.norm(vector[:here])
        for _ in range(2):
            vector = vector - (basis[:degree, :here] @ vector[:here]) @ basis[:degree]
        length = np.linalg.norm(vector[:here])
        if not length > 1e-12 * before:  # Fewer different points than degrees.
            return
        basis[degree] = vector / length
        part = basis[degree, :here] @ left
        left = left - part * basis[degree, :here]
        fit = fit + part * basis[degree] / scale
        yield fit[:here].reshape(points.shape), fit[here:].reshape(beside.shape)
        vector = x * basis[degree]
