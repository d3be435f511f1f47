"""What the three uses of curvature found: tables and a figure."""

from __future__ import annotations

import collections
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jaxhess.results.page import Table
from scripts.studies.bias import curvatures as kinds
from scripts.studies.bias.curvatures import AUTOMATIC, BLOCKS, EXACT, GAUSS_NEWTON, PAPER, fixed
from scripts.studies.bias.solves import Solve, Systems
from scripts.training.newton import NewtonRun
from scripts.training.short_runs import over_seeds

Array = npt.NDArray[np.float64]

MEANS = ("claimed", "residual")
SMALL_ERROR = 0.1
"""Relative error of a solution up to which a bias is small."""
COLORS = {
    EXACT: "#000000", AUTOMATIC: "#0072B2", fixed(PAPER[0]): "#56B4E9", fixed(PAPER[1]): "#009E73",
    GAUSS_NEWTON: "#D55E00", BLOCKS: "#CC79A7",
}  # fmt: skip
NOTE = """Left: error of solutions, mean over right-hand sides, by damping in |smallest Ritz value|; filled float32,
hollow bfloat16; shaded: what counts as small. Middle: rank correlation of predicted and actual changes of a test
image's loss when a training image is left out, mean over seeds with its 95% interval. Right: training loss against what
was spent, in gradients; lines are means over seeds of truncated Newton steps, crosses are Adam's ends after so many
gradients."""


class Ranks(NamedTuple):
    """Influence against retraining, for one classifier.

    Attributes:
        rho: For every curvature [seeds] Spearman's rank correlation, mean over test images; a solve that was refused
            gives no scores and counts as 0.
        refused: For every curvature how many were.
        steps: For every curvature the mean number of products of a solve.
        again: [seeds] of exact influence with retraining from the first weights; empty where that was not done.
        unreached: Retrainings that reached no minimum.
    """

    rho: dict[str, Array]
    refused: dict[str, int]
    steps: dict[str, float]
    again: Array
    unreached: int


class Ends(NamedTuple):
    """Adam after so many steps.

    Attributes:
        steps: How many.
        losses: [seeds].
        rate: The learning rate, chosen on other seeds.
        at_an_end: Whether the best rate was the smallest or the largest that was tried.
        seconds: Of a step, by the clock.
    """

    steps: int
    losses: Array
    rate: float
    at_an_end: bool
    seconds: float


class Trained(NamedTuple):
    """Newton steps of every curvature, a run for each seed, and Adam.

    Attributes:
        runs: By curvature.
        initial: [seeds] losses.
        adam: Adam after as many "steps", "gradients" and "seconds" as Newton steps with exact products took.
        dampings: Of the first Newton step, chosen on other seeds.
    """

    runs: dict[str, list[NewtonRun]]
    initial: Array
    adam: dict[str, Ends]
    dampings: dict[str, float]


def solve_table(systems: Systems) -> Table:
    """Solves, over right-hand sides."""
    rows = []
    for name, damping in dict.fromkeys((solve.name, solve.damping) for solve in systems.solves):
        found = systems.of(name, damping)
        value, error = over_seeds([solve.counted for solve in found])
        there = [s for s in found if np.isfinite(s.residual)]
        means = [f"{np.mean([s[k] for s in there]):.1e}" if there else "" for k in map(Solve._fields.index, MEANS)]
        steps = f"{np.mean([s.steps for s in there]):.0f}" if there else ""
        ended = ", ".join(f"{how} {n}" for how, n in collections.Counter(s.ended for s in found).items())
        rows.append((name, f"{damping:g}", steps, *means, f"{value:.1e} ± {error:.0e}", ended))
    head = ("products", "damping", "steps", "its own residual", "exact residual", "error of x", "ended")
    return Table(head, rows, f"CG solves; damping in |smallest Ritz value| = {abs(systems.smallest):.3g}; means")


def rank_table(ranks: dict[str, Ranks]) -> Table:
    """Rank correlations, and products of a solve."""
    rows = []
    for name in next(iter(ranks.values())).rho:
        cells = []
        for found in ranks.values():
            value, error = over_seeds(found.rho[name])
            steps = f"{found.steps[name]:.0f}" if math.isfinite(found.steps[name]) else ""
            cells += [f"{value:.3f} ± {error:.1g}", steps, str(found.refused[name])]
        rows.append((name, *cells))
    for k, found in enumerate(ranks.values()):
        if found.again.size:
            value, error = over_seeds(found.again)
            cells = [""] * (3 * len(ranks))
            cells[3 * k] = f"{value:.3f} ± {error:.1g}"
            rows.append((f"{EXACT}, against retraining from the first weights", *cells))
    head = ("products", *(x for name in ranks for x in (f"rho, {name}", "products", "refused")))
    return Table(head, rows, "Influence against leave-one-out retraining, mean over seeds")


