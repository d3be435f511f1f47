"""Coupling maps say what dense Hessians say: norms of blocks, what approximations miss, products of the same probes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import TINY, Diagonal, batch_of, matrix, network, operator_of, random_model, tokens

from jaxhess import Blocks, Checkpoint, CouplingMap, Hessian, coupling_map, make_mesh
from jaxhess.errors import InputError
from jaxhess.structure.approximations import approximations, arrow, band, block_diagonal
from jaxhess.vectors import random_key, random_probe
from tests.operators.test_blocks import flat, labels_of, rows_of

FAMILIES = {
    "llama": dataclasses.replace(TINY, qk_norm=False),
    "qwen3, tied": dataclasses.replace(TINY, tied_embeddings=True),
    "gpt2": dataclasses.replace(
        TINY, norm="layer", norm_bias=True, qk_norm=False, rope=None, gated_mlp=False, activation="gelu", num_layers=1
    ),
}

CASES = [pytest.param(name, marks=() if name == "llama" else pytest.mark.study) for name in FAMILIES]


def small_hessian(family: str = "llama", kind=Hessian, mesh=None, **change) -> Hessian:
    config = dataclasses.replace(FAMILIES[family], **change)
    model = random_model(config, mesh)
    return kind(model.loss(), model.params, [batch_of(tokens(8, 5, config.vocab_size))])


@functools.cache
def dense(family: str) -> tuple[Hessian, np.ndarray]:
    """The operator in float64, and its matrix."""
    with jax.enable_x64(True):
        operator = small_hessian(family, dtype="float64")
        return operator, np.asarray(operator.to_matrix())


def cut(a: np.ndarray, blocks: Blocks) -> list[list[np.ndarray]]:
    """The blocks of a dense matrix."""
    labels = labels_of(blocks)
    return [[a[np.ix_(labels == i, labels == j)] for j in range(len(blocks))] for i in range(len(blocks))]


def exact(a: np.ndarray, blocks: Blocks) -> np.ndarray:
    """[B, B] Frobenius norms."""
    return np.array([[np.linalg.norm(x) for x in row] for row in cut(a, blocks)])


def drawn_map(a: np.ndarray, groups: list[int], probes: int, seed: int) -> CouplingMap:
    """What `coupling_map` gives, by NumPy."""
    labels, count = np.asarray(groups), max(groups) + 1
    v = np.random.default_rng(seed).normal(size=(probes, len(a)))
    parts = np.where(labels == np.arange(count)[:, None, None], v, 0)  # [B, probes, n]
    products = parts @ a
    member = (labels == np.arange(count)[:, None]).astype(float)
    lengths = np.sqrt(np.einsum("bpn,an->pab", products**2, member))
    forms = np.einsum("bpn,pn,bn->pb", products, v, member)
    nothing = np.zeros((count, probes))
    sizes = np.bincount(labels)
    return CouplingMap(tuple("abcdefgh"[:count]), sizes, lengths, forms, nothing, nothing, nothing[0], nothing[0])


@pytest.mark.parametrize("family", CASES)
def test_maps_of_models_are_those_of_their_dense_hessians(float64, family):
    """Of the same probes: what each part of each product is, to float64's rounding."""
    operator, a = dense(family)
    blocks = Blocks.by(operator.shape_dtype, "layers")
    labels = labels_of(blocks)
    found = coupling_map(operator, blocks, probes=2, seed=3, together=3)
    for p in range(2):
        v = flat(random_probe(jax.random.fold_in(random_key(3), p), operator.shape_dtype))
        parts = np.where(labels == np.arange(len(blocks))[:, None], v, 0) @ a
        own = np.where(labels == np.arange(len(blocks))[:, None], parts, 0).sum(0)
        whole = parts.sum(0)
        for i in range(len(blocks)):
            np.testing.assert_allclose(
                found.lengths[p, i], np.linalg.norm(parts[:, labels == i], axis=1), rtol=1e-10, atol=1e-12
            )
            mine, all_ = own[labels == i], whole[labels == i]
            missed = np.linalg.norm(all_ - mine) / np.linalg.norm(all_)
            assert found.fidelity_error[i, p] == pytest.approx(missed, rel=1e-9)
            cosine = mine @ all_ / np.linalg.norm(mine) / np.linalg.norm(all_)
            assert found.fidelity_cosine[i, p] == pytest.approx(cosine, abs=1e-9)
        np.testing.assert_allclose(found.forms[p], [v[labels == b] @ parts[b][labels == b] for b in range(len(blocks))])
        assert found.whole_error[p] == pytest.approx(np.linalg.norm(whole - own) / np.linalg.norm(whole), rel=1e-9)
        assert found.whole_cosine[p] == pytest.approx(whole @ own / np.linalg.norm(whole) / np.linalg.norm(own))
    np.testing.assert_array_equal(found.coupling, found.coupling.T)
    np.testing.assert_allclose((found.coupling**2).sum(), found.frobenius_norm().value ** 2)


