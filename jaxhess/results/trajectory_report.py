"""The files of a trajectory: its record, a table for spreadsheets, a figure and a self-contained page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready, read_json
from jaxhess.operators.adam import adam_threshold
from jaxhess.results.figures import ACCENT, INK, NotebookFigure, png
from jaxhess.results.page import Picture, Section, Table, facts, page
from jaxhess.structure.trajectory import TrajectoryPoint

FORMAT = "jaxhess-trajectory-1"
RECORD, TABLE, PICTURE, PAGE = "trajectory.json", "trajectory.csv", "trajectory.png", "report.html"
TRAJECTORY_FILES = (RECORD, TABLE, PICTURE, PAGE)

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
"""Of curves, in turn: Okabe and Ito's, told apart with poor colour vision."""

REACH = 3
"""Thresholds of learning rates are shown up to so many times the largest eigenvalue."""

ABOUT = """Eigenvalues: a curve follows an eigenvector, not a rank; a point without a line to the left begins a new
curve, because no eigenvector of the checkpoint before has a squared cosine above one half with its own. Bars are
residuals: an eigenvalue lies within. Dashed: 2 / learning rate, above which gradient descent is not stable along an
eigenvector. Dotted: (2 + 2 beta1) / ((1 - beta1) learning rate), which is 38 / learning rate at beta1 = 0.9: Adam's
threshold for its preconditioned Hessian D^-1/2 H D^-1/2 (arXiv 2207.14484, cited from its abstract), not for the matrix
that is followed here unless it is that one. Trace: bars are standard errors over random probes. Shares: of the squared
length of the gradient in the space of the leading eigenvectors, and the mean squared cosine between this space and that
of the checkpoint before."""


def trajectory_files(
    points: Sequence[TrajectoryPoint], record: Mapping[str, Any], beta1: float = 0.9
) -> dict[str, bytes]:
    """The contents of a trajectory's files, by name.

    Args:
        points: In the order of their steps, at least one.
        record: How it was made; goes into the JSON and onto the page.
        beta1: Of Adam, for its threshold.
    """
    data = {"format": FORMAT, "points": [dataclasses.asdict(point) for point in points], "beta1": beta1, **record}
    text = json.dumps(json_ready(data), indent=1, allow_nan=False) + "\n"
    image = png(trajectory_figure(points, beta1))
    return {
        RECORD: text.encode(),
        TABLE: _csv(points).encode(),
        PICTURE: image,
        PAGE: _page(points, record, image).encode(),
    }


def load_trajectory(folder: str | os.PathLike[str]) -> list[TrajectoryPoint]:
    """The points in a folder of `scripts/trajectory.py`.

    Raises:
        InputError: It holds none, or its record is damaged.
    """
    path = Path(folder) / RECORD
    try:
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError("it is no trajectory of ours")
        return [TrajectoryPoint.from_dict(point) for point in found["points"]]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {str(error).rstrip('.')}.") from None


def trajectory_figure(points: Sequence[TrajectoryPoint], beta1: float = 0.9) -> Figure:
    """Eigenvalues by curves with the thresholds of the learning rate, trace, loss, and shares, over steps."""
    figure = NotebookFigure(figsize=(9, 11), layout="constrained", dpi=130)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(2.2, 1, 1, 1))
    _draw_eigenvalues(panels[0], points, beta1)
    traces = [(p.step, p.trace.value, p.trace.standard_error) for p in points if p.trace is not None]
    if traces:
        steps, values, errors = np.array(traces, float).T
        panels[1].errorbar(steps, values, np.nan_to_num(errors), color=ACCENT, marker="o", markersize=3, capsize=2)
    panels[1].set_ylabel("trace")
    _draw(panels[2], points, lambda p: p.loss, ACCENT, "o", "")
    panels[2].set_ylabel("mean loss")
    _draw(panels[3], points, lambda p: p.gradient_share, COLOURS[0], "o", "gradient in the leading space")
    _draw(panels[3], points, lambda p: p.overlap, COLOURS[1], "s", "overlap with the checkpoint before")
    panels[3].set_ylim(-0.03, 1.03)
    panels[3].set_ylabel("share")
    if panels[3].get_legend_handles_labels()[0]:
        panels[3].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    panels[3].set_xlabel("training step")
    panels[0].set_title("Curvature along the training", fontsize=11, color=INK)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def _draw_eigenvalues(axes: Axes, points: Sequence[TrajectoryPoint], beta1: float) -> None:
    curves: dict[int, list[tuple[int, float, float]]] = {}
    colours: dict[int, str] = {}
    for number, point in enumerate(points):
        near = {*point.curves, *points[number - 1].curves} if number else set(point.curves)
        for curve in sorted(near - colours.keys()):
            free = [c for c in COLOURS if c not in {colours.get(other) for other in near}]
            colours[curve] = free[0] if free else COLOURS[curve % len(COLOURS)]
        for curve, value, residual in zip(point.curves, point.eigenvalues, point.residuals, strict=True):
            curves.setdefault(curve, []).append((point.step, value, residual))
    for curve, found in curves.items():
        steps, values, residuals = np.array(found, float).T
        axes.errorbar(
            steps, values, residuals, color=colours[curve], markersize=3.5, marker="o", capsize=2, linewidth=1.2
        )
    low, high = axes.get_ylim()
    top = REACH * max(value for point in points for value in (*point.eigenvalues, 0.0))
    known = [(p.step, p.learning_rate) for p in points if p.learning_rate is not None and p.learning_rate > 0]
    if known:
        steps, rate = np.array(known, float).T
        for factor, style, name in (
            (2.0, "--", "2 / learning rate"),
            (adam_threshold(1, beta1), ":", f"{adam_threshold(1, beta1):.3g} / learning rate (Adam, preconditioned)"),
        ):
            line = factor / rate
            if line.min() > top:  # it would flatten all curves
                name += f": {line.min():,.0f} to {line.max():,.0f}, above this figure"
            axes.plot(steps, line, color=INK, linestyle=style, linewidth=1.3, label=name)
            high = max(high, *(1.05 * line[line <= top]), high)
        axes.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="upper left")
    axes.set_ylabel("leading eigenvalues")


