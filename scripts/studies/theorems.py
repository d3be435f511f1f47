"""Theorems 3.1, 3.3 and 4.1 of arXiv 2602.00816 beside what they bound, where all of it can be computed.

    python -m scripts.studies.theorems

With no options: a small network on handwritten digits, at random weights and at a minimum of its loss, with its Hessian
and the derivatives along a direction exact in float64. The copy at hand is a summary: it has the optimal step of
Theorem 3.1, what Theorem 3.3 shows in words, and the bound of Theorem 4.1 without the meaning of two of its symbols.
What would refute them: a best step half a decade or more from the predicted one; Ritz values that move by more than the
bound, or a bound that has another unit. Three things cannot be otherwise, and are checks of the code: truncation is
within its bound (Taylor), a difference is the average of the Hessians along it (the fundamental theorem of calculus),
and Ritz values move by at most sqrt(m) times the error of a product (Weyl).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from scripts.studies.bias.retraining import Classifier, losses, retrained
from scripts.studies.harness import FOUNDATION, StudyOptions, command, picture
from scripts.training.images import Source
from scripts.training.short_runs import over_seeds

Array = npt.NDArray[np.float64]

NAME = "theorems"
RANDOM, MINIMUM = "random weights", "minimum"
NEAR = 0.5
"""Factors of ten from the best step up to which a prediction is right. Set before the first measurement."""
NOTE = """Left: error of products by central differences of the gradient along random unit vectors, in float64 (solid)
and float32 (dashed), with the bound of the truncation (dotted); vertical lines: the step that Theorem 3.1 predicts.
Right: largest error of the Ritz values in float32, with sqrt(steps) times the largest error of a product."""
COLORS = {RANDOM: "#0072B2", MINIMUM: "#D55E00"}


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The network's data, and how much is measured."""

    images: Source = "digits"
    """Handwritten digits of scikit-learn, or random images that need no other package."""
    examples: int = 100
    """Images."""
    penalty: float = 0.01
    """Coefficient of |parameters|^2 / 2 in the loss, which so has a minimum."""
    probes: int = 4
    """Random directions; errors are over these."""
    lanczos: tuple[int, ...] = (5, 10, 20, 40)
    """Lanczos steps."""
    seed: int = 0
    """Of images, weights and directions."""


SMALL = Options(images="prototypes", examples=30, probes=2, lanczos=(5, 10))
STEPS = np.geomspace(1e-5, 1, 21)
"""Lengths of the shift along a unit vector: four in a decade."""


class AtPoint(NamedTuple):
    """Of one point of the parameters.

    Attributes:
        gradient: Norm of the loss's gradient.
        third: [probes] length of the third derivative of the gradient along each direction.
        wide, narrow: [probes, steps] |difference - H u| in float64 and float32.
        bound: [probes, steps] step^2 / 6 times the largest length of the third derivative on the way.
        averaged: [probes] |difference - average of H u along it|, in |difference - H u|, at a step of 0.1.
        best, predicted: [probes] the best step of the grid in float32, and (u |gradient| / third)^(1/3), u = 2^-24.
    """

    gradient: float
    third: Array
    wide: Array
    narrow: Array
    bound: Array
    averaged: Array
    best: Array
    predicted: Array


class RitzErrors(NamedTuple):
    """After so many Lanczos steps with differences in float32: the largest error of a Ritz value beside the exact
    Hessian projected on the same vectors, the largest error of a product, and the summary's bound with eta = 1."""

    steps: int
    error: float
    product: float
    bound: float