@pytest.mark.parametrize("family", CASES)
def test_norms_lie_within_three_standard_errors(family):
    """In 200 repetitions with 8 probes: for Student's t with 7 degrees of freedom 98% do, and fewer where squares are
    skewed because one eigenvalue dominates."""
    operator, a = dense(family)
    blocks = Blocks.by(operator.shape_dtype, "layers")
    true = exact(a, blocks)
    maps = [drawn_map(a, labels_of(blocks).tolist(), 8, seed) for seed in range(200)]
    inside = [np.abs(found.coupling - true) <= 3 * found.coupling_error for found in maps]
    share = np.mean(inside, axis=0)
    print(f"\n{family}: {share.min():.3f} to {share.max():.3f}, mean {share.mean():.3f}")
    assert share.max() <= 0.99
    assert share.min() >= 0.9
    norms = [found.frobenius_norm() for found in maps]
    assert np.mean([abs(norm.value - np.linalg.norm(a)) <= 3 * norm.standard_error for norm in norms]) >= 0.9


def test_errors_of_approximations_are_those_of_the_dense_matrix():
    """Over 400 repetitions intervals of 95% hold the truth in 90% to 99% (four standard deviations of the share)."""
    a = matrix([5.0, -3.0, 2.0, 1.0, 1.0, 0.5, -0.5, 0.1, 0.1])
    groups = [0, 0, 1, 1, 1, 2, 2, 3, 3]
    kept = band([0, 1, 2, 3], 1)
    mask = kept[np.ix_(groups, groups)]
    true = np.linalg.norm(np.where(mask, 0, a)) / np.linalg.norm(a)
    traces = [np.trace(x[i]) for i, x in enumerate(cut(a, rows_of(a, groups)))]
    missed, first = np.where(mask, 0, a), np.array(groups) == 0
    true_row = np.linalg.norm(missed[first]) / np.linalg.norm(a[first])

    def holds(estimate, value) -> bool:
        low, high = estimate.interval()
        return low <= value <= high

    maps = [drawn_map(a, groups, 10, seed) for seed in range(400)]
    inside = [holds(found.relative_error(kept), true) for found in maps]
    rows = [holds(found.row_error(kept)[0], true_row) for found in maps]
    few = [drawn_map(a, groups, 2, seed).relative_error(np.eye(4, dtype=bool)) for seed in range(9)]
    assert max(estimate.interval()[1] for estimate in few) == 1  # and no more, though its logarithm knows no end
    assert max(dataclasses.replace(estimate, most=np.inf).interval()[1] for estimate in few) > 1
    trace = [list(map(holds, found.trace(), traces)) for found in maps]
    assert 0.9 <= np.mean(inside) <= 0.99
    assert 0.88 <= np.mean(rows) <= 0.995
    assert 0.9 <= np.mean(trace) <= 0.99


