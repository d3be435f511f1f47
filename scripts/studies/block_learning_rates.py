"""One learning rate per block of the Hessian (Adam-mini) against AdamW: loss after equal steps, and memory.

    python -m scripts.studies.block_learning_rates

With no options: a small decoder of the bytes of the text in scripts/tiny, from three seeds. All optimizers have the
same hyperparameters. What would refute the claims: blocks of the Hessian that learn at least a fiftieth less than AdamW
at the learning rate that is best for AdamW; whole arrays that do as well as these blocks; second moments that still
take more than a tenth of AdamW's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

import jaxhess
from jaxhess.models import abstract_params
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Study
from scripts.studies.harness import ADAM_MINI, TALK, TINY, StudyOptions, command, picture
from scripts.training.block_adam import adamw, authors_blocks, block_adamw, hessian_blocks
from scripts.training.short_runs import Optimizer, Sweep, check_runs, mean_loss, missed, over_seeds, sweep
from scripts.training.small_decoder import byte_batch, byte_config, decoder_problem

NAME = "block_learning_rates"
ON_PAR = 0.02
"""Share of AdamW's reduction of the loss that an optimizer on a par with it may miss. Set before the measurement."""
ADAMW, HESSIAN, AUTHORS, ARRAYS = "AdamW", "blocks of the Hessian", "the authors' code", "whole arrays"
COLORS = {ADAMW: "#000000", HESSIAN: "#0072B2", AUTHORS: "#009E73", ARRAYS: "#D55E00"}
MARKERS = {ADAMW: "o", HESSIAN: "s", AUTHORS: "^", ARRAYS: "D"}
NOTE = """Left: loss on the training data after equal steps, mean over seeds with its 95% interval. Right: the same
without what is common to all runs of a seed: the share of AdamW's reduction of the loss, at the same learning rate,
that is missed; the band is what counts as on a par."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The decoder and its training."""

    text: Path = TINY / "sample.txt"
    """Text whose bytes are predicted."""
    width: int = 16
    """Of the residual stream."""
    layers: int = 2
    """Of the decoder."""
    heads: int = 2
    """Attention heads; 8 times these divide the width."""
    seq_len: int = 32
    """Predicted bytes of a sequence."""
    sequences: int = 768
    """Of the text's beginning, to train on."""
    batch: int = 8
    """Sequences of a step."""
    seeds: int = 3
    """Independent initial weights and orders of the data; errors are over these."""
    train_steps: int = 200
    """Training steps."""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 0.1)
    """Learning rates, the same for all optimizers."""


SMALL = Options(layers=1, sequences=128, seeds=2, train_steps=40, rates=(1e-2, 3e-2, 0.1))


def study(options: Options) -> Study:
    """All partitions."""
    check_runs(options.seeds, options.train_steps, options.rates)
    config = byte_config(options.width, options.layers, options.heads, options.seq_len)
    problem = decoder_problem(config, byte_batch(options.text, options.seq_len, options.sequences), options.batch)
    like = abstract_params(config)
    optimizers, entries = partitions(like)
    seeds = range(options.seeds)
    found = {
        name: sweep(problem, optimizer, options.rates, seeds, options.train_steps)
        for name, optimizer in optimizers.items()
    }
    initial = np.array([mean_loss(problem, problem.initial(seed)) for seed in seeds])
    parameters = entries[ADAMW]
    model = f"decoder of bytes, {parameters:,} parameters, {options.train_steps} steps"
    return Study(
        "One learning rate per block of the Hessian",
        tuple(claims(found, initial, entries, model)),
        (table(found, initial, entries),),
        (picture(NAME, figure(found, initial), NOTE),),
        {
            "parameters": parameters,
            "second_moments": entries,
            "initial_losses": initial.tolist(),
            "losses": {name: runs.losses.tolist() for name, runs in found.items()},
        },
    )


def partitions(like: jaxhess.operators.base.Vector) -> tuple[dict[str, Optimizer], dict[str, int]]:
    """Every optimizer, and how many second moments it keeps."""
    blocks = {
        HESSIAN: hessian_blocks(like),
        AUTHORS: authors_blocks(like),
        ARRAYS: jaxhess.Blocks.by(like, "matrices"),
    }
    rules: dict[str, Optimizer] = {name: functools.partial(block_adamw, blocks=b) for name, b in blocks.items()}
    entries = {name: len(b) for name, b in blocks.items()}
    return {ADAMW: adamw, **rules}, {ADAMW: sum(x.size for x in jax.tree.leaves(like)), **entries}


