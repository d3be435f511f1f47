"""Run folders of format 1, with the record spread over `run` and an untyped `info`, still load."""

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
from known_spectra import EXACT, sampled
from small_models import run_command

from jaxhess import Spectrum
from jaxhess.krylov.storage import Storage
from jaxhess.operators.audit import Noise, NoiseAlong
from jaxhess.results.report import report_files
from jaxhess.slq.job import CommandRecord, Data, Devices, Model
from jaxhess.slq.record import (
    CompiledRecord,
    EigenpairRecord,
    Inputs,
    Lanczos,
    OperatorRecord,
    Probes,
    ProgramMemory,
    RunRecord,
)
from scripts import export

SPECTRUM = sampled(probes=2, steps=4)
INFO = {
    "probes": {"count": 2, "distribution": "rademacher", "seed": 5},
    "lanczos": {
        "steps": 4,
        "vector_dtype": "float32",
        "reorthogonalize": "full",
        "accumulation_dtype": "float32",
        "basis_dtype": None,
        "basis_memory": "device",
        "batch_size": 2,
    },
    "operator": {
        "kind": "LinearizedHessian",
        "dtypes": ["float32"],
        "accumulation_dtype": "float32",
        "restriction": "attention in layers 0,3",
        "residual_bytes_per_device": 12,
    },
    "loss": 3.25,
    "count": 64.0,
    "program": {
        "compile_seconds": 38.5,
        "bytes_per_device": {"arguments": 4, "outputs": 3, "outputs_in_place": 2, "temporaries": 1},
    },
    "seconds": 46.5,
    "options": {"model": "here", "restrict": ["attention"], "layers": "0,-1", "residual_gb": None},
    "model": {"source": "here", "parameters": 55, "config": {"vocab_size": 2000, "rope": {"theta": 10000.0}}},
    "data": {"source": "there", "sequences": 4, "seq_len": 16, "microbatches": 1, "fingerprint": "bbcd"},
    "mesh": {"axes": {"data": 1, "fsdp": 2, "tensor": 1}, "devices": 2, "kind": "cpu", "processes": 1},
    "versions": {"jaxhess": "0.1.0", "python": "3.11.7"},
    "timings": {"data_seconds": 0.25, "load_seconds": 0.5},
    "noise": {
        "asymmetry": 4e-7,
        "nonlinearity": 7e-7,
        "reference": "Hessian in float64",
        "relative_error": {"random": 1e-6, "leading": 8e-7},
        "floor": {"random": 8e-8, "leading": 1e-6},
    },
    "eigenpairs": {
        "values": [5.0],
        "residuals": [0.01],
        "converged": [False],
        "steps": 4,
        "vectors": "eigenvectors",
    },
}
RUN = {"distribution": "rademacher", "reorthogonalize": "full", "orthogonality": [6e-8, None]}
RECORD = RunRecord(
    Probes(2, "rademacher", 5),
    Lanczos(4, Storage(vector_dtype="float32"), 2, (6e-8, None)),
    OperatorRecord(
        "LinearizedHessian",
        ("float32",),
        "float32",
        "attention in layers 0,3",
        details={"residual_bytes_per_device": 12},
    ),
    Inputs(3.25, 64.0),
    2.0**-23,
    Noise(4e-7, 7e-7, "Hessian in float64", NoiseAlong(1e-6, 8e-7), NoiseAlong(8e-8, 1e-6)),
    EigenpairRecord((5.0,), (0.01,), (False,), 4, "eigenvectors"),
    CompiledRecord(38.5, ProgramMemory(4, 3, 2, 1)),
    46.5,
    CommandRecord(
        INFO["options"],
        Model("here", 55, INFO["model"]["config"]),
        Data("there", 4, 16, 1, "bbcd"),
        Devices({"data": 1, "fsdp": 2, "tensor": 1}, 2, "cpu", 1),
        INFO["versions"],
        INFO["timings"],
    ),
)


def write(folder, run, info, **changes):
    """A folder as version 0.1 wrote it; an array that is None is left out."""
    names = ("ritz_values", "weights", "residual_bounds", "ghosts", "alphas", "betas", "sizes", "dim", "step_errors")
    arrays = {name: getattr(SPECTRUM, name) for name in names} | {"rounding": np.float64(2.0**-23)} | changes
    np.savez(folder / "spectrum.npz", **{name: array for name, array in arrays.items() if array is not None})
    record = {"format": "jaxhess-spectrum-1", "info": info, "summary": {}}
    record |= {} if run is None else {"run": run}
    (folder / "spectrum.json").write_text(json.dumps(record))


