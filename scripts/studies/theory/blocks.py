"""Blocks of the Hessians of a linear model and of a network with one hidden layer, in closed form, and their norms.

The talk "Towards Quantifying the Hessian Structure of Neural Networks" (Y. Zhang, 2025) has them in its cases 1 to 4.
Data X [N, d], labels one-hot; the linear model is V x with V [C, d], the network V max(W x, 0) with W [m, d], V [C, m].
The mean is over the samples. The talk's squared error has no factor 1/2, so its Hessian has a factor 2, which the
talk's own equations leave out; it is kept here.

Norms are squared Frobenius norms. With coefficients a_n, |Σ_n a_n x_n x_nᵀ/N|² = Σ_nm a_n a_m (x_n·x_m)²/N²: blocks of
any width cost a product with the matrix of squared inner products.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

Array = npt.NDArray[np.float64]
Loss = Literal["CE", "MSE"]


class Hidden(NamedTuple):
    """What the blocks of the network need of the samples.

    Attributes:
        active: [N, m] one where the unit is positive.
        units: [N, m] the hidden layer.
        features: [N, m(m+1)/2] with the inner products (h_n·h_k)².
        probabilities: [N, C] of the classes.
    """

    active: Array
    units: Array
    features: Array
    probabilities: Array


class SquaredNorms(NamedTuple):
    """Of the blocks of a network's Hessian.

    Attributes:
        ww: [m, m]
        vv: [C, C]
        wv: [m, C, m] of the columns of the blocks between w_i and v_j.
    """

    ww: Array
    vv: Array
    wv: Array

    @property
    def circulant(self) -> float:
        """Column i of all blocks between w_i and v_j: the circulant part."""
        return float(np.einsum("iji->", self.wv))

    @property
    def rest(self) -> float:
        """The other columns."""
        return float(self.wv.sum()) - self.circulant

    @property
    def total(self) -> float:
        """The whole Hessian."""
        return float(self.ww.sum() + self.vv.sum() + 2 * self.wv.sum())

    @property
    def map(self) -> Array:
        """[m + C, m + C] of all blocks."""
        between = self.wv.sum(2)
        return np.block([[self.ww, between], [between.T, self.vv]])


def hidden(X: Array, W: Array, V: Array) -> Hidden:
    """The network's units and probabilities."""
    before = X @ W.T
    units = np.maximum(before, 0)
    return Hidden((before > 0).astype(units.dtype), units, outer_features(units), softmax(units @ V.T, axis=1))


def outer_features(X: Array) -> Array:
    """[N, d(d+1)/2] the entries of x xᵀ, each once, scaled so that inner products are squares of those of x."""
    rows, columns = np.triu_indices(X.shape[1])
    return X[:, rows] * X[:, columns] * np.where(rows == columns, 1, np.sqrt(2))


def squared_gram(X: Array) -> Array:
    """[N, N] squares of the inner products of samples."""
    gram = X @ X.T
    return np.square(gram, out=gram)


def of_coefficients(coefficients: Array, squares: Array) -> Array:
    """[K] squared norms of Σ_n a_n x_n x_nᵀ/N for coefficients [K, N]."""
    return np.einsum("kn,kn->k", coefficients @ squares, coefficients) / len(squares) ** 2


def class_means(probabilities: Array, squares: Array) -> tuple[float, float]:
    """The mean squared norm of the diagonal blocks, and of the others, of a softmax layer (equations 5 and 13).

    The blocks are Σ_n b_n x_n x_nᵀ/N with b = p_i(1 − p_i) on the diagonal and −p_i p_j elsewhere. Over all pairs the
    sum of b_n b_k is (p_n·p_k)² less the sum of p_ni² p_ki², so that no pair is visited by itself.
    """
    N, C = probabilities.shape
    own = probabilities * (1 - probabilities)
    diagonal = np.vdot(own @ own.T, squares) / N**2 / C
    square = probabilities**2
    pairs = np.square(probabilities @ probabilities.T)
    pairs -= square @ square.T
    return float(diagonal), float(np.vdot(pairs, squares) / N**2 / max(C * (C - 1), 1))


