"""Next-token cross-entropy by token chunks, as a sum: whoever uses it divides once, at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenBatch(NamedTuple):
    """Sequences to predict: position t of `tokens` predicts position t + 1.

    Attributes:
        tokens: [B, T + 1] int32.
        weights: [B, T] float32: 1 where the target `tokens[:, t + 1]` counts, 0 where it is padding.
    """

    tokens: jax.Array
    weights: jax.Array


def cross_entropy_sum(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array, token_chunk: int
) -> jax.Array:
    """Weighted sum of -log softmax(hidden @ kernel)[target], a scalar in at least float32.

    Args:
        hidden: [B, T, D].
        kernel: [D, V].
        targets: [B, T] int32.
        weights: [B, T].
        token_chunk: Tokens whose logits [tokens, V] exist at once.
    """
    chunks = token_blocks((hidden, targets, weights), token_chunk)
    if chunks is None:
        return _chunk_sum(hidden, kernel, targets, weights)
    chunk_sum = jax.checkpoint(_chunk_sum, prevent_cse=False)

    def add(total: jax.Array, chunk: tuple) -> tuple[jax.Array, None]:
        return total + chunk_sum(chunk[0], kernel, *chunk[1:]), None

    start = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    return jax.lax.scan(add, start, chunks)[0]


def token_blocks(arrays: Any, token_chunk: int) -> Any | None:
    """Arrays [B, T, ...] cut into blocks [chunks, B, positions, ...] of about `token_chunk` tokens, padded with zeros.

    At least one position of every sequence is in a block. None where one block holds everything.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    positions = min(length, max(1, token_chunk // batch))
    chunks = -(-length // positions)
    if chunks == 1:
        return None

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, chunks * positions - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, chunks, positions, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def logits_of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Logits [..., V] of states [..., D], accumulated and returned in at least float32."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    rows = hidden.reshape(-1, hidden.shape[-1])  # one axis of tokens: see `jaxhess.models.layers.Projection`
    logits = jnp.matmul(rows, kernel.astype(hidden.dtype), preferred_element_type=wide)
    return logits.reshape(*hidden.shape[:-1], kernel.shape[-1])


def _chunk_sum(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logits = logits_of(hidden, kernel)
    shift = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_normaliser = jnp.log(jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1)) + shift
    # A masked sum, not a gather: elementwise on a vocabulary cut over devices, and its transpose is no scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.sum(weights.astype(logits.dtype) * (log_normaliser - target_logit))
