"""Margins of the choice of experts, and what finite differences do to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from jaxhess.models import ExpertsConfig, initialize
from jaxhess.operators.facts import describe, validate
from jaxhess.slq.checkpoint import mesh_independent
from jaxhess.vectors import norm

SIZES = {
    "vocab_size": 20,
    "max_positions": 8,
    "embed_dim": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "mlp_dim": 12,
}


@pytest.fixture(scope="module")
def routed():
    """A loss in float64, its parameters and batches: a dense layer between two with five experts."""
    with jax.enable_x64(True):
        experts = ExpertsConfig(num_experts=5, top_k=2, mlp_dim=6, layers=(True, False, True), renormalized=True)
        config = jaxhess.DecoderConfig(**SIZES, num_layers=3, experts=experts, dtype="float64", remat=False)
        model = initialize(config, jax.random.key(0))
        params = jax.tree.map(lambda x: 4 * x, model.params)  # or the experts would hardly differ
        rng = np.random.default_rng(0)
        tokens, weights = rng.integers(0, 20, (3, 6)), np.ones((3, 5))
        weights[1, 3:] = 0
        batches = jaxhess.TokenBlocks(tokens=tokens, weights=weights).microbatches(3, None)
        yield model.loss(), params, jaxhess.Microbatches(batches)


def apart(x, y):
    return float(norm(jax.tree.map(lambda a, b: a - b, x, y)) / norm(y))


def test_margins_and_load_are_those_of_the_scores(routed):
    loss, params, batches = routed
    found = validate(jaxhess.Hessian(loss, params, batches))["routing"]
    batch = jax.tree.map(lambda x: x[0], batches.stacked)
    logits = np.asarray(loss.routing(params, batch).logits)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = scores[:, np.asarray(batch.weights) > 0]
    ordered = np.sort(counted, axis=-1)
    gaps = ordered[..., -2] - ordered[..., -3]
    assert found["choices"] == gaps.size == 2 * 13
    for name, value in found["margin"].items():
        np.testing.assert_allclose(value, np.quantile(gaps, float(name)), rtol=1e-10)
    taken = np.argsort(counted, axis=-1)[..., -2:]
    counts = np.stack([np.bincount(layer.ravel(), minlength=5) for layer in taken])
    assert found["load"] == pytest.approx({"largest": counts.max() / 26 * 5, "smallest": counts.min() / 26 * 5})


@pytest.mark.study
def test_a_large_shift_changes_experts_and_the_record_says_what_that_does(routed):
    loss, params, batches = routed
    H = jaxhess.Hessian(loss, params, batches)
    v = jaxhess.random_probe(jax.random.key(3), H.shape_dtype)
    exact = H @ v
    batch = jax.tree.map(lambda x: x[0], batches.stacked)
    held = loss.held(batch, loss.routing(params, batch).chosen)
    assert float(loss(params, held)[0]) == float(loss(params, batch)[0])
    small = jaxhess.FiniteDifferenceHessian(loss, params, batches, step=1e-5)
    assert small._rerouted(v, float(small.shift_length(v))) == {"changed_experts": 0.0, "jumped": 0.0}
    assert (
        apart(small @ v, exact) < 1e-5
    )  # 1e-10, the square of the step, times a third derivative that is not so large

    large = dataclasses.replace(small, step=3e-3)
    found = large._rerouted(v, float(large.shift_length(v)))
    scale = float(large.shift_length(v)) / float(norm(v))
    moved = [jax.tree.map(lambda x, d, e=e: x + e * scale * d, params, v) for e in (1, -1)]
    sets = [np.sort(np.asarray(loss.routing(m, batch).chosen), axis=-1) for m in moved]
    differ = (sets[0] != sets[1]).any(-1)[:, np.asarray(batch.weights) > 0]
    assert found["changed_experts"] == pytest.approx(differ.mean())
    assert found["changed_experts"] > 0
    assert found["jumped"] > 0.1
    still = dataclasses.replace(large, batches=(jaxhess.Microbatches(jax.tree.map(lambda x: x[None], held)),))
    assert apart(still @ v, exact) < 0.8 * apart(large @ v, exact)  # with the experts held: the shift's own error


def test_layers_are_chosen_by_number_across_stacks(routed):
    loss, params, batches = routed
    H = jaxhess.Hessian(loss, params, batches)
    middle, ends = H.restrict(layers=[1]), H.restrict(layers=[0, -1])
    assert middle.dim == sum(x.size for x in jax.tree.leaves(params["dense_layers"]))
    assert ends.dim == sum(x.size for x in jax.tree.leaves(params["layers"]))
    last = H.restrict("experts", layers=[2])
    assert last.dim == sum(x[0].size for x in jax.tree.leaves(params["layers"]["experts"]))
    with pytest.raises(ValueError, match=r"'experts' matches no parameter in layers \[1\]"):
        H.restrict("experts", layers=[1])


def test_a_balancing_loss_needs_experts():
    config = jaxhess.DecoderConfig(**SIZES, num_layers=1)
    with pytest.raises(ValueError, match="for models with experts"):
        dataclasses.replace(initialize(config, jax.random.key(0)).loss(), balance=0.01)


def test_a_balancing_loss_is_recorded_and_has_no_gauss_newton_matrix(routed):
    loss, params, batches = routed
    balanced = dataclasses.replace(loss, balance=0.01)
    assert describe(jaxhess.Hessian(balanced, params, batches))["balance"] == 0.01
    for kind in (jaxhess.GaussNewton, jaxhess.EmpiricalFisher):
        with pytest.raises(ValueError, match="Take balance=0"):
            kind(balanced, params, batches) @ params


def test_margins_are_infinite_where_all_experts_are_chosen():
    experts = ExpertsConfig(num_experts=2, top_k=2, mlp_dim=6)
    config = jaxhess.DecoderConfig(**SIZES, num_layers=1, experts=experts)
    model = initialize(config, jax.random.key(0))
    batch = jaxhess.TokenBlocks(tokens=np.ones((1, 4), int), weights=np.ones((1, 3))).microbatches(1, None)
    found = validate(jaxhess.Hessian(model.loss(), model.params, jaxhess.Microbatches(batch)))["routing"]
    assert found["margin"] == {}
    assert found["load"] == {"largest": 1.0, "smallest": 1.0}
    assert jnp.isinf(model.loss().routing(model.params, jax.tree.map(lambda x: x[0], batch)).margin).all()


def test_what_is_measured_of_a_choice_does_not_keep_a_run_from_another_mesh():
    """Margins are rounded otherwise there, and one next to zero has no digit in common."""
    facts = {"loss": 2.0, "routing": {"margin": {"0": 1e-9}}, "shift_of_a_random_vector": {"jumped": 0.1}}
    assert mesh_independent({"inputs": facts}) == {"inputs": {"loss": 2.0}}
