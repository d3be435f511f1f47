"""The Lanczos iteration on vectors that are sharded pytrees, as one compiled segment over a state that can be saved."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.krylov.basis import (
    BasisMemory,
    combine,
    gram,
    narrower,
    on_memory,
    project_out,
    project_out_in_turn,
    stacked_sharding,
    write_row,
    zeros,
)
from jaxhess.operators.base import LinearOperator
from jaxhess.vectors import (
    Vector,
    add_scaled,
    check_accumulation_dtype,
    check_vector_dtype,
    dot,
    named_sharding,
    norm,
    scale,
    size,
    widen,
)

Reorthogonalize = Literal["none", "full"] | int
"""Against what every new vector is orthogonalised, beyond the last two:

- "none": nothing.
- an integer r of at least 2: the last r vectors, the window of arXiv 2602.00816; those two are among them.
- "full": all vectors.
"""

BREAKDOWN = 32
"""Rounding units within which a beta is noise: the Krylov space is exhausted.

Two sources of noise set the scale. The step's own scalars: beta against |alpha| plus the beta before. And the rounding
of the stored vector, which leaks about eps / sqrt(n) of every eigenvector into it, so that even in the null space
products are no smaller than that times the largest |alpha| + beta so far. Both are relative: a scaled loss breaks down
at the same step. The eps is that of the recurrence, float32 or wider: vectors stored narrower round more, and there a
breakdown may go unseen. (Relative to the largest eigenvalue alone, without sqrt(n), the bulk of a large model, often
seven decades below the outliers, would pass for noise in float32.) With "full" there is a third sign: most of what is
left lies in the span of the basis.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanczosState:
    """A Lanczos run after `step` products; `m` is the most it has room for.

    Several runs that advance together (see `start_batch`) are one state: every field but `step` then has a leading
    axis over runs.

    Attributes:
        step: int32 scalar, products done.
        size: int32 scalar, rows of T that are valid; smaller than `step` only after a breakdown.
        broken: bool scalar, whether the Krylov space was exhausted.
        alphas: [m] diagonal of T, in the accumulation dtype (float32 or wider).
        betas: [m]; betas[j] is the norm left after step j: the off-diagonal, and the last one bounds the residuals.
        previous, current: Vectors q_{j-1} and q_j, in the storage dtype.
        step_errors: [m] upper bounds of |f_j|, what step j left out of A Q = Q T + beta_m q_{m+1} e_m' + F, f_j the
            columns of F. They are measured: what re-orthogonalisation took away, and the rounding of q_{j+1} where
            vectors are stored narrower than they are computed. The rounding of the products is not in them.
        basis: Lanczos vectors stacked along a leading axis, zero where not yet computed: all m of them ("full"), or the
            last r in a ring where q_j has row j mod r. None for "none".
        reorthogonalize: See `Reorthogonalize`. Static.
    """

    step: jax.Array
    size: jax.Array
    broken: jax.Array
    alphas: jax.Array
    betas: jax.Array
    step_errors: jax.Array
    previous: Vector
    current: Vector
    basis: Vector | None
    reorthogonalize: Reorthogonalize = dataclasses.field(metadata={"static": True})

    @property
    def is_batch(self) -> bool:
        """Whether it is several runs."""
        return self.alphas.ndim == 2


def start_lanczos(
    probe: Vector,
    steps: int,
    reorthogonalize: Reorthogonalize = "none",
    accumulation_dtype: str = "float32",
    basis_dtype: Any = None,
    basis_memory: BasisMemory = "device",
) -> LanczosState:
    """The state before the first step, from any nonzero probe; vectors are stored in the probe's dtypes and shardings.

    Args:
        probe: Where the Krylov space starts.
        steps: What the state has room for.
        reorthogonalize: See `Reorthogonalize`; `docs/numerics.md` says what each costs.
        accumulation_dtype: Of alphas and betas, and the inner products and norms that they are: "float32" or "float64"
            (which needs JAX in 64-bit mode); never narrower than the vectors.
        basis_dtype: Of the stored basis; None: that of the vectors.
        basis_memory: "device", or "host": pinned memory of the host, from which vectors come one at a time.

    Raises:
        ValueError: `steps` below 1, an unknown re-orthogonalisation, dtype or memory.
    """
    options = (steps, reorthogonalize, accumulation_dtype, basis_dtype, basis_memory)
    probe = _checked(probe, *options)
    return _started(probe, abstract_lanczos(probe, *options))


