"""Does the bias of finite differences matter? Exact products, differences, Gauss-Newton and blocks in three uses.

    python -m scripts.studies.difference_bias

With no options: linear systems with the Hessian of the small model in scripts/tiny; influence of handwritten digits on
two small classifiers against retraining without them; truncated Newton steps of a small decoder against Adam. What
would refute that the bias does not matter at a step: a solution further than a tenth from the exact one, a rank
correlation with retraining that is lower by more than a twentieth, or Newton steps that miss more than a twentieth of
what steps with exact products learn. These limits were set before the first measurement. Programs are compiled with few
optimisations, and seconds are those of the clock: they compare with each other only, on a machine that is quiet.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

import jaxhess
from jaxhess.command import compile_quickly
from jaxhess.errors import InputError
from jaxhess.results.study import Claim, Study
from scripts.studies.bias import curvatures as kinds
from scripts.studies.bias.curvatures import AUTOMATIC, BLOCKS, EXACT, GAUSS_NEWTON, PAPER, curvatures, fixed, narrow
from scripts.studies.bias.findings import (
    NOTE,
    SMALL_ERROR,
    Ends,
    Ranks,
    Trained,
    figure,
    newton_table,
    rank_table,
    solve_table,
)
from scripts.studies.bias.retraining import Classifier, Retrained, logits, losses, retrained
from scripts.studies.bias.solves import Systems, gradients, solve_all
from scripts.studies.harness import FOUNDATION, TINY, ModelOptions, command, make_mesh, picture
from scripts.training.images import Source
from scripts.training.newton import newton_run
from scripts.training.short_runs import adam, check_runs, mean_loss, missed, over_seeds, sweep
from scripts.training.small_decoder import byte_batch, byte_config, decoder_problem

Array = npt.NDArray[np.float64]
T = TypeVar("T")

NAME = "difference_bias"
SOLUTION, RANKS, LEARNT = SMALL_ERROR, 0.05, 0.05
"""Relative error of a solution, loss of rank correlation, and share of learning missed up to which a bias is small."""
OTHER_SEEDS = 2
"""On which learning rates and dampings are chosen, none of which is among those that are reported."""
CONVEX, NETWORK = Classifier("softmax regression", None, 1), Classifier("network", 8, 2)


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """The model and text of the linear systems, the classifiers, and the decoder that is trained."""

    seq_len: int = 32
    """Predicted tokens per sequence."""
    dampings: tuple[float, ...] = (1.2, 20.0)
    """Of the linear systems, in |smallest Ritz value| of the Hessian; above 1."""
    reference: Literal["float64", "float32"] = "float64"
    """Precision of the linear systems that errors are measured against."""
    right_sides: int = 3
    """Of the linear systems: gradients of as many sequences after those of the Hessian; errors are over these."""
    solve_steps: int = 60
    """Products of a linear system at most."""
    low_precision: bool = True
    """Also in bfloat16."""
    only: tuple[str, ...] = ()
    """Names of curvatures, as in the tables, beside exact products; by default all."""
    images: Source = "digits"
    """Handwritten digits of scikit-learn, or random images that need no other package."""
    seeds: int = 4
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
    newton_dampings: tuple[float, ...] = (1.0, 10.0)
    """Of the first Newton step; they then adapt. The best is chosen on other seeds: with exact products for them and
    those that approximate them, and with Gauss-Newton matrices for these."""
    newton_steps: int = 12
    """Newton steps."""
    newton_products: int = 10
    """Products of a Newton step's solve at most."""
    adam_rates: tuple[float, ...] = (1e-2, 3e-2, 0.1)
    """Learning rates of Adam, of which the best is chosen on other seeds."""

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
        if self.right_sides < 2 or not self.newton_dampings or min(self.newton_dampings) <= 0:
            raise InputError("--right-sides is at least 2, for an error over them; --newton-dampings are positive.")
        if not 5 <= self.left_out <= self.examples:
            raise InputError(f"--left-out {self.left_out}: from 5 to the {self.examples} examples.")
        if not 1 <= self.tests <= 100 or not self.penalty > 0 or min(self.solve_steps, self.newton_products) < 1:
            raise InputError("--tests is from 1 to 100, --penalty positive, steps and products at least 1.")


SMALL = Options(
    seq_len=8, mesh="fsdp=1", right_sides=2, solve_steps=15, dampings=(4.0,), reference="float32", low_precision=False,
    images="prototypes", seeds=2, examples=40, left_out=12, tests=1, train_sequences=8, newton_seeds=2,
    newton_dampings=(1.0,), newton_steps=10, newton_products=4, adam_rates=(3e-2,), only=(fixed(PAPER[0]),),
)  # fmt: skip


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
            "adam": {what: x._asdict() | {"losses": x.losses.tolist()} for what, x in trained.adam.items()},
            "newton_dampings": trained.dampings,
        },
    )


