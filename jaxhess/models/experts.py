"""A mixture of experts: every token goes to its best few, none is dropped, and no expert sees another's tokens.

Which experts a token is sent to is piecewise constant in the parameters, so the loss has a Hessian almost everywhere:
that of the choice as it stands. `Routing.margin` says how far the nearest change of it is.

Shapes are named as in `decoder.py`; E experts, k chosen for a token, N tokens of a device, F width of an expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, PartitionSpec

from jaxhess.distributed.mesh import BATCH_AXES, partition_spec
from jaxhess.errors import InputError
from jaxhess.models.config import DecoderConfig, ExpertsConfig
from jaxhess.models.grouped_matmul import grouped_matmul
from jaxhess.models.layers import FEED_FORWARD, FeedForward, Projection, gated


class Routing(NamedTuple):
    """Where a layer's router sends its tokens.

    Attributes:
        logits: [B, T, E] in at least float32.
        chosen: [B, T, k] int32.
        margin: [B, T], by how much the last chosen expert's score lies above the first not chosen's, in what they are
            ranked by; infinite where all are chosen.
    """

    logits: jax.Array
    chosen: jax.Array
    margin: jax.Array


class Experts(nnx.Module):
    """Router, experts and what all tokens share, in the place of a `FeedForward`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, mesh: Mesh | None = None):
        assert config.experts is not None
        self.config, self.experts, self.mesh = config, config.experts, mesh
        check_mesh(self.experts, mesh)
        count, width = {"experts": self.experts.num_experts}, {"embed": config.embed_dim}
        routes, wide = {"routes": self.experts.num_experts}, {"expert_mlp": self.experts.mlp_dim}
        projection = functools.partial(Projection, dtype=config.dtype, rngs=rngs)
        self.router = projection(width, routes, bias=self.experts.router_bias)
        # Not in 16 bits, whose rounding could choose other experts: `transformers` keeps it in float32 too.
        bias = jnp.zeros((self.experts.num_experts,), jnp.promote_types(config.dtype, jnp.float32))
        self.selection_bias = nnx.Param(bias, axes=("routes",)) if self.experts.selection_bias else None
        each = functools.partial(ExpertProjection, count, bias=self.experts.bias, dtype=config.dtype, rngs=rngs)
        self.gate, self.up, self.down = each(width, wide), each(width, wide), each(wide, width)
        shared = {"shared_mlp": self.experts.shared_dim}
        self.shared = FeedForward(config, rngs, shared) if self.experts.shared_dim else None
        self.shared_gate = projection(width, {"one": 1}, bias=False) if self.experts.shared_gate else None

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """What the experts make of x [B, T, D], and where its tokens went: to `chosen` [B, T, k] where it is given."""
        routing, weights = self._routed(x, chosen)
        kernels = {"gate": self.gate, "up": self.up, "down": self.down}
        arrays = {name: _arrays(projection, self.config.dtype) for name, projection in kernels.items()}
        axes = {name: _axes(projection) for name, projection in kernels.items()}
        y = _on_shards(self.config.activation, self.mesh, axes, x, routing.chosen, weights.astype(x.dtype), arrays)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * shared)
        return y, routing

    def _routed(self, x: jax.Array, held: jax.Array | None) -> tuple[Routing, jax.Array]:
        """The routing of x [B, T, D], and the weights [B, T, k] of the chosen experts' results."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        bias = 0 if self.router.bias is None else self.router.bias[...].astype(wide)
        logits = jnp.matmul(x.astype(wide), self.router.kernel[...].astype(wide)) + bias
        scores = jax.nn.sigmoid(logits) if self.experts.scores == "sigmoid" else logits
        if self.experts.scores == "softmax":
            scores = jax.nn.softmax(logits, axis=-1)
        ranked = scores if self.selection_bias is None else scores + self.selection_bias[...].astype(wide)
        chosen, margin = choose(jax.lax.stop_gradient(ranked), self.experts)
        chosen = chosen if held is None else held
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.experts.scores == "softmax of chosen":
            weights = jax.nn.softmax(weights, axis=-1)
        if self.experts.renormalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(logits, chosen, margin), self.experts.scale * weights


def check_mesh(experts: ExpertsConfig, mesh: Mesh | None) -> None:
    """Raises InputError where the mesh's axis `expert` does not divide the experts."""
    parts = 1 if mesh is None else mesh.shape["expert"]
    if experts.num_experts % parts:
        raise InputError(f"{experts.num_experts} experts cannot be divided over expert={parts} of the mesh.")


