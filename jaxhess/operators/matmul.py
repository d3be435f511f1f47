"""Matrix products of float32 arrays by the dot algorithms of XLA, between float32 and bfloat16 in speed and precision.

A float32 number is cut into two or three parts of few bits, which tensor cores multiply exactly and add in float32.
NVIDIA GPUs have these products (compute capability 8.0 and later). Elsewhere they are emulated: parts are cut bit by
bit as XLA's GPU compiler does, and their products are float32 ones, which are exact. Two things are not emulated:
tensor cores add with a few bits less than float32 has, and in another order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxhess.errors import InputError

MatmulPrecision = Literal["float32", "bf16x6", "tf32x3", "bf16x3", "tf32"]

NATIVE = "cuda"
"""The platform whose compiler has the algorithms. Others refuse them, or take float32 and do not say so."""


@dataclasses.dataclass(frozen=True)
class DotAlgorithm:
    """How products of float32 numbers are made.

    Attributes:
        preset: Its name in `jax.lax.DotAlgorithmPreset`.
        dropped: Low bits of a float32 number that a part does not have; cut off, not rounded.
        parts: Parts of a number; part i is what is left of it after the parts before.
        terms: Products of parts (of the left number, of the right one) in the order in which they are added, the
            smallest first.
        unit: Dtype of the parts, that tensor cores multiply: "bfloat16" or "tfloat32".
        error: The largest relative error of a product of two numbers, from the bits that are lost and the products that
            are left out.
    """

    preset: str
    dropped: int
    parts: int
    terms: tuple[tuple[int, int], ...]
    unit: str
    error: float


_X3 = ((0, 1), (1, 0), (0, 0))
_X6 = ((0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0))
ALGORITHMS: dict[str, DotAlgorithm] = {
    # A bfloat16 part has 8 bits, a TF32 part 11: two parts lose 2^-15 (the last bfloat16 part is rounded) and 2^-20 of
    # a number and leave out 2^-14 and 2^-20 of a product; three of 8 bits lose nothing and leave out 2 x 2^-21.
    "bf16x6": DotAlgorithm("BF16_BF16_F32_X6", 16, 3, _X6, "bfloat16", 2.0**-20),
    "tf32x3": DotAlgorithm("TF32_TF32_F32_X3", 13, 2, _X3, "tfloat32", 3 * 2.0**-20),
    "bf16x3": DotAlgorithm("BF16_BF16_F32_X3", 16, 2, _X3, "bfloat16", 2.0**-13),
    "tf32": DotAlgorithm("TF32_TF32_F32", 13, 1, ((0, 0),), "tfloat32", 2.0**-9),
}
"""By the names that `matmul_precision` takes beside "float32", the most precise first."""

_BY_PRESET = {jax.lax.DotAlgorithmPreset[x.preset]: x for x in ALGORITHMS.values()}


def check_matmul_precision(precision: str, dtypes: tuple[str, ...]) -> None:
    """Raises InputError for an unknown name, and for products that are not of float32 arrays."""
    if precision not in get_args(MatmulPrecision):
        raise InputError(f"matmul_precision is {precision!r}; it is one of {', '.join(get_args(MatmulPrecision))}.")
    if precision != "float32" and set(dtypes) != {"float32"}:
        raise InputError(
            f"matmul_precision {precision} is about products of float32 arrays, and this operator computes in "
            f"{' and '.join(dtypes)}: leave it at float32, or compute in float32."
        )


def with_matmul_precision(f: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """f with its float32 matrix products in this precision, also those of derivatives taken inside f.

    For pytrees of arrays. Products that name a precision of their own keep it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess.operators.matmul import with_matmul_precision
        >>> x = jnp.array([[1 + 2**-12]], jnp.float32)  # the second bit is lost in TF32
        >>> [float(with_matmul_precision(jnp.matmul, name)(x, x)[0, 0]) for name in ("tf32", "bf16x6")]
        [1.0, 1.00048828125]
    """

    def at(*args: Any) -> Any:
        if precision == "float32":
            with jax.default_matmul_precision("highest"):
                return f(*args)
        with jax.default_matmul_precision(ALGORITHMS[precision].preset):
            native, emulated = _with_dots(f, _native), _with_dots(f, _emulated)
            return jax.lax.platform_dependent(*args, **{NATIVE: native}, default=emulated)

    return at


def emulated_dot(left: jax.Array, right: jax.Array, algorithm: DotAlgorithm, dimensions: Any) -> jax.Array:
    """`jax.lax.dot_general(left, right, dimensions)` by the algorithm, from float32 products of parts.

    One product, of the parts side by side along a contracted axis: the same sum, and a program of moderate size.
    """
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=dimensions,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    (lefts, finite_left), (rights, finite_right) = (_parts(x.astype(jnp.float32), algorithm) for x in (left, right))
    # What is left of an infinite number is not a number: then only the first parts count, as on a GPU.
    *small, last = algorithm.terms
    lefts = [*(finite_left[i] for i, _ in small), lefts[last[0]]]
    rights = [*(finite_right[j] for _, j in small), rights[last[1]]]
    (left_axes, right_axes), _ = dimensions
    if not left_axes:
        return functools.reduce(jnp.add, map(product, lefts, rights))
    return product(jnp.concatenate(lefts, left_axes[0]), jnp.concatenate(rights, right_axes[0]))


def _parts(x: jax.Array, algorithm: DotAlgorithm) -> tuple[list[jax.Array], list[jax.Array]]:
    """x [...] in float32 cut into parts, the largest first, and the same with zeros in place of what is not finite.

    A last part in bfloat16 is rounded, as XLA does it.
    """
    found = []
    for k in range(algorithm.parts):
        if k and k == algorithm.parts - 1 and algorithm.unit == "bfloat16":
            part = jax.lax.reduce_precision(x, 8, 7)
        else:
            bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
            part = jax.lax.bitcast_convert_type(bits & jnp.uint32(2**32 - 2**algorithm.dropped), jnp.float32)
        found.append(part)
        x = x - part
    return found, [jnp.where(jnp.isfinite(part), part, 0) for part in found]


def _native(left: jax.Array, right: jax.Array, params: dict[str, Any]) -> jax.Array:
    """A product whose algorithm stays with it through XLA's partitioning over devices.

    On its way into and out of Shardy, XLA (JAX 0.10) forgets the algorithm of [m, k] times [k, n], and takes TF32. It
    keeps that of [m, k] times [n, k]', and folds the transposition into the product later.
    """
    if params["dimension_numbers"] == (((1,), (0,)), ((), ())):
        right, params = right.T, {**params, "dimension_numbers": (((1,), (1,)), ((), ()))}
    return jax.lax.dot_general_p.bind(left, right, **params)


def _emulated(left: jax.Array, right: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The same product from float32 products of parts."""
    algorithm, dimensions = _BY_PRESET[params["precision"]], params["dimension_numbers"]
    return emulated_dot(left, right, algorithm, dimensions)


