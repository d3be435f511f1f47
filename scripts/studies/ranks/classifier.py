"""The rank of a small classifier's Hessian, exactly: dense matrices in float64 over widths, activations and seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.plan.law import power_law
from scripts.training.images import CLASSES, Source, load_images
from scripts.training.short_runs import TrainingTask, adam, mean_loss, sweep

Array = npt.NDArray[np.float64]
Activation = Literal["relu", "gelu"]
INPUTS = 16
NEAR = (1e-2, 1e-3, 1e-4, 1e-6)
"""Distances from zero, relative to the largest eigenvalue, within which eigenvalues are counted."""


@dataclasses.dataclass(frozen=True, eq=False)
class RankCount:
    """Of one trained network.

    Attributes:
        activation, width, seed: Which network.
        parameters: In all.
        neurons: Hidden ones, both layers.
        loss: After training.
        rank: Eigenvalues of the Hessian beyond `tolerance`.
        gauss_newton: The same of the Gauss-Newton matrix.
        tolerance: Below which an eigenvalue may be zero: n eps |H| for eigvalsh (backward stable, with a factor of n)
            and |H - H'|_F for the entries, of which the asymmetry shows the rounding.
        eigenvalues: [n] of the Hessian, ascending.
    """

    activation: Activation
    width: int
    seed: int
    parameters: int
    neurons: int
    loss: float
    rank: int
    gauss_newton: int
    tolerance: float
    eigenvalues: Array = dataclasses.field(repr=False)

    @property
    def symmetries(self) -> int:
        """Directions in which no output changes, whatever the weights: all logits moved alike by the last layer."""
        return self.width + 1

    @property
    def constant(self) -> float:
        """The rank over neurons times classes: the least constant with which the bound is true here."""
        return self.rank / (self.neurons * CLASSES)

    def beyond(self, relative: float) -> int:
        """Eigenvalues farther from zero than so many times the largest."""
        sizes = np.abs(self.eigenvalues)
        return int((sizes > relative * sizes.max()).sum())


def network(activation: Activation, width: int) -> tuple[Callable[[Any, jax.Array], jax.Array], Callable[[int], Any]]:
    """Logits of two hidden layers of one width after 16 inputs, and random parameters by a seed."""
    function = getattr(jax.nn, activation)
    shapes = {"first": (INPUTS, width), "second": (width, width), "head": (width, CLASSES)}

    def logits(params: Any, x: jax.Array) -> jax.Array:
        for name in ("first", "second"):
            x = function(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    def initial(seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {
            name: {"kernel": jax.random.normal(key, shape) * math.sqrt(2 / shape[0]), "bias": jnp.zeros(shape[1])}
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    return logits, initial


def pooled_images(source: Source, count: int) -> tuple[jax.Array, jax.Array]:
    """Images [count, 16], the 8 x 8 ones of `load_images` averaged over 2 x 2 pixels, and their labels."""
    images, labels = load_images(source, count)
    return images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, INPUTS), labels


def count_rank(
    activation: Activation, width: int, seed: int, data: tuple[jax.Array, jax.Array], steps: int
) -> RankCount:
    """Trains the network of a seed by Adam, and counts."""
    logits, initial = network(activation, width)
    loss = jaxhess.SoftmaxCrossEntropy(logits)
    task = TrainingTask("classifier", loss, initial, data, 32)
    params = sweep(task, adam, (1e-2,), (seed,), steps).params[0][0]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        batch = jnp.asarray(data[0], jnp.float64), data[1]
        hessian = np.asarray(jaxhess.Hessian(loss, wide, [batch]).to_matrix(64))
        gauss_newton = np.asarray(jaxhess.GaussNewton(loss, wide, [batch]).to_matrix(64))
    eigenvalues, tolerance = spectrum_of(hessian)
    others, floor = spectrum_of(gauss_newton)
    return RankCount(
        activation,
        width,
        seed,
        len(hessian),
        2 * width,
        mean_loss(task, params),
        int((np.abs(eigenvalues) > tolerance).sum()),
        int((np.abs(others) > floor).sum()),
        tolerance,
        eigenvalues,
    )


def spectrum_of(matrix: Array) -> tuple[Array, float]:
    """[n] eigenvalues of a symmetric matrix, ascending, and how far rounding may have moved them."""
    eigenvalues = np.asarray(np.linalg.eigvalsh((matrix + matrix.T) / 2), np.float64)
    rounding = len(matrix) * np.finfo(np.float64).eps * np.abs(eigenvalues).max()
    return eigenvalues, float(rounding + np.linalg.norm(matrix - matrix.T))


def exponent(counts: list[RankCount], number: Callable[[RankCount], float]) -> tuple[float, float]:
    """Of a number in neurons times classes, by least squares over one seed's widths, and how far it is from a power.

    The second is the largest difference between that exponent and the one between two neighbouring widths.
    """
    counts = sorted(counts, key=lambda c: c.width)
    x, y = [c.neurons * CLASSES for c in counts], [number(c) for c in counts]
    fitted = power_law(x, y).exponent
    return fitted, float(np.abs(np.diff(np.log(y)) / np.diff(np.log(x)) - fitted).max())