def choose(ranked: jax.Array, experts: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """The experts [..., k] int32 of the largest entries of `ranked` [..., E], and the margin [...] of the choice.

    With groups (arXiv 2405.04434, section 2.1.3; arXiv 2412.19437, section 2.1.2) only experts of the best groups are
    chosen from. The margin is then the smaller of both choices'.
    """
    margin = jnp.full(ranked.shape[:-1], jnp.inf, ranked.dtype)
    if experts.groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], experts.groups, -1)
        best = jax.lax.top_k(grouped, 2 if experts.group_score == "best two" else 1)[0].sum(-1)
        groups, margin = _largest(best, experts.top_groups)
        taken = jnp.any(groups[..., None] == jnp.arange(experts.groups), axis=-2)  # [..., groups]
        ranked = jnp.where(taken[..., None], grouped, -jnp.inf).reshape(ranked.shape)
    chosen, gap = _largest(ranked, experts.top_k)
    return chosen, jnp.minimum(margin, gap)


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Places [..., k] of the largest entries of x [..., n], and how far the next one lies below them [...]."""
    values, places = jax.lax.top_k(x, min(k + 1, x.shape[-1]))
    if k == x.shape[-1]:
        return places, jnp.full(x.shape[:-1], jnp.inf, x.dtype)
    return places[..., :k], values[..., k - 1] - values[..., k]


def balancing_loss(routing: Routing, weights: jax.Array) -> jax.Array:
    """E sum_e f_e p_e (arXiv 2101.03961, equations 4 to 6), a scalar: k where the load is even.

    f_e is how many of a token's choices fall on expert e, p_e the mean of softmax(logits) at e, both over the tokens of
    all layers together, as `transformers` computes it (`load_balancing_loss_func`). f is a constant where there are
    derivatives.

    Args:
        routing: Arrays [layers, B, T, ...].
        weights: [B, T], of each token.
    """
    w = jnp.broadcast_to(weights, routing.margin.shape).astype(routing.logits.dtype)
    experts = routing.logits.shape[-1]
    share = jnp.einsum("lbtke,lbt->e", jax.nn.one_hot(routing.chosen, experts, dtype=w.dtype), w)
    mean = jnp.einsum("lbte,lbt->e", jax.nn.softmax(routing.logits, axis=-1), w)
    return experts * jnp.dot(share, mean) / jnp.maximum(jnp.sum(w) ** 2, 1)


class ExpertProjection(nnx.Module):
    """A linear map for every expert: kernel [E, inputs, outputs], bias [E, outputs]."""

    def __init__(
        self,
        experts: dict[str, int],
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        sizes = experts | inputs | outputs
        kernel = 0.02 * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtype), axes=tuple(sizes))
        shape = tuple((experts | outputs).values())
        self.bias = nnx.Param(jnp.zeros(shape, dtype), axes=tuple(experts | outputs)) if bias else None


Arrays = dict[str, Any]
"""Kernel and bias by name of the projection."""


def _arrays(projection: ExpertProjection, dtype: str) -> Arrays:
    found = {"kernel": projection.kernel[...].astype(dtype)}
    return found if projection.bias is None else found | {"bias": projection.bias[...].astype(dtype)}


def _axes(projection: ExpertProjection) -> Arrays:
    found = {"kernel": projection.kernel.axes}
    return found if projection.bias is None else found | {"bias": projection.bias.axes}


def _on_shards(
    activation: str,
    mesh: Mesh | None,
    axes: Arrays,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    arrays: Arrays,
) -> jax.Array:
    """`_mixed` on every device's own experts, with the tokens of all devices along `expert`.

    Those tokens are gathered, and the results summed where they came from: with k experts for a token that is no more
    traffic than to send it to each of them, as long as `expert` is at most k, and no device waits for another's load.
    Kernels are gathered along `fsdp` as in every layer; along `tensor` each device has its part of an expert's width.
    """
    if mesh is None or mesh.size == 1:
        return _mixed(activation, mesh, x, chosen, weights, arrays, 0)
    cut = len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0
    tokens = PartitionSpec(BATCH_AXES if cut else None)
    specs = jax.tree.map(lambda a, names: partition_spec(a.shape, names, mesh), arrays, axes)
    total, _, width = arrays["up"]["kernel"].shape
    expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    split = tensor > 1 and width % tensor == 0

    def run(x: jax.Array, chosen: jax.Array, weights: jax.Array, arrays: Arrays) -> jax.Array:
        arrays = jax.tree.map(_gathered, arrays, specs, axes)
        if split and "bias" in arrays["down"]:  # once in the sum over `tensor`
            once = (jax.lax.axis_index("tensor") == 0).astype(x.dtype)
            arrays = arrays | {"down": arrays["down"] | {"bias": once * arrays["down"]["bias"]}}
        first = jax.lax.axis_index("expert") * (total // expert)
        if cut and expert > 1:
            gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
            x, chosen, weights = gather(x), gather(chosen), gather(weights)
        y = _mixed(activation, mesh, x, chosen, weights, arrays, first, 1 / expert)
        if split:
            y = jax.lax.psum(y, "tensor")
        if expert == 1:
            return y
        if cut:
            return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, "expert")

    return jax.shard_map(run, mesh=mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False)(
        x, chosen, weights, arrays
    )


def _gathered(x: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """A device's part of a kernel, whole but for its own experts and its part of their width."""
    kept = {"experts": "expert", "expert_mlp": "tensor"}
    for dim, (cuts, axis) in enumerate(zip(spec, axes, strict=False)):
        for cut in reversed(() if cuts is None else (cuts,) if isinstance(cuts, str) else cuts):
            if kept.get(axis) != cut:
                x = jax.lax.all_gather(x, cut, axis=dim, tiled=True)
    return x


