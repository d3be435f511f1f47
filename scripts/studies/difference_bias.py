"""Does the bias of finite differences matter? Exact products, differences, Gauss-Newton and blocks in three uses.

    python -m scripts.studies.difference_bias

With no options: linear systems with the Hessian of the small model in scripts/tiny; influence of handwritten digits on
two small classifiers against retraining without them; truncated Newton steps of a small decoder against Adam. What
would refute that the bias does not matter at a step: a solution further than a tenth from the exact one, a rank
correlation with retraining that is lower by more than a twentieth, or Newton steps that miss more than a twentieth of
what steps with exact products learn. These limits were set before the first measurement. Programs are compiled with few
optimisations: seconds compare with each other only.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy.stats import spearmanr

import jaxhess
from jaxhess.command import compile_quickly
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from scripts.studies.bias import curvatures as kinds
from scripts.studies.bias.curvatures import AUTOMATIC, BLOCKS, EXACT, GAUSS_NEWTON, PAPER, curvatures, fixed, narrow
from scripts.studies.bias.retraining import Classifier, Retrained, logits, losses, retrained
from scripts.studies.bias.solves import Systems, solve_all
from scripts.studies.harness import FOUNDATION, TINY, ModelOptions, command, picture
from scripts.training.images import Source
from scripts.training.newton import NewtonRun, newton_run
from scripts.training.short_runs import adam, check_runs, mean_loss, missed, over_seeds, sweep
from scripts.training.small_decoder import byte_batch, byte_config, decoder_problem

Array = npt.NDArray[np.float64]
T = TypeVar("T")

NAME = "difference_bias"
SOLUTION, RANKS, LEARNT = 0.1, 0.05, 0.05
"""Relative error of a solution, loss of rank correlation, and share of learning missed up to which a bias is small."""
CONVEX, NETWORK = Classifier("softmax regression", None, 1), Classifier("network", 8, 2)
COLORS = {
    EXACT: "#000000", AUTOMATIC: "#0072B2", fixed(PAPER[0]): "#56B4E9", fixed(PAPER[1]): "#009E73",
    GAUSS_NEWTON: "#D55E00", BLOCKS: "#CC79A7",
}  # fmt: skip
NOTE = """Left: error of solutions, by damping in |smallest Ritz value|; filled float32, hollow bfloat16; shaded: what
counts as small. Middle: rank correlation of predicted and actual changes of a test image's loss when a training image
is left out, mean over seeds with its 95% interval. Right: training loss against what was spent, in gradients; lines are
means over seeds of truncated Newton steps, crosses are Adam's ends after so many gradients."""


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The model and text of the linear systems, the classifiers, and the decoder that is trained."""

    seq_len: int = 32
    """Predicted tokens per sequence."""
    dampings: tuple[float, ...] = (1.2, 20.0)
    """Of the linear systems, in |smallest Ritz value| of the Hessian; above 1."""
    reference: Literal["float64", "float32"] = "float64"
    """Precision of the linear systems that errors are measured against."""
    solve_steps: int = 60
    """Products of a linear system at most."""
    low_precision: bool = True
    """Also in bfloat16."""
    only: tuple[str, ...] = ()
    """Names of curvatures, as in the tables, beside exact products; by default all."""
    images: Source = "digits"
    """Handwritten digits of scikit-learn, or random images that need no other package."""
    seeds: int = 5
    """Draws of images with their initial weights; errors are over these."""
    examples: int = 150
    """Images to train on."""
    left_out: int = 60
    """Of these, how many are left out, one at a time."""
    tests: int = 3
    """Test images, those of largest loss among 100, whose loss is predicted."""
    penalty: float = 0.01
    """Coefficient of |parameters|^2 / 2 in the classifiers' objective, which is also the damping."""
    text: Path = TINY / "sample.txt"
    """Text whose bytes the decoder predicts."""
    train_sequences: int = 64
    """Sequences of 32 bytes, all of them in every step."""
    newton_seeds: int = 3
    """Initial weights of the decoder."""
    newton_steps: int = 16
    """Newton steps."""
    newton_products: int = 10
    """Products of a Newton step's solve at most."""
    adam_rates: tuple[float, ...] = (1e-2, 3e-2, 0.1)
    """Learning rates of Adam; the best one counts."""

    def chosen(self, found: dict[str, T]) -> dict[str, T]:
        """Those that were asked for, and exact products."""
        return {name: x for name, x in found.items() if not self.only or name in (EXACT, *self.only)}

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        if unknown := set(self.only) - set(kinds.NAMES):
            raise InputError(f"--only {', '.join(sorted(unknown))}: there are {'; '.join(kinds.NAMES)}.")
        check_runs(min(self.seeds, self.newton_seeds), self.newton_steps, self.adam_rates)
        if not self.dampings or min(self.dampings) <= 1:
            raise InputError(f"--dampings {self.dampings}: each must be above 1, for a positive definite matrix.")
        if not 5 <= self.left_out <= self.examples:
            raise InputError(f"--left-out {self.left_out}: from 5 to the {self.examples} examples.")
        if not 1 <= self.tests <= 100 or not self.penalty > 0 or min(self.solve_steps, self.newton_products) < 1:
            raise InputError("--tests is from 1 to 100, --penalty positive, steps and products at least 1.")


