"""Algebra on vectors that are pytrees of (sharded) arrays: products, norms, sums and random probes.

Nothing here ravels a tree into one array: that would gather every shard onto one device and meet 32-bit sizes at 2.1e9
entries. Products accumulate in at least float32 whatever the storage dtype, and stay on device.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding

from jaxhess.errors import InputError

Vector = Any
"""A pytree of floating-point arrays."""

TOGETHER = 8
"""Stacked vectors that one pass over a sum adds to it."""

Distribution = Literal["normal", "rademacher"]


# One program, also outside of `jit`: leaf by leaf, many small programs would be in flight at once, each with a
# collective of its own, and simulated devices that share few threads can then wait for each other for ever.
_one_program = functools.partial(jax.jit, static_argnames="dtype", inline=True)


@_one_program
def dot(x: Vector, y: Vector, dtype: Any = "float32") -> jax.Array:
    """Inner product of two vectors: a scalar, accumulated in at least `dtype`."""
    parts = jax.tree.map(lambda a, b: jnp.sum(_wide(a, dtype) * _wide(b, dtype)), x, y)
    return sum(jax.tree.leaves(parts), start=jnp.zeros((), dtype))


@_one_program
def norm(x: Vector, dtype: Any = "float32") -> jax.Array:
    """Euclidean norm: a scalar in at least `dtype`, right wherever the entries themselves are representable.

    Squares under- and overflow long before the entries do (those of a float32 gradient of 1e-20 vanish); only where
    they did is the vector scaled by its largest entry and summed again. Under `vmap` likewise, where one of them did.
    """
    return _norm_in(str(jnp.dtype(dtype)))(x)


@functools.cache
def _norm_in(dtype: str) -> Callable[[Vector], jax.Array]:
    def squares(x: Vector) -> jax.Array:
        return dot(x, x, dtype)

    def rescaled(x: Vector) -> jax.Array:
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(_wide(e, dtype))) for e in jax.tree.leaves(x)])
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
        return unit * jnp.sqrt(squares(jax.tree.map(lambda e: _wide(e, dtype) / unit, x)))

    def safe(total: jax.Array) -> jax.Array:
        return jnp.all((total > 1e-20) & jnp.isfinite(total))

    @jax.custom_batching.custom_vmap
    def one(x: Vector) -> jax.Array:
        total = squares(x)
        length = jnp.sqrt(total)
        # Were a square root in a branch, XLA would compute both branches and choose (its ConditionalSimplifier).
        return jax.lax.cond(safe(total), lambda: length, lambda: rescaled(x))

    # vmap would turn the condition into a choice between both, and sum every vector twice.
    @one.def_vmap
    def many(_: int, batched: list[Any], x: Vector) -> tuple[jax.Array, bool]:
        axes = jax.tree.map(lambda b: 0 if b else None, batched[0])
        totals = jax.vmap(squares, in_axes=(axes,))(x)
        lengths = jnp.sqrt(totals)
        return jax.lax.cond(safe(totals), lambda: lengths, lambda: jax.vmap(rescaled, in_axes=(axes,))(x)), True

    return one


def scale(a: jax.Array, x: Vector) -> Vector:
    """a x, computed in at least float32 and returned in the dtype of x."""
    return jax.tree.map(lambda e: (a * _wide(e)).astype(e.dtype), x)


def add_scaled(y: Vector, a: jax.Array, x: Vector) -> Vector:
    """y + a x, computed in at least float32 and returned in the dtype of y."""
    return jax.tree.map(lambda f, e: (_wide(f) + a * _wide(e)).astype(f.dtype), y, x)


def cast(x: Vector, dtype: Any) -> Vector:
    """x stored in `dtype` (one dtype, or a tree of arrays whose dtypes to take)."""
    if isinstance(dtype, (str, type, jnp.dtype)):
        return jax.tree.map(lambda e: e.astype(dtype), x)
    return jax.tree.map(lambda e, like: e.astype(like.dtype), x, dtype)


def own_zeros(x: Vector, like: Vector) -> Vector:
    """Zeros in the dtypes of `like`, computed from x, for a sum inside a loop to begin with.

    XLA makes one array of constant zeros for all leaves of a shape and copies it to every sum that begins with it,
    which takes most of a sum's size once more. It does not know that these are zeros, so each has a buffer of its own.
    """
    return jax.tree.map(lambda e, f: jnp.where(jnp.isfinite(e), 0 * e, 0).astype(f.dtype), x, like)


def widen(x: Vector) -> Vector:
    """x in at least float32."""
    return jax.tree.map(_wide, x)


def basis_dot(basis: Vector, x: Vector) -> jax.Array:
    """Inner products [m] of x with the m vectors stacked along the leading axis of `basis`; at least float32.

    Sums of products, which XLA adds up in a tree, and not a matrix product, which on CPUs adds one entry after the
    other: in float32 that is off by 4e-5 of |x|^2 for a million entries and by 7e-4 for ten million.
    """

    def leaf(b: jax.Array, e: jax.Array) -> jax.Array:
        return jnp.sum(_wide(b) * _wide(e), axis=tuple(range(1, b.ndim)))

    return sum(jax.tree.leaves(jax.tree.map(leaf, basis, x)), start=jnp.float32(0))


def basis_sum(coefficients: jax.Array, basis: Vector) -> Vector:
    """The linear combination of the m stacked vectors with `coefficients` [m]; leaves in at least float32.

    A basis in a narrower dtype is read a few vectors at a time: a matrix product would first widen all of it.
    """

    def leaf(b: jax.Array) -> jax.Array:
        wide = jnp.promote_types(b.dtype, jnp.float32)
        if b.dtype == wide:
            return jnp.tensordot(coefficients.astype(wide), b, axes=1, precision="highest")
        return add_basis_sum(jnp.zeros(b.shape[1:], wide), coefficients, b)

    return jax.tree.map(leaf, basis)


def add_basis_sum(y: Vector, coefficients: jax.Array, basis: Vector) -> Vector:
    """y, in at least float32, plus the linear combination of the m stacked vectors with `coefficients` [m].

    At most `TOGETHER` vectors are added up at a time, so that y is read and written once for so many. A loop for every
    leaf: what is summed next is then no part of it, and y is changed in place.
    """
    m = jax.tree.leaves(basis)[0].shape[0]
    rounds = -(-m // TOGETHER)
    width = -(-m // rounds)

    def leaf(e: jax.Array, b: jax.Array) -> jax.Array:
        def add(k: jax.Array, e: jax.Array) -> jax.Array:
            start = jnp.minimum(width * k, m - width)
            total = jnp.zeros((), e.dtype)
            for row in (start + i for i in range(width)):
                c = jnp.where(row < width * k, 0, coefficients[row]).astype(e.dtype)  # the last round's may be done
                total = total + c * jax.lax.dynamic_index_in_dim(b, row, keepdims=False).astype(e.dtype)
            return e + total

        return jax.lax.fori_loop(0, rounds, add, e)

    return jax.tree.map(leaf, y, basis)


def in_order(x: Vector, shardings: list[NamedSharding | None]) -> Vector:
    """x, every leaf stored with its axes in order, on every device.

    Inside `jit` the compiler chooses: a product it stores like a reduced gradient, with the axis that `fsdp` cuts
    first, and what is added to it likewise. Arrays that come from outside have their axes in order, and would be
    transposed as a whole in every step.
    """

    def local(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    def leaf(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
        if sharding is None or sharding.mesh.size == 1:
            return local(x)
        # The partitioner takes a constraint for a kernel that needs all of x.
        spec = sharding.spec
        return jax.shard_map(local, mesh=sharding.mesh, in_specs=spec, out_specs=spec)(x)

    leaves, treedef = jax.tree.flatten(x)
    return jax.tree.unflatten(treedef, [leaf(e, s) for e, s in zip(leaves, shardings, strict=True)])


def size(x: Vector) -> int:
    """Number of entries."""
    return sum(e.size for e in jax.tree.leaves(x))


def random_key(seed: int) -> jax.Array:
    """The typed key of a seed, of the generator whose draws depend neither on the mesh nor on JAX's settings.

    Raises:
        InputError: See `check_seed`.
    """
    check_seed(seed)
    return jax.random.key(seed, impl="threefry2x32")


def check_seed(seed: int) -> None:
    """Raises InputError for what is no seed. JAX would cut one of more than 32 bits: 0 and 2^32 would be the same."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise InputError(f"The seed is {seed}; it must be a whole number from 0 to 2^32 - 1.")


