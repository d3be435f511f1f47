"""What `scripts/spectrum.py` and `scripts/blocks.py` share: a model, its data and the operator from the options."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from run_options import Options, layer_numbers

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import default_folder
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.krylov.quadrature import quadrature
from jaxhess.models import abstract_params
from jaxhess.operators.facts import describe
from jaxhess.operators.matmul import check_matmul_precision
from jaxhess.operators.restriction import restriction
from jaxhess.slq.job import CommandRecord, Data, Devices, Model
from jaxhess.slq.run import check_basis_fits
from jaxhess.vectors import random_key

FREE = {
    *(
        "model",
        "data",
        "precondition",
        "mesh",
        "microbatch",
        "query_chunk",
        "logit_chunk",
        "remat",
        "batch_size",
        "residual_gb",
    ),
    "attention",
    *("audit", "out", "overwrite", "resume", "checkpoint_every"),
    *("eigenpairs", "eigenpair_tolerance", "eigenpair_steps"),
}
"""Options that may differ when a run is resumed: where things lie (weights, tokens and preconditioners are compared
themselves), how the work is cut, and what comes after it."""


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
        sample=options.sample,
        seed=options.seed,
    )
    if len(set(processes.gathered(blocks.fingerprint()))) > 1:
        raise InputError(f"--data {options.data} does not give the same tokens in all processes.")
    return blocks


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
        InputError: Lanczos vectors or kept arrays do not fit into memory, there are not so many eigenpairs, or the
            preconditioner is not one for this model.
    """
    chosen = None if options.precondition is None else read_preconditioner(options.precondition, model, console)
    arguments = (model.loss(options.logit_chunk), model.params, batches)
    precision: Any = {"accumulation_dtype": options.accumulation_dtype, "matmul_precision": options.matmul_precision}
    operator: Any
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
    restricted = operator.restriction
    steps = max(options.steps, options.eigenpair_steps if options.eigenpairs else 0)
    check_basis_fits(operator, steps, options.storage)
    if options.eigenpairs > operator.dim:
        raise InputError(f"--eigenpairs {options.eigenpairs} are more than the {operator.dim:,} rows of the operator.")
    if options.hvp == "linearized" and isinstance(operator, jaxhess.Hessian):
        budget = None if options.residual_gb is None else 1e9 * options.residual_gb

        def announce(kept: int) -> None:
            console.print(f"Linearising keeps {kept / 1e9:.3g} GB on each device.")

        operator = jaxhess.linearize(operator, budget, announce)
    if chosen is None:
        return operator
    diagonal = chosen.diagonal if restricted is None else restricted.take(chosen.diagonal)
    return dataclasses.replace(operator.preconditioned(diagonal), threshold=chosen.threshold)


def read_preconditioner(path: Path, model: jaxhess.LanguageModel, console: Console) -> convert.Preconditioner:
    """What --precondition names, for all parameters; where its file tells, Adam's threshold is printed."""
    found = convert.load_preconditioner(path, model)
    if found.threshold is not None:
        console.print(
            f"Adam with learning rate {found.learning_rate:.3g} and beta1 {found.b1:.3g} is stable where the "
            f"eigenvalues of D^-1 H are below {found.threshold:.6g}."
        )
    return found


@contextlib.contextmanager
def run_folder(
    options: Options, name: str, files: Collection[str], unfinished: Sequence[str], stale: Collection[str] = ()
) -> Iterator[tuple[Output, list[jaxhess.Checkpoint]]]:
    """The folder of the run, which no other run writes into until the block ends, and the checkpoints inside it.

    Args:
        options: With `out`, `overwrite`, `resume` and `checkpoint_every`.
        name: Of the folder by default, with the date before it.
        files: That are written into it.
        unfinished: A folder for each checkpoint, inside it.
        stale: Files of an earlier run that go with it.

    Raises:
        InputError: There is something in the folder that may not be replaced, or another unfinished run.
    """
    out = options.out or Path(processes.agreed(str(default_folder(name))))
    every = options.checkpoint_every or 1
    checkpoints = [jaxhess.Checkpoint(out / place, every, options.resume) for place in unfinished]
    for checkpoint in checkpoints:
        checkpoint.check(discard=options.overwrite)
    begun = [checkpoint.unfinished() for checkpoint in checkpoints]  # all processes ask for all
    # Also a run that was interrupted after its result was written is to be finished.
    output = Output(out, files, options.overwrite or (options.resume and any(begun)), stale=stale)
    try:
        processes.on_first(output.claim)
        yield output, checkpoints
    finally:
        output.release()


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


def mesh_text(mesh: jax.sharding.Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _located(name: str) -> str:
    """A path made absolute, so that the record can be traced; anything else as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _versions() -> dict[str, str]:
    packages = ("jaxhess", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "tokenizers", "safetensors")
    return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
