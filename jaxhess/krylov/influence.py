"""Influence of training examples on a loss, from one linear solve with the curvature of the training loss."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.krylov.lanczos import lanczos_segment
from jaxhess.krylov.quadrature import quadrature
from jaxhess.krylov.solve import Solution, conjugate_gradients
from jaxhess.krylov.state import start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator, check_structure
from jaxhess.operators.facts import validated
from jaxhess.operators.loss import LossOperator, validate_loss
from jaxhess.operators.matmul import with_matmul_precision
from jaxhess.operators.microbatches import as_groups
from jaxhess.operators.precision import product_eps
from jaxhess.vectors import Vector, cast

ERROR = 1e-3
"""Of sums over examples beside those of the batch; more where products round more coarsely."""
LOOK = 30
"""Lanczos steps, at least, that tell which damping an indefinite curvature needs."""


class Influence(NamedTuple):
    """What leaving out each training example would do to a loss, to first order, and how well that was solved.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> def loss(w, x):  # its minimum is the mean of the examples
        ...     return jnp.sum((x - w) ** 2), len(x)
        >>> H = jaxhess.Hessian(loss, jnp.array(2.0), [jnp.array([0.0, 2.0, 4.0])])
        >>> found = jaxhess.influence(H, [jnp.array([3.0])])
        >>> found.scores.round(3), found.solution.converged  # without the first, the mean moves towards 3
        (array([-1.333,  0.   ,  1.333]), True)

    Attributes:
        scores: [n] float64, the predicted change of the mean test loss, in its units, when training example i is left
            out: positive where the example helps. In the order of `training.batches`, row after row; examples of
            batches of one shape are together.
        solution: Of (A + damping I) x = g, g the gradient of the test loss: x, its residual, whether it has converged.
    """

    scores: npt.NDArray[np.float64]
    solution: Solution


def influence(
    training: LossOperator,
    test: Any,
    *,
    curvature: LinearOperator | None = None,
    damping: float = 0.0,
    tolerance: float = 1e-4,
    max_steps: int = 200,
) -> Influence:
    """How leaving out each training example would change the mean loss of a test set, to first order (Koh and Liang
    2017): `score_i = g' (A + damping I)^-1 g_i / C`.

    g is the gradient of the mean test loss, g_i that of example i's summed loss, C the count of the whole training
    set, and A its curvature. The change of the parameters is that of one Newton step for the training objective
    without example i, the others keeping their weights 1 / C; `damping` is then the coefficient of a penalty
    `damping / 2 |theta|^2` that does not depend on the number of examples. The prediction assumes that the parameters
    minimise the objective.

    One solve serves all examples. No gradient of an example is computed: x'g_i is the derivative of its loss along x,
    so that one forward-mode pass gives those of a whole microbatch, at the cost and memory of about two forward passes.
    It runs in the dtype of the loss, x rounded to that of the parameters. Where batches are named tuples with
    `weights` that the loss is proportional to, as `TokenBatch`, this pass is cut over a mesh like the loss. Of other
    batches each example is a batch of its own (`jax.vmap`), and a loss that pins its activations to a mesh would gather
    them. Before, the first batch of each shape is computed whole and example after example, to see that its loss is
    their sum: every device then computes each of these examples.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> loss = jaxhess.SoftmaxCrossEntropy(lambda w, inputs: inputs @ w)
        >>> train = (jnp.eye(2), jnp.array([0, 1]))
        >>> H = jaxhess.Hessian(loss, jnp.zeros((2, 2)), [train])
        >>> found = jaxhess.influence(H, [(jnp.eye(2)[:1], jnp.array([0]))], damping=0.1)
        >>> abs(found.scores).round(3)  # the first example has the test example's features, the second none of them
        array([0.714, 0.   ])

    Args:
        training: An operator of the training loss, its parameters and examples. Examples are the rows of its batches:
            the loss of a batch is `(sum, count)`, summed over them. Of a restricted one only the free parameters move.
        test: Batches of the test set, as of an operator.
        curvature: A, on the same parameters: `GaussNewton`, `BlockDiagonal`, `FiniteDifferenceHessian`, a sum; by
            default `training` itself.
        damping: Added to A's diagonal; not negative. A Hessian needs more than its most negative eigenvalue,
            and a Gauss-Newton matrix, which is singular where there are more parameters than outputs, some.
        tolerance: Of the solve, |g - (A + damping I) x| / |g|.
        max_steps: Products of the solve at most. If they do not suffice, a warning says so and the scores are those
            of the last x.

    Raises:
        InputError: A + damping I is not positive definite (the message says which damping would do); the loss of a
            batch is not the sum of those of its examples: a mean, a contrastive loss, batch normalisation; the arrays
            of a batch differ in their first axis; what `conjugate_gradients` and `validate` refuse.
    """
    curvature = training if curvature is None else curvature
    check_structure(curvature.shape_dtype, training.shape_dtype)
    facts = validated(training)
    weighted = _check_examples(training)
    tested = dataclasses.replace(training, batches=as_groups(test))
    validate_loss(tested)
    _, gradient = _value_and_gradient(tested)
    solution = conjugate_gradients(curvature, gradient, damping=damping, tolerance=tolerance, max_steps=max_steps)
    if solution.nonpositive_curvature:
        raise _not_positive(curvature, gradient, damping, len(solution.history))
    if not solution.converged:
        warnings.warn(
            f"The solve for influence has not converged: after {len(solution.history) - 1} steps the residual is "
            f"{solution.residual:.2g}, not {tolerance:g}. Use more max_steps, a larger damping, or a wider dtype.",
            stacklevel=2,
        )
    groups = zip(training.batches, weighted, strict=True)
    slopes = [np.asarray(_slopes(training, group, solution.solution, by_weights)) for group, by_weights in groups]
    return Influence(np.concatenate([x.ravel() for x in slopes]).astype(np.float64) / facts["count"], solution)


def _check_examples(training: LossOperator) -> list[bool]:
    """For each group of batches whether examples' losses are proportional to their weights.

    Raises:
        InputError: The loss of a batch is not a sum over examples along its first axis.
    """
    weighted = []
    for group in training.batches:
        shapes = [x.shape[1:] for x in jax.tree.leaves(group.stacked)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise InputError(
                f"The arrays of a batch have shapes {', '.join(map(str, shapes))}: its examples are along a first axis "
                "that all have in common."
            )
        (total, count), (totals, counts), by_weights = jax.tree.map(
            lambda x: np.asarray(x, np.float64), _sums(training, group)
        )
        error = max(ERROR, 4 * product_eps(training))
        if not abs(count - counts.sum()) <= error * abs(count):
            raise InputError(
                f"The count of a batch is {count:g} and its examples' counts add up to {counts.sum():g}: influence "
                "needs a loss that is a sum over examples. Return (sum, count) in place of a mean."
            )
        if not abs(total - totals.sum()) <= error * np.abs(totals).sum():
            raise InputError(
                f"The loss of a batch is {total:g} and its examples' losses, each computed alone, add up to "
                f"{totals.sum():g}: influence needs a loss that is a sum over examples, without batch statistics or "
                "comparisons between examples."
            )
        scale = np.abs(totals).sum()
        weighted.append(by_weights is not None and bool(np.abs(by_weights - totals).sum() <= error * scale))
    return weighted


def _not_positive(curvature: LinearOperator, gradient: Vector, damping: float, steps: int) -> InputError:
    """The error to raise, with the damping that the gradient's own Krylov space asks for."""
    steps = LOOK * 2 ** max(0, math.ceil(math.log2((steps + 1) / LOOK)))  # few different ones: each is compiled
    state = start_lanczos([gradient], steps, Storage("none"))
    alphas, betas, _ = lanczos_segment(curvature, state, steps).tridiagonal()
    values = quadrature(alphas, betas).ritz_values
    low, high = processes.agreed((float(values[0]), float(values[-1])))
    needed = max(-low, 1e-4 * high, 0.0)
    if needed < damping:  # Ritz values of products that are symmetric lie within the spectrum
        return InputError(
            f"The curvature plus damping {damping:g} is not positive definite by the products of the solve, yet after "
            f"{len(alphas)} Lanczos steps the Ritz values of the curvature go from {low:.3g} to {high:.3g}: its "
            "products are not symmetric to the needed accuracy. Take a wider dtype, another step of finite "
            "differences, or a larger damping."
        )
    return InputError(
        f"The curvature plus damping {damping:g} is not positive definite: after {len(alphas)} Lanczos steps the Ritz "
        f"values of the curvature go from {low:.3g} to {high:.3g}. Take a damping above {needed:.2g}, or "
        "jaxhess.GaussNewton, which has no negative eigenvalues, with some damping."
    )


