"""How far apart the spectra of blocks are: Jensen-Shannon distances on one logarithmic grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, rel_entr

from jaxhess.errors import InputError
from jaxhess.slq.spectrum import Spectrum

Array = npt.NDArray[np.float64]

DECADES = 6
"""Of eigenvalues below the largest magnitude that are told apart; smaller ones count as zero."""
BINS_PER_DECADE = 8
SMOOTHING = 0.25
"""Standard deviation of the Gaussian that smooths masses, in decades."""
RANK = 10
"""The eigenvalue that a block's are divided by, counted from the largest, where they are normalised."""


def jensen_shannon(spectra: Sequence[Spectrum], normalised: bool = False) -> Array:
    """[B, B] Jensen-Shannon distances between the spectral distributions of blocks, between 0 and 1.

    The distance is the square root of the Jensen-Shannon divergence in bits (Endres and Schindelin 2003), `(KL(p || m)
    + KL(q || m)) / 2` with m the mean of p and q. p and q are masses in bins of one grid: see `masses`.

    Args:
        spectra: Of the blocks.
        normalised: Divide the eigenvalues of each block by its tenth largest first (as Zhang et al. do, so that blocks
            of other scale can be alike): compares shapes alone. See `tenth_largest`.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.structure.distances import jensen_shannon
        >>> low = jaxhess.spectrum(jaxhess.MatrixOperator(jnp.eye(20)), steps=2, probes=1)
        >>> high = jaxhess.spectrum(jaxhess.MatrixOperator(1e4 * jnp.eye(20)), steps=2, probes=1)
        >>> jensen_shannon([low, high]).round(3)
        array([[0., 1.],
               [1., 0.]])
        >>> jensen_shannon([low, high], normalised=True).round(3)
        array([[0., 0.],
               [0., 0.]])
    """
    scales = [tenth_largest(spectrum) if normalised else 1.0 for spectrum in spectra]
    largest = max(float(np.nanmax(np.abs(s.ritz_values))) / scale for s, scale in zip(spectra, scales, strict=True))
    if largest == 0:  # all are zero
        return np.zeros((len(scales), len(scales)))
    found = [masses(s, largest, scale) for s, scale in zip(spectra, scales, strict=True)]
    distances = np.zeros((len(found), len(found)))
    for a, p in enumerate(found):
        for b in range(a):
            mean = (p + found[b]) / 2
            bits = float((rel_entr(p, mean) + rel_entr(found[b], mean)).sum()) / (2 * math.log(2))
            distances[a, b] = distances[b, a] = math.sqrt(max(0.0, bits))  # rounding may leave less than nothing
    return distances


def edges(largest: float) -> Array:
    """Edges of the grid's bins: negative magnitudes from the largest down, one bin around zero, positive ones upwards.

    Raises:
        InputError: `largest` is not positive.
    """
    if not 0 < largest < math.inf:
        raise InputError(f"The largest eigenvalue is {largest:g}: distances of spectra need one that is not zero.")
    positive = largest * 10.0 ** np.linspace(-DECADES, 0, DECADES * BINS_PER_DECADE + 1)
    return np.concatenate([-positive[::-1], positive])


def masses(spectrum: Spectrum, largest: float, scale: float = 1.0) -> Array:
    """The share of eigenvalues in each bin of `edges(largest)`, of the probes' mean quadrature measure, smoothed.

    Masses on each side of zero are convolved with a Gaussian of `SMOOTHING` decades in log10 of the magnitude; what
    would leave the grid at its end is counted in the last bin, and what would fall below the smallest magnitude in the
    bin of zero, so that the sum is one.

    Args:
        spectrum: Of a block.
        largest: Of all blocks' eigenvalues over their scales.
        scale: That eigenvalues are divided by.
    """
    grid = edges(largest)
    half = len(grid) // 2
    logs = np.log10(grid[half:])
    valid = spectrum.weights > 0
    values = np.where(valid, spectrum.ritz_values, 0) / scale
    weights = np.where(valid, spectrum.weights, 0) / spectrum.num_probes
    found = np.zeros(len(grid) - 1)
    zero = np.abs(values) < grid[half]
    found[half - 1] = weights[zero].sum()
    for sign in (1, -1):
        chosen = ~zero & (np.sign(values) == sign)
        if not chosen.any():
            continue
        below = ndtr((logs - np.log10(np.abs(values[chosen]))[:, None]) / SMOOTHING)
        below[:, -1] = 1
        cumulative = weights[chosen] @ below
        found[half - 1] += cumulative[0]
        bins = np.diff(cumulative).clip(0)  # rounding may leave less than nothing
        if sign > 0:
            found[half:] += bins
        else:
            found[: half - 1] += bins[::-1]
    found[found < np.finfo(float).tiny] = 0  # half of the smallest number is zero
    return found / found.sum()


def tenth_largest(spectrum: Spectrum) -> float:
    """The value above which there are ten eigenvalues, by the weights of the probes; what distances are normalised by.

    Of a block of fewer than 20 rows, that above which the upper half of them is. At least 1e-3 of the block's largest
    magnitude: one block whose eigenvalues are all but zero must not stretch the grid of all others.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.structure.distances import tenth_largest
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 61.0)))
        >>> 45 < tenth_largest(jaxhess.spectrum(A, steps=60, probes=8)) < 56  # 51, with the probes' error
        True
    """
    valid = spectrum.weights > 0
    values, weights = spectrum.ritz_values[valid], spectrum.weights[valid] / spectrum.num_probes
    largest = float(np.abs(values).max())
    order = np.argsort(values)[::-1]
    rank = min(RANK, -(-spectrum.dim // 2))
    above = np.cumsum(weights[order]) * spectrum.dim
    place = min(int(np.searchsorted(above, rank - 0.5)), len(order) - 1)
    return max(float(values[order[place]]), 1e-3 * largest) or 1.0


def noise_floor(spectra: Sequence[Spectrum], normalised: bool = False) -> Array:
    """[B] the distance between two halves of each block's own probes; NaN for a single probe.

    What two blocks of one spectrum would be apart: by fewer probes, and so by more, than the distances themselves.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> from jaxhess.structure.distances import noise_floor
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 501.0)))
        >>> bool(noise_floor([jaxhess.spectrum(A, steps=20, probes=4)])[0] < 0.3)
        True
    """
    found = np.full(len(spectra), np.nan)
    for b, spectrum in enumerate(spectra):
        if spectrum.num_probes > 1:
            halves = [_of_probes(spectrum, slice(k, None, 2)) for k in (0, 1)]
            found[b] = jensen_shannon(halves, normalised)[0, 1]
    return found


def _of_probes(spectrum: Spectrum, chosen: slice) -> Spectrum:
    errors = spectrum.step_errors
    return Spectrum(
        spectrum.alphas[chosen],
        spectrum.betas[chosen],
        spectrum.sizes[chosen],
        spectrum.dim,
        step_errors=errors[chosen] if errors.size else errors,
    )
