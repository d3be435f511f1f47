"""Rows of a benchmark: run in turn, timed, compared with a reference, and printed as a table."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxhess.distributed.memory import temporary_bytes
from jaxhess.krylov.quadrature import quadrature
from jaxhess.plan.hlo import bytes_accessed, matmul_flops, read_program


@dataclasses.dataclass
class Measurement:
    """One thing that is timed: `run` returns when its result is there; `error` compares that with float64."""

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float] | None = None
    compiled: jax.stages.Compiled | None = None
    trips: int | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    processor_times: list[float] = dataclasses.field(default_factory=list)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(rows: list[Measurement], rounds: int) -> None:
    """Runs every row once, for its error, and then in turn for its times."""
    for row in rows:
        answer = row.run()  # compiles what is not yet, and warms up
        if row.error is not None:
            row.result["error"] = row.error(answer)
        del answer
    for _ in range(rounds):
        for row in rows:
            began, worked = time.perf_counter(), time.process_time()
            row.run()
            row.times.append(time.perf_counter() - began)
            row.processor_times.append(time.process_time() - worked)


def largest_ritz_value(alphas: Any, betas: Any) -> float:
    """The largest eigenvalue of T, in float64."""
    return float(quadrature(np.asarray(alphas, np.float64), np.asarray(betas, np.float64)).ritz_values[-1])


def relative_error(found: Any, reference: Any) -> float:
    """|found - reference| / |reference|, in float64 on the host."""
    pairs = zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(reference), strict=True)
    squares = [(np.sum((np.asarray(x, np.float64) - y) ** 2), np.sum(np.square(y))) for x, y in pairs]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def summarise(rows: list[Measurement], peak: float | None) -> None:
    """Fills every row's result with its times and with what its program says, per device."""
    for row in rows:
        quartiles = np.percentile(row.times, [25, 75])
        row.result["seconds"] = statistics.median(row.times)
        row.result["quartiles"] = [float(q) for q in quartiles]
        row.result["times"] = row.times
        row.result["processor_seconds"] = statistics.median(row.processor_times)
        row.result["per_gradient"] = row.result["seconds"] / rows[0].result["seconds"]
        if row.compiled is None:
            continue
        program = read_program(row.compiled)
        row.result["matmul_flops"] = flops = matmul_flops(program, unknown_trips=row.trips)
        row.result["flops_per_gradient"] = flops / rows[0].result["matmul_flops"]
        row.result["bytes_accessed"] = bytes_accessed(program, unknown_trips=row.trips)
        row.result["temporary_bytes"] = temporary_bytes(row.compiled)
        if peak is not None:
            row.result["share_of_peak"] = flops / row.result["seconds"] / peak


COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("seconds", "seconds", "{:.3g}", 1.0),
    ("÷ first", "per_gradient", "{:.2f}", 1.0),
    ("GFLOP", "matmul_flops", "{:.0f}", 1e9),
    ("÷ first", "flops_per_gradient", "{:.2f}", 1.0),
    ("MB", "temporary_bytes", "{:.0f}", 1e6),
    ("of peak", "share_of_peak", "{:.1%}", 1.0),
    ("error", "error", "{:.0e}", 1.0),
)
"""Heading, key of a row, format, unit."""


def show(console: Console, facts: dict[str, Any]) -> None:
    device = facts["device"]
    what = f"{facts['parameters']:,} parameters in {facts['dtype']} on {device['count']} {device['kind']}"
    table = Table("", title=what, padding=(0, 0, 0, 1), box=None)
    shown = [column for column in COLUMNS if any(column[1] in row for row in facts["rows"])]
    for heading, *_ in shown:
        table.add_column(heading, justify="right")
    for row in facts["rows"]:
        cells = [form.format(row[key] / unit) if key in row else "" for _, key, form, unit in shown]
        table.add_row(row["name"], *cells)
    console.print(table)
    console.print(
        f"Seconds are medians of {facts['options']['rounds']} interleaved rounds, GFLOP those of matrix products, MB "
        "temporary memory of the compiled program, both on one device. Errors are relative to the same in float64: of "
        f"the vector, or of the largest Ritz value after {facts['options']['steps']} Lanczos steps."
    )
    kept = next(row["residual_bytes"] for row in facts["rows"] if "residual_bytes" in row)
    vector = facts["vector_bytes"]
    console.print(f"The linearised product keeps {kept / 1e6:.0f} MB, {kept / vector:.1f} times a vector's.")
    console.print(f"Work on vectors in the exact Lanczos run: {facts['vector_work_share']:.1%} of its time.")