def newton_table(trained: Trained) -> Table:
    """Losses at the end, and what was spent."""
    rows = []
    for name, runs in trained.runs.items():
        value, error = over_seeds([run.losses[-1] for run in runs])
        cost = np.mean([run.cost(kinds.gradients_per_product(name, 4))[-1] for run in runs])
        seconds = np.mean([run.seconds_without_first for run in runs]) / len(runs[0].dampings)
        refused = np.mean([run.refused for run in runs])
        cells = (f"{value:.3f} ± {error:.1g}", f"{cost:.0f}", f"{seconds:.2g}", f"{refused:.1f}")
        rows.append((name, *cells, f"damping {runs[0].dampings[0]:g}"))
    for what, ends in trained.adam.items():
        value, error = over_seeds(ends.losses)
        rate = f"rate {ends.rate:g}" + (", an end of those tried" if ends.at_an_end else "")
        spent = (f"{value:.3f} ± {error:.1g}", str(ends.steps), f"{ends.seconds:.2g}", "")
        rows.append((f"Adam, as many {what}", *spent, rate))
    head = ("steps with", "training loss", "gradients spent", "seconds per step", "steps refused", "chosen elsewhere")
    value, error = over_seeds(trained.initial)
    return Table(head, rows, f"Training; before: {value:.3f} ± {error:.1g}")


def figure(systems: Systems, ranks: dict[str, Ranks], trained: Trained) -> Figure:
    """Errors of solutions, rank correlations, losses."""
    drawn = Figure(figsize=(16, 5.6), dpi=120, layout="constrained", facecolor="white")
    left, middle, right = drawn.subplots(1, 3)
    dampings = sorted({solve.damping for solve in systems.solves})
    for name in dict.fromkeys(solve.name for solve in systems.solves):
        color, fill, label = _style(name)
        errors = [np.mean([s.counted for s in systems.of(name, d)]) for d in dampings]
        left.plot(dampings, errors, "o-" if fill else "o--", color=color, mfc=color if fill else "white", label=label)
    left.axhspan(1e-7, SMALL_ERROR, color="#f2e8cf", zorder=0)
    left.set(xscale="log", yscale="log", xlabel="damping, in |smallest Ritz value|", ylabel="relative error of x")
    left.set_ylim(bottom=1e-5)
    left.set_xticks(dampings, [f"{d:g}" for d in dampings])
    left.minorticks_off()
    names = list(next(iter(ranks.values())).rho)
    for k, (classifier, found) in enumerate(ranks.items()):
        for i, name in enumerate(names):
            color, fill, _ = _style(name)
            value, error = over_seeds(found.rho[name])
            middle.errorbar(value, -i - 0.3 * k, xerr=error, fmt="os"[k], color=color,
                            mfc=color if fill else "white", capsize=3)  # fmt: skip
        middle.plot([], [], "os"[k], color="gray", label=classifier)
    middle.set_yticks([-i - 0.15 for i in range(len(names))], names, fontsize=8)
    middle.set(xlabel="Spearman's rho with leave-one-out retraining", xlim=(-0.2, 1.05))
    for name, runs in trained.runs.items():
        color, fill, label = _style(name)
        costs = np.mean([run.cost(kinds.gradients_per_product(name, 4)) for run in runs], axis=0)
        mean = np.mean([run.losses for run in runs], axis=0)
        right.plot(np.maximum(costs, 1), mean, "-" if fill else "--", color=color, label=label)
    for ends in trained.adam.values():
        value, error = over_seeds(ends.losses)
        right.errorbar(ends.steps, value, yerr=error, fmt="X", color="#7f7f7f", capsize=3)
    right.plot([], [], "X", color="#7f7f7f", label="Adam, its end after so many")
    right.set(xscale="log", xlabel="spent, in gradients", ylabel="training loss, nats per byte")
    for panel in (left, middle, right):
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in (left, right):
        panel.legend(fontsize=7.5, frameon=False)
    middle.legend(fontsize=8, frameon=False, loc="upper left")
    return drawn


def _style(name: str) -> tuple[str, bool, str]:
    """Color, whether it is float32, and label."""
    wide = name.removesuffix(f", {kinds.NARROW}")
    return COLORS[wide], wide == name, name
