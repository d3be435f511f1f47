"""Parts of a `DecoderConfig` that only some models have: rotary positions, latent attention, experts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxhess.errors import InputError

LARGEST = 1e30
"""No factor of rotary positions is larger: far beyond any in use, and within float32 also when multiplied."""


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
