"""Standard errors of means over random probes, and the intervals that follow from them.

One meaning everywhere: `standard_error` is the square root of an estimate of the variance, `freedom` the degrees of
freedom of that estimate, and `interval(0.95)` contains the true value in 95% of runs, with two probes as
with a hundred. Where that is not possible, freedom and interval are NaN, and what is printed says "error not known".

`docs/numerics.md` has the coverage measured over 300 runs of matrices with known spectra, by `pytest -m study -s
tests/slq/test_coverage.py`. For random signs the matrix must be dense in its basis: where it is not, the intervals of a
`Spectrum` are too wide (`disagrees`), and an entry of `diagonal` may have an error of zero by chance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2
from scipy.stats import t as student

from jaxhess.errors import InputError

Array = npt.NDArray[np.float64]


class DataSpread(NamedTuple):
    """How far a value depends on which sequences were taken.

    Examples:
        >>> import jaxhess
        >>> from jaxhess.krylov.errors import DataSpread
        >>> norm = jaxhess.Estimate(10.0, 0.3, 20, data=DataSpread(error=0.4, freedom=7, bias=2.0))
        >>> whole = norm.for_population()
        >>> whole.value, round(whole.standard_error, 3)
        (8.0, 0.5)

    Attributes:
        error: Square root of the estimated variance over draws of the sequences.
        freedom: Degrees of freedom of that estimate.
        bias: By how much the value is too large on average, because the sequences are few; NaN: not known.
        stretch: By what the error over probes is larger when the bias is removed.
    """

    error: float
    freedom: float
    bias: float = 0.0
    stretch: float = 1.0


DISAGREE = 1e-3
"""Chance at which the scatter of probes of random signs counts as smaller than the variance on the sphere."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value that random probes estimate.

    Examples:
        >>> import jaxhess
        >>> trace = jaxhess.Estimate(value=4.0, standard_error=0.5, freedom=9)
        >>> low, high = trace.interval()  # 95%, Student's t
        >>> round(low, 2), round(high, 2)
        (2.87, 5.13)

    Attributes:
        value: The estimate.
        standard_error: Its own estimated standard deviation over draws of the probes; NaN where the data do not tell.
        freedom: Degrees of freedom of that; infinite where it is as good as known, NaN with an unknown error.
        positive: The quantity is a norm or a mean of squares: its interval is one of its logarithm.
        bounds: Of the value that these same probes would give after any number of further Lanczos steps; None where the
            steps taken are enough.
        least, most: The smallest and the largest value that the quantity can have; an interval ends there.
        data: Beside the error over probes, that over the data; None: not known.
    """

    value: float
    standard_error: float
    freedom: float
    positive: bool = False
    bounds: tuple[float, float] | None = None
    most: float = math.inf
    least: float = -math.inf
    data: DataSpread | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The interval that contains the true value with this probability: sampling error on top of `bounds`.

        (NaN, NaN) where the error is not known; infinite on a side without bound.

        Raises:
            InputError: `level` is not between 0 and 1.
        """
        low, high = self.bounds or (self.value, self.value)
        if self.positive and self.value > 0:
            with np.errstate(over="ignore"):
                factor = float(np.exp(student_factor(self.freedom, level) * self.standard_error / self.value))
            return low / factor, min(high * factor, self.most)
        half = student_factor(self.freedom, level) * self.standard_error
        return max(low - half, self.least), min(high + half, self.most)

    def times(self, factor: float) -> Estimate:
        """Of `factor` >= 0 times the quantity."""
        bounds = None if self.bounds is None else (factor * self.bounds[0], factor * self.bounds[1])
        value, error = factor * self.value, factor * self.standard_error
        most = self.most if math.isinf(self.most) else factor * self.most
        data = self.data and self.data._replace(error=factor * self.data.error, bias=factor * self.data.bias)
        return dataclasses.replace(self, value=value, standard_error=error, bounds=bounds, most=most, data=data)

    def for_population(self) -> Estimate:
        """Of the same quantity for all the data that the sequences stand for: bias removed, both errors in one.

        Degrees of freedom by Satterthwaite (1946). NaN throughout where the error over data or the bias is not known,
        and where of a positive quantity nothing is left.
        """
        data = self.data or DataSpread(math.nan, math.nan, math.nan)
        value = self.value - data.bias
        if not math.isfinite(value + data.error) or (self.positive and value <= 0):
            return Estimate(math.nan, math.nan, math.nan)
        variances = np.square([data.stretch * self.standard_error, data.error])
        parts = [v**2 / f for v, f in zip(variances, (self.freedom, data.freedom), strict=True) if v != 0]
        freedom = float(variances.sum()) ** 2 / sum(parts) if sum(parts) else math.inf
        error = float(np.sqrt(variances.sum()))
        # The logarithm of a positive quantity is nearly normal only where its relative error is small.
        in_logarithm = self.positive and error < value / 4
        return Estimate(value, error, freedom, in_logarithm, most=self.most, least=0.0 if self.positive else self.least)

    def to_dict(self) -> dict[str, Any]:
        """What of it is recorded: without bounds where there are none."""
        fields: dict[str, Any] = {"value": self.value, "standard_error": self.standard_error, "freedom": self.freedom}
        fields["interval_95"] = self.interval()
        if self.data is not None:
            fields["data"] = self.data._asdict()
        return fields if self.bounds is None else {**fields, "quadrature_bounds": self.bounds}

    def __str__(self) -> str:
        """Value and 95% interval, five digits: 511 (95%: 402 to 620)."""
        low, high = self.interval()
        if math.isnan(low):
            return f"{self.value:.5g} (error not known)"
        return f"{self.value:.5g} (95%: {low:.5g} to {high:.5g})"


