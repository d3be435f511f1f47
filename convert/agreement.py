"""Whether two computations of the same quantities agree within rounding, and where they first do not.

Ours, a, and theirs, b, are computed in one dtype, and again in a wider one: A and B. With d(., .) the distance,

    d(a, b) <= d(a, A) + d(A, B) + d(B, b),

so that the two sides' own errors, d(a, A) + d(B, b), are what rounding alone explains, with no factor to choose: any
more is a difference between A and B, which no rounding of the narrow dtype hides. A quantity agrees when

1. d(A, B) is at most `EXACT` of its size: both compute the same function of the same weights;
2. our own error is at most `RATIO` times theirs (but for `FLOOR` roundings): computed in the same dtype, a side whose
   error is much larger loses digits somewhere, which its own error would otherwise excuse.

Where both own errors are more than `USELESS` of the quantity the narrow dtype has "no digits" of it: the functions are
the same, by 1, and of the narrow computation nothing is said.

Where nothing wider fits into memory there is only a bound on d(a, b), and the line says that it is one. A bound above
`USELESS` rejects nothing worth rejecting, and rounding in Lanczos grows with the steps beyond any such bound: those
lines are "not decided". In float64 nothing wider is needed: there d(a, b) is d(A, B).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import wasserstein_distance

EXACT = {"float64": 1e-10, "float32": 1e-4}
"""By the wider dtype: far above its rounding (measured 1e-16 to 1e-12, and 1e-7 to 1e-5), and far below what a single
weight changed by 1% does to a Hessian product of the model in scripts/tiny. Only the density comes close, where float32
is the wider dtype (8.7e-5): its distance is over the mean, a thousandth of what the matrix rounds by."""

RATIO = 10.0
"""Between the two sides' own errors. Sums are taken in another order, and bfloat16 is rounded to at other places."""

USELESS = 0.1
"""Of a quantity's size: an error or a bound that leaves not one digit. A gradient of zero is off by 1."""

FLOOR = 4.0
"""Roundings of a result that an error may always be: a scalar can come out exact by luck."""

BOUND = 64.0
"""Roundings per root of depth, on quantities that cannot be computed in a wider dtype: ten times what float32 showed on
the model in scripts/tiny. In bfloat16 it is `USELESS`; there float32 is wider, and fits nearly always."""

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

Kind = Literal["measured", "bound", "bits", "limit"]
Array = npt.NDArray[Any]


class Measure(NamedTuple):
    """A discrete measure: values, and weights that sum to one."""

    values: Array
    weights: Array


Quantity = Array | Mapping[str, Array] | Measure
"""An array, arrays by parameter name, or a discrete measure (compared by the Wasserstein-1 distance)."""


class LanczosCoefficients(NamedTuple):
    """A Lanczos run: [m] alphas, betas, and the largest |Q'Q - I| among the vectors of the first j + 1 steps."""

    alphas: Array
    betas: Array
    orthogonality: Array


@dataclasses.dataclass(frozen=True)
class Side:
    """What one framework computed.

    Attributes:
        weights: By name, as stored.
        quantities: In the order in which they depend on each other; vectors are by name.
        lanczos: For each mode of re-orthogonalisation.
        quadrature: From alphas [m] and betas [m] to Ritz values and weights, each side's own.
    """

    weights: dict[str, Array]
    quantities: dict[str, Quantity]
    lanczos: dict[str, LanczosCoefficients]
    quadrature: Callable[[Array, Array], Measure]


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity of both sides.

    Attributes:
        quantity: What it is.
        ours, theirs: A scalar itself, the norm of anything larger, the mean |value| of a measure.
        difference: d(a, b) over the size of theirs.
        explained: What rounding alone explains of that; None: nothing is known of it.
        kind: Whether `explained` was measured or is a bound; "bits": nothing may differ; "limit": `explained` is the
            most that ours may be.
        wider: d(A, B) over the same size; None where there is no wider run.
        own: d(a, A) and d(b, B), likewise.
        agrees: The verdict; None: there is none, for want of digits or of a bound that could reject.
        where: The parameter in which it differs most, for arrays by name.
    """

    quantity: str
    ours: float
    theirs: float
    difference: float
    explained: float | None
    kind: Kind
    agrees: bool | None
    wider: float | None = None
    own: tuple[float, float] | None = None
    where: str | None = None

    @property
    def word(self) -> Literal["agree", "DIFFER", "no digits", "not decided"]:
        """The verdict in words."""
        if self.agrees is None:
            return "no digits" if self.kind == "measured" else "not decided"
        return "agree" if self.agrees else "DIFFER"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All lines, and what they leave out.

    Attributes:
        lines: One per quantity.
        weights: A sentence for every parameter that differs.
        lanczos: For each mode "alphas", "betas" and "orthogonality", each of (ours, theirs); how many steps are
            "compared", and the "limit" of orthogonality that says so.
    """

    lines: list[Line]
    weights: list[str]
    lanczos: dict[str, dict[str, Any]]

    @property
    def agrees(self) -> bool | None:
        """False where any line differs, None where any is not decided. Lines without digits do not count."""
        words = {line.word for line in self.lines}
        return False if "DIFFER" in words else None if "not decided" in words else True

    @property
    def first_difference(self) -> str | None:
        """A sentence on where the two sides first differ, None where they do not."""
        return first_difference(self.lines, self.weights)


