"""Blocks of a classifier's classes with balanced and with heavy-tailed labels, and gradient descent against Adam.

    python -m scripts.studies.class_blocks

With no options: softmax regression on Gaussian clusters, as many examples in each class, or in proportion to 1/k; from
four seeds, all examples at every step. What would refute the claims: spectra of the classes' blocks that imbalance
does not move apart; traces that do not grow with the frequency; gradient descent that falls behind Adam by more than
a twentieth with balanced labels, or by less with imbalanced ones; rare classes that it learns as well as frequent ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

import jaxhess
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.structure.distances import jensen_shannon
from scripts.studies.harness import TAIL, TALK, StudyOptions, command, picture
from scripts.training.short_runs import Sweep, TrainingTask, adam, check_runs, mean_loss, missed, over_seeds, sgd, sweep

Array = npt.NDArray[np.float64]

NAME = "class_blocks"
ALIKE = 0.05
"""Share of Adam's reduction of the loss up to which another optimizer is as good. Set before the first measurement."""
LABELS = ("balanced", "imbalanced")
INITIAL, EARLY, TRAINED = "initialisation", "after a tenth", "trained"
NOTE = """Left and middle: trace of each class's block of the Hessian against the share of examples in that class, one
point for each class and seed; the line has slope 1. Right: loss on all data after equal steps against the learning
rate, mean over seeds with its 95% interval."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The data, and how long the model is trained."""

    classes: int = 64
    """Of the labels."""
    features: int = 64
    """Of an example."""
    examples: int = 2048
    """Of all classes together."""
    noise: float = 5.0
    """Standard deviation of the examples around their class's centre, whose entries have deviation 1. At 2 the classes
    can be separated, and every optimizer reaches a loss of nearly zero."""
    seeds: int = 4
    """Independent data and initial weights; errors are over these."""
    train_steps: int = 40
    """Steps, of all examples each. After 200 both optimizers have reached the minimum of this convex loss."""
    sgd_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    """Learning rates of gradient descent with momentum 0.9."""
    adam_rates: tuple[float, ...] = (1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of Adam."""
    steps: int = 16
    """Lanczos steps."""
    probes: int = 3
    """Probes per class."""
    spectrum_examples: int = 512
    """Examples, drawn at random, of which the Hessian is."""


SMALL = Options(classes=8, features=16, examples=256, seeds=2, steps=8, probes=2, spectrum_examples=128)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassSpectra:
    """Blocks at one point of the training: [seeds, C] traces, largest eigenvalues; [seeds] distances and exponents."""

    traces: Array
    largest: Array
    distances: Array
    exponents: Array


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedLabels:
    """What was found with one kind of labels; losses of rare and frequent classes are [2, seeds] (SGD, Adam)."""

    shares: Array
    states: dict[str, ClassSpectra]
    initial: Array
    sgd: Sweep
    adam: Sweep
    rare: Array
    frequent: Array

    @property
    def missed(self) -> Array:
        """[seeds] the share of Adam's reduction of the loss that gradient descent misses."""
        return missed(self.sgd.losses[self.sgd.best], self.adam.losses[self.adam.best], self.initial)

    @property
    def obstacle(self) -> str:
        """Why the optimizers cannot be compared."""
        ends = [name for name, runs in (("gradient descent", self.sgd), ("Adam", self.adam)) if runs.at_an_end]
        return f"the best learning rate of {' and of '.join(ends)} is the last of those tried" if ends else ""


def study(options: Options) -> Study:
    """Balanced and imbalanced labels."""
    check_runs(options.seeds, options.train_steps, options.sgd_rates, options.adam_rates)
    if options.classes < 4 or options.examples < 8 * options.classes:
        raise InputError(f"--classes {options.classes} --examples {options.examples}: 4 classes or more are needed, "
                         "and 8 times as many examples.")  # fmt: skip
    if options.spectrum_examples > options.examples:
        raise InputError("--spectrum-examples cannot be more than --examples.")
    found = {labels: measure(labels == "imbalanced", options) for labels in LABELS}
    return Study(
        "Blocks of classes with balanced and heavy-tailed labels",
        tuple(claims(found, f"softmax regression, {options.classes} classes, {options.features} features")),
        (block_table(found), training_table(found)),
        (picture(NAME, figure(found), NOTE),),
        {
            labels: {
                "shares": f.shares.tolist(),
                "states": {at: {k: v.tolist() for k, v in vars(state).items()} for at, state in f.states.items()},
                "sgd": {"rates": f.sgd.rates, "losses": f.sgd.losses.tolist()},
                "adam": {"rates": f.adam.rates, "losses": f.adam.losses.tolist()},
            }
            for labels, f in found.items()
        },
    )


def class_counts(options: Options, imbalanced: bool) -> npt.NDArray[np.int64]:
    """[C] examples of every class, four or more; in proportion to 1/k where imbalanced."""
    weights = 1 / np.arange(1, options.classes + 1) if imbalanced else np.ones(options.classes)
    counts = np.maximum(4, np.floor(options.examples * weights / weights.sum())).astype(np.int64)
    counts[0] += options.examples - counts.sum()
    return counts


def logits(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """[B, C] of the head, whose rows are classes."""
    return inputs @ params["head"].T


LOSS = jaxhess.SoftmaxCrossEntropy(logits)


def problem_of(options: Options, counts: npt.NDArray[np.int64], seed: int) -> TrainingTask:
    """Softmax regression on the data of a seed, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(options.classes), counts))
    centres = rng.normal(size=(options.classes, options.features))
    inputs = centres[labels] + options.noise * rng.normal(size=(len(labels), options.features))
    data = (jnp.asarray(inputs / math.hypot(1, options.noise), jnp.float32), jnp.asarray(labels, jnp.int32))
    start = {"head": jnp.asarray(0.01 * rng.normal(size=(options.classes, options.features)), jnp.float32)}
    return TrainingTask("softmax regression", LOSS, lambda _: start, data)


def measure(imbalanced: bool, options: Options) -> TrainedLabels:
    """Trains with both optimizers, and takes the spectra of all classes on the way."""
    counts = class_counts(options, imbalanced)
    shares = counts / counts.sum()
    problems = [problem_of(options, counts, seed) for seed in range(options.seeds)]
    runs = [joined([sweep(p, o, rates, [0], options.train_steps) for p in problems])
            for o, rates in ((sgd, options.sgd_rates), (adam, options.adam_rates))]  # fmt: skip
    rate = runs[1].rates[runs[1].best]
    points = {
        INITIAL: [p.initial(0) for p in problems],
        EARLY: [sweep(p, adam, [rate], [0], max(10, options.train_steps // 10)).params[0][0] for p in problems],
        TRAINED: runs[1].params[runs[1].best],
    }
    states = {at: blockwise(problems, params, shares, options) for at, params in points.items()}
    initial = np.array([mean_loss(p, p.initial(0)) for p in problems])
    rare = np.cumsum(shares) > 0.5  # classes are sorted by their shares
    by_class = [
        np.array([[mean_loss(of_classes(p, chosen), end) for p, end in zip(problems, r.params[r.best], strict=True)]
                  for r in runs])
        for chosen in (rare, ~rare)
    ]  # fmt: skip
    return TrainedLabels(shares, states, initial, runs[0], runs[1], by_class[0], by_class[1])


def joined(sweeps: list[Sweep]) -> Sweep:
    """Sweeps of one seed each as one."""
    losses = np.concatenate([s.losses for s in sweeps], axis=1)
    params = [[s.params[k][0] for s in sweeps] for k in range(len(losses))]
    return Sweep(sweeps[0].rates, losses, params)


def of_classes(problem: TrainingTask, chosen: npt.NDArray[np.bool_]) -> TrainingTask:
    """The problem with the examples of these classes alone."""
    inputs, labels = problem.data
    kept = np.flatnonzero(chosen[np.asarray(labels)])
    return dataclasses.replace(problem, data=(inputs[kept], labels[kept]))


def blockwise(problems: list[TrainingTask], params: list, shares: Array, options: Options) -> ClassSpectra:
    """Spectra of all classes at the parameters of every seed."""
    rows: list[tuple[Array, ...]] = []
    for seed, (problem, at) in enumerate(zip(problems, params, strict=True)):
        hessian = jaxhess.Hessian(LOSS, at, [jax.tree.map(lambda x: x[: options.spectrum_examples], problem.data)])
        blocks = jaxhess.Blocks.by(hessian.shape_dtype, "matrices").split("head", 0)
        found = jaxhess.block_spectra(
            hessian, blocks, steps=options.steps, probes=options.probes, seed=seed, distribution="rademacher",
            together=len(blocks),
        )  # fmt: skip
        traces = np.array([s.trace().value for s in found.spectra])
        largest = np.array([s.extreme().largest.value for s in found.spectra])
        pairs = jensen_shannon(found.spectra)[np.triu_indices(len(blocks), 1)]
        rows.append((traces, largest, pairs.mean(), exponent(shares, traces)))
    return ClassSpectra(*map(np.array, zip(*rows, strict=True)))


def exponent(shares: Array, traces: Array) -> Array:
    """The power of the share to which traces are proportional, by least squares in logarithms; NaN where all shares are
    the same, or a trace is not positive."""
    if len(set(shares)) == 1 or (traces <= 0).any():
        return np.array(np.nan)
    return np.polyfit(np.log(shares), np.log(traces), 1)[0]


def claims(found: dict[str, TrainedLabels], model: str) -> Iterator[Claim]:
    """What the talk says of balanced and imbalanced labels, and the paper on heavy tails of the classes."""
    balanced, imbalanced = (found[labels] for labels in LABELS)
    place = "Part IV, When and why Adam ≫ SGD, Data"
    apart = "Blocks of the head's classes are heterogeneous with imbalanced labels, and similar with balanced ones."
    slower = "With gradient descent the loss of infrequent classes decreases more slowly, with Adam less so."
    share = "share of Adam's reduction of the loss that gradient descent misses, both at their best rates"
    for at in (EARLY, TRAINED):
        value, error = over_seeds(imbalanced.states[at].distances - balanced.states[at].distances)
        yield Claim(TALK, place, apart, "larger if imbalanced",
                    f"mean Jensen-Shannon distance, imbalanced less balanced, {at}", (0, None), value, error,
                    model)  # fmt: skip
        value, error = over_seeds(imbalanced.states[at].exponents)
        yield Claim(TAIL, "Abstract", "Class imbalance leads to imbalanced Hessians.", "imbalanced",
                    f"power of the class's frequency to which its block's trace is proportional, {at}", (0, None),
                    value, error, model)  # fmt: skip
    for labels, f in found.items():
        holds: Range = (-ALIKE, ALIKE) if labels == "balanced" else (ALIKE, None)
        good = "as good as" if labels == "balanced" else "much worse than"
        value, error = over_seeds(f.missed)
        yield Claim(TALK, place, f"SGD is {good} Adam with {labels} labels.",
                    "SGD ≈ Adam" if labels == "balanced" else "SGD ≪ Adam", share, holds, value, error, model,
                    f.obstacle)  # fmt: skip
    gaps = [f[0] - f[1] for f in (imbalanced.rare, imbalanced.frequent)]
    value, error = over_seeds(gaps[0] - gaps[1])
    yield Claim(TAIL, "Abstract", slower, "more slowly",
                "loss of gradient descent less that of Adam: rarer half of the examples less the other half",
                (0, None), value, error, model, imbalanced.obstacle)  # fmt: skip


def text(values: npt.ArrayLike) -> str:
    """Mean and 95% error over seeds."""
    value, error = over_seeds(values)
    return f"{value:.3g} ± {error:.1g}" if math.isfinite(value) else "none"


def block_table(found: dict[str, TrainedLabels]) -> Table:
    """Distances and exponents."""
    head = ("labels", "at", "mean distance of classes", "exponent of the trace", "largest over smallest trace")
    rows = [
        (labels, at, text(s.distances), text(s.exponents), text(s.traces.max(1) / s.traces.min(1)))
        for labels, f in found.items()
        for at, s in f.states.items()
    ]
    return Table(head, rows, "Blocks of the classes, ± 95% over seeds")


def training_table(found: dict[str, TrainedLabels]) -> Table:
    """Losses at the best rates."""
    rows = [
        (labels, name, f"{runs.rates[runs.best]:g}", text(runs.losses[runs.best]), text(f.rare[k]), text(f.frequent[k]))
        for labels, f in found.items()
        for k, (name, runs) in enumerate((("gradient descent", f.sgd), ("Adam", f.adam)))
    ]
    head = ("labels", "optimizer", "best rate", "loss", "rarer half", "more frequent half")
    return Table(head, rows, "Loss (nats) after equal steps")


def figure(found: dict[str, TrainedLabels]) -> Figure:
    """Traces against frequencies, early and trained, and losses against learning rates."""
    drawn = Figure(figsize=(15, 4.6), dpi=110, layout="constrained", facecolor="white")
    panels = drawn.subplots(1, 3)
    colors = dict(zip(LABELS, ("#0072B2", "#D55E00"), strict=True))
    for panel, at in zip(panels, (EARLY, TRAINED), strict=False):
        for labels, f in found.items():
            traces = f.states[at].traces
            marker = "o" if labels == "balanced" else "^"
            panel.plot(np.broadcast_to(f.shares, traces.shape).ravel(), traces.ravel(), marker, ms=5, alpha=0.7,
                       color=colors[labels], label=labels)  # fmt: skip
        f = found["imbalanced"]
        centre = np.exp(np.log(f.states[at].traces.mean(0)).mean() - np.log(f.shares).mean())
        panel.plot(f.shares, centre * f.shares, color="gray", linewidth=1, linestyle="--", label="slope 1")
        panel.set(
            xscale="log", yscale="log", xlabel="share of the examples", ylabel="trace of the class's block (nats)"
        )
        panel.set_title(f"Adam, {at}", fontsize=11)
    for labels, f in found.items():
        for name, runs, marker, line in (("gradient descent", f.sgd, "o", "--"), ("Adam", f.adam, "s", "-")):
            values = [over_seeds(row) for row in runs.losses]
            panels[2].errorbar(runs.rates, *zip(*values, strict=True), marker=marker, ms=5, linestyle=line, capsize=3,
                               color=colors[labels], label=f"{labels}, {name}")  # fmt: skip
    panels[2].set(xscale="log", xlabel="peak learning rate", ylabel="training loss (nats)")
    panels[2].minorticks_off()
    panels[2].set_ylim(0, 1.2 * max(f.initial.mean() for f in found.values()))
    for panel in panels:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=9, frameon=False)
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
