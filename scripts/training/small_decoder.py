"""A small decoder for the bytes of a text, as a problem for short trainings."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxhess.data import TokenBatch
from jaxhess.errors import InputError
from jaxhess.models import DecoderConfig, initialize
from jaxhess.vectors import random_key
from scripts.training.short_runs import TrainingTask
from scripts.training.tiny import Options, decoder_config

BYTES = 256


def byte_config(width: int, layers: int, heads: int, seq_len: int) -> DecoderConfig:
    """The GPT-NeoX decoder of `scripts.training.tiny` for bytes in place of tokens.

    Raises:
        InputError: The width is not a multiple of 8 times the heads.
    """
    if width < 1 or heads < 1 or width % (8 * heads):
        raise InputError(f"A width of {width} is not a multiple of 8 times {heads} heads.")
    sizes = Options(vocab_size=BYTES, embed_dim=width, num_layers=layers, num_heads=heads, seq_len=seq_len)
    return decoder_config(sizes, BYTES)


def byte_batch(path: str | Path, seq_len: int, sequences: int) -> TokenBatch:
    """The first bytes of a file: tokens [sequences, seq_len + 1], all predicted.

    Raises:
        InputError: There is no such file, or it is too short.
    """
    try:
        found = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(found) < sequences * (seq_len + 1):
        raise InputError(f"{path} has {len(found)} bytes; {sequences} sequences of {seq_len} + 1 need more.")
    tokens = found[: sequences * (seq_len + 1)].reshape(sequences, -1).astype(np.int32)
    return TokenBatch(jnp.asarray(tokens), jnp.ones((sequences, seq_len), jnp.float32))


def decoder_problem(config: DecoderConfig, data: TokenBatch, batch: int | None) -> TrainingTask:
    """Training of such a decoder from the random weights of a seed."""
    loss = initialize(config, random_key(0)).loss()
    return TrainingTask("decoder", loss, lambda seed: initialize(config, random_key(seed)).params, data, batch)
