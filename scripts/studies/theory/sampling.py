"""Norms of blocks at random initialisation, over repetitions, and estimates from them with their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from scipy.stats import t as student

from scripts.studies.theory import blocks

Array = npt.NDArray[np.float64]

KINDS = ("linear, CE", "hidden weights, MSE", "hidden weights, CE", "output weights, CE")
"""Of the norms: which layer of which model, and the loss."""


class Measured(NamedTuple):
    """An estimate and half the width of its 95% interval."""

    value: float
    error: float


def jackknife(function: Callable[[Array], float], replicates: Array) -> Measured:
    """A function of the mean over independent replicates, [replicates, ...]; its error by leaving each out in turn."""
    count = len(replicates)
    total = replicates.sum(0)
    left_out = np.array([function((total - replicate) / (count - 1)) for replicate in replicates])
    error = np.sqrt((count - 1) * np.mean((left_out - left_out.mean()) ** 2))
    return Measured(float(function(total / count)), float(student.ppf(0.975, count - 1) * error))


def mean(values: Sequence[float] | Array) -> Measured:
    """Over independent repeats."""
    error = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return Measured(float(np.mean(values)), float(error))


def exponent(classes: Sequence[int], ratios: Array) -> float:
    """Of the power of C nearest to the ratios."""
    return float(np.polyfit(np.log(classes), np.log(ratios), 1)[0])


def replicates(
    width: int, samples: int, units: int, classes: Sequence[int], draws: int, repeats: int, seed: int
) -> Array:
    """[repeats, classes, kinds, 2] mean squared norms of diagonal blocks and of the others; new data in every repeat.

    Hidden weights have `draws` draws of W and V in every repeat, for their norms vary much from one to the next.
    """
    found = np.empty((repeats, len(classes), len(KINDS), 2))
    for r in range(repeats):
        rng = np.random.default_rng([seed, width, r])
        X = rng.normal(size=(samples, width))
        squares = blocks.squared_gram(X)
        for c, count in enumerate(classes):
            probabilities = softmax(X @ rng.normal(size=(width, count)) / np.sqrt(width), axis=1)
            found[r, c, 0] = blocks.class_means(probabilities, squares)
            hidden = [_hidden(rng, X, squares, units, count, with_output=n == 0) for n in range(draws)]
            found[r, c, 1:] = (
                [np.mean(rows, axis=0) for rows in zip(*(x[:2] for x in hidden), strict=True)] + [hidden[0][2]]
                if draws
                else np.nan
            )
    return found


def _hidden(rng: np.random.Generator, X: Array, squares: Array, m: int, classes: int, with_output: bool) -> list:
    """Mean squared norms (diagonal, others): hidden weights, squared error and cross-entropy; output weights."""
    W, V = rng.normal(size=(m, X.shape[1])) / np.sqrt(X.shape[1]), rng.normal(size=(classes, m)) / np.sqrt(m)
    h = blocks.hidden(X, W, V)
    pairs = blocks.hidden_norms(blocks.active_pairs(h.active), squares)
    found = [pairs * (2 * V.T @ V) ** 2, blocks.hidden_norms(blocks.hidden_coefficients(h, V), squares)]
    means = [(x.trace() / m, (x.sum() - x.trace()) / (m * (m - 1))) for x in found]
    return means + [blocks.class_means(h.probabilities, h.features @ h.features.T) if with_output else None]
