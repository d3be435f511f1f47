"""The exact Hessian of a mean loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxhess.operators.loss import LossOperator
from jaxhess.vectors import Vector

if TYPE_CHECKING:
    from jaxhess.operators.linearized import LinearizedHessian


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Hessian(LossOperator):
    """The Hessian of `sum of losses / sum of counts` over all batches, by forward-over-reverse differentiation.

    `H @ v` is the directional derivative of the gradient along v, exact up to rounding (Pearlmutter 1994); about 8/3
    of a gradient's matrix products. Several vectors at once, `jax.vmap(H.mv)(vs)`, share the primal pass: 2 + 6 k
    instead of 8 k matrix products in units of one forward pass. See `LossOperator` for the fields.
    """

    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        gradient = jax.grad(lambda free: self.sum_and_count(free, batch), has_aux=True)
        _, tangent, count = jax.jvp(gradient, (self.free,), (v,), has_aux=True)
        return tangent, count

    def linearize(
        self, budget: float | None = None, announce: Callable[[int], None] | None = None
    ) -> LinearizedHessian:
        """The same operator with the primal pass done once and kept: see `LinearizedHessian`.

        Args:
            budget: Bytes per device that the kept arrays may take; None: what the device has left beside what a Lanczos
                run needs.
            announce: Called with those bytes before any is taken.

        Raises:
            ValueError: They would take more: the message gives both numbers, and nothing has been computed. The budget
                is not a positive number.
        """
        from jaxhess.operators.linearized import linearized  # it holds a Hessian

        return linearized(self, budget, announce)
