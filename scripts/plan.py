"""What a run of `scripts/spectrum.py` with the same options would take: memory, FLOPs, traffic, time; whether it fits.

No weights, no text and no GPU are needed. The program itself is compiled, for simulated devices.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import run_options  # beside this file
from rich.console import Console
from rich.table import Table

import convert
from jaxhess import plan as planning
from jaxhess.command import compile_quickly, one_sentence, parse, simulated_devices, terminal
from jaxhess.distributed.mesh import make_mesh, parse_axes
from jaxhess.errors import InputError
from jaxhess.files.output import OutputFile
from jaxhess.files.run_folder import json_ready
from jaxhess.plan.hardware import ACCELERATORS


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The options of `scripts/spectrum.py`, and four more: --hardware, --efficiency, --compile and --json. Plans are of
    the whole Hessian, with exact products or finite differences, for one probe at a time; others are refused.
    `--model` may also be a config.json; what a plan does not depend on (--data, --out, --seed and others) is
    ignored."""

    hardware: tuple[str, ...] = tuple(ACCELERATORS)
    """What to plan for; by default all that are known."""
    efficiency: float = planning.EFFICIENCY
    """Share of the peak rate that matrix products are taken to reach; the hours are proportional to it."""
    compile: bool = True
    """Compile the program, for facts beside the formulas; without it a plan takes a second."""
    json: Path | None = None
    """File for the plan; one that is there is replaced with --overwrite, if it is a plan."""


def run(options: Options) -> dict[str, Any]:
    """The plan, as it is written to `--json`."""
    out = None if options.json is None else OutputFile(options.json, "plan", options.overwrite)
    job = job_of(options)
    for name in options.hardware:
        planning.verdict.accelerator(name)
    if not 0 < options.efficiency <= 1:
        raise InputError(f"--efficiency {options.efficiency} must be a share, above 0 and at most 1.")
    memory = planning.memory(job)
    parts = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    facts: dict[str, Any] = {
        "command": command(options),
        "parameters": sum(x.size for x in jax.tree.leaves(job.params())),
        "dtype": job.config.dtype,
        "devices": job.devices,
        "microbatches": job.microbatches,
        "products": job.products,
        "formula": {
            "bytes_per_device": {
                **parts,
                "arguments": memory.arguments,
                "outputs": memory.outputs,
                "total": memory.total,
            },
            "flops_per_product_per_device": planning.flops(job),
            "flops_of_the_run": planning.flops(job) * job.devices * job.products,
            "traffic_per_product_per_device": planning.traffic(job),
        },
        "hardware": {name: _on(job, name, options.efficiency) for name in options.hardware},
    }
    if options.compile:
        found = dataclasses.asdict(
            planning.compiled(job, make_mesh(job.axes or {"fsdp": 1}, simulated_devices(job.devices)))
        )
        facts["compiled"] = {key: value for key, value in found.items() if _is_sound(key, job)}
    if out is not None:
        out.write(json_ready(_rounded(facts)))
    show(terminal(), facts)
    return facts


def job_of(options: Options) -> planning.Job:
    """The job that the options describe.

    Raises:
        InputError: There is no plan for one of them.
    """
    without_plan = {
        "operator": options.operator != "hessian",
        "hvp": options.hvp == "linearized",
        "restrict": bool(options.restrict),
        "layers": options.layers is not None,
        "eigenpairs": options.eigenpairs > 0,
        "batch-size": options.batch_size not in (None, 1),
        "shift": options.shift == "float32" and options.hvp == "finite-difference",
    }
    for name, asked in without_plan.items():
        if asked:
            raise InputError(
                f"There is no plan for --{name} {getattr(options, name.replace('-', '_'))}: plans are of the whole "
                "Hessian, by exact products or finite differences, one probe at a time."
            )
    config = convert.read_config(options.model, options.dtype)
    names = {field.name for field in dataclasses.fields(planning.Job)} - {"config", "axes", "hvp"}
    return planning.Job(
        config=dataclasses.replace(config, query_chunk=options.query_chunk),
        axes=parse_axes(options.mesh) if options.mesh else {},
        hvp="exact" if options.hvp == "exact" else "finite-difference",
        **{name: getattr(options, name) for name in names},
    )


