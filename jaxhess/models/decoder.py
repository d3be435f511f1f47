"""One configurable decoder-only transformer in Flax NNX, layers stacked and scanned (written out on one CPU).

Shapes in comments and names: B sequences, T positions, D residual width, H query heads, K key/value heads, h head
width, F feed-forward width, V vocabulary, L layers. Every parameter carries the logical names of its axes as metadata
(`axes`); `jaxhess.distributed.mesh` turns those into shardings. The stacked layers have a leading axis `layers`.

Everything here has a JVP and a transpose, so `jvp` of `grad` is exact: no `custom_vjp`, and where attention is fused it
has rules of its own (`jaxhess.models.fused_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxhess.distributed.mesh import constrain, constrain_batch, partition_spec
from jaxhess.models.attention import ATTENTION, Attention
from jaxhess.models.config import DecoderConfig
from jaxhess.models.fused_attention import attend_p
from jaxhess.models.layers import FEED_FORWARD, FeedForward, Norm, Projection
from jaxhess.models.vocabulary import matmul_transposed
from jaxhess.vectors import in_order

WRITTEN_OUT = 12
"""Most layers that are written out: compile time grows with their number, while that of a scan does not."""


class Block(nnx.Module):
    """One transformer layer."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.attention_norm = Norm("embed", config.embed_dim, config)
        self.attention = Attention(config, rngs, mesh)
        self.mlp_norm = Norm("embed", config.embed_dim, config)
        self.mlp = FeedForward(config, rngs)
        self.parallel_residual = config.parallel_residual

    def __call__(self, x: jax.Array, window: jax.Array | None) -> jax.Array:
        attended = self.attention(self.attention_norm(x), window)
        if self.parallel_residual:
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """The transformer: `hidden` gives the final states, `output_matrix` what its logits are made with.

    Construct it under `nnx.eval_shape` for an abstract model; weights are placed, never created eagerly
    (`jaxhess.models.initialize`, `convert.load`).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        table = {"vocab": config.vocab_size}
        width = {"embed": config.embed_dim}
        projection = functools.partial(Projection, bias=False, dtype=config.dtype, rngs=rngs)
        self.embed = projection(table, width)
        learned = {"positions": config.max_positions}
        self.positions = projection(learned, width) if config.rope is None else None
        self.layers = nnx.vmap(lambda r: Block(config, r, mesh))(rngs.split(config.num_layers))
        self.final_norm = Norm("embed", config.embed_dim, config)
        self.head = None if config.tied_embeddings else projection(table, width)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Final normalised states [B, T, D] of tokens [B, T] (int32)."""
        x, _ = self._through_layers(self._embedded(tokens))
        return self.final_norm(x)

    def states(self, tokens: jax.Array) -> jax.Array:
        """The residual stream before the first layer and after each, [L + 1, B, T, D]: all of it, for small inputs."""
        x = self._embedded(tokens)
        _, after = self._through_layers(x, keep=True)
        assert after is not None
        return jnp.concatenate([x[None], after])

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        """What enters the first layer, [B, T, D]."""
        x = self._lookup(tokens)
        if self.positions is not None:
            self.config.check_length(tokens.shape[1])
            x = x + self.positions.kernel[: tokens.shape[1]].astype(self.config.dtype)
        return constrain_batch(x, self.mesh)

    def _through_layers(self, x: jax.Array, keep: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, D] after the last layer; with `keep` also after each, [L, B, T, D]."""
        graphdef, layers = nnx.split(self.layers)
        windows = layer_windows(self.config, x.shape[1])
        shardings = slice_shardings(layers, self.mesh)

        def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array | None]:
            params, window = layer
            params = params if shardings is None else in_order(params, shardings)
            x = constrain_batch(nnx.merge(graphdef, params)(x, window), self.mesh)
            return x, x if keep else None

        if _written_out(self.config, self.mesh):
            after = []
            for k in range(self.config.num_layers):
                x, _ = block(x, jax.tree.map(lambda leaf, k=k: leaf[k], (layers, windows)))
                after.append(x)
            return x, jnp.stack(after) if keep else None
        policy = KEPT[self.config.remat]
        return jax.lax.scan(jax.checkpoint(block, prevent_cse=False, policy=policy), x, (layers, windows))

    def _lookup(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, T, D], read where the table's columns lie; the caller exchanges them for whole rows."""
        x = self.embed.kernel[...].astype(self.config.dtype)[constrain(tokens, self.mesh, "data")]
        return constrain(x, self.mesh, "data", None, "fsdp")

    def output_matrix(self) -> jax.Array:
        """Output matrix [V, D]: a row for every token, as in the embedding."""
        return (self.embed if self.head is None else self.head).kernel[...]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, V] in at least float32, all of them at once: for tests and small models."""
        return matmul_transposed(self.hidden(tokens), self.output_matrix())


def _written_out(config: DecoderConfig, mesh: Mesh | None) -> bool:
    """Whether the layers are written out one after the other, instead of scanned: few layers on one CPU, all stored.

    In a Lanczos run XLA then moves the primal pass, which is the same in every step, out of the loop over the steps; it
    moves no loop. And activations are arrays of their own, not parts of stacks that are cleared, written and copied.
    The price is that the primal pass stays in memory, so this is not done with rematerialisation. Simulated devices
    stand for others, whose programs scan.
    """
    if config.remat or config.num_layers > WRITTEN_OUT:
        return False
    if mesh is None:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _and_fused_attention(policy: Callable[..., Any]) -> Callable[..., Any]:
    """The policy that also stores the results of a fused attention."""
    return lambda primitive, *shapes, **fields: primitive is attend_p or policy(primitive, *shapes, **fields)


_named = jax.checkpoint_policies.save_only_these_names
KEPT: dict[bool | str, Callable[..., Any] | None] = {
    # What lies between matrix products is always computed again: that costs less than its memory's traffic.
    True: None,
    "feed-forward": _and_fused_attention(_named(ATTENTION)),
    "attention": _and_fused_attention(_named(ATTENTION, FEED_FORWARD)),
    False: _and_fused_attention(jax.checkpoint_policies.dots_saveable),
}
"""What is stored of a layer for its backward pass, by `DecoderConfig.remat`."""


def slice_shardings(layers: nnx.State, mesh: Mesh | None) -> list[NamedSharding | None] | None:
    """How one layer's parameters lie on the mesh, leaf by leaf; None where nothing is cut."""
    if mesh is None or mesh.size == 1:
        return None

    def sharding(param: nnx.Variable) -> NamedSharding | None:
        whole = partition_spec(param.get_value().shape, ("layers", *param.axes), mesh)
        cut = PartitionSpec(*whole[1:])
        return NamedSharding(mesh, cut) if any(cut) and whole[0] is None else None

    return [sharding(p) for p in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, nnx.Variable))]


def layer_windows(config: DecoderConfig, length: int) -> jax.Array | None:
    """Look-back of each layer in tokens, [L] int32, or None where no layer is limited at this length."""
    if config.sliding_window is None or config.sliding_window >= length:
        return None
    applies: Sequence[bool] = config.sliding_layers or (True,) * config.num_layers
    if not any(applies):
        return None
    return jnp.asarray([config.sliding_window if a else length for a in applies], jnp.int32)
