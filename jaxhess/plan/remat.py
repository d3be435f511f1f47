"""What a backward pass computes again instead of storing it (`DecoderConfig.remat`): its price.

Stored in a layer are its input, and the results of the matrix products whose operands the backward pass needs. Of them
"attention" stores all but scores and weights of attention, "feed-forward" those in attention alone.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxhess.models import DecoderConfig
from jaxhess.plan.job import Job


def stored_states(job: Job) -> float:
    """Bytes that one microbatch stores of all layers beside their inputs, on each device; without tangents.

    Examples:
        >>> import convert, dataclasses
        >>> from jaxhess import plan
        >>> from jaxhess.plan.remat import stored_states
        >>> config = convert.read_config("scripts/tiny/config.json")
        >>> [stored_states(plan.Job(dataclasses.replace(config, remat=r), seq_len=32)) > 0 for r in (True, "attention")]
        [False, True]
    """
    config, tensor = job.config, job.axes.get("tensor", 1)
    if config.remat is True:
        return 0.0
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Queries, keys, values and what was attended are cut along `tensor`, the output of attention is not.
    entries = (2 * heads + 2 * kv_heads) / tensor + config.embed_dim
    if config.remat != "feed-forward":
        entries += (2 if config.gated_mlp else 1) * config.mlp_dim / tensor
    stored = job.tokens_per_device * entries * jnp.dtype(job.dtype).itemsize
    if config.remat is False:  # scores and weights of all queries
        scores = job.sequences_per_device * config.num_heads * job.seq_len**2 / tensor
        stored += scores * max(4, jnp.dtype(job.dtype).itemsize)
    return config.num_layers * stored


def again(config: DecoderConfig, chunks: int) -> tuple[float, float]:
    """What is computed again in a layer: the weights of its matrix products, and the share of attention.

    In entries of weights, and in units of attention's two products of a forward pass. The last product of a layer is
    not computed again, for nothing needs its result.

    Args:
        config: The model.
        chunks: Of queries; where there are several, scores are computed again for each.
    """
    wide = (2 if config.gated_mlp else 1) * config.mlp_dim * config.embed_dim
    heads = 2 * config.num_heads * config.head_dim * config.embed_dim
    inside: float = heads + 2 * config.num_kv_heads * config.head_dim * config.embed_dim
    if config.parallel_residual:
        inside -= heads / 2
    scores = 0.5 if chunks > 1 or config.remat in ("feed-forward", "attention") else 0.0
    if config.remat is True:
        return wide + inside, 1 + scores
    if config.remat is False:
        return 0, 0
    return (wide if config.remat == "feed-forward" else 0), scores