class Loss:
    """The network's loss of flat parameters, multiplied by a factor, and its derivatives."""

    def __init__(self, unravel: Any, data: Any, penalty: float, factor: float = 1.0):
        def value(theta: jax.Array) -> jax.Array:
            inputs, labels = data
            cross_entropy = jnp.mean(losses(unravel(theta), (inputs.astype(theta.dtype), labels)))
            scale, weight = (jnp.asarray(x, theta.dtype) for x in (factor, penalty / 2))
            return scale * (cross_entropy + weight * jnp.vdot(theta, theta))

        def along(f: Any, u: jax.Array) -> Any:
            return lambda theta: jax.jvp(f, (theta,), (u,))[1]

        gradient = jax.grad(value)
        self.value, self.gradient, self.hessian = jax.jit(value), jax.jit(gradient), jax.jit(jax.hessian(value))
        self.product = jax.jit(lambda theta, u: along(gradient, u)(theta))
        self.third = jax.jit(lambda theta, u: along(along(along(gradient, u), u), u)(theta))

    def difference(self, theta: jax.Array, u: jax.Array, step: float) -> Array:
        """The central difference of the gradient along u, in the dtype of theta."""
        e = jnp.asarray(step, theta.dtype)
        forward, back = (np.asarray(self.gradient(theta + s * u), np.float64) for s in (e, -e))
        return (forward - back) / (2 * step)


def study(options: Options) -> Study:
    """All three theorems."""
    if options.probes < 2 or options.examples < 2 or not options.lanczos or min(options.lanczos) < 2:
        raise InputError("--probes, --examples and --lanczos must be at least 2.")
    with jax.enable_x64(True):
        classifier = Classifier("network", 8, 2)
        data, _ = classifier.images(options.images, options.seed, options.examples, 0)
        start, unravel = jax.flatten_util.ravel_pytree(classifier.initial(options.seed))
        trained = retrained(classifier, data, data, options.penalty, options.seed, np.arange(1))
        points = {RANDOM: start, MINIMUM: jax.flatten_util.ravel_pytree(trained.params)[0]}
        loss = Loss(unravel, data, options.penalty)
        random = np.random.default_rng(options.seed)
        directions = [jnp.asarray(x / np.linalg.norm(x)) for x in random.normal(size=(options.probes, len(start)))]
        found = {name: at_point(loss, theta, directions) for name, theta in points.items()}
        step = float(np.median(found[RANDOM].best))
        ritz = [ritz_errors(loss, points[RANDOM], directions, m, step) for m in options.lanczos]
        small = 2.0**-10
        scaled = ritz_errors(
            Loss(unravel, data, options.penalty, small), points[RANDOM], directions, options.lanczos[-1], step
        )
    power = math.log((scaled.error / scaled.bound) / (ritz[-1].error / ritz[-1].bound)) / math.log(small)
    model = f"network, {len(start)} parameters, {options.examples} images"
    return Study(
        "Theorems on finite differences beside what they bound",
        tuple(claims(found, ritz, power, model)),
        (check_table(checks(found, ritz)), point_table(found), ritz_table(ritz)),
        (picture(NAME, figure(found, ritz), NOTE),),
        {
            "points": {
                name: {k: np.asarray(x).tolist() for k, x in at._asdict().items()} for name, at in found.items()
            },
            "ritz": [row._asdict() for row in ritz],
            "power_of_the_loss": power,
            "checks": {what: value for what, _, value, _ in checks(found, ritz)},
        },
    )


def at_point(loss: Loss, theta: jax.Array, directions: list[jax.Array]) -> AtPoint:
    """Errors of differences at theta along every direction."""
    gradient = float(jnp.linalg.norm(loss.gradient(theta)))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    narrow_theta = theta.astype("float32")
    rows: list[tuple] = []
    for u in directions:
        product = np.asarray(loss.product(theta, u))
        # In float32 the parameters are rounded; the exact product is that at the rounded ones.
        here = np.asarray(loss.product(narrow_theta.astype("float64"), u.astype("float32").astype("float64")))
        wide = [np.linalg.norm(loss.difference(theta, u, e) - product) for e in STEPS]
        narrow = [np.linalg.norm(loss.difference(narrow_theta, u.astype("float32"), e) - here) for e in STEPS]
        third = [
            max(float(jnp.linalg.norm(loss.third(theta + s * e * u, u))) for s in np.linspace(-1, 1, 9)) for e in STEPS
        ]
        step = 0.1
        average = sum(
            w / 2 * np.asarray(loss.product(theta + x * step * u, u)) for x, w in zip(nodes, weights, strict=True)
        )
        found = loss.difference(theta, u, step)
        averaged = np.linalg.norm(found - average) / np.linalg.norm(found - product)
        at_theta = float(jnp.linalg.norm(loss.third(theta, u)))
        predicted = (2.0**-24 * gradient / at_theta) ** (1 / 3)
        rows.append(
            (at_theta, wide, narrow, STEPS**2 / 6 * np.array(third), averaged, STEPS[np.argmin(narrow)], predicted)
        )
    return AtPoint(gradient, *(np.array(x) for x in zip(*rows, strict=True)))


