"""Stability over model sizes: variations of matrices that are known, exponents, kept models, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import check_refused

import jaxhess
from jaxhess.errors import InputError
from scripts.studies import scale as script
from scripts.studies.scales import ladder
from scripts.studies.scales.stability import (
    Stability,
    exponents,
    parts,
    predicted_by_probe,
    relative_deviation,
    statistics,
    traces_and_norms,
)
from scripts.training.small_decoder import byte_batch


def test_statistics_of_each_probe_are_those_of_the_matrix_and_vary_as_the_effective_dimension_says():
    eigenvalues = jnp.concatenate([jnp.ones(200), jnp.array([10.0, -4.0])])
    found = statistics(jaxhess.MatrixOperator(jnp.diag(eigenvalues)), 3, 200, 0)
    trace, square = 206.0, 200 + 100 + 16.0
    np.testing.assert_allclose(found[:, 2:].mean(0), [10, -4], rtol=1e-4)
    few = traces_and_norms(jaxhess.MatrixOperator(jnp.diag(eigenvalues)), 2, 0)
    np.testing.assert_allclose(few, found[:2, :2], rtol=1e-4)  # the same probes, by products alone
    one = Stability(None, 202, 1.0, found.mean(0), np.ones((3, 4)), np.ones((1, 4)), (2, 2, 200), trace**2 / square)
    predicted = predicted_by_probe(one)
    assert predicted == pytest.approx(np.sqrt(2 * (square - trace**2 / 202) / 204 * 202) / trace, rel=1e-9)
    assert found[:, 0].mean() == pytest.approx(trace, abs=4 * predicted * trace / np.sqrt(200))
    # The relative error of a standard deviation of 200 such values is about 1/sqrt(400) times a kurtosis: 4 of 0.1.
    assert relative_deviation(found)[0] == pytest.approx(predicted, rel=0.4)
    assert one.log_error("probe") == pytest.approx(1 / np.sqrt(398))


def _found(variations, sizes=(100, 1000, 10000)):
    return [
        Stability(ladder.Rung(n // 10, 1), n, 1 / n, np.ones(4), np.full((3, 4), v), np.ones((1, 4)), (9, 9, 9), 50.0)
        for n, v in zip(sizes, variations, strict=True)
    ]


def test_a_power_law_has_its_exponent_and_the_verdict_follows():
    falling, rising = (_found([n**power for n in (100.0, 1000.0, 10000.0)]) for power in (-0.5, 0.5))
    (found,) = exponents([[f.parameters for f in falling]], falling, "data")
    assert found.exponent == pytest.approx(-0.5)
    assert found.error == pytest.approx(1.96 * 0.25 / np.sqrt(2 * np.log(10) ** 2))  # no scatter: sampling alone
    scattered = _found([1.0, 3.0, 1.0])
    assert exponents([[f.parameters for f in scattered]], scattered, "data")[0].error > 1
    for models, verdict in ((falling, "holds"), (rising, "does not hold"), (scattered, "cannot tell")):
        claims = list(script.claims({"size": models}, models, ""))
        assert [claim.verdict for claim in claims[:3]] == [verdict] * 3
    assert len(list(script.tables(falling, {"size": falling}, [1e-3]))) == 4
    assert len(script.figure({"size": falling}).axes) == 4


def test_width_and_depth_have_exponents_of_their_own():
    models = [
        dataclasses.replace(f, rung=ladder.Rung(w, d), variation=np.full((3, 4), w**-0.5 * d**0.25))
        for w in (10, 100)
        for d in (1, 2, 4)
        for f in _found([1.0], sizes=(w * d,))
    ]
    for name, cause, found in script.fits({"size": models, "width": models}):
        if name != "size":
            assert found.exponent == pytest.approx({"width": -0.5, "depth": 0.25}[name]), cause


def test_a_variation_of_zero_has_no_logarithm():
    assert np.isnan(_found([0.0], sizes=(10,))[0].pooled("data"))


def test_samples_are_disjoint_and_the_ladder_has_the_sizes_it_names():
    samples = parts({"x": jnp.arange(64)}, 4, 16)
    assert sorted(np.concatenate([s["x"] for s in samples]).tolist()) == list(range(64))
    for millions, rung in ladder.LADDER.items():
        config = ladder.byte_config(rung.width, rung.layers, ladder.HEADS, 16)
        count = sum(x.size for x in jax.tree.leaves(ladder.abstract_params(config)))
        assert 0.75 < count / (1e6 * millions) < 1.5


def test_trained_models_are_kept_and_damaged_ones_refused(tmp_path):
    data = byte_batch(script.Options().data, 8, 32)
    recipe = ladder.Recipe(10, 4, 8, 1e-2, 0)
    first = ladder.train(ladder.Rung(32, 1), recipe, data, tmp_path / "kept")
    again = ladder.train(ladder.Rung(32, 1), recipe, data, tmp_path / "kept")
    for x, y in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x, y)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(b"damaged")
    with pytest.raises(InputError, match="remove it"):
        ladder.train(ladder.Rung(32, 1), recipe, data, tmp_path / "kept")


@pytest.mark.slow
def test_the_study_of_two_small_models_has_every_claim():
    found = script.study(dataclasses.replace(script.SMALL, apart=False))
    assert len(found.claims) == 4
    assert len(found.record["models"]) == 2
    ratio = found.claims[3]
    assert ratio.holds[0] < ratio.ours + ratio.error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--sizes 0.03 7", "there are 0.03, 0.1"),
        ("--sizes 1", "two or more"),
        ("--lanczos 1", "at least 2"),
        ("--samples 100 --sequences 100", "need 10000"),
        ("--steps 0", "positive"),
        ("--data nowhere.txt", "nowhere.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())
