"""What a run of `scripts/spectrum.py` with the same options would take: memory, FLOPs, traffic, time; whether it fits.

No weights, no text and no GPU are needed. The program itself is compiled: for the card named, where XLA's compiler for
GPUs is installed (pip install 'jaxhess[gpu-plan]'), else for simulated CPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

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
from jaxhess.plan import gpu
from jaxhess.plan.hardware import ACCELERATORS, accelerator, card_name
from jaxhess.plan.roofline import CUSTOM, LAUNCH, LINK, MATMUL, MEMORY
from jaxhess.plan.verdict import fitting_remat


@dataclasses.dataclass(frozen=True)
class Options(run_options.Options):
    """The options of `scripts/spectrum.py`, and four more: --card, --compiler, --price and --carbon. Plans are of the
    whole Hessian; other matrices and blocks of it are refused. `--model` may also be a config.json, `--out` is the
    plan's file; what a plan does not depend on (--data, --seed and others) is ignored."""

    card: str | None = None
    """What to plan for: A100-80GB, H100, H200 or B200. By default all of them, by the formulas."""
    compiler: Literal["auto", "gpu", "cpu", "none"] = "auto"
    """What the program is compiled with: for the card (gpu, one card is named and the extra gpu-plan is installed), for
    simulated CPUs, or not at all: a plan by the formulas takes a second. By default gpu where it can be."""
    price: float | None = None
    """Of an hour of one card, in any currency."""
    carbon: float | None = None
    """kg of CO2 for a kilowatt-hour, of the electricity that is used."""
    out: Path | None = None
    """File for the plan, as JSON; one that is there is replaced with --overwrite, if it is a plan."""


def run(options: Options) -> dict[str, Any]:
    """The plan, as it is written to `--out`."""
    out = None if options.out is None else OutputFile(options.out, "plan", options.overwrite)
    compiler = _compiler(options)
    for name in ("price", "carbon"):
        if (value := getattr(options, name)) is not None and not 0 <= value < math.inf:
            raise InputError(f"--{name} {value} must be a number, 0 or more.")
    job = job_of(options)
    cards = list(ACCELERATORS) if options.card is None else [card_name(options.card)]
    mesh, found = None, None
    axes = job.axes or {"fsdp": 1}
    if compiler == "gpu":
        mesh = _gpu_mesh(job, cards[0])
    elif compiler == "cpu":
        mesh = make_mesh(axes, simulated_devices(job.devices))
    memory = planning.memory(job)
    facts: dict[str, Any] = {
        "command": command(options),
        "parameters": sum(x.size for x in jax.tree.leaves(job.params())),
        "dtype": job.config.dtype,
        "remat": next(word for word, value in run_options.REMATS.items() if value == job.config.remat),
        "devices": job.devices,
        "microbatches": job.microbatches,
        "products": job.products,
        "batch_size": job.batch_size,
        "formula": {
            "bytes_per_device": {
                **dataclasses.asdict(memory),
                "arguments": memory.arguments,
                "outputs": memory.outputs,
                "total": memory.total,
            },
            "flops_per_product_per_device": planning.flops(job),
            "flops_of_the_run": planning.flops(job) * job.devices * job.products,
            "traffic_per_product_per_device": planning.traffic(job),
        },
    }
    if mesh is not None:
        with quiet_compiler():
            found = planning.compiled(job, mesh)
        sound = {key: value for key, value in found.facts().items() if compiler == "gpu" or _is_sound(key, job)}
        facts["compiled"] = {"compiler": compiler, **sound}
    if compiler == "gpu" and found is not None:
        facts["roofline"] = _roofline(planning.roofline(found.program, cards[0]))
    by_compiler = found if compiler == "gpu" else None
    facts["cards"] = {name: _on(job, name, by_compiler, options) for name in cards}
    if out is not None:
        out.write(json_ready(_rounded(facts)))
    show(terminal(), facts)
    return facts


def _compiler(options: Options) -> str:
    """What the program is compiled with."""
    if options.compiler == "gpu" and options.card is None:
        raise InputError(f"--compiler gpu compiles for one card: add --card, one of {', '.join(ACCELERATORS)}.")
    if options.compiler != "auto":
        return options.compiler
    at_hand = options.card is not None and gpu.available() and options.storage.basis_memory == "device"
    return "gpu" if at_hand else "cpu"


