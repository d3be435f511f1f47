"""What varies between decoder-only transformers, as data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxhess.errors import InputError
from jaxhess.models.config_parts import LARGEST, ExpertsConfig, LatentConfig, RopeConfig

WIDEST_FUSED = 256
"""Head width up to which there are kernels for a fused attention."""

Remat = bool | Literal["feed-forward", "attention"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_silu"]
RopeOf = Literal["main", "local", "none"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only transformer.

    Examples:
        >>> import jaxhess
        >>> sizes = dict(embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64)
        >>> config = jaxhess.DecoderConfig(vocab_size=100, max_positions=64, **sizes)
        >>> jaxhess.DecoderConfig.from_dict(config.to_dict()) == config
        True

    Attributes:
        vocab_size: Rows of the embedding, V.
        embed_dim: Width of the residual stream, D.
        num_layers: Blocks, L.
        num_heads: Query heads, H.
        num_kv_heads: Key and value heads, K; divides H.
        head_dim: Width of a head, h.
        mlp_dim: Width of the feed-forward layer, F.
        max_positions: Longest sequence the model knows, in tokens (a limit only with learned positions).
        norm: RMSNorm or LayerNorm.
        norm_eps: Added to the variance.
        norm_bias: LayerNorms have a bias.
        norm_offset: RMSNorms multiply by 1 + gain (Gemma).
        norms: Where they stand: before attention and feed-forward, after them (OLMo 2), or both (Gemma 2).
        activation: `gelu` is the exact one, `gelu_tanh` the tanh approximation. `clamped_silu` is gpt-oss's, with a
            gate: see `jaxhess.models.layers.gated`.
        gated_mlp: `down(act(gate x) * up x)` instead of `down(act(up x))`.
        parallel_residual: `x + attention(norm1 x) + mlp(norm2 x)` instead of one after the other.
        shared_norm: With `parallel_residual`, norm1 and norm2 are one.
        rope: Rotary positions, or None for learned absolute positions.
        local_rope: Another kind of rotary positions, for some layers.
        rope_layers: For each layer which one it has: `main`, `local` or `none`; empty: all `main`.
        qkv_bias, out_bias, mlp_bias: Which projections have a bias.
        qk_norm: RMSNorm of queries and keys before the rotation: True, of every head; "projection", of all together.
        latent: Multi-head latent attention; None: plain projections.
        attention_scale: Factor on the scores; None: head_dim^-0.5.
        attention_softcap: c in c tanh(score / c); None: scores as they are.
        attention_sinks: Every head has one more score, learned, whose weight falls away (gpt-oss).
        experts: Mixture of experts; None: a feed-forward in every layer.
        embed_scale, residual_scale, logit_scale: Factors on embeddings (rounded to `dtype`), a layer's results, logits.
        logit_softcap: c in c tanh(logit / c); None: logits as they are.
        sliding_window: Tokens a query may look back on, itself included; None: all.
        sliding_layers: For each layer whether the window applies; empty: to all layers.
        tied_embeddings: The output matrix is the transposed embedding.
        dtype: Compute dtype of matrix products and of the residual stream. Norms, softmax and loss run in at least
            float32 whatever it is.
        query_chunk: Queries whose attention scores exist at once, per sequence and head, in the plain attention.
        attention: `plain` is made of matrix products. `fused` is one kernel, whose scores are never stored: see
            `jaxhess.models.fused_attention`. `auto`: fused on the GPUs, dtypes and meshes that it is made for.
        remat: What the backward pass computes again instead of storing it. True: each layer, from its input;
            "feed-forward": its feed-forward; "attention": only attention's scores and weights; False: no matrix
            product. The less, the faster, for more memory.
        family: Name of the architecture that it was read from, whose names its tensors have when they are written. No
            part of what is computed: two configurations that differ in it alone are equal.

    Raises:
        InputError: A size or number is out of range, or two fields contradict each other.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_offset: bool = False
    norms: Literal["before", "after", "both"] = "before"
    activation: Activation = "silu"
    gated_mlp: bool = True
    parallel_residual: bool = False
    shared_norm: bool = False
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None
    rope_layers: tuple[RopeOf, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool | Literal["projection"] = False
    latent: LatentConfig | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    experts: ExpertsConfig | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    tied_embeddings: bool = False
    dtype: str = "float32"
    query_chunk: int = 256
    attention: Literal["auto", "plain", "fused"] = "auto"
    remat: Remat = True
    family: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        sizes = "vocab_size embed_dim num_layers num_heads num_kv_heads head_dim mlp_dim max_positions query_chunk"
        for name in sizes.split():
            if not 1 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1 and below 2^31.")
        if self.remat not in (True, False, "feed-forward", "attention"):
            raise InputError(f"remat is {self.remat!r}; it is True, 'feed-forward', 'attention' or False.")
        if not 0 <= self.norm_eps <= 1:
            raise InputError(f"norm_eps is {self.norm_eps}; it must be 0 to 1.")
        if self.attention not in ("auto", "plain", "fused"):
            raise InputError(f"attention is {self.attention!r}; it must be auto, plain or fused.")
        if self.attention == "fused" and self.head_dim > WIDEST_FUSED:
            raise InputError(
                f"There is no fused attention for heads of width {self.head_dim}, only up to {WIDEST_FUSED}: use plain."
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every key head must serve the same number of query heads."
            )
        by_layer = {"sliding_layers": self.sliding_layers, "rope_layers": self.rope_layers}
        if self.experts is not None:
            by_layer["experts.layers"] = self.experts.layers
        for name, values in by_layer.items():
            if values and len(values) != self.num_layers:
                raise InputError(f"{name} has {len(values)} entries for {self.num_layers} layers.")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 2**31:
            raise InputError(f"sliding_window is {self.sliding_window}; it must be at least 1, or None for no window.")
        if self.rope is not None and (self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim):
            raise InputError(
                f"{self.rotary_dims} rotary dimensions: must be even and at most head_dim={self.head_dim}."
            )
        self._check_variants()

    def _check_variants(self) -> None:
        if self.norms not in ("before", "after", "both"):
            raise InputError(f"norms is {self.norms!r}; it must be before, after or both.")
        if self.qk_norm not in (True, False, "projection") or (self.qk_norm and self.latent is not None):
            raise InputError(
                f"qk_norm is {self.qk_norm!r}; it must be True, False or 'projection', and False with latent attention."
            )
        if self.attention == "fused" and (self.attention_softcap is not None or self.value_dim > self.head_dim):
            raise InputError(
                "There is no fused attention with a softcap, or with values wider than queries: use plain."
            )
        if self.rope_layers and (self.rope is None or not set(self.rope_layers) <= {"main", "local", "none"}):
            raise InputError("rope_layers must be main, local or none for each layer; not without rotary positions.")
        if "local" in self.rope_layers and (
            self.local_rope is None or (self.local_rope.dims or self.head_dim) != self.rotary_dims
        ):
            raise InputError("Layers with local rotary positions need local_rope, of as many dimensions as rope.")
        if not self.gated_mlp and (self.experts is not None or self.activation == "clamped_silu"):
            raise InputError("Experts, and the activation clamped_silu, are for feed-forwards with a gate.")
        if self.shared_norm and not self.parallel_residual:
            raise InputError("shared_norm is for layers whose attention and feed-forward stand side by side.")
        if self.parallel_residual and self.norms != "before":
            raise InputError("Where attention and feed-forward stand side by side, norms are before them.")
        if self.latent is not None and (self.rope is None or self.num_kv_heads != self.num_heads):
            raise InputError("Latent attention needs rotary positions, and a key head for every query head.")
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST:
                raise InputError(f"{name} is {value}; it must be positive, or None.")
        for name in ("embed_scale", "residual_scale", "logit_scale"):
            if not 0 < abs(getattr(self, name)) <= LARGEST:
                raise InputError(f"{name} is {getattr(self, name)}; it must be a number other than 0.")

    def check_length(self, length: int) -> None:
        """Raises InputError for sequences longer than the learned positions, where a model has these."""
        if self.rope is None and length > self.max_positions:
            raise InputError(
                f"Sequences of {length} tokens, but this model has learned positions for {self.max_positions} only; "
                "use shorter sequences."
            )

    @property
    def rotary_dims(self) -> int:
        """Dimensions of each head that are rotated."""
        if self.rope is None:
            return 0
        return self.head_dim if self.rope.dims is None else self.rope.dims

    @property
    def value_dim(self) -> int:
        """Width of a value head."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def can_fuse(self) -> bool:
        """Whether there are kernels for a fused attention."""
        narrow = self.head_dim <= WIDEST_FUSED and self.value_dim <= self.head_dim
        return narrow and self.attention_softcap is None

    @property
    def score_scale(self) -> float:
        """Factor on the scores of attention."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        if self.experts is None:
            return (False,) * self.num_layers
        return self.experts.layers or (True,) * self.num_layers

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Layers of equal parameters, which are stacked: name in the parameters -> their numbers.

        `layers`; in a model with experts also `dense_layers`, those that have none.
        """
        sparse = self.expert_layers
        if not any(sparse):
            return {"layers": tuple(range(self.num_layers))}
        stacks = {"dense_layers": tuple(i for i, s in enumerate(sparse) if not s)}
        stacks["layers"] = tuple(i for i, s in enumerate(sparse) if s)
        return {name: numbers for name, numbers in stacks.items() if numbers}

    def to_dict(self) -> dict[str, Any]:
        """This config as JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """The config that `to_dict` wrote."""
        data = dict(data)
        kinds = {"rope": RopeConfig, "local_rope": RopeConfig, "latent": LatentConfig, "experts": ExpertsConfig}
        for name, kind in kinds.items():
            if data.get(name) is not None:
                data[name] = kind(**_with_tuples(data[name]))
        return cls(**_with_tuples(data))


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses, which are hashed, have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