def start_batch(
    probes: Iterable[Vector],
    steps: int,
    reorthogonalize: Reorthogonalize = "none",
    accumulation_dtype: str = "float32",
    basis_dtype: Any = None,
    basis_memory: BasisMemory = "device",
) -> LanczosState:
    """The state of several runs that advance together: their products share the primal pass and weight gathers.

    Args:
        probes: A probe for each run, let go of when they are stacked; the others are those of `start_lanczos`.

    Raises:
        ValueError: No probe; a basis in the host's memory; or as `start_lanczos`.
    """
    if basis_memory == "host":
        raise ValueError("A basis in the host's memory is that of one run: start_lanczos, one probe after the other.")
    options = (steps, reorthogonalize, accumulation_dtype, basis_dtype, basis_memory)
    checked = [_checked(probe, *options) for probe in probes]
    if not checked:
        raise ValueError("start_batch needs at least one probe.")
    abstract = abstract_lanczos(checked[0], *options, runs=len(checked))
    stacked = [_stack(checked)]
    del checked
    return _started(stacked.pop(), abstract)


def lanczos_segment(operator: LinearOperator, state: LanczosState, end: int) -> LanczosState:
    """The state after step `end` (at most m), in the shardings it came in: one compilation serves every segment.

    Each step is w = A q_j - beta_{j-1} q_{j-1}; alpha_j = <w, q_j>; w -= alpha_j q_j; re-orthogonalisation;
    beta_j = |w|, recorded after it; q_{j+1} = w / beta_j (Paige 1972, variant A1 of the three-term recurrence). Vectors
    that are stored narrower than float32 are not of length one, so q_j stands for the stored vector over its length.

    Re-orthogonalisation takes two passes of Gram-Schmidt, three against vectors in 16 bits. For "full" they are
    classical: each is one batched product over the basis. For a window they are modified: one vector after the other,
    from the oldest on. The vectors of a window are orthogonal only within the rounding of their storage, or less, and a
    classical pass multiplies a component that k of them share by 1 - k: with bfloat16 vectors a copy of an outlier grew
    in every step. A modified pass makes no vector longer.

    Scalars stay on device. After a breakdown `previous` keeps the last vector, `current` is zero, and further steps
    only count. `state` is donated: its buffers become those of the result.
    """
    return _segment_program(state)(operator, state, jnp.int32(end))


def compile_segment(operator: LinearOperator, state: LanczosState) -> jax.stages.Compiled:
    """The compiled program that `lanczos_segment` runs, with its memory and cost analyses; compiled at most once.

    Both arguments may be abstract (`jax.ShapeDtypeStruct` leaves with shardings).
    """
    return _segment_program(state).lower(operator, state, jnp.int32(0)).compile()


def orthogonality_loss(state: LanczosState) -> np.ndarray:
    """The largest |Q'Q - I| over the vectors of the stored basis, a scalar, or [runs] for several.

    For a window they are the last r vectors. NaN where no basis is stored.
    """
    runs = state.alphas.shape[:-1]
    if state.basis is None:
        return np.full(runs, np.nan)
    products = np.asarray(_gram_program(state)(state), np.float64)
    present = np.diagonal(products, axis1=-2, axis2=-1) > 0.25  # rows not yet written are zero
    both = present[..., :, None] & present[..., None, :]
    return np.abs(np.where(both, products - np.eye(products.shape[-1]), 0)).max((-1, -2))


def lanczos_vectors(state: LanczosState, coefficients: np.ndarray) -> Vector:
    """Combinations [k, ...] of the stored basis of one run, with coefficients [k, rows]; in at least float32.

    Raises:
        ValueError: The state keeps no basis of all vectors.
    """
    if state.reorthogonalize != "full":
        raise ValueError(f"Re-orthogonalisation {state.reorthogonalize!r} does not keep all Lanczos vectors.")
    return _combiner(state)(state.basis, jnp.asarray(coefficients))


def _segment_program(state: LanczosState) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return _program_for(treedef, tuple(leaf.sharding for leaf in leaves), state.is_batch)


