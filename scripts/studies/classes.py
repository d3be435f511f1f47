"""How blocks of the Hessian at random initialisation depend on the number of classes, beside Theorems 1 and 2 of the
talk on the Hessian's structure (Y. Zhang, 2025), its approximations and its rates.

    python -m scripts.studies.classes

The sizes of the talk take a quarter of an hour of processor time:

    python -m scripts.studies.classes --width 500 --units 8 --repeats 8 --draws 16 --maps 10 100 \\
        --classes 2 4 8 16 32 64 128 256 512 1000 --fit-from 100 --widths 125 250 500

Data are x ~ N(0, I), the initialisation is LeCun's. All norms are exact for their draw, by closed forms of the blocks
that the tests compare with a dense Hessian. Errors are 95% intervals over repeats with new data and weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from scripts.studies.harness import StudyOptions, command, picture
from scripts.studies.theory import blocks, limits
from scripts.studies.theory.maps import TALK, draw_map
from scripts.studies.theory.sampling import KINDS, Measured, exponent, jackknife, replicates

Array = npt.NDArray[np.float64]

NAME = "classes"
POWERS = (2, 1, 1, 2)
"""Of C in the rates of the ratio, by kind."""
CAPTION = """Above: the mean squared norm of other blocks over that of diagonal blocks, times the power of C of the
talk's rate: a horizontal line is that rate. Lines are predictions. Below: norms of all blocks at initialisation, over
the largest; white blocks are zero. White lines are between hidden and output weights."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """Sizes, and how often."""

    width: int = 100
    """Of the input, d."""
    ratio: float = 0.1
    """d/N, of width and samples."""
    units: int = 8
    """Of the hidden layer, m."""
    classes: tuple[int, ...] = (4, 16, 64, 256, 1000)
    """Numbers of classes."""
    fit_from: int = 60
    """The rates are fitted to as many classes and more."""
    widths: tuple[int, ...] = (50, 100, 200)
    """From which the linear model's ratio is extrapolated to an infinite width."""
    fixed_classes: int = 16
    """Of that extrapolation, and the largest number of classes."""
    repeats: int = 6
    """With new data."""
    draws: int = 8
    """Of hidden weights for each of those."""
    maps: tuple[int, ...] = (10, 40)
    """Numbers of classes whose blocks are drawn."""
    seed: int = 0
    """Of all draws."""

    @property
    def samples(self) -> int:
        """N."""
        return round(self.width / self.ratio)

    @property
    def fitted(self) -> list[int]:
        """Places in `classes` that the rates are fitted to."""
        return [i for i, C in enumerate(self.classes) if self.fit_from <= C]

    def check(self) -> None:
        """Raises InputError for sizes that cannot be."""
        if self.units < 3 or min(self.classes) < 2 or self.repeats < 2 or self.draws < 1:
            raise InputError("This study needs --units 3, --classes 2, --repeats 2 and --draws 1, or more.")
        if not self.ratio > 0 or min(self.width, *self.widths) < 1 or min(*self.maps, 2) < 2:
            raise InputError("This study needs --ratio > 0, --width and --widths of 1 and --maps of 2, or more.")
        if len(self.fitted) < 2 or len(set(self.widths)) < 2:
            raise InputError("Rates need two numbers of --classes from --fit-from on, and limits two --widths.")


SMALL = Options(classes=(4, 64, 256), repeats=4, draws=4, widths=(50, 100), maps=(4, 20))


def study(options: Options) -> Study:
    """All norms, the claims about them, and the maps."""
    options.check()
    found = replicates(
        options.width, options.samples, options.units, options.classes, options.draws, options.repeats, options.seed
    )
    slopes = [jackknife(lambda x, k=k: exponent_of(x, k, options), found) for k in range(len(KINDS))]  # type: ignore[misc]
    limit = {C: extrapolated(options, C) for C in dict.fromkeys((options.fixed_classes, options.classes[-1]))}
    ratios = {
        kind: [jackknife(lambda x, c=c, k=k: x[c, k, 1] / x[c, k, 0], found) for c in range(len(options.classes))]  # type: ignore[misc]
        for k, kind in enumerate(KINDS)
    }
    return Study(
        "Blocks of the Hessian and the number of classes",
        tuple(claims(options, found, slopes, limit)),
        tuple(tables(options, found, ratios, slopes)),
        (picture(NAME, figure(options, ratios), CAPTION),),
        {
            "ratios": {kind: [value._asdict() for value in values] for kind, values in ratios.items()},
            "exponents": dict(zip(KINDS, (value._asdict() for value in slopes), strict=True)),
            "infinite_width": {str(C): value._asdict() for C, value in limit.items()},
            "squared_norms": found,
        },
    )


