"""Matrix products of rows that are sorted into groups with a kernel for each group: the experts of a mixture.

`jax.lax.ragged_dot` says the same, but multiplies all rows with all kernels on a CPU. Here a row is multiplied with its
own kernel alone, up to the padding of tiles (`jaxhess.models.grouped_kernels`). JAX cannot differentiate through tiles
that are skipped, so these are primitives with rules. They are linear in each of two arrays, and closed under
differentiation to any order, with the transpose of a kernel taken as it is read:

    product(x, W) = x_r W_g(r)                                 transposed: product(c, W') and outer(x, c)
    outer(x, c)   = sum over the rows r of g of x_r c_r'       transposed: product(c, C') and product(x, C)

Several vectors at once (`jax.vmap`): rows are put beside the rows of their group, so that tiles are fuller; kernels are
multiplied one after the other. Where the sizes of groups differ between the vectors, they are computed one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh

from jaxhess.errors import InputError
from jaxhess.models import grouped_kernels
from jaxhess.models.fused_attention import compiled_for


def grouped_matmul(rows: jax.Array, kernels: jax.Array, sizes: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """`rows[r] @ kernels[g]`, [R, F], where g is the group of row r.

    Sums are accumulated in at least float32, and rounded to the dtype of the arrays. Float32 products on NVIDIA GPUs
    have the precision of `jax.default_matmul_precision` at the call.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxhess.models.grouped_matmul import grouped_matmul
        >>> kernels = jnp.array([[[1.0]], [[10.0]], [[100.0]]])
        >>> grouped_matmul(jnp.array([[1.0], [2.0], [3.0], [4.0]]), kernels, jnp.array([1, 0, 2])).ravel().tolist()
        [1.0, 200.0, 300.0, 0.0]

    Args:
        rows: [R, D], sorted by group: the first `sizes[0]` are those of group 0.
        kernels: [E, D, F], of the same dtype.
        sizes: [E] int32, rows of each group, together at most R. Rows after those of all groups give zeros, whatever
            they are, and have no gradient.
        mesh: That of the `jax.shard_map` around the call, where programs are compiled for GPUs that are not there.

    Raises:
        InputError: The shapes do not fit together, or the dtypes differ.
    """
    shapes = [tuple(x.shape) for x in (rows, kernels, sizes)]
    if [len(s) for s in shapes] != [2, 3, 1] or shapes[0][1] != shapes[1][1] or shapes[1][0] != shapes[2][0]:
        raise InputError(
            f"Rows {shapes[0]}, kernels {shapes[1]} and sizes {shapes[2]} do not fit: they are [R, D], [E, D, F], [E]."
        )
    if rows.dtype != kernels.dtype or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise InputError(
            f"Rows are {rows.dtype}, kernels {kernels.dtype} and sizes {sizes.dtype}: rows and kernels must be of one "
            "dtype, and sizes integers."
        )
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return product_p.bind(rows, kernels, sizes.astype(jnp.int32), transposed=False, precision=precision, mesh=mesh)


def _primitive(name: str, run: Callable[..., jax.Array], shape: Callable[..., tuple[int, ...]]) -> Primitive:
    """`run` as a primitive of two arrays and sizes; `shape` is that of its result."""
    primitive = Primitive(name)
    primitive.def_impl(lambda *arrays, mesh, **how: jax.jit(functools.partial(run, **how))(*arrays))
    primitive.def_abstract_eval(
        lambda a, b, sizes, **how: a.update(shape=shape(a.shape, b.shape, sizes.shape, **how), weak_type=False)
    )
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    lower = mlir.lower_fun(run, multiple_results=False)

    def lowered(context: Any, *arrays: Any, mesh: Mesh | None, **how: Any) -> Any:
        with compiled_for(mesh):
            return lower(context, *arrays, **how)

    mlir.register_lowering(primitive, lowered)
    return primitive


def _product_shape(rows: Any, kernels: Any, sizes: Any, transposed: bool, **how: Any) -> tuple[int, ...]:
    return rows[0], *kernels[:-3], kernels[-2 if transposed else -1]


def _outer_shape(rows: Any, others: Any, sizes: Any, **how: Any) -> tuple[int, ...]:
    vectors = max(rows[1:-1], others[1:-1])
    return *vectors, *sizes, rows[-1], others[-1]


def _jvp(primitive: Primitive, arrays: Sequence[Any], tangents: Sequence[Any], **how: Any) -> tuple[Any, Any]:
    """Linear in both arrays: the sum of two products, each of one tangent."""
    a, b, sizes = arrays
    terms = []
    if not isinstance(tangents[0], ad.Zero):
        terms.append(primitive.bind(tangents[0], b, sizes, **how))
    if not isinstance(tangents[1], ad.Zero):
        terms.append(primitive.bind(a, tangents[1], sizes, **how))
    return primitive.bind(a, b, sizes, **how), functools.reduce(jnp.add, terms)


product_p = _primitive("grouped_product", grouped_kernels.product, _product_shape)
"""Rows [R, D] and kernels [E, D, F] to [R, F]; `transposed`, rows [R, F] to [R, D].

