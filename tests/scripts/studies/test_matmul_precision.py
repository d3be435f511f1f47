"""The study of matmul precisions: the order of their errors, the verdicts, and one sentence for every bad input."""

import pytest
from small_models import check_refused, run_command

from jaxhess.results.study import Study
from scripts.studies import matmul_precision as script

QUICK = "--seq-len 8 --sequences 2 --microbatch 2 --lanczos 2 --steps 4 --probes 1 --mesh fsdp=1"


def errors(precision, extremes, bulk):
    return script.Errors(precision, True, {"random": extremes}, extremes, bulk, 1.0)


def test_a_precision_keeps_the_spectrum_by_the_worse_of_its_errors():
    found = [errors("float32", 1e-7, 1e-6), errors("bf16x6", 2e-7, 1e-6), errors("tf32x3", 1e-7, 4e-6)]
    assert found[1].worse(found[0]) == pytest.approx(2)
    assert found[2].worse(found[0]) == pytest.approx(4)
    verdicts = {claim.model: claim.verdict for claim in script.claims(found, "a model")}
    assert verdicts == {
        "a model, bf16x6": "holds",
        "a model, bf16x3": "cannot tell",  # not measured
        "a model, tf32x3": "does not hold",
    }
    assert [row[-1] for row in script.table(found).rows] == ["1.00"] * 3
    assert script.figure(found).axes


@pytest.mark.study
def test_errors_are_in_the_order_of_the_bits_that_are_kept(tmp_path):
    out = tmp_path / "out"
    run_command(script, *QUICK.split(), "--out", str(out))
    study = Study.load(out)
    found = {row["precision"]: row for row in study.record["found"]}
    for vector in ("random", "Lanczos 2", "one embedding"):
        by_precision = {name: row["products"][vector] for name, row in found.items()}
        assert by_precision["bf16x6"] < 5 * by_precision["float32"] < 1e-4
        assert by_precision["tf32x3"] < by_precision["bf16x3"] / 5 < by_precision["tf32"] / 25
    assert found["float32"]["emulated"] is False
    assert found["tf32"]["emulated"] is True
    assert "bf16x3" not in study.record["keep_the_spectrum"]
    assert study.record["keep_it_at_a_third_of_the_time"] is None  # no card was named


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--steps 1", "must be at least 2"),
        ("--lanczos 1", "must be at least 2"),
        ("--precisions", "--precisions takes bf16x6, tf32x3, bf16x3, tf32"),
        ("--card V100", "The card 'V100' is not in the table"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *QUICK.split(), *arguments.split())
