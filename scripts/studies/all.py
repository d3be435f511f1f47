"""All studies at a small size, and an index of all claims of the papers with their verdicts.

    python -m scripts.studies.all

A few minutes on two cores: sizes are `SMALL` of every study. Programs are compiled with few optimisations, in which
operations are the same and times are not those of the studies alone.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import tyro

from jaxhess.command import compile_quickly, default_folder, one_sentence, simulated_devices, terminal
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.results.study import index_page, verdict_count
from scripts.studies.harness import StudyOptions, run

INDEX = "index.html"
STUDIES = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - {"all", "harness"})
"""Every other file of this folder."""


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """The index goes to --out, every study to a folder in it."""

    out: Path | None = None
    """Folder for index.html and a folder for each study; by default runs/<date>-studies."""
    only: tuple[str, ...] = ()
    """Names of studies; by default all."""


def make(options: Options) -> Path:
    """Runs the studies; returns the path of the index."""
    if unknown := set(options.only) - set(STUDIES):
        raise InputError(f"--only {' '.join(sorted(unknown))}: the studies are {', '.join(STUDIES)}.")
    out = options.out or default_folder("studies")
    with Output(out, (INDEX,), options.overwrite) as output:
        found = {}
        for name in options.only or STUDIES:
            module = importlib.import_module(f"scripts.studies.{name}")
            chosen = dataclasses.replace(module.SMALL, out=out / name, overwrite=options.overwrite)
            found[name] = run(name, module.study, chosen)
        output.write({INDEX: index_page(found).encode()})
    claims = [claim for study in found.values() for claim in study.claims]
    terminal().print(f"{out / INDEX}: {verdict_count(claims)}")
    return out / INDEX


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    compile_quickly()
    with one_sentence():
        simulated_devices(4)
        make(options)


if __name__ == "__main__":
    main()