def ritz_errors(loss: Loss, theta: jax.Array, directions: list[jax.Array], steps: int, step: float) -> RitzErrors:
    """Lanczos with differences of float32 gradients, re-orthogonalised in full in float64."""
    narrow = theta.astype("float32")
    exact = np.asarray(loss.hessian(narrow.astype("float64")))
    basis, alphas, betas, errors = [np.asarray(directions[0])], [], [], []
    for _ in range(steps):
        q = basis[-1].astype(np.float32)
        w = loss.difference(narrow, jnp.asarray(q), step)
        errors.append(np.linalg.norm(w - exact @ basis[-1]))
        alphas.append(w @ basis[-1])
        for _ in range(2):
            w = w - np.array(basis).T @ (np.array(basis) @ w)
        betas.append(np.linalg.norm(w))
        if betas[-1] <= 1e-12 * abs(alphas[0]):
            break  # the space is invariant
        basis.append(w / betas[-1])
    q = np.array(basis[: len(alphas)])
    ritz = np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
    error = float(np.abs(ritz - np.linalg.eigvalsh(q @ exact @ q.T)).max())
    # A fourth derivative of the loss along u is one of the gradient's third; the largest seen is at most the norm.
    leading = jnp.asarray(np.linalg.eigh(exact)[1][:, -1])
    fourth = max(float(jnp.linalg.norm(loss.third(theta, u))) for u in (*directions, leading))
    noise = 2.0**-24 * float(loss.value(theta))
    bound = np.linalg.norm(exact, 2) ** 2 * math.sqrt(noise * fourth * steps)
    return RitzErrors(steps, error, float(max(errors)), float(bound))


def claims(found: dict[str, AtPoint], ritz: list[RitzErrors], power: float, model: str) -> Iterator[Claim]:
    """What the summary has of the theorems, as far as it could be otherwise."""
    for name, at in found.items():
        value, error = over_seeds(np.abs(np.log10(at.best / at.predicted)))
        yield Claim(FOUNDATION, "Theorem 3.1; Mechanism 1, break condition",
                    f"The best step is the cube root of u |grad L| / |D^3 f|, up to a factor, at {name}.",
                    "ε* ∝ (ε_mach ‖∇L‖ / ‖D³f‖)^(1/3)", "factors of ten from the best step in float32 to it, D^3 of "
                    "the gradient", (None, NEAR), value, max(error, 0.125), model)  # fmt: skip
    last = ritz[-1]
    yield Claim(FOUNDATION, "Theorem 4.1; Mechanism 2", "The bound of Theorem 4.1 covers the errors of Ritz values.",
                "‖H‖² σ_f^(1/2) ‖D⁴f‖^(1/2) √(m η̄_P)", "error over the bound with σ_f = u L and η̄_P = 1",
                (None, 1), last.error / last.bound, 0.0, model,
                "the copy at hand does not say what σ_f and η̄_P are")  # fmt: skip
    yield Claim(FOUNDATION, "Theorem 4.1; Mechanism 2", "As the summary prints it, and with an η̄_P that is a number, "
                "the bound has the units of an eigenvalue.", "‖H‖² σ_f^(1/2) ‖D⁴f‖^(1/2) √(m η̄_P)",
                "power of the loss's unit with which error over bound changes", (-0.1, 0.1), power, 0.05,
                model)  # fmt: skip


