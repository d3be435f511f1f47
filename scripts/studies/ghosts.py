"""What re-orthogonalisation buys: ghosts, extreme eigenvalues and spectra without it, in part and in full, by steps.

With no options: the small GPT-NeoX model and the text in scripts/tiny, four minutes on two cores. Every variant starts
from the same probe.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import wasserstein_distance

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import one_sentence, terminal
from jaxhess.distributed.memory import bytes_per_device
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready
from jaxhess.krylov import compile_segment, lanczos_segment, orthogonality_loss, start_lanczos
from jaxhess.krylov.ghosts import classify, independent, unflagged
from jaxhess.krylov.quadrature import Quadrature, quadrature
from jaxhess.krylov.storage import Storage
from jaxhess.operators.facts import validate
from jaxhess.operators.precision import unit_roundoff
from jaxhess.results.figures import png
from jaxhess.vectors import random_key

TINY = Path(__file__).parent / "tiny"
RECORD, PLOT = "ghosts.json", "ghosts.png"


@dataclasses.dataclass(frozen=True)
class Options:
    """The reference is full re-orthogonalisation of vectors and scalars in float64, over the same products."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]."""
    seq_len: int = 64
    """Predicted tokens per sequence."""
    sequences: int = 2
    """Sequences taken from the start of the data."""
    microbatch: int = 2
    """Sequences whose activations exist at once."""
    steps: tuple[int, ...] = (10, 20, 40, 80)
    """Step counts to look at; the runs take the largest of them."""
    windows: tuple[int, ...] = (4, 16)
    """Sizes of the sliding window."""
    seed: int = 0
    """Of the probe."""
    mesh: str | None = None
    """Device mesh, for example fsdp=8; by default fsdp over all devices."""
    out: Path | None = None
    """Folder for table, plots and JSON; by default runs/<date>-ghosts."""
    overwrite: bool = False
    """Replace a finished study in that folder; files that no such command wrote are never replaced."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to store and re-orthogonalise."""

    name: str
    storage: Storage


def variants(options: Options) -> list[Variant]:
    """What is compared, the reference first."""
    return [
        Variant("reference", Storage(vector_dtype="float64", scalar_dtype="float64")),
        Variant("none", Storage("none")),
        *(Variant(f"window {r}", Storage(r)) for r in options.windows),
        Variant("full", Storage()),
        Variant("full, bf16 basis", Storage(basis_dtype="bfloat16")),
        Variant("none, bf16 vectors", Storage("none", "bfloat16")),
        *(Variant(f"{r}, bf16 vectors", Storage(r, "bfloat16")) for r in options.windows[-1:]),
        Variant("full, bf16 vectors", Storage(vector_dtype="bfloat16")),
    ]


def run(options: Options) -> dict[str, Any]:
    """The whole study; returns what it also saved."""
    out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-ghosts"
    with Output(out, (RECORD, PLOT), options.overwrite) as output:
        return study(options, output)


def study(options: Options, output: Output) -> dict[str, Any]:
    """The study, in a folder that no other writes into."""
    if not options.steps or min(options.steps) < 2 or any(r < 2 for r in options.windows):
        raise InputError(f"--steps {options.steps} and --windows {options.windows}: each must be at least 2.")
    config = convert.load_config(options.model, "float32")
    config.check_length(options.seq_len)
    console, began = terminal(), time.perf_counter()
    mesh = jaxhess.make_mesh(options.mesh)
    blocks = load_blocks(
        options.data,
        options.model,
        seq_len=options.seq_len,
        vocab_size=config.vocab_size,
        sequences=options.sequences,
        seed=options.seed,
    )
    jax.config.update("jax_enable_x64", True)
    model = convert.load(options.model, mesh=mesh, dtype="float32")
    batches = jaxhess.Microbatches(blocks.microbatches(options.microbatch, mesh))
    hessian = jaxhess.Hessian(model.loss(), model.params, batches)
    validate(hessian)
    results = []
    for variant in variants(options):
        found = measure(variant, hessian, max(options.steps), options.seed)
        results.append(found)
        console.print(f"{variant.name}: {found['seconds_per_step']:.2f} s per step", style="dim")
    record = {
        "options": dataclasses.asdict(options),
        "parameters": model.num_params,
        "data_fingerprint": blocks.fingerprint(),
        "variants": [compared(found, results[0], options.steps) for found in results],
        "seconds": time.perf_counter() - began,
    }
    text = json.dumps(json_ready(record), indent=1, allow_nan=False) + "\n"
    output.write({PLOT: png(plot(record)), RECORD: text.encode()})
    print_table(console, record)
    console.print(f"written to {output.folder} in {record['seconds']:.0f} s")
    return record


def measure(variant: Variant, operator: jaxhess.LinearOperator, steps: int, seed: int) -> dict[str, Any]:
    """One run: its tridiagonal, loss of orthogonality, time and memory."""
    probe = jaxhess.random_probe(random_key(seed), operator.shape_dtype)
    state = start_lanczos([probe], steps, variant.storage)
    memory = compile_segment(operator, state).memory_analysis()
    kept = {"vectors": (state.previous, state.current), "basis": state.basis}
    held = {name: bytes_per_device(jax.tree.leaves(x)) for name, x in kept.items()}
    one = bytes_per_device(jax.tree.leaves(operator.shape_dtype))
    state = jax.block_until_ready(lanczos_segment(operator, state, 1))  # compiles what is not yet
    began = time.perf_counter()
    state = jax.block_until_ready(lanczos_segment(operator, state, steps))
    seconds = (time.perf_counter() - began) / max(steps - 1, 1)
    alphas, betas, errors = state.tridiagonal()
    return {
        "name": variant.name,
        **dataclasses.asdict(variant.storage),
        "alphas": alphas,
        "betas": betas,
        "step_errors": errors,
        "orthogonality_loss": float(orthogonality_loss(state)[0]),
        "seconds_per_step": seconds,
        "stored_vectors": sum(held.values()) / one,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "rounding": unit_roundoff(operator, state.current),
    }


