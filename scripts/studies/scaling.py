"""How the cost of one Hessian product grows: time, FLOPs, memory and traffic against tokens, layers, width, sequence
length and devices, on simulated devices; the exponents; the second paper's runtime law and its FSDP overhead.

    python -m scripts.studies.scaling

Processor time is what is measured and fitted: simulated devices share the machine's cores, so that it is the work of
all of them together, and other work on the machine does not count. The first run of every program is not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import jaxhess
from jaxhess.command import simulated_devices
from jaxhess.data import TokenBlocks
from jaxhess.distributed.memory import temporary_bytes
from jaxhess.distributed.mesh import data_shards, make_mesh, parse_axes
from jaxhess.errors import InputError
from jaxhess.models import initialize
from jaxhess.operators.base import compiled_mv
from jaxhess.plan.collectives import bytes_by_kind, collective_traffic
from jaxhess.plan.compiled import gradient
from jaxhess.plan.hlo import matmul_flops, read_program
from jaxhess.plan.law import Affine, power_law, runtime_law
from jaxhess.results.page import Table
from jaxhess.results.study import Claim, Range, Study
from jaxhess.vectors import random_probe
from scripts.studies.harness import FOUNDATION, HESSFORMER, StudyOptions, command, picture

NAME = "scaling"
CAPTION = """Processor time against every size, with the exponent of exact products; products against gradients, with
the runtime law of arXiv 2602.00816; memory and traffic of one device. Points without a time are only compiled."""
PROGRAMS = ("gradient", "exact", "finite-difference")


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
class Options(StudyOptions):
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


SMALL = Options(
    base=Sizes(512, 2, 64, 32),
    tokens=(512, 2048),
    layers=(2,),
    widths=(32, 64),
    lengths=(32,),
    devices=(2, 4),
    rounds=5,
)


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A compiled program: what it takes on one device, and the processor seconds of all in each timed run."""

    parameters: int
    flops: float
    temporaries: int
    received: int
    compile_seconds: float
    times: list[float]

    @property
    def seconds(self) -> float:
        """The median run; NaN if none was timed."""
        return float(np.median(self.times)) if self.times else math.nan


@dataclasses.dataclass(frozen=True)
class Point:
    """The programs of one size on one mesh, by name."""

    at: int
    programs: dict[str, ProgramCost]

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.programs["gradient"].parameters


def study(options: Options) -> Study:
    """Everything measured and fitted."""
    if options.rounds < 1 or min(*options.devices, options.mesh_devices) < 1:
        raise InputError("--rounds, --devices and --mesh-devices must be at least 1.")
    simulated_devices(max(*options.devices, options.mesh_devices))
    mesh, base = f"fsdp={options.mesh_devices}", options.base

    def programs(
        mesh: str, sizes: Sizes, names: tuple[str, ...] = PROGRAMS[:2], timed: bool = True
    ) -> dict[str, ProgramCost]:
        return {name: measured(mesh, sizes, name, options.rounds if timed else 0) for name in names}

    def sweep(size: str, values: tuple[int, ...], names: tuple[str, ...] = PROGRAMS[:2]) -> list[Point]:
        return [Point(n, programs(mesh, dataclasses.replace(base, **{size: n}), names)) for n in values]

    sweeps = {
        "tokens": sweep("tokens", options.tokens, PROGRAMS),
        "layers": sweep("layers", options.layers),
        "width": sweep("width", options.widths),
        "length": sweep("length", options.lengths),
        "devices": [Point(n, programs(f"fsdp={n}", base, timed=False)) for n in options.devices],
    }
    cut, whole = (programs(f"{axis}={options.mesh_devices}", base, PROGRAMS) for axis in ("fsdp", "data"))
    overhead = {name: np.divide(cut[name].times, whole[name].seconds) - 1 for name in PROGRAMS}
    exponents = {axis: exponents_of(axis, points) for axis, points in sweeps.items()}
    laws = {name: law(sweeps["tokens"], name) for name in PROGRAMS[1:]}
    return Study(
        "How the cost of a Hessian product grows",
        tuple(claims(options, sweeps, overhead)),
        tuple(tables(sweeps, exponents, laws, overhead)),
        (picture(NAME, figure(sweeps, exponents, laws), CAPTION),),
        {
            "sweeps": {axis: [dataclasses.asdict(point) for point in points] for axis, points in sweeps.items()},
            "exponents": exponents,
            "runtime_law": {name: found._asdict() for name, found in laws.items()},
            "fsdp_overhead": overhead,
        },
    )


