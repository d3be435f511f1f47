"""Floors below which eigenvalues cannot be told from zero: rounding of products, of weights, and a finite sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import jaxhess
from jaxhess.errors import InputError
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector, add_scaled, dot, norm

Array = npt.NDArray[np.float64]
Format = Literal["bfloat16", "float8", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
FLOAT8_LARGEST = 448.0
"""Of float8_e4m3fn."""


class Shift(NamedTuple):
    """What rounding does to one extreme eigenvalue.

    Attributes:
        before, after: The extreme Ritz value; its eigenvalue is known to `bound`.
        bound: Sum of both residual bounds.
        first_order: u'(H_rounded - H)u, u the eigenvector before rounding.
        residual: |(H_rounded - rho) u|, rho = u'H_rounded u: an eigenvalue of the rounded model's Hessian lies within
            it of rho.
    """

    before: float
    after: float
    bound: float
    first_order: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding of the weights to one format does.

    Attributes:
        format: Its name.
        weights: Relative change of the rounded matrices, |change| / |weights|.
        floor: Root mean square of the singular values of H_rounded - H.
        loss: Mean loss after rounding.
        smallest, largest: Shifts of the extreme eigenvalues.
    """

    format: str
    weights: float
    floor: jaxhess.Estimate
    loss: float
    smallest: Shift
    largest: Shift


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelRank:
    """What was measured on the language model.

    Attributes:
        spectrum: Of all probes.
        peaks: [probes] the largest weight of a Ritz value after ten steps.
        products: Floor of the products' rounding, by one random vector, its error not known; NaN without a reference.
        data: Floor of the sample.
        roundings: Of the weights.
    """

    spectrum: jaxhess.Spectrum
    peaks: Array
    products: float
    data: jaxhess.Estimate
    roundings: list[Rounding]

    @property
    def largest(self) -> float:
        """The largest absolute Ritz value."""
        return float(np.nanmax(np.abs(self.spectrum.ritz_values)))

    @property
    def floors(self) -> dict[str, jaxhess.Estimate]:
        """By name; those that were not measured are left out."""
        found = {"rounding of products": _exactly(self.products)}
        found |= {f"rounding of weights to {r.format}": r.floor for r in self.roundings}
        found["sample of the data"] = self.data
        return {name: x for name, x in found.items() if math.isfinite(x.value)}

    def distances(self, *relative: float) -> dict[str, jaxhess.Estimate]:
        """These parts of the largest eigenvalue, and the floors."""
        return {f"{x:g} of the largest": _exactly(x * self.largest) for x in relative} | self.floors

    def over_typical(self, distance: jaxhess.Estimate) -> float:
        """A distance over the root mean square of all eigenvalues, |H|_F / sqrt(n)."""
        typical = self.spectrum.frobenius_norm().value / math.sqrt(self.spectrum.dim)
        return distance.value / typical if typical > 0 else math.inf

    def shares(self, distances: Iterable[jaxhess.Estimate]) -> tuple[Array, Array]:
        """Low and high ends, each [n], of the share of eigenvalues within distances that are known to their intervals.

        Each is the outer end of two 95% intervals: the low one for the distance's low end, the high one for its high
        end.
        """
        ends = np.array([x.interval() for x in distances])
        return (
            jaxhess.near_zero(self.spectrum, ends[:, 0]).interval()[0],
            jaxhess.near_zero(self.spectrum, ends[:, 1]).interval()[1],
        )


def _exactly(value: float) -> jaxhess.Estimate:
    return jaxhess.Estimate(value, 0.0, math.inf, positive=True)


def rounded(params: Any, format: Format) -> Any:
    """The parameters with their matrices rounded to this format, in the dtype they had; norms and biases are kept.

    bfloat16: to nearest. float8: e4m3fn, scaled so that the largest entry of each matrix is the largest number there
    is. int8: integers from -127 to 127 times one scale for each output (each token of an embedding).

    Raises:
        InputError: A matrix of which it is not known what its outputs are.
    """

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        name = leaf_name(path)
        if not name.endswith("kernel"):
            return x
        if format == "bfloat16":
            return x.astype(jnp.bfloat16).astype(x.dtype)
        inputs, matrix = _axes(name, x.ndim)
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), inputs if format == "int8" else matrix, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1.0) / (127.0 if format == "int8" else FLOAT8_LARGEST)
        steps = wide / scale
        near = jnp.round(steps) if format == "int8" else steps.astype(jnp.float8_e4m3fn).astype(jnp.float32)
        return (near * scale).astype(x.dtype)

    return jax.tree.map_with_path(leaf, params)


