"""How the cost of one Hessian product grows: time, FLOPs, memory and traffic against tokens, layers, width, sequence
length and devices, on simulated devices; the exponents; the second paper's runtime law and its FSDP overhead.

Processor time is what is measured and fitted: simulated devices share the machine's cores, so that it is the work of
all of them together, and other work on the machine does not count. The first run of every program is not timed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

import jaxhess
from jaxhess.command import one_sentence, simulated_devices, terminal
from jaxhess.data import TokenBlocks
from jaxhess.distributed.memory import temporary_bytes
from jaxhess.distributed.mesh import data_shards, make_mesh, parse_axes
from jaxhess.errors import InputError
from jaxhess.files.output import Output
from jaxhess.files.run_folder import json_ready
from jaxhess.models import initialize
from jaxhess.operators.base import compiled_mv
from jaxhess.plan.collectives import bytes_by_kind, collective_traffic
from jaxhess.plan.compiled import gradient
from jaxhess.plan.hlo import matmul_flops, read_program
from jaxhess.plan.law import power_law, runtime_law
from jaxhess.results.figures import png
from jaxhess.vectors import random_probe

RECORD, PLOT = "scaling.json", "scaling.png"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model and its batch where something else is varied: large enough that calls cost less than products."""

    tokens: int = 2048
    """In the batch."""
    layers: int = 4
    """Of the model."""
    width: int = 128
    """Of the residual stream; the feed-forward is 8/3 of it."""
    length: int = 64
    """Tokens in a sequence."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is varied, one size at a time, and how often each program is run."""

    base: Sizes = Sizes()
    """The sizes that are not varied."""

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of the batch."""
    layers: tuple[int, ...] = (2, 4, 8, 16)
    """Layers of the model."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Widths of the residual stream: parameters grow with the square."""
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    """Tokens in a sequence, the tokens of the batch being the same."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Devices along fsdp; compiled, and not timed."""
    mesh_devices: int = 4
    """Devices of all other programs."""
    rounds: int = 3
    """Timed runs of every program; the median counts."""
    out: Path | None = None
    """Folder for scaling.json and scaling.png; by default nothing is written."""
    overwrite: bool = False
    """Replace an earlier result in that folder; files that no such command wrote are never replaced."""


def run(options: Options) -> dict[str, Any]:
    """Everything measured and fitted, as it is written to scaling.json."""
    if options.rounds < 1 or min(*options.devices, options.mesh_devices) < 1:
        raise InputError("--rounds, --devices and --mesh-devices must be at least 1.")
    if options.out is None:
        return measure(options)
    with Output(options.out, (RECORD, PLOT), options.overwrite) as output:
        facts = measure(options)
        text = json.dumps(json_ready(facts), indent=1) + "\n"
        output.write({PLOT: png(figure(facts), dpi=120), RECORD: text.encode()})
    return facts


def measure(options: Options) -> dict[str, Any]:
    """All of it, printed."""
    measured, base = _Measured(options.rounds), dataclasses.asdict(options.base)
    mesh = f"fsdp={options.mesh_devices}"
    every = ("gradient", "exact", "finite-difference")
    sweeps = {
        "tokens": [measured.at(mesh, {**base, "tokens": n}, every) for n in options.tokens],
        "layers": [measured.at(mesh, {**base, "layers": n}) for n in options.layers],
        "width": [measured.at(mesh, {**base, "width": n}) for n in options.widths],
        "length": [measured.at(mesh, {**base, "length": n}) for n in options.lengths],
        "devices": [measured.at(f"fsdp={n}", {**base, "devices": n}, timed=False) for n in options.devices],
    }  # fmt: skip
    cut = measured.at(mesh, base, every)
    whole = measured.at(f"data={options.mesh_devices}", base, every)
    facts = {
        "options": dataclasses.asdict(options),
        "sweeps": sweeps,
        "exponents": {axis: _exponents(axis, points) for axis, points in sweeps.items()},
        "runtime_law": {hvp: _law(sweeps["tokens"], hvp)._asdict() for hvp in ("exact", "finite-difference")},
        "fsdp_overhead": {what: cut[what]["seconds"] / whole[what]["seconds"] - 1 for what in every},
    }
    _print(terminal(), facts)
    return facts


