"""Laws of Gauss-Newton and Fisher operators, against dense float64 Jacobians of a model computed another way."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    SMALL,
    TINY,
    batch_of,
    language_operator,
    random_model,
    random_vector,
    relative,
    tokens,
)

from jaxhess import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Microbatches,
    MonteCarloFisher,
    SoftmaxCrossEntropy,
    make_mesh,
    spectrum,
)
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.vectors import dot

ONE_LAYER = dataclasses.replace(TINY, num_layers=1, dtype="float64")


@pytest.fixture(scope="module")
def reference():
    """A model, ragged batches, and from its whole logits: Jacobian J [t, V, n], softmax p [t, V], weights w [t]."""
    with jax.enable_x64(True):
        config = dataclasses.replace(ONE_LAYER, tied_embeddings=True)
        model = random_model(config)
        ids = tokens(3, 6, config.vocab_size)
        w = (np.random.default_rng(0).random((3, 6)) < 0.7).astype(np.float32)
        flat, unravel = jax.flatten_util.ravel_pytree(model.params)
        plain = dataclasses.replace(config, remat=False, query_chunk=64)

        def logits(x):
            whole = dataclasses.replace(model, config=plain, params=unravel(x)).logits(jnp.asarray(ids[:, :-1]))
            return whole.reshape(-1, config.vocab_size)

        jacobian = np.asarray(jax.jit(jax.jacrev(logits))(flat))
        p = np.asarray(jax.nn.softmax(logits(flat)))
        batches = [batch_of(ids[:2], w[:2]), batch_of(ids[2:], w[2:])]
        yield model, batches, jacobian, p, w.ravel(), ids[:, 1:].ravel()


def outer_products(jacobian, p, w, labels):
    gradients = np.einsum("tv,tvn->tn", p - np.eye(p.shape[1])[labels], jacobian)
    return np.einsum("t,tm,tn->mn", w, gradients, gradients) / w.sum()


def test_gauss_newton_is_its_formula_and_positive_semi_definite(reference):
    model, batches, jacobian, p, w, _ = reference
    with jax.enable_x64(True):
        matrix = np.asarray(GaussNewton(model.loss(40), model.params, batches).to_matrix())
    middle = np.einsum("t,tuv->tuv", w, np.einsum("tv,uv->tuv", p, np.eye(p.shape[1])) - np.einsum("tu,tv->tuv", p, p))
    expected = np.einsum("tum,tuv,tvn->mn", jacobian, middle, jacobian, optimize=True) / w.sum()
    np.testing.assert_allclose(matrix, expected, atol=1e-13 * np.abs(expected).max())
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1]


def test_empirical_fisher_is_the_outer_products_of_token_gradients(reference):
    model, batches, jacobian, p, w, labels = reference
    with jax.enable_x64(True):
        matrix = np.asarray(EmpiricalFisher(model.loss(40), model.params, batches).to_matrix())
    expected = outer_products(jacobian, p, w, labels)
    np.testing.assert_allclose(matrix, expected, atol=1e-13 * np.abs(expected).max())
    eigenvalues = np.linalg.eigvalsh(matrix)
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1]


@pytest.mark.study
def test_monte_carlo_fisher_is_the_outer_products_at_its_targets_and_converges_to_gauss_newton(reference):
    model, batches, jacobian, p, w, _ = reference
    with jax.enable_x64(True):
        loss = model.loss(40)
        operator = MonteCarloFisher.draw(loss, model.params, batches, key=jax.random.key(3), samples=3)
        matrix = np.asarray(operator.to_matrix())
        labels = np.concatenate([np.asarray(g.stacked).reshape(-1, 3) for g in operator.drawn])
        expected = np.mean([outer_products(jacobian, p, w, labels[:, s]) for s in range(3)], axis=0)
        np.testing.assert_allclose(matrix, expected, atol=1e-13 * np.abs(expected).max())

        # v'Fv averages over draws to v'Gv; its standard error is known from the draws themselves.
        v = random_vector(operator.shape_dtype, 5)
        exact = float(dot(v, GaussNewton(loss, model.params, batches) @ v))
        values = []
        for k in range(60):
            drawn = MonteCarloFisher.draw(loss, model.params, batches, key=jax.random.key(10 + k), samples=3)
            values.append(float(dot(v, drawn @ v)))
        assert abs(np.mean(values) - exact) < 4 * np.std(values, ddof=1) / np.sqrt(60)


def test_drawn_targets_follow_the_model(reference):
    model, batches, _, p, _, _ = reference
    with jax.enable_x64(True):
        operator = MonteCarloFisher.draw(model.loss(40), model.params, batches, key=jax.random.key(3), samples=4000)
    labels = np.concatenate([np.asarray(g.stacked).reshape(-1, 4000) for g in operator.drawn])
    shares = np.stack([(labels == v).mean(axis=1) for v in range(p.shape[1])], axis=1)
    assert np.abs(shares - p).max() < 5 * np.sqrt(0.25 / 4000)


def linear_logits(params, inputs):
    return inputs @ params["w"] + params["b"]


def test_gauss_newton_is_the_hessian_where_logits_are_linear():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {"w": jnp.asarray(rng.normal(size=(5, 4))), "b": jnp.asarray(rng.normal(size=4))}
        inputs, labels, weights = rng.normal(size=(12, 5)), rng.integers(0, 4, 12), rng.random(12)
        loss = SoftmaxCrossEntropy(linear_logits)
        batches = [(inputs[:7], labels[:7], weights[:7]), (inputs[7:], labels[7:], weights[7:])]
        hessian, gauss_newton = (kind(loss, params, batches).to_matrix() for kind in (Hessian, GaussNewton))
    np.testing.assert_allclose(gauss_newton, hessian, atol=1e-14)
    assert np.linalg.norm(hessian) > 0.1

    # And it is not where they are not.
    operator = language_operator(num_layers=1)
    v = random_vector(operator.shape_dtype, 0)
    assert relative(GaussNewton(operator.loss, operator.params, [first(operator)]) @ v, operator @ v) > 0.1


def first(operator):
    return jax.tree.map(lambda x: x[0], operator.batches[0].stacked)


def test_the_hessian_less_gauss_newton_vanishes_at_a_zero_residual():
    # With p = y everywhere both the slope in the logits and the softmax's curvature vanish.
    loss = SoftmaxCrossEntropy(lambda params, inputs: 1e3 * jnp.tanh(inputs @ params))
    operator = GaussNewton(loss, 5 * jnp.eye(3), [(jnp.eye(3), jnp.arange(3))])
    # On some processors p is one but for a rounding, which two slopes of the logits multiply.
    slope = 1e3 * (1 - np.tanh(5.0) ** 2)
    assert np.abs(operator.to_matrix()).max() < np.finfo(np.float32).eps * slope**2


@pytest.mark.parametrize("kind", [pytest.param(GaussNewton, marks=pytest.mark.slow), "drawn"])
def test_products_do_not_depend_on_the_mesh(kind):
    ids = tokens(16, 12, 101).reshape(2, 8, 13)
    products = []
    for mesh in (None, make_mesh("fsdp=4,tensor=2")):
        model = random_model(dataclasses.replace(SMALL, num_layers=1), mesh)
        batch = TokenBatch(jnp.asarray(ids), jnp.ones((2, 8, 12)))
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh, axis=1))
        arguments = (model.loss(40), model.params, Microbatches(batch))
        if kind == "drawn":  # the chunks differ too: they are per device
            operator = MonteCarloFisher.draw(*arguments, key=jax.random.key(0))
        else:
            operator = kind(*arguments)
        products.append(operator @ random_vector(operator.shape_dtype, 1))
    assert relative(products[1], products[0]) < 1e-5


def test_drawn_targets_do_not_depend_on_microbatches():
    model = random_model(dataclasses.replace(SMALL, num_layers=1), factor=1)
    ids = tokens(6, 12, 101)
    drawn = []
    for cut in (1, 3):
        batches = [batch_of(ids[i : i + cut]) for i in range(0, 6, cut)]
        operator = MonteCarloFisher.draw(model.loss(50 * cut), model.params, batches, key=jax.random.key(0), samples=2)
        drawn.append(np.asarray(operator.drawn[0].stacked).reshape(6, 12, 2))
    np.testing.assert_array_equal(*drawn)


def test_bfloat16_stays_within_its_rounding_of_float32():
    narrow = language_operator("bfloat16", num_layers=1)
    v = random_vector(narrow.shape_dtype, 1)
    operator = GaussNewton(narrow.loss, narrow.params, [first(narrow)])
    exact = operator.in_dtype("float32") @ jax.tree.map(lambda x: x.astype("float32"), v)
    # Some thirty roundings lie one after the other, each of them to 8 bits.
    assert relative(jax.tree.map(lambda x: x.astype("float32"), operator @ v), exact) < 30 * 2**-9


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher, MonteCarloFisher])
def test_a_loss_without_known_outputs_is_refused_in_a_sentence(kind):
    def square(params, batch):
        return jnp.sum((params - batch) ** 2)

    with pytest.raises(ValueError, match=rf"{kind.__name__} needs a loss that knows its outputs.*square does not"):
        kind(square, jnp.ones(3), [jnp.ones(3)])


def test_monte_carlo_fisher_without_targets_is_refused():
    loss = SoftmaxCrossEntropy(linear_logits)
    params, batch = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, (jnp.ones((1, 2)), jnp.zeros(1, int))
    with pytest.raises(ValueError, match=r"MonteCarloFisher\.draw"):
        spectrum(MonteCarloFisher(loss, params, [batch]), steps=1)
    with pytest.raises(ValueError, match="generator is rbg"):
        MonteCarloFisher.draw(loss, params, [batch], key=jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match="samples is 0"):
        MonteCarloFisher.draw(loss, params, [batch], key=jax.random.key(0), samples=0)
