"""A run for other tools: spectrum.csv and quadrature.json, and its eigenvectors by Hugging Face parameter names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from convert.by_name import save_directions
from jaxhess.command import one_sentence
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.models import DecoderConfig
from jaxhess.spectra import Spectrum


@dataclasses.dataclass(frozen=True)
class Options:
    """Files that are there are replaced: they hold what the run holds."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a file that `jaxhess.interchange` reads."""
    out: Path | None = None
    """Folder to write into; by default the run folder, or that of the file."""
    dim: int | None = None
    """Parameters of the model, for a file that does not say."""


def run(options: Options) -> list[Path]:
    """Writes the files; returns which."""
    spectrum = Spectrum.load(options.run, options.dim)
    out = options.out or (options.run if options.run.is_dir() else options.run.parent)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "spectrum.csv", out / "quadrature.json"]
    written[0].write_text(spectrum.to_csv(), encoding="utf-8")
    written[1].write_text(spectrum.to_json(), encoding="utf-8")
    found = spectrum.info.get("eigenpairs")
    if found:
        pairs = Eigenpairs.load(options.run / found["vectors"])
        written.append(out / "eigenvectors.safetensors")
        save_directions(pairs, DecoderConfig.from_dict(spectrum.info["model"]["config"]), written[-1])
    return written


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        for path in run(options):
            print(path)


if __name__ == "__main__":
    main()
