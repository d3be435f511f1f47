"""Estimates of an operator's trace that deflate: what a sketch of its range spans is computed, the rest is estimated.

The sketch, some fraction of the products made orthonormal, is kept on the devices beside a batch of probes
(`jaxhess.krylov.products`).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.distributed.memory import bytes_per_device, devices_of, total_bytes
from jaxhess.errors import InputError
from jaxhess.krylov.errors import Estimate, across_probes
from jaxhess.krylov.products import (
    Array,
    Numbers,
    batches,
    check_count,
    check_operator,
    collected,
    drawer,
    everywhere,
    forms_and_lengths,
    pinned,
    quadratic_forms,
    row,
    wide_shape_dtype,
    zeros,
)
from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import Distribution, Vector, add_scaled, basis_dot, basis_sum, norm, random_key, scale

DEPENDENT = 32
"""Rounding units within which what a product has beyond the span of those before it is noise, relative to its length.

Twice is enough (Giraud, Langou, Rozloznik and van den Eshof 2005): two passes of Gram-Schmidt leave a vector orthogonal
to working precision unless it was within rounding of the span. What is dropped so carries no more of the trace than the
rounding of the products themselves.
"""


def hutch_plus_plus(operator: LinearOperator, products: int, *, seed: int = 0, batch_size: int = 1) -> Estimate:
    """The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021, Algorithm 1), and its standard error.

    With Q an orthonormal basis of AS, S a third of the products in Rademacher probes, tr A = tr(Q'AQ) + tr((I - QQ')A):
    the first term is computed, the second is Hutchinson's estimate over the remaining probes with Q projected out.
    Given S the first has no error, so that the standard error is that of the second alone, NaN where it has one sample
    (three products), or where its samples agree to rounding although the deflated operator is not zero. An operator of
    rank at most products/3 leaves no second term: the trace is exact up to rounding. Unbiased; worth its sketch where a
    few eigenvalues dominate. Memory: products/3 vectors beside a batch.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> rank_one = jaxhess.MatrixOperator(jnp.ones((100, 100)))  # where the trace is exact
        >>> round(jaxhess.hutch_plus_plus(rank_one, products=12).value, 2)
        100.0

    Args:
        operator: Symmetric.
        products: With A, in all: a third each for AS, AQ and the remaining probes, which get what does not divide. From
            `operator.dim` on, that many give every diagonal entry, and the trace is their sum.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        batch_size: Products computed at once; see `hutchinson`.

    Raises:
        InputError: `products` below 3 (where the operator has more rows), `batch_size` below 1, or a sketch that cannot
            fit the devices' memory; the loss or a product is not finite.
    """
    check_count("products", products, min(3, operator.dim), "one for the sketch, one for its trace, one for the rest")
    if products >= operator.dim:
        return _exact_trace(operator, batch_size)
    sketch = products // 3
    samples = products - 2 * sketch
    key = random_key(seed)
    basis, _, _ = _sketched(operator, sketch, key, "rademacher", batch_size)
    reduced = _reduced(operator, basis, sketch, batch_size)
    draw = drawer(operator, key, "rademacher")
    rest = collected(
        operator,
        lambda numbers: _deflated(operator, basis, draw(sketch + numbers)),
        lambda _, probes, products: forms_and_lengths(operator, probes, products),
        samples,
        batch_size,
        "deflated probe",
    )
    values, lengths = rest.T
    error, freedom = across_probes(values)
    rounding = DEPENDENT * max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(basis))
    zero = lengths.max() <= rounding * np.linalg.norm(reduced) * math.sqrt(operator.dim)
    if not zero and error <= rounding * np.abs(values).max():  # Few values may agree by chance.
        error = freedom = math.nan
    return Estimate(float(np.trace(reduced)) + float(values.mean()), error, freedom)


def xtrace(operator: LinearOperator, products: int, *, seed: int = 0, batch_size: int = 1) -> Estimate:
    """The trace by XTrace with normalised probes (Epperly, Tropp and Webber 2024), and its standard error.

    Every one of m = products/2 normal probes serves twice: in the sketch, and as the sample of what the sketch of the
    m - 1 others misses, tr A = tr(PA) + E w'(I - P)A(I - P)w; the mean over the m choices is the estimate. The
    direction of (I - P)w is uniform on a sphere in n - m + 1 dimensions, so its length, which carries no information,
    is set to its root mean square. Unbiased; of the estimators here the one with the smallest error for the same
    products where the spectrum decays. Memory: m vectors beside a batch.

    The standard error, NaN for m = 1, is the paper's, std(ddof=1)/sqrt(m) over the m estimates, and beside it their
    covariance: they share their probes, and the paper's alone is 5 to 35% low (600 repetitions, m from 5 to 30, flat
    and decaying spectra of 100 and 1,000 eigenvalues; with the covariance within 7% of the truth from m = 10 on). It
    has m - 1 degrees of freedom.

    An operator of rank below m is known entirely from any m - 1 of its products: P is then the whole sketch in every
    one of the m estimates, and the trace exact up to rounding. The same is taken where the sketch is of rank below m
    only within rounding (`DEPENDENT`).

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> decaying = jaxhess.MatrixOperator(jnp.diag(0.5 ** jnp.arange(40.0)))
        >>> trace = jaxhess.xtrace(decaying, products=20)
        >>> abs(trace.value - 2) < 0.01
        True

    Args:
        operator: Symmetric; that is used, A'Q = AQ.
        products: With A, in all; an odd one is not made. From `operator.dim` on, that many give every diagonal entry,
            and the trace is their sum.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        batch_size: Products computed at once; see `hutchinson`.

    Raises:
        InputError: `products` below 2 (where the operator has more rows), `batch_size` below 1, or a sketch that cannot
            fit the devices' memory; the loss or a product is not finite.
    """
    check_count("products", products, min(2, operator.dim), "one for the sketch, and one for its trace")
    if products >= operator.dim:
        return _exact_trace(operator, batch_size)
    count = products // 2
    key = random_key(seed)
    basis, r, forms = _sketched(operator, count, key, "normal", batch_size)
    reduced = _reduced(operator, basis, count, batch_size)
    draw = drawer(operator, key, "normal")  # again: the probes of the sketch were not kept
    w = [np.asarray(_overlaps(operator, basis, draw(k)), np.float64) for k in batches(count, batch_size)]
    sketch = _Sketch(operator.dim, r, np.concatenate(w)[:count].T, reduced, forms[:, 0], forms[:, 1])
    estimates = _leave_one_out(sketch)
    error, freedom = across_probes(estimates)
    return Estimate(float(estimates.mean()), math.hypot(error, _covariance(sketch, estimates) ** 0.5), freedom)


class _Sketch(NamedTuple):
    """What XTrace knows of A after its products, on the host.

    Attributes:
        dim: Rows of A.
        r: [m, m], QR = A Omega; upper triangular, with a zero on its diagonal where a product depended on others.
        w: [m, m], Q'Omega.
        reduced: [m, m], Q'AQ.
        forms: [m], omega_i'A omega_i.
        squares: [m], |omega_i|^2.
    """

    dim: int
    r: Array
    w: Array
    reduced: Array
    forms: Array
    squares: Array

    def without(self, j: int) -> _Sketch:
        """What it would know without probe j."""
        keep = np.arange(len(self.r)) != j
        q, r = np.linalg.qr(self.r[:, keep])
        return _Sketch(self.dim, r, q.T @ self.w[:, keep], q.T @ self.reduced @ q, self.forms[keep], self.squares[keep])


def _leave_one_out(sketch: _Sketch) -> Array:
    """[m] estimates of the trace, the i-th from the sketch of all probes but the i-th, and that probe.

    Leaving out probe i takes one direction from the span of Q: Q s_i, s_i the unit vector orthogonal to every other
    column of R, which is along column i of the inverse of R'. With P_i = Q (I - s_i s_i') Q' and
    x_i = (I - s_i s_i') w_i, P_i omega_i = Q x_i.
    """
    dim, r, w, reduced, forms, squares = sketch
    m = len(r)
    rank = int(np.count_nonzero(np.diagonal(r)))
    s = np.zeros((m, m))
    if rank == m:
        s = np.linalg.solve((r / np.abs(r).max(axis=0)).T, np.eye(m))  # a column's size changes no direction
        s /= np.linalg.norm(s, axis=0)
        rank -= 1
    x = w - s * np.sum(s * w, axis=0)
    missed = forms - 2 * np.sum(r * x, axis=0) + np.sum(x * (reduced @ x), axis=0)
    kept = np.trace(reduced) - np.sum(s * (reduced @ s), axis=0)
    return kept + (dim - rank) / (squares - np.sum(x**2, axis=0)) * missed


def _covariance(sketch: _Sketch, estimates: Array) -> float:
    """An unbiased estimate of the covariance of two leave-one-out estimates, 0 where it comes out negative.

    Let t_i be the estimate from probe i and the sketch of all others, t_ij that without probe j in the sketch. Both are
    unbiased given their sketch: with all probes but i and j fixed, E[t_i | j] = E[t_ij] = tr A, so that of the four
    terms of E[(t_i - t_ij)(t_j - t_ji)], less tr A each, all but E[(t_i - tr A)(t_j - tr A)] vanish. About m^4
    operations, on the host.
    """
    m = len(estimates)
    if m == 1 or not np.diagonal(sketch.r).all():  # one estimate; or all are the trace, up to rounding
        return 0.0
    gained = np.zeros((m, m))
    for j in range(m):
        others = np.arange(m) != j
        gained[others, j] = estimates[others] - _leave_one_out(sketch.without(j))
    return max(0.0, float(np.sum(gained * gained.T)) / (m * (m - 1)))


def _exact_trace(operator: LinearOperator, batch_size: int) -> Estimate:
    """The sum of all diagonal entries, from as many products."""
    check_operator(operator, batch_size)
    entries = collected(
        operator,
        lambda numbers: _units(operator, numbers),
        lambda _, units, products: quadratic_forms(operator, units, products),
        operator.dim,
        batch_size,
        "unit vector",
    )
    return Estimate(float(entries[:, 0].sum()), 0.0, math.inf)


def _sketched(
    operator: LinearOperator, count: int, key: jax.Array, distribution: Distribution, batch_size: int
) -> tuple[Vector, Array, Array]:
    """Q [count, ...] and R [count, count] of the products with so many probes, and the probes' `quadratic_forms`."""
    _check_fits(operator, count)
    check_operator(operator, batch_size)
    block = zeros(operator, count)

    def fill(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal block
        block = _filled(operator, block, products, numbers)
        return quadratic_forms(operator, probes, products)

    forms = collected(operator, drawer(operator, key, distribution), fill, count, batch_size)
    basis, r = _orthonormalised(operator, block)
    return basis, np.asarray(r, np.float64), forms


def _reduced(operator: LinearOperator, basis: Vector, count: int, batch_size: int) -> Array:
    """Q'AQ, [count, count]."""
    return collected(
        operator,
        lambda numbers: _rows(operator, basis, numbers),
        lambda _, rows, products: _overlaps(operator, basis, products),
        count,
        batch_size,
        "basis vector",
    )


@jax.jit
def _units(operator: LinearOperator, numbers: jax.Array) -> Vector:
    """The unit vectors of coordinates counted through the leaves, [b, ...]."""
    leaves, treedef = jax.tree.flatten(wide_shape_dtype(operator))
    units, before = [], 0
    for leaf in leaves:
        here = jnp.arange(leaf.size) + before == numbers[:, None]
        units.append(here.astype(leaf.dtype).reshape(numbers.size, *leaf.shape))
        before += leaf.size
    return pinned(operator, jax.tree.unflatten(treedef, units))


@jax.jit
def _rows(operator: LinearOperator, block: Vector, numbers: jax.Array) -> Vector:
    """Some vectors of a block; those beyond it are its last."""
    return pinned(operator, row(block, jnp.minimum(numbers, jax.tree.leaves(block)[0].shape[0] - 1)))


@functools.partial(jax.jit, donate_argnums=2)
def _deflated(operator: LinearOperator, basis: Vector, block: Vector) -> Vector:
    """Every vector of a block less its components along a basis."""
    return pinned(operator, jax.vmap(lambda x: _projected_out(basis, x)[0])(block))


@jax.jit
def _overlaps(operator: LinearOperator, basis: Vector, block: Vector) -> jax.Array:
    """[b, m]: inner products of every vector of a block with the m of a basis."""
    return everywhere(operator, jax.vmap(basis_dot, in_axes=(None, 0))(basis, block))


@functools.partial(jax.jit, donate_argnums=1)
def _filled(operator: LinearOperator, block: Vector, products: Vector, numbers: jax.Array) -> Vector:
    """The block with products in the rows of these numbers; those beyond it are dropped."""
    return pinned(operator, jax.tree.map(lambda b, y: b.at[numbers].set(y, mode="drop"), block, products))


@functools.partial(jax.jit, donate_argnums=1)
def _orthonormalised(operator: LinearOperator, block: Vector) -> tuple[Vector, jax.Array]:
    """Q in place of a block, and R with QR the block; where a vector depends on those before it, Q and R_jj are zero.

    Classical Gram-Schmidt, vector by vector and twice, as in a Lanczos step: stable whatever the block's condition
    number, where a Gram matrix in float32 would lose all below a thousandth of the largest singular value.
    """
    count = jax.tree.leaves(block)[0].shape[0]
    rounding = max(float(jnp.finfo(b.dtype).eps) for b in jax.tree.leaves(block))

    def step(j: jax.Array, state: tuple[Vector, jax.Array]) -> tuple[Vector, jax.Array]:
        basis, r = state
        y = row(basis, j)
        length = norm(y)
        y = scale(1 / jnp.where(length > 0, length, 1), y)
        y, (first, second) = _projected_out(basis, y, jnp.arange(count) < j)
        left = norm(y)
        # As in a Lanczos step: a second pass that removed more than it left worked on rounding.
        left = jnp.where((left > DEPENDENT * rounding) & (left >= jnp.linalg.norm(second)), left, 0)
        y = jax.tree.map(lambda e: jnp.where(left > 0, e / jnp.where(left > 0, left, 1), 0), y)
        basis = jax.tree.map(lambda b, e: b.at[j].set(e), basis, y)
        return basis, r.at[:, j].set(length * (first + second).at[j].set(left))

    r = jnp.zeros((count, count), norm(row(block, 0)).dtype)
    basis, r = jax.lax.fori_loop(0, count, step, (block, r))
    return pinned(operator, basis), everywhere(operator, r)


def _projected_out(basis: Vector, x: Vector, keep: Any = True) -> tuple[Vector, list[jax.Array]]:
    """x less its components along the chosen rows of a basis, in two passes, and the components that each removed."""
    passes = []
    for _ in range(2):
        passes.append(jnp.where(keep, basis_dot(basis, x), 0))
        x = add_scaled(x, jnp.float32(-1), basis_sum(passes[-1], basis))
    return x, passes


def _check_fits(operator: LinearOperator, count: int) -> None:
    leaves = jax.tree.leaves(wide_shape_dtype(operator))
    devices = devices_of(leaves)
    needed, present = count * bytes_per_device(leaves), total_bytes(devices)
    if needed > present:
        raise InputError(
            f"The sketch keeps {count} vectors, {needed / 1e9:.1f} GB on each device, which has "
            f"{present / 1e9:.1f} GB: take fewer products, or hutchinson, which keeps none."
        )
