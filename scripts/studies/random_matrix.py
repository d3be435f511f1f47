"""Eigenvalues of sampled matrices beside the laws of random matrix theory that the talk on the Hessian's structure
(Y. Zhang, 2025) shows and uses: semicircle, Marchenko-Pastur, and the generalised law for a block of the Hessian.

    python -m scripts.studies.random_matrix

The sizes of the talk take some minutes on two cores:

    python -m scripts.studies.random_matrix --wigner 1000 --matrices 100 --width 500 --classes 2 10 100

The number beside each law is the largest distance of the distribution functions, in eigenvalues: times the size of the
matrix. Its yardstick is the mean distance of as many independent draws, 0.87 √n (Kolmogorov's distribution):
eigenvalues repel each other and are more even, so that they must be nearer. Blocks of the Hessian have a sharper one:
the same matrix with weights from an independent copy of the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy.special import softmax
from scipy.stats import kstwobign

import jaxhess
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from scripts.studies.harness import StudyOptions, command, picture
from scripts.studies.theory.maps import TALK
from scripts.studies.theory.sampling import Measured, mean

Array = npt.NDArray[np.float64]

NAME = "random_matrix"
CAPTION = """Histograms of the eigenvalues of all samples, those at zero left out, and the densities of the laws. The
last panels are diagonal blocks of the Hessian of a linear model, whose weights Λ depend on the data, beside the
generalised law in which they do not, and beside the Marchenko-Pastur law of equal weights."""
INDEPENDENT = float(kstwobign.mean())
"""Mean of √n times the largest distance for n independent draws."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """Sizes, and how often."""

    wigner: int = 300
    """Rows of the Wigner matrices."""
    rows: int = 300
    """d of the covariance matrices."""
    columns: int = 50
    """n of the covariance matrices."""
    matrices: int = 8
    """Of each kind."""
    width: int = 100
    """Inputs of the linear model, d."""
    ratio: float = 0.1
    """d/N of the linear model."""
    classes: tuple[int, ...] = (2, 10, 100)
    """Of the linear model."""
    seed: int = 0
    """Of all draws."""

    def check(self) -> None:
        """Raises InputError for sizes that cannot be."""
        if min(self.wigner, self.rows, self.columns, self.width, *self.classes) < 2 or self.matrices < 2:
            raise InputError("Sizes, --classes and --matrices must be 2 or more.")
        if not self.ratio > 0:
            raise InputError(f"--ratio must be positive, got {self.ratio}.")


SMALL = Options(wigner=100, rows=120, columns=20, matrices=6, width=60, classes=(2, 30))


class Sample(NamedTuple):
    """Eigenvalues of matrices of one kind, beside a law.

    Attributes:
        title: Of the figure.
        eigenvalues: [matrices, size]
        x: [points] where the law is drawn.
        density: [points] of the law.
        distances: [matrices] the largest distance of the distribution functions, in eigenvalues.
        other: What else it is compared with, and its distances.
        decoupled: Of a block of the Hessian, distances with weights from a copy of the data.
    """

    title: str
    eigenvalues: Array
    x: Array
    density: Array
    distances: list[float]
    other: tuple[str, Array, list[float]] | None = None
    decoupled: list[float] | None = None

    @property
    def kinds(self) -> int:
        """Eigenvalues of one matrix that are not zero."""
        return int((self.eigenvalues[0] != 0).sum())


def study(options: Options) -> Study:
    """All samples and their laws."""
    options.check()
    rng = np.random.default_rng(options.seed)
    samples = [
        wigner(options, rng),
        *covariance(options, rng),
        *(linear_block(options, C, rng) for C in options.classes),
    ]
    return Study(
        "Eigenvalues of sampled matrices and their laws",
        tuple(claims(options, samples)),
        (table(samples),),
        (picture(NAME, figure(samples), CAPTION),),
        {s.title: {"distances": s.distances, "other": None if s.other is None else s.other[2]} for s in samples},
    )


def distance(eigenvalues: Array, law: jaxhess.LimitLaw) -> float:
    """Of the distribution function of these, ascending, from a law at them; in eigenvalues.

    Below an eigenvalue other than zero the law is continuous; what lies at zero, up to rounding, is one step.
    """
    count = len(eigenvalues)
    upto = np.arange(1, count + 1)
    zero = np.abs(eigenvalues) < 1e-9 * np.abs(eigenvalues).max()
    expected = count * law.distribution
    above = np.abs(upto - expected)[~zero]
    below = np.abs(upto - 1 - expected)[~zero]
    atom = abs(zero.sum() - count * law.atom)
    return float(max(above.max(), below.max(), atom))


def wigner(options: Options, rng: np.random.Generator) -> Sample:
    """Hermitian, real on the diagonal, complex elsewhere, of variance one, over √n."""
    n = options.wigner
    found = []
    for _ in range(options.matrices):
        A = (rng.normal(size=(n, n)) + 1j * rng.normal(size=(n, n))) / np.sqrt(2)
        lower = np.tril(A, -1)
        found.append(np.linalg.eigvalsh(lower + lower.conj().T + np.diag(rng.normal(size=n))) / np.sqrt(n))
    x = np.linspace(-2.1, 2.1, 300)
    distances = [distance(values, jaxhess.semicircle(values)) for values in found]
    return Sample(f"Wigner, n = {n}", np.stack(found), x, jaxhess.semicircle(x).density, distances)


def covariance(options: Options, rng: np.random.Generator) -> Iterator[Sample]:
    """X Xᵀ/n with X [d, n], and with the sizes exchanged, beside the laws of their d/n and of the caption's."""
    for d, n in ((options.rows, options.columns), (options.columns, options.rows)):
        found = np.stack([np.linalg.eigvalsh(X @ X.T / n) for X in rng.normal(size=(options.matrices, d, n))])
        found[np.abs(found) < 1e-9 * found.max()] = 0
        x = np.linspace(0.01, found.max() * 1.05, 400)
        ratio, written = d / n, options.columns / options.rows
        distances = [distance(values, jaxhess.marchenko_pastur(values, ratio)) for values in found]
        caption = [distance(values, jaxhess.marchenko_pastur(values, written)) for values in found]
        other = (f"d/n = {options.columns}/{options.rows}", jaxhess.marchenko_pastur(x, written).density, caption)
        density = jaxhess.marchenko_pastur(x, ratio).density
        yield Sample(f"X Xᵀ/n, d = {d}, n = {n}", found, x, density, distances, other)


