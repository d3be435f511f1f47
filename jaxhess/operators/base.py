"""What a linear operator is, and the simplest one."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from jaxhess.distributed.memory import bytes_per_device
from jaxhess.errors import InputError
from jaxhess.vectors import Vector, checksum, widen


class LinearOperator(abc.ABC):
    """A symmetric linear map on vectors that are pytrees.

    Operators are frozen dataclasses registered as pytrees: their arrays are arguments of a jitted program, never
    constants captured by it. Two are equal if they are the same object (`eq=False`), because comparing
    arrays gives an array.
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
        check_structure(v, self.shape_dtype)
        return compiled_mv(self, v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from jaxhess.operators.algebra import added  # its operators are LinearOperators

        return added(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-1) * other

    def __neg__(self) -> LinearOperator:
        return (-1) * self

    def __mul__(self, factor: float | jax.Array) -> LinearOperator:
        from jaxhess.operators.algebra import scaled

        return scaled(self, factor)

    __rmul__ = __mul__

    def shifted(self, shift: float | jax.Array) -> LinearOperator:
        """The operator plus `shift` times the identity."""
        from jaxhess.operators.algebra import shifted

        return shifted(self, shift)

    def to_matrix(self, batch_size: int = 16) -> jax.Array:
        """The matrix [dim, dim], in the order of `jax.flatten_util.ravel_pytree`; for small problems and tests.

        Args:
            batch_size: Columns whose products are computed at once.

        Raises:
            ValueError: The matrix would have more than 2^30 entries.
        """
        if self.dim**2 > 2**30:
            raise InputError(f"A matrix of {self.dim:,} rows is for Lanczos, not for to_matrix, which stops at 32,768.")
        return _matrix(self, batch_size)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that products are computed in."""
        return tuple(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self.shape_dtype)}))

    def exact(self, dtype: str) -> LinearOperator | None:
        """The operator that this one approximates, computed in `dtype`; None where there is no such thing."""
        return None

    def wide_bytes(self, itemsize: int) -> int:
        """Bytes per device of what `exact` copies, its floating-point arrays in a dtype of so many bytes."""
        leaves = jax.tree.leaves(self)
        return bytes_per_device([x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)], itemsize)

    def describe(self) -> dict[str, Any]:
        """What the operator is, for a record."""
        return {"kind": type(self).__name__}

    @property
    def shares_work(self) -> bool:
        """Whether several products at once (`vmap` of `mv`) cost less than one after the other."""
        return True

    def checksum(self) -> str:
        """Tells the numbers that the operator is made of from others, the same on any mesh."""
        return checksum(self)

    def validate(self) -> dict[str, Any]:
        """Facts worth recording about the operator's inputs; raises if products would be meaningless."""
        return {}

    def explain_non_finite(self, v: Vector) -> str:
        """Where a product with v that came out non-finite went wrong, for an error message."""
        return ""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MatrixOperator(LinearOperator):
    """A dense symmetric matrix [n, n]; its vectors are arrays [n]."""

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

    def exact(self, dtype: str) -> LinearOperator:
        return MatrixOperator(self.matrix.astype(dtype))


@jax.jit
def compiled_mv(operator: LinearOperator, v: Vector) -> Vector:
    """operator.mv(v) as one program; `compiled_mv.lower` gives its memory before it runs."""
    return operator.mv(v)


def unit_roundoff(operator: LinearOperator, vectors: Vector) -> float:
    """The eps of products with these vectors: of the operator's arithmetic, or of the dtype that they are returned in.

    Products come in the dtypes of the vectors they are of, in at least float32. What the storage of narrower vectors
    rounds is measured in every step (`LanczosState.step_errors`).
    """
    returned = {str(x.dtype) for x in jax.tree.leaves(jax.eval_shape(widen, vectors))}
    return max(float(jnp.finfo(dtype).eps) for dtype in returned.union(operator.dtypes))


@functools.partial(jax.jit, static_argnums=1)
def _matrix(operator: LinearOperator, batch_size: int) -> jax.Array:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), operator.shape_dtype)
    flat, unravel = jax.flatten_util.ravel_pytree(zeros)

    def column(k: jax.Array) -> jax.Array:
        return jax.flatten_util.ravel_pytree(operator.mv(unravel(flat.at[k].set(1))))[0]

    batches = -(-flat.size // batch_size)  # the last one padded: a shorter one would be compiled for itself
    numbers = jnp.minimum(jnp.arange(batches * batch_size), flat.size - 1).reshape(batches, batch_size)
    columns = jax.lax.map(jax.vmap(column), numbers)
    return columns.reshape(-1, flat.size)[: flat.size].T


def check_structure(v: Vector, expected: Vector) -> None:
    """Raises ValueError where a vector is not like the expected one; names the first leaf that differs."""
    found, wanted_structure = str(jax.tree.structure(v)), str(jax.tree.structure(expected))
    if found != wanted_structure:
        raise InputError(f"The vector has structure {found}; it must be that of the parameters, {wanted_structure}.")
    wanted, _ = jax.tree.flatten_with_path(expected)
    for (path, leaf), given in zip(wanted, jax.tree.leaves(v), strict=True):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(given), jnp.floating):
            raise InputError(f"The vector's leaf {name} has dtype {jnp.result_type(given)}; it must be floating point.")
        if jnp.shape(given) != leaf.shape:
            raise InputError(f"The vector's leaf {name} has shape {jnp.shape(given)}; it must be {leaf.shape}.")
