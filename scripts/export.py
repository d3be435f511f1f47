"""A run for other tools: spectrum.csv and quadrature.json, and its eigenvectors by Hugging Face parameter names.

Those of a preconditioned run are no directions of the weights, and are left out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from convert.named_parameters import save_directions
from jaxhess.command import one_sentence
from jaxhess.errors import InputError
from jaxhess.files.output import Content, Output
from jaxhess.files.run_folder import EIGENVECTORS, EXPORTED_VECTORS, EXPORTS
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.models import DecoderConfig, abstract_params
from jaxhess.operators.restriction import Restriction, restriction
from jaxhess.results.foreign import to_csv, to_json
from jaxhess.results.old_runs import block_of_old_text
from jaxhess.slq.record import RunRecord
from jaxhess.slq.spectrum import Spectrum


@dataclasses.dataclass(frozen=True)
class Options:
    """In the run's own folder earlier exports are replaced: they hold what the run holds."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a file that `jaxhess.results.foreign` reads."""
    out: Path | None = None
    """Folder to write into; by default the run folder. For a file it must be given."""
    dim: int | None = None
    """Parameters of the model, for a file that does not say."""
    overwrite: bool = False
    """Replace what an earlier export has left in another folder."""


def run(options: Options) -> list[Path]:
    """Writes the files; returns which."""
    if options.out is None and options.run.is_file():
        raise InputError(f"{options.run} is a file: give --out, a folder for spectrum.csv and quadrature.json.")
    spectrum = Spectrum.load(options.run, options.dim)
    out = options.out or options.run
    weights = spectrum.run.operator is None or spectrum.run.operator.kind != "Preconditioned"
    found = spectrum.run.eigenpairs if options.run.is_dir() and weights else None
    contents: dict[str, Content] = {}
    if found:
        pairs = Eigenpairs.load(options.run / EIGENVECTORS)
        config = _config(spectrum.run, options.run)
        block = _block(spectrum.run, config)
        contents[EXPORTED_VECTORS] = lambda file: save_directions(pairs, config, file, block)
    contents["spectrum.csv"] = to_csv(spectrum).encode()
    contents["quadrature.json"] = to_json(spectrum).encode()
    own = options.run.is_dir() and out.is_dir() and out.samefile(options.run)
    if any(file.exists() and file.samefile(options.run) for file in (out / name for name in contents)):
        raise InputError(f"{options.run} is what is to be exported: give another folder as --out.")
    with Output(out, contents, own or options.overwrite, stale=EXPORTS) as output:
        if found:
            output.write({EXPORTED_VECTORS: contents[EXPORTED_VECTORS]})  # where these fail, nothing else is written
        output.write({name: content for name, content in contents.items() if name != EXPORTED_VECTORS})
    return [out / name for name in contents]


def _config(run: RunRecord, folder: Path) -> DecoderConfig:
    """The decoder that the run's record describes."""
    if run.job is None or run.job.model is None:
        raise InputError(f"The record of {folder} does not describe its model.")
    try:
        return DecoderConfig.from_dict(run.job.model.config)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The record of {folder} does not describe its model ({error}).") from error


def _block(run: RunRecord, config: DecoderConfig) -> Restriction | None:
    """The block that the run was restricted to."""
    block = run.operator.restriction if run.operator else None
    if isinstance(block, str):
        block = block_of_old_text(block)
    return None if block is None else restriction(abstract_params(config), block.patterns, block.layers, config.stacks)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        for path in run(options):
            print(path)


if __name__ == "__main__":
    main()
