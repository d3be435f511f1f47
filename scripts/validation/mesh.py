"""The same training on one device and on a mesh: losses, gradients and spectra compared along the way.

Exit status 0 only if all agree within rounding, which is measured by the same training with its sums in another order:
one sequence at a time. To try it without the hardware:

    JAX_NUM_CPU_DEVICES=8 python -m scripts.validation.mesh
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import convert
import jaxhess
from convert.text import load_blocks
from jaxhess.command import compile_quickly, one_sentence, terminal
from jaxhess.data import TokenBlocks
from jaxhess.errors import InputError
from jaxhess.files.output import OutputFile
from jaxhess.files.run_folder import json_ready
from jaxhess.models import LanguageModel
from jaxhess.results.comparison import wasserstein
from jaxhess.vectors import cast

TINY = Path(__file__).parents[1] / "tiny"
FACTOR = 10.0
"""The mesh may be so many times as far from one device as one device is from itself with its sums in another order.
Both are rounding, magnified by the same training; more than a digit apart they are not."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Short on purpose: an error of the mesh shows in the first step."""

    model: str = str(TINY)
    """Hugging Face checkpoint directory, directory made by `python -m convert`, or hub id."""
    data: str = str(TINY / "sample.txt")
    """Text file, folder of text, .npy/.npz of tokens, `random`, or hub:NAME[@CONFIG][:SPLIT[:COLUMN]]."""
    mesh: str | None = None
    """The mesh, for example fsdp=4,tensor=2; by default fsdp over all devices."""
    seq_len: int = 32
    """Predicted tokens per sequence."""
    batch: int = 8
    """Sequences of a training step, in two microbatches; the run that measures rounding takes them one at a time."""
    train_steps: int = 4
    """Training steps (AdamW)."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    spectrum_every: int = 2
    """Training steps between two spectra; there is one before the first step too."""
    steps: int = 6
    """Lanczos steps of each."""
    dtype: str | None = None
    """Of weights and computation; by default the checkpoint's own."""
    seed: int = 0
    """Of the probes."""
    out: Path | None = None
    """JSON file for all numbers; by default none is written."""
    overwrite: bool = False
    """Replace that file."""


@dataclasses.dataclass(frozen=True)
class Course:
    """What was seen along a training: [steps] losses and gradients (by leaf, on the host), and spectra."""

    losses: np.ndarray
    gradients: list[list[np.ndarray]]
    spectra: list[jaxhess.Spectrum]


def run(options: Options) -> bool:
    """The whole comparison; whether the mesh agrees."""
    for name in ("seq_len", "batch", "train_steps", "spectrum_every", "steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")
    if options.batch < 4:
        raise InputError(
            f"--batch is {options.batch}; it must be at least 4: rounding is measured by the same training one "
            "sequence at a time instead of half the batch."
        )
    out = None if options.out is None else OutputFile(options.out, "mesh", options.overwrite)
    mesh = jaxhess.make_mesh(options.mesh)
    config = convert.load_config(options.model, options.dtype)
    blocks = load_blocks(
        options.data,
        options.model,
        seq_len=options.seq_len,
        vocab_size=config.vocab_size,
        sequences=options.batch * options.train_steps,
        seed=options.seed,
    )
    if mesh.size == 1:
        raise InputError("The mesh has one device: there is nothing to compare. JAX_NUM_CPU_DEVICES=8 simulates eight.")
    half = options.batch // 2
    one = train(options, convert.load(options.model, None, options.dtype), blocks, half)
    again = train(options, convert.load(options.model, None, options.dtype), blocks, 1)
    many = train(options, convert.load(options.model, mesh, options.dtype), blocks, half)
    rows = compared(one, many, again)
    record = {"rows": [dict(zip(HEAD, r, strict=True)) for r in rows], "agrees": all(r[-1] for r in rows)}
    if out is not None:
        out.write(json_ready(record))
    show(terminal(), rows, mesh)
    return bool(record["agrees"])


HEAD = ("quantity", "one device", "mesh", "apart", "one device, other order", "agrees")


