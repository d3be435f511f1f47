"""One configurable decoder-only transformer in Flax NNX, layers stacked and scanned (written out on one CPU).

Shapes in comments and names: B sequences, T positions, D residual width, H query heads, K key/value heads, h head
width, F feed-forward width, V vocabulary, L layers. Every parameter carries the logical names of its axes as metadata
(`axes`); `jaxhess.distributed.mesh` turns those into shardings. Layers of equal parameters are stacked, with a leading
axis `layers`: all of them, or, where only some have experts, these and the others (`DecoderConfig.stacks`).

Everything here has a JVP and a transpose, so `jvp` of `grad` is exact: no `custom_vjp`, and where attention is fused it
has rules of its own (`jaxhess.models.fused_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxhess.distributed.mesh import constrain, constrain_batch, partition_spec
from jaxhess.models.attention import ATTENTION, Attention, LatentAttention
from jaxhess.models.config import DecoderConfig
from jaxhess.models.experts import Experts, Routing
from jaxhess.models.fused_attention import attend_p
from jaxhess.models.layers import FEED_FORWARD, FeedForward, Norm, Projection, scaled
from jaxhess.models.rotary import KINDS
from jaxhess.models.vocabulary import matmul_transposed, softcapped
from jaxhess.vectors import in_order

WRITTEN_OUT = 12
"""Most layers that are written out: compile time grows with their number, while that of a scan does not."""


class Block(nnx.Module):
    """One transformer layer, with a feed-forward or with experts."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None, sparse: bool = False):
        norm = functools.partial(Norm, {"embed": config.embed_dim}, config)
        before, after = config.norms != "after", config.norms != "before"
        self.attention_norm = norm() if before else None
        self.attention = (LatentAttention if config.latent else Attention)(config, rngs, mesh)
        self.attention_out_norm = norm() if after else None
        self.mlp_norm = norm() if before and not config.shared_norm else None
        # Under two names, so that a parameter's path says which kind of layer it is in.
        self.mlp = None if sparse else FeedForward(config, rngs)
        self.experts = Experts(config, rngs, mesh) if sparse else None
        self.mlp_out_norm = norm() if after else None
        self.parallel_residual = config.parallel_residual
        self.residual_scale = config.residual_scale

    def __call__(self, x: jax.Array, facts: LayerFacts) -> tuple[jax.Array, Routing | None]:
        read = _applied(self.attention_norm, x)
        attended = _applied(self.attention_out_norm, self.attention(read, facts.window, facts.rope))
        if self.parallel_residual:
            changed, routing = self._feed_forward(read if self.mlp_norm is None else self.mlp_norm(x), facts)
            return x + scaled(attended + changed, self.residual_scale), routing
        x = x + scaled(attended, self.residual_scale)
        changed, routing = self._feed_forward(_applied(self.mlp_norm, x), facts)
        return x + scaled(_applied(self.mlp_out_norm, changed), self.residual_scale), routing

    def _feed_forward(self, x: jax.Array, facts: LayerFacts) -> tuple[jax.Array, Routing | None]:
        if self.experts is not None:
            return self.experts(x, facts.chosen)
        assert self.mlp is not None
        return self.mlp(x), None


