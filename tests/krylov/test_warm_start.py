"""A warm start finds what a cold run finds, with fewer products, and new eigenvalues too; checked on known matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, matrix, network, operator_of

from jaxhess import (
    Eigenpairs,
    Hessian,
    InputError,
    Storage,
    lanczos_segment,
    leading_eigenpairs,
    make_mesh,
    start_lanczos,
)
from jaxhess.krylov.warm_start import MISS, RANDOM, _largest_mass, complete, seen_from
from jaxhess.vectors import norm

N = 400
RNG = np.random.default_rng(1)
BULK = RNG.normal(size=N - 4) * 0.5
LEADING = np.array([20.0, -12.0, 9.0, 7.0])
A = matrix(np.concatenate([BULK, LEADING]))
NOISE = RNG.normal(size=(N, N))
NEARBY = A + 0.2 * (NOISE + NOISE.T) / np.sqrt(2 * N)
"""Another matrix: the norm of what was added is about 0.4."""


@pytest.fixture(scope="module")
def before():
    return leading_eigenpairs(operator_of(A), 4, tolerance=1e-4, steps=60)


def dense_leading(a, count):
    values, vectors = np.linalg.eigh(a)
    order = np.argsort(-np.abs(values))[:count]
    return values[order], vectors[:, order].T


@pytest.mark.parametrize("storage", [Storage(), Storage("none"), Storage(basis_dtype="bfloat16")], ids=str)
def test_values_residuals_and_vectors_are_those_of_the_matrix(before, storage):
    """Of a basis in bfloat16 vectors are known to 2^-9, and the residuals say so."""
    pairs = leading_eigenpairs(operator_of(NEARBY), 4, tolerance=1e-2, previous=before, seed=1, storage=storage)
    values, vectors = dense_leading(NEARBY, 4)
    assert pairs.converged.all()
    found = np.asarray(pairs.vectors, np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    true = np.linalg.norm(found @ NEARBY - pairs.values[:, None] * found, axis=1)
    rounding = 1e-5 * 20
    assert (true <= pairs.residuals + rounding).all()
    if storage == Storage():  # the bound is the residual itself
        np.testing.assert_allclose(pairs.residuals, true, atol=rounding)
    assert (np.abs(pairs.values - values) <= pairs.residuals + rounding).all()
    assert (np.abs((found * vectors).sum(1)) > 0.99).all()


def test_it_takes_fewer_products_than_a_cold_run(before):
    operator = operator_of(NEARBY)
    cold = leading_eigenpairs(operator, 4, tolerance=1e-2)
    warm = leading_eigenpairs(operator, 4, tolerance=1e-2, previous=before, seed=1)
    assert cold.products == cold.steps + 4
    assert warm.products == warm.steps < cold.products
    assert np.isnan(cold.seen_from)
    assert complete(warm.seen_from, warm.values)


@pytest.mark.parametrize(("new", "seed"), [(25.0, 0), (-40.0, 1)])
def test_a_new_eigenvalue_is_found_whose_vector_is_orthogonal_to_all_old_ones(before, new, seed):
    _, old = dense_leading(A, 4)
    direction = RNG.normal(size=N)
    direction -= old.T @ (old @ direction)
    direction /= np.linalg.norm(direction)
    changed = A + new * np.outer(direction, direction)
    pairs = leading_eigenpairs(operator_of(changed), 4, tolerance=1e-2, previous=before, seed=seed)
    values, vectors = dense_leading(changed, 4)
    assert abs(values[0] - new) < 1
    assert (np.abs(pairs.values - values) <= pairs.residuals + 1e-4).all()
    assert abs(np.asarray(pairs.vectors[0]) @ vectors[0]) > 0.99


@pytest.mark.parametrize("new", [11.0, 15.0, 19.0])
def test_a_new_eigenvalue_between_those_that_are_followed_is_found(new):
    """20, -12, 10 are known exactly, and one more comes in a direction that is orthogonal to their vectors."""
    entries = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    entries[[1, 11, 111]] = 20, -12, 10
    vectors = np.zeros((3, entries.size), np.float32)
    vectors[[0, 1, 2], [1, 11, 111]] = 1
    previous = Eigenpairs(entries[[1, 11, 111]].astype(float), vectors, np.zeros(3), np.ones(3, bool), 0)
    entries[1111] = new
    expected = sorted([20, -12, 10, new], key=lambda x: -abs(x))[:3]
    for seed in range(4):
        operator = Hessian(quadratic, jnp.zeros(entries.size), [jnp.asarray(entries)])
        pairs = leading_eigenpairs(operator, 3, tolerance=1e-2, previous=previous, seed=seed, steps=60)
        assert (np.abs(pairs.values - expected) <= pairs.residuals + 1e-4).all()
        assert complete(pairs.seen_from, pairs.values)


def test_steps_that_run_out_do_not_count_as_complete(before):
    short = leading_eigenpairs(operator_of(NEARBY), 4, tolerance=1e-2, previous=before, steps=6)
    assert not complete(short.seen_from, short.values)


def test_residuals_are_measured_where_products_are_noisy():
    """Of a Hessian in bfloat16 the recurrence knows the noisy products only; one more product is another draw of it."""
    noisy = network("bfloat16")
    first = leading_eigenpairs(noisy, 2, tolerance=0.1, steps=20)
    warm = leading_eigenpairs(noisy, 2, tolerance=0.1, steps=20, previous=first, seed=1)
    assert warm.products == warm.steps + 2
    for k, value in enumerate(warm.values):
        y = jax.tree.map(lambda x, k=k: x[k], warm.vectors)
        apart = jax.tree.map(lambda a, b, value=value: a - value * b, noisy @ y, y)
        np.testing.assert_allclose(warm.residuals[k], float(norm(apart)), rtol=1e-2)


def test_useless_vectors_cost_no_more_than_a_cold_run():
    operator = operator_of(A)
    other = np.linalg.qr(np.random.default_rng(5).normal(size=(N, 4)))[0].T
    useless = Eigenpairs(np.ones(4), jnp.asarray(other, jnp.float32), np.zeros(4), np.ones(4, bool), 0)
    cold = leading_eigenpairs(operator, 4, tolerance=1e-2)
    warm = leading_eigenpairs(operator, 4, tolerance=1e-2, previous=useless)
    np.testing.assert_allclose(warm.values, cold.values, atol=1e-2 * 20)
    assert warm.products <= cold.products


@pytest.mark.parametrize("steps", [3, 5, 8, 12])
def test_no_mass_is_above_the_largest_that_the_recurrence_allows(steps, float64):
    """The start's true mass on every eigenvalue, and the bound there; it is tight where the space is exhausted."""
    entries = np.array([3.0, 2.0, 1.0, 0.5, -0.3, -1.0, 0.1, 0.2, 0.7, -2.0, 1.4, 0.9])
    start = np.random.default_rng(0).normal(size=12)
    state = start_lanczos([jnp.asarray(start)], 12, Storage(scalar_dtype="float64"))
    alphas, betas, _ = lanczos_segment(Diagonal(jnp.asarray(entries)), state, steps).tridiagonal()
    mass = start**2 / (start @ start)
    betas = np.maximum(betas, 1e-300)  # after 12 steps the last one is rounding, or zero
    most = _largest_mass(alphas, betas, entries) if steps < 12 else None
    if most is not None:
        assert (most >= mass * (1 - 1e-9)).all()
        assert most.min() < 0.5  # it says something
    else:
        most = _largest_mass(alphas[:11], betas[:11], entries)
        np.testing.assert_allclose(most, mass, rtol=1e-6)


