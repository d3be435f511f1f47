"""The bias of differences: verdicts from given solves, correlations and losses; solves against a dense matrix."""

import jax
import numpy as np
import pytest
from small_models import check_refused, network, relative

from scripts.studies import difference_bias as script
from scripts.studies.bias.curvatures import AUTOMATIC, BLOCKS, EXACT, GAUSS_NEWTON, fixed, gradients_per_product, narrow
from scripts.studies.bias.retraining import Retrained
from scripts.studies.bias.solves import Solve, Systems, gradients, solve_all
from scripts.training.newton import NewtonRun

STEP = fixed(1e-3)
OTHER = fixed(1e-4)


def test_errors_of_solutions_are_those_of_the_dense_system(float64):
    exact = network()
    off = exact.shifted(0.5)  # a curvature that is wrong by half the identity
    sides = gradients(exact, [exact.batches[0].stacked], "float64")
    found = solve_all(exact, {EXACT: exact, "off": off}, sides, [2.0], 1e-5, 200, 0)
    matrix = np.asarray(exact.in_dtype("float64").to_matrix())
    values = np.linalg.eigvalsh(matrix)
    assert found.smallest == pytest.approx(values[0], rel=1e-3)
    assert found.largest == pytest.approx(values[-1], rel=1e-3)
    gradient = np.concatenate([np.asarray(x).ravel() for x in _gradient(exact.in_dtype("float64"))])
    eye = np.eye(len(matrix))
    right, wrong = (
        np.linalg.solve(matrix + shift * eye, gradient) for shift in (2 * -found.smallest, 0.5 - 2 * found.smallest)
    )
    one, other = found.solves
    assert one.error < 1e-3
    assert one.claimed <= 1e-5
    assert other.error == pytest.approx(relative(wrong, right), rel=1e-2)
    # It believes its own products; the exact ones know better.
    assert other.ended == "converged"
    assert other.claimed <= 1e-5
    left = gradient - (matrix - 2 * found.smallest * eye) @ wrong
    assert other.residual == pytest.approx(np.linalg.norm(left) / np.linalg.norm(gradient), rel=1e-2)


def _gradient(operator):
    return jax.tree.leaves(operator.value_and_gradient()[1])


def test_the_damping_of_newton_steps_is_the_one_that_ends_lowest(monkeypatch):
    ends = {0.1: 3.0, 1.0: 2.0, 10.0: 2.5}
    monkeypatch.setattr(script, "newton_run", lambda start, rule, steps, products, damping: run(start * ends[damping]))
    assert script.best_damping([1.0, 2.0], lambda exact: exact, script.Options()) == 1.0


def test_rank_correlation_counts_a_refused_solve_as_zero():
    changes = np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [np.nan, np.nan]])
    actual = Retrained(None, changes, 0.0, 0.0, np.zeros(4))
    scores = np.array([[10.0, 20.0, 30.0, -5.0], [np.nan] * 4])
    assert script.rank_correlation(scores, actual, np.array([0, 1])) == pytest.approx(0.5)
    assert script.rank_correlation(scores[:1], actual, np.array([1])) == pytest.approx(0.5)


def test_a_refused_solve_counts_as_no_solution(float64):
    exact = network()
    broken = exact.shifted(float("nan"))
    sides = gradients(exact, [exact.batches[0].stacked] * 2, "float64")
    one, other = solve_all(exact, {"broken": broken}, sides, [2.0], 1e-3, 20, 0).solves
    assert (one.ended, one.counted, other.side) == ("refused", 1.0, 1)


def test_verdicts_of_solves():
    def solve(name, error, ended="converged"):
        return [Solve(name, 1.2, k, 5, 1e-3, 1e-3, x, ended) for k, x in enumerate((0.99 * error, 1.01 * error))]

    # Whatever the iterate before negative curvature is, it is no solution.
    wrong = [*solve(STEP, 0.2), *solve(OTHER, np.nan, "refused"), *solve(narrow(STEP), 1e-3, "negative curvature")]
    systems = Systems(-1.0, 2.0, [*solve(EXACT, 1e-3), *solve(AUTOMATIC, 1e-3), *wrong, *solve(BLOCKS, 0.5)])
    found = list(script.solve_claims(systems, "", script.Options(dampings=(1.2,))))
    assert [c.verdict for c in found] == ["holds", *["does not hold"] * 3, "holds"]
    assert [c.ours for c in found[2:4]] == [1, 1]
    assert "2 of 2 solves refused or at negative curvature" in found[2].quantity
    rows = script.solve_table(systems).rows
    assert rows[2][0] == STEP
    assert rows[3][-2:] == ("1.0e+00 ± 0e+00", "refused 2")


