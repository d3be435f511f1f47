"""The two files of a finished run over blocks: an array file and a JSON record."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxhess.errors import InputError
from jaxhess.files.run_folder import BLOCK_ARRAYS, BLOCK_FORMAT, BLOCK_RECORD, json_ready, read_arrays, read_json
from jaxhess.files.typed import read_as
from jaxhess.slq.record import RunRecord
from jaxhess.slq.spectrum import Spectrum
from jaxhess.structure.coupling import CouplingMap
from jaxhess.structure.distances import jensen_shannon, noise_floor
from jaxhess.structure.spectra import BlockSpectra

MAP_ARRAYS = ("lengths", "forms", "fidelity_error", "fidelity_cosine", "whole_error", "whole_cosine")


class BlockRun(NamedTuple):
    """What a run over blocks found.

    Attributes:
        record: How it was made, of both parts.
        coupling: None where no map was asked for.
        spectra: None where no spectra were asked for.
    """

    record: RunRecord
    coupling: CouplingMap | None
    spectra: BlockSpectra | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the blocks."""
        found = self.coupling or self.spectra
        assert found is not None
        return found.names

    @property
    def sizes(self) -> np.ndarray:
        """[B] parameters of each block."""
        found = self.coupling or self.spectra
        assert found is not None
        return found.sizes


def contents(run: BlockRun) -> dict[str, bytes]:
    """The two files, by name.

    `blocks.npz` has `names` and `sizes` [B]; of the map `coupling` and `coupling_error` [B, B] (Frobenius norms),
    `trace` and `trace_error` [B], and the arrays of `CouplingMap`; of the spectra `alphas`, `betas`, `step_errors`
    [B, probes, steps], `steps` and `orthogonality` [B, probes], and the Jensen-Shannon `distance` and
    `normalised_distance` [B, B] with their `_floor` [B].
    """
    arrays: dict[str, Any] = {"names": np.array(run.names), "sizes": run.sizes}
    lanczos = dataclasses.replace(run.record.lanczos, orthogonality=None)  # of each block: an array
    described = dataclasses.replace(run.record, lanczos=lanczos)
    record: dict[str, Any] = {"format": BLOCK_FORMAT, "run": json_ready(dataclasses.asdict(described))}
    if run.coupling is not None:
        trace = run.coupling.trace()
        arrays |= {name: getattr(run.coupling, name) for name in ("coupling", "coupling_error", *MAP_ARRAYS)}
        arrays |= {"trace": [e.value for e in trace], "trace_error": [e.standard_error for e in trace]}
        norm, error = run.coupling.frobenius_norm(), run.coupling.relative_error(np.eye(len(run.names), dtype=bool))
        record["map"] = {
            "probes": len(run.coupling.forms),
            "distribution": run.coupling.distribution,
            "frobenius_norm": json_ready(norm.to_dict()),
            "block_diagonal_error": json_ready(error.to_dict()),
        }
    if run.spectra is not None:
        found = run.spectra.spectra
        arrays |= {"alphas": run.spectra.alphas, "betas": run.spectra.betas}
        arrays["step_errors"] = np.array([s.step_errors for s in found])
        arrays["steps"] = np.array([s.sizes for s in found])
        measured = [s.run.lanczos.orthogonality or (None,) * s.num_probes for s in found]
        arrays["orthogonality"] = np.array([[np.nan if x is None else x for x in row] for row in measured])
        for name, normalised in (("distance", False), ("normalised_distance", True)):
            arrays[name], arrays[f"{name}_floor"] = jensen_shannon(found, normalised), noise_floor(found, normalised)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return {
        BLOCK_ARRAYS: buffer.getvalue(),
        BLOCK_RECORD: (json.dumps(record, indent=2, allow_nan=False) + "\n").encode(),
    }


def load(folder: str | os.PathLike[str]) -> BlockRun:
    """The run that `scripts/blocks.py` wrote into this folder.

    Examples:
        >>> from jaxhess.results import block_files
        >>> run = block_files.load("runs/blocks")  # doctest: +SKIP
        >>> run.coupling.relative, run.spectra["head"].trace()  # doctest: +SKIP

    Raises:
        InputError: The folder or one of its two files is missing, damaged, or of another format.
    """
    folder = Path(folder)
    for path in (folder / BLOCK_RECORD, folder / BLOCK_ARRAYS):
        if not path.is_file():
            raise InputError(f"{path} does not exist: a run over blocks has {BLOCK_RECORD} and {BLOCK_ARRAYS}.")
    try:
        record = read_json(folder / BLOCK_RECORD)
        if not isinstance(record, dict) or record.get("format") != BLOCK_FORMAT:
            raise InputError(f"its format is not {BLOCK_FORMAT!r}")
        run = read_as(RunRecord, record.get("run"))
        distribution = record.get("map", {}).get("distribution", "normal")
    except ValueError as error:
        raise InputError(f"{folder / BLOCK_RECORD} is not a record of blocks: {error}") from None
    try:
        arrays = read_arrays(folder / BLOCK_ARRAYS, "biufU")
        names, sizes = tuple(arrays["names"].tolist()), arrays["sizes"]
        coupling = spectra = None
        if "coupling" in arrays:
            coupling = CouplingMap(names, sizes, **{n: arrays[n] for n in MAP_ARRAYS}, distribution=distribution)
        if "alphas" in arrays:
            spectra = BlockSpectra(names, tuple(_spectrum(arrays, b, run) for b in range(len(names))))
    except (ValueError, KeyError, TypeError, OverflowError, IndexError) as error:
        raise InputError(f"{folder / BLOCK_ARRAYS} is damaged, or not of a run over blocks: {error}") from None
    return BlockRun(run, coupling, spectra)


def _spectrum(arrays: dict[str, np.ndarray], b: int, run: RunRecord) -> Spectrum:
    orthogonality = tuple(arrays["orthogonality"][b].tolist())
    return Spectrum(
        arrays["alphas"][b],
        arrays["betas"][b],
        arrays["steps"][b],
        int(arrays["sizes"][b]),
        run=dataclasses.replace(run, lanczos=dataclasses.replace(run.lanczos, orthogonality=orthogonality)),
        step_errors=arrays["step_errors"][b],
    )