def linear_block(options: Options, classes: int, rng: np.random.Generator) -> Sample:
    """Diagonal blocks of the linear model's Hessian beside the law in which Λ and X are independent."""
    d, N = options.width, round(options.width / options.ratio)
    found, distances, decoupled, equal, densities = [], [], [], [], []
    x = np.zeros(0)
    for _ in range(options.matrices):
        X, V = rng.normal(size=(N, d)), rng.normal(size=(classes, d)) / np.sqrt(d)
        p = softmax(X @ V.T, axis=1)[:, 0]
        weights = p * (1 - p) / np.mean(p * (1 - p))
        values, copy = (np.linalg.eigvalsh((Z * weights[:, None]).T @ Z / N) for Z in (X, rng.normal(size=(N, d))))
        if not x.size:
            x = np.linspace(0.5 * values[0], 1.1 * values[-1], 100)
        law = jaxhess.generalized_marchenko_pastur(np.concatenate([values, copy, x]), d / N, *compressed(weights))
        distances.append(distance(values, law._replace(distribution=law.distribution[:d])))
        decoupled.append(distance(copy, law._replace(distribution=law.distribution[d : 2 * d])))
        equal.append(distance(values, jaxhess.marchenko_pastur(values, d / N)))
        densities.append(law.density[2 * d :])
        found.append(values)
    other = ("equal weights", jaxhess.marchenko_pastur(x, d / N).density, equal)
    title = f"Hessian block, C = {classes}, d = {d}"
    return Sample(title, np.stack(found), x, np.mean(densities, axis=0), distances, other, decoupled)


def compressed(values: Array, singles: int = 60, groups: int = 80) -> tuple[Array, Array]:
    """The largest values, and means of groups of the others, with their shares: the law then costs less."""
    ascending = np.sort(values)
    parts = [*np.array_split(ascending[:-singles], groups), *ascending[-singles:, None]]
    parts = [part for part in parts if len(part)]
    return np.array([part.mean() for part in parts]), np.array([len(part) for part in parts]) / len(values)