def test_coarser_blocks_follow_without_a_product():
    """Sums of the finer squares: an unbiased estimate of the same norms, whose mean over many probes is the truth."""
    a = matrix([5.0, -3.0, 2.0, 1.0, 1.0, 0.5])
    fine = drawn_map(a, [0, 1, 2, 2, 3, 3], 4000, 0)
    coarse = fine.merged(lambda name: "left" if name in "ab" else "right")
    true = exact(a, rows_of(a, [0, 0, 1, 1, 1, 1]))
    assert coarse.names == ("left", "right")
    assert coarse.sizes.tolist() == [2, 4]
    assert (np.abs(coarse.coupling - true) < 4 * coarse.coupling_error).all()
    assert np.isnan(coarse.whole_error).all()
    assert coarse.names == Blocks.by({"left": np.zeros(2), "right": np.zeros(4)}, "matrices").names
    assert coarse.frobenius_norm().value == pytest.approx(fine.frobenius_norm().value)
    kept = block_diagonal(["left", "left", "right", "right"])
    assert coarse.relative_error(np.eye(2, dtype=bool)).value == pytest.approx(fine.relative_error(kept).value)


def test_traces_of_coarser_blocks_have_the_error_of_their_finer_ones():
    """The scatter of 200 traces is what each says, within 20%: four standard deviations of such a scatter."""
    a = matrix([5.0, -3.0, 2.0, 1.0, 1.0, 0.5])
    groups, member = [0, 0, 1, 1, 2, 2], {"a": "left", "b": "right", "c": "right"}
    found = [drawn_map(a, groups, 50, seed).merged(member.get).trace() for seed in range(200)]
    values = np.array([[estimate.value for estimate in row] for row in found])
    errors = np.array([[estimate.standard_error for estimate in row] for row in found])
    np.testing.assert_allclose(values.std(0), np.sqrt((errors**2).mean(0)), rtol=0.2)


def test_patterns_of_kept_blocks():
    names = ["embed", "layers/0/mlp", "layers/0/attention", "layers/1/mlp", "layers/2/mlp", "head"]
    found = approximations(names)
    assert found["block-diagonal"].sum() == 6
    whole = found["block-diagonal, whole layers"]
    assert whole[1, 2] > whole[1, 3]
    near = found["band of 1 layer to each side"]
    assert [near[1, 3], near[1, 4], near[0, 1]] == [True, False, False]
    pointed = found["arrow: embedding and head, and whole layers"]
    assert pointed[0].all()
    assert pointed[:, 5].all()
    assert pointed[1, 2] > pointed[1, 3]
    assert list(approximations(["a", "b"])) == ["block-diagonal"]
    rows = approximations(["embed[0]", "layers/0[0]", "layers/0[1]", "model/layers/1[0]", "layers/2", "head[2]"])
    assert rows["block-diagonal, whole layers"][1, 2]
    assert rows["arrow: embedding and head, and block-diagonal"][0].all()
    np.testing.assert_array_equal(arrow([True, False, False], np.eye(3, dtype=bool))[1], [True, True, False])


def test_random_signs_are_exact_where_blocks_are_single_entries():
    a = matrix([3.0, -2.0, 1.0, 0.5])
    found = coupling_map(operator_of(a), rows_of(a, [0, 1, 2, 3]), probes=2, distribution="rademacher")
    np.testing.assert_allclose(found.coupling, np.abs(a), rtol=1e-5)
    np.testing.assert_allclose([e.value for e in found.trace()], np.diag(a), rtol=1e-5)