def _applied(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


class LayerFacts(NamedTuple):
    """What differs between layers of equal parameters: arrays [L] int32, or None where nothing does.

    Attributes:
        window: Look-back in tokens.
        rope: Kind of rotary positions (`jaxhess.models.rotary.KINDS`).
        chosen: Experts that tokens are sent to, [L, B, T, k]; None: the routers' choice.
    """

    window: jax.Array | None
    rope: jax.Array | None
    chosen: jax.Array | None = None


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
        for name, numbers in config.stacks.items():
            make = functools.partial(Block, config, mesh=mesh, sparse=config.expert_layers[numbers[0]])
            setattr(self, name, nnx.vmap(make)(rngs.split(len(numbers))))
        self.final_norm = Norm(width, config)
        self.head = None if config.tied_embeddings else projection(table, width)

    def hidden(self, tokens: jax.Array, chosen: jax.Array | None = None) -> jax.Array:
        """Final normalised states [B, T, D] of tokens [B, T] (int32), with the factor on logits.

        `chosen` [layers with experts, B, T, k] are the experts that tokens are sent to; None: the routers' choice.
        """
        return self._final(self._through_layers(self._embedded(tokens), chosen=chosen)[0])

    def hidden_and_routing(self, tokens: jax.Array, chosen: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """`hidden`, and where the layers with experts send the tokens: `Routing` of arrays [layers, B, T, ...]."""
        x, routing = self._through_layers(self._embedded(tokens), "routing", chosen)
        return self._final(x), routing

    def states(self, tokens: jax.Array) -> jax.Array:
        """The residual stream before the first layer and after each, [L + 1, B, T, D]: all of it, for small inputs."""
        x = self._embedded(tokens)
        return jnp.concatenate([x[None], self._through_layers(x, keep="states")[1]])

    def _final(self, x: jax.Array) -> jax.Array:
        return scaled(self.final_norm(x), self.config.logit_scale)

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        """What enters the first layer, [B, T, D]."""
        x = self._lookup(tokens)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            self.config.check_length(tokens.shape[1])
            x = x + self.positions.kernel[: tokens.shape[1]].astype(self.config.dtype)
        return constrain_batch(x, self.mesh)

    def _through_layers(
        self, x: jax.Array, keep: Literal["states", "routing"] | None = None, chosen: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] after the last layer, and what shall be kept of each layer that has it, stacked."""
        facts = layer_facts(self.config, x.shape[1])
        kept = []
        for name, run, numbers in _runs(self.config):
            graphdef, layers = nnx.split(getattr(self, name))
            shardings = slice_shardings(layers, self.mesh)
            if run != range(len(self.config.stacks[name])):
                layers = jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], layers)
            these = jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers.start : numbers.stop], facts)
            if chosen is not None and self.config.expert_layers[numbers.start]:
                these = these._replace(chosen=chosen[run.start : run.stop])

            def block(x: jax.Array, layer: tuple, graphdef=graphdef, shardings=shardings) -> tuple[jax.Array, Any]:
                params, facts = layer
                params = params if shardings is None else in_order(params, shardings)
                x, routing = nnx.merge(graphdef, params)(x, facts)
                x = constrain_batch(x, self.mesh)
                return x, {"states": x, "routing": routing}.get(keep or "")

            x, found = self._scanned(block, x, (layers, these), len(numbers))
            if found is not None:
                kept.append(found)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept) if kept else None

    def _scanned(self, block: Callable, x: jax.Array, layers: tuple, count: int) -> tuple[jax.Array, Any]:
        """`block` for each of `count` layers of equal parameters, one after the other."""
        if _written_out(self.config, self.mesh):
            found = []
            for k in range(count):
                x, kept = block(x, jax.tree.map(lambda leaf, k=k: leaf[k], layers))
                found.append(kept)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        policy = KEPT[self.config.remat]
        return jax.lax.scan(jax.checkpoint(block, prevent_cse=False, policy=policy), x, layers)

    def _lookup(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [B, T, D], read where the table's columns lie; the caller exchanges them for whole rows."""
        x = self.embed.kernel[...].astype(self.config.dtype)[constrain(tokens, self.mesh, "data")]
        return constrain(x, self.mesh, "data", None, ("fsdp", "expert"))

    def output_matrix(self) -> jax.Array:
        """Output matrix [V, D]: a row for every token, as in the embedding."""
        return (self.embed if self.head is None else self.head).kernel[...]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, V] in at least float32, all of them at once: for tests and small models."""
        return softcapped(matmul_transposed(self.hidden(tokens), self.output_matrix()), self.config.logit_softcap)


def _runs(config: DecoderConfig) -> list[tuple[str, range, range]]:
    """The layers in order, as runs of one stack: its name, the run's places in it, and the layers' numbers."""
    runs: list[tuple[str, range, range]] = []
    place = dict.fromkeys(config.stacks, 0)
    of_layer = {number: name for name, numbers in config.stacks.items() for number in numbers}
    for number in range(config.num_layers):
        name = of_layer[number]
        start, first = place[name], number
        if runs and runs[-1][0] == name:
            start, first = runs[-1][1].start, runs[-1][2].start
            runs.pop()
        place[name] += 1
        runs.append((name, range(start, place[name]), range(first, number + 1)))
    return runs


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


def layer_facts(config: DecoderConfig, length: int) -> LayerFacts:
    """What differs between the layers, in sequences of `length` tokens."""
    windows = ropes = None
    applies: Sequence[bool] = config.sliding_layers or (True,) * config.num_layers
    if config.sliding_window is not None and config.sliding_window < length and any(applies):
        windows = jnp.asarray([config.sliding_window if a else length for a in applies], jnp.int32)
    if set(config.rope_layers) - {"main"}:
        ropes = jnp.asarray([KINDS.index(kind) for kind in config.rope_layers], jnp.int32)
    return LayerFacts(windows, ropes)
