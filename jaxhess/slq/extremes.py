"""The smallest and largest Ritz value of all probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Extreme(NamedTuple):
    """An extreme Ritz value, its residual bound, and the std of the probes' own extremes (NaN for one probe)."""

    value: float
    residual_bound: float
    spread: float


class Extremes(NamedTuple):
    smallest: Extreme
    largest: Extreme


def extremes(ritz_values: Array, residual_bounds: Array, sizes: npt.NDArray[np.int64]) -> Extremes:
    """Those of Ritz values [probes, steps], ascending in the first `sizes` of each row."""

    def one(columns: npt.NDArray[np.int64], choose: Callable[[Array], np.intp]) -> Extreme:
        probes = np.arange(len(sizes))
        values, bounds = ritz_values[probes, columns], residual_bounds[probes, columns]
        best = choose(values)
        spread = float(values.std(ddof=1)) if len(sizes) > 1 else float("nan")
        return Extreme(float(values[best]), float(bounds[best]), spread)

    return Extremes(one(np.zeros_like(sizes), np.argmin), one(sizes - 1, np.argmax))
