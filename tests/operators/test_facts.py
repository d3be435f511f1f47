"""What is known of an operator of one's own, without a line about it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import Diagonal, language_operator

from jaxhess import FiniteDifferenceHessian, Hessian, LinearOperator, MatrixOperator, linearize
from jaxhess.errors import InputError
from jaxhess.operators.facts import checksum, describe, explain_non_finite, shares_work, validate
from jaxhess.operators.precision import exact_operator, product_dtypes, unit_roundoff

A = jnp.array([[2.0, 1.0], [1.0, 3.0]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Between(LinearOperator):
    """scale * B A B, with B diagonal."""

    diagonal: jax.Array
    inner: LinearOperator
    scale: float = 1.0
    note: str = dataclasses.field(default="none", metadata={"static": True})

    def mv(self, v):
        return self.scale * self.diagonal * self.inner.mv(self.diagonal * v)

    @property
    def shape_dtype(self):
        return self.inner.shape_dtype


def test_an_operator_made_of_others_is_described_by_its_fields():
    one = Between(jnp.ones(2), MatrixOperator(A), jnp.float32(0.5))
    expected = {"kind": "Between", "inner": {"kind": "MatrixOperator"}, "scale": 0.5, "note": "none"}
    assert describe(one) == expected
    assert describe(2 * one) == {"kind": "ScaledOperator", "operator": expected, "factor": 2}
    assert describe(one.shifted(3.0) + one) == {
        "kind": "SumOperator",
        "terms": [{"kind": "ShiftedOperator", "operator": expected, "shift": 3.0}, expected],
    }


def test_a_checksum_tells_every_array_apart():
    def made(diagonal=1.0, matrix=A):
        return Between(jnp.full(2, diagonal), MatrixOperator(matrix))

    sums = [checksum(x) for x in (made(), made(diagonal=2.0), made(matrix=2 * A), made() + made(), MatrixOperator(A))]
    assert len(set(sums)) == len(sums)
    assert checksum(made()) == checksum(made())
    operator = language_operator(num_layers=1)
    changed = dataclasses.replace(operator, params=jax.tree.map(lambda x: x + 1, operator.params))
    assert checksum(2 * operator) == checksum(operator) != checksum(changed)


def test_an_operator_made_of_others_is_exact_if_they_all_are():
    one = Between(jnp.ones(2), MatrixOperator(A.astype(jnp.bfloat16)))
    assert product_dtypes(one) == ("bfloat16",)
    assert product_dtypes(one + MatrixOperator(A)) == ("bfloat16", "float32")
    assert unit_roundoff(one, jnp.ones(2)) == 2**-7
    wide = exact_operator(one, "float32")
    assert isinstance(wide, Between)
    np.testing.assert_array_equal(wide.inner.matrix, A)
    assert exact_operator(Diagonal(jnp.ones(2)), "float64") is None
    assert exact_operator(one + Diagonal(jnp.ones(2)), "float32") is None


def test_facts_and_costs_come_from_the_operators_it_is_made_of():
    def loss(params, batch):
        return jnp.sum((params - batch) ** 2)

    hessian = Hessian(loss, jnp.ones(2), [jnp.zeros(2)])
    assert validate(Between(jnp.ones(2), hessian) + MatrixOperator(A)) == {"loss": 2.0, "count": 1.0}
    assert validate(MatrixOperator(A)) == {}
    with pytest.raises(InputError, match="loss of microbatch 0 is nan"):
        validate(linearize(Hessian(loss, jnp.full(2, jnp.nan), [jnp.zeros(2)])))
    difference = FiniteDifferenceHessian(loss, jnp.ones(2), [jnp.zeros(2)], step=0.1)
    assert not shares_work(Between(jnp.ones(2), difference))
    assert shares_work(difference + hessian)
    assert explain_non_finite(2 * MatrixOperator(A), jnp.ones(2)) == ""
    assert "over microbatch 0 alone" in explain_non_finite(2 * hessian, jnp.full(2, jnp.nan))