def linear_systems(options: Options) -> tuple[Systems, str]:
    """Solves on the model, with blocks by layer; and what it was."""
    more = dataclasses.replace(options, sequences=options.sequences + options.right_sides).blocks()
    cuts = (slice(options.sequences), *(slice(k, k + 1) for k in range(options.sequences, more.num_sequences)))
    mine, *others = (dataclasses.replace(more, tokens=more.tokens[cut], weights=more.weights[cut]) for cut in cuts)
    exact = options.hessian(mine, "float32")
    mesh = make_mesh(options.mesh)
    sides = gradients(exact, [blocks.microbatches(1, mesh) for blocks in others], options.reference)
    found = options.chosen(curvatures(exact, jaxhess.Blocks.by(exact, "layers"), options.low_precision))
    numbers = (options.dampings, 1e-3, options.solve_steps, options.seed)
    return solve_all(exact, found, sides, *numbers, options.reference), options.described(exact)


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
    others = range(options.newton_seeds, options.newton_seeds + OTHER_SEEDS)
    starts, elsewhere = (
        [jaxhess.Hessian(problem.loss, problem.initial(seed), [problem.data]) for seed in x] for x in (seeds, others)
    )
    initial = np.array([mean_loss(problem, start.params) for start in starts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = options.chosen(kinds.rules(options.low_precision))
        dampings = {
            name: best_damping(elsewhere, chosen[name], options) for name in (EXACT, GAUSS_NEWTON) if name in chosen
        }
        runs = {
            name: [newton_run(start, rule, *_sizes(options), dampings.get(name, dampings[EXACT])) for start in starts]
            for name, rule in chosen.items()
        }
    spent = float(np.mean([run.cost(kinds.gradients_per_product(EXACT, 0))[-1] for run in runs[EXACT]]))

    def with_adam(budget: int) -> Ends:
        best = sweep(problem, adam, options.adam_rates, others, budget)
        rate = best.rates[best.best]
        began = time.perf_counter()  # compiled by the line above
        found = sweep(problem, adam, (rate,), seeds, budget)
        seconds = (time.perf_counter() - began) / (budget * len(seeds))
        return Ends(budget, found.losses[0], rate, best.at_an_end, seconds)

    ends = {"steps": with_adam(options.newton_steps), "gradients": with_adam(max(10, round(spent)))}
    seconds = float(np.mean([run.seconds_without_first for run in runs[EXACT]]))
    ends["seconds"] = with_adam(max(10, round(seconds / ends["gradients"].seconds)))
    return Trained(runs, initial, ends, dampings), f"decoder of bytes, {starts[0].dim:,} parameters"


def _sizes(options: Options) -> tuple[int, int]:
    return options.newton_steps, options.newton_products


def best_damping(
    starts: list[jaxhess.Hessian], rule: Callable[[jaxhess.Hessian], jaxhess.LinearOperator], options: Options
) -> float:
    """Of the first Newton step: the one that ends with the least loss, mean over the starts."""
    if len(options.newton_dampings) == 1:
        return options.newton_dampings[0]

    def end(damping: float) -> float:
        return float(np.mean([newton_run(start, rule, *_sizes(options), damping).losses[-1] for start in starts]))

    return min(options.newton_dampings, key=end)


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
    """Of solutions, at the smallest damping, over right-hand sides; to the error comes that of exact products with the
    same tolerance. A solve that failed leaves x = 0, whose error is 1."""
    least = min(options.dampings)
    exact = float(np.mean([solve.counted for solve in systems.of(EXACT, least)]))

    def claim(name: str, statement: str, place: str, paper: str, holds: tuple[float | None, float | None]) -> Claim:
        found = systems.of(name, least)
        value, error = over_seeds([solve.counted for solve in found])
        failed = sum(solve.failed for solve in found)
        quantity = f"relative error of the solution, damping {least:g} times |smallest Ritz value|, {name}"
        if failed:
            quantity += f" ({failed} of {len(found)} solves refused or at negative curvature, which count as 1)"
        return Claim(FOUNDATION, place, statement, paper, quantity, holds, value, error + exact,
                     f"{model}, {len(found)} right-hand sides")  # fmt: skip

    names = {solve.name for solve in systems.solves}
    for name, words in _steps(options.low_precision):
        if name in names:
            yield claim(name, f"{BIAS_IS_SMALL} {words}, in CG solves.", f"{MECHANISM}; {QUESTION}", "uncharacterized",
                        (None, SOLUTION))  # fmt: skip
    if BLOCKS in names:
        yield claim(BLOCKS, "Blocks of the Hessian fail in CG solves.", "Mechanism 3", "fail catastrophically",
                    (SOLUTION, None))  # fmt: skip


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


def main() -> None:
    """Reads the options and runs; most of the time would go into the compiler's optimisations."""
    compile_quickly()
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