def judge(
    narrow: tuple[Side, Side],
    wide: tuple[Side, Side] | None,
    *,
    dtype: str,
    wider: str | None,
    depth: int,
    step: float = 1.0,
) -> Verdict:
    """The verdict on (ours, theirs), computed in `dtype`, by the same two in `wider`, if there are.

    Lanczos coefficients are compared for as many steps as orthogonality lasts on both sides: while |Q'Q - I| is at most
    the root of the unit of rounding, T is the projection on the Krylov space up to rounding (Simon 1984); after that
    every rounding is magnified without a limit, and the two sides differ in nothing but those. How far orthogonality is
    kept is a line of its own.

    Args:
        narrow, wide: (ours, theirs) in either dtype; of `wide` the "full" mode is the reference for all. Where `wide`
            has no Lanczos runs, those in `dtype` are not decided.
        dtype, wider: Names of dtypes.
        depth: Layers of the model.
        step: Of finite differences, per coordinate.
    """
    ours, theirs = narrow
    options: dict[str, Any] = {"dtype": dtype, "wider": wider or "float64", "depth": depth}
    first, weights = compare_weights(ours.weights, theirs.weights)
    lines, steps = [first], {}
    for name, value in ours.quantities.items():
        pair = None if wide is None else (wide[0].quantities[name], wide[1].quantities[name])
        # Two gradients are subtracted and divided by the step, and their rounding with them.
        magnified = 1 + size(ours.quantities["gradient"]) / (step * size(value)) if name.startswith("finite") else 1.0
        lines.append(compare(name, value, theirs.quantities[name], pair, magnified=magnified, **options))
    # In float64 what is compared is as good as `EXACT` only while orthogonality is.
    limit = EXACT["float64"] if dtype == "float64" else EPS[dtype] ** 0.5
    for mode in ours.lanczos:
        runs = [(side, side.lanczos[mode]) for side in narrow]
        runs += [(side, side.lanczos["full"]) for side in wide or () if side.lanczos]
        kept = min(int(np.sum(run.orthogonality <= limit)) for _, run in runs[:2])
        steps[mode] = {
            **{name: [getattr(run, name) for _, run in runs[:2]] for name in LanczosCoefficients._fields},
            "compared": kept,
            "limit": limit,
        }
        label = f"({'' if mode == 'full' else 'no '}re-orth.)"
        lines.append(compare_orthogonality(f"orthogonality {label}", runs[0][1], runs[1][1], limit, mode == "full"))
        if not kept:
            continue
        found = [_of_lanczos(side, run, kept) for side, run in runs]
        for what in found[0]:
            pair = (found[2][what], found[3][what]) if len(found) == 4 else None
            line = compare(f"{what} {label}", found[0][what], found[1][what], pair, **options)
            if pair is None and dtype != "float64":
                line = dataclasses.replace(line, explained=None, agrees=None)
            lines.append(line)
    return Verdict(lines, weights, steps)


def _of_lanczos(side: Side, run: LanczosCoefficients, kept: int) -> dict[str, Quantity]:
    """What is compared of the first so many steps."""
    nodes = side.quadrature(run.alphas[:kept], run.betas[:kept])
    return {
        "alphas": run.alphas[:kept],
        "betas": run.betas[:kept],
        "Ritz values": nodes.values,
        "weights": nodes.weights,
        "density": nodes,
    }


def compare(
    quantity: str,
    ours: Quantity,
    theirs: Quantity,
    wide: tuple[Quantity, Quantity] | None,
    *,
    dtype: str,
    wider: str = "float64",
    depth: int = 1,
    magnified: float = 1.0,
) -> Line:
    """The verdict on one quantity.

    Args:
        quantity: Its name.
        ours, theirs: Both sides in `dtype`.
        wide: The same in `wider`, (ours, theirs); None: not computed.
        dtype, wider: Names of dtypes.
        depth: Layers of the model, for the bound where nothing wider is there.
        magnified: By how much rounding is, for that bound.
    """
    scale = size(theirs) or size(ours) or 1.0
    difference = _finite(distance(ours, theirs) / scale)
    shown = _shown(ours), _shown(theirs)
    if wide is None:
        bound = EXACT[dtype] if dtype == "float64" else BOUND * EPS[dtype] * depth**0.5 * magnified
        decided = None if difference <= bound and bound > USELESS else difference <= bound
        return Line(quantity, *shown, difference, bound, "bound", decided, where=_worst(ours, theirs))
    own = (_finite(distance(ours, wide[0]) / scale), _finite(distance(theirs, wide[1]) / scale))
    apart = _finite(distance(*wide) / scale)
    same = apart <= EXACT[wider] and own[0] <= RATIO * max(own[1], FLOOR * EPS[dtype])
    agrees = None if same and min(own) > USELESS else bool(same)
    where = None if same else _worst(*wide)
    return Line(quantity, *shown, difference, sum(own), "measured", agrees, apart, own, where)