def compared(found: dict[str, Any], reference: dict[str, Any], steps: tuple[int, ...]) -> dict[str, Any]:
    """The run with ghosts, errors of the extremes and distances to the reference after each number of steps.

    `one_step_fewer` is the reference's own distance to itself without the last step: what the number of nodes does.
    """
    rows = []
    truth = _quadrature(reference, max(steps)).ritz_values
    for k in sorted(steps):
        nodes, exact = (_quadrature(r, k) for r in (found, reference))
        measured = None if np.isnan(found["orthogonality_loss"]) else (found["orthogonality_loss"],)
        orthogonal = bool(independent(found["reorthogonalize"], measured, np.array([k]))[0])
        ghosts = (unflagged(nodes) if orthogonal else classify(nodes, found["rounding"])).flags
        rows.append(
            {
                "steps": k,
                "ghosts": int(ghosts.sum()),
                "largest_error": abs(nodes.ritz_values[-1] / truth[-1] - 1),
                "smallest_error": abs(nodes.ritz_values[0] / truth[0] - 1),
                "wasserstein_1": _distance(nodes, exact),
                "one_step_fewer": _distance(_quadrature(reference, k - 1), exact),
            }
        )
    return {**found, "by_steps": rows}


def _quadrature(run: dict[str, Any], steps: int) -> Quadrature:
    return quadrature(*(run[name][:steps] for name in ("alphas", "betas", "step_errors")))


def _distance(a: Quadrature, b: Quadrature) -> float:
    """Wasserstein-1 distance of two spectra, in mean |eigenvalue| of the second."""
    distance = wasserstein_distance(a.ritz_values, b.ritz_values, a.weights, b.weights)
    return float(distance / (b.weights @ np.abs(b.ritz_values)))


COLORS = ("#1b2a41", "#c8553d", "#e09f3e", "#b08968", "#588157", "#2f6fb3", "#5fa8d3", "#8d5a97", "#6c757d", "#d4a5a5")


def plot(record: dict[str, Any]) -> Figure:
    """Ghosts, errors of the extremes, distance, each against the number of steps."""
    figure = Figure(figsize=(13, 9), dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2)
    titles = {
        "ghosts": "Ritz values flagged as ghosts",
        "wasserstein_1": "Wasserstein-1 distance to the reference, in mean |eigenvalue|",
        "largest_error": "error of the largest Ritz value, relative to the reference's last",
        "smallest_error": "error of the smallest Ritz value, relative to the reference's last",
    }
    for panel, (key, title) in zip(panels.flat, titles.items(), strict=True):
        for color, found in zip(COLORS, record["variants"], strict=False):
            rows = found["by_steps"]
            values = [row[key] if key == "ghosts" else max(row[key], 1e-16) for row in rows]
            if key == "wasserstein_1" and found["name"] == "reference":
                continue
            dashes = "--" if "bf16" in found["name"] else "-"
            panel.plot([r["steps"] for r in rows], values, "o", ls=dashes, ms=4, color=color, label=found["name"])
        if key == "wasserstein_1":
            rows = record["variants"][0]["by_steps"]
            fewer = [row["one_step_fewer"] for row in rows]
            panel.plot([r["steps"] for r in rows], fewer, "k:", label="reference, one step fewer")
        panel.set_yscale("symlog" if key == "ghosts" else "log")
        panel.set_ylim(bottom=-0.5 if key == "ghosts" else 1e-16)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("Lanczos steps")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    shown = {name: line for panel in panels.flat for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(f"Lanczos with and without re-orthogonalisation, {record['parameters']:,} parameters", fontsize=12)
    return figure


def print_table(console: Console, record: dict[str, Any]) -> None:
    """Every variant after the largest number of steps."""
    last = max(record["options"]["steps"])
    table = Table(title=f"After {last} steps", box=None, padding=(0, 0, 0, 1))
    for heading in ("", "ghosts", "largest", "smallest", "W1", "|Q'Q-I|", "vectors", "MB", "s/step"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for found in record["variants"]:
        row = found["by_steps"][-1]
        loss, temporaries = found["orthogonality_loss"], found["temporary_bytes"]
        table.add_row(
            found["name"],
            str(row["ghosts"]),
            *(f"{row[key]:.0e}" for key in ("largest_error", "smallest_error", "wasserstein_1")),
            "" if np.isnan(loss) else f"{loss:.0e}",
            f"{found['stored_vectors']:.3g}",
            "" if temporaries is None else f"{temporaries / 1e6:.0f}",
            f"{found['seconds_per_step']:.2f}",
        )
    console.print(table)
    fewer = record["variants"][0]["by_steps"][-1]["one_step_fewer"]
    console.print(f"W1 of the reference after {last - 1} steps from the reference after {last}: {fewer:.0e}.")
    console.print(
        "Errors of the extreme Ritz values are relative; W1 is in mean |eigenvalue|; both against float64 vectors with "
        "full re-orthogonalisation. |Q'Q-I| is over the stored vectors. Vectors are those held, in parameters' size; "
        "MB are temporaries of the program (a CPU widens a bf16 basis)."
    )


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
