"""What statistics rest on is typed, saved and read back; what a caller notes changes no number."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from jaxhess.record import RunRecord
from jaxhess.slq.spectrum import Spectrum

STEPS = 20
NOTES = (
    {"lanczos": "note"},
    {"lanczos": {"reorthogonalize": "none", "orthogonality": [9.0, 9.0]}},
    {"probes": "note"},
    {"probes": {"distribution": "rademacher"}},
    {"operator": 5},
    {"run": {"distribution": "rademacher"}},
)
TIGHT = jaxhess.MatrixOperator(jnp.diag(jnp.concatenate([jnp.linspace(0, 1e-6, 60), jnp.ones(1)])))


@pytest.fixture(scope="module", params=["normal", "rademacher"])
def run(request):
    """Of eigenvalues so close that all would be ghosts if the vectors were not known to be independent."""
    return jaxhess.spectrum(TIGHT, steps=STEPS, probes=2, distribution=request.param)


def _numbers(spectrum):
    return {k: v for k, v in json.loads(spectrum.to_json()).items() if k != "info"}


@pytest.mark.parametrize("note", NOTES, ids=str)
def test_a_note_of_the_caller_changes_no_number(run, note):
    assert not run.ghosts.any()
    noted = dataclasses.replace(run, info=note)
    assert _numbers(noted) == _numbers(run)
    np.testing.assert_equal(noted.trace(), run.trace())


@pytest.mark.parametrize("name", ["probes", "lanczos", "operator", "program", "seconds"])
def test_a_note_under_a_name_of_the_run_is_refused_before_any_product(name):
    with pytest.raises(ValueError, match=f"info has '{name}', which the run records itself"):
        jaxhess.spectrum(TIGHT, steps=2, probes=1, info={name: "note", "mine": 1})


def test_the_record_is_saved_and_read_back(run, tmp_path):
    assert run.run.reorthogonalize == "full"
    assert len(run.run.orthogonality) == 2
    run.save(tmp_path)
    (tmp_path / "s.json").write_text(run.to_json())
    assert Spectrum.load(tmp_path).run == Spectrum.load(tmp_path / "s.json").run == run.run


def test_a_folder_written_before_the_record_had_a_place_is_read_from_its_info(tmp_path):
    run = RunRecord("rademacher", "full", (1e-7,))
    new = Spectrum([[1.0]], [[0.5]], [1], 9, run=run)
    new.save(tmp_path)
    path = tmp_path / "spectrum.json"
    record = json.loads(path.read_text())
    del record["run"]
    lanczos = {"reorthogonalize": "full", "orthogonality": [1e-7]}
    record["info"] = {"probes": {"distribution": "rademacher"}, "lanczos": lanczos}
    path.write_text(json.dumps(record))
    assert Spectrum.load(tmp_path).run == run
    record["info"] = {"probes": 5, "lanczos": "note"}
    path.write_text(json.dumps(record))
    assert Spectrum.load(tmp_path).run == RunRecord()


@pytest.mark.parametrize("damage", [5, {"distribution": "cauchy"}, {"mine": 1}, {"orthogonality": [-1.0]}])
def test_a_damaged_record_is_refused(tmp_path, damage):
    Spectrum([[1.0]], [[0.5]], [1], 9).save(tmp_path)
    path = tmp_path / "spectrum.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": damage}))
    with pytest.raises(ValueError, match=r"is not a spectrum record"):
        Spectrum.load(tmp_path)