def exponent_of(norms: Array, kind: int, options: Options) -> float:
    """Of C in the ratio of the norms [classes, kinds, 2], over the larger C."""
    fitted = options.fitted
    return exponent([options.classes[i] for i in fitted], norms[fitted, kind, 1] / norms[fitted, kind, 0])


def extrapolated(options: Options, classes: int) -> Measured:
    """The linear model's ratio over Theorem 1's for so many classes, at an infinite width.

    The dependence of coefficients and data, and the norms of the weights' rows, add terms of order 1/d: a line in 1/d.
    """
    values = []
    for width in options.widths:
        samples = round(width / options.ratio)
        norms = replicates(width, samples, options.units, (classes,), 0, options.repeats, options.seed + 1)
        diagonal, others = limits.linear_norms(width / samples, classes)
        values.append(norms[:, 0, 0] / [diagonal, others])
    ones = np.ones(len(options.widths))
    line = np.linalg.pinv(np.stack([ones, 1 / np.array(options.widths)], 1))[0]
    return jackknife(lambda x: float(line @ (x[:, 1] / x[:, 0])), np.stack(values, 1))


def claims(options: Options, found: Array, slopes: list[Measured], limit: dict[int, Measured]) -> Iterator[Claim]:
    """What the talk says. A rate is refuted by an exponent more than 0.1 away, a limit by a distance over 5% (10% where
    only many classes reach it)."""
    C, ratio, m = options.classes[-1], options.width / options.samples, options.units
    sizes = f"d = {options.width}, N = {options.samples:,}"
    network = f"{sizes}, m = {m}, {options.repeats} × {options.draws} draws"

    def last(kind: int, predicted: float) -> Measured:
        return jackknife(lambda x: x[-1, kind, 1] / x[-1, kind, 0] / predicted, found)

    shortfall = C**2 * ratio_of(limits.linear_norms(ratio, C)) / limits.linear_constant(ratio)
    many = Measured(*(shortfall * x for x in limit[C]))
    formula = [limits.hidden_squared_error(ratio, c) for c in options.classes]
    pooled = jackknife(lambda x: float(np.mean(x[:, 1, 1] / x[:, 1, 0] / formula)), found)
    far = 10**12 * ratio_of(limits.linear_norms(ratio, 10**6)) / limits.linear_constant(ratio)
    approximation = jackknife(lambda x: (C - 1) * math.sqrt(x[-1, 0, 1] / x[-1, 0, 0]), found)
    hidden = jackknife(lambda x: x[-1, 2, 0] / options.width / ((ratio / 2 + 1 / 4) / m**2), found)
    off_hidden = C / options.width / limits.hidden_constant(ratio, m) / ((ratio / 2 + 1 / 4) / m**2)
    other = jackknife(lambda x: x[-1, 2, 1] * off_hidden, found)
    fits = f"C from {options.classes[options.fitted[0]]} to {C}"
    at = f"at C = {C}"
    near: Range = (0.95, 1.05)
    # fmt: off
    rows: list[tuple[str, str, str, str, Range, Measured, str]] = [
        ("Theorem 1, (20), left", "For fixed C the ratio tends to a limit.", "g_ij/g_ii, without its formula",
         f"ratio over ours, C = {options.fixed_classes}, extrapolated to infinite d", near,
         limit[options.fixed_classes], f"linear, d to {max(options.widths)}"),
        ("Theorem 1, (20), right", "C² g_ij/g_ii has this limit.", "(γe² + 1)/(γe + 1)",
         "C² times our formula, by quadrature, over it at C = 10⁶", (0.999, 1.001), Measured(far, 1e-6), "no sample"),
        ("Theorem 1, (20)", "For many classes C² times the measured ratio is this limit.", "(γe² + 1)/(γe + 1)",
         f"C² ratio over it, {at}, extrapolated to infinite d", near, many, f"linear, d to {max(options.widths)}"),
        ("Theorem 1", "The linear model's ratio vanishes as 1/C².", "O(1/C²)", f"exponent, {fits}", (-2.1, -1.9),
         slopes[0], f"linear, {sizes}"),
        ("Case 2, (6)", "Off-diagonal norms are 1/(C − 1) of the diagonal ones.", "≈ 1/(C − 1)",
         f"(C − 1) times the root of the ratio, {at}", near, approximation, f"linear, {sizes}"),
        ("Theorem 2, (28)", "Hidden weights, cross-entropy: as 1/C.", "O(1/C)", f"exponent, {fits}", (-1.1, -0.9),
         slopes[2], network),
        ("Theorem 2, (28)", "Hidden weights, squared error: as 1/C.", "O(1/C)", f"exponent, {fits}", (-1.1, -0.9),
         slopes[1], network),
        ("Theorem 2, (28)", "Output weights, cross-entropy: as 1/C².", "O(1/C²)", f"exponent, {fits}", (-2.1, -1.9),
         slopes[3], network),
        ("Theorem 2", "Hidden weights, squared error: a closed form.", "left out; ours: (4γ + 1)/(4(C + 2)(2γ + 1))",
         "ratio over it, mean over all C", near, pooled, network),
        ("Theorem 2", "Hidden weights, cross-entropy: a constant.", "left out; ours in limits.py",
         f"C ratio over it, {at}", (0.9, 1.1), last(2, limits.hidden_constant(ratio, m) / C), network),
        ("Theorem 2", "Output weights, cross-entropy: a constant.", "left out; ours in limits.py",
         f"C² ratio over it, {at}", (0.9, 1.1), last(3, limits.output_constant(m) / C**2), network),
        ("The Effect of Increasing C, (a)", "|H_ww|²/d on the diagonal is as predicted.",
         "left out; ours: (γ/2 + 1/4)/m²", f"measured over it, {at}", near, hidden, network),
        ("The Effect of Increasing C, (b)", "C |H_ww|²/d elsewhere is as predicted.", "left out; ours in limits.py",
         f"measured over it, {at}", (0.9, 1.1), other, network),
        ("Case 4, (14)", "The middle expression of (14), as it is written, tends to zero.", "→ 0",
         f"its median size, {at}", (None, 0.1), written(C, m, options.seed, 1.0), "V alone, 1000 draws"),
        ("Case 4, (14)", "The same with the means of v, which p = 1/C gives.", "→ 0",
         f"its median size, {at}", (None, 0.1), written(C, m, options.seed, 1 / C), "V alone, 1000 draws"),
    ]
    # fmt: on
    for place, statement, paper, quantity, holds, ours, model in rows:
        yield Claim(TALK, place, statement, paper, quantity, holds, ours.value, ours.error, model)


