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


def stability(
    trained: TrainedRung, samples: Sequence[Any], grid: Sequence[float], steps: int, probes: int, seed: int
) -> Stability:
    """The variation of the statistics of a trained model.

    Args:
        trained: The model.
        samples: Disjoint parts of the data of one size; the first one is what steps and probes are compared on.
        grid: Steps per coordinate.
        steps: Lanczos steps.
        probes: Of which the scatter is that by the probe, and with the first of which samples are compared.
        seed: Of the probes.
    """
    loss, params = trained.task.loss, trained.params

    def of(sample: Any, count: int) -> Array:
        return statistics(jaxhess.Hessian(loss, params, [sample]), steps, count, seed)

    exact = of(samples[0], probes)
    data = np.concatenate([exact[:1], *(of(sample, 1) for sample in samples[1:])])
    half = max(2, probes // 2)
    away = []
    for step in grid:
        difference = jaxhess.FiniteDifferenceHessian(loss, params, [samples[0]], step=step)
        away.append(statistics(difference, steps, half, seed) / exact[:half] - 1)
    squares = np.mean(np.square(away), axis=1)
    mean = exact.mean(0)
    return Stability(
        trained.rung,
        trained.parameters,
        trained.loss,
        mean,
        np.stack([np.sqrt(squares.mean(0)), relative_deviation(data), relative_deviation(exact)]),
        np.sqrt(squares),
        (len(grid) * half, len(data), probes),
        float(mean[0] ** 2 / np.mean(exact[:, 1] ** 2)),
    )


def relative_deviation(values: Array) -> Array:
    """Standard deviation over the first axis, over the absolute mean."""
    return values.std(axis=0, ddof=1) / np.abs(values.mean(0))


def slope(x: Sequence[float], found: Sequence[Stability], cause: str) -> Slope:
    """The exponent of the pooled variation in x, by least squares of logarithms.

    Its error is the larger of two: what the sampling of the variations alone gives, and Student's t with the scatter
    around the line, where there are three points or more.
    """
    logs, y = np.log(x), np.log([f.pooled(cause) for f in found])
    spread = float(np.sum((logs - logs.mean()) ** 2))
    exponent, intercept = np.polyfit(logs, y, 1)
    sampling = 1.96 * math.sqrt(np.mean([f.log_error(cause) ** 2 for f in found]) / spread)
    freedom = len(x) - 2
    if freedom < 1:
        return Slope(float(exponent), sampling)
    residual = math.sqrt(float(np.sum((y - intercept - exponent * logs) ** 2)) / freedom / spread)
    return Slope(float(exponent), max(sampling, student_factor(freedom, 0.95) * residual))


def predicted_by_probe(found: Stability) -> float:
    """The relative deviation of the trace over probes that the sphere gives: sqrt(2 n / (n + 2)) / sqrt(effective).

    Var(n v'Hv) = 2 n / (n + 2) (|H|_F^2 - tr(H)^2 / n) for v uniform on the sphere.
    """
    n = found.parameters
    return math.sqrt(max(0.0, 2 * n / (n + 2) * (1 / found.effective - 1 / n)))


def parts(data: Any, count: int, size: int) -> list[Any]:
    """Disjoint samples of so many sequences, evenly spread over the data."""
    return [jax.tree.map(lambda x, k=k: x[k :: len(x) // size][:size], data) for k in range(count)]
