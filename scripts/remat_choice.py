"""What the backward passes of a run compute again: as asked for, as in the run that is resumed, or as much as fits."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import Mesh
from rich.console import Console
from run_options import REMATS, Options  # beside this file

import jaxhess
from jaxhess import plan
from jaxhess.distributed import processes
from jaxhess.distributed.memory import available_bytes, host_bytes
from jaxhess.errors import InputError
from jaxhess.models.config import Remat
from jaxhess.plan.verdict import FASTEST_FIRST, fitting_remat

AGAIN = {
    "on": "whole layers",
    "feed-forward": "the feed-forward of layers and attention's scores",
    "attention": "attention's scores",
    "off": "no matrix product",
}


def choose_remat(
    options: Options, config: jaxhess.DecoderConfig, mesh: Mesh, checkpoint: jaxhess.Checkpoint, console: Console
) -> jaxhess.DecoderConfig:
    """The configuration with what is computed again; the same in all processes, and said on the console.

    A run that is resumed keeps what it had, for its steps to be the same program, unless the option asks for another.
    """
    known = checkpoint.known().get("remat") if options.resume else None
    if options.remat != "auto":
        remat, reason = REMATS[options.remat], "as asked for"
    elif known in REMATS.values():
        remat, reason = known, "as in the run that is resumed"
    else:
        remat, reason = _fitting(options, config, mesh)
    word = next(word for word, value in REMATS.items() if value == remat)
    console.print(f"Backward passes compute {AGAIN[word]} again (--remat {word}): {reason}.")
    return dataclasses.replace(config, remat=remat)


def _fitting(options: Options, config: jaxhess.DecoderConfig, mesh: Mesh) -> tuple[Remat, str]:
    """The fastest choice that fits by the plan, for one probe or as many as are asked for, and why it is that."""
    if options.hvp == "linearized":
        return False, "linearised products keep one pass"
    names = {field.name for field in dataclasses.fields(plan.Job)} - {"config", "axes", "hvp", "batch_size"}
    try:
        job = plan.Job(
            dataclasses.replace(config, query_chunk=options.query_chunk, attention=options.attention),
            dict(mesh.shape),
            hvp=options.hvp if options.operator == "hessian" else "exact",
            batch_size=options.batch_size or 1,
            **{name: getattr(options, name) for name in names},
        )
    except InputError:
        return True, "there is no plan for this run"
    free = available_bytes(jax.tree.leaves(job.params(mesh)))
    left = min(processes.gathered(free if math.isfinite(free) else host_bytes()))
    # On one CPU a program that computes nothing again makes the primal pass once for all steps.
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    remat = fitting_remat(job, left, (False, *FASTEST_FIRST) if alone else FASTEST_FIRST)
    planned = dataclasses.replace(job, config=dataclasses.replace(job.config, remat=remat))
    return remat, f"{plan.memory(planned).total / 1e9:.3g} GB by the plan, {left / 1e9:.3g} GB free on each device"
