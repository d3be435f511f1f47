"""Blocks of classes: spectra against their closed form, counts, verdicts, and one sentence for bad input."""

import dataclasses

import jax
import numpy as np
import pytest
from small_models import run_command

from scripts.studies import class_blocks as script

TINY = script.Options(
    classes=4, features=5, examples=64, seeds=2, train_steps=10, steps=5, probes=64, spectrum_examples=64,
    sgd_rates=(0.1,), adam_rates=(0.01,),
)  # fmt: skip


def test_classes_are_sorted_by_frequency_and_all_examples_are_given():
    balanced, imbalanced = (script.class_counts(TINY, x) for x in (False, True))
    assert balanced.tolist() == [16, 16, 16, 16]
    assert imbalanced.sum() == 64
    assert imbalanced.tolist() == sorted(imbalanced.tolist(), reverse=True)
    assert imbalanced[0] == pytest.approx(2 * imbalanced[1], abs=3)  # 1/k


def test_blocks_of_classes_are_those_of_the_closed_form():
    """The block of class k is X' diag(p_k (1 - p_k)) X / N (the talk, Case 2, equation (5))."""
    counts = script.class_counts(TINY, True)
    problem = script.problem_of(TINY, counts, 0)
    params = {"head": 30 * problem.initial(0)["head"]}
    state = script.blockwise([problem], [params], counts / counts.sum(), TINY)
    x = np.asarray(problem.data[0], np.float64)
    p = np.asarray(jax.nn.softmax(x @ np.asarray(params["head"]).T), np.float64)
    blocks = [x.T @ (x * (q * (1 - q))[:, None]) / len(x) for q in p.T]
    largest = [np.linalg.eigvalsh(block)[-1] for block in blocks]
    np.testing.assert_allclose(state.largest[0], largest, rtol=1e-4)  # all 5 Lanczos steps, float32
    for block, trace in zip(blocks, state.traces[0], strict=True):
        deviation = np.sqrt(2 * ((block**2).sum() - (np.diag(block) ** 2).sum()) / TINY.probes)
        assert abs(trace - np.trace(block)) < 5 * deviation + 1e-4 * np.trace(block)


def test_the_exponent_is_that_of_a_power_law():
    shares = np.array([0.5, 0.3, 0.2])
    assert script.exponent(shares, 7 * shares**1.5) == pytest.approx(1.5)
    assert np.isnan(script.exponent(np.ones(3) / 3, shares))


def test_a_study_has_its_claims_and_a_best_rate_at_the_end_decides_nothing():
    found = script.study(dataclasses.replace(TINY, probes=2, sgd_rates=(0.1,)))
    assert [c.verdict for c in found.claims if "as good as" in c.statement or "worse" in c.statement] == [
        "cannot tell",
        "cannot tell",
    ]
    assert len(found.claims) == 7
    assert found.figures[0].png.startswith(b"\x89PNG")
    assert [row[0] for row in found.tables[0].rows] == ["balanced"] * 3 + ["imbalanced"] * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--seeds 1", "an error over seeds needs two or more"),
        ("--classes 400", "8 times as many examples"),
        ("--spectrum-examples 100000", "cannot be more than --examples"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(script, *arguments.split(), "--out", str(tmp_path / "out"))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()
