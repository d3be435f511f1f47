"""Block-diagonal fidelity by exact products and by finite differences: Tables 6 and 7 of arXiv 2602.00816.

    python -m scripts.studies.fidelity

With no options: the small GPT-NeoX model and the text in scripts/tiny, before and after a fine-tuning on the same few
sequences, three minutes on two cores.

For a block b of parameters let y = (Hv)_b, d = H_bb v_b and o = y - d, what the other blocks contribute. The paper
compares d with y: error e = |o| / |y|, and the cosine c of y and d. For any two vectors
    e^2 + c^2 = 1 + (|d|/|y| - c)^2 = 1 + e^2 cos^2(d, o).
That is 1 where d and o are orthogonal, as independent vectors in many dimensions nearly are. Three things make it
larger, and each leaves a mark of its own.

Outliers: d and o both lie along the few leading eigenvectors. The sign of v on the block may be turned without that of
the rest: (d, o) and (d, -o) are equally likely. So for every fixed matrix the mean of cos(d, o) is zero, and e < 1
(which follows from <o, d> >= 0) in at least half of all draws.
Rounding noise: y and d are computed with noise of their own. Then o = y - d holds the noise of d with a minus sign,
cos(d, o) is negative in the mean, and e is above 1 in nearly all draws. Pure noise of equal size has e^2 = 2 and c = 0.
Truncation: differences along v and along v_b average the Hessian over other segments; (d, o) and (d, -o) are then not
equally likely either. It does not depend on the precision, and grows with the step.

The copy of the paper at hand does not say what ± is in its tables. Read as a standard deviation over layers and probes,
Table 6 gives a mean of e^2 + c^2 of 1.000, which the identity allows and no other reading would give but by chance.
Table 7 then has e < 1 in at most a third of all draws. Were ± there a standard error of about 60 draws, a matrix of
rank one would fit it too (c = 1 or -1), and this study would not decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

import jaxhess
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.vectors import check_seed
from scripts.studies.block_fidelity.figure import CAPTION, figure
from scripts.studies.block_fidelity.products import (
    PAPER,
    TABLE_6,
    TABLE_7,
    Array,
    Mean,
    ParameterPoint,
    ProductOptions,
    Products,
    fine_tuned,
    measured,
    over_probes,
    ratio_of_means,
)
from scripts.studies.harness import FOUNDATION, command, picture

NAME = "fidelity"
EXPLANATIONS = "Explanations of Tables 6 and 7 of arXiv 2602.00816, tested here"


@dataclasses.dataclass(frozen=True)
class Options(ProductOptions):
    """The products, and where they are taken."""

    fine_tune: int = 200
    """Adam steps on the same sequences, after which all is measured again; 0: none."""
    learning_rate: float = 1e-3
    """Of these, falling to nothing by a cosine."""
    layers: tuple[int, ...] = ()
    """Only these layers, of a model where all take too long; then nothing is said of the whole."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        check_seed(self.seed)
        if self.probes < 4:
            raise InputError(f"--probes {self.probes}: at least 4 are needed; half of them predict the other half.")
        if not self.steps or not self.dtypes or any(not 0 < step < math.inf for step in self.steps):
            raise InputError("--steps and --dtypes name none, or a step is not a positive number.")
        if self.fine_tune < 0 or not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"--fine-tune {self.fine_tune} --learning-rate {self.learning_rate}: 0 or more are needed."
            )
        if not 0 <= self.outliers <= self.lanczos:
            raise InputError(f"--outliers {self.outliers} must be from 0 to --lanczos {self.lanczos}.")


SMALL = Options(
    seq_len=16, mesh="fsdp=1", probes=4, steps=(1e-4,), dtypes=("bfloat16",), fine_tune=40, outliers=0, others=False
)


def study(options: Options) -> Study:
    """The study of both points."""
    options.check()
    text = options.blocks()
    hessian = options.hessian(text, "float32")
    blocks = jaxhess.Blocks.by(hessian.shape_dtype, "layers")
    numbers = chosen(blocks, options.layers)
    operators = {"trained": hessian}
    if options.fine_tune:
        operators["fine-tuned"] = fine_tuned(hessian, options.fine_tune, options.learning_rate)
    points = [measured(options, name, operator, blocks, numbers) for name, operator in operators.items()]
    layers = [k for k in layers_of(blocks.names) if numbers is None or k in numbers]
    return Study(
        "Block-diagonal fidelity: exact products and finite differences",
        tuple(claims(points, layers, last=layers_of(blocks.names)[-1], model=options.described(hessian))),
        tuple(tables(points, layers, blocks.names)),
        (picture(NAME, figure(points, layers), CAPTION),),
        {
            "parameters": hessian.dim,
            "data_fingerprint": text.fingerprint(),
            "blocks": dict(zip(blocks.names, blocks.sizes.tolist(), strict=True)),
            "points": [recorded(point) for point in points],
        },
    )


def layers_of(names: tuple[str, ...]) -> list[int]:
    """Which of the blocks are layers."""
    return [k for k, name in enumerate(names) if name.startswith("layers/")]


