"""Next-token cross-entropy over slices of the vocabulary, as a sum: whoever uses it divides once, at the end."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhess.models.vocabulary import Slice, Slices, logits_of, scan_slices


class Normaliser(NamedTuple):
    """What is known of softmax(logits) after some slices of the vocabulary.

    Attributes:
        peak: [...] the largest logit so far; not differentiated, for it cancels.
        mass: [...] the sum of exp(logit - peak) so far.
    """

    peak: jax.Array
    mass: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> Normaliser:
        """Before the first slice."""
        return cls(jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))

    def add(self, logits: jax.Array) -> tuple[Normaliser, jax.Array, jax.Array]:
        """With the slice `logits` [..., v]; also exp(logits - peak), and by what earlier sums shrink."""
        peak = jnp.maximum(self.peak, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        shrink = jnp.exp(self.peak - peak)
        masses = jnp.exp(logits - peak[..., None])
        return Normaliser(peak, shrink * self.mass + jnp.sum(masses, axis=-1)), masses, shrink

    @property
    def log(self) -> jax.Array:
        """log of the sum of exp(logit), [...]."""
        return self.peak + jnp.log(self.mass)


def cross_entropy_sum(hidden: jax.Array, slices: Slices, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of -log softmax(logits)[target], a scalar in at least float32; logits = hidden @ output matrix'.

    Args:
        hidden: [B, T, D].
        slices: Of the output matrix; logits of one of them exist at once.
        targets: [B, T] int32.
        weights: [B, T].
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    widened = hidden.astype(wide)  # its cotangent is a sum over slices: in bfloat16 every one of them would be rounded

    def add(carry: tuple[Normaliser, jax.Array], part: Slice) -> tuple[tuple[Normaliser, jax.Array], None]:
        normaliser, target_logit = carry
        logits = logits_of(widened.astype(hidden.dtype), part)
        # A masked sum, not a gather: elementwise on a vocabulary cut over devices, and its transpose is no scatter.
        chosen = jnp.sum(jnp.where(part.ids == targets[..., None], logits, 0), axis=-1)
        return (normaliser.add(logits)[0], target_logit + chosen), None

    start = (Normaliser.empty(targets.shape, wide), jnp.zeros(targets.shape, wide))
    (normaliser, target_logit), _ = scan_slices(add, start, slices)
    return jnp.sum(weights.astype(wide) * (normaliser.log - target_logit))
