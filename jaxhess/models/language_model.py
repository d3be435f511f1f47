"""A decoder with its parameters in place on a mesh: what conversion returns and operators are built from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import data_shards, param_shardings
from jaxhess.errors import InputError
from jaxhess.models.config import DecoderConfig
from jaxhess.models.decoder import Decoder
from jaxhess.models.experts import Routing, balancing_loss, check_mesh
from jaxhess.models.likelihood import draw_tokens, head_curvature
from jaxhess.models.losses import cross_entropy_sum
from jaxhess.models.vocabulary import Slices, vocabulary_slices

LOGIT_CHUNK = 2**26
"""Logits per device that exist at once, by default: a quarter of a GB in float32, and a few arrays of that size."""

Params = dict[str, Any]
"""Nested dictionaries of arrays; `params["layers"]["mlp"]["up"]["kernel"]` is [L, D, F]."""


class RoutedBatch(NamedTuple):
    """A `TokenBatch` with the experts of its tokens: see `NextTokenLoss.held`."""

    tokens: jax.Array
    weights: jax.Array
    chosen: jax.Array


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """`loss(params, batch) -> (sum, count)`: summed cross-entropy in nats and the number of tokens that count.

    Attributes:
        config: Architecture of the model whose parameters are given.
        mesh: Mesh of the parameters, to which activations are pinned; None on one device.
        logit_chunk: Logits per device that exist at once: those of all tokens of a microbatch with a slice of the
            vocabulary. They are recomputed in the backward pass when there are several slices.
        balance: Coefficient of the auxiliary load-balancing loss of a mixture of experts (`balancing_loss`), which is
            added to the mean cross-entropy of each microbatch; 0, the default: the Hessian is of cross-entropy alone.
    """

    config: DecoderConfig
    mesh: Mesh | None = None
    logit_chunk: int = LOGIT_CHUNK
    balance: float = 0.0

    def __post_init__(self) -> None:
        if self.logit_chunk < 1:
            raise InputError(f"logit_chunk is {self.logit_chunk}; it must be at least 1.")
        if self.balance and self.config.experts is None:
            raise InputError("A load-balancing loss is for models with experts; this one has none.")

    def __call__(self, params: Any, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        if not self.balance:
            hidden, table = self.outputs(params, batch)
            return self._cross_entropy(hidden, table, batch), self.count(batch)
        decoder = nnx.merge(model_graph(self.config, self.mesh), params)
        hidden, routing = decoder.hidden_and_routing(batch.tokens[:, :-1], getattr(batch, "chosen", None))
        total = self._cross_entropy(hidden, decoder.output_matrix(), batch)
        count = self.count(batch)
        return total + self.balance * count * balancing_loss(routing, batch.weights), count

    def _cross_entropy(self, hidden: jax.Array, table: jax.Array, batch: TokenBatch) -> jax.Array:
        return cross_entropy_sum(hidden, self._slices(table, batch), batch.tokens[:, 1:], batch.weights)

    @property
    def has_experts(self) -> bool:
        """Whether tokens are routed."""
        return any(self.config.expert_layers)

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the layers in each stack of the parameters."""
        return self.config.stacks

    def routing(self, params: Any, batch: TokenBatch) -> Routing:
        """Where the layers with experts send a batch's tokens; arrays [layers, B, T, ...]."""
        decoder = nnx.merge(model_graph(self.config, self.mesh), params)
        return decoder.hidden_and_routing(batch.tokens[:, :-1])[1]

    def held(self, batch: TokenBatch, chosen: jax.Array) -> RoutedBatch:
        """The batch with its tokens sent to the experts `chosen` [layers, B, T, k], whatever the routers say."""
        return RoutedBatch(batch.tokens, batch.weights, chosen)

    def outputs(self, params: Any, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Final states [B, T, D] and output matrix [V, D]; logits are the products of their rows."""
        decoder = nnx.merge(model_graph(self.config, self.mesh), params)
        return decoder.hidden(batch.tokens[:, :-1], getattr(batch, "chosen", None)), decoder.output_matrix()

    def curvature(self, outputs: Any, tangents: Any, batch: TokenBatch, labels: Any = None) -> Any:
        """`head_curvature` of a batch: softmax cross-entropy's in the logits, pulled back to the outputs."""
        self._refuse_balance()
        (hidden, table), (hidden_tangent, table_tangent) = outputs, tangents
        slices, changes = (self._slices(x, batch) for x in (table, table_tangent))
        pulled, kernels = head_curvature(hidden, slices, hidden_tangent, changes.kernels, batch.weights, labels)
        return pulled, slices.merged(kernels)

    def labels(self, batch: TokenBatch) -> jax.Array:
        """The next tokens, [B, T, 1]."""
        self._refuse_balance()
        return batch.tokens[:, 1:, None]

    def draw(self, outputs: Any, batch: TokenBatch, keys: jax.Array, samples: int) -> jax.Array:
        """Next tokens [B, T, samples] drawn from the model's own predictions, slice by slice."""
        hidden, table = outputs
        return draw_tokens(hidden, self._slices(table, batch), keys, samples)

    def count(self, batch: TokenBatch) -> jax.Array:
        """The number of tokens that count."""
        return jnp.sum(batch.weights)

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.config.dtype

    def in_dtype(self, dtype: str) -> NextTokenLoss:
        """The same loss computed in `dtype`."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, dtype=dtype))

    def reference(self) -> NextTokenLoss:
        """The same loss without the kernels that are written by hand, for comparison."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, attention="plain"))

    def _refuse_balance(self) -> None:
        if self.balance:
            raise InputError(
                "Gauss-Newton and Fisher matrices are those of cross-entropy: a load-balancing loss has none. Take "
                "balance=0, or the Hessian."
            )

    def _slices(self, table: jax.Array, batch: TokenBatch) -> Slices:
        """The output matrix in slices; what is gathered of it at once is no larger than a feed-forward matrix."""
        shards = data_shards(self.mesh)
        # What does not divide stays whole on every device.
        tokens = batch.weights.size // (1 if len(batch.weights) % shards else shards)
        gathered = self.config.mlp_dim * self.config.embed_dim
        return vocabulary_slices(table, tokens, self.logit_chunk, gathered, self.mesh, self.config.logit_softcap)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Configuration and parameters, optionally sharded over `mesh`.

    Examples:
        >>> import convert, jax.numpy as jnp
        >>> model = convert.load("scripts/tiny")
        >>> model.logits(jnp.ones((1, 3), jnp.int32)).shape == (1, 3, model.config.vocab_size)
        True
        >>> model.configured(dtype="bfloat16").config.dtype, model.param_dtype
        ('bfloat16', 'float32')
    """

    config: DecoderConfig
    params: Params
    mesh: Mesh | None = None

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, V] (float32 or wider) of tokens [B, T]; all of them at once, so for small inputs."""
        return _logits(self.config, self.mesh, self.params, tokens)

    def loss(self, logit_chunk: int = LOGIT_CHUNK) -> NextTokenLoss:
        """The next-token loss of this architecture: a function `loss(params, batch) -> (sum, count)`."""
        return NextTokenLoss(self.config, self.mesh, logit_chunk)

    def configured(self, **fields: Any) -> LanguageModel:
        """The same weights computed otherwise: `dtype` (of computation), `remat`, `query_chunk`, `attention`.

        Raises:
            InputError: Any other field: it would not be this model.
        """
        unknown = sorted(fields.keys() - {"dtype", "remat", "query_chunk", "attention"})
        if unknown:
            raise InputError(
                f"{unknown[0]} is part of what the model is; it takes dtype, remat, query_chunk and attention."
            )
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **fields))

    @property
    def param_dtype(self) -> str:
        """What the weights are stored in; `config.dtype` is what they are computed in."""
        return str(self.params["embed"]["kernel"].dtype)

    @property
    def num_params(self) -> int:
        """Parameters of the model; tied matrices count once."""
        return sum(x.size for x in jax.tree.leaves(self.params))