SMALL = Options(
    seq_len=8, mesh="fsdp=1", solve_steps=15, dampings=(4.0,), reference="float32", low_precision=False,
    images="prototypes", seeds=2, examples=40, left_out=12, tests=1, train_sequences=8, newton_seeds=2,
    newton_steps=10, newton_products=4,
    adam_rates=(3e-2,), only=(fixed(PAPER[0]),),
)  # fmt: skip


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
    """[seeds] losses of Adam at its best rate after so many steps."""

    steps: int
    losses: Array


class Trained(NamedTuple):
    """Newton steps of every curvature, a run for each seed, and Adam.

    Attributes:
        runs: By curvature.
        initial: [seeds] losses.
        adam: Adam's losses after as many "steps", "gradients" and processor "seconds" as Newton steps with exact
            products took.
        seconds: Processor seconds of a gradient in Adam.
    """

    runs: dict[str, list[NewtonRun]]
    initial: Array
    adam: dict[str, Ends]
    seconds: float


def study(options: Options) -> Study:
    """The three uses."""
    options.check()
    with jax.enable_x64(True):
        systems, model = linear_systems(options)
        ranks = {classifier.name: influences(classifier, options) for classifier in (CONVEX, NETWORK)}
    trained, decoder = newton(options)
    return Study(
        "Does the bias of finite differences matter?",
        (*solve_claims(systems, model, options), *rank_claims(ranks, options), *newton_claims(trained, decoder)),
        (solve_table(systems), rank_table(ranks), newton_table(trained)),
        (picture(NAME, figure(systems, ranks, trained), NOTE),),
        {
            "smallest_ritz_value": systems.smallest,
            "largest_ritz_value": systems.largest,
            "solves": [solve._asdict() for solve in systems.solves],
            "rank_correlations": {name: {k: x.tolist() for k, x in r.rho.items()} for name, r in ranks.items()},
            "retrained_from_the_start": {name: r.again.tolist() for name, r in ranks.items()},
            "refused": {name: r.refused for name, r in ranks.items()},
            "unreached": {name: r.unreached for name, r in ranks.items()},
            "newton_losses": {name: [run.losses.tolist() for run in runs] for name, runs in trained.runs.items()},
            "newton_products": {name: [run.products.tolist() for run in runs] for name, runs in trained.runs.items()},
            "adam": {what: {"steps": x.steps, "losses": x.losses.tolist()} for what, x in trained.adam.items()},
            "gradient_seconds": trained.seconds,
        },
    )


def linear_systems(options: Options) -> tuple[Systems, str]:
    """Solves on the model, with blocks by layer; and what it was."""
    exact = options.hessian(options.blocks(), "float32")
    blocks = jaxhess.Blocks.by(exact, "layers")
    found = options.chosen(curvatures(exact, blocks, options.low_precision))
    numbers = (options.dampings, 1e-3, options.solve_steps, options.seed)
    return solve_all(exact, found, *numbers, options.reference), options.described(exact)


LOSS = jaxhess.SoftmaxCrossEntropy(logits)