def compare_orthogonality(
    quantity: str, ours: LanczosCoefficients, theirs: LanczosCoefficients, limit: float, full: bool
) -> Line:
    """The verdict on |Q'Q - I| after the last step: what is compared of the runs is only what both kept orthogonal.

    Args:
        quantity: Its name.
        ours, theirs: Runs of at least one step.
        limit: What may always be lost. No run may lose it in its first step.
        full: Re-orthogonalised: no more than that may be lost. Otherwise `RATIO` times what they lose.
    """
    ends = float(ours.orthogonality[-1]), float(theirs.orthogonality[-1])
    most = limit if full else max(limit, RATIO * ends[1])
    begun = max(ours.orthogonality[0], theirs.orthogonality[0]) <= limit
    return Line(quantity, *ends, _finite(abs(ends[0] - ends[1])), most, "limit", bool(begun and ends[0] <= most))


def compare_weights(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> tuple[Line, list[str]]:
    """Bit for bit, by name; and for every parameter that differs a sentence that says how, in the order of `theirs`."""
    sentences = []
    for name in [*theirs, *(n for n in ours if n not in theirs)]:
        if name not in ours or name not in theirs:
            sentences.append(f"{name}: only {'theirs' if name in theirs else 'ours'} has it")
        elif not np.array_equal(ours[name], theirs[name]):
            sentences.append(f"{name}: {_how(ours[name], theirs[name])}")
    worst = sentences[0].split(":")[0] if sentences else None
    shared = [name for name in theirs if name in ours and ours[name].shape == theirs[name].shape]
    pair = {n: ours[n] for n in shared}, {n: theirs[n] for n in shared}
    difference = distance(*pair) / (size(pair[1]) or 1.0)
    line = Line("weights", size(pair[0]), size(pair[1]), difference, 0.0, "bits", not sentences, where=worst)
    return line, sentences


def first_difference(lines: Iterable[Line], weights: list[str]) -> str | None:
    """A sentence on where the two sides first differ, None where they do not."""
    if weights:
        more = f" ({len(weights) - 1} more parameters differ)" if len(weights) > 1 else ""
        first = f"The weights differ, first {weights[0]}{more}."
    else:
        first = ""
    line = next((line for line in lines if line.agrees is False and line.kind != "bits"), None)
    if line is None:
        return first or None
    inside = f", most in {line.where}" if line.where else ""
    return f"{first} The computation departs at: {line.quantity}{inside}.".strip()


def distance(a: Quantity, b: Quantity) -> float:
    """Euclidean in float64; between measures Wasserstein-1. Infinite where shapes differ."""
    if isinstance(a, Measure) and isinstance(b, Measure):
        return float(wasserstein_distance(a.values, b.values, a.weights, b.weights))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return float("inf")
        return float(np.sqrt(sum(distance(a[name], b[name]) ** 2 for name in a)))
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return float("inf")
    return float(np.linalg.norm((a.astype(np.float64) - b.astype(np.float64)).ravel()))


def size(a: Quantity) -> float:
    """Norm of an array, mean |value| of a measure."""
    if isinstance(a, Measure):
        return float(np.sum(a.weights * np.abs(a.values)))
    if isinstance(a, Mapping):
        return float(np.sqrt(sum(size(x) ** 2 for x in a.values())))
    return float(np.linalg.norm(np.asarray(a).astype(np.float64).ravel()))


def _shown(a: Quantity) -> float:
    return float(a) if isinstance(a, np.ndarray | float) and np.ndim(a) == 0 else size(a)


def _worst(a: Quantity, b: Quantity) -> str | None:
    """The name whose arrays are farthest apart, relative to the larger of their size and a thousandth of the whole's.

    Some gradients (GPT-2's key bias) are zero but for rounding.
    """
    if not isinstance(a, Mapping) or not isinstance(b, Mapping) or a.keys() != b.keys():
        return None
    least = 1e-3 * size(b)
    return max(b, key=lambda name: distance(a[name], b[name]) / (max(size(b[name]), least) or 1.0))


def _how(a: Array, b: Array) -> str:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} against {list(b.shape)}"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a.T, b):
        return "one is the transpose of the other"
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    moved = wide_a != wide_b
    relative = np.abs(wide_a - wide_b)[moved] / np.maximum(np.abs(wide_b[moved]), np.finfo(np.float32).tiny)
    first = ", ".join(map(str, np.argwhere(moved)[0])) if moved.any() else ""
    return f"{moved.sum():,} of {a.size:,} values, first at [{first}], by up to {relative.max():.2g} of the value"


def _finite(x: float) -> float:
    """NaN is no agreement."""
    return x if np.isfinite(x) else float("inf")
