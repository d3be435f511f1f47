"""The small layers of the decoder: linear maps, norms, feed-forward. Shapes are named as in `decoder.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

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
        y = jnp.tensordot(x, kernel, axes=self.contracted)
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


class FeedForward(nnx.Module):
    """`down(act(up x))`, or `down(act(gate x) * up x)` when gated."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        narrow, wide = {"embed": config.embed_dim}, {"mlp": config.mlp_dim}
        options = {"bias": config.mlp_bias, "dtype": config.dtype, "rngs": rngs}
        self.gate = Projection(narrow, wide, **options) if config.gated_mlp else None
        self.up = Projection(narrow, wide, **options)
        self.down = Projection(wide, narrow, **options)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


ACTIVATIONS = {
    "silu": lambda x: x * jax.lax.logistic(x),  # jax.nn.silu is a jitted call: it would hide the product from XLA
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: jnp.maximum(x, 0),
}
