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
    if not np.isfinite(found).all() or not counted_alike(found) or (found[..., 3] < 0).any():
        raise InputError("microbatch_forms must be finite, and counts not negative and those of the same microbatches")
    found.flags.writeable = False
    return found


def counted_alike(forms: Array) -> bool:
    """Whether forms [probes, steps, microbatches, 4] are of the same microbatches, by their counts.

    Steps that were not taken have zeros.
    """
    counts = forms[..., 3].reshape(forms.shape[0] * forms.shape[1], forms.shape[2])
    taken = counts[counts.any(1)]
    return bool((taken == taken[:1]).all())


def moment_spread(k: int, forms: Array, alphas: Array, betas: Array, sampling: Sampling | None) -> DataSpread | None:
    """The error over data of the k-th moment, k from 1 to 3, of alphas and betas [probes, steps]; None: not known.

    With v = q_1 and Hv = alpha_1 q_1 + beta_1 q_2 the derivatives are v'dHv, 2 (Hv)'dHv and 3 (Hv)'dH(Hv). The second
    moment of a sample is too large by the variance of H itself, sum_b |R_b v|^2, and the error is that of the moment
    without this bias: a sum over pairs of different microbatches, a U-statistic (Hoeffding 1948), whose derivative
    leaves out what a microbatch has in common with itself. The bias is known where no two microbatches share a
    document. That of the third is not.
    """
    if k not in (1, 2, 3) or forms.shape[2] < 2 or (k > 1 and alphas.shape[1] < 2):
        return None
    total = forms[0, 0, :, 3].sum()
    (first, _, squares, _), (second, mixed, _, _) = np.moveaxis(forms, (1, 3), (0, 1)) / total
    share = forms[0, 0, :, 3] / total
    a, b = alphas[:, :1], betas[:, :1]
    design = sampling or UNLIMITED
    if k == 1:
        return data_spread(first - share * first.sum(1, keepdims=True), share, design)
    along = a * first + b * mixed  # (Hv)'S_b v / C
    if k == 2:
        apart = along - share * (a**2 + b**2)  # (Hv)'R_b v
        if design.clusters is not None and len(set(design.clusters)) < forms.shape[2]:
            return data_spread(2 * apart, share, design)._replace(bias=math.nan)
        count = int((share > 0).sum())
        own = count / max(count - 1, 1) * (squares / total - 2 * share * along + share**2 * (a**2 + b**2))  # |R_b v|^2
        parts = apart - own + share * own.sum(1, keepdims=True)
        bias = (1 - design.fraction) * float(own.sum(1).mean())
        return data_spread(2 * parts, share, design)._replace(bias=max(bias, 0.0))
    both = a**2 * first + 2 * a * b * mixed + b**2 * second
    return data_spread(3 * (both - share * both.sum(1, keepdims=True)), share, design)._replace(bias=math.nan)


def root_spread(spread: DataSpread, value: float, norm: float) -> DataSpread:
    """That of a norm whose square, up to a factor, has this spread and value: by the delta method, after the bias.

    The norm without its bias is smaller, and the same error of its square is a larger error of it. NaN where nothing is
    left.
    """
    left = value - spread.bias
    if not left > 0:
        return DataSpread(math.nan, spread.freedom, math.nan, math.nan)
    stretch = math.sqrt(value / left)
    error = stretch * norm / (2 * value) * spread.error
    return DataSpread(error, spread.freedom, norm - norm / stretch, stretch)


