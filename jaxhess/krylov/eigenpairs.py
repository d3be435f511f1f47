"""Leading eigenpairs of an operator, with residuals that are measured."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import eigh_tridiagonal

from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.orbax import reading
from jaxhess.files.output import Output, writing
from jaxhess.files.run_folder import read_arrays
from jaxhess.krylov.ghosts import classify, unflagged
from jaxhess.krylov.lanczos import lanczos_segment, lanczos_vectors
from jaxhess.krylov.products import everywhere
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.krylov.state import LanczosState, extended, start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.krylov.warm_start import complete, seen_from, starting_vector
from jaxhess.operators.base import LinearOperator, Pairs, compiled_mv
from jaxhess.operators.facts import non_finite, validated
from jaxhess.operators.forms import num_microbatches, product_and_forms
from jaxhess.operators.precision import unit_roundoff
from jaxhess.operators.restriction import leaf_name
from jaxhess.vectors import Vector, add_scaled, dot, norm, random_key, random_probe, scale

Which = Literal["magnitude", "largest", "smallest"]

VECTORS, SCALARS = "vectors", "eigenpairs.npz"

SIGNS = {"magnitude": (1, -1), "largest": (1,), "smallest": (-1,)}
"""Of the eigenvalues that are looked for."""

FLOAT32 = 1e-6
"""Products of less unit roundoff than this are in float32 or better."""

CHECK_EVERY = 5
"""Steps between two looks at what has converged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues with eigenvectors and how good they are; the leading one first.

    Examples:
        >>> import jax.numpy as jnp, jaxhess, tempfile
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
        >>> pairs = jaxhess.leading_eigenpairs(A, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pairs.save(folder)
        ...     jaxhess.Eigenpairs.load(folder).values.round(3)
        array([4., 2.])

    Attributes:
        values: [k] float64, Ritz values.
        vectors: Unit eigenvectors, a pytree like the operator's vectors with a leading axis [k, ...].
        residuals: [k] |H y - value y|, each by one more product: an eigenvalue of a symmetric H lies within it. After a
            warm start with products in float32 or better and all Lanczos vectors kept in 32 bits or more, from the
            run's own products.
        converged: [k] bool, whether the residual is within the tolerance, relative to the largest |Ritz value|.
        steps: Lanczos steps taken.
        products: With the operator, in all; 0 where that is not known.
        seen_from: After a warm start, the magnitude from which on the run would have seen every other eigenvalue, but
            for those within 5% of one that was found, each with probability 95%; NaN after any other run.
        microbatch_forms: [k, microbatches, 4], of every eigenvector y what single microbatches contribute to its
            product: y'S_b y, 0, |S_b y|^2 and c_b (`jaxhess.operators.forms`), for `eigenvalue_errors`. Empty where
            the operator does not tell microbatches apart, or no product was made with the vectors themselves.
        which: Were asked for.
    """

    values: np.ndarray
    vectors: Vector
    residuals: np.ndarray
    converged: np.ndarray
    steps: int
    products: int = 0
    seen_from: float = math.nan
    microbatch_forms: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    which: Which = "magnitude"

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Writes the vectors as an Orbax checkpoint, sharded as they are, with `eigenpairs.npz` beside it.

        Each of several processes writes its own parts of the vectors, and none holds a whole one. On other devices they
        are read with shardings, or as whole arrays by `orbax.checkpoint.RestoreArgs(restore_type=numpy.ndarray)`.

        Raises:
            InputError: There are eigenpairs in the folder and `overwrite` is False, or files of these names that
                the library did not write.
        """
        import orbax.checkpoint as ocp

        folder = Path(folder).absolute()
        output = Output(folder, (VECTORS, SCALARS), overwrite)

        def begin() -> None:
            output.claim()
            output.begin(VECTORS)

        def end() -> None:
            output.end(VECTORS)
            scalars = io.BytesIO()
            np.savez(scalars, values=self.values, residuals=self.residuals, converged=self.converged)
            output.write({SCALARS: scalars.getvalue()})

        named = {leaf_name(path): x for path, x in jax.tree.flatten_with_path(self.vectors)[0]}
        try:
            processes.on_first(begin)
            with writing(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(folder / VECTORS, args=ocp.args.PyTreeSave(named))
            processes.on_first(end)
        finally:
            output.release()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Eigenpairs:
        """What `save` wrote, vectors as nested dictionaries of arrays on the host; how it was found is not kept.

        Raises:
            InputError: There are no eigenpairs in the folder, or they are damaged.
        """
        import orbax.checkpoint as ocp

        folder = Path(folder).absolute()
        if not (folder / SCALARS).is_file() or not (folder / VECTORS).is_dir():
            raise InputError(f"{folder} holds no eigenpairs: {SCALARS} and the folder {VECTORS}.")
        with reading(folder / VECTORS), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(folder / VECTORS).item_metadata.tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            named = checkpointer.restore(folder / VECTORS, args=ocp.args.PyTreeRestore(restore_args=on_host))
        vectors: dict[str, Any] = {}
        for name, x in named.items():
            *path, last = name.split("/")
            functools.reduce(lambda place, key: place.setdefault(key, {}), path, vectors)[last] = x
        with reading(folder / SCALARS):
            found = read_arrays(folder / SCALARS)
            return cls(found["values"], vectors, found["residuals"], found["converged"], 0)


def leading_eigenpairs(
    operator: LinearOperator,
    count: int,
    *,
    which: Which = "magnitude",
    tolerance: float = 1e-3,
    steps: int = 100,
    seed: int = 0,
    storage: Storage = Storage(),
    state: LanczosState | None = None,
    previous: Pairs | None = None,
    callback: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> Eigenpairs:
    """The leading eigenpairs by Lanczos (Paige 1971; Parlett 1998, chapter 13), stopped when they have converged.

    With re-orthogonalisation "full" eigenvectors are combinations of the stored basis. With "none" or a
    window nothing is stored: a second pass repeats the same steps, in the same bits (on GPUs that needs
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true`), and adds up the vectors as they come by; it doubles the products, and
    holds `count` vectors instead of one for each step. Ghosts are left out, and values that their residual bounds do
    not tell apart.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> pairs = jaxhess.leading_eigenpairs(A, 1)
        >>> pairs.values.round(3), abs(pairs.vectors).round(3), pairs.converged
        (array([3.]), Array([[0.707, 0.707]], dtype=float32), array([ True]))

    Args:
        operator: Symmetric.
        count: How many.
        which: Largest magnitude, largest, or smallest (most negative).
        tolerance: Converged is a residual of at most this times the largest |Ritz value|. Steps end when the residual
            bounds of T say so; `converged` then rests on the residuals themselves.
        steps: The most to take. Pairs that have not converged by then are returned too, and `converged` says so.
        seed: Of the starting vector, other than those of `spectrum`. A vector finds one direction of each eigenspace:
            of a multiple eigenvalue one eigenvector.
        storage: What is kept of the Lanczos vectors, and how.
        state: Runs with this operator and "full" re-orthogonalisation, such as `Progress.state` of a spectrum's last
            segment. Its first run takes the place of a new one, and goes on if its steps do not suffice; then `seed`
            and `storage` do not matter. The state is used up: its buffers are freed.
        previous: Eigenpairs of an operator that was nearly this one, as at the checkpoint before: a warm start. The run
            begins at the sum of their vectors and a random one of four times its length, and goes on until it would
            also have seen any new eigenvalue above the smallest that it has found (`Eigenpairs.seen_from`). It looks
            for the end at every step, and with products in float32 or better and all vectors kept in 32 bits or more,
            it takes the residuals from its own products: H y = sum_j s_j H q_j. Give every run another seed, so that
            none has the blind spots of the one before.
        callback: Called on the host with the step, the wanted Ritz values so far, and their residual bounds.

    Returns:
        Fewer than `count` pairs where the Krylov space ends before (after so many steps as there are distinct
        eigenvalues), or where without full re-orthogonalisation not so many could be told apart.

    Raises:
        InputError: `count` is below 1 or above the dimension or `steps`; an option is out of range; the state keeps no
            basis of all vectors, or comes with previous pairs; these are not like the operator's vectors; a product is
            not finite.
    """
    _check(operator, count, which, tolerance, steps)
    storage.check_available()
    key = jax.random.fold_in(random_key(seed), 0xE16E)
    validated(operator)
    if state is not None and previous is not None:
        raise InputError("A run goes on from a state or starts from previous eigenpairs, not both.")
    every = CHECK_EVERY if previous is None else 1
    if state is None:
        probe = _start(operator, previous, key)
        keeps_all = storage.reorthogonalize == "full"
        state = start_lanczos([probe], steps, storage)
        if keeps_all:
            del probe
    elif state.reorthogonalize == "full":
        keeps_all = True
    else:
        raise InputError(f"Re-orthogonalisation {state.reorthogonalize!r} does not keep all Lanczos vectors.")
    rounding = unit_roundoff(operator, state.current)
    # Vectors that are summed from rows in 16 bits are not those that the bounds are of.
    # Nor does T tell the noise of products in narrow arithmetic: the residuals would be those of another matrix.
    own_products = previous is not None and keeps_all and not _in_16_bits(state.basis) and rounding < FLOAT32
    begun = int(state.step)
    looked_at, done, ended, seen = 0, begun, False, math.nan
    while not ended:
        if looked_at == done:  # not so in the beginning, for a state that has taken steps
            if state.runs > 1 or state.alphas.shape[1] < steps:
                state = extended(state, max(steps, done))
            done = min(done + every, steps)
            state = lanczos_segment(operator, state, done)
        looked_at = done
        alphas, betas, errors = state.tridiagonal()
        size = len(alphas)
        if not np.isfinite(alphas + betas).all():
            raise non_finite(f"A product within {size} steps", operator, jax.tree.map(lambda x: x[0], state.previous))
        nodes = quadrature(alphas, betas, errors)
        chosen = _chosen(nodes, count, which, None if keeps_all else rounding)
        bounds = nodes.residual_bounds[chosen]
        converged = bounds <= tolerance * np.abs(nodes.ritz_values).max()
        if callback is not None:
            callback(size, nodes.ritz_values[chosen], bounds)
        ended = bool(state.broken[0]) or done >= steps or (len(chosen) == count and bool(converged.all()))
        if previous is not None:
            seen = seen_from(alphas, betas, operator.dim, nodes.ritz_values[chosen], SIGNS[which])
            ended = ended and (complete(seen, nodes.ritz_values[chosen]) or bool(state.broken[0]) or done >= steps)
        ended = processes.agreed(ended)  # each machine's LAPACK rounds in its own way
    limit = tolerance * float(np.abs(nodes.ritz_values).max())
    found = (nodes.ritz_values[chosen].tolist(), limit, _coefficients(alphas, betas, chosen).tolist(), bounds.tolist())
    agreed = processes.agreed(found)
    values, limit, coefficients, bounds = np.asarray(agreed[0]), agreed[1], np.asarray(agreed[2]), np.asarray(agreed[3])
    coefficients = coefficients.reshape(-1, size)
    if keeps_all:
        padded = np.zeros((len(values), state.alphas.shape[1]))
        padded[:, :size] = coefficients
        vectors = lanczos_vectors(state, padded)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    else:
        del state
        vectors = _second_pass(operator, start_lanczos([probe], steps, storage), coefficients)
    products = done - begun if keeps_all else done + size - 1
    forms = np.zeros(0)
    if own_products:
        vectors, lengths = _unit(vectors)
        residuals = bounds / np.asarray(lengths, np.float64)
    else:
        vectors, residuals, forms = _measured(operator, vectors, values)
        products += len(values)
    seen = processes.agreed(seen)
    return Eigenpairs(values, vectors, residuals, residuals <= limit, size, products, seen, forms, which)


def _in_16_bits(vectors: Vector) -> bool:
    return any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(vectors))


def _start(operator: LinearOperator, previous: Pairs | None, key: jax.Array) -> Vector:
    if previous is None:
        return random_probe(key, operator.shape_dtype)
    return starting_vector(operator, previous, key)


def _check(operator: LinearOperator, count: int, which: str, tolerance: float, steps: int) -> None:
    if not 1 <= count <= min(operator.dim, steps):
        raise InputError(
            f"{count} eigenpairs are asked for; it must be from 1 to {min(operator.dim, steps)}, the smaller of the "
            f"dimension {operator.dim:,} and the {steps} steps."
        )
    if which not in ("magnitude", "largest", "smallest"):
        raise InputError(f"which is {which!r}; it is 'magnitude', 'largest' or 'smallest'.")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance is {tolerance}; it must be between 0 and 1.")


def _chosen(nodes: Quadrature, count: int, which: Which, rounding: float | None) -> np.ndarray:
    """Indices of the wanted Ritz values, the leading one first; no ghosts (`rounding` None: there can be none).

    Nor a ghost on its way: of values nearer to each other than their residual bounds the one of smaller bound stays.
    """
    theta, _, bounds, _ = nodes
    genuine = np.flatnonzero(~(unflagged(nodes) if rounding is None else classify(nodes, rounding)).flags)
    if rounding is not None:
        apart: list[int] = []
        for i in genuine[np.argsort(bounds[genuine], kind="stable")]:
            if all(abs(theta[i] - theta[a]) > bounds[i] + bounds[a] for a in apart):
                apart.append(int(i))
        genuine = np.sort(apart)
    values = theta[genuine]
    order = np.argsort({"magnitude": -np.abs(values), "largest": -values, "smallest": values}[which], kind="stable")
    return genuine[order[:count]]


def _coefficients(alphas: np.ndarray, betas: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[k, steps] eigenvectors of T in the basis of the Lanczos vectors."""
    if len(alphas) == 1:
        return np.ones((1, 1))
    _, vectors = eigh_tridiagonal(alphas, betas[:-1], lapack_driver="stev")
    return vectors[:, chosen].T


def _second_pass(operator: LinearOperator, state: LanczosState, coefficients: np.ndarray) -> Vector:
    """Combinations [k, ...] of the Lanczos vectors with coefficients [k, steps], while the steps are taken again."""
    count, size = coefficients.shape
    leaves, treedef = jax.tree.flatten(state.current)
    zeros, add = _accumulator(treedef, tuple((x.shape, x.dtype, x.sharding) for x in leaves), count)
    sums = zeros()
    for j in range(size):
        sums = add(sums, jnp.asarray(coefficients[:, j]), state.current)
        if j + 1 < size:
            state = lanczos_segment(operator, state, j + 1)
    return sums


@functools.cache
def _accumulator(treedef: Any, arrays: tuple, count: int) -> tuple[Any, Any]:
    shardings = jax.tree.unflatten(treedef, [sharding for _, _, sharding in arrays])

    def zeros() -> Vector:
        wide = [jnp.zeros((count, *shape[1:]), jnp.promote_types(dtype, jnp.float32)) for shape, dtype, _ in arrays]
        return jax.tree.unflatten(treedef, wide)

    def add(sums: Vector, coefficients: jax.Array, q: Vector) -> Vector:
        def leaf(s: jax.Array, x: jax.Array) -> jax.Array:
            return s + coefficients.astype(s.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x.astype(s.dtype)

        return jax.tree.map(leaf, sums, q)

    return jax.jit(zeros, out_shardings=shardings), jax.jit(add, donate_argnums=0, out_shardings=shardings)


def _measured(operator: LinearOperator, vectors: Vector, values: np.ndarray) -> tuple[Vector, np.ndarray, np.ndarray]:
    """The vectors at length one, the norms of their residuals, and the microbatches' forms; by one product each."""
    residuals, forms = np.zeros(len(values)), []
    for k, value in enumerate(values):
        y = _taken(vectors, jnp.int32(k))
        if num_microbatches(operator) > 1:
            product, found = _with_forms(operator, y)
            forms.append(np.asarray(found, np.float64))
        else:
            product = compiled_mv(operator, y)
        residuals[k] = float(_residual(product, jnp.asarray(value), y))
        vectors = _replaced(vectors, jnp.int32(k), y)
    return vectors, residuals, np.array(forms)


@jax.jit
def _with_forms(operator: LinearOperator, y: Vector) -> tuple[Vector, jax.Array]:
    product, forms = product_and_forms(operator, y)
    return product, everywhere(operator, forms)


@functools.partial(jax.jit, donate_argnums=0)
def _unit(vectors: Vector) -> tuple[Vector, jax.Array]:
    """The stacked vectors, each at length one, and their lengths before: one but for rounding."""
    lengths = jnp.sqrt(jax.vmap(dot)(vectors, vectors))
    return jax.tree.map(lambda x: x / lengths.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)), vectors), lengths


@jax.jit
def _taken(vectors: Vector, k: jax.Array) -> Vector:
    y = jax.tree.map(lambda x: x[k], vectors)
    return scale(1 / norm(y), y)


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(vectors: Vector, k: jax.Array, y: Vector) -> Vector:
    return jax.tree.map(lambda x, row: x.at[k].set(row.astype(x.dtype)), vectors, y)


@jax.jit
def _residual(product: Vector, value: jax.Array, y: Vector) -> jax.Array:
    return norm(add_scaled(product, -value, y))
