"""The spectrum of a language model's loss curvature: checkpoint and text in, numbers, plots and a report out.

With no options: the small GPT-NeoX model and the text in scripts/tiny.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from remat_choice import choose_remat  # beside this file, as the next
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from run_options import Options, check, layer_numbers

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import default_folder, one_sentence, parse, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import EIGENVECTORS, EXPORTS, RUN_FILES
from jaxhess.krylov.quadrature import quadrature
from jaxhess.models import abstract_params
from jaxhess.operators.audit import audit
from jaxhess.operators.facts import describe
from jaxhess.operators.matmul import check_matmul_precision
from jaxhess.operators.restriction import restriction
from jaxhess.results.files import contents
from jaxhess.results.report import LOST_WARNING, report_files
from jaxhess.slq.job import CommandRecord, Data, Devices, Model
from jaxhess.slq.record import EigenpairRecord
from jaxhess.slq.run import check_basis_fits
from jaxhess.vectors import random_key

UNFINISHED = "unfinished"
FREE = {
    *("model", "data", "mesh", "microbatch", "query_chunk", "logit_chunk", "remat", "batch_size", "residual_gb"),
    "attention",
    *("audit", "out", "overwrite", "resume", "checkpoint_every"),
    *("eigenpairs", "eigenpair_tolerance", "eigenpair_steps"),
}
"""Options that may differ when a run is resumed: where things lie (weights and tokens are compared themselves), how
the work is cut, and what comes after it."""


def run(options: Options) -> jaxhess.Spectrum:
    """The whole job; returns what it also saved. Of several processes every one runs it, and the first one writes."""
    check(options)
    console = terminal(quiet=processes.index() > 0)
    clock = Clock()
    with run_folder(options) as (output, checkpoint):
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
            f"{options.model}: {model.num_params:,} parameters in {config.dtype} on {_mesh_text(mesh)}; "
            f"{blocks.num_sequences} sequences of {blocks.seq_len} tokens."
        )
        operator = build(options, model, batches, console)
        clock.stop("operator")
        noise = audit(operator, seed=options.seed) if options.audit else None
        clock.stop("audit")
        result, state = solve(options, operator, checkpoint, console)
        job = job_record(options, model, blocks, batches, mesh, clock.seconds)
        result = _recorded(result, noise=noise, job=job)
        result = write(options, operator, result, state, output, console)
        checkpoint.remove()
    _print_summary(console, result, output.folder)
    return result


def job_record(
    options: Options,
    model: jaxhess.LanguageModel,
    blocks: jaxhess.TokenBlocks,
    batches: jaxhess.Microbatches,
    mesh: jax.sharding.Mesh,
    seconds: dict[str, float],
) -> CommandRecord:
    """What was asked for, with which model and data, and where."""
    return CommandRecord(
        dataclasses.asdict(options),
        Model(_located(options.model), model.num_params, model.config.to_dict()),
        Data(_located(options.data), blocks.num_sequences, blocks.seq_len, len(batches), blocks.fingerprint()),
        Devices(dict(mesh.shape), mesh.size, mesh.devices.flat[0].device_kind, processes.count()),
        _versions(),
        seconds,
    )


def read_config(options: Options) -> jaxhess.DecoderConfig:
    """The model's configuration, once the options have been checked against it. Sets JAX's 64-bit mode if it is needed.

    Raises:
        InputError: There is no such model, or its parameters, layers, sequences or dtype are not what the options ask
            for.
    """
    config = convert.load_config(options.model, options.dtype)
    check_matmul_precision(options.matmul_precision, (options.compute_dtype or config.dtype,))
    layers = layer_numbers(options.layers, config.num_layers)
    if options.restrict or layers is not None:
        restriction(abstract_params(config), options.restrict, layers, config.stacks)
    config.check_length(options.seq_len)
    stored = dataclasses.asdict(options.storage).values()
    if "float64" in (config.dtype, options.compute_dtype, options.accumulation_dtype, *stored):
        jax.config.update("jax_enable_x64", True)
    return config


def read_data(options: Options, config: jaxhess.DecoderConfig) -> jaxhess.TokenBlocks:
    """The sequences, the same in all processes.

    Raises:
        InputError: There is no such data or not enough of it, or processes find different data.
    """
    blocks = load_blocks(
        options.data,
        options.model,
        seq_len=options.seq_len,
        vocab_size=config.vocab_size,
        sequences=options.sequences,
        seed=options.seed,
    )
    if len(set(processes.gathered(blocks.fingerprint()))) > 1:
        raise InputError(f"--data {options.data} does not give the same tokens in all processes.")
    return blocks


@contextlib.contextmanager
def run_folder(options: Options) -> Iterator[tuple[Output, jaxhess.Checkpoint]]:
    """The folder of the run, which no other run writes into until the block ends, and the checkpoint inside it.

    Raises:
        InputError: There is something in the folder that may not be replaced, or another unfinished run.
    """
    out = options.out or Path(processes.agreed(str(default_folder(Path(options.model).name))))
    checkpoint = jaxhess.Checkpoint(out / UNFINISHED, options.checkpoint_every or 1, options.resume)
    checkpoint.check(discard=options.overwrite)
    # Also a run that was interrupted after its spectrum was written is to be finished.
    overwrite = options.overwrite or (options.resume and checkpoint.unfinished())
    output = Output(out, (*RUN_FILES, EIGENVECTORS), overwrite, stale=EXPORTS)
    try:
        processes.on_first(output.claim)
        yield output, checkpoint
    finally:
        output.release()


def identified(
    checkpoint: jaxhess.Checkpoint,
    options: Options,
    config: jaxhess.DecoderConfig,
    blocks: jaxhess.TokenBlocks,
    free: Collection[str] = FREE,
) -> jaxhess.Checkpoint:
    """The checkpoint with what must be the same when a run is resumed; the library adds the weights and the loss.

    Raises:
        InputError: The unfinished run to be resumed has other options, another model or other data.
    """
    identity = {
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in free},
        "data": blocks.fingerprint(),
        "model": {k: v for k, v in config.to_dict().items() if k not in free},
        "remat": (checkpoint.known() if options.resume else {}).get("remat", config.remat),
    }
    checkpoint = dataclasses.replace(checkpoint, identity=identity)
    if options.resume:  # now, before the weights are loaded
        checkpoint.check()
    return checkpoint


def load(options: Options, config: jaxhess.DecoderConfig, mesh: jax.sharding.Mesh) -> jaxhess.LanguageModel:
    """The model with its weights on the devices."""
    model = convert.load(options.model, mesh=mesh, dtype=options.dtype)
    return model.configured(
        dtype=options.compute_dtype or config.dtype,
        query_chunk=options.query_chunk,
        attention=options.attention,
        remat=config.remat,
    )


def build(options: Options, model: jaxhess.LanguageModel, batches: Any, console: Console) -> jaxhess.LinearOperator:
    """The operator that the options name, on the parameters that they name.

    Raises:
        InputError: Lanczos vectors or kept arrays do not fit into memory, or there are not so many eigenpairs.
    """
    arguments = (model.loss(options.logit_chunk), model.params, batches)
    precision: Any = {"accumulation_dtype": options.accumulation_dtype, "matmul_precision": options.matmul_precision}
    operator: jaxhess.LossOperator
    if options.operator == "gauss-newton":
        operator = jaxhess.GaussNewton(*arguments, **precision)
    elif options.operator == "empirical-fisher":
        operator = jaxhess.EmpiricalFisher(*arguments, **precision)
    elif options.operator == "monte-carlo-fisher":
        key = jax.random.fold_in(random_key(options.seed), 1)
        operator = jaxhess.MonteCarloFisher.draw(*arguments, key=key, samples=options.fisher_samples, **precision)
    elif options.hvp == "finite-difference":
        operator = jaxhess.FiniteDifferenceHessian(
            *arguments, step=options.step, per=options.step_per, shift=options.shift, **precision
        )
    else:
        operator = jaxhess.Hessian(*arguments, **precision)
    if describe(operator).get("matmul_emulated"):
        console.print(
            f"These devices have no {options.matmul_precision} products: they are emulated, with the same operands and "
            "slower than float32."
        )
    layers = layer_numbers(options.layers, model.config.num_layers)
    if options.restrict or layers is not None:
        operator = operator.restrict(*options.restrict, layers=layers)
    steps = max(options.steps, options.eigenpair_steps if options.eigenpairs else 0)
    check_basis_fits(operator, steps, options.storage)
    if options.eigenpairs > operator.dim:
        raise InputError(f"--eigenpairs {options.eigenpairs} are more than the {operator.dim:,} rows of the operator.")
    if options.hvp == "linearized" and isinstance(operator, jaxhess.Hessian):
        budget = None if options.residual_gb is None else 1e9 * options.residual_gb

        def announce(kept: int) -> None:
            console.print(f"Linearising keeps {kept / 1e9:.3g} GB on each device.")

        return jaxhess.linearize(operator, budget, announce)
    return operator


def solve(
    options: Options, operator: jaxhess.LinearOperator, checkpoint: jaxhess.Checkpoint, console: Console
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
    return _recorded(result, eigenpairs=EigenpairRecord(values, residuals, converged, pairs.steps, EIGENVECTORS))


def _recorded(result: jaxhess.Spectrum, **facts: Any) -> jaxhess.Spectrum:
    """The spectrum with more in the record of its run."""
    return dataclasses.replace(result, run=dataclasses.replace(result.run, **facts))


class ProgressBar:
    """Progress with the current extreme Ritz values and the time left; a line per probe where there is no terminal."""

    def __init__(self, console: Console):
        self.console = console
        columns = ("[bold]{task.description}", BarColumn(), "{task.completed}/{task.total} products")
        texts = [c if not isinstance(c, str) else TextColumn(c) for c in columns]
        self.bar = Progress(
            *texts,
            TextColumn("Ritz values {task.fields[extremes]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("compiling", total=1, extremes="")

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def show(self, progress: jaxhess.Progress) -> None:
        pairs = zip(progress.alphas, progress.betas, strict=True)
        theta = [quadrature(*pair).ritz_values for pair in pairs]
        extremes = f"{min(t[0] for t in theta):.4g} to {max(t[-1] for t in theta):.4g}"
        first, last = progress.probe + 1, progress.probe + progress.together
        name = f"probe {first} of {progress.probes}" if first == last else f"probes {first}-{last} of {progress.probes}"
        if self.console.is_terminal:
            total = progress.steps * progress.probes
            done = progress.probe * progress.steps + progress.together * progress.step
            self.bar.update(self.task, description=name, total=total, completed=done, extremes=extremes)
        elif progress.step == progress.steps:
            self.console.print(f"{name}: Ritz values {extremes}, {progress.seconds:.1f} s")


class Clock:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Ends this stage, and begins the next one."""
        now = time.perf_counter()
        self.seconds[f"{stage}_seconds"], self.began = now - self.began, now


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


def _mesh_text(mesh: jax.sharding.Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _located(name: str) -> str:
    """A path made absolute, so that the record can be traced; anything else as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _versions() -> dict[str, str]:
    packages = ("jaxhess", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "tokenizers", "safetensors")
    return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}


def main() -> None:
    """Reads the options and runs."""
    options = parse(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
