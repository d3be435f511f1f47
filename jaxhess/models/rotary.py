"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways of stretching it to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.models.config import DecoderConfig, RopeConfig


def rotary_tables(
    config: DecoderConfig, length: int, dtype: jnp.dtype, kind: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each [length, rotary_dims / 2], for positions 0 .. length-1; angles in at least float32.

    `kind` is the place of a layer's kind of positions in `KINDS` (int32 scalar); None: it is `main`.
    """
    assert config.rope is not None
    main = _tables(config.rope, config.rotary_dims, length, dtype)
    if kind is None:
        return main
    local = main if config.local_rope is None else _tables(config.local_rope, config.rotary_dims, length, dtype)
    still = jnp.ones_like(main[0]), jnp.zeros_like(main[1])
    cos, sin = (jnp.stack(tables)[kind] for tables in zip(main, local, still, strict=True))
    return cos, sin


KINDS = ("main", "local", "none")
"""What `DecoderConfig.rope_layers` says of a layer."""


def _tables(rope: RopeConfig, dims: int, length: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    wide = jnp.promote_types(dtype, jnp.float32)
    rates = jnp.asarray(frequencies(rope, dims, length, wide))
    angles = jnp.arange(length, dtype=wide)[:, None] * rates[None, :]
    gain = rope.attention_factor
    return (jnp.cos(angles) * gain).astype(dtype), (jnp.sin(angles) * gain).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Heads x [B, T, H, h] with their first `2 * cos.shape[-1]` dimensions rotated.

    Dimension i is paired with i + half, or, interleaved, 2i with 2i + 1.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = rotated.reshape(*x.shape[:-1], half, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(rotated.shape)
        return jnp.concatenate([turned, rest], axis=-1)
    first, second = rotated[..., :half], rotated[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def frequencies(rope: RopeConfig, dims: int, length: int, dtype: npt.DTypeLike = np.float64) -> np.ndarray:
    """Angular frequencies [dims / 2] in radians per token for a sequence of `length` tokens, computed in `dtype`.

    A rounding unit of a frequency, times a position in the hundreds, shows in float32 logits. So float32 frequencies
    are computed in float32 throughout, by the reference implementations' own sequence of operations.

    `linear`: positions interpolated (arXiv 2306.15595). `dynamic`: NTK-aware base that grows with the sequence once it
    is longer than the trained context. `llama3`: low frequencies divided, high ones kept, a linear ramp between (the
    Llama 3.1 release). `yarn`: the ramp runs over dimensions (arXiv 2309.00071, equations 19 to 23); its attention
    factor is in `RopeConfig.attention_factor`. `longrope`: every frequency is divided by a factor of its own
    (arXiv 2402.13753).

    Raises:
        InputError: An unknown rule, or one whose `original_max_positions` is missing.
    """
    exponents = np.arange(0, dims, 2).astype(dtype) / np.asarray(dims, dtype)

    def powers(base: float) -> np.ndarray:
        return np.power(np.asarray(base, dtype), exponents)

    rates = 1 / powers(rope.theta)
    if rope.kind == "default":
        return rates
    if rope.kind == "linear":
        return rates / rope.factor
    if rope.original_max_positions is None:
        raise InputError(f"RoPE scaling {rope.kind!r} needs original_max_positions, the trained context length.")
    trained = rope.original_max_positions
    if rope.kind == "dynamic":
        stretch = rope.factor * max(length, trained) / trained - (rope.factor - 1)
        return 1 / powers(rope.theta * stretch ** (dims / (dims - 2)))
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / rates
        long, short = trained / rope.low_freq_factor, trained / rope.high_freq_factor
        keep = (trained / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - keep) * rates / rope.factor + keep * rates
        return np.where(wavelengths > long, rates / rope.factor, np.where(wavelengths < short, rates, between))
    if rope.kind == "yarn":
        low, high = (_dimension_of(turns, rope.theta, dims, trained) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        kept = 1 - np.clip((np.arange(dims // 2).astype(dtype) - low) / ((high - low) or 1e-3), 0, 1)
        return 1 / (rope.factor * powers(rope.theta)) * (1 - kept) + rates * kept
    if rope.kind == "longrope":
        factors = np.asarray(rope.long_factors if length > trained else rope.short_factors, dtype)
        if len(factors) != len(exponents):
            raise InputError(f"longrope has {len(factors)} factors for {len(exponents)} frequencies.")
        return 1 / (factors * powers(rope.theta))
    raise InputError(f"Unknown RoPE scaling {rope.kind!r}; known: default, linear, dynamic, llama3, yarn, longrope.")


def _dimension_of(turns: float, theta: float, dims: int, trained: int) -> float:
    """The (fractional) dimension pair that makes `turns` full turns over the trained context."""
    return dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
