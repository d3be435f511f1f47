"""What all operators made from a loss, parameters and batches share."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxhess import vectors
from jaxhess.distributed.memory import devices_of
from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.facts import checksum, describe, explain_non_finite, validate
from jaxhess.operators.matmul import ALGORITHMS, MatmulPrecision, check_matmul_precision, with_matmul_precision
from jaxhess.operators.microbatches import as_groups, sum_and_each, sum_over_microbatches
from jaxhess.operators.precision import exact_operator, product_dtypes, product_eps
from jaxhess.operators.restriction import Restriction, leaf_name, restriction
from jaxhess.operators.routing import has_routing, margins
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, cast, check_accumulation_dtype, named_sharding, widen

Loss = Callable[[Any, Any], Any]
"""`loss(params, batch)`: `(sum, count)`, or a plain scalar, which counts as one."""


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LossOperator(LinearOperator):
    """Curvature of `sum of losses / sum of counts` over all batches.

    Dividing once, by the count over all batches, makes it independent of how the data is cut into microbatches or
    padded. Matrix products run in full float32 where the parameters are float32 (no TF32), or as asked for.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxhess
        >>> def loss(params, batch):
        ...     return jnp.mean((batch @ params["w"] + params["b"]) ** 2)
        >>> H = jaxhess.Hessian(loss, {"b": jnp.ones(1), "w": jnp.ones(2)}, [jnp.eye(2)])
        >>> H.dim, H.restrict("w").dim, H.in_dtype("bfloat16").shape_dtype["b"].dtype
        (3, 2, dtype(bfloat16))
        >>> value, gradient = jax.jit(type(H).value_and_gradient)(H)
        >>> float(value), gradient["b"]
        (4.0, Array([4.], dtype=float32))

    Attributes:
        loss: `loss(params, batch) -> (sum, count)`, twice differentiable in forward-over-reverse mode: no `custom_vjp`.
            The count is not negative and does not depend on the parameters.
            A function that returns a plain scalar (a batch's mean loss) is accepted; its batches weigh the same.
            Static: reuse the same function object, or each new one is compiled again.
        params: Any pytree of floating-point arrays, sharded or not.
        batches: A list of batches, or `Microbatches`. Stored as groups of equal shape.
        accumulation_dtype: Of sums over microbatches, "float32" or "float64"; never narrower than the products.
        matmul_precision: Of products of float32 matrices: "float32", or "bf16x6", "tf32x3", "bf16x3", "tf32", which are
            faster on GPUs and less precise in this order (`jaxhess.operators.matmul`); emulated, and then slower, on
            all other devices. Convolutions know only float32.

    Raises:
        TypeError, ValueError: `batches` is not a list, or empty; there is no parameter, or one without entries or not
            floating point; a matmul precision that is unknown, or not for these dtypes.
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: Any
    batches: Any
    _: dataclasses.KW_ONLY
    accumulation_dtype: str = dataclasses.field(default="float32", metadata={"static": True})
    matmul_precision: MatmulPrecision = dataclasses.field(default="float32", metadata={"static": True})
    restriction: Restriction | None = dataclasses.field(default=None, metadata={"static": True})
    """Which parameters are free; None: all. See `restrict`."""
    shardings: tuple[NamedSharding | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    """Shardings of a vector's leaves, read off the parameters: products are pinned to these."""

    def __post_init__(self) -> None:
        if self.shardings is not None:  # rebuilt from its leaves by JAX, which may be anything
            return
        named = jax.tree.flatten_with_path(self.params)[0]
        if not named:
            raise InputError(f"params is {self.params!r}: there are no parameters in it.")
        for path, variable in jax.tree.flatten_with_path(self.params, is_leaf=_is_variable)[0]:
            if _is_variable(variable) and not isinstance(variable, nnx.Param):
                raise InputError(
                    f"{leaf_name(path)} is a {type(variable).__name__}, which is no parameter: leave it out of params, "
                    "as in nnx.split(model, nnx.Param, ...), or take jaxhess.module_function(model)."
                )
        for path, leaf in named:
            if 0 in jnp.shape(leaf):
                name, shape = jax.tree_util.keystr(path), jnp.shape(leaf)
                raise InputError(f"Parameter {name} has shape {shape}, no entries: leave it out of the parameters.")
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                name, dtype = jax.tree_util.keystr(path), jnp.result_type(leaf)
                raise InputError(f"Parameter {name} has dtype {dtype}; a Hessian needs floating-point parameters.")
        check_accumulation_dtype(self.accumulation_dtype)
        check_matmul_precision(self.matmul_precision, computed_in(self))
        object.__setattr__(self, "batches", as_groups(self.batches))
        object.__setattr__(self, "shardings", tuple(map(named_sharding, jax.tree.leaves(self.params))))

    def value_and_gradient(self) -> tuple[jax.Array, Vector]:
        """The mean loss over all batches and its gradient in the free parameters, both in at least float32.

        Summed over microbatches as products are; to be called inside `jit`.
        """

        def parts(batch: Any) -> tuple[jax.Array, jax.Array, Vector]:
            (total, count), gradient = jax.value_and_grad(self.sum_and_count, has_aux=True)(self.free, batch)
            return total, count, self.pin(gradient)

        sums = functools.partial(sum_over_microbatches, parts, self.batches, self.accumulation_dtype)
        total, count, gradient = with_matmul_precision(sums, self.matmul_precision)()
        return total / count, self.pin(divided(gradient, count, widen(self.free)))

    @abc.abstractmethod
    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        """The product of one batch's summed loss with v (already in the parameters' dtypes), and the batch's count."""

    def mv(self, v: Vector) -> Vector:
        """The product in the dtypes of v. The direction is rounded to the parameters' dtypes first."""
        return self.product_and_each(v, lambda _: ())[0]

    def product_and_each(self, v: Vector, each: Callable[[tuple[Vector, jax.Array]], Any]) -> tuple[Vector, Any]:
        """The product, and each(`product_sum`) of every microbatch, [microbatches, ...]."""

        def summed(direction: Vector) -> tuple[Any, Any]:
            def product(batch: Any) -> tuple[Vector, jax.Array]:
                total, count = self.product_sum(direction, batch)
                return self.pin(total), count

            return sum_and_each(product, each, self.groups, self.accumulation_dtype, direction)

        (total, count), found = with_matmul_precision(summed, self.matmul_precision)(cast(v, self.free))
        return self.pin(divided(total, count, v)), found

    @property
    def groups(self) -> tuple:
        """What `product_sum` is summed over, as groups of equal shape."""
        return self.batches

    @property
    def free(self) -> Any:
        """The parameters that curvature is taken in: all, or those of the restriction."""
        return self.params if self.restriction is None else self.restriction.take(self.params)

    @property
    def shape_dtype(self) -> Vector:
        free = jax.eval_shape(lambda params: dataclasses.replace(self, params=params).free, self.params)
        leaves, treedef = jax.tree.flatten(free)
        assert self.shardings is not None
        structs = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, self.shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, structs)

    def restrict(self, *patterns: str, layers: Iterable[int] | None = None) -> Self:
        """The operator's diagonal block on some of the parameters, the others held fixed.

        Vectors are then trees like the parameters with None where a leaf is held fixed, and with the chosen layers only
        in stacked leaves. Leaves held fixed are not differentiated, which saves their matrix products; of stacked
        leaves all layers are, so that a choice of layers costs as much as all of them.

        Args:
            patterns: Shell patterns for names like `layers/attention/query/kernel`, or bare words for their components:
                `attention`, `mlp`, `norm`, `embed`, `head`. None: every leaf.
            layers: Indices of layers; leaves outside the layers are then held fixed.

        Raises:
            InputError: Nothing matches (the message lists the names); no such layer; restricted already.
        """
        if self.restriction is not None:
            raise InputError(f"Restricted to {self.restriction} already: restrict the whole operator.")
        chosen = restriction(self.params, patterns, layers, getattr(self.loss, "stacks", None))
        shardings = tuple(chosen.shardings(self.params))
        return dataclasses.replace(self, restriction=chosen, shardings=shardings)

    def in_dtype(self, dtype: str) -> Self:
        """The same operator with parameters stored and computed in `dtype`, matrix products in all of its precision.

        A loss is taken to follow its parameters' dtype; one that has its own says so by an attribute `dtype` and a
        method `in_dtype(dtype)`.
        """
        loss = self.loss.in_dtype(dtype) if hasattr(self.loss, "in_dtype") else self.loss
        params = cast(self.params, jnp.dtype(dtype))
        return dataclasses.replace(self, loss=loss, params=params, matmul_precision="float32")

    def sum_and_count(self, free: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """The loss of one batch as a function of the free parameters: (sum, count), the latter not differentiated."""
        return sum_and_count(self.loss, self.whole(free), batch)

    def gradient_sum(self, free: Any, batch: Any) -> tuple[Vector, jax.Array]:
        """The gradient of one batch's summed loss in the free parameters, in their dtypes, and the batch's count."""
        gradient, count = jax.grad(self.sum_and_count, has_aux=True)(free, batch)
        return self.pin(gradient), count

    def whole(self, free: Any) -> Any:
        """All parameters, the free ones replaced."""
        return free if self.restriction is None else self.restriction.insert(free, self.params)

    def pin(self, v: Vector) -> Vector:
        """v with every leaf constrained to its parameter's sharding, which GSPMD might otherwise replicate."""
        assert self.shardings is not None
        leaves, treedef = jax.tree.flatten(v)
        pinned = [
            x if s is None or s.mesh.size == 1 else jax.lax.with_sharding_constraint(x, s)
            for x, s in zip(leaves, self.shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, pinned)


@product_dtypes.register
def _(operator: LossOperator) -> tuple[str, ...]:
    stored = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(operator.params)}
    return tuple(sorted(stored | ({str(operator.loss.dtype)} if hasattr(operator.loss, "dtype") else set())))


@product_eps.register
def _(operator: LossOperator) -> float:
    eps = max(float(jnp.finfo(dtype).eps) for dtype in product_dtypes(operator))
    algorithm = ALGORITHMS.get(operator.matmul_precision)
    return eps if algorithm is None else max(eps, algorithm.error)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def computed_in(operator: LossOperator) -> tuple[str, ...]:
    """The dtypes of matrix products: the loss's own, or those of the parameters."""
    own = getattr(operator.loss, "dtype", None)
    return product_dtypes(operator) if own is None else (str(own),)


@exact_operator.register
def _(operator: LossOperator, dtype: str) -> LinearOperator:
    loss = operator.loss
    return dataclasses.replace(operator, loss=loss.reference() if hasattr(loss, "reference") else loss).in_dtype(dtype)


@describe.register
def describe_loss(operator: LossOperator) -> dict[str, Any]:
    """Its kind, dtypes and restriction; and the precision of float32 products, and where they were emulated."""
    facts: dict[str, Any] = {
        "kind": type(operator).__name__,
        "dtypes": list(product_dtypes(operator)),
        "accumulation_dtype": operator.accumulation_dtype,
    }
    if getattr(operator.loss, "balance", 0):
        facts["balance"] = operator.loss.balance  # type: ignore[attr-defined]
    if "float32" in computed_in(operator):
        facts["matmul_precision"] = operator.matmul_precision
    if operator.matmul_precision != "float32":
        device = devices_of(jax.tree.leaves(operator.params))[0]
        facts["matmul_emulated"] = device.platform != "gpu"
    if operator.restriction is not None:
        facts["restriction"] = json_ready(dataclasses.asdict(operator.restriction.block))
    return facts


@checksum.register
def _(operator: LossOperator) -> str:
    """That of the parameters. Batches are cut and padded for a mesh; the mean loss tells them apart (`validate`)."""
    return vectors.checksum(operator.params)


@validate.register
def validate_loss(operator: LossOperator) -> dict[str, Any]:
    """The mean loss and the count it was divided by; with experts also the margins of their choice.

    Raises:
        InputError: The loss of a microbatch is not finite; names it; nothing counts, so that the mean loss is
            undefined; a count is negative, not finite, or depends on the parameters.
    """
    total, count, seen = 0.0, 0.0, 0
    for group in operator.batches:
        sums, counts = (np.asarray(x, np.float64) for x in _losses(operator.loss, operator.params, group))
        bad = np.flatnonzero(~np.isfinite(sums))
        if bad.size:
            raise InputError(
                f"The loss of microbatch {seen + bad[0]} is {sums[bad[0]]}: the parameters or the data hold NaN or "
                "infinite values, or the model overflows in this dtype."
            )
        odd = np.flatnonzero(~((counts >= 0) & np.isfinite(counts)))
        if odd.size:
            raise InputError(
                f"The count of microbatch {seen + odd[0]} is {counts[odd[0]]}; it is a number of tokens or "
                "examples, or a sum of weights: finite and not negative."
            )
        if _count_depends(operator, group):
            raise InputError(
                "The count of the loss changes with the parameters, and the sum is divided by it as if it did not: "
                "return a count that only depends on the batch, or the quotient alone as a mean loss."
            )
        total, count, seen = total + sums.sum(), count + counts.sum(), seen + len(group)
    if count == 0:
        raise InputError("The count of the loss is 0 over all batches: no token or example has weight.")
    facts: dict[str, Any] = {"loss": float(total / count), "count": float(count)}
    if has_routing(operator.loss):
        facts["routing"] = margins(operator.loss, operator.params, operator.batches)
    return facts


@explain_non_finite.register
def explain_non_finite_product(operator: LossOperator, v: Vector) -> str:
    """Which microbatch's product is not finite."""
    index = 0
    for group in operator.groups:
        for k in range(len(group)):
            one = jax.tree.map(lambda x, k=k: x[k : k + 1], group)
            if not _part_is_finite(operator, one, v):
                return f"the product over microbatch {index} alone is not finite"
            index += 1
    return "the product over each microbatch alone is finite, their sum is not"


def divided(total: Vector, count: jax.Array, like: Vector) -> Vector:
    """total / count in the dtypes of `like`."""
    return jax.tree.map(lambda t, e: (t / count.astype(t.dtype)).astype(e.dtype), total, like)


def sum_and_count(loss: Loss, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of a loss of either form, the count not differentiated.

    Raises:
        InputError: It returned anything else.
    """
    total, count = _sum_and_count(loss, params, batch)
    return total, jax.lax.stop_gradient(count)


def _sum_and_count(loss: Loss, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    value = loss(params, batch)
    total, count = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
    if not all(
        isinstance(x, jax.Array | np.ndarray | np.generic | float | int) and jnp.shape(x) == () for x in (total, count)
    ):
        shapes = jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array) else type(x).__name__, value)
        raise InputError(f"The loss returned {shapes}; it must return (sum, count), two scalars, or one scalar mean.")
    return total, jnp.asarray(count, jnp.promote_types(jnp.result_type(total), jnp.float32))


@jax.jit(static_argnums=0)
def _losses(loss: Loss, params: Any, group: Any) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda batch: sum_and_count(loss, params, batch), group.stacked)


@jax.jit
def _count_depends(operator: LossOperator, group: Any) -> jax.Array:
    """Whether the count of the group's first batch has a gradient. Where it has none XLA drops the whole pass."""
    batch = jax.tree.map(lambda x: x[0], group.stacked)
    gradient = jax.grad(lambda free: _sum_and_count(operator.loss, operator.whole(free), batch)[1])(operator.free)
    return functools.reduce(jnp.logical_or, [(x != 0).any() for x in jax.tree.leaves(gradient)])


@jax.jit
def _part_is_finite(operator: LossOperator, one: Any, v: Vector) -> jax.Array:
    batch = jax.tree.map(lambda x: x[0], one.stacked)
    product = with_matmul_precision(lambda v: operator.product_sum(v, batch), operator.matmul_precision)
    total, _ = product(cast(v, operator.free))
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in jax.tree.leaves(total)])
