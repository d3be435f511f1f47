"""The figure of the study of block-diagonal fidelity."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.studies.block_fidelity.products import PAPER, TABLE_6, TABLE_7, ParameterPoint, over_probes

CAPTION = """Above: error and cosine of every layer and probe; on the grey arc e² + c² = 1, and no two vectors can be
inside of it. Crosses: Tables 6 and 7 of arXiv 2602.00816. Below: the mean of e² + c² - 1 of finite differences over
their step; lines: predicted from noise of the size measured on other probes, independent in y and d; black: exact
products. Shaded: the steps of the paper."""

COLORS = {"exact": "#000000", "float32": "#0072B2", "bfloat16": "#D55E00"}
MARKS = {"exact": "o", "float32": "s", "bfloat16": "^"}


def figure(points: list[ParameterPoint], layers: list[int]) -> Figure:
    """One column per point: errors and cosines above, e^2 + c^2 over steps below."""
    drawn = Figure(figsize=(5.6 * len(points) + 0.6, 9.4), dpi=130, layout="constrained", facecolor="white")
    axes = drawn.subplots(2, len(points), squeeze=False)
    for (above, below), point in zip(axes.T, points, strict=True):
        pairs(above, point, layers)
        by_step(below, point, layers)
        for panel in (above, below):
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    return drawn


def pairs(panel: Axes, point: ParameterPoint, layers: list[int]) -> None:
    """Error against cosine of every layer and probe: exact, and of the smallest of the paper's steps."""
    panel.plot(np.cos(t := np.linspace(0, math.pi, 200)), np.sin(t), color="#999999", linewidth=1)
    shown = {"exact": point.products["exact"]}
    for dtype in ("float32", "bfloat16"):
        steps = [p for p in point.products.values() if p.dtype == dtype]
        within = [p for p in steps if p.step is not None and p.step >= 0.999 * PAPER[0]]
        if within:
            shown[dtype] = within[0]
    for kind, products in shown.items():
        x, y = (getattr(products.found, name)[:, layers].ravel() for name in ("cosine", "error"))
        size, fill = (7, "none") if kind == "exact" else (4, COLORS[kind])
        panel.plot(x, y, MARKS[kind], color=COLORS[kind], ms=size, alpha=0.6, mfc=fill, label=products.name)
    for table, name in ((TABLE_6, "Table 6"), (TABLE_7, "Table 7")):
        spreads = (table.cosine_spread, table.error_spread)
        panel.errorbar(
            table.cosine, table.error, xerr=spreads[0], yerr=spreads[1], color="#009E73", fmt="none", capsize=3
        )
        panel.annotate(name, (table.cosine, table.error), (12, 14), textcoords="offset points", color="#009E73")
    panel.set(xlim=(-1.05, 1.05), ylim=(0, 1.75), xlabel="cosine of y and d", ylabel="relative error |y - d| / |y|")
    panel.set_title(f"layers and probes, {point.name}", fontsize=11)
    panel.legend(fontsize=8, loc="lower left", framealpha=0.9, edgecolor="none")


def by_step(panel: Axes, point: ParameterPoint, layers: list[int]) -> None:
    """Excess of differences, measured and predicted, against the step."""
    exact = over_probes(point.products["exact"].found.excess[:, layers])
    panel.axhline(exact.value, color=COLORS["exact"], linestyle=":", label="exact products")
    panel.axhline(TABLE_7.excess, color="#009E73", linewidth=1, label="Table 7")
    for dtype in ("float32", "bfloat16"):
        found = [p for p in point.products.values() if p.dtype == dtype and p.step is not None]
        if not found:
            continue
        steps = [p.step for p in found if p.step is not None]
        means = [over_probes(p.found.excess[:, layers]) for p in found]
        told = [np.nanmean(p.predicted().excess[..., layers]) for p in found]
        values, errors = zip(*means, strict=True)
        low = np.minimum(errors, 0.9 * np.array(values))  # the axis is logarithmic
        panel.errorbar(
            steps, values, (low, errors), fmt=MARKS[dtype], ms=5, color=COLORS[dtype], capsize=2, label=dtype
        )
        panel.plot(steps, told, "-", color=COLORS[dtype], linewidth=1, label=f"{dtype}, predicted from noise")
    panel.axvspan(*PAPER, color="#f2e8cf", zorder=0)
    panel.set(xscale="log", yscale="log", xlabel="step per coordinate", ylabel="mean of e² + c² - 1 over layers")
    panel.set_title(f"e² + c² - 1, {point.name}", fontsize=11)
    panel.legend(fontsize=8, framealpha=0.9, edgecolor="none")
