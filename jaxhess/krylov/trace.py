"""Randomised estimates of an operator's trace, diagonal and Frobenius norm, each with its standard error.

Every estimator sees the operator through products with random probes, and streams over them: no more than a batch of
probes and, for the two that deflate, a sketch of some fraction of the products exists at once, stacked along a leading
axis and sharded like the operator's vectors. Vectors are kept in at least float32; what is left of them, a few numbers
per product, goes to the host in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.distributed.memory import bytes_per_device, devices_of, total_bytes
from jaxhess.krylov.errors import Estimate, across_probes, of_forms, of_squares, student_factor
from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import (
    Distribution,
    Vector,
    add_scaled,
    basis_dot,
    basis_sum,
    dot,
    named_sharding,
    norm,
    random_key,
    random_probe,
    scale,
    widen,
)

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int32]
"""Which of an estimator's probes (or of a sketch's rows) a batch holds."""

DEPENDENT = 32
"""Rounding units within which what a product has beyond the span of those before it is noise, relative to its length.

Twice is enough (Giraud, Langou, Rozloznik and van den Eshof 2005): two passes of Gram-Schmidt leave a vector orthogonal
to working precision unless it was within rounding of the span. What is dropped so carries no more of the trace than the
rounding of the products themselves.
"""


class DiagonalEstimate(NamedTuple):
    """Estimates of a matrix's diagonal.

    Attributes:
        value, standard_error: Trees like the operator's vectors.
        freedom: Degrees of freedom of every standard error; NaN for a single sample, whose errors are NaN.
    """

    value: Vector
    standard_error: Vector
    freedom: float

    def interval(self, level: float = 0.95) -> tuple[Vector, Vector]:
        """Low and high ends, trees like the value, of what holds an entry with this probability.

        Raises:
            ValueError: `level` is not between 0 and 1.
        """
        factor = student_factor(self.freedom, level)
        low, high = (
            jax.tree.map(lambda v, e, sign=sign: v + sign * factor * e, self.value, self.standard_error)
            for sign in (-1, 1)
        )
        return low, high


def hutchinson(
    operator: LinearOperator,
    samples: int,
    *,
    seed: int = 0,
    distribution: Distribution = "rademacher",
    batch_size: int = 1,
) -> Estimate:
    """The trace as the mean of v'Av over random probes v (Girard 1989; Hutchinson 1990), and its standard error.

    The variance of one sample is 2 |A|_F^2 for normal probes, and |A|_F^2 the mean of |Av|^2. For Rademacher probes it
    is 2 (|A|_F^2 - sum_i A_ii^2), twice the sum of the variances of the entries of v * Av, which the samples give (see
    `diagonal`). Both are known far better than the samples' own scatter tells; for their degrees of freedom see
    `jaxhess.krylov.errors.of_forms`. Unknown for one sample. Memory: one batch, for Rademacher probes and a vector.

    Args:
        operator: Symmetric.
        samples: Probes, and products.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        distribution: Of the probes' entries.
        batch_size: Products computed at once: with k of them the derivatives of a loss share its primal pass (2 + 6 k
            instead of 8 k matrix products), for k times the memory of probe, product and tangents.

    Raises:
        ValueError: `samples` or `batch_size` below 1, or an unknown distribution.
        FloatingPointError: The loss or a product is not finite.
    """
    _check_count("samples", samples, 1, "one probe needs one product")
    mean: Vector = None

    def of_normal(_: Numbers, probes: Vector, products: Vector) -> jax.Array:
        return _forms_and_lengths(operator, probes, products)

    def of_signs(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal mean
        mean = _zeros(operator, 1) if mean is None else mean
        mean, found = _scattered(operator, mean, probes, products, numbers, samples)
        return found

    values = of_normal if distribution == "normal" else of_signs
    forms, lengths, *deviations = _over_probes(values, operator, samples, seed, distribution, batch_size).T
    unit = float(lengths.max()) or 1.0  # squares of 1e-200 vanish, even in float64
    squares = (lengths / unit) ** 2
    variance = 2 * float(squares.mean())
    if deviations:
        variance = 2 * float(np.square(np.array(deviations) / unit).sum()) / max(samples - 1, 1)
    error, freedom = of_forms(variance, squares)
    return Estimate(float(forms.mean()), unit * error, freedom)


def frobenius_norm(
    operator: LinearOperator,
    samples: int,
    *,
    seed: int = 0,
    distribution: Distribution = "rademacher",
    batch_size: int = 1,
) -> Estimate:
    """The Frobenius norm, the square root of the mean of |Av|^2 over random probes v, and its standard error.

    E|Av|^2 = tr(A'A) = F^2; the standard error of that mean is divided by 2 F (delta method), unknown for one sample;
    the interval is one of log F (`jaxhess.krylov.errors.of_squares`). The root of an unbiased mean is low by about
    the squared standard error over 2 F. Arguments and exceptions are those of `hutchinson`.
    """
    _check_count("samples", samples, 1, "one probe needs one product")
    lengths = _over_probes(
        lambda _, probes, products: _lengths(operator, products), operator, samples, seed, distribution, batch_size
    )
    largest = float(lengths.max()) or 1.0  # squares of 1e-200 vanish, even in float64
    squares = (lengths / largest) ** 2
    error, freedom = of_squares(squares)
    value = float(np.sqrt(squares.mean()))
    error = error / (2 * value) if value > 0 else error
    return Estimate(largest * value, largest * error, freedom, positive=True)


def diagonal(operator: LinearOperator, samples: int, *, seed: int = 0, batch_size: int = 1) -> DiagonalEstimate:
    """The diagonal as the mean of v * Av over Rademacher probes v, and the standard error of every entry.

    The estimator of Bekas, Kokiopoulou and Saad (2007, equation 2), whose denominator, the mean of v * v, is one here.
    The variance of one sample of entry i is the sum of A_ij^2 over j other than i. Mean and variance are updated as
    samples come (Welford 1962; Chan, Golub and LeVeque 1983 for batches): three vectors beside a batch, in at least
    float32. Errors are NaN for one sample; arguments and exceptions are those of `hutchinson`.

    An entry's scatter is nearly normal where it sums many A_ij; where one dominates, the few samples of a sign may all
    agree, in 2^(1 - samples) of the runs, and the error then comes out as zero.
    """
    _check_count("samples", samples, 1, "one probe needs one product")
    key = random_key(seed)
    _validate(operator, batch_size)
    mean, squares = _zeros(operator, 1), _zeros(operator, 1)

    def update(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal mean, squares
        mean, squares = _updated(operator, mean, squares, probes, products, numbers, samples)
        return _forms(operator, probes, products)

    _collected(operator, _drawer(operator, key, "rademacher"), update, samples, batch_size)
    value, error = _finished(operator, mean, squares, samples)
    return DiagonalEstimate(value, error, samples - 1 if samples > 1 else math.nan)


def hutch_plus_plus(operator: LinearOperator, products: int, *, seed: int = 0, batch_size: int = 1) -> Estimate:
    """The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021, Algorithm 1), and its standard error.

    With Q an orthonormal basis of AS, S a third of the products in Rademacher probes, tr A = tr(Q'AQ) + tr((I - QQ')A):
    the first term is computed, the second is Hutchinson's estimate over the remaining probes with Q projected out.
    Given S the first has no error, so that the standard error is that of the second alone, NaN where it has one sample
    (three products). An operator of rank at most products/3 leaves no second term: the trace is exact up to rounding.
    Unbiased; worth its sketch where a few eigenvalues dominate. Memory: products/3 vectors beside a batch.

    Args:
        operator: Symmetric.
        products: With A, in all: a third each for AS, AQ and the remaining probes, which get what does not divide. From
            `operator.dim` on, that many give every diagonal entry, and the trace is their sum.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        batch_size: Products computed at once; see `hutchinson`.

    Raises:
        ValueError: `products` below 3 (where the operator has more rows), `batch_size` below 1, or a sketch that cannot
            fit the devices' memory.
        FloatingPointError: The loss or a product is not finite.
    """
    _check_count("products", products, min(3, operator.dim), "one for the sketch, one for its trace, one for the rest")
    if products >= operator.dim:
        return _exact_trace(operator, batch_size)
    sketch = products // 3
    samples = products - 2 * sketch
    key = random_key(seed)
    basis, _, _ = _sketched(operator, sketch, key, "rademacher", batch_size)
    reduced = _reduced(operator, basis, sketch, batch_size)
    draw = _drawer(operator, key, "rademacher")
    rest = _collected(
        operator,
        lambda numbers: _deflated(operator, basis, draw(sketch + numbers)),
        lambda _, probes, products: _forms(operator, probes, products),
        samples,
        batch_size,
        "deflated probe",
    )
    return Estimate(float(np.trace(reduced)) + float(rest[:, 0].mean()), *across_probes(rest[:, 0]))


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

    Args:
        operator: Symmetric; that is used, A'Q = AQ.
        products: With A, in all; an odd one is not made. From `operator.dim` on, that many give every diagonal entry,
            and the trace is their sum.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        batch_size: Products computed at once; see `hutchinson`.

    Raises:
        ValueError: `products` below 2 (where the operator has more rows), `batch_size` below 1, or a sketch that cannot
            fit the devices' memory.
        FloatingPointError: The loss or a product is not finite.
    """
    _check_count("products", products, min(2, operator.dim), "one for the sketch, and one for its trace")
    if products >= operator.dim:
        return _exact_trace(operator, batch_size)
    count = products // 2
    key = random_key(seed)
    basis, r, forms = _sketched(operator, count, key, "normal", batch_size)
    reduced = _reduced(operator, basis, count, batch_size)
    draw = _drawer(operator, key, "normal")  # again: the probes of the sketch were not kept
    w = [np.asarray(_overlaps(operator, basis, draw(k)), np.float64) for k in _batches(count, batch_size)]
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
    _validate(operator, batch_size)
    entries = _collected(
        operator,
        lambda numbers: _units(operator, numbers),
        lambda _, units, products: _forms(operator, units, products),
        operator.dim,
        batch_size,
        "unit vector",
    )
    return Estimate(float(entries[:, 0].sum()), 0.0, math.inf)


