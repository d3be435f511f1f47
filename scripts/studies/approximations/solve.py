"""Preconditioned conjugate gradients with one dense matrix and many preconditioners, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scripts.studies.approximations.matrices import Array, Product


def iterations(
    matrix: Array, b: Array, preconditioners: Sequence[Product], tolerance: float, max_steps: int
) -> npt.NDArray[np.int64]:
    """[preconditioners, m] products until |b - A x| is at most `tolerance` |b|, from x = 0; -1: not by `max_steps`.

    The same recursion as `jaxhess.conjugate_gradients` (Hestenes and Stiefel 1952). A matrix product serves the
    directions of all runs, so that the matrix is read once in a step.

    Args:
        matrix: A [n, n], positive definite.
        b: [n, m], none zero.
        preconditioners: Products with approximate inverses, positive definite.
        tolerance: Relative to |b|.
        max_steps: Products at most.
    """
    b = b / np.linalg.norm(b, axis=0)
    found = np.full((len(preconditioners), b.shape[1]), -1)
    running = list(range(len(preconditioners)))
    r = dict.fromkeys(running, b)
    p = {k: preconditioners[k](b) for k in running}
    squared = {k: (b * p[k]).sum(0) for k in running}
    for step in range(1, max_steps + 1):
        products = np.split(matrix @ np.hstack([p[k] for k in running]), len(running), axis=1)
        for k, ap in zip(tuple(running), products, strict=True):
            left = found[k] < 0
            # Runs that have ended stay as they are: their steps are zero.
            alpha = np.divide(squared[k], (p[k] * ap).sum(0), out=np.zeros(b.shape[1]), where=left)
            r[k] = r[k] - alpha * ap
            found[k, left & (np.linalg.norm(r[k], axis=0) <= tolerance)] = step
            if (found[k] >= 0).all():
                running.remove(k)
                continue
            z = preconditioners[k](r[k])
            before, squared[k] = squared[k], (r[k] * z).sum(0)
            p[k] = z + np.divide(squared[k], before, out=np.zeros(b.shape[1]), where=before > 0) * p[k]
        if not running:
            break
    return found
