"""Blocks of a language model's loss curvature: how strongly they are coupled, what block-diagonal approximations miss,
and the spectrum of each.

With no options: the small GPT-NeoX model in scripts/tiny, by layers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import run_options  # beside this file, as the next
import run_parts
import tyro
from remat_choice import choose_remat
from rich.console import Console

import jaxhess
from jaxhess.command import one_sentence, parse, terminal
from jaxhess.distributed import processes
from jaxhess.errors import InputError
from jaxhess.files.run_folder import BLOCK_FILES
from jaxhess.models import abstract_params
from jaxhess.operators.facts import describe, validated
from jaxhess.operators.restriction import restriction
from jaxhess.results.block_files import BlockRun, contents
from jaxhess.results.block_report import report_files
from jaxhess.slq.record import Probes, RunRecord, inputs_record, operator_record
from jaxhess.structure.coupling import CouplingProgress

MAP, SPECTRA = "unfinished", "unfinished-spectra"
FREE = {*run_parts.FREE, "together"}


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The options of a run over blocks."""

    by: tuple[str, ...] = ("layers",)
    """The blocks: `layers`, `kinds`, `matrices`, `heads`, or patterns of names that leave nothing out, a block for
    each, such as: embed layers final_norm head."""
    spectra: bool = False
    """Also compute the spectrum of every diagonal block: --steps products of every block for each of --probes."""
    products: int | None = None
    """Probes of the coupling map, each a product for every block; by default as many as --probes, 0 for no map."""
    together: int | None = None
    """Blocks whose products are computed at once and share a primal pass; by default as many as fit into memory. Each
    takes the memory of two vectors."""
    sequences: int = 8
    """Sequences taken from the start of the data; the loss is the mean over all their tokens."""
    steps: int = 20
    """Lanczos steps per probe, with --spectra."""
    resume: bool = False
    """Resume the unfinished run in --out; if there is none, start one. Model, data and the options that determine the
    numbers must be the same; --mesh, --microbatch, --query-chunk, --logit-chunk, --attention, --remat and
    --residual-gb may differ; what --remat auto chose, and how many blocks go together, is kept."""
    audit: tyro.conf.Suppress[bool] = False
    eigenpairs: tyro.conf.Suppress[int] = 0
    eigenpair_tolerance: tyro.conf.Suppress[float] = 1e-3
    eigenpair_steps: tyro.conf.Suppress[int] = 100
    batch_size: tyro.conf.Suppress[int | None] = None


def run(options: Options) -> BlockRun:
    """The whole job; returns what it also saved."""
    run_options.check(options)
    if options.products is not None and options.products < 0:
        raise InputError(f"--products {options.products} must be a number of probes, or 0 for no map.")
    probes = options.probes if options.products is None else options.products
    if not probes and not options.spectra:
        raise InputError("--products 0 without --spectra leaves nothing to compute.")
    console = terminal(quiet=processes.index() > 0)
    clock = run_parts.Clock()
    name = f"{Path(options.model).name}-blocks"
    with run_parts.run_folder(options, name, BLOCK_FILES, (MAP, SPECTRA)) as (output, checkpoints):
        config = run_parts.read_config(options)
        chosen_blocks(options, config)  # before the weights are loaded
        begun = checkpoints[0] if probes else checkpoints[1]
        mesh = jaxhess.make_mesh(options.mesh)
        tokens = run_parts.read_data(options, config)
        clock.stop("data")
        config = choose_remat(options, config, mesh, begun, console)
        checkpoints = [run_parts.identified(c, options, config, tokens, FREE) for c in checkpoints]
        model = run_parts.load(options, config, mesh)
        batches = jaxhess.Microbatches(tokens.microbatches(options.microbatch, mesh))
        clock.stop("load")
        operator = run_parts.build(options, model, batches, console)
        blocks = jaxhess.Blocks.by(operator, *options.by)
        console.print(
            f"{options.model}: {model.num_params:,} parameters in {config.dtype}; {tokens.num_sequences} sequences of "
            f"{tokens.seq_len} tokens; {len(blocks)} blocks."
        )
        clock.stop("operator")
        if options.overwrite and not options.resume:
            for checkpoint in checkpoints:
                checkpoint.remove()
        coupling = coupled(options, operator, blocks, probes, checkpoints[0], console) if probes else None
        clock.stop("map")
        spectra = with_spectra(options, operator, blocks, checkpoints[1], console) if options.spectra else None
        clock.stop("spectra")
        result = BlockRun(
            dataclasses.replace(
                spectra.spectra[0].run if spectra else mapped(options, operator, probes),
                job=run_parts.job_record(options, model, tokens, batches, mesh, clock.seconds),
            ),
            coupling,
            spectra,
        )
        processes.on_first(lambda: output.write(contents(result)))
        processes.on_first(lambda: output.write(report_files(result)))
        for checkpoint in checkpoints:
            checkpoint.remove()
    print_summary(console, result, output.folder)
    return result