def ratio_of(norms: tuple[float, float]) -> float:
    """Of the other blocks' norm to the diagonal ones'."""
    return norms[1] / norms[0]


def written(classes: int, units: int, seed: int, factor: float) -> Measured:
    """Median size of (Σ v_ci v_cj − f Σ v_ci Σ v_cj)/(Σ v_ci² − f (Σ v_ci)²), with f = 1 as (14) has it."""
    pairs = np.random.default_rng(seed).normal(size=(1000, classes, 2)) / math.sqrt(units)
    second, total = np.einsum("rci,rcj->rij", pairs, pairs), pairs.sum(1)
    matrix = second - factor * total[:, :, None] * total[:, None, :]
    sizes = np.sort(np.abs(matrix[:, 0, 1] / matrix[:, 0, 0]))
    # Of 1000 draws 469 to 531 are below the median with 95%.
    return Measured(float(np.median(sizes)), float(max(sizes[530] - sizes[499], sizes[499] - sizes[468])))


def predicted(options: Options, kind: int) -> tuple[list[float], float]:
    """The ratio at every C (for a network with cross-entropy none is known), and the limit of C^power times it."""
    ratio = options.width / options.samples
    if kind == 0:
        return [ratio_of(limits.linear_norms(ratio, C)) for C in options.classes], limits.linear_constant(ratio)
    if kind == 1:
        found = [limits.hidden_squared_error(ratio, C) for C in options.classes]
        return found, limits.hidden_squared_error(ratio, 10**9) * 10**9
    nothing = [math.nan] * len(options.classes)
    return nothing, limits.hidden_constant(ratio, options.units) if kind == 2 else limits.output_constant(options.units)


