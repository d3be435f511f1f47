"""How much global statistics of a Hessian vary with the step of finite differences, the data's sample and the probe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.krylov.errors import student_factor
from jaxhess.vectors import dot, norm, random_key
from scripts.studies.scales.ladder import Rung, TrainedRung

Array = npt.NDArray[np.float64]

STATISTICS = ("trace", "Frobenius norm", "largest", "smallest")
CAUSES = ("step", "data", "probe")
POOLED = {"step": (0, 1, 2), "data": (0, 1, 2), "probe": (0, 1)}
"""Statistics whose variation is pooled, by cause. Extreme Ritz values that have converged do not vary with the probe;
the smallest one is small beside the errors of finite differences."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stability:
    """Of one model.

    Attributes:
        rung: Which.
        parameters: In all.
        loss: After training, nats per byte.
        values: [4] `STATISTICS`, mean over probes.
        variation: [3, 4] relative standard deviation, by `CAUSES` and `STATISTICS`; of the step, the root mean square
            relative difference from the exact product's over steps and probes.
        by_step: [steps, 4] that of each step.
        counts: [3] how many values each variation is over.
        effective: tr(H)^2 / |H|_F^2: about how many equal eigenvalues would have this trace and norm.
    """

    rung: Rung
    parameters: int
    loss: float
    values: Array
    variation: Array
    by_step: Array
    counts: tuple[int, int, int]
    effective: float

    def pooled(self, cause: str) -> float:
        """The geometric mean of the variation over `POOLED` statistics."""
        row = self.variation[CAUSES.index(cause)][list(POOLED[cause])]
        return float(np.exp(np.log(row).mean())) if (row > 0).all() else math.nan

    def log_error(self, cause: str) -> float:
        """Standard error of the logarithm of a standard deviation over so many values, as if normal."""
        return 1 / math.sqrt(2 * (self.counts[CAUSES.index(cause)] - 1))


COMPARED = 3
"""Probes with which finite differences are compared with exact products."""


class Slope(NamedTuple):
    """Exponent of a variation, and its 95% error."""

    exponent: float
    error: float


def statistics(operator: jaxhess.LinearOperator, steps: int, probes: int, seed: int) -> Array:
    """[probes, 4] `STATISTICS` that each probe gives alone."""
    found = jaxhess.spectrum(operator, steps=steps, probes=probes, seed=seed, batch_size=1)
    second = found.alphas[:, 0] ** 2 + found.betas[:, 0] ** 2
    theta = found.ritz_values
    return np.stack(
        [found.dim * found.alphas[:, 0], np.sqrt(found.dim * second), np.nanmax(theta, 1), np.nanmin(theta, 1)], axis=1
    )


def traces_and_norms(operator: jaxhess.LinearOperator, probes: int, seed: int) -> Array:
    """[probes, 2] trace and Frobenius norm that each probe gives alone, by one product."""
    found = []
    for k in range(probes):
        v = jaxhess.random_probe(jax.random.fold_in(random_key(seed), k), operator.shape_dtype)
        product = operator @ v
        length = float(norm(v))
        shares = float(dot(v, product)) / length**2, float(norm(product)) / length
        found.append((operator.dim * shares[0], math.sqrt(operator.dim) * shares[1]))
    return np.array(found)


def stability(
    trained: TrainedRung, samples: Sequence[Any], grid: Sequence[float], steps: int, probes: int, seed: int
) -> Stability:
    """The variation of the statistics of a trained model.

    Args:
        trained: The model.
        samples: Disjoint parts of the data of one size; the first one is what steps and probes are compared on.
        grid: Steps per coordinate.
        steps: Lanczos steps.
        probes: Of which the scatter of trace and norm is that by the probe; steps are compared with `COMPARED` others.
        seed: Of all probes.
    """
    loss, params = trained.task.loss, trained.params

    def of(sample: Any, count: int) -> Array:
        return statistics(jaxhess.Hessian(loss, params, [sample]), steps, count, seed)

    exact = of(samples[0], COMPARED)
    data = np.concatenate([exact[:1], *(of(sample, 1) for sample in samples[1:])])
    away = []
    for step in grid:
        difference = jaxhess.FiniteDifferenceHessian(loss, params, [samples[0]], step=step)
        away.append(statistics(difference, steps, COMPARED, seed) / exact - 1)
    squares = np.mean(np.square(away), axis=1)
    by_probe = traces_and_norms(jaxhess.Hessian(loss, params, [samples[0]]), probes, seed)
    mean = np.append(by_probe.mean(0), exact.mean(0)[2:])
    scatter = np.append(relative_deviation(by_probe), relative_deviation(exact)[2:])
    return Stability(
        trained.rung,
        trained.parameters,
        trained.loss,
        mean,
        np.stack([np.sqrt(squares.mean(0)), relative_deviation(data), scatter]),
        np.sqrt(squares),
        (len(grid) * COMPARED, len(data), probes),
        float(mean[0] ** 2 / np.mean(by_probe[:, 1] ** 2)),
    )


def relative_deviation(values: Array) -> Array:
    """Standard deviation over the first axis, over the absolute mean."""
    return values.std(axis=0, ddof=1) / np.abs(values.mean(0))


def exponents(scales: Sequence[Sequence[float]], found: Sequence[Stability], cause: str) -> list[Slope]:
    """The exponent of the pooled variation in each of these scales, all fitted together by least squares of logarithms.

    Errors are the larger of two: what the sampling of the variations alone gives, and Student's t with the scatter
    around the fit, where there are more models than exponents and one.

    Args:
        scales: For every exponent a number of each model.
        found: The models.
        cause: Of the variation.
    """
    design = np.stack([np.ones(len(found)), *np.log(scales)], axis=1)
    y = np.log([f.pooled(cause) for f in found])
    values = np.linalg.lstsq(design, y)[0]
    spread = np.sqrt(np.diag(np.linalg.pinv(design.T @ design)))
    half = 1.96 * math.sqrt(np.mean([f.log_error(cause) ** 2 for f in found]))
    if (freedom := len(found) - len(values)) > 0:
        residual = math.sqrt(float(np.sum((y - design @ values) ** 2)) / freedom)
        half = max(half, student_factor(freedom, 0.95) * residual)
    return [Slope(float(v), float(half * e)) for v, e in zip(values[1:], spread[1:], strict=True)]


def predicted_by_probe(found: Stability) -> float:
    """The relative deviation of the trace over probes that the sphere gives: sqrt(2 n / (n + 2)) / sqrt(effective).

    Var(n v'Hv) = 2 n / (n + 2) (|H|_F^2 - tr(H)^2 / n) for v uniform on the sphere.
    """
    n = found.parameters
    return math.sqrt(max(0.0, 2 * n / (n + 2) * (1 / found.effective - 1 / n)))


def parts(data: Any, count: int, size: int) -> list[Any]:
    """Disjoint samples of so many sequences, evenly spread over the data."""
    return [jax.tree.map(lambda x, k=k: x[k :: len(x) // size][:size], data) for k in range(count)]
