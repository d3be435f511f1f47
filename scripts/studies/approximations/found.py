"""What the comparison of structures found: claims with their ranges, and tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range
from scripts.studies.approximations.compared import (
    MEAN,
    PLUS_DIAGONAL,
    RANDOM,
    SEQUENCES,
    StructureScore,
    best,
    mean_error,
    ratio,
)
from scripts.studies.harness import FOUNDATION

OPEN = "Open Questions, Question 1"
SAME = 1.05
"""Two structures are as good as each other if their errors, or their steps, differ by at most a twentieth."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """|C - S|_F / |C|_F of a structure: by the coupling map and by held-out vectors with standard errors, and exact."""

    mapped: tuple[float, float]
    vectors: tuple[float, float]
    exact: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one matrix of one model.

    Attributes:
        model, kind, dim: Its name, the matrix, its rows.
        fixed: Structures without a parameter.
        equal: For each of these, eigenpairs with a diagonal of the same storage, without steps; None where none fits.
        budgets: All that fit, by the budget in vectors and by name.
        by_triangles: The winner on random vectors where of symmetric blocks one triangle is stored, by budget.
        plain: Steps of conjugate gradients without a preconditioner.
        predicted: By the name of a structure.
    """

    model: str
    kind: str
    dim: int
    fixed: dict[str, StructureScore]
    equal: dict[str, StructureScore | None]
    budgets: dict[int, dict[str, StructureScore]]
    by_triangles: dict[int, str | None]
    plain: list[int]
    predicted: dict[str, Prediction]

    def winner(self, multiple: int, group: str) -> str | None:
        """The structure with the least mean error on vectors of a kind."""
        return best(self.budgets[multiple], mean_error(group))

    def fastest(self, multiple: int) -> str | None:
        """The structure with the fewest steps of conjugate gradients."""
        return best(self.budgets[multiple], lambda one: one.mean_steps)

    @property
    def small(self) -> bool:
        """Whether it is one of the small decoders, of which all parameters are free."""
        return "arrow" in self.fixed


def claims(results: Sequence[Result]) -> Iterator[Claim]:
    """What the paper says of block-diagonal curvature, and answers to what it leaves open; a range refutes each.

    The error of a value is twice its standard error over the vectors; of an extreme, that of the extreme one.
    """
    small = [one for one in results if one.small]
    rest = [one for one in results if not one.small]
    names = "; ".join(dict.fromkeys(one.model for one in small))
    least = "relative error on random vectors, least over models"
    # fmt: off
    rows: list[tuple[str, str, str, str, Range, tuple[float, float], str]] = [
        ("Mechanism 3; Table 6", "Block-diagonal curvature is off by order one.", "0.941 ± 0.059",
         f"blocks by layers of the Hessian: {least}", (0.5, None),
         extreme(errors_of(small, "Hessian", "blocks: layers"), largest=False), names),
        ("Mechanism 3", "K-FAC is off by order one.", "order one",
         f"K-FAC of the Gauss-Newton matrix: {least}", (0.5, None),
         extreme(errors_of(small, "Gauss-Newton", "K-FAC"), largest=False), names),
    ]
    for kind in dict.fromkeys(one.kind for one in results):
        of_kind = [one for one in small if one.kind == kind]
        rows += [
            (OPEN, f"{kind}: eigenpairs with a diagonal are better than blocks of the same storage.", "left open",
             "their error on random vectors over that of the blocks, largest over granularities and models", (None, 1),
             extreme(duels(of_kind, lambda name: name.startswith("blocks"))), names),
            (OPEN, f"{kind}: they are better than bands of layers and an arrow of the same storage.", "left open",
             "their error on random vectors over that of the band or arrow, largest", (None, 1),
             extreme(duels(of_kind, lambda name: name == "arrow" or name.startswith("band"))), names),
            (OPEN, f"{kind}: they are better than the nearest Kronecker factors of the same storage.", "left open",
             "their error on random vectors over that of the factors, largest over models", (None, 1),
             extreme(duels(of_kind, lambda name: name == "nearest Kronecker")), names),
            (OPEN, f"{kind}: one structure is the best at every size of the model, for each budget.", "left open",
             "error of the smallest model's winner over the least error, largest over budgets and models", (None, SAME),
             extreme(across_sizes(of_kind)), names),
            (OPEN, f"{kind}: the least error at a budget does not grow with the model.", "left open",
             "least error in the largest model over that in the smallest, largest over budgets", (None, SAME),
             extreme(growth(of_kind)), names),
            (OPEN, f"{kind}: what is best on random vectors is best on gradients.", "left open",
             "error on gradients of the winner on random vectors over the least, largest", (None, SAME),
             extreme(on_gradients(of_kind)), names),
            (OPEN, f"{kind}: the structure nearest to the matrix is the best preconditioner.", "left open",
             "its steps of conjugate gradients over the fewest, largest over budgets and models", (None, SAME),
             extreme(as_preconditioners(of_kind)), names),
            ("Mechanism 3", f"{kind}: blocks by layers are a preconditioner that saves steps.", "assumed by K-FAC",
             "steps of conjugate gradients with them over those without, largest over models", (None, 1),
             extreme(saved(of_kind, "blocks: layers")), names),
        ]
        rows += [
            (OPEN, f"{kind}: so in the norms of a trained model: they are better than blocks.", "left open",
             "error of eigenpairs with a diagonal over that of the blocks, largest over granularities", (None, 1),
             extreme(duels([one], lambda name: name.startswith("blocks"))), one.model)
            for one in rest if one.kind == kind
        ]
    rows.append(
        (OPEN, "A coupling map of the blocks predicts the error of any structure made of them.", "left open",
         "largest distance of the predicted from the measured relative error", (None, 0.05),
         extreme(mispredictions(results)), names)
    )
    # fmt: on
    for place, statement, paper, quantity, holds, (ours, error), model in rows:
        known = math.isfinite(ours) and math.isfinite(error)
        yield Claim(
            FOUNDATION,
            place,
            statement,
            paper,
            quantity,
            holds,
            ours if known else None,
            2 * error if known else 0.0,
            model,
        )


