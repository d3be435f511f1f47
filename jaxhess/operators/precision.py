"""In what precision an operator computes, as functions that dispatch on its type, like those of `operators.facts`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxhess.operators.base import LinearOperator, LowRank, parts, with_parts
from jaxhess.vectors import Vector, cast, widen


@functools.singledispatch
def product_dtypes(operator: LinearOperator) -> tuple[str, ...]:
    """The dtypes that products are computed in, by default those of the vectors.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.precision import product_dtypes
        >>> product_dtypes(jaxhess.MatrixOperator(jnp.eye(2)) + jaxhess.MatrixOperator(jnp.eye(2, dtype=jnp.bfloat16)))
        ('bfloat16', 'float32')
    """
    found = parts(operator)
    if found:
        return tuple(sorted({dtype for part in found for dtype in product_dtypes(part)}))
    return tuple(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(operator.shape_dtype)}))


@functools.singledispatch
def exact_operator(operator: LinearOperator, dtype: str) -> LinearOperator | None:
    """The operator that this one approximates, computed in `dtype`; None where there is no such thing.

    By default there is one for operators made of others that all have one.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.precision import exact_operator
        >>> w, batches = jnp.ones(2, jnp.bfloat16), [jnp.ones(2)]
        >>> D = jaxhess.FiniteDifferenceHessian(lambda w, x: jnp.sum(x * w**2), w, batches)
        >>> exact_operator(D, "float32") @ jnp.ones(2)
        Array([2., 2.], dtype=float32)
    """
    wide = [exact_operator(part, dtype) for part in parts(operator)]
    known = [part for part in wide if part is not None]
    return with_parts(operator, known) if known and len(known) == len(wide) else None


@exact_operator.register
def _(operator: LowRank, dtype: str) -> LowRank:
    return LowRank(operator.values.astype(dtype), cast(operator.vectors, dtype))


@functools.singledispatch
def product_eps(operator: LinearOperator) -> float:
    """The eps of the arithmetic of products, by default the largest of the dtypes that they are computed in.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.precision import product_eps
        >>> H = jaxhess.Hessian(lambda w, x: jnp.sum(x @ w), jnp.ones(2), [jnp.eye(2)], matmul_precision="tf32")
        >>> product_eps(H), product_eps(H.in_dtype("float32"))
        (0.001953125, 1.1920928955078125e-07)
    """
    found = [product_eps(part) for part in parts(operator)]
    return max(found or [float(jnp.finfo(dtype).eps) for dtype in product_dtypes(operator)])


def unit_roundoff(operator: LinearOperator, vectors: Vector) -> float:
    """The eps of products with these vectors: of the operator's arithmetic, or of the dtype that they are returned in.

    Products come in the dtypes of the vectors they are of, in at least float32. What the storage of narrower vectors
    rounds is measured in every step (`LanczosState.step_errors`).
    """
    returned = {str(x.dtype) for x in jax.tree.leaves(jax.eval_shape(widen, vectors))}
    return max(*(float(jnp.finfo(dtype).eps) for dtype in returned), product_eps(operator))
