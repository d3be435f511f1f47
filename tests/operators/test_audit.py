"""The noise audit measures what is there: on matrices spoilt by a known amount, and on real operators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import language_operator

from jaxhess import FiniteDifferenceHessian, LinearOperator, MatrixOperator, audit
from jaxhess.errors import InputError
from jaxhess.operators import audit as noise_module
from jaxhess.operators.precision import exact_operator

N = 400
RNG = np.random.default_rng(0)
BASE = np.diag(np.linspace(-1, 5, N)).astype(np.float32)
SPOILT = RNG.normal(size=(N, N)).astype(np.float32) / np.sqrt(N)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spoilt(MatrixOperator):
    """A matrix that pretends to be BASE, and may bend."""

    bend: float = 0.0

    def mv(self, v):
        product = super().mv(v)
        return product + self.bend * jnp.linalg.norm(product) * jnp.sin(v)


@exact_operator.register
def _(operator: Spoilt, dtype: str):
    return MatrixOperator(jnp.asarray(BASE, dtype))


def test_a_clean_matrix_is_clean():
    facts = audit(Spoilt(jnp.asarray(BASE)))
    assert facts.asymmetry < 1e-5
    assert facts.nonlinearity < 1e-6
    assert facts.relative_error.random < 1e-6
    assert facts.reference == "MatrixOperator in float64"


def test_asymmetry_and_error_have_the_size_that_was_planted():
    size = 0.01
    skew = (SPOILT - SPOILT.T) / np.sqrt(2)  # entries of variance 1/n: |skew x| = |x|, u'skew v of order sqrt(2)|v|
    values = [audit(Spoilt(jnp.asarray(BASE + size * skew)), seed=k) for k in range(12)]
    typical = size * np.sqrt(N) / np.linalg.norm(BASE)  # |size skew x| / |BASE x|
    asymmetry = np.sqrt(np.mean([v.asymmetry**2 for v in values]))
    assert 0.5 < asymmetry / (2 * typical) < 2  # u'Ev - v'Eu = 2 u'Ev, of standard deviation 2 |Ev|
    for v in values:
        np.testing.assert_allclose(v.relative_error.random, typical, rtol=0.2)
        np.testing.assert_allclose(v.floor.random, size, rtol=0.2)
        assert v.nonlinearity < 1e-5


def test_a_bent_operator_is_seen():
    facts = audit(Spoilt(jnp.asarray(BASE), bend=0.01))
    assert facts.nonlinearity > 0.01


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.study)])
def test_the_reference_is_the_same_operator_in_a_wider_dtype(dtype):
    operator = language_operator(dtype, num_layers=1)
    facts = audit(operator)
    assert facts.reference == {"float32": "Hessian in float64", "bfloat16": "Hessian in float32"}[dtype]
    unit = {"float32": 2**-24, "bfloat16": 2**-9}[dtype]
    low, high = unit / 4, 50 * unit  # between one rounding, averaged, and a few dozen that add up
    for name in ("random", "leading"):
        assert low < getattr(facts.relative_error, name) < high
    assert not jax.config.read("jax_enable_x64")


def test_without_a_reference_nothing_is_claimed(monkeypatch):
    facts = audit(MatrixOperator(jnp.asarray(BASE)), reference=False)
    assert facts.reference == "none: not asked for"
    assert facts.floor is None
    with jax.enable_x64(True):
        wide = audit(MatrixOperator(jnp.asarray(BASE, jnp.float64)))
    assert wide.reference == "none: the operator computes in float64"
    monkeypatch.setattr(noise_module, "available_bytes", lambda leaves: 1000.0)
    assert "are left" in audit(MatrixOperator(jnp.asarray(BASE))).reference


def test_a_product_that_is_not_finite_is_an_error():
    class Broken(LinearOperator):
        shape_dtype = jax.ShapeDtypeStruct((3,), jnp.float32)

        def mv(self, v):
            return v * jnp.inf

    jax.tree_util.register_dataclass(Broken, [], [])
    with pytest.raises(InputError, match="is not finite"):
        audit(Broken())


def test_finite_differences_are_compared_with_the_exact_product():
    exact = language_operator(num_layers=1)
    batch = [jax.tree.map(lambda x: x[0], exact.batches[0].stacked)]
    crude = FiniteDifferenceHessian(exact.loss, exact.params, batch, step=0.1)
    facts = audit(crude)
    assert facts.reference == "Hessian in float64"
    assert facts.relative_error.random > 0.1  # a step of twice the weights' size
    assert facts.nonlinearity > 0.01


def test_a_matrix_stored_narrow_is_not_blamed_for_its_vectors_rounding():
    operator = MatrixOperator(jnp.asarray(np.diag(np.arange(1, 9)), jnp.bfloat16))
    facts = audit(operator)
    assert facts.reference == "MatrixOperator in float32"
    assert facts.nonlinearity < 1e-6
    assert facts.relative_error.random < 1e-6
