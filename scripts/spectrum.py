"""The spectrum of a language model's loss curvature: checkpoint and text in, numbers, plots and a report out.

With no options: the small GPT-NeoX model and the text in scripts/tiny.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import one_sentence, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import EIGENVECTORS, EXPORTS, RUN_FILES
from jaxhess.krylov.quadrature import quadrature
from jaxhess.krylov.storage import Storage
from jaxhess.models import LOGIT_CHUNK, abstract_params
from jaxhess.operators.audit import audit
from jaxhess.operators.restriction import restriction
from jaxhess.results.files import contents
from jaxhess.results.report import LOST_WARNING, report_files
from jaxhess.slq.job import Data, Devices, Job, Model
from jaxhess.slq.record import FoundPairs
from jaxhess.slq.run import check_basis_fits
from jaxhess.vectors import check_seed, random_key

TINY = Path(__file__).parent / "tiny"
UNFINISHED = "unfinished"
FREE = {
    *("model", "data", "mesh", "microbatch", "query_chunk", "logit_chunk", "remat", "batch_size", "residual_gb"),
    *("audit", "out", "overwrite", "resume", "checkpoint_every"),
    *("eigenpairs", "eigenpair_tolerance", "eigenpair_steps"),
}
"""Options that may differ when a run is resumed: where things lie (weights and tokens are compared themselves), how
the work is cut, and what comes after it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The defaults suit most runs."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]. Text is
    tokenised without special tokens, with the end-of-text token between documents."""
    seq_len: int = 128
    """Predicted tokens per sequence."""
    sequences: int = 16
    """Sequences taken from the start of the data; the loss is the mean over all their tokens."""
    microbatch: int = 8
    """Sequences whose activations exist at once; changes memory and speed, not the result."""
    operator: Literal["hessian", "gauss-newton", "empirical-fisher", "monte-carlo-fisher"] = "hessian"
    """The matrix whose spectrum is computed. All but the first are positive semi-definite: Gauss-Newton (the Fisher
    matrix of the softmax), the outer products of per-token gradients (empirical), and the same at targets drawn from
    the model (Monte Carlo)."""
    hvp: Literal["exact", "linearized", "finite-difference"] = "exact"
    """How Hessian products are made. `linearized` is exact too: it does the primal pass once and keeps it, faster for
    many times the memory. `finite-difference` is the product of arXiv 2602.00816, for comparison."""
    step: float | Literal["auto"] = "auto"
    """Of finite differences; `auto` measures gradient noise and third derivative and balances them."""
    step_per: Literal["coordinate", "unit"] = "coordinate"
    """Whether the step is the root mean square of the shift's entries (as in the paper), or its whole length."""
    shift: Literal["realised", "float32"] = "realised"
    """Of finite differences in low precision: shift the stored weights and divide by what moved, or float32 copies."""
    residual_gb: float | None = None
    """GB per device that `linearized` may keep; by default what is left."""
    fisher_samples: int = 1
    """Targets drawn per token, for `monte-carlo-fisher`."""
    restrict: tuple[str, ...] = ()
    """Only these parameters, the others held fixed: words (attention, mlp, norm, embed, head) or shell patterns such as
    'layers/mlp/up/*'. By default all."""
    layers: str | None = None
    """Only these layers, for example 0-3,-1."""
    steps: int = 30
    """Lanczos steps per probe: one product each."""
    probes: int = 4
    """Random probes; two or more give standard errors."""
    storage: Annotated[Storage, tyro.conf.arg(name="")] = Storage()
    batch_size: int | None = None
    """Probes that advance together and share primal passes; by default as many as fit into memory."""
    eigenpairs: int = 0
    """Also find this many leading eigenvectors (largest magnitude), and save them in the run folder. After an
    interruption their computation starts again; the spectrum is kept."""
    eigenpair_tolerance: float = 1e-3
    """Residual bound, relative to the largest eigenvalue, at which an eigenpair has converged."""
    eigenpair_steps: int = 100
    """The most Lanczos steps for the eigenpairs. With `full` they go on from those of the last probes."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Storage of the weights; by default the checkpoint's own."""
    compute_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Of matrix products and activations; by default that of the weights. Norms, softmax and loss are in float32 or
    wider, and float32 is float32 on a GPU too (no TF32)."""
    accumulation_dtype: Literal["float32", "float64"] = "float32"
    """Of the operator's sums over microbatches."""
    audit: bool = True
    """Measure the noise of the products (asymmetry, non-linearity, distance from a wider dtype) for the record: seven
    products and two compilations."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8 or data=2,fsdp=4 or fsdp=4,tensor=2; by default fsdp over all devices."""
    seed: int = 0
    """Of the probes (and of random tokens)."""
    probe_distribution: Literal["normal", "rademacher"] = "normal"
    """Entries of the probes: normal ones give weights of known distribution, rademacher a smaller trace variance."""
    query_chunk: int = 256
    """Queries whose attention scores exist at once."""
    logit_chunk: int = LOGIT_CHUNK
    """Logits per device that exist at once: those of all tokens of a microbatch with a slice of the vocabulary."""
    out: Path | None = None
    """Run folder; by default runs/<date>-<model>."""
    overwrite: bool = False
    """Replace a finished run in that folder; files that no run wrote are never replaced."""
    checkpoint_every: int = 10
    """Steps between saves of an unfinished run (they replace each other, in the run folder); 0 for none. SIGTERM saves
    too."""
    resume: bool = False
    """Resume the unfinished run in --out, which must be of the same model, data and options. --mesh, --microbatch,
    --query-chunk and --logit-chunk may differ."""


