"""The bias of extreme eigenvalues of a mean over few microbatches, by splitting it into halves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.krylov.lanczos import lanczos_segment
from jaxhess.krylov.quadrature import quadrature
from jaxhess.krylov.state import start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.forms import num_microbatches
from jaxhess.operators.linearized import LinearizedHessian
from jaxhess.operators.loss import LossOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.operators.preconditioned import Preconditioned
from jaxhess.vectors import Vector, add_scaled, cast, norm, random_key, random_probe, widen

STEPS, MOST = 5, 30
"""Lanczos steps between two looks at a half's eigenvalue, and the most of them."""
TOLERANCE = 3e-3
"""Residual bound, relative to the eigenvalue, that suffices: the eigenvalue's error is about its square."""
RANDOM = 0.1
"""Length of the random vector in the start, beside the whole's eigenvector: it finds what that is orthogonal to."""


def halves(operator: LinearOperator) -> tuple[LinearOperator, LinearOperator]:
    """The operators of the first and of the other microbatches.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.krylov.split import halves
        >>> H = jaxhess.Hessian(lambda w, x: jnp.sum(x * w**2), jnp.ones(2), [jnp.ones(2), 3 * jnp.ones(2)])
        >>> first, second = halves(H)
        >>> (second @ jnp.ones(2)).tolist()
        [6.0, 6.0]

    Raises:
        InputError: There are less than two microbatches, or they cannot be told apart.
    """
    count = num_microbatches(operator)
    if count < 2:
        raise InputError("Halves need an operator that adds up two microbatches or more.")
    if isinstance(operator, Preconditioned):
        first, second = halves(operator.operator)
        return Preconditioned(first, operator.diagonal), Preconditioned(second, operator.diagonal)
    whole: Any = operator.hessian if isinstance(operator, LinearizedHessian) else operator
    names = ["batches", *(["drawn"] if hasattr(whole, "drawn") else [])]
    ends = np.cumsum([len(group) for group in whole.batches])

    def part(low: int, high: int) -> LossOperator:
        fields = {}
        for name in names:
            groups = zip(getattr(whole, name), ends, strict=True)
            cut = [_rows(group, low - end + len(group), high - end + len(group)) for group, end in groups]
            fields[name] = tuple(group for group in cut if len(group))
        return dataclasses.replace(whole, **fields)

    return part(0, count // 2), part(count // 2, count)


def _rows(group: Microbatches, low: int, high: int) -> Microbatches:
    rows = slice(max(low, 0), max(high, 0))
    return Microbatches(jax.tree.map(lambda x: x[rows], group.stacked))


def split_bias(operator: LinearOperator, value: float, vector: Vector, shares: npt.ArrayLike) -> float | None:
    """By how much an extreme eigenvalue exceeds, on average, that of infinitely many sequences; negative: falls below.

    The largest eigenvalue is a convex function of the matrix, so that of a mean over few sequences is too large on
    average. The excess is of second order, in proportion to 1/sequences: halves have twice as much, and their mean
    less the whole's value is the whole's bias. First-order errors cancel, for the halves add up to the whole. The
    eigenvalue of a half is the extreme Ritz value, on the same side, of Lanczos from the whole's eigenvector and a
    random vector of a tenth of its length; without a basis, and with up to `MOST` products of each half.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.krylov.split import split_bias
        >>> batches = [jnp.array([2.0, 1.0]), jnp.array([2.0, -1.0])]
        >>> H = jaxhess.Hessian(lambda w, x: (x @ w) ** 2 / 2, jnp.zeros(2), batches)
        >>> round(split_bias(H, 4.0, jnp.array([1.0, 0.0]), [0.5, 0.5]), 4)  # halves: 5; whole: diag(4, 1)
        1.0

    Args:
        operator: Of two microbatches or more.
        value, vector: An eigenvalue at either end of the spectrum, with its unit eigenvector.
        shares: [microbatches] of the count.

    Returns:
        None where a half's eigenvalue has not converged in so many steps.

    Raises:
        InputError: See `halves`.
    """
    share = float(np.sum(np.asarray(shares)[: len(np.asarray(shares)) // 2]))
    found = [_extreme(half, value, vector, seed) for seed, half in enumerate(halves(operator))]
    if None in found:
        return None
    return share * found[0] + (1 - share) * found[1] - value  # type: ignore[operator]


def _extreme(operator: LinearOperator, value: float, vector: Vector, seed: int) -> float | None:
    probe = random_probe(jax.random.fold_in(random_key(seed), 0x5B17), operator.shape_dtype)
    state = start_lanczos([_mixed(vector, probe)], MOST, Storage("none"))
    for end in range(STEPS, MOST + 1, STEPS):
        state = lanczos_segment(operator, state, end)
        nodes = quadrature(*state.tridiagonal())
        k = -1 if value > 0 else 0
        theta, bound = float(nodes.ritz_values[k]), float(nodes.residual_bounds[k])
        if processes.agreed(bool(state.broken[0]) or bound <= TOLERANCE * abs(theta)):
            return float(processes.agreed(theta))
    return None


@jax.jit
def _mixed(vector: Vector, probe: Vector) -> Vector:
    return cast(add_scaled(widen(vector), RANDOM / norm(probe), widen(probe)), probe)
