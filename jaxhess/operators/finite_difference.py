"""The Hessian by central differences of the gradient: what is done where a framework has no forward mode."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess.errors import InputError
from jaxhess.operators.facts import describe, explain_non_finite, shares_work, validate
from jaxhess.operators.hessian import Hessian
from jaxhess.operators.loss import LossOperator, describe_loss, divided, explain_non_finite_product, validate_loss
from jaxhess.operators.matmul import with_matmul_precision
from jaxhess.operators.microbatches import Microbatches
from jaxhess.operators.precision import exact_operator, product_dtypes
from jaxhess.operators.restriction import leaf_name
from jaxhess.operators.routing import changed_share, chosen_experts, has_routing
from jaxhess.operators.step_size import add_gradient, balanced_length, rounding_unit
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, cast, norm, own_zeros, random_key, random_probe, size, widen

Per = Literal["coordinate", "unit"]
Shift = Literal["realised", "float32"]

UNTRUSTED = 1 / 3
"""Relative error of a random vector's product above which the automatic step is refused.

Language models in bfloat16 have a tenth, and up to four tenths along single coordinates; deep networks with ReLU half
or more.
"""


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FiniteDifferenceHessian(LossOperator):
    """The Hessian of `sum of losses / sum of counts`, by two gradients at shifted parameters.

    `(gradient(theta + e u) - gradient(theta - e u)) |v| / (2 e)` with u = v / |v| (Algorithm 1 of "Hessian Spectral
    Analysis at Foundation Model Scale", arXiv 2602.00816): the matrix products of two gradients, the shift made where
    the shards lie, scalars the only thing reduced. Homogeneous up to rounding, but linear and symmetric only up to its
    error: e^2 / 6 times the third derivative of the gradient along u, and the gradient's rounding over e. `Hessian` has
    neither error at 8/6 of the matrix products. See `LossOperator` for the other fields.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> def loss(w, x):
        ...     return jnp.mean((x @ w) ** 4)
        >>> D = jaxhess.FiniteDifferenceHessian(loss, jnp.ones(2), [jnp.eye(2)], step=0.01)
        >>> (D @ jnp.ones(2)).round(1)
        Array([6., 6.], dtype=float32)

    Attributes:
        step: The size of the shift; "auto": measured for every vector on the first microbatch, which costs eight to
            sixteen of its gradients as a rule beside the two of every microbatch (`step_size.balanced_length`), in
            float32, and one more buffer: with few microbatches dearer than the exact product. Stored as None.
            `calibrated` measures once. `validate` refuses where no step serves.
        per: What a number in `step` is the size of. "coordinate" (as in the paper): of the root mean square entry,
            e = step * sqrt(n) for n parameters. "unit": of the whole shift, e = step.
        shift: In what precision parameters are shifted. "realised": their own; the difference is divided by the part
            along u of the shift that was representable, not of the one asked for, over the leaves that moved by at
            least half. Entries whose shift rounds to nothing (`vanished`) are still missing from the Hessian, and
            `validate` warns of leaves where these are nine in ten. "float32": float32 copies are shifted and the loss
            is computed in float32 (`loss.in_dtype("float32")` where the loss has a dtype of its own); the same for
            parameters that are float32.

    Raises:
        InputError: The step is not a positive number or "auto"; an unknown convention.
    """

    step: Any = "auto"
    per: Per = dataclasses.field(default="coordinate", metadata={"static": True})
    shift: Shift = dataclasses.field(default="realised", metadata={"static": True})

    def __post_init__(self) -> None:
        if isinstance(self.step, str) and self.step == "auto":
            object.__setattr__(self, "step", None)  # no leaf: a step that is a number is data, and not compiled in
        if isinstance(self.step, bool | str) or (_is_number(self.step) and not 0 < float(self.step) < math.inf):
            raise InputError(f"The finite-difference step is {self.step}; it is a positive number, or 'auto'.")
        if self.shardings is not None:  # rebuilt from its leaves by JAX, which may be anything
            return
        if self.per not in ("coordinate", "unit"):
            raise InputError(f"The step is per {self.per!r}; it is per 'coordinate' or per 'unit' vector.")
        if self.shift not in ("realised", "float32"):
            raise InputError(f"Unknown shift {self.shift!r}; it is 'realised' or 'float32'.")
        super().__post_init__()

    def mv(self, v: Vector) -> Vector:
        """The product in the dtypes of v. One pass over all batches at theta + e u, then one at theta - e u."""
        return self._mean_product(v, v)

    def wide_mv(self, v: Vector) -> Vector:
        """The same in at least float32. A loop would keep a widened copy of v."""
        return self._mean_product(v, jax.eval_shape(widen, v))

    def product_sum(self, v: Vector, batch: Any) -> tuple[Vector, jax.Array]:
        return self._product(v, (Microbatches(jax.tree.map(lambda x: x[None], batch)),))

    def shift_length(self, v: Vector) -> jax.Array:
        """e, the length of the shift made along v: a scalar."""
        if self.step is None:
            wide, dtypes = self._wide(), product_dtypes(self._shifted())
            return with_matmul_precision(lambda v: balanced_length(wide, v, dtypes), wide.matmul_precision)(v)
        return jnp.asarray(self.step * math.sqrt(size(v)) if self.per == "coordinate" else self.step)

    def calibrated(self, v: Vector) -> FiniteDifferenceHessian:
        """The operator with the step that "auto" would take for v, for all vectors: right for those like v.

        Independent random probes are alike; Lanczos vectors are not like the probe they start from.
        """
        automatic = dataclasses.replace(self, step=None)
        return dataclasses.replace(self, step=float(_shift_length(automatic, v)), per="unit")

    def vanished(self, v: Vector) -> dict[str, float]:
        """For every leaf the share of the entries of v, zeros apart, along which the parameters do not move at all."""
        names = [leaf_name(path) for path, _ in jax.tree.flatten_with_path(self.shape_dtype)[0]]
        counts = zip(*_vanished(self, v), strict=True)
        return {name: float(lost) / max(float(asked), 1.0) for name, (lost, asked) in zip(names, counts, strict=True)}

    def _error(self, v: Vector, length: float) -> float:
        """The relative error of the product with a shift of that length, on the first microbatch."""
        first = (Microbatches(jax.tree.map(lambda x: x[:1], self.batches[0].stacked)),)
        v = cast(v, "float32")
        found = dataclasses.replace(self, batches=first, step=length, per="unit") @ v
        wide, own = self._wide(), self._shifted()
        third = length / 3 * (rounding_unit(product_dtypes(wide)) / rounding_unit(product_dtypes(own))) ** (1 / 3)
        reference = dataclasses.replace(wide, batches=first, step=third, per="unit") @ v
        size = float(norm(reference))
        return float(norm(jax.tree.map(lambda x, y: x - y, found, reference))) / size if size else 0.0

    def _rerouted(self, v: Vector, length: float) -> dict[str, float]:
        """What a shift of that length does to the experts' choice, on the first microbatch.

        `changed_experts` is the share of choices (of a token in a layer) that differ between theta + e u and
        theta - e u; `jumped` how far the product is from that with the experts chosen at theta, relative to the latter.
        """
        base = dataclasses.replace(self, step=length, per="unit")
        batch = jax.tree.map(lambda x: x[0], self.batches[0].stacked)
        shifted = base._shifted()
        here, *sides = (
            chosen_experts(shifted.loss, shifted.whole(_at_shift(base, v, sign)), batch) for sign in (0.0, 1.0, -1.0)
        )
        held = self.loss.held(batch, here)  # type: ignore[attr-defined]
        batches = [(Microbatches(jax.tree.map(lambda x: x[None], each)),) for each in (batch, held)]
        found, expected = (dataclasses.replace(base, batches=each) @ cast(v, "float32") for each in batches)
        size = float(norm(expected))
        apart = float(norm(jax.tree.map(lambda x, y: x - y, found, expected)))
        return {
            "changed_experts": changed_share(sides[0], sides[1], batch.weights),
            "jumped": apart / size if size > 0 else 0.0,
        }

    def _mean_product(self, v: Vector, like: Vector) -> Vector:
        summed = with_matmul_precision(lambda v: self._product(v, self.groups), self.matmul_precision)
        total, count = summed(v)
        return self.pin(divided(total, count, like))

    def _product(self, v: Vector, groups: tuple) -> tuple[Vector, jax.Array]:
        """The product of the summed losses of `groups` with v, and their count."""
        base = self._shifted()
        lengths = jnp.stack([norm(d) for d in jax.tree.leaves(v)])
        length, e = norm(lengths), self.shift_length(v)
        inverse = jnp.where(length > 0, 1 / length, 0)

        # The gradients at both sides in their own dtype, which takes half the memory of a sum in float32 where that is
        # bfloat16 and rounds nothing; of several microbatches the sum that it must be.
        alone = sum(map(len, groups)) == 1

        def wide(x: jax.Array) -> jax.Array:
            return x.astype(jnp.promote_types(x.dtype, self.accumulation_dtype))

        def one_side(carry: Any, sign: jax.Array) -> tuple[Any, None]:
            gradients, moved, count = carry
            # The sign in both products keeps them inside the loop: u = v / |v| outside it would be one more vector.
            shifted = base.pin(jax.tree.map(lambda x, d: _moved(x, (sign * e * inverse) * _wide(d)), base.free, v))
            parts = jax.tree.map(
                lambda x, y, d: jnp.sum((_wide(x) - _wide(y)) * ((sign * inverse) * _wide(d))),
                shifted,
                base.free,
                v,
            )
            if alone:
                gradient, n = base.gradient_sum(shifted, jax.tree.map(lambda x: x[0], groups[0].stacked))
                gradients, count = (gradients[1], gradient), count + n
            else:
                total, count = add_gradient(base, gradients[0], count, sign, shifted, groups)
                gradients = (total,)
            return (gradients, moved + jnp.stack(jax.tree.leaves(parts)).astype(moved.dtype), count), None

        one = jax.tree.map(lambda x: x[0], groups[0].stacked)
        _, count = jax.eval_shape(base.sum_and_count, base.free, one)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x if alone else wide(x)), base.free)
        zeros = base.pin(zeros if alone else own_zeros(v, zeros))
        squares = jnp.square(inverse * lengths)
        start = ((zeros, zeros) if alone else (zeros,), jnp.zeros_like(squares), jnp.zeros((), count.dtype))
        # A loop over the two sides: neither begins before the other's shifted parameters and gradient are gone.
        (gradients, moved, count), _ = jax.lax.scan(one_side, start, jnp.array([1, -1], length.dtype))
        total = jax.tree.map(lambda x, y: wide(x) - wide(y), *gradients) if alone else gradients[0]
        # Leaves that moved by less than half of what was asked are missing from the product, and must not enlarge it.
        counts = moved > e * squares
        counts = counts | ~counts.any()
        realised = jnp.sum(jnp.where(counts, moved, 0)) / jnp.sum(jnp.where(counts, squares, 0))
        factor = jnp.where(length > 0, length / realised, 0)
        return jax.tree.map(lambda t: factor.astype(t.dtype) * t, total), count / 2  # counted on both sides

    def _shifted(self) -> FiniteDifferenceHessian:
        """The operator in the precision in which parameters are shifted and gradients computed."""
        return self if self.shift == "realised" else self._wide()

    def _wide(self) -> FiniteDifferenceHessian:
        """The operator stored and computed in at least float32."""
        wide = functools.reduce(jnp.promote_types, product_dtypes(self), jnp.dtype("float32"))
        if product_dtypes(self) == (str(wide),):
            return self
        kept = self.matmul_precision if str(wide) == "float32" else "float32"
        return dataclasses.replace(self.in_dtype(str(wide)), matmul_precision=kept)


@exact_operator.register
def _(operator: FiniteDifferenceHessian, dtype: str) -> Hessian:
    hessian = Hessian(
        operator.loss,
        operator.params,
        operator.batches,
        accumulation_dtype=operator.accumulation_dtype,
        restriction=operator.restriction,
        shardings=operator.shardings,
    )
    exact = exact_operator(hessian, dtype)
    assert isinstance(exact, Hessian)
    return exact


@describe.register
def _(operator: FiniteDifferenceHessian) -> dict[str, Any]:
    return {
        **describe_loss(operator),
        "step": "auto" if operator.step is None else float(operator.step),
        "per": "unit" if operator.step is None else operator.per,
        "shift": operator.shift,
    }


@shares_work.register
def _(operator: FiniteDifferenceHessian) -> bool:
    """No: every vector shifts the parameters elsewhere, and each has its own two gradients."""
    return False


@validate.register
def _(operator: FiniteDifferenceHessian) -> dict[str, Any]:
    """Also the shift that a random direction gets, and what every leaf loses of it to rounding.

    For the automatic step also `error`, measured on the first microbatch: how far the product is, relative to it,
    from that of a third of the balanced step in at least float32, which errs by rounding alone.

    Raises:
        InputError: The automatic step errs by more than a third: no step serves.
    """
    facts = validate_loss(operator)
    dtypes = " and ".join(product_dtypes(operator._shifted()))
    probe = random_probe(random_key(0), operator.shape_dtype)
    length = float(_shift_length(operator, probe))
    vanished = dataclasses.replace(operator, step=length, per="unit").vanished(probe)
    shift: dict[str, Any] = {"length": length, "vanished": vanished}
    if has_routing(operator.loss):
        shift |= operator._rerouted(probe, length)
    if operator.step is None:
        shift["error"] = error = operator._error(probe, length)
        if not error < UNTRUSTED:
            stuck = max(vanished, key=lambda name: vanished[name])
            raise InputError(
                f"No finite-difference step is accurate in {dtypes}: the best one (length {length:.3g}) gives an error "
                f"of {100 * error:.0f}% for a random vector. Smaller steps are lost to rounding "
                f"({100 * vanished[stuck]:.0f}% of the entries of {stuck} do not change); larger steps cross "
                "discontinuities of the gradient, for example of ReLU. Use exact products, shift='float32' or a wider "
                "dtype."
            )
    still = {name: share for name, share in vanished.items() if share > 0.9}
    if still:
        listed = ", ".join(f"{name} ({100 * share:.0f}%)" for name, share in still.items())
        warnings.warn(
            f"Finite differences miss the curvature of parameters that a shift of length {length:.3g} does not "
            f"move in {dtypes}: {listed} of the entries for a random vector. Use "
            "exact products, or shift='float32', or restrict the operator to leaves of one scale.",
            stacklevel=3,
        )
    return {**facts, "shift_of_a_random_vector": shift}


@explain_non_finite.register
def _(operator: FiniteDifferenceHessian, v: Vector) -> str:
    lost, asked = _vanished(operator, v)
    if sum(map(float, asked)) and sum(map(float, lost)) == sum(map(float, asked)):
        return f"no parameter moved: a shift of length {float(_shift_length(operator, v)):.3g} is below their rounding"
    return explain_non_finite_product(operator, v)


@jax.jit
def _shift_length(operator: FiniteDifferenceHessian, v: Vector) -> jax.Array:
    return operator.shift_length(v)


@jax.jit
def _vanished(operator: FiniteDifferenceHessian, v: Vector) -> tuple[list[jax.Array], list[jax.Array]]:
    """For every leaf the number of entries of v that move nothing, and of those that are not zero."""
    free, e = operator._shifted().free, operator.shift_length(v) / norm(v)

    def lost(x: jax.Array, d: jax.Array) -> jax.Array:
        still = (_moved(x, e * _wide(d)) == x) & (_moved(x, -e * _wide(d)) == x)
        return jnp.sum((d != 0) & still, dtype=jnp.float32)

    asked = jax.tree.map(lambda d: jnp.sum(d != 0, dtype=jnp.float32), v)
    return jax.tree.leaves(jax.tree.map(lost, free, v)), jax.tree.leaves(asked)


@jax.jit
def _at_shift(operator: FiniteDifferenceHessian, v: Vector, sign: jax.Array) -> Any:
    """The free parameters, shifted by `sign` times the operator's shift along v."""
    base, e = operator._shifted(), sign * operator.shift_length(v) / norm(v)
    return base.pin(jax.tree.map(lambda x, d: _moved(x, e * _wide(d)), base.free, v))


def _moved(x: jax.Array, shift: jax.Array) -> jax.Array:
    """x + shift, rounded once to the dtype of x: for good, whatever excess precision XLA allows itself."""
    wide, own = jnp.promote_types(shift.dtype, x.dtype), jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x.astype(wide) + shift.astype(wide), own.nexp, own.nmant).astype(x.dtype)


def _is_number(step: Any) -> bool:
    """Whether the step is known now; inside a transformation it is a tracer, or anything."""
    return isinstance(step, int | float | np.ndarray | np.generic | jax.Array) and not isinstance(step, jax.core.Tracer)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