Dot = Callable[[jax.Array, jax.Array, dict[str, Any]], jax.Array]


def _with_dots(f: Callable[..., Any], dot: Dot) -> Callable[..., Any]:
    """f with every product by one of the algorithms replaced by `dot(left, right, parameters of the product)`."""

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        flat = core.jaxpr_as_fun(_replaced(closed, dot))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return run


def _replaced(x: Any, dot: Dot) -> Any:
    """A parameter of an equation, with the products replaced in all programs inside it (loops, calls, branches)."""
    if isinstance(x, core.Jaxpr):  # from JAX 0.12 on a closed one too
        return x.replace(eqns=[_equation(equation, dot) for equation in x.eqns])
    if isinstance(x, core.ClosedJaxpr):
        return x.replace(jaxpr=_replaced(x.jaxpr, dot))
    if type(x) in (tuple, list):
        return type(x)(_replaced(y, dot) for y in x)
    return x


def _equation(equation: Any, dot: Dot) -> Any:
    params = equation.params
    if equation.primitive.name == "dot_general" and params["precision"] in _BY_PRESET:
        dtype = equation.outvars[0].aval.dtype
        one = jax.jit(lambda left, right: dot(left, right, params).astype(dtype))
        (call,) = jax.make_jaxpr(one)(*(x.aval for x in equation.invars)).jaxpr.eqns
        return equation.replace(primitive=call.primitive, params=call.params)
    return equation.replace(params={name: _replaced(x, dot) for name, x in params.items()})
