"""Smoothed spectral density from quadrature nodes and weights: of total mass one, equivariant under scaling."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from jaxhess.errors import InputError
from jaxhess.krylov.errors import share_chance, share_interval

Array = npt.NDArray[np.float64]
Axis = Literal["symlog", "linear"]


class SpectrumLimits(NamedTuple):
    """What bounds and bands of a spectrum rest on beside the quadratures: `Spectrum.limits`.

    Attributes:
        dim: Rows of the operator.
        ends: Between which its eigenvalues lie.
        slack: For every probe, by how far rounding may have moved each of its Ritz values.
        exhausted: [probes] whether the quadrature is the probe's measure, up to the slack.
    """

    dim: int
    ends: tuple[float, float]
    slack: list[Array]
    exhausted: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Density:
    """Masses of the smoothed spectral measure in bins.

    Attributes:
        edges: [points + 1] ascending eigenvalues.
        mass: [probes, points], each row summing to one.
        bounds: [2, points] of the mass that the equally smoothed measures of these probes can have, their mean.
        chance: [points] half the width of a 95% interval of sampling error, in the square root of the mass.
        axis: The coordinate in which bins are equally wide.
        width: Standard deviation of the kernel in that coordinate.
        linthresh: Scale of the symlog coordinate asinh(x/linthresh); None on a linear axis.
        reflected: Whether the kernel is reflected at zero, because no eigenvalue is negative as far as is known.
    """

    edges: Array
    mass: Array
    bounds: Array
    chance: Array
    axis: Axis
    width: float
    linthresh: float | None
    reflected: bool

    @property
    def mean(self) -> Array:
        """[points] mass averaged over probes."""
        return self.mass.mean(0)

    @property
    def centers(self) -> Array:
        """[points] eigenvalues in the middle of each bin, in the axis' coordinate."""
        edges = _to_axis(self.edges, self.linthresh)
        return _from_axis((edges[1:] + edges[:-1]) / 2, self.linthresh)

    def along(self, count: int) -> Array:
        """[count] eigenvalues from end to end of the grid, equally far apart in the axis' coordinate."""
        low, high = _to_axis(self.edges[[0, -1]], self.linthresh)
        return _from_axis(np.linspace(low, high, count), self.linthresh)

    @property
    def density(self) -> Array:
        """[points] mean mass per unit of eigenvalue."""
        return self.mean / np.diff(self.edges)

    @property
    def band(self) -> tuple[Array, Array]:
        """[points] each: low and high ends of what holds the operator's own density, equally smoothed, with 95%.

        Both what the Lanczos steps leave open (Chebyshev-Markov-Stieltjes inequalities: the mass of a Ritz value lies
        between its neighbours; after a breakdown, within its slack) and the sampling error of the probes.
        """
        low, high = share_interval(self.bounds[0], self.bounds[1], self.chance)
        return low / np.diff(self.edges), high / np.diff(self.edges)


def smoothed(
    ritz_values: Array,
    weights: Array,
    known: SpectrumLimits,
    points: int = 400,
    axis: Axis = "symlog",
    width: float | None = None,
    linthresh: float | None = None,
) -> Density:
    """The smoothed spectral measure of every probe in `points` bins; each probe's masses sum to one at any width.

    The kernel is Gaussian in the axis' coordinate t: x itself ("linear") or asinh(x/linthresh) ("symlog"), in which the
    bins are equally wide. A bin's mass is a difference of the smoothed distribution function: smoothing moves mass to
    other bins, and loses none on any grid. The grid spans the extremes of all probes and four widths more, and the
    outermost bins absorb the tails. Where no Ritz value is negative beyond rounding the kernel is reflected at zero
    (Silverman 1986, section 2.10), and the grid begins there at the earliest: else half the mass of zero eigenvalues
    would be drawn below zero. All defaults scale with the operator.

    Args:
        ritz_values: [probes, steps]; NaN where a probe has fewer.
        weights: [probes, steps], each row summing to one.
        known: For the band.
        width: Standard deviation of the kernel in t. Default: the range of t over twice the number of steps, half the
            mean gap between Ritz values.
        linthresh: Eigenvalue where symlog turns from linear to logarithmic. Default: the weighted median of |theta|
            (over theta != 0 if that is zero), but at least float32's epsilon times the largest |theta|, below which
            single-precision products resolve nothing.

    Raises:
        InputError: An argument is out of range.
    """
    if points < 1 or axis not in ("symlog", "linear"):
        raise InputError(f"density needs points >= 1 and axis 'symlog' or 'linear', got {points} and {axis!r}")
    for name, value in (("width", width), ("linthresh", linthresh)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"{name} must be positive and finite, got {value}")
    taken = np.isfinite(ritz_values)
    theta = ritz_values[taken]
    if axis == "linear":
        linthresh = None
    elif linthresh is None:
        linthresh = _default_linthresh(theta, weights[taken])
    low, high = float(_to_axis(theta.min(), linthresh)), float(_to_axis(theta.max(), linthresh))
    width = _default_width(low, high, ritz_values.shape[1]) if width is None else width
    rows = zip(ritz_values, taken, known.slack, strict=True)
    reflected = all((row[kept] >= -slack).all() for row, kept, slack in rows) and low - 4 * width < 0
    grid = np.linspace(0.0 if reflected else low - 4 * width, high + 4 * width, points + 1)
    with np.errstate(over="ignore"):
        edges = _from_axis(grid, linthresh)
    if not np.isfinite(edges).all():
        raise InputError(f"width {width} in asinh(x/linthresh) puts the ends of the grid beyond float64")
    cuts = np.concatenate([[0.0 if reflected else -np.inf], grid[1:-1], [np.inf]])
    kernel = _Kernel(cuts, grid, width, reflected)
    mass, bounds = np.empty((len(ritz_values), points)), np.zeros((2, points))
    for probe, (nodes, w) in enumerate(zip(ritz_values, weights, strict=True)):
        nodes, w = nodes[taken[probe]], w[taken[probe]]
        mass[probe] = w @ kernel.masses(_to_axis(nodes, linthresh))
        slack = known.slack[probe]
        if known.exhausted[probe]:
            reach = nodes - slack, nodes + slack
        else:
            slack = np.pad(slack, 1)
            around = np.concatenate([[min(known.ends[0], nodes[0])], nodes, [max(known.ends[1], nodes[-1])]])
            reach = around[:-2] - slack[:-2], around[2:] + slack[2:]
        reach = _to_axis(reach[0], linthresh), _to_axis(reach[1], linthresh)
        for bound, extremes in zip(bounds, kernel.extremes(*reach), strict=True):
            bound += w @ extremes
    bounds = np.clip(bounds / len(ritz_values), 0, 1)
    chance = share_chance(known.dim, len(ritz_values)) * np.sqrt(kernel.most)
    return Density(edges, mass, bounds, chance, axis, width, linthresh, reflected)


