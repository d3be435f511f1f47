"""Spectra of the blocks of a convolutional network and of transformers, how far apart they are, and SGD against Adam.

    python -m scripts.studies.heterogeneity

With no options: small classifiers of handwritten digits and a small decoder of the text in scripts/tiny, each trained
from three seeds. Blocks are the weight matrices and convolution kernels. What would refute the claims: a convolutional
network whose spectra are as far apart as a transformer's; or SGD that loses to Adam on it by more than a twentieth of
what Adam learns; or SGD that loses less than that on a transformer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jaxhess
from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.structure.distances import jensen_shannon
from scripts.studies.harness import NEED_ADAM, TALK, TINY, StudyOptions, command, picture
from scripts.training.images import ConvNet, Source, VisionTransformer, image_problem, load_images
from scripts.training.short_runs import Sweep, TrainingTask, adam, check_runs, mean_loss, missed, over_seeds, sgd, sweep
from scripts.training.small_decoder import byte_batch, byte_config, decoder_problem

Array = npt.NDArray[np.float64]

NAME = "heterogeneity"
ALIKE = 0.05
"""Share of Adam's reduction of the loss up to which another optimizer is as good. Set before the first measurement."""

NOTE = """Above: Jensen-Shannon distances between the spectra of blocks (0: the same, 1: no overlap), each block's
eigenvalues divided by its tenth largest, mean over seeds; at initialisation, and where Adam ends. Below: loss on the
training data after equal steps, mean over seeds with its 95% interval; runs that diverged are left out."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The models, their data, and how long they are trained."""

    images: Source = "digits"
    """Handwritten digits of scikit-learn, or random images that need no other package."""
    text: Path = TINY / "sample.txt"
    """Text whose bytes the decoder predicts."""
    seeds: int = 3
    """Independent initial weights and orders of the data; errors are over these."""
    train_steps: int = 150
    """Training steps."""
    examples: int = 768
    """Images, and sequences of text, to train on."""
    batch: int = 64
    """Images of a step; the decoder takes an eighth, sequences of 32 bytes."""
    width: int = 16
    """Of the transformers' layers, a multiple of 16; half of it is that of convolutions."""
    sgd_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of SGD with momentum 0.9."""
    adam_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
    """Learning rates of Adam."""
    spectrum_examples: int = 48
    """Images of which spectra are; of the decoder an eighth, in sequences."""
    steps: int = 20
    """Lanczos steps."""
    probes: int = 6
    """Probes per block."""


SMALL = Options(
    images="prototypes", seeds=2, train_steps=30, examples=128, batch=32, sgd_rates=(0.1, 0.3),
    adam_rates=(3e-3, 1e-2), spectrum_examples=16, steps=10, probes=2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class BlockwiseSpectra:
    """Blocks at one point of the training: Jensen-Shannon distances [seeds, B, B], largest eigenvalues [seeds, B], and
    for every seed the mean distance between estimates of one block by single probes."""

    absolute: Array
    normalised: Array
    largest: Array
    floor: Array

    def mean(self, normalised: bool) -> Array:
        """[seeds] mean distance over all pairs of blocks."""
        found = self.normalised if normalised else self.absolute
        return found[:, *np.triu_indices(found.shape[-1], 1)].mean(1)

    @property
    def ranges(self) -> Array:
        """[seeds] log10 of the ratio between the blocks' largest eigenvalues, the largest to the smallest."""
        magnitudes = np.log10(np.maximum(self.largest, np.finfo(float).tiny))
        return magnitudes.max(1) - magnitudes.min(1)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """What was found for one model."""

    problem: TrainingTask
    names: tuple[str, ...]
    states: dict[str, BlockwiseSpectra]
    initial: Array
    sgd: Sweep
    adam: Sweep

    @property
    def missed(self) -> Array:
        """[seeds] the share of Adam's reduction of the loss that SGD misses, each at its best learning rate."""
        return missed(self.sgd.losses[self.sgd.best], self.adam.losses[self.adam.best], self.initial)

    @property
    def obstacle(self) -> str:
        """Why the optimizers cannot be compared."""
        ends = [name for name, runs in (("SGD", self.sgd), ("Adam", self.adam)) if runs.at_an_end]
        return f"the best learning rate of {' and of '.join(ends)} is the last of those tried" if ends else ""


