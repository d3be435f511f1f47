"""The spectrum of a language model's loss curvature: checkpoint and text in, numbers, plots and a report out.

With no options: the small GPT-NeoX model and the text in scripts/tiny.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from remat_choice import choose_remat  # beside this file, as the next
from rich.console import Console
from run_options import Options, check
from run_parts import (
    Clock,
    ProgressBar,
    build,
    identified,
    job_record,
    load,
    mesh_text,
    read_config,
    read_data,
    run_folder,
)

import jaxhess
from jaxhess.command import one_sentence, parse, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import EIGENVECTORS, EXPORTS, RUN_FILES
from jaxhess.operators.audit import audit
from jaxhess.results.data_section import NO_DATA_ERROR
from jaxhess.results.files import contents
from jaxhess.results.report import LOST_WARNING, report_files
from jaxhess.slq.record import DataError, EigenpairRecord

UNFINISHED = "unfinished"


def run(options: Options) -> jaxhess.Spectrum:
    """The whole job; returns what it also saved. Of several processes every one runs it, and the first one writes."""
    check(options)
    console = terminal(quiet=processes.index() > 0)
    clock = Clock()
    files = (*RUN_FILES, EIGENVECTORS)
    with run_folder(options, Path(options.model).name, files, (UNFINISHED,), EXPORTS) as (output, (checkpoint,)):
        config = read_config(options)
        mesh = jaxhess.make_mesh(options.mesh)
        blocks = read_data(options, config)
        clock.stop("data")
        config = choose_remat(options, config, mesh, checkpoint, console)
        checkpoint = identified(checkpoint, options, config, blocks)
        model = load(options, config, mesh)
        batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
        clock.stop("load")
        console.print(
            f"{options.model}: {model.num_params:,} parameters in {config.dtype} on {mesh_text(mesh)}; "
            f"{blocks.num_sequences} sequences of {blocks.seq_len} tokens."
        )
        operator = build(options, model, batches, console)
        clock.stop("operator")
        noise = audit(operator, seed=options.seed) if options.audit else None
        clock.stop("audit")
        sampling = blocks.sampling(batches.stacked.tokens.shape[1])
        result, state = solve(options, operator, sampling, checkpoint, console)
        job = job_record(options, model, blocks, batches, mesh, clock.seconds)
        result = _recorded(result, noise=noise, job=job)
        result = write(options, operator, result, state, output, console)
        checkpoint.remove()
    _print_summary(console, result, output.folder)
    return result


def solve(
    options: Options,
    operator: jaxhess.LinearOperator,
    sampling: jaxhess.Sampling,
    checkpoint: jaxhess.Checkpoint,
    console: Console,
) -> tuple[jaxhess.Spectrum, jaxhess.LanczosState | None]:
    """The spectrum; and the state of the last probes, where its basis can serve the eigenpairs."""
    if options.overwrite and not options.resume:
        checkpoint.remove()
    state = None
    keep = options.eigenpairs > 0 and options.storage.reorthogonalize == "full"

    def show(progress: jaxhess.Progress) -> None:
        nonlocal state
        bar.show(progress)
        if keep and progress.step == progress.steps and progress.probe + progress.together == progress.probes:
            state = progress.state

    with ProgressBar(console) as bar:
        result = jaxhess.spectrum(
            operator,
            steps=options.steps,
            probes=options.probes,
            seed=options.seed,
            storage=options.storage,
            batch_size=options.batch_size,
            distribution=options.probe_distribution,
            checkpoint=checkpoint if options.checkpoint_every else None,
            callback=show,
            sampling=sampling,
        )
    return result, state


def write(
    options: Options,
    operator: jaxhess.LinearOperator,
    result: jaxhess.Spectrum,
    state: jaxhess.LanczosState | None,
    output: Output,
    console: Console,
) -> jaxhess.Spectrum:
    """Saves the spectrum, then the eigenpairs that are asked for, then the report: a later failure costs no result."""
    processes.on_first(lambda: output.write(contents(result)))
    try:
        if options.eigenpairs:
            result = with_eigenpairs(options, operator, result, state, output, console)
            processes.on_first(lambda: output.write(contents(result)))
    except InputError:
        processes.on_first(lambda: output.write(report_files(result)))
        raise
    processes.on_first(lambda: output.write(report_files(result)))
    return result


def with_eigenpairs(
    options: Options,
    operator: jaxhess.LinearOperator,
    result: jaxhess.Spectrum,
    state: jaxhess.LanczosState | None,
    output: Output,
    console: Console,
) -> jaxhess.Spectrum:
    """The spectrum with leading eigenvalues and their residuals in its record; eigenvectors go to the run folder."""
    pairs = jaxhess.leading_eigenpairs(
        operator,
        options.eigenpairs,
        tolerance=options.eigenpair_tolerance,
        steps=options.eigenpair_steps,
        seed=options.seed,
        storage=options.storage,
        state=state,
    )
    for value, residual, converged in zip(pairs.values, pairs.residuals, pairs.converged, strict=True):
        console.print(f"eigenvalue      {value:.6g}  (residual {residual:.2g}{'' if converged else ', not converged'})")
    pairs.save(output.nested(EIGENVECTORS), overwrite=True)
    values, residuals, converged = (tuple(x.tolist()) for x in (pairs.values, pairs.residuals, pairs.converged))
    if len(pairs.microbatch_forms):
        console.print(
            "How far eigenvalues depend on the sequences: the two ends of the spectrum of both halves of them."
        )
    spreads = jaxhess.eigenvalue_errors(operator, pairs, result.run.sampling)
    data = tuple(x and DataError(x.error, x.freedom, None if math.isnan(x.bias) else x.bias) for x in spreads)
    return _recorded(result, eigenpairs=EigenpairRecord(values, residuals, converged, pairs.steps, EIGENVECTORS, data))


def _recorded(result: jaxhess.Spectrum, **facts: Any) -> jaxhess.Spectrum:
    """The spectrum with more in the record of its run."""
    return dataclasses.replace(result, run=dataclasses.replace(result.run, **facts))


def _print_summary(console: Console, result: jaxhess.Spectrum, out: Path) -> None:
    extremes, trace, frobenius = result.extreme(), result.trace(), result.frobenius_norm()
    if lost := np.flatnonzero(result.orthogonality_lost).tolist():
        numbers = ", ".join(str(p + 1) for p in lost)
        console.print(f"NOT RELIABLE: {LOST_WARNING.format(probes=numbers)}")
    console.print(f"loss            {result.run.inputs.loss:.6g} nats per token")
    for name, value in (("largest", extremes.largest), ("smallest", extremes.smallest)):
        console.print(f"{name + ' Ritz':15s} {value.value:.6g}  (residual bound {value.residual_bound:.2g})")
    console.print(f"trace           {trace}")
    console.print(f"Frobenius norm  {frobenius}")
    for name, estimate in (("trace", trace), ("Frobenius norm", frobenius)):
        if estimate.data is not None and math.isfinite(estimate.for_population().value):
            console.print(f"{name} of all the data, as far as these sequences tell: {estimate.for_population()}")
    if trace.data is None:
        console.print(NO_DATA_ERROR)
    noise = result.run.noise
    if noise and noise.floor:
        console.print(
            f"noise floor     {noise.floor.random:.2g} in the bulk, {noise.floor.leading:.2g} among the outliers"
        )
    routing, shift = (result.run.inputs.details.get(name) for name in ("routing", "shift_of_a_random_vector"))
    if isinstance(routing, dict) and isinstance(margin := routing.get("margin"), dict) and margin:
        console.print(f"routing margin  {margin['0']:.2g} at least, {margin['0.5']:.2g} in the median")
    if isinstance(shift, dict) and "changed_experts" in shift:
        console.print(
            f"experts         {shift['changed_experts']:.2%} of the choices differ between the two shifts; "
            f"they change a product by {shift['jumped']:.2g}"
        )
    console.print(f"written to      {out}/report.html")


def main() -> None:
    """Reads the options and runs."""
    options = parse(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
