"""Curves follow eigenvectors through crossings; a point's numbers are those of the dense Hessian; a callback's cost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import matrix, network, operator_of

from jaxhess import Eigenpairs, InputError, TrajectoryCallback, TrajectoryPoint, linearize, trajectory_point
from jaxhess.results.trajectory_report import trajectory_files
from jaxhess.structure.trajectory import continued, squared_cosines

BULK = np.random.default_rng(0).normal(size=117) * 0.3


def test_a_planted_crossing_is_followed_by_overlap():
    """A(t) has fixed eigenvectors; two leading eigenvalues cross, and a fourth overtakes the third."""
    points, pairs = [], None
    times = np.array([0.0, 0.3, 0.7, 1.0])
    rows = np.stack([10 - 4 * times, 6 + 4 * times, np.full(4, -5.0), 2 + 4.5 * times])
    for t, values in enumerate(rows.T):
        operator = operator_of(matrix(np.concatenate([values, BULK])))
        point, pairs = trajectory_point(operator, t, points, pairs, count=3, tolerance=1e-3, probes=0)
        points.append(point)
    assert [p.curves for p in points] == [(0, 1, 2), (0, 1, 2), (1, 0, 3), (1, 3, 0)]
    for p, values in zip(points, rows.T, strict=True):
        expected = values[np.argsort(-np.abs(values))[:3]]
        assert (np.abs(np.array(p.eigenvalues) - expected) <= np.array(p.residuals) + 1e-4).all()
    curve = [dict(zip(p.curves, p.eigenvalues, strict=True)).get(0) for p in points]
    np.testing.assert_allclose(curve, rows[0], atol=2e-2)
    assert points[0].overlap is None
    np.testing.assert_allclose(points[1].overlap, 1, atol=1e-3)


def test_a_curve_ends_where_no_vector_continues_it():
    assert continued(np.array([[0.5, 0.5], [0.5, 0.5]]), (4, 7), free=9) == (9, 10)  # at a crossing itself
    assert continued(np.array([[0.0, 0.9], [0.8, 0.0], [0.0, 0.0]]), (4, 7, 8), free=9) == (7, 4)


def test_loss_gradient_share_overlap_and_trace_are_those_of_the_dense_hessian():
    operator = network()
    dense = np.asarray(operator.to_matrix(), np.float64)
    values, vectors = np.linalg.eigh(dense)
    order = np.argsort(-np.abs(values))[:3]
    _, gradient = jax.jit(type(operator).value_and_gradient)(operator)
    flat = np.asarray(jax.flatten_util.ravel_pytree(gradient)[0], np.float64)
    point, pairs = trajectory_point(operator, 5, count=3, tolerance=1e-4, probes=40, learning_rate=0.1)
    np.testing.assert_allclose(point.eigenvalues, values[order], atol=1e-4 * abs(values[order[0]]))
    np.testing.assert_allclose(point.gradient_norm, np.linalg.norm(flat), rtol=1e-4)
    share = np.square(vectors[:, order].T @ flat).sum() / (flat @ flat)
    np.testing.assert_allclose(point.gradient_share, share, atol=1e-2)
    assert abs(point.trace.value - np.trace(dense)) < 5 * point.trace.standard_error
    assert (point.products, point.trace_products, point.learning_rate) == (pairs.products, 40, 0.1)
    moved = dataclasses.replace(operator, params=jax.tree.map(lambda x: 1.01 * x, operator.params))
    later, after = trajectory_point(moved, 6, [point], pairs, count=3, tolerance=1e-4, probes=0)
    a, b = (
        np.concatenate([np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(p.vectors)], 1) for p in (pairs, after)
    )
    np.testing.assert_allclose(later.overlap, np.square(a @ b.T).sum() / 3, rtol=1e-5)
    assert later.trace is None


def test_the_gradient_of_a_preconditioned_and_linearised_operator_is_as_that_sees_it():
    """Shares of D^-1/2 gradient in leading eigenvectors of D^-1/2 H D^-1/2, as dense matrices have them."""
    hessian = network()
    draw = np.random.default_rng(2)
    diagonal = jax.tree.map(lambda x: jnp.asarray(draw.uniform(0.5, 2, x.shape), x.dtype), hessian.params)
    operator = linearize(hessian).preconditioned(diagonal)
    point, _ = trajectory_point(operator, 0, count=2, tolerance=1e-4, probes=0)
    _, gradient = jax.jit(type(hessian).value_and_gradient)(hessian)
    roots, flat = (np.asarray(jax.flatten_util.ravel_pytree(x)[0], np.float64) for x in (diagonal, gradient))
    roots = 1 / np.sqrt(roots)
    values, vectors = np.linalg.eigh(roots[:, None] * np.asarray(hessian.to_matrix(), np.float64) * roots)
    order, seen = np.argsort(-np.abs(values))[:2], roots * flat
    np.testing.assert_allclose(point.eigenvalues, values[order], atol=1e-4 * abs(values[order[0]]))
    np.testing.assert_allclose(point.gradient_norm, np.linalg.norm(seen), rtol=1e-4)
    share = np.square(vectors[:, order].T @ seen).sum() / (seen @ seen)
    np.testing.assert_allclose(point.gradient_share, share, atol=1e-2)


def test_the_overlap_of_spaces_is_that_of_orthonormal_vectors():
    """Two bases of one plane: 1, though their vectors are not orthogonal; a plane and a line in it: 1/2."""
    skew = Eigenpairs(np.ones(2), jnp.array([[1.0, 0, 0], [0.6, 0.8, 0]]), np.zeros(2), np.ones(2, bool), 0)
    twice = Eigenpairs(np.ones(2), jnp.array([[0.0, 1, 0], [0.0, 1, 0]]), np.zeros(2), np.ones(2, bool), 0)
    operator = operator_of(np.eye(3))
    squares, overlap = squared_cosines(operator, skew, skew)
    np.testing.assert_allclose(squares, [[1, 0.36], [0.36, 1]], rtol=1e-5)
    np.testing.assert_allclose(overlap, 1, rtol=1e-5)
    np.testing.assert_allclose(squared_cosines(operator, skew, twice)[1], 0.5, rtol=1e-5)


def test_a_point_whose_steps_ran_out_says_so():
    operator = operator_of(matrix(np.concatenate([[9.0, 8.5, 7.0], BULK])))
    first, pairs = trajectory_point(operator, 0, count=3, tolerance=1e-3, probes=0)
    short, _ = trajectory_point(operator, 1, [first], pairs, count=3, tolerance=1e-3, steps=4, probes=0)
    long, _ = trajectory_point(operator, 1, [first], pairs, count=3, tolerance=1e-3, probes=0)
    assert (first.complete, short.complete, long.complete) == (True, False, True)
    assert "may be incomplete: the steps ran out" in str(short)
    assert "incomplete" not in str(long) + str(first)
    assert "May be incomplete at step 1: " in trajectory_files([first, short], {})["report.html"].decode()
    assert "May be incomplete" not in trajectory_files([first, long], {})["report.html"].decode()


@pytest.mark.parametrize("probes", [0, 1, 2])
def test_a_point_survives_json(probes):
    point, _ = trajectory_point(operator_of(np.diag([3.0, 1.0])), 1, count=1, probes=probes)
    for found in (point, dataclasses.replace(point, overlap=0.5, seen_from=np.inf)):
        text = json.dumps(dataclasses.asdict(found))
        again = TrajectoryPoint.from_dict(json.loads(text))
        assert str(again) == str(found)
        assert json.dumps(dataclasses.asdict(again)) == text


def test_what_is_no_point_is_refused():
    with pytest.raises(InputError, match="not a point of a trajectory"):
        TrajectoryPoint.from_dict({"step": 1})


def test_a_callback_follows_a_training_and_says_what_it_costs():
    """Gradient descent on a quadratic: the Hessian stays, so every later point is warm and cheaper than the first."""
    a = jnp.asarray(matrix(np.concatenate([[9.0, 7.0], BULK])), jnp.float32)

    def loss(w, batch):
        return 0.5 * w @ (batch @ w)

    follow = TrajectoryCallback(loss, [a], every=2, count=2, probes=1)
    w, optimizer = jnp.ones(len(a)), optax.sgd(0.01)
    state = optimizer.init(w)
    returned = []
    for step in range(5):
        returned.append(follow(step, w, learning_rate=0.01))
        updates, state = optimizer.update(jax.grad(loss)(w, a), state)
        w = optax.apply_updates(w, updates)
    assert [p is not None for p in returned] == [True, False, True, False, True]
    cold, *warm = follow.points
    assert not cold.warm
    assert all(p.warm and p.overlap > 0.99 and p.curves == (0, 1) and p.products < cold.products for p in warm)
    assert all((abs(p.eigenvalues[0] - 9) <= p.residuals[0] + 1e-4) for p in follow.points)
    products = sum(p.products for p in follow.points) + 3
    assert follow.cost.startswith(f"3 points: {products} Hessian products, ")
    assert "warm start" in str(warm[0])
    assert f"{warm[0].products} products" in str(warm[0])


def test_bad_arguments_are_refused():
    operator = operator_of(np.diag([3.0, 1.0]))
    point, pairs = trajectory_point(operator, 5, count=1, probes=0)
    with pytest.raises(InputError, match="Step 5 does not come after step 5"):
        trajectory_point(operator, 5, [point], pairs, count=1)
    with pytest.raises(InputError, match="probes is -1"):
        trajectory_point(operator, 6, [point], pairs, count=1, probes=-1)
    with pytest.raises(InputError, match="every is 0"):
        TrajectoryCallback(lambda w, b: w @ w, [0.0], every=0)