class _Kernel:
    """The mass that a unit at a place on the axis puts into every bin.

    Args:
        cuts: [bins + 1] of the bins, the outer ones infinite.
        grid: [bins + 1] of the grid.
        width: Of the Gaussian.
        reflected: Whether the place's mirror image belongs to it.
    """

    def __init__(self, cuts: Array, grid: Array, width: float, reflected: bool) -> None:
        self.cuts, self.width, self.reflected = cuts, width, reflected
        middle = (cuts[1:] + cuts[:-1]) / 2
        self.peak = np.where(np.isfinite(middle), middle, np.where(middle > 0, grid[-1], grid[0]))

    def masses(self, places: Array) -> Array:
        """[places, bins]"""
        found = _interval_mass((self.cuts - places[:, None]) / self.width)
        if self.reflected:
            found = found + _interval_mass((self.cuts + places[:, None]) / self.width)
        return found

    def extremes(self, low: Array, high: Array) -> tuple[Array, Array]:
        """[places, bins] each: the least and the most that a unit somewhere between low and high, [places], can put.

        Of a Gaussian's mass in an interval, which falls to either side of one place (or rises to one end); image and
        original are bounded apart.
        """
        least, most = self._one(low, high)
        if self.reflected:
            other = self._one(-high, -low)
            least, most = least + other[0], most + other[1]
        return least, np.minimum(most, 1.0)

    def _one(self, low: Array, high: Array) -> tuple[Array, Array]:
        ends = [_interval_mass((self.cuts - x[:, None]) / self.width) for x in (low, high)]
        nearest = np.clip(self.peak, low[:, None], high[:, None])
        within = ndtr((self.cuts[1:] - nearest) / self.width) - ndtr((self.cuts[:-1] - nearest) / self.width)
        return np.minimum(*ends), np.maximum(np.maximum(*ends), within)

    @property
    def most(self) -> Array:
        """[bins] the most that a unit anywhere can put."""
        at_peak = _interval_mass((self.cuts - self.peak[:, None]) / self.width).diagonal()
        most = np.where(np.isfinite(self.cuts[1:] - self.cuts[:-1]), at_peak, 1.0)
        return np.minimum(most * (2 if self.reflected else 1), 1.0)


def _default_width(low: float, high: float, steps: int) -> float:
    span, magnitude = high - low, max(abs(low), abs(high))
    if span <= 1e-9 * magnitude:  # A single point, up to rounding: its own size is the only scale there is.
        span = magnitude or 1.0
    return span / (2 * steps)


def _to_axis(x: Any, linthresh: float | None) -> Any:
    return x if linthresh is None else np.arcsinh(x / linthresh)


def _from_axis(t: Any, linthresh: float | None) -> Any:
    return t if linthresh is None else linthresh * np.sinh(t)


def _default_linthresh(theta: Array, weights: Array) -> float:
    magnitudes = np.abs(theta)
    if not magnitudes.any():
        return 1.0  # The zero operator has no scale.
    median = _weighted_median(magnitudes, weights)
    if median == 0:
        median = _weighted_median(magnitudes[magnitudes > 0], weights[magnitudes > 0])
    return max(median, float(np.finfo(np.float32).eps) * float(magnitudes.max()))


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _interval_mass(z: Array) -> Array:
    """[..., bins] standard normal mass between consecutive z [..., bins + 1], accurate in both tails."""
    low, high = z[..., :-1], z[..., 1:]
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
