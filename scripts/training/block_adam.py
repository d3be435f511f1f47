"""AdamW with one second moment, and so one learning rate, per block of parameters; and partitions for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxhess

ROWS = {
    "attention/value/kernel": (-2, -1),
    "attention/value/bias": (-2, -1),
    "attention/out/kernel": (-1,),
    "attention/out/bias": (-1,),
    "mlp/*/kernel": (-1,),
    "mlp/*/bias": (-1,),
}
"""The axes over output neurons, of the decoder's value, output and feed-forward parameters."""
TOKENS = ("embed/kernel", "head/kernel")
"""Matrices whose rows are tokens."""
HEADS = ("attention/query", "attention/key")
"""Parameters with a block for each attention head, which is their axis before the last."""


class BlockAdamState(NamedTuple):
    """Of `scale_by_block_adam`: steps done, first moments like the parameters, second moments [B]."""

    done: jax.Array
    mu: Any
    nu: jax.Array


def scale_by_block_adam(
    blocks: jaxhess.Blocks, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam's update with the mean of the squared gradient over a block in place of each entry's own square.

    Adam-mini (Zhang et al., ICLR 2025; followed from the authors' code, github.com/zyushun/Adam-mini): the first moment
    is Adam's; the second is an exponential average of `mean(g^2)` over the block, with Adam's bias correction.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from scripts.training.block_adam import scale_by_block_adam
        >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
        >>> rule = scale_by_block_adam(jaxhess.Blocks.by(params, "matrices"))
        >>> update, state = rule.update({"a": jnp.array([3.0, 4.0]), "b": jnp.ones(3)}, rule.init(params))
        >>> [round(float(x), 3) for x in update["a"]], state.nu.shape  # 3 and 4 over sqrt((9 + 16) / 2)
        ([0.849, 1.131], (2,))

    Args:
        blocks: Of the parameters; a block of a single entry is Adam's own rule.
        b1, b2: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.

    Raises:
        InputError: The blocks are those of other parameters (when the state is made).
    """

    def init(params: Any) -> BlockAdamState:
        blocks.check(params)
        return BlockAdamState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jnp.zeros(len(blocks)))

    def update(gradient: Any, state: BlockAdamState, params: Any = None) -> tuple[Any, BlockAdamState]:
        done = state.done + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradient)
        nu = b2 * state.nu + (1 - b2) * blocks.dot(gradient, gradient) / blocks.sizes
        step = 1 / ((jnp.sqrt(nu / (1 - b2**done)) + eps) * (1 - b1**done))
        return jax.tree.map(jnp.multiply, mu, blocks.spread(step, mu)), BlockAdamState(done, mu, nu)

    return optax.GradientTransformation(init, update)


def block_adamw(
    rate: optax.Schedule, blocks: jaxhess.Blocks, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """`optax.adamw` with `scale_by_block_adam`; matrices decay, norms and biases do not."""
    return optax.chain(scale_by_block_adam(blocks), *decay_and_rate(rate, weight_decay))


def adamw(rate: optax.Schedule, weight_decay: float = 0.1) -> optax.GradientTransformation:
    """AdamW of the same decay rates, a second moment for every parameter."""
    return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), *decay_and_rate(rate, weight_decay))


def decay_and_rate(rate: optax.Schedule, weight_decay: float) -> tuple[optax.GradientTransformation, ...]:
    """Decoupled decay of kernels, and the learning rate."""

    def kernels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.add_decayed_weights(weight_decay, mask=kernels), optax.scale_by_learning_rate(rate)


def hessian_blocks(params: Any) -> jaxhess.Blocks:
    """Blocks of a decoder's parameters as its Hessian has them near its diagonal.

    A block for each attention head of queries and keys; for each output neuron of values, attention output and
    feed-forward matrices; for each token of embedding and head; for each array of norms (the labels of the talk's
    figures of transformer Hessians, Part I: `mlp.fc_1 (32 neurons)`, `mlp.proj`, `embed (8 tokens)`, `output`).

    Raises:
        InputError: The parameters lack one of these matrices.
    """
    blocks = jaxhess.Blocks.by(params, "matrices")
    for pattern, axes in ROWS.items():
        for name in [f"*/{pattern}"] if _found(blocks, pattern) else []:
            for axis in axes:
                blocks = blocks.split(name, axis)
    for name in TOKENS:
        blocks = blocks.split(name, 0)
    return _by_heads(blocks)


def authors_blocks(params: Any) -> jaxhess.Blocks:
    """The partition of the authors' published code: every entry of embedding and head, heads of queries and keys, every
    other array whole.

    Raises:
        InputError: The parameters lack one of these matrices.
    """
    blocks = jaxhess.Blocks.by(params, "matrices")
    for name in TOKENS:
        blocks = blocks.split(name, 0).split(name, 1)
    return _by_heads(blocks)


def _by_heads(blocks: jaxhess.Blocks) -> jaxhess.Blocks:
    for name in HEADS:
        for kind in ("kernel", "bias"):
            if _found(blocks, f"{name}/{kind}"):
                blocks = blocks.split(f"*/{name}/{kind}", -2)
    return blocks


def _found(blocks: jaxhess.Blocks, pattern: str) -> bool:
    stem, _, last = pattern.partition("*")
    return any(stem in name and name.endswith(last) for name in blocks.leaf_names)
