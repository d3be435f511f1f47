"""Laws fitted to what was measured: powers, and the second paper's runtime law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxhess.errors import InputError


class Power(NamedTuple):
    """y = factor * x^exponent, by least squares of the logarithms; `residual` is the largest of theirs, absolute."""

    exponent: float
    factor: float
    residual: float


class Affine(NamedTuple):
    """y = slope * x + constant, by least squares of relative errors; `residual` is the largest of those, absolute."""

    slope: float
    constant: float
    residual: float


def power_law(x: Sequence[float], y: Sequence[float]) -> Power:
    """The power law nearest to the points, with no constant: what does not grow with x lowers the exponent.

    Raises:
        InputError: Fewer than two different x, or a number that is not positive.
    """
    _check(x, y)
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    residual = np.abs(np.log(y) - intercept - exponent * np.log(x)).max()
    return Power(float(exponent), float(np.exp(intercept)), float(residual))


def runtime_law(gradient: Sequence[float], product: Sequence[float]) -> Affine:
    """T_HVP = c T_grad + T_vec (arXiv 2602.00816, section 5), over runs that differ in their tokens alone.

    The paper has c = 2 for finite differences; T_vec is the work on vectors, which no token adds to.

    Raises:
        InputError: As `power_law`.
    """
    _check(gradient, product)
    columns = np.stack([gradient, np.ones(len(gradient))], axis=1) / np.asarray(product)[:, None]
    (slope, constant), *_ = np.linalg.lstsq(columns, np.ones(len(product)), rcond=None)
    return Affine(float(slope), float(constant), float(np.abs(columns @ [slope, constant] - 1).max()))


def _check(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y) or len(set(x)) < 2:
        raise InputError(f"A law is fitted to points at two or more places; there are {len(set(x))}.")
    if min(*x, *y) <= 0:
        raise InputError("A law is fitted to positive numbers only.")