def test_right_hand_sides_that_disagree_leave_it_open():
    solves = [Solve(name, 1.2, k, 5, 0, 0, x, "converged") for name in (EXACT, STEP)
              for k, x in enumerate((1e-3, 1e-3) if name == EXACT else (0.05, 0.3))]  # fmt: skip
    options = script.Options(dampings=(1.2,), low_precision=False)
    assert [c.verdict for c in script.solve_claims(Systems(-1.0, 2.0, solves), "", options)] == ["cannot tell"]


def test_verdicts_of_influence():
    names = (EXACT, AUTOMATIC, STEP, OTHER, GAUSS_NEWTON, BLOCKS)
    values = ([0.9, 0.9], [0.9, 0.9], [0.5, 0.5], [0.9, 0.2], [0.9, 0.9], [0.3, 0.3])
    rho = {name: np.array(x) for name, x in zip(names, values, strict=True)}
    ranks = {"one": script.Ranks(rho, {**dict.fromkeys(names, 0), STEP: 3}, dict.fromkeys(names, 7.0), np.ones(2), 0)}
    found = list(script.rank_claims(ranks, script.Options(low_precision=False, seeds=2)))
    assert [c.verdict for c in found] == ["holds", "does not hold", "cannot tell", "holds"]
    assert "3 solves refused, which count as rho = 0" in found[1].quantity
    assert script.rank_table(ranks).rows[-1][1] == "1.000 ± 0"


def run(end: float) -> NewtonRun:
    return NewtonRun(np.array([5.0, end]), np.array([0.0, 4]), np.array([0.0, 1]), np.zeros(2), np.ones(1), 0)


def test_verdicts_of_newton_steps():
    runs = {name: [run(x), run(x)] for name, x in ((EXACT, 3.0), (AUTOMATIC, 3.05), (STEP, 4.0), (GAUSS_NEWTON, 2.0))}
    adam = {
        what: script.Ends(n, np.array([x, x]), 0.1, True, 0.01)
        for what, n, x in (("steps", 10, 4.0), ("gradients", 50, 2.5))
    }
    trained = script.Trained(runs, np.array([5.0, 5.0]), adam, {EXACT: 1.0})
    found = [c.verdict for c in script.newton_claims(trained, "")]
    assert found == ["holds", "does not hold", "holds", "holds", "does not hold", "holds"]
    assert len(script.newton_table(trained).rows) == 6
    assert script.newton_table(trained).rows[-1][-1] == "rate 0.1, an end of those tried"
    ranks = {"one": script.Ranks({EXACT: np.ones(2)}, {EXACT: 0}, {EXACT: 7.0}, np.ones(0), 0)}
    systems = Systems(-1.0, 2.0, [Solve(EXACT, 2.0, k, 5, 1e-3, 1e-3, 1e-3, "converged") for k in (0, 1)])
    assert len(script.figure(systems, ranks, trained).axes) == 3


def test_costs_are_in_gradients():
    assert gradients_per_product(EXACT, 0) == pytest.approx(8 / 3)
    assert gradients_per_product(f"{STEP}, bfloat16", 0) == 2
    assert gradients_per_product(BLOCKS, 7) == pytest.approx(44 / 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--right-sides 1", "--right-sides is at least 2"),
        ("--seeds 1", "an error over seeds needs two or more"),
        ("--dampings 0.5", "each must be above 1"),
        ("--left-out 200", "from 5 to the 150 examples"),
        ("--only magic", "--only magic: there are exact; differences, automatic step"),
        ("--tests 0", "--tests is from 1 to 100"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())


@pytest.mark.study
def test_influence_at_a_tiny_size(float64):
    options = script.Options(images="prototypes", seeds=2, examples=20, left_out=8, tests=1, low_precision=False)
    found = script.influences(script.CONVEX, options)
    assert found.rho[EXACT].shape == (2,)
    assert found.unreached == 0
    assert found.rho[EXACT].min() > 0.8
    np.testing.assert_allclose(found.rho[AUTOMATIC], found.rho[EXACT], atol=0.1)
    assert found.again.size == 0
