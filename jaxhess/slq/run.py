"""Stochastic Lanczos quadrature: the spectrum of an operator from a few random probes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxhess.data.sampling import Sampling
from jaxhess.distributed.memory import bytes_per_device, devices_of, host_bytes, total_bytes
from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready
from jaxhess.krylov.state import LanczosState, abstract_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import checksum, describe, validated
from jaxhess.operators.forms import num_microbatches
from jaxhess.operators.precision import unit_roundoff
from jaxhess.slq.checkpoint import Checkpoint, Saver, termination
from jaxhess.slq.lanczos_runs import LanczosRuns, Progress
from jaxhess.slq.record import Lanczos, OperatorRecord, Probes, RunRecord, inputs_record, operator_record
from jaxhess.slq.spectrum import Spectrum
from jaxhess.vectors import Distribution, Vector, random_key, random_probe


def spectrum(
    operator: LinearOperator,
    *,
    steps: int = 40,
    probes: int = 4,
    seed: int = 0,
    storage: Storage = Storage(),
    batch_size: int | None = None,
    distribution: Distribution = "normal",
    checkpoint: Checkpoint | None = None,
    callback: Callable[[Progress], None] | None = None,
    sampling: Sampling | None = None,
    info: dict[str, Any] | None = None,
) -> Spectrum:
    """The spectral distribution of `operator` by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, section 3).

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 101.0)))
        >>> result = jaxhess.spectrum(A, steps=30, probes=4)
        >>> low, high = result.trace().interval(0.999)
        >>> round(result.extreme().largest.value, 1), low < 5050 < high
        (100.0, True)

    Args:
        operator: Symmetric; `Hessian(loss, params, batches)` or any other.
        steps: Lanczos steps per probe, so products per probe; the quadrature is exact for polynomials of degree
            2 steps - 1.
        probes: Independent random probes; two or more give standard errors across them.
        seed: Of the probes. The same seed gives the same probes bit for bit on any mesh.
        storage: What is kept of the Lanczos vectors, and how.
        batch_size: The most probes that advance together, sharing primal passes and weight gathers; batches are of
            equal size. None: as many as fit into what memory is left; one where the operator has nothing to share. A
            resumed run keeps its own size with None; with another one, the probes under way still stay together.
        distribution: Of the probes' entries.
        checkpoint: Where the unfinished run is saved, and whether to resume it.
        callback: Called on the host after each compiled segment.
        sampling: How the sequences were chosen, for errors over the data; None: at random, from a text without end.
            These errors need an operator of two microbatches or more, and cost three inner products for each.
        info: Anything to keep with the result; no number depends on it.

    Raises:
        InputError: An option is out of range or not known; the checkpoint is of another run, or of an unfinished one
            and `resume` is False; the loss or a product is not finite (says which microbatch, probe and step).
        Interrupted: SIGTERM came; the state is saved (only with `checkpoint`).
    """
    cut = num_microbatches(operator)
    if sampling is not None and sampling.clusters is not None and cut and len(sampling.clusters) != cut:
        raise InputError(
            f"The sampling has clusters for {len(sampling.clusters)} microbatches; the operator has {cut}."
        )
    options = RunOptions(steps, probes, seed, storage, batch_size, distribution, checkpoint, callback)
    run, record = run_lanczos(operator, options)
    return Spectrum(
        alphas=run.alphas,
        betas=run.betas,
        step_errors=run.step_errors,
        sizes=run.sizes,
        dim=operator.dim,
        run=dataclasses.replace(record, sampling=sampling),
        microbatch_forms=run.forms,
        info=info or {},
    )


class RunOptions(NamedTuple):
    """The options of `spectrum` that say how Lanczos runs."""

    steps: int
    probes: int
    seed: int
    storage: Storage
    batch_size: int | None
    distribution: Distribution
    checkpoint: Checkpoint | None
    callback: Callable[[Progress], None] | None


def run_lanczos(
    operator: LinearOperator, options: RunOptions, blocks: Blocks | None = None
) -> tuple[LanczosRuns, RunRecord]:
    """The coefficients of all probes, and how they were made; with `blocks`, of every block of every probe.

    Raises:
        InputError, Interrupted: See `spectrum`.
    """
    steps, probes, seed, storage, batch_size, distribution, checkpoint, callback = options
    if probes < 1:
        raise InputError(f"probes is {probes}; at least 1 is needed.")
    key = random_key(seed)
    if batch_size is not None and (batch_size < 1 or (storage.basis_memory == "host" and batch_size > 1)):
        raise InputError(f"batch_size is {batch_size}; it must be at least 1, and 1 for a basis in the host's memory.")
    check_basis_fits(operator, steps, storage)
    if checkpoint is not None:
        checkpoint.check()
    kept = abstract_lanczos(operator.shape_dtype, steps, storage, blocks=blocks)
    record = RunRecord(
        Probes(probes, distribution, seed),
        Lanczos(steps, _resolved(storage, kept)),
        _operator_record(describe(operator)),
        inputs_record(validated(operator)),
        unit_roundoff(operator, kept.current),
    )
    saver = None
    if checkpoint is not None:
        inputs = dataclasses.replace(record.inputs, parameters=checksum(operator))
        record = dataclasses.replace(record, inputs=inputs)
        saver = Saver(checkpoint, dataclasses.asdict(record))

    def draw(p: int) -> Vector:
        return random_probe(jax.random.fold_in(key, p), operator.shape_dtype, distribution)

    run = LanczosRuns(operator, steps, probes, draw, storage, callback, blocks)
    if saver is None:
        run.advance(batch_size)
    else:
        with contextlib.closing(saver), termination() as asked_to_stop:
            run.advance(batch_size, saver, asked_to_stop.is_set)
    lanczos = dataclasses.replace(
        record.lanczos, batch_size=run.batch_size, orthogonality=tuple(run.orthogonality.tolist())
    )
    return run, dataclasses.replace(record, lanczos=lanczos, program=run.program, seconds=run.seconds)


def check_basis_fits(operator: LinearOperator, steps: int, storage: Storage = Storage()) -> None:
    """Raises InputError when the basis cannot fit the memory that it is to be in, before any of it is made."""
    state = abstract_lanczos(operator.shape_dtype, steps, storage)
    if state.basis is None:
        return
    leaves = jax.tree.leaves(state.basis)
    devices = devices_of(leaves)
    needed = bytes_per_device(leaves) * len(devices)
    on_host, kept = storage.basis_memory == "host", storage.reorthogonalize
    present = host_bytes() if on_host else total_bytes(devices) * len(devices)
    if needed > present:
        rows = leaves[0].shape[0] - on_host
        name = "A window" if isinstance(kept, int) else f"{kept.capitalize()} re-orthogonalisation"
        place = "the host has" if on_host else "the devices here have"
        raise InputError(
            f"{name} keeps {rows} vectors, {needed / 1e9:.1f} GB, and {place} {present / 1e9:.1f} GB in all: take "
            "fewer steps, a narrower basis dtype, basis_memory='host', a window, or reorthogonalize='none'."
        )


def _resolved(storage: Storage, kept: LanczosState) -> Storage:
    """With the dtypes that a state has; that of vectors is None where leaves have several."""
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(kept.current)}
    vector_dtype: Any = dtypes.pop() if len(dtypes) == 1 else None
    scalar_dtype: Any = str(kept.alphas.dtype)
    return dataclasses.replace(storage, vector_dtype=vector_dtype, scalar_dtype=scalar_dtype)


def _operator_record(description: dict[str, Any]) -> OperatorRecord:
    """The record; a user's operator may have fields of the same names and other types, which are then details."""
    try:
        return operator_record(description)
    except InputError:
        details = {name: json_ready(value) for name, value in description.items() if name != "kind"}
        return OperatorRecord(str(description["kind"]), details=details)
