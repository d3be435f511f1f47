"""Sums, multiples and shifts of operators are those of their matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import language_operator, random_vector, relative

from jaxhess import GaussNewton, Hessian, MatrixOperator, spectrum
from jaxhess.errors import InputError
from jaxhess.operators.facts import describe


def symmetric(n: int, seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    return (a + a.T) / 2


A, B = symmetric(7, 0), symmetric(7, 1)


def test_algebra_of_operators_is_that_of_matrices():
    a, b = MatrixOperator(jnp.asarray(A)), MatrixOperator(jnp.asarray(B))
    combined = 2 * a - b * 0.5 + (-b).shifted(3.0) + a
    expected = 3 * A - 1.5 * B + 3 * np.eye(7)
    np.testing.assert_allclose(combined.to_matrix(), expected, atol=1e-5)
    result = spectrum(combined, steps=7, probes=1)
    np.testing.assert_allclose(result.ritz_values[0], np.linalg.eigvalsh(expected), rtol=1e-4)


def test_a_changed_factor_compiles_nothing_again():
    traced = []

    class Counting(MatrixOperator):
        def mv(self, v):
            traced.append(1)
            return super().mv(v)

    jax.tree_util.register_dataclass(Counting, ["matrix"], [])
    a = Counting(jnp.asarray(A))
    for k in range(3):
        (float(k) * a).shifted(float(k)) @ jnp.ones(7)
    assert len(traced) == 1


def test_the_hessian_splits_into_gauss_newton_and_the_rest():
    operator = language_operator(num_layers=1)
    batch = [jax.tree.map(lambda x: x[0], operator.batches[0].stacked)]
    hessian, gauss_newton = (kind(operator.loss, operator.params, batch) for kind in (Hessian, GaussNewton))
    v = random_vector(hessian.shape_dtype, 0)
    rest = (hessian - gauss_newton) @ v
    assert relative(rest, jax.tree.map(jnp.subtract, hessian @ v, gauss_newton @ v)) < 1e-5
    described = describe(hessian - gauss_newton)
    assert [t["kind"] for t in described["terms"]] == ["Hessian", "ScaledOperator"]


def test_low_precision_terms_are_added_in_float32():
    small = MatrixOperator(jnp.eye(2, dtype=jnp.bfloat16))
    big = MatrixOperator(256 * jnp.eye(2, dtype=jnp.bfloat16))
    total = (big + small + small) @ jnp.ones(2, jnp.bfloat16)  # in bfloat16 256 + 1 = 256
    assert float(total[0]) == 258


def test_low_precision_products_are_scaled_and_shifted_in_float32():
    one = jnp.ones(2, jnp.bfloat16)
    near = MatrixOperator(1.001 * jnp.eye(2))  # in bfloat16 1
    np.testing.assert_allclose(np.asarray(near.shifted(-1.0) @ one, np.float32), 1e-3, rtol=2**-8)
    large = MatrixOperator(jnp.full((2, 2), 1e5))  # above the largest number of float16
    np.testing.assert_allclose(np.asarray((1e-5 * large) @ one.astype("float16"), np.float32), 2, rtol=2**-10)


def test_what_does_not_add_is_refused_in_a_sentence():
    a = MatrixOperator(jnp.asarray(A))
    with pytest.raises(TypeError, match="not to int"):
        a + 1
    with pytest.raises(ValueError, match=r"shape \(3,\); it must be \(7,\)"):
        a + MatrixOperator(jnp.eye(3))
    with pytest.raises(TypeError, match="not multiplied with each other"):
        a * a
    with pytest.raises(ValueError, match="scaled by a scalar"):
        a * jnp.ones(7)
    with pytest.raises(ValueError, match=r"shifted by a scalar, not by an array of shape \(7,\)"):
        a.shifted(jnp.ones(7))
    for value in ("x", None, 1j):
        with pytest.raises(TypeError, match="scaled by a real number"):
            a * value
        with pytest.raises(TypeError, match="shifted by a real number"):
            a.shifted(value)
    with pytest.raises(ValueError, match="stops at 32,768"):
        language_operator(vocab_size=4001).to_matrix()


def test_a_sum_names_the_term_that_is_not_finite():
    finite = MatrixOperator(jnp.eye(2))
    with pytest.raises(InputError, match=r"term 1 of the sum \(MatrixOperator\)"):
        spectrum(finite + MatrixOperator(jnp.full((2, 2), jnp.inf)), steps=1)
