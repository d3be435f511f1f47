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
from jaxhess.vectors import random_key
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
            relative difference from the exact product's over steps and probes; of the data, for trace and norm, without
            the probes' noise (`data_deviation`).
        by_step: [steps, 4] that of each step.
        counts: [3] how many values each variation is over.
        effective: tr(H)^2 / |H|_F^2: about how many equal eigenvalues would have this trace and norm.
        effective_error: Standard error of its logarithm over the probes.
        noise: [4] the variance over samples with the probes' noise, over that without it; one where it is not removed.
    """

    rung: Rung
    parameters: int
    loss: float
    values: Array
    variation: Array
    by_step: Array
    counts: tuple[int, int, int]
    effective: float
    effective_error: float
    noise: Array

    def pooled(self, cause: str) -> float:
        """The geometric mean of the variation over `POOLED` statistics."""
        row = self.variation[CAUSES.index(cause)][list(POOLED[cause])]
        return float(np.exp(np.log(row).mean())) if (row > 0).all() else math.nan

    def log_error(self, cause: str) -> float:
        """Standard error of the logarithm of a standard deviation over so many values, as if normal.

        Where noise was removed, its own scatter stays: the error is larger by as much as the variance with the noise
        is. Of the mean over statistics, as if their errors were one.
        """
        error = 1 / math.sqrt(2 * (self.counts[CAUSES.index(cause)] - 1))
        return error * float(self.noise[list(POOLED[cause])].mean()) if cause == "data" else error


COMPARED = 2
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


def traces_and_norms(operator: jaxhess.LinearOperator, steps: int, probes: int, seed: int) -> Array:
    """[probes, 2] of the same, trace and Frobenius norm, by one step each of the program that takes `steps`."""
    found = []
    for k in range(probes):
        v = jaxhess.random_probe(jax.random.fold_in(random_key(seed), k), operator.shape_dtype)
        state = jaxhess.lanczos_segment(operator, jaxhess.start_lanczos([v], steps), 1)
        alpha, beta = (float(np.asarray(x).flat[0]) for x in (state.alphas, state.betas))
        found.append((operator.dim * alpha, math.sqrt(operator.dim) * math.hypot(alpha, beta)))
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
        probes: Of which the scatter of trace and norm is that by the probe. Half of them, two at least, are used on
            every sample; the largest and smallest Ritz value of a sample are those of one probe. Steps are compared
            with `COMPARED` others.
        seed: Of all probes.
    """
    loss, params = trained.task.loss, trained.params
    hessians = [jaxhess.Hessian(loss, params, [sample]) for sample in samples]
    by_probe = traces_and_norms(hessians[0], steps, probes, seed)
    shared = max(2, probes // 2)
    others = [traces_and_norms(hessian, steps, shared, seed) for hessian in hessians[1:]]
    by_data, noise = data_deviation(np.stack([by_probe[:shared], *others]))
    exact = statistics(hessians[0], steps, COMPARED, seed)
    extremes = np.concatenate([exact[:1], *(statistics(hessian, steps, 1, seed) for hessian in hessians[1:])])[:, 2:]
    away = []
    for step in grid:
        difference = jaxhess.FiniteDifferenceHessian(loss, params, [samples[0]], step=step)
        away.append(statistics(difference, steps, COMPARED, seed) / exact - 1)
    squares = np.mean(np.square(away), axis=1)
    mean = np.append(by_probe.mean(0), exact.mean(0)[2:])
    scatter = np.append(relative_deviation(by_probe), relative_deviation(exact)[2:])
    traces, squared = by_probe[:, 0], by_probe[:, 1] ** 2
    share = 2 * traces / traces.mean() - squared / squared.mean()  # of each probe in the logarithm, by the delta method
    return Stability(
        trained.rung,
        trained.parameters,
        trained.loss,
        mean,
        np.stack([np.sqrt(squares.mean(0)), np.append(by_data, relative_deviation(extremes)), scatter]),
        np.sqrt(squares),
        (len(grid) * COMPARED, len(samples), probes),
        float(traces.mean() ** 2 / squared.mean()),
        float(share.std(ddof=1) / math.sqrt(probes)),
        np.append(noise, np.ones(2)),
    )


def data_deviation(values: Array) -> tuple[Array, Array]:
    """Relative standard deviation over samples of what does not depend on the probe, and what the noise adds.

    The mean over P probes of n v'H_s v varies with the sample s by tr(H_s), and by 1/P times the probes' noise in
    H_s less its mean over samples. That noise is the interaction of a two-way layout of samples and probes, whose
    variance is taken off.

    Args:
        values: [samples, probes, statistics], the same probes for all samples; two or more of both.

    Returns:
        [statistics] the deviation, zero where nothing is left; [statistics] the variance before over that after.
    """
    by_sample = values.mean(1)
    rest = values - by_sample[:, None] - values.mean(0) + values.mean((0, 1))
    samples, probes, _ = values.shape
    interaction = np.square(rest).sum((0, 1)) / ((samples - 1) * (probes - 1))
    before = by_sample.var(0, ddof=1)
    after = np.maximum(before - interaction / probes, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(after) / np.abs(by_sample.mean(0)), np.where(after > 0, before / after, np.inf)


def relative_deviation(values: Array) -> Array:
    """Standard deviation over the first axis, over the absolute mean."""
    return values.std(axis=0, ddof=1) / np.abs(values.mean(0))


def exponents(scales: Sequence[Sequence[float]], found: Sequence[Stability], cause: str) -> list[Slope]:
    """The exponents of the pooled variation of a cause, by `powers`."""
    return powers(scales, [f.pooled(cause) for f in found], [f.log_error(cause) for f in found])


def powers(scales: Sequence[Sequence[float]], values: Sequence[float], errors: Sequence[float]) -> list[Slope]:
    """The exponent of values in each of these scales, all fitted together by least squares of logarithms.

    Errors are the larger of two: what the sampling of the values alone gives, and Student's t with the scatter around
    the fit, where there are more values than exponents and one. NaN, with no error, where a value has no logarithm.

    Args:
        scales: For every exponent a number of each model.
        values: Of each model.
        errors: Standard errors of the values' logarithms.
    """
    design = np.stack([np.ones(len(values)), *np.log(scales)], axis=1)
    if not (np.isfinite(values).all() and np.min(values) > 0 and np.isfinite(errors).all()):
        return [Slope(math.nan, 0.0) for _ in scales]
    y, solver = np.log(values), np.linalg.pinv(design)
    found = solver @ y
    half = 1.96 * np.sqrt(np.square(solver) @ np.square(errors))
    if (freedom := len(values) - len(found)) > 0:
        residual = math.sqrt(float(np.sum((y - design @ found) ** 2)) / freedom)
        half = np.maximum(half, student_factor(freedom, 0.95) * residual * np.sqrt(np.square(solver).sum(1)))
    return [Slope(float(v), float(e)) for v, e in zip(found[1:], half[1:], strict=True)]


def predicted_by_probe(found: Stability) -> float:
    """The relative deviation of the trace over probes that the sphere gives: sqrt(2 n / (n + 2)) / sqrt(effective).

    Var(n v'Hv) = 2 n / (n + 2) (|H|_F^2 - tr(H)^2 / n) for v uniform on the sphere.
    """
    n = found.parameters
    return math.sqrt(max(0.0, 2 * n / (n + 2) * (1 / found.effective - 1 / n)))


def parts(data: Any, count: int, size: int) -> list[Any]:
    """Disjoint samples of so many sequences, evenly spread over the data."""
    return [jax.tree.map(lambda x, k=k: x[k :: len(x) // size][:size], data) for k in range(count)]
