"""A noise audit: how far an operator's products are from those of a symmetric, linear, exactly computed matrix."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.distributed import processes
from jaxhess.distributed.memory import available_bytes, bytes_per_device
from jaxhess.operators.base import LinearOperator, compiled_mv, parts
from jaxhess.operators.facts import non_finite, validated
from jaxhess.operators.precision import exact_operator, product_dtypes, product_eps
from jaxhess.vectors import Vector, add_scaled, cast, dot, norm, random_key, random_probe, scale, widen


@dataclasses.dataclass(frozen=True)
class NoiseAlong:
    """A measurement along a normal probe v (`random`), and along Hv (`leading`), where curvature is large."""

    random: float | None
    leading: float | None


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far an operator's products are from those of a symmetric, linear, exactly computed matrix.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> noise = jaxhess.audit(A, reference=False)
        >>> noise.nonlinearity < 1e-6, noise.reference, noise.relative_error
        (True, 'none: not asked for', None)

    Attributes:
        asymmetry: |u'Hv - v'Hu| / |Hv|: of the order of the products' relative error where that is not symmetric.
        nonlinearity: |H(u - 2v) - (Hu - 2Hv)| / |H(u - 2v)|.
        reference: What is taken for exact: the operator that this one approximates, in the dtype named here: float64
            for an operator that computes in float32, true float32 for a narrower one and for matrix products that are
            hundreds of times less precise. Or why there is none.
        relative_error: |Hx - H_ref x| / |H_ref x|; None without a reference.
        floor: |Hx - H_ref x| / |x|, likewise: in units of eigenvalues. The random one estimates the root mean square of
            the singular values of H - H_ref.

    Ratios to a product that is zero are infinite; a record has None for them.
    """

    asymmetry: float | None
    nonlinearity: float | None
    reference: str
    relative_error: NoiseAlong | None = None
    floor: NoiseAlong | None = None


def audit(operator: LinearOperator, *, seed: int = 0, reference: bool = True) -> Noise:
    """The measured noise of an operator.

    Two normal probes u, v are taken, and q = Hv / |Hv|, which like a Lanczos vector has localised on the directions of
    large curvature. Four products of the operator, two of the reference; at most four vectors at once beside those of
    the reference.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> noise = jaxhess.audit(jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]])))
        >>> noise.reference, noise.asymmetry < 1e-6, noise.relative_error.random < 1e-6
        ('MatrixOperator in float64', True, True)

    Args:
        operator: Any.
        seed: Of the probes; other than those of a run with the same seed.
        reference: Whether to compute the reference, which needs a copy of the parameters in a wider dtype and two
            vectors in it. It is left out, and that is said, where memory does not allow it.

    Raises:
        InputError: The loss or a product is not finite.
    """
    key = jax.random.fold_in(random_key(seed), 0x0A0D17)
    validated(operator)
    like = operator.shape_dtype

    def probe(k: int) -> Vector:
        return _widened(random_probe(jax.random.fold_in(key, k), like))

    u, v = probe(0), probe(1)
    hu, hv = operator @ u, operator @ v
    size = float(norm(hv))
    for x, hx in ((u, hu), (v, hv)):
        if not math.isfinite(float(norm(hx))):
            raise non_finite("The product with a random probe", operator, x)
    asymmetry = abs(float(dot(u, hv)) - float(dot(v, hu)))
    mixed = _mixed(u, v)
    del u, v, x, hx
    h_mixed = operator @ mixed
    del mixed
    ratios = _ratio(asymmetry, size), _ratio(float(_bend(h_mixed, hu, hv)), float(norm(h_mixed)))
    del h_mixed, hu
    if not reference:
        return Noise(*ratios, "none: not asked for")
    dtype = _reference_dtype(operator)
    wide, reason = _reference(operator, dtype)
    if wide is None:
        return Noise(*ratios, f"none: {reason}")
    random = _compared(wide, probe(1), hv, dtype)
    q = _scaled(hv, 1 / size if size else 0.0)
    del hv
    found = random, _compared(wide, q, operator @ q, dtype)
    return Noise(
        *ratios,
        f"{type(wide).__name__} in {dtype}",
        NoiseAlong(*(_ratio(away, whole) for away, whole, _ in found)),
        NoiseAlong(*(_ratio(away, length) for away, _, length in found)),
    )


def _reference_dtype(operator: LinearOperator) -> str:
    """The dtype that shows the operator's own rounding."""
    widest = max(jnp.finfo(dtype).bits for dtype in product_dtypes(operator))
    return "float32" if widest <= 32 and product_eps(operator) > 100 * jnp.finfo("float32").eps else "float64"


def _reference(operator: LinearOperator, dtype: str) -> tuple[LinearOperator | None, str]:
    """The exact operator in a wider dtype, or None and why there is none."""
    vectors = jax.tree.leaves(operator.shape_dtype)
    itemsize = jnp.dtype(dtype).itemsize
    with _in_64_bits(dtype):
        abstract = jax.eval_shape(lambda op: exact_operator(op, dtype), operator)
        if abstract is None:
            return None, "there is no wider form of this operator"
        same = type(abstract) is type(operator) and product_eps(abstract) == product_eps(operator)
        if same and all(own == dtype for own in product_dtypes(operator)):
            return None, f"the operator computes in {dtype}"
        needed = max(processes.gathered(_wide_bytes(operator, itemsize)))
        left = min(processes.gathered(available_bytes(vectors)))
        if needed < left:
            wide = exact_operator(operator, dtype)
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), operator.shape_dtype
            )
            memory = compiled_mv.lower(wide, like).compile().memory_analysis()
            # The vector itself comes on top of the product and what the program needs to make it.
            needed = memory.temp_size_in_bytes + 2 * memory.output_size_in_bytes if memory else 0
            needed = max(processes.gathered(needed))
            left = min(processes.gathered(available_bytes(vectors)))
            if needed < left:
                return wide, ""
    return None, f"it would take {needed / 1e9:.3g} GB more on each device, and {left / 1e9:.3g} GB are left"


def _wide_bytes(operator: LinearOperator, itemsize: int) -> int:
    """Bytes per device of what `exact_operator` copies: floating-point arrays in a dtype of so many bytes."""
    if found := parts(operator):
        return sum(_wide_bytes(part, itemsize) for part in found)
    leaves = jax.tree.leaves(operator)
    return bytes_per_device([x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)], itemsize)


def _in_64_bits(dtype: str) -> Any:
    return jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64"))


def _compared(wide: LinearOperator, x: Vector, hx: Vector, dtype: str) -> tuple[float, float, float]:
    """|Hx - H_ref x|, |H_ref x| and |x|."""
    with _in_64_bits(dtype):
        product = compiled_mv(wide, _cast(x, dtype))
        return float(_distance(hx, product)), float(norm(product)), float(norm(x))


_widened = jax.jit(widen, donate_argnums=0)
_cast = functools.partial(jax.jit, static_argnums=1)(lambda x, dtype: cast(x, jnp.dtype(dtype)))


@jax.jit
def _mixed(u: Vector, v: Vector) -> Vector:
    return add_scaled(u, jnp.float32(-2), v)


@jax.jit
def _bend(h_mixed: Vector, hu: Vector, hv: Vector) -> jax.Array:
    return norm(add_scaled(h_mixed, jnp.float32(-1), add_scaled(hu, jnp.float32(-2), hv)))


@jax.jit
def _distance(x: Vector, y: Vector) -> jax.Array:
    return norm(jax.tree.map(lambda a, b: a.astype(b.dtype) - b, x, y))


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(x: Vector, factor: float) -> Vector:
    return scale(jnp.asarray(factor), x)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)
