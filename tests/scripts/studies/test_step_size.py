"""The step-size study: a folder with the table and the plot, and one sentence for every bad input."""

import json

import jax
import pytest
from small_models import run_command

from jaxhess import make_mesh
from scripts import step_size as script

QUICK = "--seq-len 8 --sequences 8 --microbatch 8 --dtypes float32 --reference float32 --smallest 1e-6 --largest 1e-3"
QUICK += " --per-decade 1 --lanczos 2 --ritz-steps 2"


@pytest.mark.slow
def test_the_folder_holds_a_plot_and_a_record_in_which_the_step_matters_and_is_kept(tmp_path, capsys, monkeypatch):
    # One device: eight take four times as long to compile.
    monkeypatch.setattr(script.jaxhess, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    out = tmp_path / "out"
    run_command(script, *QUICK.split(), "--out", str(out))
    assert {p.name for p in out.iterdir()} == {script.RECORD, script.PLOT, "manifest.json"}
    assert (out / script.PLOT).read_bytes().startswith(b"\x89PNG")
    before = (out / script.RECORD).read_bytes()
    record = json.loads(before)
    (study,) = record["studies"]
    assert [round(s, 9) for s in study["steps"]] == [1e-6, 1e-5, 1e-4, 1e-3]
    rows = {row["vector"]: row for row in study["vectors"]}
    assert set(rows) == {"random", "Lanczos 2", "one norm gain", "one embedding", "largest MLP weight"}
    assert all(row["exact_error"] == 0 for row in rows.values())  # the reference is the same product
    # The papers' step suits a random vector and not the one after it.
    assert rows["random"]["errors"][-1] < 0.1 < rows["Lanczos 2"]["errors"][-1]
    assert all(row["automatic"]["error"] < 3 * row["best"]["error"] for row in rows.values())
    assert study["ritz"]["automatic"]["largest"] < 1e-2 < study["ritz"]["fixed"][-1]["largest"]

    with pytest.raises(SystemExit):
        run_command(script, *QUICK.split(), "--out", str(out))
    assert "already holds a finished run" in capsys.readouterr().err
    assert (out / script.RECORD).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--smallest 0", "0 < smallest < largest"),
        ("--smallest 1e-2 --largest 1e-3", "0 < smallest < largest"),
        ("--per-decade 0", "must be at least 1"),
        ("--ritz-steps 0", "must be at least 1"),
        ("--lanczos 1", "the first Lanczos vector is the random one"),
        ("--model nowhere/none", "nowhere/none"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(script, *QUICK.split(), *arguments.split(), "--out", str(tmp_path / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()
