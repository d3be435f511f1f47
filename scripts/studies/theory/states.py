"""Networks at parts of their training, with the norms of their Hessians' blocks, and what is read off those."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.flatten_util import ravel_pytree

from scripts.studies.theory import blocks, training

Array = npt.NDArray[np.float64]

PARTS = (0.0, 0.1, 0.5, 1.0)
"""Of the training, as in the talk's maps."""


class Training(NamedTuple):
    """How networks are trained: steps of Adam, its rate, the seed of everything."""

    steps: int
    rate: float
    seed: int


class State(NamedTuple):
    """A network with one hidden layer after a part of its training."""

    loss: float
    norms: blocks.SquaredNorms

    @property
    def circulant(self) -> float:
        """Norm of the columns i between w_i and v_j, over that of the Hessian, with their transpose."""
        return float(np.sqrt(2 * self.norms.circulant / self.norms.total))

    @property
    def structured(self) -> float:
        """Share of the squared norm in diagonal blocks and those columns."""
        kept = self.norms.ww.trace() + self.norms.vv.trace() + 2 * self.norms.circulant
        return float(kept / self.norms.total)

    @property
    def numbers(self) -> dict[str, float]:
        """For tables and the record."""
        n = self.norms
        squares = {"H": n.total, "ww": n.ww.sum(), "vv": n.vv.sum(), "columns_i": n.circulant, "others": n.rest}
        return {
            "loss": self.loss,
            **{f"norm_{name}": float(np.sqrt(x)) for name, x in squares.items()},
            "off_diagonal_ww": off_diagonal(n.ww),
            "off_diagonal_vv": off_diagonal(n.vv),
            "block_ratio_ww": block_ratio(n.ww),
            "block_ratio_vv": block_ratio(n.vv),
            "structured": self.structured,
        }


class Deep(NamedTuple):
    """A four-layer network at the start and at the end: squared norms [neurons, neurons] and losses."""

    maps: list[Array]
    losses: list[float]


def off_diagonal(squared: Array) -> float:
    """Share of the sum that is not in diagonal blocks, of squared norms [blocks, blocks]."""
    return float(1 - squared.trace() / squared.sum())


def block_ratio(squared: Array) -> float:
    """Root mean square of the other blocks' norms over that of the diagonal ones', from squared norms."""
    return float(np.sqrt((squared.sum() / squared.trace() - 1) / (len(squared) - 1)))


def gaussian(inputs: int, samples: int, seed: int, repeat: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Data, random labels, as many classes as inputs, and a key."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), repeat), 3)
    return jax.random.normal(keys[0], (samples, inputs)), jax.random.randint(keys[1], (samples,), 0, inputs), keys[2]


def two_layers(width: int, units: int, samples: int, how: Training, repeat: int) -> list[State]:
    """The network with one hidden layer, after every part."""
    X, labels, key = gaussian(width, samples, how.seed, repeat)
    weights = training.initialize(key, (width, units, width))
    trained = training.train(weights, X, labels, how.steps, how.rate, PARTS)
    exact, classes = np.asarray(X, np.float64), np.asarray(labels)
    squares = blocks.squared_gram(exact)

    def norms(weights: training.Weights) -> blocks.SquaredNorms:
        W, V = (np.asarray(x, np.float64) for x in weights)
        return blocks.network_norms(exact, classes, W, V, squares)

    return [State(snapshot.loss, norms(snapshot.weights)) for snapshot in trained]


def four_layers(width: int, samples: int, how: Training, repeat: int) -> Deep:
    """The network with four layers, before and after."""
    X, labels, key = gaussian(width, samples, how.seed, repeat)
    weights = training.initialize(key, (width,) * 5)
    trained = training.train(weights, X, labels, how.steps, how.rate, (0.0, 1.0))
    return Deep([training.block_map(x.weights, X, labels) for x in trained], [x.loss for x in trained])


def twin(width: int, units: int, how: Training) -> tuple[list[Array], dict[str, float]]:
    """The dense Hessian of a small network after every part, ten samples for each input; and the talk's equations.

    Those are compared with the Hessian at the start: (8) by its norm, and column i of H_{w_i v_j} by the median over j
    of the relative distance, with i the first.
    """
    n, m = width, units
    with jax.enable_x64(True):
        X, labels, key = gaussian(n, 10 * n, how.seed, 0)
        trained = training.train(training.initialize(key, (n, m, n)), X, labels, how.steps, how.rate, PARTS)
        dense = [hessian(lambda w: training.loss(w, X, labels), x.weights) for x in trained]
        W, V = trained[0].weights
        one_hot = jax.nn.one_hot(labels, n)

        def squared_error(weights: training.Weights) -> jax.Array:
            return ((jax.nn.relu(X @ weights[0].T) @ weights[1].T - one_hot) ** 2).sum(1).mean()

        corner = hessian(squared_error, trained[0].weights)[:n, :n]
    x, w, v, y = (np.asarray(z, np.float64) for z in (X, W, V, one_hot))
    h = blocks.hidden(x, w, v)
    active = x * h.active[:, :1]
    equation_8 = (v[:, 0] ** 2).sum() * active.T @ active / len(x)
    columns = dense[0][:n, m * n :].reshape(n, n, m)[:, :, 0]
    talk = active.T @ ((h.probabilities - y) @ v[:, :1]) / len(x)
    ours = active.T @ (h.probabilities - y) / len(x)
    size = np.linalg.norm(columns, axis=0)
    return dense, {
        "equation_8_factor": float(np.linalg.norm(corner) / np.linalg.norm(equation_8)),
        "columns_from_the_talk": float(np.median(np.linalg.norm(columns - talk, axis=0) / size)),
        "columns_from_ours": float(np.median(np.linalg.norm(columns - ours, axis=0) / size)),
    }


def hessian(loss: Callable[[training.Weights], jax.Array], weights: training.Weights) -> Array:
    """Dense, of all weights one after the other."""
    flat, unravel = ravel_pytree(weights)
    return np.asarray(jax.jit(jax.hessian(lambda x: loss(unravel(x))))(flat))