def run(options: Options) -> jaxhess.Spectrum:
    """The whole job; returns what it also saved. Of several processes every one runs it, and the first one writes."""
    named = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(options.model).name}"
    out = options.out or Path("runs") / processes.agreed(named)
    _check_options(options)
    checkpoint = jaxhess.Checkpoint(out / UNFINISHED, options.checkpoint_every or 1, options.resume)
    checkpoint.check(discard=options.overwrite)
    # A run that was stopped after its spectrum, or over a finished one, is still to be ended.
    overwrite = options.overwrite or (options.resume and checkpoint.unfinished())
    output = Output(out, (*RUN_FILES, EIGENVECTORS), overwrite, stale=EXPORTS)
    try:
        processes.on_first(output.claim)
        return _run(options, output, checkpoint)
    finally:
        output.release()


def _run(options: Options, output: Output, checkpoint: jaxhess.Checkpoint) -> jaxhess.Spectrum:
    """The job, in a folder that no other run writes into."""
    config = convert.load_config(options.model, options.dtype)
    layers = _layers(options.layers, config.num_layers)
    if options.restrict or layers is not None:
        restriction(abstract_params(config), options.restrict, layers)
    config.check_length(options.seq_len)
    kept = dataclasses.asdict(options.storage).values()
    if "float64" in (config.dtype, options.compute_dtype, options.accumulation_dtype, *kept):
        jax.config.update("jax_enable_x64", True)
    mesh = jaxhess.make_mesh(options.mesh)
    console = terminal(quiet=processes.index() > 0)

    clock = {"start": time.perf_counter()}
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
    batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
    clock["data"] = time.perf_counter()
    model = convert.load(options.model, mesh=mesh, dtype=options.dtype)
    model = model.configured(
        dtype=options.compute_dtype or config.dtype,
        query_chunk=options.query_chunk,
        remat=options.hvp != "linearized",
    )
    clock["model"] = time.perf_counter()
    console.print(
        f"{options.model}: {model.num_params:,} parameters in {config.dtype} on {_mesh_text(mesh)}; "
        f"{blocks.num_sequences} sequences of {blocks.seq_len} tokens."
    )

    checkpoint = dataclasses.replace(checkpoint, identity=_identity(options, model, blocks.fingerprint()))
    if options.resume:
        checkpoint.check()

    operator = build_operator(options, model, batches)
    most_steps = max(options.steps, options.eigenpair_steps if options.eigenpairs else 0)
    check_basis_fits(operator, most_steps, options.storage)
    if options.eigenpairs > operator.dim:
        raise InputError(f"--eigenpairs {options.eigenpairs} are more than the {operator.dim:,} rows of the operator.")
    clock["operator"] = time.perf_counter()
    noise = audit(operator, seed=options.seed) if options.audit else None
    clock["audit"] = time.perf_counter()
    job = Job(
        dataclasses.asdict(options),
        Model(_located(options.model), model.num_params, model.config.to_dict()),
        Data(_located(options.data), blocks.num_sequences, blocks.seq_len, len(batches), blocks.fingerprint()),
        Devices(dict(mesh.shape), mesh.size, mesh.devices.flat[0].device_kind, processes.count()),
        _versions(),
        {
            "data_seconds": clock["data"] - clock["start"],
            "load_seconds": clock["model"] - clock["data"],
            "operator_seconds": clock["operator"] - clock["model"],
            "audit_seconds": clock["audit"] - clock["operator"],
        },
    )
    if options.overwrite and not options.resume:
        checkpoint.remove()
    with _Bar(console, bool(options.eigenpairs) and options.storage.reorthogonalize == "full") as bar:
        result = jaxhess.spectrum(
            operator,
            steps=options.steps,
            probes=options.probes,
            seed=options.seed,
            storage=options.storage,
            batch_size=options.batch_size,
            distribution=options.probe_distribution,
            checkpoint=checkpoint if options.checkpoint_every else None,
            callback=bar.show,
        )
        state = bar.last
    result = dataclasses.replace(result, run=dataclasses.replace(result.run, noise=noise, job=job))
    processes.on_first(lambda: _write(output, result))
    if options.eigenpairs:
        result = with_eigenpairs(options, operator, result, output, console, state)
        processes.on_first(lambda: _write(output, result))
    checkpoint.remove()
    if processes.index() == 0:
        _print_summary(console, result, output.folder)
    return result