def tables(
    options: Options, found: Array, ratios: dict[str, list[Measured]], slopes: list[Measured]
) -> Iterator[Table]:
    """Every ratio with what is predicted, and the linear model's norms beside Theorem 1's."""
    for k, (kind, power) in enumerate(zip(KINDS, POWERS, strict=True)):
        values, constant = predicted(options, k)
        rows = [
            (f"{C:,}", f"{r.value * C**power:.4g} ± {r.error * C**power:.1g}", number(p * C**power), f"{constant:.4g}")
            for C, r, p in zip(options.classes, ratios[kind], values, strict=True)
        ]
        times = "C²" if power == 2 else "C"
        title = f"{kind}: exponent {slopes[k].value:.3f} ± {slopes[k].error:.1g}"
        yield Table(("C", f"{times} ratio", "predicted for this C", "for many"), rows, title)
    norms = []
    for c, C in enumerate(options.classes):
        cells = [f"{C:,}"]
        for part, limit in enumerate(limits.linear_norms(options.width / options.samples, C)):
            ours = jackknife(lambda x, c=c, part=part: x[c, 0, part] / options.width, found)  # type: ignore[misc]
            cells += [f"{ours.value:.4g} ± {ours.error:.1g}", f"{limit:.4g}"]
        norms.append(cells)
    yield Table(("C", "|H_ii|²/d", "Theorem 1", "|H_ij|²/d", "Theorem 1"), norms, "The linear model's norms")


def number(x: float) -> str:
    """Four digits, or nothing where there is none."""
    return "" if math.isnan(x) else f"{x:.4g}"


def figure(options: Options, ratios: dict[str, list[Measured]]) -> Figure:
    """Ratios against C with their predictions; maps of all four cases."""
    drawn = Figure(figsize=(14, 3.4 * (1 + len(options.maps))), dpi=110, layout="constrained", facecolor="white")
    panels = drawn.subplots(1 + len(options.maps), 4, squeeze=False)
    for k, (panel, kind, power) in enumerate(zip(panels[0], KINDS, POWERS, strict=True)):
        scale = np.array(options.classes, float) ** power
        values, constant = predicted(options, k)
        sizes = np.array([r.value for r in ratios[kind]]) * scale, np.array([r.error for r in ratios[kind]]) * scale
        panel.errorbar(options.classes, *sizes, fmt="o", ms=4, capsize=2, color="#0072B2", label="measured, 95%")
        if not math.isnan(values[0]):
            panel.plot(options.classes, np.array(values) * scale, color="#D55E00", label="predicted for this C")
        panel.axhline(constant, color="#009E73", ls="--", label="predicted for many")
        panel.set(xscale="log", xlabel="classes C", ylabel=f"{'C²' if power == 2 else 'C'} × ratio of squared norms")
        panel.set(title=kind, ylim=(0, None))
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.legend(fontsize=8, frameon=False)
    for row, C in zip(panels[1:], options.maps, strict=True):
        for panel, (title, squared) in zip(row, maps(options, C).items(), strict=True):
            draw_map(panel, squared, f"{title}, C = {C}", options.units if "network" in title else 0)
        drawn.colorbar(row[-1].images[0], ax=row, label="block norm / largest", shrink=0.9)
    return drawn


def maps(options: Options, classes: int) -> dict[str, Array]:
    """Squared norms of all blocks of the four cases, of one draw."""
    rng, d, m = np.random.default_rng(options.seed), options.width, options.units
    X, labels = rng.normal(size=(options.samples, d)), rng.integers(0, classes, options.samples)
    squares = blocks.squared_gram(X)
    linear, W = rng.normal(size=(classes, d)) / math.sqrt(d), rng.normal(size=(m, d)) / math.sqrt(d)
    V = rng.normal(size=(classes, m)) / math.sqrt(m)
    losses: tuple[blocks.Loss, ...] = ("MSE", "CE")
    found = {f"linear, {loss}": blocks.linear_map(X, linear, squares, loss) for loss in losses}
    return found | {f"network, {loss}": blocks.network_norms(X, labels, W, V, squares, loss).map for loss in losses}


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
