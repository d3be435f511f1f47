"""The ghost ablation: a folder with the record and the plots, and one sentence for every bad input."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, run_command

from jaxhess import Storage
from jaxhess.files.manifest import write_manifest
from scripts import ghosts as script

STEPS = (5, 30)


def test_ghosts_appear_without_reorthogonalisation_only():
    entries = np.concatenate([np.linspace(-1, 1, 500), [20.0, 50.0, -30.0]]).astype(np.float32)
    variants = [
        script.Variant("reference", Storage()),
        script.Variant("none", Storage("none")),
        script.Variant("window 4", Storage(4)),
    ]
    runs = [script.measure(v, Diagonal(jnp.asarray(entries)), max(STEPS), seed=0) for v in variants]
    found = {run["name"]: script.compared(run, runs[0], STEPS) for run in runs}
    ghosts = {name: [row["ghosts"] for row in run["by_steps"]] for name, run in found.items()}
    assert ghosts["reference"] == [0, 0]
    assert ghosts["none"][0] == ghosts["window 4"][0] == 0 < min(ghosts["none"][1], ghosts["window 4"][1])
    for run in found.values():  # the extremes are right all the same
        assert max(run["by_steps"][-1][f"{name}_error"] for name in ("largest", "smallest")) < 1e-6
    assert found["reference"]["by_steps"][1]["wasserstein_1"] == 0 < found["none"]["by_steps"][1]["wasserstein_1"]
    assert [found[n]["stored_vectors"] for n in ("none", "window 4", "reference")] == [2, 6, 32]
    record = {"options": {"steps": STEPS}, "parameters": 503, "variants": list(found.values())}
    assert script.plot(record).axes
    script.print_table(script.terminal(), record)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--steps 1", "each must be at least 2"),
        ("--windows 1", "each must be at least 2"),
        ("--model nowhere/none", "nowhere/none"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(script, *arguments.split(), "--out", str(tmp_path / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_kept(tmp_path, capsys):
    (tmp_path / script.RECORD).write_text(json.dumps("precious"))
    write_manifest(tmp_path)
    with pytest.raises(SystemExit):
        run_command(script, "--out", str(tmp_path))
    assert "already holds a finished run" in capsys.readouterr().err
    assert json.loads((tmp_path / script.RECORD).read_text()) == "precious"