def train(options: Options, model: LanguageModel, blocks: TokenBlocks, microbatch: int) -> Course:
    """The losses, gradients and spectra of a short training."""
    optimizer = optax.adamw(options.learning_rate)
    loss = model.loss()
    params, state = model.params, optimizer.init(model.params)
    losses, gradients, spectra = [], [], []
    for step in range(options.train_steps):
        rows = slice(step * options.batch, (step + 1) * options.batch)
        batch = TokenBlocks(blocks.tokens[rows], blocks.weights[rows]).microbatches(microbatch, model.mesh)
        operator = jaxhess.Hessian(loss, params, jaxhess.Microbatches(batch))
        if step % options.spectrum_every == 0:
            spectra.append(jaxhess.spectrum(operator, steps=options.steps, probes=1, seed=options.seed))
        value, gradient, params, state = training_step(operator, state, optimizer=optimizer)
        losses.append(float(value))
        gradients.append([np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)])
    return Course(np.array(losses), gradients, spectra)


@functools.partial(jax.jit, static_argnames="optimizer")
def training_step(
    operator: jaxhess.Hessian, state: Any, *, optimizer: optax.GradientTransformation
) -> tuple[jax.Array, Any, Any, Any]:
    """The mean loss before the step, its gradient, and the new parameters and optimizer state."""
    value, gradient = operator.value_and_gradient()
    gradient = operator.pin(cast(gradient, operator.params))
    updates, state = optimizer.update(gradient, state, operator.params)
    return value, gradient, operator.pin(optax.apply_updates(operator.params, updates)), state


def compared(one: Course, many: Course, again: Course) -> list[tuple[str, float, float, float, float, bool]]:
    """A row for every loss, gradient and spectrum: values, and relative distances from those on one device."""
    least = float(np.finfo(np.float32).eps)

    def judged(name: str, a: float, b: float, apart: float, chance: float) -> tuple:
        agrees = math.isfinite(apart) and apart <= FACTOR * max(chance, least)
        return name, a, b, apart, chance, agrees

    def size(x: list[np.ndarray]) -> float:
        return math.sqrt(sum(float(np.sum(e**2)) for e in x))

    def away(x: list[np.ndarray], y: list[np.ndarray]) -> float:
        return size([e - f for e, f in zip(x, y, strict=True)]) / size(y)

    rows = []
    for k in range(len(one.losses)):
        a, b, c = (course.losses[k] for course in (one, many, again))
        rows.append(judged(f"loss, step {k}", a, b, abs(b - a) / a, abs(c - a) / a))
        g, h, i = (course.gradients[k] for course in (one, many, again))
        rows.append(judged(f"gradient, step {k}", size(g), size(h), away(h, g), away(i, g)))
    for k, (s, t, u) in enumerate(zip(one.spectra, many.spectra, again.spectra, strict=True)):
        scale = float(np.nansum(s.weights * np.abs(s.ritz_values)))
        top = [x.extreme().largest.value for x in (s, t, u)]
        rows.append(judged(f"spectrum {k}: largest", *top[:2], *(abs(x - top[0]) / abs(top[0]) for x in top[1:])))
        rows.append(judged(f"spectrum {k}: density", scale, scale, *(wasserstein(s, x) / scale for x in (t, u))))
    return rows


def show(console: Console, rows: list[tuple], mesh: jax.sharding.Mesh) -> None:
    """The table, and the verdict."""
    table = Table(*HEAD[:-1], "", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, a, b, apart, chance, agrees in rows:
        cells = (name, f"{a:.7g}", f"{b:.7g}", f"{apart:.1e}", f"{chance:.1e}", "agree" if agrees else "DIFFER")
        table.add_row(*cells, style=None if agrees else "bold red")
    console.print(table)
    first = next((row[0] for row in rows if not row[-1]), None)
    where = ",".join(f"{k}={v}" for k, v in mesh.shape.items() if v > 1)
    console.print(f"{where}: " + ("all agree within rounding." if first is None else f"they differ first at: {first}."))


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    compile_quickly()
    with one_sentence():
        agrees = run(options)
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()
