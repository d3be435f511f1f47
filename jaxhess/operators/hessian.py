"""The exact Hessian of a mean loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxhess.operators.base import LinearOperator
from jaxhess.operators.microbatches import as_groups, sum_over_microbatches
from jaxhess.vectors import Vector, cast, named_sharding

Loss = Callable[[Any, Any], Any]
"""`loss(params, batch)`: `(sum, count)`, or a plain scalar, which counts as one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian(LinearOperator):
    """The Hessian of `sum of losses / sum of counts` over all batches, by forward-over-reverse differentiation.

    `H @ v` is the directional derivative of the gradient along v, exact up to rounding (Pearlmutter 1994); about 8/3
    of a gradient's matrix products. Dividing once, by the count over all batches, makes it independent of how the data
    is cut into microbatches or padded. Matrix products run in full float32 where the parameters are float32 (no TF32).

    Attributes:
        loss: `loss(params, batch) -> (sum, count)`, twice differentiable in forward-over-reverse mode: no `custom_vjp`.
            A function that returns a plain scalar (a batch's mean loss) is accepted; its batches weigh the same.
            Static: reuse the same function object, or each new one is compiled again.
        params: Any pytree of floating-point arrays, sharded or not.
        batches: A list of batches, or `Microbatches`. Stored as groups of equal shape.

    Raises:
        TypeError, ValueError: `batches` is not a list, or empty; a parameter is not floating point.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: Any
    batches: Any
    shardings: tuple[NamedSharding | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    """Shardings of the parameters' leaves, read off them: products are pinned to these."""

    def __post_init__(self) -> None:
        if self.shardings is not None:  # rebuilt from its leaves by JAX, which may be anything
            return
        for path, leaf in jax.tree.flatten_with_path(self.params)[0]:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                name, dtype = jax.tree_util.keystr(path), jnp.result_type(leaf)
                raise ValueError(f"Parameter {name} has dtype {dtype}; a Hessian needs floating-point parameters.")
        object.__setattr__(self, "batches", as_groups(self.batches))
        object.__setattr__(self, "shardings", tuple(map(named_sharding, jax.tree.leaves(self.params))))

    def mv(self, v: Vector) -> Vector:
        """H v in the dtypes of v. The direction is rounded to the parameters' dtypes first; sums are in float32."""

        def product(batch: Any) -> tuple[Vector, jax.Array]:
            gradient = jax.grad(lambda params: self._sum_and_count(params, batch), has_aux=True)
            _, tangent, count = jax.jvp(gradient, (self.params,), (cast(v, self.params),), has_aux=True)
            return self._pin(tangent), count

        with jax.default_matmul_precision("highest"):
            total, count = sum_over_microbatches(product, self.batches)
        return self._pin(jax.tree.map(lambda t, e: (t / count.astype(t.dtype)).astype(e.dtype), total, v))

    @property
    def shape_dtype(self) -> Vector:
        leaves, treedef = jax.tree.flatten(self.params)
        assert self.shardings is not None
        structs = [
            jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=s)
            for x, s in zip(leaves, self.shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, structs)

    def validate(self) -> dict[str, Any]:
        """The mean loss and the count it was divided by.

        Raises:
            FloatingPointError: The loss of a microbatch is not finite; names it.
            ValueError: Nothing counts: the mean loss is undefined.
        """
        total, count, seen = 0.0, 0.0, 0
        for group in self.batches:
            sums, counts = (np.asarray(x, np.float64) for x in _losses(self, group))
            bad = np.flatnonzero(~np.isfinite(sums))
            if bad.size:
                raise FloatingPointError(
                    f"The loss of microbatch {seen + bad[0]} is {sums[bad[0]]}: the parameters or the data hold NaN or "
                    "infinite values, or the model overflows in this dtype."
                )
            total, count, seen = total + sums.sum(), count + counts.sum(), seen + len(group)
        if count == 0:
            raise ValueError("The count of the loss is 0 over all batches: no token or example has weight.")
        return {"loss": total / count, "count": count}

    def explain_non_finite(self, v: Vector) -> str:
        index = 0
        for group in self.batches:
            for k in range(len(group)):
                one = jax.tree.map(lambda x, k=k: x[k : k + 1], group)
                product = dataclasses.replace(self, batches=(one,)) @ v
                if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(product)):
                    return f"the product over microbatch {index} alone is not finite"
                index += 1
        return "the product over each microbatch alone is finite, their sum is not"

    def _sum_and_count(self, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        value = self.loss(params, batch)
        total, count = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
        if not all(
            isinstance(x, jax.Array | np.ndarray | np.generic | float | int) and jnp.shape(x) == ()
            for x in (total, count)
        ):
            shapes = jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array) else type(x).__name__, value)
            raise ValueError(
                f"The loss returned {shapes}; it must return (sum, count), two scalars, or one scalar mean."
            )
        return total, jax.lax.stop_gradient(jnp.asarray(count, jnp.promote_types(jnp.result_type(total), jnp.float32)))

    def _pin(self, v: Vector) -> Vector:
        """v with every leaf constrained to its parameter's sharding, which GSPMD might otherwise replicate."""
        assert self.shardings is not None
        leaves, treedef = jax.tree.flatten(v)
        pinned = [
            x if s is None or s.mesh.size == 1 else jax.lax.with_sharding_constraint(x, s)
            for x, s in zip(leaves, self.shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, pinned)


@jax.jit
def _losses(operator: Hessian, group: Any) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda batch: operator._sum_and_count(operator.params, batch), group.stacked)
