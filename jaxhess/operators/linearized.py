"""The Hessian with its primal pass done once: what depends on the data, but not on the vector, is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxhess.distributed import processes
from jaxhess.distributed.memory import available_bytes, bytes_per_device, temporary_bytes
from jaxhess.errors import InputError
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.facts import checksum, describe, explain_non_finite
from jaxhess.operators.hessian import Hessian
from jaxhess.operators.loss import divided
from jaxhess.operators.matmul import with_matmul_precision
from jaxhess.operators.microbatches import Microbatches, sum_and_each
from jaxhess.operators.precision import exact_operator
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, cast


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearizedHessian(LinearOperator):
    """The exact Hessian from `jax.linearize` of the gradient, made by `linearize`.

    The same product as the Hessian's, without its primal pass: 6/3 of a gradient's matrix products instead of 8/3. The
    price is memory: every microbatch's intermediate values stay on the devices, in proportion to tokens; 8.3 times the
    parameters for a model of 6.8M at 512 tokens (9.8 on one CPU). Where the loss rematerialises whole layers, so does
    every product, and little is gained: turn `remat` off.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> H = jaxhess.Hessian(lambda w, x: jnp.mean(jnp.exp(x @ w)), jnp.ones(2), [jnp.eye(2)])
        >>> fast = jaxhess.linearize(H)
        >>> bool(jnp.allclose(fast @ jnp.ones(2), H @ jnp.ones(2))), fast.residual_bytes > 0
        (True, True)

    Attributes:
        hessian: What was linearised.
        residuals: For every group of microbatches the kept arrays, stacked.
        count: What the sum over microbatches is divided by.
    """

    hessian: Hessian
    residuals: tuple[Microbatches, ...]
    count: jax.Array

    def mv(self, v: Vector) -> Vector:
        return self.product_and_each(v, lambda _: ())[0]

    def product_and_each(self, v: Vector, each: Callable[[tuple[Vector, jax.Array]], Any]) -> tuple[Vector, Any]:
        """As that of `Hessian`."""
        pairs = zip(self.hessian.batches, self.residuals, strict=True)
        groups = tuple(Microbatches((batches.stacked, kept.stacked)) for batches, kept in pairs)

        def summed(direction: Vector) -> tuple[Any, Any]:
            def product(pair: tuple[Any, list[jax.Array]]) -> tuple[Vector, jax.Array]:
                batch, kept = pair
                push, count = _linearize(self.hessian, self.hessian.params, batch)
                return self.hessian.pin(_refilled(push, self.hessian, batch, kept)(direction)), count

            return sum_and_each(product, each, groups, self.hessian.accumulation_dtype, direction)

        (total, _), found = with_matmul_precision(summed, self.hessian.matmul_precision)(cast(v, self.hessian.free))
        return self.hessian.pin(divided(total, self.count, v)), found

    @property
    def shape_dtype(self) -> Vector:
        return self.hessian.shape_dtype

    @property
    def residual_bytes(self) -> int:
        """Bytes that the kept arrays take on the device that holds most of them."""
        held: dict[Any, int] = {}
        for leaf in jax.tree.leaves(self.residuals):
            for shard in leaf.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        return max(held.values(), default=0)


@exact_operator.register
def _(operator: LinearizedHessian, dtype: str) -> Hessian:
    exact = exact_operator(operator.hessian, dtype)
    assert isinstance(exact, Hessian)
    return exact


@describe.register
def _(operator: LinearizedHessian) -> dict[str, Any]:
    facts = {"kind": type(operator).__name__, "residual_bytes_per_device": operator.residual_bytes}
    return {**describe(operator.hessian), **facts}


@checksum.register
def _(operator: LinearizedHessian) -> str:
    return checksum(operator.hessian)


@explain_non_finite.register
def _(operator: LinearizedHessian, v: Vector) -> str:
    return explain_non_finite(operator.hessian, v)


def residual_bytes(hessian: Hessian) -> int:
    """Bytes per device that `linearize(hessian)` would keep, from the compiled program; nothing is computed.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> H = jaxhess.Hessian(lambda w, x: jnp.mean(jnp.exp(x @ w)), jnp.zeros(2), [jnp.eye(2)])
        >>> jaxhess.residual_bytes(H) < 1000
        True
    """
    return sum(map(_output_bytes, _programs(hessian)))


def linearize(
    hessian: Hessian, budget: float | None = None, announce: Callable[[int], None] | None = None
) -> LinearizedHessian:
    """The same operator with the primal pass done once and kept.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> H = jaxhess.Hessian(lambda w, x: jnp.mean(jnp.exp(x @ w)), jnp.zeros(2), [jnp.eye(2)])
        >>> jaxhess.linearize(H, budget=1e6) @ jnp.ones(2)
        Array([0.5, 0.5], dtype=float32)

    Args:
        hessian: Restricted or not.
        budget: Bytes per device that the kept arrays may take; None: what the device has left beside what a Lanczos
            run needs.
        announce: Called with those bytes before any is taken.

    Raises:
        InputError: They would take more: the message gives both numbers, and nothing has been computed. The budget
            is not a positive number.
    """
    if budget is not None and not 0 < budget < math.inf:
        raise InputError(f"The budget is {budget}; it is a positive number of bytes per device.")
    programs = _programs(hessian)
    needed = sum(map(_output_bytes, programs))
    if announce is not None:
        announce(needed)
    if budget is None:  # a Lanczos run needs about four vectors, and a product no more than this pass
        vectors = jax.tree.leaves(hessian.shape_dtype)
        working = 4 * bytes_per_device(vectors, 4) + max(map(temporary_bytes, programs))
        left = min(processes.gathered(available_bytes(jax.tree.leaves(hessian.params))))
        allowed, words = left - working, "free"
    else:
        allowed, words = budget, "allowed"
    if needed > allowed:
        raise InputError(
            f"Linearising {sum(map(len, hessian.batches))} microbatches needs {needed / 1e9:.3g} GB per device, "
            f"but only {allowed / 1e9:.3g} GB are {words}. Use fewer or shorter sequences, more devices, or exact "
            "products (--hvp exact)."
        )
    residuals, count = [], jnp.float32(0)
    for program, group in zip(programs, hessian.batches, strict=True):
        kept, counts = program(hessian.params, group.stacked)
        residuals.append(Microbatches(kept))
        count = count + jnp.sum(counts)
    return LinearizedHessian(hessian, tuple(residuals), count)


def abstract_linearized(hessian: Hessian) -> LinearizedHessian:
    """What `linearize(hessian)` returns, as `jax.ShapeDtypeStruct`s with shardings; the Hessian's arrays may be."""
    kept, count = [], None
    for program in _programs(hessian):
        shapes, counts = program.out_info
        kept.append(Microbatches(jax.tree.map(_struct, shapes, program.output_shardings[0])))
        count = jax.ShapeDtypeStruct((), counts.dtype, sharding=program.output_shardings[1])
    return LinearizedHessian(hessian, tuple(kept), count)  # type: ignore[arg-type]


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _linearize(hessian: Hessian, params: Any, batch: Any) -> tuple[Any, jax.Array]:
    """The linear map v -> product of one batch, a pytree of the arrays it needs, and the batch's count."""
    one = dataclasses.replace(hessian, params=params)
    gradient = jax.grad(lambda free: one.sum_and_count(free, batch), has_aux=True)
    _, push, count = jax.linearize(gradient, one.free, has_aux=True)
    return push, count


