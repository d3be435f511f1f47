"""Small decoders, trained for a moment on letters, with their whole Hessian and Gauss-Newton matrices in float64."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import jaxhess
from jaxhess.data import TokenBatch
from jaxhess.errors import InputError
from jaxhess.models import LanguageModel, NextTokenLoss, initialize

Array = npt.NDArray[np.float64]
LETTERS = 27
"""Tokens: a to z, and one for everything else."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    width: int
    """Of the residual stream; the feed-forward is twice as wide."""
    layers: int
    """Transformer layers."""
    heads: int
    """Attention heads, each of an even width."""

    def config(self, length: int) -> jaxhess.DecoderConfig:
        """A Llama of these sizes, for so many predicted tokens.

        Raises:
            InputError: The heads do not divide the width into even parts.
        """
        if self.heads < 1 or self.width % (2 * self.heads):
            raise InputError(f"{self.heads} heads do not divide a width of {self.width} into parts of even width.")
        return jaxhess.DecoderConfig(
            vocab_size=LETTERS,
            embed_dim=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.width // self.heads,
            mlp_dim=2 * self.width,
            max_positions=length,
            remat=False,
        )


@dataclasses.dataclass(frozen=True)
class DenseProblem:
    """The curvature of one model, dense, and vectors that it is to be applied to.

    Attributes:
        name: Of the model.
        operators: Hessian and Gauss-Newton matrix by their names.
        matrices: The same, [n, n] float64, in the order of `ravel_pytree`.
        blocks: By matrices.
        gradient: [n] of the mean loss that the curvature is of.
        sequence_gradients: [m, n] of the mean losses of single sequences that the curvature is not of.
        loss: Mean, in nats per token.
        model: None where only some of its parameters are free.
    """

    name: str
    operators: dict[str, jaxhess.LossOperator]
    matrices: dict[str, Array]
    blocks: jaxhess.Blocks
    gradient: Array
    sequence_gradients: Array
    loss: float
    model: LanguageModel | None = None

    @property
    def dim(self) -> int:
        """Rows of the matrices, n."""
        return self.gradient.size


def letters(path: Path) -> npt.NDArray[np.int32]:
    """A text as letters 1 to 26; runs of anything else are one 0.

    Raises:
        InputError: There is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace").lower()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32) - ord("a") + 1
    codes = np.where((codes >= 1) & (codes < LETTERS), codes, 0)
    return codes[(codes > 0) | (np.append(1, codes[:-1]) > 0)]


def sequences(ids: npt.NDArray[np.int32], count: int, length: int, start: int) -> npt.NDArray[np.int32]:
    """[count, length + 1] tokens from the sequence with number `start` on.

    Raises:
        InputError: The text is too short.
    """
    size = length + 1
    part = ids[start * size : (start + count) * size]
    if part.size < count * size:
        raise InputError(f"The text has {ids.size:,} letters; these sequences take {(start + count) * size:,}.")
    return part.reshape(count, size)


def batch_of(rows: npt.NDArray[np.int32]) -> TokenBatch:
    """Sequences of which every token counts."""
    return TokenBatch(jnp.asarray(rows), jnp.ones((rows.shape[0], rows.shape[1] - 1)))


def trained(
    shape: Shape, ids: npt.NDArray[np.int32], length: int, steps: int, seed: int, batch: int = 32
) -> LanguageModel:
    """A model after so many steps of Adam on random pieces of the text; 0 steps: as it was initialised."""
    model = initialize(shape.config(length), jaxhess.vectors.random_key(seed))
    if steps == 0:
        return model
    starts = np.random.default_rng(seed).integers(0, ids.size - length - 1, (steps, batch))
    pieces = ids[starts[..., None] + np.arange(length + 1)]
    return dataclasses.replace(model, params=_trained(model.loss(), model.params, jnp.asarray(pieces)))


@functools.partial(jax.jit, static_argnums=0)
def _trained(loss: NextTokenLoss, params: Any, pieces: jax.Array) -> Any:
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, len(pieces) // 10, len(pieces), 1e-4))

    def mean(params: Any, tokens: jax.Array) -> jax.Array:
        total, count = loss(params, TokenBatch(tokens, jnp.ones((tokens.shape[0], tokens.shape[1] - 1))))
        return total / count

    def step(carry: tuple[Any, Any], tokens: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(mean)(params, tokens), state, params)
        return (jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), pieces)[0][0]


def problem(
    name: str, model: LanguageModel, rows: npt.NDArray[np.int32], held_out: npt.NDArray[np.int32], *free: str
) -> DenseProblem:
    """The curvature of a model's mean loss over these sequences, in float64 (JAX must be in 64-bit mode).

    Args:
        name: Of the model.
        model: In any dtype.
        rows: [sequences, tokens + 1], whose loss it is.
        held_out: Likewise: sequences for gradients.
        free: Patterns of the free parameters, as in `LossOperator.restrict`; none: all are.
    """
    batches = [batch_of(rows)]
    kinds = {"Hessian": jaxhess.Hessian, "Gauss-Newton": jaxhess.GaussNewton}
    operators: dict[str, jaxhess.LossOperator] = {}
    for kind, make in kinds.items():
        operator = make(model.loss(), model.params, batches, accumulation_dtype="float64").in_dtype("float64")
        operators[kind] = operator.restrict(*free) if free else operator
    hessian = operators["Hessian"]
    matrices = {}
    for kind, operator in operators.items():
        dense = np.array(operator.to_matrix(batch_size=32))
        matrices[kind] = (dense + dense.T) / 2  # symmetric up to rounding
    gradient = jax.jit(lambda operator: operator.value_and_gradient())
    loss, mean = gradient(hessian)
    each = jax.jit(jax.vmap(lambda tokens: _sequence_gradient(hessian, tokens)))(jnp.asarray(held_out))
    return DenseProblem(
        name,
        operators,
        matrices,
        jaxhess.Blocks.by(hessian.shape_dtype, "matrices", stacks=getattr(hessian.loss, "stacks", None)),
        np.array(jax.flatten_util.ravel_pytree(mean)[0]),
        np.array(each),
        float(loss),
        None if free else dataclasses.replace(model, params=hessian.params, config=hessian.loss.config),  # type: ignore[attr-defined]
    )


def _sequence_gradient(hessian: jaxhess.LossOperator, tokens: jax.Array) -> jax.Array:
    batch = TokenBatch(tokens[None], jnp.ones((1, tokens.size - 1)))
    gradient, count = hessian.gradient_sum(hessian.free, batch)
    return jax.flatten_util.ravel_pytree(gradient)[0] / count
