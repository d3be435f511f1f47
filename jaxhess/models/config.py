"""What varies between decoder-only transformers, as data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxhess.errors import InputError

LARGEST = 1e30
"""No factor of rotary positions is larger: far beyond any in use, and within float32 also when multiplied."""

WIDEST_FUSED = 256
"""Head width up to which there are kernels for a fused attention."""

Remat = bool | Literal["feed-forward", "attention"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_silu"]
RopeOf = Literal["main", "local", "none"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, on how many of the head's dimensions.

    `kind` names the frequency rule (see `jaxhess.models.rotary`); the fields below `kind` are read only by the rules
    that need them.

    Examples:
        >>> import jaxhess
        >>> rope = jaxhess.RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192)
        >>> jaxhess.RopeConfig(kind="yarn")
        Traceback (most recent call last):
        jaxhess.errors.InputError: original_max_positions is None; it must be positive.

    Raises:
        InputError: A number that is not positive or out of range, or two that contradict each other.
    """

    theta: float = 10000.0
    dims: int | None = None
    """Dimensions of each head that are rotated (the first ones); None: all of them."""
    interleaved: bool = False
    """Dimension 2i is rotated with 2i + 1, as in the first paper; False: i with i + dims / 2, as in GPT-NeoX."""
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    """Context length before extension (`llama3`, `yarn`, and the length below which `dynamic` changes nothing)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Factor on cos and sin (`yarn`, `longrope`), already resolved from the checkpoint's `mscale` settings."""
    short_factors: tuple[float, ...] = ()
    """`longrope`: what each frequency is divided by in sequences up to `original_max_positions`."""
    long_factors: tuple[float, ...] = ()
    """The same for longer sequences."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise InputError(f"rope {name} is {getattr(self, name)}; it must be positive and at most {LARGEST:g}.")
        if (
            self.kind in ("dynamic", "llama3", "yarn", "longrope")
            and not 1 <= (self.original_max_positions or 0) < 2**31
        ):
            raise InputError(f"original_max_positions is {self.original_max_positions}; it must be positive.")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}."
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast <= LARGEST:
            raise InputError(f"beta_slow={self.beta_slow} must be positive and at most beta_fast={self.beta_fast}.")
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(self, name)
                if not factors or not all(0 < f <= LARGEST for f in factors):
                    raise InputError(f"rope {name} must be positive numbers, one for each frequency.")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): queries and keys from narrow latents.

    The last `RopeConfig.dims` dimensions of a head are rotated, and are the same for all heads of a key; the others,
    and the values, come from a latent state of width `kv_rank`.

    Attributes:
        kv_rank: Width of the latent state of keys and values.
        query_rank: That of queries; None: queries come from the residual stream.
        value_dim: Width of a value head.
        norm_eps: Of the norms of the latent states.

    Examples:
        >>> import jaxhess
        >>> jaxhess.models.LatentConfig(kv_rank=512, query_rank=1536, value_dim=128).kv_rank
        512
    """

    kv_rank: int
    value_dim: int
    query_rank: int | None = None
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_rank", "value_dim", "query_rank"):
            size = getattr(self, name)
            if not (size is None and name == "query_rank") and not 1 <= size < 2**31:
                raise InputError(f"latent {name} is {size}; it must be at least 1 and below 2^31.")
        if not 0 <= self.norm_eps <= 1:
            raise InputError(f"latent norm_eps is {self.norm_eps}; it must be 0 to 1.")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of the feed-forward (arXiv 1701.06538): each token goes to `top_k` of them.

    Attributes:
        num_experts: E.
        top_k: Experts that a token is sent to.
        mlp_dim: Width of one expert.
        layers: For each layer whether it has experts, or else a feed-forward of `DecoderConfig.mlp_dim`; empty: all.
        scores: From the router's logits: `softmax`; `sigmoid`; or `softmax of chosen`, over the chosen experts' alone.
        renormalized: The chosen experts' scores are divided by their sum.
        scale: Factor on the scores after that.
        selection_bias: The experts are chosen by score plus a bias (arXiv 2408.15664), which has no other effect: the
            loss does not depend on it where it is differentiable, and its rows of the Hessian are zero. It is in
            float32 at least, whatever the other parameters are in.
        groups: Experts lie in this many groups, and only those of the best `top_groups` are chosen from.
        top_groups: See `groups`.
        group_score: What ranks the groups: their best score, or the sum of their best two.
        router_bias: The router has a bias.
        bias: The experts' projections have biases.
        shared_dim: Width of a feed-forward that every token goes through as well; 0: none.
        shared_gate: Its result is multiplied by the sigmoid of a linear function of the token.

    Examples:
        >>> import jaxhess
        >>> jaxhess.models.ExpertsConfig(num_experts=8, top_k=2, mlp_dim=64).top_k
        2

    Raises:
        InputError: A number is out of range, or two contradict each other.
    """

    num_experts: int
    top_k: int
    mlp_dim: int
    layers: tuple[bool, ...] = ()
    scores: Literal["softmax", "sigmoid", "softmax of chosen"] = "softmax"
    renormalized: bool = False
    scale: float = 1.0
    selection_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best two"] = "best"
    router_bias: bool = False
    bias: bool = False
    shared_dim: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "mlp_dim", "groups", "top_groups"):
            if not 1 <= getattr(self, name) < 2**31:
                raise InputError(f"experts {name} is {getattr(self, name)}; it must be at least 1 and below 2^31.")
        if self.scores not in ("softmax", "sigmoid", "softmax of chosen"):
            raise InputError(f"The router's scores are {self.scores!r}; known are softmax, sigmoid, softmax of chosen.")
        if self.group_score not in ("best", "best two"):
            raise InputError(f"The groups' score is {self.group_score!r}; known are best and best two.")
        if self.num_experts % self.groups or self.top_groups > self.groups:
            raise InputError(
                f"{self.num_experts} experts cannot be chosen from {self.top_groups} of {self.groups} groups: the "
                "groups must be of equal size, and no more than there are."
            )
        if self.groups > 1 and self.group_score == "best two" and self.groups == self.num_experts:
            raise InputError(f"{self.groups} groups of one expert each have no best two.")
        if self.top_k > self.num_experts // self.groups * self.top_groups:
            among = self.num_experts // self.groups * self.top_groups
            raise InputError(f"top_k={self.top_k} experts cannot be chosen from {among} of {self.num_experts}.")
        if not 0 < abs(self.scale) <= LARGEST:
            raise InputError(f"experts scale is {self.scale}; it must be a number other than 0.")
        if self.shared_dim < 0 or (self.shared_gate and not self.shared_dim):
            raise InputError(f"shared_dim is {self.shared_dim}; it must be 0 or more, and positive with a shared gate.")


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
        model_type: Name in `transformers` of the architecture that it was read from, whose names its tensors have when
            they are written. No part of what is computed: two configurations that differ in it alone are equal.

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
    model_type: str | None = dataclasses.field(default=None, compare=False)

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
