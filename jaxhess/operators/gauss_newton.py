"""Gauss-Newton and Fisher matrices: positive semi-definite curvature through the model's outputs."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from jaxhess.errors import InputError
from jaxhess.operators.loss import LossOperator
from jaxhess.operators.microbatches import Microbatches
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector


@runtime_checkable
class LikelihoodLoss(Protocol):
    """A loss `sum_t w_t (-log p(y_t | z_t(params)))` that knows its outputs z and its curvature in them.

    `jaxhess.models.NextTokenLoss` and `jaxhess.SoftmaxCrossEntropy` are such losses.
    """

    def __call__(self, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """(sum, count)."""

    def outputs(self, params: Any, batch: Any) -> Any:
        """The outputs z, a pytree differentiable in the parameters."""

    def curvature(self, outputs: Any, tangents: Any, batch: Any, labels: Any = None) -> Any:
        """The loss's second derivative in z, or the mean of w s s' over labels, applied to a tangent of z."""

    def labels(self, batch: Any) -> jax.Array:
        """The batch's own targets, with a last axis of length 1."""

    def draw(self, outputs: Any, batch: Any, keys: jax.Array, samples: int) -> jax.Array:
        """Targets drawn from the model's predictions, with a last axis of length `samples`; a key for every row."""

    def count(self, batch: Any) -> jax.Array:
        """What the sum is divided by."""


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GaussNewton(LossOperator):
    """The generalised Gauss-Newton matrix `sum_t w_t J_t' (diag(p_t) - p_t p_t') J_t / count` (Schraudolph 2002).

    J_t is the Jacobian of prediction t's logits in the parameters, p_t its softmax. Positive semi-definite. It is the
    Fisher information matrix of the model at these inputs, and the Hessian less the part that comes from the curvature
    of the logits themselves; equal to the Hessian for logits linear in the parameters. About 5/3 of a gradient's
    matrix products.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> loss = jaxhess.SoftmaxCrossEntropy(lambda w, inputs: inputs @ w)
        >>> batch = jnp.ones((2, 1)), jnp.array([0, 0])  # inputs and labels
        >>> jaxhess.GaussNewton(loss, jnp.zeros((1, 2)), [batch]).to_matrix().round(4)  # diag(p) - pp', p = (1/2, 1/2)
        Array([[ 0.25, -0.25],
               [-0.25,  0.25]], dtype=float32)

    Raises:
        InputError: The loss is not a `LikelihoodLoss`.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.loss, LikelihoodLoss):
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise InputError(
                f"{type(self).__name__} needs a loss that knows its outputs and its curvature in them, and {name} does "
                "not: use LanguageModel.loss() or SoftmaxCrossEntropy(logits), or write a LikelihoodLoss."
            )
        super().__post_init__()

    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        return self._through_outputs(v, batch, None)

    def _through_outputs(self, v: Vector, batch: Any, labels: Any) -> tuple[Vector, jax.Array]:
        loss: Any = self.loss
        outputs, push = jax.linearize(lambda free: loss.outputs(self.whole(free), batch), self.free)
        curved = loss.curvature(outputs, push(v), batch, labels)
        (product,) = jax.linear_transpose(push, self.free)(curved)
        return product, loss.count(batch)


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EmpiricalFisher(GaussNewton):
    """The empirical Fisher matrix `sum_t w_t g_t g_t' / count`, g_t the gradient of prediction t's loss.

    The outer product is taken per prediction (for a language model, per token), at the data's own targets: it is
    neither the Fisher matrix nor close to the Hessian away from a perfect fit (Kunstner, Balles and Hennig 2019).

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> loss = jaxhess.SoftmaxCrossEntropy(lambda w, inputs: inputs @ w)
        >>> w, batch = jnp.log(jnp.array([[3.0, 1.0]])), (jnp.ones((2, 1)), jnp.array([0, 0]))
        >>> jaxhess.EmpiricalFisher(loss, w, [batch]).to_matrix().round(4)  # gg', g = p - e_0, p = (3/4, 1/4)
        Array([[ 0.0625, -0.0625],
               [-0.0625,  0.0625]], dtype=float32)
    """

    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        loss: Any = self.loss
        return self._through_outputs(v, batch, loss.labels(batch))


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MonteCarloFisher(GaussNewton):
    """The Fisher matrix with its expectation over targets replaced by targets drawn from the model.

    Like the empirical Fisher with drawn targets in place of the data's, S of them per prediction: an unbiased estimate
    of `GaussNewton`, made by `MonteCarloFisher.draw`. The targets are drawn once, so the operator is one fixed matrix.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxhess
        >>> loss = jaxhess.SoftmaxCrossEntropy(lambda w, inputs: inputs @ w)
        >>> w, batch = jnp.log(jnp.array([[3.0, 1.0]])), (jnp.ones((2, 1)), jnp.array([0, 0]))
        >>> F = jaxhess.MonteCarloFisher.draw(loss, w, [batch], key=jax.random.key(0), samples=1000)
        >>> bool(jnp.allclose(F.to_matrix(), jaxhess.GaussNewton(loss, w, [batch]).to_matrix(), atol=0.05))
        True

    Attributes:
        drawn: For every group of batches the targets, stacked.
    """

    drawn: tuple[Microbatches, ...] = ()

    @classmethod
    def draw(cls, loss: Any, params: Any, batches: Any, *, key: jax.Array, samples: int = 1, **fields: Any) -> Self:
        """The operator with `samples` targets per prediction, drawn with `key`; one forward pass over the data.

        Each row of a batch has its own key, folded from its number among the rows of equal shape: the draws do not
        depend on the mesh, nor on how these are cut into microbatches.

        Raises:
            InputError: `samples` below 1, a key of a generator whose draws depend on the mesh, or the loss is not a
                `LikelihoodLoss`.
        """
        if str(jax.random.key_impl(key)) != "threefry2x32":
            raise InputError(
                f"The key's generator is {jax.random.key_impl(key)}: use jax.random.key(seed, impl='threefry2x32')."
            )
        if samples < 1:
            raise InputError(f"samples is {samples}; at least 1 target per prediction is needed.")
        operator = cls(loss, params, batches, **fields)
        drawn = []
        for k, group in enumerate(operator.batches):
            drawn.append(Microbatches(_drawn(loss, samples, params, group.stacked, jax.random.fold_in(key, k))))
        return dataclasses.replace(operator, drawn=tuple(drawn))

    @property
    def groups(self) -> tuple:
        if len(self.drawn) != len(self.batches):
            raise InputError("No targets were drawn: make this operator with MonteCarloFisher.draw(...).")
        pairs = zip(self.batches, self.drawn, strict=True)
        return tuple(Microbatches((batches.stacked, drawn.stacked)) for batches, drawn in pairs)

    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        return self._through_outputs(v, *batch)


@jax.jit(static_argnums=(0, 1))
def _drawn(loss: Any, samples: int, params: Any, stacked: Any, key: jax.Array) -> jax.Array:
    def one(pair: tuple[Any, jax.Array]) -> jax.Array:
        batch, rows = pair
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return loss.draw(loss.outputs(params, batch), batch, keys, samples)

    count = jax.tree.leaves(stacked)[0].shape[0]
    height = jax.eval_shape(lambda: loss.labels(jax.tree.map(lambda x: x[0], stacked))).shape[0]
    rows = jnp.arange(count * height).reshape(count, height)
    with jax.default_matmul_precision("highest"), jax.threefry_partitionable(True):
        return jax.lax.map(one, (stacked, rows))
