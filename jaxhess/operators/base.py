"""What a linear operator is, and the algebra of operators: sums, multiples, shifts and matrices of low rank."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, add_scaled, basis_dot, basis_sum, cast, named_sharding, scale, widen

if TYPE_CHECKING:
    from jaxhess.operators.preconditioned import Preconditioned


class Pairs(Protocol):
    """Values [k] with as many vectors: a pytree with a leading axis [k, ...]. `jaxhess.Eigenpairs` are such pairs."""

    @property
    def values(self) -> Any:
        """[k]."""

    @property
    def vectors(self) -> Vector:
        """Each leaf [k, ...]."""


class LinearOperator(abc.ABC):
    """A symmetric linear map on vectors that are pytrees.

    Operators are frozen dataclasses registered as pytrees: their arrays are arguments of a jitted program, never
    constants captured by it. Two are equal if they are the same object (`eq=False`), because comparing
    arrays gives an array. What else is known of one are functions that dispatch on its type, with defaults that suit
    most: `operators.facts` (for records and error messages) and `operators.precision`.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> (2 * A.shifted(1.0) - A).to_matrix()
        Array([[4., 1.],
               [1., 4.]], dtype=float32)
    """

    @abc.abstractmethod
    def mv(self, v: Vector) -> Vector:
        """The product with v, in the dtypes of v. Pure and traceable (`jit`, `vmap`, `fori_loop`)."""

    def wide_mv(self, v: Vector) -> Vector:
        """The product with v in at least float32, whatever v is stored in."""
        return self.mv(widen(v))

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
            InputError: v is not shaped like the operator's vectors; the message names the first leaf that differs.
        """
        check_structure(v, self.shape_dtype)
        return compiled_mv(self, v)

    def __add__(self, other: LinearOperator) -> SumOperator:
        """A + B.

        Raises:
            TypeError: The other is not an operator.
            InputError: Their vectors differ; the message names the first leaf that does.
        """
        if not isinstance(other, LinearOperator):
            raise TypeError(f"Operators add to operators, not to {type(other).__name__}; A.shifted(x) is A + x I.")
        check_structure(other.shape_dtype, self.shape_dtype)
        terms = [x.terms if isinstance(x, SumOperator) else (x,) for x in (self, other)]
        return SumOperator((*terms[0], *terms[1]))

    def __sub__(self, other: LinearOperator) -> SumOperator:
        return self + (-1) * other

    def __neg__(self) -> ScaledOperator:
        return (-1) * self

    def __mul__(self, factor: float | jax.Array) -> ScaledOperator:
        """factor * A.

        Raises:
            TypeError: The factor is an operator or no real number.
            InputError: It is an array.
        """
        if isinstance(factor, LinearOperator):
            raise TypeError("Operators are not multiplied with each other: apply one after the other.")
        _check_scalar("An operator is scaled by", factor)
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def shifted(self, shift: float | jax.Array) -> ShiftedOperator:
        """The operator plus `shift` times the identity.

        Raises:
            TypeError: The shift is no real number.
            InputError: It is an array.
        """
        _check_scalar("An operator is shifted by", shift)
        return ShiftedOperator(self, shift)

    def deflated(self, pairs: Pairs) -> SumOperator:
        """The operator less `sum_i values_i q_i q_i'`: what the leading eigenpairs leave (Hotelling's deflation).

        With orthonormal vectors, the product with q_i is as long as the residual |A q_i - values_i q_i|. With exact
        eigenpairs their eigenvalues become zero and the others stay. A product costs 4 k dim operations more than one
        of A, and the pairs are stored: k vectors.

        Examples:
            >>> import jax.numpy as jnp, jaxhess
            >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
            >>> abs(A.deflated(jaxhess.leading_eigenpairs(A, 1)).to_matrix()).round(3)  # without the 4
            Array([[1., 0., 0.],
                   [0., 2., 0.],
                   [0., 0., 0.]], dtype=float32)

        Args:
            pairs: `jaxhess.Eigenpairs` of this operator, or anything with such `values` and `vectors`.

        Raises:
            InputError: They have no values or vectors; the vectors are not like the operator's.
        """
        if not hasattr(pairs, "values") or not hasattr(pairs, "vectors"):
            raise InputError(
                f"An operator is deflated by eigenpairs, with values and vectors, not by {type(pairs).__name__}."
            )
        return self - LowRank(pairs.values, pairs.vectors)

    def preconditioned(self, diagonal: Vector) -> Preconditioned:
        """`D^-1/2 A D^-1/2`, whose eigenvalues are those of `D^-1 A`: see `Preconditioned`.

        Args:
            diagonal: The entries of D, positive, in a tree like the operator's vectors. It is laid out like these.

        Raises:
            InputError: It is not like the operator's vectors, or an entry is not positive and finite; the message names
                the first leaf.
        """
        from jaxhess.operators.preconditioned import preconditioned

        return preconditioned(self, diagonal)

    def to_matrix(self, batch_size: int = 16) -> jax.Array:
        """The matrix [dim, dim], in the order of `jax.flatten_util.ravel_pytree`; for small problems and tests.

        Args:
            batch_size: Columns whose products are computed at once.

        Raises:
            InputError: The matrix would have more than 2^30 entries.
        """
        if self.dim**2 > 2**30:
            raise InputError(f"A matrix of {self.dim:,} rows is for Lanczos, not for to_matrix, which stops at 32,768.")
        return _matrix(self, batch_size)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SumOperator(LinearOperator):
    """The sum of operators on the same vectors; `A + B` and `A - B` make it. Products are added in at least float32."""

    terms: tuple[LinearOperator, ...]

    def mv(self, v: Vector) -> Vector:
        wide = widen(v)
        total = self.terms[0].mv(wide)
        for term in self.terms[1:]:
            total = add_scaled(total, jnp.float32(1), term.mv(wide))
        return cast(total, v)

    @property
    def shape_dtype(self) -> Vector:
        return self.terms[0].shape_dtype


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledOperator(LinearOperator):
    """`factor` times an operator; `factor * A` makes it. The factor is data: changing it compiles nothing again.

    Multiplied in at least float32, like sums and shifts.
    """

    operator: LinearOperator
    factor: Any

    def mv(self, v: Vector) -> Vector:
        return cast(scale(self.factor, self.operator.mv(widen(v))), v)

    @property
    def shape_dtype(self) -> Vector:
        return self.operator.shape_dtype


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShiftedOperator(LinearOperator):
    """`A + shift I`; `A.shifted(shift)` makes it. The shift is data."""

    operator: LinearOperator
    shift: Any

    def mv(self, v: Vector) -> Vector:
        wide = widen(v)
        return cast(add_scaled(self.operator.mv(wide), self.shift, wide), v)

    @property
    def shape_dtype(self) -> Vector:
        return self.operator.shape_dtype


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(LinearOperator):
    """`sum_i values_i q_i q_i'`, of rank k; `A.deflated(pairs)` subtracts it. The vectors need not be orthonormal.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> jaxhess.LowRank(jnp.array([2.0]), jnp.array([[0.5, 1.0]])).to_matrix()
        Array([[0.5, 1. ],
               [1. , 2. ]], dtype=float32)

    Attributes:
        values: [k].
        vectors: The q_i, a pytree with a leading axis [k, ...]; those of a sharded operator lie like its vectors.

    Raises:
        InputError: There is no value, or not one for each vector; a vector's leaf is not floating point.
    """

    values: Any
    vectors: Vector

    def __post_init__(self) -> None:
        arrays = (self.values, *jax.tree.leaves(self.vectors))
        if not all(isinstance(x, np.ndarray | jax.Array) for x in arrays):  # rebuilt from its leaves by JAX
            return
        count = self.values.shape
        if len(count) != 1 or 0 in count or len(arrays) == 1:
            raise InputError(f"values has shape {count}; there must be at least one, and a vector for each.")
        for path, leaf in jax.tree.flatten_with_path(self.vectors)[0]:
            name = jax.tree_util.keystr(path)
            if leaf.shape[:1] != count:
                raise InputError(f"vectors{name} has shape {leaf.shape}; its first axis must be {count[0]}.")
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise InputError(f"vectors{name} has dtype {leaf.dtype}; it must be floating point.")

    def mv(self, v: Vector) -> Vector:
        coefficients = basis_dot(self.vectors, widen(v))
        return cast(basis_sum(self.values * coefficients, self.vectors), v)

    @property
    def shape_dtype(self) -> Vector:
        return jax.tree.map(_one_of, self.vectors)