def checks(found: dict[str, AtPoint], ritz: list[RitzErrors]) -> list[tuple[str, str, float, float]]:
    """What is true of any loss, by other theorems: whether the code computes it. (what, by which, measured, limit)."""
    rows = []
    for name, at in found.items():
        # At the smallest steps all is rounding, which goes as 1 / step: steps at which it is below a hundredth count.
        clear = at.bound > 100 * np.median(at.wide[:, :3] * STEPS[:3]) / STEPS
        what = f"3.1: largest error of a difference over step^2 / 6 sup |D^4 f|, at {name}"
        rows.append((what, "Taylor", float((at.wide / at.bound)[clear].max()), 1.01))
    value = float(max(at.averaged.max() for at in found.values()))
    what = "3.3: difference less the average of the Hessians along it, relative to its bias"
    rows.append((what, "fundamental theorem of calculus", value, 1e-6))
    worst = max(row.error / (math.sqrt(row.steps) * row.product) for row in ritz)
    what = "4.1, the factor sqrt(m): largest error of a Ritz value over sqrt(m) times that of a product"
    return [*rows, (what, "Weyl", worst, 1.0)]


def check_table(rows: list[tuple[str, str, float, float]]) -> Table:
    """Whether every check of the code is passed."""
    cells = [
        (what, by, f"{value:.2g}", f"{limit:g}", "yes" if value <= limit else "NO") for what, by, value, limit in rows
    ]
    return Table(("theorem and quantity", "true by", "measured", "limit", "passed"), cells, "Checks of the code")


def point_table(found: dict[str, AtPoint]) -> Table:
    """Theorem 3.1 at every point."""
    rows = []
    for name, at in found.items():
        cells = (at.gradient, *(float(np.median(x)) for x in (at.third, at.best, at.predicted)))
        relative = float(np.median(at.narrow.min(1)))
        rows.append((name, *(f"{x:.1e}" for x in (*cells, relative, float(np.median(at.averaged))))))
    head = ("at", "|gradient|", "|D^4 f u u u|", "best step", "predicted", "error there", "difference less average")
    return Table(head, rows, "Products by differences in float32, medians over directions")


def ritz_table(ritz: list[RitzErrors]) -> Table:
    """Theorem 4.1 against the number of steps."""
    rows = [
        (str(r.steps), *(f"{x:.1e}" for x in (r.error, r.product, math.sqrt(r.steps) * r.product, r.bound)))
        for r in ritz
    ]
    head = ("Lanczos steps", "error of Ritz values", "of a product", "times sqrt(m)", "summary's bound, η = 1")
    return Table(head, rows, "Ritz values with differences in float32, at random weights")


def figure(found: dict[str, AtPoint], ritz: list[RitzErrors]) -> Figure:
    """Errors against the step, and of Ritz values against the number of steps."""
    drawn = Figure(figsize=(12, 4.8), dpi=120, layout="constrained", facecolor="white")
    left, right = drawn.subplots(1, 2)
    for name, at in found.items():
        color = COLORS[name]
        left.loglog(STEPS, np.median(at.wide, 0), color=color, label=f"{name}, float64")
        left.loglog(STEPS, np.median(at.narrow, 0), "--", color=color, label=f"{name}, float32")
        left.loglog(STEPS, np.median(at.bound, 0), ":", color=color, label=f"{name}, bound of truncation")
        left.axvline(float(np.median(at.predicted)), color=color, linewidth=0.8)
    left.set(xlabel="length of the shift along a unit vector", ylabel="|difference − H u|")
    left.set_ylim(bottom=1e-13)
    steps = [row.steps for row in ritz]
    right.loglog(steps, [row.error for row in ritz], "o-", color="#000000", label="largest error of a Ritz value")
    bounds = [math.sqrt(row.steps) * row.product for row in ritz]
    right.loglog(steps, bounds, "s--", color="#009E73", label="√m × largest error of a product")
    right.loglog(steps, [row.bound for row in ritz], "^:", color="#CC79A7", label="summary's bound with η̄ = 1")
    right.set_xticks(steps, [str(m) for m in steps])
    right.minorticks_off()
    right.set(xlabel="Lanczos steps m", ylabel="error")
    for panel in (left, right):
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
