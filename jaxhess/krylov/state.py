"""A Lanczos run as a state that can be saved: what it stores, and how it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.krylov.basis import on_memory, stacked_sharding, write_row, zeros
from jaxhess.krylov.storage import Reorthogonalize, Storage
from jaxhess.vectors import Vector, named_sharding, norm, scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanczosState:
    """A Lanczos run after `step` products; `m` is the most it has room for.

    Several runs that advance together (see `start_batch`) are one state: every field but `step` then has a leading
    axis over runs.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> state = jaxhess.lanczos_segment(A, jaxhess.start_lanczos(jnp.array([1.0, 0.0]), steps=2), end=2)
        >>> state.alphas.round(3), state.betas.round(3)  # T is A, and the second step ends the Krylov space
        (Array([2., 2.], dtype=float32), Array([1., 0.], dtype=float32))
        >>> int(state.size), bool(state.broken)
        (2, True)

    Attributes:
        step: int32 scalar, products done.
        size: int32 scalar, rows of T that are valid; smaller than `step` only after a breakdown.
        broken: bool scalar, whether the Krylov space was exhausted.
        alphas: [m] diagonal of T, in the scalar dtype (float32 or wider).
        betas: [m]; betas[j] is the norm left after step j: the off-diagonal, and the last one bounds the residuals.
        previous, current: Vectors q_{j-1} and q_j, in the storage dtype.
        step_errors: [m] upper bounds of |f_j|, what step j left out of A Q = Q T + beta_m q_{m+1} e_m' + F, f_j the
            columns of F. They are measured: what re-orthogonalisation took away, and the rounding of q_{j+1} where
            vectors are stored narrower than they are computed. The rounding of the products is not in them.
        basis: Lanczos vectors stacked along a leading axis, zero where not yet computed: all m of them ("full"), or the
            last r in a ring where q_j has row j mod r. None for "none".
        reorthogonalize: As in `Storage`. Static.
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


def start_lanczos(probe: Vector, steps: int, storage: Storage = Storage()) -> LanczosState:
    """The state before the first step, from any nonzero probe; vectors are stored in its shardings.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> state = jaxhess.start_lanczos(jnp.array([1.0, 0.0]), steps=2)
        >>> int(state.step), state.alphas.shape, state.current
        (0, (2,), Array([1., 0.], dtype=float32))

    Args:
        probe: Where the Krylov space starts; of floating point.
        steps: What the state has room for.
        storage: What is kept, and how.

    Raises:
        InputError: `steps` is below 1; the probe is not of floating point; a dtype needs JAX in 64-bit mode.
    """
    storage.check_available()
    probe = _arrays(probe, storage.vector_dtype)
    return _started(probe, abstract_lanczos(probe, steps, storage))


def start_batch(probes: Iterable[Vector], steps: int, storage: Storage = Storage()) -> LanczosState:
    """The state of several runs that advance together: their products share the primal pass and weight gathers.

    Args:
        probes: A probe for each run, let go of when they are stacked; the others are those of `start_lanczos`.

    Raises:
        InputError: No probe; a basis in the host's memory; or as `start_lanczos`.
    """
    if storage.basis_memory == "host":
        raise InputError("A basis in the host's memory is that of one run: start_lanczos, one probe after the other.")
    storage.check_available()
    drawn = [_arrays(probe, storage.vector_dtype) for probe in probes]
    if not drawn:
        raise InputError("start_batch needs at least one probe.")
    abstract = abstract_lanczos(drawn[0], steps, storage, runs=len(drawn))
    stacked = [_stack(drawn)]
    del drawn
    return _started(stacked.pop(), abstract)


def abstract_lanczos(like: Vector, steps: int, storage: Storage = Storage(), runs: int | None = None) -> LanczosState:
    """A state as `jax.ShapeDtypeStruct`s with shardings, for vectors like these: of one run, or of `runs` together.

    Raises:
        InputError: `steps` is below 1; a dtype needs JAX in 64-bit mode.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; a Lanczos run takes at least 1.")
    storage.check_available()
    axis = 0 if runs is None else 1
    batch = () if runs is None else (runs,)
    leaves, treedef = jax.tree.flatten(like)
    dtypes = [jnp.dtype(storage.vector_dtype or x.dtype) for x in leaves]
    shardings = [stacked_sharding(s) if axis else s for s in (named_sharding(x) or _placement(x) for x in leaves)]
    rowed = [stacked_sharding(s, axis) for s in shardings]
    first = shardings[0]
    scalar = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first
    wide = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(storage.scalar_dtype))

    def scalars(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=scalar)

    def vectors(rows: tuple[int, ...], dtype: Any = None, on_host: bool = False) -> Vector:
        structs = [
            jax.ShapeDtypeStruct((*batch, *rows, *x.shape), jnp.dtype(dtype or own), sharding=on_memory(s, on_host))
            for x, own, s in zip(leaves, dtypes, shardings if not rows else rowed, strict=True)
        ]
        return jax.tree.unflatten(treedef, structs)

    vector = vectors(())
    basis = None
    if storage.reorthogonalize != "none":
        rows = steps if storage.reorthogonalize == "full" else storage.reorthogonalize
        on_host = storage.basis_memory == "host"
        basis = vectors((rows + on_host,), storage.basis_dtype, on_host)
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
        reorthogonalize=storage.reorthogonalize,
    )


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


def cached_program(build: Any) -> Any:
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


@cached_program
def _first_row(state: LanczosState) -> Any:
    def write(basis: Vector, current: Vector) -> Vector:
        return write_row(basis, jnp.int32(0), current)

    out = jax.tree.map(lambda x: x.sharding, state.basis)
    program = jax.jit(jax.vmap(write) if state.is_batch else write, donate_argnums=0, out_shardings=out)
    return lambda state: dataclasses.replace(state, basis=program(state.basis, state.current))
