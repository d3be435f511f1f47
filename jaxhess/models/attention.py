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
from jaxhess.models.layers import Norm, Projection, scaled
from jaxhess.models.rotary import rotary_tables, rotate
from jaxhess.models.vocabulary import narrow_precision, softcapped

ATTENTION = "attention"
"""Name of the states inside attention that a checkpoint may keep."""


class Attention(nnx.Module):
    """Self-attention of states [B, T, D]; every query sees its own and earlier positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        values = {"heads": config.num_heads, "value_dim" if config.latent else "head_dim": config.value_dim}
        self._add_heads(config, rngs)
        self.out = Projection(values, {"embed": config.embed_dim}, bias=config.out_bias, dtype=config.dtype, rngs=rngs)
        sinks = jnp.zeros((config.num_heads,), config.dtype)
        self.sinks = nnx.Param(sinks, axes=("heads",)) if config.attention_sinks else None
        self.config = config
        self.mesh = mesh

    def __call__(self, x: jax.Array, window: jax.Array | None, rope: jax.Array | None = None) -> jax.Array:
        """Attended states [B, T, D] of x.

        Args:
            x: [B, T, D].
            window: This layer's look-back in tokens (int32 scalar); None for no limit.
            rope: Its kind of rotary positions (int32 scalar, see `rotary_tables`); None: the main one.
        """
        query, key, value = self._heads(x, rope)
        groups = self.config.num_heads // self.config.num_kv_heads
        by_group = (self.config.num_kv_heads, groups)
        sinks = None if self.sinks is None else self.sinks[...].reshape(by_group)
        tiles = tile_table(self.config, self.mesh)
        if tiles is not None:
            if self.config.attention_scale is not None:  # the kernel has its own
                query = scaled(query, self.config.attention_scale * self.config.head_dim**0.5)
            query = query.reshape(*query.shape[:2], *by_group, -1)
            attended = fused_attention(query, key, value, window, self.mesh, tiles, sinks)
            return self._out(attended.reshape(*x.shape[:2], self.config.num_heads, -1))
        # Heads before positions, once: the products below are then batches of matrices as they lie.
        query, key, value = (jnp.swapaxes(y, 1, 2) for y in (query, key, value))
        query = query.reshape(query.shape[0], *by_group, *query.shape[2:])
        attended = causal_attention(
            query,
            key,
            value,
            window=window,
            chunk=self.config.query_chunk,
            scale=self.config.score_scale,
            softcap=self.config.attention_softcap,
            sinks=sinks,
        )
        attended = attended.reshape(attended.shape[0], self.config.num_heads, *attended.shape[3:])
        return self._out(jnp.swapaxes(attended, 1, 2))

    def _out(self, attended: jax.Array) -> jax.Array:
        return checkpoint_name(self.out(checkpoint_name(attended, ATTENTION)), ATTENTION)

    def _add_heads(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        width = {"embed": config.embed_dim}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        projection = functools.partial(Projection, width, bias=config.qkv_bias, dtype=config.dtype, rngs=rngs)
        self.query, self.key, self.value = projection(heads), projection(kv_heads), projection(kv_heads)
        one = {"head_dim": config.head_dim}
        together = (heads, kv_heads) if config.qk_norm == "projection" else (one, one)
        norms = [Norm(axes, config, kind="rms") if config.qk_norm else None for axes in together]
        self.query_norm, self.key_norm = norms

    def _heads(self, x: jax.Array, rope: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, h], keys [B, T, K, h] and values [B, T, K, h'] of x [B, T, D], with their positions."""
        query, key, value = (checkpoint_name(p(x), ATTENTION) for p in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.rope is not None:
            query, key = (_rotated(y, self.config, rope) for y in (query, key))
        return query, key, value


class LatentAttention(Attention):
    """The same with queries, keys and values from latent states: see `LatentConfig`."""

    def _add_heads(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        assert config.latent is not None
        projection = functools.partial(Projection, dtype=config.dtype, rngs=rngs)
        width, heads = {"embed": config.embed_dim}, {"heads": config.num_heads}
        rank, shared = config.latent.query_rank, {"kv_rank": config.latent.kv_rank}
        queries = width if rank is None else {"query_rank": rank}
        self.query_down = None if rank is None else projection(width, queries, bias=config.qkv_bias)
        norm = functools.partial(Norm, config=config, eps=config.latent.norm_eps)
        self.query_norm = None if rank is None else norm(queries)
        self.query = projection(queries, heads | {"head_dim": config.head_dim}, bias=False)
        self.kv_down, self.kv_norm = projection(width, shared, bias=config.qkv_bias), norm(shared)
        self.rotated_key = projection(width, {"rotated_dim": config.rotary_dims}, bias=config.qkv_bias)
        self.key = projection(shared, heads | {"still_dim": config.head_dim - config.rotary_dims}, bias=False)
        self.value = projection(shared, heads | {"value_dim": config.value_dim}, bias=False)

    def _heads(self, x: jax.Array, rope: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        still = self.config.head_dim - self.config.rotary_dims
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = self.query_norm(checkpoint_name(self.query_down(x), ATTENTION))
        query = checkpoint_name(self.query(narrow), ATTENTION)
        query = jnp.concatenate([query[..., :still], _rotated(query[..., still:], self.config, rope)], axis=-1)
        shared = self.kv_norm(checkpoint_name(self.kv_down(x), ATTENTION))
        key, value = (checkpoint_name(p(shared), ATTENTION) for p in (self.key, self.value))
        one = checkpoint_name(self.rotated_key(x), ATTENTION)[:, :, None]  # for all heads
        one = jnp.broadcast_to(_rotated(one, self.config, rope), (*key.shape[:-1], one.shape[-1]))
        return query, jnp.concatenate([key, one], axis=-1), value


def _rotated(x: jax.Array, config: DecoderConfig, rope: jax.Array | None) -> jax.Array:
    assert config.rope is not None
    cos, sin = rotary_tables(config, x.shape[1], x.dtype, rope)
    return rotate(x, cos, sin, config.rope.interleaved)


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: jax.Array | None,
    chunk: int,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention [B, K, G, T, h'] of queries [B, K, G, T, h] on keys [B, K, T, h] and values [B, K, T, h'].

    Scores exist for `chunk` queries at a time and are recomputed in the backward pass, so memory is linear in T.
    Softmax runs in at least float32. The other arguments are those of `DecoderConfig`; `sinks` are [K, G].
    """
    length = query.shape[3]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(queries: jax.Array, positions: jax.Array) -> jax.Array:
        return _attend(queries, key, value, positions, window, scale, softcap, sinks)

    if length <= chunk:
        return attend(query, jnp.arange(length))
    chunks = -(-length // chunk)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, chunks * chunk - length), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(*query.shape[:3], chunks, chunk, query.shape[4]), 3, 0)
    positions = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    again = jax.checkpoint(attend, prevent_cse=False)
    _, attended = jax.lax.scan(lambda _, block: (None, again(*block)), None, (blocks, positions))
    return jnp.moveaxis(attended, 0, 3).reshape(*padded.shape[:4], -1)[:, :, :, :length]


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    window: jax.Array | None,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
) -> jax.Array:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    batch, kv_heads, groups, queries, width = query.shape
    rows = query.reshape(batch, kv_heads, groups * queries, width)  # the queries of all heads that share a key head
    precision = narrow_precision(query.dtype)
    scores = jnp.einsum("bkqh,bksh->bkqs", rows, key, precision=precision, preferred_element_type=wide) * scale
    scores = softcapped(scores, softcap)
    distance = positions[:, None] - jnp.arange(key.shape[2])[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(visible, scores.reshape(batch, kv_heads, groups, queries, -1), -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(wide)[:, :, None, None]
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / (total if sinks is None else total + jnp.exp(sinks - peak))
    weights = weights.astype(value.dtype).reshape(*rows.shape[:3], -1)
    return jnp.matmul(weights, value).reshape(*query.shape[:4], value.shape[-1])