class Spread(NamedTuple):
    """What the standard error of a mean over probes is made of.

    Attributes:
        error: Square root of the estimated variance of the mean.
        freedom: Degrees of freedom of that estimate; infinite where it is as good as known.
    """

    error: float
    freedom: float


UNKNOWN = Spread(math.nan, math.nan)


def student_factor(freedom: float, level: float) -> float:
    """How many standard errors an interval of this level reaches to either side; NaN for unknown freedom.

    Raises:
        InputError: `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"level is the probability of an interval, between 0 and 1, got {level}")
    return float(student.ppf((1 + level) / 2, freedom))


def across_probes(values: Array) -> Spread:
    """Of the mean of [probes] values, from their own scatter: std(ddof=1)/sqrt(probes), probes - 1 degrees of freedom.

    For values that are nearly normal. Unknown for a single one.
    """
    if values.size < 2:
        return UNKNOWN
    return Spread(float(values.std(ddof=1) / np.sqrt(values.size)), values.size - 1)


def of_squares(values: Array) -> Spread:
    """Of the mean of [probes] values of v'Bv, B positive semi-definite (squared norms), from their own scatter.

    Such values are close to gamma variables: exactly where one eigenvalue dominates, and in the first two moments
    always. For k gamma variables the mean is independent of S = (std/mean)^2 (Basu 1955), so an interval of log(mean)
    is the right one, and E S = 1 / (1/C + 1/k) with C the squared relative standard deviation of one value; hence
    1/C = 1/S - 1/k here. C is at most 2 (tr(B^2) <= tr(B)^2). Unknown for a single value.
    """
    count = values.size
    if count < 2:
        return UNKNOWN
    return Spread(float(values.mean() * np.sqrt(relative_variance(values) / count)), count - 1)


def of_forms(variance: float, squares: Array) -> Spread:
    """Of the mean of [probes] values of v'Av, from an unbiased estimate of the variance of one of them.

    The variance is twice a mean over probes, of |Av|^2 less a constant, and the degrees of freedom are those of the
    chi-squared variable with that mean's own variance (Satterthwaite 1946), which the scatter of |Av|^2 tells. They are
    at least one per probe, as where one eigenvalue dominates (see `of_squares`).

    Args:
        variance: Of one value.
        squares: [probes] |Av|^2.
    """
    count = squares.size
    if count < 2:
        return UNKNOWN
    scatter, half = float(squares.var(ddof=1)), variance / 2
    freedom = max(count, 2 * count * half**2 / scatter - 2) if scatter > 0 else math.inf
    return Spread(float(np.sqrt(variance / count)), freedom)


def relative_variance(values: Array) -> Array:
    """C of `of_squares`, of values [probes, ...]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = values.var(axis=0, ddof=1) / values.mean(axis=0) ** 2
        return np.where(found > 0, 1 / np.maximum(1 / found - 1 / len(values), 0.5), 0.0)


