"""The record of a run is typed, saved and read back; what a caller notes changes no number."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from known_spectra import EVERYTHING

import jaxhess
from jaxhess import Spectrum
from jaxhess.errors import InputError
from jaxhess.files.typed import read_as
from jaxhess.krylov.storage import Storage
from jaxhess.operators.restriction import Selection
from jaxhess.results.foreign import to_json
from jaxhess.slq.record import (
    Inputs,
    Probes,
    RunRecord,
    operator_record,
)
from jaxhess.slq.run import _operator_record

STEPS = 20
NOTES = (
    {"lanczos": "note"},
    {"lanczos": {"reorthogonalize": "none", "orthogonality": [9.0, 9.0]}},
    {"probes": {"distribution": "rademacher"}},
    {"operator": 5, "loss": "note"},
    {"run": {"distribution": "rademacher"}},
)
TIGHT = jaxhess.MatrixOperator(jnp.diag(jnp.concatenate([jnp.linspace(0, 1e-6, 60), jnp.ones(1)])))


@pytest.fixture(scope="module", params=["normal", "rademacher"])
def run(request):
    """Of eigenvalues so close that all would be ghosts if the vectors were not known to be independent."""
    return jaxhess.spectrum(TIGHT, steps=STEPS, probes=2, distribution=request.param)


def _numbers(spectrum):
    return {k: v for k, v in json.loads(to_json(spectrum)).items() if k != "info"}


@pytest.mark.parametrize("note", NOTES, ids=str)
def test_a_note_of_the_caller_changes_no_number_and_no_record(run, note, tmp_path):
    assert not run.ghosts.any()
    noted = dataclasses.replace(run, info=note)
    assert _numbers(noted) == _numbers(run)
    np.testing.assert_equal(noted.trace(), run.trace())
    noted.save(tmp_path)
    assert Spectrum.load(tmp_path) == noted
    assert Spectrum.load(tmp_path).run == run.run


def test_a_run_records_how_it_was_made(run):
    record = run.run
    assert record.probes == Probes(2, run.run.probes.distribution, 0)
    assert record.lanczos.storage == Storage(vector_dtype="float32")
    assert record.lanczos.steps == STEPS
    assert len(record.lanczos.orthogonality) == 2
    assert record.operator.kind == "MatrixOperator"
    assert record.rounding == 2.0**-23
    assert record.program.bytes_per_device.arguments > 61 * 61 * 4


@pytest.mark.parametrize("record", [EVERYTHING, RunRecord()])
def test_every_field_is_saved_and_read_back(record, tmp_path):
    whole = Spectrum(np.ones((2, 3)), np.ones((2, 3)), [3, 3], 9, run=record)
    whole.save(tmp_path)
    (tmp_path / "s.json").write_text(to_json(whole))
    assert Spectrum.load(tmp_path).run == Spectrum.load(tmp_path / "s.json").run == record
    assert Spectrum.load(tmp_path) == Spectrum.load(tmp_path / "s.json") == whole


def _with(record, path, value):
    """The JSON of a record with one value replaced."""
    data = json.loads(json.dumps(dataclasses.asdict(record)))
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("probes", "distribution"), "cauchy", "probes.distribution: Input should be 'normal' or 'rademacher'"),
        (("probes", "seed"), True, "probes.seed: Input should be a valid integer"),
        (("probes", "mine"), 1, "probes.mine: Unexpected keyword argument"),
        (("lanczos", "steps"), -1, "lanczos.steps: Input should be greater"),
        (("lanczos", "orthogonality"), [-1.0], r"lanczos.orthogonality.0: Input should be greater"),
        (("lanczos", "storage", "reorthogonalize"), 1, "lanczos.storage: Unknown re-orthogonalisation 1"),
        (("lanczos", "storage", "basis_dtype"), "int8", "lanczos.storage.basis_dtype: Input should be"),
        (("operator", "kind"), None, "operator.kind: Input should be a valid string"),
        (("operator", "terms"), [5], r"operator.terms.0: Input should be an object"),
        (("inputs", "loss"), "3.5", "inputs.loss: Input should be a valid number"),
        (("inputs", "loss"), 10**400, "inputs.loss: Input should be a finite number"),
        (("rounding",), 0.0, "rounding must be the unit roundoff"),
        (("noise", "floor"), {"random": 1.0}, "noise.floor.leading: Field required"),
        (("eigenpairs", "converged"), [1, 0], "eigenpairs.converged.0: Input should be a valid boolean"),
        (("program", "bytes_per_device", "outputs"), 2**64, "program.bytes_per_device.outputs: Input should be less"),
        (("job", "model", "config"), [], "job.model.config: Input should be an object"),
        (("mine",), 1, "mine: Unexpected keyword argument"),
    ],
    ids=lambda x: ".".join(x) if isinstance(x, tuple) else "",
)
def test_a_damaged_record_is_refused_with_the_name_of_the_field(tmp_path, path, value, words):
    Spectrum([[1.0]], [[0.5]], [1], 9).save(tmp_path)
    file = tmp_path / "spectrum.json"
    for damaged in (_with(EVERYTHING, path, value),):
        file.write_text(json.dumps({**json.loads(file.read_text()), "run": damaged}))
        with pytest.raises(ValueError, match=rf"is not a spectrum record: .*{words}"):
            Spectrum.load(tmp_path)


@pytest.mark.parametrize("damage", [None, 5, "run", []])
def test_a_record_that_is_none_is_refused(tmp_path, damage):
    Spectrum([[1.0]], [[0.5]], [1], 9).save(tmp_path)
    file = tmp_path / "spectrum.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "run": damage}))
    with pytest.raises(ValueError, match="is not a spectrum record: it: Input should be an object"):
        Spectrum.load(tmp_path)


def test_operators_made_of_others_are_recorded_to_the_bottom():
    twice = 2 * TIGHT.shifted(1.0)
    found = jaxhess.spectrum(twice - TIGHT, steps=1, probes=1).run.operator
    assert found.kind == "SumOperator"
    assert [term.kind for term in found.terms] == ["ScaledOperator", "ScaledOperator"]
    assert found.terms[0].details == {"factor": 2.0}
    assert found.terms[0].operator.details == {"shift": 1.0}
    assert found.terms[1].operator.kind == "MatrixOperator"


def test_a_block_is_recorded_as_data_and_named_in_words():
    found = operator_record({"kind": "Hessian", "restriction": {"patterns": ["mlp", "norm"], "layers": [0, 3]}})
    assert found.restriction == Selection(("mlp", "norm"), (0, 3))
    assert found.matrix_name == "loss Hessian, block mlp norm in layers 0,3"
    assert operator_record({"kind": "Hessian"}).matrix_name == "loss Hessian"
    assert str(Selection((), (1,))) == "* in layers 1"


def test_fields_of_a_users_operator_may_have_any_name_and_type():
    found = _operator_record({"kind": "Mine", "terms": 3, "dtypes": "float8"})
    with pytest.raises(InputError, match="terms"):
        operator_record({"kind": "Mine", "terms": 3})
    assert (found.kind, found.terms, found.details) == ("Mine", (), {"terms": 3, "dtypes": "float8"})
    assert read_as(Inputs, {"loss": 1}).loss == 1.0