def _over_probes(
    values: Callable[[Any, Vector, Vector], jax.Array],
    operator: LinearOperator,
    samples: int,
    seed: int,
    distribution: Distribution,
    batch_size: int,
) -> Array:
    """What `values` says of the numbers of so many probes, of these and their products."""
    key = random_key(seed)
    random_probe(key, (), distribution)  # refuses an unknown distribution
    _validate(operator, batch_size)
    return _collected(
        operator,
        _drawer(operator, key, distribution),
        values,
        samples,
        batch_size,
    )


def _sketched(
    operator: LinearOperator, count: int, key: jax.Array, distribution: Distribution, batch_size: int
) -> tuple[Vector, Array, Array]:
    """Q [count, ...] and R [count, count] of the products with so many probes, and what `_forms` says of them."""
    _check_fits(operator, count)
    _validate(operator, batch_size)
    block = _zeros(operator, count)

    def fill(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal block
        block = _filled(operator, block, products, numbers)
        return _forms(operator, probes, products)

    forms = _collected(operator, _drawer(operator, key, distribution), fill, count, batch_size)
    basis, r = _orthonormalised(operator, block)
    return basis, np.asarray(r, np.float64), forms


def _reduced(operator: LinearOperator, basis: Vector, count: int, batch_size: int) -> Array:
    """Q'AQ, [count, count]."""
    return _collected(
        operator,
        lambda numbers: _rows(operator, basis, numbers),
        lambda _, rows, products: _overlaps(operator, basis, products),
        count,
        batch_size,
        "basis vector",
    )


def _collected(
    operator: LinearOperator,
    vectors: Callable[[Numbers], Vector],
    values: Callable[[Numbers, Vector, Vector], jax.Array],
    count: int,
    batch_size: int,
    kind: str = "probe",
) -> Array:
    """What is made of products with the vectors of numbers 0 to count - 1, [count, ...], a batch at a time.

    The host waits for each batch: an error is raised where it happens, and no two programs with collectives of their
    own are in flight.

    Args:
        vectors: From numbers [b] to vectors [b, ...].
        values: From numbers, vectors and products to values [b, ...].
        kind: Of the vectors, for the message.

    Raises:
        FloatingPointError: A value is not finite.
    """
    batches = []
    for numbers in _batches(count, batch_size):
        block = vectors(numbers)
        found = np.asarray(values(numbers, block, _products(operator, block)), np.float64)[: count - numbers[0]]
        bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
        if bad.size:
            where = operator.explain_non_finite(_row(block, int(bad[0])))
            message = f"The product with {kind} {numbers[bad[0]] + 1} is not finite"
            raise FloatingPointError(f"{message}: {where}." if where else f"{message}.")
        batches.append(found)
        del block  # or it would be there beside the next one
    return np.concatenate(batches)


def _batches(count: int, batch_size: int) -> list[Numbers]:
    """Numbers from 0 on, in batches of one length, which one program serves: the last may go beyond the count."""
    width = min(batch_size, count)
    return [np.arange(start, start + width, dtype=np.int32) for start in range(0, count, width)]


def _drawer(operator: LinearOperator, key: jax.Array, distribution: Distribution) -> Callable[[Numbers], Vector]:
    return lambda numbers: _drawn(operator, key, numbers, distribution)


# Programs. All take the operator, if only for the shardings of its vectors. Products are one by themselves, which is
# the same for every estimator: of a large model it is the one that takes long to compile.


@jax.jit
def _products(operator: LinearOperator, block: Vector) -> Vector:
    """A times every vector of a block [b, ...]."""
    return _pinned(operator, jax.vmap(operator.mv)(block))


@functools.partial(jax.jit, static_argnums=3)
def _drawn(operator: LinearOperator, key: jax.Array, numbers: jax.Array, distribution: Distribution) -> Vector:
    """The probes of these numbers, [b, ...]."""

    def probe(number: jax.Array) -> Vector:
        return widen(random_probe(jax.random.fold_in(key, number), operator.shape_dtype, distribution))

    return _pinned(operator, jax.vmap(probe)(numbers))


@jax.jit
def _units(operator: LinearOperator, numbers: jax.Array) -> Vector:
    """The unit vectors of coordinates counted through the leaves, [b, ...]."""
    leaves, treedef = jax.tree.flatten(_wide(operator))
    units, before = [], 0
    for leaf in leaves:
        here = jnp.arange(leaf.size) + before == numbers[:, None]
        units.append(here.astype(leaf.dtype).reshape(numbers.size, *leaf.shape))
        before += leaf.size
    return _pinned(operator, jax.tree.unflatten(treedef, units))


@jax.jit
def _rows(operator: LinearOperator, block: Vector, numbers: jax.Array) -> Vector:
    """Some vectors of a block; those beyond it are its last."""
    return _pinned(operator, _row(block, jnp.minimum(numbers, jax.tree.leaves(block)[0].shape[0] - 1)))


@functools.partial(jax.jit, donate_argnums=2)
def _deflated(operator: LinearOperator, basis: Vector, block: Vector) -> Vector:
    """Every vector of a block less its components along a basis."""
    return _pinned(operator, jax.vmap(lambda x: _projected_out(basis, x)[0])(block))


@jax.jit
def _forms(operator: LinearOperator, vectors: Vector, products: Vector) -> jax.Array:
    """[b, 2]: v'Av and v'v of every vector."""
    both = [jax.vmap(dot)(vectors, products), jax.vmap(dot)(vectors, vectors)]
    return _everywhere(operator, jnp.stack(both, axis=1))


@jax.jit
def _forms_and_lengths(operator: LinearOperator, vectors: Vector, products: Vector) -> jax.Array:
    """[b, 2]: v'Av and |Av| of every vector."""
    return _everywhere(operator, jnp.stack([jax.vmap(dot)(vectors, products), jax.vmap(norm)(products)], axis=1))


@jax.jit
def _lengths(operator: LinearOperator, products: Vector) -> jax.Array:
    """[b]: |Av| of every vector."""
    return _everywhere(operator, jax.vmap(norm)(products))


@jax.jit
def _overlaps(operator: LinearOperator, basis: Vector, block: Vector) -> jax.Array:
    """[b, m]: inner products of every vector of a block with the m of a basis."""
    return _everywhere(operator, jax.vmap(basis_dot, in_axes=(None, 0))(basis, block))


@functools.partial(jax.jit, donate_argnums=1)
def _filled(operator: LinearOperator, block: Vector, products: Vector, numbers: jax.Array) -> Vector:
    """The block with products in the rows of these numbers; those beyond it are dropped."""
    return _pinned(operator, jax.tree.map(lambda b, y: b.at[numbers].set(y, mode="drop"), block, products))


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
        y = _row(basis, j)
        length = norm(y)
        y = scale(1 / jnp.where(length > 0, length, 1), y)
        y, (first, second) = _projected_out(basis, y, jnp.arange(count) < j)
        left = norm(y)
        # As in a Lanczos step: a second pass that removed more than it left worked on rounding.
        left = jnp.where((left > DEPENDENT * rounding) & (left >= jnp.linalg.norm(second)), left, 0)
        y = jax.tree.map(lambda e: jnp.where(left > 0, e / jnp.where(left > 0, left, 1), 0), y)
        basis = jax.tree.map(lambda b, e: b.at[j].set(e), basis, y)
        return basis, r.at[:, j].set(length * (first + second).at[j].set(left))

    r = jnp.zeros((count, count), norm(_row(block, 0)).dtype)
    basis, r = jax.lax.fori_loop(0, count, step, (block, r))
    return _pinned(operator, basis), _everywhere(operator, r)


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _updated(
    operator: LinearOperator,
    mean: Vector,
    squares: Vector,
    probes: Vector,
    products: Vector,
    numbers: jax.Array,
    samples: int,
) -> tuple[Vector, Vector]:
    """Mean and sum of squared deviations of v * Av with a batch added, of which those beyond `samples` do not count."""
    counted = numbers < samples

    def leaf(m: jax.Array, s: jax.Array, v: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = v * y
        weights, done = counted.astype(x.dtype), numbers[0].astype(x.dtype)
        new = weights.sum()
        of_batch = jnp.tensordot(weights, x, 1, precision="highest")[None] / new
        spread = jnp.tensordot(weights, jnp.square(x - of_batch), 1, precision="highest")[None]
        away = of_batch - m
        return m + away * (new / (done + new)), s + spread + jnp.square(away) * (done * new / (done + new))

    pairs = jax.tree.map(leaf, mean, squares, probes, products)
    mean, squares = jax.tree.transpose(jax.tree.structure(mean), jax.tree.structure((0, 0)), pairs)
    return _pinned(operator, mean), _pinned(operator, squares)


@functools.partial(jax.jit, donate_argnums=1)
def _scattered(
    operator: LinearOperator, mean: Vector, probes: Vector, products: Vector, numbers: jax.Array, samples: int
) -> tuple[Vector, jax.Array]:
    """The mean of v * Av with a batch added, and [b, 4]: v'Av, |Av|, and what the batch adds to the squared deviations.

    The latter as two lengths, whose squares are summed over all samples (as in `_updated`): how far v * Av is from the
    batch's mean, and the share of one sample in how far that is from the mean before.
    """
    counted = numbers < samples
    done, new = numbers[0], counted.sum()
    terms = jax.tree.map(jnp.multiply, probes, products)
    of_batch = jax.tree.map(
        lambda x: jnp.tensordot(counted.astype(x.dtype), x, 1, precision="highest")[None] / new.astype(x.dtype), terms
    )
    away = jax.tree.map(jnp.subtract, of_batch, mean)
    within = jax.vmap(norm)(jax.tree.map(jnp.subtract, terms, of_batch))
    between = jax.vmap(norm)(away) * jnp.sqrt(done / (done + new))
    mean = jax.tree.map(lambda m, a: m + a * (new / (done + new)).astype(m.dtype), mean, away)
    columns = [
        jax.vmap(dot)(probes, products),
        jax.vmap(norm)(products),
        within,
        jnp.broadcast_to(between, within.shape),
    ]
    return _pinned(operator, mean), _everywhere(operator, jnp.stack(columns, axis=1))


@jax.jit
def _finished(operator: LinearOperator, mean: Vector, squares: Vector, samples: int) -> tuple[Vector, Vector]:
    """Mean and standard error, without the leading axis of one that they were kept with."""
    error = jax.tree.map(lambda s: jnp.where(samples > 1, jnp.sqrt(s / (samples - 1) / samples), jnp.nan), squares)
    return _row(_pinned(operator, mean), 0), _row(_pinned(operator, error), 0)


@functools.partial(jax.jit, static_argnums=1)
def _zeros(operator: LinearOperator, count: int) -> Vector:
    return _pinned(operator, jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), _wide(operator)))