def on_the_sphere(
    dim: int, values: Array, nodes: Array, weights: Array, missing: float = 0.0, missing_fourth: float = 0.0
) -> Spread:
    """Of the mean of v'Av over [probes] vectors uniform on the sphere of R^dim, from the probes' own quadratures.

    Var(v'Av) = 2/(n+2) (tr(A^2)/n - (tr(A)/n)^2). Both traces come from the mean of the probes' measures: its variance
    V lacks, on average, that of the mean itself, so that the variance of the mean is estimated without bias by
    2 V / ((n+2) probes - 2). For vectors of random signs this is an upper bound, met when A's diagonal is constant.

    V is an average over probes too: of v'Bv, B = (A - tr(A)/n)^2, and scatters by the same formula, with the fourth
    central moment of the measure. The degrees of freedom are those of the
    chi-squared variable with V's mean and variance (Satterthwaite 1946). They are many where the spectrum is a bulk,
    and equal to the number of probes where a single eigenvalue dominates, the fewest possible: tr(B^2) <= tr(B)^2.
    So many are taken too where the fourth moment is not known.

    Args:
        values: [probes] v'Av.
        nodes, weights: [probes, steps] eigenvalues of A in each probe's quadrature, and their weights.
        missing: What the quadrature of (A - mean)^2 lacks, averaged over probes; infinite if that is not known.
        missing_fourth: The same of (A - mean)^4.
    """
    if not np.isfinite(missing):
        return UNKNOWN
    mean = values.mean()
    deviations = np.where(weights > 0, nodes - mean, 0.0)
    unit = max(float(np.abs(deviations).max()), float(np.sqrt(missing)))
    if unit == 0:
        return Spread(0.0, np.inf)
    squares = (deviations / unit) ** 2  # Scaled, because fourth powers of large eigenvalues overflow.
    variance = float((weights * squares).sum(1).mean()) + missing / unit / unit
    fourth = float((weights * squares**2).sum(1).mean()) + missing_fourth / unit / unit / unit / unit
    excess = fourth - variance**2
    trials = (dim + 2) * values.size
    freedom = max(values.size, trials * variance**2 / excess) if excess > 0 else np.inf
    return Spread(unit * float(np.sqrt(2 * variance / (trials - 2))), freedom)


def share_chance(dim: int, probes: int, level: float = 0.95) -> float:
    """Half the width of an interval in arcsin(sqrt(share)), for shares of eigenvalues that probes estimate.

    A share is v'Pv, P the projector on their eigenvectors, of variance 2 share (1 - share) / ((n + 2) probes) at most
    (on the sphere; less for random signs): in arcsin(sqrt(share)) it is the same everywhere.
    """
    return student_factor(math.inf, level) / math.sqrt(2 * (dim + 2) * probes)


def share_interval(low: Array, high: Array, chance: npt.ArrayLike) -> tuple[Array, Array]:
    """Low and high ends of an interval of shares which are bounded by low and high, from `share_chance`."""
    angles = np.arcsin(np.sqrt(low)) - chance, np.arcsin(np.sqrt(high)) + chance
    return np.sin(np.maximum(angles[0], 0)) ** 2, np.sin(np.minimum(angles[1], np.pi / 2)) ** 2


def disagrees(scatter: Spread, sphere: Spread) -> bool:
    """Whether the probes' own scatter is smaller than the sphere's variance allows by chance.

    For random signs the sphere's variance is an upper bound. It is the better one for few probes, because their scatter
    is skewed where few eigenvalues dominate; where the matrix is nearly diagonal it is far too large, and this says so.
    In between, intervals for random signs are wider than they need to be.
    """
    least = chi2.ppf(DISAGREE, scatter.freedom) / scatter.freedom
    return bool(scatter.error**2 < least * sphere.error**2)