def test_what_counts_as_seen_was_seen_in_95_percent_of_runs():
    """Starting vectors as a warm start has them, and one eigenvalue that the old vectors know nothing of.

    Whether its Ritz value is there within a tenth is compared with what `seen_from` says, over 200 draws. The share of
    false claims is at most MISS, with three standard deviations for chance: 0.05 + 3 sqrt(0.05 * 0.95 / 200) = 0.096.
    """
    entries = np.concatenate([np.linspace(-1, 1, 1997), [10.0, 6.0, 12.0]])
    known = np.zeros(2000)
    known[[-3, -2]] = 1
    generator = np.random.default_rng(3)
    claims = false = 0
    for _ in range(200):
        noise = generator.normal(size=2000)
        q = known / np.linalg.norm(known) + RANDOM * noise / np.linalg.norm(noise)
        alphas, betas, basis = [], [], [q / np.linalg.norm(q)]
        for _ in range(9):
            w = entries * basis[-1]
            alphas.append(w @ basis[-1])
            for _ in range(2):
                for b in basis:
                    w = w - (b @ w) * b
            betas.append(np.linalg.norm(w))
            basis.append(w / betas[-1])
            size = len(alphas)
            theta = np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
            missed = abs(theta - 12).min() > 1.2
            if size < 3 or not missed:
                continue
            found = theta[np.argsort(-np.abs(theta))[:2]]
            claims += 1
            false += seen_from(np.array(alphas), np.array(betas), 2000, found) <= 12
    assert claims > 100
    assert false <= 200 * (MISS + 3 * np.sqrt(MISS * (1 - MISS) / 200))


