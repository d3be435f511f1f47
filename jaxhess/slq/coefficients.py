"""Lanczos coefficients as a spectrum takes them: checked, in float64, NaN where a probe has taken no more steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.quadrature import Quadrature, quadrature

Array = npt.NDArray[np.float64]


class Coefficients(NamedTuple):
    """Arrays that cannot be written to, as described in `jaxhess.Spectrum`."""

    alphas: Array
    betas: Array
    sizes: npt.NDArray[np.int64]
    step_errors: Array


def checked(
    alphas: npt.ArrayLike, betas: npt.ArrayLike, sizes: npt.ArrayLike, step_errors: npt.ArrayLike
) -> Coefficients:
    """Copies of the coefficients; `step_errors` without entries are zeros.

    Raises:
        InputError: Shapes disagree, a size is outside 1..steps, or an entry within it is not finite (a beta, an error:
            negative). Says where.
    """
    alphas, betas, sizes = np.array(alphas, np.float64), np.array(betas, np.float64), np.array(sizes)
    if alphas.ndim != 2 or 0 in alphas.shape or betas.shape != alphas.shape or sizes.shape != alphas.shape[:1]:
        raise InputError(
            "alphas and betas must be [probes, steps] and sizes [probes], none empty, "
            f"got {alphas.shape}, {betas.shape} and {sizes.shape}"
        )
    if sizes.dtype.kind not in "iu" or sizes.min() < 1 or sizes.max() > alphas.shape[1]:
        raise InputError(f"sizes must be integers from 1 to the number of steps {alphas.shape[1]}, got {sizes}")
    beyond = np.arange(alphas.shape[1]) >= sizes[:, None]
    alphas[beyond] = betas[beyond] = np.nan
    unknown = np.isnan(betas) & (np.arange(alphas.shape[1]) == sizes[:, None] - 1)
    bad = ~beyond & ~(np.isfinite(alphas) & (unknown | (np.isfinite(betas) & (betas >= 0))))
    if bad.any():
        probe, step = np.argwhere(bad)[0]
        raise InputError(
            f"probe {probe} step {step} has alpha {alphas[probe, step]} and beta {betas[probe, step]}: "
            "both must be finite and beta not negative"
        )
    errors = np.array(step_errors, np.float64) if np.size(step_errors) else np.zeros_like(alphas)
    if errors.shape != alphas.shape or not (beyond | (np.isfinite(errors) & (errors >= 0))).all():
        raise InputError(f"step_errors must be [probes, steps], finite and not negative, got {errors}")
    errors[beyond] = np.nan
    found = Coefficients(alphas, betas, sizes.astype(np.int64), errors)
    for array in found:
        array.flags.writeable = False
    return found


def quadratures(found: Coefficients) -> list[Quadrature]:
    """That of every probe, [size] each; residual bounds are NaN where the last beta is not known."""

    def one(alphas: Array, betas: Array, errors: Array) -> Quadrature:
        nodes = quadrature(alphas, np.append(betas[:-1], np.nan_to_num(betas[-1])), errors)
        return nodes._replace(residual_bounds=nodes.residual_bounds * np.nan) if np.isnan(betas[-1]) else nodes

    rows = zip(found.alphas, found.betas, found.step_errors, found.sizes, strict=True)
    return [one(a[:m], b[:m], e[:m]) for a, b, e, m in rows]