def initialize(config: DecoderConfig, key: jax.Array, mesh: Mesh | None = None) -> LanguageModel:
    """A model with random weights (normal, standard deviation 0.02), created shard by shard on `mesh`."""

    def create(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(key)))[1])

    shardings = None if mesh is None else model_shardings(config, mesh)
    return LanguageModel(config, jax.jit(create, out_shardings=shardings)(key), mesh)


@functools.cache
def model_graph(config: DecoderConfig, mesh: Mesh | None) -> nnx.GraphDef:
    """The static part of the model: `nnx.merge(model_graph(...), params)` is a `Decoder`."""
    return nnx.split(_abstract_decoder(config, mesh))[0]


def abstract_params(config: DecoderConfig) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter; no weight is created."""
    return nnx.to_pure_dict(nnx.split(_abstract_decoder(config, None))[1])


def logical_axes(config: DecoderConfig) -> Params:
    """For every parameter the logical names of its axes; stacked layers begin with `"layers"`."""
    state = nnx.split(_abstract_decoder(config, None))[1]
    axes = jax.tree.map(lambda v: v.axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    axes = nnx.to_pure_dict(axes)
    for stack in config.stacks:
        axes[stack] = jax.tree.map(lambda names: ("layers", *names), axes[stack], is_leaf=_is_axes)
    return axes


def model_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """`NamedSharding` of every parameter on `mesh`.

    Raises:
        InputError: The mesh's axis `expert` does not divide the experts.
    """
    if config.experts is not None:
        check_mesh(config.experts, mesh)
    return param_shardings(abstract_params(config), logical_axes(config), mesh)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _abstract_decoder(config: DecoderConfig, mesh: Mesh | None) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: DecoderConfig, mesh: Mesh | None, params: Params, tokens: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return nnx.merge(model_graph(config, mesh), params)(tokens)
