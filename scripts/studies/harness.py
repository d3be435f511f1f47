"""What all studies share: options, the model and its text, and where the result goes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as ConsoleTable

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import default_folder, one_sentence, terminal
from jaxhess.data import TokenBlocks
from jaxhess.distributed.mesh import parse_axes
from jaxhess.files.output import Output
from jaxhess.results.figures import png
from jaxhess.results.page import Picture, Table
from jaxhess.results.study import PAGE, RECORD, Study, study_files, verdict_count

TINY = Path(__file__).parents[1] / "tiny"
HESSFORMER = "HessFormer: Hessians at Foundation Scale (arXiv 2505.11564)"
FOUNDATION = (
    "Hessian Spectral Analysis at Foundation Model Scale (arXiv 2602.00816; cited from its abstract and a summary)"
)
"""Places are headings of the summary, with what it names of the paper."""
TALK = "Towards Quantifying the Hessian Structure of Neural Networks (slides of a talk by Y. Zhang, June 2025)"
ADAM_MINI = "Adam-mini: Use Fewer Learning Rates To Gain More (arXiv 2406.16793; cited from its code and the README)"
SHARPNESS = (
    "The Sharpness Disparity Principle in Transformers (arXiv 2502.19002; cited from its abstract and its README)"
)
TAIL = (
    "Heavy-Tailed Class Imbalance and Why Adam Outperforms Gradient Descent (arXiv 2402.19449; cited from its abstract)"
)
NEED_ADAM = (
    "Why Transformers Need Adam: A Hessian Perspective (arXiv 2402.16788; cited from its abstract and that talk)"
)


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """Where a study goes."""

    out: Path | None = None
    """Folder for study.html, study.json and the figures; by default runs/<date>-<study>."""
    overwrite: bool = False
    """Replace a finished study in that folder; files that no such command wrote are never replaced."""


@dataclasses.dataclass(frozen=True)
class ModelOptions(StudyOptions):
    """A language model and its text."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]."""
    seq_len: int = 64
    """Predicted tokens per sequence."""
    sequences: int = 2
    """Sequences taken from the start of the data."""
    microbatch: int = 2
    """Sequences whose activations exist at once."""
    seed: int = 0
    """Seed of the random vector."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8, of the first devices; by default fsdp over all of them."""

    def blocks(self) -> TokenBlocks:
        """The text, once the model is known to take it."""
        config = convert.load_config(self.model, None)
        config.check_length(self.seq_len)
        sizes: Any = {"seq_len": self.seq_len, "vocab_size": config.vocab_size, "sequences": self.sequences}
        return load_blocks(self.data, self.model, **sizes, seed=self.seed)

    def hessian(self, blocks: TokenBlocks, dtype: str) -> jaxhess.Hessian:
        """The Hessian of the model with weights and computation in this dtype."""
        mesh = make_mesh(self.mesh)
        model = convert.load(self.model, mesh=mesh, dtype=dtype)
        batches = jaxhess.Microbatches(blocks.microbatches(self.microbatch, mesh))
        return jaxhess.Hessian(model.loss(), model.params, batches)

    def described(self, hessian: jaxhess.Hessian) -> str:
        """The model and its text, for the column "on"."""
        return f"{Path(self.model).name}, {hessian.dim:,} parameters, {self.sequences} x {self.seq_len} tokens"


AnyOptions = TypeVar("AnyOptions", bound=StudyOptions)


def make_mesh(axes: str | None) -> jax.sharding.Mesh:
    """The mesh over as many devices as it needs."""
    return jaxhess.make_mesh(axes, None if axes is None else jax.devices()[: math.prod(parse_axes(axes).values())])


def run(name: str, study: Callable[[AnyOptions], Study], options: AnyOptions) -> Study:
    """Makes the study and writes it into its folder, which is claimed before the work; prints claims and tables."""
    out = options.out or default_folder(name.replace("_", "-"))
    began = time.perf_counter()
    with Output(out, (RECORD, PAGE, f"{name}.png"), options.overwrite) as output:
        found = study(options)
        record = {"options": dataclasses.asdict(options), **found.record, "seconds": time.perf_counter() - began}
        found = dataclasses.replace(found, record=record)
        output.write(study_files(found))
    console = terminal()
    for table in found.tables:
        show(console, table)
    for c in found.claims:
        console.print(f"{c.verdict.upper()}: {c.statement} (Measured: {c.quantity}: {c.value_text}, {c.reason}.)")
    console.print(f"{verdict_count(found.claims)} {out / PAGE} has them with their figures.")
    return found


def show(console: Console, table: Table) -> None:
    """Prints a page's table."""
    shown = ConsoleTable(*table.head, title=table.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in table.rows:
        shown.add_row(*map(str, row))
    console.print(shown)


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """The figure of a study; `name` is the study's, for the file."""
    return Picture(name, png(figure), caption)


def command(
    name: str, study: Callable[[AnyOptions], Study], options: type[AnyOptions], description: str | None
) -> None:
    """The command of a study: reads the options and runs it."""
    chosen = tyro.cli(options, description=description)
    with one_sentence():
        run(name, study, chosen)
