"""Stochastic Lanczos quadrature: the spectrum of an operator from a few random probes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhess.distributed import processes
from jaxhess.distributed.memory import bytes_per_device, devices_of, host_bytes, most_that_fit, total_bytes
from jaxhess.errors import InputError
from jaxhess.files.run_folder import json_ready
from jaxhess.files.typed import read_as
from jaxhess.krylov.lanczos import compile_segment, lanczos_segment, orthogonality_loss
from jaxhess.krylov.state import LanczosState, abstract_lanczos, start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import MEASURED, checksum, describe, non_finite, shares_work, validated
from jaxhess.operators.precision import unit_roundoff
from jaxhess.slq.checkpoint import Checkpoint, Interrupted, Saver, termination
from jaxhess.slq.record import (
    CompiledRecord,
    Lanczos,
    OperatorRecord,
    Probes,
    ProgramMemory,
    RunRecord,
    inputs_record,
    operator_record,
)
from jaxhess.slq.spectrum import Spectrum
from jaxhess.vectors import Distribution, Vector, random_key, random_probe

COEFFICIENTS = ("alphas", "betas", "step_errors")
SEGMENT_SECONDS = 1.0
"""Length of a compiled segment, roughly: how long the host waits between two looks at the run."""


class Progress(NamedTuple):
    """What a run has done so far.

    Examples:
        >>> import jax.numpy as jnp, jaxhess
        >>> A = jaxhess.MatrixOperator(jnp.diag(jnp.arange(1.0, 11.0)))
        >>> seen = []
        >>> result = jaxhess.spectrum(A, steps=3, probes=2, callback=seen.append)
        >>> seen[-1].step, seen[-1].together, seen[-1].probes
        (3, 2, 2)

    Attributes:
        probe: The first of the probes that advance together now, counted from 0.
        together: How many these are.
        probes: Of the whole run.
        step, steps: Of these probes: done, and asked for.
        alphas, betas: Of each of them, [size] each; of `block_spectra` those of each one's blocks, one after the other.
        seconds: Since the run started, or was resumed.
        state: Of the Lanczos runs. Its buffers are given to the next segment: only that after the last step of the last
            probes may be kept, for `leading_eigenpairs`. While it is, its memory is.
    """

    probe: int
    together: int
    probes: int
    step: int
    steps: int
    alphas: list[np.ndarray]
    betas: list[np.ndarray]
    seconds: float
    state: LanczosState


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
        info: Anything to keep with the result; no number depends on it.

    Raises:
        InputError: An option is out of range or not known; the checkpoint is of another run, or of an unfinished one
            and `resume` is False; the loss or a product is not finite (says which microbatch, probe and step).
        Interrupted: SIGTERM came; the state is saved (only with `checkpoint`).
    """
    options = RunOptions(steps, probes, seed, storage, batch_size, distribution, checkpoint, callback)
    run, record = run_lanczos(operator, options)
    return Spectrum(
        alphas=run.alphas,
        betas=run.betas,
        step_errors=run.step_errors,
        sizes=run.sizes,
        dim=operator.dim,
        run=record,
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
        saver = Saver(checkpoint, mesh_independent(json_ready(dataclasses.asdict(record))))

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


@dataclasses.dataclass
class LanczosRuns:
    """The probes of one call of `spectrum`, a batch of them after the other.

    With blocks every probe is a run in each of them, and a row of the coefficients is a run: those of the first probe's
    blocks come first.
    """

    operator: LinearOperator
    steps: int
    probes: int
    draw: Callable[[int], Vector]
    storage: Storage
    callback: Callable[[Progress], None] | None
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        self.width = 1 if self.blocks is None else len(self.blocks)
        rows = self.probes * self.width
        self.alphas, self.betas, self.step_errors = (np.full((rows, self.steps), np.nan) for _ in range(3))
        self.sizes = np.zeros(rows, np.int64)
        self.orthogonality = np.full(rows, np.nan)
        self.seconds = 0.0
        self.batch_size = 0
        self.program: CompiledRecord | None = None
        self.compile_seconds = 0.0

    def template(self, runs: int = 1) -> LanczosState:
        """The abstract state of so many probes together."""
        return abstract_lanczos(self.operator.shape_dtype, self.steps, self.storage, runs, self.blocks)

    def advance(
        self, batch_size: int | None, saver: Saver | None = None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """All probes to their end, from where the last save left them."""
        first, begun = 0, None
        if saver is not None and (record := saver.latest()) is not None:
            first = self._resume_from(record)
            if record["step"] > 0:  # these probes advance together to their end
                begun = saver.restore(self.template(record["runs"]))
        began = time.perf_counter() - self.seconds
        if self.batch_size == 0 or batch_size is not None:
            self.batch_size = self._evenly(batch_size) if batch_size else self._choose_batch_size()
        while first < self.probes:
            if begun is None:
                begun = self._start(first)
            if self.program is None:
                self.program = self._described(begun)
            together = min(begun.runs, self.probes - first)
            chosen = slice(first * self.width, (first + together) * self.width)
            segments = self._segments(begun, saver.every if saver else None)
            begun = None  # the next batch begins when the memory of this one is free
            for state in segments:
                step = int(state.step)
                ended = step == self.steps
                self._read(state, chosen)
                if ended:
                    self.orthogonality[chosen] = orthogonality_loss(state)[:together].ravel()
                self.seconds = time.perf_counter() - began
                if self.callback is not None:
                    self.callback(self._progress(state, chosen))
                due = saver is not None and (step % saver.every == 0 or ended)
                asked = saver is not None and processes.any_says(stop())
                if saver is not None and (due or asked):
                    self._save(saver, first + together if ended else first, None if ended else state, must=asked)
                    if asked:
                        raise Interrupted(
                            f"stopped by SIGTERM after step {step} of probe {first + 1}; what was done is saved"
                        )
            del state, segments
            first += together

    def _evenly(self, most: int) -> int:
        """The size of batches, of at most so many probes, of which none is much smaller than the others."""
        return -(-self.probes // -(-self.probes // most))

    def _choose_batch_size(self) -> int:
        """How many probes advance together: all, or as many as fit into nine tenths of the memory left.

        Compiles the program for as many as are tried: usually the one that then runs.
        """
        if not shares_work(self.operator) or self.storage.basis_memory == "host":
            return 1
        return most_that_fit(
            lambda size: self._compiled(self.template(size)),
            self.probes,
            lambda size: jax.tree.leaves(self.template(size)),
        )

    def _compiled(self, state: LanczosState) -> jax.stages.Compiled:
        began = time.perf_counter()
        compiled = compile_segment(self.operator, state)
        self.compile_seconds += time.perf_counter() - began
        return compiled

    def _described(self, state: LanczosState) -> CompiledRecord:
        memory = self._compiled(state).memory_analysis()
        if memory is None:
            return CompiledRecord(self.compile_seconds)
        return CompiledRecord(
            self.compile_seconds,
            ProgramMemory(
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes,
                memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
            ),
        )

    def _start(self, first: int) -> LanczosState:
        """The next batch. A short batch is filled with copies of its last probe, so that nothing compiles again."""
        numbers = [min(first + k, self.probes - 1) for k in range(self.batch_size)]
        return start_lanczos((self.draw(p) for p in numbers), self.steps, self.storage, self.blocks)

    def _segments(self, state: LanczosState, every: int | None) -> Iterator[LanczosState]:
        """The state after each segment, which end at multiples of `every` too; a second or so each."""
        length, done = 1, int(state.step)
        while done < self.steps:
            began = time.perf_counter()
            end = min(done + processes.agreed(length), self.steps)
            if every is not None:
                end = min(end, done - done % every + every)
            state = lanczos_segment(self.operator, state, end)
            ended = bool(np.all(state.broken))
            if ended:  # further steps only increase `step`
                state = dataclasses.replace(state, step=jax.device_put(np.int32(self.steps), state.step.sharding))
            seconds = time.perf_counter() - began
            length = _next_length(length, end - done, seconds)
            done = self.steps if ended else end
            yield state

    def _read(self, state: LanczosState, chosen: slice) -> None:
        count = chosen.stop - chosen.start
        self.sizes[chosen] = np.asarray(state.size).ravel()[:count]
        beyond = np.arange(self.steps) >= self.sizes[chosen, None]
        for name in COEFFICIENTS:
            found = np.asarray(getattr(state, name)).reshape(-1, self.steps)[:count]
            getattr(self, name)[chosen] = np.where(beyond, np.nan, found)
        bad = ~beyond & ~np.isfinite(self.alphas[chosen] + self.betas[chosen])
        if bad.any():
            row, step = np.argwhere(bad)[0]
            probe = row // self.width
            what = f"The product at step {step + 1} of probe {chosen.start // self.width + probe + 1}"
            if self.blocks is not None:
                what += f", block {self.blocks.names[row % self.width]},"
            raise non_finite(what, self.operator, jax.tree.map(lambda x: x[probe], state.previous))

    def _progress(self, state: LanczosState, chosen: slice) -> Progress:
        sizes = self.sizes[chosen]
        alphas, betas = ([row[:m] for row, m in zip(x[chosen], sizes, strict=True)] for x in (self.alphas, self.betas))
        step = int(state.step)
        first, together = chosen.start // self.width, len(sizes) // self.width
        return Progress(first, together, self.probes, step, self.steps, alphas, betas, self.seconds, state)

    def _save(self, saver: Saver, probe: int, state: LanczosState | None, must: bool) -> None:
        """Saves what the probes before this one gave, and the state of those that advance now."""
        step, rows = 0 if state is None else int(state.step), probe * self.width
        record = {
            "probe": probe,
            "step": step,
            "batch_size": self.batch_size,
            "runs": None if state is None else state.runs,
            "seconds": self.seconds,
            "program": None if self.program is None else dataclasses.asdict(self.program),
            "sizes": self.sizes[:rows].tolist(),
            **{name: [[float(x).hex() for x in row] for row in getattr(self, name)[:rows]] for name in COEFFICIENTS},
            "orthogonality": [float(x).hex() for x in self.orthogonality[:rows]],
        }
        save_or_warn(saver, probe * self.steps + step, record, state, must)

    def _resume_from(self, record: dict[str, Any]) -> int:
        """What a save holds of the probes that had ended; returns the first that had not."""
        probe, rows = record["probe"], record["probe"] * self.width
        self.batch_size, self.seconds = record["batch_size"], record["seconds"]
        self.program = None if record["program"] is None else read_as(CompiledRecord, record["program"])
        self.sizes[:rows] = record["sizes"]
        for name in COEFFICIENTS:
            getattr(self, name)[:rows] = [[float.fromhex(x) for x in row] for row in record[name]] or np.nan
        self.orthogonality[:rows] = [float.fromhex(x) for x in record["orthogonality"]]
        return probe


def save_or_warn(saver: Saver, step: int, record: dict[str, Any], state: Any = None, must: bool = False) -> None:
    """Saves. On a full disk a run in one process goes on without the save, unless it `must` be made."""
    try:
        saver.save(step, record, state)
    except InputError as error:  # the disk is full, above all
        if must or processes.count() > 1:
            raise
        warnings.warn(f"{error} The run goes on and tries again at the next save.", stacklevel=2)


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


def mesh_independent(facts: dict[str, Any]) -> dict[str, Any]:
    """What of a record is the same on any mesh."""
    if not isinstance(facts, dict):
        return facts
    return {k: mesh_independent(v) for k, v in facts.items() if not k.endswith("_per_device") and k not in MEASURED}


def _next_length(length: int, done: int, seconds: float) -> int:
    """Steps of the next segment; it may at most double, because the first one also compiled."""
    return max(1, min(2 * length, int(done * SEGMENT_SECONDS / max(seconds, 1e-6))))
