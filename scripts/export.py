"""A run for other tools: spectrum.csv and quadrature.json, and its eigenvectors by Hugging Face parameter names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from convert.by_name import save_directions
from jaxhess.command import one_sentence
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.models import DecoderConfig, abstract_params
from jaxhess.operators.restriction import Restriction, restriction
from jaxhess.run_folder import refuse_unusable
from jaxhess.spectra import Spectrum

VECTORS = "eigenvectors.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """In the run's own folder files that are there are replaced: they hold what the run holds."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a file that `jaxhess.interchange` reads."""
    out: Path | None = None
    """Folder to write into; by default the run folder. For a file it must be given."""
    dim: int | None = None
    """Parameters of the model, for a file that does not say."""
    overwrite: bool = False
    """Replace what an earlier export has left in another folder."""


def run(options: Options) -> list[Path]:
    """Writes the files; returns which."""
    if options.out is None and options.run.is_file():
        raise ValueError(f"{options.run} is a file: give --out, a folder for spectrum.csv and quadrature.json.")
    spectrum = Spectrum.load(options.run, options.dim)
    out = options.out or options.run
    found = spectrum.info.get("eigenpairs") if options.run.is_dir() else None
    contents: dict[str, Callable[[Path], object]] = {}
    if found:  # first, for they are what can fail
        pairs = Eigenpairs.load(options.run / found["vectors"])
        config = DecoderConfig.from_dict(spectrum.info["model"]["config"])
        block = _block(spectrum.info, config)
        contents[VECTORS] = lambda file: save_directions(pairs, config, file, block)
    contents["spectrum.csv"] = lambda file: file.write_text(spectrum.to_csv(), encoding="utf-8")
    contents["quadrature.json"] = lambda file: file.write_text(spectrum.to_json(), encoding="utf-8")
    own = options.run.is_dir() and out.is_dir() and out.samefile(options.run)
    if any(file.exists() and file.samefile(options.run) for file in (out / name for name in contents)):
        raise ValueError(f"{options.run} is what is to be exported: give another folder as --out.")
    for name in contents:
        refuse_unusable(out, own or options.overwrite, marker=name)
    out.mkdir(parents=True, exist_ok=True)
    for name, write in contents.items():
        write(out / name)
    return [out / name for name in contents]


def _block(info: dict[str, Any], config: DecoderConfig) -> Restriction | None:
    """The block that the run was restricted to, from its description in the record."""
    described = info.get("operator", {}).get("restriction")
    if described is None:
        return None
    patterns, _, layers = described.partition(" in layers ")
    return restriction(abstract_params(config), patterns.split(), map(int, layers.split(",")) if layers else None)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        for path in run(options):
            print(path)


if __name__ == "__main__":
    main()