def extreme(values: Iterable[tuple[float, float]], largest: bool = True) -> tuple[float, float]:
    """The largest or least of values with their standard errors; NaN where there is none."""
    listed = list(values)
    if not listed:
        return math.nan, math.nan
    return (max if largest else min)(listed, key=lambda pair: pair[0])


def errors_of(results: Iterable[Result], kind: str, name: str) -> Iterator[tuple[float, float]]:
    """Mean relative errors of a structure on random vectors."""
    for one in results:
        if one.kind == kind and name in one.fixed:
            values = one.fixed[name].errors[RANDOM]
            yield float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


def duels(results: Iterable[Result], chosen: Callable[[str], bool]) -> Iterator[tuple[float, float]]:
    """Errors of eigenpairs with a diagonal over those of the chosen structures of equal storage, on random vectors."""
    for one in results:
        for name, pairs in one.equal.items():
            if pairs is not None and chosen(name):
                yield ratio(pairs.errors[RANDOM], one.fixed[name].errors[RANDOM])


def across_sizes(results: Sequence[Result]) -> Iterator[tuple[float, float]]:
    """Errors of the first model's winner over the least, at every budget and in every other model."""
    for multiple in results[0].budgets if len(results) > 1 else ():
        name = results[0].winner(multiple, RANDOM)
        for one in results[1:]:
            found, first = one.budgets[multiple], one.winner(multiple, RANDOM)
            if name is None or first is None:
                continue
            if name not in found:  # does not fit there
                yield math.inf, math.inf
            else:
                yield ratio(found[name].errors[RANDOM], found[first].errors[RANDOM])


def growth(results: Sequence[Result]) -> Iterator[tuple[float, float]]:
    """The least error in the largest model over that in the smallest, at every budget; their vectors are not paired."""
    if len(results) < 2:
        return
    first, last = (sorted(results, key=lambda one: one.dim)[k] for k in (0, -1))
    for multiple in first.budgets:
        pair = [(one.budgets[multiple], one.winner(multiple, RANDOM)) for one in (last, first)]
        values = [found[name].errors[RANDOM] for found, name in pair if name is not None]
        if len(values) == 2:
            above, below = (x.mean() for x in values)
            relative = [x.std(ddof=1) / math.sqrt(x.size) / x.mean() for x in values]
            yield float(above / below), float(above / below * math.hypot(*relative))


def saved(results: Iterable[Result], name: str) -> Iterator[tuple[float, float]]:
    """Steps with a structure of a fixed size as preconditioner over those without any."""
    for one in results:
        steps = one.fixed[name].steps if name in one.fixed else None
        if steps is not None and min(*steps, *one.plain) >= 0:
            yield ratio(np.array(steps, float), np.array(one.plain, float))


def on_gradients(results: Iterable[Result]) -> Iterator[tuple[float, float]]:
    """Errors on gradients of the winner on random vectors over the least."""
    for one in results:
        for multiple, found in one.budgets.items():
            name, first = one.winner(multiple, RANDOM), one.winner(multiple, SEQUENCES)
            if name is not None and first is not None:
                yield ratio(found[name].errors[SEQUENCES], found[first].errors[SEQUENCES])


def as_preconditioners(results: Iterable[Result]) -> Iterator[tuple[float, float]]:
    """Steps with the winner on random vectors over the fewest; where it is not positive definite, those without any."""
    for one in results:
        for multiple, found in one.budgets.items():
            name, first = one.winner(multiple, RANDOM), one.fastest(multiple)
            if name is None or first is None or min(one.plain) < 0:
                continue
            steps = one.plain if math.isnan(found[name].mean_steps) else found[name].steps
            yield ratio(np.array(steps, float), np.array(found[first].steps, float))


