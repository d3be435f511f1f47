"""Preconditioned operators against dense matrices, and what Adam divides by against optax's own steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from small_models import (
    Diagonal,
    matrix,
    network,
    network_loss,
    operator_of,
    random_vector,
    relative,
)

import jaxhess
from jaxhess.errors import InputError
from jaxhess.operators.facts import checksum, describe, shares_work, validate
from jaxhess.operators.precision import exact_operator
from jaxhess.slq import record


def positive(like, decades=4.0, seed=3):
    """Positive entries over so many factors of ten, as the second moments of Adam have them."""
    return jax.tree.map(lambda x: jnp.abs(10 ** (decades / 4 * x)), random_vector(like, seed))


def dense_hessian(operator):
    """By `jax.hessian`, of a flat vector."""
    flat, unravel = ravel_pytree(operator.params)
    batches = [jax.tree.map(lambda x, k=k: x[k], g.stacked) for g in operator.batches for k in range(len(g))]

    def mean(x):
        sums = [network_loss(unravel(x), batch) for batch in batches]
        return sum(s for s, _ in sums) / sum(n for _, n in sums)

    return np.asarray(jax.hessian(mean)(flat))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("decades", [0.0, 6.0])
def test_it_is_the_dense_matrix_and_has_the_eigenvalues_of_the_preconditioned_one(decades):
    H = network("float64", (4,))
    d = positive(H.params, decades)
    found = np.asarray(H.preconditioned(d).to_matrix())
    hessian, entries = dense_hessian(H), np.asarray(ravel_pytree(d)[0])
    np.testing.assert_allclose(found, hessian / np.sqrt(np.outer(entries, entries)), atol=1e-10 * abs(found).max())
    values = np.sort(np.linalg.eigvals(hessian / entries[:, None]).real)
    own = np.linalg.eigvalsh(found)
    # Those of a matrix that is not symmetric are less certain, by the root of the condition number of D.
    np.testing.assert_allclose(own, values, atol=1e-10 * abs(own).max() * 10 ** (decades / 2))


def test_a_constant_divides_and_an_outlier_of_a_million_does_no_harm():
    A = operator_of(matrix([1e6, 3.0, 2.0, -1.0]))
    np.testing.assert_allclose(A.preconditioned(jnp.full(4, 4.0)).to_matrix(), A.to_matrix() / 4, rtol=1e-6)
    one = operator_of(np.array([[8.0]]))
    assert one.preconditioned(jnp.array([4.0])).to_matrix() == 2.0


def test_vectors_and_diagonals_may_be_narrow():
    A = Diagonal({"w": jnp.array([3.0, 5.0], jnp.bfloat16)})
    P = A.preconditioned({"w": jnp.array([4.0, 16.0], jnp.bfloat16)})
    product = P @ {"w": jnp.ones(2, jnp.bfloat16)}
    assert product["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(product["w"].astype(jnp.float32), [0.75, 0.3125])  # exact in bfloat16


def test_blocks_of_it_and_it_of_blocks_are_the_same():
    H = network()
    d = positive(H.params)
    block = H.restrict("layers", layers=[1])
    taken = block.restriction.take(d)
    P = block.preconditioned(taken)
    v = random_vector(P.shape_dtype)
    whole = block.restriction.insert(v, jax.tree.map(jnp.zeros_like, H.params))
    expected = block.restriction.take(H.preconditioned(d) @ whole)
    assert relative(P @ v, expected) < 1e-5
    with pytest.raises(InputError, match="structure"):
        block.preconditioned(d)


def test_it_lies_on_a_mesh_like_the_operator_and_gives_the_same_products():
    H = network(sizes=(4,))
    d, v = positive(H.params), random_vector(H.params)
    mesh = jaxhess.make_mesh("fsdp=8")
    cut = {
        "layers": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        "out": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    sharded = jaxhess.Hessian(network_loss, jax.device_put(H.params, cut), H.batches)
    P = sharded.preconditioned(d)
    for x, like in zip(jax.tree.leaves(P.diagonal), jax.tree.leaves(sharded.params), strict=True):
        assert x.sharding == like.sharding
    product = P @ jax.device_put(v, cut)
    assert jax.tree.map(lambda x: x.sharding, product) == cut
    assert relative(product, H.preconditioned(d) @ v) < 1e-5  # sums in another order, in float32


def test_records_and_audits_see_through_it():
    H = network()
    P = H.preconditioned(positive(H.params))
    assert describe(P) == {"kind": "Preconditioned", "operator": describe(H)}
    low, high = validate(P)["preconditioner"]
    entries = ravel_pytree(P.diagonal)[0]
    assert (low, high) == (float(entries.min()), float(entries.max()))
    assert validate(P)["loss"] == validate(H)["loss"]
    assert shares_work(P)
    assert not shares_work(jaxhess.FiniteDifferenceHessian(H.loss, H.params, H.batches).preconditioned(P.diagonal))
    noise = jaxhess.audit(P)
    assert noise.reference == "Preconditioned in float64"
    assert noise.relative_error.random < 1e-5  # of a product in float32, some tens of roundings of 6e-8
    assert jax.tree.leaves(exact_operator(P, "bfloat16").operator.params)[0].dtype == jnp.bfloat16
    assert jax.tree.leaves(exact_operator(P, "bfloat16").diagonal)[0].dtype == jnp.float32  # D is what it is
    assert record.operator_record(describe(P)).matrix_name == "preconditioned loss Hessian"


def test_another_preconditioner_is_another_run(tmp_path):
    A = operator_of(matrix([4.0, 3.0, 2.0, 1.0]))
    d = jnp.array([1.0, 2.0, 3.0, 4.0])
    run = functools.partial(jaxhess.spectrum, steps=2, probes=1)
    run(A.preconditioned(d), checkpoint=jaxhess.Checkpoint(tmp_path / "run"))
    again = jaxhess.Checkpoint(tmp_path / "run", resume=True)
    for other in (A.preconditioned(d[::-1]), A, A.preconditioned(2 * d)):
        with pytest.raises(InputError):
            run(other, checkpoint=again)
    run(A.preconditioned(d), checkpoint=again)


def test_checksums_tell_single_numbers_apart():
    A = Diagonal({"a": jnp.array(2.0), "b": jnp.ones(2)})
    found = {checksum(A.preconditioned({"a": jnp.array(x), "b": jnp.ones(2)})) for x in (1.0, 2.0)}
    assert len(found) == 2


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [(0.0, "out has an entry 0;"), (-1.0, "out has an entry -1;"), (np.nan, "out has entries that are NaN"),
     (np.inf, "out has entries that are NaN")],
)  # fmt: skip
def test_a_diagonal_that_is_not_positive_is_refused(entry, sentence):
    H = network()
    d = jax.tree.map(jnp.ones_like, H.params)
    d["out"] = d["out"].at[3, 2].set(entry)
    with pytest.raises(InputError, match=sentence):
        H.preconditioned(d)
    with pytest.raises(InputError, match=sentence):
        jaxhess.spectrum(jaxhess.Preconditioned(H, d), steps=2, probes=1)


def test_a_diagonal_of_another_shape_is_refused():
    H = network()
    with pytest.raises(InputError, match=r"preconditioner's leaf \['out'\] has shape \(3,\)"):
        H.preconditioned({**H.params, "out": jnp.ones(3)})


def test_a_product_that_is_not_finite_is_explained():
    H = network(sizes=(4, 4))
    bad = jaxhess.Hessian(
        lambda w, x: jnp.sum(x * w**2), jnp.ones(2), [jnp.ones(2), jnp.array([1.0, jnp.inf])]
    ).preconditioned(jnp.ones(2))
    with pytest.raises(InputError, match="microbatch 1"):
        jaxhess.spectrum(bad, steps=2, probes=1)
    assert H.dim == 592


# What Adam divides by


def stepped(optimizer, params, steps=3):
    """A state after a few steps, and what the next one divides this gradient by, from optax's own update."""
    state = optimizer.init(params)
    for k in range(steps):
        gradient = random_vector(params, k)
        update, state = optimizer.update(gradient, state, params)
    return state, jax.tree.map(jnp.divide, gradient, update)


