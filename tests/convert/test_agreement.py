"""The verdict on two computations: rounding is excused, a different function is not, and it is said where."""

import dataclasses

import numpy as np
import pytest

from convert.agreement import LanczosCoefficients, Measure, Side, compare, distance, judge

RNG = np.random.default_rng(0)
EXACT = RNG.normal(size=(40, 30))


def rounded(x: np.ndarray, seed: int, by: float = 2.0**-24) -> np.ndarray:
    return x * (1 + by * np.random.default_rng(seed).normal(size=x.shape))


def test_rounding_is_explained_and_a_difference_within_it_is_not_excused():
    a, b = rounded(EXACT, 1), rounded(EXACT, 2)
    fine = compare("x", a, b, (EXACT, EXACT * (1 + 1e-13)), dtype="float32")
    assert fine.agrees
    assert 0 < fine.difference <= fine.explained < 1e-6
    # The same numbers in float32, but in float64 the two are not the same function.
    hidden = compare("x", a, b, (EXACT, EXACT * (1 + 1e-8)), dtype="float32")
    assert hidden.difference <= hidden.explained
    assert not hidden.agrees


def test_an_error_of_ours_alone_is_not_excused_by_itself():
    a, b = rounded(EXACT, 1, by=1e-3), rounded(EXACT, 2)
    line = compare("x", a, b, (EXACT, EXACT), dtype="float32")
    assert line.difference <= line.explained  # as the triangle inequality says
    assert not line.agrees


def test_without_a_wider_run_the_bound_is_called_one():
    line = compare("x", rounded(EXACT, 1), EXACT, None, dtype="float32", depth=4)
    assert (line.kind, line.agrees, line.wider) == ("bound", True, None)
    assert not compare("x", 1.001 * EXACT, EXACT, None, dtype="float32", depth=4).agrees
    assert compare("x", np.full(3, np.nan), np.ones(3), None, dtype="float32").agrees is False


def test_a_bound_that_cannot_reject_and_an_error_without_digits_are_no_verdict():
    zero = compare("x", 0 * EXACT, EXACT, None, dtype="bfloat16", depth=4)
    assert (zero.agrees, zero.word) == (None, "not decided")
    lost = compare("x", 1.3 * EXACT, 0.8 * EXACT, (EXACT, EXACT), dtype="bfloat16")
    assert (lost.agrees, lost.word) == (None, "no digits")
    assert compare("x", 1.3 * EXACT, 0.8 * EXACT, (EXACT, 1.001 * EXACT), dtype="bfloat16").agrees is False


def test_float64_needs_nothing_wider():
    assert compare("x", EXACT * (1 + 1e-12), EXACT, None, dtype="float64").agrees
    assert compare("x", EXACT * (1 + 1e-9), EXACT, None, dtype="float64").agrees is False


@pytest.mark.parametrize(("mode", "lost", "agrees"), [("full", 0.3, False), ("none", 0.3, True), ("none", 1.1, False)])
def test_a_run_of_ours_that_does_not_keep_orthogonality_does_not_pass(mode, lost, agrees):
    kept = side().lanczos["none"]
    orthogonality = {"full": np.full(4, 1e-7), "none": kept.orthogonality}
    runs = {name: kept._replace(orthogonality=o) for name, o in orthogonality.items()}
    ours = {**runs, mode: kept._replace(orthogonality=np.array([1e-8, 1e-7, 1e-6, lost]))}
    found = judge((side(lanczos=ours), side(lanczos=runs)), (side(), side()), dtype="float32", wider="float64", depth=2)
    assert found.agrees is agrees
    never = {**runs, mode: kept._replace(orthogonality=np.full(4, 0.2))}
    pair = side(lanczos=never), side(lanczos=never)
    found = judge(pair, (side(), side()), dtype="float32", wider="float64", depth=2)
    assert "departs at: orthogonality" in found.first_difference


def test_lanczos_without_a_wider_run_rests_on_the_product():
    pair = side(), side()
    for wide in (None, (side(lanczos={}), side(lanczos={}))):
        found = judge(pair, wide, dtype="float32", wider=wide and "float64", depth=2)
        words = {line.quantity: line.word for line in found.lines}
        assert found.agrees is None
        assert (words["gradient"], words["alphas (re-orth.)"]) == ("agree", "not decided")


def test_the_distance_of_measures_is_how_far_mass_moves():
    assert distance(Measure(np.array([0.0, 1]), np.array([0.5, 0.5])), Measure(np.array([0.0]), np.array([1.0]))) == 0.5


def side(**changes) -> Side:
    weights = {"first.weight": np.arange(9.0).reshape(3, 3), "second.weight": np.ones((2, 3))}
    quantities = {"logits": EXACT, "gradient": {name: 2.0 * x for name, x in weights.items()}}
    run = LanczosCoefficients(np.arange(1.0, 5), np.ones(4), np.array([1e-8, 1e-7, 1e-6, 0.1]))
    full = run._replace(alphas=run.alphas.copy(), orthogonality=np.full(4, 1e-7))

    def nodes(alphas, betas):
        return Measure(alphas, np.full(alphas.size, 1 / alphas.size))

    return dataclasses.replace(Side(weights, quantities, {"none": run, "full": full}, nodes), **changes)


def verdict(ours: Side):
    return judge((ours, side()), (ours, side()), dtype="float32", wider="float64", depth=2)


def test_what_is_the_same_agrees_for_as_many_steps_as_orthogonality_lasts():
    found = verdict(side())
    assert found.agrees
    assert found.first_difference is None
    assert found.lanczos["none"]["compared"] == 3
    late = side()
    late.lanczos["none"].alphas[3] += 1
    assert verdict(late).agrees
    early = side(
        lanczos={**side().lanczos, "none": LanczosCoefficients(np.array([1.0, 2.1, 3, 4]), *side().lanczos["none"][1:])}
    )
    assert (
        "alphas" in judge((early, side()), (early, side()), dtype="float32", wider="float64", depth=2).first_difference
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first.weight": np.arange(9.0).reshape(3, 3).T}, "first.weight: one is the transpose"),
        ({"second.weight": np.array([[1, 1, 1], [1, 1, 1.01]])}, "second.weight: 1 of 6 values, first at [1, 2],"),
        ({"second.weight": np.ones((3, 2))}, "second.weight: shape [3, 2] against [2, 3]"),
    ],
)  # fmt: skip
def test_a_broken_weight_is_named(change, words):
    found = verdict(side(weights={**side().weights, **change}))
    assert not found.agrees
    assert words in found.first_difference


def test_a_gradient_that_differs_is_located_in_its_parameter():
    gradient = dict(side().quantities["gradient"])
    gradient["second.weight"] = gradient["second.weight"] * 1.001
    found = verdict(side(quantities={**side().quantities, "gradient": gradient}))
    assert found.first_difference == "The computation departs at: gradient, most in second.weight."