class _Places(NamedTuple):
    """Where the tokens of N positions lie among rows that are sorted by expert.

    Attributes:
        order: [rows] int32, which of the N k choices a row is; those of experts that are elsewhere come last.
        slots: [N, k] int32, the row of every choice.
        ends: [E] int32, where each expert's rows end.
    """

    order: jax.Array
    slots: jax.Array
    ends: jax.Array


def _places(chosen: jax.Array, first: jax.Array | int, here: int) -> _Places:
    """The places of choices [N, k] for the experts `first` ... `first + here - 1`."""
    experts = chosen.reshape(-1) - first
    experts = jnp.where((experts >= 0) & (experts < here), experts, here).astype(jnp.int32)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    slots = jnp.argsort(order, stable=True).astype(jnp.int32).reshape(chosen.shape)
    ends = jnp.searchsorted(experts[order], jnp.arange(1, here + 1, dtype=jnp.int32), side="left").astype(jnp.int32)
    return _Places(order, slots, ends)


SPARE = 1.25
"""Room for rows over an even share, where the tokens of several devices meet."""


def _mixed(
    activation: str,
    mesh: Mesh | None,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    arrays: Arrays,
    first: jax.Array | int,
    share: float = 1.0,
) -> jax.Array:
    """The weighted sum [B, T, D] of what the experts `first` ... here make of x [B, T, D].

    With an even load these experts have the given share of all rows. There is room for a quarter more; rows beyond that
    are computed in further passes, which are skipped where there are none. So memory is that of an even load, and no
    row is dropped.
    """
    here, top_k = arrays["up"]["kernel"].shape[0], chosen.shape[-1]
    tokens, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
    places = _places(chosen, first, here)
    rows = chosen.size if share == 1 else min(chosen.size, math.ceil(SPARE * share * chosen.size))
    passes = math.ceil(chosen.size / rows)
    order = jnp.pad(places.order, (0, passes * rows - chosen.size))

    def one(
        start: jax.Array | int, tokens: jax.Array, weights: jax.Array, arrays: Arrays, stored: bool = False
    ) -> jax.Array:
        """The part of the rows from `start` on, [N, D]; whether a checkpoint may store states of it."""
        named = functools.partial(checkpoint_name, name=FEED_FORWARD) if stored else lambda y: y
        choices = jax.lax.dynamic_slice_in_dim(order, start, rows)
        slots = places.slots - start
        ends = jnp.clip(places.ends - start, 0, rows)
        sizes = jnp.diff(ends, prepend=0)

        def apply(name: str, x: jax.Array) -> jax.Array:
            y = grouped_matmul(x, arrays[name]["kernel"], sizes, mesh)
            if "bias" in arrays[name]:  # as a product with zeros and ones, whose transpose is no scatter
                expert = jnp.searchsorted(ends, jnp.arange(rows, dtype=jnp.int32), side="right")
                y = y + jnp.matmul(jax.nn.one_hot(expert, here, dtype=y.dtype), arrays[name]["bias"])
            return y

        x = spread(tokens, choices // top_k, slots)
        hidden = named(apply("up", x))
        hidden = gated(activation, named(apply("gate", x)), hidden)
        weight = spread(weights.reshape(-1, 1), choices, slots.reshape(-1, 1))
        return collect(apply("down", hidden) * weight, choices // top_k, slots)

    total = one(0, tokens, weights, arrays, stored=True)
    if passes > 1:

        def rest(*given: Any) -> jax.Array:
            starts = rows * jnp.arange(1, passes, dtype=jnp.int32)
            again = jax.checkpoint(one, prevent_cse=False)
            return jax.lax.scan(lambda sum, start: (sum + again(start, *given), None), jnp.zeros_like(total), starts)[0]

        def nothing(*given: Any) -> jax.Array:
            return jnp.zeros_like(total)

        total = total + jax.lax.cond(places.ends[-1] > rows, rest, nothing, tokens, weights, arrays)
    return total.reshape(x.shape)


def spread(x: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows x[tokens], [rows, ...] of x [N, ...].

    Linear, with `collect` for its transpose, which knows where the rows of a token are: that of indexing would be a
    scatter with additions, whose order is not fixed on a GPU.

    Args:
        x: [N, ...].
        tokens: [rows] int32.
        slots: [N, k] int32, the rows that a token went to; those that are none of 0 ... rows - 1 are elsewhere.
    """
    return spread_p.bind(x, tokens, slots)


def collect(y: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    """The sum [N, ...] of every token's rows y [rows, ...]; the transpose of `spread`."""
    return collect_p.bind(y, tokens, slots)


def _spread(x: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    return x.at[tokens].get(mode="promise_in_bounds")


def _collect(y: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    inside = (slots >= 0) & (slots < y.shape[0])
    rows = y.at[jnp.where(inside, slots, y.shape[0])].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=1)


def _linear(name: str, run: Callable, shape: Callable) -> Primitive:
    """`run(x, tokens, slots)`, linear in x, as a primitive; `shape` is that of its result's first axis."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(run))
    primitive.def_abstract_eval(
        lambda x, tokens, slots: x.update(shape=(shape(tokens, slots), *x.shape[1:]), weak_type=False)
    )

    def jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
        x, tokens, slots = primals
        y = primitive.bind(x, tokens, slots)
        if isinstance(tangents[0], ad.Zero):
            return y, ad.Zero(jax.typeof(y))
        return y, primitive.bind(tangents[0], tokens, slots)

    def batched(arrays: tuple, axes: tuple) -> tuple[jax.Array, int]:
        x, tokens, slots = arrays
        if axes[1] is not None or axes[2] is not None:
            return jax.vmap(run, in_axes=axes)(*arrays), 0
        return primitive.bind(jnp.moveaxis(x, axes[0], 1), tokens, slots), 1

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    return primitive


spread_p = _linear("spread", _spread, lambda tokens, slots: tokens.shape[0])
collect_p = _linear("collect", _collect, lambda tokens, slots: slots.shape[0])
ad.primitive_transposes[spread_p] = lambda ct, x, tokens, slots: (collect_p.bind(ct, tokens, slots), None, None)
ad.primitive_transposes[collect_p] = lambda ct, x, tokens, slots: (spread_p.bind(ct, tokens, slots), None, None)
