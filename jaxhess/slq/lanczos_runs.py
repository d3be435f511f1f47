"""The Lanczos runs of all probes, a batch of them after the other, saved on the way and resumed."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhess.distributed import processes
from jaxhess.distributed.memory import most_that_fit
from jaxhess.files.typed import read_as
from jaxhess.krylov.lanczos import compile_segment, lanczos_segment, orthogonality_loss
from jaxhess.krylov.state import FORM_STEPS, LanczosState, abstract_lanczos, start_lanczos
from jaxhess.krylov.storage import Storage
from jaxhess.operators.base import LinearOperator
from jaxhess.operators.blocks import Blocks
from jaxhess.operators.facts import non_finite, shares_work
from jaxhess.operators.forms import FORMS, num_microbatches
from jaxhess.slq.checkpoint import Interrupted, Saver
from jaxhess.slq.data_errors import counted_alike
from jaxhess.slq.record import CompiledRecord, ProgramMemory
from jaxhess.vectors import Vector

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
        found = num_microbatches(self.operator)
        self.microbatches = found if found > 1 and self.blocks is None else 0
        self.width = 1 if self.blocks is None else len(self.blocks)
        rows = self.probes * self.width
        self.alphas, self.betas, self.step_errors = (np.full((rows, self.steps), np.nan) for _ in range(3))
        self.sizes = np.zeros(rows, np.int64)
        self.forms = np.full((rows, FORM_STEPS, self.microbatches, FORMS), np.nan)
        self.orthogonality = np.full(rows, np.nan)
        self.seconds = 0.0
        self.batch_size = 0
        self.program: CompiledRecord | None = None
        self.compile_seconds = 0.0

    def template(self, runs: int = 1) -> LanczosState:
        """The abstract state of so many probes together."""
        like = self.operator.shape_dtype
        return abstract_lanczos(like, self.steps, self.storage, runs, self.blocks, self.microbatches)

    def advance(
        self, batch_size: int | None, saver: Saver | None = None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """All probes to their end, from where the last save left them."""
        first, begun = 0, None
        if saver is not None and (record := saver.latest()) is not None:
            first = self._resume_from(record)
            now, self.microbatches = self.microbatches, record["microbatches"]
            if record["step"] > 0:  # these probes advance together to their end
                begun = saver.restore(self.template(record["runs"]))
            if self.microbatches != now:  # cut otherwise than before: what is known of single ones does not go together
                self._drop_forms()
                begun = None if begun is None else dataclasses.replace(begun, forms=None)
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
        if not (np.isfinite(self.forms).all() and counted_alike(self.forms)):  # too large, or cut otherwise before
            self._drop_forms()

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
        probes = (self.draw(p) for p in numbers)
        return start_lanczos(probes, self.steps, self.storage, self.blocks, self.microbatches)

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
        if self.microbatches:
            self.forms[chosen] = np.asarray(state.forms)[:count]
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
            "microbatches": self.microbatches,
            "forms": base64.b64encode(self.forms[:rows].tobytes()).decode(),
        }
        saver.save_or_warn(probe * self.steps + step, record, state, must)

    def _resume_from(self, record: dict[str, Any]) -> int:
        """What a save holds of the probes that had ended; returns the first that had not."""
        probe, rows = record["probe"], record["probe"] * self.width
        self.batch_size, self.seconds = record["batch_size"], record["seconds"]
        self.program = None if record["program"] is None else read_as(CompiledRecord, record["program"])
        self.sizes[:rows] = record["sizes"]
        for name in COEFFICIENTS:
            getattr(self, name)[:rows] = [[float.fromhex(x) for x in row] for row in record[name]] or np.nan
        self.orthogonality[:rows] = [float.fromhex(x) for x in record["orthogonality"]]
        if record["microbatches"] == self.microbatches:
            saved = np.frombuffer(base64.b64decode(record["forms"]))
            self.forms[:rows] = saved.reshape(self.forms[:rows].shape)
        return probe

    def _drop_forms(self) -> None:
        self.microbatches = 0
        self.forms = self.forms[:, :, :0]


def _next_length(length: int, done: int, seconds: float) -> int:
    """Steps of the next segment; it may at most double, because the first one also compiled."""
    return max(1, min(2 * length, int(done * SEGMENT_SECONDS / max(seconds, 1e-6))))
