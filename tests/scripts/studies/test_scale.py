"""Stability over model sizes: variations of matrices that are known, exponents, kept models, and bad input."""

import dataclasses
import io
from types import SimpleNamespace

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
    data_deviation,
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
    few = traces_and_norms(jaxhess.MatrixOperator(jnp.diag(eigenvalues)), 3, 2, 0)
    np.testing.assert_allclose(few, found[:2, :2], rtol=1e-4)  # the same probes, by products alone
    one = Stability(
        None, 202, 1.0, found.mean(0), np.ones((3, 4)), np.ones((1, 4)), (2, 2, 200), trace**2 / square, 0.0, np.ones(4)
    )
    predicted = predicted_by_probe(one)
    assert predicted == pytest.approx(np.sqrt(2 * (square - trace**2 / 202) / 204 * 202) / trace, rel=1e-9)
    assert found[:, 0].mean() == pytest.approx(trace, abs=4 * predicted * trace / np.sqrt(200))
    # The relative error of a standard deviation of 200 such values is about 1/sqrt(400) times a kurtosis: 4 of 0.1.
    assert relative_deviation(found)[0] == pytest.approx(predicted, rel=0.4)
    assert one.log_error("probe") == pytest.approx(1 / np.sqrt(398))


def test_the_variation_with_the_data_is_without_the_noise_of_the_probes():
    """Values of samples of standard deviation 1, with a term of every probe and one of every pair."""
    rng = np.random.default_rng(0)
    samples, probes, draws = 6, 8, 4000
    of_sample, of_probe, of_pair = (rng.normal(size=(n, m, draws)) for n, m in ((samples, 1), (1, probes), (6, 8)))
    found, noise = data_deviation(1000 + of_sample + 10 * of_probe + of_pair)
    # The corrected variance is 1.125 chi2(5)/5 - 0.125: its mean over the draws has a standard error of
    # 1.125 sqrt(2/5) / sqrt(4000) = 0.011, of which four are allowed. It is negative in 1% of draws, and setting it to
    # zero there adds 0.001. The mean over probes moves 1000 by 0.4%. Without the correction the mean is 1.125.
    assert 1e6 * np.mean(found**2) == pytest.approx(1, abs=0.05)
    assert np.median(noise[found > 0]) == pytest.approx(1.125, abs=0.1)
    assert np.isinf(noise[found == 0]).all()
    alone, none = data_deviation(np.broadcast_to(1000 + of_sample, (samples, probes, draws)))
    np.testing.assert_allclose(alone, relative_deviation(1000 + of_sample[:, 0]), rtol=1e-6)
    np.testing.assert_allclose(none, 1, rtol=1e-6)


