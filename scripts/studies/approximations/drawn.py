"""The figure of structures: error against storage, for each matrix of each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scripts.studies.approximations.compared import LEADING, PLUS_DIAGONAL, RANDOM, SEQUENCES
from scripts.studies.approximations.found import Result

LINES: dict[str, tuple[str, Literal["-", "--"]]] = {
    LEADING: ("#000000", "--"),
    PLUS_DIAGONAL: ("#0072B2", "-"),
    f"{LEADING} + rows": ("#009E73", "-"),
    f"{LEADING} + heads": ("#56B4E9", "-"),
    f"{LEADING} + matrices": ("#E69F00", "-"),
}
MARKS = {
    "diagonal": ("#000000", "o"),
    "blocks": ("#D55E00", "s"),
    "band": ("#CC79A7", "^"),
    "arrow": ("#CC79A7", "D"),
    "nearest Kronecker": ("#009E73", "P"),
    "K-FAC": ("#0072B2", "X"),
}
"""Colours of Okabe and Ito."""
LETTERS = {"rows": "r", "heads": "h", "matrices": "m", "kinds": "k", "layers": "l"}
"""Granularities of blocks, as they are written beside their marks."""


def figure(results: Sequence[Result]) -> Figure:
    """A column for each model; rows: both matrices, on random vectors and on gradients."""
    columns = list(dict.fromkeys(one.model for one in results))
    rows = [(kind, group) for kind in dict.fromkeys(one.kind for one in results) for group in (RANDOM, SEQUENCES)]
    drawn = Figure(figsize=(4.2 * len(columns) + 0.5, 3.1 * len(rows) + 1), dpi=110, layout="constrained")
    axes = drawn.subplots(len(rows), len(columns), squeeze=False, sharex="col", sharey="row")
    for one in results:
        for row, (kind, group) in enumerate(rows):
            if one.kind == kind:
                panel = axes[row, columns.index(one.model)]
                _panel(panel, one, group)
                if row == 0:
                    panel.set_title(one.model, fontsize=10)
    for row, (kind, group) in enumerate(rows):
        axes[row, 0].set_ylabel(f"{kind}, {group}\nmean relative error", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("floats stored per parameter")
    handles = [Line2D([], [], color=color, linestyle=style, label=name) for name, (color, style) in LINES.items()]
    handles += [
        Line2D([], [], color=color, marker=mark, linestyle="none", label=_label(name))
        for name, (color, mark) in MARKS.items()
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return drawn


def _label(name: str) -> str:
    if name == "blocks":
        return "blocks: " + ", ".join(f"{letter} {kind}" for kind, letter in LETTERS.items())
    return "band of layers, by width" if name == "band" else name


def _panel(panel: Axes, one: Result, group: str) -> None:
    for name, (color, style) in LINES.items():
        points = [
            (found[name].storage / one.dim, found[name].errors[group].mean())
            for found in one.budgets.values()
            if name in found
        ]
        if points:
            panel.plot(*zip(*points, strict=True), style, color=color, linewidth=1.3, marker=".", markersize=4)
    for name, found in one.fixed.items():
        color, mark = MARKS[name if name in MARKS else name.split()[0].rstrip(":")]
        place = found.storage / one.dim, float(found.errors[group].mean())
        panel.plot(*place, mark, color=color, markersize=6, markeredgecolor="white", linestyle="none")
        text = LETTERS.get(name.split()[-1]) or (name.split()[-1] if name.startswith("band") else "")
        panel.annotate(text, place, xytext=(-10, -9) if text == "h" else (4, 3), textcoords="offset points", fontsize=8)
    panel.set(xscale="log", yscale="log")
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
