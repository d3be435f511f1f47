"""Estimates of an operator's trace, Frobenius norm and diagonal as means over random probes, with standard errors.

Each sees the operator through products with the probes, a batch at a time (`jaxhess.krylov.products`); beside a batch
no more than a few vectors are kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.krylov.errors import Estimate, of_forms, of_squares, student_factor
from jaxhess.krylov.products import (
    Array,
    Numbers,
    check_count,
    check_operator,
    collected,
    drawer,
    everywhere,
    forms_and_lengths,
    pinned,
    quadratic_forms,
    row,
    zeros,
)
from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import Distribution, Vector, dot, norm, random_key, random_probe


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
            InputError: `level` is not between 0 and 1.
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

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> trace = jaxhess.hutchinson(A, samples=100)
        >>> abs(trace.value - 4) < 4 * trace.standard_error
        True

    Args:
        operator: Symmetric.
        samples: Probes, and products.
        seed: Of the probes. The same seed gives the same probes on any mesh.
        distribution: Of the probes' entries.
        batch_size: Products computed at once: with k of them the derivatives of a loss share its primal pass (2 + 6 k
            instead of 8 k matrix products), for k times the memory of probe, product and tangents.

    Raises:
        InputError: `samples` or `batch_size` below 1, or an unknown distribution; the loss or a product is not finite.
    """
    check_count("samples", samples, 1, "one probe needs one product")
    mean: Vector = None

    def of_normal(_: Numbers, probes: Vector, products: Vector) -> jax.Array:
        return forms_and_lengths(operator, probes, products)

    def of_signs(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal mean
        mean = zeros(operator, 1) if mean is None else mean
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

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> norm = jaxhess.frobenius_norm(A, samples=100)
        >>> abs(norm.value - 10**0.5) < 4 * norm.standard_error
        True
    """
    check_count("samples", samples, 1, "one probe needs one product")
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

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[3.0, 1.0], [1.0, 2.0]]))
        >>> found = jaxhess.diagonal(A, samples=100)
        >>> bool((abs(found.value - jnp.array([3.0, 2.0])) < 4 * found.standard_error).all())
        True
    """
    check_count("samples", samples, 1, "one probe needs one product")
    key = random_key(seed)
    check_operator(operator, batch_size)
    mean, squares = zeros(operator, 1), zeros(operator, 1)

    def update(numbers: Numbers, probes: Vector, products: Vector) -> jax.Array:
        nonlocal mean, squares
        mean, squares = _updated(operator, mean, squares, probes, products, numbers, samples)
        return quadratic_forms(operator, probes, products)

    collected(operator, drawer(operator, key, "rademacher"), update, samples, batch_size)
    value, error = _finished(operator, mean, squares, samples)
    return DiagonalEstimate(value, error, samples - 1 if samples > 1 else math.nan)


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
    check_operator(operator, batch_size)
    return collected(
        operator,
        drawer(operator, key, distribution),
        values,
        samples,
        batch_size,
    )


@jax.jit
def _lengths(operator: LinearOperator, products: Vector) -> jax.Array:
    """[b]: |Av| of every vector."""
    return everywhere(operator, jax.vmap(norm)(products))


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
    return pinned(operator, mean), pinned(operator, squares)


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
    return pinned(operator, mean), everywhere(operator, jnp.stack(columns, axis=1))


@jax.jit
def _finished(operator: LinearOperator, mean: Vector, squares: Vector, samples: int) -> tuple[Vector, Vector]:
    """Mean and standard error, without the leading axis of one that they were kept with."""
    error = jax.tree.map(lambda s: jnp.where(samples > 1, jnp.sqrt(s / (samples - 1) / samples), jnp.nan), squares)
    return row(pinned(operator, mean), 0), row(pinned(operator, error), 0)