For P vectors: kernels [P, E, D, F] and rows [R, D] or [R, P, D] to [R, P, F]."""

outer_p = _primitive("grouped_outer", grouped_kernels.outer, _outer_shape)
"""Rows [R, D] and [R, F] to [E, D, F]. For P vectors: either or both [R, P, .], to [P, E, D, F]."""


def _summed_like(x: jax.Array, dims: int) -> jax.Array:
    """Summed over the vectors where the array it is a cotangent of is one for all."""
    return x if x.ndim == dims else jnp.sum(x, axis=1)


def _product_transpose(cotangent: Any, rows: Any, kernels: Any, sizes: Any, *, transposed: bool, **how: Any) -> Any:
    if ad.is_undefined_primal(rows):
        if isinstance(cotangent, ad.Zero):
            return ad.Zero(rows.aval), None, None
        pulled = product_p.bind(cotangent, kernels, sizes, transposed=not transposed, **how)
        return _summed_like(pulled, rows.aval.ndim), None, None
    if isinstance(cotangent, ad.Zero):
        return None, ad.Zero(kernels.aval), None
    pair = (cotangent, rows) if transposed else (rows, cotangent)
    return None, outer_p.bind(*pair, sizes, **how), None


def _outer_transpose(cotangent: Any, rows: Any, others: Any, sizes: Any, **how: Any) -> Any:
    """The cotangent is one kernel for each group: rows are pulled through it one way, and the others the other way."""
    first = ad.is_undefined_primal(rows)
    aval = (rows if first else others).aval
    if isinstance(cotangent, ad.Zero):
        pulled: Any = ad.Zero(aval)
    else:
        given = others if first else rows
        pulled = product_p.bind(given, cotangent, sizes, transposed=first, **how)
        pulled = _summed_like(pulled, aval.ndim)
    return (pulled, None, None) if first else (None, pulled, None)


def _product_batched(arrays: Sequence[Any], axes: Sequence[Any], **how: Any) -> tuple[Any, Any]:
    rows, kernels, sizes = arrays
    of_rows, of_kernels, of_sizes = axes
    several = rows.ndim - (of_rows is not None) > 2 or kernels.ndim - (of_kernels is not None) > 3
    if of_sizes is not None or several:
        return _one_by_one(product_p, arrays, axes, **how)
    if of_rows is not None:
        rows = jnp.moveaxis(rows, of_rows, 1)
    if of_kernels is not None:
        return product_p.bind(rows, jnp.moveaxis(kernels, of_kernels, 0), sizes, **how), 1
    count, vectors, width = rows.shape
    folded = product_p.bind(rows.reshape(count * vectors, width), kernels, sizes * vectors, **how)
    return folded.reshape(count, vectors, -1), 1


def _outer_batched(arrays: Sequence[Any], axes: Sequence[Any], **how: Any) -> tuple[Any, Any]:
    *pair, sizes = arrays
    if axes[2] is not None or any(x.ndim - (axis is not None) > 2 for x, axis in zip(pair, axes[:2], strict=True)):
        return _one_by_one(outer_p, arrays, axes, **how)
    pair = [x if axis is None else jnp.moveaxis(x, axis, 1) for x, axis in zip(pair, axes[:2], strict=True)]
    return outer_p.bind(*pair, sizes, **how), 0


def _one_by_one(primitive: Primitive, arrays: Sequence[Any], axes: Sequence[Any], **how: Any) -> tuple[Any, Any]:
    """What no kernel does at once: sizes that differ, and vectors of vectors."""
    mapped = [jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes, strict=True) if axis is not None]

    def one(chosen: list[jax.Array]) -> jax.Array:
        these = iter(chosen)
        given = [x if axis is None else next(these) for x, axis in zip(arrays, axes, strict=True)]
        return primitive.bind(*given, **how)

    return jax.lax.map(one, mapped), 0


ad.primitive_transposes[product_p] = _product_transpose
ad.primitive_transposes[outer_p] = _outer_transpose
batching.primitive_batchers[product_p] = _product_batched
batching.primitive_batchers[outer_p] = _outer_batched
