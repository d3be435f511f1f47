"""Ghosts among the Ritz values of one probe: what Lanczos without re-orthogonalisation adds to a spectrum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.krylov.storage import Reorthogonalize

Array = npt.NDArray[np.float64]

Measured = tuple[float | None, ...] | None

FLOAT32_ROUNDING = 2.0**-23
FACTOR = 2.5
"""What the shortest Ritz vector of a Ritz value that is not inside a cluster costs (Paige 1980)."""


class Clusters(NamedTuple):
    """Ritz values that rounding cannot tell apart, merged; each array is [clusters], ascending.

    Attributes:
        values: Float64 means of the members, by their weights.
        weights: Float64 sums of the members' weights: over all clusters one, for no Ritz value is left out.
        copies: Integers, the number of members.
        residual_bounds: Float64, how far an eigenvalue is from the value at most: the least among the members of a
            member's bound and its distance from the value.
        spurious: Whether the cluster is a single spurious value: no eigenvalue of its own.
    """

    values: Array
    weights: Array
    copies: npt.NDArray[np.int64]
    residual_bounds: Array
    spurious: npt.NDArray[np.bool_]


class Ghosts(NamedTuple):
    """The flags, [m] bool ordered as the Ritz values, and the clusters that remain when copies are merged."""

    flags: npt.NDArray[np.bool_]
    clusters: Clusters


def relative_tolerance(steps: int, rounding: float) -> float:
    """2.5 sqrt(m) rounding: how far, relative to |T|, rounding moves a Ritz value of m steps beyond its residual bound.

    The computed vectors satisfy A Q = Q T + beta_m q_{m+1} e_m' + F, where each column of F is the error of one step.
    What storage and re-orthogonalisation leave is measured in the run (`Quadrature.error_bounds`). This is the rest,
    the rounding of products: at most eps_1 |A| in a step, so |F| <= sqrt(m) eps_1 |A|. A Ritz value that is not itself
    inside a cluster then lies within 2.5 (beta_m |s_mi| + sqrt(m) eps_1 |A|) of an eigenvalue (Paige 1980; Paige 1976
    for F). Here eps_1 is
    `rounding`, the eps of products (Paige's worst case is eight of them; measured columns of F, in
    float32 and float64, are at most 1.1), |A| is the largest |Ritz value|, and the residual bound keeps its factor of
    one: T is what exact Lanczos gives for a matrix whose eigenvalues lie in tiny intervals around A's (Greenbaum 1989).
    Inside clusters copies have been seen up to 1.6 times as far (six distinct eigenvalues, 300 steps). After 100 steps
    the tolerance is 3e-6 in float32; for products in bfloat16 (2^-7) a fifth of |T|, and little can be told apart.

    Raises:
        InputError: `rounding` is not between 0 and 1.
    """
    if not 0 < rounding < 1:
        raise InputError(f"rounding must be the unit roundoff of the run, between 0 and 1, got {rounding}")
    return FACTOR * float(np.sqrt(steps)) * rounding


def tolerances(nodes: Quadrature, rounding: float) -> Array:
    """[m] how far rounding moves each Ritz value: `relative_tolerance` of |T|, and 2.5 times its `error_bounds`."""
    return (
        relative_tolerance(nodes.ritz_values.size, rounding) * np.abs(nodes.ritz_values).max()
        + FACTOR * nodes.error_bounds
    )


def find_ghosts(alphas: npt.ArrayLike, betas: npt.ArrayLike, rounding: float = FLOAT32_ROUNDING) -> Ghosts:
    """The ghosts of a tridiagonal T: copies, and spurious values (Cullum and Willoughby 1979; 1985, chapter 4).

    Copies. Without re-orthogonalisation an eigenvalue that has converged is found again and again. Each copy lies
    within its tolerance (`tolerances`) of it, so neighbours no farther apart than the sum of theirs are one cluster.
    Its member of largest weight stays, the others are flagged: the first to converge carries the probe's own component,
    and the weights of later copies are born of rounding. (The smallest residual bound would say less: all
    converged copies have one that is zero but for rounding.) Distinct eigenvalues that close cannot be told from
    copies: of a bulk that lies far below `rounding` times |T| one value stays. Their number is then not known, their
    total weight is.

    Spurious. A simple eigenvalue of T that is also one of T without its first row and column is no eigenvalue of the
    operator: it is on its way to becoming a copy. The two matrices share theta_i exactly when the first component of
    its eigenvector vanishes, that is, its weight; the distance is about weight times |theta_i - bulk|. Numerically this
    is decided in the arithmetic that T is diagonalised in: a weight no larger than float64's 2^-52, which vanishes
    beside the total of one. `rounding` would be wrong here: a lone outlier of a model of n parameters has a weight of
    1/n, which is less than float32's for n beyond 1e7. (At 1e11 parameters one such outlier in 250 still weighs less
    than 2^-52, by the chi-squared distribution of its weight.) Values on their way whose weight is larger are not
    flagged; their residual bound is large, as that of any value which has not converged.

    Args:
        alphas: [m] diagonal of T.
        betas: [m] norms after each step: betas[:-1] is the off-diagonal, betas[-1] bounds the residuals.
        rounding: How far rounding moves eigenvalues in one step, relative to the largest: the eps of products, 2^-23
            for float32 (the default), 2^-52 for float64, 2^-7 for bfloat16; see `unit_roundoff` in
            `jaxhess.operators.precision`.

    Raises:
        InputError: Bad coefficients (see `quadrature`), or `rounding` not between 0 and 1.
    """
    return classify(quadrature(alphas, betas), rounding)


def classify(nodes: Quadrature, rounding: float = FLOAT32_ROUNDING) -> Ghosts:
    """`find_ghosts` for Ritz values that are already known."""
    theta = nodes.ritz_values
    near = tolerances(nodes, rounding)
    starts = np.flatnonzero(np.append(True, np.diff(theta) > near[1:] + near[:-1]))
    return _clustered(nodes, starts, nodes.weights <= np.finfo(np.float64).eps)


def unflagged(nodes: Quadrature) -> Ghosts:
    """Every Ritz value as a cluster of its own, none a ghost: the truth where the Lanczos vectors are orthogonal."""
    return _clustered(nodes, np.arange(nodes.ritz_values.size), np.zeros(nodes.ritz_values.size, bool))


def independent(
    reorthogonalize: Reorthogonalize | None, orthogonality: Measured, sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """[probes] whether the Lanczos vectors of a run are known to be linearly independent, so that there are no ghosts.

    Two Ritz vectors of one simple eigenvalue would be parallel, which takes a combination of the Lanczos vectors that
    vanishes, and there is none while the 2-norm of Q'Q - I is below one. It is at most `size` times the largest entry:
    up to one half, a run that re-orthogonalised fully has no ghosts. One that measured nothing is trusted. (What a
    window measures is of its own vectors only.) Ritz values within rounding of each other are then different
    eigenvalues, or one multiple eigenvalue that rounding has split.

    Args:
        reorthogonalize: As in `Storage`; None: not known.
        orthogonality: The largest entry of |Q'Q - I| of every probe's kept vectors; None, or of another number of
            probes: nothing was measured.
        sizes: [probes] steps that each probe took.
    """
    if reorthogonalize != "full":
        return np.zeros(len(sizes), bool)
    return ~orthogonality_lost(reorthogonalize, orthogonality, sizes)


def orthogonality_lost(
    reorthogonalize: Reorthogonalize | None, orthogonality: Measured, sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """[probes] whether the vectors that were to stay orthogonal are measured not to be.

    These are the last r after a window of r, none where there was no re-orthogonalisation, and all after any other.
    Lost is a largest entry of |Q'Q - I| above one half of one over their number: they may be dependent (see
    `independent`).
    """
    if orthogonality is None or len(orthogonality) != len(sizes) or reorthogonalize == "none":
        return np.zeros(len(sizes), bool)
    kept = np.minimum(sizes, reorthogonalize) if isinstance(reorthogonalize, int) else sizes
    return np.array([x is not None and m * x > 0.5 for m, x in zip(kept, orthogonality, strict=True)])


def _clustered(nodes: Quadrature, starts: npt.NDArray[np.int64], negligible: npt.NDArray[np.bool_]) -> Ghosts:
    theta, weights, bounds, _ = nodes
    copies = np.diff(np.append(starts, theta.size))
    cluster = np.repeat(np.arange(starts.size), copies)
    by_weight = np.lexsort((-weights, cluster))  # Within each cluster the heaviest comes first.
    kept = by_weight[starts]
    total = np.add.reduceat(weights, starts)
    # As an offset from a member: a mean of equal values is that value, and a cluster may weigh nothing at all.
    offset = np.add.reduceat(weights * (theta - theta[kept][cluster]), starts)
    values = theta[kept] + np.divide(offset, total, out=np.zeros_like(total), where=total > 0)
    within = np.minimum.reduceat(bounds + np.abs(theta - values[cluster]), starts)
    spurious = negligible[kept] & (copies == 1)
    flags = np.ones(theta.size, bool)
    flags[kept] = spurious
    return Ghosts(flags, Clusters(values, total, copies, within, spurious))
