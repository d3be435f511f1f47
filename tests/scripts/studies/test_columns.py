"""The study of columns: classes of entries against a matrix made for it, bands that are planted, and a small run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import check_refused, network

import jaxhess
from jaxhess.data import TokenBlocks
from jaxhess.results.study import Claim, Study
from scripts.studies import columns as script
from scripts.studies.column_entries import bands, measured


@pytest.mark.usefixtures("float64")
def test_entries_are_what_they_were_made_to_be():
    """One entry of each class, beside two large ones."""
    wide = {"a": jnp.array([0.0, 1e-20, 1e-9, 1.0]), "b": jnp.array([[2.0, 0.0]])}
    nudged = {"a": jnp.array([0.0, -3e-20, 1e-9, 1.0]), "b": jnp.array([[2.0, 0.0]])}
    plain = {"a": jnp.array([0.0, 0.0, -1e-9, 1.0], jnp.float32), "b": jnp.array([[2.0, 0.0]], jnp.float32)}
    kinds = jaxhess.Blocks.by(wide, "matrices")
    found = measured.entries_of("a[0]", kinds, "a", plain, wide, nudged)
    assert found.classes.tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert found.small.tolist() == [2, 1, 1, 0]  # 0, 0, 1e-20, 1e-9
    assert found.below["float64"][[0, 3, -1]].tolist() == [3, 4, 4]  # 1e-12, 1e-9, 0.1
    assert found.below["float32"][[0, 3]].tolist() == [3, 4]
    assert (found.near_zero, found.negligible) == (4, 4)
    assert found.length == pytest.approx(np.sqrt(5))
    assert found.floor == pytest.approx(2e-9 / np.sqrt(6))
    without = measured.entries_of("a[0]", kinds, "a", plain, None, jax.tree.map(jnp.negative, plain))
    assert without.classes.sum(axis=0).tolist() == [3, 0, 3, 0]  # nothing is known of float64


@pytest.mark.usefixtures("float64")
def test_what_the_loss_cannot_see_is_zero_and_what_it_cancels_is_zero_within_rounding():
    """Softmax of a sum with a constant: its shift has no curvature, which rounding hides; an unused weight has none."""

    def loss(w, x):
        scores = x @ w["scores"] + w["shift"]
        return -jax.nn.log_softmax(scores)[:, 0].sum(), len(x)

    params = {"scores": jnp.ones((3, 4)) / 3, "shift": jnp.ones(()), "unused": jnp.ones(2)}
    numbers = np.random.default_rng(0)
    params["scores"] = jnp.asarray(numbers.normal(size=(3, 4)))
    H = jaxhess.Hessian(loss, params, [jnp.asarray(numbers.normal(size=(5, 3)))])
    plain = H.in_dtype("float32")
    kinds = jaxhess.Blocks.by(H, "matrices")
    products = measured.ColumnOperators(plain, H, measured.nudged(H, 0))
    shift, unused, score = measured.measured(products, [12, 13, 0], kinds, 2)
    assert (shift.kind, unused.kind, score.kind) == ("shift", "unused", "scores")
    assert shift.classes[kinds.names.index("scores"), :2].sum() >= 8  # of 12; of noise alone 3% look like numbers
    assert unused.classes.sum(axis=0).tolist() == [15, 0, 0, 0]
    assert score.classes[kinds.names.index("scores")].tolist() == [0, 0, 0, 12]
    assert measured.kind_of(kinds, 14) == "unused"


def banded(size, width, rng):
    matrix = rng.normal(size=(size, size))
    rows, columns = np.indices(matrix.shape)
    return np.where(abs(rows - columns) <= width, matrix + matrix.T, 0)


def test_a_band_that_was_shuffled_is_found_and_is_none_once_entries_are_permuted():
    rng = np.random.default_rng(0)
    order = rng.permutation(60)
    matrix = banded(60, 2, rng)[np.ix_(order, order)]
    pattern = bands.above(matrix, 0.0)
    found = bands.bandwidths(pattern, 5, rng)
    assert found.own * 59 <= 4  # at most twice the band: breadth-first search from an end
    assert found.ratio < 0.2
    moved = bands.permuted(matrix, rng)
    np.testing.assert_array_equal(moved, moved.T)
    np.testing.assert_array_equal(np.sort(moved, axis=None), np.sort(matrix, axis=None))
    np.testing.assert_array_equal(np.diag(moved), np.diag(matrix))


def claims_of(matrices, **options):
    """The claims on bands of parts, each a matrix."""
    chosen = script.Options(permutations=5, **options)
    rng = np.random.default_rng(1)
    found = [of for matrix in matrices if (of := script.ordered(matrix, chosen, rng))]
    rows = script.banded(chosen, found)
    return [Claim("", "", *texts, holds, *ours, "", obstacle) for *texts, holds, ours, obstacle in rows]


def part(width, rng, size=120):
    """Random rows of a large matrix that is zero further than this share of its size from the diagonal."""
    places, entries = rng.random(size), rng.normal(size=(size, size))
    return np.where(abs(places[:, None] - places) <= width, entries + entries.T, 0)


def test_a_planted_band_is_found_in_parts_of_the_default_size():
    """A narrow and a wide one, of which the largest 2% do not fill the band; scattered entries and a full matrix are
    none."""
    rng = np.random.default_rng(0)
    assert [c.verdict for c in claims_of([part(0.02, rng) for _ in range(3)])] == ["holds"] * 2
    assert claims_of([part(0.25, rng) for _ in range(3)])[0].verdict == "holds"
    scattered = [bands.permuted(part(0.05, rng), rng) for _ in range(3)]
    assert [c.verdict for c in claims_of(scattered)] == ["does not hold"] * 2
    assert claims_of([part(2.0, rng) for _ in range(3)])[0].verdict == "does not hold"


def test_bands_that_parts_cannot_show_are_no_verdict():
    """Too narrow for 120 of the rows, no parts, and parts that are zero: each claim is stated, with what is amiss."""
    rng = np.random.default_rng(0)
    narrow, _ = claims_of([part(0.002, rng) for _ in range(3)])
    assert narrow.verdict == "cannot tell"
    assert narrow.obstacle.startswith("parts of a band with as many entries have")
    for claim in claims_of([], sample=0):
        assert (claim.verdict, claim.ours, claim.obstacle[:10]) == ("cannot tell", None, "--sample 0")
    for claim in claims_of([np.zeros((9, 9)), np.zeros((9, 9)), part(0.1, rng)]):
        assert claim.obstacle == "1 of 3 random parts have entries that are not zero"


def test_parts_of_a_band_have_the_given_number_of_entries():
    rng = np.random.default_rng(0)
    for count in (0, 1, 30, 190):
        pattern = bands.part_of_band(20, count, rng)
        assert np.triu(pattern, 1).sum() == count
        np.testing.assert_array_equal(pattern, pattern.T)


def test_growth_is_of_columns_that_are_zero_in_no_part_and_its_error_over_parts():
    parts = [[1e2, 1e3, 0.0], [1e3, 1e4, 7.0], [1e2, 1e5, 7.0]]
    grown, count = script.growth(parts, [1.0, 10.0, 5.0])
    assert count == 2
    assert grown.value == pytest.approx((2 + 3 + 3) / 3)  # of each part: (2 + 2)/2, (3 + 3)/2, (2 + 4)/2
    assert grown.error == pytest.approx(4.3027 / 3, rel=1e-4)  # t(2) times sqrt(1/3) over sqrt(3)
    assert script.growth([[0.0], [1.0]], [1.0])[1] == 0


def test_subsamples_are_all_disjoint_parts_of_the_sequences(monkeypatch):
    """Five sequences in twos: the last one is in neither half."""
    seen = []
    monkeypatch.setattr(script, "columns", lambda operator, *_: seen.append(operator) or iter(()))
    options = script.Options(sequences=5, microbatch=2, subsamples=(2,), mesh="fsdp=1")
    tokens = np.arange(5 * 4).reshape(5, 4)
    data = TokenBlocks(tokens, np.ones((5, 3), np.float32))
    script.mean_squares(options, data, network(), [0])
    first = [operator.batches[0].stacked.tokens[..., 0].tolist() for operator in seen]
    assert first == [[[0, 4], [8, 12], [16, 0]], [[0, 4]], [[8, 12]]]


def test_patterns_keep_the_largest_entries_and_no_zero_row():
    matrix = np.array([[1.0, 0.5, 0, 3], [0.5, 1, 0, -2], [0, 0, 0, 0], [3, -2, 0, 1]])
    assert bands.without_zero_rows(matrix).tolist() == [[1, 0.5, 3], [0.5, 1, -2], [3, -2, 1]]
    one, many = bands.largest(matrix, [1 / 6, 1.0])
    assert np.argwhere(np.triu(one, 1)).tolist() == [[0, 3]]
    assert np.argwhere(np.triu(many, 1)).tolist() == [[0, 1], [0, 3], [1, 3]]  # zeros are not kept
    full = bands.bandwidths(np.ones((5, 5), bool), 2, np.random.default_rng(0))
    assert (full.own, full.ratio, full.kept) == (1.0, 1.0, 1.0)
    assert bands.bandwidths(np.eye(5, dtype=bool), 2, np.random.default_rng(0)).ratio == 1.0
    assert bands.asymmetry(matrix) == 0
    matrix[0, 1] = 1.5
    assert bands.asymmetry(matrix) == pytest.approx(1 / 3)


def test_nudged_weights_differ_in_their_last_bits():
    H = network()
    for x, y in zip(jax.tree.leaves(H.params), jax.tree.leaves(measured.nudged(H, 0).params), strict=True):
        relative = np.asarray(abs(y - x) / abs(x))
        assert relative.max() <= 2.0**-22
        assert np.mean(relative > 0) > 0.9


@pytest.mark.study
def test_a_small_run_states_every_claim(tmp_path):
    options = dataclasses.replace(script.SMALL, out=Path(tmp_path / "out"))
    study = script.study(options)
    assert isinstance(study, Study)
    assert len(study.claims) == 9
    assert all(claim.ours is not None for claim in study.claims)
    assert sum(claim.obstacle.startswith("parts of a band") for claim in study.claims) == 1  # 2% of parts of 24
    assert all(sum(map(sum, c["classes"].values())) == 1305344 for c in study.record["columns"])
    (grown,) = (claim for claim in study.claims if "broaden" in claim.statement)
    assert 0 < grown.error < 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--columns 1", "--columns 1 must be at least 2"),
        ("--sample 2", "0 or at least 3"),
        ("--permutations 1", "at least 2"),
        ("--subsamples 9", "factors from 2 to the 8 sequences"),
        ("--model nowhere/none", "nowhere/none"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, sentence, tmp_path, capsys):
    check_refused(capsys, script, tmp_path / "out", sentence, *arguments.split())
