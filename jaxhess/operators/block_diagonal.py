"""Products with all blocks of an operator: its block-diagonal part, and how blocks are coupled."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import describe, explain_non_finite
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, cast, widen


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockDiagonal(LinearOperator):
    """The block-diagonal part of an operator, `sum_b P_b A P_b`, P_b the projector on block b.

    A product is B products of A, whose vectors are zero outside of a block. They share the primal pass of a loss's
    derivatives: 2 + 6 B matrix products for a Hessian, in units of one forward pass, where 8 B are needed one after the
    other.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
        >>> rows = jaxhess.Blocks.by(A.shape_dtype, "matrices").split("*", axis=0)
        >>> jaxhess.BlockDiagonal(A, rows).to_matrix()
        Array([[2., 0.],
               [0., 3.]], dtype=float32)

    Attributes:
        operator: A.
        blocks: Of its vectors. Static.
        together: Blocks whose products are computed at once. Each takes the memory of a vector, its product and the
            tangents of the activations; every further round of blocks costs one more primal pass. None: all. Static.

    Raises:
        InputError: The blocks are those of other vectors; `together` is below 1.
    """

    operator: LinearOperator
    blocks: Blocks = dataclasses.field(metadata={"static": True})
    together: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        if not isinstance(self.operator, LinearOperator):  # rebuilt from its leaves by JAX, which may be anything
            return
        if self.together is not None and self.together < 1:
            raise InputError(f"together is {self.together}; at least 1 block is computed at once.")
        self.blocks.check(self.operator.shape_dtype)

    def mv(self, v: Vector) -> Vector:
        def kept(total: Vector, numbers: jax.Array, products: Vector) -> tuple[Vector, None]:
            return _add_own(self.blocks, total, numbers, products), None

        start = jax.tree.map(jnp.zeros_like, widen(v))
        return cast(over_blocks(self.operator, self.blocks, v, self.together, kept, start)[0], v)

    @property
    def shape_dtype(self) -> Vector:
        return self.operator.shape_dtype


@describe.register
def _(operator: BlockDiagonal) -> dict[str, Any]:
    """Without `together`, which changes no number."""
    blocks = operator.blocks
    content = repr((blocks.names, [labels.tolist() for labels in blocks.labels]))
    return {
        "kind": "BlockDiagonal",
        "operator": describe(operator.operator),
        "blocks": len(blocks),
        "partition": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


@explain_non_finite.register
def _(operator: BlockDiagonal, v: Vector) -> str:
    return explain_non_finite(operator.operator, v)


def over_blocks(
    operator: LinearOperator,
    blocks: Blocks,
    v: Vector,
    together: int | None,
    add: Callable[[Any, jax.Array, Vector], tuple[Any, Any]],
    carry: Any,
) -> tuple[Any, Any]:
    """Products with v's part in every block, `together` of them at once, handed to `add` round by round.

    Args:
        operator: Whose products A P_b v these are.
        blocks: Of its vectors.
        v: A vector; products are in at least float32.
        together: Products at once; None: all.
        add: From a carry, the numbers [k] of blocks and their products [k, ...] to the next carry and this round's
            results. Blocks are in order. The last round may hold numbers B, whose products are to be ignored.
        carry: Before the first round.

    Returns:
        The last carry, and the rounds' results stacked.
    """
    wide = widen(v)
    rounds = -(-len(blocks) // (together or len(blocks)))
    width = -(-len(blocks) // rounds)
    numbers = np.minimum(np.arange(rounds * width, dtype=np.int32), len(blocks)).reshape(rounds, width)

    def one_round(carry: Any, numbers: jax.Array) -> tuple[Any, Any]:
        parts = jax.vmap(lambda b: blocks.part(wide, b))(numbers)
        return add(carry, numbers, jax.vmap(operator.mv)(parts))

    if rounds > 1:
        return jax.lax.scan(one_round, carry, jnp.asarray(numbers))
    carry, results = one_round(carry, jnp.asarray(numbers[0]))
    return carry, jax.tree.map(lambda x: x[None], results)


def own_and_all(
    blocks: Blocks, own: Vector, everything: Vector, numbers: jax.Array, products: Vector
) -> tuple[Vector, Vector]:
    """Two sums over a round of products [k, ...]: of (A P_b v) on block b alone, and of A P_b v on all."""
    known = numbers < len(blocks)

    def add(total: jax.Array, x: jax.Array) -> jax.Array:
        return total + jnp.sum(jnp.where(known.reshape(-1, *[1] * (x.ndim - 1)), x, 0), axis=0)

    return _add_own(blocks, own, numbers, products), jax.tree.map(add, everything, products)


def _add_own(blocks: Blocks, total: Vector, numbers: jax.Array, products: Vector) -> Vector:
    parts = jax.vmap(blocks.part)(products, numbers)
    return jax.tree.map(lambda t, x: t + jnp.sum(x, axis=0), total, parts)