def influences(classifier: Classifier, options: Options) -> Ranks:
    """Rank correlations with retraining."""
    rows = np.arange(options.left_out)
    rho: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}
    refused: dict[str, int] = {}
    again, unreached = [], 0
    for seed in range(options.seeds):
        train, test = classifier.images(options.images, seed, options.examples, 100)
        warm = retrained(classifier, train, test, options.penalty, seed, rows)
        hard = np.argsort(-np.asarray(losses(warm.params, test)))[: options.tests]
        unreached += int(np.isnan(warm.changes[:, 0]).sum())
        params = jax.tree.map(lambda x: x.astype("float32"), warm.params)
        exact = jaxhess.Hessian(LOSS, params, [_single(train)])
        found = curvatures(exact, jaxhess.Blocks.by(exact, "matrices"), options.low_precision)
        for name, curvature in options.chosen(found).items():
            scores, taken = _scores(exact, curvature, test, hard, options.penalty)
            rho.setdefault(name, []).append(rank_correlation(scores[:, rows], warm, hard))
            steps.setdefault(name, []).extend(taken)
            refused[name] = refused.get(name, 0) + len(hard) - len(taken)
            if name == EXACT and classifier.hidden is not None:
                cold = retrained(classifier, train, test, options.penalty, seed, rows, again=True)
                again.append(rank_correlation(scores[:, rows], cold, hard))
    means = {name: float(np.mean(x)) if x else math.nan for name, x in steps.items()}
    return Ranks({k: np.array(x) for k, x in rho.items()}, refused, means, np.array(again), unreached)