def claims(options: Options, samples: list[Sample]) -> Iterator[Claim]:
    """What the talk shows. A law is refuted by distances over those of independent draws; the law of independent
    weights, for dependent ones, by one eigenvalue more than with weights from a copy of the data.

    Marchenko-Pastur and generalised law are one figure in the talk twice: the latter has Λ = I.
    """
    first, tall, swapped, *hessian = samples
    quantity = "largest distance of the distribution functions, over that of independent draws"
    size, other = f"d = {options.rows}, n = {options.columns}", f"d = {options.columns}, n = {options.rows}"
    place, caption = "MP Law of Covariance Matrices; Exmple of GMP law", "d/n = 50/300 for n = 50, d = 300"

    def scaled(sample: Sample, distances: list[float]) -> Measured:
        return mean(np.array(distances) / INDEPENDENT / np.sqrt(sample.kinds))

    assert tall.other is not None
    rows: list[tuple[str, str, str, str, Range, Measured, str]] = [
        (statement[0], statement[1], paper, quantity, (None, 1), ours, model)
        for statement, paper, ours, model in (
            (
                ("Semicircular Law of Wigner Matrices", "Wigner matrices have the semicircle law."),
                "a histogram, n = 1000",
                scaled(first, first.distances),
                f"n = {options.wigner}",
            ),
            (
                (place, "X Xᵀ/n has the law of its d/n, with an atom at zero if d > n."),
                "a theorem",
                scaled(tall, tall.distances),
                size,
            ),
            (
                (place, "With these sizes it has the law that the caption names."),
                caption,
                scaled(tall, tall.other[2]),
                size,
            ),
            ((place, "It has that law with d and n exchanged."), caption, scaled(swapped, swapped.distances), other),
        )
    ]
    for sample, C in zip(hessian, options.classes, strict=True):
        assert sample.decoupled is not None
        rows.append((
            "Our Proof Strategies, Claim 1",
            f"A block with Λ of its own data has the law of an independent Λ (C = {C}).",
            "the same limit",
            "distance of the distribution functions, in eigenvalues, less that with a copy's Λ",
            (None, 1),
            mean(np.subtract(sample.distances, sample.decoupled)),
            f"linear model, d = {options.width}, N = {round(options.width / options.ratio):,}",
        ))  # fmt: skip
    for row in rows:
        place, statement, paper, quantity, holds, ours, model = row
        yield Claim(TALK, place, statement, paper, quantity, holds, ours.value, ours.error, model)


def table(samples: list[Sample]) -> Table:
    """Distances from the laws."""
    rows = []
    for s in samples:
        ours, n = mean(s.distances), s.kinds
        other = "" if s.other is None else f"{mean(s.other[2]).value:.3g} ({s.other[0]})"
        copy = "" if s.decoupled is None else f"{mean(s.decoupled).value:.2f} ± {mean(s.decoupled).error:.1g}"
        draws = f"{INDEPENDENT * np.sqrt(n):.1f}"
        zeros = f"{(s.eigenvalues == 0).mean():.3f}"
        rows.append((s.title, f"{ours.value:.2f} ± {ours.error:.1g}", draws, copy, other, zeros))
    head = ("", "from its law", "independent draws", "with a copy's Λ", "from the other law", "zeros")
    return Table(head, rows, "Largest distances of distribution functions, in eigenvalues")


def figure(samples: list[Sample]) -> Figure:
    """A histogram for every kind, with the laws."""
    across = (len(samples) + 1) // 2
    drawn = Figure(figsize=(4.6 * across, 7.5), dpi=110, layout="constrained", facecolor="white")
    panels = drawn.subplots(2, across, squeeze=False).flat
    for panel, s in zip(panels, samples, strict=False):
        values = s.eigenvalues[s.eigenvalues != 0]
        counts, edges = np.histogram(values, bins=60)
        heights = counts / s.eigenvalues.size / np.diff(edges)
        panel.stairs(heights, edges, fill=True, color="#56B4E9", alpha=0.6, label="eigenvalues")
        panel.plot(s.x, s.density, color="#D55E00", label="law")
        if s.other is not None:
            panel.plot(s.x, s.other[1], color="black", ls="--", linewidth=1, label=s.other[0])
        top = 1.25 * max(heights.max(), s.density.max())
        scale = ", over the mean of Λ" if "block" in s.title else ""
        panel.set(xlabel=f"eigenvalue{scale}", ylabel="share of all per unit", ylim=(0, top))
        panel.set_title(s.title, fontsize=10)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels:
        panel.set_axis_off()
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
