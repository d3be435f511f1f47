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
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    """Context length before extension (`llama3`, `yarn`, and the length below which `dynamic` changes nothing)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Factor on cos and sin (`yarn`), already resolved from the checkpoint's `mscale` settings."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise InputError(f"rope {name} is {getattr(self, name)}; it must be positive and at most {LARGEST:g}.")
        if self.kind in ("dynamic", "llama3", "yarn") and not 1 <= (self.original_max_positions or 0) < 2**31:
            raise InputError(f"original_max_positions is {self.original_max_positions}; it must be positive.")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}."
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast <= LARGEST:
            raise InputError(f"beta_slow={self.beta_slow} must be positive and at most beta_fast={self.beta_fast}.")


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
        norm: RMSNorm or LayerNorm (with bias).
        norm_eps: Added to the variance.
        activation: `gelu` is the exact one, `gelu_tanh` the tanh approximation.
        gated_mlp: `down(act(gate x) * up x)` instead of `down(act(up x))`.
        parallel_residual: `x + attention(norm1 x) + mlp(norm2 x)` instead of one after the other.
        rope: Rotary positions, or None for learned absolute positions.
        qkv_bias, out_bias, mlp_bias: Which projections have a bias.
        qk_norm: RMSNorm on every query and key head before the rotation.
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
    activation: Activation = "silu"
    gated_mlp: bool = True
    parallel_residual: bool = False
    rope: RopeConfig | None = RopeConfig()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    tied_embeddings: bool = False
    dtype: str = "float32"
    query_chunk: int = 256
    attention: Literal["auto", "plain", "fused"] = "auto"
    remat: Remat = True

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
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise InputError(f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers.")
        if self.sliding_window is not None and not 1 <= self.sliding_window < 2**31:
            raise InputError(f"sliding_window is {self.sliding_window}; it must be at least 1, or None for no window.")
        if self.rope is not None and (self.rotary_dims % 2 or not 0 < self.rotary_dims <= self.head_dim):
            raise InputError(
                f"{self.rotary_dims} rotary dimensions: must be even and at most head_dim={self.head_dim}."
            )

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

    def to_dict(self) -> dict[str, Any]:
        """This config as JSON-able data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderConfig:
        """The config that `to_dict` wrote."""
        data = dict(data)
        if data.get("rope") is not None:
            data["rope"] = RopeConfig(**data["rope"])
        data["sliding_layers"] = tuple(data.get("sliding_layers", ()))
        return cls(**data)
