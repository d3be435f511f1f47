"""The two files of a finished run: an array file and a JSON record, each whole or absent."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import (
    ARRAYS,
    EXPORTS,
    FORMAT,
    FORMATS,
    OLD_FORMAT,
    RECORD,
    REPORT_FILES,
    json_ready,
    read_arrays,
    read_json,
)
from jaxhess.files.typed import read_as
from jaxhess.results.foreign import read_spectrum
from jaxhess.results.old_runs import record_of_old_run, rounding_of_old_run, warn_of_narrow_vectors
from jaxhess.results.summary import summary
from jaxhess.slq.record import RunRecord
from jaxhess.slq.spectrum import Spectrum

NAMES = ("ritz_values", "weights", "residual_bounds", "error_bounds", "ghosts")
INPUT_ARRAYS = ("alphas", "betas", "sizes", "dim", "step_errors")
FORMS = "microbatch_forms"


def save(spectrum: Spectrum, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Writes `spectrum.npz` and `spectrum.json` into the folder, created if missing; the JSON last.

    Each file appears whole or not at all, and a folder with `spectrum.json` is a finished run. With `overwrite` the
    old run goes, with its report and exports; files that the library did not write stay, and are never replaced.

    Raises:
        InputError: The folder holds a finished run and `overwrite` is False, or files of these names that the library
            did not write; the folder cannot be written. What could be saved elsewhere is, and the message says where.
    """
    with Output(folder, (ARRAYS, RECORD), overwrite, stale=(*REPORT_FILES, *EXPORTS)) as output:
        output.write(contents(spectrum))


def contents(spectrum: Spectrum) -> dict[str, bytes]:
    """The two files that `save` writes, by name."""
    run = json_ready(dataclasses.asdict(spectrum.run))
    record = {"format": FORMAT, "run": run, "info": spectrum.info, "summary": summary(spectrum)}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: getattr(spectrum, name) for name in (*NAMES, *INPUT_ARRAYS, FORMS)})
    return {ARRAYS: buffer.getvalue(), RECORD: (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()}


def load(path: str | os.PathLike[str], dim: int | None = None) -> Spectrum:
    """The spectrum that `save` wrote; what follows from alphas and betas is computed again.

    A folder of an earlier version is read as `jaxhess.results.old_runs` says, a file as `jaxhess.results.foreign` says:
    JSON, CSV or npz of Ritz values and weights.

    Args:
        path: A run folder, or such a file.
        dim: Number of parameters, for a file that does not say.

    Raises:
        InputError: The folder, one of its two files, or the file is missing; a file is corrupt or of another format;
            the number of parameters is missing, or another.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix:
        return read_spectrum(path, dim)
    _check_there(path)
    try:
        record = read_json(path / RECORD)
        found = record.get("format") if isinstance(record, dict) else None
        if found not in FORMATS:
            raise InputError(f"its format is {found!r:.100}, not {FORMAT!r}")
        info = record.get("info", {})
        if not isinstance(info, dict):
            raise InputError(f"its info is {info!r:.60}; it is an object")
        if found == OLD_FORMAT:
            run, left = record_of_old_run(record.get("run"), info)
        else:
            run, left = read_as(RunRecord, record.get("run")), info
    except ValueError as error:
        raise InputError(f"{path / RECORD} is not a spectrum record: {error}") from None
    try:
        arrays = read_arrays(path / ARRAYS)
        if found == OLD_FORMAT:
            run = dataclasses.replace(run, rounding=rounding_of_old_run(arrays))
            warn_of_narrow_vectors(path, info, arrays)
            arrays.setdefault("step_errors", np.zeros(0))
        alphas, betas, sizes, rows, errors = (arrays[name] for name in INPUT_ARRAYS)
        forms = arrays.get(FORMS, np.zeros(0))  # runs of earlier versions have none
        known: Any = {"step_errors": errors, FORMS: forms}
        return Spectrum(alphas, betas, sizes, int(rows), left, run=run, **known)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{path / ARRAYS} is corrupt or not a spectrum: {error}") from None


def _check_there(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: a finished run folder holds {RECORD} and {ARRAYS}")
    for path in (folder / RECORD, folder / ARRAYS):
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise InputError(f"{path} {what}: a finished run folder holds {RECORD} and {ARRAYS}")