@functools.cache
def _program_for(treedef: Any, shardings: tuple[Any, ...], is_batch: bool) -> Any:
    def segment(operator: LinearOperator, state: LanczosState, end: jax.Array) -> LanczosState:
        last = jnp.minimum(end, state.alphas.shape[-1])

        def step(_: jax.Array, state: LanczosState) -> LanczosState:
            if not is_batch:
                return _lanczos_step(operator, state)
            axes = _run_axes(state)
            return jax.vmap(lambda s: _lanczos_step(operator, s), in_axes=(axes,), out_axes=axes)(state)

        return jax.lax.fori_loop(state.step, last, step, state)

    return jax.jit(segment, donate_argnums=(1,), out_shardings=jax.tree.unflatten(treedef, shardings))


def _run_axes(state: LanczosState) -> Any:
    """The axes over runs, for `vmap`: all leading but that of the step, which all runs share."""
    zero: Any = 0
    fields = {f.name: zero for f in dataclasses.fields(LanczosState) if f.name not in ("step", "reorthogonalize")}
    fields["basis"] = None if state.basis is None else 0
    return LanczosState(step=None, reorthogonalize=state.reorthogonalize, **fields)  # type: ignore[arg-type]


def _lanczos_step(operator: LinearOperator, state: LanczosState) -> LanczosState:
    j, q = state.step, state.current
    wide = state.alphas.dtype
    beta_before = jnp.where(j > 0, state.betas[jnp.maximum(j - 1, 0)], 0)
    length, length_before = _length(q, wide), _length(state.previous, wide)
    w = operator.mv(widen(q))
    w = add_scaled(scale(1 / length, w), -beta_before / length_before, state.previous)
    alpha = dot(w, q, wide) / length
    w = add_scaled(w, -alpha / length, q)
    w, removed, left = _reorthogonalized(state, w)
    beta = norm(w, wide)

    local = jnp.abs(alpha) + beta_before
    largest = jnp.maximum(local, jnp.max(jnp.abs(state.alphas) + state.betas))
    rounding = max(float(jnp.finfo(e.dtype).eps) for e in jax.tree.leaves(w))
    noise = BREAKDOWN * rounding * jnp.maximum(local, largest / size(q) ** 0.5)
    # Where most of w still lies in the span of the basis, nothing of the operator is in it any more.
    exhausted = (beta <= noise) | (beta < 2 * left) | ~jnp.isfinite(beta)
    broken = state.broken | exhausted
    following = scale(1 / jnp.where(broken, 1, beta), w)
    stored = jax.tree.map(lambda e, like: jnp.where(broken, 0, e).astype(like.dtype), following, q)
    error = removed + jnp.where(exhausted, beta, beta * _rounding_error(following, q, wide))
    basis = state.basis
    if basis is not None:
        window = state.reorthogonalize if isinstance(state.reorthogonalize, int) else None
        basis = write_row(basis, j + 1 if window is None else (j + 1) % window, stored)

    def record(values: jax.Array, value: jax.Array) -> jax.Array:
        return values.at[j].set(jnp.where(state.broken, 0, value))

    # That beta is not above infinity is always true, but XLA does not know: it moves q to its new place at the end of
    # the step, not at the beginning, where the copy would be one more vector beside the product's temporaries.
    ended = state.broken & ~(beta > jnp.inf)
    return dataclasses.replace(
        state,
        step=j + 1,
        size=jnp.where(state.broken, state.size, j + 1),
        broken=broken,
        alphas=record(state.alphas, alpha),
        betas=record(state.betas, beta),
        step_errors=record(state.step_errors, error),
        previous=jax.tree.map(lambda old, new: jnp.where(ended, old, new), state.previous, q),
        current=stored,
        basis=basis,
    )


def _reorthogonalized(state: LanczosState, w: Vector) -> tuple[Vector, jax.Array, jax.Array]:
    """w without its components along what it should be orthogonal to, how long these were in all, and what is left.

    What is left of them is estimated, for "full" only: a pass over a basis with Q'Q = I + D leaves D times what it
    takes away. Two passes show how large D is, and so what the last one leaves. Rows in 16 bits have a D of 2^-9 and
    more, and outliers a million times the bulk let in as much: they take a third pass.
    """
    wide = state.alphas.dtype
    removed = left = jnp.zeros((), wide)
    count = state.step + 1
    if state.basis is not None:
        project = project_out if state.reorthogonalize == "full" else project_out_in_turn
        last = removed
        for _ in range(3 if _is_narrow(state.basis) else 2):
            before = last
            w, last = project(state.basis, w, count)
            removed = removed + last.astype(wide)
        if state.reorthogonalize == "full":
            left = (last * (last / jnp.where(before > 0, before, 1))).astype(wide)
    if state.basis is None or narrower(state.basis, state.current):
        vectors = (state.previous, state.current)
        overlaps = [dot(w, q, wide) / _length(q, wide) for q in vectors]
        for overlap, q in zip(overlaps, vectors, strict=True):
            w = add_scaled(w, -overlap / _length(q, wide), q)
            removed = removed + jnp.abs(overlap)
    return w, removed, left