def study(options: Options) -> Study:
    """All three models."""
    check_runs(options.seeds, options.train_steps, options.sgd_rates, options.adam_rates)
    if options.probes < 2 or options.steps < 2 or min(options.batch, options.spectrum_examples) < 8:
        raise InputError("--probes and --steps must be at least 2, --batch and --spectrum-examples at least 8.")
    found = [measure(problem, options) for problem in problems(options)]
    return Study(
        "Homogeneous and heterogeneous blocks, SGD and Adam",
        tuple(claims(*found)),
        (distance_table(found), training_table(found)),
        (picture(NAME, figure(found), NOTE),),
        {model.problem.name: record(model) for model in found},
    )


def problems(options: Options) -> list[TrainingTask]:
    """The convolutional network, the vision transformer and the decoder."""
    data = load_images(options.images, options.examples)
    width = options.width
    config = byte_config(width, 2, 2, 32)
    return [
        image_problem("CNN", lambda rngs: ConvNet(width // 2, rngs), data, options.batch),
        image_problem("vision transformer", lambda rngs: VisionTransformer(width, rngs), data, options.batch),
        decoder_problem(config, byte_batch(options.text, 32, options.examples), options.batch // 8),
    ]


def measure(problem: TrainingTask, options: Options) -> TrainedModel:
    """Trains with both optimizers, and takes the spectra before and after."""
    seeds = range(options.seeds)
    runs = [sweep(problem, o, rates, seeds, options.train_steps)
            for o, rates in ((sgd, options.sgd_rates), (adam, options.adam_rates))]  # fmt: skip
    begin = [problem.initial(seed) for seed in seeds]
    names, initial = blockwise(problem, begin, options)
    _, trained = blockwise(problem, runs[1].params[runs[1].best], options)
    first = np.array([mean_loss(problem, params) for params in begin])
    return TrainedModel(problem, names, {"initialisation": initial, "trained": trained}, first, *runs)


def blockwise(problem: TrainingTask, seeds: list, options: Options) -> tuple[tuple[str, ...], BlockwiseSpectra]:
    """Names of the blocks, and distances at the parameters of every seed."""
    count = options.spectrum_examples // (8 if problem.name == "decoder" else 1)
    batch = jax.tree.map(lambda x: x[:count], problem.data)
    rows: list[tuple[Array, ...]] = []
    names: tuple[str, ...] = ()
    for seed, params in enumerate(seeds):
        hessian = jaxhess.Hessian(problem.loss, params, [batch]).restrict("kernel")
        blocks = jaxhess.Blocks.by(hessian.shape_dtype, "matrices")
        found = jaxhess.block_spectra(
            hessian, blocks, steps=options.steps, probes=options.probes, seed=seed, together=len(blocks)
        )
        names = found.names
        pairs = [(one_probe(s, 0), one_probe(s, 1)) for s in found.spectra]
        rows.append((
            jensen_shannon(found.spectra),
            jensen_shannon(found.spectra, normalised=True),
            np.array([s.extreme().largest.value for s in found.spectra]),
            np.mean([jensen_shannon(pair)[0, 1] for pair in pairs]),
        ))  # fmt: skip
    return names, BlockwiseSpectra(*map(np.array, zip(*rows, strict=True)))


def one_probe(spectrum: jaxhess.Spectrum, probe: int) -> jaxhess.Spectrum:
    """The spectrum as one of its probes has it."""
    kept = slice(probe, probe + 1)
    arrays = {name: getattr(spectrum, name)[kept] for name in ("alphas", "betas", "step_errors", "sizes")}
    return dataclasses.replace(spectrum, **arrays)


def claims(cnn: TrainedModel, *transformers: TrainedModel) -> Iterator[Claim]:
    """The talk's observations about blocks, and what it says about SGD and Adam."""
    place, beside = "Part IV, Implication I, Observation 1 and Figure 4", "Implication I, table of SGD and Adam"
    for model in transformers:
        for normalised in (True, False):
            ours, theirs = (x.states["initialisation"].mean(normalised) for x in (model, cnn))
            kind = "eigenvalues over the block's tenth largest" if normalised else "eigenvalues as they are"
            value, error = over_seeds(ours - theirs)
            quantity = f"mean Jensen-Shannon distance at initialisation, less that of the CNN; {kind}"
            yield Claim(NEED_ADAM, place, "Blocks of transformers are heterogeneous, those of CNNs are not.",
                        "larger for transformers", quantity, (0, None), value, error, model.problem.name)  # fmt: skip
        value, error = over_seeds(model.states["initialisation"].ranges)
        yield Claim(TALK, "Part IV, blockwise Hessian spectrum, remark at BERT",
                    "Ranges of eigenvalues of a transformer's blocks differ by more than 200 times.", "> 200 (BERT)",
                    "log10 of the ratio of the blocks' largest eigenvalues at initialisation",
                    (math.log10(200), None), value, error, model.problem.name)  # fmt: skip
    for model in (cnn, *transformers):
        holds: Range = (-ALIKE, ALIKE) if model is cnn else (ALIKE, None)
        statement = (
            "SGD is as good as Adam on CNNs." if model is cnn else "SGD is much worse than Adam on transformers."
        )
        value, error = over_seeds(model.missed)
        yield Claim(TALK, beside, statement, "SGD ≈ Adam" if model is cnn else "SGD ≪ Adam",
                    "share of Adam's reduction of the loss that SGD misses, both at their best learning rates", holds,
                    value, error, model.problem.name, model.obstacle)  # fmt: skip


def text(values: npt.ArrayLike) -> str:
    """Mean and 95% error over seeds."""
    value, error = over_seeds(values)
    return f"{value:.3g} ± {error:.1g}" if math.isfinite(value) else "diverged"


def distance_table(found: list[TrainedModel]) -> Table:
    """Mean distances and ranges of every model, before and after the training."""
    head = ("model", "at", "blocks", "mean distance, normalised", "absolute", "same block, other probe",
            "log10 range of largest eigenvalues")  # fmt: skip
    rows = [
        (m.problem.name, at, str(len(m.names)), text(s.mean(True)), text(s.mean(False)), text(s.floor), text(s.ranges))
        for m in found
        for at, s in m.states.items()
    ]
    return Table(head, rows, "Distances between blocks, ± 95% over seeds")


def training_table(found: list[TrainedModel]) -> Table:
    """Losses at the best learning rates."""
    head = ("model", "loss before", "SGD", "at rate", "Adam", "at rate", "share missed by SGD")
    rows = [
        (m.problem.name, text(m.initial), *(cell for s in (m.sgd, m.adam)
         for cell in (text(s.losses[s.best]), f"{s.rates[s.best]:g}")), text(m.missed))
        for m in found
    ]  # fmt: skip
    return Table(head, rows, "Loss on the training data after equal steps")


def record(model: TrainedModel) -> dict:
    """Everything measured of a model, for JSON."""
    return {
        "blocks": model.names,
        "initial_losses": model.initial.tolist(),
        "states": {at: {k: v.tolist() for k, v in vars(state).items()} for at, state in model.states.items()},
        **{
            name: {"rates": s.rates, "losses": s.losses.tolist()}
            for name, s in (("sgd", model.sgd), ("adam", model.adam))
        },
    }


def figure(found: list[TrainedModel]) -> Figure:
    """A column for each model: distances before and after, and losses against learning rates."""
    drawn = Figure(figsize=(15, 14), dpi=110, layout="constrained", facecolor="white")
    panels = drawn.subplots(3, len(found), height_ratios=(1.15, 1.15, 0.8), squeeze=False)
    for column, model in enumerate(found):
        for row, (at, state) in enumerate(model.states.items()):
            panel = panels[row, column]
            panel.imshow(state.normalised.mean(0), vmin=0, vmax=1, cmap="cividis")
            labels = [short(name) for name in model.names]
            panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            panel.set_yticks(range(len(labels)), labels, fontsize=8)
            mean = state.mean(True).mean()
            panel.set_title(f"{model.problem.name}, {at}: mean distance {mean:.2f}", fontsize=11)
        training_panel(panels[2, column], model)
    drawn.colorbar(panels[0, 0].images[0], ax=panels[:2].ravel().tolist(), shrink=0.6, label="Jensen-Shannon distance")
    return drawn


def short(name: str) -> str:
    """A block's name without what all have."""
    return name.removesuffix("/kernel").replace("attention/", "").replace("mlp/", "").replace("layers/", "layer")


def training_panel(panel: Axes, model: TrainedModel) -> None:
    """Final losses against learning rates."""
    for name, runs, color, marker in (("SGD", model.sgd, "#D55E00", "o"), ("Adam", model.adam, "#0072B2", "s")):
        points = [(rate, *over_seeds(row)) for rate, row in zip(runs.rates, runs.losses, strict=True)]
        rates, losses, errors = zip(*points, strict=True)
        panel.errorbar(rates, losses, errors, color=color, marker=marker, ms=5, capsize=3, label=name)
    panel.axhline(model.initial.mean(), color="gray", linestyle=":", label="before training")
    panel.set(xscale="log", xlabel="peak learning rate", ylabel="training loss (nats)")
    panel.set_ylim(0, 1.2 * model.initial.mean())
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=9, frameon=False)


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
