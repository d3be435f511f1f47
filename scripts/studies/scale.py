"""Do larger models have more stable curvature? A ladder of models trained alike, width and depth also varied apart.

    python -m scripts.studies.scale

With no options: byte decoders of 0.03 to 1 million parameters, trained for a few hundred steps on the text in
scripts/tiny; five minutes on two cores. `--sizes 0.03 0.1 0.3 1 4` adds one of 4 million; `--kept FOLDER` keeps the
trained models. What would refute the claims: trace, Frobenius norm and largest eigenvalue that vary as much, or more,
in larger models when the step of finite differences, the sample of the data or the probe changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from jaxhess.vectors import check_seed
from scripts.studies.harness import FOUNDATION, TINY, StudyOptions, command, picture
from scripts.studies.scales.ladder import DEPTHS, LADDER, TRAINING, WIDTHS, Recipe, Rung, train
from scripts.studies.scales.stability import (
    CAUSES,
    STATISTICS,
    Slope,
    Stability,
    exponents,
    parts,
    powers,
    predicted_by_probe,
    stability,
)
from scripts.training.small_decoder import byte_batch

NAME = "scale"
WORDS = {"step": "the step of finite differences", "data": "the sample of the data", "probe": "the probe"}

CAPTION = """Relative variation of global statistics of the Hessian against the number of parameters: with the step of
finite differences (root mean square over the steps, against exact products), with the sample of the data (for trace and
norm without the noise of the probes), and with the probe. Dots: the ladder; triangles: width alone; squares: depth
alone; star: trained four times as long. The last panel has all of them against the loss. Bars: 95%, of the sampling of
the variation. A variation that is not above the noise is not drawn."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The ladder, its training, and what is varied."""

    sizes: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Million parameters, of 0.03, 0.1, 0.3, 1 and 4; two or more."""
    apart: bool = True
    """Also vary width and depth apart, and the length of training."""
    data: Path = TINY / "sample.txt"
    """A text, of which bytes are predicted."""
    seq_len: int = 64
    """Bytes predicted in a sequence."""
    train_sequences: int = 2000
    """Sequences to train on, and to take samples of, from the start of the text."""
    train_steps: int = 300
    """Of Adam."""
    batch: int = 16
    """Sequences of a step."""
    rate: float = 3e-3
    """The largest learning rate."""
    kept: Path | None = None
    """Folder where trained models are left, and looked for."""
    samples: int = 6
    """Disjoint samples of the data, two or more."""
    sequences: int = 8
    """Sequences of each."""
    steps: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """Of finite differences, per coordinate; by default over the range that the paper recommends."""
    lanczos: int = 8
    """Lanczos steps."""
    probes: int = 24
    """Probes of trace and Frobenius norm, two or more; half of them on every sample."""
    seed: int = 0
    """Of weights, the order of the data and probes."""

    def check(self) -> None:
        """Raises InputError where the options make no study."""
        check_seed(self.seed)
        if unknown := set(self.sizes) - set(LADDER):
            raise InputError(f"--sizes {' '.join(map(str, sorted(unknown)))}: there are {', '.join(map(str, LADDER))}.")
        if len(set(self.sizes)) < 2 or min(self.samples, self.probes) < 2:
            raise InputError("--sizes, --samples and --probes must be two or more.")
        if self.lanczos < 2 or self.train_steps < 10 or self.sequences < 1:
            raise InputError("--lanczos must be at least 2, --train-steps at least 10, --sequences at least 1.")
        if self.samples * self.sequences > self.train_sequences:
            raise InputError(
                f"--samples {self.samples} of --sequences {self.sequences} need {self.samples * self.sequences} "
                f"--train-sequences; there are {self.train_sequences}."
            )
        if not self.steps or min(self.steps) <= 0:
            raise InputError("--steps are positive, one or more.")

    @property
    def groups(self) -> dict[str, tuple[Rung, ...]]:
        """The models by what they vary."""
        found = {"size": tuple(LADDER[size] for size in sorted(set(self.sizes)))}
        return found | ({"width": WIDTHS, "depth": DEPTHS, "training": TRAINING} if self.apart else {})


SMALL = Options(
    sizes=(0.03, 0.1), apart=False, train_sequences=64, train_steps=20, seq_len=16, samples=4, sequences=4,
    steps=(1e-3,), lanczos=4, probes=4,
)  # fmt: skip


def study(options: Options) -> Study:
    """Trains what is not kept, and measures every model."""
    options.check()
    data = byte_batch(options.data, options.seq_len, options.train_sequences)
    recipe = Recipe(options.train_steps, options.batch, options.seq_len, options.rate, options.seed)
    samples = parts(data, options.samples, options.sequences)
    found = {}
    for rung in dict.fromkeys(rung for group in options.groups.values() for rung in group):
        trained = train(rung, recipe, data, options.kept)
        found[rung] = stability(trained, samples, options.steps, options.lanczos, options.probes, options.seed)
    groups = {name: [found[rung] for rung in rungs] for name, rungs in options.groups.items()}
    every = list(found.values())
    on = f"byte decoders, {len(every)} models, {options.train_steps} training steps, {options.sequences} sequences"
    return Study(
        "Stability of curvature against the size of the model",
        tuple(claims(groups, every, on)),
        tuple(tables(every, groups, options.steps)),
        (picture(NAME, figure(groups), CAPTION),),
        {
            "models": [
                dataclasses.asdict(f.rung)
                | {"parameters": f.parameters, "loss": f.loss, "effective": f.effective}
                | {"values": dict(zip(STATISTICS, f.values.tolist(), strict=True))}
                | {c: dict(zip(STATISTICS, f.variation[k].tolist(), strict=True)) for k, c in enumerate(CAUSES)}
                | {
                    "by_step": f.by_step.tolist(),
                    "effective_error": f.effective_error,
                    "noise": f.noise.tolist(),
                    "predicted_by_probe": predicted_by_probe(f),
                }
                for f in every
            ]
        },
    )


def alike(groups: Mapping[str, list[Stability]]) -> list[Stability]:
    """The models that were trained as long as each other."""
    every = (f for name, found in groups.items() if name != "training" for f in found)
    return list({f.rung: f for f in every}.values())


def fits(groups: Mapping[str, list[Stability]]) -> Iterator[tuple[str, str, Slope]]:
    """What is larger, the cause of the variation, and its exponent; width and depth are fitted together."""
    found = alike(groups)
    for cause in CAUSES:
        yield "size", cause, exponents([[f.parameters for f in found]], found, cause)[0]
    if "width" in groups:
        for cause in CAUSES:
            both = exponents([[f.rung.width for f in found], [f.rung.layers for f in found]], found, cause)
            yield "width", cause, both[0]
            yield "depth", cause, both[1]


def claims(groups: Mapping[str, list[Stability]], every: Sequence[Stability], on: str) -> Iterator[Claim]:
    """Larger models are more stable: in all, by width, and by depth; and what explains it."""
    place = "Section 7.1; Figure 8; Open question 2"
    sizes = [f.parameters for f in alike(groups)]
    for name, cause, found in fits(groups):
        what = {"size": "Larger", "width": "Wider", "depth": "Deeper"}[name]
        fitted = f"over {min(sizes):,} to {max(sizes):,} parameters" if name == "size" else "width and depth together"
        yield Claim(
            FOUNDATION, place, f"{what} models are more stable against {WORDS[cause]}.",
            "more stable than their smaller counterparts" if name == "size" else "to be varied independently",
            f"exponent of the relative variation in {name}, {fitted}: less than zero", (None, 0.0), *found, on,
        )  # fmt: skip
    same = alike(groups)
    dimensions = [f.effective for f in same], [f.effective_error for f in same]
    yield Claim(
        FOUNDATION, "Open question 2", "Stability against the probe is spectral concentration: larger models have a "
        "larger effective dimension tr(H)^2 / |H|^2.", "to be explained",
        "exponent of tr(H)^2 / |H|^2 in size: more than zero", (0.0, None), *powers([sizes], *dimensions)[0], on,
    )  # fmt: skip
    if "training" in groups:
        short, long = groups["training"]
        change = math.log(long.pooled("data") / short.pooled("data"))
        error = 1.96 * math.hypot(short.log_error("data"), long.log_error("data"))
        yield Claim(
            FOUNDATION, "Open question 2", "Stability against the data's sample comes with a lower loss: a model "
            "trained longer is more stable at the same size.", "to be explained",
            "logarithm of the ratio of variations, trained four times as long: less than zero", (None, 0.0),
            change, error if math.isfinite(change) else 0.0, on,
        )  # fmt: skip


def tables(
    every: Sequence[Stability], groups: Mapping[str, list[Stability]], steps: Sequence[float]
) -> Iterator[Table]:
    """Statistics and variations of every model, errors by step, exponents, and rank correlations."""
    yield Table(
        ("width x layers", "parameters", "loss", *STATISTICS, "tr² / |H|²", "trace by probe, predicted"),
        [
            (f.rung.name, f"{f.parameters:,}", f"{f.loss:.3f}", *(f"{x:.4g}" for x in f.values),
             f"{f.effective:.3g}", f"{predicted_by_probe(f):.3f}")
            for f in every
        ],
        "Statistics",
    )  # fmt: skip
    head = [f"{cause}: {name}" for cause in CAUSES for name in STATISTICS]
    rows = [(f.rung.name, *(f"{x:.2g}" for x in f.variation.ravel())) for f in every]
    yield Table(("width x layers", *head), rows, "Relative variation with the step, the data's sample and the probe")
    head = [f"{step:g}: {name}" for step in steps for name in STATISTICS[:3]]
    rows = [(f.rung.name, *(f"{x:.1e}" for x in f.by_step[:, :3].ravel())) for f in every]
    yield Table(("width x layers", *head), rows, "Relative difference from exact products, by step")
    rows = [(name, cause, f"{found.exponent:+.2f} ± {found.error:.1g}") for name, cause, found in fits(groups)]
    yield Table(("exponent in", "variation with", ""), rows, "Exponents of the variation, models trained alike")
    if len({f.effective for f in every}) > 2:
        of = {"parameters": [f.parameters for f in every], "loss": [f.loss for f in every]}
        of["effective dimension"] = [f.effective for f in every]
        rows = [
            (name, *(f"{spearmanr(x, [f.pooled(cause) for f in every]).statistic:+.2f}" for cause in CAUSES))
            for name, x in of.items()
        ]
        yield Table(("", *CAUSES), rows, "Spearman's rank correlation of the variation, over all models")


COLORS = dict(zip(CAUSES, ("#0072b2", "#d55e00", "#009e73"), strict=True))
MARKERS = {"size": "o-", "width": "^--", "depth": "s:", "training": "*"}


def figure(groups: Mapping[str, list[Stability]]) -> Figure:
    """A panel for each cause against parameters, and all against the loss."""
    drawn = Figure(figsize=(13, 4), layout="constrained")
    panels = drawn.subplots(1, 4, sharey=True)
    for panel, cause in zip(panels, CAUSES, strict=False):
        for name, found in groups.items():
            shown = found[1:] if name == "training" else found
            y = np.array([f.pooled(cause) for f in shown])
            bars = y * (np.exp([1.96 * f.log_error(cause) for f in shown]) - 1)
            x = [f.parameters for f in shown]
            low = y - y / (1 + bars / y)
            panel.errorbar(x, y, (low, bars), fmt=MARKERS[name], color=COLORS[cause], capsize=2, label=name)
            panels[3].plot([f.loss for f in shown], y, MARKERS[name][0], color=COLORS[cause])
        panel.set(xscale="log", yscale="log", xlabel="parameters", title=f"with {WORDS[cause]}")
        panel.legend(fontsize="small")
    panels[0].set_ylabel("relative variation, geometric mean")
    panels[3].set(yscale="log", xlabel="loss (nats per byte)", title="all, by color of cause")
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
