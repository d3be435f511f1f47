"""Lanczos runs as a state that can be saved: what it stores, and how it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.krylov import inner
from jaxhess.krylov.basis import HOST, moved, on_memory, stacked_sharding, write_row, zeros
from jaxhess.krylov.storage import Reorthogonalize, Storage
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.forms import FORMS
from jaxhess.pytrees import register_dataclass
from jaxhess.vectors import Vector, named_sharding

FORM_STEPS = 2
"""Steps whose microbatches' forms are kept: what the first three moments of the spectrum need."""


@register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LanczosState:
    """Lanczos runs that advance together, one or several, after `step` products each; there is room for `m`.

    With `blocks` every vector holds the runs of all blocks of a block-diagonal operator, each in its own part, and what
    is a number of a run has one more axis [B] after that over runs.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> state = jaxhess.lanczos_segment(A, jaxhess.start_lanczos([jnp.array([1.0, 0.0])], steps=2), end=2)
        >>> state.alphas.round(3), state.betas.round(3)  # T is A, and the second step ends the Krylov space
        (Array([[2., 2.]], dtype=float32), Array([[1., 0.]], dtype=float32))
        >>> state.size, state.broken
        (Array([2], dtype=int32), Array([ True], dtype=bool))

    Attributes:
        step: int32 scalar, products done.
        size: [runs] int32, rows of T that are valid; smaller than `step` only after a breakdown.
        broken: [runs] bool, whether the Krylov space was exhausted.
        alphas: [runs, m] diagonal of T, in the scalar dtype (float32 or wider).
        betas: [runs, m]; betas[:, j] is the norm left after step j: the off-diagonal, and the last one bounds the
            residuals.
        step_errors: [runs, m] upper bounds of |f_j|, what step j left out of A Q = Q T + beta_m q_{m+1} e_m' + F, f_j
            the columns of F. They are measured: what re-orthogonalisation took away, and the rounding of q_{j+1} where
            vectors are stored narrower than they are computed. The rounding of the products is not in them.
        previous, current: Vectors q_{j-1} and q_j with a leading axis over runs, in the vector dtype.
        basis: Lanczos vectors [runs, rows, ...], zero where not yet computed: all m of them ("full"), or the last r in
            a ring where q_j has row j mod r. None for "none".
        forms: [runs, 2, microbatches, 4], what single microbatches contribute to the first two steps, one beside the
            other: q_j'S_b q_j, q_{j-1}'S_b q_j, |S_b q_j|^2 and c_b (`jaxhess.operators.forms`). None: not kept.
        reorthogonalize: As in `Storage`. Static.
        blocks: Of which every vector holds a run each. Static; None: whole vectors.
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
    forms: jax.Array | None
    reorthogonalize: Reorthogonalize = dataclasses.field(metadata={"static": True})
    blocks: Blocks | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def runs(self) -> int:
        """How many."""
        return self.alphas.shape[0]

    def tridiagonal(self, run: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """alphas, betas and step errors of one run as far as they are valid, in float64: what `quadrature` takes."""
        valid = np.s_[run, : int(self.size[run])]
        alphas, betas, errors = (np.asarray(x, np.float64) for x in (self.alphas, self.betas, self.step_errors))
        return alphas[valid], betas[valid], errors[valid]


def start_lanczos(
    probes: Iterable[Vector],
    steps: int,
    storage: Storage = Storage(),
    blocks: Blocks | None = None,
    microbatches: int = 0,
) -> LanczosState:
    """The state before the first step of as many runs as there are probes, in the probes' shardings.

    Runs that advance together share the primal pass of their products and the gathers of weights.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> state = jaxhess.start_lanczos([jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])], steps=3)
        >>> int(state.step), state.alphas.shape
        (0, (2, 3))
        >>> state.current  # of length one
        Array([[1., 0.],
               [0., 1.]], dtype=float32)

    Args:
        probes: Where the Krylov spaces start: nonzero vectors of floating point, `[probe]` for one run.
        steps: What the state has room for.
        storage: What is kept, and how.
        blocks: Start a run in each block of every probe; steps are then those of a `BlockDiagonal` operator.
        microbatches: Of an operator whose microbatches' forms are to be kept (`operators.forms.num_microbatches`);
            0: none are.

    Raises:
        InputError: `steps` is below 1; no probe, or not of floating point; several and a basis in the host's memory;
            blocks and vectors in 16 bits; a dtype needs JAX in 64-bit mode.
    """
    storage.check_available()
    if isinstance(probes, jax.Array | np.ndarray | Mapping):
        raise InputError("probes is a vector; start_lanczos takes a list of them: [probe] for one run.")
    drawn = [_arrays(probe, storage.vector_dtype) for probe in probes]
    if not drawn:
        raise InputError("A Lanczos run needs at least one probe.")
    if storage.basis_memory == "host" and len(drawn) > 1:
        raise InputError("A basis in the host's memory is that of one run: one probe after the other.")
    abstract = abstract_lanczos(drawn[0], steps, storage, len(drawn), blocks, microbatches)
    leaves, treedef = jax.tree.flatten(dataclasses.replace(abstract, basis=None))
    state: LanczosState = _starter(treedef, tuple(leaves))(drawn)
    del drawn  # before there is a basis
    if abstract.basis is None:
        return state
    state = dataclasses.replace(state, basis=jax.tree.map(zeros, abstract.basis))
    return dataclasses.replace(state, basis=_first_row(state)(state.basis, state.current))


def abstract_lanczos(
    like: Vector,
    steps: int,
    storage: Storage = Storage(),
    runs: int = 1,
    blocks: Blocks | None = None,
    microbatches: int = 0,
) -> LanczosState:
    """A state as `jax.ShapeDtypeStruct`s with shardings, for so many runs with vectors like these.

    Raises:
        InputError: `steps` is below 1; a dtype needs JAX in 64-bit mode; blocks and vectors in 16 bits.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; a Lanczos run takes at least 1.")
    storage.check_available()
    leaves, treedef = jax.tree.flatten(like)
    dtypes = [jnp.dtype(storage.vector_dtype or x.dtype) for x in leaves]
    if blocks is not None and any(
        dtype.itemsize < 4 for dtype in (*dtypes, jnp.dtype(storage.basis_dtype or "float32"))
    ):
        raise InputError("Vectors of blocks are stored in float32 or wider: leave the dtypes of vectors and basis out.")
    shardings = [named_sharding(x) or _placement(x) for x in leaves]
    first = shardings[0]
    scalar = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first
    wide = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(storage.scalar_dtype))

    def scalars(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=scalar)

    def vectors(*axes: int, dtype: Any = None, on_host: bool = False) -> Vector:
        structs = [
            jax.ShapeDtypeStruct(
                (*axes, *x.shape),
                jnp.dtype(dtype or own),
                sharding=on_memory(stacked_sharding(sharding, len(axes)), on_host),
            )
            for x, own, sharding in zip(leaves, dtypes, shardings, strict=True)
        ]
        return jax.tree.unflatten(treedef, structs)

    basis = None
    if storage.reorthogonalize != "none":
        rows = steps if storage.reorthogonalize == "full" else storage.reorthogonalize
        on_host = storage.basis_memory == "host"
        basis = vectors(runs, rows + on_host, dtype=storage.basis_dtype, on_host=on_host)
    numbers = (runs,) if blocks is None else (runs, len(blocks))
    return LanczosState(
        step=scalars((), "int32"),
        size=scalars(numbers, "int32"),
        broken=scalars(numbers, "bool"),
        alphas=scalars((*numbers, steps), wide),
        betas=scalars((*numbers, steps), wide),
        step_errors=scalars((*numbers, steps), wide),
        previous=vectors(runs),
        current=vectors(runs),
        basis=basis,
        forms=scalars((runs, FORM_STEPS, microbatches, FORMS), wide) if microbatches else None,
        reorthogonalize=storage.reorthogonalize,
        blocks=blocks,
    )


