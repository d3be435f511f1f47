"""A dense matrix as an operator: the simplest one, and the shortest example of a file that adds one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.precision import exact_operator
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MatrixOperator(LinearOperator):
    """A dense symmetric matrix [n, n]; its vectors are arrays [n].

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]])) @ jnp.array([1.0, 0.0])
        Array([2., 1.], dtype=float32)
    """

    matrix: jax.Array

    def __post_init__(self) -> None:
        shape = getattr(self.matrix, "shape", None)
        if shape is not None and (len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0):
            raise InputError(f"The matrix has shape {shape}; it must be square, with at least one row.")

    def mv(self, v: Vector) -> Vector:
        wide = jnp.promote_types(jnp.promote_types(v.dtype, self.matrix.dtype), jnp.float32)
        return jnp.matmul(self.matrix.astype(wide), v.astype(wide), precision="highest").astype(v.dtype)

    @property
    def shape_dtype(self) -> Vector:
        return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)


@exact_operator.register
def _(operator: MatrixOperator, dtype: str) -> MatrixOperator:
    return MatrixOperator(operator.matrix.astype(dtype))
