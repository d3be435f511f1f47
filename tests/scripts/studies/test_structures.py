"""The study of structures finds the ones that were planted, and says what refutes a claim."""

import types

import numpy as np
import pytest
from small_models import check_refused, run_command

from jaxhess.models import abstract_params
from jaxhess.results.study import Study
from scripts.studies import structures as script
from scripts.studies.approximations import models
from scripts.studies.approximations.compared import RANDOM, layer_patterns, partitions, ratio, root_of_ratio
from scripts.studies.approximations.drawn import figure
from scripts.studies.approximations.found import claims, tables

OPTIONS = script.Options(random=24, budgets=(1, 4, 16), right_sides=1)


def planted(strength: float, seed: int, layers: int = 1) -> models.DenseProblem:
    """Blocks by layers of a decoder, plus three eigenpairs of this strength and noise."""
    numbers = np.random.default_rng(seed)
    like = abstract_params(models.Shape(width=4, layers=layers, heads=2).config(8))
    operator = types.SimpleNamespace(shape_dtype=like, loss=None)
    problem = models.DenseProblem(f"planted {seed}", {"Hessian": operator}, {}, None, np.ones(1), np.ones((1, 1)), 0.0)
    labels = partitions(problem)["layers"].labels
    n = labels.size
    root = numbers.normal(size=(n, n)) * (labels[:, None] == labels)
    matrix = root @ root.T / n
    vectors = np.linalg.qr(numbers.normal(size=(n, 3)))[0]
    noise = 1e-4 * numbers.normal(size=(n, n))
    matrix = matrix + strength * vectors @ vectors.T + noise + noise.T
    gradients = numbers.normal(size=(8, n)) @ matrix
    return models.DenseProblem(
        problem.name, problem.operators, {"Hessian": matrix}, None, gradients.mean(0), gradients, 0.0
    )


def results(strength: float):
    return [script.result(OPTIONS, planted(strength, seed), "Hessian", None, False) for seed in (0, 1)]


@pytest.mark.parametrize(("strength", "verdict"), [(100.0, "holds"), (0.0, "does not hold")])
def test_what_was_planted_is_found(strength, verdict):
    found = results(strength)
    by_statement = {claim.statement: claim for claim in claims(found)}
    assert (
        by_statement["Hessian: eigenpairs with a diagonal are better than blocks of the same storage."].verdict
        == verdict
    )
    off = by_statement["Block-diagonal curvature is off by order one."]
    assert off.verdict == verdict  # blocks by layers miss what was added, or nothing
    assert by_statement["K-FAC is off by order one."].verdict == "cannot tell"  # there are no linear maps
    # Four vectors hold three pairs, or two and a diagonal.
    assert (found[0].winner(4, RANDOM) == "eigenpairs") == (verdict == "holds")
    assert figure(found).axes
    titles = [table.title for table in tables(found)]
    assert len(titles) == len(set(titles)) == 5


def test_partitions_nest_and_bands_are_of_neighbours():
    cuts = partitions(planted(1.0, 0, layers=2))
    sizes = [len(cut.blocks) for cut in cuts.values()]
    assert list(cuts) == ["rows", "heads", "matrices", "kinds", "layers"]
    assert sizes == sorted(sizes, reverse=True)
    # Rows: 27 and 27 of embedding and head, 5 norms; in two layers 4 of each of queries, keys, values and outputs,
    # 8 of gates, 8 of ups, 4 of downs.
    assert sizes[0] == 27 + 27 + 5 + 2 * (4 * 4 + 8 + 8 + 4)
    layers = cuts["layers"]
    parents = cuts["rows"].parents(layers)
    np.testing.assert_array_equal(parents[cuts["rows"].labels], layers.labels)
    patterns = layer_patterns(layers.blocks)
    assert list(patterns) == ["band 1", "band 2", "arrow"]
    assert layers.blocks.names == ("embed", "layers/0", "layers/1", "final_norm", "head")
    np.testing.assert_array_equal(patterns["band 1"][1], [True, True, True, False, False])
    np.testing.assert_array_equal(patterns["arrow"][1], [True, True, False, False, True])
    assert cuts["heads"].equals(cuts["heads"])
    assert not cuts["heads"].equals(cuts["matrices"])


def test_ratios_have_the_errors_of_their_scatter():
    numbers = np.random.default_rng(0)
    draws = numbers.gamma(5, size=(2, 400, 30))
    values, errors = np.array([ratio(*pair) for pair in draws.swapaxes(0, 1)]).T
    # The standard deviation of 400 draws is known to 1 / sqrt(800); an estimate of it from 30 values is off by 1 / 30.
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.15)
    assert root_of_ratio(4 * np.ones(5), np.ones(5)) == (2, 0)


def test_letters_are_read_in_runs(tmp_path):
    (tmp_path / "text").write_text("Ab,\n\n1z")
    assert models.letters(tmp_path / "text").tolist() == [1, 2, 0, 26]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--budgets 0", "a budget is at least 1"),
        ("--sizes 6 1 2", "2 heads do not divide a width of 6"),
        ("--damping 2", "between 0 and 1"),
        ("--random 1", "--random is 1; at least 2 is needed"),
        ("--held-out 1000000", "The text has"),
        ("--text nowhere.txt", "nowhere.txt: No such file"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())


@pytest.mark.study
def test_the_study_of_small_decoders(tmp_path):
    arguments = "--sizes 4 1 1 4 2 1 --train-steps 20 --length 8 --sequences 4 --budgets 1 8 --trained-tokens 0 --out"
    run_command(script, *arguments.split(), str(tmp_path))
    found = Study.load(tmp_path)
    assert len(found.figures[0].png) > 10_000
    assert all(claim.ours is not None for claim in found.claims)
    for one in found.record["results"]:
        for name, prediction in one["predicted"].items():
            # Of some ten structures: five standard errors of either estimate.
            for value, error in (prediction["mapped"], prediction["vectors"]):
                assert abs(value - prediction["exact"]) < 5 * error, name
