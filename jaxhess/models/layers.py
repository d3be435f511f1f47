"""The small layers of the decoder: linear maps, norms, feed-forward. Shapes are named as in `decoder.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxhess.models.config import DecoderConfig


class Projection(nnx.Module):
    """A linear map of the last axes of x: kernel [*inputs, *outputs], bias [*outputs]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        scale: float = 0.02,
    ):
        shape = (*inputs.values(), *outputs.values())
        kernel = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtype), axes=(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), dtype), axes=tuple(outputs)) if bias else None
        self.contracted = len(inputs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(self.dtype)
        outputs = kernel.shape[self.contracted :]
        # As a product of matrices. With the tokens on two axes the kernel's gradient would contract both, and XLA
        # writes out transposed copies of the activations for that.
        rows = x.reshape(-1, math.prod(kernel.shape[: self.contracted]))
        y = jnp.matmul(rows, kernel.reshape(rows.shape[1], -1))
        y = y.reshape(*x.shape[: x.ndim - self.contracted], *outputs)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, computed in at least float32."""

    def __init__(self, axis: str, size: int, config: DecoderConfig, *, kind: str | None = None):
        self.kind = kind or config.norm
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((size,), config.dtype), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((size,), config.dtype), axes=(axis,)) if self.kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.bias is None:  # as in the reference implementations: the gain multiplies the rounded value
            return normalised.astype(x.dtype) * self.scale[...].astype(x.dtype)
        y = normalised * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)
        return y.astype(x.dtype)


FEED_FORWARD = "feed_forward"
"""Name of the states inside the feed-forward that a checkpoint may keep."""


class FeedForward(nnx.Module):
    """`down(act(up x))`, or `down(act(gate x) * up x)` when gated."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        narrow, wide = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        projection = functools.partial(Projection, bias=config.mlp_bias, dtype=config.dtype, rngs=rngs)
        self.gate = projection(narrow, wide) if config.gated_mlp else None
        self.up = projection(narrow, wide)
        self.down = projection(wide, narrow)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        up = checkpoint_name(self.up(x), FEED_FORWARD)
        hidden = act(up) if self.gate is None else act(checkpoint_name(self.gate(x), FEED_FORWARD)) * up
        return self.down(hidden)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
