"""Spectra side by side: how far apart they are, and how far sampling error alone would put them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import wasserstein_distance

from jaxhess.krylov.errors import Estimate
from jaxhess.results.figures import eigenvalue_axis, log_ticks, new_figure
from jaxhess.slq.spectrum import Spectrum

Array = npt.NDArray[np.float64]

SAME = 2.0
"""Two spectra are the same as far as their probes can tell within so many times the distance that chance makes."""


class Distance(NamedTuple):
    """Of two spectra.

    Attributes:
        wasserstein: The Wasserstein-1 distance of their measures, the mean over probes: how far mass has to move, in
            units of eigenvalues.
        chance: What two samples of so many probes of one spectrum would be apart, as root mean square; NaN where no
            spectrum has two probes.
        scale: The mean |eigenvalue| of both.
        steps: The Lanczos steps, the first of both, over which all this was taken.
    """

    wasserstein: float
    chance: float
    scale: float
    steps: int

    @property
    def same(self) -> bool | None:
        """Whether the distance is within chance; None where chance is not known."""
        return None if np.isnan(self.chance) else bool(self.wasserstein <= SAME * self.chance)


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """What a table says of one spectrum: extremes, moments tr(H^k)/dim for k from 1, as far as the steps know them."""

    label: str
    smallest: float
    largest: float
    moments: list[Estimate]


def row(label: str, spectrum: Spectrum, moments: int = 4) -> ComparisonRow:
    """The row of a spectrum."""
    smallest, largest = spectrum.extreme()
    known = moments if spectrum.exact_degree is None else min(moments, spectrum.exact_degree)
    return ComparisonRow(label, smallest.value, largest.value, [spectrum.moment(k) for k in range(1, known + 1)])


def distance(a: Spectrum, b: Spectrum) -> Distance:
    """How far apart two spectra are, and by chance would be, over the steps that both have taken.

    More steps make other Ritz values of the same spectrum, without any chance; the first steps of a longer run are the
    shorter run.

    The reference: the root mean square distance of two single probes of one spectrum, over all pairs inside a and
    inside b, times sqrt((1/p + 1/q) / 2) for the means of p and q probes, whose chance is smaller by that.
    Probes that are the same in both (one seed, one model) are closer than that, never farther.
    """
    steps = min(_steps(a), _steps(b))
    a, b = _first(a, steps), _first(b, steps)
    pairs = [
        wasserstein(s, s, [i], [j]) ** 2 for s in (a, b) for i, j in itertools.combinations(range(s.num_probes), 2)
    ]
    single = float(np.sqrt(np.mean(pairs))) if pairs else float("nan")
    scale = np.mean([np.nansum(s.weights * np.abs(s.ritz_values)) / s.num_probes for s in (a, b)])
    fewer = np.sqrt((1 / a.num_probes + 1 / b.num_probes) / 2)
    return Distance(wasserstein(a, b), single * float(fewer), float(scale), steps)


def wasserstein(
    a: Spectrum, b: Spectrum, probes_a: Sequence[int] | None = None, probes_b: Sequence[int] | None = None
) -> float:
    """The Wasserstein-1 distance between the mean measures of the probes (all, or those with these numbers)."""
    (x, w), (y, u) = _measure(a, probes_a), _measure(b, probes_b)
    return float(wasserstein_distance(x, y, w, u))


def densities_figure(spectra: Sequence[Spectrum], labels: Sequence[str]) -> Figure:
    """Smoothed densities over each other, with one kernel and on one axis, and their 95% bands."""
    first = spectra[0].density()
    drawn = [s.density(width=first.width, linthresh=first.linthresh) for s in spectra]
    figure, axes = new_figure()
    floor = min(_floor(s, d.density, d.edges) for s, d in zip(spectra, drawn, strict=True))
    for density, label, color in zip(drawn, _shown(labels), _colors(len(spectra)), strict=True):
        axes.plot(density.centers, np.maximum(density.density, floor / 10), color=color, linewidth=1.5, label=label)
        low, high = (np.maximum(x, floor / 10) for x in density.band)
        axes.fill_between(density.centers, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(floor, max(d.density.max() for d in drawn) * 30)
    log_ticks(axes)
    eigenvalue_axis(axes, *_ends(drawn), first.linthresh)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density (share of all eigenvalues\nper unit of eigenvalue)")
    axes.set_title("Smoothed densities of eigenvalues, 95% bands", fontsize=11)
    _legend(axes)
    return figure


def stems_figure(spectra: Sequence[Spectrum], labels: Sequence[str]) -> Figure:
    """Ritz values against weights of all probes, a colour and a mark for each spectrum."""
    first = spectra[0].density()
    drawn = [s.density(width=first.width, linthresh=first.linthresh) for s in spectra]
    figure, axes = new_figure()
    share = 1 / max(s.dim for s in spectra)
    bottom = 1e-3 * share
    looks = zip(_shown(labels), _colors(len(spectra)), "ox+^vsD*" * 9, strict=False)
    for spectrum, (label, color, mark) in zip(spectra, looks, strict=False):
        taken = np.isfinite(spectrum.ritz_values)
        theta, weights = spectrum.ritz_values[taken], spectrum.weights[taken]
        axes.vlines(theta, bottom, weights, color=color, alpha=0.3, linewidth=1)
        axes.plot(theta, weights, mark, markersize=4.5, color=color, alpha=0.85, label=label)
    axes.axhline(share, color="#c8553d", linestyle="--", linewidth=1.2, label=f"one eigenvalue: 1/{round(1 / share):,}")
    axes.set_yscale("log")
    axes.set_ylim(bottom, 30)
    log_ticks(axes)
    eigenvalue_axis(axes, *_ends(drawn), first.linthresh)
    axes.set_xlabel("Ritz value")
    axes.set_ylabel("weight (estimated share of all eigenvalues)")
    axes.set_title("Ritz values and their weights, all probes", fontsize=11)
    _legend(axes)
    return figure


def _steps(spectrum: Spectrum) -> int:
    """What every probe has taken; a probe that broke down counts as one that went on, for it would find no more."""
    going = spectrum.sizes[~spectrum.broke_down]
    return int(going.min()) if going.size else spectrum.num_steps


def _first(s: Spectrum, steps: int) -> Spectrum:
    """The spectrum as it was after so many steps."""
    cut = s.alphas[:, :steps], s.betas[:, :steps], np.minimum(s.sizes, steps)
    return Spectrum(*cut, s.dim, s.info, run=s.run, step_errors=s.step_errors[:, :steps])


def _measure(spectrum: Spectrum, probes: Sequence[int] | None) -> tuple[Array, Array]:
    rows = slice(None) if probes is None else list(probes)
    values, weights = spectrum.ritz_values[rows], spectrum.weights[rows]
    taken = np.isfinite(values)
    return values[taken], weights[taken]


def _floor(spectrum: Spectrum, density: Array, edges: Array) -> float:
    """A fifth of the lowest density at a Ritz value that carries a visible part of one eigenvalue."""
    visible = spectrum.ritz_values[spectrum.weights >= 1e-4 / spectrum.dim]
    bins = np.clip(np.searchsorted(edges, visible) - 1, 0, density.size - 1)
    return float(density[bins].min() / 5)


def _shown(labels: Sequence[str]) -> list[str]:
    """matplotlib hides labels that begin with an underscore."""
    return [f" {label}" if label.startswith("_") else label for label in labels]


def _legend(axes: Axes) -> None:
    """The legend; labels are names of files, and no mathematics."""
    for text in axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none").get_texts():
        text.set_parse_math(False)


def _ends(drawn: Sequence) -> tuple[float, float]:
    return min(d.edges[0] for d in drawn), max(d.edges[-1] for d in drawn)


def _colors(count: int) -> Array:
    """Distinct for up to ten."""
    return np.asarray(matplotlib.colormaps["tab10"](np.arange(count) % 10))