def chosen_blocks(options: Options, config: jaxhess.DecoderConfig) -> None:
    """Raises InputError where --by is no partition of the model's parameters."""
    params, stacks = abstract_params(config), config.stacks
    layers = run_options.layer_numbers(options.layers, config.num_layers)
    if options.restrict or layers is not None:
        chosen = restriction(params, options.restrict, layers, stacks)
        params, kept = chosen.take(params), chosen.block.layers
        if kept is not None:
            stacks = {name: tuple(n for n in numbers if n in kept) for name, numbers in stacks.items()}
    jaxhess.Blocks.by(params, *options.by, stacks=stacks)


def coupled(
    options: Options,
    operator: jaxhess.LinearOperator,
    blocks: jaxhess.Blocks,
    probes: int,
    checkpoint: jaxhess.Checkpoint,
    console: Console,
) -> jaxhess.CouplingMap:
    """The coupling map, with a line for every probe."""

    def show(progress: CouplingProgress) -> None:
        console.print(f"coupling, probe {progress.done} of {progress.probes}: {progress.seconds:.1f} s")

    return jaxhess.coupling_map(
        operator,
        blocks,
        probes=probes,
        seed=options.seed,
        distribution=options.probe_distribution,
        together=options.together,
        checkpoint=checkpoint if options.checkpoint_every else None,
        callback=show,
    )


def with_spectra(
    options: Options,
    operator: jaxhess.LinearOperator,
    blocks: jaxhess.Blocks,
    checkpoint: jaxhess.Checkpoint,
    console: Console,
) -> jaxhess.BlockSpectra:
    """The spectra of all blocks."""
    with run_parts.ProgressBar(console) as bar:
        return jaxhess.block_spectra(
            operator,
            blocks,
            steps=options.steps,
            probes=options.probes,
            seed=options.seed,
            storage=options.storage,
            together=options.together,
            distribution=options.probe_distribution,
            checkpoint=checkpoint if options.checkpoint_every else None,
            callback=bar.show,
        )


def mapped(options: Options, operator: jaxhess.LinearOperator, probes: int) -> RunRecord:
    """The record of a run that has a map alone."""
    return RunRecord(
        probes=Probes(probes, options.probe_distribution, options.seed),
        operator=operator_record(describe(operator)),
        inputs=inputs_record(validated(operator)),
    )


def print_summary(console: Console, result: BlockRun, out: Path) -> None:
    """What was found, in a few lines."""
    if (found := result.coupling) is not None:
        console.print(f"Frobenius norm     {found.frobenius_norm()}")
        error = found.relative_error(np.eye(len(found.names), dtype=bool))
        console.print(f"block-diagonal     misses {error} of it")
        console.print(
            f"of a product       error {np.median(found.whole_error):.3g}, cosine {np.median(found.whole_cosine):.3g} "
            "(median over probes)"
        )
    if result.spectra is not None:
        largest = [float(np.nanmax(s.ritz_values)) for s in result.spectra.spectra]
        b = int(np.argmax(largest))
        console.print(f"largest Ritz value {largest[b]:.6g} of {result.spectra.names[b]}")
    console.print(f"written to         {out}/report.html")


def main() -> None:
    """Reads the options and runs."""
    options = parse(Options, description=__doc__)
    with one_sentence(several=True):
        run(options)


if __name__ == "__main__":
    main()