def random_probe(key: jax.Array, like: Vector, distribution: Distribution = "normal") -> Vector:
    """A random vector with independent entries of mean 0 and variance 1.

    The key of each leaf is folded with the leaf's path and entries are drawn in float32 by a counter-based generator
    that does not see the sharding: the same key gives the same bits on one device and on many. Draw shards in place:
    nothing is ever whole on one device.

    Examples:
        >>> import jax, jax.numpy as jnp, jaxhess
        >>> like = {"b": jnp.zeros(1), "w": jax.ShapeDtypeStruct((100, 100), jnp.bfloat16)}
        >>> probe = jaxhess.random_probe(jax.random.key(0), like, "rademacher")
        >>> probe["w"].shape, probe["w"].dtype, jnp.unique(probe["w"])
        ((100, 100), dtype(bfloat16), Array([-1, 1], dtype=bfloat16))

    Args:
        key: A typed key, `random_key(seed)`.
        like: Arrays or `jax.ShapeDtypeStruct`s that give structure, shapes, dtypes and (where set) shardings.
        distribution: `normal` is isotropic: n times the quadrature weight of a lone eigenvalue is then chi-squared with
            one degree of freedom. `rademacher` (entries -1 and 1) has the smaller trace variance.

    Raises:
        InputError: Unknown distribution, or a leaf that is not floating point.
    """
    if distribution not in ("normal", "rademacher"):
        raise InputError(f"Unknown probe distribution {distribution!r}; it is 'normal' or 'rademacher'.")
    leaves, treedef = jax.tree.flatten_with_path(like)
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"Leaf {jax.tree_util.keystr(path)} has dtype {leaf.dtype}; vectors are floating point.")
    paths = tuple(zlib.crc32(jax.tree_util.keystr(path).encode()) for path, _ in leaves)
    shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype)) for _, leaf in leaves)
    shardings = tuple(named_sharding(leaf) for _, leaf in leaves)
    return jax.tree.unflatten(treedef, _drawer(paths, shapes, shardings, distribution)(key))


