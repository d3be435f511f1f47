"""Bounds of a spectral distribution function from its Gauss quadrature: the Chebyshev-Markov-Stieltjes inequalities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError

Array = npt.NDArray[np.float64]


def distribution_bounds(
    ritz_values: npt.ArrayLike,
    weights: npt.ArrayLike,
    x: npt.ArrayLike,
    slack: npt.ArrayLike = 0.0,
    exhausted: bool = False,
) -> tuple[Array, Array]:
    """Lower and upper bounds, shaped like x, of F(x) = sum of the probe's masses at eigenvalues <= x.

    At the nodes of the Gauss quadrature of a measure (Szego 1939, section 3.41)

        sum_{i<k} w_i <= F(theta_k - 0),    F(theta_k + 0) <= sum_{i<=k} w_i,

    and F does not fall. Between theta_k and theta_{k+1} it therefore lies between the sum of k - 1 weights and that of
    k + 1; below all nodes between 0 and w_1, above them between 1 - w_m and 1. Nothing narrower follows from these
    inequalities. The bounds are of the measure of one probe: that probes differ is not in them.

    Rounding also moves mass between eigenvalues: they are bounds for a matrix that differs from the operator by the
    errors of the run. Across a gap of the spectrum the mass differs by at most the size of these errors over the gap
    (Davis and Kahan 1970). The weight of one node, by which the bounds are wider than the sums, covers that unless the
    node weighs less. In float64 they were broken by at most 450 eps, over Marchenko-Pastur, semicircle, clustered,
    graded and rank-deficient matrices and bulks with outliers far above them.

    Args:
        ritz_values: [m] nodes, ascending.
        weights: [m] not negative, summing to one.
        x: Where to bound F; any shape, infinities allowed.
        slack: By how far rounding may have moved a node, a scalar or [m]. For the lower bound a node counts from
            node + slack on, for the upper one from node - slack on, so that a node which lies a rounding error beside
            its eigenvalue breaks neither.
        exhausted: The Krylov space was exhausted (its last beta is zero within the slack): the quadrature is the
            measure, and both bounds are its distribution function, up to the slack.

    Raises:
        InputError: Shapes disagree, nodes do not ascend, a weight or a slack is negative, or an entry is NaN.
    """
    nodes, w, x = (np.asarray(a, np.float64) for a in (ritz_values, weights, x))
    if nodes.ndim != 1 or nodes.size == 0 or w.shape != nodes.shape:
        raise InputError(f"ritz_values and weights must both be [steps], got {nodes.shape} and {w.shape}")
    if not (np.diff(nodes) >= 0).all() or not np.isfinite(nodes).all():
        raise InputError("ritz_values must be finite and ascending")
    if not (w >= 0).all() or abs(w.sum() - 1) > 1e-6:
        raise InputError(f"weights must not be negative and sum to one; the smallest is {w.min()}, the sum {w.sum()}")
    slack = np.broadcast_to(np.asarray(slack, np.float64), nodes.shape)
    if not (slack >= 0).all():
        raise InputError(f"slack must not be negative, got {slack.min()}")
    if np.isnan(x).any():
        raise InputError("x has entries that are not a number")
    below = np.append(0.0, np.cumsum(w))
    below[-1] = 1.0
    latest = np.maximum.accumulate(nodes + slack)
    earliest = np.minimum.accumulate((nodes - slack)[::-1])[::-1]
    passed = np.searchsorted(latest, x, side="right")  # Nodes that are surely at or below x,
    reached = np.searchsorted(earliest, x, side="right" if exhausted else "left")  # that may be below x.
    if not exhausted:
        passed, reached = np.maximum(passed - 1, 0), np.minimum(reached + 1, nodes.size)
    return below[passed], below[reached]
