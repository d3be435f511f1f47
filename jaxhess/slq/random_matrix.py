"""Limits of the eigenvalue distributions of large random matrices, to lay over a measured density."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxhess.errors import InputError

Array = npt.NDArray[np.float64]

SMALLEST_HEIGHT = 1e-10
"""Imaginary part at which a Stieltjes transform is read off, over the largest eigenvalue that there can be."""


class LimitLaw(NamedTuple):
    """A limit law at the places where it was asked for.

    Attributes:
        x: [points] eigenvalues.
        density: [points] share of all eigenvalues per unit of eigenvalue, without the atom.
        distribution: [points] share of all eigenvalues at or below x, with the atom.
        atom: Share of eigenvalues that are zero.

    >>> import jaxhess
    >>> law = jaxhess.marchenko_pastur([0.5, 5.0], ratio=2.0)
    >>> law.atom, law.distribution.round(2).tolist()
    (0.5, [0.57, 0.98])
    """

    x: Array
    density: Array
    distribution: Array
    atom: float


def semicircle(x: npt.ArrayLike, variance: float = 1.0) -> LimitLaw:
    """Wigner's semicircle law: of A/√n, A [n, n] Hermitian with independent entries of mean zero, as n grows.

    Density √(4σ² − x²) / (2πσ²) for |x| ≤ 2σ, σ² the variance of the entries (talk by Y. Zhang, 2025, "Semicircular Law
    of Wigner Matrices", after T. Tao, Topics in random matrix theory).

    Args:
        x: [points] eigenvalues.
        variance: Of the entries.

    Returns:
        LimitLaw in float64; its atom is zero.

    Raises:
        InputError: The variance is not positive, or x is not a list of finite numbers.

    >>> import jaxhess
    >>> jaxhess.semicircle([0.0, 2.0]).distribution.tolist()
    [0.5, 1.0]
    """
    x = _places(x)
    _positive("variance", variance)
    t = np.clip(x / (2 * np.sqrt(variance)), -1, 1)
    density = np.sqrt(1 - t**2) / (np.pi * np.sqrt(variance))
    return LimitLaw(x, density, 0.5 + (t * np.sqrt(1 - t**2) + np.arcsin(t)) / np.pi, 0.0)


def marchenko_pastur(x: npt.ArrayLike, ratio: float, variance: float = 1.0) -> LimitLaw:
    """The Marchenko-Pastur law: of X Xᵀ/N, X [d, N] with independent entries of mean zero, d and N growing, d/N fixed.

    Density √((b − x)(x − a)) / (2πσ² ratio x) for a ≤ x ≤ b, a and b = σ²(1 ∓ √ratio)², and, if ratio > 1, 1 − 1/ratio
    of the eigenvalues at zero (theorem of Marchenko and Pastur, 1967, as the talk by Y. Zhang, 2025, states it). With
    ratio = 1 the density has no limit at zero; there it is given as infinite.

    Args:
        x: [points] eigenvalues.
        ratio: d/N.
        variance: Of the entries, σ².

    Returns:
        LimitLaw in float64.

    Raises:
        InputError: The ratio or the variance is not positive, or x is not a list of finite numbers.

    >>> import jaxhess
    >>> law = jaxhess.marchenko_pastur([0.0, 1.0], ratio=4.0)
    >>> law.atom, law.density.round(3).tolist()
    (0.75, [0.0, 0.0])
    """
    x = _places(x)
    _positive("ratio", ratio)
    _positive("variance", variance)
    a, b = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    atom = max(0.0, 1 - 1 / ratio)
    t = np.clip(x / variance, a, b)
    root = np.sqrt((b - t) * (t - a))
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(t > 0, root / (2 * np.pi * ratio * t), np.inf) / variance
    density = np.where((x < variance * a) | (x > variance * b), 0.0, density)
    # The integral of √((b − t)(t − a))/t, with (a + b)/2 = 1 + ratio and √(ab) = |1 − ratio|; its two arcsines are
    # taken as angles, which keep their digits at the ends.
    first = np.arctan2(2 * t - a - b, 2 * root) + np.pi / 2
    second = np.arctan2((a + b) * t - 2 * a * b, 2 * abs(1 - ratio) * root) + np.pi / 2
    mass = (root + (1 + ratio) * first - abs(1 - ratio) * second) / (2 * np.pi * ratio)
    return LimitLaw(x, density, mass + atom * (x >= 0), atom)


def generalized_marchenko_pastur(
    x: npt.ArrayLike, ratio: float, values: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> LimitLaw:
    """The generalised Marchenko-Pastur law: of X Λ Xᵀ/N with a diagonal Λ [N, N] that is independent of X [d, N].

    The entries of X are independent of mean zero and variance one; d and N grow with d/N = ratio; the entries of Λ, of
    any sign, have the given distribution H. The Stieltjes transform s(z) = ∫ dμ(t)/(t − z) is the only root with
    positive imaginary part of

        s = −1 / (z − ∫ λ dH(λ) / (1 + ratio λ s))        (Marchenko and Pastur, 1967; the talk by Y. Zhang uses it)

    found by Newton's method, from z = x + iy with a large y down to 1e-10 of the largest eigenvalue. The density is
    Im s/π. The distribution function is 1 − Im U/π with U = −zs − log(−s) − 1 + ∫ log(1 + ratio λ s) dH/ratio, whose
    derivative is −s: no density is integrated. Beside closed forms the density was within 1e-7 of its peak inside, and
    1e-4 of it at an edge, where it is like a square root; the distribution function within 1e-8.

    Args:
        x: [points] eigenvalues.
        ratio: d/N.
        values: [entries] of Λ, or the places of its distribution.
        weights: [entries] their shares, of sum one; by default equal.

    Returns:
        LimitLaw in float64.

    Raises:
        InputError: The ratio is not positive; places, values or weights are not lists of finite numbers; the weights
            are negative, or their sum is not one; all values are zero.

    >>> import jaxhess
    >>> law = jaxhess.generalized_marchenko_pastur([1.0], ratio=0.5, values=[1.0])
    >>> abs(law.density - jaxhess.marchenko_pastur([1.0], ratio=0.5).density).round(6).tolist()
    [0.0]
    """
    x = _places(x)
    _positive("ratio", ratio)
    values = _places(values, "values")
    shares = np.full(values.size, 1 / values.size) if weights is None else _places(weights, "weights")
    if shares.shape != values.shape or (shares < 0).any() or abs(shares.sum() - 1) > 1e-9:
        raise InputError("weights must be as many as values, not negative, and of sum one.")
    kept = (values != 0) & (shares > 0)
    if not kept.any():
        raise InputError("All values are zero, and so is the matrix: it has no density.")
    zeros = 1 - float(shares[kept].sum())
    values, shares = values[kept], shares[kept]
    atom = max(0.0, 1 - (1 - zeros) / ratio)
    top = float(np.abs(values).max()) * (1 + np.sqrt(ratio)) ** 2
    # In units of the largest eigenvalue, so that the heights below suit any scale.
    z, s = _transform(x / top, ratio, values / top, shares)
    pole = atom * z.imag / np.abs(z) ** 2
    density = np.maximum(s.imag - pole, 0) / np.pi / top
    potential = -z * s - np.log(-s) - 1
    potential += np.log(1 + ratio * s[:, None] * (values / top)) @ shares / ratio
    smooth_step = 0.5 + np.arctan2(z.real, z.imag) / np.pi  # what the atom's step is at this height
    distribution = 1 - potential.imag / np.pi + atom * ((x >= 0) - smooth_step)
    return LimitLaw(x, density, np.clip(distribution, 0, 1), atom)


def _transform(x: Array, ratio: float, values: Array, shares: Array) -> tuple[np.ndarray, np.ndarray]:
    """[points] each: z just above x, and s there. A quarter of the height is half the distance from a double root."""
    height = 4.0 ** np.ceil(np.log(max(1.0, np.abs(x).max())) / np.log(4) + 1)
    z = x + 1j * height
    s = -1 / z
    while True:
        s = _root(z, s, ratio, values, shares)
        if height <= SMALLEST_HEIGHT:
            return z, s
        height = max(height / 4, SMALLEST_HEIGHT)
        z = x + 1j * height


def _root(z: np.ndarray, s: np.ndarray, ratio: float, values: Array, shares: Array) -> np.ndarray:
    """The root of 1 + s(z − g(s)) in the upper half-plane, nearest to s: Newton, halved or replaced where it leaves it.

    The replacement s ← −1/(z − g(s)) maps the upper half-plane into itself and tends to the root from everywhere.
    """

    def evaluate(s: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
        inverse = values / (1 + ratio * s[:, None] * values)
        g, slope = inverse @ shares, -ratio * (inverse**2 @ shares)
        return 1 + s * (z - g), z - g - s * slope, g

    found, open_ = s.copy(), np.arange(z.size)
    for _ in range(200):
        here, there = found[open_], z[open_]
        residual, slope, g = evaluate(here, there)
        size = np.abs(residual)
        rounding = 1e-14 * (1 + np.abs(here * there) + np.abs(here * g))
        step = -residual / slope
        moved = here - 1 / (there - g) - here  # the fixed point's
        better = np.zeros(here.shape, bool)
        for fraction in (1.0, 0.5, 0.25, 0.125):
            trial = here + fraction * step
            good = ~better & (trial.imag > 0)
            good[good] &= np.abs(evaluate(trial[good], there[good])[0]) < size[good]
            moved = np.where(good, trial, moved)
            better |= good
            if better.all():
                break
        done = size <= rounding
        found[open_] = np.where(done, here, moved)
        open_ = open_[~done]
        if not open_.size:
            return found
    residual, _, g = evaluate(found[open_], z[open_])
    if (np.abs(residual) > 1e-9 * (1 + np.abs(found[open_] * z[open_]) + np.abs(found[open_] * g))).any():
        raise InputError("The equation of the generalised Marchenko-Pastur law was not solved for these values.")
    return found


def _places(x: npt.ArrayLike, name: str = "x") -> Array:
    found = np.atleast_1d(np.asarray(x, np.float64))
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise InputError(f"{name} must be a list of finite numbers.")
    return found


def _positive(name: str, value: float) -> None:
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{name} must be positive and finite, got {value}.")
