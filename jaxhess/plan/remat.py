"""What a backward pass computes again instead of storing it (`DecoderConfig.remat`): its price.

Stored in a layer are its input, and the results of the matrix products whose operands the backward pass needs. Of them
"attention" stores all but scores and weights of attention, "feed-forward" those in attention alone.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxhess.models import DecoderConfig
from jaxhess.models.experts import SPARE
from jaxhess.plan.job import Job
from jaxhess.plan.layers import Layers, layers_of


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
    stored = 0.0
    for layers in layers_of(config):
        # Queries, keys, values and what was attended are cut along `tensor`, the output of attention is not.
        entries = (2 * layers.heads + layers.kept) / tensor + config.embed_dim
        if config.remat != "feed-forward":
            entries += copies(job, layers) * layers.wide / tensor
        stored += layers.count * job.tokens_per_device * entries * jnp.dtype(job.dtype).itemsize
    if config.remat is False:  # scores and weights of all queries
        scores = job.sequences_per_device * config.num_heads * job.seq_len**2 / tensor
        stored += config.num_layers * scores * max(4, jnp.dtype(job.dtype).itemsize)
    return stored


def copies(job: Job, layers: Layers) -> float:
    """Rows of experts that a device has room for, over those of its own tokens."""
    return min(SPARE, job.axes["expert"]) if layers.experts and job.axes.get("expert", 1) > 1 else 1.0


def again(config: DecoderConfig, chunks: int) -> tuple[float, float]:
    """What is computed again in all layers: the weights of their matrix products, and the share of attention.

    In entries of weights, and in units of attention's two products of a forward pass. The last product of a layer is
    not computed again, for nothing needs its result; that of experts is, for it is weighted by the router.

    Args:
        config: The model.
        chunks: Of queries; where there are several, scores are computed again for each.
    """
    weights = 0.0
    for layers in layers_of(config):
        if config.remat in (True, "feed-forward"):
            weights += layers.count * layers.again
        elif layers.experts:
            weights += layers.count * layers.again / (3 if config.gated_mlp else 2)
        if config.remat is True:
            weights += layers.count * (layers.attention - (layers.out if config.parallel_residual else 0))
    scores = 0.5 if chunks > 1 or config.remat in ("feed-forward", "attention") else 0.0
    if config.remat is True:
        return weights, 1 + scores
    return weights, 0 if config.remat is False else scores