def mispredictions(results: Iterable[Result]) -> Iterator[tuple[float, float]]:
    """Distances of predicted from measured errors, with their joint standard errors."""
    for one in results:
        for found in one.predicted.values():
            yield abs(found.mapped[0] - found.vectors[0]), math.hypot(found.mapped[1], found.vectors[1])


def tables(results: Sequence[Result]) -> Iterator[Table]:
    """The winners, then every structure beside eigenpairs of the same storage, then predictions."""
    yield winners(results)
    for one in results:
        yield side_by_side(one)
    yield preconditioners(results)
    yield predicted(results)


def winners(results: Sequence[Result]) -> Table:
    """Of every budget, by what is asked for."""
    rows = []
    for one in results:
        for multiple, found in one.budgets.items():
            cells = []
            for group in (RANDOM, SEQUENCES, MEAN):
                name = one.winner(multiple, group)
                cells.append("none" if name is None else f"{name}: {found[name].errors[group].mean():.3f}")
            fastest = one.fastest(multiple)
            cells.append("none" if fastest is None else f"{fastest}: {found[fastest].mean_steps:.0f}")
            rows.append((one.model, one.kind, f"{multiple}", *cells, one.by_triangles[multiple] or "none"))
    head = ("model", "matrix", "vectors stored", f"best on {RANDOM}", f"on {SEQUENCES}", f"on {MEAN}")
    title = "The best structure of every budget, with its mean relative error, or its mean steps of conjugate gradients"
    return Table((*head, "fewest steps", "best on random vectors, blocks stored by triangles"), rows, title)


def side_by_side(one: Result) -> Table:
    """Structures of a fixed size, and eigenpairs with a diagonal of the same storage."""
    rows = []
    for name, own in sorted(one.fixed.items(), key=lambda item: item[1].storage):
        pairs = one.equal[name]
        rows.append((name, f"{own.storage / one.dim:.1f}", *_cells(own), *(_short(pairs) if pairs else ("",) * 3)))
    head = (
        "structure",
        "vectors stored",
        "error, random",
        "5% to 95%",
        "cosine",
        "error, sequences",
        "error, mean gradient",
    )
    beside = ("eigenpairs of the same storage", "their error, random", "error, sequences")
    plain = _steps(one.plain)
    title = f"{one.kind}, {one.model}. {PLUS_DIAGONAL} beside; without a preconditioner {plain} steps"
    return Table((*head, "steps", *beside), rows, title)


def _cells(own: StructureScore) -> tuple[str, ...]:
    random = own.errors[RANDOM]
    low, high = np.quantile(random, (0.05, 0.95))
    cosine = own.cosines[RANDOM]
    return (
        _with_error(random),
        f"{low:.3f} to {high:.3f}",
        _with_error(cosine),
        _with_error(own.errors[SEQUENCES]),
        f"{own.errors[MEAN][0]:.3f}",
        _steps(own.steps),
    )


def _short(pairs: StructureScore) -> tuple[str, ...]:
    return f"{pairs.rank}", _with_error(pairs.errors[RANDOM]), _with_error(pairs.errors[SEQUENCES])


def _with_error(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {2 * values.std(ddof=1) / math.sqrt(values.size):.3f}"


def _steps(steps: Sequence[int] | None) -> str:
    if steps is None:
        return "not positive definite"
    return "more than allowed" if min(steps) < 0 else f"{np.mean(steps):.0f}"


def preconditioners(results: Sequence[Result]) -> Table:
    """Steps of conjugate gradients by structure and budget."""
    rows = []
    for one in results:
        names = list(dict.fromkeys(name for found in one.budgets.values() for name in found))
        for name in names:
            cells = [_steps(found[name].steps) if name in found else "" for found in one.budgets.values()]
            rows.append((one.model, one.kind, name, *cells))
        rows.append((one.model, one.kind, "none", *([_steps(one.plain)] * len(one.budgets))))
    head = ("model", "matrix", "preconditioner", *(f"{multiple} vectors" for multiple in results[0].budgets))
    return Table(head, rows, "Mean steps of conjugate gradients over gradients as right sides")


def predicted(results: Sequence[Result]) -> Table:
    """|C - S|_F / |C|_F by the coupling map, and by the held-out vectors."""
    rows = []
    for one in results:
        for name, found in one.predicted.items():
            both = [f"{value:.3f} ± {2 * error:.3f}" for value, error in (found.mapped, found.vectors)]
            rows.append((one.model, one.kind, name, *both, f"{found.exact:.3f}"))
    head = ("model", "matrix", "structure", "coupling map", "held-out vectors", "exact")
    return Table(head, rows, "Relative Frobenius distance of structures made of blocks")
