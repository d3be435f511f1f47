"""How the blocks of the Hessian change in training, beside what the talk on the Hessian's structure (Y. Zhang, 2025)
shows and explains: the diagonal that stays, and the part between the layers that is said to vanish.

    python -m scripts.studies.block_structure

The sizes of the talk take five minutes of processor time:

    python -m scripts.studies.block_structure --width 500 --samples 5000 500 --steps 2000 --deep-width 50 \\
        --deep-samples 500

A network with one hidden layer has as many classes as inputs, Gaussian data, random labels, no biases, LeCun's
initialisation, cross-entropy, and Adam on all samples with a constant rate (the talk gives no rate, and no number of
steps). Its blocks are exact, by closed forms. With the talk's ten samples per input eight units cannot learn the
labels; a run with as many samples as inputs shows what happens where they can. The four-layer network's blocks are
exact too, by products with all unit vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxhess.errors import InputError
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from scripts.studies.harness import StudyOptions, command, picture
from scripts.studies.theory.maps import TALK, draw_map
from scripts.studies.theory.sampling import Measured, mean
from scripts.studies.theory.states import (
    PARTS,
    Deep,
    State,
    Training,
    block_ratio,
    four_layers,
    off_diagonal,
    twin,
    two_layers,
)

Array = npt.NDArray[np.float64]

NAME = "block_structure"
HOW_TO_READ = "Off: share of the squared norm off the diagonal. Block: another block's norm over a diagonal one's."
CAPTION = """Rows: entries of the Hessian of a small network, over the largest; norms of all blocks of the large one
over the largest, with many and with few samples (the first blocks are hidden weights, the others output weights); the
four-layer network at the start and at the end (white: units that no sample activates), and the norms of the parts of
the two Hessians."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """Sizes and training."""

    width: int = 100
    """Inputs and classes."""
    units: int = 8
    """Of the hidden layer."""
    samples: tuple[int, int] = (1000, 100)
    """Many, as in the talk ten for each input, and few, which the network can learn by heart."""
    steps: int = 1000
    """Of Adam."""
    rate: float = 0.01
    """Its learning rate."""
    repeats: int = 3
    """With new data, labels and weights."""
    twin_width: int = 24
    """Inputs and classes of the small network whose entries are drawn."""
    twin_units: int = 4
    """Its hidden layer."""
    deep_width: int = 24
    """Inputs, classes and hidden layers of the network with four layers."""
    deep_samples: int = 240
    """Its samples."""
    seed: int = 0
    """Of everything."""

    def check(self) -> None:
        """Raises InputError for sizes that cannot be."""
        if min(self.width, self.twin_width, self.deep_width) < 2 or min(self.units, self.twin_units) < 2:
            raise InputError("Widths and units must be 2 or more.")
        if self.repeats < 2 or self.steps < 10 or min(*self.samples, self.deep_samples) < 1 or not self.rate > 0:
            raise InputError("This study needs --repeats 2, --steps 10 and samples, or more, and --rate > 0.")


SMALL = Options(width=40, samples=(400, 40), steps=400, repeats=3, twin_width=16, deep_width=12, deep_samples=120)


def study(options: Options) -> Study:
    """Everything trained and measured."""
    options.check()
    how, repeats = Training(options.steps, options.rate, options.seed), range(options.repeats)
    runs = [[two_layers(options.width, options.units, samples, how, r) for r in repeats] for samples in options.samples]
    deep = [four_layers(options.deep_width, options.deep_samples, how, r) for r in repeats]
    dense, checks = twin(options.twin_width, options.twin_units, how)
    return Study(
        "Blocks of the Hessian in training",
        (*of_training(options, runs), *of_equations(options, checks), *of_four_layers(options, deep)),
        tuple(tables(options, runs, deep)),
        (picture(NAME, figure(options, runs, deep, dense), CAPTION),),
        {
            "many_samples": [[state.numbers for state in run] for run in runs[0]],
            "few_samples": [[state.numbers for state in run] for run in runs[1]],
            "four_layers": [{"off_diagonal": [off_diagonal(x) for x in d.maps], "losses": d.losses} for d in deep],
            "equations": checks,
        },
    )


Row = tuple[str, str, str, str, Range, Measured]
FORCE = "the “dynamic force”"
AT_MOST: Range = (None, 0.1)
"""What "vanishes" and "near-block-diagonal" allow.

