"""Tables and the figure of the study of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxhess
from jaxhess.results.page import Table
from scripts.studies.ranks.classifier import NEAR, RankCount
from scripts.studies.ranks.floors import LanguageModelRank

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def tables(found: LanguageModelRank, counts: Sequence[RankCount]) -> Iterator[Table]:
    """Floors with the eigenvalues below them, shifts of the extremes, Ritz values, and classifiers."""
    floors = found.distances(0.1, 0.01, 0.001)
    near = jaxhess.near_zero(found.spectrum, [x.value for x in floors.values()])
    low, high = (found.spectrum.dim * share for share in found.shares(floors.values()))
    within = [
        (name, f"{x.value:.3g}" + " ({:.2g} to {:.2g})".format(*x.interval()) * (x.standard_error > 0),
         f"{x.value / found.largest:.2g}", f"{found.over_typical(x):.2g}",
         f"{near.low[:, k].mean():.4f} to {near.high[:, k].mean():.4f}", f"{low[k]:,.0f} to {high[k]:,.0f}",
         f"{found.spectrum.dim - high[k]:,.0f}")
        for k, (name, x) in enumerate(floors.items())
    ]  # fmt: skip
    columns = (
        "floor", "distance, 95%", "over the largest", "over |H| / √n", "share proved", "eigenvalues within, 95%",
        "at least beyond",
    )  # fmt: skip
    yield Table(columns, within, f"Eigenvalues of {found.spectrum.dim:,} within floors")
    if found.roundings:
        yield Table(
            ("weights in", "their change", "loss", "end", "before", "after", "shift", "first order", "± at most"),
            [
                (r.format, f"{r.weights:.2%}", f"{r.loss:.4f}", end, f"{s.before:.5g}", f"{s.after:.5g}",
                 f"{s.after - s.before:+.2g} ± {s.bound:.1g}", f"{s.first_order:+.2g}", f"{s.residual:.2g}")
                for r in found.roundings
                for end, s in (("smallest", r.smallest), ("largest", r.largest))
            ],
            "Extreme eigenvalues after rounding the weights; first order: u'(H rounded - H)u of the eigenvector before",
        )  # fmt: skip
    if counts:
        head = ("activation", "w", "seed", "parameters", "loss", "rank", "less symmetries", "Gauss-Newton's")
        yield Table(
            (*head, "rank over neurons × classes", *(f"beyond {x:g}" for x in NEAR)),
            [
                (c.activation, str(c.width), str(c.seed), str(c.parameters), f"{c.loss:.2f}", str(c.rank),
                 str(c.parameters - c.symmetries), str(c.gauss_newton), f"{c.constant:.2f}",
                 *(str(c.beyond(x)) for x in NEAR))
                for c in counts
            ],
            "Exact ranks, and eigenvalues beyond parts of the largest; less symmetries: parameters less the w + 1 "
            "directions that move all logits alike",
        )  # fmt: skip
        yield proved_table(max(counts, key=lambda c: c.width))


def proved_table(count: RankCount, steps: int = 30, probes: int = 4) -> Table:
    """What Lanczos proves of a matrix with a classifier's eigenvalues, beside the numbers counted."""
    operator = jaxhess.MatrixOperator(jnp.diag(jnp.asarray(count.eigenvalues, jnp.float32)))
    near = jaxhess.near_zero(
        jaxhess.spectrum(operator, steps=steps, probes=probes), [x * np.abs(count.eigenvalues).max() for x in NEAR]
    )
    low, high = near.counts()
    rows = [
        (f"{x:g}", f"{count.parameters - count.beyond(x)}", f"{low[k]:.0f} to {high[k]:.0f}")
        for k, x in enumerate(NEAR)
    ]
    title = f"Eigenvalues of the {count.activation} classifier, w = {count.width}, by {steps} steps and {probes} probes"
    return Table(("distance over the largest", "counted", "within, 95%"), rows, title)


def figure(found: LanguageModelRank, counts: Sequence[RankCount]) -> Figure:
    """Eigenvalues beyond a distance with the floors, and ranks of classifiers."""
    drawn = Figure(figsize=(12, 5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    floors = {name: floor.value for name, floor in found.floors.items()}
    least = min([*(x for x in floors.values() if x > 0), 1e-6 * found.largest]) / 3
    x = np.geomspace(least, 1.5 * found.largest, 60)
    near, dim = jaxhess.near_zero(found.spectrum, x), found.spectrum.dim
    low, high = near.counts()
    half = 0.5  # fewer than one eigenvalue is none
    left.fill_between(x, np.maximum(dim - high, half), dim - low, color=COLORS[0], alpha=0.25, label="95% interval")
    proved = (np.maximum(dim * (1 - bound.mean(0)), half) for bound in (near.high, near.low))
    left.fill_between(x, *proved, color=COLORS[0], alpha=0.5, linewidth=0, label="proved of these probes")
    for color, (name, floor) in zip(COLORS[1:], floors.items(), strict=False):
        left.axvline(floor, color=color, linestyle="--", label=name)
    left.set(xscale="log", yscale="log", ylim=(half, 2 * dim), xlabel="distance from zero (units of eigenvalues)")
    left.set(ylabel="eigenvalues farther away", title="language model")
    left.legend(fontsize="small", loc="lower left")
    for color, activation in zip(COLORS, dict.fromkeys(c.activation for c in counts), strict=False):
        chosen = [c for c in counts if c.activation == activation]
        places = sorted({c.neurons * 10 for c in chosen})
        for style, label, number in (
            ("o-", "parameters", lambda c: c.parameters),
            ("s--", "rank", lambda c: c.rank),
            ("^:", "beyond 1% of the largest", lambda c: c.beyond(1e-2)),
        ):
            means = [float(np.mean([number(c) for c in chosen if c.neurons * 10 == n])) for n in places]
            if label != "parameters" or color == COLORS[0]:
                shown = "black" if label == "parameters" else color
                name = label if label == "parameters" else f"{activation}: {label}"
                right.loglog(places, means, style, color=shown, label=name)
    if counts:
        ends = np.array([min(places), max(places)], float)
        right.loglog(ends, 1.5 * ends, color="gray", linewidth=1, label="slope 1")
        right.set(xlabel="neurons × classes", ylabel="number", title="classifiers")
        right.legend(fontsize="small")
    return drawn
