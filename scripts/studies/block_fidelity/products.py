"""What the study of block-diagonal fidelity measures: products, exact and by finite differences, and their noise."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import jaxhess
from jaxhess.krylov.errors import student_factor
from jaxhess.pytrees import register_dataclass
from jaxhess.structure.fidelity import Fidelity, compared, full_and_own
from jaxhess.vectors import Vector, norm, random_key, size, widen
from scripts.studies.harness import ModelOptions

Array = npt.NDArray[np.float64]


PAPER = (1e-4, 1e-3)
"""The per-coordinate steps that arXiv 2602.00816 recommends."""


class Published(NamedTuple):
    """A table's mean ± what is taken for the standard deviation over layers and probes."""

    error: float
    error_spread: float
    cosine: float
    cosine_spread: float

    @property
    def excess(self) -> float:
        """Mean of error^2 + cosine^2 - 1."""
        return self.error**2 + self.error_spread**2 + self.cosine**2 + self.cosine_spread**2 - 1

    @property
    def below_one(self) -> float:
        """The largest share of errors below 1 that mean and deviation allow (Cantelli's inequality)."""
        above = self.error - 1
        return 1.0 if above <= 0 else self.error_spread**2 / (self.error_spread**2 + above**2)


TABLE_6 = Published(0.941, 0.059, 0.311, 0.120)
TABLE_7 = Published(1.214, 0.150, 0.00443, 0.127)


@dataclasses.dataclass(frozen=True)
class ProductOptions(ModelOptions):
    """Steps are per coordinate: the shift is step times v, whose entries have variance 1."""

    seq_len: int = 32
    """Predicted tokens per sequence."""
    probes: int = 8
    """Independent random vectors."""
    steps: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    """Of finite differences."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the weights and the computation of finite differences."""
    same_length: bool = False
    """Shift by as much along a block's part of v as along v, instead of the same entries by the same amounts."""
    outliers: int = 10
    """Leading eigenpairs that are taken out of the exact products; 0: none."""
    lanczos: int = 60
    """Lanczos steps for them, at most; taken twice."""
    others: bool = True
    """Also Gauss-Newton and the empirical Fisher matrix, and exact products in bfloat16."""


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Difference(jaxhess.LinearOperator):
    """Products by central differences with a shift of step times v: what the paper's formula says.

    Attributes:
        central: The library's operator; its own step is not used.
        step: Per coordinate.
        same_length: See `Options`. Static.
    """

    central: jaxhess.FiniteDifferenceHessian
    step: Any
    same_length: bool = dataclasses.field(default=False, metadata={"static": True})

    def length(self, v: Vector) -> jax.Array:
        """Of the shift along v."""
        return self.step * (math.sqrt(size(v)) if self.same_length else norm(v))

    def mv(self, v: Vector) -> Vector:
        return dataclasses.replace(self.central, step=self.length(v), per="unit").mv(v)

    @property
    def shape_dtype(self) -> Vector:
        return self.central.shape_dtype


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Realised(jaxhess.LinearOperator):
    """Exact products along the shift that weights in a narrow dtype can make, scaled as `Difference` scales its own.

    What a difference has beside these is the noise of its gradients, and truncation.
    """

    exact: jaxhess.Hessian
    difference: Difference

    def mv(self, v: Vector) -> Vector:
        e = self.difference.length(v) / norm(v)

        def moved(x: jax.Array, d: jax.Array) -> jax.Array:
            own, wide = jnp.finfo(x.dtype), x.astype(jnp.float32)
            ends = [jax.lax.reduce_precision(wide + s * e * d, own.nexp, own.nmant) for s in (1, -1)]
            return (ends[0] - ends[1]) / (2 * e)

        found = jax.tree.map(moved, self.difference.central.params, widen(v))
        inner = jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, d: jnp.sum(x * d), found, v)))
        square = jnp.stack(jax.tree.leaves(jax.tree.map(lambda d: jnp.sum(d * d), v)))
        counts = inner > 0.5 * square
        counts = counts | ~counts.any()
        factor = jnp.sum(jnp.where(counts, square, 0)) / jnp.sum(jnp.where(counts, inner, 0))
        return jax.tree.map(lambda x: factor * x, self.exact.mv(found))

    @property
    def shape_dtype(self) -> Vector:
        return self.exact.shape_dtype


