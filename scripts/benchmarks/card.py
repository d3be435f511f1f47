"""Predicted against measured, on the card at hand: time and memory of Lanczos steps of a 0.6B and an 8B model.

    python -m scripts.benchmarks.card

Weights are random and tokens too: neither changes what a product takes. The prediction is the roofline of the very
program that runs, and its memory as the compiler says; measured are seconds a step, without the first segment, and the
most memory that the device had in use.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import convert
import jaxhess
from jaxhess import plan
from jaxhess.command import one_sentence, terminal
from jaxhess.data import TokenBatch
from jaxhess.distributed.mesh import batch_sharding
from jaxhess.errors import InputError
from jaxhess.files.output import OutputFile
from jaxhess.files.run_folder import json_ready
from jaxhess.krylov import compile_segment
from jaxhess.models import initialize
from jaxhess.operators import Microbatches
from jaxhess.plan.compiled import facts_of
from jaxhess.plan.hardware import accelerator, card_of
from jaxhess.vectors import random_key

CONFIGS = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Options:
    """What runs."""

    models: tuple[str, ...] = ("qwen3-0.6b", "llama-3.1-8b")
    """Names of files in `scripts/benchmarks/configs`; those that do not fit are left out, and said to be."""
    hvp: Literal["exact", "finite-difference"] = "exact"
    """How products are made; finite differences with a step of 1e-3 per coordinate."""
    seq_len: int = 2048
    """Tokens of the one sequence on each device."""
    steps: int = 10
    """Lanczos steps that are timed, after as many others; nothing is kept for re-orthogonalisation."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, products and vectors."""
    out: Path | None = None
    """File for the figures, as JSON."""
    overwrite: bool = False
    """Replace that file."""


def run(options: Options) -> dict[str, Any]:
    """Predicted and measured figures of every model, by name, with the card's name."""
    if options.steps < 1 or options.seq_len < 1:
        raise InputError("--steps and --seq-len must be at least 1.")
    out = None if options.out is None else OutputFile(options.out, "card", options.overwrite)
    devices = jax.devices()
    card = card_of(devices[0].device_kind)
    jobs = {name: _job(options, name, len(devices)) for name in options.models}
    facts: dict[str, Any] = {
        "card": card,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "jax": jax.__version__,
        "models": {name: measured(job, card) for name, job in jobs.items()},
    }
    if out is not None:
        out.write(json_ready(facts))
    show(terminal(), facts)
    return facts


def measured(job: plan.Job, card: str) -> dict[str, Any]:
    """What the plan says of the job on all devices, and what it takes; without the latter where it does not fit."""
    mesh = jaxhess.make_mesh(job.axes)
    model = initialize(job.config, random_key(0), mesh)
    size = (1, job.sequences, job.seq_len)
    tokens = jax.random.randint(jax.random.key(1), (1, job.sequences, job.seq_len + 1), 0, job.config.vocab_size)
    batch = jax.device_put(TokenBatch(tokens, jnp.ones(size)), batch_sharding(mesh, axis=1))
    batches = Microbatches(batch)
    loss, params = model.loss(job.logit_chunk), model.params
    if job.hvp == "exact":
        operator: Any = jaxhess.Hessian(loss, params, batches)
    else:
        operator = jaxhess.FiniteDifferenceHessian(loss, params, batches, step=1e-3)
    probe = jaxhess.random_probe(random_key(2), operator.shape_dtype)
    state = jaxhess.start_lanczos([probe], job.steps, job.storage)
    del probe
    compiled = facts_of(compile_segment(operator, state))
    roofline = plan.roofline(compiled.program, card)
    predicted = {
        "seconds": roofline.seconds,
        "ceiling": roofline.ceiling,
        "bytes": compiled.arguments + compiled.temporaries,
        "formula_bytes": plan.memory(job).arguments + plan.memory(job).temporaries,
    }
    if not plan.gpu.fits(accelerator(card), compiled.arguments, compiled.temporaries):
        return {"predicted": predicted, "measured": None}
    half = job.steps // 2
    state = jax.block_until_ready(jaxhess.lanczos_segment(operator, state, half))
    began = time.perf_counter()
    state = jax.block_until_ready(jaxhess.lanczos_segment(operator, state, job.steps))
    seconds = (time.perf_counter() - began) / (job.steps - half)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    share = compiled.flops / seconds / accelerator(card).peaks[job.dtype]
    return {"predicted": predicted, "measured": {"seconds": seconds, "bytes": peak, "share_of_peak": share}}


def _job(options: Options, name: str, devices: int) -> plan.Job:
    return plan.Job(
        convert.read_config(CONFIGS / f"{name}.json", options.dtype),
        {"fsdp": devices},
        seq_len=options.seq_len,
        sequences=devices,
        microbatch=devices,
        hvp=options.hvp,
        steps=2 * options.steps,
        probes=1,
        storage=jaxhess.Storage("none"),
    )


def show(console: Console, facts: dict[str, Any]) -> None:
    """The figures as a table."""
    console.print(f"{facts['devices']} of {facts['device_kind']} ({facts['card']}), JAX {facts['jax']}")
    table = Table("model", "s a step, predicted", "measured", "GB, predicted", "by the formula", "measured")
    for name, found in facts["models"].items():
        before, after = found["predicted"], found["measured"]
        table.add_row(
            name,
            f"{before['seconds']:.3g}",
            "does not fit" if after is None else f"{after['seconds']:.3g}",
            f"{before['bytes'] / 1e9:.4g}",
            f"{before['formula_bytes'] / 1e9:.4g}",
            "" if after is None or after["bytes"] is None else f"{after['bytes'] / 1e9:.4g}",
        )
    console.print(table)


def main() -> None:
    """Reads the options and runs."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        run(options)


if __name__ == "__main__":
    main()
