"""Bounds of the mass that a probe's spectral measure has near zero, from the moments that Lanczos steps know."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh_tridiagonal

from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import quadrature

Array = npt.NDArray[np.float64]

EPS = 2.0**-52
FAR = 1e4
"""Beyond so many times the size of T a node of a rule is taken to be at infinity, so that no digits are lost."""


class Jacobi(NamedTuple):
    """A tridiagonal matrix: [m] its diagonal, and [m] or, the last one not known, [m - 1] what is beside it."""

    alphas: Array
    betas: Array


def near_zero_bounds(
    alphas: npt.ArrayLike, betas: npt.ArrayLike, x: npt.ArrayLike, slack: float = 0.0, exhausted: bool = False
) -> tuple[Array, Array]:
    """Lower and upper bounds, each [len(x)], of the mass of one probe's spectral measure in [-x, x].

    Two pairs of bounds are computed, and the better one is taken at each x.

    - The difference of bounds of the distribution function at x and at -x. Among all measures with the known moments
      the one with an atom at x that is as large as can be is a quadrature rule with a node there: T with one more row,
      chosen so that x is an eigenvalue (Golub 1973). Its masses below x, and up to x, bound F
      (Chebyshev-Markov-Stieltjes; Szego 1939, section 3.41).
    - The mass in [-x, x] is that of the squared eigenvalues in [0, x^2]. Their moments are the even ones, their
      tridiagonal matrix follows from T^2, and the same rules bound their distribution function: once as above, and once
      with a further node at 0, which no squared eigenvalue is below. After one step that is Chebyshev's inequality,
      1 - (alpha^2 + beta^2) / x^2.

    The second is the better one where eigenvalues lie on both sides of zero, the first where x is far from it. Both are
    computed in float64: squares are known to 1e-15 of the largest, so that the second says little for x below about
    1e-7 times the largest eigenvalue.

    Args:
        alphas: [m] diagonal of T.
        betas: [m] norms after each step; the last may be NaN: not known.
        x: [n] distances from zero, not negative; they may be infinite.
        slack: By how far rounding may have moved eigenvalues: the lower bound is that of x - slack, the upper that of
            x + slack.
        exhausted: The quadrature is the measure, up to the slack.

    Raises:
        InputError: Bad coefficients (see `quadrature`); x is not one-dimensional, negative or not a number; the slack
            is negative.
    """
    alphas, betas, x = (np.asarray(a, np.float64) for a in (alphas, betas, x))
    nodes = quadrature(alphas, np.append(betas[:-1], np.nan_to_num(betas[-1:])))
    if x.ndim != 1 or not (x >= 0).all():
        raise InputError(f"Distances from zero are a list of numbers that are not negative, got {x}")
    if not slack >= 0:
        raise InputError(f"slack must not be negative, got {slack}")
    if exhausted:
        within = (np.abs(nodes.ritz_values) <= y[:, None] for y in (x - slack, x + slack))
        least, most = (np.minimum(inside @ nodes.weights, 1.0) for inside in within)
        return least, most
    size = float(np.abs(nodes.ritz_values).max() + np.nan_to_num(betas[-1]))
    if size == 0:
        return np.zeros_like(x), np.ones_like(x)
    known = Jacobi(alphas / size, betas[: len(betas) - bool(np.isnan(betas[-1]))] / size)
    squared = of_squares(known)
    least = np.array([_mass(known, squared, y / size)[0] for y in x - slack])
    most = np.array([_mass(known, squared, y / size)[1] for y in x + slack])
    order = np.argsort(x)  # The mass does not fall with x: what bounds it at one x does so at the others.
    least[order] = np.maximum.accumulate(least[order])
    most[order] = np.minimum.accumulate(most[order][::-1])[::-1]
    return least, np.maximum(most, least)


def of_squares(known: Jacobi) -> Jacobi:
    """The tridiagonal matrix of the squared eigenvalues, as far as it follows, by Lanczos on T^2 from e_1.

    A further row of T beside the last beta changes no moment that the result depends on; zero is as good as any.
    """
    alphas, betas = known
    steps = alphas.size
    diagonal = np.append(alphas, 0.0) if betas.size == steps else alphas
    matrix = np.diag(diagonal) + np.diag(betas[: diagonal.size - 1], 1) + np.diag(betas[: diagonal.size - 1], -1)
    moments = (steps + betas.size) // 2  # of the squares: half as many as of the eigenvalues
    basis, a, b = [np.eye(diagonal.size)[0]], [], []
    for moment in range(1, moments + 1):
        if moment % 2:
            w = matrix @ (matrix @ basis[-1])
            a.append(float(w @ basis[-1]))
        else:
            for _ in range(2):
                w = w - np.transpose(basis) @ (basis @ w)
            b.append(float(np.linalg.norm(w)))
            if b[-1] <= 4 * diagonal.size * EPS:  # All that is known of the squares is at fewer points than steps.
                b[-1] = 0.0
                break
            basis.append(w / b[-1])
    return Jacobi(np.array(a), np.array(b))


def _mass(known: Jacobi, squared: Jacobi, x: float) -> tuple[float, float]:
    """Bounds of the mass in [-x, x] of a measure whose T is of size one."""
    if x < 0:
        return 0.0, 1.0
    if x == np.inf:
        return 1.0, 1.0
    below, upto = _around(known, x)
    below_minus, upto_minus = _around(known, -x)
    bounds = [(below - upto_minus, upto - below_minus)]
    if squared.alphas.size:
        blur = 8 * known.alphas.size * EPS
        for rule in (_around, _around_from_zero):
            low = rule(squared, x**2 - blur)[0] if x**2 > blur else 0.0
            bounds.append((low, rule(squared, x**2 + blur)[1]))
    return max(0.0, *(low for low, _ in bounds)), min(1.0, *(high for _, high in bounds))


def _around(known: Jacobi, x: float) -> tuple[float, float]:
    """Mass below x, and up to x, of the quadrature rule with a node there."""
    if known.alphas.size == 0:
        return 0.0, 1.0
    last = _pivots(known, x)
    if known.betas.size == known.alphas.size and abs(last) * FAR > known.betas[-1] ** 2:
        alphas, betas = np.append(known.alphas, x + known.betas[-1] ** 2 / last), known.betas
    else:
        alphas, betas = known.alphas.copy(), known.betas[: known.alphas.size - 1]
        alphas[-1] -= last
    return _split(*_nodes(alphas, betas), x)


def _around_from_zero(known: Jacobi, x: float) -> tuple[float, float]:
    """The same with a further node at zero, of a measure that has nothing below; (0, 1) where the rule would."""
    at_zero, at_x = _pivots(known, 0.0), _pivots(known, x)
    with np.errstate(all="ignore"):
        square = np.divide(x, 1 / at_zero - 1 / at_x)
    if not (at_zero > 0 and 0 < square < FAR**2 and square < FAR * at_zero):
        return 0.0, 1.0
    betas = np.append(known.betas[: known.alphas.size - 1], np.sqrt(square))
    nodes, weights = _nodes(np.append(known.alphas, square / at_zero), betas)
    if nodes[0] < -8 * nodes.size * EPS * nodes[-1]:
        return 0.0, 1.0
    return _split(nodes, weights, x)


def _pivots(known: Jacobi, x: float) -> float:
    """The last pivot of T - x by Gaussian elimination: that of the last row less what is left of the rows above."""
    pivot = 0.0
    for row, alpha in enumerate(known.alphas):
        pivot = float(alpha) - x - (float(known.betas[row - 1]) ** 2 / (pivot or EPS**2) if row else 0.0)
    return pivot


def _nodes(alphas: Array, betas: Array) -> tuple[Array, Array]:
    nodes, vectors = eigh_tridiagonal(alphas, betas, lapack_driver="stev")
    return nodes, vectors[0] ** 2


def _split(nodes: Array, weights: Array, x: float) -> tuple[float, float]:
    at = int(np.argmin(np.abs(nodes - x)))
    upto = np.append(0.0, np.cumsum(weights))
    return float(upto[at]), float(upto[at + 1])