"Block-diagonal" has two readings, and both are tested: another block has so much of a diagonal block's norm (root mean
squares), which is what the theorems are about and maps show; and all other blocks together have so much of the squared
norm.
"""


def of_training(options: Options, runs: list[list[list[State]]]) -> Iterator[Claim]:
    """What the talk's maps show and its "dynamic force" explains, with many and with few samples."""
    place = "Empirical Observations: Gaussian Data"
    for run, samples, name in zip(runs, options.samples, ("many samples", "few samples"), strict=True):

        def over(function: Callable[[list[State]], float], run: list[list[State]] = run) -> Measured:
            return mean([function(states) for states in run])

        def left(at: int, run: list[list[State]] = run) -> Measured:
            return mean([float(np.sqrt(states[at].norms.circulant / states[0].norms.circulant)) for states in run])

        def worst(number: str, run: list[list[State]] = run) -> Measured:
            return mean([max(state.numbers[number] for state in states) for states in run])

        by_blocks, in_sum = "another block's norm over a diagonal one's", "share of its squared norm off the diagonal"
        # fmt: off
        rows: list[Row] = [
            (f"{place}, (i)", "At the start H is block-circulant-block-diagonal", "figure (a)",
             "share of |H|² in diagonal blocks and columns i of H_wv", (0.9, None), over(lambda s: s[0].structured)),
            (f"{place}, (i)", "At the start the block-circulant part is visible", "figure (a)", "its norm over |H|",
             (0.1, None), over(lambda s: s[0].circulant)),
            (FORCE, "Outside column i the blocks H_{w_i v_j} are O(1/C) noise at the start", "+ O(1/C)",
             "share of |H_wv|² outside", AT_MOST, over(lambda s: s[0].norms.rest / float(s[0].norms.wv.sum()))),
            (f"{place}, (ii)", "The block-circulant part vanishes beside H", "vanishes",
             "its norm over |H|, end over start", AT_MOST, over(lambda s: s[-1].circulant / s[0].circulant)),
            (FORCE, "The block-circulant part itself vanishes", "H_wv ≈ O(optimality gap)", "its norm, end over start",
             AT_MOST, left(-1)),
            (FORCE, "It vanishes quickly as training begins", "vanishes quickly", "its norm, after 10% over start",
             (None, 0.5), left(1)),
            (f"{place}, (iii)", "H_ww stays near-block-diagonal, by blocks", "maintains", f"{by_blocks}, at most",
             AT_MOST, worst("block_ratio_ww")),
            (f"{place}, (iii)", "H_vv stays near-block-diagonal, by blocks", "maintains", f"{by_blocks}, at most",
             AT_MOST, worst("block_ratio_vv")),
            (f"{place}, (iii)", "H_ww stays near-block-diagonal, in sum", "maintains", f"{in_sum}, at most", AT_MOST,
             worst("off_diagonal_ww")),
            (f"{place}, (iii)", "H_vv stays near-block-diagonal, in sum", "maintains", f"{in_sum}, at most", AT_MOST,
             worst("off_diagonal_vv")),
        ]
        # fmt: on
        model = f"d = C = {options.width}, m = {options.units}, N = {samples:,}, {options.repeats} runs"
        yield from as_claims(rows, model, f" ({name}).")


def of_equations(options: Options, checks: dict[str, float]) -> Iterator[Claim]:
    """Two equations as the talk has them, beside the Hessian of JAX."""
    # fmt: off
    rows: list[Row] = [
        (FORCE, "Column i of H_{w_i v_j} is a_i, which is the gradient with respect to w_i.",
         "a_i = −Σ_n Σ_c (δ − p_nc) v_ci 1(w_i·x_n ≥ 0) x_n/N", "median relative distance from it", AT_MOST,
         Measured(checks["columns_from_the_talk"], 0)),
        (FORCE, "Column i of H_{w_i v_j} is the part of class j alone, and little else.",
         "in place of a_i: Σ_n (p_nj − δ) 1(w_i·x_n ≥ 0) x_n/N", "median relative distance from it", (None, 0.2),
         Measured(checks["columns_from_ours"], 0)),
        ("Case 3, (8)", "H_{w_i w_i} of the squared error, as the talk defines it, is (8).", "no factor 2",
         "its norm over that of (8)", (0.99, 1.01), Measured(checks["equation_8_factor"], 1e-9)),
    ]
    # fmt: on
    twin_size = f"d = C = {options.twin_width}, m = {options.twin_units}, N = {10 * options.twin_width}"
    yield from as_claims(rows, twin_size)


