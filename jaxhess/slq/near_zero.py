"""How many eigenvalues lie near zero: what the steps taken prove of each probe, and errors across probes."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxhess.krylov.errors import share_chance, share_interval
from jaxhess.krylov.near_zero import near_zero_bounds
from jaxhess.slq.spectrum import Spectrum

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class NearZero:
    """The share of eigenvalues within distances of zero; made by `near_zero`.

    Examples:
        >>> import jaxhess
        >>> result = jaxhess.Spectrum(alphas=[[0.0]], betas=[[1.0]], sizes=[1], dim=1000)  # of mean square 1
        >>> jaxhess.near_zero(result, [10.0]).low  # by Chebyshev's inequality
        array([[0.99]])

    Attributes:
        distances: [n] float64, in units of eigenvalues.
        low: [probes, n] float64: the least mass that each probe's measure can have in [-distance, distance].
        high: [probes, n] the largest.
        dim: Rows of the operator.
    """

    distances: Array
    low: Array
    high: Array
    dim: int

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Low and high ends, each [n], of what holds the share of all eigenvalues in [-distance, distance].

        The means over probes of the bounds, widened by the sampling error of the probes: for each distance by itself,
        not for all of them together.

        Raises:
            InputError: `level` is not between 0 and 1.
        """
        chance = share_chance(self.dim, len(self.low), level)
        return share_interval(self.low.mean(0), np.minimum(self.high.mean(0), 1.0), chance)

    def counts(self, level: float = 0.95) -> tuple[Array, Array]:
        """The same of the number of eigenvalues: `dim` times the share, not rounded to integers."""
        low, high = self.interval(level)
        return self.dim * low, self.dim * high


def near_zero(spectrum: Spectrum, distances: npt.ArrayLike) -> NearZero:
    """Bounds of the share of eigenvalues that lie within each of these distances from zero.

    Steps of Lanczos know moments of a probe's measure, not its eigenvalues: a Ritz value with nearly all weight says
    that most eigenvalues are small, not how small. What it does prove is in `jaxhess.krylov.near_zero`. The bounds are
    for a matrix that differs from the operator by no more than the slack (`Spectrum.distribution_bounds`); for
    distances below it the lower bound is zero.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([0.0] * 90 + [1.0] * 10)))
        >>> result = jaxhess.spectrum(A, steps=10, probes=4)
        >>> low, high = jaxhess.near_zero(result, [0.5]).counts()
        >>> bool(low[0] < 90 < high[0])
        True

    Args:
        spectrum: Of any operator.
        distances: [n] not negative, in units of eigenvalues; they may be infinite.

    Raises:
        InputError: `distances` is no list of numbers that are not negative.
    """
    x = np.asarray(distances, np.float64)
    found = []
    for probe, size in enumerate(spectrum.sizes):
        coefficients = spectrum.alphas[probe, :size], spectrum.betas[probe, :size]
        exhausted = bool(spectrum.broke_down[probe])
        found.append(near_zero_bounds(*coefficients, x, float(spectrum.limits.slack[probe].max()), exhausted))
    low, high = (np.array(bound) for bound in zip(*found, strict=True))
    return NearZero(x, low, high, spectrum.dim)