def eigenvalue_errors(
    operator: LinearOperator, pairs: Eigenpairs, sampling: Sampling | None = None
) -> list[DataSpread | None]:
    """The errors over data of eigenvalues, to first order u'dHu with u the unit eigenvector; None: not known.

    Those at an end of the spectrum that have converged have a bias too, by splitting the microbatches into halves
    (`jaxhess.krylov.split`): products with both halves, up to `split.MOST` each. It comes from one split, and is taken
    to be as uncertain as it is large. The bias of others is NaN.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> batches = [jnp.array([2.0, 0.0]), jnp.array([4.0, 1.0]), jnp.array([3.0, 0.0]), jnp.array([3.0, 1.0])]
        >>> H = jaxhess.Hessian(lambda w, x: x @ w**2 / 2, jnp.ones(2), batches)
        >>> pairs = jaxhess.leading_eigenpairs(H, 1)
        >>> (found,) = jaxhess.eigenvalue_errors(H, pairs, jaxhess.Sampling(sequences=4))
        >>> round(float(pairs.values[0]), 3), round(found.error, 3), found.freedom  # of 2, 4, 3, 3
        (3.0, 0.408, 3.0)

    Args:
        operator: That of the pairs.
        pairs: Of `leading_eigenpairs`, which keeps what single microbatches contribute; not of a warm start.
        sampling: How the sequences were chosen; None: at random, from a text without end. Targets that a Monte-Carlo
            Fisher matrix has drawn are taken as they are.

    Raises:
        InputError: The clusters of the sampling are not those of so many microbatches.
    """
    forms, values = pairs.microbatch_forms, np.asarray(pairs.values, np.float64)
    if not forms.size or (forms[0, :, 3] > 0).sum() < 2:
        return [None] * len(values)
    design = sampling or UNLIMITED
    share = forms[0, :, 3] / forms[0, :, 3].sum()
    parts = forms[:, :, 0] / forms[0, :, 3].sum() - share * values[:, None]
    known = math.nan if design.fraction < 1 else 0.0  # of all the population there is no bias
    found: list[DataSpread | None] = [data_spread(row[None], share, design)._replace(bias=known) for row in parts]
    for k in _ends(values, pairs) if design.fraction < 1 else []:
        vector = jax.tree.map(lambda x, k=k: x[k], pairs.vectors)
        bias, spread = split_bias(operator, float(values[k]), vector, share), found[k]
        if bias is not None and spread is not None:
            bias *= 1 - design.fraction
            found[k] = spread._replace(error=math.hypot(spread.error, bias), bias=bias)
    return found


def _ends(values: Array, pairs: Eigenpairs) -> list[int]:
    """Which of the pairs are at an end of the spectrum, and have converged."""
    at = {"largest": [(int(values.argmax()), 1)], "smallest": [(int(values.argmin()), -1)]}
    both = at.get(pairs.which, [*at["largest"], *at["smallest"]])
    return [k for k, sign in both if sign * values[k] > 0 and pairs.converged[k]]


def data_spread(parts: Array, share: Array, sampling: Sampling) -> DataSpread:
    """The error over data of a mean over probes, from what every microbatch contributes to it, [probes, K].

    Clusters of microbatches are added up first; those without a share in the count [K] are left out. Freedom is one
    less than their number; where the scatter of single probes was taken off, that of the difference (Satterthwaite
    1946), and the error is zero where nothing is left.

    Raises:
        InputError: The clusters of the sampling are not those of so many microbatches.
    """
    if sampling.clusters is not None:
        if len(sampling.clusters) != parts.shape[1]:
            raise InputError(
                f"The sampling has clusters for {len(sampling.clusters)} microbatches; there are {parts.shape[1]}."
            )
        _, numbers = np.unique(sampling.clusters, return_inverse=True)
        added: Array = np.stack([np.bincount(numbers, row) for row in (*parts, share)]).astype(np.float64)
        parts, share = added[:-1], added[-1]
    parts = parts[:, share > 0]
    probes, count = parts.shape
    if count < 2:
        return DataSpread(math.nan, math.nan)
    mean = parts.mean(0)
    variance, freedom = count / (count - 1) * float(np.square(mean - mean.mean()).sum()), count - 1.0
    if probes > 1:
        rest = parts - parts.mean(1, keepdims=True) - (mean - mean.mean())
        own = count / probes * float(np.square(rest).sum()) / ((probes - 1) * (count - 1))
        left = max(variance - own, 0.0)
        if left > 0:
            freedom *= left**2 / (variance**2 + own**2 / (probes - 1))
        variance = left
    return DataSpread(math.sqrt((1 - sampling.fraction) * variance), freedom)