def of_four_layers(options: Options, deep: list[Deep]) -> Iterator[Claim]:
    """Whether four layers are near-block-diagonal, which the talk shows as a map and asks to be guessed."""
    place, paper = "Guess: Hessian for Deep NNs?", "a map, without a number"
    rows: list[Row] = []
    for i, when in enumerate(("start", "end")):
        ratio, share = (mean([of(x.maps[i]) for x in deep]) for of in (block_ratio, off_diagonal))
        statement = f"Four layers are near-block-diagonal at the {when}"
        rows.append(
            (place, f"{statement}, by blocks.", paper, "another block's norm over a diagonal one's", AT_MOST, ratio)
        )
        rows.append((place, f"{statement}, in sum.", paper, "share of |H|² off the diagonal", AT_MOST, share))
    yield from as_claims(rows, f"width {options.deep_width}, N = {options.deep_samples}, {options.repeats} runs")


def as_claims(rows: list[Row], model: str, ending: str = "") -> Iterator[Claim]:
    """The claims of these rows."""
    for place, statement, paper, quantity, holds, ours in rows:
        yield Claim(TALK, place, statement + ending, paper, quantity, holds, ours.value, ours.error, model)


def tables(options: Options, runs: list[list[list[State]]], deep: list[Deep]) -> Iterator[Table]:
    """Means over the repeats after every part."""
    head = ("steps", "loss", "|H|", "|ww|", "|vv|", "columns i", "others", "off ww", "off vv", "block ww", "block vv")
    for run, samples in zip(runs, options.samples, strict=True):
        rows = []
        for i, part in enumerate(PARTS):
            found = {name: np.mean([states[i].numbers[name] for states in run]) for name in run[0][i].numbers}
            cells = [f"{value:.3g}" for name, value in found.items() if name != "structured"]
            rows.append((f"{part:.0%}", *cells))
        yield Table(head, rows, f"One hidden layer, {samples:,} samples. {HOW_TO_READ}")
    rows = []
    for i, when in enumerate(("start", "end")):
        values = (
            (x.losses[i] for x in deep),
            (off_diagonal(x.maps[i]) for x in deep),
            (block_ratio(x.maps[i]) for x in deep),
        )
        rows.append((when, *(f"{np.mean(list(x)):.3g}" for x in values)))
    yield Table(("", "loss", "off", "block"), rows, "Four layers")


def figure(options: Options, runs: list[list[list[State]]], deep: list[Deep], dense: list[Array]) -> Figure:
    """Maps of the first repeat, and the norms of the parts."""
    drawn = Figure(figsize=(15, 15), dpi=100, layout="constrained", facecolor="white")
    panels = drawn.subplots(4, 4)
    cut = options.twin_width * options.twin_units
    for i, part in enumerate(PARTS):
        draw_map(panels[0, i], dense[i] ** 2, f"entries, d = C = {options.twin_width}, {part:.0%}", cut, "parameter")
        for row, run, samples in zip(panels[1:3], runs, options.samples, strict=True):
            draw_map(row[i], run[0][i].norms.map, f"blocks, {samples:,} samples, {part:.0%}", options.units)
    for panel, squared, when in zip(panels[3], deep[0].maps, ("start", "end"), strict=False):
        draw_map(panel, squared, f"four layers, blocks, {when}")
        for layer in range(1, 4):
            for line in (panel.axhline, panel.axvline):
                line(layer * options.deep_width - 0.5, color="white", linewidth=0.6)
    for panel, run, samples in zip(panels[3, 2:], runs, options.samples, strict=True):
        draw_parts(panel, run[0], f"{samples:,} samples")
    for row in panels:
        drawn.colorbar(row[0].images[0], ax=list(row), label="over the largest", shrink=0.9)
    return drawn


def draw_parts(panel: Axes, states: list[State], title: str) -> None:
    """Norms against the part of the training."""
    names = {
        "norm_ww": "H_ww",
        "norm_vv": "H_vv",
        "norm_columns_i": "H_wv, columns i",
        "norm_others": "H_wv, others",
    }
    found = [state.numbers for state in states]
    for (name, label), color in zip(names.items(), ("#0072B2", "#E69F00", "#D55E00", "#009E73"), strict=True):
        panel.plot([100 * part for part in PARTS], [x[name] for x in found], "o-", ms=4, color=color, label=label)
    panel.plot([100 * part for part in PARTS], [x["loss"] for x in found], "k:", label="loss, nats")
    panel.set(xlabel="% of the steps", ylabel="Frobenius norm", yscale="log")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.legend(fontsize=8, framealpha=0.6)


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