PARAMS = {"a": {"kernel": jnp.zeros((3, 2))}, "b": jnp.zeros(4)}


def test_it_is_what_optax_divides_by():
    options = {"b2": 0.9, "eps": 1e-3, "eps_root": 1e-2}
    adam = optax.chain(optax.clip(10.0), optax.scale_by_adam(b1=0.0, **options))
    state, divisor = stepped(adam, PARAMS)
    assert relative(jaxhess.adam_preconditioner(state, PARAMS, **options), divisor) < 1e-6
    raw = jaxhess.adam_preconditioner(state, PARAMS, **{**options, "eps": 0.0, "eps_root": 0.0}, bias_correction=False)
    assert relative(raw, jax.tree.map(jnp.sqrt, state[1].nu)) < 1e-6


def test_groups_and_masks_are_put_together():
    parts = {name: optax.scale_by_adam(b1=0.0, b2=0.9, eps=1e-3) for name in ("x", "y")}
    state, divisor = stepped(optax.multi_transform(parts, {"a": {"kernel": "x"}, "b": "y"}), PARAMS)
    assert relative(jaxhess.adam_preconditioner(state, PARAMS, b2=0.9, eps=1e-3), divisor) < 1e-6
    masked, _ = stepped(optax.masked(parts["x"], {"a": {"kernel": True}, "b": False}), PARAMS)
    with pytest.raises(InputError, match="no second moment of b"):
        jaxhess.adam_preconditioner(masked, PARAMS)


