"""What layers take: weights in their products and entries of their states, by kind of layer."""

from __future__ import annotations

import dataclasses

from jaxhess.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Layers:
    """Some layers of equal parameters; sizes are those of one of them, in entries.

    Examples:
        >>> import convert
        >>> from jaxhess.plan.layers import layers_of
        >>> (layers,) = layers_of(convert.read_config("scripts/tiny/config.json"))
        >>> layers.count, layers.experts, layers.active == layers.feed_forward
        (4, 0, True)

    Attributes:
        count: How many there are.
        attention: Weights of attention's projections.
        out: Of these, its last one's.
        feed_forward: Weights of the feed-forward, of all experts.
        experts: Of these, those that the mesh's axis `expert` divides.
        active: Weights in the feed-forward's products with one token.
        again: Of these, those whose result the backward pass needs: all with experts, all but the last product's
            without.
        heads: A token's queries.
        kept: What else of a token attention's checkpoint keeps: keys, values, latents.
        wide: A token's states inside the feed-forward, by the matrices that give them (gate and up).
        rows: A token's copies for its experts, [k, D]; 0 without.
    """

    count: int
    attention: int
    out: int
    feed_forward: int
    experts: int
    active: int
    again: int
    heads: int
    kept: int
    wide: int
    rows: int


def layers_of(config: DecoderConfig) -> list[Layers]:
    """The model's layers by their stacks."""
    return [_layers(config, len(numbers), config.expert_layers[numbers[0]]) for numbers in config.stacks.values()]


def _layers(config: DecoderConfig, count: int, sparse: bool) -> Layers:
    width, heads, gates = config.embed_dim, config.num_heads * config.head_dim, 2 if config.gated_mlp else 1
    values = config.num_heads * config.value_dim
    if config.latent is None:
        kept = 2 * config.num_kv_heads * config.head_dim
        inside = width * (heads + kept)
    else:
        rank, queries = config.latent.kv_rank, config.latent.query_rank
        still = config.num_heads * (config.head_dim - config.rotary_dims)
        inside = width * heads if queries is None else queries * (width + heads)
        inside += width * (rank + config.rotary_dims) + rank * (still + values)
        kept = still + values + rank + config.rotary_dims + (queries or 0)
    if not sparse or config.experts is None:
        wide = gates * config.mlp_dim
        feed_forward = active = width * (wide + config.mlp_dim)
        again, experts, rows = width * wide, 0, 0
    else:
        e = config.experts
        one = width * (gates + 1) * e.mlp_dim
        beside = width * (e.num_experts + (gates + 1) * e.shared_dim)
        experts, active = e.num_experts * one, e.top_k * one + beside
        feed_forward, again = experts + beside, active
        wide, rows = gates * e.mlp_dim * e.top_k, e.top_k * width
    return Layers(
        count=count,
        attention=inside + values * width,
        out=values * width,
        feed_forward=feed_forward,
        experts=experts,
        active=active,
        again=again,
        heads=heads,
        kept=kept,
        wide=wide,
        rows=rows,
    )
