"""A noise audit: how far an operator's products are from those of a symmetric, linear, exactly computed matrix."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess.memory import available_bytes, devices_of
from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import Vector, add_scaled, cast, dot, norm, random_probe, scale, widen


def audit(operator: LinearOperator, *, seed: int = 0, reference: bool = True) -> dict[str, Any]:
    """Measured noise of an operator, as a dictionary for the record of a run.

    Two normal probes u, v are taken, and q = Hv / |Hv|, which like a Lanczos vector has localised on the directions of
    large curvature. Four products of the operator, three of the reference.

    Returns:
        asymmetry: |u'Hv - v'Hu| / |Hv|: of the order of the products' relative error where that is not symmetric.
        nonlinearity: |H(u - 2v) - (Hu - 2Hv)| / |H(u - 2v)|.
        reference: What is taken for exact: the operator that this one approximates, in the dtype named here: float64
            for an operator that computes in float32, float32 for a narrower one. Or why there is none.
        relative_error: |Hx - H_ref x| / |H_ref x| for x the probes ("random", the larger of two) and q ("leading").
        floor: |Hx - H_ref x| / |x|, likewise: in units of eigenvalues. A typical eigenvalue of the error has the size
            of the "random" one; Ritz values below it are noise. Without a reference neither is there.

    Args:
        seed: Of the probes; other than those of a run with the same seed.
        reference: Whether to compute the reference, which needs a second copy of the parameters in a wider dtype. It is
            left out, and that is said, where memory does not allow it.

    Raises:
        FloatingPointError: The loss or a product is not finite.
    """
    operator.validate()
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 0x0A0D17)
    like = operator.shape_dtype
    u, v = (random_probe(jax.random.fold_in(key, k), like) for k in range(2))
    hu, hv = operator @ u, operator @ v
    size_u, size_v = float(norm(hu)), float(norm(hv))
    for x, size in ((u, size_u), (v, size_v)):
        if not math.isfinite(size):
            raise FloatingPointError(
                f"The product with a random probe is not finite: {operator.explain_non_finite(x)}."
            )
    mixed = _mixed(u, v)
    h_mixed = operator @ mixed
    facts: dict[str, Any] = {
        "asymmetry": _ratio(abs(float(dot(u, hv)) - float(dot(v, hu))), size_v),
        "nonlinearity": _ratio(_distance(h_mixed, _mixed(hu, hv)), float(norm(h_mixed))),
    }
    dtype = _reference_dtype(operator)
    exact, reason = (None, "not asked for") if not reference else _reference(operator, dtype)
    if exact is None:
        return {**facts, "reference": f"none: {reason}"}
    q = cast(scale(jnp.float32(1 / size_v if size_v else 0), widen(hv)), like)
    products = {"random": [(u, hu), (v, hv)], "leading": [(q, operator @ q)]}
    error: dict[str, float] = {}
    floor: dict[str, float] = {}
    with _in_64_bits(dtype):
        for name, pairs in products.items():
            compared = [_compared(exact, x, hx, dtype) for x, hx in pairs]
            error[name] = max(_ratio(away, size) for away, size, _ in compared)
            floor[name] = max(_ratio(away, length) for away, _, length in compared)
    return {**facts, "reference": f"{type(exact).__name__} in {dtype}", "relative_error": error, "floor": floor}


def _reference_dtype(operator: LinearOperator) -> str:
    """The dtype that shows the operator's own rounding."""
    widths = [jnp.finfo(dtype).bits for dtype in operator.dtypes]
    return "float32" if max(widths, default=32) <= 32 and min(widths, default=32) < 32 else "float64"


def _reference(operator: LinearOperator, dtype: str) -> tuple[LinearOperator | None, str]:
    """The exact operator in a wider dtype, or None and why there is none."""
    if all(jnp.finfo(own).bits == 64 for own in operator.dtypes):
        return None, "the operator computes in float64"
    with _in_64_bits(dtype):
        held = jax.tree.leaves(jax.eval_shape(lambda op: (op.exact(dtype), 3 * [op.shape_dtype]), operator))
        leaves = jax.tree.leaves(operator)
        needed = sum(x.size * x.dtype.itemsize for x in held) / len(devices_of(leaves))
        left = available_bytes(leaves)
        if needed > left:
            return None, f"it would take {needed / 1e9:.3g} GB on each device, and {left / 1e9:.3g} GB are left"
        exact = operator.exact(dtype)
    return exact, "there is no wider form of this operator"


def _in_64_bits(dtype: str) -> Any:
    return jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64"))


def _compared(exact: LinearOperator, x: Vector, hx: Vector, dtype: str) -> tuple[float, float, float]:
    """|Hx - H_ref x|, |H_ref x| and |x|."""
    wide = cast(x, jnp.dtype(dtype))
    product = exact @ wide
    return _distance(cast(hx, jnp.dtype(dtype)), product), float(norm(product)), float(norm(wide))


def _mixed(u: Vector, v: Vector) -> Vector:
    return add_scaled(u, jnp.float32(-2), v)


@jax.jit
def _difference_norm(x: Vector, y: Vector) -> jax.Array:
    return norm(add_scaled(widen(x), jnp.float32(-1), y))


def _distance(x: Vector, y: Vector) -> float:
    return float(_difference_norm(x, y))


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)