def checksum(x: Any) -> str:
    """16 hexadecimal digits that tell trees of arrays apart: names, shapes, dtypes and every bit count.

    Integer sums of the bits, weighted by position: the same on one device and on many, and nothing is gathered.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.flatten_with_path(x)[0]:
        leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf
        facts = (jax.tree_util.keystr(path), jnp.shape(leaf), str(jnp.result_type(leaf)), int(_bit_sum(leaf)))
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    unsigned = jnp.dtype(f"uint{8 * bits.dtype.itemsize}")
    if unsigned.itemsize == 8:  # as pairs of halves
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
    elif bits.dtype != unsigned:
        bits = jax.lax.bitcast_convert_type(bits, unsigned)
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + places * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * position + 1) ^ (position >> 7), dtype=jnp.uint32)


def check_accumulation_dtype(dtype: str) -> None:
    """Raises InputError for a dtype to accumulate in that is neither float32 nor float64, or that JAX would narrow."""
    if dtype not in ("float32", "float64"):
        raise InputError(f"accumulation_dtype is {dtype!r}; it is 'float32' or 'float64'.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InputError("accumulation_dtype float64 needs JAX in 64-bit mode: set JAX_ENABLE_X64=1 before starting.")


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The `NamedSharding` of an array or abstract array; None for one without (a single device, a tracer)."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


@functools.cache
def _drawer(
    paths: tuple[int, ...], shapes: tuple, shardings: tuple[NamedSharding | None, ...], distribution: Distribution
) -> Callable[[jax.Array], list[jax.Array]]:
    draw = jax.random.normal if distribution == "normal" else jax.random.rademacher

    def leaves(key: jax.Array) -> list[jax.Array]:
        with jax.threefry_partitionable(True):
            return [
                draw(jax.random.fold_in(key, path), shape, jnp.float32).astype(dtype)
                for path, (shape, dtype) in zip(paths, shapes, strict=True)
            ]

    return jax.jit(leaves, out_shardings=None if None in shardings else list(shardings))


def _wide(x: jax.Array, dtype: Any = "float32") -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, dtype))
