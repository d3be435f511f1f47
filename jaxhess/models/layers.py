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
    """RMSNorm or LayerNorm over the last axes, computed in at least float32.

    Args:
        axes: Logical names and sizes of what is normalised together, and of the gain.
        kind: Other than that of the model.
        eps: Likewise.
    """

    def __init__(
        self, axes: dict[str, int], config: DecoderConfig, *, kind: str | None = None, eps: float | None = None
    ):
        self.kind = kind or config.norm
        self.eps = config.norm_eps if eps is None else eps
        self.offset = config.norm_offset and self.kind == "rms"
        names, shape = tuple(axes), tuple(axes.values())
        gain = jnp.zeros if self.offset else jnp.ones
        self.scale = nnx.Param(gain(shape, config.dtype), axes=names)
        bias = self.kind == "layer" and config.norm_bias
        self.bias = nnx.Param(jnp.zeros(shape, config.dtype), axes=names) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.scale[...]
        together = tuple(range(-gain.ndim, 0))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=together, keepdims=True)
        normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=together, keepdims=True) + self.eps)
        if self.kind == "rms" and not self.offset:  # as in the reference: the gain multiplies the rounded value
            return normalised.astype(x.dtype) * gain.astype(x.dtype)
        y = normalised * (gain.astype(wide.dtype) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(wide.dtype)
        return y.astype(x.dtype)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor that is not rounded to the dtype of x, of which the error would be in every entry alike."""
    if factor == 1:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor).astype(x.dtype)


FEED_FORWARD = "feed_forward"
"""Name of the states inside the feed-forward that a checkpoint may keep."""


class FeedForward(nnx.Module):
    """`down(act(up x))`, or `down(act(gate x) * up x)` when gated; `wide` names the axis between, and its size."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, wide: dict[str, int] | None = None):
        narrow, wide = {"embed": config.embed_dim}, wide or {"mlp": config.mlp_dim}
        projection = functools.partial(Projection, bias=config.mlp_bias, dtype=config.dtype, rngs=rngs)
        self.gate = projection(narrow, wide) if config.gated_mlp else None
        self.up = projection(narrow, wide)
        self.down = projection(wide, narrow)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        up = checkpoint_name(self.up(x), FEED_FORWARD)
        if self.gate is None:
            return self.down(ACTIVATIONS[self.activation](up))
        return self.down(gated(self.activation, checkpoint_name(self.gate(x), FEED_FORWARD), up))


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) * up.

    `clamped_silu` is that of gpt-oss: gate * sigmoid(1.702 gate) * (up + 1) with the gate clamped to at most 7, and up
    to -7 .. 7.
    """
    if activation == "clamped_silu":
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


CLAMP = 7.0

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
