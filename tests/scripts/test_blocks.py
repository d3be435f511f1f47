"""The command over blocks: a folder that reads back, resumes after SIGTERM, and one sentence for every bad input."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from small_models import TINY, check_refused, random_model, run_command

import convert
import jaxhess
from jaxhess.errors import InputError
from jaxhess.results import block_files
from scripts import blocks as script

QUICK = ["--data", "random", "--seq-len", "8", "--sequences", "4", "--microbatch", "2", "--steps", "3", "--probes", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    convert.export(random_model(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run_command(script, "--model", str(model), *QUICK, "--spectra", "--out", str(out))
    return out


@pytest.mark.slow
def test_the_folder_is_complete(finished):
    pictures = {f"{name}.png" for name in ("coupling", "relative", "fidelity", "spectra", "distance")}
    assert {p.name for p in finished.iterdir()} == {
        "blocks.npz",
        "blocks.json",
        "report.html",
        "manifest.json",
        *pictures,
    }
    arrays = np.load(finished / "blocks.npz")
    assert arrays["names"].tolist() == ["embed", "layers/0", "layers/1", "final_norm", "head"]
    shapes = {
        **dict.fromkeys(("sizes", "trace", "trace_error"), (5,)),
        **dict.fromkeys(("coupling", "coupling_error", "distance", "normalised_distance"), (5, 5)),
        **dict.fromkeys(("fidelity_error", "fidelity_cosine", "steps"), (5, 2)),
        **dict.fromkeys(("alphas", "betas", "step_errors"), (5, 2, 3)),
    }
    for name, shape in shapes.items():
        assert arrays[name].shape == shape, name
        assert np.isfinite(arrays[name]).all(), name
    record = json.loads((finished / "blocks.json").read_text())
    assert record["run"]["operator"]["kind"] == "BlockDiagonal"
    assert record["run"]["job"]["options"]["by"] == ["layers"]
    assert record["map"]["block_diagonal_error"]["value"] > 0
    page = (finished / "report.html").read_text()
    assert "layers/1" in page
    assert "block-diagonal" in page


@pytest.mark.slow
def test_what_is_read_back_is_what_was_found(finished):
    run = block_files.load(finished)
    arrays = np.load(finished / "blocks.npz")
    np.testing.assert_array_equal(run.coupling.coupling, arrays["coupling"])
    np.testing.assert_array_equal(run.spectra.alphas, arrays["alphas"])
    assert run.spectra["head"].dim == 36
    assert [e.value for e in run.coupling.trace()] == arrays["trace"].tolist()
    assert block_files.contents(run)["blocks.npz"]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_library(model, finished):
    loaded = convert.load(model)
    tokens = script.run_parts.read_data(script.Options(str(model), "random", 8, sequences=4, probes=2), loaded.config)
    operator = jaxhess.Hessian(loaded.loss(), loaded.params, jaxhess.Microbatches(tokens.microbatches(2)))
    found = jaxhess.coupling_map(operator, jaxhess.Blocks.by(loaded.params, "layers"), probes=2)
    np.testing.assert_allclose(np.load(finished / "blocks.npz")["coupling"], found.coupling, rtol=1e-4)


@pytest.mark.slow
def test_a_run_stopped_in_either_part_is_ended_by_resume(model, finished, tmp_path, monkeypatch):
    """SIGTERM, as a scheduler sends it, after the map's first probe and then after the spectra's first step."""
    out = tmp_path / "out"
    command = ["--model", str(model), *QUICK, "--spectra", "--checkpoint-every", "1", "--out", str(out), "--resume"]

    def stopping(original):
        def call(*arguments, callback, **options):
            def then(progress):
                callback(progress)
                os.kill(os.getpid(), signal.SIGTERM)

            return original(*arguments, callback=then, **options)

        return call

    for name in ("coupling_map", "block_spectra"):
        with monkeypatch.context() as patch:
            patch.setattr(jaxhess, name, stopping(getattr(jaxhess, name)))
            with pytest.raises(SystemExit) as stopped:
                run_command(script, *command)
        assert stopped.value.code == 75
    run_command(script, *command)
    with np.load(out / "blocks.npz") as ours, np.load(finished / "blocks.npz") as whole:
        for name in ("lengths", "alphas", "betas"):
            np.testing.assert_array_equal(ours[name], whole[name])
    assert not (out / "unfinished").exists()
    assert not (out / "unfinished-spectra").exists()


@pytest.mark.study
def test_a_map_alone_and_spectra_alone(model, tmp_path):
    run_command(
        script, "--model", str(model), *QUICK, "--by", "kinds", "--products", "1", "--out", str(tmp_path / "map")
    )
    run = block_files.load(tmp_path / "map")
    assert run.spectra is None
    assert len(run.coupling.forms) == 1
    options = ["--by", "*", "--spectra", "--products", "0", "--restrict", "mlp", "--operator", "gauss-newton"]
    run_command(script, "--model", str(model), *QUICK, *options, "--out", str(tmp_path / "spectra"))
    run = block_files.load(tmp_path / "spectra")
    assert run.coupling is None
    assert run.names == ("*",)
    assert run.record.operator.operator.kind == "GaussNewton"
    run_command(
        script, "--model", str(model), *QUICK, "--layers", "1", "--products", "1", "--out", str(tmp_path / "one")
    )
    assert block_files.load(tmp_path / "one").names == ("layers/1",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by", "attention", "bogus"], "No parameter matches 'bogus'"),
        (["--by", "layers/*", "embed"], "in no block"),
        (["--by", "mlp", "layers/*", "embed", "head", "final_norm"], "in two blocks"),
        (["--products", "0"], "nothing to compute"),
        (["--products", "-1"], "--products -1"),
        (["--by"], "layers, kinds, matrices"),
        (["--probes", "0"], "at least 1"),
        (["--together", "0"], "together is 0"),
        (["--layers", "7"], "layers 0 to 1"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(model, tmp_path, capsys, options, words):
    check_refused(capsys, script, tmp_path / "out", words, "--model", str(model), *QUICK, *options)


@pytest.mark.slow
def test_a_folder_of_another_kind_is_refused(tmp_path, finished):
    with pytest.raises(InputError, match="does not exist: a run over blocks has"):
        block_files.load(tmp_path)
    for name in ("blocks.npz", "blocks.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "blocks.npz").write_bytes((finished / "blocks.npz").read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        block_files.load(tmp_path)
    (tmp_path / "blocks.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not a record of blocks"):
        block_files.load(tmp_path)
