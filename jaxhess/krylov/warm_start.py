"""Eigenpairs of an operator that has changed a little: where a Lanczos run starts, and what it cannot have missed."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.basis import stacked_sharding
from jaxhess.krylov.products import pinned
from jaxhess.operators.base import LinearOperator, Pairs
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector, add_scaled, basis_sum, cast, named_sharding, norm, random_probe, scale, widen

Array = npt.NDArray[np.float64]

RANDOM = 4.0
"""Length of the random vector in the start of a run, relative to the sum of the previous eigenvectors.

What a run costs is what it takes to see a new eigenvalue, and that takes the fewest products with a long random vector;
old eigenvectors still have far more of the start than any other one: 1 / (17 k) of its square, and not 1 / dim.
"""

MISS = 0.05
"""Chance at which an eigenvalue counts as one that a run would have seen."""

BESIDE = 0.05
"""Distance, relative to an eigenvalue that was found, within which another one may go unseen."""

REACH = 1.25
"""What a run would have seen is looked at up to so many times the largest eigenvalue that it has found."""

LEAST = 1e-3
"""And down to so many times that one."""


def like_operator(operator: LinearOperator, vectors: Vector) -> Vector:
    """Stacked vectors [k, ...] by their leaves' names as a tree like the operator's, on its devices, in float32 or
    wider.

    Raises:
        InputError: A leaf is missing, left over, or has another shape; the message names it.
    """
    named = {leaf_name(path): x for path, x in jax.tree.flatten_with_path(vectors)[0]}
    wanted, treedef = jax.tree.flatten_with_path(operator.shape_dtype)
    names = [leaf_name(path) for path, _ in wanted]
    if odd := sorted(set(named) ^ set(names)):
        where = "the operator's have none of that name" if odd[0] in named else "the operator's have one"
        raise InputError(f"The previous eigenvectors do not fit: leaf {odd[0]!r}: {where}.")
    leaves = []
    for name, (_, like) in zip(names, wanted, strict=True):
        x = named[name]
        if x.ndim == 0 or x.shape[1:] != like.shape:
            raise InputError(
                f"The previous eigenvectors do not fit: leaf {name!r} has shape {x.shape}; after its first axis it "
                f"must be {like.shape}."
            )
        sharding = named_sharding(like)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Host to shards in one step: an array of the host is never whole on one device of several.
        leaves.append(jnp.asarray(x) if sharding is None else jax.device_put(x, stacked_sharding(sharding)))
    return jax.tree.unflatten(treedef, leaves)


def starting_vector(operator: LinearOperator, previous: Pairs, key: jax.Array) -> Vector:
    """The sum of the previous eigenvectors, and a random vector of `RANDOM` times its length.

    The random one is what finds an eigenvector to which all the previous ones are orthogonal.
    """
    probe = random_probe(key, operator.shape_dtype)
    return _mixed(operator, like_operator(operator, previous.vectors), probe)


@jax.jit
def _mixed(operator: LinearOperator, vectors: Vector, probe: Vector) -> Vector:
    count = jax.tree.leaves(vectors)[0].shape[0]
    old, new = basis_sum(jnp.ones(count), vectors), widen(probe)
    length = norm(old)
    total = add_scaled(scale(RANDOM / norm(new), new), 1 / jnp.where(length > 0, length, 1), old)
    return pinned(operator, cast(total, probe))


def seen_from(
    alphas: Array, betas: Array, dim: int, found: Sequence[float] | Array, signs: Sequence[int] = (1, -1)
) -> float:
    """The magnitude from which on a run that began at a `starting_vector` would have seen every eigenvalue.

    With probability 1 - `MISS` for each, those within `BESIDE` of one that was found left out; at least the smallest
    magnitude that was found. Infinite where not even an eigenvalue of `REACH` times the largest would have been seen.

    An eigenvalue that is not among the nodes of the run's Gauss quadrature still has the mass that its eigenvector has
    in the starting vector. That mass is at most 1 / sum_j p_j(x)^2, with p_j the orthonormal polynomials of T, whatever
    else the spectrum is (the Christoffel function; Szego 1939, section 3.41, as `distribution_bounds`). The random part
    of the starting vector gives every eigenvector a component that is normal with variance v = s / dim, s the squared
    share of that part, whatever the previous vectors add. So small a mass comes by chance with probability at most
    sqrt(2 mass / (pi v)): the largest density of a normal variable times the width of the interval.

    Args:
        alphas, betas: [m] of the run.
        dim: Rows of the operator.
        found: The eigenvalues that were found, the leading one first.
        signs: Of the eigenvalues that are looked for.
    """
    values = np.asarray(found, np.float64)
    top = float(np.abs(values).max(initial=0.0))
    if top == 0 or betas[-1] == 0:  # nothing can be missed: the Krylov space is all that there is of the operator
        return 0.0
    low = min(max(float(np.abs(values).min()), LEAST * top), top)
    magnitudes = np.geomspace(low, REACH * top, 60)
    seen, variance = np.ones(magnitudes.size, bool), RANDOM**2 / (1 + RANDOM**2) / dim
    for sign in signs:
        x = sign * magnitudes
        beside = (np.abs(x[:, None] - values) <= BESIDE * np.abs(values)).any(1)
        chance = np.sqrt(2 * _largest_mass(alphas, betas, x) / (np.pi * variance))
        seen &= beside | (chance <= MISS)
    unseen = np.flatnonzero(~seen)
    return float([*magnitudes, np.inf][unseen[-1] + 1 if unseen.size else 0])


def complete(seen: float, found: Sequence[float] | Array) -> bool:
    """Whether a run that would have `seen_from` so large a magnitude can have missed none of those it was to find.

    But for an eigenvalue within `BESIDE` of one that was found, and each other one with probability `MISS`.

    Examples:
        >>> from jaxhess.krylov.warm_start import complete
        >>> complete(7.1, [9.0, -7.0]), complete(8.0, [9.0, -7.0])
        (True, False)
    """
    magnitudes = np.abs(np.asarray(found, np.float64))
    smallest, top = magnitudes.min(initial=np.inf), magnitudes.max(initial=0.0)
    return bool(seen <= max(smallest * (1 + BESIDE), LEAST * top))


def _largest_mass(alphas: Array, betas: Array, x: Array) -> Array:
    """The most that a measure with these recurrence coefficients can have at each x: 1 / sum_j p_j(x)^2, j to m."""
    unit = float(max(np.abs(alphas).max(), betas.max()))
    a, b, x = alphas / unit, betas / unit, x / unit
    before, p = np.zeros_like(x), np.ones_like(x)
    total = np.ones_like(x)
    for j in range(len(a)):
        following = ((x - a[j]) * p - (b[j - 1] if j else 0.0) * before) / b[j]
        before, p = p, following
        total = total + p**2
        huge = total > 1e200  # no mass to speak of: it stays so
        before, p, total = np.where(huge, 0, before), np.where(huge, 0, p), np.minimum(total, 1e200)
    return 1 / total