def test_all_that_was_known_is_in_the_record_and_notes_stay_notes(tmp_path):
    write(tmp_path, RUN, INFO | {"mine": [1, 2]})
    found = Spectrum.load(tmp_path)
    assert found.run == RECORD
    assert found.info == {"mine": [1, 2]}
    np.testing.assert_array_equal(found.alphas, SPECTRUM.alphas)
    page = report_files(found)["report.html"].decode()
    for shown in ("block attention in layers 0,3", "3.25", "Noise of the products", "Eigenvectors", "bbcd"):
        assert shown in page
    found.save(tmp_path, overwrite=True)  # in today's format
    assert Spectrum.load(tmp_path) == found


def test_a_folder_from_before_there_was_a_run_is_read_from_its_info(tmp_path):
    info = copy.deepcopy(INFO)
    info["lanczos"]["orthogonality"] = RUN["orthogonality"]
    write(tmp_path, None, info)
    assert Spectrum.load(tmp_path).run == RECORD
    write(tmp_path, None, {"probes": 5, "lanczos": "note"})
    assert Spectrum.load(tmp_path).run == RunRecord()
    assert Spectrum.load(tmp_path).info == {"probes": 5, "lanczos": "note"}


def test_the_rounding_is_among_the_arrays_or_that_of_float32(tmp_path):
    write(tmp_path, RUN, INFO, rounding=np.float64(2.0**-52))
    assert Spectrum.load(tmp_path).run.rounding == EXACT.rounding
    write(tmp_path, RUN, INFO, rounding=None, step_errors=None, ghosts=None)
    assert Spectrum.load(tmp_path).run.rounding == 2.0**-23
    assert (Spectrum.load(tmp_path).step_errors == 0).all()


def test_selective_runs_are_marked_where_they_lost_orthogonality(tmp_path):
    """This re-orthogonalisation is gone: it is not known how vectors were kept, but that they should be orthogonal."""
    run = {"distribution": "normal", "reorthogonalize": "selective", "orthogonality": [1e-4, 0.6]}
    write(tmp_path, run, {"lanczos": INFO["lanczos"] | {"reorthogonalize": "selective"}})
    found = Spectrum.load(tmp_path)
    assert found.run.lanczos == Lanczos(4, None, 2, (1e-4, 0.6))
    assert found.orthogonality_lost.tolist() == [False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16, float32"])
def test_narrow_vectors_whose_rounding_was_not_measured_are_warned_about(tmp_path, dtype):
    info = INFO | {"lanczos": INFO["lanczos"] | {"vector_dtype": dtype}}
    write(tmp_path, RUN, info)
    with warnings.catch_warnings(action="error"):
        known = Spectrum.load(tmp_path).run.lanczos.storage.vector_dtype
    assert known == (None if "," in dtype else dtype)
    write(tmp_path, RUN, info, step_errors=None)
    with pytest.warns(UserWarning, match="earlier version, which did not measure the rounding of 16-bit vectors"):
        Spectrum.load(tmp_path)


@pytest.mark.parametrize("damage", [None, 5, "note", [1], {"kind": 5, "values": "x", "mine": [None]}], ids=str)
def test_what_does_not_read_stays_a_note(tmp_path, damage):
    for name in INFO:
        write(tmp_path, RUN, INFO | {name: damage})
        found = Spectrum.load(tmp_path)
        assert found.info in ({}, {name: damage}, {name: damage, "loss": 3.25}, {name: damage, "count": 64.0})
        assert found.run.lanczos.orthogonality == (6e-8, None)
    write(tmp_path, RUN, dict.fromkeys(INFO, damage))
    report_files(Spectrum.load(tmp_path))


@pytest.mark.parametrize(
    "run",
    [5, {"distribution": "cauchy"}, {"mine": 1}, {"orthogonality": [-1.0]}, {"reorthogonalize": 1}],
)
def test_what_numbers_depend_on_is_refused_where_it_is_wrong(tmp_path, run):
    write(tmp_path, run, {})
    with pytest.raises(ValueError, match=r"spectrum\.json is not a spectrum record"):
        Spectrum.load(tmp_path)


def test_an_old_quadrature_reads(tmp_path):
    fields = {name: getattr(SPECTRUM, name).tolist() for name in ("alphas", "betas")}
    data = {"format": "jaxhess-quadrature-1", **fields, "dim": 55, "rounding": 2.0**-30, "run": RUN, "info": INFO}
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = Spectrum.load(tmp_path / "a.json")
    assert found.run == dataclasses.replace(RECORD, rounding=2.0**-30)
    np.testing.assert_array_equal(found.betas, SPECTRUM.betas)


def test_an_old_folder_is_exported(tmp_path):
    write(tmp_path, RUN, {name: INFO[name] for name in INFO if name != "eigenpairs"})
    run_command(export, str(tmp_path), "--out", str(tmp_path / "out"))
    assert Spectrum.load(tmp_path / "out" / "quadrature.json").run.job == RECORD.job