def quadratic(params, entries):
    """Half the sum of entries times squares: its Hessian is diagonal."""
    return 0.5 * sum(jnp.sum(d * w**2) for w, d in zip(*map(jax.tree.leaves, (params, entries)), strict=True))


def test_a_tree_on_eight_devices_from_vectors_of_the_host(tmp_path):
    """Saved, loaded as NumPy arrays, and used where the vectors are sharded; the same numbers as on one device."""
    entries = {"layers": {"kernel": np.linspace(-1, 1, 64).reshape(8, 8)}, "norm": np.array([6.0, -4.0] + 6 * [0.3])}
    batch = jax.tree.map(jnp.float32, entries)
    sharding = jax.sharding.NamedSharding(make_mesh("fsdp=8"), jax.sharding.PartitionSpec("fsdp"))
    found = []
    for place in (jax.devices()[0], sharding):
        operator = Hessian(quadratic, jax.device_put(batch, place), [batch])
        leading_eigenpairs(operator, 2, tolerance=1e-3).save(tmp_path / "pairs", overwrite=True)
        previous = Eigenpairs.load(tmp_path / "pairs")
        found.append(leading_eigenpairs(operator, 2, tolerance=1e-3, previous=previous, seed=4))
    np.testing.assert_allclose(found[0].values, [6, -4], rtol=1e-4)
    np.testing.assert_allclose(found[1].values, found[0].values, rtol=1e-5)
    assert found[1].vectors["norm"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_bad_previous_pairs_are_refused(before):
    operator = Diagonal({"a": jnp.arange(3.0), "b": jnp.arange(2.0)})
    names = Eigenpairs(np.ones(1), {"a": np.ones((1, 3))}, np.zeros(1), np.ones(1, bool), 0)
    shapes = Eigenpairs(np.ones(1), {"a": np.ones((1, 3)), "b": np.ones((1, 3))}, np.zeros(1), np.ones(1, bool), 0)
    with pytest.raises(InputError, match="leaf 'b': the operator's have one"):
        leading_eigenpairs(operator, 1, previous=names)
    with pytest.raises(InputError, match=r"leaf 'b' has shape \(1, 3\).*must be \(2,\)"):
        leading_eigenpairs(operator, 1, previous=shapes)
    state = start_lanczos([jnp.ones(N)], 5)
    with pytest.raises(InputError, match="not both"):
        leading_eigenpairs(operator_of(A), 1, previous=before, state=state)
