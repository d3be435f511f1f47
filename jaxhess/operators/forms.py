"""Quadratic forms of single microbatches, which come with a product for the price of three inner products each.

With S_b the curvature of microbatch b's summed loss and c_b its count the operator is sum_b S_b / sum_b c_b. How far
v'S_b v scatters from one microbatch to the next says how far v'Hv depends on the data (`jaxhess.slq.data_errors`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.operators.base import LinearOperator
from jaxhess.operators.linearized import LinearizedHessian
from jaxhess.operators.loss import LossOperator
from jaxhess.operators.preconditioned import Preconditioned
from jaxhess.vectors import Vector, dot, widen

FORMS = 4
"""Numbers of a microbatch: v'S_b v, u'S_b v, |S_b v|^2 and the count c_b."""


@functools.singledispatch
def num_microbatches(operator: LinearOperator) -> int:
    """Microbatches whose products the operator adds up, where `product_and_forms` can tell them apart; 0 elsewhere.

    Finite differences add up over microbatches before they subtract.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.forms import num_microbatches
        >>> num_microbatches(jaxhess.Hessian(lambda w, x: jnp.sum(w * x), jnp.ones(2), [jnp.ones(2)] * 3))
        3
    """
    return 0


@num_microbatches.register
def _(operator: LossOperator) -> int:
    """None of one that makes its products in a way of its own, as finite differences do."""
    if type(operator).mv is not LossOperator.mv or type(operator).wide_mv is not LossOperator.wide_mv:
        return 0
    return sum(map(len, operator.groups))


@num_microbatches.register
def _(operator: LinearizedHessian) -> int:
    return num_microbatches(operator.hessian)


@num_microbatches.register
def _(operator: Preconditioned) -> int:
    return num_microbatches(operator.operator)


def product_and_forms(
    operator: Any, v: Vector, u: Vector | None = None, dtype: Any = "float32", wanted: jax.Array | None = None
) -> tuple[Vector, jax.Array]:
    """The product with v in at least float32, and `FORMS` numbers of every microbatch, [microbatches, 4].

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.forms import product_and_forms
        >>> loss = lambda w, x: (jnp.sum(x * w**2), 2.0)  # S_b = 2 diag(x)
        >>> H = jaxhess.Hessian(loss, jnp.ones(2), [jnp.array([1.0, 0.0]), jnp.array([3.0, 1.0])])
        >>> product_and_forms(H, jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]))
        (Array([2. , 0.5], dtype=float32), Array([[ 2.,  2.,  4.,  2.],
               [ 8.,  6., 40.,  2.]], dtype=float32))

    Args:
        operator: Of which `num_microbatches` is not 0.
        v: Like the operator's vectors.
        u: Of the second number; None: it is 0.
        dtype: In which, or wider, inner products are accumulated.
        wanted: Whether the numbers are; where not they are zeros, and cost nothing. None: yes.
    """

    def forms(part: tuple[Vector, jax.Array]) -> jax.Array:
        product, count = part
        other = jnp.zeros((), dtype) if u is None else dot(u, product, dtype)
        found = (dot(v, product, dtype), other, dot(product, product, dtype), count)
        return jnp.stack([x.astype(dtype) for x in found])

    def each(part: tuple[Vector, jax.Array]) -> jax.Array:
        if wanted is None:
            return forms(part)
        return jax.lax.cond(wanted, forms, lambda _: jnp.zeros(FORMS, dtype), part)

    return operator.product_and_each(widen(v), each)
