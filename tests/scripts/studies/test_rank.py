"""Ranks: floors against dense matrices and closed forms, ranks of networks whose symmetries are known, verdicts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import TINY, batch_of, check_refused, tokens

import jaxhess
from jaxhess.errors import InputError
from jaxhess.models import initialize
from jaxhess.vectors import random_key
from scripts.studies import rank as script
from scripts.studies.ranks import classifier, drawn, floors


def test_rounding_to_each_format_is_as_exact_as_the_format_and_leaves_norms_and_biases():
    params = initialize(TINY, random_key(0)).params
    for name, most in (("bfloat16", 2.0**-8), ("float8", 2.0**-4), ("int8", None)):
        changed = floors.rounded(params, name)
        for (path, x), y in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(changed), strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            if path[-1].key != "kernel":
                np.testing.assert_array_equal(x, y)
            elif name == "int8":  # half a step of 1/127 of the largest entry, which is itself kept
                assert 0 < np.abs(x - y).max() <= np.abs(x).max() / 254 * (1 + 1e-6)
            else:  # half a unit in the last place, of numbers that are not subnormal
                large = np.abs(x) > np.abs(x).max() / 1000
                assert np.abs(x - y)[large].max() > 0
                assert (np.abs(x - y) <= most * np.abs(x) * (1 + 1e-6))[large].all()
        assert 0 < floors.relative_change(params, changed) < 0.1
        np.testing.assert_allclose(*(jax.tree.leaves(floors.rounded(changed, name))[0],) * 2)


def test_int8_has_one_scale_for_each_output():
    assert floors._axes("embed/kernel", 2) == ((1,), (0, 1))
    assert floors._axes("layers/attention/out/kernel", 4)[0] == (1, 2)
    assert floors._axes("layers/attention/query/kernel", 4)[0] == (1,)
    with pytest.raises(InputError, match="without experts"):
        floors._axes("layers/mlp/experts/up/kernel", 4)
    x = jnp.ones((1, 3, 2)).at[0, :, 1].multiply(1e-3)
    y = floors.rounded({"layers": {"mlp": {"up": {"kernel": x}}}}, "int8")
    np.testing.assert_allclose(jax.tree.leaves(y)[0], x, rtol=1e-6)  # a scale of all would round 1e-3 to zero


def _quadratic(curvatures):
    """Losses (c/2) p^4 / 6 whose Hessian at p is diag(mean of c) p^2: batches differ by their c alone."""

    def loss(params, batch):
        return jnp.sum(batch * params["kernel"] ** 4 / 12, axis=-1).sum(), jnp.float32(len(batch))

    params = {"kernel": jnp.asarray([1.001, 2.003, 3.007], jnp.float32)}
    return jaxhess.Hessian(loss, params, jaxhess.Microbatches(jnp.asarray(curvatures, jnp.float32)))


def test_the_floor_of_the_data_is_half_the_difference_of_two_halves():
    squares = np.array([1.001, 2.003, 3.007]) ** 2
    expected = 0.5 * np.sqrt(np.mean((np.array([-2.0, -2.0, 0.0]) * squares) ** 2))
    hessian = _quadratic([[[1.0, 1.0, 1.0]], [[3.0, 3.0, 1.0]]] * 2)  # the halves are every other microbatch
    found = floors.data_floor(hessian, 3, 0)
    assert found.value == pytest.approx(expected, rel=1e-5)  # exact for random signs and a diagonal matrix
    with pytest.raises(InputError, match="two halves"):
        floors.data_floor(_quadratic([[[1.0, 1.0, 1.0]]]), 3, 0)


def _measured(floor):
    """Of a Hessian with 900 zeros and 100 eigenvalues of one size, with a root mean square of 1."""
    matrix = jaxhess.MatrixOperator(jnp.diag(jnp.append(jnp.zeros(900), jnp.full(100, 10**0.5))))
    spectrum = jaxhess.spectrum(matrix, steps=10, probes=4)
    return floors.LanguageModelRank(spectrum, np.zeros(4), 1e-3, floor, [])


def test_eigenvalues_within_a_floor_are_those_of_both_ends_of_its_interval():
    found = _measured(jaxhess.Estimate(2.9, 0.3, 3.0, positive=True))  # its interval reaches across sqrt(10)
    low, high = found.shares(found.floors.values())
    assert low[0] < 0.9 < high[0] < 1
    assert low[1] < 0.9
    assert high[1] == pytest.approx(1, abs=1e-6)
    assert jaxhess.near_zero(found.spectrum, [2.9]).interval()[1][0] < 0.95


@pytest.mark.parametrize(("floor", "verdict"), [(0.3, "holds"), (0.9, "cannot tell")])
def test_a_floor_as_large_as_the_matrix_decides_nothing(floor, verdict):
    claims = list(script.model_claims(_measured(jaxhess.Estimate(floor, 0.01, 3.0, positive=True)), ""))
    by_data = claims[3]
    assert by_data.quantity.startswith(
        f"share of eigenvalues within the floor of the sample of the data, {floor:.2g} of"
    )
    assert by_data.verdict == verdict
    assert ("root mean square" in by_data.obstacle) == (verdict == "cannot tell")
    assert claims[2].verdict == "holds"  # rounding of products, a thousandth of it


def test_shifts_of_extremes_by_rounded_weights_are_those_of_a_diagonal_matrix():
    hessian = _quadratic([[[1.0, -1.0, 1.0]]])
    squares = np.array([1.0, -1.0, 1.0]) * np.array([1.001, 2.003, 3.007], np.float32).astype(float) ** 2
    rounded = np.asarray(jnp.asarray([1.001, 2.003, 3.007]).astype(jnp.bfloat16), np.float64) ** 2 * [1, -1, 1]
    pairs = {end: {"kernel": jnp.zeros(3).at[k].set(1.0)} for end, k in (("smallest", 1), ("largest", 2))}
    before = jaxhess.spectrum(hessian, steps=3, probes=2)
    found = floors.rounding(hessian, "bfloat16", pairs, before, 3, 2, jaxhess.Storage(), 0)
    for shift, k in ((found.smallest, 1), (found.largest, 2)):
        assert shift.before == pytest.approx(squares[k], rel=1e-5)
        assert shift.after == pytest.approx(rounded[k], rel=1e-5)
        assert shift.first_order == pytest.approx(rounded[k] - squares[k], abs=1e-5)  # the eigenvector is the same
        assert shift.residual < 1e-5
    assert found.floor.value == pytest.approx(np.sqrt(np.mean((rounded - squares) ** 2)), rel=1e-2)


def test_smooth_networks_have_full_rank_up_to_the_symmetries_of_the_softmax():
    """Adding a number to all logits changes nothing: width + 1 directions of the head. No other symmetry with gelu."""
    found = classifier.count_rank("gelu", 4, 0, classifier.pooled_images("prototypes", 300), 10)
    assert found.parameters == 17 * 4 + 5 * 4 + 5 * 10 == 138
    assert found.rank == found.gauss_newton == found.parameters - found.symmetries == 138 - 5
    assert found.constant == pytest.approx(133 / 80)
    assert found.beyond(0.0) >= found.rank >= found.beyond(1e-2)
    table = drawn.proved_table(found, steps=20, probes=2)
    for _, counted, proved in table.rows:
        low, high = map(float, proved.split(" to "))
        assert low <= float(counted) <= high


def _counts(power, zeros=0.5, seeds=2):
    """Of networks whose rank and large eigenvalues are (2 w)^power."""
    rows = []
    for seed in range(seeds):
        for width in (8, 32):
            rank = round((2 * width) ** power)
            size = round(rank / (1 - zeros))
            eigenvalues = np.append(np.zeros(size - rank), np.ones(rank))
            rows.append(classifier.RankCount("relu", width, seed, size, 2 * width, 0.1, rank, rank, 0.0, eigenvalues))
    return rows


def test_a_rank_that_grows_like_the_neurons_keeps_the_bound_and_one_like_their_square_does_not():
    assert [c.verdict for c in script.classifier_claims(_counts(1, zeros=0.7), "digits")] == ["holds"] * 4
    found = [c.verdict for c in script.classifier_claims(_counts(2, zeros=0.2), "digits")]
    assert found == ["does not hold", "does not hold", "holds", "does not hold"]


def test_an_exponent_says_how_far_the_numbers_are_from_a_power_law():
    """With gelu the rank is w^2 + 27 w + 9 whatever the seed: no scatter, and no power."""
    ranks = {w: w * w + 27 * w + 9 for w in (8, 16, 32)}
    counts = [
        classifier.RankCount("gelu", w, seed, n, 2 * w, 0.1, n, n, 0.0, np.ones(n))
        for seed in (0, 1)
        for w, n in ranks.items()
    ]
    claim = next(script.classifier_claims(counts, "prototypes"))
    local = np.log2(ranks[16] / ranks[8]), np.log2(ranks[32] / ranks[16])
    assert claim.ours - claim.error <= local[0] < claim.ours < local[1] <= claim.ours + claim.error + 1e-9
    assert claim.error == pytest.approx((local[1] - local[0]) / 2, rel=1e-6)
    assert "prototypes" in claim.model
    power = script.classifier_claims(_counts(2, zeros=0.2), "digits")
    assert next(power).error < 1e-12


def test_the_papers_table_proves_a_degeneracy_near_zero_and_none_at_zero():
    claims = list(script.paper_claims())
    assert [c.verdict for c in claims] == ["holds", "cannot tell"] * 2
    for claim in claims[::2]:
        assert claim.ours > 1 - 1e-7
    for _, weights in script.TABLE_2.values():
        assert sum(weights) == pytest.approx(1, abs=1e-4)


@pytest.mark.study
def test_a_study_of_a_small_model_has_every_floor():
    model = initialize(TINY, random_key(0))
    hessian = jaxhess.Hessian(
        model.loss(), model.params, [batch_of(row) for row in np.split(tokens(2, 8, TINY.vocab_size), 2)]
    )
    options = dataclasses.replace(script.SMALL, formats=("bfloat16",), samples=2)
    found = script.measure(options, hessian)
    assert list(found.floors) == ["rounding of products", "rounding of weights to bfloat16", "sample of the data"]
    assert 0 < found.floors["rounding of products"].value < found.floors["rounding of weights to bfloat16"].value
    claims = list(script.model_claims(found, "a small model"))
    assert len(claims) == 6
    counts = _counts(1)
    assert len(list(drawn.tables(found, counts))) == 4
    assert len(drawn.figure(found, counts).axes) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--sequences 3", "two halves"),
        ("--probes 1", "at least 2"),
        ("--steps 5", "at least 10"),
        ("--widths 8", "two different"),
        ("--examples 1", "at least 32"),
        ("--images digits --examples 5000", "1797"),
        ("--model nowhere/none", "nowhere/none"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())
