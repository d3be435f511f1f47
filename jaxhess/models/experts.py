"""A mixture of experts: every token goes to its best few, none is dropped, and no expert sees another's tokens.

Which experts a token is sent to is piecewise constant in the parameters, so the loss has a Hessian almost everywhere:
that of the choice as it stands. `Routing.margin` says how far the nearest change of it is.

Shapes are named as in `decoder.py`; E experts, k chosen for a token, N tokens of a device, F width of an expert.
"""

from __future__ import annotations

import functools
import math
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
        # Published ones are large beside the gaps between scores: bfloat16 would choose other experts.
        bias = jnp.zeros((self.experts.num_experts,), jnp.promote_types(config.dtype, jnp.float32))
        self.selection_bias = nnx.Param(bias, axes=("routes",)) if self.experts.selection_bias else None
        each = functools.partial(ExpertProjection, count, bias=self.experts.bias, dtype=config.dtype, rngs=rngs)
        self.gate, self.up, self.down = each(width, wide), each(width, wide), each(wide, width)
        shared = {"shared_mlp": self.experts.shared_dim}
        self.shared = FeedForward(config, rngs, shared) if self.experts.shared_dim else None
        self.shared_gate = projection(width, {"one": 1}, bias=False) if self.experts.shared_gate else None

    def __call__(self, x: jax.Array, chosen: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """What the experts make of x [B, T, D], and where its tokens went: to `chosen` [B, T, k] where that is given."""
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
        return _mixed(activation, x, chosen, weights, arrays, 0)
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
        y = _mixed(activation, x, chosen, weights, arrays, first)
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


def _mixed(
    activation: str,
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    arrays: Arrays,
    first: jax.Array | int,
) -> jax.Array:
    """The weighted sum [B, T, D] of what the experts `first` ... here make of x [B, T, D]."""
    here = arrays["up"]["kernel"].shape[0]
    top_k = chosen.shape[-1]
    experts = chosen.reshape(-1) - first
    experts = jnp.where((experts >= 0) & (experts < here), experts, here)  # others' tokens come last
    order = jnp.argsort(experts, stable=True)
    inverse = jnp.argsort(order, stable=True)
    experts = experts[order]
    edges = jnp.searchsorted(experts, jnp.arange(here + 1, dtype=experts.dtype), side="left")
    sizes = jnp.diff(edges).astype(jnp.int32)

    def apply(name: str, rows: jax.Array) -> jax.Array:
        y = grouped_matmul(rows, arrays[name]["kernel"], sizes)
        if "bias" in arrays[name]:
            y = y + jnp.matmul(jax.nn.one_hot(experts, here, dtype=y.dtype), arrays[name]["bias"])
        return y

    rows = x.reshape(-1, x.shape[-1])
    rows = permuted(jnp.repeat(rows, top_k, axis=0), order, inverse)
    up = checkpoint_name(apply("up", rows), FEED_FORWARD)
    hidden = gated(activation, checkpoint_name(apply("gate", rows), FEED_FORWARD), up)
    y = permuted(apply("down", hidden), inverse, order).reshape(*chosen.shape, -1)
    return jnp.sum(y * weights[..., None], axis=2)


def permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order] for a permutation of the first axis and its inverse.

    Linear, with x[inverse] for its transpose: that of indexing would be a scatter with additions, whose order is not
    fixed on a GPU.
    """
    return permute_p.bind(x, order, inverse)


def _permute_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, Any]:
    x, order, inverse = primals
    change = tangents[0]
    if not isinstance(change, ad.Zero):
        change = permute_p.bind(change, order, inverse)
    return permute_p.bind(x, order, inverse), change


def _permute_batched(arrays: tuple, axes: tuple) -> tuple[jax.Array, int]:
    x, order, inverse = arrays
    if axes[1] is not None or axes[2] is not None:
        raise NotImplementedError("The permutation of a mixture of experts is the same for all vectors of a batch.")
    return permute_p.bind(jnp.moveaxis(x, axes[0], 1), order, inverse), 1


def _take(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


permute_p = Primitive("permute")
permute_p.def_impl(_take)
permute_p.def_abstract_eval(lambda x, order, inverse: x)
ad.primitive_jvps[permute_p] = _permute_jvp
ad.primitive_transposes[permute_p] = lambda ct, x, order, inverse: (permute_p.bind(ct, inverse, order), None, None)
batching.primitive_batchers[permute_p] = _permute_batched
mlir.register_lowering(permute_p, mlir.lower_fun(_take, multiple_results=False))
