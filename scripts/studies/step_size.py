"""Finite-difference Hessian products against the step: error of products and of Ritz values, by dtype and by vector.

    python -m scripts.studies.step_size

With no options: the small GPT-NeoX model and the text in scripts/tiny, a few minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import jaxhess
from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import quadrature
from jaxhess.operators.restriction import leaf_name
from jaxhess.results.figures import format_number
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.vectors import Vector, cast, check_seed, norm, random_key, random_probe, size
from scripts.studies.harness import FOUNDATION, ModelOptions, command, picture

NAME = "step_size"
PAPER = (1e-4, 1e-3)
"""The per-coordinate steps that arXiv 2602.00816 recommends."""

CAPTION = """Above: relative error of products along a random vector, Lanczos vectors and single coordinates. Below: of
the extreme Ritz values of short Lanczos runs, with one step for all vectors. Left of the best step rounding dominates,
right of it truncation. Shaded: the steps of arXiv 2602.00816."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """Steps are per coordinate: the root mean square entry of the shift."""

    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """Of weights and computation."""
    reference: Literal["float64", "float32"] = "float64"
    """Precision of the exact product that errors are measured against."""
    shift: Literal["realised", "float32"] = "realised"
    """See `FiniteDifferenceHessian`."""
    smallest: float = 1e-7
    """Smallest step of the grid."""
    largest: float = 1e-1
    """Largest step of the grid."""
    per_decade: int = 2
    """Steps of the grid in a factor of ten."""
    lanczos: tuple[int, ...] = (2, 20)
    """Lanczos vectors to take beside a random one and single coordinates; the first is the random one."""
    ritz_steps: int = 8
    """Lanczos steps of the runs whose extreme Ritz values are compared."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        if not 0 < self.smallest < self.largest < math.inf:
            raise InputError(f"--smallest {self.smallest} --largest {self.largest}: 0 < smallest < largest is needed.")
        if self.per_decade < 1 or self.ritz_steps < 1:
            raise InputError(f"--per-decade {self.per_decade} and --ritz-steps {self.ritz_steps} must be at least 1.")
        if any(k < 2 for k in self.lanczos):
            raise InputError(
                f"--lanczos {' '.join(map(str, self.lanczos))}: the first Lanczos vector is the random one."
            )
        check_seed(self.seed)
        if not self.dtypes:
            raise InputError("--dtypes names none; it takes float32, bfloat16, float16.")

    @property
    def grid(self) -> list[float]:
        """Steps from the smallest to the largest, evenly spaced in the logarithm."""
        decades = math.log10(self.largest / self.smallest)
        return np.geomspace(self.smallest, self.largest, round(decades * self.per_decade) + 1).tolist()

    def near(self, low: float, high: float) -> list[int]:
        """Indices of the grid's steps from low to high, and of those nearest to them."""
        slack = 10 ** (0.5 / self.per_decade)
        return [i for i, step in enumerate(self.grid) if low / slack < step < high * slack]


SMALL = Options(seq_len=16, mesh="fsdp=1", smallest=1e-6, largest=1e-2, lanczos=(2,), ritz_steps=4)


class AtStep(NamedTuple):
    """A step, and the relative error there."""

    step: float
    error: float


@dataclasses.dataclass(frozen=True)
class VectorErrors:
    """Relative errors of the products along one vector.

    Attributes:
        name: Of the vector.
        errors: At every step of the grid.
        exact: Of the exact product in the same dtype.
        automatic: At the step that `step="auto"` takes.
        best: At the best step of the grid.
        predicted: The step at which a / e + b e^2 is least: (a / 2b)^(1/3). a is fitted to the steps below a third of
            the best one; b is measured where truncation is all of the error, in the reference's precision.
    """

    name: str
    errors: list[float]
    exact: float
    automatic: AtStep
    best: AtStep
    predicted: float


class RitzEnds(NamedTuple):
    """Of the smallest and of the largest Ritz value."""

    smallest: float
    largest: float


@dataclasses.dataclass(frozen=True)
class DtypeErrors:
    """All errors in one dtype; those of Ritz values for exact products, automatic steps, and every step of the grid."""

    dtype: str
    vectors: list[VectorErrors]
    ritz_values: RitzEnds
    ritz_exact: RitzEnds
    ritz_automatic: RitzEnds
    ritz_fixed: list[RitzEnds]


Measured = Callable[[DtypeErrors], list[float]]
"""The errors of a dtype of which a claim is about the largest."""


