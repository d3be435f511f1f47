"""Homogeneous and heterogeneous blocks: statistics and verdicts from given numbers, and sentences for bad input."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import run_command

import jaxhess
from scripts.studies import heterogeneity as script
from scripts.training.short_runs import Sweep, TrainingTask


def state(distance: float, decades: float) -> script.BlockwiseSpectra:
    apart = distance * (1 - np.eye(3))
    distances = np.stack([apart, apart + 0.01 * (1 - np.eye(3))])
    largest = np.array([[1.0, 10.0**decades, 2.0], [1.0, 10.0**decades, 3.0]])
    return script.BlockwiseSpectra(distances, distances, largest, np.zeros(2))


def found(name: str, distance: float, decades: float, sgd: float, best: int = 1) -> script.TrainedModel:
    losses = np.full((3, 2), 4.0)
    losses[best] = sgd, sgd + 0.01
    adam = np.array([[4.0, 4.0], [1.0, 1.01], [4.0, 4.0]])
    runs = [Sweep((0.1, 0.2, 0.3), x, []) for x in (losses, adam)]
    states = {"initialisation": state(distance, decades), "trained": state(distance, decades)}
    problem = TrainingTask(name, len, lambda seed: seed, np.zeros(1))
    return script.TrainedModel(problem, ("a/kernel", "b/kernel", "c/kernel"), states, np.array([5.0, 5.0]), *runs)


def test_claims_hold_where_the_numbers_say_so_and_not_where_they_do_not():
    cnn = found("CNN", 0.2, 1, sgd=1.02)
    verdicts = [c.verdict for c in script.claims(cnn, found("transformer", 0.5, 3, sgd=2.0))]
    assert verdicts == ["holds"] * 5
    other = list(script.claims(found("CNN", 0.6, 1, sgd=2.0), found("transformer", 0.5, 2, sgd=1.02)))
    assert [c.verdict for c in other] == ["does not hold"] * 5
    assert other[0].ours == pytest.approx(-0.1)
    edge = list(script.claims(cnn, found("transformer", 0.5, 3, sgd=2.0, best=2)))
    assert edge[-1].verdict == "cannot tell"
    assert "best learning rate of SGD is the last" in edge[-1].reason


def test_distances_and_ranges():
    one = state(0.3, 2.0)
    np.testing.assert_allclose(one.mean(True), [0.3, 0.31])
    np.testing.assert_allclose(one.ranges, 2)


def test_one_probe_of_a_spectrum():
    both = jaxhess.spectrum(jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 9.0))), steps=4, probes=2)
    for k in range(2):
        alone = script.one_probe(both, k)
        assert alone.num_probes == 1
        np.testing.assert_array_equal(alone.ritz_values[0], both.ritz_values[k])


def test_tables_and_figure():
    models = [found("CNN", 0.2, 1, 1.0), found("transformer", 0.5, 3, 2.0)]
    assert [row[0] for row in script.training_table(models).rows] == ["CNN", "transformer"]
    assert len(script.distance_table(models).rows) == 4
    panels = script.figure(models).axes
    assert sum(bool(panel.images) for panel in panels) == 4
    assert set(script.record(models[0])) == {"blocks", "initial_losses", "states", "sgd", "adam"}


@pytest.mark.slow
def test_blocks_of_a_model_are_its_kernels():
    options = dataclasses.replace(script.SMALL, steps=2, spectrum_examples=8, examples=16)
    cnn = script.problems(options)[0]
    names, measured = script.blockwise(cnn, [cnn.initial(0)], options)
    assert names == (*(f"convs/{k}/kernel" for k in range(5)), "head/kernel")
    assert measured.absolute.shape == (1, 6, 6)
    assert (measured.largest > 0).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--seeds 1", "an error over seeds needs two or more"),
        ("--probes 1", "--probes and --steps must be at least 2"),
        ("--images prototypes --width 10", "not a multiple of 8 times 2 heads"),
        ("--images prototypes --text nowhere.txt", "nowhere.txt cannot be read"),
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
