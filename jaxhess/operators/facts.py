"""What records, schedules and error messages need to know of an operator: functions that dispatch on its type.

The defaults suit most operators of one's own, also those made of others. One that knows better registers in the file
that defines it: `@describe.register`, `@validate.register` and so on.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess import vectors
from jaxhess.errors import InputError
from jaxhess.operators.base import (
    LinearOperator,
    LowRank,
    ScaledOperator,
    ShiftedOperator,
    SumOperator,
    components,
    parts,
)
from jaxhess.vectors import Vector


@functools.singledispatch
def describe(operator: LinearOperator) -> dict[str, Any]:
    """What the operator is, as JSON for a record: the name of its type as "kind", and facts by name.

    By default those of its fields that are numbers, text, or operators. A name that ends in `_per_device` is a fact
    that may change when a run is resumed on another mesh.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.facts import describe
        >>> A = jaxhess.MatrixOperator(jnp.eye(2))
        >>> describe(2 * A)
        {'kind': 'ScaledOperator', 'operator': {'kind': 'MatrixOperator'}, 'factor': 2}
    """
    described: dict[str, Any] = {"kind": type(operator).__name__}
    fields: Any = dataclasses.fields(operator) if dataclasses.is_dataclass(operator) else ()
    for field in fields:
        fact = _described(getattr(operator, field.name))
        if fact is not None:
            described[field.name] = fact
    return described


def _described(value: Any) -> Any:
    """A field for a record; None for what has no place there."""
    if isinstance(value, LinearOperator):
        return describe(value)
    if isinstance(value, tuple) and value and all(isinstance(x, LinearOperator) for x in value):
        return [describe(x) for x in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array) and np.shape(value) == ():
        value = value.item() if jnp.issubdtype(value.dtype, jnp.number) else None
    return value if isinstance(value, bool | int | float | str) else None


@describe.register
def _(operator: LowRank) -> dict[str, Any]:
    return {"kind": "LowRank", "rank": len(operator.values)}


MEASURED = ("routing", "shift_of_a_random_vector")
"""Facts of `validate` that are rounded otherwise on another mesh, and so do not tell one run from another."""


@functools.singledispatch
def validate(operator: LinearOperator) -> dict[str, Any]:
    """Facts about the operator's inputs, as JSON for a record; raises if products would be meaningless.

    By default those of the operators it is made of; where two have a name in common, the first one's.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.facts import validate
        >>> validate(jaxhess.Hessian(lambda w, x: jnp.sum(w * x), jnp.ones(2), [jnp.ones(2)]))
        {'loss': 2.0, 'count': 1.0}
    """
    facts: dict[str, Any] = {}
    for part in reversed(parts(operator)):
        facts.update(validate(part))
    return facts


_VALIDATED: weakref.WeakKeyDictionary[LinearOperator, dict[str, Any]] = weakref.WeakKeyDictionary()


def validated(operator: LinearOperator) -> dict[str, Any]:
    """`validate(operator)`, evaluated once for each object: the arrays of an operator do not change."""
    try:
        if operator not in _VALIDATED:
            _VALIDATED[operator] = validate(operator)
        return _VALIDATED[operator]
    except TypeError:  # an operator of the user's that has no hash
        return validate(operator)


@functools.singledispatch
def checksum(operator: LinearOperator) -> str:
    """Tells the arrays that the operator is made of from others; the same on any mesh.

    Of an operator made of others, single numbers are left to `describe`.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.facts import checksum
        >>> A = jaxhess.MatrixOperator(jnp.eye(2))
        >>> checksum(A) == checksum(2 * A) != checksum(jaxhess.MatrixOperator(2 * jnp.eye(2)))
        True
    """
    if not parts(operator):
        return vectors.checksum(operator)
    arrays = [x for x in components(operator) if not isinstance(x, LinearOperator) and np.ndim(x) > 0]
    return " ".join([*([vectors.checksum(arrays)] if arrays else []), *map(checksum, parts(operator))])


@functools.singledispatch
def shares_work(operator: LinearOperator) -> bool:
    """Whether several products at once (`vmap` of `mv`) cost less than one after the other, by default yes.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.facts import shares_work
        >>> loss, w, batches = lambda w, x: jnp.sum(w * x), jnp.ones(2), [jnp.ones(2)]
        >>> [shares_work(kind(loss, w, batches)) for kind in (jaxhess.Hessian, jaxhess.FiniteDifferenceHessian)]
        [True, False]
    """
    found = parts(operator)
    return not found or any(map(shares_work, found))


@functools.singledispatch
def explain_non_finite(operator: LinearOperator, v: Vector) -> str:
    """Where a product with v that came out non-finite went wrong, for an error message; "" where that is not known.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.operators.facts import explain_non_finite
        >>> H = jaxhess.Hessian(lambda w, x: jnp.sum(x * w**2), jnp.ones(2), [jnp.ones(2), jnp.array([1.0, jnp.inf])])
        >>> explain_non_finite(H, jnp.ones(2))
        'the product over microbatch 1 alone is not finite'
    """
    return ""


def non_finite(what: str, operator: LinearOperator, v: Vector) -> InputError:
    """The error to raise where `what`, which came of a product with v, is not finite."""
    where = explain_non_finite(operator, v)
    return InputError(f"{what} is not finite{f': {where}' if where else ''}.")


@explain_non_finite.register
def _(operator: SumOperator, v: Vector) -> str:
    for k, term in enumerate(operator.terms):
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(term @ v)):
            return f"term {k} of the sum ({type(term).__name__}): {explain_non_finite(term, v)}"
    return "the product of each term is finite, their sum is not"


@explain_non_finite.register
def _(operator: ScaledOperator | ShiftedOperator, v: Vector) -> str:
    return explain_non_finite(operator.operator, v)