def extended(state: LanczosState, steps: int) -> LanczosState:
    """The first run of a state with "full" re-orthogonalisation, with room for so many steps, at least its own.

    The state is used up, and its memory freed: its basis moves leaf by leaf, so that never more than one leaf is there
    twice. The basis of the other runs goes first.
    """
    before = state.alphas.shape[1]

    def first(x: jax.Array, more: int = 0) -> jax.Array:
        found = jnp.pad(x[:1], [(0, 0), (0, more)]) if more else x[:1]
        return jax.device_put(found, x.sharding)

    previous, current = jax.tree.map(first, (state.previous, state.current))
    leaves, treedef = jax.tree.flatten(state.basis)
    if state.runs > 1:
        for k, old in enumerate(leaves):
            leaves[k] = jax.block_until_ready(first(old))
            old.delete()
    basis = []
    for old, q in zip(leaves, jax.tree.leaves(current), strict=True):
        spare = int(old.sharding.memory_kind == HOST)
        struct = jax.ShapeDtypeStruct((1, steps + spare, *old.shape[2:]), old.dtype, sharding=old.sharding)
        basis.append(_mover(old.sharding, before)(zeros(struct), old, q, state.step))
        jax.block_until_ready(basis[-1])
        old.delete()
    if state.runs > 1:
        for x in jax.tree.leaves((state.previous, state.current)):
            x.delete()
    return dataclasses.replace(
        state,
        size=first(state.size),
        broken=first(state.broken),
        alphas=first(state.alphas, steps - before),
        betas=first(state.betas, steps - before),
        step_errors=first(state.step_errors, steps - before),
        previous=previous,
        current=current,
        basis=jax.tree.unflatten(treedef, basis),
        forms=None if state.forms is None else first(state.forms),
    )


