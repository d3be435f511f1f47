"""Operators made of operators: sums, multiples and shifts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator, check_structure
from jaxhess.vectors import Vector, add_scaled, cast, scale, widen


@jax.tree_util.register_dataclass
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

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({dtype for term in self.terms for dtype in term.dtypes}))

    def exact(self, dtype: str) -> LinearOperator | None:
        terms = [term.exact(dtype) for term in self.terms]
        return None if None in terms else SumOperator(tuple(t for t in terms if t is not None))

    def wide_bytes(self, itemsize: int) -> int:
        return sum(term.wide_bytes(itemsize) for term in self.terms)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "terms": [term.describe() for term in self.terms]}

    @property
    def shares_work(self) -> bool:
        return any(term.shares_work for term in self.terms)

    def checksum(self) -> str:
        return " ".join(term.checksum() for term in self.terms)

    def validate(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for term in reversed(self.terms):  # of facts with one name the first term's stand
            facts.update(term.validate())
        return facts

    def explain_non_finite(self, v: Vector) -> str:
        for k, term in enumerate(self.terms):
            if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(term @ v)):
                return f"term {k} of the sum ({type(term).__name__}): {term.explain_non_finite(v)}"
        return "the product of each term is finite, their sum is not"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _OperatorOfOne(LinearOperator):
    """What is the same for every operator made of one other and a number."""

    operator: LinearOperator

    @property
    def shape_dtype(self) -> Vector:
        return self.operator.shape_dtype

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.operator.dtypes

    def exact(self, dtype: str) -> LinearOperator | None:
        exact = self.operator.exact(dtype)
        return None if exact is None else dataclasses.replace(self, operator=exact)

    def wide_bytes(self, itemsize: int) -> int:
        return self.operator.wide_bytes(itemsize)

    @property
    def shares_work(self) -> bool:
        return self.operator.shares_work

    def checksum(self) -> str:
        return self.operator.checksum()

    def validate(self) -> dict[str, Any]:
        return self.operator.validate()

    def explain_non_finite(self, v: Vector) -> str:
        return self.operator.explain_non_finite(v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ScaledOperator(_OperatorOfOne):
    """`factor` times an operator; `factor * A` makes it. The factor is data: changing it compiles nothing again.

    Multiplied in at least float32, like sums and shifts.
    """

    factor: Any

    def mv(self, v: Vector) -> Vector:
        return cast(scale(self.factor, self.operator.mv(widen(v))), v)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "factor": float(self.factor), "operator": self.operator.describe()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShiftedOperator(_OperatorOfOne):
    """`A + shift I`; `A.shifted(shift)` makes it. The shift is data."""

    shift: Any

    def mv(self, v: Vector) -> Vector:
        wide = widen(v)
        return cast(add_scaled(self.operator.mv(wide), self.shift, wide), v)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "shift": float(self.shift), "operator": self.operator.describe()}


def scaled(operator: LinearOperator, factor: Any) -> ScaledOperator:
    """factor * operator.

    Raises:
        TypeError: The factor is an operator or no real number.
        ValueError: It is an array.
    """
    if isinstance(factor, LinearOperator):
        raise TypeError("Operators are not multiplied with each other: apply one after the other.")
    _check_scalar("An operator is scaled by", factor)
    return ScaledOperator(operator, factor)


def shifted(operator: LinearOperator, shift: Any) -> ShiftedOperator:
    """operator + shift I.

    Raises:
        TypeError: The shift is no real number.
        ValueError: It is an array.
    """
    _check_scalar("An operator is shifted by", shift)
    return ShiftedOperator(operator, shift)


def _check_scalar(what: str, value: Any) -> None:
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array) or np.iscomplexobj(value):
        raise TypeError(f"{what} a real number, not by {value!r}.")
    if np.shape(value) != ():
        raise InputError(f"{what} a scalar, not by an array of shape {np.shape(value)}.")


def added(a: LinearOperator, b: Any) -> SumOperator:
    """a + b.

    Raises:
        TypeError: b is not an operator.
        ValueError: Their vectors differ; the message names the first leaf that does.
    """
    if not isinstance(b, LinearOperator):
        raise TypeError(f"Operators add to operators, not to {type(b).__name__}; A.shifted(x) is A + x I.")
    check_structure(b.shape_dtype, a.shape_dtype)
    terms = [*(x.terms if isinstance(x, SumOperator) else (x,) for x in (a, b))]
    return SumOperator(tuple(term for part in terms for term in part))
