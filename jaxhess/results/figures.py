"""Figures of a spectrum. Object API only: no pyplot, no global state, nothing needs a display."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from jaxhess.slq.density import Axis, Density
from jaxhess.slq.random_matrix import LimitLaw
from jaxhess.slq.spectrum import Spectrum

Array = npt.NDArray[np.float64]

INK, ACCENT, RUG = "#1b2a41", "#2f6fb3", "#c8553d"
CENTRAL_MASS = 0.99
"""Ritz values outside the central part of this mass are outliers: they are ticked under the density."""

CURVE_POINTS = 1500
"""Of a distribution function: more than the pixels that a figure is wide."""

PLAIN_SHARE = 3
"""Digits up to which a share is written out."""


class NotebookFigure(Figure):
    """A Figure which a notebook shows as PNG, although pyplot (which registers the usual formatter) is not imported."""

    def _repr_png_(self) -> bytes:
        return png(self, dpi=100)


def png(figure: Figure, dpi: float | str = "figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def density_figure(spectrum: Spectrum, axis: Axis = "symlog", overlay: LimitLaw | None = None) -> Figure:
    """The smoothed density of Ritz values, the 95% band of the equally smoothed eigenvalues, outliers ticked below.

    `overlay` is a law drawn dashed over them, unsmoothed and without its atom, whose share the legend has.
    """
    density = spectrum.density(axis=axis)
    figure, axes = new_figure()
    mean, (lower, upper) = density.density, density.band
    bottom = _density_floor(spectrum, density)
    label = "weights of the Ritz values, smoothed"
    axes.plot(density.centers, np.maximum(mean, bottom / 10), color=ACCENT, linewidth=1.6, label=label)
    band = (np.maximum(lower, bottom / 10), np.maximum(upper, bottom / 10))
    label = "all eigenvalues, equally smoothed: 95%"
    axes.fill_between(density.centers, *band, color=ACCENT, alpha=0.2, linewidth=0, label=label)
    if overlay is not None:
        label = "limit law" + (f", and {overlay.atom:.3g} of all at zero" if overlay.atom else "")
        axes.plot(overlay.x, np.maximum(overlay.density, bottom / 10), color=INK, ls="--", linewidth=1.2, label=label)
    outliers = _outliers(spectrum)
    if outliers.size:
        label = f"Ritz values outside the central {CENTRAL_MASS:.0%} of the mass"
        floor = np.full(outliers.size, 0.025)
        below = axes.get_xaxis_transform()
        axes.plot(outliers, floor, "|", markersize=12, color=RUG, alpha=0.8, label=label, transform=below)
    axes.set_yscale("log")
    axes.set_ylim(bottom, mean.max() * 30)
    log_ticks(axes)
    eigenvalue_axis(axes, density.edges[0], density.edges[-1], density.linthresh)
    axes.set_ylabel("density (share of all eigenvalues\nper unit of eigenvalue)")
    title = f"Smoothed density of the eigenvalues of the {spectrum.matrix_name}\n{_provenance(spectrum)}"
    axes.set_title(title, fontsize=11, color=INK, parse_math=False)
    smallest, largest = (format_number(extreme.value) for extreme in spectrum.extreme())
    same = smallest == largest
    axes.set_xlabel(
        f"eigenvalue (Ritz value {largest})" if same else f"eigenvalue (Ritz values {smallest} to {largest})"
    )
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")
    return figure


def distribution_figure(spectrum: Spectrum) -> Figure:
    """The share of eigenvalues at or below x on the density's axis: the probes' mean, its bounds and its 95% interval.

    The inner band is the mean over probes of the Chebyshev-Markov-Stieltjes bounds, so that it bounds the mean of the
    probes' own distribution functions; the outer one adds the sampling error. Shares are on a logit axis that
    ends at a tenth of one eigenvalue, from 0 and from 1.
    """
    density = spectrum.density()
    figure, axes = new_figure()
    taken = np.isfinite(spectrum.ritz_values)
    order = np.argsort(spectrum.ritz_values[taken])
    nodes = spectrum.ritz_values[taken][order]
    upto = np.append(0.0, np.cumsum(spectrum.weights[taken][order])) / spectrum.num_probes
    x = np.sort(np.append(density.along(CURVE_POINTS), nodes))
    mean = upto[np.searchsorted(nodes, x, side="right")]
    lower, upper = (bound.mean(0) for bound in spectrum.distribution_bounds(x))
    low, high = spectrum.distribution_interval(x)
    floor = max(0.1 / spectrum.dim, 1e-14)  # One minus a tenth of it must not be one.
    shares = (mean, lower, upper, low, high)
    mean, lower, upper, low, high = (np.clip(share, floor / 10, 1 - floor / 10) for share in shares)
    band = "bounds for these probes"
    axes.fill_between(x, lower, upper, color=ACCENT, alpha=0.3, linewidth=0, step="post", label=band)
    band = "with the sampling error of the probes: 95%"
    axes.fill_between(x, low, high, color=ACCENT, alpha=0.12, linewidth=0, step="post", label=band)
    axes.plot(x, mean, color=ACCENT, linewidth=1.6, drawstyle="steps-post", label="mean over probes")
    axes.set_yscale("logit")
    axes.set_ylim(floor, 1 - floor)
    _logit_ticks(axes, floor)
    eigenvalue_axis(axes, density.edges[0], density.edges[-1], density.linthresh)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share of all eigenvalues at or below")
    title = f"Distribution of the eigenvalues of the {spectrum.matrix_name}\n{_provenance(spectrum)}"
    axes.set_title(title, fontsize=11, color=INK, parse_math=False)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9, edgecolor="none")
    return figure


def stem_figure(spectrum: Spectrum) -> Figure:
    """Ritz values against quadrature weights, one colour per probe, and the share 1/dim of a single eigenvalue.

    Ghosts are hollow.
    """
    density = spectrum.density()
    figure, axes = new_figure()
    share = 1 / spectrum.dim
    # Ghosts can weigh 1e-50; six decades below one eigenvalue nothing says more about H than its absence.
    floor = 1e-6 * share
    weights = spectrum.weights[np.isfinite(spectrum.ritz_values)]
    bottom = min(max(weights[weights > 0].min(), floor), share) / 5
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, spectrum.num_probes))
    listed = spectrum.num_probes <= 6
    for probe, size in enumerate(spectrum.sizes):
        theta, w = spectrum.ritz_values[probe, :size], spectrum.weights[probe, :size]
        axes.vlines(theta, bottom, w, color=colors[probe], alpha=0.35, linewidth=1)
        label = f"probe {probe + 1}" if listed else None
        axes.plot(theta, w, "o", markersize=4, color=colors[probe], alpha=0.85, label=label)
    for probe, flags in enumerate(spectrum.ghosts):  # Over the dots, so that those are still one line per probe.
        theta, w = spectrum.ritz_values[probe, flags], spectrum.weights[probe, flags]
        axes.plot(theta, w, "o", markersize=4, markerfacecolor="white", markeredgecolor=colors[probe], linestyle="none")
    if spectrum.ghosts.any():
        axes.plot([], [], "o", markersize=4, markerfacecolor="white", markeredgecolor=INK, label="hollow: ghosts")
    axes.axhline(share, color=RUG, linestyle="--", linewidth=1.2, label=f"one eigenvalue: 1/{spectrum.dim:,}")
    axes.set_yscale("log")
    axes.set_ylim(bottom, max(weights.max(), share) * 30)
    log_ticks(axes)
    eigenvalue_axis(axes, density.edges[0], density.edges[-1], density.linthresh)
    axes.set_xlabel("Ritz value")
    axes.set_ylabel("weight (estimated share of all eigenvalues)")
    hidden = int((weights < bottom).sum())
    note = f"; {hidden} Ritz values of smaller weight are below the axis" if hidden else ""
    colour = "" if listed else ", one colour per probe"
    title = f"Ritz values and their weights\n{_provenance(spectrum)}{colour}{note}"
    axes.set_title(title, fontsize=11, color=INK, parse_math=False)
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none", ncols=2 if listed else 1)
    return figure


def format_number(x: float) -> str:
    """Five digits for a label: plain where that is short, else a power of ten in mathtext."""
    return f"{x:.5g}".replace("-", "\N{MINUS SIGN}") if x == 0 or 1e-3 <= abs(x) <= 1e4 else _power(x)


def new_figure() -> tuple[Figure, Axes]:
    """An empty figure in the style of all of them, and its axes."""
    figure = NotebookFigure(figsize=(9, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _provenance(spectrum: Spectrum) -> str:
    probes, steps = spectrum.num_probes, spectrum.num_steps
    counts = f"{probes} probe{'s' * (probes > 1)} × {steps} Lanczos step{'s' * (steps > 1)}"
    return f"{counts}, {spectrum.dim:,} parameter{'s' * (spectrum.dim > 1)}"


def _density_floor(spectrum: Spectrum, density: Density) -> float:
    """Lowest density worth drawing: half the lowest at any Ritz value that carries a visible part of one eigenvalue."""
    visible = spectrum.weights >= 1e-4 / spectrum.dim  # Below are 1% of lone outliers (chi-squared(1)/n), and ghosts.
    nodes = np.where(visible, spectrum.ritz_values, np.nan)
    nodes = nodes[np.isfinite(nodes)]
    bins = np.clip(np.searchsorted(density.edges, nodes) - 1, 0, density.mean.size - 1)
    return float(density.density[bins].min() / 5)


def _outliers(spectrum: Spectrum) -> Array:
    """Ritz values outside the central part of the mass, without ghosts: a tick is to stand for an eigenvalue."""
    taken = np.isfinite(spectrum.ritz_values)
    theta, weights = spectrum.ritz_values[taken], spectrum.weights[taken]
    order = np.argsort(theta)
    theta, weights, ghosts = theta[order], weights[order], spectrum.ghosts[taken][order]
    upto = np.cumsum(weights) / weights.sum()
    tail = (1 - CENTRAL_MASS) / 2
    return theta[((upto < tail) | (upto - weights / weights.sum() > 1 - tail)) & ~ghosts]


def eigenvalue_axis(axes: Axes, low: float, high: float, linthresh: float | None) -> None:
    """The horizontal axis of eigenvalues from low to high, linear or asinh(x / linthresh)."""
    axes.set_xlim(low, high)
    ticks = []
    if linthresh is not None:
        axes.set_xscale("asinh", linear_width=linthresh)
        ticks = _asinh_ticks(low, high, linthresh)
    if len(ticks) >= 3:
        plain = all(x == 0 or 1e-3 <= abs(x) <= 1e4 for x in ticks)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(lambda x, _: format_number(x) if plain else _power(x))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7))
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-3, 4))
        axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_minor_locator(NullLocator())


def _asinh_ticks(low: float, high: float, linthresh: float, most: int = 13) -> list[float]:
    """Round numbers inside (low, high), at least 1/most of the axis apart in asinh(x/linthresh).

    Powers of ten, and 2 and 5 times them when there are few; fewer than three on an axis narrower than that.
    """
    apart = (np.arcsinh(high / linthresh) - np.arcsinh(low / linthresh)) / most
    top = int(np.floor(np.log10(max(abs(low), abs(high)))))
    stride = max(1, int(np.ceil(apart / np.log(10))))  # Exponents that it divides: the same on both sides of zero.
    decades = [10.0**k for k in range(top - top % stride, top - 40, -stride)]
    ticks: list[float] = [0.0] if low < 0 < high else []
    for candidates in (decades, [f * d for d in decades for f in (5.0, 2.0)]):
        for x in [sign * size for size in candidates for sign in (1, -1)] if len(ticks) < 5 else []:
            t = np.arcsinh(x / linthresh)
            if low < x < high and all(abs(t - np.arcsinh(old / linthresh)) >= apart for old in ticks):
                ticks.append(x)
    return sorted(ticks)


def log_ticks(axes: Axes) -> None:
    """Few ticks on a logarithmic vertical axis."""
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _logit_ticks(axes: Axes, floor: float, most: int = 5) -> None:
    """Ticks at powers of ten from either end, at most so many on a side, and at one half."""
    deepest = int(np.floor(-np.log10(floor)))
    powers = range(1, deepest + 1, -(-deepest // most))
    ticks = [10.0**-k for k in powers]
    axes.yaxis.set_major_locator(FixedLocator([*ticks, 0.5, *(1 - tick for tick in ticks)]))
    axes.yaxis.set_minor_locator(NullLocator())
    low = [f"{tick:g}" if k <= PLAIN_SHARE else f"$10^{{-{k}}}$" for k, tick in zip(powers, ticks, strict=True)]
    high = [
        f"{1 - tick:g}" if k <= PLAIN_SHARE else f"1 − $10^{{-{k}}}$" for k, tick in zip(powers, ticks, strict=True)
    ]
    axes.yaxis.set_ticklabels([*low, "0.5", *high])


def _power(x: float) -> str:
    """A number as mathtext with a power of ten: $2\\times 10^{-7}$, $-10^{-3}$, 0."""
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.4e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    factor = {"1": "", "-1": "-"}.get(mantissa, f"{mantissa}\\times ")
    return f"${factor}10^{{{int(exponent)}}}$"
