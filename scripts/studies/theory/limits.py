"""What the squared norms of blocks tend to at random initialisation, as width d and samples N grow with d/N = ratio.

Theorems 1 and 2 of the talk "Towards Quantifying the Hessian Structure of Neural Networks" (Y. Zhang, 2025), with the
closed forms that it leaves out. Inputs are x ~ N(0, I), weights LeCun-initialised. Coefficients a(x) depend on x
through a few projections only, so that in the limit they are independent of it; then

    |Σ_n a_n x_n x_nᵀ/N|²/d = (d + 2)/N · E a² + (1 − 1/N) (E a)²  →  ratio E a² + (E a)².
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax_moment(i: int, j: int, classes: int) -> float:
    """E[p_1^i p_2^j] of the softmax of independent standard normals, for i + j ≤ 4.

    With Z^{−k} = ∫ t^{k−1} e^{−tZ} dt/Γ(k) the classes are independent given t: one integral of products of
    φ_k(t) = E[e^{kz} exp(−t e^z)]. Sums in log t and z converge exponentially; they err by less than 1e-9 of the value.
    """
    log_t, phi = _transforms()
    others = classes - (j > 0) - 1
    integrand = np.exp((i + j) * log_t) * phi[i] * (phi[j] if j else 1) * phi[0] ** others
    return float(integrand.sum() * (log_t[1] - log_t[0]) / math.gamma(i + j))


@functools.cache
def _transforms() -> tuple[Array, Array]:
    """log t, and φ_k(t) for k = 0 to 4."""
    log_t, z = np.arange(-40, 30, 0.05), np.arange(-10, 14.5, 0.03)
    normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    decay = np.exp(-np.exp(log_t[:, None] + z))
    return log_t, np.stack([decay @ (normal * np.exp(k * z)) for k in range(5)])


def linear_norms(ratio: float, classes: int) -> tuple[float, float]:
    """Theorem 1's g_ii and g_ij: limits of |H_ii|²/d and |H_ij|²/d of the linear model with cross-entropy."""
    p1, p2, p3, p4 = (softmax_moment(k, 0, classes) for k in range(1, 5))
    diagonal = ratio * (p2 - 2 * p3 + p4) + (p1 - p2) ** 2
    return diagonal, ratio * softmax_moment(2, 2, classes) + softmax_moment(1, 1, classes) ** 2


def linear_constant(ratio: float) -> float:
    """The limit of C² g_ij/g_ii for many classes, equation 20.

    There p_i → e^{z_i}/(C √e), so that E p² → e/C², and E p_i² p_j² → e²/C⁴ by independence.
    """
    return (ratio * math.e**2 + 1) / (ratio * math.e + 1)


def hidden_squared_error(ratio: float, classes: int) -> float:
    """Of the network with squared error: the limit of E|H_{w_i w_j}|²/E|H_{w_i w_i}|².

    The factors of V are E(Σ_c v_ci v_cj)² = C/m² and E(Σ_c v_ci²)² = C(C + 2)/m²; those of X have probability 1/4 that
    both units are positive, and 1/2 that one is: ratio/4 + 1/16 over ratio/2 + 1/4.
    """
    return (4 * ratio + 1) / (4 * (classes + 2) * (2 * ratio + 1))


def hidden_constant(ratio: float, units: int) -> float:
    """The limit of C E|H_{w_i w_j}|²/E|H_{w_i w_i}|² for many classes with cross-entropy, for three units and more.

    Weighted with p, v has the normal distribution of mean h/m and variance 1/m: the coefficient on the diagonal tends
    to 1/m where the unit is positive, and the one beside it is a mean of C terms of mean zero. Over V its covariance
    between two samples h, g is, units both positive, e^{h·g/m} (1/m + h_i g_i/m²)(1/m + h_j g_j/m²)/C; with h = g for
    the sum of squares. The coordinates of h are independent. (Our derivation; the talk leaves its own out.)
    """
    m = units
    one, two = _same(1 / m), _different(1 / m)
    squares = (one.marked / m + one.first / m**2) ** 2 * one.mass ** (m - 2)
    means = (two.marked / m + two.first / m**2) ** 2 * two.mass ** (m - 2)
    return (ratio * squares + means) / ((ratio / 2 + 1 / 4) / m**2)


def output_constant(units: int) -> float:
    """The limit of C² E|H_{v_i v_j}|²/E|H_{v_i v_i}|² for many classes with cross-entropy, for three units and more.

    There p_i → e^{v_i·h − |h|²/2m}/C, so that over V the norms are E e^{s/m} s²/C² on the diagonal and E e^{2s/m} s²/C⁴
    beside it, s = h·g of two independent samples: second derivatives of (E e^{t h_1 g_1})^m. (Our derivation.)
    """

    def second_derivative(t: float) -> float:
        found = _different(t)
        m, f, df, ddf = units, found.mass, found.first, found.second
        return m * (m - 1) * f ** (m - 2) * df**2 + m * f ** (m - 1) * ddf

    return second_derivative(2 / units) / second_derivative(1 / units)


class _Coordinate:
    """Of one unit h = max(u, 0) in two samples, weight e^{t h g}.

    Attributes:
        mass: E of the weight.
        marked: E of the weight where both are positive.
        first, second: Derivatives of the mass in t.
    """

    def __init__(self, zero: float, marked: float, first: float, second: float) -> None:
        self.mass, self.marked, self.first, self.second = zero + marked, marked, first, second


def _same(t: float) -> _Coordinate:
    """With h = g: E[e^{t u²}; u > 0] = (1 − 2t)^{−1/2}/2, which needs t < 1/2: three units and more."""
    r = 1 - 2 * t
    return _Coordinate(0.5, r**-0.5 / 2, r**-1.5 / 2, 3 * r**-2.5 / 2)


def _different(t: float) -> _Coordinate:
    """With h and g independent: E[e^{t u w}; u, w > 0] = (1 − t²)^{−1/2} (1/4 + arcsin t/2π), a normal's orthant."""
    r, angle = 1 - t**2, 0.25 + math.asin(t) / (2 * math.pi)
    first = t * r**-1.5 * angle + 1 / (2 * math.pi * r)
    second = (1 + 2 * t**2) * r**-2.5 * angle + 3 * t / (2 * math.pi * r**2)
    return _Coordinate(0.75, r**-0.5 * angle, first, second)