def claims(options: Options, sweeps: dict[str, list[Point]], overhead: dict[str, np.ndarray]) -> Iterator[Claim]:
    """What the papers say of cost. A factor given as an integer is taken as that integer after rounding."""
    points = [point.programs for points in sweeps.values() for point in points]
    factors = [programs["exact"].flops / programs["gradient"].flops for programs in points]
    memory = [programs["exact"].temporaries / programs["gradient"].temporaries for programs in points]
    slopes = [law(sweeps["tokens"], "finite-difference", i).slope for i in range(options.rounds)]
    devices, work = [p.at for p in sweeps["devices"]], [p.programs["exact"].flops for p in sweeps["devices"]]
    base = options.base
    model = f"random Llama, {base.layers} layers, width {base.width}; {options.mesh_devices} simulated devices"
    exponent = power_law(devices, work).exponent if len(set(devices)) > 1 else None
    # fmt: off
    rows: list[tuple[str, str, str, str, str, Range, float | None, float, str]] = [
        (FOUNDATION, "Architecture Onboarding, Critical path", "A product by finite differences takes two gradients.",
         "T_HvP ≈ 2 T_grad + T_vec", "slope of its processor time against the gradient's", (1.5, 2.5),
         float(np.mean(slopes)), spread(slopes), ""),
        (FOUNDATION, "Abstract", "The full operator costs a modest constant factor more than first-order training.",
         "a modest constant factor", "FLOPs of an exact product in gradients, over all sizes", (1, 4),
         (max(factors) + min(factors)) / 2, (max(factors) - min(factors)) / 2, ""),
        (FOUNDATION, "Failure signatures; Appendix B", "FSDP makes a small model slower than replicated parameters.",
         "about 35% overhead", "additional processor time of the gradient", (0.3, 0.4),
         float(np.mean(overhead["gradient"])), spread(overhead["gradient"]),
         "simulated devices share one memory: no network takes part"),
        (FOUNDATION, "Key Results", "Work is divided nearly linearly over devices.", "near-linear scaling across nodes",
         "exponent of FLOPs per device against devices", (-1.1, -0.9), exponent, 0.0,
         "operations are counted, and not the time on several nodes"),
        (HESSFORMER, "Section 2", "The second backward pass doubles the memory of activations.", "doubles",
         "temporaries of an exact product over those of the gradient", (1.5, 2.5),
         (max(memory) + min(memory)) / 2, (max(memory) - min(memory)) / 2, ""),
        (HESSFORMER, "Section 3.1", "Fully sharded parameters do not allow for a double backward pass.", "not possible",
         "relative distance of the exact product under fsdp from the one of replicated parameters", (0.1, None),
         sharded_distance(options), 0.0, ""),
    ]
    # fmt: on
    for *row, holds, ours, error, obstacle in rows:
        source, place, statement, paper, quantity = row
        yield Claim(source, place, statement, paper, quantity, holds, ours, error, model, obstacle)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Twice the standard error of the mean of these rounds; of one round all that is known is its own size."""
    return float(2 * np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else abs(float(values[0]))


@functools.cache
def measured(mesh: str, sizes: Sizes, name: str, rounds: int) -> ProgramCost:
    """The gradient or product of this name, compiled, and run once more than it is timed."""
    operators, vector = problem(mesh, sizes)
    operator = operators[name]
    function, arguments = (gradient, (operator,)) if name == "gradient" else (compiled_mv, (operator, vector))
    began = time.process_time()
    compiled = function.lower(*arguments).compile()
    seconds = time.process_time() - began
    read = read_program(compiled)
    times = []
    for _ in range(rounds and rounds + 1):
        began = time.process_time()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.process_time() - began)
    received = sum(bytes_by_kind(collective_traffic(read)).values())
    return ProgramCost(operator.dim, matmul_flops(read), temporary_bytes(compiled), int(received), seconds, times[1:])


@functools.lru_cache(maxsize=1)
def problem(axes: str, sizes: Sizes) -> tuple[dict[str, Any], Any]:
    """Operators on a random Llama and random tokens, by the name of their product, and a vector."""
    config = jaxhess.DecoderConfig(
        vocab_size=256,
        embed_dim=sizes.width,
        num_layers=sizes.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=sizes.width // 4,
        mlp_dim=8 * sizes.width // 3 // 16 * 16,
        max_positions=sizes.length,
    )
    mesh = make_mesh(axes, simulated_devices(math.prod(parse_axes(axes).values())))
    tokens, length, shards = sizes.tokens, sizes.length, data_shards(mesh)
    if tokens % (length * shards):
        raise InputError(f"{tokens} tokens are not sequences of {length} for each of {shards} devices.")
    model = initialize(config, jax.random.key(0), mesh)
    ids = np.random.default_rng(0).integers(0, 256, (tokens // length, length + 1)).astype(np.int32)
    blocks = TokenBlocks(ids, np.ones((len(ids), length), np.float32))
    arguments = (model.loss(), model.params, jaxhess.Microbatches(blocks.microbatches(len(ids), mesh)))
    exact = jaxhess.Hessian(*arguments)
    central = jaxhess.FiniteDifferenceHessian(*arguments, step=1e-3)
    vector = random_probe(jax.random.key(1), exact.shape_dtype)
    return {"gradient": exact, "exact": exact, "finite-difference": central}, vector


def sharded_distance(options: Options) -> float:
    """How far the exact product under fsdp is from that of replicated parameters, relative to the latter."""
    products = []
    for axis in ("fsdp", "data"):
        operators, vector = problem(f"{axis}={options.mesh_devices}", options.base)
        products.append([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(operators["exact"] @ vector)])
    cut, whole = map(np.concatenate, products)
    return float(np.linalg.norm(cut - whole) / np.linalg.norm(whole))


def exponents_of(axis: str, points: list[Point]) -> dict[str, float]:
    """Of everything about the exact product against this axis; of width, against parameters."""
    x, found = places(axis, points), {}
    for what in ("seconds", "flops", "temporaries", "received", "compile_seconds"):
        y = [getattr(point.programs["exact"], what) for point in points]
        if min(y) > 0 and len(set(x)) > 1:
            found[what] = power_law(x, y).exponent
    return found


def places(axis: str, points: list[Point]) -> list[int]:
    """What points are drawn and fitted against."""
    return [point.parameters if axis == "width" else point.at for point in points]


def law(points: list[Point], name: str, round_: int | None = None) -> Affine:
    """The runtime law of a product over the tokens, by the median runs or by those of one round."""

    def seconds(program: ProgramCost) -> float:
        return program.seconds if round_ is None else program.times[round_]

    return runtime_law(*([seconds(point.programs[n]) for point in points] for n in ("gradient", name)))


def tables(
    sweeps: dict[str, list[Point]],
    exponents: dict[str, dict[str, float]],
    laws: dict[str, Affine],
    overhead: dict[str, np.ndarray],
) -> Iterator[Table]:
    """Every sweep, the exponents, and what was fitted and compared."""
    head = ("parameters", "product, s", "in gradients", "GFLOPs", "temporaries, MB", "received, MB", "compile, s")
    for axis, points in sweeps.items():
        rows = []
        for point in points:
            exact, slope = point.programs["exact"], point.programs["gradient"]
            numbers = (exact.seconds, exact.seconds / slope.seconds, exact.flops / 1e9, exact.temporaries / 1e6)
            cells = [
                "" if math.isnan(x) else f"{x:.3g}" for x in (*numbers, exact.received / 1e6, exact.compile_seconds)
            ]
            rows.append((f"{point.at:,}", f"{point.parameters:,}", *cells))
        found = ", ".join(f"{what} {power:.2f}" for what, power in exponents[axis].items())
        against = "parameters" if axis == "width" else axis
        yield Table((axis, *head), rows, f"One exact product. Exponents in {against}: {found or 'none'}")
    yield Table(
        ("product", "T_HVP", "largest residual"),
        [(n, f"{x.slope:.2f} T_grad {1e3 * x.constant:+.1f} ms", f"{x.residual:.0%}") for n, x in laws.items()],
        "Runtime law",
    )
    means = [(name, f"{np.mean(x):+.0%}") for name, x in overhead.items()]
    yield Table(("program", "more processor time"), means, "fsdp beside replicated parameters")


def figure(sweeps: dict[str, list[Point]], exponents: dict[str, dict[str, float]], laws: dict[str, Affine]) -> Figure:
    """Time against every size with its exponent, and products against gradients with the runtime law."""
    drawn = Figure(figsize=(10, 6), layout="constrained")
    panels = drawn.subplots(2, 3).flat
    for axis in ("tokens", "layers", "width", "length"):
        panel, points = next(panels), sweeps[axis]
        for name in ("exact", "gradient"):
            panel.loglog(places(axis, points), [point.programs[name].seconds for point in points], "o-", label=name)
        label = {"width": "parameters", "length": "tokens in a sequence"}.get(axis, axis)
        power = exponents[axis].get("seconds")
        panel.set(xlabel=label, ylabel="processor seconds", title="" if power is None else f"exponent {power:.2f}")
        _logarithmic(panel, places(axis, points))
    panel, points = next(panels), sweeps["tokens"]
    times = np.array([point.programs["gradient"].seconds for point in points])
    for name, found in laws.items():
        (line,) = panel.plot(times, [point.programs[name].seconds for point in points], "o")
        label = f"{name}: {found.slope:.2f} T {1e3 * found.constant:+.0f} ms"
        panel.plot(times, found.slope * times + found.constant, color=line.get_color(), label=label)
    panel.set(xlabel="gradient T, seconds", ylabel="product, seconds", title="runtime law")
    panel.legend(fontsize="small", framealpha=0.5)
    panel, points = next(panels), sweeps["devices"]
    for what, label in (("temporaries", "temporaries"), ("received", "received through collectives")):
        pairs = [(p.at, getattr(p.programs["exact"], what) / 1e6) for p in points if getattr(p.programs["exact"], what)]
        panel.loglog(*zip(*pairs, strict=True), "o-", label=label)
    panel.set(xlabel="devices (fsdp)", ylabel="MB on each device", title="one product")
    _logarithmic(panel, places("devices", points))
    return drawn


def _logarithmic(panel: Axes, x: list[int]) -> None:
    """Ticks at the points, and at 1, 2 and 5 in every decade."""
    panel.set_xticks(x, [f"{n:,}" for n in x], rotation=20)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.legend(fontsize="small", framealpha=0.5)


def main() -> None:
    """Reads the options and runs."""
    jax.config.update("jax_platforms", "cpu")
    command(NAME, study, Options, __doc__)


if __name__ == "__main__":
    main()
