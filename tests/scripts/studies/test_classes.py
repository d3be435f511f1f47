"""The studies of the talk's theory at a tiny size: claims are decided by what was measured."""

import numpy as np
import pytest
from small_models import run_command

from jaxhess import marchenko_pastur
from scripts.studies import block_structure, classes, random_matrix
from scripts.studies.theory import sampling
from scripts.studies.theory.maps import pooled
from scripts.studies.theory.states import block_ratio, off_diagonal

TINY = classes.Options(
    width=20, classes=(4, 64, 256), repeats=3, draws=2, widths=(10, 20), fixed_classes=4, maps=(3,), units=4
)
TRAINING = block_structure.Options(
    width=8, units=3, samples=(40, 8), steps=40, repeats=2, twin_width=5, twin_units=2, deep_width=4, deep_samples=20
)
EIGENVALUES = random_matrix.Options(wigner=30, rows=36, columns=6, matrices=3, width=20, classes=(2,))


def test_ratios_fall_with_the_classes_as_predicted():
    found = classes.study(TINY)
    claims = {claim.statement: claim for claim in found.claims}
    assert len(claims) == len(found.claims) == 15
    rate = claims["The linear model's ratio vanishes as 1/C²."]
    assert rate.ours is not None
    assert abs(rate.ours + 2) < 0.3  # 20 inputs: terms of order 1/d in both norms
    assert claims["C² g_ij/g_ii has this limit."].verdict == "holds"
    assert claims["The middle expression of (14), as it is written, tends to zero."].verdict == "does not hold"
    assert len(found.figures[0].png) > 10_000
    assert len(found.tables) == 5
    # A power that is not the claimed one is found.
    norms = np.ones((3, 4, 2))
    norms[:, :, 1] = np.array(TINY.classes)[:, None] ** -1.5
    assert classes.exponent_of(norms, 0, TINY) == pytest.approx(-1.5)


def test_the_jackknife_gives_the_error_of_a_mean_and_of_a_ratio():
    """Of a mean it is the standard error; of a ratio with a constant below, that divided by the constant."""
    sample = np.random.default_rng(0).normal(size=12)
    known = sampling.mean(sample)
    assert sampling.jackknife(float, sample) == pytest.approx(known)
    pairs = np.stack([sample, np.full(12, 4.0)], axis=1)
    assert sampling.jackknife(lambda x: x[0] / x[1], pairs) == pytest.approx((known.value / 4, known.error / 4))
    assert sampling.exponent([1, 10, 100], np.array([3.0, 0.3, 0.03])) == pytest.approx(-1)


@pytest.mark.study  # compiles a dozen programs
def test_blocks_are_followed_through_training():
    found = block_structure.study(TRAINING)
    claims = {claim.statement: claim for claim in found.claims}
    assert len(claims) == len(found.claims) == 27
    assert claims["H_{w_i w_i} of the squared error, as the talk defines it, is (8)."].ours == pytest.approx(2)
    first = found.record["many_samples"][0]
    assert [set(state) for state in first] == [set(first[0])] * 4
    assert first[0]["loss"] > first[-1]["loss"]
    assert len(found.figures[0].png) > 10_000


def test_readings_of_block_diagonal():
    """Three blocks of norm 2, the others of norm 1: off the diagonal 6 of 18, and half the norm."""
    squared = np.ones((3, 3)) + 3 * np.eye(3)
    assert off_diagonal(squared) == pytest.approx(6 / 18)
    assert block_ratio(squared) == pytest.approx(1 / 2)


def test_a_map_of_many_blocks_keeps_its_diagonal():
    found = pooled(np.eye(508) + 1e-3)
    assert found.shape == (170, 170)
    assert (found.diagonal() > 1).all()
    assert found.sum() < 171 + 170**2 * 1e-3 + 1
    np.testing.assert_array_equal(pooled(np.eye(5)), np.eye(5))


def test_laws_are_told_apart():
    found = random_matrix.study(EIGENVALUES)
    verdicts = {claim.statement: claim.verdict for claim in found.claims}
    assert verdicts["Wigner matrices have the semicircle law."] == "holds"
    assert verdicts["With these sizes it has the law that the caption names."] == "does not hold"
    assert len(found.figures[0].png) > 10_000


def test_distance_counts_eigenvalues_and_the_atom():
    """One eigenvalue at zero where half of four belong there: one too few; all four at once above: four."""
    ratio = 2.0
    values = np.array([0.0, 5.0, 5.0, 5.0])
    law = marchenko_pastur(values, ratio)
    assert random_matrix.distance(values, law) == pytest.approx(max(1, 4 * law.distribution[1] - 1))
    shifted = np.full(4, 50.0)
    assert random_matrix.distance(shifted, marchenko_pastur(shifted, ratio)) == pytest.approx(4)


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (classes, "--units 2", "needs --units 3"),
        (classes, "--classes 4 8", "Rates need two numbers"),
        (classes, "--ratio -1", "--ratio > 0"),
        (block_structure, "--repeats 1", "needs --repeats 2"),
        (block_structure, "--width 1", "Widths and units must be 2 or more"),
        (random_matrix, "--wigner 1", "must be 2 or more"),
        (random_matrix, "--ratio 0", "--ratio must be positive"),
    ],
)
def test_bad_input_ends_in_one_sentence(script, arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(script, *arguments.split(), "--out", str(tmp_path / "out"))
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_sizes_of_all_studies_are_allowed():
    for module in (classes, block_structure, random_matrix):
        module.SMALL.check()
        module.Options().check()