def _single(data: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return data[0].astype("float32"), data[1]


def _scores(
    exact: jaxhess.Hessian, curvature: jaxhess.LinearOperator, test: Any, numbers: npt.NDArray[np.int64], damping: float
) -> tuple[Array, list[int]]:
    """[tests, examples] predicted changes, NaN where the solve was refused; and the products of each solve."""
    inputs, labels = _single(test)
    scores, steps = [], []
    for k in numbers:
        try:
            with warnings.catch_warnings():  # of parameters that a step does not move, and of solves that stall
                warnings.simplefilter("ignore")
                found = jaxhess.influence(
                    exact, [(inputs[k : k + 1], labels[k : k + 1])], curvature=curvature, damping=damping
                )
            scores.append(found.scores)
            steps.append(len(found.solution.history) - 1)
        except InputError:
            scores.append(np.full(len(exact.batches[0].stacked[1][0]), math.nan))
    return np.array(scores), steps


def rank_correlation(scores: Array, actual: Retrained, numbers: npt.NDArray[np.int64]) -> float:
    """Mean over test images of Spearman's rho between predicted changes [tests, rows] and actual ones, over the rows
    whose minimum was reached; 0 for a test image without scores."""
    reached = ~np.isnan(actual.changes[:, 0])
    pairs = zip(scores, numbers, strict=True)
    found = [
        spearmanr(row[reached], actual.changes[reached, k]).statistic if np.isfinite(row).all() else 0.0
        for row, k in pairs
    ]
    return float(np.mean(found))


def newton(options: Options) -> tuple[Trained, str]:
    """Newton steps with every curvature, and Adam with as many gradients; and what was trained.

    Without the biases of queries and keys: the latter have no gradient but rounding, and their size misleads the
    automatic step.
    """
    config = dataclasses.replace(byte_config(16, 1, 2, 32), qkv_bias=False)
    problem = decoder_problem(config, byte_batch(options.text, 32, options.train_sequences), None)
    seeds = range(options.newton_seeds)
    starts = [jaxhess.Hessian(problem.loss, problem.initial(seed), [problem.data]) for seed in seeds]
    initial = np.array([mean_loss(problem, start.params) for start in starts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = {
            name: [newton_run(start, rule, options.newton_steps, options.newton_products) for start in starts]
            for name, rule in options.chosen(rules(options.low_precision)).items()
        }
    spent = float(np.mean([run.cost(kinds.gradients_per_product(EXACT, 0))[-1] for run in runs[EXACT]]))
    seconds = gradient_seconds(starts[0])
    budgets = {
        "steps": options.newton_steps,
        "gradients": max(10, round(spent)),
        "seconds": max(10, round(float(np.mean([run.seconds_without_first for run in runs[EXACT]])) / seconds)),
    }
    ends = {}
    for what, budget in budgets.items():
        found = sweep(problem, adam, options.adam_rates, seeds, budget)
        ends[what] = Ends(budget, found.losses[found.best])
    return Trained(runs, initial, ends, seconds), f"decoder of bytes, {starts[0].dim:,} parameters"


def gradient_seconds(operator: jaxhess.Hessian, times: int = 20) -> float:
    """Processor seconds of one gradient, once compiled."""
    gradient = jax.jit(type(operator).value_and_gradient)
    jax.block_until_ready(gradient(operator))
    began = time.process_time()
    for _ in range(times):
        jax.block_until_ready(gradient(operator))
    return (time.process_time() - began) / times


def rules(low_precision: bool) -> dict[str, Callable[[jaxhess.Hessian], jaxhess.LinearOperator]]:
    """From the Hessian at a point to the curvature of a Newton step."""

    def gauss_newton(exact: jaxhess.Hessian) -> jaxhess.GaussNewton:
        return jaxhess.GaussNewton(exact.loss, exact.params, exact.batches)

    def step(size: float | str, dtype: str | None = None) -> Callable[[jaxhess.Hessian], jaxhess.LinearOperator]:
        return lambda exact: kinds.differences(exact if dtype is None else exact.in_dtype(dtype), size)

    found: dict[str, Callable[[jaxhess.Hessian], jaxhess.LinearOperator]] = {EXACT: lambda exact: exact}
    found |= {AUTOMATIC: step("auto"), GAUSS_NEWTON: gauss_newton}
    found |= {fixed(size): step(size) for size in PAPER}
    if low_precision:
        found |= {narrow(fixed(size)): step(size, kinds.NARROW) for size in PAPER}
    return found


QUESTION, MECHANISM, CHECK = "Open Question 3", "Mechanism 1, core assumption", "Next Checks, Validation Check"
BIAS_IS_SMALL = "The bias of a finite difference is acceptable at the chosen step, here"


def _steps(low_precision: bool) -> Iterator[tuple[str, str]]:
    """Names of differences, and the step in words."""
    for dtype in ("float32", kinds.NARROW) if low_precision else ("float32",):
        for step in ("automatic", *PAPER) if dtype == "float32" else PAPER:
            name = AUTOMATIC if step == "automatic" else fixed(float(step))
            words = "the automatic one" if step == "automatic" else f"{step:g}"
            yield (name if dtype == "float32" else narrow(name)), f"{words} ({dtype})"


def solve_claims(systems: Systems, model: str, options: Options) -> Iterator[Claim]:
    """Of solutions, at the smallest damping. The error: that of exact products with the same tolerance."""
    least = min(options.dampings)
    at = {solve.name: solve for solve in systems.solves if solve.damping == least}
    quantity = f"relative error of the solution, damping {least:g} times |smallest Ritz value|,"
    for name, words in _steps(options.low_precision):
        if name not in at:
            continue
        found = at[name]
        yield Claim(FOUNDATION, f"{MECHANISM}; {QUESTION}", f"{BIAS_IS_SMALL} {words}, in CG solves.",
                    "uncharacterized", f"{quantity} {name}", (None, SOLUTION), _finite(found.error), at[EXACT].error,
                    model, found.ended if found.ended.startswith("refused") else "")  # fmt: skip
    if BLOCKS in at:
        yield Claim(FOUNDATION, "Mechanism 3", "Blocks of the Hessian fail in CG solves.", "fail catastrophically",
                    f"{quantity} {BLOCKS}", (SOLUTION, None), _finite(at[BLOCKS].error), at[EXACT].error,
                    model)  # fmt: skip


def rank_claims(ranks: dict[str, Ranks], options: Options) -> Iterator[Claim]:
    """Of influence: how much of the rank correlation of exact products is lost."""
    for classifier, found in ranks.items():
        model = f"{classifier}, {options.examples} images, {options.seeds} seeds"
        quantity = "Spearman's rho with retraining: exact less"
        for name, words in _steps(options.low_precision):
            if name not in found.rho:
                continue
            value, error = over_seeds(found.rho[EXACT] - found.rho[name])
            yield Claim(FOUNDATION, f"{MECHANISM}; {QUESTION}", f"{BIAS_IS_SMALL} {words}, in influence.",
                        "uncharacterized", f"{quantity} {name}{_refused(found, name)}", (None, RANKS), value, error,
                        model)  # fmt: skip
        if BLOCKS in found.rho:
            value, error = over_seeds(found.rho[EXACT] - found.rho[BLOCKS])
            yield Claim(FOUNDATION, f"Mechanism 3; {CHECK} 3", "Blocks invalidate influence-function approximations.",
                        "invalidating", f"{quantity} {BLOCKS}", (RANKS, None), value, error, model)  # fmt: skip


def _refused(found: Ranks, name: str) -> str:
    count = found.refused[name]
    return f" ({count} solves refused, which count as rho = 0)" if count else ""


def newton_claims(trained: Trained, decoder: str) -> Iterator[Claim]:
    """Of Newton steps: what is missed of the learning with exact products, and beside Adam."""
    ends = {name: np.array([run.losses[-1] for run in runs]) for name, runs in trained.runs.items()}
    steps = len(trained.runs[EXACT][0].dampings)
    model = f"{decoder}, {steps} Newton steps"
    quantity = "share of the loss reduction with exact products that is missed;"
    for name, words in _steps(True):
        if name in ends:
            value, error = over_seeds(missed(ends[name], ends[EXACT], trained.initial))
            yield Claim(FOUNDATION, f"{MECHANISM}; {QUESTION}", f"{BIAS_IS_SMALL} {words}, in Newton steps.",
                        "uncharacterized", f"{quantity} {name}", (None, LEARNT), value, error, model)  # fmt: skip
    for what, adams in trained.adam.items():
        for name in (EXACT, GAUSS_NEWTON) if GAUSS_NEWTON in ends else (EXACT,):
            value, error = over_seeds(adams.losses - ends[name])
            yield Claim(FOUNDATION, f"{CHECK} 2", f"Newton steps with {name} products learn more than Adam in as many "
                        f"{what}.", "to be compared", f"loss of Adam after {adams.steps} steps, less that of Newton "
                        "steps", (0, None), value, error, model)  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def solve_table(systems: Systems) -> Table:
    """Every solve."""
    rows = [
        (s.name, f"{s.damping:g}", str(s.steps), *(f"{x:.1e}" for x in (s.claimed, s.residual, s.error)), s.ended)
        for s in systems.solves
    ]
    head = ("products", "damping", "steps", "its own residual", "exact residual", "error of x", "ended")
    return Table(head, rows, f"CG solves; damping in |smallest Ritz value| = {abs(systems.smallest):.3g}")


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
        rows.append((name, f"{value:.3f} ± {error:.1g}", f"{cost:.0f}", f"{seconds:.2f}", f"{refused:.1f}"))
    for what, ends in trained.adam.items():
        value, error = over_seeds(ends.losses)
        rows.append(
            (f"Adam, as many {what}", f"{value:.3f} ± {error:.1g}", str(ends.steps), f"{trained.seconds:.3f}", "")
        )
    head = ("steps with", "training loss", "gradients spent", "processor seconds per step", "steps refused")
    value, error = over_seeds(trained.initial)
    return Table(head, rows, f"Training; before: {value:.3f} ± {error:.1g}")


def figure(systems: Systems, ranks: dict[str, Ranks], trained: Trained) -> Figure:
    """Errors of solutions, rank correlations, losses."""
    drawn = Figure(figsize=(16, 5.6), dpi=120, layout="constrained", facecolor="white")
    left, middle, right = drawn.subplots(1, 3)
    dampings = sorted({solve.damping for solve in systems.solves})
    for name in dict.fromkeys(solve.name for solve in systems.solves):
        color, fill, label = _style(name)
        errors = [next(s.error for s in systems.solves if (s.name, s.damping) == (name, d)) for d in dampings]
        left.plot(dampings, errors, "o-" if fill else "o--", color=color, mfc=color if fill else "white", label=label)
    left.axhspan(1e-7, SOLUTION, color="#f2e8cf", zorder=0)
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


def main() -> None:
    """Reads the options and runs; most of the time would go into the compiler's optimisations."""
    compile_quickly()
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