def class_map(probabilities: Array, features: Array) -> Array:
    """[C, C] squared norms of all blocks of a softmax layer, with the features of its inputs."""
    C = probabilities.shape[1]
    found = np.empty((C, C))
    for i, p in enumerate(probabilities.T):
        found[i] = np.square((probabilities * p[:, None]).T @ features).sum(1)
        found[i, i] = np.square((p * (1 - p)) @ features).sum()
    return found / len(features) ** 2


def hidden_coefficients(h: Hidden, V: Array) -> Array:
    """[m, m, N] of the blocks between w_i and w_j with cross-entropy (equation 12)."""
    m = V.shape[1]
    second = (h.probabilities @ (V[:, :, None] * V[:, None, :]).reshape(len(V), -1)).reshape(-1, m, m)
    mean = h.probabilities @ V
    covariance = second - mean[:, :, None] * mean[:, None, :]
    return np.moveaxis(covariance * h.active[:, :, None] * h.active[:, None, :], 0, -1)


def hidden_norms(coefficients: Array, squares: Array) -> Array:
    """[m, m] squared norms of the blocks with these coefficients, [m, m, N]."""
    m = len(coefficients)
    rows, columns = np.triu_indices(m)
    found = np.empty((m, m))
    found[rows, columns] = found[columns, rows] = of_coefficients(coefficients[rows, columns], squares)
    return found


def active_pairs(active: Array) -> Array:
    """[m, m, N] ones where both units are positive: the coefficients with squared error, but for 2 Σ_c v_ci v_cj."""
    return np.einsum("ni,nj->ijn", active, active)


def network_norms(
    X: Array, labels: npt.NDArray[np.int_], W: Array, V: Array, squares: Array, loss: Loss = "CE"
) -> SquaredNorms:
    """All blocks: equations 8, 9, 12 and 13, and between w_i and v_j, with cross-entropy,

        column k of H_{w_i v_j} = Σ_n 1(w_i·x_n > 0) x_n [δ_ki (p_nj − y_nj) + p_nj (v_ji − Σ_c p_nc v_ci) h_nk] / N,

    with squared error the same with 2(f_nj − y_nj) and 2 v_ji, f the outputs.
    """
    h = hidden(X, W, V)
    if loss == "MSE":
        ww = hidden_norms(active_pairs(h.active), squares) * (2 * V.T @ V) ** 2
        vv = np.eye(len(V)) * np.square(2 * h.features.sum(0) / len(X)).sum()
        return SquaredNorms(ww, vv, _between(X, h, 2 * residual(h.units @ V.T, labels), 2 * V.T[:, None, :]))
    ww = hidden_norms(hidden_coefficients(h, V), squares)
    slopes = h.probabilities * (V.T[:, None, :] - (h.probabilities @ V).T[:, :, None])
    return SquaredNorms(
        ww,
        class_map(h.probabilities, h.features),
        _between(X, h, residual(h.probabilities, labels), slopes),
    )


def _between(X: Array, h: Hidden, error: Array, slopes: Array) -> Array:
    """[m, C, m] squared norms of column k of the block between w_i and v_j, as [i, j, k]; slopes are [m, N or 1, C]."""
    N, m = h.units.shape
    found = np.empty((m, error.shape[1], m))
    for i in range(m):
        for k in range(m):
            rows = (h.active[:, i] * h.active[:, k]).astype(bool)  # all others are zero
            column = np.broadcast_to(slopes[i], error.shape)[rows] * h.units[rows, k, None]
            if k == i:
                column = column + error[rows]
            found[i, :, k] = np.square(X[rows].T @ column).sum(0)
    return found / N**2


def residual(outputs: Array, labels: npt.NDArray[np.int_]) -> Array:
    """[N, C] outputs less the one-hot labels."""
    found = outputs.copy()
    found[np.arange(len(labels)), labels] -= 1
    return found


def linear_map(X: Array, V: Array, squares: Array, loss: Loss) -> Array:
    """[C, C] squared norms of all blocks of the linear model (cases 1 and 2)."""
    if loss == "MSE":
        return np.eye(len(V)) * 4 * float(squares.sum()) / len(X) ** 2
    p = softmax(X @ V.T, axis=1).T
    found = np.empty((len(V), len(V)))
    for i in range(len(V)):
        found[i, i:] = found[i:, i] = of_coefficients(p[i] * (np.eye(len(V))[i, i:, None] - p[i:]), squares)
    return found
