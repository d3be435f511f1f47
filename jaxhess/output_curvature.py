"""Curvature of softmax cross-entropy in its logits, in closed form: what Gauss-Newton and Fisher products are made of.

With p = softmax(z) and y a target, the loss -log p[y] has the gradient s = p - e_y in z and the Hessian diag(p) - p p'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.losses import logits_of, token_blocks


def logit_curvature(logits: jax.Array, tangent: jax.Array, weights: jax.Array, labels: Any = None) -> jax.Array:
    """The curvature of weighted cross-entropy in the logits, applied to a tangent: like the logits, [..., V].

    Args:
        logits: [..., V].
        tangent: [..., V], a change of the logits.
        weights: [...], of each prediction.
        labels: None for the Hessian w (diag(p) - p p'), which is the Fisher information of the softmax. Or labels
            [..., S]: the mean of w s s' over them, s = p - e_label, whose expectation over labels drawn from p it is.
    """
    p = jax.nn.softmax(logits, axis=-1)
    w = weights.astype(p.dtype)[..., None]
    mean = jnp.sum(p * tangent, axis=-1, keepdims=True)
    if labels is None:
        return w * p * (tangent - mean)

    def outer(label: jax.Array) -> jax.Array:
        is_label = jnp.arange(logits.shape[-1]) == label[..., None]
        slope = mean - jnp.sum(jnp.where(is_label, tangent, 0), axis=-1, keepdims=True)
        return (p - is_label) * slope

    labels = jnp.moveaxis(labels, -1, 0)  # one after the other: a one-hot of all would be S times the logits
    total = (
        outer(labels[0])
        if len(labels) == 1
        else jax.lax.scan(lambda t, y: (t + outer(y), None), jnp.zeros_like(p), labels)[0]
    )
    return w * total / len(labels)


def head_curvature(
    outputs: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
    weights: jax.Array,
    labels: jax.Array | None,
    token_chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """The same for logits that are hidden @ kernel, pulled back to (hidden [B, T, D], kernel [D, V]).

    Logits [tokens, V] exist for `token_chunk` tokens at a time.
    """
    (hidden, kernel), (hidden_tangent, kernel_tangent) = outputs, tangents

    def pulled(hidden: jax.Array, tangent: jax.Array, weights: jax.Array, labels: Any) -> tuple[jax.Array, jax.Array]:
        logits, push = jax.linearize(logits_of, hidden, kernel)
        curved = logit_curvature(logits, push(tangent, kernel_tangent), weights, labels)
        return jax.linear_transpose(push, hidden, kernel)(curved)

    chunks = token_blocks((hidden, hidden_tangent, weights, labels), token_chunk)
    if chunks is None:
        return pulled(hidden, hidden_tangent, weights, labels)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)

    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, jax.Array]:
        hidden_part, kernel_part = pulled(*chunk)
        return total + kernel_part.astype(wide), hidden_part

    kernel_sum, parts = jax.lax.scan(add, jnp.zeros(kernel.shape, wide), chunks)
    joined = jnp.moveaxis(parts, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return joined[:, : hidden.shape[1]], kernel_sum.astype(kernel.dtype)


def draw_labels(logits: jax.Array, keys: jax.Array, samples: int) -> jax.Array:
    """Labels [B, ..., S] (int32) drawn from softmax(logits [B, ..., V]), each row with its own of the keys [B]."""

    def sample(s: jax.Array) -> jax.Array:  # one after the other: each draws as many numbers as there are logits
        return jax.vmap(lambda x, key: jax.random.categorical(jax.random.fold_in(key, s), x))(logits, keys)

    return jnp.moveaxis(jax.lax.map(sample, jnp.arange(samples)), 0, -1).astype(jnp.int32)


def draw_tokens(hidden: jax.Array, kernel: jax.Array, keys: jax.Array, samples: int, token_chunk: int) -> jax.Array:
    """Labels [B, T, S] (int32) drawn from softmax(hidden [B, T, D] @ kernel [D, V]), `token_chunk` tokens at a time.

    Every token's key is folded from its sequence's, keys [B], and its position: chunks and meshes change no draw.
    """
    positions = jnp.arange(hidden.shape[1])
    token_keys = jax.vmap(lambda key: jax.vmap(lambda t: jax.random.fold_in(key, t))(positions))(keys)

    def draw(hidden: jax.Array, key_data: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, k: draw_labels(logits_of(x, kernel), k, samples))(
            hidden, jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(keys))
        )

    data = jax.random.key_data(token_keys)
    chunks = token_blocks((hidden, data), token_chunk)
    if chunks is None:
        return draw(hidden, data)
    drawn = jax.lax.map(lambda chunk: draw(*chunk), chunks)
    return jnp.moveaxis(drawn, 0, 1).reshape(hidden.shape[0], -1, samples)[:, : hidden.shape[1]]


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """`loss(params, batch) -> (sum, count)` of any classifier, for operators that need its logits.

    A batch is (inputs, labels) or (inputs, labels, weights), labels [B, ...] integers, weights [B, ...].

    Attributes:
        logits: `logits(params, inputs)` -> [B, ..., V]. Static: reuse the same function object.
    """

    logits: Callable[[Any, Any], jax.Array]

    def __call__(self, params: Any, batch: tuple) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(self.outputs(params, batch))
        chosen = jnp.take_along_axis(log_p, self.labels(batch), axis=-1)[..., 0]
        return -jnp.sum(self._weights(batch) * chosen), self.count(batch)

    def outputs(self, params: Any, batch: tuple) -> jax.Array:
        """Logits [..., V] in at least float32."""
        logits = self.logits(params, batch[0])
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def curvature(self, outputs: jax.Array, tangents: jax.Array, batch: tuple, labels: Any = None) -> jax.Array:
        """`logit_curvature` of a batch."""
        return logit_curvature(outputs, tangents, self._weights(batch), labels)

    def labels(self, batch: tuple) -> jax.Array:
        """The targets as [..., 1]."""
        return jnp.asarray(batch[1])[..., None]

    def draw(self, outputs: jax.Array, batch: tuple, keys: jax.Array, samples: int) -> jax.Array:
        """Labels [..., S] drawn from the model's own predictions."""
        return draw_labels(outputs, keys, samples)

    def count(self, batch: tuple) -> jax.Array:
        """Sum of the weights."""
        return jnp.sum(self._weights(batch))

    def _weights(self, batch: tuple) -> jax.Array:
        return jnp.asarray(batch[2]) if len(batch) > 2 else jnp.ones(jnp.shape(batch[1]), jnp.float32)