class _Measured:
    """Points, each measured once."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.programs: dict[tuple, dict[str, Any]] = {}

    def at(
        self, mesh: str, sizes: dict[str, int], what: tuple[str, ...] = ("gradient", "exact"), timed: bool = True
    ) -> dict[str, Any]:
        """The sizes, the number of parameters, and facts about every program of `what`."""
        shape = {field.name: sizes[field.name] for field in dataclasses.fields(Sizes)}
        point: dict[str, Any] = {**sizes, "mesh": mesh}
        missing = [name for name in what if (mesh, *shape.values(), name, timed) not in self.programs]
        if missing:
            operators, vector = _problem(mesh, **shape)
            for name in missing:
                self.programs[mesh, *shape.values(), name, timed] = self._facts(operators[name], name, vector, timed)
        for name in what:
            point[name] = self.programs[mesh, *shape.values(), name, timed]
        point["parameters"] = point[what[0]]["parameters"]
        return point

    def _facts(self, operator: Any, name: str, vector: Any, timed: bool) -> dict[str, Any]:
        function, arguments = (gradient, (operator,)) if name == "gradient" else (compiled_mv, (operator, vector))
        began = time.process_time()
        compiled = function.lower(*arguments).compile()
        program = read_program(compiled)
        facts = {
            "parameters": operator.dim,
            **({"compile_seconds": time.process_time() - began} if timed else {}),
            "flops": matmul_flops(program),
            "temporaries": temporary_bytes(compiled),
            "received": sum(bytes_by_kind(collective_traffic(program)).values()),
        }
        if timed:
            jax.block_until_ready(compiled(*arguments))
            facts["seconds"] = statistics.median(self._seconds(compiled, arguments) for _ in range(self.rounds))
        return facts

    @staticmethod
    def _seconds(compiled: jax.stages.Compiled, arguments: tuple) -> float:
        began = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        return time.process_time() - began


def _problem(axes: str, tokens: int, layers: int, width: int, length: int) -> tuple[dict[str, Any], Any]:
    """Operators on a random Llama and random tokens, by the name of their product, and a vector."""
    config = jaxhess.DecoderConfig(
        vocab_size=256,
        embed_dim=width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        mlp_dim=8 * width // 3 // 16 * 16,
        max_positions=length,
    )
    mesh = make_mesh(axes, simulated_devices(math.prod(parse_axes(axes).values())))
    if tokens % (length * data_shards(mesh)):
        raise InputError(f"{tokens} tokens are not sequences of {length} for each of {data_shards(mesh)} devices.")
    model = initialize(config, jax.random.key(0), mesh)
    ids = np.random.default_rng(0).integers(0, 256, (tokens // length, length + 1)).astype(np.int32)
    blocks = TokenBlocks(ids, np.ones((len(ids), length), np.float32))
    arguments = (model.loss(), model.params, jaxhess.Microbatches(blocks.microbatches(len(ids), mesh)))
    exact = jaxhess.Hessian(*arguments)
    central = jaxhess.FiniteDifferenceHessian(*arguments, step=1e-3)
    vector = random_probe(jax.random.key(1), exact.shape_dtype)
    return {"gradient": exact, "exact": exact, "finite-difference": central}, vector


def _exponents(axis: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """Of everything about the exact product against this axis; of width, against parameters."""
    x = [point["parameters" if axis == "width" else axis] for point in points]
    found = {}
    for what in ("seconds", "flops", "temporaries", "received", "compile_seconds"):
        y = [point["exact"].get(what, 0) for point in points]
        if min(y) > 0 and len(set(x)) > 1:
            found[what] = power_law(x, y).exponent
    return found


def _law(points: list[dict[str, Any]], hvp: str) -> Any:
    return runtime_law([p["gradient"]["seconds"] for p in points], [p[hvp]["seconds"] for p in points])


def figure(facts: dict[str, Any]) -> Figure:
    """Time against every size with its exponent, and products against gradients with the runtime law."""
    drawn = Figure(figsize=(10, 6), layout="constrained")
    panels = drawn.subplots(2, 3).flat
    for axis in ("tokens", "layers", "width", "length"):
        panel = next(panels)
        points = facts["sweeps"][axis]
        x = [point["parameters" if axis == "width" else axis] for point in points]
        for name in ("exact", "gradient"):
            panel.loglog(x, [point[name]["seconds"] for point in points], "o-", label=name)
        label = {"width": "parameters", "length": "tokens in a sequence"}.get(axis, axis)
        exponent = facts["exponents"][axis].get("seconds")
        title = "" if exponent is None else f"exponent {exponent:.2f}"
        panel.set(xlabel=label, ylabel="processor seconds", title=title)
        _logarithmic(panel, x)
    panel = next(panels)
    points = facts["sweeps"]["tokens"]
    times = np.array([point["gradient"]["seconds"] for point in points])
    for name, law in facts["runtime_law"].items():
        (line,) = panel.plot(times, [point[name]["seconds"] for point in points], "o")
        label = f"{name}: {law['slope']:.2f} T {1e3 * law['constant']:+.0f} ms"
        panel.plot(times, law["slope"] * times + law["constant"], color=line.get_color(), label=label)
    panel.set(xlabel="gradient T, seconds", ylabel="product, seconds", title="runtime law")
    panel.legend(fontsize="small", framealpha=0.5)
    panel = next(panels)
    points = facts["sweeps"]["devices"]
    x = [point["devices"] for point in points]
    for what, label in (("temporaries", "temporaries"), ("received", "received through collectives")):
        pairs = [(n, point["exact"][what] / 1e6) for n, point in zip(x, points, strict=True) if point["exact"][what]]
        panel.loglog(*zip(*pairs, strict=True), "o-", label=label)
    panel.set(xlabel="devices (fsdp)", ylabel="MB on each device", title="one product")
    _logarithmic(panel, x)
    return drawn


def _logarithmic(panel: Axes, x: list[int]) -> None:
    """Ticks at the points, and at 1, 2 and 5 in every decade."""
    panel.set_xticks(x, [f"{n:,}" for n in x], rotation=20)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.legend(fontsize="small", framealpha=0.5)


def _print(console: Console, facts: dict[str, Any]) -> None:
    for axis, points in facts["sweeps"].items():
        table = Table(
            axis, "parameters", "product, s", "in gradients", "GFLOPs", "temporaries, MB", "received, MB", "compile, s"
        )
        for point in points:
            exact = point["exact"]
            seconds = exact.get("seconds")
            table.add_row(
                f"{point[axis]:,}",
                f"{point['parameters']:,}",
                "" if seconds is None else f"{seconds:.3g}",
                "" if seconds is None else f"{seconds / point['gradient']['seconds']:.2f}",
                f"{exact['flops'] / 1e9:.4g}",
                f"{exact['temporaries'] / 1e6:.4g}",
                f"{exact['received'] / 1e6:.4g}",
                f"{exact['compile_seconds']:.2g}" if "compile_seconds" in exact else "",
            )
        console.print(table)
        against = "parameters" if axis == "width" else axis
        console.print(
            f"exponents in {against}: " + ", ".join(f"{k} {v:.2f}" for k, v in facts["exponents"][axis].items())
        )
    for hvp, law in facts["runtime_law"].items():
        console.print(
            f"{hvp}: T_HVP = {law['slope']:.2f} T_grad {1e3 * law['constant']:+.1f} ms (within {law['residual']:.0%})"
        )
    overhead = ", ".join(f"{what} {share:+.0%}" for what, share in facts["fsdp_overhead"].items())
    console.print(f"fsdp over replicated parameters: {overhead} of processor time")


def main() -> None:
    """Reads the options and measures."""
    options = tyro.cli(Options, description=__doc__)
    with one_sentence():
        jax.config.update("jax_platforms", "cpu")
        simulated_devices(max(*options.devices, options.mesh_devices))
        run(options)


if __name__ == "__main__":
    main()