def study(options: Options) -> Study:
    """The study of every dtype."""
    options.check()
    blocks = options.blocks()
    with jax.enable_x64(options.reference == "float64"):
        operators = (options.hessian(blocks, dtype) for dtype in options.dtypes)
        found = [errors_of(options, operator, blocks.tokens) for operator in operators]
        hessian = options.hessian(blocks, options.dtypes[0])
    return Study(
        "Finite-difference Hessian products against the step",
        tuple(claims(options, found, options.described(hessian))),
        tuple(tables(options, found)),
        (picture(NAME, figure(options, found), CAPTION),),
        {
            "parameters": hessian.dim,
            "data_fingerprint": blocks.fingerprint(),
            "steps": options.grid,
            "found": [dataclasses.asdict(dtype) for dtype in found],
        },
    )


def claims(options: Options, found: list[DtypeErrors], model: str) -> Iterator[Claim]:
    """What the paper says of steps. Steps outside the grid, and dtypes left out, are not measured."""
    by_dtype = {dtype.dtype: dtype for dtype in found}
    recommended, usual = options.near(*PAPER), options.near(PAPER[1], PAPER[1])
    ritz = f"error of the extreme Ritz values after {options.ritz_steps} steps, divided by the shift realised,"

    def largest_value(step: float) -> Measured:
        return lambda at: [at.ritz_fixed[i].largest for i in options.near(step, step)]

    def product(at: DtypeErrors) -> list[float]:
        return [v.errors[i] for v in at.vectors if v.name == "random" or "Lanczos" in v.name for i in usual]

    def balance(at: DtypeErrors) -> list[float]:
        off = [abs(math.log10(v.best.step / v.predicted)) for v in at.vectors if v.predicted > 0]
        return [float(np.median(off))] if off else []

    # fmt: off
    rows: list[tuple[str, Measured, Range, str, str, str, str]] = [
        *((dtype, lambda at: [max(at.ritz_fixed[i]) for i in recommended], (None, 0.1),
           "Design tradeoffs, Precision; Figures 5 and 6", "minimal spectral deviation",
           f"Steps from 1e-4 to 1e-3 leave the spectrum nearly as it is ({dtype}).", f"{ritz} largest of these steps")
          for dtype in ("float32", "bfloat16")),
        ("bfloat16", largest_value(1e-5), (0.5, None), "Failure signatures; Figure 3", "resembles a random matrix",
         "In bfloat16 a step of 1e-5 is too small: no outlier is left.", f"{ritz} of the largest value"),
        ("bfloat16", largest_value(1e-2), (0.5, None), "Failure signatures; Figure 4", "resembles a random matrix",
         "In bfloat16 a step of 1e-2 is too large: no outlier is left.", f"{ritz} of the largest value"),
        ("float32", product, (None, 0.1), "Mechanism 1, core assumption", "acceptable",
         "The bias of a finite difference is acceptable at the chosen step, here 1e-3, for all Lanczos vectors.",
         "largest error of a product along a random vector and Lanczos vectors"),
        ("float32", balance, (None, 0.5), "Mechanism 1, break condition; Theorem 3.1", "a cube root of their ratio",
         "The best step is where rounding and truncation balance.",
         "factors of ten from the best step of the grid to (a / 2b)^(1/3), median over vectors"),
    ]
    # fmt: on
    for dtype, measured, holds, place, paper, statement, quantity in rows:
        at = by_dtype.get(dtype)
        values = measured(at) if at else []
        ours = max(values) if values and np.isfinite(values).all() else None
        # Of Ritz values and products: what rounding alone does to them; of the best step: half of the grid's spacing.
        error = 0.5 / options.per_decade if measured is balance else max(at.ritz_exact) if at else 0.0
        yield Claim(FOUNDATION, place, statement, paper, quantity, holds, ours, error, f"{model}, {dtype}")


