"""Integrals of a function over the spectral measures of all probes: at Ritz values, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError
from jaxhess.krylov.integrals import integral_bounds
from jaxhess.krylov.quadrature import Quadrature
from jaxhess.slq.density import SpectrumLimits

Array = npt.NDArray[np.float64]
Function = Callable[[Array], npt.ArrayLike]


def evaluated(f: Function, ritz_values: Array) -> Array:
    """f at the Ritz values [probes, steps], 0 where these are NaN.

    Raises:
        InputError: f returns another shape, or a value that is not finite (says at which Ritz value).
    """
    taken = np.isfinite(ritz_values)
    theta = ritz_values[taken]
    with np.errstate(all="ignore"):
        found = np.asarray(f(theta.copy()), np.float64)
    if found.shape != theta.shape:
        raise InputError(f"f must be vectorised: for Ritz values of shape {theta.shape} it gave {found.shape}")
    if not np.isfinite(found).all():
        worst = int(np.argmin(np.isfinite(found)))
        raise InputError(f"f is {found[worst]} at the Ritz value {theta[worst]}: it must be finite at all of them")
    nodes = np.zeros(ritz_values.shape)
    nodes[taken] = found
    return nodes


def bounds_of_mean(f: Function, quadratures: list[Quadrature], known: SpectrumLimits) -> tuple[float, float]:
    """Lower and upper bounds of the mean over probes of v'f(H)v."""
    rows = zip(quadratures, known.slack, known.exhausted, strict=True)
    found = [
        integral_bounds(f, nodes.ritz_values, nodes.weights, known.ends, slack, exhausted=broke)
        for nodes, slack, broke in rows
    ]
    low, high = np.mean(found, axis=0)
    return float(low), float(high)


def excess(f: Function, mean: float, power: int, quadratures: list[Quadrature], known: SpectrumLimits) -> float:
    """By how much, averaged over probes, the integral of (f - mean)^power may exceed its quadrature; 0 or more."""

    def deviation(x: Array) -> Array:
        return (np.asarray(f(x), np.float64) - mean) ** power

    with np.errstate(over="ignore", invalid="ignore"):
        found = np.mean([nodes.weights @ deviation(nodes.ritz_values) for nodes in quadratures])
        missing = float(bounds_of_mean(deviation, quadratures, known)[1] - found)
    return math.inf if math.isnan(missing) else max(0.0, missing)
