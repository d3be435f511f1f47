"""Operators for the solvers of other libraries: SciPy on flat vectors on the host, lineax on pytrees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.facts import non_finite, validated
from jaxhess.vectors import Vector, widen

if TYPE_CHECKING:
    import lineax


def as_scipy(operator: LinearOperator, batch_size: int = 1) -> scipy.sparse.linalg.LinearOperator:
    """The operator as a symmetric `scipy.sparse.linalg.LinearOperator`, for small models: `eigsh`, `lobpcg`, `minres`.

    Vectors are flat NumPy arrays in the order of `jax.flatten_util.ravel_pytree`, in the operator's dtype but at least
    float32 (float64 where it has leaves of both). Each product copies a vector to the device and one back, and `eigsh`
    keeps some twenty on the host: for large models there is `jaxhess.leading_eigenpairs`. Products are compiled at the
    first one, once for `matvec` and, unless `batch_size` is 1, once more for `matmat`.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from scipy.sparse.linalg import eigsh
        >>> def loss(params, batch):
        ...     inputs, targets = batch
        ...     return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)
        >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
        >>> H = jaxhess.Hessian(loss, {"b": jnp.zeros(()), "w": jnp.zeros(2)}, [batch])
        >>> eigsh(jaxhess.as_scipy(H), k=1, return_eigenvectors=False).round(3)
        array([5.303], dtype=float32)

    Args:
        operator: Symmetric.
        batch_size: Columns of a matrix whose products are computed at once (`vmap`). The last batch is padded, so that
            it is best a divisor of the number of columns, for `lobpcg` that of the eigenvectors asked for.

    Raises:
        InputError: `batch_size` below 1, vectors that lie on the devices of several processes, or an operator whose
            products would be meaningless; a product, when it is computed, is not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    leaves = jax.tree.leaves((operator, operator.shape_dtype))
    shardings = [leaf.sharding for leaf in leaves if getattr(leaf, "sharding", None) is not None]
    if not all(sharding.is_fully_addressable for sharding in shardings):
        raise InputError(
            "SciPy works on vectors in one process, and the operator's lie on the devices of several: run one process, "
            "or take jaxhess.leading_eigenpairs or jaxhess.conjugate_gradients."
        )
    validated(operator)
    zeros, unravel = jax.flatten_util.ravel_pytree(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _vectors(operator))
    )
    dtype = zeros.dtype

    def products(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(dtype, casting="same_kind")
        found = np.array(_flat_products(operator, unravel, rows))  # a copy: SciPy may write into it
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if bad.size:
            raise non_finite("The product", operator, unravel(jnp.asarray(rows[bad[0]])))
        return found

    def matvec(v: np.ndarray) -> np.ndarray:
        return products(v.reshape(1, -1))[0]

    def matmat(x: np.ndarray) -> np.ndarray:
        count = x.shape[1]
        rows = np.pad(x.T, ((0, -count % batch_size), (0, 0)), mode="edge")  # one width, one program
        batches = np.split(rows, range(batch_size, len(rows), batch_size))
        return np.concatenate([products(batch) for batch in batches])[:count].T

    return scipy.sparse.linalg.LinearOperator(
        (operator.dim, operator.dim), matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=dtype
    )


def as_lineax(operator: LinearOperator) -> lineax.FunctionLinearOperator:
    """The operator as a `lineax.FunctionLinearOperator` with `lineax.symmetric_tag`, for `lineax.linear_solve`.

    Its vectors are pytrees like the operator's, in at least float32. Its leaves are the operator's arrays: under `jit`
    they are arguments, and operators that differ only in them share a compiled program. `lineax.CG` asks for one more
    tag (see the example): it is right for a Gauss-Newton matrix, a Fisher, and a Hessian shifted to be positive.

    Examples:
        >>> import jax.numpy as jnp, jaxhess, lineax
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> positive = lineax.TaggedLinearOperator(jaxhess.as_lineax(A), lineax.positive_semidefinite_tag)
        >>> lineax.linear_solve(positive, jnp.array([3.0, 0.0]), lineax.CG(rtol=1e-5, atol=1e-5)).value.round(3)
        Array([ 2., -1.], dtype=float32)

    Raises:
        InputError: lineax is not installed.
    """
    try:
        import lineax
    except ImportError:
        raise InputError("as_lineax needs lineax, which is not installed: pip install 'jaxhess[lineax]'.") from None
    # Already a pytree of arrays. What closure_convert makes of it is no argument for `jax.jit`, and shares no program.
    product = jax.tree_util.Partial(_product, operator)
    return lineax.FunctionLinearOperator(product, _vectors(operator), lineax.symmetric_tag, closure_convert=False)


def _product(operator: LinearOperator, v: Vector) -> Vector:
    return operator.mv(v)


def _vectors(operator: LinearOperator) -> Vector:
    """Shapes and dtypes of the operator's vectors, in at least float32 and without their shardings."""
    wide: Any = jax.eval_shape(widen, operator.shape_dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wide)


@functools.partial(jax.jit, static_argnums=1)
def _flat_products(operator: LinearOperator, unravel: Callable[[jax.Array], Vector], rows: jax.Array) -> jax.Array:
    """A times every row of [b, dim]."""
    return jax.vmap(lambda x: jax.flatten_util.ravel_pytree(operator.mv(unravel(x)))[0])(rows)
