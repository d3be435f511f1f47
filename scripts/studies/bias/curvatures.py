"""The curvatures that are compared: exact, by finite differences, Gauss-Newton, and by blocks."""

from __future__ import annotations

from collections.abc import Callable

import jaxhess

EXACT, AUTOMATIC, GAUSS_NEWTON, BLOCKS = "exact", "differences, automatic step", "Gauss-Newton", "blocks of the Hessian"
PAPER = (1e-3, 1e-4)
"""The per-coordinate steps between which arXiv 2602.00816 recommends to choose."""
NARROW = "bfloat16"


def fixed(step: float) -> str:
    """The name of finite differences with this step."""
    return f"differences, step {step:.0e}".replace("e-0", "e-")


def narrow(name: str) -> str:
    """The name of the same in bfloat16."""
    return f"{name}, {NARROW}"


NAMES = (
    *(EXACT, AUTOMATIC, *map(fixed, PAPER), GAUSS_NEWTON, BLOCKS),
    *map(narrow, (EXACT, *map(fixed, PAPER))),
)
"""All that there are."""


def curvatures(
    exact: jaxhess.Hessian, blocks: jaxhess.Blocks, low_precision: bool
) -> dict[str, jaxhess.LinearOperator]:
    """Curvatures of one loss by name, the exact Hessian first.

    Args:
        exact: The Hessian in float32.
        blocks: Of the block-diagonal part.
        low_precision: Also exact products and differences with parameters and computation in bfloat16.
    """
    found: dict[str, jaxhess.LinearOperator] = {EXACT: exact, AUTOMATIC: differences(exact, "auto")}
    found |= {fixed(step): differences(exact, step) for step in PAPER}
    found[GAUSS_NEWTON] = jaxhess.GaussNewton(exact.loss, exact.params, exact.batches)
    found[BLOCKS] = jaxhess.BlockDiagonal(exact, blocks)
    if low_precision:
        rounded = exact.in_dtype(NARROW)
        found[narrow(EXACT)] = rounded
        found |= {narrow(fixed(step)): differences(rounded, step) for step in PAPER}
    return found


def differences(exact: jaxhess.Hessian, step: float | str) -> jaxhess.FiniteDifferenceHessian:
    """The same by finite differences."""
    return jaxhess.FiniteDifferenceHessian(exact.loss, exact.params, exact.batches, step)


def rules(low_precision: bool) -> dict[str, Callable[[jaxhess.Hessian], jaxhess.LinearOperator]]:
    """From the Hessian at a point to the curvature of a Newton step."""

    def gauss_newton(exact: jaxhess.Hessian) -> jaxhess.GaussNewton:
        return jaxhess.GaussNewton(exact.loss, exact.params, exact.batches)

    def step(size: float | str, dtype: str | None = None) -> Callable[[jaxhess.Hessian], jaxhess.LinearOperator]:
        return lambda exact: differences(exact if dtype is None else exact.in_dtype(dtype), size)

    found: dict[str, Callable[[jaxhess.Hessian], jaxhess.LinearOperator]] = {EXACT: lambda exact: exact}
    found |= {AUTOMATIC: step("auto"), GAUSS_NEWTON: gauss_newton}
    found[fixed(PAPER[0])] = step(PAPER[0])  # the larger one: its bias is the largest
    if low_precision:
        found[narrow(fixed(PAPER[0]))] = step(PAPER[0], NARROW)
    return found


def gradients_per_product(name: str, blocks: int) -> float:
    """What a product costs, in gradients of the same data, by its matrix products.

    As the operators' docstrings have it: exact products 8/3, differences 2 (with the automatic step 8 to 16 more, taken
    for 12), Gauss-Newton 5/3, all blocks (2 + 6 blocks) / 3.
    """
    if name.startswith(AUTOMATIC):
        return 14.0
    if name.startswith("differences"):
        return 2.0
    return {GAUSS_NEWTON: 5 / 3, BLOCKS: (2 + 6 * blocks) / 3}.get(name, 8 / 3)
