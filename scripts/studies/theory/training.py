"""Networks on Gaussian data with random labels, trained with Adam, and norms of their Hessians' blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax.flatten_util import ravel_pytree

Array = npt.NDArray[np.float64]
Weights = tuple[jax.Array, ...]
"""Of every layer, [outputs, inputs]."""


class Snapshot(NamedTuple):
    """Weights after a part of the training, and their mean cross-entropy."""

    part: float
    weights: Weights
    loss: float


def initialize(key: jax.Array, sizes: Sequence[int]) -> Weights:
    """LeCun's initialisation: variance one over the inputs. `sizes` are inputs, hidden layers, classes."""
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(jax.random.normal(k, (b, a)) / np.sqrt(a) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True))


def loss(weights: Weights, X: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of a network with rectified units."""
    for matrix in weights[:-1]:
        X = jax.nn.relu(X @ matrix.T)
    return optax.softmax_cross_entropy_with_integer_labels(X @ weights[-1].T, labels).mean()


def train(
    weights: Weights, X: jax.Array, labels: jax.Array, steps: int, rate: float, parts: Sequence[float]
) -> list[Snapshot]:
    """Snapshots after these ascending parts of the steps of Adam, on all samples and with a constant rate."""
    optimizer = optax.adam(rate)

    @jax.jit
    def advance(state: tuple[Weights, optax.OptState], count: jax.Array) -> tuple[Weights, optax.OptState]:
        def step(_: int, state: tuple[Weights, optax.OptState]) -> tuple[Weights, optax.OptState]:
            updates, moments = optimizer.update(jax.grad(loss)(state[0], X, labels), state[1])
            return optax.apply_updates(state[0], updates), moments

        return jax.lax.fori_loop(0, count, step, state)

    found, state, done = [], (weights, optimizer.init(weights)), 0
    for part in parts:
        target = round(part * steps)
        state = advance(state, jnp.asarray(target - done))
        done = target
        found.append(Snapshot(part, state[0], float(loss(state[0], X, labels))))
    return found


def neuron_blocks(weights: Weights) -> npt.NDArray[np.int_]:
    """[parameters] the block of every weight: one for each neuron, of all weights into it."""
    counts = [matrix.shape[1] for matrix in weights for _ in range(matrix.shape[0])]
    return np.repeat(np.arange(len(counts)), counts)


def block_map(weights: Weights, X: jax.Array, labels: jax.Array, batch: int = 64) -> Array:
    """[neurons, neurons] squared norms of the Hessian's blocks, by products with all unit vectors, `batch` at once."""
    block = jnp.asarray(neuron_blocks(weights))
    count, size = int(block[-1]) + 1, len(block)
    columns = [
        np.asarray(_squares(weights, X, labels, block, first, min(batch, size - first), count), np.float64)
        for first in range(0, size, batch)
    ]
    found = np.zeros((count, count))
    np.add.at(found.T, np.asarray(block), np.concatenate(columns, axis=1).T)
    return found


@functools.partial(jax.jit, static_argnames=("size", "count"))
def _squares(
    weights: Weights, X: jax.Array, labels: jax.Array, block: jax.Array, first: int, size: int, count: int
) -> jax.Array:
    """[count, size] sums over blocks of the squared entries of so many columns of the Hessian."""
    flat, unravel = ravel_pytree(weights)
    slope = jax.grad(lambda x: loss(unravel(x), X, labels))
    units = jax.nn.one_hot(first + jnp.arange(size), flat.size, dtype=flat.dtype)
    products = jax.vmap(lambda v: jax.jvp(slope, (flat,), (v,))[1])(units)
    return jax.ops.segment_sum(jnp.square(products).T, block, count)
