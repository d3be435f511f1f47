"""Figures of blocks: heat maps between them, what the block-diagonal part misses, and the spectrum of each.

Colours are those of `cividis`, which readers with any kind of colour vision can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from jaxhess.results.figures import ACCENT, INK, RUG, NotebookFigure
from jaxhess.structure.coupling import CouplingMap
from jaxhess.structure.distances import BINS_PER_DECADE, edges, masses
from jaxhess.structure.spectra import BlockSpectra

Array = npt.NDArray[np.float64]

COLOURS = "cividis"
MOST_LABELS = 40
"""Names of blocks along an axis; of more blocks every second, third and so on is named."""
DECADES = 6
"""Of a logarithmic colour scale: what is smaller has the colour of its lower end."""


def coupling_figure(found: CouplingMap) -> Figure:
    """|H_ab|_F of all pairs of blocks."""
    return heat_map(found.coupling, found.names, "Coupling of blocks", "Frobenius norm of the block |H_ab|", log=True)


def relative_figure(found: CouplingMap) -> Figure:
    """|H_ab|_F over the geometric mean of the norms of the two diagonal blocks."""
    label = "|H_ab| / sqrt(|H_aa| |H_bb|), Frobenius norms"
    return heat_map(found.relative, found.names, "Coupling of blocks, relative to the diagonal", label, log=True)


def distance_figure(distance: Array, floor: Array, names: Sequence[str]) -> Figure:
    """Jensen-Shannon distances [B, B] between blocks' spectra; grey where either block's floor [B] is not exceeded."""
    least = np.fmax(floor[:, None], floor)
    distance = np.where((distance <= least) & ~np.eye(len(names), dtype=bool), np.nan, distance)
    label = "Jensen-Shannon distance (0: same, 1: disjoint)"
    return heat_map(distance, names, "Distances between the spectra of blocks", label, log=False, limits=(0, 1))


def heat_map(
    values: Array,
    names: Sequence[str],
    title: str,
    label: str,
    log: bool,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A matrix [B, B] over blocks as colours, legible for a few blocks and for some hundreds.

    Args:
        values: NaN is drawn grey.
        names: Of the blocks.
        title: Of the figure.
        label: Of the colour scale, with units.
        log: Colours by the logarithm, over at most `DECADES`.
        limits: Of the colour scale; None: of the values.
    """
    count = len(names)
    side = float(np.clip(0.28 * count, 5, 11))
    figure = NotebookFigure(figsize=(side + 2.4, side + 1), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    positive = values[np.isfinite(values) & (values > 0)]
    top = float(positive.max()) if positive.size else 1.0
    bottom = max(float(positive.min()), top * 10.0**-DECADES) if positive.size else top / 10
    low, high = limits or (bottom, top)
    low = min(low, high / 10) if log else low
    scale = LogNorm(low, high) if log else Normalize(low, high)
    shown = np.maximum(values, low) if log else values
    image = axes.imshow(shown, cmap=colours(), norm=scale, interpolation="nearest")
    _name_axis(axes.set_yticks, names)
    _name_axis(axes.set_xticks, names, rotation=90)
    below = log and bool((values < low).any())
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="min" if below else "neither")
    bar.set_label(label, color=INK)
    axes.set_title(title, fontsize=11, color=INK, parse_math=False)
    axes.set_xlabel("block b")
    axes.set_ylabel("block a")
    return figure


def fidelity_figure(found: CouplingMap) -> Figure:
    """What the block-diagonal part misses of a product, per block: relative error and cosine, all probes."""
    count = len(found.names)
    figure = NotebookFigure(figsize=(9, float(np.clip(0.2 * count + 1.5, 3.5, 11))), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, whole, label in (
        (left, found.fidelity_error, found.whole_error, "relative error |(Hv)_a − H_aa v_a| / |(Hv)_a|"),
        (right, found.fidelity_cosine, found.whole_cosine, "cosine of (Hv)_a and H_aa v_a"),
    ):
        rows = np.repeat(np.arange(count), values.shape[1])
        axes.plot(values.ravel(), rows, ".", color=ACCENT, alpha=0.6, markersize=5, label="a probe")
        with np.errstate(all="ignore"):
            axes.plot(np.median(values, axis=1), np.arange(count), "|", color=INK, markersize=9, label="median")
        axes.axvline(np.median(whole), color=RUG, linestyle="--", linewidth=1.2, label="whole vectors, median")
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    _name_axis(left.set_yticks, found.names)
    left.invert_yaxis()
    left.set_ylabel("block a")
    right.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="none")
    figure.suptitle("What the block-diagonal part misses of a product with a random vector", fontsize=11, color=INK)
    return figure


def spectra_figure(found: BlockSpectra) -> Figure:
    """The density of every block's eigenvalues on one logarithmic grid, a row for each."""
    largest = max(float(np.nanmax(np.abs(s.ritz_values))) for s in found.spectra) or 1.0
    grid = edges(largest)
    shares = np.array([masses(s, largest) for s in found.spectra])
    count, half = len(found.names), len(grid) // 2
    figure = NotebookFigure(figsize=(10, float(np.clip(0.25 * count + 1.8, 3.5, 11))), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    top = shares.max()
    image = axes.imshow(
        np.maximum(shares, top * 1e-8),
        cmap=colours(),
        norm=LogNorm(top * 1e-8, top),
        aspect="auto",
        interpolation="nearest",
        extent=(0, shares.shape[1], count - 0.5, -0.5),
    )
    for row, spectrum in enumerate(found.spectra):
        ends = (np.nanmin(spectrum.ritz_values), np.nanmax(spectrum.ritz_values))
        places = [_place(float(value), grid) for value in ends]
        axes.plot(places, [row, row], "|", color=RUG, markersize=float(np.clip(300 / count, 3, 9)))
    _name_axis(axes.set_yticks, found.names)
    decades = np.arange(2 * BINS_PER_DECADE, half, 2 * BINS_PER_DECADE)
    ticks = [*(half + decades), *(half - 1 - decades), half - 0.5]
    labels = [f"{grid[half + k]:.0e}" for k in decades] + [f"−{grid[half + k]:.0e}" for k in decades] + ["0"]
    axes.set_xticks(ticks, labels, rotation=60, fontsize=8)
    axes.set_xlim(0, shares.shape[1])
    axes.set_xlabel("eigenvalue (logarithmic in both directions; one bin around zero)")
    axes.set_ylabel("block")
    axes.set_title("Eigenvalues of the diagonal blocks (red: smallest and largest Ritz value)", fontsize=11, color=INK)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("share of the block's eigenvalues per bin", color=INK)
    return figure


def colours() -> Colormap:
    """The colour map, with grey for what is not known."""
    return matplotlib.colormaps[COLOURS].with_extremes(bad="#bbbbbb")


def _place(value: float, grid: Array) -> float:
    """Where an eigenvalue is on an axis that counts bins."""
    return float(np.interp(value, grid, np.arange(len(grid))))


def _name_axis(set_ticks: Callable[..., Any], names: Sequence[str], **style: Any) -> None:
    every = -(-len(names) // MOST_LABELS)
    size = float(np.clip(300 / min(len(names), MOST_LABELS), 6, 9))
    labels = [name if len(name) <= 34 else f"{name[:14]}…{name[-19:]}" for name in names[::every]]
    set_ticks(range(0, len(names), every), labels, fontsize=size, parse_math=False, **style)