def claims(
    found: dict[str, Sweep], initial: npt.NDArray[np.float64], entries: dict[str, int], model: str
) -> Iterator[Claim]:
    """What the talk and the authors' code say of Adam-mini, at the learning rate that is best for AdamW."""
    reference = found[ADAMW]
    rate = reference.rates[reference.best]
    at_end = f"AdamW's best learning rate, {rate:g}, is the last of those tried" if reference.at_an_end else ""
    losses = {name: runs.at(rate) for name, runs in found.items()}
    share = "share of AdamW's reduction of the loss that is missed, at the learning rate best for AdamW"
    for name in (HESSIAN, AUTHORS):
        value, error = over_seeds(missed(losses[name], losses[ADAMW], initial))
        yield Claim(TALK, "Part IV, Implication II: Adam-mini, scaling laws",
                    "Adam-mini performs as AdamW with the same hyperparameters.", "same performance",
                    f"{share}; {name}", (None, ON_PAR), value, error, model, at_end)  # fmt: skip
    value, error = over_seeds(missed(losses[ARRAYS], losses[HESSIAN], initial))
    yield Claim(ADAM_MINI, "README, principle (1)", "Blocks must follow the structure of the Hessian.",
                "carefully partition", "share of the loss reduction with blocks of the Hessian that whole arrays miss",
                (0, None), value, error, model, at_end)  # fmt: skip
    for name in (HESSIAN, AUTHORS):
        saved = 0.5 * (1 - entries[name] / entries[ADAMW])
        kept = f"embedding and head keep {entries[name] / entries[ADAMW]:.0%} of the second moments of so small a model"
        yield Claim(ADAM_MINI, "README", "Adam-mini has 45% to 50% less optimizer state than AdamW.", "45% to 50%",
                    f"share of both moments' entries that is saved; {name}", (0.45, 0.5), saved, 0.0, model,
                    kept if name == AUTHORS else "")  # fmt: skip


def table(found: dict[str, Sweep], initial: npt.NDArray[np.float64], entries: dict[str, int]) -> Table:
    """Losses at every rate."""
    rates = found[ADAMW].rates
    head = ("second moments per", "how many", *(f"loss at rate {rate:g}" for rate in rates))
    rows = []
    for name, runs in found.items():
        cells = []
        for row in runs.losses:
            value, error = over_seeds(row)
            cells.append(f"{value:.4f} ± {error:.1g}" if math.isfinite(value) else "diverged")
        rows.append(("parameter (AdamW)" if name == ADAMW else name, f"{entries[name]:,}", *cells))
    before, error = over_seeds(initial)
    return Table(head, rows, f"Training loss (nats per byte) after equal steps; before: {before:.3f} ± {error:.1g}")


def figure(found: dict[str, Sweep], initial: npt.NDArray[np.float64]) -> Figure:
    """Losses, and what is missed beside AdamW, against the learning rate."""
    drawn = Figure(figsize=(12, 4.8), dpi=120, layout="constrained", facecolor="white")
    left, right = drawn.subplots(1, 2)
    for k, (name, runs) in enumerate(found.items()):
        style = {"color": COLORS[name], "marker": MARKERS[name], "ms": 5, "capsize": 3, "label": name}
        rates = np.array(runs.rates) * 1.03 ** (k - 1.5)  # beside each other
        losses = [over_seeds(row) for row in runs.losses]
        left.errorbar(rates, *zip(*losses, strict=True), **style)
        shares = [over_seeds(missed(a, b, initial)) for a, b in zip(runs.losses, found[ADAMW].losses, strict=True)]
        if name != ADAMW:
            right.errorbar(rates, *zip(*shares, strict=True), **style)
    left.set(xlabel="peak learning rate", ylabel="training loss (nats per byte)", xscale="log")
    right.set(xlabel="peak learning rate", ylabel="share of AdamW's reduction missed", xscale="log")
    right.axhspan(-ON_PAR, ON_PAR, color="#f2e8cf", zorder=0, label="on a par")
    right.axhline(0, color="black", linewidth=0.8)
    for panel in (left, right):
        panel.set_xticks(found[ADAMW].rates, [f"{rate:g}" for rate in found[ADAMW].rates])
        panel.minorticks_off()
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=9, frameon=False)
    return drawn


def main() -> None:
    """Reads the options and runs."""
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
