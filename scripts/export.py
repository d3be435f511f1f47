"""A run for other tools: spectrum.csv and quadrature.json, and its eigenvectors by Hugging Face parameter names."""

from __future__ import annotations

if __name__ == "__main__":
    import interruptible  # noqa: F401

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from convert.by_name import save_directions
from jaxhess.command import one_sentence
from jaxhess.errors import InputError
from jaxhess.files.output import Content, Output
from jaxhess.files.run_folder import EIGENVECTORS, EXPORTED_VECTORS, EXPORTS
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.models import DecoderConfig, abstract_params
from jaxhess.operators.restriction import Restriction, recorded_restriction
from jaxhess.slq.spectrum import Spectrum


@dataclasses.dataclass(frozen=True)
class Options:
    """In the run's own folder earlier exports are replaced: they hold what the run holds."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or a file that `jaxhess.files.foreign` reads."""
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
    found = spectrum.info.get("eigenpairs") if options.run.is_dir() else None
    contents: dict[str, Content] = {}
    if found:
        pairs = Eigenpairs.load(options.run / EIGENVECTORS)
        config = _config(spectrum.info, options.run)
        block = _block(spectrum.info, config)
        contents[EXPORTED_VECTORS] = lambda file: save_directions(pairs, config, file, block)
    contents["spectrum.csv"] = spectrum.to_csv().encode()
    contents["quadrature.json"] = spectrum.to_json().encode()
    own = options.run.is_dir() and out.is_dir() and out.samefile(options.run)
    if any(file.exists() and file.samefile(options.run) for file in (out / name for name in contents)):
        raise InputError(f"{options.run} is what is to be exported: give another folder as --out.")
    with Output(out, contents, own or options.overwrite, stale=EXPORTS) as output:
        if found:
            output.write({EXPORTED_VECTORS: contents[EXPORTED_VECTORS]})  # where these fail, nothing else is written
        output.write({name: content for name, content in contents.items() if name != EXPORTED_VECTORS})
    return [out / name for name in contents]


def _config(info: dict[str, Any], run: Path) -> DecoderConfig:
    """The decoder that the run's record describes."""
    try:
        return DecoderConfig.from_dict(info["model"]["config"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"The record of {run} does not describe its model ({error}).") from None


def _block(info: dict[str, Any], config: DecoderConfig) -> Restriction | None:
    """The block that the run was restricted to, from the record."""
    recorded = info.get("operator", {}).get("restriction")
    return None if recorded is None else recorded_restriction(abstract_params(config), recorded)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        for path in run(options):
            print(path)


if __name__ == "__main__":
    main()