def chosen(blocks: jaxhess.Blocks, layers: tuple[int, ...]) -> list[int] | None:
    """The numbers of these layers' blocks; None for all blocks.

    Raises:
        InputError: There is no such layer, or no layer at all.
    """
    places = {name: k for k, name in enumerate(blocks.names)}
    count = len(layers_of(blocks.names))
    if bad := [k for k in layers if f"layers/{k}" not in places]:
        raise InputError(f"--layers {bad[0]}: the model has layers 0 to {count - 1}.")
    return sorted({places[f"layers/{k}"] for k in layers}) or None


Row = tuple[str, str, str, str, str, Range, Mean | None, str]
"""Source, place, statement, the paper's figure, quantity, the range in which it holds, ours, point."""

EXPLAINED = 0.1
"""Excess of e^2 + c^2 over 1 that is worth an explanation."""


def claims(points: list[ParameterPoint], layers: list[int], last: int, model: str) -> Iterator[Claim]:
    """What the two tables say, and what explains them; `last` is the number of the last layer's block."""
    trained, tuned, further = points[0], points[-1], len(points) > 1
    six, seven = "Section 6.1, Table 6", "Section 6.2, Table 7"
    before, after = trained.products["exact"].found, tuned.products["exact"].found
    cosine = before.cosine[:, layers]
    above_others = (
        cosine[:, -1:] - cosine[:, :-1].mean(1, keepdims=True) if layers[-1] == last and cosine[0, 1:].size else None
    )
    # fmt: off
    rows: list[Row] = [
        (FOUNDATION, six, "The block-diagonal part of the Hessian misses most of a layer's product.", "0.941 ± 0.059",
         "relative error of exact products, mean over layers", spread(TABLE_6[:2], most=1.0),
         over_probes(before.error[:, layers]), trained.name),
        (FOUNDATION, six, "The block-diagonal product points elsewhere.", "0.311 ± 0.120",
         "cosine of exact products, mean over layers", spread(TABLE_6[2:]), over_probes(cosine), trained.name),
        (FOUNDATION, "Mechanism 3, break condition", "The last layer's cosine is higher than that of the others.",
         "higher", "cosine of the last layer less the mean of the others, exact products", (0, None),
         None if above_others is None else over_probes(above_others), trained.name),
        (FOUNDATION, seven, "In a fine-tuned model the error of a layer's product is above 1.", "1.214 ± 0.150",
         "relative error of exact products, mean over layers", spread(TABLE_7[:2]),
         over_probes(after.error[:, layers]) if further else None, tuned.name),
        (FOUNDATION, seven, "In a fine-tuned model the cosine is zero.", "0.00443 ± 0.127",
         "cosine of exact products, mean over layers", spread(TABLE_7[2:]),
         over_probes(after.cosine[:, layers]) if further else None, tuned.name),
        (EXPLANATIONS, six, "What a layer's own block and the other blocks contribute are independent directions.",
         f"e² + c² = {1 + TABLE_6.excess:.3f} in the mean, if ± is a standard deviation",
         f"mean of e² + c² - 1 of exact products; refuted above {EXPLAINED}", (None, EXPLAINED),
         over_probes(before.excess[:, layers]), trained.name),
        *explanations(points, layers),
    ]
    # fmt: on
    for source, place, statement, paper, quantity, holds, ours, name in rows:
        value, error = (None, 0.0) if ours is None or not math.isfinite(ours.error) else ours
        yield Claim(source, place, statement, paper, quantity, holds, value, error, f"{model}, {name}")


def explanations(points: list[ParameterPoint], layers: list[int]) -> Iterator[Row]:
    """Which products have the mark of Table 7, what outliers do to exact ones, and noise to differences.

    Differences from a tenth of the paper's smallest step to its largest.
    """
    seven, mark = "Section 6.2, Table 7", f"e < 1 in at most {TABLE_7.below_one:.0%}, if ± is a standard deviation"
    sources = {"exact": "Outliers", "exact, bfloat16": "The arithmetic of bfloat16 without differences"}
    near = {
        (point.name, name): products
        for point in points
        for name, products in point.products.items()
        if products.step is not None and 0.099 * PAPER[0] < products.step < 1.001 * PAPER[1]
    }
    tuned = points[-1]
    for name, products in tuned.products.items():
        if name in sources or (tuned.name, name) in near:
            source = sources.get(name, f"The noise and truncation of {name}")
            errors = products.found.error[:, layers]
            share = over_probes(np.where(np.isnan(errors), np.nan, errors < 1))
            if share.error == 0:  # all probes agree: what so many draws leave open, at 95%
                share = Mean(share.value, 1 - 0.05 ** (1 / len(errors)))
            yield (EXPLANATIONS, seven, f"{source} can give such a table.", mark,
                   "share of layers and probes with e < 1; refuted above that", (None, TABLE_7.below_one),
                   share, tuned.name)  # fmt: skip
    for point in points:
        exact = point.products["exact"]
        if exact.signal is None:
            continue
        kept = ratio_of_means(exact.signal.excess[:, layers], exact.found.excess[:, layers])
        yield (EXPLANATIONS, seven, "Outliers make the e² + c² - 1 that exact products have.", "none given",
               f"share of it that is gone without the {len(point.eigenvalues)} leading eigenpairs; refuted below half",
               (0.5, None), Mean(1 - kept.value, kept.error), point.name)  # fmt: skip
    for (place, name), products in near.items():
        if over_probes(products.found.excess[:, layers]).value < EXPLAINED:
            continue
        told = ratio_of_means(
            np.nanmean(products.predicted().excess, axis=1)[:, layers], products.found.excess[:, layers]
        )
        yield (EXPLANATIONS, seven, f"Noise that knows nothing of the products explains the e² + c² - 1 of {name}.",
               f"e² + c² = {1 + TABLE_7.excess:.2f}",
               "predicted from noise measured on other probes, over measured; refuted outside", (0.8, 1.25),
               told, place)  # fmt: skip