def errors_of(options: Options, exact: jaxhess.Hessian, tokens: np.ndarray) -> DtypeErrors:
    """One dtype's errors: for every vector over the grid, at the automatic step and exactly; and of Ritz values."""
    reference = exact.in_dtype(options.reference)
    difference = jaxhess.FiniteDifferenceHessian(
        exact.loss, exact.params, exact.batches, 1.0, "coordinate", options.shift
    )
    truncating = dataclasses.replace(difference, loss=reference.loss, params=reference.params)

    def at(operator: jaxhess.FiniteDifferenceHessian, step: float, v: Vector, product: Vector) -> float:
        return distance(dataclasses.replace(operator, step=step) @ v, product)

    rows = []
    for name, v in vectors(exact.in_dtype("float32"), tokens, options.lanczos, options.seed).items():
        wide = cast(v, options.reference)
        product = reference @ wide
        errors = [at(difference, step, v, product) for step in options.grid]
        automatic = difference.calibrated(v).step / math.sqrt(size(exact.shape_dtype))
        best = AtStep(*min(zip(options.grid, errors, strict=True), key=lambda pair: np.nan_to_num(pair[1], nan=np.inf)))
        below = [e * s for s, e in zip(options.grid, errors, strict=True) if s < best.step / 3 and np.isfinite(e)]
        rounding = float(np.median(below[-3:])) if below else math.nan
        truncation = at(truncating, automatic, wide, product) / automatic**2
        predicted = float(np.cbrt(rounding / (2 * truncation))) if truncation > 0 else math.nan
        found = AtStep(automatic, at(difference, automatic, v, product))
        rows.append(VectorErrors(name, errors, distance(exact @ v, product), found, best, predicted))

    probe = random_probe(random_key(options.seed), exact.in_dtype("float32").shape_dtype)
    true = extremes(reference, cast(probe, options.reference), options.ritz_steps)

    def ritz_errors(operator: jaxhess.LinearOperator) -> RitzEnds:
        found = extremes(operator, cast(probe, "float32"), options.ritz_steps)
        return RitzEnds(*(abs(x / y - 1) for x, y in zip(found, true, strict=True)))

    return DtypeErrors(
        str(jax.tree.leaves(exact.params)[0].dtype),
        rows,
        true,
        ritz_errors(exact),
        ritz_errors(dataclasses.replace(difference, step=None)),
        [ritz_errors(dataclasses.replace(difference, step=step)) for step in options.grid],
    )


def extremes(operator: jaxhess.LinearOperator, probe: Vector, steps: int) -> RitzEnds:
    """The extreme Ritz values after so many steps; NaN where a product overflowed."""
    state = jaxhess.lanczos_segment(operator, jaxhess.start_lanczos([probe], steps), steps)
    alphas, betas, _ = state.tridiagonal()
    if alphas.size == 0 or not np.isfinite(alphas + betas).all():
        return RitzEnds(math.nan, math.nan)
    values = quadrature(alphas, betas).ritz_values
    return RitzEnds(float(values[0]), float(values[-1]))


def vectors(exact: jaxhess.Hessian, tokens: np.ndarray, lanczos: tuple[int, ...], seed: int) -> dict[str, Vector]:
    """A random vector, Lanczos vectors that follow from it, and single coordinates, in float32."""
    like = exact.shape_dtype
    found = {"random": random_probe(random_key(seed), like)}
    if lanczos:
        state = jaxhess.start_lanczos([found["random"]], max(lanczos), jaxhess.Storage("none"))
        for k in sorted(lanczos):
            state = jaxhess.lanczos_segment(exact, state, k - 1)
            found[f"Lanczos {k}"] = jax.tree.map(lambda x: x[0], state.current)  # the next segment takes its buffers
    common = int(np.bincount(np.asarray(tokens).ravel()).argmax())
    named = {leaf_name(path): k for k, (path, _) in enumerate(jax.tree.flatten_with_path(like)[0])}
    for name, label in (
        ("final_norm/scale", "one norm gain"),
        ("embed/kernel", "one embedding"),
        ("layers/mlp/up/kernel", "largest MLP weight"),
    ):
        if name in named:
            weights = jax.tree.leaves(exact.params)[named[name]]
            first = common if name.startswith("embed") else 0
            sizes = jnp.abs(weights[first : first + 1] if first else weights)
            place = np.array(np.unravel_index(int(jnp.argmax(sizes)), sizes.shape))
            place[0] += first
            leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.zeros_like, exact.params))
            leaves[named[name]] = leaves[named[name]].at[tuple(place)].set(1)
            found[label] = jax.tree.unflatten(treedef, leaves)
    return found


@jax.jit
def _distance(found: Vector, true: Vector) -> jax.Array:
    return norm(jax.tree.map(lambda x, y: x.astype(y.dtype) - y, found, true)) / norm(true)


def distance(found: Vector, true: Vector) -> float:
    """|found - true| / |true|."""
    return float(_distance(found, true))