@jax.jit
def _value_and_gradient(operator: LossOperator) -> tuple[jax.Array, Vector]:
    return operator.value_and_gradient()


@jax.jit
def _sums(operator: LossOperator, group: Any) -> tuple[Any, Any, jax.Array | None]:
    """(sum, count) of the group's first batch, and [B] of each of its examples as a batch of its own; and [B] the
    derivatives of the sum in factors on the examples' weights, None where the batch has no weights."""

    def compute(batch: Any) -> tuple[Any, Any, jax.Array | None]:
        def both(batch: Any) -> tuple[jax.Array, jax.Array]:
            return operator.sum_and_count(operator.free, batch)

        alone = jax.lax.map(lambda row: both(jax.tree.map(lambda x: x[None], row)), batch)
        if not _has_weights(batch):
            return both(batch), alone, None
        by_weights = jax.grad(lambda factors: both(_reweighted(batch, factors))[0])(jnp.ones(len(batch.weights)))
        return both(batch), alone, by_weights

    found = with_matmul_precision(compute, operator.matmul_precision)(jax.tree.map(lambda x: x[0], group.stacked))
    return _everywhere(operator, found)


@jax.jit(static_argnums=3)
def _slopes(operator: LossOperator, group: Any, direction: Vector, weighted: bool) -> jax.Array:
    """[batches, B] the derivative of every example's summed loss along the direction, batch after batch.

    Args:
        weighted: Whether the loss is proportional to the examples' weights: its derivative along the direction is then
            differentiated by factors on these. They enter where examples are summed, so that this adds no pass.
    """

    def slope(batch: Any, direction: Vector) -> jax.Array:
        return jax.jvp(lambda free: operator.sum_and_count(free, batch)[0], (operator.free,), (direction,))[1]

    def along(direction: Vector) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            if weighted:
                ones = jnp.ones(len(batch.weights))
                return jax.grad(lambda factors: slope(_reweighted(batch, factors), direction))(ones)
            return jax.vmap(lambda row: slope(jax.tree.map(lambda x: x[None], row), direction))(batch)

        return jax.lax.map(one, group.stacked)

    found = with_matmul_precision(along, operator.matmul_precision)(cast(direction, operator.free))
    return _everywhere(operator, found)


def _everywhere(operator: LossOperator, found: Any) -> Any:
    """Small arrays, whole on every device: each process reads them."""
    mesh = next((s.mesh for s in operator.shardings or () if s is not None), None)
    return found if mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec()))


def _has_weights(batch: Any) -> bool:
    """Whether it is a named tuple with floating-point weights of its examples."""
    weights = getattr(batch, "weights", None)
    return hasattr(batch, "_replace") and weights is not None and jnp.issubdtype(weights.dtype, jnp.floating)


def _reweighted(batch: Any, factors: jax.Array) -> Any:
    """The batch with the weights of each example times its factor."""
    factors = factors.astype(batch.weights.dtype).reshape(-1, *(1,) * (batch.weights.ndim - 1))
    return batch._replace(weights=batch.weights * factors)
