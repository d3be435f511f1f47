"""Columns against dense Hessians, and counts of small entries in whole numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from small_models import TINY, batch_of, network, network_loss, operator_of, random_model, tokens

import jaxhess
from jaxhess.errors import InputError
from jaxhess.structure import columns as module
from jaxhess.structure.columns import columns, entry_name, random_entries, submatrix, threshold_counts

THRESHOLDS = [0.0, *(10.0**k for k in range(-12, 0))]


@pytest.mark.usefixtures("float64")
def test_columns_and_parts_are_those_of_the_dense_hessian():
    """By `jax.hessian` of the flat parameters, without the operator; in float64."""
    config = dataclasses.replace(TINY, dtype="float64", num_layers=1)
    model = random_model(config)
    batch = batch_of(tokens(2, 6, 9))
    flat, unravel = ravel_pytree(model.params)
    loss = model.loss()

    @jax.jit
    def dense(x):
        return jax.hessian(lambda x: jnp.divide(*loss(unravel(x), batch)))(x)

    expected = np.asarray(dense(flat))
    H = jaxhess.Hessian(loss, model.params, [batch])
    chosen = np.random.default_rng(0).choice(H.dim, 7, replace=False)
    found = [ravel_pytree(column)[0] for column in columns(H, chosen, batch_size=4)]
    tolerance = 1e-12 * abs(expected).max()
    np.testing.assert_allclose(np.stack(found).T, expected[:, chosen], atol=tolerance)
    np.testing.assert_allclose(submatrix(H, chosen, 4), expected[np.ix_(chosen, chosen)], atol=tolerance)
    blocks = jaxhess.Blocks.by(H, "kinds")
    column = next(columns(H, chosen[:1]))
    labels = np.concatenate(
        [np.broadcast_to(own, shape).ravel() for own, shape in zip(blocks.labels, blocks.shapes, strict=True)]
    )
    entries = np.abs(np.asarray(ravel_pytree(column)[0]))
    by_hand = [[np.sum((entries <= t) & (labels == b)) for t in THRESHOLDS] for b in range(len(blocks))]
    np.testing.assert_array_equal(threshold_counts(column, THRESHOLDS, blocks), by_hand)
    np.testing.assert_array_equal(threshold_counts(column, THRESHOLDS)[0], np.sum(by_hand, axis=0))


@pytest.mark.usefixtures("float64")
def test_counts_are_the_same_on_one_device_and_on_eight():
    counts = []
    H = network("float64", (4,))
    mesh = jaxhess.make_mesh("fsdp=8")
    cut = {
        "layers": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        "out": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    for params in (H.params, jax.device_put(H.params, cut)):
        operator = jaxhess.Hessian(network_loss, params, H.batches)
        blocks = jaxhess.Blocks.by(operator, "layers")
        found = list(columns(operator, [3, 300, 591], batch_size=2))
        assert jax.tree.leaves(found[0])[0].sharding.device_set == jax.tree.leaves(params)[0].sharding.device_set
        counts.append([threshold_counts(column, THRESHOLDS, blocks) for column in found])
    np.testing.assert_array_equal(*counts)
    assert len(np.unique(counts[0])) > 10  # neither all nor none are below


def test_counts_do_not_overflow_and_are_put_together_from_two_parts(monkeypatch):
    """Beyond float32's whole numbers, and with so few bits in the low part that the high one counts."""
    vector = {"a": jnp.zeros((70_000, 300), jnp.bfloat16), "b": jnp.ones(5)}
    assert threshold_counts(vector, [0.0, 0.5]).tolist() == [[21_000_000, 21_000_000]]
    monkeypatch.setattr(module, "LIMB", 2)
    assert threshold_counts({"a": jnp.zeros((3, 77)), "b": jnp.ones(5)}, [0.0, 1.0]).tolist() == [[231, 236]]


@pytest.mark.parametrize("shape", [(2, 3, 7, 23), (23, 7, 3, 2), (120, 8), (8, 120), (2, 23, 9)])
def test_leaves_with_more_entries_than_a_sum_can_count_are_summed_in_parts(shape, monkeypatch):
    """With sums in 8 bits, as 2^32 entries and more are in 32; by hand in NumPy, in blocks too."""
    monkeypatch.setattr(module, "COUNTER", jnp.uint8)
    monkeypatch.setattr(module, "LIMB", 4)
    entries = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    limits = [0.0, 0.1, 1.0, 10.0]
    vector = {"a": jnp.asarray(entries)}
    expected = [np.sum(abs(entries) <= np.float32(limit)) for limit in limits]
    assert expected[-1] == entries.size > 255
    np.testing.assert_array_equal(threshold_counts(vector, limits)[0], expected)
    blocks = jaxhess.Blocks.by(vector, "matrices").split("a", axis=len(shape) - 1)
    by_hand = [[np.sum(abs(entries[..., k]) <= np.float32(limit)) for limit in limits] for k in range(shape[-1])]
    np.testing.assert_array_equal(threshold_counts(vector, limits, blocks), by_hand)


def test_entries_are_numbered_like_the_rows_of_the_matrix():
    like = {"a": jnp.zeros(()), "b": {"c": jnp.zeros((2, 3))}}
    assert [entry_name(like, k) for k in (0, 1, 6)] == ["a[]", "b/c[0,0]", "b/c[1,2]"]
    with pytest.raises(InputError, match="There is no entry 7: vectors have 7"):
        entry_name(like, 7)
    A = operator_of(np.arange(16.0).reshape(4, 4))
    assert [column.tolist() for column in columns(A, [2, 2, 0], 2)] == [[2, 6, 10, 14], [2, 6, 10, 14], [0, 4, 8, 12]]


def test_entries_are_drawn_alike_from_all_of_a_block():
    like = {"layers": {"up": jnp.zeros((2, 3, 4)), "norm": jnp.zeros((2, 3))}, "one": jnp.zeros(())}
    blocks = jaxhess.Blocks.by(like, "layers")
    labels = np.concatenate(
        [np.broadcast_to(own, shape).ravel() for own, shape in zip(blocks.labels, blocks.shapes, strict=True)]
    )
    drawn = random_entries(blocks, 3000, seed=1)
    for block, entries in enumerate(drawn):
        places, counts = np.unique(entries, return_counts=True)
        np.testing.assert_array_equal(places, np.flatnonzero(labels == block))
        mean = 3000 / len(places)
        assert (abs(counts - mean) <= 5 * np.sqrt(mean)).all()  # a count's standard deviation is below its root


def test_what_is_not_finite_and_what_makes_no_sense_is_refused():
    H = jaxhess.Hessian(lambda w, x: jnp.sum(x * w**2), jnp.ones(2), [jnp.array([1.0, jnp.inf])])  # inf * 0
    with pytest.raises(InputError, match=r"The column of \[0\] is not finite: the product over microbatch 0"):
        list(columns(H, [0, 1]))
    A = operator_of(np.eye(3))
    for wrong in ([3], [-1], [], [0.5]):
        with pytest.raises(InputError, match=r"entry|whole number"):
            next(columns(A, wrong))
    with pytest.raises(InputError, match="batch_size is 0"):
        next(columns(A, [0], 0))
    for wrong in ([-1.0], [float("nan")]):
        with pytest.raises(InputError, match="thresholds"):
            threshold_counts(jnp.ones(2), wrong)
    with pytest.raises(InputError, match="blocks are of other vectors"):
        threshold_counts(jnp.ones(2), [1.0], jaxhess.Blocks.by({"a": jnp.ones(2)}, "matrices"))
