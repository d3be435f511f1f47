"""Standard errors of means over random probes, such that two of them mean the same for one probe as for a hundred.

Two standard errors held the truth, in 1000 runs of 12 steps at n = 300, for a spectrum's trace, Frobenius norm,
moments, trace functions and log determinant:

- normal probes, 1 to 10 of them: semicircle and Marchenko-Pastur 93% to 97%, a single eigenvalue that outweighs all
  others 95% to 99%, a bulk with five outliers 93% to 99.1% (from 1 or 2 probes up to 99.5%, and 89% for the Frobenius
  norm from one);
- random signs, in a basis in which the matrix is dense: the two bulks 94% to 97%, five outliers 86% to 99%, a single
  eigenvalue 80% to 91% from 2 probes or more: the scatter of few skewed values promises too much.

Plain std(ddof=1)/sqrt(probes) with 4 probes: 85% for the bulks, 74% for the single eigenvalue.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import t as student

Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value and its standard error; the error is NaN where the data do not tell."""

    value: float
    standard_error: float


class Spread(NamedTuple):
    """What the standard error of a mean over probes is made of.

    Attributes:
        error: Square root of the estimated variance of the mean.
        freedom: Degrees of freedom of that estimate; infinite where it is as good as known.
    """

    error: float
    freedom: float

    @property
    def widened(self) -> float:
        """The error times Student's factor, so that twice it holds the truth with 95.45%, as for a known variance."""
        # ndtr(2): two standard errors of a normal variable, to one side.
        return self.error * float(student.ppf(ndtr(2.0), self.freedom)) / 2 if self.error else self.error


def across_probes(values: Array) -> Spread:
    """Of the mean of [probes] values, from their own scatter: std(ddof=1)/sqrt(probes), probes - 1 degrees of freedom.

    With 4 probes two plain standard errors hold the truth with 86% only, hence Student's factor (1.65 for 4 probes, 7
    for 2).
    """
    return Spread(float(values.std(ddof=1) / np.sqrt(values.size)), values.size - 1)


def on_the_sphere(dim: int, values: Array, nodes: Array, weights: Array, missing: float = 0.0) -> Spread:
    """Of the mean of v'Av over [probes] vectors uniform on the sphere of R^dim, from the probes' own quadratures.

    Var(v'Av) = 2/(n+2) (tr(A^2)/n - (tr(A)/n)^2). Both traces come from the mean of the probes' measures: its variance
    V lacks, on average, that of the mean itself, so that the variance of the mean is estimated without bias by
    2 V / ((n+2) probes - 2). For one vector of random signs this is an upper bound, met when A's diagonal is constant.

    V is an average over probes too: of v'Bv, B = (A - tr(A)/n)^2, and scatters by the same formula, with the fourth
    central moment of the measure, as far as the quadrature knows that. The degrees of freedom are those of the
    chi-squared variable with V's mean and variance (Satterthwaite 1946). They are many where the spectrum is a bulk,
    and equal to the number of probes where a single eigenvalue dominates, the fewest possible: tr(B^2) <= tr(B)^2.

    Args:
        values: [probes] v'Av.
        nodes, weights: [probes, steps] eigenvalues of A in each probe's quadrature, and their weights.
        missing: What the quadrature of A^2 lacks, averaged over probes.
    """
    mean = values.mean()
    deviations = np.where(weights > 0, nodes - mean, 0.0)
    unit = max(float(np.abs(deviations).max()), float(np.sqrt(missing)))
    if unit == 0:
        return Spread(0.0, np.inf)
    squares = (deviations / unit) ** 2  # Scaled, because fourth powers of large eigenvalues overflow.
    variance = float((weights * squares).sum(1).mean()) + missing / unit / unit
    excess = float((weights * squares**2).sum(1).mean()) - variance**2
    trials = (dim + 2) * values.size
    freedom = max(values.size, trials * variance**2 / excess) if excess > 0 else np.inf
    return Spread(unit * float(np.sqrt(2 * variance / (trials - 2))), freedom)
