"""Gauss quadrature from a Lanczos tridiagonal: Ritz values, weights and residual bounds, on the host in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, eigh_tridiagonal

from jaxhess.errors import InputError

Array = npt.NDArray[np.float64]


class Quadrature(NamedTuple):
    """The nodes and weights of one probe, each [m] float64, ordered by Ritz value.

    Attributes:
        ritz_values: Eigenvalues theta_i of T.
        weights: Squared first components of T's unit eigenvectors; they sum to one.
        residual_bounds: beta_m |s_mi| + error_bounds, s_i the unit eigenvectors of T: a bound of the residual of the
            Ritz vector. An eigenvalue of the operator lies within this distance of theta_i, but for the rounding of
            products, and divided by the length of the Ritz vector, which is one while the Lanczos vectors are
            orthogonal, and at least 0.4 for a theta_i that is not inside a cluster of copies (Paige 1980).
        error_bounds: sum_j |f_j| |s_ji|, what the errors f_j of the steps add to the residual; zero if not known.
    """

    ritz_values: Array
    weights: Array
    residual_bounds: Array
    error_bounds: Array


def quadrature(alphas: npt.ArrayLike, betas: npt.ArrayLike, step_errors: npt.ArrayLike | None = None) -> Quadrature:
    """The Gauss quadrature of one probe's spectral measure, v'f(H)v = sum_i weights_i f(theta_i) (Golub, Welsch 1969).

    Exact for polynomials f of degree 2m - 1. A lone outlier of an n-dimensional operator has a weight of about
    chi-squared(1)/n, 1e-11 at 70B parameters, so first components are wanted to relative accuracy: bisection with
    inverse iteration (LAPACK stebz and stein) has a hundredth to a tenth of the error of QR (stev) or MRRR (stemr) on
    Krawtchouk, Hermite and outlier-plus-bulk matrices, 1e-14 relative for weights down to 1e-32. Where T carries
    ghosts (copies of a converged eigenvalue, without re-orthogonalisation) only a cluster's total weight is determined.

    Args:
        alphas: [m] diagonal of T.
        betas: [m] norms after each step, not negative: betas[:-1] is the off-diagonal, betas[-1] bounds the residuals.
        step_errors: [m] what each step left out of the recurrence, see `LanczosState`; None: not known.

    Raises:
        InputError: The shapes disagree, there is no step, or an entry is not finite or a beta negative (with the step).
    """
    alphas, betas = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
    _check(alphas, betas)
    # A power of two, so that scaling rounds nothing, keeps the squares inside LAPACK from under- or overflowing.
    _, exponent = np.frexp(max(np.abs(alphas).max(), betas[:-1].max(initial=0.0)))
    theta, vectors = _eigh(np.ldexp(alphas, -exponent), np.ldexp(betas[:-1], -exponent))
    errors = np.zeros_like(alphas) if step_errors is None else np.asarray(step_errors, np.float64) @ np.abs(vectors)
    return Quadrature(np.ldexp(theta, exponent), vectors[0] ** 2, betas[-1] * np.abs(vectors[-1]) + errors, errors)


def _eigh(diagonal: Array, off_diagonal: Array) -> tuple[Array, Array]:
    try:
        return eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stebz")
    except LinAlgError:
        # Inverse iteration may fail on clusters; QR never does, and a cluster's weights are its sum anyway.
        return eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stev")


def _check(alphas: Array, betas: Array) -> None:
    if alphas.ndim != 1 or alphas.shape != betas.shape or alphas.size == 0:
        raise InputError(f"alphas and betas must both be [steps] with steps >= 1, got {alphas.shape} and {betas.shape}")
    for name, values, good in (
        ("alphas", alphas, np.isfinite(alphas)),
        ("betas", betas, np.isfinite(betas) & (betas >= 0)),
    ):
        if not good.all():
            step = int(np.argmin(good))
            wanted = "finite" if name == "alphas" else "finite and not negative"
            raise InputError(f"{name}[{step}] is {values[step]} (Lanczos step {step}); it must be {wanted}")
