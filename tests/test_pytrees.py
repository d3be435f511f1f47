"""Operators of different classes are different arguments of a jitted function."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from small_models import network_loss

import jaxhess
from jaxhess import EmpiricalFisher, GaussNewton, Hessian, LowRank, MatrixOperator, SoftmaxCrossEntropy
from jaxhess.operators import ScaledOperator, ShiftedOperator, SumOperator

LOSS = SoftmaxCrossEntropy(lambda w, x: x @ w)
BATCH = jnp.ones((2, 3)), jnp.array([0, 1])
A = MatrixOperator(jnp.eye(2))


@pytest.mark.parametrize(
    "operators",
    [
        [kind(LOSS, jnp.ones((3, 2)), [BATCH]) for kind in (Hessian, GaussNewton, EmpiricalFisher)],
        [ScaledOperator(A, 2.0), ShiftedOperator(A, 2.0)],
        [A, SumOperator((A,))],
        [LowRank(jnp.ones(1), jnp.ones((1, 2))), ScaledOperator(A, 2.0)],
    ],
    ids=lambda operators: type(operators[0]).__name__,
)
def test_structures_of_two_classes_differ(operators):
    """Those of `jax.tree_util.register_dataclass` compare equal, and a program may be taken for that of another."""
    for one, other in itertools.combinations(operators, 2):
        assert jax.tree.structure(one) != jax.tree.structure(other)
        assert jax.tree.structure(one) == jax.tree.structure(jax.tree.map(lambda x: x, one))


def test_fields_keep_their_names_and_static_ones_are_no_leaves():
    operator = Hessian(network_loss, {"w": jnp.ones(2)}, [jnp.ones(2)])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.flatten_with_path(operator)[0]]
    assert names == [".params['w']", ".batches[0].stacked"]
    assert jaxhess.Hessian is type(jax.tree.map(jnp.zeros_like, operator))
