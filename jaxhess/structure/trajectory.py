"""Curvature along a training: at each checkpoint the leading eigenpairs, from those of the one before, and what goes
with them."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.eigenpairs import Eigenpairs, Which, leading_eigenpairs
from jaxhess.krylov.errors import Estimate
from jaxhess.krylov.estimators import hutchinson
from jaxhess.krylov.products import everywhere
from jaxhess.krylov.storage import Storage
from jaxhess.krylov.warm_start import complete, like_operator
from jaxhess.operators.base import LinearOperator, Pairs
from jaxhess.operators.facts import validated
from jaxhess.operators.hessian import Hessian
from jaxhess.operators.linearized import LinearizedHessian
from jaxhess.operators.loss import Loss, LossOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.operators.preconditioned import Preconditioned
from jaxhess.vectors import Vector, basis_dot, check_seed, norm

Array = npt.NDArray[np.float64]

SPANNED = 1e-4
"""Smallest eigenvalue of inner products, relative to the largest, that is no rounding of linearly dependent vectors."""

SAME = 0.51
"""Squared cosine from which on two vectors are on one curve: above one half, so that no vector is on two."""


@dataclasses.dataclass(frozen=True)
class TrajectoryPoint:
    """What was measured at one checkpoint.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([5.0, 3.0, 1.0])))
        >>> point, _ = jaxhess.trajectory_point(A, step=0, count=2, probes=1)
        >>> point.curves, point.overlap is None
        ((0, 1), True)

    Attributes:
        step: Of the training.
        eigenvalues, residuals, converged: Of the leading eigenpairs (`Eigenpairs`), the leading one first.
        curves: The number of the curve that each eigenvalue continues: that of the checkpoint before whose eigenvector
            has a squared cosine above one half with its own. Without one it begins a new curve.
        products: Products that the eigenpairs took, those that checked residuals included.
        seen_from: Magnitude from which on every other eigenvalue would have been seen (`Eigenpairs.seen_from`); None
            after a cold run.
        seconds: All that the checkpoint took, with compilation.
        loss: Mean loss over the data; None for an operator without one.
        gradient_norm: Length of the gradient of that loss, of a preconditioned operator that of D^-1/2 gradient; None
            where the operator is not of a loss.
        gradient_share: Share of its square in the space of the leading eigenvectors.
        overlap: Mean of the squared cosines between the spaces of leading eigenvectors here and at the checkpoint
            before; 1: the same space.
        trace: Estimated from random signs, the same at every checkpoint.
        trace_products: Products that this took.
        learning_rate: Of the step, as far as it is known.
    """

    step: int
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    curves: tuple[int, ...]
    products: int
    seen_from: float | None
    seconds: float
    loss: float | None = None
    gradient_norm: float | None = None
    gradient_share: float | None = None
    overlap: float | None = None
    trace: Estimate | None = None
    trace_products: int = 0
    learning_rate: float | None = None

    @property
    def complete(self) -> bool:
        """Whether no eigenvalue above the smallest of these can have been missed, each one with probability 95%, but
        for one within 5% of another; after a cold run nothing tells, and it counts as complete."""
        return self.seen_from is None or complete(self.seen_from, self.eigenvalues)

    @property
    def warm(self) -> bool:
        """Whether the run started from the eigenvectors of the checkpoint before."""
        return self.overlap is not None

    def __str__(self) -> str:
        """What it found and what that cost, in one line."""
        pairs = zip(self.eigenvalues, self.residuals, strict=True)
        values = ", ".join(f"{value:.5g} ± {residual:.1g}" for value, residual in pairs)
        start = "warm" if self.warm else "cold"
        cost = f"{self.products} products for eigenpairs ({start} start)"
        cost += f", {self.trace_products} for the trace" if self.trace_products else ""
        doubt = "" if self.complete else "; may be incomplete: the steps ran out"
        return f"step {self.step}: {values}; {cost}, {self.seconds:.1f} s{doubt}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrajectoryPoint:
        """The point of which `dataclasses.asdict` gave these fields, also where JSON had None for what is not finite.

        Raises:
            InputError: They are of no such point.
        """
        try:
            found = dict(fields)
            if (trace := found["trace"]) is not None:
                unknown: dict[str, Any] = dict.fromkeys(("value", "standard_error", "freedom"), math.nan)
                unknown["most"] = math.inf
                known: dict[str, Any] = {k: v for k, v in trace.items() if v is not None}
                found["trace"] = Estimate(**unknown | known)
            if found["seen_from"] is None and found["overlap"] is not None:
                found["seen_from"] = math.inf
            lists = ("eigenvalues", "residuals", "converged", "curves")
            return cls(**found | {name: tuple(found[name]) for name in lists})
        except (TypeError, LookupError, AttributeError) as error:
            raise InputError(f"This is not a point of a trajectory ({error}).") from None


def trajectory_point(
    operator: LinearOperator,
    step: int,
    before: Sequence[TrajectoryPoint] = (),
    previous: Pairs | None = None,
    *,
    count: int = 3,
    which: Which = "magnitude",
    tolerance: float = 1e-2,
    steps: int = 100,
    probes: int = 4,
    seed: int = 0,
    storage: Storage = Storage(),
    learning_rate: float | None = None,
) -> tuple[TrajectoryPoint, Eigenpairs]:
    """What is measured at a checkpoint, and the eigenpairs that the next one starts from.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> points, pairs = [], None
        >>> for step, values in enumerate([[5.0, 4.0, 1.0], [5.0, 6.0, 1.0]]):  # two eigenvalues cross
        ...     A = jaxhess.MatrixOperator(jnp.diag(jnp.array(values)))
        ...     point, pairs = jaxhess.trajectory_point(A, step, points, pairs, count=2, probes=1)
        ...     points.append(point)
        >>> [point.curves for point in points]
        [(0, 1), (1, 0)]

    Args:
        operator: Of this checkpoint, symmetric.
        step: Of the training, above those before.
        before: The points so far, in their order.
        previous: The eigenpairs of the last of them; None: a cold run.
        count: How many eigenvalues, as of `leading_eigenpairs`.
        which: As of `leading_eigenpairs`.
        tolerance: As of `leading_eigenpairs`. Eigenvalues are better than their residuals by the square, so that one
            percent is enough to follow them.
        steps: As of `leading_eigenpairs`.
        storage: As of `leading_eigenpairs`.
        probes: Random signs for the trace, a product each; 0 for no trace.
        seed: Of all random vectors.
        learning_rate: To be kept with the point.

    Raises:
        InputError: The step is not above the last one, or an argument is not as `leading_eigenpairs` and `hutchinson`
            want it.
    """
    began = time.perf_counter()
    check_seed(seed)
    if before and step <= before[-1].step:
        raise InputError(f"Step {step} does not come after step {before[-1].step}, the last one.")
    if probes < 0:
        raise InputError(f"probes is {probes}; it is a number of probes for the trace, or 0 for none.")
    own = (seed + len(before)) % 2**32
    pairs = leading_eigenpairs(
        operator, count, which=which, tolerance=tolerance, steps=steps, seed=own, storage=storage, previous=previous
    )
    curves, overlap = tuple(range(len(pairs.values))), None
    if previous is not None:
        squares, overlap = squared_cosines(operator, previous, pairs)
        known = before[-1].curves if before else tuple(range(len(squares)))
        curves = continued(squares, known, 1 + max((c for p in before for c in p.curves), default=len(squares) - 1))
    facts: dict[str, Any] = {"loss": validated(operator).get("loss")}
    if _of_loss(operator) is not None:
        length, inside, grams = _gradient_in(operator, pairs.vectors)
        root, _ = _inverse_root(grams)
        share = np.square(root @ np.asarray(inside, np.float64)).sum()
        facts |= {"gradient_norm": float(length), "gradient_share": min(float(share), 1.0)}
    trace = hutchinson(operator, probes, seed=seed) if probes else None
    point = TrajectoryPoint(
        step,
        tuple(pairs.values.tolist()),
        tuple(pairs.residuals.tolist()),
        tuple(pairs.converged.tolist()),
        curves,
        pairs.products,
        None if previous is None else pairs.seen_from,
        time.perf_counter() - began,
        overlap=overlap,
        trace=trace,
        trace_products=probes,
        learning_rate=learning_rate,
        **facts,
    )
    return point, pairs


class TrajectoryCallback:
    """Follows the curvature of a training from within its loop: every so many steps a `TrajectoryPoint`.

    Only the eigenvectors of the last point are kept, in float32: `count` times the memory of the parameters; a point
    takes as much memory as `leading_eigenpairs`. What each point costs is in it.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxhess, optax
        >>> loss = lambda w, x: jnp.mean((x @ w - 1) ** 2) + jnp.sum(w**4)
        >>> w, batch = jnp.ones(3), jnp.diag(jnp.arange(1.0, 4.0))
        >>> follow = jaxhess.TrajectoryCallback(loss, [batch], every=10, count=1)
        >>> optimizer = optax.sgd(0.02)
        >>> state = optimizer.init(w)
        >>> for step in range(21):
        ...     _ = follow(step, w, learning_rate=0.02)
        ...     updates, state = optimizer.update(jax.grad(loss)(w, batch), state)
        ...     w = optax.apply_updates(w, updates)
        >>> [point.step for point in follow.points]
        [0, 10, 20]
        >>> follow.points[-1].eigenvalues[0] < follow.points[0].eigenvalues[0]  # sharpness falls from w = 1 on
        True

    Args:
        loss: As that of `Hessian`; the same function object as long as it is used.
        batches: The data of the loss whose Hessian is followed: the same at every step.
        every: Steps between two points.
        options: Those of `trajectory_point`: `count`, `which`, `tolerance`, `steps`, `probes`, `seed`, `storage`.

    Attributes:
        points: So far.
        pairs: The eigenpairs of the last point; None before the first.
    """

    def __init__(self, loss: Loss, batches: Any, *, every: int = 100, **options: Any):
        if every < 1:
            raise InputError(f"every is {every}; it is a number of steps between two points, at least 1.")
        self.loss, self.every, self.options = loss, every, options
        self.batches = batches if isinstance(batches, Microbatches) else list(batches)
        self.points: list[TrajectoryPoint] = []
        self.pairs: Eigenpairs | None = None

    def __call__(self, step: int, params: Any, learning_rate: float | None = None) -> TrajectoryPoint | None:
        """The point of this step, where it is a multiple of `every`; otherwise nothing is done.

        The parameters are only read, and may be donated to the next step.
        """
        if step % self.every:
            return None
        operator = Hessian(self.loss, params, self.batches)
        point, self.pairs = trajectory_point(
            operator, step, self.points, self.pairs, learning_rate=learning_rate, **self.options
        )
        self.points.append(point)
        return point

    @property
    def cost(self) -> str:
        """What all points together took."""
        products = sum(point.products + point.trace_products for point in self.points)
        seconds = sum(point.seconds for point in self.points)
        return f"{len(self.points)} points: {products} Hessian products, {seconds:.1f} s"


def continued(squares: Array, curves: Sequence[int], free: int) -> tuple[int, ...]:
    """The curve of each new vector, from squared cosines [old, new] and the curves of the old ones.

    Examples:
        >>> import numpy as np
        >>> continued(np.array([[0.1, 0.8], [0.2, 0.1]]), (0, 1), free=2)
        (2, 0)

    Args:
        free: The first number that no curve has.
    """
    numbers = []
    for column in squares.T:
        best = int(np.argmax(column))
        if column[best] > SAME:
            numbers.append(curves[best])
        else:
            numbers.append(free)
            free += 1
    return tuple(numbers)


def squared_cosines(operator: LinearOperator, old: Pairs, new: Pairs) -> tuple[Array, float]:
    """[old, new] between the unit vectors of two sets of eigenpairs, and their mean between the spaces of both sets.

    Vectors of a set need not be orthogonal to each other, as without full re-orthogonalisation they are not.
    """
    before = like_operator(operator, old.vectors)
    found = [np.asarray(x, np.float64) for x in _products(operator, before, new.vectors)]
    (left, left_rank), (right, right_rank) = _inverse_root(found[1]), _inverse_root(found[2])
    overlap = np.square(left @ found[0] @ right).sum() / max(left_rank, right_rank, 1)
    return np.minimum(np.square(found[0]), 1), min(float(overlap), 1.0)


def _inverse_root(grams: Any) -> tuple[Array, int]:
    """G^-1/2 of a matrix of inner products, on the space that its vectors span, and the dimension of that space."""
    values, vectors = np.linalg.eigh(np.asarray(grams, np.float64))
    kept = values > SPANNED * values.max(initial=0.0)
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T, int(kept.sum())


@jax.jit
def _products(operator: LinearOperator, old: Vector, new: Vector) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inner products [old, new], [old, old] and [new, new]."""
    pairs = ((old, new), (old, old), (new, new))
    crossed, before, after = (jax.lax.map(functools.partial(basis_dot, other), rows) for rows, other in pairs)
    return everywhere(operator, crossed), everywhere(operator, before), everywhere(operator, after)


def _of_loss(operator: LinearOperator) -> LossOperator | None:
    """The operator of a loss that this one is made of: itself, what was linearised, or what is preconditioned."""
    if isinstance(operator, Preconditioned):
        return _of_loss(operator.operator)
    if isinstance(operator, LinearizedHessian):
        return operator.hessian
    return operator if isinstance(operator, LossOperator) else None


@jax.jit
def _gradient_in(operator: LinearOperator, vectors: Vector) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The norm of the gradient as the operator sees it, its cosines with the vectors, and their inner products."""
    loss = _of_loss(operator)
    assert loss is not None
    _, gradient = loss.value_and_gradient()
    if isinstance(operator, Preconditioned):
        gradient = operator.scaled(gradient)
    length = norm(gradient)
    inside = basis_dot(vectors, gradient) / jnp.where(length > 0, length, 1)
    grams = jax.lax.map(functools.partial(basis_dot, vectors), vectors)
    return everywhere(operator, length), everywhere(operator, inside), everywhere(operator, grams)
