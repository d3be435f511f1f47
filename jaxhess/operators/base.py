"""What a linear operator is, and the simplest one."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.vectors import Vector


class LinearOperator(abc.ABC):
    """A symmetric linear map on vectors that are pytrees.

    Operators are frozen dataclasses registered as pytrees: their arrays are arguments of a jitted program, never
    constants captured by it.
    """

    @abc.abstractmethod
    def mv(self, v: Vector) -> Vector:
        """The product with v, in the dtypes of v. Pure and traceable (`jit`, `vmap`, `fori_loop`)."""

    @property
    @abc.abstractmethod
    def shape_dtype(self) -> Vector:
        """`jax.ShapeDtypeStruct` of every leaf of a vector, with its sharding where it has one."""

    @property
    def dim(self) -> int:
        """Rows of the matrix."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shape_dtype))

    def __matmul__(self, v: Vector) -> Vector:
        """`operator @ v`: the product as one compiled program.

        Raises:
            ValueError: v is not shaped like the operator's vectors; the message names the first leaf that differs.
        """
        _check_structure(v, self.shape_dtype)
        return _compiled_mv(self, v)

    def validate(self) -> dict[str, Any]:
        """Facts worth recording about the operator's inputs; raises if products would be meaningless."""
        return {}

    def explain_non_finite(self, v: Vector) -> str:
        """Where a product with v that came out non-finite went wrong, for an error message."""
        return ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixOperator(LinearOperator):
    """A dense symmetric matrix [n, n]; its vectors are arrays [n]."""

    matrix: jax.Array

    def __post_init__(self) -> None:
        shape = getattr(self.matrix, "shape", None)
        if shape is not None and (len(shape) != 2 or shape[0] != shape[1]):
            raise ValueError(f"The matrix has shape {shape}; it must be square.")

    def mv(self, v: Vector) -> Vector:
        wide = jnp.promote_types(jnp.promote_types(v.dtype, self.matrix.dtype), jnp.float32)
        return jnp.matmul(self.matrix.astype(wide), v.astype(wide), precision="highest").astype(v.dtype)

    @property
    def shape_dtype(self) -> Vector:
        return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)


@jax.jit
def _compiled_mv(operator: LinearOperator, v: Vector) -> Vector:
    return operator.mv(v)


def _check_structure(v: Vector, expected: Vector) -> None:
    found, wanted_structure = str(jax.tree.structure(v)), str(jax.tree.structure(expected))
    if found != wanted_structure:
        raise ValueError(f"The vector has structure {found}; it must be that of the parameters, {wanted_structure}.")
    wanted, _ = jax.tree.flatten_with_path(expected)
    for (path, leaf), given in zip(wanted, jax.tree.leaves(v), strict=True):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(given), jnp.floating):
            raise ValueError(f"The vector's leaf {name} has dtype {jnp.result_type(given)}; it must be floating point.")
        if jnp.shape(given) != leaf.shape:
            raise ValueError(f"The vector's leaf {name} has shape {jnp.shape(given)}; it must be {leaf.shape}.")