@dataclasses.dataclass(frozen=True)
class Products:
    """What one operator says: arrays [probes, blocks + 1].

    Attributes:
        name: Of the operator.
        found: Its fidelity.
        signal, noise: Of finite differences: of exact products along the shift made, and of what is left of the
            differences without them. Of exact ones: without the leading eigenpairs, and of these alone.
        step, dtype: Of finite differences.
    """

    name: str
    found: Fidelity
    signal: Fidelity | None = None
    noise: Fidelity | None = None
    step: float | None = None
    dtype: str = "float32"

    def predicted(self) -> Fidelity:
        """Of differences whose noise is orthogonal to the exact products and as that of any other probe.

        Lengths of the noise in y and in d, and the angle between them, are taken from another probe: [probes,
        probes - 1, blocks + 1]. Of the probe itself only its exact products are used.
        """
        signal, noise = self.signal, self.noise
        if signal is None or noise is None:
            raise ValueError(f"{self.name} are no differences.")
        count = len(self.found.full)
        others = np.array([[q for q in range(count) if q != p] for p in range(count)])
        full, own = (np.sqrt(s[:, None] ** 2 + n[others] ** 2) for s, n in zip(signal[:2], noise[:2], strict=True))
        inner = (np.nan_to_num(signal.cosine) * signal.full * signal.own)[:, None]
        inner = inner + (np.nan_to_num(noise.cosine) * noise.full * noise.own)[others]
        with np.errstate(divide="ignore", invalid="ignore"):
            return Fidelity(full, own, np.sqrt(np.maximum(full**2 + own**2 - 2 * inner, 0)), inner / (full * own))


@dataclasses.dataclass(frozen=True)
class ParameterPoint:
    """All products at one point of the parameters.

    Attributes:
        name: Of the point.
        loss, gradient_norm: There.
        eigenvalues: The leading ones.
        products: By name.
    """

    name: str
    loss: float
    gradient_norm: float
    eigenvalues: list[float]
    products: dict[str, Products]


