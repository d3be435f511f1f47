"""Curvature of softmax cross-entropy in its logits, in closed form: what Gauss-Newton and Fisher products are made of.

With p = softmax(z) and y a target, the loss -log p[y] has the gradient s = p - e_y in z and the Hessian diag(p) - p p'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess.models.losses import Normaliser
from jaxhess.models.vocabulary import Slice, Slices, logits_of, scan_slices


class Softmax(NamedTuple):
    """What one pass over the logits z and a change dz of them leaves.

    Attributes:
        normaliser: Of p = softmax(z).
        pushed: [...] the sum of exp(z - peak) dz.
        chosen: [S, ...] dz at the labels; S is 0 without.
    """

    normaliser: Normaliser
    pushed: jax.Array
    chosen: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], labels: int, dtype: Any) -> Softmax:
        """Before the first slice."""
        return cls(Normaliser.empty(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((labels, *shape), dtype))

    def add(self, logits: jax.Array, tangent: jax.Array, ids: jax.Array, labels: jax.Array) -> Softmax:
        """With a slice [..., v] of logits and tangent, of the tokens `ids` [v]; labels [S, ...]."""
        normaliser, masses, shrink = self.normaliser.add(logits)
        pushed = shrink * self.pushed + jnp.sum(masses * tangent, axis=-1)
        # One label after the other: a one-hot of all would be S times the logits.
        chosen = jax.lax.map(lambda y: jnp.sum(jnp.where(ids == y[..., None], tangent, 0), axis=-1), labels)
        return Softmax(normaliser, pushed, self.chosen + chosen)

    def curved(
        self, logits: jax.Array, tangent: jax.Array, ids: jax.Array, labels: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """The curvature applied to the tangent in a slice, [..., v], once all slices have been added."""
        p = jnp.exp(logits - self.normaliser.log[..., None])
        w = weights.astype(p.dtype)[..., None]
        mean = self.pushed / self.normaliser.mass
        if len(labels) == 0:
            return w * p * (tangent - mean[..., None])
        slopes = mean - self.chosen  # [S, ...]

        def subtract(total: jax.Array, label: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            y, slope = label
            return total - jnp.where(ids == y[..., None], slope[..., None], 0), None

        total, _ = jax.lax.scan(subtract, p * jnp.sum(slopes, axis=0)[..., None], (labels, slopes))
        return w * total / len(labels)


def logit_curvature(logits: jax.Array, tangent: jax.Array, weights: jax.Array, labels: Any = None) -> jax.Array:
    """The curvature of weighted cross-entropy in the logits, applied to a tangent: like the logits, [..., V].

    Args:
        logits: [..., V].
        tangent: [..., V], a change of the logits.
        weights: [...], of each prediction.
        labels: None for the Hessian w (diag(p) - p p'), which is the Fisher information of the softmax. Or labels
            [..., S]: the mean of w s s' over them, s = p - e_label, whose expectation over labels drawn from p it is.
    """
    ids, labels = jnp.arange(logits.shape[-1]), _by_label(labels, weights)
    softmax = Softmax.empty(weights.shape, len(labels), logits.dtype).add(logits, tangent, ids, labels)
    return softmax.curved(logits, tangent, ids, labels, weights)


def head_curvature(
    hidden: jax.Array, slices: Slices, hidden_tangent: jax.Array, tangents: jax.Array, weights: jax.Array, labels: Any
) -> tuple[jax.Array, jax.Array]:
    """The same for logits that are hidden @ output matrix', pulled back to both; logits of one slice exist at once.

    Args:
        hidden, hidden_tangent: [B, T, D].
        slices: Of the output matrix.
        tangents: A change of it, like `slices.kernels`.
        weights: [B, T].
        labels: As of `logit_curvature`, [B, T, S].

    Returns:
        Like `hidden`, and like `slices.kernels`.
    """
    labels = _by_label(labels, weights)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def linearized(part: Slice) -> tuple[jax.Array, Callable]:
        return jax.linearize(lambda x, kernel: logits_of(x, part._replace(kernel=kernel)), hidden, part.kernel)

    def add(softmax: Softmax, item: tuple[Slice, jax.Array]) -> tuple[Softmax, None]:
        part, tangent = item
        logits, push = linearized(part)
        return softmax.add(logits, push(hidden_tangent, tangent), part.ids, labels), None

    softmax, _ = scan_slices(add, Softmax.empty(weights.shape, len(labels), wide), slices, tangents)

    def pull(total: jax.Array, item: tuple[Slice, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part, tangent = item
        logits, push = linearized(part)
        curved = softmax.curved(logits, push(hidden_tangent, tangent), part.ids, labels, weights)
        hidden_part, kernel_part = jax.linear_transpose(push, hidden, part.kernel)(curved)
        return total + hidden_part.astype(wide), kernel_part.reshape(slices.kernels.shape[1:])

    pulled, kernels = scan_slices(pull, jnp.zeros(hidden.shape, wide), slices, tangents)
    return pulled.astype(hidden.dtype), kernels


def draw_labels(logits: jax.Array, keys: jax.Array, samples: int) -> jax.Array:
    """Labels [B, ..., S] (int32) drawn from softmax(logits [B, ..., V]), each row with its own of the keys [B]."""

    def sample(s: jax.Array) -> jax.Array:  # one after the other: each draws as many numbers as there are logits
        return jax.vmap(lambda x, key: jax.random.categorical(jax.random.fold_in(key, s), x))(logits, keys)

    return jnp.moveaxis(jax.lax.map(sample, jnp.arange(samples)), 0, -1).astype(jnp.int32)


def draw_tokens(hidden: jax.Array, slices: Slices, keys: jax.Array, samples: int) -> jax.Array:
    """Labels [B, T, S] (int32) drawn from softmax(hidden [B, T, D] @ output matrix'), slice by slice.

    The largest of logits + Gumbel noise. The noise of a token, sample and entry of the vocabulary is a hash of the key
    of its sequence, [B], with these: slices and meshes change no draw.
    """
    batch, length = hidden.shape[:2]
    numbers = jnp.arange(samples * length).reshape(samples, length)
    token_keys = jax.vmap(lambda key: jax.vmap(jax.vmap(lambda t: jax.random.fold_in(key, t)))(numbers))(keys)

    def draw(best: tuple[jax.Array, jax.Array], part: Slice) -> tuple[tuple[jax.Array, jax.Array], None]:
        logits = logits_of(hidden, part)

        def one(key: jax.Array, x: jax.Array) -> jax.Array:  # [v] of one token
            return x + _gumbel(key, part.ids)

        def sample(item: tuple) -> tuple[jax.Array, jax.Array]:
            keys, value, label = item
            noisy = jax.vmap(jax.vmap(one))(keys, logits)
            place = jnp.argmax(noisy, axis=-1)
            found = jnp.max(noisy, axis=-1)
            return jnp.maximum(value, found), jnp.where(found > value, part.ids[place], label)

        return jax.lax.map(sample, (jnp.moveaxis(token_keys, 1, 0), *best)), None

    shape = (samples, batch, length)
    start = (jnp.full(shape, -jnp.inf, jnp.promote_types(hidden.dtype, jnp.float32)), jnp.zeros(shape, jnp.int32))
    (_, labels), _ = scan_slices(draw, start, slices)
    return jnp.moveaxis(labels, 0, -1)


def _gumbel(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise [v] of the entries `ids`, each from a hash of the key with its number."""
    words = jax.random.key_data(jax.vmap(lambda k: jax.random.fold_in(key, k))(ids)).astype(jnp.float32)
    uniform = (words[:, 0] + (words[:, 1] + 0.5) * 2.0**-32) * 2.0**-32  # fine near 0, where the largest values are
    return -jnp.log(-jnp.log1p(-uniform))


def _by_label(labels: Any, weights: jax.Array) -> jax.Array:
    """Labels [..., S] (None: none) as [S, ...]."""
    return jnp.zeros((0, *weights.shape), jnp.int32) if labels is None else jnp.moveaxis(labels, -1, 0)


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """`loss(params, batch) -> (sum, count)` of any classifier, for operators that need its logits.

    A batch is (inputs, labels) or (inputs, labels, weights), labels [B, ...] integers, weights [B, ...].

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> loss = jaxhess.SoftmaxCrossEntropy(lambda w, inputs: inputs @ w)
        >>> total, count = loss(jnp.zeros((3, 4)), (jnp.ones((2, 3)), jnp.array([0, 1])))
        >>> round(float(total / count), 4)  # log 4
        1.3863

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