def _projected_out(basis: Vector, x: Vector, keep: Any = True) -> tuple[Vector, list[jax.Array]]:
    """x less its components along the chosen rows of a basis, in two passes, and the components that each removed."""
    passes = []
    for _ in range(2):
        passes.append(jnp.where(keep, basis_dot(basis, x), 0))
        x = add_scaled(x, jnp.float32(-1), basis_sum(passes[-1], basis))
    return x, passes


def _row(block: Vector, number: Any) -> Vector:
    return jax.tree.map(lambda b: b[number], block)


def _pinned(operator: LinearOperator, block: Vector) -> Vector:
    """A block [b, ...] with every vector of it sharded like the operator's."""

    def leaf(x: Any, b: jax.Array) -> jax.Array:
        sharding = named_sharding(x)
        if sharding is None or sharding.mesh.size == 1:
            return b
        return jax.lax.with_sharding_constraint(b, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))

    return jax.tree.map(leaf, operator.shape_dtype, block)


def _everywhere(operator: LinearOperator, values: jax.Array) -> jax.Array:
    """Small values whole on every device, where every process can read them."""
    shardings = [s for s in map(named_sharding, jax.tree.leaves(operator.shape_dtype)) if s is not None]
    if not shardings or shardings[0].mesh.size == 1:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(shardings[0].mesh, PartitionSpec()))


def _wide(operator: LinearOperator) -> Vector:
    """The operator's `shape_dtype`, in at least float32."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=named_sharding(x))

    return jax.tree.map(leaf, operator.shape_dtype)


def _validate(operator: LinearOperator, batch_size: int) -> None:
    _check_count("batch_size", batch_size, 1, "products are computed so many at once")
    operator.validate()


def _check_count(name: str, value: int, least: int, why: str) -> None:
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value}; it must be a whole number, at least {least}: {why}.")


def _check_fits(operator: LinearOperator, count: int) -> None:
    leaves = jax.tree.leaves(_wide(operator))
    devices = devices_of(leaves)
    needed, present = count * bytes_per_device(leaves), total_bytes(devices)
    if needed > present:
        raise ValueError(
            f"The sketch keeps {count} vectors, {needed / 1e9:.1f} GB on each device, which has "
            f"{present / 1e9:.1f} GB: take fewer products, or hutchinson, which keeps none."
        )