def _length(q: Vector, dtype: Any) -> jax.Array:
    """The length of a stored Lanczos vector: one within rounding if it is stored as wide as it is computed."""
    if not _is_narrow(q):
        return jnp.ones((), dtype)
    length = norm(q, dtype)
    return jnp.where(length > 0, length, 1)  # the vector before the first is zero


def _rounding_error(unit: Vector, like: Vector, dtype: Any) -> jax.Array:
    """How far storing a unit vector in these dtypes moves it; zero where it is stored as it is."""
    if not _is_narrow(like):
        return jnp.zeros((), dtype)

    def leaf(e: jax.Array, x: jax.Array) -> jax.Array:
        kind = jnp.finfo(x.dtype)
        lost = jnp.abs(e - jax.lax.reduce_precision(e, kind.nexp, kind.nmant))  # a cast and back may be optimised away
        # This flushes entries to zero that the cast keeps as subnormal numbers.
        return jnp.where(jnp.abs(e) < kind.tiny, jnp.minimum(lost, kind.smallest_subnormal / 2), lost)

    return norm(jax.tree.map(leaf, unit, like), dtype)


def _is_narrow(q: Vector) -> bool:
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(q))


def _checked(
    probe: Vector,
    steps: int,
    reorthogonalize: Reorthogonalize,
    accumulation_dtype: str,
    basis_dtype: Any,
    basis_memory: BasisMemory,
) -> Vector:
    """The probe as arrays; raises where an option makes no sense."""
    check_lanczos_options(steps, reorthogonalize, accumulation_dtype, basis_dtype, basis_memory)
    for path, leaf in jax.tree.flatten_with_path(probe)[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name, dtype = jax.tree_util.keystr(path), jnp.result_type(leaf)
            raise ValueError(f"The probe's leaf {name} has dtype {dtype}; Lanczos vectors are floating point.")
    return jax.tree.map(jnp.asarray, probe)


def check_lanczos_options(
    steps: int,
    reorthogonalize: Reorthogonalize,
    accumulation_dtype: str = "float32",
    basis_dtype: Any = None,
    basis_memory: BasisMemory = "device",
) -> None:
    """Raises ValueError where an option of `start_lanczos` makes no sense."""
    check_accumulation_dtype(accumulation_dtype)
    if steps < 1:
        raise ValueError(f"steps is {steps}; a Lanczos run takes at least 1.")
    known = reorthogonalize in ("none", "full")
    if isinstance(reorthogonalize, bool) or not (known or (isinstance(reorthogonalize, int) and reorthogonalize >= 2)):
        raise ValueError(
            f"Unknown re-orthogonalisation {reorthogonalize!r}; it is 'none', 'full' or a window, the number of last "
            "vectors, at least 2."
        )
    if basis_memory not in ("device", "host"):
        raise ValueError(f"basis_memory is {basis_memory!r}; it is 'device' or 'host'.")
    check_vector_dtype("basis_dtype", basis_dtype)


def abstract_lanczos(
    like: Vector,
    steps: int,
    reorthogonalize: Reorthogonalize = "none",
    accumulation_dtype: str = "float32",
    basis_dtype: Any = None,
    basis_memory: BasisMemory = "device",
    runs: int | None = None,
) -> LanczosState:
    """A state as `jax.ShapeDtypeStruct`s with shardings, for vectors like these: of one run, or of `runs` together."""
    axis = 0 if runs is None else 1
    batch = () if runs is None else (runs,)
    leaves, treedef = jax.tree.flatten(like)
    shardings = [stacked_sharding(s) if axis else s for s in (named_sharding(x) or _placement(x) for x in leaves)]
    first = shardings[0]
    scalar = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first
    wide = jnp.promote_types(accumulation_dtype, functools.reduce(jnp.promote_types, [x.dtype for x in leaves]))

    def scalars(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=scalar)

    def stacked(rows: int, dtype: Any = None, on_host: bool = False) -> Vector:
        structs = [
            jax.ShapeDtypeStruct(
                (*batch, rows + on_host, *x.shape),
                jnp.dtype(x.dtype if dtype is None else dtype),
                sharding=on_memory(stacked_sharding(s, axis), on_host),
            )
            for x, s in zip(leaves, shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, structs)

    vector = jax.tree.unflatten(
        treedef,
        [jax.ShapeDtypeStruct((*batch, *x.shape), x.dtype, sharding=s) for x, s in zip(leaves, shardings, strict=True)],
    )
    basis = None
    if reorthogonalize != "none":
        rows = reorthogonalize if isinstance(reorthogonalize, int) else steps
        basis = stacked(rows, basis_dtype, basis_memory == "host")
    return LanczosState(
        step=scalars((), "int32"),
        size=scalars(batch, "int32"),
        broken=scalars(batch, "bool"),
        alphas=scalars((*batch, steps), wide),
        betas=scalars((*batch, steps), wide),
        step_errors=scalars((*batch, steps), wide),
        previous=vector,
        current=vector,
        basis=basis,
        reorthogonalize=reorthogonalize,
    )


def _placement(leaf: Any) -> Any:
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _started(probe: Vector, state: LanczosState) -> LanczosState:
    """The state whose shapes are given, before its first step from this probe (of every run)."""
    leaves, treedef = jax.tree.flatten(dataclasses.replace(state, basis=None))
    started: LanczosState = _starter(treedef, tuple(leaves))(probe)
    del probe  # before there is a basis
    if state.basis is None:
        return started
    started = dataclasses.replace(started, basis=jax.tree.map(zeros, state.basis))
    return _first_row(started)(started)


@functools.cache
def _starter(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    abstract: LanczosState = jax.tree.unflatten(treedef, leaves)

    def unit(probe: Vector) -> Vector:
        return scale(1 / norm(probe, abstract.alphas.dtype), probe)

    def create(probe: Vector) -> LanczosState:
        empty: LanczosState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        return dataclasses.replace(empty, current=(jax.vmap(unit) if abstract.is_batch else unit)(probe))

    # Explicit even on one device: arrays that are not committed to theirs would compile the segment twice.
    return jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))


def _stack(probes: list[Vector]) -> Vector:
    """Probes stacked along a leading axis, sharded as they are."""
    leaves, treedef = jax.tree.flatten(probes[0])
    return _stacker(treedef, tuple(x.sharding for x in leaves))(probes)


@functools.cache
def _stacker(treedef: Any, shardings: tuple[Any, ...]) -> Any:
    out = jax.tree.unflatten(treedef, [stacked_sharding(s) for s in shardings])
    return jax.jit(lambda probes: jax.tree.map(lambda *xs: jnp.stack(xs), *probes), out_shardings=out)


def _per_run(state: LanczosState, f: Any, **options: Any) -> Any:
    """`f(state, ...)` of one run as a program over one or several."""
    if not state.is_batch:
        return jax.jit(f, **options)

    def mapped(state: LanczosState, *more: Any) -> Any:
        return jax.vmap(f, in_axes=(_run_axes(state), *[0] * len(more)))(state, *more)

    return jax.jit(mapped, **options)


def _cached_program(build: Any) -> Any:
    """`build(state)`, once for all states of the same structure and shardings."""
    programs: dict[Any, Any] = {}

    @functools.wraps(build)
    def program(state: LanczosState) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        key = (treedef, tuple(leaf.sharding for leaf in leaves), state.is_batch)
        if key not in programs:
            programs[key] = build(state)
        return programs[key]

    return program


@_cached_program
def _gram_program(state: LanczosState) -> Any:
    return _per_run(state, lambda s: gram(s.basis))


@_cached_program
def _combiner(state: LanczosState) -> Any:
    out = jax.tree.map(lambda x: stacked_sharding(x.sharding), state.current)
    return jax.jit(combine, out_shardings=out)


@_cached_program
def _first_row(state: LanczosState) -> Any:
    def write(basis: Vector, current: Vector) -> Vector:
        return write_row(basis, jnp.int32(0), current)

    out = jax.tree.map(lambda x: x.sharding, state.basis)
    program = jax.jit(jax.vmap(write) if state.is_batch else write, donate_argnums=0, out_shardings=out)
    return lambda state: dataclasses.replace(state, basis=program(state.basis, state.current))
