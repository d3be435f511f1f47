"""Causal grouped-query attention, with rotary positions and an optional sliding window: by query chunks, or fused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxhess.models.config import DecoderConfig
from jaxhess.models.fused_attention import fused_attention, tile_table
from jaxhess.models.layers import Norm, Projection
from jaxhess.models.rotary import rotary_tables, rotate
from jaxhess.models.vocabulary import narrow_precision

ATTENTION = "attention"
"""Name of the states inside attention that a checkpoint may keep."""


class Attention(nnx.Module):
    """Self-attention of states [B, T, D]; every query sees its own and earlier positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        width = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        projection = functools.partial(Projection, dtype=config.dtype, rngs=rngs)
        self.query = projection(width, heads, bias=config.qkv_bias)
        self.key = projection(width, kv_heads, bias=config.qkv_bias)
        self.value = projection(width, kv_heads, bias=config.qkv_bias)
        self.out = projection(heads, width, bias=config.out_bias)
        self.query_norm = Norm("head_dim", config.head_dim, config, kind="rms") if config.qk_norm else None
        self.key_norm = Norm("head_dim", config.head_dim, config, kind="rms") if config.qk_norm else None
        self.config = config
        self.mesh = mesh

    def __call__(self, x: jax.Array, window: jax.Array | None) -> jax.Array:
        """Attended states [B, T, D]; `window` is this layer's look-back in tokens (int32 scalar), None for no limit."""
        # [B, T, H or K, h]
        query, key, value = (checkpoint_name(p(x), ATTENTION) for p in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.rope is not None:
            cos, sin = rotary_tables(self.config, x.shape[1], x.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = self.config.num_heads // self.config.num_kv_heads
        tiles = tile_table(self.config, self.mesh)
        if tiles is not None:
            query = query.reshape(*query.shape[:2], self.config.num_kv_heads, groups, -1)
            attended = fused_attention(query, key, value, window, self.mesh, tiles)
            return self._out(attended.reshape(*x.shape[:2], self.config.num_heads, -1))
        # Heads before positions, once: the products below are then batches of matrices as they lie.
        query, key, value = (jnp.swapaxes(y, 1, 2) for y in (query, key, value))
        query = query.reshape(query.shape[0], self.config.num_kv_heads, groups, *query.shape[2:])
        attended = causal_attention(query, key, value, window=window, chunk=self.config.query_chunk)
        attended = attended.reshape(attended.shape[0], self.config.num_heads, *attended.shape[3:])
        return self._out(jnp.swapaxes(attended, 1, 2))

    def _out(self, attended: jax.Array) -> jax.Array:
        return checkpoint_name(self.out(checkpoint_name(attended, ATTENTION)), ATTENTION)


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, window: jax.Array | None, chunk: int
) -> jax.Array:
    """Softmax attention [B, K, G, T, h] of queries [B, K, G, T, h] on keys and values [B, K, T, h].

    Scores exist for `chunk` queries at a time and are recomputed in the backward pass, so memory is linear in T.
    Softmax runs in at least float32.
    """
    length = query.shape[3]
    if length <= chunk:
        return _attend(query, key, value, jnp.arange(length), window)
    chunks = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, chunks * chunk - length), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(*query.shape[:3], chunks, chunk, query.shape[4]), 3, 0)
    positions = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    attend = jax.checkpoint(lambda q, p: _attend(q, key, value, p, window), prevent_cse=False)
    _, attended = jax.lax.scan(lambda _, block: (None, attend(*block)), None, (blocks, positions))
    return jnp.moveaxis(attended, 0, 3).reshape(padded.shape)[:, :, :, :length]


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array, window: jax.Array | None
) -> jax.Array:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, kv_heads, groups, queries, width = query.shape
    rows = query.reshape(batch, kv_heads, groups * queries, width)  # the queries of all heads that share a key head
    precision = narrow_precision(query.dtype)
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, key, precision=precision, preferred_element_type=wide) * width**-0.5
    distance = positions[:, None] - jnp.arange(key.shape[2])[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(visible, scores.reshape(batch, kv_heads, groups, queries, -1), -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype).reshape(*rows.shape[:3], -1)
    return jnp.matmul(weights, value).reshape(query.shape)