def tables(options: Options, found: list[DtypeErrors]) -> Iterator[Table]:
    """Errors of products, and of Ritz values, as two tables per dtype."""
    usual = int(np.argmin(np.abs(np.log(np.array(options.grid) / PAPER[1]))))
    usual_heading = f"at {options.grid[usual]:.0e}".replace("e-0", "e-")
    head = ("vector", "exact", "best at", "error", "automatic at", "error", usual_heading, "predicted best")
    for dtype in found:
        rows = [
            (v.name, *(f"{x:.1e}" for x in (v.exact, *v.best, *v.automatic, v.errors[usual], v.predicted)))
            for v in dtype.vectors
        ]
        yield Table(head, rows, f"Relative error of products in {dtype.dtype}")
        runs = {"exact": dtype.ritz_exact, "automatic step": dtype.ritz_automatic}
        runs |= {f"step {step:.1e}": errors for step, errors in zip(options.grid, dtype.ritz_fixed, strict=True)}
        rows = [(name, *(f"{x:.1e}" for x in errors)) for name, errors in runs.items()]
        yield Table(("products", "smallest", "largest"), rows, f"Error of Ritz values in {dtype.dtype}")


COLORS = ("#1b2a41", "#2f6fb3", "#5fa8d3", "#c8553d", "#e09f3e", "#588157", "#8d5a97", "#6c757d")


def figure(options: Options, found: list[DtypeErrors]) -> Figure:
    """One column per dtype: errors of products above, of Ritz values below."""
    drawn = Figure(figsize=(6.4 * len(found) + 0.4, 9), dpi=130, layout="constrained", facecolor="white")
    axes = drawn.subplots(2, len(found), squeeze=False, sharex=True, sharey="row")
    for (above, below), dtype in zip(axes.T, found, strict=True):
        _products(above, options, dtype)
        _ritz_values(below, options, dtype)
        for panel in (above, below):
            panel.set(xscale="log", yscale="log", ylim=(1e-7, 30))
            panel.axvspan(*PAPER, color="#f2e8cf", zorder=0)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        below.set_xlabel("step: root mean square entry of the shift")
    axes[0, 0].set_ylabel("relative error of the product")
    axes[1, 0].set_ylabel("relative error of the Ritz value")
    lines = [
        Line2D([], [], color=color, marker="o", markersize=3, label=vector.name)
        for color, vector in zip(COLORS, found[0].vectors, strict=False)
    ]
    lines += [
        Line2D([], [], color="black", marker="*", markersize=11, linestyle="none", label="automatic step"),
        Line2D([], [], color="black", marker="|", markersize=11, linestyle="none", label="predicted best step"),
        Line2D([], [], color="black", linewidth=1, label="automatic step for every vector (below)"),
        Line2D([], [], color="black", linestyle=":", label="exact products (above: their median)"),
        Line2D([], [], color="#f2e8cf", linewidth=8, label="steps of arXiv 2602.00816"),
    ]
    drawn.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return drawn


def _products(panel: Axes, options: Options, dtype: DtypeErrors) -> None:
    for color, vector in zip(COLORS, dtype.vectors, strict=False):
        panel.plot(options.grid, vector.errors, "o-", markersize=3, linewidth=1.2, color=color)
        panel.plot(*vector.automatic, "*", markersize=12, color=color, markeredgecolor="white")
        if math.isfinite(vector.predicted):
            panel.plot(vector.predicted, vector.best.error / 2.5, "|", markersize=11, color=color)
    panel.axhline(np.median([vector.exact for vector in dtype.vectors]), color="black", linestyle=":")
    panel.set_title(f"products in {dtype.dtype}", fontsize=11)


def _ritz_values(panel: Axes, options: Options, dtype: DtypeErrors) -> None:
    for name, color in (("largest", COLORS[3]), ("smallest", COLORS[1])):
        errors = [getattr(extremes, name) for extremes in dtype.ritz_fixed]
        label = f"{name} Ritz value, {format_number(getattr(dtype.ritz_values, name))}"
        panel.plot(options.grid, errors, "o-", markersize=3, color=color, label=label)
        panel.axhline(getattr(dtype.ritz_automatic, name), color=color, linewidth=1)
        panel.axhline(getattr(dtype.ritz_exact, name), color=color, linewidth=1, linestyle=":")
    panel.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="lower right")
    panel.set_title(f"extreme Ritz values after {options.ritz_steps} Lanczos steps in {dtype.dtype}", fontsize=11)


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
