"""A Lanczos run as a state that can be saved: what it stores, and how it starts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxhess.errors import InputError
from jaxhess.krylov.basis import BasisMemory, on_memory, stacked_sharding, write_row, zeros
from jaxhess.vectors import Vector, check_accumulation_dtype, check_vector_dtype, named_sharding, norm, scale

Reorthogonalize = Literal["none", "full"] | int
"""Against what every new vector is orthogonalised, beyond the last two:

- "none": nothing.
- an integer r of at least 2: the last r vectors, the window of arXiv 2602.00816; those two are among them.
- "full": all vectors.
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
        raise InputError("A basis in the host's memory is that of one run: start_lanczos, one probe after the other.")
    options = (steps, reorthogonalize, accumulation_dtype, basis_dtype, basis_memory)
    checked = [_checked(probe, *options) for probe in probes]
    if not checked:
        raise InputError("start_batch needs at least one probe.")
    abstract = abstract_lanczos(checked[0], *options, runs=len(checked))
    stacked = [_stack(checked)]
    del checked
    return _started(stacked.pop(), abstract)


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
        raise InputError(f"steps is {steps}; a Lanczos run takes at least 1.")
    known = reorthogonalize in ("none", "full")
    if isinstance(reorthogonalize, bool) or not (known or (isinstance(reorthogonalize, int) and reorthogonalize >= 2)):
        raise InputError(
            f"Unknown re-orthogonalisation {reorthogonalize!r}; it is 'none', 'full' or a window, the number of last "
            "vectors, at least 2."
        )
    if basis_memory not in ("device", "host"):
        raise InputError(f"basis_memory is {basis_memory!r}; it is 'device' or 'host'.")
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
            raise InputError(f"The probe's leaf {name} has dtype {dtype}; Lanczos vectors are floating point.")
    return jax.tree.map(jnp.asarray, probe)


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