def _draw(
    axes: Axes,
    points: Sequence[TrajectoryPoint],
    value: Callable[[TrajectoryPoint], float | None],
    colour: str,
    mark: str,
    label: str,
) -> None:
    known = [(p.step, found) for p in points if (found := value(p)) is not None]
    if known:
        steps, values = np.array(known, float).T
        axes.plot(steps, values, color=colour, marker=mark, markersize=3.5, linewidth=1.2, label=label or None)


def _csv(points: Sequence[TrajectoryPoint]) -> str:
    """A row for every checkpoint; eigenvalues, their residuals and curves in columns of their own."""
    count = max(len(point.eigenvalues) for point in points)
    names = ("step", "learning_rate", "loss", "gradient_norm", "gradient_share", "overlap", "products", "seconds")
    ranked = [f"{name}_{k + 1}" for k in range(count) for name in ("eigenvalue", "residual", "curve")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "trace", "trace_standard_error", *ranked])
    for p in points:
        trace = ("", "") if p.trace is None else (p.trace.value, p.trace.standard_error)
        pairs = [x for row in zip(p.eigenvalues, p.residuals, p.curves, strict=True) for x in row]
        row = [getattr(p, name) for name in names]
        writer.writerow(["" if x is None else x for x in (*row, *trace, *pairs, *[""] * (len(ranked) - len(pairs)))])
    return text.getvalue()


def _page(points: Sequence[TrajectoryPoint], record: Mapping[str, Any], image: bytes) -> str:
    products = sum(p.products for p in points)
    traces = sum(p.trace_products for p in points)
    notes = [
        f"{len(points)} checkpoints, steps {points[0].step} to {points[-1].step}. {products} products for eigenpairs "
        f"and {traces} for traces, {sum(p.seconds for p in points):.0f} s."
    ]
    warnings = []
    if late := [str(p.step) for p in points if not all(p.converged)]:
        warnings.append(f"Not converged at step {', '.join(late)}: the residuals there are above the tolerance.")
    if blind := [str(p.step) for p in points if not p.complete]:
        warnings.append(
            f"May be incomplete at step {', '.join(blind)}: the steps ran out before an eigenvalue above the smallest "
            "of these would have been seen."
        )
    head = (
        "step",
        "eigenvalues ± residuals (curve)",
        "trace",
        "loss",
        "|gradient|",
        "share",
        "overlap",
        "products",
        "seen",
    )
    sections = [
        Section("In short", [Picture("Curvature along the training", image, ABOUT)]),
        Section(
            "Every checkpoint",
            [
                Table(head, [_row(p) for p in points]),
                "Seen: the magnitude from which on every other eigenvalue would have been seen with probability 95%, "
                "but for those within 5% of one that was found. It is known where the run started from the "
                "eigenvectors of the checkpoint before; elsewhere the run was cold.",
            ],
        ),
        Section("How it was made", [facts(json_ready(dict(record)))]),
    ]
    return page("Curvature along a training", sections, notes, warnings)


def _row(p: TrajectoryPoint) -> tuple[str, ...]:
    found = zip(p.eigenvalues, p.residuals, p.curves, strict=True)

    def number(x: float | None) -> str:
        return "–" if x is None else f"{x:.4g}"

    return (
        str(p.step),
        ", ".join(f"{value:.5g} ± {residual:.1g} ({curve})" for value, residual, curve in found),
        "–" if p.trace is None else f"{p.trace.value:.4g} ± {p.trace.standard_error:.1g}",
        number(p.loss),
        number(p.gradient_norm),
        number(p.gradient_share),
        number(p.overlap),
        f"{p.products} + {p.trace_products}",
        "cold" if p.seen_from is None else number(p.seen_from),
    )
