"""How far a mixture of experts is from sending a token elsewhere: where its Hessian ends, and what that does.

A router's choice is piecewise constant in the parameters. An exact product is that of the choice as it stands; a finite
difference may cross to another choice between its two shifts, and then adds a jump of the gradient, divided by the
step, to the curvature.

A loss with experts says so by an attribute `has_experts` and has two methods, as `jaxhess.models.NextTokenLoss` does:
`routing(params, batch)`, with `logits` [layers, B, T, E], `margin` [layers, B, T] and `chosen` [layers, B, T, k]; and
`held(batch, chosen)`, a batch with which it sends every token where `chosen` says. A batch has `weights` [B, T].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

QUANTILES = (0.0, 0.001, 0.01, 0.1, 0.5)


def has_routing(loss: Any) -> bool:
    """Whether the loss is that of a model with experts."""
    return bool(getattr(loss, "has_experts", False))


def margins(loss: Any, params: Any, groups: Any) -> dict[str, Any]:
    """The routing margin over all tokens that count and all layers with experts, in words for a record.

    The margin is the gap between the score of the last chosen expert and that of the first not chosen. Where it is
    small against the rounding of the scores, another machine may choose otherwise; where a shift of the parameters
    exceeds it, a finite difference does.

    Returns:
        `choices`, how many there are; `margin`, quantiles by name; and `load`, the largest and the smallest share of
        the choices that an expert of any layer gets, times the number of experts.
    """
    found: list[np.ndarray] = []
    loads: Any = 0.0
    for group in groups:
        for k in range(len(group)):
            margin, weights, load = _margins(loss, params, jax.tree.map(lambda x, k=k: x[k], group.stacked))
            margin, weights, load = (np.asarray(_on_host(x)) for x in (margin, weights, load))
            found.append(margin[:, weights > 0].ravel())
            loads = loads + load
    values = np.concatenate(found)
    shares = loads / loads.sum(axis=-1, keepdims=True) * loads.shape[-1]
    return {
        "choices": int(values.size),
        "margin": {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES} if np.isfinite(values).all() else {},
        "load": {"largest": float(shares.max()), "smallest": float(shares.min())},
    }


def changed_share(chosen: jax.Array, other: jax.Array, weights: jax.Array) -> float:
    """The share of choices, sets [layers, ..., k], that differ, over the tokens that count; weights [...]."""
    return float(_changed(chosen, other, weights))


@jax.jit(static_argnums=0)
def chosen_experts(loss: Any, params: Any, batch: Any) -> jax.Array:
    """Where the loss sends a batch's tokens, [layers, ..., k]."""
    with jax.default_matmul_precision("highest"):
        return loss.routing(params, batch).chosen


@jax.jit(static_argnums=0)
def _margins(loss: Any, params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        routing = loss.routing(params, batch)
    experts = jnp.arange(routing.logits.shape[-1])
    taken = jnp.any(routing.chosen[..., None] == experts, axis=-2)  # [layers, B, T, E]
    load = jnp.sum(jnp.where(taken, batch.weights[..., None], 0), axis=(1, 2))
    return routing.margin, batch.weights, load


@jax.jit
def _changed(chosen: jax.Array, other: jax.Array, weights: jax.Array) -> jax.Array:
    differ = jnp.any(jnp.sort(chosen, axis=-1) != jnp.sort(other, axis=-1), axis=-1)
    counts = jnp.broadcast_to(weights > 0, differ.shape)
    return jnp.sum(differ & counts) / jnp.maximum(jnp.sum(counts), 1)


def _on_host(x: jax.Array) -> Any:
    return x if x.is_fully_addressable else process_allgather(x, tiled=True)
