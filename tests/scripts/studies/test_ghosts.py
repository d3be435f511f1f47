"""The ghost ablation: a folder with the record and the plots, and one sentence for every bad input."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, check_refused

from jaxhess import Storage
from scripts.studies import ghosts as script

STEPS = (5, 30)


def test_ghosts_appear_without_reorthogonalisation_only():
    entries = np.concatenate([np.linspace(-1, 1, 500), [20.0, 50.0, -30.0]]).astype(np.float32)
    storages = {"reference": Storage("full"), "none": Storage("none"), "window 4": Storage(4), "full": Storage("full")}
    operator = Diagonal(jnp.asarray(entries))
    runs = [script.lanczos(name, storage, operator, max(STEPS), seed=0) for name, storage in storages.items()]
    found = {run.name: [run.after(steps, runs[0]) for steps in STEPS] for run in runs}
    ghosts = {name: [row.ghosts for row in rows] for name, rows in found.items()}
    assert ghosts["reference"] == ghosts["full"] == [0, 0]
    assert ghosts["none"][0] == ghosts["window 4"][0] == 0 < min(ghosts["none"][1], ghosts["window 4"][1])
    for rows in found.values():  # the extremes are right all the same
        assert max(rows[-1].largest, rows[-1].smallest) < 1e-6
    assert found["reference"][1].distance == 0 < found["none"][1].distance
    assert [run.stored_vectors for run in runs[:3]] == [32, 2, 6]
    verdicts = [claim.verdict for claim in script.claims(found, "a diagonal matrix")]
    assert verdicts[:2] == ["holds", "holds"]  # there are ghosts; the support is kept
    assert verdicts[3:5] == ["does not hold", "does not hold"]  # outliers survive; a window has ghosts
    assert verdicts[5] == "cannot tell"  # no vectors in bfloat16
    assert script.figure(found).axes
    assert len(script.table(runs, found).rows) == 4


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
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())
