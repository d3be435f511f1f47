"""The step-size study: a folder with the table and the plot, and one sentence for every bad input."""

import pytest
from small_models import check_refused, run_command

from jaxhess.results.study import Study
from scripts.studies import step_size as script

QUICK = "--seq-len 8 --sequences 8 --microbatch 8 --dtypes float32 --reference float32 --smallest 1e-6 --largest 1e-3"
QUICK += " --per-decade 1 --lanczos 2 --ritz-steps 2 --mesh fsdp=1"


@pytest.mark.study
def test_the_folder_holds_a_study_in_which_the_step_matters_and_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    run_command(script, *QUICK.split(), "--out", str(out))
    assert {p.name for p in out.iterdir()} == {"study.json", "study.html", "step_size.png", "manifest.json"}
    before = (out / "study.json").read_bytes()
    study = Study.load(out)
    assert [round(s, 9) for s in study.record["steps"]] == [1e-6, 1e-5, 1e-4, 1e-3]
    (found,) = study.record["found"]
    rows = {row["name"]: row for row in found["vectors"]}
    assert set(rows) == {"random", "Lanczos 2", "one norm gain", "one embedding", "largest MLP weight"}
    assert all(row["exact"] == 0 for row in rows.values())  # the reference is the same product
    # The papers' step suits a random vector and not the one after it.
    assert rows["random"]["errors"][-1] < 0.1 < rows["Lanczos 2"]["errors"][-1]
    assert all(row["automatic"][1] < 3 * row["best"][1] for row in rows.values())
    assert found["ritz_automatic"][1] < 1e-2 < found["ritz_fixed"][-1][1]
    verdicts = {claim.statement: claim.verdict for claim in study.claims}
    assert verdicts.pop("The best step is where rounding and truncation balance.") in ("holds", "cannot tell")
    # There was no bfloat16.
    assert list(verdicts.values()) == ["does not hold", "cannot tell", "cannot tell", "cannot tell", "does not hold"]

    with pytest.raises(SystemExit):
        run_command(script, *QUICK.split(), "--out", str(out))
    assert "already holds a finished run" in capsys.readouterr().err
    assert (out / "study.json").read_bytes() == before


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
    check_refused(capsys, script, tmp_path / "out", sentence, *QUICK.split(), *arguments.split())