@functools.cache
def _mover(sharding: Any, rows: int) -> Any:
    def move(new: jax.Array, old: jax.Array, q: jax.Array, step: jax.Array) -> jax.Array:
        def one(new: jax.Array, old: jax.Array, q: jax.Array) -> jax.Array:
            return write_row(moved(old, new, rows), step, q)  # the vector after the last step had no row

        return over_runs(one, 1)(new, jax.lax.slice_in_dim(old, 0, 1), q)

    return jax.jit(move, donate_argnums=0, out_shardings=sharding)


def over_runs(f: Callable[..., Any], runs: int, in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    """`jax.vmap(f, in_axes, out_axes)`; a single run loses its axis before, so that its program is that of one vector.

    Axes are 0 or None.
    """
    if runs > 1:
        return jax.vmap(f, in_axes, out_axes)

    def each(change: Callable[[jax.Array], jax.Array], axes: Any, tree: Any) -> Any:
        def below(axis: int | None, part: Any) -> Any:
            return part if axis is None else jax.tree.map(change, part)

        return jax.tree.map(below, axes, tree, is_leaf=lambda x: x is None)

    def once(*arguments: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(arguments)
        found = f(*each(lambda x: jax.lax.squeeze(x, (0,)), axes, arguments))
        return each(lambda x: jax.lax.expand_dims(x, (0,)), out_axes, found)

    return once


def run_axes(state: LanczosState) -> Any:
    """The axes over runs of a state's fields: all leading but that of the step, which all runs share."""
    zero: Any = 0
    fields = {
        f.name: zero for f in dataclasses.fields(LanczosState) if f.name not in ("step", "reorthogonalize", "blocks")
    }
    for name in ("basis", "forms"):
        fields[name] = None if getattr(state, name) is None else 0
    static = {"reorthogonalize": state.reorthogonalize, "blocks": state.blocks}
    return LanczosState(step=None, **static, **fields)  # type: ignore[arg-type]


def cached_program(build: Callable[[LanczosState], Any]) -> Callable[[LanczosState], Any]:
    """`build(state)`, once for all states of the same structure and shardings."""
    programs: dict[Any, Any] = {}

    @functools.wraps(build)
    def program(state: LanczosState) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        key = (treedef, tuple(leaf.sharding for leaf in leaves))
        if key not in programs:
            programs[key] = build(state)
        return programs[key]

    return program


def _arrays(probe: Vector, dtype: str | None) -> Vector:
    """The probe as arrays in this dtype (None: its own); raises where it is not of floating point."""
    for path, leaf in jax.tree.flatten_with_path(probe)[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name, found = jax.tree_util.keystr(path), jnp.result_type(leaf)
            raise InputError(f"The probe's leaf {name} has dtype {found}; Lanczos vectors are floating point.")
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), probe)


def _placement(leaf: Any) -> Any:
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@functools.cache
def _starter(treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    abstract: LanczosState = jax.tree.unflatten(treedef, leaves)

    def create(probes: list[Vector]) -> LanczosState:
        empty: LanczosState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        lengths = [inner.norm(abstract.blocks, probe, abstract.alphas.dtype) for probe in probes]
        units = [inner.scale(abstract.blocks, 1 / x, probe) for x, probe in zip(lengths, probes, strict=True)]
        return dataclasses.replace(empty, current=jax.tree.map(lambda *xs: jnp.stack(xs), *units))

    # Explicit even on one device: arrays that are not committed to theirs would compile the segment twice.
    return jax.jit(create, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))


@cached_program
def _first_row(state: LanczosState) -> Any:
    def first(basis: Vector, current: Vector) -> Vector:
        return over_runs(lambda b, q: write_row(b, jnp.int32(0), q), len(jax.tree.leaves(current)[0]))(basis, current)

    return jax.jit(first, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, state.basis))
