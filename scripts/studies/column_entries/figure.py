"""The figure of the study of columns."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.studies.column_entries.bands import Bandwidths
from scripts.studies.column_entries.measured import CLASSES, EPSILON, GRID, ColumnEntries, Counts

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
COLORS = ("#000000", ORANGE, "#56B4E9", BLUE)
"""Of `CLASSES`."""


def figure(
    chosen: list[ColumnEntries], by_kind: list[ColumnEntries], bands: dict[str, list[list[Bandwidths]]]
) -> Figure:
    """Sizes, classes by kind, relative sizes, bandwidths."""
    drawn = Figure(figsize=(13, 9), dpi=110, layout="constrained", facecolor="white")
    sizes, classes, relative, band = drawn.subplots(2, 2).ravel()
    total = int(chosen[0].classes.sum()) * len(chosen)
    for dtype, color in (("float32", ORANGE), ("float64", BLUE)):
        if dtype in chosen[0].histogram:
            draw_histogram(sizes, np.sum([c.histogram[dtype] for c in chosen], axis=0), total, color, dtype)
    sizes.axvline(EPSILON, color=GREY, linestyle="--", linewidth=1)
    sizes.set_xlabel("magnitude of an entry, |H_ij| (nats)")
    for name, color, label in (
        ("relative", GREEN, "the column's norm"),
        ("to_floor", VERMILION, "float32's noise in the column"),
    ):
        draw_histogram(relative, np.sum([getattr(c, name) for c in chosen], axis=0), total, color, label)
    relative.axvline(1, color=GREY, linestyle="--", linewidth=1)
    relative.set_xlabel("magnitude of an entry over …")
    for panel in (sizes, relative):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(top=3)
        panel.set_ylabel("share of entries per half decade")
        panel.legend(fontsize=9, frameon=False, loc="upper left")
    draw_classes(classes, by_kind)
    draw_bands(band, bands)
    for panel in (sizes, classes, relative, band):
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return drawn


def draw_histogram(panel: Axes, cumulative: Counts, total: int, color: str, label: str) -> None:
    """Shares between the points of `GRID`; what is at or below its first point is told in the legend."""
    shares = np.diff(cumulative) / total
    below = f"{cumulative[0] / total:.1%} at or below {GRID[0]:.0e}"
    width, alpha = (4, 0.6) if label == "float32" else (1.6, 1.0)
    shown = np.where(shares > 0, shares, np.nan)
    panel.stairs(shown, GRID, baseline=None, color=color, linewidth=width, alpha=alpha, label=f"{label}: {below}")


def draw_classes(panel: Axes, by_kind: list[ColumnEntries]) -> None:
    """Stacked bars."""
    names = list(dict.fromkeys(column.kind for column in by_kind))
    counts = np.array([np.sum([c.classes for c in by_kind if c.kind == name], axis=(0, 1)) for name in names])
    shares = counts / counts.sum(axis=1, keepdims=True)
    start = np.zeros(len(names))
    for number, (label, color) in enumerate(zip(CLASSES, COLORS, strict=True)):
        panel.barh(range(len(names)), shares[:, number], left=start, color=color, label=label, height=0.7)
        start += shares[:, number]
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("share of the entries of columns of this kind")
    panel.set_xlim(0, 1)
    panel.legend(fontsize=8, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_bands(panel: Axes, bands: dict[str, list[list[Bandwidths]]]) -> None:
    """Bandwidth against the share kept, of random parts and of parts within kinds."""
    random = [found for of_part in bands["random"] for found in of_part[1:]]
    within = [found for name, several in bands.items() if name != "random" for of in several for found in of[1:]]
    for found, color, marker, label in ((random, BLUE, "o", "random S"), (within, GREEN, "^", "S within a kind")):
        if not found:
            continue
        kept = np.array([b.kept for b in found])
        panel.plot(kept, [b.own for b in found], marker, color=color, ms=6, label=label)
        means, spread = [np.mean(b.permuted) for b in found], [2 * np.std(b.permuted, ddof=1) for b in found]
        panel.errorbar(kept, means, spread, fmt=marker, mfc="none", color=VERMILION if marker == "o" else GREY, ms=6,
                       capsize=2, linewidth=1, label=f"{label}, entries permuted")  # fmt: skip
    panel.set_xscale("log")
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("share of the entries off the diagonal that is kept")
    panel.set_ylabel("half bandwidth, over the largest possible")
    if random or within:
        panel.legend(fontsize=9, frameon=False)
