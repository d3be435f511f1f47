"""Bounds of a function's integral over a spectral measure, of which a few Lanczos steps are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_NEAR = np.geomspace(1e-8, 0.1, 15)
SAMPLES = np.concatenate([[0.0], _NEAR, np.linspace(0.13, 0.87, 27), 1 - _NEAR[::-1], [1.0]])
"""Where a function is looked at between two Ritz values, as parts of the gap: closer towards either."""

MOST_DEGREES = 100
"""Up to which polynomials are tried: their number times the points is what this costs."""


def integral_bounds(
    f: Callable[[Array], npt.ArrayLike],
    ritz_values: Array,
    weights: Array,
    ends: tuple[float, float],
    slack: npt.ArrayLike = 0.0,
) -> tuple[float, float]:
    """Lower and upper bounds of the integral of f over every measure on [ends] with this Gauss quadrature.

    By the Chebyshev-Markov-Stieltjes inequalities (see `krylov.bounds`) the mass w_k of node theta_k lies between
    theta_{k-1} and theta_{k+1}, the outer ones being `ends`: the integral is between the sums of w_k times the least
    and the greatest value of f there. The same holds of f - p for any polynomial p, and that of p is the quadrature's
    where its degree is below 2m. Taken is the best of p = 0 and of the least-squares fits to f of every such degree,
    each gap with the weight that it has in the bounds: little is left then where f is smooth, nothing where f is a
    polynomial.

    Least and greatest are over the points `SAMPLES` of every gap, and zero: a function that varies within those is
    not bounded. Where f is not finite the bounds are infinite.

    Args:
        f: Vectorised.
        ritz_values, weights: [m] nodes, ascending, and their weights.
        ends: Between which the operator's eigenvalues lie.
        slack: By how far rounding may have moved a node, a scalar or [m].
    """
    cuts = np.concatenate([[min(ends[0], ritz_values[0])], ritz_values, [max(ends[1], ritz_values[-1])]])
    moved = np.pad(np.broadcast_to(slack, ritz_values.shape), 1)
    low = np.maximum(cuts[:-1] - moved[:-1], cuts[0])[:, None]
    high = np.minimum(cuts[1:] + moved[1:], cuts[-1])[:, None]
    # Every gap has the nodes at its ends among its points, the lower one in the last column.
    points = np.concatenate(
        [np.minimum(low + (high - low) * SAMPLES, high), np.clip(0.0, low, high), cuts[1:, None], cuts[:-1, None]], 1
    )
    with np.errstate(all="ignore"):
        values = np.asarray(f(points.ravel()), np.float64).reshape(points.shape)
    best = _arranged(values, weights)
    if not np.isfinite(values).all():
        return best
    beside = np.pad(weights, 1)
    importance = np.repeat((beside[:-1] + beside[1:])[:, None], points.shape[1], 1)
    for fit in _fits(points, values, importance, min(2 * ritz_values.size, MOST_DEGREES)):
        integral = float(weights @ fit[1:, -1])
        least, greatest = _arranged(values - fit, weights)
        best = max(best[0], integral + least), min(best[1], integral + greatest)
    value = float(weights @ values[1:, -1])
    return min(best[0], value), max(best[1], value)


def _arranged(values: Array, weights: Array) -> tuple[float, float]:
    """The least and the greatest integral, from values [gaps, points]: the mass of node k is in the gaps beside it."""
    unknown = ~np.isfinite(values)
    least, greatest = np.where(unknown, -np.inf, values).min(1), np.where(unknown, np.inf, values).max(1)
    used = weights > 0
    lower = weights[used] @ np.minimum(least[:-1], least[1:])[used]
    upper = weights[used] @ np.maximum(greatest[:-1], greatest[1:])[used]
    return float(lower), float(upper)


def _fits(points: Array, values: Array, importance: Array, count: int) -> Iterator[Array]:
    """Polynomials of degree 0 to count - 1 at the points: the least-squares fits to the values.

    In a basis that is orthogonal over the points (Brubeck, Nakatsukasa and Trefethen 2021), stable at any degree.
    """
    x = points.ravel() / (np.abs(points).max() or 1.0)
    root = np.sqrt(np.maximum(importance.ravel(), 1e-30 * importance.max()))
    basis = np.empty((count, x.size))
    left, vector, fit = root * values.ravel(), root, np.zeros(x.size)
    for degree in range(count):
        before = np.linalg.norm(vector)
        for _ in range(2):
            vector = vector - (basis[:degree] @ vector) @ basis[:degree]
        length = np.linalg.norm(vector)
        if not length > 1e-12 * before:  # Fewer different points than degrees.
            return
        basis[degree] = vector / length
        part = (basis[degree] @ left) * basis[degree]
        left = left - part
        fit = fit + part / root
        yield fit.reshape(points.shape)
        vector = x * basis[degree]