def job_of(options: Options) -> planning.Job:
    """The job that the options describe.

    Raises:
        InputError: There is no plan for one of them.
    """
    without_plan = {
        "operator": options.operator != "hessian",
        "restrict": bool(options.restrict),
        "layers": options.layers is not None,
        "precondition": options.precondition is not None,
        "eigenpairs": options.eigenpairs > 0,
        "shift": options.shift == "float32" and options.hvp == "finite-difference",
    }
    for name, asked in without_plan.items():
        if asked:
            raise InputError(
                f"There is no plan for --{name} {getattr(options, name)}: plans are of the whole Hessian, by exact or "
                "linearised products, or by finite differences with a realised shift."
            )
    config = convert.read_config(options.model, options.dtype)
    names = {field.name for field in dataclasses.fields(planning.Job)} - {"config", "axes", "batch_size"}
    config = dataclasses.replace(
        config,
        query_chunk=options.query_chunk,
        attention=options.attention,
        remat=run_options.REMATS.get(options.remat, options.hvp != "linearized"),
    )
    job = planning.Job(
        config=config,
        axes=parse_axes(options.mesh) if options.mesh else {},
        batch_size=options.batch_size or 1,
        **{name: getattr(options, name) for name in names},
    )
    if options.remat == "auto" and options.card is not None:
        remat = fitting_remat(job, gpu.memory_limit(accelerator(options.card)))
        job = dataclasses.replace(job, config=dataclasses.replace(config, remat=remat))
    return job


def command(options: Options) -> str:
    """The command that makes this plan: every option that is not the default."""
    words = ["python", "scripts/plan.py"]
    defaults = dict(_flat(Options()))
    for name, value in _flat(options):
        if value == defaults[name] or name == "out":
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
    formula, compiled = facts["formula"], facts.get("compiled", {})
    console.print(
        f"{facts['parameters']:,} parameters in {facts['dtype']} on {facts['devices']} devices; {facts['products']} "
        f"products, each over {facts['microbatches']} microbatches, with --remat {facts['remat']}."
    )
    if facts["devices"] == 1:
        console.print("This is the plan of one device; --mesh plans for more.")
    by = f"compiled ({compiled['compiler'].upper()})" if compiled else "compiled"
    table = Table("on each device", "GB by formula", f"GB {by}")
    rows = {
        "parameters": "theta", "each of two Lanczos vectors": "vector", "stored basis": "basis", "tokens": "batch",
        "kept by linearisation": "residuals",
        "product and sums": "result", "states between layers": "saved", "one layer, or one slice of logits": "working",
        "audit of noise, its peak": "audit", "kept by the host": "host",
        "arguments": "arguments", "outputs, in their place": "outputs", "temporaries": "temporaries", "peak": "total",
    }  # fmt: skip
    for name, key in rows.items():
        found = compiled.get(key)
        if key == "total" and "temporaries" in compiled:
            found = compiled["arguments"] + compiled["temporaries"]
        table.add_row(name, _giga(formula["bytes_per_device"][key]), "" if found is None else _giga(found))
    console.print(table)
    if compiled.get("compiler") == "cpu" and "temporaries" not in compiled:
        console.print(f"Compiled for CPUs, which widen {facts['dtype']}: temporaries and traffic are the formula's.")
    table = Table("one step, on each device", "by formula", by)
    table.add_row(
        "TFLOPs",
        f"{facts['batch_size'] * formula['flops_per_product_per_device'] / 1e12:.4g}",
        f"{facts.get('roofline', compiled)['flops'] / 1e12:.4g}" if compiled else "",
    )
    for kind, received in formula["traffic_per_product_per_device"].items():
        found = compiled["traffic"][kind] if "traffic" in compiled else None
        received *= facts["batch_size"]
        if received or found:
            table.add_row(f"{kind}, GB received", _giga(received), "" if found is None else _giga(found))
    console.print(table)
    if "roofline" in facts:
        _show_roofline(console, facts["roofline"])
    asked = [name for name in ("price", "carbon") if next(iter(facts["cards"].values()))[name] is not None]
    titles = {"price": "cost", "carbon": "kg CO2"}
    table = Table(
        *("card", "by", "GB needed", "GB usable", "s a product", "GPU-hours", "kWh"), *(titles[name] for name in asked)
    )
    for name, found in facts["cards"].items():
        numbers = ("seconds_per_product", "device_hours", "kilowatt_hours", *asked)
        shown = (f"{found[key]:.3g}" for key in numbers)
        table.add_row(name, found["source"], _giga(found["needed"]), _giga(found["usable"]), *shown)
    console.print(table)
    for name, found in facts["cards"].items():
        changes = "; or ".join(found["changes"]) or "nothing up to 4,096 devices"
        console.print(f"{name}: {'fits' if found['fits'] else f'does not fit; this would: {changes}'}.")
    if any(
        found["fits"] and found["needed"] > 0.75 / gpu.USABLE * found["usable"] for found in facts["cards"].values()
    ):
        console.print(
            f"Where more than 0.75 of the memory is needed: export XLA_PYTHON_CLIENT_MEM_FRACTION={gpu.USABLE}."
        )
    console.print("kWh are those of the cards at full power, without the servers around them.")