def command(options: Options) -> str:
    """The command that makes this plan: every option that is not the default."""
    words = ["python", "scripts/plan.py"]
    defaults = dict(_flat(Options()))
    for name, value in _flat(options):
        if value == defaults[name] or name == "json":
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _flat(options: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the options as they are on the command line."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value)
        else:
            yield field.name, value


def show(console: Console, facts: dict[str, Any]) -> None:
    """The plan as tables."""
    formula, compiled = facts["formula"], facts.get("compiled")
    console.print(
        f"{facts['parameters']:,} parameters in {facts['dtype']} on {facts['devices']} devices; {facts['products']} "
        f"products, each over {facts['microbatches']} microbatches."
    )
    if facts["devices"] == 1:
        console.print("This is the plan of one device; --mesh plans for more.")
    table = Table("on each device", "GB by formula", "GB compiled")
    rows = {
        "parameters": "theta", "each of two Lanczos vectors": "vector", "stored basis": "basis", "tokens": "batch",
        "product and sums": "result", "states between layers": "saved", "one layer, or one slice of logits": "working",
        "audit of noise, its peak": "audit", "kept by the host": "host",
        "arguments": "arguments", "outputs, in their place": "outputs", "temporaries": "temporaries", "peak": "total",
    }  # fmt: skip
    for name, key in rows.items():
        found = compiled.get(key) if compiled else None
        if key == "total" and compiled and "temporaries" in compiled:
            found = compiled["arguments"] + compiled["temporaries"]
        table.add_row(name, _giga(formula["bytes_per_device"][key]), "" if found is None else _giga(found))
    console.print(table)
    if compiled and facts["dtype"] not in ("float32", "float64"):
        console.print(
            f"Compiled for CPUs, which widen {facts['dtype']}: the formula's temporaries are nearer to a GPU's."
        )
    table = Table("one product, on each device", "by formula", "compiled")
    table.add_row(
        "TFLOPs",
        f"{formula['flops_per_product_per_device'] / 1e12:.4g}",
        f"{compiled['flops'] / 1e12:.4g}" if compiled else "",
    )
    for kind, received in formula["traffic_per_product_per_device"].items():
        found = compiled["traffic"][kind] if compiled and "traffic" in compiled else None
        if received or found:
            table.add_row(f"{kind}, GB received", _giga(received), "" if found is None else _giga(found))
    console.print(table)
    table = Table("hardware", "GB needed", "GB usable", "seconds a product", "GPU-hours", "verdict")
    for name, found in facts["hardware"].items():
        verdict = "fits" if found["fits"] else "; or ".join(found["changes"]) or "does not fit 4,096 devices"
        table.add_row(
            name,
            _giga(found["needed"]),
            _giga(found["usable"]),
            f"{found['seconds_per_product']:.3g}",
            f"{found['device_hours']:.3g}",
            verdict,
        )
    console.print(table)
    if any(found["fits"] and found["needed"] > 0.75 * found["usable"] / 0.92 for found in facts["hardware"].values()):
        console.print("Where more than 0.75 of the memory is needed: export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.")
    console.print("One probe at a time, so --batch-size 1; by default a run takes as many together as fit.")


def _on(job: planning.Job, hardware: str, efficiency: float) -> dict[str, Any]:
    """The estimate on this hardware, and what to change where it does not fit."""
    found = planning.forecast(job, hardware, efficiency)
    changes = [] if found.fits else [words for words, _ in planning.changes(job, hardware)]
    return {**dataclasses.asdict(found), "fits": found.fits, "changes": changes}


def _is_sound(fact: str, job: planning.Job) -> bool:
    """Whether a CPU's compiler gives this fact for other devices too: not where it widens narrow types."""
    dtypes = (job.dtype, job.vector_dtype, job.basis_dtype)
    return all(d in ("float32", "float64") for d in dtypes) or fact not in ("temporaries", "traffic")


def _giga(x: float) -> str:
    return f"{x / 1e9:.4g}"


def _rounded(facts: Any) -> Any:
    """Six digits of every number that is not counted."""
    if isinstance(facts, dict):
        return {key: _rounded(value) for key, value in facts.items() if key != "seconds"}
    return float(f"{facts:.6g}") if isinstance(facts, float) and math.isfinite(facts) else facts


def main() -> None:
    """Reads the options and plans."""
    options = parse(Options, description=__doc__)
    with one_sentence():
        jax.config.update("jax_platforms", "cpu")
        compile_quickly()  # the program is never run: its memory and operations are settled before machine code is
        run(options)


if __name__ == "__main__":
    main()