def _axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a kernel that are summed over in products, and those of one matrix (all but the layers)."""
    if name in ("embed/kernel", "head/kernel") and ndim == 2:
        return (1,), (0, 1)
    if name.startswith("layers/attention/") and ndim == 4:
        return ((1, 2) if "/out/" in name else (1,)), (1, 2, 3)
    if name.startswith("layers/mlp/") and ndim == 3:
        return (1,), (1, 2)
    raise InputError(f"Rounding of {name}, {ndim} axes, is not known: take a model without experts.")


def relative_change(params: Any, changed: Any) -> float:
    """|changed - params| / |params| over all matrices."""

    def kernels(x: Any) -> list[jax.Array]:
        return [leaf for path, leaf in jax.tree.leaves_with_path(x) if leaf_name(path).endswith("kernel")]

    old, new = kernels(params), kernels(changed)
    return float(norm(jax.tree.map(lambda a, b: a - b, new, old)) / norm(old))


def singular_value(operator: jaxhess.LinearOperator, samples: int, seed: int) -> jaxhess.Estimate:
    """The root mean square of an operator's singular values, |operator|_F / sqrt(n).

    Sorted eigenvalues of A and A + E differ by this at most, in the root mean square (Hoffman and Wielandt 1953).
    """
    found = jaxhess.frobenius_norm(operator, samples, seed=seed)
    return found.times(1 / math.sqrt(operator.dim))


def data_floor(hessian: jaxhess.Hessian, samples: int, seed: int) -> jaxhess.Estimate:
    """Half the root mean square singular value of the difference between the Hessians of two halves of the data.

    The halves are every other microbatch: neighbours in a text are alike, and its two ends may not be. Of two
    independent halves the difference has four times the variance of the mean over both: half of it is as large as the
    error of the whole sample's Hessian.

    Raises:
        InputError: The microbatches do not make two halves.
    """
    (batches,) = hessian.batches
    if len(batches) % 2:
        raise InputError(f"{len(batches)} microbatches do not make two halves: take an even number of them.")
    first, second = (
        dataclasses.replace(hessian, batches=(jaxhess.Microbatches(jax.tree.map(part, batches.stacked)),))
        for part in (lambda x: x[::2], lambda x: x[1::2])
    )
    return singular_value(first - second, samples, seed).times(0.5)


def rounding(
    hessian: jaxhess.Hessian,
    format: Format,
    pairs: dict[str, Vector],
    before: jaxhess.Spectrum,
    steps: int,
    samples: int,
    storage: jaxhess.Storage,
    seed: int,
) -> Rounding:
    """The effect of rounding the weights to one format.

    Args:
        hessian: Of the model as it is.
        format: To round to.
        pairs: Unit eigenvectors of its "smallest" and "largest" eigenvalues.
        before: Its spectrum.
        steps: Lanczos steps of the rounded model's spectrum, one probe.
        samples: Random vectors for the floor.
        storage: Of the Lanczos vectors.
        seed: Of all random vectors.
    """
    changed = dataclasses.replace(hessian, params=rounded(hessian.params, format))
    after = jaxhess.spectrum(changed, steps=steps, probes=1, seed=seed, storage=storage)
    shifts = {}
    for end, old, new in zip(("smallest", "largest"), before.extreme(), after.extreme(), strict=True):
        u = pairs[end]
        product = changed @ u
        rho = float(dot(u, product))
        shifts[end] = Shift(
            old.value,
            new.value,
            old.residual_bound + new.residual_bound,
            rho - float(dot(u, hessian @ u)),
            float(norm(add_scaled(product, jnp.float32(-rho), u))),
        )
    change = relative_change(hessian.params, changed.params)
    floor = singular_value(changed - hessian, samples, seed)
    return Rounding(
        format, change, floor, float(after.run.inputs.loss or math.nan), shifts["smallest"], shifts["largest"]
    )
