"""The forms of single microbatches against the operator of each alone, with any operator that has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, language_operator, network, random_model, random_vector

from jaxhess import FiniteDifferenceHessian, GaussNewton, MatrixOperator, Microbatches, linearize, make_mesh
from jaxhess.operators.forms import num_microbatches, product_and_forms


def positive(like):
    return jax.tree.map(lambda x: 1 + x**2, random_vector(like, 2))


def flat(vector):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(vector)])


def expected(operator, v, u, change=lambda operator: operator):
    """From the operator of each microbatch alone, changed as the whole one is, times its count."""
    rows = []
    for group in operator.batches:
        for k in range(len(group)):
            one = Microbatches(jax.tree.map(lambda x, k=k: x[k : k + 1], group.stacked))
            alone = dataclasses.replace(operator, batches=(one,))
            _, count = operator.loss(operator.params, jax.tree.map(lambda x: x[0], one.stacked))
            product = float(count) * flat(change(alone) @ v)
            rows.append([flat(v) @ product, flat(u) @ product, product @ product, float(count)])
    return np.array(rows)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["exact", "linearized", "restricted", "gauss-newton", "preconditioned"])
def test_forms_are_those_of_each_microbatch(kind):
    operator = network("float64", sizes=(2, 2, 1))  # two groups, one of them of two
    if kind == "restricted":
        operator = operator.restrict("layers")
    if kind == "gauss-newton":
        language = language_operator("float64", num_layers=1)
        operator = GaussNewton(language.loss, language.params, language.batches)
    change = {"linearized": linearize, "preconditioned": lambda a: a.preconditioned(positive(a.shape_dtype))}.get(
        kind, lambda a: a
    )
    v, u = (random_vector(operator.shape_dtype, k) for k in range(2))
    whole = change(operator)
    product, forms = jax.jit(lambda *x: product_and_forms(*x, "float64"))(whole, v, u)
    assert num_microbatches(whole) == len(forms)
    np.testing.assert_allclose(forms, expected(operator, v, u, change), rtol=1e-10)
    np.testing.assert_allclose(flat(product), flat(whole @ v), atol=1e-12 * np.abs(flat(product)).max())


def test_forms_are_the_same_on_eight_devices():
    """Float32 products of both differ by about 1e-6; 1e-4 of the largest of each kind is far below any other error."""
    here = language_operator(num_layers=1)
    model = random_model(dataclasses.replace(SMALL, num_layers=1), make_mesh("data=2,fsdp=4"))
    there = dataclasses.replace(here, loss=model.loss(), params=model.params, shardings=None)
    found = [jax.jit(product_and_forms)(x, random_vector(x.shape_dtype, 0))[1] for x in (here, there)]
    for here_column, there_column in zip(found[0].T, found[1].T, strict=True):
        np.testing.assert_allclose(there_column, here_column, atol=1e-4 * float(jnp.abs(here_column).max()))


def test_operators_that_do_not_add_up_microbatches_have_none():
    operator = network(sizes=(2, 2))
    differences = FiniteDifferenceHessian(operator.loss, operator.params, operator.batches)
    assert [num_microbatches(x) for x in (differences, MatrixOperator(jnp.eye(2)), 2 * operator)] == [0, 0, 0]