def _show_roofline(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"A step takes at least {found['seconds']:.3g} s: {found['ceiling']:.0%} of the rate that matrix products can "
        f"reach, {found['of_peak']:.0%} of the data sheet's. {found['launches']:,.0f} kernels, "
        f"{found['launch_seconds']:.2g} s between them; collectives {found['communication_seconds']:.2g} s, of which "
        f"{found['waiting_seconds']:.2g} s nothing else runs."
    )
    console.print(
        f"Assumed: {MATMUL:.0%} of the peak rate in matrix products ({CUSTOM:.0%} in Pallas kernels), {MEMORY:.1%} of "
        f"memory's, {LINK:.0%} of the links'; no cache between kernels; {LAUNCH * 1e6:.0f} us a launch."
    )
    table = Table("cause", "GB", "s")
    for cause, (moved, seconds) in found["by_cause"].items():
        table.add_row(cause, _giga(moved), f"{seconds:.3g}")
    console.print(table)
    table = Table("dearest kernels", "s", "GB", "TFLOPs", "times")
    for kernel in found["kernels"][:12]:
        table.add_row(
            kernel["source"],
            f"{kernel['seconds']:.3g}",
            _giga(kernel["bytes"]),
            f"{kernel['flops'] / 1e12:.3g}",
            f"{kernel['count']:,.0f}",
        )
    console.print(table)


def _roofline(found: planning.Roofline) -> dict[str, Any]:
    """As it is written."""
    return {
        **dataclasses.asdict(found),
        "ceiling": found.ceiling,
        "of_peak": MATMUL * found.ceiling,
        "by_cause": found.by_cause(),
        "assumed": {"matmul": MATMUL, "custom": CUSTOM, "memory": MEMORY, "link": LINK, "launch": LAUNCH},
    }


def _on(job: planning.Job, card: str, compiled: planning.Compiled | None, options: Options) -> dict[str, Any]:
    """The estimate on this card, and what to change where it does not fit."""
    found = planning.forecast(job, card, compiled)
    scale = 1.0 if compiled is None else found.needed / planning.memory(job).total
    changes = [] if found.fits else planning.changes(job, card, max(1.0, scale))
    return {
        **dataclasses.asdict(found),
        "price": None if options.price is None else options.price * found.device_hours,
        "carbon": None if options.carbon is None else options.carbon * found.kilowatt_hours,
        "changes": _compiled_changes(changes, card) if compiled is not None else [words for words, _ in changes],
    }


def _compiled_changes(changes: list[tuple[str, planning.Job]], card: str) -> list[str]:
    """The changes in words, the first that can be compiled and then fits with what the compiler says, in front."""
    for number, (words, job) in enumerate(changes):
        if job.storage.basis_memory == "host" or job.devices > gpu.MOST:
            continue
        with quiet_compiler():
            found = planning.forecast(job, card, planning.compiled(job, _gpu_mesh(job, card)))
        if found.fits:
            others = [other for k, (other, _) in enumerate(changes) if k != number]
            return [f"{words} ({_giga(found.needed)} GB by the compiler)", *(f"{o} (by the formula)" for o in others)]
    return [f"{words} (by the formula)" for words, _ in changes]


def _gpu_mesh(job: planning.Job, card: str) -> jax.sharding.Mesh:
    """The job's mesh of cards; with more memory than they have where the job needs more."""
    needed = planning.memory(job).total
    enough = needed <= gpu.memory_limit(ACCELERATORS[card])
    return make_mesh(job.axes or {"fsdp": 1}, planning.gpu_devices(card, job.devices, None if enough else 2 * needed))


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keeps back what XLA's own log says on stderr, which the plan says in its own words; shown where it fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _is_sound(fact: str, job: planning.Job) -> bool:
    """Whether a CPU's compiler gives this fact for other devices too: not where it widens narrow types."""
    dtypes = (job.dtype, job.vector_dtype, job.basis_dtype)
    return all(d in ("float32", "float64") for d in dtypes) or fact not in ("temporaries", "traffic")


def _giga(x: float) -> str:
    return f"{x / 1e9:.4g}"


def _rounded(facts: Any) -> Any:
    """Six digits of every number that is not counted."""
    if isinstance(facts, dict):
        return {key: _rounded(value) for key, value in facts.items() if key != "compile_seconds"}
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
