"""How far numbers of a spectrum depend on which sequences were taken, from the forms of single microbatches.

The operator is H = sum_b S_b / sum_b c_b, a ratio of sums over microbatches. What microbatch b contributes beyond its
share is R_b = (S_b - c_b H) / C, with C = sum_b c_b; these add up to zero. A quantity whose derivative along a change
dH is tr(D dH) has the linearised error sum_b tr(D R_b), and with K microbatches drawn at random out of a population of
which they are the share f the variance is estimated by (1 - f) K / (K - 1) sum_b tr(D R_b)^2 (Cochran 1977, sections
6.4 and 11.7, for ratios and clusters). Random probes v stand for D: tr(D R_b) is a mean over them, and what single
probes add to its scatter (their interaction with microbatches) is subtracted, because the error over probes has it.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import numpy.typing as npt

from jaxhess.data.sampling import Sampling
from jaxhess.errors import InputError
from jaxhess.krylov.eigenpairs import Eigenpairs
from jaxhess.krylov.errors import DataSpread
from jaxhess.krylov.split import split_bias
from jaxhess.operators.base import LinearOperator

Array = npt.NDArray[np.float64]
UNLIMITED = Sampling(1)


def read_forms(forms: npt.ArrayLike, probes: int) -> Array:
    """Forms as an array that cannot be written to; without entries where there are none.

    Raises:
        InputError: They are not [probes, 2, microbatches, 4] of finite numbers, or a count is negative.
    """
    found = np.array(forms, np.float64)
    if found.size == 0:
        found = np.zeros((probes, 2, 0, 4))
    if found.ndim != 4 or found.shape[:2] != (probes, 2) or found.shape[3] != 4:
        raise InputError(f"microbatch_forms must be [{probes} probes, 2, microbatches, 4], got {list(found.shape)}")
    if not np.isfinite(found).all() or (found[:, 0, :, 3] < 0).any():
        raise InputError("microbatch_forms must be finite, and counts not negative")
    found.flags.writeable = False
    return found


def moment_spread(k: int, forms: Array, alphas: Array, betas: Array, sampling: Sampling | None) -> DataSpread | None:
    """The error over data of the k-th moment, k from 1 to 3, of alphas and betas [probes, steps]; None: not known.

    With v = q_1 and Hv = alpha_1 q_1 + beta_1 q_2 the derivatives are v'dHv, 2 (Hv)'dHv and 3 (Hv)'dH(Hv). The second
    moment of a sample is too large by the variance of H itself, sum_b |R_b v|^2; that bias is known where no two
    microbatches share a document. That of the third is not.
    """
    counted = forms[:, :, forms[0, 0, :, 3] > 0] if forms.size else forms
    if k not in (1, 2, 3) or counted.shape[2] < 2 or (k > 1 and alphas.shape[1] < 2):
        return None
    total = counted[0, 0, :, 3].sum()
    (first, _, squares, _), (second, mixed, _, _) = np.moveaxis(counted, (1, 3), (0, 1)) / total
    share = counted[0, 0, :, 3] / total
    a, b = alphas[:, :1], betas[:, :1]
    design = sampling or UNLIMITED
    if k == 1:
        return data_spread(first - share * first.sum(1, keepdims=True), design)
    along = a * first + b * mixed  # (Hv)'S_b v / C
    if k == 2:
        found = data_spread(2 * (along - share * (a**2 + b**2)), design)
        parts = squares / total - 2 * share * along + share**2 * (a**2 + b**2)  # |R_b v|^2
        bias = (1 - design.fraction) * parts.sum(1).mean() * len(share) / (len(share) - 1)
        independent = design.clusters is None or len(set(design.clusters)) == forms.shape[2]
        return found._replace(bias=max(float(bias), 0.0) if independent else math.nan)
    both = a**2 * first + 2 * a * b * mixed + b**2 * second
    return data_spread(3 * (both - share * both.sum(1, keepdims=True)), design)._replace(bias=math.nan)


def eigenvalue_errors(
    operator: LinearOperator, pairs: Eigenpairs, sampling: Sampling | None = None
) -> list[DataSpread | None]:
    """The errors over data of eigenvalues, to first order u'dHu with u the unit eigenvector; None: not known.

    Those at an end of the spectrum, the largest of all and the most negative, have a bias too, by splitting the
    microbatches into halves (`jaxhess.krylov.split`): twenty products of a half or more for each. Others have NaN.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> batches = [jnp.array([2.0, 0.0]), jnp.array([4.0, 1.0]), jnp.array([3.0, 0.0]), jnp.array([3.0, 1.0])]
        >>> H = jaxhess.Hessian(lambda w, x: x @ w**2 / 2, jnp.ones(2), batches)
        >>> pairs = jaxhess.leading_eigenpairs(H, 1)
        >>> (found,) = jaxhess.eigenvalue_errors(H, pairs, jaxhess.Sampling(sequences=4))
        >>> round(float(pairs.values[0]), 3), round(found.error, 3), found.freedom  # of 2, 4, 3, 3
        (3.0, 0.408, 3)

    Args:
        operator: That of the pairs.
        pairs: Of `leading_eigenpairs`, which keeps what single microbatches contribute.
        sampling: How the sequences were chosen; None: at random, from a text without end.
    """
    forms, values = pairs.microbatch_forms, np.asarray(pairs.values, np.float64)
    counted = forms[:, forms[0, :, 3] > 0] if forms.size else forms
    if not counted.size or counted.shape[1] < 2:
        return [None] * len(values)
    design = sampling or UNLIMITED
    share = counted[0, :, 3] / counted[0, :, 3].sum()
    parts = counted[:, :, 0] / counted[0, :, 3].sum() - share * values[:, None]
    found: list[DataSpread | None] = [data_spread(row[None], design)._replace(bias=math.nan) for row in parts]
    ends = [k for k, sign in ((int(values.argmax()), 1), (int(values.argmin()), -1)) if sign * values[k] > 0]
    for k in ends:
        vector = jax.tree.map(lambda x, k=k: x[k], pairs.vectors)
        bias = split_bias(operator, float(values[k]), vector)
        spread = found[k]
        if bias is not None and spread is not None:
            found[k] = spread._replace(bias=(1 - design.fraction) * bias)
    return found


def data_spread(parts: Array, sampling: Sampling) -> DataSpread:
    """The error over data of a mean over probes, from what every microbatch contributes to it, [probes, K].

    Clusters of microbatches are added up first. Freedom is one less than the number of clusters.
    """
    if sampling.clusters is not None and len(sampling.clusters) == parts.shape[1]:
        _, numbers = np.unique(sampling.clusters, return_inverse=True)
        parts = np.stack([np.bincount(numbers, row) for row in parts])
    probes, count = parts.shape
    if count < 2:
        return DataSpread(math.nan, math.nan)
    mean = parts.mean(0)
    variance = count / (count - 1) * float(np.square(mean - mean.mean()).sum())
    if probes > 1:
        rest = parts - parts.mean(1, keepdims=True) - (mean - mean.mean())
        interaction = float(np.square(rest).sum()) / ((probes - 1) * (count - 1))
        variance = max(variance - count * interaction / probes, 0.0)
    return DataSpread(math.sqrt((1 - sampling.fraction) * variance), count - 1)
