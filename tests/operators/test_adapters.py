"""Operators in the solvers of SciPy and lineax, against NumPy on the dense matrix."""

import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec
from scipy.sparse.linalg import eigsh, lobpcg
from small_models import Diagonal

from jaxhess import GaussNewton, Hessian, MatrixOperator, SoftmaxCrossEntropy, as_lineax, as_scipy, make_mesh
from jaxhess.errors import InputError
from jaxhess.operators import adapters


def logits(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["last"]["kernel"] + params["last"]["bias"]


def model(kind=Hessian, dtype="float32", seed: int = 0):
    """An operator on a network of 38 parameters in three leaves."""
    rng = np.random.default_rng(seed)
    params = {"first": rng.normal(size=(4, 5)), "last": {"kernel": rng.normal(size=(5, 3)), "bias": np.zeros(3)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    batch = jnp.asarray(rng.normal(size=(20, 4)), dtype), jnp.asarray(rng.integers(0, 3, 20))
    return kind(SoftmaxCrossEntropy(logits), params, [batch])


def dense(operator) -> np.ndarray:
    return np.asarray(operator.to_matrix(), np.float64)


def damped(operator, damping):
    return lineax.TaggedLinearOperator(as_lineax(operator.shifted(damping)), lineax.positive_semidefinite_tag)


def solve(a, b):
    return lineax.linear_solve(a, b, lineax.CG(rtol=1e-6, atol=1e-6)).value


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arpack_and_lobpcg_find_the_eigenvalues_of_the_dense_hessian(dtype):
    with jax.enable_x64(dtype == "float64"):
        operator = model(dtype=dtype)
        a = as_scipy(operator, batch_size=4)
        matrix = dense(operator)
        expected = np.linalg.eigvalsh(matrix)
        extremes, vectors = eigsh(a, k=4, which="BE")
        largest = eigsh(a, k=3, which="LA", return_eigenvectors=False)
        tolerance = 1e-3 * expected[-1]
        start = np.random.default_rng(1).normal(size=(operator.dim, 4)).astype(dtype)
        found, found_vectors = lobpcg(a, start, tol=tolerance, maxiter=60, largest=True)
    assert a.dtype == vectors.dtype == dtype
    assert expected[0] < 0  # or both ends would not be seen
    rounding = operator.dim * np.finfo(dtype).eps * np.abs(expected).max()  # of rows of so many terms
    np.testing.assert_allclose(extremes, expected[[0, 1, -2, -1]], rtol=0, atol=rounding)
    np.testing.assert_allclose(largest, expected[-3:], rtol=0, atol=rounding)
    # Within a residual of every Ritz value there is an eigenvalue.
    residuals = np.linalg.norm(matrix @ found_vectors - found_vectors * found, axis=0)
    assert residuals.max() <= tolerance + rounding
    np.testing.assert_allclose(np.sort(found), expected[-4:], rtol=0, atol=tolerance + rounding)


def test_scipy_products_are_those_of_the_matrix_and_compiled_once_for_each_width():
    operator = model()
    matrix = dense(operator)
    adapters._flat_products.clear_cache()
    a, other = as_scipy(operator, batch_size=3), as_scipy(model(seed=1))
    x = np.random.default_rng(2).normal(size=(operator.dim, 7))
    np.testing.assert_allclose(a @ x, matrix @ x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(a @ x[:, :2], matrix @ x[:, :2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(a.T @ x[:, 0], matrix @ x[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(a @ x[:, :1], matrix @ x[:, :1], rtol=0, atol=1e-5)
    assert (other @ x).shape == x.shape
    (a @ x[:, 0])[0] = 1  # SciPy may write into what it gets
    assert adapters._flat_products._cache_size() == 2  # three columns, and one


def test_vectors_are_in_the_order_of_ravel_pytree():
    entries = {"b": jnp.arange(6.0).reshape(2, 3), "a": jnp.array([10.0, 20.0])}
    np.testing.assert_array_equal(as_scipy(Diagonal(entries)) @ np.ones(8), ravel_pytree(entries)[0])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [(("bfloat16", "bfloat16"), "float32"), (("bfloat16", "float32"), "float32"), (("float32", "float64"), "float64")],
)
def test_vectors_are_in_the_widest_dtype_at_least_float32(dtypes, expected):
    with jax.enable_x64(expected == "float64"):
        operator = Diagonal([jnp.full(3, 3, dtype) for dtype in dtypes])
        a, b = as_scipy(operator), as_lineax(operator)
        third = np.full(6, 1 / 3, expected)
        product = a @ third
        wide = b.mv([jnp.asarray(third[:3], x.dtype) for x in b.in_structure()])
    assert a.dtype == product.dtype == expected
    np.testing.assert_allclose(product, 1, rtol=2.0**-23)
    assert [x.dtype for x in wide] == [np.promote_types(dtype, "float32") for dtype in map(jnp.dtype, dtypes)]
    np.testing.assert_allclose(np.concatenate(wide), 1, rtol=2.0**-23)


def test_vectors_sharded_over_the_devices_of_one_process():
    entries = jax.device_put(jnp.arange(16.0), NamedSharding(make_mesh(), PartitionSpec("fsdp")))
    assert len(entries.sharding.device_set) == 8
    operator = Diagonal(entries)
    np.testing.assert_allclose(eigsh(as_scipy(operator), k=2, return_eigenvectors=False), [14, 15], rtol=1e-5)
    np.testing.assert_allclose(solve(damped(operator, 1.0), entries + 1), 1, rtol=1e-4)


def test_scipy_refuses_what_it_cannot_do(monkeypatch):
    operator = MatrixOperator(jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]]))
    with pytest.raises(ValueError, match="batch_size is 0"):
        as_scipy(operator, batch_size=0)
    with pytest.raises(InputError, match="product is not finite"):
        as_scipy(operator) @ np.ones(2)
    with pytest.raises(TypeError, match="complex128"):
        as_scipy(operator) @ np.array([1j, 1])
    sharded = Diagonal(jax.device_put(jnp.arange(16.0), NamedSharding(make_mesh(), PartitionSpec("fsdp"))))
    monkeypatch.setattr(NamedSharding, "is_fully_addressable", property(lambda self: False))
    with pytest.raises(ValueError, match="devices of several: run one process"):
        as_scipy(sharded)


def test_lineax_solves_the_damped_gauss_newton_system_and_shares_its_program():
    traces, damping = [], 0.1

    @jax.jit
    def given(a, b):
        traces.append("given")
        return solve(a, b)

    @jax.jit
    def made_inside(operator, b, damping):
        traces.append("made inside")
        return solve(damped(operator, damping), b)

    for seed in (0, 1):
        operator = model(GaussNewton, seed=seed)
        b = jax.tree.map(jnp.ones_like, operator.params)
        matrix = dense(operator) + damping * np.eye(operator.dim)
        expected = np.linalg.solve(matrix, np.ones(operator.dim))
        # The residual is within 1e-6 |b|, and rounding, both divided by the smallest eigenvalue, at least the damping.
        error = (1e-6 + operator.dim * np.finfo("float32").eps * np.linalg.cond(matrix)) * operator.dim**0.5 / damping
        for found in (given(damped(operator, damping), b), made_inside(operator, b, damping)):
            assert np.linalg.norm(ravel_pytree(found)[0] - expected) <= 4 * error
    assert traces == ["given", "made inside"]
    assert not jax.make_jaxpr(solve)(damped(operator, damping), b).consts  # parameters and data are arguments


def test_lineax_sees_a_symmetric_operator_on_pytrees():
    operator = model()
    a = as_lineax(operator)
    assert lineax.is_symmetric(a)
    assert not lineax.is_positive_semidefinite(a)
    assert {id(x) for x in jax.tree.leaves(a)} == {id(x) for x in jax.tree.leaves(operator)}
    np.testing.assert_allclose(a.as_matrix(), dense(operator), rtol=0, atol=1e-5)
    b = jax.tree.map(jnp.ones_like, operator.params)
    solver = lineax.GMRES(rtol=1e-5, atol=1e-5, restart=38)  # takes indefinite systems
    found = ravel_pytree(lineax.linear_solve(as_lineax(operator.shifted(0.1)), b, solver).value)[0]
    residual = (dense(operator) + 0.1 * np.eye(38)) @ np.asarray(found, np.float64) - 1
    assert np.linalg.norm(residual) < 1e-3 * 38**0.5


def test_without_lineax_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    with pytest.raises(InputError, match=r"pip install 'jaxhess\[lineax\]'"):
        as_lineax(MatrixOperator(jnp.eye(2)))