def _refilled(push: Any, hessian: Hessian, batch: Any, kept: list[jax.Array]) -> Any:
    """The linear map with the kept arrays put in: what computed them before is then dead code, and dropped.

    Arrays that do not depend on the data (weights and casts of them, masks, zeros) are not kept but computed here:
    each microbatch would have its own copy of them, and what depends on nothing would lie whole on every device.
    """
    leaves, treedef = jax.tree.flatten(push)
    places = _kept_places(hessian, batch)
    filled = dict(zip(places, kept, strict=True))
    return jax.tree.unflatten(treedef, [filled.get(k, leaf) for k, leaf in enumerate(leaves)])


def _kept_places(hessian: Hessian, batch: Any) -> list[int]:
    """Which of the linear map's arrays depend on the batch."""

    def leaves(params: Any, batch: Any) -> list[jax.Array]:
        return jax.tree.leaves(_linearize(hessian, params, batch)[0])

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (hessian.params, batch))
    jaxpr = jax.make_jaxpr(leaves)(*abstract).jaxpr
    count = len(jax.tree.leaves(hessian.params))
    depends = _dependent(jaxpr, [k >= count for k in range(len(jaxpr.invars))])
    return [k for k, d in enumerate(depends) if d]


def _dependent(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs. Loops and calls are looked into; branches are not."""
    marked = {v for v, d in zip(jaxpr.invars, inputs, strict=True) if d}
    for equation in jaxpr.eqns:
        given = [not isinstance(x, core.Literal) and x in marked for x in equation.invars]
        marked.update(v for v, d in zip(equation.outvars, _equation_dependent(equation, given), strict=True) if d)
    return [not isinstance(x, core.Literal) and x in marked for x in jaxpr.outvars]


def _equation_dependent(equation: Any, given: list[bool]) -> list[bool]:
    """The same for one equation. What is not understood counts as dependent: it is then kept, which is never wrong."""
    unknown = [any(given)] * len(equation.outvars)
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    fits = inner is not None and len(inner.invars) == len(given) and len(inner.outvars) == len(unknown)
    if not any(given) or not fits:
        return unknown
    if equation.primitive.name == "scan":
        layout = _scan_layout(equation.params)
        if layout is None or sum(layout) > len(given):
            return unknown
        first, carries = layout
        carried = slice(first, first + carries)
        while True:  # a carry that depends after one iteration does so before the next
            outputs = _dependent(inner, given)
            grown = [a or b for a, b in zip(given[carried], outputs[:carries], strict=True)]
            if grown == given[carried]:
                return outputs
            given = [*given[:first], *grown, *given[carried.stop :]]
    if equation.primitive.name in ("jit", "pjit", "remat2", "checkpoint", "custom_jvp_call", "closed_call"):
        return _dependent(inner, given)
    return unknown


def _scan_layout(params: dict[str, Any]) -> tuple[int, int] | None:
    """How many constants and carries a scan has; JAX 0.10 and 0.11 write it down differently."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    try:
        constants, carries, _ = params["ft_in"].unpack()
        return len(list(constants.vals)), len(list(carries.vals))
    except (KeyError, AttributeError, TypeError, ValueError):
        return None


def _programs(hessian: Hessian) -> list[jax.stages.Compiled]:
    """For every group the compiled program (params, stacked batches) -> (stacked kept arrays, counts)."""

    def linear(params: Any, batch: Any) -> tuple[list[jax.Array], jax.Array]:
        push, count = _linearize(hessian, params, batch)
        leaves = jax.tree.leaves(push)
        return [leaves[k] for k in _kept_places(hessian, batch)], count

    def program(params: Any, stacked: Any) -> Any:
        if len(jax.tree.leaves(stacked)[0]) == 1:
            return jax.tree.map(lambda x: x[None], linear(params, jax.tree.map(lambda x: x[0], stacked)))
        return jax.lax.map(lambda batch: linear(params, batch), stacked)

    jitted = jax.jit(with_matmul_precision(program, hessian.matmul_precision))
    return [jitted.lower(hessian.params, group.stacked).compile() for group in hessian.batches]


def _output_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.output_size_in_bytes