def test_the_optimizer_of_flax_is_read():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    d = jaxhess.adam_preconditioner(optimizer.opt_state, nnx.state(model, nnx.Param), eps=0.0)
    assert all(abs(x - 1).max() < 1e-6 for x in jax.tree.leaves(d))


def adam_state(nu, count=2):
    return optax.ScaleByAdamState(jnp.array(count), nu, nu)


ONES = jax.tree.map(jnp.ones_like, PARAMS)


@pytest.mark.parametrize(
    ("state", "options", "sentence"),
    [
        (adam_state({**ONES, "b": jnp.ones(5)}), {}, r"the second moment of b has shape \[5\], the parameter \[4\]"),
        (adam_state({**ONES, "c": jnp.ones(5)}), {}, "it has a second moment of c"),
        (adam_state({"b": jnp.ones(4)}), {}, "no second moment of a/kernel"),
        ((adam_state(ONES), adam_state(ONES)), {}, "two second moments of a/kernel"),
        (optax.EmptyState(), {}, "holds no second moments of Adam"),
        (adam_state({**ONES, "b": -jnp.ones(4)}), {}, "second moment of b has a negative entry, -1"),
        (adam_state({**ONES, "b": jnp.full(4, jnp.nan)}), {}, "second moment of b has entries that are NaN"),
        (adam_state({**ONES, "b": jnp.zeros(4)}), {"eps": 0.0}, "second moment of b has a zero, and eps is 0"),
        (adam_state(ONES, 0), {}, "has made 0 steps"),
        (adam_state(ONES), {"b2": 1.0}, "b2 1.0"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused(state, options, sentence):
    with pytest.raises(InputError, match=sentence):
        jaxhess.adam_preconditioner(state, PARAMS, **options)


def test_adam_with_a_fixed_preconditioner_diverges_above_the_threshold_and_not_below():
    """The curvature of a parabola just above and below: momentum steps with b1, divided by a fixed D."""
    rate, b1, d = 0.1, 0.9, 3.0
    for factor, grows in ((1.01, True), (0.99, False)):
        h = factor * d * jaxhess.adam_threshold(rate, b1)
        x, m = 1.0, 0.0
        for _ in range(4000):
            m = b1 * m + (1 - b1) * h * x
            x -= rate * m / d
        assert (abs(x) > 1) == grows
    assert jaxhess.adam_threshold(rate, b1, steps=1) == pytest.approx(0.1 * jaxhess.adam_threshold(rate, b1))
    for rate, b1 in ((0.0, 0.9), (0.1, 1.0)):
        with pytest.raises(InputError, match="Learning rate"):
            jaxhess.adam_threshold(rate, b1)
    with pytest.raises(InputError, match="before the first one"):
        jaxhess.adam_threshold(0.1, steps=0)