def _write(output: Output, result: jaxhess.Spectrum) -> None:
    """Writes the result, and then its report: a figure that cannot be drawn does not cost the run."""
    output.write(contents(result))
    output.write(report_files(result))


def with_eigenpairs(
    options: Options,
    operator: jaxhess.LinearOperator,
    result: jaxhess.Spectrum,
    output: Output,
    console: Console,
    state: jaxhess.LanczosState | None,
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
    pairs.save(output.folder / EIGENVECTORS, overwrite=True)
    numbers = [tuple(getattr(pairs, name).tolist()) for name in ("values", "residuals", "converged")]
    found = FoundPairs(numbers[0], numbers[1], numbers[2], pairs.steps, EIGENVECTORS)
    return dataclasses.replace(result, run=dataclasses.replace(result.run, eigenpairs=found))


def _identity(options: Options, model: jaxhess.LanguageModel, data: str) -> dict[str, Any]:
    """What must be the same when an unfinished run is resumed; the library adds the weights and the loss."""
    chosen = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
    config = {k: v for k, v in model.config.to_dict().items() if k not in FREE}
    return {"options": chosen, "data": data, "model": config}


def build_operator(options: Options, model: jaxhess.LanguageModel, batches: Any) -> jaxhess.LinearOperator:
    """The operator that the options name, on the parameters that they name."""
    arguments = (model.loss(options.logit_chunk), model.params, batches)
    accumulation = options.accumulation_dtype
    operator: jaxhess.LossOperator
    if options.operator == "gauss-newton":
        operator = jaxhess.GaussNewton(*arguments, accumulation_dtype=accumulation)
    elif options.operator == "empirical-fisher":
        operator = jaxhess.EmpiricalFisher(*arguments, accumulation_dtype=accumulation)
    elif options.operator == "monte-carlo-fisher":
        key = jax.random.fold_in(random_key(options.seed), 1)
        operator = jaxhess.MonteCarloFisher.draw(
            *arguments, key=key, samples=options.fisher_samples, accumulation_dtype=accumulation
        )
    elif options.hvp == "finite-difference":
        operator = jaxhess.FiniteDifferenceHessian(
            *arguments,
            step=options.step,
            per=options.step_per,
            shift=options.shift,
            accumulation_dtype=accumulation,
        )
    else:
        operator = jaxhess.Hessian(*arguments, accumulation_dtype=accumulation)
    layers = _layers(options.layers, model.config.num_layers)
    if options.restrict or layers is not None:
        operator = operator.restrict(*options.restrict, layers=layers)
    if options.hvp == "linearized" and isinstance(operator, jaxhess.Hessian):
        budget = None if options.residual_gb is None else 1e9 * options.residual_gb

        def announce(kept: int) -> None:
            if processes.index() == 0:
                print(f"Linearising keeps {kept / 1e9:.3g} GB on each device.")

        return jaxhess.linearize(operator, budget, announce)
    return operator


def _check_options(options: Options) -> None:
    if not options.model or not options.data:
        raise InputError("--model and --data must not be empty.")
    if options.steps < 1 or options.probes < 1:
        raise InputError(f"--steps {options.steps} and --probes {options.probes} must both be at least 1.")
    check_seed(options.seed)
    if options.checkpoint_every < 0:
        raise InputError(f"--checkpoint-every {options.checkpoint_every} must be a number of steps, or 0 for none.")
    if options.resume and options.out is None:
        raise InputError("--resume needs --out, the folder of the run to go on with.")
    if options.resume and not options.checkpoint_every:
        raise InputError(
            "--resume and --checkpoint-every 0 contradict each other: a run that is not saved has no rest."
        )
    if options.eigenpairs < 0 or options.eigenpairs > options.eigenpair_steps:
        raise InputError(
            f"--eigenpairs {options.eigenpairs} must be from 0 to --eigenpair-steps {options.eigenpair_steps}."
        )
    if not 0 < options.eigenpair_tolerance < 1:
        raise InputError(f"--eigenpair-tolerance {options.eigenpair_tolerance} must be between 0 and 1.")
    if options.fisher_samples < 1:
        raise InputError(f"--fisher-samples {options.fisher_samples} must be at least 1.")
    if options.operator != "hessian" and options.hvp != "exact":
        raise InputError(
            f"--hvp {options.hvp} is a way to make Hessian products; --operator {options.operator} has one."
        )
    if options.residual_gb is not None and not 0 < options.residual_gb < math.inf:
        raise InputError(f"--residual-gb {options.residual_gb} must be a positive number.")
    if isinstance(options.step, float) and not 0 < options.step < math.inf:
        raise InputError(f"--step {options.step} must be a positive number, or auto.")


def _layers(text: str | None, count: int) -> list[int] | None:
    """The layers that `0-3,-1` names."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise InputError(f"--layers {text!r} is not a list of layers and ranges, like 0-3,-1.")
        first, last = int(match[1]), int(match[2] or match[1])
        if match[2] and not 0 <= first <= last < count:
            raise InputError(f"--layers {text!r}: ranges go up, and the model has layers 0 to {count - 1}.")
        found.extend(range(first, last + 1))
    return found


class _Bar:
    """Progress with the current extreme Ritz values and the time left; a line per probe where there is no terminal."""

    def __init__(self, console: Console, keep: bool):
        """`keep`: the state after the last step, whose basis then serves the eigenpairs too, stays as `last`."""
        self.console, self.keep = console, keep
        self.last: jaxhess.LanczosState | None = None
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

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def show(self, progress: jaxhess.Progress) -> None:
        if self.keep and progress.step == progress.steps and progress.probe + progress.together == progress.probes:
            self.last = progress.state
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
    options = tyro.cli(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