def _one_of(stacked: jax.Array) -> jax.ShapeDtypeStruct:
    """One of the arrays that are stacked along the leading axis, with its sharding where that is known."""
    sharding = named_sharding(stacked)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    dtype = jax.dtypes.canonicalize_dtype(stacked.dtype)
    return jax.ShapeDtypeStruct(stacked.shape[1:], dtype, sharding=sharding)


def components(operator: LinearOperator) -> list[Any]:
    """The operator's leaves as a pytree, with the operators that it is made of whole."""
    return [x for x in jax.tree.leaves(operator, is_leaf=_part_of(operator)) if x is not operator]


def parts(operator: LinearOperator) -> list[LinearOperator]:
    """The operators that this one is made of, in the order of its fields."""
    return [x for x in components(operator) if isinstance(x, LinearOperator)]


def with_parts(operator: LinearOperator, replacements: Iterable[LinearOperator]) -> LinearOperator:
    """The operator made of others than its `parts`."""
    remaining = iter(replacements)
    part = _part_of(operator)
    return jax.tree.map(lambda x: next(remaining) if part(x) else x, operator, is_leaf=part)


def _part_of(operator: LinearOperator) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, LinearOperator) and x is not operator


@jax.jit
def compiled_mv(operator: LinearOperator, v: Vector) -> Vector:
    """operator.mv(v) as one program; `compiled_mv.lower` gives its memory before it runs."""
    return operator.mv(v)


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


def check_structure(v: Vector, expected: Vector, what: str = "vector") -> None:
    """Raises InputError where a vector is not like the expected one; names the first leaf that differs."""
    found, wanted_structure = str(jax.tree.structure(v)), str(jax.tree.structure(expected))
    if found != wanted_structure:
        raise InputError(f"The {what} has structure {found}; it must be that of the parameters, {wanted_structure}.")
    wanted, _ = jax.tree.flatten_with_path(expected)
    for (path, leaf), given in zip(wanted, jax.tree.leaves(v), strict=True):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(given), jnp.floating):
            raise InputError(f"The {what}'s leaf {name} has dtype {jnp.result_type(given)}; it must be floating point.")
        if jnp.shape(given) != leaf.shape:
            raise InputError(f"The {what}'s leaf {name} has shape {jnp.shape(given)}; it must be {leaf.shape}.")


def _check_scalar(what: str, value: Any) -> None:
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or np.iscomplexobj(value):
        raise TypeError(f"{what} a real number, not by {value!r}.")
    if np.shape(value) != ():
        raise InputError(f"{what} a scalar, not by an array of shape {np.shape(value)}.")