def spread(published: tuple[float, ...], most: float | None = None) -> Range:
    """The range of a mean ± deviation, cut at `most`."""
    mean, deviation = published
    return mean - deviation, mean + deviation if most is None else most


def tables(points: list[ParameterPoint], layers: list[int], names: tuple[str, ...]) -> Iterator[Table]:
    """What the identity says of the paper's tables; for every point all operators over layers, and all blocks."""
    rows: list[tuple[str, ...]] = []
    for name, table in (("Table 6", TABLE_6), ("Table 7", TABLE_7)):
        opposed = math.sqrt(max(table.excess, 0) / (table.error**2 + table.error_spread**2))
        most = f"{table.below_one:.0%}"
        rows.append((name, f"{1 + table.excess:.3f}", f"{opposed:.2f}", most))
    first = ("", "mean e² + c²", "root mean square cos(d, o)", "e < 1 at most in")
    yield Table(first, rows, "What arXiv 2602.00816 says, if ± is a standard deviation over layers and probes")
    for point in points:
        facts = f"loss {point.loss:.3g}, gradient norm {point.gradient_norm:.2g}"
        if point.eigenvalues:
            facts += f", leading eigenvalues {point.eigenvalues[0]:.3g} to {point.eigenvalues[-1]:.3g}"
        head = (
            "product",
            "error",
            "cosine",
            "e² + c² - 1",
            "predicted",
            "e < 1",
            "cos(d, o)",
            "noise in y / y",
            "in d / d",
            "noise power d / y",
        )
        yield Table(head, [over_layers(p, layers) for p in point.products.values()], f"Layers, {point.name}: {facts}")
        shown = [p for p in point.products.values() if p.step is None or PAPER[0] <= p.step * 1.001 <= 1.002 * PAPER[1]]
        for measure in ("error", "cosine"):
            cells = [[quantiles(x) for x in getattr(p.found, measure).T] for p in shown]
            found = [row for row in zip((*names, "whole"), *cells, strict=True) if any(row[1:])]
            title = f"{measure.capitalize()} by block, {point.name}: median over probes [10% to 90%]"
            yield Table(("block", *(p.name for p in shown)), found, title)


def over_layers(products: Products, layers: list[int]) -> tuple[str, ...]:
    """A row: means ± standard deviations over layers and probes, and noise relative to what it is added to."""
    found = products.found
    cells = [f"{np.nanmean(x[:, layers]):.3f} ± {np.nanstd(x[:, layers]):.3f}" for x in (found.error, found.cosine)]
    cells.append(f"{np.nanmean(found.excess[:, layers]):.3f}")
    cells.append("" if products.step is None else f"{np.nanmean(products.predicted().excess[..., layers]):.3f}")
    known = ~np.isnan(found.error[:, layers])
    cells.append(f"{(found.error[:, layers][known] < 1).mean():.0%}" if known.any() else "")
    cells.append(f"{np.nanmean(found.alignment[:, layers]):+.2f}")
    if products.step is None or products.signal is None or products.noise is None:
        return products.name, *cells, "", "", ""
    y, d = (
        np.median(n[:, layers]) / np.median(s[:, layers])
        for n, s in zip(products.noise[:2], products.signal[:2], strict=True)
    )
    power = np.median((products.noise.own / products.noise.full)[:, layers] ** 2)
    return products.name, *cells, f"{y:.2g}", f"{d:.2g}", f"{power:.2f}"


def quantiles(values: Array) -> str:
    """Median and deciles of those that are known; nothing where none is."""
    known = values[~np.isnan(values)]
    low, middle, high = np.quantile(known, (0.1, 0.5, 0.9)) if known.size else (math.nan,) * 3
    return f"{middle:.2f} [{low:.2f} to {high:.2f}]" if known.size else ""


def recorded(point: ParameterPoint) -> dict[str, Any]:
    """Everything measured, for the record."""
    return {
        **{name: getattr(point, name) for name in ("name", "loss", "gradient_norm", "eigenvalues")},
        "products": {
            name: {"step": p.step, "dtype": p.dtype}
            | {k: x._asdict() for k in ("found", "signal", "noise") if (x := getattr(p, k)) is not None}
            for name, p in point.products.items()
        },
    }


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