def fine_tuned(hessian: jaxhess.Hessian, steps: int, rate: float) -> jaxhess.Hessian:
    """The operator at the parameters that Adam finds from its own, on its own data."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(at: jaxhess.Hessian, state: Any) -> tuple[Any, Any]:
        _, gradient = at.value_and_gradient()
        updates, state = optimizer.update(gradient, state, at.params)
        return optax.apply_updates(at.params, updates), state

    state = optimizer.init(hessian.params)
    for _ in range(steps):
        params, state = step(hessian, state)
        hessian = dataclasses.replace(hessian, params=params)
    return hessian


def measured(
    options: ProductOptions, name: str, hessian: jaxhess.Hessian, blocks: jaxhess.Blocks, numbers: list[int] | None
) -> ParameterPoint:
    """All products at the parameters of this operator, one probe after the other."""
    loss, gradient = jax.jit(jaxhess.Hessian.value_and_gradient)(hessian)
    gradient_norm = float(norm(gradient))
    del gradient
    pairs = None
    if options.outliers:
        storage = jaxhess.Storage("none")  # a basis of so many vectors would be the largest thing in memory
        pairs = jaxhess.leading_eigenpairs(
            hessian, options.outliers, steps=options.lanczos, storage=storage, seed=options.seed
        )
    kinds: dict[str, jaxhess.LinearOperator] = {}
    if options.others:
        parts = (hessian.loss, hessian.params, hessian.batches)
        kinds = {
            "Gauss-Newton": jaxhess.GaussNewton(*parts),
            "empirical Fisher": jaxhess.EmpiricalFisher(*parts),
            "exact, bfloat16": hessian.in_dtype("bfloat16"),
        }
    rows: dict[str, list[tuple[Fidelity, ...]]] = {}
    described: dict[str, dict[str, Any]] = {}
    key = random_key(options.seed)
    for p in range(options.probes):
        v = jaxhess.random_probe(jax.random.fold_in(key, p), hessian.shape_dtype)
        exact = full_and_own(hessian, blocks, v, numbers)
        row = [compared(blocks, *exact, numbers)]
        if pairs is not None:
            leading = leading_part(blocks, pairs.vectors, jnp.asarray(pairs.values, jnp.float32), v)
            rest = jax.tree.map(jnp.subtract, exact, leading)
            row += [compared(blocks, y, d, numbers) for y, d in (rest, leading)]
            del rest, leading
        rows.setdefault("exact", []).append(tuple(row))
        if "float32" not in options.dtypes:
            del exact  # two vectors
        for kind, operator in kinds.items():
            products = full_and_own(operator, blocks, v, numbers)
            rows.setdefault(kind, []).append((compared(blocks, *products, numbers),))
        for dtype in options.dtypes:
            narrow = hessian.in_dtype(dtype)
            central = jaxhess.FiniteDifferenceHessian(narrow.loss, narrow.params, narrow.batches, step=1.0)
            for step in options.steps:
                label = f"differences {np.format_float_scientific(step, trim='-', exp_digits=1)}, {dtype}"
                described[label] = {"step": step, "dtype": dtype}
                difference = Difference(central, step, options.same_length)
                products = full_and_own(difference, blocks, v, numbers)
                if dtype == "float32":
                    true = exact
                else:
                    true = full_and_own(Realised(narrow.in_dtype("float32"), difference), blocks, v, numbers)
                fidelities = [compared(blocks, y, d, numbers) for y, d in (products, true)]
                noise = minus(products, true)
                rows.setdefault(label, []).append((*fidelities, compared(blocks, noise[0], noise[1], numbers)))
                del products, true, noise
    results = {}
    for label, several in rows.items():
        fidelity, *rest = map(Fidelity.stacked, zip(*several, strict=True))
        signal, beside = (rest[0], rest[1]) if rest else (None, None)
        results[label] = Products(label, fidelity, signal, beside, **described.get(label, {}))
    return ParameterPoint(name, float(loss), gradient_norm, [] if pairs is None else pairs.values.tolist(), results)


@functools.partial(jax.jit, donate_argnums=0)
def minus(x: Vector, y: Vector) -> Vector:
    """x - y, in the place of x."""
    return jax.tree.map(jnp.subtract, x, y)


@functools.partial(jax.jit, static_argnums=0)
def leading_part(blocks: jaxhess.Blocks, vectors: Vector, values: jax.Array, v: Vector) -> tuple[Vector, Vector]:
    """(Lv, the vector of all L_bb v_b) of L = sum over eigenpairs of value u u'; vectors are stacked [k, ...]."""

    def add(sums: tuple[Vector, Vector], pair: tuple[Vector, jax.Array]) -> tuple[tuple[Vector, Vector], None]:
        u, value = pair
        inner = blocks.dot(u, v)
        full = jax.tree.map(lambda s, x: s + value * inner.sum() * x, sums[0], u)
        own = jax.tree.map(lambda s, x, c: s + value * c * x, sums[1], u, blocks.spread(inner, u))
        return (full, own), None

    zeros = jax.tree.map(jnp.zeros_like, widen(v))
    return jax.lax.scan(add, (zeros, zeros), (vectors, values))[0]


class Mean(NamedTuple):
    """A mean over probes, and the half-width of its 95% interval (Student's t over probes)."""

    value: float
    error: float


def over_probes(values: Array) -> Mean:
    """Of [probes, layers]: the mean over layers first, of those that have a value."""
    means = np.nanmean(values, axis=1)
    return Mean(
        float(means.mean()), student_factor(len(means) - 1, 0.95) * float(means.std(ddof=1)) / len(means) ** 0.5
    )


def ratio_of_means(above: Array, below: Array) -> Mean:
    """Of [probes, layers], with the error of the delete-one jackknife over probes (Efron and Stein 1981)."""
    a, b = np.nanmean(above, axis=1), np.nanmean(below, axis=1)
    count = len(a)
    left = (a.sum() - a) / (b.sum() - b)
    deviation = math.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())
    return Mean(float(a.sum() / b.sum()), student_factor(count - 1, 0.95) * deviation)