def test_samples_of_one_trace_have_no_variation_though_a_probe_sees_one():
    """One set of eigenvalues in six bases: the trace that one probe gives varies, the trace does not."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(6):
        basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
        matrix = basis @ np.diag(np.append(np.ones(54), np.full(6, 10.0))) @ basis.T
        values.append(traces_and_norms(jaxhess.MatrixOperator(jnp.asarray(matrix, jnp.float32)), 2, 32, 0))
    by_one_probe = relative_deviation(np.array(values)[:, 0])
    # Var(n v'Hv) = 2n/(n + 2) (|H|^2 - tr^2/n), of 114: 0.22 of the trace. Of 32 probes 0.04 is left, with the noise
    # removed about half of that; four chi of five degrees would be 0.1.
    assert by_one_probe[0] > 0.1 > data_deviation(np.array(values))[0][0]


def _found(variations, sizes=(100, 1000, 10000)):
    return [
        Stability(
            ladder.Rung(n // 10, 1),
            n,
            1 / n,
            np.ones(4),
            np.full((3, 4), v),
            np.ones((1, 4)),
            (9, 9, 9),
            v**-2.0 if v else 1.0,
            0.1,
            np.ones(4),
        )
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
        assert [claim.verdict for claim in claims] == [verdict] * 4  # the last: the effective dimension, variation^-2
        assert claims[3].ours == pytest.approx(-2 * claims[0].ours)
    assert len(list(script.tables(falling, {"size": falling}, [1e-3]))) == 5
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
    models = _found([0.0, 1.0], sizes=(10, 100))
    assert np.isnan(models[0].pooled("data"))
    groups = {"size": models, "training": models}
    claims = list(script.claims(groups, models, ""))
    assert [claim.verdict for claim in claims] == ["cannot tell"] * 5
    assert len(list(script.tables(models, groups, [1e-3]))) >= 4
    assert len(script.figure(groups).axes) == 4


def test_noise_that_was_removed_widens_the_error():
    (quiet,) = _found([1.0], sizes=(10,))
    noisy = dataclasses.replace(quiet, noise=np.array([3.0, 2.0, 1.0, 1.0]))
    assert noisy.log_error("data") == pytest.approx(2 * quiet.log_error("data"))
    assert noisy.log_error("probe") == quiet.log_error("probe")


def test_samples_are_disjoint_and_the_ladder_has_the_sizes_it_names():
    samples = parts({"x": jnp.arange(64)}, 4, 16)
    assert sorted(np.concatenate([s["x"] for s in samples]).tolist()) == list(range(64))
    for millions, rung in ladder.LADDER.items():
        config = ladder.byte_config(rung.width, rung.layers, ladder.HEADS, 16)
        count = sum(x.size for x in jax.tree.leaves(ladder.abstract_params(config)))
        assert 0.75 < count / (1e6 * millions) < 1.5


@pytest.fixture
def trained(monkeypatch):
    """The tasks that were trained: in place of training, the initial weights are taken."""
    tasks = []

    def untrained(task, *_):
        tasks.append(task)
        return SimpleNamespace(params=[[task.initial(len(tasks))]])

    monkeypatch.setattr(ladder, "sweep", untrained)
    return tasks


RECIPE = ladder.Recipe(10, 4, 8, 1e-2, 0)


@pytest.mark.study
def test_trained_models_are_kept_and_damaged_ones_refused(tmp_path, trained):
    data = byte_batch(script.Options().data, 8, 32)
    first = ladder.train(ladder.Rung(32, 1), RECIPE, data, tmp_path / "kept")
    again = ladder.train(ladder.Rung(32, 1), RECIPE, data, tmp_path / "kept")
    assert len(trained) == 1
    for x, y in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(x, y)
    (file,) = (tmp_path / "kept").glob("*.npz")
    raw = file.read_bytes()
    arrays = dict(np.load(file))
    name = next(iter(arrays))
    damaged = [b"damaged", b"", raw[: len(raw) // 2], raw[:-30], raw[:200] + bytes([raw[200] ^ 1]) + raw[201:]]
    for leaf in (arrays[name].astype(np.float64), np.full_like(arrays[name], np.nan), arrays[name][:1]):
        saved = io.BytesIO()
        np.savez(saved, **arrays | {name: leaf})
        damaged.append(saved.getvalue())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(InputError, match="remove it"):
            ladder.train(ladder.Rung(32, 1), RECIPE, data, tmp_path / "kept")


def test_a_model_trained_on_another_text_is_not_taken(tmp_path, trained):
    data = byte_batch(script.Options().data, 8, 32)
    for text in (data, data._replace(tokens=data.tokens[::-1]), data):
        ladder.train(ladder.Rung(32, 1), RECIPE, text, tmp_path)
    assert len(trained) == len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.study
def test_the_study_of_two_small_models_has_every_claim():
    found = script.study(dataclasses.replace(script.SMALL, apart=False))
    assert len(found.claims) == 4
    assert len(found.record["models"]) == 2
    for model in found.record["models"]:  # Hutchinson's variance, of four probes: chi2(3)/3 is below 10 but for 1e-6
        assert model["probe"]["trace"] ** 2 < 10 * model["predicted_by_probe"] ** 2


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