def test_zero_blocks_one_block_and_one_probe():
    a = np.zeros((4, 4))
    a[:2, :2] = matrix([2.0, 1.0])
    found = coupling_map(operator_of(a), rows_of(a, [0, 0, 1, 1]), probes=1)
    assert found.coupling[1].tolist() == [0, 0]
    assert np.isnan(found.coupling_error).all()
    assert np.isnan(found.fidelity_error[1]).all()
    assert np.isnan(found.relative[0, 1])
    assert found.relative_error(np.eye(2, dtype=bool)).value == 0
    one = coupling_map(operator_of(a), rows_of(a, [0, 0, 0, 0]), probes=3)
    assert one.fidelity_error.max() == 0
    np.testing.assert_allclose(one.fidelity_cosine, 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-7, 1e-25])
def test_a_scaled_loss_scales_the_map(scale):
    """Also where squares leave float32; products by a factor round once more."""
    a = matrix([3.0, -2.0, 1.0, 0.5, 0.2])
    blocks = rows_of(a, [0, 0, 1, 1, 2])
    one, other = (coupling_map(operator_of(x), blocks, probes=2) for x in (a, scale * a))
    np.testing.assert_allclose(other.coupling, scale * one.coupling, rtol=1e-5)
    np.testing.assert_allclose(other.fidelity_error, one.fidelity_error, rtol=1e-4)


@pytest.mark.slow
def test_maps_do_not_depend_on_the_mesh_nor_on_how_many_blocks_go_together():
    mesh = make_mesh("fsdp=8")
    change = {"vocab_size": 16, "embed_dim": 8, "mlp_dim": 8}
    found = []
    for on, together in ((None, None), (None, 2), (mesh, 3)):
        operator = small_hessian(mesh=on, **change)
        found.append(coupling_map(operator, Blocks.by(operator.shape_dtype, "layers"), probes=2, together=together))
    for other in found[1:]:
        np.testing.assert_allclose(other.coupling, found[0].coupling, rtol=1e-4)


def test_a_map_that_was_stopped_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    operator = network()
    blocks = Blocks.by(operator, "layers")
    whole = coupling_map(operator, blocks, probes=3)
    saved = Checkpoint(tmp_path / "saves", resume=True)

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coupling_map(operator, blocks, probes=3, checkpoint=saved, callback=stop)
    done = []
    resumed = coupling_map(operator, blocks, probes=3, checkpoint=saved, callback=lambda p: done.append(p.done))
    assert done == [2, 3]  # the second was stopped before it was saved
    np.testing.assert_array_equal(resumed.lengths, whole.lengths)
    np.testing.assert_array_equal(resumed.fidelity_error, whole.fidelity_error)
    with pytest.raises(InputError, match="seed"):
        coupling_map(operator, blocks, probes=3, seed=1, checkpoint=saved)
    others = dataclasses.replace(blocks, labels=tuple((labels + 1) % len(blocks) for labels in blocks.labels))
    with pytest.raises(InputError, match="partition"):  # of the same names
        coupling_map(operator, others, probes=3, checkpoint=saved)


def test_bad_options_are_refused():
    a = matrix([1.0, 2.0])
    operator, blocks = operator_of(a), rows_of(a, [0, 1])
    with pytest.raises(InputError, match="probes is 0"):
        coupling_map(operator, blocks, probes=0)
    with pytest.raises(InputError, match="together is 0"):
        coupling_map(operator, blocks, probes=1, together=0)
    with pytest.raises(InputError, match="of other vectors"):
        coupling_map(operator, Blocks.by({"a": np.zeros(3)}, "matrices"))
    diagonal = Diagonal({"rows": jnp.zeros(40_000)})
    with pytest.raises(InputError, match=r"40,000 blocks .* take coarser blocks"):
        coupling_map(diagonal, Blocks.by(diagonal.shape_dtype, "matrices").split("rows", axis=0))
    with pytest.raises(InputError, match="symmetric matrix of 2 x 2"):
        coupling_map(operator, blocks, probes=1).relative_error(np.array([[True, True], [False, True]]))
    with pytest.raises(InputError, match="not finite"):
        coupling_map(operator_of(np.full((2, 2), np.nan)), blocks, probes=1)
