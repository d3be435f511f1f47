"""Any number of spectra side by side: extremes, moments, distances, and what chance in their probes explains.

A spectrum is a run folder, or a file of another tool: `jaxhess.results.foreign` says which are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxhess.command import default_folder, one_sentence, terminal
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready
from jaxhess.results.comparison import ComparisonRow, Distance, densities_figure, distance, row, stems_figure
from jaxhess.results.figures import png
from jaxhess.results.foreign import UnknownDimension
from jaxhess.slq.spectrum import Spectrum

FILES = RECORD, DENSITIES, STEMS = ("comparison.json", "densities.png", "stems.png")


@dataclasses.dataclass(frozen=True)
class Options:
    """The first spectrum is what the others are compared with."""

    spectra: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or files of other tools."""
    dim: int | None = None
    """Parameters of the model, for files that do not say; by default those of the first folder or file that does."""
    out: Path | None = None
    """Folder for comparison.json, densities.png and stems.png; by default runs/<date>-compare."""
    overwrite: bool = False
    """Replace a comparison in that folder; files that no such command wrote are never replaced."""


def run(options: Options) -> dict[str, Any]:
    """The whole comparison; returns what it also saved."""
    if not options.spectra:
        raise InputError("Give at least one run folder or file.")
    out = options.out or default_folder("compare")
    with Output(out, FILES, options.overwrite) as output:
        labels = names(options.spectra)
        spectra = load(options)
        rows = [row(label, s) for label, s in zip(labels, spectra, strict=True)]
        distances = [distance(spectra[0], s) for s in spectra[1:]]
        record = {
            "spectra": [
                {**dataclasses.asdict(r), "moments": [m.to_dict() for m in r.moments], "path": str(p)}
                for r, p in zip(rows, options.spectra, strict=True)
            ],
            "distances_from_the_first": [{**d._asdict(), "same": d.same} for d in distances],
        }
        text = json.dumps(json_ready(record), indent=2, allow_nan=False) + "\n"
        figures = densities_figure(spectra, labels), stems_figure(spectra, labels)
        output.write({DENSITIES: png(figures[0]), STEMS: png(figures[1]), RECORD: text.encode()})
    show(terminal(), rows, distances, spectra)
    print(f"{out} has {DENSITIES}, {STEMS} and {RECORD}.")
    return record


def load(options: Options) -> list[Spectrum]:
    """The spectra; where a file does not say how many parameters, --dim does, or the first spectrum that knows."""
    loaded: list[Spectrum | None] = []
    for path in options.spectra:
        try:
            loaded.append(Spectrum.load(path))
        except UnknownDimension:
            loaded.append(None)
    known = options.dim or next((s.dim for s in loaded if s is not None), None)
    return [Spectrum.load(p, known) if s is None else s for p, s in zip(options.spectra, loaded, strict=True)]


def names(paths: tuple[Path, ...]) -> list[str]:
    """Short labels: the last part of each path, more of it or a number where two would be the same."""
    short = [path.name for path in paths]
    if len(set(short)) < len(short):
        short = [str(path) for path in paths]
    return [f"{name} ({i})" if short.count(name) > 1 else name for i, name in enumerate(short, 1)]


def show(console: Console, rows: list[ComparisonRow], distances: list[Distance], spectra: list[Spectrum]) -> None:
    """Both tables."""
    most = max(len(r.moments) for r in rows)
    table = Table("", "probes x steps", "smallest", "largest", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k in range(1, most + 1):
        table.add_column("mean eigenvalue" if k == 1 else f"moment {k}")
    for r, s in zip(rows, spectra, strict=True):
        moments = [str(m) for m in r.moments]
        table.add_row(r.label, f"{s.num_probes} x {s.num_steps}", f"{r.smallest:.5g}", f"{r.largest:.5g}", *moments)
    console.print(table)
    for r, d in zip(rows[1:], distances, strict=True):
        chance = "chance unknown: no spectrum has two probes" if math.isnan(d.chance) else f"by chance {d.chance:.2g}"
        verdict = {None: "", True: ": the same, as far as these probes tell", False: ": different"}[d.same]
        console.print(
            f"{rows[0].label} to {r.label}: Wasserstein-1 distance {d.wasserstein:.3g} over {d.steps} steps, {chance}, "
            f"mean |eigenvalue| {d.scale:.3g}{verdict}."
        )


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
