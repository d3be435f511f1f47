"""Tables of Ritz values with their weights, and of how many eigenvalues are proved to lie near zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxhess.results.page import Table
from jaxhess.results.words import number
from jaxhess.slq.near_zero import near_zero
from jaxhess.slq.spectrum import Spectrum

ROWS = 10
"""Ritz values shown of a probe, as in table 2 of arXiv 2505.11564."""
PROBES = 3
"""Probes of which they are shown."""
RELATIVE = (1e-1, 1e-2, 1e-4, 1e-6)
"""Distances from zero, relative to the largest absolute Ritz value."""

RITZ_HEAD = ("probe", "Ritz value", "weight", "weight × parameters", "residual bound")
NEAR_HEAD = (
    "distance from zero",
    "which is",
    "share these probes prove",
    "share of all eigenvalues, 95%",
    "farther away",
)

RITZ_NOTE = """The Ritz value of largest weight, and those farthest from zero, copies merged. One that has nearly all
of the weight says that nearly all eigenvalues are small beside the others. It does not say where they are, and with
another probe or another number of steps it is somewhere else."""

NEAR_NOTE = """What the steps taken prove about the share of eigenvalues within a distance of zero: no matrix with these
Lanczos coefficients has less, or more, up to the rounding of the run. Both columns of shares are intervals; the second
one has the sampling error of the probes too. The last column is the number of eigenvalues that it leaves outside."""


def ritz_tables(spectrum: Spectrum) -> list[Table | str]:
    """For a page: leading Ritz values with their weights, the share of eigenvalues near zero, and how to read both.

    Distances from zero are powers of ten of the largest Ritz value and, where the products' noise was measured, its
    floor.
    """
    shown = min(PROBES, spectrum.num_probes)
    title = "Ritz values and weights" + f", {shown} of {spectrum.num_probes} probes" * (shown < spectrum.num_probes)
    found: list[Table | str] = [Table(RITZ_HEAD, list(_leading(spectrum, shown)), title), RITZ_NOTE]
    if rows := list(_near(spectrum)):
        found += [Table(NEAR_HEAD, rows, "Eigenvalues near zero"), NEAR_NOTE]
    return found


def _leading(spectrum: Spectrum, probes: int) -> Iterator[Sequence[str]]:
    for probe in range(probes):
        values, weights, _, bounds, spurious = spectrum.clusters(probe)
        order = np.argsort(-np.where(spurious, -1.0, np.abs(values)), kind="stable")[: int((~spurious).sum())]
        heaviest = int(np.argmax(weights))
        for i in sorted({heaviest, *order[order != heaviest][: ROWS - 1]}):
            cells = ((values[i], 6), (weights[i], 4), (spectrum.dim * weights[i], 3), (bounds[i], 2))
            yield str(probe + 1), *(number(x, digits) for x, digits in cells)


def _near(spectrum: Spectrum) -> Iterator[Sequence[str]]:
    largest = float(np.nanmax(np.abs(spectrum.ritz_values)))
    named = {f"{relative:g} of the largest": relative * largest for relative in RELATIVE}
    noise = spectrum.run.noise
    if noise is not None and noise.floor is not None and noise.floor.random is not None:
        named["noise floor of the products"] = noise.floor.random
    named = {name: x for name, x in named.items() if x > 0 and math.isfinite(x)}
    if not named:
        return
    names = sorted(named, key=lambda name: -named[name])
    found = near_zero(spectrum, [named[name] for name in names])
    low, high = found.interval()
    for k, name in enumerate(names):
        proved = _share(found.low[:, k].mean(), found.high[:, k].mean())
        outside = f"{_count(spectrum.dim * (1 - high[k]))} to {_count(spectrum.dim * (1 - low[k]))}"
        yield number(named[name], 3), _minus(name), proved, _share(low[k], high[k]), outside


def _share(low: float, high: float) -> str:
    """Both ends, with as many digits as tell them from one."""
    return " to ".join(_minus(f"{x:.3g}" if x < 0.9 else f"1 - {1 - x:.2g}" if x < 1 else "1") for x in (low, high))


def _count(x: float) -> str:
    return f"{x:,.0f}" if x < 1e15 else f"{x:.3g}"


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
