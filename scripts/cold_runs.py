"""What `scripts/trajectory.py --cold` compares with: eigenpairs found without those of the checkpoint before."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from run_options import Options  # beside this file

import jaxhess

COLD_SEED = 7919
"""Between the seed of a checkpoint's run and that of its cold one: they share no starting vector."""


def cold_run(
    options: Options, operator: jaxhess.LinearOperator, point: jaxhess.TrajectoryPoint, number: int
) -> dict[str, Any]:
    """Products and eigenvalues of a cold run from a vector of its own, and those that only one of both runs has.

    An eigenvalue of one run that is farther from all of the other's than both residuals is lacking there if it is
    larger in magnitude than the smallest one found there.
    """
    found = jaxhess.leading_eigenpairs(
        operator,
        options.eigenpairs,
        tolerance=options.eigenpair_tolerance,
        steps=options.eigenpair_steps,
        seed=(options.seed + COLD_SEED + number) % 2**32,
        storage=options.storage,
    )
    here, there = np.array([point.eigenvalues, point.residuals]), np.array([found.values, found.residuals])
    values, residuals = there.tolist()
    return {
        "step": point.step,
        "products": found.products,
        "eigenvalues": values,
        "residuals": residuals,
        "followed_lacks": lacking(here, there),
        "cold_lacks": lacking(there, here),
    }


def lacking(ours: np.ndarray, others: np.ndarray) -> list[float]:
    """Of the others' eigenvalues those that are not among ours and should be; [values and residuals, k] each."""
    rounding = 1e-5 * max(np.abs(ours[0]).max(initial=0.0), np.abs(others[0]).max(initial=0.0))
    least = np.abs(ours[0]).min(initial=np.inf)
    missing = []
    for value, residual in others.T:
        within = residual + ours[1] + rounding
        if abs(value) > least and (abs(value - ours[0]) > within).all():
            missing.append(float(value))
    return missing


def print_comparison(console: Console, points: list[jaxhess.TrajectoryPoint], colds: list[dict[str, Any]]) -> None:
    """Where one of both runs lacks an eigenvalue that the other has; and warm against cold, in a line."""
    for cold in colds:
        for which in ("followed", "cold"):
            if missing := cold[f"{which}_lacks"]:
                shown = ", ".join(f"{value:.5g}" for value in missing)
                console.print(f"step {cold['step']}: the {which} run lacks {shown}, which the other one found")
    warm, products = sum(p.products for p in points[1:]), sum(c["products"] for c in colds)
    lack = [sum(bool(c[f"{which}_lacks"]) for c in colds) for which in ("followed", "cold")]
    console.print(
        f"after the first of {len(points)} checkpoints: products {warm} followed, {products} cold, "
        f"{warm / products:.3f} of them; followed runs lack an eigenvalue at {lack[0]} checkpoints, cold ones at "
        f"{lack[1]}"
    )
